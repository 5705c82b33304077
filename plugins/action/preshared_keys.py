# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's side of preshared keys: derives those of one node, and sends those that it does not have."""

from __future__ import annotations

import json
import secrets

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

# What never is in a result, whatever a version of Ansible makes of no_log.
SECRET_ARGUMENTS = ("secret", "keys", "proofs")


class Hidden(str):
    """A text that is what it is in JSON, and not in what Python prints: with ANSIBLE_DEBUG, Ansible prints the arguments of modules."""

    __slots__ = ()

    def __repr__(self):
        return "(hidden)"


class ActionModule(ActionBase):
    """Sends proofs first, and keys only where they differ and are to be written."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        args = dict(self._task.args)
        secret, source, node = (args.pop(name, None) for name in ("secret", "document_src", "node"))
        try:
            if args.get("state", "present") == "absent" or secret is None:
                return self._run_module(args, task_vars)
            own = self._keys(secret, source, node, args.pop("generation", 0))
            nonce = secrets.token_hex(16)
            args["nonce"] = nonce
            if args.get("complete") is None:
                args["complete"] = own["complete"]
            args["proofs"] = {public_key: Hidden(_psk.proof(key, nonce, public_key)) for public_key, key in own["keys"].items()}
            result = self._run_module(args, task_vars)
            needed = self._needed(result)
            if needed and not self._task.check_mode and not result.get("failed") and result.get("changed"):
                args["keys"] = {
                    public_key: Hidden(_psk.encode(own["keys"][public_key])) for public_key in needed if public_key in own["keys"]}
                result = self._run_module(args, task_vars)
            return self._with_names(result, own["names"])
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _keys(self, secret, source, node, generation):
        if not source or not node:
            raise AnsibleActionFail("document_src and node are needed with secret")
        try:
            with open(source, "rb") as handle:
                # Written by kubemesh.wireguard.peers and judged again on every node; to judge it here once for each node takes too long.
                document = json.load(handle)
            return _psk.keys_of_node(document, str(node), generation, _psk.secret_text(secret))
        except MeshError as exc:
            raise AnsibleActionFail(str(exc)) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            # not the text of the exception: it may have come across the secret
            raise AnsibleActionFail("document_src: %s on the controller is not a mesh document (%s); kubemesh.wireguard.peers writes it "
                                    "(option dest)" % (source, type(exc).__name__)) from None

    @staticmethod
    def _needed(result):
        needed = result.pop("needed", "")
        return needed.split() if isinstance(needed, str) else []

    @staticmethod
    def _with_names(result, names):
        """What the module told of public keys, told of nodes."""
        if result.get("failed") or not isinstance(result.get("counts"), dict):
            return result
        result.update(_psk.with_names({kind: result[kind] for kind in _psk.KINDS}, names))
        result["differs"] = list(result["replaced"])
        if "diff" in result:
            result["diff"]["prepared"] = "".join(line + "\n" for line in _psk.describe(result))
        return result

    def _run_module(self, args, task_vars):
        result = self._execute_module(module_name="kubemesh.wireguard.preshared_keys", module_args=args, task_vars=task_vars)
        arguments = (result.get("invocation") or {}).get("module_args") or {}
        for name in SECRET_ARGUMENTS:
            arguments.pop(name, None)
        return result
