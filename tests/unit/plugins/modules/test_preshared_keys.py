# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import hashlib
import os
import stat

import pytest
from ansible.module_utils import basic

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk, _psk_files
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.modules import preshared_keys

NONCE = "5f0c2e7a"


def peer(number):
    """A public key; every second one has the characters that file names cannot have."""
    return base64.b64encode((b"\xfb\xef\xbe\xff" if number % 2 else b"\x01\x02\x03\x04") + number.to_bytes(27, "big") + b"\x40").decode()


def raw(name):
    return hashlib.sha256(b"test preshared key " + str(name).encode()).digest()


def text(name):
    return base64.b64encode(raw(name)).decode()


A, B, C = peer(1), peer(2), peer(3)


def keys(**names):
    """{public key: preshared key}, by default one made of its own name."""
    return {{"a": A, "b": B, "c": C}[name]: text(value) for name, value in names.items()}


def proofs(**names):
    return {{"a": A, "b": B, "c": C}[name]: _psk.proof(raw(value), NONCE, {"a": A, "b": B, "c": C}[name]) for name, value in names.items()}


def forms(secret):
    """All ways in which a secret may show up in a text."""
    return {base64.b64encode(secret).decode(), base64.b64encode(secret).decode().rstrip("="), secret.hex(), secret.hex().upper(),
            base64.urlsafe_b64encode(secret).decode(), repr(secret), hashlib.sha256(secret).hexdigest(),
            hashlib.sha256(base64.b64encode(secret)).hexdigest(), hashlib.sha1(secret).hexdigest()}


@pytest.fixture
def path(tmp_path):
    os.chmod(tmp_path, 0o700)
    return tmp_path / "wireguard" / "wgmesh0.psk"


@pytest.fixture
def warnings(monkeypatch):
    """Not from the result: where the controller's code is loaded as well, a warning is printed instead, and only once."""
    given = []
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, text: given.append(text))
    return given


@pytest.fixture
def run(run_module, path):
    """-> function(check=False, **arguments) -> result. Nothing that the module prints has a key in it."""
    def run(check=False, diff=True, **arguments):
        result = run_module(preshared_keys.main, dict({"path": str(path), "complete": True}, **arguments), check, diff)
        given = [_psk.decode(item) for item in (arguments.get("keys") or {}).values() if isinstance(item, str)]
        there = [_psk.decode(item.read_bytes()) for item in path.glob("*") if item.is_file()]
        for secret in map(bytes, filter(None, given + there)):
            for form in forms(secret):
                assert form not in run_module.output
        for proof in (arguments.get("proofs") or {}).values():
            assert not isinstance(proof, str) or len(proof) < 4 or proof not in run_module.output
        return result

    return run


def stored(path):
    return {_psk.public_key_of(item.name): item.read_text().strip() for item in path.glob("*")} if path.exists() else {}


def modes(path):
    return {stat.S_IMODE(item.stat().st_mode) for item in path.glob("*")}


# --- present -----------------------------------------------------------------------------------------------------------------------------

def test_the_first_keys(run, path):
    result = run(keys=keys(a="a", b="b"))
    assert (result["changed"], result["added"]) == (True, sorted([A, B]))
    assert (result["replaced"], result["removed"], result["differs"]) == ([], [], [])
    assert result["msg"] == "preshared keys: 2 added" and "needed" not in result
    assert stored(path) == keys(a="a", b="b") and modes(path) == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700 == stat.S_IMODE(path.parent.stat().st_mode)
    assert result["diff"]["prepared"] == "".join("peer %s: preshared key added\n" % key for key in sorted([A, B]))
    assert (path / _psk.file_name(A)).read_text() == text("a") + "\n", "as wg reads it"
    for answer in (result, run(keys=keys(a="x"), proofs=proofs(a="x"), nonce=NONCE), run(keys={A: "x"})):
        # whatever a version of Ansible makes of no_log
        assert not {"keys", "proofs", "secret"} & set(answer.get("invocation", {}).get("module_args", {}))
    run(keys=keys(a="a", b="b"))
    again = run(keys=keys(a="a", b="b"))
    assert (again["changed"], again["msg"]) == (False, "the preshared keys of 2 peers are as they should be") and "diff" not in again


def test_what_differs_is_written_and_the_rest_is_not_touched(run, path):
    run(keys=keys(a="a", b="b"))
    before = {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in path.glob("*")}
    result = run(keys=keys(a="a", b="other", c="c"))
    assert (result["added"], result["replaced"], result["differs"], result["removed"]) == ([C], [B], [B], [])
    assert result["counts"] == {"added": 1, "replaced": 1, "removed": 0, "tightened": 0, "kept": 1}
    assert stored(path) == keys(a="a", b="other", c="c")
    after = {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in path.glob("*")}
    assert after[_psk.file_name(A)] == before[_psk.file_name(A)]


def test_keys_of_peers_that_are_gone_go_only_when_the_list_is_complete(run, path):
    run(keys=keys(a="a", b="b"))
    result = run(keys=keys(a="a"), complete=False)
    assert (result["changed"], result["removed"]) == (False, []) and set(stored(path)) == {A, B}
    assert run(keys=keys(a="a"), complete=None)["changed"] is False
    result = run(keys=keys(a="a"))
    assert (result["changed"], result["removed"]) == (True, [B]) and set(stored(path)) == {A}
    assert result["diff"]["prepared"] == "peer %s: preshared key removed\n" % B


def test_files_of_others_are_left_alone(run, path):
    run(keys=keys(a="a"))
    (path / "README").write_text("mine")
    (path / ".x.new").write_text("mine")
    run(keys=keys(b="b"))
    assert {item.name for item in path.iterdir()} == {"README", ".x.new", _psk.file_name(B)}


@pytest.mark.parametrize("content", [b"", b"x", text("a").encode()[:43], b"\0" * 44, base64.b64encode(bytes(32)), b"\xff" * 500,
                                     text("a").encode() + b"\n" * 300])
def test_a_damaged_file_is_replaced(run, path, content):
    run(keys=keys(a="a"))
    (path / _psk.file_name(A)).write_bytes(content)
    result = run(keys=keys(a="a"))
    assert (result["replaced"], result["changed"]) == ([A], True) and stored(path) == keys(a="a")


def test_what_others_can_use_is_closed_to_them(run, warnings, path):
    run(keys=keys(a="a", b="b"))
    (path / _psk.file_name(A)).chmod(0o640)
    expected = run(check=True, keys=keys(a="a", b="b"))
    assert expected["changed"] and modes(path) == {0o600, 0o640}
    result = run(keys=keys(a="a", b="b"))
    assert result["changed"] and result["counts"]["tightened"] == 1 and "change the secret" in warnings[-1]
    assert modes(path) == {0o600} and stored(path) == keys(a="a", b="b")
    assert result["diff"]["prepared"] == "1 preshared keys closed to others\n" and expected["diff"] == result["diff"]
    path.chmod(0o755)
    result = run(keys=keys(a="a", b="b"))
    assert result["changed"] and "put in order" in result["msg"] and stat.S_IMODE(path.stat().st_mode) == 0o700
    assert run(keys=keys(a="a", b="b"))["changed"] is False


def test_what_a_killed_run_left_is_removed(run, path):
    run(keys=keys(a="a"))
    left = path / (".%s.new" % _psk.file_name(B))
    left.write_text(text("b"))
    assert run(check=True, keys=keys(a="a"))["changed"] and left.exists()
    assert run(keys=keys(a="a"))["changed"] and not left.exists()
    left.write_text(text("b"))
    run(keys=keys(a="a", b="b"))
    assert not left.exists() and stored(path) == keys(a="a", b="b")


# --- proofs ------------------------------------------------------------------------------------------------------------------------------

def test_what_is_there_is_compared_without_keys(run, path):
    result = run(proofs=proofs(a="a", b="b"), nonce=NONCE)
    assert (result["changed"], result["needed"]) == (True, " ".join(sorted([A, B]))) and not path.exists(), "nothing is done without keys"
    run(keys=keys(a="a", b="b"))
    result = run(proofs=proofs(a="a", b="b"), nonce=NONCE)
    assert (result["changed"], result["needed"]) == (False, "")
    result = run(proofs=proofs(a="a", b="other", c="c"), nonce=NONCE)
    assert (result["changed"], result["needed"], result["differs"], result["added"]) == (True, "%s %s" % (C, B), [B], [C])
    assert stored(path) == keys(a="a", b="b")
    assert run(proofs=proofs(a="a", b="b"), nonce="another")["differs"] == sorted([A, B]), "a proof is good for one time"
    swapped = {A: proofs(a="a", b="a")[B], B: proofs(a="b", b="b")[A]}
    assert run(proofs=swapped, nonce=NONCE)["differs"] == sorted([A, B]), "and for one peer"


def test_what_needs_no_key_is_done_at_once(run, path):
    run(keys=keys(a="a", b="b"))
    result = run(proofs=proofs(a="a"), nonce=NONCE)
    assert (result["changed"], result["needed"], result["removed"]) == (True, "", [B]) and stored(path) == keys(a="a")
    assert run(proofs={}, nonce=NONCE)["removed"] == [A] and stored(path) == {}, "a mesh of one node"


def test_keys_for_some_and_proofs_for_the_rest(run, path):
    run(keys=keys(a="a"))
    result = run(keys=keys(b="b"), proofs=proofs(a="a", b="b"), nonce=NONCE)
    assert result["added"] == [B] and result["removed"] == [] and stored(path) == keys(a="a", b="b")
    result = run(keys=keys(b="b"), proofs=proofs(a="other", b="b"), nonce=NONCE)
    assert result["failed"] and "run again" in result["msg"].lower() and stored(path) == keys(a="a", b="b")


# --- looking only ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", [{"check": True}, {"compare_only": True}])
def test_a_look_changes_nothing(run, path, way):
    for arguments in ({"keys": keys(a="a")}, {"proofs": proofs(a="a"), "nonce": NONCE}):
        result = run(**dict(way, **arguments))
        assert result["added"] == [A] and result["changed"] is ("check" in way) and not path.parent.exists()
    run(keys=keys(a="a", b="b"))
    (path / _psk.file_name(A)).chmod(0o644)
    before = [(item.name, item.read_bytes(), item.stat().st_mode, item.stat().st_mtime_ns) for item in sorted(path.glob("*"))]
    for arguments in ({"keys": keys(a="x", c="c")}, {"proofs": proofs(a="x", c="c"), "nonce": NONCE}):
        result = run(**dict(way, **arguments))
        assert (result["differs"], result["added"], result["removed"]) == ([A], [C], [B]) and "would be" in result["msg"]
        assert result["changed"] is ("check" in way) and ("diff" in result) is ("check" in way)
    assert before == [(item.name, item.read_bytes(), item.stat().st_mode, item.stat().st_mtime_ns) for item in sorted(path.glob("*"))]


# --- absent ------------------------------------------------------------------------------------------------------------------------------

def test_absent(run, path):
    run(keys=keys(a="a", b="b"))
    (path / (".%s.new" % _psk.file_name(C))).write_text(text("c"))
    expected = run(check=True, state="absent")
    assert expected["changed"] and len(stored(path)) >= 2
    result = run(state="absent")
    assert result["changed"] and result["removed"] == sorted([A, B]) and not path.exists() and path.parent.exists()
    assert expected["diff"] == result["diff"]
    assert run(state="absent")["changed"] is False
    path.mkdir(mode=0o700)
    assert run(state="absent")["changed"] and not path.exists()


def test_absent_leaves_what_is_not_ours(run, warnings, path):
    run(keys=keys(a="a"))
    (path / "README").write_text("mine")
    result = run(state="absent")
    assert result["changed"] and "not ours" in warnings[-1] and [item.name for item in path.iterdir()] == ["README"]
    assert run(check=True, state="absent")["changed"] is False and run(state="absent")["changed"] is False


def test_what_goes_is_overwritten(run, path, monkeypatch):
    """As seen by somebody who still has the file open."""
    run(keys=keys(a="a", b="b", c="c"))
    handles = {name: open(str(path / _psk.file_name(name)), "rb") for name in (A, B, C)}  # noqa: SIM115
    try:
        run(keys=keys(a="other", b="b"))
        run(state="absent")
        for name, handle in handles.items():
            content = handle.read()
            assert len(content) == 45 and all(text(word).encode() not in content for word in "abc"), name
    finally:
        for handle in handles.values():
            handle.close()


def test_a_file_with_another_name_is_not_destroyed(run, path, tmp_path):
    run(keys=keys(a="a"))
    os.link(str(path / _psk.file_name(A)), str(tmp_path / "backup"))
    run(state="absent")
    assert (tmp_path / "backup").read_text().strip() == text("a")


# --- what is refused ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments,words", [
    ({}, "secret"), ({"secret": "x" * 40}, "document_src"), ({"keys": {"x": text("a")}}, "public key"),
    ({"keys": {A: "x" * 44}}, "no preshared"), ({"keys": {A: base64.b64encode(bytes(32)).decode()}}, "no preshared"),
    ({"keys": {A: [text("a")]}}, "not text"), ({"keys": {A: text("a")[:43] + "!"}}, "no preshared"), ({"proofs": {A: "x"}}, "nonce"),
    ({"proofs": {A: 5}, "nonce": NONCE}, "not text"), ({"state": "gone"}, "state")])
def test_errors_name_what_is_wrong_and_no_key(run, run_module, path, arguments, words):
    result = run(**arguments)
    assert result["failed"] and words in result["msg"] and not path.exists()
    assert text("a") not in run_module.output and text("a")[:43] not in run_module.output and "x" * 40 not in run_module.output


def put(kind, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    {"directory": place.mkdir, "link": lambda: place.symlink_to("/etc/hostname"), "fifo": lambda: os.mkfifo(str(place)),
     "file": lambda: place.write_text("x")}[kind]()


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
@pytest.mark.parametrize("arguments", [{"keys": keys(a="a")}, {"state": "absent"}])
def test_what_is_no_file_is_refused(run, path, kind, arguments):
    run(keys=keys(b="b"))
    put(kind, path / _psk.file_name(A))
    result = run(**arguments)
    assert result["failed"] and "not a file" in result["msg"] and (path / _psk.file_name(B)).exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory_is_refused(run, path, kind):
    put(kind, path)
    for arguments in ({"keys": keys(a="a")}, {"state": "absent"}):
        result = run(**arguments)
        assert result["failed"] and "not a directory" in result["msg"]


def test_a_directory_that_others_write_in_is_refused(run, path):
    run(keys=keys(a="a"))
    path.chmod(0o770)
    result = run(keys=keys(a="a"))
    assert result["failed"] and "others may write" in result["msg"]


# --- the directory for other code --------------------------------------------------------------------------------------------------------

def test_which_keys_are_missing(run, path):
    assert _psk_files.missing(str(path), [A, B]) == sorted([A, B]) and _psk_files.missing(str(path), []) == []
    run(keys=keys(a="a", b="b"))
    (path / _psk.file_name(B)).write_text("x")
    assert _psk_files.missing(str(path), [A, B, C]) == sorted([B, C]) and _psk_files.missing(str(path), [A]) == []


def test_many_keys_are_synced_at_once(path, monkeypatch):
    synced = []
    monkeypatch.setattr(_psk_files.os, "sync", lambda: synced.append("all"))
    some = {peer(number): text(number) for number in range(_psk_files.SYNC_ONE_BY_ONE + 1)}
    with _psk_files.Folder(str(path), create=True) as folder:
        folder.write(dict(list(some.items())[1:]))
        assert synced == []
        folder.write(some)
        assert synced == ["all"]
    assert stored(path) == some


def stops_after(number, function):
    """The function, and the end of the run when it is called once more."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return called


def test_a_run_that_ends_in_the_middle_leaves_whole_keys(path, monkeypatch):
    rename = os.rename
    some = keys(a="a", b="b", c="c")
    with _psk_files.Folder(str(path), create=True) as folder:
        folder.write(some)
    for place in range(3):
        other = keys(a="x%d" % place, b="y%d" % place, c="z%d" % place)
        with monkeypatch.context() as patch:
            patch.setattr(_psk_files.os, "rename", stops_after(place, rename))
            with pytest.raises(KeyboardInterrupt), _psk_files.Folder(str(path)) as folder:
                folder.write(other)
        found = {key: (path / _psk.file_name(key)).read_text().strip() for key in some}
        assert all(found[key] in (some[key], other[key]) for key in some)
        assert len([key for key in some if found[key] == other[key]]) == place
        some = found


def test_two_runs_at_once(path, monkeypatch):
    monkeypatch.setattr(_psk_files, "WAIT_SECONDS", 0.1)
    with _psk_files.Folder(str(path), create=True), pytest.raises(MeshError, match="fuser"), _psk_files.Folder(str(path)):
        pass
    with _psk_files.Folder(str(path)) as folder:
        assert folder.exists


def test_the_log_of_the_node_has_no_key(run, monkeypatch):
    logged = []
    monkeypatch.setattr(basic.AnsibleModule, "log", lambda self, msg, log_args=None: logged.append("%s %s" % (msg, log_args)))
    run(keys=keys(a="a"), proofs=proofs(b="b"), nonce=NONCE, secret="the secret of the cluster, 32 and more")
    assert len(logged) == 1 and "wgmesh0.psk" in logged[0]
    assert "the secret of the cluster" not in logged[0] and proofs(b="b")[B] not in logged[0]
    assert not any(form in logged[0] for form in forms(raw("a")))
