# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The WireGuard client on real userspace devices: three nodes in network namespaces, wireguard-go in each.

Needs root, wireguard-go, wg and /dev/net/tun. Names begin with ``kmwg`` and the pid of the test run; nothing reaches the machine's own
network.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_uapi import UapiClient

MISSING = [tool for tool in ("ip", "ping", "wg", "wireguard-go") if not shutil.which(tool)]
WHY_NOT = ("not root" if os.geteuid() != 0 else "no /dev/net/tun" if not os.path.exists("/dev/net/tun")
           else "missing: " + ", ".join(MISSING) if MISSING else "")
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason="live tests: " + WHY_NOT)

PORT = 51840
PREFIX = "kmwg%d" % os.getpid()
# seconds; the first handshake of two nodes that both start one takes 5, and the machine may be busy
PATIENCE = 30


def run(*argv, check=True, data=None):
    done = subprocess.run(argv, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise RuntimeError("%s: %d: %s" % (" ".join(argv), done.returncode, done.stdout))
    return done.stdout


class Node:
    """A namespace with 198.18.9.N, a WireGuard device with 10.9.0.N and 10.9.N.1 to 10.9.N.3, and a key pair."""

    def __init__(self, number, folder, bridge):
        self.number = number
        self.namespace = "%s-%d" % (PREFIX, number)
        self.device = "k%dw%d" % (os.getpid(), number)  # sockets of all namespaces are in one directory; at most 15 characters
        self.client = UapiClient(wait=PATIENCE)
        self.key_file = str(folder / ("key%d" % number))
        key = run("wg", "genkey")
        with open(os.open(self.key_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
            handle.write(key)
        self.public_key = run("wg", "pubkey", data=key).strip()
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", "eth0", "netns", self.namespace, "type", "veth", "peer", "name", "p%d" % number, "netns", bridge)
        run("ip", "-n", bridge, "link", "set", "p%d" % number, "master", "br0", "up")
        for device, *addresses in (("lo",), ("eth0", "198.18.9.%d/24" % number)):
            for address in addresses:
                self.ip("addr", "add", address, "dev", device)
            self.ip("link", "set", device, "up")
        self.process = subprocess.Popen(["ip", "netns", "exec", self.namespace, "wireguard-go", "-f", self.device],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client.read(self.device)
        self.ip("addr", "add", "10.9.0.%d/16" % number, "dev", self.device)
        for last in (1, 2, 3):
            self.ip("addr", "add", "10.9.%d.%d/32" % (number, last), "dev", self.device)
        self.ip("link", "set", self.device, "up")

    def ip(self, *argv):
        return run("ip", "-n", self.namespace, *argv)

    def wanted(self, *others, **changes):
        peers = {other.public_key: {"endpoint": "198.18.9.%d:%d" % (other.number, PORT), "keepalive": 0, "allowed_ips": [
            "10.9.0.%d/32" % other.number] + ["10.9.%d.%d/32" % (other.number, last) for last in (1, 2, 3)]} for other in others}
        return dict({"public_key": self.public_key, "private_key_file": self.key_file, "listen_port": PORT, "fwmark": 0, "peers": peers,
                     "keep_unknown_peers": False}, **changes)

    def converge(self, wanted):
        """Plan, apply, read; nothing may be left to do. Returns (steps, state)."""
        files = {key: peer["preshared_key_file"] for key, peer in wanted["peers"].items() if peer.get("preshared_key_file")}
        before = self.client.read(self.device, files)
        steps = plan.plan_device(before, wanted)
        self.client.apply(self.device, steps)
        state = self.client.read(self.device, files)
        assert plan.plan_device(state, wanted) == []
        assert plan.device_as_text(state) == plan.device_as_text(plan.apply_steps(before, steps))
        return steps, state

    def ping(self, address, count, interval="0.002"):
        """(sent, received)."""
        out = run("ip", "netns", "exec", self.namespace, "ping", "-n", "-q", "-i", interval, "-c", str(count), "-W", "3", address,
                  check=False)
        return tuple(int(number) for number in re.search(r"(\d+) packets transmitted, (\d+) received", out).groups())

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)
        run("ip", "netns", "del", self.namespace, check=False)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    bridge = PREFIX + "-br"
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", bridge)
        stack.callback(run, "ip", "netns", "del", bridge, check=False)
        run("ip", "-n", bridge, "link", "add", "br0", "up", "type", "bridge")
        made = []
        for number in (1, 2, 3):
            node = Node(number, folder, bridge)
            stack.callback(node.close)
            made.append(node)
        yield made


@pytest.fixture
def mesh(nodes):
    """All three, each with both others as peers, and sessions between them."""
    for node in nodes:
        node.converge(node.wanted(*(other for other in nodes if other is not node)))
    for one in nodes:
        for other in nodes:
            if one is not other:
                assert wait_for(one, other)[1], (one.number, other.number)
    return nodes


def wait_for(one, other):
    """Ping until an answer comes: the first handshake may take its time."""
    end = time.monotonic() + PATIENCE
    while True:
        result = one.ping("10.9.0.%d" % other.number, 1)
        if result[1] or time.monotonic() > end:
            return result


def overload_drops(node):
    """Packets that this node dropped because its processes did not get the CPU in time: full socket buffers and device queues.

    wireguard-go has a receive buffer for about 300 of these packets and its device a queue of 500. What an allowed IP that is missing for a
    moment loses is in none of these counters.
    """
    # in the namespace: /proc/net follows it
    snmp = [line.split() for line in run("ip", "netns", "exec", node.namespace, "cat", "/proc/net/snmp", "/proc/net/snmp6").splitlines()]
    udp = dict(zip(*[line[1:] for line in snmp if line[0] == "Udp:"]))
    dropped = int(udp["RcvbufErrors"]) + sum(int(line[1]) for line in snmp if line[0] == "Udp6RcvbufErrors")
    for device in (node.device, "eth0"):
        stats = json.loads(node.ip("-s", "-j", "link", "show", device))[0]["stats64"]
        dropped += stats["rx"]["dropped"] + stats["tx"]["dropped"]
    return dropped


class Flood:
    """A ping flood from one node to another, while something else is done; all answers but those lost to overload must come."""

    def __init__(self, node, other, count):
        self.nodes = (node, other)
        self.count = count
        self.argv = ["ip", "netns", "exec", node.namespace, "ping", "-n", "-q", "-i", "0.003", "-c", str(count), "-W", "3",
                     "10.9.0.%d" % other.number]

    def __enter__(self):
        self.before = sum(overload_drops(node) for node in self.nodes)
        self.process = subprocess.Popen(self.argv, stdout=subprocess.PIPE, text=True)
        return self

    def running(self):
        return self.process.poll() is None

    def __exit__(self, kind, *exc):
        out, dummy = self.process.communicate(timeout=120)
        if kind is None:
            sent, received = (int(number) for number in re.search(r"(\d+) packets transmitted, (\d+) received", out).groups())
            overload = sum(overload_drops(node) for node in self.nodes) - self.before
            assert sent == self.count
            assert sent - received <= overload, "%d of %d lost, %d of them for want of CPU" % (sent - received, sent, overload)


def some_keys(count):
    return [base64.b64encode(os.urandom(32)).decode() for dummy in range(count)]


def test_what_is_programmed_is_what_wg_shows(nodes, tmp_path):
    node = nodes[0]
    preshared = tmp_path / "psk"
    preshared.write_text(run("wg", "genpsk"))
    preshared.chmod(0o600)
    one, two = some_keys(2)
    wanted = node.wanted(fwmark=0x1000)
    wanted["peers"] = {
        one: {"endpoint": "198.18.9.77:51840", "allowed_ips": ["10.8.1.0/24", "fe80::1234/128"], "keepalive": 0,
              "preshared_key_file": str(preshared)},
        two: {"endpoint": "[fd00::77]:51841", "allowed_ips": ["10.8.2.0/24"], "keepalive": 25}}
    node.converge(wanted)
    dummy, *lines = (line.split("\t") for line in run("wg", "show", node.device, "dump").splitlines())
    assert dummy[1:] == [node.public_key, str(PORT), "0x1000"]
    shown = {line[0]: line[1:] for line in lines}
    assert set(shown) == {one, two}
    assert shown[one][0] == preshared.read_text().strip()
    assert (shown[two][0], shown[two][1], shown[two][2], shown[two][6]) == ("(none)", "[fd00::77]:51841", "10.8.2.0/24", "25")
    assert set(shown[one][2].split(",")) == {"10.8.1.0/24", "fe80::1234/128"}
    # another preshared key in the file is a difference, and the only one
    preshared.write_text(run("wg", "genpsk"))
    steps, dummy = node.converge(wanted)
    assert steps == [{"op": "update_peer", "public_key": one, "preshared_key_file": str(preshared)}]
    # an allowed IP moves and the peer it came from goes
    wanted["peers"][two]["allowed_ips"].append("10.8.1.0/24")
    del wanted["peers"][one]
    steps, state = node.converge(wanted)
    assert [step["op"] for step in steps] == ["add_allowed_ips", "remove_peer"]
    assert state["peers"][two]["allowed_ips"] == ["10.8.1.0/24", "10.8.2.0/24"]


def test_five_hundred_peers(nodes):
    node = nodes[0]
    wanted = node.wanted()
    for number, key in enumerate(some_keys(500)):
        wanted["peers"][key] = {"endpoint": "198.18.9.77:51840", "keepalive": 0,
                                "allowed_ips": ["10.%d.%d.0/24" % (16 + number // 256, number % 256), "fd00:%x::/64" % (number + 1)]}
    node.converge(wanted)
    keys = sorted(wanted["peers"])
    for one, two in zip(keys[:100:2], keys[1:100:2]):
        wanted["peers"][one]["allowed_ips"], wanted["peers"][two]["allowed_ips"] = (
            wanted["peers"][two]["allowed_ips"], wanted["peers"][one]["allowed_ips"])
    for key in keys[100:200]:
        wanted["peers"][key]["allowed_ips"].pop()
    for key in keys[200:300]:
        del wanted["peers"][key]
    steps, state = node.converge(wanted)
    assert {step["op"] for step in steps} == {"add_allowed_ips", "remove_allowed_ips", "remove_peer"}
    assert len(state["peers"]) == 400


def test_a_peer_that_stays_keeps_its_session_while_others_change(mesh):
    node, other, dummy = mesh
    wanted = node.wanted(*mesh[1:])
    crowd = some_keys(200)
    before = node.client.read(node.device)["peers"][other.public_key]
    rounds = 0
    with Flood(node, other, 2000) as flood:
        while flood.running():
            for number, key in enumerate(crowd):
                wanted["peers"][key] = {"endpoint": "198.18.9.77:51840", "allowed_ips": ["10.10.%d.%d/32" % (rounds % 200, number)],
                                        "keepalive": 0}
            node.converge(wanted)
            for key in crowd:
                del wanted["peers"][key]
            node.converge(wanted)
            rounds += 1
    assert rounds > 0
    after = node.client.read(node.device)["peers"][other.public_key]
    assert after["last_handshake"] == before["last_handshake"]
    assert after["rx_bytes"] > before["rx_bytes"]


def test_single_allowed_ips_go_and_come_without_a_gap_for_the_others(mesh):
    node, other, dummy = mesh
    wanted = node.wanted(*mesh[1:])
    ips = wanted["peers"][other.public_key]["allowed_ips"]
    rounds = 0
    with Flood(node, other, 3000) as flood:
        while flood.running():
            wanted["peers"][other.public_key]["allowed_ips"] = ips[:1]
            steps, dummy = node.converge(wanted)
            assert [step["op"] for step in steps] == ["remove_allowed_ips"]
            wanted["peers"][other.public_key]["allowed_ips"] = ips
            node.converge(wanted)
            rounds += 1
    assert rounds > 0
    assert len(node.client.read(node.device)["peers"]) == 2  # nothing is left of the throw-away peers


def test_a_removed_allowed_ip_is_really_gone(mesh):
    node, other, dummy = mesh
    wanted = node.wanted(*mesh[1:])
    address = "10.9.%d.3" % other.number
    assert node.ping(address, 3) == (3, 3)
    wanted["peers"][other.public_key]["allowed_ips"].remove(address + "/32")
    node.converge(wanted)
    assert node.ping(address, 3)[1] == 0


def test_a_roamed_peer_is_left_where_it_is(mesh):
    node, other, dummy = mesh
    wanted = node.wanted(*mesh[1:])
    other.client.apply(other.device, [{"op": "set_device", "listen_port": PORT + 7}])
    assert wait_for(other, node)[1]
    state = node.client.read(node.device)
    assert state["peers"][other.public_key]["endpoint"] == "198.18.9.%d:%d" % (other.number, PORT + 7)
    assert plan.plan_device(state, wanted) == []
    # unless it is to be somewhere else than the last time
    previous = {other.public_key: "198.18.9.77:51840"}
    assert [step["op"] for step in plan.plan_device(state, wanted, previous)] == ["update_peer"]
    other.client.apply(other.device, [{"op": "set_device", "listen_port": PORT}])


def test_a_port_that_is_taken(nodes):
    node = nodes[0]
    program = ("import socket, time; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', %d)); "
               "print('ready', flush=True); time.sleep(60)" % (PORT + 9))
    holder = subprocess.Popen(["ip", "netns", "exec", node.namespace, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(WireGuardError, match="mesh_port") as caught:
            node.client.apply(node.device, [{"op": "set_device", "listen_port": PORT + 9}])
        assert caught.value.errno == errno.EADDRINUSE
    finally:
        holder.terminate()
        holder.wait(30)
        holder.stdout.close()
        node.client.apply(node.device, [{"op": "set_device", "listen_port": PORT}])


def test_the_transport_is_found_in_the_right_namespace(nodes):
    node, other, dummy = nodes
    program = ("from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg\n"
               "print(_wg.device_names(), _wg.client_for('%s').transport)\n"
               "_wg.client_for('%s')\n" % (node.device, other.device))
    out = run("ip", "netns", "exec", node.namespace, sys.executable, "-c", program, check=False)
    assert "['%s'] uapi" % node.device in out
    # the socket of the other one is in the same directory, but its device is not here
    assert re.search("device %s: .*ENODEV" % other.device, out)


def test_an_implementation_that_ended(nodes):
    node = nodes[2]
    node.process.terminate()
    node.process.wait(30)
    with pytest.raises(WireGuardError) as caught:
        UapiClient(wait=0.0).read(node.device)
    assert caught.value.errno == errno.ENODEV
    assert "start it" in str(caught.value)
