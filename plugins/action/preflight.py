# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Runs the module of the same name; ``targets_src``, a file on the controller, travels with it instead of going through templates."""

    TRANSFERS_FILES = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        source = args.pop("targets_src", None)
        try:
            if source:
                if not os.path.isfile(source):
                    raise AnsibleActionFail("targets_src: %s is not a file on the controller" % source)
                folder = self._connection._shell.tmpdir or self._make_tmp_path()
                target = self._connection._shell.join_path(folder, "targets.json")
                self._transfer_file(source, target)
                self._fixup_perms2((folder, target))
                args["targets_file"] = target
            return self._execute_module(module_name=self._task.action, module_args=args, task_vars=task_vars)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
