# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import stat
import subprocess
import sys
import threading
from unittest import mock

import pytest

pytest.importorskip("jmespath")
pytest.importorskip("netaddr")
pytest.importorskip("ansible.plugins.action")  # not where only modules are tested
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

from ansible_collections.kubemesh.wireguard.plugins.action import peers
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh
from ansible_collections.kubemesh.wireguard.plugins.modules import peers as module
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _cluster

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "..", "fixtures", "k8s")
NODES_FILE = os.path.join(FIXTURES, "nodes.json")
# the directory that holds ansible_collections, as this test was imported from
COLLECTIONS = os.path.abspath(os.path.join(os.path.dirname(peers.__file__), "..", "..", "..", "..", ".."))
sys.path.insert(0, os.path.abspath(os.path.join(HERE, "..", "..", "..", "api")))
import apiserver


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def facts(number, **more):
    return dict({"public_keys": {"0": key(number)}, "mtu": 1420}, **more)


@pytest.fixture(autouse=True)
def no_cluster_around(monkeypatch, tmp_path):
    """Nothing of the machine that runs the tests: no kubeconfig, no home."""
    for name in list(os.environ):
        if name.startswith("K8S_AUTH_") or name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def run(tmp_path):
    """-> function(args, inventory, ...) that runs the action in this process with real host variables and returns its result."""

    def run_action(args, inventory=None, host="localhost", check=False, diff=False, play_hosts=None, delegate_to=None, command=None):
        source = tmp_path / "inventory.yml"
        source.write_text(json.dumps(inventory or {"all": {"hosts": {"localhost": {"ansible_connection": "local"}}}}))
        loader = DataLoader()
        manager = InventoryManager(loader=loader, sources=[str(source)])
        variables = VariableManager(loader=loader, inventory=manager)
        groups = manager.get_groups_dict()
        task_vars = {"hostvars": HostVars(inventory=manager, variable_manager=variables, loader=loader), "groups": groups,
                     "inventory_hostname": host, "ansible_play_hosts_all": groups["all"] if play_hosts is None else play_hosts}
        task = mock.Mock(args=args, check_mode=check, diff=diff, delegate_to=delegate_to, async_val=0, action="kubemesh.wireguard.peers",
                         no_log=False)
        action = peers.ActionModule(task=task, connection=mock.Mock(), play_context=mock.Mock(), loader=loader, templar=mock.Mock(),
                                    shared_loader_obj=mock.Mock())
        action._execute_module = mock.Mock(side_effect=command or AssertionError("no command expected"))
        action._load_name = "kubemesh.wireguard.peers"  # set by the loader, and used by ansible-core 2.18 in a message
        run_action.action = action
        return action.run(task_vars=task_vars)

    return run_action


INVENTORY = {"k8s_cluster": {"vars": {"mesh_keepalive": 0}, "hosts": {
    "cp-1": {"mesh_node_facts": facts(1)},
    "worker-1": {"mesh_node_facts": facts(2), "mesh_keepalive": 25, "mesh_endpoint": "{{ public }}:5000", "public": "203.0.113.12"},
    "box-2": {"mesh_node_name": "worker-2", "mesh_node_facts": facts(3)},
    "worker-nocidr": {"mesh_node_facts": facts(4)},
}}}


class TestDocument:

    def test_recorded_nodes_and_host_variables(self, run, tmp_path):
        dest = tmp_path / "mesh.json"
        result = run({"nodes_file": NODES_FILE, "dest": str(dest), "node": "worker-1"}, INVENTORY)
        assert not result.get("failed"), result
        assert result["changed"]
        document = _mesh.load_document(dest.read_bytes())
        assert (result["serial"], result["sha256"], result["path"]) == (1, hashlib.sha256(dest.read_bytes()).hexdigest(), str(dest))
        assert stat.S_IMODE(dest.stat().st_mode) == 0o644
        assert result["members"] == ["cp-1", "worker-1", "worker-2", "worker-nocidr"]
        assert result["excluded"] == {"win-1": "runs Windows"}
        assert result["counts"] == {"member": 4, "pending": 0, "excluded": 1, "joined": 5, "left": 0}
        assert (result["source"], result["complete"]) == ("file", True)
        worker = document["nodes"]["worker-1"]
        assert worker["endpoints"] == {"ipv4": {"address": "203.0.113.12", "port": 5000}}  # a template of the inventory
        assert (worker["keepalive"], worker["mtu"]) == (25, 1420)
        assert result["missing"] == {"not_in_inventory": [], "not_in_play": [], "hosts_without_node": [], "without_key": [],
                                     "suggestions": {}}
        assert result["view"]["peers"] == _mesh.peers_of(document, "worker-1", 0)
        assert result["view"]["device_addresses"] == _mesh.device_addresses(document, "worker-1", 0)
        assert result["annotations"]["worker-2"] == {"kubemesh.wireguard/public-key-0": key(3)}
        assert "document" not in result
        assert result["warnings"] == []

    def test_second_run_changes_nothing(self, run, tmp_path):
        args = {"nodes_file": NODES_FILE, "dest": str(tmp_path / "mesh.json")}
        run(args, INVENTORY)
        result = run(args, INVENTORY, diff=True)
        assert (result["changed"], result["document_changed"], result["changes"], result["serial"]) == (False, False, [], 1)
        assert "diff" not in result

    def test_check_mode_writes_nothing_and_says_the_same(self, run, tmp_path):
        dest = tmp_path / "mesh.json"
        args = {"nodes_file": NODES_FILE, "dest": str(dest), "return_document": True}
        checked = run(args, INVENTORY, check=True, diff=True)
        assert not dest.exists()
        assert checked["changed"]
        real = run(args, INVENTORY, diff=True)
        assert real == checked
        assert "node cp-1 joined: member" in real["diff"]["prepared"]
        assert real["document"] == json.loads(dest.read_text())
        assert os.listdir(tmp_path / "home") == []

    def test_dest_is_the_last_document_unless_told_otherwise(self, run, tmp_path):
        dest = tmp_path / "mesh.json"
        run({"nodes_file": NODES_FILE, "dest": str(dest)}, INVENTORY)
        # nothing reported in this run: the keys are those of the document
        result = run({"nodes_file": NODES_FILE, "dest": str(dest), "hosts": []})
        assert not result["changed"]
        result = run({"nodes_file": NODES_FILE, "dest": str(dest), "previous": [], "hosts": []})
        assert (result["changed"], result["previous_serial"], result["counts"]["pending"]) == (True, None, 4)

    def test_newest_of_several(self, run, tmp_path):
        paths = [str(tmp_path / name) for name in ("a", "b", "missing")]
        run({"nodes_file": NODES_FILE, "dest": paths[0]}, INVENTORY)
        run({"nodes_file": NODES_FILE, "dest": paths[1], "previous": [paths[0]], "port": 600}, INVENTORY)
        result = run({"nodes_file": NODES_FILE, "previous": paths, "port": 600}, INVENTORY)
        assert (result["previous_serial"], result["serial"], result["changed"]) == (2, 2, False)

    def test_page_loses_nobody(self, run, tmp_path):
        dest = str(tmp_path / "mesh.json")
        run({"nodes_file": NODES_FILE, "dest": dest}, INVENTORY)
        result = run({"nodes_file": os.path.join(FIXTURES, "nodes-page1.json"), "dest": dest}, INVENTORY)
        assert (result["counts"]["left"], result["complete"]) == (0, False)
        assert any("one page of a longer list" in warning for warning in result["warnings"])
        result = run({"nodes_file": os.path.join(FIXTURES, "nodes-page1.json"), "dest": dest, "nodes_complete": True}, INVENTORY)
        assert result["counts"]["left"] == 3

    def test_yaml(self, run, tmp_path):
        saved = tmp_path / "nodes.yml"
        with open(NODES_FILE, encoding="utf-8") as handle:
            saved.write_text(yaml.safe_dump(json.load(handle)))
        assert run({"nodes_file": str(saved)}, INVENTORY)["sha256"] == run({"nodes_file": NODES_FILE}, INVENTORY)["sha256"]

    def test_nodes_given(self, run):
        result = run({"nodes": [{"name": "alpha", "node_addresses": ["198.18.0.1"], "public_keys": {"0": key(1)}}]})
        assert (result["source"], result["complete"], result["members"]) == ("nodes", False, ["alpha"])
        assert "annotations" not in result

    def test_from_inventory(self, run):
        inventory = {"all": {"hosts": {"a": {"mesh_pod_cidrs": ["10.1.0.0/24"], "mesh_node_addresses": ["198.18.0.1"]}, "bastion": {}}}}
        result = run({}, inventory)
        assert (result["source"], result["complete"], list(result["pending"])) == ("inventory", False, ["a"])
        result = run({"source": "inventory", "hosts": ["bastion"]}, inventory)
        assert result["failed"]
        assert "none of the 1 hosts has mesh_pod_cidrs or mesh_node_addresses" in result["msg"]

    def test_queries_reach_the_nodes(self, run):
        result = run({"nodes_file": NODES_FILE, "excluded_query": "spec.unschedulable", "return_document": True,
                      "node_addresses_query": "status.addresses[?type=='InternalIP'].address | [0]"}, INVENTORY)
        assert set(result["excluded"]) == {"win-1", "worker-2"}
        assert result["document"]["nodes"]["worker-1"]["node_addresses"] == ["198.18.0.12"]

    def test_many_changes_are_cut(self, run):
        nodes = [{"name": "n%d" % number, "node_addresses": ["198.18.%d.%d" % (number // 250, number % 250 + 1)]} for number in range(300)]
        result = run({"nodes": nodes})
        assert len(result["changes"]) == 201
        assert result["changes"][-1] == "and 101 more"

    def test_mismatches(self, run):
        inventory = {"all": {"hosts": {
            "cp-1": {}, "worker_1": {}, "box": {"ansible_host": "198.18.0.13"}, "lb": {}, "worker-nocidr": {}}}}
        result = run({"nodes_file": NODES_FILE}, inventory, play_hosts=["cp-1", "worker_1", "box", "lb"])
        assert result["missing"] == {"not_in_inventory": ["worker-1", "worker-2"], "not_in_play": ["worker-nocidr"],
                                     "without_key": ["worker-1", "worker-2", "worker-nocidr"],
                                     "hosts_without_node": ["box", "lb", "worker_1"], "suggestions": {"box": "worker-2",
                                                                                                      "worker_1": "worker-1"}}
        assert result["warnings"] == ["host box is not the name of a node, but most likely node worker-2: set mesh_node_name",
                                      "host worker_1 is not the name of a node, but most likely node worker-1: set mesh_node_name"]

    def test_hosts_outside_the_play_count(self, run):
        result = run({"nodes_file": NODES_FILE}, INVENTORY, play_hosts=["cp-1"])
        assert result["counts"]["member"] == 4
        assert result["missing"]["not_in_play"] == ["worker-1", "worker-2", "worker-nocidr"]
        assert result["missing"]["hosts_without_node"] == []

    def test_who_has_no_key_and_is_not_here(self, run, tmp_path):
        dest = str(tmp_path / "mesh.json")
        inventory = json.loads(json.dumps(INVENTORY))
        del inventory["k8s_cluster"]["hosts"]["worker-1"], inventory["k8s_cluster"]["hosts"]["cp-1"]["mesh_node_facts"]
        first = run({"nodes_file": NODES_FILE, "dest": dest}, inventory, play_hosts=["cp-1", "worker-nocidr"])
        assert first["missing"]["without_key"] == ["worker-1"], "cp-1 is here and may be unreachable, worker-2 is known by its key"
        second = run({"nodes_file": NODES_FILE, "previous": [dest]}, inventory, play_hosts=["box-2"])
        assert second["missing"]["without_key"] == ["cp-1", "worker-1"] and second["previous_serial"] == 1

    def test_who_is_awaited(self, run, tmp_path):
        """Before the keys are made, nodes of this play are not asked where their keys are; afterwards they are."""
        dest = str(tmp_path / "mesh.json")
        run({"nodes_file": NODES_FILE, "dest": dest}, INVENTORY)
        with open(NODES_FILE, encoding="utf-8") as handle:
            listing = json.load(handle)
        for item in listing["items"]:
            if item["metadata"]["name"] in ("worker-1", "worker-2"):
                item["metadata"]["uid"] = "new"
        saved = tmp_path / "again.json"
        saved.write_text(json.dumps(listing))
        inventory = json.loads(json.dumps(INVENTORY))
        hosts = inventory["k8s_cluster"]["hosts"]
        for host in hosts.values():
            del host["mesh_node_facts"]

        def told():
            found = run({"nodes_file": str(saved), "previous": [dest]}, inventory, play_hosts=["cp-1", "worker-1"])["warnings"]
            return [name for name in ("worker-1", "worker-2") if any("node %s: was deleted" % name in text for text in found)]

        assert told() == ["worker-2"]
        hosts["cp-1"]["mesh_node_facts"] = facts(1)
        assert told() == ["worker-1", "worker-2"], "it could not be reached, for example"

    def test_an_inventory_with_two_clusters(self, run):
        """What the role gives as hosts is one cluster; the other one has nodes, keys and a control plane of the same names."""
        inventory = {
            "k8s_cluster": {"hosts": {"cp-1": {"mesh_node_facts": facts(1)}, "w1": {"mesh_node_name": "worker-1"}}},
            "other": {"hosts": {"other-cp": {"mesh_node_name": "cp-1", "mesh_node_facts": facts(9), "mesh_mtu": "odd"},
                                "other-w": {"mesh_node_name": "worker-1", "mesh_pod_cidrs": ["10.9.0.0/24"]}}},
            "kube_control_plane": {"hosts": {"other-cp": {}, "cp-1": {}}}}
        mixed = run({"nodes_file": NODES_FILE}, inventory)
        assert mixed["failed"] and any("both are node cp-1" in problem for problem in mixed["problems"])
        for play_hosts in (["cp-1", "w1"], ["w1"]):
            result = run({"nodes_file": NODES_FILE, "hosts": ["cp-1", "w1"], "return_document": True}, inventory, play_hosts=play_hosts)
            assert result["document"]["nodes"]["cp-1"]["public_keys"] == {"0": key(1)}
            assert result["document"]["nodes"]["worker-1"]["pod_cidrs"] != ["10.9.0.0/24"]
            assert result["missing"]["hosts_without_node"] == [] and result["missing"]["not_in_inventory"] == ["worker-2", "worker-nocidr"]
        found = run({"source": "kubectl", "hosts": ["cp-1", "w1"], "discover": True}, inventory)
        assert found["delegate_to"] == "cp-1", "the control plane of this cluster"
        found = run({"source": "kubectl", "hosts": ["w1"], "discover": True}, inventory)
        assert found["delegate_to"] == "other-cp", "where none of them is one, the first one"

    def test_hosts_outside_the_play_need_no_node(self, run):
        """One that left the cluster and is still in the inventory is no fault of a run on another one."""
        args = {"nodes_file": NODES_FILE, "hosts": ["cp-1", "gone"]}
        inventory = {"k8s_cluster": {"hosts": {"cp-1": {}, "gone": {}}}}
        assert run(args, inventory, play_hosts=["cp-1"])["missing"]["hosts_without_node"] == []
        assert run(args, inventory, play_hosts=["gone"])["missing"]["hosts_without_node"] == ["gone"]
        assert run(args, inventory, play_hosts=["localhost"])["missing"]["hosts_without_node"] == ["gone"]

    def test_template_that_needs_facts_of_an_absent_host(self, run, tmp_path):
        inventory = json.loads(json.dumps(INVENTORY))
        dest = str(tmp_path / "mesh.json")
        run({"nodes_file": NODES_FILE, "dest": dest}, inventory)
        del inventory["k8s_cluster"]["hosts"]["worker-1"]["public"]
        result = run({"nodes_file": NODES_FILE, "dest": dest}, inventory)
        assert not result["changed"]
        assert any("mesh_endpoint of worker-1 cannot be computed" in warning for warning in result["warnings"])


class TestErrors:

    @pytest.mark.parametrize(("args", "said"), [
        ({"nodes_file": "/nonexistent/nodes.json"}, "nodes_file: /nonexistent/nodes.json cannot be read"),
        ({"nodes_file": os.path.join(FIXTURES, "nodes-forbidden-403.json")}, "403 'Forbidden'"),
        ({"nodes_file": os.path.join(FIXTURES, "watch.jsonl")}, "neither JSON"),
        ({"nodes_file": os.path.join(FIXTURES, "nodes-empty.json")}, "the node list is empty"),
        ({"source": "file"}, "nodes_file is not given"),
        ({}, "no source of the node list"),
        ({"nodes_file": NODES_FILE, "hosts": ["nobody"]}, "hosts: nobody is not in the inventory"),
        ({"nodes_file": NODES_FILE, "node": "nobody"}, "node 'nobody' is not in the mesh document"),
        ({"nodes_file": NODES_FILE, "node": "win-1"}, "node win-1 has no peers of generation 0: it is excluded"),
        ({"nodes_file": NODES_FILE, "dest": "/nonexistent/mesh.json"}, "dest: /nonexistent/mesh.json cannot be written"),
        ({"nodes_file": NODES_FILE, "pod_cidrs_query": "a ||"}, "pod_cidrs_query: 'a ||' is not a JMESPath expression"),
        ({"nodes_file": NODES_FILE, "service_cidrs": ["10.244.0.0/16"]}, "overlaps service CIDR 10.244.0.0/16"),
        ({"source": "kubernetes", "kubeconfig": "/nonexistent/config"}, "kubeconfig: /nonexistent/config does not exist"),
    ])
    def test_message(self, run, args, said):
        result = run(args)
        assert result["failed"]
        assert said in result["msg"]
        assert result["problems"]
        assert not result.get("changed")

    def test_nothing_written_on_error(self, run, tmp_path):
        dest = tmp_path / "mesh.json"
        dest.write_bytes(b"")
        result = run({"nodes_file": NODES_FILE, "dest": str(dest), "previous": [], "service_cidrs": ["10.244.0.0/16"]}, INVENTORY)
        assert result["failed"]
        assert dest.read_bytes() == b""
        result = run({"nodes_file": NODES_FILE, "dest": str(dest)}, INVENTORY)
        assert "previous: %s: this is not a mesh document" % dest in result["msg"]

    def test_all_at_once(self, run):
        inventory = {"all": {"hosts": {
            "cp-1": {"mesh_keepalive": "often", "mesh_node_facts": facts(1)}, "worker-1": {"mesh_node_facts": facts(1)},
            "worker-2": {"mesh_node_facts": {"public_keys": {"0": "x"}}}}}}
        problems = run({"nodes_file": NODES_FILE, "hosts": ["cp-1", "worker-1", "worker-2", "nobody"]}, inventory)["problems"]
        assert len(problems) == 4

    def test_unknown_option(self, run):
        from ansible.errors import AnsibleError
        with pytest.raises(AnsibleError, match="Unsupported parameters"):
            run({"sources": "file"})

    def test_as_a_module(self, capsys):
        from ansible.module_utils import basic
        data = json.dumps({"ANSIBLE_MODULE_ARGS": {"_ansible_check_mode": True}}).encode()
        with mock.patch.object(basic, "_ANSIBLE_ARGS", data), mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy", create=True), \
                pytest.raises(SystemExit):
            module.main()
        result = json.loads(capsys.readouterr().out)
        assert result["failed"]
        assert "runs on the controller, as an action plugin" in result["msg"]

    def test_defaults_of_queries(self):
        for field, query in _membership.DEFAULT_QUERIES.items():
            assert module.ARGUMENT_SPEC["%s_query" % field]["default"] == query

    def test_documentation_is_the_argument_spec(self):
        options = yaml.safe_load(module.DOCUMENTATION)["options"]
        assert set(options) == set(module.ARGUMENT_SPEC)
        for name, spec in module.ARGUMENT_SPEC.items():
            for field in ("type", "elements", "choices", "default"):
                assert options[name].get(field) == spec.get(field), name


class TestData:
    """What comes from the cluster or from nodes is text and stays text."""

    CANARY = "{{ lookup('pipe', 'touch %s') }}"

    @pytest.mark.parametrize("wrap", [str, lambda text: {"public_keys": {"0": text}}, lambda text: {"document": {"serial": text}}])
    def test_facts_are_never_templated(self, run, tmp_path, wrap):
        canary = self.CANARY % (tmp_path / "canary")
        result = run({"nodes_file": NODES_FILE}, {"all": {"hosts": {"cp-1": {"mesh_node_facts": wrap(canary)}}}})
        assert result["failed"]
        assert "lookup" in result["msg"]
        assert not (tmp_path / "canary").exists()

    def test_results_are_plain_or_unsafe_text(self, run):
        def check(value):
            if isinstance(value, dict):
                for name, item in value.items():
                    check(name)
                    check(item)
            elif isinstance(value, list):
                for item in value:
                    check(item)
            elif isinstance(value, str):
                try:
                    from ansible.template import is_trusted_as_template
                    assert not is_trusted_as_template(value)
                except ImportError:
                    assert value.__UNSAFE__
        check(run({"nodes_file": NODES_FILE, "node": "cp-1", "return_document": True}, INVENTORY))


class TestSource:

    def args(self, **more):
        return dict({"nodes": None, "source": "auto", "nodes_file": None, "kubeconfig": None}, **more)

    @pytest.mark.parametrize(("args", "environ", "control_plane", "inventory", "source", "why"), [
        ({"nodes": []}, {}, None, False, "nodes", "given"),
        ({"nodes_file": "x"}, {"KUBECONFIG": NODES_FILE}, "cp-1", True, "file", "nodes_file"),
        ({}, {"KUBECONFIG": NODES_FILE}, "cp-1", True, "kubernetes", "KUBECONFIG"),
        ({}, {"KUBECONFIG": "/nonexistent:" + NODES_FILE}, "cp-1", True, "kubernetes", "KUBECONFIG"),
        ({}, {"KUBECONFIG": "/nonexistent"}, "cp-1", True, "kubectl", "cp-1 is a control plane host"),
        ({}, {"K8S_AUTH_HOST": "https://198.18.0.11:6443"}, "cp-1", True, "kubernetes", "K8S_AUTH_HOST"),
        ({}, {"K8S_AUTH_KUBECONFIG": "/x"}, "cp-1", True, "kubernetes", "K8S_AUTH_KUBECONFIG"),
        ({"kubeconfig": NODES_FILE}, {}, "cp-1", True, "kubernetes", "nodes.json"),
        ({}, {}, "cp-1", True, "kubectl", "no kubeconfig"),
        ({}, {}, None, True, "inventory", "mesh_pod_cidrs"),
        ({"source": "inventory"}, {"KUBECONFIG": NODES_FILE}, "cp-1", False, "inventory", "asked for"),
    ])
    def test_auto(self, args, environ, control_plane, inventory, source, why):
        found = _cluster.choose_source(self.args(**args), environ, "/nonexistent", control_plane, inventory)
        assert found[0] == source
        assert why in found[1]

    def test_kubeconfig_at_home(self, tmp_path):
        (tmp_path / ".kube").mkdir()
        (tmp_path / ".kube" / "config").write_text("{}")
        assert _cluster.choose_source(self.args(), {}, str(tmp_path), None, False)[0] == "kubernetes"

    def test_discover(self, run):
        inventory = {"kube_control_plane": {"hosts": {"cp-1": {}}}, "k8s_cluster": {"hosts": {
            "cp-1": {"mesh_node_facts": facts(1, document={"serial": 6, "sha256": "aa"})},
            "worker-1": {"mesh_node_facts": facts(2, document={"serial": 7, "sha256": "bb"})},
            "worker-2": {"mesh_node_facts": facts(3, document={"serial": 7, "sha256": "bb"})},
            "worker-3": {"mesh_node_facts": facts(4, document={"serial": 7, "sha256": "cc"})},
            "worker-4": {}}}}
        result = run({"discover": True}, inventory, play_hosts=["worker-2"])
        assert {name: result[name] for name in ("source", "delegate_to", "previous_serial", "previous_hosts", "changed")} == {
            "source": "kubectl", "delegate_to": "cp-1", "previous_serial": 7, "previous_hosts": ["worker-2", "worker-3"], "changed": False}
        result = run({"discover": True, "nodes_file": "not read"}, {"all": {"hosts": {"a": {}}}})
        assert (result["source"], result["delegate_to"], result["previous_hosts"], result["previous_serial"]) == ("file", "localhost", [],
                                                                                                                  None)

    def test_document_on_a_host_that_was_not_fetched(self, run):
        inventory = {"all": {"hosts": {"cp-1": {"mesh_node_facts": facts(1, document={"serial": 7, "sha256": "bb"})}}}}
        result = run({"nodes_file": NODES_FILE}, inventory)
        assert "host cp-1: keeps mesh document serial 7, newer than the last one given (none)" in result["msg"]


class TestKubectl:

    INVENTORY = {"kube_control_plane": {"hosts": {"cp-1": {}}}}

    @staticmethod
    def output():
        with open(NODES_FILE, encoding="utf-8") as handle:
            return {"rc": 0, "stdout": handle.read(), "stderr": ""}

    @pytest.mark.parametrize("check", [False, True])
    def test_it_runs_and_check_mode_too(self, run, check):
        seen = []

        def command(module_name, module_args, task_vars):
            seen.append((module_name, module_args, run.action._task.check_mode))
            return self.output()

        result = run({"kubectl_command": ["k3s", "kubectl"]}, self.INVENTORY, delegate_to="cp-1", check=check, command=command)
        assert (result["source"], result["complete"], result["counts"]["pending"]) == ("kubectl", True, 4)
        assert seen == [("ansible.legacy.command", {"argv": ["k3s", "kubectl", "get", "nodes", "-o", "json"]}, False)]
        assert run.action._task.check_mode is check

    def test_delegated_to_the_wrong_host(self, run):
        result = run({}, self.INVENTORY, host="worker-1")
        assert "kubectl is to run on host cp-1, but this task runs on worker-1; add delegate_to: cp-1" in result["msg"]
        # asked for without a host: the task's own host is as good as any
        result = run({"source": "kubectl"}, self.INVENTORY, host="cp-2", command=lambda **kwargs: self.output())
        assert result["source"] == "kubectl"

    @pytest.mark.parametrize(("answer", "said"), [
        ({"rc": 1,
          "stderr": 'Error from server (Forbidden): nodes is forbidden: User "nobody" cannot list resource "nodes" in API group "" at'
                             ' the cluster scope'}, "verbs [get, list]"),
        ({"rc": 1, "stderr": "error: You must be logged in to the server (Unauthorized)"}, "renew the kubeconfig of that host"),
        ({"rc": 1, "stderr": "The connection to the server localhost:8080 was refused - did you specify the right host or port?"},
         "it has no kubeconfig; give kubectl_command: [kubectl, --kubeconfig,"),
        ({"rc": 1,
          "stderr": 'error: error loading config file "/etc/kubernetes/admin.conf": open /etc/kubernetes/admin.conf: permission denied'},
         "run the task with become"),
        ({"rc": 1, "stderr": "Unable to connect to the server: dial tcp 198.18.0.11:6443: i/o timeout"}, "(rc 1): 'Unable to connect"),
        ({"rc": 2, "failed": True, "msg": "[Errno 2] No such file or directory: b'kubectl'"}, "there is no such command"),
        # as ansible-core 2.19 and newer say it
        ({"rc": 2, "failed": True, "msg": "Error executing command."}, "there is no such command"),
        ({"rc": 0, "stdout": "kubectl: welcome"}, "expected NodeList"),
        ({"rc": 0, "stdout": "{"}, "neither JSON"),
        ({"failed": True, "msg": "something else"}, "failed (rc None): 'something else'"),
    ])
    def test_errors(self, run, answer, said):
        result = run({}, self.INVENTORY, delegate_to="cp-1", command=lambda **kwargs: answer)
        assert result["failed"]
        assert said in result["msg"]
        assert "host cp-1" in result["msg"] or "NodeList" in result["msg"]

    def test_auto_without_kubectl_falls_back_and_says_so(self, run):
        missing = {"rc": 2, "failed": True, "msg": "[Errno 2] No such file or directory: b'kubectl'"}
        inventory = {"kube_control_plane": {"hosts": {"cp-1": {"mesh_pod_cidrs": ["10.1.0.0/24"], "mesh_node_addresses": ["198.18.0.1"]}}}}
        result = run({}, inventory, delegate_to="cp-1", command=lambda **kwargs: missing)
        assert (result["source"], result["source_reason"]) == ("inventory",
                                                               "the controller has no kubeconfig, and host cp-1 has no kubectl")
        # refused is not missing: no other source in its place
        refused = {"rc": 1, "stderr": "error: You must be logged in to the server (Unauthorized)"}
        assert run({}, inventory, delegate_to="cp-1", command=lambda **kwargs: refused)["failed"]
        assert run({"source": "kubectl"}, inventory, delegate_to="cp-1", command=lambda **kwargs: missing)["failed"]


class ApiError(Exception):
    def __init__(self, status, body):
        super().__init__("HTTP response headers: Authorization: Bearer s3cr3t")
        self.status, self.body, self.reason = status, body, "reason"


class MaxRetryError(Exception):
    reason = "connection refused"


class TestKubernetes:

    KUBECONFIG = {"current-context": "lab", "contexts": [{"name": "lab", "context": {"cluster": "c", "user": "nobody"}}],
                  "clusters": [{"name": "c", "cluster": {"server": "https://198.18.0.11:6443"}}],
                  "users": [{"name": "nobody", "user": {"token": "s3cr3t"}}]}

    @pytest.fixture
    def kubeconfig(self, tmp_path):
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(self.KUBECONFIG))
        return str(path)

    @pytest.fixture
    def lookup(self, monkeypatch):
        plugin = mock.Mock()
        with open(NODES_FILE, encoding="utf-8") as handle:
            plugin.run.return_value = json.load(handle)["items"]
        monkeypatch.setattr(peers.lookup_loader, "get", lambda name, **kwargs: plugin if name == "kubernetes.core.k8s" else None)
        return plugin

    def test_environment(self, run, kubeconfig, lookup, monkeypatch):
        """Of the environment, kubernetes.core sees nothing beside the kubeconfig of an option but proxies."""
        for name in ("K8S_AUTH_HOST", "K8S_AUTH_API_KEY", "K8S_AUTH_CONTEXT", "K8S_AUTH_PROXY"):
            monkeypatch.setenv(name, "x")
        seen = []
        lookup.run.side_effect = lambda *args, **kwargs: seen.extend(name for name in os.environ if name.startswith("K8S_AUTH_"))
        run({"kubeconfig": kubeconfig})
        assert seen == ["K8S_AUTH_PROXY"]
        assert os.environ["K8S_AUTH_HOST"] == "x"

    def test_list(self, run, kubeconfig, lookup):
        result = run({"kubeconfig": kubeconfig, "context": "lab"})
        assert (result["source"], result["complete"], result["counts"]["pending"]) == ("kubernetes", True, 4)
        dummy, options = lookup.run.call_args
        assert {name: options[name] for name in ("kind", "api_version", "kubeconfig", "context")} == {
            "kind": "Node", "api_version": "v1", "kubeconfig": kubeconfig, "context": "lab"}

    @pytest.mark.parametrize(("fixture", "status", "said"), [
        ("nodes-unauthorized-401.json", 401, "does not accept the credentials (401 Unauthorized) of kubeconfig"),
        ("nodes-forbidden-403.json", 403, 'refuses it (403 nodes is forbidden: User "nobody" cannot list resource "nodes"'),
        ("version.json", 500, "https://198.18.0.11:6443 answers 500 reason"),
    ])
    def test_api_errors(self, run, kubeconfig, lookup, fixture, status, said):
        with open(os.path.join(FIXTURES, fixture), "rb") as handle:
            lookup.run.side_effect = ApiError(status, handle.read())
        result = run({"kubeconfig": kubeconfig})
        assert said in result["msg"]
        assert "context lab, user nobody" in result["msg"]
        assert "s3cr3t" not in json.dumps(result)

    def test_other_errors(self, run, kubeconfig, lookup):
        lookup.run.side_effect = MaxRetryError("url")
        assert "https://198.18.0.11:6443 cannot be reached ('connection refused')" in run({"kubeconfig": kubeconfig})["msg"]
        lookup.run.side_effect = Exception("Requires the Kubernetes Python client. Try `pip install kubernetes`.")
        assert "Requires the Kubernetes Python client" in run({"kubeconfig": kubeconfig})["msg"]

    def test_collection_missing(self, run, kubeconfig, monkeypatch):
        monkeypatch.setattr(peers.lookup_loader, "get", lambda name, **kwargs: None)
        assert "needs the collection kubernetes.core on the controller; install it" in run({"kubeconfig": kubeconfig})["msg"]

    @pytest.mark.parametrize(("text", "args", "said"), [
        (None, {"context": "other"}, "context 'other' is not in kubeconfig"),
        ("[]", {}, "is not a kubeconfig: expected an object, got list"),
        ("{", {}, "cannot be read"),
    ])
    def test_kubeconfig_errors(self, run, kubeconfig, lookup, text, args, said):
        if text is not None:
            with open(kubeconfig, "w", encoding="utf-8") as handle:
                handle.write(text)
        assert said in run(dict(args, kubeconfig=kubeconfig))["msg"]
        assert not lookup.run.called


# --- pod sources ---------------------------------------------------------------------------------------------------------------------

def pod(name, node, *addresses):
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": {"nodeName": node},
            "status": {"phase": "Running", "podIPs": [{"ip": address} for address in addresses]}}


def affinity(cidr, node):
    return {"kind": "BlockAffinity", "metadata": {"name": "%s-%s" % (node, cidr.replace("/", "-").replace(".", "-"))},
            "spec": {"cidr": cidr, "node": node, "state": "confirmed", "deleted": "false"}}


def ipam_block(cidr, node, allocations):
    places = [None] * 4
    for ordinal in allocations:
        places[ordinal] = sorted(allocations).index(ordinal)
    return {"kind": "IPAMBlock", "metadata": {"name": cidr.replace("/", "-").replace(".", "-")}, "spec": {
        "cidr": cidr, "affinity": "host:" + node, "allocations": places, "deleted": False,
        "attributes": [{"handle_id": "h", "secondary": {"node": allocations[ordinal]}} for ordinal in sorted(allocations)]}}


PODS = [pod("p1", "worker-1", "10.9.0.2"), pod("p2", "worker-1", "10.9.0.3"), pod("p3", "worker-2", "10.9.0.4", "fd09::4"),
        pod("p4", "worker-1", "10.9.0.8"), pod("p5", "worker-2", "10.9.0.9")]
OF_PODS = {"cp-1": [], "worker-1": ["10.9.0.2/31", "10.9.0.8/32"], "worker-2": ["10.9.0.4/32", "10.9.0.9/32", "fd09::4/128"]}
CALICO = [affinity("10.9.0.0/30", "worker-1"), affinity("10.9.0.4/30", "worker-2"), affinity("10.9.0.8/30", "worker-2"),
          ipam_block("10.9.0.0/30", "worker-1", {0: "worker-1", 2: "worker-2"}), ipam_block("10.9.0.4/30", "worker-2", {0: "worker-2"})]
OF_CALICO = {"cp-1": [], "worker-1": ["10.9.0.0/30"], "worker-2": ["10.9.0.2/32", "10.9.0.4/30", "10.9.0.8/30"]}
CILIUM = [{"kind": "CiliumNode", "metadata": {"name": "worker-1"}, "spec": {"ipam": {"podCIDRs": ["10.9.1.0/24"]}}}]
OF_CILIUM = {"cp-1": [], "worker-1": ["10.9.1.0/24"], "worker-2": []}
POD_SOURCES = [("pods", PODS, OF_PODS), ("calico_ipam", CALICO, OF_CALICO), ("cilium", CILIUM, OF_CILIUM)]
PLURALS = {"Pod": "pods", "BlockAffinity": "blockaffinities", "IPAMBlock": "ipamblocks", "CiliumNode": "ciliumnodes"}


def nodes_list():
    with open(NODES_FILE, encoding="utf-8") as handle:
        return json.load(handle)


def pod_cidrs(result):
    assert not result.get("failed"), result["msg"]
    return {name: result["document"]["nodes"][name]["pod_cidrs"] for name in OF_PODS}


class TestPodSources:

    @pytest.mark.parametrize(("source", "objects", "wanted"), POD_SOURCES)
    @pytest.mark.parametrize("saved", [True, False])
    def test_in_one_list(self, run, tmp_path, source, objects, wanted, saved):
        listing = dict(nodes_list(), kind="List")
        listing["items"] = objects + [dict(item, kind="Node") for item in listing["items"]]
        path = tmp_path / "cluster.json"
        path.write_text(json.dumps(listing))
        given = {"nodes_file": str(path)} if saved else {"nodes": listing["items"]}
        assert pod_cidrs(run(dict(given, pod_source=source, return_document=True), INVENTORY)) == wanted

    def test_of_a_list_without_them(self, run, tmp_path):
        said = run({"nodes_file": NODES_FILE, "pod_source": "calico_ipam"}, INVENTORY)["msg"]
        assert "holds no BlockAffinity and no IPAMBlock objects" in said
        assert "kubectl get nodes,blockaffinities.crd.projectcalico.org,ipamblocks.crd.projectcalico.org --all-namespaces -o json" in said
        listing = nodes_list()
        listing["items"] += PODS
        path = tmp_path / "page.json"
        path.write_text(json.dumps(dict(listing, metadata={"continue": "abc"})))
        said = run({"nodes_file": str(path), "pod_source": "pods", "nodes_complete": True}, INVENTORY)["msg"]
        assert "one page of a longer list" in said and "save the whole list" in said

    def test_what_does_not_go_together(self, run):
        inventory = {"all": {"hosts": {"a": {"mesh_pod_cidrs": ["10.1.0.0/24"], "mesh_node_addresses": ["198.18.0.1"]}}}}
        for more in ({}, {"discover": True}, {"source": "inventory"}):
            result = run(dict(more, pod_source="pods"), inventory)
            assert result["failed"] and "the nodes come from the inventory, which knows nothing of pods" in result["msg"]
        said = run({"nodes_file": NODES_FILE, "pod_source": "pods", "pod_cidrs_query": "spec.x"}, INVENTORY)["msg"]
        assert "only one of them can say where pod CIDRs come from" in said

    def test_what_a_host_says_counts_more(self, run):
        inventory = {"all": {"hosts": {"worker-1": {"mesh_pod_cidrs": ["10.8.0.0/24"]}}}}
        result = run({"nodes": nodes_list()["items"] + PODS, "pod_source": "pods", "return_document": True}, inventory)
        assert pod_cidrs(result) == dict(OF_PODS, **{"worker-1": ["10.8.0.0/24"]})

    @pytest.mark.parametrize(("source", "objects", "wanted"), POD_SOURCES)
    def test_kubectl(self, run, source, objects, wanted):
        seen = []

        def command(module_name, module_args, task_vars):
            seen.append(module_args["argv"])
            plural = module_args["argv"][3].split(".")[0]
            items = nodes_list()["items"] if plural == "nodes" else [item for item in objects if PLURALS[item["kind"]] == plural]
            return {"rc": 0, "stdout": json.dumps({"kind": "List", "apiVersion": "v1", "items": items}), "stderr": ""}

        args = {"source": "kubectl", "kubectl_command": ["k3s", "kubectl"], "pod_source": source, "return_document": True}
        assert pod_cidrs(run(args, {"kube_control_plane": {"hosts": {"cp-1": {}}}}, delegate_to="cp-1", command=command)) == wanted
        assert [argv[3] for argv in seen[1:]] == {
            "pods": ["pods"], "calico_ipam": ["blockaffinities.crd.projectcalico.org", "ipamblocks.crd.projectcalico.org"],
            "cilium": ["ciliumnodes.cilium.io"]}[source]
        if source == "pods":
            assert seen[1] == ["k3s", "kubectl", "get", "pods", "--all-namespaces", "-o", "json", "--field-selector",
                               "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"]

    @pytest.mark.parametrize(("answer", "said"), [
        ({"rc": 1, "stderr": 'Error from server (Forbidden): blockaffinities.crd.projectcalico.org is forbidden: User "u" cannot list'},
         "give it a ClusterRole with apiGroups ['crd.projectcalico.org'], resources [blockaffinities] and verbs [list]"),
        ({"rc": 1, "stderr": 'error: the server doesn\'t have a resource type "blockaffinities"'}, "this cluster has no blockaffinities"),
        ({"rc": 0, "stdout": '{"kind": "Status"}'}, "the answer is of kind 'Status', expected BlockAffinityList"),
        ({"rc": 0, "stdout": "{"}, "the output of kubectl get blockaffinities.crd.projectcalico.org --all-namespaces -o json on host cp-1"),
    ])
    def test_kubectl_errors(self, run, answer, said):
        def command(module_name, module_args, task_vars):
            return {"rc": 0, "stdout": json.dumps(nodes_list())} if "nodes" in module_args["argv"] else answer

        result = run({"source": "kubectl", "pod_source": "calico_ipam"}, {"kube_control_plane": {"hosts": {"cp-1": {}}}},
                     delegate_to="cp-1", command=command)
        assert result["failed"] and said in result["msg"], result["msg"]


class TestPodSourcesOfTheApi:

    TOKEN = "s3cr3t-t0ken"

    @pytest.fixture
    def api(self, tmp_path, monkeypatch):
        pytest.importorskip("kubernetes")
        pytest.importorskip("ansible_collections.kubernetes.core.plugins.module_utils.k8s.client")
        # What kubernetes.core keeps of a server's discovery: the port of another test's server may be this one's.
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr(_cluster, "PAGE_SIZE", 2)
        lookup = mock.Mock()
        lookup.run.return_value = nodes_list()["items"]
        monkeypatch.setattr(peers.lookup_loader, "get", lambda name, **kwargs: lookup)
        with apiserver.ApiServer(tokens={"ansible": self.TOKEN}) as server:
            server.write_kubeconfig(tmp_path / "kubeconfig", self.TOKEN)
            for dummy, objects, dummy2 in POD_SOURCES:
                for item in objects:
                    server.apply(PLURALS[item["kind"]], item)
            yield server

    def args(self, tmp_path, source):
        return {"kubeconfig": str(tmp_path / "kubeconfig"), "pod_source": source, "return_document": True}

    @pytest.mark.parametrize(("source", "wanted"), [(source, wanted) for source, dummy, wanted in POD_SOURCES])
    def test_lists_in_pages(self, run, api, tmp_path, source, wanted):
        api.apply("pods", dict(pod("done", "cp-1", "10.9.0.77"), status={"phase": "Succeeded", "podIPs": [{"ip": "10.9.0.77"}]}))
        api.apply("pods", pod("waits", "", "10.9.0.78"))
        assert pod_cidrs(run(self.args(tmp_path, source))) == wanted
        if source == "pods":
            asked = [request for request in api.requests if request["resource"] == "pods"]
            assert len(asked) == 3 and all(request["query"]["limit"] == "2" for request in asked), "five pods: the server left out two"

    def test_the_environment_leads_nowhere_else(self, run, api, tmp_path, monkeypatch):
        """Beside a kubeconfig, the credential that AWX has set for another cluster does not count; afterwards it is there again."""
        other = {"K8S_AUTH_HOST": "http://127.0.0.1:1", "K8S_AUTH_API_KEY": "of-the-other"}
        for name, value in other.items():
            monkeypatch.setenv(name, value)
        assert not run(self.args(tmp_path, "pods")).get("failed")
        assert all(request["token"] == self.TOKEN for request in api.requests) and api.requests
        assert {name: os.environ.get(name) for name in other} == other

    @pytest.mark.parametrize(("source", "plural", "group"), [
        ("pods", "pods", ""), ("calico_ipam", "blockaffinities", "crd.projectcalico.org"),
        ("calico_ipam", "ipamblocks", "crd.projectcalico.org"), ("cilium", "ciliumnodes", "cilium.io")])
    def test_no_rights(self, run, api, tmp_path, source, plural, group):
        api.refuse("list", plural, None)
        result = run(self.args(tmp_path, source))
        assert result["failed"] and "listing %s: the API server %s refuses it (403" % (plural, api.url) in result["msg"]
        assert "apiGroups ['%s'], resources [%s] and verbs [list]" % (group, plural) in result["msg"]
        assert self.TOKEN not in json.dumps(result)

    @pytest.mark.parametrize(("source", "plural"), [("calico_ipam", "ipamblocks"), ("cilium", "ciliumnodes")])
    def test_no_such_resource(self, run, api, tmp_path, source, plural):
        api.fault("status", verb="list", resource=plural, code=404)
        result = run(self.args(tmp_path, source))
        assert result["failed"]
        assert "listing %s: the API server %s answers 404: this cluster has no %s" % (plural, api.url, plural) in result["msg"]
        assert "set pod_source (mesh_pod_source)" in result["msg"]

    def test_an_empty_answer_takes_nothing_down(self, run, api, tmp_path):
        dest = tmp_path / "mesh.json"
        args = dict(self.args(tmp_path, "pods"), dest=str(dest))
        run(args)
        before = dest.read_bytes()
        api.fault("empty", verb="list", resource="pods")
        result = run(args)
        assert result["failed"] and "no node has a pod CIDR any more" in result["msg"]
        assert dest.read_bytes() == before

    @pytest.mark.parametrize(("fault", "more"), [("garbage", {"body": "hello"}), ("half", {"bytes": 40}), ("status", {"code": 500})])
    def test_broken_answers(self, run, api, tmp_path, fault, more):
        api.fault(fault, verb="list", resource="ciliumnodes", times=None, **more)
        result = run(self.args(tmp_path, "cilium"))
        assert result["failed"] and "listing ciliumnodes" in result["msg"]

    def test_jinja_in_a_name_is_text(self, run, api, tmp_path):
        canary = "{{ lookup('pipe', 'touch %s') }}" % (tmp_path / "canary")
        api.apply("blockaffinities", dict(affinity("10.9.3.0/30", "x"), spec={"cidr": canary, "node": canary, "state": "confirmed"}))
        result = run(self.args(tmp_path, "calico_ipam"))
        assert result["failed"] and "lookup" in result["msg"] and not (tmp_path / "canary").exists()


# --- with ansible-playbook -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def playbook(tmp_path):
    """-> function(inventory, plays, *options) that runs ansible-playbook and returns (rc, output)."""
    if not os.path.isdir(os.path.join(COLLECTIONS, "ansible_collections")):
        pytest.skip("the collection is not below a directory ansible_collections")

    def run_playbook(inventory, plays, *options, **environ):
        (tmp_path / "inventory.json").write_text(json.dumps(inventory))
        (tmp_path / "play.yml").write_text(json.dumps(plays))
        paths = [COLLECTIONS] + [path for path in os.environ.get("ANSIBLE_COLLECTIONS_PATH", "").split(os.pathsep) if path]
        env = dict(os.environ, ANSIBLE_COLLECTIONS_PATH=os.pathsep.join(paths), ANSIBLE_LOCAL_TEMP=str(tmp_path / "local"),
                   ANSIBLE_REMOTE_TEMP=str(tmp_path / "remote"), ANSIBLE_NOCOLOR="1", ANSIBLE_DEPRECATION_WARNINGS="0", LC_ALL="C.UTF-8",
                   ANSIBLE_PYTHON_INTERPRETER=sys.executable, **environ)
        done = subprocess.run([sys.executable, "-m", "ansible.cli.playbook", "-i", str(tmp_path / "inventory.json"), *options,
                               str(tmp_path / "play.yml")], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              stdin=subprocess.DEVNULL, cwd=str(tmp_path), check=False)
        return done.returncode, done.stdout

    return run_playbook


LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


class TestPlaybook:

    def test_limit_templates_and_kubectl(self, playbook, tmp_path):
        """One run of the real thing: --limit, --check, data with Jinja in it, kubectl on a delegated host."""
        canary = tmp_path / "canary"
        with open(NODES_FILE, encoding="utf-8") as handle:
            listing = json.load(handle)
        listing["items"][0]["metadata"]["annotations"] = {"kubemesh.wireguard/public-key-0": "{{ lookup('pipe', 'touch %s') }}" % canary}
        (tmp_path / "listing.json").write_text(json.dumps(listing))
        kubectl = tmp_path / "kubectl"
        kubectl.write_text("#!/bin/sh\n[ \"$*\" = 'get nodes -o json' ] && cat %s/listing.json\n" % tmp_path)
        kubectl.chmod(0o755)
        dest = tmp_path / "mesh.json"
        inventory = {"all": {"vars": LOCAL, "children": {
            "kube_control_plane": {"hosts": {"cp-1": {}}},
            "k8s_cluster": {"hosts": {
                "cp-1": {}, "worker-1": {"mesh_node_facts": facts(2), "mesh_endpoint": "{{ public }}", "public": "203.0.113.12"},
                "worker-2": {"mesh_node_facts": facts(3)}}}}}}
        task = {"kubemesh.wireguard.peers": {"kubectl_command": [str(kubectl)], "dest": str(dest)}, "delegate_to": "cp-1", "run_once": True,
                "register": "result"}
        show = {"ansible.builtin.debug": {"msg": "seen {{ result }} {{ result.warnings }}"}}
        again = {"ansible.builtin.set_fact": {"seen": "{{ result.warnings[0] }} and {{ result.warnings }}"}}
        plays = [{"hosts": "k8s_cluster", "gather_facts": False, "tasks": [task, show, again, {"ansible.builtin.debug": {"var": "seen"}}]}]

        rc, output = playbook(inventory, plays, "--limit", "worker-2", "--check", "--diff")
        assert rc == 0, output
        assert not dest.exists()
        assert "node worker-1 joined: member" in output

        rc, output = playbook(inventory, plays, "--limit", "worker-2", "-vvvv")
        assert rc == 0, output
        document = _mesh.load_document(dest.read_bytes())
        assert document["nodes"]["worker-1"]["endpoints"] == {"ipv4": {"address": "203.0.113.12", "port": None}}
        assert document["nodes"]["worker-1"]["public_keys"] == {"0": key(2)}
        assert document["nodes"]["cp-1"]["state"] == "pending"
        assert "annotation kubemesh.wireguard/public-key-0" in output
        assert not canary.exists()

        rc, output = playbook(inventory, plays, "--limit", "worker-1")
        assert rc == 0, output
        assert "changed=0" in output

    def test_against_an_api_server(self, playbook, tmp_path):
        """kubernetes.core's lookup against recorded answers of a real API server."""
        pytest.importorskip("kubernetes")
        pytest.importorskip("ansible_collections.kubernetes.core.plugins.lookup.k8s")
        from ansible_collections.kubernetes import core
        where = os.path.abspath(os.path.join(next(iter(core.__path__)), "..", "..", ".."))
        answers = {"/version": (200, "version.json"), "/api/v1/nodes": (200, "nodes.json")}

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                path = self.path.split("?")[0]
                code = 200
                if path in answers:
                    code, fixture = answers[path]
                    with open(os.path.join(FIXTURES, fixture), "rb") as handle:
                        body = handle.read()
                else:
                    body = json.dumps({
                        "/api": {"kind": "APIVersions", "versions": ["v1"]},
                        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
                        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
                            {"name": "nodes", "singularName": "node", "namespaced": False, "kind": "Node", "verbs": ["get", "list"]}]},
                    }[path]).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = json.loads(json.dumps(TestKubernetes.KUBECONFIG).replace("https://198.18.0.11:6443",
                                                                          "http://127.0.0.1:%d" % server.server_port))
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(json.dumps(config))
        plays = [{"hosts": "all", "gather_facts": False, "tasks": [
            {"kubemesh.wireguard.peers": {"kubeconfig": str(kubeconfig)}, "register": "result"},
            {"ansible.builtin.debug": {"msg": "{{ result.source }} {{ result.counts }}"}}]}]
        inventory = {"all": {"hosts": {"localhost": LOCAL}}}
        environ = {"ANSIBLE_COLLECTIONS_PATH": os.pathsep.join([COLLECTIONS, where]), "K8S_AUTH_VERIFY_SSL": "no"}
        with mock.patch.dict(os.environ, environ):
            rc, output = playbook(inventory, plays, "-vvvv")
            assert rc == 0, output
            assert "'pending': 4" in output
            assert "s3cr3t" not in output
            for fixture, status, said in (("nodes-forbidden-403.json", 403, "refuses it (403 nodes is forbidden"),
                                          ("nodes-unauthorized-401.json", 401, "does not accept the credentials (401 Unauthorized)")):
                answers["/api/v1/nodes"] = (status, fixture)
                rc, output = playbook(inventory, plays)
                assert rc == 2
                assert said in " ".join(output.split())
                assert "s3cr3t" not in output
            server.shutdown()
            server.server_close()
            rc, output = playbook(inventory, plays)
            assert rc == 2
            assert "cannot be reached" in output
