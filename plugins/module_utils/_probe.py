# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""Does every peer answer through the tunnel?

A handshake is no proof (rke2 #9338: all handshakes fine, all traffic in clear). The proof is an ICMPv6 echo (RFC 4443, section 4) from our
probe address to that of the peer, both link-local on the mesh device: question and answer can only go through this device, whatever the
routes are. First a small packet, which makes the handshake; then one as big as the device's MTU, which comes back as big, so that both
directions carried it. Afterwards the device itself is asked: it must know a fresh handshake of this peer and have received something.

The node agent may not open a raw socket. It *knocks* instead (`run_knock`): a UDP datagram to the probe address of the peer and a port
where nobody listens, which the peer's kernel answers with "port unreachable" (RFC 4443, section 3.1), through the tunnel again. The answer
is never of full size, so this direction is proven with packets of full size, and the other one by the peer.

Where the node has no IPv6 at all, datagrams to the peer's IPv4 address, bound to the device, make the handshake, and handshake and
received bytes are all that is judged ("handshake only").

`EchoSchedule` and the functions above it are pure: when is which packet sent, what do answers mean. No clock, no sockets; the tests drive
it with a network of their own. Below are the sockets.

Words: *size* is that of the whole IPv6 packet in bytes, as the MTU of the device counts it. Times are seconds of a monotonic clock unless
called epoch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._pacer import Pacer
from ansible_collections.kubemesh.wireguard.plugins.module_utils._status import HANDSHAKE_FRESH

# Seconds: with a handshake younger than this the session surely stands (REKEY_AFTER_TIME 120, same place), so nothing can cross.
SESSION_SECONDS = 120

ICMPV6_ECHO_REQUEST = 128  # RFC 4443, section 4.1
ICMPV6_ECHO_REPLY = 129  # RFC 4443, section 4.2
ICMPV6_FILTER = 1  # socket option, include/uapi/linux/icmpv6.h; not in Python's socket module
IPV6_DONTFRAG = 62  # socket option, include/uapi/linux/in6.h; not in Python's socket module before 3.9 everywhere
IPV6_RECVERR = 25  # socket option, include/uapi/linux/in6.h; not in Python's socket module
MSG_ERRQUEUE = 0x2000  # include/linux/socket.h
SO_EE_ORIGIN_ICMP6 = 3  # include/uapi/linux/errqueue.h
ICMPV6_UNREACHABLE, PORT_UNREACHABLE = 1, 4  # RFC 4443, section 3.1
KNOCK_PORT = 9  # discard (RFC 863)
UDP_HEADERS = 48  # bytes: IPv6 header 40, UDP header 8
SO_BINDTODEVICE = 25  # include/uapi/asm-generic/socket.h
SO_RCVBUFFORCE = 33  # same file
SIOCGIFMTU = 0x8921  # include/uapi/linux/sockios.h
HEADERS = 48  # bytes: IPv6 header 40 (RFC 8200, section 3), ICMPv6 echo header 8
NONCE_BYTES = 8
SMALL_SIZE = HEADERS + NONCE_BYTES
IPV6_MINIMUM = 1280  # bytes, RFC 8200, section 5

# Packets a second, all peers together. 5,000 peers then have their small and their full-size packet within 5 s, at 11 Mbit/s; it is also
# what the receiver of 2,000 handshakes a second can do on one core (about 0.2 ms each).
RATE = 2000.0
# Packets that may go at once after a pause.
BURST = 32
# First packets a second. More slowly than RATE, so that resending what was lost need not wait for them.
FIRST_RATE = 1500.0
# Seconds in which the first packets of a small mesh are spread, so that nodes that start together do not meet on one node.
FIRST_SPREAD = 0.2
# Seconds that one side of a pair waits for the other. Two first handshakes that cross are both thrown away, and WireGuard tries again
# only 5 s later.
LATE_SECONDS = 1.0
# Seconds between two looks at the device for handshakes that need not be waited for any more, and how many times as long as it took a look
# the next one waits: reading 5,000 peers takes a tenth of a second.
LATE_LOOK = 0.05
LATE_REST = 4.0
# Seconds until a packet is taken for lost. A handshake over the longest terrestrial path and back is below 1 s.
SMALL_RESEND = 1.0
FULL_RESEND = 0.5
JITTER = 0.2  # share of these, so that nodes do not stay in step
# Full-size packets without answer before other sizes are tried.
FULL_TRIES = 3
# Times that all sizes are tried.
LADDER_ROUNDS = 3
# Sizes tried at most; WireGuard pads to 16 bytes, so a finer ladder tells nothing.
LADDER_STEPS = 16
PADDING = 16
# Names in the result of a module; the rest is in the proof file, which stays on the node.
LISTED = 50

_ADVICE = {
    "no_key": "there is no public key of this generation in the mesh document; make the node's key and compute the document anew",
    "not_configured": "the device has no peer with its public key; bring the device up to the document (module interface) and try again",
    "no_endpoint": "no handshake, and no endpoint to send one to; give it one (mesh_endpoint), or a keepalive if it is behind NAT",
    "no_handshake": "no handshake with %(endpoint)s; let UDP port %(port)s through every firewall between the two nodes, both ways, and "
                    "see that the mesh device of the peer is up and has this node's public key",
    "no_echo": "there is a handshake, but no echo; let ICMPv6 echo through on the mesh device of both nodes, and see that the peer's "
               "device has its probe address %(address)s, its sysctl net.ipv6.icmp.echo_ignore_all is 0, and IPv6 is not disabled there",
    "no_traffic": "there is a handshake, but nothing was received in this time; see that the peer's device is up and has this node's "
                  "public key and addresses",
    "stale": "it answered, but the device shows no handshake of the last %(limit)d s; look for another device with this probe address",
    "full_size_lost": "small packets come back, packets of the full %(mtu)d bytes do not%(measured)s; lower mesh_mtu%(advice)s, or let the "
                      "path carry what it promises",
}


# --- packets -------------------------------------------------------------------------------------------------------------------------

def echo_request(ident, sequence, nonce, size):
    """ICMPv6 echo request whose IPv6 packet has ``size`` bytes, as bytes; the kernel fills in the checksum (RFC 3542, section 3.1)."""
    padding = size - HEADERS - len(nonce)
    if padding < 0:
        raise ValueError("size %d is below %d" % (size, HEADERS + len(nonce)))
    return struct.pack("!BBHHH", ICMPV6_ECHO_REQUEST, 0, 0, ident, sequence) + nonce + bytes(padding)


def parse_reply(data, ident, nonce):
    """An ICMPv6 packet -> (sequence, size) if it answers a request of ours, else None."""
    if len(data) < 8 + len(nonce):
        return None
    kind, code, dummy, found_ident, sequence = struct.unpack_from("!BBHHH", data)
    if kind != ICMPV6_ECHO_REPLY or code != 0 or found_ident != ident or data[8:8 + len(nonce)] != nonce:
        return None
    return sequence, len(data) + HEADERS - 8


def ladder(size):
    """Sizes to try where ``size`` is lost, biggest first: from one step below ``size`` to what IPv6 needs, and a few below."""
    top = size - PADDING
    step = max(PADDING, -(-(top - IPV6_MINIMUM) // (LADDER_STEPS * PADDING)) * PADDING)
    sizes = list(range(top, IPV6_MINIMUM, -step))
    return [value for value in sizes + [IPV6_MINIMUM, 1200, 1000, 576] if SMALL_SIZE < value < size]


class EchoSchedule:
    """When to send which packet to whom, and what came back. Pure: the time is an argument, randomness too.

    :param peers: list of {"name": str, "address": any hashable, "size": full size in bytes or None for small packets only, "late": bool}.
    :param start: time.
    :param generator: ``random.Random`` or alike: ``shuffle``, ``random``.
    :param late_seconds: how long the late ones wait for the other side.
    """

    def __init__(self, peers, start, generator, late_seconds=LATE_SECONDS):
        self.random = generator.random
        self.pacer = Pacer(start, RATE, BURST)
        self.peers = {}
        self.open = set()
        self.late = {peer["address"] for peer in peers if peer["late"]}
        order = list(peers)
        generator.shuffle(order)
        spread = max(FIRST_SPREAD if len(order) > 1 else 0.0, len(order) / FIRST_RATE)
        for position, peer in enumerate(order):
            self.peers[peer["address"]] = {
                "name": peer["name"], "full": peer["size"], "phase": "small", "tries": 0, "sequence": 0, "sent": {}, "rtt": None,
                "size": 0, "error": None}
            self.open.add(peer["address"])
            self.pacer.at(start + spread * position / len(order) + (late_seconds if peer["late"] else 0.0), peer["address"])

    def done(self):
        """True when nothing more is to be learned."""
        return not self.open

    def next_time(self, now):
        """Time of the next packet, None if there is none."""
        return self.pacer.next_time(now)

    def hasten(self, now, addresses):
        """These, of the ``late`` ones, need not be waited for any more: their first handshake is over."""
        for address in self.late & set(addresses):
            self.late.discard(address)
            self.pacer.at(now, address)

    def due(self, now):
        """-> list of (address, sequence, size) to send now."""
        packets = []
        for address in self.pacer.due(now):
            self.late.discard(address)
            peer = self.peers[address]
            sizes = self._sizes(address, peer)
            self.pacer.spend(len(sizes))
            for size in sizes:
                sequence = peer["sequence"] = (peer["sequence"] + 1) % 65536
                peer["sent"][sequence] = now
                packets.append((address, sequence, size))
            if address in self.open:
                pause = SMALL_RESEND if peer["phase"] == "small" else FULL_RESEND
                self.pacer.at(now + pause * (1.0 + JITTER * self.random()), address)
        return packets

    def _settle(self, address):
        self.open.discard(address)
        self.pacer.forget(address)

    def _sizes(self, address, peer):
        if peer["phase"] == "small":
            return [SMALL_SIZE]
        if peer["phase"] == "full" and peer["tries"] < FULL_TRIES:
            peer["tries"] += 1
            return [peer["full"]]
        if peer["phase"] == "full":
            peer["phase"], peer["tries"] = "ladder", 0
        if peer["tries"] >= LADDER_ROUNDS:
            self._settle(address)
            return []
        peer["tries"] += 1
        return [peer["full"]] + [size for size in ladder(peer["full"]) if size > peer["size"]]

    def failed(self, address, error):
        """The system refused to send to a peer; ``error`` is text for people. It is tried again as if it were lost."""
        self.peers[address]["error"] = error

    def received(self, now, address, sequence, size):
        """An answer came in."""
        peer = self.peers.get(address)
        if peer is None or sequence not in peer["sent"]:
            return
        rtt = now - peer["sent"][sequence]
        peer["rtt"] = rtt if peer["rtt"] is None else min(peer["rtt"], rtt)
        peer["size"] = max(peer["size"], size)
        if address not in self.open:
            return
        if peer["full"] is None or peer["size"] >= peer["full"]:
            self._settle(address)
        elif peer["phase"] == "small":
            peer["phase"] = "full"
            self.pacer.at(now, address)

    def results(self):
        """-> {name: {"rtt": seconds or None, "size": bytes that came back, "error": text or None}}.

        ``rtt`` is the shortest of all answers: the first one has the handshake in it.
        """
        return {peer["name"]: {"rtt": peer["rtt"], "size": peer["size"], "error": peer["error"]} for peer in self.peers.values()}


# --- what it means -------------------------------------------------------------------------------------------------------------------

def plan_peers(doc, node, generation, names=None):
    """Whom to probe -> ({name: {"public_key", "address", "endpoint", "ipv4", "mtu"}}, [names without a key of this generation]).

    ``names``: only these. `MeshError` for a name that is not in the document or is the node itself. ``mtu`` is that of the peer's device,
    None while not measured; ``ipv4`` its first IPv4 node address or None. A member without a key can have no tunnel yet: it is named, and
    counted only if it was asked for.
    """
    generation = _mesh.generation_text(generation)
    wanted = set(doc["nodes"]) if names is None else set(names)
    for name in sorted(wanted):
        _mesh.node_entry(doc, name)
    wanted.discard(node)
    if names is not None and not wanted:
        raise MeshError("peers: %s names no node but %s itself" % (_mesh.shown(list(names)), node))
    found, without_key = {}, []
    for public_key, peer in _mesh.peers_of(doc, node, generation).items():
        name = peer["name"]
        if name in wanted:
            entry = doc["nodes"][name]
            found[name] = {
                "public_key": public_key,
                "address": entry["probe_addresses"][generation],
                "endpoint": peer["endpoint"],
                "ipv4": next((address for address in entry["node_addresses"] if ":" not in address), None),
                "mtu": entry["mtu"],
            }
    for name in wanted - set(found):
        if names is not None or doc["nodes"][name]["state"] != "excluded":
            without_key.append(name)
    return found, sorted(without_key)


def is_late(own_key, peer_key, state, now_epoch):
    """Whether this side of a pair waits for the other to make the first handshake: the bigger key does, unless the session stands."""
    peer = state["peers"].get(peer_key)
    if peer and 0 <= now_epoch - peer["last_handshake"] < SESSION_SECONDS:
        return False
    return own_key > peer_key


def full_size(device_mtu, peer_mtu):
    """Size of the biggest packet that both devices send, or None if that is no more than the small one."""
    size = min(device_mtu, peer_mtu or device_mtu)
    return size if size > SMALL_SIZE else None


def judge(peer, before, after, answer, now_epoch, size):
    """One peer -> {"proven": bool, "public_key", "reason": code or "", "message", "rtt", "size", "handshake_age"}.

    :param peer: entry of `plan_peers`.
    :param before: its entry in the device's state before the probe, or None; ``after``: the same after it.
    :param answer: entry of `EchoSchedule.results`, or None for "handshake only".
    :param now_epoch: seconds since the epoch of this node, whose clock also made the handshake times.
    :param size: bytes that had to come back; None if small packets were enough.
    """
    handshake = after["last_handshake"] if after else 0.0
    # a clock that was set back since: the handshake is not in the future
    age = None if not handshake else max(0.0, now_epoch - handshake)
    # nor is one old that was made meanwhile, whatever a clock that was set forward says
    fresh = age is not None and (age < HANDSHAKE_FRESH or handshake > (before["last_handshake"] if before else 0.0))
    grew = after is not None and after["rx_bytes"] > (before["rx_bytes"] if before else 0)
    entry = {"proven": False, "public_key": peer["public_key"], "reason": "", "message": "",
             "rtt": answer["rtt"] if answer else None, "size": answer["size"] if answer else 0,
             "handshake_age": None if age is None else int(age)}
    reason = _reason(after, answer, fresh, grew, size)
    if reason:
        entry["reason"] = reason
        entry["message"] = _message(reason, peer, after, answer, size)
    else:
        entry["proven"] = True
    return entry


def no_key_entry():
    """What `judge` would say of a node that has no key."""
    return {"proven": False, "public_key": "", "reason": "no_key", "message": _ADVICE["no_key"], "rtt": None, "size": 0,
            "handshake_age": None}


def judge_all(peers, before, after, answers, now_epoch, sizes):
    """`judge` for ``{name: entry of plan_peers}`` and two whole states of the device -> {name: entry}.

    ``answers``: `EchoSchedule.results`, or None for "handshake only"; ``sizes``: {name: bytes or None}, absent like None.
    """
    return {name: judge(peer, before["peers"].get(peer["public_key"]), after["peers"].get(peer["public_key"]),
                        answers[name] if answers is not None else None, now_epoch, sizes.get(name)) for name, peer in peers.items()}


def _reason(after, answer, fresh, grew, size):
    if after is None:
        return "not_configured"
    heard = answer is not None and answer["rtt"] is not None
    if not fresh:
        if heard:
            return "stale"
        return "no_handshake" if after["endpoint"] else "no_endpoint"
    if answer is not None and not heard:
        return "no_echo"
    if not grew:
        return "stale" if heard else "no_traffic"
    if answer is not None and size is not None and answer["size"] < size:
        return "full_size_lost"
    return ""


def _message(reason, peer, after, answer, size):
    endpoint = (after or {}).get("endpoint") or peer["endpoint"] or "its endpoint"
    measured = answer["size"] if answer else 0
    text = _ADVICE[reason] % {
        "endpoint": endpoint, "port": endpoint.rpartition(":")[2], "address": peer["address"], "limit": HANDSHAKE_FRESH, "mtu": size or 0,
        "measured": ", %d bytes do" % measured if measured > SMALL_SIZE else ", and none of %d bytes" % 576,
        "advice": " to %d" % measured if measured >= IPV6_MINIMUM else "",
    }
    if answer and answer["error"] and reason != "full_size_lost":
        text += " (sending here failed: %s)" % answer["error"]
    return text


def summary(node, entries, without_key, method):
    """-> what the module returns of {name: entry of `judge`}: counts, the slowest, the unproven with reasons, bounded."""
    unproven = [{"name": name, "reason": entries[name]["reason"], "message": "%s to %s: %s" % (node, name, entries[name]["message"])}
                for name in sorted(entries) if not entries[name]["proven"]]
    slowest = max(((entry["rtt"], name) for name, entry in entries.items() if entry["rtt"] is not None), default=(None, None))
    return {
        "peer_count": len(entries),
        "proven_count": len(entries) - len(unproven),
        "unproven_count": len(unproven),
        "unproven": unproven[:LISTED],
        # All of them, as who is to be told from whom that takes part in a run is decided on the controller.
        "unproven_names": [item["name"] for item in unproven],
        "without_key": without_key[:LISTED],
        "slowest_rtt": None if slowest[0] is None else round(slowest[0], 6),
        "slowest_peer": slowest[1],
        "method": method,
    }


# --- the proof file ------------------------------------------------------------------------------------------------------------------

def merge_proof(previous, proof, doc):
    """The new proof with what an earlier one knows of peers that were not looked at now: those still in ``doc`` with the same key."""
    merged = dict(proof, peers=dict(proof["peers"]))
    if not previous or any(previous.get(field) != proof[field] for field in ("schema", "interface", "generation", "node")):
        return merged
    for name, entry in previous.get("peers", {}).items():
        keys = doc["nodes"].get(name, {}).get("public_keys", {})
        if name not in merged["peers"] and keys.get(str(proof["generation"])) == entry.get("public_key"):
            merged["peers"][name] = entry
    return merged


def proven_names(proof, doc, generation, now_epoch=None, max_age=None):
    """Names of the peers that ``proof`` shows to be reached, with the key that ``doc`` has for them now.

    ``max_age``: seconds that a proof may be old at ``now_epoch``; None for any age. A proof whose time is in the future counts as new, as
    the clock may have been set back; the file does not outlive a reboot.
    """
    generation = _mesh.generation_text(generation)
    names = set()
    if not proof or str(proof.get("generation")) != generation:
        return names
    for name, entry in proof["peers"].items():
        keys = doc["nodes"].get(name, {}).get("public_keys", {})
        young = max_age is None or now_epoch - entry["time"] <= max_age
        if entry["proven"] and young and keys.get(generation) == entry["public_key"]:
            names.add(name)
    return names


def read_proof(path):
    """The proof file as a dict, None if there is none or it is none of ours: what cannot be read proves nothing."""
    try:
        with open(path, "rb") as handle:
            proof = json.loads(handle.read().decode("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(proof, dict) or proof.get("schema") != 1 or not isinstance(proof.get("peers"), dict):
        return None
    for entry in proof["peers"].values():
        if not isinstance(entry, dict) or not {"proven", "public_key", "time"} <= set(entry):
            return None
    return proof


# --- the system ----------------------------------------------------------------------------------------------------------------------

def device(name):
    """-> {"index": int, "mtu": bytes} of a network device; None if there is none."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return None
    # by ioctl and not in /sys, which shows the devices of the namespace it was mounted in
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        answer = fcntl.ioctl(handle, SIOCGIFMTU, struct.pack("16si12x", name.encode(), 0))
    return {"index": index, "mtu": struct.unpack("16si12x", answer)[1]}


def has_ipv6(name):
    """False if the kernel has no IPv6, or it is disabled on this device."""
    try:
        with open("/proc/sys/net/ipv6/conf/%s/disable_ipv6" % name, encoding="ascii") as handle:
            return handle.read().strip() == "0"
    except OSError:
        return False


def open_echo_socket(interface, index, address, wait=2.0):
    """Raw ICMPv6 socket that sends from ``address`` through ``interface`` only and hears nothing but echo replies to it.

    ``wait``: seconds for an address that is not usable yet. `MeshError` if it is not there.
    """
    handle = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6)
    try:
        # one bit per type, set means blocked: RFC 3542, section 3.2
        blocked = [0xFFFFFFFF] * 8
        blocked[ICMPV6_ECHO_REPLY >> 5] &= ~(1 << (ICMPV6_ECHO_REPLY & 31)) & 0xFFFFFFFF
        handle.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, struct.pack("=8I", *blocked))
        handle.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, interface.encode() + b"\0")
        handle.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        # bytes: the answers of half a second at RATE and full size
        _receive_buffer(handle, 4 * 1024 * 1024)
        deadline = time.monotonic() + wait
        while True:
            try:
                handle.bind((address, 0, 0, index))
                break
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                    raise MeshError("device %s does not have its probe address %s (%s); bring the device up to the document "
                                    "(module interface)" % (interface, address, exc.strerror)) from exc
            time.sleep(0.1)
        handle.setblocking(False)
    except BaseException:
        handle.close()
        raise
    return handle


def _receive_buffer(handle, size):
    try:
        handle.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except OSError:
        # not permitted in some containers; the smaller default costs a few repetitions
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def run_echo(handle, index, schedule, deadline, clock=time.monotonic):
    """Send and receive until all is known or ``deadline`` (of ``clock``). The addresses in ``schedule`` are packed IPv6 addresses."""
    ident = struct.unpack("!H", os.urandom(2))[0]
    nonce = os.urandom(NONCE_BYTES)
    texts = {address: socket.inet_ntop(socket.AF_INET6, address) for address in schedule.peers}
    while not schedule.done():
        now = clock()
        if now >= deadline:
            return
        for address, sequence, size in schedule.due(now):
            try:
                handle.sendto(echo_request(ident, sequence, nonce, size), (texts[address], 0, 0, index))
            except OSError as exc:
                schedule.failed(address, "%d bytes: %s" % (size, exc.strerror))
        when = schedule.next_time(clock())
        if when is None and schedule.done():
            return
        wait = min(deadline, deadline if when is None else when) - clock()
        if select.select([handle], [], [], max(0.0, wait))[0]:
            _receive(handle, ident, nonce, schedule, clock)


def _receive(handle, ident, nonce, schedule, clock):
    # bounded, so that a flood of answers cannot keep us from sending
    for dummy in range(256):
        try:
            data, sender = handle.recvfrom(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            continue  # an ICMPv6 error that the kernel hands on; the packet it is about will be missed anyway
        reply = parse_reply(data, ident, nonce)
        if reply is not None:
            schedule.received(clock(), socket.inet_pton(socket.AF_INET6, sender[0].split("%")[0]), reply[0], reply[1])


def run_handshakes(interface, peers, read, deadline, clock=time.monotonic, epoch=time.time, sleep=time.sleep):
    """"Handshake only": make every peer's session work by datagrams to its IPv4 address through the device.

    A peer that receives data and has nothing to say answers with an empty packet within 10 s (KEEPALIVE_TIMEOUT, whitepaper, section
    6.5), so received bytes grow also where the session stood before.

    :param peers: entries of `plan_peers` by name.
    :param read: function without arguments -> state of the device.
    :returns: (state before, state after).
    """
    before = after = read()
    open_peers = {name: peer for name, peer in peers.items() if peer["ipv4"]}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        handle.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, interface.encode() + b"\0")
        handle.setblocking(False)
        while open_peers and clock() < deadline:
            for position, peer in enumerate(open_peers.values()):
                try:
                    # port 9 is discard (RFC 863); it need not be open
                    handle.sendto(b"\0", (peer["ipv4"], 9))
                except OSError:
                    pass  # the peer is missing in the device, or a firewall says no: the missing handshake tells
                if position % BURST == BURST - 1:
                    sleep(BURST / RATE)
            sleep(max(0.0, min(SMALL_RESEND, deadline - clock())))
            after = read()
            entries = judge_all(open_peers, before, after, None, epoch(), {})
            open_peers = {name: peer for name, peer in open_peers.items() if not entries[name]["proven"]}
    return before, after


def run_knock(address, index, schedule, deadline, look=None, clock=time.monotonic):
    """As `run_echo`, without any privilege: datagrams from a probe address through device ``index``, answered by "port unreachable".

    ``look()``: addresses of peers whose handshake is over; called now and then while there are late ones that wait for it.
    """
    nonce = os.urandom(NONCE_BYTES)
    texts = {packed: socket.inet_ntop(socket.AF_INET6, packed) for packed in schedule.peers}
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        handle.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        handle.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        handle.bind((address, 0, 0, index))
        handle.setblocking(False)
        look_at = clock() + LATE_LOOK
        while not schedule.done():
            now = clock()
            if now >= deadline:
                return
            if look is not None and schedule.late and now >= look_at:
                schedule.hasten(now, look())
                look_at = clock() + max(LATE_LOOK, LATE_REST * (clock() - now))
            for packed, sequence, size in schedule.due(now):
                try:
                    handle.sendto(knock(nonce, sequence, size), (texts[packed], KNOCK_PORT, 0, index))
                except OSError as exc:
                    # an answer to an earlier datagram is told here as well; it waits in the queue of errors
                    if exc.errno != errno.ECONNREFUSED:
                        schedule.failed(packed, "%d bytes: %s" % (size, exc.strerror))
            _answers(handle, nonce, schedule, clock)
            when = schedule.next_time(clock())
            if when is None and schedule.done():
                return
            until = [deadline if when is None else min(deadline, when)] + ([look_at] if look is not None and schedule.late else [])
            select.select([handle], [], [handle], max(0.0, min(until) - clock()))
            _answers(handle, nonce, schedule, clock)


def knock(nonce, sequence, size):
    """The payload of a datagram whose IPv6 packet has ``size`` bytes."""
    head = nonce + struct.pack("!HH", sequence, size)
    return head + bytes(max(0, size - UDP_HEADERS - len(head)))


def parse_knock(data, nonce):
    """What comes back of a datagram (its beginning is enough) -> (sequence, size) or None."""
    if len(data) < len(nonce) + 4 or data[:len(nonce)] != nonce:
        return None
    return struct.unpack_from("!HH", data, len(nonce))


def is_port_unreachable(ancillary):
    """Whether a message of the queue of errors is the answer of the peer's kernel. ``ancillary``: as ``recvmsg`` returns it."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == IPV6_RECVERR and len(data) >= 8:
            # struct sock_extended_err: u32 errno, u8 origin, u8 type, u8 code
            origin, icmp_type, code = data[4], data[5], data[6]
            return origin == SO_EE_ORIGIN_ICMP6 and icmp_type == ICMPV6_UNREACHABLE and code == PORT_UNREACHABLE
    return False


def _answers(handle, nonce, schedule, clock):
    for dummy in range(256):
        try:
            data, ancillary, dummy2, sender = handle.recvmsg(2048, 512, MSG_ERRQUEUE)
        except OSError:
            return
        found = parse_knock(data, nonce) if is_port_unreachable(ancillary) else None
        if found is not None:
            # the address that the datagram was for
            schedule.received(clock(), socket.inet_pton(socket.AF_INET6, sender[0].split("%")[0]), found[0], found[1])
