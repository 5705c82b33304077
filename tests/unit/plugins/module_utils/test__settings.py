# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _settings

GOOD = {"interface": "wgmesh", "table": 51840, "port": 51840, "rule_priority": 400, "fwmark": 4096, "encrypt": "pods", "strict": False,
        "exempt_cidrs": ["192.0.2.0/24"], "exempt_nodes": ["a", "b"], "admin_ports": [22], "confirm_timeout": 30, "probe_timeout": 15.0,
        "lock_wait": 0, "psk_secret_fault": ""}


@pytest.mark.parametrize("stem", ["wgmesh", "w", "wg_mesh2", "wg-mesh", "A" * 14])
def test_stems_of_device_names(stem):
    assert _settings.stem_fault(stem) == ""


@pytest.mark.parametrize("stem", [
    "", "0", "A" * 15, "wg/../x", "wg mesh", "m\u00e9sh", "wg@1", "-x", ".", "wg\n", None, 5, "{{ x }}"])
def test_what_is_no_stem(stem):
    assert _settings.stem_fault(stem).startswith("mesh_interface: ")


@pytest.mark.parametrize("change, words", [
    ({}, []),
    ({"interface": "wg/../x"}, ["mesh_interface", "wg/../x"]),
    ({"table": 254}, ["mesh_table", "254"]), ({"table": 4294967296}, ["mesh_table", "4294967296"]),
    ({"rule_priority": 0}, ["mesh_rule_priority", "0"]), ({"fwmark": 0}, ["mesh_fwmark", "0"]),
    ({"exempt_cidrs": ["192.0.2.5/28"]}, ["mesh_exempt_cidrs", "192.0.2.5/28", "host bits"]),
    ({"exempt_cidrs": ["nonsense"]}, ["mesh_exempt_cidrs", "nonsense"]),
    ({"exempt_cidrs": ["0.0.0.0/0"]}, ["mesh_exempt_cidrs", "0.0.0.0/0", "mesh_encrypt=pods"]),
    ({"exempt_cidrs": ["::/0"]}, ["mesh_exempt_cidrs", "::/0"]),
    ({"port": 0}, ["mesh_port: 0", "65534"]), ({"port": 65535}, ["mesh_port: 65535"]), ({"port": 70000}, ["mesh_port: 70000"]),
    ({"port": 1}, []), ({"port": 65534}, []), ({"lock_wait": -1}, ["mesh_lock_wait: -1"]), ({"lock_wait": 600}, []),
    ({"confirm_timeout": 3}, ["mesh_confirm_timeout", "3"]), ({"confirm_timeout": 3601}, ["mesh_confirm_timeout", "3601"]),
    ({"confirm_timeout": -1}, ["mesh_confirm_timeout", "-1"]), ({"confirm_timeout": 0}, []), ({"confirm_timeout": 5}, []),
    ({"probe_timeout": -1.0}, ["mesh_probe_timeout", "-1"]), ({"probe_timeout": 0.0}, ["mesh_probe_timeout", "0"]),
    ({"probe_timeout": float("nan")}, ["mesh_probe_timeout"]), ({"probe_timeout": float("inf")}, ["mesh_probe_timeout"]),
    ({"agent_token_fault": "token: no"}, ["token: no"]),
    ({"psk_secret_fault": "mesh_psk_secret: too short"}, ["mesh_psk_secret: too short"]),
    ({"agent_grace": -1}, ["mesh_agent_grace: -1"]), ({"agent_grace": 86401}, ["mesh_agent_grace"]), ({"agent_grace": 0}, []),
    ({"agent_server": "https://192.0.2.1:6443"}, []), ({"agent_server": ""}, []),
    ({"agent_server": "https://192.0.2.1:99999"}, ["mesh_agent_server", "99999"]),
    ({"agent_server": "http://192.0.2.1"}, ["mesh_agent_server", "https"]),
    ({"admin_ports": [0]}, ["mesh_admin_ports", "0"]), ({"admin_ports": ["ssh"]}, ["mesh_admin_ports", "ssh"]),
])
def test_settings_of_one_host(change, words):
    found = _settings.settings_faults({"h": dict(GOOD, **change)})
    assert len(found) == bool(words) and all(word in found[0] for word in words), found


def test_faults_of_numbers_and_of_prefixes_are_told_together():
    found = _settings.settings_faults({"h": dict(GOOD, table=254, exempt_cidrs=["0.0.0.0/0", "nonsense"])})
    assert [fault.split(":")[0] for fault in found] == ["mesh_table", "mesh_exempt_cidrs", "mesh_exempt_cidrs"]


def test_the_same_fault_of_all_hosts_is_told_once():
    assert len(_settings.settings_faults({"h%d" % number: dict(GOOD, fwmark=0) for number in range(5000)})) == 1


def test_settings_that_differ():
    hosts = {"h%d" % number: dict(GOOD) for number in range(9)}
    assert _settings.settings_faults(hosts) == []
    hosts["h3"].update(encrypt="nodes", exempt_nodes=["b", "a"], port=51900)
    remedy = "; it must be the same on all hosts of a mesh: set it for the group, not for a host"
    assert _settings.settings_faults(hosts) == [
        "mesh_encrypt: nodes on h3, pods on h0, h1, h2, h4, h5 and 3 more" + remedy,
        "mesh_port: 51900 on h3, 51840 on h0, h1, h2, h4, h5 and 3 more" + remedy], "the order of a list says nothing"


def test_what_need_not_be_the_same():
    other = dict(GOOD, rule_priority=500, admin_ports=[2222], exempt_nodes=[], confirm_timeout=60, probe_timeout=5.0, lock_wait=600)
    hosts = {"a": dict(GOOD), "b": other}
    assert _settings.settings_faults(hosts) == [], "ports and nodes count under strict mode only"
    for settings in hosts.values():
        settings["strict"] = True
    assert [fault.split(":")[0] for fault in _settings.settings_faults(hosts)] == ["mesh_admin_ports", "mesh_exempt_nodes"]


def test_types_that_ansible_lets_pass():
    """Text for a list or a number is what inventories in INI format have, and ansible-core 2.18 makes of a dict of templates."""
    text = {"table": "51840", "port": "51840", "rule_priority": "400", "fwmark": "4096", "strict": "False", "admin_ports": "22",
            "exempt_cidrs": "192.0.2.0/24, 198.51.100.0/24", "exempt_nodes": "a,b", "confirm_timeout": "30", "probe_timeout": "2.5"}
    assert _settings.normalized(text) == {
        "table": 51840, "port": 51840, "rule_priority": 400, "fwmark": 4096, "strict": False, "admin_ports": [22],
        "exempt_cidrs": ["192.0.2.0/24", "198.51.100.0/24"], "exempt_nodes": ["a", "b"], "confirm_timeout": 30, "probe_timeout": 2.5}
    assert _settings.normalized({"admin_ports": ["22", 2222], "strict": True}) == {"admin_ports": [22, 2222], "strict": True}
    assert _settings.normalized(GOOD) == GOOD


def test_only_what_is_given_is_compared():
    assert _settings.settings_faults({"a": {"interface": "x"}, "b": {"interface": "x"}}) == []
    assert _settings.settings_faults({}) == []
