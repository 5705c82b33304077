# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Keeps TCP connections alive while `_conntrack` replaces their entries.

Where packets cannot be led around by `_conntrack_detour`, an entry is gone for microseconds before its replacement is there, or for as
long as the processor is taken away just then. A packet that arrives in that time belongs to no connection: an answer is not translated
back, reaches this host itself, and the host resets the connection; a request leaves with another source port, and the peer resets the
connection. Measured, on eight connections under load whose entries were replaced 40,000 times within six seconds: all eight were reset,
in each of three runs; with the guard none was.

So for the time of the replacing, a table of nf_tables drops TCP packets that belong to no connection and do not open one. TCP sends
them again. Nothing that belongs to a connection, and no new connection, is touched.

The table ends with its socket where the kernel can do that (5.12 and newer); and its rules do nothing after `LIFETIME`, so that a table
left behind by an older kernel is harmless. The next guard removes it.

Source: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import nested
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nft_netlink import (
    HOOKS,
    NFT_CMP_EQ,
    NFT_CMP_LT,
    NFT_CMP_NEQ,
    NFT_META_L4PROTO,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_REG_1,
    NFT_REG_VERDICT,
    NFTA_DATA_VERDICT,
    NFTA_VERDICT_CODE,
    OwnedTable,
    chain_step,
    compare,
    expression,
    mask,
    meta,
    number,
    payload,
    rule_step,
)

TABLE = "kubemesh-carry"
# Seconds. 50,000 connections took 13 s of processor time; with less to do for each, they took 91 s on a machine with six other things.
LIFETIME = 300

NFT_META_TIME_NS = 30
NFT_CT_STATE = 0
NFT_BYTEORDER_HTON = 1
NF_DROP = 0

# Right after connection tracking (-200), before address translation (-100).
PRIORITY = -199

IPPROTO_TCP = 6
TCP_FLAGS_OFFSET = 13
TCP_SYN, TCP_ACK = 0x02, 0x10
# Bits of a connection's state as nf_tables has them: include/uapi/linux/netfilter/nf_conntrack_common.h, NF_CT_STATE_BIT
STATE_INVALID, STATE_NEW = 1, 8


def rule_expressions(deadline):
    """The expressions of the rule: TCP, not the first packet of a connection, of no connection, before the deadline: drop.

    :param deadline: nanoseconds since the epoch.
    """
    return [
        meta(NFT_META_L4PROTO),
        compare(NFT_CMP_EQ, struct.pack("B", IPPROTO_TCP)),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, TCP_FLAGS_OFFSET, 1),
        mask(struct.pack("B", TCP_SYN | TCP_ACK)),
        compare(NFT_CMP_NEQ, struct.pack("B", TCP_SYN)),
        expression("ct", number(1, NFT_REG_1), number(2, NFT_CT_STATE)),
        # The state is a number of this machine; without tracking of what is seen in the middle of a connection it is "invalid".
        mask(struct.pack("=I", STATE_NEW | STATE_INVALID)),
        compare(NFT_CMP_NEQ, struct.pack("=I", 0)),
        meta(NFT_META_TIME_NS),
        # Larger and smaller are only known of numbers in network order.
        expression("byteorder", number(1, NFT_REG_1), number(2, NFT_REG_1), number(3, NFT_BYTEORDER_HTON), number(4, 8), number(5, 8)),
        compare(NFT_CMP_LT, struct.pack("!Q", deadline)),
        expression(
            "immediate", number(1, NFT_REG_VERDICT), nested(2, nested(NFTA_DATA_VERDICT, number(NFTA_VERDICT_CODE, NF_DROP)))),
    ]


def guard_steps(deadline):
    """Chains and rules of the table."""
    steps = []
    for name, hook in HOOKS:
        steps += [chain_step(TABLE, name, hook, PRIORITY), rule_step(TABLE, name, rule_expressions(deadline))]
    return steps


class Guard(OwnedTable):
    """The table, from `start` to `stop`. Raises nothing."""

    def __init__(self):
        super().__init__(TABLE)

    def start(self):
        """Put the table up. Without it connections are carried over as well, only not quite as safely."""
        self.put_up(guard_steps((int(time.time()) + LIFETIME) * 10 ** 9))
