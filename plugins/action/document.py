# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import os

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Sends the mesh document only to nodes that have another one: by checksum first, and by itself where that differs."""

    TRANSFERS_FILES = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        source = args.pop("src", None)
        try:
            if source is None:
                return self._run_module(args, task_vars)
            if not os.path.isfile(source):
                raise AnsibleActionFail(
                    "src: %s is not a file on the controller; kubemesh.wireguard.peers writes it (option dest)" % source)
            with open(source, "rb") as handle:
                args["sha256"] = hashlib.sha256(handle.read()).hexdigest()
            result = self._run_module(args, task_vars)
            if result.get("failed") or not result.get("needed"):
                return result
            target = self._connection._shell.join_path(self._connection._shell.tmpdir or self._make_tmp_path(), "mesh.json")
            self._transfer_file(source, target)
            self._fixup_perms2((self._connection._shell.tmpdir, target))
            return self._run_module(dict(args, src=target), task_vars)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _run_module(self, args, task_vars):
        return self._execute_module(module_name="kubemesh.wireguard.document", module_args=args, task_vars=task_vars)
