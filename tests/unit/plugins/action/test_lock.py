# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of the lock: whose it is, and whose is known to be dead."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest

pytest.importorskip("ansible.plugins.action")  # not where only modules are tested
from ansible.errors import AnsibleActionFail

from ansible_collections.kubemesh.wireguard.plugins.action import lock
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _controller

OWN = _controller.controller_identity()


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
    """The process that read this file; ansible-test runs each test in a child of it."""
    monkeypatch.setattr(_controller, "main_pid", lambda: OWN["pid"])


def dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = _controller.controller_identity(process.pid)
    process.kill()
    process.communicate()
    return identity


def run(args, answers, variables=None, check_mode=False):
    """-> (result, arguments of each call of the module)."""
    connection = mock.Mock()
    connection._shell.tmpdir = "/remote/tmp"
    plugin = lock.ActionModule(
        task=mock.Mock(args=args, async_val=0, check_mode=check_mode), connection=connection, play_context=mock.Mock(), loader=mock.Mock(),
        templar=mock.Mock(), shared_loader_obj=mock.Mock())
    calls, removed = [], []

    def execute(module_name=None, module_args=None, task_vars=None):
        assert module_name == "kubemesh.wireguard.lock"
        calls.append(dict(module_args))
        return answers[min(len(calls), len(answers)) - 1]

    plugin._execute_module, plugin._remove_tmp_path = execute, removed.append
    with mock.patch("ansible.plugins.action.ActionBase.run", lambda self, tmp=None, task_vars=None: {}):
        result = plugin.run(None, variables or {})
    assert removed == ["/remote/tmp"]
    return result, calls


def taken(identity, **other):
    return dict({"acquired": False, "state": "claimed", "revoked": False, "holder": {"run": "run-z", "controller": identity}}, **other)


ARGS = {"state": "claimed", "run": "run-a", "started": 1.0}
GOT = {"acquired": True, "state": "claimed"}


def test_the_module_is_told_which_process_asks():
    result, calls = run(ARGS, [GOT], {"awx_user_name": "alice", "awx_job_id": 7})
    assert result == GOT and calls == [dict(ARGS, controller=OWN, who="alice (job 7)")]
    assert ARGS == {"state": "claimed", "run": "run-a", "started": 1.0}, "the argument of the task is not changed"
    dummy, calls = run(dict(ARGS, who="the night shift", controller={"host": "x"}), [GOT])
    assert (calls[0]["who"], calls[0]["controller"]) == ("the night shift", {"host": "x"})


def test_a_worker_whose_run_is_dead_asks_for_nothing(monkeypatch):
    """It would write a holder that nobody can find dead: when the main process started is not known any more."""
    monkeypatch.setattr(_controller, "main_is_dead", lambda: True)
    with pytest.raises(AnsibleActionFail, match="process of this run .%d. is dead" % OWN["pid"]):
        run(ARGS, [])


def test_the_lock_of_a_dead_run_is_taken_over():
    result, calls = run(ARGS, [taken(dead()), GOT])
    assert result == GOT and [call.get("take_over") for call in calls] == [None, "run-z"]


def test_that_of_an_earlier_play_of_this_process_as_well():
    result, calls = run(ARGS, [taken(OWN), GOT])
    assert result == GOT and calls[1]["take_over"] == "run-z"


def test_one_dead_run_behind_the_other():
    gone = dead()
    result, calls = run(ARGS, [taken(gone), taken(gone, holder={"run": "run-y", "controller": gone}), GOT])
    assert result == GOT and [call.get("take_over") for call in calls] == [None, "run-z", "run-y"]
    result, calls = run(ARGS, [taken(gone)])
    assert result == taken(gone) and len(calls) == 1 + lock.TRIES, "but not for ever"


@pytest.mark.parametrize("answer", [
    taken(dict(OWN, pid=1, started_ticks=_controller.controller_identity(1)["started_ticks"])), taken(dict(OWN, host="other", pid=1)),
    taken(None), taken({}), taken(OWN, revoked=True), taken(OWN, holder=None), taken(OWN, holder="x"),
    taken(OWN, holder={"controller": OWN}), {"failed": True, "msg": "x"}, {"unreachable": True}, {}])
def test_any_other_answer_stands(answer):
    result, calls = run(ARGS, [answer, GOT])
    assert result == answer and len(calls) == 1


# --- waiting -----------------------------------------------------------------------------------------------------------------------------

ALIVE = dict(OWN, pid=1, started_ticks=_controller.controller_identity(1)["started_ticks"])
FREE = {"acquired": False, "state": "absent", "holder": None, "released": False, "damaged": ""}
BUSY = taken(ALIVE, state="absent", released=False, damaged="")


@pytest.fixture
def slept(monkeypatch):
    """Time that passes only while somebody sleeps."""
    times = []
    monkeypatch.setattr(lock.time, "sleep", times.append)
    monkeypatch.setattr(lock.time, "monotonic", lambda: 1000.0 + sum(times))
    return times


def gives_back(answers, wait, **other):
    return run({"state": "absent", "run": "run-a", "wait": wait}, answers, **other)


def test_the_other_run_is_waited_for(slept):
    result, calls = gives_back([dict(BUSY, released=True), BUSY, FREE], 60)
    assert slept == [5.0, 5.0] and len(calls) == 3 and all("wait" not in call and "take_over" not in call for call in calls)
    assert result == dict(FREE, released=True), "what the first call gave back counts"


def test_but_not_longer_than_asked(slept):
    result, calls = gives_back([BUSY], 12)
    assert slept == [5.0, 5.0, 2.0] and result["holder"]["run"] == "run-z" and len(calls) == 4


@pytest.mark.parametrize("answer", [FREE, taken(dead(), state="absent"), taken(OWN, state="absent"), {"failed": True, "msg": "x"}])
def test_nobody_to_wait_for(slept, answer):
    """The next claim takes over what dead runs left."""
    result, calls = gives_back([answer], 60)
    assert slept == [] and len(calls) == 1 and result == answer


def test_a_worker_whose_run_dies_waits_no_longer(slept, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(_controller, "main_is_dead", lambda: next(answers))
    with pytest.raises(AnsibleActionFail, match="is dead"):
        gives_back([BUSY], 60)
    assert slept == [5.0, 5.0]


def test_a_file_that_cannot_be_understood_may_be_somebodys(slept):
    gives_back([dict(FREE, damaged="x"), FREE], 60)
    assert slept == [5.0]


def test_no_waiting_where_none_is_wanted(slept):
    gives_back([BUSY], 0)
    gives_back([BUSY], None)
    gives_back([BUSY], 60, check_mode=True)
    run(dict(ARGS, wait=60), [BUSY])
    assert slept == []


@pytest.mark.parametrize("wait", [-1, 86401, "x", [1], float("nan")])
def test_what_is_no_time(wait):
    with pytest.raises(AnsibleActionFail, match="wait"):
        gives_back([FREE], wait)
