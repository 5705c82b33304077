# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _system as system
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

with open(os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "ip", "ip.json"), encoding="utf-8") as handle:
    IP = json.load(handle)
RELEASES = [pytest.param(item["outputs"], id=item["version"].split("-")[1].split(",")[0]) for item in IP["recorded"]]


class Module:
    """Answers commands: {command without its path: (rc, stdout, stderr)}."""

    def __init__(self, answers, missing=(), strict=False):
        self.answers, self.missing, self.strict, self.ran = answers, missing, strict, []

    def get_bin_path(self, name, opt_dirs=None):
        assert "/usr/sbin" in opt_dirs and "/sbin" in opt_dirs, "where a login's PATH may not lead"
        return None if name in self.missing else "/usr/sbin/" + name

    def run_command(self, argv, data=None, environ_update=None):
        assert isinstance(argv, list) and environ_update["LC_ALL"] == "C"
        command = " ".join([os.path.basename(argv[0])] + argv[1:])
        self.ran.append((command, data))
        return self.answers[command] if self.strict else self.answers.get(command, (0, "", ""))


def recorded(outputs):
    answers = {}
    for command, item in outputs.items():
        # The order of these options does not matter to ip.
        words = command.split()
        if words[1:3] == ["-j", "-N"]:
            words = words[1:3] + words[:1] + words[3:]
        answers[" ".join(["ip"] + words)] = (item["rc"], item["stdout"], item["stderr"])
    return system.System(Module(answers, strict=True))


# --- commands ----------------------------------------------------------------------------------------------------------------------------

def test_a_command_that_works():
    module = Module({"ip link": (0, "out", "err")})
    assert system.System(module).run(["ip", "link"], data="in") == "out"
    assert module.ran == [("ip link", "in")]


def test_a_command_that_fails_says_why():
    it = system.System(Module({"ip link": (2, "", "no such thing\n"), "wg show": (1, "said on stdout", "")}))
    with pytest.raises(MeshError, match=r"^ip link failed with code 2: no such thing$"):
        it.run(["ip", "link"])
    with pytest.raises(MeshError, match="said on stdout"):
        it.run(["wg", "show"])
    assert it.try_run(["ip", "link"]) == (2, "", "no such thing\n")


def test_a_tool_that_is_missing():
    it = system.System(Module({}, missing=("wg",)))
    with pytest.raises(MeshError, match="wg is not installed"):
        it.run(["wg", "show"])
    assert it.try_run(["wg"]) == (127, "", "wg: command not found")
    assert it.path("wg") is None and it.path("ip") == "/usr/sbin/ip"


def test_a_tool_that_ends_with_127_is_not_missing():
    it = system.System(Module({"ip x": (127, "", "odd")}))
    with pytest.raises(MeshError, match="failed with code 127: odd"):
        it.run(["ip", "x"])


# --- ip ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("outputs", RELEASES)
@pytest.mark.parametrize("option", ["-4", "-6"])
def test_a_table_that_does_not_exist_is_empty(outputs, option):
    """ip prints half an array and ends with 2."""
    it = recorded(outputs)
    assert it.ip_json([option, "route", "show", "table", "51999"], missing=("table does not exist",)) == []
    with pytest.raises(MeshError, match="FIB table does not exist"):
        it.ip_json([option, "route", "show", "table", "51999"])
    assert len(it.ip_json([option, "route", "show", "table", "51841"])) == 1


@pytest.mark.parametrize("outputs", RELEASES)
def test_devices(outputs):
    it = recorded(outputs)
    assert it.link("wgmesh0")["ifname"] == "wgmesh0" and it.link("none0") is None
    assert it.addresses("wgmesh0") == ["198.18.0.11/32", "2001:db8::b/128", "fe80::1234:5678:9abc:def0/64"]
    assert it.addresses("none0") == []


@pytest.mark.parametrize("outputs", RELEASES)
def test_questions_without_answers(outputs):
    """One question that has no answer does not take the others with it."""
    it = recorded(outputs)
    lines = IP["queries"]["-6 -o -force -batch -"].splitlines()
    assert len(it.ip_answers("ipv6", lines).splitlines()) == 2
    assert it.module.ran[-1] == ("ip -6 -o -force -batch -", "\n".join(lines) + "\n")


@pytest.mark.parametrize("printed,found", [("", []), ("\n", []), ("[", []), ("[]", []), ("[ ]\n", []), ("[{},{\"a\":1}]", [{"a": 1}])])
def test_ways_of_printing_nothing(printed, found):
    assert system.System(Module({"ip -j -N rule": (0, printed, "")})).ip_json(["rule"]) == found


def test_an_ip_that_prints_no_json():
    with pytest.raises(MeshError, match=r"ip rule printed no JSON .*iproute2 4\.18"):
        system.System(Module({"ip -j -N rule": (0, "0: from all lookup local", "")})).ip_json(["rule"])


def test_batches():
    module = Module({})
    it = system.System(module)
    it.ip_batch("ipv6", ["route replace a", "route del b"])
    it.ip_batch("ipv4", [])
    assert module.ran == [("ip -6 -batch -", "route replace a\nroute del b\n")]
    failing = system.System(Module({"ip -4 -batch -": (1, "", "Command failed -:1")}))
    with pytest.raises(MeshError, match="Command failed"):
        failing.ip_batch("ipv4", ["route replace a"])


@pytest.mark.parametrize("printed,expected", [
    ("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n", (True, True, True)),
    ("LoadState=loaded\nActiveState=activating\nUnitFileState=enabled-runtime\n", (True, True, True)),
    ("LoadState=loaded\nActiveState=failed\nUnitFileState=disabled\n", (True, False, False)),
    ("LoadState=not-found\nActiveState=inactive\nUnitFileState=\n", (False, False, False)),
    ("LoadState=masked\nActiveState=inactive\nUnitFileState=masked\n", (False, False, False)),
    ("", (False, False, False))])
def test_units(printed, expected):
    it = system.System(Module({"systemctl show --property=LoadState,ActiveState,UnitFileState x.service": (0, printed, "")}))
    found = it.unit("x.service")
    assert (found["exists"], found["active"], found["enabled"]) == expected


def test_a_node_without_systemd():
    assert system.System(Module({}, missing=("systemctl",))).unit("x") == {"exists": False, "active": False, "enabled": False}


# --- files -------------------------------------------------------------------------------------------------------------------------------

def test_text_of_files(tmp_path):
    (tmp_path / "text").write_bytes(b"a\xffb")
    assert system.read_text(str(tmp_path / "text")) == "a\ufffdb"
    assert system.read_text(str(tmp_path / "none")) is None
    assert system.read_text(str(tmp_path / "text" / "below")) is None
    with pytest.raises(MeshError, match="cannot be read"):
        system.read_text(str(tmp_path))


def test_text_of_a_process_that_ends_while_it_is_read(monkeypatch):
    """The kernel lets the file be opened, and says ESRCH when it is read."""
    class Gone(io.BytesIO):
        def read(self, size=-1):
            raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr("builtins.open", lambda path, mode: Gone())
    assert system.read_text("/proc/1/stat") is None


def test_plans_of_files(tmp_path):
    there, changed, mode, gone, none = (str(tmp_path / name) for name in ("there", "changed", "mode", "gone", "none"))
    for path in (there, changed, mode, gone):
        with open(path, "w", encoding="utf-8") as handle:
            handle.write("old\n")
        os.chmod(path, 0o644)
    wanted = {there: ("old\n", 0o644), changed: ("new\n", 0o644), mode: ("old\n", 0o600), gone: (None, 0o644), none: (None, 0o644),
              str(tmp_path / "new"): ("x\n", 0o755)}
    steps = system.plan_files(wanted)
    assert [(step["op"], os.path.basename(step["path"])) for step in steps] == [
        ("write_file", "changed"), ("remove_file", "gone"), ("write_file", "mode"), ("write_file", "new")]
    assert steps[0]["before"] == "old\n" and steps[0]["after"] == "new\n" and steps[3]["before"] is None
    for step in steps:
        system.apply_file_step(step)
    assert system.plan_files(wanted) == []
    assert sorted(os.listdir(str(tmp_path))) == ["changed", "mode", "new", "there"], "no temporary file is left"
    assert stat.S_IMODE(os.stat(mode).st_mode) == 0o600 and stat.S_IMODE(os.stat(str(tmp_path / "new")).st_mode) == 0o755


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=50).filter(lambda text: "\r" not in text))
def test_what_is_written_is_read(tmp_path_factory, text):
    path = str(tmp_path_factory.mktemp("text") / "file")
    system.write_text(path, text, 0o644)
    assert system.read_text(path) == text
    assert system.plan_files({path: (text, 0o644)}) == []


def test_folders_are_made_and_removed(tmp_path):
    path = str(tmp_path / "etc" / "kubemesh" / "mesh.json")
    old = os.umask(0o077)
    try:
        system.write_text(path, "x", 0o644)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644, "whatever the umask is"
    system.remove_empty_folders([os.path.dirname(path)])
    assert os.path.exists(path), "a folder that holds something stays"
    system.remove_file(path)
    system.remove_file(path)
    system.remove_empty_folders([os.path.dirname(path), os.path.dirname(path)])
    assert not os.path.exists(os.path.dirname(path))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    system.write_text(path, "old", 0o644)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system.os, "fsync", fail)
    with pytest.raises(MeshError, match=r"file cannot be written: .*No space left.*untouched"):
        system.write_text(path, "new", 0o644)
    assert system.read_text(path) == "old" and os.listdir(str(tmp_path)) == ["file"]


def test_a_file_that_cannot_be_removed(tmp_path):
    with pytest.raises(MeshError, match="cannot be removed"):
        system.remove_file(str(tmp_path))


def test_a_symbolic_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    system.write_text(str(tmp_path / "link"), "ours", 0o644)
    assert (tmp_path / "target").read_text() == "precious" and not (tmp_path / "link").is_symlink()


def test_modes_of_files(tmp_path):
    assert system.file_mode(str(tmp_path / "none")) is None
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o640)
    assert system.file_mode(str(tmp_path / "file")) == 0o640


def test_the_document_of_a_node(tmp_path):
    path = tmp_path / "mesh.json"
    with pytest.raises(MeshError, match=r"mesh\.json is not there; run the exchange"):
        system.read_document(str(path))
    path.write_text("{}")
    with pytest.raises(MeshError, match="not a mesh document"):
        system.read_document(str(path))
    doc = {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 1, "1": 2}, "nodes": {}}
    path.write_bytes(_mesh.document_bytes(doc))
    assert system.read_document(str(path)) == doc


# --- sysctl ------------------------------------------------------------------------------------------------------------------------------

def test_sysctls(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "sysctl_path", lambda name: str(tmp_path / name.replace("/", "_")))
    (tmp_path / "net_ipv4_conf_bond0.100_rp_filter").write_text("1\n")
    assert system.read_sysctl("net/ipv4/conf/bond0.100/rp_filter") == "1"
    system.write_sysctl("net/ipv4/conf/bond0.100/rp_filter", "2")
    assert system.read_sysctl("net/ipv4/conf/bond0.100/rp_filter") == "2"
    assert system.read_sysctl("net/ipv4/conf/none/rp_filter") is None
    (tmp_path / "refused").mkdir()
    with pytest.raises(MeshError, match="sysctl refused=2 was refused"):
        system.write_sysctl("refused", "2")


def test_where_sysctls_are():
    assert system.sysctl_path("net/ipv4/conf/bond0.100/rp_filter") == "/proc/sys/net/ipv4/conf/bond0.100/rp_filter"
