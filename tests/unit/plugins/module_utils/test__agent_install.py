# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_install as install
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_plan

PROGRAM = install.PACKAGE + "._agent"


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The directory of programs elsewhere."""
    folder = tmp_path / "lib"
    monkeypatch.setattr(install, "LIBRARY", str(folder))
    monkeypatch.setattr(install, "LINK", str(folder / "agent"))
    monkeypatch.setattr(install, "UNFINISHED", str(folder / "agent.unfinished"))
    return folder


class Killed(BaseException):
    """A run that dies."""


class System:
    """Commands of a node, of which one is the last of a run."""

    def __init__(self, last=None):
        self.commands, self.last = [], last

    def run(self, argv):
        if self.last == len(self.commands):
            raise Killed
        self.commands.append(argv)


@pytest.fixture
def node(library, monkeypatch, tmp_path):
    """A node that the agent is installed on."""
    for name in ("UNIT_FILE", "GUARD_UNIT_FILE", "USERS_FILE", "FOLDERS_FILE", "CONFIG_FILE", "TOKEN_FILE", "RUNTIME", "STATE"):
        monkeypatch.setattr(install, name, str(tmp_path / name))
    monkeypatch.setattr(install, "identity", lambda: (os.getuid(), os.getgid()))
    monkeypatch.setattr(install.os, "chown", lambda *dummy: None)


def test_an_installation_that_was_interrupted_is_ended_by_the_next_one(node):
    """Wherever: what runs could be the program, or what systemd knows the unit, of before."""
    def plan(text):
        return install.plan_present(text, "token", "/usr/bin/python3", False, [], {"start.py": ""})

    files = {"start.py": ""}
    first = System()
    install.apply_present(first, plan("{}\n"), "token", files, True)
    assert first.commands[-1] == ["systemctl", "restart", install.UNIT] and plan("{}\n") == []
    # with another configuration systemd need not read its units again
    for number in range(len(first.commands) - 1):
        text = '{"number": %d}\n' % number
        with pytest.raises(Killed):
            install.apply_present(System(number), plan(text), "token", files, True)
        # no step may be one that restarts nothing, see the module
        assert [step["op"] for step in plan(text)] == ["finish_installation"]
        second = System()
        install.apply_present(second, plan(text), "token", files, True)
        assert ["systemctl", "daemon-reload"] in second.commands and second.commands[-1] == ["systemctl", "restart", install.UNIT]
        assert plan(text) == []


def test_nothing_is_left_to_the_group_of_the_service(monkeypatch, tmp_path):
    folder, changed = tmp_path / "kubemesh", []
    (folder / "below").mkdir(parents=True)
    for name in ("mesh.json", "below/routes", "dangling"):
        (folder / name).symlink_to("/nowhere") if name == "dangling" else (folder / name).write_text("")
    monkeypatch.setattr(install, "CONFIG_FOLDER", str(folder))
    monkeypatch.setattr(install, "LOCK_FOLDER", str(tmp_path / "none"))
    monkeypatch.setattr(install.os, "lchown", lambda path, uid, gid: changed.append((path, uid, gid)))
    install.disown(os.getgid() + 1)
    assert changed == []
    install.disown(folder.stat().st_gid)
    assert {path for path, dummy, dummy2 in changed} == {str(folder), str(folder / "below"), str(folder / "below/routes"),
                                                         str(folder / "mesh.json"), str(folder / "dangling")}
    assert {rest for dummy, *rest in map(tuple, changed) for rest in [tuple(rest)]} == {(-1, 0)}


def test_an_installation_that_was_interrupted_is_removed(node, library):
    with pytest.raises(Killed):
        install.apply_present(System(0), install.plan_present("{}\n", "token", "/p", False, [], {"start.py": ""}), "token",
                              {"start.py": ""}, True)
    (library / "agent").unlink()
    steps = [step for step in install.plan_absent() if step["op"] != "remove_user"]
    assert {"op": "remove_program", "path": install.LINK} in steps
    install.apply_absent(System(), steps)
    assert not library.exists() and [step for step in install.plan_absent() if step["op"] != "remove_user"] == []


@pytest.mark.parametrize("own", [True, False])
def test_a_user_that_somebody_else_made_stays(node, library, tmp_path, monkeypatch, own):
    """And a token file that was given to the group of one that goes is root's then."""
    token, given, commands = tmp_path / "token of others", [], []
    token.write_text("t")
    config = json.dumps({"token_file": str(token)})
    monkeypatch.setattr(install.os, "lchown", lambda path, uid, gid: given.append((path, uid, gid)))
    if own:
        monkeypatch.setattr(install, "identity", lambda: None)
    assert install.is_own_user() is own
    for path, (text, dummy) in install.wanted_files(config, "/p", False, [], install.is_own_user()).items():
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(text)
    assert os.path.exists(install.USERS_FILE) is own
    monkeypatch.setattr(install, "identity", lambda: (os.getuid(), token.stat().st_gid))
    assert install.is_own_user() is own
    steps = install.plan_absent()
    system = System()
    monkeypatch.setattr(system, "run", commands.append, raising=False)
    install.apply_absent(system, steps)
    assert (["userdel", install.USER] in commands) is own
    assert ((str(token), -1, 0) in given) is own
    assert not os.path.exists(install.USERS_FILE) and not os.path.exists(install.CONFIG_FILE)
    # a second run has nothing to do, and a user that goes is known to be ours to the last
    assert install.plan_absent() == [] and (not own or steps[-1]["path"] == install.USERS_FILE)


def test_program_is_whole_and_needs_nothing_else(library):
    """It runs with the standard library alone, from its own directory, and says what it lacks."""
    files = install.program_files(install.source_of, PROGRAM)
    install.install_program(files)
    done = subprocess.run([sys.executable, "-I", "-S", str(library / "agent" / "start.py"), "/nowhere/agent.json"], capture_output=True,
                          text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 1 and "/nowhere/agent.json is not there; run the playbook enable" in done.stderr
    assert "Traceback" not in done.stderr


def test_program_changes_in_one_step_and_old_ones_go(library):
    files = install.program_files(install.source_of, PROGRAM)
    install.install_program(files)
    first = install.linked()
    assert first == install.folder_of(files) and install.is_complete(first, files)
    changed = dict(files, **{"start.py": files["start.py"] + "# new\n"})
    assert install.folder_of(changed) != first
    install.install_program(changed)
    assert install.linked() == install.folder_of(changed) and not os.path.exists(first)
    assert sorted(os.listdir(library)) == ["agent", os.path.basename(install.folder_of(changed))]


def test_a_damaged_program_is_written_again(library):
    files = install.program_files(install.source_of, PROGRAM)
    install.install_program(files)
    path = os.path.join(install.linked(), "start.py")
    with open(path, "a", encoding="utf-8") as handle:
        handle.write("# somebody was here\n")
    steps = install.plan_present("{}\n", None, "/usr/bin/python3", False, [], files)
    assert {"op": "install_program", "path": install.folder_of(files)} in steps
    install.install_program(files)
    assert install.is_complete(install.linked(), files)


def test_imports():
    source = ("import json\nfrom %s import _mesh, _wg as other\nfrom %s._system import (\n    System,\n)\nfrom ansible.x import y\n"
              "def f():\n    from %s import _late\n" % ((install.PACKAGE,) * 3))
    assert install.imports_of(source) == {"_mesh", "_wg", "_system", "_late"}


def test_digest_tells_names_and_contents_apart():
    assert len({install.digest(files) for files in ({"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "bd"}, {})}) == 5


def test_unit():
    own, root = (install.unit_text("/usr/bin/python3", as_root, ["wg-quick@wgmesh0.service"]) for as_root in (False, True))
    assert "User=kubemesh-agent\n" in own and "AmbientCapabilities=CAP_NET_ADMIN\n" in own and "User=" not in root
    for text in (own, root):
        assert "CapabilityBoundingSet=CAP_NET_ADMIN\n" in text and "NoNewPrivileges=yes\n" in text and "ProtectSystem=strict\n" in text
        # at boot: after the routes of the last run, before pods, and waiting for nothing that may wait for pods
        lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        assert {"kubelet.service", "k3s.service", "rke2-agent.service"} <= set(lines["Before"].split())
        assert lines["After"].split() == ["network.target", "kubemesh-routes.service", "wg-quick@wgmesh0.service"]
        assert not {"Wants", "Requires", "BindsTo"} & set(lines) and int(lines["TimeoutStartSec"]) <= 60
        assert "Type=notify\n" in text and "WatchdogSec=" in text and "MemoryMax=" in text


def test_the_guard_at_boot():
    """It is closed for who joined before there is a network, by the same user, and waits for nothing that comes later."""
    own, root = (install.guard_unit_text("/usr/bin/python3", as_root) for as_root in (False, True))
    assert "User=kubemesh-agent\n" in own and "User=" not in root
    for text in (own, root):
        assert "CapabilityBoundingSet=CAP_NET_ADMIN\n" in text and "ProtectSystem=strict\n" in text
        assert "DefaultDependencies=no\n" in text and "Before=network-pre.target\n" in text and "WantedBy=sysinit.target\n" in text
        assert "kubemesh-guard.service\n" in text and "ConditionPathExists=/etc/kubemesh/guard.nft\n" in text
        assert "start.py --guard /etc/kubemesh/agent.json\n" in text


def test_the_agent_may_read_what_the_guard_was_made_from():
    lines = install.folders_text(False).splitlines()
    assert "z /etc/kubemesh 2755 root kubemesh-agent -" in lines and "z /etc/kubemesh/guard.nft 0640 root kubemesh-agent -" in lines


def test_the_token_is_in_no_step(library, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_text("old-secret\n")
    files = {"start.py": ""}
    steps = install.plan_present("{}\n", "new-secret", "/usr/bin/python3", False, [], files)
    assert {"op": "write_token", "path": str(tmp_path / "token")} in steps
    assert "secret" not in repr(steps)
    assert not [step for step in install.plan_present("{}\n", "old-secret", "/p", False, [], files) if step["op"] == "write_token"]
    assert not [step for step in install.plan_present("{}\n", None, "/p", False, [], files) if step["op"] == "write_token"]


def test_the_program_imports_nothing_that_it_does_not_need(library):
    """It stays in the memory of every node: what only the controller's side needs is imported where that begins."""
    install.install_program(install.program_files(install.source_of, PROGRAM))
    code = "import sys; sys.path.insert(0, %r); import %s; print(sorted({'concurrent.futures', 'logging'} & set(sys.modules)))" % (
        str(library / "agent"), PROGRAM)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "[]\n"


# --- what the service reads, and what it says -----------------------------------------------------------------------------------------

class Told:
    """The state that an agent writes, as it is found at each look, and a clock that goes on while nobody looks."""

    def __init__(self, monkeypatch, tmp_path, *texts):
        self.path, self.texts, self.now, self.looks = tmp_path / "state.json", iter(texts), 0.0, 0
        monkeypatch.setattr(install, "STATE_FILE", str(self.path))
        self.pause(0)

    def pause(self, seconds):
        self.now += seconds
        self.looks += 1
        text = next(self.texts)
        if text is not None:
            state = _agent_plan.state_of(None, text, "", [], None, set(), "", {}, 0)
            self.path.write_text(json.dumps(dict(state, base=None, guard="off")))


def test_the_api_is_waited_for_until_the_agent_watches(monkeypatch, tmp_path):
    told = Told(monkeypatch, tmp_path, None, "not reached yet", "ca_file: /ca cannot be used", "watching", "too late")
    assert install.wait_for_api(lambda: told.now, told.pause) == "watching" and told.looks == 4


@pytest.mark.parametrize("text", ["token_file: /t cannot be read: Permission denied", None])
def test_the_api_is_not_waited_for_without_end(monkeypatch, tmp_path, text):
    told = Told(monkeypatch, tmp_path, *itertools.repeat(text, 1000))
    assert install.wait_for_api(lambda: told.now, told.pause) == text
    assert install.API_SECONDS <= told.now <= install.API_SECONDS + 1
