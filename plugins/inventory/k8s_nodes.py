# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: k8s_nodes
short_description: The nodes of a Kubernetes cluster as hosts
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Makes a host of every Node object of a cluster, so that a node that joins is known to the next run without anyone editing an inventory.
  - The name of a host is the name of its Node object, which is what the playbooks of this collection expect.
  - Needs a configuration file whose name is C(k8s_nodes.yml), or ends in C(.k8s_nodes.yml) or C(.k8s_nodes.yaml).
  - Hosts are in the group of O(cluster_group), except Windows nodes, which are in C(k8s_windows). Those of the control plane are also in
    C(kube_control_plane), as in Kubespray's inventories. Every host is in C(k8s_ready) or C(k8s_not_ready), and in C(k8s_cordoned) while
    nothing is scheduled there. These groups always exist.
  - The variable C(k8s_node) of a host holds what its Node object says, with the keys C(name), C(uid), C(created), C(deleting), C(labels),
    C(annotations), C(addresses) (lists by type), C(pod_cidrs), C(provider_id), C(taints), C(unschedulable), C(conditions) (by type, with
    C(status), C(reason), C(message), C(since)), C(ready), C(os), C(os_image), C(architecture), C(kernel_version), C(kubelet_version)
    and C(container_runtime).
  - All of it is data. Whatever an annotation or a label holds, it is never templated. Names of hosts and addresses are validated, and
    names of groups that are made of such values by O(keyed_groups) have all characters replaced that names of variables may not have.
requirements:
  - The collection C(kubernetes.core) and the Python library C(kubernetes) on the controller
  - The Python library C(jmespath) on the controller, only for O(address_query)
notes:
  - The user of the credentials needs a ClusterRole with the verb C(list) for C(nodes).
  - Beside O(kubeconfig) in the file, nothing else of C(K8S_AUTH_*) in the environment counts, and beside C(K8S_AUTH_KUBECONFIG) nothing
    that belongs to C(K8S_AUTH_HOST), but for proxies. Beside O(host) in the file, no kubeconfig counts.
  - Without O(kubeconfig) and O(host) it looks where C(kubectl) does, E(KUBECONFIG) and C(~/.kube/config), and then for the service account
    of the pod that it runs in.
  - With O(cache) a node that has joined is not seen before the cache ends. Leave it off for runs that Event-Driven Ansible starts.
extends_documentation_fragment:
  - constructed
  - inventory_cache
seealso:
  - plugin: kubemesh.wireguard.peers
    plugin_type: module
    description: Makes the mesh document of the same Node objects.
options:
  plugin:
    description: Marks the file as the configuration of this plugin.
    type: str
    required: true
    choices:
      - kubemesh.wireguard.k8s_nodes
  kubeconfig:
    description:
      - Path of a kubeconfig on the controller. A relative path counts from the directory that Ansible is run in.
    type: path
    env:
      - name: K8S_AUTH_KUBECONFIG
  context:
    description: Name of a context in the kubeconfig. Without it, the current one.
    type: str
    env:
      - name: K8S_AUTH_CONTEXT
  host:
    description:
      - URL of the API server, for use without a kubeconfig. Needs O(api_key), or O(client_cert) and O(client_key).
    type: str
    env:
      - name: K8S_AUTH_HOST
  api_key:
    description:
      - Bearer token. Put it into the environment or vault it; do not write it into the file.
    type: str
    env:
      - name: K8S_AUTH_API_KEY
  ca_cert:
    description: Path of the CA certificates (PEM) that the API server's certificate is checked against.
    type: path
    env:
      - name: K8S_AUTH_SSL_CA_CERT
  client_cert:
    description: Path of a client certificate (PEM).
    type: path
    env:
      - name: K8S_AUTH_CERT_FILE
  client_key:
    description: Path of the key (PEM) of O(client_cert).
    type: path
    env:
      - name: K8S_AUTH_KEY_FILE
  validate_certs:
    description: Whether the API server's certificate is checked. Without it, what the kubeconfig says.
    type: bool
    env:
      - name: K8S_AUTH_VERIFY_SSL
  label_selector:
    description:
      - Only nodes whose labels fit, in the syntax of C(kubectl get -l).
      - It narrows the hosts of a run, not the mesh, whose members are all nodes of the cluster.
    type: str
  page_size:
    description: Nodes that are asked for at a time.
    type: int
    default: 500
  timeout:
    description: Seconds that the API server may take to accept a connection, and to answer with a page.
    type: int
    default: 30
  cluster_group:
    description: Group of the hosts. Inventories with several clusters give each its own, and name it in C(mesh_hosts).
    type: str
    default: k8s_cluster
  address_types:
    description:
      - Which address of a Node object becomes C(ansible_host). The first of these types that has one is taken.
      - A host without any, such as one that has just joined, has no C(ansible_host), and Ansible connects to its name.
    type: list
    elements: str
    choices:
      - InternalIP
      - ExternalIP
      - Hostname
      - InternalDNS
      - ExternalDNS
    default:
      - InternalIP
  address_family:
    description: Whether only IPv4 or only IPv6 addresses become C(ansible_host).
    type: str
    choices:
      - any
      - ipv4
      - ipv6
    default: any
  address_query:
    description:
      - JMESPath expression over the Node object that gives the address, or a list of which the first that fits O(address_family) is taken,
        instead of O(address_types).
      - Must give IP addresses or DNS names. For ports and users, use O(compose).
    type: str
"""

EXAMPLES = r"""
# production.k8s_nodes.yml: with the kubeconfig that kubectl would use
plugin: kubemesh.wireguard.k8s_nodes
---
# What the nodes need to be reached, and groups by zone
plugin: kubemesh.wireguard.k8s_nodes
kubeconfig: ~/.kube/production
context: admin@production
compose:
  ansible_user: "'root'"
  ansible_port: k8s_node.annotations['example.org/ssh-port'] | default(22) | int
groups:
  gpu: "'nvidia.com/gpu.present' in k8s_node.labels"
  bookworm: "'bookworm' in k8s_node.os_image"
keyed_groups:
  - key: k8s_node.labels['topology.kubernetes.io/zone']
    prefix: zone
---
# Nodes that are reached at another address, with a service account's token in K8S_AUTH_API_KEY
plugin: kubemesh.wireguard.k8s_nodes
host: https://198.18.0.10:6443
ca_cert: /etc/kubernetes/pki/ca.crt
label_selector: kubernetes.io/os=linux
address_query: metadata.annotations."example.org/ssh-address" || status.addresses[?type=='ExternalIP'].address
---
# Kept for five minutes in a file
plugin: kubemesh.wireguard.k8s_nodes
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_connection: ~/.cache/k8s_nodes
cache_timeout: 300
"""

import contextlib
import difflib
import hashlib
import json
import os
import socket

from ansible.errors import AnsibleParserError
from ansible.inventory.group import to_safe_group_name
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _cluster, _node_hosts
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import untrusted

try:
    import jmespath
except ImportError:
    jmespath = None

MeshError = _mesh.MeshError

FILE_OPTIONS = ("ca_cert", "client_cert", "client_key")
# Options that kubernetes.core has under the same name, and the variables of the environment for them
ENVIRONMENT = {"host": "K8S_AUTH_HOST", "api_key": "K8S_AUTH_API_KEY", "ca_cert": "K8S_AUTH_SSL_CA_CERT",
               "client_cert": "K8S_AUTH_CERT_FILE", "client_key": "K8S_AUTH_KEY_FILE", "validate_certs": "K8S_AUTH_VERIFY_SSL"}


@contextlib.contextmanager
def socket_timeout(seconds):
    """The discovery of kubernetes.core takes no timeout, and a server that is switched off would be waited for a quarter of an hour."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):

    NAME = "kubemesh.wireguard.k8s_nodes"

    @staticmethod
    def _sanitize_group_name(name):
        # Ansible leaves names as they are by default, and templates what group_names holds in ansible-core 2.18: Jinja in an annotation
        # that a group is named after would be executed.
        return to_safe_group_name(name, force=True, silent=True)

    def verify_file(self, path):
        name = os.path.basename(path)
        fits = name in ("k8s_nodes.yml", "k8s_nodes.yaml") or name.endswith((".k8s_nodes.yml", ".k8s_nodes.yaml"))
        return fits and super().verify_file(path)

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        config = self._read_config_data(path)
        self._given = {option for option, value in config.items() if value not in (None, "")}
        known = sorted(self.option_definitions)
        for option in sorted(map(str, set(config) - set(known))):
            # Ansible passes over it: what somebody meant by it would not be done, and nobody told.
            near = difflib.get_close_matches(option, known, 1)
            remedy = "did you mean %s?" % near[0] if near else "see ansible-doc -t inventory %s" % self.NAME
            raise AnsibleParserError("%s: %s: there is no option %s; %s" % (self.NAME, path, _mesh.shown(option), remedy))
        try:
            self._populate(self._nodes(path, cache))
        except MeshError as exc:
            raise AnsibleParserError("%s: %s" % (self.NAME, exc)) from None

    # --- Node objects

    def _nodes(self, path, cache):
        """The Node objects, from the cache where it is used and has them."""
        if not self.get_option("cache"):
            return self._ask()
        self.load_cache_plugin()
        key = self._cache_key(path)
        if cache:
            try:
                return self._cache[key]
            except KeyError:
                pass  # there is none, or it is too old
        nodes = self._ask()
        self._cache[key] = nodes
        return nodes

    def _cache_key(self, path):
        """What was asked for is part of the key: another cluster's nodes must not come out of the cache of this file."""
        asked = json.dumps([self.get_option(option) for option in ("kubeconfig", "context", "host", "label_selector")])
        return "%s_%s" % (self.get_cache_key(path), hashlib.sha256(asked.encode()).hexdigest()[:16])

    def _ask(self):
        for option in ("page_size", "timeout"):
            if self.get_option(option) < 1:
                raise MeshError("%s: %d is not possible; give a number from 1" % (option, self.get_option(option)))
        way = self._find_way()
        auth = {option: self._auth_option(option, way) for option in ENVIRONMENT}
        for option in FILE_OPTIONS:
            path = auth[option]
            if path and not os.access(path, os.R_OK):
                raise MeshError("%s: %s cannot be read on the controller; correct the path" % (option, path))
        details = _cluster.details_of(way)
        with socket_timeout(self.get_option("timeout")):
            client = _cluster.api_client(way, details, **{option: value for option, value in auth.items() if value is not None})
            items = _cluster.list_pages(client, way.found, details, self.get_option("label_selector"), self.get_option("page_size"),
                                        self.get_option("timeout"))
        if not items:
            self.display.warning("%s: %s has no node%s" % (
                self.NAME, way.found or "the cluster", " that label_selector fits" if self.get_option("label_selector") else ""))
        return [_node_hosts.trimmed(item) for item in items if isinstance(item, dict)]

    def _auth_option(self, option, way):
        """An option for kubernetes.core, or None where only a variable of the environment has it that does not count."""
        return None if option not in self._given and ENVIRONMENT[option] in way.unused else self.get_option(option)

    def _find_way(self):
        """The `_cluster.Way` to the API. What the file says counts before the environment, and the two are not mixed."""
        host = self.get_option("host")
        if {"host", "kubeconfig"} <= self._given:
            raise MeshError("host, kubeconfig: both say where the API is, and the kubeconfig's credentials are not for another host; take"
                            " one away")
        if "host" in self._given or (host and not self.get_option("kubeconfig")):
            if not self.get_option("api_key") and not (self.get_option("client_cert") and self.get_option("client_key")):
                raise MeshError("host: %s is given without credentials; give api_key (K8S_AUTH_API_KEY), or client_cert and client_key,"
                                " or kubeconfig" % host)
            return _cluster.Way(None, "API server %s" % host, None, frozenset({"K8S_AUTH_KUBECONFIG", "K8S_AUTH_CONTEXT"}))
        way = _cluster.find_way(self.get_option("kubeconfig") if "kubeconfig" in self._given else None,
                                self.get_option("context") if "context" in self._given else None, os.environ, os.path.expanduser("~"))
        if not way.kubeconfig and not os.environ.get("KUBERNETES_SERVICE_HOST"):
            raise MeshError("there is no way to the Kubernetes API: no kubeconfig (KUBECONFIG, ~/.kube/config) and no service account;"
                            " give kubeconfig, or host and api_key")
        return way

    # --- hosts

    def _populate(self, nodes):
        cluster_group = self._cluster_group()
        for group in _node_hosts.all_groups(cluster_group):
            self.inventory.add_group(group)
        query = self._address_query()
        strict = self.get_option("strict")
        seen = set()
        for item in nodes:
            try:
                name = _node_hosts.host_name(item)
            except MeshError as exc:
                raise MeshError("node list: %s; is this a Node object?" % exc) from None
            if name in seen:
                raise MeshError("node list: node %s is in it twice" % name)
            seen.add(name)
            facts = _node_hosts.node_facts(item)
            self.inventory.add_host(name)
            for group in _node_hosts.groups_of(facts, cluster_group):
                self.inventory.add_child(group, name)
            variables = {"k8s_node": untrusted(facts)}
            address = self._address(name, item, query)
            if address:
                variables["ansible_host"] = untrusted(address)
            for variable, value in variables.items():
                self.inventory.set_variable(name, variable, value)
            self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
            self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
            self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)

    def _cluster_group(self):
        group = self.get_option("cluster_group")
        if not group or self._sanitize_group_name(group) != group or group in _node_hosts.all_groups("")[1:]:
            raise MeshError("cluster_group: %s is not possible as the name of a group of its own; use letters, digits and underscores"
                            % _mesh.shown(group))
        return group

    def _address_query(self):
        """A function of a Node object that gives what the query does, or None without a query."""
        text = self.get_option("address_query")
        if not text:
            return None
        if jmespath is None:
            raise MeshError("address_query needs the Python library jmespath on the controller; install it: pip install jmespath")

        def checked(function, argument, where, what):
            try:
                return function(argument)
            except jmespath.exceptions.JMESPathError as exc:
                raise MeshError("%saddress_query: %s%s" % (where, what, " ".join(str(exc).split()))) from None

        compiled = checked(jmespath.compile, text, "", "%s is not a JMESPath expression: " % _mesh.shown(text))
        return lambda item: checked(compiled.search, item, "node %s, " % _node_hosts.host_name(item), "")

    def _address(self, name, item, query):
        values = query(item) if query else _node_hosts.address_values(item, self.get_option("address_types"))
        address, finding = _node_hosts.host_address(values, self.get_option("address_family"))
        if finding:
            self.display.warning("%s: node %s has no ansible_host: %s; correct the Node object, or give address_query"
                                 % (self.NAME, name, finding))
        return address
