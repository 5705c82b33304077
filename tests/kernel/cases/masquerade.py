# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Masqueraded connections while a node is switched: NodePorts (destination and source translated), and pods behind kubenet's masquerade.

The kernel drops the first packet of a masqueraded connection that leaves by another device than before, and forgets the connection
(nf_nat_oif_changed, net/netfilter/nf_nat_core.c). The first case measures that with bare rules, so that the second, which wants to see
nothing of it with the module `routes`, is known to be able to fail. UDP and ICMP are counted packet by packet. TCP repeats by itself, also
when the emulator was only slow, so there it counts whether the connection lives.

The last case replaces the entries of connections under dense load again and again, with the detour around them and without. The gap between
delete and create is made wider for that, to what it is where the processor is taken away at that moment.
"""
from __future__ import annotations

import select
import selectors
import socket
import struct
import time

import cluster

from cases.modules import accepted, name_of

BACKEND_PORT = 8080
# NodePort -> how its connections are masqueraded; kube-proxy uses --random-fully where iptables can
NODE_PORTS = {30080: "masquerade", 30081: "masquerade fully-random"}
EACH = 2  # connections per protocol, family and NodePort
RATE = 20  # messages per second and connection
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
RECEIVE_BUFFER = 4 << 20  # bytes; a machine that stands still for a second must not lose what waits
# 32 connections of UDP and 8 of ICMP; in the emulator this is about what two processors can forward.
DENSE = {"each": 8, "pings": 4, "rate": 20}
GAP = 0.01  # seconds between delete and create
ROUNDS = 2  # in which each connection is replaced, at least
SETTLE = 5.0  # seconds without an answer until those that are missing are lost; more than TCP's third repetition takes


def nat_rules(a, b):
    """nft rules of the node a: NodePorts to the pod of b, and its own pod masqueraded towards the node b."""
    lines = ["add table inet kmnat", "add chain inet kmnat pre { type nat hook prerouting priority dstnat; }",
             "add chain inet kmnat post { type nat hook postrouting priority srcnat; }"]
    for port, verdict in NODE_PORTS.items():
        for family, nft in (("ipv4", "ip"), ("ipv6", "ip6")):
            target = b.pods[0].addresses[family]
            target = "[%s]" % target if nft == "ip6" else target
            for protocol in ("tcp", "udp"):
                lines.append("add rule inet kmnat pre %s daddr %s %s dport %d ct mark set %d dnat %s to %s:%d" % (
                    nft, a.addresses[family], protocol, port, port, nft, target, BACKEND_PORT))
        lines.append("add rule inet kmnat post ct mark %d %s" % (port, verdict))
    for family, nft in (("ipv4", "ip"), ("ipv6", "ip6")):
        lines.append("add rule inet kmnat post %s saddr %s %s daddr %s masquerade" % (
            nft, a.pods[0].addresses[family], nft, b.addresses[family]))
    return "\n".join(lines) + "\n"


def _echo_server(stop, pod):
    poll = selectors.DefaultSelector()
    poll.register(stop, selectors.EVENT_READ, "stop")
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sock = pod.socket(family, kind)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, BACKEND_PORT))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            if kind == socket.SOCK_STREAM:
                sock.listen(32)
            poll.register(sock, selectors.EVENT_READ, "listen" if kind == socket.SOCK_STREAM else "udp")
    while True:
        for key, dummy in poll.select():
            if key.data == "stop":
                return
            try:
                if key.data == "listen":
                    new, dummy2 = key.fileobj.accept()
                    new.setblocking(False)
                    poll.register(new, selectors.EVENT_READ, "tcp")
                elif key.data == "udp":
                    data, peer = key.fileobj.recvfrom(2048)
                    key.fileobj.sendto(data, peer)
                else:
                    data = key.fileobj.recv(65536)
                    if not data:
                        poll.unregister(key.fileobj)
                    else:
                        key.fileobj.send(data)
            except OSError:
                if key.data == "tcp":
                    poll.unregister(key.fileobj)


def _client(stop, net, connections, rate):
    """Send `rate` numbered messages per second over each (name, protocol, address, port) until stop; {name: {"sent", "received", "broken",
    "lost_at"}}."""
    poll = selectors.DefaultSelector()
    poll.register(stop, selectors.EVENT_READ, None)
    state = []
    for name, protocol, address, port in connections:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = net.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        sock.settimeout(20)
        sock.connect((address, port))
        if protocol == "udp":
            _wait_for_answer(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        if protocol == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one = {"name": name, "tcp": protocol == "tcp", "sock": sock, "sent": 0, "got": set(), "at": {}, "bytes": b"", "broken": ""}
        state.append(one)
        poll.register(sock, selectors.EVENT_READ, one)
    due, end = time.monotonic(), None
    while end is None or time.monotonic() < end:
        if end is None and due <= time.monotonic():
            due = max(due + 1.0 / rate, time.monotonic())
            for one in state:
                if not one["broken"]:
                    _send(one)
        elif end is not None and all(one["broken"] or len(one["got"]) == one["sent"] for one in state):
            break
        for key, dummy in poll.select(max(0.0, (due if end is None else end) - time.monotonic())):
            if key.data is None:
                poll.unregister(stop)
                end = time.monotonic() + SETTLE
            else:
                _receive(key.data, poll)
                end = end and time.monotonic() + SETTLE
    return {one["name"]: {"sent": one["sent"], "received": len(one["got"]), "broken": one["broken"],
                          "lost_at": [one["at"][number] for number in range(1, one["sent"] + 1) if number not in one["got"]]}
            for one in state}


def _wait_for_answer(sock):
    """Send number 0 until an answer comes: the other side takes its time to start, and what is counted begins with 1."""
    sock.settimeout(0.5)
    end = time.monotonic() + 20
    while True:
        try:
            sock.send(struct.pack("!I", 0) + b"kubemesh" * 4)
            sock.recv(65536)
            return
        except OSError:  # also the time-out
            if time.monotonic() > end:
                raise


def _send(one):
    one["sent"] += 1
    one["at"][one["sent"]] = time.monotonic()
    try:
        one["sock"].send(struct.pack("!I", one["sent"]) + b"kubemesh" * 4)
    except BlockingIOError:
        one["sent"] -= 1
    except OSError as exc:
        if one["tcp"]:
            one["broken"] = str(exc)


def _receive(one, poll):
    try:
        data = one["sock"].recv(65536)
    except BlockingIOError:
        return
    except OSError as exc:
        if one["tcp"]:
            one["broken"] = str(exc)
            poll.unregister(one["sock"])
        return
    if one["tcp"] and not data:
        one["broken"] = "closed"
        poll.unregister(one["sock"])
        return
    one["bytes"] = one["bytes"] + data if one["tcp"] else data
    while len(one["bytes"]) >= 36:
        number = struct.unpack_from("!I", one["bytes"])[0]
        if number:
            one["got"].add(number)
        one["bytes"] = one["bytes"][36:]


class Traffic:
    """The connections of one trial. stop() -> (summary per kind, messages sent).

    :param each: connections per protocol, family and NodePort; pings: per family; rate: messages per second of each.
    """

    def __init__(self, lab, protocols=("udp", "tcp"), each=EACH, pings=1, rate=RATE):
        a, b = lab.nodes
        a.sh("nft", "-f", "-", data=nat_rules(a, b))
        self.client = cluster.Net(lab.prefix + "client", {"ipv4": "198.18.0.100", "ipv6": "2001:db8::100"})
        cluster.sh("ip", "netns", "add", self.client.name)
        self.client.veth("eth0", lab.wire, "client")
        lab.wire.ip(["link set client master underlay up"])
        self.client.ip(["link set lo up", "link set eth0 up", "addr add 198.18.0.100/24 dev eth0",
                        "addr add 2001:db8::100/64 dev eth0 nodad"])
        connections = [("%s %s %s %d" % (protocol, family, NODE_PORTS[port], number), protocol, a.addresses[family], port)
                       for protocol in protocols for family in ("ipv4", "ipv6") for port in NODE_PORTS for number in range(each)]
        flows = [("pod-host masqueraded %s %d" % (family, number), a.pods[0], a.pods[0].addresses[family], b.addresses[family])
                 for family in ("ipv4", "ipv6") for number in range(pings)]
        self.server = cluster.Background(_echo_server, b.pods[0])
        time.sleep(0.3)
        self.load = cluster.Background(_client, self.client, connections, rate)
        self.pings = cluster.Background(cluster._ping_loop, flows, rate)
        time.sleep(1.5)

    def stop(self):
        results, pings = self.load.stop(), self.pings.stop()
        self.server.stop()
        cluster.sh("ip", "netns", "del", self.client.name)
        summary = {}
        for name, one in results.items():
            kind = summary.setdefault(name.rsplit(" ", 1)[0], {"connections": 0, "lost": 0, "broken": 0})
            kind["connections"] += 1
            kind["broken"] += bool(one["broken"])
            kind["lost"] += 0 if one["broken"] else one["sent"] - one["received"]
        for name, flow in pings["flows"].items():
            kind = summary.setdefault("icmp " + name.rsplit(" ", 1)[0], {"connections": 0, "lost": 0, "broken": 0})
            kind["connections"] += 1
            kind["lost"] += flow["lost"]
        self.lost_at = {name: sorted({round(moment, 1) for moment in one["lost_at"]}) for name, one in results.items()
                        if one["lost_at"] and not one["broken"]}
        total = sum(one["sent"] for one in results.values()) + pings["sent"]
        return summary, total


def case_bare_rules_lose_masqueraded_packets(env):
    with cluster.Cluster(nodes=2) as lab:
        a = lab.nodes[0]
        accepted(lab)
        lab.modules("probe", node=name_of, require="all")
        lab.modules("routes", node=name_of, persist=False)
        traffic = Traffic(lab)
        a.sh("sh", "-c", "ip rule add priority 400 lookup 51840; ip -6 rule add priority 400 lookup 51840; "
                         "ip rule add priority 401 from 10.244.1.0/24 lookup 51841; "
                         "ip -6 rule add priority 401 from fd00:10:244:1::/64 lookup 51841")
        time.sleep(2)
        summary, total = traffic.stop()
        env.note(sent=total, **{name.replace(" ", "_"): value for name, value in summary.items()})
        lost = sum(kind["lost"] + kind["broken"] for kind in summary.values())
        assert lost > 0, "the kernel dropped nothing: carrying connections over is needless on it, and its test proves nothing"


def case_the_module_carries_masqueraded_connections_over(env):
    with cluster.Cluster(nodes=2) as lab:
        a = lab.nodes[0]
        accepted(lab)
        lab.modules("probe", node=name_of, require="all")
        lab.modules("routes", node=name_of, persist=False)
        traffic = Traffic(lab)
        times = [time.monotonic()]
        on = lab.module(a, "routes", node="worker-1", persist=False, send=True)
        times.append(time.monotonic())
        time.sleep(1)
        times.append(time.monotonic())
        off = lab.module(a, "routes", node="worker-1", persist=False, send=False)
        times.append(time.monotonic())
        time.sleep(1)
        summary, total = traffic.stop()
        env.note(sent=total, carried_on=on["carried_connections"], carried_off=off["carried_connections"],
                 **{name.replace(" ", "_"): value for name, value in summary.items()})
        env.note(switched=[round(moment, 1) for moment in times], lost_at=traffic.lost_at)
        bad = {name: kind for name, kind in summary.items() if kind["lost"] or kind["broken"]}
        assert not bad, bad
        assert on["carried_connections"] >= 2 * 2 * 2 * EACH + 2


def _replace(stop, node, detour):
    """In a node, replace its masqueraded connections ROUNDS times, and again and again until stop; the sums of the results."""
    from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack

    node.enter()
    if not detour:
        _conntrack.Detour.start = lambda self: None
    at_once = _conntrack.Conntrack.exchange

    def exchange(self, family, requests):
        """As on a machine that takes the processor away between delete and create."""
        if requests[0][0] != _conntrack.IPCTNL_MSG_CT_DELETE or len(requests) != 3:
            return at_once(self, family, requests)
        gone = at_once(self, family, requests[:1])[0]
        time.sleep(GAP)
        codes, entry = at_once(self, family, requests[1:])
        return gone + codes, entry

    _conntrack.Conntrack.exchange = exchange
    sums = {"rounds": 0, "replaced": 0, "left": 0, "exposed": 0}
    while sums["rounds"] < ROUNDS or not select.select([stop], [], [], 0)[0]:
        result = _conntrack.carry_over(["0.0.0.0/0", "::/0"], passes=1)
        assert not result["error"] and result["detoured"] == detour, result
        sums["rounds"] += 1
        for name in ("replaced", "left", "exposed"):
            sums[name] += result[name]
    return sums


def case_no_packet_meets_the_gap(env):
    """Packets that come while the entry of their connection is replaced. TCP is not here: it would send them again."""
    lost = {}
    with cluster.Cluster(nodes=2) as lab:
        for detour, seconds in ((True, 5), (False, 1)):
            # Traffic of its own for each: in a busy emulator, messages and answers wait for seconds until they pass the node.
            traffic = Traffic(lab, protocols=("udp",), each=DENSE["each"], pings=DENSE["pings"], rate=DENSE["rate"])
            replacing = cluster.Background(_replace, lab.nodes[0], detour)
            time.sleep(seconds)
            sums = replacing.stop()
            summary, total = traffic.stop()
            lost[detour] = sum(kind["lost"] for kind in summary.values())
            env.note(**{"detour" if detour else "without": dict(sums, sent=total, lost=lost[detour])})
            assert not (detour and lost[detour]), (summary, traffic.lost_at)
    assert lost[False], "nothing was lost without the detour: this proves nothing"
