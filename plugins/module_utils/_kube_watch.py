# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""List and watch of the Kubernetes API: what answers and events mean, and what to do next.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. The connection is `_kube_api`.

A watch goes on where it ended (``resourceVersion``), whether the server closed it, the network did or nothing came. Only where the server
has forgotten that version (410 Gone, as a status or as an ERROR event on HTTP 200), or said something that nobody understands, the list is
read again. What follows from a new list is the difference to what was known.
"""

from __future__ import annotations

import json

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown

# Seconds: the first pause after a failure, and the longest. A server that comes back after minutes must not meet all nodes at once.
BACKOFF_FIRST = 0.5
BACKOFF_LONGEST = 30.0

# Objects in one page of a list. A Node has 5 to 50 kB as JSON, so a page stays below a few MB of memory.
PAGE_SIZE = 50
# Bytes. etcd takes objects up to 1.5 MiB; JSON of one may be longer than what is stored.
EVENT_MAX = 4 * 1024 * 1024
PAGE_MAX = 64 * 1024 * 1024
# Kubernetes supports 5,000 nodes; pages without end come from something that is no API server.
OBJECTS_MAX = 50000

EVENT_TYPES = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK")

_REMEDIES = {
    401: "the token is not valid (any more): renew the one in %(token_file)s",
    403: "the token in %(token_file)s lacks a right: apply the role's RBAC manifest, and see that the token is that of its ServiceAccount",
    404: "is %(server)s the address of a Kubernetes API server, and does the cluster have such objects (mesh_pod_source)?",
}


class ApiError(MeshError):
    """The API answered something other than what was asked for, or nothing. ``code``: HTTP status, 0 where there was none.

    ``retry_after``: seconds that the server asks to wait, or 0.
    """

    def __init__(self, message, code=0, retry_after=0.0):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class Gone(ApiError):
    """The server does not know the version (or the page) any more: the list must be read again."""

    def __init__(self, message):
        super().__init__(message, 410)


def backoff(failures, jitter):
    """Seconds to wait after so many failures in a row (from 1). ``jitter``: a random number from 0 to 1; it spreads half of the time."""
    longest = min(BACKOFF_LONGEST, BACKOFF_FIRST * 2.0 ** min(max(failures, 1) - 1, 16))
    return longest * (0.5 + 0.5 * jitter)


def parse_retry_after(text):
    """Seconds of a ``Retry-After`` header, at most `BACKOFF_LONGEST`; 0 for none, or for one that is a date."""
    return min(float(text), BACKOFF_LONGEST) if text and text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def status_error(code, body, where, retry_after=0.0):
    """The `ApiError` of an answer. ``body``: bytes, perhaps a Status object; ``where``: {"what", "server", "token_file"} for messages."""
    try:
        status = json.loads(body)
        said = status.get("message") if isinstance(status, dict) else None
    except (ValueError, RecursionError):
        said = None
    text = "%s: HTTP %d%s" % (where["what"], code, ", %s" % shown(said, 300) if said else "")
    if code == 410:
        return Gone(text)
    if code in _REMEDIES:
        text += "; " + _REMEDIES[code] % where
    return ApiError(text, code, retry_after)


def _object(data, what):
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError("%s: the answer is not JSON; is there a proxy in between?" % what) from None
    if not isinstance(value, dict):
        raise ApiError("%s: the answer is not an object but %s" % (what, shown(value)))
    return value


def version_of(metadata, what):
    """``metadata.resourceVersion``, which is opaque text; `ApiError` where there is none."""
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    if not isinstance(version, str) or not 0 < len(version) <= 64 or not version.isascii() or not version.isalnum():
        raise ApiError("%s: there is no resourceVersion in the answer" % what)
    return version


def parse_page(data, kind, what):
    """``(items, resourceVersion, continue token or "")`` of one page of a list. ``kind``: such as ``NodeList``. Raises `ApiError`."""
    page = _object(data, what)
    if page.get("kind") != kind or not isinstance(page.get("items") or [], list):
        raise ApiError("%s: expected a %s, got kind %s" % (what, kind, shown(page.get("kind"))))
    metadata = page.get("metadata")
    version = version_of(metadata, what)
    token = metadata.get("continue") or ""
    if not isinstance(token, str) or len(token) > 4096:
        raise ApiError("%s: its continue token is none" % what)
    items = [item for item in page.get("items") or [] if isinstance(item, dict)]
    return items, version, token


def parse_event(line, what):
    """``(type, object, resourceVersion)`` of a line of a watch. Raises `Gone` for a 410 in the stream, `ApiError` for other errors."""
    event = _object(line, what)
    kind, found = event.get("type"), event.get("object")
    if not isinstance(found, dict):
        raise ApiError("%s: an event without object" % what)
    if kind == "ERROR":
        text = "%s: %s" % (what, shown(found.get("message"), 300))
        if found.get("code") == 410 or found.get("reason") in ("Expired", "Gone"):
            raise Gone(text)
        raise ApiError(text, found["code"] if isinstance(found.get("code"), int) else 0)
    if kind not in EVENT_TYPES:
        raise ApiError("%s: an event of unknown type %s" % (what, shown(kind)))
    return kind, found, version_of(found.get("metadata"), what)


def name_of(obj):
    """``metadata.name`` of an object, or None."""
    metadata = obj.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else None


def after_error(error, resuming):
    """What to do after an error: ``relist`` or ``resume``. ``resuming``: whether there is a version to resume from.

    What a server says about a version is final; what the network or an overloaded server does is not. Answers that make no sense
    (code 0 and not a lost connection) are raised as `ApiError` too: who cannot read the stream does not know what it missed.
    """
    final = isinstance(error, ApiError) and error.code not in (429, 500, 502, 503, 504)
    return "relist" if final or not resuming else "resume"
