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
  - An idle peer is not down. Run M(kubemesh.wireguard.probe) first, so that every tunnel has been used.
  - Private and preshared keys are neither returned nor read further than the kernel hands them out.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.info_module
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._mesh_document
  - kubemesh.wireguard._mesh_document.generation
options:
  interface:
    description:
      - Name of the mesh device.
    type: str
    default: wgmesh0
  table:
    description:
      - Routing table of the pod CIDRs. The next one holds the node addresses.
    type: int
    default: 51840
seealso:
  - module: kubemesh.wireguard.probe
"""

EXAMPLES = r"""
- name: Look at the mesh from this node
  kubemesh.wireguard.mesh_info:
    node: worker-1
  register: mesh

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
warnings_of_mesh:
  description: What else is not as it should be on this node.
  returned: always
  type: list
  elements: str
  sample: []
"""

import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live_device
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live_routes
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _status
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, node_entry
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_document, read_sysctl, read_text


def loose_filter_warnings(interface):
    """What reverse-path filtering would drop while a switch is made; the larger of ``all`` and the device's value counts."""
    common = int(read_sysctl("net/ipv4/conf/all/rp_filter") or 0)
    own = int(read_sysctl("net/ipv4/conf/%s/rp_filter" % interface) or 0)
    if max(common, own) == 1:
        return ["rp_filter is strict on %s: answers that take another way are dropped; run the playbook enable" % interface]
    return []


def main():
    module = AnsibleModule(
        argument_spec={
            "interface": {"type": "str", "default": "wgmesh0"},
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "generation": {"type": "int", "choices": [0, 1], "default": 0},
            "table": {"type": "int", "default": 51840},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        system = System(module)
        link, device = live_device.read(system, params["interface"])
        routes = live_routes.read_state(system, params["table"])
        doc = read_document(params["document_file"]) if read_text(params["document_file"]) is not None else None
        peers, warnings = [], []
        if doc is not None:
            if not params["node"]:
                raise MeshError("node: the name of this host in the mesh document is needed")
            node_entry(doc, params["node"])
            peers = _status.join(doc, params["node"], params["generation"], device, routes, params["interface"], time.time())
            if link is None:
                warnings.append("device %s is missing; run the playbook enable" % params["interface"])
            else:
                if not link["up"]:
                    warnings.append("device %s is down; run the playbook enable" % params["interface"])
                warnings += loose_filter_warnings(params["interface"])
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(
        changed=False,
        node=params["node"],
        exists=doc is not None or link is not None,
        device=None if link is None else {
            "name": params["interface"],
            "implementation": "kernel" if link["kind"] == "wireguard" else "userspace",
            "up": link["up"],
            "mtu": link["mtu"],
            "listen_port": device["listen_port"] if device else None,
            "public_key": device["public_key"] if device else None,
            "addresses": link["addresses"],
        },
        sending=bool(routes["rules"]),
        counts=_status.counts(peers),
        peers=peers,
        warnings_of_mesh=warnings,
    )


if __name__ == "__main__":
    main()
