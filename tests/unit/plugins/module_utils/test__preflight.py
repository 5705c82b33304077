# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import json
from unittest import mock

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _preflight, _preflight_facts

MAIN_RULES = [
    {"family": "ipv4", "priority": 0, "src": "all", "table": "255"},
    {"family": "ipv4", "priority": 32766, "src": "all", "table": "254"},
    {"family": "ipv4", "priority": 32767, "src": "all", "table": "253"},
    {"family": "ipv6", "priority": 0, "src": "all", "table": "255"},
    {"family": "ipv6", "priority": 32766, "src": "all", "table": "254"},
]
# What kube-proxy (iptables), Calico (iptables) and Cilium write about marks, as iptables-save and nft print it.
FOREIGN_MARKS = [
    "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
    "-A KUBE-FIREWALL -m comment --comment \"drop marked packets\" -m mark --mark 0x8000/0x8000 -j DROP",
    "-A cali-PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j MARK --set-xmark 0x0/0xf0000",
    "-A cali-fw-cali1 -j MARK --set-xmark 0x0/0x10000",
    "-A CILIUM_PRE_mangle -m socket --transparent -j MARK --set-xmark 0x200/0xffffffff",
    "-A CILIUM_OUTPUT_raw -m mark --mark 0xe00/0xf00 -j CT --notrack",
    "meta mark & 0x00004000 != 0x00004000 counter packets 5 bytes 300 return",
    "meta mark set meta mark xor 0x00004000",
    "meta mark set meta mark & 0xffffbfff",
    "ct mark set meta mark and 0xffffffff",
]
CLEAN = {
    "uid": 0, "python": [3, 11, 2], "kernel": "6.1.0-28-cloud-amd64", "modules_present": True, "systemd": True,
    "tools": {"ip": True, "wg": True, "wg-quick": True, "ip_json": True},
    "mesh_document": False, "last_pod_cidrs": [], "fips": False, "ipv6": "on", "foreign_files": [], "readonly": [],
    "cni": {"types": ["flannel", "portmap"], "ipams": []},
    "wireguard": {"kernel": True, "userspace": "", "tun": True},
    "links": [{"name": "lo", "kind": "", "udp_port": None},
              {"name": "eth0", "kind": "", "udp_port": None},
              {"name": "flannel.1", "kind": "vxlan", "udp_port": 8472},
              {"name": "cni0", "kind": "bridge", "udp_port": None}],
    "addresses": [{"address": "127.0.0.1", "device": "lo"}, {"address": "198.18.0.11", "device": "eth0"}],
    "rules": MAIN_RULES, "routes": {}, "pod_routes": [
        {"prefix": "10.244.1.0/24", "device": "cni0"}, {"prefix": "10.244.1.0/32", "device": "x"}],
    "wg_devices": {}, "udp": [], "responder_ports": [], "marks": FOREIGN_MARKS,
}
SETTINGS = {
    "node": "worker-1", "interface": "wgmesh", "ports": [51840, 51841], "table": 51840, "rule_priority": 400, "fwmark": 0x1000,
    "encrypt": "pods", "pod_source": "node_cidrs", "implementation": "auto", "persistence": "auto", "mtu": None,
    "pod_cidrs": ["10.244.1.0/24"], "node_addresses": ["198.18.0.11"], "agent": None}


def facts(**changes):
    """Clean facts with changes; a dict is merged, anything else replaces."""
    result = copy.deepcopy(CLEAN)
    for name, value in changes.items():
        if isinstance(value, dict) and name != "wg_devices" and name != "routes":
            result[name].update(value)
        else:
            result[name] = value
    return result


def link(name, kind="", udp_port=None):
    return {"name": name, "kind": kind, "udp_port": udp_port}


def rule(priority, family="ipv4", **fields):
    return dict({"family": family, "priority": priority, "src": "all"}, **fields)


def found(facts_, **settings):
    return [(item["level"], item["check"]) for item in _preflight.findings(facts_, dict(SETTINGS, **settings))]


def test_clean_node_with_kube_proxy_calico_and_cilium_marks_has_no_findings():
    assert _preflight.findings(CLEAN, SETTINGS) == []


OUR_RULES = [rule(400, table="51840"), rule(401, src="10.244.1.0", srclen=24, table="51841", protocol="3"),
             rule(402, fwmark="0x1000", fwmask="0x1000", table="51841", **{"not": None}), rule(400, "ipv6", table="51840")]
OUR_MESH = {
    "mesh_document": True, "links": CLEAN["links"] + [link("wgmesh0", "wireguard"), link("wgmesh1", "tun")],
    "wg_devices": {"wgmesh0": {"listen_port": 51840, "fwmark": 0x1000, "public_key": "x"},
                   "wgmesh1": {"listen_port": 51841, "fwmark": 0x1000, "public_key": "y"}},
    "udp": [{"port": 51840, "holder": ""}, {"port": 51841, "holder": "wireguard-go"}],
    "rules": MAIN_RULES + OUR_RULES,
    "routes": {"51840": [{"dst": "10.244.2.0/24", "device": "wgmesh0", "type": "1", "family": "ipv4"},
                         {"dst": "10.244.3.0/24", "device": "", "type": "7", "family": "ipv4"}],
               "51841": [{"dst": "198.18.0.12", "device": "wgmesh1", "type": "1", "family": "ipv4"}]},
    "addresses": CLEAN["addresses"] + [{"address": "198.18.0.11", "device": "wgmesh0"}],
}


GROUP_ONLY = {"real": "/t/token", "places": [{"path": "/t/token", "mode": 0o640, "uid": 9, "gid": 7, "acl": False}]}
ROOT_ONLY = {"real": "/t/token", "places": [{"path": "/t/token", "mode": 0o600, "uid": 0, "gid": 0, "acl": False}]}


@pytest.mark.parametrize("implementation, kernel, userspace, kinds, as_root", [
    ("auto", True, "", (), False), ("auto", False, "/usr/bin/wireguard-go", (), True),
    ("userspace", True, "/usr/bin/wireguard-go", (), True),
    ("kernel", False, "/usr/bin/wireguard-go", (), False),
    # what runs stays
    ("auto", True, "/usr/bin/wireguard-go", ("tun",), True), ("auto", True, "", ("wireguard", "tun"), True),
    ("auto", False, "/usr/bin/wireguard-go", ("wireguard",), False),
    # nothing can make a device
    ("auto", False, "", (), False)])
def test_the_agent_is_judged_as_the_user_that_the_run_will_give_it(implementation, kernel, userspace, kinds, as_root):
    changed = facts(wireguard={"kernel": kernel, "userspace": userspace},
                    links=[link("tun0", "tun")] + [link("wgmesh%d" % number, kind) for number, kind in enumerate(kinds)])
    changed["agent"] = {"user": {"uid": 5, "gids": [7]}, "token": False, "ways": {"token_file": GROUP_ONLY}}
    settings = dict(SETTINGS, implementation=implementation, agent={
        "paths": {"ca_file": "/ca", "token_file": "/t/token"}, "token_given": False})
    assert [item["value"] for item in _preflight.agent_findings(changed, settings)] == (["/t/token"] if as_root else [])
    changed["agent"]["ways"]["token_file"] = ROOT_ONLY
    found_ = list(_preflight.agent_findings(changed, settings))
    assert [item["value"] for item in found_] == ([] if as_root else ["/t/token"])
    assert all(item["message"].startswith("mesh_agent_token_file: /t/token is not readable") for item in found_)
    assert list(_preflight.agent_findings(changed, SETTINGS)) == []


def test_an_agent_with_two_tokens():
    changed = facts()
    changed["agent"] = {"user": None, "token": False, "ways": {}}
    settings = dict(SETTINGS, agent={"paths": {"ca_file": "/ca", "token_file": "/t/token"}, "token_given": True})
    assert [(item["level"], item["check"], item["remedy"]) for item in _preflight.findings(changed, settings)] == [
        ("error", "agent", "leave one of them out")]


def test_the_mesh_that_is_there_is_no_finding():
    assert _preflight.findings(facts(**OUR_MESH), SETTINGS) == []
    assert _preflight.findings(facts(**OUR_MESH), dict(SETTINGS, encrypt="nodes")) == []


BPF = [link("bpfin.cali"), link("cali123abc")]
CASES = [
    # (name, changes of the facts, changes of the settings, findings, words of the first)
    ("not root", {"uid": 1000}, {}, [("error", "user")], "become"),
    ("python", {"python": [3, 6, 15]}, {}, [("error", "python")], "3.6.15"),
    ("no ip", {"tools": {"ip": False, "ip_json": False}}, {}, [("error", "tools")], "iproute2"),
    ("busybox", {"tools": {"ip_json": False}}, {}, [("error", "tools")], "BusyBox"),
    ("no wg", {"tools": {"wg": False, "wg-quick": False}}, {"persistence": "wg-quick"}, [("error", "tools")], "wireguard-tools"),
    ("no wg-quick", {"tools": {"wg-quick": False}}, {"persistence": "wg-quick"}, [("error", "tools")], "systemd-networkd"),
    ("no wg-quick, not needed", {"tools": {"wg-quick": False}}, {"persistence": "auto"}, [], ""),
    ("no systemd", {"systemd": False}, {}, [("error", "systemd")], "reboot"),
    ("no systemd, not needed", {"systemd": False}, {"persistence": "none"}, [], ""),
    ("read-only", {"readonly": ["/etc"]}, {}, [("error", "files")], "/etc cannot be written"),
    ("file of others", {"foreign_files": ["/etc/wireguard/wgmesh0.conf"]}, {}, [("error", "files")], "/etc/wireguard/wgmesh0.conf"),
    ("fips", {"fips": True}, {}, [("warning", "fips")], "ChaCha20"),
    ("ipv6 off", {"ipv6": "off"}, {}, [("warning", "ipv6")], "switched on for the mesh devices"),
    ("ipv6 absent", {"ipv6": "absent"}, {}, [("warning", "ipv6")], "all tunnels of the cluster"),
    ("ipv6 needed", {"ipv6": "off"}, {"pod_cidrs": ["10.244.1.0/24", "fd00:1::/64"]}, [("error", "ipv6")], "fd00:1::/64"),
    ("no wireguard", {"wireguard": {"kernel": False}}, {}, [("error", "wireguard")],
     "6.1.0-28-cloud-amd64 cannot create a WireGuard device, and there"),
    ("kernel updated", {"wireguard": {"kernel": False}, "modules_present": False}, {}, [("error", "wireguard")], "reboot"),
    ("userspace only", {"wireguard": {"kernel": False, "userspace": "/usr/bin/wireguard-go"}}, {}, [("warning", "wireguard")], "slower"),
    ("userspace asked for", {"wireguard": {"kernel": False, "userspace": "/usr/bin/wireguard-go"}}, {"implementation": "userspace"}, [],
     ""),
    ("userspace asked for, kernel there", {}, {"implementation": "userspace"}, [("error", "wireguard")], "install wireguard-go"),
    ("kernel asked for", {"wireguard": {"kernel": False, "userspace": "/usr/bin/wireguard-go"}}, {"implementation": "kernel"},
     [("error", "wireguard")], "cannot create"),
    ("no tun", {"wireguard": {"kernel": False, "userspace": "/usr/bin/wireguard-go", "tun": False}}, {}, [("error", "wireguard")],
     "modprobe tun"),
    ("cilium", {"links": [link("cilium_host"), link("lxc1234")]}, {}, [("error", "data path")], "Cilium: Cilium forwards"),
    ("cilium by its configuration", {"cni": {"types": ["cilium-cni"]}}, {}, [("error", "data path")], "encryption.type=wireguard"),
    ("calico ebpf", {"links": BPF}, {}, [("error", "data path")], "Calico eBPF"),
    ("calico wireguard", {"links": [link("wireguard.cali", "wireguard"), link("cali123abc")]}, {}, [("error", "data path")], "priority 99"),
    ("flannel wireguard", {"links": [link("flannel-wg", "wireguard"), link("cni0")]}, {}, [("error", "data path")], "already encrypts"),
    ("kilo", {"links": [link("kilo0", "wireguard")]}, {}, [("error", "data path")], "Kilo"),
    ("ovn", {"links": [link("ovn-k8s-mp0"), link("br-int")]}, {}, [("error", "data path")], "ipsecConfig"),
    ("antrea", {"links": [link("antrea-gw0")]}, {}, [("error", "data path")], "trafficEncryptionMode"),
    ("weave", {"links": [link("weave", "bridge")]}, {}, [("error", "data path")], "flat network"),
    ("aws", {"links": [link("eni12ab34cd")], "pod_routes": [{"prefix": "192.168.3.7/32", "device": "eni12ab34cd"}]}, {},
     [("warning", "data path")], "VPC"),
    ("calico iptables", {"links": [link("cali123abc"), link("tunl0", "ipip")], "pod_routes": []}, {}, [], ""),
    ("calico ipam", {"cni": {"types": ["calico"], "ipams": ["calico-ipam"]}, "pod_routes": []}, {}, [("error", "pod CIDRs")],
     "usePodCidr"),
    ("calico ipam, no pod CIDR", {"cni": {"types": ["calico"], "ipams": ["calico-ipam"]}}, {"pod_cidrs": []}, [("error", "pod CIDRs")],
     "usePodCidr"),
    ("calico ipam, a pool of its own", {"cni": {"types": ["calico"], "ipams": ["calico-ipam"]}, "pod_routes": [
        {"prefix": "10.244.1.64/26", "device": "a blackhole route"}]}, {}, [("warning", "pod CIDRs")], "those in use now are in"),
    ("calico ipam, followed", {"cni": {"types": ["calico"], "ipams": ["calico-ipam"]}, "pod_routes": [
        {"prefix": "10.244.1.64/26", "device": "a blackhole route"}]}, {"pod_source": "calico_ipam"}, [], ""),
    ("calico ipam, a new block", {"cni": {"types": ["calico"], "ipams": ["calico-ipam"]}, "pod_routes": [
        {"prefix": "10.244.166.128/26", "device": "a blackhole route"}]}, {"pod_source": "calico_ipam"}, [("warning", "pod CIDRs")],
     "not (yet) in what mesh_pod_source found: 10.244.166.128/26"),
    ("aws, pods followed", {"links": [link("eni12ab34cd")], "pod_routes": [{"prefix": "192.168.3.7/32", "device": "eni12ab34cd"}]},
     {"pod_source": "pods", "pod_cidrs": ["192.168.3.6/31"]}, [], ""),
    ("cilium, followed", {"links": [link("cilium_host")]}, {"pod_source": "cilium"}, [("error", "data path")], "Cilium forwards"),
    ("calico block elsewhere", {"pod_routes": [{"prefix": "10.244.166.128/26", "device": "a blackhole route"}]}, {},
     [("error", "pod CIDRs")], "not in its pod CIDRs 10.244.1.0/24: 10.244.166.128/26 (a blackhole route)"),
    ("borrowed address", {"pod_routes": [{"prefix": "10.244.9.9/32", "device": "cali1"}]}, {}, [("error", "pod CIDRs")],
     "10.244.9.9/32 (cali1)"),
    ("no pod cidrs known", {"pod_routes": [{"prefix": "10.244.9.9/32", "device": "cali1"}]}, {"pod_cidrs": []}, [], ""),
    ("only the other family known", {"pod_routes": [{"prefix": "fd00::5/128", "device": "cali1"}]}, {}, [], ""),
    ("a family given up", {"pod_routes": [{"prefix": "fd00::5/128", "device": "cali1"}], "last_pod_cidrs": ["10.244.1.0/24", "fd00::/64"]},
     {}, [("error", "pod CIDRs")], "fd00::5/128 (cali1)"),
    ("all families given up", {"last_pod_cidrs": ["10.244.1.0/24"]}, {"pod_cidrs": []}, [("error", "pod CIDRs")],
     "not in its pod CIDRs (it has none)"),
    ("a family given up, its pods gone", {"last_pod_cidrs": ["10.244.1.0/24", "fd00::/64"]}, {}, [], ""),
    ("another pod CIDR, pods renumbered", {"pod_routes": [{"prefix": "10.244.33.0/24", "device": "cni0"}],
                                           "last_pod_cidrs": ["10.244.1.0/24"]}, {"pod_cidrs": ["10.244.33.0/24"]}, [], ""),
    ("another pod CIDR, pods as they were", {"last_pod_cidrs": ["10.244.1.0/24"]}, {"pod_cidrs": ["10.244.33.0/24"]},
     [("error", "pod CIDRs")], "not in its pod CIDRs 10.244.33.0/24: 10.244.1.0/24 (cni0)"),
    ("device", {"links": CLEAN["links"] + [link("wgmesh1", "bridge")]}, {}, [("error", "device")],
     "wgmesh1 is there and is no WireGuard device (bridge)"),
    ("device of others", {"links": CLEAN["links"] + [link("wgmesh0", "wireguard")],
                          "wg_devices": {"wgmesh0": {"listen_port": 1, "fwmark": 0, "public_key": "x"}}}, {}, [("error", "device")],
     "not ours"),
    ("port by process", {"udp": [{"port": 51841, "holder": "dnsmasq"}]}, {}, [("error", "port")], "51841 is taken by dnsmasq"),
    ("port by wireguard", {"udp": [{"port": 51840, "holder": ""}], "wg_devices": {"wg0": {"listen_port": 51840, "fwmark": 0,
     "public_key": "x"}}},
     {}, [("error", "port")], "taken by the WireGuard device wg0"),
    ("port by vxlan", {"udp": [{"port": 51840, "holder": ""}], "links": [link("vx", "vxlan", 51840)]}, {}, [("error", "port")],
     "the vxlan device vx"),
    ("port by something", {"udp": [{"port": 51840, "holder": ""}]}, {}, [("error", "port")], "a socket of the kernel"),
    ("port by the responder", {"udp": [{"port": 51840, "holder": "python3"}], "responder_ports": [51840]}, {}, [], ""),
    ("rule priority", {"rules": MAIN_RULES + [rule(402, table="99")]}, {}, [("error", "rules")], "priority 402 from all lookup 99"),
    ("rule table", {"rules": MAIN_RULES + [rule(9000, table="51841")]}, {}, [("error", "rules")], "uses table 51841"),
    ("leftover with another mark", {"rules": MAIN_RULES + [rule(402, table="51841", fwmark="0x2000", fwmask="0x2000")]}, {},
     [("error", "rules")], "0x2000"),
    ("before, main", {"rules": MAIN_RULES + [rule(99, table="254")]}, {}, [("error", "rules")], "below 99"),
    ("before, main suppressed", {"rules": MAIN_RULES + [rule(99, table="254", suppress_prefixlen=0)]}, {}, [("error", "rules")],
     "suppress_prefixlength 0"),
    ("before, calico wireguard", {"rules": MAIN_RULES + [rule(99, table="1", fwmark="0x100000", fwmask="0x100000", **{"not": None})],
                                  "routes": {"1": [{"dst": "10.244.2.0/24", "device": "wireguard.cali", "type": "1",
                                                    "family": "ipv4"}]}}, {},
     [("warning", "rules")],
     "may decide about its traffic: ip rule: priority 99 not from all fwmark 0x100000/0x100000 lookup 1 (10.244.2.0/24)"),
    ("before, default route", {"rules": MAIN_RULES + [rule(99, table="7")],
                               "routes": {"7": [{"dst": "default", "device": "eth1", "type": "1", "family": "ipv4"}]}}, {},
     [("error", "rules")], "lookup 7"),
    ("before, empty table", {"rules": MAIN_RULES + [rule(99, table="7")]}, {}, [], ""),
    ("before, marked only", {"rules": MAIN_RULES + [rule(9, table="2004", fwmark="0x200", fwmask="0xf00")]}, {}, [], ""),
    ("before, local moved", {"rules": [rule(100, table="255"), *MAIN_RULES[1:]]}, {}, [], ""),
    ("before, one port", {"rules": MAIN_RULES + [rule(99, table="254", ipproto="udp", dport=53)]}, {}, [], ""),
    ("before, vrf", {"rules": MAIN_RULES + [rule(99, l3mdev=None)]}, {}, [], ""),
    ("before, our pods", {"rules": MAIN_RULES + [rule(99, table="254", src="10.244.0.0", srclen=16)]}, {}, [("error", "rules")],
     "10.244.0.0/16"),
    ("before, other pods", {"rules": MAIN_RULES + [rule(99, table="254", src="10.99.0.0", srclen=16)]}, {}, [], ""),
    ("before, blackhole", {"rules": MAIN_RULES + [rule(99, action="6")]}, {}, [("error", "rules")], "priority 99"),
    ("after", {"rules": MAIN_RULES + [rule(512, table="254"), rule(1000, l3mdev=None), rule(5270, table="52")]}, {}, [], ""),
    ("table", {"routes": {"51840": [{"dst": "0.0.0.0/1", "device": "eth9", "type": "1", "family": "ipv4"}]}}, {}, [("error", "tables")],
     "table 51840 holds routes of others: 0.0.0.0/1 dev eth9"),
    ("mark in a rule", {"rules": MAIN_RULES + [rule(9000, table="5", fwmark="0x3000", fwmask="0xf000")]}, {}, [("warning", "mark")],
     "lookup 5"),
    ("mark exactly", {"rules": MAIN_RULES + [rule(9000, table="5", fwmark="0x1539")]}, {}, [("warning", "mark")], "0x1539"),
    ("mark elsewhere", {"rules": MAIN_RULES + [rule(9000, table="5", fwmark="0x80000", fwmask="0xff0000")]}, {}, [], ""),
    ("mark set", {"marks": ["-A OUTPUT -j MARK --set-xmark 0x1000/0x1000"]}, {}, [("warning", "mark")], "1 firewall rules"),
    ("mark set, between nodes", {"marks": ["meta mark set 0x00001000"]}, {"encrypt": "nodes"}, [("error", "mark")], "set mesh_fwmark"),
    ("mark looked for, between nodes", {"marks": ["-m mark --mark 0x1000/0x1000 -j ACCEPT"]}, {"encrypt": "nodes"}, [("warning",
     "mark")], ""),
    ("another node's host", {}, {"node_addresses": ["198.18.0.12", "fd00::c"]}, [("error", "addresses")], "mesh_node_name"),
    ("address on the mesh device only", {"addresses": [{"address": "198.18.0.11", "device": "wgmesh0"}]}, {}, [("error", "addresses")],
     "198.18.0.11"),
    ("second address", {}, {"node_addresses": ["203.0.113.1", "198.18.0.11"]}, [], ""),
]


@pytest.mark.parametrize("name,changes,settings,expected,words", CASES, ids=[case[0].replace(" ", "-") for case in CASES])
def test_cases(name, changes, settings, expected, words):
    result = _preflight.findings(facts(**changes), dict(SETTINGS, **settings))
    assert [(item["level"], item["check"]) for item in result] == expected
    for item in result:
        assert item["node"] == "worker-1" and item["message"] and item["remedy"]
        assert set(item) == {"level", "check", "node", "value", "message", "remedy"} and isinstance(item["value"], str)
    if words:
        assert words in " ".join([result[0]["message"], result[0]["remedy"]])


def test_errors_come_first_and_all_are_told():
    many = facts(uid=5, fips=True, links=[link("cilium_net"), link("wgmesh0", "dummy")], udp=[{"port": 51840, "holder": "x"}])
    result = found(many)
    assert result == sorted(result, key=lambda item: item[0] != "error")
    assert set(result) == {("error", "user"), ("error", "data path"), ("error", "device"), ("error", "port"), ("warning", "fips")}


@pytest.mark.parametrize("name,links,types", [
    ("Flannel", ["flannel.1", "cni0"], []), ("Calico", ["cali12"], []), ("kube-router", ["kube-bridge"], []), ("bridge", ["cni0"], []),
    ("kindnet", ["veth12"], ["ptp", "portmap"]), (None, ["eth0", "docker0"], [])])
def test_data_paths_that_can_be_steered(name, links, types):
    path = _preflight.data_path(facts(links=[link(one) for one in links], cni={"types": types}))
    assert (path["name"] if path else None) == name and not (path and path["level"])


# --- between nodes -------------------------------------------------------------------------------------------------------------------

def target(number, judged=True):
    return {"name": "n%02d" % number, "address": "198.18.0.%d" % number, "ports": [51840, 51841], "judged": judged}


def measured(path_mtu=1500, reached=True, errors=None):
    return {"reached": {1} if reached else set(), "listening": set(), "path_mtu": path_mtu, "rtt": 0.1, "errors": errors or {},
            "finished": True}


def between(verdicts, results=None, **settings):
    targets = [target(number) for number in range(len(verdicts))]
    results = results or [measured() for dummy in verdicts]
    return list(_preflight.underlay_findings(
        dict(SETTINGS, **settings), targets,
        {one["name"]: dict(zip((51840, 51841), verdict)) for one, verdict in zip(targets, verdicts)},
        {one["name"]: result for one, result in zip(targets, results)}))


def test_all_open():
    assert between([("open", "open"), ("held", "open"), ("held", "held")] + [("open", "open")]) == []


def test_closed_ports_name_node_address_and_port():
    result = between([("open", "open"), ("closed", "open"), ("open", "closed"), ("closed", "closed")])
    assert [(item["level"], item["value"]) for item in result] == [
        ("error", "198.18.0.1:51840"), ("warning", "198.18.0.2:51841"), ("error", "198.18.0.3:51840 and 51841")]
    assert "n01" in result[0]["message"] and "firewall of n01" in result[0]["remedy"]


def test_error_of_the_network_is_in_the_message():
    errors = {("198.18.0.1", 51840): "Connection refused"}
    result = between([("open", "open"), ("closed", "closed")], [measured(), measured(None, False, errors)])
    assert "(Connection refused)" in result[0]["message"]


def test_nobody_answers_is_one_finding():
    result = between([("closed", "closed")] * 40, [measured(None, False)] * 40)
    assert len(result) == 1 and "none of the 40 other nodes" in result[0]["message"] and "and 35 more" in result[0]["message"]


def test_findings_stay_few_in_a_big_cluster():
    result = between([("open", "open")] * 10 + [("closed", "closed")] * 4990, [measured()] * 10 + [measured(None, False)] * 4990)
    assert len(result) == _preflight.LISTED + 1 and "4970 more nodes" in result[-1]["message"]
    assert len(json.dumps(result)) < 20000


@pytest.mark.parametrize("size,mtu,expected", [
    (1500, None, []), (1340, None, []), (1339, None, ["1339 bytes, which leaves 1279"]), (1500, 1440, []),
    (1500, 1441, ["mesh_mtu is 1441"]),
    (1400, 1420, ["at most 1340"])])
def test_mtu(size, mtu, expected):
    result = between([("open", "open")] * 2, [measured(), measured(size)], mtu=mtu)
    assert [item["check"] for item in result] == ["mtu"] * len(expected)
    for item, words in zip(result, expected):
        assert words in item["message"] + item["remedy"]


def test_only_small_packets_pass():
    result = between([("open", "open")] * 2, [measured(), measured(None)])
    assert len(result) == 1 and "bigger ones do not: n01" in result[0]["message"]


def test_least_path_mtus():
    targets = [dict(target(1)), dict(target(2)), dict(target(3), address="fd00::3")]
    results = {"n01": measured(1450), "n02": measured(1400), "n03": measured(None)}
    assert _preflight.least_path_mtus(targets, results) == {"ipv4": (1400, "n02")}


# --- the table -----------------------------------------------------------------------------------------------------------------------

def test_table():
    one = _preflight.finding("error", "port", "worker-1", "UDP port 51840 is taken by wg0", "stop that", 51840)
    same = [dict(one, node="worker-%d" % number) for number in range(2, 12)]
    warning = _preflight.finding("warning", "fips", "worker-3", "FIPS mode is on", "ask " + "somebody " * 30)
    lines = _preflight.findings_table([warning, one] + same, 100)
    assert lines[0].split() == ["LEVEL", "CHECK", "NODES", "FINDING"]
    assert lines[1].startswith("error") and "worker-1, worker-10" in lines[1] and "UDP port 51840 is taken by wg0" in lines[1]
    assert any("6 more" in line for line in lines)
    assert sum("stop that" in line for line in lines) == 1
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1] == "1 error, 1 warning"
    assert [line for line in lines if line.startswith("warning")] == [line for line in lines if "FIPS" in line]
    assert _preflight.findings_table([]) == ["no findings"]


def test_table_of_a_big_cluster_stays_small():
    found_ = [_preflight.finding("error", "tools", "worker-%d" % number, "the command wg is missing", "install wireguard-tools")
              for number in range(5000)]
    assert len(_preflight.findings_table(found_)) < 10


# --- reading -------------------------------------------------------------------------------------------------------------------------

PROC_UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
 9993: 00000000:CA80 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 547371 2 000000009bf386f5 0
  100: 3500007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 13456 2 0000000000000000 0
"""


def test_proc_net_udp():
    assert _preflight_facts.parse_proc_udp(PROC_UDP) == [(51840, 547371), (53, 13456)]
    assert _preflight_facts.parse_proc_udp("") == []


def test_mark_lines():
    nft = ("table ip nat {\n\tchain x {\n\t\tmeta mark set 0x00004000 counter\n\t}\n}\n"
           "table inet kubemesh_guard {\n\tchain x {\n\t\tmeta mark 0x00001000 accept\n\t}\n}\n"
           "table ip filter {\n\tchain x {\n\t\tmeta mark set 0x00004000 counter\n\t\tcounter drop\n\t}\n}\n")
    assert _preflight_facts.mark_lines([nft, "-A X -j MARK --set-xmark 0x4000/0x4000\n"]) == [
        "meta mark set 0x00004000 counter", "-A X -j MARK --set-xmark 0x4000/0x4000"]
    many = "".join("meta mark set 0x%08x\n" % number for number in range(20000))
    assert len(_preflight_facts.mark_lines([many])) == _preflight_facts.MARK_LINES


@pytest.mark.parametrize("line,uses", [
    ("meta mark 0x00001000 accept", True), ("-m mark --mark 0x1000/0x1000", True), ("-m mark --mark 0x1000", True),
    ("--set-xmark 0xffff/0xffff", True), ("--set-xmark 0x4000/0xffffffff", False), ("meta mark and 0xffffefff", False),
    ("--set-xmark 0x1000/0x0", False), ("meta mark & 0x00001000 == 0x00001000", True), ("meta mark 0x00002000", False)])
def test_uses_mark(line, uses):
    assert _preflight.uses_mark(line, 0x1000) == uses


@pytest.mark.parametrize("able", [True, False])
def test_a_device_is_made_once_to_see_whether_it_can_be(able, monkeypatch):
    """In one way, that of the module interface; a second attempt that went well would leave its device."""
    system = mock.Mock(**{"path.return_value": None})
    monkeypatch.setattr(_preflight_facts, "kernel_has_wireguard", lambda given: given is system and able)
    assert _preflight_facts._wireguard(system) == {"kernel": able, "userspace": ""}
    assert not system.try_run.called and not system.run.called


def test_pod_routes():
    routes = [
        {"dst": "default", "gateway": "198.18.0.1", "dev": "eth0"}, {"dst": "10.244.1.0/24", "dev": "cni0"},
        {"dst": "10.244.2.0/24", "gateway": "198.18.0.12", "dev": "eth0"},
        {"dst": "10.244.3.0/24", "gateway": "10.244.3.0", "dev": "flannel.1"},
        {"dst": "10.244.1.9", "dev": "cali0a1b2c3d"}, {"dst": "192.168.7.7", "dev": "eni12ab34"},
        {"dst": "172.17.0.0/16", "dev": "docker0"},
        {"type": "blackhole", "dst": "10.244.1.64/26"}, {"type": "6", "dst": "10.244.1.128/26", "protocol": "80"},
        {"dst": "198.18.0.0/24", "dev": "eth0"}, {"dst": "10.244.1.77", "dev": "vethdeadbeef"},
        {"dst": "192.168.9.0/24", "dev": "cni1"}, {"dst": "10.1.1.1", "dev": "vethernet"}]
    assert [item["prefix"] for item in _preflight_facts.pod_routes_of(routes, "ipv4")] == [
        "10.244.1.0/24", "10.244.1.9/32", "192.168.7.7/32", "10.244.1.64/26", "10.244.1.128/26", "10.244.1.77/32"]
    assert _preflight_facts.pod_routes_of([{"dst": "fe80::/64", "dev": "cali1"}, {"dst": "fd00::9", "dev": "cali1"}], "ipv6") == [
        {"prefix": "fd00::9/128", "device": "cali1"}]


@pytest.mark.parametrize("text,types,ipams", [
    ('{"name": "k8s-pod-network", "plugins": [{"type": "calico", "ipam": {"type": "calico-ipam"}}, {"type": "portmap"}]}',
     ["calico", "portmap"], ["calico-ipam"]),
    ('{"type": "bridge", "ipam": {"type": "host-local"}}', ["bridge"], ["host-local"]),
    ('{"plugins": [{"type": "cilium-cni"}]}', ["cilium-cni"], []),
    ("", [], []), ("{", [], []), ("[1]", [], []), ('{"plugins": 5}', [], []), ('{"plugins": ["x", {"ipam": 1}]}', [], [])])
def test_cni_configuration(text, types, ipams):
    assert _preflight_facts.cni_types(text) == {"types": types, "ipams": ipams}


def test_first_cni_configuration_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(_preflight_facts, "CNI_FOLDER", str(tmp_path))
    assert _preflight_facts.cni_configuration() == {"types": [], "ipams": []}
    (tmp_path / "99-loopback.conf").write_text('{"type": "loopback"}')
    (tmp_path / "05-README").write_text('{"type": "no"}')
    (tmp_path / "10-flannel.conflist").write_text('{"plugins": [{"type": "flannel"}]}')
    assert _preflight_facts.cni_configuration()["types"] == ["flannel"]


def test_files_of_others(tmp_path, monkeypatch):
    paths = {"wg_quick": str(tmp_path / "%s.conf"), "setconf": str(tmp_path / "%s.setconf")}
    monkeypatch.setattr(_preflight_facts._persist, "paths_of", lambda name: {use: path % name for use, path in paths.items()})
    (tmp_path / "wgmesh0.conf").write_text("# Written by kubemesh.wireguard. Changes made here are lost.\n[Interface]\n")
    assert _preflight_facts.foreign_files("wgmesh") == []
    (tmp_path / "wgmesh1.conf").write_text("[Interface]\nPrivateKey = secret\n")
    assert _preflight_facts.foreign_files("wgmesh") == [str(tmp_path / "wgmesh1.conf")]
