# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Which addresses of pods are behind which node, where the Node objects do not say it: from Pods, Calico's IPAM or CiliumNodes.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

*Objects* are parsed objects of the API by kind, ``{"Pod": [...]}``: data, never trusted. *Found* is what is kept of them, ``{"Pod":
[result of `REDUCERS`]}``: some hundred bytes of each instead of ten thousand. *Prefixes* are ``{node name: [canonical CIDR]}``. A prefix
covers addresses of its node only, save those that a narrower prefix of another node takes out of it (see `calico_prefixes`).
"""

from __future__ import annotations

import collections
import ipaddress
import sys

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    canonical_address,
    canonical_cidr,
    check_node_name,
    host_cidr,
    joined_error,
    shown,
    some_of,
    sorted_cidrs,
)

NODE_CIDRS = "node_cidrs"
SOURCES = (NODE_CIDRS, "pods", "calico_ipam", "cilium")

# What the API calls them: ``group`` is empty for Kubernetes' own, ``selector`` a field selector that leaves out what has no address.
Resource = collections.namedtuple("Resource", "kind plural group path selector owner")
NODES = Resource("Node", "nodes", "", "/api/v1/nodes", "", "Kubernetes")
RESOURCES = {
    NODE_CIDRS: (),
    "pods": (Resource("Pod", "pods", "", "/api/v1/pods", "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed", "Kubernetes"),),
    "calico_ipam": (
        Resource("BlockAffinity", "blockaffinities", "crd.projectcalico.org", "/apis/crd.projectcalico.org/v1/blockaffinities", "",
                 "Calico"),
        Resource("IPAMBlock", "ipamblocks", "crd.projectcalico.org", "/apis/crd.projectcalico.org/v1/ipamblocks", "", "Calico")),
    "cilium": (Resource("CiliumNode", "ciliumnodes", "cilium.io", "/apis/cilium.io/v2/ciliumnodes", "", "Cilium"),),
}

# Kubernetes itself is tested with 110 pods on a node and 150,000 in a cluster (https://kubernetes.io/docs/setup/best-practices/cluster-large);
# clouds give a node up to some 700 addresses, OpenShift 2,500. Every prefix is an allowed IP and a route on every other node.
PREFIXES_PER_NODE = 4096
PREFIXES = 300000  # 150,000 pods in two families, none of them neighbours
NAMES_SHOWN = 5

# These are done: their addresses may be those of other pods by now. Pending ones have an address as soon as their sandbox runs.
_DONE = ("Succeeded", "Failed")


def kubectl_name(resource):
    """What kubectl is told: with the group, so that no other resource of the same name is meant."""
    return resource.plural + ("." + resource.group if resource.group else "")


def merged_prefixes(texts):
    """The fewest prefixes that cover exactly the addresses and CIDRs given: canonical text, IPv4 first, by number."""
    networks = [ipaddress.ip_network(text) for text in texts]
    return [str(network) for version in (4, 6)
            for network in ipaddress.collapse_addresses(network for network in networks if network.version == version)]


def _dict(value):
    return value if isinstance(value, dict) else {}


def _list(value):
    return value if isinstance(value, list) else []


def _named(item, kind):
    """``metadata.name`` for messages."""
    name = _dict(_dict(item).get("metadata")).get("name")
    return "%s %s" % (kind, name if isinstance(name, str) and name.isprintable() and name.isascii() and len(name) <= 253 else shown(name))


def _known_node(value, nodes):
    """The node name itself, None where it is none of ``nodes``: it left, or joined since the Nodes were read."""
    return value if isinstance(value, str) and value in nodes else None


# --- pods ----------------------------------------------------------------------------------------------------------------------------

def _pod_addresses(status):
    listed = [_dict(entry).get("ip") for entry in _list(status.get("podIPs"))]
    return [text for text in listed or [status.get("podIP")] if text not in (None, "")]


# ``claim``: how good the pod's claim to its addresses is. The network gives an address to the next pod when the sandbox of the last one is
# gone, and that one's object may still be there: then the one that is not being deleted counts, then the younger one.
Pod = collections.namedtuple("Pod", "node values claim problems")


def reduce_pod(item):
    """`Pod` of an object; None for one without addresses of its own: pods of the host's network, and those that are done."""
    metadata, spec, status = (_dict(item.get(field)) for field in ("metadata", "spec", "status"))
    node, started = spec.get("nodeName"), status.get("startTime")
    if not isinstance(node, str) or spec.get("hostNetwork") or status.get("phase") in _DONE:
        return None
    addresses, problems, label = [], [], _named(item, "pod")
    for text in _pod_addresses(status):
        try:
            addresses.append(canonical_address(text))
        except MeshError as exc:
            problems.append("%s on node %s: %s" % (label, node, exc))
    if not addresses and not problems:
        return None
    claim = (not metadata.get("deletionTimestamp"), started if isinstance(started, str) else "", label)
    return Pod(sys.intern(node), tuple(addresses), claim, tuple(problems))


def pod_prefixes(found, nodes, node_addresses, merge=merged_prefixes):
    """``(prefixes, warnings)`` of Pods: the addresses of each node's pods, merged.

    ``nodes``: names of the cluster's nodes; ``node_addresses``: canonical addresses of all of them.
    """
    owners, claims, warnings, unreadable, contested = {}, {}, [], [], []
    for pod in found["Pod"]:
        node = _known_node(pod.node, nodes)
        if node is None:
            continue
        # One node's kubelet must not stop the mesh of all others.
        unreadable += pod.problems
        for address in pod.values:
            # Some virtual nodes have the address of their only pod.
            if address in node_addresses:
                continue
            if owners.get(address, node) != node:
                contested.append("%s (nodes %s and %s)" % (address, owners[address], node))
            if address not in owners or pod.claim > claims[address]:
                owners[address], claims[address] = node, pod.claim
    if unreadable:
        warnings.append("%s; left out" % some_of(unreadable, NAMES_SHOWN))
    if contested:
        warnings.append("two pods have one address: %s; the one that is not being deleted, or else the younger one, is believed"
                        % some_of(contested, NAMES_SHOWN))
    by_node = {}
    for address, node in owners.items():
        by_node.setdefault(node, []).append(address)
    return {node: merge(addresses) for node, addresses in by_node.items()}, warnings


# --- Calico --------------------------------------------------------------------------------------------------------------------------

def _cidr(spec, where, problems):
    try:
        return canonical_cidr(spec.get("cidr"))
    except MeshError as exc:
        problems.append("%s, spec.cidr: %s; repair it with calicoctl ipam check" % (where, exc))
        return None


Affinity = collections.namedtuple("Affinity", "node values problems")
# ``allocated``: ((node, (ordinals in the block)), ...)
Block = collections.namedtuple("Block", "values allocated problems")


def reduce_affinity(item):
    """`Affinity` of a BlockAffinity with its block as the only value; None for one that does not count."""
    spec, problems = _dict(item.get("spec")), []
    # Blocks of services have a type of their own ("virtual"); `deleted` is text for the sake of older versions.
    if spec.get("state") != "confirmed" or spec.get("deleted") in (True, "true") or spec.get("type") not in (None, "", "host"):
        return None
    where, node = _named(item, "BlockAffinity"), None
    cidr = _cidr(spec, where, problems)
    try:
        node = sys.intern(check_node_name(spec.get("node")))
    except MeshError as exc:
        problems.append("%s, spec.node: %s; repair it with calicoctl ipam check" % (where, exc))
    return Affinity(node, () if cidr is None or node is None else (cidr,), tuple(problems))


def _block_owners(affinities, problems):
    """``{block: node}`` of the affinities, whether or not the node still is one; blocks that two nodes claim are not in it."""
    claimed = {}
    for affinity in affinities:
        problems += affinity.problems
        for cidr in affinity.values:
            claimed.setdefault(cidr, set()).add(affinity.node)
    return {cidr: nodes.pop() for cidr, nodes in claimed.items() if len(nodes) == 1}


def reduce_block(item):
    """`Block` of an IPAMBlock with its CIDR as the only value; None for one that is deleted."""
    spec, problems, by_node = _dict(item.get("spec")), [], {}
    if spec.get("deleted") in (True, "true"):
        return None
    cidr = _cidr(spec, _named(item, "IPAMBlock"), problems)
    if cidr is None:
        return Block((), (), tuple(problems))
    for ordinal, node in _allocated(item, spec, cidr, problems):
        by_node.setdefault(sys.intern(node), []).append(ordinal)
    return Block((cidr,), tuple((node, tuple(ordinals)) for node, ordinals in by_node.items()), tuple(problems))


def _allocated(item, spec, cidr, problems):
    """``(ordinal, node)`` of what is allocated in a block and has a node.

    ``allocations`` has an entry for each address of the block: null, or the place of what is known of it in ``attributes``. What has no
    node is reserved for Windows, released a moment ago, or the address of a service.
    """
    network = ipaddress.ip_network(cidr)
    allocations, attributes = spec.get("allocations"), spec.get("attributes")
    if not isinstance(allocations, list) or not isinstance(attributes, list) or len(allocations) > network.num_addresses:
        problems.append("%s: spec.allocations and spec.attributes are no lists that fit to block %s; repair it with calicoctl ipam check"
                        % (_named(item, "IPAMBlock"), cidr))
        return
    for ordinal, place in enumerate(allocations):
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(attributes):
            continue
        node = _dict(_dict(attributes[place]).get("secondary")).get("node")
        if isinstance(node, str):
            yield ordinal, node


def calico_prefixes(found, nodes, node_addresses, merge=merged_prefixes):
    """``(prefixes, warnings)`` of Calico's IPAM: the blocks of each node, and what it borrows from others' as a /32 or /128.

    An address that is borrowed lies in the block of another node and is more specific than that, for routes as for WireGuard, so it is
    never merged. An address in a block that belongs to nobody is treated alike. That of a node's own tunnel device (``vxlanTunnelAddress``
    and the like) is no pod's, but where it lies in the block of another node it is taken out of that as well: it is not that node's.
    """
    problems, prefixes = [], {}
    owners = _block_owners(found["BlockAffinity"], problems)
    borrowed = {}
    for block in found["IPAMBlock"]:
        problems += block.problems
        for cidr in block.values:
            first = ipaddress.ip_network(cidr).network_address
            for node, ordinals in block.allocated:
                if node == owners.get(cidr) or node not in nodes:
                    continue
                for address in (str(first + ordinal) for ordinal in ordinals):
                    if address not in node_addresses:
                        borrowed[host_cidr(address)] = node
    if problems:
        raise joined_error("Calico's IPAM objects cannot be used, nothing was changed", problems)
    for cidr, node in owners.items():
        # A block of one address that another node borrowed has nothing left.
        if node in nodes and cidr not in borrowed:
            prefixes.setdefault(node, []).append(cidr)
    for cidr, node in borrowed.items():
        prefixes.setdefault(node, []).append(cidr)
    return {node: sorted_cidrs(cidrs) for node, cidrs in prefixes.items()}, []


# --- Cilium --------------------------------------------------------------------------------------------------------------------------

def _cilium_texts(item):
    """``(CIDRs, addresses)`` of a CiliumNode as they are written there."""
    spec, status = _dict(item.get("spec")), _dict(item.get("status"))
    ipam = _dict(spec.get("ipam"))
    cidrs = list(_list(ipam.get("podCIDRs")))
    for pool in _list(_dict(ipam.get("pools")).get("allocated")):
        cidrs += _list(_dict(pool).get("cidrs"))
    # All that the node may give to pods, used or not: peers accept it before it is used.
    addresses = list(_dict(ipam.get("pool"))) + list(_dict(_dict(status.get("ipam")).get("used")))
    # The node's own ends in the pods' network: of the router, of the health checks.
    addresses += [_dict(entry).get("ip") for entry in _list(spec.get("addresses")) if _dict(entry).get("type") == "CiliumInternalIP"]
    addresses += [value for field, value in sorted(_dict(spec.get("health")).items()) if field in ("ipv4", "ipv6") and value]
    return cidrs, addresses


CiliumNode = collections.namedtuple("CiliumNode", "node values problems")


def reduce_cilium_node(item):
    """`CiliumNode` of an object; None for one without a name."""
    node = _dict(item.get("metadata")).get("name")
    if not isinstance(node, str):
        return None
    texts, problems = [], []
    cidrs, addresses = _cilium_texts(item)
    for values, function in ((cidrs, canonical_cidr), (addresses, canonical_address)):
        for value in values:
            try:
                texts.append(function(value))
            except MeshError as exc:
                problems.append("%s: %s; see what the Cilium operator says of it" % (_named(item, "CiliumNode"), exc))
    return CiliumNode(sys.intern(node), tuple(texts), tuple(problems))


def cilium_prefixes(found, nodes, node_addresses, merge=merged_prefixes):
    """``(prefixes, warnings)`` of CiliumNodes: pod CIDRs and CIDRs of pools, and with a cloud's IPAM the addresses of its devices."""
    problems, prefixes = [], {}
    for one in found["CiliumNode"]:
        if _known_node(one.node, nodes) is None:
            continue
        problems += one.problems
        texts = [text for text in one.values if text not in node_addresses]
        if texts:
            prefixes[one.node] = merge(texts)
    if problems:
        raise joined_error("the CiliumNode objects cannot be used, nothing was changed", problems)
    return prefixes, []


# --- all of them ---------------------------------------------------------------------------------------------------------------------

REDUCERS = {"Pod": reduce_pod, "BlockAffinity": reduce_affinity, "IPAMBlock": reduce_block, "CiliumNode": reduce_cilium_node}
_READERS = {"pods": pod_prefixes, "calico_ipam": calico_prefixes, "cilium": cilium_prefixes}


def reduced_all(objects):
    """*Found* of parsed objects by kind."""
    return {kind: [one for one in map(REDUCERS[kind], items) if one is not None] for kind, items in objects.items()}


def with_pod_source(candidates, source, objects, merge=merged_prefixes):
    """``(candidates, warnings)``: candidates of `_membership` with the pod CIDRs that a source has for them.

    ``source``: one of `SOURCES`; ``objects``: lists of parsed objects by kind, all of those in `RESOURCES`. Raises `MeshError` for objects
    that cannot be what they should be and for absurd numbers.
    """
    if source == NODE_CIDRS:
        return candidates, []
    kinds = {}
    for resource in RESOURCES[source]:
        kinds[resource.kind] = objects[resource.kind]
        wrong = [item for item in objects[resource.kind] if not isinstance(item, dict) or item.get("kind") not in (None, resource.kind)]
        if wrong:
            raise MeshError("pod_source %s: the list of %s holds something else: %s" % (source, resource.plural, shown(wrong[0])))
    return with_found(candidates, source, reduced_all(kinds), merge)


def with_found(candidates, source, found, merge=merged_prefixes):
    """`with_pod_source` for objects that were reduced."""
    nodes = {candidate["name"] for candidate in candidates}
    node_addresses = {address for candidate in candidates for address in candidate["node_addresses"]}
    prefixes, warnings = _READERS[source](found, nodes, node_addresses, merge)
    check_numbers(source, prefixes)
    return [dict(candidate, pod_cidrs=prefixes.get(candidate["name"], [])) for candidate in candidates], warnings


def check_numbers(source, prefixes):
    """`MeshError` where there are more prefixes than a cluster can have."""
    problems = ["node %s has %d prefixes of pods, more than %d" % (node, len(cidrs), PREFIXES_PER_NODE)
                for node, cidrs in sorted(prefixes.items()) if len(cidrs) > PREFIXES_PER_NODE]
    total = sum(map(len, prefixes.values()))
    if total > PREFIXES:
        problems.append("all nodes together have %d prefixes of pods, more than %d" % (total, PREFIXES))
    if problems:
        raise joined_error("pod_source %s: these are no numbers of a cluster that works; look at what is listed there" % source, problems)
