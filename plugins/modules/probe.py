#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: probe
short_description: Prove that every peer is reached through the tunnel
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Sends ICMPv6 echo requests from the probe address of this node to that of every peer. These addresses are link-local on the mesh device,
    so question and answer can only go through the tunnel, whatever the routes are. No route has to exist.
  - A peer is proven if a small packet and one of the full size came back, and the WireGuard device then shows a handshake of the last 275
    seconds with this peer, and that it received something. A handshake alone is no proof.
  - Peers that do not answer in full size are tried with smaller sizes, so that the message says what would fit.
  - What was found about each peer is left in a file on the node, for M(kubemesh.wireguard.routes). The result that goes to the controller
    stays small, also with thousands of nodes.
  - Where this node has no IPv6, packets to the IPv4 addresses of the peers, sent through the device, make the handshakes, and those are all
    that is judged. RV(method) then says V(handshake).
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._mesh_document
  - kubemesh.wireguard._mesh_document.generation
attributes:
  check_mode:
    support: full
    details:
      - Probing changes no configuration, so it happens in check mode as well, if the device is there. The proof file is not written then.
  diff_mode:
    support: N/A
    details:
      - There is nothing that would change.
  idempotent:
    support: full
    details:
      - RV(ignore:changed) is always false.
options:
  node:
    required: true
  interface:
    description:
      - The mesh device.
      - The default is V(wgmesh0) or V(wgmesh1), by O(generation).
    type: str
  peers:
    description:
      - Names of the nodes to probe.
      - The default is all nodes of the mesh document that have a key of this generation.
    type: list
    elements: str
  again:
    description:
      - Probe only those peers that O(proof_file) says were reached, to see that they still are. Where there are none, nothing is done.
    type: bool
    default: false
  timeout:
    description:
      - Seconds until peers that did not answer are given up.
      - WireGuard repeats a lost handshake after 5 seconds, so less than 7 is not wise. The first packets to 5,000 peers are spread over 3.4
        seconds.
    type: float
    default: 15
  full_size:
    description:
      - Whether a packet as big as the MTU of the device has to come back, too.
    type: bool
    default: true
  method:
    description:
      - V(echo) wants answers from the peers.
      - V(handshake) judges by handshakes and received bytes only. It shows nothing about packets of full size.
      - V(auto) is V(echo), and V(handshake) where this node has no IPv6. Set V(handshake) on all nodes if one of them has no IPv6.
    type: str
    choices:
      - auto
      - echo
      - handshake
    default: auto
  proof_file:
    description:
      - Where what was found about each peer is left on this node.
      - What it already says about peers that were not probed now stays, as long as they have the same key.
      - The default is C(/run/kubemesh/proof-INTERFACE.json).
    type: path
  require:
    description:
      - With V(all) the task fails if a peer is not proven. The proof file is written all the same.
    type: str
    choices:
      - all
      - none
    default: none
  return_peers:
    description:
      - Whether to return what was found about each peer.
      - This grows with the number of nodes on each of them, so leave it out for big clusters.
    type: bool
    default: false
seealso:
  - module: kubemesh.wireguard.interface
  - module: kubemesh.wireguard.routes
"""

EXAMPLES = r"""
- name: Reach every peer through the tunnel
  kubemesh.wireguard.probe:
    node: worker-1
  register: probed

- name: Say who was not reached, and why
  ansible.builtin.debug:
    var: probed.unproven

- name: Fail unless the new generation works to two peers
  kubemesh.wireguard.probe:
    node: worker-1
    generation: 1
    peers:
      - worker-2
      - worker-3
    require: all
"""

RETURN = r"""
peer_count:
  description: Number of peers that were probed.
  returned: always
  type: int
  sample: 4
proven_count:
  description: Number of peers that are proven.
  returned: always
  type: int
  sample: 3
unproven_count:
  description: Number of peers that are not proven.
  returned: always
  type: int
  sample: 1
unproven:
  description: The first 50 peers that are not proven. The proof file on the node has all.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the peer.
      type: str
      sample: worker-4
    reason:
      description: What is wrong, as a word for programs.
      type: str
      sample: no_handshake
    message:
      description: What is wrong and what to do about it.
      type: str
      sample: "worker-1 to worker-4: no handshake with 198.18.0.14:51840; let UDP port 51840 through every firewall between the two nodes"
  sample: []
unproven_names:
  description: Names of all peers that are not proven.
  returned: always
  type: list
  elements: str
  sample: [worker-4]
without_key:
  description: The first 50 nodes of the mesh document without a key of this generation. They are not counted unless they were asked for.
  returned: always
  type: list
  elements: str
  sample: []
slowest_rtt:
  description: Longest round-trip time of all peers, in seconds. Null if nobody answered.
  returned: always
  type: float
  sample: 0.000812
slowest_peer:
  description: The peer with the longest round-trip time. Null if nobody answered.
  returned: always
  type: str
  sample: worker-3
method:
  description: How it was found out, V(echo) or V(handshake).
  returned: always
  type: str
  sample: echo
interface:
  description: The mesh device.
  returned: always
  type: str
  sample: wgmesh0
mtu:
  description: MTU of the mesh device in bytes. Null if there is no device, which only check mode accepts.
  returned: always
  type: int
  sample: 1420
proof_file:
  description: Where what was found about each peer is on this node.
  returned: always
  type: str
  sample: /run/kubemesh/proof-wgmesh0.json
msg:
  description: The result as one line.
  returned: always
  type: str
  sample: "worker-1: 4 of 4 peers proven through wgmesh0"
peers:
  description: What was found about each peer, by its name.
  returned: with O(return_peers=true)
  type: dict
  contains:
    proven:
      description: Whether the peer was reached through the tunnel.
      type: bool
      sample: true
    public_key:
      description: Public key the peer was reached with.
      type: str
      sample: "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="
    reason:
      description: What is wrong, as a word for programs. Empty if nothing is.
      type: str
      sample: ""
    message:
      description: What is wrong and what to do about it. Empty if nothing is.
      type: str
      sample: ""
    rtt:
      description: Shortest round-trip time in seconds. Null if it did not answer.
      type: float
      sample: 0.000812
    size:
      description: Bytes of the biggest packet that came back.
      type: int
      sample: 1420
    handshake_age:
      description: Seconds since the last handshake. Null if there never was one.
      type: int
      sample: 2
    time:
      description: When this was found out, in seconds since the epoch, by the clock of this node.
      type: float
      sample: 1763874000.25
  sample: {}
"""

import json
import random
import socket
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _probe
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import read_document, write_text
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg import client_for

# seconds to wait for the socket of a userspace WireGuard that was just started
DEVICE_WAIT = 2.0


def method_of(wanted, interface):
    """``echo`` or ``handshake``."""
    if wanted == "auto":
        return "echo" if _probe.has_ipv6(interface) else "handshake"
    return wanted


def check_own_key(doc, node, generation, interface, state):
    """MeshError if the device has another key than the one the peers know: nobody would answer, and nobody could say why."""
    expected = _mesh.node_entry(doc, node)["public_keys"][generation]
    if state["public_key"] != expected:
        raise MeshError("node %s: device %s has the public key %s, the mesh document says %s; run the modules keypair and interface on it, "
                        "then compute and distribute the document anew" % (node, interface, state["public_key"] or "(none)", expected))


def probe_peers(module, doc, peers, interface, found_device):
    """-> (method, {name: entry of `_probe.judge`})."""
    params = module.params
    generation = _mesh.generation_text(params["generation"])
    client = client_for(interface, wait=DEVICE_WAIT, run_command=module.run_command)

    def read():
        return client.read(interface)

    before = read()
    check_own_key(doc, params["node"], generation, interface, before)
    method = method_of(params["method"], interface)
    if method == "handshake":
        before, after = _probe.run_handshakes(interface, peers, read, time.monotonic() + params["timeout"])
        return method, _probe.judge_all(peers, before, after, None, time.time(), {})

    sizes = {name: _probe.full_size(found_device["mtu"], peer["mtu"]) if params["full_size"] else None for name, peer in peers.items()}
    own = _mesh.node_entry(doc, params["node"])
    now = time.time()
    start = time.monotonic()
    schedule = _probe.EchoSchedule([{
        "name": name, "address": socket.inet_pton(socket.AF_INET6, peer["address"]), "size": sizes[name],
        "late": _probe.is_late(own["public_keys"][generation], peer["public_key"], before, now),
    } for name, peer in sorted(peers.items())], start, random.Random())  # noqa: S311 - spreads packets, protects nothing
    with _probe.open_echo_socket(interface, found_device["index"], own["probe_addresses"][generation]) as handle:
        _probe.run_echo(handle, found_device["index"], schedule, start + params["timeout"])
    return method, _probe.judge_all(peers, before, read(), schedule.results(), time.time(), sizes)


def proof_of(params, doc, interface, method, entries):
    """What goes into the proof file: see `_probe.merge_proof`."""
    now = time.time()
    return {"schema": 1, "node": params["node"], "interface": interface, "generation": params["generation"], "serial": doc["serial"],
            "method": method, "peers": {name: dict(entry, time=now) for name, entry in entries.items()}}


def message(node, interface, result):
    """The result as one line."""
    text = "%s: %d of %d peers proven through %s" % (node, result["proven_count"], result["peer_count"], interface)
    if result["method"] == "handshake":
        text += " (handshake only)"
    for item in result["unproven"][:3]:
        text += ". %s" % item["message"]
    if result["unproven_count"] > 3:
        text += ". And %d more" % (result["unproven_count"] - 3)
    return text


def run(module):
    """-> the result of the module."""
    params = module.params
    interface = params["interface"] or "wgmesh%d" % params["generation"]
    proof_file = params["proof_file"] or "/run/kubemesh/proof-%s.json" % interface
    if params["timeout"] <= 0:
        raise MeshError("timeout: %s is not a number of seconds above 0" % params["timeout"])
    doc = read_document(params["document_file"])
    names = params["peers"]
    if params["again"]:
        known = _probe.proven_names(_probe.read_proof(proof_file), doc, params["generation"])
        names = sorted(known if names is None else known & set(names))
    peers, without_key = ({}, []) if names == [] else _probe.plan_peers(doc, params["node"], params["generation"], names)

    found_device = _probe.device(interface)
    if found_device is None:
        if not module.check_mode:
            raise MeshError("interface: there is no device %s on node %s; make it with the module interface" % (interface, params["node"]))
        result = dict(_probe.summary(params["node"], {}, without_key, method_of(params["method"], "lo")), peer_count=len(peers))
        return dict(result, changed=False, interface=interface, mtu=None, proof_file=proof_file,
                    msg="there is no device %s yet, so nothing was probed; without check mode, %d peers would be" % (interface, len(peers)))

    method, entries = probe_peers(module, doc, peers, interface, found_device)
    if names is not None:
        for name in without_key:
            entries[name] = _probe.no_key_entry()
    if not module.check_mode:
        proof = _probe.merge_proof(_probe.read_proof(proof_file), proof_of(params, doc, interface, method, entries), doc)
        write_text(proof_file, json.dumps(proof, sort_keys=True, separators=(",", ":")) + "\n", 0o644)

    result = dict(_probe.summary(params["node"], entries, without_key, method), changed=False, interface=interface, mtu=found_device["mtu"],
                  proof_file=proof_file)
    result["msg"] = message(params["node"], interface, result)
    if params["return_peers"]:
        result["peers"] = proof_of(params, doc, interface, method, entries)["peers"]
    return result


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str", "required": True},
            "generation": {"type": "int", "choices": [0, 1], "default": 0},
            "interface": {"type": "str"},
            "peers": {"type": "list", "elements": "str"},
            "again": {"type": "bool", "default": False},
            "timeout": {"type": "float", "default": 15},
            "full_size": {"type": "bool", "default": True},
            "method": {"type": "str", "choices": ["auto", "echo", "handshake"], "default": "auto"},
            "proof_file": {"type": "path"},
            "require": {"type": "str", "choices": ["all", "none"], "default": "none"},
            "return_peers": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    if module.params["require"] == "all" and result["unproven_count"]:
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
