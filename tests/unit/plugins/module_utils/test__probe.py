# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import collections
import heapq
import ipaddress
import json
import random
import struct

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _probe
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

NONCE = b"12345678"


def key(number):
    return base64.b64encode(bytes([number % 256, number // 256 % 256, 7]) + bytes(28) + b"\x40").decode()


def document(count, **changes):
    nodes = {}
    for number in range(1, count + 1):
        nodes["worker-%d" % number] = {
            "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)},
            "endpoints": {"ipv4": {"address": "198.18.0.%d" % number, "port": None}},
            "pod_cidrs": ["10.244.%d.0/24" % number], "node_addresses": ["198.18.0.%d" % number],
            "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": None, "keepalive": 0}
    for name, change in changes.items():
        nodes[name.replace("_", "-")].update(change)
    return {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": nodes}


# --- packets -------------------------------------------------------------------------------------------------------------------------

def test_request_is_laid_out_as_rfc_4443_says():
    packet = _probe.echo_request(0x1234, 0x0102, NONCE, 100)
    assert packet[:8] == bytes([128, 0, 0, 0, 0x12, 0x34, 1, 2])
    assert packet[8:16] == NONCE
    # the IPv6 header of 40 bytes is the kernel's
    assert len(packet) == 60
    with pytest.raises(ValueError):
        _probe.echo_request(1, 1, NONCE, _probe.SMALL_SIZE - 1)


def answer(ident=7, sequence=3, nonce=NONCE, size=100, kind=129, code=0):
    return struct.pack("!BBHHH", kind, code, 0, ident, sequence) + nonce + bytes(size - 48 - len(nonce))


def test_reply():
    assert _probe.parse_reply(answer(), 7, NONCE) == (3, 100)
    for wrong in (answer(ident=8), answer(nonce=b"87654321"), answer(kind=128), answer(code=1), b"", answer()[:15]):
        assert _probe.parse_reply(wrong, 7, NONCE) is None


@given(st.binary(max_size=64))
def test_nothing_that_comes_in_breaks_it(data):
    _probe.parse_reply(data, 7, NONCE)


@pytest.mark.parametrize("size", [57, 576, 1280, 1281, 1296, 1300, 1420, 1440, 8920, 65455])
def test_ladder(size):
    sizes = _probe.ladder(size)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(56 < step < size for step in sizes)
    assert len(sizes) <= _probe.LADDER_STEPS + 4
    assert (1280 in sizes) == (size > 1280)


def test_ladder_of_the_usual_mtu_is_as_fine_as_the_padding():
    assert _probe.ladder(1420)[:9] == [1404, 1388, 1372, 1356, 1340, 1324, 1308, 1292, 1280]


# --- the schedule, against a network made here -------------------------------------------------------------------------------------------

class Network:
    """Virtual time and a network with delay, loss and a greatest size for each peer."""

    def __init__(self, delay=0.01, loss=0.0, limits=None, dead=(), handshake_seconds=0.0, seed=1):
        self.random = random.Random(seed)
        self.delay, self.loss, self.limits, self.dead, self.handshake_seconds = delay, loss, limits or {}, set(dead), handshake_seconds
        self.first = {}
        self.sent = []

    def answers(self, now, address, size):
        """Time of the answer, or None."""
        first = self.first.setdefault(address, now)
        self.sent.append((now, address, size))
        if address in self.dead or size > self.limits.get(address, 65535) or self.random.random() < self.loss:
            return None
        return max(now, first + self.handshake_seconds) + self.delay


def run(peers, network, timeout=15.0, seed=2):
    """-> (schedule, virtual seconds it took)."""
    schedule = _probe.EchoSchedule(peers, 100.0, random.Random(seed))
    now, deadline, replies = 100.0, 100.0 + timeout, []
    while not schedule.done() and now < deadline:
        for address, sequence, size in schedule.due(now):
            when = network.answers(now, address, size)
            if when is not None:
                heapq.heappush(replies, (when, address, sequence, size))
        following = schedule.next_time(now)
        if schedule.done():
            break
        times = [deadline] + ([following] if following is not None else []) + ([replies[0][0]] if replies else [])
        now = max(now + 1e-6, min(times))
        while replies and replies[0][0] <= now:
            dummy, address, sequence, size = heapq.heappop(replies)
            schedule.received(now, address, sequence, size)
    return schedule, now - 100.0


def peers_for(count, size=1420, late=False):
    return [{"name": "n%d" % number, "address": number, "size": size, "late": late} for number in range(count)]


def test_three_peers_take_two_packets_each():
    network = Network()
    schedule, took = run(peers_for(3), network)
    assert schedule.done() and took < 0.5
    assert collections.Counter(size for dummy, dummy, size in network.sent) == {56: 3, 1420: 3}
    assert schedule.results()["n1"] == {"rtt": pytest.approx(0.01), "size": 1420, "error": None}


def test_without_full_size():
    network = Network()
    schedule, dummy = run(peers_for(3, size=None), network)
    assert schedule.done() and len(network.sent) == 3
    assert schedule.results()["n0"]["size"] == 56


def test_five_thousand_peers_within_the_timeout_and_the_rate():
    network = Network(delay=0.05, handshake_seconds=0.1)
    schedule, took = run(peers_for(5000), network)
    assert schedule.done() and took < 7.0
    assert all(result["size"] == 1420 for result in schedule.results().values())
    times = [now for now, dummy, dummy in network.sent]
    assert len(times) == 10000
    window = collections.deque()
    for now in times:
        window.append(now)
        while window[0] < now - 1.0:
            window.popleft()
        assert len(window) <= _probe.RATE + _probe.BURST + 1


def test_five_thousand_peers_whose_first_handshake_is_repeated_after_five_seconds():
    """All the handshakes crossed: WireGuard repeats them after 5 s and up to 0.33 s more (REKEY_TIMEOUT and its jitter)."""
    schedule, took = run(peers_for(5000, late=True), Network(delay=0.05, handshake_seconds=5.4))
    assert schedule.done() and took < 15.0
    assert all(result["size"] == 1420 for result in schedule.results().values())


def test_loss_is_borne():
    schedule, dummy = run(peers_for(300), Network(loss=0.3))
    unproven = [name for name, result in schedule.results().items() if result["size"] < 1420]
    # six tries at full size: 0.51 lost both ways to the sixth is 1.8 percent if losses hit each way; here 0.3 ** 6 is below 0.1 percent
    assert len(unproven) <= 2


@pytest.mark.parametrize("limit,seen", [(1419, 1404), (1380, 1372), (1300, 1292), (1280, 1280), (1100, 1000), (400, 56)])
def test_path_that_loses_big_packets_is_measured(limit, seen):
    network = Network(limits={0: limit})
    schedule, took = run(peers_for(2), network)
    # known before the time is over
    assert schedule.done() and took < 6.0
    assert schedule.results()["n0"]["size"] == seen
    assert schedule.results()["n1"]["size"] == 1420


def test_dead_peer_is_tried_to_the_end_and_does_not_hold_up_others():
    network = Network(dead=[0])
    schedule, took = run(peers_for(3), network)
    assert not schedule.done() and took == pytest.approx(15.0)
    results = schedule.results()
    assert results["n0"] == {"rtt": None, "size": 0, "error": None}
    assert results["n1"]["size"] == results["n2"]["size"] == 1420
    assert 11 <= len([1 for dummy, address, dummy in network.sent if address == 0]) <= 16


def test_late_side_waits_and_others_do_not():
    network = Network()
    run([dict(peer, late=peer["address"] == 1) for peer in peers_for(2)], network)
    first = {}
    for now, address, dummy in network.sent:
        first.setdefault(address, now - 100.0)
    assert first[0] < 0.3 and 1.0 <= first[1] < 1.3


def test_order_is_not_that_of_the_document():
    network = Network()
    run(peers_for(50), network)
    assert [address for dummy, address, size in network.sent if size == 56] != list(range(50))


def test_answers_nobody_asked_for_count_nothing():
    schedule = _probe.EchoSchedule(peers_for(1), 0.0, random.Random(1))
    schedule.received(1.0, 0, 5, 1420)
    schedule.received(1.0, 99, 1, 1420)
    assert schedule.results()["n0"]["rtt"] is None
    (sent,) = schedule.due(1.0)
    schedule.received(1.5, *sent)
    schedule.received(1.6, *sent)
    assert schedule.results()["n0"]["rtt"] == 0.5 and not schedule.done()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 10 ** 6), st.sampled_from([None, 1280, 1420, 8920]), st.booleans())
def test_any_network(count, loss, seed, size, late):
    network = Network(loss=loss, seed=seed, limits={0: 1300})
    schedule, took = run(peers_for(count, size, late), network, seed=seed)
    assert took <= 15.001
    results = schedule.results()
    assert len(results) == count
    for result in results.values():
        assert (result["rtt"] is None) == (result["size"] == 0)
        assert result["size"] <= (size or 56)
    if loss == 0:
        assert schedule.done()


def test_who_is_late_waits_no_longer_than_the_other_needs():
    peers = [dict(peer, late=late) for peer, late in zip(peers_for(3), (True, True, False))]
    schedule = _probe.EchoSchedule(peers, 0.0, random.Random(1))
    assert schedule.late == {peers[0]["address"], peers[1]["address"]}
    first = [address for address, dummy, dummy2 in schedule.due(0.5)]
    assert first == [peers[2]["address"]], "the others wait"
    # one that does not wait is asked no more often for it
    schedule.hasten(0.6, [peers[0]["address"], peers[2]["address"]])
    assert [address for address, dummy, dummy2 in schedule.due(0.6)] == [peers[0]["address"]]
    assert schedule.late == {peers[1]["address"]}
    assert peers[1]["address"] in [address for address, dummy, dummy2 in schedule.due(_probe.LATE_SECONDS + _probe.FIRST_SPREAD)]
    # who knows when the other side begins need not wait so long
    schedule = _probe.EchoSchedule(peers, 0.0, random.Random(1), 0.25)
    assert peers[1]["address"] not in [address for address, dummy, dummy2 in schedule.due(0.2)]
    assert peers[1]["address"] in [address for address, dummy, dummy2 in schedule.due(0.25 + _probe.FIRST_SPREAD)]
    assert schedule.late == set()


def test_the_device_is_looked_at_while_somebody_is_late(monkeypatch):
    """A knock is sent as soon as a look says that the handshake is over, and nobody looks any more after it."""
    clock, looks, sent = [0.0], [], []

    class Handle:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def setsockopt(self, *dummy):
            pass

        def setblocking(self, flag):
            pass

        def bind(self, address):
            pass

        def sendto(self, data, address):
            sent.append((clock[0], address[0]))

    def look():
        looks.append(clock[0])
        return [packed] if len(looks) == 3 else []

    def pass_time(dummy, dummy2, dummy3, seconds):
        clock[0] += max(seconds, 1e-6)

    packed = ipaddress.ip_address("fd00::1").packed
    schedule = _probe.EchoSchedule([{"name": "n", "address": packed, "size": None, "late": True}], 0.0, random.Random(1))
    monkeypatch.setattr(_probe.socket, "socket", lambda *dummy: Handle())
    monkeypatch.setattr(_probe.select, "select", pass_time)
    monkeypatch.setattr(_probe, "_answers", lambda *dummy: None)
    _probe.run_knock("fd00::2", 1, schedule, 0.9, look, clock=lambda: clock[0])
    assert sent == [(looks[2], "fd00::1")] and len(looks) == 3
    assert looks == pytest.approx([_probe.LATE_LOOK * number for number in (1, 2, 3)], abs=1e-3)


def test_no_peers():
    schedule = _probe.EchoSchedule([], 0.0, random.Random(1))
    assert schedule.done() and schedule.next_time(0.0) is None and schedule.due(0.0) == [] and schedule.results() == {}


# --- whom, and what it means ------------------------------------------------------------------------------------------------------------

def test_plan_peers():
    doc = document(4, worker_3={"mtu": 1400}, worker_4={"state": "pending", "reason": "no key", "public_keys": {}, "probe_addresses": {}})
    _mesh.validate_document(doc)
    peers, without_key = _probe.plan_peers(doc, "worker-1", 0)
    assert sorted(peers) == ["worker-2", "worker-3"] and without_key == ["worker-4"]
    assert peers["worker-3"] == {"public_key": key(3), "address": _mesh.probe_address(key(3)), "endpoint": "198.18.0.3:51840",
                                 "ipv4": "198.18.0.3", "mtu": 1400}
    assert _probe.plan_peers(doc, "worker-1", 0, ["worker-2"])[0].keys() == {"worker-2"}
    assert _probe.plan_peers(doc, "worker-1", 0, ["worker-4"]) == ({}, ["worker-4"])
    with pytest.raises(MeshError, match="worker-9"):
        _probe.plan_peers(doc, "worker-1", 0, ["worker-9"])
    with pytest.raises(MeshError, match="worker-1 itself"):
        _probe.plan_peers(doc, "worker-1", 0, ["worker-1"])
    with pytest.raises(MeshError, match="worker-4"):
        _probe.plan_peers(doc, "worker-4", 0)
    with pytest.raises(MeshError, match="generation"):
        _probe.plan_peers(doc, "worker-1", 1)


def test_one_side_of_each_pair_is_late():
    nobody = {"peers": {}}
    for one in (1, 2, 300):
        for other in (1, 2, 300):
            if one != other:
                assert _probe.is_late(key(one), key(other), nobody, 1000.0) != _probe.is_late(key(other), key(one), nobody, 1000.0)


@pytest.mark.parametrize("handshake,late", [(0.0, True), (999.0, False), (880.5, False), (880.0, True), (1001.0, True)])
def test_nobody_waits_where_the_session_stands(handshake, late):
    state = {"peers": {key(1): {"last_handshake": handshake}}}
    assert _probe.is_late(key(2), key(1), state, 1000.0) == late


@pytest.mark.parametrize("own,peer,expected", [(1420, None, 1420), (1420, 1400, 1400), (1400, 1420, 1400), (56, None, None)])
def test_full_size_is_what_both_devices_send(own, peer, expected):
    assert _probe.full_size(own, peer) == expected


PEER = {"public_key": key(2), "address": "fe80::2", "endpoint": "198.18.0.2:51840", "ipv4": "198.18.0.2", "mtu": None}
NOW = 100000.0


def state(handshake=NOW - 1, rx=200, endpoint="198.18.0.2:51840"):
    return {"endpoint": endpoint, "last_handshake": handshake, "rx_bytes": rx}


HEARD = {"rtt": 0.001, "size": 1420, "error": None}
SILENT = {"rtt": None, "size": 0, "error": None}


@pytest.mark.parametrize("before,after,answer,reason,words", [
    (state(rx=100), state(), HEARD, "", ""),
    (None, state(), HEARD, "", ""),
    (state(rx=100), state(handshake=NOW - 274), HEARD, "", ""),
    (state(rx=100), state(handshake=NOW + 50), HEARD, "", ""),
    # a clock that was set forward by a day, and a handshake by an implementation that has not noticed
    (state(rx=100, handshake=NOW - 86500), state(handshake=NOW - 86400), HEARD, "", ""),
    (state(rx=100, handshake=NOW - 86400), state(handshake=NOW - 86400), HEARD, "stale", "275 s"),
    (state(rx=100), None, HEARD, "not_configured", "module interface"),
    (state(rx=100), state(handshake=0.0), SILENT, "no_handshake", "UDP port 51840"),
    (state(rx=100), state(handshake=0.0, endpoint=None), SILENT, "no_endpoint", "mesh_endpoint"),
    (state(rx=100), state(handshake=NOW - 275), SILENT, "no_handshake", "198.18.0.2:51840"),
    (state(rx=100), state(handshake=NOW - 275), HEARD, "stale", "275 s"),
    (state(rx=200), state(rx=200), HEARD, "stale", "another device"),
    (state(rx=100), state(), SILENT, "no_echo", "ICMPv6"),
    (state(rx=100), state(), dict(HEARD, size=1372), "full_size_lost", "full 1420 bytes do not, 1372 bytes do; lower mesh_mtu to 1372"),
    (state(rx=100), state(), dict(HEARD, size=1000), "full_size_lost", "1000 bytes do; lower mesh_mtu, or"),
    (state(rx=100), state(), dict(HEARD, size=56), "full_size_lost", "none of 576 bytes"),
    (state(rx=100), state(handshake=0.0), dict(SILENT, error="56 bytes: Operation not permitted"), "no_handshake", "not permitted"),
    (state(rx=100), state(), None, "", ""),
    (state(rx=200), state(rx=200), None, "no_traffic", "nothing was received"),
    (state(rx=100), state(handshake=0.0), None, "no_handshake", "firewall"),
])
def test_judge(before, after, answer, reason, words):
    entry = _probe.judge(PEER, before, after, answer, NOW, 1420)
    assert entry["reason"] == reason and entry["proven"] == (reason == "")
    assert words in entry["message"] and bool(entry["message"]) == bool(reason)
    assert entry["public_key"] == key(2)


def test_small_is_enough_when_full_size_is_not_asked_for():
    assert _probe.judge(PEER, None, state(), dict(HEARD, size=56), NOW, None)["proven"]


def test_summary_is_bounded():
    entries = {"n%04d" % number: dict(_probe.no_key_entry(), rtt=number / 1000.0) for number in range(5000)}
    entries["good"] = {"proven": True, "rtt": None}
    result = _probe.summary("n", entries, ["x"] * 200, "echo")
    assert (result["peer_count"], result["proven_count"], result["unproven_count"]) == (5001, 1, 5000)
    assert len(result["unproven"]) == len(result["without_key"]) == 50
    assert len(result["unproven_names"]) == 5000 and result["unproven_names"][-1] == "n4999"
    assert result["unproven"][0]["message"].startswith("n to n0000: there is no public key")
    assert result["slowest_peer"] == "n4999" and result["slowest_rtt"] == 4.999
    assert len(json.dumps(dict(result, unproven_names=[]))) < 20000
    empty = _probe.summary("n", {}, [], "echo")
    assert empty["slowest_rtt"] is None and empty["slowest_peer"] is None


# --- handshake only ---------------------------------------------------------------------------------------------------------------------

def test_handshake_only_goes_on_until_all_are_seen(monkeypatch):
    sent = []

    class Socket:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def setsockopt(self, *args):
            sent.append(args)

        def setblocking(self, flag):
            pass

        def sendto(self, data, target):
            sent.append(target)
            if target[0] == "198.18.0.3":
                raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_probe.socket, "socket", lambda *args: Socket())
    peers = {"a": dict(PEER), "b": dict(PEER, public_key=key(3), ipv4="198.18.0.3"), "c": dict(PEER, public_key=key(4), ipv4=None)}
    states = [{"peers": {key(2): state(handshake=0.0, rx=0)}}, {"peers": {key(2): state(handshake=0.0, rx=0)}},
              {"peers": {key(2): state(rx=92)}}]
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds + 0.001
    before, after = _probe.run_handshakes("wgmesh0", peers, lambda: states.pop(0) if len(states) > 1 else states[0], 4.0,
                                          clock=lambda: clock[0], epoch=lambda: NOW, sleep=sleep)
    entries = _probe.judge_all(peers, before, after, None, NOW, {})
    assert entries["a"]["proven"] and not entries["b"]["proven"] and not entries["c"]["proven"]
    assert sent.count(("198.18.0.2", 9)) == 2, "no more packets once it is proven"
    assert sent.count(("198.18.0.3", 9)) >= 4
    assert sent[0][1] == 25 and sent[0][2] == b"wgmesh0\0", "bound to the device before anything is sent"
    assert 4.0 <= clock[0] < 5.1


# --- the proof file ---------------------------------------------------------------------------------------------------------------------

def proof(**peers):
    return {"schema": 1, "node": "worker-1", "interface": "wgmesh0", "generation": 0, "serial": 1, "method": "echo",
            "peers": {name.replace("_", "-"): entry for name, entry in peers.items()}}


def entry_of(number, proven=True, when=NOW):
    return {"proven": proven, "public_key": key(number), "time": when}


def test_partial_probe_keeps_what_is_known_of_others():
    doc = document(4)
    old = proof(worker_2=entry_of(2), worker_3=entry_of(3), worker_4=entry_of(99), worker_9=entry_of(9))
    merged = _probe.merge_proof(old, proof(worker_2=entry_of(2, False)), doc)
    # probed anew; kept; changed its key; left the mesh
    assert merged["peers"] == {"worker-2": entry_of(2, False), "worker-3": entry_of(3)}
    for field, value in (("interface", "wgmesh1"), ("generation", 1), ("node", "worker-2"), ("schema", 2)):
        assert _probe.merge_proof(dict(old, **{field: value}), proof(worker_2=entry_of(2)), doc)["peers"].keys() == {"worker-2"}
    assert _probe.merge_proof(None, proof(worker_2=entry_of(2)), doc)["peers"].keys() == {"worker-2"}


def test_proven_names():
    doc = document(4)
    found = proof(worker_2=entry_of(2), worker_3=entry_of(3, False), worker_4=entry_of(99), worker_9=entry_of(9))
    assert _probe.proven_names(found, doc, 0) == {"worker-2"}
    assert _probe.proven_names(found, doc, 1) == set()
    assert _probe.proven_names(None, doc, 0) == set()
    assert _probe.proven_names(found, doc, 0, NOW + 60, 60) == {"worker-2"}
    assert _probe.proven_names(found, doc, 0, NOW + 61, 60) == set()
    assert _probe.proven_names(found, doc, 0, NOW - 500, 60) == {"worker-2"}


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", "null", '{"schema": 2, "peers": {}}', '{"schema": 1}', '{"schema": 1, "peers": []}',
    '{"schema": 1, "peers": {"a": 1}}', '{"schema": 1, "peers": {"a": {"proven": true}}}', "\xff"])
def test_proof_that_cannot_be_read_proves_nothing(tmp_path, content):
    path = tmp_path / "proof.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert _probe.read_proof(str(path)) is None


def test_proof_is_read(tmp_path):
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(proof(worker_2=entry_of(2))))
    assert _probe.read_proof(str(path)) == proof(worker_2=entry_of(2))


def test_device_that_is_not_there():
    assert _probe.device("kmprnone0") is None
    found = _probe.device("lo")
    assert found["mtu"] >= 1500 and found["index"] >= 1
    assert not _probe.has_ipv6("kmprnone0")
