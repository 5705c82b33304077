# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Send: what goes into the mesh's routing tables and policy rules, and in which order.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

A *route* is ``{"family", "table": int, "dst": CIDR text, "dev": device or "", "type": "unicast"|"unreachable"|"throw", "src": address
or "", "mtu": bytes or 0, "peer": node name or ""}``; its identity is (table, dst). A *rule* is ``{"family", "priority": int, "table": int,
"from": CIDR text or "", "iif": incoming device or "", "not_fwmark": mark or 0}``; all of it is its identity. A *state* is ``{"routes":
[...], "rules": [...]}``.

A table is complete before a rule points to it, and is emptied only after no rule does: so every prefix of a plan is safe, and what
moves the traffic of a node is one rule (invariant I1).
"""

from __future__ import annotations

import ipaddress
import sys

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    family_of,
    find_overlaps,
    local_pod_cidrs,
    mesh_mtu,
    primary_addresses,
    shown,
    table_routes,
)

# The order of the rules from the first priority on: pods' prefixes for everyone, node addresses for what comes from local pods,
# node addresses for everyone (host encryption).
PRIORITY_PODS, PRIORITY_FROM_PODS, PRIORITY_NODES = 0, 1, 2
# Those that look at where packets come from. The kernel takes what a request leaves out for "any", and would delete another rule than was
# meant or refuse one that is new: so of each priority and table there is one kind of rule. No destination is in both tables.
PRIORITY_PODS_IIF, PRIORITY_PODS_FROM_PODS, PRIORITY_NODES_IIF = 1, 2, 0
PRIORITIES = 3


def wanted_state(doc, node, settings, proven, present):
    """The tables and rules of one node.

    :param doc: mesh document.
    :param settings: {"interface": device name, "table": int, "rule_priority": int, "fwmark": int, "encrypt": "pods"|"nodes",
        "send": bool: whether the rules are wanted, "unproven": "keep"|"drop", "exempt_cidrs": [CIDRs: node addresses that stay outside],
        "iifs", "own_cidrs": see `wanted_rules`}.
    :param proven: set of peer names that were reached through the tunnel, or None for every peer.
    :param present: the routes that are there now with their peers (from the file that restores them), for "keep": a peer that is not
        proven keeps the routes it has, because it may only be away (invariant I4).
    :returns: state as above, sorted.
    """
    sources = primary_addresses(doc, node)
    own_mtu = mesh_mtu(doc, node)
    kept = {}
    if settings["unproven"] == "keep":
        kept = {(route["table"], route["dst"], route["peer"]): route["dev"] for route in present}
    exempt = [ipaddress.ip_network(cidr) for cidr in settings["exempt_cidrs"]]
    routes = []
    families = families_of(doc, node)
    tables = table_routes(doc, node)
    for table, entries in ((settings["table"], tables["pods"]), (settings["table"] + 1, tables["nodes"])):
        for dst, peer in entries:
            unproven = proven is not None and peer not in proven
            if unproven and (table, dst, peer) not in kept:
                continue
            if table != settings["table"] and is_inside(dst, exempt):
                continue
            family = family_of(dst)
            # No rule leads there, and a node without IPv6 may not be able to have such routes at all.
            if family not in families:
                continue
            peer_mtu = doc["nodes"][peer]["mtu"]
            routes.append({
                "family": family,
                "table": table,
                "dst": dst,
                # While keys are rotated, that of the other generation: it worked, and this one is not known to.
                "dev": kept[table, dst, peer] if unproven else settings["interface"],
                "type": "unicast",
                # The address that the host had towards this peer before, so that connections and policies go on.
                "src": sources.get(family) or "",
                # The device's MTU suits this node; a peer behind a narrower path needs its own.
                "mtu": peer_mtu if peer_mtu and own_mtu and peer_mtu < own_mtu else 0,
                "peer": peer,
            })
    routes += exceptions(doc, settings["table"], [route for route in routes if route["table"] == settings["table"]])
    return {"routes": sorted(routes, key=route_order), "rules": wanted_rules(doc, node, settings) if settings["send"] else []}


def exceptions(doc, table, routes):
    """Routes that lead out of the table what must not follow the wider route around it.

    An address that a node borrowed from the block of another lies in the route to that one. On the node itself it is a pod of its own; and
    where the node has no tunnel (yet) it must go the CNI's way: ``throw`` ends the lookup in this table, and the next rule decides.
    """
    routed = {route["dst"] for route in routes}
    others = {(cidr, "") for entry in doc["nodes"].values() for cidr in entry["pod_cidrs"] if cidr not in routed}
    found = find_overlaps([(cidr, "routed") for cidr in routed] + sorted(others), limit=sys.maxsize)
    return [{"family": family_of(dst), "table": table, "dst": dst, "dev": "", "type": "throw", "src": "", "mtu": 0, "peer": ""}
            for dst in sorted({narrow for dummy, (narrow, owner) in found if not owner})]


def is_inside(cidr, networks):
    """Whether a prefix lies in one of the networks."""
    network = ipaddress.ip_network(cidr)
    return any(network.version == other.version and network.subnet_of(other) for other in networks)


def families_of(doc, node):
    """The address families that a node has, of its own or of its pods."""
    entry = doc["nodes"][node]
    return {family_of(text) for text in entry["node_addresses"] + entry["pod_cidrs"]}


def wanted_rules(doc, node, settings):
    """The policy rules of a node that sends, in the order of their priorities.

    ``settings["iifs"]``: empty for rules that steer packets whatever their source; else devices (``lo`` is the node itself), and only what
    comes in there or from the node's own prefixes is steered. What a pod sends that is in no prefix yet takes the CNI's way then: no peer
    would accept it from the tunnel. ``settings["own_cidrs"]``: the prefixes that the node sends from, None for all of the document.
    """
    rules = []
    base, table, iifs = settings["rule_priority"], settings["table"], settings["iifs"]
    own = local_pod_cidrs(doc, node) if settings["own_cidrs"] is None else settings["own_cidrs"]

    def add(family, place, number, source="", iif="", not_fwmark=0):
        rules.append({"family": family, "priority": base + place, "table": number, "from": source, "iif": iif, "not_fwmark": not_fwmark})

    for family in sorted(families_of(doc, node)):
        cidrs = [cidr for cidr in own if family_of(cidr) == family]
        for iif in iifs or [""]:
            add(family, PRIORITY_PODS_IIF if iif else PRIORITY_PODS, table, iif=iif)
            if settings["encrypt"] == "nodes":
                add(family, PRIORITY_NODES_IIF if iif else PRIORITY_NODES, table + 1, iif=iif, not_fwmark=settings["fwmark"])
        for cidr in cidrs:
            if iifs:
                add(family, PRIORITY_PODS_FROM_PODS, table, cidr)
            add(family, PRIORITY_FROM_PODS, table + 1, cidr)
    return sorted(rules, key=rule_order)


def route_order(route):
    """Sort key of routes: table, family, then prefix by number."""
    network = ipaddress.ip_network(route["dst"])
    return (route["table"], network.version, int(network.network_address), network.prefixlen)


def rule_order(rule):
    """Sort key of rules: priority first, as the kernel looks at them; devices, which are few, before prefixes of pods."""
    return (rule["priority"], rule["family"], not rule["iif"], rule["iif"], rule["from"], rule["not_fwmark"], rule["table"])


def same_route(one, other):
    """Whether two routes with the same identity program the kernel alike (the peer's name is ours, the kernel has none)."""
    return all(one[field] == other[field] for field in ("type", "dev", "src", "mtu"))


def plan_routes(current, wanted):
    """Steps from one state to another: routes in, rules in, rules out, routes out.

    Steps: {"op": "replace_route" | "remove_route", "route"}, {"op": "add_rule" | "remove_rule", "rule"}. A route that changes is replaced
    in one kernel operation; a rule that stays is never touched. What is led out of a table is so before the wider route around it is there,
    and until that is gone: in their order, wider routes come first.
    """
    have = {(route["table"], route["dst"]): route for route in current["routes"]}
    want = {(route["table"], route["dst"]): route for route in wanted["routes"]}
    steps = []
    for key in sorted(want, key=lambda key: (want[key]["type"] != "throw", route_order(want[key]))):
        if key not in have or not same_route(have[key], want[key]):
            steps.append({"op": "replace_route", "route": want[key]})
    have_rules = {rule_order(rule): rule for rule in current["rules"]}
    want_rules = {rule_order(rule): rule for rule in wanted["rules"]}
    for key in sorted(set(want_rules) - set(have_rules)):
        steps.append({"op": "add_rule", "rule": want_rules[key]})
    # Host encryption goes first, then what pods send to nodes, then pods to pods: the reverse of how they were added.
    for key in sorted(set(have_rules) - set(want_rules), reverse=True):
        steps.append({"op": "remove_rule", "rule": have_rules[key]})
    for key in sorted(set(have) - set(want), key=lambda key: route_order(have[key])):
        steps.append({"op": "remove_route", "route": have[key]})
    return steps


def apply_to_state(state, step):
    """What the kernel holds after one step; used by the tests of the plan."""
    routes, rules = list(state["routes"]), list(state["rules"])
    if step["op"] in ("replace_route", "remove_route"):
        routes = [route for route in routes if (route["table"], route["dst"]) != (step["route"]["table"], step["route"]["dst"])]
        if step["op"] == "replace_route":
            routes.append(step["route"])
    elif step["op"] == "add_rule":
        rules.append(step["rule"])
    elif step["op"] == "remove_rule":
        rules = [rule for rule in rules if rule_order(rule) != rule_order(step["rule"])]
    return {"routes": sorted(routes, key=route_order), "rules": sorted(rules, key=rule_order)}


def moved_destinations(current, wanted):
    """The prefixes whose packets may leave by another device after the plan: what masqueraded connections must be carried over for.

    Nothing moves while there is no rule before and after; a rule that comes or goes moves every prefix of its table.
    """
    def steered(state):
        tables = {}
        for rule in state["rules"]:
            tables.setdefault((rule["family"], rule["table"]), set()).add((rule["from"], rule["iif"], rule["not_fwmark"]))
        found = {}
        for route in state["routes"]:
            selectors = tables.get((route["family"], route["table"]))
            if selectors:
                found[(route["table"], route["dst"])] = (frozenset(selectors), route["dev"], route["type"])
        return found

    before, after = steered(current), steered(wanted)
    return sorted({key[1] for key in set(before) | set(after) if before.get(key) != after.get(key)})


def route_text(route):
    """One route as ``ip route`` would take it, the peer's name as a comment."""
    parts = [route["dst"], "dev", route["dev"]] if route["type"] == "unicast" else [route["type"], route["dst"]]
    parts += ["table", str(route["table"])]
    if route["src"]:
        parts += ["src", route["src"]]
    if route["mtu"]:
        parts += ["mtu", str(route["mtu"])]
    return " ".join(parts) + ("  # %s" % route["peer"] if route["peer"] else "")


def rule_text(rule):
    """One rule as ``ip rule`` would take it.

    ``not`` is for all of a rule. Where there is a device as well, the bits of the mark are wanted to be 0 instead.
    """
    parts = ["priority", str(rule["priority"])]
    if rule["iif"]:
        parts += ["from", "all", "iif", rule["iif"]]
        if rule["not_fwmark"]:
            parts += ["fwmark", "0x0/0x%x" % rule["not_fwmark"]]
    elif rule["not_fwmark"]:
        parts += ["not", "from", "all", "fwmark", "0x%x/0x%x" % (rule["not_fwmark"], rule["not_fwmark"])]
    else:
        parts += ["from", rule["from"] or "all"]
    return " ".join(parts + ["lookup", str(rule["table"])])


def state_as_text(state, names=None):
    """A state as stable text for diff mode; ``names`` gives peers to routes read from the kernel: {(table, dst): peer}."""
    lines = []
    for rule in state["rules"]:
        lines.append("ip%s rule %s" % (" -6" if rule["family"] == "ipv6" else "", rule_text(rule)))
    for route in state["routes"]:
        named = dict(route, peer=route["peer"] or (names or {}).get((route["table"], route["dst"]), ""))
        lines.append("ip%s route %s" % (" -6" if route["family"] == "ipv6" else "", route_text(named)))
    return "".join(line + "\n" for line in lines)


# --- what `ip -j -N` prints --------------------------------------------------------------------------------------------------------------

# Numbers: include/uapi/linux/rtnetlink.h
ROUTE_TYPES = {"1": "unicast", "7": "unreachable", "9": "throw", "unicast": "unicast", "unreachable": "unreachable", "throw": "throw"}


def route_from_ip(item, family, table):
    """One object of ``ip -j -N route show table N`` as a route."""
    dst = item["dst"]
    if dst == "default":
        dst = "0.0.0.0/0" if family == "ipv4" else "::/0"
    kind = ROUTE_TYPES.get(str(item.get("type", "unicast")), str(item.get("type")))
    mtu = 0
    for metrics in item.get("metrics") or []:
        mtu = int(metrics.get("mtu", mtu))
    return {
        "family": family,
        "table": table,
        "dst": str(ipaddress.ip_network(dst)),
        # iproute2 shows lo for IPv6 routes without a device.
        "dev": item.get("dev", "") if kind == "unicast" else "",
        "type": kind,
        "src": item.get("prefsrc", ""),
        "mtu": mtu,
        "peer": "",
    }


def rule_from_ip(item, family):
    """One object of ``ip -j -N rule`` as a rule, or None when it is of a kind that we never make."""
    table = str(item.get("table", ""))
    if not table.isdigit():
        return None
    source, host_bits = "", False
    if item.get("src", "all") != "all":
        # The kernel keeps host bits in a rule of somebody's.
        prefix = ipaddress.ip_interface("%s/%s" % (item["src"], item.get("srclen", 32 if family == "ipv4" else 128)))
        source, host_bits = str(prefix.network), prefix.ip != prefix.network.network_address
    inverted, iif = "not" in item, str(item.get("iif", ""))
    marked = "fwmark" in item or "fwmask" in item
    mark = int(str(item.get("fwmark", "0")), 0)
    mask = int(str(item.get("fwmask", "0xffffffff")), 0)
    # iif_detached: that device is not there now.
    ours = {"priority", "src", "srclen", "table", "not", "fwmark", "fwmask", "protocol", "iif", "iif_detached"}
    of_device = not inverted and not source and mark == 0
    of_others = inverted == marked and not (inverted and (mark != mask or source))
    return {
        "family": family,
        "priority": int(item.get("priority", 0)),
        "table": int(table),
        "from": source,
        "iif": iif,
        "not_fwmark": mark if inverted else mask if iif and marked else 0,
        # Ours look at a prefix, or they are "not" a mark that is its own mask, or look at a device, perhaps without a mark; anything else
        # (suppressors, a prefix that is inverted) makes it another rule.
        "foreign": bool(set(item) - ours) or host_bits or not (of_device if iif else of_others),
    }


# --- what restores them at boot ----------------------------------------------------------------------------------------------------------

BATCH_HEADER = "# Written by kubemesh.wireguard; read by kubemesh-routes.service at boot. Changes made here are lost.\n"


def batch_text(state, family):
    """The routes of one family as a file for ``ip -batch``."""
    return BATCH_HEADER + "".join("route replace %s\n" % route_text(route) for route in state["routes"] if route["family"] == family)


def rules_text(state, family):
    """The rules of one family as a file for ``ip -batch``."""
    return BATCH_HEADER + "".join("rule add %s\n" % rule_text(rule) for rule in state["rules"] if rule["family"] == family)


def tables_of_rules(text):
    """The tables that the rules of a file made by `rules_text` point to."""
    lines = [line.split() for line in text.splitlines()]
    return {int(words[-1]) for words in lines if words[:2] == ["rule", "add"] and words[-2:-1] == ["lookup"] and words[-1].isdigit()}


def routes_of_batch(text, family):
    """The routes of a file made by `batch_text`, with their peers; lines that are not ours are left out."""
    routes = []
    for line in text.splitlines():
        words = line.split()
        if words[:2] != ["route", "replace"] or len(words) < 3:
            continue
        peer = words[words.index("#") + 1] if "#" in words and words.index("#") + 1 < len(words) else ""
        if "#" in words:
            words = words[:words.index("#")]
        kind, rest = (words[2], words[3:]) if words[2] in ("unreachable", "throw") else ("unicast", words[2:])
        options = dict(zip(rest[1::2], rest[2::2]))
        try:
            routes.append({
                "family": family,
                "table": int(options["table"]),
                "dst": str(ipaddress.ip_network(rest[0])),
                "dev": options.get("dev", ""),
                "type": kind,
                "src": options.get("src", ""),
                "mtu": int(options.get("mtu", 0)),
                "peer": peer,
            })
        except (KeyError, IndexError, ValueError):
            continue
    return routes


def rules_of_batch(text, family):
    """The rules of a file made by `rules_text`; lines that are not ours are left out."""
    rules = []
    for line in text.splitlines():
        words = line.split()
        if words[:2] != ["rule", "add"]:
            continue
        options = dict(zip(words[2:], words[3:]))
        try:
            rules.append({
                "family": family,
                "priority": int(options["priority"]),
                "table": int(options["lookup"]),
                "from": "" if options["from"] == "all" else str(ipaddress.ip_network(options["from"])),
                "iif": options.get("iif", ""),
                "not_fwmark": int(options["fwmark"].split("/")[1], 16) if "fwmark" in options else 0,
            })
        except (KeyError, IndexError, ValueError):
            continue
    return rules


# --- which way the kernel takes -----------------------------------------------------------------------------------------------------------

ADDRESSES_TRIED = 4096  # of a prefix, for one that no narrower route takes out of it; Calico's largest block


def address_in(cidr, nested=()):
    """An address of a prefix that is neither its first nor, where there is room, its second: those are often the node's own.

    ``nested``: narrower prefixes in it that lead elsewhere; None where they leave no address.
    """
    network = ipaddress.ip_network(cidr)
    inner = [ipaddress.ip_network(text) for text in nested]
    start = min(9, network.num_addresses - 1)
    for offset in range(min(network.num_addresses, ADDRESSES_TRIED)):
        address = network.network_address + (start + offset) % network.num_addresses
        if not any(address in other for other in inner):
            return str(address)
    return None


def probes_of(routes, cidrs):
    """{prefix: an address in it that nothing narrower of ``routes`` or ``cidrs`` takes out, or None} for the prefixes of both."""
    prefixes = {route["dst"] for route in routes} | set(cidrs)
    nested = {}
    for (wide, dummy), (narrow, dummy2) in find_overlaps([(cidr, cidr) for cidr in prefixes], limit=sys.maxsize):
        nested.setdefault(wide, []).append(narrow)
    return {cidr: address_in(cidr, nested.get(cidr, ())) for cidr in prefixes}


def devices_of_answers(text):
    """{address: device} of what ``ip -o route get`` prints, one answer to a line; an address without a route is left out."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        while words and words[0] in ("local", "unreachable", "blackhole", "prohibit", "broadcast"):
            words = words[1:]
        if len(words) > 2 and "dev" in words:
            found[words[0]] = words[words.index("dev") + 1]
    return found


def exempt_fault(cidr):
    """What is wrong with a prefix that shall stay outside, as a text; empty for nothing."""
    try:
        everything = ipaddress.ip_network(cidr).prefixlen == 0
    except ValueError as exc:
        return "mesh_exempt_cidrs: %s is not a prefix such as 192.0.2.0/24 (%s)" % (shown(cidr), exc)
    if everything:
        return "mesh_exempt_cidrs: %s is every address there is; to encrypt nothing between nodes, set mesh_encrypt=pods" % cidr
    return ""


def check_settings(settings):
    """Raise `MeshError` where the numbers and prefixes of the steering cannot be used."""
    table, priority, mark = settings["table"], settings["rule_priority"], settings["fwmark"]
    # 253 to 255 are default, main and local; 0 is "all" (rt_tables). The next table is used too.
    if not 1 <= table <= 0xFFFFFFFE or table in (252, 253, 254, 255):
        raise MeshError("mesh_table: %d: tables %d and %d must be free for the mesh and not be default, main or local; take one above 255"
                        % (table, table, table + 1))
    if not 1 <= priority <= 32765 - PRIORITIES:
        raise MeshError("mesh_rule_priority: %d: the rules must come after local (0) and before main (32766); take 1 to %d"
                        % (priority, 32765 - PRIORITIES))
    for cidr in settings.get("exempt_cidrs", ()):
        fault = exempt_fault(cidr)
        if fault:
            raise MeshError(fault)
    if not 1 <= mark <= 0xFFFFFFFF:
        raise MeshError("mesh_fwmark: %d: a mark is a number from 1 to 0xffffffff" % mark)
