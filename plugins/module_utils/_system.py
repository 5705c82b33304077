# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The few ways in which modules touch a node: commands, iproute2 as JSON, sysctl, files, systemd.

Thin on purpose: nothing here decides anything. Commands are lists, run in the C locale, never through a shell.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, load_document

FAMILY_OPTION = {"ipv4": "-4", "ipv6": "-6"}


class System:
    """Commands and files of one node. ``module``: an AnsibleModule (only ``run_command`` and ``get_bin_path`` are used)."""

    def __init__(self, module):
        self.module = module
        self.paths = {}

    def path(self, name):
        """Full path of a tool, or None. /sbin is looked at as well: it is not in every login's PATH."""
        if name not in self.paths:
            self.paths[name] = self.module.get_bin_path(name, opt_dirs=["/usr/sbin", "/sbin", "/usr/local/sbin"])
        return self.paths[name]

    def try_run(self, argv, data=None):
        """(rc, stdout, stderr) of a command; rc 127 where the tool is missing."""
        path = self.path(argv[0])
        if path is None:
            return 127, "", "%s: command not found" % argv[0]
        return self.module.run_command([path] + list(argv[1:]), data=data, environ_update={"LC_ALL": "C", "LANG": "C"})

    def run(self, argv, data=None):
        """stdout of a command that must work; raises MeshError with the command and what it said."""
        rc, out, err = self.try_run(argv, data)
        if rc == 127 and self.path(argv[0]) is None:
            raise MeshError("%s is not installed on this node; install it (packages iproute2, wireguard-tools, systemd)" % argv[0])
        if rc != 0:
            raise MeshError("%s failed with code %d: %s" % (" ".join(argv), rc, (err or out).strip()))
        return out

    # --- iproute2 --------------------------------------------------------------------------------------------------------------------

    def ip_json(self, argv, missing=()):
        """What ``ip -j -N`` says, parsed. Texts in ``missing`` in an error mean that the thing is not there: an empty list."""
        rc, out, err = self.try_run(["ip", "-j", "-N"] + list(argv))
        if rc != 0:
            if any(text in err for text in missing):
                return []
            raise MeshError("ip %s failed with code %d: %s" % (" ".join(argv), rc, err.strip()))
        try:
            # iproute2 prints "[" and nothing else for some empty answers.
            return [item for item in json.loads(out.strip() or "[]") if item] if out.strip() not in ("", "[") else []
        except ValueError as exc:
            raise MeshError("ip %s printed no JSON (%s); iproute2 4.18 or newer is needed" % (" ".join(argv), exc)) from None

    def ip_batch(self, family, lines):
        """Run lines as one ``ip -batch``, which stops at the first that fails."""
        if lines:
            self.run(["ip", FAMILY_OPTION[family], "-batch", "-"], data="".join(line + "\n" for line in lines))

    def ip_detached(self, family, lines):
        """Run lines as one ``ip -batch`` that goes on after a line that fails, and when this process or its terminal goes.

        A file, because a pipe ends with who writes to it; a session of its own, because the end of a connection ends all of its session.
        """
        with tempfile.NamedTemporaryFile("w", prefix="kubemesh-", encoding="utf-8") as batch:
            batch.write("".join(line + "\n" for line in lines))
            batch.flush()
            argv = ["ip", FAMILY_OPTION[family], "-force", "-batch", batch.name]
            # setsid(1) does not fork where it need not, so it is waited for.
            self.try_run((["setsid", self.path("ip") or "ip"] + argv[1:]) if self.path("setsid") else argv)

    def ip_answers(self, family, lines):
        """stdout of many ``ip`` queries in one process; a query that fails gives no line."""
        if not lines:
            # Without input of its own ``ip -batch -`` would wait for that of the terminal, where ssh gave the module one.
            return ""
        data = "".join(line + "\n" for line in lines)
        return self.try_run(["ip", FAMILY_OPTION[family], "-o", "-force", "-batch", "-"], data=data)[1]

    def link(self, name):
        """One object of ``ip -d link show``, or None."""
        found = self.ip_json(["-d", "link", "show", "dev", name], missing=("does not exist", "Cannot find device"))
        return found[0] if found else None

    def addresses(self, name):
        """Addresses of a device with length, as canonical text."""
        found = self.ip_json(["addr", "show", "dev", name], missing=("does not exist", "Cannot find device"))
        return ["%s/%d" % (item["local"], item["prefixlen"]) for link in found for item in link.get("addr_info", []) if "local" in item]

    # --- systemd ---------------------------------------------------------------------------------------------------------------------

    def unit(self, name):
        """{"enabled": bool, "active": bool, "exists": bool} of a unit."""
        dummy, out, dummy2 = self.try_run(["systemctl", "show", "--property=LoadState,ActiveState,UnitFileState", name])
        found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
        return {
            "exists": found.get("LoadState") == "loaded",
            "active": found.get("ActiveState") in ("active", "reloading", "activating"),
            "enabled": found.get("UnitFileState", "").startswith("enabled"),
        }


# --- files ---------------------------------------------------------------------------------------------------------------------------

def read_text(path):
    """Content of a text file, or None when there is none."""
    try:
        with open(path, "rb") as handle:
            return handle.read().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        # The last of a file in /proc whose process ended after it was opened.
        return None
    except OSError as exc:
        raise MeshError("%s cannot be read: %s" % (path, exc)) from None


def read_document(path):
    """The mesh document of a file on this node."""
    text = read_text(path)
    if text is None:
        raise MeshError("document_file: %s is not there; run the exchange of keys first (playbook kubemesh.wireguard.enable)" % path)
    return load_document(text)


def file_mode(path):
    """Permission bits of a file, or None when there is none."""
    try:
        return stat.S_IMODE(os.lstat(path).st_mode)
    except OSError:
        return None


def plan_files(wanted):
    """Steps that bring files to their wanted content: {path: (text or None for no file, mode)} against what is on disk.

    Returns [{"op": "write_file", "path", "mode", "before": text or None, "after": text} | {"op": "remove_file", "path", "before"}].
    """
    steps = []
    for path in sorted(wanted):
        text, mode = wanted[path]
        before = read_text(path)
        if text is None:
            if before is not None:
                steps.append({"op": "remove_file", "path": path, "before": before})
        elif before != text or file_mode(path) != mode:
            steps.append({"op": "write_file", "path": path, "mode": mode, "before": before, "after": text})
    return steps


def apply_file_step(step):
    """Carry out one step of `plan_files`."""
    if step["op"] == "remove_file":
        remove_file(step["path"])
    else:
        write_text(step["path"], step["after"], step["mode"])


def write_text(path, text, mode):
    """Write a whole file or nothing: a temporary file in the same directory, synced, renamed over the old one."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path), dir=folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(text.encode("utf-8"))
                os.fchmod(stream.fileno(), mode)
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(folder)
    except OSError as exc:
        raise MeshError("%s cannot be written: %s; what was there before is untouched" % (path, exc)) from None


def sync_folder(folder):
    """Make a rename in a directory survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_file(path):
    """Remove a file, and its directory when that is ours and empty."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise MeshError("%s cannot be removed: %s" % (path, exc)) from None


def remove_empty_folders(paths):
    """Remove directories of ours that hold nothing any more."""
    for path in paths:
        try:
            os.rmdir(path)
        except OSError:
            continue


# --- sysctl --------------------------------------------------------------------------------------------------------------------------

def sysctl_path(name):
    """/proc/sys path of a sysctl; a slash separates, so that device names with dots work."""
    return "/proc/sys/" + name


def read_sysctl(name):
    """Value of a sysctl as text, or None where the kernel has none."""
    try:
        with open(sysctl_path(name), encoding="ascii") as handle:
            return handle.read().strip()
    except OSError:
        return None


def write_sysctl(name, value):
    """Set a sysctl; raises MeshError where that is refused."""
    try:
        with open(sysctl_path(name), "w", encoding="ascii") as handle:
            handle.write(value)
    except OSError as exc:
        raise MeshError("sysctl %s=%s was refused: %s" % (name, value, exc)) from None
