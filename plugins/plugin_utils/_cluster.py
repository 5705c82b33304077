# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The cluster's node list: which source, how to get it, and what to say when that fails.

The API is asked through the lookup plugin of the collection kubernetes.core: it runs in the controller's own process, so the list
neither needs a connection nor passes through a module's output. Without ``limit`` the API answers with the whole list.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import NamedTuple

import yaml
from ansible.errors import AnsibleError

from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import node_items
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._pods import NODES, kubectl_name

LOOKUP = "kubernetes.core.k8s"
PAGE_SIZE = 500  # objects; what Kubernetes' own clients take (client-go, tools/pager)
# What these say of a network is true for any cluster; all else of K8S_AUTH_* belongs to one.
OF_THE_NETWORK = "K8S_AUTH_PROXY", "K8S_AUTH_NO_PROXY"
PAGE_TIMEOUT = 60  # seconds for one page; the API server gives up a request after as many (--request-timeout)


class Request(NamedTuple):
    """What is asked of the API server, for messages."""

    doing: str
    rights: str  # what whoever asks needs
    no_such: str = ""  # what to say where the API does not know the resource


def listing_of(resource):
    """The `Request` of a list of a `_pods.Resource`."""
    doing = "listing " + resource.plural
    if resource == NODES:
        return Request(
            doing, "give it a ClusterRole with apiGroups [''], resources [nodes] and verbs [get, list] (and patch, if public keys are to be"
                   " published as annotations)")
    rights = "give it a ClusterRole with apiGroups ['%s'], resources [%s] and verbs [list]" % (resource.group, resource.plural)
    if not resource.group:
        return Request(doing, rights)
    return Request(
        doing, rights,
        "this cluster has no %s (%s): it does not use %s, or that keeps its data elsewhere, such as in an etcd of its own; set pod_source"
        " (mesh_pod_source) to what the cluster has" % (resource.plural, resource.group, resource.owner))


LISTING = listing_of(NODES)
PUBLISHING = Request(
    "writing public keys as annotations of Nodes",
    "it lacks the right to patch nodes: give it a ClusterRole with apiGroups [''], resources [nodes] and verbs [get, list, patch], as"
    " roles/mesh/files/controller-rbac.yml has it and the entry point rbac of the role applies it")


class Way(NamedTuple):
    """The way to the API server."""

    kubeconfig: str | None
    found: str  # where it was found, for messages; empty: nowhere
    context: str | None
    unused: frozenset  # variables of the environment that lead, or belong, to another cluster


def _existing(paths):
    return [path for path in paths.split(os.pathsep) if path and os.path.exists(os.path.expanduser(path))]


def find_way(option, context, environ, home):
    """The `Way` to the API server.

    In this order: the option, ``K8S_AUTH_KUBECONFIG``, ``K8S_AUTH_HOST`` (AWX sets it; there is no file then), ``KUBECONFIG``,
    ``~/.kube/config``. Raises `MeshError` when the option names a file that does not exist.

    kubernetes.core fills in from the environment what it is not told, and with an address and credentials together does not even read the
    kubeconfig. So beside a kubeconfig that was asked for nothing of ``K8S_AUTH_*`` counts, and beside one of the environment nothing
    that belongs to ``K8S_AUTH_HOST``.
    """
    kubeconfig, found = _find_kubeconfig(option, environ, home)
    unused = {name for name in environ if name.startswith("K8S_AUTH_") and not name.startswith(OF_THE_NETWORK)}
    if not option:
        unused = unused - {"K8S_AUTH_KUBECONFIG", "K8S_AUTH_CONTEXT"} if kubeconfig and environ.get("K8S_AUTH_HOST") else set()
    return Way(kubeconfig, found, context or (None if option else environ.get("K8S_AUTH_CONTEXT")) or None, frozenset(unused))


@contextlib.contextmanager
def environment_without(names):
    """Nothing of these variables while the client of kubernetes.core is made: empty ones would count as well."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _find_kubeconfig(option, environ, home):
    """``(kubeconfig or None, where it was found)``."""
    if option:
        if not _existing(option):
            raise MeshError("kubeconfig: %s does not exist on the controller; correct the path" % option)
        return option, "kubeconfig %s" % option
    if environ.get("K8S_AUTH_KUBECONFIG"):
        return environ["K8S_AUTH_KUBECONFIG"], "kubeconfig %s (K8S_AUTH_KUBECONFIG)" % environ["K8S_AUTH_KUBECONFIG"]
    if environ.get("K8S_AUTH_HOST"):
        return None, "API server %s (K8S_AUTH_HOST)" % environ["K8S_AUTH_HOST"]
    if environ.get("KUBECONFIG") and _existing(environ["KUBECONFIG"]):
        return environ["KUBECONFIG"], "kubeconfig %s (KUBECONFIG)" % environ["KUBECONFIG"]
    default = os.path.join(home, ".kube", "config")
    if os.path.exists(default):
        return default, "kubeconfig %s" % default
    return None, ""


def choose_source(args, environ, home, control_plane, inventory_has_nodes):
    """``(source, why)``: what ``source: auto`` means here; any other source is itself.

    ``args``: the action's; ``control_plane``: the host that kubectl would run on, or None; ``inventory_has_nodes``: whether hosts say
    themselves which CIDRs and addresses they have. Sources are ``nodes``, ``file``, ``kubernetes``, ``kubectl`` and ``inventory``.
    """
    if args["nodes"] is not None:
        return "nodes", "nodes were given"
    if args["source"] == "file" and not args["nodes_file"]:
        raise MeshError("source is file, but nodes_file is not given; save the output of kubectl get nodes -o json and name it there")
    if args["source"] != "auto":
        return args["source"], "asked for"
    if args["nodes_file"]:
        return "file", "nodes_file was given"
    dummy, found = _find_kubeconfig(args["kubeconfig"], environ, home)
    if found:
        return "kubernetes", "the controller has %s" % found
    if control_plane:
        return "kubectl", "the controller has no kubeconfig, and %s is a control plane host" % control_plane
    if inventory_has_nodes:
        return "inventory", "there is no kubeconfig and no control plane host, and hosts have mesh_pod_cidrs or mesh_node_addresses"
    raise MeshError("no source of the node list: the controller has no kubeconfig (KUBECONFIG, ~/.kube/config), there is no host in the"
                    " group kube_control_plane to run kubectl on, and no host has mesh_pod_cidrs or mesh_node_addresses; give one of them"
                    " or nodes_file")


def describe_kubeconfig(path, context):
    """``{"context", "user", "server"}`` of a kubeconfig for messages: names only, nothing secret; what cannot be found is ``unknown``."""
    result = {"context": context or "unknown", "user": "unknown", "server": "unknown"}
    merged = {"contexts": [], "clusters": []}
    current = context
    for part in _existing(path):
        try:
            with open(os.path.expanduser(part), encoding="utf-8") as handle:
                config = yaml.safe_load(handle)
        except (OSError, ValueError, yaml.YAMLError) as exc:
            raise MeshError("kubeconfig %s cannot be read: %s" % (part, " ".join(str(exc).split()))) from None
        if not isinstance(config, dict):
            raise MeshError("kubeconfig %s is not a kubeconfig: expected an object, got %s" % (part, type(config).__name__))
        current = current or config.get("current-context")
        for kind, entries in merged.items():
            entries.extend(entry for entry in config.get(kind) or [] if isinstance(entry, dict))
    names = sorted(str(entry.get("name")) for entry in merged["contexts"])
    if context and context not in names:
        raise MeshError("context %s is not in kubeconfig %s, which has: %s" % (shown(context), path, ", ".join(names) or "none"))
    for entry in merged["contexts"]:
        details = entry.get("context")
        if entry.get("name") == current and isinstance(details, dict):
            result.update(context=str(current), user=str(details.get("user")))
            for cluster in merged["clusters"]:
                if cluster.get("name") == details.get("cluster") and isinstance(cluster.get("cluster"), dict):
                    result["server"] = str(cluster["cluster"].get("server"))
    return result


def status_message(body):
    """The text of the API's own error; its HTTP headers and anything else stay out."""
    try:
        if isinstance(body, (bytes, bytearray)):
            body = body.decode("utf-8", "replace")
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return ""


def api_error(exc, found, details, request=LISTING):
    """`MeshError` for an exception of the Kubernetes client: what happened, with which kubeconfig, as whom, and what helps."""
    who = "%s%s" % (found or "in-cluster configuration", ", context %(context)s, user %(user)s" % details if details else "")
    server = details["server"] if details and details["server"] != "unknown" else "of the Kubernetes API"
    status, message = getattr(exc, "status", None), status_message(getattr(exc, "body", None))
    if status == 401:
        return MeshError("%s: the API server %s does not accept the credentials (401 %s) of %s; renew them: kubectl get nodes"
                         " with the same kubeconfig must work" % (request.doing, server, message or "Unauthorized", who))
    if status == 403:
        return MeshError("%s: the API server %s refuses it (403 %s) to %s; %s"
                         % (request.doing, server, message or "Forbidden", who, request.rights))
    if status == 404 and request.no_such:
        return MeshError("%s: the API server %s answers 404: %s" % (request.doing, server, request.no_such))
    if status is not None:
        return MeshError("%s: the API server %s answers %s %s to %s"
                         % (request.doing, server, status, message or getattr(exc, "reason", ""), who))
    text = " ".join(str(exc).split())
    if type(exc).__name__ in ("MaxRetryError", "ConnectTimeoutError", "NewConnectionError", "ProtocolError", "SSLError"):
        cause = getattr(exc, "reason", None)
        return MeshError("%s: the API server %s cannot be reached (%s) with %s; check the address in the kubeconfig, the network"
                         " and its certificate" % (request.doing, server, shown(" ".join(str(cause or text).split()), 300), who))
    return MeshError("%s with %s failed: %s" % (request.doing, who, shown(text, 500) if text else type(exc).__name__))


def details_of(way):
    """What `describe_kubeconfig` tells of a `Way`, or None where it has no kubeconfig."""
    return describe_kubeconfig(way.kubeconfig, way.context) if way.kubeconfig else None


def options_of(way):
    """The options of kubernetes.core for a `Way`."""
    # Without kubeconfig it prefers the service account of the pod that it runs in, and that is AWX's own cluster.
    return {name: value for name, value in (("kubeconfig", way.kubeconfig), ("context", way.context)) if value}


def list_nodes(lookup_loader, loader, templar, variables, way):
    """All Node objects from the API, through the lookup plugin of kubernetes.core. Raises `MeshError`."""
    details = details_of(way)
    try:
        plugin = lookup_loader.get(LOOKUP, loader=loader, templar=templar)
    except (AnsibleError, ImportError) as exc:
        plugin, reason = None, ": %s" % shown(" ".join(str(exc).split()), 300)
    else:
        reason = ""
    if plugin is None:
        raise MeshError("source kubernetes needs the collection kubernetes.core on the controller%s; install it (ansible-galaxy collection"
                        " install kubernetes.core) and the Python library kubernetes, or use another source" % reason)
    options = dict(options_of(way), api_version="v1", kind="Node")
    try:
        with environment_without(way.unused):
            return plugin.run([], variables=variables, **options) or []
    except Exception as exc:  # noqa: BLE001  the client raises its own, urllib3's, ssl's and plain Exception
        raise api_error(exc, way.found, details) from None


def api_client(way, details, **more):
    """The client of kubernetes.core: an object whose ``request`` asks the API. Raises `MeshError`.

    ``more``: further options of kubernetes.core, those that are not given left out.
    """
    try:
        # The collection and its library are there only where the API is asked.
        import kubernetes  # noqa: F401  kubernetes.core itself fails with a NameError where it is missing
        from ansible_collections.kubernetes.core.plugins.module_utils.k8s.client import get_api_client
    except ImportError as exc:
        raise MeshError("asking the Kubernetes API needs the collection kubernetes.core and, for %s, the Python library kubernetes (%s);"
                        " install them: ansible-galaxy collection install kubernetes.core; pip install kubernetes"
                        % (sys.executable, exc)) from None
    try:
        with environment_without(way.unused):
            return get_api_client(**options_of(way), **more).client
    except Exception as exc:  # noqa: BLE001  the client raises its own, urllib3's, ssl's and plain Exception
        raise api_error(exc, way.found, details) from None


def api_items(way, resources):
    """``{kind: [objects]}`` of several resources from the API. Raises `MeshError`."""
    details = details_of(way)
    client = api_client(way, details)
    return {resource.kind: list_pages(client, way.found, details, None, PAGE_SIZE, PAGE_TIMEOUT, resource) for resource in resources}


def list_items(listing, resource):
    """The objects of a parsed answer of the API, or of ``kubectl get``, for one page or all. Raises `MeshError` for anything else."""
    if resource == NODES:
        return node_items(listing)[0]
    kind = listing.get("kind") if isinstance(listing, dict) else None
    if kind not in (resource.kind + "List", "List") or not isinstance(listing.get("items"), list):
        raise MeshError("listing %s: the answer is of kind %s, expected %sList with items" % (resource.plural, shown(kind), resource.kind))
    return listing["items"]


def list_pages(client, found, details, label_selector, page_size, timeout, resource=NODES):
    """All objects of a resource from the API, ``page_size`` at a time. Raises `MeshError`.

    ``timeout``: seconds for each page. The pages are of one moment. Where their token expires between two of them, the list is asked for
    once more as a whole, as Kubernetes' own clients do.
    """
    items, token = [], None
    while True:
        try:
            response = client.request("get", resource.path, limit=page_size, _continue=token, label_selector=label_selector,
                                      field_selector=resource.selector or None, serialize=False, _request_timeout=timeout)
            listing = json.loads(response.data)
        except ValueError as exc:
            raise MeshError("listing %s: the answer of the API is no JSON (%s); is the server behind %s a Kubernetes API?"
                            % (resource.plural, exc, found or "the in-cluster configuration")) from None
        except Exception as exc:  # noqa: BLE001  see above
            if token and getattr(exc, "status", None) == 410:
                items, token, page_size = [], None, None
                continue
            raise api_error(exc, found, details, listing_of(resource)) from None
        items.extend(list_items(listing, resource))
        metadata = listing.get("metadata")
        token = metadata.get("continue") if isinstance(metadata, dict) else None
        if not token:
            return items


def kubectl_arguments(resource):
    """What kubectl is told to list a resource; it asks for pages by itself."""
    if resource == NODES:
        return ["get", "nodes", "-o", "json"]
    arguments = ["get", kubectl_name(resource), "--all-namespaces", "-o", "json"]
    return arguments + (["--field-selector", resource.selector] if resource.selector else [])


def kubectl_error(result, host, command, request=LISTING):
    """`MeshError` for a failed kubectl: ``result`` is that of the command module."""
    text = " ".join((str(result.get("stderr") or "") or str(result.get("msg") or "")).split())
    where = "%s with %s on host %s" % (request.doing, " ".join(command), host)
    lower = text.lower()
    if kubectl_missing(result):
        return MeshError("%s: there is no such command; give kubectl_command (k3s: [k3s, kubectl]), or another kubectl_host or source"
                         % where)
    if "forbidden" in lower:
        return MeshError("%s is refused: %s; %s" % (where, shown(text, 300), request.rights))
    if request.no_such and ("doesn't have a resource type" in lower or "could not find the requested resource" in lower):
        return MeshError("%s: %s" % (where, request.no_such))
    if "unauthorized" in lower or "must be logged in" in lower or "provide credentials" in lower:
        return MeshError("%s: the API server does not accept the credentials: %s; renew the kubeconfig of that host"
                         % (where, shown(text, 300)))
    if "permission denied" in lower:
        return MeshError("%s: %s; run the task with become" % (where, shown(text, 300)))
    if "localhost:8080" in lower:
        return MeshError("%s: it has no kubeconfig; give kubectl_command: [kubectl, --kubeconfig, /etc/kubernetes/admin.conf], and become"
                         % where)
    return MeshError("%s failed (rc %s): %s" % (where, result.get("rc"), shown(text, 300)))


def kubectl_missing(result):
    """Whether the command does not exist on the host. The command module has rc 2 (ENOENT) then, and says that it could not execute it,
    before ansible-core 2.19 with the exception's text; sudo and su have 127."""
    text = "%s %s" % (result.get("msg"), result.get("stderr"))
    return result.get("rc") == 127 or (
        result.get("rc") == 2 and any(words in text for words in ("No such file or directory", "Error executing command")))


def split_kinds(items, resources):
    """``(Node objects, {kind: objects})`` of one list that holds both; short descriptions of nodes count as Node objects.

    Raises `MeshError` where a list has no object of a resource: it was saved without them, and would read as "no pods".
    """
    kinds = {resource.kind: [] for resource in resources}
    nodes = []
    for item in items:
        kind = item.get("kind") if isinstance(item, dict) else None
        (kinds[kind] if isinstance(kind, str) and kind in kinds else nodes).append(item)
    missing = [resource for resource in resources if not kinds[resource.kind]]
    if missing:
        names = ",".join(["nodes"] + [kubectl_name(resource) for resource in resources])
        raise MeshError("the list of nodes that was given holds no %s objects, which pod_source (mesh_pod_source) needs; save the output"
                        " of: kubectl get %s --all-namespaces -o json" % (" and no ".join(resource.kind for resource in missing), names))
    return nodes, kinds


def parse_listing(text, where):
    """A parsed node list in JSON, or in YAML. Raises `MeshError` naming ``where``."""
    try:
        return json.loads(text)
    except ValueError as exc:
        json_error = exc
    try:
        # CSafeLoader where libyaml is there: ten times faster
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (ValueError, yaml.YAMLError):
        raise MeshError("%s is neither JSON (%s) nor YAML; save the output of: kubectl get nodes -o json" % (where, json_error)) from None
