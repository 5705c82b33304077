# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Netlink as netfilter speaks it: attributes, messages, a socket. What they say is in `_conntrack` and `_conntrack_guard`.

Sources: include/uapi/linux/netlink.h and include/uapi/linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import socket
import struct

NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

SO_RCVBUFFORCE = 33
# Bytes; about four thousand messages, as the kernel counts their memory.
RECEIVE_BUFFER = 1 << 22

# Seconds; the kernel answers at once, so this only bounds a kernel that never does.
TIMEOUT = 10


def attribute(kind, payload):
    """One netlink attribute as bytes, padded to 4."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def nested(kind, *parts):
    """A nested attribute as bytes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


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


def message(kind, flags, family, sequence, payload, resource=0):
    """One message as bytes: nlmsghdr, nfgenmsg, attributes.

    :param kind: subsystem << 8 | message of the subsystem, or one of the messages that begin and end a batch.
    :param resource: what the batch is for; 0 otherwise.
    """
    body = struct.pack("=BB", family, 0) + struct.pack("!H", resource) + payload
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def messages(data):
    """(type, sequence, body) of each message in a received datagram; the body begins with nfgenmsg or, in an error, its code."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, dummy, sequence = struct.unpack_from("=IHHI", data, offset)
        if length < 16:
            break
        yield kind, sequence, data[offset + 16:offset + length]
        offset += (length + 3) & ~3


def error_code(body):
    """The errno of the body of an NLMSG_ERROR, 0 for an acknowledgement."""
    return -struct.unpack_from("=i", body)[0]


def open_socket(protocol=NETLINK_NETFILTER):
    """A netlink socket. Raises OSError where the kernel has none."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        opened.settimeout(TIMEOUT)
        try:
            # Beyond net.core.rmem_max, which has room for a few hundred messages of what happens meanwhile.
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except OSError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        opened.bind((0, 0))
    except OSError:
        opened.close()
        raise
    return opened
