# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The first IPv4 rule of a node without a packet lost.

Until a node gets a rule of its own, Linux keeps the routes of table `local` in table `main` and looks nowhere else. The first rule parts
them: the kernel takes the local routes out of `main` one after the other, and only then begins to look into `local` (``fib_unmerge`` in
net/ipv4/fib_frontend.c, called by ``fib4_rule_configure`` in fib_rules.c before it sets ``fib_has_custom_rules``; since Linux 4.1).
In between, packets to the node's own addresses are not its own: they are forwarded, and lost. Measured on Linux 6.18 with 100,000 packets
per second: one packet in every third try, and 43 to 69 in each with 2,000 local addresses, as kube-proxy has them in IPVS mode.

So `main` is given a copy of the local routes first, which the kernel leaves alone, and which goes after it. IPv6 keeps its tables apart.
"""

from __future__ import annotations

# What marks the copies: a number that no routing daemon has (iproute2, etc/rtnetlink.c and rt_protos).
PROTOCOL = 151
LOCAL, MAIN, DEFAULT = 255, 254, 253
# Looks once more into `main` just before the kernel's own rule does (32766): it changes no packet's way.
RULE = "priority 32765 from all lookup %d" % MAIN
# linux/rtnetlink.h; `ip route add` takes names only.
TYPES = {"1": "unicast", "2": "local", "3": "broadcast", "4": "anycast", "5": "multicast"}


def is_split(rules):
    """Whether the tables were parted before, as far as `ip -4 -j -N rule` tells: a rule that is neither the kernel's nor the one above."""
    harmless = {(0, str(LOCAL)), (32765, str(MAIN)), (32766, str(MAIN)), (32767, str(DEFAULT))}
    return any((int(rule.get("priority", 0)), str(rule.get("table", ""))) not in harmless for rule in rules)


def route_lines(verb, routes):
    """``ip -batch`` lines that add or delete the copies; routes: objects of `ip -4 -j -N route show table local`."""
    lines = []
    for route in routes:
        kind = str(route.get("type", "unicast"))
        parts = ["route", verb, TYPES.get(kind, kind), route["dst"], "table", str(MAIN), "proto", str(PROTOCOL)]
        for key, word in (("dev", "dev"), ("scope", "scope"), ("prefsrc", "src"), ("metric", "metric")):
            if route.get(key) is not None:
                parts += [word, str(route[key])]
        lines.append(" ".join(parts))
    return lines


def split_lines(routes, leftovers=()):
    """All that parts the tables, for one ``ip -force -batch``: copies in, a rule that makes the kernel do it, rule and copies out.

    leftovers: copies of a run that was killed half way, as above. A copy that cannot be added leaves its address as it would be without.
    """
    copies = route_lines("add", routes)
    return copies + ["rule add " + RULE, "rule del " + RULE] + route_lines("del", list(routes) + list(leftovers))


def split_local_table(system):
    """Part the tables of this node, where that was not done before; no packet is lost, and nothing is different afterwards."""
    if is_split(system.ip_json(["-4", "rule", "show"])):
        return
    routes = system.ip_json(["-4", "route", "show", "table", str(LOCAL)], missing=("table does not exist",))
    leftovers = system.ip_json(["-4", "route", "show", "table", str(MAIN), "proto", str(PROTOCOL)], missing=("table does not exist",))
    # One process, which goes on when this one is killed. What it says is of no use: a rule or a copy may be there from another time.
    system.ip_answers("ipv4", split_lines(routes, leftovers))
