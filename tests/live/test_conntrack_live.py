# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Masqueraded connections that change devices, against the kernel's connection tracking: nothing lost and nothing reset.

A node between a pod, a client outside and a peer node. It masquerades what goes to the peer's pods with random ports, as kube-proxy does,
and drops what connection tracking calls invalid, as kube-proxy does too. The peer is behind two devices; a policy rule moves the traffic
from one to the other. Each of the main tests exists twice: with the connections carried over, and without, where they have to break.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from netlab import run, wait_for

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack


def why_not():
    """Why these tests cannot run here, or an empty text."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "nft", "ping") if not shutil.which(tool)]
    return "missing: " + ", ".join(missing) if missing else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason="live tests: " + why_not())

COUNTER = itertools.count()
PEER_PODS = ["10.244.2.0/24", "fd00:2::/64"]
PEER_POD = {"ipv4": "10.244.2.2", "ipv6": "fd00:2::2"}
NODE_PORT, POD_PORT = 30080, 8080
NOTHING = {"replaced": 0, "left": 0, "guarded": False, "detoured": False, "exposed": 0, "error": ""}

NODE_RULES = """
table inet kmun {
  chain prerouting {
    type nat hook prerouting priority -100;
    iifname ext0 tcp dport %(node)d dnat ip to 10.244.2.2:%(pod)d
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname { "eth0", "mesh0" } ip daddr 10.244.2.0/24 masquerade random,fully-random
    oifname { "eth0", "mesh0" } ip6 daddr fd00:2::/64 masquerade random,fully-random
  }
  chain forwarding {
    type filter hook forward priority 0;
    ct state invalid counter drop
  }
}
""" % {"node": NODE_PORT, "pod": POD_PORT}

# Both sides of a TCP connection that lives long: each sends a line every 10 ms and reads what comes.
TALK = """
import socket, sys, threading, time
def talk(connection, seconds):
    connection.settimeout(5)
    end, got = time.monotonic() + seconds, [0]
    def read():
        try:
            while True:
                data = connection.recv(65536)
                if not data:
                    return
                got[0] += len(data)
        except OSError as exc:
            got.append(exc)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    sent = 0
    while time.monotonic() < end and len(got) == 1:
        connection.sendall(b"0123456789")
        sent += 10
        time.sleep(0.01)
    return sent, got
"""
SERVER = TALK + """
def serve(connection):
    try:
        talk(connection, 3600)
    except OSError:
        pass
listener = socket.socket(socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen(64)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
CLIENT = TALK + """
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
print("ready", flush=True)
try:
    sent, got = talk(connection, float(sys.argv[3]))
    print("reset" if len(got) > 1 else "alive", sent, got[0], flush=True)
except OSError as exc:
    print("reset", exc, flush=True)
"""
# As much as goes, in small packets, over a few connections at once and in both directions.
FLOOD = """
import selectors, socket, sys, time
role, host, port, connections, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
selector, broken, got, block = selectors.DefaultSelector(), 0, 0, b"x" * 200
def add(connection):
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
if role == "server":
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(64)
    selector.register(listener, selectors.EVENT_READ)
else:
    listener = None
    for dummy in range(connections):
        add(socket.create_connection((host, port), timeout=5))
print("ready", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    for key, events in selector.select(0.2):
        if key.fileobj is listener:
            add(listener.accept()[0])
            continue
        try:
            if events & selectors.EVENT_READ:
                data = key.fileobj.recv(65536)
                got += len(data)
                if not data:
                    raise ConnectionResetError("end")
            if events & selectors.EVENT_WRITE:
                for dummy in range(4):
                    key.fileobj.send(block)
        except BlockingIOError:
            pass
        except OSError:
            broken += 1
            selector.unregister(key.fileobj)
            key.fileobj.close()
print("broken", broken, "got", got, flush=True)
"""
# The peer's pod: answers a UDP datagram with the port that it came from, and one on demand.
UDP_SERVER = """
import socket, sys, threading, time
peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
peer.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
def answer(address):
    for dummy in range(100):
        peer.sendto(str(address[1]).encode(), address)
        time.sleep(0.02)
while True:
    data, address = peer.recvfrom(2048)
    threading.Thread(target=answer, args=(address,), daemon=True).start()
"""

IN_NODE = """
import subprocess, time
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack, _conntrack_detour, _conntrack_guard, _nft_netlink
CIDRS = %r
def entries(family=2):
    client = _conntrack.Conntrack()
    try:
        return [entry for entry in client.dump(family)]
    finally:
        client.close()
def tcp_entries():
    return [entry for entry in entries() if entry["tcp"]]
def tables():
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
def ip(*words):
    subprocess.run(["ip"] + list(words), check=True)
def switch():
    ip("-4", "rule", "add", "priority", "400", "lookup", "51840")
    ip("-6", "rule", "add", "priority", "400", "lookup", "51840")
# Between delete and create there is time for packets, as on a busy machine.
def slowly(seconds):
    at_once = _conntrack.Conntrack.exchange
    def exchange(self, family, requests):
        if len(requests) < 3:
            return at_once(self, family, requests)
        codes, entry = [], None
        for request in requests:
            code, entry = at_once(self, family, [request])
            codes += code
            if len(codes) == 1 and len(requests) == 3:
                time.sleep(seconds)
        return codes, entry
    _conntrack.Conntrack.exchange = exchange
""" % (PEER_PODS,)


class Net:
    """pod and ext (a client outside) -- node == peer: by eth0, where routes lead first, and by mesh0, which table 51840 takes."""

    NAMES = ("pod", "ext", "node", "peer")

    def __init__(self):
        self.tag = "kmun-%d-%d-" % (os.getpid(), next(COUNTER))
        self.processes = []

    def __enter__(self):
        try:
            self._up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc):
        self.close()

    def _up(self):
        for name in self.NAMES:
            run("ip", "netns", "add", self.tag + name)
            self.ip(name, "link set lo up")
            for family in ("ipv4", "ipv6"):
                path = "net/ipv4/ip_forward" if family == "ipv4" else "net/ipv6/conf/all/forwarding"
                self.sh(name, "echo 1 > /proc/sys/%s" % path)
            self.sh(name, "for name in all default; do echo 0 > /proc/sys/net/ipv4/conf/$name/rp_filter; done")
        for here, device, there, other in (
                ("node", "cni0", "pod", "eth0"), ("node", "ext0", "ext", "eth0"), ("node", "eth0", "peer", "eth0"),
                ("node", "mesh0", "peer", "mesh0")):
            self.ip(here, "link add %s type veth peer name %s netns %s" % (device, other, self.tag + there), "link set %s up" % device)
            self.ip(there, "link set %s up" % other)
        self.ip("pod", "addr add 10.244.1.2/24 dev eth0", "addr add fd00:1::2/64 dev eth0 nodad", "route add default via 10.244.1.1",
                "route add default via fd00:1::1")
        self.ip("ext", "addr add 203.0.113.2/24 dev eth0")
        self.ip("node", "addr add 10.244.1.1/24 dev cni0", "addr add fd00:1::1/64 dev cni0 nodad", "addr add 203.0.113.1/24 dev ext0",
                "addr add 198.18.0.1/24 dev eth0", "addr add fd00:18::1/64 dev eth0 nodad", "addr add 198.18.0.1/32 dev mesh0",
                "addr add fd00:18::1/128 dev mesh0 nodad", "route add 10.244.2.0/24 via 198.18.0.2 dev eth0",
                "route add fd00:2::/64 via fd00:18::2 dev eth0", "route add 10.244.2.0/24 via 198.18.1.2 dev mesh0 onlink table 51840",
                "route add fd00:2::/64 via fd00:19::2 dev mesh0 onlink table 51840")
        self.ip("peer", "addr add 198.18.0.2/24 dev eth0", "addr add fd00:18::2/64 dev eth0 nodad", "addr add 198.18.1.2/24 dev mesh0",
                "addr add fd00:19::2/64 dev mesh0 nodad", "addr add 10.244.2.2/32 dev lo", "addr add fd00:2::2/128 dev lo")
        self.exec("node", "nft", "-f", "-", stdin=NODE_RULES)

    def ip(self, name, *lines):
        run("ip", "-n", self.tag + name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def exec(self, name, *argv, check=True, stdin=None):
        return run("ip", "netns", "exec", self.tag + name, *argv, check=check, stdin=stdin)

    def sh(self, name, script):
        return self.exec(name, "sh", "-c", script)

    def start(self, name, *argv):
        """Start a program; -> its process, whose stdout can be read as text."""
        process = subprocess.Popen(["ip", "netns", "exec", self.tag + name] + [str(word) for word in argv], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.processes.append(process)
        return process

    def python(self, name, script, *arguments):
        """Start a Python program that says when it is ready."""
        process = self.start(name, sys.executable, "-u", "-c", script, *arguments)
        assert process.stdout.readline().strip() == "ready"
        return process

    def in_node(self, script):
        """Run Python code in the node with the module under test; -> what it printed last, as a Python value."""
        paths = os.pathsep.join(path for path in sys.path if path)
        printed = run("ip", "netns", "exec", self.tag + "node", "env", "PYTHONPATH=" + paths, sys.executable, "-c", IN_NODE + script)
        return ast.literal_eval(printed.strip().splitlines()[-1]) if printed.strip() else None

    def node_port(self, port, pod_port):
        """One more port of the node that leads to the pod behind the peer."""
        self.exec("node", "nft", "add rule inet kmun prerouting iifname ext0 tcp dport %d dnat ip to 10.244.2.2:%d" % (port, pod_port))

    def switch_back(self):
        for family in ("-4", "-6"):
            self.exec("node", "ip", family, "rule", "del", "priority", "400", check=False)

    def received(self, name, device):
        return int(self.sh(name, "cat /sys/class/net/%s/statistics/rx_packets" % device))

    def resets(self, name):
        """Connections of a host that were reset while they were established."""
        names, values = self.sh(name, "grep ^Tcp: /proc/net/snmp").splitlines()
        return int(dict(zip(names.split(), values.split()))["EstabResets"])

    def invalid(self):
        """Packets that the node dropped as invalid."""
        return int(re.search(r"counter packets (\d+)", self.exec("node", "nft", "list", "chain", "inet", "kmun", "forwarding")).group(1))

    def stop(self, process):
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()
        self.processes.remove(process)

    def close(self):
        for process in list(self.processes):
            self.stop(process)
        for name in self.NAMES:
            run("ip", "netns", "del", self.tag + name, check=False)


@pytest.fixture(scope="module")
def lab():
    with Net() as net:
        net.python("peer", SERVER, PEER_POD["ipv4"], POD_PORT)
        yield net


@pytest.fixture
def net(lab):
    """The node as at the beginning: no connections, no rule."""
    lab.switch_back()
    # a request to delete that names no connection means all
    lab.in_node("_conntrack.Conntrack().exchange(0, [(_conntrack.IPCTNL_MSG_CT_DELETE, 0, b'')])")
    return lab


def masqueraded(net, family="ipv4", tcp=False):
    number = 2 if family == "ipv4" else 10
    return net.in_node("print([(entry['id'], entry['reply']) for entry in entries(%d) if bool(entry['tcp']) == %r])" % (number, tcp))


def move(net, carried):
    """The switch as the module routes does it, with or without carrying over; -> the result."""
    return net.in_node("print(_conntrack.carry_over(CIDRS, switch=switch))" if carried else "switch()")


# --- nothing lost, nothing reset ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("carried", [True, False])
def test_ping_that_is_masqueraded(net, family, carried):
    before = net.received("peer", "mesh0")
    ping = net.start("pod", "ping", "-q", "-n", "-i", "0.01", "-c", "250", PEER_POD[family])
    wait_for(lambda: masqueraded(net, family), "the connection of ping")
    old = masqueraded(net, family)
    result = move(net, carried)
    printed = ping.communicate(timeout=60)[0]
    sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", printed).groups())
    assert sent == 250 and net.received("peer", "mesh0") > before + 10, "nothing went the new way"
    if carried:
        assert received == sent
        assert result == dict(NOTHING, replaced=1, guarded=True, detoured=True)
        assert [reply for dummy, reply in masqueraded(net, family)] == [reply for dummy, reply in old], "same address, same identifier"
    else:
        assert received < sent, "the kernel drops one and forgets the connection: has it learnt to do better?"
    assert net.invalid() == 0


@pytest.mark.parametrize("carried", [True, False])
def test_tcp_through_a_node_port(net, carried):
    dropped, before = net.invalid(), net.received("peer", "mesh0")
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 3)
    old = masqueraded(net, tcp=True)
    assert len(old) == 1 and old[0][1]["dst"] == bytes([198, 18, 0, 1])
    result = move(net, carried)
    said = client.communicate(timeout=60)[0].split()
    if carried:
        assert said[0] == "alive" and int(said[2]) > 500
        assert net.received("peer", "mesh0") > before + 50, "nothing went the new way"
        assert result == dict(NOTHING, replaced=1, guarded=True, detoured=True)
        assert [reply for dummy, reply in masqueraded(net, tcp=True)] == [old[0][1]]
        assert net.invalid() == dropped
    else:
        assert said[0] == "reset", "with another source port the peer does not know it: has the kernel learnt to do better?"


def test_there_and_back_again(net):
    """Enable and disable in the lifetime of one connection."""
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 4)
    old = masqueraded(net, tcp=True)
    move(net, True)
    time.sleep(0.3)
    net.in_node("_conntrack.carry_over(CIDRS)")
    net.switch_back()
    assert client.communicate(timeout=60)[0].startswith("alive")
    assert [reply for dummy, reply in masqueraded(net, tcp=True)] == [old[0][1]]


def test_200_times_in_a_row_under_load(net):
    dropped, resets = net.invalid(), net.resets("ext")
    server = net.python("peer", FLOOD, "server", PEER_POD["ipv4"], POD_PORT + 1, 0, 3600)
    net.node_port(NODE_PORT + 1, POD_PORT + 1)
    client = net.python("ext", FLOOD, "client", "203.0.113.1", NODE_PORT + 1, 4, 3600)
    try:
        result = net.in_node(
            "import collections\n"
            "counts = collections.Counter()\n"
            "for dummy in range(200):\n"
            "    result = _conntrack.carry_over(CIDRS[:1], passes=1)\n"
            "    counts.update(rounds=1, replaced=result['replaced'], left=result['left'], guarded=result['guarded'])\n"
            "    assert not result['error'], result\n"
            "print(dict(counts))")
        alive = net.in_node("print(sum(1 for entry in tcp_entries() if entry['tcp']['state'] == 3))")
        resets = net.resets("ext") - resets
    finally:
        net.stop(client)
        net.stop(server)
    assert result == {"rounds": 200, "replaced": 800, "left": 0, "guarded": 200}
    assert (alive, resets, net.invalid()) == (4, 0, dropped)


# --- what may come in between ------------------------------------------------------------------------------------------------------------

NO_GUARD, NO_DETOUR = ("_conntrack.%s.start = lambda self: None\n" % name for name in ("Guard", "Detour"))


@pytest.mark.parametrize("without,alive", [("", True), (NO_GUARD, True), (NO_DETOUR, True), (NO_GUARD + NO_DETOUR, False)])
def test_tcp_between_delete_and_create(net, without, alive):
    """Detour and guard each keep a connection alive by itself."""
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 4)
    result = net.in_node("slowly(0.3)\n" + without + "print(_conntrack.carry_over(CIDRS, passes=1))")
    said = client.communicate(timeout=60)[0].split()
    assert (result["guarded"], result["detoured"]) == (NO_GUARD not in without, NO_DETOUR not in without)
    assert said[0] == ("alive" if alive else "reset")
    if alive:
        assert result["replaced"] == 1 and result["exposed"] == 0 and int(said[2]) > 500


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_ping_between_delete_and_create(net, family):
    """Its identifier tells whether a connection of its own was made meanwhile, which nothing shows at either end."""
    ping = net.start("pod", "ping", "-q", "-n", "-i", "0.005", "-c", "600", PEER_POD[family])
    wait_for(lambda: masqueraded(net, family), "the connection of ping")
    result, found = net.in_node("""
slowly(0.3)
at_once, found = _conntrack.Conntrack.exchange, []
def exchange(self, family, requests):
    found.extend(entries(%d))
    return at_once(self, family, requests)
_conntrack.Conntrack.exchange = exchange
print((_conntrack.carry_over(CIDRS, passes=1), found))
""" % (2 if family == "ipv4" else 10))
    assert " 0% packet loss" in ping.communicate(timeout=60)[0]
    assert result == dict(NOTHING, replaced=1, guarded=True, detoured=True)
    assert {one["zone"] for one in found} == {None, 51840} and len({one["reply"]["icmp"] for one in found}) == 1


@pytest.mark.parametrize("led", [True, False])
def test_udp_between_delete_and_create(net, led):
    """Answers in between make a connection of their own, which would swallow all that follow."""
    server = net.python("peer", UDP_SERVER, PEER_POD["ipv4"], POD_PORT)
    client = net.start("pod", sys.executable, "-u", "-c", (
        "import socket, time\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.connect(('10.244.2.2', %d))\n"
        "s.settimeout(5)\n"
        "s.send(b'x')\n"
        "ports, count = set(), 0\n"
        "end = time.monotonic() + 4\n"
        "try:\n"
        "    while time.monotonic() < end and count < 100:\n"
        "        ports.add(s.recv(100))\n"
        "        count += 1\n"
        "except socket.timeout:\n"
        "    pass\n"
        "print(len(ports), count)\n") % POD_PORT)
    wait_for(lambda: masqueraded(net), "the connection of UDP")
    old = masqueraded(net)
    script = "slowly(0.4)\n" + ("" if led else NO_DETOUR) + "print(_conntrack.carry_over(CIDRS, passes=1))"
    assert net.in_node(script)["replaced"] == 1
    # one port all the time, and all of the answers or what came before and behind the gap
    ports, answers = client.communicate(timeout=60)[0].split()
    net.stop(server)
    assert ports == "1" and (int(answers) == 100 if led else 50 < int(answers) < 100)
    assert [reply for dummy, reply in masqueraded(net)] == [old[0][1]]


# --- the detour --------------------------------------------------------------------------------------------------------------------------

def test_what_is_led_where(net):
    """The rules as nft reads them, and what they do: a packet is counted by the copy while it is led, and by the entry before and after."""
    net.exec("pod", "ping", "-q", "-n", "-c", "1", PEER_POD["ipv4"])
    shown, inside, copies = net.in_node("""
detour, client = _conntrack.Detour(), _conntrack.Conntrack()
detour.start()
(entry,) = entries()
assert client.copy(entry) and client.copy(entry), "also where one was left"
assert detour.lead([entry])
shown = subprocess.run(["nft", "list", "table", "inet", "kubemesh-detour"], capture_output=True, text=True).stdout
inside = [one["zone"] for one in entries()]
assert detour.release()
client.remove_copy(entry)
detour.stop()
print((shown, inside, [one["zone"] for one in entries()]))
""")
    assert sorted(inside, key=str) == [51840, None] and copies == [None]
    for line in ("\tmeta l4proto != icmp ip saddr . ip daddr . meta l4proto . th sport . th dport @ipv4 ct zone set 51840",
                 "\tip saddr . ip daddr . meta l4proto . icmp id . th sport @ipv4 ct zone set 51840",
                 "\tmeta l4proto != ipv6-icmp ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport @ipv6 ct zone set 51840",
                 "\tip6 saddr . ip6 daddr . meta l4proto . icmpv6 id . th sport @ipv6 ct zone set 51840",
                 "type ipv6_addr . ipv6_addr . inet_proto . inet_service . inet_service", "priority -399", "timeout 30s"):
        assert line in shown, shown
    assert shown.count("ct zone set") == 8
    assert "kubemesh" not in tables(net)


def test_a_detour_ends_with_its_process(net):
    """Killed while packets are led: they find their entry, which is there, and go on."""
    ping = net.start("pod", "ping", "-q", "-n", "-i", "0.002", "-c", "600", PEER_POD["ipv4"])
    wait_for(lambda: masqueraded(net), "the connection of ping")
    old = masqueraded(net)
    assert net.in_node("""
import os
detour, client = _conntrack.Detour(), _conntrack.Conntrack()
detour.start()
(entry,) = entries()
print(client.copy(entry) and detour.lead([entry]) and "kubemesh-detour" in tables(), flush=True)
time.sleep(0.2)
os._exit(0)
""")
    assert "kubemesh" not in tables(net)
    assert " 0% packet loss" in ping.communicate(timeout=60)[0]
    # the copy is left, ends by itself, and hinders nobody
    assert len(masqueraded(net)) == 2
    assert net.in_node("print(_conntrack.carry_over(CIDRS))") == dict(NOTHING, replaced=1, guarded=True, detoured=True)
    assert [reply for dummy, reply in masqueraded(net)] == [old[0][1]]


def test_what_an_older_kernel_keeps_of_a_detour_ends(net):
    """Without owner the table stays; its elements end before the copies do."""
    # Longer than all that is done meanwhile takes on a busy machine; what is led is looked at by the process that leads it.
    ping = net.start("pod", "ping", "-q", "-n", "-i", "0.01", "-c", "1000", PEER_POD["ipv4"])
    wait_for(lambda: masqueraded(net), "the connection of ping")
    zones = net.in_node("""
_nft_netlink.NFT_TABLE_F_OWNER, _conntrack_detour.LIFETIME = 0x80, 3
detour, client = _conntrack.Detour(), _conntrack.Conntrack()
detour.start()
(entry,) = entries()
assert client.copy(entry) and detour.lead([entry])
client.exchange(2, [(2, 0, _conntrack.delete_attributes(entry))])
print([one["zone"] for one in entries()])
""")
    assert "kubemesh-detour" in tables(net) and zones == [51840]
    assert " 0% packet loss" in ping.communicate(timeout=60)[0]
    assert {one["zone"] for one in net.in_node("print(entries())")} == {None, 51840}, "the packets are led no more"
    net.in_node("detour = _conntrack.Detour()\ndetour.start()\ndetour.stop()")
    assert "kubemesh" not in tables(net)


def test_an_end_that_is_led_around_is_told(net):
    """A connection that is closed while its packets find the copy must not stay established for days."""
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 4)
    before, after = net.in_node("""
at_once = _conntrack.Conntrack.replace
def replace(self, connection):
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and not any(one["zone"] == 51840 and one["tcp"]["state"] != 3 for one in tcp_entries()):
        time.sleep(0.1)
    return at_once(self, connection)
_conntrack.Conntrack.replace = replace
before = tcp_entries()
assert _conntrack.carry_over(CIDRS, passes=1)["replaced"] == 1
print([[(one["tcp"]["state"], one["timeout"]) for one in many] for many in (before, tcp_entries())])
""")
    client.wait(timeout=60)
    assert [state for state, dummy in before] == [3]
    assert [state != 3 and timeout <= 120 for state, timeout in after] == [True], after


def test_more_than_are_led_at_once(net):
    """Several rounds of the detour, both families, and none left."""
    result, left = net.in_node("""
_conntrack.CAPACITY = 4
import socket
for family, host in ((2, "10.244.2.2"), (10, "fd00:2::2")):
    for port in range(9):
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind(("10.244.1.1" if family == 2 else "fd00:1::1", 0))
            one.sendto(b"x", (host, 7000 + port))
result = _conntrack.carry_over(CIDRS, passes=1)
print((result, [one["zone"] for family in (2, 10) for one in entries(family)]))
""")
    assert result == dict(NOTHING, replaced=18, guarded=True, detoured=True)
    assert left == [None] * 18


def test_a_connection_that_ended_stays_ended(net):
    """Between the dump and the replacing it may go: nothing must come back from the dead, and live for five days."""
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 1)
    net.start("pod", "ping", "-q", "-n", "-c", "1", PEER_POD["ipv4"]).wait(timeout=20)
    wait_for(lambda: masqueraded(net), "the connection of ping")
    codes = net.in_node(
        "client = _conntrack.Conntrack()\n"
        "seen = entries()\n"
        "for entry in seen:\n"
        "    client.exchange(2, [(2, 0, _conntrack.delete_attributes(entry))])\n"
        "codes = [client.replace(seen[0])]\n"
        # and when it goes at the very last moment
        "_conntrack.Conntrack.get = lambda self, connection: connection\n"
        "codes += [client.replace(entry) for entry in seen if not entry['tcp']]\n"
        "print((codes, len([entry for entry in entries() if not entry['tcp']])))")
    client.wait(timeout=20)
    assert codes == ([(2, None), (2, None)], 0)


def test_the_state_of_the_moment_counts(net):
    """A connection that was established when it was read, and closed when it is replaced, is carried over as closed."""
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 4)
    state = net.in_node("seen = tcp_entries()\nwhile tcp_entries()[0]['tcp']['state'] == 3:\n    time.sleep(0.1)\n"
                        "client = _conntrack.Conntrack()\nprint((seen[0]['tcp']['state'], client.replace(seen[0])[0], "
                        "tcp_entries()[0]['tcp']['state'], tcp_entries()[0]['timeout'] < 1000))")
    client.wait(timeout=20)
    assert state[:2] == (3, 0) and state[2] != 3 and state[3]


def test_a_reset_is_valid_after_it(net):
    """A reset is judged by the highest acknowledgement seen; nothing of that may be made up. Sequence numbers begin anywhere."""
    dropped = net.invalid()
    server = net.python("peer", (
        "import socket, struct, sys\n"
        "listener = socket.socket()\n"
        "listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "listener.bind(('10.244.2.2', %d))\n"
        "listener.listen(64)\n"
        "print('ready')\n"
        "held = [listener.accept()[0] for dummy in range(12)]\n"
        "for one in held:\n"
        "    one.recv(100)\n"
        "    one.sendall(b'hello')\n"
        "import time\n"
        "time.sleep(%s)\n"
        "for one in held:\n"
        "    one.sendall(b'something that is acknowledged')\n"
        "time.sleep(0.5)\n"
        "for one in held:\n"
        "    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "    one.close()\n") % (POD_PORT + 2, 2.5))
    net.node_port(NODE_PORT + 2, POD_PORT + 2)
    client = net.python("ext", (
        "import socket\n"
        "held = [socket.create_connection(('203.0.113.1', %d), timeout=20) for dummy in range(12)]\n"
        "for one in held:\n"
        "    one.sendall(b'hello')\n"
        "for one in held:\n"
        "    one.recv(100)\n"
        "print('ready', flush=True)\n"
        "count = 0\n"
        "for one in held:\n"
        "    one.settimeout(5)\n"
        "    try:\n"
        "        while one.recv(100):\n"
        "            pass\n"
        "    except ConnectionResetError:\n"
        "        count += 1\n"
        "    except socket.timeout:\n"
        "        pass\n"
        "print(count)\n") % (NODE_PORT + 2))
    assert net.in_node("print(_conntrack.carry_over(CIDRS)['replaced'])") == 12
    said = client.communicate(timeout=90)[0].split()
    net.stop(server)
    assert said == ["12"] and net.invalid() == dropped


# --- what a connection has ---------------------------------------------------------------------------------------------------------------

def test_everything_that_can_be_kept_is_kept(net):
    """Mark, labels, helper, zones, both translations: the entry is the same, and the kernel's memory of the device is not in any dump."""
    net.exec("node", "nft", "-f", "-", stdin="""
table inet kmun_more {
  ct helper ftp { type "ftp" protocol tcp; }
  chain early {
    type filter hook prerouting priority -300;
    iifname cni0 ct original zone set 5
  }
  chain marks {
    type filter hook prerouting priority -150;
    iifname ext0 ct mark set 0x80
    iifname ext0 ct helper set "ftp"
  }
}
""")
    try:
        client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 2)
        ping = net.start("pod", "ping", "-q", "-n", "-i", "0.02", "-c", "60", PEER_POD["ipv4"])
        wait_for(lambda: net.in_node("print(len(entries()))") == 2, "both connections")
        before, result, after = net.in_node(
            "before = entries()\nresult = _conntrack.carry_over(CIDRS, passes=1)\nprint((before, result, entries()))")
        assert client.communicate(timeout=60)[0].startswith("alive")
        assert " 0% packet loss" in ping.communicate(timeout=60)[0]
    finally:
        net.exec("node", "nft", "delete", "table", "inet", "kmun_more")
    assert result["replaced"] == 2 and not result["error"]

    def kept(entries):
        # SYNPROXY's numbers are zero where there is none; what is said by whom differs
        return sorted([str([entry[key] for key in ("orig", "reply", "status", "mark", "zone", "labels")] + [
            entry["as_is"].get(_conntrack.CTA_HELP)]) for entry in entries])

    assert kept(after) == kept(before)
    tcp = next(entry for entry in after if entry["tcp"])
    assert tcp["mark"] == 0x80 and b"ftp" in tcp["as_is"][_conntrack.CTA_HELP]
    assert tcp["status"] & _conntrack.IPS_SRC_NAT and tcp["status"] & _conntrack.IPS_DST_NAT
    assert next(entry for entry in after if not entry["tcp"])["orig"]["zone"] == 5


def test_protocol_state_of_sctp_is_kept(net):
    printed = net.in_node("""
import struct
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import attribute, nested
def side(source, target, ports):
    return {"src": bytes(source), "dst": bytes(target), "proto": 132, "zone": None, "ports": ports}
pod, peer, node = [10, 244, 1, 2], [10, 244, 2, 2], [198, 18, 0, 1]
# CTA_PROTOINFO_SCTP: state ESTABLISHED, both verification tags
info = nested(3, attribute(1, b"\\x04"), attribute(2, struct.pack("!I", 0x11223344)), attribute(3, struct.pack("!I", 0x55667788)))
entry = {"family": 2, "orig": side(pod, peer, (4000, 5000)), "reply": side(peer, node, (5000, 6000)), "status": 0x1e, "timeout": 60,
         "mark": None, "zone": None, "labels": None, "id": None, "child": False, "tcp": None, "protoinfo": info, "as_is": {}}
client = _conntrack.Conntrack()
client.exchange(2, [(0, 0x600, _conntrack.create_attributes(entry))])
before = [one for one in entries() if one["orig"]["proto"] == 132]
result = _conntrack.carry_over(CIDRS, passes=1)
print((before, result, [one for one in entries() if one["orig"]["proto"] == 132]))
""")
    (before,), result, (after,) = printed
    assert result["replaced"] == 1 and not result["error"]
    assert before["protoinfo"] == after["protoinfo"] and b"\x11\x22\x33\x44" in after["protoinfo"]
    assert before["reply"] == after["reply"]


def test_others_are_left_alone(net):
    """Not masqueraded, or towards other addresses: not touched."""
    net.exec("node", "ping", "-q", "-n", "-c", "1", "198.18.0.2")
    net.exec("pod", "ping", "-q", "-n", "-c", "1", PEER_POD["ipv4"])
    result = net.in_node("before = entries()\nprint((len(before), _conntrack.carry_over(['10.244.3.0/24', 'fd00:3::/64']), "
                         "before == entries() or [e['id'] for e in before] == [e['id'] for e in entries()]))")
    assert result == (1, NOTHING, True)


# --- the guard ---------------------------------------------------------------------------------------------------------------------------

def tables(net):
    return net.exec("node", "nft", "list", "tables")


def test_no_guard_is_left(net):
    net.exec("pod", "ping", "-q", "-n", "-c", "1", PEER_POD["ipv4"])
    assert net.in_node("print(_conntrack.carry_over(CIDRS))")["guarded"]
    assert "kubemesh" not in tables(net)


def test_the_guard_ends_with_its_process(net):
    shown = net.in_node("import os\nguard = _conntrack_guard.Guard()\nguard.start()\nprint(repr(tables()), flush=True)\nos._exit(0)")
    assert "kubemesh-carry" in shown
    assert "kubemesh" not in tables(net)


def test_what_an_older_kernel_leaves_is_harmless_and_goes(net):
    """Without owner: the table stays when its process is killed, does nothing after its time, and the next guard takes it away."""
    assert net.in_node(
        "_nft_netlink.NFT_TABLE_F_OWNER = 0x80\n_conntrack_guard.LIFETIME = -1\n"
        "guard = _conntrack_guard.Guard()\nguard.start()\nprint(guard.active)") is True
    assert "kubemesh-carry" in tables(net)
    # a connection in the middle that nobody knows: dropped by a guard that is in force
    client = net.python("ext", CLIENT, "203.0.113.1", NODE_PORT, 2)
    net.in_node("slowly(0.3)\n" + NO_GUARD + NO_DETOUR + "_conntrack.carry_over(CIDRS, passes=1)")
    assert client.communicate(timeout=60)[0].startswith("reset")
    net.in_node("guard = _conntrack_guard.Guard()\nguard.start()\nguard.stop()")
    assert "kubemesh" not in tables(net)


def test_two_at_once(net):
    """A second run does not take the guard of the first away, and works without one."""
    assert net.in_node(
        "one, other = _conntrack_guard.Guard(), _conntrack_guard.Guard()\none.start()\nother.start()\nstates = [one.active, other.active]\n"
        "other.stop()\nstates.append('kubemesh-carry' in tables())\none.stop()\nprint(states)") == [True, False, True]
    assert "kubemesh" not in tables(net)
