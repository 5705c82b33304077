# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import hashlib
import stat

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.modules import document

KEY = "B" * 42 + "A="
DOC = {"schema": 1, "serial": 6, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": {
    "a": {"state": "member", "reason": "", "uid": "", "public_keys": {"0": KEY}, "endpoints": {}, "pod_cidrs": ["10.244.1.0/24"],
          "node_addresses": ["198.18.0.11"], "probe_addresses": {"0": _mesh.probe_address(KEY)}, "mtu": None, "keepalive": 0}}}
NEWER = copy.deepcopy(DOC)
NEWER["serial"] = 7
NEWER["nodes"]["a"]["pod_cidrs"].append("10.244.9.0/24")


@pytest.fixture
def files(tmp_path):
    """Two documents of the controller, and where one is kept."""
    class Files:
        old, new, bad, path = (tmp_path / name for name in ("old.json", "new.json", "bad.json", "mesh.json"))
        folder = tmp_path / "etc"

    Files.old.write_bytes(_mesh.document_bytes(DOC))
    Files.new.write_bytes(_mesh.document_bytes(NEWER))
    Files.bad.write_text('{"schema": 1}')
    Files.path = Files.folder / "mesh.json"
    return Files


@pytest.fixture
def run(run_module, files):
    def run(check=False, diff=True, **arguments):
        given = {name: str(value) for name, value in arguments.items()}
        return run_module(document.main, dict({"path": str(files.path)}, **given), check, diff)

    return run


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_first_document(run, files):
    result = run(src=files.old)
    assert (result["changed"], result["serial"], result["previous_serial"]) == (True, 6, None) and "needed" not in result
    assert files.path.read_bytes() == files.old.read_bytes()
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o644, "public facts"
    assert result["diff"]["prepared"].splitlines()[0] == "first mesh document"


def test_a_newer_document(run, files):
    run(src=files.old)
    result = run(src=files.new)
    assert (result["changed"], result["serial"], result["previous_serial"]) == (True, 7, 6)
    assert files.path.read_bytes() == files.new.read_bytes()
    assert result["diff"]["prepared"] == "node a: pod CIDR 10.244.9.0/24 added\n"
    assert "diff" not in run(src=files.old, diff=False)


def test_the_same_document(run, files):
    run(src=files.old)
    result = run(src=files.old)
    assert (result["changed"], result["serial"]) == (False, 6) and "diff" not in result


def test_only_those_that_need_it_are_sent_one(run, files):
    """What the action part asks first, with the checksum alone."""
    result = run(sha256=sha256(files.old))
    assert (result["changed"], result["needed"], result["serial"], result["previous_serial"]) == (True, True, None, None)
    assert not files.path.exists()
    run(src=files.old)
    result = run(sha256=sha256(files.old))
    assert (result["changed"], result["needed"], result["serial"], result["previous_serial"]) == (False, False, 6, 6)
    result = run(sha256=sha256(files.new))
    assert (result["changed"], result["needed"], result["previous_serial"]) == (True, True, 6)
    assert files.path.read_bytes() == files.old.read_bytes()


def test_a_document_that_is_none_is_refused(run, files):
    run(src=files.old)
    result = run(src=files.bad, sha256=sha256(files.bad))
    assert result["failed"] and "not a mesh document" in result["msg"]
    assert files.path.read_bytes() == files.old.read_bytes(), "and the one that is there stays"


def test_one_that_is_damaged_is_replaced(run, files):
    files.folder.mkdir()
    files.path.write_text("{")
    assert run(sha256=sha256(files.old))["needed"]
    result = run(src=files.old)
    assert (result["changed"], result["previous_serial"]) == (True, None)
    # even where the checksum says that it is the wanted one
    files.path.write_bytes(files.bad.read_bytes())
    assert run(sha256=sha256(files.bad))["needed"]


def test_a_source_that_is_missing_removes_nothing(run, files):
    run(src=files.old)
    result = run(src=files.folder / "none.json")
    assert result["failed"] and "none.json is not there" in result["msg"]
    assert files.path.read_bytes() == files.old.read_bytes()


def test_a_forgotten_source(run, files):
    result = run()
    assert result["failed"] and "src" in result["msg"]


def test_a_path_that_cannot_be_read(run, files):
    files.path.mkdir(parents=True)
    for arguments in ({"src": files.old}, {"state": "absent"}):
        result = run(**arguments)
        assert result["failed"] and "mesh.json cannot be read" in result["msg"]


def test_check_mode(run, files):
    result = run(check=True, src=files.old)
    assert (result["changed"], result["serial"]) == (True, 6) and not files.folder.exists()
    run(src=files.old)
    result = run(check=True, state="absent")
    assert result["changed"] and files.path.exists()
    assert result["diff"]["prepared"] == "the mesh document is removed\n"


def test_absent(run, files):
    run(src=files.old)
    result = run(state="absent")
    assert (result["changed"], result["serial"], result["previous_serial"]) == (True, None, 6)
    assert not files.folder.exists(), "nor the directory"
    assert run(state="absent")["changed"] is False


def test_absent_leaves_what_others_put_there(run, files):
    run(src=files.old)
    (files.folder / "other").write_text("x")
    run(state="absent")
    assert not files.path.exists() and (files.folder / "other").exists()
