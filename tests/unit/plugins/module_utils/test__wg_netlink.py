# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The netlink transport against what the real kernel answered, against what the real `wg` sends, and against a stand-in kernel."""

from __future__ import annotations

import errno
import json
import pathlib
import random
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_netlink as netlink
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError, entry_of, x25519_public_key
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils import wg_fakes
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.wg_fakes import key_of, raw_of

RECORDED = pathlib.Path(__file__).resolve().parents[3] / "kernel" / "recorded"


def recorded(name):
    document = json.loads((RECORDED / name).read_text())
    return document, {case["name"]: case for case in document["cases"]}


GET, GET_CASES = recorded("get_device.json")
SET, SET_CASES = recorded("set_device.json")
KERNEL, KERNEL_CASES = recorded("kernel.json")
FAMILY = GET["family"]

ONE, TWO, THREE = (key_of(name) for name in ("one", "two", "three"))


def decoded(case, files=None):
    payloads = []
    for reply in case["replies"]:
        payloads.extend(payload for kind, dummy, dummy, payload in netlink.messages(bytearray.fromhex(reply)) if kind == FAMILY)
    return netlink.decode_device(payloads, "", files)


def without_sequence(message):
    return bytes(message[:8]) + bytes(4) + bytes(message[12:])


# --- recorded dumps of the kernel ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [case["name"] for case in GET["cases"] if case["device"]])
def test_recorded_dumps(name):
    case = GET_CASES[name]
    state = decoded(case)
    device = case["device"]
    assert state["public_key"] == device.get("public_key")
    assert state["fwmark"] == device["fwmark"]
    if device["listen_port"] is not None:
        assert state["listen_port"] == device["listen_port"]
    assert set(state["peers"]) == set(device["peers"])
    for key, expected in device["peers"].items():
        peer = state["peers"][key]
        for field in ("endpoint", "keepalive", "has_preshared_key"):
            assert peer[field] == expected[field], (key, field)
        assert peer["allowed_ips"] == sorted(plan.canonical_prefix(text) for text in expected["allowed_ips"])
        assert set(peer) == {"endpoint", "keepalive", "has_preshared_key", "allowed_ips", "last_handshake", "rx_bytes", "tx_bytes"}


def test_the_recording_has_a_peer_that_goes_on_in_the_next_message():
    # or test_recorded_dumps would not show that its parts are put together
    assert len(GET_CASES["split_peer"]["replies"]) > 1
    assert decoded(GET_CASES["split_peer"])["peers"] == decoded(GET_CASES["one_datagram"])["peers"]


def test_recorded_session_has_handshake_and_counters():
    device = GET_CASES["session"]["device"]
    peer = next(iter(decoded(GET_CASES["session"])["peers"].values()))
    assert int(peer["last_handshake"]) == device["last_handshake_seconds"]
    assert (peer["rx_bytes"], peer["tx_bytes"]) == (device["rx_bytes"], device["tx_bytes"])


def test_no_secret_of_a_recorded_dump_is_in_the_state():
    state = decoded(GET_CASES["three_peers"])
    text = repr(state)
    replies = "".join(GET_CASES["three_peers"]["replies"])
    for name in ("private", "preshared"):
        raw = raw_of(name)
        if name == "preshared":
            assert raw.hex() in replies  # the recording has it; the private key is in it as the kernel clamped it
        assert raw.hex() not in text
        assert wg_fakes.base64.b64encode(raw).decode() not in text
        assert repr(raw)[2:-1] not in text
    clamped = bytearray(raw_of("private"))
    clamped[0] &= 248
    clamped[31] = clamped[31] & 127 | 64
    assert clamped.hex() in replies
    assert wg_fakes.base64.b64encode(clamped).decode() not in text


def test_a_preshared_key_is_compared_with_its_file(tmp_path):
    right, wrong, absent = tmp_path / "right", tmp_path / "wrong", tmp_path / "absent"
    right.write_text(key_of("preshared") + "\n")
    wrong.write_text(key_of("other") + "\n")
    for path, expected in ((right, True), (wrong, False), (absent, False)):
        state = decoded(GET_CASES["three_peers"], {TWO: str(path), ONE: str(right)})
        assert state["peers"][TWO]["preshared_key_matches"] is expected
        assert "preshared_key_matches" not in state["peers"][ONE]  # it has none


def test_a_recorded_family():
    reply = bytes.fromhex(GET_CASES["family"]["replies"][0])
    ((kind, dummy, dummy, payload),) = netlink.messages(reply[:struct.unpack_from("=I", reply)[0]])
    assert kind == netlink.GENL_ID_CTRL
    numbers = [netlink._U16.unpack(value)[0] for what, value in netlink.attributes(payload[4:]) if what == netlink.CTRL_ATTR_FAMILY_ID]
    assert numbers == [FAMILY]


# --- what wg sends -------------------------------------------------------------------------------------------------------------------

def sent_by_wg(name):
    """The SET_DEVICE messages of a recorded command; the first request asks for the family."""
    return [bytes.fromhex(text) for text in SET_CASES[name]["requests"][1:]]


def test_asks_for_the_family_and_the_device_as_wg_and_the_recorder_did():
    assert without_sequence(netlink.family_request(1).finish()) == without_sequence(bytes.fromhex(SET_CASES["set_device"]["requests"][0]))
    ours = netlink.get_device_request(FAMILY, "rec0", 1).finish()
    assert without_sequence(ours) == without_sequence(bytes.fromhex(GET_CASES["new"]["request"]))


def test_the_device_byte_by_byte():
    (theirs,) = sent_by_wg("set_device")
    ours = netlink.set_device_message(FAMILY, "rec3", 7, raw_of("private"), 51840, 0x1000).finish()
    assert without_sequence(ours) == without_sequence(theirs)


def ours_for(*steps, **options):
    entries = [entry_of(step) for step in steps]
    return [bytes(message.finish()) for message, dummy in netlink.set_peers_messages(
        FAMILY, "rec3", entries, 1, lambda path: bytearray(raw_of("preshared")), **options)]


def with_flags(message, change, new_peers=True):
    """A message with the flags of each peer replaced by ``change(flags)``; 0 takes the attribute away.

    The keepalive of a new peer is taken away as well where it is off: we send it, wg does not.
    """
    header, device = wg_fakes.tree(message)
    for dummy, peers in ((kind, data) for kind, data in device if kind == netlink.WGDEVICE_A_PEERS):
        for peer in peers:
            flags = dict(peer).get(netlink.WGPEER_A_FLAGS)
            new = change(struct.unpack("=I", flags)[0] if flags else 0)
            peer[:] = [(kind, struct.pack("=I", new) if kind == netlink.WGPEER_A_FLAGS else value) for kind, value in peer
                       if (new or kind != netlink.WGPEER_A_FLAGS)
                       and not (kind == netlink.WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL and value == bytes(2) and new_peers)]
    # WGDEVICE_F_REPLACE_PEERS, which wg setconf sends
    device[:] = [item for item in device if item[0] != 5]
    return wg_fakes.flatten((header, device))


@pytest.mark.parametrize(("name", "step"), [
    ("append", {"op": "add_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.3.0/24"]}),
    ("remove_flag", {"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.2.0/24"]}),
    ("update_only_absent", {"op": "add_allowed_ips", "public_key": THREE, "allowed_ips": ["10.0.9.0/24"]}),
    ("remove_absent", {"op": "remove_peer", "public_key": THREE}),
])
def test_the_answers_we_count_on_were_recorded_for_what_we_send(name, step):
    theirs = bytes.fromhex(KERNEL_CASES[name]["request"])
    ((ours, dummy),) = netlink.set_peers_messages(FAMILY, "rec4", [entry_of(step)], 1)
    # the header: the recorder asked for the same acknowledgement
    assert without_sequence(ours.finish()) == without_sequence(theirs)


def test_flatten_is_the_inverse_of_tree():
    for case in SET["cases"]:
        for message in (bytes.fromhex(text) for text in case["requests"][1:]):
            assert wg_fakes.flatten(wg_fakes.tree(message)) == without_sequence(message), case["name"]


def no_flag(dummy):
    """No flag at all."""
    return 0


def same_flags(flags):
    """The flags as they are."""
    return flags


@pytest.mark.parametrize(("name", "step", "theirs_flags", "ours_flags"), [
    # wg replaces the allowed IPs of the peer, we add to those of a new one
    ("set_peer", {"op": "add_peer", "public_key": ONE, "endpoint": "198.18.0.11:51840", "keepalive": 25, "preshared_key_file": "/x",
                  "allowed_ips": ["10.244.1.0/24", "fd00:10:244:1::/64"]}, no_flag, same_flags),
    ("set_peer_v6", {"op": "add_peer", "public_key": TWO, "endpoint": "[2001:db8::12]:51841", "keepalive": 0, "allowed_ips": []},
     same_flags, same_flags),
    ("set_peer_scoped", {"op": "add_peer", "public_key": TWO, "endpoint": "[fe80::12%1]:51841", "keepalive": 0, "allowed_ips": []},
     same_flags, same_flags),
    # wg would make a peer that is gone again
    ("set_keepalive_off", {"op": "update_peer", "public_key": ONE, "keepalive": 0}, same_flags, no_flag),
    ("remove_peer", {"op": "remove_peer", "public_key": TWO}, same_flags, same_flags),
])
def test_peers_byte_by_byte(name, step, theirs_flags, ours_flags):
    (theirs,) = sent_by_wg(name)
    (ours,) = ours_for(step)
    new = step["op"] == "add_peer"
    assert with_flags(ours, ours_flags, new).hex() == with_flags(theirs, theirs_flags, new).hex()


def test_setconf_byte_by_byte_but_for_replacing():
    (theirs,) = sent_by_wg("setconf")
    ours = ours_for({"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": ["10.244.1.0/24"]},
                    {"op": "add_peer", "public_key": TWO, "endpoint": None, "keepalive": 0, "allowed_ips": ["10.244.2.0/24"]})
    header, device = wg_fakes.tree(with_flags(theirs, no_flag))
    # the device's own settings are a message of their own with us
    peers_only = wg_fakes.flatten((header, [item for item in device if item[0] in (netlink.WGDEVICE_A_IFNAME, netlink.WGDEVICE_A_PEERS)]))
    assert [with_flags(message, same_flags) for message in ours] == [peers_only]
    flags = dict(wg_fakes.tree(theirs)[1])[5]
    assert flags == struct.pack("=I", 1)  # WGDEVICE_F_REPLACE_PEERS: what we must never send


def test_a_peer_over_several_messages_is_cut_where_wg_cuts_it():
    theirs = sent_by_wg("addconf_split")
    prefixes = ["10.%d.%d.0/24" % (number // 256, number % 256) for number in range(1500)]
    # wg has a page of 4096 bytes, and a flags attribute in the first part only; an update has one as well
    ours = ours_for({"op": "add_allowed_ips", "public_key": THREE, "allowed_ips": prefixes}, limit=4096)
    # flags taken away: their first part must hold what our first part holds
    assert with_flags(ours[0], no_flag) == with_flags(theirs[0], no_flag)
    for messages in (ours, theirs):
        found = []
        for message in messages:
            assert len(message) <= 4096
            ((dummy, peers),) = [item for item in wg_fakes.tree(message)[1] if item[0] == netlink.WGDEVICE_A_PEERS]
            (peer,) = peers
            assert dict(peer)[netlink.WGPEER_A_PUBLIC_KEY] == raw_of("three")
            found.extend(dict(ip)[netlink.WGALLOWEDIP_A_IPADDR] for ip in dict(peer)[netlink.WGPEER_A_ALLOWEDIPS])
        assert [socket.inet_ntoa(address) + "/24" for address in found] == prefixes


# --- encoding ------------------------------------------------------------------------------------------------------------------------

def flags_of(message):
    ((dummy, peers),) = [item for item in wg_fakes.tree(message)[1] if item[0] == netlink.WGDEVICE_A_PEERS]
    return [struct.unpack("=I", dict(peer).get(netlink.WGPEER_A_FLAGS, bytes(4)))[0] for peer in peers]


def test_a_new_peer_over_several_messages_is_not_made_again_by_the_later_ones():
    prefixes = ["10.0.%d.0/24" % number for number in range(20)]
    messages = ours_for({"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": prefixes}, limit=256)
    assert len(messages) > 2
    assert [flags_of(message) for message in messages] == [[0]] + [[netlink.WGPEER_F_UPDATE_ONLY]] * (len(messages) - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(200, 9000), st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_messages_keep_to_the_limit_and_lose_nothing(limit, sizes):
    steps, expected = [], {}
    for number, size in enumerate(sizes):
        key = key_of("peer %d" % number)
        prefixes = ["10.%d.%d.0/24" % (number, index) if index % 2 else "fd00:%x:%x::/64" % (number, index) for index in range(size)]
        expected[key] = sorted(plan.canonical_prefix(text) for text in prefixes)
        steps.append({"op": "add_peer", "public_key": key, "endpoint": "[2001:db8::1]:51840", "keepalive": 25, "allowed_ips": prefixes,
                      "preshared_key_file": "/x"})
    kernel = wg_fakes.FakeKernel(("rec3",))
    for message in ours_for(*steps, limit=limit):
        assert len(message) <= limit
        assert kernel.request(netlink.NETLINK_GENERIC, message)[-1][16:20] == bytes(4)
    client = netlink.NetlinkClient(kernel.make_socket)
    state = client.read("rec3")
    assert {key: peer["allowed_ips"] for key, peer in state["peers"].items()} == expected
    assert all(peer["has_preshared_key"] and peer["keepalive"] == 25 for peer in state["peers"].values())


def test_a_peer_that_fits_nowhere_is_an_error_and_no_endless_loop():
    with pytest.raises(MeshError, match="does not fit"):
        ours_for({"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": []}, limit=64)


# --- decoding whatever comes -----------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_answers_are_an_error_of_ours(data):
    blob = bytearray.fromhex(data.draw(st.sampled_from([GET_CASES["three_peers"], GET_CASES["session"]]))["replies"][0])
    for dummy in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    try:
        payloads = [payload for kind, dummy, dummy, payload in netlink.messages(blob[:cut]) if kind == FAMILY]
        netlink.decode_device(payloads, "x")
    except netlink.Malformed:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_of_ours(blob):
    for function in (lambda: list(netlink.messages(blob)), lambda: list(netlink.attributes(memoryview(blob))),
                     lambda: netlink.decode_device([memoryview(blob)], "x"), lambda: netlink.decode_link(memoryview(blob))):
        try:
            function()
        except netlink.Malformed:
            pass


# --- the client against the stand-in kernel -------------------------------------------------------------------------------------------

KEYS = [key_of("peer %d" % number) for number in range(4)]
PREFIXES = ["10.244.%d.0/24" % number for number in range(6)] + ["fd00:%x::/64" % number for number in range(6)] + ["0.0.0.0/0"]


@st.composite
def wishes(draw):
    peers = {key: {"endpoint": draw(st.sampled_from([None, "198.18.0.11:51840", "[2001:db8::c]:51841", "[fe80::1%3]:51840"])),
                   "allowed_ips": [], "keepalive": draw(st.sampled_from([0, 25]))}
             for key in draw(st.lists(st.sampled_from(KEYS), unique=True))}
    if peers:
        for prefix in draw(st.lists(st.sampled_from(PREFIXES), unique=True)):
            peers[draw(st.sampled_from(sorted(peers)))]["allowed_ips"].append(prefix)
    return {"public_key": None, "private_key_file": None, "listen_port": draw(st.sampled_from([51840, 51841])),
            "fwmark": draw(st.sampled_from([0, 0x1000])), "peers": peers}


@settings(max_examples=100, deadline=None)
@given(st.lists(wishes(), min_size=2, max_size=4), st.sampled_from(["yes", "refused", "ignored"]), st.sampled_from([256, 8192]),
       st.sampled_from([80, 4096]))
def test_the_kernel_ends_up_as_the_plan_says(chain, removal, limit, dump_bytes):
    kernel = wg_fakes.FakeKernel(removal=removal, dump_bytes=dump_bytes)
    kernel.devices["wg0"].update(private=raw_of("private"), public=raw_of("public"))
    client = netlink.NetlinkClient(kernel.make_socket, limit)
    for wanted in chain:
        wanted["public_key"] = key_of("public")
        current = client.read("wg0")
        steps = plan.plan_device(current, wanted)
        client.apply("wg0", steps)
        after = client.read("wg0")
        assert plan.device_as_text(after) == plan.device_as_text(plan.apply_steps(current, steps))
        assert plan.plan_device(after, wanted) == []
    for message in kernel.sent:
        device = dict(wg_fakes.tree(message)[1])
        assert 5 not in device  # WGDEVICE_A_FLAGS, of which there is only REPLACE_PEERS
        if netlink.WGDEVICE_A_PEERS in device:
            assert not [flags for flags in flags_of(message) if flags & wg_fakes.REPLACE_ALLOWED_IPS]


def device_with(kernel, *names):
    for name in names:
        kernel.devices["wg0"]["peers"][raw_of(name)] = {
            "psk": bytes(32), "endpoint": None, "keepalive": 0, "handshake": (0, 0),
            "ips": [(socket.AF_INET, socket.inet_aton("10.%d.%d.0" % (len(name), number)), 24) for number in range(3)]}
    return netlink.NetlinkClient(kernel.make_socket)


# WGALLOWEDIP_A_FLAGS with WGALLOWEDIP_F_REMOVE_ME
REMOVE_FLAG = struct.pack("=HHI", 8, 4, 1)
REMOVAL = {"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": ["10.3.0.0/24", "10.3.2.0/24"]}


@pytest.mark.parametrize(("removal", "messages"), [
    ("yes", 2),  # the trial, and the two in one message
    ("refused", 1),  # the refused trial is not counted, it did nothing: the throw-away peer
    ("ignored", 2),  # the trial without effect, the throw-away peer
])
def test_single_allowed_ips_are_taken_away(removal, messages):
    kernel = wg_fakes.FakeKernel(removal=removal)
    client = device_with(kernel, "one", "three")
    client.apply("wg0", [REMOVAL])
    state = client.read("wg0")
    assert state["peers"][ONE]["allowed_ips"] == ["10.3.1.0/24"]
    assert set(state["peers"]) == {ONE, THREE}
    assert len(state["peers"][THREE]["allowed_ips"]) == 3
    done = [message for message in kernel.sent if removal != "refused" or flags_of(message) != [netlink.WGPEER_F_UPDATE_ONLY]]
    assert len(done) == messages
    if removal == "yes":
        assert [flags_of(message) for message in kernel.sent] == [[netlink.WGPEER_F_UPDATE_ONLY]] * 2
        assert all(REMOVE_FLAG in message for message in kernel.sent)
    else:
        # the throw-away peer comes and goes in one message
        ((dummy, peers),) = [item for item in wg_fakes.tree(kernel.sent[-1])[1] if item[0] == netlink.WGDEVICE_A_PEERS]
        assert [dict(peer)[netlink.WGPEER_A_PUBLIC_KEY] for peer in peers] == [dict(peers[0])[netlink.WGPEER_A_PUBLIC_KEY]] * 2
        assert flags_of(kernel.sent[-1]) == [0, netlink.WGPEER_F_REMOVE_ME]
        assert netlink.WGPEER_A_ENDPOINT not in dict(peers[0])
    # what is known is not tried again
    kernel.sent[:] = []
    client.apply("wg0", [{"op": "remove_allowed_ips", "public_key": THREE, "allowed_ips": ["10.5.0.0/24"]}])
    assert len(kernel.sent) == 1


def test_what_somebody_else_moved_meanwhile_is_not_taken_from_its_new_owner():
    for removal in ("yes", "refused", "ignored"):
        kernel = wg_fakes.FakeKernel(removal=removal)
        client = device_with(kernel, "one", "three")
        client.apply("wg0", [{"op": "add_allowed_ips", "public_key": THREE, "allowed_ips": ["10.3.0.0/24"]}])
        client.apply("wg0", [REMOVAL])
        state = client.read("wg0")
        assert state["peers"][ONE]["allowed_ips"] == ["10.3.1.0/24"], removal
        assert "10.3.0.0/24" in state["peers"][THREE]["allowed_ips"], removal


def test_a_trial_without_anything_to_try_says_nothing():
    kernel = wg_fakes.FakeKernel()
    client = device_with(kernel, "one")
    client.apply("wg0", [{"op": "remove_allowed_ips", "public_key": TWO, "allowed_ips": ["10.3.0.0/24"]}])
    assert kernel.sent == []
    assert client._can_remove is None


def test_throw_away_peers_fit_into_one_message_each_however_many_go():
    kernel = wg_fakes.FakeKernel()
    client = device_with(kernel, "one")
    prefixes = ["fd00:%x::/64" % number for number in range(1000)]
    client.apply("wg0", [{"op": "add_allowed_ips", "public_key": ONE, "allowed_ips": prefixes}])
    kernel.sent[:] = []
    client.apply("wg0", [{"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": prefixes}])
    state = client.read("wg0")
    assert set(state["peers"]) == {ONE}
    assert len(state["peers"][ONE]["allowed_ips"]) == 3
    for message in kernel.sent[1:]:
        assert flags_of(message) == [0, netlink.WGPEER_F_REMOVE_ME]


def test_five_thousand_peers_take_few_messages():
    kernel = wg_fakes.FakeKernel()
    client = netlink.NetlinkClient(kernel.make_socket)
    steps = [{"op": "add_peer", "public_key": key_of("many %d" % number), "endpoint": "198.18.0.11:51840", "keepalive": 0,
              "allowed_ips": ["10.%d.%d.0/24" % divmod(number, 256), "fe80::%x/128" % number]} for number in range(5000)]
    entries = [entry_of(step) for step in steps]
    messages = list(netlink.set_peers_messages(FAMILY, "wg0", entries, 1))
    assert len(messages) < 120
    assert sum(len(keys) for dummy, keys in messages) >= 5000
    client.apply("wg0", steps[:300])
    assert len(kernel.sent) < 10


# --- secrets -------------------------------------------------------------------------------------------------------------------------

def private_key_file(path, name="private"):
    path.write_text(key_of(name) + "\n")
    path.chmod(0o600)
    return str(path), x25519_public_key(bytearray(raw_of(name)))


def test_keys_come_from_files_and_what_was_sent_is_wiped(tmp_path):
    private, public = private_key_file(tmp_path / "private")
    preshared, dummy = private_key_file(tmp_path / "preshared", "preshared")
    kernel = wg_fakes.FakeKernel()
    kernel.public_of[raw_of("private")] = wg_fakes.base64.b64decode(public)
    client = netlink.NetlinkClient(kernel.make_socket)
    client.apply("wg0", [
        {"op": "set_device", "private_key_file": private, "public_key": public, "listen_port": 51840, "fwmark": 1},
        {"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": [], "preshared_key_file": preshared}])
    device = kernel.devices["wg0"]
    assert device["private"] == raw_of("private")
    assert device["peers"][raw_of("one")]["psk"] == raw_of("preshared")
    assert kernel.buffers
    for buffer in kernel.buffers:
        assert not any(buffer)
    state = client.read("wg0", {ONE: preshared})
    assert not kernel.dirty
    assert kernel.received
    for buffer in kernel.received:
        assert not any(buffer)
    assert state["public_key"] == public
    assert state["peers"][ONE]["preshared_key_matches"] is True
    client.apply("wg0", [{"op": "update_peer", "public_key": ONE, "preshared_key_file": None}])
    assert client.read("wg0")["peers"][ONE]["has_preshared_key"] is False


def test_preshared_keys_are_wiped_when_sending_stops_half_way():
    loaded = []

    def load_key(path):
        loaded.append(bytearray(raw_of(path)))
        return loaded[-1]

    entries = [entry_of({"op": "add_peer", "public_key": key_of("peer %d" % number), "endpoint": None, "keepalive": 0, "allowed_ips": [],
                         "preshared_key_file": "psk %d" % number}) for number in range(9)]
    generator = netlink.set_peers_messages(FAMILY, "wg0", entries, 1, load_key, 256)
    message, keys = next(generator)
    assert raw_of("psk 0") in bytes(message.finish())
    assert len(keys) < len(loaded) < 9  # one is waiting for the next message
    generator.close()
    for key in loaded:
        assert not any(key)


def test_the_wrong_private_key_is_not_set(tmp_path, monkeypatch):
    private, public = private_key_file(tmp_path / "private")
    kernel = wg_fakes.FakeKernel()
    with pytest.raises(MeshError, match="wg0") as caught:
        netlink.NetlinkClient(kernel.make_socket).apply("wg0", [{"op": "set_device", "private_key_file": private, "public_key": ONE}])
    assert public in str(caught.value)
    assert ONE in str(caught.value)
    assert kernel.sent == []
    kept = bytearray(raw_of("private"))
    monkeypatch.setattr(_keys, "read_private_key", lambda path: kept)
    with pytest.raises(MeshError):
        netlink.NetlinkClient(kernel.make_socket).apply("wg0", [{"op": "set_device", "private_key_file": private, "public_key": ONE}])
    assert not any(kept)


@pytest.mark.parametrize(("content", "message"), [(None, "there is no preshared key"), ("", "empty"), ("AAAA\n", "not a usable")])
def test_a_preshared_key_file_without_a_key(tmp_path, content, message):
    path = tmp_path / "preshared"
    if content is not None:
        path.write_text(content)
    kernel = wg_fakes.FakeKernel()
    with pytest.raises(MeshError, match=message):
        netlink.NetlinkClient(kernel.make_socket).apply("wg0", [
            {"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": [], "preshared_key_file": str(path)}])
    assert kernel.sent == []


# --- errors --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("code", "remedy"), [
    (errno.ENODEV, "enable"), (errno.EPERM, "become"), (errno.EOPNOTSUPP, "mesh_interface"), (errno.EINVAL, "invalid"),
    (errno.EADDRINUSE, "mesh_port"), (errno.EIO, "EIO")])
def test_errors_name_device_reason_and_remedy(code, remedy):
    kernel = wg_fakes.FakeKernel()
    client = netlink.NetlinkClient(kernel.make_socket)
    kernel.fail = {0: code, 1: code}
    calls = {
        "read it": lambda: client.read("wg0"),
        "port 51840": lambda: client.apply("wg0", [{"op": "set_device", "listen_port": 51840}]),
        ONE: lambda: client.apply("wg0", [{"op": "add_peer", "public_key": ONE, "endpoint": None, "keepalive": 0, "allowed_ips": []}])}
    for doing, call in calls.items():
        with pytest.raises(WireGuardError) as caught:
            call()
        text = str(caught.value)
        assert caught.value.errno == code
        for part in ("wg0", doing, errno.errorcode[code], remedy):
            assert part in text


def test_the_message_of_a_failed_batch_names_the_peers_it_is_about():
    kernel = wg_fakes.FakeKernel()
    kernel.fail = {1: errno.EINVAL}
    with pytest.raises(WireGuardError) as caught:
        netlink.NetlinkClient(kernel.make_socket).apply("wg0", [
            {"op": "remove_peer", "public_key": ONE}, {"op": "remove_peer", "public_key": TWO}, {"op": "remove_peer", "public_key": THREE}])
    assert "%s to %s" % (ONE, THREE) in str(caught.value)


@pytest.mark.parametrize("case", ["no_device", "other_kind"])
def test_recorded_errors(case):
    kernel = wg_fakes.FakeKernel()
    replies = [bytes.fromhex(text) for text in GET_CASES[case]["replies"]]
    kernel.dump = lambda sequence, attributes: [reply[:8] + struct.pack("=I", sequence) + reply[12:] for reply in replies]
    with pytest.raises(WireGuardError) as caught:
        netlink.NetlinkClient(kernel.make_socket).read("rec9")
    assert caught.value.errno == {"no_device": errno.ENODEV, "other_kind": errno.EOPNOTSUPP}[case]


def test_a_recorded_refusal_of_the_removal_flag():
    reply = bytes.fromhex(KERNEL_CASES["remove_flag"]["replies"][0])
    kernel = wg_fakes.FakeKernel()
    client = device_with(kernel, "one")
    real = kernel.request
    kernel.request = lambda protocol, data: [reply[:8] + data[8:12] + reply[12:]] if (
        data[16] == 1 and REMOVE_FLAG in data) else real(protocol, data)
    client.apply("wg0", [REMOVAL])
    assert client.read("wg0")["peers"][ONE]["allowed_ips"] == ["10.3.1.0/24"]


def test_a_kernel_without_wireguard():
    client = netlink.NetlinkClient(wg_fakes.FakeKernel(has_module=False).make_socket)
    for call in (lambda: client.read("wg0"), lambda: client.apply("wg0", [{"op": "set_device", "fwmark": 1}])):
        with pytest.raises(MeshError, match="modprobe wireguard"):
            call()


def test_an_interrupted_dump_is_read_again():
    kernel = wg_fakes.FakeKernel(interrupt=3)
    client = device_with(kernel, "one")
    assert set(client.read("wg0")["peers"]) == {ONE}
    assert kernel.interrupt == 0


def test_a_device_that_never_rests_is_an_error():
    kernel = wg_fakes.FakeKernel(interrupt=10 ** 6)
    with pytest.raises(WireGuardError, match="something else"):
        netlink.NetlinkClient(kernel.make_socket).read("wg0")


def test_messages_of_others_are_not_for_us():
    kernel = wg_fakes.FakeKernel()
    client = device_with(kernel, "one")
    forged = kernel.error(1, errno.EPERM)
    kernel.noise = [(forged, 4711), (kernel.error(4711, errno.EPERM), 0)]
    assert set(client.read("wg0")["peers"]) == {ONE}
    assert kernel.noise == []


def test_a_kernel_that_does_not_answer():
    kernel = wg_fakes.FakeKernel()
    kernel.dump = lambda sequence, attributes: []
    with pytest.raises(WireGuardError, match="ETIMEDOUT"):
        netlink.NetlinkClient(kernel.make_socket).read("wg0")


@pytest.mark.parametrize("name", ["", "a" * 16, "wg 0", "../wg0", "..", ".", "wg/0", None, 7, "wg0\n"])
def test_names_that_no_device_has(name):
    client = netlink.NetlinkClient(wg_fakes.FakeKernel().make_socket)
    for call in (lambda: client.read(name), lambda: client.apply(name, [{"op": "set_device", "fwmark": 1}])):
        with pytest.raises(MeshError, match="no name"):
            call()


def test_link_kinds():
    kernel = wg_fakes.FakeKernel(("wg0", "wg1"))
    kernel.kinds.update(eth0=None, tun0="tun")
    assert netlink.link_kinds(kernel.make_socket) == {"wg0": "wireguard", "wg1": "wireguard", "eth0": None, "tun0": "tun"}


def test_steps_are_carried_out_in_their_order():
    kernel = wg_fakes.FakeKernel()
    client = netlink.NetlinkClient(kernel.make_socket)
    rng = random.Random(7)
    state = client.read("wg0")
    for dummy in range(60):
        steps = []
        for dummy in range(rng.randint(1, 6)):
            # few of each, so that steps meet
            key, prefix = rng.choice(KEYS[:2]), rng.choice(PREFIXES[:2])
            steps.append(rng.choice([
                {"op": "add_peer", "public_key": key, "endpoint": None, "keepalive": 0, "allowed_ips": [prefix]},
                {"op": "update_peer", "public_key": key, "keepalive": rng.randint(0, 9)},
                {"op": "add_allowed_ips", "public_key": key, "allowed_ips": [prefix]},
                {"op": "remove_allowed_ips", "public_key": key, "allowed_ips": [prefix]},
                {"op": "remove_peer", "public_key": key},
                {"op": "set_device", "fwmark": rng.randint(0, 9)}]))
        client.apply("wg0", steps)
        state = plan.apply_steps(state, steps)
        assert plan.device_as_text(client.read("wg0")) == plan.device_as_text(state)
