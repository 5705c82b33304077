# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent's loop without a kernel; with one it is shown in tests/live."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import sys
import threading

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import documents

from ansible_collections.kubemesh.wireguard.plugins.module_utils import (
    _agent,
    _agent_drift,
    _agent_guard,
    _agent_plan,
    _mesh,
    _pods,
    _wg_plan,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kube_watch import ApiError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError


class Kernel:
    """Where every change works, and is counted, and reading costs."""

    def __init__(self):
        self.reads, self.converged, self.errors, self.withdrawn, self.applied = 0, [], [], 0, []
        self.state = {"name": "wgmesh0", "public_key": documents.key(1), "peers": {}}

    def name(self, generation):
        return "wgmesh%d" % generation

    def read(self, generation):
        return {}, self.state

    def routes(self):
        return {"routes": [], "rules": []}

    def look(self, generation, whole):
        self.reads += int(whole)
        return {}, self.state, self.routes()

    def misses(self, found):
        return "ours" in found

    def sends_all(self):
        return True

    def withdraw(self):
        self.withdrawn += 1

    def converge(self, document, applied, proven, own_cidrs=None, trial=None, tried=frozenset()):
        for error in self.errors:
            raise error
        self.trial = (sorted(trial), sorted(tried))
        self.converged.append(sorted(document["nodes"]))
        self.applied.append(applied)
        return [], self.state


class Client:
    """An API that is never reached; what is written there is noted."""

    def __init__(self):
        self.patches = queue.Queue()

    def patch(self, path, patch):
        self.patches.put((path, patch))

    def list(self, path, kind, reduce):
        raise ApiError("not there")


@pytest.fixture
def agent(tmp_path):
    for name in ("runtime", "state"):
        (tmp_path / name).mkdir()
    doc = documents.document({"w%d" % number: documents.entry(number, uid="u%d" % number) for number in (1, 2)})
    (tmp_path / "mesh.json").write_bytes(_mesh.document_bytes(doc))
    config = {"node": "w1", "server": "https://192.0.2.1", "ca_file": None, "token_file": None, "interface": "wgmesh", "table": 51840,
              "rule_priority": 400, "fwmark": 4096, "exempt_cidrs": [], "exclude_nodes": [], "service_cidrs": [], "grace": 60,
              "pod_source": "node_cidrs",
              "document_file": str(tmp_path / "mesh.json"), "boot_folder": str(tmp_path), "lock_file": str(tmp_path / "no" / "lock.json"),
              "runtime": str(tmp_path / "runtime"), "state": str(tmp_path / "state"), "metrics_file": str(tmp_path / "state" / "m.prom")}
    return started(config)


def started(config):
    """An agent that starts, with a kernel that counts from here on."""
    it = _agent.Agent(config, Kernel(), Client(), clock=lambda: it.now, environ={})
    it.prove = lambda now: None
    it.now = 1000.0
    it.lists = []
    it.follower.list_again = lambda: it.lists.append(it.now)
    it.load_base()
    it.due["converge"] = it.now
    return it


def hold_lock(config):
    """A run holds the lock of the node, for as long as this is open."""
    folder = os.path.dirname(config["lock_file"])
    os.makedirs(folder)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_an_agent_that_was_killed_while_a_run_held_the_lock_knows_what_the_kernel_holds(agent):
    agent.tick()
    handle = hold_lock(agent.config)
    try:
        agent.on_listed(listing(1, 2, 3))
        agent.now += 1
        agent.tick()
        assert agent.waits and set(agent.document["nodes"]) == {"w1", "w2", "w3"} and len(agent.kernel.converged) == 1
    finally:
        os.close(handle)
    again = started(agent.config)
    again.tick()
    assert again.kernel.converged == [["w1", "w2", "w3"]] and set(again.kernel.applied[0]["nodes"]) == {"w1", "w2"}
    # and one that was killed afterwards knows that it is done
    last = started(agent.config)
    last.tick()
    assert set(last.kernel.applied[0]["nodes"]) == {"w1", "w2", "w3"}


def accepted(prefix):
    """A peer of a device state."""
    return {"endpoint": None, "allowed_ips": [prefix], "keepalive": 0, "has_preshared_key": False, "last_handshake": 0.0, "rx_bytes": 0,
            "tx_bytes": 0}


def test_who_has_lost_what_it_knew_takes_nothing_away_before_it_knows_again(agent):
    """A node that joined since the last run is in the kernel, and not in the document of that run."""
    agent.kernel.state["peers"] = {documents.key(number): accepted("10.244.%d.0/24" % number) for number in (2, 3)}
    agent.tick()
    assert agent.blind and "memory.json" in agent.trouble and not agent.kernel.converged
    agent.on_listed(listing(1, 2, 3))
    agent.now += 1
    agent.tick()
    assert not agent.blind and not agent.trouble and agent.kernel.converged == [["w1", "w2", "w3"]]
    # and who knows, takes away what is not wanted
    again = started(agent.config)
    again.kernel.state["peers"] = dict(agent.kernel.state["peers"], other=accepted("10.244.9.0/24"))
    again.tick()
    assert again.kernel.converged and not again.trouble


def test_who_knows_nothing_works_where_the_kernel_is_as_the_last_run_left_it(agent):
    agent.kernel.state["peers"] = {documents.key(2): accepted("10.244.2.0/24")}
    agent.tick()
    assert not agent.blind and agent.kernel.converged == [["w1", "w2"]]


def test_after_a_reboot_the_kernel_holds_what_the_last_run_left(agent, monkeypatch):
    """The pod CIDR of w2 is w3's now: a route to it is one to w2 as long as the kernel was not brought further."""
    agent.on_listed(listing(1, 2))
    agent.now += 1
    agent.tick()
    nodes = [node(1), node(2), node(3)]
    nodes[1]["spec"]["podCIDRs"], nodes[2]["spec"]["podCIDRs"] = ["10.244.9.0/24"], ["10.244.2.0/24"]
    agent.on_listed({"w%d" % number: _agent_plan.reduced(obj) for number, obj in enumerate(nodes, 1)})
    agent.now += 1
    agent.tick()
    assert agent.applied["nodes"]["w3"]["pod_cidrs"] == ["10.244.2.0/24"]
    monkeypatch.setattr(_agent._lock, "BOOT_ID", os.devnull)  # not the one of before
    booted = started(agent.config)
    booted.tick()
    assert booted.document == agent.document
    assert booted.kernel.applied[0] == booted.base and booted.base["nodes"]["w2"]["pod_cidrs"][0] == "10.244.2.0/24"


def node(number):
    entry = documents.entry(number)
    return {"metadata": {"name": "w%d" % number, "uid": "u%d" % number,
                         "annotations": {"kubemesh.wireguard/public-key-0": documents.key(number)}},
            "spec": {"podCIDRs": entry["pod_cidrs"]},
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in entry["node_addresses"]]}}


def listing(*numbers):
    return {"w%d" % number: _agent_plan.reduced(node(number)) for number in numbers}


def test_whole_comparisons_come_within_60_to_90_seconds_and_news_need_none(agent):
    agent.tick()
    assert (agent.kernel.reads, agent.kernel.converged) == (1, [["w1", "w2"]])
    assert 60 <= agent.due["compare"] - agent.now <= 90 and agent.due["converge"] == agent.due["compare"]
    agent.on_listed(listing(1, 2, 3))
    agent.now += 0.04
    agent.tick()
    assert len(agent.kernel.converged) == 1  # not settled yet
    agent.now += 0.02
    agent.tick()
    assert agent.kernel.converged[1:] == [["w1", "w2", "w3"]] and agent.kernel.reads == 1
    agent.now = agent.due["compare"]
    agent.tick()
    assert agent.kernel.reads == 2


def test_who_is_gone_goes_after_the_grace_and_not_while_the_api_is_away(agent):
    agent.on_listed(listing(1, 2))
    agent.on_event(("w2", None))
    agent.now += 1
    agent.tick()
    agent.on_away("cut")
    agent.now += 3600
    agent.tick()
    assert set(agent.document["nodes"]) == {"w1", "w2"}
    agent.on_back(None)
    agent.now += 59
    agent.tick()
    assert set(agent.document["nodes"]) == {"w1", "w2"}
    agent.now += 2
    agent.tick()
    assert set(agent.document["nodes"]) == {"w1"} and agent.kernel.converged[-1] == ["w1"]


def test_who_is_gone_from_a_list_goes_when_another_says_so_too(agent):
    agent.on_listed(listing(1))
    agent.now += 61
    agent.tick()
    assert agent.lists == [agent.now] and set(agent.document["nodes"]) == {"w1", "w2"} and agent.pause() > 0
    agent.now += 1
    agent.tick()
    assert len(agent.lists) == 1
    # the first list was wrong
    agent.on_listed(listing(1, 2))
    agent.now += 3600
    agent.tick()
    assert len(agent.lists) == 1 and set(agent.document["nodes"]) == {"w1", "w2"}
    # this one is not
    agent.on_listed(listing(1))
    agent.now += 61
    agent.tick()
    assert len(agent.lists) == 2 and set(agent.document["nodes"]) == {"w1", "w2"}
    agent.on_listed(listing(1))
    agent.now += _agent.GONE_AGAIN
    agent.tick()
    assert set(agent.document["nodes"]) == {"w1"}


def test_what_a_list_of_pods_lacks_is_asked_for_again(agent):
    it = started(dict(agent.config, pod_source="pods"))
    it.pod_followers["Pod"].list_again = lambda: it.lists.append("Pod")
    pods = {"d/p%d" % number: _pods.REDUCERS["Pod"]({
        "metadata": {"name": "p%d" % number, "namespace": "d"}, "spec": {"nodeName": "w1"},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.%d" % number}]}}) for number in (1, 2)}
    it.on_listed(listing(1, 2))
    it.on_pods(("Pod", "listed", pods))
    it.on_pods(("Pod", "back", None))
    it.on_pods(("Pod", "listed", {"d/p1": pods["d/p1"]}))
    it.now += 59
    it.tick()
    assert it.lists == []
    for dummy in range(3):
        it.now += _agent.GONE_AGAIN
        it.tick()
    assert it.lists == ["Pod"] and set(it.pods.found["Pod"]) == set(pods)
    it.on_pods(("Pod", "listed", {"d/p1": pods["d/p1"]}))
    it.now += _agent.GONE_AGAIN
    it.tick()
    assert it.lists == ["Pod"] and set(it.pods.found["Pod"]) == {"d/p1"}


def peers(doc):
    """The peers of a device that is as a document says, for w1."""
    steps = [dict(peer, op="add_peer", public_key=key) for key, peer in _mesh.peers_of(doc, "w1", 0).items()]
    return _wg_plan.apply_steps(_wg_plan.empty_state("wgmesh0"), steps)["peers"]


def kubelets(number):
    """A Node as kubelet registers it anew."""
    again = node(number)
    again["metadata"].update(uid="again", annotations={})
    return _agent_plan.reduced(again)


def offered_nothing(it):
    """Whether no patch is sent, nor on its way."""
    for thread in threading.enumerate():
        if thread.name == "publisher":
            thread.join()
    return it.client.patches.empty()


def test_who_is_forgotten_stops_sending_and_goes_on_when_the_others_can_know_its_key(agent):
    agent.on_listed(listing(1, 2))
    agent.proved = {"w2": documents.key(2)}
    agent.kernel.state["peers"] = peers(agent.document)
    agent.now += 1
    agent.tick()
    assert agent.proven() == {"w2"} and len(agent.kernel.converged) == 1
    agent.on_event(("w1", None))
    for dummy in range(59):
        agent.now += 1
        agent.tick()
    assert agent.trouble == "" and agent.kernel.withdrawn == 0
    agent.now += _agent.GONE_AGAIN
    agent.tick()
    assert "was deleted" in agent.trouble and agent.kernel.withdrawn == 1 and set(agent.document["nodes"]) == {"w1", "w2"}
    assert agent.proven() == set() and agent.pause() > 0
    done = len(agent.kernel.converged)
    agent.on_event(("w1", kubelets(1)))
    agent.now += 1
    agent.tick()
    agent.now = agent.due["compare"]
    agent.tick()
    assert "without its key" in agent.trouble and len(agent.kernel.converged) == done
    # a run gives it the key, by what it found on the machine
    assert offered_nothing(agent)
    again = node(1)
    again["metadata"]["uid"] = "again"
    agent.on_event(("w1", _agent_plan.reduced(again)))
    agent.now += 1
    agent.tick()
    assert agent.trouble == "" and len(agent.kernel.converged) == done + 1


def test_the_key_is_offered_to_the_node_of_the_document_but_not_all_the_time(agent):
    for key in ("", documents.key(7), documents.key(8)):
        # also where somebody writes others all the time
        agent.on_listed(dict(listing(2), w1=other_key(1, key)))
        agent.publish(agent.now)
    # The API refuses it for another Node, which may have come since.
    assert agent.client.patches.get(timeout=20) == ("/api/v1/nodes/w1", {"metadata": {"uid": "u1", "annotations": {
        "kubemesh.wireguard/public-key-0": documents.key(1)}}})
    agent.now += _agent.PUBLISH_AGAIN
    agent.publish(agent.now)
    assert agent.client.patches.get(timeout=20)
    # The same name, and perhaps another machine
    agent.on_event(("w1", kubelets(1)))
    agent.now += _agent.PUBLISH_AGAIN
    agent.publish(agent.now)
    assert offered_nothing(agent)


def test_what_was_known_of_peers_that_left_unproven_is_forgotten(agent):
    agent.kernel.state["peers"] = peers(agent.document)
    agent.tick()
    agent.before[documents.key(2)] = {}
    assert set(agent.asked) == {documents.key(2)}
    agent.on_listed(listing(1, 2))
    agent.on_event(("w2", None))
    agent.now += 61
    agent.tick()
    agent.now += 10
    agent.tick()
    assert agent.asked == {} and agent.before == {}


def other_key(number, key):
    item = node(number)
    item["metadata"]["annotations"]["kubemesh.wireguard/public-key-0"] = key
    return _agent_plan.reduced(item)


def test_a_new_key_counts_when_the_node_was_reached_with_it(agent):
    old, new = documents.key(2), documents.key(8)
    agent.on_listed(listing(1, 2))
    agent.proved = {"w2": old}
    agent.kernel.state["peers"] = peers(agent.document)
    agent.now += 1
    agent.tick()
    agent.on_event(("w2", other_key(2, new)))
    agent.now += 1
    agent.tick()
    assert agent.document["nodes"]["w2"]["public_keys"] == {"0": old} and agent.proven() == {"w2"}
    assert agent.kernel.trial == ([new], [new]) and "another key than the one in use" in agent.texts[0] and agent.pause() > 0
    # the device has it now
    agent.kernel.state["peers"].update(peers(documents.document({
        "w1": documents.entry(1), "w2": documents.entry(2, public_keys={"0": new}, probe_addresses={"0": _mesh.probe_address(new)})})))
    agent.now = agent.due["compare"]
    agent.tick()
    assert set(agent.asked) == {new} and agent.pause() == 0
    # nobody answers: all stays
    agent.on_proved(({}, [new]))
    agent.now += 1
    agent.tick()
    assert agent.document["nodes"]["w2"]["public_keys"] == {"0": old} and agent.pause() >= 0
    agent.on_proved(({new: {"public_key": new, "proven": True}}, []))
    agent.now += 1
    agent.tick()
    assert agent.document["nodes"]["w2"]["public_keys"] == {"0": new} and agent.proven() == {"w2"}
    assert agent.kernel.trial == ([], [new]) and agent.asked == {} and agent.trial is None


def test_a_key_that_is_taken_back_is_tried_no_more(agent):
    agent.on_listed(dict(listing(1, 2)))
    agent.now += 1
    agent.tick()
    agent.on_event(("w2", other_key(2, documents.key(8))))
    agent.now += 1
    agent.tick()
    assert agent.kernel.trial[0] == [documents.key(8)]
    agent.on_event(("w2", _agent_plan.reduced(node(2))))
    agent.now += 1
    agent.tick()
    assert agent.kernel.trial == ([], [documents.key(8)]) and agent.texts == []


def test_the_time_of_day_decides_nothing(agent, monkeypatch, tmp_path):
    """Whoever sets the clock, forward or back, neither hurries the grace nor stops the work."""
    jumps = itertools.cycle([2e9, 1e6, 0.0, 3e9])
    monkeypatch.setattr(_agent.time, "time", lambda: next(jumps))
    agent.on_listed(listing(1, 2))
    agent.on_event(("w2", None))
    for dummy in range(59):
        agent.now += 1
        agent.tick()
        assert set(agent.document["nodes"]) == {"w1", "w2"} and 0 < agent.pause() <= _agent.REPORT_INTERVAL
    agent.now += 2
    agent.tick()
    assert set(agent.document["nodes"]) == {"w1"}
    assert json.loads((tmp_path / "runtime" / "state.json").read_text())["time"] in (2e9, 1e6, 0.0, 3e9)


def test_what_fails_is_tried_again_later_from_the_beginning(agent):
    agent.kernel.errors = [MeshError("the kernel says no")]
    agent.tick()
    assert agent.trouble == "the kernel says no" and agent.due["converge"] == agent.now + _agent.RETRY[0] and agent.whole
    agent.now += _agent.RETRY[0]
    agent.tick()
    assert agent.due["converge"] == agent.now + _agent.RETRY[1]
    agent.kernel.errors = []
    agent.now += _agent.RETRY[1]
    agent.tick()
    assert agent.trouble == "" and agent.applied == agent.document


def test_a_disk_that_is_full_stops_nothing(agent, monkeypatch, capsys):
    def full(path, text, mode):
        raise MeshError("%s cannot be written: no space" % path)

    monkeypatch.setattr(_agent, "write_text", full)
    agent.on_listed(listing(1, 2, 3))
    agent.now += 1
    agent.tick()
    assert agent.kernel.converged[-1] == ["w1", "w2", "w3"] and "no space" in capsys.readouterr().err
    for dummy in range(3):
        agent.now += _agent.BASE_INTERVAL
        agent.tick()
    assert agent.unsaved and "memory.json" not in capsys.readouterr().err  # told once
    # there is room again, and no news
    monkeypatch.undo()
    agent.now += _agent.BASE_INTERVAL
    agent.tick()
    assert not agent.unsaved
    assert set(_agent_plan.parse_memory(_agent.read_text(agent.memory_file()), agent.base_sha256)[0]["nodes"]) == {"w1", "w2", "w3"}


def test_files_that_cannot_be_read_stop_nothing(agent, monkeypatch, capsys):
    """A disk that fails, or somebody who changed what the agent's user may read."""
    def broken(path, *dummy):
        raise MeshError("%s cannot be read: Input/output error" % path)

    agent.tick()
    monkeypatch.setattr(_agent, "read_text", broken)
    monkeypatch.setattr(_agent, "write_text", broken)
    os.utime(agent.config["document_file"])
    agent.on_listed(listing(1, 2, 3))
    for dummy in range(5):
        agent.now += _agent.REPORT_INTERVAL
        agent.tick()
    assert agent.kernel.converged[-1] == ["w1", "w2", "w3"]
    told = capsys.readouterr().err
    assert told.count("mesh.json cannot be read") == 1 and told.count("state.json cannot be read") == 1
    agent.load_proofs()
    assert agent.proved == {}
    # one that starts then has nothing to go by, says so, and begins when it has
    again = started(agent.config)
    again.tick()
    assert "mesh.json cannot be read" in again.trouble and not again.kernel.converged
    monkeypatch.undo()
    again.now += _agent.RETRY[-1]
    again.tick()
    assert again.trouble == "" and again.kernel.converged


def test_a_document_that_vanishes_stops_the_work_and_one_that_comes_back_begins_it(agent, tmp_path):
    agent.tick()
    text = (tmp_path / "mesh.json").read_bytes()
    (tmp_path / "mesh.json").unlink()
    agent.now += 3
    agent.tick()
    assert agent.document is None and "no mesh document" in agent.trouble
    agent.now += 1
    agent.tick()
    assert json.loads((tmp_path / "runtime" / "state.json").read_text())["hindrance"] == agent.trouble
    (tmp_path / "mesh.json").write_bytes(text)
    agent.now += 3
    agent.tick()
    assert agent.trouble == "" and len(agent.kernel.converged) == 2


def test_a_thread_that_ended_ends_the_agent(agent, capsys):
    agent.follower.run = lambda: None
    assert agent.run() == 1
    assert "to be started again" in capsys.readouterr().err


@pytest.mark.parametrize("answers", [True, False])
def test_pods_may_start_when_who_joined_was_proven_or_time_is_up(agent, answers, monkeypatch):
    """READY=1 is what systemd waits for with kubelet; the API is not needed for it."""
    told, waits = [], []
    del agent.prove  # the fixture's, that does nothing
    agent.kernel.state["peers"] = {documents.key(2): {
        "endpoint": None, "allowed_ips": [], "last_handshake": 0, "rx_bytes": 0, "tx_bytes": 0}}
    agent.kernel.prove = lambda document, names, before: {
        name: {"public_key": documents.key(2), "proven": answers, "reason": "no_echo"} for name in names}
    monkeypatch.setattr(agent.notifier, "tell", told.append)
    receive = agent.receive

    def wait(seconds):
        assert seconds <= _agent.READY_SECONDS
        waits.append("READY=1" in told)
        if agent.proving:
            receive(60)
        elif waits[-1]:
            agent.stop()
        else:
            agent.now += seconds

    agent.receive = wait
    begun = agent.now
    assert agent.run() == 0
    assert waits[0] is False and told.count("READY=1") == 1
    assert agent.now - begun == (0 if answers else _agent.READY_SECONDS) and bool(agent.unproven) is not answers


def test_never_busy(agent):
    """Whatever is due, doing it leaves nothing that is due at once."""
    agent.on_listed(listing(1))
    for dummy in range(200):
        agent.tick()
        assert agent.pause() > 0
        agent.now += agent.pause()


class Guard:
    """Notes when it is asked for what."""

    state = _agent_guard.IN_FORCE

    def __init__(self, kernel):
        self.kernel, self.asked, self.errors = kernel, [], []

    def is_changed(self):
        return False

    def forget(self):
        self.asked.append("forget")

    def close(self, document, whole):
        for error in self.errors:
            raise error
        self.asked.append(("close", sorted(document["nodes"]), whole, len(self.kernel.converged)))
        return [], False

    def open(self):
        self.asked.append(("open", len(self.kernel.converged)))
        return []

    def counters(self):
        return None


@pytest.fixture
def guarded(agent, monkeypatch):
    monkeypatch.setattr(_agent, "TableWatcher", lambda tell: threading.Thread(target=lambda: None))
    agent.guard = Guard(agent.kernel)
    return agent


def test_the_guard_is_closed_before_all_else_and_opened_after_it(guarded):
    guarded.tick()
    assert guarded.guard.asked == [("close", ["w1", "w2"], True, 0), ("open", 1)]
    guarded.on_listed(listing(1, 2, 3))
    guarded.now += 1
    guarded.tick()
    assert guarded.guard.asked[2:] == [("close", ["w1", "w2", "w3"], False, 1), ("open", 2)]
    # somebody flushed the tables: only the guard is read
    guarded.on_tables("")
    guarded.tick()
    assert guarded.guard.asked[4:] == [("close", ["w1", "w2", "w3"], True, 2), ("open", 3)] and guarded.kernel.reads == 1


def test_what_somebody_takes_away_is_read_and_put_back_but_not_all_the_time(agent):
    agent.tick()
    assert agent.kernel.reads == 1
    agent.now += 10
    agent.on_drift(["another's"])
    agent.now += 1.1 * _agent_drift.SETTLE
    agent.tick()
    assert agent.kernel.reads == 1
    # what goes together is looked at together
    agent.on_drift(["another's", "ours"])
    agent.on_drift(["ours"])
    agent.tick()
    assert agent.kernel.reads == 1 and 0 < agent.pause() < 2 * _agent_drift.SETTLE
    began = agent.now
    for count in range(_agent_drift.LOOKS):
        agent.now += 1.1 * _agent_drift.SETTLE
        agent.tick()
        assert agent.kernel.reads == 2 + count
        agent.on_drift(["ours"])
    # somebody undoes what the agent does
    agent.now += 1
    agent.tick()
    assert agent.kernel.reads == 1 + _agent_drift.LOOKS
    agent.now = began + _agent_drift.LOOKS_WITHIN + 1.1 * _agent_drift.SETTLE
    agent.tick()
    assert agent.kernel.reads == 2 + _agent_drift.LOOKS
    # more was told than there was room for
    agent.now += _agent_drift.LOOKS_WITHIN
    agent.on_drift(None)
    agent.now += 1.1 * _agent_drift.SETTLE
    agent.tick()
    assert agent.kernel.reads == 3 + _agent_drift.LOOKS


def test_the_first_look_after_a_comparison_is_not_put_off(agent):
    agent.tick()
    agent.on_drift(["ours"])
    agent.now += 1.1 * _agent_drift.SETTLE
    agent.tick()
    assert agent.kernel.reads == 2


def test_what_is_taken_away_does_not_hasten_what_failed(agent):
    agent.tick()
    agent.now += 10
    agent.kernel.errors = [MeshError("no")]
    agent.on_drift(["ours"])
    agent.now += 1.1 * _agent_drift.SETTLE
    agent.tick()
    tried = agent.kernel.reads
    agent.on_drift(["ours"])
    agent.tick()
    assert agent.kernel.reads == tried and agent.pause() > 0


def test_what_is_in_the_way_of_the_mesh_is_not_in_that_of_the_guard(guarded):
    guarded.kernel.state["public_key"] = documents.key(9)
    guarded.tick()
    assert guarded.guard.asked == [("close", ["w1", "w2"], True, 0)] and guarded.trouble and not guarded.kernel.converged


def test_without_its_guard_the_mesh_stays_as_it_is(guarded):
    guarded.guard.errors = [MeshError("nft says no")]
    guarded.tick()
    assert guarded.trouble == "nft says no" and not guarded.kernel.converged
    guarded.guard.errors = []
    guarded.now += _agent.RETRY[0]
    guarded.tick()
    assert guarded.trouble == "" and guarded.kernel.converged
