# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry masqueraded connections over a change of their outgoing device.

PRIVATE to the collection.

The kernel drops one packet of every established masqueraded connection whose outgoing device changes, and forgets the connection
(``nf_nat_oif_changed`` in net/netfilter/nf_nat_core.c). Where pods are masqueraded (kubenet, NodePort, ``--random-fully``) the switch
of a node would thus cost each such connection a packet, and those that come back with another source port are reset by the peer.

A connection whose source was translated to a *given* address has no such memory of its device. So each connection that is about
to change devices is replaced, before the switch, by itself: the same tuples, mark, zone, state and time-out, translated to the very
address and port it has now. Delete and create travel in one netlink message; the kernel handles them back to back.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h, nf_conntrack_tcp.h, nfnetlink.h;
``ctnetlink_create_conntrack`` in net/netfilter/nf_conntrack_netlink.c.
"""
from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

NETLINK_NETFILTER = 12
NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_NEW = 0
IPCTNL_MSG_CT_GET = 1
IPCTNL_MSG_CT_DELETE = 2

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

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
CTA_ZONE = 18
CTA_LABELS = 22
CTA_STATUS_MASK = 26

CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE = 4, 5, 6
CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE = 7, 8, 9
CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP, CTA_NAT_PROTO, CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP = 1, 2, 3, 4, 5
CTA_PROTONAT_PORT_MIN, CTA_PROTONAT_PORT_MAX = 1, 2
CTA_PROTOINFO_TCP = 1
CTA_PROTOINFO_TCP_STATE, CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, CTA_PROTOINFO_TCP_WSCALE_REPLY = 1, 2, 3
CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY = 4, 5
IP_CT_TCP_FLAG_BE_LIBERAL = 0x08

IPS_SEEN_REPLY = 0x2
IPS_ASSURED = 0x4
IPS_CONFIRMED = 0x8
IPS_SRC_NAT = 0x10
IPS_DST_NAT = 0x20
# What may be carried over. The NAT bits come from the NAT attributes; without IPS_CONFIRMED the kernel answers EBUSY.
IPS_CARRIED = IPS_SEEN_REPLY | IPS_ASSURED

IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP = 6, 17, 132
IPPROTO_ICMP, IPPROTO_ICMPV6 = 1, 58
PORT_PROTOCOLS = (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP)


def attribute(kind, payload):
    """One netlink attribute as bytes, padded to 4 (include/uapi/linux/netlink.h)."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def nested(kind, *attributes):
    """A nested attribute as bytes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data):
    """{type: payload} of a run of attributes; a type that repeats keeps its last payload."""
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > len(data):
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4:offset + length]
        offset += (length + 3) & ~3
    return found


def decode_tuple(data):
    """A CTA_TUPLE as {"src", "dst": packed bytes, "proto": int, "ports" | "icmp": (…)}."""
    parts = attributes(data)
    ip, proto = attributes(parts.get(CTA_TUPLE_IP, b"")), attributes(parts.get(CTA_TUPLE_PROTO, b""))
    decoded = {
        "src": ip.get(CTA_IP_V4_SRC) or ip.get(CTA_IP_V6_SRC) or b"",
        "dst": ip.get(CTA_IP_V4_DST) or ip.get(CTA_IP_V6_DST) or b"",
        "proto": proto.get(CTA_PROTO_NUM, b"\0")[0],
    }
    if CTA_PROTO_SRC_PORT in proto:
        decoded["ports"] = (struct.unpack("!H", proto[CTA_PROTO_SRC_PORT])[0], struct.unpack("!H", proto[CTA_PROTO_DST_PORT])[0])
    elif CTA_PROTO_ICMP_ID in proto:
        decoded["icmp"] = (struct.unpack("!H", proto[CTA_PROTO_ICMP_ID])[0], proto[CTA_PROTO_ICMP_TYPE][0], proto[CTA_PROTO_ICMP_CODE][0])
    elif CTA_PROTO_ICMPV6_ID in proto:
        decoded["icmp"] = (
            struct.unpack("!H", proto[CTA_PROTO_ICMPV6_ID])[0], proto[CTA_PROTO_ICMPV6_TYPE][0], proto[CTA_PROTO_ICMPV6_CODE][0])
    return decoded


def encode_tuple(kind, src, dst, proto, ports=None, icmp=None):
    """The inverse of decode_tuple, as a CTA_TUPLE_ORIG or CTA_TUPLE_REPLY attribute."""
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
    return nested(kind, nested(CTA_TUPLE_IP, attribute(source, src), attribute(target, dst)), nested(CTA_TUPLE_PROTO, *layer4))


def decode_connection(family, data):
    """One dumped conntrack entry (the attributes behind nfgenmsg) as plain data.

    Returns {"family", "orig", "reply", "status", "timeout", "mark", "zone", "labels", "id", "tcp"}; keys whose attribute is missing
    are None.
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
        "helper": CTA_HELP in parts,
        "tcp": tcp,
    }


def must_move(connection, networks):
    """Whether a connection is source-translated, towards one of our networks, and of a kind that can be carried over.

    networks: {4: [(first, last)], 16: [(first, last)]} of packed addresses by their length, sorted, see `packed_networks`.
    """
    if not connection["status"] & IPS_SRC_NAT or connection["timeout"] is None or connection["helper"]:
        return False
    orig, reply = connection["orig"], connection["reply"]
    if orig["proto"] not in PORT_PROTOCOLS + (IPPROTO_ICMP, IPPROTO_ICMPV6) or len(orig["src"]) != len(reply["src"]):
        return False
    # Where the packets go after any destination translation is the source of the answers.
    return contains(networks, reply["src"])


def packed_networks(cidrs):
    """CIDR texts as what `contains` searches: {address length in bytes: sorted [(first, last)] packed}."""
    found = {4: [], 16: []}
    for cidr in cidrs:
        network = ipaddress.ip_network(cidr)
        found[4 if network.version == 4 else 16].append((network.network_address.packed, network.broadcast_address.packed))
    return {length: sorted(ranges) for length, ranges in found.items()}


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
    """The attributes that name one entry to the kernel: its tuple, zone and id (the id guards against a reused tuple)."""
    orig = connection["orig"]
    parts = [encode_tuple(CTA_TUPLE_ORIG, orig["src"], orig["dst"], orig["proto"], orig.get("ports"), orig.get("icmp"))]
    if connection["zone"] is not None:
        parts.append(attribute(CTA_ZONE, struct.pack("!H", connection["zone"])))
    if connection["id"] is not None:
        parts.append(attribute(CTA_ID, connection["id"]))
    return b"".join(parts)


def create_attributes(connection):
    """The attributes that make the same connection anew, its source translated to the address and port it has, without a device.

    The kernel wants the reply tuple as if nothing were translated, and applies the translations to it.
    """
    orig, reply = connection["orig"], connection["reply"]
    proto, ports, icmp = orig["proto"], orig.get("ports"), orig.get("icmp")
    parts = [
        encode_tuple(CTA_TUPLE_ORIG, orig["src"], orig["dst"], proto, ports, icmp),
        encode_tuple(
            CTA_TUPLE_REPLY, orig["dst"], orig["src"], proto,
            (ports[1], ports[0]) if ports is not None else None,
            inverse_icmp(icmp) if icmp is not None else None),
    ]
    if connection["status"] & IPS_DST_NAT:
        parts.append(encode_nat(CTA_NAT_DST, reply["src"], reply["ports"][0] if "ports" in reply else None))
    source_port = reply["ports"][1] if "ports" in reply else (reply["icmp"][0] if "icmp" in reply else None)
    parts.append(encode_nat(CTA_NAT_SRC, reply["dst"], source_port))
    parts.append(attribute(CTA_STATUS, struct.pack("!I", connection["status"] & IPS_CARRIED | IPS_CONFIRMED)))
    # At least as long as a switch may take: an entry that is about to time out must not do so between two passes.
    parts.append(attribute(CTA_TIMEOUT, struct.pack("!I", max(connection["timeout"], 30))))
    if connection["mark"]:
        parts.append(attribute(CTA_MARK, struct.pack("!I", connection["mark"])))
    if connection["zone"] is not None:
        parts.append(attribute(CTA_ZONE, struct.pack("!H", connection["zone"])))
    if connection["labels"] and any(connection["labels"]):
        parts.append(attribute(CTA_LABELS, connection["labels"]))
    tcp = connection["tcp"]
    if tcp is not None:
        # The sequence window is not part of what can be handed over; liberal means that the first packets are believed.
        flags = [struct.pack("BB", kept | IP_CT_TCP_FLAG_BE_LIBERAL, kept | IP_CT_TCP_FLAG_BE_LIBERAL) for kept in tcp["flags"]]
        parts.append(nested(CTA_PROTOINFO, nested(
            CTA_PROTOINFO_TCP,
            attribute(CTA_PROTOINFO_TCP_STATE, struct.pack("B", tcp["state"])),
            attribute(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, struct.pack("B", tcp["wscale"][0])),
            attribute(CTA_PROTOINFO_TCP_WSCALE_REPLY, struct.pack("B", tcp["wscale"][1])),
            attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, flags[0]),
            attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, flags[1]))))
    return b"".join(parts)


def encode_nat(kind, address, port):
    """A translation to exactly one address and, where the protocol has one, one port or identifier."""
    low, high = (CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP) if len(address) == 4 else (CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP)
    parts = [attribute(low, address), attribute(high, address)]
    if port is not None:
        packed = struct.pack("!H", port)
        parts.append(nested(CTA_NAT_PROTO, attribute(CTA_PROTONAT_PORT_MIN, packed), attribute(CTA_PROTONAT_PORT_MAX, packed)))
    return nested(kind, *parts)


def message(kind, flags, family, sequence, payload):
    """One ctnetlink message as bytes: nlmsghdr, nfgenmsg, attributes."""
    body = struct.pack("=BBH", family, 0, 0) + payload
    return struct.pack("=IHHII", 16 + len(body), (NFNL_SUBSYS_CTNETLINK << 8) | kind, flags, sequence, 0) + body


def messages(data):
    """(type, sequence, body) of each message in a received datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, dummy, sequence = struct.unpack_from("=IHHI", data, offset)
        if length < 16:
            break
        yield kind, sequence, data[offset + 16:offset + length]
        offset += (length + 3) & ~3


class Conntrack:
    """A ctnetlink socket. OSError where the kernel has no connection tracking by netlink (then nothing is masqueraded by it either)."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        # Seconds; the kernel answers at once, so this only bounds a kernel that never does.
        self.socket.settimeout(10)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.bind((0, 0))
        self.sequence = 0

    def close(self):
        self.socket.close()

    def dump(self, family):
        """Every source-translated connection of an address family (AF_INET, AF_INET6), decoded."""
        self.sequence += 1
        # Linux 5.15 and newer filter by status themselves; older ones ignore the attributes and send all, filtered by must_move.
        status = struct.pack("!I", IPS_SRC_NAT)
        request = attribute(CTA_STATUS, status) + attribute(CTA_STATUS_MASK, status)
        self.socket.send(message(IPCTNL_MSG_CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, self.sequence, request))
        while True:
            for kind, sequence, body in messages(self.socket.recv(1 << 18)):
                if sequence != self.sequence:
                    continue
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, os.strerror(code))
                yield decode_connection(family, body[4:])

    def replace(self, connection):
        """Replace one entry by itself, translated without a device.

        Returns (0, id of the new entry), or (errno of the step that did not work, None).
        """
        family = connection["family"]
        self.sequence += 3
        first, second, third = self.sequence - 2, self.sequence - 1, self.sequence
        flags = NLM_F_REQUEST | NLM_F_ACK
        self.socket.send(
            message(IPCTNL_MSG_CT_DELETE, flags, family, first, delete_attributes(connection))
            + message(IPCTNL_MSG_CT_NEW, flags | NLM_F_CREATE | NLM_F_EXCL, family, second, create_attributes(connection))
            + message(IPCTNL_MSG_CT_GET, flags, family, third, delete_attributes(dict(connection, id=None))))
        answers, made_id = {}, None
        while len(answers) < 3:
            for kind, sequence, body in messages(self.socket.recv(1 << 16)):
                if kind == NLMSG_ERROR and sequence in (first, second, third):
                    answers[sequence] = -struct.unpack_from("=i", body)[0]
                elif sequence == third:
                    made_id = decode_connection(family, body[4:])["id"]
        return answers[first] or answers[second], made_id


def carry_over(cidrs, passes=2):
    """Replace every masqueraded connection towards the CIDRs; what appears meanwhile is caught by the next pass.

    Returns {"replaced": n, "left": n, "error": text or ""}; an entry that vanished or was made anew meanwhile is not an error: it is
    seen again by the next pass. Nothing is raised: a kernel without ctnetlink has nothing to carry over.
    """
    result = {"replaced": 0, "left": 0, "error": ""}
    networks = packed_networks(cidrs)
    families = [family for family, length in ((socket.AF_INET, 4), (socket.AF_INET6, 16)) if networks[length]]
    made = set()
    try:
        client = Conntrack()
    except OSError as exc:
        result["error"] = "connection tracking cannot be read: %s" % exc
        return result
    try:
        for dummy in range(passes):
            result["left"] = 0
            for family in families:
                for connection in [entry for entry in client.dump(family) if must_move(entry, networks)]:
                    if connection["id"] in made:
                        continue
                    code, made_id = client.replace(connection)
                    if code == 0:
                        result["replaced"] += 1
                        made.add(made_id)
                    elif code not in (errno.ENOENT, errno.EEXIST):
                        result["left"] += 1
                        result["error"] = os.strerror(code)
    except (OSError, struct.error) as exc:
        result["error"] = "connection tracking failed: %s" % exc
    finally:
        client.close()
    return result
