# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent's part of strict mode on a node that prints and refuses as nft does; packets meet it in tests/live."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import documents
from guard_fakes import NftNode

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_guard, _guard, _nfnetlink
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_guard import IN_FORCE, NOT_IN_FORCE, OFF, GuardKeeper
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System

SETTINGS = {
    "encrypt": "pods", "interfaces": ["wgmesh0", "wgmesh1"], "ports": None, "fwmark": 4096, "exempt_nodes": [], "exempt_cidrs": [],
    "pod_networks": [], "admin_ports": [22]}


def document(*numbers, **others):
    return documents.document(dict({"w%d" % number: documents.entry(number) for number in numbers}, **others))


class Counting(NftNode):
    """``calls``: how many commands were run."""

    calls = 0

    def run_command(self, argv, data=None, environ_update=None):
        self.calls += 1
        return super().run_command(argv, data, environ_update)


class Lab:
    """A node whose last run put a guard in force for some nodes."""

    def __init__(self, folder):
        self.node, self.path = Counting(), folder / "guard.nft"
        self.keeper = GuardKeeper(System(self.node), {"node": "w1", "boot_folder": str(folder)})

    def run(self, *numbers, **settings):
        text = plan.ruleset_text(plan.wanted_guard(document(*numbers), "w1", dict(SETTINGS, **settings)))
        self.path.write_text(text)
        _guard.load(self.keeper.system, text)

    def pods(self):
        return [plan.interval_text(piece) for piece in sorted(self.node.table["sets"]["pods4"]["elements"])]

    def done(self):
        """What was done to the table, and forgotten."""
        found = [change for change in self.node.changes if change.startswith("nft")]
        del self.node.changes[:]
        return found


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


@pytest.fixture
def kept(lab):
    """A guard that the agent of w1 has seen."""
    lab.run(1, 2, 3)
    lab.keeper.close(document(1, 2, 3), True)
    lab.keeper.open()
    lab.done()
    return lab


def test_where_there_is_no_guard_nothing_is_even_looked_at(lab):
    assert lab.keeper.close(document(1, 2), True) == ([], False) and lab.keeper.open() == []
    assert lab.keeper.state == OFF and lab.keeper.counters() is None and lab.node.calls == 0


def test_a_start_loads_the_table_once_and_counters_go_on(lab):
    lab.run(1, 2, 3)
    lab.node.count("out_pods", 3, 252)
    assert lab.keeper.close(document(1, 2, 3), True)[0] == [{"op": "load_table", "reason": "its rules may be others"}]
    assert lab.keeper.counters()["out_pods"] == {"packets": 3, "bytes": 252}
    lab.done()
    assert lab.keeper.open() == [] and lab.keeper.close(document(1, 2, 3), True) == ([], False) and lab.done() == []
    assert lab.keeper.state == IN_FORCE


def test_who_joins_is_guarded_at_once_and_who_leaves_until_the_end(kept):
    steps, drift = kept.keeper.close(document(1, 2, 4), False)
    assert not drift and {step["op"] for step in steps} == {"change_elements"}
    assert kept.pods() == ["10.244.2.0/24", "10.244.3.0/24", "10.244.4.0/24"]
    kept.keeper.open()
    assert kept.pods() == ["10.244.2.0/24", "10.244.4.0/24"]
    assert kept.done() == ["nft elements", "nft elements"]


def test_a_wider_prefix_takes_the_place_of_a_narrower_one_in_one_step(kept):
    wide = document(1, 3, w2=documents.entry(2, pod_cidrs=["10.244.4.0/22"]))
    kept.keeper.close(document(1, 3, w2=documents.entry(2, pod_cidrs=["10.244.4.0/24"])), False)
    kept.keeper.close(wide, False)
    assert "10.244.4.0/22" in kept.pods() and "10.244.2.0/24" in kept.pods()
    kept.keeper.open()
    assert kept.pods() == ["10.244.3.0/24", "10.244.4.0/22"]


def test_nothing_new_costs_nothing(kept):
    doc = document(1, 2, 3)
    kept.keeper.close(doc, False)
    calls = kept.node.calls
    assert kept.keeper.close(doc, False) == ([], False) and kept.keeper.open() == [] and kept.node.calls == calls


@pytest.mark.parametrize("damage", [
    lambda node: setattr(node, "table", None),
    lambda node: node.table["sets"]["pods4"].update(elements=[]),
    lambda node: node.table["sets"]["pods4"]["elements"].append(plan.interval("192.0.2.0/24")),
    lambda node: node.table["chains"].update(leaving=[]),
], ids=["flushed", "elements gone", "another element", "rules gone"])
def test_what_somebody_changed_is_mended_and_told(kept, damage):
    wanted = kept.pods()
    damage(kept.node)
    doc = document(1, 2, 3)
    steps, drift = kept.keeper.close(doc, True)
    opened = kept.keeper.open()
    assert drift and (steps or opened) and kept.pods() == wanted
    assert kept.keeper.close(doc, True) == ([], False)


def test_what_a_run_changed_is_no_drift(kept):
    kept.run(1, 2, 3, encrypt="nodes", admin_ports=[22, 6443])
    assert kept.keeper.is_changed()
    steps, drift = kept.keeper.close(document(1, 2, 3, 4), False)
    assert steps and not drift and not kept.keeper.is_changed()
    assert kept.node.table["sets"]["admin_ports"]["elements"] == ["22", "6443"] and "spared" in kept.node.table["chains"]
    assert "10.244.4.0/24" in kept.pods()
    kept.path.unlink()
    assert kept.keeper.close(document(1), True) == ([], False) and kept.keeper.open() == [] and kept.keeper.state == OFF


def test_a_run_that_set_the_table_back(kept):
    kept.keeper.close(document(1, 2, 3, 4), False)
    kept.keeper.forget()
    kept.run(1, 2, 3)
    steps, drift = kept.keeper.close(document(1, 2, 3, 4), False)
    assert steps and not drift and "10.244.4.0/24" in kept.pods()


def test_another_nft_prints_rules_otherwise_and_that_is_learned_once(kept, monkeypatch):
    real = plan.table_from_nft
    monkeypatch.setattr(plan, "table_from_nft", lambda text: dict(real(text), skeleton=dict(real(text)["skeleton"], others=["new"])))
    doc = document(1, 2, 3)
    assert kept.keeper.close(doc, True)[0][0]["op"] == "load_table"
    assert kept.keeper.close(doc, True) == ([], False)


@pytest.mark.parametrize("own", [{}, {"w1": documents.entry(1, state="excluded", reason="x")},
                                 {"w1": documents.entry(1, public_keys={}, probe_addresses={}, state="pending")}])
def test_a_node_that_is_no_member_is_not_cut_off(kept, own):
    assert kept.keeper.close(document(2, **own), True) == ([], False) and kept.keeper.open() == [] and kept.done() == []


def test_what_cannot_be_done_is_said_and_tried_again(kept):
    kept.node.table["chains"]["leaving"] = []
    kept.node.tools_missing = ["nft"]
    kept.keeper.system.paths.clear()
    with pytest.raises(MeshError, match="nft is not installed"):
        kept.keeper.close(document(1, 2, 3), True)
    assert kept.keeper.state == NOT_IN_FORCE and kept.keeper.open() == []
    kept.node.tools_missing = []
    kept.keeper.system.paths.clear()
    assert kept.keeper.close(document(1, 2, 3), False)[0] and kept.keeper.state == IN_FORCE


def test_a_file_of_another_version(lab):
    lab.run(1, 2)
    lab.path.write_text(lab.path.read_text().replace(plan.SETTINGS_MARK, "# "))
    for dummy in range(2):
        with pytest.raises(MeshError, match="run the playbook enable again"):
            lab.keeper.close(document(1, 2), True)
        assert lab.keeper.state == NOT_IN_FORCE


def notice(kind, name):
    attribute = _nfnetlink.attribute(_agent_guard.NFTA_TABLE_NAME, name.encode() + b"\0")
    return _nfnetlink.message(_agent_guard.NFNL_SUBSYS_NFTABLES << 8 | kind, 0, 1, 0, attribute)


def test_whose_table_was_made_or_removed():
    ours, element = notice(2, "kubemesh_guard"), notice(12, "kubemesh_guard")
    assert _agent_guard.is_ours(ours) and _agent_guard.is_ours(notice(2, "x") + notice(0, "kubemesh_guard"))
    assert not _agent_guard.is_ours(notice(2, "kubemesh_guard2")) and not _agent_guard.is_ours(element)
    for cut in range(len(ours) - 4):
        assert not _agent_guard.is_ours(ours[:cut])
