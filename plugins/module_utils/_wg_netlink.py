# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""The WireGuard client's transport for the kernel: generic netlink, family ``wireguard``, version 1.

The protocol is described in include/uapi/linux/wireguard.h and, since Linux 6.19, in Documentation/netlink/specs/wireguard.yaml; what the
kernel makes of it is in drivers/net/wireguard/netlink.c; ``wg`` speaks it in wireguard-tools, src/ipc-linux.h. The order of attributes
is the one of ``wg``, so that recorded messages of it can be compared byte by byte. What we do otherwise, on purpose:

* never WGDEVICE_F_REPLACE_PEERS (``wg setconf``) and never WGPEER_F_REPLACE_ALLOWEDIPS (``wg set … allowed-ips``, ``wg addconf``);
* WGPEER_F_UPDATE_ONLY on everything about a peer that must be there already, continuations of a peer over several messages included;
* the keepalive of a new peer is sent even where it is off;
* messages of up to 8 KiB where ``wg`` takes one page.

Everything up to `NetlinkClient` is pure.
"""

from __future__ import annotations

import base64
import errno
import re
import socket
import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import (
    KEY_BYTES,
    StepClient,
    WireGuardError,
    device_error,
    read_preshared_key,
    same_preshared_key,
    wipe,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_plan import (
    empty_state,
    endpoint_text,
    prefix_text,
    split_endpoint,
    split_prefix,
)

# include/uapi/linux/netlink.h
NETLINK_ROUTE = 0
NETLINK_GENERIC = 16
NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_MIN_TYPE = 0x10
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

# include/uapi/linux/genetlink.h
GENL_ID_CTRL = 0x10
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

# include/uapi/linux/wireguard.h
WG_GENL_NAME = "wireguard"
WG_GENL_VERSION = 1
WG_CMD_GET_DEVICE = 0
WG_CMD_SET_DEVICE = 1
WGDEVICE_A_IFNAME = 2
WGDEVICE_A_PRIVATE_KEY = 3
WGDEVICE_A_PUBLIC_KEY = 4
WGDEVICE_A_LISTEN_PORT = 6
WGDEVICE_A_FWMARK = 7
WGDEVICE_A_PEERS = 8
WGPEER_A_PUBLIC_KEY = 1
WGPEER_A_PRESHARED_KEY = 2
WGPEER_A_FLAGS = 3
WGPEER_A_ENDPOINT = 4
WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL = 5
WGPEER_A_LAST_HANDSHAKE_TIME = 6
WGPEER_A_RX_BYTES = 7
WGPEER_A_TX_BYTES = 8
WGPEER_A_ALLOWEDIPS = 9
WGALLOWEDIP_A_FAMILY = 1
WGALLOWEDIP_A_IPADDR = 2
WGALLOWEDIP_A_CIDR_MASK = 3
WGALLOWEDIP_A_FLAGS = 4
WGPEER_F_REMOVE_ME = 1
WGPEER_F_UPDATE_ONLY = 4
WGALLOWEDIP_F_REMOVE_ME = 1

# include/uapi/linux/rtnetlink.h, if_link.h
RTM_NEWLINK = 16
RTM_GETLINK = 18
IFLA_IFNAME = 3
IFLA_LINKINFO = 18
IFLA_INFO_KIND = 1
IFINFOMSG_BYTES = 16

_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_GENL = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_U16 = struct.Struct("=H")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_I32 = struct.Struct("=i")
_TIMESPEC = struct.Struct("=qq")  # struct __kernel_timespec

# Bytes of a message. A sender is limited by its socket buffer (212,992 by default, net.core.wmem_default), a nest by its 16 bit length;
# 8 KiB is what libmnl takes at most (MNL_SOCKET_BUFFER_SIZE), so every kernel has seen it. The kernel holds the lock of the device and
# the one of all network configuration (RTNL) for the length of a message: small ones let others through.
MESSAGE_LIMIT = 8192
# Bytes of a datagram of a dump: at most 32 KiB (net/netlink/af_netlink.c, netlink_dump: the reader's buffer, capped), twice that here.
RECEIVE_LIMIT = 65536
# Allowed IPs for a throw-away peer and its removal must fit into one message: headers and device name at most 40 bytes, nests 16, two
# keys 72, flags 8; each IPv6 prefix 40.
_ALLOWED_IP_BYTES = 40
_FIXED_BYTES = 40 + 16 + 72 + 8
# Times a dump is repeated that was interrupted by a change (NLM_F_DUMP_INTR); each takes milliseconds.
DUMP_TRIES = 20
# Seconds to wait for an answer. The kernel answers at once unless RTNL is held by others; minutes of that mean that it hangs.
ANSWER_SECONDS = 60.0

# dev_valid_name, net/core/dev.c: 1 to 15 characters, no slash, colon or space, neither "." nor ".."; and what wg-quick takes for a name
_DEVICE_NAME = re.compile(r"[a-zA-Z0-9_=+.-]{1,15}")


def check_device_name(name):
    """The name itself if a network device can have it; else `MeshError`."""
    if not isinstance(name, str) or not _DEVICE_NAME.fullmatch(name) or name in (".", ".."):
        raise MeshError("%s is no name for a WireGuard device: expected 1 to 15 letters, digits and _ = + . -" % shown(name))
    return name


# --- encoding ------------------------------------------------------------------------------------------------------------------------

class Message:
    """One netlink message under construction, in a buffer of fixed size, so that no copies with keys in them are left by growing it."""

    def __init__(self, kind, flags, sequence, limit=MESSAGE_LIMIT):
        self.buffer = bytearray(limit)
        self.length = _NLMSG.size
        self._header = (kind, flags, sequence)

    def raw(self, data):
        """Append bytes, padded to 4; False if they do not fit."""
        size = len(data) + 3 & ~3
        if self.length + size > len(self.buffer):
            return False
        self.buffer[self.length:self.length + len(data)] = data
        self.length += size
        return True

    def put(self, kind, data):
        """Append an attribute; False if it does not fit."""
        size = _ATTRIBUTE.size + len(data)
        if self.length + (size + 3 & ~3) > len(self.buffer):
            return False
        _ATTRIBUTE.pack_into(self.buffer, self.length, size, kind)
        self.buffer[self.length + _ATTRIBUTE.size:self.length + size] = data
        self.length += size + 3 & ~3
        return True

    def begin(self, kind):
        """Start a nest: its offset, or None if it does not fit."""
        start = self.length
        return start if self.put(kind | NLA_F_NESTED, b"") else None

    def end(self, start):
        """Close a nest: what came since `begin` is in it."""
        _U16.pack_into(self.buffer, start, self.length - start)

    def cancel(self, start):
        """Take back everything since `begin`."""
        self.buffer[start:self.length] = bytes(self.length - start)
        self.length = start

    def finish(self):
        """The message as a memoryview of the buffer."""
        kind, flags, sequence = self._header
        _NLMSG.pack_into(self.buffer, 0, self.length, kind, flags, sequence, 0)
        return memoryview(self.buffer)[:self.length]

    def wipe(self):
        wipe(self.buffer)


def generic_message(family, command, flags, sequence, version=WG_GENL_VERSION, limit=MESSAGE_LIMIT):
    """A `Message` of generic netlink, up to its attributes."""
    message = Message(family, flags, sequence, limit)
    message.raw(_GENL.pack(command, version, 0))
    return message


def family_request(sequence):
    """The `Message` that asks for the number of the family ``wireguard``; the kernel loads the module for it."""
    message = generic_message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, NLM_F_REQUEST | NLM_F_ACK, sequence, version=1)
    message.put(CTRL_ATTR_FAMILY_NAME, WG_GENL_NAME.encode("ascii") + b"\0")
    return message


def _device_message(family, name, command, flags, sequence, limit=MESSAGE_LIMIT):
    message = generic_message(family, command, flags, sequence, limit=limit)
    message.put(WGDEVICE_A_IFNAME, name.encode("ascii") + b"\0")
    return message


def get_device_request(family, name, sequence):
    """The `Message` that asks for a dump of a device."""
    return _device_message(family, name, WG_CMD_GET_DEVICE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_DUMP, sequence)


def set_device_message(family, name, sequence, private_key=None, listen_port=None, fwmark=None):
    """The `Message` with a device's own settings; None leaves one as it is. ``private_key``: 32 bytes."""
    message = _device_message(family, name, WG_CMD_SET_DEVICE, NLM_F_REQUEST | NLM_F_ACK, sequence)
    if private_key is not None:
        message.put(WGDEVICE_A_PRIVATE_KEY, private_key)
    if listen_port is not None:
        message.put(WGDEVICE_A_LISTEN_PORT, _U16.pack(listen_port))
    if fwmark is not None:
        message.put(WGDEVICE_A_FWMARK, _U32.pack(fwmark))
    return message


def encode_endpoint(text):
    """An endpoint as struct sockaddr_in or sockaddr_in6 (include/uapi/linux/in.h, in6.h): family native, port and address network order."""
    family, packed, port, scope = split_endpoint(text)
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack("!H4s8x", port, packed)
    if scope and not (scope.isascii() and scope.isdigit()):
        raise MeshError("endpoint %s: give the scope of a link-local address as the number of the device" % shown(text))
    return struct.pack("=H", family) + struct.pack("!HI16s", port, 0, packed) + _U32.pack(int(scope or 0))


class EntryEncoder:
    """Encodes one peer entry (``_wg_apply``) into one message or, where its allowed IPs do not fit, over several.

    ``preshared_key``: 32 bytes, or None for an entry that does not set one.
    """

    def __init__(self, entry, preshared_key=None):
        self.entry = entry
        self._key = base64.b64decode(entry["public_key"])
        self._preshared_key = preshared_key
        self._prefixes = [(text, 0) for text in entry["allowed_ips"]]
        self._prefixes.extend((text, WGALLOWEDIP_F_REMOVE_ME) for text in entry["remove_allowed_ips"])
        self._done = 0  # prefixes
        self._started = False

    def encode(self, message):
        """Append the peer, or its next part, to a message whose nest of peers is open.

        True when the peer is complete, False when it has to go on in another message (nothing or a part of it is in this one).
        """
        peer = message.begin(0)
        if peer is None:
            return False
        if not self._head(message):
            message.cancel(peer)
            return False
        complete = self._allowed_ips(message)
        if complete is None and self._started:
            # a continuation without a single allowed IP is of no use
            message.cancel(peer)
            return False
        message.end(peer)
        self._started = True
        # it is in the message and in no later part
        self.wipe()
        return bool(complete)

    def wipe(self):
        wipe(self._preshared_key)

    def _head(self, message):
        entry = self.entry
        flags = 0
        fits = message.put(WGPEER_A_PUBLIC_KEY, self._key)
        if entry["remove"]:
            flags |= WGPEER_F_REMOVE_ME
        if entry["update_only"] or self._started:
            # a continuation as well: a peer that somebody removed in between must not come back without endpoint and preshared key
            flags |= WGPEER_F_UPDATE_ONLY
        if not self._started:
            if self._preshared_key is not None:
                fits = fits and message.put(WGPEER_A_PRESHARED_KEY, self._preshared_key)
            if "endpoint" in entry:
                fits = fits and message.put(WGPEER_A_ENDPOINT, encode_endpoint(entry["endpoint"]))
            if "keepalive" in entry:
                fits = fits and message.put(WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, _U16.pack(entry["keepalive"]))
        if flags:
            fits = fits and message.put(WGPEER_A_FLAGS, _U32.pack(flags))
        return fits

    def _allowed_ips(self, message):
        """True: all done; False: some are left; None: not one did fit."""
        if self._done == len(self._prefixes):
            return True
        nest = message.begin(WGPEER_A_ALLOWEDIPS)
        if nest is None:
            return None
        before = self._done
        while self._done < len(self._prefixes):
            if not _put_allowed_ip(message, *self._prefixes[self._done]):
                break
            self._done += 1
        if self._done == before:
            message.cancel(nest)
            return None
        message.end(nest)
        return self._done == len(self._prefixes)


def _put_allowed_ip(message, text, flags):
    family, packed, length = split_prefix(text)
    nest = message.begin(0)
    if nest is None:
        return False
    fits = (message.put(WGALLOWEDIP_A_FAMILY, _U16.pack(family))
            and message.put(WGALLOWEDIP_A_IPADDR, packed)
            and message.put(WGALLOWEDIP_A_CIDR_MASK, bytes((length,)))
            and (not flags or message.put(WGALLOWEDIP_A_FLAGS, _U32.pack(flags))))
    if not fits:
        message.cancel(nest)
        return False
    message.end(nest)
    return True


def set_peers_messages(family, name, entries, sequence, load_key=None, limit=MESSAGE_LIMIT):
    """Generates the `Message` objects, none above ``limit`` bytes, that carry out peer entries, in order, and the keys each is about.

    Yields ``(message, [public keys])``. ``load_key(path)`` gives the bytes of a preshared key; it is called as late as possible and what
    it gave is wiped as soon as it is in the message. The caller sends and wipes each message before it asks for the next.
    """
    waiting = []
    try:
        yield from _set_peers_messages(family, name, entries, sequence, load_key, limit, waiting)
    finally:
        for encoder in waiting:
            encoder.wipe()


def _set_peers_messages(family, name, entries, sequence, load_key, limit, waiting):
    """`set_peers_messages`; ``waiting`` has the encoder that did not get its peer into a message yet."""
    encoders = iter(entries)
    encoder = None
    while True:
        message = _device_message(family, name, WG_CMD_SET_DEVICE, NLM_F_REQUEST | NLM_F_ACK, sequence, limit)
        peers = message.begin(WGDEVICE_A_PEERS)
        keys = []
        while True:
            if encoder is None:
                entry = next(encoders, None)
                if entry is None:
                    break
                encoder = _encoder(entry, load_key)
                waiting[:] = [encoder]
            before = message.length
            complete = encoder.encode(message)
            if message.length > before:
                keys.append(encoder.entry["public_key"])
            if not complete:
                break
            encoder = None
        if not keys:
            if encoder is not None:
                raise MeshError("peer %s does not fit into a message of %d bytes" % (encoder.entry["public_key"], limit))
            return
        message.end(peers)
        sequence += 1
        yield message, keys


def _encoder(entry, load_key):
    key = None
    if "preshared_key_file" in entry:
        path = entry["preshared_key_file"]
        # all zeros is how WireGuard spells "none"
        key = bytearray(KEY_BYTES) if path is None else load_key(path)
    return EntryEncoder(entry, key)


# --- decoding ------------------------------------------------------------------------------------------------------------------------

class Malformed(WireGuardError):
    """Bytes that cannot come from a kernel."""


def messages(data):
    """Generates ``(type, flags, sequence, payload)`` of the messages in a datagram; payload as memoryview."""
    view = memoryview(data)
    while len(view) >= _NLMSG.size:
        length, kind, flags, sequence, dummy = _NLMSG.unpack_from(view)
        if length < _NLMSG.size or length > len(view):
            raise Malformed("netlink: a message of %d bytes in a datagram that has %d left" % (length, len(view)))
        yield kind, flags, sequence, view[_NLMSG.size:length]
        view = view[length + 3 & ~3:]
    if len(view):
        raise Malformed("netlink: %d bytes left over at the end of a datagram" % len(view))


def attributes(view):
    """Generates ``(type, payload)`` of the attributes in a payload; the type without its flags."""
    offset, end = 0, len(view)
    while end - offset >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(view, offset)
        if length < _ATTRIBUTE.size or offset + length > end:
            raise Malformed("netlink: an attribute of %d bytes where %d are left" % (length, end - offset))
        yield kind & NLA_TYPE_MASK, view[offset + _ATTRIBUTE.size:offset + length]
        offset += length + 3 & ~3
    if offset < end:
        raise Malformed("netlink: %d bytes left over after the last attribute" % (end - offset))


def _number(form, payload, what):
    if len(payload) != form.size:
        raise Malformed("netlink: %s has %d bytes, not %d" % (what, len(payload), form.size))
    return form.unpack(payload)[0]


def _text(payload):
    return bytes(payload).split(b"\0")[0].decode("ascii", "replace")


def _decode_endpoint(payload):
    """struct sockaddr_in or sockaddr_in6 -> text; None for anything else."""
    if len(payload) < 2:
        return None
    family = _U16.unpack_from(payload)[0]
    if family == socket.AF_INET and len(payload) == 16:
        port, address = struct.unpack_from("!H4s", payload, 2)
        return endpoint_text(family, address, port)
    if family == socket.AF_INET6 and len(payload) == 28:
        port, dummy, address = struct.unpack_from("!HI16s", payload, 2)
        if address[:12] == b"\0" * 10 + b"\xff\xff":
            return endpoint_text(socket.AF_INET, address[12:], port)
        scope = _U32.unpack_from(payload, 24)[0]
        return endpoint_text(family, address, port, str(scope) if scope else "")
    return None


_ADDRESS_BYTES = {socket.AF_INET: 4, socket.AF_INET6: 16}


def _decode_allowed_ip(payload):
    family = length = packed = None
    for kind, value in attributes(payload):
        if kind == WGALLOWEDIP_A_FAMILY:
            family = _number(_U16, value, "the family of an allowed IP")
        elif kind == WGALLOWEDIP_A_IPADDR:
            packed = value
        elif kind == WGALLOWEDIP_A_CIDR_MASK and len(value) == 1:
            length = value[0]
    size = _ADDRESS_BYTES.get(family)
    if size is None or packed is None or len(packed) != size or length is None or length > size * 8:
        raise Malformed("netlink: an allowed IP without family, address or prefix length")
    return prefix_text(family, packed, length)


def _decode_peer(payload, peers, preshared_key_files):
    """One peer, or a part of one, into ``peers``.

    A peer whose allowed IPs do not fit into a message goes on in the next one, with its key and more allowed IPs and nothing else
    (netlink.c, get_peer).
    """
    key = None
    fields = {}
    prefixes = []
    for kind, value in attributes(payload):
        if kind == WGPEER_A_PUBLIC_KEY and len(value) == KEY_BYTES:
            key = _keys.encode_key(value)
        elif kind == WGPEER_A_PRESHARED_KEY and len(value) == KEY_BYTES:
            fields["preshared_key"] = value
        elif kind == WGPEER_A_ENDPOINT:
            fields["endpoint"] = _decode_endpoint(value)
        elif kind == WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL:
            fields["keepalive"] = _number(_U16, value, "a keepalive")
        elif kind == WGPEER_A_LAST_HANDSHAKE_TIME and len(value) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(value)
            fields["last_handshake"] = seconds + nanoseconds / 1e9
        elif kind == WGPEER_A_RX_BYTES:
            fields["rx_bytes"] = _number(_U64, value, "a counter")
        elif kind == WGPEER_A_TX_BYTES:
            fields["tx_bytes"] = _number(_U64, value, "a counter")
        elif kind == WGPEER_A_ALLOWEDIPS:
            prefixes.extend(_decode_allowed_ip(item) for dummy, item in attributes(value))
    if key is None:
        raise Malformed("netlink: a peer without public key")
    peer = peers.setdefault(key, {"endpoint": None, "allowed_ips": [], "keepalive": 0, "has_preshared_key": False,
                                  "last_handshake": 0.0, "rx_bytes": 0, "tx_bytes": 0})
    preshared_key = fields.pop("preshared_key", None)
    if preshared_key is not None:
        # the key itself goes no further; all zeros is "none"
        peer["has_preshared_key"] = any(preshared_key)
        if preshared_key_files and key in preshared_key_files and peer["has_preshared_key"]:
            peer["preshared_key_matches"] = same_preshared_key(preshared_key, preshared_key_files[key])
    peer.update(fields)
    peer["allowed_ips"].extend(prefixes)


def decode_device(payloads, name, preshared_key_files=None):
    """The state (``docs/architecture.md``) from the payloads, generic netlink header included, of the messages of a dump.

    ``preshared_key_files``: ``{public key: path}``; those peers get ``preshared_key_matches``. The private key is not even looked at.
    ``payloads`` may be a generator that reuses its buffer: nothing of one is kept. Raises `Malformed`.
    """
    state = empty_state(name)
    for payload in payloads:
        if len(payload) < _GENL.size:
            raise Malformed("netlink: a message of %d bytes without generic netlink header" % len(payload))
        for kind, value in attributes(payload[_GENL.size:]):
            if kind == WGDEVICE_A_IFNAME:
                state["name"] = _text(value)
            elif kind == WGDEVICE_A_PUBLIC_KEY and len(value) == KEY_BYTES:
                state["public_key"] = _keys.encode_key(value)
            elif kind == WGDEVICE_A_LISTEN_PORT:
                state["listen_port"] = _number(_U16, value, "the port")
            elif kind == WGDEVICE_A_FWMARK:
                state["fwmark"] = _number(_U32, value, "the mark")
            elif kind == WGDEVICE_A_PEERS:
                for dummy, peer in attributes(value):
                    _decode_peer(peer, state["peers"], preshared_key_files)
    for peer in state["peers"].values():
        peer["allowed_ips"] = sorted(set(peer["allowed_ips"]))
    return state


def decode_link(payload):
    """``(name, kind)`` of a RTM_NEWLINK message's payload; kind is None for devices without one."""
    name = link_kind = None
    for kind, value in attributes(payload[IFINFOMSG_BYTES:]):
        if kind == IFLA_IFNAME:
            name = _text(value)
        elif kind == IFLA_LINKINFO:
            for info, inner in attributes(value):
                if info == IFLA_INFO_KIND:
                    link_kind = _text(inner)
    return name, link_kind


# --- the transport -------------------------------------------------------------------------------------------------------------------

def _code(exc):
    """The error number of an ``OSError``; the one without a number is the socket's timeout."""
    return exc.errno or errno.ETIMEDOUT


class _Interrupted(Exception):
    """The configuration changed while it was dumped."""


class Connection:
    """A netlink socket. ``make_socket(protocol)`` is for tests."""

    def __init__(self, protocol, make_socket=None):
        self._socket = (make_socket or _make_socket)(protocol)
        self._buffer = bytearray(RECEIVE_LIMIT)
        self._sequence = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        wipe(self._buffer)
        self._socket.close()

    def next_sequence(self):
        self._sequence += 1
        return self._sequence

    def send(self, message):
        """Send a `Message` and wipe it."""
        try:
            self._socket.send(message.finish())
        finally:
            message.wipe()

    def answers(self, sequence):
        """Generates the payloads of the answers to a request, up to the acknowledgement or the end of the dump.

        Payloads are wiped when the next datagram is read. Raises ``OSError`` with the number the kernel answered, and `_Interrupted`.
        """
        interrupted = False
        while True:
            size, dummy, flags, sender = self._socket.recvmsg_into([self._buffer])
            if flags & socket.MSG_TRUNC:
                raise Malformed("netlink: a datagram of more than %d bytes" % len(self._buffer))
            if sender and sender[0] != 0:
                # only the kernel has port id 0; anybody may send to us
                continue
            view = memoryview(self._buffer)[:size]
            try:
                for kind, flags, number, payload in messages(view):
                    if number != sequence:
                        continue
                    interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                    if kind in (NLMSG_ERROR, NLMSG_DONE):
                        code = _I32.unpack_from(payload)[0] if len(payload) >= _I32.size else 0
                        if code < 0:
                            raise OSError(-code, errno.errorcode.get(-code, "netlink"))
                        if interrupted:
                            raise _Interrupted
                        return
                    if kind >= NLMSG_MIN_TYPE:
                        yield payload
            finally:
                # a dump of a device has its private and preshared keys in it
                self._buffer[:size] = bytes(size)


def _make_socket(protocol):
    # AF_NETLINK is missing from Python's socket module where the system has none
    result = socket.socket(getattr(socket, "AF_NETLINK", 16), socket.SOCK_RAW | getattr(socket, "SOCK_CLOEXEC", 0), protocol)
    try:
        result.bind((0, 0))
        try:
            # An error message then does not quote the request, which may have a key in it. Linux 4.3 and later.
            result.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        except OSError:
            pass
        result.settimeout(ANSWER_SECONDS)
    except OSError:
        result.close()
        raise
    return result


def link_kinds(make_socket=None):
    """``{name: kind}`` of all network devices in this network namespace; kind is ``"wireguard"``, ``"tun"``, …, or None.

    By rtnetlink and not from /sys, which may show another network namespace.
    """
    for dummy in range(DUMP_TRIES):
        with Connection(NETLINK_ROUTE, make_socket) as connection:
            sequence = connection.next_sequence()
            message = Message(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, sequence)
            message.raw(bytes(IFINFOMSG_BYTES))
            connection.send(message)
            try:
                return dict(decode_link(payload) for payload in connection.answers(sequence))
            except _Interrupted:
                continue
            except OSError as exc:
                raise device_error("(all)", _code(exc), "list network devices") from exc
    raise WireGuardError("the list of network devices changed %d times while it was read; run again" % DUMP_TRIES)


class NetlinkClient(StepClient):
    """WireGuard devices of the kernel, in the network namespace of this process.

    ``make_socket`` and ``limit`` (bytes of a message) are for tests; ``run_command`` see ``_wg_apply.x25519_public_key``.
    """

    transport = "netlink"

    def __init__(self, make_socket=None, limit=MESSAGE_LIMIT, run_command=None):
        super().__init__(run_command)
        self._make_socket = make_socket
        self._limit = limit
        self.allowed_ips_at_once = max(1, (limit - _FIXED_BYTES) // _ALLOWED_IP_BYTES)

    def read(self, name, preshared_key_files=None):
        """The state of a device (``docs/architecture.md``). Raises `WireGuardError`.

        ``preshared_key_files``: ``{public key: path}``: the state of those peers says whether their preshared key is the one in the file.
        """
        check_device_name(name)
        for dummy in range(DUMP_TRIES):
            try:
                with self._connect() as connection:
                    family = self._family(connection)
                    sequence = connection.next_sequence()
                    connection.send(get_device_request(family, name, sequence))
                    return decode_device(connection.answers(sequence), name, preshared_key_files)
            except _Interrupted:
                continue
            except OSError as exc:
                raise device_error(name, _code(exc), "read it") from exc
        raise WireGuardError("device %s: its configuration changed %d times while it was read; is something else configuring it?"
                             % (name, DUMP_TRIES))

    def _connect(self):
        return Connection(NETLINK_GENERIC, self._make_socket)

    def _family(self, connection):
        sequence = connection.next_sequence()
        connection.send(family_request(sequence))
        family = None
        try:
            for payload in connection.answers(sequence):
                for kind, value in attributes(payload[_GENL.size:]):
                    if kind == CTRL_ATTR_FAMILY_ID:
                        family = _number(_U16, value, "the number of a family")
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise
        if family is None:
            raise WireGuardError("this kernel has no WireGuard: the module cannot be loaded (modprobe wireguard says why); use a kernel "
                                 "that has it, or a userspace implementation (mesh_implementation)", errno.ENOENT)
        return family

    def _set_device(self, name, private_key, listen_port, fwmark):
        values = (("private key", private_key), ("port %s" % listen_port, listen_port), ("mark %s" % fwmark, fwmark))
        self._send(name, "set its %s" % ", ".join(text for text, value in values if value is not None), lambda family, sequence: [
            (set_device_message(family, name, sequence, private_key, listen_port, fwmark), ())])

    def _set_peers(self, name, entries):
        self._send(name, "change peers", lambda family, sequence: set_peers_messages(
            family, name, entries, sequence, read_preshared_key, self._limit))

    def _send(self, name, doing, make_messages):
        """Send messages one by one, each when the one before was acknowledged; names the peers of the one that failed."""
        check_device_name(name)
        keys = ()
        try:
            with self._connect() as connection:
                family = self._family(connection)
                # peers may take several messages, numbered on from this one
                sequence = connection.next_sequence()
                for message, about in make_messages(family, sequence):
                    keys = about
                    connection.send(message)
                    for dummy in connection.answers(sequence):
                        pass
                    sequence += 1
        except OSError as exc:
            if keys:
                doing += " %s" % keys[0] if keys[0] == keys[-1] else " %s to %s" % (keys[0], keys[-1])
            raise device_error(name, _code(exc), doing) from exc
