# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Single decisions about a mesh device. tests/unit/plugins/modules/test_interface.py has whole runs."""

from __future__ import annotations

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _persist
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import TABLE_MAIN, Files, Node, Refused

ADDRESSES = ["198.18.0.11", "2001:db8::b"]
USERSPACE = set(live.USERSPACE_COMMANDS)


@pytest.fixture
def node(monkeypatch):
    it = Node()
    it.files = Files(it)
    it.files.stand_in(monkeypatch, live)
    it.add_link("lo", addresses=["127.0.0.1/8"])
    it.add_link("eth0", addresses=["198.18.0.11/24"])
    it.add_link("eth1", addresses=["192.0.2.5/24"])
    monkeypatch.setattr(live, "link_kinds", lambda: {name: link["kind"] for name, link in it.links.items()})
    monkeypatch.setattr(live.os.path, "isdir", lambda path: path == "/proc/sys/net/ipv6")
    return it


def route(node, dst, device):
    family = "ipv6" if ":" in dst else "ipv4"
    node.routes.setdefault((family, TABLE_MAIN), {})[dst] = {
        "family": family, "table": TABLE_MAIN, "dst": dst, "dev": device, "type": "unicast", "src": "", "mtu": 0, "peer": ""}


# --- implementation and persistence ------------------------------------------------------------------------------------------------------

def without_module(node):
    at_once = node.run_command

    def run_command(argv, data=None, environ_update=None):
        if argv[1:3] == ["link", "add"]:
            return 2, "", "Error: Unknown device type."
        return at_once(argv, data, environ_update)

    node.run_command = run_command


@pytest.mark.parametrize("wanted,link,kernel,tools,expected", [
    ("auto", None, True, USERSPACE, ("kernel", "")),
    ("auto", None, True, set(), ("kernel", "")),
    ("auto", None, False, {"wireguard-go"}, ("userspace", "/usr/sbin/wireguard-go")),
    ("auto", None, False, {"boringtun"}, ("userspace", "/usr/sbin/boringtun")),
    ("auto", None, False, {"boringtun-cli", "boringtun"}, ("userspace", "/usr/sbin/boringtun-cli")),
    ("auto", None, False, set(), MeshError),
    # what runs stays, whatever else there is now
    ("auto", {"kind": "tun"}, True, {"wireguard-go"}, ("userspace", "/usr/sbin/wireguard-go")),
    ("auto", {"kind": "tun"}, True, set(), MeshError),
    ("auto", {"kind": "wireguard"}, False, {"wireguard-go"}, ("kernel", "")),
    # a device of another kind is refused later, by check_kind
    ("auto", {"kind": "bridge"}, True, set(), ("kernel", "")),
    ("kernel", None, False, set(), ("kernel", "")),
    ("userspace", None, True, {"wireguard-go"}, ("userspace", "/usr/sbin/wireguard-go")),
    ("userspace", None, True, set(), MeshError),
])
def test_implementations(node, wanted, link, kernel, tools, expected):
    node.tools_missing = USERSPACE - tools
    if not kernel:
        without_module(node)
    if expected is MeshError:
        with pytest.raises(MeshError, match="wireguard-go"):
            live.choose_implementation(System(node), wanted, link)
    else:
        assert live.choose_implementation(System(node), wanted, link) == expected
    assert live.TEST_DEVICE not in node.links


def test_whether_the_kernel_can(node, monkeypatch):
    assert live.kernel_has_wireguard(System(node))
    assert node.changes == ["ip link add dev kmtest0 type wireguard", "ip link del dev kmtest0"], "made and gone at once"
    del node.changes[:]
    node.add_link("wg0", "wireguard")
    assert live.kernel_has_wireguard(System(node)) and node.changes == [], "there is one, so it can"
    del node.links["wg0"]
    monkeypatch.setattr(live.os.path, "isdir", lambda path: path == "/sys/module/wireguard")
    assert live.kernel_has_wireguard(System(node)) and node.changes == []


@pytest.mark.parametrize("wanted,missing,expected", [
    ("auto", set(), "wg-quick"), ("auto", {"wg-quick"}, "systemd-networkd"), ("none", set(), "none"),
    ("systemd-networkd", set(), "systemd-networkd"), ("wg-quick", {"wg-quick"}, "wg-quick")])
def test_persistence(node, wanted, missing, expected):
    node.tools_missing = missing
    assert live.choose_persistence(System(node), wanted) == expected


# --- the underlay ------------------------------------------------------------------------------------------------------------------------

def test_devices_of_the_underlay(node):
    """Those that hold the node's addresses, and those on the way to the peers; never a mesh device, which holds them too."""
    for name in ("wgmesh0", "wgmesh1"):
        node.add_link(name, "wireguard", ["198.18.0.11/32"])
    assert live.underlay_devices(System(node), ADDRESSES, [], "wgmesh0", 4096) == ["eth0"]
    route(node, "203.0.113.0/24", "eth1")
    route(node, "2001:db8:9::/64", "bond0.100")
    endpoints = ["203.0.113.7", "203.0.113.8", "2001:db8:9::1", "198.51.100.1"]
    assert live.underlay_devices(System(node), ADDRESSES, endpoints, "wgmesh0", 4096) == ["bond0.100", "eth0", "eth1"]
    route(node, "203.0.113.8/32", "wgmesh1")
    assert live.underlay_devices(System(node), [], ["203.0.113.8", "127.0.0.1"], "wgmesh0", 4096) == []


# --- managers of networks ----------------------------------------------------------------------------------------------------------------

OURS = _persist.paths_of("wgmesh0")["network"]


def managed_by(monkeypatch, node, *paths):
    found = dict(paths)
    monkeypatch.setattr(live.glob, "glob", lambda pattern: [path for path in found if path.startswith(pattern[:-9])])
    node.files.content.update({path: (text, 0o644) for path, text in found.items()})


def test_files_that_catch_the_device(node, monkeypatch):
    managed_by(monkeypatch, node, ("/etc/systemd/network/20-all.network", "[Match]\nName=*\n"),
               ("/usr/lib/systemd/network/80-eth.network", "[Match]\nName=eth*\n"), (OURS, "[Match]\nName=wgmesh0\n"),
               ("/run/systemd/network/10-wg.network", "[Match]\nKind=wireguard\n"))
    assert live.caught_by("wgmesh0") == ["/etc/systemd/network/20-all.network", "/run/systemd/network/10-wg.network"]


CREATES = [{"op": "create_link", "implementation": "kernel"}]


@pytest.mark.parametrize("link,networkd,text,expected", [
    (CREATES, True, "[Match]\nName=*\n", ["networkctl reload"]), ([], True, "[Match]\nName=*\n", []),
    (CREATES, False, "[Match]\nName=*\n", []), (CREATES, True, "[Match]\nName=eth*\n", [])])
def test_networkd_reads_its_files_again_only_where_it_would_take_the_device(node, monkeypatch, link, networkd, text, expected):
    managed_by(monkeypatch, node, ("/etc/systemd/network/20-all.network", text))
    node.units["systemd-networkd.service"] = {"active": networkd}
    live.tell_managers(System(node), "wgmesh0", {"early_files": [], "link": link})
    assert node.changes == expected


@pytest.mark.parametrize("link,early,active,expected", [
    (CREATES, [], True, True), ([], [{"path": _persist.NETWORKMANAGER_CONF}], True, True), ([], [], True, False),
    (CREATES, [], False, False)])
def test_networkmanager_is_told_before_there_is_a_device(node, monkeypatch, link, early, active, expected):
    """Also when the file is there already: the run that wrote it may have ended right then."""
    managed_by(monkeypatch, node)
    node.units["NetworkManager.service"] = {"active": active}
    live.tell_managers(System(node), "wgmesh0", {"early_files": early, "link": link})
    assert node.changes == (["nmcli general reload conf"] if expected else [])


# --- sysctls ----------------------------------------------------------------------------------------------------------------------------

def sysctl(device, before, value="2"):
    return {"op": "set_sysctl", "name": "net/ipv4/conf/%s/rp_filter" % device, "value": value, "before": before}


def test_what_was_before_is_remembered_once(node):
    live.remember_sysctls([sysctl("eth0", "1"), sysctl("wgmesh0", "0"), sysctl("gone0", None)], "wgmesh0")
    assert live.sysctls_before() == {"net/ipv4/conf/eth0/rp_filter": "1"}
    live.remember_sysctls([sysctl("eth0", "2"), sysctl("eth1", "1")], "wgmesh0")
    assert live.sysctls_before() == {"net/ipv4/conf/eth0/rp_filter": "1", "net/ipv4/conf/eth1/rp_filter": "1"}
    before = list(node.changes)
    live.remember_sysctls([sysctl("eth0", "0"), sysctl("wgmesh1", "0")], "wgmesh0")
    assert node.changes == before


@pytest.mark.parametrize("text,expected", [("", {}), ("nonsense", {}), ("[1]", {}), ('{"a": "1"}', {"a": "1"}), (None, {})])
def test_a_damaged_memory_stops_nothing(node, text, expected):
    if text is not None:
        node.files.content[live.SYSCTL_BEFORE] = (text, 0o644)
    assert live.sysctls_before() == expected


# --- keys --------------------------------------------------------------------------------------------------------------------------------

def test_the_private_key_is_wiped(node, monkeypatch):
    seen = bytearray(b"\x42" * 32)
    monkeypatch.setattr(live, "read_private_key", lambda path: seen)
    monkeypatch.setattr(live, "public_key_of", lambda raw, run_command, wg: "public" if raw == b"\x42" * 32 else "")
    wanted = {"private_key_file": "/k", "public_key": "public"}
    assert live.own_public_key(System(node), wanted, False) == "public"
    assert seen == bytearray(32)
    seen[:] = b"\x42" * 32
    with pytest.raises(MeshError, match="/k has the public key public, but the mesh document says other"):
        live.own_public_key(System(node), dict(wanted, public_key="other"), False)
    assert seen == bytearray(32)


def test_check_mode_before_there_is_a_key(node, monkeypatch):
    wanted = {"private_key_file": "/k", "public_key": "public"}
    assert live.own_public_key(System(node), wanted, True) == "public"

    def no_key(path):
        raise MeshError("%s is not there" % path)

    monkeypatch.setattr(live, "read_private_key", no_key)
    with pytest.raises(MeshError, match="not there"):
        live.own_public_key(System(node), wanted, False)


def test_the_fake_node_refuses_what_a_kernel_refuses(node):
    """Or the tests that use it would prove nothing."""
    system = System(node)
    with pytest.raises(MeshError, match="File exists"):
        system.run(["ip", "link", "add", "dev", "eth0", "type", "wireguard"])
    with pytest.raises(MeshError, match="Cannot find device"):
        system.run(["ip", "link", "set", "dev", "none0", "up"])
    with pytest.raises(MeshError, match="File exists"):
        system.run(["ip", "addr", "add", "198.18.0.11/24", "dev", "eth0"])
    with pytest.raises(Refused):
        node._rule("ipv4", "del", ["priority", "1", "from", "all", "lookup", "1"])
