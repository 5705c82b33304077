# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules by one message are the rules that ``ip rule`` makes, and each deletes what the other added."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

RULES = [
    {"family": family, "priority": priority, "table": table, "from": source, "iif": iif, "not_fwmark": mark}
    for family, pods in (("ipv4", "10.244.1.0/24"), ("ipv6", "fd00:10:244:1::/64"))
    for priority, table, source, iif, mark in (
        (400, 51840, "", "", 0), (401, 51841, pods, "", 0), (402, 51841, "", "", 0x1000),
        # those of a device that is there and of one that is not
        (401, 51840, "", "lo", 0), (401, 51840, "", "wgmesh1", 0), (402, 51840, pods, "", 0), (400, 51841, "", "lo", 0x1000))
]

# Runs in a network namespace of its own, which ends with it.
PROGRAM = """
import json, subprocess, sys
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._rules_netlink import change_rules

rules = json.load(sys.stdin)
option = {"ipv4": "-4", "ipv6": "-6"}

def by_us(op):
    change_rules([{"op": op, "rule": rule} for rule in rules])

def by_ip(verb):
    for rule in rules:
        subprocess.run(["ip", option[rule["family"]], "rule", verb] + plan.rule_text(rule).split(), check=True)

def shown():
    argv = ["ip", "-j", "-N", "rule"]
    return [subprocess.run(argv[:1] + [each] + argv[1:], check=True, stdout=subprocess.PIPE).stdout.decode() for each in option.values()]

def refused(op):
    try:
        by_us(op)
    except MeshError as exc:
        return str(exc)

result = {"empty": shown()}
by_us("add_rule")
result["ours"] = shown()
read = [plan.rule_from_ip(item, family) for family, text in zip(option, result["ours"]) for item in json.loads(text)]
result["read"] = [rule for rule in read if rule and rule["table"] in (51840, 51841)]
result["twice"] = refused("add_rule")
by_ip("del")
result["deleted by ip"] = shown()
by_ip("add")
result["theirs"] = shown()
by_us("remove_rule")
result["deleted by us"] = shown()
result["gone"] = refused("remove_rule")
print(json.dumps(result))
"""


def test_rules_are_those_of_ip_rule():
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", PROGRAM], input=json.dumps(RULES), stdout=subprocess.PIPE, text=True, check=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)))
    result = json.loads(run.stdout)
    assert result["ours"] == result["theirs"] != result["empty"]
    wanted = [dict(rule, foreign=False) for rule in RULES]
    assert len(result["read"]) == len(wanted) and all(rule in wanted for rule in result["read"])
    assert result["deleted by ip"] == result["deleted by us"] == result["empty"]
    assert "priority 400" in result["twice"] and "File exists" in result["twice"]
    assert "No such file" in result["gone"]
