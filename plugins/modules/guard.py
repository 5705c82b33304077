#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guard
short_description: Drop what should be in the tunnel and is not
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Strict mode, fail closed. A table of nftables drops and counts every packet that M(kubemesh.wireguard.routes) sends through the mesh, or
    that the peers do, when it takes another way. It holds from boot on, before there is a network.
  - With O(encrypt=pods) that is what goes to pods of other nodes or comes from them, and what goes between pods of this node and addresses
    of other nodes. With O(encrypt=nodes) it is also what goes from node to node. Packets of this host and forwarded ones count alike, and
    so do those that the CNI would put into VXLAN or IPIP, as the packet inside is looked at before.
  - Traffic within this node is never touched, nor what leaves the cluster, multicast, and what goes to nodes that are excluded from
    the mesh.
  - The table is C(inet kubemesh_guard). Tables of others are not looked at. It is replaced in one transaction, or changed element by
    element where only nodes came or went; its counters go on counting.
  - Between nodes, four things may pass outside the tunnel. WireGuard's own packets; IPv6 neighbour discovery; O(admin_ports); and the
    messages that a packet of WireGuard is too big (ICMP fragmentation needed, ICMPv6 packet too big), as a node may lie on the way of
    the tunnel. Such messages about any other packet are dropped, as they quote it.
  - C(nftables.service) removes the tables of everybody when it starts, reloads or stops. A drop-in for it brings the guard back within
    milliseconds. What else flushes the tables, such as C(nft flush ruleset) by hand, is mended by the next run of this module.
  - Data paths that pass netfilter by (eBPF, flow tables, macvlan and ipvlan devices) pass the guard by as well.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._mesh_document
attributes:
  check_mode:
    support: full
    details:
      - The rules are loaded in a network namespace of their own, to find out whether this node takes them. No traffic meets them there.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - nftables 0.9.8 or newer, with JSON
  - unshare of util-linux
options:
  state:
    description:
      - With V(present) the guard is in force. This node should send through the mesh, to peers that were proven; it is cut off from
        others.
      - With V(absent) the table and the files that restore it are removed.
    type: str
    choices:
      - present
      - absent
    default: present
  encrypt:
    description:
      - What must be in the tunnel; the same as for M(kubemesh.wireguard.routes).
      - V(pods) is what goes to pods of other nodes or comes from them, and what goes between pods of this node and addresses of other
        nodes.
      - V(nodes) is what goes from node to node as well.
    type: str
    choices:
      - pods
      - nodes
    default: pods
  interfaces:
    description:
      - The mesh devices. What goes through them passes.
      - Both generations belong here, so that a rotation of keys needs no change; a device need not exist.
    type: list
    elements: str
    default:
      - wgmesh0
      - wgmesh1
  ports:
    description:
      - UDP ports of WireGuard's own packets.
      - The default is those of both generations in the mesh document, and those of endpoints that have a port of their own.
    type: list
    elements: int
  fwmark:
    description:
      - Mark on the packets of WireGuard itself. Only what has it, and comes from one of O(ports) or goes to one, may leave for
        another node. M(kubemesh.wireguard.preflight) marks what it measures with in the same way.
    type: int
    default: 4096
  exempt_nodes:
    description:
      - Nodes whose traffic may take any way, by name. On such a node itself nothing is dropped.
      - Names that are not in the mesh document are reported as a warning.
    type: list
    elements: str
    default: []
  exempt_cidrs:
    description:
      - Packets with either end in these prefixes may take any way, whether that is a node or a pod. Either end, so that the nodes at both
        ends of a packet judge it alike.
      - A node whose address is in here is only exempt with that address, not with its pods.
    type: list
    elements: str
    default: []
  admin_ports:
    description:
      - TCP ports that may be used between nodes outside the tunnel, as client and as server, so that a node can be reached by way of
        another when the mesh is broken. With O(encrypt=pods) nothing between nodes is dropped anyway.
    type: list
    elements: int
    default:
      - 22
  pod_networks:
    description:
      - The networks that the pods of the cluster have their addresses from. Everything in them is guarded but the pod CIDRs of this node
        and of nodes that are not guarded, and the addresses of nodes. So a node that joins is guarded from its first packet, before the
        mesh document has it. Without this option its pods are reached in clear until then.
      - Only for clusters in which the mesh document has all pod CIDRs of this node. Pods of this node with other addresses could not be
        reached any more.
    type: list
    elements: str
    default: []
  loosen:
    description:
      - Only let go, on the way to a guard that spares more or other packets. Nothing is dropped that was not before, and what the guard in
        force spares is spared as well as what the options say. Where there is no guard, none is made.
      - For the time in which packets change their way. Run the module without this option afterwards.
    type: bool
    default: false
  persist:
    description:
      - Whether the guard is there again at boot, by C(kubemesh-guard.service), and after C(nftables.service) flushed it.
    type: bool
    default: true
seealso:
  - module: kubemesh.wireguard.routes
  - module: kubemesh.wireguard.probe
  - module: kubemesh.wireguard.mesh_info
"""

EXAMPLES = r"""
- name: Nothing to or from pods of other nodes but through the mesh
  kubemesh.wireguard.guard:
    node: worker-1

- name: Nothing between nodes either; backups and one node may take any way
  kubemesh.wireguard.guard:
    node: worker-1
    encrypt: nodes
    exempt_cidrs:
      - 198.18.0.200/32
    exempt_nodes:
      - storage-1
    admin_ports:
      - 22
      - 6443

- name: Guard the nodes that are still to come as well
  kubemesh.wireguard.guard:
    node: worker-1
    pod_networks:
      - 10.244.0.0/16
      - fd00:10:244::/48

- name: Open the guard, nothing left behind
  kubemesh.wireguard.guard:
    state: absent
  register: guard

- name: Nothing was ever dropped
  ansible.builtin.assert:
    that: guard.counters.out_pods.packets == 0 and guard.counters.out_nodes.packets == 0
"""

RETURN = r"""
was_present:
  description: Whether there was a table of the guard before this task.
  returned: always
  type: bool
  sample: false
present:
  description: Whether the guard is in force after this task.
  returned: always
  type: bool
  sample: true
counters:
  description:
    - What was dropped since the guard came into force or the node was booted.
    - With O(state=absent), what it was in the end.
  returned: always
  type: dict
  contains:
    out_pods:
      description: To pods of other nodes, or from pods of this node to other nodes.
      type: dict
      sample: {"packets": 3, "bytes": 252}
    in_pods:
      description: From pods of other nodes, or from other nodes to pods of this node.
      type: dict
      sample: {"packets": 0, "bytes": 0}
    out_nodes:
      description: From this node to another.
      type: dict
      sample: {"packets": 0, "bytes": 0}
    in_nodes:
      description: From another node to this one.
      type: dict
      sample: {"packets": 0, "bytes": 0}
  sample:
    out_pods: {"packets": 3, "bytes": 252}
    in_pods: {"packets": 0, "bytes": 0}
    out_nodes: {"packets": 0, "bytes": 0}
    in_nodes: {"packets": 0, "bytes": 0}
guarded_nodes:
  description: Number of other nodes whose traffic is guarded.
  returned: always
  type: int
  sample: 4
exempt_nodes:
  description: Nodes of the mesh document that O(exempt_nodes) exempts, at most 50 of them.
  returned: always
  type: list
  elements: str
  sample: ["storage-1"]
steps:
  description: What was done, or would be done in check mode, in this order; at most 200 lines.
  returned: always
  type: list
  elements: str
  sample: ["add pods 10.244.5.0/24  # worker-5"]
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, plan_files, read_document, read_text

# Items; results must stay small at 5,000 nodes, the node has the rest.
NAMES_SHOWN = 50
STEPS_SHOWN = 200

SETTINGS = ("encrypt", "interfaces", "ports", "fwmark", "exempt_nodes", "exempt_cidrs", "admin_ports", "pod_networks")


def wanted_of(params, current):
    """What the guard shall hold, None where there shall be none."""
    if params["state"] == "absent" or (params["loosen"] and current is None):
        return None
    if not params["node"]:
        raise MeshError("node: the name of this host in the mesh document is needed for state=present")
    document, settings = read_document(params["document_file"]), {key: params[key] for key in SETTINGS}
    if params["loosen"]:
        return plan.loosened(current, document, params["node"], plan.joint_settings(settings_before(), settings))
    return plan.wanted_guard(document, params["node"], settings)


def settings_before():
    """The settings that the guard in force was made from, None where its file does not say."""
    try:
        return plan.settings_of(read_text(live.GUARD_FILE) or "")
    except MeshError:
        return None


def current_of(system, state):
    """The live table. A node that was never guarded needs no nft to be told so."""
    if state == "absent" and system.path("nft") is None and read_text(live.GUARD_FILE) is None:
        return None
    return live.read_table(system)


def converge(module, system):
    """Read, plan, apply, report: the result of the module."""
    params = module.params
    current = current_of(system, params["state"])
    wanted = wanted_of(params, current)
    text = plan.ruleset_text(wanted) if wanted else None
    reference = live.reference(system, text) if wanted else None
    names = dict(plan.names_in(read_text(live.GUARD_FILE) or ""), **plan.names_in(text or ""))
    steps = plan.plan_guard(current, reference)
    boot = text if params["persist"] else None
    if params["loosen"] and params["state"] == "present" and not steps:
        # As loose as it need be: its file may say the same in other words.
        boot = read_text(live.GUARD_FILE)
    file_steps = plan_files(live.wanted_files(system, boot))
    units = live.unit_steps(system, boot is not None, file_steps)

    counters = plan.counts_of(current)
    if not module.check_mode:
        # Files first both ways. A node that reboots in between is then guarded, or not, as it shall be: a guard that came back after its
        # mesh is gone would cut the node off.
        live.apply_files(system, file_steps, units)
        after = live.apply_steps(system, steps, wanted, reference)
        if steps and wanted:
            live.check_in_force(after, reference)
            counters = plan.counts_of(after)

    for warning in wanted["warnings"] if wanted else []:
        module.warn(warning)
    result = {
        "changed": bool(steps or file_steps or units),
        "was_present": current is not None,
        "present": wanted is not None,
        "counters": counters,
        "guarded_nodes": wanted["guarded"] if wanted else 0,
        "exempt_nodes": wanted["exempt"][:NAMES_SHOWN] if wanted else [],
        "steps": (file_texts(file_steps + units) + [line for step in steps for line in plan.describe(step, names)])[:STEPS_SHOWN],
    }
    if module._diff:
        result["diff"] = [{
            "before_header": "table inet %s" % plan.TABLE, "after_header": "table inet %s" % plan.TABLE,
            "before": plan.table_as_text(current, names), "after": plan.table_as_text(reference, names),
        }] + [{
            "before_header": step["path"], "after_header": step["path"], "before": step["before"] or "", "after": step.get("after", ""),
        } for step in file_steps]
    return result


def file_texts(steps):
    """Steps on files and units for people."""
    return ["%s %s" % (step["op"].replace("_", " "), step.get("path") or step["unit"]) for step in steps]


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "encrypt": {"type": "str", "choices": ["pods", "nodes"], "default": "pods"},
            "interfaces": {"type": "list", "elements": "str", "default": ["wgmesh0", "wgmesh1"]},
            "ports": {"type": "list", "elements": "int"},
            "fwmark": {"type": "int", "default": 4096},
            "exempt_nodes": {"type": "list", "elements": "str", "default": []},
            "exempt_cidrs": {"type": "list", "elements": "str", "default": []},
            "admin_ports": {"type": "list", "elements": "int", "default": [22]},
            "pod_networks": {"type": "list", "elements": "str", "default": []},
            "loosen": {"type": "bool", "default": False},
            "persist": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**converge(module, System(module)))
    except MeshError as exc:
        module.fail_json(msg=str(exc))


if __name__ == "__main__":
    main()
