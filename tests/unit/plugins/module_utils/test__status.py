# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _routes_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _status as status

NOW = 1763874000.0
TABLE = 51840


def key(number):
    return chr(ord("A") + number) * 42 + "A="


def entry(number, **other):
    return dict({
        "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)},
        "endpoints": {"ipv4": {"address": "198.18.0.1%d" % number, "port": None}},
        "pod_cidrs": ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number],
        "node_addresses": ["198.18.0.1%d" % number, "2001:db8::%x" % number],
        "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": 1420, "keepalive": 0}, **other)


def document(**nodes):
    return _mesh.validate_document({
        "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
        "nodes": dict({"a": entry(1), "b": entry(2)}, **nodes)})


class World:
    """Node a as it is when all is well; a test breaks something and asks what the state of b is."""

    def __init__(self, doc=None, encrypt="pods"):
        self.doc = doc or document()
        self.device = {"name": "wgmesh0", "public_key": key(1), "listen_port": 51840, "fwmark": 0x1000, "peers": {
            peer_key: {"endpoint": peer["endpoint"], "allowed_ips": list(peer["allowed_ips"]), "keepalive": 0, "has_preshared_key": False,
                       "last_handshake": NOW - 17, "rx_bytes": 9012, "tx_bytes": 8120}
            for peer_key, peer in _mesh.peers_of(self.doc, "a", 0).items()}}
        settings = {"interface": "wgmesh0", "table": TABLE, "rule_priority": 400, "fwmark": 0x1000, "encrypt": encrypt, "send": True,
                    "unproven": "keep", "exempt_cidrs": [], "iifs": [], "own_cidrs": None}
        self.routes = _routes_plan.wanted_state(self.doc, "a", settings, None, [])

    @property
    def peer(self):
        return self.device["peers"][key(2)]

    def without_rules(self, **fields):
        self.routes["rules"] = [rule for rule in self.routes["rules"] if any(rule[name] != value for name, value in fields.items())]
        return self

    def without_route(self, dst):
        self.routes["routes"] = [route for route in self.routes["routes"] if route["dst"] != dst]
        return self

    def rows(self, generation=0, exempt=()):
        return status.join(self.doc, "a", generation, self.device, self.routes, "wgmesh0", NOW, exempt)

    def state(self, name="b", exempt=()):
        row = next(row for row in self.rows(exempt=exempt) if row["name"] == name)
        return row["state"], row["reason"]


# --- states ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encrypt", ["pods", "nodes"])
def test_all_is_well(encrypt):
    assert World(encrypt=encrypt).rows() == [{
        "name": "b", "public_key": key(2), "endpoint": "198.18.0.12:51840", "addresses": sorted(_mesh.allowed_ips_of(entry(2), "0")),
        "handshake_age": 17, "rx_bytes": 9012, "tx_bytes": 8120, "routed": True, "state": "encrypted", "reason": ""}]


def test_what_is_exempt_is_no_fault_and_told():
    exempt = ["198.18.0.12/32"]
    world = World(encrypt="nodes").without_route("198.18.0.12/32")
    assert world.state() == ("partial", "in clear: 198.18.0.12/32")
    assert world.state(exempt=exempt) == ("encrypted", "in clear, as mesh_exempt_cidrs asks: 198.18.0.12/32")
    assert world.without_route("2001:db8::2/128").state(exempt=exempt) == ("partial", "in clear: 2001:db8::2/128")
    assert World(encrypt="nodes").state(exempt=exempt) == ("encrypted", ""), "it is sent into the tunnel still"


def test_a_peer_of_which_all_is_exempt_is_no_pair():
    world = World(document(b=entry(2, pod_cidrs=[], node_addresses=["198.18.0.12"])), "nodes").without_route("198.18.0.12/32")
    assert world.state()[0] == "accepting"
    assert world.state(exempt=["198.18.0.0/24"]) == ("excluded", "in clear, as mesh_exempt_cidrs asks: 198.18.0.12/32")


@pytest.mark.parametrize("age,state", [(0, "encrypted"), (275, "encrypted"), (275.9, "encrypted"), (276, "idle"), (86400, "idle")])
def test_handshakes(age, state):
    world = World()
    world.peer["last_handshake"] = NOW - age
    assert world.state()[0] == state
    assert world.rows()[0]["handshake_age"] == int(age)


def test_a_peer_that_was_silent_long_is_not_down():
    world = World()
    world.peer["last_handshake"] = NOW - 400
    assert world.state() == ("idle", "no traffic for 400 s; probe it to know")


def test_a_clock_that_went_back():
    world = World()
    world.peer["last_handshake"] = NOW + 5
    assert world.rows()[0]["handshake_age"] == 0 and world.state()[0] == "encrypted"


def test_no_handshake_ever():
    world = World()
    world.peer["last_handshake"] = 0.0
    assert world.state()[0] == "no handshake" and world.rows()[0]["handshake_age"] is None


def test_accepting_before_the_switch():
    world = World()
    world.routes["rules"] = []
    assert world.state() == ("accepting", "traffic to it takes the way of the CNI, in clear")
    assert not world.rows()[0]["routed"]
    world.routes["routes"] = []
    assert world.state()[0] == "accepting"


def test_accepting_when_somebody_deleted_the_rule_or_emptied_the_tables():
    assert World().without_rules(priority=400).state()[0] == "partial", "what pods send to nodes is still encrypted"
    world = World().without_rules(priority=400)
    world.without_rules(priority=401)
    assert world.state()[0] == "accepting"
    world = World()
    world.routes["routes"] = []
    assert world.state()[0] == "accepting"


@pytest.mark.parametrize("dst", ["10.244.2.0/24", "fd00:10:244:2::/64", "198.18.0.12/32", "2001:db8::2/128"])
@pytest.mark.parametrize("encrypt", ["pods", "nodes"])
def test_partial_when_a_route_is_missing(dst, encrypt):
    assert World(encrypt=encrypt).without_route(dst).state() == ("partial", "in clear: %s" % dst)


def test_a_route_by_another_device_is_none():
    world = World()
    for route in world.routes["routes"]:
        if route["dst"] == "10.244.2.0/24":
            route["dev"] = "eth0"
    assert world.state() == ("partial", "in clear: 10.244.2.0/24")
    world = World()
    for route in world.routes["routes"]:
        if route["dst"] == "10.244.2.0/24":
            route.update(type="unreachable", dev="")
    assert world.state() == ("partial", "in clear: 10.244.2.0/24"), "it is not sent at all"


def test_partial_when_one_family_is_not_sent():
    world = World().without_rules(family="ipv6")
    assert world.state() == ("partial", "in clear: fd00:10:244:2::/64, 2001:db8::2/128")


def test_partial_when_pods_do_not_send_to_nodes():
    """Without that rule the answers of pods to hosts go in clear."""
    world = World().without_rules(priority=401, family="ipv4")
    assert world.state() == ("partial", "in clear: 198.18.0.12/32")
    nodes = World(encrypt="nodes").without_rules(priority=401, family="ipv4")
    assert nodes.state()[0] == "encrypted", "host encryption steers that as well"


def test_partial_when_a_second_prefix_of_the_node_has_no_rule():
    doc = document(a=entry(1, pod_cidrs=["10.244.1.0/24", "10.244.9.0/24"]))
    world = World(doc)
    world.routes["rules"] = [rule for rule in world.routes["rules"] if rule["from"] != "10.244.9.0/24"]
    assert world.state() == ("partial", "in clear: 198.18.0.12/32")


def test_partial_when_it_is_not_fully_accepted():
    world = World()
    world.peer["allowed_ips"].remove("10.244.2.0/24")
    assert world.state() == ("partial", "not accepted from this peer: 10.244.2.0/24")
    world.peer["allowed_ips"] += ["10.244.2.0/24", "10.99.0.0/16"]
    assert world.state()[0] == "encrypted", "more than is wanted hides nothing"


def test_missing():
    world = World()
    world.device["peers"] = {}
    assert world.state()[0] == "missing"
    world.device = None
    assert world.state()[0] == "missing" and world.rows()[0]["endpoint"] is None and world.rows()[0]["addresses"] == []


def test_excluded_and_without_key():
    doc = document(b=entry(2, state="excluded", reason="Windows"),
                   c=entry(3, state="pending", reason="no key", public_keys={}, probe_addresses={}),
                   d=entry(4, public_keys={"1": key(4)}, probe_addresses={"1": _mesh.probe_address(key(4))}))
    world = World(doc)
    assert world.state("b") == ("excluded", "Windows")
    assert world.state("c") == ("no key", "no key")
    assert world.state("d") == ("no key", "no public key of this node is known")
    assert {row["public_key"] for row in world.rows()} == {None}


def test_a_peer_that_nobody_knows():
    world = World()
    world.device["peers"][key(9)] = dict(world.peer, allowed_ips=["10.99.0.0/16"])
    row = world.rows()[0]
    assert (row["name"], row["public_key"], row["state"], row["addresses"]) == ("(unknown)", key(9), "unknown", ["10.99.0.0/16"])


def test_a_node_that_is_not_in_the_mesh_any_more():
    """Its device may still be there: its peers are not wanted by anyone."""
    world = World()
    world.doc = document(a=entry(1, state="excluded", reason="opted out"))
    assert [row["state"] for row in world.rows()] == ["unknown", "no key"]


def test_a_generation_that_the_node_does_not_have():
    assert {row["state"] for row in World().rows(generation=1)} == {"no key", "unknown"}


def test_a_peer_without_pods():
    """Only what local pods send to it is encrypted; that has to be steered as well."""
    doc = document(b=entry(2, pod_cidrs=[]))
    assert World(doc).state()[0] == "encrypted" and not World(doc).rows()[0]["routed"]
    world = World(doc)
    world.routes["rules"] = []
    assert world.state()[0] == "accepting"
    assert World(doc).without_route("198.18.0.12/32").state() == ("partial", "in clear: 198.18.0.12/32")


def test_two_nodes_without_pods():
    """Nothing between them is to be encrypted: their tunnel is all there is to say, and whether this node sends at all."""
    doc = document(a=entry(1, pod_cidrs=[]), b=entry(2, pod_cidrs=[]))
    assert World(doc).state()[0] == "encrypted"
    world = World(doc)
    world.routes["rules"] = []
    assert world.state()[0] == "accepting"
    assert World(doc, encrypt="nodes").without_route("2001:db8::2/128").state() == ("partial", "in clear: 2001:db8::2/128")


def test_a_family_that_this_node_does_not_have_is_not_missing():
    doc = document(a=entry(1, pod_cidrs=["10.244.1.0/24"], node_addresses=["198.18.0.11"]))
    assert World(doc).state() == ("encrypted", "")


def test_rows_are_sorted_and_nothing_is_changed():
    doc = document(**{name: entry(number) for number, name in enumerate(["z", "m", "b2", "b10"], 3)})
    world = World(doc)
    before = copy.deepcopy((world.doc, world.device, world.routes))
    assert [row["name"] for row in world.rows()] == ["b", "b10", "b2", "m", "z"]
    assert (world.doc, world.device, world.routes) == before
    json.dumps(world.rows())


def test_counts():
    rows = [{"state": state} for state in ("partial", "encrypted", "idle", "encrypted")]
    assert list(status.counts(rows).items()) == [("encrypted", 2), ("idle", 1), ("partial", 1)]
    assert status.counts([]) == {}
    everything = [{"state": state} for state in status.STATES]
    assert set(status.counts(everything)) == set(status.STATES)


# --- for people --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds,text", [
    (None, "never"), (0, "0 s"), (8, "8 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172799, "47 h"),
    (172800, "2 d"), (10 ** 7, "115 d")])
def test_ages(seconds, text):
    assert status.age_text(seconds) == text


@pytest.mark.parametrize("number,text", [
    (0, "0 B"), (812, "812 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (14541, "14.2 KiB"), (1024 ** 2, "1.0 MiB"),
    (3.1 * 1024 ** 3, "3.1 GiB"), (1024 ** 4, "1.0 TiB"), (5000 * 1024 ** 4, "5000.0 TiB")])
def test_sizes(number, text):
    assert status.bytes_text(number) == text


@given(st.lists(st.lists(st.text(alphabet="abc12", max_size=6), min_size=3, max_size=3), max_size=6))
def test_columns_are_aligned(rows):
    lines = status.columns(rows)
    assert len(lines) == len(rows)
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for row, line in zip(rows, lines):
        assert line == line.rstrip()
        second, third = widths[0] + 2, widths[0] + widths[1] + 4
        assert [line[:widths[0]].rstrip(), line[second:second + widths[1]].rstrip(), line[third:]] == row


def info(**other):
    rows = other.get("peers", World().rows())
    return dict({"node": "a", "device": {"name": "wgmesh0", "implementation": "kernel"}, "sending": True, "peers": rows,
                 "counts": status.counts(rows), "warnings_of_mesh": []}, **other)


def test_table_of_a_node():
    behind = "10.244.2.0/24, 198.18.0.12/32, 2001:db8::2/128, fd00:10:244:2::/64"
    assert status.mesh_table([info()]) == [
        "a: wgmesh0 (kernel), sends through the mesh, 1 encrypted",
        "  PEER  ENDPOINT           HANDSHAKE  RECEIVED  SENT     STATE      BEHIND IT",
        "  b     198.18.0.12:51840  17 s       8.8 KiB   7.9 KiB  encrypted  " + behind,
        ""]


def test_only_problems():
    rows = World().rows()
    rows.append(dict(rows[0], name="c", state="missing", reason="not a peer", endpoint=None, handshake_age=None, addresses=[]))
    lines = status.mesh_table([info(peers=status.detailed(rows, "problems"), counts=status.counts(rows))])
    assert lines[0] == "a: wgmesh0 (kernel), sends through the mesh, 1 encrypted, 1 missing"
    assert lines[2].split() == ["c", "-", "never", "8.8", "KiB", "7.9", "KiB", "missing", "-"]
    assert lines[3:] == ["  c: not a peer", ""]


def test_what_strict_mode_dropped():
    counters = {"out_pods": {"packets": 3, "bytes": 252}, "in_pods": {"packets": 0, "bytes": 0}}
    guard = {"present": True, "counters": counters}
    assert status.mesh_table([info(guard=guard)])[-2] == "  strict: dropped out pods 3 packets (252 B)"
    counters["out_pods"]["packets"] = 0
    assert status.mesh_table([info(guard=guard)])[-2] == "  strict: dropped nothing"
    assert status.mesh_table([info(guard=dict(guard, present=False))]) == status.mesh_table([info()])


def test_nodes_that_were_not_reached_and_those_without_device():
    assert status.mesh_table([{"node": "x", "msg": "timed out"}, {"node": "y"}]) == ["x: timed out", "", "y: " + status.NO_ANSWER, ""]
    lines = status.mesh_table([info(device=None, sending=False, peers=[], warnings_of_mesh=["device wgmesh0 is missing"])])
    assert lines == ["a: no mesh device, does not send through the mesh, no peers", "  device wgmesh0 is missing", ""]
    assert status.mesh_table([]) == []


# --- batches -----------------------------------------------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 30), st.integers(1, 30).map(str), st.integers(1, 100).map("{}%".format))


@given(st.lists(st.integers(), unique=True, max_size=40), st.lists(sizes, min_size=1, max_size=4))
def test_every_host_once_in_its_order(hosts, wanted):
    cut = status.batches(hosts, wanted)
    assert [host for batch in cut for host in batch] == hosts
    assert all(cut), "no batch is empty"


@given(st.lists(st.integers(), unique=True, min_size=1, max_size=40), st.lists(sizes, min_size=1, max_size=4))
def test_sizes_of_batches(hosts, wanted):
    cut = status.batches(hosts, wanted)
    for place, batch in enumerate(cut):
        size = str(wanted[min(place, len(wanted) - 1)])
        number = max(1, int(len(hosts) * int(size[:-1]) / 100)) if size.endswith("%") else int(size)
        assert len(batch) == number or (place == len(cut) - 1 and len(batch) < number)


def test_a_canary_first():
    assert status.batches(list("abcdefgh"), [1, "25%", "100%"]) == [["a"], ["b", "c"], ["d", "e", "f", "g", "h"]]
    assert status.batches(list("abc"), [1]) == [["a"], ["b"], ["c"]]
    assert status.batches(list("abc"), 2) == [["a", "b"], ["c"]]
    assert status.batches(list("abc"), "100%") == [["a", "b", "c"]]
    assert status.batches(list("abc"), ("1%",)) == [["a"], ["b"], ["c"]], "at least one"
    assert status.batches([], [1]) == []


@pytest.mark.parametrize("wanted", [
    [], [0], [-1], ["0%"], ["101%"], ["x"], [""], ["%"], [None], [True], [False], [1.5], ["1.5"], ["25 %%"], ["\u00b2"], ["\u0663"], [[1]],
    [{}], "0", 0, [1, "nonsense"], ["-5%"]])
@pytest.mark.parametrize("hosts", [["a"], list("abcdef"), []])
def test_sizes_that_are_none(hosts, wanted):
    """Also those that are never reached: a typing error shows in the first run, not with the first new node."""
    with pytest.raises(ValueError, match="mesh_batch: "):
        status.batches(hosts, wanted)


def test_progress():
    assert status.progress_line(3, 10, 27, 27, 100.0, 130.0) == "3 of 10 nodes done, 27 of 27 peers proven, about 71 s left"
    assert status.progress_line(10, 10, 5, 6, 100.0, 400.0) == "10 of 10 nodes done, 5 of 6 peers proven"
    assert status.progress_line(0, 10, 0, 0, 100.0, 130.0).startswith("0 of 10 nodes done")
