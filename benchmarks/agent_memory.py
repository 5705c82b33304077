#!/usr/bin/env python3
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory and processor time of one node agent in a big cluster, with the status updates of all its kubelets.

    PYTHONPATH=DIRECTORY_OF_ANSIBLE_COLLECTIONS python3 benchmarks/agent_memory.py --nodes 1000 --seconds 30 --updates 20

Needs root, network namespaces, wireguard-go. The agent runs as its unit starts it (no site-packages), with a real device and real routes,
and an API server that sends ``--updates`` status updates a second (kubelets send one each 5 minutes where nothing changes: 3.3 a second at
1,000 nodes) and every fifth second a change that matters. Peers exist in the document only: they do not answer, so that the proving of
silent peers is part of what is measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "live"), str(ROOT / "tests" / "api")]

import agentlab
import apiserver

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_install


def usage(pid):
    """``{"rss_kb", "peak_kb", "cpu_seconds"}`` of a process."""
    status = dict(line.split(":", 1) for line in Path("/proc/%d/status" % pid).read_text().splitlines() if ":" in line)
    fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return {"rss_kb": int(status["VmRSS"].split()[0]), "peak_kb": int(status["VmHWM"].split()[0]),
            "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK")}


def heavy(number):
    """A Node as big as real ones (about 10 kB): images, labels, managed fields."""
    node = apiserver.node(
        "n%d" % number, ["10.%d.%d.0/24" % (64 + number // 256, number % 256)], ["198.19.%d.%d" % (number // 256, number % 256)],
        {agentlab.KEY: base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()})
    node["status"]["images"] = [{"names": ["registry.example/image-%d@sha256:%s" % (image, "0" * 64)], "sizeBytes": 1 << 24}
                                for image in range(50)]
    node["metadata"]["managedFields"] = [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {
        "f:field-%d" % field: {} for field in range(60)}}}]
    return node


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--updates", type=float, default=20.0, help="status updates a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, agentlab.AgentLab(folder, ["a", "b"], ["a", "b"], grace=3600) as lab:
        for number in range(1, arguments.nodes):
            lab.api.apply("nodes", heavy(number))
        program = Path(folder) / "program"
        for path, text in _agent_install.program_files(_agent_install.source_of).items():
            (program / path).parent.mkdir(parents=True, exist_ok=True)
            (program / path).write_text(text, encoding="utf-8")
        with open(lab.place("a") / "log", "ab") as handle:
            agent = subprocess.Popen(
                ["nsenter", "--net=/run/netns/" + lab.net.ns("a"), sys.executable, "-I", "-S", str(program / "start.py"),
                 str(lab.place("a") / "agent.json")], stdin=subprocess.DEVNULL, stdout=handle, stderr=handle)
        lab.agents["a"] = agent
        began = time.monotonic()
        lab.wait(lambda: len(lab.allowed("a")) >= arguments.nodes, "all peers", 300)
        first = time.monotonic() - began
        start, lags = usage(agent.pid), []
        end, turn = time.monotonic() + arguments.seconds, 0
        while time.monotonic() < end:
            turn += 1
            lab.api.heartbeat(name="n%d" % (turn % (arguments.nodes - 1) + 1))
            if turn % int(5 * arguments.updates) == 0:
                lab.api.patch("nodes", "n1", {"metadata": {"uid": None}, "spec": {"podCIDRs": ["10.200.%d.0/24" % (turn % 250)]}})
                lags.append(lab.state("a").get("lag"))
            time.sleep(1.0 / arguments.updates)
        after = usage(agent.pid)
        sys.stdout.write(json.dumps({
            "nodes": arguments.nodes, "updates_per_second": arguments.updates, "seconds_to_first_peers": round(first, 2),
            "rss_mb": round(after["rss_kb"] / 1024.0, 1), "peak_mb": round(after["peak_kb"] / 1024.0, 1),
            "cpu_percent": round(100 * (after["cpu_seconds"] - start["cpu_seconds"]) / arguments.seconds, 1),
            "state": lab.state("a"), "log": lab.log("a").splitlines()[-3:]}) + "\n")


if __name__ == "__main__":
    main()
