# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import time

from ansible.errors import AnsibleConnectionFailure
from ansible.utils.display import Display

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._document_action import DocumentActionBase

display = Display()

# Seconds between two tries to reach a node that does not answer.
RETRY = 2
# Seconds that a node may need, beyond its own time, to take the change back and to be reached again.
COMES_BACK = 30


class ActionModule(DocumentActionBase):
    """See the module of the same name.

    A switch that is armed is confirmed here, host by host: in a task of its own, the last host of a large batch would be confirmed only
    after the first one's time is up. The confirmation takes a new connection, as an old one may outlive the way that a new one needs.
    """

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        if not result.get("armed") or result.get("failed") or self._task.check_mode:
            return result
        confirmed = self._confirm(task_vars)
        if confirmed.get("failed"):
            return dict(confirmed, was_sending=result["was_sending"])
        for field in ("steps", "diff"):
            confirmed[field] = list(result.get(field) or []) + list(confirmed.get(field) or [])
        return dict(
            confirmed, changed=True, armed=True, was_sending=result["was_sending"], carried_connections=result["carried_connections"])

    def _confirm(self, task_vars):
        """Run the module again over a new connection until it answers; after its time the node has taken the change back."""
        args = {name: value for name, value in self._task.args.items() if name not in ("confirm_timeout", "document_src")}
        deadline = time.monotonic() + float(self._task.args["confirm_timeout"]) + COMES_BACK
        while True:
            try:
                if hasattr(self._connection, "reset"):
                    self._connection.reset()
                self._connection._shell.tmpdir = None
                return self._execute_module(
                    module_name=self._task.action, module_args=dict(args, confirm=True), task_vars=task_vars)
            except AnsibleConnectionFailure as exc:
                if time.monotonic() > deadline:
                    raise
                display.vv("not reached to confirm the switch, trying again: %s" % exc, host=task_vars.get("inventory_hostname"))
                time.sleep(RETRY)
            finally:
                # The connection may be gone again: the directory goes with the next one, and the next try must be made.
                with contextlib.suppress(AnsibleConnectionFailure):
                    self._remove_tmp_path(self._connection._shell.tmpdir)
