# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Event-Driven Ansible on a cluster: what changes in the API is in the kernel of all nodes, nobody does anything, nothing is lost.

The tests go on from each other: one cluster, one ansible-rulebook.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("ansible_rulebook")

sys.path.insert(0, str(Path(__file__).resolve().parent))
import eda
import kube
from harness import INSTALLED_ANEW, Watched, assert_encrypted, info, keep_on_failure, made, text_of

JOINER = "node-4"


@pytest.fixture(scope="module")
def lab():
    found = made("eda", nodes=3, pods=1, rp_filter=1, masquerade=True)
    yield found
    if not keep_on_failure():
        found.down()


@pytest.fixture(scope="module")
def cluster(lab):
    with kube.Cluster(lab) as found:
        found.playbook("enable")
        yield found


@pytest.fixture(scope="module")
def engine(lab, cluster):
    with eda.Engine(lab, cluster) as found:
        # The event that comes after the start finds nothing to do.
        recap = found.until_as_api()
        assert set(recap) == {"node-1", "node-2", "node-3"} and not any(counts["changed"] for counts in recap.values())
        yield found
    for token in cluster.tokens.values():
        assert token not in found.rulebook.output


def others(lab):
    """Flows between those that stay."""
    return [flow for flow in Watched.all_flows(lab) if JOINER not in flow["source"] + flow["target"]]


def key(lab, node):
    return info(lab, node)["device"]["public_key"]


def test_a_node_that_joins_is_given_a_key_and_brought_in(lab, cluster, engine):
    with Watched(lab, flows=others(lab), streams=False):
        assert cluster.add_node() == JOINER
        recap = engine.until_as_api()
    assert JOINER in recap
    assert cluster.published()[JOINER] == {0: key(lab, JOINER)}
    assert_encrypted(lab)


def test_a_node_changes_its_pod_cidrs(lab, cluster, engine):
    """Others go on, and so does the node itself with what it keeps."""
    cidrs = cluster.api.get("nodes", JOINER)["spec"]["podCIDRs"]
    with Watched(lab):
        for changed in ([*cidrs, "10.245.4.0/24"], [*cidrs, "10.245.5.0/24"], cidrs):
            cluster.api.patch("nodes", JOINER, {"spec": {"podCIDRs": changed}})
            engine.until_as_api()


def test_another_machine_under_the_same_name(lab, cluster, engine):
    before = key(lab, JOINER)
    flows = others(lab)
    with Watched(lab, flows=flows, streams=False):
        text_of(lab, JOINER, INSTALLED_ANEW)
        node = cluster.node(JOINER)
        node["metadata"]["uid"] = str(uuid.uuid4())
        cluster.api.recreate("nodes", JOINER, obj=node)
        engine.until_as_api()
    assert key(lab, JOINER) != before
    assert cluster.published()[JOINER] == {0: key(lab, JOINER)}
    assert_encrypted(lab)


def test_a_node_that_leaves_is_forgotten(lab, cluster, engine):
    flows = others(lab)
    gone = key(lab, JOINER)
    with Watched(lab, flows=flows, streams=False):
        # Scaled down: the machine goes first.
        lab.cut(JOINER)
        cluster.api.delete("nodes", JOINER)
        engine.until_as_api(JOINER)
    assert gone not in text_of(lab, "node-1", "wg show all peers")
