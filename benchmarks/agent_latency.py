# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long it takes from a change in the API until it is in the kernel of all nodes, with agents; and until bare watchers see it.

Needs root, network namespaces, wireguard-go, openssl. README.md in this folder says what is measured.
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "live"), str(ROOT / "tests" / "api")]

import agentlab
import figures
import netlab
from kernel_watch import PATIENCE, Lines, monitor, seen_at

NODES = ["a", "b", "c", "d", "e"]
JOINER = "j"
# Seconds, the goals for five nodes on a quiet machine.
GOAL_MEDIAN, GOAL_WORST = 0.1, 0.5
# The two things that happen to a node that joins. The second is counted, as it is the end of it: an answer has come through the tunnel.
ACCEPTED, SENDS = "joins: accepted", "joins: sent to"
# Seconds between two looks at the peers of all nodes.
LOOK = 0.01
# Seconds between changes: longer than the agent waits for further news, and not always the same, so that nothing falls into step.
PAUSE = (0.4, 0.8)


def watcher(lab, host):
    api = lab.api
    lines = Lines(["ip", "netns", "exec", lab.net.ns(host), sys.executable, str(ROOT / "benchmarks" / "bare_watcher.py"), api.address,
                   str(api.port), api.ca_file, str(lab.place(host) / "token")])
    lines.find(lambda line: True)
    return lines


def allowed_ips(device, key):
    """Allowed IPs of a peer of a userspace device, as a set; None where it has no such peer."""
    wanted, answer = "public_key=" + base64.b64decode(key).hex(), b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(netlab.SOCKETS / (device + ".sock")))
        connection.sendall(b"get=1\n\n")
        while not answer.endswith(b"\n\n"):
            answer += connection.recv(1 << 16)
    peer, found = "", {}
    for line in answer.decode().splitlines():
        if line.startswith("public_key="):
            peer = line
            found[peer] = set()
        elif line.startswith("allowed_ip="):
            found[peer].add(line[len("allowed_ip="):])
    return found.get(wanted)


def processor_seconds(processes):
    """Processor time of processes and of the commands that they ran."""
    ticks = 0
    for process in processes:
        fields = Path("/proc/%d/stat" % process.pid).read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Bench:
    """Five nodes with agents, a sixth that joins and leaves, and a bare watcher beside each agent."""

    def __init__(self, lab):
        self.lab = lab
        self.monitors = {host: monitor(lab.net.ns(host)) for host in NODES}
        self.watchers = {host: watcher(lab, host) for host in NODES}
        self.results = []  # (kind, seconds to the kernel of all, seconds to all bare watchers)

    def stop(self):
        for lines in [*self.monitors.values(), *self.watchers.values()]:
            lines.stop()

    def measure(self, kind, change, host, text, gone, right):
        """``change()`` the API, and wait until all nodes are as they shall be.

        ``host``: whose Node changes; ``text``: what the routes of the others, and the rule of the host itself, hold; ``gone``: whether they
        go; ``right``: of the allowed IPs that the others have for the host, whether they are as they shall be.
        """
        lab = self.lab
        marks = {name: (len(self.monitors[name].lines), len(self.watchers[name].lines)) for name in NODES}
        wall, began = time.time(), time.monotonic()
        change()
        version = lab.api.store.version
        if kind == SENDS:
            # Nothing tells when a peer is added, so it is asked for.
            while not all(right(allowed_ips(lab.devices[name], lab.keys[host][1])) for name in NODES):
                if time.monotonic() - began > PATIENCE:
                    raise TimeoutError("%s is no peer of all" % host)
                time.sleep(LOOK)
            accepted = time.monotonic() - began
        kernel = max(self.monitors[name].find(lambda line: seen_at(line, text, gone), marks[name][0]) for name in NODES) - wall
        waiting = [name for name in NODES if name != host]
        looked = 0
        while waiting:
            waiting = [name for name in waiting if not right(allowed_ips(lab.devices[name], lab.keys[host][1]))]
            looked += 1
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError("%s: allowed IPs of %s at %s are not right" % (kind, host, waiting))
        if gone or looked > 1:
            # A route goes before the allowed IP does, and comes after it: then the route is the end of it.
            kernel = time.monotonic() - began
        bare = max(self.watchers[name].find(
            lambda line: float(line.split()[0]) if int(line.split()[1]) >= version else None, marks[name][1]) for name in NODES) - began
        if kind == SENDS:
            self.results.append((ACCEPTED, accepted, bare))
        self.results.append((kind, kernel, bare))
        time.sleep(random.uniform(*PAUSE))  # noqa: S311 - spreads changes, protects nothing

    def round(self, number):
        """One change of each kind."""
        lab = self.lab
        host = NODES[number % len(NODES)]
        own, other, more = lab.cidr(host), "10.245.%d.0/24" % (number % 250), "10.246.%d.0/24" % (number % 250)

        def change_cidrs(*cidrs):
            lab.api.patch("nodes", host, {"spec": {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)}})

        self.measure("CIDR added", lambda: change_cidrs(own, more), host, more, False, lambda found: {own, more} <= found)
        self.measure("CIDR leaves", lambda: change_cidrs(own), host, more, True, lambda found: more not in found)
        self.measure("CIDR changed", lambda: change_cidrs(other), host, other, False, lambda found: other in found and own not in found)
        change_cidrs(own)
        time.sleep(1)
        self.measure(SENDS, lambda: lab.api.apply("nodes", lab.node(JOINER)), JOINER, lab.cidr(JOINER), False,
                     lambda found: found is not None and lab.cidr(JOINER) in found)
        self.measure("leaves", lambda: lab.api.delete("nodes", JOINER), JOINER, lab.cidr(JOINER), True, lambda found: found is None)


def report(results, seconds):
    """The table, the figures of all together, and whether they are what is wanted. ``seconds``: processor time of all agents."""
    say, rows, kinds = figures.say, [], {}
    for kind in dict.fromkeys(kind for kind, dummy, dummy2 in results):
        of_kind = [(kernel, bare) for each, kernel, bare in results if each == kind]
        kernel, bare = figures.spread(pair[0] for pair in of_kind), figures.spread(pair[1] for pair in of_kind)
        kinds[kind] = {"kernel": kernel, "bare": bare}
        rows.append([kind, kernel["count"], *("%.0f" % (1000 * kernel[what]) for what in ("median", "p90", "worst")),
                     "%.1f" % (1000 * bare["median"])])
    counted = [each for each in results if each[0] != ACCEPTED]
    kernel, bare = figures.spread(each[1] for each in counted), figures.spread(each[2] for each in counted)
    rows.append(["all", kernel["count"], *("%.0f" % (1000 * kernel[what]) for what in ("median", "p90", "worst")),
                 "%.1f" % (1000 * bare["median"])])
    say(figures.table(["milliseconds", "changes", "median", "p90", "worst", "bare watcher"], rows))
    ratio = kernel["median"] / bare["median"]
    say("ratio to a bare watcher: %.1f" % ratio)
    # `Bench.round` changes a CIDR back once more than is measured.
    each = 1000 * seconds / (len(counted) * 6 / 5) / len(NODES)
    say("processor time: %.0f ms for each change and agent" % each)
    say("goals: median %.0f ms %s, worst %.0f ms %s" % (
        1000 * GOAL_MEDIAN, figures.verdict(kernel["median"], GOAL_MEDIAN),
        1000 * GOAL_WORST, figures.verdict(kernel["worst"], GOAL_WORST)))
    return {"kinds": kinds, "kernel": kernel, "bare": bare, "ratio": ratio, "processor_ms": each}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="changes of each of the five kinds")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it works")
    arguments = parser.parse_args()
    figures.end_in_order()
    why = agentlab.why_not()
    if why:
        sys.exit("agent_latency: %s" % why)
    figures.say("Change in the API to the kernel of %d nodes: %s" % (len(NODES), figures.machine()))
    with tempfile.TemporaryDirectory() as folder, agentlab.AgentLab(folder, [*NODES, JOINER], NODES, grace=0) as lab:
        lab.start()
        lab.whole(*NODES)
        bench = Bench(lab)
        agents = [lab.agents[host] for host in NODES]
        before = processor_seconds(agents)
        try:
            for number in range(1 if arguments.quick else arguments.rounds):
                bench.round(number)
            seconds = processor_seconds(agents) - before
        except TimeoutError as exc:
            sys.exit("%s\n%s" % (exc, "".join("--- %s\n%s" % (host, lab.log(host)[-2000:]) for host in lab.hosts)))
        finally:
            bench.stop()
    figures.done("agent_latency", report(bench.results, seconds))


if __name__ == "__main__":
    main()
