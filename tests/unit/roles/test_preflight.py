# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""At which nodes the role has its preflight look, and what it tells the module of the agent: its own templates, without the module."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("ansible.errors")
yaml = pytest.importorskip("yaml")

ROLE = pathlib.Path(__file__).resolve().parents[3] / "roles" / "mesh"
LOOKS = next(task for task in yaml.safe_load((ROLE / "tasks" / "preflight.yml").read_text(encoding="utf-8")) if "block" in task)
ARGUMENTS = LOOKS["block"][0]["kubemesh.wireguard.preflight"]
SHOWN = ("local_checks", "agent_ca_file", "agent_token_file", "agent_token_given", "targets_src")

NEW = {"exists": False, "agent": {"installed": False}}
PROVEN = {"exists": True, "agent": {"installed": False}}
WITH_AGENT = {"exists": True, "agent": {"installed": True}}
ABSENT = "(omitted)"
NO_AGENT = {"agent_ca_file": ABSENT, "agent_token_file": ABSENT, "agent_token_given": False}
AGENT = {"agent_ca_file": "/ca", "agent_token_file": ABSENT, "agent_token_given": True}
ALL = {"local_checks": True, "targets_src": "/work/draft"}
ALONE = {"local_checks": False, "targets_src": ABSENT}
CASES = [
    # (what is done, what was there, variables, arguments; None: nobody looks)
    ("enable", NEW, {"mesh_agent": False}, dict(ALL, **NO_AGENT)),
    ("enable", WITH_AGENT, {"mesh_agent": True, "mesh_agent_token": "s3cret"}, dict(ALL, **AGENT)),
    ("enable", NEW, {"mesh_agent": True, "mesh_agent_token_file": "/t"},
     dict(ALL, agent_ca_file="/ca", agent_token_file="/t", agent_token_given=False)),
    ("enable", NEW, {"mesh_agent": True, "mesh_agent_token": "s3cret", "mesh_node_name": "gone"}, dict(ALL, **NO_AGENT)),
    ("reconcile", PROVEN, {"mesh_agent": False}, None),
    ("reconcile", PROVEN, {"mesh_agent": True, "mesh_agent_token": "s3cret"}, dict(ALONE, **AGENT)),
    ("rotate_keys", PROVEN, {"mesh_agent": True, "mesh_agent_token": "s3cret"}, dict(ALONE, **AGENT)),
    ("reconcile", WITH_AGENT, {"mesh_agent": True, "mesh_agent_token": "s3cret"}, None),
    ("reconcile", PROVEN, {"mesh_agent": False, "mesh_node_name": "moved"}, dict(ALL, **NO_AGENT)),
    ("reconcile", PROVEN, {"mesh_agent": True, "mesh_preflight": False}, None),
]


def test_where_it_looks_and_what_it_is_told_of_the_agent(tmp_path):
    """One host for each case, in a play of its own: what is true of all hosts of a play counts."""
    plays, hosts = [], {}
    for number, (doing, before, variables, dummy) in enumerate(CASES):
        host = "h%d" % number
        hosts[host] = dict({
            "mesh_node_name": "n1", "mesh_preflight": True, "mesh_agent_ca_file": "/ca", "__mesh_doing": doing, "__mesh_before": before,
            "__mesh_computed": {"members": ["n1"], "excluded": {"gone": {}}, "to_examine": ["moved"]},
            "__mesh_workdir": "/work"}, **variables)
        content = "{{ {%s} | to_json }}" % ", ".join(
            "'%s': %s" % (name, ARGUMENTS[name][2:-2].replace("omit", "'%s'" % ABSENT)) for name in SHOWN)
        plays.append({"hosts": host, "gather_facts": False, "tasks": [{
            "ansible.builtin.copy": {"content": content, "dest": str(tmp_path / host), "mode": "0600"}, "when": LOOKS["when"],
            "vars": LOOKS["vars"]}]})
    for values in hosts.values():
        values.update(ansible_connection="local", ansible_python_interpreter=sys.executable)
    (tmp_path / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    (tmp_path / "plays.json").write_text(json.dumps(plays))
    environment = dict({name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}, HOME=str(tmp_path),
                       ANSIBLE_HOME=str(tmp_path / "home"), ANSIBLE_REMOTE_TEMP=str(tmp_path / "remote"), LC_ALL="C.UTF-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible.cli.playbook", "-i", str(tmp_path / "inventory.json"), str(tmp_path / "plays.json")],
        env=environment, cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout.decode()
    found = [json.loads((tmp_path / ("h%d" % number)).read_text()) if (tmp_path / ("h%d" % number)).exists() else None
             for number in range(len(CASES))]
    assert found == [expected for dummy, dummy2, dummy3, expected in CASES]
