# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad input ends in one clear message that names host, field and remedy, and nothing has changed on any node."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import differences, keep_on_failure, made, playbook, traces


@pytest.fixture(scope="module")
def lab():
    found = made("input", nodes=2, pods=1)
    found.before = {node: traces(found, node) for node in found.nodes}
    found.list = json.loads(Path(found.nodes_file()).read_text())
    yield found
    if not keep_on_failure():
        found.down()


def node_list(lab, change):
    """A saved node list with something wrong in it; its path."""
    items = copy.deepcopy(lab.list)
    change(items)
    path = lab.state / "bad.json"
    path.write_text(json.dumps(items))
    return str(path)


def address(item, value):
    for entry in item["status"]["addresses"]:
        if entry["type"] == "InternalIP":
            entry["address"] = value
            return


def cidr_and_address(items):
    items["items"][0]["spec"].update(podCIDRs=["10.244.1.0/33"])
    address(items["items"][1], "198.18.0.999")


CASES = {
    "cidr and address": (cidr_and_address, ["node-1", "10.244.1.0/33", "node-2", "198.18.0.999"]),
    "no node of this name": (lambda items: items["items"][0]["metadata"].update(name="other"), ["node-1", "mesh_node_name"]),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_bad_node_list(lab, case):
    change, words = CASES[case]
    run = playbook(lab, "enable", "-e", "mesh_nodes_file=%s" % node_list(lab, change), rc=2, source="file")
    for word in words:
        assert word in run.text, (word, run.text[-3000:])
    unchanged(lab)


def test_a_template_in_an_annotation_stays_text(lab):
    """The key that the node itself reports counts; what the annotation holds is shown, and never run."""
    canary = lab.state / "templated"
    text = "{{ lookup('pipe', 'touch %s') }}" % canary
    path = node_list(lab, lambda items: items["items"][0]["metadata"].setdefault("annotations", {}).update(
        {"kubemesh.wireguard/public-key-0": text}))
    run = playbook(lab, "enable", "--check", "-e", "mesh_nodes_file=%s" % path, source="file")
    assert "public-key-0" in run.text and "lookup" in run.text
    assert not canary.exists()
    unchanged(lab)


@pytest.mark.parametrize("variable, words", [
    ("mesh_prot=51840", ["mesh_prot", "mesh_port"]),
    ("mesh_port=fast mesh_persistence=cron", ["mesh_port", "fast", "mesh_persistence", "cron", "wg-quick"]),
    ("mesh_nodes_file=/nonexistent.json", ["/nonexistent.json"]),
    ('{"mesh_pod_cidrs": ["10.244.2.0/25"]}', ["node-1", "node-2", "10.244.2.0/25"]),
    ("mesh_endpoint=10.244.2.7", ["node-1", "10.244.2.7"]),
    ('{"mesh_interface": "wg/../x", "mesh_exempt_cidrs": ["192.0.2.5/28"]}', ["wg/../x", "mesh_exempt_cidrs", "192.0.2.5/28"]),
    ("mesh_table=254", ["mesh_table", "254"]),
    ('{"mesh_batch": ["half"]}', ["mesh_batch", "half"]),
])
def test_bad_variable(lab, variable, words):
    source = "file" if "nodes_file" in variable else "inventory"
    run = playbook(lab, "enable", "-e", variable, rc=2, source=source)
    for word in words:
        assert word in run.text, (word, run.text[-3000:])
    unchanged(lab)


def test_hosts_that_do_not_agree(lab):
    """Another port, and under strict mode another idea of what is encrypted, on one host only: a mesh that loses packets."""
    path = lab.state / "differ.yml"
    path.write_text(json.dumps({"all": {"hosts": {"node-2": {"mesh_port": 51900, "mesh_encrypt": "nodes"}}}}))
    run = playbook(lab, "enable", "-i", str(path), rc=2)
    assert "mesh_port: 51840 on node-1, 51900 on node-2" in run.text and "mesh_encrypt: pods on node-1, nodes on node-2" in run.text
    unchanged(lab)


def test_unreachable_api(lab):
    config = lab.state / "kubeconfig"
    config.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "not-shown"}}]}))
    run = playbook(lab, "enable", "-e", "mesh_kubeconfig=%s" % config, rc=2, source="kubernetes")
    assert "kubernetes.core" in run.text or "127.0.0.1:1" in run.text, run.text[-3000:]
    assert "not-shown" not in run.text
    unchanged(lab)


def test_a_damaged_key_file_is_reported_and_kept(lab):
    lab.exec("node-1", ["sh", "-c", "umask 077; echo damaged > /etc/wireguard/wgmesh0.key"])
    run = playbook(lab, "enable", rc=2)
    assert "/etc/wireguard/wgmesh0.key" in run.text
    kept = lab.exec("node-1", ["cat", "/etc/wireguard/wgmesh0.key"]).stdout
    assert (kept.decode() if isinstance(kept, bytes) else kept) == "damaged\n"
    lab.exec("node-1", ["rm", "/etc/wireguard/wgmesh0.key"])


def unchanged(lab):
    for node in lab.nodes:
        assert differences(lab.before[node], traces(lab, node)) == []
