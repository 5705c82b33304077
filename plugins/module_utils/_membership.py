# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Who belongs to the mesh: Node objects, inventory and the last document made into the next document.

On the controller it needs ``jmespath`` (selecting fields of Node objects) and ``netaddr`` (overlaps). The node agent has neither: it takes
`PLAIN_QUERIES` and `plain_overlap_problems`, which say the same. Pure: plain data in, plain data out, no I/O, no clock.

Everything that is wrong is collected, and `build_document` raises one `MeshError` with all of it before anything can change. Findings
travel as lists of text, each naming node (or host), field, value and remedy.

A *candidate* is what a source knows about one node::

    {"name": "worker-1", "uid": "8c1f...", "excluded": "" or the reason,
     "pod_cidrs": [canonical text], "node_addresses": [canonical text, in the source's order],
     "endpoints": [{"address", "port"}] or None (the node's own addresses),
     "annotation_keys": {"0": text as found}}

*Settings* are what this run's inventory says about a host, by node name; `settings_of_hosts` makes them.
"""

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    FAMILIES,
    GENERATIONS,
    KEEPALIVE_MAX,
    MTU_MAX,
    MTU_MIN,
    MTU_MIN_IPV6,
    SCHEMA,
    MeshError,
    canonical_address,
    canonical_cidr,
    canonical_public_key,
    check_node_name,
    family_of,
    find_overlaps,
    generation_text,
    joined_error,
    node_address_order,
    parse_endpoint,
    prefix_conflict,
    prefixes_of,
    probe_address,
    shared_identities,
    shown,
    some_of,
    sorted_cidrs,
    validate_document,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._pods import NODE_CIDRS

try:
    import jmespath
    import jmespath.exceptions
    import netaddr
except ImportError as exc:
    MISSING_LIBRARY = str(exc)
else:
    MISSING_LIBRARY = None

ANNOTATIONS = {"0": "kubemesh.wireguard/public-key-0", "1": "kubemesh.wireguard/public-key-1"}
EXCLUDED_ANNOTATION = "kubemesh.wireguard/excluded"

# JMESPath over a Node object. Only InternalIP: the first address found may be a VIP (kube-vip #1385) or an ExternalIP.
DEFAULT_QUERIES = {
    "node_addresses": "status.addresses[?type=='InternalIP'].address",
    "pod_cidrs": "spec.podCIDRs || [spec.podCIDR]",
    "endpoint": "",
    "excluded": 'metadata.annotations."%s"' % EXCLUDED_ANNOTATION,
}
# What a message calls them: the option of the module, the variable of the role
_QUERY_NAMES = {field: "%s_query" % field for field in DEFAULT_QUERIES}

REASON_EXCLUDE_NODES = "named in exclude_nodes"
REASON_NO_KEY = "no public key known yet"
REASON_NO_ADDRESS = "no pod CIDR and no node address yet"
REASON_NO_POD_CIDR = "no pod CIDR yet"

HOST_VARIABLES = ("mesh_node_name", "mesh_endpoint", "mesh_keepalive", "mesh_mtu", "mesh_pod_cidrs", "mesh_node_addresses")

_NAMES_SHOWN = 10  # names in one warning; the rest is counted


def require_libraries():
    """`MeshError` when a library that this file needs is missing on the controller."""
    if MISSING_LIBRARY is not None:
        raise MeshError("the Python that runs Ansible on the controller lacks a library (%s); install netaddr and jmespath for it"
                        % MISSING_LIBRARY)


def name_list(names):
    """``a, b, c and 4 more``: names for a message."""
    return some_of(sorted(names), _NAMES_SHOWN)


# --- from Kubernetes -----------------------------------------------------------------------------------------------------------------

def _one_line(exc):
    # jmespath draws a caret below the expression
    return " ".join(str(exc).split())


def compile_queries(queries=None):
    """Compiled JMESPath by field; what ``queries`` leaves out or has as None is the default. ``""`` for ``endpoint``: no query."""
    require_libraries()
    given = {field: text for field, text in (queries or {}).items() if text is not None}
    unknown = sorted(set(given) - set(DEFAULT_QUERIES))
    if unknown:
        raise MeshError("unknown queries: %s" % ", ".join(unknown))
    compiled = {}
    for field, text in dict(DEFAULT_QUERIES, **given).items():
        if not text:
            compiled[field] = None
            continue
        try:
            compiled[field] = jmespath.compile(text)
            try:
                compiled[field].search({})
            except jmespath.exceptions.UnknownFunctionError:
                raise  # only found when run, and then on every node; what else fails on nothing may be right for a Node
            except jmespath.exceptions.JMESPathError:
                pass
        except jmespath.exceptions.JMESPathError as exc:
            raise MeshError("%s: %s is not a JMESPath expression: %s" % (_QUERY_NAMES[field], shown(text), _one_line(exc))) from None
    return compiled


def node_items(listing):
    """``(items, complete, why)`` of a parsed answer of the API or of ``kubectl get nodes -o json``.

    ``complete`` is False for one page of a list (``metadata.continue``) and for a single Node; ``why`` says so. Raises `MeshError` for
    anything that is no list of Nodes, the API's own errors (kind Status) included.
    """
    if not isinstance(listing, dict):
        raise MeshError("the node list is not an object but %s; save the output of: kubectl get nodes -o json" % shown(listing))
    kind = listing.get("kind")
    if kind == "Status":
        raise MeshError("the node list is not a list but the API's answer %s %s: %s"
                        % (shown(listing.get("code")), shown(listing.get("reason")), shown(listing.get("message"), 200)))
    if kind == "Node":
        return [listing], False, "it holds a single Node object"
    items = listing.get("items")
    if kind not in ("NodeList", "List") or not isinstance(items, list):
        raise MeshError("the node list is of kind %s without a list of items, expected NodeList; save the output of:"
                        " kubectl get nodes -o json" % shown(kind))
    metadata = listing.get("metadata")
    if isinstance(metadata, dict) and metadata.get("continue"):
        return items, False, "it is one page of a longer list (metadata.continue is set)"
    return items, True, ""


def _texts(value):
    """A query's answer as a list of values without nulls: null, one value or a list."""
    if value is None:
        return []
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]


def _canonical(values, function, where, remedy, problems):
    result = []
    for value in values:
        try:
            result.append(function(value))
        except MeshError as exc:
            problems.append("%s: %s; %s" % (where, exc, remedy))
    return list(dict.fromkeys(result))


def _endpoints(values, where, remedy, problems):
    """Endpoints of a list of texts, the first of each family; ``none`` stands for no endpoint at all."""
    found = {}
    for value in values:
        if value in ("", "none"):
            continue
        try:
            endpoint = parse_endpoint(value)
        except MeshError as exc:
            problems.append("%s: %s; %s" % (where, exc, remedy))
            continue
        found.setdefault(family_of(endpoint["address"]), endpoint)
    return [found[family] for family in FAMILIES if family in found]


def _dict(value):
    return value if isinstance(value, dict) else {}


def _excluded_reason(item, queries):
    labels = _dict(_dict(item.get("metadata")).get("labels"))
    system = _dict(_dict(item.get("status")).get("nodeInfo")).get("operatingSystem") or labels.get("kubernetes.io/os")
    if system == "windows":
        return "runs Windows"
    if queries["excluded"] is not None:
        answer = queries["excluded"].search(item)
        # JMESPath's own idea of false (null, false, "", [], {}), and the text that annotations hold
        if answer not in (None, False, "", [], {}, "false"):
            return "opted out (excluded_query)"
    return ""


def _search(query, field, item, name, problems):
    try:
        return query.search(item)
    except jmespath.exceptions.JMESPathError as exc:
        problems.append("node %s, %s: %s; correct the expression" % (name, _QUERY_NAMES[field], _one_line(exc)))
        return None


class _Plain:
    """A query that is a function of a Node object."""

    def __init__(self, search):
        self.search = search


def _plain_node_addresses(item):
    addresses = _dict(item.get("status")).get("addresses")
    return [address.get("address") for address in (addresses if isinstance(addresses, list) else [])
            if isinstance(address, dict) and address.get("type") == "InternalIP"]


def _plain_pod_cidrs(item):
    spec = _dict(item.get("spec"))
    cidrs = spec.get("podCIDRs")
    # JMESPath takes these for false, a 0 not
    return [spec.get("podCIDR")] if cidrs is None or cidrs is False or cidrs in ("", [], {}) else cidrs


# `DEFAULT_QUERIES` as functions, for where there is no jmespath.
PLAIN_QUERIES = {
    "node_addresses": _Plain(_plain_node_addresses),
    "pod_cidrs": _Plain(_plain_pod_cidrs),
    "endpoint": None,
    "excluded": _Plain(lambda item: _dict(_dict(item.get("metadata")).get("annotations")).get(EXCLUDED_ANNOTATION)),
}


def plain_candidate(item):
    """``(candidate or None, problems)`` of one Node object, by the default queries, without jmespath."""
    problems = []
    return _candidate_of_node(item, PLAIN_QUERIES, problems), problems


def _candidate_of_node(item, queries, problems):
    metadata = _dict(item.get("metadata"))
    name = metadata.get("name")
    uid = metadata.get("uid")
    try:
        check_node_name(name)
    except MeshError as exc:
        problems.append("node list: %s; is this a Node object?" % exc)
        return None
    if item.get("kind") not in (None, "Node"):
        problems.append("node list: %s is of kind %s, expected Node" % (name, shown(item["kind"])))
        return None
    try:
        excluded = _excluded_reason(item, queries)
    except jmespath.exceptions.JMESPathError as exc:
        problems.append("node %s, %s: %s; correct the expression" % (name, _QUERY_NAMES["excluded"], _one_line(exc)))
        excluded = ""
    # what an excluded node has is of no consequence, so it cannot be wrong either
    findings = [] if excluded else problems
    endpoints = None
    if queries["endpoint"] is not None:
        endpoints = _endpoints(_texts(_search(queries["endpoint"], "endpoint", item, name, findings)),
                               "node %s, endpoint (from endpoint_query)" % name,
                               "correct the Node object or the query, or set mesh_endpoint for its host", findings)
    annotations = _dict(metadata.get("annotations"))
    annotation_keys = {generation: annotations[annotation] for generation, annotation in ANNOTATIONS.items() if annotation in annotations}
    return {
        "name": name,
        "uid": uid if isinstance(uid, str) else "",
        "excluded": excluded,
        "pod_cidrs": _canonical(_texts(_search(queries["pod_cidrs"], "pod_cidrs", item, name, findings)), canonical_cidr,
                                "node %s, pod CIDR (from pod_cidrs_query)" % name,
                                "correct the Node object or the query, or set mesh_pod_cidrs for its host", findings),
        "node_addresses": _canonical(_texts(_search(queries["node_addresses"], "node_addresses", item, name, findings)), canonical_address,
                                     "node %s, node address (from node_addresses_query)" % name,
                                     "correct the Node object or the query, or set mesh_node_addresses for its host", findings),
        "endpoints": endpoints,
        "annotation_keys": annotation_keys,
    }


def nodes_from_k8s(items, queries=None):
    """Candidates of Node objects: ``(candidates, problems)``, by name.

    ``items``: parsed Node objects; ``queries``: JMESPath by field (see ``DEFAULT_QUERIES``). Cordoned, NotReady and being-deleted nodes
    are nodes like any other: their pods still run, and a node that is really gone is no longer listed.
    """
    compiled = compile_queries(queries)
    candidates, problems = [], []
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append("node list, item %d: expected a Node object, got %s" % (position, shown(item)))
            continue
        candidate = _candidate_of_node(item, compiled, problems)
        if candidate is not None:
            candidates.append(candidate)
    return _without_duplicates(candidates, problems), problems


def _without_duplicates(candidates, problems):
    by_name = {}
    for candidate in candidates:
        if candidate["name"] in by_name:
            problems.append("node %s: is twice in the node list; a cluster has one Node of a name, so these are lists of two clusters"
                            " or pages that overlap" % candidate["name"])
        by_name.setdefault(candidate["name"], candidate)
    return [by_name[name] for name in sorted(by_name)]


_GIVEN_FIELDS = ("name", "uid", "excluded", "pod_cidrs", "node_addresses", "endpoint", "public_keys")


def _candidate_given(item, problems):
    name = item.get("name")
    unknown = sorted(str(field) for field in set(item) - set(_GIVEN_FIELDS))
    try:
        check_node_name(name)
    except MeshError as exc:
        problems.append("nodes: %s" % exc)
        return None
    if unknown:
        problems.append("node %s: unknown fields %s; a node has %s" % (name, ", ".join(unknown), ", ".join(_GIVEN_FIELDS)))
    excluded = item.get("excluded")
    remedy = "correct it in nodes"
    where = "node %s, " % name
    keys = {}
    for generation, key in sorted(_dict(item.get("public_keys")).items(), key=str):
        try:
            keys[generation_text(generation)] = canonical_public_key(key)
        except MeshError as exc:
            problems.append("%spublic_keys: %s; %s" % (where, exc, remedy))
    endpoints = None
    if item.get("endpoint") is not None:
        endpoints = _endpoints(_texts(item["endpoint"]), where + "endpoint", remedy, problems)
    return {
        "name": name,
        "uid": str(item.get("uid") or ""),
        "excluded": "" if not excluded else (excluded if isinstance(excluded, str) else "excluded in nodes"),
        "pod_cidrs": _canonical(_texts(item.get("pod_cidrs")), canonical_cidr, where + "pod_cidrs", remedy, problems),
        "node_addresses": _canonical(_texts(item.get("node_addresses")), canonical_address, where + "node_addresses", remedy, problems),
        "endpoints": endpoints,
        "annotation_keys": keys,
    }


def nodes_given(items, queries=None):
    """Candidates of a mixed list: Node objects (they have ``metadata``) and short descriptions. ``(candidates, problems)``.

    A short description has ``name`` and any of ``uid``, ``excluded``, ``pod_cidrs``, ``node_addresses``, ``endpoint``, ``public_keys``.
    """
    objects = [item for item in items if isinstance(item, dict) and "metadata" in item]
    candidates, problems = nodes_from_k8s(objects, queries)
    for item in items:
        if isinstance(item, dict) and "metadata" in item:
            continue
        candidate = _candidate_given(item, problems) if isinstance(item, dict) else None
        if not isinstance(item, dict):
            problems.append("nodes: expected Node objects or descriptions, got %s" % shown(item))
        if candidate is not None:
            candidates.append(candidate)
    return _without_duplicates(candidates, problems), problems


# --- from the inventory --------------------------------------------------------------------------------------------------------------

def _whole_number(value):
    """The number that an integer or its text stands for; None for anything else. Text because of ``-e`` and INI inventories."""
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 9:
        return int(value)
    return None


def _number_setting(host, variable, value, low, high, problems):
    number = _whole_number(value)
    if number is None or not low <= number <= high:
        problems.append("host %s, %s: %s is not a number from %d to %d" % (host, variable, shown(value), low, high))
        return None
    return number


def _facts_settings(host, facts, variable, settings, problems):
    """What the node itself reported: its public keys, the measured MTU, the document it keeps. Data, never trusted."""
    if facts is None:
        return
    if not isinstance(facts, dict):
        problems.append("host %s, %s: expected an object with public_keys, mtu and document, got %s; it is set by the role"
                        % (host, variable, shown(facts)))
        return
    keys = _dict(facts.get("public_keys"))
    for generation, key in keys.items():
        if key in (None, ""):  # check mode: the key that would be made is not known yet
            continue
        generation = str(generation)
        if generation not in GENERATIONS:
            problems.append("host %s, %s.public_keys: generation %s, expected 0 or 1" % (host, variable, shown(generation)))
            continue
        try:
            settings["public_keys"][generation] = canonical_public_key(key)
        except MeshError as exc:
            problems.append("host %s, %s.public_keys.%s: %s; run the keypair module on this host again" % (host, variable, generation, exc))
    # "" is what ansible-core 2.18 makes of a template whose value is null
    if settings["mtu"] is None and facts.get("mtu") not in (None, ""):
        settings["mtu"] = _number_setting(host, variable + ".mtu", facts["mtu"], MTU_MIN, MTU_MAX, problems)
    document = facts.get("document")
    if document:
        serial = _whole_number(_dict(document).get("serial"))
        if serial is None:
            problems.append("host %s, %s.document: expected an object with serial and sha256, got %s" % (host, variable, shown(document)))
        else:
            settings["document"] = {"serial": serial, "sha256": str(_dict(document).get("sha256") or "")}


def _public_keys(values):
    """Those of ``values`` that are public keys. What a node says of its devices is data, and a device without a key has none."""
    found = set()
    for value in values:
        try:
            found.add(canonical_public_key(value))
        except MeshError:
            continue
    return frozenset(found)


def _settings_of_host(host, given, facts_variable, problems):
    own = {"host": host, "explicit_name": "mesh_node_name" in given, "unresolved": tuple(given.get("unresolved", ())), "public_keys": {},
           "endpoints": None, "keepalive": None, "mtu": None, "pod_cidrs": None, "node_addresses": None, "document": None,
           "generations": given.get("generations"), "live_keys": _public_keys(given.get("live_keys", ()))}
    where = "host %s, " % host
    if "mesh_endpoint" in given:
        own["endpoints"] = _endpoints(_texts(given["mesh_endpoint"]), where + "mesh_endpoint", "correct it", problems)
    if "mesh_keepalive" in given:
        own["keepalive"] = _number_setting(host, "mesh_keepalive", given["mesh_keepalive"], 0, KEEPALIVE_MAX, problems)
    if given.get("mesh_mtu", "auto") != "auto":
        own["mtu"] = _number_setting(host, "mesh_mtu", given["mesh_mtu"], MTU_MIN, MTU_MAX, problems)
    for field, variable, function in (("pod_cidrs", "mesh_pod_cidrs", canonical_cidr),
                                      ("node_addresses", "mesh_node_addresses", canonical_address)):
        if variable in given:
            own[field] = _canonical(_texts(given[variable]), function, where + variable, "correct it", problems)
    _facts_settings(host, given.get(facts_variable), facts_variable, own, problems)
    return own


def settings_of_hosts(hosts, facts_variable="mesh_node_facts"):
    """Settings by node name: ``(settings, problems, warnings)``.

    ``hosts``: ``{inventory name: {variable: value}}`` with the variables of ``HOST_VARIABLES`` and ``facts_variable``; what a host does
    not have is absent, ``unresolved`` lists variables that could not be computed in this run, ``generations`` those of which anything was
    found on the host in this run (a list of "0" and "1"), ``live_keys`` the public keys of the mesh devices that are there now. Settings of
    a node::

        {"host", "explicit_name", "unresolved", "endpoints", "keepalive", "mtu", "pod_cidrs", "node_addresses", "public_keys", "document",
         "generations", "live_keys": set}

    with None for what is not set. Two hosts with one node name are a problem.
    """
    settings, problems, unresolved = {}, [], {}
    for host in sorted(hosts):
        given = {variable: value for variable, value in hosts[host].items() if value is not None}
        for variable in given.get("unresolved", ()):
            unresolved.setdefault(variable, []).append(host)
        if "mesh_node_name" in given.get("unresolved", ()):
            continue
        name = given.get("mesh_node_name", host)
        try:
            check_node_name(name)
        except MeshError as exc:
            # an inventory has hosts that are no nodes at all, with names that no Node can have
            if "mesh_node_name" in given:
                problems.append("host %s, mesh_node_name: %s" % (host, exc))
            continue
        if name in settings:
            problems.append("hosts %s and %s: both are node %s; set mesh_node_name so that each has its own"
                            % (settings[name]["host"], host, name))
            continue
        settings[name] = _settings_of_host(host, given, facts_variable, problems)
    return settings, problems, [
        "%s of %s cannot be computed in this run (it needs facts of hosts that are not part of it?): what the last mesh document has"
        " stays, and without one the default counts" % (variable, name_list(names)) for variable, names in sorted(unresolved.items())]


def nodes_from_inventory(settings):
    """Candidates of the hosts that say themselves what they are: those with ``mesh_pod_cidrs`` or ``mesh_node_addresses``, by name.

    An inventory is never known to be complete: a node of the last document that it lacks stays until ``forget_nodes`` names it.
    """
    return [{"name": name, "uid": "", "excluded": "", "pod_cidrs": own["pod_cidrs"] or [], "node_addresses": own["node_addresses"] or [],
             "endpoints": None, "annotation_keys": {}}
            for name, own in sorted(settings.items()) if own["pod_cidrs"] is not None or own["node_addresses"] is not None]


def name_suggestions(names, hosts, addresses):
    """``{host: node}`` for hosts whose name fits no node but who most likely are one: same short name, or same address.

    ``names``: of the nodes without a host; ``hosts``: ``{host without a node: its ansible_host or None}``; ``addresses``: ``{address: node
    without a host}``. Only unambiguous ones.
    """
    short = {}
    for name in names:
        short.setdefault(name.split(".")[0].lower(), []).append(name)
    result = {}
    for host, ansible_host in hosts.items():
        by_name = short.get(host.split(".")[0].lower().replace("_", "-"), [])
        if ansible_host in addresses:
            result[host] = addresses[ansible_host]
        elif len(by_name) == 1:
            result[host] = by_name[0]
    return result


# --- the last documents --------------------------------------------------------------------------------------------------------------

def newest_document(documents):
    """``(document, warnings)`` of several last documents: the one with the highest serial; None when there is none.

    ``documents``: ``[(where it comes from, document)]``. Two of the same serial that differ come from two controllers at once.
    """
    if not documents:
        return None, []
    newest = max(document["serial"] for dummy, document in documents)
    best = [(where, document) for where, document in documents if document["serial"] == newest]
    warnings = []
    if any(document != best[0][1] for dummy, document in best):
        # complete ones first, then an order that does not depend on which file came first
        best.sort(key=lambda pair: (not pair[1]["complete"], -len(pair[1]["nodes"]), repr(sorted(pair[1]["nodes"].items()))))
        warnings.append("mesh documents with serial %d differ (%s): two runs at the same time? The one of %s is used and superseded"
                        % (newest, ", ".join(where for where, dummy in best), best[0][0]))
    return best[0][1], warnings


def newest_on_hosts(settings):
    """Where the newest document is, by what the nodes reported: ``{"serial", "hosts": {sha256: [hosts]}}``, or None."""
    known = [(own["document"], own["host"]) for own in settings.values() if own["document"]]
    if not known:
        return None
    serial = max(document["serial"] for document, dummy in known)
    hosts = {}
    for document, host in known:
        if document["serial"] == serial:
            hosts.setdefault(document["sha256"], []).append(host)
    return {"serial": serial, "hosts": {sha256: sorted(names) for sha256, names in sorted(hosts.items())}}


# --- the next document ---------------------------------------------------------------------------------------------------------------

_OVERLAP_REMEDIES = {
    frozenset(("pod CIDR",)): "an address can be behind one node only; correct spec.podCIDRs of the Nodes, or mesh_pod_cidrs",
    frozenset(("node address",)): "each node needs an address of its own; correct the InternalIP of the Nodes, or mesh_node_addresses",
    frozenset(("node address", "pod CIDR")): "nodes and pods cannot share a range; correct mesh_node_addresses or mesh_pod_cidrs",
    frozenset(("endpoint", "pod CIDR")): "what carries the tunnel would go through the tunnel; set mesh_endpoint to an address outside",
    frozenset(("endpoint", "service CIDR")): "an endpoint cannot be a service; set mesh_endpoint to an address of the node's network",
    frozenset(("node address", "service CIDR")): "nodes and services cannot share a range; correct service_cidrs",
    frozenset(("pod CIDR", "service CIDR")): "pods and services cannot share a range; correct service_cidrs",
}


def _owned(network, owner):
    name, what = owner
    return ("node %s, %s %s" % (name, what, network)) if name else "%s %s" % (what, network)


def overlap_problems(prefixes, kept=(), limit=200):
    """Findings about overlapping prefixes.

    ``prefixes``: ``[(cidr, (node name or "", what))]``, ``what`` as in `_mesh.prefix_conflict` or ``service CIDR``; ``kept``: names of
    nodes that are only known from the last document, as they may be gone. At most ``limit`` findings.
    """
    # by keys made once: comparing networks makes two of them each time, 800,000 for 5,000 nodes
    networks = sorted(((netaddr.IPNetwork(cidr), owner) for cidr, owner in set(prefixes)), key=lambda pair: (pair[0].sort_key(), pair[1]))
    problems = []
    enclosing = []
    for network, owner in networks:
        # sorted by version, first address and width, so what does not contain this one contains none that follows
        while enclosing and network not in enclosing[-1][0]:
            enclosing.pop()
        for wide, wide_owner in enclosing:
            if not prefix_conflict(wide_owner, owner):
                continue
            remedy = _OVERLAP_REMEDIES[frozenset(what.replace("pod address", "pod CIDR") for what in (owner[1], wide_owner[1]))]
            gone = sorted({name for name in (owner[0], wide_owner[0]) if name in kept})
            if gone:
                remedy += "; if %s is gone from the cluster, name it in forget_nodes" % " or ".join(gone)
            problems.append("%s: overlaps %s: %s" % (_owned(network, owner), _owned(wide, wide_owner), remedy))
            if len(problems) >= limit:
                return problems
        enclosing.append((network, owner))
    return problems


def merged_by_netaddr(texts):
    """`_pods.merged_prefixes` by netaddr, which is faster for many."""
    return [canonical_cidr(str(network)) for network in netaddr.cidr_merge(list(texts))]


def plain_overlap_problems(prefixes, kept=(), limit=200):
    """`overlap_problems` without netaddr, in fewer words: which prefixes, not what to do about them."""
    return ["%s: overlaps %s" % (_owned(narrow, narrow_owner), _owned(wide, wide_owner))
            for (wide, wide_owner), (narrow, narrow_owner) in find_overlaps(set(prefixes), prefix_conflict, limit)]


def _service_prefixes(service_cidrs, problems):
    return [(cidr, ("", "service CIDR"))
            for cidr in _canonical(service_cidrs or [], canonical_cidr, "service_cidrs", "correct it", problems)]


def _merge_keys(name, own_keys, annotation_keys, previous_keys, options, warnings):
    """Public keys of one node by generation: hostvars before annotation before the last document. Reports what nobody asked for."""
    result = {}
    for generation in GENERATIONS:
        if generation not in options["generations"]:
            continue
        before = previous_keys.get(generation)
        key, source = own_keys.get(generation), "reported by the node itself"
        if key is not None and annotation_keys.get(generation, key) not in (key, before) and not options["expect_new_keys"]:
            warnings.append("node %s, annotation %s: %s, but the node itself reports %s, which counts; if nobody made a new key, find out"
                            " who changed the annotation" % (name, ANNOTATIONS[generation], shown(annotation_keys[generation]), key))
        if key is None and generation in annotation_keys:
            source = "from its annotation %s" % ANNOTATIONS[generation]
            try:
                key = canonical_public_key(annotation_keys[generation])
            except MeshError as exc:
                # One node's annotation must not stop the mesh of all others.
                warnings.append("node %s, annotation %s: %s; it is ignored" % (name, ANNOTATIONS[generation], exc))
        if key is None:
            key = before
        elif before is not None and key != before and not options["expect_new_keys"]:
            warnings.append("node %s: its public key of generation %s is now %s (%s), the last mesh document had %s; if nobody made a new"
                            " key, find out who did" % (name, generation, key, source, before))
        if key is not None:
            result[generation] = key
    return result


def _annotations_in_force(candidate, own, previous_keys):
    """Annotations without those that are left over: of a generation of which nothing is on the node, and that the last document does not
    have either. They could not be removed when that generation was given up, and would bring keys back that nobody has. One that is no
    key brings none back, and is told."""
    there = own["generations"] if own is not None else None
    return {generation: key for generation, key in candidate["annotation_keys"].items()
            if there is None or generation in there or generation in previous_keys or not _is_public_key(key)}


def _is_public_key(text):
    try:
        canonical_public_key(text)
    except MeshError:
        return False
    return True


def _own_or_previous(own, field, unresolved_as, previous, default):
    """A per-host setting; the last document's when this run cannot know it: host not in the inventory, or variable not computable."""
    if own is not None and own[field] is not None:
        return own[field]
    if previous is not None and (own is None or unresolved_as in own["unresolved"]):
        return previous[field]
    return default


def _set_per_host(previous):
    """Whether the endpoints of an entry are other than the node's own addresses, so that a person must have set them: to none as well."""
    if previous["state"] != "excluded" and previous["node_addresses"] and not previous["endpoints"]:
        return True
    return any(endpoint["port"] is not None or endpoint["address"] not in previous["node_addresses"]
               for endpoint in previous["endpoints"].values())


def _document_endpoints(candidate, own, previous, addresses):
    chosen = candidate["endpoints"]
    if own is not None and own["endpoints"] is not None:
        chosen = own["endpoints"]
    elif chosen is None:
        unknown = own is None or "mesh_endpoint" in own["unresolved"]
        if unknown and previous is not None and _set_per_host(previous):
            return previous["endpoints"]
        chosen = [{"address": address, "port": None} for address in addresses]
    result = {}
    for endpoint in chosen:
        result.setdefault(family_of(endpoint["address"]), dict(endpoint))
    return result


def _document_pod_cidrs(candidate, own, previous, moving):
    """``moving``: whether the pod CIDRs of a node come and go, so that other ones than before say nothing."""
    if own is not None and own["pod_cidrs"] is not None:
        return own["pod_cidrs"]
    if not moving and previous is not None and previous["pod_cidrs"] and (own is None or "mesh_pod_cidrs" in own["unresolved"]) and (
            candidate["uid"] == previous["uid"] or not candidate["pod_cidrs"]):
        # spec.podCIDRs of a Node never changes once set (the API server refuses it), so other ones were set per host, in an
        # inventory that this run does not have.
        return previous["pod_cidrs"]
    return candidate["pod_cidrs"]


def _state(entry):
    """``(state, reason)`` of a node that is not excluded."""
    if not entry["public_keys"]:
        return "pending", REASON_NO_KEY
    if not entry["pod_cidrs"]:
        return ("member", REASON_NO_POD_CIDR) if entry["node_addresses"] else ("pending", REASON_NO_ADDRESS)
    return "member", ""


def _exclude(entry, reason):
    """The same node outside the tunnel: what it has stays on record, what makes it a peer goes."""
    return dict(entry, state="excluded", reason=reason, public_keys={}, probe_addresses={}, endpoints={}, mtu=None, keepalive=0)


def _entry(candidate, own, keys, previous, options, problems, warnings):
    name = candidate["name"]
    addresses = candidate["node_addresses"]
    if own is not None and own["node_addresses"] is not None:
        addresses = own["node_addresses"]
    elif own is not None and "mesh_node_addresses" in own["unresolved"] and previous is not None:
        addresses = previous["node_addresses"]
    addresses = node_address_order(addresses)
    entry = {"state": "member", "reason": "", "uid": candidate["uid"], "public_keys": {}, "endpoints": {},
             "pod_cidrs": sorted_cidrs(_document_pod_cidrs(candidate, own, previous, options["pod_source"] != NODE_CIDRS)),
             "node_addresses": addresses, "probe_addresses": {}, "mtu": None, "keepalive": 0}
    if not entry["uid"] and previous is not None:
        entry["uid"] = previous["uid"]
    excluded = candidate["excluded"] or (REASON_EXCLUDE_NODES if name in options["exclude_nodes"] else "")
    if excluded:
        return _exclude(entry, excluded)
    mtu = _own_or_previous(own, "mtu", "mesh_mtu", previous, previous["mtu"] if previous is not None else None)
    if mtu is not None and mtu < MTU_MIN_IPV6 and any(":" in text for text in entry["pod_cidrs"] + addresses):
        problems.append("node %s, mtu: %d is below %d, with which the kernel turns IPv6 off on the device, and this node has IPv6;"
                        " raise the MTU of the network below" % (name, mtu, MTU_MIN_IPV6))
    entry["mtu"] = mtu
    entry["keepalive"] = _own_or_previous(own, "keepalive", "mesh_keepalive", previous, 0)
    entry["endpoints"] = _document_endpoints(candidate, own, previous, addresses)
    known = previous["public_keys"] if previous is not None else {}
    entry["public_keys"] = _merge_keys(name, keys, _annotations_in_force(candidate, own, known), known, options, warnings)
    if entry["public_keys"] and not keys and not candidate["annotation_keys"] and _added_again(candidate, previous):
        # It may be the same machine that registered anew, so what is configured stays (I4). The uid stays that of the node that the key is
        # known to be of, so that this is told until it reports a key.
        entry["uid"] = previous["uid"]
        if name not in options["awaited"]:
            warnings.append("node %s: was deleted and added again since the last mesh document, and reported no key in this run: its old"
                            " key stays. If it was installed anew, what others send to it through the mesh is lost; run the playbook on it"
                            " as well, or name it in exclude_nodes" % name)
    entry["probe_addresses"] = {generation: probe_address(key) for generation, key in entry["public_keys"].items()}
    entry["state"], entry["reason"] = _state(entry)
    return entry


def _added_again(candidate, previous):
    """Whether this is another Node object than the one of the last document."""
    return previous is not None and bool(candidate["uid"] and previous["uid"]) and candidate["uid"] != previous["uid"]


_OPTION_DEFAULTS = {
    "complete": False,       # the candidates are all nodes of the cluster
    "why_incomplete": "",    # for people
    "port": 51840,           # UDP, of generation 0; generation 1 uses the next
    "generations": GENERATIONS,
    "generation": None,      # 0 or 1, that traffic goes through; None: as in the last document, at first 0
    "forget_nodes": (),
    "exclude_nodes": (),
    "service_cidrs": (),
    "expect_new_keys": False,
    "settings": {},          # settings_of_hosts
    "awaited": (),           # nodes that will report a key later in this run
    "problems": (),          # found on the way here, reported with all others
    "overlaps": None,        # what finds overlaps; None: overlap_problems
    "pod_source": NODE_CIDRS,  # where the pod CIDRs of the candidates come from, see _pods
}


def _check_previous(candidates, previous, options, problems, warnings):
    """Is the last document the newest one, and of this cluster?"""
    on_hosts = newest_on_hosts(options["settings"])
    if on_hosts is not None and on_hosts["serial"] > (previous["serial"] if previous is not None else 0):
        hosts = [host for names in on_hosts["hosts"].values() for host in names]
        problems.append("host %s: keeps mesh document serial %d, newer than the last one given (%s); fetch it and give it as previous, or"
                        " remove it there when it is of another mesh"
                        % (name_list(hosts), on_hosts["serial"], "serial %d" % previous["serial"] if previous is not None else "none"))
    if not options["complete"]:
        return
    if not candidates:
        problems.append("the node list is empty: a cluster has at least one node; is the right cluster asked?")
    if previous is None or not candidates:
        return
    old = {name for name, entry in previous["nodes"].items() if entry["state"] != "excluded"}
    uids = {candidate["name"]: candidate["uid"] for candidate in candidates}
    if old and not old & set(uids) and not old <= set(options["forget_nodes"]):
        problems.append("none of the nodes of the last mesh document (%s) is in the node list (%s): this looks like another cluster; check"
                        " kubeconfig and context, or, if it is right, name all the old nodes in forget_nodes"
                        % (name_list(old), name_list(uids)))
    again = {name for name in old & set(uids) if uids[name] and previous["nodes"][name]["uid"] not in ("", uids[name])}
    if len(again) > 1 and again == old & set(uids):
        warnings.append("all nodes were deleted and added again since the last mesh document (%s): is this another cluster?"
                        % name_list(again))


def _check_identities(nodes, previous, settings, problems):
    """Does the machine behind a host have the key of another node?

    A node keeps its key, and others may send to it by that key: taken as another node's, each of the two would be sent what is for the
    other. Only a name that is not used any more gives its key away: one that is gone from the node list, or excluded.
    """
    if previous is None:
        return
    owners = {key: name for name, entry in previous["nodes"].items() for key in entry["public_keys"].values()
              if name in nodes and nodes[name]["state"] != "excluded"}
    has = {name: own["live_keys"] | set(own["public_keys"].values()) for name, own in settings.items() if name in nodes}
    for name in sorted(has):
        found = {owners[key]: key for key in sorted(has[name]) if owners.get(key, name) != name}
        for owner, key in sorted(found.items()):
            host, other = settings[name]["host"], settings[owner]["host"] if owner in settings else owner
            if key in has.get(owner, ()):
                problems.append("hosts %s and %s: both have public key %s, which is that of node %s in the last mesh document; if both are"
                                " the same machine, correct ansible_host of one; if %s is a copy of the other, remove its mesh devices,"
                                " /etc/kubemesh and the keys in /etc/wireguard, and run the playbook again"
                                % (host, other, key, owner, host))
                continue
            problems.append("hosts %s and %s are mixed up: host %s, which is to be node %s, has public key %s, which is that of node %s in"
                            " the last mesh document; correct ansible_host or mesh_node_name; if that machine was registered anew as %s,"
                            " delete the Node %s, or name it in exclude_nodes or forget_nodes"
                            % (host, other, host, name, key, owner, name, owner))


def nodes_to_examine(document, previous, settings, pod_source):
    """Names of nodes of the last document of which ``document`` says something else that only the node itself can confirm, sorted: node
    addresses, pod CIDRs, or a key that is in use there and that the last document does not know.

    Pod CIDRs that follow the pods come from the pods themselves, so they need no look.
    """
    fields = ("node_addresses", "pod_cidrs") if pod_source == NODE_CIDRS else ("node_addresses",)
    found = []
    for name, before in (previous["nodes"] if previous is not None else {}).items():
        entry, own = document["nodes"].get(name), settings.get(name)
        if entry is None or entry["state"] == "excluded":
            continue
        strange = own is not None and own["live_keys"] - set(before["public_keys"].values())
        if strange or any(set(entry[field]) != set(before[field]) for field in fields):
            found.append(name)
    return sorted(found)


def _check_pod_cidrs(nodes, previous, pod_source, problems, warnings):
    """Does anybody have a pod CIDR? A query that matches nothing, or a cluster that has none, would leave all traffic of pods in clear."""
    takes_part = {name for name, entry in nodes.items() if entry["state"] != "excluded"}
    if not takes_part or any(nodes[name]["pod_cidrs"] for name in takes_part):
        return
    # A Node that was deleted and added again has none at first; it is another one.
    before = previous["nodes"] if previous is not None else {}
    lost = {name for name in takes_part
            if name in before and before[name]["pod_cidrs"] and before[name]["uid"] in ("", nodes[name]["uid"])}
    if lost:
        problems.append("no node has a pod CIDR any more, and %s had one in the last mesh document: all traffic of pods would go in clear;"
                        " correct %s or mesh_pod_cidrs; if it is meant, run the playbook disable first"
                        % (name_list(lost), "pod_cidrs_query" if pod_source == NODE_CIDRS else "pod_source %s" % pod_source))
    elif pod_source == NODE_CIDRS:
        warnings.append("no node has a pod CIDR: traffic of pods goes in clear; set mesh_pod_cidrs for each host, or a pod_cidrs_query that"
                        " finds them in the Node objects, or mesh_pod_source")
    else:
        warnings.append("no node has a pod CIDR: traffic of pods goes in clear; is pod_source %s right for this cluster?" % pod_source)


def _kept_nodes(candidates, previous, options, warnings):
    """Entries of the last document that an incomplete list does not have (I4)."""
    present = {candidate["name"] for candidate in candidates}
    listed = present & set(options["forget_nodes"])
    if listed:
        warnings.append("forget_nodes: %s is still in the node list and stays; delete the Node, or use exclude_nodes" % name_list(listed))
    unknown = set(options["forget_nodes"]) - present - set(previous["nodes"] if previous else ())
    if unknown:
        warnings.append("forget_nodes: %s is in neither the node list nor the last mesh document: there is nothing to forget; if that is"
                        " no typing mistake, take it out" % name_list(unknown))
    if previous is None or options["complete"]:
        return {}
    missing = set(previous["nodes"]) - present - set(options["forget_nodes"])
    if missing:
        warnings.append("the node list is not known to be complete%s: %s stayed from the last mesh document; name those that are gone in"
                        " forget_nodes" % (" (%s)" % options["why_incomplete"] if options["why_incomplete"] else "", name_list(missing)))
    kept = {}
    for name in missing:
        entry = dict(previous["nodes"][name])
        for field in ("public_keys", "probe_addresses"):
            entry[field] = {generation: value for generation, value in entry[field].items() if generation in options["generations"]}
        if name in options["exclude_nodes"]:
            entry = _exclude(entry, REASON_EXCLUDE_NODES)
        elif entry["state"] != "excluded":
            entry["state"], entry["reason"] = _state(entry)
        kept[name] = entry
    return kept


def _ports(port, problems):
    number = _whole_number(port)
    if number is None or not 1 <= number <= 65534:
        problems.append("port: %s is not a UDP port from 1 to 65534 (generation 1 uses the next)" % shown(port))
        number = _OPTION_DEFAULTS["port"]
    return {"0": number, "1": number + 1}


def _generation(options, previous, nodes):
    """Where no document is known, as on a host that joins alone, the others say by their annotations which keys are in use."""
    if options["generation"] is not None:
        return int(generation_text(options["generation"]))
    if previous is not None:
        return previous["generation"]
    number = {generation: sum(generation in entry["public_keys"] for entry in nodes.values()) for generation in GENERATIONS}
    return 1 if number["1"] > number["0"] else 0


def build_document(members, keys, previous, options=None):
    """The next mesh document: ``(document, warnings)``.

    ``members``: candidates; ``keys``: ``{node: {generation: public key}}`` that nodes reported in this run; ``previous``: the last
    document (validated) or None; ``options``: see ``_OPTION_DEFAULTS``. Raises one `MeshError` that lists everything wrong.

    A key comes from ``keys``, else from the annotation, else from the last document; a member without any stays ``pending``. Nodes vanish
    only when the list is complete, or when ``forget_nodes`` names them. The order of ``members`` does not matter. The serial grows by
    one if anything else changed.
    """
    options = dict(_OPTION_DEFAULTS, **(options or {}))
    if options["overlaps"] is None:
        require_libraries()
    options["generations"] = tuple(str(generation) for generation in options["generations"])
    problems, warnings = list(options["problems"]), []
    before = previous["nodes"] if previous is not None else {}
    _check_previous(members, previous, options, problems, warnings)
    kept = _kept_nodes(members, previous, options, warnings)
    nodes = dict(kept)
    for candidate in sorted(members, key=lambda member: member["name"]):
        name = candidate["name"]
        nodes[name] = _entry(candidate, options["settings"].get(name), keys.get(name, {}), before.get(name), options, problems, warnings)
    # What did not change is the same object in both: an agent has several documents of 5,000 nodes in memory, and checks what is new.
    nodes = {name: before[name] if entry == before.get(name) else entry for name, entry in nodes.items()}
    _check_identities(nodes, previous, options["settings"], problems)
    _check_pod_cidrs(nodes, previous, options["pod_source"], problems, warnings)
    unknown = sorted(set(options["exclude_nodes"]) - set(nodes))
    if unknown:
        warnings.append("exclude_nodes: %s is not a node of this cluster" % name_list(unknown))
    document = {"schema": SCHEMA, "serial": 1, "complete": bool(options["complete"]),
                "generation": _generation(options, previous, nodes), "ports": _ports(options["port"], problems),
                "nodes": nodes}
    services = _service_prefixes(options["service_cidrs"], problems)
    problems.extend(shared_identities(nodes, document["ports"]))
    problems.extend((options["overlaps"] or overlap_problems)(
        prefixes_of(nodes, borrowed=options["pod_source"] == "calico_ipam") + services, kept))
    if problems:
        raise joined_error("the mesh document cannot be made, nothing was changed", problems)
    if previous is not None:
        document["serial"] = previous["serial"]
        on_hosts = newest_on_hosts(options["settings"])
        forked = on_hosts is not None and on_hosts["serial"] == previous["serial"] and len(on_hosts["hosts"]) > 1
        # Where nodes keep different documents of one serial, only a new serial can tell them that both are superseded.
        if document != previous or forked:
            document["serial"] += 1
    return validate_document(document, previous), warnings
