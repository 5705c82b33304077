# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import ipaddress
import itertools
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.documents import document as document_of
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.documents import entry

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "fixtures", "guard")
# Debian 11, 12 and 13, on Linux 6.18. Each loaded the rulesets of `DOC` and printed the table, as it was and changed by hand.
VERSIONS = ("0.9.8", "1.0.6", "1.1.3")


def keyless(number, **other):
    return entry(number, **dict({"public_keys": {}, "probe_addresses": {}}, **other))


def document(**nodes):
    return document_of(nodes)


DOC = document(a=entry(1), b=entry(2), c=entry(3))
SETTINGS = {
    "encrypt": "pods", "interfaces": ["wgmesh0", "wgmesh1"], "ports": None, "fwmark": 4096, "exempt_nodes": [], "exempt_cidrs": [],
    "pod_networks": [], "admin_ports": [22]}


def guard(doc=None, node="a", **other):
    return plan.wanted_guard(doc or DOC, node, dict(SETTINGS, **other))


def texts(wanted, name):
    """The elements of a set as nft takes them."""
    return [plan.quoted(name, element) for element, dummy in wanted["elements"][name]]


# --- what the sets hold ------------------------------------------------------------------------------------------------------------------

def test_other_members_and_nothing_of_this_node():
    wanted = guard()
    assert texts(wanted, "pods4") == ["10.244.2.0/24", "10.244.3.0/24"]
    assert texts(wanted, "pods6") == ["fd00:10:244:2::/64", "fd00:10:244:3::/64"]
    assert texts(wanted, "nodes4") == ["198.18.0.12", "198.18.0.13"]
    assert texts(wanted, "nodes6") == ["2001:db8::2", "2001:db8::3"]
    assert texts(wanted, "own_pods4") == ["10.244.1.0/24"]
    assert texts(wanted, "own_pods6") == ["fd00:10:244:1::/64"]
    assert texts(wanted, "links") == ['"lo"', '"wgmesh0"', '"wgmesh1"']
    assert texts(wanted, "tunnel_ports") == ["51840", "51841"]
    assert texts(wanted, "admin_ports") == ["22"]
    assert (texts(wanted, "exempt4"), texts(wanted, "exempt6")) == ([], [])
    assert (wanted["guarded"], wanted["exempt"], wanted["warnings"]) == (2, [], [])


def test_an_exempt_node_is_exempt_at_both_ends():
    wanted = guard(exempt_nodes=["b"])
    assert texts(wanted, "pods4") == ["10.244.3.0/24"] and texts(wanted, "nodes6") == ["2001:db8::3"]
    assert (wanted["exempt"], wanted["guarded"], wanted["warnings"]) == (["b"], 1, [])
    itself = guard(node="b", exempt_nodes=["b"], pod_networks=["10.244.0.0/16"])
    assert itself["guarded"] == 0 and texts(itself, "pods4") == [] and texts(itself, "nodes4") == []
    assert itself["warnings"] == ["exempt_nodes: names b itself: nothing is dropped on this node"]


def test_an_unknown_exempt_node_is_said():
    assert guard(exempt_nodes=["z"])["warnings"] == [
        "exempt_nodes: z is not in the mesh document; a name must be that of the Node object"]
    many = guard(exempt_nodes=["z%02d" % number for number in range(14)])["warnings"][0]
    assert "z09 and 4 more are not in" in many and "z10" not in many


def test_an_excluded_node_cannot_be_in_the_tunnel_so_it_is_left_alone():
    doc = document(a=entry(1), b=keyless(2, state="excluded", reason="windows"), c=entry(3))
    assert texts(guard(doc), "pods4") == ["10.244.3.0/24"]
    with pytest.raises(MeshError, match=r"node: b is excluded in the mesh document \(windows\).*exempt_nodes"):
        guard(doc, "b")
    assert guard(doc, "b", exempt_nodes=["b"])["guarded"] == 0


def test_a_node_without_a_key_is_closed_until_it_has_one():
    doc = document(a=entry(1), b=keyless(2, state="pending", reason="no key"), c=entry(3))
    wanted = guard(doc)
    assert texts(wanted, "pods4") == ["10.244.2.0/24", "10.244.3.0/24"]
    assert wanted["warnings"] == ["b has no key yet and no tunnel: nothing is exchanged with it until then"]
    with pytest.raises(MeshError, match="cut off from every other node"):
        guard(doc, "b")
    with pytest.raises(MeshError, match="not in the mesh document"):
        guard(doc, "z")


def test_exempt_prefixes_over_pods_are_said():
    assert guard(exempt_cidrs=["198.18.0.0/24"])["warnings"] == []
    wanted = guard(exempt_cidrs=["10.244.3.128/25", "192.0.2.0/25", "192.0.2.0/24", "2001:db8::2"])
    assert len(wanted["warnings"]) == 1 and wanted["warnings"][0].startswith(
        "exempt_cidrs: 10.244.3.128/25, 192.0.2.0/25, 192.0.2.0/24, 2001:db8::2/128: pods of c lie in them")
    assert texts(wanted, "exempt4") == ["10.244.3.128/25", "192.0.2.0/24"], "no overlaps"
    assert texts(wanted, "exempt6") == ["2001:db8::2"]
    assert "10.244.3.0/24" in texts(wanted, "pods4"), "exempt wins by the order of the rules, not by holes"


def test_ports_of_endpoints_that_are_forwarded():
    doc = document(a=entry(1), b=entry(2, endpoints={"ipv4": {"address": "203.0.113.7", "port": 60000}}))
    assert texts(guard(doc), "tunnel_ports") == ["51840", "51841", "60000", "60001"]
    assert texts(guard(doc, ports=[5000, 5000]), "tunnel_ports") == ["5000"]


def test_nested_pod_cidrs_of_a_node():
    doc = document(a=entry(1), b=entry(2, pod_cidrs=["10.8.0.0/16", "10.8.3.0/24", "10.9.0.0/16"]))
    wanted = guard(doc)
    assert texts(wanted, "pods4") == ["10.8.0.0/16", "10.9.0.0/16"], "no overlaps, and neighbours stay apart"
    assert [name for dummy, name in wanted["elements"]["pods4"]] == ["b", "b"]


def test_pod_networks_guard_who_is_not_in_the_document():
    doc = document(a=entry(1, node_addresses=["10.244.200.1"]), b=entry(2), c=keyless(3, state="excluded"), d=entry(4))
    wanted = guard(doc, pod_networks=["10.244.0.0/16"], exempt_nodes=["d"])
    assert texts(wanted, "pods4") == [
        "10.244.0.0/24", "10.244.2.0/24", "10.244.5.0-10.244.200.0", "10.244.200.2-10.244.255.255"]
    assert [name for dummy, name in wanted["elements"]["pods4"]][1] == "b"
    assert texts(wanted, "pods6") == ["fd00:10:244:2::/64"]


@pytest.mark.parametrize("other,words", [
    ({"exempt_cidrs": ["198.18.0.1/24"]}, "exempt_cidrs: '198.18.0.1/24' is not a CIDR: it has host bits set"),
    ({"exempt_cidrs": ["0.0.0.0/0"]}, "exempt_cidrs: '0.0.0.0/0' cannot be"),
    ({"exempt_cidrs": ["storage"]}, "exempt_cidrs: 'storage' is not"),
    ({"pod_networks": ["10.244.0.0/33"]}, "pod_networks: '10.244.0.0/33'"),
    ({"interfaces": []}, "interfaces: without a device"), ({"interfaces": ["lo"]}, "interfaces: 'lo'"),
    ({"interfaces": ['wg" accept']}, "interfaces: 'wg"), ({"interfaces": ["wgmesh0123456789"]}, "at most 15"),
    ({"interfaces": [".."]}, "'..'"),
    ({"ports": []}, "ports: without a port"), ({"ports": [0]}, "ports: 0"), ({"ports": [51840, 65536]}, "ports: 65536"),
    ({"admin_ports": [70000]}, "admin_ports: 70000"), ({"fwmark": 0}, "mesh_fwmark: 0"), ({"fwmark": 1 << 32}, "mesh_fwmark")])
def test_settings_that_cannot_be_meant(other, words):
    with pytest.raises(MeshError) as caught:
        guard(**other)
    assert words in str(caught.value)


# --- intervals ---------------------------------------------------------------------------------------------------------------------------

# Few addresses, so that everything meets everything.
def intervals(version=4, base=0x0A000000, size=64):
    return st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).map(
        lambda pair: (version, base + min(pair), base + max(pair)))


def addresses(pieces):
    return {(version, address) for version, first, last in pieces for address in range(first, last + 1)}


@given(st.lists(st.tuples(intervals(), st.sampled_from("abc")), max_size=8))
def test_merged_covers_the_same_without_overlaps(pairs):
    result = plan.merged(pairs)
    assert addresses(one for one, dummy in result) == addresses(one for one, dummy in pairs)
    assert result == sorted(result)
    assert not any(plan.overlap(one, other) for (one, dummy), (other, dummy2) in zip(result, result[1:]))
    for one, name in result:
        assert name == "" or any(one == other and name == owner for other, owner in pairs), "nobody gets what is not theirs"


@given(st.lists(intervals(), max_size=8), st.lists(intervals(), max_size=8))
def test_covered_is_equal_where_the_addresses_are(one, other):
    assert (plan.covered(one) == plan.covered(other)) == (addresses(one) == addresses(other))


def test_covered_does_not_join_families():
    last4, first6 = (4, 0, 0xFFFFFFFF), (6, 0x100000000, 0x100000005)
    assert plan.covered([first6, last4]) == [last4, first6]


@given(st.one_of(intervals(), intervals(6, 0xFD << 120), st.sampled_from([(4, 0, 0xFFFFFFFF), (6, 0, (1 << 128) - 1), (6, 0, 0)])))
def test_interval_text_is_the_interval(one):
    text = plan.interval_text(one)
    first, dummy, last = text.partition("-")
    assert ((plan.interval(first)[:2] + plan.interval(last)[2:]) if last else plan.interval(text)) == one
    if not last:
        network = ipaddress.ip_network(text)
        assert (network.version, int(network[0]), int(network[-1])) == one


# --- which packets are dropped -----------------------------------------------------------------------------------------------------------

def is_family(packet, family):
    return (":" in packet["saddr"]) == (family == "ip6")


@functools.lru_cache(maxsize=None)
def host(text):
    return plan.interval(text)


MATCHES = (
    (r"(oifname|iifname) @links", lambda packet, sets, dummy: packet["dev"] in sets["links"]),
    (r"(ip6?) (saddr|daddr) @(\w+)", lambda packet, sets, found: is_family(packet, found[1]) and any(
        plan.overlap(host(packet[found[2]]), one) for one in sets[found[3]])),
    (r"(ip6?) daddr (?:{ ([^}]*) }|(\S+/\d+))", lambda packet, sets, found: is_family(packet, found[1]) and any(
        plan.overlap(host(packet["daddr"]), plan.interval(text)) for text in (found[2] or found[3]).split(", "))),
    (r"meta mark & (\w+) == (\w+)", lambda packet, sets, found: packet["mark"] & int(found[1], 16) == int(found[2], 16)),
    (r"(udp|tcp) (sport|dport) @(\w+)", lambda packet, sets, found: (
        packet["protocol"] == found[1] and str(packet[found[2]]) in sets[found[3]])),
    (r"meta l4proto udp ct direction reply ct original proto-(src|dst) @(\w+)", lambda packet, sets, found: (
        packet["protocol"] == "udp" and str(packet["answers"][found[1] == "dst"]) in sets[found[2]])),
    (r"icmpv6 type 133-137 ip6 hoplimit 255", lambda packet, sets, dummy: packet["protocol"] == "discovery"),
    (r"icmp(?:v6)? type \d(?: icmp code 4)? @th,\d+,8 17 @th,(\d+),16 { ([^}]*) }", lambda packet, sets, found: (
        packet["protocol"] == "too big for udp" and (
            str(packet["dport" if found[1] in ("240", "400") else "sport"]) in found[2].split(", ")))),
)


def verdict(wanted, hook, packet):
    """What the rules, as text, do to a packet: None or the name of the counter."""
    sets = {name: [element for element, dummy in pairs] for name, pairs in wanted["elements"].items()}
    rules = dict(plan.chains(wanted))

    def walk(chain):
        for line in rules[chain]:
            if line.startswith("type filter"):
                continue
            hit, rest = True, line
            while hit and not re.match(r"(accept|drop|jump|counter)\b", rest):
                for pattern, matches in MATCHES:
                    found = re.match(pattern + " ", rest)
                    if found:
                        hit, rest = matches(packet, sets, found), rest[found.end():]
                        break
                else:
                    raise AssertionError("no evaluation of " + rest)
            if not hit:
                continue
            if rest == "accept":
                return True
            if rest.startswith("counter"):
                return rest.split()[2]
            result = walk(rest.split()[1])
            if result is not None:
                return result
        return None

    result = walk({"out": "leaving", "in": "arriving"}[hook])
    return None if result is True else result


FIVE = document(a=entry(1), b=entry(2), c=keyless(3, state="excluded"), d=keyless(4, state="pending"), e=entry(5))
OUTSIDE = {4: "203.0.113.5", 6: "2001:db8:ffff::5"}
PLACES = [(node, kind) for node in "abcde" for kind in ("pod", "node")] + [("", "outside")]


def address_of(place, version):
    node, kind = place
    if kind == "outside":
        return OUTSIDE[version]
    number = "abcde".index(node) + 1
    if kind == "node":
        return FIVE["nodes"][node]["node_addresses"][0 if version == 4 else 1]
    return "10.244.%d.9" % number if version == 4 else "fd00:10:244:%x::9" % number


def sample(saddr, daddr, **other):
    plain = {"saddr": saddr, "daddr": daddr, "dev": "eth0", "protocol": "udp", "sport": 40000, "dport": 7, "mark": 0}
    return dict(plain, answers=other.pop("answers", (0, 0)), **other)


@st.composite
def situations(draw):
    version = draw(st.sampled_from([4, 6]))
    near, far = draw(st.sampled_from(PLACES)), draw(st.sampled_from(PLACES))
    cidrs = draw(st.lists(st.sampled_from(["198.18.0.12", "10.244.5.0/25", "fd00:10:244:2::/64", "2001:db8::5"]), max_size=2))
    return version, near, far, {
        "encrypt": draw(st.sampled_from(["pods", "nodes"])), "exempt_cidrs": cidrs,
        "exempt_nodes": draw(st.lists(st.sampled_from(["b", "e"]), max_size=1))}


@settings(max_examples=150)
@given(situations(), st.sampled_from(["eth0", "flannel.1", "lo", "wgmesh0", "wgmesh1"]))
def test_what_should_be_in_the_tunnel_and_is_not_is_dropped(situation, device):
    version, near, far, other = situation
    packet = sample(address_of(near, version), address_of(far, version), dev=device)
    exempt = any(ipaddress.ip_address(packet[end]) in ipaddress.ip_network(cidr)
                 for end in ("saddr", "daddr") for cidr in other["exempt_cidrs"])
    guarded = far[0] in "bde" and far[1] != "outside" and far[0] not in other["exempt_nodes"]
    expected = None
    if device in ("eth0", "flannel.1") and guarded and not exempt:
        if far[1] == "pod" or near == ("a", "pod"):
            expected = "_pods"
        elif other["encrypt"] == "nodes":
            expected = "_nodes"
    wanted = guard(FIVE, **other)
    assert verdict(wanted, "out", packet) == (expected and "out" + expected)
    # The same packet the other way round, as it comes in here. Whatever comes from pods of others is dropped, wherever it goes to.
    assert verdict(wanted, "in", sample(packet["daddr"], packet["saddr"], dev=device)) == (expected and "in" + expected)


@settings(max_examples=100)
@given(situations(), st.sampled_from(["b", "e"]))
def test_the_receiver_judges_as_the_sender_does(situation, receiver):
    version, near, far, other = situation
    kinds = [place[1].replace("outside", "node") for place in (near, far)]
    packet = sample(address_of(("a", kinds[0]), version), address_of((receiver, kinds[1]), version))
    out, into = verdict(guard(FIVE, "a", **other), "out", packet), verdict(guard(FIVE, receiver, **other), "in", packet)
    assert (out or "out")[3:] == (into or "in")[2:]


NODE_A, NODE_B = "198.18.0.11", "198.18.0.12"


@pytest.mark.parametrize("hook,other,dropped", [
    ("out", {"sport": 51840, "dport": 51840, "mark": 0x1000}, False),
    ("out", {"sport": 51841, "dport": 60000, "mark": 0x5000}, False),
    ("out", {"sport": 51840, "dport": 51840, "mark": 0x4000}, True),
    ("out", {"sport": 40000, "dport": 51840, "mark": 0x1000}, False),
    ("out", {"sport": 40000, "dport": 51842, "mark": 0x1000}, True),
    ("out", {"saddr": "198.18.0.13", "dport": 51840}, False),
    ("out", {"saddr": "198.18.0.13", "dport": 53}, True),
    ("out", {"protocol": "tcp", "mark": 0x1000, "sport": 51840}, True),
    ("in", {"dport": 51840}, False), ("in", {"dport": 51841}, False), ("in", {"dport": 51842}, True),
    ("in", {"protocol": "tcp", "dport": 51840}, True),
    ("in", {"dport": 33333, "answers": (51840, 60000)}, False), ("in", {"dport": 33333, "answers": (33333, 51840)}, False),
    ("in", {"dport": 33333, "answers": (33333, 53)}, True),
    ("in", {"daddr": "224.0.0.18"}, False), ("in", {"daddr": "255.255.255.255"}, False), ("in", {"daddr": "198.18.0.255"}, True),
    ("both", {"protocol": "tcp", "dport": 22}, False), ("both", {"protocol": "tcp", "sport": 22}, False),
    ("both", {"protocol": "tcp", "dport": 2222}, True), ("both", {"protocol": "udp", "dport": 22}, True),
    ("both", {"protocol": "discovery"}, False), ("both", {"protocol": "other icmp"}, True),
    ("both", {"protocol": "too big for udp", "sport": 51840, "dport": 9}, False),
    ("both", {"protocol": "too big for udp", "sport": 9, "dport": 51841}, False),
    ("both", {"protocol": "too big for udp", "sport": 9, "dport": 9}, True)])
def test_what_may_pass_between_nodes(hook, other, dropped):
    for each in ("out", "in") if hook == "both" else (hook,):
        ends = {"saddr": NODE_A, "daddr": NODE_B} if each == "out" else {"saddr": NODE_B, "daddr": NODE_A}
        packet = sample(**dict(ends, **other))
        assert verdict(guard(encrypt="nodes"), each, packet) == ("%s_nodes" % each if dropped else None)
        assert verdict(guard(encrypt="pods"), each, packet) is None, "between nodes only with encrypt=nodes"


@pytest.mark.parametrize("other", [
    {"sport": 51840, "dport": 51840, "mark": 0x1000}, {"protocol": "tcp", "dport": 22}, {"protocol": "discovery"},
    {"protocol": "too big for udp", "dport": 51840}])
@pytest.mark.parametrize("encrypt", ["pods", "nodes"])
def test_nothing_is_spared_where_pods_are_concerned(encrypt, other):
    for near, far in (("10.244.1.9", "10.244.2.9"), (NODE_A, "10.244.2.9"), ("10.244.1.9", NODE_B)):
        assert verdict(guard(encrypt=encrypt), "out", sample(near, far, **other)) == "out_pods"
        assert verdict(guard(encrypt=encrypt), "in", sample(far, near, **other)) == "in_pods"


# --- as text -----------------------------------------------------------------------------------------------------------------------------

RULES = """\
chain spared
  icmpv6 type 133-137 ip6 hoplimit 255 accept
  tcp dport @admin_ports accept
  tcp sport @admin_ports accept
  icmp type 3 icmp code 4 @th,136,8 17 @th,224,16 { 51840, 51841 } accept
  icmp type 3 icmp code 4 @th,136,8 17 @th,240,16 { 51840, 51841 } accept
  icmpv6 type 2 @th,112,8 17 @th,384,16 { 51840, 51841 } accept
  icmpv6 type 2 @th,112,8 17 @th,400,16 { 51840, 51841 } accept
chain leaving_nodes
  meta mark & 0x1000 == 0x1000 udp sport @tunnel_ports accept
  meta mark & 0x1000 == 0x1000 udp dport @tunnel_ports accept
  ip saddr @nodes4 udp dport @tunnel_ports accept
  ip6 saddr @nodes6 udp dport @tunnel_ports accept
  jump spared
  counter name out_nodes drop
chain arriving_nodes
  udp dport @tunnel_ports accept
  meta l4proto udp ct direction reply ct original proto-src @tunnel_ports accept
  meta l4proto udp ct direction reply ct original proto-dst @tunnel_ports accept
  ip daddr { 224.0.0.0/4, 255.255.255.255 } accept
  ip6 daddr ff00::/8 accept
  jump spared
  counter name in_nodes drop
chain leaving
  type filter hook postrouting priority 90; policy accept;
  oifname @links accept
  ip daddr @exempt4 accept
  ip6 daddr @exempt6 accept
  ip saddr @exempt4 accept
  ip6 saddr @exempt6 accept
  ip daddr @pods4 counter name out_pods drop
  ip6 daddr @pods6 counter name out_pods drop
  ip saddr @own_pods4 ip daddr @nodes4 counter name out_pods drop
  ip6 saddr @own_pods6 ip6 daddr @nodes6 counter name out_pods drop
  ip daddr @nodes4 jump leaving_nodes
  ip6 daddr @nodes6 jump leaving_nodes
chain arriving
  type filter hook prerouting priority -110; policy accept;
  iifname @links accept
  ip saddr @exempt4 accept
  ip6 saddr @exempt6 accept
  ip daddr @exempt4 accept
  ip6 daddr @exempt6 accept
  ip saddr @pods4 counter name in_pods drop
  ip6 saddr @pods6 counter name in_pods drop
  ip daddr @own_pods4 ip saddr @nodes4 counter name in_pods drop
  ip6 daddr @own_pods6 ip6 saddr @nodes6 counter name in_pods drop
  ip saddr @nodes4 jump arriving_nodes
  ip6 saddr @nodes6 jump arriving_nodes
"""


def test_the_rules():
    of_nodes = plan.chains(guard(encrypt="nodes"))
    assert "".join("chain %s\n%s" % (name, "".join("  %s\n" % rule for rule in rules)) for name, rules in of_nodes) == RULES
    of_pods = [(name, [rule for rule in rules if "jump" not in rule]) for name, rules in of_nodes[3:]]
    assert plan.chains(guard()) == of_pods


def test_the_ruleset_is_one_transaction_and_the_same_every_time():
    text = plan.ruleset_text(guard())
    lines = text.splitlines()
    assert lines[0].startswith("# Written by kubemesh.wireguard")
    assert plan.settings_of(text) == dict(SETTINGS)
    assert lines[2:5] == ["table inet kubemesh_guard {}", "delete table inet kubemesh_guard", "table inet kubemesh_guard {"]
    assert "\tcounter in_nodes { packets 0 bytes 0 }" in lines and "\t\t\t10.244.2.0/24, # b" in lines
    assert '\t\t\t"wgmesh1",' in lines and "\t\t\t51841," in lines
    assert text == plan.ruleset_text(guard(document(c=entry(3), b=entry(2), a=entry(1)))), "whatever the order of the document"
    assert plan.names_in(text) == {
        "10.244.2.0/24": "b", "10.244.3.0/24": "c", "fd00:10:244:2::/64": "b", "fd00:10:244:3::/64": "c",
        "198.18.0.12": "b", "198.18.0.13": "c", "2001:db8::2": "b", "2001:db8::3": "c"}


def test_what_it_was_made_from_can_be_read_again():
    given_settings = dict(SETTINGS, encrypt="nodes", ports=[1, 2], exempt_nodes=["b", 'no "node"\n'], exempt_cidrs=["192.0.2.0/25"])
    text = plan.ruleset_text(plan.wanted_guard(DOC, "a", given_settings))
    assert plan.settings_of(text) == given_settings and plan.ruleset_text(plan.wanted_guard(DOC, "a", plan.settings_of(text))) == text
    line = next(line for line in text.splitlines() if line.startswith(plan.SETTINGS_MARK))
    damaged = ["", plan.SETTINGS_MARK + "{", plan.SETTINGS_MARK + "[]"] + [
        plan.SETTINGS_MARK + json.dumps(dict(given_settings, **change)) for change in (
            {"encrypt": "all"}, {"fwmark": True}, {"fwmark": "1"}, {"ports": [True]}, {"ports": "1"}, {"exempt_nodes": [1]}, {"more": 1},
            {"exempt_cidrs": ["x"]}, {"interfaces": []})]
    for other in damaged:
        with pytest.raises(MeshError):
            plan.settings_of(text.replace(line, other))


def test_counters_go_on():
    text = plan.ruleset_text(guard(), {"out_pods": {"packets": 3, "bytes": 252}})
    assert "\tcounter out_pods { packets 3 bytes 252 }\n\tcounter in_pods { packets 0 bytes 0 }\n" in text


# --- what nft prints ---------------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def recorded(version):
    with open(os.path.join(FIXTURES, "nft-%s.json" % version), encoding="utf-8") as handle:
        return json.load(handle)


def table(version, name):
    return plan.table_from_nft(json.dumps(recorded(version)[name]))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_nft_understands_the_ruleset(version):
    for name, encrypt in (("reference", "pods"), ("reference_nodes", "nodes")):
        wanted = guard(encrypt=encrypt, exempt_cidrs=["192.0.2.0/25"])
        found = table(version, name)
        assert found["elements"] == {each: [element for element, dummy in pairs] for each, pairs in wanted["elements"].items()}
        assert found["counters"] == plan.counts_of(None)
        hooks = {each: (chain.get("hook"), chain.get("prio")) for each, chain in found["skeleton"]["chains"].items()}
        assert hooks.pop("leaving") == ("postrouting", 90) and hooks.pop("arriving") == ("prerouting", -110)
        assert set(hooks) == ({"spared", "leaving_nodes", "arriving_nodes"} if encrypt == "nodes" else set())
        for chain, rules in plan.chains(wanted):
            assert len(found["skeleton"]["rules"][chain]) == len([rule for rule in rules if not rule.startswith("type")])


@pytest.mark.parametrize("version", VERSIONS)
def test_other_elements_for_the_same_addresses_are_no_difference(version):
    live, wanted = table(version, "same"), table(version, "reference")
    assert live["elements"] != wanted["elements"] and plan.plan_guard(live, wanted) == []
    assert plan.plan_guard(wanted, wanted) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_drift_is_seen(version):
    wanted = table(version, "reference")
    assert plan.plan_guard(table(version, "element_gone"), wanted) == [
        {"op": "change_elements", "set": "pods6", "add": [plan.interval("fd00:10:244:2::/64")], "remove": []}]
    assert plan.plan_guard(table(version, "device_more"), wanted) == [
        {"op": "change_elements", "set": "links", "add": [], "remove": ["eth0"]}]
    again = [{"op": "load_table", "reason": "its rules are not the wanted ones"}]
    assert plan.plan_guard(table(version, "rule_more"), wanted) == again
    assert plan.plan_guard(table(version, "reference_nodes"), wanted) == again
    try:
        dormant = plan.table_from_nft(recorded(version)["dormant"])
    except ValueError:
        assert version == "1.0.6", "it ends in the middle"
        dormant = plan.unreadable_table("nft prints nothing")
    assert plan.plan_guard(dormant, wanted) == again


@pytest.mark.parametrize("version", VERSIONS)
def test_a_live_table_in_words(version):
    names = plan.names_in(plan.ruleset_text(guard()))
    lines = plan.table_as_text(table(version, "reference_nodes"), names).splitlines()
    for line in ("device wgmesh0", "tunnel port 51840/udp", "administration port 22/tcp", "pods 10.244.2.0/24  # b",
                 "node 2001:db8::3  # c", "own pods 10.244.1.0/24", "exempt 192.0.2.0/25",
                 "chain leaving: hook postrouting, priority 90, policy accept",
                 "rule leaving: ip daddr @pods4 counter out_pods drop", "rule spared: tcp dport @admin_ports accept",
                 "rule leaving_nodes: meta mark & 4096 4096 udp sport @tunnel_ports accept", "rule arriving_nodes: jump spared",
                 "rule arriving_nodes: meta l4proto udp ct direction reply ct original proto-src @tunnel_ports accept",
                 "rule arriving_nodes: ip daddr { 224.0.0.0/4, 255.255.255.255 } accept"):
        assert line in lines, line
    more = plan.table_as_text(table(version, "rule_more"), names)
    assert 'rule leaving: ip daddr 10.244.2.7 counter {"bytes": 0, "packets": 0} accept comment "by hand"\n' in more
    assert plan.table_as_text(None, names) == ""
    assert "dormant" in plan.table_as_text(plan.table_from_nft(recorded("1.1.3")["dormant"]), {})
    assert plan.table_as_text(plan.unreadable_table("nft prints nothing"), {}) == "nft prints nothing\n"


def listing(*items):
    return json.dumps({"nftables": [{"metainfo": {"version": "1"}}] + [
        {kind: dict(value, family="inet", table=plan.TABLE, handle=number)} for number, (kind, value) in enumerate(items)]})


def test_what_we_never_put_into_a_set_is_a_difference():
    """A catch-all, a verdict map, a set of somebody's: the table is loaded again, whatever nft makes of it."""
    ours = ("set", {"name": "pods4", "type": "ipv4_addr", "flags": ["interval"], "elem": ["10.0.0.1"]})
    wanted = plan.table_from_nft(listing(ours))
    for strange in ("*", {"concat": ["10.0.0.1", 22]}, {"prefix": "10.0.0.0"}, 5, None):
        live = plan.table_from_nft(listing(("set", dict(ours[1], elem=["10.0.0.1", strange]))))
        assert plan.plan_guard(live, wanted)[0]["op"] == "load_table", strange
    with_attributes = listing(("set", dict(ours[1], elem=[{"elem": {"val": "10.0.0.1", "comment": "by hand"}}])))
    assert plan.plan_guard(plan.table_from_nft(with_attributes), wanted) == []
    for more in (("map", {"name": "m", "type": "ipv4_addr", "map": "verdict"}), ("flowtable", {"name": "f"}), ("chain", {"name": "x"}),
                 ("counter", {"name": "x", "packets": 1, "bytes": 1})):
        assert plan.plan_guard(plan.table_from_nft(listing(ours, more)), wanted)[0]["op"] == "load_table", more


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"nftables": 5}', '{"nftables": [{}]}', '{"nftables": [5]}', '{"nftables": [{"rule": {}}]}'])
def test_what_is_no_listing(text):
    with pytest.raises((ValueError, KeyError, AttributeError, StopIteration)):
        plan.table_from_nft(text)


# --- steps -------------------------------------------------------------------------------------------------------------------------------

def as_table(wanted):
    """A table as if nft had printed it."""
    return {"skeleton": {"chains": dict(plan.chains(wanted)), "rules": plan.chains(wanted)}, "counters": plan.counts_of(None),
            "elements": {name: [element for element, dummy in pairs] for name, pairs in wanted["elements"].items()}}


def test_steps():
    wanted = as_table(guard())
    assert plan.plan_guard(None, None) == [] and plan.plan_guard(wanted, wanted) == []
    assert plan.plan_guard(wanted, None) == [{"op": "remove_table"}]
    assert plan.plan_guard(None, wanted) == [{"op": "load_table", "reason": "it is not there"}]
    assert plan.plan_guard(wanted, as_table(guard(encrypt="nodes")))[0]["op"] == "load_table"


def test_a_node_that_joins_is_an_element_of_each_set():
    names = plan.names_in(plan.ruleset_text(guard(document(a=entry(1), b=entry(2), c=entry(3), d=entry(4)))))
    steps = plan.plan_guard(as_table(guard()), as_table(guard(document(a=entry(1), b=entry(2), d=entry(4)), admin_ports=[22, 2222])))
    assert [line for step in steps for line in plan.describe(step, names)] == [
        "add administration port 2222/tcp", "remove node 198.18.0.13  # c", "add node 198.18.0.14  # d", "remove node 2001:db8::3  # c",
        "add node 2001:db8::4  # d", "remove pods 10.244.3.0/24  # c", "add pods 10.244.4.0/24  # d", "remove pods fd00:10:244:3::/64  # c",
        "add pods fd00:10:244:4::/64  # d"]
    assert plan.elements_text(steps) == (
        "delete element inet kubemesh_guard nodes4 { 198.18.0.13 }\ndelete element inet kubemesh_guard nodes6 { 2001:db8::3 }\n"
        "delete element inet kubemesh_guard pods4 { 10.244.3.0/24 }\ndelete element inet kubemesh_guard pods6 { fd00:10:244:3::/64 }\n"
        "add element inet kubemesh_guard admin_ports { 2222 }\nadd element inet kubemesh_guard nodes4 { 198.18.0.14 }\n"
        "add element inet kubemesh_guard nodes6 { 2001:db8::4 }\nadd element inet kubemesh_guard pods4 { 10.244.4.0/24 }\n"
        "add element inet kubemesh_guard pods6 { fd00:10:244:4::/64 }\n")
    steps = plan.plan_guard(as_table(guard()), as_table(guard(interfaces=["wgmesh0", "kube0"])))
    assert plan.elements_text(steps) == (
        'delete element inet kubemesh_guard links { "wgmesh1" }\nadd element inet kubemesh_guard links { "kube0" }\n')


MEMBERS = st.dictionaries(st.sampled_from("bcd"), st.fixed_dictionaries({
    "pod_cidrs": st.sampled_from(([], ["10.244.2.0/24"], ["10.244.2.0/23"], ["10.244.3.128/25"], ["10.244.1.9/32"])),
    "node_addresses": st.sampled_from((["198.18.0.12"], ["198.18.0.13"]))}), max_size=2)


@given(MEMBERS, MEMBERS, st.sampled_from((["10.244.1.0/24"], ["10.244.1.0/24", "10.244.2.0/24"])))
def test_on_the_way_both_are_guarded_and_own_pods_never_are(before, after, own):
    """Whatever was dropped and will be is dropped meanwhile, but for what now is a pod of this node; and nothing overlaps."""
    def of(members, own):
        nodes = {name: dict(keyless(ord(name) - 96, state="pending"), **fields) for name, fields in members.items()}
        return guard({"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
                      "nodes": dict(nodes, a=entry(1, pod_cidrs=own))})

    old, new = of(before, ["10.244.1.0/24"]), of(after, own)
    for current in (None, as_table(old)):
        way = plan.between(current, new)
        for name, pairs in way["elements"].items():
            pieces = [element for element, dummy in pairs]
            wanted = [element for element, dummy in new["elements"][name]]
            if name[:-1] not in ("pods", "own_pods", "nodes"):
                assert pieces == wanted
                continue
            have = [element for element, dummy in old["elements"][name]] if current else []
            both = plan.covered(have + wanted)
            if name[:-1] == "pods":
                own_pieces = plan.covered([element for element, dummy in new["elements"]["own_" + name]])
                # what is borrowed from the pods of this node is not of them
                both = plan.covered(wanted + [piece for one in plan.covered(have) for piece in plan.without(one, own_pieces)])
            assert plan.covered(pieces) == both
            assert sum(last - first + 1 for dummy, first, last in pieces) == sum(last - first + 1 for dummy, first, last in both)


def test_the_way_to_a_node_that_joins_and_from_one_that_leaves():
    three = as_table(guard())
    joined = plan.between(three, guard(document(a=entry(1), b=entry(2), c=entry(3), d=entry(4))))
    assert [step["add"] and not step["remove"] for step in plan.plan_guard(three, as_table(joined))] == [True] * 4
    left = plan.between(three, guard(document(a=entry(1), b=entry(2))))
    assert plan.plan_guard(three, as_table(left)) == []
    assert plan.table_of(guard(), three["skeleton"]) == dict(three, counters={})


NAMES = st.lists(st.sampled_from(["a", "b", "c", "nobody"]), unique=True)
SPARING = st.fixed_dictionaries({
    "encrypt": st.sampled_from(["pods", "nodes"]), "exempt_nodes": NAMES, "admin_ports": st.lists(st.sampled_from([22, 2222]), unique=True),
    "exempt_cidrs": st.lists(st.sampled_from(["198.18.0.12/32", "10.244.3.0/25", "2001:db8::3/128"]), unique=True)})


@settings(max_examples=25, deadline=None)
@given(SPARING, SPARING, st.booleans())
def test_a_loosened_guard_drops_only_what_both_drop(before, after, leaves):
    """Every kind of packet, as few of them tell two settings apart."""
    old = guard(**before)
    joint = plan.joint_settings(dict(SETTINGS, **before), dict(SETTINGS, **after))
    doc = document(a=entry(1), b=entry(2), c=entry(3, state="excluded", reason="named in exclude_nodes")) if leaves else DOC
    way = plan.loosened(as_table(old), doc, "a", joint)
    new = guard(doc, **after)
    for family in (("198.18.0.1%d", "10.244.%d.9"), ("2001:db8::%d", "fd00:10:244:%d::9")):
        ends = [text % number for text in family for number in (1, 2, 3)]
        for near, far, port, hook in itertools.product(ends, ends, (22, 2222, 80), ("out", "in")):
            packet = sample(near, far, protocol="tcp", dport=port, sport=40000)
            by_both = verdict(old, hook, packet) is not None and verdict(new, hook, packet) is not None
            assert (verdict(way, hook, packet) is not None) == by_both, (hook, near, far, port)


def test_loosening_what_is_as_loose_changes_nothing_and_again_neither():
    live = as_table(guard(encrypt="nodes", exempt_cidrs=["198.18.0.13/32"]))
    for wanted in (dict(SETTINGS, encrypt="nodes"), dict(SETTINGS, encrypt="nodes", exempt_cidrs=["198.18.0.13/32"])):
        assert plan.plan_guard(live, as_table(plan.loosened(live, DOC, "a", wanted))) == []
    wanted = dict(SETTINGS, encrypt="nodes", exempt_nodes=["b"])
    way = as_table(plan.loosened(live, DOC, "a", wanted))
    assert plan.plan_guard(live, way)
    assert plan.plan_guard(way, as_table(plan.loosened(way, DOC, "a", wanted))) == []


def test_loosening_keeps_what_the_document_does_not_know():
    """The agent brought a node in since; and it lets no node in that joins with this run."""
    live = as_table(guard(document(a=entry(1), b=entry(2), d=entry(4))))
    way = plan.loosened(live, DOC, "a", dict(SETTINGS, exempt_nodes=["b"]))
    assert texts(way, "pods4") == ["10.244.4.0/24"] and texts(way, "nodes4") == ["198.18.0.14"]


@pytest.mark.parametrize("before", ["pods", "nodes"])
@pytest.mark.parametrize("after", ["pods", "nodes"])
def test_loosening_encrypts_nodes_only_where_both_do(before, after):
    way = plan.loosened(as_table(guard(encrypt=before)), DOC, "a", dict(SETTINGS, encrypt=after))
    assert way["encrypt"] == ("nodes" if before == after == "nodes" else "pods") == way["settings"]["encrypt"]


def test_loosening_a_table_that_cannot_be_read():
    way = plan.loosened(plan.unreadable_table("x"), DOC, "a", dict(SETTINGS, exempt_nodes=["b"]))
    assert texts(way, "pods4") == ["10.244.3.0/24"]


def test_joint_settings():
    before = dict(SETTINGS, exempt_nodes=["a"], exempt_cidrs=["198.18.0.13/32"], admin_ports=[22])
    after = dict(SETTINGS, exempt_nodes=["b", "a"], admin_ports=[2222], encrypt="nodes")
    assert plan.joint_settings(before, after) == dict(
        after, exempt_nodes=["b", "a"], exempt_cidrs=["198.18.0.13/32"], admin_ports=[2222, 22])
    assert plan.joint_settings(None, after) == after


def test_steps_on_the_whole_table_in_words():
    assert plan.describe({"op": "load_table", "reason": "it is not there"}, {}) == ["load table kubemesh_guard: it is not there"]
    assert plan.describe({"op": "remove_table"}, {}) == ["remove table kubemesh_guard"]


def test_counts():
    assert plan.counts_of(None) == {name: {"packets": 0, "bytes": 0} for name in ("out_pods", "in_pods", "out_nodes", "in_nodes")}
    found = plan.counts_of({"counters": {"in_pods": {"packets": 1, "bytes": 84}, "x": {"packets": 9, "bytes": 9}}})
    assert found == dict(plan.counts_of(None), in_pods={"packets": 1, "bytes": 84})


def test_five_thousand_nodes():
    """Sets, not rules: the ruleset has as many rules for 5,000 nodes as for three."""
    def number(value):
        return dict(entry(1), public_keys={}, probe_addresses={}, state="pending", pod_cidrs=["10.%d.%d.0/24" % divmod(value, 256)],
                    node_addresses=["198.18.%d.%d" % divmod(value, 256)])

    doc = {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841},
           "nodes": dict({"n%d" % value: number(value) for value in range(5000)}, a=entry(1, pod_cidrs=[], node_addresses=[]))}
    wanted = guard(doc)
    assert len(wanted["elements"]["pods4"]) == len(wanted["elements"]["nodes4"]) == 5000
    assert [len(rules) for dummy, rules in plan.chains(wanted)] == [len(rules) for dummy, rules in plan.chains(guard())]
    assert len(wanted["warnings"][0]) < 300
