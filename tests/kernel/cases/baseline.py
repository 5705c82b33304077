# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The instruments themselves: without a mesh nothing is lost and everything can be read; a fault is seen as one."""
from __future__ import annotations

import time

import cluster


def case_nothing_lost_and_everything_readable_without_a_mesh(env):
    with cluster.Cluster(nodes=3) as lab:
        with lab.sniffer() as sniffer, lab.pinger() as pinger:
            time.sleep(2)
            report, seen = pinger.stop(), sniffer.stop()
        env.note(sent=report["sent"], slowest=report["slowest"], frames=seen["frames"])
        assert report["lost"] == 0, report
        assert all(flow["sent"] > 5 for flow in report["flows"].values()), report
        assert len(seen["plain"]) == len(report["flows"]), "the sniffer missed flows: %s" % sorted(seen["plain"])
        assert seen["dropped"] == 0 and seen["tunnelled"] == 0, seen


def case_a_lost_packet_is_counted(env):
    with cluster.Cluster(nodes=2) as lab:
        with lab.pinger(kinds=("pod-pod",)) as pinger:
            time.sleep(1)
            # a wrong next hop for one direction of one family, for about half a second
            lab.nodes[0].sh("ip", "route", "replace", "10.244.2.0/24", "via", "198.18.0.99")
            time.sleep(0.5)
            lab.nodes[0].sh("ip", "route", "replace", "10.244.2.0/24", "via", "198.18.0.12")
            time.sleep(1)
            report = pinger.stop()
        lost = {name: flow["lost"] for name, flow in report["flows"].items() if flow["lost"]}
        env.note(lost=lost)
        assert set(lost) == {"pod-pod worker-1>worker-2 ipv4", "pod-pod worker-2>worker-1 ipv4"}, lost
        assert all(count < report["flows"][name]["sent"] for name, count in lost.items()), "also lost what was not disturbed: %s" % lost
