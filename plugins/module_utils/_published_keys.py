# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Public keys as annotations of Node objects: which ones are to be written, and how far writing goes.

The first part is pure: plain data in, plain data out. `apply_patches` runs what it is given in a few threads; who talks to the cluster,
from the controller or from a host with kubectl, is outside.

What is *wanted* is what the mesh document says: ``{node: {"uid": text, "public_keys": {generation: key}}}``. Nodes are candidates of
`_membership`, or the same cut down to ``{"name", "uid", "annotation_keys": {generation: anything}}``. A *patch* is
``{"node", "uid", "before": {generation: text for people or None}, "after": {generation: key or None}}``; None is no annotation.
"""

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import ANNOTATIONS, name_list
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    GENERATIONS,
    MeshError,
    canonical_public_key,
    check_node_name,
    shown,
)

# What became of a patch
DONE = "done"
GONE = "gone"          # there is no such Node any more
REPLACED = "replaced"  # there is another one under its name
FAILED = "failed"      # this Node could not be written, others may
AWAY = "away"          # neither could others

# Patches between two looks at whether to go on. One alone comes first: what is refused to it is most likely refused to all.
BATCH = 100
# Nodes that could not be written, after which the rest is not tried: the fault is not theirs.
FAILURES_MAX = 10
# Seconds for one request. Kubernetes' own API server gives up after 60; a run should not stand still that long for each Node.
REQUEST_TIMEOUT = 30

_TOO_MANY_REQUESTS = 429


def wanted_of(document):
    """What is wanted, of a validated mesh document."""
    return {name: {"uid": entry["uid"], "public_keys": dict(entry["public_keys"])} for name, entry in document["nodes"].items()}


def nodes_read(items):
    """Nodes of parsed Node objects; what has no name or uid of a Node is left aside."""
    result = []
    for item in items:
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("uid"), str):
            continue
        try:
            check_node_name(metadata.get("name"))
        except MeshError:
            continue
        annotations = metadata.get("annotations")
        annotations = annotations if isinstance(annotations, dict) else {}
        result.append({"name": metadata["name"], "uid": metadata["uid"], "annotation_keys": {
            generation: annotations[name] for generation, name in ANNOTATIONS.items() if name in annotations}})
    return result


def _text(value):
    """A key as it is; anything else that an annotation may hold so that it can be shown."""
    try:
        return canonical_public_key(value)
    except MeshError:
        return shown(value)


def _patch(node, after):
    found = node["annotation_keys"]
    return {"node": node["name"], "uid": node["uid"], "after": after,
            "before": {generation: _text(found[generation]) if generation in found else None for generation in after}}


def patches_to_publish(wanted, nodes, generations=GENERATIONS):
    """Patches that make the annotations what the mesh document says, by node name; of other generations nothing is touched.

    Left alone is a Node that the document does not have (it joined since), and one that is not the Node that the document was made of: the
    keys are those of another machine, or of the same one before it was installed anew.
    """
    result = []
    for node in sorted(nodes, key=lambda node: node["name"]):
        entry = wanted.get(node["name"])
        if entry is None or entry["uid"] not in ("", node["uid"]):
            continue
        after = {generation: entry["public_keys"].get(generation) for generation in generations
                 if entry["public_keys"].get(generation) != node["annotation_keys"].get(generation)}
        if after:
            result.append(_patch(node, after))
    return result


def patches_to_remove(wanted, nodes, generations=GENERATIONS):
    """Patches that take the annotations from all Nodes, by node name.

    Raises `MeshError` when none of the Nodes is one of the mesh document: it is another cluster, and its annotations are not ours. A
    document whose nodes have no uid was not made of Node objects, so its keys were never published.
    """
    uids = {entry["uid"] for entry in wanted.values()} - {""}
    if not uids:
        return []
    annotated = [node for node in sorted(nodes, key=lambda node: node["name"]) if node["annotation_keys"]]
    if annotated and not uids & {node["uid"] for node in nodes}:
        raise MeshError("the public keys on Nodes of this cluster (%s) are not of this mesh: none of the nodes of the mesh document (%s) is"
                        " one of its Nodes; check kubeconfig and context"
                        % (name_list(node["name"] for node in annotated), name_list(wanted)))
    result = []
    for node in annotated:
        after = {generation: None for generation in generations if generation in node["annotation_keys"]}
        if after:
            result.append(_patch(node, after))
    return result


def plan(state, wanted, nodes, generations=GENERATIONS):
    """The patches that ``state`` (present or absent) takes."""
    return (patches_to_publish if state == "present" else patches_to_remove)(wanted, nodes, generations)


def annotation_changes(members, document):
    """``{node: {annotation: public key or None}}``: what to publish on the Nodes, only where it differs. None: remove it."""
    return {patch["node"]: {ANNOTATIONS[generation]: key for generation, key in patch["after"].items()}
            for patch in patches_to_publish(wanted_of(document), members)}


def body_of(patch):
    """The merge patch. With the uid, the API refuses it for a Node that was made anew under the same name (422, the uid is immutable)."""
    return {"metadata": {"uid": patch["uid"], "annotations": {
        ANNOTATIONS[generation]: key for generation, key in patch["after"].items()}}}


def lines_of(patches, side):
    """Lines for people: the annotations before or after."""
    return ["node %s, %s: %s" % (patch["node"], ANNOTATIONS[generation], patch[side][generation])
            for patch in patches for generation in sorted(patch["after"]) if patch[side][generation] is not None]


# --- what the API says to a patch ----------------------------------------------------------------------------------------------------

def verdict(status, message):
    """What became of a patch. ``status``: HTTP status, None where there was no answer; ``message``: that of the answer."""
    if status is None or status == 401 or status == _TOO_MANY_REQUESTS or status >= 500:
        return AWAY
    if status == 404:
        return GONE
    if status in (409, 422) and "uid" in message.lower():
        return REPLACED
    return FAILED


def kubectl_verdict(rc, stderr):
    """The same for kubectl, which says it in words: ``Error from server (Reason): message``, or an invalid object without a reason."""
    if rc == 0:
        return DONE
    if "(NotFound)" in stderr:
        return GONE
    if "metadata.uid" in stderr or ("(Conflict)" in stderr and "uid" in stderr.lower()):
        return REPLACED
    if "Error from server (" in stderr and not any(
            "(%s)" % reason in stderr for reason in ("Timeout", "InternalError", "ServiceUnavailable", "TooManyRequests", "Unauthorized")):
        return FAILED
    if stderr.startswith("The Node "):
        return FAILED
    return AWAY


def apply_patches(patches, send, workers, tell=None):
    """Have all patches sent: ``{"done": [names], "gone": [names], "replaced": [names], "failed": [[name, failure]], "left": number}``.

    ``send``: takes a patch, gives ``(verdict, what went wrong)``, and raises nothing; it runs in ``workers`` threads. ``tell``: takes how
    many were tried. When the API is away, refuses the first ones or too many, the rest is left.
    """
    # Here, as the node agent imports this file on every node, never comes here, and would keep threads' machinery and logging in memory.
    from concurrent.futures import ThreadPoolExecutor

    outcome = {DONE: [], GONE: [], REPLACED: [], FAILED: [], "left": 0}
    tried, size, stopped = 0, 1, False
    with ThreadPoolExecutor(workers) as pool:
        while tried < len(patches) and not stopped:
            batch = patches[tried:tried + size]
            for patch, (said, failure) in zip(batch, pool.map(send, batch)):
                if said in (FAILED, AWAY):
                    outcome[FAILED].append([patch["node"], failure])
                    stopped = stopped or said == AWAY
                else:
                    outcome[said].append(patch["node"])
            tried, size = tried + len(batch), BATCH
            failed = len(outcome[FAILED])
            stopped = stopped or failed > FAILURES_MAX or (failed > 0 and not outcome[DONE])
            if tell is not None:
                tell(tried)
    outcome["left"] = len(patches) - tried
    return outcome
