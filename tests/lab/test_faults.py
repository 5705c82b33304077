# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that fail half way, batches that fail, devices and rules that somebody else touched: nobody is cut off, the next run mends it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Watched, all_encrypted, assert_encrypted, infos, keep_on_failure, made, playbook, states, text_of


@pytest.fixture(scope="module")
def lab():
    found = made("fault", nodes=3, pods=1)
    yield found
    if not keep_on_failure():
        found.down()


def test_a_host_that_fails_half_way_is_left_out_and_stays_connected(lab):
    # A file where the directory of the mesh document has to be.
    lab.exec("node-3", ["touch", "/etc/kubemesh"])
    with Watched(lab):
        run = playbook(lab, "enable", "-e", "mesh_probe_timeout=8", rc=2)
    assert "/etc/kubemesh" in run.text
    assert run.recap["node-3"]["failed"] == 1 and run.recap["node-1"]["failed"] == 0
    lab.exec("node-3", ["rm", "/etc/kubemesh"])
    found = states(infos(lab))
    for node, peer in (("node-1", "node-2"), ("node-2", "node-1")):
        # Its key is known, so what it sends is accepted; ours to it goes the way of the CNI.
        assert found[node] == {peer: "encrypted", "node-3": "accepting"}


def test_a_peer_that_does_not_answer_stops_the_run_before_traffic_moves(lab):
    playbook(lab, "disable")
    text_of(lab, "node-2", "nft add table inet wall && nft 'add chain inet wall in { type filter hook input priority 0; }' && "
                           "nft add rule inet wall in udp dport 51840 drop")
    with Watched(lab):
        run = playbook(lab, "enable", "-e", "mesh_probe_timeout=4", rc=2, preflight=False)
    assert "node-1 does not reach through the tunnel, of this run: node-2." in run.text
    assert "node-2 does not reach through the tunnel, of this run: node-1, node-3." in run.text
    assert [found["sending"] for found in infos(lab).values()] == [False] * 3
    assert [text_of(lab, node, "ls /run/kubemesh") for node in lab.nodes if "lock" in text_of(lab, node, "ls /run/kubemesh")] == []
    text_of(lab, "node-2", "nft delete table inet wall")


def test_a_batch_that_fails_is_withdrawn_and_the_run_stops(lab):
    # A rule of somebody else's that comes before ours and sends a part of the mesh elsewhere: a handshake would not show it.
    lab.exec("node-2", ["ip", "rule", "add", "priority", "100", "to", "10.244.3.0/24", "lookup", "main"])
    with Watched(lab):
        run = playbook(lab, "enable", "-e", "mesh_preflight=false", rc=2)
    assert "node-2" in run.text and "withdrawn" in run.text and "mesh_rule_priority" in run.text
    assert "1 of 3 nodes done" in run.text
    assert [found["sending"] for found in infos(lab).values()] == [True, False, False]
    lab.exec("node-2", ["ip", "rule", "del", "priority", "100"])
    with Watched(lab):
        playbook(lab, "enable")
    assert_encrypted(lab)


# Node by node, several at a time where they do not hide each other.
DAMAGES = {
    "node-1": ["ip link set dev wgmesh0 down", "ip -4 rule del priority 400", "wg set wgmesh0 listen-port 5555 fwmark 0"],
    "node-2": [
        "ip route flush table 51840", "wg set wgmesh0 peer $(wg show wgmesh0 peers | head -1) remove",
        "wg set wgmesh0 peer $(wg genkey | wg pubkey) allowed-ips 10.99.0.0/24"],
    "node-3": [
        "systemctl stop kubemesh-userspace@wgmesh0", "rm /etc/wireguard/wgmesh0.conf /etc/kubemesh/restore-routes",
        "systemctl disable wg-quick@wgmesh0"],
}


@pytest.mark.parametrize("nodes", [["node-1", "node-2"], ["node-3"]], ids=",".join)
def test_drift_is_mended_by_the_next_run(lab, nodes):
    for node in nodes:
        for command in DAMAGES[node]:
            lab.exec(node, ["sh", "-c", command])
    run = playbook(lab, "enable", preflight=False)
    assert {node for node, number in run.changed().items() if number} == set(nodes)
    assert all_encrypted(infos(lab))


def test_nothing_is_left_to_mend(lab):
    run = playbook(lab, "enable", preflight=False)
    assert set(run.changed().values()) == {0}
