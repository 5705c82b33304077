# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface, _mesh, _persist, _routes_plan, _system
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.modules import mesh_info
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import Files, Node, WireGuard, instead_of_the_kernel

DOCUMENT = "/etc/kubemesh/mesh.json"
NOW = 1763874000.0


def key(number):
    return chr(ord("A") + number) * 42 + "A="


def entry(number, **other):
    return dict({
        "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)},
        "endpoints": {"ipv4": {"address": "198.18.0.1%d" % number, "port": None}}, "pod_cidrs": ["10.244.%d.0/24" % number],
        "node_addresses": ["198.18.0.1%d" % number], "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": 1400,
        "keepalive": 0}, **other)


class Host:
    """Node a, as the modules interface and routes left it."""

    def __init__(self):
        self.node = Node()
        self.guard = {"present": False, "in_force": False, "at_boot": False, "reason": "", "counters": {}}
        self.files, self.wg = Files(self.node), WireGuard(self.node)
        self.node.add_link("eth0", addresses=["198.18.0.11/24"])
        self.node.add_link("wgmesh0", "wireguard", ["198.18.0.11/32", "fe80::1/64"], mtu=1400, mode="none")
        self.files.sysctls["net/ipv4/conf/wgmesh0/rp_filter"] = "2"
        self.doc = _mesh.validate_document({
            "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
            "nodes": {"a": entry(1), "b": entry(2), "c": entry(3)}})
        self.files.content[DOCUMENT] = (_mesh.document_bytes(self.doc).decode(), 0o644)
        self.wg.states["wgmesh0"] = {"name": "wgmesh0", "public_key": key(1), "listen_port": 51840, "fwmark": 4096, "peers": {
            peer_key: {"endpoint": peer["endpoint"], "allowed_ips": peer["allowed_ips"], "keepalive": 0, "has_preshared_key": True,
                       "last_handshake": NOW - 5, "rx_bytes": 1, "tx_bytes": 2}
            for peer_key, peer in _mesh.peers_of(self.doc, "a", 0).items()}}
        settings = {"interface": "wgmesh0", "table": 51840, "rule_priority": 400, "fwmark": 4096, "encrypt": "pods", "send": True,
                    "unproven": "keep", "exempt_cidrs": [], "iifs": [], "own_cidrs": None}
        wanted = _routes_plan.wanted_state(self.doc, "a", settings, None, [])
        for route in wanted["routes"]:
            self.node.routes.setdefault((route["family"], route["table"]), {})[route["dst"]] = route
        self.node.change_rules([{"op": "add_rule", "rule": rule} for rule in wanted["rules"]])
        del self.node.changes[:]


@pytest.fixture
def host(monkeypatch):
    it = Host()
    it.files.stand_in(monkeypatch, mesh_info)
    monkeypatch.setattr(mesh_info, "System", lambda module: _system.System(it.node))
    monkeypatch.setattr(_interface, "client_for", it.wg.client_for)
    monkeypatch.setattr(mesh_info.time, "time", lambda: NOW)
    monkeypatch.setattr(
        mesh_info, "guard_status", lambda system, compare, *dummy: dict(it.guard, in_force=it.guard["in_force"] if compare else None))
    with instead_of_the_kernel(it.node):
        yield it
    assert it.node.changes == [], "a module that looks changes nothing"


@pytest.fixture
def run(run_module, host):
    def run(check=False, **arguments):
        return run_module(mesh_info.main, dict({"node": "a"}, **arguments), check)

    return run


def test_all_is_well(host, run):
    result = run()
    assert (result["changed"], result["node"], result["exists"], result["sending"]) == (False, "a", True, True)
    assert result["counts"] == {"encrypted": 2} and result["warnings_of_mesh"] == []
    assert [(peer["name"], peer["state"], peer["handshake_age"]) for peer in result["peers"]] == [
        ("b", "encrypted", 5), ("c", "encrypted", 5)]
    assert result["device"] == {
        "name": "wgmesh0", "implementation": "kernel", "up": True, "mtu": 1400, "listen_port": 51840, "public_key": key(1),
        "addresses": ["198.18.0.11/32", "fe80::1/64"]}
    assert run(check=True)["peers"] == result["peers"]


def test_what_of_it_is_returned(host, run):
    for detail, number in (("all", 2), ("problems", 0), ("none", 0)):
        result = run(detail=detail)
        assert result["guard"]["in_force"] is False
        assert result["counts"] == {"encrypted": 2} and len(result["peers"]) == number
    host.wg.states["wgmesh0"]["peers"][key(2)]["last_handshake"] = NOW - 1000
    assert [peer["name"] for peer in run(detail="problems")["peers"]] == ["b"]


def test_which_document_and_which_generations(host, run):
    result = run()
    assert result["document"] == {
        "serial": 1, "generation": 0, "ports": {"0": 51840, "1": 51841}, "sha256": _mesh.document_sha256(host.doc)}
    assert result["generations"] == [
        {"generation": 0, "name": "wgmesh0", "device": True, "key": False, "key_age": None, "preshared_keys": False, "boot": False,
         "routes": 4, "listen_port": 51840, "fwmark": 4096, "public_key": result["device"]["public_key"]}]
    assert result["encrypts"] == "pods"


@pytest.mark.parametrize("there", [True, False])
def test_whether_the_node_has_ipv6(host, run, monkeypatch, there):
    monkeypatch.setattr(_interface, "has_ipv6", lambda: there)
    assert run()["ipv6"] is there


def test_port_and_mark_that_are_in_use(host, run):
    assert run()["rule_fwmark"] is None, "only between nodes is the mark of any use"
    host.node.change_rules([{"op": "add_rule", "rule": {
        "family": "ipv4", "priority": 402, "table": 51841, "from": "", "iif": "", "not_fwmark": 8192}}])
    del host.node.changes[:]
    host.wg.states["wgmesh0"].update(listen_port=5555, fwmark=8192)
    result = run()
    assert result["rule_fwmark"] == 8192
    assert [(item["listen_port"], item["fwmark"]) for item in result["generations"]] == [(5555, 8192)]


def test_in_the_middle_of_a_rotation(host, run):
    """One peer is reached through the new device already, the other still through the old one: both are encrypted."""
    second = {name: dict(node, public_keys=dict(node["public_keys"], **{"1": key(number)}),
                         probe_addresses=dict(node["probe_addresses"], **{"1": _mesh.probe_address(key(number))}))
              for number, (name, node) in enumerate(sorted(host.doc["nodes"].items()), 11)}
    doc = _mesh.validate_document(dict(host.doc, generation=1, nodes=second))
    host.files.content[DOCUMENT] = (_mesh.document_bytes(doc).decode(), 0o644)
    host.node.add_link("wgmesh1", "wireguard", ["198.18.0.11/32", "fe80::2/64"], mtu=1400, mode="none")
    host.files.sysctls["net/ipv4/conf/wgmesh1/rp_filter"] = "2"
    host.wg.states["wgmesh1"] = dict(host.wg.states["wgmesh0"], name="wgmesh1", public_key=key(11), peers={
        peer_key: dict(host.wg.states["wgmesh0"]["peers"][key(2)], endpoint=peer["endpoint"], allowed_ips=peer["allowed_ips"])
        for peer_key, peer in _mesh.peers_of(doc, "a", 1).items()})
    for routes in host.node.routes.values():
        for route in routes.values():
            if route["peer"] == "b":
                route["dev"] = "wgmesh1"
    result = run()
    assert [(peer["name"], peer["state"], peer["generation"]) for peer in result["peers"]] == [("b", "encrypted", 1), ("c", "encrypted", 0)]
    assert result["device"]["name"] == "wgmesh1" and [item["routes"] for item in result["generations"]] == [2, 2]
    assert "rotation" in result["warnings_of_mesh"][0] and "rotate_keys" in result["warnings_of_mesh"][0]
    assert run(generation=0)["device"]["name"] == "wgmesh0"


def test_strict_mode(host, run):
    assert run()["guard"]["present"] is False
    host.guard = dict(host.guard, present=True, reason="the table differs")
    result = run()
    assert result["guard"]["present"] and result["warnings_of_mesh"] == ["strict mode: the table differs; run the playbook enable"]


def test_a_userspace_device(host, run):
    host.node.links["wgmesh0"]["kind"] = "tun"
    assert run()["device"]["implementation"] == "userspace"


def test_a_node_that_does_not_send(host, run):
    host.node.rules = {"ipv4": [], "ipv6": []}
    result = run()
    assert not result["sending"] and result["counts"] == {"accepting": 2}


def test_a_device_that_is_missing(host, run):
    host.node.remove_link("wgmesh0")
    host.node.rules = {"ipv4": [], "ipv6": []}
    result = run()
    assert result["device"] is None and result["exists"] and result["counts"] == {"missing": 2}
    assert result["warnings_of_mesh"] == ["device wgmesh0 is missing; run the playbook enable"]


def test_a_device_that_is_down(host, run):
    host.node.links["wgmesh0"]["up"] = False
    result = run()
    assert result["device"]["up"] is False and "device wgmesh0 is down; run the playbook enable" in result["warnings_of_mesh"]


@pytest.mark.parametrize("common,own,strict", [
    ("0", "0", False), ("1", "0", True), ("0", "1", True), ("1", "2", False), ("2", "1", False), ("1", "1", True), ("0", "2", False)])
def test_reverse_path_filtering(host, run, common, own, strict):
    """The larger of the two values counts."""
    host.files.sysctls.update({"net/ipv4/conf/all/rp_filter": common, "net/ipv4/conf/wgmesh0/rp_filter": own})
    assert bool(run()["warnings_of_mesh"]) == strict


def test_reverse_path_filtering_of_the_underlay(host, run):
    """Something set it back on the device that the outer packets come in through."""
    host.node.add_link("bond0.7")
    del host.node.changes[:]
    host.files.content["/etc/sysctl.d/99-zz-kubemesh.conf"] = (_persist.sysctl_text({
        "net/ipv4/conf/wgmesh0/rp_filter": "2", "net/ipv4/conf/bond0.7/rp_filter": "2", "net/ipv4/conf/gone/rp_filter": "2",
        "net/ipv6/conf/wgmesh0/disable_ipv6": "0"}), 0o644)
    host.files.sysctls.update({"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/bond0.7/rp_filter": "2"})
    assert run()["warnings_of_mesh"] == []
    host.files.sysctls["net/ipv4/conf/bond0.7/rp_filter"] = "0"
    assert [text.split(":")[0] for text in run()["warnings_of_mesh"]] == ["rp_filter is strict on bond0.7"]


def test_a_node_without_mesh(host, run):
    host.node.remove_link("wgmesh0")
    host.node.rules = {"ipv4": [], "ipv6": []}
    host.files.content.clear()
    result = run()
    assert (result["exists"], result["device"], result["sending"], result["peers"], result["counts"]) == (False, None, False, [], {})
    assert result["warnings_of_mesh"] == [] and not result.get("failed")
    assert not run(node=None).get("failed")


def test_a_device_without_document(host, run):
    host.files.content.clear()
    result = run()
    assert result["exists"] and result["peers"] == [] and result["device"]["name"] == "wgmesh0"


@pytest.mark.parametrize("arguments,words", [
    ({"node": "z"}, "'z'"), ({"generation": 3}, "generation")])
def test_errors_name_what_is_wrong(host, run, arguments, words):
    result = run(**arguments)
    assert result["failed"] and words in result["msg"]


def test_a_document_that_is_damaged(host, run):
    host.files.content[DOCUMENT] = ("{", 0o644)
    assert "not a mesh document" in run()["msg"]


def test_a_device_that_does_not_answer(host, run, monkeypatch):
    def silent(name, wait=0.0, run_command=None):
        raise MeshError("device wgmesh0 exists, but it is no WireGuard device")

    monkeypatch.setattr(_interface, "client_for", silent)
    result = run()
    assert result["failed"] and "no WireGuard device" in result["msg"]


def test_no_secret_is_returned(host, run, run_module):
    assert [item.pop("preshared_keys") for item in run()["generations"]] == [False], "whether there are any, and nothing of them"
    assert "preshared_key\"" not in run_module.output and "private" not in run_module.output
