# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Carry masqueraded connections over a change of their outgoing device.

The kernel drops one packet of every established masqueraded connection whose outgoing device changes, and forgets the connection
(``nf_nat_oif_changed`` in net/netfilter/nf_nat_core.c). Where pods are masqueraded (kubenet, NodePort, ``--random-fully``) the switch
of a node would thus cost each such connection a packet, and those that come back with another source port are reset by the peer.

A connection whose source was translated to a *given* address has no such memory of its device. So each connection that is about
to change devices is replaced, before the switch, by itself: the same tuples, mark, zone, labels, helper, state and time-out, translated to
the very address and port it has now. Delete and create travel in one netlink message; the kernel handles them back to back.

A dump takes milliseconds, on busy nodes a second. What begins meanwhile is told by the kernel as it begins, and is replaced last, so that
a switch right after it meets as good as no connection that remembers the old device.

In the moment between delete and create a packet would find no connection: microseconds, but milliseconds where the processor is taken
away just then. So some hundred connections at a time are led around it by `_conntrack_detour`: their packets find a copy, and not one is
lost. Where the kernel cannot do that, `_conntrack_guard` drops the packet if it is TCP, so that it is sent again and not answered by a
reset; if it is not, it is lost, and what it left behind is removed.

What the kernel does not let us set starts anew: counters, the time at which the connection began, and the sequence window of TCP. For the
window the connection is marked liberal, so that no packet of it is judged invalid (kube-proxy drops those). An FTP helper is kept; what it
knew of a command under way is not.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h, nf_conntrack_tcp.h; ``ctnetlink_create_conntrack`` in
net/netfilter/nf_conntrack_netlink.c; net/netfilter/nf_conntrack_proto_tcp.c.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils._conntrack_detour import CAPACITY, COPY_LIFETIME, ZONE, Detour
from ansible_collections.kubemesh.wireguard.plugins.module_utils._conntrack_guard import Guard
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import (
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    attributes,
    error_code,
    message,
    messages,
    nested,
    open_socket,
)

PACKED_ZONE = struct.pack("!H", ZONE)
NFNL_SUBSYS_CTNETLINK = 1
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
NFNLGRP_CONNTRACK_NEW = 1
IPCTNL_MSG_CT_NEW = 0
IPCTNL_MSG_CT_GET = 1
IPCTNL_MSG_CT_DELETE = 2

CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_PROTOINFO = 4
CTA_HELP = 5
CTA_NAT_SRC = 6
CTA_TIMEOUT = 7
CTA_MARK = 8
CTA_ID = 12
CTA_NAT_DST = 13
CTA_TUPLE_MASTER = 14
CTA_SEQ_ADJ_ORIG = 15
CTA_SEQ_ADJ_REPLY = 16
CTA_ZONE = 18
CTA_LABELS = 22
CTA_SYNPROXY = 24
CTA_STATUS_MASK = 26

CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_TUPLE_ZONE = 3
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE = 4, 5, 6
CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE = 7, 8, 9
CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP, CTA_NAT_PROTO, CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP = 1, 2, 3, 4, 5
CTA_PROTONAT_PORT_MIN, CTA_PROTONAT_PORT_MAX = 1, 2
CTA_PROTOINFO_TCP = 1
CTA_PROTOINFO_TCP_STATE, CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, CTA_PROTOINFO_TCP_WSCALE_REPLY = 1, 2, 3
CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY = 4, 5
IP_CT_TCP_FLAG_WINDOW_SCALE, IP_CT_TCP_FLAG_SACK_PERM, IP_CT_TCP_FLAG_CLOSE_INIT = 0x01, 0x02, 0x04
IP_CT_TCP_FLAG_BE_LIBERAL = 0x08
# What was negotiated, and who began to close. The other flags speak of sequence numbers that the new entry does not know: with MAXACK_SET
# and no highest acknowledgement, half of all valid resets are judged invalid.
TCP_FLAGS_CARRIED = IP_CT_TCP_FLAG_WINDOW_SCALE | IP_CT_TCP_FLAG_SACK_PERM | IP_CT_TCP_FLAG_CLOSE_INIT
TCP_CONNTRACK_ESTABLISHED, TCP_CONNTRACK_TIME_WAIT, TCP_CONNTRACK_CLOSE = 3, 7, 8
# SYN_SENT, SYN_RECV, SYN_SENT2
TCP_CONNTRACK_OPENING = (1, 2, 9)

IPS_SEEN_REPLY = 0x2
IPS_ASSURED = 0x4
IPS_CONFIRMED = 0x8
IPS_SRC_NAT = 0x10
IPS_DST_NAT = 0x20
# Packets do not extend its life.
IPS_FIXED_TIMEOUT = 0x400
# What may be carried over. The NAT bits come from the NAT attributes; without IPS_CONFIRMED the kernel answers EBUSY.
IPS_CARRIED = IPS_SEEN_REPLY | IPS_ASSURED

# Entries of the reader's network namespace.
COUNT_FILE = "/proc/sys/net/netfilter/nf_conntrack_count"

# What goes from the old entry to the new one as it is.
CARRIED_AS_IS = (CTA_HELP, CTA_SEQ_ADJ_ORIG, CTA_SEQ_ADJ_REPLY, CTA_SYNPROXY)
# Times that a replacement is tried where packets in between made connections of their own.
TRIES = 4
# Seconds that an entry lives at least: one that is about to time out must not do so while it is replaced, or between two passes.
MINIMUM_LIFETIME = 30
# Seconds that one lives whose end passed while it was led around; those of the states of TCP behind ESTABLISHED are 10 to 120.
CLOSING_LIFETIME = 120
# Passes that are added where more connections begin than the kernel can tell of.
MORE_PASSES = 3
# Times that the kernel is asked what began while those that had begun were replaced: each is shorter than the one before.
READS = 4

IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP = 6, 17, 132
IPPROTO_ICMP, IPPROTO_ICMPV6 = 1, 58
PORT_PROTOCOLS = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP)


def decode_tuple(data):
    """A CTA_TUPLE as {"src", "dst": packed bytes, "proto": int, "zone": of this direction only or None, "ports" | "icmp": (…)}."""
    parts = attributes(data)
    ip, proto = attributes(parts.get(CTA_TUPLE_IP, b"")), attributes(parts.get(CTA_TUPLE_PROTO, b""))
    decoded = {
        "src": ip.get(CTA_IP_V4_SRC) or ip.get(CTA_IP_V6_SRC) or b"",
        "dst": ip.get(CTA_IP_V4_DST) or ip.get(CTA_IP_V6_DST) or b"",
        "proto": proto.get(CTA_PROTO_NUM, b"\0")[0],
        "zone": struct.unpack("!H", parts[CTA_TUPLE_ZONE])[0] if CTA_TUPLE_ZONE in parts else None,
    }
    if CTA_PROTO_SRC_PORT in proto:
        decoded["ports"] = (struct.unpack("!H", proto[CTA_PROTO_SRC_PORT])[0], struct.unpack("!H", proto[CTA_PROTO_DST_PORT])[0])
    elif CTA_PROTO_ICMP_ID in proto:
        decoded["icmp"] = (struct.unpack("!H", proto[CTA_PROTO_ICMP_ID])[0], proto[CTA_PROTO_ICMP_TYPE][0], proto[CTA_PROTO_ICMP_CODE][0])
    elif CTA_PROTO_ICMPV6_ID in proto:
        decoded["icmp"] = (
            struct.unpack("!H", proto[CTA_PROTO_ICMPV6_ID])[0], proto[CTA_PROTO_ICMPV6_TYPE][0], proto[CTA_PROTO_ICMPV6_CODE][0])
    return decoded


def encode_tuple(kind, parts):
    """The inverse of decode_tuple, as a CTA_TUPLE_ORIG or CTA_TUPLE_REPLY attribute."""
    src, dst, proto, ports, icmp = parts["src"], parts["dst"], parts["proto"], parts.get("ports"), parts.get("icmp")
    source, target = (CTA_IP_V4_SRC, CTA_IP_V4_DST) if len(src) == 4 else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    layer4 = [attribute(CTA_PROTO_NUM, struct.pack("B", proto))]
    if ports is not None:
        layer4 += [attribute(CTA_PROTO_SRC_PORT, struct.pack("!H", ports[0])), attribute(CTA_PROTO_DST_PORT, struct.pack("!H", ports[1]))]
    elif icmp is not None:
        base = CTA_PROTO_ICMP_ID if proto == IPPROTO_ICMP else CTA_PROTO_ICMPV6_ID
        layer4 += [
            attribute(base, struct.pack("!H", icmp[0])),
            attribute(base + 1, struct.pack("B", icmp[1])),
            attribute(base + 2, struct.pack("B", icmp[2])),
        ]
    zone = [attribute(CTA_TUPLE_ZONE, struct.pack("!H", parts["zone"]))] if parts["zone"] is not None else []
    return nested(kind, nested(CTA_TUPLE_IP, attribute(source, src), attribute(target, dst)), nested(CTA_TUPLE_PROTO, *layer4), *zone)


def untranslated_answer(orig, reply):
    """The tuple of the answers as it would be if nothing were translated; the zone is what the answers have."""
    turned = {"src": orig["dst"], "dst": orig["src"], "proto": orig["proto"], "zone": reply["zone"]}
    if "ports" in orig:
        turned["ports"] = (orig["ports"][1], orig["ports"][0])
    elif "icmp" in orig:
        turned["icmp"] = inverse_icmp(orig["icmp"])
    return turned


def identity_of(parts):
    """What tells a connection from all others, of its attributes. The kernel's id alone has 32 bits: of 50,000 two may have the same."""
    return parts.get(CTA_ID), parts.get(CTA_TUPLE_ORIG)


def decode_connection(family, data):
    """One dumped conntrack entry (the attributes behind nfgenmsg) as plain data.

    Returns {"family", "orig", "reply", "status", "timeout", "mark", "zone", "labels", "id", "identity", "child": whether another connection
    announced it, "tcp", "protoinfo": of a protocol other than TCP, as it came, "as_is": {attribute: payload}}; keys whose attribute is
    missing are None.
    """
    parts = attributes(data)

    def number(kind, form):
        return struct.unpack(form, parts[kind])[0] if kind in parts else None

    tcp = None
    if CTA_PROTOINFO in parts:
        info = attributes(attributes(parts[CTA_PROTOINFO]).get(CTA_PROTOINFO_TCP, b""))
        if CTA_PROTOINFO_TCP_STATE in info:
            tcp = {
                "state": info[CTA_PROTOINFO_TCP_STATE][0],
                "wscale": (
                    info.get(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, b"\0")[0],
                    info.get(CTA_PROTOINFO_TCP_WSCALE_REPLY, b"\0")[0],
                ),
                "flags": (
                    info.get(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, b"\0\0")[0],
                    info.get(CTA_PROTOINFO_TCP_FLAGS_REPLY, b"\0\0")[0],
                ),
            }
    return {
        "family": family,
        "orig": decode_tuple(parts.get(CTA_TUPLE_ORIG, b"")),
        "reply": decode_tuple(parts.get(CTA_TUPLE_REPLY, b"")),
        "status": number(CTA_STATUS, "!I") or 0,
        "timeout": number(CTA_TIMEOUT, "!I"),
        "mark": number(CTA_MARK, "!I"),
        "zone": number(CTA_ZONE, "!H"),
        "labels": parts.get(CTA_LABELS),
        "id": parts.get(CTA_ID),
        "identity": identity_of(parts),
        "child": CTA_TUPLE_MASTER in parts,
        "tcp": tcp,
        "protoinfo": parts.get(CTA_PROTOINFO) if tcp is None else None,
        "as_is": {kind: parts[kind] for kind in CARRIED_AS_IS if kind in parts},
    }


def must_move(connection, networks):
    """Whether a connection is source-translated, towards one of our networks, and of a kind that can be carried over.

    networks: {4: [(first, last)], 16: [(first, last)]} of packed addresses by their length, sorted, see `packed_networks`.
    """
    if not connection["status"] & IPS_SRC_NAT or connection["timeout"] is None or connection["zone"] == ZONE:
        return False
    # What a helper announced (data of FTP) got its addresses from its parent and has no memory of a device.
    if connection["child"] or (connection["tcp"] and connection["tcp"]["state"] in (TCP_CONNTRACK_TIME_WAIT, TCP_CONNTRACK_CLOSE)):
        return False
    orig, reply = connection["orig"], connection["reply"]
    if orig["proto"] not in PORT_PROTOCOLS + (IPPROTO_ICMP, IPPROTO_ICMPV6) or len(orig["src"]) != len(reply["src"]):
        return False
    # Where the packets go after any destination translation is the source of the answers.
    return contains(networks, reply["src"])


def packed_networks(cidrs):
    """CIDR texts as what `contains` searches: {address length in bytes: sorted, disjoint [(first, last)] packed}."""
    found = {4: [], 16: []}
    for cidr in cidrs:
        network = ipaddress.ip_network(cidr)
        found[4 if network.version == 4 else 16].append(network)
    # The pod CIDRs of one node may be nested, and a node address may lie in one of them.
    return {length: [(network.network_address.packed, network.broadcast_address.packed)
                     for network in ipaddress.collapse_addresses(networks)] for length, networks in found.items()}


def contains(networks, address):
    """Whether a packed address is in one of the (disjoint) packed networks; a binary search, for busy nodes and large meshes."""
    ranges = networks.get(len(address), [])
    low, high = 0, len(ranges)
    while low < high:
        middle = (low + high) // 2
        if ranges[middle][1] < address:
            low = middle + 1
        else:
            high = middle
    return low < len(ranges) and ranges[low][0] <= address


def inverse_icmp(icmp):
    """Identifier, type and code of the answer to an ICMP query (``nf_conntrack_invert_icmp_tuple``)."""
    answers = {8: 0, 0: 8, 13: 14, 14: 13, 15: 16, 16: 15, 17: 18, 18: 17, 128: 129, 129: 128}
    return (icmp[0], answers.get(icmp[1], icmp[1]), icmp[2])


def delete_attributes(connection):
    """The attributes that name one entry to the kernel: its tuple, zone and id (the id guards against a reused tuple).

    Never without a tuple: that would name all entries.
    """
    parts = [encode_tuple(CTA_TUPLE_ORIG, connection["orig"])]
    if connection["zone"] is not None:
        parts.append(attribute(CTA_ZONE, struct.pack("!H", connection["zone"])))
    if connection["id"] is not None:
        parts.append(attribute(CTA_ID, connection["id"]))
    return b"".join(parts)


def has_no_zone(connection):
    """Whether the addresses and ports of packets alone tell that they are of this connection."""
    return all(zone is None for zone in (connection["zone"], connection["orig"]["zone"], connection["reply"]["zone"]))


def copy_of(connection):
    """The same connection in the zone of the detour; nobody has to end it."""
    return dict(connection, id=None, zone=ZONE, timeout=COPY_LIFETIME, status=connection["status"] | IPS_FIXED_TIMEOUT)


def end_attributes(connection, after):
    """What a copy saw of the end of its connection, as attributes that tell the entry, which did not see it; None where that is nothing.

    :param connection: as it was when the copy was made.
    :param after: the copy when packets no longer found it.
    """
    if connection["tcp"] is not None:
        if after["tcp"] is None or after["tcp"]["state"] == carried_state(connection["tcp"]["state"]):
            return None
        state = attribute(CTA_PROTOINFO_TCP_STATE, struct.pack("B", after["tcp"]["state"]))
        info = nested(CTA_PROTOINFO, nested(CTA_PROTOINFO_TCP, state))
    else:
        if after["protoinfo"] is None or after["protoinfo"] == connection["protoinfo"]:
            return None
        info = attribute(CTA_PROTOINFO | NLA_F_NESTED, after["protoinfo"])
    return encode_tuple(CTA_TUPLE_ORIG, connection["orig"]) + attribute(CTA_TIMEOUT, struct.pack("!I", CLOSING_LIFETIME)) + info


def create_attributes(connection):
    """The attributes that make the same connection anew, its source translated to the address and port it has, without a device.

    The kernel wants the reply tuple as if nothing were translated, and applies the translations to it.
    """
    orig, reply = connection["orig"], connection["reply"]
    parts = [encode_tuple(CTA_TUPLE_ORIG, orig), encode_tuple(CTA_TUPLE_REPLY, untranslated_answer(orig, reply))]
    if connection["status"] & IPS_DST_NAT:
        parts.append(encode_nat(CTA_NAT_DST, reply["src"], reply["ports"][0] if "ports" in reply else None))
    source_port = reply["ports"][1] if "ports" in reply else (reply["icmp"][0] if "icmp" in reply else None)
    parts.append(encode_nat(CTA_NAT_SRC, reply["dst"], source_port))
    status = connection["status"] & (IPS_CARRIED | IPS_FIXED_TIMEOUT) | IPS_CONFIRMED
    if connection["tcp"] is not None and connection["tcp"]["state"] in TCP_CONNTRACK_OPENING:
        # An established one has been answered, or its next packet would count as a new connection that does not begin with SYN.
        status |= IPS_SEEN_REPLY
    parts.append(attribute(CTA_STATUS, struct.pack("!I", status)))
    parts.append(attribute(CTA_TIMEOUT, struct.pack("!I", max(connection["timeout"], MINIMUM_LIFETIME))))
    if connection["mark"]:
        parts.append(attribute(CTA_MARK, struct.pack("!I", connection["mark"])))
    if connection["zone"] is not None:
        parts.append(attribute(CTA_ZONE, struct.pack("!H", connection["zone"])))
    if connection["labels"] and any(connection["labels"]):
        parts.append(attribute(CTA_LABELS, connection["labels"]))
    tcp = connection["tcp"]
    if tcp is not None:
        # Flags, then the mask of those that are meant.
        kept = [flags & TCP_FLAGS_CARRIED | IP_CT_TCP_FLAG_BE_LIBERAL for flags in tcp["flags"]]
        flags = [struct.pack("BB", number, TCP_FLAGS_CARRIED | IP_CT_TCP_FLAG_BE_LIBERAL) for number in kept]
        parts.append(nested(CTA_PROTOINFO, nested(
            CTA_PROTOINFO_TCP,
            attribute(CTA_PROTOINFO_TCP_STATE, struct.pack("B", carried_state(tcp["state"]))),
            attribute(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, struct.pack("B", tcp["wscale"][0])),
            attribute(CTA_PROTOINFO_TCP_WSCALE_REPLY, struct.pack("B", tcp["wscale"][1])),
            attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, flags[0]),
            attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, flags[1]))))
    elif connection["protoinfo"] is not None:
        parts.append(attribute(CTA_PROTOINFO | NLA_F_NESTED, connection["protoinfo"]))
    parts += [attribute(kind | NLA_F_NESTED, payload) for kind, payload in sorted(connection["as_is"].items())]
    return b"".join(parts)


def carried_state(state):
    """The state of TCP in which a connection is made anew.

    One that is being opened is taken as established: its next packet may have come since it was read, and an answer that was missed would
    make everything after it invalid (``tcp_conntracks`` in nf_conntrack_proto_tcp.c: ACK in SYN_SENT is sIV, SYN/ACK in ESTABLISHED is let
    through). Its time-out stays that of an opening until a packet comes.
    """
    return TCP_CONNTRACK_ESTABLISHED if state in TCP_CONNTRACK_OPENING else state


def encode_nat(kind, address, port):
    """A translation to exactly one address and, where the protocol has one, one port or identifier."""
    low, high = (CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP) if len(address) == 4 else (CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP)
    parts = [attribute(low, address), attribute(high, address)]
    if port is not None:
        packed = struct.pack("!H", port)
        parts.append(nested(CTA_NAT_PROTO, attribute(CTA_PROTONAT_PORT_MIN, packed), attribute(CTA_PROTONAT_PORT_MAX, packed)))
    return nested(kind, *parts)


class Conntrack:
    """A ctnetlink socket. OSError where the kernel has no connection tracking by netlink (then nothing is masqueraded by it either)."""

    def __init__(self):
        self.socket = open_socket()
        self.sequence = 0

    def close(self):
        self.socket.close()

    def dump(self, family, known=()):
        """Every source-translated connection of an address family (AF_INET, AF_INET6) whose identity is not known yet, decoded."""
        self.sequence += 1
        # Linux 5.15 and newer filter by status themselves; older ones ignore the attributes and send all, filtered by must_move.
        status = struct.pack("!I", IPS_SRC_NAT)
        request = attribute(CTA_STATUS, status) + attribute(CTA_STATUS_MASK, status)
        self.socket.send(_message(IPCTNL_MSG_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, self.sequence, request))
        while True:
            for kind, sequence, body in messages(self.socket.recv(1 << 18)):
                if sequence != self.sequence:
                    continue
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    code = error_code(body)
                    raise OSError(code, os.strerror(code))
                # Decoding costs more than everything else here, and most of a second pass is known.
                if identity_of(attributes(body[4:])) not in known:
                    yield decode_connection(family, body[4:])

    def exchange(self, family, requests):
        """Send several requests, (message, flags, attributes) each, as one message. -> ([errno of each], last entry that came or None)."""
        first = self.sequence + 1
        self.sequence += len(requests)
        self.socket.send(b"".join(
            _message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, family, first + place, payload)
            for place, (kind, flags, payload) in enumerate(requests)))
        answers, entry = {}, None
        while len(answers) < len(requests):
            for kind, sequence, body in messages(self.socket.recv(1 << 16)):
                if not first <= sequence <= self.sequence:
                    continue
                if kind == NLMSG_ERROR:
                    answers[sequence - first] = error_code(body)
                else:
                    entry = decode_connection(family, body[4:])
        return [answers[place] for place in range(len(requests))], entry

    def get(self, connection):
        """The same connection as it is now, or None when it is gone or another one has its addresses and ports."""
        named = delete_attributes(dict(connection, id=None))
        dummy, now = self.exchange(connection["family"], [(IPCTNL_MSG_CT_GET, 0, named)])
        return now if now is not None and now["id"] == connection["id"] else None

    def copy(self, connection):
        """Make the copy of a connection in the zone of the detour; -> whether it is there."""
        family, copy = connection["family"], copy_of(connection)
        made = (IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, create_attributes(copy))
        requests = [made]
        if connection["timeout"] < MINIMUM_LIFETIME:
            # Its packets extend the life of the copy only.
            requests.append((IPCTNL_MSG_CT_NEW, 0, delete_attributes(connection) + attribute(
                CTA_TIMEOUT, struct.pack("!I", MINIMUM_LIFETIME))))
        code = self.exchange(family, requests)[0][0]
        if code == errno.EEXIST:
            # Left by a run that was killed.
            code = self.exchange(family, [(IPCTNL_MSG_CT_DELETE, 0, delete_attributes(copy)), made])[0][1]
        return code == 0

    def remove_copy(self, connection):
        """Remove the copy of a connection, which nobody looks at any more, and keep what it saw of the connection's end."""
        family, named = connection["family"], delete_attributes(copy_of(connection))
        has_states = connection["tcp"] is not None or connection["protoinfo"] is not None
        looked = [(IPCTNL_MSG_CT_GET, 0, named)] if has_states else []
        dummy, after = self.exchange(family, looked + [(IPCTNL_MSG_CT_DELETE, 0, named)])
        end = end_attributes(connection, after) if after is not None else None
        if end:
            self.exchange(family, [(IPCTNL_MSG_CT_NEW, 0, end)])

    def replace(self, connection):
        """Replace one entry by itself, translated without a device.

        Returns (0, identity of the new entry), or (errno of the step that did not work, None).
        """
        family = connection["family"]
        # A dump takes time; a connection that was closed since must not come back as an established one that lives for days.
        connection = self.get(connection)
        if connection is None:
            return errno.ENOENT, None
        anew = [
            (IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, create_attributes(connection)),
            (IPCTNL_MSG_CT_GET, 0, delete_attributes(dict(connection, id=None)))]
        (gone, code, dummy), made = self.exchange(family, [(IPCTNL_MSG_CT_DELETE, 0, delete_attributes(connection))] + anew)
        if gone:
            if code == 0 and made is not None:
                # It ended by itself just now, and what was made is nobody's.
                self.exchange(family, [(IPCTNL_MSG_CT_DELETE, 0, delete_attributes(made))])
            return gone, None
        for dummy in range(TRIES):
            if code != errno.EEXIST:
                break
            # A packet that came in between made a connection of its own, of either direction.
            in_the_way = [
                (IPCTNL_MSG_CT_DELETE, 0, delete_attributes(dict(connection, id=None, orig=connection[side])))
                for side in ("orig", "reply")]
            (dummy1, dummy2, code, dummy3), made = self.exchange(family, in_the_way + anew)
        return code, made["identity"] if code == 0 and made is not None else None


class Begun:
    """Connections that begin from now on, as the kernel tells of them. OSError where it does not."""

    def __init__(self):
        self.socket = open_socket()
        try:
            self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_CONNTRACK_NEW)
            self.socket.setblocking(False)
        except OSError:
            self.socket.close()
            raise

    def close(self):
        self.socket.close()

    def read(self, known=()):
        """(connections that began since the last call and whose identity is not known yet, whether all of them)."""
        found, complete = [], True
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return found, complete
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
                complete = False
                continue
            for dummy, dummy2, body in messages(data):
                parts = attributes(body[4:])
                # Most of them are those that we made, and decoding costs more than all the rest.
                if identity_of(parts) not in known and parts.get(CTA_ZONE) != PACKED_ZONE:
                    found.append(decode_connection(struct.unpack_from("=B", body)[0], body[4:]))

    def forget(self):
        """What a pass that begins now will see by itself."""
        while True:
            try:
                self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise


def tracks_any(path=COUNT_FILE):
    """Whether any connection of this network namespace is tracked. Nodes whose CNI does without connection tracking have none.

    Connections whose first packet is still on its way through the kernel count (``__nf_conntrack_alloc``), so none can be overlooked
    between this and the first that a `Begun` of before tells of.
    """
    try:
        with open(path, encoding="ascii") as handle:
            return int(handle.read()) != 0
    except (OSError, ValueError):
        return True  # unknown: a dump tells


def _message(kind, flags, family, sequence, payload):
    return message(NFNL_SUBSYS_CTNETLINK << 8 | kind, flags, family, sequence, payload)


class Carrier:
    """Replaces connections towards some networks and counts; guard and detour go up before the first."""

    def __init__(self, networks, done):
        self.networks, self.done = networks, done
        self.families = [family for family, length in ((socket.AF_INET, 4), (socket.AF_INET6, 16)) if networks[length]]
        self.result = {"replaced": 0, "left": 0, "guarded": False, "detoured": False, "exposed": 0, "error": ""}
        self.guard, self.detour = Guard(), Detour()
        self.started = False
        self.met = False  # whether the last pass found anything to replace
        self.clients = []

    def run(self, passes):
        """Replace what there is, so many times and then until the kernel told of all that began. Raises nothing.

        A pass that meets nothing is the last: the next one is for what began while connections were replaced. A pass takes 10 ms of the
        processor where there are few connections, for the kernel's table of 262,144 places, and next to nothing where there are none.
        """
        try:
            # One reads while the other replaces: what is replaced was read moments before, however many there are.
            for make in (Conntrack, Conntrack, Begun)[len(self.clients):]:
                self.clients.append(make())
            complete = False
            for number in range(passes + MORE_PASSES):
                if complete and (number >= passes or not self.met):
                    break
                complete = self.run_pass()
        except (OSError, struct.error) as exc:
            self.result["error"] = "connection tracking failed: %s" % exc
            # What comes next does not read the answers to this.
            self.disconnect()

    def close(self):
        if self.started:
            self.detour.stop()
            self.guard.stop()
        self.disconnect()

    def disconnect(self):
        while self.clients:
            self.clients.pop().close()

    def concerns(self, connection):
        """Whether a connection is one of those that must move and have not been replaced."""
        return connection["identity"] not in self.done and connection["family"] in self.families and must_move(connection, self.networks)

    def replace_all(self, connections, led=True):
        """Replace connections, as many at a time as can be led around.

        :param led: whether their packets are led around where that is possible.
        """
        for first in range(0, len(connections), CAPACITY):
            self.replace_some(connections[first:first + CAPACITY], led)

    def replace_some(self, connections, led):
        """Replace no more connections than can be led around at once."""
        self.met = self.met or bool(connections)
        if not self.started:
            self.started = True
            self.guard.start()
            self.detour.start()
            self.result.update(guarded=self.guard.active, detoured=self.detour.active)
        writer = self.clients[1]
        copied = [one for one in connections if has_no_zone(one) and writer.copy(one)] if led and self.detour.active else []
        try:
            safe = {one["identity"] for one in copied} if copied and self.detour.lead(copied) else set()
            for connection in connections:
                self.replace(connection, connection["identity"] in safe)
        finally:
            # What cannot be removed ends by itself.
            if copied and self.detour.release():
                for connection in copied:
                    writer.remove_copy(connection)
            self.result["detoured"] = self.detour.active

    def replace(self, connection, safe):
        """Replace one connection. safe: whether no packet can meet it while that happens."""
        code, made = self.clients[1].replace(connection)
        if code == 0:
            self.result["replaced"] += 1
            self.result["exposed"] += not safe and connection["orig"]["proto"] != IPPROTO_TCP
            self.done.add(made)
        elif code not in (errno.ENOENT, errno.EEXIST):
            self.result["left"] += 1
            self.result["error"] = os.strerror(code)

    def run_pass(self):
        """Replace what there is, then what began meanwhile; -> whether that is all."""
        reader, dummy, begun = self.clients
        begun.forget()
        self.result["left"], self.met = 0, False
        newcomers, complete = [], True

        def listen():
            """Read what began; -> whether that is all. Often enough that the kernel need not keep more than it can."""
            found, all_of_them = begun.read(self.done)
            newcomers.extend(one for one in found if self.concerns(one))
            return all_of_them

        some = []
        for family in self.families if tracks_any() else ():
            for connection in reader.dump(family, self.done):
                if self.concerns(connection):
                    some.append(connection)
                if len(some) == CAPACITY:
                    self.replace_all(some)
                    some = []
                    complete = listen() and complete
        self.replace_all(some)
        for number in range(READS):
            complete = listen() and complete
            if not newcomers:
                break
            some, newcomers[:] = list(newcomers), []
            # A detour takes tens of milliseconds, in which the next ones begin: the last are replaced at once.
            self.replace_all(some, led=number < READS - 1)
        return complete


def carry_over(cidrs, passes=2, done=None, switch=None):
    """Replace every masqueraded connection towards the CIDRs, those that begin meanwhile as well.

    :param passes: how often all connections are read; more where so many begin that the kernel cannot tell of each.
    :param done: set of identities of connections that were replaced before and need not be again; those that are replaced now are added.
    :param switch: what makes packets take another device. It is called right after the last pass, whatever became of that, and one more
        pass follows. What it raises goes on to the caller.
    :returns: {"replaced": n, "left": n, "guarded": bool, "detoured": bool, "exposed": n, "error": text or ""}. Guarded, detoured: whether
        the kernel took the table of `_conntrack_guard`, of `_conntrack_detour`. Exposed: those of the replaced that are not TCP and were
        not led around, of which a packet is lost that came at the wrong moment. An entry that vanished or was made anew meanwhile is not an
        error: it is seen again by the next pass. A kernel without ctnetlink has nothing to carry over: that is an error in the result.
    """
    carrier = Carrier(packed_networks(cidrs), set() if done is None else done)
    try:
        carrier.run(passes)
        if switch is not None:
            switch()
            carrier.run(1)
    finally:
        carrier.close()
    return carrier.result
