# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the service will be able to read what others provide; the modes on the way are what the test says."""

from __future__ import annotations

import os

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_inputs


def way(path, mode=0o644, folder=0o755, acl=False):
    """A way to a file of user 5 and group 7, its directory with the mode ``folder``."""
    places = [("/", 0o755), (os.path.dirname(path), folder), (path, mode)]
    return {"real": path, "places": [{"path": name, "mode": bits, "uid": 5, "gid": 7, "acl": acl} for name, bits in places]}


@pytest.mark.parametrize("folder, file, uid, gids, acl, readable", [
    (0o755, 0o644, -1, [], False, True),
    (0o755, 0o640, -1, [], False, False), (0o750, 0o644, -1, [], False, False),
    # of the group, and of the owner: the first that fits counts
    (0o750, 0o640, -1, [7], False, True), (0o750, 0o604, -1, [7], False, False), (0o700, 0o400, 5, [], False, True),
    (0o700, 0o044, 5, [7], False, False),
    # what an access control list says is not known here
    (0o755, 0o600, -1, [], True, True)])
def test_whether_a_file_can_be_read_is_told_from_the_modes_on_the_way(folder, file, uid, gids, acl, readable):
    why = _agent_inputs.why_unreadable(way("/pki/ca.crt", file, folder, acl), uid, gids)
    assert (why == "") is readable
    assert readable or any("%s has mode %04o" % (path, mode) in why for path, mode in (("/pki", folder), ("/pki/ca.crt", file)))


def test_a_file_that_the_service_does_not_see_or_that_is_not_there(tmp_path, monkeypatch):
    assert "does not see what is below /root" in _agent_inputs.why_unreadable(way("/root/ca.crt"), 0, [0])
    assert "/nowhere: No such file" in _agent_inputs.why_unreadable(_agent_inputs.way_to("/nowhere/ca.crt"), 0, [0])
    # a link is followed: its name says nothing about where the file is
    monkeypatch.setattr(_agent_inputs, "HIDDEN", (str(tmp_path / "hidden"),))
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ca.crt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "hidden" / "ca.crt")
    assert "does not see" in _agent_inputs.why_unreadable(_agent_inputs.way_to(str(tmp_path / "link")), 0, [0])


def test_each_link_on_the_way_counts(tmp_path, monkeypatch):
    """A file that all may read is not reached through a directory that its name goes through, though the file lies elsewhere."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "ca.crt").write_text("")
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed" / "link").symlink_to("../open/./ca.crt")
    (tmp_path / "short").symlink_to(tmp_path / "closed")
    right = _agent_inputs.may
    # What lies above is as the test runner made it.
    monkeypatch.setattr(_agent_inputs, "may", lambda place, *who: not place["path"].startswith(str(tmp_path) + "/") or right(place, *who))

    def why(name):
        monkeypatch.setattr(_agent_inputs, "HIDDEN", hidden)
        return _agent_inputs.why_unreadable(_agent_inputs.way_to(str(tmp_path / name)), -1, [])

    hidden = ()
    assert why("open/ca.crt") == why("open/../open/ca.crt") == ""
    for name in ("closed/link", "short/link"):
        assert "closed has mode 0700" in why(name)
    (tmp_path / "closed").chmod(0o755)
    assert why("closed/link") == why("short/link") == ""
    hidden = (str(tmp_path / "closed"),)
    assert "does not see what is below" in why("short/link")
    (tmp_path / "open" / "ring").symlink_to("ring")
    assert "Too many levels" in why("open/ring")


def test_the_way_to_a_file_as_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "pki" / "ca.crt"
    path.parent.mkdir(mode=0o700)
    path.write_text("")
    path.chmod(0o604)
    monkeypatch.setattr(_agent_inputs, "has_acl", lambda path: path.endswith("pki"))
    monkeypatch.setattr(_agent_inputs, "TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setattr(_agent_inputs, "identity", lambda: None)
    found = _agent_inputs.read_inputs({"ca_file": str(path), "token_file": None})
    assert (found["user"], found["token"], list(found["ways"])) == (None, False, ["ca_file"])
    places = found["ways"]["ca_file"]["places"]
    assert [place["path"] for place in places[:1] + places[-2:]] == ["/", str(path.parent), str(path)]
    assert [(place["mode"], place["uid"], place["acl"]) for place in places[-2:]] == [
        (0o700, os.geteuid(), True), (0o604, os.geteuid(), False)]
    (tmp_path / "token").write_text("x")
    monkeypatch.setattr(_agent_inputs, "identity", lambda: (5, 7))
    monkeypatch.setattr(_agent_inputs.os, "getgrouplist", lambda name, gid: [gid, 8])
    found = _agent_inputs.read_inputs({"ca_file": str(path), "token_file": str(tmp_path / "none")})
    assert (found["user"], found["token"]) == ({"uid": 5, "gids": [7, 8]}, True)
    assert found["ways"]["token_file"]["places"][-1] == {"path": str(tmp_path / "none"), "error": "No such file or directory"}


USER = {"uid": 5, "gids": [7]}


@pytest.mark.parametrize("user, as_root, token_mode, given, token, options, words", [
    (USER, False, 0o640, False, False, [], ""),
    # without capabilities root has no more rights than its ids give it
    (USER, True, 0o640, False, False, ["token_file"], "for the user root (/t/token has mode 0640, owner 5 and group 7)"),
    (USER, False, 0o044, False, False, ["token_file"], "for the user kubemesh-agent"),
    (None, False, 0o640, False, False, ["token_file"], "useradd --system --user-group kubemesh-agent"),
    (None, True, 0o640, False, False, ["token_file"], "chgrp root"),
    (USER, False, None, True, False, [], ""), (USER, False, None, False, True, [], ""),
    (USER, False, None, False, False, ["token"], "give mesh_agent_token, or mesh_agent_token_file")])
def test_what_is_wrong(user, as_root, token_mode, given, token, options, words):
    ways = {"ca_file": way("/pki/ca.crt")}
    if token_mode is not None:
        ways["token_file"] = way("/t/token", token_mode)
    paths = {"ca_file": "/pki/ca.crt", "token_file": None if token_mode is None else "/t/token"}
    faults = _agent_inputs.input_faults({"user": user, "token": token, "ways": ways}, paths, given, as_root, "mesh_agent_")
    assert [fault["option"] for fault in faults] == options
    for fault in faults:
        assert words in fault["message"] + fault["remedy"] and fault["message"].startswith("mesh_agent_" + fault["option"] + ": ")
    assert "useradd" not in repr(faults) or user is None
