# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import os

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _system
from ansible_collections.kubemesh.wireguard.plugins.modules import guard
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.documents import document, entry
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.guard_fakes import NftNode


class Killed(BaseException):
    """The run ends here, whatever it was doing."""


class Host:
    """Node a of a mesh of three, with its files below a directory."""

    def __init__(self, folder):
        self.folder = folder
        self.node = NftNode()
        self.document({"a": entry(1), "b": entry(2), "c": entry(3)})

    def document(self, nodes):
        doc = document(nodes)
        self.path("mesh.json").write_bytes(_mesh.document_bytes(doc))

    def path(self, name):
        return self.folder / name

    def files(self):
        """{path: (text, mode)} of everything below what stands in for /etc."""
        found = {}
        for folder, dummy, names in os.walk(str(self.path("etc"))):
            for name in names:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, str(self.path("etc")))] = (_system.read_text(path), _system.file_mode(path))
        return found

    def state(self):
        """All that a run may change."""
        return copy.deepcopy((self.node.table, self.node.units, self.files()))

    def restore(self, state):
        table, units, files = copy.deepcopy(state)
        self.node.table, self.node.units = table, units
        for name in self.files():
            self.path("etc").joinpath(name).unlink()
        for name, (text, mode) in files.items():
            _system.write_text(str(self.path("etc") / name), text, mode)

    def elements(self, name):
        return sorted(plan.interval_text(element) for element in self.node.table["sets"][name]["elements"])


@pytest.fixture
def host(tmp_path, monkeypatch):
    it = Host(tmp_path)
    for name in ("GUARD_FILE", "GUARD_UNIT_FILE", "NFTABLES_DROPIN"):
        monkeypatch.setattr(live, name, str(tmp_path) + getattr(live, name))
    monkeypatch.setattr(live, "OWN_FOLDERS", [str(tmp_path) + path for path in live.OWN_FOLDERS])
    monkeypatch.setattr(guard, "System", lambda module: _system.System(it.node))
    monkeypatch.setattr(guard.AnsibleModule, "warn", lambda module, text: it.node.warnings.append(text))
    return it


@pytest.fixture
def run(run_module, host):
    """-> function(check=False, **arguments) -> result"""
    def run(check=False, diff=True, **arguments):
        return run_module(guard.main, dict({"node": "a", "document_file": str(host.path("mesh.json"))}, **arguments), check, diff)

    return run


ALL_FILES = ["kubemesh/guard.nft", "systemd/system/kubemesh-guard.service", "systemd/system/nftables.service.d/kubemesh-guard.conf"]
NONE = {"packets": 0, "bytes": 0}
NONES = dict.fromkeys(("out_pods", "in_pods", "out_nodes", "in_nodes"), NONE)


# --- what a task does --------------------------------------------------------------------------------------------------------------------

def test_a_guard(host, run):
    result = run()
    assert result["changed"] and result["present"] and not result["was_present"]
    assert (result["counters"], result["guarded_nodes"], result["exempt_nodes"]) == (NONES, 2, [])
    assert result["steps"] == ["write file %s/etc/%s" % (host.folder, name) for name in ALL_FILES] + [
        "enable unit kubemesh-guard.service", "load table kubemesh_guard: it is not there"]
    assert host.elements("pods4") == ["10.244.2.0/24", "10.244.3.0/24"]
    assert sorted(host.files()) == ALL_FILES and host.files()[ALL_FILES[0]][1] == 0o640
    assert host.node.units[live.GUARD_UNIT] == {"enabled": True}
    assert host.node.warnings == []


def test_a_second_run_changes_nothing(host, run):
    """Nothing, in files, in the kernel, or in systemd."""
    for arguments in ({}, {"encrypt": "nodes", "exempt_cidrs": ["192.0.2.0/24", "192.0.2.128/25"], "exempt_nodes": ["b"]},
                      {"admin_ports": [], "ports": [7], "interfaces": ["kube0"]}, {"pod_networks": ["10.244.0.0/16"]}, {"persist": False},
                      {"state": "absent"}):
        assert run(**arguments)["changed"], arguments
        before = list(host.node.changes)
        result = run(**arguments)
        assert (result["changed"], result["steps"], result["present"]) == (False, [], "state" not in arguments), arguments
        assert host.node.changes == before
        assert all(item["before"] == item["after"] for item in result["diff"]), arguments


@pytest.mark.parametrize("first,then", [
    (None, {}), ({}, {"encrypt": "nodes"}), ({}, {"exempt_nodes": ["b"]}), ({}, {"state": "absent"}), ({}, {"persist": False}),
    ({}, {"fwmark": 8192, "encrypt": "nodes"}), ({"encrypt": "nodes"}, {"encrypt": "pods"})])
def test_check_mode_says_what_a_run_would_do(host, run, first, then):
    if first is not None:
        run(**first)
        host.node.count("out_pods", 1, 84)
    before, changes = host.state(), list(host.node.changes)
    expected = run(check=True, **then)
    assert (host.state(), host.node.changes) == (before, changes)
    result = run(**then)
    # How it was called differs, and newer versions of Ansible do not say it here.
    result.pop("invocation", None)
    expected.pop("invocation", None)
    assert result == expected


def test_diff_in_words(host, run):
    before, after = (run()["diff"][0][side] for side in ("before", "after"))
    assert before == "" and "pods 10.244.2.0/24  # b\n" in after and "chain leaving: hook postrouting, priority 90" in after
    host.document({"a": entry(1), "b": entry(2), "d": entry(4)})
    diff = run(admin_ports=[2222])["diff"]
    before, after = (set(diff[0][side].splitlines()) for side in ("before", "after"))
    assert before - after == {"administration port 22/tcp", "node 198.18.0.13  # c", "node 2001:db8::3  # c", "pods 10.244.3.0/24  # c",
                              "pods fd00:10:244:3::/64  # c"}, "who left is named as well"
    assert after - before == {"administration port 2222/tcp", "node 198.18.0.14  # d", "node 2001:db8::4  # d", "pods 10.244.4.0/24  # d",
                              "pods fd00:10:244:4::/64  # d"}
    assert [item["before_header"] for item in diff[1:]] == [live.GUARD_FILE]
    gone = run(state="absent")["diff"]
    assert gone[0]["after"] == "" and [item["after"] for item in gone[1:]] == ["", "", ""]
    assert "diff" not in run(diff=False)


def test_nothing_is_left_behind(host, run):
    run(encrypt="nodes")
    host.node.count("in_nodes", 2, 168)
    result = run(state="absent")
    assert result["changed"] and result["was_present"] and not result["present"]
    assert result["counters"] == dict(NONES, in_nodes={"packets": 2, "bytes": 168}), "what it was in the end"
    assert host.node.table is None and host.files() == {} and not host.node.units[live.GUARD_UNIT]["enabled"]
    assert not host.path("etc/kubemesh").exists() and not host.path("etc/systemd/system/nftables.service.d").exists()


def test_without_files(host, run):
    run(persist=False)
    assert host.files() == {} and host.node.table is not None and live.GUARD_UNIT not in host.node.units
    run()
    result = run(persist=False)
    assert result["changed"] and host.files() == {} and host.node.table is not None


# --- what changes -------------------------------------------------------------------------------------------------------------------------

def test_a_node_that_joins_and_one_that_leaves(host, run):
    run()
    host.node.count("out_pods", 3, 252)
    host.document({"a": entry(1), "b": entry(2), "d": entry(4)})
    del host.node.changes[:]
    result = run()
    assert host.node.changes == ["nft elements"]
    assert result["counters"]["out_pods"] == {"packets": 3, "bytes": 252}
    assert [step for step in result["steps"] if "pods" in step] == [
        "remove pods 10.244.3.0/24  # c", "add pods 10.244.4.0/24  # d", "remove pods fd00:10:244:3::/64  # c",
        "add pods fd00:10:244:4::/64  # d"]


def test_loosened_and_exact_again(host, run):
    """What was exempt and what shall be are both on the way; the file says the same, for a reboot in between."""
    run(encrypt="nodes", exempt_cidrs=["198.18.0.13/32"])
    wanted = {"encrypt": "nodes", "exempt_nodes": ["b"]}
    before = host.state()
    told = run(check=True, loosen=True, **wanted)
    assert host.state() == before
    result = run(loosen=True, **wanted)
    assert result["changed"] and result["steps"] == told["steps"]
    assert host.elements("exempt4") == ["198.18.0.13"] and host.elements("nodes4") == ["198.18.0.13"]
    settings = plan.settings_of(_system.read_text(live.GUARD_FILE))
    assert settings["exempt_nodes"] == ["b"] and settings["exempt_cidrs"] == ["198.18.0.13/32"]
    assert not run(loosen=True, **wanted)["changed"]
    run(**wanted)
    assert host.elements("exempt4") == []
    before = host.state()
    assert not run(loosen=True, encrypt="nodes")["changed"] and host.state() == before, "what gets stricter is for the end"


def test_loosening_makes_no_guard(host, run):
    result = run(loosen=True)
    assert not result["changed"] and not result["present"]


def test_counters_go_on_over_a_change_of_rules(host, run):
    run()
    host.node.count("out_pods", 3, 252)
    result = run(encrypt="nodes")
    assert result["counters"] == dict(NONES, out_pods={"packets": 3, "bytes": 252})
    assert host.node.table["counters"]["out_pods"] == {"packets": 3, "bytes": 252}
    assert "packets 0 bytes 0" in host.files()[ALL_FILES[0]][0] and "packets 3" not in host.files()[ALL_FILES[0]][0]


def flushed(host):
    host.node.table = None


def an_element_gone(host):
    host.node.table["sets"]["pods4"]["elements"].pop()


def everything_exempt(host):
    host.node.table["sets"]["exempt4"]["elements"].append((4, 0, 0xFFFFFFFF))


def a_device_more(host):
    host.node.table["sets"]["links"]["elements"].append("eth0")


def a_rule_more(host):
    host.node.table["chains"]["leaving"].insert(1, "accept")


def a_chain_without_hook(host):
    del host.node.table["chains"]["leaving"][0]


def a_file_edited(host):
    host.path("etc/kubemesh/guard.nft").write_text("flush ruleset\n")


def a_file_readable(host):
    host.path("etc/kubemesh/guard.nft").chmod(0o644)


def a_unit_off(host):
    host.node.units[live.GUARD_UNIT]["enabled"] = False


def a_dropin_gone(host):
    host.path("etc/" + ALL_FILES[2]).unlink()


@pytest.mark.parametrize("drift", [
    flushed, an_element_gone, everything_exempt, a_device_more, a_rule_more, a_chain_without_hook, a_file_edited, a_file_readable,
    a_unit_off, a_dropin_gone])
def test_drift_is_mended(host, run, drift):
    run()
    good = host.state()
    drift(host)
    assert host.state() != good
    expected = run(check=True)
    assert expected["changed"] and len(expected["steps"]) == 1, expected["steps"]
    assert expected["was_present"] == (drift is not flushed) and expected["present"]
    assert run()["steps"] == expected["steps"]
    for each in (host.state(), good):
        for target in each[0]["sets"].values():
            target["elements"].sort()
    assert host.state() == good and not run()["changed"]


def test_something_that_undoes_it_at_once_is_an_error(host, run):
    run()
    load = host.node._nft

    def undone(words, data):
        out = load(words, data)
        if words == ["-f", "-"]:
            host.node.table["sets"]["pods4"]["elements"] = []
        return out

    host.node._nft = undone
    result = run(encrypt="nodes")
    assert result["failed"] and "add pods 10.244.2.0/24" in result["msg"] and "nft monitor" in result["msg"]


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------

def test_warnings(host, run):
    host.document({"a": entry(1), "b": entry(2), "d": entry(4, state="pending", reason="no key", public_keys={}, probe_addresses={})})
    result = run(exempt_nodes=["b", "z"], exempt_cidrs=["10.244.4.0/25"])
    assert (result["exempt_nodes"], result["guarded_nodes"]) == (["b"], 1)
    assert [text.split(":")[0] for text in host.node.warnings] == [
        "exempt_nodes", "d has no key yet and no tunnel", "exempt_cidrs"]
    del host.node.warnings[:]
    assert not run(exempt_nodes=["b", "z"], exempt_cidrs=["10.244.4.0/25"])["changed"] and len(host.node.warnings) == 3


@pytest.mark.parametrize("arguments,words", [
    ({"node": None}, "node: the name of this host"), ({"node": "z"}, "'z'"), ({"fwmark": 0}, "mesh_fwmark"),
    ({"document_file": "/nonexistent/mesh.json"}, "mesh.json"), ({"state": "gone"}, "state"), ({"encrypt": "all"}, "encrypt"),
    ({"exempt_cidrs": ["b"]}, "exempt_cidrs: 'b'"), ({"interfaces": []}, "interfaces"), ({"admin_ports": [-1]}, "admin_ports: -1")])
@pytest.mark.parametrize("check", [True, False])
def test_errors_name_what_is_wrong(host, run, arguments, words, check):
    result = run(check=check, **arguments)
    assert result["failed"] and words in result["msg"] and host.node.changes == [] and host.files() == {}


@pytest.mark.parametrize("check", [True, False])
def test_a_node_that_cannot_have_a_guard_says_so_before_anything_is_changed(host, run, check):
    host.node.kernel_error = "Error: Could not process rule: Operation not supported"
    result = run(check=check)
    assert result["failed"] and "Operation not supported" in result["msg"] and host.state() == (None, {}, {})
    host.node.tools_missing.add("nft")
    result = run(check=check)
    assert result["failed"] and "nft is not installed" in result["msg"] and host.state() == (None, {}, {})


def test_absent_needs_neither_document_nor_name(host, run):
    run()
    host.path("mesh.json").unlink()
    assert not run(state="absent", node=None).get("failed") and host.node.table is None


def test_absent_needs_nft_only_where_there_was_a_guard(host, run):
    host.node.tools_missing.add("nft")
    result = run(state="absent")
    assert not result.get("failed") and not result["changed"]
    host.node.tools_missing.clear()
    run()
    host.node.tools_missing.add("nft")
    result = run(state="absent")
    assert result["failed"] and "nft is not installed" in result["msg"] and sorted(host.files()) == ALL_FILES


# --- interrupted runs --------------------------------------------------------------------------------------------------------------------

def killed_at(host, run, place, monkeypatch, **arguments):
    """Run a task that ends at its ``place``-th change of anything; -> whether it was ended."""
    left = [place]

    def count(*dummy):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    write, remove = _system.write_text, _system.remove_file
    with monkeypatch.context() as patch:
        patch.setattr(_system, "write_text", lambda *each: (count(), write(*each)))
        patch.setattr(_system, "remove_file", lambda *each: (count(), remove(*each)))
        host.node.hooks.append(count)
        try:
            run(**arguments)
        except Killed:
            return True
        finally:
            host.node.hooks.remove(count)
    return False


@pytest.mark.parametrize("first,then,places", [
    (None, {}, 6), ({}, {"encrypt": "nodes", "exempt_nodes": ["b"]}, 2), ({}, {"exempt_nodes": ["b"]}, 2), ({"encrypt": "nodes"}, {}, 2),
    ({}, {"state": "absent"}, 6)])
def test_a_run_that_is_cut_off_anywhere(host, run, monkeypatch, first, then, places):
    """There is no moment without a guard, and the next run gets to the same end."""
    if first is not None:
        run(**first)
    begin = host.state()
    run(**then)
    end = host.state()
    for place in range(20):
        host.restore(begin)
        killed = killed_at(host, run, place, monkeypatch, **then)
        if first is not None and then.get("state") != "absent":
            assert host.node.table is not None, place
        assert host.node.table in (begin[0], end[0]), "one transaction"
        run(**then)
        assert host.state() == end, place
        if not killed:
            assert place == places
            return
    raise AssertionError("no end in sight")


def test_what_would_bring_a_guard_back_goes_first(host, run, monkeypatch):
    """A guard that came back at boot after its mesh is gone would cut the node off."""
    run()
    assert killed_at(host, run, 5, monkeypatch, state="absent")
    assert host.files() == {} and host.node.table is not None
