# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""What the node agent consists of on a node: its program, unit, user, directories. Texts are pure; reading and doing are at the end.

The program is the module_utils of this collection, the same files that modules run with, in a directory of their own that is named for
their content. A symbolic link says which one counts, and is replaced in one step.
"""

from __future__ import annotations

import ast
import compileall
import hashlib
import importlib.util
import json
import os
import re
import shutil
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_inputs import TOKEN_FILE, USER, identity
from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_plan import WATCHING, parse_state
from ansible_collections.kubemesh.wireguard.plugins.module_utils._guard import GUARD_FILE, MODE_GUARD
from ansible_collections.kubemesh.wireguard.plugins.module_utils._guard import GUARD_UNIT as RUN_GUARD_UNIT
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._persist import POD_STARTERS
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import (
    apply_file_step,
    plan_files,
    read_text,
    remove_empty_folders,
    remove_file,
    write_text,
)

PACKAGE = "ansible_collections.kubemesh.wireguard.plugins.module_utils"
UNIT = "kubemesh-agent.service"
UNIT_FILE = "/etc/systemd/system/" + UNIT
GUARD_UNIT = "kubemesh-agent-guard.service"
GUARD_UNIT_FILE = "/etc/systemd/system/" + GUARD_UNIT
# Not in /etc/sysusers.d, which not every distribution has: an empty directory would be left.
USERS_FILE = "/etc/kubemesh/agent-user.sysusers"
FOLDERS_FILE = "/etc/tmpfiles.d/kubemesh-agent.conf"
CONFIG_FOLDER = "/etc/kubemesh"
CONFIG_FOLDER_MODE = 0o755
CONFIG_FILE = "/etc/kubemesh/agent.json"
TOKEN_MODE = 0o640
LIBRARY = "/usr/local/lib/kubemesh"
LINK = LIBRARY + "/agent"
# Is there from the first change of an installation to the end of its restart. Below a directory that outlives a reboot.
UNFINISHED = LIBRARY + "/agent.unfinished"
LOCK_FOLDER = "/run/kubemesh"
RUNTIME = LOCK_FOLDER + "/agent"
STATE = "/var/lib/kubemesh-agent"
METRICS_FILE = STATE + "/metrics/kubemesh.prom"
STATE_FILE = RUNTIME + "/state.json"
MEMORY_FILE = STATE + "/memory.json"

# Seconds that a service that was started is given to reach the API: a connection and a list take one or two, and a failure is tried again
# after less than one.
API_SECONDS = 10.0
# Seconds between two looks at what it says
API_INTERVAL = 0.2

HEADER = "# Written by kubemesh.wireguard. Changes made here are lost.\n"

START = HEADER + '''\
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

from %s import main

sys.exit(main(sys.argv[1:]))
'''


# What neither service of the agent needs.
CONFINED = """\
ProtectSystem=strict
ProtectHome=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
"""


# --- texts -----------------------------------------------------------------------------------------------------------------------------

def users_text():
    """The agent's user, for systemd-sysusers."""
    return HEADER + 'u %s - "Agent of the WireGuard mesh" - -\n' % USER


def folders_text(as_root):
    """Directories below /run and what the agent reads of the runs, for systemd-tmpfiles.

    ``as_root``: see `unit_text`; a root without capabilities writes only to what is its own.

    The agent reads the lock of the playbooks' runs, and others must not: who can open that directory can keep it locked. It also reads
    what the guard was made from. New files in both directories get their group.
    """
    owner = "root" if as_root else USER
    return HEADER + "".join(line + "\n" for line in (
        "d %s 2750 root %s -" % (LOCK_FOLDER, USER), "d %s 0755 %s %s -" % (RUNTIME, owner, owner),
        "z %s 2755 root %s -" % (CONFIG_FOLDER, USER), "z %s %04o root %s -" % (GUARD_FILE, MODE_GUARD, USER)))


def unit_text(python, as_root, devices):
    """The service. ``devices``: units that make the device at boot.

    ``as_root``: the device is a userspace implementation's, whose control socket belongs to root; the one capability is the same then.

    Pods are started after it: until then, who joined since the last run has neither peer nor route. It is ready without the API, which may
    be a pod of this node. It wants nothing that comes after those that start pods, so that no circle arises.
    """
    return HEADER + f"""\
[Unit]
Description=Keeps the WireGuard mesh of this node up to the cluster's list of nodes
Documentation=https://galaxy.ansible.com/ui/repo/published/kubemesh/wireguard/
After=network.target kubemesh-routes.service {" ".join(devices)}
Before={POD_STARTERS}
ConditionPathExists={CONFIG_FILE}

[Service]
Type=notify
NotifyAccess=main
ExecStartPre=+/usr/bin/env systemd-tmpfiles --create {FOLDERS_FILE}
ExecStart={python} -I -S {LINK}/start.py {CONFIG_FILE}
{user_text(as_root)}Restart=always
RestartSec=5
# Another agent is at work: this one must not take turns with it.
RestartPreventExitStatus=3
# It is ready within seconds. Whatever happens to it, pods are not kept waiting longer.
TimeoutStartSec=60
WatchdogSec=120
# What it did stays: the mesh outlives its manager.
KillMode=mixed
MemoryMax=256M
TasksMax=64
UMask=0022
StateDirectory=kubemesh-agent
ReadWritePaths=-{RUNTIME}
PrivateTmp=yes
{CONFINED}
[Install]
WantedBy=multi-user.target
"""


def user_text(as_root):
    """Who a service is, see `unit_text`."""
    user = "" if as_root else "User=%s\nGroup=%s\nAmbientCapabilities=CAP_NET_ADMIN\n" % (USER, USER)
    return user + "CapabilityBoundingSet=CAP_NET_ADMIN\nNoNewPrivileges=yes\n"


def guard_unit_text(python, as_root):
    """The service that brings the guard up to what the agent knew, at boot: after the guard of the last run, before there is a network.

    The agent itself comes later, and until then a node that joined since that run would be reached in clear.
    """
    return HEADER + f"""\
[Unit]
Description=Guard of the WireGuard mesh: nodes that joined since the last run
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target
After=local-fs.target systemd-sysusers.service {RUN_GUARD_UNIT}
RequiresMountsFor={STATE} {LIBRARY}
ConditionPathExists={GUARD_FILE}
ConditionPathExists={MEMORY_FILE}

[Service]
Type=oneshot
ExecStart={python} -I -S {LINK}/start.py --guard {CONFIG_FILE}
TimeoutStartSec=60
{user_text(as_root)}{CONFINED}
[Install]
WantedBy=sysinit.target
"""


def imports_of(source):
    """Names of the module_utils of this collection that a source imports."""
    found = set()
    for statement in ast.walk(ast.parse(source)):
        if isinstance(statement, ast.ImportFrom) and statement.level == 0:
            if statement.module == PACKAGE:
                found |= {alias.name for alias in statement.names}
            elif statement.module and statement.module.startswith(PACKAGE + "."):
                found.add(statement.module[len(PACKAGE) + 1:])
    return found


def program_files(source_of, program):
    """``{path in the program's directory: text}``. ``source_of(name)``: the source of a module_util; ``program``: full name of the one
    with the main program."""
    files, waiting = {"start.py": START % program}, {program.rpartition(".")[2]}
    names = set()
    while waiting:
        name = waiting.pop()
        names.add(name)
        source = source_of(name)
        files["%s/%s.py" % (PACKAGE.replace(".", "/"), name)] = source
        waiting |= imports_of(source) - names
    return files


def digest(files):
    """Twelve hexadecimal digits that stand for the content of files."""
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(("%s\0%d\0" % (path, len(files[path]))).encode("utf-8"))
        found.update(files[path].encode("utf-8"))
    return found.hexdigest()[:12]


# --- the node --------------------------------------------------------------------------------------------------------------------------

def source_of(name):
    """The source of a module_util as this program was given it: a file, or a member of the archive that Ansible made."""
    full = "%s.%s" % (PACKAGE, name)
    found = importlib.util.find_spec(full)
    source = found.loader.get_source(full) if found is not None else None
    if source is None:
        raise MeshError("the source of %s is not there: is this collection complete?" % full)
    # The collection loader of ansible-core, that has it where this is no module (a unit test), returns bytes.
    return source.decode("utf-8") if isinstance(source, bytes) else source


def is_complete(folder, files):
    """Whether a directory holds exactly these files' contents."""
    return all(read_text(os.path.join(folder, path)) == text for path, text in files.items())


def folder_of(files):
    """The directory that the program of these files lies in."""
    return "%s-%s" % (LINK, digest(files))


def install_program(files):
    """Write the program, byte-compile it (the agent cannot), and make the link point to it; older ones go."""
    folder = folder_of(files)
    if not is_complete(folder, files):
        for path, text in files.items():
            write_text(os.path.join(folder, path), text, 0o644)
    compileall.compile_dir(folder, quiet=1)
    temporary = LINK + ".new"
    try:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        os.symlink(os.path.basename(folder), temporary)
        os.replace(temporary, LINK)
    except OSError as exc:
        raise MeshError("%s cannot be replaced: %s" % (LINK, exc.strerror)) from None
    remove_programs(folder)


def remove_programs(keep=None):
    """Remove the directories of programs, but for one."""
    try:
        names = os.listdir(LIBRARY)
    except OSError:
        return
    for name in names:
        if re.fullmatch(r"agent-[0-9a-f]{12}", name) and os.path.join(LIBRARY, name) != keep:
            shutil.rmtree(os.path.join(LIBRARY, name), ignore_errors=True)


def linked():
    """Where the link points to, an empty text where there is none."""
    try:
        return os.path.join(LIBRARY, os.readlink(LINK))
    except OSError:
        return ""


def wait_for_api(clock=time.monotonic, pause=time.sleep):
    """What the service that was started says of the API: as soon as it watches it, or last; None where it says nothing.

    It is what this start says: the agent writes its state before systemd takes it for ready.
    """
    deadline = clock() + API_SECONDS
    while True:
        state = parse_state(read_text(STATE_FILE) or "")
        if (state is not None and state["api"] == WATCHING) or clock() >= deadline:
            return state["api"] if state is not None else None
        pause(API_INTERVAL)


def is_own_user():
    """Whether the agent's user is not there yet, or was made by an earlier run: one that somebody else made is theirs to remove."""
    return identity() is None or os.path.lexists(USERS_FILE)


def wanted_files(config_text, python, as_root, devices, own_user):
    """``{path: (text, mode)}`` of everything but program and token."""
    users = {USERS_FILE: (users_text(), 0o644)} if own_user else {}
    return {
        CONFIG_FILE: (config_text, 0o644),
        UNIT_FILE: (unit_text(python, as_root, devices), 0o644),
        GUARD_UNIT_FILE: (guard_unit_text(python, as_root), 0o644),
        FOLDERS_FILE: (folders_text(as_root), 0o644),
        **users,
    }


def plan_present(config_text, token, python, as_root, devices, files):
    """Steps to an installed agent. ``token``: text, or None to leave the one that is there alone."""
    steps = plan_files(wanted_files(config_text, python, as_root, devices, is_own_user()))
    if linked() != folder_of(files) or not is_complete(folder_of(files), files):
        steps.append({"op": "install_program", "path": folder_of(files)})
    if token is not None and read_text(TOKEN_FILE) != token + "\n":
        # neither the old one nor the new one is in a step: steps are printed
        steps.append({"op": "write_token", "path": TOKEN_FILE})
    if os.path.lexists(UNFINISHED):
        # the files may all be there, and what runs be what ran before them
        steps.append({"op": "finish_installation", "path": UNFINISHED})
    return steps


def plan_absent():
    """Steps to a node without agent. Its user stays where somebody else made it."""
    given = token_file_of(read_text(CONFIG_FILE) or "")
    steps = plan_files(dict.fromkeys((CONFIG_FILE, UNIT_FILE, GUARD_UNIT_FILE, FOLDERS_FILE), (None, 0o644)))
    if os.path.lexists(LINK) or os.path.lexists(UNFINISHED):
        steps.append({"op": "remove_program", "path": LINK})
    if os.path.lexists(TOKEN_FILE):
        steps.append({"op": "remove_token", "path": TOKEN_FILE})
    for path in (STATE, RUNTIME):
        if os.path.isdir(path):
            steps.append({"op": "remove_folder", "path": path})
    if identity() is not None and os.path.lexists(USERS_FILE):
        steps.append({"op": "remove_user", "path": USER, "token_file": given})
    elif identity() is not None and steps:
        steps.append({"op": "leave_user", "path": USER})
    # Last: by this file it is known whose the user is.
    return steps + plan_files({USERS_FILE: (None, 0o644)})


def token_file_of(config):
    """The token file that somebody else keeps, of the text of a configuration; None where there is none."""
    try:
        path = json.loads(config)["token_file"]
    except (ValueError, KeyError, TypeError):
        return None
    return path if isinstance(path, str) and path != TOKEN_FILE else None


def apply_present(system, steps, token, files, restart):
    """Carry out steps of `plan_present`; the unit is started (again) last, so that nothing runs half installed.

    A run that dies in between leaves a mark, by which the next one knows that there is more to do than files tell.
    """
    paths = {step["path"] for step in steps}
    write_text(UNFINISHED, HEADER, 0o644)
    for step in steps:
        if step["op"] in ("write_file", "remove_file"):
            apply_file_step(step)
        elif step["op"] == "install_program":
            install_program(files)
    if identity() is None:
        system.run(["systemd-sysusers", USERS_FILE])
    owner = identity()
    if owner is None:
        raise MeshError("the user %s could not be made; make it, or look what systemd-sysusers says" % USER)
    if TOKEN_FILE in paths:
        write_text(TOKEN_FILE, token + "\n", 0o600)
    if os.path.exists(TOKEN_FILE):
        os.chown(TOKEN_FILE, 0, owner[1])
        os.chmod(TOKEN_FILE, TOKEN_MODE)
    system.run(["systemd-tmpfiles", "--create", FOLDERS_FILE])
    if paths & {UNIT_FILE, GUARD_UNIT_FILE, UNFINISHED}:
        system.run(["systemctl", "daemon-reload"])
    system.run(["systemctl", "enable", UNIT, GUARD_UNIT])
    system.run(["systemctl", "restart" if restart else "start", UNIT])
    remove_file(UNFINISHED)


def disown(gid, others=()):
    """Give what belongs to the group of the service to root's: its number may be another's one day.

    That is what is below the folders of the mesh, as the folder of the configuration hands its group to what is made in it, so that the
    service can read it; and files of ``others``.
    """
    paths = [path for path in others if path]
    for folder in (CONFIG_FOLDER, LOCK_FOLDER):
        for place, dummy, names in os.walk(folder):
            paths += [place] + [os.path.join(place, name) for name in names]
    for path in paths:
        try:
            if os.lstat(path).st_gid == gid:
                os.lchown(path, -1, 0)
        except FileNotFoundError:
            pass  # a run of another playbook has taken it away


def apply_absent(system, steps):
    """Carry out steps of `plan_absent`: the service first. What it did in the kernel stays."""
    if os.path.exists(UNIT_FILE):
        system.run(["systemctl", "disable", "--now", UNIT])
    if os.path.exists(GUARD_UNIT_FILE):
        system.run(["systemctl", "disable", GUARD_UNIT])
    for step in steps:
        if step["op"] == "remove_file":
            apply_file_step(step)
        elif step["op"] == "remove_program":
            for path in (LINK, UNFINISHED):
                remove_file(path)
            remove_programs()
            remove_empty_folders([LIBRARY])
        elif step["op"] == "remove_token":
            os.unlink(TOKEN_FILE)
        elif step["op"] == "remove_folder":
            shutil.rmtree(step["path"], ignore_errors=True)
        elif step["op"] in ("remove_user", "leave_user"):
            disown(identity()[1], [step.get("token_file")])
            if os.path.isdir(LOCK_FOLDER):
                os.chown(LOCK_FOLDER, 0, 0)
                os.chmod(LOCK_FOLDER, 0o700)
            if os.path.isdir(CONFIG_FOLDER):
                os.chown(CONFIG_FOLDER, 0, 0)
                os.chmod(CONFIG_FOLDER, CONFIG_FOLDER_MODE)
            if os.path.exists(GUARD_FILE):
                os.chown(GUARD_FILE, 0, 0)
            if step["op"] == "remove_user":
                system.run(["userdel", USER])
    system.run(["systemctl", "daemon-reload"])
    remove_empty_folders([CONFIG_FOLDER, LOCK_FOLDER])
