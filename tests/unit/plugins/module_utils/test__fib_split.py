# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said to iproute2 so that a node's first rule loses nothing; that it loses nothing is tests/live/test_fib_split_live.py."""

from __future__ import annotations

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _fib_split

# As `ip -4 -j -N` printed them (iproute2 6.1).
DEFAULTS = [{"priority": 0, "src": "all", "table": "255"}, {"priority": 32766, "src": "all", "table": "254"},
            {"priority": 32767, "src": "all", "table": "253"}]
NAMED = [{"priority": 0, "src": "all", "table": "local"}, {"priority": 32766, "src": "all", "table": "main"},
         {"priority": 32767, "src": "all", "table": "default"}]
OURS = {"priority": 32765, "src": "all", "iif": "kubemesh-split", "iif_detached": None, "table": "254"}
LOCAL = [
    {"type": "2", "dst": "127.0.0.0/8", "dev": "lo", "protocol": "2", "scope": "254", "prefsrc": "127.0.0.1", "flags": []},
    {"type": "3", "dst": "192.0.2.255", "dev": "eth0", "protocol": "2", "scope": "253", "prefsrc": "192.0.2.2", "flags": ["linkdown"]},
]
LEFT = [{"type": "2", "dst": "192.0.2.9", "dev": "eth0", "protocol": "151", "scope": "254"}]
ADD = ["route add local 127.0.0.0/8 table 254 proto 151 dev lo scope 254 src 127.0.0.1",
       "route add broadcast 192.0.2.255 table 254 proto 151 dev eth0 scope 253 src 192.0.2.2"]
RULE = "priority 32765 iif kubemesh-split lookup 254"
FLUSH = "route flush table 254 proto 151"


class FakeSystem:
    """Answers queries of `ip`, keeps the batches, and has nothing left after one, or all that it had."""

    def __init__(self, rules, copies=(), works=True):
        self.rules, self.copies, self.works = list(rules), list(copies), works
        self.batches, self.warnings = [], []
        self.module = self

    def warn(self, text):
        self.warnings.append(text)

    def ip_json(self, argv, missing=()):
        if argv[1] == "rule":
            return self.rules
        return self.copies if "proto" in argv else LOCAL

    def ip_detached(self, family, lines):
        self.batches.append((family, lines))
        if self.works:
            self.copies, self.rules = [], [rule for rule in self.rules if rule != OURS]


@pytest.mark.parametrize(("rules", "split"), [
    (DEFAULTS, False), (NAMED, False),
    # Of a run that was killed half way: copies may be there still.
    ([*DEFAULTS, OURS], False),
    ([*DEFAULTS, {"priority": 400, "src": "10.244.1.0", "srclen": 24, "table": "51840"}], True),
    # What the kernel calls a rule for which nobody gave a priority.
    ([*DEFAULTS, {"priority": 32765, "src": "10.0.0.0", "srclen": 8, "table": "254"}], True),
    ([*DEFAULTS, {"priority": 32765, "src": "all", "table": "254", "suppress_prefixlen": 0}], True),
    ([*DEFAULTS[:2], {"priority": 32767, "src": "all", "table": "253", "iif": "eth0"}], True),
    # Somebody took one of the kernel's away: it has parted the tables for that.
    (DEFAULTS[:2], True), ([], True),
])
def test_whether_the_tables_are_parted(rules, split):
    assert _fib_split.is_split(rules) is split


def test_copies_are_there_while_the_rule_comes_and_gone_afterwards():
    system = FakeSystem(DEFAULTS)
    _fib_split.split_local_table(system, first_rule=True)
    assert system.batches == [("ipv4", [*ADD, "rule add " + RULE, "rule del " + RULE, FLUSH])]
    assert system.warnings == []


def test_what_is_no_address_of_the_node_is_not_copied():
    odd = [{"type": kind, "dst": "10.9.0.0/16", "dev": "lo"} for kind in ("1", "6", "7", "8", "9", "blackhole", "unicast")]
    odd += [{"type": "2", "dst": "10.8.0.0/16"}, {"type": "2", "dst": "10.8.0.0/16", "dev": "eth0", "gateway": "192.0.2.1"},
            {"type": "2", "dst": "10.8.0.0/16", "dev": "eth0", "nexthops": []}]
    assert _fib_split.copy_lines(odd) == []


@pytest.mark.parametrize(("rules", "copies", "first_rule", "lines"), [
    # Before a first rule what is left goes at first: it may be of an address that is no longer here.
    (DEFAULTS, LEFT, True, [FLUSH, *ADD, "rule add " + RULE, "rule del " + RULE, FLUSH]),
    ([*DEFAULTS, OURS], LEFT, True, ["rule del " + RULE, FLUSH, *ADD, "rule add " + RULE, "rule del " + RULE, FLUSH]),
    (DEFAULTS, LEFT, False, [FLUSH]),
    ([*DEFAULTS, OURS], [], False, ["rule del " + RULE, FLUSH]),
    ([*DEFAULTS, {"priority": 50, "src": "all", "table": "7"}], LEFT, True, [FLUSH]),
])
def test_what_a_killed_run_left_goes(rules, copies, first_rule, lines):
    system = FakeSystem(rules, copies)
    _fib_split.split_local_table(system, first_rule)
    assert system.batches == [("ipv4", lines)]


@pytest.mark.parametrize(("rules", "first_rule"), [([*DEFAULTS, {"priority": 50, "src": "all", "table": "7"}], True), (DEFAULTS, False)])
def test_nothing_is_done_where_nothing_is_to_be_done(rules, first_rule):
    system = FakeSystem(rules)
    _fib_split.split_local_table(system, first_rule)
    assert system.batches == []


def test_what_cannot_be_removed_is_told():
    system = FakeSystem([*DEFAULTS, OURS], LEFT, works=False)
    _fib_split.split_local_table(system, first_rule=False)
    assert len(system.warnings) == 1 and "ip -4 route flush table main proto 151" in system.warnings[0] and RULE in system.warnings[0]
