# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pod that no prefix of the mesh covers yet, beside one that is known: who reaches whom, and what is in clear."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agentlab

pytestmark = pytest.mark.skipif(bool(agentlab.why_not()), reason="live tests: " + agentlab.why_not())

KNOWN, FAR, NEW = "10.244.7.10", "10.244.7.20", "10.244.7.30"  # on a, on b, on a


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with agentlab.AgentLab(tmp_path_factory.mktemp("pods"), ["a", "b"], pod_source="pods",
                           prefixes={"a": [KNOWN + "/32"], "b": [FAR + "/32"]}) as found:
        for host, address in (("a", KNOWN), ("b", FAR), ("a", NEW)):
            found.pod(host, address)
        for host, other in (("a", "b"), ("b", "a")):
            found.net.exec(host, "wg", "set", found.devices[host], "peer", found.keys[other][1], "endpoint",
                           "%s:%d" % (found.net.address(other), agentlab.PORT), "allowed-ips",
                           "%s,%s/32" % (found.prefixes[other][0], found.net.address(other)))
            found.net.exec(host, "wg", "set", found.devices[host], "fwmark", hex(agentlab.MARK))
            found.net.nft(host, "\n".join(
                "chain %s { type filter hook %s priority 0; %s eth0 meta l4proto icmp counter; }" % (name, hook, device)
                for name, hook, device in (("out", "postrouting", "oifname"), ("in", "prerouting", "iifname"))))
        yield found


def send(lab, **arguments):
    for host in lab.hosts:
        result = lab.net.module(
            host, "routes", node=host, document_file=str(lab.place(host) / "mesh.json"), interface=lab.devices[host], peers="all",
            send=True, persist=False, **arguments)
        assert not result.get("failed"), result


def clear_packets(lab, host):
    """ICMP packets that passed eth0 of a host outside the tunnel, in either direction."""
    text = lab.net.exec(host, "nft", "list", "table", "inet", "kmpr")
    return sum(int(line.split("packets ")[1].split()[0]) for line in text.splitlines() if "counter packets" in line)


def in_clear(lab, source, target):
    """Whether a ping was answered, and whether any of it was in clear."""
    before = clear_packets(lab, "a")
    answered = lab.ping(source, target)
    return answered, clear_packets(lab, "a") > before


@pytest.mark.parametrize("encrypt", ["pods", "nodes"])
def test_a_new_pod_works_in_clear_and_the_others_in_the_tunnel(lab, encrypt):
    send(lab, sources="known", encrypt=encrypt)
    assert in_clear(lab, KNOWN, FAR) == in_clear(lab, FAR, KNOWN) == (True, False)
    assert in_clear(lab, KNOWN, lab.net.address("b")) == in_clear(lab, "b", KNOWN) == (True, False)
    assert in_clear(lab, "a", lab.net.address("b")) == (True, encrypt == "pods")
    # The new one, in both directions, with pods and with nodes, and with what is beside it.
    assert in_clear(lab, NEW, FAR) == in_clear(lab, FAR, NEW) == (True, True)
    assert in_clear(lab, NEW, lab.net.address("b")) == in_clear(lab, "b", NEW) == (True, True)
    assert in_clear(lab, NEW, KNOWN) == in_clear(lab, "a", NEW) == in_clear(lab, NEW, lab.net.address("a")) == (True, False)
    # What others send through this node to pods, as behind a node port, is steered, whoever sent it.
    for source, iif in (("198.18.7.99", "eth0"), (KNOWN, "pod1-0")):
        assert lab.devices["a"] in lab.net.exec("a", "ip", "route", "get", FAR, "from", source, "iif", iif), (source, iif)


def test_switching_between_both_kinds_of_rules(lab):
    send(lab, sources="known", encrypt="nodes")
    again = lab.net.module("a", "routes", node="a", document_file=str(lab.place("a") / "mesh.json"), interface=lab.devices["a"],
                           peers="all", send=True, persist=False, sources="known", encrypt="nodes")
    assert again["changed"] is False, again
    send(lab, sources="all", encrypt="pods")
    assert lab.rules("a") == 2
    assert in_clear(lab, KNOWN, FAR) == (True, False)


def test_with_strict_mode_a_new_pod_is_held_back(lab):
    send(lab, sources="all")
    for host in lab.hosts:
        result = lab.net.module(host, "guard", node=host, document_file=str(lab.place(host) / "mesh.json"),
                                interfaces=[lab.devices[host]], fwmark=agentlab.MARK, persist=False)
        assert not result.get("failed"), result
    try:
        assert in_clear(lab, KNOWN, FAR) == in_clear(lab, FAR, KNOWN) == (True, False)
        # What it sends is in the tunnel, where nobody accepts it; what it is sent does not come in.
        assert in_clear(lab, NEW, FAR) == (False, False)
        assert not lab.ping(FAR, NEW)
        assert lab.ping(NEW, KNOWN) and lab.ping("a", NEW)
    finally:
        for host in lab.hosts:
            lab.net.module(host, "guard", state="absent", persist=False)
