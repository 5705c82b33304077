# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Enable and disable, node by node, with the modules on the kernel's WireGuard: every packet of every pair counted, the wire read."""
from __future__ import annotations

import time

import cluster

from cases.modules import name_of, prepared

# Seconds after the last switch until packets that were on their way in clear have arrived
SETTLE = 0.3


def plain_after(seen, moment, flows, wanted):
    """Names of the wanted flows whose marker was on the wire after a moment."""
    return [flows[int(index)][0] for index, (dummy, dummy2, last) in sorted(seen["plain"].items())
            if last > moment and wanted(flows[int(index)][0])]


def case_enable_and_disable_lose_nothing(env):
    kinds = ("pod-pod", "host-pod", "pod-host", "host-host")
    with cluster.Cluster(nodes=3) as lab:
        with lab.pinger(kinds, rate=10) as pinger:  # 48 flows: more than that costs the emulator more than it tells
            prepared(lab)
            lab.modules("interface", node=name_of, persistence="none")
            lab.modules("probe", node=name_of, require="all")
            lab.modules("routes", node=name_of, persist=False)
            for node in lab.nodes:  # send: one node after the other; in between one side sends in clear, the other through the tunnel
                lab.module(node, "routes", node=node.node_name, persist=False, send=True)
            time.sleep(1)
            for node in lab.nodes:
                lab.module(node, "routes", node=node.node_name, persist=False, send=True, encrypt="nodes")
            time.sleep(1)
            second = lab.modules("routes", node=name_of, persist=False, send=True, encrypt="nodes")
            assert not any(result["changed"] for result in second.values())
            for node in lab.nodes:  # disable: first nobody sends, only then nobody accepts
                lab.module(node, "routes", state="absent", persist=False)
            for node in lab.nodes:
                lab.module(node, "interface", state="absent")
            time.sleep(0.5)
            report = pinger.stop()
        env.note(sent=report["sent"], lost=report["lost"], slowest=report["slowest"])
        assert not report["lost"], lab.losses(report)
        for node in lab.nodes:
            assert "wgmesh0" not in node.sh("ip", "link") and "51840" not in node.sh("ip", "rule") + node.sh("ip", "-6", "rule")


def case_nothing_readable_while_sending(env):
    """From the last switch on no marked packet is on the wire in clear; with host encryption that goes for all pairs."""
    kinds = ("pod-pod", "host-pod", "pod-host", "host-host")
    with cluster.Cluster(nodes=2) as lab:
        flows = lab.flows(kinds)
        with lab.sniffer() as sniffer, lab.pinger(kinds) as pinger:
            prepared(lab)
            lab.modules("interface", node=name_of, persistence="none")
            lab.modules("probe", node=name_of, require="all")
            lab.modules("routes", node=name_of, persist=False, send=True)
            pods = time.monotonic() + SETTLE
            time.sleep(SETTLE + 1.5)
            lab.modules("routes", node=name_of, persist=False, send=True, encrypt="nodes")
            nodes = time.monotonic() + SETTLE
            time.sleep(SETTLE + 1.5)
            seen, report = sniffer.stop(), pinger.stop()
        assert len(seen["plain"]) == len(flows), "the sniffer did not see every flow in clear at first"
        readable = plain_after(seen, pods, flows, lambda name: not name.startswith("host-host"))
        assert not readable, "in clear after the switch: %s" % readable
        assert plain_after(seen, pods, flows, lambda name: name.startswith("host-host")), "host to host is not asked to be encrypted yet"
        readable = plain_after(seen, nodes, flows, lambda name: True)
        assert not readable, "in clear with host encryption: %s" % readable
        assert seen["dropped"] == 0, "the sniffer missed %d frames" % seen["dropped"]
        assert seen["tunnelled"] > 100
        env.note(sent=report["sent"], lost=report["lost"], frames=seen["frames"], tunnelled=seen["tunnelled"])
        assert not report["lost"], lab.losses(report)


def case_a_node_joins_and_leaves_under_traffic(env):
    """A third node joins a mesh that sends, gets other addresses for its pods, and leaves; the pairs of the others never notice."""
    with cluster.Cluster(nodes=3) as lab:
        keys = {"0": lab.make_keys()}
        first, joiner = lab.nodes[:2], lab.nodes[2]
        full = lab.document(keys)
        small = dict(full, nodes={name: entry for name, entry in full["nodes"].items() if name != "worker-3"})
        lab.distribute(small)
        with lab.pinger(("pod-pod", "host-pod"), rate=10) as pinger:
            lab.modules("interface", nodes=first, node=name_of, persistence="none")
            lab.modules("probe", nodes=first, node=name_of, require="all")
            lab.modules("routes", nodes=first, node=name_of, persist=False, send=True)
            lab.distribute(dict(full, serial=2))
            grown = lab.modules("interface", node=name_of, persistence="none")
            assert all("peer worker-3: add" in " ".join(grown[node.node_name]["steps"]) for node in first), grown
            lab.modules("probe", node=name_of, require="all")
            lab.modules("routes", node=name_of, persist=False, send=True)
            # leaving: nobody sends to it any more and it sends to nobody, then the peers go
            lab.module(joiner, "routes", state="absent", persist=False)
            lab.distribute(dict(small, serial=3))
            lab.modules("routes", nodes=first, node=name_of, persist=False, send=True)
            lab.modules("interface", nodes=first, node=name_of, persistence="none")
            lab.module(joiner, "interface", state="absent")
            time.sleep(0.5)
            report = pinger.stop()
        env.note(sent=report["sent"], lost=report["lost"])
        assert not report["lost"], lab.losses(report)
        assert "worker-3" not in " ".join(lab.modules("interface", nodes=first, node=name_of, persistence="none")["worker-1"]["steps"])
        assert len(first[0].sh("wg", "show", "wgmesh0", "peers").split()) == 1
