# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory and processor time of one node agent in big clusters, with the status updates of all their kubelets.

Needs root, network namespaces, wireguard-go, openssl. README.md in this folder says what is measured.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "live"), str(ROOT / "tests" / "api")]

import agentlab
import apiserver
import figures

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_install

# MB of resident memory at this number of nodes.
GOAL_MB, GOAL_NODES = 40, 1000
# Seconds between two updates of the status of one node: kubelets send one every 5 minutes where nothing changes, and one every 10 s where
# images, volumes or conditions change all the time (nodeStatusReportFrequency, nodeStatusUpdateFrequency).
NOISE = (300.0, 10.0)
# Seconds between changes that matter while a phase is measured.
CHANGE_INTERVAL = 10.0
# Seconds for all peers to be in the device.
PATIENCE = 300.0
# Changes that the API server remembers: each is a whole Node.
HISTORY = 2000
MARK = "@@version@@"


def usage(pid):
    """``{"rss_mb", "peak_mb", "cpu_seconds"}`` of a process; the time of the commands that it ran is in it."""
    status = dict(line.split(":", 1) for line in Path("/proc/%d/status" % pid).read_text().splitlines() if ":" in line)
    fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return {"rss_mb": int(status["VmRSS"].split()[0]) / 1024.0, "peak_mb": int(status["VmHWM"].split()[0]) / 1024.0,
            "cpu_seconds": sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")}


def key_of(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def heavy(number):
    """A Node as big as real ones (about 10 kB): images, labels, managed fields."""
    node = apiserver.node(
        "n%d" % number, ["10.%d.%d.0/24" % (64 + number // 256, number % 256)], ["198.19.%d.%d" % (number // 256, number % 256)],
        {agentlab.KEY: key_of(number)})
    node["status"]["images"] = [{"names": ["registry.example/image-%d@sha256:%s" % (image, "0" * 64)], "sizeBytes": 1 << 24}
                                for image in range(50)]
    node["metadata"]["managedFields"] = [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {
        "f:field-%d" % field: {} for field in range(60)}}}]
    return node


class Noise:
    """Status updates of all nodes in turn. Each is written once and sent again and again with another version, or the server of the tests
    would need more of the machine than what is measured."""

    def __init__(self, api, names):
        self.store, self.resource = api.store, api.resource("nodes")
        self.objects = [self.store.get(self.resource, name) for name in names]
        self.parts = {}
        self.turn = 0

    def send(self, count):
        with self.store.changed:
            history = self.store.history[self.resource]
            while len(history) > HISTORY:
                history.popleft()
            for dummy in range(count):
                obj = self.objects[self.turn % len(self.objects)]
                self.turn += 1
                name = obj["metadata"]["name"]
                if name not in self.parts:
                    marked = dict(obj, metadata=dict(obj["metadata"], resourceVersion=MARK))
                    text = json.dumps({"type": "MODIFIED", "object": apiserver.typed(self.resource, marked)}, separators=(",", ":"))
                    self.parts[name] = [part.encode() for part in text.split(MARK)]
                self.store.version += 1
                line = (b"%d" % self.store.version).join(self.parts[name]) + b"\n"
                history.append((self.store.version, "MODIFIED", obj, line))
            self.store.changed.notify_all()


class Bench:
    """One agent, its device, and a cluster of so many nodes of which it alone is there."""

    def __init__(self, lab, nodes, folder):
        self.lab, self.nodes = lab, nodes
        self.program = Path(folder) / "program"
        for path, text in _agent_install.program_files(_agent_install.source_of, agentlab.PROGRAM).items():
            (self.program / path).parent.mkdir(parents=True, exist_ok=True)
            (self.program / path).write_text(text, encoding="utf-8")
        for number in range(1, nodes):
            lab.api.apply("nodes", heavy(number))
        self.lines, self.sent = [], 0

    def start(self):
        """The agent as its unit starts it; -> seconds until all peers are in the device."""
        lab = self.lab
        began = time.monotonic()
        with open(lab.place("a") / "log", "ab") as handle:
            lab.agents["a"] = subprocess.Popen(
                ["nsenter", "--net=/run/netns/" + lab.net.ns("a"), sys.executable, "-I", "-S", str(self.program / "start.py"),
                 str(lab.place("a") / "agent.json")], stdin=subprocess.DEVNULL, stdout=handle, stderr=handle)
        # The other node of the first document is not in the API.
        lab.wait(lambda: len(lab.allowed("a")) >= self.nodes, "all peers", PATIENCE)
        return time.monotonic() - began

    def prove_all(self):
        """Have the agent know all its peers as reached, as in a mesh that has been up for long: nobody answers here."""
        names = {"n%d" % number: key_of(number) for number in range(1, self.nodes)}
        (self.lab.place("a") / "runtime" / "proved.json").write_text(json.dumps(names))

    def settled(self):
        """Wait until the agent has told of all its routes."""
        lab = self.lab
        lab.wait(lambda: lab.state("a").get("api") == "watching" and lab.state("a").get("unproven_count", self.nodes) <= 1
                 and len(lab.routes("a")) >= 2 * (self.nodes - 1), "all routes", PATIENCE)

    def measure(self, what, seconds, interval=None, changes=False):
        """Usage while all nodes send a status every ``interval`` seconds: a row of the table."""
        lab, pid = self.lab, self.lab.agents["a"].pid
        noise = Noise(lab.api, ["n%d" % number for number in range(1, self.nodes)])
        rate = self.nodes / interval if interval else 0.0
        before = usage(pid)
        began = time.monotonic()
        sent, changed = 0, 0
        while time.monotonic() < began + seconds:
            time.sleep(0.1)
            due = int(rate * (time.monotonic() - began)) - sent
            if due > 0:
                noise.send(due)
                sent += due
            if changes and time.monotonic() - began > CHANGE_INTERVAL * (changed + 0.5):
                changed += 1
                self.change("10.200.%d.0/24" % (changed % 250))
        after = usage(pid)
        passed = time.monotonic() - began
        self.sent += sent + changed
        row = {"nodes": self.nodes, "phase": what, "updates_per_second": round(sent / passed, 1), "changes": changed,
               "rss_mb": round(after["rss_mb"], 1), "peak_mb": round(after["peak_mb"], 1),
               "cpu_percent": round(100 * (after["cpu_seconds"] - before["cpu_seconds"]) / passed, 1)}
        self.lines.append(row)
        figures.progress("%(nodes)d nodes, %(phase)s: %(rss_mb).1f MB, %(cpu_percent).1f%%" % row)

    def change(self, cidr):
        """Give a node another pod CIDR, and wait until the agent has a route to it."""
        self.lab.api.patch("nodes", "n1", {"spec": {"podCIDRs": [cidr]}})
        self.lab.wait(lambda: cidr in self.lab.routes("a"), "the changed CIDR", PATIENCE)

    def check(self):
        """All that was sent must have been read, or less was measured than is said."""
        self.lab.wait(lambda: self.lab.state("a").get("counts", {}).get("events", 0) >= self.sent, "all events at the agent", PATIENCE)


def one_size(nodes, seconds):
    """All phases at one number of nodes: ``(rows, figures of the start)``."""
    with tempfile.TemporaryDirectory() as folder, agentlab.AgentLab(folder, ["a", "b"], ["a", "b"], grace=3600) as lab:
        lab.api.delete("nodes", "b")
        bench = Bench(lab, nodes, folder)
        first = bench.start()
        used = usage(lab.agents["a"].pid)
        start = {"nodes": nodes, "seconds_to_peers": round(first, 1), "cpu_seconds_to_peers": round(used["cpu_seconds"], 2),
                 "peak_mb": round(used["peak_mb"], 1)}
        lab.stop("a")
        bench.prove_all()
        bench.start()
        bench.settled()
        bench.measure("quiet", seconds)
        for interval in NOISE:
            bench.measure("status every %.0f s" % interval, seconds, interval)
        bench.measure("and changes", seconds, NOISE[0], changes=True)
        bench.check()
        remarks = [line for line in lab.log("a").splitlines() if re.search("warning|Traceback|failed", line)]
    if remarks:
        figures.say("the agent said: " + "\n".join(remarks[-5:]))
    return bench.lines, start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000])
    # longer than the agent's longest time between two comparisons with the kernel, which are part of what it does
    parser.add_argument("--seconds", type=float, default=95.0, help="of each phase")
    parser.add_argument("--quick", action="store_true", help="50 nodes and 2 s, to see that it works")
    arguments = parser.parse_args()
    figures.end_in_order()
    why = agentlab.why_not()
    if why:
        sys.exit("agent_memory: %s" % why)
    figures.say("Memory and processor time of an agent: %s" % figures.machine())
    rows, starts = [], []
    for nodes in [50] if arguments.quick else arguments.nodes:
        found, start = one_size(nodes, 2.0 if arguments.quick else arguments.seconds)
        rows += found
        starts.append(start)
    figures.say(figures.table(
        ["phase", "nodes", "updates/s", "changes", "MB", "peak MB", "% of a core"],
        [[row["phase"], row["nodes"], row["updates_per_second"], row["changes"], row["rss_mb"], row["peak_mb"], row["cpu_percent"]]
         for row in rows]))
    for start in starts:
        figures.say("start at %(nodes)d nodes: peers after %(seconds_to_peers).1f s, %(cpu_seconds_to_peers).2f s of processor time, "
                    "at most %(peak_mb).1f MB" % start)
    for row in [row for row in rows if row["nodes"] == GOAL_NODES][-1:]:
        figures.say("goal: %d MB at %d nodes %s" % (GOAL_MB, GOAL_NODES, figures.verdict(row["rss_mb"], GOAL_MB)))
    figures.done("agent_memory", {"phases": rows, "starts": starts})


if __name__ == "__main__":
    main()
