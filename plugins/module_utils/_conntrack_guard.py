# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Keeps TCP connections alive while `_conntrack` replaces their entries.

An entry is gone for about a microsecond before its replacement is there. A packet that arrives just then belongs to no connection: an
answer is not translated back, reaches this host itself, and the host resets the connection; a request leaves with another source port,
and the peer resets the connection. Measured, on eight connections under load whose entries were replaced 40,000 times within six
seconds: all eight were reset, in each of three runs; with the guard none was.

So for the time of the replacing, a table of nf_tables drops TCP packets that belong to no connection and do not open one. TCP sends
them again. Nothing that belongs to a connection, and no new connection, is touched.

The table ends with its socket, however this process ends, where the kernel can do that (5.12 and newer); and its rules do nothing after
`LIFETIME`, so that a table left behind by an older kernel is harmless. The next guard removes it.

Sources: include/uapi/linux/netfilter/nf_tables.h; `nft --debug=netlink,mnl` for the expressions of a rule.
"""

from __future__ import annotations

import errno
import socket
import struct
import time

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

TABLE = "kubemesh-carry"
# Seconds. 50,000 connections took 12 s of processor time, and 91 s on a machine with six other things to do.
LIFETIME = 300

NFPROTO_INET = 1
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE = 0, 2, 3, 6
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFT_TABLE_F_OWNER = 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_TYPE = 1, 3, 4, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE = 1, 2, 1
NFT_REG_VERDICT, NFT_REG_1 = 0, 1
NFT_META_L4PROTO, NFT_META_TIME_NS = 16, 30
NFT_CMP_EQ, NFT_CMP_NEQ, NFT_CMP_LT = 0, 1, 2
NFT_PAYLOAD_TRANSPORT_HEADER = 2
NFT_CT_STATE = 0
NFT_BYTEORDER_HTON = 1
NF_DROP = 0

# Right after connection tracking (-200), before address translation (-100).
PRIORITY = -199
HOOKS = (("prerouting", 0), ("output", 3))

IPPROTO_TCP = 6
TCP_FLAGS_OFFSET = 13
TCP_SYN, TCP_ACK = 0x02, 0x10
# Bits of a connection's state as nf_tables has them: include/uapi/linux/netfilter/nf_conntrack_common.h, NF_CT_STATE_BIT
STATE_INVALID, STATE_NEW = 1, 8


def _number(kind, value):
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def _text(kind, value):
    return attribute(kind, value.encode("ascii") + b"\0")


def _value(kind, data):
    return nested(kind, attribute(NFTA_DATA_VALUE, data))


def _expression(name, *parts):
    return nested(NFTA_LIST_ELEM, _text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *parts))


def _compare(operation, data):
    return _expression("cmp", _number(1, NFT_REG_1), _number(2, operation), _value(3, data))


def _mask(data):
    return _expression(
        "bitwise", _number(1, NFT_REG_1), _number(2, NFT_REG_1), _number(3, len(data)), _value(4, data), _value(5, b"\0" * len(data)))


def rule_expressions(deadline):
    """The expressions of the rule: TCP, not the first packet of a connection, of no connection, before the deadline: drop.

    :param deadline: nanoseconds since the epoch.
    """
    return [
        _expression("meta", _number(1, NFT_REG_1), _number(2, NFT_META_L4PROTO)),
        _compare(NFT_CMP_EQ, struct.pack("B", IPPROTO_TCP)),
        _expression(
            "payload", _number(1, NFT_REG_1), _number(2, NFT_PAYLOAD_TRANSPORT_HEADER), _number(3, TCP_FLAGS_OFFSET), _number(4, 1)),
        _mask(struct.pack("B", TCP_SYN | TCP_ACK)),
        _compare(NFT_CMP_NEQ, struct.pack("B", TCP_SYN)),
        _expression("ct", _number(1, NFT_REG_1), _number(2, NFT_CT_STATE)),
        # The state is a number of this machine; without tracking of what is seen in the middle of a connection it is "invalid".
        _mask(struct.pack("=I", STATE_NEW | STATE_INVALID)),
        _compare(NFT_CMP_NEQ, struct.pack("=I", 0)),
        _expression("meta", _number(1, NFT_REG_1), _number(2, NFT_META_TIME_NS)),
        # Larger and smaller are only known of numbers in network order.
        _expression(
            "byteorder", _number(1, NFT_REG_1), _number(2, NFT_REG_1), _number(3, NFT_BYTEORDER_HTON), _number(4, 8), _number(5, 8)),
        _compare(NFT_CMP_LT, struct.pack("!Q", deadline)),
        _expression(
            "immediate", _number(1, NFT_REG_VERDICT), nested(2, nested(NFTA_DATA_VERDICT, _number(NFTA_VERDICT_CODE, NF_DROP)))),
    ]


def guard_batch(sequence, flags, deadline):
    """(bytes, sequence numbers that are answered) of one transaction: whatever is there goes, table, chains and rules come."""
    table = _text(NFTA_TABLE_NAME, TABLE)
    steps = [
        # A table that is made first can be removed, whether or not it was there.
        (NFT_MSG_NEWTABLE, table),
        (NFT_MSG_DELTABLE, table),
        (NFT_MSG_NEWTABLE, table + (_number(NFTA_TABLE_FLAGS, flags) if flags else b"")),
    ]
    for name, hook in HOOKS:
        steps.append((NFT_MSG_NEWCHAIN, _text(NFTA_CHAIN_TABLE, TABLE) + _text(NFTA_CHAIN_NAME, name) + nested(
            NFTA_CHAIN_HOOK, _number(NFTA_HOOK_HOOKNUM, hook), _number(NFTA_HOOK_PRIORITY, PRIORITY)) + _text(NFTA_CHAIN_TYPE, "filter")))
        steps.append((NFT_MSG_NEWRULE, _text(NFTA_RULE_TABLE, TABLE) + _text(NFTA_RULE_CHAIN, name) + nested(
            NFTA_RULE_EXPRESSIONS, *rule_expressions(deadline))))
    return _batch(sequence, steps)


def removal_batch(sequence):
    """The same for taking the table away."""
    return _batch(sequence, [(NFT_MSG_DELTABLE, _text(NFTA_TABLE_NAME, TABLE))])


def _batch(sequence, steps):
    packed = [message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, socket.AF_UNSPEC, sequence, b"", NFNL_SUBSYS_NFTABLES)]
    for number, (kind, payload) in enumerate(steps, 1):
        flags = NLM_F_REQUEST | NLM_F_ACK | (0 if kind == NFT_MSG_DELTABLE else NLM_F_CREATE)
        packed.append(message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, NFPROTO_INET, sequence + number, payload))
    last = sequence + len(steps) + 1
    packed.append(message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, socket.AF_UNSPEC, last, b"", NFNL_SUBSYS_NFTABLES))
    return b"".join(packed), list(range(sequence + 1, last))


class Guard:
    """The table, from `start` to `stop`. Raises nothing: ``active`` says whether the kernel took it."""

    def __init__(self):
        self.active = False
        self.socket = None
        self.sequence = 0

    def start(self):
        """Put the table up. Without it connections are carried over as well, only not quite as safely."""
        try:
            self.socket = open_socket()
            for flags in (NFT_TABLE_F_OWNER, 0):
                code = self._send(guard_batch, flags, (int(time.time()) + LIFETIME) * 10 ** 9)
                if code == 0:
                    self.active = True
                # An older kernel does not know that a table may have an owner; anything else it will not take without one either.
                if code not in (errno.EINVAL, errno.EOPNOTSUPP):
                    break
        except (OSError, struct.error):
            self.active = False

    def stop(self):
        """Take the table away."""
        if self.socket is None:
            return
        try:
            if self.active:
                self._send(removal_batch)
        except (OSError, struct.error):
            pass
        finally:
            self.active = False
            self.socket.close()
            self.socket = None

    def _send(self, make, *arguments):
        """Send one transaction; -> the first error of the kernel, or 0."""
        data, expected = make(self.sequence + 1, *arguments)
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
