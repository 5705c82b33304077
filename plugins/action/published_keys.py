# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's side of published keys: it asks the API itself, or has the module use kubectl on a host, and tells what came of it.

What is to be written is decided in ``module_utils/_published_keys.py``, for both.
"""

from __future__ import annotations

import os

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh, _pods, _published_keys
from ansible_collections.kubemesh.wireguard.plugins.modules.published_keys import ARGUMENT_SPEC
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _cluster
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import plain, untrusted

MeshError = _mesh.MeshError
display = Display()

CHANGES_RETURNED = 200  # lines: results are stored by callbacks, AWX and registered variables
PAGE_SIZE = 500  # Nodes; kubectl's own
# Requests at once. The API server gives the requests of all users of a level that many seats and more (API priority and fairness).
WORKERS = 8
PROGRESS = 500  # Nodes, from which on a line says how far it is

MERGE_PATCH = "application/merge-patch+json"

BY_HAND = "kubectl annotate nodes --all %s" % " ".join(
    "%s-" % _membership.ANNOTATIONS[generation] for generation in _mesh.GENERATIONS)
# What becomes of the run of the role when it cannot write
GOES_ON = {
    "present": "the run goes on: keys are taken from what hosts report and from the last mesh documents only; set mesh_publish_keys to"
               " false where that is meant",
    "absent": "the run goes on, and keys stay on Nodes; remove them by hand: %s" % BY_HAND,
}


class ActionModule(ActionBase):

    _supports_check_mode = True
    _supports_async = False
    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars or {})
        dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        args = plain(args)
        result.update(changed=False, nodes=0, changes=[], replaced=[], problem="")
        try:
            result.update(self._published(args, task_vars or {}))
        except MeshError as exc:
            result["problem"] = str(exc)
        # A host that is away when its turn comes to run kubectl must not leave the run for that.
        except AnsibleError as exc:
            if args["required"]:
                raise
            result["problem"] = "%s: %s" % (_cluster.PUBLISHING.doing, " ".join(str(exc).split()))
        if result["problem"] and args["required"]:
            result.update(failed=True, msg=result["problem"])
        elif result["problem"]:
            result.setdefault("warnings", []).append("%s; %s" % (result["problem"], GOES_ON[args["state"]]))
        return untrusted(result)

    def _published(self, args, task_vars):
        documents = [(path, self._document(path)) for path in args["document"]]
        document, warnings = _membership.newest_document(documents)
        wanted = _published_keys.wanted_of(document) if document is not None else {}
        reach = self._by_kubectl if args["source"] == "kubectl" else self._by_api
        patches, outcome, explain = reach(args, wanted, task_vars)
        if outcome is None:
            outcome = {"done": [patch["node"] for patch in patches], "gone": [], "replaced": [], "failed": [], "left": 0}
        done = set(outcome["done"])
        written = [patch for patch in patches if patch["node"] in done]
        replaced = sorted(outcome["replaced"] + outcome["gone"])
        if replaced and args["state"] == "present":
            warnings.append("node %s was deleted while its public key was written; if there is one of that name again, it has not been"
                            " given the key: run the playbook reconcile" % _membership.name_list(replaced))
        before, after = (_published_keys.lines_of(written, side) for side in ("before", "after"))
        changes = ["- " + line for line in before] + ["+ " + line for line in after]
        result = {
            "changed": bool(written),
            "nodes": len(written),
            "changes": changes if len(changes) <= CHANGES_RETURNED else
            changes[:CHANGES_RETURNED] + ["and %d more" % (len(changes) - CHANGES_RETURNED)],
            "replaced": replaced,
            "problem": self._problem(outcome, len(patches), explain),
            "warnings": warnings,
        }
        if self._task.diff and written:
            header = "annotations of Nodes"
            result["diff"] = {"before_header": header, "after_header": header, "before": "".join(line + "\n" for line in before),
                              "after": "".join(line + "\n" for line in after)}
        return result

    @staticmethod
    def _document(path):
        try:
            with open(path, "rb") as handle:
                return _mesh.load_document(handle.read())
        except OSError as exc:
            raise MeshError("document: %s cannot be read: %s; kubemesh.wireguard.peers writes it (option dest)"
                            % (path, exc.strerror)) from None
        except MeshError as exc:
            raise MeshError("document: %s: %s" % (path, exc)) from None

    @staticmethod
    def _problem(outcome, number, explain):
        """Why not everything was written, by the first Node that was not; empty if everything was."""
        if not outcome["failed"]:
            return ""
        node, failure = outcome["failed"][0]
        missed = len(outcome["failed"]) + outcome["left"]
        return "%s (node %s%s)" % (explain(failure), node, "" if number == 1 else "; %d of %d Nodes were not written" % (missed, number))

    # --- the two ways to the cluster

    def _by_api(self, args, wanted, dummy):
        way = _cluster.find_way(args["kubeconfig"], args["context"], os.environ, os.path.expanduser("~"))
        details = _cluster.details_of(way)
        client = _cluster.api_client(way, details)
        items = _cluster.list_pages(client, way.found, details, None, PAGE_SIZE, _published_keys.REQUEST_TIMEOUT)
        patches = _published_keys.plan(args["state"], wanted, _published_keys.nodes_read(items), self._generations(args))

        def send(patch):
            try:
                client.request("patch", "%s/%s" % (_pods.NODES.path, patch["node"]), body=_published_keys.body_of(patch),
                               content_type=MERGE_PATCH, serialize=False, _request_timeout=_published_keys.REQUEST_TIMEOUT)
            except Exception as exc:  # noqa: BLE001  the client raises its own, urllib3's, ssl's and plain Exception
                return _published_keys.verdict(getattr(exc, "status", None), _cluster.status_message(getattr(exc, "body", None))), exc
            return _published_keys.DONE, None

        def tell(tried):
            if len(patches) >= PROGRESS:
                display.display("published_keys: %d of %d Nodes" % (tried, len(patches)))

        outcome = None if self._task.check_mode else _published_keys.apply_patches(patches, send, WORKERS, tell)
        return patches, outcome, lambda exc: _cluster.api_error(exc, way.found, details, _cluster.PUBLISHING)

    def _by_kubectl(self, args, wanted, task_vars):
        host = str(self._task.delegate_to or task_vars.get("inventory_hostname"))
        command = args["kubectl_command"]

        def explain(failure, request=_cluster.PUBLISHING):
            return _cluster.kubectl_error(failure, host, command, request)

        result = plain(self._execute_module(module_name="kubemesh.wireguard.published_keys", module_args=dict(args, wanted=wanted),
                                            task_vars=task_vars))
        if result.get("unread"):
            raise explain(result["unread"], _cluster.LISTING)
        if result.get("failed") or "patches" not in result:
            raise MeshError("%s on host %s: %s"
                            % (_cluster.PUBLISHING.doing, host, result.get("msg") or result.get("module_stderr") or result))
        return result["patches"], result["outcome"], explain

    @staticmethod
    def _generations(args):
        return [str(number) for number in args["generations"]]
