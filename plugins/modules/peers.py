#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: peers
short_description: Compute the mesh document from Kubernetes nodes and public keys
version_added: 1.0.0
description:
  - Reads the node list of a cluster, validates it together with the public keys that the nodes reported, and makes the mesh document out
    of it. The document holds public facts only, is the same for every node, and every node computes its own peers, addresses and routes
    from it.
  - Runs on the controller, whatever host the task is for. Only with O(source=kubectl) does it run a command on a host, the one that the
    task is delegated to.
  - Who belongs to the mesh is decided by the cluster's node list, never by the hosts of the play. A node of the last document vanishes only
    when the node list is known to be complete and no longer has it, or when O(forget_nodes) names it.
  - The public key of a node comes from what the node reported in this run (O(facts_variable)), else from its annotations
    C(kubemesh.wireguard/public-key-0) and C(kubemesh.wireguard/public-key-1), else from the last document. A key that changes without
    O(expect_new_keys) is reported as a warning.
  - Everything wrong with nodes, addresses, CIDRs and keys is collected and reported in one error, before anything is changed.
  - Values from the cluster are data. They are validated, and nothing that this module returns is ever templated.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
attributes:
  check_mode:
    support: full
    details:
      - Computes everything and does not write O(dest).
  diff_mode:
    support: full
    details:
      - Shows in words what differs from the last document.
  idempotent:
    support: full
requirements:
  - netaddr and jmespath on the controller
  - for O(source=kubernetes) the collection kubernetes.core and the Python library kubernetes on the controller
options:
  source:
    description:
      - Where the node list comes from.
      - V(kubernetes) asks the API from the controller, through the collection kubernetes.core. Credentials of the environment
        (C(K8S_AUTH_*), as AWX sets them) count where O(kubeconfig) is not given.
      - V(kubectl) runs O(kubectl_command) on the host that the task is for, so delegate the task to a control plane host.
      - V(file) reads O(nodes_file).
      - V(inventory) takes the hosts that have the variables C(mesh_pod_cidrs) or C(mesh_node_addresses).
      - V(auto) takes O(nodes) or O(nodes_file) where given, else V(kubernetes) where the controller has a kubeconfig, else V(kubectl)
        where there is an O(kubectl_host), else V(inventory). RV(source) and RV(source_reason) say which.
    type: str
    choices: [auto, kubernetes, kubectl, file, inventory]
    default: auto
  nodes:
    description:
      - The node list itself, instead of a O(source).
      - Node objects as the API returns them, or short descriptions with C(name) and any of C(uid), C(excluded), C(pod_cidrs),
        C(node_addresses), C(endpoint) and C(public_keys) (a dictionary by generation).
    type: list
    elements: dict
  nodes_file:
    description:
      - File on the controller with a saved node list, as C(kubectl get nodes -o json) or C(-o yaml) prints it.
    type: path
  nodes_complete:
    description:
      - Whether the node list has all nodes of the cluster, so that nodes it does not have leave the mesh.
      - By default this is so for V(kubernetes) and V(kubectl), for V(file) unless it is one page of a longer list, and not for
        V(inventory) and O(nodes).
    type: bool
  kubeconfig:
    description:
      - Kubeconfig on the controller. By default C(K8S_AUTH_KUBECONFIG), C(KUBECONFIG) or C(~/.kube/config), whichever is there.
      - Beside it nothing of C(K8S_AUTH_*) in the environment counts, but for proxies.
    type: path
  context:
    description:
      - Context in the kubeconfig. By default C(K8S_AUTH_CONTEXT), where O(kubeconfig) is not given, or the current one.
    type: str
  kubectl_host:
    description:
      - The host that kubectl runs on, by default the first one of the group C(kube_control_plane), of those in O(hosts) if
        any is. The task has to be delegated to it.
    type: str
  kubectl_command:
    description:
      - How kubectl is called on that host, as a list.
    type: list
    elements: str
    default: [kubectl]
  hosts:
    description:
      - The inventory hosts that may be nodes. Their variables C(mesh_node_name), C(mesh_endpoint), C(mesh_keepalive), C(mesh_mtu),
        C(mesh_pod_cidrs), C(mesh_node_addresses) and O(facts_variable) are read, of hosts outside of C(--limit) too.
      - By default all hosts of the inventory. Where an inventory has several clusters, name the hosts of this one.
      - A host whose name (or C(mesh_node_name)) is not the name of a node is left aside.
    type: list
    elements: str
  facts_variable:
    description:
      - Name of the variable that holds what a node reported in this run, as a dictionary with C(public_keys) (by generation), C(mtu) and
        C(document) (with C(serial) and C(sha256) of the mesh document it keeps). It is never templated.
    type: str
    default: mesh_node_facts
  info_variable:
    description:
      - Name of the variable that holds what M(kubemesh.wireguard.mesh_info) returned of a node in this run. It is never templated.
      - An annotation with a key of a generation of which nothing is on its node, and which the last document does not have either, does not
        count then. It is left over from a run that could not remove it.
      - A host whose mesh device has the key that the last document gives to another node of the mesh is refused, because then hosts are
        mixed up in the inventory.
    type: str
  previous:
    description:
      - Files on the controller with last mesh documents, as fetched from nodes. The one with the highest serial counts. Files that do not
        exist are skipped.
      - By default O(dest), if it exists.
    type: list
    elements: path
  node_addresses_query:
    description:
      - JMESPath expression for the addresses of a Node object. The first of each family is the one the node's mesh device carries.
    type: str
    default: status.addresses[?type=='InternalIP'].address
  pod_cidrs_query:
    description:
      - JMESPath expression for the pod CIDRs of a Node object.
    type: str
    default: spec.podCIDRs || [spec.podCIDR]
  pod_source:
    description:
      - Where the prefixes of each node's pods come from.
      - V(node_cidrs) takes O(pod_cidrs_query) of the Node objects.
      - V(pods) takes the addresses of all pods that are not on the host's network, merged to as few prefixes as cover exactly them.
      - V(calico_ipam) takes the blocks of Calico's own IPAM (BlockAffinity objects of C(crd.projectcalico.org)), and what one node borrowed
        from the block of another (IPAMBlock objects) as single addresses.
      - V(cilium) takes the CIDRs and addresses of CiliumNode objects (C(cilium.io)).
      - With O(source=file) and with O(nodes) these objects are expected in the same list. With O(source=inventory) there are none, and it
        is refused.
      - The variable C(mesh_pod_cidrs) of a host counts more.
    type: str
    choices: [node_cidrs, pods, calico_ipam, cilium]
    default: node_cidrs
  endpoint_query:
    description:
      - JMESPath expression for the addresses, with or without port, at which other nodes reach this one. Empty means the node's addresses.
    type: str
    default: ''
  excluded_query:
    description:
      - JMESPath expression that is true for nodes that are not to be part of the mesh. Nodes that run Windows never are.
    type: str
    default: metadata.annotations."kubemesh.wireguard/excluded"
  service_cidrs:
    description:
      - Service CIDRs of the cluster, checked against pod CIDRs, node addresses and endpoints.
    type: list
    elements: str
    default: []
  forget_nodes:
    description:
      - Names of nodes that are gone, when the node list is not known to be complete.
    type: list
    elements: str
    default: []
  exclude_nodes:
    description:
      - Names of nodes that are in the cluster and not to be part of the mesh.
    type: list
    elements: str
    default: []
  port:
    description:
      - UDP port of generation 0. Generation 1 uses the next.
    type: int
    default: 51840
  generations:
    description:
      - Generations of keys that the document may hold. Leaving one out withdraws its keys.
    type: list
    elements: int
    choices: [0, 1]
    default: [0, 1]
  current_generation:
    description:
      - The generation that traffic goes through, or shall go through when the rollout is done.
      - By default that of the last document, and V(0) in the first one.
    type: int
    choices: [0, 1]
  expect_new_keys:
    description:
      - Whether public keys are meant to change in this run, so that a change is not worth a warning.
    type: bool
    default: false
  dest:
    description:
      - File on the controller to write the document to, as canonical bytes and in one step.
    type: path
  node:
    description:
      - Also return what this node computes from the document, as RV(view).
    type: str
  generation:
    description:
      - The generation that RV(view) is about.
    type: int
    choices: [0, 1]
    default: 0
  return_document:
    description:
      - Return the whole document too. It is some 400 bytes per node.
    type: bool
    default: false
  discover:
    description:
      - Only say which O(source) would be used (RV(source), RV(delegate_to)) and which hosts keep the newest mesh document
        (RV(previous_hosts)), from what they reported. Nothing is read from the cluster.
    type: bool
    default: false
notes:
  - O(pod_source) other than V(node_cidrs) needs the right to list pods, or blockaffinities and ipamblocks, or ciliumnodes, besides nodes.
  - An unreachable API is only noticed after the client's own timeouts. Use the task keyword C(timeout) where that takes too long.
seealso:
  - module: kubemesh.wireguard.keypair
  - module: kubernetes.core.k8s_info
author:
  - Kubemesh contributors (@kubemesh)
"""

EXAMPLES = r"""
- name: Mesh document of the cluster that the controller's kubeconfig is for
  kubemesh.wireguard.peers:
    dest: ./mesh.json
  delegate_to: localhost
  run_once: true

- name: The same, with kubectl on a control plane host
  kubemesh.wireguard.peers:
    source: kubectl
    kubectl_command: [kubectl, --kubeconfig, /etc/kubernetes/admin.conf]
    service_cidrs: [10.96.0.0/12]
    dest: ./mesh.json
  delegate_to: "{{ groups['kube_control_plane'] | first }}"
  become: true
  run_once: true

- name: What one node would get, from a saved node list
  kubemesh.wireguard.peers:
    nodes_file: ./nodes.json
    node: worker-1
  delegate_to: localhost
  register: worker_1

- name: A cluster with Calico's own IPAM
  kubemesh.wireguard.peers:
    pod_source: calico_ipam
    dest: ./mesh.json
  delegate_to: localhost
  run_once: true

- name: Two machines without Kubernetes
  kubemesh.wireguard.peers:
    nodes:
      - name: alpha
        node_addresses: [198.18.0.11]
        pod_cidrs: [10.244.1.0/24]
        public_keys: {0: 6Jk0cRK7xZyK0M4fO+uXkqWlnzCEPJtPG1FEJg8bDhw=}
      - name: beta
        node_addresses: [198.18.0.12]
        pod_cidrs: [10.244.2.0/24]
        endpoint: 203.0.113.7:51840
        public_keys: {0: T3kLAMtk4Ch5xQjZ1P6cR8lUHd0aSxkz0gdN2bVnBmI=}
    dest: ./mesh.json
  delegate_to: localhost

- name: Nodes that were removed while only the inventory is known
  kubemesh.wireguard.peers:
    source: inventory
    forget_nodes: [worker-7]
    dest: ./mesh.json
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
serial:
  description: Serial of the document. It grows by one whenever anything else in the document changes.
  returned: unless O(discover=true)
  type: int
  sample: 7
sha256:
  description: SHA-256 of the document's bytes, in hexadecimal.
  returned: unless O(discover=true)
  type: str
  sample: 5f4dcc3b5aa765d61d8327deb882cf992b95990a9151374abd8ff8c5a7a0fe08
path:
  description: Where the document was written, or would be.
  returned: when O(dest) is given
  type: str
  sample: /tmp/mesh.json
document_changed:
  description: Whether the document differs from the last one.
  returned: unless O(discover=true)
  type: bool
  sample: true
changes:
  description: What differs from the last document, in words; at most 200 lines.
  returned: unless O(discover=true)
  type: list
  elements: str
  sample: ["node worker-3 joined: member, 10.244.3.0/24, 198.18.0.14"]
previous_serial:
  description: Serial of the last document, null when there is none.
  returned: always
  type: int
  sample: 6
complete:
  description: Whether the node list was known to be complete.
  returned: unless O(discover=true)
  type: bool
  sample: true
generation:
  description: The generation that traffic goes through, or shall go through when the rollout is done.
  returned: unless O(discover=true)
  type: int
  sample: 0
key_generations:
  description: The generations of which any node of the mesh has a key. Two of them while keys are rotated.
  returned: unless O(discover=true)
  type: list
  elements: int
  sample: [0]
source:
  description: The source that was used. V(nodes) when O(nodes) was given.
  returned: always
  type: str
  sample: kubernetes
source_reason:
  description: Why this source.
  returned: always
  type: str
  sample: the controller has kubeconfig /root/.kube/config
counts:
  description: How many nodes are in which state, and how many joined and left.
  returned: unless O(discover=true)
  type: dict
  sample: {"member": 3, "pending": 1, "excluded": 1, "joined": 1, "left": 0}
members:
  description: Names of the members.
  returned: unless O(discover=true)
  type: list
  elements: str
  sample: [cp-1, worker-1, worker-2]
pending:
  description: Nodes that belong to the mesh and cannot be peers yet, with the reason.
  returned: unless O(discover=true)
  type: dict
  sample: {"worker-3": "no public key known yet"}
excluded:
  description: Nodes of the cluster that are not part of the mesh, with the reason.
  returned: unless O(discover=true)
  type: dict
  sample: {"win-1": "runs Windows"}
to_examine:
  description:
    - Nodes of the last document that have other node addresses or pod CIDRs now, or that use a public key which it does not know.
    - Whether that is right can only be seen on the node, by M(kubemesh.wireguard.preflight). Pod CIDRs that follow the pods do not count.
  returned: unless O(discover=true)
  type: list
  elements: str
  sample: [worker-2]
missing:
  description: Where the node list and the inventory do not match.
  returned: unless O(discover=true)
  type: dict
  contains:
    not_in_inventory:
      description: Nodes (not excluded) that no host of O(hosts) stands for.
      type: list
      elements: str
      sample: [worker-9]
    not_in_play:
      description: Nodes whose host is not part of this play, because of C(--limit) for example.
      type: list
      elements: str
      sample: [worker-2]
    without_key:
      description: Nodes (not excluded) whose host is not part of this play and of which no public key is known from anywhere.
      type: list
      elements: str
      sample: [worker-9]
    hosts_without_node:
      description: Hosts of this play that are not a node; of O(hosts) only. Where none of them is in this play, all of O(hosts).
      type: list
      elements: str
      sample: [worker_9]
    suggestions:
      description: What C(mesh_node_name) of such a host should most likely be.
      type: dict
      sample: {"worker_9": "worker-9"}
annotations:
  description: Annotations to set on Node objects so that they hold the public keys, only where they differ. Null means to remove it.
  returned: when RV(source) is V(kubernetes), V(kubectl) or V(file)
  type: dict
  sample: {"worker-1": {"kubemesh.wireguard/public-key-0": "6Jk0cRK7xZyK0M4fO+uXkqWlnzCEPJtPG1FEJg8bDhw="}}
view:
  description: What one node computes from the document.
  returned: when O(node) is given
  type: dict
  contains:
    peers:
      description: By public key, with name, endpoint (null when there is none), allowed_ips and keepalive (seconds).
      type: dict
    device_addresses:
      description: Addresses of the mesh device.
      type: list
      elements: str
      sample: [198.18.0.12/32, "fe80::4c1e:9f0e:63a1:9d07/64"]
    local_pod_cidrs:
      description: Pod CIDRs of the node itself.
      type: list
      elements: str
      sample: [10.244.1.0/24]
    routes:
      description: Destinations and the peer they are behind, C(pods) and C(nodes).
      type: dict
    mtu:
      description: MTU of the mesh device in bytes, null while it is not measured.
      type: int
      sample: 1420
document:
  description: The mesh document.
  returned: when O(return_document=true)
  type: dict
delegate_to:
  description: The host that the next task has to be delegated to, V(localhost) unless RV(source) is V(kubectl).
  returned: when O(discover=true)
  type: str
  sample: cp-1
previous_hosts:
  description:
    - Hosts to fetch the last document from, one for each different document of the highest serial, hosts of this play first.
    - Empty when no host has one.
  returned: when O(discover=true)
  type: list
  elements: str
  sample: [worker-2]
problems:
  description: The single findings of the error.
  returned: on failure
  type: list
  elements: str
  sample: ["node worker-1, pod CIDR (from pod_cidrs_query): '10.244.1.0' overlaps ..."]
"""

from ansible.module_utils.basic import AnsibleModule

# Read by the action plugin too. The defaults of the queries are those of module_utils/_membership.py.
ARGUMENT_SPEC = {
    "source": {"type": "str", "choices": ["auto", "kubernetes", "kubectl", "file", "inventory"], "default": "auto"},
    "nodes": {"type": "list", "elements": "dict"},
    "nodes_file": {"type": "path"},
    "nodes_complete": {"type": "bool"},
    "kubeconfig": {"type": "path"},
    "context": {"type": "str"},
    "kubectl_host": {"type": "str"},
    "kubectl_command": {"type": "list", "elements": "str", "default": ["kubectl"]},
    "hosts": {"type": "list", "elements": "str"},
    "facts_variable": {"type": "str", "default": "mesh_node_facts"},
    "info_variable": {"type": "str"},
    "previous": {"type": "list", "elements": "path"},
    "node_addresses_query": {"type": "str", "default": "status.addresses[?type=='InternalIP'].address"},
    "pod_cidrs_query": {"type": "str", "default": "spec.podCIDRs || [spec.podCIDR]"},
    "pod_source": {"type": "str", "choices": ["node_cidrs", "pods", "calico_ipam", "cilium"], "default": "node_cidrs"},
    "endpoint_query": {"type": "str", "default": ""},
    "excluded_query": {"type": "str", "default": 'metadata.annotations."kubemesh.wireguard/excluded"'},
    "service_cidrs": {"type": "list", "elements": "str", "default": []},
    "forget_nodes": {"type": "list", "elements": "str", "default": []},
    "exclude_nodes": {"type": "list", "elements": "str", "default": []},
    "port": {"type": "int", "default": 51840},
    "generations": {"type": "list", "elements": "int", "choices": [0, 1], "default": [0, 1]},
    "current_generation": {"type": "int", "choices": [0, 1]},
    "expect_new_keys": {"type": "bool", "default": False},
    "dest": {"type": "path"},
    "node": {"type": "str"},
    "generation": {"type": "int", "choices": [0, 1], "default": 0},
    "return_document": {"type": "bool", "default": False},
    "discover": {"type": "bool", "default": False},
}
MUTUALLY_EXCLUSIVE = [("nodes", "nodes_file")]


def main():
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, mutually_exclusive=MUTUALLY_EXCLUSIVE, supports_check_mode=True)
    module.fail_json(msg="kubemesh.wireguard.peers runs on the controller, as an action plugin, and was started as a module on a host."
                         " Call it by its full name as a task of a playbook or with the ansible command, and keep plugins/action of the"
                         " collection installed.")


if __name__ == "__main__":
    main()
