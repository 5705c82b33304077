# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents with real WireGuard devices, rules and routes, and an API server that misbehaves on demand.

One mesh of a and b for all tests, and c that joins; each test leaves it as it found it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agentlab
import apiserver
import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh

pytestmark = pytest.mark.skipif(bool(agentlab.why_not()), reason="live tests: " + agentlab.why_not())


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    with agentlab.AgentLab(tmp_path_factory.mktemp("agent"), ["a", "b", "c"], ["a", "b"]) as lab:
        lab.start("a", "b")
        yield lab


@pytest.fixture
def lab(mesh):
    mesh.whole("a", "b")
    mesh.wait(lambda: all(mesh.state(host).get("api") == "watching" and mesh.state(host)["nodes"] == 2 for host in "ab")
              and mesh.api.watching() >= 2, "agents that watch")
    # an event, so that nobody pauses for what went wrong in the test before
    mesh.api.heartbeat()
    yield mesh
    mesh.api.clear_faults()
    mesh.api.permit()
    mesh.api.up()
    if "c" in mesh.agents:
        mesh.stop("c")
    if "c" in mesh.api.names("nodes"):
        mesh.api.delete("nodes", "c")
    mesh.whole("a", "b")


def watched_again(lab, before):
    """Wait until the agents of a and b both asked for a list again since there were so many requests."""
    lab.wait(lambda: sum(1 for request in lab.api.requests[before:] if request["verb"] == "watch" and request["code"] == 200) >= 2,
             "new watches")


def test_joins_sends_only_when_accepted_and_leaves(lab):
    lab.api.apply("nodes", lab.node("c"))
    # c has a device that accepts nobody yet: it is a peer, and nothing is sent to it.
    lab.wait(lambda: lab.keys["c"][1] in lab.allowed("a") and lab.state("a").get("unproven") == ["c"], "c as a peer that is not proven")
    assert lab.sends_to("a", "b")
    lab.start("c")
    lab.whole("a", "b", "c")
    assert lab.net.exec("a", "ping", "-c", "1", "-W", "5", "-I", lab.net.address("a"), "10.244.3.1")
    lab.api.delete("nodes", "c")
    lab.whole("a", "b")
    assert lab.keys["c"][1] not in lab.allowed("a")


def test_changes_of_status_change_nothing(lab):
    # The state is told a while after what happened: of what it says of this node, nothing is under way.
    lab.api.apply("nodes", apiserver.node("pending"))
    lab.wait(lambda: lab.state("a")["nodes"] == 3, "three nodes")
    before = lab.state("a")["counts"]
    for dummy in range(10):
        lab.api.heartbeat()
    lab.api.delete("nodes", "pending")
    lab.wait(lambda: lab.state("a")["nodes"] == 2, "two nodes")
    after = lab.state("a")["counts"]
    assert after["changes"] == before["changes"] + 1
    assert after["events"] >= before["events"] + 31


def test_another_cidr_moves_without_a_gap_for_the_rest(lab):
    node = lab.node("b", cidrs=["10.244.9.0/24"], uid=str(uuid.uuid4()))
    lab.api.recreate("nodes", "b", obj=node)
    lab.wait(lambda: lab.routes("a") == {"10.244.9.0/24", lab.net.address("b")}, "the new CIDR of b at a")
    assert "10.244.9.0/24" in lab.allowed("a")[lab.keys["b"][1]]
    # what is accepted goes after what is sent
    lab.wait(lambda: lab.cidr("b") not in lab.allowed("a")[lab.keys["b"][1]], "the device without the old CIDR of b")
    lab.api.recreate("nodes", "b", obj=lab.node("b", uid=str(uuid.uuid4())))


def test_replaced_under_the_same_name_with_another_key(lab):
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    lab.stop("c")
    # The machine is another one with another key, whose device accepts nobody: nothing may be sent to it.
    lab.api.recreate("nodes", "c", obj=lab.node("c", key=netlab.new_key()[1], uid=str(uuid.uuid4())))
    lab.wait(lambda: lab.sends_to("a", "b") and lab.keys["c"][1] not in lab.allowed("a") and len(lab.allowed("a")) == 2,
             "the new key of c at a, without routes")


def test_a_cidr_goes_from_one_node_to_the_next_at_once(lab):
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    lab.stop("c")
    lab.api.delete("nodes", "c")
    lab.api.apply("nodes", apiserver.node("next", [lab.cidr("c")], ["198.18.7.200"], {agentlab.KEY: netlab.new_key()[1]}))
    lab.wait(lambda: any(lab.cidr("c") in found and "198.18.7.200/32" in found for found in lab.allowed("a").values()), "the next node")
    assert lab.cidr("c") not in lab.routes("a")
    lab.api.delete("nodes", "next")


def test_api_away_and_what_happened_meanwhile(lab):
    lab.api.down()
    lab.wait(lambda: lab.state("a")["api"] != "watching" and lab.state("b")["api"] != "watching", "agents that know that the API is away")
    # A second of grace is over long since when it is back, and counts from then.
    assert lab.sends_to("a", "b")
    lab.api.apply("nodes", lab.node("c"))
    lab.start("c")
    lab.api.up()
    lab.whole("a", "b", "c")


@pytest.mark.parametrize("fault", ["empty", "garbage", "reset", "half", "status"])
def test_lists_that_are_none_take_nothing_away(lab, fault):
    lab.api.fault(fault, verb="list", resource="nodes", times=4)
    before = len(lab.api.requests)
    lab.api.compact()
    lab.api.close_watches()
    watched_again(lab, before)
    lab.wait(lambda: lab.state("a")["api"] == "watching" and lab.state("b")["api"] == "watching", "agents that watch again")
    assert lab.sends_to("a", "b") and lab.sends_to("b", "a")


@pytest.mark.parametrize("how", ["in the stream", "as a status"])
def test_gone_is_read_again_and_the_difference_applied(lab, how):
    lab.start("c")
    if how == "in the stream":
        lab.api.down()
        lab.api.apply("nodes", lab.node("c"))
        lab.api.compact()
        lab.api.up()
    else:
        lab.api.fault("status", verb="watch", resource="nodes", code=410, times=2)
        lab.api.close_watches()
        lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")


def test_token_is_read_again(lab):
    lab.api.set_tokens({"agent": "t-2"})
    try:
        lab.api.close_watches()
        lab.wait(lambda: "401" in lab.state("a")["api"], "the refused token in the state of a")
        for host in ("a", "b"):
            (lab.place(host) / "token").write_text("t-2\n")
        lab.wait(lambda: lab.state("a")["api"] == "watching", "the new token")
    finally:
        lab.api.set_tokens({"agent": "t-1"})
        for host in ("a", "b"):
            (lab.place(host) / "token").write_text("t-1\n")


def test_drift_is_repaired(lab):
    repairs = lab.state("a")["counts"]["repairs"]
    lab.net.exec("a", "wg", "set", lab.devices["a"], "peer", lab.keys["b"][1], "remove")
    lab.net.ip("a", "route flush table %d" % agentlab.TABLE, "rule del priority %d" % agentlab.PRIORITY, "link set %s mtu 1300" %
               lab.devices["a"])
    os.utime(lab.place("a") / "mesh.json")
    lab.whole("a", "b")
    lab.wait(lambda: lab.state("a")["counts"]["repairs"] > repairs, "a repair in the state of a")
    assert "mtu 1420" in lab.net.exec("a", "ip", "link", "show", lab.devices["a"])


@pytest.mark.parametrize("what", [
    "rule del priority {priority}", "route flush table {table}", "link set {device} down", "addr flush dev {device}"])
def test_what_is_taken_away_is_back_long_before_the_next_comparison(lab, what):
    """The comparison comes after a minute at the soonest, and what waits here waits for less."""
    def state():
        addresses = lab.net.exec("a", "ip", "-o", "addr", "show", "up", lab.devices["a"]).splitlines()
        return [lab.net.exec("a", "ip", "rule"), lab.net.exec("a", "ip", "route", "show", "table", agentlab.TABLE, check=False),
                sorted(line.split("scope")[0] for line in addresses)]

    before, repairs = state(), lab.state("a")["counts"]["repairs"]
    lab.net.ip("a", what.format(priority=agentlab.PRIORITY, table=agentlab.TABLE, device=lab.devices["a"]))
    lab.wait(lambda: lab.state("a")["counts"]["repairs"] > repairs, "a repair in the state of a")
    lab.wait(lambda: state() == before, "what was there before")


def test_killed_and_started_again(lab):
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    lab.stop("a", kill=True)
    assert lab.sends_to("a", "b", "c")
    lab.api.delete("nodes", "c")
    lab.api.down()
    lab.start("a")
    # without the API it keeps what it knew before, also what the document of the last run does not have
    lab.wait(lambda: lab.state("a").get("nodes") == 3 and lab.state("a")["api"] != "watching", "the state of a after its start")
    assert lab.sends_to("a", "b", "c")
    lab.api.up()
    lab.whole("a", "b")


def test_second_agent_is_refused(lab):
    first = lab.agents.pop("a")
    lab.start("a")
    second = lab.agents.pop("a")
    lab.agents["a"] = first
    assert second.wait(timeout=60 * netlab.PATIENCE) == 3
    assert "another agent is at work" in lab.log("a")


def test_waits_for_a_run(lab):
    lock = {"path": str(lab.place("a") / "lock" / "lock.json"), "run": "run-of-a-test", "who": "tester", "doing": "reconcile"}
    assert lab.net.module("a", "lock", state="held", started=1, **lock)["acquired"]
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.wait(lambda: lab.keys["c"][1] in lab.allowed("b") and "tester runs reconcile" in lab.state("a")["waits_for_run"],
             "c at b, a that waits")
    assert lab.keys["c"][1] not in lab.allowed("a")
    lab.net.module("a", "lock", state="absent", **lock)
    lab.whole("a", "b", "c")


def test_rotation_is_waited_for_and_gone_on_from(tmp_path):
    """A run with the lock makes a second generation of keys, is interrupted, and ends; the same agents go on with the new one."""
    with agentlab.AgentLab(tmp_path, ["a", "b", "c"], ["a", "b"]) as lab:
        lab.start("a", "b")
        lab.whole("a", "b")
        running = dict(lab.agents)
        first, keys = dict(lab.keys), {}
        locks = {host: {"path": str(lab.place(host) / "lock" / "lock.json"), "run": "run-of-a-test", "who": "tester",
                        "doing": "rotate_keys"} for host in "ab"}
        for host in "ab":
            assert lab.net.module(host, "lock", state="held", started=1, **locks[host])["acquired"]
            keys[host] = lab.second_generation(host)
        both = lab.document(serial=2)
        for host in "ab":
            both["nodes"][host]["public_keys"]["1"] = keys[host]
            both["nodes"][host]["probe_addresses"]["1"] = _mesh.probe_address(keys[host])
        lab.leave_document(both)
        lab.wait(lambda: all("tester runs rotate_keys" in lab.state(host)["waits_for_run"] for host in "ab"), "agents that wait")
        # The run ends here, before its work is done: what happens now is for the next one.
        for host in "ab":
            lab.net.module(host, "lock", state="absent", **locks[host])
        lab.api.apply("nodes", lab.node("c"))
        lab.wait(lambda: all("a rotation of keys is under way" in lab.state(host)["hindrance"] for host in "ab"), "agents that wait")
        lab.wait(lambda: lab.state("a")["nodes"] == 3, "c at a")
        assert lab.sends_to("a", "b") and first["c"][1] not in lab.allowed("a")
        lab.api.delete("nodes", "c")
        for host in "ab":
            assert lab.net.module(host, "lock", state="held", started=1, **locks[host])["acquired"]
        last = lab.document(serial=3)
        last["generation"] = 1
        for host in "ab":
            last["nodes"][host].update(public_keys={"1": keys[host]}, probe_addresses={"1": _mesh.probe_address(keys[host])})
        for host in "ab":
            lab.take_second_generation(host, last)
        lab.leave_document(last)
        for host in "ab":
            # the proof that the run has before it sends, for the agent to go by
            proof_file = lab.place(host) / "lock" / ("proof-%s.json" % lab.devices[host])
            proof = lab.net.module(host, "probe", document_file=str(lab.place(host) / "mesh.json"), node=host, generation=1,
                                   interface=lab.devices[host], proof_file=str(proof_file))
            assert proof["proven_count"] == 1, proof
        for host in "ab":
            lab.net.module(host, "lock", state="absent", **locks[host])
        lab.wait(lambda: all(lab.state(host)["hindrance"] == "" and lab.state(host)["generation"] == 1 for host in "ab"),
                 "agents of generation 1")
        lab.whole("a", "b")
        assert set(lab.allowed("a")) == {keys["b"]} and first["b"][1] not in lab.net.exec("a", "wg", "show", "all", "peers")
        assert lab.net.exec("a", "ping", "-c", "1", "-W", "5", "-I", lab.net.address("a"), "10.244.2.1")
        # who joins now does so with the new generation
        lab.keys["c"] = ("", lab.second_generation("c"))
        lab.api.apply("nodes", lab.node("c", annotations={agentlab.KEY_1: lab.keys["c"][1]}))
        lab.wait(lambda: lab.keys["c"][1] in lab.allowed("a") and lab.state("a")["unproven"] == ["c"], "c as a peer of the new device")
        assert lab.agents == running and all(agent.poll() is None for agent in running.values())


def test_a_disk_that_is_full_stops_nothing(tmp_path):
    with agentlab.AgentLab(tmp_path, ["a", "b", "c"], ["a", "b"]) as lab:
        full = [lab.place("a") / name for name in ("state", "runtime")]
        for folder in full:
            netlab.run("mount", "-t", "tmpfs", "-o", "size=32k,mode=0755", "tmpfs", folder)
        try:
            lab.start("a", "b", "c")
            lab.whole("a", "b")
            for folder in full:
                with open(folder / "ballast", "wb", buffering=0) as handle, contextlib.suppress(OSError):
                    while True:
                        handle.write(b"x" * 4096)
            lab.api.apply("nodes", lab.node("c"))
            lab.whole("a", "b", "c")
            lab.wait(lambda: "No space left on device" in lab.log("a"), "what the disk said in the log of a")
            assert lab.agents["a"].poll() is None
            for folder in full:
                (folder / "ballast").unlink()
            lab.api.delete("nodes", "c")
            lab.whole("a", "b")
            lab.wait(lambda: lab.state("a").get("nodes") == 2 and '"c"' not in (full[0] / "memory.json").read_text(),
                     "state and memory of a")
            for folder in full:
                assert not [path for path in folder.iterdir() if path.name.startswith(".")], "half a file was left"
        finally:
            lab.stop("a")
            for folder in full:
                netlab.run("umount", folder, check=False)


def test_a_bad_node_does_not_stop_the_others(lab):
    bad = apiserver.node("bad", [lab.cidr("a")], ["198.18.7.201"], {agentlab.KEY: lab.keys["b"][1]})
    lab.api.apply("nodes", bad)
    lab.api.apply("nodes", apiserver.node("jinja", ["{{ 7 * 7 }}"], ["198.18.7.202"], {agentlab.KEY: '{{ lookup("pipe", "id") }}'}))
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    lab.wait(lambda: any("bad" in text for text in lab.state("b")["warnings"]), "a warning that names the bad node")
    lab.api.delete("nodes", "bad")
    lab.api.delete("nodes", "jinja")


def test_own_key_is_published_and_a_refusal_is_no_obstacle(lab):
    lab.api.refuse("patch", "nodes")
    lab.api.patch("nodes", "a", {"metadata": {"annotations": {agentlab.KEY: None}}})
    lab.api.wait_asked(verb="patch", code=403)
    lab.api.permit()
    lab.stop("a")
    lab.start("a")
    lab.wait(lambda: lab.api.get("nodes", "a")["metadata"]["annotations"].get(agentlab.KEY) == lab.keys["a"][1], "the annotation of a")


def test_a_node_that_the_api_forgot_tells_it_and_keeps_what_it_has(lab):
    uid = lab.api.get("nodes", "a")["metadata"]["uid"]
    accepted = lab.allowed("a")
    lab.api.delete("nodes", "a")
    lab.wait(lambda: "the Node of this node was deleted" in lab.state("a")["hindrance"], "what is in the way in the state of a")
    # b does not accept it any more, so nothing is sent there; what a accepts from b, and what it knows, stays.
    lab.wait(lambda: lab.sends_to("a") and lab.rules("a") == 0 and lab.keys["a"][1] not in lab.allowed("b"), "a that sends nothing")
    assert lab.allowed("a") == accepted and lab.state("a")["nodes"] == 2 and lab.agents["a"].poll() is None
    lab.api.apply("nodes", lab.node("a", uid=uid))
    lab.whole("a", "b")
    lab.wait(lambda: lab.state("a")["hindrance"] == "", "a with nothing in its way")


def test_a_wrong_key_is_tried_beside_the_one_in_use(lab):
    wrong, right = netlab.new_key()[1], lab.keys["b"][1]
    accepted = lab.allowed("a")[right]
    # b would put it right at once
    lab.api.refuse("patch", "nodes")
    lab.api.patch("nodes", "b", {"metadata": {"annotations": {agentlab.KEY: wrong}}})
    lab.wait(lambda: wrong in lab.allowed("a") and any("holds another key" in text for text in lab.state("a")["warnings"]),
             "the other key of b at a, and a warning")
    # It gets nothing but the address that it is asked at, and that nobody answers.
    assert lab.allowed("a") == {right: accepted, wrong: {_mesh.probe_address(wrong) + "/128"}} and lab.sends_to("a", "b")
    assert lab.ping("a", "10.244.2.1")
    lab.api.patch("nodes", "b", {"metadata": {"annotations": {agentlab.KEY: right}}})
    lab.wait(lambda: lab.allowed("a") == {right: accepted}, "a without the other key")
    assert lab.sends_to("a", "b")


def test_metrics(lab):
    lab.net.exec("a", "ping", "-c", "1", "-W", "5", "-I", lab.net.address("a"), "10.244.2.1")
    lab.wait(lambda: 'kubemesh_peer_encrypted{peer="b"} 1' in (lab.place("a") / "state" / "kubemesh.prom").read_text(), "metrics of a")
    text = (lab.place("a") / "state" / "kubemesh.prom").read_text()
    assert "kubemesh_agent_api_up 1" in text and "kubemesh_agent_ok 1" in text and 'kubemesh_peer_handshake_age_seconds{peer="b"}' in text
