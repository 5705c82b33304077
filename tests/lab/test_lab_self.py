# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab tests itself: what it reports as lost was lost, what it calls clear was clear, and nothing stays behind.

Needs root and Debian; about a minute once the base image exists. Run alone: pytest tests/lab/test_lab_self.py
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab as labs
import traffic

NAME = f"self{os.getpid()}"


# --- pure parts: no root needed ----------------------------------------------------------------------------------------------------


def test_checksum_is_that_of_rfc_1071():
    # The example of RFC 1071, section 3: the sum is ddf2.
    assert traffic.checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xddf2 & 0xffff


def ethernet(kind, payload):
    return bytes(12) + kind + payload


def test_frames_are_classified():
    ports = {51840}
    udp = struct.pack("!HHHH", 5, 51840, 9, 0) + b"\x04"
    ipv4 = b"\x45" + bytes(8) + b"\x11" + bytes(2) + bytes([198, 18, 0, 11]) + bytes([198, 18, 0, 12])
    assert traffic.classify(ethernet(b"\x08\x00", ipv4 + udp), ports) == ("wireguard", bytes([198, 18, 0, 11]), bytes([198, 18, 0, 12]), 4)
    assert traffic.classify(ethernet(b"\x08\x00", ipv4 + struct.pack("!HHHH", 5, 8472, 8, 0)), ports)[0] == "vxlan"
    ipv6 = b"\x60" + bytes(5) + b"\x3a\xff" + bytes(32)
    assert traffic.classify(ethernet(b"\x86\xdd", ipv6 + b"\x87" + bytes(8)), ports)[0] == "nd"
    assert traffic.classify(ethernet(b"\x86\xdd", ipv6 + b"\x80" + bytes(8)), ports)[0] == "icmp"
    assert traffic.classify(b"", ports)[0] == "other"


def test_marker_is_found_anywhere_and_only_whole():
    key = bytes(range(12))
    assert traffic.find_marker(b"xx" + key + struct.pack("!I", 7) + b"yy", key) == 7
    assert traffic.find_marker(b"xx" + key + b"\0\0", key) is None
    assert traffic.find_marker(b"xx" + key[:-1], key) is None


# --- a lab ---------------------------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")


@pytest.fixture(scope="module")
def lab():
    made = labs.Lab(NAME)
    made.down()
    try:
        made.up(nodes=3, pods=2, families="dual", dataplane="hostgw", nodeport=True, masquerade=True, rp_filter=1)
        yield made
    finally:
        made.down()


@needs_root
def test_nothing_is_lost_when_nothing_happens(lab):
    pings, streams, requests = traffic.start_pings(lab), traffic.start_streams(lab), traffic.start_requests(lab, interval=0.1)
    # How long it takes is the machine's affair; it goes on until everything below was seen often enough.
    deadline = time.monotonic() + 60
    while True:
        time.sleep(3)
        peeked, streamed, requested = pings.peek(), streams.peek(), requests.peek()
        if time.monotonic() > deadline or (
                all(flow["received"] >= 40 for flow in peeked["flows"]) and all(flow["received"] > 110_000 for flow in streamed["flows"])
                and requested["ok"] > 110 and all(entry["bytes"] > 110_000 for entry in requested["bulk"])):
            break
    reports = [tool.stop() for tool in (pings, streams, requests)]
    pinged, streamed, requested = reports
    assert len(pinged["flows"]) == 120
    assert all(flow["sent"] >= 40 for flow in pinged["flows"])
    assert (pinged["lost"], pinged["drops"], pinged["received"]) == (0, 0, pinged["sent"])
    assert 0 < peeked["received"] < pinged["received"]
    assert streamed["errors"] == 0 and streamed["wrong"] == 0
    assert all(flow["complete"] and flow["received"] > 100_000 for flow in streamed["flows"]), streamed["flows"]
    assert {(flow["family"], flow["mss"]) for flow in streamed["flows"]} == {("ipv4", 1448), ("ipv6", 1428)}
    assert requested["failed"] == requested["lasting_failed"] == requested["bulk_failed"] == 0
    assert requested["ok"] == requested["sent"] > 100
    assert all(entry["bytes"] > 100_000 for entry in requested["bulk"])


@needs_root
def test_sources_are_those_of_a_cluster(lab):
    """Pod to pod keeps the pod's address; pod to a remote host and NodePort show the node's: masquerade works."""
    pings, requests = traffic.start_pings(lab, kinds=("pod-pod", "pod-host")), traffic.start_requests(lab)
    time.sleep(2)
    pinged, requested = pings.stop(), requests.stop()
    for flow in pinged["flows"]:
        owner = flow["source"] if flow["kind"] == "pod-pod" else flow["source"].rpartition("-pod-")[0]
        assert set(flow["sources_seen"]) == {lab.addresses(owner)[flow["family"]]}, flow
    for flow in requested["flows"]:
        following = f"node-{lab.number(flow['target']) % 3 + 1}-pod-1"
        assert set(flow["pods"]) == {following}
        assert set(flow["sources_seen"]) == {flow["address"]}


@needs_root
def test_a_cut_node_shows_losses_and_only_there(lab):
    pings = traffic.start_pings(lab)
    time.sleep(1)
    lab.cut("node-2")
    cut_at = time.time()
    time.sleep(1)
    lab.heal("node-2")
    healed_at = time.time()
    time.sleep(3)
    report = pings.stop()
    for flow in report["flows"]:
        touched = flow["remote"] and 2 in (lab.number(flow["source"]), lab.number(flow["target"]))
        assert (flow["lost"] > 0) == touched, flow
        assert flow["lost"] + flow["received"] == flow["sent"]
        # A ping sent just before the cut may be on its way; neighbours that were given up are found again within a second.
        assert all(cut_at - 0.5 < stamp < healed_at + 1.5 for stamp in flow["lost_at"]), (cut_at, healed_at, flow)


@needs_root
def test_a_pulled_cable_takes_addresses_and_routes_and_they_come_back(lab):
    pings = traffic.start_pings(lab)
    lab.cut("node-2", carrier=True)
    deadline = time.monotonic() + 10
    while "198.18.0.12" in lab.exec("node-2", ["ip", "-br", "address"]).stdout and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "10.244.1.0" not in lab.exec("node-2", ["ip", "route"]).stdout
    lab.heal("node-2")
    time.sleep(2)
    middle = pings.peek()
    time.sleep(1)
    last = pings.stop()
    assert last["lost"] > 0
    before = {(flow["source"], flow["target"], flow["family"]): flow["received"] for flow in middle["flows"]}
    assert all(flow["received"] > before[flow["source"], flow["target"], flow["family"]] for flow in last["flows"])


@needs_root
def test_routes_that_networkd_deletes_come_back_by_themselves(lab):
    lab.exec("node-1", ["systemctl", "restart", "systemd-networkd"])
    time.sleep(1)
    after = lab.exec("node-1", ["ip", "route"]).stdout
    deadline = time.monotonic() + 30
    while "10.244.2.0/24" not in lab.exec("node-1", ["ip", "route"]).stdout:
        assert time.monotonic() < deadline, after
        time.sleep(0.2)


@needs_root
def test_sniffer_sees_what_is_clear(lab):
    sniffer, markers = traffic.start_sniffer(lab), traffic.start_markers(lab)
    time.sleep(2)
    sent, seen = markers.stop(), sniffer.stop()
    assert sent["received"] == sent["sent"] > 0
    assert seen["drops"] == 0 and seen["wireguard_frames"] == 0
    # Each frame once; TCP may join or repeat some.
    counts = {}
    for entry in seen["clear"]:
        counts[entry["source"], entry["target"], entry["family"], entry["class"]] = entry["count"]
    assert all(flow["remote"] for flow in markers.config["flows"]) and len(sent["flows"]) == 48
    for flow in sent["flows"]:
        key = (flow["source"], flow["target"], flow["family"])
        assert counts[(*key, "udp")] == flow["udp_sent"], key
        assert counts[(*key, "tcp")] > 0
    assert seen["frames"] >= seen["clear_frames"] > 0
    assert set(seen["frames_by_port"]) >= {"p-node-1", "p-node-2", "p-node-3"}


@needs_root
def test_sniffer_counts_wireguard_by_its_ports(lab):
    sniffer = traffic.start_sniffer(lab, ports=(40123,))
    lab.exec("node-1", ["python3", "-c", ("import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                        "for i in range(5): s.sendto(bytes([4, 0, 0, 0]), ('198.18.0.12', 40123))")])
    lab.exec("node-1", ["ping", "-c1", "-W1", "198.18.0.1"])
    time.sleep(0.3)
    seen = sniffer.stop()
    assert "br0" not in seen["frames_by_port"]  # what the fabric itself receives counts once, too
    assert seen["wireguard_frames"] == 5 and seen["wireguard_types"] == {"4": 5}
    assert seen["wireguard_pairs"] == {"198.18.0.11 198.18.0.12": 5}


@needs_root
def test_packets_that_the_machine_drops_are_counted(lab):
    lab.exec("node-1", ["python3", "-c", ("import socket; r = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); r.bind(('127.0.0.1', 0))\n"
                        "r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048); s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                                          "for i in range(100): s.sendto(bytes(1000), r.getsockname())")])
    assert lab.drops()["node-1"]["udp_receive_buffer"] > 50
    assert lab.drops()["node-3"]["udp_receive_buffer"] == 0


@needs_root
def test_nodes_are_what_the_tests_take_them_for(lab):
    for node in lab.nodes:
        number = lab.number(node)
        assert lab.exec(node, ["hostname"]).stdout.strip() == node
        assert lab.exec(node, ["systemctl", "is-system-running"]).stdout.strip() == "running"
        assert lab.exec(node, ["cat", "/proc/sys/net/ipv4/conf/all/rp_filter", "/proc/sys/net/ipv4/ip_forward",
                               "/proc/sys/net/ipv6/conf/all/forwarding"]).stdout.split() == ["1", "1", "1"]
        assert "eth0" in lab.exec(node, ["networkctl", "list", "--no-pager", "--no-legend"]).stdout
        assert "configured" in lab.exec(node, ["networkctl", "status", "eth0", "--no-pager", "-n0"]).stdout
        assert f"198.18.0.{10 + number}/24" in lab.exec(node, ["ip", "-br", "address"]).stdout
    assert lab.drops()["node-2"] == {"udp_receive_buffer": 0, "devices": {}}
    identities = {lab.exec(node, ["cat", "/etc/machine-id"]).stdout for node in lab.nodes}
    assert len(identities) == 3


@needs_root
def test_controller_reaches_nodes_by_ssh_and_nothing_else(lab):
    key = lab.state / "id_ed25519"
    said = lab.exec("ctl", ["ssh", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o",
                            "LogLevel=ERROR", "root@198.18.0.13", "hostname; command -v wg nft ip"]).stdout.split()
    assert said[0] == "node-3" and len(said) == 4
    assert lab.exec("ctl", ["ip", "route", "show", "default"]).stdout == ""
    inventory = lab.inventory().read_text()
    assert "node-3:" in inventory and "kube_control_plane" in inventory
    listed = json.loads(lab.nodes_file().read_text())
    assert [item["spec"]["podCIDRs"] for item in listed["items"]][1] == ["10.244.2.0/24", "fd00:10:244:2::/64"]


@needs_root
def test_reboot_is_a_real_one(lab):
    lab.exec("node-2", ["bash", "-ec", ("ip rule add pref 77 lookup 77; ip route add 203.0.113.0/24 dev eth0 table 77\n"
                        "nft add table inet left; ip link add left0 type bridge; touch /etc/stays /run/goes")])
    boot_id = lab.exec("node-2", ["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    lab.reboot("node-2")
    assert lab.exec("node-2", ["cat", "/proc/sys/kernel/random/boot_id"]).stdout != boot_id
    left = lab.exec("node-2", ["bash", "-c", "ip rule; ip route show table all; nft list tables; ip link; ls /run"]).stdout
    for word in ("lookup 77", "203.0.113.0", "inet left", "left0", "goes"):
        assert word not in left
    lab.exec("node-2", ["test", "-e", "/etc/stays"])
    log = lab.exec("node-2", ["cat", "/var/log/kubelet-start.log"]).stdout
    assert log.count("=== kubelet start") == 2 and log.count("=== end") == 2
    assert "eth0" in log and "--- wg show all peers" in log and "cni0" not in log
    # Pods and data plane are back.
    pings = traffic.start_pings(lab)
    time.sleep(2)
    report = pings.stop()
    assert report["lost"] == 0 < report["received"]


@needs_root
def test_pings_outlive_a_reboot_of_their_host(lab):
    pings = traffic.start_pings(lab)
    lab.reboot("node-3", hard=True)
    time.sleep(1.5)
    middle = pings.peek()
    time.sleep(1.5)
    report = pings.stop()
    assert report["lost"] > 0
    before = {(flow["source"], flow["target"], flow["family"]): flow["received"] for flow in middle["flows"]}
    for flow in report["flows"]:
        assert flow["received"] > before[flow["source"], flow["target"], flow["family"]], flow


@needs_root
def test_off_and_on(lab):
    lab.poweroff("node-3")
    status = lab.status()["nodes"]["node-3"]
    assert not status["running"] and not status["ready"]
    with pytest.raises(labs.LabError, match="poweron"):
        lab.exec("node-3", ["true"])
    assert lab.exec("node-1-pod-1", ["ping", "-c1", "-W1", "10.244.3.10"], check=False).returncode
    lab.poweron("node-3")
    lab.exec("node-1-pod-1", ["ping", "-c1", "-W2", "10.244.3.10"])


@needs_root
def test_added_node_is_reached_by_all(lab):
    assert lab.add_node() == "node-4"
    for source in ("node-1-pod-1", "node-3-pod-2", "node-2"):
        for address in lab.pod_addresses("node-4-pod-1").values():
            lab.exec(source, ["ping", "-c1", "-W2", address])
    assert len(json.loads(lab.nodes_file().read_text())["items"]) == 4
    assert "node-4:" in lab.inventory().read_text()
    requests = traffic.start_requests(lab, nodes=["node-3"])
    time.sleep(1)
    report = requests.stop()
    assert report["failed"] == 0 and set(report["flows"][0]["pods"]) == {"node-4-pod-1"}


@needs_root
def test_a_second_lab_beside_the_first_and_down_leaves_nothing(lab):
    other = labs.Lab(NAME + "-x")
    other.down()
    try:
        other.up(nodes=2, pods=1, families="ipv6", dataplane="vxlan", mtu=1400)
        members = other.members()
        assert len(members) > 10
        assert not set(members) & set(lab.members())
        pings = traffic.start_pings(other)
        streams = traffic.start_streams(other)
        time.sleep(1.5)
        report, streamed = pings.stop(), streams.stop()
        assert report["lost"] == 0 and {flow["family"] for flow in report["flows"]} == {"ipv6"}
        assert streamed["errors"] == 0 and all(flow["complete"] for flow in streamed["flows"])
        # 70 for VXLAN over IPv6, 60 for IPv6 and TCP, 12 for timestamps; the bridge of the node is no smaller than the pod's link.
        assert {flow["mss"] for flow in streamed["flows"]} == {1400 - 70 - 60 - 12}
        running = traffic.start_markers(other)
        assert other.noted_pid(f"traffic-{running.ident}")
    finally:
        other.down()
    assert not other.members() and not other.namespaces() and not other.state.exists()
    assert all(labs.start_time(pid) != started for pid, started in members.items())
    assert str(other.state) + "/" not in Path("/proc/self/mountinfo").read_text()
    assert not any(folder.parent.exists() for folder in other._cgroups("node-1"))
    other.down()  # again: nothing to do
    assert lab.exec("node-1", ["systemctl", "is-active", "ssh"]).stdout.strip() == "active"


@needs_root
def test_down_after_half_an_up(monkeypatch):
    broken = labs.Lab(NAME + "-y")
    monkeypatch.setattr(labs.Lab, "_write_inventory", lambda self: (dummy for dummy in ()).throw(labs.LabError("on purpose")))
    with pytest.raises(labs.LabError, match="on purpose"):
        broken.up(nodes=1)
    assert broken.namespaces()
    broken.down()
    assert not broken.members() and not broken.namespaces() and not broken.state.exists()
