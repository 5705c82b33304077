#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: mesh_info
short_description: The live mesh of a node joined with the mesh document
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Reads the WireGuard device, the routing tables and the rules of this node, and says for each peer by name what lies behind it and
    whether its traffic is encrypted.
  - Nothing is concluded from the document alone. A peer counts as encrypted when the device has it, its pod CIDRs have routes, the rule is
    there, and its last handshake is younger than 275 seconds.
  - Without O(node) the peers are left out.
  - An idle peer is not down. Run M(kubemesh.wireguard.probe) first, so that every tunnel has been used.
  - Private and preshared keys are neither returned nor read further than the kernel hands them out.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.info_module
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._mesh_document
options:
  interface:
    description:
      - Name of the mesh device of either generation, V(wgmesh0) or V(wgmesh1). Both are looked at.
    type: str
    default: wgmesh0
  generation:
    description:
      - The generation that RV(device) is about.
      - By default that of the mesh document, through which traffic goes, or V(0) where there is none.
    type: int
    choices: [0, 1]
  detail:
    description:
      - V(all) returns every peer, V(problems) those that are neither encrypted nor excluded, V(none) none. RV(counts) counts all of them.
      - With thousands of nodes, all peers of all nodes are more than anyone reads.
    type: str
    choices: [all, problems, none]
    default: all
  table:
    description:
      - Routing table of the pod CIDRs. The next one holds the node addresses.
    type: int
    default: 51840
  exempt_cidrs:
    description:
      - Node addresses in these prefixes are meant to be reached outside the mesh, as with O(kubemesh.wireguard.routes#module:exempt_cidrs).
        A peer of which nothing else is in clear counts as encrypted, and its C(reason) names them; one that has nothing else counts as
        excluded.
    type: list
    elements: str
    default: []
seealso:
  - module: kubemesh.wireguard.probe
"""

EXAMPLES = r"""
- name: Look at the mesh from this node
  kubemesh.wireguard.mesh_info:
    node: worker-1
  register: mesh

- name: Which mesh document and which generations of keys are here
  kubemesh.wireguard.mesh_info:
    detail: none
  register: here

- name: Every peer must be encrypted
  ansible.builtin.assert:
    that: mesh.counts.keys() | difference(['encrypted', 'excluded']) | length == 0
"""

RETURN = r"""
node:
  description: Name of this host in the mesh document.
  returned: always
  type: str
  sample: worker-1
exists:
  description: Whether there is a mesh on this node, that is a device or a mesh document.
  returned: always
  type: bool
  sample: true
device:
  description: The mesh device, without its peers; null where there is none.
  returned: always
  type: dict
  sample:
    name: wgmesh0
    implementation: kernel
    up: true
    mtu: 1440
    listen_port: 51840
    public_key: /Qy8SpRpuTC6U9jAOqhEPbnoJkMoF9QzyEqYFLrrhx0=
    addresses: [198.18.0.12/32]
document:
  description: Which mesh document this node keeps; null where there is none.
  returned: always
  type: dict
  sample:
    serial: 7
    generation: 0
    ports: {"0": 51840, "1": 51841}
    sha256: 5f4dcc3b5aa765d61d8327deb882cf992b95990a9151374abd8ff8c5a7a0fe08
generations:
  description:
    - What there is of each generation of keys, device, key file and its age in seconds, files that restore it at boot, number of routes
      through it, and the UDP port, the mark and the public key that the device has now (null where there is no device). More than one
      while keys are rotated.
  returned: always
  type: list
  elements: dict
  sample:
    - generation: 0
      name: wgmesh0
      device: true
      key: true
      key_age: 86400
      preshared_keys: false
      boot: true
      routes: 8
      listen_port: 51840
      fwmark: 4096
      public_key: 3oyfWcA0BzSzFxyAG0tXnBEnzTcFVwJ0TCyKkS2qzVo=
restored:
  description:
    - What files of the mesh restore at boot, whatever O(interface) and O(table) say. A mesh that was made with other settings is found by
      it.
  returned: always
  type: dict
  contains:
    devices:
      description: Names of mesh devices.
      type: list
      elements: str
      sample: [wgmesh0]
    table:
      description: The first routing table, null where no rules are restored.
      type: int
      sample: 51840
rule_fwmark:
  description: The mark that the rule for traffic between nodes spares, null where there is no such rule.
  returned: always
  type: int
  sample: 4096
encrypts:
  description: What this node sends through the mesh, V(pods), V(nodes) (node to node as well) or V(nothing).
  returned: always
  type: str
  sample: pods
ipv6:
  description: Whether the kernel of this node has IPv6. Without it, the node answers no echo, and tunnels can be judged by handshakes only.
  returned: always
  type: bool
  sample: true
guard:
  description: Strict mode on this node.
  returned: always
  type: dict
  contains:
    present:
      description: Whether there is a guard.
      type: bool
      sample: true
    in_force:
      description:
        - Whether it is what it should be.
        - V(null) with O(detail=none) and without O(node), where it is not compared.
      type: bool
      sample: true
    at_boot:
      description: Whether it is there again after the next boot.
      type: bool
      sample: true
    reason:
      description: What is wrong with it.
      type: str
      sample: ""
    counters:
      description: What was dropped, as M(kubemesh.wireguard.guard) returns it.
      type: dict
      sample: {"out_pods": {"packets": 0, "bytes": 0}}
    exempt_cidrs:
      description: Node addresses in these prefixes may be reached outside the tunnel.
      type: list
      elements: str
      sample: []
sending:
  description: Whether this node sends through the mesh.
  returned: always
  type: bool
  sample: true
counts:
  description: Number of peers in each state that occurs.
  returned: always
  type: dict
  sample:
    encrypted: 2
peers:
  description: One entry for each other node of the mesh document, and for each peer of the device that is not in it.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the node.
      type: str
      sample: worker-2
    public_key:
      description: Its public key.
      type: str
      sample: 3i2tVSxJ5Fj1ZJ/GTP3F6gFBHMKUmQmjXnTGWUjSyVU=
    endpoint:
      description: Where the device sends to now.
      type: str
      sample: 198.18.0.13:51840
    addresses:
      description: What lies behind the peer, its allowed IPs.
      type: list
      elements: str
      sample: [10.244.2.0/24, 198.18.0.13/32]
    handshake_age:
      description: Seconds since the last handshake, null when there was none.
      type: int
      sample: 17
    rx_bytes:
      description: Bytes received from the peer.
      type: int
      sample: 9012
    tx_bytes:
      description: Bytes sent to the peer.
      type: int
      sample: 8120
    generation:
      description: The generation of keys that this is about.
      type: int
      sample: 0
    routed:
      description: Whether any of its pod CIDRs is sent through the tunnel.
      type: bool
      sample: true
    state:
      description:
        - V(encrypted), or what is missing for it, V(idle) (no handshake for 275 seconds), V(no handshake), V(accepting) (its traffic is
          accepted, ours to it takes the way of the CNI), V(partial), V(missing), V(no key), V(excluded), V(unknown).
      type: str
      sample: encrypted
    reason:
      description: Why it is not encrypted.
      type: str
      sample: ""
agent:
  description:
    - The node agent, see M(kubemesh.wireguard.agent). Where it runs, peers are joined with the document that it works by, which has what
      changed in the cluster since the last run.
  returned: always
  type: dict
  contains:
    installed:
      description: Whether it is installed.
      type: bool
      sample: true
    active:
      description: Whether it runs.
      type: bool
      sample: true
    state:
      description:
        - What it says of itself, null where it said nothing yet. Most of all C(api), which is C(watching) or what is wrong; C(hindrance),
          why it does nothing; C(lag), seconds from the last change of the API to the kernel; C(unproven), peers that were not reached
          through the tunnel yet; C(guard), whether the guard is V(in force), V(not in force) or V(off).
      type: dict
      sample:
        api: watching
        guard: "off"
        hindrance: ""
        lag: 0.11
        unproven: []
  sample:
    installed: false
    active: false
    state: null
warnings_of_mesh:
  description: What else is not as it should be on this node.
  returned: always
  type: list
  elements: str
  sample: []
"""

import glob
import os
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_install, _agent_plan, _status
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live_device
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live_routes
from ansible_collections.kubemesh.wireguard.plugins.module_utils._guard import guard_status
from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import generations_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, document_sha256, is_peer, node_entry
from ansible_collections.kubemesh.wireguard.plugins.module_utils._persist import HEADER, SYSCTL_FILE, paths_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import exempt_fault
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_document, read_sysctl, read_text

# What `is_peer` is told of a node that a document does not have.
NOBODY = {"state": "excluded", "public_keys": {}}


def loose_filter_warnings(interface):
    """What reverse-path filtering would drop while a switch is made; the larger of ``all`` and the device's value counts."""
    own = read_sysctl("net/ipv4/conf/%s/rp_filter" % interface)
    common = read_sysctl("net/ipv4/conf/all/rp_filter")
    if own is None:
        return []  # an underlay device that is there no more
    common, own = int(common or 0), int(own or 0)
    if max(common, own) == 1:
        return ["rp_filter is strict on %s: answers that take another way are dropped; run the playbook enable" % interface]
    return []


def read_generations(system, interface, routes):
    """What there is of each generation: [{"generation", "name", "link", "state", "key", "boot", "routes"}]."""
    found = []
    names = generations_of(interface)
    for number, name in enumerate(names):
        link, state = live_device.read(system, name)
        age = key_age("/etc/wireguard/%s.key" % name, time.time())
        found.append({
            "generation": number, "name": name, "link": link, "state": state,
            "key": age is not None,
            "key_age": age,
            "preshared_keys": os.path.isdir("/etc/wireguard/%s.psk" % name),
            "boot": any(os.path.exists(path) for path in paths_of(name).values()),
            "routes": sum(1 for route in routes["routes"] if route["dev"] == name),
        })
    return found


def key_age(path, now):
    """Seconds since a key file was made, None where there is none."""
    try:
        return max(0, int(now - os.stat(path).st_mtime))
    except OSError:
        return None


def restored_devices():
    """Names of the devices that files of ours restore at boot, whatever they are called."""
    found = set()
    for kind in ("wg_quick_dropin", "network"):
        pattern = paths_of("*")[kind]
        before, after = pattern.split("*")
        found |= {path[len(before):-len(after)] for path in glob.glob(pattern) if (read_text(path) or "").startswith(HEADER)}
    return sorted(found)


def own_document(params):
    """(document or None, warnings). Without a node nothing is joined, so a damaged document is no obstacle then: a run writes it anew."""
    if read_text(params["document_file"]) is None:
        return None, []
    try:
        return read_document(params["document_file"]), []
    except MeshError as exc:
        if params["node"]:
            raise
        return None, ["%s: %s" % (params["document_file"], exc)]


def look(params, system):
    """Read and join: the result of the module."""
    routes = live_routes.read_state(system, params["table"])
    found = read_generations(system, params["interface"], routes)
    doc, warnings = own_document(params)
    agent, effective, more = read_agent(system, doc)
    warnings += more
    current = params["generation"]
    if current is None:
        current = doc["generation"] if doc is not None else 0
    # A device whose name says nothing of generations is alone.
    shown = found[min(current, len(found) - 1)]
    peers = []
    if doc is not None and params["node"]:
        node_entry(doc, params["node"])
        devices = [(current, shown["name"], shown["state"])]
        devices += [(item["generation"], item["name"], item["state"]) for item in found if item is not shown and item["link"] is not None]
        peers = _status.join_generations(effective or doc, params["node"], devices, routes, time.time(), params["exempt_cidrs"])
    if doc is not None:
        if shown["link"] is None:
            warnings.append("device %s is missing; run the playbook enable" % shown["name"])
        for item in found:
            if item["link"] is not None and not item["link"]["up"]:
                warnings.append("device %s is down; run the playbook enable" % item["name"])
        ours = [item["name"] for item in found if item["link"] is not None]
        # The underlay devices as well: outer packets come in there. The file that the mesh wrote knows which they are.
        underlay = [name for name in _status.loose_devices(read_text(SYSCTL_FILE)) if name not in generations_of(params["interface"])]
        for name in ours + underlay:
            warnings += loose_filter_warnings(name)
    # Without the name of this node nobody can tell what an agent makes of the guard.
    compare = bool(params["node"]) or (params["detail"] != "none" and effective is None)
    kept_up = effective if effective is not None and is_peer(effective["nodes"].get(params["node"]) or NOBODY) else None
    guard = guard_status(system, compare, kept_up, params["node"])
    if guard["reason"]:
        warnings.append("strict mode: %s; run the playbook enable" % guard["reason"])
    there = [item for item in found if item["link"] is not None or item["key"] or item["boot"] or item["routes"]]
    if len(there) > 1:
        warnings.append("two generations of keys are here: a rotation is under way or was interrupted; run rotate_keys to go on")
    link, device = shown["link"], shown["state"]
    return {
        "node": params["node"],
        "exists": doc is not None or any(item["link"] is not None for item in found),
        "device": None if link is None else {
            "name": shown["name"],
            "implementation": "kernel" if link["kind"] == "wireguard" else "userspace",
            "up": link["up"],
            "mtu": link["mtu"],
            "listen_port": device["listen_port"] if device else None,
            "public_key": device["public_key"] if device else None,
            "addresses": link["addresses"],
        },
        "document": None if doc is None else {
            "serial": doc["serial"], "generation": doc["generation"], "ports": doc["ports"], "sha256": document_sha256(doc)},
        "generations": [
            {"generation": item["generation"], "name": item["name"], "device": item["link"] is not None, "key": item["key"],
             "key_age": item["key_age"], "preshared_keys": item["preshared_keys"], "boot": item["boot"], "routes": item["routes"],
             "listen_port": item["state"]["listen_port"] if item["state"] else None,
             "fwmark": item["state"]["fwmark"] if item["state"] else None,
             "public_key": item["state"]["public_key"] if item["state"] else None} for item in there],
        "restored": {"devices": restored_devices(), "table": live_routes.stored_table()},
        "rule_fwmark": next((rule["not_fwmark"] for rule in routes["rules"] if rule["not_fwmark"]), None),
        "ipv6": live_device.has_ipv6(),
        "guard": guard,
        "sending": bool(routes["rules"]),
        "encrypts": encrypts(routes),
        "counts": _status.counts(peers),
        "peers": _status.detailed(peers, params["detail"]),
        "agent": agent,
        "warnings_of_mesh": warnings,
    }


def read_agent(system, document):
    """``(agent for the result, its document or None, warnings)``: what the agent of this node says of itself.

    Its document is the one that it works by, where that belongs to the one that is here.
    """
    installed = read_text(_agent_install.UNIT_FILE) is not None
    if not installed:
        return {"installed": False, "active": False, "state": None}, None, []
    active = system.unit(_agent_install.UNIT)["active"]
    state = _agent_plan.parse_state(read_text(_agent_install.STATE_FILE) or "")
    warnings = _agent_plan.state_warnings(state, active, time.time())
    effective = None
    if document is not None and active:
        effective = _agent_plan.parse_memory(read_text(_agent_install.MEMORY_FILE) or "", document_sha256(document))[0]
    return {"installed": True, "active": active, "state": state}, effective, warnings


def encrypts(routes):
    """What the rules make of the tables: ``nodes``, ``pods`` or ``nothing``."""
    if not routes["rules"]:
        return "nothing"
    return "nodes" if any(rule["not_fwmark"] for rule in routes["rules"]) else "pods"


def main():
    module = AnsibleModule(
        argument_spec={
            "interface": {"type": "str", "default": "wgmesh0"},
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "generation": {"type": "int", "choices": [0, 1]},
            "detail": {"type": "str", "choices": list(_status.DETAILS), "default": "all"},
            "table": {"type": "int", "default": 51840},
            "exempt_cidrs": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        for fault in filter(None, map(exempt_fault, module.params["exempt_cidrs"])):
            raise MeshError(fault)
        result = look(module.params, System(module))
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
