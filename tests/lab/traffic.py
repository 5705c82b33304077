# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Traffic through a lab, counted exactly: pings, TCP streams, NodePort requests, marked packets, and a sniffer on the underlay.

Each tool is one background process whatever the number of pods: a thread that has entered a namespace makes the socket there
(setns works per thread), and one loop serves all sockets. That keeps 120 flows at 20 packets/s below a tenth of a core.

    pings = traffic.start_pings(lab)
    ...
    report = pings.stop()          # report["lost"], report["flows"]

Python 3.9 or later, standard library only, root.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import errno
import ipaddress
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab as labs

KINDS = ("pod-pod", "host-pod", "pod-host", "host-host")
ANSWER_SECONDS = 3.0  # a reply after that counts as lost
WIREGUARD_PORTS = (51840, 51841)  # mesh_port and the next

SO_MEMINFO = 55  # asm-generic/socket.h
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SOL_PACKET, PACKET_STATISTICS, PACKET_IGNORE_OUTGOING = 263, 6, 23  # linux/if_packet.h
ETH_P_ALL = 3
SO_ATTACH_FILTER = 26
ICMP_FILTER = 1  # linux/icmp.h, level SOL_RAW
SOL_RAW = 255
ICMPV6_FILTER = 1  # linux/icmpv6.h
BUFFER_BYTES = 8 << 20  # seconds of everything a namespace may receive, for when the machine is busy elsewhere


# ---------------------------------------------------------------------------------------------------------------------------------
# which flows: pure
# ---------------------------------------------------------------------------------------------------------------------------------


def matrix(lab, kinds=KINDS, families=None):
    """Flows of a lab as a list of {"kind", "source", "target", "family", "address", "remote"}.

    pod-pod is every ordered pair of pods, those on one node as well (remote false); host-pod and pod-host only pairs on two nodes;
    host-host every ordered pair of nodes.
    """
    flows = []
    for kind in kinds:
        left, right = ((lab.pods if word == "pod" else lab.nodes) for word in kind.split("-"))
        for source in left:
            for target in right:
                remote = lab.number(source) != lab.number(target)
                if source == target or (kind != "pod-pod" and not remote):
                    continue
                for family, address in lab.addresses(target).items():
                    if families is None or family in families:
                        flows.append({"kind": kind, "source": source, "target": target, "family": family, "address": address,
                                      "remote": remote})
    return flows


def checksum(data):
    """The Internet checksum (RFC 1071) of a bytes object."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff


def find_marker(frame, key, key_length=12):
    """Index of the flow whose marker is in the frame in clear, or None. A marker is the key and the flow's number in 4 bytes."""
    at = frame.find(key)
    if at < 0 or len(frame) < at + key_length + 4:
        return None
    return struct.unpack_from("!I", frame, at + key_length)[0]


def classify(frame, ports):
    """(word, source, destination, detail) of an Ethernet frame: word arp, nd, wireguard, vxlan, udp, tcp, icmp, other.

    detail is the WireGuard message type (1 initiation, 2 response, 3 cookie, 4 data; WireGuard paper, section 5.4) or None.
    """
    kind = frame[12:14]
    if kind == b"\x08\x06":
        return "arp", None, None, None
    if kind == b"\x08\x00" and len(frame) >= 34:
        protocol, source, target = frame[23], frame[26:30], frame[30:34]
        fragment = struct.unpack_from("!H", frame, 20)[0] & 0x1fff
        at = 14 + (frame[14] & 15) * 4
        if fragment:
            return "fragment", source, target, None
    elif kind == b"\x86\xdd" and len(frame) >= 54:
        protocol, source, target, at = frame[20], frame[22:38], frame[38:54], 54
        if protocol == 0 and len(frame) > 62:  # hop-by-hop options (MLD)
            protocol, at = frame[54], 62
    else:
        return "other", None, None, None
    if protocol == 17 and len(frame) >= at + 8:
        source_port, target_port = struct.unpack_from("!HH", frame, at)
        if target_port in ports or source_port in ports:
            return "wireguard", source, target, frame[at + 8] if len(frame) > at + 8 else None
        return ("vxlan" if target_port == 8472 else "udp"), source, target, None
    if protocol == 58 and len(frame) > at and (133 <= frame[at] <= 137 or frame[at] in (130, 131, 132, 143)):
        return "nd", source, target, None
    return {6: "tcp", 1: "icmp", 58: "icmp"}.get(protocol, "other"), source, target, None


# ---------------------------------------------------------------------------------------------------------------------------------
# background processes: start, peek, stop
# ---------------------------------------------------------------------------------------------------------------------------------


class Traffic:
    """Handle of a background tool. start() returns when it runs; stop() ends it and returns its report (a dict)."""

    def __init__(self, lab, tool, config=None, ident=None):
        self.lab, self.tool = lab, tool
        self.ident = ident or f"{tool}-{secrets.token_hex(3)}"
        self.folder = lab.state / "traffic" / self.ident
        self.config = config or {}

    def start(self, timeout=30):
        self.folder.mkdir(parents=True, exist_ok=True)
        labs.atomic_write(self.folder / "config.json", json.dumps(self.config))
        process = self.lab.spawn(f"traffic-{self.ident}", [sys.executable, Path(__file__).resolve(), "_tool", self.lab.name, self.tool,
                                                           self.ident], log=self.folder / "log")
        deadline = time.monotonic() + timeout
        while not (self.folder / "started").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise labs.LabError(f"{self.ident} did not start: {self.lab.tail(self.folder / 'log')}")
            time.sleep(0.02)
        return self

    def _pid(self):
        pid = self.lab.noted_pid(f"traffic-{self.ident}")
        if pid is None:
            raise labs.LabError(f"{self.ident} of lab {self.lab.name} does not run: {self.lab.tail(self.folder / 'log')}")
        return pid

    def _wait(self, path, pid, timeout):
        deadline = time.monotonic() + timeout
        while not path.exists():
            if labs.start_time(pid) is None and not path.exists():
                raise labs.LabError(f"{self.ident} died: {self.lab.tail(self.folder / 'log')}")
            if time.monotonic() > deadline:
                raise labs.LabError(f"{self.ident} gave no report within {timeout} s: {self.lab.tail(self.folder / 'log')}")
            time.sleep(0.02)
        return json.loads(path.read_text())

    def peek(self, timeout=30):
        """The report so far; the tool goes on. What may still be answered is in neither "received" nor "lost"."""
        path = self.folder / "peek.json"
        path.unlink(missing_ok=True)
        pid = self._pid()
        os.kill(pid, signal.SIGUSR1)
        return self._wait(path, pid, timeout)

    def stop(self, timeout=60):
        pid = self._pid()
        os.kill(pid, signal.SIGTERM)
        try:
            return self._wait(self.folder / "report.json", pid, timeout)
        finally:
            labs.kill_pids({pid: labs.start_time(pid)}, grace=2)
            (self.lab.state / "pids" / f"traffic-{self.ident}.json").unlink(missing_ok=True)


def start_pings(lab, kinds=KINDS, families=None, rate=20, flows=None, size=64):
    """ICMP echo on every flow of the matrix, rate packets/s each, size bytes of payload (at least 8)."""
    return Traffic(lab, "pings", {"flows": flows if flows is not None else matrix(lab, kinds, families), "rate": rate,
                                  "size": size}).start()


def start_streams(lab, flows=None, families=None, bits_per_second=1_000_000, directions=("forth", "back")):
    """TCP streams of full segments. Default: from each first pod and each node to the first pod of the next node, all families.

    The source connects to the target; forth: the source sends; back: the target sends, as a server does that pushes. For NAT the
    two differ: a packet that comes back for a connection the node has forgotten is answered with a reset.
    """
    if flows is None:
        wanted = set()
        for number in lab.node_numbers:
            following = number % lab.options.nodes + 1
            if following != number:
                wanted |= {(f"node-{number}-pod-1", f"node-{following}-pod-1"), (f"node-{number}", f"node-{following}-pod-1")}
        flows = [flow for flow in matrix(lab, ("pod-pod", "host-pod"), families) if (flow["source"], flow["target"]) in wanted]
    flows = [{**flow, "direction": direction} for flow in flows for direction in directions]
    return Traffic(lab, "streams", {"flows": flows, "rate": bits_per_second}).start()


def start_requests(lab, interval=0.05, families=None, nodes=None, source="ctl"):
    """A new TCP connection to the NodePort of each node every interval seconds, and lasting connections.

    Lasting, per node and family: one with question and answer, one on which the pod sends all the time, one on which the client does.
    """
    if not lab.options.nodeport:
        raise labs.LabError(f"lab {lab.name} is up without --nodeport")
    flows = [{"kind": "nodeport", "source": source, "target": node, "family": family, "address": address}
             for node in (nodes or lab.nodes) for family, address in lab.node_addresses(node).items()
             if families is None or family in families]
    return Traffic(lab, "requests", {"flows": flows, "interval": interval}).start()


def start_markers(lab, kinds=("pod-pod",), families=None, rate=10, tcp_rate=2):
    """UDP packets with a marker on every flow between two nodes, rate/s, and TCP ones on lasting connections, tcp_rate/s."""
    flows = [flow for flow in matrix(lab, kinds, families) if flow["remote"]]
    return Traffic(lab, "markers", {"flows": flows, "rate": rate, "tcp_rate": tcp_rate, "key": marker_key(lab)}).start()


def start_sniffer(lab, ports=WIREGUARD_PORTS):
    """Looks at every frame that any node sends into the underlay; counts those with a marker in clear and those of WireGuard."""
    return Traffic(lab, "sniffer", {"key": marker_key(lab), "ports": list(ports)}).start()


def marker_key(lab):
    """12 random bytes in hex, the same for all markers and sniffers of a lab."""
    path = lab.state / "marker"
    if not path.exists():
        labs.atomic_write(path, secrets.token_hex(12))
    return path.read_text()


def describe(report):
    """A few lines for people."""
    lines = [f"{report['tool']}: {report['seconds']:.1f} s"]
    for key, value in report.get("totals", {}).items():
        lines.append(f"  {key}: " + ", ".join(f"{name} {number}" for name, number in value.items()))
    for key in ("sent", "received", "lost", "late", "failed", "slow", "lasting_failed", "bulk_failed", "bulk_stalled_ms", "errors",
                "stalled_ms", "frames", "clear_frames", "wireguard_frames", "drops", "classes", "latest_tick_ms"):
        if key in report:
            lines.append(f"  {key}: {report[key]}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------------------
# sockets in namespaces
# ---------------------------------------------------------------------------------------------------------------------------------


def open_socket(lab, host, family, kind, protocol=0):
    """A non-blocking socket in the namespace of a host, with large buffers."""
    def make():
        return socket.socket(socket.AF_INET6 if family == "ipv6" else socket.AF_INET, kind, protocol)
    made = labs.in_namespace(lab.namespace(host), make)
    made.setblocking(False)
    if kind != socket.SOCK_STREAM:  # TCP sizes its own
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            made.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    return made


def drops_of(sock):
    """Packets the kernel dropped because this socket's buffer was full: those would be ours, not the network's."""
    values = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
    return struct.unpack("9I", values)[8]


def namespace_identity(lab, host):
    try:
        return os.stat(f"/run/netns/{lab.namespace(host)}").st_ino
    except OSError:
        return None


class Loop:
    """Selector, ticks and signals: what every tool shares. A tool overrides start, tick, finish, report."""

    tool = ""

    def __init__(self, lab, folder, config):
        self.lab, self.folder, self.config = lab, folder, config
        self.selector = selectors.DefaultSelector()
        self.stopping = self.peeking = False
        self.started = time.monotonic()
        self.latest_tick = 0.0
        self.wake_read, self.wake_write = os.pipe()
        for handle in (self.wake_read, self.wake_write):
            os.set_blocking(handle, False)

    def main(self):
        # Before whatever else runs on the machine, as a tool that is late counts losses of its own.
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._drain_wakeups)
        self.start()
        self.started = time.monotonic()
        (self.folder / "started").write_text(str(time.time()))
        self.run_until(lambda: self.stopping)
        self.finish()
        self.write("report.json")

    def _on_signal(self, number, dummy):
        if number == signal.SIGUSR1:
            self.peeking = True
        else:
            self.stopping = True

    def _drain_wakeups(self, dummy):
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_read, 4096)

    def run_until(self, done, ticking=True):
        """Serve sockets; call tick(now), which returns when it wants to be called again (monotonic seconds)."""
        due = time.monotonic()
        while not done():
            now = time.monotonic()
            if now >= due:
                self.latest_tick = max(self.latest_tick, now - due)
                due = self.tick(now) if ticking else now + 0.05
            for key, mask in self.selector.select(max(0.0, min(due - time.monotonic(), 1.0))):
                key.data(mask)
            if self.peeking:
                self.peeking = False
                self.write("peek.json")

    def write(self, name):
        report = {"tool": self.tool, "seconds": time.monotonic() - self.started,
                  # How late the loop ran at worst: the machine, not the network under test.
                  "latest_tick_ms": round(self.latest_tick * 1000, 1)}
        report.update(self.report())
        labs.atomic_write(self.folder / name, json.dumps(report, indent=1))

    def start(self):
        raise NotImplementedError

    def tick(self, now):
        return now + 1.0

    def finish(self):
        pass

    def report(self):
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------------------
# pings
# ---------------------------------------------------------------------------------------------------------------------------------


class Pings(Loop):
    """Sends echo requests without binding to a source address, so that the kernel's own choice of source and route is what is tested."""

    tool = "pings"
    SAMPLE = 16  # every 16th request is looked at where it arrives, for the source address it came with; a power of two

    def start(self):
        self.cookie = secrets.token_bytes(8)
        self.period = 1.0 / self.config["rate"]
        self.base = secrets.randbelow(0x8000)
        self.flows = []
        for index, spec in enumerate(self.config["flows"]):
            self.flows.append({**spec, "id": (self.base + index) & 0xffff, "seq": 0, "out": {}, "sent": 0, "received": 0, "late": 0,
                               "duplicates": 0, "lost_at": [], "errors": collections.Counter(), "sources": collections.Counter(),
                               "last": None, "gap": 0.0})
        self.by_id = {(flow["family"], flow["id"]): flow for flow in self.flows}
        if len(self.by_id) != len(self.flows):
            raise labs.LabError("more than 65536 flows of one family")
        self.sockets, self.watchers, self.identity, self.old_drops = {}, {}, {}, 0
        self.body = self.cookie + bytes(max(0, self.config["size"] - 8))
        for flow in self.flows:
            flow["sum"] = ~checksum(struct.pack("!BBHHH", 8, 0, 0, flow["id"], 0) + self.body) & 0xffff
        self._open_all()
        self.turn, self.due = 0, time.monotonic()
        self.next_check = time.monotonic() + 0.5

    def _open_all(self):
        """Open what is missing; open again what belongs to a namespace that is gone (a node that rebooted)."""
        wanted = {(flow["source"], flow["family"]) for flow in self.flows}
        seen = {(flow["target"], flow["family"]) for flow in self.flows}
        for host in {host for host, dummy in wanted | seen}:
            identity = namespace_identity(self.lab, host)
            if identity == self.identity.get(host):
                continue
            for table in (self.sockets, self.watchers):
                for key in [key for key in table if key[0] == host]:
                    old = table.pop(key)
                    self.old_drops += drops_of(old) if table is self.sockets else 0
                    self.selector.unregister(old)
                    old.close()
            self.identity[host] = identity
            if identity is None:
                continue
            try:
                for family in ("ipv4", "ipv6"):
                    if (host, family) in wanted:
                        self._open(host, family)
                    if (host, family) in seen:
                        self._watch(host, family)
            except OSError as error:
                print(f"{host}: {error}", flush=True)
                self.identity[host] = None

    def _raw(self, host, family):
        return open_socket(self.lab, host, family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if family == "ipv6" else socket.IPPROTO_ICMP)

    def _open(self, host, family):
        sock = self._raw(host, family)
        if family == "ipv4":
            sock.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << 0) & 0xffffffff))  # echo reply only
        else:
            sock.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, self._filter6(129))
        self.sockets[host, family] = sock
        self.selector.register(sock, selectors.EVENT_READ, lambda mask, s=sock, f=family: self._receive(s, f))

    @staticmethod
    def _filter6(kind):
        words = [0xffffffff] * 8
        words[kind >> 5] &= ~(1 << (kind & 31)) & 0xffffffff
        return struct.pack("=8I", *words)

    def _watch(self, host, family):
        sock = self._raw(host, family)
        # Raw sockets see IPv4 with its header (20 bytes without options) and ICMPv6 without.
        at, request = (20, 8) if family == "ipv4" else (0, 128)
        code = [(0x30, 0, 0, at), (0x15, 0, 4, request), (0x28, 0, 0, at + 6), (0x54, 0, 0, self.SAMPLE - 1), (0x15, 0, 1, 0),
                (0x06, 0, 0, 0xffff), (0x06, 0, 0, 0)]
        # Load the type; not a request: to the last line. Load the sequence number; not every 16th: to the last line.
        program = b"".join(struct.pack("=HBBI", *word) for word in code)
        buffer = ctypes.create_string_buffer(program)
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(code), ctypes.addressof(buffer)))
        self.watchers[host, family] = sock
        self.selector.register(sock, selectors.EVENT_READ, lambda mask, s=sock, f=family: self._note_source(s, f))

    def _note_source(self, sock, family):
        for dummy in range(64):
            try:
                data, peer = sock.recvfrom(2048)
            except OSError:
                return
            body = data[(data[0] & 15) * 4:] if family == "ipv4" else data
            if len(body) >= 16 and body[8:16] == self.cookie:
                flow = self.by_id.get((family, struct.unpack_from("!H", body, 4)[0]))
                if flow:
                    flow["sources"][peer[0]] += 1

    def tick(self, now):
        if now >= self.next_check:
            self.next_check = now + 0.5
            self._open_all()
            self._expire(now)
        # One ring of all flows, spread evenly over the period, so that there are no bursts.
        step = self.period / len(self.flows)
        if self.due < now - 1.0:
            self.due = now  # the machine slept: do not send a second's worth at once
        while self.due <= now:
            self._send(self.flows[self.turn])
            self.turn = (self.turn + 1) % len(self.flows)
            self.due += step
        return max(self.due, now + 0.002)

    def _send(self, flow):
        seq = flow["seq"]
        flow["seq"] = (seq + 1) & 0xffff
        if flow["family"] == "ipv4":
            # RFC 1624: from the sum of the rest to the sum with this sequence number.
            total = flow["sum"] + seq
            total = (total & 0xffff) + (total >> 16)
            head = struct.pack("!BBHHH", 8, 0, ~((total & 0xffff) + (total >> 16)) & 0xffff, flow["id"], seq)
        else:
            head = struct.pack("!BBHHH", 128, 0, 0, flow["id"], seq)  # the kernel fills in the ICMPv6 checksum (RFC 3542, 3.1)
        flow["sent"] += 1
        flow["out"][seq] = (time.monotonic(), time.time())
        sock = self.sockets.get((flow["source"], flow["family"]))
        if sock is None:
            flow["errors"]["no namespace"] += 1
            return
        try:
            sock.sendto(head + self.body, (flow["address"], 0))
        except OSError as error:
            flow["errors"][errno.errorcode.get(error.errno, str(error.errno))] += 1

    def _receive(self, sock, family):
        for dummy in range(256):
            try:
                data = sock.recv(2048)
            except OSError:
                return
            body = data[(data[0] & 15) * 4:] if family == "ipv4" else data
            if len(body) < 16 or body[8:16] != self.cookie:
                continue
            number, seq = struct.unpack_from("!HH", body, 4)
            flow = self.by_id.get((family, number))
            if flow is None:
                continue
            sent = flow["out"].pop(seq, None)
            now = time.monotonic()
            if sent is None:
                flow["duplicates"] += 1  # or after it had been given up
            elif now - sent[0] > ANSWER_SECONDS:
                flow["late"] += 1
                flow["lost_at"].append(sent[1])
            else:
                flow["received"] += 1
                if flow["last"] is not None:
                    flow["gap"] = max(flow["gap"], now - flow["last"])
                flow["last"] = now

    def _expire(self, now):
        for flow in self.flows:
            out = flow["out"]
            for seq in list(out):
                if now - out[seq][0] <= ANSWER_SECONDS:
                    break  # in order of sending
                # What waits unread in the buffer has arrived: it is taken out before anything is given up.
                flow["lost_at"].append(out.pop(seq)[1])

    def finish(self):
        end = time.monotonic() + ANSWER_SECONDS
        self.run_until(lambda: time.monotonic() > end or not any(flow["out"] for flow in self.flows), ticking=False)
        for flow in self.flows:
            flow["lost_at"] += [stamp for dummy, stamp in flow["out"].values()]
            flow["out"].clear()

    def report(self):
        flows, totals = [], {}
        for flow in self.flows:
            lost = len(flow["lost_at"])
            entry = totals.setdefault(f"{flow['kind']} {flow['family']}" + ("" if flow.get("remote", True) else " same node"),
                                      {"flows": 0, "sent": 0, "received": 0, "lost": 0})
            entry["flows"] += 1
            entry["sent"] += flow["sent"]
            entry["received"] += flow["received"]
            entry["lost"] += lost
            flows.append({**{key: flow[key] for key in ("kind", "source", "target", "family", "address", "sent", "received", "late",
                                                        "duplicates")},
                          "remote": flow.get("remote", True), "lost": lost, "in_flight": len(flow["out"]), "errors": dict(flow["errors"]),
                          "lost_at": [round(stamp, 3) for stamp in sorted(flow["lost_at"])], "sources_seen": dict(flow["sources"]),
                          "longest_gap_ms": round(flow["gap"] * 1000, 1)})
        return {"sent": sum(flow["sent"] for flow in flows), "received": sum(flow["received"] for flow in flows),
                "lost": sum(flow["lost"] for flow in flows), "late": sum(flow["late"] for flow in flows), "totals": totals,
                "drops": self.old_drops + sum(drops_of(sock) for sock in self.sockets.values()), "flows": flows}


# ---------------------------------------------------------------------------------------------------------------------------------
# streams
# ---------------------------------------------------------------------------------------------------------------------------------

PATTERN_LENGTH = 65521  # bytes, a prime: a lost or repeated segment of any usual size shows as a wrong byte
PATTERN = (bytes(range(256)) * 3 + bytes(range(255, -1, -1)) * 5 + b"kubemesh")
PATTERN = (PATTERN * (PATTERN_LENGTH // len(PATTERN) + 1))[:PATTERN_LENGTH]
PATTERN_TWICE = PATTERN + PATTERN


class Streams(Loop):
    """TCP streams of bursts of full segments; the receiver compares every byte."""

    tool = "streams"
    BURST_SECONDS = 0.1

    def start(self):
        self.streams = []
        self.chunk = max(1, int(self.config["rate"] / 8 * self.BURST_SECONDS))
        for spec in self.config["flows"]:
            listener = open_socket(self.lab, spec["target"], spec["family"], socket.SOCK_STREAM)
            listener.bind((spec["address"], 0))
            listener.listen(1)
            caller = open_socket(self.lab, spec["source"], spec["family"], socket.SOCK_STREAM)
            stream = {**spec, "listener": listener, "caller": caller, "sender": None, "receiver": None, "sent": 0, "received": 0,
                      "wrong": 0, "errors": [], "last": None, "stall": 0.0, "stall_at": None, "credit": 0, "eof": False, "mss": 0,
                      "retransmits": 0}
            self.streams.append(stream)
            self.selector.register(listener, selectors.EVENT_READ, lambda mask, s=stream: self._accept(s))
            code = caller.connect_ex(listener.getsockname()[:2])
            if code not in (0, errno.EINPROGRESS):
                stream["errors"].append({"at": time.time(), "error": "connect " + errno.errorcode.get(code, str(code))})
        self.run_for(3.0, lambda: all(stream["receiver"] for stream in self.streams))

    def run_for(self, seconds, done):
        end = time.monotonic() + seconds
        self.run_until(lambda: time.monotonic() > end or done(), ticking=False)

    def _accept(self, stream):
        try:
            accepted, dummy = stream["listener"].accept()
        except OSError:
            return
        accepted.setblocking(False)
        stream["peer"] = accepted.getpeername()[0]
        forth = stream["direction"] == "forth"
        stream["sender"] = stream["caller"] if forth else accepted
        stream["receiver"] = accepted if forth else stream["caller"]
        self.selector.register(stream["receiver"], selectors.EVENT_READ, lambda mask: self._receive(stream))

    def _receive(self, stream):
        try:
            data = stream["receiver"].recv(262144)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(stream, "receiver", error)
            self.selector.unregister(stream["receiver"])
            stream["eof"] = True
            return
        if not data:
            self.selector.unregister(stream["receiver"])
            stream["eof"] = True
            return
        now = time.monotonic()
        if stream["last"] is not None and now - stream["last"] > stream["stall"]:
            stream["stall"], stream["stall_at"] = now - stream["last"], time.time()
        stream["last"] = now
        at = 0
        while at < len(data):
            offset = stream["received"] % PATTERN_LENGTH
            part = data[at:at + PATTERN_LENGTH]
            if part != PATTERN_TWICE[offset:offset + len(part)]:
                stream["wrong"] += 1
            stream["received"] += len(part)
            at += len(part)

    def _failed(self, stream, side, error):
        stream["errors"].append({"at": time.time(), "error": f"{side} {errno.errorcode.get(error.errno, str(error))}"})

    def tick(self, now):
        for stream in self.streams:
            # What could not be written stays as credit up to two seconds' worth: a stream that stood still does not flood afterwards.
            stream["credit"] = min(stream["credit"] + self.chunk, int(self.chunk * 2 / self.BURST_SECONDS))
            if stream["receiver"] is None or stream["errors"]:
                continue
            offset = stream["sent"] % PATTERN_LENGTH
            try:
                count = stream["sender"].send(PATTERN_TWICE[offset:offset + min(stream["credit"], PATTERN_LENGTH)])
            except BlockingIOError:
                continue
            except OSError as error:
                self._failed(stream, "sender", error)
                continue
            stream["sent"] += count
            stream["credit"] -= count
        return now + self.BURST_SECONDS

    def _measure(self, stream):
        with contextlib.suppress(OSError, struct.error, AttributeError):
            info = stream["sender"].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            stream["mss"] = struct.unpack_from("=I", info, 16)[0]
            stream["retransmits"] = struct.unpack_from("=I", info, 100)[0]

    def finish(self):
        for stream in self.streams:
            self._measure(stream)
            with contextlib.suppress(OSError, AttributeError):
                stream["sender"].shutdown(socket.SHUT_WR)
        self.run_for(10.0, lambda: all(stream["eof"] or stream["receiver"] is None for stream in self.streams))

    def report(self):
        flows = []
        for stream in self.streams:
            if not self.stopping:
                self._measure(stream)
            if stream["receiver"] is None:
                stream["errors"] = stream["errors"] or [{"at": time.time(), "error": "never connected"}]
            stall, stall_at = stream["stall"], stream["stall_at"]
            if stream["last"] is not None and not stream["eof"] and time.monotonic() - stream["last"] > stall:
                stall, stall_at = time.monotonic() - stream["last"], time.time()
            flows.append({**{key: stream[key] for key in ("kind", "source", "target", "family", "address", "direction", "sent", "received",
                                                          "wrong", "errors", "mss", "retransmits")},
                          "peer_seen": stream.get("peer"), "complete": stream["eof"] and stream["sent"] == stream["received"],
                          "longest_stall_ms": round(stall * 1000, 1), "longest_stall_at": stall_at})
        return {"sent": sum(flow["sent"] for flow in flows), "received": sum(flow["received"] for flow in flows),
                "wrong": sum(flow["wrong"] for flow in flows), "errors": sum(len(flow["errors"]) for flow in flows),
                "stalled_ms": max((flow["longest_stall_ms"] for flow in flows), default=0), "flows": flows}


# ---------------------------------------------------------------------------------------------------------------------------------
# NodePort requests
# ---------------------------------------------------------------------------------------------------------------------------------


BULK_SECONDS, BULK_BYTES = 0.2, 2500  # about two full segments every 200 ms: 0.1 Mbit/s
SILENT_SECONDS = 5.0  # TCP has repeated a lost segment several times by then (RFC 6298: from 1 s down to 0.2 s on Linux, doubling)


class Requests(Loop):
    """New connections at a fixed pace, and lasting ones with question and answer."""

    tool = "requests"
    SLOW_SECONDS = 0.9  # the first SYN is sent again after 1 s (RFC 6298, 2.1): that slow means a packet was lost
    LASTING_SECONDS = 0.2

    def start(self):
        self.flows = []
        for index, spec in enumerate(self.config["flows"]):
            self.flows.append({**spec, "sent": 0, "ok": 0, "slow": 0, "failures": [], "sources": collections.Counter(),
                               "pods": collections.Counter(), "due": time.monotonic() + index * 0.007, "lasting": None,
                               "asked": 0, "answered": 0, "lasting_failures": [], "slowest": 0.0, "question": None, "next": 0.0})
        self.open = {}
        self.bulk = [{"flow": flow, "way": way, "sock": None, "bytes": 0, "last": None, "stall": 0.0, "failures": [], "next": 0.0}
                     for flow in self.flows for way in ("download", "upload")]

    def tick(self, now):
        interval = self.config["interval"]
        for flow in self.flows:
            if flow["due"] <= now:
                flow["due"] = max(flow["due"] + interval, now - 1.0)
                self._request(flow, now)
            self._lasting(flow, now)
        for bulk in self.bulk:
            self._bulk(bulk, now)
        for sock, request in list(self.open.items()):
            if now - request["started"] > ANSWER_SECONDS:
                self._end(sock, "timeout")
        return min([flow["due"] for flow in self.flows] + [now + BULK_SECONDS])

    def _request(self, flow, now):
        flow["sent"] += 1
        try:
            sock = open_socket(self.lab, flow["source"], flow["family"], socket.SOCK_STREAM)
        except OSError as error:
            flow["failures"].append({"at": time.time(), "error": str(error)})
            return
        self.open[sock] = {"flow": flow, "started": now, "at": time.time(), "asked": False, "data": b""}
        code = sock.connect_ex((flow["address"], labs.NODEPORT))
        self.selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, lambda mask, s=sock: self._progress(s))
        if code not in (0, errno.EINPROGRESS):
            self._end(sock, errno.errorcode.get(code, str(code)))

    def _progress(self, sock):
        request = self.open.get(sock)
        if request is None:
            return
        try:
            if not request["asked"]:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                sock.send(b"GET / HTTP/1.0\r\n\r\n")
                request["asked"] = True
                self.selector.modify(sock, selectors.EVENT_READ, lambda mask, s=sock: self._progress(s))
                return
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(sock, errno.errorcode.get(error.errno, str(error.errno)))
            return
        request["data"] += data
        if not data:
            self._end(sock, None)

    def _end(self, sock, error):
        request = self.open.pop(sock)
        flow = request["flow"]
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(sock)
        sock.close()
        if error is None:
            try:
                answer = json.loads(request["data"].partition(b"\r\n\r\n")[2])
            except ValueError:
                error = f"answer {request['data'][:80]!r}"
        if error is not None:
            flow["failures"].append({"at": round(request["at"], 3), "error": error})
            return
        flow["ok"] += 1
        flow["sources"][answer["peer"]] += 1
        flow["pods"][answer["pod"]] += 1
        if time.monotonic() - request["started"] > self.SLOW_SECONDS:
            flow["slow"] += 1

    def _lasting(self, flow, now):
        """One connection for the whole time; when it fails, that is noted, and a new one is made."""
        if flow["lasting"] is None:
            if self.stopping or now < flow["next"]:
                return
            flow["lasting"] = sock = open_socket(self.lab, flow["source"], flow["family"], socket.SOCK_STREAM)
            flow["question"] = None
            flow["next"] = now + self.LASTING_SECONDS
            sock.connect_ex((flow["address"], labs.NODEPORT))
            self.selector.register(sock, selectors.EVENT_READ, lambda mask, f=flow, s=sock: self._answer(f, s))
            return
        if flow["question"] is not None:
            if now - flow["question"] > 15.0:
                self._lasting_failed(flow, "no answer for 15 s")
            return
        if now >= flow["next"] and not self.stopping:
            flow["next"] = now + self.LASTING_SECONDS
            try:
                flow["lasting"].send(b"question\n")
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOTCONN, errno.EPIPE) and not flow["answered"]:
                    return
                self._lasting_failed(flow, errno.errorcode.get(error.errno, str(error.errno)))
                return
            flow["question"] = now
            flow["asked"] += 1

    def _answer(self, flow, sock):
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._lasting_failed(flow, errno.errorcode.get(error.errno, str(error.errno)))
            return
        if not data:
            self._lasting_failed(flow, "closed")
        elif data.endswith(b"\n") and flow["question"] is not None:
            flow["answered"] += 1
            flow["slowest"] = max(flow["slowest"], time.monotonic() - flow["question"])
            flow["question"] = None

    def _bulk(self, bulk, now):
        """Send or receive without pause; the server answers every piece of an upload with a byte, so both ways show a standstill."""
        if now < bulk["next"]:
            return
        bulk["next"] = now + BULK_SECONDS
        if bulk["last"] is not None and now - bulk["last"] > SILENT_SECONDS:
            # The other end was told that the connection is gone, and we were not.
            bulk["stall"] = max(bulk["stall"], now - bulk["last"])
            self._bulk_failed(bulk, f"silent for {SILENT_SECONDS} s")
            return
        if bulk["sock"] is None:
            flow = bulk["flow"]
            bulk["sock"] = sock = open_socket(self.lab, flow["source"], flow["family"], socket.SOCK_STREAM)
            bulk["last"], bulk["asked"] = None, False
            sock.connect_ex((flow["address"], labs.NODEPORT))
            self.selector.register(sock, selectors.EVENT_READ, lambda mask, b=bulk, s=sock: self._bulk_read(b, s))
            return
        try:
            if not bulk["asked"]:
                bulk["sock"].send(f"{bulk['way']}\n".encode())
                bulk["asked"] = True
            elif bulk["way"] == "upload":
                bulk["bytes"] += bulk["sock"].send(bytes(BULK_BYTES))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ENOTCONN or (error.errno == errno.EPIPE and not bulk["asked"]):
                return
            self._bulk_failed(bulk, errno.errorcode.get(error.errno, str(error.errno)))

    def _bulk_read(self, bulk, sock):
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._bulk_failed(bulk, errno.errorcode.get(error.errno, str(error.errno)))
            return
        if not data:
            self._bulk_failed(bulk, "closed")
            return
        now = time.monotonic()
        if bulk["last"] is not None:
            bulk["stall"] = max(bulk["stall"], now - bulk["last"])
        bulk["last"] = now
        if bulk["way"] == "download":
            bulk["bytes"] += len(data)

    def _bulk_failed(self, bulk, error):
        bulk["failures"].append({"at": round(time.time(), 3), "error": error})
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(bulk["sock"])
        bulk["sock"].close()
        bulk["sock"] = bulk["last"] = None
        bulk["next"] = time.monotonic() + 0.5

    def _lasting_failed(self, flow, error):
        flow["lasting_failures"].append({"at": round(time.time(), 3), "error": error})
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(flow["lasting"])
        flow["lasting"].close()
        flow["lasting"] = flow["question"] = None
        flow["next"] = time.monotonic() + self.LASTING_SECONDS

    def finish(self):
        end = time.monotonic() + ANSWER_SECONDS
        self.run_until(lambda: time.monotonic() > end or (not self.open and all(flow["question"] is None for flow in self.flows)),
                       ticking=False)
        for sock in list(self.open):
            self._end(sock, "timeout")

    def report(self):
        flows = []
        for flow in self.flows:
            flows.append({**{key: flow[key] for key in ("source", "target", "family", "address", "sent", "ok", "slow", "failures",
                                                        "asked", "answered", "lasting_failures")},
                          "sources_seen": dict(flow["sources"]), "pods": dict(flow["pods"]),
                          "slowest_answer_ms": round(flow["slowest"] * 1000, 1)})
        now = time.monotonic()
        for bulk in self.bulk:
            if bulk["last"] is not None and not self.stopping:
                bulk["stall"] = max(bulk["stall"], now - bulk["last"])
        bulk = [{**{key: bulk["flow"][key] for key in ("source", "target", "family")}, "way": bulk["way"], "bytes": bulk["bytes"],
                 "failures": bulk["failures"], "longest_stall_ms": round(bulk["stall"] * 1000, 1)} for bulk in self.bulk]
        return {"sent": sum(flow["sent"] for flow in flows), "ok": sum(flow["ok"] for flow in flows),
                "slow": sum(flow["slow"] for flow in flows), "failed": sum(len(flow["failures"]) for flow in flows),
                "lasting_failed": sum(len(flow["lasting_failures"]) for flow in flows),
                "bulk_failed": sum(len(entry["failures"]) for entry in bulk),
                "bulk_stalled_ms": max((entry["longest_stall_ms"] for entry in bulk), default=0), "bulk": bulk, "flows": flows}


# ---------------------------------------------------------------------------------------------------------------------------------
# markers and sniffer
# ---------------------------------------------------------------------------------------------------------------------------------


class Markers(Loop):
    """Sends packets whose payload can be recognised on the wire, and counts what arrives."""

    tool = "markers"

    def start(self):
        self.key = bytes.fromhex(self.config["key"])
        self.flows = [{**spec, "udp_sent": 0, "udp_received": 0, "tcp_sent": 0, "tcp_received": 0, "tcp_errors": 0, "sender": None}
                      for spec in self.config["flows"]]
        self.udp, self.ports, self.listeners, self.identity = {}, {}, {}, {}
        labs.atomic_write(self.folder / "flows.json", json.dumps(self.config["flows"]))
        for host, family in sorted({(flow["target"], flow["family"]) for flow in self.flows}):
            address = self.lab.addresses(host)[family]
            receiver = open_socket(self.lab, host, family, socket.SOCK_DGRAM)
            receiver.bind((address, 0))
            self.ports[host, family] = receiver.getsockname()[1]
            self.selector.register(receiver, selectors.EVENT_READ, lambda mask, s=receiver: self._received(s))
            listener = open_socket(self.lab, host, family, socket.SOCK_STREAM)
            listener.bind((address, 0))
            listener.listen(128)
            self.listeners[host, family] = listener
            self.selector.register(listener, selectors.EVENT_READ, lambda mask, s=listener: self._accepted(s))
        for host, family in {(flow["source"], flow["family"]) for flow in self.flows}:
            self.udp[host, family] = open_socket(self.lab, host, family, socket.SOCK_DGRAM)
        now = time.monotonic()
        self.turns = [{"send": send, "rate": rate, "next": 0, "due": now}
                      for send, rate in ((self._send_udp, self.config["rate"]), (self._send_tcp, self.config["tcp_rate"])) if rate]

    def marker(self, index):
        # Twice, so that one cut by a segment boundary is still seen.
        return (self.key + struct.pack("!I", index)) * 2

    def tick(self, now):
        for turn in self.turns:
            turn["due"] = max(turn["due"], now - 1.0)
            while turn["due"] <= now:
                turn["send"](turn["next"], self.flows[turn["next"]])
                turn["next"] = (turn["next"] + 1) % len(self.flows)
                turn["due"] += 1 / turn["rate"] / len(self.flows)
        return max(min([turn["due"] for turn in self.turns] + [now + 0.1]), now + 0.002)

    def _send_udp(self, index, flow):
        flow["udp_sent"] += 1
        with contextlib.suppress(OSError):
            self.udp[flow["source"], flow["family"]].sendto(
                b"udp-" + self.marker(index), (flow["address"], self.ports[flow["target"], flow["family"]]))

    def _send_tcp(self, index, flow):
        if flow["sender"] is None:
            try:
                flow["sender"] = open_socket(self.lab, flow["source"], flow["family"], socket.SOCK_STREAM)
                flow["sender"].connect_ex(self.listeners[flow["target"], flow["family"]].getsockname()[:2])
            except OSError:
                flow["tcp_errors"] += 1
            return
        try:
            flow["sender"].send(self.marker(index))
            flow["tcp_sent"] += 1
        except BlockingIOError:
            return
        except OSError:
            flow["tcp_errors"] += 1
            flow["sender"].close()
            flow["sender"] = None

    def _received(self, sock):
        for dummy in range(256):
            try:
                index = find_marker(sock.recv(2048), self.key)
            except OSError:
                return
            if index is not None and index < len(self.flows):
                self.flows[index]["udp_received"] += 1

    def _accepted(self, listener):
        with contextlib.suppress(OSError):
            sock, dummy = listener.accept()
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, lambda mask: self._received_tcp(sock))

    def _received_tcp(self, sock):
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(sock)
            sock.close()
            return
        index = find_marker(data, self.key)
        if index is not None and index < len(self.flows):
            self.flows[index]["tcp_received"] += data.count(self.key) // 2

    def finish(self):
        end = time.monotonic() + 1.0
        self.run_until(lambda: time.monotonic() > end, ticking=False)

    def report(self):
        keys = ("kind", "source", "target", "family", "udp_sent", "udp_received", "tcp_sent", "tcp_received", "tcp_errors")
        flows = [{key: flow[key] for key in keys} for flow in self.flows]
        return {"sent": sum(flow["udp_sent"] + flow["tcp_sent"] for flow in flows),
                "received": sum(flow["udp_received"] + flow["tcp_received"] for flow in flows), "flows": flows}


class Sniffer(Loop):
    """Every frame as the bridge receives it from a port: each frame on the underlay once."""

    tool = "sniffer"

    def start(self):
        self.key = bytes.fromhex(self.config["key"])
        self.ports = frozenset(self.config["ports"])
        self.frames = self.clear = 0
        self.by_port, self.classes, self.kinds, self.pairs = (collections.Counter() for dummy in range(4))
        self.by_flow, self.by_second, self.pod_frames = {}, collections.Counter(), collections.Counter()
        self.drops = 0
        self.names = {}
        self.prefix4, self.prefix6 = labs.CLUSTER4.network_address.packed[:2], labs.CLUSTER6.network_address.packed[:6]
        self.sock = labs.in_namespace(self.lab.namespace("fabric"), lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW,
                                                                                          socket.htons(ETH_P_ALL)))
        self.sock.setblocking(False)
        self.sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self.selector.register(self.sock, selectors.EVENT_READ, self._receive)

    def _receive(self, dummy_mask):
        for dummy in range(512):
            try:
                frame, where = self.sock.recvfrom(65536)
            except OSError:
                return
            if where[0] in ("br0", "lo"):
                continue  # a frame for the bridge itself has been counted at its port
            self.frames += 1
            self.by_port[where[0]] += 1
            word, source, target, detail = classify(frame, self.ports)
            self.classes[word] += 1
            if word == "wireguard":
                self.kinds[detail] += 1
                self.pairs[source, target] += 1
            elif source is not None and (self._pod(source) or self._pod(target)):
                self.pod_frames[word] += 1
            index = find_marker(frame, self.key)
            if index is not None:
                now = time.time()
                self.clear += 1
                self.by_second[int(now)] += 1
                entry = self.by_flow.setdefault((index, word), {"count": 0, "first": now})
                entry["count"] += 1
                entry["last"] = now

    def _pod(self, packed):
        return packed[:2] == self.prefix4 if len(packed) == 4 else packed[:6] == self.prefix6

    def tick(self, now):
        self._statistics()
        return now + 1.0

    def _statistics(self):
        # Reading resets both counters (packet(7)).
        self.drops += struct.unpack("II", self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]

    def finish(self):
        end = time.monotonic() + 0.2
        self.run_until(lambda: time.monotonic() > end, ticking=False)

    def _flows(self):
        """Flow numbers are those of the marker tools: their lists are beside us. Several tools at once share numbers; all are named."""
        names = collections.defaultdict(set)
        for path in self.folder.parent.glob("markers-*/flows.json"):
            for index, flow in enumerate(json.loads(path.read_text())):
                names[index].add((flow["source"], flow["target"], flow["family"]))
        return names

    def report(self):
        self._statistics()
        names = self._flows()

        def text(packed):
            return str(ipaddress.ip_address(packed))
        clear = []
        for (index, word), entry in sorted(self.by_flow.items()):
            for source, target, family in sorted(names.get(index) or {("?", "?", "?")}):
                clear.append({"source": source, "target": target, "family": family, "class": word, "count": entry["count"],
                              "first": round(entry["first"], 3), "last": round(entry["last"], 3)})
        return {"frames": self.frames, "frames_by_port": dict(self.by_port), "classes": dict(self.classes), "drops": self.drops,
                "wireguard_frames": self.classes["wireguard"], "wireguard_types": {str(key): count for key, count in self.kinds.items()},
                "wireguard_pairs": {f"{text(source)} {text(target)}": count for (source, target), count in sorted(self.pairs.items())},
                "pod_address_frames": dict(self.pod_frames), "clear_frames": self.clear, "clear": clear,
                "clear_by_second": {str(second): count for second, count in sorted(self.by_second.items())}}


# ---------------------------------------------------------------------------------------------------------------------------------
# the server in every pod
# ---------------------------------------------------------------------------------------------------------------------------------


async def serve_pods(lab):
    """TCP port 8080 in every pod, all in this process. GET answers who asked; the lines download and upload start bulk traffic on
    the connection; any other line is answered, as often as one comes.
    """
    os.setpriority(os.PRIO_PROCESS, 0, -10)  # as in Loop.main
    serving, writers = {}, set()

    async def answer(pod, reader, writer):
        peer = writer.get_extra_info("peername")[0]
        writers.add(writer)
        # IPv4 arrives at the dual-stack socket as a mapped address.
        text = json.dumps({"pod": pod, "peer": peer[7:] if peer.startswith("::ffff:") else peer})
        try:
            while True:
                line = await reader.readline()
                if not line:
                    break
                if line.startswith(b"GET "):
                    while (await reader.readline()).strip():
                        pass
                    body = text + "\n"
                    writer.write(f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                    await writer.drain()
                    break
                if line == b"download\n":
                    while True:
                        writer.write(bytes(BULK_BYTES))
                        await writer.drain()
                        await asyncio.sleep(BULK_SECONDS)
                if line == b"upload\n":
                    while await reader.read(65536):
                        writer.write(b".")
                    break
                writer.write(f"{text}\n".encode())
                await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writers.discard(writer)
            writer.close()

    def make(pod):
        sock = open_socket(lab, pod, "ipv6", socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", labs.POD_PORT))
        sock.listen(512)
        return sock

    changed = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, changed.set)
    while True:
        for pod in lab.pods:
            if pod not in serving:
                serving[pod] = await asyncio.start_server(lambda r, w, p=pod: answer(p, r, w), sock=make(pod))
        await changed.wait()
        changed.clear()


TOOLS = {"pings": Pings, "streams": Streams, "requests": Requests, "markers": Markers, "sniffer": Sniffer}
STARTERS = {"pings": start_pings, "streams": start_streams, "requests": start_requests, "markers": start_markers, "sniffer": start_sniffer}


def main(argv=None):
    """traffic.py start LAB TOOL, traffic.py peek|stop LAB ID; see README.md."""
    parser = argparse.ArgumentParser(prog="traffic.py", description="Traffic through a lab, counted.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start", help="start a tool; prints its id")
    start.add_argument("name")
    start.add_argument("tool", choices=sorted(TOOLS))
    start.add_argument("--kinds", help=f"for pings and markers: some of {','.join(KINDS)}")
    for word, text in (("peek", "the report so far"), ("stop", "end a tool, print its report as JSON")):
        sub = verbs.add_parser(word, help=text)
        sub.add_argument("name")
        sub.add_argument("ident")
        sub.add_argument("--text", action="store_true", help="a few lines instead of JSON")
    hidden = verbs.add_parser("_tool")
    for word in ("name", "tool", "ident"):
        hidden.add_argument(word)
    verbs.add_parser("_pod_servers").add_argument("name")
    args = parser.parse_args(argv)
    try:
        lab = labs.Lab(args.name)
        if args.verb == "start":
            extra = {"kinds": tuple(args.kinds.split(","))} if args.kinds else {}
            print(STARTERS[args.tool](lab, **extra).ident)
        elif args.verb == "_tool":
            folder = lab.state / "traffic" / args.ident
            TOOLS[args.tool](lab, folder, json.loads((folder / "config.json").read_text())).main()
        elif args.verb == "_pod_servers":
            asyncio.run(serve_pods(lab))
        else:
            handle = Traffic(lab, args.ident.partition("-")[0], ident=args.ident)
            report = handle.peek() if args.verb == "peek" else handle.stop()
            print(describe(report) if args.text else json.dumps(report, indent=1))
    except labs.LabError as error:
        print(f"traffic.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
