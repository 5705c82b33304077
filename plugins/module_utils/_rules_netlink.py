# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""The switch itself: policy rules added and deleted by one message to the kernel.

``ip rule`` would do the same a process later. Connections that begin between the moment in which masqueraded ones were carried over and
the switch are those that the switch can break, so that moment must be short: microseconds here, tens of milliseconds there.

Sources: include/uapi/linux/fib_rules.h, rtnetlink.h; ``iprule_modify`` in iproute2, ip/iprule.c, which the messages follow, so that what
is made here is deleted by ``ip rule`` and the other way round.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    TIMEOUT,
    attribute,
    error_code,
    messages,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import rule_text

RTM_NEWRULE, RTM_DELRULE = 32, 33
FR_ACT_TO_TBL = 1
FIB_RULE_INVERT = 0x2
FRA_SRC, FRA_IIFNAME, FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_FWMASK = 2, 3, 6, 10, 15, 16
FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


def rule_message(step, sequence):
    """One step, add_rule or remove_rule of `_routes_plan`, as a netlink message."""
    rule, adds = step["rule"], step["op"] == "add_rule"
    source = ipaddress.ip_network(rule["from"]) if rule["from"] else None
    header = struct.pack(
        "=BBBBBBBBI", FAMILIES[rule["family"]], 0, source.prefixlen if source else 0, 0,
        # Tables above 255 do not fit into the header; the attribute counts for all.
        0, 0, 0, FR_ACT_TO_TBL, FIB_RULE_INVERT if rule["not_fwmark"] and not rule["iif"] else 0)
    parts = [attribute(FRA_PRIORITY, struct.pack("=I", rule["priority"]))]
    if source:
        parts.append(attribute(FRA_SRC, source.network_address.packed))
    if rule["iif"]:
        parts.append(attribute(FRA_IIFNAME, rule["iif"].encode("ascii") + b"\0"))
    if rule["not_fwmark"]:
        mask = struct.pack("=I", rule["not_fwmark"])
        parts += [attribute(FRA_FWMARK, struct.pack("=I", 0) if rule["iif"] else mask), attribute(FRA_FWMASK, mask)]
    parts.append(attribute(FRA_TABLE, struct.pack("=I", rule["table"])))
    flags = NLM_F_REQUEST | NLM_F_ACK | (NLM_F_CREATE | NLM_F_EXCL if adds else 0)
    body = header + b"".join(parts)
    return struct.pack("=IHHII", 16 + len(body), RTM_NEWRULE if adds else RTM_DELRULE, flags, sequence, 0) + body


def change_rules(steps):
    """Carry out add_rule and remove_rule steps in their order, all in one message to the kernel. Raises MeshError for the first refused."""
    if not steps:
        return
    codes = {}
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            opened.settimeout(TIMEOUT)
            opened.bind((0, 0))
            opened.send(b"".join(rule_message(step, place + 1) for place, step in enumerate(steps)))
            while len(codes) < len(steps):
                for kind, sequence, body in messages(opened.recv(1 << 16)):
                    if kind == NLMSG_ERROR and 1 <= sequence <= len(steps):
                        codes[sequence - 1] = error_code(body)
        finally:
            opened.close()
    except OSError as exc:
        raise MeshError("the kernel cannot be asked to change policy rules: %s; this must run as root (become)" % exc) from None
    for place, step in enumerate(steps):
        if codes[place]:
            raise MeshError("rule %s (%s) could not be %s: %s; look at `ip rule` for one that is in its place" % (
                rule_text(step["rule"]), step["rule"]["family"], "added" if step["op"] == "add_rule" else "removed",
                os.strerror(codes[place])))
