# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import json
import time

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _probe
from ansible_collections.kubemesh.wireguard.plugins.modules import probe


def key(number):
    return base64.b64encode(bytes([number]) + bytes(30) + b"\x40").decode()


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node a with peers b and c in a mesh of four, whose network is what the test says."""
    nodes = {}
    for number, name in enumerate("abcd", 1):
        nodes[name] = {
            "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)},
            "endpoints": {"ipv4": {"address": "198.18.0.%d" % number, "port": None}}, "pod_cidrs": ["10.244.%d.0/24" % number],
            "node_addresses": ["198.18.0.%d" % number], "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": None,
            "keepalive": 0}
    nodes["d"].update(state="pending", reason="no key", public_keys={}, probe_addresses={})
    doc = {"schema": 1, "serial": 3, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": nodes}
    (tmp_path / "mesh.json").write_bytes(_mesh.document_bytes(_mesh.validate_document(doc)))

    class Node:
        arguments = {
            "node": "a", "interface": "lo", "document_file": str(tmp_path / "mesh.json"), "proof_file": str(tmp_path / "proof.json")}
        answers = {"b": 1420, "c": 1420}
        own_key = key(1)
        proof_file = tmp_path / "proof.json"
        reads = 0

        def read(self, interface):
            # something is received between two looks
            Node.reads += 1
            peer = {"endpoint": "198.18.0.2:51840", "last_handshake": time.time(), "rx_bytes": Node.reads}
            return {"public_key": self.own_key, "peers": {key(2): peer, key(3): peer}}

        def run_echo(self, handle, index, schedule, deadline):
            for entry in schedule.peers.values():
                size = self.answers[entry["name"]]
                if size:
                    entry.update(rtt=0.002 if entry["name"] == "b" else 0.001, size=size)

    class Handle:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    it = Node()
    monkeypatch.setattr(probe, "client_for", lambda name, wait, run_command: it)
    monkeypatch.setattr(_probe, "device", lambda name: {"index": 1, "mtu": 1420} if name == "lo" else None)
    monkeypatch.setattr(_probe, "has_ipv6", lambda name: True)
    monkeypatch.setattr(_probe, "open_echo_socket", lambda interface, index, address: Handle())
    monkeypatch.setattr(_probe, "run_echo", it.run_echo)
    return it


def test_all_proven(run_module, node):
    result = run_module(probe.main, node.arguments)
    assert (result["peer_count"], result["proven_count"], result["unproven"], result["without_key"]) == (2, 2, [], ["d"])
    assert (result["slowest_peer"], result["slowest_rtt"], result["changed"], result["mtu"]) == ("b", 0.002, False, 1420)
    assert "peers" not in result
    proof = json.loads(node.proof_file.read_text())
    assert (proof["serial"], proof["node"], proof["interface"], proof["generation"]) == (3, "a", "lo", 0)
    assert proof["peers"]["b"]["proven"] and proof["peers"]["b"]["time"] <= time.time()


def test_unproven_is_reported_written_and_fails_only_if_required(run_module, node):
    node.answers = {"b": 1420, "c": 1300}
    result = run_module(probe.main, node.arguments)
    assert not result.get("failed") and [item["reason"] for item in result["unproven"]] == ["full_size_lost"]
    assert result["msg"].startswith("a: 1 of 2 peers proven through lo. a to c: ")
    node.proof_file.unlink()
    result = run_module(probe.main, dict(node.arguments, require="all", return_peers=True))
    assert result["failed"] and result["unproven_count"] == 1 and result["peers"]["c"]["size"] == 1300
    assert not json.loads(node.proof_file.read_text())["peers"]["c"]["proven"]
    assert run_module(probe.main, dict(node.arguments, require="all", full_size=False))["proven_count"] == 2


def test_check_mode_writes_nothing(run_module, node):
    assert run_module(probe.main, node.arguments, check=True)["proven_count"] == 2
    assert not node.proof_file.exists()


def test_asked_for_a_node_without_key(run_module, node):
    result = run_module(probe.main, dict(node.arguments, peers=["b", "d"]))
    assert (result["peer_count"], result["proven_count"]) == (2, 1)
    assert result["unproven"][0]["reason"] == "no_key" and result["unproven"][0]["message"].startswith("a to d: ")


@pytest.mark.parametrize("change,words", [
    ({"document_file": "/nonexistent/mesh.json"}, "/nonexistent/mesh.json"),
    ({"node": "z"}, "'z'"),
    ({"node": "d"}, "d has no peers"),
    ({"peers": ["nobody"]}, "nobody"),
    ({"timeout": 0}, "timeout"),
    ({"interface": "none0"}, "none0"),
    ({"generation": 1}, "generation 1"),
])
def test_errors_name_what_is_wrong(run_module, node, change, words):
    result = run_module(probe.main, dict(node.arguments, **change))
    assert result["failed"] and words in result["msg"]
    assert not node.proof_file.exists()


def test_another_key_on_the_device(run_module, node):
    node.own_key = key(9)
    result = run_module(probe.main, node.arguments)
    assert result["failed"] and key(9) in result["msg"] and key(1) in result["msg"]


def test_defaults_follow_the_generation(run_module, node, monkeypatch):
    seen = []
    monkeypatch.setattr(_probe, "device", seen.append)
    arguments = {"node": "a", "document_file": node.arguments["document_file"]}
    result = run_module(probe.main, arguments, check=True)
    assert seen == ["wgmesh0"] and result["proof_file"] == "/run/kubemesh/proof-wgmesh0.json" and result["interface"] == "wgmesh0"
