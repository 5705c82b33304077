# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan

TABLE = 51840
DESTINATIONS = {
    "ipv4": ["10.244.1.0/24", "10.244.2.0/24", "10.244.2.128/25", "198.18.0.12/32", "0.0.0.0/0"],
    "ipv6": ["fd00:10:244:1::/64", "fd00:10:244:2::/64", "2001:db8::c/128"]}
SOURCES = {"ipv4": ["", "198.18.0.11"], "ipv6": ["", "2001:db8::b"]}
FAMILIES = ("ipv4", "ipv6")


def route(dst, **other):
    family = "ipv6" if ":" in dst else "ipv4"
    plain = {"family": family, "table": TABLE, "dst": dst, "dev": "wgmesh0", "type": "unicast", "src": "", "mtu": 0, "peer": ""}
    return dict(plain, **other)


def rule(priority=400, table=TABLE, source="", not_fwmark=0, family="ipv4", iif=""):
    return {"family": family, "priority": priority, "table": table, "from": source, "iif": iif, "not_fwmark": not_fwmark}


# --- properties of the plan --------------------------------------------------------------------------------------------------------------

@st.composite
def routes(draw):
    family = draw(st.sampled_from(FAMILIES))
    kind = draw(st.sampled_from(["unicast", "unicast", "unreachable"]))
    return {
        "family": family, "table": draw(st.sampled_from([TABLE, TABLE + 1])), "dst": draw(st.sampled_from(DESTINATIONS[family])),
        "dev": draw(st.sampled_from(["wgmesh0", "wgmesh1"])) if kind == "unicast" else "", "type": kind,
        "src": draw(st.sampled_from(SOURCES[family])), "mtu": draw(st.sampled_from([0, 1380])),
        "peer": draw(st.sampled_from(["", "worker-1", "worker-2.example"]))}


@st.composite
def rules(draw):
    family = draw(st.sampled_from(FAMILIES))
    source = draw(st.sampled_from(["", DESTINATIONS[family][0]]))
    return rule(draw(st.integers(400, 402)), draw(st.sampled_from([TABLE, TABLE + 1])), source,
                0 if source else draw(st.sampled_from([0, 0x1000])), family, "" if source else draw(st.sampled_from(["", "lo", "eth0.7"])))


states = st.builds(
    lambda some_routes, some_rules: {"routes": sorted(some_routes, key=plan.route_order), "rules": sorted(some_rules, key=plan.rule_order)},
    st.lists(routes(), unique_by=lambda item: (item["table"], item["dst"]), max_size=6),
    st.lists(rules(), unique_by=plan.rule_order, max_size=4))


def nameless(state):
    return {"routes": [dict(item, peer="") for item in state["routes"]], "rules": state["rules"]}


def prefixes_of_plan(current, wanted):
    """(step, state after it) for each step."""
    state = current
    for step in plan.plan_routes(current, wanted):
        state = plan.apply_to_state(state, step)
        yield step, state


def planned(current, wanted):
    """The state behind the whole plan."""
    state = current
    for step in plan.plan_routes(current, wanted):
        state = plan.apply_to_state(state, step)
    return state


def identity(item):
    return item["table"], item["dst"]


@given(states, states)
def test_applying_the_plan_gives_what_is_wanted(current, wanted):
    after = planned(current, wanted)
    assert nameless(after) == nameless(wanted)


@given(states, states)
def test_a_second_plan_is_empty(current, wanted):
    after = planned(current, wanted)
    assert plan.plan_routes(after, wanted) == []
    assert plan.plan_routes(wanted, wanted) == []


@given(states, states)
def test_a_rule_comes_only_when_every_wanted_route_is_there(current, wanted):
    complete = {(identity(item), item["type"], item["dev"], item["src"], item["mtu"]) for item in wanted["routes"]}
    for step, state in prefixes_of_plan(current, wanted):
        if step["op"] == "add_rule":
            there = {(identity(item), item["type"], item["dev"], item["src"], item["mtu"]) for item in state["routes"]}
            assert complete <= there


@given(states, states)
def test_a_route_goes_only_after_every_rule_that_goes(current, wanted):
    wanted_rules = {plan.rule_order(item) for item in wanted["rules"]}
    for step, state in prefixes_of_plan(current, wanted):
        if step["op"] == "remove_route":
            assert {plan.rule_order(item) for item in state["rules"]} <= wanted_rules


@given(states, states)
def test_what_stays_is_there_all_the_time(current, wanted):
    stays = {identity(item) for item in current["routes"]} & {identity(item) for item in wanted["routes"]}
    same_rules = {plan.rule_order(item) for item in current["rules"]} & {plan.rule_order(item) for item in wanted["rules"]}
    unchanged = [item for item in current["routes"] if any(
        identity(item) == identity(other) and plan.same_route(item, other) for other in wanted["routes"])]
    for step, state in prefixes_of_plan(current, wanted):
        assert stays <= {identity(item) for item in state["routes"]}
        assert same_rules <= {plan.rule_order(item) for item in state["rules"]}
        assert all(item in state["routes"] for item in unchanged), "a route that does not change is not replaced"
        assert "rule" not in step or plan.rule_order(step["rule"]) not in same_rules


@given(states, states)
def test_between_old_and_new_no_prefix_is_without_route(current, wanted):
    """While a rule that stays looks at a table, a prefix has its old route, its new one, or none because none is wanted."""
    wanted_keys = {identity(item) for item in wanted["routes"]}
    for dummy, state in prefixes_of_plan(current, wanted):
        for key in {identity(item) for item in current["routes"]} - {identity(item) for item in state["routes"]}:
            assert key not in wanted_keys


@given(states, states, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(current, wanted, rng):
    def shuffled(state):
        state = copy.deepcopy(state)
        rng.shuffle(state["routes"])
        rng.shuffle(state["rules"])
        return state

    expected = plan.plan_routes(current, wanted)
    assert plan.plan_routes(shuffled(current), shuffled(wanted)) == expected
    assert plan.moved_destinations(shuffled(current), shuffled(wanted)) == plan.moved_destinations(current, wanted)


@given(states, states)
def test_steps_are_plain_and_each_does_something(current, wanted):
    steps = plan.plan_routes(current, wanted)
    assert json.loads(json.dumps(steps)) == steps
    before = copy.deepcopy((current, wanted))
    state = nameless(current)
    for step in steps:
        after = nameless(plan.apply_to_state(state, step))
        assert after != state
        state = after
    assert (current, wanted) == before, "inputs are not changed"


def test_order_of_rules():
    """Pods' prefixes first, host encryption last, and backwards on the way out."""
    state = {"routes": [], "rules": [rule(402, TABLE + 1, not_fwmark=0x1000), rule(401, TABLE + 1, "10.244.1.0/24"), rule(400)]}
    none = {"routes": [], "rules": []}
    assert [step["rule"]["priority"] for step in plan.plan_routes(none, state)] == [400, 401, 402]
    assert [step["rule"]["priority"] for step in plan.plan_routes(state, none)] == [402, 401, 400]


def test_a_changed_route_is_replaced_and_a_changed_name_is_not():
    old, new = route("10.244.2.0/24", peer="a"), route("10.244.2.0/24", mtu=1380, peer="a")
    assert plan.plan_routes({"routes": [old], "rules": []}, {"routes": [new], "rules": []}) == [{"op": "replace_route", "route": new}]
    renamed = dict(old, peer="b")
    assert plan.plan_routes({"routes": [old], "rules": []}, {"routes": [renamed], "rules": []}) == []


# --- what moves --------------------------------------------------------------------------------------------------------------------------

def way(state, family, dst, table):
    """Everything that decides which way a prefix of a table goes: the rules that lead there, and its route."""
    selectors = {(item["from"], item["iif"], item["not_fwmark"]) for item in state["rules"]
                 if (item["family"], item["table"]) == (family, table)}
    found = [(item["dev"], item["type"]) for item in state["routes"] if (item["dst"], item["table"]) == (dst, table)]
    return (selectors, found) if selectors and found else None


@given(states, states)
def test_moved_destinations_are_those_whose_way_changes(current, wanted):
    expected = {
        dst for family in FAMILIES for dst, table in itertools.product(DESTINATIONS[family], (TABLE, TABLE + 1))
        if way(current, family, dst, table) != way(wanted, family, dst, table)}
    assert set(plan.moved_destinations(current, wanted)) == expected


def test_what_moves_when_a_node_begins_to_send():
    tables = {"routes": [route("10.244.2.0/24"), route("198.18.0.12/32", table=TABLE + 1), route("fd00:2::/64")], "rules": []}
    assert plan.moved_destinations({"routes": [], "rules": []}, tables) == [], "no rule, nothing moves"
    begins = dict(tables, rules=[rule(400)])
    assert plan.moved_destinations(tables, begins) == ["10.244.2.0/24"]
    assert plan.moved_destinations(begins, tables) == ["10.244.2.0/24"]
    more = dict(tables, rules=[rule(400), rule(401, TABLE + 1, "10.244.1.0/24")])
    assert plan.moved_destinations(begins, more) == ["198.18.0.12/32"]
    other_mtu = dict(begins, routes=[route("10.244.2.0/24", mtu=1380)] + tables["routes"][1:])
    assert plan.moved_destinations(begins, other_mtu) == [], "it goes by the same device"
    other_device = dict(begins, routes=[route("10.244.2.0/24", dev="wgmesh1")] + tables["routes"][1:])
    assert plan.moved_destinations(begins, other_device) == ["10.244.2.0/24"]


# --- what is wanted ----------------------------------------------------------------------------------------------------------------------

SETTINGS = {"interface": "wgmesh0", "table": TABLE, "rule_priority": 400, "fwmark": 0x1000, "encrypt": "pods", "send": True,
            "unproven": "keep", "exempt_cidrs": [], "iifs": [], "own_cidrs": None}


def entry(number, families=FAMILIES, **other):
    key = chr(ord("A") + number) * 42 + "A="
    node = {
        "state": "member", "reason": "", "uid": "", "public_keys": {"0": key}, "endpoints": {},
        "pod_cidrs": [cidr for family, cidr in zip(FAMILIES, ("10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number))
                      if family in families],
        "node_addresses": [text for family, text in zip(FAMILIES, ("198.18.0.1%d" % number, "2001:db8::%x" % number))
                           if family in families],
        "probe_addresses": {"0": _mesh.probe_address(key)}, "mtu": 1420, "keepalive": 0}
    return dict(node, **other)


def document(**nodes):
    return _mesh.validate_document({
        "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
        "nodes": dict({"a": entry(1), "b": entry(2), "c": entry(3)}, **nodes)})


def wanted(doc, proven=None, present=(), **settings):
    return plan.wanted_state(doc, "a", dict(SETTINGS, **settings), proven, present)


def by_peer(state):
    found = {}
    for item in state["routes"]:
        found.setdefault(item["peer"], set()).add((item["table"], item["dst"]))
    return found


EVERYTHING_OF_B = {(TABLE, "10.244.2.0/24"), (TABLE, "fd00:10:244:2::/64"), (TABLE + 1, "198.18.0.12/32"), (TABLE + 1, "2001:db8::2/128")}


def test_every_route_of_a_peer():
    state = wanted(document())
    assert by_peer(state)["b"] == EVERYTHING_OF_B
    assert set(by_peer(state)) == {"b", "c"}
    by_family = {item["family"]: item["src"] for item in state["routes"]}
    assert by_family == {"ipv4": "198.18.0.11", "ipv6": "2001:db8::1"}
    assert {(item["dev"], item["type"], item["mtu"]) for item in state["routes"]} == {("wgmesh0", "unicast", 0)}


def test_only_proven_peers_get_routes():
    assert set(by_peer(wanted(document(), proven={"b"}))) == {"b"}
    assert wanted(document(), proven=set())["routes"] == []
    assert wanted(document(), proven=set())["rules"], "the rules do not depend on it"


def test_an_unproven_peer_keeps_what_it_has():
    doc = document()
    present = wanted(doc)["routes"]
    assert by_peer(wanted(doc, proven={"c"}, present=present))["b"] == EVERYTHING_OF_B
    assert "b" not in by_peer(wanted(doc, proven={"c"}, present=present, unproven="drop"))
    some = [item for item in present if item["dst"] == "10.244.2.0/24"]
    assert by_peer(wanted(doc, proven=set(), present=some)) == {"b": {(TABLE, "10.244.2.0/24")}}


def test_a_prefix_that_went_to_another_peer_is_not_kept():
    present = [route("10.244.2.0/24", peer="c")]
    assert by_peer(wanted(document(), proven=set(), present=present)) == {}


def test_a_peer_that_left_keeps_nothing():
    present = wanted(document())["routes"]
    doc = document()
    del doc["nodes"]["b"]
    assert set(by_peer(wanted(doc, proven=set(), present=present))) == {"c"}


def test_no_routes_to_those_that_do_not_accept():
    doc = document(b=entry(2, state="excluded", reason="Windows"), c=entry(3, state="pending", reason="no key", public_keys={},
                                                                           probe_addresses={}))
    assert wanted(doc)["routes"] == []


def test_a_narrower_peer_gets_its_mtu():
    def mtus(own, theirs):
        state = wanted(document(a=entry(1, mtu=own), b=entry(2, mtu=theirs)))
        return {item["mtu"] for item in state["routes"] if item["peer"] == "b"}

    assert mtus(1420, 1380) == {1380}
    assert mtus(1380, 1420) == {0}, "the device's own is smaller"
    assert mtus(1420, 1420) == {0}
    assert mtus(1420, None) == {0}
    assert mtus(None, 1380) == {0}, "the device's own is not known"


def test_rules_of_a_node():
    rules_wanted = wanted(document())["rules"]
    assert [plan.rule_text(item) for item in rules_wanted if item["family"] == "ipv4"] == [
        "priority 400 from all lookup 51840", "priority 401 from 10.244.1.0/24 lookup 51841"]
    assert [plan.rule_text(item) for item in rules_wanted if item["family"] == "ipv6"] == [
        "priority 400 from all lookup 51840", "priority 401 from fd00:10:244:1::/64 lookup 51841"]
    assert wanted(document(), send=False)["rules"] == []
    more = wanted(document(), encrypt="nodes")["rules"]
    assert [item for item in more if item not in rules_wanted] == [
        rule(402, TABLE + 1, not_fwmark=0x1000), rule(402, TABLE + 1, not_fwmark=0x1000, family="ipv6")]
    assert plan.rule_text(more[-1]) == "priority 402 not from all fwmark 0x1000/0x1000 lookup 51841"


def test_rules_that_look_at_where_packets_come_from():
    found = wanted(document(), encrypt="nodes", iifs=["lo", "eth0", "wgmesh0"], own_cidrs=["10.244.1.0/25", "fd00:10:244:1::/65"])["rules"]
    assert [plan.rule_text(item) for item in found if item["family"] == "ipv4"] == [
        "priority 400 from all iif eth0 fwmark 0x0/0x1000 lookup 51841", "priority 400 from all iif lo fwmark 0x0/0x1000 lookup 51841",
        "priority 400 from all iif wgmesh0 fwmark 0x0/0x1000 lookup 51841",
        "priority 401 from all iif eth0 lookup 51840", "priority 401 from all iif lo lookup 51840",
        "priority 401 from all iif wgmesh0 lookup 51840", "priority 401 from 10.244.1.0/25 lookup 51841",
        "priority 402 from 10.244.1.0/25 lookup 51840"]
    for family in FAMILIES:
        assert plan.rules_of_batch(plan.rules_text({"rules": found}, family), family) == [
            item for item in found if item["family"] == family]
    # From one kind of rules to the other: never without rules in between.
    everything = wanted(document(), encrypt="nodes")["rules"]
    for first, second in ((found, everything), (everything, found)):
        for dummy, state in prefixes_of_plan({"routes": [], "rules": first}, {"routes": [], "rules": second}):
            there = {plan.rule_order(item) for item in state["rules"]}
            assert any({plan.rule_order(item) for item in whole} <= there for whole in (first, second))


def test_a_node_of_one_family_has_nothing_of_the_other():
    state = wanted(document(a=entry(1, families=("ipv4",))))
    assert {item["family"] for item in state["routes"] + state["rules"]} == {"ipv4"}
    state = wanted(document(a=entry(1, pod_cidrs=["10.244.1.0/24"])))
    assert {item["family"] for item in state["rules"]} == {"ipv4", "ipv6"}
    assert [item["from"] for item in state["rules"] if item["from"]] == ["10.244.1.0/24"]


def test_a_node_without_pods_sends_to_those_of_others():
    state = wanted(document(a=entry(1, pod_cidrs=[])))
    assert [plan.rule_text(item) for item in state["rules"]] == ["priority 400 from all lookup 51840"] * 2


def test_all_of_a_node_may_be_wanted_and_planned():
    state = wanted(document(), encrypt="nodes")
    steps = plan.plan_routes({"routes": [], "rules": []}, state)
    assert [step["op"] for step in steps] == ["replace_route"] * len(state["routes"]) + ["add_rule"] * len(state["rules"])


# --- text there and back -----------------------------------------------------------------------------------------------------------------

@given(states)
def test_files_of_the_boot_there_and_back(state):
    found = []
    for family in FAMILIES:
        found += plan.routes_of_batch(plan.batch_text(state, family), family)
    assert sorted(found, key=plan.route_order) == state["routes"]


def test_lines_that_are_not_ours_are_left_out():
    lines = ["# comment", "route add 10.0.0.0/8 dev x", "route replace", "route replace 10.1.0.0/16 dev wgmesh0",
             "route replace nonsense dev x table 1", "route replace 10.2.0.0/16 dev wgmesh0 table x",
             "route replace 10.3.0.1/16 dev wgmesh0 table 51840", "route replace 10.4.0.0/16 dev"]
    assert plan.routes_of_batch("\n".join(lines) + "\n", "ipv4") == []
    assert plan.routes_of_batch("", "ipv4") == []
    assert plan.routes_of_batch("route replace 10.2.0.0/16 dev wgmesh0 table 51840  #\n", "ipv4") == [route("10.2.0.0/16")]


def test_files_are_for_one_family_each():
    state = {"routes": [route("10.244.2.0/24", peer="b", src="198.18.0.11", mtu=1380), route("fd00:2::/64", peer="b")],
             "rules": [rule(400), rule(400, family="ipv6")]}
    assert plan.batch_text(state, "ipv4").splitlines()[1:] == [
        "route replace 10.244.2.0/24 dev wgmesh0 table 51840 src 198.18.0.11 mtu 1380  # b"]
    assert plan.batch_text(state, "ipv6").splitlines()[1:] == ["route replace fd00:2::/64 dev wgmesh0 table 51840  # b"]
    assert plan.rules_text(state, "ipv6").splitlines()[1:] == ["rule add priority 400 from all lookup 51840"]


def test_state_for_people():
    state = {"routes": [route("10.244.2.0/24"), route("fd00:2::/64", type="unreachable", dev="")], "rules": [rule(400, family="ipv6")]}
    assert plan.state_as_text(state, {(TABLE, "10.244.2.0/24"): "b"}) == (
        "ip -6 rule priority 400 from all lookup 51840\n"
        "ip route 10.244.2.0/24 dev wgmesh0 table 51840  # b\n"
        "ip -6 route unreachable fd00:2::/64 table 51840\n")


# --- what ip prints ----------------------------------------------------------------------------------------------------------------------

with open(os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "ip", "ip.json"), encoding="utf-8") as handle:
    IP = json.load(handle)
RELEASES = [pytest.param(item["outputs"], id=item["version"].split("-")[1].split(",")[0]) for item in IP["recorded"]]


def items(outputs, command):
    return json.loads(outputs[command]["stdout"])


def made_by(family, table):
    """The routes that the commands of the recording made, as `routes_of_batch` reads them."""
    lines = [line.replace("ip -6 ", "ip ").replace("ip route add", "route replace").replace("add default", "add 0.0.0.0/0")
             for line in IP["made_by"] if " route add " in line and "table %d" % table in line]
    return [item for line in lines if (":" in line) == (family == "ipv6") for item in plan.routes_of_batch(line, family)]


@pytest.mark.parametrize("outputs", RELEASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_routes(outputs, family):
    option = "-4" if family == "ipv4" else "-6"
    for table in (TABLE, TABLE + 1):
        found = [plan.route_from_ip(item, family, table) for item in items(outputs, "%s -j -N route show table %d" % (option, table))]
        assert sorted(found, key=plan.route_order) == sorted(made_by(family, table), key=plan.route_order)
        assert found
    default = [plan.route_from_ip(item, family, 51842) for item in items(outputs, "%s -j -N route show table 51842" % option)]
    assert [item["dst"] for item in default] == ["0.0.0.0/0" if family == "ipv4" else "::/0"]


@pytest.mark.parametrize("outputs", RELEASES)
def test_recorded_rules(outputs):
    found = [plan.rule_from_ip(item, "ipv4") for item in items(outputs, "-4 -j -N rule show")]
    ours = [item for item in found if item is not None and not item.pop("foreign") and item["priority"] not in (0, 420, 32766, 32767)]
    assert [plan.rule_text(item) for item in ours] == [
        "priority 400 from all lookup 51840",
        "priority 401 from 10.244.1.0/24 lookup 51841",
        "priority 402 not from all fwmark 0x1000/0x1000 lookup 51841",
        "priority 410 from 10.244.1.9/32 lookup 51840",
        "priority 415 from all iif eth0 lookup 51840",
    ]
    found = [plan.rule_from_ip(item, "ipv6") for item in items(outputs, "-6 -j -N rule show")]
    ours = [item for item in found if item is not None and not item.pop("foreign") and 0 < item["priority"] < 32766]
    assert [plan.rule_text(item) for item in ours] == [
        "priority 400 from all lookup 51840",
        "priority 401 from fd00:10:244:1::/64 lookup 51841",
        "priority 402 not from all fwmark 0x1000/0x1000 lookup 51841",
    ]


@pytest.mark.parametrize("outputs", RELEASES)
def test_rules_of_others_are_told_apart(outputs):
    """Inverted prefixes, other masks, marks that are not inverted, ports, host bits: never taken for one of ours."""
    found = {item["priority"]: plan.rule_from_ip(item, "ipv4") for item in items(outputs, "-4 -j -N rule show")}
    for priority in [411, 412, 413, 414, 416, 417, 418, 421, 422, 423]:
        assert found[priority]["foreign"], priority
    assert found[419] is None, "a rule without a table"


@pytest.mark.parametrize("more", [
    {"src": "10.244.1.0", "srclen": 24}, {"not": None}, {"fwmark": "0x1000", "fwmask": "0x1000"}, {"oif": "eth1"}])
def test_rules_of_others_that_look_at_a_device(more):
    item = {"priority": 401, "src": "all", "iif": "eth0", "table": "51840"}
    assert not plan.rule_from_ip(dict(item, iif_detached=None), "ipv4")["foreign"]
    assert plan.rule_from_ip(dict(item, **more), "ipv4")["foreign"]


def test_a_table_by_name_is_not_ours():
    assert plan.rule_from_ip({"priority": 0, "src": "all", "table": "local"}, "ipv4") is None


@given(states)
def test_rules_and_routes_as_ip_prints_them(state):
    """What `ip` would print for any of our rules and routes is read back as the same."""
    for item in state["rules"]:
        printed = {"priority": item["priority"], "src": "all", "table": str(item["table"])}
        if item["from"]:
            printed["src"], length = item["from"].split("/")
            if int(length) < (32 if item["family"] == "ipv4" else 128):
                printed["srclen"] = int(length)
        if item["iif"]:
            printed["iif"] = item["iif"]
        if item["not_fwmark"]:
            printed.update({"fwmark": "0x0" if item["iif"] else hex(item["not_fwmark"]), "fwmask": hex(item["not_fwmark"])})
            if not item["iif"]:
                printed["not"] = None
        assert plan.rule_from_ip(printed, item["family"]) == dict(item, foreign=False)


@pytest.mark.parametrize("outputs", RELEASES)
def test_which_way_the_kernel_takes(outputs):
    devices = plan.devices_of_answers(outputs["-4 -o -force -batch -"]["stdout"])
    assert devices == {"10.244.2.9": "wgmesh0", "198.18.0.11": "lo", "10.244.3.9": "wgmesh0"}
    devices = plan.devices_of_answers(outputs["-6 -o -force -batch -"]["stdout"])
    assert devices == {"fd00:10:244:2::9": "wgmesh0", "2001:db8::b": "lo"}


def test_answers_that_say_nothing():
    assert plan.devices_of_answers("\nlocal\nunreachable 10.1.1.1\n10.1.1.2 dev\n") == {}


@pytest.mark.parametrize("cidr,expected", [
    ("10.244.2.0/24", "10.244.2.9"), ("10.244.2.7/32", "10.244.2.7"), ("10.244.2.6/31", "10.244.2.7"), ("fd00:2::/64", "fd00:2::9"),
    ("2001:db8::c/128", "2001:db8::c"), ("10.244.2.8/29", "10.244.2.15")])
def test_an_address_of_a_prefix(cidr, expected):
    assert plan.address_in(cidr) == expected


# --- numbers that cannot be used ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change,words", [
    ({"table": 0}, "mesh_table: 0"), ({"table": 252}, "mesh_table: 252"), ({"table": 253}, "mesh_table"), ({"table": 254}, "mesh_table"),
    ({"table": 255}, "mesh_table"), ({"table": 2 ** 32 - 1}, "mesh_table"), ({"table": -1}, "mesh_table"),
    ({"rule_priority": 0}, "mesh_rule_priority: 0"), ({"rule_priority": 32763}, "mesh_rule_priority"), ({"fwmark": 0}, "mesh_fwmark: 0"),
    ({"fwmark": 2 ** 32}, "mesh_fwmark")])
def test_numbers_that_cannot_be_used(change, words):
    with pytest.raises(_mesh.MeshError, match=words):
        plan.check_settings(dict(SETTINGS, **change))


@pytest.mark.parametrize("change", [
    {}, {"table": 1}, {"table": 251}, {"table": 256}, {"table": 2 ** 32 - 2}, {"rule_priority": 1}, {"rule_priority": 32762}, {"fwmark": 1},
    {"fwmark": 2 ** 32 - 1}])
def test_numbers_that_can(change):
    assert plan.check_settings(dict(SETTINGS, **change)) is None
