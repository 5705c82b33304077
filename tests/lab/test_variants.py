# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Enable, reboot and disable on other kinds of clusters, with the same traffic and the same verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Watched, assert_clear, assert_encrypted, differences, infos, keep_on_failure, made, playbook, traces

VARIANTS = {
    # name: options of the lab, source of the node list, arguments of the playbook, MTU that must come out (underlay less 60 over IPv4, 80
    # over IPv6)
    "vxlan-networkd": ({"dataplane": "vxlan", "mtu": 1400}, "inventory", ["-e", "mesh_persistence=systemd-networkd"], 1340),
    "ipv4": ({"families": "ipv4"}, "auto", [], 1440),
    "ipv6": ({"families": "ipv6"}, "file", [], 1420),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant(name):
    options, source, arguments, mtu = VARIANTS[name]
    # Two nodes: what differs is the kind of the cluster, not its size, and test_mesh.py has three.
    lab = made("v" + name[:4], nodes=2, pods=1, **options)
    if source == "file":
        arguments = [*arguments, "-e", "mesh_nodes_file=%s" % (lab.state / "nodes.json")]
    try:
        before = {node: traces(lab, node) for node in lab.nodes}
        assert_clear(lab)
        with Watched(lab):
            run = playbook(lab, "enable", *arguments, source=source)
        assert "nodes from %s: " % ("inventory" if source == "auto" else source) in run.text
        assert_encrypted(lab)
        assert {found["device"]["mtu"] for found in infos(lab).values()} == {mtu}
        if name == "vxlan-networkd":
            key = infos(lab)["node-2"]["device"]["public_key"]
            lab.reboot("node-2", wait=True)
            found = infos(lab)["node-2"]
            assert found["device"]["public_key"] == key and found["sending"]
            lab.exec("node-2", ["systemctl", "restart", "systemd-networkd"])
            assert_encrypted(lab)
            run = playbook(lab, "enable", *arguments)
            assert set(run.changed().values()) == {0}
        with Watched(lab):
            playbook(lab, "disable")
        for node in lab.nodes:
            # A reboot of its own changes mounts, links and what systemd notes of it.
            if not (node == "node-2" and name == "vxlan-networkd"):
                assert differences(before[node], traces(lab, node)) == []
    finally:
        if not keep_on_failure():
            lab.down()
