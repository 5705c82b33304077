# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import copy
import hashlib
import ipaddress
import itertools
import json
import random

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

JINJA = '{{ lookup("pipe", "id") }}'


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def entry(number, **changes):
    address, address6 = "198.18.0.%d" % number, "2001:db8::%x" % number
    result = {
        "state": "member", "reason": "", "uid": "uid-%d" % number,
        "public_keys": {"0": key(number)},
        "endpoints": {"ipv4": {"address": address, "port": None}, "ipv6": {"address": address6, "port": None}},
        "pod_cidrs": ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number],
        "node_addresses": [address, address6],
        "mtu": 1420, "keepalive": 0}
    result.update(changes)
    if "probe_addresses" not in result:
        result["probe_addresses"] = {generation: _mesh.probe_address(value) for generation, value in result["public_keys"].items()}
    return result


def document(*entries, **changes):
    result = {"schema": 1, "serial": 7, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
              "nodes": {"n%d" % number: value for number, value in enumerate(entries, 1)}}
    result.update(changes)
    return result


def three(**of_n2):
    return document(entry(1), entry(2, **of_n2), entry(3))


def problems_of(doc):
    with pytest.raises(MeshError) as caught:
        _mesh.validate_document(doc)
    return caught.value.problems


class TestAddresses:

    @pytest.mark.parametrize(("text", "canonical"), [
        ("198.18.0.12", "198.18.0.12"),
        ("2001:DB8:0:0::C", "2001:db8::c"),
        ("2001:db8:0:1:0:0:0:1", "2001:db8:0:1::1"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
        ("240.0.0.1", "240.0.0.1"),  # class E: clouds use it
    ])
    def test_canonical(self, text, canonical):
        assert _mesh.canonical_address(text) == canonical

    @pytest.mark.parametrize("text", [
        "", " 198.18.0.1", "198.18.0.1\n", "198.18.0", "198.18.0.256", "198.18.0.01", "010.0.0.1", "198.18.0.1/32", "0x0a000001",
        "3323068417",
        "\u0661\u0669\u0668.18.0.1", "2001:db8::1%eth0", "2001:db8::1%25", "2001:db8:::1", "1:2:3:4:5:6:7:8:9", "[2001:db8::1]",
        "::ffff:198.18.0.1",
        "::", "::1", "0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "fe80::1", "ff02::1", "node-1.example.com",
        JINJA,
        None, 198, True, b"198.18.0.1", ["198.18.0.1"],
    ])
    def test_refused(self, text):
        with pytest.raises(MeshError):
            _mesh.canonical_address(text)

    @given(st.ip_addresses())
    def test_agrees_with_the_standard_library(self, address):
        usable = not (address.is_loopback or address.is_multicast or address.is_link_local or address.is_unspecified)
        text = address.exploded if address.version == 6 else str(address)
        try:
            canonical = _mesh.canonical_address(text)
        except MeshError:
            assert not usable or int(address) < 1 << 48 or str(address) == "255.255.255.255"
        else:
            assert usable
            assert ipaddress.ip_address(canonical) == address
            assert _mesh.canonical_address(canonical) == canonical

    @pytest.mark.parametrize(("text", "canonical"), [
        ("10.244.1.0/24", "10.244.1.0/24"),
        ("10.244.1.5", "10.244.1.5/32"),
        ("FD00:10:244:1::/64", "fd00:10:244:1::/64"),
        ("fd00::5", "fd00::5/128"),
    ])
    def test_canonical_cidr(self, text, canonical):
        assert _mesh.canonical_cidr(text) == canonical

    @pytest.mark.parametrize(("text", "said"), [
        ("10.244.1.5/24", "write 10.244.1.0/24"),
        ("fd00:10:244:1::1/64", "write fd00:10:244:1::/64"),
        ("10.244.1.0/33", "from 0 to 32"),
        ("fd00::/129", "from 0 to 128"),
        ("10.244.1.0/024", "prefix length"),
        ("10.244.1.0/-1", "prefix length"),
        ("10.244.1.0/255.255.255.0", "prefix length"),
        ("10.244.1.0/", "prefix length"),
        ("0.0.0.0/0", "overlaps"),
        ("::/0", "overlaps"),
        ("64.0.0.0/2", "loopback"),
        ("128.0.0.0/1", "link-local"),
        ("fe80::/64", "link-local"),
        (JINJA, "not an IP address"),
        (None, "not a CIDR"),
        (["10.0.0.0/8"], "not a CIDR"),
    ])
    def test_refused_cidr(self, text, said):
        with pytest.raises(MeshError, match=said):
            _mesh.canonical_cidr(text)

    @pytest.mark.parametrize(("text", "address", "port"), [
        ("203.0.113.7", "203.0.113.7", None),
        ("203.0.113.7:51840", "203.0.113.7", 51840),
        ("2001:DB8::7", "2001:db8::7", None),
        ("[2001:db8::7]", "2001:db8::7", None),
        ("[2001:db8::7]:1", "2001:db8::7", 1),
        ("203.0.113.7:65534", "203.0.113.7", 65534),
    ])
    def test_endpoint(self, text, address, port):
        assert _mesh.parse_endpoint(text) == {"address": address, "port": port}

    @pytest.mark.parametrize(("text", "said"), [
        ("203.0.113.7:65535", "1 to 65534"),  # generation 1 uses the next port
        ("203.0.113.7:0", "port"),
        ("203.0.113.7:", "port"),
        ("203.0.113.7:051840", "port"),
        ("203.0.113.7:http", "port"),
        ("[203.0.113.7]:51840", "brackets"),
        ("[2001:db8::7]51840", "not an endpoint"),
        ("[2001:db8::7]:", "port"),
        ("node-1.example.com", "DNS names are not accepted"),
        ("node-1.example.com:51840", "DNS names are not accepted"),
        ("localhost", "DNS names are not accepted"),
        ("203.0.113.256", "not an endpoint"),
        ("127.0.0.1:51840", "loopback"),
        ("", "not an endpoint"),
        (JINJA, "not an endpoint"),
        (51840, "not an endpoint"),
        (None, "not an endpoint"),
    ])
    def test_refused_endpoint(self, text, said):
        with pytest.raises(MeshError, match=said):
            _mesh.parse_endpoint(text)

    def test_order_of_node_addresses(self):
        given_order = ["2001:db8::d", "198.18.0.13", "203.0.113.9", "192.0.2.13", "198.18.0.13"]
        assert _mesh.node_address_order(given_order) == ["198.18.0.13", "2001:db8::d", "192.0.2.13", "203.0.113.9"]
        # what is not primary may come in any order
        assert _mesh.node_address_order(["198.18.0.13", "2001:db8::d", "192.0.2.13",
                                         "203.0.113.9"]) == _mesh.node_address_order(given_order)
        assert _mesh.node_address_order(["192.0.2.13", "198.18.0.13"])[0] == "192.0.2.13"
        assert _mesh.node_address_order([]) == []

    def test_sorted_by_number(self):
        assert _mesh.sorted_cidrs(["fd00::/64", "10.10.0.0/24", "10.9.0.0/24", "10.9.0.0/24"]) == ["10.9.0.0/24", "10.10.0.0/24",
                                                                                                   "fd00::/64"]


networks = st.one_of(
    st.integers(0, 32).flatmap(lambda length: st.integers(0, 7).map(lambda bits: ipaddress.ip_network((bits << 29, length), strict=False))),
    st.integers(0, 6).flatmap(lambda length: st.integers(0, 63).map(lambda bits: ipaddress.ip_network((bits << 122, length),
                                                                                                      strict=False))))


class TestOverlaps:

    @given(st.lists(st.tuples(networks.map(str), st.integers(0, 3)), max_size=12))
    def test_as_by_comparing_all_with_all(self, entries):
        found = {frozenset(pair) for pair in _mesh.find_overlaps(entries)}
        wanted = set()
        for one, other in itertools.combinations(sorted(set(entries)), 2):
            first, second = ipaddress.ip_network(one[0]), ipaddress.ip_network(other[0])
            if one[1] != other[1] and first.version == second.version and first.overlaps(second):
                wanted.add(frozenset((one, other)))
        assert found == wanted

    def test_stops(self):
        entries = [("10.0.0.0/24", number) for number in range(1000)]
        assert len(_mesh.find_overlaps(entries, limit=10)) == 10


class TestKeysAndNames:

    def test_key(self):
        assert _mesh.canonical_public_key(key(1)) == key(1)

    @pytest.mark.parametrize("text", [
        "", "abc", key(1)[:-1], key(1) + "=", key(1) + "\n", " " + key(1), key(1).replace("=", "A"), "A" * 43 + "=", "-" + key(1)[1:],
        JINJA, None, 7,
        base64.b64encode(bytes(31)).decode(), base64.b64encode(bytes(33)).decode(), key(1)[:43] + "\u003d\u0000", b"A" * 44,
    ])
    def test_refused_key(self, text):
        with pytest.raises(MeshError, match="not a WireGuard public key"):
            _mesh.canonical_public_key(text)

    @given(st.binary(min_size=32, max_size=32).filter(any))
    def test_every_other_spelling_is_refused(self, raw):
        text = base64.b64encode(raw).decode()
        assert _mesh.canonical_public_key(text) == text
        for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/":
            other = text[:42] + character + "="
            if base64.b64decode(other) == raw and other != text:
                with pytest.raises(MeshError):
                    _mesh.canonical_public_key(other)

    @pytest.mark.parametrize("name", ["a", "worker-1", "ip-10-0-0-1.eu-central-1.compute.internal", "0", "a" * 253])
    def test_name(self, name):
        assert _mesh.check_node_name(name) == name

    @pytest.mark.parametrize("name", ["", "Worker", "worker_1", "-a", "a-", "a..b", ".a", "a.", "a b", "a\n", "a" * 254, JINJA, "../x",
                                      None, 1])
    def test_refused_name(self, name):
        with pytest.raises(MeshError, match="not the name of a Node"):
            _mesh.check_node_name(name)

    def test_probe_address(self):
        raw = base64.b64decode(key(1))
        wanted = ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + hashlib.sha256(raw).digest()[:8])
        assert _mesh.probe_address(key(1)) == str(wanted)
        # a fixed one, so that the rule cannot change unseen: sha256(0x01 * 32) begins 72cd6e8422c407fb
        assert _mesh.probe_address(base64.b64encode(b"\x01" * 32).decode()) == "fe80::72cd:6e84:22c4:7fb"

    def test_probe_address_zero(self, monkeypatch):
        class Zero:
            def digest(self):
                return bytes(32)
        some_key = key(1)
        _mesh._probe_address.cache_clear()
        monkeypatch.setattr(_mesh.hashlib, "sha256", lambda raw: Zero())
        with pytest.raises(MeshError, match="make another key"):
            _mesh.probe_address(some_key)

    def test_messages_are_one_line_of_ascii(self):
        with pytest.raises(MeshError) as caught:
            _mesh.canonical_public_key("x\n\x1b[31m\u202e" + "y" * 500)
        assert str(caught.value).isascii()
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 250


class TestDocument:

    def test_valid(self):
        doc = three()
        assert _mesh.validate_document(doc) is doc
        _mesh.validate_document(document())
        _mesh.validate_document(document(entry(1, state="pending", reason="x", public_keys={}, pod_cidrs=[], node_addresses=[],
                                               endpoints={},
                                               mtu=None)))

    def test_only_the_very_entries_of_a_known_document_are_taken_as_checked(self):
        known = three()
        name = sorted(known["nodes"])[0]
        for broken in (dict(known["nodes"][name], keepalive=-1), None):
            with pytest.raises(MeshError, match=name):
                _mesh.validate_document(dict(known, nodes=dict(known["nodes"], **{name: broken})), known)
        assert _mesh.validate_document(dict(known, serial=7), known)["serial"] == 7
        # what nodes must not share is looked at all the same
        twice = dict(known["nodes"], other=known["nodes"][name])
        with pytest.raises(MeshError, match="needs a key of its own"):
            _mesh.validate_document(dict(known, nodes=twice), dict(known, nodes=twice))

    def test_bytes(self):
        doc = three()
        data = _mesh.document_bytes(doc)
        assert data.endswith(b"\n")
        assert data.count(b"\n") == 1
        assert b" " not in data
        shuffled = json.loads(json.dumps(doc))
        shuffled["nodes"] = dict(reversed(list(shuffled["nodes"].items())))
        assert _mesh.document_bytes(shuffled) == data
        assert _mesh.load_document(data) == doc
        assert _mesh.document_bytes(_mesh.load_document(data)) == data
        assert _mesh.document_sha256(doc) == hashlib.sha256(data).hexdigest()

    @pytest.mark.parametrize("data", [
        b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"schema": 1}', b"[" * 100000, None, b'{"schema": 2, "anything": "else"}',
    ])
    def test_not_a_document(self, data):
        with pytest.raises(MeshError):
            _mesh.load_document(data)

    def test_newer_schema_says_so(self):
        with pytest.raises(MeshError, match="reads schema 1, the document has 2"):
            _mesh.load_document(json.dumps(dict(three(), schema=2, more=1)))

    def test_duplicate_names_in_json(self):
        data = _mesh.document_bytes(document(entry(1))).replace(b'"n1":', b'"n1":{},"n1":')
        with pytest.raises(MeshError, match="'n1' appears twice"):
            _mesh.load_document(data)

    @pytest.mark.parametrize(("change", "said"), [
        ({"serial": 0}, "serial"),
        ({"serial": True}, "serial"),
        ({"serial": "7"}, "serial"),
        ({"complete": "yes"}, "complete"),
        ({"generation": 2}, "generation"),
        ({"generation": "0"}, "generation"),
        ({"generation": False}, "generation"),
        ({"ports": {"0": 51840}}, "ports"),
        ({"ports": {"0": 51840, "1": 51840}}, "both generations"),
        ({"ports": {"0": 0, "1": 1}}, "ports"),
        ({"nodes": []}, "nodes"),
        ({"surprise": 1}, "unknown fields 'surprise'"),
    ])
    def test_wrong_document(self, change, said):
        assert any(said in problem for problem in problems_of(dict(three(), **change)))

    @pytest.mark.parametrize(("change", "said"), [
        ({"state": "gone"}, "node 'n2', state: 'gone'"),
        ({"reason": None}, "reason"),
        ({"uid": 5}, "uid"),
        ({"mtu": 0}, "mtu"),
        ({"mtu": True}, "mtu"),
        ({"mtu": 65535}, "mtu"),
        ({"keepalive": -1}, "keepalive"),
        ({"keepalive": 65536}, "keepalive"),
        ({"keepalive": None}, "keepalive"),
        ({"pod_cidrs": "10.244.2.0/24"}, "pod_cidrs: expected a list"),
        ({"pod_cidrs": ["10.244.2.1/24"]}, "host bits"),
        ({"pod_cidrs": ["FD00::/64"]}, "canonical form; write fd00::/64"),
        ({"pod_cidrs": ["10.244.2.0/24", "10.244.2.0/24"]}, "twice"),
        ({"pod_cidrs": [JINJA]}, "not an IP address"),
        ({"node_addresses": ["198.18.0.2/32"]}, "not an IP address"),
        ({"node_addresses": [None]}, "not an IP address"),
        ({"endpoints": {"ipv4": {"address": "2001:db8::2", "port": None}}}, "other family"),
        ({"endpoints": {"ipv4": {"address": "198.18.0.2", "port": 65535}}}, "1 to 65534"),
        ({"endpoints": {"ipv4": {"address": "198.18.0.2"}}}, "missing fields port"),
        ({"endpoints": {"dns": {"address": "x", "port": None}}}, "by family"),
        ({"endpoints": []}, "by family"),
        ({"public_keys": {"2": key(2)}, "probe_addresses": {}}, "by generation"),
        ({"public_keys": {"0": JINJA}, "probe_addresses": {"0": "fe80::1"}}, "not a WireGuard public key"),
        ({"public_keys": {"0": ["x"]}, "probe_addresses": {"0": "fe80::1"}}, "not a WireGuard public key"),
        ({"probe_addresses": {"0": "fe80::1"}}, "does not belong to the public key"),
        ({"probe_addresses": {}}, "one per public key"),
        ({"extra": 1}, "unknown fields 'extra'"),
    ])
    def test_wrong_node(self, change, said):
        assert any(said in problem for problem in problems_of(three(**change)))

    def test_wrong_name(self):
        doc = three()
        doc["nodes"][JINJA] = entry(4)
        assert any("not the name of a Node" in problem for problem in problems_of(doc))

    def test_all_findings_at_once(self):
        doc = document(entry(1, mtu=5), entry(2, keepalive="x"), entry(3, pod_cidrs=["10.0.0.1/8"]), serial=0)
        text = "\n".join(problems_of(doc))
        for part in ("serial", "'n1', mtu", "'n2', keepalive", "'n3', pod_cidrs"):
            assert part in text

    @pytest.mark.parametrize(("change", "said"), [
        ({"public_keys": {"0": key(1)}}, "public key %s is on nodes n1 (generation 0) and n2 (generation 0)" % key(1)),
        ({"public_keys": {"0": key(2), "1": key(3)}}, "n2 (generation 1) and n3 (generation 0)"),
        ({"public_keys": {"0": key(2), "1": key(2)}}, "n2 (generation 0) and n2 (generation 1)"),
        ({"pod_cidrs": ["10.244.1.0/24"]}, "node n2, pod CIDR 10.244.1.0/24: overlaps pod CIDR 10.244.1.0/24 of node n1"),
        ({"pod_cidrs": ["10.244.0.0/16"]}, "node n3, pod CIDR 10.244.3.0/24: overlaps pod CIDR 10.244.0.0/16 of node n2"),
        ({"pod_cidrs": ["198.18.0.0/16"]}, "node n2, node address 198.18.0.2/32: overlaps pod CIDR 198.18.0.0/16 of node n2"),
        ({"node_addresses": ["198.18.0.1"]}, "node address 198.18.0.1/32 of node n1"),
        ({"node_addresses": ["10.244.3.9"]}, "node n2, node address 10.244.3.9/32: overlaps pod CIDR 10.244.3.0/24 of node n3"),
        ({"endpoints": {"ipv4": {"address": "10.244.3.9", "port": None}}},
         "node n2, endpoint 10.244.3.9/32: overlaps pod CIDR 10.244.3.0/24"),
        ({"endpoints": {"ipv4": {"address": "10.244.2.9", "port": None}}},
         "node n2, endpoint 10.244.2.9/32: overlaps pod CIDR 10.244.2.0/24"),
        ({"endpoints": {"ipv4": {"address": "198.18.0.1", "port": None}}}, "endpoint 198.18.0.1:51840 belongs to nodes n1 and n2"),
        # behind one address: generation 1 of n1 would have the port of generation 0 of n2
        ({"endpoints": {"ipv4": {"address": "198.18.0.1", "port": 51841}}}, "endpoint 198.18.0.1:51841 belongs to nodes n1 and n2"),
    ])
    def test_collisions(self, change, said):
        assert any(said in problem for problem in problems_of(three(**change)))

    @pytest.mark.parametrize("change", [
        {"endpoints": {"ipv4": {"address": "198.18.0.1", "port": 51842}}},  # a port forwarded by n1
        {"pod_cidrs": ["10.244.2.0/24", "10.244.2.128/25"]},  # nested, but of one node
        {"state": "excluded", "reason": "x", "pod_cidrs": ["10.244.1.0/24"], "public_keys": {"0": key(1)}},  # not in the tunnel
    ])
    def test_no_collision(self, change):
        _mesh.validate_document(three(**change))

    def test_probe_collision(self, monkeypatch):
        monkeypatch.setattr(_mesh, "probe_address", lambda key: "fe80::1")
        doc = document(entry(1), entry(2))
        assert any("have the same probe address fe80::1" in problem for problem in problems_of(doc))

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("10.0.0.0/8"),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6),
           st.sampled_from(["schema", "serial", "complete", "generation", "ports", "nodes", "n1", "state", "reason", "uid", "public_keys",
                            "endpoints", "pod_cidrs", "node_addresses", "probe_addresses", "mtu", "keepalive"]))
    def test_whatever_is_in_a_field_is_a_finding_not_a_crash(self, value, field):
        doc = three()
        target = doc if field in doc else doc["nodes"] if field == "n1" else doc["nodes"]["n1"]
        target[field] = value
        try:
            _mesh.load_document(_mesh.document_bytes(doc))
        except MeshError:
            pass

    @given(st.binary(max_size=60) | st.text(max_size=60))
    def test_any_bytes(self, data):
        with pytest.raises(MeshError):
            _mesh.load_document(data)


class TestView:

    def test_peers(self):
        doc = document(entry(1, keepalive=25), entry(2), entry(3, state="excluded"), entry(4, state="pending", reason="no key",
                                                                                           public_keys={}))
        assert _mesh.peers_of(doc, "n1", 0) == {key(2): {
            "name": "n2", "endpoint": "198.18.0.2:51840", "keepalive": 25,
            "allowed_ips": sorted(["10.244.2.0/24", "fd00:10:244:2::/64", "198.18.0.2/32", "2001:db8::2/128",
                                   _mesh.probe_address(key(2)) + "/128"])}}
        assert _mesh.peers_of(doc, "n2", "0")[key(1)]["keepalive"] == 0  # keepalive is a node's own business

    def test_pending_with_a_key_is_a_peer(self):
        doc = document(entry(1), entry(2, state="pending", reason="no address", pod_cidrs=[], node_addresses=[], endpoints={}))
        assert _mesh.peers_of(doc, "n1", 0)[key(2)] == {
            "name": "n2", "endpoint": None, "keepalive": 0, "allowed_ips": [_mesh.probe_address(key(2)) + "/128"]}

    def test_generations(self):
        doc = document(entry(1, public_keys={"0": key(1), "1": key(11)}), entry(2, public_keys={"0": key(2), "1": key(12)}),
                       entry(3), entry(4, public_keys={"1": key(14)}, endpoints={"ipv4": {"address": "203.0.113.4", "port": 1000}}))
        assert set(_mesh.peers_of(doc, "n1", 0)) == {key(2), key(3)}
        peers = _mesh.peers_of(doc, "n1", 1)
        assert set(peers) == {key(12), key(14)}
        assert peers[key(12)]["endpoint"] == "198.18.0.2:51841"
        assert peers[key(14)]["endpoint"] == "203.0.113.4:1001"
        assert _mesh.probe_address(key(12)) + "/128" in peers[key(12)]["allowed_ips"]
        assert _mesh.probe_address(key(2)) + "/128" not in peers[key(12)]["allowed_ips"]

    @pytest.mark.parametrize(("node", "generation", "said"), [
        ("n9", 0, "'n9' is not in the mesh document"),
        ("n1", 1, "without a public key of this generation"),
        ("n2", 0, "it is excluded in the mesh document \\(runs Windows\\)"),
        ("n3", 0, "pending in the mesh document \\(no public key known yet\\)"),
        ("n1", 2, "expected 0 or 1"),
        ("n1", True, "expected 0 or 1"),
        ("n1", None, "expected 0 or 1"),
    ])
    def test_no_view_is_an_error_and_never_an_empty_one(self, node, generation, said):
        doc = document(entry(1), entry(2, state="excluded", reason="runs Windows"),
                       entry(3, state="pending", reason="no public key known yet", public_keys={}))
        with pytest.raises(MeshError, match=said):
            _mesh.peers_of(doc, node, generation)

    @pytest.mark.parametrize(("own", "peer", "endpoint"), [
        ("46", "46", "198.18.0.2:51840"),
        ("4", "46", "198.18.0.2:51840"),
        ("6", "46", "[2001:db8::2]:51840"),
        ("46", "6", "[2001:db8::2]:51840"),
        ("4", "6", "[2001:db8::2]:51840"),  # whatever the peer has
        ("6", "4", "198.18.0.2:51840"),
        ("", "46", "198.18.0.2:51840"),  # we are behind NAT
        ("46", "", None),
    ])
    def test_choice_of_endpoint(self, own, peer, endpoint):
        def having(number, families):
            return entry(number, endpoints={"ipv" + family: value for family, value in (
                (name[-1], value) for name, value in entry(number)["endpoints"].items()) if family in families})
        doc = _mesh.validate_document(document(having(1, own), having(2, peer)))
        assert _mesh.endpoint_of(doc, "n1", "n2", 0) == endpoint
        assert _mesh.peers_of(doc, "n1", 0)[key(2)]["endpoint"] == endpoint

    def test_addresses(self):
        doc = document(entry(1, node_addresses=["198.18.0.1", "2001:db8::1", "192.0.2.1"]), entry(2, node_addresses=["2001:db8::2"]),
                       entry(3, node_addresses=[], public_keys={}))
        assert _mesh.device_addresses(doc, "n1", 0) == ["198.18.0.1/32", "2001:db8::1/128", _mesh.probe_address(key(1)) + "/64"]
        assert _mesh.device_addresses(doc, "n2", 0) == ["2001:db8::2/128", _mesh.probe_address(key(2)) + "/64"]
        assert _mesh.device_addresses(doc, "n3", 0) == []
        assert _mesh.primary_addresses(doc, "n1") == {"ipv4": "198.18.0.1", "ipv6": "2001:db8::1"}
        assert _mesh.primary_addresses(doc, "n2") == {"ipv6": "2001:db8::2"}
        assert _mesh.local_pod_cidrs(doc, "n2") == ["10.244.2.0/24", "fd00:10:244:2::/64"]

    def test_routes(self):
        doc = document(entry(1), entry(2, public_keys={"1": key(2)}), entry(3, state="excluded"), entry(4, public_keys={}, state="pending"))
        assert _mesh.table_routes(doc, "n1") == {
            "pods": [("10.244.2.0/24", "n2"), ("fd00:10:244:2::/64", "n2")], "nodes": [("198.18.0.2/32", "n2"), ("2001:db8::2/128", "n2")]}
        assert _mesh.table_routes(doc, "n1", 0) == {"pods": [], "nodes": []}
        assert _mesh.table_routes(doc, "n1", "1") == _mesh.table_routes(doc, "n1")
        with pytest.raises(MeshError):
            _mesh.table_routes(doc, "n9")

    def test_mtu(self):
        doc = document(entry(1), entry(2, mtu=1370), entry(3, mtu=None))
        assert [_mesh.mesh_mtu(doc, name) for name in ("n1", "n2", "n3")] == [1420, 1370, None]
        assert _mesh.path_mtu(doc, "n1", "n2") == 1370
        assert _mesh.path_mtu(doc, "n1", "n3") == 1420
        assert _mesh.path_mtu(doc, "n3", "n3") is None


class TestCompare:

    def test_same(self):
        assert _mesh.compare_documents(three(), three()) == []
        assert _mesh.compare_documents(three(), dict(three(), serial=8)) == []

    def test_first(self):
        lines = _mesh.compare_documents(None, document(entry(1), entry(2, state="excluded", reason="runs Windows")))
        assert lines == ["first mesh document", "node n1 joined: member, 10.244.1.0/24, fd00:10:244:1::/64, 198.18.0.1, 2001:db8::1",
                         "node n2 joined: excluded (runs Windows), 10.244.2.0/24, fd00:10:244:2::/64, 198.18.0.2, 2001:db8::2"]

    @pytest.mark.parametrize(("change", "lines"), [
        ({"state": "pending", "reason": "no key"}, ["node n2: pending (no key), was member"]),
        ({"uid": "other"}, ["node n2: was deleted and added again under the same name (uid other, was uid-2)"]),
        ({"public_keys": {"0": key(9)}}, ["node n2: new public key of generation 0 (%s..., was %s...)" % (key(9)[:8], key(2)[:8])]),
        ({"public_keys": {"0": key(2), "1": key(9)}}, ["node n2: public key of generation 1 added (%s...)" % key(9)[:8]]),
        ({"public_keys": {}}, ["node n2: public key of generation 0 withdrawn (was %s...)" % key(2)[:8]]),
        ({"pod_cidrs": ["10.244.9.0/24", "fd00:10:244:2::/64"]},
         ["node n2: pod CIDR 10.244.9.0/24 added", "node n2: pod CIDR 10.244.2.0/24 removed"]),
        ({"node_addresses": ["198.18.0.2"]}, ["node n2: node address 2001:db8::2 removed"]),
        ({"node_addresses": ["2001:db8::2", "198.18.0.2"]}, ["node n2: order of node addresses now 2001:db8::2, 198.18.0.2"]),
        ({"endpoints": {"ipv4": {"address": "203.0.113.2", "port": 1000}}},
         ["node n2: IPv4 endpoint 203.0.113.2:1000, was 198.18.0.2", "node n2: IPv6 endpoint none, was 2001:db8::2"]),
        ({"mtu": None}, ["node n2: MTU not measured, was 1420"]),
        ({"keepalive": 25}, ["node n2: keepalive 25 s, was 0 s"]),
    ])
    def test_change(self, change, lines):
        assert _mesh.compare_documents(three(), three(**change)) == lines

    def test_joined_and_left(self):
        new = three()
        new["nodes"]["n4"] = new["nodes"].pop("n1")
        assert [line.split(":")[0] for line in _mesh.compare_documents(three(), new)] == ["node n1 left", "node n4 joined"]

    def test_document_fields(self):
        assert _mesh.compare_documents(three(), dict(three(), complete=False, ports={"0": 1, "1": 2})) == [
            "port of generation 0: 1, was 51840", "port of generation 1: 2, was 51841", "node list is now not known to be complete"]

    @given(st.sampled_from(sorted(entry(2))), st.data())
    def test_no_difference_is_swallowed(self, field, data):
        other = {"state": "pending", "reason": "x", "uid": "u", "public_keys": {"1": key(7)}, "endpoints": {}, "pod_cidrs": [], "mtu": 1300,
                 "node_addresses": ["198.18.0.2"], "probe_addresses": None, "keepalive": data.draw(st.integers(1, 65535))}[field]
        if other is not None:
            assert _mesh.compare_documents(three(), three(**{field: other}))


@st.composite
def clusters(draw):
    """A valid document with every kind of node."""
    names = draw(st.lists(st.sampled_from(["a", "b", "cp-1", "worker-1", "worker-10", "worker-2", "z.example.com", "0"]), min_size=1,
                          unique=True))
    nodes = {}
    for number, name in enumerate(names, 1):
        generations = draw(st.sets(st.sampled_from("01")))
        families = draw(st.sets(st.sampled_from(["ipv4", "ipv6"])))
        full = entry(number)
        nodes[name] = entry(
            number,
            state="excluded" if draw(st.integers(0, 5)) == 0 else "member" if generations else "pending",
            public_keys={generation: key(number * 10 + int(generation)) for generation in generations},
            endpoints={family: full["endpoints"][family] for family in draw(st.sets(st.sampled_from(["ipv4", "ipv6"])))},
            pod_cidrs=[cidr for cidr in full["pod_cidrs"] if _mesh.family_of(cidr) in families],
            node_addresses=[address for address in full["node_addresses"] if _mesh.family_of(address) in families],
            keepalive=draw(st.integers(0, 60)))
    return document(nodes=nodes)


class TestProperties:

    @given(clusters(), st.sampled_from([0, 1]))
    def test_the_mesh_is_sound(self, doc, generation):
        _mesh.validate_document(doc)
        views = {name: _mesh.peers_of(doc, name, generation) for name, value in doc["nodes"].items() if _mesh.is_peer(value, generation)}
        for name, peers in views.items():
            named = {peer["name"]: peer for peer in peers.values()}
            # all of the others, once, never oneself
            assert sorted(named) == sorted(set(views) - {name})
            assert len(named) == len(peers)
            # disjoint allowed IPs, and what one's own device accepts is what others say of one
            owners = [(cidr, peer) for peer, value in named.items() for cidr in value["allowed_ips"]]
            assert _mesh.find_overlaps(owners) == []
            for other in named:
                mine = views[other][doc["nodes"][name]["public_keys"][str(generation)]]
                assert mine["name"] == name
                for address in _mesh.device_addresses(doc, name, generation):
                    assert _mesh.host_cidr(address.split("/")[0]) in mine["allowed_ips"]
                assert set(_mesh.local_pod_cidrs(doc, name)) <= set(mine["allowed_ips"])
            # a route only to what the peer behind it is allowed to send
            routes = _mesh.table_routes(doc, name, generation)
            for cidr, peer in routes["pods"] + routes["nodes"]:
                assert cidr in named[peer]["allowed_ips"]
            for peer in peers.values():
                assert peer["allowed_ips"] == sorted(set(peer["allowed_ips"]))

    @given(clusters(), st.integers(0, 2 ** 32))
    def test_bytes_do_not_depend_on_order(self, doc, seed):
        chance = random.Random(seed)

        def shuffled(value):
            if isinstance(value, dict):
                items = list(value.items())
                chance.shuffle(items)
                return {name: shuffled(item) for name, item in items}
            return value
        assert _mesh.document_bytes(shuffled(copy.deepcopy(doc))) == _mesh.document_bytes(doc)
