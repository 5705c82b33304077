# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The mesh document and one node's view of it.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. ``docs/architecture.md`` describes the document; this file is what
decides whether bytes are one. Everything that a user or a cluster can get wrong ends in `MeshError`, whose text is meant for people.

Names used throughout: *doc* is a validated document (a ``dict``), *node* the name of a Node object, *generation* ``0`` or ``1``, as an
integer or as text. A *family* is ``"ipv4"`` or ``"ipv6"``.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import ipaddress
import json
import re

SCHEMA = 1
FAMILIES = ("ipv4", "ipv6")
GENERATIONS = ("0", "1")
STATES = ("member", "pending", "excluded")

# RFC 1123 subdomain as Kubernetes checks it: apimachinery/pkg/util/validation/validation.go, IsDNS1123Subdomain
NODE_NAME_MAX = 253  # characters
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")

# 32 bytes are 43 base64 characters and one "=": the 43rd carries 4 bits of data, its 2 low bits must be zero (RFC 4648, section 3.5),
# or two texts would be the same key.
_PUBLIC_KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_KEY_ZERO = "A" * 43 + "="

_IPV4 = re.compile(r"(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){3}")
_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_DNS_NAME = re.compile(r"[A-Za-z0-9_]([-A-Za-z0-9_.]*[A-Za-z0-9_.])?(:[0-9]+)?")

# IPv6 needs 1280 bytes on every link (RFC 8200, section 5); the upper end is the largest IP packet less WireGuard's 80 bytes.
MTU_MIN_IPV6 = 1280
MTU_MIN = 576  # IPv4: what every host must be able to take (RFC 791)
MTU_MAX = 65535 - 80

PORT_MAX = 65535
KEEPALIVE_MAX = 65535  # seconds; 16 bit in WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, include/uapi/linux/wireguard.h

_PROBE_NETWORK = ipaddress.IPv6Network("fe80::/64")

# What can be neither a node address nor a part of a pod CIDR. 240.0.0.0/4 is not here: clouds give it to pods (GKE, class E).
_RESERVED = tuple((network.version, int(network.network_address), int(network.broadcast_address), "%s, %s" % (network, what))
                  for network, what in ((ipaddress.ip_network(text), what) for text, what in (
                      ("0.0.0.0/8", "this host on this network, RFC 1122"),
                      ("127.0.0.0/8", "loopback"),
                      ("169.254.0.0/16", "link-local"),
                      ("224.0.0.0/4", "multicast"),
                      ("255.255.255.255/32", "broadcast"),
                      ("::/96", "unspecified and loopback"),
                      ("::ffff:0:0/96", "IPv4-mapped"),
                      ("fe80::/10", "link-local"),
                      ("ff00::/8", "multicast"))))


class MeshError(Exception):
    """Something a user can cause and mend.

    ``str()`` names host, field, value and remedy. ``problems`` holds the single findings when there are several.
    """

    def __init__(self, message, problems=None):
        super().__init__(message)
        self.problems = list(problems) if problems is not None else [message]


def joined_error(headline, problems, limit=100):
    """One `MeshError` for many findings, each on a line of its own; beyond ``limit`` lines they are only in ``problems``."""
    lines = ["- " + text for text in problems[:limit]]
    if len(problems) > limit:
        lines.append("and %d more" % (len(problems) - limit))
    return MeshError("%s (%d):\n%s" % (headline, len(problems), "\n".join(lines)), problems)


def some_of(names, limit):
    """``a, b, c and 4 more``: names, in their order, for a message that has room for ``limit`` of them."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else "%s and %d more" % (text, len(names) - limit)


def shown(value, limit=80):
    """``repr`` of a value from outside for use in an error: one line, no control characters, at most ``limit`` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[:limit - 3] + "..."


# --- addresses -----------------------------------------------------------------------------------------------------------------------

def family_of(text):
    """``"ipv4"`` or ``"ipv6"`` of a canonical address or CIDR."""
    return "ipv6" if ":" in text else "ipv4"


def _address_number(text):
    """``(version, number)`` of an address.

    The grammar is checked here because the standard library's differs between Python versions: leading zeros (bpo-36384) and scope ids
    (bpo-34788) are accepted by some. IPv4 is done without it as well: 5,000 nodes have 50,000 addresses and prefixes, and every node
    reads the whole document.
    """
    if isinstance(text, str):
        if _IPV4.fullmatch(text):
            octets = [int(octet) for octet in text.split(".")]
            if max(octets) <= 255:
                return 4, (octets[0] << 24) + (octets[1] << 16) + (octets[2] << 8) + octets[3]
        elif _IPV6.fullmatch(text):
            try:
                return 6, int(ipaddress.IPv6Address(text))
            except ValueError:
                pass
    raise MeshError("%s is not an IP address: expected text such as 198.18.0.12 or 2001:db8::c" % shown(text))


def _address_text(version, number):
    if version == 4:
        return "%d.%d.%d.%d" % (number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255)
    return str(ipaddress.IPv6Address(number))


def _last(version, first, length):
    return first + (1 << ((32 if version == 4 else 128) - length)) - 1


def _reserved(version, first, length):
    last = _last(version, first, length)
    for other_version, other_first, other_last, what in _RESERVED:
        if version == other_version and first <= other_last and other_first <= last:
            return what
    return None


@functools.lru_cache(maxsize=1 << 17)  # entries: two per address or prefix of 5,000 nodes; they are read several times each
def _network(text):
    """``(version, first address as a number, prefix length)`` of a CIDR or an address; `MeshError` when it is none or has host bits."""
    address_text, slash, length_text = text.partition("/")
    version, first = _address_number(address_text)
    bits = 32 if version == 4 else 128
    if not slash:
        return version, first, bits
    if not _PREFIX_LENGTH.fullmatch(length_text) or int(length_text) > bits:
        raise MeshError("%s is not a CIDR: the prefix length must be a number from 0 to %d" % (shown(text), bits))
    length = int(length_text)
    base = first >> (bits - length) << (bits - length)
    if base != first:
        raise MeshError("%s is not a CIDR: it has host bits set; write %s/%d" % (shown(text), _address_text(version, base), length))
    return version, first, length


def canonical_address(text):
    """Canonical text of a unicast address that a node may have.

    IPv6 as in RFC 5952. Raises `MeshError` for anything else: names, prefixes, scope ids, leading zeros, loopback, link-local,
    multicast and IPv4-mapped addresses (which Python versions write in two ways).
    """
    version, number = _address_number(text)
    reserved = _reserved(version, number, 32 if version == 4 else 128)
    if reserved:
        raise MeshError("%s cannot be the address of a node: it is in %s" % (shown(text), reserved))
    return _address_text(version, number)


def canonical_cidr(text):
    """Canonical text of a prefix that pods may have; a bare address is its /32 or /128.

    Raises `MeshError` when host bits are set, or when the prefix overlaps loopback, link-local, multicast or the like; so the default
    route is refused as well.
    """
    if not isinstance(text, str):
        raise MeshError("%s is not a CIDR: expected text such as 10.244.1.0/24 or fd00:10:244:1::/64" % shown(text))
    version, first, length = _network(text)
    reserved = _reserved(version, first, length)
    if reserved:
        raise MeshError("%s cannot be a prefix of pods: it overlaps %s" % (shown(text), reserved))
    return "%s/%d" % (_address_text(version, first), length)


def host_cidr(address):
    """The /32 or /128 of a canonical address."""
    return address + ("/128" if ":" in address else "/32")


def parse_endpoint(text):
    """``{"address": canonical text, "port": integer or None}`` of ``1.2.3.4``, ``1.2.3.4:51840``, ``2001:db8::1`` or ``[v6]:port``.

    DNS names are refused: every node would resolve them for itself, at another time and maybe to another address, and the mesh
    document holds facts that are the same for all. A port leaves room for generation 1, which uses the next one.
    """
    if not isinstance(text, str):
        raise MeshError("%s is not an endpoint: expected text such as 203.0.113.7, 203.0.113.7:51840 or [2001:db8::7]:51840" % shown(text))
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::([^:]*))?", text)
    if bracketed:
        address_text, port_text = bracketed.group(1), bracketed.group(2)
        if ":" not in address_text:
            raise MeshError("%s is not an endpoint: only IPv6 addresses are written in brackets" % shown(text))
    elif text.count(":") == 1:
        address_text, dummy, port_text = text.partition(":")
    else:
        address_text, port_text = text, None
    try:
        address = canonical_address(address_text)
    except MeshError as exc:
        if not _IPV4.fullmatch(address_text) and _DNS_NAME.fullmatch(text):
            raise MeshError("%s is not an endpoint: DNS names are not accepted, because each node would resolve them for itself;"
                            " give the address it stands for" % shown(text)) from None
        raise MeshError("%s is not an endpoint: %s" % (shown(text), exc)) from None
    port = None
    if port_text is not None:
        # 65534, not 65535: generation 1 listens on the next port
        if not re.fullmatch(r"[1-9][0-9]{0,4}", port_text) or int(port_text) >= PORT_MAX:
            raise MeshError("%s is not an endpoint: the port must be a number from 1 to %d" % (shown(text), PORT_MAX - 1))
        port = int(port_text)
    return {"address": address, "port": port}


def format_endpoint(address, port):
    """``1.2.3.4:51840`` or ``[2001:db8::1]:51840``, the way ``wg`` writes it."""
    return "[%s]:%d" % (address, port) if ":" in address else "%s:%d" % (address, port)


def endpoint_port(endpoint, generation, ports):
    """The UDP port of an endpoint of the document for one generation: the mesh's, or the given one (generation 1: the next)."""
    return ports[generation] if endpoint["port"] is None else endpoint["port"] + int(generation)


def node_address_order(addresses):
    """Canonical addresses in the document's order: the first IPv4, the first IPv6, then the others sorted; duplicates dropped.

    The first of each family is the primary one, so its place counts; the order of the rest does not, and must not make a new document.
    """
    primary = []
    for family in FAMILIES:
        primary.extend([address for address in addresses if family_of(address) == family][:1])
    rest = set(addresses) - set(primary)
    return primary + sorted(rest, key=_network)


def sorted_cidrs(cidrs):
    """Canonical CIDRs without duplicates, IPv4 first, by number."""
    return sorted(set(cidrs), key=_network)


def find_overlaps(entries, conflict=None, limit=1000):
    """Pairs of overlapping prefixes that are in conflict.

    ``entries``: iterable of ``(cidr, owner)``; ``conflict(owner, owner)`` says whether two owners must not overlap, by default when they
    differ. Returns a sorted list of ``((cidr, owner), (cidr, owner))``, wider prefix first. One sweep over the sorted prefixes, as two
    prefixes are disjoint or nested: N log N, not N squared, for disjoint input. It stops after ``limit`` pairs: a thousand nodes that
    all have the same prefix are half a million pairs, and nobody reads the second page.
    """
    if conflict is None:
        def conflict(one, other):
            return one != other
    found = []
    enclosing = []  # stack of (version, last address, owner, cidr)
    for (version, first, length), owner, cidr in sorted((_network(cidr), owner, cidr) for cidr, owner in entries):
        while enclosing and (enclosing[-1][0] != version or enclosing[-1][1] < first):
            enclosing.pop()
        found.extend(((other_cidr, other), (cidr, owner)) for dummy, dummy, other, other_cidr in enclosing if conflict(other, owner))
        if len(found) >= limit:
            break
        enclosing.append((version, _last(version, first, length), owner, cidr))
    return sorted(found)[:limit]


# --- keys and names ------------------------------------------------------------------------------------------------------------------

def canonical_public_key(text):
    """The text itself when it is a WireGuard public key: 44 characters of base64, 32 bytes, unused bits zero, not all zero."""
    if not isinstance(text, str) or not _PUBLIC_KEY.fullmatch(text):
        raise MeshError("%s is not a WireGuard public key: expected 44 characters of base64 that stand for 32 bytes" % shown(text))
    if text == _KEY_ZERO:
        raise MeshError("%s is not a WireGuard public key: all its bytes are zero" % shown(text))
    return text


def check_node_name(name):
    """The name itself when Kubernetes would accept it for a Node: an RFC 1123 subdomain of at most 253 characters."""
    if not isinstance(name, str) or len(name) > NODE_NAME_MAX or not _NODE_NAME.fullmatch(name):
        raise MeshError("%s is not the name of a Node: expected an RFC 1123 subdomain (lower case letters, digits, '-' and '.',"
                        " at most %d characters)" % (shown(name), NODE_NAME_MAX))
    return name


def probe_address(public_key):
    """The link-local probe address of a public key: ``fe80::`` and the first 8 bytes of SHA-256 over the 32 raw key bytes.

    Raises `MeshError` for an invalid key and for an interface identifier of zero (the subnet-router anycast address, RFC 4291 2.6.1).
    """
    return _probe_address(canonical_public_key(public_key))


@functools.lru_cache(maxsize=1 << 14)  # entries: one per key of 5,000 nodes, and of those that they had before
def _probe_address(public_key):
    identifier = int.from_bytes(hashlib.sha256(base64.b64decode(public_key)).digest()[:8], "big")
    if identifier == 0:
        raise MeshError("public key %s: its probe address would be the subnet-router anycast address fe80::; make another key" % public_key)
    return str(ipaddress.IPv6Address(int(_PROBE_NETWORK.network_address) + identifier))


def generation_text(generation):
    """``"0"`` or ``"1"``; raises `MeshError` for anything else."""
    text = str(generation)
    if text not in GENERATIONS or isinstance(generation, bool):
        raise MeshError("generation %s: expected 0 or 1" % shown(generation))
    return text


# --- the document --------------------------------------------------------------------------------------------------------------------

_DOCUMENT_FIELDS = {"schema", "serial", "complete", "generation", "ports", "nodes"}
_NODE_FIELDS = {"state", "reason", "uid", "public_keys", "endpoints", "pod_cidrs", "node_addresses", "probe_addresses", "mtu", "keepalive"}


def _is_int(value, low, high):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_fields(value, wanted, where, problems):
    """True when ``value`` is a dict with exactly the fields ``wanted``."""
    if not isinstance(value, dict):
        problems.append("%s: expected an object, got %s" % (where, shown(value)))
        return False
    wrong = sorted(shown(field) for field in set(value) - wanted)
    missing = sorted(wanted - set(value))
    if wrong:
        problems.append("%s: unknown fields %s" % (where, ", ".join(wrong)))
    if missing:
        problems.append("%s: missing fields %s" % (where, ", ".join(missing)))
    return not wrong and not missing


def _check_canonical(value, function, where, problems):
    try:
        canonical = function(value)
    except MeshError as exc:
        problems.append("%s: %s" % (where, exc))
        return False
    if canonical != value:
        problems.append("%s: %s is not in canonical form; write %s" % (where, shown(value), canonical))
        return False
    return True


def _check_list(value, function, where, problems):
    if not isinstance(value, list):
        problems.append("%s: expected a list, got %s" % (where, shown(value)))
        return False
    good = True
    for item in value:
        good = _check_canonical(item, function, where, problems) and good
    if good and len(set(value)) != len(value):
        problems.append("%s: holds a value twice: %s" % (where, shown(value)))
        good = False
    return good


def _check_scalars(entry, where, problems):
    if entry["state"] not in STATES:
        problems.append("%s, state: %s is not one of %s" % (where, shown(entry["state"]), ", ".join(STATES)))
    for field in ("reason", "uid"):
        if not isinstance(entry[field], str):
            problems.append("%s, %s: expected text, got %s" % (where, field, shown(entry[field])))
    if entry["mtu"] is not None and not _is_int(entry["mtu"], MTU_MIN, MTU_MAX):
        problems.append("%s, mtu: expected null or bytes from %d to %d, got %s" % (where, MTU_MIN, MTU_MAX, shown(entry["mtu"])))
    if not _is_int(entry["keepalive"], 0, KEEPALIVE_MAX):
        problems.append("%s, keepalive: expected seconds from 0 to %d, got %s" % (where, KEEPALIVE_MAX, shown(entry["keepalive"])))


def _check_endpoints(endpoints, where, problems):
    if not isinstance(endpoints, dict) or not set(endpoints) <= set(FAMILIES):
        problems.append("%s, endpoints: expected an object by family (ipv4, ipv6), got %s" % (where, shown(endpoints)))
        return
    for family, endpoint in endpoints.items():
        place = "%s, endpoints.%s" % (where, family)
        if not _check_fields(endpoint, {"address", "port"}, place, problems):
            continue
        address, port = endpoint["address"], endpoint["port"]
        if _check_canonical(address, canonical_address, place, problems) and family_of(address) != family:
            problems.append("%s: %s is of the other family" % (place, address))
        if port is not None and not _is_int(port, 1, PORT_MAX - 1):
            problems.append("%s: the port must be null or a number from 1 to %d, got %s" % (place, PORT_MAX - 1, shown(port)))


def _check_keys(public_keys, probes, where, problems):
    if not isinstance(public_keys, dict) or not set(public_keys) <= set(GENERATIONS):
        problems.append("%s, public_keys: expected an object by generation (0, 1), got %s" % (where, shown(public_keys)))
        return
    if not isinstance(probes, dict) or set(probes) != set(public_keys):
        problems.append("%s, probe_addresses: expected one per public key, got %s" % (where, shown(probes)))
        return
    for generation, key in public_keys.items():
        try:
            wanted = probe_address(key)
        except MeshError as exc:
            problems.append("%s, public_keys.%s: %s" % (where, generation, exc))
            continue
        if probes[generation] != wanted:
            problems.append("%s, probe_addresses.%s: %s does not belong to the public key, which gives %s"
                            % (where, generation, shown(probes[generation]), wanted))


def _check_node(name, entry, problems):
    """Everything that can be said about one entry without the others. True when the cross-node checks can read it."""
    before = len(problems)
    where = "node %s" % shown(name)
    try:
        check_node_name(name)
    except MeshError as exc:
        problems.append(str(exc))
    if _check_fields(entry, _NODE_FIELDS, where, problems):
        _check_scalars(entry, where, problems)
        _check_list(entry["pod_cidrs"], canonical_cidr, where + ", pod_cidrs", problems)
        _check_list(entry["node_addresses"], canonical_address, where + ", node_addresses", problems)
        _check_endpoints(entry["endpoints"], where, problems)
        _check_keys(entry["public_keys"], entry["probe_addresses"], where, problems)
    return len(problems) == before


def tunnelled_nodes(nodes):
    """``(name, entry)`` of the nodes that are or may become peers, by name. Excluded ones are not in the tunnel and cannot collide."""
    return [(name, nodes[name]) for name in sorted(nodes) if nodes[name]["state"] != "excluded"]


def shared_identities(nodes, ports):
    """Findings about what two nodes must not share: public keys, probe addresses, endpoints. ``nodes``, ``ports`` as in a document."""
    keys, probes, endpoints = {}, {}, {}
    for name, entry in tunnelled_nodes(nodes):
        for generation in sorted(entry["public_keys"]):
            keys.setdefault(entry["public_keys"][generation], []).append("%s (generation %s)" % (name, generation))
            probes.setdefault(entry["probe_addresses"][generation], set()).add(entry["public_keys"][generation])
        for family in sorted(entry["endpoints"]):
            endpoint = entry["endpoints"][family]
            for generation in GENERATIONS:
                endpoints.setdefault((endpoint["address"], endpoint_port(endpoint, generation, ports)), []).append(name)
    problems = []
    for key, owners in sorted(keys.items()):
        if len(owners) > 1:
            problems.append("public key %s is on nodes %s, and each needs a key of its own: if one is a clone of the other, remove the key"
                            " on the clone and make a new one; if one has it from an annotation only, find out who wrote that, and take it"
                            " away" % (key, " and ".join(owners)))
    for address, different in sorted(probes.items()):
        if len(different) > 1:
            problems.append("public keys %s have the same probe address %s: make a new key for one of them"
                            % (" and ".join(sorted(different)), address))
    for (address, port), owners in sorted(endpoints.items()):
        if len(owners) > 1:
            problems.append("endpoint %s belongs to nodes %s: behind one address each node needs two ports of its own, one per generation"
                            "; set mesh_endpoint" % (format_endpoint(address, port), " and ".join(owners)))
    return problems


def prefix_conflict(one, other):
    """Whether two ``(node name, what)`` must not overlap; ``what`` is ``pod CIDR``, ``pod address``, ``node address``, ``endpoint`` or
    another range.

    An allowed IP belongs to one peer only, and outer packets must never match a tunnelled prefix. But an endpoint is one of the node's
    own addresses, or another node's where a port is forwarded, and the pod CIDRs of one node may be nested. A pod address may be borrowed
    from the pod CIDR of another node: the longer prefix wins, in WireGuard as in routing.
    """
    whats = {one[1], other[1]}
    return one != other and whats != {"pod CIDR", "pod address"} and not ("endpoint" in whats and whats <= {"endpoint", "node address"})


def is_host(cidr):
    """Whether a canonical CIDR is a single address."""
    return cidr.endswith("/128" if ":" in cidr else "/32")


def prefixes_of(nodes, borrowed=False):
    """``(cidr, (node name, what))`` of everything in a document's ``nodes`` that can collide.

    ``borrowed``: whether a pod CIDR that is a single address may lie in that of another node, and is a pod address therefore.
    """
    prefixes = []
    for name, entry in tunnelled_nodes(nodes):
        prefixes.extend((cidr, (name, "pod address" if borrowed and is_host(cidr) else "pod CIDR")) for cidr in entry["pod_cidrs"])
        prefixes.extend((host_cidr(address), (name, "node address")) for address in entry["node_addresses"])
        prefixes.extend((host_cidr(endpoint["address"]), (name, "endpoint")) for endpoint in entry["endpoints"].values())
    return prefixes


def _overlap_findings(nodes):
    return ["node %s, %s %s: overlaps %s %s of node %s" % (narrow_name, narrow_what, narrow, wide_what, wide, wide_name)
            for (wide, (wide_name, wide_what)), (narrow, (narrow_name, narrow_what)) in find_overlaps(
                prefixes_of(nodes, borrowed=True), prefix_conflict)]


def validate_document(doc, known=None):
    """The document itself when it is one; `MeshError` with every finding otherwise.

    Checks types, canonical text, that probe addresses belong to their keys, and across nodes: no key, probe address or endpoint twice,
    no overlapping allowed IPs but borrowed addresses, no endpoint or node address inside a pod CIDR.

    ``known``: a document that was validated, or None: entries that are the very objects of it are not looked at one by one again.
    """
    problems = []
    seen = known["nodes"] if known is not None else {}
    if isinstance(doc, dict) and "schema" in doc and (doc["schema"] != SCHEMA or isinstance(doc["schema"], bool)):
        raise MeshError("mesh document, schema: this version of the collection reads schema %d, the document has %s;"
                        " use the version of the collection that wrote it, or newer" % (SCHEMA, shown(doc["schema"])))
    if not _check_fields(doc, _DOCUMENT_FIELDS, "mesh document", problems):
        raise joined_error("this is not a mesh document", problems)
    if not _is_int(doc["serial"], 1, 2 ** 63 - 1):
        problems.append("mesh document, serial: expected a number from 1, got %s" % shown(doc["serial"]))
    if not isinstance(doc["complete"], bool):
        problems.append("mesh document, complete: expected true or false, got %s" % shown(doc["complete"]))
    if not _is_int(doc["generation"], 0, 1):
        problems.append("mesh document, generation: expected 0 or 1, got %s" % shown(doc["generation"]))
    ports = doc["ports"]
    if not isinstance(ports, dict) or set(ports) != set(GENERATIONS) or not all(_is_int(port, 1, PORT_MAX) for port in ports.values()):
        problems.append("mesh document, ports: expected a port from 1 to %d for generations 0 and 1, got %s" % (PORT_MAX, shown(ports)))
    elif ports["0"] == ports["1"]:
        problems.append("mesh document, ports: both generations have port %d; they run side by side and need two" % ports["0"])
    if not isinstance(doc["nodes"], dict):
        problems.append("mesh document, nodes: expected an object by node name, got %s" % shown(doc["nodes"]))
        raise joined_error("the mesh document is not valid", problems)
    readable = not problems
    for name, entry in doc["nodes"].items():
        if entry is not seen.get(name) or entry is None:
            readable = _check_node(name, entry, problems) and readable
    if readable:
        problems.extend(shared_identities(doc["nodes"], ports))
        problems.extend(_overlap_findings(doc["nodes"]))
    if problems:
        raise joined_error("the mesh document is not valid", problems)
    return doc


def document_bytes(doc):
    """Canonical bytes of a document: sorted keys, no spaces, ASCII, one newline at the end. The same for equal documents anywhere."""
    return (json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def document_sha256(doc):
    """Hexadecimal SHA-256 of the canonical bytes."""
    return hashlib.sha256(document_bytes(doc)).hexdigest()


def _no_duplicates(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        names = sorted(name for name, dummy in pairs)
        twice = [name for name, following in zip(names, names[1:]) if name == following]
        raise MeshError("mesh document: %s appears twice in one object" % shown(twice[0]))
    return result


def load_document(data):
    """The validated document in ``data`` (bytes or text); `MeshError` when it is none."""
    try:
        text = data.decode("utf-8") if isinstance(data, (bytes, bytearray)) else data
        doc = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, TypeError, RecursionError) as exc:
        raise MeshError("this is not a mesh document: not readable as JSON (%s); fetch it again from another node" % exc) from None
    return validate_document(doc)


# --- one node's view -----------------------------------------------------------------------------------------------------------------

def node_entry(doc, node):
    """The entry of a node; `MeshError` when the document does not have it."""
    try:
        return doc["nodes"][node]
    except KeyError:
        raise MeshError("node %s is not in the mesh document (serial %s, %d nodes): is it the name of its Node object? mesh_node_name says"
                        " which one a host is" % (shown(node), doc["serial"], len(doc["nodes"]))) from None


def is_peer(entry, generation=None):
    """True when others accept this node: not excluded, and with a key (of the generation, or of any)."""
    keys = entry["public_keys"]
    return entry["state"] != "excluded" and (bool(keys) if generation is None else str(generation) in keys)


def endpoint_of(doc, node, peer, generation):
    """Endpoint text at which ``node`` reaches ``peer``, or None when the peer has none (NAT).

    IPv4 when both have an IPv4 endpoint, else IPv6 when both have one, else whatever the peer has.
    """
    generation = generation_text(generation)
    return _endpoint(doc["ports"], generation, node_entry(doc, node)["endpoints"], node_entry(doc, peer)["endpoints"])


def _endpoint(ports, generation, own, theirs):
    endpoint = None
    if "ipv4" in theirs and ("ipv4" in own or not ("ipv6" in own and "ipv6" in theirs)):
        endpoint = theirs["ipv4"]
    elif "ipv6" in theirs:
        endpoint = theirs["ipv6"]
    if endpoint is None:
        return None
    return format_endpoint(endpoint["address"], endpoint_port(endpoint, generation, ports))


def allowed_ips_of(entry, generation):
    """Everything a node may ever use as a source, for the peer entry of one generation (I2): sorted canonical text.

    Pod CIDRs, node addresses as /32 and /128, and the probe address of that generation as /128.
    """
    result = list(entry["pod_cidrs"])
    result.extend(host_cidr(address) for address in entry["node_addresses"])
    result.append(entry["probe_addresses"][generation] + "/128")
    return sorted(set(result))


def peers_of(doc, node, generation):
    """The peers of a node's device: ``{public key: {"name", "endpoint", "allowed_ips", "keepalive"}}``.

    ``keepalive`` is the node's own, in seconds, towards all its peers; ``endpoint`` is text or None. Raises `MeshError` when the node is
    not in the document, is excluded or has no key of this generation: an empty result would read as "remove all peers".
    """
    generation = generation_text(generation)
    own = node_entry(doc, node)
    if not is_peer(own, generation):
        raise MeshError("node %s has no peers of generation %s: it is %s in the mesh document%s%s"
                        % (node, generation, own["state"], " (%s)" % own["reason"] if own["reason"] else "",
                           "" if own["state"] == "excluded" else ", without a public key of this generation; make its key first"))
    ports, keepalive, own_endpoints = doc["ports"], own["keepalive"], own["endpoints"]
    peers = {}
    for name, entry in doc["nodes"].items():
        if name != node and is_peer(entry, generation):
            peers[entry["public_keys"][generation]] = {
                "name": name,
                "endpoint": _endpoint(ports, generation, own_endpoints, entry["endpoints"]),
                "allowed_ips": allowed_ips_of(entry, generation),
                "keepalive": keepalive,
            }
    return peers


def primary_addresses(doc, node):
    """The node's first address of each family it has: ``{"ipv4": "198.18.0.12", "ipv6": "2001:db8::c"}``."""
    result = {}
    for address in node_entry(doc, node)["node_addresses"]:
        result.setdefault(family_of(address), address)
    return result


def device_addresses(doc, node, generation):
    """Addresses of the node's mesh device, with length: the primary ones as /32 and /128, the probe address as /64."""
    generation = generation_text(generation)
    primary = primary_addresses(doc, node)
    result = [host_cidr(primary[family]) for family in FAMILIES if family in primary]
    probe = node_entry(doc, node)["probe_addresses"].get(generation)
    if probe is not None:
        result.append(probe + "/64")
    return result


def local_pod_cidrs(doc, node):
    """The pod CIDRs of the node itself, IPv4 first."""
    return sorted_cidrs(node_entry(doc, node)["pod_cidrs"])


def table_routes(doc, node, generation=None):
    """Destinations behind each peer: ``{"pods": [(cidr, peer name)], "nodes": [(address/length, peer name)]}``, sorted.

    All peers, proven or not: which of them get a route is decided by what `probe` saw. ``generation`` limits them to peers that have a
    key of it.
    """
    node_entry(doc, node)
    pods, nodes = [], []
    for name, entry in doc["nodes"].items():
        if name != node and is_peer(entry, generation):
            pods.extend((cidr, name) for cidr in entry["pod_cidrs"])
            nodes.extend((host_cidr(address), name) for address in entry["node_addresses"])
    return {"pods": sorted(pods), "nodes": sorted(nodes)}


def mesh_mtu(doc, node):
    """MTU of the node's mesh device in bytes, or None while it is not measured."""
    return node_entry(doc, node)["mtu"]


def path_mtu(doc, node, peer):
    """The smaller MTU of two nodes' devices in bytes, or None while neither is measured."""
    known = [mtu for mtu in (mesh_mtu(doc, node), mesh_mtu(doc, peer)) if mtu is not None]
    return min(known) if known else None


# --- what changed --------------------------------------------------------------------------------------------------------------------

def _short(key):
    # Eight characters tell two keys apart at a glance; a public key is no secret, but 44 characters hide the rest of the line.
    return key[:8] + "..."


def _endpoint_text(endpoint):
    if endpoint is None:
        return "none"
    return endpoint["address"] if endpoint["port"] is None else format_endpoint(endpoint["address"], endpoint["port"])


def _compare_nodes(name, old, new):
    changes = []
    if old["state"] != new["state"] or old["reason"] != new["reason"]:
        def state(entry):
            return entry["state"] + (" (%s)" % entry["reason"] if entry["reason"] else "")
        changes.append("node %s: %s, was %s" % (name, state(new), state(old)))
    if old["uid"] != new["uid"] and old["uid"] and new["uid"]:
        changes.append("node %s: was deleted and added again under the same name (uid %s, was %s)" % (name, new["uid"], old["uid"]))
    for generation in GENERATIONS:
        before, after = old["public_keys"].get(generation), new["public_keys"].get(generation)
        if before != after:
            if before is None:
                changes.append("node %s: public key of generation %s added (%s)" % (name, generation, _short(after)))
            elif after is None:
                changes.append("node %s: public key of generation %s withdrawn (was %s)" % (name, generation, _short(before)))
            else:
                changes.append("node %s: new public key of generation %s (%s, was %s)" % (name, generation, _short(after), _short(before)))
    for family in FAMILIES:
        before, after = old["endpoints"].get(family), new["endpoints"].get(family)
        if before != after:
            family_text = {"ipv4": "IPv4", "ipv6": "IPv6"}[family]
            changes.append("node %s: %s endpoint %s, was %s" % (name, family_text, _endpoint_text(after), _endpoint_text(before)))
    for field, what in (("pod_cidrs", "pod CIDR"), ("node_addresses", "node address")):
        before, after = old[field], new[field]
        changes.extend("node %s: %s %s added" % (name, what, value) for value in after if value not in before)
        changes.extend("node %s: %s %s removed" % (name, what, value) for value in before if value not in after)
        if before != after and sorted(before) == sorted(after):
            changes.append("node %s: order of %ses now %s" % (name, what, ", ".join(after)) if field == "node_addresses"
                           else "node %s: order of %ss now %s" % (name, what, ", ".join(after)))
    if old["mtu"] != new["mtu"]:
        changes.append("node %s: MTU %s, was %s" % (name, new["mtu"] or "not measured", old["mtu"] or "not measured"))
    if old["keepalive"] != new["keepalive"]:
        changes.append("node %s: keepalive %d s, was %d s" % (name, new["keepalive"], old["keepalive"]))
    return changes


def compare_documents(old, new):
    """What a run changes, as lines for people; empty when only the serial differs. ``old`` may be None (no document yet)."""
    changes = []
    if old is None:
        changes.append("first mesh document")
        old = {"complete": new["complete"], "generation": new["generation"], "ports": new["ports"], "nodes": {}}
    for generation in GENERATIONS:
        if old["ports"][generation] != new["ports"][generation]:
            changes.append("port of generation %s: %d, was %d" % (generation, new["ports"][generation], old["ports"][generation]))
    if old["generation"] != new["generation"]:
        changes.append("traffic goes through generation %d, was %d" % (new["generation"], old["generation"]))
    if old["complete"] != new["complete"]:
        changes.append("node list is now %s" % ("complete" if new["complete"] else "not known to be complete"))
    for name in sorted(set(old["nodes"]) | set(new["nodes"])):
        if name not in old["nodes"]:
            entry = new["nodes"][name]
            what = ", ".join(entry["pod_cidrs"] + entry["node_addresses"])
            changes.append("node %s joined: %s%s%s" % (name, entry["state"], " (%s)" % entry["reason"] if entry["reason"] else "",
                                                       ", " + what if what else ""))
        elif name not in new["nodes"]:
            changes.append("node %s left" % name)
        elif old["nodes"][name] != new["nodes"][name]:
            changes.extend(_compare_nodes(name, old["nodes"][name], new["nodes"][name]))
    return changes
