# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of one mesh on real hosts, step by step: each test goes on from the one before. Traffic runs through every step."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import (
    Watched,
    all_encrypted,
    assert_clear,
    assert_encrypted,
    differences,
    infos,
    keep_on_failure,
    made,
    playbook,
    text_of,
    traces,
    wire,
)


@pytest.fixture(scope="module")
def lab():
    """Three nodes as hostile as they come: strict reverse-path filtering, masqueraded pods, a NodePort that leads to another node."""
    found = made("mesh", nodes=3, pods=1, rp_filter=1, masquerade=True, nodeport=True)
    found.before = {node: traces(found, node) for node in found.nodes}
    yield found
    if not keep_on_failure():
        found.down()


def steps_of(text):
    """What a run changed or would change, by host: the lines of --diff, without keys and temporary names, which differ by nature."""
    text = re.sub(r"[A-Za-z0-9+/]{43}=", "KEY", text)
    text = re.sub(r"fe80::[0-9a-f:]+", "PROBE", text)
    text = text.replace('"public_key": null', '"public_key": "KEY"')
    return {line for line in text.splitlines() if line[:1] in "+-" and not line.startswith(("+++", "---"))}


def test_plain_before(lab):
    assert_clear(lab)


def test_check_on_a_fresh_cluster_changes_nothing_and_says_what_would(lab):
    run = playbook(lab, "enable", "--check", "--diff")
    lab.predicted = run
    assert all(number > 0 for number in run.changed().values())
    for node in lab.nodes:
        assert differences(lab.before[node], traces(lab, node)) == []


def test_enable_loses_nothing(lab):
    with Watched(lab):
        run = playbook(lab, "enable", "--diff")
    happened, predicted = steps_of(run.text), steps_of(lab.predicted.text)
    assert len(happened) > 50 and (sorted(happened - predicted), sorted(predicted - happened)) == ([], [])
    assert run.changed() == lab.predicted.changed()
    assert "3 of 3 nodes done" in run.text
    assert_encrypted(lab)


def test_status_shows_every_pair_encrypted(lab):
    run = playbook(lab, "status")
    assert run.text.count("2 encrypted") == 3
    assert all_encrypted(infos(lab))


def test_check_on_an_enabled_cluster_changes_nothing(lab):
    run = playbook(lab, "enable", "--check", "--diff")
    assert set(run.changed().values()) == {0}


def test_networkd_restart_keeps_rules_and_routes(lab):
    with Watched(lab):
        before = traces(lab, "node-2")
        lab.exec("node-2", ["systemctl", "restart", "systemd-networkd"])
        time.sleep(2)
        after = traces(lab, "node-2")
    assert before["rules"] == after["rules"]
    assert [line for line in before["routes"] if "wgmesh0" in line] == [line for line in after["routes"] if "wgmesh0" in line]


def test_reboot_brings_the_mesh_back_before_pods_start(lab):
    before = infos(lab)["node-3"]
    lab.reboot("node-3", wait=True)
    after = infos(lab)["node-3"]
    assert after["device"]["public_key"] == before["device"]["public_key"]
    assert after["device"]["addresses"] == before["device"]["addresses"]
    assert after["sending"]
    text = text_of(lab, "node-3", "cat /var/log/kubelet-start.log")
    # A boot is noted between a line that begins with "===" and "=== end".
    last = text.rpartition("=== end")[0].rpartition("=== ")[2]
    assert "wgmesh0" in last and "lookup 51840" in last, last
    time.sleep(2)
    playbook(lab, "status")
    assert all_encrypted(infos(lab))
    assert_encrypted(lab)
    # The second run, with all of its checks; test_an_unreachable_host_is_kept has one more, under traffic.
    run = playbook(lab, "enable")
    assert set(run.changed().values()) == {0}


def test_limit_removes_nothing(lab):
    with Watched(lab):
        run = playbook(lab, "enable", "--limit", "node-2", preflight=False)
    assert run.changed() == {"node-2": 0}
    assert all_encrypted(infos(lab))


def test_an_unreachable_host_is_kept(lab):
    lab.cut("node-3")
    playbook(lab, "enable", "-e", "mesh_probe_timeout=8", rc=4, preflight=False, env={"ANSIBLE_SSH_RETRIES": "0"})
    lab.heal("node-3")
    # Nothing of it was removed: no run is needed for its traffic to be encrypted again.
    assert all_encrypted(infos(lab))
    with Watched(lab):
        run = playbook(lab, "enable", preflight=False)
    assert set(run.changed().values()) == {0}


def test_disable_of_one_node_keeps_what_others_need(lab):
    with Watched(lab):
        playbook(lab, "disable", "--limit", "node-3")
    assert {node: found["sending"] for node, found in infos(lab).items()} == {"node-1": True, "node-2": True, "node-3": False}
    with Watched(lab):
        playbook(lab, "enable", preflight=False)


def test_disable_of_a_mesh_with_another_name_is_refused(lab):
    run = playbook(lab, "disable", "-e", "mesh_interface=foo", "-e", "mesh_table=7000", rc=2)
    assert "give this run mesh_interface=wgmesh" in run.text and "give this run mesh_table=51840" in run.text
    assert all_encrypted(infos(lab))


def test_disable_loses_nothing_and_leaves_no_trace(lab):
    with Watched(lab):
        playbook(lab, "disable")
    assert wire(lab)["clear_frames"] > 0
    # A reboot of its own changes what systemd notes of a boot, so node-3 is not compared.
    for node in ("node-1", "node-2"):
        assert differences(lab.before[node], traces(lab, node)) == []


def test_enable_again_with_one_more_node(lab):
    with Watched(lab):
        lab.add_node()
        playbook(lab, "enable", preflight=False)
    assert all_encrypted(infos(lab))
    assert_encrypted(lab)
