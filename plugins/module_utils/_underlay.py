# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""Before there is a mesh: does UDP get through between the nodes, and how big may its packets be?

Every node runs a responder on the mesh's ports for as long as the preflight takes, and asks the responders of all others. A small packet
shows that a port is open; packets with the don't-fragment bit, of a size found by bisection, show what the way carries. Nobody is asked to
send "too big" back, because some ways swallow it (clouds that lie about their MTU, firewalls that drop ICMP).

The responder answers nothing but questions of this run, which bear the digest of a random nonce, and never with more bytes than the
question had, so that it can neither be found by a scan nor amplify anything; an answer is no question, so two responders cannot keep each
other busy. It ends by itself.

Where WireGuard already holds a port, nothing else can listen there. What the other port of the node answers tells so. Where no port is
free at all, and in check mode, ICMP echo requests measure the MTU, and the port is not judged.

*size* is that of the whole IP packet in bytes. Times are seconds of a monotonic clock. `UnderlaySchedule` and the functions above it are
pure; the tests drive them with a network of their own.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import os
import select
import signal
import socket
import struct
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import OVERHEAD
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MTU_MIN_IPV6, MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._pacer import Pacer
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import read_text, write_text

PID_FILE = "/run/kubemesh/preflight.json"

MAGIC = b"KMPF"
QUESTION, ANSWER = b"Q", b"A"
DIGEST_BYTES = 16
# magic, kind, digest, sequence, the two ports that the responder has
_PACKET = struct.Struct("!4sc%dsIHH" % DIGEST_BYTES)
# bytes: IPv4 header without options (RFC 791) or IPv6 header (RFC 8200), and UDP header (RFC 768) or ICMP echo header (RFC 792, 4443)
HEADERS = {"ipv4": 28, "ipv6": 48}
SMALL_SIZE = {family: size + _PACKET.size for family, size in HEADERS.items()}
# The biggest IP packet (RFC 791; the same for IPv6 without jumbograms). Beyond what the device carries the kernel says so at once.
BIGGEST = 65535

# Numbers from include/uapi/linux/in.h, in6.h, icmp.h, icmpv6.h and include/uapi/asm-generic/socket.h; Python does not have them all.
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3
IP_RECVERR, IPV6_RECVERR, MSG_ERRQUEUE = 11, 25, 0x2000
IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 8, 49, 50
SO_MARK = 36
ERROR_FROM_ICMP = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6: include/uapi/linux/errqueue.h

RATE, BURST = 2000.0, 32  # packets a second in all, and at once: 22 Mbit/s at 1400 bytes
FIRST_RATE = 1500.0  # first packets a second
REACH_TRIES, REACH_SECONDS = 6, 0.7  # a small packet is sent so often, so far apart
MTU_TRIES = 3  # a big packet is sent so often before its size counts as too big
MTU_SECONDS_LEAST, MTU_SECONDS_MOST, MTU_RTTS = 0.2, 1.0, 4  # how long its answer is waited for: some round trips, within bounds
JITTER = 0.2
# Bisections at the same time, as long as nothing is known and afterwards. The first ones find what the underlay carries; for all others
# one packet of that size confirms it.
SEARCHES_FIRST, SEARCHES_LATER = 16, 500


# --- packets -------------------------------------------------------------------------------------------------------------------------

def digest_of(nonce):
    """What packets of this run bear, as bytes; ``nonce`` is text, the same on all nodes."""
    return hashlib.sha256(nonce.encode("utf-8")).digest()[:DIGEST_BYTES]


def question(digest, sequence, family, size):
    """UDP payload whose IP packet has ``size`` bytes."""
    return _PACKET.pack(MAGIC, QUESTION, digest, sequence, 0, 0) + bytes(size - SMALL_SIZE[family])


def answer_to(data, digest, ports):
    """The responder: payload of a packet -> the answer, or None where there is none to give.

    The answer has the length of the question and says on which of the two ports the responder listens (0: not).
    """
    if len(data) < _PACKET.size:
        return None
    magic, kind, found, sequence, dummy, dummy = _PACKET.unpack_from(data)
    if magic != MAGIC or kind != QUESTION or found != digest:
        return None
    return _PACKET.pack(MAGIC, ANSWER, digest, sequence, ports[0], ports[1]) + bytes(len(data) - _PACKET.size)


def parse_answer(data, digest, family, kind=ANSWER):
    """UDP payload -> (sequence, size, ports that the responder has) or None."""
    if len(data) < _PACKET.size:
        return None
    magic, found_kind, found, sequence, one, other = _PACKET.unpack_from(data)
    if magic != MAGIC or found_kind != kind or found != digest:
        return None
    return sequence, len(data) + HEADERS[family], {port for port in (one, other) if port}


def icmp_request(digest, sequence, family, size):
    """ICMP echo request whose IP packet has ``size`` bytes. The sequence is in the payload, as ICMP's own has 16 bits only."""
    payload = question(digest, sequence, family, size)
    if family == "ipv6":
        return struct.pack("!BBHHH", 128, 0, 0, sequence & 0xFFFF, sequence >> 16) + payload
    packet = struct.pack("!BBHHH", 8, 0, 0, sequence & 0xFFFF, sequence >> 16) + payload
    return packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]


def checksum(data):
    """Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse_icmp(data, digest, family):
    """What a raw ICMP socket hands out -> (sequence, size, no ports) if it answers a request of ours, else None."""
    if family == "ipv4":
        # the kernel leaves the IPv4 header on (raw(7)), and takes the IPv6 header off
        data = data[(data[0] & 15) * 4:] if data else data
    if len(data) < 8 or data[0] != (0 if family == "ipv4" else 129):
        return None
    return parse_answer(data[8:], digest, family, kind=QUESTION)


# --- what to send when ---------------------------------------------------------------------------------------------------------------

class UnderlaySchedule:
    """Which packet goes where and when, and what the answers mean. Pure.

    :param targets: list of {"name": str, "family": "ipv4"|"ipv6", "keys": [(address, port), ...]}: one key for each port, or one for ICMP.
    :param start: time.
    :param generator: ``random.Random`` or alike.

    Every target has two entries in the timetable: ("reach", name) asks all its ports, ("mtu", name) looks for the size, at the first port
    that answered. The least size found so far is what is asked of the next target first: if that comes back, nothing more is to be learned
    about the mesh from this target, and its size is known as "at least".
    """

    def __init__(self, targets, start, generator):
        self.random = generator.random
        self.pacer = Pacer(start, RATE, BURST)
        self.sequence = 0
        self.sent = {}
        self.jobs = {}
        self.names = {}
        self.least = {"ipv4": BIGGEST, "ipv6": BIGGEST}
        self.known = {"ipv4": False, "ipv6": False}
        self.waiting = {"ipv4": collections.deque(), "ipv6": collections.deque()}
        self.searching = {"ipv4": set(), "ipv6": set()}
        order = list(targets)
        generator.shuffle(order)
        for position, target in enumerate(order):
            name = target["name"]
            self.jobs[name] = {
                "family": target["family"], "tries": 0, "reached": set(), "listening": None, "errors": {}, "rtt": None, "mtu_key": None,
                "keys": list(target["keys"]), "low": 0, "high": None, "testing": None, "mtu_tries": 0, "path_mtu": None, "settled": False}
            for key in target["keys"]:
                self.names[key] = name
            self.pacer.at(start + position / FIRST_RATE, ("reach", name))

    def done(self):
        """True when nothing more is to be learned."""
        return not self.pacer.times and not any(self.waiting.values())

    def next_time(self, now):
        """Time of the next packet, None if there is none."""
        return self.pacer.next_time(now)

    def due(self, now):
        """-> list of (key, sequence, size) to send now."""
        packets = []
        for what, name in self.pacer.due(now):
            job = self.jobs[name]
            wanted = self._reach(now, name, job) if what == "reach" else self._mtu(now, name, job)
            self.pacer.spend(len(wanted))
            for key, size in wanted:
                self.sequence += 1
                self.sent[self.sequence] = (key, size, now)
                packets.append((key, self.sequence, size))
        return packets

    def _later(self, now, pause, entry):
        self.pacer.at(now + pause * (1.0 + JITTER * self.random()), entry)

    def _reach(self, now, name, job):
        open_keys = self._unanswered(job)
        if not open_keys or job["tries"] >= REACH_TRIES:
            return []
        job["tries"] += 1
        self._later(now, REACH_SECONDS, ("reach", name))
        return [(key, SMALL_SIZE[job["family"]]) for key in open_keys]

    @staticmethod
    def _unanswered(job):
        """The keys that may still answer: not those of ports that the responder says it does not have, where an answer is waited for in
        vain at every run on a mesh that is up."""
        return [key for key in job["keys"] if key not in job["reached"] and (job["listening"] is None or key[1] in job["listening"])]

    def _mtu(self, now, name, job):
        if job["mtu_tries"] >= MTU_TRIES:
            self._too_big(now, name, job, job["testing"])
            return []
        job["mtu_tries"] += 1
        self._later(now, min(MTU_SECONDS_MOST, max(MTU_SECONDS_LEAST, MTU_RTTS * job["rtt"])), ("mtu", name))
        return [(job["mtu_key"], job["testing"])]

    def received(self, now, key, sequence, size, listening=frozenset()):
        """An answer; ``listening``: the ports that the responder has."""
        if sequence not in self.sent or self.sent[sequence][0] != key:
            return
        name = self.names[key]
        job = self.jobs[name]
        rtt = now - self.sent[sequence][2]
        job["rtt"] = rtt if job["rtt"] is None else min(job["rtt"], rtt)
        job["reached"].add(key)
        job["listening"] = set(listening) if job["listening"] is None else job["listening"] | set(listening)
        job["low"] = max(job["low"], size)
        if not self._unanswered(job):
            self.pacer.forget(("reach", name))
        if job["mtu_key"] is None:
            job["mtu_key"] = key
            self.waiting[job["family"]].append(name)
            self._begin_searches(now, job["family"])
        elif job["testing"] is not None and size >= job["testing"]:
            self._step(now, name, job)

    def too_big(self, now, sequence):
        """The system, or a router, said that a packet was too big."""
        if sequence in self.sent:
            key, size, dummy = self.sent[sequence]
            name = self.names[key]
            job = self.jobs[name]
            if job["testing"] is not None and size >= job["testing"]:
                self._too_big(now, name, job, size)

    def failed(self, key, error):
        """A packet to ``key`` could not be sent, or a router or the node refused it; ``error`` is text for people."""
        if key in self.names:
            self.jobs[self.names[key]]["errors"][key] = error

    def _begin_searches(self, now, family):
        limit = SEARCHES_LATER if self.known[family] else SEARCHES_FIRST
        while self.waiting[family] and len(self.searching[family]) < limit:
            name = self.waiting[family].popleft()
            self.searching[family].add(name)
            self._test(now, name, self.jobs[name], self.least[family])

    def _test(self, now, name, job, size):
        job["testing"], job["mtu_tries"] = size, 0
        self.pacer.at(now, ("mtu", name))

    def _too_big(self, now, name, job, size):
        # an answer that came after its size was given up: the way loses some of everything; what came back counts
        job["high"] = max(job["low"] + 1, size if job["high"] is None else min(job["high"], size))
        self._step(now, name, job)

    def _step(self, now, name, job):
        low, high = job["low"], job["high"]
        if high is None or high - low <= 1:
            self._finish(now, name, job)
            return
        self._test(now, name, job, (low + high) // 2)

    def _finish(self, now, name, job):
        family = job["family"]
        job["path_mtu"], job["testing"] = job["low"], None
        self.pacer.forget(("mtu", name))
        self.least[family] = min(self.least[family], job["low"])
        self.known[family] = True
        self.searching[family].discard(name)
        self._begin_searches(now, family)

    def results(self):
        """-> {name: {"reached": set of keys, "listening": set of ports or None, "path_mtu": bytes or None, "rtt": seconds or None,
        "errors": {key: text}, "finished": bool}}. ``path_mtu`` of a search that is not finished is what came back so far."""
        found = {}
        for name, job in self.jobs.items():
            partly = job["low"] if job["low"] > SMALL_SIZE[job["family"]] else None
            found[name] = {"reached": job["reached"], "listening": job["listening"], "rtt": job["rtt"], "errors": job["errors"],
                           "path_mtu": partly if job["path_mtu"] is None else job["path_mtu"],
                           "finished": job["path_mtu"] is not None or not job["reached"]}
        return found


# --- what it means -------------------------------------------------------------------------------------------------------------------

def targets_of(data, node):
    """What a target file holds -> list of {"name", "address", "port": int or None}, without ``node`` itself.

    ``data`` is such a list, or a mesh document; of that, all nodes that are not excluded and have an endpoint, as `_mesh.endpoint_of`
    chooses it. Raises ValueError or KeyError if it is neither.
    """
    if isinstance(data, list):
        return [{"name": item["name"], "address": item["address"], "port": item.get("port")} for item in data if item["name"] != node]
    own = data["nodes"].get(node, {}).get("endpoints", {})
    targets = []
    for name, entry in sorted(data["nodes"].items()):
        if name == node or entry["state"] == "excluded":
            continue
        theirs = entry["endpoints"]
        family = "ipv6" if "ipv6" in theirs and ("ipv4" not in theirs or ("ipv4" not in own and "ipv6" in own)) else "ipv4"
        if family in theirs:
            targets.append({"name": name, "address": theirs[family]["address"], "port": theirs[family]["port"]})
    return targets


def family_of(address):
    """``ipv4`` or ``ipv6``."""
    return "ipv6" if ":" in address else "ipv4"


def judge(target, ports, result):
    """One target that was asked by UDP -> {port: "open" | "closed" | "held"}.

    ``held``: the responder could not listen there, because something on that node has the port: WireGuard itself if the mesh is up, and if
    not, that node's own preflight says what.
    """
    verdicts = {}
    for port in ports:
        if (target["address"], port) in result["reached"]:
            verdicts[port] = "open"
        elif result["listening"] is not None and port not in result["listening"]:
            verdicts[port] = "held"
        else:
            verdicts[port] = "closed"
    return verdicts


def recommended_mtu(path_mtus):
    """{family: least path MTU in bytes} -> MTU for the mesh device in bytes, or None if nothing was measured.

    What the narrowest way carries, less WireGuard's overhead (`_link_plan.OVERHEAD`), but never below what IPv6 needs.
    """
    room = [size - OVERHEAD[family] for family, size in path_mtus.items() if size is not None]
    return max(MTU_MIN_IPV6, min(room)) if room else None


# --- asking --------------------------------------------------------------------------------------------------------------------------

class Asker:
    """A socket of one family and kind (``udp`` or ``icmp``) for `run`. Keys are (address, port), or (address, "icmp")."""

    def __init__(self, family, kind, digest, mark=0):
        self.family, self.kind, self.digest = family, kind, digest
        number = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        protocol = 0 if kind == "udp" else socket.IPPROTO_ICMP if family == "ipv4" else socket.IPPROTO_ICMPV6
        self.socket = socket.socket(number, (socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_RAW) | socket.SOCK_CLOEXEC, protocol)
        dont_fragment(self.socket, family)
        if family == "ipv4":
            self.socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        set_mark(self.socket, mark)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)  # bytes: half a second of answers at RATE
        self.socket.setblocking(False)

    def send(self, key, sequence, size):
        """Send one packet; OSError if that cannot be done."""
        make = question if self.kind == "udp" else icmp_request
        packet = make(self.digest, sequence, self.family, size)
        address = (key[0], key[1] if self.kind == "udp" else 0)
        try:
            self.socket.sendto(packet, address)
        except OSError:
            # With RECVERR an error that came back for an earlier packet is told to whoever sends next. So once more, without it; what is
            # said then is about this packet.
            self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.socket.sendto(packet, address)

    def answers(self):
        """Iterator over (key, sequence, size, ports) of what came in, bounded."""
        for dummy in range(256):
            try:
                data, sender = self.socket.recvfrom(65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # told in full by errors()
            address = sender[0].split("%")[0]
            if self.kind == "udp":
                found = parse_answer(data, self.digest, self.family)
                key = (address, sender[1])
            else:
                found = parse_icmp(data, self.digest, self.family)
                key = (address, "icmp")
            if found is not None:
                yield (key,) + found

    def errors(self):
        """Iterator over (key, sequence or None, errno) of what routers and nodes sent back, bounded."""
        for dummy in range(256):
            try:
                data, ancillary, dummy2, sender = self.socket.recvmsg(65536, 512, MSG_ERRQUEUE)
            except OSError:
                return
            for level, kind, content in ancillary:
                # struct sock_extended_err: errno 32 bit, origin 8, type 8, code 8, padding 8, info 32, data 32
                if (level, kind) in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)) and len(content) >= 16:
                    number, origin = struct.unpack_from("=IB", content)
                    if origin in ERROR_FROM_ICMP and sender:
                        quoted = data if self.kind == "udp" else data[8:]
                        found = parse_answer(quoted, self.digest, self.family, kind=QUESTION)
                        key = (sender[0].split("%")[0], sender[1] if self.kind == "udp" else "icmp")
                        yield key, found[0] if found else None, number

    def close(self):
        """Close the socket."""
        self.socket.close()


def dont_fragment(handle, family):
    """Set the don't-fragment bit and ignore what the kernel believes about the path; only the device's MTU limits a packet then."""
    if family == "ipv4":
        handle.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
    else:
        handle.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)


def set_mark(handle, mark):
    """Mark packets like WireGuard's own, so that a mesh that is up does not take them into the tunnel."""
    if mark:
        try:
            handle.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        except OSError:
            pass  # not permitted in some containers; it matters only where the mesh already encrypts between nodes


def run(schedule, askers, deadline, clock=time.monotonic):
    """Ask until all is known or ``deadline``. ``askers``: {(family, "udp"|"icmp"): `Asker`}."""
    while not schedule.done():
        now = clock()
        if now >= deadline:
            return
        for key, sequence, size in schedule.due(now):
            asker = askers[(family_of(key[0]), "icmp" if key[1] == "icmp" else "udp")]
            try:
                asker.send(key, sequence, size)
            except OSError as exc:
                if exc.errno == errno.EMSGSIZE:
                    schedule.too_big(clock(), sequence)
                else:
                    schedule.failed(key, "sending failed: %s" % exc.strerror)
        if schedule.done():
            return
        when = schedule.next_time(clock())
        wait = min(deadline, deadline if when is None else when) - clock()
        select.select([asker.socket for asker in askers.values()], [], [], max(0.0, wait))
        for asker in askers.values():
            for key, sequence, size, listening in asker.answers():
                schedule.received(clock(), key, sequence, size, listening)
            for key, sequence, number in asker.errors():
                if number == errno.EMSGSIZE:
                    schedule.too_big(clock(), sequence)
                else:
                    schedule.failed(key, os.strerror(number))


# --- answering -----------------------------------------------------------------------------------------------------------------------

def open_responder(ports, families, mark=0):
    """-> (sockets, ports that are ours). A port that something else has in any family is left out."""
    sockets, ours = [], []
    for port in ports:
        opened = []
        try:
            for family in families:
                opened.append(_responder_socket(family, port, mark))
        except OSError as exc:
            for handle in opened:
                handle.close()
            if exc.errno != errno.EADDRINUSE:
                raise
            continue
        sockets += opened
        ours.append(port)
    return sockets, ours


def _responder_socket(family, port, mark):
    handle = socket.socket(socket.AF_INET if family == "ipv4" else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        dont_fragment(handle, family)
        set_mark(handle, mark)
        # where a packet was sent to is where its answer has to come from, also on nodes with several addresses
        if family == "ipv4":
            handle.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        else:
            handle.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
            handle.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        # all addresses: WireGuard itself will listen on all of them
        handle.bind(("0.0.0.0" if family == "ipv4" else "::", port))  # noqa: S104
        handle.setblocking(False)
    except OSError:
        handle.close()
        raise
    return handle


def respond(sockets, digest, ports, deadline, clock=time.monotonic):
    """Answer questions until ``deadline``. ``ports``: the two ports of the mesh, 0 for one that is not ours."""
    while clock() < deadline:
        ready = select.select(sockets, [], [], max(0.0, deadline - clock()))[0]
        for handle in ready:
            for dummy in range(256):
                try:
                    data, ancillary, dummy2, sender = handle.recvmsg(65536, 128)
                except OSError:
                    break
                answer = answer_to(data, digest, ports)
                if answer is not None:
                    try:
                        handle.sendmsg([answer], _source(ancillary), 0, sender)
                    except OSError:
                        pass  # too big for this side's device, or a firewall here: it is missed there, which is the finding


def _source(ancillary):
    """Ancillary data that makes an answer come from the address the question went to."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            # struct in_pktinfo: interface index, local address, destination address; ip(7)
            return [(level, kind, struct.pack("=i4s4s", 0, content[4:8], b"\0\0\0\0"))]
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            return [(level, kind, content)]
    return []


def start_time(pid):
    """Start of a process in clock ticks since boot (proc(5), stat, field 22), or None if there is none or it has ended."""
    # the command name, in brackets, may hold anything
    fields = (read_text("/proc/%d/stat" % pid) or "").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def running_responder(pid_file=PID_FILE):
    """-> what the pid file says if that process is alive, else None: {"pid", "started", "ports"}."""
    try:
        found = json.loads(read_text(pid_file) or "null")
        alive = found is not None and start_time(int(found["pid"])) == found["started"]
        return found if alive and isinstance(found["ports"], list) else None
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def stop_responder(pid_file=PID_FILE, wait=2.0):
    """End the responder; -> whether there was one. ``wait``: seconds for it to be gone."""
    found = running_responder(pid_file)
    if found is not None:
        try:
            os.kill(found["pid"], signal.SIGTERM)
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + wait
        while start_time(found["pid"]) == found["started"] and time.monotonic() < deadline:
            time.sleep(0.02)
    try:
        os.unlink(pid_file)
    except FileNotFoundError:
        pass
    return found is not None


def start_responder(sockets, digest, ports, lifetime, pid_file=PID_FILE):
    """Leave a process behind that answers on ``sockets`` for ``lifetime`` seconds and then ends; -> its pid.

    It has nothing of this process but these sockets: no terminal, no pipes that a caller would wait for, no files.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                _daemon(sockets, digest, ports, lifetime, writer)
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        line = pipe.readline()
    for handle in sockets:
        handle.close()
    if not line:
        raise MeshError("the responder of the preflight did not start; look for a limit on the number of processes of this user")
    pid = int(line)
    write_text(pid_file, json.dumps({"pid": pid, "started": start_time(pid), "ports": [port for port in ports if port]}) + "\n", 0o644)
    return pid


def _daemon(sockets, digest, ports, lifetime, writer):
    """The process that stays; never returns."""
    try:
        # the session that started it ends before it does
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir("/")
        os.write(writer, b"%d\n" % os.getpid())
        keep = {handle.fileno() for handle in sockets}
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    pass
        respond(sockets, digest, ports, time.monotonic() + lifetime)
    finally:
        os._exit(0)
