# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lock file. What it means is tested in tests/unit/plugins/module_utils/test__lock_plan.py."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import stat
import time

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock, _lock_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.modules import lock

CONTROLLER = {"host": "awx-3", "boot_id": "b", "namespaces": "pid:[1]", "pid": 42, "started_ticks": 7}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "kubemesh" / "lock.json"


@pytest.fixture
def run(run_module, path):
    def run(state, run="run-a", check=False, **arguments):
        given = dict({"state": state, "run": run, "path": str(path), "started": 50.0, "who": "alice", "doing": "enable"}, **arguments)
        return run_module(lock.main, given, check)

    return run


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_claim_hold_and_release(run, path):
    result = run("claimed", controller=CONTROLLER)
    assert (result["acquired"], result["changed"], result["holder"]["controller"]) == (True, False, CONTROLLER)
    assert mode(path) == 0o640 and mode(path.parent) == 0o700
    assert json.loads(path.read_text())["boot_id"] == _lock.node_clock()["boot_id"]
    result = run("held")
    assert (result["acquired"], result["renewed"], result["changed"], result["holder"]["phase"]) == (True, True, False, "held")
    other = run("claimed", "run-b")
    assert (other["acquired"], other["changed"], other["holder"]["run"]) == (False, False, "run-a")
    assert not run("absent", "run-b")["released"] and path.exists()
    result = run("absent")
    assert (result["released"], result["changed"]) == (True, False)
    assert not path.parent.exists() and path.parent.parent.exists(), "nothing is left behind"
    assert not run("absent")["released"]


def test_a_directory_with_other_things_in_it_stays(run, path):
    run("claimed")
    (path.parent / "proof-wgmesh0.json").write_text("{}")
    run("absent")
    assert not path.exists() and (path.parent / "proof-wgmesh0.json").exists()
    # one that was there and is empty is not ours
    (path.parent / "proof-wgmesh0.json").unlink()
    run("absent")
    assert path.parent.exists()


def test_check_mode_writes_nothing(run, path):
    result = run("claimed", check=True)
    assert (result["acquired"], result["check_mode"]) == (True, True) and not path.parent.parent.exists()
    run("held")
    before = path.read_bytes(), path.stat().st_mtime_ns
    for state in ("claimed", "held", "absent"):
        assert run(state, check=True)["check_mode"]
        assert not run(state, "run-b", check=True)["acquired"]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not run("held")["check_mode"]


def test_a_damaged_file(run, path):
    path.parent.mkdir(parents=True)
    path.write_text("{")
    result = run("claimed")
    assert not result["acquired"] and result["damaged"] and not result.get("failed")
    # a clock that was set back must not make it old
    os.utime(path, (time.time() + 10 ** 6,) * 2)
    assert not run("claimed")["acquired"]
    os.utime(path, (time.time() - 901,) * 2)
    result = run("claimed")
    assert result["acquired"] and "old enough" in result["message"]
    # neither text nor of a sensible size
    path.write_bytes(b"\xff" * (_lock.SIZE_MAX + 1))
    assert not run("claimed")["acquired"]


def test_what_is_no_file_is_refused(run, path, tmp_path):
    path.parent.mkdir(parents=True)
    target = tmp_path / "target"
    target.write_text("x")
    path.symlink_to(target)
    result = run("claimed")
    assert result["failed"] and "symbolic link" in result["msg"] and target.read_text() == "x"
    path.unlink()
    os.mkfifo(str(path))
    assert run("claimed")["failed"]
    path.unlink()
    path.mkdir()
    assert run("claimed")["failed"]


@pytest.mark.parametrize("make,words", [
    (lambda folder: folder.chmod(0o777), "others can replace"), (lambda folder: folder.chmod(0o770), "others can replace"),
    (lambda folder: (folder.rmdir(), folder.write_text("")), "cannot be used"),
    (lambda folder: (folder.rename(folder.parent / "x"), folder.symlink_to(folder.parent / "x")), "cannot be used")])
def test_a_directory_that_is_no_place(run, path, make, words):
    path.parent.mkdir(parents=True)
    make(path.parent)
    result = run("claimed")
    assert result["failed"] and words in result["msg"] and str(path.parent) in result["msg"]


def test_what_a_killed_module_left_is_removed(run, path):
    path.parent.mkdir(parents=True)
    left = path.parent / ".lock.json.new"
    left.write_text("half of it")
    run("claimed")
    assert not left.exists()
    left.write_text("half of it")
    run("absent")
    assert not path.parent.exists()


@pytest.mark.parametrize("arguments,words", [
    ({"state": "claimed", "started": None}, "started"), ({"state": "held", "started": None}, "started"), ({"state": "locked"}, "state"),
    ({"state": "claimed", "run": "a b"}, "run"), ({"state": "claimed", "lease": 5}, "lease"), ({"state": "claimed", "who": "a\nb"}, "who"),
    ({"state": "claimed", "path": "/"}, "full path")])
def test_errors_name_what_is_wrong(run, path, arguments, words):
    result = run(**arguments)
    assert result["failed"] and words in result["msg"] and not path.parent.parent.exists()


def test_the_file_is_replaced_and_not_written_into(run, path):
    run("claimed")
    with open(path, encoding="utf-8") as reader:
        run("held")
        assert json.loads(reader.read())["holder"]["phase"] == "claimed", "who reads sees a whole file"


def test_who_keeps_the_directory_locked_is_waited_for_and_then_reported(run, path, monkeypatch):
    monkeypatch.setattr(_lock, "WAIT_SECONDS", 0.1)
    path.parent.mkdir(parents=True)
    handle = os.open(str(path.parent), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = run("claimed")
        assert result["failed"] and "process %d" % os.getpid() in result["msg"]
        monkeypatch.setattr(_lock, "LOCKS", os.devnull)
        assert "fuser" in run("claimed")["msg"]
    finally:
        os.close(handle)
    assert run("claimed")["acquired"]


def test_time_is_that_of_the_node_since_its_boot():
    clock = _lock.node_clock()
    assert clock["boot_id"] and abs(clock["seconds"] - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60


def race(path, number, rounds, queue):
    """Many asks of one run; says how often it got the lock, or what went wrong."""
    try:
        queue.put(asks(path, number, rounds))
    except Exception as exc:
        queue.put(repr(exc))


def asks(path, number, rounds):
    request = dict(zip(("state", "run", "started"), ("", "run-%d" % number, 1.0)), lease=900, who="", doing="")
    got = 0
    for dummy in range(rounds):
        result = _lock.transact(path, _lock_plan.check_request(dict(request, state="claimed")), False)
        if result["acquired"]:
            got += 1
            # while it is mine, nobody else gets it
            mine = [_lock.transact(path, _lock_plan.check_request(dict(request, state="held")), False) for dummy in range(3)]
            if not all(result["acquired"] and result["renewed"] for result in mine):
                return "run %d lost its lock" % number
            _lock.transact(path, _lock_plan.check_request(dict(request, state="absent")), False)
    return got


def test_many_at_once(path):
    """Directory and file come and go all the time; a lock is never anybody's but one run's."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=race, args=(str(path), number, 60, queue)) for number in range(4)]
    for process in processes:
        process.start()
    said = [queue.get(timeout=60) for dummy in processes]
    for process in processes:
        process.join(60)
    assert all(isinstance(item, int) for item in said) and sum(said) > 0, said
    assert not path.parent.exists()


def test_a_user_who_may_not(path, monkeypatch):
    """Whoever is not root is told so."""
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/run/kubemesh")

    monkeypatch.setattr(_lock.os, "makedirs", refused)
    with pytest.raises(MeshError, match="as root"):
        _lock.transact(str(path), _lock_plan.check_request({"state": "claimed", "run": "run-a", "started": 1.0, "lease": 900}), False)
