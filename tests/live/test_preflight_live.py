# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The preflight between real network namespaces: ports that are closed or taken, ways that are narrower than they say."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _underlay

pytestmark = pytest.mark.skipif(bool(netlab.why_not()), reason="live tests: " + netlab.why_not())

HOSTS = ["a", "b", "c"]
PORT = 51840
NONCE = "of this test"


class Preflight:
    """Runs the module in hosts; the pid file of the responder is one for all, as there is one file system: so by hand, one per host."""

    def __init__(self, net, folder):
        self.net, self.folder = net, folder
        self.responders = {}

    def listen(self, host, ports=(PORT, PORT + 1)):
        """Start a responder as the module does, with a pid file of its own; -> its ports."""
        path = str(self.folder / ("%s.json" % host))
        code = ("import sys\n"
                "from ansible_collections.kubemesh.wireguard.plugins.module_utils import _underlay\n"
                "sockets, ports = _underlay.open_responder(%r, ['ipv4', 'ipv6'])\n"
                "sockets and _underlay.start_responder(sockets, _underlay.digest_of(%r), [p if p in ports else 0 for p in %r], 60, %r)\n"
                "print(ports)\n" % (list(ports), NONCE, list(ports), path))
        output = self.net.exec(host, "env", "PYTHONPATH=" + os.pathsep.join(one for one in sys.path if one), sys.executable, "-c", code)
        self.responders[host] = path
        return json.loads(output)

    def stop(self):
        for path in self.responders.values():
            _underlay.stop_responder(path)
        self.responders.clear()

    def ask(self, host, family="ipv4", check=False, **arguments):
        targets = [{"name": other, "address": self.net.address(other, family)} for other in self.net.hosts]
        if "targets_file" not in arguments:
            arguments.setdefault("targets", targets)
        arguments.setdefault("nonce", NONCE)
        return self.net.module(host, "preflight", check=check, node=host, local_checks=False, **arguments)


@pytest.fixture
def net():
    with netlab.Net(HOSTS) as found:
        yield found


@pytest.fixture
def preflight(net, tmp_path):
    runner = Preflight(net, tmp_path)
    yield runner
    runner.stop()


def texts(result):
    return [(item["level"], item["check"], item["message"]) for item in result["findings"]]


@pytest.mark.parametrize("family,mtu", [("ipv4", 1440), ("ipv6", 1420)])
def test_all_is_well(preflight, family, mtu):
    for host in HOSTS:
        assert preflight.listen(host) == [PORT, PORT + 1]
    result = preflight.ask("a", family)
    assert texts(result) == [] and not result["changed"]
    assert (result["target_count"], result["reached_count"], result["mesh_mtu"]) == (2, 2, mtu)
    assert result["path_mtus"][family]["mtu"] == 1500


@pytest.mark.parametrize("family,mtu", [("ipv4", 1340), ("ipv6", 1320)])
def test_way_that_swallows_what_is_above_1400(preflight, net, family, mtu):
    """No "too big" is sent back, as on the networks that lie about their MTU."""
    for host in HOSTS:
        preflight.listen(host)
    net.nft("b", "chain input { type filter hook input priority 0; meta length > 1400 counter drop; }")
    result = preflight.ask("a", family)
    assert texts(result) == []
    assert result["path_mtus"] == {family: {"mtu": 1400, "node": "b"}} and result["mesh_mtu"] == mtu
    result = preflight.ask("a", family, mtu=1420)
    assert [(level, check) for level, check, dummy in texts(result)] == [("error", "mtu")]
    assert "1420" in result["findings"][0]["message"] and "at most %d" % mtu in result["findings"][0]["remedy"]


def test_way_back_is_measured_too(preflight, net):
    """What b sends is cut at 1450, what it receives is not."""
    preflight.listen("b")
    net.nft("b", "chain output { type filter hook output priority 0; meta length > 1450 counter drop; }")
    result = preflight.ask("a", targets=[{"name": "b", "address": net.address("b")}])
    assert result["path_mtus"]["ipv4"]["mtu"] == 1450


def test_way_too_narrow_for_ipv6(preflight, net):
    preflight.listen("b")
    net.nft("b", "chain input { type filter hook input priority 0; meta length > 1300 drop; }")
    result = preflight.ask("a", targets=[{"name": "b", "address": net.address("b")}])
    assert [(level, check) for level, check, dummy in texts(result)] == [("error", "mtu")]
    assert "1300 bytes, which leaves 1240" in result["findings"][0]["message"] and "1340" in result["findings"][0]["remedy"]
    assert result["mesh_mtu"] == 1280


def test_router_that_says_too_big(preflight, net):
    """With "fragmentation needed" the search need not wait: b is behind a router whose far side carries 1400."""
    net.ip("c", "link add far type veth peer name eth1 netns %s" % net.ns("b"), "link set far mtu 1400 up",
           "addr add 198.18.8.1/24 dev far")
    net.sysctl("c", "net/ipv4/ip_forward", 1)
    net.ip("b", "link set eth1 mtu 1500 up", "addr add 198.18.8.2/24 dev eth1", "link set eth0 down", "route add default via 198.18.8.1")
    net.ip("a", "route add 198.18.8.0/24 via %s" % net.address("c"))
    preflight.listen("b")
    result = preflight.ask("a", targets=[{"name": "b", "address": "198.18.8.2"}])
    assert texts(result) == [] and result["path_mtus"]["ipv4"]["mtu"] == 1400


def test_ports_closed_by_a_firewall(preflight, net):
    for host in HOSTS:
        preflight.listen(host)
    net.nft("b", "chain input { type filter hook input priority 0; udp dport %d drop; }" % PORT)
    net.nft("c", "chain input { type filter hook input priority 0; udp dport %d drop; }" % (PORT + 1))
    result = preflight.ask("a")
    assert texts(result) == [("error", "reach", "no answer from b at 198.18.7.2, UDP port 51840"),
                             ("warning", "reach", "no answer from c at 198.18.7.3, UDP port 51841")]
    assert "51840 and 51841 in through the firewall of b" in result["findings"][0]["remedy"]
    assert result["mesh_mtu"] == 1440, "the open port is enough to measure"


def test_reject_and_own_firewall_are_told_apart_from_silence(preflight, net):
    for host in HOSTS:
        preflight.listen(host)
    net.nft("b", "chain input { type filter hook input priority 0; udp dport { 51840, 51841 } reject with icmpx type port-unreachable; }")
    net.nft("a", "chain output { type filter hook output priority 0; ip daddr 198.18.7.3 udp dport { 51840, 51841 } drop; }")
    result = preflight.ask("a")
    messages = [message for dummy, dummy2, message in texts(result)]
    assert messages == ["none of the 2 other nodes answers on UDP ports 51840 and 51841: b (198.18.7.2), c (198.18.7.3)"]
    preflight.net.nft("a")
    result = preflight.ask("a")
    assert [message for dummy, dummy2, message in texts(result)] == [
        "no answer from b at 198.18.7.2, UDP port 51840 and 51841 (Connection refused)"]
    net.nft("a", "chain output { type filter hook output priority 0; ip daddr 198.18.7.2 drop; }")
    net.nft("b")
    result = preflight.ask("a")
    assert [message for dummy, dummy2, message in texts(result)] == [
        "no answer from b at 198.18.7.2, UDP port 51840 and 51841 (sending failed: Operation not permitted)"]


def test_port_that_wireguard_already_has_is_not_judged(preflight, net):
    """The mesh is up on b: its first port is WireGuard's, the second one answers and says so."""
    device = net.userspace_device("b")
    net.exec("b", "wg", "set", device, "listen-port", PORT)
    net.ip("b", "link set %s up" % device)
    assert preflight.listen("b") == [PORT + 1]
    preflight.listen("c")
    result = preflight.ask("a")
    assert texts(result) == [] and result["reached_count"] == 2 and result["mesh_mtu"] == 1440


def test_nodes_without_responder_are_measured_by_icmp(preflight, net):
    preflight.listen("c")
    net.nft("b", "chain input { type filter hook input priority 0; meta length > 1400 drop; }")
    result = preflight.ask("a", not_listening=["b"])
    assert texts(result) == [] and result["path_mtus"]["ipv4"] == {"mtu": 1400, "node": "b"} and result["reached_count"] == 2
    # nobody listens at all
    result = preflight.ask("a", "ipv6", not_listening=["b", "c"])
    assert texts(result) == [] and result["path_mtus"]["ipv6"] == {"mtu": 1400, "node": "b"} and result["mesh_mtu"] == 1320
    # and one that answers neither
    net.sysctl("b", "net/ipv4/icmp_echo_ignore_all", 1)
    result = preflight.ask("a", not_listening=["b"])
    assert texts(result) == [] and result["reached_count"] == 1 and result["mesh_mtu"] == 1440


def test_check_mode_starts_nothing_and_measures(preflight, net):
    result = net.module("a", "preflight", check=True, node="a", local_checks=False, listen="start", nonce=NONCE)
    assert result["listener"] == {"running": False, "ports": []} and ":5184" not in net.exec("a", "ss", "-Hlun")
    result = preflight.ask("a", check=True)
    assert texts(result) == [] and result["reached_count"] == 2 and result["mesh_mtu"] == 1440


def test_node_that_is_off(preflight, net):
    for host in HOSTS:
        preflight.listen(host)
    net.ip("b", "link set eth0 down")
    result = preflight.ask("a")
    assert len(texts(result)) == 1 and texts(result)[0][:2] == ("error", "reach") and "b at 198.18.7.2" in texts(result)[0][2]


def test_answer_comes_from_the_address_that_was_asked(preflight, net):
    net.ip("b", "addr add 198.18.7.77/24 dev eth0")
    preflight.listen("b")
    result = preflight.ask("a", targets=[{"name": "b", "address": "198.18.7.77"}])
    assert texts(result) == [] and result["reached_count"] == 1


def test_marked_packets_do_not_take_the_tunnel(preflight, net):
    """With the mesh up and host encryption on, what is measured must be the way below the tunnel."""
    preflight.listen("b")
    net.ip("a", "link add wgfake type bridge", "link set wgfake mtu 1300 up", "route add %s dev wgfake table 51841" % net.address("b"),
           "rule add priority 402 not fwmark 0x1000/0x1000 lookup 51841")
    result = preflight.ask("a", targets=[{"name": "b", "address": net.address("b")}])
    assert texts(result) == [] and result["path_mtus"]["ipv4"]["mtu"] == 1500


def test_targets_from_a_file(preflight, net, tmp_path):
    preflight.listen("b")
    path = tmp_path / "targets.json"
    path.write_text(json.dumps([{"name": "a", "address": net.address("a")}, {"name": "b", "address": net.address("b")}]))
    result = preflight.ask("a", targets_file=str(path))
    assert result["target_count"] == result["reached_count"] == 1, result


# --- the node itself -----------------------------------------------------------------------------------------------------------------

def local(net, **arguments):
    result = net.module("a", "preflight", node="a", persistence="none", **arguments)
    assert "failed" not in result, result
    return [(item["level"], item["check"], item["message"]) for item in result["findings"] if item["check"] not in ("wireguard", "fips")]


def test_clean_node(net):
    assert local(net) == []


def test_port_taken_by_a_process(net):
    code = "import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', %d)); time.sleep(60)" % PORT
    process = net.start("a", sys.executable, "-c", code)
    netlab.wait_for(lambda: ":51840" in net.exec("a", "ss", "-Hlun"), "the socket")
    found = local(net)
    assert [item[:2] for item in found] == [("error", "port")] and found[0][2].startswith("UDP port 51840 is taken by python")
    assert process.poll() is None


def test_port_taken_by_another_wireguard_or_tunnel(net):
    device = net.userspace_device("a")
    net.exec("a", "wg", "set", device, "listen-port", PORT + 1)
    net.ip("a", "link set %s up" % device, "link add vx0 type vxlan id 7 dstport %d" % PORT, "link set vx0 up")
    assert local(net) == [("error", "port", "UDP port 51840 is taken by the vxlan device vx0"),
                          ("error", "port", "UDP port 51841 is taken by the WireGuard device %s" % device)]
    # the same device as the mesh's own
    assert [item for item in local(net, interface=device[:-1]) if item[1] == "port"] == [
        ("error", "port", "UDP port 51840 is taken by the vxlan device vx0")]


def test_device_tables_rules_and_marks_of_others(net):
    net.ip("a", "link add wgmesh0 type bridge", "route add 10.9.0.0/16 dev eth0 table 51841",
           "rule add priority 401 from 10.0.0.0/8 lookup 77",
           "rule add priority 50 from all lookup main", "rule add priority 9000 fwmark 0x1000/0x1000 lookup 78",
           "rule add priority 60 fwmark 0x4000/0x4000 lookup main")
    net.nft("a", "chain c { type filter hook output priority 0; ip daddr 10.0.0.1 meta mark set meta mark or 0x1000; }")
    assert local(net) == [
        ("error", "device", "device wgmesh0 is there and is no WireGuard device (bridge)"),
        ("error", "rules", "a rule before those of the mesh decides about its traffic: ip rule: priority 50 from all lookup 254"),
        ("error", "rules", "another rule has a priority of the mesh: ip rule: priority 401 from 10.0.0.0/8 lookup 77"),
        ("error", "tables", "table 51841 holds routes of others: 10.9.0.0/16 dev eth0"),
        ("warning", "mark", "the mark 0x1000 of the mesh is used by ip rule: priority 9000 from all fwmark 0x1000/0x1000 lookup 78"),
        ("warning", "mark",
         "the mark 0x1000 of the mesh is used by 1 firewall rules: 'ip daddr 10.0.0.1 meta mark set meta mark | 0x00001000'"),
    ]
    assert ("error", "mark") in [item[:2] for item in local(net, encrypt="nodes")]


def test_own_mesh_is_no_finding(net):
    net.ip("a", "link add km0 type bridge", "link set km0 name wgtest0 up")
    net.ip("a", "route add 10.244.2.0/24 dev wgtest0 table 51840", "route add unreachable 10.244.3.0/24 table 51840",
           "rule add priority 400 lookup 51840", "rule add priority 401 from 10.244.1.0/24 lookup 51841",
           "rule add priority 402 not fwmark 0x1000/0x1000 lookup 51841")
    found = local(net, interface="wgtest", encrypt="nodes")
    assert [item for item in found if item[1] != "device"] == []


def test_pods_and_addresses(net):
    net.ip("a", "link add cali0123abcd type bridge", "link set cali0123abcd up", "route add 10.244.9.7/32 dev cali0123abcd",
           "route add blackhole 10.244.64.0/26 proto 80")
    found = local(net, pod_cidrs=["10.244.1.0/24"], node_addresses=["198.18.7.1"])
    assert [item[:2] for item in found] == [("error", "pod CIDRs")]
    assert "10.244.9.7/32 (cali0123abcd)" in found[0][2] and "10.244.64.0/26 (a blackhole route)" in found[0][2]
    assert local(net, pod_cidrs=["10.244.0.0/16"], node_addresses=["198.18.7.1"]) == []
    found = local(net, node_addresses=["198.18.7.2"])
    assert found == [("error", "addresses", "none of the addresses 198.18.7.2 of the Node object is on this host")]


def test_data_path_of_cilium(net):
    net.ip("a", "link add cilium_host type bridge")
    result = net.module("a", "preflight", node="a", persistence="none", fail_on_error=True)
    assert result["failed"] and result["data_path"] == "Cilium" and "eBPF" in result["msg"] and "encryption.type=wireguard" in result["msg"]


def test_responder_of_the_module(net, tmp_path):
    """The module itself, with the pid file that nodes have; it must leave neither a child that the caller waits for, nor a trace."""
    targets = [{"name": "a", "address": net.address("a")}]
    if os.path.exists(_underlay.PID_FILE):
        pytest.skip("another preflight runs on this machine")
    started = time.monotonic()
    result = net.module("a", "preflight", node="a", local_checks=False, listen="start", nonce=NONCE, listen_seconds=60)
    try:
        assert result["listener"] == {"running": True, "ports": [PORT, PORT + 1]} and not result["changed"]
        assert time.monotonic() - started < 30, "it did not wait for the responder to end"
        # its own sockets are no finding
        assert local(net) == []
        asked = net.module("b", "preflight", node="b", local_checks=False, nonce=NONCE, targets=targets)
        assert asked["reached_count"] == 1 and asked["mesh_mtu"] == 1440
        again = net.module("a", "preflight", node="a", local_checks=False, listen="start", nonce="another", listen_seconds=60)
        assert again["listener"]["ports"] == [PORT, PORT + 1]
        asked = net.module("b", "preflight", node="b", local_checks=False, nonce=NONCE, targets=targets)
        assert asked["reached_count"] == 0, "the nonce of the last run is worth nothing"
    finally:
        result = net.module("a", "preflight", node="a", local_checks=False, listen="stop")
    assert result["listener"] == {"running": False, "ports": []}
    assert not os.path.exists(_underlay.PID_FILE) and ":5184" not in net.exec("a", "ss", "-Hlun")


def test_packets_that_are_no_questions_get_no_answer(preflight, net):
    """From outside: a scan, a replay of an answer, a question of another run; and no answer is longer than its question."""
    preflight.listen("b")
    digest = _underlay.digest_of(NONCE)
    good = _underlay.question(digest, 1, "ipv4", 200)
    other_run = _underlay.question(_underlay.digest_of("x"), 1, "ipv4", 200)
    packets = [b"", b"x" * 1000, other_run, _underlay.answer_to(good, digest, (1, 2)), good]
    code = ("import json, socket, sys\n"
            "out = []\n"
            "for text in json.load(sys.stdin):\n"
            "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1.0)\n"
            "    s.sendto(bytes.fromhex(text), (%r, %d))\n"
            "    try:\n"
            "        out.append(len(s.recv(65536)))\n"
            "    except socket.timeout:\n"
            "        out.append(None)\n"
            "print(json.dumps(out))\n" % (net.address("b"), PORT))
    output = net.exec("a", sys.executable, "-c", code, stdin=json.dumps([packet.hex() for packet in packets]))
    assert json.loads(output) == [None, None, None, None, len(good)]
