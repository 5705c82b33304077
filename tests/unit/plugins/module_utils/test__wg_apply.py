# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import errno

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_apply as wg_apply
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, canonical_public_key
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.wg_fakes import key_of, raw_of

ONE, TWO = key_of("one"), key_of("two")


# RFC 7748, section 6.1
@pytest.mark.parametrize(("private", "public"), [
    ("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
     "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
    ("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
     "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"),
])
def test_ladder_by_the_vectors_of_the_rfc(private, public):
    assert wg_apply._ladder(bytes.fromhex(private)).hex() == public


@pytest.mark.skipif(_keys._public_by_cryptography(bytes(range(32))) is None, reason="the Python library cryptography is missing")
@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32))
@example(b"\xff" * 32)
@example(b"\1" + bytes(31))
def test_ladder_and_library_agree(raw):
    public = _keys._public_by_cryptography(raw)
    assert public is not None
    assert _keys.encode_key(wg_apply._ladder(raw)) == public


def test_public_key_without_library_and_without_wg(monkeypatch):
    monkeypatch.setattr(_keys, "_public_by_cryptography", lambda raw: None)
    raw = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    expected = _keys.encode_key(bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"))
    assert wg_apply.x25519_public_key(raw) == expected
    calls = []
    monkeypatch.setattr(wg_apply.shutil, "which", {"wg": "/usr/bin/wg"}.get)

    def run_command(argv, data=None):
        calls.append(argv)
        return 0, expected + "\n", ""

    assert wg_apply.x25519_public_key(raw, run_command) == expected
    assert calls == [["/usr/bin/wg", "pubkey"]]
    # A node whose wg is gone: run_command would end the module.
    monkeypatch.setattr(wg_apply.shutil, "which", lambda name: None)
    assert wg_apply.x25519_public_key(raw, run_command) == expected and len(calls) == 1
    # the key is on no argument list
    assert wg_apply.x25519_public_key(raw, lambda argv, data=None: (127, "", "no such command")) == expected


@pytest.mark.parametrize(("step", "entry"), [
    ({"op": "add_peer", "public_key": ONE, "endpoint": None, "allowed_ips": ["10.0.0.7/24"], "keepalive": 0},
     {"update_only": False, "allowed_ips": ["10.0.0.0/24"], "keepalive": 0}),
    ({"op": "add_peer", "public_key": ONE, "endpoint": "198.18.0.1:1", "allowed_ips": [], "keepalive": 25, "preshared_key_file": "/p"},
     {"update_only": False, "endpoint": "198.18.0.1:1", "keepalive": 25, "preshared_key_file": "/p"}),
    ({"op": "update_peer", "public_key": ONE, "keepalive": 0}, {"keepalive": 0}),
    ({"op": "update_peer", "public_key": ONE, "preshared_key_file": None}, {"preshared_key_file": None}),
    ({"op": "add_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.0.0/24"]}, {"allowed_ips": ["10.0.0.0/24"]}),
    ({"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": ["FD00::/64"]}, {"remove_allowed_ips": ["fd00::/64"]}),
    ({"op": "remove_peer", "public_key": ONE}, {"update_only": False, "remove": True}),
])
def test_entries(step, entry):
    assert wg_apply.entry_of(step) == dict(
        {"public_key": ONE, "update_only": True, "remove": False, "allowed_ips": [], "remove_allowed_ips": []}, **entry)


@pytest.mark.parametrize("op", ["set_device", "replace_peers"])
def test_steps_without_entry(op):
    with pytest.raises(MeshError, match=op):
        wg_apply.entry_of({"op": op})


class Recorder(wg_apply.StepClient):
    """A transport that only writes down what it is asked to do."""

    allowed_ips_at_once = 2

    def __init__(self, state=None, removal=None):
        super().__init__()
        self.calls = []
        self.state = state or {"peers": {}}
        self.removal = removal

    def read(self, name, preshared_key_files=None):
        return self.state

    def _set_device(self, name, private_key, listen_port, fwmark):
        self.calls.append(("device", private_key and bytes(private_key), listen_port, fwmark))
        self.kept = private_key

    def _set_peers(self, name, entries):
        self.calls.append(("peers", [dict(entry) for entry in entries]))
        if self.removal and any(entry["remove_allowed_ips"] for entry in entries):
            raise wg_apply.WireGuardError("no", self.removal)


def test_peers_are_sent_together_and_the_device_by_itself():
    client = Recorder()
    remove = {"op": "remove_peer", "public_key": ONE}
    client.apply("wg0", [{"op": "set_device", "listen_port": 1}, remove, remove, {"op": "set_device", "fwmark": 2}, remove])
    assert [(call[0], len(call[1] or ())) if call[0] == "peers" else call for call in client.calls] == [
        ("device", None, 1, None), ("peers", 2), ("device", None, None, 2), ("peers", 1)]


def test_no_steps_no_messages():
    client = Recorder()
    client.apply("wg0", [])
    assert client.calls == []


def test_the_private_key_is_wiped_after_use(tmp_path):
    path = tmp_path / "key"
    path.write_text(key_of("private") + "\n")
    path.chmod(0o600)
    client = Recorder()
    client.apply("wg0", [{"op": "set_device", "private_key_file": str(path)}])
    assert client.calls == [("device", raw_of("private"), None, None)]
    assert client.kept == bytearray(32)


def test_other_errors_of_a_trial_are_not_taken_for_an_answer():
    removal = [{"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.0.0/24"]}]
    state = {"peers": {ONE: {"allowed_ips": ["10.0.0.0/24"]}}}
    client = Recorder(state, errno.EPERM)
    with pytest.raises(wg_apply.WireGuardError):
        client.apply("wg0", removal)
    for code in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTO):
        client = Recorder(state, code)
        client.apply("wg0", removal)
        (dummy, trial), (dummy, throw_away) = client.calls
        assert trial[0]["remove_allowed_ips"] == ["10.0.0.0/24"]
        assert [entry["allowed_ips"] for entry in throw_away] == [["10.0.0.0/24"], []]
        assert throw_away[1]["remove"]


def test_a_missing_file_stops_before_the_first_change(tmp_path):
    client = Recorder()
    first = {"op": "set_device", "listen_port": 1}
    for step in ({"op": "update_peer", "public_key": ONE, "preshared_key_file": str(tmp_path / "none")},
                 {"op": "set_device", "private_key_file": str(tmp_path / "none")},
                 {"op": "update_peer", "public_key": ONE, "endpoint": "worker-1:51840"},
                 {"op": "add_allowed_ips", "public_key": ONE, "allowed_ips": ["10.0.0.0/33"]}):
        with pytest.raises(MeshError):
            client.apply("wg0", [first, {"op": "remove_peer", "public_key": TWO}, step])
    assert client.calls == []


def test_throw_away_keys_are_fresh_public_keys():
    prefixes = ["10.0.%d.0/24" % number for number in range(5)]
    client = Recorder({"peers": {ONE: {"allowed_ips": prefixes}}}, errno.EINVAL)
    client.apply("wg0", [{"op": "remove_allowed_ips", "public_key": ONE, "allowed_ips": prefixes}])
    throw_away = [entries for dummy, entries in client.calls[1:]]
    assert [entries[0]["allowed_ips"] for entries in throw_away] == [prefixes[:2], prefixes[2:4], prefixes[4:]]
    keys = [entry["public_key"] for entries in throw_away for entry in entries]
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == 3
    assert all(canonical_public_key(key) for key in keys)


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("A" * 43 + "=\n"), lambda path: path.write_text("secretsecret"), lambda path: path.mkdir(),
    lambda path: path.write_bytes(b"\xff" * 500), lambda path: path.symlink_to("/dev/zero")])
def test_preshared_key_files_that_hold_none(tmp_path, make):
    path = tmp_path / "psk"
    make(path)
    with pytest.raises(MeshError) as caught:
        wg_apply.read_preshared_key(str(path))
    assert str(path) in str(caught.value)
    assert "secretsecret" not in str(caught.value)
    assert wg_apply.same_preshared_key(raw_of("x"), str(path)) is False


def test_preshared_key_file(tmp_path):
    path = tmp_path / "psk"
    path.write_text(base64.b64encode(raw_of("psk")).decode() + "\n")
    assert wg_apply.read_preshared_key(str(path)) == bytearray(raw_of("psk"))
    assert wg_apply.same_preshared_key(raw_of("psk"), str(path)) is True


def test_wipe():
    buffer = bytearray(b"secret")
    wg_apply.wipe(buffer)
    assert buffer == bytes(6)
    wg_apply.wipe(None)
