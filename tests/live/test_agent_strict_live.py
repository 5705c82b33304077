# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents under strict mode and host encryption, with the kernel's nftables, and somebody who listens on the wire.

A mesh of a and b, and c that joins. While a test lasts, a sends marked packets to c every few milliseconds. c is reached without the mesh
as well, so what is seen on the wire is what nobody held back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agentlab
import apiserver
import netlab

pytestmark = pytest.mark.skipif(bool(agentlab.why_not()), reason="live tests: " + agentlab.why_not())

# Packets that must have met the guard, or arrived, before the next thing is done.
ENOUGH = 20


class Stream:
    """What becomes of the packets that a sends to an address of c: numbers that were seen on the wire, and that c received."""

    def __init__(self, lab, address):
        self.lab = lab
        self.wire = netlab.Listener(lab.net, lab.net.fabric, "wire")
        self.there = netlab.Listener(lab.net, lab.net.ns("c"), "udp", 7)
        self.sender = lab.send_on("a", address)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for each in (self.sender, self.wire.process, self.there.process):
            each.terminate()
            each.wait(timeout=20 * netlab.PATIENCE)

    @staticmethod
    def numbers(listener):
        with listener.news:
            return {int(marker[5:-1]) for marker in listener.seen}

    def in_clear(self):
        return self.numbers(self.wire)

    def hidden(self):
        return self.numbers(self.there) - self.in_clear()

    def wait_clear(self):
        before = len(self.in_clear())
        self.lab.wait(lambda: len(self.in_clear()) > before + ENOUGH, "packets in clear")

    def wait_dropped(self):
        before = self.lab.dropped("a")
        self.lab.wait(lambda: self.lab.dropped("a") > before + ENOUGH, "packets that are dropped")

    def wait_hidden(self):
        before = max(self.numbers(self.there), default=0)
        self.lab.wait(lambda: sum(1 for number in self.numbers(self.there) if number > before) > ENOUGH, "packets in the tunnel at c")


def joined(lab):
    """c is a peer of a and b, and nothing is sent to it: its device accepts nobody yet."""
    lab.wait(lambda: lab.state("a").get("unproven") == ["c"] and lab.keys["c"][1] in lab.allowed("a"), "c as a peer that is not proven")


@contextlib.contextmanager
def running(folder, **settings):
    with agentlab.AgentLab(folder, ["a", "b", "c"], ["a", "b"], **settings) as lab:
        lab.clear_way("a", "c")
        lab.start("a", "b")
        lab.whole("a", "b")
        yield lab


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    with running(tmp_path_factory.mktemp("strict"), strict={}) as lab:
        yield lab


@pytest.fixture
def lab(mesh):
    mesh.wait(lambda: mesh.state("a").get("api") == "watching" and mesh.state("b").get("api") == "watching", "agents that watch")
    mesh.api.heartbeat()
    yield mesh
    if "c" in mesh.agents:
        mesh.stop("c")
    if "c" in mesh.api.names("nodes"):
        mesh.api.delete("nodes", "c")
    for key in mesh.allowed("c"):
        mesh.net.exec("c", "wg", "set", mesh.devices["c"], "peer", key, "remove")
    mesh.whole("a", "b")
    mesh.wait(lambda: mesh.guarded("a") == {mesh.cidr("b")} and mesh.guarded("b") == {mesh.cidr("a")}, "the guard without c")


def test_who_joins_is_never_reached_in_clear_again(lab):
    """Nor when its key changes, so that its routes are taken away, nor when its pods move; after it left, nobody minds."""
    with Stream(lab, "10.244.3.1") as stream:
        stream.wait_clear()
        lab.api.apply("nodes", lab.node("c"))
        joined(lab)
        assert lab.guarded("a") == {lab.cidr("b"), lab.cidr("c")}
        stream.wait_dropped()
        clear = stream.in_clear()
        assert clear == set(range(min(clear), max(clear) + 1)), "not all that was seen came before the guard"
        lab.start("c")
        lab.whole("a", "b", "c")
        stream.wait_hidden()
        lab.stop("c")
        # Another machine: its device accepts nobody, and its routes go.
        lab.api.recreate("nodes", "c", obj=lab.node("c", key=netlab.new_key()[1], uid=str(uuid.uuid4())))
        lab.wait(lambda: lab.sends_to("a", "b") and lab.keys["c"][1] not in lab.allowed("a"), "a without routes to c")
        stream.wait_dropped()
        lab.api.recreate("nodes", "c", obj=lab.node("c", uid=str(uuid.uuid4())))
        lab.start("c")
        lab.whole("a", "b", "c")
        stream.wait_hidden()
        assert stream.in_clear() == clear and min(stream.hidden()) > max(clear)
        lab.api.delete("nodes", "c")
        lab.whole("a", "b")
        stream.wait_clear()


def test_another_cidr_is_guarded_before_the_old_one_is_let_go(lab):
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    # within the old one: the kernel refuses elements that overlap
    lab.api.recreate("nodes", "c", obj=lab.node("c", cidrs=["10.244.3.128/25"], uid=str(uuid.uuid4())))
    lab.wait(lambda: lab.guarded("a") == {lab.cidr("b"), "10.244.3.128/25"} and "10.244.3.128/25" in lab.routes("a"), "the new CIDR at a")
    lab.api.recreate("nodes", "c", obj=lab.node("c", uid=str(uuid.uuid4())))
    lab.wait(lambda: lab.guarded("a") == {lab.cidr("b"), lab.cidr("c")}, "the old CIDR at a")


@pytest.mark.parametrize("how", ["flushed", "the table of the last run"])
def test_tables_that_others_load_are_mended_at_once(lab, how):
    """What nftables.service does when it is reloaded: all tables go, and the one of the last run is loaded again."""
    lab.api.apply("nodes", lab.node("c"))
    joined(lab)
    repairs = lab.state("a")["counts"]["repairs"]
    lab.net.exec("a", "nft", "flush", "ruleset")
    if how != "flushed":
        lab.load_guard("a")
    lab.wait(lambda: lab.guarded("a") == {lab.cidr("b"), lab.cidr("c")}, "the guard of a")
    lab.wait(lambda: lab.state("a")["counts"]["repairs"] > repairs and lab.state("a")["guard"] == "in force", "a repair in the state of a")


@pytest.mark.parametrize("damage", [
    "delete element inet kubemesh_guard pods4 { 10.244.2.0/24 }", "add element inet kubemesh_guard nodes4 { 192.0.2.1 }",
    "flush chain inet kubemesh_guard leaving", "add rule inet kubemesh_guard leaving accept"])
def test_drift_is_repaired_by_the_next_comparison_and_told(lab, damage):
    before, repairs = lab.net.exec("a", "nft", "-s", "list", "table", "inet", "kubemesh_guard"), lab.state("a")["counts"]["repairs"]
    lab.net.exec("a", "nft", damage)
    os.utime(lab.place("a") / "mesh.json")
    lab.wait(lambda: lab.net.exec("a", "nft", "-s", "list", "table", "inet", "kubemesh_guard") == before, "the guard of a as it was")
    lab.wait(lambda: lab.state("a")["counts"]["repairs"] > repairs, "a repair in the state of a")
    text = (lab.place("a") / "state" / "kubemesh.prom").read_text()
    assert "kubemesh_guard_in_force 1" in text and 'kubemesh_guard_dropped_packets_total{what="out_pods"}' in text


def test_a_boot_is_closed_for_who_joined_since_the_last_run(lab):
    lab.api.apply("nodes", lab.node("c"))
    joined(lab)
    lab.stop("a")
    lab.net.exec("a", "nft", "flush", "ruleset")
    lab.load_guard("a")
    assert lab.guarded("a") == {lab.cidr("b")}
    lab.net.exec("a", sys.executable, "-m", agentlab.PROGRAM, "--guard", str(lab.place("a") / "agent.json"))
    assert lab.guarded("a") == {lab.cidr("b"), lab.cidr("c")}
    lab.start("a")
    joined(lab)


def test_what_a_run_makes_of_the_guard_counts(lab):
    """Other settings are taken over, and a guard that a run opened stays open."""
    repairs = lab.state("a")["counts"]["repairs"]
    lab.guard("a", exempt_nodes=["c"])
    lab.api.apply("nodes", lab.node("c"))
    joined(lab)
    assert lab.guarded("a") == {lab.cidr("b")}
    (lab.place("a") / "boot" / "guard.nft").unlink()
    lab.net.exec("a", "nft", "delete table inet kubemesh_guard")
    lab.api.apply("nodes", apiserver.node("pending", ["10.244.77.0/24"]))
    lab.wait(lambda: lab.state("a")["nodes"] == 4 and lab.state("a")["guard"] == "off", "a without a guard")
    assert lab.guarded("a") is None and lab.state("a")["counts"]["repairs"] == repairs
    lab.api.delete("nodes", "pending")
    lab.guard("a")
    lab.wait(lambda: lab.state("a")["guard"] == "in force" and lab.guarded("a") == {lab.cidr("b"), lab.cidr("c")}, "the guard of a again")


# --- host encryption ---------------------------------------------------------------------------------------------------------------------

def reached(lab, port):
    """Whether a gets a TCP connection to c's own address."""
    program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"
    done = subprocess.run(["ip", "netns", "exec", lab.net.ns("a"), sys.executable, "-S", "-c", program, lab.net.address("c"), str(port)],
                          capture_output=True, timeout=60 * netlab.PATIENCE, check=False)
    return done.returncode == 0


@contextlib.contextmanager
def serving(lab, *ports):
    program = "import socket, sys, time\nopen_ = [socket.create_server(('', int(port))) for port in sys.argv[1:]]\ntime.sleep(3600)"
    process = lab.net.start("c", sys.executable, "-S", "-c", program, *ports)
    try:
        lab.wait(lambda: all(":%d " % port in lab.net.exec("c", "ss", "-Htln") for port in ports), "servers at c")
        yield
    finally:
        process.terminate()
        process.wait(timeout=20 * netlab.PATIENCE)


def test_host_encryption_reaches_who_joins_in_clear_until_it_answers_and_then_in_the_tunnel(tmp_path):
    """Nobody is locked out: nothing of a's to c's own address changes before the tunnel to c was proven."""
    with running(tmp_path, encrypt="nodes") as lab, serving(lab, 22), Stream(lab, lab.net.address("c")) as stream:
        stream.wait_clear()
        lab.api.apply("nodes", lab.node("c"))
        joined(lab)
        stream.wait_clear()
        assert reached(lab, 22) and lab.guarded("a") is None
        lab.start("c")
        lab.whole("a", "b", "c")
        stream.wait_hidden()
        clear = stream.in_clear()
        stream.wait_hidden()
        assert stream.in_clear() == clear and reached(lab, 22)
        sent = stream.numbers(stream.there)
        assert sent == set(range(min(sent), max(sent) + 1)), "a packet was lost"


def test_host_encryption_under_strict_mode_drops_until_the_tunnel_is_proven(tmp_path):
    with running(tmp_path, encrypt="nodes", strict={}) as lab, serving(lab, 22, 8080), Stream(lab, lab.net.address("c")) as stream:
        stream.wait_clear()
        lab.api.apply("nodes", lab.node("c"))
        joined(lab)
        stream.wait_dropped()
        clear = stream.in_clear()
        assert clear == set(range(min(clear), max(clear) + 1))
        # the way that people have left: mesh_admin_ports
        assert reached(lab, 22) and not reached(lab, 8080)
        lab.start("c")
        lab.whole("a", "b", "c")
        stream.wait_hidden()
        assert stream.in_clear() == clear
        lab.wait(lambda: reached(lab, 8080), "c through the tunnel")
        lab.api.delete("nodes", "c")
        lab.whole("a", "b")
        lab.wait(lambda: lab.guarded("a", "nodes4") == {lab.net.address("b")}, "the guard without c")
        stream.wait_clear()


def test_who_is_exempt_is_reached_in_clear_until_it_is_proven(tmp_path):
    with running(tmp_path, encrypt="nodes", strict={"exempt_nodes": ["c"]}) as lab, Stream(lab, lab.net.address("c")) as stream:
        lab.api.apply("nodes", lab.node("c"))
        joined(lab)
        stream.wait_clear()
        assert lab.guarded("a", "nodes4") == {lab.net.address("b")}
