# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""A client of the Kubernetes API for nodes: list, watch, patch, with nothing but the standard library. `_kube_watch` decides.

Objects are made small as they arrive (``reduce``) and never kept whole: a list is read page by page, a watch line by line.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import time
import urllib.parse

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kube_watch as decide
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kube_watch import ApiError, Gone
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown

# Seconds for a connection and for an answer to anything but a watch.
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
# Seconds without a byte after which a watch is begun again where it was. API servers send a bookmark about every minute.
SILENCE_SECONDS = 150.0
# Seconds that the server is asked to keep a watch open: as client-go, from 5 to 10 minutes, so that not all nodes come back at once.
WATCH_SECONDS = 300
# Seconds after which a watch that is open counts as a success.
SETTLED_SECONDS = 10.0
# A peer that is gone without a word is noticed after 10 s + 3 * 5 s.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
# Bytes of a token: JSON web tokens have one or two thousand.
TOKEN_MAX = 65536
USER_AGENT = "kubemesh-wireguard-agent"

LOST = (OSError, http.client.HTTPException)


def server_parts(server):
    """The parts of the address of an API server; `MeshError` for what is none."""
    try:
        parts = urllib.parse.urlsplit(server)
        # raises for a port that is none
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.path.strip("/") or parts.username or "?" in server or "#" in server:
        raise MeshError("server: %s is not the address of an API server such as https://192.0.2.1:6443" % shown(server))
    return parts


def token_fault(token):
    """What is wrong with a bearer token (RFC 6750, section 2.1: one word of a header), as a text that tells nothing of it.

    Empty for nothing, and for no token.
    """
    if not token:
        return ""
    if isinstance(token, str) and token.isascii() and token.isprintable() and " " not in token and len(token) <= TOKEN_MAX:
        return ""
    return ("token (mesh_agent_token): this is no bearer token, as it has blanks, line ends or other characters that none has; give the "
            "one of the ServiceAccount, in one line")


class KubeClient:
    """One API server. ``server``: its URL; ``ca_file``: path of the CA, None for the system's; ``token_file``: path of the bearer token.

    Token and CA are read again for each connection, because both are rotated. All methods raise `ApiError`.
    """

    def __init__(self, server, ca_file=None, token_file=None):
        parts = server_parts(server)
        if parts.scheme == "http" and token_file:
            raise MeshError("server: %s has no TLS, and a token is never sent in clear; use https" % shown(server))
        self.server, self.parts, self.ca_file, self.token_file = server, parts, ca_file, token_file

    def _where(self, what):
        return {"what": "%s, %s" % (self.server, what), "server": self.server, "token_file": self.token_file or "(none)"}

    def _headers(self):
        headers = {"Accept": "application/json", "User-Agent": USER_AGENT}
        if self.token_file:
            try:
                with open(self.token_file, encoding="ascii") as handle:
                    token = handle.read(TOKEN_MAX).strip()
            except (OSError, ValueError) as exc:
                raise ApiError("token_file: %s cannot be read: %s; write the ServiceAccount's token there" % (
                    self.token_file, getattr(exc, "strerror", None) or "it is no text")) from None
            if not token or not token.isprintable() or " " in token:
                raise ApiError("token_file: %s holds no token; write the ServiceAccount's token there" % self.token_file)
            headers["Authorization"] = "Bearer " + token
        return headers

    def _connect(self, timeout):
        host, port = self.parts.hostname, self.parts.port
        if self.parts.scheme == "http":
            return http.client.HTTPConnection(host, port or 80, timeout=timeout)
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise ApiError("ca_file: %s cannot be used: %s; it must hold the cluster's CA as PEM" % (self.ca_file, exc)) from None
        return http.client.HTTPSConnection(host, port or 443, timeout=timeout, context=context)

    def _ask(self, method, path, what, timeout, body=None, content=None):
        """``(connection, answer)`` of a request that was answered with 2xx; the caller closes the connection."""
        headers = self._headers()
        if content:
            headers["Content-Type"] = content
        connection = self._connect(CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE:
                connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
            connection.sock.settimeout(timeout)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            if not 200 <= answer.status < 300:
                raise decide.status_error(answer.status, answer.read(decide.EVENT_MAX), self._where(what),
                                          decide.parse_retry_after(answer.getheader("Retry-After")))
            return connection, answer
        except BaseException:
            connection.close()
            raise

    def _read(self, method, path, what, body=None, content=None):
        try:
            connection, answer = self._ask(method, path, what, ANSWER_SECONDS, body, content)
            try:
                data = answer.read(decide.PAGE_MAX)
                # a body that ends before its announced length is an error only when all of it was asked for
                if answer.length:
                    raise http.client.IncompleteRead(b"", answer.length)
                return data
            finally:
                connection.close()
        except LOST as exc:
            raise self._lost(exc, what) from None

    def _lost(self, exc, what):
        text = "%s is not reached (%s): %s" % (self.server, what, str(exc) or type(exc).__name__)
        if isinstance(exc, ssl.SSLError):
            text += "; does %s hold the CA of this API server, and does its certificate name this address?" % (self.ca_file or "the system")
        return ApiError(text)

    def list(self, path, kind, reduce, selector="", page_size=None, most=None):
        """``(results, resourceVersion)``: ``reduce(object)`` of every object of a list, page by page. ``kind``: such as ``NodeList``.

        ``selector``: a field selector; ``most``: number of objects from which on this is no list of a cluster.
        """
        what = "list of %s" % path.rpartition("/")[2]
        results, token = [], ""
        while True:
            query = {"limit": str(page_size or decide.PAGE_SIZE)}
            if selector:
                query["fieldSelector"] = selector
            if token:
                query["continue"] = token
            data = self._read("GET", "%s?%s" % (path, urllib.parse.urlencode(query)), what)
            items, version, token = decide.parse_page(data, kind, self._where(what)["what"])
            del data
            results.extend(reduce(item) for item in items)
            if len(results) > (most or decide.OBJECTS_MAX):
                raise ApiError("%s: more than %d objects" % (self._where(what)["what"], most or decide.OBJECTS_MAX))
            if not token:
                return results, version

    def watch(self, path, version, handle, opened=None, jitter=random.random, selector=""):  # noqa: S311
        """Call ``handle(type, object, resourceVersion)`` for each event after a version, until the server ends the watch.

        ``opened(socket)``: told which connection is used, so that another thread can cut it. Raises `Gone`, `ApiError`, and what the
        network raises (`LOST`).
        """
        what = "watch of %s" % path.rpartition("/")[2]
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true",
                 "timeoutSeconds": str(int(WATCH_SECONDS * (1.0 + jitter())))}
        if selector:
            query["fieldSelector"] = selector
        connection, answer = self._ask("GET", "%s?%s" % (path, urllib.parse.urlencode(query)), what, SILENCE_SECONDS)
        try:
            if opened is not None:
                opened(connection.sock)
            while True:
                line = answer.readline(decide.EVENT_MAX + 1)
                if not line:
                    return
                if len(line) > decide.EVENT_MAX:
                    raise ApiError("%s: an event of more than %d bytes" % (self._where(what)["what"], decide.EVENT_MAX))
                if not line.endswith(b"\n"):
                    raise http.client.IncompleteRead(b"")
                if line.strip():
                    handle(*decide.parse_event(line, self._where(what)["what"]))
        finally:
            connection.close()

    def patch(self, path, patch):
        """Merge-patch an object."""
        self._read("PATCH", path, "patch of %s" % path, json.dumps(patch).encode("ascii"), "application/merge-patch+json")


class Follower(threading.Thread):
    """Lists and watches for ever, and tells ``tell(what, value)``, from this thread:

    ``listed``: ``{name: reduced object}``, after each list; ``event``: ``(name, reduced object or None for one that is gone)``;
    ``away``: text, after each failure; ``back``: the watch is up again, and nothing is missing between what was told and what comes.
    ``reduce(object)`` is what is kept of an object; it must not raise. ``check(listing)`` says why a list is not to be believed, or
    nothing: it is told to nobody then, and asked for again. ``key_of(object)``: what it is called in what is told. ``how``: what else
    `KubeClient.list` takes.
    """

    def __init__(self, client, path, kind, reduce, tell, check=lambda listing: "", pause=time.sleep, jitter=random.random,  # noqa: S311
                 clock=time.monotonic, key_of=decide.name_of, **how):
        super().__init__(daemon=True, name="follower")
        self.key_of, self.how = key_of, how
        self.client, self.path, self.kind, self.reduce, self.tell, self.check = client, path, kind, reduce, tell, check
        self.pause, self.jitter, self.clock = pause, jitter, clock
        self.version = None
        self.failures = 0
        self.stopping = False
        self._list_again = False  # the present watch is cut for the sake of a new list
        self._silent = True
        self._socket = None

    def run(self):
        while not self.stopping:
            try:
                self.once()
            except (ApiError,) + LOST as exc:
                if not self.stopping and not self._list_again:
                    self._failed(exc)

    def once(self):
        """A list where one is needed, and one watch."""
        if self.version is None or self._list_again:
            self._list_again = False
            found, version = self.client.list(self.path, self.kind, lambda item: (self.key_of(item), self.reduce(item)), **self.how)
            listing = {name: reduced for name, reduced in found if name is not None}
            doubt = self.check(listing)
            if doubt:
                raise ApiError(doubt)
            self.version = version
            self.tell("listed", listing)
        self._silent, began = True, self.clock()
        try:
            self.client.watch(self.path, self.version, self._event, self._opened, self.jitter, self.how.get("selector", ""))
        finally:
            if self.clock() - began >= SETTLED_SECONDS:
                self._silent, self.failures = False, 0
        if self._silent and not self._list_again:
            # A server that ends watches at once, without a word, must not be asked in a loop.
            self.failures += 1
            self.pause(decide.backoff(self.failures, self.jitter()))

    def _opened(self, handle):
        self._socket = handle
        if self._list_again:
            self.cut()  # it was asked for while there was no watch to cut
            return
        self.tell("back", None)

    def _event(self, kind, obj, version):
        self._silent, self.failures = False, 0
        self.version = version
        name = self.key_of(obj)
        if kind != "BOOKMARK" and name is not None:
            self.tell("event", (name, None if kind == "DELETED" else self.reduce(obj)))

    def _failed(self, exc):
        self._socket = None
        self.failures += 1
        if decide.after_error(exc, self.version is not None) == "relist":
            self.version = None
        # the first list after a version that expired is not an outage
        if not isinstance(exc, Gone):
            self.tell("away", str(exc) if isinstance(exc, MeshError) else str(self.client._lost(exc, "watch")))
        if not isinstance(exc, Gone) or self.failures > 1:
            self.pause(max(decide.backoff(self.failures, self.jitter()), getattr(exc, "retry_after", 0.0)))

    def stop(self):
        """End; the thread may still sit in a pause or a connection that is being made."""
        self.stopping = True
        self.cut()

    def list_again(self):
        """Read the list once more, from another thread: what was told may be wrong. Nothing is told of the watch that ends for it."""
        self._list_again = True
        self.cut()

    def cut(self):
        """End the present watch from another thread."""
        handle = self._socket
        if handle is not None:
            try:
                handle.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended by itself
