# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of modules that take the mesh document: what is sent to a node, when, and what is left there."""

from __future__ import annotations

import hashlib
from unittest import mock

import pytest

pytest.importorskip("ansible.plugins.action")  # not where only modules are tested
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure

from ansible_collections.kubemesh.wireguard.plugins.action import document, interface, mesh_info, probe, routes

TEMPORARY = "/remote/tmp/ansible-1"


def answer(result):
    return lambda: result


def lose_connection():
    raise OSError("connection lost")


class Task:
    """A task in a run; everything that goes to the node is written down instead."""

    def __init__(self, plugin, args, check_mode=False, async_val=0, action="kubemesh.wireguard.thing"):
        task = mock.Mock(args=args, check_mode=check_mode, async_val=async_val, action=action)
        connection = mock.Mock()
        connection._shell.tmpdir = None
        connection._shell.join_path = lambda *parts: "/".join(parts)
        self.shell = connection._shell
        self.plugin = plugin.ActionModule(
            task=task, connection=connection, play_context=mock.Mock(check_mode=check_mode), loader=mock.Mock(), templar=mock.Mock(),
            shared_loader_obj=mock.Mock())
        self.log = []
        self.answers = []
        self.plugin._make_tmp_path = self._make_tmp_path
        self.plugin._transfer_file = lambda source, target: self.log.append(("transfer", str(source), target))
        self.plugin._fixup_perms2 = lambda paths: self.log.append(("permissions", tuple(paths)))
        self.plugin._remove_tmp_path = lambda path: self.log.append(("remove", path))
        self.plugin._execute_module = self._execute_module

    def _make_tmp_path(self):
        self.shell.tmpdir = TEMPORARY
        return TEMPORARY

    def _execute_module(self, module_name=None, module_args=None, task_vars=None, wrap_async=False):
        self.log.append(("module", module_name, dict(module_args), wrap_async))
        if not self.answers:
            return {"changed": False}
        return self.answers.pop(0)()

    def run(self):
        with mock.patch("ansible.plugins.action.ActionBase.run", lambda self, tmp=None, task_vars=None: {}):
            return self.plugin.run(None, {})

    def modules(self):
        return [entry[2] for entry in self.log if entry[0] == "module"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mesh.json"
    path.write_bytes(b'{"schema": 1}\n')
    return path


# --- document ----------------------------------------------------------------------------------------------------------------------------

def test_a_node_that_has_it_is_sent_nothing(source):
    task = Task(document, {"src": str(source), "path": "/p"})
    task.answers = [answer({"changed": False, "needed": False, "serial": 7})]
    assert task.run() == {"changed": False, "needed": False, "serial": 7}
    assert task.modules() == [{"path": "/p", "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}]
    assert not [entry for entry in task.log if entry[0] == "transfer"]


def test_a_node_that_needs_it_is_sent_it(source):
    task = Task(document, {"src": str(source)})
    task.answers = [answer({"changed": True, "needed": True}), answer({"changed": True, "serial": 7})]
    assert task.run() == {"changed": True, "serial": 7}
    target = TEMPORARY + "/mesh.json"
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    assert task.log == [
        ("module", "kubemesh.wireguard.document", {"sha256": checksum}, False), ("transfer", str(source), target),
        ("permissions", (TEMPORARY, target)), ("module", "kubemesh.wireguard.document", {"sha256": checksum, "src": target}, False),
        ("remove", TEMPORARY)]


def test_a_first_answer_that_is_a_failure_is_the_result(source):
    task = Task(document, {"src": str(source)})
    task.answers = [answer({"failed": True, "msg": "no python"})]
    assert task.run()["failed"] and len(task.modules()) == 1


def test_absent_has_no_source():
    task = Task(document, {"state": "absent"})
    task.run()
    assert task.modules() == [{"state": "absent"}]


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(AnsibleActionFail, match=r"none\.json is not a file on the controller"):
        Task(document, {"src": str(tmp_path / "none.json")}).run()


def test_what_was_sent_goes_whatever_happens(source):
    task = Task(document, {"src": str(source)})
    task.answers = [answer({"needed": True}), lose_connection]
    with pytest.raises(OSError, match="connection lost"):
        task.run()
    assert task.log[-1] == ("remove", TEMPORARY)


# --- modules that read it ----------------------------------------------------------------------------------------------------------------

READERS = [interface, mesh_info, probe, routes]


@pytest.mark.parametrize("plugin", READERS)
def test_in_a_real_run_the_node_has_it(plugin, source):
    task = Task(plugin, {"document_src": str(source), "node": "a"})
    task.run()
    assert [entry[0] for entry in task.log] == ["module", "remove"]
    assert task.log[0][1:3] == ("kubemesh.wireguard.thing", {"node": "a"})


@pytest.mark.parametrize("plugin", READERS)
def test_in_check_mode_it_travels_with_the_module(plugin, source):
    task = Task(plugin, {"document_src": str(source), "node": "a", "document_file": "/etc/kubemesh/mesh.json"}, check_mode=True)
    task.run()
    target = TEMPORARY + "/mesh.json"
    assert task.log == [
        ("transfer", str(source), target), ("permissions", (TEMPORARY, target)),
        ("module", "kubemesh.wireguard.thing", {"node": "a", "document_file": target}, 0), ("remove", TEMPORARY)]


def test_check_mode_without_a_document_of_the_controller():
    task = Task(routes, {"node": "a"}, check_mode=True)
    task.run()
    assert task.modules() == [{"node": "a"}]


def test_a_document_that_is_not_there(tmp_path):
    with pytest.raises(AnsibleActionFail, match=r"none\.json is not a file on the controller"):
        Task(routes, {"document_src": str(tmp_path / "none.json")}, check_mode=True).run()


def test_the_argument_of_the_task_is_not_changed(source):
    args = {"document_src": str(source), "node": "a"}
    Task(routes, args).run()
    assert args == {"document_src": str(source), "node": "a"}, "a task runs once per host and loop"


def test_async_keeps_its_files(source):
    """The module still runs when the task ends."""
    task = Task(probe, {"document_src": str(source)}, async_val=30)
    task.run()
    assert task.log == [("module", "kubemesh.wireguard.thing", {}, 30)]


def test_what_travelled_goes_whatever_happens(source):
    task = Task(routes, {"document_src": str(source)}, check_mode=True)
    task.answers = [lose_connection]
    with pytest.raises(OSError, match="connection lost"):
        task.run()
    assert task.log[-1] == ("remove", TEMPORARY)


# --- routes: a switch that must be confirmed ---------------------------------------------------------------------------------------------

SWITCHED = {
    "changed": True, "armed": True, "was_sending": True, "carried_connections": 3, "steps": ["add rule"], "diff": [{"before": "1"}]}
CONFIRMED = {
    "changed": True, "armed": False, "was_sending": True, "carried_connections": 0, "steps": ["write file"], "diff": [{"before": "2"}]}


def unreachable():
    raise AnsibleConnectionFailure("no route to host")


@pytest.fixture
def switch(monkeypatch):
    """A task that switches host encryption on; the clock advances when it sleeps."""
    now = [1000.0]
    monkeypatch.setattr(routes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(routes.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    task = Task(routes, {"node": "a", "encrypt": "nodes", "send": True, "confirm_timeout": 30})
    task.now = now
    return task


def test_a_switch_that_is_armed_is_confirmed_over_a_new_connection(switch):
    switch.answers = [answer(dict(SWITCHED)), answer(dict(CONFIRMED))]
    result = switch.run()
    assert switch.plugin._connection.reset.call_count == 1
    assert switch.modules() == [
        {"node": "a", "encrypt": "nodes", "send": True, "confirm_timeout": 30},
        {"node": "a", "encrypt": "nodes", "send": True, "confirm": True}]
    assert (result["changed"], result["armed"], result["was_sending"], result["carried_connections"]) == (True, True, True, 3)
    assert result["steps"] == ["add rule", "write file"] and result["diff"] == [{"before": "1"}, {"before": "2"}]


@pytest.mark.parametrize("result", [{"changed": True, "armed": False}, {"failed": True, "armed": True}, {"failed": True}])
def test_what_is_not_armed_is_not_confirmed(switch, result):
    switch.answers = [answer(dict(result))]
    assert switch.run() == result and len(switch.modules()) == 1 and switch.plugin._connection.reset.call_count == 0


def test_check_mode_confirms_nothing():
    task = Task(routes, {"confirm_timeout": 30}, check_mode=True)
    task.answers = [answer(dict(SWITCHED))]
    assert task.run() == SWITCHED and len(task.modules()) == 1


def test_a_node_that_is_not_reached_is_tried_until_it_has_taken_the_change_back(switch):
    """The failure of the module says that; it names what was before, so that nobody switches more off than this run switched on."""
    taken_back = {"failed": True, "msg": "took its rules back"}
    switch.answers = [answer(dict(SWITCHED))] + [unreachable] * 20 + [answer(taken_back)]
    assert switch.run() == dict(taken_back, was_sending=True)
    assert switch.now[0] == 1000 + 20 * routes.RETRY
    assert switch.plugin._connection.reset.call_count == 21


def test_a_node_that_does_not_come_back_is_unreachable(switch):
    switch.answers = [answer(dict(SWITCHED))] + [unreachable] * 100
    with pytest.raises(AnsibleConnectionFailure):
        switch.run()
    assert 30 + routes.COMES_BACK <= switch.now[0] - 1000 <= 30 + routes.COMES_BACK + 2 * routes.RETRY


def test_a_directory_that_cannot_be_removed_does_not_end_the_tries(switch):
    switch.answers = [answer(dict(SWITCHED)), unreachable, answer(dict(CONFIRMED))]
    removals = []

    def remove(path):
        removals.append(path)
        if len(removals) == 2:
            raise AnsibleConnectionFailure("gone again")

    switch.plugin._remove_tmp_path = remove
    assert switch.run()["armed"] and len(removals) == 3
