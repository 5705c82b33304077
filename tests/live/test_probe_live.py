# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The probe against userspace WireGuard: three nodes, everything that can be wrong between them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import stat
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _probe

pytestmark = pytest.mark.skipif(bool(netlab.why_not()), reason="live tests: " + netlab.why_not())

PORT = 51840
MTU = 1420
HOSTS = ["a", "b", "c"]


class Mesh:
    """Three nodes with a device each that accepts the two others; no route goes through it."""

    def __init__(self, net, folder):
        self.net, self.folder = net, folder
        self.keys = {host: netlab.new_key() for host in net.hosts}
        self.document_file = folder / "mesh.json"
        self.write()
        self.devices = {host: net.userspace_device(host) for host in net.hosts}
        for host in net.hosts:
            self.configure(host)

    def write(self, **changes):
        nodes = {}
        for number, host in enumerate(self.net.hosts, 1):
            public = self.keys[host][1]
            nodes[host] = {
                "state": "member", "reason": "", "uid": "", "public_keys": {"0": public},
                "endpoints": {"ipv4": {"address": self.net.address(host), "port": None}},
                "pod_cidrs": ["10.244.%d.0/24" % number], "node_addresses": [self.net.address(host)],
                "probe_addresses": {"0": _mesh.probe_address(public)}, "mtu": None, "keepalive": 0}
            nodes[host].update(changes.get(host, {}))
        self.doc = _mesh.validate_document({
            "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": PORT, "1": PORT + 1}, "nodes": nodes})
        self.document_file.write_bytes(_mesh.document_bytes(self.doc))

    def configure(self, host):
        device = self.devices[host]
        lines = ["[Interface]", "PrivateKey = " + self.keys[host][0], "ListenPort = %d" % PORT]
        for key, peer in _mesh.peers_of(self.doc, host, 0).items():
            lines += ["[Peer]", "PublicKey = " + key, "Endpoint = " + peer["endpoint"], "AllowedIPs = " + ", ".join(peer["allowed_ips"])]
        self.net.exec(host, "wg", "setconf", device, "/dev/stdin", stdin="\n".join(lines) + "\n")
        self.net.ip(host, "addr flush dev %s" % device, *("addr add %s dev %s" % (address, device)
                                                          for address in _mesh.device_addresses(self.doc, host, 0)))
        self.net.ip(host, "link set %s mtu %d up" % (device, MTU))

    def probe(self, host, check=False, **arguments):
        arguments.setdefault("timeout", 15)
        return self.net.module(host, "probe", check=check, node=host, interface=self.devices[host], document_file=str(self.document_file),
                               proof_file=str(self.folder / ("proof-%s.json" % host)), **arguments)

    def proof(self, host):
        return json.loads((self.folder / ("proof-%s.json" % host)).read_text())

    def peer_off(self, host, peer):
        """Take a peer out of the device of a host, and with it the session."""
        self.net.exec(host, "wg", "set", self.devices[host], "peer", self.keys[peer][1], "remove")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    with netlab.Net(HOSTS) as net:
        yield Mesh(net, tmp_path_factory.mktemp("mesh"))


def reasons(result):
    return {item["name"]: item["reason"] for item in result["unproven"]}


def test_first_probe_of_all_nodes_at_once(mesh):
    """No session stands, all begin within moments: the first handshakes would cross."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = dict(zip(HOSTS, pool.map(mesh.probe, HOSTS)))
    for host, result in results.items():
        assert (result["proven_count"], result["unproven"], result["method"]) == (2, [], "echo"), result
        assert result["mtu"] == MTU and not result["changed"] and 0 < result["slowest_rtt"] < 5
        proof = mesh.proof(host)
        assert proof["node"] == host and proof["generation"] == 0
        for peer, entry in proof["peers"].items():
            assert entry["proven"] and entry["size"] == MTU and entry["public_key"] == mesh.keys[peer][1]
            assert entry["handshake_age"] <= 20
    mode = stat.S_IMODE(os.stat(str(mesh.folder / "proof-a.json")).st_mode)
    assert mode == 0o644
    assert _probe.proven_names(_probe.read_proof(str(mesh.folder / "proof-a.json")), mesh.doc, 0, time.time(), 60) == {"b", "c"}


def test_no_route_and_no_rule_was_there(mesh):
    routes = mesh.net.exec("a", "ip", "route", "show", "table", "all")
    assert "10.244." not in routes


def test_check_mode_probes_and_writes_nothing(mesh):
    path = mesh.folder / "proof-a.json"
    path.unlink()
    result = mesh.probe("a", check=True)
    assert result["proven_count"] == 2 and not result["changed"]
    assert not path.exists()
    result = mesh.net.module("a", "probe", check=True, node="a", interface="kmprnone0", document_file=str(mesh.document_file))
    assert "nothing was probed" in result["msg"] and result["peer_count"] == 2 and result["mtu"] is None
    result = mesh.net.module("a", "probe", node="a", interface="kmprnone0", document_file=str(mesh.document_file))
    assert result["failed"] and "kmprnone0" in result["msg"]


def test_only_some_peers_keeps_the_proof_of_others(mesh):
    mesh.probe("a")
    result = mesh.probe("a", peers=["b"], return_peers=True)
    assert result["peer_count"] == result["proven_count"] == 1 and list(result["peers"]) == ["b"]
    assert sorted(mesh.proof("a")["peers"]) == ["b", "c"]
    failed = mesh.probe("a", peers=["z"])
    assert failed["failed"] and "'z'" in failed["msg"]


def test_path_that_swallows_big_packets(mesh):
    """No "too big" comes back: 60 bytes of headers, so inner 1364 is what 1424 lets through; padded to 16 that is 1360."""
    mesh.net.nft("b", "chain input { type filter hook input priority 0; udp dport %d meta length > 1424 counter drop; }" % PORT)
    try:
        result = mesh.probe("a", return_peers=True)
    finally:
        mesh.net.nft("b")
    assert reasons(result) == {"b": "full_size_lost"}
    assert 1340 <= result["peers"]["b"]["size"] <= 1364
    assert "full 1420 bytes" in result["unproven"][0]["message"] and "lower mesh_mtu to %d" % result["peers"]["b"]["size"] in result["msg"]
    assert result["peers"]["c"]["proven"]
    assert not mesh.proof("a")["peers"]["b"]["proven"]
    assert mesh.probe("a", peers=["b"], full_size=False)["proven_count"] == 1


def test_mtu_of_the_peer_is_respected(mesh):
    """A peer with a smaller device is asked for no more than it can send back."""
    mesh.net.ip("b", "link set %s mtu 1300" % mesh.devices["b"])
    try:
        mesh.write(b={"mtu": 1300})
        result = mesh.probe("a", return_peers=True)
    finally:
        mesh.net.ip("b", "link set %s mtu %d" % (mesh.devices["b"], MTU))
        mesh.write()
    assert result["unproven"] == [] and result["peers"]["b"]["size"] == 1300 and result["peers"]["c"]["size"] == MTU


def test_firewall_before_the_port(mesh):
    mesh.peer_off("a", "c")
    mesh.configure("a")
    mesh.net.nft("c", "chain input { type filter hook input priority 0; udp dport %d counter drop; }" % PORT)
    try:
        result = mesh.probe("a", timeout=4)
        required = mesh.probe("a", timeout=4, require="all")
    finally:
        mesh.net.nft("c")
    assert reasons(result) == {"c": "no_handshake"}
    assert "198.18.7.3:51840" in result["unproven"][0]["message"] and "UDP port 51840" in result["msg"]
    assert required["failed"] and required["proven_count"] == 1 and "a to c: no handshake" in required["msg"]
    # and when the firewall is open again, the same run proves it; WireGuard tries again after 5 s
    assert mesh.probe("a")["proven_count"] == 2


def test_own_firewall_is_named(mesh):
    mesh.net.nft("a", "chain output { type filter hook output priority 0; meta l4proto ipv6-icmp drop; }")
    try:
        result = mesh.probe("a", timeout=2)
    finally:
        mesh.net.nft("a")
    assert set(reasons(result).values()) <= {"no_echo", "no_handshake"} and len(reasons(result)) == 2
    assert "Operation not permitted" in result["msg"]


def test_handshake_without_echo(mesh):
    mesh.probe("a")
    mesh.net.sysctl("b", "net/ipv6/icmp/echo_ignore_all", 1)
    try:
        result = mesh.probe("a", timeout=3)
    finally:
        mesh.net.sysctl("b", "net/ipv6/icmp/echo_ignore_all", 0)
    assert reasons(result) == {"b": "no_echo"}
    assert "echo_ignore_all" in result["msg"]


def test_peer_that_does_not_accept_us(mesh):
    """Accept before send: c does not know a."""
    mesh.peer_off("c", "a")
    mesh.peer_off("a", "c")
    try:
        mesh.configure("a")
        result = mesh.probe("a", timeout=4)
    finally:
        mesh.configure("c")
    assert reasons(result) == {"c": "no_handshake"}
    assert mesh.probe("a")["proven_count"] == 2


def test_device_without_the_peer(mesh):
    mesh.peer_off("a", "b")
    try:
        result = mesh.probe("a", timeout=2)
    finally:
        mesh.configure("a")
    assert reasons(result) == {"b": "not_configured"}


def test_peer_without_endpoint(mesh):
    mesh.peer_off("a", "b")
    mesh.net.exec("a", "wg", "set", mesh.devices["a"], "peer", mesh.keys["b"][1], "allowed-ips", "fe80::1/128")
    mesh.peer_off("b", "a")
    try:
        result = mesh.probe("a", timeout=2)
    finally:
        mesh.configure("a")
        mesh.configure("b")
    assert reasons(result) == {"b": "no_endpoint"}
    assert mesh.probe("a")["proven_count"] == 2


def test_device_with_another_key(mesh):
    private = mesh.net.exec("a", "wg", "genkey")
    mesh.net.exec("a", "wg", "set", mesh.devices["a"], "private-key", "/dev/stdin", stdin=private)
    try:
        result = mesh.probe("a", timeout=2)
    finally:
        mesh.configure("a")
    assert result["failed"] and mesh.keys["a"][1] in result["msg"] and "keypair" in result["msg"]


def test_device_without_probe_address(mesh):
    mesh.net.ip("a", "addr flush dev %s scope link" % mesh.devices["a"])
    try:
        result = mesh.probe("a", timeout=2)
    finally:
        mesh.configure("a")
    assert result["failed"] and "does not have its probe address" in result["msg"]


def test_handshake_only(mesh):
    mesh.peer_off("a", "b")
    mesh.configure("a")
    result = mesh.probe("a", method="handshake", return_peers=True)
    assert result["proven_count"] == 2 and result["method"] == "handshake" and "handshake only" in result["msg"]
    assert result["peers"]["b"]["rtt"] is None
    assert mesh.proof("a")["method"] == "handshake"


def test_no_ipv6_on_this_node(mesh):
    device = mesh.devices["a"]
    mesh.net.sysctl("a", "net/ipv6/conf/%s/disable_ipv6" % device, 1)
    mesh.net.nft("c", "chain input { type filter hook input priority 0; udp dport %d counter drop; }" % PORT)
    mesh.peer_off("a", "c")
    try:
        peers = _mesh.peers_of(mesh.doc, "a", 0)[mesh.keys["c"][1]]
        mesh.net.exec("a", "wg", "set", device, "peer", mesh.keys["c"][1], "endpoint", peers["endpoint"],
                      "allowed-ips", ",".join(peers["allowed_ips"]))
        result = mesh.probe("a", timeout=12)
    finally:
        mesh.net.nft("c")
        mesh.net.sysctl("a", "net/ipv6/conf/%s/disable_ipv6" % device, 0)
        mesh.configure("a")
    assert result["method"] == "handshake"
    assert reasons(result) == {"c": "no_handshake"} and result["proven_count"] == 1


ECHO_CODE = """
import json, random, socket, sys, time
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _probe
device, own, count, timeout = json.load(sys.stdin)
index = _probe.device(device)["index"]
addresses = [socket.inet_pton(socket.AF_INET6, "fe80::1:%x" % number) for number in range(1, count + 1)]
start = time.monotonic()
schedule = _probe.EchoSchedule([{"name": address.hex(), "address": address, "size": 1420, "late": False} for address in addresses], start,
                               random.Random(1))
with _probe.open_echo_socket(device, index, own) as handle:
    _probe.run_echo(handle, index, schedule, start + timeout)
print(json.dumps({"took": time.monotonic() - start, "cpu": time.process_time(),
                  "full": sum(1 for result in schedule.results().values() if result["size"] == 1420)}))
"""


def test_five_thousand_addresses(tmp_path):
    """The socket and its schedule at full scale, without WireGuard: the far end of a veth pair has 5,000 probe addresses."""
    count = 5000
    with netlab.Net(["x", "y"]) as net:
        # without ARP both sides send to their own hardware address, so give them the same
        net.ip(None, "link add v0 type veth peer name v1", "link set v0 netns %s" % net.ns("x"), "link set v1 netns %s" % net.ns("y"))
        for host, device in (("x", "v0"), ("y", "v1")):
            net.ip(host, "link set %s addrgenmode none" % device, "link set %s arp off mtu 1420 address 02:00:00:00:00:01" % device,
                   "link set %s up" % device)
        net.ip("x", "addr add fe80::2/64 dev v0 nodad")
        net.ip("y", *("addr add fe80::1:%x/64 dev v1 nodad noprefixroute" % number for number in range(1, count + 1)))
        net.ip("y", "route add fe80::/64 dev v1")
        output = net.exec("x", "env", "PYTHONPATH=" + os.pathsep.join(path for path in sys.path if path), sys.executable, "-c", ECHO_CODE,
                          stdin=json.dumps(["v0", "fe80::2", count, 15.0]))
    result = json.loads(output)
    print(result)
    assert result["full"] == count
