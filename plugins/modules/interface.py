#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: interface
short_description: The mesh's WireGuard device, its addresses and peers
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Brings a WireGuard device up with every peer and all addresses that the peers may ever use, live and for the next boot. No traffic
    moves by that, see M(kubemesh.wireguard.routes).
  - Peers and their allowed IPs are added, moved and removed one by one. A peer that did not change keeps its session; an allowed IP that
    stays is never gone for an instant.
  - The device carries the node's own addresses and a link-local address for M(kubemesh.wireguard.probe).
  - Works with the kernel's WireGuard and with a userspace implementation.
  - Reverse-path filtering is set to loose on the device and on those that WireGuard's own packets use. What it was before comes back with
    O(state=absent).
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
      - Whether the device shall exist. V(absent) also removes every file that restores it, and gives the sysctls back their values.
      - Remove a device only when no node sends through the mesh any more.
    type: str
    choices:
      - present
      - absent
    default: present
  name:
    description:
      - Name of the device.
    type: str
    default: wgmesh0
  private_key_file:
    description:
      - File with the private key, as M(kubemesh.wireguard.keypair) makes it.
      - The default is C(/etc/wireguard/NAME.key).
    type: path
  preshared_keys:
    description:
      - Directory with the preshared keys of the peers, as M(kubemesh.wireguard.preshared_keys) makes it. All peers must have one there.
      - The device gets them now and at boot. They are in none of the files that restore it.
      - Without this option, peers have no preshared key, and one that has is given none.
      - WireGuard uses a preshared key at handshakes only. Give it to a device before the device is used, or to both ends within seconds.
    type: path
  listen_port:
    description:
      - UDP port. The default is what the mesh document says for the generation.
    type: int
  fwmark:
    description:
      - Mark on the packets of WireGuard itself.
    type: int
    default: 4096
  mtu:
    description:
      - MTU of the device in bytes. The default is what the mesh document says for this node.
    type: int
  implementation:
    description:
      - V(kernel) or V(userspace). With V(auto) what is running stays, else the kernel's is taken where a device can be created.
    type: str
    choices:
      - auto
      - kernel
      - userspace
    default: auto
  remove:
    description:
      - Whether peers and allowed IPs that do not belong any more are taken away from the device.
      - With V(false) they stay for now, and RV(left) counts them. A node may still send with them, and what it sends must be accepted until
        it has stopped. An allowed IP that belongs to another peer now is moved in any case.
    type: bool
    default: true
  persistence:
    description:
      - What restores the device at boot. With V(auto) that is V(wg-quick) where it is installed, else V(systemd-networkd).
    type: str
    choices:
      - auto
      - wg-quick
      - systemd-networkd
      - none
    default: auto
seealso:
  - module: kubemesh.wireguard.keypair
  - module: kubemesh.wireguard.peers
  - module: kubemesh.wireguard.preshared_keys
  - module: kubemesh.wireguard.routes
"""

EXAMPLES = r"""
- name: Accept from every peer of the mesh document
  kubemesh.wireguard.interface:
    node: worker-1

- name: Same, with a userspace implementation that systemd-networkd gives its addresses
  kubemesh.wireguard.interface:
    node: worker-1
    implementation: userspace
    persistence: systemd-networkd

- name: Same, with the preshared keys that kubemesh.wireguard.preshared_keys wrote
  kubemesh.wireguard.interface:
    node: worker-1
    preshared_keys: /etc/wireguard/wgmesh0.psk

- name: Remove the device and all that restores it
  kubemesh.wireguard.interface:
    state: absent
"""

RETURN = r"""
implementation:
  description: What the device is made by, C(kernel) or C(userspace).
  returned: when O(state=present)
  type: str
  sample: kernel
persistence:
  description: What restores the device at boot.
  returned: when O(state=present)
  type: str
  sample: wg-quick
left:
  description: With O(remove=false), the number of steps that were left for later.
  returned: O(state=present)
  type: int
  sample: 0
peer_count:
  description: Number of peers that the device has after this task.
  returned: when O(state=present)
  type: int
  sample: 4
steps:
  description: What was done, or would be done in check mode, in this order; at most 200 lines.
  returned: always
  type: list
  elements: str
  sample: ["create device wgmesh0 (kernel)"]
"""

import re

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _link_plan, _psk, _wg_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    device_addresses,
    generation_text,
    mesh_mtu,
    node_entry,
    parse_endpoint,
    peers_of,
    shown,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_document

# Lines; results must stay small at 5,000 nodes.
STEPS_SHOWN = 200


def wanted_device(params, doc, implementation, command, persistence, ipv6):
    """What the device shall be, from the arguments and the mesh document."""
    generation, name = generation_text(params["generation"]), params["node"]
    members = [entry for entry in doc["nodes"].values() if entry["state"] != "excluded"]
    peers = peers_of(doc, name, generation)
    for public_key, path in preshared_key_files(params, peers).items():
        peers[public_key]["preshared_key_file"] = path
    return {
        "interface": params["name"],
        "implementation": implementation,
        "userspace_command": command,
        "persistence": persistence,
        "private_key_file": params["private_key_file"] or "/etc/wireguard/%s.key" % params["name"],
        "public_key": node_entry(doc, name)["public_keys"].get(generation),
        "listen_port": params["listen_port"] or doc["ports"][generation],
        "fwmark": params["fwmark"],
        "mtu": params["mtu"] or mesh_mtu(doc, name) or _link_plan.MTU_DEFAULT,
        "addresses": [text for text in device_addresses(doc, name, generation) if ipv6 or ":" not in text],
        "preshared_keys": params["preshared_keys"],
        "peers": peers,
        "remove": params["remove"],
        # A member whose key nobody knows now may be one of the peers that are there: they stay (invariant I4).
        "keep_unknown_peers": any(generation not in entry["public_keys"] for entry in members),
    }


def preshared_key_files(params, public_keys):
    """{public key: path} of the preshared keys; empty where there are to be none."""
    folder = params["preshared_keys"]
    if not folder:
        return {}
    # It goes into a unit, a script and a configuration file, each with rules of its own for other characters.
    if not re.fullmatch(r"(/[A-Za-z0-9._@+-]+)+", folder):
        raise MeshError("preshared_keys: %s is not the full path of a directory without special characters" % shown(folder))
    return _psk.paths_of(folder, public_keys)


def keys_of_others(doc, generation):
    """The public keys that may be among the peers, to compare the preshared keys of a device before it is known who they are."""
    found = (entry["public_keys"].get(generation_text(generation)) for entry in doc["nodes"].values())
    return [public_key for public_key in found if public_key]


def step_texts(step, interface, names):
    """One step as lines for people."""
    if step["op"] in _wg_plan.OPERATIONS:
        return _wg_plan.describe(step, names)
    if step["op"] == "set_sysctl":
        return ["sysctl %s: %s, was %s" % (step["name"], step["value"], step["before"])]
    if "unit" in step or "path" in step:
        return ["%s %s" % (step["op"].replace("_", " "), step.get("unit") or step["path"])]
    return [_link_plan.describe(step, interface)]


def file_diffs(steps):
    """Diff entries of file steps."""
    return [{
        "before_header": step["path"], "after_header": step["path"], "before": step["before"] or "", "after": step.get("after", ""),
    } for step in steps]


def kernel_diff(interface, current, wanted, plan, names):
    """The diff entry of what is in the kernel: link, addresses, device, peers, sysctls, units."""
    link, state = current
    before = _link_plan.link_as_text(link, interface) + _wg_plan.device_as_text(state, names)
    after = ""
    if wanted is not None:
        after_link = {
            "kind": _link_plan.KINDS[wanted["implementation"]][0], "mtu": wanted["mtu"], "up": True, "addresses": wanted["addresses"],
            "addrgenmode": "none" if _link_plan.has_ipv6(wanted["addresses"]) else ""}
        reached = _wg_plan.apply_steps(state or _wg_plan.empty_state(interface), plan["device"])
        after = _link_plan.link_as_text(after_link, interface) + _wg_plan.device_as_text(reached, names)
    for step in plan["sysctls"]:
        before += "sysctl %s = %s\n" % (step["name"], step["before"])
        after += "sysctl %s = %s\n" % (step["name"], step["value"])
    for step in plan["units"]:
        before += "unit %s %s\n" % (step["unit"], "disabled" if step["op"] == "enable_unit" else "enabled")
        after += "unit %s %s\n" % (step["unit"], "enabled" if step["op"] == "enable_unit" else "disabled")
    return {"before_header": "device %s" % interface, "after_header": "device %s" % interface, "before": before, "after": after}


def present(module, system):
    """state=present: read, plan, apply, report."""
    params = module.params
    if not params["node"]:
        raise MeshError("node: the name of this host in the mesh document is needed for state=present")
    doc = read_document(params["document_file"])
    entry = node_entry(doc, params["node"])
    interface = params["name"]
    current = live.read(system, interface, preshared_key_files(params, keys_of_others(doc, params["generation"])))
    implementation, command = live.choose_implementation(system, params["implementation"], current[0])
    persistence = live.choose_persistence(system, params["persistence"])
    wanted = wanted_device(params, doc, implementation, command, persistence, live.has_ipv6())
    endpoints = [parse_endpoint(peer["endpoint"])["address"] for peer in wanted["peers"].values() if peer["endpoint"]]
    host = live.read_host(system, live.underlay_devices(
        system, entry["node_addresses"], endpoints, interface, params["fwmark"]))
    if wanted["preshared_keys"] and not module.check_mode:
        live.check_preshared_keys(wanted["preshared_keys"], wanted["peers"])
    plan = live.plan_present(system, wanted, host, current, module.check_mode)
    left = plan.pop("left")
    if not module.check_mode:
        live.apply_present(system, wanted, plan)
    names = {key: peer["name"] for key, peer in wanted["peers"].items()}
    return plan, wanted, current, names, {
        "implementation": implementation,
        "persistence": wanted["persistence"],
        "peer_count": len(wanted["peers"]),
        "left": left,
    }


def absent(module, system):
    """state=absent: read, plan, apply, report."""
    interface = module.params["name"]
    current = live.read(system, interface)
    if current[0] is not None and current[0]["kind"] not in ("wireguard", "tun"):
        raise MeshError("name: device %s is of kind %s, not WireGuard; it is left alone" % (interface, current[0]["kind"] or "unknown"))
    plan = live.plan_absent(system, interface, current)
    if not module.check_mode:
        live.apply_absent(system, interface, plan)
    return plan, None, current, {}, {}


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "default": "wgmesh0"},
            "document_file": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "generation": {"type": "int", "choices": [0, 1], "default": 0},
            "private_key_file": {"type": "path"},
            "preshared_keys": {"type": "path"},
            "listen_port": {"type": "int"},
            "fwmark": {"type": "int", "default": 4096},
            "mtu": {"type": "int"},
            "implementation": {"type": "str", "choices": ["auto", "kernel", "userspace"], "default": "auto"},
            "remove": {"type": "bool", "default": True},
            "persistence": {"type": "str", "choices": ["auto", "wg-quick", "systemd-networkd", "none"], "default": "auto"},
        },
        supports_check_mode=True,
    )
    try:
        system = System(module)
        plan, wanted, current, names, result = (present if module.params["state"] == "present" else absent)(module, system)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    steps = [step for part in plan.values() for step in part]
    texts = [text for step in steps for text in step_texts(step, module.params["name"], names)]
    result.update(changed=bool(steps), steps=texts[:STEPS_SHOWN])
    if module._diff:
        result["diff"] = [kernel_diff(module.params["name"], current, wanted, plan, names)]
        result["diff"] += file_diffs([step for step in steps if "path" in step])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
