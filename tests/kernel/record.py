# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record what the real kernel and the real `wg` say over generic netlink, as fixtures for the unit tests of the netlink client.

    record.py            on the host: boot the machine of vm.py, run itself there, write recorded/*.json
    record.py --guest    inside the machine

Every key in the recordings is a test key made from its name (test_key), so private and preshared keys may be in them: that the client
drops them is one of the things to test.

recorded/*.json, each {"about", "kernel", "wg", "cases": [...]}; all bytes as lower-case hex of whole datagrams:
    get_device.json   {"name", "about", "request", "replies": [datagram...], "device": what was configured}
    set_device.json   {"name", "about", "command", "requests": [datagram...], "replies": [datagram...]}; from strace of the wg tool
    kernel.json       {"name", "about", "request", "replies", "after": allowed IPs by peer as `wg show` prints them}: how this kernel
                      answers what the client may send: unknown attributes, removal flags, flags on absent peers
"""
from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent

# include/uapi/linux/{netlink,genetlink,wireguard}.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_ROOT_MATCH = 0x1, 0x4, 0x300
NETLINK_GENERIC, NETLINK_EXT_ACK, NETLINK_CAP_ACK, SOL_NETLINK = 16, 11, 10, 270
NLMSG_ERROR, NLMSG_DONE = 2, 3
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME = 16, 3, 2
WG_CMD_GET_DEVICE, WG_CMD_SET_DEVICE = 0, 1
NLA_F_NESTED = 0x8000
DEV_IFNAME, DEV_PRIVATE_KEY, DEV_FLAGS, DEV_PORT, DEV_FWMARK, DEV_PEERS = 2, 3, 5, 6, 7, 8
PEER_KEY, PEER_PSK, PEER_FLAGS, PEER_ENDPOINT, PEER_KEEPALIVE, PEER_ALLOWED_IPS, PEER_PROTOCOL = 1, 2, 3, 4, 5, 9, 10
IP_FAMILY, IP_ADDR, IP_MASK, IP_FLAGS = 1, 2, 3, 4
F_REMOVE_ME, F_REPLACE_ALLOWED_IPS, F_UPDATE_ONLY = 1, 2, 4
IP_F_REMOVE_ME = 1  # Linux 6.16


def test_key(name):
    """32 bytes that anyone can make again: SHA-256 of the name."""
    return hashlib.sha256(("kubemesh test key " + name).encode()).digest()


def b64(raw):
    return base64.b64encode(raw).decode()


def attr(kind, data):
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def nest(kind, *parts):
    return attr(kind | NLA_F_NESTED, b"".join(parts))


def u8(kind, value):
    return attr(kind, struct.pack("=B", value))


def u16(kind, value):
    return attr(kind, struct.pack("=H", value))


def u32(kind, value):
    return attr(kind, struct.pack("=I", value))


def allowed_ip(text, flags=None, unknown=None):
    address, length = text.split("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    parts = [u16(IP_FAMILY, family), attr(IP_ADDR, socket.inet_pton(family, address)), u8(IP_MASK, int(length))]
    if flags is not None:
        parts.append(u32(IP_FLAGS, flags))
    if unknown is not None:
        parts.append(u32(unknown, 0))
    return nest(0, *parts)


def peer(key, *parts):
    return nest(0, attr(PEER_KEY, key), *parts)


class Netlink:
    def __init__(self, buffer=1 << 16):
        # The kernel fills a dump's datagrams up to the largest buffer the socket has received with so far (32 KiB at most)
        self.buffer = buffer
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self.sock.bind((0, 0))
        self.sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self.sock.settimeout(20)
        self.seq = 100
        reply = self.ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, attr(CTRL_ATTR_FAMILY_NAME, b"wireguard\0"), 0, 1)[1][0]
        self.family_request = self.last
        self.family_reply = reply
        offset = 20
        while offset < len(reply):
            length, kind = struct.unpack_from("=HH", reply, offset)
            if kind == 1:  # CTRL_ATTR_FAMILY_ID
                (self.family,) = struct.unpack_from("=H", reply, offset + 4)
            offset += (length + 3) & ~3

    def ask(self, family, command, payload, flags, version=1):
        """Send one message, collect datagrams until the last one. Returns (request, [datagram])."""
        self.seq += 1
        request = struct.pack("=IHHII", 20 + len(payload), family, NLM_F_REQUEST | flags, self.seq, 0)
        request += struct.pack("=BBH", command, version, 0) + payload
        self.last = request
        self.sock.send(request)
        replies = []
        while True:
            data = self.sock.recv(self.buffer)
            replies.append(data)
            offset, done = 0, False
            while offset + 16 <= len(data):
                length, kind, msg_flags = struct.unpack_from("=IHH", data, offset)
                done = kind in (NLMSG_ERROR, NLMSG_DONE) or not msg_flags & 2
                offset += (length + 3) & ~3
            if done:
                return request, replies

    def get(self, name):
        return self.ask(self.family, WG_CMD_GET_DEVICE, attr(DEV_IFNAME, name.encode() + b"\0"), NLM_F_ROOT_MATCH | NLM_F_ACK)

    def set(self, name, *parts):
        return self.ask(self.family, WG_CMD_SET_DEVICE, attr(DEV_IFNAME, name.encode() + b"\0") + b"".join(parts), NLM_F_ACK)


def error_of(datagram):
    """(errno name or "ok", extended ack text) of an NLMSG_ERROR datagram."""
    length, kind, flags = struct.unpack_from("=IHH", datagram)
    if kind != NLMSG_ERROR:
        return None
    (code,) = struct.unpack_from("=i", datagram, 16)
    text = ""
    if flags & 0x200:  # NLM_F_ACK_TLVS
        inner = 16 if flags & 0x100 else struct.unpack_from("=I", datagram, 20)[0]
        offset = 20 + inner
        while offset + 4 <= length:
            size, attribute = struct.unpack_from("=HH", datagram, offset)
            if attribute & 0x3FFF == 1:
                text = datagram[offset + 4:offset + size].rstrip(b"\0").decode()
            offset += max(4, (size + 3) & ~3)
    return errno.errorcode.get(-code, str(code)) if code else "ok", text


def sh(*argv, **kwargs):
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout


def allowed(name):
    out = {}
    for line in sh("wg", "show", name, "allowed-ips").splitlines():
        key, dummy, addresses = line.partition("\t")
        out[key] = [] if addresses == "(none)" else addresses.split()
    return out


def strace(argv, stdin=None):
    """Run argv under strace; return the netlink datagrams it sent and received on generic netlink sockets, in order."""
    with tempfile.NamedTemporaryFile("r") as trace:
        subprocess.run(["strace", "-f", "-o", trace.name, "-e", "trace=socket,sendto,recvfrom,sendmsg,recvmsg", "-e", "write=all",
                        "-e", "read=all"] + argv, input=stdin, text=True, check=True)
        sent, received, fds, current, data = [], [], set(), None, b""

        def flush():
            if current is not None and data:
                current.append(data)

        for line in trace:
            dump = re.match(r"^ \| [0-9a-f]+  ((?:[0-9a-f]{2} {1,2}|   )+)", line)
            if dump:
                data += bytes.fromhex(dump.group(1).replace(" ", ""))
                continue
            if line.startswith(" * "):  # "* 36 bytes in buffer 0": the dump of a recvmsg follows
                continue
            flush()
            current, data = None, b""
            opened = re.search(r"socket\(AF_NETLINK, [^,]+, NETLINK_GENERIC\) = (\d+)", line)
            if opened:
                fds.add(opened.group(1))
            call = re.search(r"\b(send|recv)(?:to|msg)\((\d+)", line)
            if call and call.group(2) in fds:
                current = sent if call.group(1) == "send" else received
        flush()
    return sent, received


# ------------------------------------------------------------------------------------------------------------------- inside the machine

def guest(results):
    sh("modprobe", "wireguard")
    kernel, tool = os.uname().release, sh("wg", "--version").split(" - ")[0].strip()
    netlink = Netlink()
    keys = {name: test_key(name) for name in ("one", "two", "three", "four")}

    def write(name, about, cases):
        content = {"about": about, "kernel": kernel, "wg": tool, "family": netlink.family, "cases": cases}
        (results / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    def device(name):
        sh("ip", "link", "add", name, "type", "wireguard")
        return name

    # ---- what GET_DEVICE answers
    cases = []

    def record_get(case, about, name, configured, client=netlink):
        request, replies = client.get(name)
        cases.append({"name": case, "about": about, "request": request.hex(), "replies": [r.hex() for r in replies], "device": configured})

    cases.append({"name": "family", "about": "CTRL_CMD_GETFAMILY of wireguard", "request": netlink.family_request.hex(),
                  "replies": [netlink.family_reply.hex()], "device": None})
    name = device("rec0")
    record_get("new", "as ip link add leaves it: no key, no port, no peer", name, {"listen_port": 0, "fwmark": 0, "peers": {}})

    config = ["[Interface]", "PrivateKey = " + b64(test_key("private")), "ListenPort = 51840", "FwMark = 0x1000"]
    three = {
        b64(keys["one"]): {"endpoint": "198.18.0.11:51840", "keepalive": 0, "has_preshared_key": False,
                           "allowed_ips": ["10.244.1.0/24", "198.18.0.11/32", "fd00:10:244:1::/64"]},
        b64(keys["two"]): {"endpoint": "[2001:db8::12]:51841", "keepalive": 25, "has_preshared_key": True,
                           "allowed_ips": ["10.244.2.0/24", "2001:db8::12/128", "fe80::1234:5678:9abc:def0/128"]},
        b64(keys["three"]): {"endpoint": None, "keepalive": 0, "has_preshared_key": False, "allowed_ips": []}}
    for key, wanted in three.items():
        config += ["[Peer]", "PublicKey = " + key]
        if wanted["endpoint"]:
            config.append("Endpoint = " + wanted["endpoint"])
        if wanted["keepalive"]:
            config.append("PersistentKeepalive = %d" % wanted["keepalive"])
        if wanted["has_preshared_key"]:
            config.append("PresharedKey = " + b64(test_key("preshared")))
        if wanted["allowed_ips"]:
            config.append("AllowedIPs = " + ", ".join(wanted["allowed_ips"]))
    sh("wg", "setconf", name, "/dev/stdin", input="\n".join(config) + "\n")
    public = sh("wg", "show", name, "public-key").strip()
    shape = {"listen_port": 51840, "fwmark": 0x1000, "public_key": public, "peers": three}
    record_get("three_peers", "IPv4, IPv6 and no endpoint; a preshared key; keepalive; a peer without allowed IPs; device down", name,
               shape)

    name = device("rec1")
    addresses = ["10.%d.%d.0/24" % (i // 256, i % 256) for i in range(500)] + ["fd00:0:0:%x::/64" % i for i in range(100)]
    sh("wg", "setconf", name, "/dev/stdin", input="\n".join(
        ["[Interface]", "PrivateKey = " + b64(test_key("private")), "[Peer]", "PublicKey = " + b64(keys["one"]),
         "Endpoint = 198.18.0.11:51840", "AllowedIPs = " + ", ".join(addresses), "[Peer]", "PublicKey = " + b64(keys["two"]),
         "AllowedIPs = 192.0.2.1/32"]) + "\n")
    split = {"listen_port": None, "fwmark": 0, "public_key": public, "peers": {
        b64(keys["one"]): {"endpoint": "198.18.0.11:51840", "keepalive": 0, "has_preshared_key": False, "allowed_ips": addresses},
        b64(keys["two"]): {"endpoint": None, "keepalive": 0, "has_preshared_key": False, "allowed_ips": ["192.0.2.1/32"]}}}
    small = Netlink(buffer=8192)
    record_get("one_datagram", "one peer with 600 allowed IPs and one after it, asked with a receive buffer of 64 KiB", name, split)
    record_get("split_peer", "the same with a receive buffer of 8 KiB: the first peer comes in several messages, its later parts without "
               "endpoint and counters", name, split, small)

    name = device("rec2")
    config, peers = ["[Interface]", "PrivateKey = " + b64(test_key("private"))], {}
    for i in range(60):
        key = b64(test_key("many %d" % i))
        peers[key] = {"endpoint": "198.18.1.%d:51840" % (i + 1), "keepalive": 0, "has_preshared_key": False,
                      "allowed_ips": ["10.245.%d.0/24" % i, "198.18.1.%d/32" % (i + 1)]}
        config += ["[Peer]", "PublicKey = " + key, "Endpoint = " + peers[key]["endpoint"],
                   "AllowedIPs = " + ", ".join(peers[key]["allowed_ips"])]
    sh("wg", "setconf", name, "/dev/stdin", input="\n".join(config) + "\n")
    record_get("sixty_peers", "60 peers, which take several messages (receive buffer of 8 KiB)", name,
               {"listen_port": None, "fwmark": 0, "public_key": public, "peers": peers}, small)

    # a device that has talked: handshake time and counters are not zero
    record_session(netlink, cases)
    request, replies = netlink.get("nosuchdev")
    cases.append({"name": "no_device", "about": "a device that does not exist: %s" % (error_of(replies[-1]),), "request": request.hex(),
                  "replies": [r.hex() for r in replies], "device": None})
    sh("ip", "link", "add", "rec9", "type", "dummy")
    request, replies = netlink.get("rec9")
    cases.append({"name": "other_kind", "about": "a device that is no WireGuard: %s" % (error_of(replies[-1]),), "request": request.hex(),
                  "replies": [r.hex() for r in replies], "device": None})
    write("get_device.json", "WG_CMD_GET_DEVICE dumps of the real kernel", cases)

    # ---- what the wg tool sends
    cases = []

    def record_wg(case, about, argv, stdin=None):
        sent, received = strace(argv, stdin)
        cases.append({"name": case, "about": about, "command": " ".join(argv), "stdin": stdin, "requests": [d.hex() for d in sent],
                      "replies": [d.hex() for d in received]})

    name = device("rec3")
    key_file, psk_file = "/tmp/rec.key", "/tmp/rec.psk"
    pathlib.Path(key_file).write_text(b64(test_key("private")) + "\n")
    pathlib.Path(psk_file).write_text(b64(test_key("preshared")) + "\n")
    one, two = b64(keys["one"]), b64(keys["two"])
    record_wg("set_device", "key, port and mark", ["wg", "set", name, "private-key", key_file, "listen-port", "51840", "fwmark", "0x1000"])
    record_wg("set_peer", "everything a peer can have", [
        "wg", "set", name, "peer", one, "preshared-key", psk_file, "endpoint", "198.18.0.11:51840", "persistent-keepalive", "25",
        "allowed-ips", "10.244.1.0/24,fd00:10:244:1::/64"])
    record_wg("set_peer_v6", "an IPv6 endpoint", ["wg", "set", name, "peer", two, "endpoint", "[2001:db8::12]:51841"])
    record_wg("set_peer_scoped", "an IPv6 endpoint with a scope",
              ["wg", "set", name, "peer", two, "endpoint", "[fe80::12%lo]:51841"])
    record_wg("set_keepalive_off", "keepalive off", ["wg", "set", name, "peer", one, "persistent-keepalive", "off"])
    record_wg("remove_peer", "a peer removed", ["wg", "set", name, "peer", two, "remove"])
    record_wg("setconf", "setconf: replace everything", ["wg", "setconf", name, "/dev/stdin"], "\n".join(
        ["[Interface]", "PrivateKey = " + b64(test_key("private")), "ListenPort = 51840", "[Peer]", "PublicKey = " + one,
         "AllowedIPs = 10.244.1.0/24", "[Peer]", "PublicKey = " + two, "AllowedIPs = 10.244.2.0/24"]) + "\n")
    record_wg("addconf_split", "a peer with 1,500 allowed IPs, which the tool splits over several messages",
              ["wg", "addconf", name, "/dev/stdin"],
              "\n".join(["[Peer]", "PublicKey = " + b64(keys["three"]),
                         "AllowedIPs = " + ", ".join("10.%d.%d.0/24" % (i // 256, i % 256) for i in range(1500))]) + "\n")
    write("set_device.json", "WG_CMD_SET_DEVICE messages of the wg tool, taken with strace (each sent datagram, each answer)", cases)

    # ---- how the kernel answers what we may send
    cases = []
    name = device("rec4")

    def try_set(case, about, *parts):
        request, replies = netlink.set(name, *parts)
        result = error_of(replies[-1])
        cases.append({"name": case, "about": about, "request": request.hex(), "replies": [r.hex() for r in replies],
                      "error": result[0], "ext_ack": result[1], "after": allowed(name)})
        print("%-34s %s %s -> %s" % (case, result[0], result[1], {k[:4]: v for k, v in allowed(name).items()}), flush=True)

    one, two, three = keys["one"], keys["two"], keys["three"]
    try_set("add", "a peer with three allowed IPs", nest(DEV_PEERS, peer(one, nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.1.0/24"), allowed_ip("10.0.2.0/24"), allowed_ip("fd00:1::/64")))))
    try_set("append", "an allowed IP is appended when no replace flag is given", nest(DEV_PEERS, peer(
        one, u32(PEER_FLAGS, F_UPDATE_ONLY), nest(PEER_ALLOWED_IPS, allowed_ip("10.0.3.0/24")))))
    try_set("host_bits", "an allowed IP with host bits set is masked", nest(DEV_PEERS, peer(one, nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.4.7/24")))))
    try_set("move", "an allowed IP that is given to another peer moves", nest(DEV_PEERS, peer(two, nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.3.0/24")))))
    try_set("flags_zero", "WGALLOWEDIP_A_FLAGS = 0", nest(DEV_PEERS, peer(one, u32(PEER_FLAGS, F_UPDATE_ONLY), nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.5.0/24", flags=0)))))
    try_set("remove_flag", "WGALLOWEDIP_A_FLAGS = REMOVE_ME (Linux 6.16 and later)", nest(DEV_PEERS, peer(
        one, u32(PEER_FLAGS, F_UPDATE_ONLY), nest(PEER_ALLOWED_IPS, allowed_ip("10.0.2.0/24", flags=IP_F_REMOVE_ME)))))
    try_set("remove_flag_after_others", "the same as the second allowed IP of a second peer: what came before it was applied?", nest(
        DEV_PEERS,
        peer(two, nest(PEER_ALLOWED_IPS, allowed_ip("10.0.6.0/24"))),
        peer(one, u32(PEER_FLAGS, F_UPDATE_ONLY), nest(PEER_ALLOWED_IPS, allowed_ip("10.0.7.0/24"),
                                                       allowed_ip("10.0.2.0/24", flags=IP_F_REMOVE_ME)))))
    try_set("unknown_attribute", "an allowed IP attribute nobody defined (99)", nest(DEV_PEERS, peer(
        one, nest(PEER_ALLOWED_IPS, allowed_ip("10.0.8.0/24", unknown=99)))))
    try_set("remove_by_throwaway", "remove one allowed IP on any kernel: give it to a new peer and remove that, in one message", nest(
        DEV_PEERS,
        peer(three, nest(PEER_ALLOWED_IPS, allowed_ip("10.0.2.0/24"))),
        peer(three, u32(PEER_FLAGS, F_REMOVE_ME | F_UPDATE_ONLY))))
    try_set("update_only_absent", "UPDATE_ONLY of a peer that is not there", nest(DEV_PEERS, peer(
        three, u32(PEER_FLAGS, F_UPDATE_ONLY), nest(PEER_ALLOWED_IPS, allowed_ip("10.0.9.0/24")))))
    try_set("remove_absent", "REMOVE_ME of a peer that is not there", nest(DEV_PEERS, peer(three, u32(PEER_FLAGS, F_REMOVE_ME))))
    try_set("unknown_peer_flag", "a peer flag nobody defined", nest(DEV_PEERS, peer(one, u32(PEER_FLAGS, 0x80))))
    try_set("replace_one", "REPLACE_ALLOWEDIPS on one peer leaves the others", nest(DEV_PEERS, peer(
        one, u32(PEER_FLAGS, F_REPLACE_ALLOWED_IPS), nest(PEER_ALLOWED_IPS, allowed_ip("10.0.1.0/24")))))
    try_set("bad_mask", "an IPv4 allowed IP with mask 33", nest(DEV_PEERS, peer(two, nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.10.0/24"), nest(0, u16(IP_FAMILY, socket.AF_INET), attr(IP_ADDR, bytes(4)), u8(IP_MASK, 33))))))
    try_set("link_local", "a link-local allowed IP", nest(DEV_PEERS, peer(two, nest(PEER_ALLOWED_IPS, allowed_ip("fe80::1/128")))))
    own = bytes(base64.b64decode(sh("wg", "pubkey", input=b64(test_key("private")) + "\n").strip()))
    try_set("private_key", "the private key, before a peer with the own public key", attr(DEV_PRIVATE_KEY, test_key("private")))
    try_set("own_key_as_peer", "the device's own public key as a peer", nest(DEV_PEERS, peer(own, nest(
        PEER_ALLOWED_IPS, allowed_ip("10.0.11.0/24")))))
    try_set("no_nested_flag", "containers without NLA_F_NESTED", attr(DEV_PEERS, attr(0, attr(PEER_KEY, two) + attr(
        PEER_ALLOWED_IPS, attr(0, u16(IP_FAMILY, socket.AF_INET) + attr(IP_ADDR, bytes([10, 0, 12, 0])) + u8(IP_MASK, 24))))))
    try_set("peer_key_short", "a public key of 31 bytes", nest(DEV_PEERS, nest(0, attr(PEER_KEY, two[:31]))))
    name = "nosuchdev"
    request, replies = netlink.set(name)
    result = error_of(replies[-1])
    cases.append({"name": "no_device", "about": "SET_DEVICE of a device that does not exist", "request": request.hex(),
                  "replies": [r.hex() for r in replies], "error": result[0], "ext_ack": result[1], "after": {}})
    write("kernel.json", "how this kernel answers single WG_CMD_SET_DEVICE messages, and the allowed IPs afterwards", cases)


def record_session(netlink, cases):
    """Two namespaces with a session between them: last_handshake, rx and tx in a dump."""
    private = {side: test_key("session " + side) for side in "ab"}
    public = {side: sh("wg", "pubkey", input=b64(raw) + "\n").strip() for side, raw in private.items()}
    for side, other, number in (("a", "b", 1), ("b", "a", 2)):
        sh("ip", "netns", "add", "rec" + side)
        # made inside: a WireGuard device keeps its UDP socket in the namespace it was born in
        sh("ip", "-n", "rec" + side, "link", "add", "sess" + side, "type", "wireguard")
        prefix = ["ip", "netns", "exec", "rec" + side]
        sh(*prefix, "wg", "set", "sess" + side, "private-key", "/dev/stdin", "listen-port", "51840", "peer", public[other], "allowed-ips",
           "10.9.0.%d/32" % (3 - number), "endpoint", "198.18.0.%d:51840" % (3 - number), input=b64(private[side]) + "\n")
    sh("ip", "link", "add", "reca", "netns", "reca", "type", "veth", "peer", "name", "recb", "netns", "recb")
    for side, number in (("a", 1), ("b", 2)):
        for args in (["addr", "add", "198.18.0.%d/24" % number, "dev", "rec" + side], ["link", "set", "rec" + side, "up"],
                     ["addr", "add", "10.9.0.%d/24" % number, "dev", "sess" + side], ["link", "set", "sess" + side, "up"]):
            sh("ip", "-n", "rec" + side, *args)
    sh("ip", "netns", "exec", "reca", "ping", "-c", "3", "-i", "0.2", "-W", "5", "10.9.0.2")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = os.open("/run/netns/reca", os.O_RDONLY)
            import ctypes
            if ctypes.CDLL(None, use_errno=True).setns(handle, 0x40000000):  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), "setns")
            inner = Netlink()
            request, replies = inner.get("sessa")
            shown = sh("wg", "show", "sessa", "latest-handshakes").split()[1], sh("wg", "show", "sessa", "transfer").split()[1:]
            pathlib.Path("/tmp/session.json").write_text(json.dumps({
                "name": "session", "about": "up, after a handshake and three pings; handshake and transfer as wg shows them (the client "
                "must say the same)", "request": request.hex(), "replies": [r.hex() for r in replies],
                "device": {"public_key": public["a"], "listen_port": 51840, "fwmark": 0, "last_handshake_seconds": int(shown[0]),
                           "rx_bytes": int(shown[1][0]), "tx_bytes": int(shown[1][1]), "peers": {public["b"]: {
                               "endpoint": "198.18.0.2:51840", "keepalive": 0, "has_preshared_key": False,
                               "allowed_ips": ["10.9.0.2/32"]}}}}))
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("recording a session failed")
    cases.append(json.loads(pathlib.Path("/tmp/session.json").read_text()))


def main():
    if sys.argv[1:] == ["--guest"]:
        guest(pathlib.Path(os.environ["KM_RESULTS"]))
        return 0
    import vm
    with tempfile.TemporaryDirectory(prefix="kubemesh-record-") as name:
        payload = pathlib.Path(name)
        (payload / "record.py").write_bytes(pathlib.Path(__file__).read_bytes())
        (payload / "run.sh").write_text("#!/bin/sh\nexec python3 /payload/record.py --guest\n")
        (payload / "run.sh").chmod(0o755)
        results = payload / "results"
        outcome = vm.run(payload, results=results, timeout=180)
        if outcome.rc == 0:
            (HERE / "recorded").mkdir(exist_ok=True)
            for path in sorted(results.glob("*.json")):
                (HERE / "recorded" / path.name).write_bytes(path.read_bytes())
        return outcome.rc


if __name__ == "__main__":
    sys.exit(main())
