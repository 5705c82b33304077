# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long it takes from a change in the API until ansible-rulebook has had it brought to the kernel of three nodes, over ssh.

Needs root and what tests/requirements-eda.txt names; it makes a lab of three hosts. README.md in this folder says what is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "lab"), str(ROOT / "tests" / "api")]

import eda
import figures
import harness
import kube
from kernel_watch import monitor, seen_at

LAB = "bench-eda"
NODES = 3
CHANGED = "node-3"
# Seconds, for three nodes on a quiet machine.
GOAL = 3.0


def measure(engine, cluster, monitors, number):
    """One more pod CIDR of a node: ``{"task", "kernel", "end"}``, seconds from the change to the first task, to the kernel of all nodes, to
    the end of the run."""
    cidr = "10.245.%d.0/24" % number
    node = cluster.api.get("nodes", CHANGED)
    marks = {name: len(lines.lines) for name, lines in monitors.items()}
    wall, began, before = time.time(), time.monotonic(), len(engine.rulebook.times)
    cluster.api.patch("nodes", CHANGED, {"spec": {"podCIDRs": [*node["spec"]["podCIDRs"], cidr]}})
    kernel = max(lines.find(lambda line: seen_at(line, cidr, False), marks[name], eda.RUN_PATIENCE)
                 for name, lines in monitors.items()) - wall
    engine.run()
    times = engine.rulebook.times[before:]
    task = next(when for when, line in times if line.startswith("TASK ["))
    cluster.api.patch("nodes", CHANGED, {"spec": {"podCIDRs": node["spec"]["podCIDRs"]}})
    engine.run()
    return {"task": task - began, "kernel": kernel, "end": times[-1][0] - began}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changes", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one change, to see that it works")
    arguments = parser.parse_args()
    figures.end_in_order()
    figures.say("Change in the API to the kernel of %d nodes by ansible-rulebook: %s" % (NODES, figures.machine()))
    lab = harness.made(LAB, nodes=NODES, pods=1)
    try:
        with kube.Cluster(lab) as cluster:
            cluster.playbook("enable")
            # The default keeps runs from queueing up; here the one before is over.
            with eda.Engine(lab, cluster, kubemesh_min_interval=0, kubemesh_resync=86400) as engine:
                engine.until_as_api()
                monitors = {node: monitor(lab.namespace(node)) for node in lab.nodes}
                found = [measure(engine, cluster, monitors, number) for number in range(1 if arguments.quick else arguments.changes)]
                for lines in monitors.values():
                    lines.stop()
    finally:
        if not harness.keep_on_failure():
            lab.down()
    spreads = {what: figures.spread(each[what] for each in found) for what in ("task", "kernel", "end")}
    names = {"task": "first task", "kernel": "kernel of all", "end": "end of the run"}
    figures.say(figures.table(["seconds to", "changes", "median", "worst"], [
        [names[what], values["count"], "%.2f" % values["median"], "%.2f" % values["worst"]] for what, values in spreads.items()]))
    figures.say("goal: %.0f s to the kernel %s" % (GOAL, figures.verdict(spreads["kernel"]["median"], GOAL)))
    figures.done("eda_latency", spreads)


if __name__ == "__main__":
    main()
