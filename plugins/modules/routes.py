#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: routes
short_description: The mesh's routing tables and policy rules
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Fills two routing tables with the routes to the peers of this node, and adds or deletes the policy rules that make the node use
    them, live and for the next boot.
  - Table O(table) holds the pod CIDRs of every proven peer, the next table their node addresses. Both are complete before any rule points
    to them, so that what moves the traffic of a node is the addition or deletion of a rule.
  - Routes change one by one; a route or rule that stays is not touched.
  - With O(send=true) the kernel is asked afterwards which way it takes to each prefix, from this host and from its pods. The task fails
    where that is not the mesh.
  - Connections whose source is masqueraded are carried over to the new device. The kernel by itself drops a packet of each of them
    and forgets it. No packet is lost where the kernel has nf_tables and connection tracking zones, as those of all distributions have.
    Elsewhere a packet that is not TCP may be, and the task warns; so may one of a connection that is in a zone of somebody else's, or that
    begins at the very moment of the switch.
  - Only the tables O(table) and the next, and rules that point to them, are looked at. Routes and rules of others stay as they are.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._mesh_document
  - kubemesh.wireguard._mesh_document.generation
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  state:
    description:
      - With V(present) the tables are filled, and the rules follow O(send).
      - With V(absent) the rules, then the routes, then the files that restore them are removed.
    type: str
    choices:
      - present
      - absent
    default: present
  send:
    description:
      - Whether this node sends through the mesh, that is, whether the rules exist.
      - With V(false) the tables are filled and not used.
    type: bool
    default: false
  interface:
    description:
      - Mesh device that the routes point to.
    type: str
    default: wgmesh0
  peers:
    description:
      - Which peers get routes. V(proven) are those that M(kubemesh.wireguard.probe) reached through the tunnel, see O(proof_file).
        In check mode every peer counts as proven where there is no proof yet.
      - V(all) is every peer of the mesh document.
    type: str
    choices:
      - proven
      - all
    default: proven
  unproven:
    description:
      - What becomes of the routes of a peer that has some and is not proven now.
      - V(keep) leaves them, as the peer may only be away. V(drop) removes them, and the traffic takes the way of the CNI again.
    type: str
    choices:
      - keep
      - drop
    default: keep
  proof_file:
    description:
      - Where M(kubemesh.wireguard.probe) left its result on this node.
      - The default is C(/run/kubemesh/proof-INTERFACE.json).
    type: path
  table:
    description:
      - Routing table of the pod CIDRs. The next one holds the node addresses.
      - The default is outside of what kube-proxy, Calico (1 to 250), Cilium, AWS VPC CNI, Tailscale and wg-quick use.
    type: int
    default: 51840
  rule_priority:
    description:
      - Priority of the first rule; the next two are used as well.
    type: int
    default: 400
  fwmark:
    description:
      - Mark on the packets of WireGuard itself, which must not match O(encrypt=nodes).
    type: int
    default: 4096
  encrypt:
    description:
      - V(pods) steers what goes to pods, and what comes from local pods and goes to nodes.
      - V(nodes) steers what goes from node to node as well.
    type: str
    choices:
      - pods
      - nodes
    default: pods
  sources:
    description:
      - Whose packets the rules steer. V(all) is everybody's, whatever the source.
      - V(known) leaves those to the way of the CNI that come from pods of this node whose addresses are in no prefix of the mesh document
        yet. No peer would accept them from the tunnel. What comes from this host, from its prefixes in the document, and from other hosts
        by the devices of its addresses is steered.
      - For clusters where prefixes follow the pods and pods may be reached outside the tunnel. With M(kubemesh.wireguard.guard) take
        V(all).
    type: str
    choices:
      - all
      - known
    default: all
  confirm_timeout:
    description:
      - Seconds after which this node by itself takes a change of its rules back that touches what goes from node to node, unless the
        change is confirmed by then. V(0) is no such safeguard.
      - A change that waits to be confirmed is not written to disk. Running the module again with the same arguments and without this one
        confirms it, and writes.
      - Needs systemd.
    type: int
    default: 0
  confirm:
    description:
      - Whether this task is that confirmation. It fails where the node has taken the change back in the meantime.
    type: bool
    default: false
  exempt_cidrs:
    description:
      - Node addresses in these prefixes are not reached through the mesh.
      - A prefix of every address there is, such as V(0.0.0.0/0), is refused.
    type: list
    elements: str
    default: []
  persist:
    description:
      - Whether the routes and rules are brought back at boot, by C(kubemesh-routes.service).
    type: bool
    default: true
seealso:
  - module: kubemesh.wireguard.interface
  - module: kubemesh.wireguard.probe
"""

EXAMPLES = r"""
- name: Fill the tables, without using them
  kubemesh.wireguard.routes:
    node: worker-1

- name: Send through the mesh
  kubemesh.wireguard.routes:
    node: worker-1
    send: true

- name: Send node to node as well, to be confirmed within half a minute
  kubemesh.wireguard.routes:
    node: worker-1
    send: true
    encrypt: nodes
    confirm_timeout: 30

- name: Confirm it
  kubemesh.wireguard.routes:
    node: worker-1
    send: true
    encrypt: nodes
    confirm: true

- name: Send through the mesh, but what comes from pods that are not known yet
  kubemesh.wireguard.routes:
    node: worker-1
    send: true
    sources: known

- name: Back to the way of the CNI, nothing left behind
  kubemesh.wireguard.routes:
    state: absent
"""

RETURN = r"""
was_sending:
  description: Whether the rules existed before this task.
  returned: always, also when the task fails after reading them
  type: bool
  sample: false
sending:
  description: Whether the rules exist after this task.
  returned: always
  type: bool
  sample: true
armed:
  description: Whether this node takes the change back unless it is confirmed.
  returned: always
  type: bool
  sample: false
routed_peers:
  description: Number of peers that have routes after this task.
  returned: always
  type: int
  sample: 4
unrouted_peers:
  description: Peers of the mesh document that have pod CIDRs or addresses and no routes, at most 50 of them.
  returned: always
  type: list
  elements: str
  sample: ["worker-7"]
kept_peers:
  description: Peers that are not proven now and keep the routes they have, at most 50 of them.
  returned: always
  type: list
  elements: str
  sample: []
carried_connections:
  description: Number of masqueraded connections that were carried over to another device.
  returned: always
  type: int
  sample: 12
steps:
  description: What was done, or would be done in check mode, in this order; at most 200 lines.
  returned: always
  type: list
  elements: str
  sample: ["add rule priority 400 from all lookup 51840"]
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _confirm
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._fib_split import split_local_table
from ansible_collections.kubemesh.wireguard.plugins.module_utils._interface import underlay_devices
from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import generations_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, local_pod_cidrs, node_entry
from ansible_collections.kubemesh.wireguard.plugins.module_utils._persist import SYSCTL_FILE
from ansible_collections.kubemesh.wireguard.plugins.module_utils._probe import proven_names, read_proof
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import (
    System,
    apply_file_step,
    plan_files,
    read_document,
    read_text,
    remove_empty_folders,
)

# Items; results must stay small at 5,000 nodes, the node has the rest.
NAMES_SHOWN = 50
STEPS_SHOWN = 200


def proven_peers(params, doc, check_mode):
    """Names that the last probe of this node proved, or None where every peer counts."""
    path = params["proof_file"] or "/run/kubemesh/proof-%s.json" % params["interface"]
    if params["peers"] == "all" or (check_mode and read_text(path) is None):
        return None
    proof = read_proof(path)
    if proof is None:
        raise MeshError("proof_file: %s is not there or damaged; run kubemesh.wireguard.probe on this node, or take peers=all" % path)
    proven = proven_names(proof, doc, params["generation"])
    if check_mode:
        # A peer that the last probe did not know would be probed before a real run gets here.
        key = str(params["generation"])
        proven |= {name for name, entry in doc["nodes"].items()
                   if key in entry["public_keys"] and (proof["peers"].get(name) or {}).get("public_key") != entry["public_keys"][key]}
    return proven


def wanted_of(system, params, stored, check_mode):
    """(wanted state, document or None, proven peers or None) for the arguments of a task."""
    if params["state"] == "absent":
        return {"routes": [], "rules": []}, None, None
    if not params["node"]:
        raise MeshError("node: the name of this host in the mesh document is needed for state=present")
    names = ("interface", "table", "rule_priority", "fwmark", "encrypt", "send", "unproven", "exempt_cidrs")
    settings = dict({key: params[key] for key in names}, iifs=[], own_cidrs=None)
    plan.check_settings(settings)
    doc = read_document(params["document_file"])
    entry = node_entry(doc, params["node"])
    if params["sources"] == "known":
        settings["iifs"] = incoming_devices(system, doc, entry, params)
    proven = proven_peers(params, doc, check_mode)
    return plan.wanted_state(doc, params["node"], settings, proven, stored), doc, proven


def incoming_devices(system, doc, entry, params):
    """Devices by which packets come in that are no pod's: the node itself, those of its addresses and to its peers, and the mesh's."""
    endpoints = [endpoint["address"] for name, other in doc["nodes"].items() if name != params["node"]
                 for endpoint in other["endpoints"].values()]
    underlay = underlay_devices(system, entry["node_addresses"], endpoints, params["interface"], params["fwmark"])
    return ["lo"] + underlay + list(generations_of(params["interface"]))


def step_text(step):
    """One step for people."""
    verbs = {"replace_route": "set route", "remove_route": "remove route", "add_rule": "add rule", "remove_rule": "remove rule"}
    if "route" in step:
        return "%s %s" % (verbs[step["op"]], plan.route_text(step["route"]))
    if "rule" in step:
        return "%s %s%s" % (verbs[step["op"]], plan.rule_text(step["rule"]), " (IPv6)" if step["rule"]["family"] == "ipv6" else "")
    return "%s %s" % (step["op"].replace("_", " "), step["path"] if "path" in step else step["unit"])


def unit_steps(system, wanted_enabled, file_steps):
    """What systemd must be told."""
    unit_changes = any(step["path"] == live.ROUTES_UNIT_FILE for step in file_steps)
    if not unit_changes and system.unit(live.ROUTES_UNIT)["enabled"] == wanted_enabled:
        return []
    return [{"op": "enable_unit" if wanted_enabled else "disable_unit", "unit": live.ROUTES_UNIT}]


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "send": {"type": "bool", "default": False},
            "interface": {"type": "str", "default": "wgmesh0"},
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "generation": {"type": "int", "choices": [0, 1], "default": 0},
            "peers": {"type": "str", "choices": ["proven", "all"], "default": "proven"},
            "unproven": {"type": "str", "choices": ["keep", "drop"], "default": "keep"},
            "proof_file": {"type": "path"},
            "table": {"type": "int", "default": 51840},
            "rule_priority": {"type": "int", "default": 400},
            "fwmark": {"type": "int", "default": 4096},
            "encrypt": {"type": "str", "choices": ["pods", "nodes"], "default": "pods"},
            "sources": {"type": "str", "choices": ["all", "known"], "default": "all"},
            "confirm_timeout": {"type": "int", "default": 0},
            "confirm": {"type": "bool", "default": False},
            "exempt_cidrs": {"type": "list", "elements": "str", "default": []},
            "persist": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    known = {}
    try:
        module.exit_json(**converge(module, System(module), known))
    except MeshError as exc:
        module.fail_json(msg=str(exc), **known)


def converge(module, system, known):
    """Read, plan, apply, report: the result of the module; ``known`` is given what a failed task must say as well."""
    params = module.params
    # First of all: whatever fails below, who reads the failure must know whether this node sent before.
    current = live.read_state(system, params["table"])
    known["was_sending"] = bool(current["rules"])
    if params["confirm_timeout"]:
        _confirm.check_timeout(params["confirm_timeout"])
    if not module.check_mode:
        # Being here is the confirmation of whatever was armed: somebody reaches this node.
        taken_back = _confirm.disarm(system)
        if taken_back:
            current = live.read_state(system, params["table"])
        if params["confirm"] and taken_back:
            raise MeshError("encrypt: this node was not confirmed within mesh_confirm_timeout and took its rules back; what happened to "
                            "the way by which it is administered? It sends as it did before this run")
    stored = live.stored_routes()
    wanted, doc, proven = wanted_of(system, params, stored, module.check_mode)
    steps = plan.plan_routes(current, wanted)
    boot = wanted if params["persist"] else {"routes": [], "rules": []}
    armed = bool(params["confirm_timeout"]) and _confirm.must_be_armed(steps)
    file_steps = plan_files(live.wanted_files(boot, params["interface"], SYSCTL_FILE))
    units = unit_steps(system, bool(boot["routes"] or boot["rules"]), file_steps)

    carried = 0
    if not module.check_mode:
        if armed:
            # What is not confirmed is not there after a reboot.
            file_steps, units = [], []
            _confirm.arm(system, steps, params["confirm_timeout"])
        # Files first on the way in, last on the way out: a node that reboots in between comes back as it was, or as it shall be.
        on_the_way_out = params["state"] == "absent"
        if not on_the_way_out:
            apply_files(system, file_steps, units)
        split_local_table(system, any(step["op"] == "add_rule" and step["rule"]["family"] == "ipv4" for step in steps))
        carried = live.apply_live(system, current, wanted, steps)
        if wanted["rules"]:
            check_paths(system, wanted, doc, params)
        if on_the_way_out:
            apply_files(system, file_steps, units)
            remove_empty_folders(["/etc/kubemesh"])

    names = {(route["table"], route["dst"]): route["peer"] for route in stored + wanted["routes"]}
    routed = {route["peer"] for route in wanted["routes"]}
    result = {
        "changed": bool(steps or file_steps or units),
        "was_sending": bool(current["rules"]),
        "sending": bool(wanted["rules"]),
        "armed": armed,
        "routed_peers": len(routed),
        "unrouted_peers": [],
        "kept_peers": [],
        "carried_connections": carried,
        "steps": [step_text(step) for step in (steps + file_steps + units)[:STEPS_SHOWN]],
    }
    if doc is not None:
        expected = {peer for entries in plan.table_routes(doc, params["node"]).values() for dummy, peer in entries}
        result["unrouted_peers"] = sorted(expected - routed)[:NAMES_SHOWN]
        if proven is not None:
            result["kept_peers"] = sorted(routed - proven)[:NAMES_SHOWN]
    if module._diff:
        result["diff"] = [{
            "before_header": "routes and rules in the kernel", "after_header": "routes and rules in the kernel",
            "before": plan.state_as_text(current, names), "after": plan.state_as_text(wanted, names),
        }] + [{
            "before_header": step["path"], "after_header": step["path"], "before": step["before"] or "", "after": step.get("after", ""),
        } for step in file_steps]
    return result


def check_paths(system, wanted, doc, params):
    """Raise MeshError where the kernel would send to a routed prefix by another way, from this host or from its pods."""
    wrong = live.wrong_paths(system, wanted, local_pod_cidrs(doc, params["node"]))
    if wrong:
        raise MeshError(
            "the rules are in place, but the kernel sends elsewhere: %s; another rule or table comes first, look at `ip rule` and "
            "set mesh_rule_priority (now %d) below it" % ("; ".join(wrong[:10]), params["rule_priority"]))


def apply_files(system, file_steps, units):
    """Write or remove the files of the boot, and tell systemd."""
    if units and units[0]["op"] == "disable_unit":
        system.run(["systemctl", "disable", "--now", units[0]["unit"]])
    for step in file_steps:
        apply_file_step(step)
    if units:
        system.run(["systemctl", "daemon-reload"])
        if units[0]["op"] == "enable_unit":
            system.run(["systemctl", "enable", units[0]["unit"]])


if __name__ == "__main__":
    main()
