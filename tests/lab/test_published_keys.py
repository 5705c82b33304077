# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Public keys as annotations of Nodes, through the whole life of a mesh: playbooks on real hosts, an API server, traffic between all pods.

Each test goes on from the one before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kube
from harness import Watched, all_encrypted, infos, keep_on_failure, made, text_of

KINDS = ("pod-pod", "host-pod")
OTHER_KEY = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="


@pytest.fixture(scope="module")
def cluster():
    lab = made("keys", nodes=3, pods=1, rp_filter=1)
    with kube.Cluster(lab) as found:
        yield found
    if not keep_on_failure():
        lab.down()


def own_keys(lab):
    """{node: {generation: public key}} of the devices that there are."""
    found = {}
    for node in lab.nodes:
        rows = text_of(lab, node, "for i in $(wg show interfaces); do echo $i $(wg show $i public-key); done").splitlines()
        found[node] = {int(row.split()[0][-1]): row.split()[1] for row in rows}
    return found


def written(cluster, since):
    """[(node, {annotation: value})] that were patched since there were so many requests."""
    return [(request["name"], request["patch"]["metadata"]["annotations"]) for request in cluster.api.requests[since:]
            if request["verb"] == "patch" and request["code"] == 200]


def only(lab, *hosts):
    """Path of an inventory with these hosts alone: what AWX leaves of it in a slice, or who has a file of his own."""
    whole = yaml.safe_load(lab.inventory().read_text())["all"]
    path = lab.state / "part.yml"
    path.write_text(json.dumps({"all": {"vars": whole["vars"], "children": {"k8s_cluster": {"hosts": {
        host: whole["children"]["k8s_cluster"]["hosts"][host] for host in hosts}}}}}))
    return path


def test_without_the_right_hosts_say_what_they_know(cluster):
    cluster.api.refuse("patch", "nodes")
    with Watched(cluster.lab, kinds=KINDS):
        run = cluster.playbook("enable", preflight=False)
    cluster.permit()
    assert "3 of 3 nodes done" in run.text
    assert run.text.count("lacks the right to patch nodes") == 1 and "the run goes on" in run.text
    assert cluster.api.asked(verb="patch") == 1 and cluster.published() == {node: {} for node in cluster.lab.nodes}
    assert all_encrypted(infos(cluster.lab))


def test_check_says_what_would_be_written(cluster):
    for name in ("enable", "reconcile"):
        since = len(cluster.api.requests)
        run = cluster.playbook(name, "--check", "--diff", preflight=False)
        assert "+node node-3, %s" % kube.KEYS[0] in run.text and written(cluster, since) == []


def test_reconcile_publishes(cluster):
    with Watched(cluster.lab, kinds=KINDS):
        run = cluster.playbook("reconcile")
    assert cluster.published() == own_keys(cluster.lab)
    # The annotations alone: one task, told for one host.
    assert sorted(run.changed().values()) == [0, 0, 1]
    since = len(cluster.api.requests)
    for name in ("reconcile", "enable"):
        run = cluster.playbook(name, preflight=False)
        assert set(run.changed().values()) == {0} and written(cluster, since) == []


def test_rotation_is_followed(cluster):
    """The new key is added when every node has it; the old one goes when nobody sends to it any more, before it is destroyed."""
    before, since = cluster.published(), len(cluster.api.requests)
    with Watched(cluster.lab, kinds=KINDS):
        cluster.playbook("rotate_keys")
    found = cluster.published()
    assert found == own_keys(cluster.lab) and {tuple(keys) for keys in found.values()} == {(1,)}
    assert not {key for keys in before.values() for key in keys.values()} & {key for keys in found.values() for key in keys.values()}
    steps = [patch for dummy, patch in written(cluster, since)]
    assert steps == [{kube.KEYS[1]: found[node][1]} for node, dummy in written(cluster, since)[:3]] + [{kube.KEYS[0]: None}] * 3
    run = cluster.playbook("reconcile")
    assert set(run.changed().values()) == {0}


FORGET = "rm -f /etc/kubemesh/mesh.json"


def known_to(lab, node):
    """{node: {generation: key}} of the mesh document on a node."""
    document = json.loads(text_of(lab, node, "cat /etc/kubemesh/mesh.json"))
    return {name: {int(number): key for number, key in entry["public_keys"].items()} for name, entry in document["nodes"].items()}


def test_limit_takes_keys_of_others_from_annotations(cluster):
    text_of(cluster.lab, "node-2", FORGET)
    with Watched(cluster.lab, kinds=KINDS):
        cluster.playbook("reconcile", "--limit", "node-2")
    assert known_to(cluster.lab, "node-2") == cluster.published()
    assert all_encrypted(infos(cluster.lab))


def test_a_part_of_the_inventory_takes_keys_of_others_from_annotations(cluster, monkeypatch):
    text_of(cluster.lab, "node-3", FORGET)
    inventory = only(cluster.lab, "node-3")
    monkeypatch.setattr(cluster.lab, "inventory", lambda: inventory)
    with Watched(cluster.lab, kinds=KINDS):
        run = cluster.playbook("reconcile")
    assert list(run.recap) == ["node-3"]
    assert known_to(cluster.lab, "node-3") == cluster.published()
    assert all_encrypted(infos(cluster.lab))


def test_the_key_of_an_unreachable_host_comes_from_its_annotation(cluster):
    lab = cluster.lab
    for node in ("node-1", "node-2"):
        text_of(lab, node, FORGET)
    flows = [flow for flow in Watched.all_flows(lab, KINDS) if "node-3" not in flow["source"] + flow["target"]]
    with Watched(lab, kinds=KINDS, flows=flows, streams=False):
        lab.cut("node-3")
        cluster.playbook("reconcile", "-e", "mesh_probe_timeout=8", rc=4, env={"ANSIBLE_SSH_RETRIES": "0"})
        assert known_to(lab, "node-1") == cluster.published()
        lab.heal("node-3")
    with Watched(lab, kinds=KINDS):
        run = cluster.playbook("reconcile")
        assert set(run.changed().values()) <= {0, 1}, run.text
    assert all_encrypted(infos(lab))


@pytest.mark.parametrize("value", [OTHER_KEY, "{{ lookup('pipe', 'touch /tmp/kubemesh-templated') }}", ""])
def test_an_annotation_that_somebody_changed(cluster, value):
    """What the host says counts: it is told, and the right key is written again; nothing is templated, no session is lost."""
    lab = cluster.lab
    canary = Path("/tmp/kubemesh-templated")
    canary.unlink(missing_ok=True)
    before = cluster.published()
    cluster.annotate("node-2", 1, value)
    with Watched(lab, kinds=KINDS):
        run = cluster.playbook("reconcile", "--diff")
    said = " ".join(run.text.split())
    assert "node node-2, annotation %s: " % kube.KEYS[1] in said and "find out who changed the annotation" in said, said[-3000:]
    assert value in said and cluster.published() == before
    assert not canary.exists()
    assert all_encrypted(infos(lab))


def test_an_annotation_changed_beside_a_run_that_does_not_see_the_host(cluster):
    """The annotation counts more than the last document there, so it is told; and a run that sees the host puts it right."""
    lab = cluster.lab
    before = cluster.published()
    cluster.annotate("node-2", 1, OTHER_KEY)
    run = cluster.playbook("reconcile", "--limit", "node-1", "--check")
    said = " ".join(run.text.split())
    assert "node node-2: its public key of generation 1 is now %s (from its annotation" % OTHER_KEY in said, said[-5000:]
    with Watched(lab, kinds=KINDS):
        cluster.playbook("reconcile")
    assert cluster.published() == before
    assert all_encrypted(infos(lab))


def test_disable_takes_them_back(cluster):
    since = len(cluster.api.requests)
    with Watched(cluster.lab, kinds=KINDS):
        cluster.playbook("disable")
    assert cluster.published() == {node: {} for node in cluster.lab.nodes}
    assert sorted(node for node, dummy in written(cluster, since)) == cluster.lab.nodes
    assert own_keys(cluster.lab) == {node: {} for node in cluster.lab.nodes}
