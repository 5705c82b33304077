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
PROTOCOL = "151"
LOCAL, MAIN = "255", "254"
# The kernel's own rules, as numbers and as names, which some versions of iproute2 print all the same.
OF_THE_KERNEL = {(0, LOCAL): 0, (0, "local"): 0, (32766, MAIN): 1, (32766, "main"): 1, (32767, "253"): 2, (32767, "default"): 2}
# Any new rule parts the tables. This one is for packets of a device that does not exist, and a rule is deleted by its device exactly.
DEVICE = "kubemesh-split"
RULE = "priority 32765 iif %s lookup %s" % (DEVICE, MAIN)
# linux/rtnetlink.h; `ip route add` takes names only. What else there may be in the table was put there by somebody, and is his affair.
TYPES = {"2": "local", "local": "local", "3": "broadcast", "broadcast": "broadcast"}


def is_ours(rule):
    """Whether an object of `ip -4 -j -N rule` is the rule above."""
    return rule.get("iif") == DEVICE


def is_split(rules):
    """Whether the tables were parted before: a rule came, or one of the kernel's went. False where that cannot be told."""
    found = set()
    for rule in rules:
        if is_ours(rule):
            continue
        place = OF_THE_KERNEL.get((rule.get("priority"), str(rule.get("table"))))
        if place is None or rule.get("src", "all") != "all" or set(rule) - {"priority", "src", "table", "protocol"}:
            return True
        found.add(place)
    return found != {0, 1, 2}


def copy_lines(routes):
    """``ip -batch`` lines that add the copies; routes: objects of `ip -4 -j -N route show table local`."""
    lines = []
    for route in routes:
        kind = TYPES.get(str(route.get("type")))
        if kind is None or not route.get("dev") or {"gateway", "via", "nexthops"} & set(route):
            continue
        parts = ["route", "add", kind, route["dst"], "table", MAIN, "proto", PROTOCOL, "dev", route["dev"]]
        for key, word in (("scope", "scope"), ("prefsrc", "src"), ("metric", "metric")):
            if route.get(key) is not None:
                parts += [word, str(route[key])]
        lines.append(" ".join(parts))
    return lines


def removal_lines(rule=True):
    """Lines that take the copies away, and the rule."""
    return (["rule del " + RULE] if rule else []) + ["route flush table %s proto %s" % (MAIN, PROTOCOL)]


def split_local_table(system, first_rule):
    """Take away what a run that was killed left here; and part the tables where that is to be done before a first rule.

    No packet is lost, and nothing is different afterwards.
    """
    # An address that a killed run copied may have left the node since, so what is left goes before anything is copied.
    rules, lines = read(system)
    if first_rule and not is_split(rules):
        routes = system.ip_json(["-4", "route", "show", "table", LOCAL], missing=("table does not exist",))
        lines = lines + copy_lines(routes) + ["rule add " + RULE] + removal_lines()
    if not lines:
        return
    # To its end, whatever becomes of this process. What is refused is seen by what is there afterwards.
    system.ip_detached("ipv4", lines)
    if read(system)[1]:
        system.module.warn("routes that were to be there for a moment are still there: remove them with `ip -4 route flush table main "
                           "proto %s` and `ip -4 rule del %s`" % (PROTOCOL, RULE))


def read(system):
    """``(rules of this node, lines that take away what is left of ours)``."""
    rules = system.ip_json(["-4", "rule", "show"], missing=("not supported",))
    copies = system.ip_json(["-4", "route", "show", "table", MAIN, "proto", PROTOCOL], missing=("table does not exist",))
    ours = any(map(is_ours, rules))
    return rules, removal_lines(ours) if copies or ours else []
