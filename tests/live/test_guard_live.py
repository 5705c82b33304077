# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard with the kernel's nftables: two nodes with pods, a host that is no node, and somebody who listens on the wire between them.

A packet carries a marker. Who listens sees it when the packet was on the wire in clear, in VXLAN too. After each packet that must not be
seen the same sender sends one that must, so that nothing is called dropped that is only late. The mesh device is a cable of its own: what
counts here is which device a packet takes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh

MISSING = [tool for tool in ("ip", "nft", "unshare", "ping") if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason="live tests: root and %s are needed" % (MISSING or "tools"))

PORT = 51840
MARK = 0x1000
FAMILIES = ("ipv4", "ipv6")
# On the wire, and no node.
NOBODY = {"ipv4": "198.18.7.200", "ipv6": "fd00:187::200"}
# So that closed ports answer nothing that would be counted.
QUIET = "chain out { type filter hook output priority 0; icmp type 3 icmp code 3 drop; icmpv6 type 1 icmpv6 code 4 drop; }"

# Runs the module in a host with files in a folder and a systemd that only remembers what is enabled.
RUN_GUARD = """
import json, os, sys
from ansible.module_utils import basic
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard, _system
folder, arguments = json.load(sys.stdin)
for name in ("GUARD_FILE", "GUARD_UNIT_FILE", "NFTABLES_DROPIN"):
    setattr(_guard, name, folder + getattr(_guard, name))
_guard.OWN_FOLDERS = [folder + path for path in _guard.OWN_FOLDERS]
real, enabled = _system.System.try_run, folder + "/enabled"
def try_run(self, argv, data=None):
    if argv[0] != "systemctl":
        return real(self, argv, data)
    if argv[1] == "enable":
        open(enabled, "w").close()
    elif argv[1] == "disable":
        os.unlink(enabled)
    return 0, "UnitFileState=enabled\\n" if os.path.exists(enabled) else "", ""
_system.System.try_run = try_run
if arguments is None:
    class Module:
        def get_bin_path(self, name, opt_dirs=None):
            return basic.get_bin_path(name, opt_dirs)
        def run_command(self, argv, data=None, environ_update=None):
            import subprocess
            done = subprocess.run(argv, input=data, capture_output=True, text=True)
            return done.returncode, done.stdout, done.stderr
    print(json.dumps(_guard.guard_status(_system.System(Module()))))
else:
    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
    basic._ANSIBLE_PROFILE = "legacy"
    from ansible_collections.kubemesh.wireguard.plugins.modules import guard
    guard.main()
"""

# Sends packets as JSON says, prints what became of them: "sent", the error, or "answered".
SEND = r"""
import errno, json, socket, struct, sys
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
for packet in json.load(sys.stdin):
    six = ":" in packet["to"]
    family = socket.AF_INET6 if six else socket.AF_INET
    data = packet["marker"].encode() + b"." * packet.get("size", 0)
    try:
        if packet.get("tcp"):
            with socket.create_connection((packet["to"], packet["port"]), 0.5):
                print("sent")
            continue
        if packet.get("quotes"):
            protocol, sport, dport = packet["quotes"]
            quoted = struct.pack("!BBHHHBBH", 0x45, 0, 100, 0, 0, 64, protocol, 0) + b"\x0a" * 8 if not six else (
                struct.pack("!IHBB", 6 << 28, 60, protocol, 64) + b"\xfd" * 32)
            quoted += struct.pack("!HHHH", sport, dport, 60, 0)
            # The kernel fills in the checksum of IPv6.
            head = lambda total: struct.pack("!BBHI", 2, 0, 0, 1400) if six else struct.pack("!BBHHH", 3, 4, total, 0, 1400)
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP) as each:
                each.sendto(head(checksum(head(0) + quoted)) + quoted, (packet["to"], 0))
        else:
            with socket.socket(family, socket.SOCK_DGRAM) as each:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, packet.get("mark", 0))
                if not six:
                    each.setsockopt(socket.IPPROTO_IP, 10, 0)
                each.bind(("", packet.get("sport", 0)))
                each.sendto(data, (packet["to"], packet["port"]))
                if packet.get("answer"):
                    each.settimeout(packet["answer"])
                    each.recv(65535)
                    print("answered")
                    continue
        print("sent")
    except OSError as exc:
        print(errno.errorcode.get(exc.errno, type(exc).__name__))
"""

NUMBERS = itertools.count(1)


class Lab:
    """Nodes a and b with two pods each, and a host x that is no node."""

    def __init__(self, net, folder):
        self.net, self.folder = net, folder
        self.pods = {}
        for number, host in enumerate("ab", 1):
            self.add_node(host, number)
        net.ip("x", "route add 10.244.0.0/16 via %s" % net.address("a"), "route add fd00:10:244::/48 via %s" % net.address("a", "ipv6"))
        # A cable of its own, named like the mesh device.
        net.ip("a", "link add wgmesh0 type veth peer name wgmesh0 netns %s" % net.ns("b"))
        for host in "ab":
            net.ip(host, "link set wgmesh0 up")
        self.ways("eth0")
        self.learn_neighbours()
        self.wire = netlab.Listener(net, net.fabric, "wire")
        self.at = {place: netlab.Listener(net, self.namespace(place), "udp", 7) for place in ("a", "b", "pod-a1", "pod-a2", "pod-b1")}

    def add_node(self, host, number):
        net = self.net
        for switch in ("ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"):
            net.sysctl(host, "net/" + switch, 1)
        for switch in ("all", "default", "eth0"):
            net.sysctl(host, "net/ipv4/conf/%s/rp_filter" % switch, 0)
            net.sysctl(host, "net/ipv4/conf/%s/send_redirects" % switch, 0)
        net.ip(host, "link add cni0 type bridge", "link set cni0 up", "addr add 10.244.%d.1/24 dev cni0" % number,
               "addr add fd00:10:244:%x::1/64 dev cni0 nodad" % number)
        for pod in (1, 2):
            name = "pod-%s%d" % (host, pod)
            self.pods[name] = {"ipv4": "10.244.%d.%d" % (number, 8 + pod), "ipv6": "fd00:10:244:%x::%x" % (number, 8 + pod)}
            net._namespace(net.ns(name))
            net.ip(host, "link add %s type veth peer name eth0 netns %s" % (name, net.ns(name)), "link set %s master cni0 up" % name)
            net.ip(name, "link set eth0 up", "addr add %s/24 dev eth0" % self.pods[name]["ipv4"],
                   "addr add %s/64 dev eth0 nodad" % self.pods[name]["ipv6"], "route add default via 10.244.%d.1" % number,
                   "route add default via fd00:10:244:%x::1" % number)

    def namespace(self, place):
        return self.net.ns(place)

    def address(self, place, family):
        return self.pods[place][family] if place in self.pods else self.net.address(place, family)

    def ways(self, device):
        """Send what goes to the other node's pods through a device."""
        for host, other in (("a", 2), ("b", 1)):
            via = {family: " via " + self.net.address("ab"[other - 1], family) if device == "eth0" else "" for family in FAMILIES}
            self.net.ip(host, "route replace 10.244.%d.0/24%s dev %s" % (other, via["ipv4"], device),
                        "route replace fd00:10:244:%x::/64%s dev %s" % (other, via["ipv6"], device))

    def learn_neighbours(self):
        """So that no packet of a test waits for an answer and is overtaken."""
        mac = {(host, device): json.loads(self.net.exec(host, "ip", "-j", "link", "show", device))[0]["address"]
               for host, device in (("a", "eth0"), ("b", "eth0"), ("x", "eth0"), ("a", "wgmesh0"), ("b", "wgmesh0"))}
        for host, others in (("a", "bx"), ("b", "ax"), ("x", "ab")):
            self.net.ip(host, *["neigh replace %s lladdr %s dev eth0 nud permanent" % (self.net.address(other, family), mac[other, "eth0"])
                                for other in others for family in FAMILIES])
            self.net.ip(host, *["neigh replace %s lladdr 02:00:00:00:00:99 dev eth0 nud permanent" % NOBODY[family] for family in FAMILIES])
        for host, other in (("a", "b"), ("b", "a")):
            targets = [self.net.address(other, family) for family in FAMILIES]
            targets += [address for pod in self.pods if pod[4] == other for address in self.pods[pod].values()]
            self.net.ip(host, *["neigh replace %s lladdr %s dev wgmesh0 nud permanent" % (address, mac[other, "wgmesh0"])
                                for address in targets])

    def document(self, **changes):
        nodes = {}
        for number, host in enumerate("ab", 1):
            key = chr(ord("A") + number) * 42 + "A="
            nodes[host] = dict({
                "state": "member", "reason": "", "uid": "", "public_keys": {"0": key}, "endpoints": {},
                "pod_cidrs": ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number],
                "node_addresses": [self.net.address(host, family) for family in FAMILIES],
                "probe_addresses": {"0": _mesh.probe_address(key)}, "mtu": None, "keepalive": 0}, **changes.get(host, {}))
        nodes.update({name: nodes_entry for name, nodes_entry in changes.items() if name not in "ab"})
        doc = {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": PORT, "1": PORT + 1}, "nodes": nodes}
        path = self.folder / "mesh.json"
        path.write_bytes(_mesh.document_bytes(_mesh.validate_document(doc)))
        return str(path)

    def module(self, host, arguments):
        folder = self.folder / ("files-" + host)
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace(host), sys.executable, "-c", RUN_GUARD], input=json.dumps([str(folder), arguments]),
            capture_output=True, text=True, timeout=120, check=False,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)))
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise RuntimeError("no result: %s%s" % (done.stdout, done.stderr)) from None

    def guard(self, host, check=False, **arguments):
        arguments.setdefault("node", host)
        if "document_file" not in arguments:
            arguments["document_file"] = self.document()
        result = self.module(host, dict(arguments, _ansible_check_mode=check, _ansible_diff=True))
        assert not result.get("failed"), result["msg"]
        return result

    def counters(self, host):
        items = json.loads(self.net.exec(host, "nft", "-j", "list", "counters", "table", "inet", "kubemesh_guard"))["nftables"]
        return {item["counter"]["name"]: item["counter"]["packets"] for item in items if "counter" in item}

    @contextlib.contextmanager
    def counted(self, host, **expected):
        before = self.counters(host)
        yield
        after = self.counters(host)
        assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == expected

    def too_big_heard(self, host, family):
        """Messages that a packet was too big, as the host counts them once they are past every rule."""
        if family == "ipv6":
            lines = dict(line.split() for line in self.net.exec(host, "cat", "/proc/net/snmp6").splitlines())
            return int(lines["Icmp6InPktTooBigs"])
        names, values = [line.split() for line in self.net.exec(host, "cat", "/proc/net/snmp").splitlines() if line.startswith("Icmp:")]
        return int(dict(zip(names, values))["InDestUnreachs"])

    def send(self, place, *packets):
        packets = [dict({"port": 7, "marker": ""}, **packet) for packet in packets]
        return self.net.exec(place, sys.executable, "-S", "-c", SEND, stdin=json.dumps(packets)).split()

    def passes(self, place, to, listener, **packet):
        """Whether a packet of a place is seen; behind it goes one to nobody's host, which always is."""
        marker, last = "<kmg-%d>" % next(NUMBERS), "<kmg-%d>" % next(NUMBERS)
        self.send(place, dict(packet, to=to, marker=marker), {"to": NOBODY["ipv6" if ":" in to else "ipv4"], "marker": last})
        assert self.wire.wait(last), "nothing is seen at all"
        if listener.wait(marker, 0.0):
            return True
        # Where it must come to is another host than where the last one was seen.
        return listener is not self.wire and listener.wait(marker, 0.3)

    def leaks(self, place, to, **packet):
        return self.passes(place, to, self.wire, **packet)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with netlab.Net(["a", "b", "x"]) as net:
        yield Lab(net, tmp_path_factory.mktemp("guard"))


@pytest.fixture
def lab(built):
    for host in "bx":
        built.net.nft(host, QUIET)
    yield built
    for host in "ab":
        built.net.exec(host, "nft", "flush", "ruleset")
        shutil.rmtree(str(built.folder / ("files-" + host)), ignore_errors=True)
    built.ways("eth0")


# --- what is on the wire -----------------------------------------------------------------------------------------------------------------

# from, to, the counter: host or pod to pod, pod to host
TO_PODS = [("a", "pod-b1"), ("pod-a1", "pod-b1"), ("pod-a1", "b")]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_to_pods_of_another_node_is_not_on_the_wire(lab, family):
    for source, target in TO_PODS:
        assert lab.leaks(source, lab.address(target, family)), "without a guard it is in clear"
    lab.guard("a")
    for source, target in TO_PODS:
        with lab.counted("a", out_pods=1):
            assert not lab.leaks(source, lab.address(target, family)), (source, target)
    assert lab.send("a", {"to": lab.address("pod-b1", family)}) == ["EPERM"], "whoever sends is told"
    assert lab.leaks("a", lab.address("b", family)), "node to node only with encrypt=nodes"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_from_pods_of_another_node_does_not_come_in(lab, family):
    arrivals = [("b", "pod-a1"), ("pod-b1", "pod-a1"), ("pod-b1", "a")]
    for source, target in arrivals:
        assert lab.passes(source, lab.address(target, family), lab.at[target])
    lab.guard("a")
    for source, target in arrivals:
        with lab.counted("a", in_pods=1):
            assert not lab.passes(source, lab.address(target, family), lab.at[target]), (source, target)
    assert lab.passes("b", lab.address("a", family), lab.at["a"])
    assert lab.passes("x", lab.address("pod-a1", family), lab.at["pod-a1"]), "from outside of the cluster"


@pytest.mark.parametrize("family", FAMILIES)
def test_node_to_node(lab, family):
    lab.guard("a", encrypt="nodes")
    with lab.counted("a", out_nodes=1):
        assert not lab.leaks("a", lab.address("b", family))
    with lab.counted("a", in_nodes=1):
        assert not lab.passes("b", lab.address("a", family), lab.at["a"])
    with lab.counted("a"):
        assert lab.passes("x", lab.address("a", family), lab.at["a"])
    with lab.counted("a", out_pods=1):
        assert not lab.leaks("pod-a1", lab.address("b", family))


@pytest.mark.parametrize("family", FAMILIES)
def test_through_the_mesh_everything_passes(lab, family):
    for host in "ab":
        lab.guard(host, encrypt="nodes")
    lab.ways("wgmesh0")
    # Answers need no way of their own: the other end is on the wire, and nothing of this goes there.
    for source, target in (("a", "pod-b1"), ("pod-a1", "pod-b1")):
        with lab.counted("a"), lab.counted("b"):
            assert lab.passes(source, lab.address(target, family), lab.at[target]), (source, target)
            assert not lab.leaks(source, lab.address(target, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_within_a_node_everything_passes(lab, family):
    lab.guard("a", encrypt="nodes")
    own = {"ipv4": "127.0.0.1", "ipv6": "::1"}[family]
    with lab.counted("a"):
        for source, target in (("pod-a1", "pod-a2"), ("a", "pod-a1"), ("pod-a1", "a"), ("a", "a")):
            assert lab.passes(source, lab.address(target, family), lab.at[target]), (source, target)
        assert lab.passes("a", own, lab.at["a"])


def test_the_packet_inside_counts(lab):
    """The node's own encapsulation (flannel.1, vxlan.calico) is no way out."""
    net = lab.net
    for host, other in (("a", "b"), ("b", "a")):
        net.ip(host, "link add overlay0 type vxlan id 1 dstport 8472 local %s remote %s dev eth0" % (net.address(host), net.address(other)),
               "link set overlay0 up")
    try:
        net.ip("b", "link set overlay0 address 02:00:00:00:00:02")
        net.ip("a", "neigh replace 10.244.2.9 lladdr 02:00:00:00:00:02 dev overlay0 nud permanent",
               "route replace 10.244.2.0/24 dev overlay0")
        assert lab.leaks("pod-a1", "10.244.2.9") and lab.leaks("a", "10.244.2.9")
        lab.guard("a")
        with lab.counted("a", out_pods=2):
            assert not lab.leaks("pod-a1", "10.244.2.9") and not lab.leaks("a", "10.244.2.9")
        lab.guard("a", state="absent")
        lab.guard("b")
        with lab.counted("b", in_pods=1):
            assert lab.leaks("pod-a1", "10.244.2.9"), "it is on the wire, and does not come in"
    finally:
        for host in "ab":
            net.ip(host, "link del overlay0")


def test_a_masqueraded_pod_is_still_a_pod(lab):
    """Source NAT comes after the guard."""
    lab.net.nft("a", "chain post { type nat hook postrouting priority 100; oifname eth0 masquerade; }")
    assert lab.leaks("pod-a1", lab.address("b", "ipv4"))
    lab.guard("a")
    with lab.counted("a", out_pods=1):
        assert not lab.leaks("pod-a1", lab.address("b", "ipv4"))


def test_a_node_port_is_traffic_between_nodes(lab):
    """Destination NAT comes after the guard."""
    lab.net.nft("a", "chain pre { type nat hook prerouting priority -100; udp dport 30080 dnat ip to 10.244.1.9:7; }")
    lab.guard("a")
    with lab.counted("a"):
        assert lab.passes("b", lab.address("a", "ipv4"), lab.at["pod-a1"], port=30080)
    lab.guard("a", encrypt="nodes", admin_ports=[7])
    with lab.counted("a", in_nodes=1):
        assert not lab.passes("b", lab.address("a", "ipv4"), lab.at["pod-a1"], port=30080)


# --- what may pass between nodes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_wireguards_own_packets(lab, family):
    there = lab.address("b", family)
    lab.guard("a", encrypt="nodes")
    with lab.counted("a"):
        assert lab.leaks("a", there, sport=PORT, port=PORT, mark=MARK)
        assert lab.leaks("a", there, sport=PORT + 1, port=60000, mark=MARK | 0x4000), "marks of others may be there as well"
    with lab.counted("a", out_nodes=3):
        assert not lab.leaks("a", there, sport=PORT, port=PORT), "without the mark"
        assert not lab.leaks("a", there, sport=PORT, port=PORT, mark=0x4000)
        assert not lab.leaks("a", there, sport=5353, port=60000, mark=MARK), "the mark alone is not enough"
    with contextlib.closing(netlab.Listener(lab.net, lab.namespace("a"), "udp", PORT)) as listener, lab.counted("a"):
        assert lab.passes("b", lab.address("a", family), listener, sport=PORT, port=PORT)
    with lab.counted("a", out_pods=1):
        assert not lab.leaks("a", lab.address("pod-b1", family), sport=PORT, port=PORT, mark=MARK), "never to a pod"


@pytest.mark.parametrize("size", [0, 3000])
def test_wireguards_packets_behind_a_masquerade_that_changes_their_port(lab, size):
    """Those with --random-fully do (ip-masq-agent, kindnet). The big ones come in fragments, of which only the first has a port."""
    packet = {"to": lab.address("b", "ipv4"), "sport": PORT, "port": PORT, "mark": MARK, "answer": 1.0, "size": size}
    lab.net.nft("a", "chain post { type nat hook postrouting priority 100; udp dport %d masquerade random,fully-random; }" % PORT)
    with contextlib.closing(netlab.Listener(lab.net, lab.namespace("b"), "echo", PORT)):
        for encrypt in ("pods", "nodes"):
            lab.guard("a", encrypt=encrypt)
            with lab.counted("a"):
                assert lab.send("a", dict(packet, marker="<kmg-%d>" % next(NUMBERS))) == ["answered"], encrypt


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_preflight_measures_with(lab, family):
    """From any port to one of WireGuard's, and back."""
    lab.guard("a", encrypt="nodes")
    packet = {"to": lab.address("b", family), "port": PORT + 1, "answer": 1.0}
    with contextlib.closing(netlab.Listener(lab.net, lab.namespace("b"), "echo", PORT + 1)):
        with lab.counted("a"):
            assert lab.send("a", dict(packet, marker="<kmg-%d>" % next(NUMBERS), mark=MARK)) == ["answered"]
        with lab.counted("a", out_nodes=1):
            assert lab.send("a", dict(packet, marker="<kmg-%d>" % next(NUMBERS))) == ["EPERM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_wireguards_packets_in_fragments(lab, family):
    """The way between the nodes may be narrower than anybody thought; only the first fragment has a port."""
    lab.guard("a", encrypt="nodes")
    packet = {"to": lab.address("a", family), "sport": PORT, "port": PORT, "answer": 1.0, "size": 3000}
    with contextlib.closing(netlab.Listener(lab.net, lab.namespace("a"), "echo", PORT)), lab.counted("a", out_nodes=1):
        # The answer has no mark, so that it is dropped: that it was sent says that the request came.
        assert lab.send("b", dict(packet, marker="<kmg-%d>" % next(NUMBERS))) == ["TimeoutError"]


def test_a_node_that_forwards_the_tunnel_of_others(lab):
    """A hypervisor or a router: its own mark is not on these packets."""
    net = lab.net
    net.ip("x", "addr add 198.18.7.77/32 dev lo")
    net.ip("a", "route add 198.18.7.77/32 via %s" % net.address("x"))
    net.ip("b", "route add 198.18.7.77/32 via %s" % net.address("a"))
    try:
        document = lab.document(y={
            "state": "member", "reason": "", "uid": "", "public_keys": {"0": "Y" * 42 + "A="}, "endpoints": {}, "pod_cidrs": [],
            "node_addresses": ["198.18.7.77"], "probe_addresses": {"0": _mesh.probe_address("Y" * 42 + "A=")}, "mtu": None, "keepalive": 0})
        lab.guard("a", encrypt="nodes", document_file=document)
        with contextlib.closing(netlab.Listener(lab.net, lab.namespace("x"), "udp", PORT, 7)) as far:
            with lab.counted("a"):
                assert lab.passes("b", "198.18.7.77", far, sport=PORT, port=PORT)
            with lab.counted("a", in_nodes=1):
                assert not lab.passes("b", "198.18.7.77", far)
    finally:
        net.ip("x", "addr del 198.18.7.77/32 dev lo")
        net.ip("a", "route del 198.18.7.77/32")
        net.ip("b", "route del 198.18.7.77/32")


def test_neighbours_are_found(lab):
    """Without neighbour discovery there is no tunnel over IPv6."""
    there, here = lab.address("b", "ipv6"), lab.address("a", "ipv6")
    for host in "ab":
        lab.guard(host, encrypt="nodes")
    lab.net.ip("a", "neigh del %s dev eth0" % there)
    lab.net.ip("b", "neigh del %s dev eth0" % here)
    try:
        with lab.counted("a"), lab.counted("b"):
            marker = "<kmg-%d>" % next(NUMBERS)
            lab.send("a", {"to": there, "sport": PORT, "port": PORT, "mark": MARK, "marker": marker})
            assert lab.wire.wait(marker)
    finally:
        lab.learn_neighbours()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_errors_about_the_tunnel_are_heard(lab, family):
    """"Too big" quotes the packet it is about."""
    lab.guard("a", encrypt="nodes")
    udp, tcp = 17, 6
    for spared, quotes in ((1, (udp, PORT, 60000)), (1, (udp, 60000, PORT + 1)), (0, (udp, 60000, 60000)), (0, (tcp, PORT, PORT))):
        heard = lab.too_big_heard("a", family)
        with lab.counted("a", **({} if spared else {"in_nodes": 1})):
            lab.send("b", {"to": lab.address("a", family), "quotes": quotes})
        assert lab.too_big_heard("a", family) == heard + spared
        with lab.counted("a", **({} if spared else {"out_nodes": 1})):
            lab.send("a", {"to": lab.address("b", family), "quotes": quotes})
    with lab.counted("a", out_nodes=1):
        lab.net.exec("a", "ping", "-c", "1", "-W", "1", lab.address("b", family), check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_is_administered_from_another(lab, family):
    server = (
        "import socket, time\n"
        "servers = [socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True) for port in (22, 2222)]\n"
        "time.sleep(60)")
    processes = [lab.net.start(host, sys.executable, "-c", server) for host in "ab"]
    try:
        netlab.wait_for(lambda: lab.send("a", {"to": lab.address("a", family), "port": 2222, "tcp": True}) == ["sent"], "the server")
        netlab.wait_for(lambda: lab.send("b", {"to": lab.address("b", family), "port": 2222, "tcp": True}) == ["sent"], "the server")
        lab.guard("a", encrypt="nodes")
        for here, there in (("a", "b"), ("b", "a")):
            assert lab.send(here, {"to": lab.address(there, family), "port": 22, "tcp": True}) == ["sent"]
            assert lab.send(here, {"to": lab.address(there, family), "port": 2222, "tcp": True}) != ["sent"]
        lab.guard("a", encrypt="nodes", admin_ports=[2222])
        assert lab.send("b", {"to": lab.address("a", family), "port": 2222, "tcp": True}) == ["sent"]
        assert lab.send("b", {"to": lab.address("a", family), "port": 22, "tcp": True}) != ["sent"]
    finally:
        for process in processes:
            process.terminate()


def test_elections_by_multicast_go_on(lab):
    lab.guard("a", encrypt="nodes")
    with lab.counted("a"):
        lab.net.ip("b", "route replace 224.0.0.0/4 dev eth0")
        marker = "<kmg-%d>" % next(NUMBERS)
        assert lab.send("b", {"to": "224.0.0.18", "marker": marker}) == ["sent"] and lab.wire.wait(marker)
        lab.net.exec("b", "ping", "-c", "1", "-W", "1", "-I", "eth0", "ff02::1", check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_exempt_prefixes_and_nodes(lab, family):
    """Either end: the nodes at both ends let it pass."""
    cidrs = [lab.address("b", family), {"ipv4": "10.244.1.8/30", "ipv6": "fd00:10:244:1::8/125"}[family]]
    for host in "ab":
        lab.guard(host, encrypt="nodes", exempt_cidrs=cidrs)
    with lab.counted("a"), lab.counted("b"):
        for source, target in (("a", "b"), ("b", "a"), ("pod-a1", "pod-b1"), ("pod-b1", "pod-a1"), ("pod-a1", "b")):
            assert lab.passes(source, lab.address(target, family), lab.at[target]), (source, target)
    with lab.counted("a", out_pods=1):
        assert not lab.leaks("a", lab.address("pod-b1", family))
    for host in "ab":
        lab.guard(host, encrypt="nodes", exempt_nodes=["b"])
    with lab.counted("a"), lab.counted("b"):
        for source, target in (("a", "b"), ("b", "a"), ("a", "pod-b1"), ("pod-b1", "pod-a1")):
            assert lab.passes(source, lab.address(target, family), lab.at[target]), (source, target)


def test_a_node_that_is_not_in_the_document_yet(lab):
    """With the cluster's pod networks it is guarded from its first packet."""
    lab.document()
    alone = json.loads((lab.folder / "mesh.json").read_text())
    del alone["nodes"]["b"]
    path = lab.folder / "alone.json"
    path.write_bytes(_mesh.document_bytes(alone))
    lab.guard("a", document_file=str(path))
    assert lab.leaks("pod-a1", lab.address("pod-b1", "ipv4")), "nobody knows that this is a pod"
    lab.guard("a", document_file=str(path), pod_networks=["10.244.0.0/16", "fd00:10:244::/48"])
    for family in FAMILIES:
        with lab.counted("a", out_pods=1):
            assert not lab.leaks("pod-a1", lab.address("pod-b1", family))
        with lab.counted("a", in_pods=1):
            assert not lab.passes("pod-b1", lab.address("pod-a1", family), lab.at["pod-a1"])
        with lab.counted("a"):
            assert lab.passes("pod-a1", lab.address("pod-a2", family), lab.at["pod-a2"])


# --- the module with a real nft -----------------------------------------------------------------------------------------------------------

def test_a_second_run_changes_nothing_and_absent_leaves_nothing(lab):
    for arguments in ({}, {"encrypt": "nodes", "exempt_cidrs": ["192.0.2.0/24", "192.0.3.0/24"]}, {"pod_networks": ["10.0.0.0/8"]}):
        expected = lab.guard("a", check=True, **arguments)
        result = lab.guard("a", **arguments)
        assert result["changed"] and result["steps"] == expected["steps"] and result["diff"] == expected["diff"]
        assert lab.guard("a", **arguments)["steps"] == []
    counters = lab.guard("a", pod_networks=["10.0.0.0/8"])["counters"]
    assert lab.module("a", None) == {
        "present": True, "in_force": True, "at_boot": True, "reason": "", "counters": counters, "exempt_cidrs": []}
    assert lab.guard("a", state="absent")["changed"] and not lab.guard("a", state="absent")["changed"]
    assert lab.net.exec("a", "nft", "list", "ruleset") == ""
    files = [name for dummy, dummy2, names in os.walk(str(lab.folder / "files-a")) for name in names]
    assert files == []


@pytest.mark.parametrize("command", [
    "flush ruleset", "flush table inet kubemesh_guard", "delete element inet kubemesh_guard pods4 { 10.244.2.0/24 }",
    "add element inet kubemesh_guard exempt4 { 10.244.2.0-10.244.2.9 }", 'add element inet kubemesh_guard links { "eth0" }',
    "insert rule inet kubemesh_guard leaving accept", "add table inet kubemesh_guard { flags dormant; }",
    "add chain inet kubemesh_guard leaving { policy drop; }", "add set inet kubemesh_guard more { type ipv4_addr; }"])
def test_drift_is_mended_and_counters_stay(lab, command):
    lab.guard("a")
    there = lab.address("pod-b1", "ipv4")
    assert not lab.leaks("a", there)
    lab.net.exec("a", "nft", command)
    status = lab.module("a", None)
    assert not status["in_force"] and status["reason"] and status["present"] == (command != "flush ruleset")
    result = lab.guard("a")
    assert result["changed"] and len(result["steps"]) == 1
    assert result["counters"]["out_pods"] == ({"packets": 0, "bytes": 0} if command == "flush ruleset" else status["counters"]["out_pods"])
    assert not lab.leaks("a", there) and not lab.guard("a")["changed"] and lab.module("a", None)["in_force"]


def test_tables_of_others_stay(lab):
    lab.net.nft("a", "chain post { type filter hook postrouting priority 0; }")
    before = lab.net.exec("a", "nft", "list", "table", "inet", "kmpr")
    lab.guard("a")
    lab.guard("a", encrypt="nodes")
    lab.guard("a", state="absent")
    assert lab.net.exec("a", "nft", "list", "ruleset") == before


def test_what_the_unit_loads_at_boot_is_the_guard(lab):
    lab.guard("a", encrypt="nodes")
    text = (lab.folder / "files-a/etc/systemd/system/kubemesh-guard.service").read_text()
    command = next(line for line in text.splitlines() if line.startswith("ExecStart=")).partition("=")[2].split()
    for state in ("flush ruleset", "list ruleset"):
        lab.net.exec("a", "nft", state)
        lab.net.exec("a", *command)
        assert lab.module("a", None)["in_force"]
    assert not lab.guard("a", encrypt="nodes")["changed"]
    assert not lab.leaks("a", lab.address("b", "ipv4"))


def test_no_packet_slips_through_while_it_is_changed(lab):
    """Rules and elements are replaced in the same instant."""
    lab.guard("a")
    marker = "<kmg-%d>" % next(NUMBERS)
    sender = lab.net.start("a", sys.executable, "-S", "-c", (
        "import socket, time\nend = time.monotonic() + 60\nv4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "v6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
        "while time.monotonic() < end:\n"
        "    for each, to in ((v4, %r), (v6, %r)):\n"
        "        try:\n            each.sendto(%r, (to, 7))\n        except PermissionError:\n            pass\n    time.sleep(0.0005)\n"
    ) % (lab.address("pod-b1", "ipv4"), lab.address("pod-b1", "ipv6"), marker.encode()))
    try:
        netlab.wait_for(lambda: lab.counters("a")["out_pods"] > 10, "the first packets")
        counted = []
        for arguments in ({"encrypt": "nodes"}, {"exempt_cidrs": ["192.0.2.0/24"]}, {"exempt_cidrs": [], "admin_ports": [22, 23]}, {}):
            result = lab.guard("a", **arguments)
            assert result["changed"]
            counted.append(result["counters"]["out_pods"]["packets"])
        assert sorted(set(counted)) == counted, "it goes on counting"
    finally:
        sender.terminate()
    assert marker not in lab.wire.seen
    assert lab.leaks("a", lab.net.address("x")), "somebody was listening"


def test_five_thousand_nodes(lab):
    """Sets, not rules: in seconds, of which most are Python's start and the document."""
    def member(number):
        return {"state": "pending", "reason": "", "uid": "", "public_keys": {}, "endpoints": {}, "probe_addresses": {}, "mtu": None,
                "keepalive": 0, "pod_cidrs": ["10.%d.%d.0/24" % divmod(number, 256), "fd00:11:%x::/64" % (number + 1)],
                "node_addresses": ["198.19.%d.%d" % divmod(number, 256), "2001:db8::%x" % (number + 1)]}

    many = {"n%d" % number: member(number) for number in range(5000)}
    begin = time.monotonic()
    result = lab.guard("a", encrypt="nodes", document_file=lab.document(**many))
    assert result["guarded_nodes"] == 5001 and len(json.dumps(dict(result, diff=[]))) < 10000
    del many["n77"]
    result = lab.guard("a", encrypt="nodes", document_file=lab.document(**many))
    assert [step for step in result["steps"] if "file" not in step] == [
        "remove node 198.19.0.77  # n77", "remove node 2001:db8::4e  # n77", "remove pods 10.0.77.0/24  # n77",
        "remove pods fd00:11:4e::/64  # n77"]
    assert not lab.guard("a", encrypt="nodes", document_file=lab.document(**many))["changed"]
    assert time.monotonic() - begin < 60
    assert not lab.leaks("a", lab.address("pod-b1", "ipv4"))
