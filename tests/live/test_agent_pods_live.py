# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents that follow pods: pods come and go, and those that stay lose nothing."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agentlab
import apiserver

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _pods

pytestmark = pytest.mark.skipif(bool(agentlab.why_not()), reason="live tests: " + agentlab.why_not())

HOSTS = ["a", "b", "c"]
STANDING = {"a": "10.244.0.10", "b": "10.244.0.11", "c": "10.244.0.12"}
# Those that come and go are the neighbours of the standing ones, so that prefixes grow around these, and shrink.
OTHERS = ["10.244.0.%d" % number for number in range(1, 41) if "10.244.0.%d" % number not in STANDING.values()]
# Of the API, by the second, and for how many seconds; of each ping, by the second.
CHANGES, SECONDS, PINGS = 50, 60, 20


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    with agentlab.AgentLab(tmp_path_factory.mktemp("pods"), HOSTS, pod_source="pods",
                           prefixes={host: [address + "/32"] for host, address in STANDING.items()}) as found:
        for host, address in STANDING.items():
            found.pod(host, address)
            found.api.apply("pods", apiserver.pod("standing-" + host, host, [address], namespace="kube-system"))
        found.start(*HOSTS)
        yield found


def wanted(lab):
    """What the API says: {host: prefixes of its pods}."""
    items = [lab.api.get("pods", name, namespace) for namespace, name in names(lab)]
    found = _pods.pod_prefixes(_pods.reduced_all({"Pod": items}), set(HOSTS), set())[0]
    return {host: set(found.get(host, ())) for host in HOSTS}


def names(lab):
    return [(obj["metadata"]["namespace"], obj["metadata"]["name"]) for obj in lab.api.store.page(
        next(one for one in lab.api.resources if one.plural == "pods"), apiserver.Query(), 0, None)[0]]


def sources(lab, host, table):
    """Prefixes that the rules of a host send from into a table."""
    lines = lab.net.exec(host, "ip", "-4", "rule", "show").splitlines()
    found = {line.split()[2] for line in lines if "lookup %d" % table in line}
    return {text if "/" in text else text + "/32" for text in found - {"all"}}


def is_up_to_date(lab, host):
    """Whether allowed IPs, routes and rules of a node are what the API says."""
    api = wanted(lab)
    others = [other for other in HOSTS if other != host]
    allowed = lab.allowed(host)
    for other in others:
        pods = {text for text in allowed.get(lab.keys[other][1], ()) if text.startswith("10.244.")}
        if pods != api[other]:
            return False
    routes = {text if "/" in text else text + "/32" for text in lab.routes(host) if text.startswith("10.244.")}
    return (routes == api[others[0]] | api[others[1]]
            and sources(lab, host, agentlab.TABLE) == sources(lab, host, agentlab.TABLE + 1) == api[host])


def settled(lab):
    for host in HOSTS:
        lab.wait(lambda host=host: is_up_to_date(lab, host), "allowed IPs, routes and rules of %s as the API has them" % host, 120.0)


@pytest.fixture
def lab(mesh):
    settled(mesh)
    yield mesh
    mesh.api.clear_faults()
    for namespace, name in names(mesh):
        if namespace == "default":
            mesh.api.delete("pods", name, namespace)
    settled(mesh)


def test_one_comes_moves_and_goes(lab):
    lab.pod("a", "10.244.0.13")
    assert lab.ping("10.244.0.13", STANDING["b"]), "before anybody knows it"
    pod = apiserver.pod("p", "a", ["10.244.0.13"])
    lab.api.apply("pods", pod)
    settled(lab)
    assert "10.244.0.13/32" in wanted(lab)["a"]
    assert lab.ping("10.244.0.13", STANDING["b"]) and lab.ping(STANDING["c"], "10.244.0.13")
    # Done: its address is the next one's.
    lab.api.apply("pods", apiserver.pod("p", "a", ["10.244.0.13"], phase="Succeeded"))
    lab.api.apply("pods", apiserver.pod("q", "c", ["10.244.0.13"]))
    settled(lab)
    assert "10.244.0.12/31" in lab.allowed("b")[lab.keys["c"][1]]


@pytest.mark.parametrize("fault", ["empty", "garbage", "status"])
def test_lists_that_are_none_take_nothing_away(lab, fault):
    # After an event nobody waits the longer for faults that were before it.
    lab.api.apply("pods", apiserver.pod("s-" + fault, "a", ["10.244.0.%d" % (40 + len(fault))]))
    settled(lab)
    before = lab.allowed("a")
    lab.api.fault(fault, verb="list", resource="pods", times=6)
    asked = len(lab.api.requests)
    lab.api.compact()
    lab.api.close_watches()
    lab.wait(lambda: sum(1 for one in lab.api.requests[asked:] if one["resource"] == "pods" and one["verb"] == "watch"
                         and one["code"] == 200) >= 3, "new watches of pods")
    lab.wait(lambda: all(lab.state(host)["api"] == "watching" for host in HOSTS), "agents that watch again")
    assert lab.allowed("a") == before


def test_what_a_list_lacks_goes_after_the_grace_and_a_moved_address_at_once(lab):
    lab.api.apply("pods", apiserver.pod("p", "a", ["10.244.0.20"]))
    lab.api.apply("pods", apiserver.pod("r", "a", ["10.244.0.30"]))
    settled(lab)
    lab.api.down()
    lab.api.delete("pods", "p", "default")
    lab.api.delete("pods", "r", "default")
    lab.api.apply("pods", apiserver.pod("q", "b", ["10.244.0.20"]))
    lab.api.compact()
    lab.api.up()
    settled(lab)
    assert "10.244.0.20/32" in lab.allowed("c")[lab.keys["b"][1]]


def pings(lab):
    """20 a second between all standing pods, for a little longer than the changes."""
    found = {}
    for host in HOSTS:
        for other in HOSTS:
            if other != host:
                found[host, other] = subprocess.Popen(
                    ["ip", "netns", "exec", lab.pods[STANDING[host]], "ping", "-q", "-i", str(1 / PINGS), "-c",
                     str(PINGS * (SECONDS + 5)), "-W", "5", STANDING[other]],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return found


def test_many_come_and_go_and_the_others_lose_nothing(lab):
    """Nothing is lost between pods that stay, and nothing of it is in clear: there, it would arrive as well."""
    luck = random.Random(4)
    pods = ", ".join(STANDING.values())
    for host in HOSTS:
        lab.net.nft(host, "chain out { type filter hook postrouting priority 0; oifname eth0 ip saddr { %s } ip daddr { %s } counter; }"
                    % (pods, pods))
    running = pings(lab)
    try:
        alive, begin = {}, time.monotonic()
        for number in range(CHANGES * SECONDS):
            # The load's rate; a machine that cannot keep it up has less to bear, and nothing is judged by time.
            time.sleep(max(0.0, begin + number / CHANGES - time.monotonic()))
            address = luck.choice(OTHERS)
            if address in alive:
                lab.api.delete("pods", alive.pop(address), "default")
            else:
                alive[address] = "p%d" % number
                lab.api.apply("pods", apiserver.pod(alive[address], luck.choice(HOSTS), [address]))
            if time.monotonic() - begin > SECONDS:
                break
        results = {pair: process.communicate(timeout=120)[0] for pair, process in running.items()}
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    for pair, text in results.items():
        sent, received = re.search(r"(\d+) packets transmitted, (\d+) received", text).groups()
        assert sent == received, (pair, text)
    for host in HOSTS:
        assert "counter packets 0 " in lab.net.exec(host, "nft", "list", "table", "inet", "kmpr"), host
    settled(lab)
