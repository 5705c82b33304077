# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _preflight_facts, _underlay
from ansible_collections.kubemesh.wireguard.plugins.modules import preflight

CLEAN = {
    "uid": 0, "python": [3, 11, 2], "kernel": "6.1.0", "modules_present": True, "systemd": True,
    "tools": {"ip": True, "wg": True, "wg-quick": True, "ip_json": True},
    "mesh_document": False, "last_pod_cidrs": [], "fips": False, "ipv6": "on", "foreign_files": [], "readonly": [],
    "cni": {"types": ["flannel"], "ipams": []}, "wireguard": {"kernel": True, "userspace": "", "tun": True},
    "links": [], "addresses": [], "rules": [], "routes": {}, "pod_routes": [], "wg_devices": {}, "udp": [], "responder_ports": [],
    "marks": [],
}


class Node:
    """A node whose facts, network and responder are what the test says."""

    def __init__(self):
        self.facts = dict(CLEAN)
        self.calls = []
        self.sizes = {}
        self.running = None

    def read_facts(self, system, settings):
        self.calls.append(("facts", settings["node"]))
        return self.facts

    def open_responder(self, ports, families, mark):
        self.calls.append(("open", tuple(ports), mark))
        return ["socket"], list(ports)[1:]

    def start_responder(self, sockets, digest, ports, lifetime):
        self.calls.append(("start", digest, tuple(ports), lifetime))
        self.running = {"pid": 1, "started": 1, "ports": [port for port in ports if port]}

    def stop_responder(self):
        self.calls.append(("stop",))
        self.running = None

    def run(self, schedule, askers, deadline):
        self.calls.append(("ask", tuple(sorted(askers))))
        for name, job in schedule.jobs.items():
            if self.sizes.get(name):
                job.update(reached=set(job["keys"]), path_mtu=self.sizes[name], listening=set(), rtt=0.001)


class Asker:
    def __init__(self, family, kind, digest, mark):
        self.arguments = (family, kind, digest, mark)

    def close(self):
        pass


@pytest.fixture
def node(monkeypatch):
    it = Node()
    monkeypatch.setattr(_preflight_facts, "read_facts", it.read_facts)
    for name in ("open_responder", "start_responder", "stop_responder", "run"):
        monkeypatch.setattr(_underlay, name, getattr(it, name))
    monkeypatch.setattr(_underlay, "running_responder", lambda: it.running)
    monkeypatch.setattr(_underlay, "Asker", Asker)
    return it


TARGETS = [{"name": "worker-1", "address": "198.18.0.1"}, {"name": "worker-2", "address": "198.18.0.2"},
           {"name": "worker-3", "address": "FD00:0::3", "port": 5000}]


def test_clean_node(run_module, node):
    result = run_module(preflight.main, {"node": "worker-1"})
    assert (result["findings"], result["error_count"], result["warning_count"], result["changed"]) == ([], 0, 0, False)
    assert (result["data_path"], result["implementation"]) == ("Flannel", "kernel")
    assert result["listener"] == {"running": False, "ports": []} and "mesh_mtu" not in result
    assert node.calls == [("facts", "worker-1")]


def test_findings_do_not_fail_unless_asked_to(run_module, node):
    node.facts = dict(CLEAN, fips=True, uid=1)
    result = run_module(preflight.main, {"node": "worker-1"})
    assert not result.get("failed") and (result["error_count"], result["warning_count"]) == (1, 1)
    result = run_module(preflight.main, {"node": "worker-1", "fail_on_error": True})
    assert result["failed"] and len(result["findings"]) == 2 and "become" in result["msg"]
    node.facts = dict(CLEAN, fips=True)
    assert not run_module(preflight.main, {"node": "worker-1", "fail_on_error": True}).get("failed")


UNREADABLE = {"real": "/root/ca", "places": [{"path": "/root/ca", "error": "No such file or directory"}]}


def test_files_of_the_agent_are_looked_at_where_it_is_named(run_module, node, monkeypatch):
    asked = []

    def read_inputs(paths):
        asked.append(paths)
        return {"user": None, "token": False, "ways": {"ca_file": UNREADABLE}}

    node.facts = dict(CLEAN, agent={"user": None, "token": False, "ways": {"ca_file": UNREADABLE}})
    result = run_module(preflight.main, {"node": "worker-1", "agent_ca_file": "/root/ca"})
    assert [item["message"].split(":")[0] for item in result["findings"]] == ["mesh_agent_token", "mesh_agent_ca_file"]
    assert all((item["level"], item["node"]) == ("error", "worker-1") for item in result["findings"])
    result = run_module(preflight.main, {"node": "worker-1", "agent_ca_file": "/root/ca", "agent_token_given": True})
    assert [item["value"] for item in result["findings"]] == ["/root/ca"]
    assert run_module(preflight.main, {"node": "worker-1"})["findings"] == []
    # alone, of a node that is proven
    node.calls.clear()
    monkeypatch.setattr(_preflight_facts._agent_inputs, "read_inputs", read_inputs)
    monkeypatch.setattr(_preflight_facts, "_wireguard", lambda system: {"kernel": True, "userspace": ""})
    monkeypatch.setattr(_preflight_facts, "_links", lambda system: [])
    args = {"node": "worker-1", "local_checks": False, "agent_ca_file": "/root/ca", "agent_token_file": "/t"}
    assert [item["check"] for item in run_module(preflight.main, args)["findings"]] == ["agent"]
    assert asked == [{"ca_file": "/root/ca", "token_file": "/t"}] and node.calls == []
    assert run_module(preflight.main, {"node": "worker-1", "local_checks": False})["findings"] == []
    assert run_module(preflight.main, {"node": "worker-1", "agent_token_file": "/t"})["failed"]


def test_listen_starts_anew_and_stops(run_module, node):
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "listen": "start", "nonce": "abc", "fwmark": 8})
    assert node.calls == [("stop",), ("open", (51840, 51841), 8), ("start", _underlay.digest_of("abc"), (0, 51841), 120)]
    assert result["listener"] == {"running": True, "ports": [51841]}
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "listen": "stop"})
    assert node.calls[-1] == ("stop",) and result["listener"] == {"running": False, "ports": []}


def test_check_mode_neither_starts_nor_stops_and_asks_by_icmp(run_module, node):
    node.sizes = {"worker-2": 1400, "worker-3": 1500}
    for listen in ("start", "stop"):
        run_module(preflight.main, {"node": "worker-1", "local_checks": False, "listen": listen, "nonce": "x"}, check=True)
        assert node.calls == []
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "targets": TARGETS}, check=True)
    assert node.calls == [("ask", (("ipv4", "icmp"), ("ipv6", "icmp")))]
    assert result["findings"] == [] and result["mesh_mtu"] == 1340


@pytest.mark.parametrize("listen", ["start", "stop"])
def test_other_nodes_are_not_asked_while_responders_come_and_go(run_module, node, listen):
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "listen": listen, "nonce": "x", "targets": TARGETS})
    assert "target_count" not in result and not [call for call in node.calls if call[0] == "ask"]


def test_mesh_document_says_what_this_node_should_have(run_module, node, tmp_path):
    path = tmp_path / "draft.json"
    entry = {"state": "pending", "endpoints": {}, "pod_cidrs": ["10.244.1.0/24"], "node_addresses": ["198.18.0.1"]}
    path.write_text(json.dumps({"nodes": {"worker-1": entry}}))
    node.facts = dict(CLEAN, pod_routes=[{"prefix": "10.244.7.7/32", "device": "cali1"}],
                      addresses=[{"address": "1.2.3.4", "device": "eth0"}])
    arguments = {"node": "worker-1", "targets_file": str(path), "listen": "start", "nonce": "x"}
    result = run_module(preflight.main, arguments)
    assert [item["check"] for item in result["findings"]] == ["pod CIDRs", "addresses"]
    # what is said in the task counts more
    result = run_module(preflight.main, dict(arguments, pod_cidrs=["10.244.7.0/24"], node_addresses=[]))
    assert result["findings"] == []
    assert run_module(preflight.main, dict(arguments, node="worker-9"))["findings"] == []


def test_targets(run_module, node):
    node.sizes = {"worker-2": 1400, "worker-3": 1500}
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "targets": TARGETS, "nonce": "x"})
    assert (result["target_count"], result["reached_count"], result["mesh_mtu"]) == (2, 2, 1340)
    assert result["path_mtus"] == {"ipv4": {"mtu": 1400, "node": "worker-2"}, "ipv6": {"mtu": 1500, "node": "worker-3"}}
    assert node.calls == [("ask", (("ipv4", "udp"), ("ipv6", "udp")))]
    node.sizes = {"worker-2": 1400}
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "targets": TARGETS, "nonce": "x"})
    assert [item["message"] for item in result["findings"]] == ["no answer from worker-3 at fd00::3, UDP port 5000 and 5001"]
    result = run_module(preflight.main, {"node": "worker-1", "local_checks": False, "targets": TARGETS, "nonce": "x",
                                         "not_listening": ["worker-3"]})
    assert result["findings"] == [] and node.calls[-1] == ("ask", (("ipv4", "udp"), ("ipv6", "icmp")))


def test_targets_in_a_file(run_module, node, tmp_path):
    path = tmp_path / "targets.json"
    arguments = {"node": "worker-1", "local_checks": False, "targets_file": str(path), "nonce": "x"}
    assert "targets.json is not there" in run_module(preflight.main, arguments)["msg"]
    path.write_text("{")
    assert "not JSON" in run_module(preflight.main, arguments)["msg"]
    path.write_text('{"a": 1}')
    assert "nor a mesh document" in run_module(preflight.main, arguments)["msg"]
    path.write_text(json.dumps(TARGETS))
    assert run_module(preflight.main, arguments)["target_count"] == 2
    path.write_text("[]")
    result = run_module(preflight.main, arguments)
    assert result["target_count"] == 0 and result["mesh_mtu"] is None and result["findings"] == []


@pytest.mark.parametrize("change,words", [
    ({"table": 254}, "mesh_table"),
    ({"rule_priority": 0}, "mesh_rule_priority"),
    ({"fwmark": 0}, "mesh_fwmark"),
    ({"port": 65535}, "port: 65535"),
    ({"timeout": 0}, "timeout"),
    ({"listen_seconds": 100000}, "3600"),
    ({"listen": "start"}, "nonce"),
    ({"targets": TARGETS}, "nonce"),
    ({"pod_cidrs": ["10.244.1.5/24"]}, "10.244.1.5/24"),
    ({"node_addresses": ["worker-1"]}, "worker-1"),
    ({"targets": [{"name": "worker-2", "address": "example.org"}], "nonce": "x"}, "node worker-2: 'example.org'"),
    ({"targets": [{"name": "worker-2", "address": "198.18.0.2", "port": 70000}], "nonce": "x"}, "70000"),
    ({"targets": [{"name": "worker-2", "address": "198.18.0.2"}, {"name": "worker-3", "address": "198.18.0.2"}], "nonce": "x"},
     "worker-2 and worker-3 have the same address 198.18.0.2"),
])
def test_wrong_arguments_are_named_before_anything_is_done(run_module, node, change, words):
    result = run_module(preflight.main, dict({"node": "worker-1"}, **change))
    assert result["failed"] and words in result["msg"] and node.calls == []
