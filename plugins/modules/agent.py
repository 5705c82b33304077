#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: agent
short_description: The node agent that keeps the mesh up to the cluster's list of nodes
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Installs a small service on the node, or removes it. The service follows the Nodes of the Kubernetes API, and brings what changes into
    the peers of the mesh device and into the routes, within fractions of a second and without a run of a playbook. It also repairs what
    somebody else changed in the kernel.
  - It begins with the mesh document that M(kubemesh.wireguard.document) put on the node, and does nothing while a run of the playbooks
    holds the lock of the node.
  - A peer that is new is proven through the tunnel before anything is sent to it. A peer is removed only when the API's list was complete
    and without it for O(grace).
  - Where M(kubemesh.wireguard.guard) is in force, the agent keeps its sets up to the nodes that come and go, and mends its table. Whether
    there is a guard, and what it spares, is what the last run left in the guard's file.
  - It needs nothing but Python's standard library, iproute2, and nftables where there is a guard. It has a user of its own, and no
    capability but C(CAP_NET_ADMIN). Where WireGuard is a userspace implementation it runs as root with that one capability, as the control
    socket of the device is root's.
  - Removing it changes nothing in the kernel. The mesh stays as it is.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - That the token changes is told, neither the old one nor the new one.
  idempotent:
    support: full
requirements:
  - systemd, with systemd-sysusers and systemd-tmpfiles
options:
  state:
    description:
      - Whether the agent shall be there, and running.
    type: str
    choices:
      - present
      - absent
    default: present
  node:
    description:
      - Name of the Node object of this host. Needed for O(state=present).
    type: str
  server:
    description:
      - Address of the API server as this node reaches it. Needed for O(state=present).
    type: str
  ca_file:
    description:
      - File on the node with the CA of the API server. It must be readable for the user C(kubemesh-agent), which is checked before
        anything is changed. The service sees nothing below C(/home), C(/root) and C(/tmp).
    type: path
    default: /etc/kubernetes/pki/ca.crt
  token:
    description:
      - Bearer token of a ServiceAccount that may read Nodes. It is written to O(token_file)'s default place, readable for the agent only.
    type: str
  token_file:
    description:
      - File on the node that somebody else keeps up to date with the token. It is read for every request, and must be readable for the user
        C(kubemesh-agent), which is checked before anything is changed. Not together with O(token).
    type: path
  interface:
    description:
      - Stem of the names of the mesh devices.
    type: str
    default: wgmesh
  grace:
    description:
      - Seconds for which the API's list must be complete and without a node before that is taken for gone.
    type: int
    default: 60
  table:
    description:
      - First routing table of the mesh, as for M(kubemesh.wireguard.routes).
    type: int
    default: 51840
  rule_priority:
    description:
      - Priority of the first rule, as for M(kubemesh.wireguard.routes).
    type: int
    default: 400
  fwmark:
    description:
      - Mark on the packets of WireGuard itself.
    type: int
    default: 4096
  exempt_cidrs:
    description:
      - Node addresses in these prefixes are not reached through the mesh.
    type: list
    elements: str
    default: []
  pod_source:
    description:
      - Where the addresses of pods come from, as for M(kubemesh.wireguard.peers). With anything but V(node_cidrs) the agent follows Pods,
        or Calico's or Cilium's objects as well, and its account needs the right to list and watch them.
    type: str
    choices:
      - node_cidrs
      - pods
      - calico_ipam
      - cilium
    default: node_cidrs
  exclude_nodes:
    description:
      - Nodes that are not to be part of the mesh.
    type: list
    elements: str
    default: []
  service_cidrs:
    description:
      - Service ranges of the cluster, checked for overlaps.
    type: list
    elements: str
    default: []
seealso:
  - module: kubemesh.wireguard.document
  - module: kubemesh.wireguard.interface
  - module: kubemesh.wireguard.routes
  - module: kubemesh.wireguard.mesh_info
"""

EXAMPLES = r"""
- name: Keep the mesh of this node up by itself
  kubemesh.wireguard.agent:
    node: worker-1
    server: https://192.0.2.10:6443
    token: "{{ vault_agent_token }}"

- name: Remove the agent, and leave the mesh as it is
  kubemesh.wireguard.agent:
    state: absent
"""

RETURN = r"""
api:
  description:
    - What the agent says of the API server, up to 10 seconds after it was installed or changed. V(watching) when it follows the list of
      nodes, else what is in the way, which is a warning as well. Nothing when it has not said anything.
  returned: when something was changed for O(state=present), and not in check mode
  type: str
  sample: watching
restarted:
  description: Whether the service was started again, or would be in check mode, because its program or its settings changed.
  returned: when O(state=present)
  type: bool
  sample: false
steps:
  description: What was done, or would be done in check mode.
  returned: always
  type: list
  elements: str
  sample: ["write file /etc/kubemesh/agent.json"]
"""

import sys

from ansible.module_utils.basic import AnsibleModule

# The agent is not run here, but what a module imports is what Ansible brings to the node.
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent, _agent_inputs, _agent_install, _agent_plan, _kube_api
from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import generations_of, link_from_ip
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes import device_units
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_text


def configuration(params):
    """The agent's configuration as text, checked as the agent will check it."""
    # It goes into the unit and the configuration; a line of a header is what a token becomes.
    fault = _kube_api.token_fault(params["token"])
    if fault:
        raise MeshError(fault)
    own = ("node", "server", "ca_file", "interface", "table", "rule_priority", "fwmark", "exempt_cidrs", "exclude_nodes", "service_cidrs",
           "grace", "pod_source")
    config = {name: params[name] for name in own}
    config.update({
        "token_file": params["token_file"] or _agent_install.TOKEN_FILE, "document_file": "/etc/kubemesh/mesh.json",
        "boot_folder": "/etc/kubemesh", "lock_file": _agent_install.LOCK_FOLDER + "/lock.json", "runtime": _agent_install.RUNTIME,
        "state": _agent_install.STATE, "metrics_file": _agent_install.METRICS_FILE})
    if not params["server"].startswith("https://"):
        raise MeshError("server: %s has no TLS, and a token is never sent in clear; use https" % shown(params["server"]))
    _kube_api.KubeClient(config["server"], config["ca_file"], config["token_file"])
    text = _agent_plan.config_text(config)
    _agent_plan.parse_config(text)
    return text


def is_userspace(system, interface):
    """Whether the mesh device is that of a userspace implementation."""
    links = [link_from_ip(system.link(interface + generation), []) for generation in "01"]
    return any(link is not None and link["kind"] == "tun" for link in links)


def present(module, system):
    """-> (steps, result)."""
    params = module.params
    text = configuration(params)
    as_root = is_userspace(system, params["interface"])
    paths = {option: params[option] for option in ("ca_file", "token_file")}
    faults = _agent_inputs.input_faults(_agent_inputs.read_inputs(paths), paths, bool(params["token"]), as_root)
    if faults:
        raise MeshError("\n".join("%s; %s" % (fault["message"], fault["remedy"]) for fault in faults))
    files = _agent_install.program_files(_agent_install.source_of, _agent.__name__)
    devices = device_units(generations_of(params["interface"] + "0"))
    python = sys.executable or "/usr/bin/python3"
    steps = _agent_install.plan_present(text, params["token"], python, as_root, devices, files)
    unit = system.unit(_agent_install.UNIT)
    if _agent_install.identity() is None:
        steps.append({"op": "add_user", "path": _agent_install.USER})
    # A token is read again by itself, but who was refused with the old one waits before it tries again, for half a minute by then.
    said = _agent_plan.parse_state(read_text(_agent_install.STATE_FILE) or "")
    works = said is not None and said["api"] == _agent_plan.WATCHING
    restart = any(step["op"] != "write_token" for step in steps) or (bool(steps) and not works)
    if not (unit["enabled"] and unit["active"] and system.unit(_agent_install.GUARD_UNIT)["enabled"]):
        steps.append({"op": "start_unit", "path": _agent_install.UNIT})
    result = {"restarted": restart}
    if steps and not module.check_mode:
        _agent_install.apply_present(system, steps, params["token"], files, restart)
        result["api"] = _agent_install.wait_for_api()
        warning = _agent_plan.api_warning(result["api"], params["node"], params["server"])
        if warning:
            module.warn(warning)
    return steps, result


def absent(module, system):
    """-> (steps, result)."""
    steps = _agent_install.plan_absent()
    if steps and not module.check_mode:
        _agent_install.apply_absent(system, steps)
    return steps, {}


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "node": {"type": "str"},
            "server": {"type": "str"},
            "ca_file": {"type": "path", "default": "/etc/kubernetes/pki/ca.crt"},
            "token": {"type": "str", "no_log": True},
            "token_file": {"type": "path", "no_log": False},
            "interface": {"type": "str", "default": "wgmesh"},
            "grace": {"type": "int", "default": 60},
            "table": {"type": "int", "default": 51840},
            "rule_priority": {"type": "int", "default": 400},
            "fwmark": {"type": "int", "default": 4096},
            "exempt_cidrs": {"type": "list", "elements": "str", "default": []},
            "pod_source": {"type": "str", "choices": ["node_cidrs", "pods", "calico_ipam", "cilium"], "default": "node_cidrs"},
            "exclude_nodes": {"type": "list", "elements": "str", "default": []},
            "service_cidrs": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[("state", "present", ("node", "server"))],
        mutually_exclusive=[("token", "token_file")],
        supports_check_mode=True,
    )
    try:
        steps, result = (present if module.params["state"] == "present" else absent)(module, System(module))
    except (MeshError, OSError) as exc:
        module.fail_json(msg=str(exc))
    result.update(changed=bool(steps), steps=["%s %s" % (step["op"].replace("_", " "), step["path"]) for step in steps])
    if module._diff:
        result["diff"] = [{
            "before_header": step["path"], "after_header": step["path"], "before": step.get("before") or "",
            "after": step.get("after", "") if "before" in step else "%s\n" % step["op"].replace("_", " "),
        } for step in steps]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
