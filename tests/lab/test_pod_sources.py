# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A network without pod CIDRs on real hosts: pods' own addresses, both families, from an API server, playbooks and agents together.

Each test goes on from the one before. One pod is not known to the API at first.
"""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kube
from harness import Watched, all_encrypted, assert_encrypted, differences, infos, keep_on_failure, made, text_of, traces, wire

KINDS = ("pod-pod", "host-pod", "pod-host")
LATE = "node-3-pod-2"
GRACE = 2  # seconds, mesh_agent_grace


def register(cluster, pod):
    """The Pod object of one of the lab's pods."""
    cluster.api.apply("pods", kube.apiserver.pod(pod, pod.partition("-pod-")[0], list(cluster.lab.addresses(pod).values())))


@pytest.fixture(scope="module")
def cluster():
    lab = made("pods", nodes=3, pods=2, rp_filter=1)
    lab.before = {node: traces(lab, node) for node in lab.nodes}
    # Prefixes that the inventory has for a host would count more than its pods.
    inventory = lab.state / "inventory.yml"
    inventory.write_text("".join(line for line in inventory.read_text().splitlines(True) if "mesh_pod_cidrs" not in line))
    with kube.Cluster(lab) as found:
        for node in lab.nodes:
            item = found.api.get("nodes", node)
            # as where no controller gives prefixes to nodes
            item["spec"] = {name: value for name, value in item["spec"].items() if name not in ("podCIDR", "podCIDRs")}
            found.api.recreate("nodes", node, obj=item)
            for pod in lab.pods_of(node):
                if pod != LATE:
                    register(found, pod)
        yield found
    if not keep_on_failure():
        lab.down()


def variables(cluster):
    return [*cluster.agent(mesh_agent_grace=GRACE), "-e", "mesh_pod_source=pods"]


def sources(cluster, node):
    """Prefixes that a node sends from into the mesh, by its rules."""
    words = text_of(cluster.lab, node, "ip rule; ip -6 rule").split()
    texts = [after for before, after in zip(words, words[1:]) if before == "from" and after != "all"]
    return [ipaddress.ip_network(text) for text in texts]


def known_late(cluster):
    """Names of the nodes in whose kernels all addresses of the late pod lead to a peer, and have a route; for its own, a rule."""
    found = set()
    wanted = [ipaddress.ip_address(address) for address in cluster.lab.addresses(LATE).values()]
    for node in cluster.lab.nodes:
        if LATE.startswith(node):
            kinds = [sources(cluster, node)]
        else:
            held = cluster.held(node)
            kinds = [[ipaddress.ip_network(text) for texts in held["peers"].values() for text in texts],
                     [ipaddress.ip_network(text) for text in held["pods"]]]
        if all(any(address in network for network in networks) for address in wanted for networks in kinds):
            found.add(node)
    return found


def flows_without_late(cluster):
    return [flow for flow in Watched.all_flows(cluster.lab, KINDS) if LATE not in (flow["source"], flow["target"])]


def test_enable_where_one_pod_is_not_known(cluster):
    """Who is not known goes on in clear, and nobody loses anything."""
    with Watched(cluster.lab, kinds=KINDS):
        run = cluster.playbook("enable", *variables(cluster), preflight=False)
        cluster.wait_agents(lambda state: state.get("api") == "watching" and not state["hindrance"], "watches the API")
    assert "3 of 3 nodes done" in run.text
    assert all_encrypted(infos(cluster.lab))
    assert known_late(cluster) == set()
    seen = wire(cluster.lab, KINDS)
    assert seen["clear_frames"] > 0 and seen["wireguard_frames"] > seen["clear_frames"], "only what concerns one of six pods is in clear"


def test_it_becomes_known_under_traffic(cluster):
    with Watched(cluster.lab, kinds=KINDS):
        register(cluster, LATE)
        kube.wait(lambda: known_late(cluster), lambda found: found == set(cluster.lab.nodes), "a way to and from the pod that became known")
    assert_encrypted(cluster.lab, KINDS)


def test_runs_and_agents_agree(cluster):
    """What agents brought to the kernels, the next run notes in the mesh document, and the one after it has nothing to do."""
    with Watched(cluster.lab, kinds=KINDS):
        cluster.playbook("reconcile", *variables(cluster))
        run = cluster.playbook("enable", *variables(cluster), preflight=False)
    assert set(run.changed().values()) == {0}, run.text
    assert_encrypted(cluster.lab, KINDS)


def test_an_address_goes_without_a_gap_for_its_neighbours(cluster):
    """Pods of one node have neighbouring addresses, which are one prefix: it is split."""
    with Watched(cluster.lab, kinds=KINDS, flows=flows_without_late(cluster), streams=False):
        cluster.api.delete("pods", LATE, "default")
        kube.wait(lambda: known_late(cluster), lambda found: found == set(), "no way to the pod that is gone")
        register(cluster, LATE)
        kube.wait(lambda: known_late(cluster), lambda found: found == set(cluster.lab.nodes), "a way to and from the pod that is back")


def test_disable(cluster):
    with Watched(cluster.lab, kinds=KINDS):
        cluster.playbook("disable")
    for node in cluster.lab.nodes:
        assert differences(cluster.lab.before[node], traces(cluster.lab, node)) == []
