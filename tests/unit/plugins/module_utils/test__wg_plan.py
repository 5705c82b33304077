# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import ipaddress
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.wg_fakes import key_of

A, B, C, OWN = (key_of(name) for name in ("a", "b", "c", "own"))
KEYS = sorted(key_of("peer %d" % number) for number in range(5))
PREFIXES = ["10.244.0.0/16", "10.244.1.0/24", "10.244.1.0/25", "10.244.1.128/25", "10.244.1.255/32", "198.18.0.11/32", "fd00:10:244:1::/64",
            "fe80::1234/128", "0.0.0.0/0"]
ENDPOINTS = ["198.18.0.11:51840", "198.18.0.12:51840", "[2001:db8::c]:51841"]
PSK = "/etc/kubemesh/psk"


def wanted_device(peers=None, **other):
    return dict({"public_key": OWN, "private_key_file": "/etc/wireguard/wgmesh0.key", "listen_port": 51840, "fwmark": 0x1000,
                 "peers": peers or {}, "keep_unknown_peers": False}, **other)


def wanted_peer(*allowed_ips, **other):
    return dict({"endpoint": None, "allowed_ips": list(allowed_ips), "keepalive": 0}, **other)


def present_peer(*allowed_ips, **other):
    return dict({"endpoint": None, "allowed_ips": list(allowed_ips), "keepalive": 0, "has_preshared_key": False, "last_handshake": 0.0,
                 "rx_bytes": 0, "tx_bytes": 0}, **other)


def present_device(peers=None, **other):
    return dict({"name": "wgmesh0", "public_key": OWN, "listen_port": 51840, "fwmark": 0x1000, "peers": peers or {}}, **other)


# --- properties ----------------------------------------------------------------------------------------------------------------------

@st.composite
def assignments(draw):
    """{key: [prefixes]}: some peers, each prefix with at most one of them."""
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True))
    result = {key: [] for key in keys}
    if keys:
        for prefix in draw(st.lists(st.sampled_from(PREFIXES), unique=True)):
            result[draw(st.sampled_from(keys))].append(prefix)
    return result


@st.composite
def states(draw):
    peers = {}
    for key, prefixes in draw(assignments()).items():
        has_key = draw(st.booleans())
        peers[key] = present_peer(*prefixes, endpoint=draw(st.sampled_from([None] + ENDPOINTS)), keepalive=draw(st.sampled_from([0, 25])),
                                  has_preshared_key=has_key, last_handshake=draw(st.sampled_from([0.0, 1763874000.25])))
        if has_key:
            peers[key]["preshared_key_matches"] = draw(st.booleans())
    public_key = draw(st.sampled_from([OWN, None, KEYS[0]]))
    peers.pop(public_key, None)
    return present_device(peers, public_key=public_key, listen_port=draw(st.sampled_from([51840, 0, 51841])),
                          fwmark=draw(st.sampled_from([0x1000, 0])))


@st.composite
def wishes(draw):
    peers = {}
    for key, prefixes in draw(assignments()).items():
        peers[key] = wanted_peer(*prefixes, endpoint=draw(st.sampled_from([None] + ENDPOINTS)),
                                 keepalive=draw(st.sampled_from([0, None, 25])))
        if draw(st.booleans()):
            peers[key]["preshared_key_file"] = PSK
    return wanted_device(peers, keep_unknown_peers=draw(st.booleans()), listen_port=draw(st.sampled_from([None, 51840])),
                         fwmark=draw(st.sampled_from([None, 0x1000, 0])), public_key=draw(st.sampled_from([OWN, OWN, OWN, KEYS[1]])))


def without_own_key(wanted):
    wanted["peers"].pop(wanted["public_key"], None)
    return wanted


currents = st.one_of(st.none(), states())
all_wishes = wishes().map(without_own_key)
previous_endpoints = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ENDPOINTS))
many = settings(max_examples=100, deadline=None)


def owners(state):
    return {prefix: key for key, peer in state["peers"].items() for prefix in peer["allowed_ips"]}


@many
@given(currents, all_wishes, previous_endpoints)
def test_applying_the_plan_gives_what_is_wanted(current, wanted, previous):
    steps = plan.plan_device(current, wanted, previous)
    start = current if current is not None else plan.empty_state("wgmesh0")
    after = plan.apply_steps(start, steps)
    assert after["public_key"] == wanted["public_key"]
    for field in ("listen_port", "fwmark"):
        assert after[field] == (start[field] if wanted[field] is None else wanted[field])
    for key, want in wanted["peers"].items():
        peer = after["peers"][key]
        assert peer["allowed_ips"] == sorted(want["allowed_ips"])
        assert peer["keepalive"] == (want["keepalive"] or 0)
        assert peer["has_preshared_key"] == ("preshared_key_file" in want)
        if want["endpoint"] is not None:
            assert peer["endpoint"] is not None
    unknown = set(after["peers"]) - set(wanted["peers"])
    if wanted["keep_unknown_peers"]:
        assert unknown == set(start["peers"]) - set(wanted["peers"]) - {wanted["public_key"]}
    else:
        assert unknown == set()


@many
@given(currents, all_wishes, previous_endpoints)
def test_a_second_plan_is_empty(current, wanted, previous):
    after = plan.apply_steps(current if current is not None else plan.empty_state("wgmesh0"), plan.plan_device(current, wanted, previous))
    assert plan.plan_device(after, wanted, previous) == []


@many
@given(states(), all_wishes, previous_endpoints)
def test_every_prefix_of_the_plan_is_safe(current, wanted, previous):
    stays = {(key, prefix) for key, peer in current["peers"].items() for prefix in peer["allowed_ips"]
             if prefix in wanted["peers"].get(key, {"allowed_ips": ()})["allowed_ips"]}
    stays_somewhere = set(owners(current)) & {prefix for peer in wanted["peers"].values() for prefix in peer["allowed_ips"]}
    kept_peers = set(current["peers"]) & set(wanted["peers"])
    dropped = wanted["public_key"]  # a peer that has the key which the device gets: WireGuard drops it, no plan can help
    # without it: its allowed IPs go with it
    stays_somewhere -= {prefix for prefix, key in owners(current).items() if key == dropped}
    state = current
    for step in plan.plan_device(current, wanted, previous):
        before = state
        state = plan.apply_to_state(state, step)
        now = owners(state)
        for key, prefix in stays:
            assert now.get(prefix) == key, step
        for prefix in stays_somewhere:
            assert prefix in now, step
        assert kept_peers <= set(state["peers"]), step
        for key in kept_peers:
            # an endpoint is never taken away, and only one that is wanted replaces another
            if state["peers"][key]["endpoint"] != before["peers"][key]["endpoint"]:
                assert state["peers"][key]["endpoint"] == wanted["peers"][key]["endpoint"]


def lookup(state, address):
    """The peer that WireGuard sends an address to: the longest prefix decides."""
    best = None
    for key, peer in state["peers"].items():
        for prefix in peer["allowed_ips"]:
            network = ipaddress.ip_network(prefix)
            if address in network and (best is None or network.prefixlen > best[0]):
                best = network.prefixlen, key
    return best and best[1]


# every address that some prefix of PREFIXES treats in another way than others do
ADDRESSES = sorted({ipaddress.ip_network(prefix)[index] for prefix in PREFIXES for index in (0, -1)}, key=str)


@many
@given(states(), all_wishes)
def test_an_address_is_always_with_the_peer_it_had_or_with_the_one_it_gets(current, wanted):
    steps = plan.plan_device(current, wanted)
    if steps and steps[0]["op"] == "set_device":
        # may drop a peer: WireGuard does, whatever we plan
        current = plan.apply_to_state(current, steps.pop(0))
    after = plan.apply_steps(current, steps)
    allowed = {address: {lookup(current, address), lookup(after, address)} for address in ADDRESSES}
    state = current
    for step in steps:
        state = plan.apply_to_state(state, step)
        for address, keys in allowed.items():
            assert lookup(state, address) in keys, (address, step)


@many
@given(currents, all_wishes, previous_endpoints)
def test_steps_are_plain_in_order_and_minimal(current, wanted, previous):
    steps = plan.plan_device(current, wanted, previous)
    assert json.loads(json.dumps(steps)) == steps
    positions = [plan.OPERATIONS.index(step["op"]) for step in steps]
    assert positions == sorted(positions)
    touched = [(step["op"], step["public_key"], prefix) for step in steps for prefix in step.get("allowed_ips", ())]
    assert len(set(touched)) == len(touched)
    start = current if current is not None else plan.empty_state("")
    for step in steps:
        # every step does something: the state differs, or it is a secret, which no state shows
        assert "preshared_key_file" in step or "private_key_file" in step or plan.apply_to_state(start, step) != start
        start = plan.apply_to_state(start, step)


@many
@given(currents, all_wishes, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(current, wanted, rng):
    def shuffled(device):
        device = copy.deepcopy(device)
        items = list(device["peers"].items())
        rng.shuffle(items)
        device["peers"] = dict(items)
        for peer in device["peers"].values():
            rng.shuffle(peer["allowed_ips"])
        return device

    assert plan.plan_device(shuffled(current) if current else None, shuffled(wanted)) == plan.plan_device(current, wanted)


@many
@given(states(), all_wishes)
def test_inputs_are_not_changed(current, wanted):
    before = copy.deepcopy((current, wanted))
    plan.apply_steps(current, plan.plan_device(current, wanted))
    assert (current, wanted) == before


@many
@given(st.one_of(st.ip_addresses(), st.just(ipaddress.ip_address("fe80::1"))), st.data())
def test_prefixes_are_written_as_the_standard_library_does(address, data):
    length = data.draw(st.integers(0, address.max_prefixlen))
    if address.version == 6 and (address.ipv4_mapped or int(address) >> 32 == 0):
        return  # written in two ways, see split_endpoint
    network = ipaddress.ip_network("%s/%d" % (address, length), strict=False)
    if network.version == 6 and int(network.network_address) >> 32 in (0, 0xFFFF) and int(network.network_address) > 1:
        return
    assert plan.canonical_prefix("%s/%d" % (address, length)) == str(network)


# --- single cases --------------------------------------------------------------------------------------------------------------------

def test_the_first_plan_of_a_device():
    steps = plan.plan_device(None, wanted_device({
        B: wanted_peer("10.244.2.0/24", endpoint="198.18.0.12:51840", keepalive=25, preshared_key_file=PSK), A: wanted_peer()}))
    first, second = sorted((A, B))
    assert [step["op"] for step in steps] == ["set_device", "add_peer", "add_peer"]
    assert steps[0] == {"op": "set_device", "private_key_file": "/etc/wireguard/wgmesh0.key", "public_key": OWN, "listen_port": 51840,
                        "fwmark": 0x1000}
    assert [step["public_key"] for step in steps[1:]] == [first, second]
    by_key = {step["public_key"]: step for step in steps[1:]}
    assert by_key[B] == {"op": "add_peer", "public_key": B, "endpoint": "198.18.0.12:51840", "allowed_ips": ["10.244.2.0/24"],
                         "keepalive": 25, "preshared_key_file": PSK}
    assert by_key[A] == {"op": "add_peer", "public_key": A, "endpoint": None, "allowed_ips": [], "keepalive": 0}


def test_a_new_device_without_mark_gets_none():
    assert "fwmark" not in plan.plan_device(None, wanted_device(fwmark=0))[0]


def test_only_what_differs_is_set_on_the_device():
    assert plan.plan_device(present_device(fwmark=1), wanted_device()) == [{"op": "set_device", "fwmark": 0x1000}]
    assert plan.plan_device(present_device(listen_port=1), wanted_device()) == [{"op": "set_device", "listen_port": 51840}]
    assert plan.plan_device(present_device(fwmark=1, listen_port=1), wanted_device(fwmark=None, listen_port=None)) == []


def test_a_key_that_drifted_is_set_again():
    steps = plan.plan_device(present_device(public_key=A), wanted_device())
    assert steps == [{"op": "set_device", "private_key_file": "/etc/wireguard/wgmesh0.key", "public_key": OWN}]


def test_a_key_not_known_yet_is_planned():
    steps = plan.plan_device(None, wanted_device(public_key=None))
    assert steps[0]["private_key_file"] == "/etc/wireguard/wgmesh0.key"
    assert steps[0]["public_key"] is None


def test_without_a_key_file_there_is_no_plan():
    with pytest.raises(MeshError, match="private_key_file"):
        plan.plan_device(None, wanted_device(private_key_file=None))


def test_a_peer_that_gets_to_be_the_device_itself_needs_no_step():
    # WireGuard removes it when the key is set
    current = present_device({OWN: present_peer("10.0.0.0/24")}, public_key=A)
    steps = plan.plan_device(current, wanted_device({B: wanted_peer("10.0.0.0/24")}))
    assert [step["op"] for step in steps] == ["set_device", "add_peer"]


def test_a_moving_allowed_ip_is_only_added_to_the_new_owner():
    current = present_device({A: present_peer("10.0.1.0/24", "10.0.2.0/24"), B: present_peer("10.0.3.0/24")})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer("10.0.1.0/24"), B: wanted_peer("10.0.3.0/24", "10.0.2.0/24")}))
    assert steps == [{"op": "add_allowed_ips", "public_key": B, "allowed_ips": ["10.0.2.0/24"]}]


def test_two_peers_swap_their_allowed_ips():
    current = present_device({A: present_peer("10.0.1.0/24"), B: present_peer("10.0.2.0/24")})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer("10.0.2.0/24"), B: wanted_peer("10.0.1.0/24")}))
    assert sorted(step["op"] for step in steps) == ["add_allowed_ips", "add_allowed_ips"]


def test_a_node_that_came_back_with_a_new_key():
    ips = ("10.244.1.0/24", "198.18.0.11/32")
    current = present_device({A: present_peer(*ips)})
    steps = plan.plan_device(current, wanted_device({B: wanted_peer(*ips)}))
    assert [(step["op"], step["public_key"]) for step in steps] == [("add_peer", B), ("remove_peer", A)]


def test_a_prefix_replaced_by_its_halves_is_covered_all_the_time():
    current = present_device({A: present_peer("10.0.0.0/23")})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer("10.0.0.0/24", "10.0.1.0/24")}))
    assert [(step["op"], step["allowed_ips"]) for step in steps] == [
        ("add_allowed_ips", ["10.0.0.0/24", "10.0.1.0/24"]), ("remove_allowed_ips", ["10.0.0.0/23"])]


def test_prefixes_apart_from_each_other_take_one_step_per_peer():
    current = present_device({A: present_peer("10.0.0.0/24", "10.0.1.0/25"), B: present_peer()})
    steps = plan.plan_device(current, wanted_device({
        A: wanted_peer("10.0.3.0/24", "10.0.4.4/32"), B: wanted_peer("10.0.0.0/24", "10.0.1.0/25")}))
    assert sorted((step["op"], step["public_key"]) for step in steps) == sorted([("add_allowed_ips", A), ("add_allowed_ips", B)])


def test_prefixes_of_one_peer_within_each_other_take_one_step():
    current = present_device({A: present_peer("10.0.0.0/24"), B: present_peer()})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer("10.0.0.0/16", "10.0.0.0/25"), B: wanted_peer("10.1.0.0/16")}))
    assert sorted((step["op"], step["public_key"]) for step in steps) == sorted([
        ("add_allowed_ips", A), ("add_allowed_ips", B), ("remove_allowed_ips", A)])


def test_a_peer_that_goes_takes_its_allowed_ips_along():
    current = present_device({A: present_peer("10.0.0.0/24"), B: present_peer("10.0.1.0/24")})
    assert plan.plan_device(current, wanted_device({A: wanted_peer("10.0.0.0/24")})) == [{"op": "remove_peer", "public_key": B}]


def test_a_block_moves_while_an_address_borrowed_from_it_stays():
    first, second = sorted((A, B))
    # the peer that gets the block comes first by key, so only the length puts the address before it
    current = present_device({second: present_peer("10.0.0.0/26")})
    steps = plan.plan_device(current, wanted_device({first: wanted_peer("10.0.0.0/26"), second: wanted_peer("10.0.0.7/32")}))
    assert [(step["op"], step["public_key"], step.get("allowed_ips")) for step in steps] == [
        ("add_peer", first, []), ("add_allowed_ips", second, ["10.0.0.7/32"]), ("add_allowed_ips", first, ["10.0.0.0/26"])]
    back = plan.plan_device(plan.apply_steps(current, steps), wanted_device({second: wanted_peer("10.0.0.0/26")}))
    assert [(step["op"], step["public_key"], step.get("allowed_ips")) for step in back] == [
        ("add_allowed_ips", second, ["10.0.0.0/26"]), ("remove_allowed_ips", second, ["10.0.0.7/32"]), ("remove_peer", first, None)]


def test_unknown_peers_stay_where_asked_but_give_up_what_is_wanted():
    current = present_device({C: present_peer("10.0.1.0/24", "192.0.2.0/24")})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer("10.0.1.0/24")}, keep_unknown_peers=True))
    assert [step["op"] for step in steps] == ["add_peer"]
    assert plan.apply_steps(current, steps)["peers"][C]["allowed_ips"] == ["192.0.2.0/24"]


def test_host_bits_and_other_writings_are_no_difference():
    current = present_device({A: present_peer("10.244.1.0/24", "2001:db8::/32")})
    assert plan.plan_device(current, wanted_device({A: wanted_peer("10.244.1.7/24", "2001:0DB8:0::/32", "10.244.1.0/24")})) == []


LIVE = 1763874000.25
FIRST, SECOND, ROAMED = ENDPOINTS


@pytest.mark.parametrize(("now", "handshake", "wanted", "previous", "sets"), [
    (None, 0.0, FIRST, None, True),  # none yet
    (None, LIVE, FIRST, FIRST, True),
    (FIRST, LIVE, FIRST, None, False),
    (ROAMED, LIVE, FIRST, None, False),  # it roamed, and nobody knows what was wanted before
    (ROAMED, LIVE, FIRST, FIRST, False),  # it roamed, and what is wanted did not change
    (ROAMED, LIVE, SECOND, FIRST, True),  # what is wanted changed
    (FIRST, LIVE, SECOND, FIRST, True),
    (SECOND, LIVE, SECOND, FIRST, False),  # it moved there by itself before we came
    (ROAMED, 0.0, FIRST, FIRST, True),  # it cannot have been learnt: nobody ever answered from there
    (FIRST, LIVE, None, FIRST, False),  # WireGuard cannot forget one
    ("[::ffff:198.18.0.11]:51840", LIVE, FIRST, SECOND, False),
])
def test_when_an_endpoint_is_set(now, handshake, wanted, previous, sets):
    current = present_device({A: present_peer(endpoint=now, last_handshake=handshake)})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer(endpoint=wanted)}), {A: previous} if previous else None)
    assert steps == ([{"op": "update_peer", "public_key": A, "endpoint": wanted}] if sets else [])


@pytest.mark.parametrize(("has", "matches", "file", "expected"), [
    (False, None, None, "nothing"),
    (False, None, PSK, PSK),
    (True, True, PSK, "nothing"),
    (True, None, PSK, "nothing"),  # nobody compared
    (True, False, PSK, PSK),
    (True, None, None, None),
])
def test_when_a_preshared_key_is_set(has, matches, file, expected):
    peer = present_peer(has_preshared_key=has)
    if matches is not None:
        peer["preshared_key_matches"] = matches
    steps = plan.plan_device(present_device({A: peer}), wanted_device({A: wanted_peer(preshared_key_file=file)}))
    if expected == "nothing":
        assert steps == []
    else:
        assert steps == [{"op": "update_peer", "public_key": A, "preshared_key_file": expected}]


def test_keepalive_reaches_existing_peers_and_off_is_off():
    current = present_device({A: present_peer(), B: present_peer(keepalive=25)})
    steps = plan.plan_device(current, wanted_device({A: wanted_peer(keepalive=None), B: wanted_peer(keepalive=0)}))
    assert steps == [{"op": "update_peer", "public_key": B, "keepalive": 0}]


# --- errors --------------------------------------------------------------------------------------------------------------------------

def test_own_key_among_the_peers_is_an_error_that_names_the_node():
    with pytest.raises(MeshError, match=r"worker-2 .*own public key.*new key"):
        plan.plan_device(None, wanted_device({OWN: wanted_peer(name="worker-2")}))


def test_an_allowed_ip_wanted_twice_is_an_error_that_names_both():
    with pytest.raises(MeshError) as caught:
        plan.plan_device(None, wanted_device({A: wanted_peer("10.0.0.0/24", name="worker-1"), B: wanted_peer("10.0.0.9/24")}),
                         names={B: "worker-2"})
    assert "worker-1" in str(caught.value)
    assert "worker-2" in str(caught.value)
    assert "10.0.0.0/24" in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"listen_port": 0}, "listen_port is 0"),
    ({"listen_port": 65536}, "listen_port is 65536"),
    ({"listen_port": "51840"}, "listen_port is '51840'"),
    ({"fwmark": 1 << 32}, "fwmark is"),
    ({"fwmark": True}, "fwmark is True"),
    ({"peers": {A: wanted_peer("10.0.0.0/33", name="worker-1")}}, r"worker-1 .*10.0.0.0/33.*0 to 32"),
    ({"peers": {A: wanted_peer("10.0.0/24")}}, "10.0.0/24"),
    ({"peers": {A: wanted_peer("fd00::/a")}}, "prefix length"),
    ({"peers": {A: wanted_peer("{{ lookup('pipe', 'id') }}")}}, "is not a prefix"),
    ({"peers": {A: wanted_peer(7)}}, "is not a prefix"),
    ({"peers": {A: wanted_peer(endpoint="worker-1:51840")}}, "endpoint 'worker-1:51840'"),
    ({"peers": {A: wanted_peer(endpoint="198.18.0.11")}}, "endpoint '198.18.0.11'"),
    ({"peers": {A: wanted_peer(endpoint="198.18.0.11:0")}}, "endpoint"),
    ({"peers": {A: wanted_peer(endpoint="198.18.0.11:65536")}}, "endpoint"),
    ({"peers": {A: wanted_peer(endpoint="2001:db8::c:51840")}}, "endpoint"),
    ({"peers": {A: wanted_peer(keepalive=65536)}}, r"keepalive \(seconds\) is 65536"),
    ({"peers": {A: wanted_peer(keepalive=-1)}}, "keepalive"),
    ({"peers": {"nonsense": wanted_peer()}}, "nonsense"),
    ({"peers": {A[:42] + "B=": wanted_peer()}}, "public key"),
])
def test_values_wireguard_cannot_have(change, message):
    with pytest.raises(MeshError, match=message):
        plan.plan_device(None, wanted_device(**change))


def test_an_unknown_step_is_an_error():
    for function in (lambda step: plan.apply_to_state(present_device(), step), plan.describe):
        with pytest.raises(MeshError, match="replace_peers"):
            function({"op": "replace_peers", "public_key": A})


# --- what a step does ----------------------------------------------------------------------------------------------------------------

def test_the_simulator_ignores_what_wireguard_ignores():
    state = present_device({A: present_peer("10.0.0.0/24")})
    for step in ({"op": "update_peer", "public_key": B, "keepalive": 1}, {"op": "remove_peer", "public_key": B},
                 {"op": "add_allowed_ips", "public_key": B, "allowed_ips": ["10.0.0.0/24"]},
                 {"op": "remove_allowed_ips", "public_key": A, "allowed_ips": ["10.0.1.0/24"]},
                 {"op": "add_peer", "public_key": OWN, "endpoint": None, "allowed_ips": ["10.0.0.0/24"], "keepalive": 0}):
        assert plan.apply_to_state(state, step) == state, step


def test_the_simulator_keeps_counters_of_peers_that_stay():
    state = present_device({A: present_peer("10.0.0.0/24", last_handshake=LIVE, rx_bytes=5, tx_bytes=6)})
    after = plan.apply_to_state(state, {"op": "update_peer", "public_key": A, "keepalive": 25})
    assert after["peers"][A] == dict(state["peers"][A], keepalive=25)


# --- texts ---------------------------------------------------------------------------------------------------------------------------

def test_device_as_text_names_peers_and_has_no_secrets_and_nothing_that_varies():
    state = present_device({
        A: present_peer("10.0.1.0/24", "10.0.0.0/24", endpoint=FIRST, has_preshared_key=True, last_handshake=LIVE, rx_bytes=5),
        B: present_peer(keepalive=25)})
    text = plan.device_as_text(state, {A: "worker-2", B: "worker-1"})
    assert text == (
        "device wgmesh0\n"
        "  public key: %s\n"
        "  listen port: 51840\n"
        "  mark: 0x1000\n"
        "peer worker-1\n"
        "  public key: %s\n"
        "  endpoint: (none)\n"
        "  keepalive: 25 s\n"
        "  preshared key: no\n"
        "peer worker-2\n"
        "  public key: %s\n"
        "  endpoint: 198.18.0.11:51840\n"
        "  keepalive: off\n"
        "  preshared key: yes\n"
        "  allowed IP: 10.0.0.0/24\n"
        "  allowed IP: 10.0.1.0/24\n" % (OWN, B, A))
    assert plan.device_as_text(None) == ""
    # what a client said that was told which files to compare with
    for matches, words in ((True, "yes"), (False, "yes, not the one in its file")):
        other = present_device({A: present_peer(has_preshared_key=True, preshared_key_matches=matches)})
        assert "  preshared key: %s\n" % words in plan.device_as_text(other)


@many
@given(currents, all_wishes)
def test_every_step_can_be_described(current, wanted):
    names = {key: "node-%d" % number for number, key in enumerate(KEYS)}
    for step in plan.plan_device(current, wanted):
        lines = plan.describe(step, names)
        assert lines
        for line in lines:
            assert "\n" not in line
            if step["op"] != "set_device":
                assert names[step["public_key"]] in line


def test_descriptions():
    names = {A: "worker-1"}
    assert plan.describe({"op": "set_device", "private_key_file": "/k", "public_key": OWN, "listen_port": 1, "fwmark": 0}) == [
        "device: private key from /k, public key %s" % OWN, "device: listen port 1", "device: mark off"]
    assert plan.describe({"op": "add_peer", "public_key": A, "endpoint": FIRST, "allowed_ips": ["10.0.0.0/24"], "keepalive": 0,
                          "preshared_key_file": "/p"}, names) == [
        "peer worker-1: add, endpoint 198.18.0.11:51840, allowed IPs 10.0.0.0/24, preshared key from /p"]
    assert plan.describe({"op": "update_peer", "public_key": A, "keepalive": 0, "preshared_key_file": None}, names) == [
        "peer worker-1: set keepalive off, no preshared key"]
    assert plan.describe({"op": "remove_allowed_ips", "public_key": B, "allowed_ips": ["10.0.0.0/24"]}, names) == [
        "peer %s: remove allowed IPs 10.0.0.0/24" % B]
    assert plan.describe({"op": "remove_peer", "public_key": A}, names) == ["peer worker-1: remove"]


def test_five_thousand_peers():
    # no timing here: this is for the size of the result; quadratic code would be noticed by whoever waits for the tests
    keys = [key_of("many %d" % number) for number in range(5000)]
    peers = {key: wanted_peer("10.%d.%d.0/24" % divmod(number, 256), "fd00:%x::/64" % number, endpoint=FIRST)
             for number, key in enumerate(keys)}
    steps = plan.plan_device(None, wanted_device(peers))
    assert len(steps) == 5001
    state = plan.apply_steps(plan.empty_state("wgmesh0"), steps)
    moved = copy.deepcopy(peers)
    rng = random.Random(1)
    for dummy in range(100):
        one, two = rng.sample(keys, 2)
        moved[one]["allowed_ips"], moved[two]["allowed_ips"] = moved[two]["allowed_ips"], moved[one]["allowed_ips"]
    steps = plan.plan_device(state, wanted_device(moved))
    assert 0 < len(steps) <= 200
    assert plan.plan_device(plan.apply_steps(state, steps), wanted_device(moved)) == []
