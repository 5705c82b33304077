# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""The live mesh joined with the mesh document: what each peer is called, what lies behind it, and whether its traffic is encrypted.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. A picture of the wanted state alone would lie, so nothing here is
concluded from the document: a peer is "encrypted" when the kernel has the peer, the routes, the rule, and a handshake.
"""

from __future__ import annotations

import ipaddress

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import family_of, host_cidr, peers_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import is_inside

# Seconds. A session is renewed after 120 and refused after 180 (REJECT_AFTER_TIME, whitepaper section 6.1); with 5 s retries for 90 s
# (REKEY_ATTEMPT_TIME) a peer that talks has a handshake younger than this.
HANDSHAKE_FRESH = 275

STATES = ("encrypted", "idle", "accepting", "partial", "no handshake", "missing", "no key", "excluded", "unknown")
# While keys are rotated a peer is known through two devices; the first of these says how its traffic travels.
TELLING = ("encrypted", "idle", "no handshake", "partial", "accepting", "missing", "no key", "excluded", "unknown")
# What is sent to a peer goes into the tunnel, whether it answered of late or not; and rows that are not about a pair of members.
THROUGH_THE_TUNNEL = ("encrypted", "idle")
NO_PAIR = ("excluded", "unknown")
# Not a fault, and told all the same: whoever reads the table may not be who set the variable.
EXEMPT = "in clear, as mesh_exempt_cidrs asks: %s"
# How much of the peers a result holds.
DETAILS = ("all", "problems", "none")


def steered(routes_state, local_cidrs, node_families):
    """What the rules make of the tables, as sets of families.

    "pods": what goes to pods; "nodes": what goes to node addresses, from everyone (host encryption) or from all local pods.
    """
    pods, nodes, sources = set(), set(), set()
    tables = sorted({rule["table"] for rule in routes_state["rules"]})
    for rule in routes_state["rules"]:
        # Of those that look at devices, the node's own stands for all.
        if rule["iif"] not in ("", "lo"):
            continue
        if rule["not_fwmark"]:
            nodes.add(rule["family"])
        elif rule["from"]:
            sources.add(rule["from"])
        elif rule["table"] == tables[0]:
            pods.add(rule["family"])
    for family in node_families:
        own = {cidr for cidr in local_cidrs if family_of(cidr) == family}
        # Where rules look at devices, the node sends from a prefix some time after it is known.
        if own and (own <= sources or (sources and any(rule["iif"] for rule in routes_state["rules"]))):
            nodes.add(family)
    return {"pods": pods & node_families, "nodes": nodes & node_families}


def join(doc, node, generation, device, routes_state, interface, now, exempt_cidrs=()):
    """Rows of a node's peers, sorted by name.

    :param device: WireGuard state as `read` returns it, or None when there is no device.
    :param routes_state: as `_routes.read_state` returns it.
    :param now: seconds since the epoch by the clock that the handshakes were taken with, the node's own.
    :param exempt_cidrs: CIDRs; node addresses in them are to be reached outside the mesh.
    :returns: [{"name", "public_key", "endpoint", "addresses", "handshake_age": seconds or None, "rx_bytes", "tx_bytes", "state", "reason",
        "routed": bool}]
    """
    generation = str(generation)
    entry = doc["nodes"][node]
    families = {family_of(text) for text in entry["node_addresses"] + entry["pod_cidrs"]}
    rules = steered(routes_state, entry["pod_cidrs"], families)
    # Families whose node addresses are to be reached through the tunnel: by local pods at least.
    rules["wanted_nodes"] = rules["nodes"] | {family_of(cidr) for cidr in entry["pod_cidrs"]}
    rules["exempt"] = [ipaddress.ip_network(cidr) for cidr in exempt_cidrs]
    routes = {route["dst"] for route in routes_state["routes"] if route["dev"] == interface and route["type"] == "unicast"}
    live = device["peers"] if device else {}
    wanted = peers_of(doc, node, generation) if generation in entry["public_keys"] and entry["state"] != "excluded" else {}
    keys = {peer["name"]: key for key, peer in wanted.items()}
    rows = []
    for name, other in doc["nodes"].items():
        if name != node:
            key = keys.get(name)
            rows.append(_row(name, key, other, live.get(key), wanted.get(key), families, rules, routes, now))
    for key in sorted(set(live) - set(wanted)):
        rows.append(_row("(unknown)", key, None, live[key], None, families, rules, routes, now))
    return sorted(rows, key=lambda row: (row["name"], row["public_key"] or ""))


def join_generations(doc, node, devices, routes_state, now, exempt_cidrs=()):
    """Rows as `join` returns them, with "generation", over all devices of the mesh on a node: each peer through the one that says most.

    :param devices: [(generation, device name, WireGuard state or None)], the generation that traffic is to go through first.
    """
    chosen, unknown = {}, []
    for generation, interface, device in devices:
        for row in join(doc, node, generation, device, routes_state, interface, now, exempt_cidrs):
            row["generation"] = int(generation)
            if row["state"] == "unknown":
                unknown.append(row)
            elif row["name"] not in chosen or TELLING.index(row["state"]) < TELLING.index(chosen[row["name"]]["state"]):
                chosen[row["name"]] = row
    return sorted(list(chosen.values()) + unknown, key=lambda row: (row["name"], row["public_key"] or ""))


def detailed(rows, detail):
    """The rows that a result holds: all, those that are neither encrypted nor excluded, or none."""
    if detail == "problems":
        return [row for row in rows if row["state"] not in ("encrypted", "excluded")]
    return rows if detail == "all" else []


def _row(name, key, other, peer, wanted, families, rules, routes, now):
    row = {
        "name": name,
        "public_key": key,
        "endpoint": peer["endpoint"] if peer else None,
        "addresses": peer["allowed_ips"] if peer else [],
        "handshake_age": max(0, int(now - peer["last_handshake"])) if peer and peer["last_handshake"] else None,
        "rx_bytes": peer["rx_bytes"] if peer else 0,
        "tx_bytes": peer["tx_bytes"] if peer else 0,
        "routed": False,
    }
    row["state"], row["reason"] = _state(row, other, peer, wanted, families, rules, routes)
    return row


def _state(row, other, peer, wanted, families, rules, routes):
    """(state, reason) of one peer; sets ``routed``."""
    if other is None:
        return "unknown", "a peer of the device that is not in the mesh document"
    if other["state"] == "excluded":
        return "excluded", other["reason"]
    if wanted is None:
        return "no key", other["reason"] or "no public key of this node is known"
    if peer is None:
        return "missing", "not a peer of the device; run the playbook enable or reconcile"
    gone = sorted(set(wanted["allowed_ips"]) - set(peer["allowed_ips"]))
    if gone:
        return "partial", "not accepted from this peer: %s" % ", ".join(gone)
    prefixes = [cidr for cidr in other["pod_cidrs"] if family_of(cidr) in families]
    sent = [cidr for cidr in prefixes if cidr in routes and family_of(cidr) in rules["pods"]]
    row["routed"] = bool(sent)
    # A peer without pods is reached by the node addresses alone.
    nodes = [host_cidr(text) for text in other["node_addresses"] if family_of(text) in rules["wanted_nodes"]]
    spared = [text for text in nodes if text not in routes and is_inside(text, rules["exempt"])]
    nodes = [text for text in nodes if text not in spared]
    if spared and not nodes and not prefixes:
        return "excluded", EXEMPT % ", ".join(spared)
    reached = [text for text in nodes if text in routes and family_of(text) in rules["nodes"]]
    if not sent and not reached and (prefixes or nodes or not rules["pods"]):
        return "accepting", "traffic to it takes the way of the CNI, in clear"
    missing = sorted(set(prefixes) - set(sent)) + [text for text in nodes if text not in reached]
    if missing:
        return "partial", "in clear: %s" % ", ".join(missing)
    if row["handshake_age"] is None:
        return "no handshake", "traffic is sent into the tunnel, and the peer never answered"
    if row["handshake_age"] > HANDSHAKE_FRESH:
        return "idle", "no traffic for %d s; probe it to know" % row["handshake_age"]
    return "encrypted", EXEMPT % ", ".join(spared) if spared else ""


def counts(rows):
    """{state: number of peers}, states that occur only, in the order of STATES."""
    found = {}
    for state in STATES:
        number = sum(1 for row in rows if row["state"] == state)
        if number:
            found[state] = number
    return found


def run_summary(nodes, changed, not_reached):
    """What a run came to, in numbers that a workflow can branch on. It holds no name and no address.

    A pair of nodes counts once for each direction, as each node knows only what it sends itself; peers that were left out on purpose, and
    those that nobody knows, are no pairs.

    :param nodes: results of `mesh_info` of the nodes that were looked at.
    :param changed: how many nodes something was changed on, or would have been.
    :param not_reached: how many nodes of the run failed or could not be reached.
    :returns: {"nodes", "nodes_changed", "nodes_not_reached", "pairs_encrypted", "pairs_not_encrypted": numbers, "changed", "encrypted":
        whether every node was reached and sends to every peer through the tunnel}
    """
    states = {}
    for info in nodes:
        for state, number in info["counts"].items():
            states[state] = states.get(state, 0) + int(number)
    good = sum(states.get(state, 0) for state in THROUGH_THE_TUNNEL)
    bad = sum(number for state, number in states.items() if state not in THROUGH_THE_TUNNEL + NO_PAIR)
    return {
        "nodes": len(nodes),
        "nodes_changed": int(changed),
        "nodes_not_reached": int(not_reached),
        "pairs_encrypted": good,
        "pairs_not_encrypted": bad,
        "changed": bool(changed),
        "encrypted": bool(nodes) and not bad and not not_reached and all(info["sending"] for info in nodes),
    }


def loose_devices(text):
    """Names of the devices for which a sysctl.d file of ours asks for loose reverse-path filtering (value 2)."""
    found = []
    for line in (text or "").splitlines():
        name, separator, value = line.lstrip("-").partition("=")
        parts = name.strip().split("/")
        if separator and value.strip() == "2" and len(parts) == 5 and parts[:3] == ["net", "ipv4", "conf"] and parts[4] == "rp_filter":
            found.append(parts[3])
    return found


# --- for people --------------------------------------------------------------------------------------------------------------------------

def age_text(seconds):
    """``8 s``, ``3 min``, ``2 h``, ``4 d``, ``never``."""
    if seconds is None:
        return "never"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return "%d %s" % (seconds // size, unit)
    return "%d d" % (seconds // 86400)


def bytes_text(number):
    """``812 B``, ``14.2 KiB``, ``3.1 GiB``."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return "%d %s" % (size, unit) if unit == "B" else "%.1f %s" % (size, unit)
        size /= 1024
    return "%.1f TiB" % size


def columns(rows):
    """Rows of text cells as lines with aligned columns; the first row is the head."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return lines


def guard_lines(guard):
    """What strict mode dropped on a node, as lines for people; none where it is off."""
    if not guard or not guard["present"]:
        return []
    dropped = ["%s %d packets (%s)" % (name.replace("_", " "), found["packets"], bytes_text(found["bytes"]))
               for name, found in sorted(guard["counters"].items()) if found["packets"]]
    return ["  strict: dropped %s" % (", ".join(dropped) or "nothing")]


# A host of which nothing is known may have failed before it was looked at.
NO_ANSWER = "no answer: not reached, or failed before it was asked"


def mesh_table(nodes):
    """The mesh for people, a block per node.

    :param nodes: results of `mesh_info`, {"node", "device", "sending", "counts", "peers": rows,
        "warnings_of_mesh"}, or {"node", "msg": error}.
    :returns: list of lines.
    """
    lines = []
    for info in nodes:
        if "peers" not in info:
            lines += ["%s: %s" % (info["node"], info.get("msg", NO_ANSWER)), ""]
            continue
        device = info["device"]
        lines.append("%s: %s, %s, %s" % (
            info["node"], "%s (%s)" % (device["name"], device["implementation"]) if device else "no mesh device",
            "sends through the mesh" if info["sending"] else "does not send through the mesh",
            # Not all peers need be in the result, the counts are of all.
            ", ".join("%d %s" % (number, state) for state, number in info["counts"].items()) or "no peers"))
        shown = info["peers"]
        if shown:
            table = [["PEER", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT", "STATE", "BEHIND IT"]]
            for row in shown:
                behind = [text for text in row["addresses"] if not text.startswith("fe80:")]
                table.append([
                    row["name"], row["endpoint"] or "-", age_text(row["handshake_age"]), bytes_text(row["rx_bytes"]),
                    bytes_text(row["tx_bytes"]), row["state"], ", ".join(behind) or "-"])
            lines += ["  " + line for line in columns(table)]
            lines += ["  %s: %s" % (row["name"], row["reason"]) for row in shown if row["reason"]]
        lines += guard_lines(info.get("guard"))
        lines += ["  " + text for text in info["warnings_of_mesh"]]
        lines.append("")
    return lines


# --- a rollout in batches ----------------------------------------------------------------------------------------------------------------

def batches(hosts, sizes):
    """Hosts cut into batches, in their order.

    :param sizes: numbers or percentages of all hosts; the last one repeats, as with ``serial`` of a play.
    :raises ValueError: for a size that is none.
    """
    if not isinstance(sizes, (list, tuple)):
        sizes = [sizes]
    if not sizes:
        raise ValueError("mesh_batch: an empty list; give numbers or percentages such as [1, \"25%\", \"100%\"]")
    # All of them, also those that so few hosts never get to.
    numbers = [batch_size(size, len(hosts)) for size in sizes]
    cut, rest, place = [], list(hosts), 0
    while rest:
        number = numbers[min(place, len(numbers) - 1)]
        cut.append(rest[:number])
        rest = rest[number:]
        place += 1
    return cut


def batch_size(size, total):
    """One size as a number of hosts, at least 1."""
    text = str(size).strip()
    digits = text[:-1] if text.endswith("%") else text
    number = int(digits) if digits.isascii() and digits.isdigit() and not isinstance(size, bool) else 0
    if number < 1 or (text.endswith("%") and number > 100):
        raise ValueError("mesh_batch: %r is not a number of hosts from 1 on, nor a percentage from 1%% to 100%%" % (size,))
    return max(1, total * number // 100) if text.endswith("%") else number


def progress_line(done, total, proven, expected, started, now):
    """One line per batch: nodes done of all, peers proven, time left.

    ``started`` and ``now`` are seconds of the same clock. The time left assumes that the rest takes as long per node as what was done.
    """
    left = (now - started) / done * (total - done) if done else 0
    text = "%d of %d nodes done, %d of %d peers proven" % (done, total, proven, expected)
    return text + (", about %s left" % age_text(int(left) + 1) if done < total else "")
