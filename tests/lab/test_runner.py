# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks of the installed artifact as AWX runs them: ansible-runner with a private data directory, what becomes the artifact of a
job, and a slice, which is an inventory with some of the hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import all_encrypted, differences, infos, keep_on_failure, made, traces

PROGRAM = str(Path(sys.executable).parent / "ansible-runner")
NODES = 2
PAIRS = NODES * (NODES - 1)  # each direction counts
JOB = {"awx_job_id": 7, "awx_job_template_name": "kubemesh reconcile", "awx_workflow_job_name": "kubemesh reconcile"}
WHOLE = {"nodes": NODES, "nodes_not_reached": 0, "pairs_encrypted": PAIRS, "pairs_not_encrypted": 0, "encrypted": True}


@pytest.fixture(scope="module")
def lab():
    found = made("runner", nodes=NODES, pods=1)
    yield found
    if not keep_on_failure():
        found.down()


class Job:
    """One run of ansible-runner: ``rc``, ``text``, ``artifact``: what set_stats left, ``events``: all of them as text."""

    def __init__(self, lab, playbook, extra=None, hosts=None, limit=None):
        self.folder = lab.state / "private"
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("inventory", "env", "project"):
            (self.folder / name).mkdir(parents=True)
        shutil.copy(lab.inventory(), self.folder / "inventory" / lab.inventory().name)
        source = {} if playbook == "disable" else {"mesh_nodes_source": "file", "mesh_nodes_file": str(lab.nodes_file())}
        variables = dict(source, **extra or {})
        if hosts is not None:
            self.keep_only(hosts)
        (self.folder / "env" / "extravars").write_text(json.dumps(variables))
        settings = {key: value for key, value in lab.ansible_env().items() if key.startswith("ANSIBLE_")}
        (self.folder / "env" / "envvars").write_text(json.dumps(settings))
        command = ["ip", "netns", "exec", lab.namespace("ctl"), PROGRAM, "run", str(self.folder), "--ident", "job", "--quiet",
                   "--playbook", "kubemesh.wireguard.%s" % playbook, *(["--limit", limit] if limit else [])]
        self.rc = subprocess.run(command, env=lab.ansible_env(), stdin=subprocess.DEVNULL, timeout=600, check=False).returncode
        left = self.folder / "artifacts" / "job"
        self.text = (left / "stdout").read_text()
        events = [json.loads(path.read_text()) for path in sorted((left / "job_events").glob("*.json"))]
        self.events = json.dumps(events)
        stats = [event for event in events if event["event"] == "playbook_on_stats"]
        self.artifact = stats[-1]["event_data"].get("artifact_data", {}) if stats else {}

    def keep_only(self, hosts):
        """What AWX leaves of an inventory in a slice: the hosts of the others do not exist."""
        path = next((self.folder / "inventory").iterdir())
        found = json.loads(subprocess.run(
            [str(Path(sys.executable).parent / "ansible-inventory"), "-i", str(path), "--list"],
            stdout=subprocess.PIPE, check=True).stdout)
        variables = found["_meta"]["hostvars"]
        groups = {name: {"hosts": {host: {} for host in hosts if host in found.get(name, {}).get("hosts", [])}}
                  for name in ("k8s_cluster", "kube_control_plane")}
        path.unlink()
        (self.folder / "inventory" / "slice.yml").write_text(json.dumps(
            {"all": {"hosts": {host: variables[host] for host in hosts}, "children": groups}}))

    def summary(self):
        """The summary, and nothing else, is the artifact of the job."""
        assert list(self.artifact) == ["mesh_run_summary"], (self.artifact, self.text[-3000:])
        found = self.artifact["mesh_run_summary"]
        assert all(isinstance(value, (bool, int)) for value in found.values())
        return found


def test_enable_and_status(lab):
    job = Job(lab, "enable")
    assert job.rc == 0, job.text[-4000:]
    assert job.summary() == dict(WHOLE, changed=True, nodes_changed=NODES)
    for node in lab.nodes:
        key = lab.exec(node, ["cat", "/etc/wireguard/wgmesh0.key"]).stdout
        assert (key.decode() if isinstance(key, bytes) else key).strip() not in job.events

    job = Job(lab, "status", {"mesh_require_encrypted": "true"})
    assert job.rc == 0, job.text[-4000:]
    assert job.summary() == dict(WHOLE, changed=False, nodes_changed=0)

    # What the job before left is a variable of the next one in a workflow.
    job = Job(lab, "reconcile", dict(JOB, mesh_run_summary=job.summary()))
    assert job.rc == 0, job.text[-4000:]
    assert job.summary() == dict(WHOLE, changed=False, nodes_changed=0)


@pytest.mark.parametrize("playbook", ["reconcile", "disable"])
def test_a_slice_is_refused(lab, playbook):
    assert all_encrypted(infos(lab))
    before = {node: traces(lab, node) for node in lab.nodes}
    job = Job(lab, playbook, JOB, hosts=["node-1"])
    assert job.rc != 0 and not job.artifact
    words = " ".join(job.text.split())
    for word in ("job 7 of AWX is a slice of the template kubemesh reconcile", "node-2", "job_slice_count", "nothing was changed"):
        assert word in words, job.text[-4000:]
    for node in lab.nodes:
        assert differences(before[node], traces(lab, node)) == []


def test_a_limit_in_a_job_and_a_part_of_an_inventory_elsewhere_are_not(lab):
    job = Job(lab, "reconcile", JOB, limit="node-1")
    assert job.rc == 0, job.text[-4000:]
    assert job.summary() == dict(WHOLE, nodes=1, pairs_encrypted=NODES - 1, changed=False, nodes_changed=0)
    assert Job(lab, "reconcile", hosts=["node-1"]).rc == 0
    assert all_encrypted(infos(lab))


def test_a_check_fails_where_something_is_in_clear(lab):
    """After disable, which says what it did as well."""
    job = Job(lab, "disable")
    assert job.rc == 0, job.text[-4000:]
    assert job.summary() == {
        "nodes": NODES, "nodes_not_reached": 0, "pairs_encrypted": 0, "pairs_not_encrypted": 0, "encrypted": False, "changed": True,
        "nodes_changed": NODES}
    job = Job(lab, "status", {"mesh_require_encrypted": "true"})
    assert job.rc != 0 and job.summary()["encrypted"] is False
    assert "mesh_require_encrypted" in job.text
