# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import builtins
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("ansible.plugins.action")  # not where only modules are tested

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock_plan
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _controller as controller

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")


@pytest.fixture
def process():
    """A process that lives until it is ended."""
    it = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield it
    it.kill()
    it.communicate()


def test_identity_of_this_process():
    found = controller.controller_identity()
    assert found["pid"] == os.getpid() and found["host"] == socket.gethostname() and len(found["boot_id"]) == 36
    assert found["namespaces"].startswith("pid:[") and found["started_ticks"] > 0
    assert _lock_plan.check_controller(found) == found, "as the module keeps it"
    assert controller.controller_identity() == found, "the same every time"


def identity_in_a_worker(queue, detach):
    if detach:
        os.setsid()
    queue.put((os.getpid(), controller.controller_identity()))


@pytest.mark.parametrize("detach", [True, False])
def test_a_worker_says_who_its_main_process_is(detach):
    """Ansible's workers are forks with a session of their own."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=identity_in_a_worker, args=(queue, detach))
    worker.start()
    pid, found = queue.get(timeout=30)
    worker.join(30)
    assert pid != os.getpid() and found == controller.controller_identity()


def orphan(queue, ready):
    """A main process that dies while its worker goes on."""
    context = multiprocessing.get_context("fork")

    def work():
        lived = not controller.main_is_dead()
        known.set()
        while os.getppid() == parent:
            time.sleep(0.01)
        queue.put((parent, controller.main_pid(), os.getppid(), lived, controller.main_is_dead()))

    parent, known = os.getpid(), context.Event()
    context.Process(target=work).start()
    known.wait(30)
    ready.set()
    os.kill(os.getpid(), signal.SIGKILL)


def test_also_when_the_main_process_is_dead():
    context = multiprocessing.get_context("fork")
    queue, ready = context.Queue(), context.Event()
    main = context.Process(target=orphan, args=(queue, ready))
    main.start()
    parent, found, adopted, lived, dead = queue.get(timeout=30)
    main.join(30)
    assert found == parent == main.pid and adopted != parent
    assert lived and dead and not controller.main_is_dead()


def test_a_process_that_lives_and_then_does_not(process):
    identity = controller.controller_identity(process.pid)
    assert not controller.is_dead(identity) and not controller.is_over(identity)
    process.kill()
    deadline = time.monotonic() + 30
    while controller._process(process.pid)[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert controller.is_dead(identity), "a zombie runs no playbook"
    process.communicate()
    assert controller.is_dead(identity) and controller.is_over(identity)


@pytest.mark.parametrize("field,value", [
    ("host", "another"), ("host", ""), ("boot_id", "another"), ("boot_id", ""), ("namespaces", "pid:[1]"), ("namespaces", ""), ("pid", 0),
    ("pid", -1), ("pid", "4242"), ("pid", None), ("started_ticks", 0), ("started_ticks", None)])
def test_nobody_of_elsewhere_is_dead(process, field, value):
    identity = controller.controller_identity(process.pid)
    process.kill()
    process.communicate()
    assert controller.is_dead(identity)
    assert not controller.is_dead(dict(identity, **{field: value})) and not controller.is_over(dict(identity, **{field: value}))


@pytest.mark.parametrize("nothing", [None, {}, "x", [], {"pid": 1}])
def test_who_is_not_known_is_not_dead(nothing):
    assert not controller.is_dead(nothing) and not controller.is_over(nothing)


def test_a_pid_that_was_used_again(process):
    identity = controller.controller_identity(process.pid)
    assert controller.is_dead(dict(identity, started_ticks=identity["started_ticks"] - 1))


def test_an_earlier_play_of_the_same_process_is_over_and_not_dead():
    own = controller.controller_identity()
    assert controller.is_over(own) and not controller.is_dead(own)


def test_a_process_of_somebody_else_is_not_dead(process, monkeypatch):
    """Nor where /proc does not show it (hidepid)."""
    identity = controller.controller_identity(process.pid)

    def refused(pid, number):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(controller.os, "kill", refused)
    assert not controller.is_dead(identity)
    monkeypatch.setattr(controller, "_process", lambda pid: None if pid == process.pid else ("S", 1))
    assert not controller.is_dead(identity, dict(identity, pid=1))


def test_a_system_without_proc(monkeypatch):
    def no_proc(path, *args, **kwargs):
        raise FileNotFoundError(2, "No such file", path)

    monkeypatch.setattr(builtins, "open", no_proc)
    monkeypatch.setattr(controller.os, "readlink", no_proc)
    found = controller.controller_identity()
    assert (found["boot_id"], found["namespaces"], found["started_ticks"]) == ("", "", 0)
    assert not controller.is_over(found) and not controller.is_dead(dict(found, pid=2 ** 22 + 1))


@pytest.mark.parametrize("stat,expected", [
    ("7 (sh) S " + " ".join(str(number) for number in range(4, 52)), ("S", 22)),
    ("7 (a) b (c d)) R " + " ".join(str(number) for number in range(4, 52)), ("R", 22)), ("7 (sh) S 4", None), ("", None)])
def test_the_name_of_a_program_may_be_anything(stat, expected, monkeypatch, tmp_path):
    path = tmp_path / "stat"
    path.write_text(stat)
    monkeypatch.setattr(builtins, "open", lambda name, mode: os.fdopen(os.open(str(path), os.O_RDONLY), mode))
    assert controller._process(7) == expected


@pytest.mark.parametrize("variables,expected", [
    ({"awx_user_name": "alice", "awx_job_id": 42}, "alice (job 42)"), ({"tower_user_name": "bob", "tower_job_id": "7"}, "bob (job 7)"),
    ({"awx_schedule_name": "nightly", "awx_job_id": 42}, "schedule nightly (job 42)"), ({"awx_user_name": "alice"}, "alice@HOST"),
    ({}, "root@HOST"), ({"awx_user_name": ""}, "root@HOST"), ({"awx_user_name": ["{{ x }}"]}, "root@HOST"),
    ({"awx_user_name": "a\nb\u202e"}, "a?b?@HOST"), ({"awx_user_name": "x" * 300}, "x" * 200)])
def test_who_runs(variables, expected, monkeypatch):
    monkeypatch.setattr(controller.getpass, "getuser", lambda: "root")
    assert controller.who_runs(variables) == expected.replace("HOST", socket.gethostname())
    _lock_plan.check_request({"state": "held", "run": "run-a", "started": 1.0, "lease": 900, "who": controller.who_runs(variables)})


@pytest.mark.parametrize("problem", [KeyError("uid"), OSError("No username set"), ImportError("pwd")])
def test_a_user_without_name(problem, monkeypatch):
    def getuser():
        raise problem

    monkeypatch.setattr(controller.getpass, "getuser", getuser)
    assert controller.who_runs({}) == "user id %d@%s" % (os.getuid(), socket.gethostname())
