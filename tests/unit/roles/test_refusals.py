# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role refuses before it does anything: real runs that end before the first host is looked at."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("ansible.errors")

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(
    REPOSITORY.parts[-3:] != ("ansible_collections", "kubemesh", "wireguard"), reason="the checkout is not below ansible_collections")

# Nobody can be reached by it: a run that gets as far as a host ends as unreachable, with another code.
NOBODY = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
WEAK = "S3cret-that-is-short"
TOKEN = "tokentokentoken with-blanks"


def run(tmp_path, variables=None, playbook="kubemesh.wireguard.enable", inventory=None, environ=None):
    """A playbook of the collection on three hosts; -> (exit code, all that it says)."""
    hosts = inventory or {"k8s_cluster": {"hosts": {"h%d" % number: NOBODY for number in range(3)}}}
    (tmp_path / "inventory.json").write_text(json.dumps(hosts))
    (tmp_path / "variables.json").write_text(json.dumps(variables or {}))
    environment = dict(
        {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "K8S_AUTH_", "KUBECONFIG"))},
        # No kubeconfig of whoever runs the tests
        HOME=str(tmp_path),
        ANSIBLE_COLLECTIONS_PATH=str(REPOSITORY.parents[2]), ANSIBLE_LOCALHOST_WARNING="false", ANSIBLE_HOME=str(tmp_path / "home"),
        ANSIBLE_REMOTE_TEMP=str(tmp_path / "remote"), ANSIBLE_NOCOLOR="1", LC_ALL="C.UTF-8", TMPDIR=str(tmp_path),
        **(environ or {}))
    done = subprocess.run(
        [sys.executable, "-m", "ansible.cli.playbook", "-vvv", "-i", str(tmp_path / "inventory.json"), "-e",
         "@%s" % (tmp_path / "variables.json"), str(playbook)],
        env=environment, cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout.decode()


def test_values_that_cannot_work_are_refused_together_and_the_secret_is_not_shown(tmp_path):
    code, text = run(tmp_path, {"mesh_confirm_timeout": 3, "mesh_probe_timeout": -1, "mesh_psk_secret": WEAK, "mesh_port": 0,
                                "mesh_lock_wait": -1, "mesh_agent": True, "mesh_agent_server": "https://h:abc",
                                "mesh_agent_token": TOKEN})
    assert code == 2 and "unreachable=1" not in text, text
    for words in ("mesh_confirm_timeout: 3", "mesh_probe_timeout: -1", "mesh_port: 0", "mesh_lock_wait: -1", "mesh_agent_server: 'https://h:abc'",
                  "(mesh_psk_secret) has 20 characters", "(mesh_agent_token): this is no bearer token"):
        assert words in text, words
    # It is in the file of variables, and no word of it is in what the run says with -vvv.
    assert WEAK not in text and TOKEN.split(maxsplit=1)[0] not in text


def test_accounts_are_not_made_in_another_cluster_than_the_one_that_is_named(tmp_path):
    """kubernetes.core would take the server of the environment and the credentials of the kubeconfig."""
    play = [{"hosts": "all", "gather_facts": False, "tasks": [
        {"ansible.builtin.include_role": {"name": "kubemesh.wireguard.mesh", "tasks_from": "rbac"}}]}]
    (tmp_path / "rbac.yml").write_text(json.dumps(play))
    variables, playbook = {"mesh_kubeconfig": "/nowhere/config"}, str(tmp_path / "rbac.yml")
    code, text = run(tmp_path, variables, playbook, environ={"K8S_AUTH_HOST": "https://127.0.0.1:1"})
    assert code == 2 and "mesh_kubeconfig: K8S_AUTH_HOST is in the environment as well" in text and "Have the account" not in text, text
    # Without it the same run goes on, to the kubeconfig that is not there.
    code, text = run(tmp_path, variables, playbook)
    assert code == 2 and "Have the account of the playbooks present" in text, text


def test_nothing_stays_on_the_controller_where_no_host_can_be_reached(tmp_path):
    code, text = run(tmp_path)
    assert code == 4 and text.count("unreachable=1") == 3, text
    assert not list(tmp_path.rglob("kubemesh.*"))


@pytest.mark.parametrize("strategy", ["free", "host_pinned"])
def test_a_strategy_that_lets_hosts_run_ahead_is_refused(tmp_path, strategy):
    playbook = tmp_path / "own.yml"
    playbook.write_text(json.dumps([{
        "hosts": "k8s_cluster", "gather_facts": False, "strategy": strategy, "tasks": [
            {"name": "Enable", "ansible.builtin.import_role": {"name": "kubemesh.wireguard.mesh", "tasks_from": "main"}}]}]))
    code, text = run(tmp_path, playbook=playbook)
    assert code != 0 and "Refuse a play with strategy free: the stages of the mesh need all nodes" in text, text
    assert "TASK [kubemesh.wireguard.mesh : Claim" not in text and "UNREACHABLE" not in text


AGENT = {"mesh_agent": True, "mesh_agent_server": "https://192.0.2.10:6443"}


@pytest.mark.parametrize("variables, words", [
    (dict(AGENT, mesh_agent_server=""), "the agent needs mesh_agent_server"),
    (dict(AGENT, mesh_nodes_source="inventory"), "cannot be used with mesh_nodes_source inventory"),
    (dict(AGENT, mesh_pod_cidrs_query="spec.podCIDRs"), "cannot be used with mesh_node_addresses_query, mesh_pod_cidrs_query"),
    (dict(AGENT, mesh_node_addresses_query="a"), "it knows the default queries only"),
    (dict(AGENT, mesh_endpoint_query="a"), "it knows the default queries only"),
    (dict(AGENT, mesh_pod_source="pods", mesh_pod_cidrs=["10.244.1.0/24"]), "mesh_pod_cidrs is set for host h0: with mesh_agent")])
def test_an_agent_that_could_not_do_its_work_is_refused(tmp_path, variables, words):
    code, text = run(tmp_path, variables)
    assert code == 2 and words in " ".join(text.split()) and "unreachable=1" not in text, text


def test_an_agent_is_refused_where_auto_finds_no_cluster(tmp_path):
    """Only the preflight knows: there is no kubeconfig and no control plane, so the inventory is left."""
    playbook = tmp_path / "own.yml"
    playbook.write_text(json.dumps([{
        "hosts": "k8s_cluster", "gather_facts": False, "tasks": [
            {"name": "Preflight", "ansible.builtin.include_role": {"name": "kubemesh.wireguard.mesh", "tasks_from": "preflight"},
             "vars": {"__mesh_workdir": str(tmp_path), "__mesh_previous": []}}]}]))
    hosts = {"h%d" % number: dict(NOBODY, mesh_pod_cidrs=["10.244.%d.0/24" % number], mesh_node_addresses=["192.0.2.%d" % (number + 20)])
             for number in range(2)}
    code, text = run(tmp_path, AGENT, playbook=playbook, inventory={"k8s_cluster": {"hosts": hosts}})
    words = " ".join(text.split())
    assert code == 2 and "mesh_agent: the list of nodes comes from the inventory" in words, text
    assert "TASK [kubemesh.wireguard.mesh : Look at" not in words, text
    assert "Set mesh_nodes_source to kubernetes or kubectl" in words and "unreachable=1" not in text, text
