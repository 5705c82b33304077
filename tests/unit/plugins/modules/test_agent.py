# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module's arguments and check mode; what it does to a node is shown with systemd, by hosts of the lab."""

from __future__ import annotations

import json

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_install, _agent_plan, _system
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
    for name in ("UNIT_FILE", "USERS_FILE", "FOLDERS_FILE", "CONFIG_FILE", "TOKEN_FILE", "LIBRARY", "LINK", "UNFINISHED", "RUNTIME",
                 "STATE"):
        monkeypatch.setattr(_agent_install, name, str(tmp_path / name))
    monkeypatch.setattr(_agent_install, "identity", lambda: None)
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
    ({"node": None}, "node: is needed"), ({"server": None}, "server: is needed"), ({"server": "http://192.0.2.10"}, "no TLS"),
    ({"server": "https://h/path"}, "not the address"), ({"server": "https://h:abc"}, "not the address"),
    ({"server": "https://h?x=1"}, "not the address"), ({"token_file": "/t"}, "either token or token_file"),
    ({"token": "two words"}, "token:"),
    ({"token": "line\nend"}, "token:"), ({"grace": -1}, "mesh_agent_grace"), ({"table": 254}, "mesh_table"), ({"node": "W 1"}, "Node")])
def test_arguments_that_cannot_work(node, run_module, change, text):
    result = run_module(agent.main, {name: value for name, value in dict(ARGS, **change).items() if value is not None}, check=True)
    assert result["failed"] and text in result["msg"]


def test_absent_where_there_is_none(node, run_module):
    assert run_module(agent.main, {"state": "absent"})["changed"] is False
