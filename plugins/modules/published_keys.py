#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: published_keys
short_description: The public keys of a mesh as annotations of the Node objects
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Writes the public keys of the mesh document to the Node objects of the cluster, as annotations
    C(kubemesh.wireguard/public-key-0) and C(kubemesh.wireguard/public-key-1), one for each generation of keys, and takes them away again.
    M(kubemesh.wireguard.peers) reads them there, so that a run that sees only a part of the hosts knows the keys of the others.
  - Only Nodes whose annotations differ are written. Each write names the uid of the Node, so one that was deleted and added again
    under the same name in the meantime is not given the key of the old one.
  - A Node that the mesh document does not have is left alone.
  - Runs on the controller with O(source=kubernetes), and with O(source=kubectl) on the host that the task is delegated to. It needs the
    right to C(get), C(list) and C(patch) Nodes, see the guide.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
attributes:
  check_mode:
    support: full
    details:
      - Reads the Nodes and writes nothing.
      - In a run of the role the key of a node that has none yet is shown as another one, as it is made by the node itself.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - for O(source=kubernetes) the collection kubernetes.core and the Python library kubernetes on the controller
  - for O(source=kubectl) kubectl 1.20 or newer and Python 3.8 or newer on that host
options:
  state:
    description:
      - V(present) makes the annotations what the mesh document says. Where it has no key of one of the O(generations), the annotation is
        removed.
      - V(absent) takes the annotations from all Nodes, if any of the Nodes is one of the mesh document, by its uid. Else it is another
        cluster, and the task fails.
    type: str
    choices: [present, absent]
    default: present
  document:
    description:
      - Files on the controller with mesh documents, as M(kubemesh.wireguard.peers) writes them. The one with the highest serial counts.
    type: list
    elements: path
    required: true
  generations:
    description:
      - Generations of keys that are looked at. Annotations of others stay as they are.
    type: list
    elements: int
    choices: [0, 1]
    default: [0, 1]
  source:
    description:
      - How the cluster is reached.
      - V(kubernetes) asks the API from the controller, through the collection kubernetes.core. Credentials of the environment
        (C(K8S_AUTH_*), as AWX sets them) count where O(kubeconfig) is not given.
      - V(kubectl) runs O(kubectl_command) on the host that the task is for, so delegate the task to a control plane host.
    type: str
    choices: [kubernetes, kubectl]
    default: kubernetes
  kubeconfig:
    description:
      - Kubeconfig on the controller. By default C(K8S_AUTH_KUBECONFIG), C(KUBECONFIG) or C(~/.kube/config), whichever is there.
      - Beside it nothing of C(K8S_AUTH_*) in the environment counts, but for proxies.
    type: path
  context:
    description:
      - Context in the kubeconfig. By default C(K8S_AUTH_CONTEXT), where O(kubeconfig) is not given, or the current one.
    type: str
  kubectl_command:
    description:
      - How kubectl is called on that host, as a list.
    type: list
    elements: str
    default: [kubectl]
  required:
    description:
      - Whether the task fails when not all that differs could be written. With V(false) that is one warning, and RV(problem) tells it.
    type: bool
    default: true
  wanted:
    description:
      - What the document says of each node. The action part sets it.
    type: dict
notes:
  - The first Node is written alone, and the others by a few at a time. When the API refuses the first ones, refuses more than ten, or
    cannot be reached, the rest is not tried.
seealso:
  - module: kubemesh.wireguard.peers
"""

EXAMPLES = r"""
- name: Publish the keys of a mesh document
  kubemesh.wireguard.published_keys:
    document: [./mesh.json]
    kubeconfig: ~/.kube/production
  delegate_to: localhost
  run_once: true

- name: The same, with kubectl on a control plane host
  kubemesh.wireguard.published_keys:
    document: [./mesh.json]
    source: kubectl
    kubectl_command: [kubectl, --kubeconfig, /etc/kubernetes/admin.conf]
  delegate_to: "{{ groups['kube_control_plane'] | first }}"
  become: true
  run_once: true

- name: Take them away
  kubemesh.wireguard.published_keys:
    document: [./mesh.json]
    state: absent
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
nodes:
  description: How many Nodes were written, or would be in check mode.
  returned: always
  type: int
  sample: 3
changes:
  description: Annotations as they were and as they are, for people; at most 200 lines.
  returned: always
  type: list
  elements: str
  sample: ["+ node worker-1, kubemesh.wireguard/public-key-0: 6Jk0cRK7xZyK0M4fO+uXkqWlnzCEPJtPG1FEJg8bDhw="]
replaced:
  description: Nodes that were deleted, or deleted and added again, while this module was at work. They are not written.
  returned: always
  type: list
  elements: str
  sample: [worker-7]
problem:
  description: Why not all that differs could be written, and what helps; else empty.
  returned: always
  type: str
  sample: ""
"""

import json
import re
import subprocess

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _published_keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

# Read by the action plugin too.
ARGUMENT_SPEC = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "document": {"type": "list", "elements": "path", "required": True},
    "generations": {"type": "list", "elements": "int", "choices": [0, 1], "default": [0, 1]},
    "source": {"type": "str", "choices": ["kubernetes", "kubectl"], "default": "kubernetes"},
    "kubeconfig": {"type": "path"},
    "context": {"type": "str"},
    "kubectl_command": {"type": "list", "elements": "str", "default": ["kubectl"]},
    "required": {"type": "bool", "default": True},
    "wanted": {"type": "dict"},
}

# kubectl is a process of some 50 MB for each Node: as many at once as a small control plane host has processors.
WORKERS = 4
# Seconds in which kubectl, which limits each of its requests by itself, must have ended
KUBECTL_TIMEOUT = 4 * _published_keys.REQUEST_TIMEOUT
# Characters of what kubectl said: its message is at the end
STDERR_MAX = 1000
# Lines of its log (klog) come before that: I, W, E or F, month and day.
_LOG_LINE = re.compile(r"^[IWEF]\d{4} .*\n?", re.MULTILINE)


class KubectlError(Exception):
    """kubectl failed; ``result`` is like that of the command module."""

    def __init__(self, result):
        super().__init__(result["stderr"])
        self.result = result


def kubectl(command, words):
    """What kubectl prints. Raises `KubectlError`."""
    argv = command + ["--request-timeout=%ds" % _published_keys.REQUEST_TIMEOUT] + words
    try:
        # AnsibleModule.run_command knows no limit of time. pylint: disable-next=ansible-bad-function
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=KUBECTL_TIMEOUT, check=False)
    except OSError as exc:
        # as the command module says it
        raise KubectlError({"rc": exc.errno, "msg": "Error executing command: %s" % exc, "stderr": ""}) from None
    except subprocess.TimeoutExpired:
        raise KubectlError({"rc": None, "msg": "", "stderr": "no answer within %d seconds" % KUBECTL_TIMEOUT}) from None
    if done.returncode != 0:
        said = _LOG_LINE.sub("", done.stderr.decode("utf-8", "replace")).strip()
        raise KubectlError({"rc": done.returncode, "msg": "", "stderr": said[-STDERR_MAX:]})
    return done.stdout


def read_nodes(command):
    """Nodes as kubectl lists them. Raises `KubectlError` and `MeshError`."""
    output = kubectl(command, ["get", "nodes", "-o", "json"])
    try:
        listing = json.loads(output)
    except ValueError as exc:
        raise MeshError("the output of %s get nodes -o json is no JSON (%s)" % (" ".join(command), exc)) from None
    return _published_keys.nodes_read(_membership.node_items(listing)[0])


def sender(command):
    """-> function(patch) as `_published_keys.apply_patches` takes it."""
    def send(patch):
        body = json.dumps(_published_keys.body_of(patch))
        try:
            kubectl(command, ["patch", "node", patch["node"], "--type=merge", "-p", body])
        except KubectlError as exc:
            return _published_keys.kubectl_verdict(exc.result["rc"], exc.result["stderr"]), exc.result
        return _published_keys.DONE, None

    return send


def main():
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    if params["wanted"] is None or params["source"] != "kubectl":
        module.fail_json(msg="kubemesh.wireguard.published_keys needs its action plugin, and was started as a module on a host. Call it by"
                             " its full name as a task of a playbook or with the ansible command, and keep plugins/action of the"
                             " collection installed.")
    command = params["kubectl_command"]
    try:
        nodes = read_nodes(command)
        patches = _published_keys.plan(params["state"], params["wanted"], nodes, [str(number) for number in params["generations"]])
        outcome = None if module.check_mode else _published_keys.apply_patches(patches, sender(command), WORKERS)
    except KubectlError as exc:
        module.exit_json(changed=False, unread=exc.result)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    # What was changed, and the difference, is told by the action part.
    module.exit_json(changed=False, patches=patches, outcome=outcome)


if __name__ == "__main__":
    main()
