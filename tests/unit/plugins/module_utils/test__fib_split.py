# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said to iproute2 so that a node's first rule loses nothing; that it loses nothing is tests/live/test_fib_split_live.py."""

from __future__ import annotations

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils._fib_split import is_split, split_lines, split_local_table

# As `ip -4 -j -N` printed them (iproute2 6.1).
DEFAULTS = [{"priority": 0, "src": "all", "table": "255"}, {"priority": 32766, "src": "all", "table": "254"},
            {"priority": 32767, "src": "all", "table": "253"}]
LOCAL = [
    {"type": "2", "dst": "127.0.0.0/8", "dev": "lo", "protocol": "2", "scope": "254", "prefsrc": "127.0.0.1", "flags": []},
    {"type": "3", "dst": "192.0.2.255", "dev": "eth0", "protocol": "2", "scope": "253", "prefsrc": "192.0.2.2", "flags": ["linkdown"]},
]


class FakeSystem:
    """Answers queries of `ip` and keeps the batches."""

    def __init__(self, rules, leftovers=()):
        self.rules, self.leftovers, self.batches = rules, list(leftovers), []

    def ip_json(self, argv, missing=()):
        if argv[1] == "rule":
            return self.rules
        return LOCAL if "255" in argv else self.leftovers

    def ip_answers(self, family, lines):
        self.batches.append((family, lines))
        return ""


@pytest.mark.parametrize(("rules", "split"), [
    (DEFAULTS, False),
    # Of a run that was killed half way: copies may be there still.
    (DEFAULTS + [{"priority": 32765, "src": "all", "table": "254"}], False),
    (DEFAULTS + [{"priority": 400, "src": "10.244.1.0", "srclen": 24, "table": "51840"}], True),
    (DEFAULTS + [{"priority": 32765, "src": "all", "table": "100"}], True),
    # Somebody took the kernel's own away: it has parted the tables for that.
    (DEFAULTS[:2], False),
])
def test_whether_the_tables_are_parted(rules, split):
    assert is_split(rules) is split


def test_copies_are_there_while_the_rule_comes_and_gone_afterwards():
    add = ["route add local 127.0.0.0/8 table 254 proto 151 dev lo scope 254 src 127.0.0.1",
           "route add broadcast 192.0.2.255 table 254 proto 151 dev eth0 scope 253 src 192.0.2.2"]
    rule = "priority 32765 from all lookup 254"
    assert split_lines(LOCAL) == add + ["rule add " + rule, "rule del " + rule] + [line.replace(" add ", " del ") for line in add]


def test_what_a_killed_run_left_goes_as_well():
    system = FakeSystem(DEFAULTS, leftovers=[{"type": "2", "dst": "192.0.2.9", "dev": "eth0", "protocol": "151", "scope": "254"}])
    split_local_table(system)
    assert system.batches[0][1][-1] == "route del local 192.0.2.9 table 254 proto 151 dev eth0 scope 254"


def test_a_node_with_rules_is_left_alone():
    system = FakeSystem(DEFAULTS + [{"priority": 50, "src": "all", "table": "7"}])
    split_local_table(system)
    assert system.batches == []
