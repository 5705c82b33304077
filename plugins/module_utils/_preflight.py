# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""What stands in the way of the mesh on a node, and what to do about it.

Pure: standard library only, no I/O, no clock. Facts come from `_preflight_facts`, measurements from `_underlay`.

A *finding* is ``{"level": "error"|"warning", "check", "node", "value", "message", "remedy"}``, all texts. Errors stop a run, warnings do
not: an error is what would lose packets, lock somebody out or damage what belongs to others; a warning is what a person should know.
The mesh that is already there is never a finding: its devices, ports, tables and rules are those of the settings.

*Settings*: {"node", "interface": stem of the device names, "ports": [port of generation 0, of generation 1], "table", "rule_priority",
"fwmark", "encrypt": "pods"|"nodes", "implementation": "auto"|"kernel"|"userspace",
"persistence": "auto"|"wg-quick"|"systemd-networkd"|"none", "mtu": bytes or None, "pod_cidrs": of this node,
"node_addresses": of this node; the last two are empty where they are not known yet; "agent": None where there shall be none, else
{"paths": {"ca_file", "token_file"}, "token_given"} as `_agent_inputs.input_faults` takes them}.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import textwrap

from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_inputs import input_faults
from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import OVERHEAD, decided_implementation, is_generation
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MTU_MIN_IPV6, family_of, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._pods import NODE_CIDRS
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import PRIORITIES, rule_from_ip

LEVELS = ("error", "warning")
PYTHON_LEAST = (3, 8)
# Findings of one kind in the result of one node; the rest is counted.
LISTED = 20
# Named in a text.
NAMED = 5
MAIN_TABLE, LOCAL_TABLE = 254, 255  # include/uapi/linux/rtnetlink.h

# How a data path is recognized, whether the policy rules of the kernel can steer it, and why not. "links" are beginnings of device names,
# "types" CNI plugin types. The first that matches counts. No level: it can be steered.
DATA_PATHS = (
    {"name": "Cilium", "links": ("cilium_",), "types": ("cilium-cni",), "level": "error",
     "why": "Cilium forwards the packets of pods by eBPF, past the kernel's routing rules",
     "remedy": "use Cilium's own WireGuard (encryption.enabled=true, encryption.type=wireguard) instead of this mesh; if Cilium is no "
               "longer used here, remove what it left (devices cilium_host and cilium_net), or reboot"},
    {"name": "Calico with WireGuard", "links": ("wireguard.cali", "wg-v6.cali"), "level": "error",
     "why": "Calico already encrypts, and its rules at priority 99 come before those of the mesh",
     "remedy": "keep Calico's WireGuard, or switch it off first (wireguardEnabled: false in the FelixConfiguration)"},
    {"name": "Calico eBPF", "links": ("bpfin.cali", "bpfout.cali", "bpfnatin", "bpfnatout"), "level": "error",
     "why": "Calico's eBPF data plane forwards the packets of pods past the kernel's routing rules",
     "remedy": "use Calico's own WireGuard (wireguardEnabled: true in the FelixConfiguration), or its iptables or nftables data plane"},
    {"name": "Flannel with WireGuard", "links": ("flannel-wg",), "level": "error",
     "why": "Flannel's back end already encrypts",
     "remedy": "keep it, or change Flannel's back end to vxlan or host-gw first"},
    {"name": "Kilo", "links": ("kilo0",), "level": "error",
     "why": "Kilo already encrypts, and manages routes of its own for the same prefixes",
     "remedy": "keep Kilo, or remove it first"},
    {"name": "Antrea", "links": ("antrea-gw0",), "types": ("antrea",), "level": "error",
     "why": "Antrea forwards the packets of pods in Open vSwitch, past the kernel's routing rules",
     "remedy": "use Antrea's own encryption (trafficEncryptionMode: wireGuard) instead of this mesh"},
    {"name": "OVN-Kubernetes", "links": ("ovn-k8s-mp0",), "types": ("ovn-k8s-cni-overlay",), "level": "error",
     "why": "OVN-Kubernetes forwards the packets of pods in Open vSwitch, past the kernel's routing rules",
     "remedy": "use the IPsec of OVN-Kubernetes (ipsecConfig) instead of this mesh"},
    {"name": "Kube-OVN", "links": ("ovn0",), "types": ("kube-ovn",), "level": "error",
     "why": "Kube-OVN forwards the packets of pods in Open vSwitch, past the kernel's routing rules",
     "remedy": "use Kube-OVN's own IPsec (ENABLE_OVN_IPSEC) instead of this mesh"},
    {"name": "Weave Net", "links": ("weave",), "types": ("weave-net",), "level": "error",
     "why": "Weave gives the pods of all nodes addresses of one flat network, so that no route can tell the nodes apart",
     "remedy": "use Weave's own encryption (WEAVE_PASSWORD) instead of this mesh"},
    {"name": "AWS VPC CNI", "links": ("eni",), "types": ("aws-cni",), "level": "warning",
     "why": "pods have addresses of the VPC and nodes have no pod CIDRs, so there is no prefix that could be routed into the mesh",
     "remedy": "encrypt between nodes only (mesh_encrypt: nodes), or use instance types that encrypt in transit; mesh_pod_source: pods "
               "takes the addresses of the pods, and has to follow each of them"},
    {"name": "Calico", "links": ("cali", "vxlan.calico"), "types": ("calico",), "level": ""},
    {"name": "kube-router", "links": ("kube-bridge",), "level": ""},
    {"name": "Flannel", "links": ("flannel",), "types": ("flannel",), "level": ""},
    {"name": "bridge", "links": ("cni0", "cbr0"), "types": ("bridge", "kubenet"), "level": ""},
    {"name": "kindnet", "types": ("ptp",), "level": ""},
)

# Selectors by which a rule takes a part of the traffic only, as ``ip -j rule`` names them.
_PARTS = ("iif", "oif", "ipproto", "sport", "dport", "uidrange", "tos")
_MARK = re.compile(r"0x([0-9a-f]+)(?:/0x([0-9a-f]+))?")


def finding(level, check, node, message, remedy, value=""):
    """One finding."""
    return {"level": level, "check": check, "node": node, "value": str(value), "message": message, "remedy": remedy}


def findings(facts, settings):
    """Everything about one node by itself, errors first; what lies between nodes is `underlay_findings`."""
    parts = (base_findings, wireguard_findings, data_path_findings, device_findings, port_findings, rule_findings, mark_findings,
             address_findings, agent_findings)
    found = list(itertools.chain.from_iterable(part(facts, settings) for part in parts))
    return sorted(found, key=lambda item: LEVELS.index(item["level"]))


def base_findings(facts, settings):
    """User, Python, tools, file system, systemd, FIPS, IPv6."""
    node, tools = settings["node"], facts["tools"]

    def error(check, message, remedy, value=""):
        return finding("error", check, node, message, remedy, value)
    if facts["uid"] != 0:
        yield error("user", "the task runs as user id %d" % facts["uid"], "run it as root (become: true)", facts["uid"])
    if tuple(facts["python"]) < PYTHON_LEAST:
        version = ".".join(map(str, facts["python"]))
        yield error("python", "Python %s is too old, 3.8 or newer is needed" % version,
                    "install a newer one and name it in ansible_python_interpreter", version)
    if not tools["ip"]:
        yield error("tools", "the command ip is missing", "install iproute2")
    elif not tools["ip_json"]:
        yield error("tools", "the command ip prints no JSON", "install iproute2 4.18 or newer; BusyBox' ip is not enough")
    if not tools["wg"]:
        yield error("tools", "the command wg is missing", "install wireguard-tools")
    elif settings["persistence"] == "wg-quick" and not tools["wg-quick"]:
        yield error("tools", "the command wg-quick is missing and mesh_persistence is wg-quick",
                    "install wireguard-tools with wg-quick, or set mesh_persistence: systemd-networkd")
    if not facts["systemd"] and settings["persistence"] != "none":
        yield error("systemd", "systemd does not run here, so nothing would bring the mesh back after a reboot",
                    "use nodes with systemd")
    for path in facts["readonly"]:
        yield error("files", "%s cannot be written" % path, "make it writable; the mesh keeps its key and its configuration there", path)
    for path in facts["foreign_files"]:
        yield error("files", "%s is there and was not written by this collection" % path,
                    "move it away, or set mesh_interface to a name that nothing else uses", path)
    if facts["fips"]:
        yield finding("warning", "fips", node, "FIPS mode is on, and WireGuard's ciphers (ChaCha20-Poly1305, Curve25519, BLAKE2s) are not "
                      "approved", "ask who is responsible for compliance before you enable the mesh", "fips_enabled=1")
    if facts["ipv6"] != "on":
        wants = [text for text in settings["pod_cidrs"] + settings["node_addresses"] if ":" in text]
        how = "is disabled for new devices (net.ipv6.conf.default.disable_ipv6)" if facts["ipv6"] == "off" else "is missing in the kernel"
        if wants:
            yield error("ipv6", "IPv6 %s, but this node has the prefix or address %s" % (how, wants[0]),
                        "enable IPv6 (sysctl net.ipv6.conf.all.disable_ipv6=0, no ipv6.disable=1 at boot)", wants[0])
        elif facts["ipv6"] == "off":
            yield finding("warning", "ipv6", node, "IPv6 %s, so it is switched on for the mesh devices, and for these only" % how,
                          "nothing has to be done: the probes use link-local addresses there", facts["ipv6"])
        else:
            yield finding("warning", "ipv6", node, "IPv6 %s, so all tunnels of the cluster can only be judged by their handshakes, and not "
                          "whether packets of full size get through" % how,
                          "boot without ipv6.disable=1: IPv6 is needed on the mesh devices only", facts["ipv6"])


def wireguard_findings(facts, settings):
    """Whether a device can be made."""
    node, found, wanted = settings["node"], facts["wireguard"], settings["implementation"]
    if not facts["tools"]["ip_json"] or (found["kernel"] and wanted != "userspace"):
        return
    if wanted != "kernel" and found["userspace"]:
        if not found["tun"]:
            yield finding("error", "wireguard", node, "%s is there, but /dev/net/tun is not" % found["userspace"],
                          "load the module tun (modprobe tun), or pass the device into the container", "/dev/net/tun")
        elif wanted == "auto":
            yield finding("warning", "wireguard", node, "the kernel has no WireGuard, so %s is used, which is slower" % found["userspace"],
                          _kernel_remedy(facts), found["userspace"])
        return
    message = "the kernel %s cannot create a WireGuard device" % facts["kernel"]
    if wanted == "userspace":
        message = "mesh_implementation is userspace, and there is none here"
    elif wanted == "auto":
        message += ", and there is no userspace implementation"
    yield finding("error", "wireguard", node, message, {
        "userspace": "install wireguard-go",
        "kernel": _kernel_remedy(facts),
    }.get(wanted, _kernel_remedy(facts) + "; or install wireguard-go"), facts["kernel"])


def _kernel_remedy(facts):
    if not facts["modules_present"]:
        return ("there is no /lib/modules/%s: if the kernel was replaced by an update, reboot; else install one with the module wireguard"
                % facts["kernel"])
    return "install the kernel package with the module wireguard (its name may end in modules-extra) and see that it is not blacklisted"


def data_path(facts):
    """The data path of the pods -> one of `DATA_PATHS`, or None if nothing is recognized."""
    names, types = [link["name"] for link in facts["links"]], facts["cni"]["types"]
    for candidate in DATA_PATHS:
        if (any(name.startswith(candidate.get("links", ())) for name in names)
                or any(one in candidate.get("types", ()) for one in types)):
            return candidate
    return None


def data_path_findings(facts, settings):
    """A data path that the mesh cannot steer, or whose addresses are not those that it would route."""
    node, found, follows = settings["node"], data_path(facts), settings["pod_source"] != NODE_CIDRS
    # A warning is about pods without pod CIDRs.
    if found is not None and found["level"] and not (follows and found["level"] == "warning"):
        yield finding(found["level"], "data path", node, "%s: %s" % (found["name"], found["why"]), found["remedy"], found["name"])
        return
    outside = pods_outside(facts["pod_routes"], settings["pod_cidrs"], facts["last_pod_cidrs"])
    if outside:
        prefixes = _some(["%s (%s)" % (item["prefix"], item["device"]) for item in outside])
        if follows:
            yield finding(
                "warning", "pod CIDRs", node, "pods of this node have addresses that are not (yet) in what mesh_pod_source found: %s: "
                "until they are, these pods reach those of other nodes in clear, and with mesh_strict not at all" % prefixes,
                "if they are new, run the playbook reconcile; else see whether %s is the right mesh_pod_source" % settings["pod_source"],
                outside[0]["prefix"])
            return
        yield finding("error", "pod CIDRs", node, "the CNI gives pods of this node addresses that are not in its pod CIDRs %s: %s" % (
            ", ".join(settings["pod_cidrs"]) or "(it has none)", prefixes),
            "name the prefixes that its pods really use (mesh_pod_cidrs, mesh_pod_cidrs_query), or let the CNI use those of the Node "
            "object: peers drop packets from other addresses", outside[0]["prefix"])
    elif "calico-ipam" in facts["cni"]["ipams"] and not follows:
        # A pool for each node, named in mesh_pod_cidrs, is the one way in which this can go well; then the blocks seen lie inside.
        inside = bool(facts["pod_routes"] and settings["pod_cidrs"])
        yield finding(
            "warning" if inside else "error", "pod CIDRs", node,
            "Calico's IPAM gives pods addresses from blocks that come and go, whatever the Node object says%s: peers drop packets of pods "
            "outside of the pod CIDRs of the mesh" % ("; those in use now are in the pod CIDRs" if inside else ""),
            "use Calico's own WireGuard (wireguardEnabled: true in the FelixConfiguration), which follows the blocks; or mesh_pod_source: "
            "calico_ipam, which has to follow them by agents or runs of reconcile; or host-local IPAM with the pod CIDRs of the nodes "
            "(subnet: usePodCidr); or an IPPool for each node, named in mesh_pod_cidrs", "calico-ipam")


def pods_outside(pod_routes, pod_cidrs, last_pod_cidrs=()):
    """Those of ``pod_routes`` that lie outside the pod CIDRs of their family; none where a family has no pod CIDR, unless they lie in
    ``last_pod_cidrs``: peers would not take packets any more that they take now."""
    cidrs, last = [ipaddress.ip_network(text) for text in pod_cidrs], [ipaddress.ip_network(text) for text in last_pod_cidrs]
    outside = []
    for item in pod_routes:
        prefix = ipaddress.ip_network(item["prefix"], strict=False)
        now, before = ([cidr for cidr in some if cidr.version == prefix.version] for some in (cidrs, last))
        judged = now or any(prefix.subnet_of(cidr) for cidr in before)
        if judged and not any(prefix.subnet_of(cidr) for cidr in now):
            outside.append(item)
    return outside


def device_findings(facts, settings):
    """Devices with our names that are none of ours, and our tables and rules in use by others."""
    node = settings["node"]
    for link in facts["links"]:
        if not is_generation(link["name"], settings["interface"] + "0"):
            continue
        if link["name"] not in facts["wg_devices"]:
            yield finding("error", "device", node, "device %s is there and is no WireGuard device (%s)" % (
                link["name"], link["kind"] or "unknown kind"),
                "remove it, or set mesh_interface to a name that nothing else uses", link["name"])
        elif not facts["mesh_document"]:
            yield finding("error", "device", node, "the WireGuard device %s is there, but this node has no mesh document, so it is not ours"
                          % link["name"], "remove it, or set mesh_interface to a name that nothing else uses", link["name"])


def port_findings(facts, settings):
    """UDP ports of the mesh that something else has."""
    node = settings["node"]
    ours = {device["listen_port"] for name, device in facts["wg_devices"].items() if is_generation(name, settings["interface"] + "0")}
    others = {device["listen_port"]: "the WireGuard device %s" % name for name, device in facts["wg_devices"].items()
              if not is_generation(name, settings["interface"] + "0")}
    others.update({link["udp_port"]: "the %s device %s" % (link["kind"], link["name"]) for link in facts["links"] if link["udp_port"]})
    for held in facts["udp"]:
        port = held["port"]
        if port in ours or port in facts["responder_ports"]:
            continue
        holder = others.get(port) or held["holder"] or "a socket of the kernel"
        yield finding("error", "port", node, "UDP port %d is taken by %s" % (port, holder),
                      "stop that, or set mesh_port so that it and the next one are free on all nodes", port)


def rule_findings(facts, settings):
    """Policy rules and routes that collide with ours, or that come before them."""
    node, first = settings["node"], settings["rule_priority"]
    tables = (settings["table"], settings["table"] + 1)
    for item in facts["rules"]:
        text = rule_text(item)
        ours = _is_our_rule(item, settings)
        if ours:
            continue
        if first <= item.get("priority", 0) < first + PRIORITIES:
            yield finding("error", "rules", node, "another rule has a priority of the mesh: %s" % text,
                          "set mesh_rule_priority so that it and the next two are free", text)
        elif str(item.get("table")) in map(str, tables):
            yield finding("error", "rules", node, "another rule uses table %s of the mesh: %s" % (item["table"], text),
                          "set mesh_table so that it and the next one are free", text)
        elif item.get("priority", 0) < first:
            yield from _earlier_rule(item, text, facts, settings)
    for table in tables:
        foreign = [route for route in facts["routes"].get(str(table), []) if not _is_our_route(route, settings)]
        if foreign:
            yield finding("error", "tables", node, "table %d holds routes of others: %s" % (
                table, _some(["%s dev %s" % (route["dst"], route["device"]) for route in foreign])),
                "set mesh_table so that it and the next one are free", table)


def _is_our_rule(item, settings):
    rule = rule_from_ip({name: value for name, value in item.items() if name != "family"}, item["family"])
    return (rule is not None and not rule["foreign"] and rule["table"] in (settings["table"], settings["table"] + 1)
            and settings["rule_priority"] <= rule["priority"] < settings["rule_priority"] + PRIORITIES)


def _is_our_route(route, settings):
    return is_generation(route["device"], settings["interface"] + "0") or route["type"] in ("unreachable", "7", "throw", "9")


def _earlier_rule(item, text, facts, settings):
    """A rule that the kernel looks at before ours: does it take what the mesh should have?"""
    if str(item.get("table")) == str(LOCAL_TABLE) or "l3mdev" in item or "goto" in item:
        return
    if ("fwmark" in item and "not" not in item) or any(name in item for name in _PARTS):
        return  # it takes a part of the traffic that somebody chose
    source = None
    if item.get("src", "all") != "all":
        source = "%s/%s" % (item["src"], item.get("srclen", 32 if item["family"] == "ipv4" else 128))
    if source is not None and not _overlaps(source, settings["pod_cidrs"] + settings["node_addresses"]):
        return
    routes = facts["routes"].get(str(item.get("table")), [])
    takes_all = str(item.get("table")) == str(MAIN_TABLE) or any(route["dst"] == "default" for route in routes)
    remedy = "set mesh_rule_priority below %d, or remove that rule" % item.get("priority", 0)
    if takes_all or "table" not in item:
        yield finding("error", "rules", settings["node"], "a rule before those of the mesh decides about its traffic: %s" % text,
                      remedy, text)
    elif routes:
        yield finding("warning", "rules", settings["node"], "a rule before those of the mesh may decide about its traffic: %s (%s)" % (
            text, _some([route["dst"] for route in routes])), remedy, text)


def _overlaps(prefix, others):
    network = ipaddress.ip_network(prefix, strict=False)
    return any(network.overlaps(other) for other in map(ipaddress.ip_network, others) if other.version == network.version)


def rule_text(item):
    """One object of ``ip -j -N rule`` as people write it."""
    words = ["priority", str(item.get("priority", 0))] + (["not"] if "not" in item else [])
    words += ["from", item.get("src", "all") + ("/%s" % item["srclen"] if "srclen" in item else "")]
    if "dst" in item:
        words += ["to", item["dst"] + ("/%s" % item["dstlen"] if "dstlen" in item else "")]
    for name in ("iif", "oif", "ipproto", "sport", "dport"):
        if name in item:
            words += [name, str(item[name])]
    if "fwmark" in item:
        words += ["fwmark", str(item["fwmark"]) + ("/%s" % item["fwmask"] if "fwmask" in item else "")]
    if "table" in item:
        words += ["lookup", str(item["table"])]
    if "suppress_prefixlen" in item:
        words += ["suppress_prefixlength", str(item["suppress_prefixlen"])]
    return ("ip -6 rule: " if item["family"] == "ipv6" else "ip rule: ") + " ".join(words)


def mark_findings(facts, settings):
    """Our mark in the rules of others."""
    mark, node = settings["fwmark"], settings["node"]
    for item in facts["rules"]:
        if "fwmark" in item and not _is_our_rule(item, settings):
            value = int(str(item["fwmark"]), 0)
            mask = int(str(item.get("fwmask", "0xffffffff")), 0)
            if value & mask & mark:
                yield finding("warning", "mark", node, "the mark 0x%x of the mesh is used by %s" % (mark, rule_text(item)),
                              "set mesh_fwmark to a bit that nothing else uses", "0x%x" % mark)
    uses = [line for line in facts["marks"] if uses_mark(line, mark)]
    if uses:
        # what sets our bit on packets of others takes them out of the mesh, if it encrypts between nodes
        worst = settings["encrypt"] == "nodes" and any(sets_mark(line) for line in uses)
        yield finding("error" if worst else "warning", "mark", node, "the mark 0x%x of the mesh is used by %d firewall rules: %s" % (
            mark, len(uses), shown(uses[0], 100)), "set mesh_fwmark to a bit that nothing else uses", "0x%x" % mark)


def uses_mark(line, mark):
    """Whether a line of a ruleset sets or looks for a mark that has a bit of ours.

    A number with most bits set is a mask that keeps other bits (``and 0xffffbfff``), not a mark.
    """
    for value, mask in _MARK.findall(line.lower()):
        number = int(value, 16)
        if number & mark & (int(mask, 16) if mask else number) and bin(number).count("1") <= 16:
            return True
    return False


def sets_mark(line):
    """Whether a line of a ruleset (nft, iptables-save) changes marks rather than looking for them."""
    return "mark set" in line or "--set-" in line or "--or-mark" in line or "-j MARK" in line


def address_findings(facts, settings):
    """Whether this is the node that the Node object describes."""
    here = {item["address"] for item in facts["addresses"] if not is_generation(item["device"], settings["interface"] + "0")}
    wanted = settings["node_addresses"]
    if wanted and not here & set(wanted):
        yield finding("error", "addresses", settings["node"], "none of the addresses %s of the Node object is on this host" % (
            ", ".join(wanted)), "see that mesh_node_name of this host is the name of its own Node object", wanted[0])


def agent_findings(facts, settings):
    """What the node agent could not read, where there shall be one: it is installed last, when all else was changed."""
    wanted, node = settings["agent"], settings["node"]
    if wanted is None:
        return
    if wanted["token_given"] and wanted["paths"]["token_file"]:
        yield finding("error", "agent", node, "mesh_agent_token and mesh_agent_token_file are both set", "leave one of them out",
                      wanted["paths"]["token_file"])
    for fault in input_faults(facts["agent"], wanted["paths"], wanted["token_given"], agent_as_root(facts, settings), "mesh_agent_"):
        yield finding("error", "agent", node, fault["message"], fault["remedy"], fault["value"])


def agent_as_root(facts, settings):
    """Whether the agent will be root, because what this run makes or keeps is a userspace implementation's device.

    A device that is there counts for what it is. A rotation makes one beside it, which may be the kernel's where the one that goes is not:
    only the module that installs the agent sees that.
    """
    kinds = [link["kind"] for link in facts["links"] if is_generation(link["name"], settings["interface"] + "0")]
    # Where neither is there, nothing is made, and a finding of its own says so.
    able = "userspace" if facts["wireguard"]["userspace"] and not facts["wireguard"]["kernel"] else "kernel"
    return "userspace" in [decided_implementation(settings["implementation"], kind) or able for kind in kinds or [""]]


# --- between nodes -------------------------------------------------------------------------------------------------------------------

def underlay_findings(settings, targets, verdicts, results):
    """What lies between this node and the others.

    :param targets: list of {"name", "address", "ports": [two ports], "judged": bool: whether its ports were asked}.
    :param verdicts: {name: {port: "open"|"closed"|"held"}} of `_underlay.judge`, of those that were asked.
    :param results: `_underlay.UnderlaySchedule.results`.
    """
    node = settings["node"]
    judged = [target for target in targets if target["judged"]]
    silent = [target for target in judged if "open" not in verdicts[target["name"]].values()]
    if len(judged) > 1 and len(silent) == len(judged):
        yield finding("error", "reach", node, "none of the %d other nodes answers on UDP ports %s: %s" % (
            len(judged), _ports(judged[0]["ports"]), _some(["%s (%s)" % (target["name"], target["address"]) for target in silent])),
            "let UDP through the firewall of this node, and between the nodes, in both directions", _ports(judged[0]["ports"]))
    else:
        yield from _closed_ports(node, judged, verdicts, results)
    yield from _mtu_findings(settings, targets, results)


def _closed_ports(node, judged, verdicts, results):
    closed = []
    for target in judged:
        ports = [port for port in target["ports"] if verdicts[target["name"]][port] == "closed"]
        if ports:
            closed.append((target, ports))
    for target, ports in closed[:LISTED]:
        # generation 1 is needed at the first rotation of keys only
        level = "error" if target["ports"][0] in ports else "warning"
        errors = [text for key, text in sorted(results[target["name"]]["errors"].items()) if key[1] in ports]
        yield finding(level, "reach", node, "no answer from %s at %s, UDP port %s%s" % (
            target["name"], target["address"], _ports(ports), " (%s)" % errors[0] if errors else ""),
            "let UDP ports %s in through the firewall of %s, and through what lies between (security groups, firewalld, nftables)%s" % (
                _ports(target["ports"]), target["name"], "" if level == "error" else "; the second port is needed for rotations"),
            "%s:%s" % (target["address"], _ports(ports)))
    if len(closed) > LISTED:
        yield finding("error", "reach", node, "%d more nodes do not answer: %s" % (
            len(closed) - LISTED, _some([target["name"] for target, dummy in closed[LISTED:]])),
            "let the UDP ports of the mesh through all firewalls", len(closed))


def least_path_mtus(targets, results):
    """-> {family: (bytes, name of the target)} of the narrowest way of each family that was measured."""
    found = {}
    for target in targets:
        size = results[target["name"]]["path_mtu"]
        if size is not None:
            family = family_of(target["address"])
            found[family] = min(found.get(family, (size, target["name"])), (size, target["name"]))
    return found


def _mtu_findings(settings, targets, results):
    node = settings["node"]
    for family, (size, name) in sorted(least_path_mtus(targets, results).items()):
        room = size - OVERHEAD[family]
        if room < MTU_MIN_IPV6:
            yield finding("error", "mtu", node, "the way to %s carries packets of %d bytes, which leaves %d for the mesh; IPv6, which the "
                          "probes use as well, needs %d" % (name, size, room, MTU_MIN_IPV6),
                          "raise the MTU of the network to at least %d bytes" % (MTU_MIN_IPV6 + OVERHEAD[family]), size)
        elif settings["mtu"] and settings["mtu"] > room:
            yield finding("error", "mtu", node, "mesh_mtu is %d, but the way to %s carries packets of %d bytes, which leaves %d" % (
                settings["mtu"], name, size, room), "set mesh_mtu to auto or to at most %d" % room, settings["mtu"])
    lost = [target for target in targets if results[target["name"]]["reached"] and results[target["name"]]["path_mtu"] is None]
    if lost:
        yield finding("error", "mtu", node, "small packets reach these nodes and bigger ones do not: %s" % _some(
            [target["name"] for target in lost]), "find what drops them between the nodes (fragments, MTU of a switch or a tunnel)",
            len(lost))


def _ports(ports):
    return " and ".join(map(str, ports))


def _some(texts):
    """The first of a list, and how many more there are."""
    rest = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (" and %d more" % rest if rest > 0 else "")


# --- one table for people ------------------------------------------------------------------------------------------------------------

def grouped(found):
    """Findings of all nodes -> list of (finding, [nodes]): what several nodes have in common is one line. Errors first."""
    groups = {}
    for item in found:
        key = (LEVELS.index(item["level"]), item["check"], item["message"], item["remedy"])
        groups.setdefault(key, (item, []))[1].append(item["node"])
    return [(groups[key][0], sorted(set(groups[key][1]))) for key in sorted(groups)]


def findings_table(found, width=120):
    """Findings of all nodes as lines of text: one table, errors first, each with what to do about it."""
    if not found:
        return ["no findings"]
    rows = [("LEVEL", "CHECK", "NODES", "FINDING")]
    for item, nodes in grouped(found):
        names = _some(nodes) if len(nodes) > 1 or nodes[0] else "(all)"
        rows.append((item["level"], item["check"], names, item["message"] + "\n-> " + item["remedy"]))
    limits = (8, 12, 24)
    widths = [min(limit, max(len(row[column]) for row in rows)) for column, limit in enumerate(limits)]
    widths.append(max(30, width - sum(widths) - 2 * len(widths)))
    lines = []
    for row in rows:
        for parts in itertools.zip_longest(*(_wrapped(cell, size) for cell, size in zip(row, widths)), fillvalue=""):
            lines.append("  ".join(part.ljust(size) for part, size in zip(parts, widths)).rstrip())
    levels = [item["level"] for item, dummy in grouped(found)]
    lines.append(", ".join("%d %s%s" % (levels.count(level), level, "" if levels.count(level) == 1 else "s") for level in LEVELS))
    return lines


def _wrapped(text, width):
    """The lines of a cell; what continues a remedy is indented under it."""
    lines = []
    for part in text.split("\n"):
        lines += textwrap.wrap(part, width, subsequent_indent="   " if part.startswith("->") else "") or [""]
    return lines
