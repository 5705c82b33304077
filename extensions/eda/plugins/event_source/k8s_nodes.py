# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An event whenever the nodes of a Kubernetes cluster change in what the mesh is made of.

ansible-rulebook loads this file by its path: it has no siblings to import from. The first half is pure (what is compared, when something
is reported, what a kubeconfig says), the second half talks to the API.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: k8s_nodes
short_description: Nodes of a Kubernetes cluster that join, leave or change
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Watches the Node objects of a cluster and reports changes of what the mesh is made of, which are the uid, the pod CIDRs, the addresses,
    the operating system and the annotations of this collection. Heartbeats and everything else that changes all the time are no events.
  - Changes are reported once they have settled, together, in one event. What an event names are names of nodes that Kubernetes would
    accept as such. Nothing else of what a cluster says is in it, as strings of an event can end up in templates on the control node.
  - An event is a reason to look, not a list of what to do. Let the playbook read the node list itself, as
    C(kubemesh.wireguard.reconcile) does.
  - An event of type V(resync) comes once after the start and then when there was no event for O(resync) seconds, while the API can be
    reached. It makes up for runs that failed, as ansible-rulebook does not repeat them.
  - It goes on forever. Where the API cannot be reached or refuses, it says so in the log, with what helps, and tries again, at first after
    half a second and at last every 30 seconds. Credentials are read again each time that it connects.
  - Options that are not given are taken from C(K8S_AUTH_KUBECONFIG), C(K8S_AUTH_CONTEXT), C(K8S_AUTH_HOST), C(K8S_AUTH_API_KEY),
    C(K8S_AUTH_SSL_CA_CERT), C(K8S_AUTH_CERT_FILE), C(K8S_AUTH_KEY_FILE) and C(K8S_AUTH_VERIFY_SSL) in the environment. Without host and
    kubeconfig it looks for E(KUBECONFIG), C(~/.kube/config) and then the service account of the pod that it runs in.
options:
  kubeconfig:
    description:
      - Path of a kubeconfig. Several are separated by colons, as in E(KUBECONFIG).
      - Users with a token, a token file or a client certificate work. Those that need a program (exec) or an auth-provider are refused.
      - What is given beside it goes before what it says. This is so for O(host) and O(ca_cert), and any of O(api_key), O(api_key_file),
        O(client_cert) and O(client_key) replaces all credentials of its user.
    type: str
  context:
    description: Name of a context in the kubeconfig. Without it, the current one.
    type: str
  host:
    description: URL of the API server, for use without a kubeconfig.
    type: str
  api_key:
    description: Bearer token. It never changes while the rulebook runs, so O(api_key_file) is better.
    type: str
  api_key_file:
    description: Path of a file with a bearer token. It is read again whenever a connection is made.
    type: str
  ca_cert:
    description: Path of the CA certificates (PEM) that the API server's certificate is checked against.
    type: str
  client_cert:
    description: Path of a client certificate (PEM).
    type: str
  client_key:
    description: Path of the key (PEM) of O(client_cert).
    type: str
  validate_certs:
    description: Whether the API server's certificate is checked.
    type: bool
    default: true
  annotations:
    description:
      - Names of further annotations that are compared. For clusters whose pod CIDRs or addresses are in annotations.
    type: list
    elements: str
    default: []
  settle:
    description: Seconds without another change after which changes are reported.
    type: float
    default: 0.1
  settle_max:
    description: Seconds after the first change after which changes are reported at the latest.
    type: float
    default: 1.0
  min_interval:
    description:
      - Seconds from one event to the next, of whatever type, at least. A change after a time without events is reported at once; those that
        follow it within this time are reported together at its end.
      - Give more than a run takes. ansible-rulebook keeps each event until its run begins, so runs that take longer than this pile up for
        as long as nodes come and go.
    type: float
    default: 30.0
  resync:
    description:
      - Seconds without any event after which there is one of type V(resync). Give more than a run takes, and more than O(min_interval).
    type: float
    default: 300.0
  timeout:
    description: Seconds that the API server may take to accept a connection and to answer.
    type: float
    default: 30.0
  watch_timeout:
    description: Seconds after which the server is asked to end a watch, which is then continued by a new one.
    type: float
    default: 300.0
  page_size:
    description: Nodes that are asked for at a time.
    type: int
    default: 500
requirements:
  - Python 3.11 or newer for ansible-rulebook
notes:
  - The user of the credentials needs a ClusterRole with the verbs C(list) and C(watch) for C(nodes).
"""

EXAMPLES = r"""
- name: Keep the mesh as the cluster is
  hosts: all
  execution_strategy: sequential
  sources:
    - name: nodes
      kubemesh.wireguard.k8s_nodes:
        kubeconfig: /etc/kubemesh/kubeconfig
  rules:
    - name: Nodes changed, or it is time to look
      condition: event.type in ["changed", "resync"]
      action:
        run_playbook:
          name: kubemesh.wireguard.reconcile
"""

RETURN = r"""
type:
  description: V(changed) for changes, V(resync) after the start and from time to time.
  type: str
  returned: always
  sample: changed
sequence:
  description: Number of the event since the start, from 1.
  type: int
  returned: always
node_count:
  description: How many nodes the cluster has.
  type: int
  returned: always
joined:
  description: Names of nodes that are new since the last event. At most 200 in each list.
  type: list
  elements: str
  returned: always
left:
  description: Names of nodes that are gone.
  type: list
  elements: str
  returned: always
changed:
  description: Names of nodes that have other pod CIDRs, addresses, keys or the like.
  type: list
  elements: str
  returned: always
replaced:
  description: Names of nodes that are another Node object under the same name.
  type: list
  elements: str
  returned: always
unnamed:
  description: How many nodes are not in these lists for want of room.
  type: int
  returned: always
"""

import asyncio
import base64
import binascii
import collections
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import ssl
import tempfile
import time
import urllib.parse
import urllib.request

import aiohttp
import yaml

# By name: a file that is loaded by its path has none of its own.
logger = logging.getLogger("kubemesh.wireguard.k8s_nodes")

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
ENVIRONMENT = {"kubeconfig": "K8S_AUTH_KUBECONFIG", "context": "K8S_AUTH_CONTEXT", "host": "K8S_AUTH_HOST", "api_key": "K8S_AUTH_API_KEY",
               "ca_cert": "K8S_AUTH_SSL_CA_CERT", "client_cert": "K8S_AUTH_CERT_FILE", "client_key": "K8S_AUTH_KEY_FILE",
               "validate_certs": "K8S_AUTH_VERIFY_SSL"}
# name: (default, least, most); seconds but for page_size
NUMBERS = {"settle": (0.1, 0.0, 60.0), "settle_max": (1.0, 0.0, 600.0), "min_interval": (30.0, 0.0, 86400.0),
           "resync": (300.0, 1.0, 604800.0), "timeout": (30.0, 0.1, 3600.0), "watch_timeout": (300.0, 1.0, 3600.0),
           "page_size": (500, 1, 100000)}
TEXTS = ("kubeconfig", "context", "host", "api_key", "api_key_file", "ca_cert", "client_cert", "client_key")
# What ansible-rulebook itself adds
IGNORED = ("eda_feedback_queue",)

ANNOTATIONS = ("kubemesh.wireguard/public-key-0", "kubemesh.wireguard/public-key-1", "kubemesh.wireguard/excluded")
# RFC 1123 subdomain, what Kubernetes accepts as the name of a Node; 253: its limit
NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
NODE_NAME_MAX = 253

NAMES_MAX = 200  # names per list: an event is stored and shown by many, and nobody reads the second page
LINE_MAX = 8 << 20  # bytes of one event: etcd takes objects of 1.5 MiB, which JSON may make a few times longer
PAGE_MAX = 256 << 20  # bytes of one page of a list
VERSION_MAX = 64  # characters of a resource version, which is a number of 64 bits

BACKOFF_FIRST = 0.5  # seconds
BACKOFF_MAX = 30.0  # seconds
RETRY_AFTER_MAX = 300.0  # seconds that a server may ask for
# Seconds. A server sends a bookmark about every minute, so a watch that says nothing for so long has lost its connection.
IDLE_MAX = 150.0
# Seconds. A watch that ends sooner, with nothing in it, did not work (the same rule as in Kubernetes' own clients).
WATCH_MIN = 1.0
LOG_INTERVAL = 300.0  # seconds after which the same trouble is worth another line

RIGHTS = "give it a ClusterRole with apiGroups [''], resources [nodes] and verbs [list, watch]"


class SourceError(Exception):
    """Something that keeps this source from its work; the text says what helps. ``retry_after``: seconds that the server asked for."""

    def __init__(self, message, retry_after=0.0):
        super().__init__(message)
        self.retry_after = retry_after


class Gone(SourceError):
    """The server no longer has the history that was asked for."""


def shown(value, limit=200):
    """``repr`` of a value from outside for a log: one line, no control characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def as_dict(value):
    return value if isinstance(value, dict) else {}


# --- arguments -----------------------------------------------------------------------------------------------------------------------

def number_argument(name, value):
    """A number from a rulebook, where Jinja makes text of it."""
    default, least, most = NUMBERS[name]
    if value in (None, ""):
        return default
    try:
        if isinstance(value, bool):
            raise ValueError
        number = type(default)(value)
    except (TypeError, ValueError):
        raise SourceError("%s: %s is not a number; correct the argument" % (name, shown(value))) from None
    if not least <= number <= most:  # also false for NaN
        raise SourceError("%s: %s is not possible; give a number from %s to %s" % (name, shown(value), least, most))
    return number


def bool_argument(name, value):
    text = str(value).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise SourceError("%s: %s is neither true nor false; correct the argument" % (name, shown(value)))


def from_environment(args):
    """Names of the arguments that the environment may give: it must not lead to another cluster than the one that arguments name."""
    if args.get("kubeconfig"):
        return ()
    return tuple(name for name in ENVIRONMENT if not (args.get("host") and name in ("kubeconfig", "context")))


def settings_of(args, environ):
    """All arguments by name, checked, with their defaults. Raises `SourceError` naming the argument."""
    given = {name: value for name, value in args.items() if name not in IGNORED}
    unknown = sorted(set(given) - set(NUMBERS) - set(TEXTS) - {"validate_certs", "annotations"})
    if unknown:
        raise SourceError("unknown arguments: %s; see ansible-doc" % shown(", ".join(map(str, unknown))))
    for name in from_environment(given):
        if given.get(name) in (None, ""):
            given[name] = environ.get(ENVIRONMENT[name])
    settings = {name: number_argument(name, given.get(name)) for name in NUMBERS}
    for name in TEXTS:
        value = given.get(name)
        if value is not None and not isinstance(value, str):
            # not the value: it may be a token
            raise SourceError("%s: expected text, got %s; correct the argument" % (name, type(value).__name__))
        settings[name] = value or None
    value = given.get("validate_certs")
    settings["validate_certs"] = True if value in (None, "") else bool_argument("validate_certs", value)
    annotations = given.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(item, str) for item in annotations):
        raise SourceError("annotations: expected a list of names, got %s; correct the argument" % shown(annotations))
    settings["annotations"] = ANNOTATIONS + tuple(annotations)
    if settings["settle_max"] < settings["settle"]:
        raise SourceError("settle_max: %s is less than settle, %s; correct one of them" % (settings["settle_max"], settings["settle"]))
    return settings


# --- credentials ---------------------------------------------------------------------------------------------------------------------

# server: URL; token: text; files: by path; *_data: PEM as text; found: where all this comes from, for messages
Connection = collections.namedtuple(
    "Connection", ("server", "token", "token_file", "ca_file", "ca_data", "cert_file", "cert_data", "key_file", "key_data", "verify",
                   "server_name", "proxy", "found"), defaults=(None,) * 8 + (True, None, None, ""))


def checked_server(url, where):
    """The URL of an API server without a slash at its end."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment or parts.username)
        dummy = parts.port
    except (TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise SourceError("%s: %s is not the URL of an API server; expected https://ADDRESS:PORT" % (where, shown(url)))
    return url.rstrip("/")


def named(entries, name, kind, found):
    """The entry of that name in a list of a kubeconfig; the first one counts, as in kubectl."""
    for entry in entries:
        if entry.get("name") == name:
            return as_dict(entry.get(kind))
    raise SourceError("%s: there is no %s %s in it; correct the kubeconfig" % (found, kind, shown(name)))


def merged_kubeconfig(texts, found):
    """``(current context or None, {"contexts", "clusters", "users"})`` of kubeconfigs: ``texts`` are pairs of text and directory."""
    current, lists = None, {"contexts": [], "clusters": [], "users": []}
    for text, folder in texts:
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            # not the parser's words: they quote the file, which holds secrets
            raise SourceError("%s: it is not YAML; correct the kubeconfig" % found) from None
        if not isinstance(config, dict):
            raise SourceError("%s: expected an object, got %s; is this a kubeconfig?" % (found, type(config).__name__))
        current = current or config.get("current-context")
        for kind, entries in lists.items():
            given = config.get(kind)
            entries.extend(dict(entry, folder=folder) for entry in (given if isinstance(given, list) else []) if isinstance(entry, dict))
    return current, lists


def pem(value, field, found):
    """Base64 of a kubeconfig as text."""
    if value is None:
        return None
    try:
        return base64.b64decode(value, validate=True).decode("ascii")
    except (TypeError, ValueError, binascii.Error):
        raise SourceError("%s: %s is not base64 of a PEM file; correct the kubeconfig" % (found, field)) from None


def connection_of_kubeconfig(texts, context, found, credentials=True):
    """`Connection` of kubeconfigs; ``credentials``: whether its user's are used. Raises `SourceError` naming the field; never with a secret
    in it."""
    current, lists = merged_kubeconfig(texts, found)
    wanted = context or current
    if not wanted:
        raise SourceError("%s: it has no current-context; give context" % found)
    chosen = named(lists["contexts"], wanted, "context", found)
    cluster = named(lists["clusters"], chosen.get("cluster"), "cluster", found)
    user = named(lists["users"], chosen.get("user"), "user", found)
    where = "%s, user %s" % (found, shown(chosen.get("user")))
    for field, remedy in (("exec", "runs a program for its credentials"), ("auth-provider", "needs an auth-provider"),
                          ("username", "has a password, which no API server takes since Kubernetes 1.19"), ("as", "impersonates another")):
        if user.get(field) and credentials:
            raise SourceError("%s %s (%s), and that is not supported here; make a ServiceAccount with a token and give it by host, ca_cert"
                              " and api_key_file, or by a kubeconfig with token or tokenFile" % (where, remedy, field))

    def folder_of(kind, name):
        return next(entry["folder"] for entry in lists[kind] if entry.get("name") == name)

    def path(value, folder):
        return os.path.join(folder, value) if isinstance(value, str) and value else None

    cluster_folder, user_folder = folder_of("clusters", chosen.get("cluster")), folder_of("users", chosen.get("user"))
    token = user.get("token") if isinstance(user.get("token"), str) else None
    return Connection(
        server=checked_server(cluster.get("server"), "%s, cluster %s, server" % (found, shown(chosen.get("cluster")))),
        # as in kubectl, the file wins
        token=None if user.get("tokenFile") else token,
        token_file=path(user.get("tokenFile"), user_folder),
        ca_file=path(cluster.get("certificate-authority"), cluster_folder),
        ca_data=pem(cluster.get("certificate-authority-data"), "certificate-authority-data", found),
        cert_file=path(user.get("client-certificate"), user_folder),
        cert_data=pem(user.get("client-certificate-data"), "client-certificate-data", where),
        key_file=path(user.get("client-key"), user_folder),
        key_data=pem(user.get("client-key-data"), "client-key-data", where),
        verify=cluster.get("insecure-skip-tls-verify") is not True,
        server_name=cluster.get("tls-server-name") or None,
        proxy=cluster.get("proxy-url") or None,
        found=found)


def read_text(path, what):
    try:
        with open(path, encoding="utf-8") as handle:
            return handle.read()
    except (OSError, ValueError) as exc:
        raise SourceError("%s: %s cannot be read: %s" % (what, path, getattr(exc, "strerror", None) or "it is not text")) from None


CREDENTIALS = ("api_key", "api_key_file", "client_cert", "client_key")


def with_arguments(connection, settings):
    """The `Connection` of a kubeconfig with what arguments say instead. Credentials are one thing: any of them replaces them all, as a
    server that is shown two identities takes one of its own choice."""
    replaced = {}
    if settings["client_key"] and not settings["client_cert"]:
        raise SourceError("client_key: it is given without client_cert (K8S_AUTH_CERT_FILE); give both, or none")
    if any(settings[name] for name in CREDENTIALS):
        replaced.update(token=None if settings["api_key_file"] else settings["api_key"], token_file=settings["api_key_file"],
                        cert_file=settings["client_cert"], cert_data=None, key_file=settings["client_key"], key_data=None)
    if settings["ca_cert"]:
        replaced.update(ca_file=settings["ca_cert"], ca_data=None)
    if settings["host"]:
        replaced.update(server=checked_server(settings["host"], "host"))
    return connection._replace(verify=connection.verify and settings["validate_certs"], **replaced)


def find_connection(settings, environ, home, service_account=SERVICE_ACCOUNT):
    """`Connection` by arguments, kubeconfig or service account, in this order."""
    if settings["host"] and not settings["kubeconfig"]:
        certificate = settings["client_cert"] and settings["client_key"]
        if not (settings["api_key"] or settings["api_key_file"] or certificate):
            raise SourceError("host: %s is given without credentials; give api_key_file, or client_cert and client_key"
                              % shown(settings["host"]))
        return Connection(
            server=checked_server(settings["host"], "host"), token=None if settings["api_key_file"] else settings["api_key"],
            token_file=settings["api_key_file"], ca_file=settings["ca_cert"], cert_file=settings["client_cert"],
            key_file=settings["client_key"], verify=settings["validate_certs"], found="the arguments")
    paths = settings["kubeconfig"] or environ.get("KUBECONFIG") or os.path.join(home, ".kube", "config")
    existing = [path for path in map(os.path.expanduser, filter(None, paths.split(os.pathsep))) if os.path.exists(path)]
    if existing:
        found = "kubeconfig %s" % os.pathsep.join(existing)
        texts = [(read_text(path, "kubeconfig"), os.path.dirname(os.path.abspath(path))) for path in existing]
        own = not any(settings[name] for name in CREDENTIALS)
        return with_arguments(connection_of_kubeconfig(texts, settings["context"], found, own), settings)
    if settings["kubeconfig"]:
        raise SourceError("kubeconfig: %s does not exist; correct the path" % settings["kubeconfig"])
    address, token = environ.get("KUBERNETES_SERVICE_HOST"), os.path.join(service_account, "token")
    if not address or not os.path.exists(token):
        raise SourceError("there is no way to the Kubernetes API: no kubeconfig (KUBECONFIG, ~/.kube/config) and no service account; give"
                          " kubeconfig, or host and api_key_file")
    return Connection(
        server="https://%s:%s" % ("[%s]" % address if ":" in address else address, environ.get("KUBERNETES_SERVICE_PORT") or "443"),
        token_file=token, ca_file=os.path.join(service_account, "ca.crt"), verify=settings["validate_certs"], found="the service account")


# --- what is compared ----------------------------------------------------------------------------------------------------------------

def fingerprint(item, annotations):
    """``(name, uid, digest)`` of a Node object, by what the mesh is made of. Raises `SourceError` when it has no valid name.

    What is compared needs no validation, as it goes no further. Not compared: conditions, taints and whether a node is cordoned, as its
    pods still run and it stays in the mesh all the same.
    """
    metadata, spec, status = (as_dict(item.get(part)) for part in ("metadata", "spec", "status"))
    name, uid = metadata.get("name"), metadata.get("uid")
    if not isinstance(name, str) or len(name) > NODE_NAME_MAX or not NODE_NAME.fullmatch(name):
        raise SourceError("%s is not the name of a Node" % shown(name))
    own = as_dict(metadata.get("annotations"))
    system = as_dict(status.get("nodeInfo")).get("operatingSystem") or as_dict(metadata.get("labels")).get("kubernetes.io/os")
    relevant = [spec.get("podCIDR"), spec.get("podCIDRs"), status.get("addresses"), system,
                {annotation: own[annotation] for annotation in annotations if annotation in own}]
    return name, uid, hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).digest()


class View:
    """The nodes as the API last said, and as they were when something was last reported.

    ``nodes`` and ``reported``: ``{name: (uid, digest)}``.
    """

    def __init__(self, annotations=ANNOTATIONS):
        self.annotations = annotations
        self.nodes, self.reported = {}, {}
        self.sequence = 0
        self.doubted = False
        self.problems = []  # what was passed over since somebody looked

    def known(self, item):
        """``(name, (uid, digest))`` of a Node object, or None for what is none."""
        try:
            name, uid, digest = fingerprint(item, self.annotations)
        except SourceError as exc:
            self.problems = [str(exc)]
            return None
        return name, (uid, digest)

    def replace(self, found):
        """Take a complete list, of what `known` gives of each object. -> whether anything is new."""
        nodes = dict(filter(None, found))
        # A server that has just started has been seen to say once that there is nothing at all.
        if not nodes and self.nodes and not self.doubted:
            self.doubted = True
            raise SourceError("the API lists no node at all, and there were %d; asking once more before that is believed" % len(self.nodes))
        self.doubted = False
        before, self.nodes = self.nodes, nodes
        return nodes != before

    def apply(self, kind, item):
        """Take an event of a watch, ``ADDED``, ``MODIFIED`` or ``DELETED``. -> whether anything is new."""
        known = self.known(item)
        if known is None:
            return False
        name, now = known
        if kind == "DELETED":
            return self.nodes.pop(name, None) is not None
        before, self.nodes[name] = self.nodes.get(name), now
        return before != now

    def report(self, kind):
        """The event of type ``kind`` with all that changed since the last one; None for ``changed`` when it is all as it was."""
        old, new = self.reported, self.nodes
        both = old.keys() & new.keys()
        lists = {
            "joined": sorted(new.keys() - old.keys()),
            "left": sorted(old.keys() - new.keys()),
            "replaced": sorted(name for name in both if old[name][0] != new[name][0]),
            "changed": sorted(name for name in both if old[name][0] == new[name][0] and old[name] != new[name]),
        }
        if kind == "changed" and not any(lists.values()):
            return None
        self.reported = dict(new)
        self.sequence += 1
        event = {"type": kind, "sequence": self.sequence, "node_count": len(new),
                 "unnamed": sum(max(0, len(names) - NAMES_MAX) for names in lists.values())}
        event.update({field: names[:NAMES_MAX] for field, names in lists.items()})
        return event


# --- when it is reported -------------------------------------------------------------------------------------------------------------

class Schedule:
    """When to report. All times are seconds of one monotonic clock.

    Changes: ``settle`` after the last one, ``settle_max`` after the first one at the latest. A resync: at once after the start, and
    ``resync`` after any report, as each makes the playbook look at everything; only while the API can be reached, as the playbook needs
    it as well. Whatever it is, not before ``min_interval`` after the report before: reports that come faster than runs end pile up.
    """

    def __init__(self, settle, settle_max, min_interval, resync):
        self.settle, self.settle_max, self.min_interval, self.resync = settle, settle_max, min_interval, resync
        self.first = self.last = self.reported = None
        self.next_resync = None
        self.reachable = False

    def change(self, now):
        if self.first is None:
            self.first = now
        self.last = now

    def reach(self, now):
        """The API answers."""
        self.reachable = True
        if self.next_resync is None:
            self.next_resync = now

    def lose(self):
        """The API cannot be reached."""
        self.reachable = False

    def due(self):
        """``(time, kind)`` of the next report, or None."""
        found = []
        if self.reachable:
            found.append((self.next_resync, "resync"))
        if self.first is not None and self.next_resync is not None:
            settled = min(self.last + self.settle, self.first + self.settle_max)
            found.append((settled, "changed"))
        if not found:
            return None
        moment, kind = min(found)
        return (moment if self.reported is None else max(moment, self.reported + self.min_interval)), kind

    def done(self, now):
        """A report was made. Whatever its kind, it has all changes in it."""
        self.first = self.last = None
        self.reported = now
        self.next_resync = now + self.resync


def backoff(failures, chance):
    """Seconds to wait after so many failures in a row. ``chance``: from 0 to 1; no two clients shall come back at the same time."""
    return min(BACKOFF_MAX, BACKOFF_FIRST * 2 ** min(failures - 1, 10)) * (0.5 + chance / 2)


# --- answers of the API --------------------------------------------------------------------------------------------------------------

def version_of(body):
    """The resource version of an object or list."""
    version = as_dict(as_dict(body).get("metadata")).get("resourceVersion")
    if not isinstance(version, str) or not 0 < len(version) <= VERSION_MAX:
        raise SourceError("an answer of the API has no resourceVersion; is the server a Kubernetes API?")
    return version


def parse_page(data):
    """``(items, version, continue token)`` of one page of a list."""
    try:
        body = json.loads(data)
    except ValueError:
        raise SourceError("the answer of the API is no JSON; is the server a Kubernetes API?") from None
    items = as_dict(body).get("items")
    if as_dict(body).get("kind") != "NodeList" or not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SourceError("the answer of the API is no list of nodes; is the server a Kubernetes API?")
    token = body["metadata"].get("continue") if isinstance(body.get("metadata"), dict) else None
    return items, version_of(body), token or None


def parse_event(line):
    """``(type, object)`` of one line of a watch. Raises `Gone` and `SourceError` for what is no event of a node."""
    try:
        event = json.loads(line)
    except ValueError:
        raise SourceError("an event of the API is no JSON: %s" % shown(line, 80)) from None
    kind, item = as_dict(event).get("type"), as_dict(as_dict(event).get("object"))
    if kind == "ERROR":
        error = Gone if item.get("code") == 410 else SourceError
        raise error("the API ends the watch: %s %s" % (shown(item.get("code")), shown(item.get("message"))))
    if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
        raise SourceError("the API sends an event of type %s" % shown(kind))
    return kind, item


def status_error(code, data, retry_after, connection):
    """The exception for an answer other than 200; its text says what helps."""
    try:
        message = shown(as_dict(json.loads(data)).get("message"))
    except ValueError:
        message = ""
    who = "the API server %s" % connection.server
    if code == 410:
        return Gone("%s: %d %s" % (who, code, message))
    try:
        wait = min(max(float(retry_after), 0.0), RETRY_AFTER_MAX)
    except (TypeError, ValueError):
        wait = 0.0  # none, or a date, which no API server sends
    if code == 401:
        text = "%s does not accept the credentials of %s (401 %s); renew them" % (who, connection.found, message)
    elif code == 403:
        text = "%s refuses it to the user of %s (403 %s); %s" % (who, connection.found, message, RIGHTS)
    else:
        text = "%s answers %d %s" % (who, code, message)
    return SourceError(text, wait)


def connection_error(exc, connection):
    """The `SourceError` for a connection that cannot be made, or was lost."""
    # aiohttp's own text has the address of an object in it, which is another one each time
    cause = getattr(exc, "certificate_error", None) or getattr(exc, "os_error", None) or exc
    return SourceError("no connection to the API server %s of %s: %s; check its address, the network and its certificate"
                       % (connection.server, connection.found, shown(str(cause) or type(cause).__name__)))


# --- the API -------------------------------------------------------------------------------------------------------------------------

def tls_context(connection):
    """What TLS needs of a `Connection`."""
    for field, path in (("CA certificates", connection.ca_file), ("client certificate", connection.cert_file),
                        ("client key", connection.key_file)):
        if path:
            read_text(path, field)  # for its message: OpenSSL names no file
    try:
        context = ssl.create_default_context(cafile=None if connection.ca_data else connection.ca_file, cadata=connection.ca_data)
        if not connection.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if connection.cert_data or connection.cert_file:
            with tempfile.TemporaryDirectory(prefix="k8s-nodes-") as folder:  # readable for this user only, and gone at once
                files = []
                for name, data, path in (("cert", connection.cert_data, connection.cert_file),
                                         ("key", connection.key_data, connection.key_file)):
                    if data:
                        path = os.path.join(folder, name)
                        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as handle:
                            handle.write(data)
                    files.append(path)
                # an empty password: without one OpenSSL asks for it on the terminal
                context.load_cert_chain(files[0], files[1], password="")
    except (OSError, ValueError) as exc:
        # ssl.SSLError is an OSError; its text holds no content of files
        raise SourceError("the certificates of %s cannot be used: %s; correct CA, certificate or key"
                          % (connection.found, getattr(exc, "strerror", None) or exc)) from None
    return context


def proxy_of(server):
    """The proxy that the environment (HTTPS_PROXY, NO_PROXY) names for a URL, or None."""
    parts = urllib.parse.urlsplit(server)
    if urllib.request.proxy_bypass_environment(parts.netloc):
        return None
    return urllib.request.getproxies_environment().get(parts.scheme)


class Api:
    """Lists and watches nodes by one `Connection`, as an asynchronous context manager."""

    def __init__(self, connection, settings):
        self.connection, self.settings = connection, settings

    async def __aenter__(self):
        connection = self.connection
        token = connection.token
        if connection.token_file:
            token = read_text(connection.token_file, "token").strip()
            if not token:
                raise SourceError("token: %s is empty" % connection.token_file)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise SourceError("token of %s: it holds characters that no token has" % connection.found)
        self.headers = {"Accept": "application/json", "User-Agent": "kubemesh.wireguard.k8s_nodes"}
        if token:
            self.headers["Authorization"] = "Bearer " + token
        secure = connection.server.startswith("https:")
        # A redirection would take the token with it.
        self.options = {"proxy": connection.proxy or proxy_of(connection.server), "allow_redirects": False}
        if secure:
            self.options.update(ssl=tls_context(connection), server_hostname=connection.server_name)
        self.session = aiohttp.ClientSession()  # without trust_env: it puts ~/.netrc before the token
        return self

    async def __aexit__(self, *exc):
        await self.session.close()

    def _get(self, query, timeout):
        return self.session.get(self.connection.server + "/api/v1/nodes", params=query, headers=self.headers, timeout=timeout,
                                **self.options)

    async def _checked(self, response):
        if response.status != 200:
            data = await self._read(response, LINE_MAX)
            raise status_error(response.status, data, response.headers.get("Retry-After"), self.connection)

    @staticmethod
    async def _read(response, most):
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > most:
                raise SourceError("the answer of the API is longer than %d bytes; give a smaller page_size" % most)
        return bytes(data)

    async def list_nodes(self, reduce):
        """``(list, version)`` of all nodes, in pages of one moment: of each object what ``reduce`` gives, so that only one page of them is
        held at a time."""
        seconds = self.settings["timeout"]
        timeout = aiohttp.ClientTimeout(total=4 * seconds, sock_connect=seconds, sock_read=seconds)
        limit = {"limit": str(self.settings["page_size"])}
        items, token = [], None
        while True:
            try:
                async with self._get(dict(limit, **({"continue": token} if token else {})), timeout) as response:
                    await self._checked(response)
                    page, version, following = parse_page(await self._read(response, PAGE_MAX))
            except Gone:
                if not token:
                    raise
                # The token has expired between two pages: all of it in one answer, as Kubernetes' own clients do.
                limit, items, token = {}, [], None
                continue
            items.extend(map(reduce, page))
            if not following:
                return items, version
            token = following

    async def watch(self, version):
        """Yields ``(type, object)`` of what happens after that version, until the server ends it or nothing is heard of it.

        The first type is ``OPEN``: the server has accepted the watch.
        """
        seconds = self.settings["timeout"]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=IDLE_MAX)
        query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true",
                 "timeoutSeconds": str(int(self.settings["watch_timeout"]))}
        # The head of the answer comes at once; it is the events that may take their time.
        async with asyncio.timeout(seconds):
            response = await self._get(query, timeout)
        async with response:
            await self._checked(response)
            yield "OPEN", {}
            rest, chunks = b"", response.content.iter_any()
            while True:
                try:
                    chunk = await chunks.__anext__()
                except (StopAsyncIteration, TimeoutError):
                    return  # what is left is the beginning of an event, which the next watch brings again
                *lines, rest = (rest + chunk).split(b"\n")
                for line in filter(bytes.strip, lines):
                    yield parse_event(line)
                if len(rest) > LINE_MAX:
                    raise SourceError("an event of the API is longer than %d bytes" % LINE_MAX)


# --- the source ----------------------------------------------------------------------------------------------------------------------

class Source:
    """One cluster, followed until it is cancelled."""

    def __init__(self, queue, settings):
        self.queue, self.settings = queue, settings
        self.view = View(settings["annotations"])
        self.schedule = Schedule(*(settings[name] for name in ("settle", "settle_max", "min_interval", "resync")))
        self.wake = asyncio.Event()
        self.clock = asyncio.get_running_loop().time
        self.version = None  # of the last list or event; None: list again
        self.failures = 0  # in a row
        self.said = (None, 0.0)

    async def run(self):
        tasks = [asyncio.ensure_future(self.follow()), asyncio.ensure_future(self.emit())]
        try:
            done, dummy = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def emit(self):
        """Put an event into the queue whenever one is due."""
        while True:
            due = self.schedule.due()
            wait = None if due is None else due[0] - self.clock()
            if wait is None or wait > 0:
                # not wait_for(): before Python 3.12 it loses a cancellation that comes together with the result
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self.wake.wait()
                self.wake.clear()
                continue
            kind = due[1]
            event = self.view.report(kind)
            if event is None:
                self.schedule.first = self.schedule.last = None
                continue
            self.schedule.done(self.clock())
            await self.queue.put(event)

    async def follow(self):
        """Keep the view as the API says, whatever happens to the API."""
        while True:
            trouble = await self.attempt()
            if trouble is None:
                self.failures = 0
                continue
            self.version = None  # after any trouble, the list says what was missed
            self.failures += 1
            if isinstance(trouble, Gone) and self.failures == 1:
                continue
            self.schedule.lose()
            self.complain(trouble)
            await asyncio.sleep(max(trouble.retry_after, backoff(self.failures, random.random())))  # noqa: S311

    async def attempt(self):
        """List, unless what is known can be gone on with, and watch. Returns when the watch has ended: None, or what went wrong."""
        connection = None
        try:
            # All of it again each time: tokens and certificates are renewed, kubeconfigs are replaced.
            connection = find_connection(self.settings, os.environ, os.path.expanduser("~"))
            async with Api(connection, self.settings) as api:
                if self.version is None:
                    found, version = await api.list_nodes(self.view.known)
                    self.note(self.view.replace(found))
                    self.version = version
                self.schedule.reach(self.clock())
                self.wake.set()
                began, heard = self.clock(), False
                async with contextlib.aclosing(api.watch(self.version)) as events:
                    async for kind, item in events:
                        if kind == "OPEN":
                            self.recovered()
                            continue
                        heard, self.failures = True, 0
                        if kind != "BOOKMARK":
                            self.note(self.view.apply(kind, item))
                        self.version = version_of(item)
                if not heard and self.clock() - began < WATCH_MIN:
                    raise SourceError("the API server %s ends watches at once" % connection.server)
        except SourceError as exc:
            return exc
        except (aiohttp.ClientError, OSError) as exc:
            return connection_error(exc, connection)
        return None

    def note(self, changed):
        if self.view.problems:
            self.complain("a node is passed over: %s" % self.view.problems.pop())
        if changed:
            self.schedule.change(self.clock())
            self.wake.set()

    def complain(self, trouble):
        text, now = str(trouble), self.clock()
        if text != self.said[0] or now - self.said[1] >= LOG_INTERVAL:
            self.said = (text, now)
            logger.warning("%s", text)

    def recovered(self):
        if self.said[0] is not None:
            self.said = (None, 0.0)
            logger.warning("watching nodes again")


async def main(queue, args):
    """What ansible-rulebook calls. It ends only when it is cancelled: were it to return or raise, the whole rulebook would end."""
    failures, began = 0, time.monotonic()
    while True:
        try:
            await Source(queue, settings_of(args, os.environ)).run()
        except SourceError as exc:
            logger.error("%s", exc)
        except Exception:
            logger.exception("this is a fault of the event source; it starts again")
        # A source that ran for long begins with a short pause again.
        failures = 1 if time.monotonic() - began > LOG_INTERVAL else failures + 1
        began = time.monotonic()
        await asyncio.sleep(backoff(failures, random.random()))  # noqa: S311
