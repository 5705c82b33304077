# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
import sys
import threading

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

# RFC 7748, section 6.1
ALICE = ("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
         "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = ("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
       "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
WG = shutil.which("wg")


def b64(hexadecimal):
    return base64.b64encode(bytes.fromhex(hexadecimal)).decode()


def real_run(args, data=None):
    done = subprocess.run(args, input=data, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def path(tmp_path):
    os.chmod(tmp_path, 0o700)
    return str(tmp_path / "wgmesh0.key")


def put(path, content, mode=0o600):
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


def sound():
    raw = _keys.generate_private_key()
    return raw, (_keys.encode_key(raw) + "\n").encode()


def test_clamped_as_the_rfc_says():
    assert _keys.clamp(b"\xff" * 32).hex() == "f8" + "ff" * 30 + "7f"
    assert _keys.clamp(b"\x00" * 32).hex() == "00" * 31 + "40"


def test_generated_keys_are_clamped_and_use_the_randomness_given():
    assert _keys.generate_private_key(lambda size: b"\xaa" * size).hex() == "a8" + "aa" * 30 + "6a"
    keys = {bytes(_keys.generate_private_key()) for dummy in range(50)}
    assert len(keys) == 50
    assert all(key[0] & 7 == 0 and key[31] & 0xC0 == 0x40 for key in keys)


@pytest.mark.parametrize("private,public", [ALICE, BOB])
def test_public_key_by_cryptography(private, public):
    pytest.importorskip("cryptography")

    def never(args, data=None):
        raise AssertionError("wg was called although the library is there")
    assert _keys.public_key_of(bytes.fromhex(private), never) == b64(public)


@pytest.mark.parametrize("private,public", [ALICE, BOB])
@pytest.mark.skipif(not WG, reason="no wg on this machine")
def test_public_key_by_wg_gets_the_key_on_stdin_only(private, public, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    calls = []

    def spy(args, data=None):
        calls.append(list(args))
        return real_run(args, data)
    assert _keys.public_key_of(bytes.fromhex(private), spy, WG) == b64(public)
    assert calls == [[WG, "pubkey"]]


def test_broken_library_falls_back_to_wg(monkeypatch):
    monkeypatch.setattr(_keys, "_public_by_cryptography", lambda raw: None)
    with pytest.raises(MeshError, match="wireguard-tools"):
        _keys.public_key_of(bytes(32), None, None)
    with pytest.raises(MeshError, match="exit code 1: sorry"):
        _keys.public_key_of(bytes(32), lambda args, data: (1, "", "sorry\n"), "/usr/bin/wg")
    with pytest.raises(MeshError, match="no public key"):
        _keys.public_key_of(bytes(32), lambda args, data: (0, "", ""), "/usr/bin/wg")


def test_key_file_as_wg_genkey_writes_it(path):
    raw, content = sound()
    assert _keys.create(path, raw)
    with open(path, "rb") as file:
        assert file.read() == content
    found = os.stat(path)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 1
    assert os.listdir(os.path.dirname(path)) == ["wgmesh0.key"]
    assert _keys.read_private_key(path) == raw


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_umask_does_not_matter(path, umask):
    old = os.umask(umask)
    try:
        _keys.create(path, _keys.generate_private_key())
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_missing_directories_are_made_for_root_only(tmp_path):
    os.chmod(tmp_path, 0o700)
    target = tmp_path / "etc" / "wireguard" / "wgmesh0.key"
    old = os.umask(0)
    try:
        assert _keys.inspect(str(target)) is None
        _keys.create(str(target), _keys.generate_private_key())
    finally:
        os.umask(old)
    for directory in (target.parent, target.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_what_is_there_is_never_replaced_by_create(path):
    first, second = _keys.generate_private_key(), _keys.generate_private_key()
    assert _keys.create(path, first)
    assert not _keys.create(path, second)
    assert _keys.read_private_key(path) == first
    assert os.listdir(os.path.dirname(path)) == ["wgmesh0.key"]


def test_many_runs_at_once_end_with_one_key(path):
    raws = [_keys.generate_private_key() for dummy in range(12)]
    start = threading.Barrier(len(raws))
    created, seen = [], []

    def run(raw):
        start.wait()
        created.append(_keys.create(path, raw))
        seen.append(bytes(_keys.read_private_key(path)))

    threads = [threading.Thread(target=run, args=(raw,)) for raw in raws]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 11 + [True]
    assert len(set(seen)) == 1 and len(seen) == 12
    assert os.listdir(os.path.dirname(path)) == ["wgmesh0.key"]


def test_a_run_that_knows_nothing_of_the_lock_cannot_lose_its_key(path, monkeypatch):
    """An administrator's wg genkey between our look and our write."""
    theirs, content = sound()
    real_link = os.link

    def link(*args, **kwargs):
        put(path, content)
        return real_link(*args, **kwargs)
    monkeypatch.setattr(os, "link", link)
    assert not _keys.create(path, _keys.generate_private_key())
    assert _keys.read_private_key(path) == theirs


def test_replace(path):
    first, second = _keys.generate_private_key(), _keys.generate_private_key()
    _keys.create(path, first)
    with open(path, "rb") as old:
        _keys.replace(path, second)
        old.seek(0)
        # whoever still has the old file open finds the key gone
        assert _keys.encode_key(first).encode() not in old.read()
    assert _keys.read_private_key(path) == second
    assert os.listdir(os.path.dirname(path)) == ["wgmesh0.key"]


@pytest.mark.parametrize("then", ["create", "replace", "remove"])
def test_what_a_killed_run_left_is_cleared(path, then):
    raw, content = sound()
    leftover = os.path.join(os.path.dirname(path), ".wgmesh0.key.new")
    put(leftover, content)
    if then == "create":
        assert _keys.create(path, raw)
    elif then == "replace":
        put(path, content)
        _keys.replace(path, raw)
    else:
        assert _keys.leftovers(path)
        assert _keys.remove(path)
    assert not os.path.exists(leftover)
    assert os.path.exists(path) == (then != "remove")


def test_killed_between_link_and_unlink(path, monkeypatch):
    """The key has two names then; clearing the one must not harm the other."""
    raw, content = sound()
    put(path, content)
    os.link(path, os.path.join(os.path.dirname(path), ".wgmesh0.key.new"))
    assert _keys.read_private_key(path) == raw
    second = _keys.generate_private_key()

    real_rename = os.rename

    def rename(old, new):
        # up to the last moment the old key is whole
        assert _keys.read_private_key(path) == raw
        real_rename(old, new)
    monkeypatch.setattr(os, "rename", rename)
    _keys.replace(path, second)
    assert _keys.read_private_key(path) == second
    assert os.listdir(os.path.dirname(path)) == ["wgmesh0.key"]


def test_remove_overwrites_first(path):
    content = sound()[1]
    put(path, content)
    with open(path, "rb") as old:
        assert _keys.remove(path)
        seen = old.read()
    assert len(seen) == len(content) and seen != content
    assert not os.path.exists(path)
    assert not _keys.remove(path)
    assert not _keys.remove("/nonexistent/directory/key")


RAW = bytes(range(65, 97))
TEXT = base64.b64encode(RAW)

DAMAGED = {
    "empty": (b"", "empty"),
    "blank": (b"\n\n", "empty"),
    "short": (TEXT[:43] + b"\n", "this has 43"),
    "long": (TEXT + b"AAAA\n", "more than 44"),
    "31 bytes": (base64.b64encode(RAW[:31]) + b"\n", "not the base64 text of 32 bytes|this has"),
    "33 bytes": (base64.b64encode(RAW + b"x") + b"\n", "not the base64 text of 32 bytes|not base64"),
    "not base64": (b"!" * 44 + b"\n", "not base64"),
    "base64 with blanks": (TEXT[:20] + b" " + TEXT[20:43] + b"\n", "not base64"),
    "padding bits": (TEXT[:42] + b"B=\n", "not the base64 text"),
    "zero": (base64.b64encode(bytes(32)) + b"\n", "all its bytes are zero"),
    "binary": (RAW, "this has 32"),
    "two keys": (TEXT + b"\n" + TEXT + b"\n", "more than 44"),
    "leading blank": (b" " + TEXT + b"\n", "more than 44"),
    "pem": (b"-----BEGIN PRIVATE KEY-----\n" + TEXT + b"\n-----END PRIVATE KEY-----\n", "more than 44"),
    "big": (b"A" * 10000, "more than 44"),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_content_is_told_and_not_shown(path, name):
    content, reason = DAMAGED[name]
    put(path, content)
    with pytest.raises(MeshError, match=reason) as caught:
        _keys.inspect(path)
    message = str(caught.value)
    assert path in message and "state=absent" in message
    for length in (8, 12):
        for start in range(0, len(content) - length, 4):
            part = content[start:start + length].decode("latin-1")
            if part.strip():
                assert part not in message
    assert caught.value.__cause__ is None
    with open(path, "rb") as file:
        assert file.read() == content
    # the way out that the message names
    assert _keys.remove(path)


@pytest.mark.parametrize("content", [TEXT, TEXT + b"\n", TEXT + b"\r\n", TEXT + b" \n\n"])
def test_trailing_white_space_is_what_wg_accepts_too(path, content):
    put(path, content)
    assert _keys.read_private_key(path) == RAW


@pytest.mark.skipif(not WG, reason="no wg on this machine")
@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_wg_itself_refuses_the_same_keys(name):
    """wg pubkey reads like a key file, but accepts less white space, and zero bytes."""
    if name == "zero":
        pytest.skip("wg pubkey takes a key of zeros; the kernel takes it for no key")
    assert real_run([WG, "pubkey"], DAMAGED[name][0].decode("latin-1"))[0] != 0


def test_places_that_are_no_key_file(path, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    raw, content = sound()
    put(str(elsewhere), content)

    os.symlink(str(elsewhere), path)
    for function in (_keys.inspect, _keys.leftovers, _keys.remove, _keys.tighten):
        with pytest.raises(MeshError, match="symbolic link"):
            function(path)
    assert not _keys.create(path, raw)
    os.unlink(path)

    os.symlink("/nonexistent/target", path)
    with pytest.raises(MeshError, match="symbolic link"):
        _keys.inspect(path)
    os.unlink(path)

    os.mkdir(path)
    for function in (_keys.inspect, _keys.leftovers, _keys.remove):
        with pytest.raises(MeshError, match="directory"):
            function(path)
    os.rmdir(path)

    os.mkfifo(path)
    with pytest.raises(MeshError, match="not a regular file"):
        _keys.inspect(path)
    with pytest.raises(MeshError):
        _keys.remove(path)
    assert elsewhere.read_bytes() == content


def test_directory_that_others_may_write_in(path, tmp_path):
    os.chmod(tmp_path, 0o770)
    for function in (_keys.inspect, _keys.remove, _keys.leftovers):
        with pytest.raises(MeshError, match="chmod go-w"):
            function(path)
    with pytest.raises(MeshError, match="chmod go-w"):
        _keys.create(path, _keys.generate_private_key())
    os.chmod(tmp_path, 0o755)
    assert _keys.create(path, _keys.generate_private_key())
    with pytest.raises(MeshError, match="not a directory"):
        _keys.inspect(path + "/below")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_key_of_another_user(path, tmp_path):
    content = sound()[1]
    put(path, content)
    os.chown(path, 12345, -1)
    with pytest.raises(MeshError, match="user id 12345"):
        _keys.inspect(path)
    os.unlink(path)
    os.chown(str(tmp_path), 12345, -1)
    with pytest.raises(MeshError, match="chown root"):
        _keys.inspect(path)


@pytest.mark.parametrize("mode,loose", [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o700, True), (0o666, True)])
def test_loose_modes(path, mode, loose):
    content = sound()[1]
    put(path, content, mode)
    found = _keys.inspect(path)
    assert (found["loose"], found["mode"]) == (loose, mode)
    _keys.tighten(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_age_is_never_negative(path):
    content = sound()[1]
    put(path, content)
    os.utime(path, (0, os.stat(path).st_mtime - 3600))
    assert 3600 <= _keys.inspect(path)["age"] < 3700
    os.utime(path, (0, os.stat(path).st_mtime + 720000))
    assert _keys.inspect(path)["age"] == 0


def test_no_key_to_read(path):
    with pytest.raises(MeshError, match="keypair"):
        _keys.read_private_key(path)


def test_lock_that_is_never_let_go(path, monkeypatch):
    import fcntl
    monkeypatch.setattr(_keys, "LOCK_SECONDS", 0.0)
    handle = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(MeshError, match="fuser"):
            _keys.create(path, _keys.generate_private_key())
    finally:
        os.close(handle)
    assert _keys.create(path, _keys.generate_private_key())
