# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import json
import os
import sys

import pytest

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("jmespath")
pytest.importorskip("netaddr")
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import documents

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh, _published_keys, _routes_plan, _wg_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

KEY0 = "kubemesh.wireguard/public-key-0"
CONFIG = {
    "node": "w1", "server": "https://192.0.2.1:6443", "ca_file": None, "token_file": "/t", "interface": "wgmesh", "table": 51840,
    "rule_priority": 400, "fwmark": 4096, "exempt_cidrs": [], "exclude_nodes": [], "service_cidrs": ["10.96.0.0/12"], "grace": 60,
    "pod_source": "node_cidrs",
    "document_file": "/d", "boot_folder": "/b", "lock_file": "/l", "runtime": "/r", "state": "/s", "metrics_file": "/m"}
NOTHING = {"annotations": {}, "kept": {"pod_cidrs": [], "node_addresses": []}, "forgotten": False}


def entry(number, **other):
    found = documents.entry(number, uid="uid-%d" % number, **other)
    return dict(found, endpoints={"ipv4": {"address": "198.18.0.1%d" % number, "port": None},
                                  "ipv6": {"address": "2001:db8::%x" % number, "port": None}}, **other)


def document(*numbers, **changes):
    nodes = {"w%d" % number: entry(number) for number in numbers}
    for name, change in changes.items():
        nodes[name] = dict(nodes[name], **change)
    return documents.document(nodes)


def node(number, name=None, annotations=None, **changes):
    """The Node object of an entry."""
    found = dict(entry(number), **changes)
    return {"metadata": {"name": name or "w%d" % number, "uid": found["uid"],
                         "annotations": {KEY0: documents.key(number)} if annotations is None else annotations},
            "spec": {"podCIDRs": found["pod_cidrs"]},
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in found["node_addresses"]]}}


def roster(*nodes):
    found, dummy = plan.listed(plan.empty_roster(), {item["metadata"]["name"]: plan.reduced(item) for item in nodes})
    return found


def sure(found):
    """The roster when a second list lacks the same."""
    return dict(found, sure=frozenset(found["missing"]))


def following(previous, found, now=0.0, remembered=None, **config):
    config = dict(CONFIG, **config)
    found = plan.note_missing(found, previous, config["node"], found.get("noted", now))
    return plan.next_document(previous, found, remembered or plan.adopt(previous, found, config["pod_source"]), config, now)


# --- the same as the controller's ------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["", "false", "10.244.1.0/24", "198.18.0.1", "InternalIP", "{{ 7 }}"])
VALUES = st.none() | st.booleans() | st.integers(0, 1) | TEXTS
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@given(st.fixed_dictionaries({}, optional={
    "kind": st.sampled_from(["Node", "Pod"]),
    "metadata": ANYTHING | st.fixed_dictionaries({}, optional={
        "name": st.sampled_from(["w1", "W 1"]) | ANYTHING, "uid": ANYTHING, "labels": ANYTHING | st.dictionaries(
            st.just("kubernetes.io/os"), st.sampled_from(["linux", "windows"])),
        "annotations": ANYTHING | st.dictionaries(st.sampled_from([KEY0, "kubemesh.wireguard/excluded"]), ANYTHING)}),
    "spec": ANYTHING | st.fixed_dictionaries({}, optional={"podCIDR": ANYTHING, "podCIDRs": ANYTHING | st.just([])}),
    "status": ANYTHING | st.fixed_dictionaries({}, optional={"addresses": ANYTHING | st.lists(ANYTHING | st.fixed_dictionaries(
        {}, optional={"type": st.just("InternalIP") | ANYTHING, "address": ANYTHING}), max_size=3)}),
}))
def test_candidates_are_those_of_the_queries(item):
    """Without jmespath a Node object is read as with it."""
    found, problems = _membership.nodes_from_k8s([item])
    candidate, own_problems = _membership.plain_candidate(item)
    assert ([candidate] if candidate else [], own_problems) == (found, problems)


@given(st.lists(st.integers(2, 9), unique=True, max_size=5), st.lists(st.integers(2, 9), unique=True, max_size=5), st.booleans())
def test_documents_are_those_of_the_controller(before, after, again):
    """After the grace, the agent's document is what a run makes of the same list, but for the serial."""
    previous = document(1, *before)
    items = [node(1)] + [node(number, **({"uid": "uid-again"} if again and number == after[0] else {})) for number in after]
    found = sure(plan.note_missing(roster(*items), previous, "w1", 0.0))
    own, dummy = plan.next_document(previous, found, plan.adopt(previous, found, "node_cidrs"), CONFIG, 60.0)
    candidates, problems = _membership.nodes_from_k8s(items)
    theirs, dummy = _membership.build_document(candidates, {}, previous, {"complete": True})
    assert not problems and own["nodes"] == {
        name: dict(value, mtu=own["nodes"][name]["mtu"]) for name, value in theirs["nodes"].items()}


def test_overlaps_are_found_without_netaddr():
    prefixes = [("10.0.0.0/8", ("a", "pod CIDR")), ("10.1.0.0/16", ("b", "pod CIDR")), ("10.1.0.1/32", ("b", "endpoint")),
                ("10.1.0.1/32", ("b", "node address")), ("10.0.0.0/9", ("", "service CIDR"))]
    plain = {text.split(":")[0] for text in _membership.plain_overlap_problems(prefixes)}
    assert plain == {text.split(":")[0] for text in _membership.overlap_problems(prefixes)} and plain


# --- the list --------------------------------------------------------------------------------------------------------------------------

def test_status_updates_are_no_news():
    found = roster(node(1), node(2))
    item = node(2)
    item["status"]["conditions"] = [{"lastHeartbeatTime": "now"}]
    item["metadata"]["resourceVersion"] = "12345"
    assert plan.happened(found, "w2", plan.reduced(item)) == (found, False)
    assert plan.happened(found, "w2", plan.reduced(node(2, pod_cidrs=["10.244.77.0/24"])))[1]
    assert plan.happened(found, "w3", None) == (found, False)


@pytest.mark.parametrize("listing, trusted", [({}, False), ({"w2": 1}, False), ({"w1": 1}, True)])
def test_lists_that_are_not_believed(listing, trusted):
    assert bool(plan.distrust(listing, "w1")) != trusted


@pytest.mark.parametrize("item", [{}, {"metadata": None}, {"metadata": {"name": "x" * 300}}, {"metadata": {"name": ["w1"]}, "spec": 7},
                                  {"metadata": {"name": "w1"}, "status": {"addresses": [{"type": "InternalIP", "address": "{{ 7 }}"}]}}])
def test_what_a_cluster_can_hold_is_never_an_exception(item):
    candidate, problems = plan.reduced(item)
    assert problems or candidate


# --- who may go ------------------------------------------------------------------------------------------------------------------------

def test_gone_after_the_grace_of_a_complete_list_only():
    previous = document(1, 2)
    found = plan.note_missing(plan.happened(roster(node(1), node(2)), "w2", None)[0], previous, "w1", 100.0)
    assert plan.gone(found, 60, 159.9) == set() and plan.gone(found, 60, 160.0) == {"w2"} and plan.next_gone(found, 60) == 160.0
    # it is not counted while nobody knows, and counted anew afterwards
    away = plan.lost(found)
    assert plan.note_missing(away, previous, "w1", 150.0)["missing"] == {}
    back = plan.note_missing(dict(away, complete=True), previous, "w1", 155.0)
    assert plan.gone(back, 60, 200.0) == set() and plan.gone(back, 60, 215.0) == {"w2"}


def test_gone_from_one_list_is_asked_again():
    previous = document(1, 2, 3)
    found = plan.note_missing(roster(node(1)), previous, "w1", 0.0)
    assert plan.doubtful(found, 60, 59.0) == set() and plan.next_gone(found, 60) == 60.0
    assert plan.doubtful(found, 60, 60.0) == {"w2", "w3"} and plan.gone(found, 60, 1e9) == set()
    found = plan.asked_again(found, {"w2", "w3"})
    assert plan.doubtful(found, 60, 61.0) == set() and plan.next_gone(found, 60) is None
    # the API went away before it answered: all begins again
    away = plan.note_missing(dict(plan.lost(found), complete=True), previous, "w1", 70.0)
    assert plan.doubtful(away, 60, 130.0) == {"w2", "w3"}
    # the second list has one of them
    second = {"w1": plan.reduced(node(1)), "w3": plan.reduced(node(3))}
    found = plan.note_missing(plan.listed(found, second)[0], previous, "w1", 62.0)
    assert plan.gone(found, 60, 62.0) == {"w2"} and plan.doubtful(found, 60, 62.0) == set()
    # what comes back is not known to be gone the next time
    back = plan.happened(found, "w2", plan.reduced(node(2)))[0]
    assert back["sure"] == frozenset()


def test_own_node_and_unreadable_nodes_are_never_missing():
    previous = document(1, 2)
    bad = node(2)
    bad["spec"]["podCIDRs"] = ["nonsense"]
    found = plan.note_missing(roster(bad), previous, "w1", 0.0)
    assert found["missing"] == {}
    after, texts = plan.next_document(previous, found, NOTHING, CONFIG, 1e9)
    assert after["nodes"]["w2"] == previous["nodes"]["w2"] and any("nonsense" in text for text in texts)


def kubelets(number):
    """A Node as kubelet registers it anew."""
    return node(number, uid="uid-again", annotations={})


def test_who_was_deleted_for_the_grace_is_forgotten_until_its_node_has_its_key():
    previous, config = document(1, 2), dict(CONFIG, node="w2")

    def step(found, remembered, now):
        found = plan.note_missing(found, previous, "w2", now)
        return found, plan.with_own(remembered, found, previous, config, now)

    found, remembered = step(roster(node(1), node(2)), NOTHING, 0.0)
    assert remembered == NOTHING and plan.own_forgotten_at(remembered, found, 60) is None
    found, remembered = step(plan.happened(found, "w2", None)[0], remembered, 10.0)
    assert not remembered["forgotten"] and plan.own_forgotten_at(remembered, found, 60) == 70.0
    # registered again in time: the others keep the key
    assert not step(plan.happened(found, "w2", plan.reduced(kubelets(2)))[0], remembered, 69.0)[1]["forgotten"]
    # while the API is away, and after it, nothing is known of the time before
    found, remembered = step(plan.lost(found), remembered, 100.0)
    found, remembered = step(dict(found, complete=True), remembered, 110.0)
    assert not remembered["forgotten"]
    found, remembered = step(found, remembered, 170.0)
    assert remembered["forgotten"] and "was deleted," in plan.hindrance_of_own(remembered, found, "w2")
    assert plan.own_forgotten_at(remembered, found, 60) is None
    found, remembered = step(plan.happened(found, "w2", plan.reduced(kubelets(2)))[0], remembered, 180.0)
    assert remembered["forgotten"] and "registered again without its key," in plan.hindrance_of_own(remembered, found, "w2")
    # it outlives this program, but not a run
    assert plan.parse_memory(plan.memory_text("sum", previous, remembered, previous, "boot"), "sum") == (previous, remembered)
    found, remembered = step(plan.happened(found, "w2", plan.reduced(node(2, uid="uid-again")))[0], remembered, 190.0)
    assert not remembered["forgotten"] and plan.hindrance_of_own(remembered, found, "w2") == ""
    # its own document knows the new Node then
    after, texts = plan.next_document(previous, found, remembered, config, 190.0)
    assert after["nodes"]["w2"] == dict(previous["nodes"]["w2"], uid="uid-again") and texts == []


@pytest.mark.parametrize("listing", [{}, {"w1": 1}])
def test_no_list_makes_a_node_believe_that_it_was_deleted(listing):
    assert plan.distrust(listing, "w2")


def test_missing_stays_until_the_grace_is_over():
    previous = document(1, 2, 3)
    found = sure(plan.note_missing(roster(node(1), node(2)), previous, "w1", 0.0))
    remembered = plan.adopt(previous, found, "node_cidrs")
    assert plan.next_document(previous, found, remembered, CONFIG, 59.0)[0]["nodes"] == previous["nodes"]
    assert set(plan.next_document(previous, found, remembered, CONFIG, 60.0)[0]["nodes"]) == {"w1", "w2"}


@pytest.mark.parametrize("change", [{"pod_cidrs": ["10.244.3.0/24"]}, {"node_addresses": ["198.18.0.13"]}])
def test_missing_makes_room_at_once(change):
    previous = document(1, 3)
    new = node(5, name="w5", **change)
    after, texts = following(previous, roster(node(1), new), 0.0)
    assert set(after["nodes"]) == {"w1", "w5"} and after["nodes"]["w5"]["state"] == "member" and texts == []


def test_an_entry_that_is_set_by_a_person_stays():
    previous = document(1, 2, w2={"pod_cidrs": ["172.16.0.0/24"], "keepalive": 25, "endpoints": {}, "node_addresses": ["198.18.9.9"]})
    found = roster(node(1), node(2))
    after, dummy = following(previous, found)
    assert after["nodes"] == previous["nodes"]
    # also while its Node is missing
    after, dummy = following(previous, roster(node(1)))
    assert after["nodes"] == previous["nodes"]


# --- answers that lack something -------------------------------------------------------------------------------------------------------

def without(item, field):
    """A Node object whose pod CIDRs or addresses are called something else."""
    if field == "pod_cidrs":
        return dict(item, spec={"podCidrs": item["spec"]["podCIDRs"]})
    return dict(item, status={"addresses": [dict(address, type="internalIP") for address in item["status"]["addresses"]]})


@pytest.mark.parametrize("field", ["pod_cidrs", "node_addresses"])
@pytest.mark.parametrize("who", [(2,), (1, 2, 3, 4, 5)])
def test_fields_that_vanish_take_nothing_away(field, who):
    previous = document(1, 2, 3, 4, 5)
    whole = roster(*[node(number) for number in range(1, 6)])
    remembered = plan.adopt(previous, whole, "node_cidrs")
    found = roster(*[without(node(number), field) if number in who else node(number) for number in range(1, 6)])
    after, texts = plan.next_document(previous, plan.note_missing(found, previous, "w1", 0.0), remembered, CONFIG, 0.0)
    assert after["nodes"] == previous["nodes"]
    assert len(texts) == 1 and "any more, for %s:" % ", ".join("w%d" % number for number in who) in texts[0]
    # and what is right again is followed
    right = dict({"w%d" % number: plan.reduced(node(number)) for number in (1, 3, 4, 5)},
                 w2=plan.reduced(node(2, node_addresses=["198.18.7.7", "2001:db8::7"])))
    after, texts = plan.next_document(after, plan.listed(found, right)[0], remembered, CONFIG, 0.0)
    assert after["nodes"]["w2"]["node_addresses"] == ["198.18.7.7", "2001:db8::7"] and texts == []


@pytest.mark.parametrize("field", ["pod_cidrs", "node_addresses"])
def test_a_family_that_vanishes_takes_nothing_away(field):
    previous = document(1, 2)
    remembered = plan.adopt(previous, roster(node(1), node(2)), "node_cidrs")
    here = {"pod_cidrs": ["10.244.2.0/24"], "node_addresses": ["198.18.0.12"]}[field]
    after, texts = plan.next_document(previous, roster(node(1), node(2, **{field: here})), remembered, CONFIG, 0.0)
    assert after["nodes"] == previous["nodes"] and len(previous["nodes"]["w2"][field]) == 2
    assert len(texts) == 1 and "of a family, any more, for w2:" in texts[0]
    # another family may be followed meanwhile, and what another Node has now is not kept from it
    moved = {"pod_cidrs": ["10.245.2.0/24"], "node_addresses": ["198.18.7.7"]}[field]
    lost = next(text for text in previous["nodes"]["w2"][field] if ":" in text)
    after, texts = plan.next_document(previous, roster(node(1), node(2, **{field: moved})), remembered, CONFIG, 0.0)
    assert sorted(after["nodes"]["w2"][field]) == sorted([*moved, lost]) and texts
    other = {"pod_cidrs": ["10.244.3.0/24", lost], "node_addresses": ["198.18.0.13", lost]}[field]
    found = roster(node(1), node(2, **{field: here}), node(3, **{field: other}))
    after, texts = plan.next_document(previous, found, remembered, CONFIG, 0.0)
    assert after["nodes"]["w2"][field] == here and after["nodes"]["w3"][field] == other and texts == []


@pytest.mark.parametrize("other", [[], [node(6, annotations={KEY0: documents.key(2)})]])
@pytest.mark.parametrize("source", ["pods", "calico_ipam", "cilium"])
def test_prefixes_of_pods_go_node_by_node_and_never_all_at_once(source, other):
    """Also beside a Node that cannot be used, which makes the others be tried one by one."""
    previous = document(1, 2, 3)
    nothing = {"pod_cidrs": []}
    found = roster(node(1), node(2, **nothing), node(3))
    assert following(previous, found, pod_source=source)[0]["nodes"]["w2"]["pod_cidrs"] == []
    found = roster(node(1, **nothing), node(2, **nothing), node(3, **nothing), *other)
    after, texts = following(previous, found, pod_source=source)
    assert {name: after["nodes"][name] for name in previous["nodes"]} == previous["nodes"]
    assert any("no prefix of any pod any more, for w1, w2, w3" in text for text in texts)


def test_another_node_of_the_same_name_may_have_nothing_yet():
    previous = document(1, 2)
    after, dummy = following(previous, roster(node(1), node(2, uid="again", pod_cidrs=[])))
    assert after["nodes"]["w2"]["pod_cidrs"] == []


def test_what_a_person_set_for_nodes_of_which_the_api_has_nothing_stays_in_silence():
    previous = document(1, 2)
    found = roster(*[without(without(node(number), "pod_cidrs"), "node_addresses") for number in (1, 2)])
    assert following(previous, found) == (previous, [])


# --- what is left to runs --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["annotation", "option"])
def test_who_is_to_be_excluded_stays_until_a_run_takes_it_out(how):
    previous = document(1, 2)
    item = node(2)
    if how == "annotation":
        item["metadata"]["annotations"]["kubemesh.wireguard/excluded"] = "true"
    found, config = roster(node(1), item), {} if how == "annotation" else {"exclude_nodes": ["w2"]}
    after, texts = following(previous, found, **config)
    assert after == previous and len(texts) == 1 and "node w2 is to be excluded" in texts[0] and "reconcile" in texts[0]
    # the node's own agent goes on as well
    after, texts = following(previous, found, node="w2", **config)
    assert plan.hindrance(after, "w2", documents.key(2)) == "" and texts
    # one that is new does not become a peer
    after, texts = following(document(1), found, **config)
    assert after["nodes"]["w2"]["state"] == "excluded" and texts == []


def test_who_does_not_come_from_the_api_is_not_changed_by_it():
    previous = document(1, 2, 3, w2={"uid": ""}, w3={"uid": ""})
    other = node(2, node_addresses=["198.18.9.9"], pod_cidrs=["10.244.77.0/24"])
    found = sure(plan.note_missing(roster(node(1), other), previous, "w1", 0.0))
    assert found["missing"] == {}
    after, texts = plan.next_document(previous, found, NOTHING, CONFIG, 1e9)
    assert after["nodes"] == previous["nodes"] and "no uid for w2, w3" in texts[0]


# --- keys ------------------------------------------------------------------------------------------------------------------------------

def test_annotations_count_where_they_are_news():
    previous = document(1, 2)
    old = roster(node(1), node(2, annotations={KEY0: documents.key(7)}))
    remembered = plan.adopt(previous, old, "node_cidrs")
    # it was there beside the document of the run, which knew better
    assert plan.next_document(previous, old, remembered, CONFIG, 0.0)[0]["nodes"]["w2"]["public_keys"] == {"0": documents.key(2)}
    new = roster(node(1), node(2, annotations={KEY0: documents.key(8)}))
    assert plan.next_document(previous, new, remembered, CONFIG, 0.0)[0] == previous
    assert plan.new_keys(previous, new, remembered, "w1") == {"w2": documents.key(8)}
    assert plan.new_keys(previous, old, remembered, "w1") == {}
    after, texts = plan.next_document(previous, new, remembered, CONFIG, 0.0, {documents.key(8)})
    assert after["nodes"]["w2"]["public_keys"] == {"0": documents.key(8)} and "is now" in texts[0]


def test_annotations_of_another_generation_are_for_rotations():
    """One that is left of the last rotation brings no key back that nobody has."""
    before = documents.document({"w%d" % number: entry(
        number, public_keys={"1": documents.key(number)}, probe_addresses={"1": _mesh.probe_address(documents.key(number))})
        for number in (1, 2)}, generation=1)
    found = roster(node(1), node(2, annotations={KEY0: documents.key(7)}), node(3, annotations={KEY0: documents.key(8)}))
    after, dummy = following(before, found)
    assert [sorted(after["nodes"][name]["public_keys"]) for name in ("w1", "w2", "w3")] == [["1"], ["1"], []]


def test_a_new_node_object_has_the_key_of_its_annotation():
    previous = document(1, 2)
    found = roster(node(1), node(2, uid="uid-again", annotations={KEY0: documents.key(8)}))
    assert following(previous, found)[0]["nodes"]["w2"]["public_keys"] == {"0": documents.key(8)}


def test_nobody_tells_a_node_its_own_key():
    previous = document(1, 2)
    found = roster(node(1, uid="uid-again", annotations={KEY0: documents.key(8)}), node(2))
    assert following(previous, found)[0]["nodes"]["w1"]["public_keys"] == {"0": documents.key(1)}


@pytest.mark.parametrize("text", ["{{ lookup('pipe', 'id') }}", "", "A" * 44, 7, None])
def test_an_annotation_that_is_no_key_is_told_and_ignored(text):
    after, dummy = following(document(1), roster(node(1), node(2, annotations={KEY0: text})))
    assert after["nodes"]["w2"]["public_keys"] == {} and after["nodes"]["w2"]["state"] == "pending"


@pytest.mark.parametrize("bad", [node(5, annotations={KEY0: documents.key(2)}), node(5, pod_cidrs=["10.244.1.0/25"]),
                                 node(5, node_addresses=["198.18.0.12"]), node(5, pod_cidrs=["10.96.1.0/24"])])
def test_one_bad_node_does_not_stop_the_others(bad):
    previous = document(1, 2)
    after, texts = following(previous, roster(node(1), node(2), bad, node(3)))
    assert set(after["nodes"]) == {"w1", "w2", "w3"} and texts


def test_a_node_that_turns_bad_stays_as_it_was():
    previous = document(1, 2, 3)
    after, texts = following(previous, roster(node(1), node(2), node(3, uid="again", pod_cidrs=["10.244.1.0/24"])))
    assert after["nodes"] == previous["nodes"] and texts


# --- the kernel ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys, published, wanted", [
    ({"0": documents.key(1)}, {}, {KEY0: documents.key(1)}),
    ({"0": documents.key(1)}, {KEY0: documents.key(2)}, {KEY0: documents.key(1)}),
    ({"0": documents.key(1)}, {KEY0: documents.key(1)}, {}),
    # A rotation took the old key back, and the node still has the document with both.
    ({"0": documents.key(1), "1": documents.key(7)}, {KEY0.replace("-0", "-1"): documents.key(7)}, {}),
    ({}, {KEY0: documents.key(2)}, {}),
])
def test_what_a_node_publishes_of_itself(keys, published, wanted):
    doc = document(1, 2)
    doc["nodes"]["w1"]["public_keys"] = keys
    own = roster(node(1, annotations=published))["members"]["w1"]
    patch = plan.own_patch(doc, own)
    assert (_published_keys.body_of(patch) if patch else {}) == (
        {"metadata": {"uid": own["uid"], "annotations": wanted}} if wanted else {})
    assert plan.own_patch(document(2), own) is None


@pytest.mark.parametrize("of_document, of_node, offers", [
    ("u1", "u1", True), ("u1", "again", False),
    # A document that was made of an inventory says nothing about Node objects.
    ("", "u1", True)])
def test_a_key_is_not_offered_to_a_node_that_may_be_another_machine(of_document, of_node, offers):
    doc = document(1, 2)
    doc["nodes"]["w1"]["uid"] = of_document
    own = roster(node(1, uid=of_node, annotations={}))["members"]["w1"]
    patch = plan.own_patch(doc, own)
    assert (patch is not None) is offers
    assert patch is None or _published_keys.body_of(patch)["metadata"]["uid"] == of_node


def device(doc):
    """A device that is as a document says, for w1."""
    return _wg_plan.apply_steps(dict(_wg_plan.empty_state("wgmesh0"), public_key=documents.key(1), listen_port=51840, fwmark=4096),
                                [dict(peer, op="add_peer", public_key=key) for key, peer in _mesh.peers_of(doc, "w1", 0).items()])


LINK = {"kind": "wireguard", "mtu": 1420, "up": True, "addrgenmode": "none", "addresses": []}


def link_of(doc):
    return dict(LINK, addresses=_mesh.device_addresses(doc, "w1", 0))


@given(st.lists(st.integers(2, 7), unique=True, max_size=4), st.lists(st.integers(2, 7), unique=True, max_size=4))
def test_device_reaches_the_document(before, after):
    old, new = document(1, *before), document(1, *after)
    state = device(old)
    links, first, last = plan.plan_device(state, link_of(old), new, old, CONFIG, True)
    assert links == [] and {step["op"] for step in last} <= {"remove_peer", "remove_allowed_ips"}
    reached = _wg_plan.apply_steps(state, first + last)
    assert reached["peers"].keys() == {documents.key(number) for number in after}
    assert plan.plan_device(reached, link_of(new), new, new, CONFIG, True) == ([], [], [])


def test_a_new_key_is_tried_beside_the_one_in_use_and_takes_over_without_a_gap():
    old, key = document(1, 2, 3), documents.key(8)
    trial, tried = plan.with_keys(old, {"w2": key, "w3": documents.key(2)})
    assert tried == {"w2": key}  # the other one belongs to somebody
    peers = plan.trial_peers(trial, "w1", tried)
    assert peers[key]["allowed_ips"] == [_mesh.probe_address(key) + "/128"] and peers[key]["endpoint"] == "198.18.0.12:51840"
    state = device(old)
    links, first, last = plan.plan_device(state, link_of(old), old, old, CONFIG, True, peers, frozenset(peers))
    assert (links, [step["op"] for step in first], last) == ([], ["add_peer"], [])
    state = _wg_plan.apply_steps(state, first)
    assert {name: peer for name, peer in state["peers"].items() if name != key} == device(old)["peers"]
    # again: nothing to do; taken back: only that one goes, also while a member's key is unknown
    assert plan.plan_device(state, link_of(old), old, old, CONFIG, True, peers, frozenset(peers)) == ([], [], [])
    unknown = document(1, 2, 3, 4, w4={"state": "pending", "reason": "r", "public_keys": {}, "probe_addresses": {}})
    assert plan.plan_device(state, link_of(old), unknown, old, CONFIG, True, {}, frozenset(peers))[2] == [
        {"op": "remove_peer", "public_key": key}]
    # proven: its addresses move in one step, the old key goes last, routes stay
    links, first, last = plan.plan_device(state, link_of(old), trial, old, CONFIG, True, {}, frozenset(peers))
    assert [(step["op"], step["public_key"]) for step in first] == [("add_allowed_ips", key)]
    assert last == [{"op": "remove_peer", "public_key": documents.key(2)}]
    current, wanted = routes_of(old, None), routes_of(trial, {"w2", "w3"})
    assert _routes_plan.plan_routes(current, wanted) == [] and plan.early_removals(current, wanted, plan.moved_prefixes(state, first)) == []


def test_with_preshared_keys_a_new_key_takes_nothing_away():
    old = document(1, 2)
    state = device(old)
    state["peers"][documents.key(2)]["has_preshared_key"] = True
    trial, tried = plan.with_keys(old, {"w2": documents.key(8)})
    assert plan.plan_device(state, link_of(old), old, old, CONFIG, True, plan.trial_peers(trial, "w1", tried), {documents.key(8)}) == (
        [], [], [])


def test_a_key_of_this_node_that_is_not_its_own_is_told():
    found = roster(node(1, annotations={KEY0: documents.key(8)}), node(2))
    assert "which is this one" in plan.key_texts(document(1, 2), found, {}, "w1")[0]
    assert plan.key_texts(document(1, 2), roster(node(1), node(2)), {}, "w1") == []
    assert plan.key_texts(document(1, 2), roster(node(1, annotations={}), node(2)), {}, "w1") == []


def test_peers_of_unknown_owner_stay_while_a_key_is_unknown():
    old = document(1, 2, 3)
    new = document(1, 2, 4, w4={"state": "pending", "reason": "no public key known yet", "public_keys": {}, "probe_addresses": {}})
    state = device(document(1, 2, 3, 5))
    dummy, dummy2, last = plan.plan_device(state, link_of(old), new, old, CONFIG, True)
    # w3 was known and is gone; nobody knows whose the key of 5 is, it may be that of w4
    assert last == [{"op": "remove_peer", "public_key": documents.key(3)}]


def test_preshared_keys_are_left_to_runs():
    old, new = document(1, 2), document(1, 2, 3, w2={"keepalive": 0, "pod_cidrs": ["10.244.2.0/24", "10.244.99.0/24"]})
    state = device(old)
    state["peers"][documents.key(2)]["has_preshared_key"] = True
    dummy, first, last = plan.plan_device(state, link_of(old), new, old, CONFIG, True)
    assert [step["op"] for step in first] == ["add_allowed_ips"] and [step["op"] for step in last] == ["remove_allowed_ips"]


@pytest.mark.parametrize("change, key, text", [
    ({}, documents.key(1), ""), ({}, None, "no mesh device"), ({}, documents.key(9), "another key"),
    ({"state": "excluded", "reason": "r", "public_keys": {}, "probe_addresses": {}, "endpoints": {}}, documents.key(1), "excluded"),
    ({"public_keys": {"0": documents.key(1), "1": documents.key(9)}, "probe_addresses": {
        "0": _mesh.probe_address(documents.key(1)), "1": _mesh.probe_address(documents.key(9))}}, documents.key(1), "rotation")])
def test_what_is_in_the_way(change, key, text):
    found = plan.hindrance(document(1, 2, w1=change), "w1", key)
    assert (text in found) if text else not found
    assert "not in the mesh document" in plan.hindrance(document(2), "w1", key)


def routes_of(doc, proven, present=()):
    settings = plan.route_settings(CONFIG, "wgmesh0", [{"not_fwmark": 0, "iif": ""}])
    return _routes_plan.wanted_state(doc, "w1", settings, proven, present)


def test_routes_stay_only_with_the_same_peer_and_key():
    old = document(1, 2, 3)
    current = routes_of(old, None)
    new = document(1, 2, 3, w3={"public_keys": {"0": documents.key(8)}, "probe_addresses": {"0": _mesh.probe_address(documents.key(8))}})
    present = plan.routed_now(current["routes"], old, new, "w1", 51840, device(old))
    assert {route["peer"] for route in present} == {"w2"}
    assert {route["peer"] for route in routes_of(new, set(), present)["routes"]} == {"w2"}
    assert plan.routed_now(current["routes"], None, new, "w1", 51840, device(old)) == []


def test_a_route_leads_to_who_has_its_prefix_in_the_device():
    """Where it is remembered wrongly what the kernel holds: a route that leads to somebody else is none to keep."""
    new = document(1, 2, 3)
    real = document(1, 2, 3, w3={"pod_cidrs": []}, w2={"pod_cidrs": ["10.244.2.0/24", "10.244.3.0/24"]})
    present = plan.routed_now(routes_of(new, None)["routes"], new, new, "w1", 51840, device(real))
    assert "10.244.3.0/24" not in {route["dst"] for route in present} and "198.18.0.13/32" in {route["dst"] for route in present}
    # a prefix that nobody has is one that somebody took away
    assert plan.routed_now(routes_of(new, None)["routes"], new, new, "w1", 51840, device(document(1))) != []


def test_a_prefix_that_changes_hands_loses_its_route_before_the_device_changes():
    old = document(1, 2, 3)
    new = document(1, 2, 4, w4={"pod_cidrs": ["10.244.3.0/24"]})
    current = routes_of(old, None)
    dummy, first, dummy2 = plan.plan_device(device(old), link_of(old), new, old, CONFIG, True)
    moved = plan.moved_prefixes(device(old), first)
    assert "10.244.3.0/24" in moved
    unproven = routes_of(new, {"w2"}, plan.routed_now(current["routes"], old, new, "w1", 51840, device(old)))
    assert [step["route"]["dst"] for step in plan.early_removals(current, unproven, moved)] == ["10.244.3.0/24"]
    # a peer that was proven before keeps its traffic in the tunnel
    proven = routes_of(new, {"w2", "w4"}, [])
    assert plan.early_removals(current, proven, moved) == []


def test_what_a_node_sends_is_what_its_last_run_wrote_down():
    rules = _routes_plan.wanted_rules(document(1, 2), "w1", dict(CONFIG, encrypt="nodes", iifs=[], own_cidrs=None))
    text = _routes_plan.rules_text({"rules": rules}, "ipv4")
    read = _routes_plan.rules_of_batch(text, "ipv4")
    assert read == [rule for rule in rules if rule["family"] == "ipv4"]
    assert plan.route_settings(CONFIG, "wgmesh0", read)["encrypt"] == "nodes"
    assert plan.route_settings(CONFIG, "wgmesh0", read[:1])["encrypt"] == "pods"
    assert not plan.route_settings(CONFIG, "wgmesh0", [])["send"]
    assert plan.route_settings(CONFIG, "wgmesh0", read)["iifs"] == []
    known = _routes_plan.wanted_rules(document(1, 2), "w1", dict(CONFIG, encrypt="nodes", iifs=["eth0", "lo"], own_cidrs=None))
    read = _routes_plan.rules_of_batch(_routes_plan.rules_text({"rules": known}, "ipv4"), "ipv4")
    settings = plan.route_settings(CONFIG, "wgmesh0", read)
    assert (settings["iifs"], settings["encrypt"]) == (["eth0", "lo"], "nodes")


@given(st.text(max_size=60))
def test_rules_of_a_file_that_is_none(text):
    assert _routes_plan.rules_of_batch("rule add " + text, "ipv4") == [] or "lookup" in text


# --- what is kept and told -------------------------------------------------------------------------------------------------------------

def test_settles_after_a_pause_and_at_the_latest():
    assert plan.settle_at(0.0, 0.0) == plan.SETTLE and plan.settle_at(0.0, 10.0) == plan.SETTLE_LONGEST


def test_memory():
    doc = document(1, 2)
    text = plan.memory_text("sum", doc, NOTHING, doc, "boot")
    assert plan.parse_memory(text, "sum") == (doc, NOTHING)
    assert plan.parse_memory(plan.memory_text("sum", doc, None, doc, "boot"), "sum") == (doc, None)
    for damaged in (text[:-20], "", "[]", text.replace("10.244.1.0/24", "10.244.1.7/24"), text.replace('"kept"', '"k"')):
        assert plan.parse_memory(damaged, "sum") == (None, None)
    assert plan.parse_memory(text, "another") == (None, None)


def test_memory_of_what_the_kernel_holds():
    doc, before = document(1, 2), document(1, 3)
    text, behind = plan.memory_text("sum", doc, None, doc, "boot"), plan.memory_text("sum", doc, None, before, "boot")
    assert plan.parse_applied(text, "boot") == doc and plan.parse_applied(behind, "boot") == before
    assert plan.parse_applied(text, "another boot") is None
    for damaged in (text[:-20], "", "[]", behind.replace("10.244.3.0/24", "10.244.3.7/24"), behind.replace('"boot_id"', '"b"')):
        assert plan.parse_applied(damaged, "boot") is None


def test_config():
    assert plan.parse_config(plan.config_text(CONFIG)) == CONFIG
    for change in ({"grace": -1}, {"node": "W 1"}, {"interface": "x" * 15}, {"table": 254}, {"table": True}, {"extra": 1}, {"server": 1}):
        with pytest.raises(MeshError):
            plan.parse_config(plan.config_text(dict(CONFIG, **change)))
    with pytest.raises(MeshError, match="not JSON"):
        plan.parse_config("{")


def summary(**other):
    found = plan.state_of(document(1, 2), "watching", "", ["a warning"], 0.1, {"w2"}, "", {"events": 1}, 1000.0)
    return dict(found, base="sum", **dict({"guard": "off"}, **other))


def test_state_is_read_and_judged():
    state = summary()
    assert plan.parse_state(json.dumps(state)) == state
    for damaged in ({"time": "x"}, {"warnings": [1]}, {"warnings": ["x"] * 100}, {"api": None}, {"guard": 1}, {"more": 1}):
        assert plan.parse_state(json.dumps(dict(state, **damaged))) is None
    assert plan.state_warnings(state, True, 1010.0) == ["the node agent: a warning"]
    assert "does not run" in plan.state_warnings(state, False, 1010.0)[0]
    assert "has said nothing for" in plan.state_warnings(state, True, 5000.0)[0]
    assert "does nothing: X" in plan.state_warnings(dict(state, hindrance="X"), True, 1000.0)[0]
    assert "not know what changes in the cluster: Y" in plan.state_warnings(dict(state, api="Y"), True, 1000.0)[0]


def test_metrics():
    rows = [{"name": "w2", "public_key": documents.key(2), "handshake_age": None, "rx_bytes": 5, "tx_bytes": 10 ** 12,
             "state": "encrypted"},
            {"name": "(unknown)", "public_key": documents.key(3), "handshake_age": 7, "rx_bytes": 0, "tx_bytes": 0, "state": "unknown"}]
    lines = plan.metrics_text(rows, summary()).splitlines()
    assert 'kubemesh_peer_transmit_bytes_total{peer="w2"} 1000000000000' in lines
    assert 'kubemesh_peer_encrypted{peer="w2"} 1' in lines and 'kubemesh_peer_encrypted{peer="unknown DDDDDDDD"} 0' in lines
    assert 'kubemesh_peer_handshake_age_seconds{peer="unknown DDDDDDDD"} 7' in lines
    assert not any(line.startswith('kubemesh_peer_handshake_age_seconds{peer="w2"}') for line in lines)
    assert not any("guard" in line for line in lines if not line.startswith("#"))
    guarded = plan.metrics_text(rows, summary(guard="in force"), {"out_pods": {"packets": 7, "bytes": 588}}).splitlines()
    assert "kubemesh_guard_in_force 1" in guarded and 'kubemesh_guard_dropped_packets_total{what="out_pods"} 7' in guarded
    assert "kubemesh_guard_in_force 0" in plan.metrics_text(rows, summary(guard="not in force")).splitlines()
    assert "kubemesh_agent_lag_seconds 0.1" in lines and "kubemesh_agent_api_up 1" in lines
    assert len({line.split("{")[0] for line in lines if line.startswith("# TYPE")}) == len([x for x in lines if x.startswith("# TYPE")])


def test_inputs_stay_as_they_are():
    previous, found = document(1, 2, 3), roster(node(1), node(2, pod_cidrs=["10.244.50.0/24"]))
    copies = copy.deepcopy((previous, found))
    following(previous, found)
    assert (previous, found) == copies
