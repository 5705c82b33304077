# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _controller

# Holders that may be found dead one after the other on a node: each that is taken over leaves one less.
TRIES = 3
# Seconds between two looks at a lock that is waited for
LOOK_AGAIN_SECONDS = 5.0
WAIT_MAX = 86400  # seconds


class ActionModule(ActionBase):
    """Says which process this run is, and takes the lock of a run over that is known to be dead: only the controller can know.

    Waits here for other runs, and not on the node, so that one that dies meanwhile is noticed.
    """

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        own = _controller.controller_identity()
        args.setdefault("controller", own)
        args.setdefault("who", _controller.who_runs(task_vars or {}))
        wait = self._seconds(args.pop("wait", None))
        if args.get("state") != "absent" or self._task.check_mode:
            wait = 0.0
        deadline = time.monotonic() + wait
        try:
            result = self._run_module(args, task_vars)
            for dummy in range(TRIES):
                holder = self._in_the_way(result)
                if args.get("state") == "absent" or holder is None or not _controller.is_over(holder.get("controller"), own):
                    break
                result = self._run_module(dict(args, take_over=holder["run"]), task_vars)
            while time.monotonic() < deadline and self._to_be_waited_for(result, own):
                time.sleep(min(LOOK_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
                released, result = result.get("released"), self._run_module(args, task_vars)
                if "released" in result:
                    result["released"] = released or result["released"]
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    @staticmethod
    def _seconds(value):
        try:
            seconds = float(value or 0)
        except (TypeError, ValueError):
            seconds = -1.0
        if not 0 <= seconds <= WAIT_MAX:
            raise AnsibleActionFail("wait: expected seconds from 0 to %d" % WAIT_MAX)
        return seconds

    @staticmethod
    def _in_the_way(result):
        """The other run that has the lock of the node, or None."""
        if result.get("failed") or result.get("acquired") is not False or result.get("revoked"):
            return None
        holder = result.get("holder")
        return holder if isinstance(holder, dict) and isinstance(holder.get("run"), str) else None

    def _to_be_waited_for(self, result, own):
        holder = self._in_the_way(result)
        return bool(result.get("damaged")) if holder is None else not _controller.is_over(holder.get("controller"), own)

    def _run_module(self, args, task_vars):
        # Nobody works any more behind this lock. And what was learned of a main process that is dead is not enough to find it dead later,
        # so this is looked at after that.
        if _controller.main_is_dead():
            raise AnsibleActionFail("the process of this run (%d) is dead: nothing is asked of the lock any more" % _controller.main_pid())
        return self._execute_module(module_name="kubemesh.wireguard.lock", module_args=args, task_vars=task_vars)
