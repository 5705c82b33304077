# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab with an API server: it holds the lab's nodes as Node objects, and the controller, the nodes and the test itself reach it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "api"), str(HERE.parent / "run")]
import apiserver
import prepare

PORT = 6443
CA_ON_NODES = "/etc/kubernetes/pki/ca.crt"  # the default of mesh_agent_ca_file
KEYS = {0: "kubemesh.wireguard/public-key-0", 1: "kubemesh.wireguard/public-key-1"}
# By user. Those of the playbooks and of the agents are separate, so that a fault or a refusal can be for one of them.
TOKENS = {"admin": "lab-admin-token", "playbooks": "lab-playbooks-token", "agents": "lab-agents-token"}


class Cluster:
    """The API server of a lab that is up, in the controller's namespace, over TLS. A context manager; it ends with the test's process.

    ``api``: the `apiserver.ApiServer`, whose methods change objects and make faults. ``kubeconfig``: path, with the token of "playbooks".
    """

    def __init__(self, lab, tokens=None):
        self.lab, self.tokens = lab, dict(tokens or TOKENS)
        self.folder = lab.state / "kube"
        self.api = apiserver.ApiServer(
            next(iter(lab.addresses("ctl").values())), PORT, self.folder / "tls", self.tokens, lab.namespace("ctl"))
        self.kubeconfig = self.folder / "kubeconfig"

    def __enter__(self):
        self.folder.mkdir(exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        self.api.start()
        for node in self.lab.nodes:
            self.join(node)
        self.write_kubeconfig(self.kubeconfig, "playbooks")
        return self

    def __exit__(self, *exc):
        self.api.stop()

    def write_kubeconfig(self, path, user):
        """A kubeconfig for one of the users; -> its path."""
        self.api.write_kubeconfig(path, self.tokens[user])
        Path(path).chmod(0o600)
        return path

    def node(self, name):
        """The Node object that a node of the lab has when it joins."""
        return next(item for item in self.lab.node_list()["items"] if item["metadata"]["name"] == name)

    def join(self, name):
        """Register a node, as its kubelet does, and give it the CA of the cluster."""
        self.api.apply("nodes", self.node(name))
        place = Path("/proc/%d/root%s" % (self.lab.leader(name), CA_ON_NODES))
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.api.ca_file, place)

    def add_node(self):
        """One more node of the lab that has joined; -> its name."""
        name = self.lab.add_node()
        self.join(name)
        return name

    def published(self):
        """{node: {generation: public key}} of the annotations; nodes without one are there too."""
        found = {}
        for name in self.api.names("nodes"):
            annotations = self.api.get("nodes", name)["metadata"].get("annotations", {})
            found[name] = {number: annotations[key] for number, key in KEYS.items() if key in annotations}
        return found

    def annotate(self, name, generation, value):
        """Set the annotation of a key, or take it away with None, as somebody with kubectl."""
        self.api.patch("nodes", name, {"metadata": {"annotations": {KEYS[generation]: value}}})

    # --- playbooks

    def source(self):
        """Arguments for ansible-playbook: the node list comes from this server, through kubernetes.core."""
        return ["-e", "mesh_nodes_source=kubernetes", "-e", "mesh_kubeconfig=%s" % self.kubeconfig]

    def agent(self, **variables):
        """Arguments for ansible-playbook: agents that follow this server. The token is in a file, not in the list of processes."""
        path = self.folder / "agent.yml"
        path.touch(0o600)
        path.write_text("".join("%s: %s\n" % item for item in dict({
            "mesh_agent": "true", "mesh_agent_server": self.api.url, "mesh_agent_token": self.tokens["agents"]}, **variables).items()))
        return ["-e", "@%s" % path]

    def environment(self):
        """Variables for ansible commands: the collections that are needed, and nothing that the machine says of other clusters."""
        found = {"TMPDIR": str(self.folder / "tmp")}  # kubernetes.core keeps there what it found out about a server, by its address
        for name in os.environ:
            if name.startswith("K8S_AUTH_") or name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
                found[name] = ""
        if "ANSIBLE_COLLECTIONS_PATH" not in os.environ:
            mine = self.lab.ansible_env()["ANSIBLE_COLLECTIONS_PATH"]
            found["ANSIBLE_COLLECTIONS_PATH"] = "%s%s%s" % (mine, os.pathsep, prepare.other_collections(sys.executable))
        return found

    def playbook(self, name, *args, rc=0, env=None, **more):
        """`harness.playbook` with this cluster as the source of the node list."""
        return harness.playbook(self.lab, name, *self.source(), *args, rc=rc, source=None, env={**self.environment(), **(env or {})}, **more)
