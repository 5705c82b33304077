# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The controller's part of modules that read the mesh document on the node.

In a real run the document is on the node before these modules are. In check mode it is not, because nothing may be written there; so
it travels with the module, in the module's own temporary directory, which goes when the task ends. It never goes through Jinja.
"""

from __future__ import annotations

import os

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class DocumentActionBase(ActionBase):
    """Runs the module of the same name; ``document_src`` becomes ``document_file`` in check mode and is dropped otherwise."""

    TRANSFERS_FILES = True

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        source = args.pop("document_src", None)
        if source and self._task.check_mode:
            if not os.path.isfile(source):
                raise AnsibleActionFail(
                    "document_src: %s is not a file on the controller; kubemesh.wireguard.peers writes it (option dest)" % source)
            target = self._connection._shell.join_path(self._connection._shell.tmpdir or self._make_tmp_path(), "mesh.json")
            self._transfer_file(source, target)
            self._fixup_perms2((self._connection._shell.tmpdir, target))
            args["document_file"] = target
        try:
            return self._execute_module(
                module_name=self._task.action, module_args=args, task_vars=task_vars, wrap_async=self._task.async_val)
        finally:
            if not self._task.async_val:
                self._remove_tmp_path(self._connection._shell.tmpdir)
