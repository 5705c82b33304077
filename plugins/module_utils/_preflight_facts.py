# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""What a node is like before the mesh comes: reads, and judges nothing; `_preflight` judges.

Facts are plain data, so that they can be stored and the judgement be tested with those of nodes that we do not have. What cannot be read is
absent or empty: a node without ``nft`` has no marks there.

Nothing is changed, except that finding out whether the kernel can create a WireGuard device means to create one, which loads the module.
It is gone at once.
"""

from __future__ import annotations

import json
import os
import re
import sys

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_inputs, _persist, _underlay
from ansible_collections.kubemesh.wireguard.plugins.module_utils._interface import USERSPACE_COMMANDS, kernel_has_wireguard
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import FAMILIES, MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import FAMILY_OPTION, read_document, read_sysctl, read_text
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg import client_for, device_names

TOOLS = ("ip", "wg", "wg-quick")
DOCUMENT_FILE = "/etc/kubemesh/mesh.json"
CNI_FOLDER = "/etc/cni/net.d"
# Items kept of lists that grow with the cluster; a finding needs a few of them.
KEPT = 50
# Lines about marks kept of a ruleset; kube-proxy has a few for each service.
MARK_LINES = 5000
# Devices behind which the pods of this node are: Calico, Cilium and others, AWS, Azure, GKE, ptp and bridge plugins, kube-router, kubenet.
# Of bridges only cni0: others may be those of secondary networks (Multus).
POD_DEVICE = re.compile(r"(cali|lxc|eni|azv|gke|veth)[0-9a-f]+$|cni0$|kube-bridge$|cbr0$")
# Devices that carry an address of the pod range for the node itself.
OVERLAY_DEVICES = ("tunl0", "vxlan.calico", "vxlan-v6.calico", "flannel.1", "flannel-v6.1", "cilium_host")


def read_facts(system, settings):
    """All facts of this node as a dict; see the functions below for the parts."""
    facts = {
        "uid": os.geteuid(),
        "python": list(sys.version_info[:3]),
        "kernel": os.uname().release,
        "modules_present": os.path.isdir("/lib/modules/" + os.uname().release),
        "systemd": os.path.isdir("/run/systemd/system"),
        "tools": {name: system.path(name) is not None for name in TOOLS},
        "mesh_document": os.path.exists(DOCUMENT_FILE),
        "last_pod_cidrs": last_pod_cidrs(settings["node"]),
        "fips": read_sysctl("crypto/fips_enabled") == "1",
        "ipv6": _ipv6(),
        "foreign_files": foreign_files(settings["interface"]),
        "readonly": [path for path in ("/etc", "/run") if not os.access(path, os.W_OK)],
        "cni": cni_configuration(),
        "wireguard": {"kernel": False, "userspace": "", "tun": os.path.exists("/dev/net/tun")},
        "links": [], "addresses": [], "rules": [], "routes": {}, "pod_routes": [], "wg_devices": {}, "udp": [], "marks": [],
    }
    facts["tools"]["ip_json"] = _has_ip_json(system)
    if settings["agent"] is not None:
        facts["agent"] = _agent_inputs.read_inputs(settings["agent"]["paths"])
    if facts["tools"]["ip_json"]:
        facts["wireguard"].update(_wireguard(system))
        facts.update(_network(system, settings))
    facts["wg_devices"] = _wg_devices(system)
    facts["udp"] = udp_holders(settings["ports"])
    responder = _underlay.running_responder()
    facts["responder_ports"] = responder["ports"] if responder else []
    facts["marks"] = mark_lines([system.try_run(argv)[1] for argv in (
        ["nft", "--terse", "list", "ruleset"], ["iptables-save"], ["ip6tables-save"])])
    return facts


def read_agent_facts(system, settings):
    """The part of the facts that `_preflight.agent_findings` needs, of a node that has a mesh."""
    return {"agent": _agent_inputs.read_inputs(settings["agent"]["paths"]), "wireguard": _wireguard(system), "links": _links(system)}


def last_pod_cidrs(node):
    """The pod CIDRs of this node in the mesh document that it keeps; none where that is missing or damaged."""
    try:
        document = read_document(DOCUMENT_FILE)
    except MeshError:
        return []
    return document["nodes"][node]["pod_cidrs"] if node in document["nodes"] else []


def _has_ip_json(system):
    rc, out, dummy = system.try_run(["ip", "-j", "-N", "link", "show", "lo"])
    try:
        return rc == 0 and bool(json.loads(out))
    except ValueError:
        return False


def _ipv6():
    """``on``, ``off`` (a sysctl says so for new devices) or ``absent`` (the kernel has none, or was booted with ipv6.disable=1)."""
    value = read_sysctl("net/ipv6/conf/default/disable_ipv6")
    return "absent" if value is None else "off" if value == "1" else "on"


def _wireguard(system):
    """Whether a device can be made here, and by what."""
    return {"kernel": kernel_has_wireguard(system),
            "userspace": next((path for path in map(system.path, USERSPACE_COMMANDS) if path), "")}


def _wg_devices(system):
    """{name: {"listen_port", "fwmark", "public_key"}} of all WireGuard devices; one that cannot be read has None in it."""
    found = {}
    for name in device_names():
        try:
            state = client_for(name, run_command=system.module.run_command).read(name)
            found[name] = {field: state[field] for field in ("listen_port", "fwmark", "public_key")}
        except MeshError:
            found[name] = {"listen_port": None, "fwmark": None, "public_key": None}
    return found


def _links(system):
    links = []
    for item in system.ip_json(["-d", "link", "show"]):
        info = item.get("linkinfo") or {}
        links.append({"name": item["ifname"], "kind": info.get("info_kind", ""),
                      "udp_port": (info.get("info_data") or {}).get("port") if info.get("info_kind") in ("vxlan", "geneve") else None})
    return links


def _network(system, settings):
    addresses = []
    for item in system.ip_json(["addr", "show"]):
        addresses += [{"address": one["local"], "device": item["ifname"]} for one in item.get("addr_info", []) if "local" in one]
    rules, pod_routes = [], []
    for family in FAMILIES:
        rules += [dict(item, family=family)
                  for item in system.ip_json([FAMILY_OPTION[family], "rule", "show"], missing=("not supported",))[:1000]]
        pod_routes += pod_routes_of(system.ip_json([FAMILY_OPTION[family], "route", "show", "table", "254"]), family)
    overlays = ["%s/%d" % (item["address"], 128 if ":" in item["address"] else 32) for item in addresses
                if item["device"] in OVERLAY_DEVICES and not item["address"].startswith("fe80:")]
    pod_routes += [{"prefix": prefix, "device": "an overlay device"} for prefix in overlays]
    return {"links": _links(system), "addresses": addresses, "rules": rules, "pod_routes": pod_routes[:KEPT],
            "routes": _routes_of(system, _tables_to_read(rules, settings))}


def _tables_to_read(rules, settings):
    """Our two tables, and those that rules before ours look at; not main and local, which are what they are."""
    before = {str(item.get("table", "")) for item in rules if item.get("priority", 0) < settings["rule_priority"]}
    numbers = sorted(int(table) for table in before if table.isdigit() and int(table) not in (0, 253, 254, 255))
    return sorted({settings["table"], settings["table"] + 1, *numbers[:KEPT]})


def _routes_of(system, tables):
    """{table as text: [{"dst", "device", "type"}]}, some of each table."""
    found = {}
    for table in tables:
        for family in FAMILIES:
            for item in system.ip_json([FAMILY_OPTION[family], "route", "show", "table", str(table)], missing=("does not exist",))[:KEPT]:
                found.setdefault(str(table), []).append({
                    "dst": item["dst"], "device": item.get("dev", ""), "type": str(item.get("type", "1")), "family": family})
    return found


# Numbers of route types, as ``ip -N`` prints some of them: include/uapi/linux/rtnetlink.h, RTN_BLACKHOLE
BLACKHOLE = ("blackhole", "6")


def pod_routes_of(items, family):
    """Routes of the main table -> [{"prefix", "device"}] that show which addresses the pods of this node have.

    Routes to the devices of pods, and the blackhole routes by which Calico holds the blocks of this node (protocol 80, confd's bird).
    """
    found = []
    for item in items:
        dst, device = item["dst"], item.get("dev", "")
        blackhole = str(item.get("type")) in BLACKHOLE
        if dst == "default" or dst.startswith("fe80:") or "gateway" in item or not (blackhole or POD_DEVICE.match(device)):
            continue
        prefix = dst if "/" in dst else dst + ("/32" if family == "ipv4" else "/128")
        found.append({"prefix": prefix, "device": "a blackhole route" if blackhole else device})
    return found


def udp_holders(ports):
    """[{"port", "holder": name of a process, or "" where none has it}] of sockets on our ports in this network namespace."""
    inodes = {}
    for name in ("udp", "udp6"):
        for port, inode in parse_proc_udp(read_text("/proc/self/net/" + name) or ""):
            if port in ports:
                inodes[inode] = port
    found = {}
    if inodes:
        holders = _process_names(set(inodes))
        for inode, port in inodes.items():
            found[port] = found.get(port) or holders.get(inode, "")
    return [{"port": port, "holder": holder} for port, holder in sorted(found.items())]


def parse_proc_udp(text):
    """``/proc/net/udp`` or ``udp6`` -> [(local port, inode)]; proc(5)."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9:
            found.append((int(fields[1].rpartition(":")[2], 16), int(fields[9])))
    return found


def _process_names(inodes):
    """{inode: name of a process that has the socket open}."""
    wanted = {"socket:[%d]" % inode: inode for inode in inodes}
    found = {}
    for pid in _listing("/proc", None):
        if pid.isdigit():
            for number in _listing("/proc/%s/fd" % pid, None):
                try:
                    link = os.readlink("/proc/%s/fd/%s" % (pid, number))
                except OSError:
                    continue
                if link in wanted:
                    found[wanted[link]] = (read_text("/proc/%s/comm" % pid) or "").strip() or "process %s" % pid
    return found


def _listing(path, limit=KEPT):
    try:
        return sorted(os.listdir(path))[:limit]
    except OSError:
        return []


def mark_lines(texts):
    """Rulesets as text -> the lines that have to do with packet marks, without our own table's, each once, bounded."""
    found = {}
    for text in texts:
        own = False
        for line in text.splitlines():
            if line.startswith("table "):
                own = "kubemesh" in line
            lowered = line.lower()
            if "mark" in lowered and "0x" in lowered and not own:
                found[line.strip()] = None
                if len(found) >= MARK_LINES:
                    return list(found)
    return list(found)


def cni_configuration():
    """{"types": plugin types, "ipams": IPAM types} of the configuration that the container runtime uses: the first file by name.

    CNI runtimes take the first of ``.conf``, ``.conflist`` and ``.json`` in the folder (containernetworking/cni, libcni, ConfFiles).
    """
    for name in _listing(CNI_FOLDER):
        if name.endswith((".conf", ".conflist", ".json")):
            found = cni_types(read_text(os.path.join(CNI_FOLDER, name)) or "")
            if found["types"]:
                return found
    return {"types": [], "ipams": []}


def cni_types(text):
    """A CNI configuration, single or list -> {"types", "ipams"}; empty if it is none."""
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    plugins = data.get("plugins", [data]) if isinstance(data, dict) else []
    plugins = [plugin for plugin in plugins if isinstance(plugin, dict)] if isinstance(plugins, list) else []
    ipams = [plugin["ipam"].get("type") for plugin in plugins if isinstance(plugin.get("ipam"), dict)]
    return {"types": [str(plugin["type"]) for plugin in plugins if plugin.get("type")], "ipams": [str(ipam) for ipam in ipams if ipam]}


def foreign_files(interface):
    """Files that the mesh would write and that somebody else wrote."""
    found = []
    for generation in ("0", "1"):
        for path in _persist.paths_of(interface + generation).values():
            text = read_text(path)
            if text is not None and "Written by kubemesh.wireguard" not in text:
                found.append(path)
    return sorted(found)
