# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import ipaddress

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_plan, _agent_pods, _pods

NODES = ["a", "b", "c"]
NODE_ADDRESS = {"a": "198.18.0.1", "b": "198.18.0.2", "c": "198.18.0.3"}
HOLD = _agent_pods.SENDS_AFTER


def candidate(name, pod_cidrs=()):
    return {"name": name, "uid": "uid-" + name, "excluded": "", "pod_cidrs": list(pod_cidrs), "node_addresses": [NODE_ADDRESS[name]],
            "endpoints": None, "annotation_keys": {}}


ROSTER = dict(_agent_plan.empty_roster(), members={name: candidate(name) for name in NODES}, complete=True)
DOCUMENT = {"nodes": {name: {"pod_cidrs": ["10.99.%d.0/24" % place]} for place, name in enumerate(NODES)}}


def pod(name, node, *addresses, **status):
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "d"}, "spec": {"nodeName": node},
            "status": dict({"phase": "Running", "podIPs": [{"ip": address} for address in addresses]}, **status)}


def affinity(cidr, node):
    return {"metadata": {"name": "%s-%s" % (node, cidr.replace("/", "-"))}, "spec": {"cidr": cidr, "node": node, "state": "confirmed"}}


def block(cidr, allocations, size=4):
    nodes = sorted(set(allocations.values()))
    return {"metadata": {"name": cidr.replace("/", "-")}, "spec": {
        "cidr": cidr, "allocations": [nodes.index(allocations[place]) if place in allocations else None for place in range(size)],
        "attributes": [{"secondary": {"node": node}} for node in nodes]}}


def cilium(node, *cidrs):
    return {"metadata": {"name": node}, "spec": {"ipam": {"podCIDRs": list(cidrs)}}}


def listing(kind, items):
    return {_agent_pods.key_of(item): _agent_pods.reducer(kind)(item) for item in items}


def known(source, **objects):
    """A roster that was told lists: {kind: [objects]}."""
    pods = _agent_pods.PodRoster(source)
    for kind in pods.kinds:
        pods.listed(kind, listing(kind, objects.get(kind, [])), 0.0)
        pods.heard(kind, "", 0.0)
    return pods


def prefixes(pods):
    roster, texts = pods.view(ROSTER, DOCUMENT)
    assert not texts, texts
    return {name: one["pod_cidrs"] for name, one in roster["members"].items()}


# --- the same as the controller ---------------------------------------------------------------------------------------------------------

NODE = st.sampled_from(NODES + ["gone"])
POD = st.builds(
    lambda number, node, addresses, phase, deleting, host: dict(
        pod("p%d" % number, node, *addresses, phase=phase),
        spec={"nodeName": node, "hostNetwork": host},
        metadata=dict({"name": "p%d" % number, "namespace": "d"}, **({"deletionTimestamp": "2026-11-23T00:00:00Z"} if deleting else {}))),
    st.integers(0, 9), NODE, st.lists(st.integers(0, 15).map(lambda n: "10.0.0.%d" % n) | st.integers(0, 7).map(lambda n: "fd00::%x" % n)
                                      | st.sampled_from(["198.18.0.1", "none", "169.254.1.1"]), max_size=2),
    st.sampled_from(["Running", "Running", "Pending", "Succeeded"]), st.booleans(), st.booleans())
BLOCK_CIDR = st.integers(0, 3).map(lambda n: "10.0.0.%d/30" % (n * 4))
OBJECTS = {
    "Pod": POD,
    "BlockAffinity": st.builds(affinity, BLOCK_CIDR, NODE),
    "IPAMBlock": st.builds(block, BLOCK_CIDR, st.dictionaries(st.integers(0, 3), NODE, max_size=4)),
    "CiliumNode": st.builds(lambda node, number: cilium(node, "10.0.%d.0/24" % number), NODE, st.integers(0, 3)),
}
EVENTS = {source: st.lists(st.sampled_from([resource.kind for resource in _pods.RESOURCES[source]]).flatmap(
    lambda kind: st.tuples(st.just(kind), OBJECTS[kind], st.sampled_from(["put", "put", "delete", "list"]))), max_size=25)
    for source in _pods.SOURCES[1:]}


@pytest.mark.parametrize("source", _pods.SOURCES[1:])
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_events_and_lists_lead_to_what_the_controller_reads(source, data):
    """Whatever came in whatever order: the agent's prefixes are those that netaddr makes of the objects that are there at the end."""
    pytest.importorskip("netaddr")
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import merged_by_netaddr
    objects = {resource.kind: {} for resource in _pods.RESOURCES[source]}
    pods = known(source)
    for kind, item, what in data.draw(EVENTS[source]):
        key = _agent_pods.key_of(item)
        if what == "put":
            objects[kind][key] = item
            pods.happened(kind, key, _agent_pods.reducer(kind)(item))
        elif what == "delete":
            objects[kind].pop(key, None)
            pods.happened(kind, key, None)
        else:
            pods.listed(kind, listing(kind, objects[kind].values()), 1.0)
    wanted, dummy = _pods.with_pod_source(
        [candidate(name) for name in NODES], source, {kind: list(items.values()) for kind, items in objects.items()}, merged_by_netaddr)
    roster, dummy = pods.view(ROSTER, DOCUMENT)
    assert list(roster["members"].values()) == wanted


def test_what_is_said_twice_is_no_news():
    pods = known("pods", Pod=[pod("p", "a", "10.0.0.1")])
    again = _agent_pods.reducer("Pod")(dict(pod("p", "a", "10.0.0.1"), metadata={"name": "p", "namespace": "d", "labels": {"x": "y"}}))
    assert not pods.happened("Pod", "d/p", again)
    assert not pods.listed("Pod", {"d/p": again}, 5.0)
    assert not pods.happened("Pod", "d/other", None)
    assert pods.happened("Pod", "d/p", _agent_pods.reducer("Pod")(pod("p", "a", "10.0.0.2")))


# --- who goes, and when -------------------------------------------------------------------------------------------------------------------

def test_a_deleted_pod_goes_at_once_and_one_that_a_list_lacks_after_the_grace():
    pods = known("pods", Pod=[pod("p", "a", "10.0.0.1"), pod("q", "a", "10.0.0.4"), pod("r", "a", "10.0.0.8")])
    assert pods.happened("Pod", "d/p", None)
    assert prefixes(pods)["a"] == ["10.0.0.4/32", "10.0.0.8/32"]
    assert pods.listed("Pod", listing("Pod", [pod("q", "a", "10.0.0.4")]), 10.0)
    assert prefixes(pods)["a"] == ["10.0.0.4/32", "10.0.0.8/32"] and pods.next_gone(60) == 70.0
    assert not pods.forget(60, 69.0)
    # A second list does not make it younger.
    pods.listed("Pod", listing("Pod", [pod("q", "a", "10.0.0.4")]), 30.0)
    assert not pods.forget(60, 70.0) and pods.ask_again(60, 69.0) == set() and pods.ask_again(60, 70.0) == {"Pod"}
    assert pods.ask_again(60, 71.0) == set() and pods.next_gone(60) is None
    pods.listed("Pod", listing("Pod", [pod("q", "a", "10.0.0.4")]), 72.0)
    assert pods.next_gone(60) == 70.0
    assert pods.forget(60, 72.0) and prefixes(pods)["a"] == ["10.0.0.4/32"] and pods.next_gone(60) is None


def test_what_one_list_lacked_by_mistake_stays():
    pods = known("pods", Pod=[pod("p", "a", "10.0.0.1"), pod("q", "a", "10.0.0.4")])
    pods.listed("Pod", listing("Pod", [pod("q", "a", "10.0.0.4")]), 0.0)
    assert pods.ask_again(60, 60.0) == {"Pod"}
    pods.listed("Pod", listing("Pod", [pod("p", "a", "10.0.0.1"), pod("q", "a", "10.0.0.4")]), 61.0)
    assert not pods.forget(60, 1e9) and prefixes(pods)["a"] == ["10.0.0.1/32", "10.0.0.4/32"]


def test_the_grace_does_not_run_while_the_api_is_away():
    pods = known("calico_ipam", BlockAffinity=[affinity("10.0.0.0/30", "a"), affinity("10.0.0.4/30", "b")],
                 IPAMBlock=[block("10.0.0.0/30", {})])
    pods.listed("BlockAffinity", listing("BlockAffinity", [affinity("10.0.0.0/30", "a")]), 0.0)
    pods.heard("BlockAffinity", "cut", 50.0)
    assert not pods.ask_again(60, 1e6) and not pods.forget(60, 1e6) and pods.next_gone(60) is None
    pods.heard("BlockAffinity", "", 1000.0)
    assert pods.next_gone(60) == 1060.0 and pods.ask_again(60, 1059.0) == set()
    # nor while another kind is away
    pods.heard("IPAMBlock", "cut", 1010.0)
    assert not pods.ask_again(60, 1e6)
    pods.heard("IPAMBlock", "", 1100.0)
    assert pods.ask_again(60, 1100.0) == {"BlockAffinity"}
    # what was asked before the API went away is asked anew
    pods.heard("BlockAffinity", "cut", 1101.0)
    pods.heard("BlockAffinity", "", 1102.0)
    assert pods.ask_again(60, 1162.0) == {"BlockAffinity"}


@pytest.mark.parametrize("source,kind,gone,there,wanted", [
    ("pods", "Pod", pod("p", "a", "10.0.0.1"), pod("q", "b", "10.0.0.1"), {"b": ["10.0.0.1/32"]}),
    ("calico_ipam", "BlockAffinity", affinity("10.0.0.0/30", "a"), affinity("10.0.0.0/30", "b"), {"b": ["10.0.0.0/30"]}),
    ("cilium", "CiliumNode", cilium("a", "10.0.0.0/24"), cilium("b", "10.0.0.0/24"), {"b": ["10.0.0.0/24"]}),
])
def test_what_is_missing_gives_way(source, kind, gone, there, wanted):
    pods = known(source, **{kind: [gone]})
    pods.listed(kind, listing(kind, [there]), 5.0)
    assert prefixes(pods) == dict({name: [] for name in NODES}, **wanted)


def test_one_that_is_done_is_no_missing_one():
    pods = known("pods", Pod=[pod("p", "a", "10.0.0.1")])
    assert pods.listed("Pod", listing("Pod", [pod("p", "a", "10.0.0.1", phase="Failed")]), 5.0)
    assert prefixes(pods)["a"] == [] and pods.next_gone(60) is None


def test_an_empty_list_is_not_believed():
    for source in _pods.SOURCES[1:]:
        for resource in _pods.RESOURCES[source]:
            assert resource.plural in _agent_pods.distrust(resource, {})
            assert "1 objects and none" in _agent_pods.distrust(resource, {"x": None})


@pytest.mark.parametrize("source, kind, item, change", [
    ("pods", "Pod", pod("p", "a", "10.0.0.1"), {"status": {"phase": "Running", "addresses": ["10.0.0.1"]}}),
    ("calico_ipam", "BlockAffinity", affinity("10.0.0.0/30", "a"), {"spec": {"cidr": "10.0.0.0/30", "node": "a", "state": "Confirmed"}}),
    ("calico_ipam", "IPAMBlock", block("10.0.0.0/30", {0: "a"}), {"spec": {"blockCIDR": "10.0.0.0/30"}}),
    ("cilium", "CiliumNode", cilium("a", "10.0.0.0/24"), {"spec": {"ipam": {"cidrs": ["10.0.0.0/24"]}}})])
def test_a_list_in_which_fields_have_other_names_is_not_believed(source, kind, item, change):
    resource = next(one for one in _pods.RESOURCES[source] if one.kind == kind)
    assert _agent_pods.distrust(resource, listing(kind, [item])) == ""
    assert "none with an address" in _agent_pods.distrust(resource, listing(kind, [dict(item, **change)]))


def test_nothing_is_known_before_all_lists_were_read():
    pods = _agent_pods.PodRoster("calico_ipam")
    pods.listed("BlockAffinity", {}, 0.0)
    assert not pods.is_known() and pods.trouble()
    pods.listed("IPAMBlock", {}, 0.0)
    assert pods.is_known()


def test_objects_that_cannot_be_used_change_nothing():
    pods = known("calico_ipam", BlockAffinity=[affinity("10.0.0.0/30", "a"), affinity("nonsense", "b")])
    roster, texts = pods.view(ROSTER, DOCUMENT)
    assert [one["pod_cidrs"] for one in roster["members"].values()] == [entry["pod_cidrs"] for entry in DOCUMENT["nodes"].values()]
    assert "nonsense" in texts[0]


@pytest.mark.parametrize("item", [{}, {"metadata": {"name": 7}}, {"metadata": []}, {"metadata": {"name": "x"}, "spec": 5, "status": "y"}])
def test_odd_objects(item):
    for kind in _pods.REDUCERS:
        _agent_pods.reducer(kind)(item)
    assert _agent_pods.key_of(item) in (None, "x")


# --- what this node sends from ------------------------------------------------------------------------------------------------------------

def addresses(cidrs):
    return {address for text in cidrs for address in ipaddress.ip_network(text)}


CIDRS = st.lists(st.integers(0, 31).map(lambda n: "10.0.0.%d/32" % n) | st.integers(0, 7).map(lambda n: "10.0.0.%d/30" % (n * 4)),
                 max_size=8)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(CIDRS, CIDRS)
def test_in_common(some, others):
    assert addresses(_agent_pods.in_common(some, others)) == addresses(some) & addresses(others)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.sets(st.integers(0, 15)), st.floats(0.0, 3.0)), min_size=1, max_size=12))
def test_a_node_sends_from_what_has_been_its_own_for_a_while(states):
    """Never from what is none of its own, never sooner than the peers had time, always from what it had before, and in the end from all."""
    now, since, sending = 0.0, {}, {"cidrs": [], "young": None}
    for numbers, pause in states:
        now += pause
        since = {number: since.get(number, now) for number in numbers}
        own = _pods.merged_prefixes("10.0.0.%d" % number for number in numbers)
        before = addresses(sending["cidrs"])
        sending, due = _agent_pods.next_sending(sending, own, now)
        sends = addresses(sending["cidrs"])
        assert sends <= addresses(own) and before & addresses(own) <= sends
        too_new = {ipaddress.ip_address("10.0.0.%d" % number) for number, first in since.items() if now < first + HOLD}
        assert not (sends - before) & too_new
        assert (due is None) == (sends == addresses(own))
    while due is not None:
        assert due > now
        now = due
        sending, due = _agent_pods.next_sending(sending, own, now)
    assert sending["cidrs"] == own


def test_rules_say_what_a_node_sent_from_before():
    rules = [{"from": "10.0.0.4/31", "table": 51840}, {"from": "10.0.0.9/32", "table": 51841}, {"from": "", "table": 51840}]
    assert _agent_pods.sending_of(rules, 51840) == {"cidrs": ["10.0.0.4/31"], "young": None}
    sending, due = _agent_pods.next_sending(_agent_pods.sending_of(rules, 51840), ["10.0.0.4/30"], 7.0)
    assert sending["cidrs"] == ["10.0.0.4/31"] and due == 7.0 + HOLD
    assert _agent_pods.next_sending(sending, ["10.0.0.4/30"], due) == ({"cidrs": ["10.0.0.4/30"], "young": None}, None)


def test_many_changes_are_one_line():
    changes = ["node a: pod CIDR 10.0.0.1/32 added", "node b joined: member", "node a: pod CIDR 10.0.0.2/32 removed"]
    assert _agent_pods.summary(changes) == ["node b joined: member", "2 prefixes of pods added or removed"]
    assert _agent_pods.summary(changes[1:2]) == changes[1:2]
