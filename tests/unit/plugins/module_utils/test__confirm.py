# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _confirm
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError


def rule(family="ipv4", priority=402, table=51841, source="", mark=4096):
    return {"family": family, "priority": priority, "table": table, "from": source, "iif": "", "not_fwmark": mark}


NODES = [{"op": "add_rule", "rule": rule()}, {"op": "add_rule", "rule": rule("ipv6")}]
PODS = {"op": "add_rule", "rule": rule(priority=400, table=51840, mark=0)}


class Recorder:
    """Stands in for `System`: notes what is run; the service is active for as many looks as it is told."""

    def __init__(self, looks=0):
        self.log, self.looks = [], looks

    def path(self, name):
        return "/usr/bin/" + name

    def run(self, argv):
        self.log.append(argv)

    try_run = run

    def unit(self, name):
        self.looks -= 1
        return {"active": self.looks >= 0}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_confirm, "SCRIPT", str(tmp_path / "take-back"))
    monkeypatch.setattr(_confirm, "TAKEN_BACK", str(tmp_path / "taken-back"))
    monkeypatch.setattr(_confirm.time, "sleep", lambda seconds: None)
    return tmp_path


def test_only_what_goes_from_node_to_node_is_armed():
    assert _confirm.must_be_armed(NODES) and _confirm.must_be_armed([PODS] + NODES)
    assert not _confirm.must_be_armed([PODS, {"op": "replace_route", "route": {}}]) and not _confirm.must_be_armed([])


def test_the_script_undoes_the_steps_in_reverse(folder):
    """Run for real, with an `ip` that writes down how it is called and refuses each time."""
    steps = [PODS, {"op": "replace_route", "route": {}}, NODES[0], {"op": "remove_rule", "rule": rule("ipv6")}]
    (folder / "ip").write_text('#!/bin/sh\necho "$*" >> %s\nexit 2\n' % (folder / "log"))
    (folder / "ip").chmod(0o755)
    text = _confirm.take_back_text(steps)
    done = subprocess.run(["sh", "-eu", "-c", text], env={"PATH": "%s:%s" % (folder, os.environ["PATH"])}, capture_output=True, check=False)
    assert done.returncode == 0 and (folder / "taken-back").exists()
    assert (folder / "log").read_text().splitlines() == [
        "-6 rule add priority 402 not from all fwmark 0x1000/0x1000 lookup 51841",
        "-4 rule del priority 402 not from all fwmark 0x1000/0x1000 lookup 51841",
        "-4 rule del priority 400 from all lookup 51840", "route flush cache"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_the_script_is_good_shell():
    done = subprocess.run(["shellcheck", "-"], input=_confirm.take_back_text(NODES), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_timer_is_there_before_anything_changes(folder):
    system = Recorder()
    _confirm.arm(system, NODES, 30)
    assert (folder / "take-back").stat().st_mode & 0o777 == 0o700
    assert system.log == [[
        "systemd-run", "--quiet", "--collect", "--unit=kubemesh-confirm", "--on-active=30", "--timer-property=AccuracySec=100ms",
        "--property=Type=oneshot", "/bin/sh", str(folder / "take-back")]]


def test_confirmed_in_time(folder):
    system = Recorder()
    _confirm.arm(system, NODES, 30)
    assert _confirm.disarm(system) is False
    assert system.log[1:] == [["systemctl", "stop", "kubemesh-confirm.timer"]]
    assert sorted(os.listdir(str(folder))) == []
    assert _confirm.disarm(system) is False and len(system.log) == 2, "nothing is armed, nothing is stopped"


def test_too_late(folder):
    system = Recorder()
    _confirm.arm(system, NODES, 30)
    (folder / "taken-back").touch()
    assert _confirm.disarm(system) is True
    assert _confirm.disarm(system) is False, "it is said once"


def test_what_has_begun_to_undo_comes_to_its_end(folder):
    system = Recorder(looks=3)
    _confirm.arm(system, NODES, 30)
    _confirm.disarm(system)
    assert system.looks == -1 and ["systemctl", "stop", "kubemesh-confirm.service"] not in system.log


def test_without_systemd_nothing_is_changed(folder):
    system = Recorder()
    system.path = lambda name: None
    with pytest.raises(MeshError, match="systemd-run is not here"):
        _confirm.arm(system, NODES, 30)
    assert system.log == [] and os.listdir(str(folder)) == []


@pytest.mark.parametrize("seconds,good", [(4, False), (5, True), (30, True), (3600, True), (3601, False), (-1, False)])
def test_how_long(seconds, good):
    if good:
        _confirm.check_timeout(seconds)
    else:
        with pytest.raises(MeshError, match="mesh_confirm_timeout"):
            _confirm.check_timeout(seconds)
