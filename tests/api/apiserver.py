# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small Kubernetes API server for tests: list, watch, get, create, replace, patch, delete, and faults on demand. See README.md.

Standard library only (TLS needs the program ``openssl``). It keeps everything in memory and knows no schema: an object is what it was
given, plus ``uid``, ``creationTimestamp`` and ``resourceVersion``. Answers were modelled on those of a real server (1.36).
"""

from __future__ import annotations

import argparse
import base64
import collections
import copy
import ctypes
import datetime
import http.server
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
# Seconds. Kubernetes sends one about every minute; a test asks for one with `bookmark`.
BOOKMARK_INTERVAL = 60.0
# Seconds that a client may take for a TLS handshake or a request line before the connection is dropped
CLIENT_TIMEOUT = 30.0
# Seconds after which it is noticed at the latest that the client of a watch is gone
HANG_UP_INTERVAL = 0.5

Resource = collections.namedtuple("Resource", "prefix plural kind namespaced")

# Those that the collection reads; `add_resource` adds others.
RESOURCES = (
    Resource("api/v1", "nodes", "Node", False),
    Resource("api/v1", "pods", "Pod", True),
    Resource("api/v1", "namespaces", "Namespace", False),
    Resource("apis/cilium.io/v2", "ciliumnodes", "CiliumNode", False),
    Resource("apis/crd.projectcalico.org/v1", "blockaffinities", "BlockAffinity", False),
    Resource("apis/crd.projectcalico.org/v1", "ipamblocks", "IPAMBlock", False),
    Resource("apis/crd.projectcalico.org/v1", "felixconfigurations", "FelixConfiguration", False),
)

REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed", 409: "Conflict",
           410: "Expired", 415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError",
           503: "ServiceUnavailable", 504: "Timeout"}

FAULTS = ("status", "gone_in_stream", "empty", "partial", "garbage", "half", "slow", "hang", "reset")


class ApiError(Exception):
    """An answer other than 2xx. ``code``: HTTP status."""

    def __init__(self, code, message, **more):
        super().__init__(message)
        self.code = code
        self.more = more

    def body(self):
        return status_object(self.code, str(self), **self.more)


class Gone(ApiError):
    def __init__(self, message):
        super().__init__(410, message)


def status_object(code, message, **more):
    return dict({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
                 "reason": REASONS.get(code, "InternalError"), "code": code}, **more)


def merge_patch(target, patch):
    """JSON merge patch (RFC 7386), as a new value."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def node(name, pod_cidrs=(), addresses=(), annotations=None, labels=None, uid=None):
    """A Node object as a cluster has it; ``addresses``: InternalIPs, in the order of the node."""
    spec = {}
    if pod_cidrs:
        spec = {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs), "providerID": "test:///" + name}
    metadata = {"name": name, "labels": dict({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}, **(labels or {})),
                "annotations": dict({"node.alpha.kubernetes.io/ttl": "0"}, **(annotations or {}))}
    if uid:
        metadata["uid"] = uid
    return {
        "metadata": metadata,
        "spec": spec,
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in addresses] + [{"type": "Hostname", "address": name}],
            "capacity": {"cpu": "4", "memory": "16Gi", "pods": "110"},
            "conditions": [
                {"type": kind, "status": "True" if kind == "Ready" else "False", "lastHeartbeatTime": now(), "lastTransitionTime": now(),
                 "reason": "Kubelet" + kind, "message": "kubelet says " + kind}
                for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")],
            "nodeInfo": {"operatingSystem": "linux", "architecture": "amd64", "kernelVersion": "6.1.0", "kubeletVersion": "v1.36.0"},
        },
    }


def pod(name, node_name, addresses, namespace="default", host_network=False, phase="Running"):
    """A Pod object as the watchers of addresses see it."""
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"nodeName": node_name, "hostNetwork": host_network, "containers": [{"name": "main", "image": "test"}]},
        "status": {"phase": phase, "podIP": addresses[0] if addresses else "", "podIPs": [{"ip": address} for address in addresses]},
    }


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _selects(selector, value_of):
    """Whether an object fits a field or label selector: ``a=b,c!=d,e`` (a name alone: present)."""
    for term in filter(None, (selector or "").split(",")):
        if "!=" in term:
            name, wanted = term.split("!=", 1)
            if value_of(name) == wanted:
                return False
        elif "=" in term:
            name, wanted = term.replace("==", "=").split("=", 1)
            if value_of(name) != wanted:
                return False
        elif value_of(term) is None:
            return False
    return True


def _field(obj, path):
    for part in path.split("."):
        obj = obj.get(part) if isinstance(obj, dict) else None
    return None if obj is None else str(obj)


class Query:
    """What a list or watch asks for: namespace and selectors."""

    def __init__(self, namespace=None, fields=None, labels=None):
        self.namespace, self.fields, self.labels = namespace, fields, labels

    def fits(self, obj):
        metadata = obj["metadata"]
        return ((self.namespace is None or metadata.get("namespace") == self.namespace)
                and _selects(self.fields, lambda path: _field(obj, path))
                and _selects(self.labels, lambda name: metadata.get("labels", {}).get(name)))


class Store:
    """Objects and the history of their changes. Every change has a number of its own, for all resources together, as in etcd."""

    def __init__(self):
        self.changed = threading.Condition()
        self.version = 100
        self.compacted = 0
        self.objects = {}   # resource -> {(namespace, name): object}
        self.history = {}   # resource -> deque of (version, type, object, bytes of the event)
        self.tokens = {}    # continue token -> (version, objects that are left)

    def of(self, resource):
        return self.objects.setdefault(resource, {})

    def _record(self, resource, kind, obj, before=None):
        self.history.setdefault(resource, collections.deque(maxlen=100000)).append(
            (self.version, kind, obj, event_line(resource, kind, obj), before))
        self.changed.notify_all()

    def put(self, resource, obj, *, create=None, dry_run=False):
        """Create or replace; -> the stored object. ``create``: True must not exist, False must exist, None either."""
        obj = copy.deepcopy(obj)
        for field in ("kind", "apiVersion"):
            obj.pop(field, None)
        metadata = obj.setdefault("metadata", {})
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        name = (metadata.get("namespace"), metadata["name"])
        with self.changed:
            existing = self.of(resource).get(name)
            if create is True and existing is not None:
                raise ApiError(409, '%s "%s" already exists' % (resource.plural, name[1]), reason="AlreadyExists")
            if create is False and existing is None:
                raise not_found(resource, name[1])
            expected = metadata.get("resourceVersion")
            if existing is not None and create is False and expected and expected != existing["metadata"]["resourceVersion"]:
                raise ApiError(409, 'Operation cannot be fulfilled on %s "%s": the object has been modified; please apply your changes to'
                               " the latest version and try again" % (resource.plural, name[1]))
            if not dry_run:
                self.version += 1
            if existing is not None:
                for field in ("uid", "creationTimestamp"):
                    metadata[field] = existing["metadata"][field]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            metadata["resourceVersion"] = str(self.version)
            if dry_run:
                return obj
            self.of(resource)[name] = obj
            self._record(resource, "ADDED" if existing is None else "MODIFIED", obj, existing)
            return obj

    def get(self, resource, name, namespace=None):
        with self.changed:
            obj = self.of(resource).get((namespace, name))
        if obj is None:
            raise not_found(resource, name)
        return obj

    def delete(self, resource, name, namespace=None):
        with self.changed:
            obj = self.of(resource).pop((namespace, name), None)
            if obj is None:
                raise not_found(resource, name)
            self.version += 1
            obj = copy.deepcopy(obj)
            obj["metadata"]["resourceVersion"] = str(self.version)
            self._record(resource, "DELETED", obj)
            return obj

    def page(self, resource, query, limit, token):
        """``(objects, version, continue token or None, how many are left)``: pages of one list are of one moment."""
        with self.changed:
            if token:
                try:
                    number = json.loads(base64.urlsafe_b64decode(token.encode() + b"==="))["n"]
                except ValueError:
                    raise ApiError(400, "continue key is not valid") from None
                if number not in self.tokens:
                    raise Gone("The provided continue parameter is too old to display a consistent list result. You can start a new list"
                               " without the continue parameter")
                version, rest = self.tokens[number]
            else:
                version = self.version
                rest = [obj for dummy, obj in sorted(self.of(resource).items(), key=lambda item: (item[0][0] or "", item[0][1]))
                        if query.fits(obj)]
            if not limit or len(rest) <= limit:
                return rest, version, None, 0
            number = str(uuid.uuid4())
            self.tokens[number] = (version, rest[limit:])
        token = base64.urlsafe_b64encode(json.dumps({"v": "meta.k8s.io/v1", "rv": version, "n": number}).encode()).decode().rstrip("=")
        return rest[:limit], version, token, len(rest) - limit

    def since(self, resource, version, query):
        """Lines of the events after ``version`` and the version they lead to; call it with ``changed`` held."""
        lines = []
        for number, kind, obj, line, before in reversed(self.history.get(resource, ())):
            if number <= version:
                break
            fits, fitted = query.fits(obj), before is not None and query.fits(before)
            # Who selects is told that an object is gone when it fits no more, and that it is new when it begins to fit.
            seen = "DELETED" if fitted and not fits else "ADDED" if kind == "MODIFIED" and fits and not fitted else kind
            if fits or fitted:
                lines.append((seen, line if seen == kind else event_line(resource, seen, obj)))
        return [line for dummy, line in reversed(lines)], self.version


def typed(resource, obj):
    prefix = resource.prefix.split("/", 1)[1]
    return dict({"kind": resource.kind, "apiVersion": prefix}, **obj)


def event_line(resource, kind, obj):
    return json.dumps({"type": kind, "object": typed(resource, obj)}, separators=(",", ":")).encode() + b"\n"


def not_found(resource, name):
    return ApiError(404, '%s "%s" not found' % (resource.plural, name), details={"name": name, "kind": resource.plural})


class Fault:
    """Something that goes wrong for requests that fit, ``times`` times (None: until cleared)."""

    def __init__(self, fault, verb=None, resource=None, token=None, times=1, **more):
        if fault not in FAULTS:
            raise ValueError("fault %r: expected one of %s" % (fault, ", ".join(FAULTS)))
        self.fault, self.verb, self.resource, self.token, self.times, self.more = fault, verb, resource, token, times, more

    def fits(self, request):
        return (self.times is None or self.times > 0) and all(
            wanted in (None, request[field]) for field, wanted in
            (("verb", self.verb), ("resource", self.resource), ("token", self.token)))


class ApiServer:
    """The server. ``namespace``: name of the network namespace that it listens in. A context manager; methods may be called any time.

    ``tls_dir``: directory for a CA and certificate of its own (made when missing; needs ``openssl``); None: plain HTTP.
    ``tokens``: bearer tokens by user name; none: no authentication.
    """

    def __init__(self, address="127.0.0.1", port=0, tls_dir=None, tokens=None, namespace=None, resources=RESOURCES):
        self.address, self.port, self.namespace = address, port, namespace
        self.tls_dir = Path(tls_dir) if tls_dir else None
        self.users = {token: user for user, token in (tokens or {}).items()}
        self.resources = list(resources)
        self.store = Store()
        self.requests = []           # what was asked, oldest first; see README.md
        self.seen = threading.Condition()
        self.refusals = []           # (verb, resource, token); None fits any
        self.faults = []
        self.bookmark_interval = BOOKMARK_INTERVAL
        self._watchers = {}          # connection handler -> resource
        self._connections = set()
        self._released = threading.Event()
        self._epoch = 0              # grows when watches are to be closed
        self._bookmark_epoch = 0
        self._listener = None
        self._tls = None

    # --- life

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()

    def start(self):
        if self.tls_dir is not None and self._tls is None:
            make_certificates(self.tls_dir, self.address)
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(str(self.tls_dir / "server.crt"), str(self.tls_dir / "server.key"))
        self.up()
        return self

    def stop(self):
        self.down()

    @property
    def url(self):
        host = "[%s]" % self.address if ":" in self.address else self.address
        return "%s://%s:%d" % ("https" if self.tls_dir else "http", host, self.port)

    @property
    def ca_file(self):
        return str(self.tls_dir / "ca.crt") if self.tls_dir else None

    def write_kubeconfig(self, path, token=None):
        """A kubeconfig (JSON is YAML) for this server."""
        cluster = {"server": self.url}
        if self.tls_dir:
            cluster["certificate-authority"] = self.ca_file
        Path(path).write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token} if token else {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}), encoding="utf-8")

    def up(self):
        """Listen (again, on the same port)."""
        if self._listener is not None:
            return
        self._released = threading.Event()
        self._listener = _listening_socket(self.address, self.port, self.namespace)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self):
        """Connections are refused, open ones are cut."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self._released.set()
        self.close_watches()
        for connection in list(self._connections):
            _cut(connection)

    def _accept(self, listener):
        while True:
            try:
                connection, client = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, client), daemon=True).start()

    def _serve(self, connection, client):
        self._connections.add(connection)
        try:
            connection.settimeout(CLIENT_TIMEOUT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                raw = connection
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._connections.discard(raw)
                self._connections.add(connection)
            Handler(connection, client, self)
        except (OSError, ValueError):
            pass  # the client went, or was cut off
        finally:
            self._connections.discard(connection)
            connection.close()

    # --- objects

    def add_resource(self, prefix, plural, kind, namespaced=False):
        """Another kind: ``add_resource("apis/example.org/v1", "things", "Thing")``."""
        # before `namespaces`, or an object in a namespace would look like something of the namespace
        self.resources.insert(0, Resource(prefix, plural, kind, namespaced))

    def resource(self, plural):
        for resource in self.resources:
            if resource.plural == plural:
                return resource
        raise ValueError("no resource %r; add_resource adds one" % plural)

    def apply(self, plural, obj):
        """Create or replace an object whatever its resourceVersion; -> it."""
        obj = copy.deepcopy(obj)
        obj.setdefault("metadata", {}).pop("resourceVersion", None)
        return copy.deepcopy(self.store.put(self.resource(plural), obj))

    def patch(self, plural, name, patch, namespace=None):
        """Merge-patch an object; -> it."""
        resource = self.resource(plural)
        with self.store.changed:
            existing = self.store.get(resource, name, self._ns(resource, namespace))
            return copy.deepcopy(self.store.put(resource, merge_patch(existing, patch)))

    def delete(self, plural, name, namespace=None):
        resource = self.resource(plural)
        self.store.delete(resource, name, self._ns(resource, namespace))

    def get(self, plural, name, namespace=None):
        resource = self.resource(plural)
        return copy.deepcopy(self.store.get(resource, name, self._ns(resource, namespace)))

    def names(self, plural):
        with self.store.changed:
            return sorted(name for dummy, name in self.store.of(self.resource(plural)))

    def load(self, plural, listing):
        """Apply all items of a list as ``kubectl get -o json`` prints it."""
        for item in listing["items"]:
            self.apply(plural, item)

    def recreate(self, plural, name, namespace=None, obj=None):
        """Delete an object and create one under the same name, with a new uid; -> it."""
        before = self.get(plural, name, namespace)
        self.delete(plural, name, namespace)
        obj = copy.deepcopy(obj or before)
        if obj["metadata"].get("uid") == before["metadata"]["uid"]:
            del obj["metadata"]["uid"]
        return self.apply(plural, obj)

    def heartbeat(self, plural="nodes", name=None):
        """One status-only update of each object (or of one), as kubelets send them."""
        for each in [name] if name else self.names(plural):
            obj = self.get(plural, each)
            for condition in obj.get("status", {}).get("conditions", []):
                condition["lastHeartbeatTime"] = now()
            self.apply(plural, obj)

    @staticmethod
    def _ns(resource, namespace):
        return (namespace or "default") if resource.namespaced else None

    # --- faults

    def refuse(self, verb=None, resource=None, token=None):
        """RBAC says no: 403 for a verb (get, list, watch, create, update, patch, delete), resource and token; None fits any."""
        self.refusals.append((verb, resource, token))

    def permit(self):
        """Take all refusals back."""
        self.refusals.clear()

    def set_tokens(self, tokens):
        """Bearer tokens by user name from now on: others, those of before included, get 401. Open watches stay open."""
        self.users = {token: user for user, token in tokens.items()}

    def fault(self, fault, verb=None, resource=None, token=None, times=1, **more):
        """The next ``times`` requests that fit go wrong; README.md has the list of faults."""
        self.faults.append(Fault(fault, verb, resource, token, times, **more))

    def clear_faults(self):
        """No more faults; what hangs is let go."""
        self.faults.clear()
        self._released.set()
        self._released = threading.Event()

    def close_watches(self):
        """End all open watches as a server does that is restarted: the stream ends in good order."""
        with self.store.changed:
            self._epoch += 1
            self.store.changed.notify_all()

    def bookmark(self):
        """Send a bookmark to all watches that asked for them."""
        with self.store.changed:
            self._bookmark_epoch += 1
            self.store.changed.notify_all()

    def compact(self):
        """Forget the history: watches from before now get 410 (in the stream, on HTTP 200), continue tokens expire."""
        with self.store.changed:
            self.store.version += 1
            self.store.compacted = self.store.version
            for events in self.store.history.values():
                events.clear()
            self.store.tokens.clear()

    def expire_continues(self):
        """Continue tokens given out so far are too old: 410."""
        with self.store.changed:
            self.store.tokens.clear()

    # --- what was asked

    def note(self, request):
        """Once for each request: watches and what hangs when they begin, all others when they were answered."""
        with self.seen:
            if not any(request is each for each in self.requests[-100:]):
                self.requests.append(request)
            self.seen.notify_all()

    def watching(self, plural="nodes"):
        """How many watches of a resource are open."""
        with self.seen:
            return sum(1 for resource in self._watchers.values() if resource == plural)

    def asked(self, **fields):
        """How many requests were made that have these fields."""
        with self.seen:
            return sum(1 for request in self.requests if all(request.get(field) == value for field, value in fields.items()))

    def wait_watching(self, plural="nodes", count=1, seconds=20.0):
        """Return when at least ``count`` watches of a resource are open; `TimeoutError`."""
        self._wait(lambda: self.watching(plural) >= count, "%d watches of %s" % (count, plural), seconds)

    def wait_asked(self, count=1, seconds=20.0, **fields):
        """Return when at least ``count`` requests with these fields were made (and answered, but for watches); `TimeoutError`."""
        self._wait(lambda: self.asked(**fields) >= count, "%d requests with %s" % (count, fields), seconds)

    def _wait(self, ready, what, seconds):
        with self.seen:
            if not self.seen.wait_for(ready, seconds):
                raise TimeoutError("there were not %s within %d s; asked was: %s" % (what, seconds, self.requests[-5:]))

    def _watch_began(self, handler, plural):
        with self.seen:
            self._watchers[handler] = plural
            self.seen.notify_all()

    def _watch_ended(self, handler):
        with self.seen:
            self._watchers.pop(handler, None)
            self.seen.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "kubemesh-test-api"

    def __init__(self, connection, client, api):
        self.api = api
        self.slow = None  # (bytes, seconds): that many bytes at a time, that many seconds apart
        self.half = None  # bytes of the body after which the connection is cut
        super().__init__(connection, client, None)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def do_PATCH(self):
        self._answer("PATCH")

    def do_DELETE(self):
        self._answer("DELETE")

    # --- what is asked

    def _parse(self, method):
        parts = urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(parts.query, keep_blank_values=True).items()}
        words = [urllib.parse.unquote(word) for word in parts.path.strip("/").split("/") if word]
        authorization = self.headers.get("Authorization") or ""
        request = {"method": method, "path": parts.path, "query": query, "verb": method.lower(), "resource": None, "name": None,
                   "namespace": None, "subresource": None, "token": authorization[7:] if authorization.startswith("Bearer ") else None,
                   "agent": self.headers.get("User-Agent"), "code": None}
        for resource in self.api.resources:
            prefix = resource.prefix.split("/")
            rest = words[len(prefix):]
            if words[:len(prefix)] != prefix or not rest:
                continue
            namespace = None
            if rest[0] == "namespaces" and resource.namespaced and len(rest) >= 3:
                namespace, rest = rest[1], rest[2:]
            if rest[0] != resource.plural or len(rest) > 3:
                continue
            request.update(resource=resource.plural, namespace=namespace, name=rest[1] if len(rest) > 1 else None,
                           subresource=rest[2] if len(rest) > 2 else None)
            watch = query.get("watch") in ("1", "true", "")
            request["verb"] = {"GET": "get" if request["name"] else ("watch" if watch else "list"), "POST": "create", "PUT": "update",
                               "PATCH": "patch", "DELETE": "delete"}[method]
            return request, resource
        return request, None

    def _answer(self, method):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        request, resource = self._parse(method)
        self.slow = self.half = None
        try:
            if not self._fault(request):
                self._dispatch(request, resource, body)
        except ApiError as exc:
            self._json(exc.code, exc.body(), request)
        except OSError:
            self.close_connection = True
        self.api.note(request)

    def _user(self, request):
        if not self.api.users:
            return "anonymous"
        user = self.api.users.get(request["token"])
        if user is None:
            raise ApiError(401, "Unauthorized")
        return user

    def _dispatch(self, request, resource, body):
        user = self._user(request)
        if resource is None:
            self._json(200, self._discovery(request), request)
            return
        for verb, plural, token in self.api.refusals:
            if verb in (None, request["verb"]) and plural in (None, request["resource"]) and token in (None, request["token"]):
                group = resource.prefix.split("/")[1] if resource.prefix.startswith("apis/") else ""
                raise ApiError(403, '%s is forbidden: User "%s" cannot %s resource "%s" in API group "%s" at the cluster scope'
                               % (resource.plural, user, request["verb"], resource.plural, group), details={"kind": resource.plural})
        if request["verb"] == "watch":
            self._watch(request, resource)
        elif request["verb"] == "list":
            self._list(request, resource)
        else:
            self._one(request, resource, body)

    def _discovery(self, request):
        words = request["path"].strip("/").split("/")
        groups = sorted({resource.prefix for resource in self.api.resources if resource.prefix.startswith("apis/")})
        if words == ["version"]:
            return {"major": "1", "minor": "36", "gitVersion": "v1.36.0", "platform": "linux/amd64"}
        if words == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        if words == ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": name, "versions": [version], "preferredVersion": version} for name, version in (
                    (prefix.split("/")[1], {"groupVersion": prefix[5:], "version": prefix.split("/")[2]}) for prefix in groups)]}
        found = [resource for resource in self.api.resources if resource.prefix.split("/") == words]
        if not found:
            raise ApiError(404, "the server could not find the requested resource")
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": found[0].prefix.split("/", 1)[1], "resources": [
            {"name": resource.plural, "singularName": resource.kind.lower(), "namespaced": resource.namespaced, "kind": resource.kind,
             "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]} for resource in found]}

    # --- faults

    def _fault(self, request):
        """Do what a fault says; -> whether that was the whole answer."""
        fault = next((fault for fault in self.api.faults if fault.fits(request)), None)
        if fault is None:
            return False
        if fault.times is not None:
            fault.times -= 1
        request["fault"] = fault.fault
        more = fault.more
        if fault.fault == "status":
            code = more.get("code", 500)
            headers = {"Retry-After": str(more["retry_after"])} if "retry_after" in more else {}
            self._json(code, status_object(code, more.get("message", "fault on demand")), request, headers)
        elif fault.fault == "gone_in_stream":
            request["code"] = 200
            self.api.note(request)
            self._begin_stream()
            self._chunk(json.dumps({"type": "ERROR", "object": status_object(410, "too old resource version: 5 (299)")}).encode() + b"\n")
            self._end_stream()
        elif fault.fault == "empty":
            resource = self.api.resource(request["resource"])
            self._json(200, {"kind": resource.kind + "List", "apiVersion": resource.prefix.split("/", 1)[1],
                             "metadata": {"resourceVersion": str(self.api.store.version)}, "items": []}, request)
        elif fault.fault == "partial":
            # a whole list by all it says, without some
            request["lacks"] = tuple(more["names"])
            return False
        elif fault.fault == "garbage":
            self._raw(200, more.get("body", "<html>a proxy says hello</html>").encode(), request)
        elif fault.fault == "hang":
            released = self.api._released
            request["code"] = 0
            self.api.note(request)
            released.wait()
            self.close_connection = True
        elif fault.fault == "reset":
            self.close_connection = True
            _cut(self.connection)
        elif fault.fault == "half":
            self.half = more.get("bytes", 200)
            return False
        elif fault.fault == "slow":
            self.slow = (more.get("bytes", 64), more.get("seconds", 0.05))
            return False
        return True

    # --- answers

    def _send(self, data):
        """Bytes of a body, as slow or as far as a fault says."""
        if self.half is not None:
            data, cut = data[:self.half], len(data) >= self.half
            self.half -= len(data)
            self.wfile.write(data)
            if cut:
                self.close_connection = True
                _cut(self.connection)
                raise OSError("cut on demand")
            return
        if self.slow is None:
            self.wfile.write(data)
            return
        size, seconds = self.slow
        for start in range(0, len(data), size):
            self.wfile.write(data[start:start + size])
            self.wfile.flush()
            if self.api._released.wait(seconds):
                self.slow = None
                self.wfile.write(data[start + size:])
                return

    def _raw(self, code, data, request, headers=None, content="application/json"):
        request["code"] = code
        self.send_response(code)
        self.send_header("Content-Type", content)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self._send(data)

    def _json(self, code, body, request, headers=None):
        self._raw(code, json.dumps(body).encode() + b"\n", request, headers)

    def _begin_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data):
        self._send(b"%x\r\n%s\r\n" % (len(data), data))

    def _end_stream(self):
        self.wfile.write(b"0\r\n\r\n")

    # --- verbs

    def _query(self, request):
        return Query(request["namespace"], request["query"].get("fieldSelector"), request["query"].get("labelSelector"))

    def _list(self, request, resource):
        asked = request["query"]
        limit = int(asked.get("limit") or 0)
        objects, version, token, left = self.api.store.page(resource, self._query(request), limit, asked.get("continue"))
        objects = [obj for obj in objects if obj["metadata"]["name"] not in request.get("lacks", ())]
        metadata = {"resourceVersion": str(version)}
        if token:
            metadata.update({"continue": token, "remainingItemCount": left})
        self._json(200, {"kind": resource.kind + "List", "apiVersion": resource.prefix.split("/", 1)[1], "metadata": metadata,
                         "items": objects}, request)

    def _watch(self, request, resource):
        asked = request["query"]
        query = self._query(request)
        store = self.api.store
        limit = float(asked.get("timeoutSeconds") or 0)
        deadline = time.monotonic() + limit if limit else None
        bookmarks = asked.get("allowWatchBookmarks") in ("1", "true")
        try:
            version = int(asked.get("resourceVersion") or 0)
        except ValueError:
            raise ApiError(400, "invalid resource version") from None
        request["code"] = 200
        with store.changed:
            epoch, bookmark_epoch = self.api._epoch, self.api._bookmark_epoch
            first = []
            gone = 0 < version < store.compacted
            if not version:
                # no version: everything there is comes as ADDED first
                version = store.version
                first = [json.dumps({"type": "ADDED", "object": typed(resource, obj)}).encode() + b"\n"
                         for obj in store.of(resource).values() if query.fits(obj)]
        self.api.note(request)
        self._begin_stream()
        if gone:
            self._chunk(json.dumps({"type": "ERROR", "object": status_object(
                410, "too old resource version: %d (%d)" % (version, store.compacted))}).encode() + b"\n")
            self._end_stream()
            return
        self.api._watch_began(self, resource.plural)
        try:
            if first:
                self._chunk(b"".join(first))
            self._follow(resource, query, version, deadline, bookmarks, epoch, bookmark_epoch)
            self._end_stream()
        finally:
            self.api._watch_ended(self)

    def _follow(self, resource, query, version, deadline, bookmarks, epoch, bookmark_epoch):
        store = self.api.store
        next_bookmark = time.monotonic() + self.api.bookmark_interval
        while True:
            lines = []
            with store.changed:
                while self.api._epoch == epoch:
                    lines, reached = store.since(resource, version, query)
                    due = time.monotonic()
                    marked = bookmarks and (self.api._bookmark_epoch != bookmark_epoch or due >= next_bookmark)
                    if marked:
                        bookmark_epoch, next_bookmark = self.api._bookmark_epoch, due + self.api.bookmark_interval
                        lines.append(json.dumps({"type": "BOOKMARK", "object": {
                            "kind": resource.kind, "apiVersion": resource.prefix.split("/", 1)[1], "metadata": {
                                "resourceVersion": str(reached), "creationTimestamp": None}}}).encode() + b"\n")
                    version = max(version, reached)
                    if lines or (deadline is not None and due >= deadline):
                        break
                    ends = [moment for moment in (deadline, next_bookmark) if moment is not None]
                    store.changed.wait(min([ends_at - due for ends_at in ends] + [HANG_UP_INTERVAL]))
                    # a client says nothing more during a watch: what can be read is its end
                    if select.select([self.connection], [], [], 0)[0]:
                        raise OSError("the client hung up")
                ended = self.api._epoch != epoch
            if lines and not ended:
                self._chunk(b"".join(lines))
            if ended or (deadline is not None and time.monotonic() >= deadline):
                return

    def _one(self, request, resource, body):
        api, store = self.api, self.api.store
        name, verb = request["name"], request["verb"]
        namespace = api._ns(resource, request["namespace"])
        dry_run = request["query"].get("dryRun") == "All"
        if verb == "get":
            self._json(200, typed(resource, store.get(resource, name, namespace)), request)
        elif verb == "delete":
            gone = (store.get if dry_run else store.delete)(resource, name, namespace)
            self._json(200, typed(resource, gone), request)
        elif verb == "create":
            obj = _object(body)
            if resource.namespaced:
                obj.setdefault("metadata", {})["namespace"] = namespace
            self._json(201, typed(resource, store.put(resource, obj, create=True, dry_run=dry_run)), request)
        elif verb == "update":
            obj = _object(body)
            if obj.get("metadata", {}).get("name") != name:
                raise ApiError(400, "the name of the object does not match the name on the URL")
            self._json(200, typed(resource, store.put(resource, obj, create=False, dry_run=dry_run)), request)
        else:
            kind = (self.headers.get("Content-Type") or "").split(";")[0]
            # strategic: the same as far as maps go
            if kind not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
                raise ApiError(415, "the body of the request was in an unknown format: %s" % kind)
            patch = _object(body)
            request["patch"] = patch
            with store.changed:
                existing = store.get(resource, name, namespace)
                uid = _object_metadata(patch).get("uid")
                if uid is not None and uid != existing["metadata"]["uid"]:
                    raise ApiError(422, '%s "%s" is invalid: metadata.uid: Invalid value: "%s": field is immutable' % (
                        resource.kind, name, uid), details={"name": name, "kind": resource.kind, "causes": [
                            {"reason": "FieldValueInvalid", "message": 'Invalid value: "%s": field is immutable' % uid,
                             "field": "metadata.uid"}]})
                patched = store.put(resource, merge_patch(existing, patch), create=False, dry_run=dry_run)
            self._json(200, typed(resource, patched), request)


def _object(body):
    try:
        value = json.loads(body)
    except ValueError:
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not an object")
    return value


def _object_metadata(obj):
    metadata = obj.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _cut(connection):
    """Close at once, so that the other side reads an error or an end in the middle."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _listening_socket(address, port, namespace=None):
    """A TCP socket that listens, made in a network namespace: a socket stays in the one where it was made."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    result = []

    def make():
        try:
            if namespace is not None:
                with open("/run/netns/" + namespace, "rb") as handle:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns %s" % namespace)
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(128)
            result.append(listener)
        except OSError as exc:
            result.append(exc)

    # a thread of its own: the namespace belongs to the thread
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def make_certificates(folder, address):
    """A CA (``ca.crt``) and a server certificate of it for an address, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "server.crt").exists():
        return

    def openssl(*words):
        subprocess.run(("openssl",) + words, cwd=str(folder), check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test CA",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=test API server")
    (folder / "server.ext").write_text("subjectAltName=IP:%s,DNS:localhost,DNS:kubernetes\nextendedKeyUsage=serverAuth\n"
                                       "authorityKeyIdentifier=keyid\n" % address)
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "server.ext", "-out", "server.crt")


# --- as a program -------------------------------------------------------------------------------------------------------------------

# What a control connection may call; each is a method of ApiServer of that name.
CONTROLS = ("add_resource", "apply", "asked", "bookmark", "clear_faults", "close_watches", "compact", "delete", "down", "expire_continues",
            "fault", "get", "heartbeat", "load", "names", "patch", "permit", "recreate", "refuse", "set_tokens", "up", "wait_asked",
            "wait_watching", "watching", "write_kubeconfig")


def serve_control(api, path):
    """A Unix socket for tests in other processes: a line of JSON ``{"call": name, ...arguments}``, answered by one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.path.exists(path):
        os.unlink(path)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(16)

    def talk(connection):
        with connection, connection.makefile("rwb") as stream:
            for line in stream:
                try:
                    arguments = json.loads(line)
                    call = arguments.pop("call")
                    if call == "requests":
                        answer = list(api.requests)
                    elif call == "url":
                        answer = api.url
                    elif call in CONTROLS:
                        answer = getattr(api, call)(**arguments)
                    else:
                        raise ValueError("no control %r; there are: %s" % (call, ", ".join(CONTROLS + ("requests", "url"))))
                    answer = {"result": answer}
                except Exception as exc:
                    answer = {"error": "%s: %s" % (type(exc).__name__, exc)}
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()

    def accept():
        while True:
            connection = listener.accept()[0]
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


class Control:
    """The methods of an `ApiServer` that runs as a program: ``Control(path).apply(plural="nodes", obj=...)``. Keyword arguments only."""

    def __init__(self, path):
        self.path = path

    def __getattr__(self, call):
        if call.startswith("_"):
            raise AttributeError(call)

        def remote(**arguments):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(self.path)
                with connection.makefile("rwb") as stream:
                    stream.write(json.dumps(dict(arguments, call=call)).encode() + b"\n")
                    stream.flush()
                    answer = json.loads(stream.readline())
            if "error" in answer:
                raise RuntimeError("API server: " + answer["error"])
            return answer["result"]

        return remote


def main(argv=None):
    parser = argparse.ArgumentParser(description="A Kubernetes API server for tests.")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6443)
    parser.add_argument("--namespace", help="network namespace to listen in")
    parser.add_argument("--tls-dir", help="directory of CA and certificate; without it: plain HTTP")
    parser.add_argument("--token", action="append", default=[], metavar="USER=TOKEN", help="only for tests: tokens are seen in the list"
                        " of processes")
    parser.add_argument("--control", help="path of the control socket")
    parser.add_argument("--nodes", help="NodeList to begin with")
    parser.add_argument("--kubeconfig", help="write a kubeconfig here; with the first token")
    arguments = parser.parse_args(argv)
    tokens = dict(pair.split("=", 1) for pair in arguments.token)
    api = ApiServer(arguments.address, arguments.port, arguments.tls_dir, tokens, arguments.namespace)
    if arguments.nodes:
        api.load("nodes", json.loads(Path(arguments.nodes).read_text(encoding="utf-8")))
    with api:
        if arguments.kubeconfig:
            api.write_kubeconfig(arguments.kubeconfig, next(iter(tokens.values()), None))
        if arguments.control:
            serve_control(api, arguments.control)
        print(api.url, flush=True)
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *dummy: ended.set())
        ended.wait()


if __name__ == "__main__":
    sys.exit(main())
