# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Strict mode: whatever happens to the mesh, no marked packet is ever seen on the underlay, in neither family. And one run at a time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import traffic
from harness import Watched, all_encrypted, infos, keep_on_failure, made, playbook, sniffed, text_of

STRICT = ["-e", "mesh_nodes_source=inventory", "-e", "mesh_strict=true", "-e", "mesh_encrypt=nodes"]


@pytest.fixture(scope="module")
def lab():
    found = made("strict", nodes=3, pods=1, rp_filter=1)
    yield found
    if not keep_on_failure():
        found.down()


def test_strict_mode_refuses_where_a_node_cannot_take_part(lab):
    run = playbook(lab, "enable", *STRICT, "-e", '{"mesh_exclude_nodes": ["node-3"]}', source=None, rc=2)
    assert "exchange everything in clear: node-3" in run.text and "mesh_exempt_nodes" in run.text
    assert set(run.changed().values()) == {0}
    assert not any(found["guard"]["present"] for found in infos(lab).values())


def test_it_is_switched_on_without_loss(lab):
    with Watched(lab):
        playbook(lab, "enable", *STRICT, source=None, preflight=False)
    found = infos(lab)
    assert all(info["guard"]["in_force"] and info["guard"]["at_boot"] and info["encrypts"] == "nodes" for info in found.values())
    run = playbook(lab, "enable", *STRICT, source=None, preflight=False)
    assert set(run.changed().values()) == {0}


def test_a_check_run_changes_nothing_and_raises_no_counter(lab):
    """Whoever watches the counters must not be alarmed by a look."""
    def counters():
        return [info["guard"]["counters"] for info in infos(lab).values()]

    before = counters()
    run = playbook(lab, "enable", *STRICT, "--check", source=None)
    assert set(run.changed().values()) == {0} and counters() == before


def test_what_is_taken_away_is_told(lab):
    run = playbook(lab, "enable", "-e", "mesh_nodes_source=inventory", "--check", source=None, preflight=False)
    assert "Strict mode is on now and will not be, as mesh_strict is false." in run.text
    assert "Node to node traffic is encrypted now and will not be, as mesh_encrypt is pods." in run.text
    assert "Preshared keys are in use" not in run.text


EXEMPT_CIDRS = ["-e", '{"mesh_exempt_cidrs": ["198.18.0.13/32", "fd00:18::d/128"]}']


def test_prefixes_are_exempted_and_brought_back_without_loss(lab):
    """In each direction there is a time in which some nodes send in clear and others do not."""
    told = playbook(lab, "enable", *STRICT, *EXEMPT_CIDRS, "--check", source=None, preflight=False)
    assert set(map(bool, told.changed().values())) == {True}
    with Watched(lab):
        run = playbook(lab, "enable", *STRICT, *EXEMPT_CIDRS, source=None, preflight=False)
    assert set(map(bool, run.changed().values())) == {True}
    spared = text_of(lab, "node-1", "nft list set inet kubemesh_guard exempt4; nft list set inet kubemesh_guard exempt6")
    assert "198.18.0.13" in spared and "fd00:18::d" in spared
    run = playbook(lab, "status", *EXEMPT_CIDRS, "-e", "mesh_require_encrypted=true")
    assert "in clear, as mesh_exempt_cidrs asks: 198.18.0.13/32" in run.text and "partial" not in run.text
    with Watched(lab):
        playbook(lab, "enable", *STRICT, source=None, preflight=False)
    assert "elements" not in text_of(lab, "node-1", "nft list set inet kubemesh_guard exempt4")
    assert all_encrypted(infos(lab)) and all(info["guard"]["in_force"] for info in infos(lab).values())


OUT = ["-e", "mesh_nodes_source=inventory", "-e", '{"mesh_exclude_nodes": ["node-3"]}']
EXEMPT_NODE = ["-e", '{"mesh_exempt_nodes": ["node-3"]}']


def test_a_node_leaves_and_comes_back_without_loss(lab):
    run = playbook(lab, "reconcile", *OUT, rc=2)
    assert "exchange everything in clear: node-3" in run.text and "mesh_exempt_nodes" in run.text
    assert set(run.changed().values()) == {0} and all_encrypted(infos(lab))
    with sniffed(lab, traffic.KINDS) as found, Watched(lab, streams=False):
        playbook(lab, "reconcile", *OUT, *EXEMPT_NODE)
        after = infos(lab)
        # as the guide on nodes says; it comes back as one that was never here
        playbook(lab, "disable", "--limit", "node-3", "-e", "mesh_publish_keys=false", "-e", '{"mesh_forget_nodes": ["node-1", "node-2"]}')
        left = text_of(lab, "node-3",
                       "find /etc/wireguard /etc/kubemesh /run/kubemesh -type f 2>/dev/null; ip -br link | grep wgmesh || true")
        playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory")
    assert left.strip() == "", left
    assert [after[node]["guard"]["in_force"] for node in lab.nodes] == [True, True, False]
    assert not after["node-3"]["sending"] and all(after[node]["encrypts"] == "nodes" for node in ("node-1", "node-2"))
    clear = [text for text in map(str, found["seen"]["clear"]) if "node-3" not in text]
    assert found["seen"]["clear_frames"] > 0 and clear == [], clear[:20]
    assert all_encrypted(infos(lab)) and all(info["guard"]["in_force"] for info in infos(lab).values())


def test_not_all_nodes_cannot_change_what_is_encrypted(lab):
    """A node that sends in clear what the others expect in the tunnel would be cut off from them."""
    with Watched(lab):
        run = playbook(lab, "enable", "-e", "mesh_nodes_source=inventory", "-e", "mesh_strict=true", "--limit", "node-2", source=None, rc=2)
    assert "mesh_encrypt would change from nodes to pods without these nodes" in run.text and "node-1, node-3" in run.text
    assert {info["encrypts"] for info in infos(lab).values()} == {"nodes"}


# What happens to nodes while markers are sent all the time, and seconds to look on afterwards.
BLOWS = [
    ("node-1", "systemctl stop kubemesh-userspace@wgmesh0", 2),
    ("node-2", "for f in -4 -6; do for p in 400 401 402; do ip $f rule del pref $p; done; done", 2),
    ("node-3", "wg set wgmesh0 peer $(wg show wgmesh0 peers | head -1) remove; ip route flush table 51840; ip route flush table 51841", 2),
    ("node-3", "systemctl restart systemd-networkd", 2),
    ("node-3", "systemctl stop kubemesh-routes kubemesh-guard; ip -6 route flush table 51840", 2),
    # From here on it is stopped at shutdown, which flushes all tables; the mesh is whole again before.
    ("node-2", "sh /etc/kubemesh/restore-routes; systemctl restart nftables", 2),
]


def test_nothing_leaks_whatever_happens(lab):
    with sniffed(lab, traffic.KINDS) as found:
        time.sleep(1)
        for node, blow, seconds in BLOWS:
            text_of(lab, node, blow)
            time.sleep(seconds)
        lab.reboot("node-2", wait=True)
        time.sleep(3)
    sent = found["sent"]
    assert sent["sent"] > 1000 and sent["received"] < sent["sent"], "the blows did cut connections"
    assert found["seen"]["clear_frames"] == 0, found["seen"]["clear"][:20]
    dropped = [found["guard"]["counters"] for found in infos(lab).values()]
    assert any(counters["out_pods"]["packets"] for counters in dropped) and any(counters["out_nodes"]["packets"] for counters in dropped)
    playbook(lab, "enable", *STRICT, source=None, preflight=False)
    assert all_encrypted(infos(lab))


def test_a_rotation_under_strict_mode(lab):
    with Watched(lab):
        playbook(lab, "rotate_keys", "-e", "mesh_nodes_source=inventory")
    assert all(info["guard"]["in_force"] and info["device"]["name"] == "wgmesh1" for info in infos(lab).values())


def test_the_second_of_two_runs_is_told_about_the_first(lab):
    first = lab.start_ansible_playbook(["kubemesh.wireguard.enable", *STRICT, "-e", "mesh_preflight=false"])
    try:
        deadline = time.monotonic() + 30
        while "enable" not in text_of(lab, "node-1", "cat /run/kubemesh/lock.json 2>/dev/null || true"):
            assert time.monotonic() < deadline, "the first run takes no lock"
            time.sleep(0.1)
        run = playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory", rc=2)
        assert "another run changes the mesh" in run.text and "running enable" in run.text
        assert set(run.changed().values()) == {0}
        assert first.wait(timeout=120) == 0
    finally:
        first.kill()
        first.wait()
    # One that waits is let in.
    first = lab.start_ansible_playbook(["kubemesh.wireguard.enable", *STRICT, "-e", "mesh_preflight=false"])
    try:
        time.sleep(4)
        playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory", "-e", "mesh_lock_wait=120")
        assert first.wait(timeout=120) == 0
    finally:
        first.kill()
        first.wait()


def test_disable_opens_the_guard_first(lab):
    run = playbook(lab, "disable", "--limit", "node-1", rc=2)
    assert "strict mode is on" in run.text and "node-2" in run.text
    with Watched(lab):
        playbook(lab, "disable")
    assert "kubemesh" not in text_of(lab, "node-1", "nft list tables; ls /etc /run; systemctl list-unit-files | grep kubemesh || true")
