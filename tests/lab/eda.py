# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-rulebook on a lab with an API server: from the controller, with the inventory plugin, over ssh."""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from pathlib import Path

import harness
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eda"))
from rulebooks import PATIENCE, Rulebook, program

# Seconds without a line: a run that waits for ssh, or a busy machine.
RUN_PATIENCE = 2 * PATIENCE
ACTED = re.compile(r"^\w+: \[([^\]\s]+)", re.MULTILINE)
# Runs after a change until the kernel must be as the API: one may have begun before it, one may follow from the keys that it published.
RUNS = 3


class Engine:
    """The rulebook ``reconcile`` on a `kube.Cluster`, as guide_eda.rst says: a directory as inventory, credentials from the environment.

    ``variables``: of the rulebook. A context manager.
    """

    def __init__(self, lab, cluster, **variables):
        self.lab, self.cluster, self.variables = lab, cluster, variables
        self.folder = lab.state / "eda"
        self.rulebook = None

    def __enter__(self):
        inventory = self.folder / "inventory"
        (inventory / "group_vars").mkdir(parents=True, exist_ok=True)
        (self.folder / "home").mkdir(exist_ok=True)
        (inventory / "lab.k8s_nodes.yml").write_text(json.dumps({"plugin": "kubemesh.wireguard.k8s_nodes"}))
        # How hosts are reached; who they are is for the plugin to say.
        known = yaml.safe_load(self.lab.inventory().read_text())
        (inventory / "group_vars" / "all.yml").write_text(json.dumps(known["all"]["vars"]))
        (self.folder / "variables.yml").write_text(json.dumps(self.variables))
        env = {**self.lab.ansible_env(), **self.cluster.environment(), "KUBECONFIG": str(self.cluster.kubeconfig),
               "HOME": str(self.folder / "home"), "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "true"}
        env["PATH"] = "%s:%s" % (Path(sys.executable).parent, env["PATH"])
        self.rulebook = Rulebook(
            ["ip", "netns", "exec", self.lab.namespace("ctl"), program(), "-r", "kubemesh.wireguard.reconcile", "-i", inventory,
             "--vars", self.folder / "variables.yml"], env, self.folder)
        return self

    def __exit__(self, *exc):
        self.rulebook.stop()
        (self.lab.state / "logs" / "rulebook.log").write_text(self.rulebook.output)

    def run(self):
        """Read on to the end of the next run: ``({host: counts}, what it said)``."""
        self.rulebook.until("PLAY [", RUN_PATIENCE)
        text = self.rulebook.until("PLAY RECAP", RUN_PATIENCE)
        # Nothing says that the recap is over: it has a line for each host that did anything.
        hosts, recap = set(ACTED.findall(text)), {}
        while hosts - set(recap):
            line = self.rulebook.until("\n", RUN_PATIENCE)
            text += line
            recap.update({found[0]: dict(zip(("ok", "changed", "unreachable", "failed"), map(int, found[1:])))
                          for found in harness.RECAP.findall(line)})
        return recap, text

    def until_as_api(self, *absent):
        """Read on to a run without failures, and without the hosts ``absent``, after which the kernel of every node is as the API says; ->
        the recap of that run.

        One that had begun before a node left fails and changes nothing: the event of its leaving is the next run.
        """
        for dummy in range(RUNS):
            recap, text = self.run()
            found = ["%s failed" % host for host, counts in recap.items() if counts["failed"] or counts["unreachable"]]
            found += ["%s is in the run" % host for host in absent if host in recap]
            found += unlike_api(self.lab, self.cluster)
            if not found:
                return recap
        raise AssertionError("after %d runs:\n%s\n%s" % (RUNS, "\n".join(found), text[-8000:]))


def unlike_api(lab, cluster):
    """What is in a node's kernel other than the API says, as texts: peers, what is behind them, whether it is encrypted."""
    wanted = {}
    for name in cluster.api.names("nodes"):
        node = cluster.api.get("nodes", name)
        addresses = [item["address"] for item in node["status"]["addresses"] if item["type"] == "InternalIP"]
        wanted[name] = {*node["spec"]["podCIDRs"], *(str(ipaddress.ip_network(address)) for address in addresses)}
    wrong = []
    for name in wanted:
        rows = {row["name"]: row for row in harness.info(lab, name)["peers"]}
        here = {peer: {text for text in row["addresses"] if not text.startswith("fe80:")} for peer, row in rows.items()}
        expected = {peer: behind for peer, behind in wanted.items() if peer != name}
        if here != expected:
            wrong.append("%s has %s, not %s" % (name, here, expected))
        wrong += ["%s: %s is %s" % (name, peer, row["state"]) for peer, row in rows.items() if row["state"] != "encrypted"]
    return wrong
