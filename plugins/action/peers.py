# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller's side of the mesh: node list, public keys and last document in, next document out.

An action, so that node lists of many megabytes and the variables of thousands of hosts never pass through Jinja, and so that it reads
the variables of hosts that this run does not touch. What it decides is in ``module_utils/_membership.py``.
"""

from __future__ import annotations

import os
import tempfile

from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader
from ansible.utils.display import Display

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh, _pods, _published_keys
from ansible_collections.kubemesh.wireguard.plugins.modules.peers import ARGUMENT_SPEC, MUTUALLY_EXCLUSIVE
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _cluster, _hostvars
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import plain, untrusted

MeshError = _mesh.MeshError
display = Display()

CONTROL_PLANE_GROUP = "kube_control_plane"  # Kubespray's name
CHANGES_RETURNED = 200  # lines: results are stored by callbacks, AWX and registered variables
DOCUMENT_MODE = 0o644  # public facts only


def read_document(path):
    """The document in a file, or None when there is no such file."""
    try:
        with open(path, "rb") as handle:
            data = handle.read()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise MeshError("previous: %s cannot be read: %s" % (path, exc.strerror)) from None
    try:
        return _mesh.load_document(data)
    except MeshError as exc:
        raise MeshError("previous: %s: %s" % (path, exc)) from None


def write_file(path, data):
    """Replace the file in one step: readers see the old bytes or the new ones."""
    folder = os.path.dirname(os.path.abspath(path))
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".mesh-", dir=folder)
        with os.fdopen(descriptor, "wb") as handle:
            os.fchmod(handle.fileno(), DOCUMENT_MODE)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as exc:
        raise MeshError("dest: %s cannot be written on the controller: %s" % (path, exc.strerror)) from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def file_differs(path, data):
    try:
        with open(path, "rb") as handle:
            return handle.read() != data
    except OSError:
        return True


def view_of(document, node, generation):
    """What one node computes: peers, addresses, routes."""
    routes = _mesh.table_routes(document, node, generation)
    return {
        "peers": _mesh.peers_of(document, node, generation),
        "device_addresses": _mesh.device_addresses(document, node, generation),
        "local_pod_cidrs": _mesh.local_pod_cidrs(document, node),
        "routes": {table: [list(route) for route in routes[table]] for table in routes},
        "mtu": _mesh.mesh_mtu(document, node),
    }


def mismatches(document, settings, hosts, play_hosts, ansible_hosts):
    """Where the node list and the inventory do not match, see ``missing`` in the module's documentation.

    ``hosts``: those that should be nodes; ``ansible_hosts``: their ``ansible_host`` where set.
    """
    nodes = {name: entry for name, entry in document["nodes"].items() if entry["state"] != "excluded"}
    orphans = sorted(set(nodes) - set(settings))
    matched = {settings[name]["host"] for name in set(document["nodes"]) & set(settings)}
    without_node = sorted(set(hosts) - matched)
    here = {name for name in nodes if name in settings and settings[name]["host"] in play_hosts}
    addresses = {address: name for name in orphans for address in nodes[name]["node_addresses"]}
    return {
        "not_in_inventory": orphans,
        "not_in_play": sorted(set(nodes) & set(settings) - here),
        "without_key": sorted(name for name in set(nodes) - here if not nodes[name]["public_keys"]),
        "hosts_without_node": without_node,
        "suggestions": _membership.name_suggestions(orphans, {host: ansible_hosts.get(host) for host in without_node}, addresses),
    }


class ActionModule(ActionBase):

    _supports_check_mode = True
    _supports_async = False
    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars or {})
        dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC, mutually_exclusive=MUTUALLY_EXCLUSIVE)
        try:
            result.update(self._peers(plain(args), task_vars or {}))
        except MeshError as exc:
            result.update(failed=True, msg=str(exc), problems=exc.problems)
        return untrusted(result)

    def _peers(self, args, task_vars):
        _membership.require_libraries()
        groups = plain(task_vars.get("groups") or {})
        hosts = args["hosts"] if args["hosts"] is not None else sorted(groups.get("all", []))
        candidates = groups.get(CONTROL_PLANE_GROUP, [])
        # an inventory may have several clusters, and each its own control plane in this group
        candidates = [host for host in candidates if host in set(hosts)] or candidates
        control_plane = args["kubectl_host"] or next(iter(candidates), None)
        problems = self._unknown_hosts(args, groups)
        variables = _membership.HOST_VARIABLES + ("ansible_host",)
        reported = [args["facts_variable"], args["info_variable"]]
        read = _hostvars.read_hosts(task_vars["hostvars"], hosts, variables, reported) if hosts else {}
        ansible_hosts = {host: own.get("ansible_host") for host, own in read.items()}
        settings, more, warnings = _membership.settings_of_hosts(
            {host: self._host_variables(own, args["info_variable"]) for host, own in read.items()}, args["facts_variable"])
        problems.extend(more)
        from_inventory = _membership.nodes_from_inventory(settings)
        source, why = _cluster.choose_source(args, os.environ, os.path.expanduser("~"), control_plane, bool(from_inventory))
        self._check_pod_source(args, source)
        play_hosts = set(plain(task_vars.get("ansible_play_hosts_all") or []))
        if args["discover"]:
            return self._discovered(source, why, control_plane, settings, play_hosts)

        previous, more = self._previous(args)
        warnings.extend(more)
        source, why, items, complete, why_incomplete = self._node_list(args, task_vars, source, why, control_plane, bool(from_inventory))
        objects = {}
        if args["pod_source"] != _pods.NODE_CIDRS:
            self._check_pod_source(args, source)  # kubectl may be missing, and the inventory taken in its place
            items, objects = self._pod_objects(args, task_vars, source, items)
        if items is None:
            candidates = from_inventory
            if not candidates:
                raise MeshError("source inventory: none of the %d hosts has mesh_pod_cidrs or mesh_node_addresses; set them, or use another"
                                " source" % len(hosts))
        else:
            queries = {field: args["%s_query" % field] for field in _membership.DEFAULT_QUERIES}
            candidates, more = _membership.nodes_given(items, queries) if source == "nodes" else _membership.nodes_from_k8s(items, queries)
            problems.extend(more)
            candidates, more = _pods.with_pod_source(candidates, args["pod_source"], objects, _membership.merged_by_netaddr)
            warnings.extend(more)
        document, more = _membership.build_document(
            candidates, {name: own["public_keys"] for name, own in settings.items()}, previous, {
                "complete": complete, "why_incomplete": why_incomplete, "port": args["port"], "generations": args["generations"],
                "pod_source": args["pod_source"],
                "generation": args["current_generation"],
                "forget_nodes": args["forget_nodes"], "exclude_nodes": args["exclude_nodes"], "service_cidrs": args["service_cidrs"],
                "expect_new_keys": args["expect_new_keys"], "settings": settings, "problems": problems,
                "awaited": self._awaited(settings, play_hosts)})
        warnings.extend(more)
        expected = sorted(play_hosts & set(hosts)) or args["hosts"] or []
        missing = mismatches(document, settings, expected, play_hosts, ansible_hosts)
        warnings.extend("host %s is not the name of a node, but most likely node %s: set mesh_node_name" % pair
                        for pair in sorted(missing["suggestions"].items()))
        result = self._report(args, document, previous)
        result.update(source=source, source_reason=why, missing=missing, warnings=warnings,
                      to_examine=_membership.nodes_to_examine(document, previous, settings, args["pod_source"]))
        if source in ("kubernetes", "kubectl", "file"):
            result["annotations"] = _published_keys.annotation_changes(candidates, document)
        return result

    @staticmethod
    def _check_pod_source(args, source):
        if args["pod_source"] == _pods.NODE_CIDRS:
            return
        if source == "inventory":
            raise MeshError("pod_source (mesh_pod_source) is %s, and the nodes come from the inventory, which knows nothing of pods; use"
                            " source (mesh_nodes_source) kubernetes, kubectl or file, or node_cidrs with mesh_pod_cidrs of each host"
                            % args["pod_source"])
        if args["pod_cidrs_query"] not in (None, "", _membership.DEFAULT_QUERIES["pod_cidrs"]):
            raise MeshError("pod_source (mesh_pod_source) is %s, and pod_cidrs_query (mesh_pod_cidrs_query) is given: only one of them can"
                            " say where pod CIDRs come from; take one away" % args["pod_source"])

    @staticmethod
    def _way(args):
        return _cluster.find_way(args["kubeconfig"], args["context"], os.environ, os.path.expanduser("~"))

    def _pod_objects(self, args, task_vars, source, items):
        """``(Node objects, {kind: objects} of the pod source)``. Those of a list that is given or saved are in that list."""
        resources = _pods.RESOURCES[args["pod_source"]]
        if source == "kubernetes":
            return items, _cluster.api_items(self._way(args), resources)
        if source == "kubectl":
            return items, {resource.kind: self._kubectl_items(args, task_vars, resource) for resource in resources}
        return _cluster.split_kinds(items, resources)

    def _kubectl_items(self, args, task_vars, resource):
        result, host = self._run_kubectl(args, task_vars, None, resource)
        if result.get("failed") or result.get("rc") != 0:
            raise _cluster.kubectl_error(result, host, args["kubectl_command"], _cluster.listing_of(resource))
        where = "the output of %s on host %s" % (" ".join(args["kubectl_command"] + _cluster.kubectl_arguments(resource)), host)
        return _cluster.list_items(_cluster.parse_listing(result["stdout"], where), resource)

    @staticmethod
    def _host_variables(own, info_variable):
        # ansible_host only serves to recognise a host, so it is no matter when it cannot be computed
        own = dict(own)
        unresolved = [variable for variable in own.pop("unresolved", []) if variable != "ansible_host"]
        own.pop("ansible_host", None)
        info = own.pop(info_variable, None)
        # one that failed, or was skipped, says nothing
        if isinstance(info, dict) and isinstance(info.get("generations"), list):
            found = [item for item in info["generations"] if isinstance(item, dict)]
            own["generations"] = [str(item.get("generation")) for item in found]
            own["live_keys"] = [item["public_key"] for item in found if item.get("public_key")]
        return dict(own, unresolved=unresolved) if unresolved else own

    @staticmethod
    def _awaited(settings, play_hosts):
        """Nodes that are part of this play, before any node of it has reported a key; afterwards, who has not will not."""
        here = {name: own for name, own in settings.items() if own["host"] in play_hosts}
        return () if any(own["public_keys"] for own in here.values()) else frozenset(here)

    @staticmethod
    def _unknown_hosts(args, groups):
        unknown = sorted(set(args["hosts"] or []) - set(groups.get("all", [])) - {"localhost"})
        return ["hosts: %s is not in the inventory" % _membership.name_list(unknown)] if unknown else []

    @staticmethod
    def _discovered(source, why, control_plane, settings, play_hosts):
        newest = _membership.newest_on_hosts(settings)
        return {
            "changed": False,
            "source": source,
            "source_reason": why,
            "delegate_to": control_plane if source == "kubectl" and control_plane else "localhost",
            "previous_serial": newest["serial"] if newest else None,
            # hosts of this play first: they are there to be asked
            "previous_hosts": [min(hosts, key=lambda host: (host not in play_hosts, host)) for hosts in newest["hosts"].values()]
            if newest else [],
        }

    @staticmethod
    def _previous(args):
        paths = args["previous"]
        if paths is None:
            paths = [args["dest"]] if args["dest"] else []
        documents = [(path, read_document(path)) for path in paths]
        return _membership.newest_document([(path, document) for path, document in documents if document is not None])

    def _node_list(self, args, task_vars, source, why, control_plane, inventory_has_nodes):
        """``(source, why, items or None, complete, why it is not)``; None: the hosts of the inventory."""
        items, complete, why_incomplete = None, False, "it comes from the inventory"
        if source == "nodes":
            items, why_incomplete = args["nodes"], "it was given to this run"
        elif source == "file":
            items, complete, why_incomplete = _membership.node_items(self._read_listing(args["nodes_file"]))
            if args["pod_source"] != _pods.NODE_CIDRS and not complete:
                raise MeshError("nodes_file: %s: %s, so it may lack objects that pod_source (mesh_pod_source) %s needs; save the whole list"
                                % (args["nodes_file"], why_incomplete, args["pod_source"]))
        elif source == "kubernetes":
            items = _cluster.list_nodes(lookup_loader, self._loader, self._templar, task_vars, self._way(args))
            complete = True
        elif source == "kubectl":
            result, host = self._run_kubectl(args, task_vars, control_plane)
            if args["source"] == "auto" and inventory_has_nodes and _cluster.kubectl_missing(result):
                source, why = "inventory", "the controller has no kubeconfig, and host %s has no kubectl" % host
            else:
                if result.get("failed") or result.get("rc") != 0:
                    raise _cluster.kubectl_error(result, host, args["kubectl_command"])
                where = "the output of %s on host %s" % (" ".join(args["kubectl_command"]), host)
                items, complete, why_incomplete = _membership.node_items(_cluster.parse_listing(result["stdout"], where))
        if args["nodes_complete"] is not None:
            complete, why_incomplete = args["nodes_complete"], "nodes_complete is false"
        return source, why, items, complete, why_incomplete

    @staticmethod
    def _read_listing(path):
        try:
            with open(path, encoding="utf-8") as handle:
                text = handle.read()
        except (OSError, ValueError) as exc:
            raise MeshError("nodes_file: %s cannot be read on the controller: %s" % (path, exc)) from None
        return _cluster.parse_listing(text, "nodes_file: %s" % path)

    def _run_kubectl(self, args, task_vars, control_plane, resource=_pods.NODES):
        """``(result of the command module, host)``: kubectl runs where this task is delegated to."""
        host = str(self._task.delegate_to or task_vars.get("inventory_hostname"))
        if control_plane and host != control_plane and (args["kubectl_host"] or args["source"] == "auto"):
            raise MeshError("kubectl is to run on host %s, but this task runs on %s; add delegate_to: %s to the task"
                            % (control_plane, host, control_plane))
        command = args["kubectl_command"] + _cluster.kubectl_arguments(resource)
        display.vvv("kubemesh.wireguard.peers: %s on %s" % (" ".join(command), host))
        check_mode, self._task.check_mode = self._task.check_mode, False  # it only reads, and check mode needs what it reads
        try:
            return self._execute_module(module_name="ansible.legacy.command", module_args={"argv": command}, task_vars=task_vars), host
        finally:
            self._task.check_mode = check_mode

    def _report(self, args, document, previous):
        data = _mesh.document_bytes(document)
        changes = _mesh.compare_documents(previous, document)
        nodes = document["nodes"]
        states = {state: sorted(name for name in nodes if nodes[name]["state"] == state) for state in _mesh.STATES}
        before = previous["nodes"] if previous is not None else {}
        result = {
            "changed": False,
            "serial": document["serial"],
            "previous_serial": previous["serial"] if previous is not None else None,
            "sha256": _mesh.document_sha256(document),
            "complete": document["complete"],
            "generation": document["generation"],
            "key_generations": sorted({
                int(generation) for dummy, entry in _mesh.tunnelled_nodes(document["nodes"]) for generation in entry["public_keys"]}),
            "document_changed": document != previous,
            "changes": changes if len(changes) <= CHANGES_RETURNED else
            changes[:CHANGES_RETURNED] + ["and %d more" % (len(changes) - CHANGES_RETURNED)],
            "counts": dict({state: len(names) for state, names in states.items()},
                           joined=len(set(nodes) - set(before)), left=len(set(before) - set(nodes))),
            "members": states["member"],
            "pending": {name: nodes[name]["reason"] for name in states["pending"]},
            "excluded": {name: nodes[name]["reason"] for name in states["excluded"]},
        }
        if args["node"] is not None:
            result["view"] = view_of(document, args["node"], args["generation"])
        if args["return_document"]:
            result["document"] = document
        if args["dest"]:
            result["path"] = args["dest"]
            result["changed"] = file_differs(args["dest"], data)
            if result["changed"] and not self._task.check_mode:
                write_file(args["dest"], data)
        if self._task.diff and changes:
            result["diff"] = {
                "before_header": "mesh document, serial %s" % (previous["serial"] if previous is not None else "none"),
                "after_header": "mesh document, serial %d" % document["serial"],
                "prepared": "".join(line + "\n" for line in changes),
            }
        return result
