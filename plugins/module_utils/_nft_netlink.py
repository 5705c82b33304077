# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Tables of nf_tables that live as long as their process, over netlink: steps, expressions of rules, transactions.

A step is (message, attributes), such as (NFT_MSG_NEWCHAIN, bytes); a transaction is a list of steps of which all happen, or none.

Sources: include/uapi/linux/netfilter/nf_tables.h; `nft --debug=netlink,mnl` for the expressions of a rule.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    attribute,
    error_code,
    message,
    messages,
    nested,
    open_socket,
)

NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE = 0, 2, 3, 6
NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = 9, 12, 14
DELETIONS = (NFT_MSG_DELTABLE, NFT_MSG_DELSETELEM)
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFT_TABLE_F_OWNER = 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_TYPE = 1, 3, 4, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN, NFTA_SET_ID, NFTA_SET_TIMEOUT = 1, 2, 3, 4, 5, 10, 11
NFT_SET_TIMEOUT = 0x10
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_KEY = 1, 2, 3, 1
NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE = 1, 2, 1
NFT_REG_VERDICT, NFT_REG_1, NFT_REG32_00 = 0, 1, 8
NFT_META_NFPROTO, NFT_META_L4PROTO = 15, 16
NFT_CMP_EQ, NFT_CMP_NEQ, NFT_CMP_LT = 0, 1, 2
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER = 1, 2

# The hooks by which every packet enters connection tracking.
HOOKS = (("prerouting", 0), ("output", 3))


def number(kind, value):
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def text(kind, value):
    return attribute(kind, value.encode("ascii") + b"\0")


def literal(kind, data):
    return nested(kind, attribute(NFTA_DATA_VALUE, data))


def expression(name, *parts):
    return nested(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *parts))


def meta(key, register=NFT_REG_1):
    """Load something about the packet, such as NFT_META_L4PROTO."""
    return expression("meta", number(1, register), number(2, key))


def payload(base, offset, length, register=NFT_REG_1):
    """Load bytes of one of the packet's headers."""
    return expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


def compare(operation, data):
    return expression("cmp", number(1, NFT_REG_1), number(2, operation), literal(3, data))


def mask(data):
    return expression(
        "bitwise", number(1, NFT_REG_1), number(2, NFT_REG_1), number(3, len(data)), literal(4, data), literal(5, b"\0" * len(data)))


def chain_step(table, name, hook, priority):
    """A chain that sees packets at a hook."""
    return NFT_MSG_NEWCHAIN, text(NFTA_CHAIN_TABLE, table) + text(NFTA_CHAIN_NAME, name) + nested(
        NFTA_CHAIN_HOOK, number(NFTA_HOOK_HOOKNUM, hook), number(NFTA_HOOK_PRIORITY, priority)) + text(NFTA_CHAIN_TYPE, "filter")


def rule_step(table, chain, expressions):
    return NFT_MSG_NEWRULE, text(NFTA_RULE_TABLE, table) + text(NFTA_RULE_CHAIN, chain) + nested(NFTA_RULE_EXPRESSIONS, *expressions)


def table_steps(table, flags):
    """An empty table, in place of what is there by that name."""
    named = text(NFTA_TABLE_NAME, table)
    return [
        # A table that is made first can be removed, whether or not it was there.
        (NFT_MSG_NEWTABLE, named),
        (NFT_MSG_DELTABLE, named),
        (NFT_MSG_NEWTABLE, named + (number(NFTA_TABLE_FLAGS, flags) if flags else b"")),
    ]


def batch(sequence, steps):
    """(bytes, sequence numbers that are answered) of one transaction; the first sequence number is that of its beginning."""
    packed = [message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, socket.AF_UNSPEC, sequence, b"", NFNL_SUBSYS_NFTABLES)]
    for place, (kind, content) in enumerate(steps, 1):
        flags = NLM_F_REQUEST | NLM_F_ACK | (0 if kind in DELETIONS else NLM_F_CREATE)
        packed.append(message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, NFPROTO_INET, sequence + place, content))
    last = sequence + len(steps) + 1
    packed.append(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, socket.AF_UNSPEC, last, b"", NFNL_SUBSYS_NFTABLES))
    return b"".join(packed), list(range(sequence + 1, last))


class OwnedTable:
    """A table that ends with its socket, however this process ends, where the kernel can do that (5.12 and newer).

    ``active`` says whether it is there.
    """

    def __init__(self, name):
        self.name = name
        self.active = False
        self.socket = None
        self.sequence = 0

    def put_up(self, steps):
        """Make the table, filled by the steps. Raises nothing."""
        try:
            self.socket = open_socket()
            for flags in (NFT_TABLE_F_OWNER, 0):
                code = self._send(table_steps(self.name, flags) + steps)
                if code == 0:
                    self.active = True
                # An older kernel does not know that a table may have an owner; anything else it will not take without one either.
                if code not in (errno.EINVAL, errno.EOPNOTSUPP):
                    break
        except (OSError, struct.error):
            self.active = False

    def change(self, steps):
        """Carry out one transaction. Raises OSError where the kernel does not take it."""
        code = self._send(steps)
        if code:
            raise OSError(code, os.strerror(code))

    def stop(self):
        """Take the table away. Raises nothing."""
        if self.socket is None:
            return
        try:
            if self.active:
                self._send([(NFT_MSG_DELTABLE, text(NFTA_TABLE_NAME, self.name))])
        except (OSError, struct.error):
            pass
        finally:
            self.active = False
            self.socket.close()
            self.socket = None

    def _send(self, steps):
        """Send one transaction; -> the first error of the kernel, or 0."""
        data, expected = batch(self.sequence + 1, steps)
        self.sequence += len(expected) + 2
        self.socket.send(data)
        # A batch that cannot be had at all is answered once, at its beginning.
        first, first_code, answered = expected[0] - 1, 0, set()
        while first not in answered and not answered.issuperset(expected):
            for kind, sequence, body in messages(self.socket.recv(1 << 16)):
                if kind == NLMSG_ERROR and first <= sequence <= expected[-1] + 1:
                    answered.add(sequence)
                    first_code = first_code or error_code(body)
        return first_code
