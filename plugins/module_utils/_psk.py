# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Preshared keys: one for each pair of nodes, derived from one secret of the cluster; what is to be done about those that a node has.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

The key of a pair is HKDF-SHA256 (RFC 5869) of the secret, with a fixed label as salt and, as info, the label and the two public keys as 32
raw bytes each, the smaller one first. So both ends get the same key, no two pairs have the same one, new public keys (a rotation) give
new preshared keys, and a node that is given only its own learns nothing about those of others. The secret stays on the controller.

Nothing here ever puts a key or the secret into a text: errors and reports hold names only.
"""

from __future__ import annotations

import base64
import binascii
import hmac

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    canonical_public_key,
    generation_text,
    is_peer,
    node_entry,
)

# Version of the derivation: another way to derive gets another label, or old and new nodes would agree on the label and not on the key.
LABEL = b"kubemesh.wireguard preshared key v1"
PROOF_LABEL = b"kubemesh.wireguard preshared key proof v1"
KEY_BYTES = 32
HASH = "sha256"
HASH_BYTES = 32
# Characters. 32 of base64 are 192 bit; the openssl command of the error gives 44, 256 bit.
SECRET_MIN = 32
# 32 characters of hexadecimal, the poorest alphabet that anybody makes secrets of, have about 14 different ones; less than 8 in one of
# 10 million. A repeated word has fewer.
SECRET_DIFFERENT = 8
PROOF_BYTES = 16

REMEDY = "make one with: openssl rand -base64 32, and keep it in a vaulted variable"


# --- HKDF ----------------------------------------------------------------------------------------------------------------------------

def hkdf_extract(salt, ikm):
    """RFC 5869, section 2.2: the pseudorandom key of 32 bytes."""
    return hmac.digest(bytes(salt) or bytes(HASH_BYTES), bytes(ikm), HASH)


def hkdf_expand(prk, info, length):
    """RFC 5869, section 2.3: ``length`` bytes."""
    if length > 255 * HASH_BYTES:
        raise ValueError("HKDF gives at most %d bytes" % (255 * HASH_BYTES))
    output, block, counter = b"", b"", 0
    while len(output) < length:
        counter += 1
        block = hmac.digest(prk, block + bytes(info) + bytes((counter,)), HASH)
        output += block
    return output[:length]


# --- derivation ----------------------------------------------------------------------------------------------------------------------

def check_secret(secret):
    """The secret as bytes; `MeshError` if it is too weak. White space around it, such as the newline of a file, does not count."""
    if not isinstance(secret, str):
        raise MeshError("the secret for preshared keys (mesh_psk_secret) is not text; %s" % REMEDY)
    text = secret.strip()
    if len(text) < SECRET_MIN:
        raise MeshError("the secret for preshared keys (mesh_psk_secret) has %d characters, at least %d are needed; %s"
                        % (len(text), SECRET_MIN, REMEDY))
    if len(set(text)) < SECRET_DIFFERENT:
        raise MeshError("the secret for preshared keys (mesh_psk_secret) has fewer than %d different characters, so it can be guessed; %s"
                        % (SECRET_DIFFERENT, REMEDY))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        # "from None": the message of the codec quotes the secret
        raise MeshError("the secret for preshared keys (mesh_psk_secret) is not valid text; %s" % REMEDY) from None


def secret_text(secret):
    """The text of a secret as Ansible has it: a vaulted one decrypts itself when it becomes text. What is a structure or a number stays
    one, as its text is no secret that anybody has chosen.
    """
    return secret if isinstance(secret, (dict, list, tuple, int, float)) else str(secret)


def secret_fault(secret):
    """What is wrong with ``mesh_psk_secret``, as a text that tells nothing of it but its length; empty for nothing, and for no secret."""
    if secret is None or secret == "":
        return ""
    try:
        check_secret(secret_text(secret))
    except MeshError as exc:
        return str(exc)
    return ""


def _raw(public_key):
    return base64.b64decode(canonical_public_key(public_key))


def derive(secret, one, other):
    """The preshared key, 32 bytes, of two public keys given as text; ``secret`` as bytes."""
    return _derive(hkdf_extract(LABEL, secret), _raw(one), _raw(other))


def _derive(prk, one, other):
    if one == other:
        raise MeshError("a pair of one public key: two nodes have the same one")
    return hkdf_expand(prk, LABEL + min(one, other) + max(one, other), KEY_BYTES)


def keys_of_node(doc, node, generation, secret):
    """What one node needs: ``{"keys": {public key of peer: 32 bytes}, "names": {public key: node name}, "complete": bool}``.

    For every peer of the node that has a key of this generation. ``complete`` is whether all of them are known: a member without a key of
    this generation may be one of the peers that the node has keys of (invariant I4). ``secret`` is text.
    """
    prk = hkdf_extract(LABEL, check_secret(secret))
    generation = generation_text(generation)
    own = node_entry(doc, node)
    if not is_peer(own, generation):
        raise MeshError("node %s has no public key of generation %s in the mesh document, so there are no preshared keys for it; exchange "
                        "keys first" % (node, generation))
    own_raw = _raw(own["public_keys"][generation])
    members = {name: entry for name, entry in doc["nodes"].items() if entry["state"] != "excluded"}
    keys, names = {}, {}
    for name, entry in members.items():
        if name != node and is_peer(entry, generation):
            public_key = entry["public_keys"][generation]
            keys[public_key] = _derive(prk, own_raw, _raw(public_key))
            names[public_key] = name
    return {"keys": keys, "names": names, "complete": all(generation in entry["public_keys"] for entry in members.values())}


# --- comparing without sending keys ----------------------------------------------------------------------------------------------------

def proof(key, nonce, public_key):
    """Text by which somebody who has the same key can tell so. Good for one ``nonce`` and peer; nobody gets the key from it."""
    message = PROOF_LABEL + nonce.encode("utf-8") + _raw(public_key)
    return base64.b64encode(hmac.digest(bytes(key), message, HASH)[:PROOF_BYTES]).decode("ascii")


def same_text(one, other):
    """Whether two texts are equal, in the same time whatever they are."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


# --- files ---------------------------------------------------------------------------------------------------------------------------

# The public key itself with the two characters replaced that file names cannot have (RFC 4648, section 5), so that a shell gets back from
# one to the other by ``tr``.
_TO_NAME = str.maketrans("+/", "-_")
_TO_KEY = str.maketrans("-_", "+/")


def file_name(public_key):
    """Name of the file with the preshared key of a peer."""
    return canonical_public_key(public_key).translate(_TO_NAME)


def public_key_of(name):
    """The inverse of `file_name`; None for a name that is not ours."""
    try:
        public_key = canonical_public_key(name.translate(_TO_KEY))
    except MeshError:
        return None
    return public_key if file_name(public_key) == name else None


def folder_of(interface):
    """Directory of the preshared keys of a device."""
    return "/etc/wireguard/%s.psk" % interface


def paths_of(folder, public_keys):
    """``{public key: path}``."""
    return {public_key: "%s/%s" % (folder, file_name(public_key)) for public_key in public_keys}


def encode(key):
    """32 bytes -> text, as ``wg genpsk`` prints it."""
    return base64.b64encode(bytes(key)).decode("ascii")


def decode(text):
    """Text of a preshared key (as text or bytes) -> bytearray of 32 bytes; None if it is none. All zeros is how WireGuard says none."""
    try:
        raw = bytearray(base64.b64decode(bytes(text.encode("ascii") if isinstance(text, str) else text).strip(), validate=True))
    except (ValueError, binascii.Error, UnicodeEncodeError):
        return None
    return raw if len(raw) == KEY_BYTES and any(raw) else None


# --- what is to be done --------------------------------------------------------------------------------------------------------------

def plan(peers, same, loose, complete):
    """What a node has to do, as public keys: ``{"added", "replaced", "removed", "tightened", "kept"}``, each sorted.

    ``peers``: public keys that shall have a file. ``same``: ``{public key: True|False}`` of those that have one, wanted or not: whether it
    is the right one. ``loose``: those whose file others can use. Files of peers that are not wanted go only when ``complete``.
    """
    wanted, there = set(peers), set(same)
    replaced = {key for key in wanted & there if not same[key]}
    removed = there - wanted if complete else set()
    # what is written anew gets its mode with that
    tightened = (set(loose) & there) - replaced - removed
    return {
        "added": sorted(wanted - there), "replaced": sorted(replaced), "removed": sorted(removed), "tightened": sorted(tightened),
        "kept": sorted(there - replaced - removed),
    }


KINDS = ("added", "replaced", "removed")
# Public keys of each kind that a report has: results must stay small at 5,000 nodes.
SHOWN = 200


def report(steps):
    """What is told of a plan: ``{"added", "replaced", "removed": [public keys], "counts": {kind: number}}``."""
    result = {kind: steps[kind][:SHOWN] for kind in KINDS}
    result["counts"] = {kind: len(steps[kind]) for kind in ("added", "replaced", "removed", "tightened", "kept")}
    return result


def with_names(told, names):
    """A report with the names of nodes for public keys, sorted; who has no name here keeps the public key."""
    return dict(told, **{kind: sorted(names.get(public_key) or public_key for public_key in told[kind]) for kind in KINDS})


def describe(told):
    """A report as lines for people."""
    lines = []
    for kind in KINDS:
        lines.extend("peer %s: preshared key %s" % (name, kind) for name in told[kind])
        if told["counts"][kind] > len(told[kind]):
            lines.append("and %d more preshared keys %s" % (told["counts"][kind] - len(told[kind]), kind))
    if told["counts"]["tightened"]:
        lines.append("%d preshared keys closed to others" % told["counts"]["tightened"])
    return lines


def summary(told, would):
    """A report in one sentence."""
    words = [(kind, kind) for kind in KINDS] + [("tightened", "closed to others")]
    parts = ["%d %s" % (told["counts"][kind], word) for kind, word in words if told["counts"][kind]]
    if not parts:
        return "the preshared keys of %d peers are as they should be" % told["counts"]["kept"]
    return "preshared keys: %s%s" % ("would be " if would else "", ", ".join(parts))
