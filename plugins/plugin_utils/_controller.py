# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Which process on which controller a run is, and whether the process of another run is still there.

A run is the process that forks Ansible's workers: ``ansible-playbook``, however it was started (by hand, ansible-runner, AWX). An action
runs in a worker, a fork of it that ends with its task, so ``os.getpid()`` is of no use. Nor is the session: workers start one each
(``os.setsid`` in ``ansible/executor/process/worker.py``), and in a container all may have that of its first process. ``os.getppid()`` says
something else as soon as the main process is dead. What is right in every case is ``multiprocessing.parent_process()``: workers are
``multiprocessing`` processes, and it is the pid that was noted when this one was forked. There is none in the main process itself.

A pid alone says nothing: pids are used again, and each container counts its own. So an identity has the host name and boot id of the
machine, the pid namespace (and the time namespace, as start times are shown in its time), the pid, and when that process started in clock
ticks since the boot. Only if host, boot and namespaces are this process's own can it say that another one is dead; else nobody is dead,
and locks end by themselves. Namespace numbers are used again when a namespace is gone, but then all processes in it are gone too.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import socket

BOOT_ID = "/proc/sys/kernel/random/boot_id"
NAMESPACES = ("pid", "time")
# Fields of /proc/PID/stat behind the name of the program, proc_pid_stat(5): 3 state, 22 starttime
_STATE, _STARTTIME = 0, 22 - 3
_GONE = ("Z", "X", "x")  # a zombie is dead, only nobody asked yet what it died of


def main_pid():
    """The pid of the process that runs the playbook."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None else parent.pid


def main_is_dead():
    """Whether this is a worker whose main process has died: workers are not killed with it, as they have sessions of their own."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


def controller_identity(pid=None):
    """``{"host", "boot_id", "namespaces", "pid", "started_ticks"}`` of the run that this process belongs to.

    What this system does not tell (there is no /proc but on Linux) is empty or 0, and nobody ever finds that run dead.
    """
    pid = main_pid() if pid is None else pid
    started = _process(pid)
    return {"host": socket.gethostname(), "boot_id": _boot_id(), "namespaces": _namespaces(), "pid": pid,
            "started_ticks": started[1] if started else 0}


def is_dead(identity, own=None):
    """Whether the process of that identity is known to be gone: on this very machine, in this very container, and no longer there."""
    own = own or controller_identity()
    if not _comparable(identity, own):
        return False
    try:
        # Not /proc: where it is mounted with hidepid, processes of others are not in it.
        os.kill(identity["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        # It is somebody else's, so there is one; whether it is the same one says its start, if that can be read.
        pass
    found = _process(identity["pid"])
    return found is not None and (found[0] in _GONE or found[1] != identity["started_ticks"])


def is_over(identity, own=None):
    """Whether a run of that identity cannot go on: it is dead, or was an earlier play of this same process."""
    own = own or controller_identity()
    return _comparable(identity, own) and (identity == own or is_dead(identity, own))


def _comparable(identity, own):
    fields = ("host", "boot_id", "namespaces")
    return (isinstance(identity, dict) and all(identity.get(field) and identity[field] == own[field] for field in fields)
            and isinstance(identity.get("pid"), int) and identity["pid"] > 0
            and isinstance(identity.get("started_ticks"), int) and identity["started_ticks"] > 0)


def _process(pid):
    """``(state, start in ticks)`` of a process; None if that cannot be read."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as handle:
            # The name of the program is in brackets and may hold anything, brackets and spaces included.
            fields = handle.read().rpartition(b")")[2].split()
        return fields[_STATE].decode("ascii"), int(fields[_STARTTIME])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id():
    try:
        with open(BOOT_ID, encoding="ascii") as handle:
            return handle.read().strip()
    except (OSError, ValueError):
        return ""


def _namespaces():
    """``pid:[4026531836] time:[4026531834]`` of this process. Kernels before 5.6 have no time namespaces."""
    found = []
    for name in NAMESPACES:
        try:
            found.append(os.readlink("/proc/self/ns/%s" % name))
        except OSError:
            if name == "pid":
                return ""
    return " ".join(found)


def who_runs(variables):
    """Who started this run, for messages: the user of AWX or Tower with the job, else that of the controller."""
    def first(*names):
        return next((str(variables[name]) for name in names if isinstance(variables.get(name), (str, int)) and variables[name] != ""), "")

    user = first("awx_user_name", "tower_user_name")
    schedule = first("awx_schedule_name", "tower_schedule_name")
    job = first("awx_job_id", "tower_job_id")
    if not user and not schedule:
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a user id without name, as in many containers
            user = "user id %d" % os.getuid()
    who = user or "schedule %s" % schedule
    text = "%s (job %s)" % (who, job) if job else "%s@%s" % (who, socket.gethostname())
    return "".join(character if character.isprintable() else "?" for character in text)[:200]
