# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The UAPI transport against what wireguard-go answered, against what the real `wg` sends, and against a stand-in behind a real socket."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import socket
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_uapi as uapi
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError, entry_of, x25519_public_key
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils import wg_fakes
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.wg_fakes import key_of, raw_of

RECORDED = json.loads((pathlib.Path(__file__).resolve().parents[2] / "fixtures" / "wg" / "uapi.json").read_text())
CASES = {case["name"]: case for case in RECORDED["cases"]}
ONE, TWO, THREE = (key_of(name) for name in ("one", "two", "three"))


def decoded(text, files=None):
    decoder = uapi.Decoder("kmwgrec", x25519_public_key, files)
    uapi.decode_answer(bytearray(text.encode()), decoder)
    return decoder


@pytest.fixture
def directory():
    # not tmp_path: the path of a Unix socket is limited to 108 bytes (struct sockaddr_un)
    path = tempfile.mkdtemp(prefix="kmwg-", dir="/tmp")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def userspace(directory):
    fake = wg_fakes.FakeUserspace(directory)
    yield fake
    fake.close()


def client_of(fake, **options):
    return uapi.UapiClient((os.path.dirname(fake.path),), wait=0.0, **options)


# --- recorded answers of wireguard-go --------------------------------------------------------------------------------------------------

def test_a_recorded_answer_says_what_wg_prints():
    case = CASES["show_dump"]
    state = decoded(case["answer"]).state
    # wg show DEVICE dump: private key, public key, port, mark; then per peer: key, preshared key, endpoint, allowed IPs, handshake, rx, tx,
    # keepalive
    device, *peers = (line.split("\t") for line in case["output"].splitlines())
    assert (state["public_key"], state["listen_port"], state["fwmark"]) == (device[1], int(device[2]), int(device[3], 16))
    assert len(peers) == len(state["peers"]) == 3
    for key, preshared, endpoint, allowed_ips, handshake, received, sent, keepalive in peers:
        assert state["peers"][key] == {
            "endpoint": None if endpoint == "(none)" else endpoint,
            "allowed_ips": [] if allowed_ips == "(none)" else sorted(allowed_ips.split(",")),
            "keepalive": 0 if keepalive == "off" else int(keepalive), "has_preshared_key": preshared != "(none)",
            "last_handshake": float(handshake), "rx_bytes": int(received), "tx_bytes": int(sent)}
    assert state["peers"][ONE]["has_preshared_key"]


def test_a_recorded_new_device():
    decoder = decoded(CASES["get_new"]["answer"])
    assert decoder.errno == 0
    port = int(CASES["get_new"]["answer"].split("listen_port=")[1].split("\n")[0])
    assert decoder.state == {"name": "kmwgrec", "public_key": None, "listen_port": port, "fwmark": 0, "peers": {}}


def test_no_secret_of_a_recorded_answer_is_in_the_state():
    answer = CASES["show_dump"]["answer"]
    text = repr(decoded(answer).finish())
    secrets = [line.partition("=")[2] for line in answer.split("\n") if line.startswith(("private_key=", "preshared_key="))]
    assert len([secret for secret in secrets if int(secret, 16)]) == 2
    for secret in secrets:
        raw = bytes.fromhex(secret)
        for form in (secret, wg_fakes.base64.b64encode(raw).decode(), repr(raw)[2:-1]):
            assert form not in text


def test_a_preshared_key_is_compared_with_its_file(tmp_path):
    right, wrong, absent = tmp_path / "right", tmp_path / "wrong", tmp_path / "absent"
    right.write_text(key_of("preshared") + "\n")
    wrong.write_text(key_of("other") + "\n")
    for path, expected in ((right, True), (wrong, False), (absent, False)):
        peers = decoded(CASES["show_dump"]["answer"], {ONE: str(path), TWO: str(right)}).finish()["peers"]
        assert peers[ONE]["preshared_key_matches"] is expected
        assert "preshared_key_matches" not in peers[TWO]  # it has none


@pytest.mark.parametrize(("name", "code"), [("remove_allowed_ip", errno.EINVAL), ("port_in_use", errno.EADDRINUSE), ("append", 0)])
def test_recorded_error_numbers(name, code):
    assert decoded(CASES[name]["answer"]).errno == code


def test_handshake_time_has_both_halves():
    lines = "public_key=%s\nlast_handshake_time_sec=1763874000\nlast_handshake_time_nsec=250000000\nerrno=0\n\n" % raw_of("one").hex()
    assert decoded(lines).state["peers"][ONE]["last_handshake"] == 1763874000.25


# --- what wg sends -------------------------------------------------------------------------------------------------------------------

def lines_of(*steps):
    return "".join(bytes(line).decode() for step in steps
                   for line in uapi.entry_lines(entry_of(step), lambda path: bytearray(raw_of("preshared"))))


def by_wg(name, *without):
    """The lines that wg sent, without its first and its empty last one and without what we leave out on purpose."""
    lines = CASES[name]["request"].split("\n")
    assert (lines[0], lines[-2:]) == ("set=1", ["", ""])
    return "".join(line + "\n" for line in lines[1:-2] if line not in without)


def test_the_device_as_wg_sends_it():
    ours = "".join(bytes(line).decode() for line in uapi.device_lines(raw_of("private"), 51840, 0x1000))
    assert ours == by_wg("set_device")


@pytest.mark.parametrize(("name", "step", "we_add"), [
    ("set_peer", {"op": "add_peer", "public_key": ONE, "endpoint": "198.18.0.11:51840", "keepalive": 25, "preshared_key_file": "/x",
                  "allowed_ips": ["10.244.1.0/24", "fd00:10:244:1::/64"]}, ()),
    ("set_peer_v6", {"op": "add_peer", "public_key": TWO, "endpoint": "[2001:db8::12]:51841", "keepalive": 0,
                     "allowed_ips": ["10.244.2.0/24", "2001:db8::12/128", "fe80::1234:5678:9abc:def0/128"]},
     ("persistent_keepalive_interval=0\n",)),
    ("set_peer_bare", {"op": "add_peer", "public_key": THREE, "endpoint": None, "keepalive": 0, "allowed_ips": []},
     ("persistent_keepalive_interval=0\n",)),
    # wg would make a peer that is gone again
    ("set_keepalive_off", {"op": "update_peer", "public_key": ONE, "keepalive": 0}, ("update_only=true\n",)),
    ("remove_preshared", {"op": "update_peer", "public_key": ONE, "preshared_key_file": None}, ("update_only=true\n",)),
    ("remove_peer", {"op": "remove_peer", "public_key": THREE}, ()),
])
def test_peers_as_wg_sends_them(name, step, we_add):
    ours = lines_of(step)
    for line in we_add:
        assert line in ours
        ours = ours.replace(line, "")
    assert ours == by_wg(name, "replace_allowed_ips=true")


def test_setconf_but_for_replacing():
    ours = lines_of({"op": "add_peer", "public_key": ONE, "endpoint": None, "allowed_ips": ["10.244.1.0/24"]},
                    {"op": "add_peer", "public_key": TWO, "endpoint": None, "allowed_ips": ["10.244.2.0/24"]})
    assert "replace_peers=true" in CASES["setconf"]["request"]  # what we must never send
    theirs = by_wg("setconf", "replace_peers=true", "replace_allowed_ips=true")
    assert theirs[theirs.index("public_key"):] == ours


@pytest.mark.parametrize(("name", "step"), [
    ("append", {"op": "add_allowed_ips", "public_key": ONE, "allowed_ips": ["10.244.3.0/24"]}),
    ("move", {"op": "add_allowed_ips", "public_key": TWO, "allowed_ips": ["10.244.3.0/24"]}),
    ("update_only_absent", {"op": "add_allowed_ips", "public_key": key_of("absent"), "allowed_ips": ["10.244.3.0/24"]}),
    ("remove_absent", {"op": "remove_peer", "public_key": key_of("absent")}),
    ("remove_allowed_ip", {"op": "remove_allowed_ips", "public_key": TWO, "allowed_ips": ["10.244.3.0/24"]}),
])
def test_the_answers_we_count_on_were_recorded_for_what_we_send(name, step):
    assert lines_of(step) == by_wg(name)


# --- decoding whatever comes -----------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_answers_are_an_error_of_ours(data):
    blob = bytearray(CASES["show_dump"]["answer"].encode())
    for dummy in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    decoder = uapi.Decoder("wg0", lambda raw: "x")
    try:
        uapi.decode_answer(blob[:data.draw(st.integers(0, len(blob)))], decoder)
        decoder.finish()
    except WireGuardError as exc:
        assert exc.errno == errno.EPROTO


@pytest.mark.parametrize(("line", "message"), [
    ("private_key=00", "private_key"), ("private_key=" + "zz" * 32, "private_key"), ("nonsense", "without ="),
    ("listen_port=70000", "listen_port"),
    ("fwmark=-1", "fwmark"), ("public_key=" + "00" * 31, "public_key"), ("errno=x", "errno")])
def test_nonsense_is_named(line, message):
    with pytest.raises(WireGuardError, match=message) as caught:
        decoded(line + "\nerrno=0\n\n")
    assert "zz" not in str(caught.value)


# --- the client against the stand-in --------------------------------------------------------------------------------------------------

KEYS = [key_of("peer %d" % number) for number in range(4)]
PREFIXES = ["10.244.%d.0/24" % number for number in range(6)] + ["fd00:%x::/64" % number for number in range(1, 6)] + ["0.0.0.0/0"]


@st.composite
def wishes(draw):
    peers = {key: {"endpoint": draw(st.sampled_from([None, "198.18.0.11:51840", "[2001:db8::c]:51841"])),
                   "allowed_ips": [], "keepalive": draw(st.sampled_from([0, 25]))}
             for key in draw(st.lists(st.sampled_from(KEYS), unique=True))}
    if peers:
        for prefix in draw(st.lists(st.sampled_from(PREFIXES), unique=True)):
            peers[draw(st.sampled_from(sorted(peers)))]["allowed_ips"].append(prefix)
    return {"public_key": None, "private_key_file": None, "listen_port": draw(st.sampled_from([51840, 51841])),
            "fwmark": draw(st.sampled_from([0, 0x1000])), "peers": peers}


@settings(max_examples=40, deadline=None)
@given(st.lists(wishes(), min_size=2, max_size=3), st.sampled_from(["yes", "refused", "ignored"]))
def test_the_device_ends_up_as_the_plan_says(chain, removal):
    directory = tempfile.mkdtemp(prefix="kmwg-", dir="/tmp")
    fake = wg_fakes.FakeUserspace(directory, removal=removal)
    try:
        fake.device["private"] = raw_of("private")
        client = client_of(fake)
        for wanted in chain:
            current = client.read("wg0")
            wanted["public_key"] = current["public_key"]
            steps = plan.plan_device(current, wanted)
            client.apply("wg0", steps)
            after = client.read("wg0")
            assert plan.device_as_text(after) == plan.device_as_text(plan.apply_steps(current, steps))
            assert plan.plan_device(after, wanted) == []
        assert not [request for request in fake.requests if b"replace_" in request]
    finally:
        fake.close()
        shutil.rmtree(directory)


def removal_steps(count):
    return [{"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.%d.0/24" % number for number in range(count)]}]


def test_single_allowed_ips_are_taken_away(directory):
    for removal, requests in (("yes", 2), ("refused", 3), ("ignored", 3)):
        fake = wg_fakes.FakeUserspace(directory, removal=removal)
        try:
            client = client_of(fake)
            client.apply("wg0", [{"op": "add_peer", "public_key": ONE, "endpoint": None,
                                  "allowed_ips": ["10.0.%d.0/24" % number for number in range(100)]}])
            del fake.requests[:]
            client.apply("wg0", removal_steps(99))
            # the trial; then all of them at once, or throw-away peers, 64 each
            assert len([request for request in fake.requests if request.startswith(b"set")]) == requests, removal
            assert client.read("wg0")["peers"][ONE]["allowed_ips"] == ["10.0.99.0/24"], removal
            assert list(client.read("wg0")["peers"]) == [ONE]
            if removal != "yes":
                assert fake.requests[-3].count(b"remove=true") == 1
                assert fake.requests[-3].count(b"public_key=") == 2
                assert b"endpoint=" not in fake.requests[-3]
        finally:
            fake.close()
            os.unlink(fake.path)


def test_keys_come_from_files(userspace, tmp_path):
    for name in ("private", "preshared"):
        (tmp_path / name).write_text(key_of(name) + "\n")
        (tmp_path / name).chmod(0o600)
    public = x25519_public_key(bytearray(raw_of("private")))
    client = client_of(userspace)
    client.apply("wg0", [
        {"op": "set_device", "private_key_file": str(tmp_path / "private"), "public_key": public, "listen_port": 51840},
        {"op": "add_peer", "public_key": ONE, "endpoint": None, "allowed_ips": [], "preshared_key_file": str(tmp_path / "preshared")}])
    assert userspace.device["private"] == raw_of("private")
    assert userspace.device["peers"][raw_of("one")]["psk"] == raw_of("preshared")
    state = client.read("wg0", {ONE: str(tmp_path / "preshared")})
    assert state["public_key"] == public
    assert state["peers"][ONE]["preshared_key_matches"] is True


def test_large_requests_and_answers_go_over_in_pieces(userspace):
    client = client_of(userspace)
    steps = [{"op": "add_peer", "public_key": key_of("many %d" % number), "endpoint": "[2001:db8::c]:51840", "keepalive": 0,
              "allowed_ips": ["10.%d.%d.0/24" % divmod(number, 256), "fd00:%x::/64" % (number + 1)]} for number in range(2000)]
    client.apply("wg0", steps)
    assert len(userspace.requests[-1]) > 2 * uapi.SEND_LIMIT
    state = client.read("wg0")
    assert plan.device_as_text(state) == plan.device_as_text(plan.apply_steps(plan.empty_state("wg0"), steps))


def test_what_was_sent_and_received_is_wiped(monkeypatch, userspace):
    userspace.device["private"] = raw_of("private")
    seen = []
    leave = uapi.Exchange.__exit__

    def watch(self, *exc):
        seen.append((bytes(self._answer), self._buffer, self._answer))
        return leave(self, *exc)

    monkeypatch.setattr(uapi.Exchange, "__exit__", watch)
    client_of(userspace).read("wg0")
    ((answer, buffer, received),) = seen
    assert raw_of("private").hex().encode() in answer
    assert not any(buffer)
    assert not any(received)


# --- errors --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("answer", "code", "message"), [
    (b"errno=-98\n\n", errno.EADDRINUSE, "mesh_port"), (b"errno=22\n\n", errno.EINVAL, "EINVAL"), (b"hello\n\n", errno.EPROTO, "without ="),
    (b"\n\n", errno.EPROTO, "no errno"), (b"", errno.EPROTO, "closed"), (b"errno=0\n", errno.EPROTO, "closed")])
def test_errors_name_device_and_reason(userspace, answer, code, message):
    userspace.override = answer
    client = client_of(userspace)
    for call in (lambda: client.read("wg0"), lambda: client.apply("wg0", [{"op": "set_device", "listen_port": 51840}])):
        with pytest.raises(WireGuardError, match=message) as caught:
            call()
        assert caught.value.errno == code
        assert "device wg0" in str(caught.value)


def test_an_answer_that_comes_before_all_was_sent_is_read(directory):
    # wireguard-go answers at the first line it does not like and closes, while we are still writing
    path = os.path.join(directory, "wg0.sock")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    server.listen(1)

    def serve():
        client, dummy = server.accept()
        with client:
            client.recv(10)
            client.sendall(b"errno=-22\n\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    steps = [{"op": "remove_peer", "public_key": key_of("many %d" % number)} for number in range(20000)]
    with pytest.raises(WireGuardError, match="EINVAL"):
        uapi.UapiClient((directory,), wait=0.0).apply("wg0", steps)
    thread.join(10)
    server.close()


def test_no_socket(directory):
    with pytest.raises(WireGuardError, match=r"wg0\.sock.*wireguard-go wg0") as caught:
        uapi.UapiClient((directory,), wait=0.0).read("wg0")
    assert caught.value.errno == errno.ENODEV


def test_a_socket_that_was_left_behind(directory):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(os.path.join(directory, "wg0.sock"))
    server.close()
    with pytest.raises(WireGuardError, match="start it again"):
        uapi.UapiClient((directory,), wait=0.0).read("wg0")


def test_waits_for_the_socket(directory):
    fakes = []
    timer = threading.Timer(0.3, lambda: fakes.append(wg_fakes.FakeUserspace(directory)))
    timer.start()
    try:
        assert uapi.UapiClient((directory,), wait=30.0).read("wg0")["peers"] == {}
    finally:
        timer.join()
        fakes[0].close()


@pytest.mark.parametrize("name", ["", "..", "../wg0", "a" * 16, "wg0\n"])
def test_names_that_no_device_has(directory, name):
    client = uapi.UapiClient((directory,), wait=0.0)
    for call in (lambda: client.read(name), lambda: client.apply(name, [{"op": "set_device", "fwmark": 1}])):
        with pytest.raises(MeshError, match="no name"):
            call()


def test_socket_names(directory):
    for name in ("wg1.sock", "wg0.sock", ".sock", "wg2.name", "wg3"):
        pathlib.Path(directory, name).touch()
    assert uapi.socket_names((directory, directory, "/nonexistent")) == ["wg0", "wg1"]
