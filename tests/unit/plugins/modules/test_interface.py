# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import re

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _persist, _psk, _system
from ansible_collections.kubemesh.wireguard.plugins.modules import interface
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import Files, Node, WireGuard

DOCUMENT = "/etc/kubemesh/mesh.json"
PATHS = _persist.paths_of("wgmesh0")
RP_FILTER = "net/ipv4/conf/%s/rp_filter"


class Killed(BaseException):
    """The run ends here, whatever it was doing."""


def key(number):
    return chr(ord("A") + number) * 42 + "A="


def entry(number, **other):
    return dict({
        "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)},
        "endpoints": {"ipv4": {"address": "198.18.0.1%d" % number, "port": None}},
        "pod_cidrs": ["10.244.%d.0/24" % number], "node_addresses": ["198.18.0.1%d" % number, "2001:db8::%x" % number],
        "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": 1400, "keepalive": 0}, **other)


class Host:
    def __init__(self):
        self.node = Node()
        self.files, self.wg = Files(self.node), WireGuard(self.node)
        self.node.add_link("eth0", addresses=["198.18.0.11/24", "2001:db8::1/64"])
        self.own_key = key(1)
        self.ipv6 = True
        self.document({"a": entry(1), "b": entry(2), "c": entry(3)})

    def document(self, nodes):
        self.doc = _mesh.validate_document({
            "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": nodes})
        self.files.content[DOCUMENT] = (_mesh.document_bytes(self.doc).decode(), 0o644)

    def own_files(self):
        return sorted(path for path in self.files.content if path != DOCUMENT)

    def handshake(self, number, endpoint=None):
        peer = self.wg.states["wgmesh0"]["peers"][key(number)]
        peer.update(last_handshake=1763874000.0, endpoint=endpoint or peer["endpoint"])

    def reboot(self):
        """What the kernel had is gone; units that are enabled run."""
        for name in [name for name in self.node.links if name.startswith("wgmesh")]:
            self.node.remove_link(name)
        for unit in self.node.units.values():
            unit["active"] = False

    def save(self):
        return copy.deepcopy((self.node.links, self.node.units, self.files.content, self.files.sysctls, self.wg.states))

    def restore(self, saved):
        self.node.links, self.node.units, self.files.content, self.files.sysctls, self.wg.states = copy.deepcopy(saved)


@pytest.fixture
def host(monkeypatch):
    it = Host()
    it.files.stand_in(monkeypatch, live)
    monkeypatch.setattr(interface, "System", lambda module: _system.System(it.node))
    monkeypatch.setattr(live, "client_for", it.wg.client_for)
    monkeypatch.setattr(live, "link_kinds", lambda: {name: link["kind"] for name, link in it.node.links.items()})
    monkeypatch.setattr(live, "has_ipv6", lambda: it.ipv6)
    monkeypatch.setattr(live, "read_host", lambda system, underlay: {
        "networkd": True, "networkmanager": True, "underlay": underlay, "ipv6": it.ipv6})
    monkeypatch.setattr(live, "read_private_key", lambda path: bytearray(b"\x42" * 32))
    monkeypatch.setattr(live, "public_key_of", lambda raw, run_command, wg: it.own_key)
    monkeypatch.setattr(live.glob, "glob", lambda pattern: [])
    return it


@pytest.fixture
def run(run_module, host):
    """-> function(check=False, **arguments) -> result"""
    def run(check=False, diff=True, **arguments):
        return run_module(interface.main, dict({"node": "a"}, **arguments), check, diff)

    return run


WAYS = [{"implementation": implementation, "persistence": persistence} for implementation in ("kernel", "userspace")
        for persistence in ("wg-quick", "systemd-networkd", "none")]
KINDS = {"kernel": "wireguard", "userspace": "tun"}
ADDRESSES = sorted(["198.18.0.11/32", "2001:db8::1/128", _mesh.probe_address(key(1)) + "/64"])


# --- a device that shall be there --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", WAYS)
def test_a_new_device(host, run, way):
    result = run(**way)
    assert result["changed"] and result["peer_count"] == 2
    assert (result["implementation"], result["persistence"]) == (way["implementation"], way["persistence"])
    link = host.node.links["wgmesh0"]
    assert (link["kind"], link["mtu"], link["up"], link["mode"]) == (KINDS[way["implementation"]], 1400, True, "none")
    assert sorted(link["addresses"]) == ADDRESSES
    state = host.wg.states["wgmesh0"]
    assert (state["public_key"], state["listen_port"], state["fwmark"]) == (key(1), 51840, 4096)
    assert {name: peer["allowed_ips"] for name, peer in state["peers"].items()} == {
        key(number): sorted(_mesh.allowed_ips_of(entry(number), "0")) for number in (2, 3)}
    assert host.files.sysctls[RP_FILTER % "wgmesh0"] == "2" and host.files.sysctls[RP_FILTER % "eth0"] == "2"
    assert sorted(unit for unit, state in host.node.units.items() if state.get("enabled")) == {
        "wg-quick": ["wg-quick@wgmesh0.service"], "systemd-networkd": ["kubemesh-device@wgmesh0.service"], "none": []}[way["persistence"]]


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_changes_nothing(host, run, way):
    run(**way)
    before = list(host.node.changes)
    result = run(**way)
    assert (result["changed"], result["steps"]) == (False, []) and host.node.changes == before
    assert len(result["diff"]) == 1 and result["diff"][0]["before"] == result["diff"][0]["after"]


@pytest.mark.parametrize("way", WAYS)
def test_check_mode_says_what_a_run_would_do(host, run, way):
    saved = host.save()
    expected = run(check=True, **way)
    assert host.save() == saved and host.node.changes == []
    result = run(**way)
    assert {field: result[field] for field in ("changed", "steps", "diff", "peer_count")} == {
        field: expected[field] for field in ("changed", "steps", "diff", "peer_count")}


def test_steps_and_diff_for_people(host, run):
    result = run(implementation="kernel", persistence="wg-quick")
    steps = result["steps"]
    assert steps[:2] == ["write file %s" % _persist.NETWORKMANAGER_CONF, "write file %s" % PATHS["network"]] or len(steps) > 10
    for text in ("create device wgmesh0 (kernel)", "no automatic link-local address on wgmesh0", "set wgmesh0 up",
                 "add address 198.18.0.11/32", "sysctl net/ipv4/conf/eth0/rp_filter: 2, was 1", "enable unit wg-quick@wgmesh0.service",
                 "device: listen port 51840"):
        assert text in steps, text
    assert any(text.startswith("peer b: add, endpoint 198.18.0.12:51840") for text in steps)
    kernel = result["diff"][0]
    assert kernel["before"].splitlines() == [
        "sysctl net/ipv4/conf/eth0/rp_filter = 1", "sysctl net/ipv4/conf/wgmesh0/rp_filter = None",
        "sysctl net/ipv6/conf/wgmesh0/disable_ipv6 = None", "unit wg-quick@wgmesh0.service disabled"]
    assert "link wgmesh0 kind wireguard mtu 1400 up addrgenmode none" in kernel["after"] and "peer b\n" in kernel["after"]
    assert {item["before_header"] for item in result["diff"][1:]} == set(host.own_files()) - {live.SYSCTL_BEFORE}
    assert "diff" not in run(diff=False)


def order_of(host, *patterns):
    """Places of the first changes that match."""
    return [next(place for place, change in enumerate(host.node.changes) if re.search(pattern, change)) for pattern in patterns]


@pytest.mark.parametrize("way", WAYS)
def test_the_order_in_which_it_comes_up(host, run, way):
    """Managers know before there is a device; key and peers are there before it is up; what restores it comes last."""
    run(**way)
    makes = r"^ip link add" if way["implementation"] == "kernel" else r"^systemctl start kubemesh-userspace@wgmesh0"
    places = order_of(host, r"^write .*90-kubemesh.conf$", makes, r"addrgenmode none", r"wg set_device", r"wg add_peer",
                      r"^sysctl .*wgmesh0", r"^ip addr add", r"wgmesh0 up$")
    assert places == sorted(places)
    if way["persistence"] != "none":
        assert order_of(host, r"wgmesh0 up$")[0] < order_of(host, r"^write /etc/(wireguard|kubemesh)/wgmesh0")[0]
        assert host.node.changes[-1].startswith("systemctl enable")
    if way["implementation"] == "userspace":
        places = order_of(host, r"^write .*kubemesh-userspace@", r"^systemctl daemon-reload", r"^systemctl start")
        assert places == sorted(places)


def test_arguments_win_over_the_document(host, run):
    run(implementation="kernel", listen_port=12345, mtu=1300, fwmark=7, name="mesh7")
    assert host.node.links["mesh7"]["mtu"] == 1300
    assert (host.wg.states["mesh7"]["listen_port"], host.wg.states["mesh7"]["fwmark"]) == (12345, 7)


@pytest.mark.parametrize("mtu,expected", [(1380, 1380), (None, 1420)])
def test_mtu_of_the_document_or_the_usual(host, run, mtu, expected):
    host.document({"a": entry(1, mtu=mtu), "b": entry(2)})
    run(implementation="kernel")
    assert host.node.links["wgmesh0"]["mtu"] == expected


def test_a_node_without_ipv6(host, run):
    host.ipv6 = False
    run(implementation="kernel", persistence="wg-quick")
    assert host.node.links["wgmesh0"]["addresses"] == ["198.18.0.11/32"]
    assert not any("addrgenmode" in change or "disable_ipv6" in change for change in host.node.changes)
    assert "fe80" not in "".join(re.findall("Address.*", host.files.content[PATHS["wg_quick"]][0]))
    assert run(implementation="kernel", persistence="wg-quick")["changed"] is False


# --- changes of the mesh -----------------------------------------------------------------------------------------------------------------

def kernel(run, **other):
    return run(implementation="kernel", persistence="wg-quick", **other)


def test_only_what_differs_is_touched(host, run):
    kernel(run)
    del host.node.changes[:]
    host.document({"a": entry(1), "b": entry(2, pod_cidrs=["10.244.2.0/24", "10.244.9.0/24"]), "d": entry(4)})
    result = kernel(run)
    wireguard = [change for change in host.node.changes if change.startswith("wg")]
    assert wireguard == ["wg add_peer " + key(4), "wg add_allowed_ips " + key(2), "wg remove_peer " + key(3)]
    assert [change for change in host.node.changes if change.startswith("ip")] == []
    assert result["peer_count"] == 2


def test_a_peer_that_roamed_stays_where_it_is_and_one_that_moved_is_told(host, run):
    kernel(run)
    host.handshake(2, "203.0.113.77:4444")
    host.handshake(3, "203.0.113.78:4444")
    assert kernel(run)["changed"] is False
    host.document({"a": entry(1), "b": entry(2), "c": entry(3, endpoints={"ipv4": {"address": "198.18.0.99", "port": None}})})
    kernel(run)
    peers = host.wg.states["wgmesh0"]["peers"]
    assert peers[key(2)]["endpoint"] == "203.0.113.77:4444", "roamed, and nothing changed in the document"
    assert peers[key(3)]["endpoint"] == "198.18.0.99:51840", "moved in the document"
    assert kernel(run)["changed"] is False


def test_a_member_whose_key_is_unknown_may_be_one_of_those_that_are_there(host, run):
    kernel(run)
    pending = entry(3, state="pending", reason="no key", public_keys={}, probe_addresses={})
    host.document({"a": entry(1), "b": entry(2), "c": pending})
    kernel(run)
    assert key(3) in host.wg.states["wgmesh0"]["peers"]
    host.document({"a": entry(1), "b": entry(2), "c": dict(pending, state="excluded", reason="opted out")})
    kernel(run)
    assert key(3) not in host.wg.states["wgmesh0"]["peers"], "excluded is known"


@pytest.mark.parametrize("drift,words", [
    (lambda host: host.node.links["wgmesh0"].update(up=False), "set wgmesh0 up"),
    (lambda host: host.node.links["wgmesh0"].update(mtu=1280), "MTU of wgmesh0: 1400"),
    (lambda host: host.node.links["wgmesh0"]["addresses"].remove("198.18.0.11/32"), "add address 198.18.0.11/32"),
    (lambda host: host.node.links["wgmesh0"]["addresses"].append("10.9.9.9/32"), "remove address 10.9.9.9/32"),
    (lambda host: host.node.links["wgmesh0"].update(mode="eui64"), "no automatic link-local address on wgmesh0"),
    (lambda host: host.wg.states["wgmesh0"].update(listen_port=1), "device: listen port 51840"),
    (lambda host: host.wg.states["wgmesh0"].update(fwmark=0), "device: mark 0x1000"),
    (lambda host: host.wg.states["wgmesh0"].update(public_key=key(9)),
     "device: private key from /etc/wireguard/wgmesh0.key, public key %s" % key(1)),
    (lambda host: host.wg.states["wgmesh0"]["peers"].pop(key(2)), "peer b: add"),
    (lambda host: host.wg.states["wgmesh0"]["peers"].update({key(9): dict(host.wg.states["wgmesh0"]["peers"][key(2)], allowed_ips=[])}),
     "peer %s: remove" % key(9)),
    (lambda host: host.files.sysctls.update({RP_FILTER % "eth0": "1"}), "sysctl net/ipv4/conf/eth0/rp_filter: 2, was 1"),
    (lambda host: host.node.units["wg-quick@wgmesh0.service"].update(enabled=False), "enable unit wg-quick@wgmesh0.service"),
    (lambda host: host.files.content.pop(PATHS["wg_quick"]), "write file %s" % PATHS["wg_quick"]),
    (lambda host: host.files.content.update({PATHS["wg_quick"]: (host.files.content[PATHS["wg_quick"]][0], 0o644)}),
     "write file %s" % PATHS["wg_quick"]),
    (lambda host: host.node.remove_link("wgmesh0"), "create device wgmesh0 (kernel)"),
])
def test_drift_is_seen_and_mended(host, run, drift, words):
    kernel(run)
    drift(host)
    result = kernel(run)
    assert any(text.startswith(words) for text in result["steps"]), result["steps"]
    assert kernel(run)["changed"] is False


def test_another_way_of_restoring_it(host, run):
    """What the first way left is taken away."""
    kernel(run)
    run(implementation="kernel", persistence="systemd-networkd")
    assert PATHS["wg_quick"] not in host.files.content and PATHS["setconf"] in host.files.content
    assert not host.node.units["wg-quick@wgmesh0.service"]["enabled"] and host.node.units["kubemesh-device@wgmesh0.service"]["enabled"]
    assert "wgmesh0" in host.node.links, "and the live device is not touched"


# --- preshared keys ----------------------------------------------------------------------------------------------------------------------

PSK = "/etc/wireguard/wgmesh0.psk"


def psk_path(number):
    return "%s/%s" % (PSK, _psk.file_name(key(number)))


def with_keys(host, *numbers, **other):
    """Files with preshared keys of peers; `other`: what is in them instead of the usual."""
    host.wg.secrets.update({psk_path(number): other.get("content", "preshared key %d" % number) for number in numbers})


def protected(run, **other):
    return kernel(run, preshared_keys=PSK, **other)


@pytest.fixture(autouse=True)
def preshared_key_files(monkeypatch, host):
    """The directory is that of the host: those that have a file there are not missing."""
    monkeypatch.setattr(live._psk_files, "missing", lambda folder, keys: [
        name for name in sorted(keys) if "%s/%s" % (folder, _psk.file_name(name)) not in host.wg.secrets])


@pytest.mark.parametrize("way", WAYS)
def test_peers_get_their_preshared_keys(host, run, way):
    with_keys(host, 2, 3)
    result = run(preshared_keys=PSK, **way)
    assert result["changed"] and all(peer["has_preshared_key"] for peer in host.wg.states["wgmesh0"]["peers"].values())
    assert host.wg.preshared_keys == {("wgmesh0", key(number)): "preshared key %d" % number for number in (2, 3)}
    assert any(text.startswith("peer b: add") and text.endswith("preshared key from %s" % psk_path(2)) for text in result["steps"])
    before = list(host.node.changes)
    again = run(preshared_keys=PSK, **way)
    assert (again["changed"], again["steps"]) == (False, []) and host.node.changes == before


@pytest.mark.parametrize("persistence,path", [("wg-quick", "wg_quick"), ("systemd-networkd", "setconf"), ("none", None)])
def test_preshared_keys_at_boot(host, run, persistence, path):
    """By a script that names files; the configuration is the same as without them but for one line."""
    plain = run(implementation="kernel", persistence=persistence)
    assert not plain.get("failed")
    saved = dict(host.files.content)
    with_keys(host, 2, 3)
    run(implementation="kernel", persistence=persistence, preshared_keys=PSK)
    changed = {name for name in host.files.content if host.files.content[name] != saved.get(name)}
    script = PATHS["preshared_keys"]
    assert changed == {"wg_quick": {script, PATHS["wg_quick"]}, "setconf": {script}, None: set()}[path]
    if path:
        assert PSK in host.files.content[script][0] and host.files.content[script][1] == 0o755
    run(implementation="kernel", persistence=persistence)
    assert host.files.content == saved, "and goes with them"


def test_a_preshared_key_that_changed_is_set_and_the_session_stays(host, run):
    with_keys(host, 2, 3)
    protected(run)
    host.handshake(2)
    with_keys(host, 2, content="another one")
    del host.node.changes[:]
    expected = protected(run, check=True)
    result = protected(run)
    assert host.node.changes == ["wg update_peer " + key(2)] and result["steps"] == ["peer b: set preshared key from %s" % psk_path(2)]
    assert result["steps"] == expected["steps"] and result["diff"] == expected["diff"]
    assert "preshared key: yes, not the one in its file" in result["diff"][0]["before"]
    assert "not the one" not in result["diff"][0]["after"] and len(result["diff"]) == 1
    assert host.wg.preshared_keys["wgmesh0", key(2)] == "another one" and host.wg.states["wgmesh0"]["peers"][key(2)]["last_handshake"]
    assert protected(run)["changed"] is False


def test_preshared_keys_that_are_not_wanted_are_taken_away(host, run):
    with_keys(host, 2, 3)
    protected(run)
    result = kernel(run)
    assert "peer b: set no preshared key" in result["steps"]
    assert not any(peer["has_preshared_key"] for peer in host.wg.states["wgmesh0"]["peers"].values())


def test_a_peer_without_a_preshared_key_is_refused(host, run):
    with_keys(host, 2)
    result = protected(run)
    assert result["failed"] and "%s has no preshared key of c; write them first" % PSK in result["msg"] and host.node.changes == []
    host.document(dict({"a": entry(1)}, **{"n%d" % number: entry(number) for number in range(3, 11)}))
    assert "n10, n3, n4, n5, n6 and 3 more" in protected(run)["msg"]


def test_in_check_mode_they_may_be_still_to_be_written(host, run):
    expected = protected(run, check=True)
    assert expected["changed"] and host.node.changes == []
    with_keys(host, 2, 3)
    result = protected(run)
    assert result["steps"] == expected["steps"] and result["diff"] == expected["diff"]


@pytest.mark.parametrize("folder", ["/etc/my keys", "relative", "/etc/$(reboot)", "/etc/%i", "/etc/x'y", "/etc/#x", "/etc/x/", "/etc//x",
                                    "/", "/etc/x|y", "/etc/x&y"])
def test_a_directory_that_would_break_files(host, run, folder):
    result = kernel(run, preshared_keys=folder)
    assert result["failed"] and "preshared_keys" in result["msg"] and host.node.changes == []


# --- what is refused ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments,words", [
    ({"node": None}, "node: the name of this host"), ({"node": "z"}, "'z'"), ({"document_file": "/none.json"}, "/none.json is not there"),
    ({"mtu": 1000}, "mtu: 1000"), ({"generation": 1}, "generation 1"), ({"generation": 2}, "generation"), ({"state": "gone"}, "state")])
def test_errors_name_what_is_wrong(host, run, arguments, words):
    result = run(**dict({"implementation": "kernel"}, **arguments))
    assert result["failed"] and words in result["msg"] and host.node.changes == []


def test_a_device_of_another_kind_is_left_alone(host, run):
    host.node.add_link("wgmesh0", "bridge")
    for arguments in ({"implementation": "kernel"}, {"state": "absent"}):
        result = run(**arguments)
        assert result["failed"] and "bridge" in result["msg"] and host.node.changes == []


def test_another_implementation_than_the_one_that_runs(host, run):
    run(implementation="userspace")
    del host.node.changes[:]
    result = run(implementation="kernel")
    assert result["failed"] and "kind tun" in result["msg"] and host.node.changes == []


def test_a_key_that_the_peers_do_not_know(host, run):
    host.own_key = key(8)
    result = run(implementation="kernel")
    assert result["failed"] and key(8) in result["msg"] and key(1) in result["msg"] and host.node.changes == []


@pytest.mark.parametrize("other", [{"state": "excluded", "reason": "opted out"},
                                   {"state": "pending", "reason": "no key", "public_keys": {}, "probe_addresses": {}}])
def test_a_node_that_is_not_in_the_mesh(host, run, other):
    """Its device keeps the peers it has."""
    kernel(run)
    peers = set(host.wg.states["wgmesh0"]["peers"])
    host.document({"a": entry(1, **other), "b": entry(2)})
    assert kernel(run)["failed"]
    assert set(host.wg.states["wgmesh0"]["peers"]) == peers


# --- a device that shall not be there ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after_a_reboot", [False, True])
def test_nothing_is_left_behind(host, run, way, after_a_reboot):
    run(**way)
    if after_a_reboot:
        host.reboot()
        for unit in host.node.units.values():
            unit["active"] = bool(unit.get("enabled"))
        if way["implementation"] == "userspace":
            host.node.units["kubemesh-userspace@wgmesh0.service"]["active"] = True
        host.node.add_link("wgmesh0", KINDS[way["implementation"]])
    result = run(state="absent")
    assert result["changed"] and "wgmesh0" not in host.node.links and host.own_files() == []
    assert not any(unit.get("enabled") or unit.get("active") for unit in host.node.units.values())
    assert host.files.read_sysctl(RP_FILTER % "eth0") == "1", "as it was before"
    again = run(state="absent")
    assert (again["changed"], again["steps"]) == (False, [])


def test_absent_in_check_mode(host, run):
    kernel(run)
    saved = host.save()
    expected = run(check=True, state="absent")
    assert host.save() == saved
    result = run(state="absent")
    assert result["steps"] == expected["steps"] and result["diff"] == expected["diff"]
    assert "remove device wgmesh0" in result["steps"]
    assert result["diff"][0]["before"].startswith("link wgmesh0") and "link" not in result["diff"][0]["after"]


def test_absent_where_there_never_was_one(host, run):
    result = run(state="absent", node=None)
    assert (result["changed"], host.node.changes) == (False, [])


# --- interrupted runs --------------------------------------------------------------------------------------------------------------------

def is_ready(host):
    """A device that is up has its key and every peer: the first packet that arrives is accepted."""
    link = host.node.links.get("wgmesh0")
    if link is None or not link["up"]:
        return True
    state = host.wg.states["wgmesh0"]
    return state["public_key"] == key(1) and {key(2), key(3)} <= set(state["peers"]) and link["mode"] == "none"


def killing(host, place, then):
    """A hook that ends the run before its change of that number."""
    seen = []

    def hook(node, text):
        assert is_ready(host) or then == "absent"
        seen.append(text)
        if len(seen) > place:
            raise Killed

    return hook


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("then", ["present", "absent"])
def test_a_run_may_end_anywhere_and_the_next_one_finishes(host, run, way, then):
    if then == "absent":
        run(**way)
    arguments = dict(way, state=then)
    saved = host.save()
    for place in range(80):
        host.restore(saved)
        host.node.hooks = [killing(host, place, then)]
        try:
            run(**arguments)
            killed = False
        except Killed:
            killed = True
        host.node.hooks = []
        assert is_ready(host)
        result = run(**arguments)
        assert not result.get("failed"), result
        assert run(**arguments)["changed"] is False
        if then == "present":
            assert host.wg.states["wgmesh0"]["public_key"] == key(1) and host.node.links["wgmesh0"]["up"]
            if place == 0 or way["persistence"] != "none":
                assert bool(host.own_files())
        else:
            assert host.own_files() == [] and "wgmesh0" not in host.node.links
            assert host.files.read_sysctl(RP_FILTER % "eth0") == "1"
        if not killed:
            assert place > 5
            return
    raise AssertionError("no end in sight")
