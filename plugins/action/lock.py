# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _controller

# Holders that may be found dead one after the other on a node: each that is taken over leaves one less.
TRIES = 3


class ActionModule(ActionBase):
    """Says which process this run is, and takes the lock of a run over that is known to be dead: only the controller can know."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        own = _controller.controller_identity()
        args.setdefault("controller", own)
        args.setdefault("who", _controller.who_runs(task_vars or {}))
        try:
            result = self._run_module(args, task_vars)
            for dummy in range(TRIES):
                holder = self._in_the_way(result)
                if holder is None or not _controller.is_over(holder.get("controller"), own):
                    break
                result = self._run_module(dict(args, take_over=holder["run"]), task_vars)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    @staticmethod
    def _in_the_way(result):
        """The holder that kept this run from its lock, or None."""
        if result.get("failed") or result.get("acquired") is not False or result.get("revoked") or result.get("state") == "absent":
            return None
        holder = result.get("holder")
        return holder if isinstance(holder, dict) and isinstance(holder.get("run"), str) else None

    def _run_module(self, args, task_vars):
        return self._execute_module(module_name="kubemesh.wireguard.lock", module_args=args, task_vars=task_vars)
