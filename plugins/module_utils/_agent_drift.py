# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""What somebody takes away from the mesh of this node, as the kernel tells it: device, address, route, rule.

systemd-networkd flushes rules and routes that it does not know, people set devices down, scripts delete. Without this, traffic would take
the way in clear, or none, until the next comparison with the kernel. WireGuard itself tells nobody when its peers are changed: that is left
to the comparison, as is what somebody adds.

Sources: rtnetlink(7); include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h, fib_rules.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _nfnetlink as netlink
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kernel_watch import KernelWatcher

RTM_NEWLINK, RTM_DELLINK, RTM_DELADDR, RTM_DELROUTE, RTM_DELRULE = 16, 17, 21, 25, 33
# RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV6_RULE
GROUPS = (1, 5, 7, 8, 9, 11, 19)
IFF_UP = 1
IFLA_IFNAME = 3
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_TABLE = 1, 15
FRA_SRC, FRA_IIFNAME, FRA_PRIORITY, FRA_TABLE = 2, 3, 6, 15
# struct ifinfomsg, ifaddrmsg, rtmsg, fib_rule_hdr
HEADERS = {RTM_NEWLINK: "=BBHiII", RTM_DELLINK: "=BBHiII", RTM_DELADDR: "=BBBBI", RTM_DELROUTE: "=BBBBBBBBI", RTM_DELRULE: "=BBBBBBBBI"}
# Seconds from the first thing that is taken away to the look at all that is.
SETTLE = 0.1
# How many looks there are within how many seconds at most: two programs that undo what the other does must not keep a node busy.
LOOKS, LOOKS_WITHIN = 3, 15.0
FAMILIES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}


def _text(payload):
    return payload.split(b"\0")[0].decode("utf-8", "replace")


def _prefix(family, payload, length):
    """``10.0.0.0/24`` of an address as bytes; an empty text where there is none."""
    if not payload:
        return str(ipaddress.ip_network("0.0.0.0/0" if family == "ipv4" else "::/0")) if length == 0 else ""
    return "%s/%d" % (ipaddress.ip_address(payload), length)


def _number(found, kind, default):
    return struct.unpack_from("=I", found[kind])[0] if len(found.get(kind, b"")) >= 4 else default


def taken_away(data, devices, tables):
    """What a datagram of rtnetlink says is gone: a list of

    ("link", name) for a device that is down or gone, ("address", prefix), ("route", table, prefix), ("rule", family, priority, table,
    source prefix or "", incoming device or ""). ``devices``: names of those that count; ``tables``: numbers of those that count, for routes
    and rules. What is malformed, or of another kind, is passed over.
    """
    found = []
    for kind, dummy, body in netlink.messages(data):
        form = HEADERS.get(kind)
        if form is None or len(body) < struct.calcsize(form):
            continue
        header, parts = struct.unpack_from(form, body), netlink.attributes(body[struct.calcsize(form):])
        try:
            item = _item(kind, header, parts, devices, tables)
        except ValueError:
            continue
        if item:
            found.append(item)
    return found


def _item(kind, header, parts, devices, tables):
    if kind in (RTM_NEWLINK, RTM_DELLINK):
        name = _text(parts.get(IFLA_IFNAME, b""))
        # AF_BRIDGE tells of ports of a bridge by the same messages.
        gone = header[0] == socket.AF_UNSPEC and (kind == RTM_DELLINK or not header[4] & IFF_UP)
        return ("link", name) if gone and name in devices else None
    family = FAMILIES.get(header[0])
    if family is None:
        return None
    if kind == RTM_DELADDR:
        return "address", _prefix(family, parts.get(IFA_LOCAL) or parts.get(IFA_ADDRESS), header[1])
    # A table above 255 does not fit into the header; the attribute counts for all.
    table = _number(parts, RTA_TABLE if kind == RTM_DELROUTE else FRA_TABLE, header[4])
    if table not in tables:
        return None
    if kind == RTM_DELROUTE:
        return "route", table, _prefix(family, parts.get(RTA_DST), header[1])
    source = _prefix(family, parts[FRA_SRC], header[2]) if parts.get(FRA_SRC) else ""
    return "rule", family, _number(parts, FRA_PRIORITY, 0), table, source, _text(parts.get(FRA_IIFNAME, b""))


def things(left):
    """What of `taken_away` would be missing: all that was left in the kernel, as a set.

    ``left``: (generation, link, state of the device, routes and rules) as of `_agent.Kernel`; None where nobody knows: what comes next
    reads all of it anyway. What the agent itself takes away is not what it left.
    """
    if left is None:
        return frozenset()
    dummy, link, state, current = left
    there = {("link", (state or {}).get("name"))}
    there |= {("address", address) for address in (link or {}).get("addresses", ())}
    there |= {("route", route["table"], route["dst"]) for route in current["routes"]}
    there |= {("rule", rule["family"], rule["priority"], rule["table"], rule["from"], rule["iif"]) for rule in current["rules"]}
    return frozenset(there)


def look_at(now, looks):
    """When to look what is missing, in seconds of a monotonic clock. ``looks``: when that was done before, the last `LOOKS` of them.

    Who takes one thing away takes the next one a moment later: networkd flushes rules and routes one by one.
    """
    return max(now + SETTLE, looks[0] + LOOKS_WITHIN if len(looks) >= LOOKS else 0.0)


class DriftWatcher(KernelWatcher):
    """Calls ``tell(found)`` for what is taken away, see `taken_away`, with None where that is not known; ``fail(text)`` once at most."""

    def __init__(self, devices, tables, tell, fail):
        super().__init__(
            "drift", socket.NETLINK_ROUTE, GROUPS, lambda data: taken_away(data, devices, tables), tell,
            lambda text: fail("the kernel cannot be watched (%s): what others change is seen by the next comparison" % text))
