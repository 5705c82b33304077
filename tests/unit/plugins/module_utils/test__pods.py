# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import functools
import hashlib
import ipaddress

import pytest

pytest.importorskip("jmespath")
pytest.importorskip("netaddr")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import (
    _guard_plan,
    _membership,
    _mesh,
    _pods,
    _routes_plan,
    _wg_plan,
)

MeshError = _mesh.MeshError


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


NODES = ["a", "b", "c"]
NODE_ADDRESS = {"a": "198.18.0.1", "b": "198.18.0.2", "c": "198.18.0.3", "d": "198.18.0.4"}


def candidate(name, pod_cidrs=(), excluded=""):
    return {"name": name, "uid": "uid-" + name, "excluded": excluded, "pod_cidrs": list(pod_cidrs), "endpoints": None,
            "node_addresses": [NODE_ADDRESS[name]], "annotation_keys": {"0": key(ord(name))}}


def document(prefixes, previous=None, source="calico_ipam", excluded=()):
    members = [candidate(name, prefixes.get(name, ["10.9.0.0/24"] if name == "d" else ()), "excluded here" if name in excluded else "")
               for name in NODES + ["d"]]
    return _membership.build_document(members, {}, previous, {"complete": True, "pod_source": source})[0]


# --- merging ---------------------------------------------------------------------------------------------------------------------------

# Few enough addresses that neighbours, nestings and whole blocks are common.
ADDRESS = st.one_of(st.integers(0, 31).map(lambda n: "10.0.0.%d" % n), st.integers(0, 31).map(lambda n: "fd00::%x" % n),
                    st.integers(0, 2 ** 32 - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
                    st.integers(0, 2 ** 128 - 1).map(lambda n: str(ipaddress.IPv6Address(n))))


def covers(prefixes):
    return {address for text in prefixes for address in ipaddress.ip_network(text)}


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(ADDRESS, max_size=40))
def test_both_merges_say_the_same(addresses):
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import merged_by_netaddr
    usable = []
    for address in addresses:
        try:
            usable.append(_mesh.canonical_address(address))
        except MeshError:
            pass
    merged = _pods.merged_prefixes(usable)
    assert merged == merged_by_netaddr(usable)
    assert covers(merged) == {ipaddress.ip_address(address) for address in usable}, "these and no others"
    assert all(_mesh.canonical_cidr(text) == text for text in merged)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(
    st.integers(0, 63).flatmap(lambda n: st.sampled_from(["10.0.0.%d" % n, "10.0.0.%d/28" % (n // 16 * 16)])), max_size=20))
def test_prefixes_are_merged_alike(texts):
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import merged_by_netaddr
    assert _pods.merged_prefixes(texts) == merged_by_netaddr(texts)


def test_few_prefixes():
    assert _pods.merged_prefixes(["10.0.0.%d" % n for n in range(64, 128)]) == ["10.0.0.64/26"]
    assert _pods.merged_prefixes(["10.0.0.3", "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::"]) == ["10.0.0.1/32", "10.0.0.2/31", "fd00::/127"]


# --- pods ------------------------------------------------------------------------------------------------------------------------------

def pod(name, node, *addresses, host_network=False, phase="Running", deleting=False, started="2026-11-23T10:00:00Z"):
    metadata = {"name": name, "namespace": "default"}
    if deleting:
        metadata["deletionTimestamp"] = "2026-11-23T12:00:00Z"
    return {"metadata": metadata, "spec": {"nodeName": node, "hostNetwork": host_network},
            "status": {"phase": phase, "podIPs": [{"ip": address} for address in addresses], "startTime": started}}


def of_pods(*pods):
    return _pods.pod_prefixes(_pods.reduced_all({"Pod": list(pods)}), set(NODES), set(NODE_ADDRESS.values()))


def test_addresses_of_pods():
    prefixes, warnings = of_pods(
        pod("p1", "a", "10.1.0.4", "fd00::4"), pod("p2", "a", "10.1.0.5"), pod("p3", "b", "10.1.0.6", phase="Pending"),
        pod("host", "a", "198.18.0.1", host_network=True), pod("done", "b", "10.1.0.7", phase="Succeeded"),
        pod("failed", "b", "10.1.0.8", phase="Failed"), pod("lost", "b", "10.1.0.9", phase="Unknown"), pod("waits", "", "10.1.0.10"),
        pod("elsewhere", "unknown", "10.1.0.11"), pod("new", "a"), pod("virtual", "c", "198.18.0.3"))
    assert prefixes == {"a": ["10.1.0.4/31", "fd00::4/128"], "b": ["10.1.0.6/32", "10.1.0.9/32"]}
    assert warnings == []


def test_older_api_servers_have_one_address():
    item = pod("p", "a")
    item["status"]["podIP"] = "10.1.0.4"
    assert of_pods(item)[0] == {"a": ["10.1.0.4/32"]}


@pytest.mark.parametrize("one,other,wins", [
    (pod("p1", "a", "10.1.0.4", deleting=True), pod("p2", "b", "10.1.0.4", started="2026-11-22T00:00:00Z"), "b"),
    (pod("p1", "a", "10.1.0.4"), pod("p2", "b", "10.1.0.4", started="2026-11-24T00:00:00Z"), "b"),
    (pod("p2", "a", "10.1.0.4"), pod("p1", "b", "10.1.0.4"), "a"),
])
def test_an_address_that_goes_from_pod_to_pod(one, other, wins):
    for pods in ((one, other), (other, one)):
        prefixes, warnings = of_pods(*pods)
        assert prefixes == {wins: ["10.1.0.4/32"]}
        assert len(warnings) == 1 and "10.1.0.4" in warnings[0]


@pytest.mark.parametrize("address", ["10.1.0.999", "{{ lookup('pipe', 'id') }}", "169.254.1.1", "::1", 7, ["10.1.0.4"], "fe80::1%eth0"])
def test_an_address_that_is_none_stops_nobody(address):
    prefixes, warnings = of_pods(pod("bad", "a", address), pod("good", "b", "10.1.0.4"))
    assert prefixes == {"b": ["10.1.0.4/32"]}
    assert len(warnings) == 1 and "pod bad on node a" in warnings[0]


@pytest.mark.parametrize("item", [
    {}, {"spec": None, "status": 7}, {"metadata": [], "spec": {"nodeName": ["a"]}}, {"spec": {"nodeName": "a"}, "status": {"podIPs": "x"}},
    {"spec": {"nodeName": "a"}, "status": {"podIPs": [None, {"ip": None}, 5]}}])
def test_odd_pods(item):
    assert of_pods(item) == ({}, [])


# --- Calico ----------------------------------------------------------------------------------------------------------------------------

def affinity(cidr, node, state="confirmed", deleted="false", **more):
    return {"kind": "BlockAffinity", "metadata": {"name": "%s-%s" % (node, cidr.replace("/", "-"))},
            "spec": dict({"cidr": cidr, "node": node, "state": state, "deleted": deleted}, **more)}


def block(cidr, node, allocations, size=64, **more):
    """``allocations``: {ordinal: node, or what is in ``secondary``}."""
    attributes, places = [], [None] * size
    for ordinal, secondary in allocations.items():
        places[ordinal] = len(attributes)
        attributes.append({"handle_id": "k8s-pod-network.%d" % ordinal,
                           "secondary": {"node": secondary, "pod": "p", "namespace": "d"} if isinstance(secondary, str) else secondary})
    return {"kind": "IPAMBlock", "metadata": {"name": cidr.replace("/", "-")}, "spec": dict(
        {"cidr": cidr, "affinity": "host:" + node, "allocations": places, "attributes": attributes, "unallocated": [],
         "strictAffinity": False, "deleted": False}, **more)}


def of_calico(affinities, blocks=()):
    reduced = _pods.reduced_all({"BlockAffinity": affinities, "IPAMBlock": list(blocks)})
    return _pods.calico_prefixes(reduced, set(NODES), set(NODE_ADDRESS.values()))[0]


BLOCKS = [affinity("10.1.0.0/26", "a"), affinity("10.1.0.64/26", "b"), affinity("fd00::/122", "a")]


def test_blocks_and_borrowed_addresses():
    found = of_calico(BLOCKS, [
        block("10.1.0.0/26", "a", {0: "a", 9: "b", 10: "b", 63: "c"}), block("10.1.0.64/26", "b", {1: "b"}),
        block("fd00::/122", "a", {9: "b"})])
    assert found == {"a": ["10.1.0.0/26", "fd00::/122"], "b": ["10.1.0.9/32", "10.1.0.10/32", "10.1.0.64/26", "fd00::9/128"],
                     "c": ["10.1.0.63/32"]}


@pytest.mark.parametrize("one", [
    affinity("10.9.0.0/26", "a", state="pending"), affinity("10.9.0.0/26", "a", state="pendingDeletion"),
    affinity("10.9.0.0/26", "a", deleted="true"), affinity("10.9.0.0/26", "a", deleted=True), affinity("10.9.0.0/26", "gone"),
    affinity("10.9.0.0/26", "load-balancer", type="virtual")])
def test_affinities_that_do_not_count(one):
    assert of_calico(BLOCKS + [one]) == of_calico(BLOCKS)


def test_what_is_allocated_without_a_node():
    """Reserved on Windows, released and kept for a while, and the address of a service."""
    allocations = {0: {"note": "windows host rsvd"}, 1: None, 2: {"type": "LoadBalancer", "service": "s"}, 3: "gone"}
    assert of_calico(BLOCKS, [block("10.1.0.0/26", "a", allocations)]) == of_calico(BLOCKS)


def test_tunnel_addresses():
    """In the node's own block they are nothing of their own; in that of another they are not that one's."""
    tunnel = {"node": "a", "type": "vxlanTunnelAddress"}
    assert of_calico(BLOCKS, [block("10.1.0.0/26", "a", {0: tunnel})]) == of_calico(BLOCKS)
    assert of_calico(BLOCKS, [block("10.1.0.64/26", "b", {0: tunnel})])["a"] == ["10.1.0.0/26", "10.1.0.64/32", "fd00::/122"]


def test_blocks_of_nobody_and_of_two():
    loose = block("10.2.0.0/26", "gone", {4: "a", 5: "b"})
    for affinities in ([], [affinity("10.2.0.0/26", "gone")], [affinity("10.2.0.0/26", "a"), affinity("10.2.0.0/26", "b")]):
        assert of_calico(affinities, [loose]) == {"a": ["10.2.0.4/32"], "b": ["10.2.0.5/32"]}
    assert of_calico([], [dict(loose, spec=dict(loose["spec"], deleted=True))]) == {}


def test_a_block_of_one_address_that_is_borrowed():
    assert of_calico([affinity("10.3.0.1/32", "a")], [block("10.3.0.1/32", "a", {0: "b"}, size=1)]) == {"b": ["10.3.0.1/32"]}


@pytest.mark.parametrize("affinities,blocks,said", [
    ([affinity("10.1.0.5/26", "a")], [], "spec.cidr: '10.1.0.5/26' is not a CIDR"),
    ([affinity("10.1.0.0/26", "{{ x }}")], [], "spec.node: '{{ x }}' is not the name of a Node"),
    ([], [block("no", "a", {})], "IPAMBlock no, spec.cidr"),
    ([], [block("10.1.0.0/26", "a", {}, size=65)], "no lists that fit"),
    ([], [block("10.1.0.0/26", "a", {}, attributes=None)], "no lists that fit"),
    ([], [{}], "IPAMBlock None, spec.cidr"),
])
def test_objects_that_are_wrong(affinities, blocks, said):
    with pytest.raises(MeshError, match="nothing was changed") as caught:
        of_calico(affinities, blocks)
    assert said in str(caught.value)


# --- Cilium ----------------------------------------------------------------------------------------------------------------------------

def test_cilium_nodes():
    items = [
        {"metadata": {"name": "a"}, "spec": {"ipam": {"podCIDRs": ["10.1.0.0/24", "fd00::/64"]}, "health": {"ipv4": "10.1.0.77"},
                                             "addresses": [{"type": "InternalIP", "ip": "198.18.0.1"},
                                                           {"type": "CiliumInternalIP", "ip": "10.1.0.88"}]}},
        {"metadata": {"name": "b"}, "spec": {"ipam": {"pool": {"10.7.0.4": {"resource": "eni-1"}, "10.7.0.5": {}, "198.18.0.2": {}}}},
         "status": {"ipam": {"used": {"10.7.0.4": {"owner": "default/p"}, "10.7.0.9": {"owner": "router"}}}}},
        {"metadata": {"name": "c"}, "spec": {"ipam": {"pools": {"allocated": [{"pool": "default", "cidrs": ["10.2.0.0/27"]},
                                                                              {"pool": "mars", "cidrs": ["10.2.0.32/27"]}]}}}},
        {"metadata": {"name": "gone"}, "spec": {"ipam": {"podCIDRs": ["nonsense"]}}}, {}]
    assert _pods.cilium_prefixes(_pods.reduced_all({"CiliumNode": items}), set(NODES), set(NODE_ADDRESS.values())) == ({
        "a": ["10.1.0.0/24", "fd00::/64"], "b": ["10.7.0.4/31", "10.7.0.9/32"], "c": ["10.2.0.0/26"]}, [])
    with pytest.raises(MeshError, match="CiliumNode a: 'x' is not"):
        _pods.cilium_prefixes(_pods.reduced_all({"CiliumNode": [{"metadata": {"name": "a"}, "spec": {"ipam": {"podCIDRs": ["x"]}}}]}),
                              set(NODES), set())


# --- into candidates and documents -----------------------------------------------------------------------------------------------------

def test_candidates_get_what_the_source_has():
    candidates = [candidate("a", ["10.99.0.0/24"]), candidate("b", ["10.99.1.0/24"])]
    assert _pods.with_pod_source(candidates, "node_cidrs", {})[0] is candidates
    found, dummy = _pods.with_pod_source(candidates, "pods", {"Pod": [pod("p", "a", "10.1.0.4")]})
    assert [one["pod_cidrs"] for one in found] == [["10.1.0.4/32"], []]
    with pytest.raises(MeshError, match="the list of pods holds something else"):
        _pods.with_pod_source(candidates, "pods", {"Pod": [{"kind": "Service"}]})


def test_absurd_numbers(monkeypatch):
    monkeypatch.setattr(_pods, "PREFIXES_PER_NODE", 3)
    monkeypatch.setattr(_pods, "PREFIXES", 5)
    _pods.check_numbers("pods", {"a": [1, 2, 3], "b": [1, 2]})
    with pytest.raises(MeshError, match="node a has 4 prefixes of pods, more than 3"):
        _pods.check_numbers("pods", {"a": [1, 2, 3, 4]})
    with pytest.raises(MeshError, match="all nodes together have 6"):
        _pods.check_numbers("pods", {"a": [1, 2, 3], "b": [1, 2, 3]})


NESTED = {"a": ["10.1.0.0/26"], "b": ["10.1.0.9/32", "10.1.0.64/26"], "c": ["10.1.0.128/26"]}


def test_only_calico_borrows():
    assert _mesh.load_document(_mesh.document_bytes(document(NESTED)))["nodes"]["b"]["pod_cidrs"] == NESTED["b"]
    for source in ("node_cidrs", "pods", "cilium"):
        with pytest.raises(MeshError, match=r"overlaps node a, pod CIDR 10\.1\.0\.0/26"):
            document(NESTED, source=source)


@pytest.mark.parametrize("prefixes", [
    {"a": ["10.1.0.0/26"], "b": ["10.1.0.8/31"]}, {"a": ["10.1.0.0/26"], "b": ["10.1.0.0/26"]},
    {"a": ["10.1.0.9/32"], "b": ["10.1.0.9/32"]}, {"a": ["198.18.0.0/26"]}, {"a": ["198.18.0.2/32"]}])
def test_other_overlaps_stay_refused(prefixes):
    with pytest.raises(MeshError, match="overlaps"):
        document(prefixes)
    # A document that came from elsewhere is looked at alike.
    doc = document({name: [] for name in NODES} | {"a": ["10.5.0.0/26"]})
    for name, cidrs in prefixes.items():
        doc["nodes"][name]["pod_cidrs"] = cidrs
    with pytest.raises(MeshError, match="overlaps"):
        _mesh.validate_document(doc)


@pytest.mark.parametrize("source,stays", [("node_cidrs", True), ("pods", False)])
def test_what_a_run_without_the_host_sees(source, stays):
    """Pod CIDRs of a Node never change, so others were set by hand; pods come and go."""
    before = document({"a": ["10.1.0.4/32"]}, source=source)
    after = document({"a": ["10.1.0.5/32"]}, before, source=source)
    assert after["nodes"]["a"]["pod_cidrs"] == (["10.1.0.4/32"] if stays else ["10.1.0.5/32"])


@pytest.mark.parametrize("source", ["pods", "calico_ipam", "cilium"])
def test_an_empty_answer_takes_nothing_down(source):
    with pytest.raises(MeshError, match="correct pod_source %s" % source):
        document({"d": []}, document({"a": ["10.1.0.4/32"], "d": []}, source=source), source=source)


# --- steps -----------------------------------------------------------------------------------------------------------------------------

SETTINGS = {"interface": "wgmesh0", "table": 51840, "rule_priority": 400, "fwmark": 4096, "encrypt": "pods", "send": True,
            "unproven": "drop", "exempt_cidrs": [], "iifs": [], "own_cidrs": None}
PREFIX = "10.1.0.%d"


@functools.lru_cache(maxsize=None)
def span(text):
    network = ipaddress.ip_network(text)
    return network.version, int(network.network_address), int(network.broadcast_address), network.prefixlen


def longest(prefixes, address):
    """What the longest of ``{prefix: value}`` with the address in it has."""
    version, number, dummy, dummy = span(address)
    found = [(length, text) for text in prefixes for other, first, last, length in [span(text)]
             if other == version and first <= number <= last]
    return prefixes[max(found)[1]] if found else None


def wanted_device(doc, node):
    return {"public_key": doc["nodes"][node]["public_keys"]["0"], "private_key_file": "/k", "listen_port": 51840, "fwmark": 4096,
            "peers": _mesh.peers_of(doc, node, 0)}


def owners(doc, addresses):
    """{address: node} by the longest prefix."""
    prefixes = {cidr: name for name, entry in doc["nodes"].items() for cidr in entry["pod_cidrs"]}
    return {address: longest(prefixes, address) for address in addresses}


def way(state, address):
    """The device that the mesh's table leads an address to; None: none, the CNI's way."""
    route = longest({route["dst"]: route for route in state["routes"] if route["table"] == 51840}, address)
    return route["dev"] or None if route else None


def check_steps(old, new, node, addresses):
    """Whatever an address has before and after, it has at every step between."""
    before, after = owners(old, addresses), owners(new, addresses)
    names = {entry["public_keys"]["0"]: name for name, entry in new["nodes"].items() if entry["public_keys"]}
    state = _wg_plan.apply_steps(_wg_plan.empty_state("wgmesh0"), _wg_plan.plan_device(None, wanted_device(old, node)))
    steps = _wg_plan.plan_device(state, wanted_device(new, node))
    for step in steps:
        state = _wg_plan.apply_to_state(state, step)
        allowed = {prefix: names[peer] for peer, entry in state["peers"].items() for prefix in entry["allowed_ips"]}
        for address in addresses:
            one, other = [owner if owner != node else None for owner in (before[address], after[address])]
            # This node's own addresses may lie in what a peer is allowed: no packet with them comes from there.
            if one is not None and one == other:
                assert longest(allowed, address) == one, (step, address)
            elif None not in (one, other):
                assert longest(allowed, address) in (one, other), (step, address)
    assert _wg_plan.plan_device(state, wanted_device(new, node)) == []
    routes = _routes_plan.wanted_state(old, node, SETTINGS, None, [])
    wanted = _routes_plan.wanted_state(new, node, SETTINGS, None, [])
    plan = _routes_plan.plan_routes(routes, wanted)
    for step in [None] + plan:
        routes = _routes_plan.apply_to_state(routes, step) if step else routes
        for address in addresses:
            one, other = ["wgmesh0" if owner not in (None, node) and new["nodes"][owner]["state"] == "member" else None
                          for owner in (before[address], after[address])]
            assert way(routes, address) in (one, other), (step, address)
    assert _routes_plan.plan_routes(routes, wanted) == []


# Each with one of three nodes or nobody: neighbours and moves are common.
ADDRESSES = [PREFIX % number for number in range(16)]
PODS = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=16, max_size=16)


def merged_of(pods):
    return {name: _pods.merged_prefixes([PREFIX % number for number, owner in enumerate(pods) if owner == name]) for name in NODES}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(PODS, PODS, st.sampled_from(NODES))
def test_pods_that_come_go_and_move_open_no_gap(old, new, node):
    before = document(merged_of(old), source="pods")
    check_steps(before, document(merged_of(new), before, source="pods"), node, ADDRESSES)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(PODS, st.integers(0, 15), st.sampled_from(["a", "b", "c", None]), st.sampled_from(NODES))
def test_one_pod_that_comes_or_goes(old, number, owner, node):
    """Its neighbours lose the prefix that covered them all only after they have another one."""
    new = old[:number] + [owner] + old[number + 1:]
    before = document(merged_of(old), source="pods")
    check_steps(before, document(merged_of(new), before, source="pods"), node, ADDRESSES)


BLOCK_OWNERS = st.lists(st.sampled_from(NODES + [None]), min_size=3, max_size=3)
BORROWED = st.dictionaries(st.integers(0, 191), st.sampled_from(NODES), max_size=6)


def blocks_of(owned, borrowed):
    affinities = [affinity("10.1.0.%d/26" % (place * 64), name) for place, name in enumerate(owned) if name]
    blocks = [block("10.1.0.%d/26" % (place * 64), "x", {number - place * 64: name for number, name in borrowed.items()
                                                         if number // 64 == place}) for place in range(3)]
    return of_calico(affinities, blocks)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(BLOCK_OWNERS, BORROWED, BLOCK_OWNERS, BORROWED, st.sampled_from(NODES), st.booleans())
# A block that goes to another node, but for one address that stays where it was; and back.
@hypothesis.example(["a", None, None], {}, ["b", None, None], {9: "a"}, "c", False)
@hypothesis.example(["b", None, None], {}, ["a", None, None], {9: "b"}, "c", False)
@hypothesis.example(["a", None, None], {9: "b"}, ["b", None, None], {}, "c", False)
@hypothesis.example(["b", None, None], {9: "a"}, ["a", None, None], {}, "c", False)
# One that ends together with what the node itself borrowed from it.
@hypothesis.example(["a", "b", None], {0: "c", 9: "c", 63: "c"}, [None, "b", None], {}, "c", False)
def test_blocks_and_borrowed_addresses_that_move(owned, borrowed, owned2, borrowed2, node, excluded):
    others = {next(name for name in NODES if name != node)} if excluded else set()
    before = document(blocks_of(owned, borrowed), excluded=others)
    after = document(blocks_of(owned2, borrowed2), before, excluded=others)
    interesting = sorted(set(borrowed) | set(borrowed2) | {0, 63, 64, 100, 127, 128, 191, 192})
    # An excluded node is no peer: what lies in a peer's block but belongs to it goes the CNI's way, and WireGuard never sees it.
    kept = [PREFIX % number for number in interesting]
    if excluded:
        kept = [address for address in kept if not {owners(before, kept)[address], owners(after, kept)[address]} & others]
    check_steps(before, after, node, kept)


def test_a_borrowed_address_on_every_node():
    doc = document(NESTED)
    state = {node: _routes_plan.wanted_state(doc, node, SETTINGS, None, []) for node in NODES}
    assert way(state["c"], "10.1.0.9") == way(state["c"], "10.1.0.8") == "wgmesh0"
    assert way(state["a"], "10.1.0.9") == "wgmesh0" and way(state["a"], "10.1.0.8") is None
    # On the borrower itself it is a pod of its own: neither into the tunnel nor dropped.
    assert way(state["b"], "10.1.0.9") is None and way(state["b"], "10.1.0.8") == "wgmesh0"
    text = _routes_plan.batch_text(state["b"], "ipv4")
    assert "route replace throw 10.1.0.9/32 table 51840\n" in text
    assert _routes_plan.routes_of_batch(text, "ipv4") == state["b"]["routes"]


def test_what_ip_prints_of_an_exception():
    """As iproute2 printed them (-j -N), in both families."""
    wanted = {"type": "throw", "dev": "", "src": "", "mtu": 0, "peer": "", "table": 51840}
    assert _routes_plan.route_from_ip({"type": "9", "dst": "10.1.0.9", "flags": []}, "ipv4", 51840) == dict(
        wanted, family="ipv4", dst="10.1.0.9/32")
    assert _routes_plan.route_from_ip({"type": "9", "dst": "fd00::9", "dev": "lo", "metric": 1024, "flags": [], "pref": "medium"},
                                      "ipv6", 51840) == dict(wanted, family="ipv6", dst="fd00::9/128")


def test_nodes_without_a_tunnel_keep_what_they_borrowed():
    """Excluded and unproven ones: their address in a peer's block goes the CNI's way, as all of theirs does."""
    doc = document(NESTED, excluded=("b",))
    assert way(_routes_plan.wanted_state(doc, "c", SETTINGS, None, []), "10.1.0.9") is None
    doc = document(NESTED)
    assert way(_routes_plan.wanted_state(doc, "c", SETTINGS, {"a"}, []), "10.1.0.9") is None
    assert way(_routes_plan.wanted_state(doc, "c", SETTINGS, {"b"}, []), "10.1.0.9") == "wgmesh0"


def test_addresses_to_ask_the_kernel_for():
    routes = [{"dst": "10.1.0.0/26"}, {"dst": "10.1.0.9/32"}, {"dst": "10.2.0.0/31"}, {"dst": "10.2.0.0/32"}, {"dst": "10.2.0.1/32"}]
    assert _routes_plan.probes_of(routes, ["10.3.0.0/24"]) == {
        "10.1.0.0/26": "10.1.0.10", "10.1.0.9/32": "10.1.0.9", "10.2.0.0/31": None, "10.2.0.0/32": "10.2.0.0", "10.2.0.1/32": "10.2.0.1",
        "10.3.0.0/24": "10.3.0.9"}


GUARD = {"encrypt": "pods", "interfaces": ["wgmesh0"], "ports": None, "fwmark": 4096, "exempt_nodes": [], "exempt_cidrs": [],
         "pod_networks": [], "admin_ports": []}


def guarded(doc, node, what, address, **more):
    elements = _guard_plan.wanted_guard(doc, node, dict(GUARD, **more))["elements"][what + "4"]
    number = int(ipaddress.ip_address(address))
    return any(first <= number <= last for (dummy, first, last), dummy2 in elements)


@pytest.mark.parametrize("networks", [[], ["10.1.0.0/16"]])
def test_guard_follows_the_longest_prefix(networks):
    doc = document(NESTED)
    for node, pods, own in (("a", True, False), ("b", False, True), ("c", True, False)):
        assert guarded(doc, node, "pods", "10.1.0.9", pod_networks=networks) is pods, node
        assert guarded(doc, node, "own_pods", "10.1.0.9", pod_networks=networks) is own, node
        assert guarded(doc, node, "pods", "10.1.0.8", pod_networks=networks) is (node != "a"), node
    # A node that is exempt is so with what it borrowed, and only with that.
    assert not guarded(doc, "c", "pods", "10.1.0.9", exempt_nodes=["b"], pod_networks=networks)
    assert guarded(doc, "c", "pods", "10.1.0.8", exempt_nodes=["b"], pod_networks=networks)
    assert guarded(doc, "c", "pods", "10.1.0.9", exempt_nodes=["a"], pod_networks=networks)
    assert not guarded(document(NESTED, excluded=("b",)), "c", "pods", "10.1.0.9")
