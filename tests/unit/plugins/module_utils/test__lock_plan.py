# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

BOOT = "3e8a1f9c-5a0e-4d52-9a3c-0b9e8d4f7c21"
CONTROLLER = {"host": "awx-3", "boot_id": BOOT, "namespaces": "pid:[4026531836]", "pid": 4242, "started_ticks": 812345}


def clock(seconds=1000.0, boot_id=BOOT):
    return {"boot_id": boot_id, "seconds": seconds}


def request(run="run-a", state="claimed", **other):
    return plan.check_request(dict({
        "state": state, "run": run, "started": 50.0, "who": "alice@awx-3", "doing": "enable", "lease": 900, "controller": CONTROLLER,
        "take_over": None}, **other))


class Node:
    """A node with a lock file and a clock."""

    def __init__(self, seconds=1000.0):
        self.text, self.seconds, self.written, self.boot_id = None, seconds, seconds, BOOT

    def ask(self, run="run-a", state="claimed", check=False, **other):
        text, result = plan.decide(self.text, self.seconds - self.written, request(run, state, **other), clock(self.seconds, self.boot_id))
        if not check and text != self.text:
            self.text, self.written = text, self.seconds
        return result

    def holder(self):
        return plan.parse(self.text, clock(self.seconds, self.boot_id))[0]


# --- one node ------------------------------------------------------------------------------------------------------------------------

def test_a_lock_from_claim_to_release():
    node = Node()
    first = node.ask()
    assert (first["acquired"], first["renewed"], first["holder"]["phase"]) == (True, False, "claimed")
    assert (first["holder_age_seconds"], first["expires_in_seconds"], first["taken_over"]) == (0.0, 900.0, None)
    node.seconds += 10
    held = node.ask(state="held")
    assert (held["acquired"], held["renewed"], held["holder"]["phase"], held["holder_age_seconds"]) == (True, True, "held", 10.0)
    node.seconds += 800
    assert node.ask(state="held")["expires_in_seconds"] == 900.0, "renewed"
    assert node.ask(state="claimed")["holder"]["phase"] == "held", "asking again for a claim gives nothing away"
    gone = node.ask(state="absent")
    assert (gone["released"], gone["acquired"], gone["holder"], node.text) == (True, False, None, None)
    again = node.ask(state="absent")
    assert (again["released"], node.text) == (False, None)


def test_a_second_run_is_told_who_is_at_work():
    node = Node()
    node.ask()
    node.ask(state="held")
    before = node.text
    node.seconds += 250
    for state in ("claimed", "held"):
        result = node.ask("run-b", state)
        assert not result["acquired"] and node.text == before
        assert result["holder"] == {
            "run": "run-a", "who": "alice@awx-3", "doing": "enable", "started": 50.0, "phase": "held", "controller": CONTROLLER,
            "lease": 900}
        assert (result["holder_age_seconds"], result["expires_in_seconds"]) == (250.0, 650.0)
        assert result["message"] == (
            "another run changes this node: alice@awx-3 has been running enable for 4 min 10 s (run run-a, process 4242 on awx-3); its "
            "lock ends in 10 min 50 s unless that run renews it")
    result = node.ask("run-b", "absent")
    assert not result["released"] and node.text == before and "alice@awx-3" in result["message"], "only one's own lock is given back"


def test_a_claim_is_no_work_yet():
    node = Node()
    node.ask(controller=None)
    node.seconds += 3
    assert "alice@awx-3 asked to run enable 3 s ago (run run-a); its lock ends" in node.ask("run-b")["message"]


def test_a_lock_ends_with_its_lease_and_the_loser_learns_of_it():
    node = Node()
    node.ask(lease=60)
    node.ask(state="held", lease=60)
    node.seconds += 59.9
    assert not node.ask("run-b")["acquired"]
    node.seconds += 0.1
    result = node.ask("run-b", who="cron")
    assert result["acquired"] and result["taken_over"]["run"] == "run-a" and result["taken_over"]["reason"] == "expired"
    assert "taken over from alice@awx-3, who was running enable (run run-a): its lock had ended" in result["message"]
    for state in ("held", "claimed"):
        lost = node.ask("run-a", state)
        assert (lost["acquired"], lost["revoked"], lost["holder"]["run"]) == (False, True, "run-b")
        assert "not renewed in time, and another run took it over; now cron asked to run enable" in lost["message"]
    # also when the other one is done in the meantime
    node.ask("run-b", "held")
    node.ask("run-b", "absent")
    lost = node.ask("run-a", "held")
    assert (lost["acquired"], lost["revoked"], lost["holder"]) == (False, True, None)
    # others are not concerned, and nothing is left when the loser says goodbye
    assert node.ask("run-c")["acquired"] and node.ask("run-c", "absent")["released"] and node.text is not None
    assert not node.ask("run-a", "absent")["released"] and node.text is None


def test_a_lock_that_ended_and_that_nobody_wanted_is_renewed():
    node = Node()
    node.ask(lease=60)
    node.ask(state="held", lease=60)
    node.seconds += 1000
    result = node.ask(state="held", lease=60)
    assert result["acquired"] and result["renewed"] and result["expires_in_seconds"] == 60.0


def test_the_lease_that_counts_is_that_of_the_holder():
    node = Node()
    node.ask(lease=900)
    node.seconds += 100
    assert not node.ask("run-b", lease=10)["acquired"]


def test_the_lock_of_a_run_that_is_known_to_be_dead():
    node = Node()
    node.ask(state="held")
    assert not node.ask("run-b", take_over="run-z")["acquired"], "another one than the one that is there"
    result = node.ask("run-b", take_over="run-a")
    assert result["acquired"] and result["taken_over"]["reason"] == "dead" and "that run is dead" in result["message"]
    assert not node.ask("run-a", "held")["acquired"]
    node.ask("run-b", "absent")
    assert node.text is None, "the dead need not be remembered"


def test_a_reboot_frees_the_node():
    node = Node()
    node.ask(state="held")
    # /run is empty then; where it is not, the file is of another boot
    node.boot_id, node.seconds = "f" * 8, 5.0
    result = node.ask("run-b")
    assert result["acquired"] and result["taken_over"] is None
    node = Node()
    node.ask(state="held")
    node.text = None
    result = node.ask(state="held")
    assert result["acquired"] and not result["renewed"] and "as after a reboot" in result["message"]


@pytest.mark.parametrize("state", ["claimed", "held", "absent"])
def test_check_mode_says_what_would_be(state):
    node, same = Node(), Node()
    for one in (node, same):
        one.ask("run-x", lease=60)
        one.seconds += 61
    expected = node.ask(state=state, check=True)
    assert node.text == same.text
    assert node.ask(state=state) == expected


# --- damaged files -------------------------------------------------------------------------------------------------------------------

def sound_file(**other):
    node = Node()
    node.ask(**other)
    return json.loads(node.text)


def broken(**other):
    """The text of a lock file with other values in it."""
    content = sound_file()
    for name, value in other.items():
        (content["holder"] if name in content["holder"] else content)[name] = value
    return json.dumps(content)


DAMAGED = [
    "", "{", "[]", "null", "5", '"x"', "\ufffd", "{}", '{"schema": 2}', "[" * 100000, broken(schema=7), broken(boot_id=5),
    broken(boot_id="x" * 300), broken(revoked=None), broken(revoked=["; rm -rf /"]), broken(holder=[]), broken(holder="x"),
    broken(holder={}), broken(run="x y z"),
    broken(run=None), broken(who="a\nb"), broken(who="x" * 300), broken(who={"a": 1}), broken(doing="\x1b[31m"),
    broken(started=-1), broken(started="x"), broken(started=float("nan")), broken(started=1e300), broken(started=True),
    broken(phase="absent"), broken(phase="x"), broken(phase=None), broken(lease=0), broken(lease=10 ** 400), broken(lease=None),
    broken(since=None), broken(since=float("inf")), broken(renewed=10 ** 9), broken(renewed="1"), broken(controller="x"),
    broken(controller={"pid": "x"}), broken(controller={"host": 5}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_counts_as_a_lock_for_a_lease(text):
    node = Node()
    node.text = text
    node.seconds += 899
    for state in ("claimed", "held"):
        result = node.ask(state=state)
        assert not result["acquired"] and result["damaged"] and result["holder"] is None and node.text == text
        assert "cannot be understood" in result["message"] and "1 s" in result["message"] and result["message"].isprintable()
    result = node.ask(state="absent")
    assert not result["released"] and node.text == text and "left alone" in result["message"]
    node.seconds += 1
    assert not node.ask(state="absent")["released"] and node.text == text
    result = node.ask()
    assert result["acquired"] and result["damaged"] and "old enough to be replaced" in result["message"]
    assert node.ask(state="held")["damaged"] == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
FIELDS = ["run", "who", "doing", "started", "phase", "lease", "since", "renewed", "controller"]


@given(st.dictionaries(st.sampled_from(["schema", "boot_id", "revoked", "holder"]), json_values),
       st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_no_file_breaks_the_module(top, inner):
    content = sound_file()
    content.update(top)
    if isinstance(content["holder"], dict):
        content["holder"].update(inner)
    node = Node()
    node.text = json.dumps(content)
    result = node.ask("run-b")
    assert isinstance(result["acquired"], bool) and result["message"].isprintable()


@pytest.mark.parametrize("other,words", [
    ({"run": "abc"}, "run"), ({"run": "a b c d"}, "run"), ({"run": "-abcd"}, "run"), ({"run": "x" * 129}, "run"),
    ({"run": "{{ x }}"}, "run"), ({"started": None}, "started"),
    ({"who": "a\nb"}, "who"), ({"who": "\u202e"}, "who"), ({"doing": "x" * 201}, "doing"), ({"started": -1.0}, "started"),
    ({"started": float("nan")}, "started"), ({"lease": 9}, "lease"), ({"lease": 86401}, "lease"), ({"take_over": "?"}, "run"),
    ({"controller": {"pid": -1}}, "pid")])
def test_what_cannot_be_asked(other, words):
    with pytest.raises(MeshError, match=words):
        request(**other)


def test_who_and_what_may_be_unknown():
    asked = request(who=None, doing=None, controller=None)
    assert (asked["who"], asked["doing"], asked["controller"]) == ("somebody", "a playbook of kubemesh.wireguard", None)
    assert request(who="José @ büro")["who"] == "José @ büro"


@pytest.mark.parametrize("seconds,text", [
    (0, "0 s"), (-5, "0 s"), (0.6, "1 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (250, "4 min 10 s"), (3600, "1 h"),
    (3660, "1 h 1 min"), (90061, "25 h 1 min")])
def test_durations(seconds, text):
    assert plan.duration(seconds) == text


def test_a_node_remembers_a_few_that_lost_their_lock():
    node = Node()
    for number in range(40):
        node.ask("run-%02d" % number, "held", lease=10)
        node.seconds += 11
    holder, revoked, damage = plan.parse(node.text, clock(node.seconds))
    assert holder["run"] == "run-39" and damage == ""
    assert revoked == ["run-%02d" % number for number in range(38, 38 - plan.REVOKED_MAX, -1)]
    assert len(node.text) < 4096


# --- all nodes -----------------------------------------------------------------------------------------------------------------------

def answers(run="run-b", state="claimed", started=60.0, **holders):
    """Results of a round: ``host="free"``, ``"own"``, or (run, phase, started) of who is there."""
    results = {}
    for host, there in holders.items():
        node = Node()
        if there == "own":
            node.ask(run, state)
        elif there != "free":
            other, phase, other_started = there
            node.ask(other, phase, started=other_started, who=other + "@here")
            node.seconds += 5
        results[host] = node.ask(run, state, started=started)
    return results


EARLIER, LATER = ("run-a", "claimed", 50.0), ("run-c", "claimed", 70.0)
EARLIER_HELD, LATER_HELD = ("run-a", "held", 50.0), ("run-c", "held", 70.0)


@pytest.mark.parametrize("there,expected", [
    ({"n1": "free", "n2": "free"}, "go"), ({"n1": "own", "n2": "free"}, "go"), ({"n1": EARLIER, "n2": "free"}, "yield"),
    ({"n1": LATER, "n2": "free"}, "retry"), ({"n1": LATER_HELD, "n2": "free"}, "yield"), ({"n1": EARLIER_HELD}, "yield"),
    ({"n1": LATER, "n2": EARLIER}, "yield"), ({"n1": LATER, "n2": LATER_HELD}, "yield"),
    # the same start: the id decides
    ({"n1": ("run-a", "claimed", 60.0)}, "yield"), ({"n1": ("run-c", "claimed", 60.0)}, "retry"),
])
def test_verdicts_of_a_claim(there, expected):
    assert plan.verdict(answers(**there), "run-b", 60.0)["verdict"] == expected


@pytest.mark.parametrize("there,expected", [
    ({"n1": "own", "n2": "own"}, "go"), ({"n1": "own", "n2": LATER_HELD}, "yield"), ({"n1": "own", "n2": EARLIER_HELD}, "yield"),
    # a node was rebooted, and another run claims it: that one gives way to one that holds
    ({"n1": "own", "n2": EARLIER}, "retry"), ({"n1": "own", "n2": LATER}, "retry"),
    # nothing is held any more
    ({"n1": EARLIER}, "yield"), ({"n1": LATER}, "retry")])
def test_verdicts_of_holding(there, expected):
    assert plan.verdict(answers(state="held", **there), "run-b", 60.0)["verdict"] == expected


def test_the_message_of_a_verdict_is_for_people():
    results = answers(**dict({"n%d" % number: EARLIER_HELD for number in range(1, 8)}, m1="free"))
    found = plan.verdict(results, "run-b", 60.0)
    assert found["message"] == (
        "another run changes the mesh: run-a@here has been running enable for 5 s (run run-a, process 4242 on awx-3); its lock ends in "
        "14 min 55 s unless that run renews it (on n1, n2, n3, n4, n5 and 2 more); wait for it to end or, if you know that it is dead, "
        "remove /run/kubemesh/lock.json on its nodes")
    assert found["holders"] == [{
        "run": "run-a", "who": "run-a@here", "doing": "enable", "phase": "held", "hosts": ["n1", "n2", "n3", "n4", "n5"], "host_count": 7,
        "expires_in_seconds": 895.0, "message": found["holders"][0]["message"]}]
    found = plan.verdict(answers(n1=LATER, n2=EARLIER), "run-b", 60.0)
    assert [entry["run"] for entry in found["holders"]] == ["run-a", "run-c"], "who is waited for comes first"
    assert found["wait_on"] == "n2"
    assert "run-c" not in found["message"]
    found = plan.verdict(answers(state="held", n1="own", n2=EARLIER, n3=LATER_HELD), "run-b", 60.0)
    assert [entry["run"] for entry in found["holders"]] == ["run-c", "run-a"] and found["wait_on"] == "n3"
    found = plan.verdict(answers(n1=LATER), "run-b", 60.0)
    assert "gives way: run-c@here asked to run enable 5 s ago" in found["message"]
    assert plan.verdict(answers(n1="free"), "run-b", 60.0)["message"] == "the locks of 1 nodes are this run's"


@pytest.mark.parametrize("bad", [
    {"failed": True, "msg": "/run/kubemesh cannot be\nused: Permission denied"}, {"skipped": True}, {"acquired": "yes"}, {"acquired": None},
    {"acquired": False}, {"acquired": False, "holder": None}, {"acquired": False, "holder": {"run": "run-b", "phase": "held"}},
    {"acquired": False, "holder": {"run": "run-c", "phase": "x"}}, {"acquired": False, "holder": "x"}])
def test_a_host_without_a_clear_answer_is_no_go(bad):
    found = plan.verdict(dict(answers(n1="free"), n2=bad), "run-b", 60.0)
    assert found["verdict"] == "yield" and "n2" in found["message"] and found["message"].isprintable() and found["wait_on"] == ""
    if "msg" in bad:
        assert "Permission denied" in found["message"]


def test_hosts_that_were_not_reached_do_not_count():
    assert plan.verdict(dict(answers(n1="free"), n2=None, n3={}, n4={"unreachable": True}), "run-b", 60.0)["verdict"] == "go"
    for nothing in ({}, {"n1": None}, {"n1": {"unreachable": True}}):
        found = plan.verdict(nothing, "run-b", 60.0)
        assert found["verdict"] == "yield" and "no node" in found["message"]


def test_a_lock_that_was_lost_or_cannot_be_read_is_no_go():
    node = Node()
    node.ask("run-b", "held", lease=10)
    node.seconds += 11
    node.ask("run-c", "held")
    lost = node.ask("run-b", "held")
    found = plan.verdict(dict(answers(state="held", n1="own"), n2=lost), "run-b", 60.0)
    assert found["verdict"] == "yield" and found["message"].startswith("n2: the lock of this run ended") and found["holders"]
    assert found["wait_on"] == "", "what was lost does not come back"
    node.text = "{"
    node.written = node.seconds
    found = plan.verdict(dict(answers(n1="own"), n2=node.ask("run-b")), "run-b", 60.0)
    assert found["verdict"] == "yield" and "cannot be understood" in found["message"]


def test_check_mode_is_never_stopped():
    look = {host: dict(result, check_mode=True) for host, result in answers(n1="free", n2=EARLIER_HELD).items()}
    found = plan.verdict(look, "run-b", 60.0)
    assert found["verdict"] == "go" and "what is shown here may change: run-a@here has been running enable" in found["message"]
    free = {host: dict(result, check_mode=True) for host, result in answers(n1="free").items()}
    assert plan.verdict(free, "run-b", 60.0) == {
        "verdict": "go", "message": "no other run is at work", "holders": [], "wait_on": ""}
    assert plan.verdict(dict(look, n1=answers(n1="free")["n1"]), "run-b", 60.0)["verdict"] == "yield", "only if all of it was one"


# --- any interleaving ------------------------------------------------------------------------------------------------------------------

class Run:
    """One run, a step at a time, as the role does it: claims, verdict, holds, verdict, work, release. One node per step."""

    def __init__(self, name, started, nodes, order):
        self.name, self.started, self.nodes, self.order = name, started, nodes, order
        self.state = "claiming"
        self.trail = []
        self.steps = self.life()

    def life(self):
        while True:
            verdict = yield from self.round("claimed")
            if verdict == "go":
                self.state = "holding"
                verdict = yield from self.round("held")
                while verdict == "retry":
                    verdict = yield from self.round("held")
                if verdict == "go":
                    self.state = "working"
                    yield
                    # and renews
                    if (yield from self.round("held")) != "go":
                        self.state = "lost"
                    break
            if verdict == "yield":
                break
        outcome = "done" if self.state == "working" else "gave up"
        self.state = "giving back"
        for name in self.order:
            self.nodes[name].ask(self.name, "absent")
            yield
        self.state = outcome

    def round(self, state):
        results = {}
        for name in self.order:
            results[name] = self.nodes[name].ask(self.name, state, started=self.started)
            yield
        found = plan.verdict(results, self.name, self.started)["verdict"]
        self.trail.append(found)
        return found


FINISHED = ("done", "gave up")
NAMES = ["n1", "n2", "n3", "n4"]
orders = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
runs_asked = st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), orders), min_size=2, max_size=3)
# each run goes on as often as its number comes; then all take turns
schedules = st.lists(st.integers(0, 2), max_size=60)


def share(one, other):
    return bool(set(one.order) & set(other.order))


@settings(max_examples=200)
@given(runs_asked, schedules)
def test_two_runs_never_work_on_one_node_and_one_always_goes(asked, schedule):
    nodes = {name: Node() for name in NAMES}
    runs = [Run("run-%d" % number, started, nodes, order) for number, (started, order) in enumerate(asked)]

    def step(run):
        next(run.steps, None)
        working = [other for other in runs if other.state == "working"]
        for one in working:
            for other in working:
                assert one is other or not share(one, other), "two at work on one node"
            for name in one.order:
                assert nodes[name].holder()["run"] == one.name and nodes[name].holder()["phase"] == "held"

    for number in schedule:
        step(runs[number % len(runs)])
    for dummy in range(200):
        for run in runs:
            step(run)
        if all(run.state in FINISHED for run in runs):
            break
    assert all(run.state in FINISHED for run in runs), "no end in sight: %s" % [(run.state, run.trail) for run in runs]
    assert all(node.text is None for node in nodes.values()), "nothing is left"
    # whoever gave up met somebody who went on to the end: nobody gives up in vain, and so one always goes
    for run in runs:
        if run.state == "gave up":
            assert any(other.state == "done" for other in reached(run, runs))
    assert any(run.state == "done" for run in runs)


def reached(run, runs):
    """All runs that share nodes with this one, or with one that does, and so on."""
    found = [run]
    for one in found:
        found.extend(other for other in runs if other not in found and share(one, other))
    return found


@settings(max_examples=100)
@given(runs_asked, schedules, st.lists(st.sampled_from(["n1", "n2", "n3", "n4", "wait", None, None, None]), max_size=60))
def test_whatever_is_lost_is_noticed(asked, schedule, mishaps):
    """Nodes reboot and leases end in between: two may work then for a moment, but who lost a lock learns it before it is done."""
    nodes = {name: Node() for name in NAMES}
    runs = [Run("run-%d" % number, started, nodes, order) for number, (started, order) in enumerate(asked)]
    for number, mishap in zip(schedule, mishaps + [None] * len(schedule)):
        if mishap == "wait":
            for node in nodes.values():
                node.seconds += 400
        elif mishap:
            nodes[mishap].text = None
        next(runs[number % len(runs)].steps, None)
    for dummy in range(200):
        for run in runs:
            next(run.steps, None)
        if all(run.state in FINISHED for run in runs):
            break
    assert all(run.state in FINISHED for run in runs)
    assert any(run.state == "done" for run in runs) or any(mishap for mishap in mishaps[:len(schedule)])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["run-a", "run-b", "run-c"]), st.sampled_from(["claimed", "held", "absent"]),
                          st.integers(0, 20)), max_size=40))
def test_one_node_through_anything(asked):
    """The answer and the file agree; a lock changes hands only when it has ended; who lost it never gets it back."""
    node, lost = Node(), set()
    for run, state, pause in asked:
        node.seconds += pause
        before = node.holder()
        ended = before is not None and plan.left_of(before, clock(node.seconds)) <= 0
        result = node.ask(run, state, lease=30)
        after = node.holder()
        assert result["acquired"] == (state != "absent" and after is not None and after["run"] == run)
        if before and after and before["run"] != after["run"]:
            assert ended and result["taken_over"]["run"] == before["run"]
            lost.add(before["run"])
        if state == "absent":
            lost.discard(run)
        elif run in lost:
            assert not result["acquired"]
        if after is None and not lost:
            assert node.text is None
