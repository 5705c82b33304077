# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import collections
import heapq
import os
import random
import socket
import struct
import time

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _underlay
from ansible_collections.kubemesh.wireguard.plugins.module_utils._underlay import SMALL_SIZE

DIGEST = _underlay.digest_of("nonce of the run")
PORTS = (51840, 51841)


# --- packets -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family,headers", [("ipv4", 28), ("ipv6", 48)])
def test_question_and_answer(family, headers):
    packet = _underlay.question(DIGEST, 77, family, 1400)
    assert len(packet) == 1400 - headers
    answer = _underlay.answer_to(packet, DIGEST, (51840, 0))
    assert len(answer) == len(packet), "never more than was asked with"
    assert _underlay.parse_answer(answer, DIGEST, family) == (77, 1400, {51840})
    assert len(_underlay.question(DIGEST, 1, family, SMALL_SIZE[family])) == SMALL_SIZE[family] - headers


def test_responder_answers_nothing_but_questions_of_this_run():
    good = _underlay.question(DIGEST, 1, "ipv4", 100)
    other_run = _underlay.question(_underlay.digest_of("another"), 1, "ipv4", 100)
    answer = _underlay.answer_to(good, DIGEST, PORTS)
    for packet in (b"", good[:20], other_run, answer, b"x" + good[1:], good[:30 - 1 - 8]):
        assert _underlay.answer_to(packet, DIGEST, PORTS) is None
    # a question that comes back is no answer either
    assert _underlay.parse_answer(good, DIGEST, "ipv4") is None
    assert _underlay.parse_answer(answer, _underlay.digest_of("another"), "ipv4") is None


@given(st.binary(max_size=80))
def test_nothing_that_comes_in_breaks_it(data):
    _underlay.answer_to(data, DIGEST, PORTS)
    _underlay.parse_answer(data, DIGEST, "ipv4")
    for family in ("ipv4", "ipv6"):
        assert _underlay.parse_icmp(data, DIGEST, family) is None


def test_icmp():
    request = _underlay.icmp_request(DIGEST, 70000, "ipv4", 1001)
    assert len(request) == 1001 - 20 and request[0] == 8
    assert _underlay.checksum(request) == 0, "a right checksum sums up to zero"
    header = struct.pack("!B19x", 0x45)
    assert _underlay.parse_icmp(header + request, DIGEST, "ipv4") is None, "our own request is no answer"
    assert _underlay.parse_icmp(header + b"\0" + request[1:], DIGEST, "ipv4") == (70000, 1001, set())
    options = struct.pack("!B23x", 0x46)
    assert _underlay.parse_icmp(options + b"\0" + request[1:], DIGEST, "ipv4")[0] == 70000
    request = _underlay.icmp_request(DIGEST, 70000, "ipv6", 1001)
    assert len(request) == 1001 - 40 and request[0] == 128
    assert _underlay.parse_icmp(bytes([129]) + request[1:], DIGEST, "ipv6") == (70000, 1001, set())


def test_checksum_of_the_rfc():
    # RFC 1071, section 3: the sum of this is ddf2
    assert _underlay.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF ^ 0xDDF2


# --- the schedule, against a network made here -------------------------------------------------------------------------------------------

class Network:
    """Virtual time. ``device``: MTU of the sender; ``paths``: {name: MTU of the way}; ``closed``: keys that never answer."""

    def __init__(self, device=1500, paths=None, closed=(), held=(), delay=0.002, loss=0.0, seed=1, told=False):
        self.device, self.paths, self.closed, self.held, self.delay = device, paths or {}, set(closed), set(held), delay
        self.loss, self.random, self.told = loss, random.Random(seed), told
        self.sent = []

    def outcome(self, now, name, key, size):
        """("too big", None), (None, time of the answer) or (None, None)."""
        if size > self.device:
            return "too big", None
        self.sent.append((now, key, size))
        if size > self.paths.get(name, 65535):
            return ("too big", None) if self.told else (None, None)
        if key in self.closed or key in self.held or self.random.random() < self.loss:
            return None, None
        return None, now + self.delay


def run(targets, network, timeout=30.0, seed=2):
    """-> (schedule, virtual seconds it took)."""
    names = {key: target["name"] for target in targets for key in target["keys"]}
    listening = {target["name"]: {key[1] for key in target["keys"] if key not in network.held} for target in targets}
    schedule = _underlay.UnderlaySchedule(targets, 50.0, random.Random(seed))
    now, deadline, replies = 50.0, 50.0 + timeout, []
    while not schedule.done() and now < deadline:
        for key, sequence, size in schedule.due(now):
            told, when = network.outcome(now, names[key], key, size)
            if told:
                schedule.too_big(now, sequence)
            elif when is not None:
                heapq.heappush(replies, (when, key, sequence, size))
        if schedule.done():
            break
        following = schedule.next_time(now)
        times = [deadline] + ([following] if following is not None else []) + ([replies[0][0]] if replies else [])
        now = max(now + 1e-6, min(times))
        while replies and replies[0][0] <= now:
            dummy, key, sequence, size = heapq.heappop(replies)
            schedule.received(now, key, sequence, size, listening[names[key]])
    return schedule, now - 50.0


def target(number, family="ipv4", ports=PORTS):
    return {"name": "n%d" % number, "family": family, "keys": [("a%d" % number, port) for port in ports]}


def test_healthy_network_is_measured_to_the_byte_without_waiting():
    network = Network()
    schedule, took = run([target(number) for number in range(3)], network)
    assert schedule.done() and took < 0.5
    for result in schedule.results().values():
        assert result["path_mtu"] == 1500 and len(result["reached"]) == 2 and result["finished"]
        assert result["listening"] == {51840, 51841}


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("mtu", [1400, 1499, 1280, 1350, 600, 9000])
@pytest.mark.parametrize("told", [False, True])
def test_way_narrower_than_the_device(mtu, told, family):
    network = Network(device=9001, paths={"n0": mtu}, told=told)
    schedule, took = run([target(0, family)], network)
    assert schedule.done() and schedule.results()["n0"]["path_mtu"] == mtu
    assert took < (0.5 if told else 12.0)


def test_the_least_is_exact_whoever_has_it():
    paths = {"n%d" % number: 1450 for number in range(40)}
    paths["n33"] = 1400
    schedule, dummy = run([target(number) for number in range(40)], Network(paths=paths))
    results = schedule.results()
    assert schedule.done() and results["n33"]["path_mtu"] == 1400 and min(result["path_mtu"] for result in results.values()) == 1400
    assert all(result["path_mtu"] in (1400, 1450) for result in results.values())


def test_five_thousand_behind_a_narrow_network():
    """Hetzner's vSwitch: the device says 1500, the network carries 1400 and tells nobody."""
    paths = {"n%d" % number: 1400 for number in range(5000)}
    network = Network(paths=paths, delay=0.01)
    schedule, took = run([target(number) for number in range(5000)], network)
    assert schedule.done() and took < 20.0
    assert {result["path_mtu"] for result in schedule.results().values()} == {1400}
    assert len(network.sent) < 5000 * 4
    window = collections.deque()
    for now, dummy, dummy2 in network.sent:
        window.append(now)
        while window[0] < now - 1.0:
            window.popleft()
        assert len(window) <= _underlay.RATE + _underlay.BURST + 3


def test_closed_and_held_ports():
    closed = {("a0", 51840), ("a0", 51841), ("a1", 51841)}
    network = Network(closed=closed, held={("a2", 51840)})
    schedule, took = run([target(number) for number in range(4)], network)
    assert schedule.done() and took < 6.0
    results = schedule.results()

    def verdicts(number):
        return _underlay.judge({"address": "a%d" % number}, PORTS, results["n%d" % number])
    assert verdicts(0) == {51840: "closed", 51841: "closed"} and results["n0"]["path_mtu"] is None and results["n0"]["finished"]
    assert verdicts(1) == {51840: "open", 51841: "closed"} and results["n1"]["path_mtu"] == 1500
    assert verdicts(2) == {51840: "held", 51841: "open"} and results["n2"]["path_mtu"] == 1500
    assert verdicts(3) == {51840: "open", 51841: "open"}


def test_a_mesh_that_is_up_is_not_waited_for():
    """WireGuard has one port of each node; the responder on the other says so."""
    held = {("a%d" % number, 51840) for number in range(40)}
    network = Network(held=held)
    schedule, took = run([target(number) for number in range(40)], network)
    assert schedule.done() and took < 0.5, "virtual seconds"
    assert sum(key in held for dummy, key, dummy2 in network.sent) == 40, "each was asked once"
    assert {result["path_mtu"] for result in schedule.results().values()} == {1500}


def test_loss_is_borne():
    schedule, dummy = run([target(number) for number in range(200)], Network(loss=0.1))
    results = schedule.results()
    assert all(len(result["reached"]) == 2 for result in results.values())
    # three times lost: one in a thousand; it makes the mesh smaller, not broken
    assert sum(result["path_mtu"] == 1500 for result in results.values()) >= 150


def test_out_of_time_says_what_came_back():
    schedule, took = run([target(0)], Network(paths={"n0": 1400}, delay=0.2), timeout=3.0)
    result = schedule.results()["n0"]
    assert took == pytest.approx(3.0, abs=0.01) and not result["finished"]
    assert 1000 < result["path_mtu"] <= 1400


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 30), st.floats(0, 1), st.integers(1280, 9001), st.lists(st.integers(100, 9001), max_size=30), st.integers(0, 10 ** 6),
       st.booleans())
def test_any_network(count, loss, device, widths, seed, told):
    paths = {"n%d" % number: width for number, width in enumerate(widths)}
    network = Network(device=device, paths=paths, loss=loss, seed=seed, told=told)
    schedule, took = run([target(number, "ipv6" if number % 3 == 0 else "ipv4") for number in range(count)], network, seed=seed)
    assert took <= 30.001
    for name, result in schedule.results().items():
        if result["path_mtu"] is not None:
            assert SMALL_SIZE["ipv4"] <= result["path_mtu"] <= min(device, paths.get(name, 65535))
        if loss == 0:
            assert schedule.done() and result["path_mtu"] is not None
    if loss == 0 and count:
        for family in ("ipv4", "ipv6"):
            names = ["n%d" % number for number in range(count) if (number % 3 == 0) == (family == "ipv6")]
            if names:
                least = min(min(device, paths.get(name, 65535)) for name in names)
                assert min(schedule.results()[name]["path_mtu"] for name in names) == least


def test_answers_nobody_asked_for_count_nothing():
    schedule = _underlay.UnderlaySchedule([target(0)], 0.0, random.Random(1))
    schedule.received(1.0, ("a0", 51840), 9, 1400)
    schedule.received(1.0, ("b0", 51840), 1, 1400)
    schedule.too_big(1.0, 9)
    schedule.too_big(1.0, None)
    schedule.failed(("b0", 1), "x")
    sent = schedule.due(1.0)
    assert [size for dummy, dummy2, size in sent] == [57, 57]
    # the other port answers with the sequence of this one
    schedule.received(1.1, sent[1][0], sent[0][1], 57)
    assert schedule.results()["n0"]["reached"] == set()


# --- what it means -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path_mtus,mtu", [
    ({"ipv4": 1500}, 1440), ({"ipv6": 1500}, 1420), ({"ipv4": 1500, "ipv6": 1500}, 1420), ({"ipv4": 1400, "ipv6": 1500}, 1340),
    ({"ipv4": 9001}, 8941), ({"ipv4": 1300}, 1280), ({"ipv4": 1340}, 1280), ({}, None), ({"ipv4": None}, None),
    ({"ipv4": 1500, "ipv6": None}, 1440)])
def test_recommended_mtu(path_mtus, mtu):
    assert _underlay.recommended_mtu(path_mtus) == mtu


def test_targets():
    listed = [{"name": "a", "address": "198.18.0.1"}, {"name": "b", "address": "2001:db8::2", "port": 5555}]
    assert _underlay.targets_of(listed, "a") == [{"name": "b", "address": "2001:db8::2", "port": 5555}]

    def node(state="member", **endpoints):
        return {"state": state, "endpoints": {family: {"address": address, "port": None} for family, address in endpoints.items()}}
    four, both, six = {"ipv4": "198.18.0.4"}, {"ipv4": "198.18.0.5", "ipv6": "2001:db8::5"}, {"ipv6": "2001:db8::6"}
    doc = {"nodes": {"me": node(**both), "four": node(**four), "both": node(**both), "six": node("pending", **six), "none": node(),
                     "windows": node("excluded", **four)}}
    assert [(item["name"], item["address"]) for item in _underlay.targets_of(doc, "me")] == [
        ("both", "198.18.0.5"), ("four", "198.18.0.4"), ("six", "2001:db8::6")]
    doc["nodes"]["me"] = node(**six)
    assert [(item["name"], item["address"]) for item in _underlay.targets_of(doc, "me")] == [
        ("both", "2001:db8::5"), ("four", "198.18.0.4"), ("six", "2001:db8::6")]
    for wrong in ({}, [{"name": "b"}], {"nodes": {"x": {}}}):
        with pytest.raises((KeyError, ValueError)):
            _underlay.targets_of(wrong, "a")


# --- the responder, on loopback ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def free_ports():
    """Two ports that were free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], other.getsockname()[1]]


def ask(port, digest=DIGEST, size=200, seconds=5.0):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.settimeout(seconds)
        handle.sendto(_underlay.question(digest, 5, "ipv4", size), ("127.0.0.1", port))
        try:
            return handle.recv(65536)
        except (socket.timeout, ConnectionRefusedError):
            return None


def test_responder_lives_answers_and_ends(tmp_path, free_ports):
    pid_file = str(tmp_path / "preflight.json")
    assert _underlay.running_responder(pid_file) is None
    sockets, ours = _underlay.open_responder(free_ports, ["ipv4"])
    assert ours == free_ports
    pid = _underlay.start_responder(sockets, DIGEST, ours, 60, pid_file)
    try:
        found = _underlay.running_responder(pid_file)
        assert found["pid"] == pid and found["ports"] == free_ports
        assert os.getsid(pid) != os.getsid(0)
        assert {os.readlink("/proc/%d/fd/%d" % (pid, number)) for number in range(3)} == {"/dev/null"}
        for port in free_ports:
            assert _underlay.parse_answer(ask(port), DIGEST, "ipv4") == (5, 200, set(free_ports))
        assert ask(free_ports[0], _underlay.digest_of("scan"), seconds=0.3) is None
        # what it holds is not free for another one
        assert _underlay.open_responder(free_ports, ["ipv4"]) == ([], [])
    finally:
        assert _underlay.stop_responder(pid_file)
    assert _underlay.start_time(pid) is None and not os.path.exists(pid_file)
    assert not _underlay.stop_responder(pid_file)
    assert ask(free_ports[0], seconds=0.3) is None


def test_responder_ends_by_itself(tmp_path, free_ports):
    sockets, ours = _underlay.open_responder(free_ports[:1], ["ipv4"])
    pid = _underlay.start_responder(sockets, DIGEST, ours + [0], 0.2, str(tmp_path / "pid"))
    deadline = time.monotonic() + 20
    while _underlay.start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _underlay.start_time(pid) is None
    assert _underlay.running_responder(str(tmp_path / "pid")) is None


def test_pid_file_of_a_process_that_was_replaced(tmp_path):
    """The pid of this test, with another start: it must not be ended."""
    path = tmp_path / "pid"
    path.write_text('{"pid": %d, "started": 1, "ports": [1]}' % os.getpid())
    assert _underlay.running_responder(str(path)) is None
    assert not _underlay.stop_responder(str(path)) and not path.exists()
    for damaged in ("", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1}'):
        path.write_text(damaged)
        assert _underlay.running_responder(str(path)) is None


def test_port_that_something_else_has(free_ports):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", free_ports[0]))
        sockets, ours = _underlay.open_responder(free_ports, ["ipv4"])
        for handle in sockets:
            handle.close()
    assert ours == free_ports[1:]
