#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Find out what stands in the way of the mesh before anything is changed
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Looks at one node. Can it make a WireGuard device, are the tools there, are ports, tables, marks, rules and device names free, can the
    CNI's data path be steered, are the pods' addresses those that would be routed, is FIPS mode on, and so on.
  - Looks at what lies between the nodes. Do the mesh's UDP ports get through, and how big may packets be. Sizes are found with packets that
    must not be fragmented, as some networks carry less than they promise and tell nobody.
  - Everything that is found comes with what to do about it. The mesh that is already there is no finding.
  - For the second part, run it on all nodes with O(listen=start), then on all nodes with O(targets) or O(targets_src), then on all with
    O(listen=stop). P(kubemesh.wireguard.findings_table#filter) makes one table of the findings of all nodes.
  - The responder that O(listen=start) leaves behind answers only packets of this run, never with more bytes than it got, and ends by
    itself.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
attributes:
  check_mode:
    support: full
    details:
      - In check mode no responder is started. What lies between the nodes is then measured with ICMP echo requests, and nothing is said
        about ports.
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
    description:
      - Name of this host in findings, which is the name of its Kubernetes Node object.
    type: str
    required: true
  local_checks:
    description:
      - Whether to look at the node itself.
    type: bool
    default: true
  interface:
    description:
      - Stem of the device names, as in C(mesh_interface). The devices are this with 0 and 1 behind it.
    type: str
    default: wgmesh
  port:
    description:
      - UDP port of generation 0. Generation 1 uses the next.
    type: int
    default: 51840
  table:
    description:
      - First of the mesh's two routing tables.
    type: int
    default: 51840
  rule_priority:
    description:
      - Priority of the first of the mesh's rules. The next two are used as well.
    type: int
    default: 400
  fwmark:
    description:
      - Mark on the packets of WireGuard itself.
    type: int
    default: 4096
  encrypt:
    description:
      - What will be encrypted, as in M(kubemesh.wireguard.routes).
    type: str
    choices:
      - pods
      - nodes
    default: pods
  pod_source:
    description:
      - Where the pod CIDRs of the nodes come from, as in M(kubemesh.wireguard.peers). All but V(node_cidrs) follow the pods, so a pod that
        is outside of them is only newer than they are.
    type: str
    choices:
      - node_cidrs
      - pods
      - calico_ipam
      - cilium
    default: node_cidrs
  implementation:
    description:
      - What will make the device, as in M(kubemesh.wireguard.interface).
    type: str
    choices:
      - auto
      - kernel
      - userspace
    default: auto
  persistence:
    description:
      - What will restore the mesh at boot, as in M(kubemesh.wireguard.interface).
    type: str
    choices:
      - auto
      - wg-quick
      - systemd-networkd
      - none
    default: auto
  mtu:
    description:
      - MTU that is asked for, in bytes. The default is to take what was measured.
    type: int
  pod_cidrs:
    description:
      - Pod CIDRs of this node, where they are known already. The addresses of its pods are compared with them.
      - The default is what a mesh document says that is given as O(targets_file) or O(targets_src).
    type: list
    elements: str
  node_addresses:
    description:
      - Addresses that the Node object has, where they are known already. One of them must be on this host.
      - The default is what a mesh document says that is given as O(targets_file) or O(targets_src).
    type: list
    elements: str
  agent_ca_file:
    description:
      - C(ca_file) that M(kubemesh.wireguard.agent) will be given. Where it is set, the files that the agent needs are looked at, also with
        O(local_checks=false). They must be readable for the user that the service will have, which depends on O(implementation) and on the
        device that is there.
      - Leave it out where there shall be no agent.
    type: path
  agent_token_file:
    description:
      - C(token_file) that M(kubemesh.wireguard.agent) will be given, if any. Needs O(agent_ca_file).
    type: path
  agent_token_given:
    description:
      - Whether M(kubemesh.wireguard.agent) will be given a C(token). The token itself is not needed here.
      - Where it gets neither that nor a file, the token of an earlier run must be on the node.
    type: bool
    default: false
  listen:
    description:
      - V(start) leaves a responder behind, in a process of its own, on those of the mesh's UDP ports that are free.
      - V(stop) ends it.
      - In both cases the other nodes are not asked, as their responders may not be there.
    type: str
    choices:
      - start
      - stop
  listen_seconds:
    description:
      - Seconds after which the responder ends by itself.
    type: int
    default: 120
  nonce:
    description:
      - Any text that is the same on all nodes and new in each run. The responder answers nobody else.
      - Required with O(listen=start), and for asking responders.
    type: str
  targets:
    description:
      - The other nodes. This node itself is left out.
    type: list
    elements: dict
    suboptions:
      name:
        description:
          - Name of the node.
        type: str
        required: true
      address:
        description:
          - Address that WireGuard will send to.
        type: str
        required: true
      port:
        description:
          - UDP port of generation 0 on that node. The default is O(port).
        type: int
  targets_file:
    description:
      - File on the node with such a list in JSON, or a mesh document.
    type: path
  targets_src:
    description:
      - The same on the controller. It travels with the module and is gone after the task.
      - Better than O(targets) with many nodes, as it does not go through templates.
    type: path
  not_listening:
    description:
      - Names of nodes that have no responder, because both ports are in use there. RV(listener.ports) was empty on them.
      - Their ports are not judged, and the size of packets is measured with ICMP echo requests.
    type: list
    elements: str
    default: []
  timeout:
    description:
      - Seconds after which what was not found out about other nodes stays unknown.
    type: float
    default: 20
  fail_on_error:
    description:
      - Whether the task fails if there are errors among the findings.
      - With V(false) a playbook can collect the findings of all nodes before it stops.
    type: bool
    default: false
seealso:
  - module: kubemesh.wireguard.agent
  - module: kubemesh.wireguard.probe
  - plugin: kubemesh.wireguard.findings_table
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Look at one node
  kubemesh.wireguard.preflight:
    node: worker-1
    fail_on_error: true

- name: Look at all nodes and leave responders
  kubemesh.wireguard.preflight:
    node: "{{ inventory_hostname }}"
    listen: start
    nonce: "{{ run_nonce }}"
  register: looked

- name: Look at what lies between them
  kubemesh.wireguard.preflight:
    node: "{{ inventory_hostname }}"
    local_checks: false
    nonce: "{{ run_nonce }}"
    targets:
      - name: worker-1
        address: 198.18.0.11
      - name: worker-2
        address: 198.18.0.12
  register: measured

- name: End the responders
  kubemesh.wireguard.preflight:
    node: "{{ inventory_hostname }}"
    local_checks: false
    listen: stop

- name: One table of all findings
  ansible.builtin.debug:
    msg: "{{ findings | kubemesh.wireguard.findings_table }}"
  vars:
    findings: "{{ ansible_play_hosts | map('extract', hostvars) | map(attribute='looked.findings') | flatten }}"
  run_once: true
"""

RETURN = r"""
findings:
  description: What stands in the way, errors first.
  returned: success
  type: list
  elements: dict
  contains:
    level:
      description: V(error) for what would lose packets, lock somebody out or damage what belongs to others, else V(warning).
      type: str
      sample: error
    check:
      description: What was looked at.
      type: str
      sample: port
    node:
      description: Name of this node.
      type: str
      sample: worker-1
    value:
      description: The value that is wrong.
      type: str
      sample: "51840"
    message:
      description: What is wrong.
      type: str
      sample: UDP port 51840 is taken by the WireGuard device wg0
    remedy:
      description: What to do about it.
      type: str
      sample: stop that, or set mesh_port so that it and the next one are free on all nodes
  sample: []
error_count:
  description: Number of errors among RV(findings).
  returned: success
  type: int
  sample: 0
warning_count:
  description: Number of warnings among RV(findings).
  returned: success
  type: int
  sample: 1
data_path:
  description: Data path of the pods that was recognized. Null if none was.
  returned: with O(local_checks=true)
  type: str
  sample: Flannel
implementation:
  description: What can make the device here, V(kernel) or V(userspace). Null if nothing can.
  returned: with O(local_checks=true)
  type: str
  sample: kernel
listener:
  description: The responder on this node.
  returned: success
  type: dict
  contains:
    running:
      description: Whether there is one after this task.
      type: bool
      sample: true
    ports:
      description: UDP ports that it answers on. A port that is missing is in use, maybe by the mesh itself.
      type: list
      elements: int
      sample: [51840, 51841]
  sample: {"running": true, "ports": [51840, 51841]}
target_count:
  description: Number of other nodes that were asked.
  returned: when other nodes are asked
  type: int
  sample: 4
reached_count:
  description: Number of other nodes that answered.
  returned: when other nodes are asked
  type: int
  sample: 4
path_mtus:
  description: Bytes that the narrowest way to another node carries, and which node that is, for each address family.
  returned: when other nodes are asked
  type: dict
  sample: {"ipv4": {"mtu": 1500, "node": "worker-2"}}
mesh_mtu:
  description:
    - MTU for the mesh device in bytes. It is what the narrowest way carries less WireGuard's overhead of 60 bytes over IPv4 and 80 over
      IPv6, and never below 1280.
    - Null if nothing was measured.
  returned: when other nodes are asked
  type: int
  sample: 1440
msg:
  description: The result as one line.
  returned: always
  type: str
  sample: "worker-1: 0 errors, 1 warnings"
"""

import json
import random
import socket
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _preflight, _preflight_facts, _underlay
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    FAMILIES,
    PORT_MAX,
    MeshError,
    canonical_address,
    canonical_cidr,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import check_settings
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_sysctl, read_text

LISTEN_SECONDS_MOST = 3600  # a forgotten responder must not stay for days


def settings_of(params, data):
    """The settings that findings are judged by, checked; ``data`` as `read_targets` returns it."""
    check_settings(params)
    if not 1 <= params["port"] < PORT_MAX:
        raise MeshError("port: %d is not a UDP port below %d; the next one is used as well" % (params["port"], PORT_MAX))
    if params["timeout"] <= 0 or not 1 <= params["listen_seconds"] <= LISTEN_SECONDS_MOST:
        raise MeshError("timeout and listen_seconds must be above 0, and listen_seconds at most %d" % LISTEN_SECONDS_MOST)
    entry = data["nodes"].get(params["node"]) if isinstance(data, dict) and isinstance(data.get("nodes"), dict) else None
    known = {name: params[name] if params[name] is not None else (entry or {}).get(name, []) for name in ("pod_cidrs", "node_addresses")}
    names = ("node", "interface", "table", "rule_priority", "fwmark", "encrypt", "pod_source", "implementation", "persistence", "mtu")
    agent = None
    if params["agent_ca_file"]:
        agent = {"paths": {"ca_file": params["agent_ca_file"], "token_file": params["agent_token_file"]},
                 "token_given": params["agent_token_given"]}
    return dict({name: params[name] for name in names}, agent=agent, ports=[params["port"], params["port"] + 1],
                pod_cidrs=[canonical_cidr(text) for text in known["pod_cidrs"]],
                node_addresses=[canonical_address(text) for text in known["node_addresses"]])


def read_targets(params):
    """The list or the mesh document that was given; None if none was."""
    if not params["targets_file"]:
        return params["targets"]
    text = read_text(params["targets_file"])
    if text is None:
        raise MeshError("targets_file: %s is not there" % params["targets_file"])
    try:
        return json.loads(text)
    except ValueError as exc:
        raise MeshError("targets_file: %s is not JSON: %s" % (params["targets_file"], exc)) from None


def targets_of(params, data):
    """The other nodes: [{"name", "address", "ports"}], or None if there are none to be asked."""
    if data is None or params["listen"]:
        return None
    try:
        targets = _underlay.targets_of(data, params["node"])
    except (KeyError, TypeError, AttributeError) as exc:
        raise MeshError("targets: neither a list of names and addresses nor a mesh document (%r)" % exc) from None
    found, owners = [], {}
    for target in targets:
        try:
            address, port = canonical_address(target["address"]), int(target["port"] or params["port"])
        except (MeshError, ValueError, TypeError) as exc:
            raise MeshError("targets: node %s: %s" % (target["name"], exc)) from None
        if not 1 <= port < PORT_MAX:
            raise MeshError("targets: node %s: %d is not a UDP port below %d" % (target["name"], port, PORT_MAX))
        other = owners.setdefault((address, port), target["name"])
        if other != target["name"]:
            raise MeshError("targets: nodes %s and %s have the same address %s; correct mesh_endpoint or the Node objects" % (
                other, target["name"], address))
        found.append({"name": target["name"], "address": address, "ports": [port, port + 1]})
    return found


def listen(module, settings):
    """Start or stop the responder -> {"running", "ports"}."""
    params = module.params
    if params["listen"] == "stop" and not module.check_mode:
        _underlay.stop_responder()
    if params["listen"] == "start" and not module.check_mode:
        _underlay.stop_responder()
        families = [family for family in FAMILIES if family == "ipv4" or read_sysctl("net/ipv6/bindv6only") is not None]
        sockets, ports = _underlay.open_responder(settings["ports"], families, settings["fwmark"])
        if sockets:
            kept = [port if port in ports else 0 for port in settings["ports"]]
            _underlay.start_responder(sockets, _underlay.digest_of(params["nonce"]), kept, params["listen_seconds"])
    running = _underlay.running_responder()
    return {"running": running is not None, "ports": running["ports"] if running else []}


def ask(module, settings, targets):
    """Ask the other nodes -> (part of the result, findings)."""
    params = module.params
    quiet = set(params["not_listening"])
    digest = _underlay.digest_of(params["nonce"] or "")
    asked = []
    for target in targets:
        judged = not module.check_mode and target["name"] not in quiet
        address = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, target["address"])) \
            if ":" in target["address"] else target["address"]
        asked.append(dict(target, address=address, judged=judged, family=_underlay.family_of(address),
                          keys=[(address, port) for port in target["ports"]] if judged else [(address, "icmp")]))
    start = time.monotonic()
    schedule = _underlay.UnderlaySchedule(asked, start, random.Random())  # noqa: S311 - spreads packets, protects nothing
    askers = {}
    try:
        for target in asked:
            kind = (target["family"], "udp" if target["judged"] else "icmp")
            if kind not in askers:
                askers[kind] = _underlay.Asker(kind[0], kind[1], digest, settings["fwmark"])
        _underlay.run(schedule, askers, start + params["timeout"])
    except OSError as exc:
        raise MeshError("node %s: the other nodes cannot be asked: %s; run this task as root (become: true)" % (
            settings["node"], exc.strerror)) from exc
    finally:
        for asker in askers.values():
            asker.close()
    results = schedule.results()
    verdicts = {target["name"]: _underlay.judge(target, target["ports"], results[target["name"]]) for target in asked if target["judged"]}
    least = _preflight.least_path_mtus(asked, results)
    return {
        "target_count": len(asked),
        "reached_count": sum(1 for result in results.values() if result["reached"]),
        "path_mtus": {family: {"mtu": size, "node": name} for family, (size, name) in least.items()},
        "mesh_mtu": _underlay.recommended_mtu({family: size for family, (size, dummy) in least.items()}),
    }, list(_preflight.underlay_findings(settings, asked, verdicts, results))


def implementation_of(facts, wanted):
    """What would make the device: ``kernel``, ``userspace`` or None."""
    found = facts["wireguard"]
    if wanted != "userspace" and found["kernel"]:
        return "kernel"
    return "userspace" if wanted != "kernel" and found["userspace"] and found["tun"] else None


def run(module):
    """-> the result of the module."""
    params = module.params
    data = read_targets(params)
    settings = settings_of(params, data)
    targets = targets_of(params, data)
    if not params["nonce"] and (params["listen"] == "start" or (targets and not module.check_mode)):
        raise MeshError("nonce: needed to start a responder and to ask those of other nodes; give all nodes the same new text in each run")
    result, found = {"changed": False}, []
    if params["local_checks"]:
        facts = _preflight_facts.read_facts(System(module), settings)
        found += _preflight.findings(facts, settings)
        path = _preflight.data_path(facts)
        result.update(data_path=path["name"] if path else None, implementation=implementation_of(facts, params["implementation"]))
    elif settings["agent"] is not None:
        found += _preflight.agent_findings(_preflight_facts.read_agent_facts(System(module), settings), settings)
    result["listener"] = listen(module, settings)
    if targets is not None:
        part, between = ask(module, settings, targets)
        result.update(part)
        found += between
    counts = {level: sum(1 for item in found if item["level"] == level) for level in _preflight.LEVELS}
    result.update(findings=found, error_count=counts["error"], warning_count=counts["warning"],
                  msg="%s: %d errors, %d warnings" % (params["node"], counts["error"], counts["warning"]))
    return result


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "local_checks": {"type": "bool", "default": True},
            "interface": {"type": "str", "default": "wgmesh"},
            "port": {"type": "int", "default": 51840},
            "table": {"type": "int", "default": 51840},
            "rule_priority": {"type": "int", "default": 400},
            "fwmark": {"type": "int", "default": 4096},
            "encrypt": {"type": "str", "choices": ["pods", "nodes"], "default": "pods"},
            "pod_source": {"type": "str", "choices": ["node_cidrs", "pods", "calico_ipam", "cilium"], "default": "node_cidrs"},
            "implementation": {"type": "str", "choices": ["auto", "kernel", "userspace"], "default": "auto"},
            "persistence": {"type": "str", "choices": ["auto", "wg-quick", "systemd-networkd", "none"], "default": "auto"},
            "mtu": {"type": "int"},
            "pod_cidrs": {"type": "list", "elements": "str"},
            "node_addresses": {"type": "list", "elements": "str"},
            "agent_ca_file": {"type": "path"},
            "agent_token_file": {"type": "path", "no_log": False},
            "agent_token_given": {"type": "bool", "default": False},
            "listen": {"type": "str", "choices": ["start", "stop"]},
            "listen_seconds": {"type": "int", "default": 120},
            "nonce": {"type": "str"},
            "targets": {"type": "list", "elements": "dict", "options": {
                "name": {"type": "str", "required": True},
                "address": {"type": "str", "required": True},
                "port": {"type": "int"},
            }},
            "targets_file": {"type": "path"},
            # The action part takes it; it is here for the documentation and for checks of the arguments.
            "targets_src": {"type": "path"},
            "not_listening": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 20},
            "fail_on_error": {"type": "bool", "default": False},
        },
        required_by={"agent_token_file": ("agent_ca_file",)},
        mutually_exclusive=[("targets", "targets_file", "targets_src")],
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    if module.params["fail_on_error"] and result["error_count"]:
        worst = next(item for item in result["findings"] if item["level"] == "error")
        result["msg"] += ". %s; %s" % (worst["message"], worst["remedy"])
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
