# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module's arguments and check mode; what it does to a node is shown with systemd, by hosts of the lab."""

from __future__ import annotations

import json

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_inputs, _agent_install, _agent_plan, _system
from ansible_collections.kubemesh.wireguard.plugins.modules import agent

ARGS = {"node": "worker-1", "server": "https://192.0.2.10:6443", "token": "s3cret-token"}


class Systemd:
    """Stands in for a node where nothing runs and nothing is installed; commands are kept."""

    def __init__(self):
        self.commands = []

    def get_bin_path(self, name, opt_dirs=()):
        return name

    def run_command(self, argv, data=None, environ_update=None):
        self.commands.append(list(argv))
        if argv[0] == "ip":
            return 1, "", 'Device "%s" does not exist.' % argv[-1]
        return 0, "LoadState=not-found\nActiveState=inactive\nUnitFileState=\n", ""


@pytest.fixture
def node(monkeypatch, tmp_path):
    systemd = Systemd()
    monkeypatch.setattr(agent, "System", lambda module: _system.System(systemd))
    for name in ("UNIT_FILE", "GUARD_UNIT_FILE", "USERS_FILE", "FOLDERS_FILE", "CONFIG_FILE", "TOKEN_FILE", "LIBRARY", "LINK", "UNFINISHED",
                 "RUNTIME", "STATE", "STATE_FILE"):
        monkeypatch.setattr(_agent_install, name, str(tmp_path / name))
    monkeypatch.setattr(_agent_inputs, "TOKEN_FILE", _agent_install.TOKEN_FILE)
    monkeypatch.setattr(_agent_inputs, "why_unreadable", lambda way, uid, gids: "no right" if "secret" in way["real"] else "")
    for module in (_agent_inputs, _agent_install):
        monkeypatch.setattr(module, "identity", lambda: None)
    return systemd


def test_check_mode_tells_all_and_does_nothing(node, run_module, tmp_path):
    result = run_module(agent.main, ARGS, check=True)
    assert result["changed"] and result["restarted"]
    assert any("install program" in step for step in result["steps"]) and any("start unit" in step for step in result["steps"])
    assert list(tmp_path.iterdir()) == []
    assert all(words[0] == "ip" or words[:2] == ["systemctl", "show"] for words in node.commands)
    assert "s3cret" not in json.dumps(result) and "s3cret" not in "".join(run_module.output)


def test_configuration_is_what_the_agent_takes(node):
    defaults = {"state": "present", "ca_file": "/ca", "token_file": None, "interface": "wgmesh", "grace": 60, "table": 51840,
                "rule_priority": 400, "fwmark": 4096, "exempt_cidrs": [], "exclude_nodes": [], "service_cidrs": [],
                "pod_source": "node_cidrs"}
    config = _agent_plan.parse_config(agent.configuration(dict(defaults, **ARGS)))
    assert config["node"] == "worker-1" and config["token_file"] == _agent_install.TOKEN_FILE
    assert "s3cret" not in agent.configuration(dict(defaults, **ARGS))


@pytest.mark.parametrize("change, text", [
    ({"node": None}, "missing: node"), ({"server": None}, "missing: server"), ({"server": ""}, "server: "),
    ({"server": "http://192.0.2.10"}, "no TLS"),
    ({"server": "https://h/path"}, "not the address"), ({"server": "https://h:abc"}, "not the address"),
    ({"server": "https://h?x=1"}, "not the address"), ({"token_file": "/t"}, "mutually exclusive: token|token_file"),
    ({"token": "two words"}, "token (mesh_agent_token):"),
    ({"token": "line\nend"}, "token (mesh_agent_token):"),
    ({"grace": -1}, "mesh_agent_grace"), ({"table": 254}, "mesh_table"), ({"node": "W 1"}, "Node")])
def test_arguments_that_cannot_work(node, run_module, change, text):
    result = run_module(agent.main, {name: value for name, value in dict(ARGS, **change).items() if value is not None}, check=True)
    assert result["failed"] and text in result["msg"]


def test_absent_where_there_is_none(node, run_module):
    assert run_module(agent.main, {"state": "absent"})["changed"] is False


def test_files_that_the_agent_cannot_read_are_refused_before_anything_is_changed(node, run_module, tmp_path):
    args = {name: value for name, value in ARGS.items() if name != "token"}
    result = run_module(agent.main, dict(args, ca_file="/secret/ca", token_file="/secret/token"))
    assert result["failed"] and "ca_file: /secret/ca is not readable for the user kubemesh-agent (no right)" in result["msg"]
    assert "token_file: /secret/token is not readable" in result["msg"] and "chmod 0640" in result["msg"]
    result = run_module(agent.main, args)
    assert result["failed"] and "token: none was given" in result["msg"]
    assert list(tmp_path.iterdir()) == [] and all(words[0] == "ip" for words in node.commands)


@pytest.mark.parametrize("api", ["watching", "ca_file: /ca cannot be used: no such file", None])
def test_it_is_told_whether_the_agent_reaches_the_api(node, run_module, monkeypatch, api):
    """The module waits for what the service says that it started."""
    asked = []

    def wait():
        asked.append(node.commands[-1])
        return api

    warnings = []
    monkeypatch.setattr(agent.AnsibleModule, "warn", lambda self, text: warnings.append(text))
    monkeypatch.setattr(_agent_install, "wait_for_api", wait)
    monkeypatch.setattr(_agent_install, "apply_present", lambda system, *dummy: system.run(["systemctl", "restart", "it"]))
    result = run_module(agent.main, ARGS)
    assert result["api"] == api and asked == [["systemctl", "restart", "it"]]
    if api == "watching":
        assert not warnings
    else:
        assert "node worker-1" in warnings[0] and "https://192.0.2.10:6443" in warnings[0]
        assert (api or "said nothing") in warnings[0] and "journalctl" in warnings[0]


@pytest.mark.parametrize("api, restarted", [("watching", False), ("HTTP 401", True), (None, True)])
def test_who_was_refused_with_the_old_token_does_not_wait_to_try_the_new_one(node, run_module, monkeypatch, tmp_path, api, restarted):
    if api is not None:
        (tmp_path / "STATE_FILE").write_text(_agent_plan_state(api))
    monkeypatch.setattr(_agent_install, "plan_present", lambda *dummy: [{"op": "write_token", "path": "/token"}])
    monkeypatch.setattr(_agent_install, "identity", lambda: (1, 1))
    monkeypatch.setattr(_system.System, "unit", lambda self, name: {"enabled": True, "active": True, "exists": True})
    assert run_module(agent.main, ARGS, check=True)["restarted"] is restarted


def _agent_plan_state(api):
    """What an agent says of itself."""
    counts = {"events": 0, "changes": 0, "repairs": 0, "lists": 0}
    return json.dumps(dict(_agent_plan.state_of(None, api, "", [], None, set(), "", counts, 0.0), base=None, guard="off"))


def test_where_nothing_changes_nothing_is_waited_for(node, run_module, monkeypatch):
    monkeypatch.setattr(_agent_install, "wait_for_api", lambda: pytest.fail("it waits"))
    assert "api" not in run_module(agent.main, ARGS, check=True)
    monkeypatch.setattr(_agent_install, "plan_present", lambda *dummy: [])
    monkeypatch.setattr(_agent_install, "identity", lambda: (1, 1))
    monkeypatch.setattr(_system.System, "unit", lambda self, name: {"enabled": True, "active": True, "exists": True})
    result = run_module(agent.main, ARGS)
    assert result["changed"] is False and "api" not in result
