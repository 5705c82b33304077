# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Leads packets around connections while `_conntrack` replaces their entries, so that none of them meets the gap.

Connection tracking has zones: entries of the same addresses and ports in different zones do not know of each other, and a packet finds
only those of its zone, which a rule in front of connection tracking chooses (``ct zone set``). So a connection gets a copy in a zone of
ours; one transaction leads its packets there, all at once; its entry is replaced while nobody looks at it; one transaction leads the
packets back; the copy goes. At each moment a packet finds either the entry or its copy, and both translate it alike. No packet waits, and
none needs this process: whenever it is killed, packets find their entries again at once, as the table ends with its socket.

Where an older kernel keeps the table of a killed process, its elements end by themselves, before the copies do, and nothing is led any
more. An entry that is in a zone already is not led: which of several connections of the same addresses is meant, only its owner knows.
Neither are ICMP errors, which look at the entry of the connection that they speak of: one would have to come in the very gap.

Sources: ``nft_ct_set_zone_eval`` in net/netfilter/nft_ct.c; ``nf_conntrack_in`` and ``resolve_normal_ct`` in
net/netfilter/nf_conntrack_core.c; nft_set_hash.c: what a transaction adds is seen by all packets after its commit and by none before.
"""

from __future__ import annotations

import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import attribute, nested
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nft_netlink import (
    HOOKS,
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    NFT_CMP_EQ,
    NFT_CMP_NEQ,
    NFT_META_L4PROTO,
    NFT_META_NFPROTO,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER,
    NFT_REG32_00,
    NFT_REG_1,
    NFT_SET_TIMEOUT,
    NFTA_DATA_VALUE,
    NFTA_LIST_ELEM,
    NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE,
    NFTA_SET_FLAGS,
    NFTA_SET_ID,
    NFTA_SET_KEY_LEN,
    NFTA_SET_KEY_TYPE,
    NFTA_SET_NAME,
    NFTA_SET_TABLE,
    NFTA_SET_TIMEOUT,
    OwnedTable,
    chain_step,
    compare,
    expression,
    literal,
    meta,
    number,
    payload,
    rule_step,
    text,
)

TABLE = "kubemesh-detour"
# A zone that nobody else has; those who use zones count from 1.
ZONE = 51840
# Seconds. Packets are led for milliseconds, on a busy machine a second. A copy lives longer than what leads to it.
LIFETIME = 30
COPY_LIFETIME = 2 * LIFETIME
# Connections that are led at once: two elements of each, of 56 bytes with IPv6, are one attribute, which cannot have more than 64 KiB.
CAPACITY = 512

# Right after fragments are put together (-400): before the rules of others that choose zones (-300), of which the first one counts.
PRIORITY = -399

NFT_CT_ZONE = 17
IPPROTO_ICMP, IPPROTO_ICMPV6 = 1, 58
# nft's numbers of the types in a key, for who lists the table: address, address, inet_proto, inet_service, inet_service; 6 bits each.
KEY_TYPES = {4: (7, 7, 12, 13, 13), 16: (8, 8, 12, 13, 13)}
SETS = {4: "ipv4", 16: "ipv6"}
# Offset of the source address in its header, by the length of an address; the destination address follows.
SOURCE_OFFSETS = {4: 12, 16: 8}
# Offsets of two bytes each in the header behind: the ports; identifier, and type with code.
PORTS, ICMP_QUERY = (0, 2), (4, 0)


def key(parts):
    """What a packet of a tuple (see `_conntrack.decode_tuple`) has, each field padded to 4 bytes as in the registers of nf_tables."""
    if "ports" in parts:
        first, second = parts["ports"]
    else:
        identifier, kind, code = parts["icmp"]
        first, second = identifier, kind << 8 | code
    return parts["src"] + parts["dst"] + struct.pack("!BxxxHxxHxx", parts["proto"], first, second)


def rule_expressions(length, icmp):
    """The expressions of one rule: whatever is in the set is looked up in our zone.

    :param length: bytes of an address, 4 or 16.
    :param icmp: whether the rule is for ICMP queries and answers, or for protocols with ports.
    """
    source = SOURCE_OFFSETS[length]
    ports = NFT_REG32_00 + 2 * length // 4
    first, second = ICMP_QUERY if icmp else PORTS
    return [
        meta(NFT_META_NFPROTO),
        compare(NFT_CMP_EQ, struct.pack("B", NFPROTO_IPV4 if length == 4 else NFPROTO_IPV6)),
        meta(NFT_META_L4PROTO),
        compare(NFT_CMP_EQ if icmp else NFT_CMP_NEQ, struct.pack("B", IPPROTO_ICMP if length == 4 else IPPROTO_ICMPV6)),
        payload(NFT_PAYLOAD_NETWORK_HEADER, source, length, NFT_REG32_00),
        payload(NFT_PAYLOAD_NETWORK_HEADER, source + length, length, NFT_REG32_00 + length // 4),
        meta(NFT_META_L4PROTO, ports),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, first, 2, ports + 1),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, second, 2, ports + 2),
        expression("lookup", text(1, SETS[length]), number(2, NFT_REG32_00)),
        # The zone is a number of this machine.
        expression("immediate", number(1, NFT_REG_1), literal(2, struct.pack("=H", ZONE))),
        expression("ct", number(2, NFT_CT_ZONE), number(4, NFT_REG_1)),
    ]


def set_step(length):
    """The set of the keys that are led, of one length of addresses; an element that nobody takes out ends after LIFETIME."""
    types = 0
    for kind in KEY_TYPES[length]:
        types = types << 6 | kind
    return NFT_MSG_NEWSET, (
        text(NFTA_SET_TABLE, TABLE) + text(NFTA_SET_NAME, SETS[length]) + number(NFTA_SET_FLAGS, NFT_SET_TIMEOUT)
        + number(NFTA_SET_KEY_TYPE, types) + number(NFTA_SET_KEY_LEN, 2 * length + 12) + number(NFTA_SET_ID, length)
        + attribute(NFTA_SET_TIMEOUT, struct.pack("!Q", LIFETIME * 1000)))


def detour_steps():
    """Sets, chains and rules of the table."""
    steps = [set_step(length) for length in SETS]
    for name, hook in HOOKS:
        steps.append(chain_step(TABLE, name, hook, PRIORITY))
        steps += [rule_step(TABLE, name, rule_expressions(length, icmp)) for length in SETS for icmp in (False, True)]
    return steps


def lead_steps(keys):
    """From now on packets that have one of the keys are led."""
    steps = []
    for length, name in SETS.items():
        elements = [
            nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, one)))
            for one in sorted(keys) if len(one) == 2 * length + 12]
        if elements:
            steps.append((NFT_MSG_NEWSETELEM, _set_named(name) + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *elements)))
    return steps


def release_steps():
    """From now on no packet is led: without elements, all of a set are meant."""
    return [(NFT_MSG_DELSETELEM, _set_named(name)) for name in SETS.values()]


def _set_named(name):
    return text(NFTA_SET_ELEM_LIST_TABLE, TABLE) + text(NFTA_SET_ELEM_LIST_SET, name)


def wait_for_packets():
    """Return when every packet that is between our rule and connection tracking now has come through. OSError where that cannot be had.

    A packet passes all of a hook within one read section of RCU (``nf_hook`` in include/linux/netfilter.h). The commit of a transaction
    does not wait for those (``nf_tables_commit`` in net/netfilter/nf_tables_api.c), closing a packet socket does (``packet_release`` in
    net/packet/af_packet.c: ``synchronize_net``). This one is of no protocol, so it is given no packet. Measured: 8 to 20 ms.
    """
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


class Detour(OwnedTable):
    """The table, from `start` to `stop`. Raises nothing."""

    def __init__(self):
        super().__init__(TABLE)

    def start(self):
        """Put the table up; nothing is led yet."""
        self.put_up(detour_steps())

    def lead(self, connections):
        """Lead the packets of decoded connections, which have their copies, around them; -> whether that is so when this returns."""
        try:
            self.change(lead_steps({key(connection[side]) for connection in connections for side in ("orig", "reply")}))
            wait_for_packets()
        except (OSError, struct.error):
            self.stop()
        return self.active

    def release(self):
        """Let all packets find their own entries again; -> whether none is on its way to a copy any more."""
        try:
            if self.active:
                self.change(release_steps())
            wait_for_packets()
        except (OSError, struct.error):
            self.stop()
            return False
        return True
