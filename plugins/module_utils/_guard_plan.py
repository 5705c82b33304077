# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Guard: which packets of a node must be in the tunnel, as a table of nftables, and how a live table differs from it.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

The guard drops what `_routes_plan` would have put into the tunnel and what is not there: with ``pods`` everything to and from pods of other
nodes, and between pods of this node and addresses of other nodes; with ``nodes`` also what goes from node to node. Whatever names a node
is an element of a set; there is a fixed number of rules for any number of nodes. Two nodes with the same settings judge a packet between
them alike: what the one lets out, the other lets in.

An *interval* is ``(4 or 6, first address, last address)`` with addresses as numbers; an *element* of a set is an interval or, in sets of
names and ports, text. A *table* is ``{"skeleton": everything but elements and counts, "elements": {set: [element]}, "counters": {name:
{"packets", "bytes"}}}``, from what ``nft -j list table`` prints. How that prints a rule differs between versions (the code of an ICMP
error is a word in 1.0 and a number in 1.1), so a live table is never compared with what we would print but with what the same nft prints
of the wanted table: the *reference*.

Two hooks, and why these priorities (include/uapi/linux/netfilter_ipv4.h):

* ``postrouting``, 90: the destination and the device are final. Before source NAT (100), so that a pod that is about to be masqueraded is
  still seen as a pod, and WireGuard's packets have the port that WireGuard gave them, which some masquerading rules change (those with
  ``--random-fully``). After mangle (-150), where others change marks. What is dropped here never becomes a connection, so none is left
  behind with an address that suits the way outside the tunnel.
* ``prerouting``, -110: after the fragments are put together (-400), as the second has no ports; after connection tracking (-200), by which
  answers to a WireGuard port that was changed on the way out are known; before destination NAT (-100), so that the addresses and ports
  are those of the wire: behind it a request to a node port, which is traffic between nodes, would look like one to a pod, and something
  that is only forwarded to port 22 elsewhere like administration.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    PORT_MAX,
    MeshError,
    canonical_cidr,
    find_overlaps,
    is_peer,
    node_entry,
    shown,
)

TABLE = "kubemesh_guard"
COUNTERS = ("out_pods", "in_pods", "out_nodes", "in_nodes")
PRIORITY_OUT, PRIORITY_IN = 90, -110
HEADER = "# Written by kubemesh.wireguard; loaded by kubemesh-guard.service at boot. Changes made here are lost.\n"

# The line of the ruleset that says what it was made from, as JSON: who keeps it up to date later needs no other source.
SETTINGS_MARK = "# settings: "
_SETTINGS = {
    "encrypt": str, "interfaces": list, "ports": (list, type(None)), "fwmark": int, "exempt_nodes": list, "exempt_cidrs": list,
    "admin_ports": list, "pod_networks": list,
}
_ITEMS = {"ports": int, "admin_ports": int}

# Sets of addresses, each in a version of its own for IPv4 and IPv6, and what they are to people.
PREFIX_SETS = {"pods": "pods", "own_pods": "own pods", "nodes": "node", "exempt": "exempt"}
# The other sets: type of nftables, and what an element is to people.
PLAIN_SETS = {
    "links": ("ifname", "device %s"), "tunnel_ports": ("inet_service", "tunnel port %s/udp"),
    "admin_ports": ("inet_service", "administration port %s/tcp")}

# Devices: what the kernel takes as a name (dev_valid_name in net/core/dev.c) and nft as text in quotes.
_DEVICE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
_ELEMENT_LINE = re.compile(r"^\s+(\S+), # (\S+)$", re.MULTILINE)

# Names in a warning; the rest is a number.
NAMES_SHOWN = 10


# --- what is wanted ----------------------------------------------------------------------------------------------------------------------

def check_settings(settings):
    """The settings with canonical CIDRs; raises `MeshError` where something cannot be meant."""
    for field in ("exempt_cidrs", "pod_networks"):
        for text in settings[field]:
            try:
                canonical_cidr(text)
            except MeshError as exc:
                raise MeshError("%s: %s" % (field, exc)) from None
    if not settings["interfaces"]:
        raise MeshError("interfaces: without a device nothing at all could reach another node; name the mesh devices")
    for name in settings["interfaces"]:
        if not _DEVICE.fullmatch(name) or name in (".", "..", "lo"):
            raise MeshError("interfaces: %s is not the name of a mesh device; expected at most 15 letters, digits, '_', '-', '.' or '@'"
                            % shown(name))
    for field in ("ports", "admin_ports"):
        for port in settings[field] or ():
            if not 1 <= port <= PORT_MAX:
                raise MeshError("%s: %d: a port is a number from 1 to %d" % (field, port, PORT_MAX))
    if settings["ports"] == []:
        raise MeshError("ports: without a port WireGuard itself would be dropped; leave it out to take those of the mesh document")
    if not 1 <= settings["fwmark"] <= 0xFFFFFFFF:
        raise MeshError("mesh_fwmark: %d: a mark is a number from 1 to 0xffffffff" % settings["fwmark"])
    return dict(settings, **{field: [canonical_cidr(text) for text in settings[field]] for field in ("exempt_cidrs", "pod_networks")})


def _is_one(value, kind):
    """Of that type, and not a bool where it is to be a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def settings_of(text):
    """The settings that a text of `ruleset_text` was made from; `MeshError` where it does not say."""
    line = next((line for line in text.splitlines() if line.startswith(SETTINGS_MARK)), None)
    try:
        settings = json.loads(line[len(SETTINGS_MARK):]) if line else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or set(settings) != set(_SETTINGS) or not all(
            _is_one(settings[field], kind)
            and (not isinstance(settings[field], list) or all(_is_one(item, _ITEMS.get(field, str)) for item in settings[field]))
            for field, kind in _SETTINGS.items()) or settings["encrypt"] not in ("pods", "nodes"):
        raise MeshError("the file of the guard does not say what it was made from: it is another version's, or was changed; run the "
                        "playbook enable again")
    return check_settings(settings)


def wanted_guard(doc, node, settings):
    """What the guard of one node holds.

    :param doc: mesh document.
    :param settings: {"encrypt": "pods"|"nodes", "interfaces": [mesh devices], "ports": [UDP ports of WireGuard] or None for those of the
        document, "fwmark": int, "exempt_nodes": [names], "exempt_cidrs", "pod_networks": [CIDRs], "admin_ports": [TCP ports]}.
    :returns: {"encrypt", "fwmark", "elements": {set: [(element, name of the node or "")]}, "guarded": number of nodes,
        "exempt": [names in force], "warnings": [text], "settings": as given, canonical}.

    Excluded nodes cannot be in the tunnel, so what goes to them is left alone. A node that is still pending is guarded: nothing is in
    clear while it has no key.
    """
    settings = check_settings(settings)
    own = node_entry(doc, node)
    exempt = {name for name in settings["exempt_nodes"] if name in doc["nodes"]}
    if not is_peer(own) and node not in exempt:
        raise MeshError("node: %s is %s in the mesh document%s: with a guard it would be cut off from every other node; bring it into the "
                        "mesh first, or name it in exempt_nodes" % (node, own["state"], " (%s)" % own["reason"] if own["reason"] else ""))
    guarded = [] if node in exempt else [
        name for name, entry in sorted(doc["nodes"].items())
        if name != node and entry["state"] != "excluded" and name not in exempt]
    pieces = pods_of(doc)
    pods = [(piece, name) for name in guarded for piece in pieces[name]]
    if node not in exempt:
        pods += [(piece, "") for piece in rest_of_networks(doc, settings["pod_networks"], set(guarded))]
    prefixes = {
        "pods": pods,
        "own_pods": [(piece, "") for piece in pieces[node]],
        "nodes": [(interval(address), name) for name in guarded for address in doc["nodes"][name]["node_addresses"]],
        "exempt": [(interval(cidr), "") for cidr in settings["exempt_cidrs"]],
    }
    elements = {}
    for what, pairs in prefixes.items():
        for version in (4, 6):
            elements["%s%d" % (what, version)] = merged([pair for pair in pairs if pair[0][0] == version])
    ports = settings["ports"] or ports_of(doc)
    elements["links"] = [(name, "") for name in sorted({"lo"} | set(settings["interfaces"]))]
    elements["tunnel_ports"] = [(str(port), "") for port in sorted(set(ports))]
    elements["admin_ports"] = [(str(port), "") for port in sorted(set(settings["admin_ports"]))]
    return {
        "encrypt": settings["encrypt"], "fwmark": settings["fwmark"], "elements": elements, "guarded": len(guarded),
        "exempt": sorted(exempt), "warnings": warnings_of(doc, node, settings, guarded),
        "settings": {field: settings[field] for field in _SETTINGS}}


def between(current, wanted):
    """What a guard holds on its way to another, like `wanted_guard`: what the live table (or None) drops and what the wanted one does.

    So a node is guarded before anything else changes for it, and until nothing of it is left. Pods of this node that another one had are
    let go at once: there is no way out of the node to them any more.
    """
    elements = dict(wanted["elements"])
    for version in (4, 6):
        own = covered([piece for piece, dummy in wanted["elements"]["own_pods%d" % version]])
        for what in ("pods", "own_pods", "nodes"):
            name = "%s%d" % (what, version)
            held = current["elements"].get(name, ()) if current else ()
            pieces = [piece for one in held for piece in without(one, own)] if what == "pods" else held
            elements[name] = merged(wanted["elements"][name] + [(piece, "") for piece in pieces])
    return dict(wanted, elements=elements)


def loosened(current, doc, node, settings):
    """What a guard holds while what it will spare is taken out of the tunnel, like `wanted_guard`: it drops nothing that the live table
    does not drop, and nothing that either of them spares.

    :param current: the live table.
    :param doc: mesh document; one that has the nodes which are about to leave still says what is theirs.
    :param settings: those wanted, see `wanted_guard`. What was spared by the settings before is for `joint_settings`.

    What the document does not know stays as it is: an agent may have brought it in since.
    """
    encrypts = "nodes" if "leaving_nodes" in current["skeleton"]["chains"] else "pods"
    wanted = wanted_guard(doc, node, dict(settings, encrypt="pods" if "pods" in (encrypts, settings["encrypt"]) else "nodes"))
    pieces = pods_of(doc)
    spared = [name for name, entry in doc["nodes"].items() if name in wanted["exempt"] or entry["state"] == "excluded"]
    gone = covered([piece for name in spared if name != node for piece in pieces[name]])
    gone = covered(gone + [interval(address) for name in spared if name != node for address in doc["nodes"][name]["node_addresses"]])
    elements = dict(wanted["elements"])
    for name, held in current["elements"].items():
        pairs = elements.get(name)
        if pairs is None:
            continue
        what = name.rstrip("46")
        if what in ("pods", "nodes"):
            owners = dict(pairs)
            left = [] if node in wanted["exempt"] else [piece for one in held for piece in without(one, gone)]
            elements[name] = merged([(piece, owners.get(piece, "")) for piece in left])
        elif what == "own_pods":
            elements[name] = [(piece, "") for piece in held]
        elif what == "exempt":
            elements[name] = merged(pairs + [(piece, "") for piece in held])
        else:
            elements[name] = sorted(set(pairs) | {(element, "") for element in held})
    return dict(wanted, elements=elements)


def joint_settings(before, settings):
    """Settings that spare what either of two spare; ``before`` is None where nothing says what they were."""
    if before is None:
        return settings
    return dict(settings, **{
        field: list(dict.fromkeys(list(settings[field]) + list(before[field])))
        for field in ("exempt_nodes", "exempt_cidrs", "admin_ports")})


def table_of(wanted, skeleton):
    """A table as a reference would be, from a skeleton that nft printed of the same rules: sets are printed alike by all versions."""
    return {"skeleton": skeleton, "counters": {},
            "elements": {name: sorted(element for element, dummy in pairs) for name, pairs in wanted["elements"].items()}}


def pods_of(doc):
    """{node: the intervals of its pods}: its pod CIDRs without what other nodes borrowed from them, which is theirs."""
    cidrs = [(cidr, name) for name, entry in sorted(doc["nodes"].items()) for cidr in entry["pod_cidrs"]]
    borrowed = {}
    # Members overlap in this way only. Excluded nodes may have anything, and nothing of theirs is guarded.
    for (wide, owner), (narrow, dummy) in find_overlaps(
            cidrs, lambda wide, narrow: wide != narrow and doc["nodes"][wide]["state"] != "excluded", sys.maxsize):
        if wide != narrow:
            borrowed.setdefault((wide, owner), []).append(interval(narrow))
    found = {name: [] for name in doc["nodes"]}
    for cidr, name in cidrs:
        holes = covered(borrowed.get((cidr, name), ()))
        found[name] += without(interval(cidr), holes) if holes else [interval(cidr)]
    return found


def ports_of(doc):
    """The UDP ports of a mesh: both generations', and those of endpoints with a port of their own, behind which a node forwards."""
    given = [endpoint["port"] for entry in doc["nodes"].values() for endpoint in entry["endpoints"].values() if endpoint["port"]]
    return sorted(set(doc["ports"].values()) | {port + generation for port in given for generation in (0, 1)})


def warnings_of(doc, node, settings, guarded):
    """What is probably not what was meant, as text."""
    found = []
    unknown = sorted(set(settings["exempt_nodes"]) - set(doc["nodes"]))
    if unknown:
        found.append("exempt_nodes: %s %s not in the mesh document; a name must be that of the Node object" % (
            some_of(unknown), "is" if len(unknown) == 1 else "are"))
    if node in settings["exempt_nodes"]:
        found.append("exempt_nodes: names %s itself: nothing is dropped on this node" % node)
    pending = [name for name in guarded if not is_peer(doc["nodes"][name])]
    if pending:
        found.append("%s %s no key yet and no tunnel: nothing is exchanged with %s until then" % (
            some_of(pending), "has" if len(pending) == 1 else "have", "it" if len(pending) == 1 else "them"))
    exempt = [interval(cidr) for cidr in settings["exempt_cidrs"]]
    open_pods = [name for name in guarded if any(
        overlap(interval(cidr), other) for cidr in doc["nodes"][name]["pod_cidrs"] for other in exempt)]
    if open_pods:
        found.append("exempt_cidrs: %s: pods of %s lie in them, and may be reached outside the tunnel" % (
            ", ".join(settings["exempt_cidrs"]), some_of(open_pods)))
    return found


def some_of(names):
    """The first names of a list, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (" and %d more" % more if more > 0 else "")


# --- intervals ---------------------------------------------------------------------------------------------------------------------------

def interval(text):
    """The interval of an address or a CIDR without host bits."""
    # Not ip_network: 5,000 nodes have 20,000 of these, and this takes a third of the time.
    address_text, dummy, length = text.partition("/")
    address = ipaddress.ip_address(address_text)
    first = int(address)
    return address.version, first, first + (1 << (address.max_prefixlen - int(length))) - 1 if length else first


def interval_text(one):
    """An interval as nft takes it: an address, a CIDR, or ``first-last``."""
    version, first, last = one
    kind, bits = (ipaddress.IPv4Address, 32) if version == 4 else (ipaddress.IPv6Address, 128)
    if first == last:
        return str(kind(first))
    size = last - first + 1
    if size & (size - 1) == 0 and first % size == 0:
        return "%s/%d" % (kind(first), bits - size.bit_length() + 1)
    return "%s-%s" % (kind(first), kind(last))


def overlap(one, other):
    """Whether two intervals have an address in common."""
    return one[0] == other[0] and one[1] <= other[2] and other[1] <= one[2]


def merged(pairs):
    """(interval, name) pairs without overlaps, sorted: the kernel refuses elements that overlap.

    Neighbours stay apart, so that a node that joins or leaves is one element, whatever is beside it.
    """
    result = []
    for one, name in sorted(pairs):
        if result and overlap(result[-1][0], one):
            (version, first, last), other = result[-1]
            both = (version, first, max(last, one[2]))
            # Whose it is can only be said where one of them is all of it.
            owners = [owner for owner, piece in ((other, (version, first, last)), (name, one)) if owner and piece == both]
            result[-1] = (both, owners[0] if owners else "")
        else:
            result.append((one, name))
    return result


def covered(intervals):
    """Sorted intervals that cover the same addresses, with neighbours joined: two lists with the same result match the same packets."""
    result = []
    for version, first, last in sorted(intervals):
        if result and result[-1][0] == version and first <= result[-1][2] + 1:
            result[-1] = (version, result[-1][1], max(last, result[-1][2]))
        else:
            result.append((version, first, last))
    return result


def without(one, holes):
    """The pieces of an interval that remain without holes, sorted and disjoint ones."""
    version, first, last = one
    pieces = []
    for hole_version, hole_first, hole_last in holes:
        if hole_version == version and first <= hole_last and hole_first <= last:
            if first < hole_first:
                pieces.append((version, first, hole_first - 1))
            first = hole_last + 1
    if first <= last:
        pieces.append((version, first, last))
    return pieces


def rest_of_networks(doc, networks, guarded):
    """Intervals of the cluster's pod networks without what is not guarded: the pods of every other node, and all nodes themselves.

    So a node that joins is guarded before it is in any document.
    """
    holes = []
    for name, entry in doc["nodes"].items():
        holes += [interval(address) for address in entry["node_addresses"]]
        if name not in guarded:
            holes += [interval(cidr) for cidr in entry["pod_cidrs"]]
    holes = covered(holes)
    return [piece for one in covered([interval(cidr) for cidr in networks]) for piece in without(one, holes)]


# --- as text for nft ---------------------------------------------------------------------------------------------------------------------

def ruleset_text(wanted, counters=None):
    """The whole table as one transaction of ``nft -f``: whatever has its name goes in the same instant.

    ``counters``: what the counters begin with, {name: {"packets", "bytes"}}.
    """
    lines = [SETTINGS_MARK + json.dumps(wanted["settings"], sort_keys=True), "table inet %s {}" % TABLE, "delete table inet %s" % TABLE,
             "table inet %s {" % TABLE]
    for name in COUNTERS:
        counts = (counters or {}).get(name) or {"packets": 0, "bytes": 0}
        lines.append("\tcounter %s { packets %d bytes %d }" % (name, counts["packets"], counts["bytes"]))
    for name in PLAIN_SETS:
        lines += set_lines(name, PLAIN_SETS[name][0], False, wanted["elements"][name])
    for what in PREFIX_SETS:
        for version in (4, 6):
            name = "%s%d" % (what, version)
            lines += set_lines(name, "ipv%d_addr" % version, True, wanted["elements"][name])
    return HEADER + "\n".join(lines) + "\n" + rules_text(wanted) + "}\n"


def rules_text(wanted):
    """The chains of the table, as they stand in `ruleset_text`."""
    lines = []
    for name, rules in chains(wanted):
        lines.append("\tchain %s {" % name)
        lines += ["\t\t" + rule for rule in rules]
        lines.append("\t}")
    return "".join(line + "\n" for line in lines)


def set_lines(name, kind, intervals, pairs):
    """The definition of a set, an element to a line with its node as a comment."""
    lines = ["\tset %s {" % name, "\t\ttype %s" % kind]
    if intervals:
        lines.append("\t\tflags interval")
    if pairs:
        lines.append("\t\telements = {")
        lines += ["\t\t\t%s,%s" % (quoted(name, element), " # %s" % node if node else "") for element, node in pairs]
        lines.append("\t\t}")
    return lines + ["\t}"]


def quoted(name, element):
    """An element as nft takes it in its set."""
    if name == "links":
        return '"%s"' % element
    return element if name in PLAIN_SETS else interval_text(element)


def chains(wanted):
    """(name, lines) of the chains; those that are jumped to come first."""
    nodes = wanted["encrypt"] == "nodes"
    result = []
    if nodes:
        result += [("spared", spared_rules([port for port, dummy in wanted["elements"]["tunnel_ports"]])),
                   ("leaving_nodes", leaving_nodes_rules(wanted["fwmark"])), ("arriving_nodes", arriving_nodes_rules())]
    for name, hook, priority, device, near, far, counter in (
            ("leaving", "postrouting", PRIORITY_OUT, "oifname", "saddr", "daddr", "out_pods"),
            ("arriving", "prerouting", PRIORITY_IN, "iifname", "daddr", "saddr", "in_pods")):
        rules = ["type filter hook %s priority %d; policy accept;" % (hook, priority), "%s @links accept" % device]
        families = (("ip", 4), ("ip6", 6))
        rules += ["%s %s @exempt%d accept" % (family, end, version) for end in (far, near) for family, version in families]
        rules += ["%s %s @pods%d counter name %s drop" % (family, far, version, counter) for family, version in families]
        rules += ["%s %s @own_pods%d %s %s @nodes%d counter name %s drop" % (family, near, version, family, far, version, counter)
                  for family, version in families]
        if nodes:
            rules += ["%s %s @nodes%d jump %s_nodes" % (family, far, version, name) for family, version in families]
        result.append((name, rules))
    return result


def spared_rules(ports):
    """What may pass between nodes outside the tunnel, in either direction.

    Neighbour discovery must work before there is a tunnel. A node on the way of the tunnel's packets, such as a hypervisor, says when they
    are too big for the next link, and must be heard. Only errors about packets of WireGuard are let through: an error quotes the packet
    that it is about, up to 1,232 bytes of it (RFC 4443, section 2.4), and of any other packet that would be in clear.
    """
    def quotes_tunnel(icmp, protocol, port):
        # Bits from the beginning of the ICMP header; the quoted packet begins behind 8 bytes. WireGuard's have no options and no
        # extension headers.
        return "%s @th,%d,8 17 @th,%d,16 { %s } accept" % (icmp, protocol * 8, port * 8, ", ".join(ports))

    rules = ["icmpv6 type 133-137 ip6 hoplimit 255 accept", "tcp dport @admin_ports accept", "tcp sport @admin_ports accept"]
    for icmp, protocol, header in (("icmp type 3 icmp code 4", 8 + 9, 8 + 20), ("icmpv6 type 2", 8 + 6, 8 + 40)):
        rules += [quotes_tunnel(icmp, protocol, header), quotes_tunnel(icmp, protocol, header + 2)]
    return rules


def leaving_nodes_rules(fwmark):
    """What may leave for another node: the tunnel itself, that is, what WireGuard marked, and what another member sends through here.

    The preflight marks its packets alike, to measure the way that the tunnel takes; its questions go to the ports of WireGuard.
    """
    marked = "meta mark & 0x%x == 0x%x" % (fwmark, fwmark)
    return [
        marked + " udp sport @tunnel_ports accept",
        marked + " udp dport @tunnel_ports accept",
        # Not ours and without the mark: this node routes or bridges for others.
        "ip saddr @nodes4 udp dport @tunnel_ports accept",
        "ip6 saddr @nodes6 udp dport @tunnel_ports accept",
        "jump spared",
        "counter name out_nodes drop",
    ]


def arriving_nodes_rules():
    """What may come in from another node."""
    return [
        "udp dport @tunnel_ports accept",
        # The port of our own packets may be changed on the way out; then answers come to another one. Those to the preflight do too. To
        # look at connections also makes the kernel put fragments together where nobody else asks for it.
        "meta l4proto udp ct direction reply ct original proto-src @tunnel_ports accept",
        "meta l4proto udp ct direction reply ct original proto-dst @tunnel_ports accept",
        # There is no tunnel to many, and nobody steers it: elections of a virtual address (VRRP) and the like go on.
        "ip daddr { 224.0.0.0/4, 255.255.255.255 } accept",
        "ip6 daddr ff00::/8 accept",
        "jump spared",
        "counter name in_nodes drop",
    ]


def names_in(text):
    """{element as text: node} of a file made by `ruleset_text`: who was behind an element that is wanted no more."""
    return dict(_ELEMENT_LINE.findall(text))


def elements_text(steps):
    """Changes of elements as one transaction of ``nft -f``; what goes first, as the kernel refuses overlaps."""
    lines = []
    for verb, field in (("delete", "remove"), ("add", "add")):
        for step in steps:
            if step[field]:
                lines.append("%s element inet %s %s { %s }" % (
                    verb, TABLE, step["set"], ", ".join(quoted(step["set"], element) for element in step[field])))
    return "".join(line + "\n" for line in lines)


# --- what `nft -j list table` prints -----------------------------------------------------------------------------------------------------

# Which number the kernel gave to something says nothing about it.
_VOLATILE = ("family", "table", "handle", "index", "position")


def table_from_nft(text):
    """A table from the JSON of ``nft -j list table``; raises ValueError where that is none."""
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("nftables"), list):
        raise ValueError("no list of objects")
    skeleton = _empty_skeleton()
    elements, counters = {}, {}
    for item in data["nftables"]:
        kind, value = next(iter(item.items()))
        rest = {field: value[field] for field in value if field not in _VOLATILE}
        if kind == "table":
            skeleton["table"] = rest
        elif kind == "chain":
            skeleton["chains"][rest.pop("name")] = rest
        elif kind == "rule":
            skeleton["rules"].setdefault(rest.pop("chain"), []).append(rest)
        elif kind == "counter":
            counters[rest["name"]] = {field: int(rest[field]) for field in ("packets", "bytes")}
            skeleton["counters"] = sorted(counters)
        elif kind == "set":
            name = rest.pop("name")
            found = [(element_from_nft(rest.get("type"), element), element) for element in rest.pop("elem", None) or []]
            elements[name] = sorted(known for known, dummy in found if known is not None)
            strange = [json.dumps(element, sort_keys=True) for known, element in found if known is None]
            skeleton["sets"][name] = dict(rest, strange=strange) if strange else rest
        elif kind != "metainfo":
            skeleton["others"].append(json.dumps({kind: rest}, sort_keys=True))
    return {"skeleton": skeleton, "elements": elements, "counters": counters}


def element_from_nft(kind, element):
    """An element of a set as nft prints it: a bare value, a prefix, a range, or one of these with attributes that somebody gave it.

    None for what we never put into a set, such as "*" or a concatenation.
    """
    if isinstance(element, dict) and isinstance(element.get("elem"), dict):
        element = element["elem"].get("val")
    try:
        if kind not in ("ipv4_addr", "ipv6_addr"):
            return str(element) if isinstance(element, (str, int)) else None
        if not isinstance(element, dict):
            return interval(element)
        if "range" in element:
            first, last = (ipaddress.ip_address(text) for text in element["range"])
            return first.version, int(first), int(last)
        return interval("%s/%d" % (element["prefix"]["addr"], element["prefix"]["len"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def unreadable_table(reason):
    """A live table of which nft prints no JSON: versions up to 1.0.6 print whatever is in memory as the flags of a table that has some."""
    return {"skeleton": dict(_empty_skeleton(), others=[reason]), "elements": {}, "counters": {}}


def _empty_skeleton():
    return {"table": {}, "chains": {}, "sets": {}, "counters": [], "rules": {}, "others": []}


# --- from one to the other ---------------------------------------------------------------------------------------------------------------

def plan_guard(current, reference):
    """Steps from a live table (None: there is none) to the reference (None: none is wanted).

    Steps: {"op": "load_table", "reason"}, {"op": "change_elements", "set", "add": [element], "remove": [element]}, {"op": "remove_table"}.
    Where only elements differ, only these change, and the counters go on counting.
    """
    if reference is None:
        return [] if current is None else [{"op": "remove_table"}]
    if current is None:
        return [{"op": "load_table", "reason": "it is not there"}]
    if current["skeleton"] != reference["skeleton"]:
        return [{"op": "load_table", "reason": "its rules are not the wanted ones"}]
    steps = []
    for name in sorted(reference["elements"]):
        have, want = current["elements"][name], reference["elements"][name]
        same = set(have) == set(want) if name in PLAIN_SETS else covered(have) == covered(want)
        if not same:
            steps.append({"op": "change_elements", "set": name, "add": sorted(set(want) - set(have)),
                          "remove": sorted(set(have) - set(want))})
    return steps


def counts_of(current):
    """{counter: {"packets", "bytes"}} of a live table or None, all of them."""
    found = current["counters"] if current else {}
    return {name: dict(found.get(name) or {"packets": 0, "bytes": 0}) for name in COUNTERS}


# --- as text for people ------------------------------------------------------------------------------------------------------------------

def element_words(name, element, names):
    """One element of a set for people."""
    if name in PLAIN_SETS:
        return PLAIN_SETS[name][1] % element
    if name[:-1] not in PREFIX_SETS or isinstance(element, str):
        return "%s %s" % (name, element)
    text = interval_text(element)
    return "%s %s%s" % (PREFIX_SETS[name[:-1]], text, "  # %s" % names[text] if text in names else "")


def describe(step, names):
    """One step as lines for people; ``names``: {element as text: node}."""
    if step["op"] == "load_table":
        return ["load table %s: %s" % (TABLE, step["reason"])]
    if step["op"] == "remove_table":
        return ["remove table %s" % TABLE]
    return ["%s %s" % (verb, element_words(step["set"], element, names)) for verb in ("remove", "add") for element in step[verb]]


def table_as_text(table, names):
    """A table as stable text for diff mode: a line for each element and rule."""
    if table is None:
        return ""
    lines = []
    for name in sorted(table["elements"]):
        lines += [element_words(name, element, names) for element in sorted(table["elements"][name])]
    skeleton = table["skeleton"]
    for name in sorted(skeleton["chains"]):
        chain = skeleton["chains"][name]
        hook = ": hook %s, priority %s, policy %s" % (chain["hook"], chain.get("prio"), chain.get("policy")) if "hook" in chain else ""
        lines.append("chain %s%s" % (name, hook))
        lines += ["rule %s: %s" % (name, rule_words(rule)) for rule in skeleton["rules"].get(name, [])]
    if "flags" in skeleton["table"]:
        lines.append("table flags %s" % json.dumps(skeleton["table"]["flags"]))
    return "".join(line + "\n" for line in lines + skeleton["others"])


def rule_words(rule):
    """A rule much as nft writes it."""
    comment = ' comment "%s"' % rule["comment"] if "comment" in rule else ""
    return " ".join(_words(statement) for statement in rule.get("expr", [])) + comment


def _words(value):
    if not isinstance(value, dict) or len(value) != 1:
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    kind, inner = next(iter(value.items()))
    if inner is None:
        return kind
    if kind == "match":
        operation = {"==": "", "in": ""}.get(inner["op"], inner["op"] + " ")
        return "%s %s%s" % (_words(inner["left"]), operation, _words(inner["right"]))
    if kind == "payload":
        return "%s %s" % (inner["protocol"], inner["field"]) if "field" in inner else "@%(base)s,%(offset)s,%(len)s" % inner
    if kind in ("meta", "ct"):
        return " ".join([kind] + [inner[field] for field in ("dir", "key") if field in inner])
    if kind == "prefix":
        return "%s/%s" % (inner["addr"], inner["len"])
    if kind in ("set", "range", "&"):
        joined = {"set": ", ", "range": "-", "&": " & "}[kind].join(_words(item) for item in inner)
        return "{ %s }" % joined if kind == "set" else joined
    if kind in ("jump", "goto"):
        return "%s %s" % (kind, inner["target"])
    return "%s %s" % (kind, inner if isinstance(inner, str) else json.dumps(inner, sort_keys=True))
