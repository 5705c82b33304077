# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _system
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.modules import routes
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.documents import document, entry
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import TABLE_MAIN, Node, instead_of_the_kernel

TABLE = 51840


class Killed(BaseException):
    """The run ends here, whatever it was doing."""


class Host:
    """Node a of a mesh of three, with its files below a directory."""

    def __init__(self, folder):
        self.folder = folder
        self.node = Node()
        self.node.add_link("eth0", addresses=["198.18.0.11/24", "2001:db8::1/64"], default=True)
        self.node.add_link("wgmesh0", "wireguard", ["198.18.0.11/32", "2001:db8::1/128"])
        self.node.add_link("cni0", "bridge", ["10.244.1.1/24"])
        for dst, device in (("10.244.1.0/24", "cni0"), ("0.0.0.0/0", "eth0")):
            self.node.routes.setdefault(("ipv4", TABLE_MAIN), {})[dst] = {
                "family": "ipv4", "table": TABLE_MAIN, "dst": dst, "dev": device, "type": "unicast", "src": "", "mtu": 0, "peer": ""}
        self.carried = []
        self.carry_result = {"replaced": 3, "left": 0, "guarded": True, "detoured": True, "exposed": 0, "error": ""}
        self.document({"a": entry(1), "b": entry(2), "c": entry(3)})
        self.prove("b", "c")

    def document(self, nodes):
        self.doc = document(nodes)
        self.path("mesh.json").write_bytes(_mesh.document_bytes(self.doc))

    def prove(self, *names):
        self.path("proof.json").write_text(json.dumps({"schema": 1, "generation": 0, "peers": {
            name: {"proven": True, "public_key": self.doc["nodes"][name]["public_keys"]["0"], "time": 1} for name in names}}))

    def path(self, name):
        return self.folder / name

    def arguments(self, **other):
        return dict({"node": "a", "document_file": str(self.path("mesh.json")), "proof_file": str(self.path("proof.json"))}, **other)

    def carry_over(self, cidrs, done, switch):
        begin = len(self.node.changes)
        switch()
        self.carried.append((begin, len(self.node.changes), cidrs, id(done)))
        return self.carry_result

    def state(self):
        return live.read_state(_system.System(self.node), TABLE)

    def rules(self):
        return [plan.rule_text(item) for item in self.state()["rules"]]

    def files(self):
        return sorted(os.listdir(str(self.path("etc")))) if self.path("etc").is_dir() else []


@pytest.fixture
def host(tmp_path, monkeypatch):
    it = Host(tmp_path)
    folder = tmp_path / "etc"
    monkeypatch.setattr(live, "ROUTES_UNIT_FILE", str(folder / live.ROUTES_UNIT))
    monkeypatch.setattr(live, "RESTORE_SCRIPT", str(folder / "restore-routes"))
    for name in ("ROUTES_FILES", "RULES_FILES"):
        monkeypatch.setattr(live, name, {family: str(folder / os.path.basename(path)) for family, path in getattr(live, name).items()})
    monkeypatch.setattr(routes, "System", lambda module: _system.System(it.node))
    monkeypatch.setattr(live, "carry_over", it.carry_over)
    monkeypatch.setattr(routes, "remove_empty_folders", lambda paths: _system.remove_empty_folders([str(folder)]))
    with instead_of_the_kernel(it.node):
        yield it


@pytest.fixture
def run(run_module, host):
    """-> function(check=False, **arguments) -> result"""
    def run(check=False, diff=True, **arguments):
        return run_module(routes.main, host.arguments(**arguments), check, diff)

    return run


ALL_FILES = sorted([live.ROUTES_UNIT, "restore-routes", "routes-ipv4.batch", "routes-ipv6.batch", "rules-ipv4.batch", "rules-ipv6.batch"])
RULES = ["priority 400 from all lookup 51840"] * 2 + [
    "priority 401 from 10.244.1.0/24 lookup 51841", "priority 401 from fd00:10:244:1::/64 lookup 51841"]


# --- a switch that must be confirmed -----------------------------------------------------------------------------------------------------

@pytest.fixture
def timer(host, monkeypatch):
    """Instead of systemd: what was armed, and when."""
    it = {"armed": [], "taken_back": False}
    monkeypatch.setattr(routes._confirm, "arm", lambda system, steps, seconds: it["armed"].append((len(host.node.changes), seconds)))
    monkeypatch.setattr(routes._confirm, "disarm", lambda system: it["taken_back"])
    return it


def test_host_encryption_is_armed_before_anything_changes_and_written_when_it_is_confirmed(host, run, timer):
    run(send=True)
    written, changes = {name: host.path("etc").joinpath(name).read_text() for name in host.files()}, len(host.node.changes)
    predicted = run(check=True, send=True, encrypt="nodes", confirm_timeout=30)
    assert timer["armed"] == [] and len(host.node.changes) == changes
    switched = run(send=True, encrypt="nodes", confirm_timeout=30)
    assert timer["armed"] == [(changes, 30)] and switched["armed"] and switched["changed"]
    assert "priority 402 not from all fwmark 0x1000/0x1000 lookup 51841" in host.rules()
    assert {name: host.path("etc").joinpath(name).read_text() for name in host.files()} == written, "not after a reboot"
    confirmed = run(send=True, encrypt="nodes", confirm=True)
    assert confirmed["changed"] and not confirmed["armed"]
    assert "priority 402" in host.path("etc").joinpath("rules-ipv4.batch").read_text()
    assert switched["steps"] + confirmed["steps"] == predicted["steps"]
    assert not run(send=True, encrypt="nodes", confirm=True)["changed"]
    assert not run(send=True, encrypt="nodes", confirm_timeout=30)["armed"] and len(timer["armed"]) == 1


def test_host_encryption_is_switched_off_under_the_same_guard(host, run, timer):
    run(send=True, encrypt="nodes")
    assert run(send=True, confirm_timeout=30)["armed"]


def test_pods_alone_need_no_confirmation(host, run, timer):
    result = run(send=True, confirm_timeout=30)
    assert not result["armed"] and timer["armed"] == [] and host.files() == ALL_FILES


def test_a_change_that_was_taken_back_is_a_failure(host, run, timer):
    timer["taken_back"] = True
    result = run(send=True, encrypt="nodes", confirm=True)
    assert result["failed"] and "took its rules back" in result["msg"] and host.node.changes == []
    assert not run(send=True).get("failed"), "a new run is not the confirmation of the last one"


def test_node_addresses_that_are_exempt(host, run):
    run(send=True, encrypt="nodes", exempt_cidrs=["198.18.0.12/31"])
    nodes = {item["dst"] for item in host.state()["routes"] if item["table"] == TABLE + 1}
    assert nodes == {"2001:db8::2/128", "2001:db8::3/128"}
    assert {item["dst"] for item in host.state()["routes"] if item["table"] == TABLE and item["family"] == "ipv4"} == {
        "10.244.2.0/24", "10.244.3.0/24"}
    assert "mesh_exempt_cidrs: 'x'" in run(exempt_cidrs=["x"])["msg"]


# --- what a task does --------------------------------------------------------------------------------------------------------------------

def test_tables_without_rules(host, run):
    result = run()
    assert result["changed"] and not result["sending"] and not result["was_sending"]
    assert (result["routed_peers"], result["unrouted_peers"], result["kept_peers"]) == (2, [], [])
    assert len(host.state()["routes"]) == 8 and host.rules() == []
    assert host.files() == ALL_FILES and host.node.units[live.ROUTES_UNIT]["enabled"]
    assert host.carried == [], "nothing moves"
    assert result["steps"][:1] == ["set route 10.244.2.0/24 dev wgmesh0 table 51840 src 198.18.0.11  # b"]


def test_the_switch(host, run):
    run()
    result = run(send=True)
    assert result["changed"] and result["sending"] and not result["was_sending"]
    assert host.rules() == RULES
    assert result["carried_connections"] == 3 * 2
    assert "add rule priority 400 from all lookup 51840" in result["steps"]
    assert "add rule priority 400 from all lookup 51840 (IPv6)" in result["steps"]
    assert run(send=True)["was_sending"]


def test_the_tables_are_parted_before_the_first_rule_only(host, run):
    seen = []
    host.node.hooks.append(lambda node, text: seen.append(node.parted) if " rule add " in text else None)
    run()
    assert not host.node.parted
    run(send=True)
    assert seen and all(seen)
    host.node.parted = False
    run(send=True, encrypt="nodes")
    assert not host.node.parted


def test_a_second_run_changes_nothing(host, run):
    """Nothing, in files, in the kernel, or in systemd."""
    for arguments in ({}, {"send": True}, {"send": True, "encrypt": "nodes"}, {"send": False}, {"state": "absent"}):
        run(**arguments)
        before = list(host.node.changes)
        result = run(**arguments)
        assert (result["changed"], result["steps"], result["carried_connections"]) == (False, [], 0), arguments
        assert host.node.changes == before
        assert all(item["before"] == item["after"] for item in result["diff"]), arguments


@pytest.mark.parametrize("first,then", [
    ({}, {"send": True}), (None, {"send": True}), ({"send": True}, {"send": False}), ({"send": True}, {"state": "absent"}),
    ({"send": True}, {"send": True, "encrypt": "nodes"}), ({}, {"persist": False})])
def test_check_mode_says_what_a_run_would_do(host, run, first, then):
    if first is not None:
        run(**first)
    before, files = list(host.node.changes), host.files()
    expected = run(check=True, **then)
    assert (host.node.changes, host.files()) == (before, files)
    result = run(**then)
    for field in ("changed", "steps", "sending", "was_sending", "routed_peers", "unrouted_peers", "diff"):
        assert result[field] == expected[field], field


def test_diff(host, run):
    run()
    diff = run(send=True)["diff"]
    kernel = diff[0]
    added = set(kernel["after"].splitlines()) - set(kernel["before"].splitlines())
    assert added == {"ip%s rule %s" % (" -6" if "fd00" in text or number == 1 else "", text) for number, text in enumerate(RULES)}
    assert [os.path.basename(item["before_header"]) for item in diff[1:]] == ["rules-ipv4.batch", "rules-ipv6.batch"]
    assert "# b" in kernel["before"], "routes that the kernel has show their peer as well"
    assert "diff" not in run(diff=False)


def test_nothing_is_left_behind(host, run):
    run(send=True, encrypt="nodes")
    result = run(state="absent")
    assert result["changed"] and result["was_sending"] and not result["sending"]
    assert host.state() == {"routes": [], "rules": []} and host.files() == []
    assert not host.path("etc").exists() and not host.node.units[live.ROUTES_UNIT]["enabled"]
    verbs = [change.split()[2:4] for change in host.node.changes if " del " in change]
    assert verbs == [["rule", "del"]] * 6 + [["route", "del"]] * 8, "rules, then routes"


def test_without_files(host, run):
    run(persist=False, send=True)
    assert host.files() == [] and host.rules() == RULES
    assert live.ROUTES_UNIT not in host.node.units


# --- which peers -------------------------------------------------------------------------------------------------------------------------

def test_only_proven_peers(host, run):
    host.prove("c")
    result = run()
    assert (result["routed_peers"], result["unrouted_peers"]) == (1, ["b"])
    assert {item["dst"] for item in host.state()["routes"]} == {
        "10.244.3.0/24", "fd00:10:244:3::/64", "198.18.0.13/32", "2001:db8::3/128"}
    assert run(peers="all")["routed_peers"] == 2


def test_a_peer_that_is_away_keeps_its_routes(host, run):
    run(send=True)
    host.prove("c")
    result = run(send=True)
    assert (result["changed"], result["kept_peers"], result["unrouted_peers"]) == (False, ["b"], [])
    result = run(send=True, unproven="drop")
    assert (result["kept_peers"], result["unrouted_peers"]) == ([], ["b"])
    assert not any("10.244.2" in item["dst"] for item in host.state()["routes"])
    assert host.rules() == RULES, "the rules stay"


def test_a_proof_with_another_key_is_none(host, run):
    host.document({"a": entry(1), "b": entry(2), "c": entry(3)})
    host.prove("b", "c")
    host.document({"a": entry(1), "b": entry(5, node_addresses=[], pod_cidrs=["10.244.2.0/24"]), "c": entry(3)})
    assert run()["unrouted_peers"] == ["b"]


def test_without_proof(host, run):
    host.path("proof.json").unlink()
    assert run(check=True)["routed_peers"] == 2, "a first run in check mode has no proof yet"
    result = run()
    assert result["failed"] and "proof.json is not there or damaged" in result["msg"] and host.node.changes == []
    host.path("proof.json").write_text("{}")
    assert "damaged" in run()["msg"]
    assert "damaged" in run(check=True)["msg"]
    assert run(peers="all")["routed_peers"] == 2


def test_a_node_that_joins_and_one_that_leaves(host, run):
    run(send=True)
    del host.node.changes[:]
    host.document({"a": entry(1), "c": entry(3), "d": entry(4)})
    host.prove("c", "d")
    result = run(send=True)
    assert result["routed_peers"] == 2 and not any("rule" in change for change in host.node.changes)
    dsts = {item["dst"] for item in host.state()["routes"]}
    assert "10.244.4.0/24" in dsts and "10.244.2.0/24" not in dsts and "10.244.3.0/24" in dsts
    assert not any("10.244.3" in change for change in host.node.changes), "what stays is not touched"


def test_drift_is_mended(host, run):
    run(send=True)
    host.node.rules["ipv4"] = [item for item in host.node.rules["ipv4"] if item["priority"] != 400]
    del host.node.routes[("ipv6", TABLE)]["fd00:10:244:2::/64"]
    host.node.units[live.ROUTES_UNIT]["enabled"] = False
    result = run(send=True)
    assert result["was_sending"] and host.rules() == RULES and len(host.state()["routes"]) == 8
    assert sorted(result["steps"]) == [
        "add rule priority 400 from all lookup 51840", "enable unit %s" % live.ROUTES_UNIT,
        "set route fd00:10:244:2::/64 dev wgmesh0 table 51840 src 2001:db8::1  # b"]


# --- connections that are carried over ---------------------------------------------------------------------------------------------------

def test_connections_are_carried_over_around_the_switch(host, run):
    """Each family for itself; what was carried over is not touched again."""
    run()
    start = len(host.node.changes)
    run(send=True)
    changes = host.node.changes
    begin = next(place for place in range(start, len(changes)) if " rule add " in changes[place])
    v4, v6 = (sum(1 for change in changes if change.startswith("ip %s rule add" % option)) for option in ("-4", "-6"))
    assert [(first - begin, last - begin) for first, last, dummy, dummy2 in host.carried] == [(0, v4), (v4, v4 + v6)]
    assert host.carried[0][2] == ["10.244.2.0/24", "10.244.3.0/24", "198.18.0.12/32", "198.18.0.13/32"]
    assert all(":" in cidr for cidr in host.carried[1][2])
    assert len({done for dummy, dummy2, dummy3, done in host.carried}) == 1


def test_a_route_that_changes_its_device_under_a_rule_moves(host, run):
    run(send=True)
    del host.carried[:]
    host.node.add_link("wgmesh1", "wireguard")
    run(send=True, interface="wgmesh1")
    assert len(host.carried) == 1 and len(host.carried[0][2]) == 8


def test_what_could_not_be_carried_over_is_said(host, run):
    host.carry_result = {"replaced": 1, "left": 2, "guarded": False, "detoured": False, "exposed": 1, "error": "Device or resource busy"}
    result = run(send=True)
    assert not result.get("failed") and host.rules() == RULES
    assert "2 left" in host.node.warnings[0] and "Device or resource busy" in host.node.warnings[0]


@pytest.mark.parametrize("detoured,exposed,said", [(False, 2, True), (False, 0, False), (True, 2, False)])
def test_a_packet_that_may_have_been_lost_is_said(host, run, detoured, exposed, said):
    host.carry_result = {"replaced": 3, "left": 0, "guarded": True, "detoured": detoured, "exposed": exposed, "error": ""}
    run(send=True)
    assert ["2 masqueraded connections other than TCP" in text for text in host.node.warnings] == [True] * 2 * said


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------

def test_the_kernel_sends_elsewhere(host, run):
    host.node.rules["ipv4"].append({"priority": 5, "src": "all", "table": "100"})
    host.node.routes[("ipv4", 100)] = {"10.244.2.0/24": dict(host.node.routes[("ipv4", TABLE_MAIN)]["0.0.0.0/0"], dst="10.244.2.0/24")}
    result = run(send=True)
    assert result["failed"] and "10.244.2.0/24 by eth0 (from this host)" in result["msg"] and "mesh_rule_priority" in result["msg"]
    assert result["was_sending"] is False, "so that the role knows whose rules these are"
    assert not run(send=False).get("failed") and host.rules() == []


@pytest.mark.parametrize("arguments,words", [
    ({"node": None}, "node: the name of this host"), ({"node": "z"}, "'z'"), ({"table": 254}, "mesh_table: 254"),
    ({"rule_priority": 40000}, "mesh_rule_priority"), ({"fwmark": 0}, "mesh_fwmark"),
    ({"document_file": "/nonexistent/mesh.json"}, "mesh.json"), ({"state": "gone"}, "state"), ({"encrypt": "all"}, "encrypt")])
def test_errors_name_what_is_wrong(host, run, arguments, words):
    result = run(**arguments)
    assert result["failed"] and words in result["msg"] and host.node.changes == []


def test_a_device_that_is_missing(host, run):
    del host.node.links["wgmesh0"]
    result = run(send=True)
    assert result["failed"] and "wgmesh0" in result["msg"] and host.rules() == []


def test_absent_needs_neither_document_nor_name(host, run):
    run(send=True)
    host.path("mesh.json").unlink()
    host.path("proof.json").unlink()
    result = run(state="absent", node=None)
    assert not result.get("failed") and host.state() == {"routes": [], "rules": []}


# --- interrupted runs --------------------------------------------------------------------------------------------------------------------

def killed_at(host, run, place, **arguments):
    """Run and be killed before the change of that number; False when there are not so many."""
    seen = []

    def hook(node, text):
        seen.append(text)
        if len(seen) > place:
            raise Killed

    host.node.hooks = [hook]
    try:
        run(**arguments)
    except Killed:
        return True
    finally:
        host.node.hooks = []
    return False


def lost(host):
    """Routed prefixes that the kernel would send nowhere: a rule that leads into a table which does not have them."""
    state = host.state()
    tables = {(item["family"], item["table"]) for item in state["rules"]}
    wanted = plan.table_routes(host.doc, "a")
    there = {(item["table"], item["dst"]) for item in state["routes"]}
    return [(table, dst) for table, entries in ((TABLE, wanted["pods"]), (TABLE + 1, wanted["nodes"])) for dst, dummy in entries
            if (_mesh.family_of(dst), table) in tables and (table, dst) not in there]


@pytest.mark.parametrize("first,then", [
    ({}, {"send": True}), (None, {"send": True}), ({"send": True}, {"send": False}), ({"send": True}, {"state": "absent"}),
    ({"send": True}, {"send": True, "encrypt": "nodes"}), ({"send": True, "encrypt": "nodes"}, {"send": True})])
def test_a_run_may_end_anywhere_and_the_next_one_finishes(host, run, first, then):
    if first is not None:
        run(**first)
    links = host.node.links
    for place in range(40):
        saved = json.loads(json.dumps([[list(key_), value] for key_, value in host.node.routes.items()])), json.loads(json.dumps(
            host.node.rules)), json.loads(json.dumps(host.node.units))
        files = {name: host.path("etc").joinpath(name).read_bytes() for name in host.files()}
        killed = killed_at(host, run, place, **then)
        assert lost(host) == [], "a table is complete before a rule leads there, and emptied after"
        result = run(**then)
        assert not result.get("failed")
        assert run(**then)["changed"] is False
        expected = [] if then.get("state") == "absent" or not then.get("send") else RULES + (
            ["priority 402 not from all fwmark 0x1000/0x1000 lookup 51841"] * 2 if then.get("encrypt") else [])
        assert host.rules() == expected
        if not killed:
            assert place > 1
            break
        # and again from the beginning
        host.node.routes = {tuple(key_): value for key_, value in saved[0]}
        host.node.rules, host.node.units, host.node.links = saved[1], saved[2], links
        for name in host.files():
            host.path("etc").joinpath(name).unlink()
        host.path("etc").mkdir(exist_ok=True)
        for name, data in files.items():
            host.path("etc").joinpath(name).write_bytes(data)
            host.path("etc").joinpath(name).chmod(0o755 if name == "restore-routes" else 0o644)
    else:
        raise AssertionError("no end in sight")


def test_files_first_on_the_way_in_and_last_on_the_way_out(host, run):
    """A node that reboots in between comes back as it shall be, or as it was."""
    assert killed_at(host, run, 2, send=True)
    assert host.files() == ALL_FILES and "rule add priority 400" in host.path("etc").joinpath("rules-ipv4.batch").read_text()
    run(send=True)
    assert killed_at(host, run, 1, state="absent")
    assert host.files() == ALL_FILES
