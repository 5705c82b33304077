# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stand-ins for a kernel and for a userspace implementation, written from their sources and not from our client.

Semantics as recorded from Linux 6.1 (tests/kernel/recorded/kernel.json) and wireguard-go (tests/unit/fixtures/wg/uapi.json);
test__wg_fakes.py holds them against the recordings.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import ipaddress
import os
import socket
import struct
import threading

REPLACE_PEERS = 1
REMOVE_ME, REPLACE_ALLOWED_IPS, UPDATE_ONLY = 1, 2, 4
FAMILY = 32


def key_of(name):
    """The text of a key that anyone can make again: SHA-256 of the name."""
    return base64.b64encode(raw_of(name)).decode()


def raw_of(name):
    return hashlib.sha256(("kubemesh test key " + name).encode()).digest()


# --- netlink -------------------------------------------------------------------------------------------------------------------------

def attr(kind, data):
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def nest(kind, *parts):
    return attr(kind | 0x8000, b"".join(parts))


def attrs(data):
    """[(type, payload)]; flags of the type dropped."""
    result = []
    while data:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4 or length > len(data):
            raise AssertionError("attribute of %d bytes in %d" % (length, len(data)))
        result.append((kind & 0x3FFF, data[4:length]))
        data = data[(length + 3) & ~3:]
    return result


def tree(message):
    """A WG_CMD_SET_DEVICE message as ``(header, [(type, bytes or nested list)])``."""
    length, kind, flags, dummy, dummy = struct.unpack_from("=IHHII", message)
    if length != len(message):
        raise AssertionError("a message says it has %d bytes, it has %d" % (length, len(message)))
    command, version, dummy = struct.unpack_from("=BBH", message, 16)
    device = []
    for attribute, data in attrs(message[20:]):
        if attribute == 8:
            data = [[(what, [attrs(ip) for dummy, ip in attrs(value)] if what == 9 else value) for what, value in attrs(peer)]
                    for dummy, peer in attrs(data)]
        device.append((attribute, data))
    return (kind, flags, command, version), device


def flatten(message):
    """The inverse of `tree`, sequence number 0."""
    (kind, flags, command, version), device = message
    body = struct.pack("=BBH", command, version, 0)
    for attribute, data in device:
        if attribute == 8:
            body += nest(8, *(nest(0, *(nest(9, *(nest(0, *(attr(*item) for item in ip)) for ip in value)) if what == 9
                                        else attr(what, value) for what, value in peer)) for peer in data))
        else:
            body += attr(attribute, data)
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


class FakeKernel:
    """One network namespace with WireGuard devices, behind `make_socket`.

    ``removal``: what it makes of WGALLOWEDIP_A_FLAGS: ``"yes"`` (Linux 6.16), ``"refused"`` (5.6 to 6.15), ``"ignored"`` (out of tree).
    ``dump_bytes``: about how many bytes of peers go into one message of a dump. ``interrupt``: how many dumps are marked as interrupted.
    ``fail``: {command: errno}.
    """

    def __init__(self, names=("wg0",), removal="refused", dump_bytes=4096, interrupt=0, has_module=True):
        self.devices = {name: {"private": None, "public": None, "port": 0, "fwmark": 0, "peers": {}} for name in names}
        self.kinds = dict.fromkeys(names, "wireguard")
        self.removal, self.dump_bytes, self.interrupt, self.has_module = removal, dump_bytes, interrupt, has_module
        self.fail = {}
        self.sent = []  # copies of SET_DEVICE messages
        self.buffers = []  # the very buffers that were sent
        self.public_of = {}
        self.received = []  # the very buffers that datagrams were put into
        self.dirty = False  # whether one was not wiped when the next datagram was asked for
        self.noise = []  # datagrams that come before the next answer: (bytes, port id of the sender)

    def make_socket(self, protocol):
        return _FakeSocket(self, protocol)

    def request(self, protocol, data):
        length, kind, dummy, sequence, dummy = struct.unpack_from("=IHHII", data)
        if length != len(data):
            raise AssertionError("length %d of %d" % (length, len(data)))
        try:
            if protocol == 0:
                return self.links(sequence)
            command = data[16]
            if kind == 16:
                if not self.has_module:
                    raise OSError(errno.ENOENT, "")
                reply = attr(2, b"wireguard\0") + attr(1, struct.pack("=H", FAMILY)) + attr(3, struct.pack("=I", 1))
                return [self.message(kind, 0, sequence, b"\1\2\0\0" + reply), self.error(sequence, 0)]
            if kind != FAMILY:
                raise AssertionError("family %d" % kind)
            if command in self.fail:
                raise OSError(self.fail[command], "")
            if command == 0:
                return self.dump(sequence, attrs(data[20:]))
            self.sent.append(bytes(data))
            self.set(attrs(data[20:]))
            return [self.error(sequence, 0)]
        except OSError as exc:
            return [self.error(sequence, exc.errno)]

    @staticmethod
    def message(kind, flags, sequence, body):
        return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 77) + body

    def error(self, sequence, code):
        return self.message(2, 0x100, sequence, struct.pack("=i", -code) + struct.pack("=IHHII", 36, FAMILY, 5, sequence, 0))

    def links(self, sequence):
        body = b"".join(self.message(16, 2, sequence, bytes(16) + attr(3, name.encode() + b"\0") + (
            nest(18, attr(1, kind.encode() + b"\0")) if kind else b"")) for name, kind in self.kinds.items())
        return [body, self.message(3, 2, sequence, bytes(4))]

    def device(self, attributes):
        name = dict(attributes)[2].rstrip(b"\0").decode()
        if name not in self.kinds:
            raise OSError(errno.ENODEV, "")
        if name not in self.devices:
            raise OSError(errno.EOPNOTSUPP, "")
        return name, self.devices[name]

    # drivers/net/wireguard/netlink.c, wg_set_device and set_peer
    def set(self, attributes):
        dummy, device = self.device(attributes)
        for kind, data in attributes:
            if kind == 3:
                device["private"], device["public"] = data, self.public_of.get(data)
                device["peers"].pop(device["public"], None)
            elif kind == 5 and struct.unpack("=I", data)[0] & REPLACE_PEERS:
                device["peers"].clear()
            elif kind == 6:
                device["port"] = struct.unpack("=H", data)[0]
            elif kind == 7:
                device["fwmark"] = struct.unpack("=I", data)[0]
            elif kind == 8:
                for dummy, peer in attrs(data):
                    self.set_peer(device, dict(attrs(peer)))

    def set_peer(self, device, attributes):
        key = attributes[1]
        flags = struct.unpack("=I", attributes[3])[0] if 3 in attributes else 0
        peer = device["peers"].get(key)
        if peer is None:
            if flags & (REMOVE_ME | UPDATE_ONLY) or key == device["public"]:
                return
            peer = device["peers"][key] = {"psk": bytes(32), "endpoint": None, "keepalive": 0, "ips": [], "handshake": (0, 0)}
        if flags & REMOVE_ME:
            del device["peers"][key]
            return
        peer["psk"] = attributes.get(2, peer["psk"])
        peer["endpoint"] = attributes.get(4, peer["endpoint"])
        if flags & REPLACE_ALLOWED_IPS:
            del peer["ips"][:]
        for dummy, ip in attrs(attributes.get(9, b"")):
            self.set_allowed_ip(device, peer, dict(attrs(ip)))
        if 5 in attributes:
            peer["keepalive"] = struct.unpack("=H", attributes[5])[0]

    def set_allowed_ip(self, device, peer, ip):
        if 4 in ip and self.removal == "refused":
            raise OSError(errno.EINVAL, "")
        family = struct.unpack("=H", ip[1])[0]
        length = ip[3][0]
        bits = {socket.AF_INET: 32, socket.AF_INET6: 128}[family]
        if len(ip[2]) * 8 != bits or length > bits:
            raise OSError(errno.EINVAL, "")
        network = ipaddress.ip_network((ip[2], length), strict=False)
        entry = (family, network.network_address.packed, length)
        if 4 in ip and self.removal == "yes" and struct.unpack("=I", ip[4])[0] & 1:
            if entry in peer["ips"]:
                peer["ips"].remove(entry)
            return
        for other in device["peers"].values():
            if entry in other["ips"]:
                other["ips"].remove(entry)
        peer["ips"].append(entry)

    # wg_get_device_dump and get_peer: a peer that does not fit goes on in the next message with its key and allowed IPs only
    def dump(self, sequence, attributes):
        name, device = self.device(attributes)
        head = attr(6, struct.pack("=H", device["port"])) + attr(7, struct.pack("=I", device["fwmark"])) + attr(2, name.encode() + b"\0")
        if device["private"]:
            head += attr(3, device["private"]) + attr(4, device["public"])
        flags = 2
        if self.interrupt:
            self.interrupt -= 1
            flags |= 0x10
        bodies, peers = [], b""
        for key, peer in device["peers"].items():
            part = attr(1, key) + attr(2, peer["psk"]) + attr(6, struct.pack("=qq", *peer["handshake"]))
            part += attr(5, struct.pack("=H", peer["keepalive"])) + attr(8, struct.pack("=Q", 7)) + attr(7, struct.pack("=Q", 5))
            part += attr(10, struct.pack("=I", 1)) + (attr(4, peer["endpoint"]) if peer["endpoint"] else b"")
            ips = [nest(0, attr(3, bytes([length])), attr(1, struct.pack("=H", family)), attr(2, address))
                   for family, address, length in peer["ips"]]
            while True:
                room = max(1, (self.dump_bytes - len(peers) - len(part)) // 40)
                peers += nest(0, part, nest(9, *ips[:room]) if ips else b"")
                ips, part = ips[room:], attr(1, key)
                if not ips:
                    break
                bodies.append(peers)
                peers = b""
            if len(peers) > self.dump_bytes:
                bodies.append(peers)
                peers = b""
        bodies.append(peers)
        result = []
        for number, body in enumerate(bodies):
            result.append(self.message(FAMILY, flags, sequence, b"\0\1\0\0" + (head if number == 0 else b"") + nest(8, body)))
        return result + [self.message(3, flags, sequence, bytes(4))]


class _FakeSocket:
    def __init__(self, kernel, protocol):
        self.kernel, self.protocol, self.queue = kernel, protocol, []

    def send(self, view):
        self.kernel.buffers.append(view)
        self.queue.extend((datagram, 0) for datagram in self.kernel.request(self.protocol, bytes(view)))
        return len(view)

    def recvmsg_into(self, buffers):
        self.kernel.dirty = self.kernel.dirty or any(buffers[0])
        self.kernel.received.append(buffers[0])
        if self.kernel.noise:
            data, sender = self.kernel.noise.pop(0)
        elif self.queue:
            data, sender = self.queue.pop(0)
        else:
            raise socket.timeout("timed out")
        size = min(len(data), len(buffers[0]))
        buffers[0][:size] = data[:size]
        return size, [], socket.MSG_TRUNC if size < len(data) else 0, (sender, 0)

    def close(self):
        pass


# --- UAPI ----------------------------------------------------------------------------------------------------------------------------

class FakeUserspace:
    """A userspace implementation behind a real socket (wireguard-go, device/uapi.go). ``removal`` as in `FakeKernel`."""

    def __init__(self, directory, name="wg0", removal="refused"):
        self.removal = removal
        self.device = {"private": bytes(32), "port": 0, "fwmark": 0, "peers": {}}
        self.own = None  # public key, raw; tests set it
        self.requests = []
        self.override = None  # answers this instead
        self.path = os.path.join(str(directory), name + ".sock")
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.bind(self.path)
        self.server.listen(8)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def close(self):
        # wakes accept()
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(10)

    def serve(self):
        while True:
            try:
                client, dummy = self.server.accept()
            except OSError:
                return
            with client:
                data = b""
                while not data.endswith(b"\n\n"):
                    part = client.recv(65536)
                    if not part:
                        break
                    data += part
                if data:
                    client.sendall(self.answer(data))

    def answer(self, data):
        self.requests.append(data)
        if self.override is not None:
            return self.override
        lines = data.decode().split("\n")
        if lines[0] == "get=1":
            return self.get().encode()
        try:
            self.set([line.partition("=")[::2] for line in lines[1:-2]])
        except ValueError:
            return b"errno=-22\n\n"
        return b"errno=0\n\n"

    def get(self):
        device = self.device
        out = []
        if any(device["private"]):
            out.append("private_key=" + device["private"].hex())
        out.extend("%s=%d" % (word, device[name]) for word, name in (("listen_port", "port"), ("fwmark", "fwmark")) if device[name])
        for key, peer in device["peers"].items():
            out += ["public_key=" + key.hex(), "preshared_key=" + peer["psk"].hex(), "protocol_version=1"]
            if peer["endpoint"]:
                out.append("endpoint=" + peer["endpoint"])
            out += ["last_handshake_time_sec=0", "last_handshake_time_nsec=0", "tx_bytes=7", "rx_bytes=5",
                    "persistent_keepalive_interval=%d" % peer["keepalive"]]
            out.extend("allowed_ip=%s" % ip for ip in peer["ips"])
        return "\n".join(out + ["errno=0", "", ""])

    def set(self, lines):
        device, key, peer, created = self.device, None, None, False
        for word, value in lines:
            if word == "public_key":
                key = bytes.fromhex(value)
                created = key not in device["peers"] and key != self.own
                if created:
                    device["peers"][key] = {"psk": bytes(32), "endpoint": None, "keepalive": 0, "ips": []}
                peer = device["peers"].get(key, {"psk": bytes(32), "endpoint": None, "keepalive": 0, "ips": []})
            elif key is None:
                self.set_device(word, value)
            elif word == "remove" or (word == "update_only" and created):
                device["peers"].pop(key, None)
                peer = {"psk": bytes(32), "endpoint": None, "keepalive": 0, "ips": []}
            elif word == "preshared_key":
                peer["psk"] = bytes.fromhex(value)
            elif word == "endpoint":
                peer["endpoint"] = value
            elif word == "persistent_keepalive_interval":
                peer["keepalive"] = int(value)
            elif word == "replace_allowed_ips":
                del peer["ips"][:]
            elif word == "allowed_ip":
                self.allowed_ip(peer, value)
            elif word != "update_only":
                raise ValueError(word)

    def set_device(self, word, value):
        if word == "private_key":
            self.device["private"] = bytes.fromhex(value)
            self.device["peers"].pop(self.own, None)
        elif word in ("listen_port", "fwmark"):
            self.device[{"listen_port": "port"}.get(word, word)] = int(value)
        elif word == "replace_peers":
            self.device["peers"].clear()
        else:
            raise ValueError(word)

    def allowed_ip(self, peer, value):
        remove = value.startswith("-")
        if remove and self.removal == "refused":
            raise ValueError(value)
        network = str(ipaddress.ip_network(value.lstrip("-"), strict=False))
        if remove and self.removal == "yes":
            if network in peer["ips"]:
                peer["ips"].remove(network)
            return
        known = any(peer is other for other in self.device["peers"].values())
        if not known:
            return
        for other in self.device["peers"].values():
            if network in other["ips"]:
                other["ips"].remove(network)
        peer["ips"].append(network)
