# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lock in real runs: several ``ansible-playbook`` at once, one of them killed. The nodes are directories of this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAYBOOK_COMMAND = shutil.which("ansible-playbook") or shutil.which("ansible-playbook", path=os.path.dirname(sys.executable))
COLLECTIONS = next((path for path in sys.path if os.path.isdir(os.path.join(path or ".", "ansible_collections", "kubemesh"))), None)
WHY_NOT = "no ansible-playbook" if not PLAYBOOK_COMMAND else "no collection" if COLLECTIONS is None else ""
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason="live tests: " + WHY_NOT)

# Seconds; an ansible-playbook takes several when the machine is busy.
PATIENCE = 120

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Begin
      ansible.builtin.set_fact:
        run_id: "{{ lookup('ansible.builtin.pipe', 'cat /proc/sys/kernel/random/uuid') }}"
        run_started: "{{ now().timestamp() }}"
        attempt: 0
      run_once: true
    - name: Work
      block:
        - name: Ask for the locks
          ansible.builtin.include_tasks: round.yml
        - name: Stop
          ansible.builtin.fail:
            msg: "{{ verdict.message }}"
          when: verdict.verdict != 'go'
        - name: Begin to work
          ansible.builtin.shell: "echo begin $(date +%s.%N) {{ run_name }} >> {{ folder }}/{{ inventory_hostname }}.log"
          when: not ansible_check_mode
        - name: Work a while
          ansible.builtin.pause:
            seconds: "{{ seconds }}"
          when: seconds | int > 0
        - name: Renew
          kubemesh.wireguard.lock: "{{ {'state': 'held'} | combine(lock_args) }}"
          register: lock
        - name: Stop when a lock is lost
          ansible.builtin.fail:
            msg: "{{ renewed.message }}"
          when: renewed.verdict != 'go'
          vars:
            renewed: "{{ locks | kubemesh.wireguard.lock_verdict(run_id, run_started) }}"
        - name: End of the work
          ansible.builtin.shell: "echo end $(date +%s.%N) {{ run_name }} >> {{ folder }}/{{ inventory_hostname }}.log"
          when: not ansible_check_mode
      always:
        - name: Give the locks back
          kubemesh.wireguard.lock: "{{ {'state': 'absent'} | combine(lock_args) }}"
"""

ROUND = """
- name: Claim
  kubemesh.wireguard.lock: "{{ {'state': 'claimed'} | combine(lock_args) }}"
  register: lock
- name: Judge
  ansible.builtin.set_fact:
    verdict: "{{ locks | kubemesh.wireguard.lock_verdict(run_id, run_started) }}"
  run_once: true
- name: Hold
  when: verdict.verdict == 'go'
  block:
    - name: Hold
      kubemesh.wireguard.lock: "{{ {'state': 'held'} | combine(lock_args) }}"
      register: lock
    - name: Judge again
      ansible.builtin.set_fact:
        verdict: "{{ locks | kubemesh.wireguard.lock_verdict(run_id, run_started) }}"
      run_once: true
- name: Give way
  kubemesh.wireguard.lock: "{{ {'state': 'absent'} | combine(lock_args) }}"
  when: verdict.verdict == 'yield'
- name: Wait for the other run
  kubemesh.wireguard.lock: "{{ {'state': 'absent', 'wait': waits | int} | combine(lock_args, {'path': there}) }}"
  delegate_to: "{{ verdict.wait_on or inventory_hostname }}"
  run_once: true
  when: verdict.wait_on | length > 0
  vars:
    there: "{{ folder }}/run/{{ verdict.wait_on }}/lock.json"
- name: Wait a little
  ansible.builtin.pause:
    seconds: 1
  when: verdict.verdict == 'retry'
- name: Count
  ansible.builtin.set_fact:
    attempt: "{{ attempt | int + 1 }}"
- name: Ask again
  ansible.builtin.include_tasks: round.yml
  when:
    - verdict.verdict == 'retry' or (verdict.wait_on | length > 0 and waits | int > 0)
    - attempt | int < 20
"""


class Nodes:
    def __init__(self, folder):
        self.folder = folder
        (folder / "play.yml").write_text(PLAYBOOK)
        (folder / "round.yml").write_text(ROUND)
        self.processes = []

    def path(self, host):
        return self.folder / "run" / host / "lock.json"

    def start(self, name, hosts=("n1", "n2", "n3"), seconds=0, waits=100, lease=900, options=()):
        variables = {
            "run_name": name, "folder": str(self.folder), "seconds": seconds, "waits": waits,
            "ansible_connection": "local", "ansible_python_interpreter": sys.executable,
            "lock_args": {"run": "{{ run_id }}", "started": "{{ run_started }}", "who": name, "doing": "enable", "lease": lease,
                          "path": str(self.folder / "run") + "/{{ inventory_hostname }}/lock.json"},
            "locks": "{{ dict(ansible_play_hosts | zip(ansible_play_hosts | map('extract', hostvars, 'lock'))) }}"}
        command = [PLAYBOOK_COMMAND, "-i", ",".join(hosts) + ",", "-e", json.dumps(variables)] + list(options)
        command.append(str(self.folder / "play.yml"))
        environment = dict(os.environ, ANSIBLE_COLLECTIONS_PATH=str(COLLECTIONS), ANSIBLE_LOCALHOST_WARNING="false", LC_ALL="C.UTF-8",
                           ANSIBLE_DEPRECATION_WARNINGS="false", ANSIBLE_HOME=str(self.folder / "home"))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   cwd=str(self.folder), env=environment, start_new_session=True)
        self.processes.append(process)
        return process

    def finish(self, process):
        out = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, out

    def log(self, host):
        """[(begin or end, time, name)]"""
        path = self.folder / (host + ".log")
        lines = path.read_text().splitlines() if path.exists() else []
        return [(word, float(moment), name) for word, moment, name in (line.split() for line in lines)]

    def wait_until_at_work(self, host):
        deadline = time.monotonic() + PATIENCE
        while not self.log(host):
            assert time.monotonic() < deadline and self.processes[-1].poll() is None, self.finish(self.processes[-1])
            time.sleep(0.1)

    def nothing_left(self):
        return not any(self.path(host).exists() for host in ("n1", "n2", "n3"))


@pytest.fixture
def nodes(tmp_path):
    it = Nodes(Path(tmp_path))
    yield it
    for process in it.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_two_at_once_work_one_after_the_other(nodes):
    """Hosts in another order, and not the same ones."""
    started = [nodes.start("one", ("n1", "n2")), nodes.start("two", ("n3", "n2"))]
    for process in started:
        code, out = nodes.finish(process)
        assert code == 0, out
    # on the node that they share, nobody began before the other one had ended
    assert [word for word, moment, name in sorted(nodes.log("n2"), key=lambda entry: entry[1])] == ["begin", "end"] * 2
    assert nodes.nothing_left()


def test_the_second_one_stops_and_names_the_first(nodes):
    first = nodes.start("alice", seconds=600)
    nodes.wait_until_at_work("n1")
    code, out = nodes.finish(nodes.start("bob", waits=0))
    assert code == 2 and "another run changes the mesh: alice has been running enable for" in out, out
    assert "process %d on" % first.pid in out and "its lock ends in" in out
    assert [name for word, moment, name in nodes.log("n1")] == ["alice"]
    # a look is not stopped, and leaves no trace
    before = {host: nodes.path(host).read_text() for host in ("n1", "n2", "n3")}
    code, out = nodes.finish(nodes.start("carol", waits=0, options=("--check",)))
    assert code == 0, out
    assert {host: nodes.path(host).read_text() for host in before} == before
    # killed, so that it cannot say goodbye: the next run of this controller knows that it is dead
    os.killpg(first.pid, signal.SIGKILL)
    nodes.finish(first)
    assert not nodes.nothing_left()
    code, out = nodes.finish(nodes.start("bob", waits=0))
    assert code == 0, out
    assert "bob" in [name for word, moment, name in nodes.log("n3")] and nodes.nothing_left()


def test_a_run_that_did_not_renew_in_time_is_stopped(nodes):
    first = nodes.start("slow", seconds=40, lease=10)
    nodes.wait_until_at_work("n2")
    time.sleep(11)
    code, out = nodes.finish(nodes.start("next", ("n2",), waits=0))
    assert code == 0, out
    code, out = nodes.finish(first)
    assert code == 2 and "was not renewed in time, and another run took it over" in out, out
    assert [(word, name) for word, moment, name in nodes.log("n2")] == [("begin", "slow"), ("begin", "next"), ("end", "next")]
    assert nodes.nothing_left()
