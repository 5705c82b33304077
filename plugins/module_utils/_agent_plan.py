# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The node agent's decisions: what news of the API change, who may go, which document follows, what the kernel shall hold.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. Times are seconds of a monotonic clock.

The *base* is the mesh document that a run left on this node: keys, ports, generation, and what people set per host. The *effective*
document is the base with the news of the API, made by the same `_membership.build_document` that the controller uses. A *roster* is what
is known of the API::

    {"members": {name: candidate of `_membership`}, "problems": {name: [text]}, "complete": bool, "missing": {name: since},
     "sure": {names}, "asked": {names}, "own_gone": since or None}

``complete``: a whole list was read, events followed it without a gap, and nothing speaks against it. ``sure``: nodes that the API said to
be deleted, or that a second list lacked as well; ``asked``: those that the next list decides about; ``own_gone``: since when this node's
own Node has been deleted, as the API said in so many words: a list without it is not believed.
"""

from __future__ import annotations

import json
import re

from ansible_collections.kubemesh.wireguard.plugins.module_utils import (
    _link_plan,
    _membership,
    _mesh,
    _pods,
    _published_keys,
    _routes_plan,
    _wg_plan,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import GENERATIONS, MeshError, shown

CONFIG_SCHEMA = 1
STATE_SCHEMA = 1
# What the state says of an agent that has lost what it knew: nodes may have joined and keys have changed since the run whose document is
# there, and the kernel, which goes on as it is, may be ahead of that.
BLIND = ("there is nothing at %s of what this agent knew, and the mesh has more than the document of the last run: nothing is changed"
         " before the list of nodes was read")
# What the state says of an API that is followed
WATCHING = "watching"

# Seconds, a day: who is away for longer is not on its way back.
GRACE_LONGEST = 86400
# Seconds: news are applied when none came for SETTLE, or SETTLE_LONGEST after the first. A Node is often changed several times in a row
# (created, then given its pod CIDR); who waits longer is slower than Calico's daemon, which applies 10 times a second.
SETTLE = 0.05
SETTLE_LONGEST = 0.2
# Seconds between full comparisons with the kernel; jittered, so that not all nodes work at the same time.
COMPARE = (60.0, 90.0)
# Seconds until a peer that did not answer is asked again, by how often it was asked. WireGuard repeats a handshake after 5 s.
PROVE_AGAIN = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# Candidates that are tried one by one when all together make no valid document; the rest waits for the next change.
SINGLE_TRIES = 16
NAMES_SHOWN = 10
# Seconds after which a state is old: it is written every 15.
STATE_OLD = 120

_CONFIG = {
    "node": str, "server": str, "ca_file": (str, type(None)), "token_file": (str, type(None)), "interface": str, "table": int,
    "rule_priority": int, "fwmark": int, "exempt_cidrs": list, "exclude_nodes": list, "service_cidrs": list, "grace": int,
    "document_file": str, "boot_folder": str, "lock_file": str, "runtime": str, "state": str, "metrics_file": str, "pod_source": str,
}


# --- configuration -------------------------------------------------------------------------------------------------------------------

def config_text(config):
    """The configuration as the text of its file. It holds no secret."""
    return json.dumps(dict(config, schema=CONFIG_SCHEMA), sort_keys=True, indent=1) + "\n"


def grace_fault(grace):
    """What is wrong with ``mesh_agent_grace``, or an empty text."""
    if 0 <= grace <= GRACE_LONGEST:
        return ""
    return "mesh_agent_grace: %d is not a number of seconds from 0 to %d" % (grace, GRACE_LONGEST)


def parse_config(text):
    """The configuration of a file's text; `MeshError` for anything else."""
    try:
        config = json.loads(text)
    except ValueError as exc:
        raise MeshError("the agent's configuration is not JSON (%s); run the playbook enable again" % exc) from None
    if not isinstance(config, dict) or config.pop("schema", None) != CONFIG_SCHEMA or set(config) != set(_CONFIG):
        raise MeshError("the agent's configuration is of another version of the collection; run the playbook enable again")
    for field, kind in _CONFIG.items():
        if not isinstance(config[field], kind) or isinstance(config[field], bool):
            raise MeshError("the agent's configuration, %s: %s cannot be used; run the playbook enable again"
                            % (field, shown(config[field])))
    _mesh.check_node_name(config["node"])
    if grace_fault(config["grace"]):
        raise MeshError(grace_fault(config["grace"]))
    # It becomes the name of two devices, with 0 and 1 at its end; names have at most 15 characters (IFNAMSIZ).
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,14}", config["interface"]):
        raise MeshError("mesh_interface: %s is not the stem of a device name" % shown(config["interface"]))
    if config["pod_source"] not in _pods.SOURCES:
        raise MeshError("mesh_pod_source: %s is none of %s" % (shown(config["pod_source"]), ", ".join(_pods.SOURCES)))
    _routes_plan.check_settings(config)
    return config


# --- what the API says ---------------------------------------------------------------------------------------------------------------

def empty_roster():
    """Nothing is known yet."""
    return {"members": {}, "problems": {}, "complete": False, "missing": {}, "sure": frozenset(), "asked": frozenset(),
            "own_gone": None}


def reduced(node):
    """What is kept of a Node object: ``(candidate or None, [problems])``. Never raises for what a cluster can hold."""
    try:
        return _membership.plain_candidate(node)
    except (MeshError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        return None, ["node list: %s" % shown(str(exc), 200)]


def distrust(listing, own):
    """Why a complete list, ``{name: ...}``, is not to be believed, or an empty text. ``own``: the name of this node."""
    if not listing:
        return "the API's list of nodes is empty, and a cluster has at least one node"
    if own not in listing:
        return "node %s is not in the API's list of nodes: is it another cluster, or was this Node deleted?" % own
    return ""


def listed(roster, listing):
    """``(roster, names that changed)`` after a list that is believed; ``listing``: {name: `reduced`}."""
    members = {name: candidate for name, (candidate, dummy) in listing.items() if candidate is not None}
    problems = {name: found for name, (dummy, found) in listing.items() if found}
    changed = {name for name in set(members) | set(roster["members"]) if members.get(name) != roster["members"].get(name)}
    changed |= {name for name in set(problems) | set(roster["problems"]) if problems.get(name) != roster["problems"].get(name)}
    sure = frozenset(name for name in roster["sure"] | roster["asked"] if name not in listing)
    return dict(roster, members=members, problems=problems, complete=True, sure=sure, asked=frozenset()), changed


def happened(roster, name, found):
    """``(roster, whether anything changed that matters)`` after an event. ``found``: `reduced`, or None for a Node that is gone.

    Most events are status updates: they change nothing here.
    """
    candidate, problems = found if found is not None else (None, [])
    if roster["members"].get(name) == candidate and roster["problems"].get(name, []) == problems:
        return roster, False
    members, all_problems = dict(roster["members"]), dict(roster["problems"])
    members.pop(name, None)
    all_problems.pop(name, None)
    if candidate is not None:
        members[name] = candidate
    if problems:
        all_problems[name] = problems
    sure = roster["sure"] - {name} if found is not None else roster["sure"] | {name}
    return dict(roster, members=members, problems=all_problems, sure=sure), True


def lost(roster):
    """The roster when the API is away: what is known stays, and nobody counts as missing any more."""
    return dict(roster, complete=False, missing={}, asked=frozenset(), own_gone=None)


def note_missing(roster, document, own, now):
    """The roster with the time since which each node of a document has been missing. A node that is there again, or whose Node cannot be
    read, is not missing, and neither is one that never came from the API."""
    if not roster["complete"]:
        return dict(roster, missing={}, own_gone=None)
    own_gone = None
    if own not in roster["members"] and own not in roster["problems"]:
        own_gone = now if roster["own_gone"] is None else roster["own_gone"]
    missing = {name: roster["missing"].get(name, now) for name, entry in document["nodes"].items()
               if name != own and entry["uid"] and name not in roster["members"] and name not in roster["problems"]}
    return dict(roster, missing=missing, own_gone=own_gone)


def gone(roster, grace, now):
    """Names that have been missing for the whole grace, and are known not to be missing by mistake."""
    return {name for name, since in roster["missing"].items() if now - since >= grace and name in roster["sure"]}


def doubtful(roster, grace, now):
    """Names that have been missing for the whole grace, of which one list alone says so: it is to be read again before they go."""
    return {name for name, since in roster["missing"].items()
            if now - since >= grace and name not in roster["sure"] and name not in roster["asked"]}


def asked_again(roster, names):
    """The roster after a new list was asked for because of these names."""
    return dict(roster, asked=roster["asked"] | set(names))


def next_gone(roster, grace):
    """When the next node will have been missing for the whole grace; None if none is, or if only a list is waited for."""
    return min((since + grace for name, since in roster["missing"].items() if name in roster["sure"] or name not in roster["asked"]),
               default=None)


def with_own(remembered, roster, document, config, now):
    """What is remembered, with whether the others have forgotten this node: ``forgotten``.

    They do when its Node was deleted for the whole grace. That it is registered again is not enough, kubelet does it without annotations:
    they know its key when its Node has it.
    """
    own, generation = config["node"], str(document["generation"])
    candidate = roster["members"].get(own)
    forgotten = remembered["forgotten"]
    if candidate is not None:
        key = document["nodes"].get(own, {"public_keys": {}})["public_keys"].get(generation)
        forgotten = forgotten and candidate["annotation_keys"].get(generation) != key
    elif roster["own_gone"] is not None and now - roster["own_gone"] >= config["grace"]:
        forgotten = True
    return remembered if forgotten == remembered["forgotten"] else dict(remembered, forgotten=forgotten)


def own_forgotten_at(remembered, roster, grace):
    """When the others will have forgotten this node; None where they have, or nothing speaks for it."""
    if remembered is None or remembered["forgotten"] or roster["own_gone"] is None:
        return None
    return roster["own_gone"] + grace


def settle_at(first, last):
    """When news are applied that came first and last at these times."""
    return min(last + SETTLE, first + SETTLE_LONGEST)


# --- the next document ---------------------------------------------------------------------------------------------------------------

def adopt(document, roster, pod_source):
    """What is remembered about a base document when the API is first seen beside it::

        {"annotations": {name: {generation: text}},          # these are no news: the run knew them, or something better
         "kept": {"pod_cidrs": [names], "node_addresses": [names]},   # the document has other values, so a person set them
         "forgotten": False}                                          # see with_own
    """
    annotations, kept = {}, {"pod_cidrs": [], "node_addresses": []}
    for name, entry in sorted(document["nodes"].items()):
        candidate = roster["members"].get(name)
        if candidate is None or not entry["uid"] or candidate["uid"] != entry["uid"]:
            continue
        annotations[name] = dict(candidate["annotation_keys"])
        # Where prefixes follow the pods, others than before say nothing; the role refuses mesh_pod_cidrs there.
        if pod_source == _pods.NODE_CIDRS and entry["pod_cidrs"] and (
                entry["pod_cidrs"] != _mesh.sorted_cidrs(candidate["pod_cidrs"])):
            kept["pod_cidrs"].append(name)
        if entry["node_addresses"] != _mesh.node_address_order(candidate["node_addresses"]):
            kept["node_addresses"].append(name)
    return {"annotations": annotations, "kept": kept, "forgotten": False}


def _settings(name, remembered):
    """What `_membership` calls the settings of a host: nothing can be computed here, so what the document has stays; but pod CIDRs and
    node addresses follow the API unless a person set them."""
    unresolved = ["mesh_endpoint", "mesh_keepalive", "mesh_mtu"]
    unresolved += ["mesh_" + field for field in ("pod_cidrs", "node_addresses") if name in remembered["kept"][field]]
    return {"host": name, "explicit_name": False, "unresolved": tuple(unresolved), "public_keys": {}, "endpoints": None, "keepalive": None,
            "mtu": None, "pod_cidrs": None, "node_addresses": None, "document": None, "generations": None, "live_keys": frozenset()}


def _new_key(candidate, entry, own, remembered, generation):
    """The public key that the annotation of a member holds instead of the one in use; None where there is no such news.

    Another Node object of the same name is another machine, whose old key nobody has: that one's key counts as it is.
    """
    number = str(generation)
    text = candidate["annotation_keys"].get(number)
    if candidate["name"] == own or entry is None or number not in entry["public_keys"] or not _is_same(candidate, entry):
        return None
    if text == entry["public_keys"][number] or remembered["annotations"].get(candidate["name"], {}).get(number) == text:
        return None
    try:
        return _mesh.canonical_public_key(text)
    except MeshError:
        return None


def new_keys(document, roster, remembered, own):
    """``{name: public key}`` that annotations hold instead of the keys in use. They are to be proven before they count."""
    found = {}
    for name, candidate in sorted(roster["members"].items()):
        key = _new_key(candidate, document["nodes"].get(name), own, remembered, document["generation"])
        if key is not None and name not in roster["problems"] and not candidate["excluded"]:
            found[name] = key
    return found


def with_keys(document, keys):
    """``(document, {name: public key})``: a document of members with other keys, and those that can be tried: nobody has them yet."""
    if not keys:
        return document, {}
    generation, nodes, tried = str(document["generation"]), dict(document["nodes"]), {}
    used = {value for entry in nodes.values() for field in ("public_keys", "probe_addresses") for value in entry[field].values()}
    for name, key in sorted(keys.items()):
        address = _mesh.probe_address(key)
        if _mesh.is_peer(nodes[name], generation) and not used & {key, address}:
            used |= {key, address}
            nodes[name] = dict(nodes[name], public_keys=dict(nodes[name]["public_keys"], **{generation: key}),
                               probe_addresses=dict(nodes[name]["probe_addresses"], **{generation: address}))
            tried[name] = key
    return dict(document, nodes=nodes), tried


def trial_peers(document, node, tried):
    """The peers of `with_keys` as a device has them while they are tried: with nothing but what a probe needs."""
    if not tried:
        return {}
    generation, keys = str(document["generation"]), set(tried.values())
    return {key: dict(peer, allowed_ips=[_mesh.host_cidr(document["nodes"][peer["name"]]["probe_addresses"][generation])])
            for key, peer in _mesh.peers_of(document, node, generation).items() if key in keys}


def key_texts(document, roster, waiting, own):
    """What people must know of keys that annotations hold and that are not those in use. ``waiting``: `new_keys` that are not proven."""
    texts = ["node %s: its annotation %s holds another key than the one in use, which stays until the node was reached with the new one; if"
             " nobody made a new key, find out who changed the annotation; if the node has it, and with preshared keys, run the playbook"
             " reconcile" % (name, _membership.ANNOTATIONS[str(document["generation"])]) for name in sorted(waiting)]
    generation = str(document["generation"])
    has = document["nodes"].get(own, {"public_keys": {}})["public_keys"].get(generation)
    said = roster["members"].get(own, {"annotation_keys": {}})["annotation_keys"].get(generation, has)
    if has is not None and said != has:
        texts.append("node %s, which is this one: its annotation %s holds another key than the node has; find out who changed it, and run"
                     " the playbook reconcile" % (own, _membership.ANNOTATIONS[generation]))
    return texts


def _with_news(candidate, entry, own, remembered, generation, proven_keys):
    """A candidate whose annotations count only where they are news: a run that ended later than an annotation was written knew better.

    Nobody else says what this node's own key is: it is in the device, and its annotation can but agree. Keys of another ``generation`` than
    the one in use are the business of rotations; after one, the annotation of the old key may be left.
    """
    keys = {number: text for number, text in candidate["annotation_keys"].items() if number == str(generation)
            and (candidate["name"] != own or (entry is not None and entry["public_keys"].get(number) == text))}
    if entry is not None and entry["uid"] == candidate["uid"]:
        known = remembered["annotations"].get(candidate["name"], {})
        keys = {number: text for number, text in keys.items() if number not in entry["public_keys"] or known.get(number) != text}
    if _new_key(candidate, entry, own, remembered, generation) not in proven_keys | {None}:
        keys = {}
    return dict(candidate, annotation_keys=keys)


def _is_same(candidate, entry):
    """Whether this is the Node object that the entry of the document was made of."""
    return candidate["uid"] in ("", entry["uid"])


def _with_lost(candidates, before, remembered, pod_source):
    """``(candidates, [texts for people])``: what a Node object had and does not have any more is taken from the document.

    The API server refuses to take a Node's pod CIDRs away, and a node has an address as long as it is one: where they are gone, it is the
    answer that is wrong, most likely for all nodes, and the mesh must not go with it. Prefixes of pods come and go, but not all at once.
    One address family counts by itself: a kubelet that comes back with half of its configuration has one of two addresses.
    """
    fields = ["node_addresses"]
    if pod_source == _pods.NODE_CIDRS or not any(candidate["pod_cidrs"] for candidate in candidates if candidate["name"] in before):
        fields.append("pod_cidrs")
    found, lost = [], {}
    # What another has now is its.
    owners = {(field, text): candidate["name"] for candidate in candidates for field in fields for text in candidate[field]}
    for candidate in candidates:
        name, entry = candidate["name"], before.get(candidate["name"])
        for field in fields if entry is not None and entry["state"] != "excluded" and _is_same(candidate, entry) else ():
            families = {_mesh.family_of(text) for text in candidate[field]}
            vanished = [text for text in entry[field] if _mesh.family_of(text) not in families and (field, text) not in owners]
            if vanished:
                candidate = dict(candidate, **{field: list(candidate[field]) + vanished})
                if name not in remembered["kept"][field]:
                    lost.setdefault(field, set()).add(name)
        found.append(candidate)
    what = {"node_addresses": "status.addresses has no InternalIP, or none of a family,",
            "pod_cidrs": "spec.podCIDRs has nothing, or nothing of a family,"}
    if pod_source != _pods.NODE_CIDRS:
        what["pod_cidrs"] = "pod_source %s has no prefix of any pod" % pod_source
    return found, ["%s any more, for %s: what the mesh has stays; look at what the API says of them, and if it is meant, run the playbook"
                   " reconcile" % (what[field], _membership.name_list(names)) for field, names in sorted(lost.items())]


def _as_they_are(before, roster, exclude_nodes):
    """``(names of entries that only a run may change, [texts for people])``.

    Who leaves the mesh has to stop sending before the others stop accepting, and its own agent cannot make them wait. And what does not
    come from the API cannot be gone from there, nor be corrected by it.
    """
    leaving = {}
    for name, entry in before.items():
        candidate = roster["members"].get(name)
        if entry["state"] != "excluded" and candidate is not None and _is_same(candidate, entry):
            reason = candidate["excluded"] or (_membership.REASON_EXCLUDE_NODES if name in exclude_nodes else "")
            if reason:
                leaving[name] = reason
    foreign = {name for name, entry in before.items() if not entry["uid"]}
    texts = ["node %s is to be excluded (%s): run the playbook reconcile, which takes it out without a gap; until then it stays in the mesh"
             % (name, leaving[name]) for name in sorted(leaving)]
    if foreign:
        texts.append("the mesh document has no uid for %s, so the Nodes of the API are not known to be the same and what becomes of them is"
                     " not followed: run the playbook reconcile with mesh_nodes_source kubernetes or kubectl"
                     % _membership.name_list(foreign))
    return foreign | set(leaving), texts


def _from_entry(name, entry):
    """The candidate of a node that the API does not show (now), as the document has it."""
    return {"name": name, "uid": entry["uid"], "excluded": entry["reason"] if entry["state"] == "excluded" else "",
            "pod_cidrs": entry["pod_cidrs"], "node_addresses": entry["node_addresses"], "endpoints": None,
            "annotation_keys": {}}


def _build(candidates, previous, remembered, config, kept):
    settings = {candidate["name"]: _settings(candidate["name"], remembered) for candidate in candidates}
    for name in kept:
        settings[name] = None
    document, warnings = _membership.build_document(candidates, {}, previous, {
        "complete": True, "port": previous["ports"]["0"], "generation": previous["generation"],
        # Who is a member leaves by a run, see _as_they_are.
        "exclude_nodes": [name for name in config["exclude_nodes"]
                          if name not in previous["nodes"] or previous["nodes"][name]["state"] == "excluded"],
        "service_cidrs": config["service_cidrs"], "pod_source": config["pod_source"],
        "settings": {name: own for name, own in settings.items() if own is not None},
        "overlaps": _membership.plain_overlap_problems})
    # Settings that this node alone has, and a document that is this node's alone: what others are told comes from runs.
    return dict(document, ports=previous["ports"], complete=previous["complete"]), warnings


def _in_the_way(entries, candidates, pod_source):
    """Names of ``entries`` whose addresses or keys belong to one of the candidates now: a Node's pod CIDR and address are given to the next
    one as soon as it is gone."""
    nodes = {name: entry for name, entry in entries.items() if entry["state"] != "excluded"}
    if not nodes:
        return set()
    taken = [(cidr, ("", candidate["name"])) for candidate in candidates for cidr in candidate["pod_cidrs"]]
    taken += [(_mesh.host_cidr(address), ("", candidate["name"])) for candidate in candidates for address in candidate["node_addresses"]]
    keys = {key for candidate in candidates for key in candidate["annotation_keys"].values() if isinstance(key, str)}
    held = [(cidr, (name, "")) for name, entry in nodes.items() for cidr in entry["pod_cidrs"]]
    held += [(_mesh.host_cidr(address), (name, "")) for name, entry in nodes.items() for address in entry["node_addresses"]]
    found = {name for name, entry in nodes.items() if keys & set(entry["public_keys"].values())}
    for (wide, one), (narrow, other) in _mesh.find_overlaps(set(taken + held), lambda one, other: bool(one[0]) != bool(other[0])):
        # What is borrowed from a block leaves the rest of it where it is.
        if pod_source != "calico_ipam" or wide == narrow or not _mesh.is_host(narrow):
            found.add(one[0] or other[0])
    return found


def next_document(previous, roster, remembered, config, now, proven_keys=frozenset()):
    """``(document, [texts for people])`` that follows a document and the roster.

    Nodes that are missing stay until their grace is over, or until the API gives what they have to another. A Node that cannot be used
    (its CIDR overlaps another's, its key is that of two) leaves what was there as it was, and does not stop the others. A key takes the
    place of one in use only if it is one of ``proven_keys``: those of `new_keys` with which their nodes were reached.
    """
    own = config["node"]
    over = gone(roster, config["grace"], now)
    before = previous["nodes"]
    texts = [text for name in sorted(roster["problems"]) for text in roster["problems"][name]]
    untouched, more = _as_they_are(before, roster, config["exclude_nodes"])
    texts += more
    news = [_with_news(candidate, before.get(name), own, remembered, previous["generation"], proven_keys)
            for name, candidate in sorted(roster["members"].items()) if name not in roster["problems"] and name not in untouched]
    news, more = _with_lost(news, before, remembered, config["pod_source"])
    texts += more
    absent = {name: entry for name, entry in before.items()
              if name not in roster["members"] or name in roster["problems"] or name in untouched}
    absent = {name: entry for name, entry in absent.items() if name not in over}
    gives_way = _in_the_way({name: entry for name, entry in absent.items() if name in roster["missing"]}, news, config["pod_source"])
    kept = sorted(set(absent) - gives_way)
    stays = [_from_entry(name, before[name]) for name in kept]
    try:
        document, warnings = _build(news + stays, previous, remembered, config, kept)
        return document, texts + warnings
    except MeshError as exc:
        texts += exc.problems
    document, warnings = _one_by_one(news, stays, previous, remembered, config, kept)
    return document, texts + warnings


def _one_by_one(news, stays, previous, remembered, config, kept):
    """The document with those news that can be taken, where all together cannot. What is as before is taken together."""
    before = previous["nodes"]
    document, warnings = previous, []
    settled = [candidate for candidate in news if candidate["name"] in before]
    changed = []
    for candidate in settled:
        entry = before[candidate["name"]]
        same = (entry["uid"] == candidate["uid"] and not candidate["annotation_keys"]
                and entry["pod_cidrs"] == _mesh.sorted_cidrs(candidate["pod_cidrs"])
                and entry["node_addresses"] == _mesh.node_address_order(candidate["node_addresses"]))
        if not same:
            changed.append(candidate)
    changed += [candidate for candidate in news if candidate["name"] not in before]
    names = {candidate["name"] for candidate in changed}
    taken = {candidate["name"]: candidate for candidate in news + stays if candidate["name"] not in names}
    as_before = {name: _from_entry(name, before[name]) for name in names if name in before}
    try:
        document, warnings = _build(list(dict(as_before, **taken).values()), previous, remembered, config, kept + sorted(as_before))
    except MeshError:
        return previous, []
    for candidate in changed[:SINGLE_TRIES]:
        attempt = dict(as_before, **taken)
        attempt[candidate["name"]] = candidate
        still = set(kept) | (set(as_before) - {candidate["name"]})
        try:
            document, warnings = _build(list(attempt.values()), previous, remembered, config, sorted(still))
        except MeshError:
            continue
        taken[candidate["name"]] = candidate
        as_before.pop(candidate["name"], None)
    return document, warnings


def own_patch(document, candidate):
    """The patch of `_published_keys` by which a node offers its public key to the API; None where there is nothing to do.

    ``candidate``: its own Node. One that is not the Node of the document may stand for another machine, which this key is not of: a run
    finds out. While a node has two keys, a rotation is under way: it publishes the new one and takes the old one back before the node
    knows, and what it took back must not come again.
    """
    entry = document["nodes"].get(candidate["name"])
    if entry is None or len(entry["public_keys"]) != 1:
        return None
    patches = _published_keys.patches_to_publish({candidate["name"]: entry}, [candidate], tuple(entry["public_keys"]))
    return patches[0] if patches else None


# --- what the kernel shall hold ------------------------------------------------------------------------------------------------------

def hindrance_of_own(remembered, roster, own):
    """Why this node sends nothing into the tunnels, or an empty text."""
    if remembered is None or not remembered["forgotten"]:
        return ""
    how = "deleted and registered again without its key" if own in roster["members"] else "deleted"
    return "the Node of this node was %s, so the others do not accept what it sends, and it sends nothing through the mesh: %s" % (
        how, "run the playbook reconcile" if own in roster["members"] else "when it is registered again, run the playbook reconcile")


def hindrance(document, node, has_key):
    """Why this agent leaves the kernel alone, or an empty text. ``has_key``: the public key of the device, None where there is none."""
    entry = document["nodes"].get(node)
    if entry is None:
        return "node %s is not in the mesh document: run the playbook reconcile or enable on it" % node
    if entry["state"] == "excluded":
        return "node %s is excluded from the mesh (%s)" % (node, entry["reason"])
    if len(entry["public_keys"]) > 1:
        return "a rotation of keys is under way: the playbook rotate_keys goes on with it, and this agent when it has ended"
    key = entry["public_keys"].get(str(document["generation"]))
    if key is None:
        return "node %s has no key of generation %d in the mesh document: run the playbook enable on it" % (node, document["generation"])
    if has_key is None:
        return "there is no mesh device of generation %d: run the playbook enable on this node" % document["generation"]
    if has_key != key:
        return "the mesh device has another key than the mesh document says: run the playbook enable on this node"
    return ""


def plan_device(state, link, document, applied, config, ipv6, trial=None, tried=frozenset()):
    """``(link steps, device steps before the routes, device steps after them)``, as `_link_plan` and `_wg_plan` make them.

    ``applied``: the document that the kernel was last brought to, or None. A peer that the document of then had and this one has not is
    removed by its key; others that are not wanted are removed only where every member's key is known (invariant I4). ``trial``:
    `trial_peers`, beside those of the document; ``tried``: keys that were among them before.
    """
    node, generation = config["node"], str(document["generation"])
    peers = dict(_mesh.peers_of(document, node, generation), **(trial or {}))
    secret = any(peer["has_preshared_key"] for peer in state["peers"].values())
    if secret:
        # Only the controller can derive a preshared key: without one a new peer would be one that cannot be reached.
        peers = {key: peer for key, peer in peers.items() if key in state["peers"]}
    members = [entry for entry in document["nodes"].values() if entry["state"] != "excluded"]
    own = document["nodes"][node]
    steps = _wg_plan.plan_device(state, {
        "public_key": own["public_keys"][generation], "listen_port": document["ports"][generation], "fwmark": config["fwmark"],
        "keep_unknown_peers": any(generation not in entry["public_keys"] for entry in members), "peers": peers,
    }, endpoints_of(applied, node, generation))
    if secret:
        steps = _without_preshared(steps)
    planned = {step["public_key"] for step in steps if step["op"] == "remove_peer"}
    leavers = (keys_of(applied, node, generation) | tried) - keys_of(document, node, generation) - set(trial or ()) - planned
    steps += [{"op": "remove_peer", "public_key": key} for key in sorted(leavers) if key in state["peers"]]
    removals = ("remove_peer", "remove_allowed_ips")
    before, after = _link_plan.plan_link(link, {
        "interface": state["name"], "implementation": "kernel" if link["kind"] == "wireguard" else "userspace",
        "mtu": own["mtu"] or _link_plan.MTU_DEFAULT,
        "addresses": [text for text in _mesh.device_addresses(document, node, generation) if ipv6 or ":" not in text]})
    return before + after, [step for step in steps if step["op"] not in removals], [step for step in steps if step["op"] in removals]


def _without_preshared(steps):
    kept = []
    for step in steps:
        step = {field: value for field, value in step.items() if field != "preshared_key_file"}
        if step["op"] != "update_peer" or len(step) > 2:
            kept.append(step)
    return kept


def endpoints_of(document, node, generation):
    """{public key: endpoint} of a document's peers; empty where there is no such view."""
    if document is None or not _mesh.is_peer(document["nodes"].get(node) or {"state": "excluded", "public_keys": {}}, generation):
        return {}
    return {key: peer["endpoint"] for key, peer in _mesh.peers_of(document, node, generation).items() if peer["endpoint"]}


def is_ahead(state, document, node):
    """Whether a device accepts more than a document says: from peers, or prefixes of peers, that came since.

    To bring it to the document would take away what is in use, only because the one who knew of it has forgotten.
    """
    peers = _mesh.peers_of(document, node, str(document["generation"]))
    return any(set(peer["allowed_ips"]) - set(peers[key]["allowed_ips"] if key in peers else ())
               for key, peer in state["peers"].items())


def keys_of(document, node, generation):
    """The public keys of a document's other members, as a set."""
    if document is None:
        return set()
    return {entry["public_keys"][generation] for name, entry in document["nodes"].items()
            if name != node and entry["state"] != "excluded" and generation in entry["public_keys"]}


def route_settings(config, interface, stored_rules):
    """The settings of `_routes_plan.wanted_state`: whether and what this node sends is what a run wrote down for the next boot."""
    return {
        "interface": interface, "table": config["table"], "rule_priority": config["rule_priority"], "fwmark": config["fwmark"],
        "encrypt": "nodes" if any(rule["not_fwmark"] for rule in stored_rules) else "pods", "send": bool(stored_rules),
        "unproven": "keep", "exempt_cidrs": config["exempt_cidrs"], "iifs": sorted({rule["iif"] for rule in stored_rules} - {""}),
        "own_cidrs": None}


def routed_now(routes, applied, document, node, table, state):
    """The routes of the kernel with the names of their peers, as far as peer and key are the same as before.

    These are the ones that stay though their peer is not proven now (it may only be away). What belongs to another peer, or to one with
    another key, is not among them: nothing is sent there before it is proven (invariant I1). ``state``: that of the device. Where it gives
    a prefix to another key, that is where the route leads now, whatever ``applied`` says: it may be older than what is in the kernel.
    """
    if applied is None:
        return []
    owners = {}
    for first, second in ((table, "pods"), (table + 1, "nodes")):
        owners.update({(first, dst): peer for dst, peer in _mesh.table_routes(applied, node)[second]})
    holders = {prefix: key for key, peer in state["peers"].items() for prefix in peer["allowed_ips"]}
    generation = str(document["generation"])
    found = []
    for route in routes:
        peer = owners.get((route["table"], route["dst"]))
        old, new = applied["nodes"].get(peer), document["nodes"].get(peer)
        if not (peer and old and new):
            continue
        key = new["public_keys"].get(generation)
        if key == old["public_keys"].get(generation) and holders.get(route["dst"], key) == key:
            found.append(dict(route, peer=peer))
    return found


def early_removals(current, wanted, moved):
    """Steps for routes to prefixes that the device is about to give to another peer, where they are not wanted: these go first.

    All other routes follow the device in, and go before it out, see `_routes_plan.plan_routes`.
    """
    stays = {(route["table"], route["dst"]) for route in wanted["routes"]}
    return [{"op": "remove_route", "route": route} for route in current["routes"]
            if route["dst"] in moved and (route["table"], route["dst"]) not in stays]


def moved_prefixes(state, steps):
    """Prefixes that device steps give to another peer than the one that has them now."""
    owners = {prefix: key for key, peer in state["peers"].items() for prefix in peer["allowed_ips"]}
    return {prefix for step in steps if step["op"] in ("add_peer", "add_allowed_ips") for prefix in step["allowed_ips"]
            if owners.get(prefix) not in (None, step["public_key"])}


def prove_again(asked):
    """Seconds until a peer is asked again that was asked so many times (from 1) without an answer."""
    return PROVE_AGAIN[min(max(asked, 1), len(PROVE_AGAIN)) - 1]


def guard_words(steps):
    """Steps of `_guard_plan.plan_guard` in a few words."""
    found = []
    for step in steps:
        if step["op"] == "change_elements":
            found.append("%s: %d in, %d out" % (step["set"], len(step["add"]), len(step["remove"])))
        else:
            found.append("the table is loaded, %s" % step["reason"])
    return ", ".join(found)


# --- what is told ----------------------------------------------------------------------------------------------------------------------

METRICS = (
    ("kubemesh_peer_handshake_age_seconds", "gauge", "Seconds since the last handshake with a peer; absent where there never was one."),
    ("kubemesh_peer_receive_bytes_total", "counter", "Bytes received from a peer."),
    ("kubemesh_peer_transmit_bytes_total", "counter", "Bytes sent to a peer."),
    ("kubemesh_peer_encrypted", "gauge", "Whether traffic to a peer goes through the tunnel, as far as this node knows (1 or 0)."),
    ("kubemesh_guard_dropped_packets_total", "counter", "Packets that strict mode dropped, as they were not in the tunnel."),
)


def metrics_text(rows, summary, dropped=None):
    """What node_exporter's textfile collector reads. ``rows``: of `_status.join`; ``summary``: `state_of`, with the state of the guard;
    ``dropped``: the counters of the guard, where there is one.

    Names of nodes are checked before they get here, and keys are base64, so neither needs quoting.
    """
    values = {name: [] for name, dummy, dummy2 in METRICS}
    for name, counts in sorted((dropped or {}).items()):
        values["kubemesh_guard_dropped_packets_total"].append(('{what="%s"}' % name, counts["packets"]))
    for row in rows:
        unknown = row["name"] == "(unknown)"
        label = '{peer="%s"}' % ("unknown " + row["public_key"][:8] if unknown else row["name"])
        if row["handshake_age"] is not None:
            values["kubemesh_peer_handshake_age_seconds"].append((label, row["handshake_age"]))
        values["kubemesh_peer_receive_bytes_total"].append((label, row["rx_bytes"]))
        values["kubemesh_peer_transmit_bytes_total"].append((label, row["tx_bytes"]))
        values["kubemesh_peer_encrypted"].append((label, int(row["state"] == "encrypted")))
    lines = []
    for name, kind, text in METRICS:
        lines += ["# HELP %s %s" % (name, text), "# TYPE %s %s" % (name, kind)]
        lines += ["%s%s %d" % (name, label, value) for label, value in values[name]]
    for name, text, value in (
            ("kubemesh_agent_generation", "Generation of keys that traffic goes through.", summary["generation"]),
            ("kubemesh_agent_peers", "Peers of this node.", len(rows)),
            ("kubemesh_agent_api_up", "Whether the list of nodes is up to date (1 or 0).", int(summary["api"] == WATCHING)),
            ("kubemesh_agent_lag_seconds", "Seconds from the first of the last news of the API to the kernel.", summary["lag"]),
            ("kubemesh_agent_unproven_peers", "Peers without routes, because they were not reached through the tunnel.",
             summary["unproven_count"]),
            ("kubemesh_agent_ok", "Whether the agent does its work (1), or something is in its way (0).", int(not summary["hindrance"])),
            ("kubemesh_guard_in_force", "Whether strict mode's guard is as it shall be (1 or 0); absent without strict mode.",
             None if summary["guard"] == "off" else int(summary["guard"] == "in force")),
            ("kubemesh_agent_written_timestamp_seconds", "When this was written, by the clock of this node.", summary["time"])):
        if value is not None:
            number = "%.6g" % value if value < 1e6 else "%d" % value
            lines += ["# HELP %s %s" % (name, text), "# TYPE %s gauge" % name, "%s %s" % (name, number)]
    return "\n".join(lines) + "\n"


def state_of(document, api, hindrance_text, texts, lag, unproven, lock, counts, now_epoch):
    """What ``status`` is told: small, whatever the size of the mesh."""
    return {
        "schema": STATE_SCHEMA, "api": api, "hindrance": hindrance_text, "warnings": texts[:NAMES_SHOWN], "warning_count": len(texts),
        "lag": lag, "unproven": sorted(unproven)[:NAMES_SHOWN], "unproven_count": len(unproven), "waits_for_run": lock,
        "serial": document["serial"] if document else None, "generation": document["generation"] if document else None,
        "nodes": len(document["nodes"]) if document else 0, "time": now_epoch, "counts": counts}


def parse_state(text):
    """What `state_of` made and was written; None for anything else."""
    try:
        state = json.loads(text)
    except ValueError:
        return None
    wanted = {"schema", "api", "hindrance", "warnings", "warning_count", "lag", "unproven", "unproven_count", "waits_for_run", "serial",
              "generation", "nodes", "time", "counts", "base", "guard"}
    # The agent's user is less than root, who reads this.
    if not isinstance(state, dict) or set(state) != wanted or state["schema"] != STATE_SCHEMA:
        return None
    if not isinstance(state["time"], (int, float)):
        return None
    texts = [state[field] for field in ("api", "hindrance", "waits_for_run", "guard")]
    for field in ("warnings", "unproven"):
        if not isinstance(state[field], list) or len(state[field]) > NAMES_SHOWN:
            return None
        texts += state[field]
    return state if all(isinstance(text, str) for text in texts) else None


def api_warning(api, node, server):
    """What people must know about an agent that was started and says this of the API, or an empty text."""
    if api == WATCHING:
        return ""
    return ("node %s: the agent was started and does not follow the API server %s: %s. The mesh of this node stays as it is until it does; "
            "look at journalctl -u kubemesh-agent, and run the playbook again when files or rights were put right"
            % (node, server, api or "it has said nothing yet"))


def state_warnings(state, active, now_epoch):
    """What people must know about an agent. ``now_epoch``: by the clock that `state_of` was given."""
    if not active:
        return ["the node agent does not run: look at journalctl -u kubemesh-agent"]
    if state is None:
        return ["the node agent has not said anything yet"]
    warnings = []
    if abs(now_epoch - state["time"]) > STATE_OLD:
        warnings.append("the node agent has said nothing for %d s: look at journalctl -u kubemesh-agent" % abs(now_epoch - state["time"]))
    if state["hindrance"]:
        warnings.append("the node agent does nothing: %s" % state["hindrance"])
    if state["api"] != WATCHING:
        warnings.append("the node agent does not know what changes in the cluster: %s" % state["api"])
    return warnings + ["the node agent: %s" % text for text in state["warnings"]]


# --- what is kept over a restart --------------------------------------------------------------------------------------------------------

def memory_text(base_sha256, document, remembered, applied, boot_id):
    """The text of the file that the agent keeps: the effective document, what belongs to its base, and what the kernel holds.

    ``applied``: the document that the kernel was brought to in this boot. It is written in full only where it is another one: the kernel
    is behind while a run holds the lock, or where something is in the way.
    """
    return json.dumps({"schema": STATE_SCHEMA, "base": base_sha256, "document": document, "remembered": remembered, "boot_id": boot_id,
                       "applied": None if applied == document else applied}, sort_keys=True, separators=(",", ":")) + "\n"


def parse_applied(text, boot_id):
    """The document that the kernel was brought to, by memory of this boot; None where there is none: then it holds what a run, or the
    boot files that a run left, made of the base."""
    try:
        kept = json.loads(text)
        if kept["schema"] != STATE_SCHEMA or kept["boot_id"] != boot_id:
            return None
        return _mesh.validate_document(kept["document"] if kept["applied"] is None else kept["applied"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MeshError):
        return None


def parse_memory(text, base_sha256):
    """``(document, remembered)`` that were kept beside this base; ``(None, None)`` for anything else: the base is what counts then."""
    try:
        kept = json.loads(text)
        if kept["schema"] != STATE_SCHEMA or kept["base"] != base_sha256:
            return None, None
        remembered = kept["remembered"]
        if remembered is not None:
            remembered = {
                "annotations": {str(name): {str(generation): str(key) for generation, key in keys.items() if str(generation) in GENERATIONS}
                                for name, keys in remembered["annotations"].items()},
                "kept": {field: [str(name) for name in remembered["kept"][field]] for field in ("pod_cidrs", "node_addresses")},
                "forgotten": bool(remembered["forgotten"])}
        return _mesh.validate_document(kept["document"]), remembered
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MeshError):
        return None, None
