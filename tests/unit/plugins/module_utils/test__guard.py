# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import configparser
import os

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, probe_address
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, plan_files
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.guard_fakes import NftNode, Refused

SETTINGS = {
    "encrypt": "pods", "interfaces": ["wgmesh0"], "ports": None, "fwmark": 4096, "exempt_nodes": [], "exempt_cidrs": [],
    "pod_networks": [], "admin_ports": [22]}


def entry(number):
    key = chr(ord("A") + number) * 42 + "A="
    return {"state": "member", "reason": "", "uid": "", "public_keys": {"0": key}, "endpoints": {},
            "pod_cidrs": ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number], "node_addresses": ["198.18.0.1%d" % number],
            "probe_addresses": {"0": probe_address(key)}, "mtu": 1420, "keepalive": 0}


def document(*numbers):
    return {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
            "nodes": {"n%d" % number: entry(number) for number in numbers}}


def guard(*numbers, **other):
    return plan.wanted_guard(document(1, *numbers), "n1", dict(SETTINGS, **other))


@pytest.fixture
def node():
    return NftNode()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder that stands in for /etc."""
    for name in ("GUARD_FILE", "GUARD_UNIT_FILE", "NFTABLES_DROPIN"):
        monkeypatch.setattr(live, name, str(tmp_path / name.lower() / os.path.basename(getattr(live, name))))
    monkeypatch.setattr(live, "OWN_FOLDERS", [str(tmp_path / name) for name in ("guard_file", "nftables_dropin")])
    return tmp_path


def bring(node, wanted):
    """Bring a node to a guard, or to none, as the module does; -> the steps."""
    system = System(node)
    reference = live.reference(system, plan.ruleset_text(wanted)) if wanted else None
    steps = plan.plan_guard(live.read_table(system), reference)
    after = live.apply_steps(system, steps, wanted, reference)
    assert not steps or plan.plan_guard(after, reference) == []
    return steps


def loads(node):
    """What was done to the tables, and forgotten."""
    done = [change for change in node.changes if change.startswith("nft")]
    del node.changes[:]
    return done


# --- nft ---------------------------------------------------------------------------------------------------------------------------------

def test_there_and_back(node):
    system = System(node)
    assert live.read_table(system) is None and live.read_counters(system) is None
    assert [step["op"] for step in bring(node, guard(2, 3))] == ["load_table"]
    assert loads(node) == ["nft load"]
    assert bring(node, guard(2, 3)) == [] and loads(node) == []
    assert bring(node, None) == [{"op": "remove_table"}]
    assert loads(node) == ["nft remove"] and node.table is None
    assert bring(node, None) == []


def test_a_reference_touches_nothing(node):
    wanted = guard(2)
    table = live.reference(System(node), plan.ruleset_text(wanted))
    assert node.table is None and node.changes == [] and len(node.scratch) == 1
    assert table["elements"]["pods4"] == [plan.interval("10.244.2.0/24")]


def test_counters_survive_changes_of_elements_and_of_rules(node):
    bring(node, guard(2, 3))
    node.count("out_pods", 3, 252)
    loads(node)
    assert {step["op"] for step in bring(node, guard(2, 4))} == {"change_elements"}
    assert loads(node) == ["nft elements"], "one transaction"
    node.count("in_nodes", 1, 84)
    bring(node, guard(2, 4, encrypt="nodes"))
    assert loads(node) == ["nft load"]
    assert live.read_counters(System(node)) == {
        "out_pods": {"packets": 3, "bytes": 252}, "in_pods": {"packets": 0, "bytes": 0}, "out_nodes": {"packets": 0, "bytes": 0},
        "in_nodes": {"packets": 1, "bytes": 84}}


@pytest.mark.parametrize("fault", ["refuse_deltas", "spoil_deltas"])
def test_where_elements_cannot_be_changed_the_table_is_replaced(node, fault):
    bring(node, guard(2, 3))
    node.count("out_pods", 3, 252)
    loads(node)
    setattr(node, fault, True)
    bring(node, guard(2, 4))
    assert loads(node)[-1] == "nft load"
    assert node.table["sets"]["pods4"]["elements"] == [plan.interval("10.244.2.0/24"), plan.interval("10.244.4.0/24")]
    assert live.read_counters(System(node))["out_pods"] == {"packets": 3, "bytes": 252}


def test_a_table_that_nft_cannot_print_is_replaced(node):
    bring(node, guard(2))
    node.table["flags"] = "dormant"
    printed = node._nft

    def truncated(words, data):
        out = printed(words, data)
        return out[:200] if words[:3] == ["-j", "list", "table"] and '"flags": "dormant"' in out else out

    node._nft = truncated
    assert "no JSON" in plan.table_as_text(live.read_table(System(node)), {})
    assert bring(node, guard(2))[0]["op"] == "load_table"
    assert node.table["flags"] == ""


def test_a_kernel_that_refuses_leaves_what_was_there(node):
    bring(node, guard(2))

    def refuse(dummy, change):
        if change == "nft load":
            raise Refused("Error: Could not process rule: No space left on device\n\n\ntable inet x {\n ^^^^^")

    node.hooks.append(refuse)
    before = dict(node.table)
    with pytest.raises(MeshError) as caught:
        bring(node, guard(2, encrypt="nodes"))
    for words in ("No space left on device; table inet x {; ^^^^^", "what was in force before still is"):
        assert words in str(caught.value)
    assert node.table == before


def test_no_nft():
    system = System(NftNode(tools_missing=["nft"]))
    for function in (live.read_table, lambda it: live.reference(it, ""), lambda it: live.wanted_files(it, "x")):
        with pytest.raises(MeshError, match=r"mesh_strict: nft is not installed on this node.*install the package nftables, or set"):
            function(system)
    assert live.read_counters(system) is None


def test_no_unshare():
    with pytest.raises(MeshError, match=r"unshare: command not found.*unshare of util-linux"):
        live.reference(System(NftNode(tools_missing=["unshare"])), "")


def test_a_kernel_without_nftables(node):
    node.kernel_error = "/dev/stdin:5:3-8: Error: Could not process rule: Operation not supported"
    with pytest.raises(MeshError, match=r"do not take the rules.*Operation not supported.*kernel with nf_tables.*mesh_strict to false"):
        live.reference(System(node), "")

    def refuse(words, data):
        raise Refused("netlink: Error: cache initialization failed: Protocol not supported")

    node._nft = refuse
    with pytest.raises(MeshError, match=r"cannot be read.*Protocol not supported.*needs root"):
        live.read_table(System(node))
    assert live.read_counters(System(node)) is None


def test_an_nft_without_json(node):
    node._unshare = lambda words, data: "table inet kubemesh_guard {\n"
    with pytest.raises(MeshError, match=r"no JSON.*built with JSON"):
        live.reference(System(node), "")


# --- at boot -----------------------------------------------------------------------------------------------------------------------------

class Ini(configparser.RawConfigParser):
    """A unit file; the names of settings as they are."""

    def __init__(self, text):
        super().__init__(strict=False)  # a setting may be emptied and set again
        self.optionxform = str
        self.read_string(text)


def test_the_unit(files):
    unit = Ini(live.unit_text("/usr/sbin/nft"))
    assert dict(unit["Service"]) == {"Type": "oneshot", "RemainAfterExit": "yes", "ExecStart": "/usr/sbin/nft -f %s" % live.GUARD_FILE}, (
        "stopping it opens nothing")
    assert unit["Unit"]["DefaultDependencies"] == "no" and "Conflicts" not in unit["Unit"], "nor does a shutdown"
    assert unit["Unit"]["Before"] == unit["Unit"]["Wants"] == "network-pre.target"
    assert unit["Unit"]["After"] == "local-fs.target systemd-modules-load.service"
    assert unit["Install"]["WantedBy"] == "sysinit.target"


def test_the_guard_comes_back_whenever_nftables_service_flushed_it(files):
    command = "-/usr/sbin/nft -f %s" % live.GUARD_FILE
    dropin = Ini(live.dropin_text("/usr/sbin/nft"))
    assert dropin.sections() == ["Service"]
    stop = "-/bin/sh -c '{ echo flush ruleset; cat %s; } | /usr/sbin/nft -f -'" % live.GUARD_FILE
    assert dict(dropin["Service"]) == {"ExecStartPost": command, "ExecReload": command, "ExecStop": stop}
    assert "\nExecStop=\nExecStop=-" in live.dropin_text("/usr/sbin/nft"), "instead of its own"


def apply_files(node, text):
    system = System(node)
    steps = plan_files(live.wanted_files(system, text))
    units = live.unit_steps(system, text is not None, steps)
    live.apply_files(system, steps, units)
    return steps, units


def test_files(node, files):
    text = plan.ruleset_text(guard(2))
    apply_files(node, text)
    assert node.changes == ["systemctl daemon-reload", "systemctl enable kubemesh-guard.service"], "not started: that would load it again"
    with open(live.GUARD_FILE, encoding="utf-8") as handle:
        assert handle.read() == text
    assert os.stat(live.GUARD_FILE).st_mode & 0o777 == 0o640
    assert os.stat(live.GUARD_UNIT_FILE).st_mode & 0o777 == os.stat(live.NFTABLES_DROPIN).st_mode & 0o777 == 0o644
    del node.changes[:]
    assert apply_files(node, text) == ([], []) and node.changes == []
    assert apply_files(node, plan.ruleset_text(guard(2, 3)))[1] == [] and node.changes == [], "systemd need not know of other elements"
    os.unlink(live.NFTABLES_DROPIN)
    assert apply_files(node, plan.ruleset_text(guard(2, 3)))[1] == [] and node.changes == ["systemctl daemon-reload"]
    node.units[live.GUARD_UNIT]["enabled"] = False
    assert apply_files(node, plan.ruleset_text(guard(2, 3))) == ([], [{"op": "enable_unit", "unit": live.GUARD_UNIT}])


def test_no_file_is_left(node, files):
    apply_files(node, plan.ruleset_text(guard(2)))
    del node.changes[:]
    apply_files(node, None)
    assert node.changes == ["systemctl disable --now kubemesh-guard.service", "systemctl daemon-reload"]
    assert sorted(os.listdir(str(files))) == ["guard_unit_file"] and os.listdir(str(files / "guard_unit_file")) == []
    del node.changes[:]
    assert apply_files(node, None) == ([], []) and node.changes == []


# --- for who only looks ------------------------------------------------------------------------------------------------------------------

def test_status(node, files, monkeypatch):
    system = System(node)
    nothing = {"present": False, "in_force": False, "at_boot": False, "reason": "", "counters": plan.counts_of(None), "exempt_cidrs": []}
    assert live.guard_status(system) == nothing
    apply_files(node, plan.ruleset_text(guard(2)))
    assert live.guard_status(system) == dict(nothing, at_boot=True, reason="table kubemesh_guard: it is not there")
    bring(node, guard(2))
    node.count("out_pods", 3, 252)
    good = dict(nothing, present=True, in_force=True, at_boot=True, counters=live.read_counters(system))
    assert live.guard_status(system) == good and good["counters"]["out_pods"]["packets"] == 3
    before = list(node.changes)
    node.table["sets"]["pods4"]["elements"] = []
    assert live.guard_status(system) == dict(good, in_force=False, reason="table kubemesh_guard: the elements of pods4 differ")
    # A run that only wants to know whether there is a guard does not read its elements.
    with monkeypatch.context() as patch:
        patch.setattr(live, "read_table", None)
        assert live.guard_status(system, compare=False) == dict(good, in_force=None)
    # What an agent has done since that file was written is as it shall be.
    joined = guard(2, 3)
    bring(node, joined)
    assert not live.guard_status(system)["in_force"]
    assert live.guard_status(system, True, document(1, 2, 3), "n1")["in_force"]
    bring(node, guard(2))
    before = list(node.changes)
    node.table["chains"]["arriving"] = []
    assert live.guard_status(system)["reason"] == "table kubemesh_guard: its rules are not the wanted ones"
    assert node.changes == before, "it only looks"
    bring(node, guard(2))
    node.units[live.GUARD_UNIT]["enabled"] = False
    assert live.guard_status(system) == dict(
        good, at_boot=False, reason="kubemesh-guard.service is not enabled: the guard does not come back at boot")
    apply_files(node, plan.ruleset_text(guard(2, exempt_cidrs=["192.0.2.0/24"])))
    assert live.guard_status(system)["exempt_cidrs"] == ["192.0.2.0/24"]
    os.unlink(live.GUARD_FILE)
    assert live.guard_status(system)["exempt_cidrs"] == []
    assert live.guard_status(system)["reason"].endswith("guard.nft is not there: the guard does not come back at boot")


def test_status_without_nft(files):
    node = NftNode(tools_missing=["nft"])
    assert live.guard_status(System(node))["reason"] == ""
    os.makedirs(os.path.dirname(live.GUARD_FILE))
    with open(live.GUARD_FILE, "w", encoding="utf-8") as handle:
        handle.write("x")
    assert "nft is not installed any more" in live.guard_status(System(node))["reason"]


def test_status_of_a_file_that_says_nothing(node, files):
    apply_files(node, plan.ruleset_text(guard(2)).replace(plan.SETTINGS_MARK, "# "))
    found = live.guard_status(System(node), True, document(1, 2), "n1")
    assert not found["in_force"] and "does not say what it was made from" in found["reason"]
