# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Published keys against an API server: the action in this process, and whole runs of ansible-playbook together with `peers`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest

pytest.importorskip("jmespath")
pytest.importorskip("netaddr")
pytest.importorskip("kubernetes")
pytest.importorskip("ansible.plugins.action")  # not where only modules are tested
pytest.importorskip("ansible_collections.kubernetes.core.plugins.module_utils.k8s.client")
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.kubernetes import core

from ansible_collections.kubemesh.wireguard.plugins.action import published_keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh
from ansible_collections.kubemesh.wireguard.plugins.modules import published_keys as module

HERE = os.path.dirname(os.path.abspath(__file__))
# the directory that holds ansible_collections, as this test was imported from
COLLECTIONS = os.path.abspath(os.path.join(os.path.dirname(published_keys.__file__), "..", "..", "..", "..", ".."))
OTHERS = os.path.abspath(os.path.join(next(iter(core.__path__)), "..", "..", ".."))
sys.path.insert(0, os.path.abspath(os.path.join(HERE, "..", "..", "..", "api")))
import apiserver

TOKEN = "s3cr3t-t0ken"
KEY0, KEY1 = "kubemesh.wireguard/public-key-0", "kubemesh.wireguard/public-key-1"
LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def annotations(api, name):
    found = api.get("nodes", name)["metadata"]["annotations"]
    return {generation: found[annotation] for generation, annotation in (("0", KEY0), ("1", KEY1)) if annotation in found}


def document_of(api, keys, generations=(0, 1)):
    """A mesh document of the Nodes that the API has."""
    members, problems = _membership.nodes_from_k8s([dict(api.get("nodes", name), kind="Node") for name in api.names("nodes")])
    assert not problems
    return _membership.build_document(members, keys, None, {"complete": True, "generations": generations})[0]


@pytest.fixture(autouse=True)
def no_cluster_around(monkeypatch, tmp_path):
    """Nothing of the machine that runs the tests: no kubeconfig, no home, nothing that kubernetes.core kept of another test's server."""
    for name in list(os.environ):
        if name.startswith("K8S_AUTH_") or name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def api(tmp_path):
    with apiserver.ApiServer(tokens={"ansible": TOKEN}, tls_dir=tmp_path / "tls") as server:
        for number in (1, 2, 3):
            server.apply("nodes", apiserver.node("worker-%d" % number, ["10.244.%d.0/24" % number], ["198.18.0.%d" % number]))
        server.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)
        yield server


def keys(*numbers, generation="0"):
    return {"worker-%d" % number: {generation: key(number)} for number in numbers}


@pytest.fixture
def publish(api, tmp_path):
    """-> function(document, ...) that runs the action in this process and returns its result."""
    def run(document=None, check=False, diff=True, execute=None, **args):
        path = tmp_path / "mesh.json"
        path.write_bytes(_mesh.document_bytes(document_of(api, keys(1, 2, 3)) if document is None else document))
        task = mock.Mock(args=dict({"document": [str(path)], "kubeconfig": str(tmp_path / "kubeconfig")}, **args), check_mode=check,
                         diff=diff, delegate_to="cp-1", async_val=0, action="kubemesh.wireguard.published_keys", no_log=False)
        action = published_keys.ActionModule(task=task, connection=mock.Mock(), play_context=mock.Mock(), loader=mock.Mock(),
                                             templar=mock.Mock(), shared_loader_obj=mock.Mock())
        action._load_name = "kubemesh.wireguard.published_keys"  # set by the loader, and used by ansible-core 2.18 in a message
        action._execute_module = mock.Mock(side_effect=execute or AssertionError("no module expected"))
        result = action.run(task_vars={})
        assert TOKEN not in json.dumps(result)
        return result

    return run


class TestAction:
    def test_publish_then_nothing(self, api, publish):
        checked = publish(check=True)
        assert (checked["changed"], checked["nodes"], api.asked(verb="patch")) == (True, 3, 0)
        result = publish()
        assert result == checked
        assert [annotations(api, "worker-%d" % number) for number in (1, 2, 3)] == [{"0": key(1)}, {"0": key(2)}, {"0": key(3)}]
        assert result["diff"]["before"] == "" and "node worker-2, %s: %s\n" % (KEY0, key(2)) in result["diff"]["after"]
        assert api.get("nodes", "worker-1")["metadata"]["annotations"]["node.alpha.kubernetes.io/ttl"] == "0"
        again = publish()
        assert (again["changed"], again["nodes"], again["changes"], "diff" in again) == (False, 0, [], False)
        assert api.asked(verb="patch") == 3

    def test_each_write_is_a_merge_patch_with_the_uid(self, api, publish):
        publish()
        for request in api.requests:
            if request["verb"] == "patch":
                assert request["patch"]["metadata"]["uid"] == api.get("nodes", request["name"])["metadata"]["uid"]
                assert set(request["patch"]) == {"metadata"} and set(request["patch"]["metadata"]) == {"uid", "annotations"}

    def test_a_rotation(self, api, publish):
        """At no time is a node without a published key that it has, nor one published that it has not."""
        publish()
        both = document_of(api, {name: dict(keys(1, 2, 3)[name], **{"1": key(10 + number)}) for number, name in enumerate(keys(1, 2, 3))})
        assert publish(both, generations=[1])["nodes"] == 3
        assert annotations(api, "worker-2") == {"0": key(2), "1": key(11)}
        last = document_of(api, {}, generations=[1])
        result = publish(last)
        assert annotations(api, "worker-2") == {"1": key(11)}
        assert "- node worker-2, %s: %s" % (KEY0, key(2)) in result["changes"]
        # Interrupted before the nodes had the last document: the old keys, which are destroyed, are not published again.
        assert publish(both, generations=[1])["changed"] is False

    def test_a_node_that_is_replaced_meanwhile(self, api, publish, monkeypatch):
        read = published_keys._published_keys.nodes_read

        def and_then(items):
            nodes = read(items)
            api.recreate("nodes", "worker-2")
            api.delete("nodes", "worker-3")
            return nodes
        monkeypatch.setattr(published_keys._published_keys, "nodes_read", and_then)
        result = publish()
        assert (result["nodes"], result["replaced"], result["problem"]) == (1, ["worker-2", "worker-3"], "")
        assert annotations(api, "worker-2") == {}
        assert len(result["warnings"]) == 1 and "worker-2, worker-3 was deleted while" in result["warnings"][0]

    @pytest.mark.parametrize("required", [True, False])
    def test_without_the_right(self, api, publish, required):
        api.refuse("patch", "nodes", None)
        result = publish(required=required)
        assert result["problem"].startswith("writing public keys as annotations of Nodes: the API server https://127.0.0.1:")
        assert "lacks the right to patch nodes" in result["problem"] and "3 of 3 Nodes were not written" in result["problem"]
        assert "entry point rbac" in result["problem"]
        assert api.asked(verb="patch") == 1, "what is refused once is not asked for each Node"
        assert bool(result.get("failed")) is required and result["changed"] is False
        assert len(result["warnings"]) == (0 if required else 1)
        if not required:
            assert "the run goes on: keys are taken from what hosts report" in result["warnings"][0]

    def test_an_api_that_is_away(self, api, publish):
        document = document_of(api, keys(1, 2, 3))
        api.down()
        result = publish(document, required=False)
        assert "failed" not in result and len(result["warnings"]) == 1 and "cannot be reached" in result["warnings"][0]
        api.up()
        api.fault("status", verb="patch", code=503, times=1)
        result = publish(document, required=False)
        assert "answers 503 fault on demand" in result["problem"] and result["nodes"] == 0
        # What was written before the API went away is told as written.
        api.fault("status", verb="patch", code=503, times=None)
        api.faults[-1].fits = lambda request: request["verb"] == "patch" and request["name"] == "worker-3"
        result = publish(document, required=False)
        assert (result["changed"], result["nodes"]) == (True, 2)
        assert "node worker-3; 1 of 3 Nodes were not written" in result["problem"]

    def test_many_nodes(self, api, publish, monkeypatch):
        shown = []
        monkeypatch.setattr(published_keys, "PROGRESS", 100)
        monkeypatch.setattr(published_keys.display, "display", shown.append)
        for number in range(4, 151):
            api.apply("nodes", apiserver.node("worker-%d" % number, ["10.245.%d.0/24" % number], ["198.18.1.%d" % number]))
        result = publish(document_of(api, keys(*range(1, 151))))
        assert result["nodes"] == 150 and len(result["changes"]) == 150
        assert all(annotations(api, "worker-%d" % number) == {"0": key(number)} for number in range(1, 151))
        assert shown == ["published_keys: %d of 150 Nodes" % number for number in (1, 101, 150)]

    def test_remove(self, api, publish):
        publish()
        api.patch("nodes", "worker-2", {"metadata": {"annotations": {KEY1: "{{ 7 * 7 }}"}}})
        checked = publish(state="absent", check=True)
        result = publish(state="absent")
        assert checked == result and result["nodes"] == 3
        assert "node worker-2, %s: '{{ 7 * 7 }}'" % KEY1 in result["diff"]["before"] and result["diff"]["after"] == ""
        assert [annotations(api, name) for name in api.names("nodes")] == [{}, {}, {}]
        assert publish(state="absent")["changed"] is False

    def test_not_from_another_cluster(self, api, publish):
        publish()
        ours = document_of(api, keys(1, 2, 3))
        for name in api.names("nodes"):
            api.recreate("nodes", name)
        result = publish(ours, state="absent", required=False)
        assert "are not of this mesh" in result["problem"]
        assert "remove them by hand: kubectl annotate nodes --all %s- %s-" % (KEY0, KEY1) in result["warnings"][0]
        assert annotations(api, "worker-1") == {"0": key(1)}

    def test_a_host_for_kubectl_that_is_away(self, publish):
        def away(**dummy):
            raise AnsibleConnectionFailure("no route to host")
        result = publish(source="kubectl", required=False, execute=away)
        assert "failed" not in result and len(result["warnings"]) == 1 and "no route to host" in result["warnings"][0]
        with pytest.raises(AnsibleConnectionFailure):
            publish(source="kubectl", execute=away)


# kubectl sends no token without TLS, and the server of the tests has it.
@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
class TestKubectl:
    @pytest.fixture
    def by_kubectl(self, publish, tmp_path):
        """The action, with the module run in this process instead of on a host."""
        command = ["kubectl", "--kubeconfig", str(tmp_path / "kubeconfig"), "--cache-dir", str(tmp_path / "cache")]

        def run(document=None, check=False, **args):
            def execute(module_name, module_args, task_vars):
                stub = mock.Mock(params=module_args, check_mode=check)
                stub.exit_json.side_effect = stub.fail_json.side_effect = SystemExit
                with mock.patch.object(module, "AnsibleModule", return_value=stub), pytest.raises(SystemExit):
                    module.main()
                if stub.fail_json.called:
                    return dict(stub.fail_json.call_args[1], failed=True)
                return json.loads(json.dumps(stub.exit_json.call_args[1]))
            return publish(document, check=check, source="kubectl", kubectl_command=args.pop("command", command), execute=execute, **args)
        return run

    def test_publish_and_remove(self, api, by_kubectl):
        checked = by_kubectl(check=True)
        assert checked["nodes"] == 3 and api.asked(verb="patch") == 0
        assert by_kubectl() == checked
        assert annotations(api, "worker-3") == {"0": key(3)}
        assert by_kubectl()["changed"] is False and api.asked(verb="patch") == 3
        assert by_kubectl(state="absent")["nodes"] == 3
        assert annotations(api, "worker-3") == {}

    def test_what_can_go_wrong(self, api, by_kubectl, monkeypatch):
        api.refuse("patch", "nodes", None)
        result = by_kubectl(required=False)
        assert "Forbidden" in result["problem"] and len(result["warnings"]) == 1
        assert "lacks the right to patch nodes" in result["warnings"][0]
        assert api.asked(verb="patch") == 1
        api.permit()
        document = document_of(api, keys(1, 2, 3))
        read = module._published_keys.nodes_read

        def and_then(items):
            nodes = read(items)
            api.recreate("nodes", "worker-2")
            api.delete("nodes", "worker-3")
            return nodes
        with monkeypatch.context() as patched:
            patched.setattr(module._published_keys, "nodes_read", and_then)
            result = by_kubectl(document)
        assert (result["nodes"], result["replaced"], annotations(api, "worker-2")) == (1, ["worker-2", "worker-3"], {})
        api.down()
        result = by_kubectl(document, required=False)
        assert result["problem"].startswith("listing nodes with kubectl") and "was refused" in result["problem"]
        assert "memcache" not in result["problem"], "lines of kubectl's log"
        result = by_kubectl(document, required=False, command=["/nonexistent/kubectl"])
        assert "there is no such command" in result["problem"]


@pytest.fixture
def playbook(tmp_path):
    """-> function(inventory, tasks, *options) that runs ansible-playbook: (return code, output on one line)."""
    def run(inventory, tasks, *options, **play):
        files = {"inventory.yml": inventory, "play.yml": [dict({"hosts": "all", "gather_facts": False, "tasks": tasks}, **play)]}
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        env = dict(os.environ, ANSIBLE_COLLECTIONS_PATH=os.pathsep.join([COLLECTIONS, OTHERS]), ANSIBLE_LOCAL_TEMP=str(tmp_path / "local"),
                   ANSIBLE_NOCOLOR="1", LC_ALL="C.UTF-8", ANSIBLE_TIMEOUT="2", ANSIBLE_DEPRECATION_WARNINGS="0")
        done = subprocess.run([sys.executable, "-m", "ansible.cli.playbook", "-i", str(tmp_path / "inventory.yml"),
                               str(tmp_path / "play.yml"), *options], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, cwd=str(tmp_path), check=False)
        assert TOKEN not in done.stdout
        return done.returncode, " ".join(done.stdout.split())

    return run


class TestRuns:
    """What the role does, without a mesh: hosts report keys, `peers` merges what is known, and the result is published."""

    @staticmethod
    def tasks(tmp_path):
        common = {"kubeconfig": str(tmp_path / "kubeconfig")}
        return [
            {"ansible.builtin.raw": "true", "changed_when": False},  # whoever is away leaves here
            {"ansible.builtin.set_fact": {"mesh_node_facts": {"public_keys": {"0": "{{ own_key }}"}}}, "changed_when": False},
            {"kubemesh.wireguard.peers": dict(common, dest=str(tmp_path / "mesh.json"), source="kubernetes"), "register": "found",
             "run_once": True, "changed_when": False, "check_mode": False},
            {"ansible.builtin.debug": {"msg": "members {{ found.members }}, pending {{ found.pending }}, differ {{ found.annotations }}"},
             "run_once": True},
            {"kubemesh.wireguard.published_keys": dict(common, document=[str(tmp_path / "mesh.json")]), "run_once": True}]

    @staticmethod
    def inventory(*numbers, **hosts):
        return {"all": {"vars": LOCAL, "hosts": {
            "worker-%d" % number: dict({"own_key": key(number)}, **hosts.get("worker_%d" % number, {})) for number in numbers}}}

    def test_parts_of_a_cluster(self, api, playbook, tmp_path):
        """A host that is away, a slice without any document, --limit, and annotations that somebody changed."""
        tasks, document, canary = self.tasks(tmp_path), tmp_path / "mesh.json", tmp_path / "canary"
        away = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}

        rc, output = playbook(self.inventory(1, 2, 3, worker_3=away), tasks)
        assert rc == 4 and "pending {'worker-3': 'no public key known yet'}" in output, output
        assert [annotations(api, "worker-%d" % number) for number in (1, 2, 3)] == [{"0": key(1)}, {"0": key(2)}, {}]

        # The part of the inventory that has only the third host, and none of what the other run left behind but the annotations.
        document.unlink()
        rc, output = playbook(self.inventory(3), tasks)
        assert rc == 0 and "members ['worker-1', 'worker-2', 'worker-3']" in output, output
        known = _mesh.load_document(document.read_bytes())
        assert {name: entry["public_keys"] for name, entry in known["nodes"].items()} == keys(1, 2, 3)
        assert annotations(api, "worker-3") == {"0": key(3)} and api.asked(verb="patch") == 3

        api.patch("nodes", "worker-1", {"metadata": {"annotations": {KEY0: key(9)}}})
        jinja = "{{ lookup('pipe', 'touch %s') }}" % canary
        api.patch("nodes", "worker-2", {"metadata": {"annotations": {KEY0: jinja}}})
        rc, output = playbook(self.inventory(1, 2, 3), tasks, "--limit", "worker-3", "--diff", "-vvv")
        assert rc == 0, output
        assert "node worker-1: its public key of generation 0 is now %s (from its annotation %s)" % (key(9), KEY0) in output
        assert "node worker-2, annotation %s: \"{{ lookup('pipe'" % KEY0 in output
        assert annotations(api, "worker-1") == {"0": key(9)}, "nobody of this run knows better"
        assert annotations(api, "worker-2") == {"0": key(2)}, "the last document does"

        # The node itself knows better than its annotation.
        api.patch("nodes", "worker-2", {"metadata": {"annotations": {KEY0: jinja}}})
        rc, output = playbook(self.inventory(1, 2, 3), tasks, "--check", "--diff")
        assert rc == 0 and "+node worker-1, %s: %s" % (KEY0, key(1)) in output, output
        assert "(reported by the node itself)" in output and annotations(api, "worker-1") == {"0": key(9)}
        rc, output = playbook(self.inventory(1, 2, 3), tasks)
        assert rc == 0, output
        assert [annotations(api, "worker-%d" % number) for number in (1, 2, 3)] == [{"0": key(1)}, {"0": key(2)}, {"0": key(3)}]

        asked = api.asked(verb="patch")
        rc, output = playbook(self.inventory(1, 2, 3), tasks)
        assert rc == 0 and "differ {}" in output and "changed=0" in output and "WARNING" not in output, output
        assert api.asked(verb="patch") == asked
        assert not canary.exists()

    @pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
    def test_kubectl_on_a_host(self, api, playbook, tmp_path):
        """The module as it is sent to the host that the task is delegated to."""
        document = tmp_path / "mesh.json"
        document.write_bytes(_mesh.document_bytes(document_of(api, keys(1, 2, 3))))
        task = {"kubemesh.wireguard.published_keys": {
            "source": "kubectl", "kubectl_command": ["kubectl", "--kubeconfig", str(tmp_path / "kubeconfig")], "document": [str(document)],
            "required": False}, "run_once": True, "delegate_to": "worker-2"}
        rc, output = playbook(self.inventory(1, 2), [task], "--diff")
        assert rc == 0 and "+node worker-3, %s: %s" % (KEY0, key(3)) in output, output
        assert annotations(api, "worker-3") == {"0": key(3)}

        # A host that is away does not leave the run for that.
        away = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
        go_on = {"ansible.builtin.debug": {"msg": "goes on"}}
        rc, output = playbook(self.inventory(1, 2, worker_2=away), [task, go_on], "--limit", "worker-1")
        assert rc == 0 and "the run goes on: keys are taken from" in output and "unreachable=0" in output, output


class TestRole:
    """The tasks of the role that read and write the cluster."""

    def test_publish_and_unpublish(self, api, playbook, tmp_path):
        document = str(tmp_path / "mesh.json")
        inventory = {"k8s_cluster": {"vars": dict(LOCAL, mesh_kubeconfig=str(tmp_path / "kubeconfig")), "hosts": {
            "worker-%d" % number: {"mesh_node_facts": {"public_keys": {"0": key(number)}}} for number in (1, 2)}}}

        def stage(name, **variables):
            return {"ansible.builtin.include_role": {"name": "kubemesh.wireguard.mesh", "tasks_from": name}, "vars": variables}

        compute = stage("membership", __mesh_dest=document, __mesh_previous=[])
        publish = stage("publish", __mesh_document_to_publish=document, __mesh_generations_to_publish=[0, 1])
        unpublish = stage("unpublish", __mesh_previous=[document])

        api.refuse("patch", "nodes", None)
        rc, output = playbook(inventory, [compute, publish, publish])
        assert rc == 0 and output.count("lacks the right to patch nodes") == 1 and api.asked(verb="patch") == 1, output
        api.permit()
        rc, output = playbook(inventory, [compute, publish], "-e", '{"mesh_publish_keys": false}')
        assert rc == 0 and api.asked(verb="patch") == 1, output

        rc, output = playbook(inventory, [compute, publish])
        assert rc == 0 and "changed=1" in output, output
        assert [annotations(api, "worker-%d" % number) for number in (1, 2, 3)] == [{"0": key(1)}, {"0": key(2)}, {}]
        listed = api.asked(verb="list")
        rc, output = playbook(inventory, [compute, publish])
        assert rc == 0 and "changed=1" not in output and api.asked(verb="patch") == 3, output
        assert api.asked(verb="list") == listed + 1, "where nothing differs, nothing more is asked"

        rc, output = playbook(inventory, [unpublish])
        assert rc == 0 and "changed=1" in output, output
        assert [annotations(api, name) for name in api.names("nodes")] == [{}, {}, {}]
        # No way to the cluster, so there is nothing to take away, and nothing to be said.
        rc, output = playbook(inventory, [unpublish], "-e", "mesh_kubeconfig=")
        assert rc == 0 and "failed=0" in output and "WARNING" not in output, output


class TestAccount:
    """The entry point rbac of the role."""

    def test_present_and_absent(self, api, playbook, tmp_path):
        rbac = "apis/rbac.authorization.k8s.io/v1"
        api.add_resource("api/v1", "serviceaccounts", "ServiceAccount", namespaced=True)
        api.add_resource(rbac, "clusterroles", "ClusterRole")
        api.add_resource(rbac, "clusterrolebindings", "ClusterRoleBinding")
        admission = "apis/admissionregistration.k8s.io/v1"
        policies = ("validatingadmissionpolicies", "validatingadmissionpolicybindings")
        for plural, kind in zip(policies, ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")):
            api.add_resource(admission, plural, kind)

        def run(state, *options, policy=False):
            role = {"ansible.builtin.import_role": {"name": "kubemesh.wireguard.mesh", "tasks_from": "rbac"},
                    "vars": {"mesh_rbac_state": state, "mesh_rbac_agent_policy": policy,
                             "mesh_kubeconfig": str(tmp_path / "kubeconfig")}}
            rc, output = playbook({"all": {"hosts": {"localhost": LOCAL}}}, [role], *options)
            assert rc == 0, output
            return "changed=1" in output

        def there():
            return [len(api.names(plural)) for plural in ("namespaces", "serviceaccounts", "clusterroles", "clusterrolebindings")]

        assert run("present", "--check") and there() == [0, 0, 0, 0]
        assert run("present") and there() == [1, 1, 1, 1]
        rules = api.get("clusterroles", "kubemesh-playbooks")["rules"]
        assert rules == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch", "patch"]}]
        assert not run("present")
        assert run("absent") and there() == [1, 0, 0, 0], "the agents have an account in the namespace as well"
        assert not run("absent")

        assert run("present", policy=True) and [api.names(plural) for plural in policies] == [["kubemesh-node-agent"]] * 2
        assert api.get(policies[1], "kubemesh-node-agent")["spec"]["policyName"] == "kubemesh-node-agent"
        assert not run("present", policy=True)
        assert run("absent") and there() == [1, 0, 0, 0] and api.names(policies[0]) == ["kubemesh-node-agent"], "only what is asked for"
        assert run("absent", policy=True) and [api.names(plural) for plural in policies] == [[], []]
