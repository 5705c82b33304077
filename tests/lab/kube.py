# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab with an API server: it holds the lab's nodes as Node objects, and the controller, the nodes and the test itself reach it."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import harness

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "api"), str(HERE.parent / "run")]
import apiserver
import prepare

PORT = 6443
CA_ON_NODES = "/etc/kubernetes/pki/ca.crt"  # the default of mesh_agent_ca_file
KEYS = {0: "kubemesh.wireguard/public-key-0", 1: "kubemesh.wireguard/public-key-1"}
# By user. A fault or a refusal can be for one of them.
TOKENS = {"admin": "lab-admin-token", "playbooks": "lab-playbooks-token", "agents": "lab-agents-token"}

# Seconds. What an agent does takes a fraction of one; on a machine that is busy with other tests it may take minutes.
PATIENCE = 180


def host_cidr(address):
    return "%s/%d" % (address, ipaddress.ip_address(address).max_prefixlen)


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
        self.permit()
        return self

    def __exit__(self, *exc):
        self.api.stop()

    def write_kubeconfig(self, path, user):
        """A kubeconfig for one of the users; -> its path."""
        self.api.write_kubeconfig(path, self.tokens[user])
        Path(path).chmod(0o600)
        return path

    def permit(self, *users):
        """Take all refusals of before back. Agents may only read Nodes, as with the shipped manifest, unless they are among ``users``."""
        self.api.permit()
        for verb in ("create", "update", "patch", "delete"):
            if "agents" not in users:
                self.api.refuse(verb, None, self.tokens["agents"])

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

    def playbook(self, name, *args, rc=0, env=None, timeout=1800, **more):
        """`harness.playbook` with this cluster as the source of the node list."""
        env = {**self.environment(), **(env or {})}
        return harness.playbook(self.lab, name, *self.source(), *args, rc=rc, source=None, env=env, timeout=timeout, **more)

    # --- what nodes hold

    def expected(self, name):
        """What the kernel of a node holds when it is up to the API: {"peers": {key: allowed IPs}, "pods": routes, "nodes": routes}."""
        found = {"peers": {}, "pods": [], "nodes": []}
        for other in self.api.names("nodes"):
            if other != name:
                item = self.api.get("nodes", other)
                keys = [value for key, value in item["metadata"]["annotations"].items() if key in KEYS.values()]
                pods = item["spec"]["podCIDRs"]
                addresses = [row["address"] for row in item["status"]["addresses"] if row["type"] == "InternalIP"]
                found["pods"] += pods
                found["nodes"] += addresses
                found["peers"].update(dict.fromkeys(keys, sorted(pods + [host_cidr(address) for address in addresses])))
        return {"peers": found["peers"], "pods": sorted(found["pods"]), "nodes": sorted(found["nodes"])}

    def held(self, name):
        """What the kernel of a node holds, as `expected` has it; probe addresses left out."""
        script = """
wg show $(wg show interfaces) allowed-ips
for table in 51840 51841; do echo "# $table"; ip -o route show table $table 2>/dev/null; ip -6 -o route show table $table 2>/dev/null; done
true
"""
        peers, pods, nodes = re.split("^# .*\n", harness.text_of(self.lab, name, script), flags=re.MULTILINE)
        rows = [line.split("\t") for line in peers.splitlines()]
        return {
            "peers": {key: sorted(text for text in allowed.split() if not text.startswith("fe80:")) for key, allowed in rows},
            "pods": sorted(line.split()[0] for line in pods.splitlines()), "nodes": sorted(line.split()[0] for line in nodes.splitlines())}

    def wait_kernel(self, nodes=None, seconds=PATIENCE):
        """Wait until the kernel of each node holds what the API says."""
        for name in nodes or self.lab.nodes:
            wait(lambda name=name: (self.held(name), self.expected(name)), lambda found: found[0] == found[1],
                 "the kernel of %s as the API says" % name, seconds)

    def agent_state(self, name):
        """What the agent of a node last said of itself; {} where it has said nothing."""
        try:
            return json.loads(Path("/proc/%d/root/run/kubemesh/agent/state.json" % self.lab.leader(name)).read_text())
        except (OSError, ValueError):
            return {}

    def wait_agents(self, wanted, what, nodes=None, seconds=PATIENCE):
        """Wait until ``wanted(state)`` of the agent of each node."""
        for name in nodes or self.lab.nodes:
            wait(lambda name=name: self.agent_state(name), wanted, "the agent of %s: %s" % (name, what), seconds)


def wait(look, wanted, what, seconds=PATIENCE):
    """Look until what is seen is wanted; -> it."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if wanted(seen):
            return seen
        assert time.monotonic() < deadline, "%s: not after %d s: %s" % (what, seconds, seen)
        time.sleep(0.2)
