# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""From the state of a WireGuard device and the wanted one to steps, and what a step does to the state.

Pure: plain data in, plain data out, no I/O, no clock. The shapes of states and steps are in ``docs/architecture.md``.

Rules that a plan keeps, whatever the difference is:

* Deltas only. What is wanted and there is not touched: a peer keeps its session, an allowed IP is never taken away for an instant.
* An allowed IP that goes from one peer to another is only added to the new owner. The kernel moves it in one step: it replaces the owner
  of the node in its trie (drivers/net/wireguard/allowedips.c, add()); so do wireguard-go and the others.
* Adding comes before removing, everywhere. So a prefix that is replaced by its halves is covered all the time, and a node that came back
  under a new key has its addresses with the new key before the old key goes.
* Whatever is done, an address is at any time with the peer it had before or with the one it gets (see `_entangled`).
* A peer that roamed stays where it is. WireGuard learns endpoints from authenticated packets and knows better than any document; putting
  the configured one back on every run broke sessions (Kilo #82; Calico does it every 90 s). See `_endpoint_to_set` for when one is set.
"""

from __future__ import annotations

import socket

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, canonical_public_key, shown

PORT_MAX = 65535
FWMARK_MAX = 0xFFFFFFFF  # 32 bit: WGDEVICE_A_FWMARK, include/uapi/linux/wireguard.h
KEEPALIVE_MAX = 65535  # seconds; 16 bit: WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, same file

OPERATIONS = ("set_device", "add_peer", "update_peer", "add_allowed_ips", "remove_allowed_ips", "remove_peer")

# what a peer that nobody heard of yet looks like
_NEW_PEER = {"endpoint": None, "allowed_ips": [], "keepalive": 0, "has_preshared_key": False,
             "last_handshake": 0.0, "rx_bytes": 0, "tx_bytes": 0}


# --- canonical text ------------------------------------------------------------------------------------------------------------------

def split_prefix(text):
    """``"10.244.1.0/24"`` -> ``(family, packed address, prefix length)``; a bare address is its /32 or /128.

    ``family`` is ``socket.AF_INET`` or ``AF_INET6``. Host bits are cleared, as the kernel (allowedips.c, copy_and_assign_cidr) and ``wg``
    do. `MeshError` if it is no prefix. Not the functions of ``_mesh``: those say what pods and nodes may have, this what WireGuard may
    have, link-local probe addresses and the default route included.
    """
    if not isinstance(text, str):
        raise MeshError("allowed IP %s is not a prefix such as 10.244.1.0/24 or fd00:10:244:1::/64" % shown(text))
    address, slash, length_text = text.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        packed = socket.inet_pton(family, address)
    except (OSError, ValueError):  # ValueError: a NUL or a character outside ASCII
        raise MeshError("allowed IP %s is not a prefix such as 10.244.1.0/24 or fd00:10:244:1::/64" % shown(text)) from None
    bits = len(packed) * 8
    length = bits
    if slash:
        if not length_text.isascii() or not length_text.isdigit() or int(length_text) > bits:
            raise MeshError("allowed IP %s: the prefix length must be a number from 0 to %d" % (shown(text), bits))
        length = int(length_text)
    if length < bits:
        number = int.from_bytes(packed, "big") >> (bits - length) << (bits - length)
        packed = number.to_bytes(len(packed), "big")
    return family, packed, length


def prefix_text(family, packed, length):
    """The inverse of `split_prefix`: canonical text, IPv6 as in RFC 5952 (inet_ntop)."""
    return "%s/%d" % (socket.inet_ntop(family, bytes(packed)), length)


def canonical_prefix(text):
    """Canonical text of an allowed IP; `MeshError` if it is none."""
    return prefix_text(*split_prefix(text))


def split_endpoint(text):
    """``"198.18.0.12:51840"`` or ``"[2001:db8::c]:51840"`` -> ``(family, packed address, port, scope)``.

    ``scope`` is the text after ``%`` of a link-local address (a number or a device name), else ``""``. IPv4-mapped IPv6 becomes IPv4, the
    way kernels and implementations report it differs. `MeshError` if it is no address and port; names are not resolved here.
    """
    problem = "endpoint %s is not an address and port such as 198.18.0.12:51840 or [2001:db8::c]:51840" % shown(text)
    if not isinstance(text, str):
        raise MeshError(problem)
    host, colon, port_text = text.rpartition(":")
    if not colon or not port_text.isascii() or not port_text.isdigit() or not 1 <= int(port_text) <= PORT_MAX:
        raise MeshError(problem)
    bracketed = len(host) > 2 and host[0] == "[" and host[-1] == "]"
    address, dummy, scope = (host[1:-1] if bracketed else host).partition("%")
    family = socket.AF_INET6 if bracketed else socket.AF_INET
    try:
        packed = socket.inet_pton(family, address)
    except (OSError, ValueError):
        raise MeshError(problem) from None
    if packed[:12] == b"\0" * 10 + b"\xff\xff":
        family, packed, scope = socket.AF_INET, packed[12:], ""
    return family, packed, int(port_text), scope


def endpoint_text(family, packed, port, scope=""):
    """The inverse of `split_endpoint`: the way ``wg`` writes it."""
    address = socket.inet_ntop(family, bytes(packed))
    if family == socket.AF_INET:
        return "%s:%d" % (address, port)
    return "[%s%s]:%d" % (address, "%" + scope if scope else "", port)


def canonical_endpoint(text):
    """Canonical text of an endpoint; None stays None; `MeshError` if it is no address and port."""
    return None if text is None else endpoint_text(*split_endpoint(text))


def empty_state(name):
    """The state of a device that was just created: ``{"name", "public_key", "listen_port", "fwmark", "peers"}``."""
    return {"name": name, "public_key": None, "listen_port": 0, "fwmark": 0, "peers": {}}


# --- what is wanted ------------------------------------------------------------------------------------------------------------------

def names_of(wanted, names=None):
    """``{public key: node name}`` from the ``name`` of each wanted peer (as ``_mesh.peers_of`` gives it); ``names`` wins."""
    result = {key: peer["name"] for key, peer in wanted.get("peers", {}).items() if peer.get("name")}
    result.update(names or {})
    return result


def _shown_peer(key, names):
    return "%s (%s)" % (names[key], key) if names and key in names else key


def _check_number(value, low, high, what):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise MeshError("%s is %s: expected a number from %d to %d" % (what, shown(value), low, high))
    return value


def _wanted_peer(key, peer, names):
    """One wanted peer, canonical: ``{"endpoint", "allowed_ips", "keepalive", "preshared_key_file"}``."""
    who = "peer %s" % _shown_peer(key, names)
    try:
        return {
            "endpoint": canonical_endpoint(peer.get("endpoint")),
            "allowed_ips": sorted({canonical_prefix(text) for text in peer.get("allowed_ips") or []}),
            "keepalive": _check_number(peer.get("keepalive") or 0, 0, KEEPALIVE_MAX, "keepalive (seconds)"),
            "preshared_key_file": peer.get("preshared_key_file"),
        }
    except MeshError as exc:
        raise MeshError("%s: %s" % (who, exc)) from None


def _wanted_peers(wanted, names):
    """All wanted peers, canonical and checked against each other."""
    own = wanted.get("public_key")
    peers = {}
    owners = {}
    for key in sorted(wanted.get("peers", {})):
        try:
            canonical_public_key(key)
        except MeshError as exc:
            raise MeshError("peer %s: %s" % (names.get(key, shown(key)), exc)) from None
        if key == own:
            # WireGuard ignores such a peer without an error (drivers/net/wireguard/netlink.c, set_peer): the mesh would lack a node
            # and nothing would say so. Cloned machines get here.
            raise MeshError("peer %s has this node's own public key: two nodes with one key cannot talk to each other; give one of them a "
                            "new key" % _shown_peer(key, names))
        peers[key] = _wanted_peer(key, wanted["peers"][key], names)
        for prefix in peers[key]["allowed_ips"]:
            other = owners.setdefault(prefix, key)
            if other != key:
                # an allowed IP has one owner; the last one would silently win
                raise MeshError("allowed IP %s is wanted by two peers, %s and %s: one of them has to give it up"
                                % (prefix, _shown_peer(other, names), _shown_peer(key, names)))
    return peers


# --- the plan ------------------------------------------------------------------------------------------------------------------------

def plan_device(current, wanted, previous_endpoints=None, names=None):
    """The steps that turn ``current`` into ``wanted``; an empty list when nothing is to be done.

    ``current``: a state as ``read`` returns it, or None for a device that is to be created. ``wanted``::

        {"public_key": "…" or None,           # of the key in private_key_file; None: not known yet (check mode before the key exists)
         "private_key_file": "/etc/wireguard/wgmesh0.key",
         "listen_port": 51840 or None, "fwmark": 0x1000 or None,     # None: leave alone
         "keep_unknown_peers": False,                                # True: peers that are not wanted stay
         "peers": {"<public key>": {"endpoint": "198.18.0.12:51840" or None,
                                    "allowed_ips": ["10.244.1.0/24", …],
                                    "keepalive": 0,                  # seconds; 0, None and absent are the same
                                    "preshared_key_file": "/…",      # absent or None: no preshared key
                                    "name": "worker-1"}}}            # for messages only

    ``previous_endpoints``: ``{public key: endpoint}`` as the last document had them. An endpoint that changed there is set even where the
    peer has another one now; without it a live peer keeps its endpoint. A caller must keep the last document until all steps of a new one
    are done, or an interrupted run would leave peers at their old endpoints.

    Steps come in the order of ``docs/architecture.md``, within one kind by public key, so the same difference gives the same plan. Every
    prefix of the plan is a working state. Raises `MeshError` for values WireGuard cannot have, for this node's own key among the peers and
    for an allowed IP that two peers want.
    """
    names = names_of(wanted, names)
    peers = _wanted_peers(wanted, names)
    state = current if current is not None else empty_state("")
    previous = {key: canonical_endpoint(text) for key, text in (previous_endpoints or {}).items()}
    steps = _device_steps(current, wanted)
    # WireGuard itself drops a peer that has the key which the device gets (netlink.c, wg_set_device)
    dropped = steps[0].get("public_key") if steps else None
    there = {key: peer for key, peer in state["peers"].items() if key != dropped}
    removed = [] if wanted.get("keep_unknown_peers") else [key for key in sorted(there) if key not in peers]
    owners = {prefix: key for key, peer in peers.items() for prefix in peer["allowed_ips"]}
    present = {canonical_prefix(text): key for key, peer in there.items() for text in peer["allowed_ips"]}
    missing = {prefix: key for prefix, key in owners.items() if present.get(prefix) != key}
    # what another peer takes over goes by being added there
    surplus = {prefix: key for prefix, key in present.items() if prefix not in owners and (key in peers or key in removed)}
    ordered = _entangled(present, owners)
    first = _by_peer(prefix_and_key for prefix_and_key in missing.items() if prefix_and_key[0] not in ordered)
    last = _by_peer((prefix, key) for prefix, key in surplus.items() if prefix not in ordered and key in peers)
    for key in sorted(peers):
        if key not in there:
            steps.append(_add_peer(key, peers[key], first.pop(key, [])))
    for key in sorted(peers):
        step = _update_peer(key, there[key], peers[key], previous.get(key)) if key in there else None
        if step:
            steps.append(step)
    steps.extend({"op": "add_allowed_ips", "public_key": key, "allowed_ips": first[key]} for key in sorted(first))
    steps.extend(_one_by_one("add_allowed_ips", missing, ordered, -1))
    steps.extend({"op": "remove_allowed_ips", "public_key": key, "allowed_ips": last[key]} for key in sorted(last))
    steps.extend(_one_by_one("remove_allowed_ips", surplus, ordered, 1))
    steps.extend({"op": "remove_peer", "public_key": key} for key in removed)
    return steps


def _by_peer(pairs):
    """``{key: sorted prefixes}`` of ``(prefix, key)`` pairs."""
    result = {}
    for prefix, key in pairs:
        result.setdefault(key, []).append(prefix)
    for prefixes in result.values():
        prefixes.sort()
    return result


def _one_by_one(op, changes, ordered, direction):
    """Steps for the prefixes of ``changes`` (``{prefix: key}``) that are in ``ordered``: by length, growing or falling."""
    steps = []
    for length, key, prefix in sorted((direction * ordered[prefix], key, prefix) for prefix, key in changes.items() if prefix in ordered):
        if steps and steps[-1][0] == (length, key):
            steps[-1][1]["allowed_ips"].append(prefix)
        else:
            steps.append(((length, key), {"op": op, "public_key": key, "allowed_ips": [prefix]}))
    return [step for dummy, step in steps]


def _entangled(present, owners):
    """``{prefix: length}`` of the prefixes for which the order of steps matters.

    ``present`` and ``owners``: ``{prefix: key}`` now and as wanted. WireGuard takes the longest prefix that has an address in it. Where
    prefixes of different peers lie within each other (Calico: a block with one node, an address borrowed from it with another), an
    address that has the same peer before and after could for a moment get another one: when a wide prefix goes to a new peer before the
    narrow one within it is there. With longer prefixes added before shorter ones, and shorter ones taken away before longer ones, every
    address always is with the peer it had or with the one it gets. Most meshes have no such prefixes, and get one step per peer.
    """
    found = {}
    enclosing = []  # (family, last address, prefix, length, owners) of the prefixes around the one looked at
    ranges = []
    for prefix in set(present) | set(owners):
        family, packed, length = split_prefix(prefix)
        start = int.from_bytes(packed, "big")
        ranges.append((family, start, length, start + (1 << (len(packed) * 8 - length)) - 1, prefix))
    for family, start, length, end, prefix in sorted(ranges):
        while enclosing and (enclosing[-1][0] != family or enclosing[-1][1] < start):
            enclosing.pop()
        keys = {present.get(prefix), owners.get(prefix)} - {None}
        for dummy, dummy, other, other_length, other_keys in enclosing:
            if len(keys | other_keys) > 1:
                found[prefix], found[other] = length, other_length
        enclosing.append((family, end, prefix, length, keys))
    return found


def _device_steps(current, wanted):
    step = {"op": "set_device"}
    own = wanted.get("public_key")
    if current is None or own is None or current["public_key"] != own:
        # only then: setting another key makes WireGuard give up every session
        if not wanted.get("private_key_file"):
            raise MeshError("private_key_file is not given, but the device does not have the wanted key")
        step["private_key_file"] = wanted["private_key_file"]
        step["public_key"] = own
    for field, low, high, fresh in (("listen_port", 1, PORT_MAX, None), ("fwmark", 0, FWMARK_MAX, 0)):
        value = wanted.get(field)
        if value is None:
            continue
        _check_number(value, low, high, field)
        # only then: both make WireGuard forget the source address it had chosen for each peer (netlink.c, wg_set_device)
        if value != (fresh if current is None else current[field]):
            step[field] = value
    return [step] if len(step) > 1 else []


def _add_peer(key, want, allowed_ips):
    step = {"op": "add_peer", "public_key": key, "endpoint": want["endpoint"], "allowed_ips": allowed_ips, "keepalive": want["keepalive"]}
    if want["preshared_key_file"]:
        step["preshared_key_file"] = want["preshared_key_file"]
    return step


def _update_peer(key, has, want, previous):
    """An ``update_peer`` step with the fields that change, or None."""
    step = {"op": "update_peer", "public_key": key}
    endpoint = _endpoint_to_set(has, want["endpoint"], previous)
    if endpoint is not None:
        step["endpoint"] = endpoint
    if want["keepalive"] != (has["keepalive"] or 0):
        step["keepalive"] = want["keepalive"]
    if want["preshared_key_file"]:
        # "matches" is what a client says that was told which files to compare with: the key itself is never in a state
        if not has["has_preshared_key"] or has.get("preshared_key_matches") is False:
            step["preshared_key_file"] = want["preshared_key_file"]
    elif has["has_preshared_key"]:
        step["preshared_key_file"] = None
    return step if len(step) > 2 else None


def _endpoint_to_set(has, wanted, previous):
    """The endpoint to set on an existing peer, or None to leave it.

    Set when the peer has none; when the wanted one changed since ``previous``; and when the present one cannot have been learnt, because
    there never was a handshake: only authenticated packets move an endpoint (WireGuard whitepaper, section 6.5). WireGuard cannot forget
    an endpoint, so None as the wanted one changes nothing.
    """
    if wanted is None:
        return None
    now = canonical_endpoint(has["endpoint"])
    if now == wanted:
        return None
    if now is None or not has.get("last_handshake") or (previous is not None and previous != wanted):
        return wanted
    return None


# --- what steps do -------------------------------------------------------------------------------------------------------------------

def apply_steps(state, steps):
    """The state after ``steps``, as WireGuard would have it; ``state`` itself is not changed. For check mode, diffs and tests.

    Steps for peers that are not there do nothing, as with WGPEER_F_UPDATE_ONLY and WGPEER_F_REMOVE_ME.
    """
    after = dict(state)
    after["peers"] = {key: dict(peer, allowed_ips={canonical_prefix(text) for text in peer["allowed_ips"]})
                      for key, peer in state["peers"].items()}
    owners = {prefix: key for key, peer in after["peers"].items() for prefix in peer["allowed_ips"]}
    for step in steps:
        _apply(after, owners, step)
    for peer in after["peers"].values():
        peer["allowed_ips"] = sorted(peer["allowed_ips"])
    return after


def apply_to_state(state, step):
    """`apply_steps` for one step."""
    return apply_steps(state, [step])


def _apply(after, owners, step):
    op = step["op"]
    if op not in OPERATIONS:
        raise MeshError("unknown step %s: expected one of %s" % (shown(op), ", ".join(OPERATIONS)))
    if op == "set_device":
        if "private_key_file" in step:
            after["public_key"] = step.get("public_key")
            _remove_peer(after, owners, step.get("public_key"))
        for field in ("listen_port", "fwmark"):
            if field in step:
                after[field] = step[field]
        return
    key = step["public_key"]
    if op == "remove_peer":
        _remove_peer(after, owners, key)
        return
    if op == "add_peer" and key != after["public_key"]:
        after["peers"].setdefault(key, dict(_NEW_PEER, allowed_ips=set()))
    peer = after["peers"].get(key)
    if peer is None:
        return
    if op == "remove_allowed_ips":
        for prefix in map(canonical_prefix, step["allowed_ips"]):
            if owners.get(prefix) == key:
                del owners[prefix]
                peer["allowed_ips"].discard(prefix)
        return
    _set_fields(peer, step)
    for prefix in map(canonical_prefix, step.get("allowed_ips", ())):
        before = owners.get(prefix)
        if before is not None:
            after["peers"][before]["allowed_ips"].discard(prefix)
        owners[prefix] = key
        peer["allowed_ips"].add(prefix)


def _set_fields(peer, step):
    if step.get("endpoint") is not None:
        peer["endpoint"] = step["endpoint"]
    if "keepalive" in step:
        peer["keepalive"] = step["keepalive"]
    if "preshared_key_file" in step:
        peer["has_preshared_key"] = step["preshared_key_file"] is not None
        peer.pop("preshared_key_matches", None)


def _remove_peer(after, owners, key):
    peer = after["peers"].pop(key, None)
    if peer is not None:
        for prefix in peer["allowed_ips"]:
            del owners[prefix]


# --- for people ----------------------------------------------------------------------------------------------------------------------

def _name(key, names):
    return (names or {}).get(key) or key


def _fields(step):
    """The settings of a peer in a step, as text."""
    parts = []
    if step.get("endpoint") is not None:
        parts.append("endpoint %s" % step["endpoint"])
    if step.get("allowed_ips"):
        parts.append("allowed IPs %s" % ", ".join(step["allowed_ips"]))
    if step.get("keepalive") or ("keepalive" in step and step["op"] == "update_peer"):
        parts.append("keepalive %s" % ("%d s" % step["keepalive"] if step["keepalive"] else "off"))
    if "preshared_key_file" in step:
        parts.append("preshared key from %s" % step["preshared_key_file"] if step["preshared_key_file"] else "no preshared key")
    return ", ".join(parts)


def describe(step, names=None):
    """What a step does, as lines for people; ``names`` is ``{public key: node name}``. Never a secret: those are in no step."""
    if step["op"] == "set_device":
        lines = []
        if "private_key_file" in step:
            lines.append("device: private key from %s%s" % (
                step["private_key_file"], ", public key %s" % step["public_key"] if step.get("public_key") else ""))
        if "listen_port" in step:
            lines.append("device: listen port %d" % step["listen_port"])
        if "fwmark" in step:
            lines.append("device: mark %s" % _mark(step["fwmark"]))
        return lines
    who = "peer %s" % _name(step["public_key"], names)
    if step["op"] == "remove_peer":
        return ["%s: remove" % who]
    if step["op"] == "add_peer":
        fields = _fields(step)
        return ["%s: add%s" % (who, ", " + fields if fields else "")]
    if step["op"] == "update_peer":
        return ["%s: set %s" % (who, _fields(step))]
    if step["op"] in ("add_allowed_ips", "remove_allowed_ips"):
        return ["%s: %s allowed IPs %s" % (who, step["op"].partition("_")[0], ", ".join(step["allowed_ips"]))]
    raise MeshError("unknown step %s: expected one of %s" % (shown(step["op"]), ", ".join(OPERATIONS)))


def _mark(fwmark):
    return "0x%x" % fwmark if fwmark else "off"


def device_as_text(state, names=None):
    """A device as text for ``before`` and ``after`` of a diff; ``""`` for None, a device that does not exist.

    Only what is configured: no counters, no handshakes, nothing that differs from one run to the next. One allowed IP to a line, so that
    a diff shows the one that changed; peers sorted by node name. No secrets: only whether there is a preshared key.
    """
    if state is None:
        return ""
    lines = ["device %s" % state["name"],
             "  public key: %s" % (state["public_key"] or "(none)"),
             "  listen port: %d" % state["listen_port"],
             "  mark: %s" % _mark(state["fwmark"])]
    for key in sorted(state["peers"], key=lambda item: (_name(item, names), item)):
        peer = state["peers"][key]
        lines.append("peer %s" % _name(key, names))
        lines.append("  public key: %s" % key)
        lines.append("  endpoint: %s" % (peer["endpoint"] or "(none)"))
        lines.append("  keepalive: %s" % ("%d s" % peer["keepalive"] if peer["keepalive"] else "off"))
        other = peer["has_preshared_key"] and peer.get("preshared_key_matches") is False
        lines.append("  preshared key: %s" % ("yes, not the one in its file" if other else "yes" if peer["has_preshared_key"] else "no"))
        lines.extend("  allowed IP: %s" % prefix for prefix in sorted(peer["allowed_ips"]))
    return "\n".join(lines) + "\n"
