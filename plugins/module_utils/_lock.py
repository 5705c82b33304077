# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""One run at a time: the lock file of this node. What is in it and what it means is `_lock_plan`'s business.

The file is read, judged and replaced while the directory that it lies in is locked (flock), and replaced by a rename, so that two modules
at the same time see one after the other, and a reader sees a whole file. Nothing is synced to disk: it lies below /run, which is empty
after a reboot, and a reboot is to free the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

DIRECTORY_MODE = 0o700
# Where the node agent is installed, the directory belongs to its group, and with it this file; else to root's.
FILE_MODE = 0o640
# Bytes; a lock file has about one thousand, one with the ids of all runs that it may remember three.
SIZE_MAX = 65536
# Seconds to wait for who has the directory locked. Another module that looks at the file takes milliseconds; the node agent keeps it for
# one turn, which takes seconds where a slow node has to load a large guard, or much is to be put right.
WAIT_SECONDS = 90.0
WAIT_STEP_SECONDS = 0.02
BOOT_ID = "/proc/sys/kernel/random/boot_id"
LOCKS = "/proc/locks"


def node_clock():
    """``{"boot_id", "seconds"}``: seconds since the boot, time of sleep included. Nobody can set this clock."""
    try:
        with open(BOOT_ID, encoding="ascii") as handle:
            boot_id = handle.read().strip()
    except OSError as exc:
        raise MeshError("%s cannot be read: %s; without it a lock cannot be told from one of an earlier boot" % (
            BOOT_ID, exc.strerror)) from None
    return {"boot_id": boot_id, "seconds": time.clock_gettime(time.CLOCK_BOOTTIME)}


def transact(path, request, check_mode, clock=node_clock):
    """Do what ``request`` (`_lock_plan.check_request`) asks for; -> the result. In check mode nothing is written, not even a directory."""
    folder, name = os.path.split(path)
    if not os.path.isabs(path) or not name:
        raise MeshError("path: %s is not the full path of a file" % path)
    with _opened(path, folder, create=not check_mode and request["state"] != "absent") as directory:
        text, age = _read(path, directory, name) if directory is not None else (None, 0)
        after, result = _lock_plan.decide(text, age, request, clock())
        if after != text and not check_mode:
            _replace(path, directory, name, after)
            if after is None:
                # Unless somebody keeps other things there. While it is locked: who waits for that then sees that it is gone.
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
    return result


@contextlib.contextmanager
def turn(path, clock=node_clock):
    """For who is no run, but must not work while one does: while the context lasts, no run can take the lock.

    Yields an empty text, or who is in the way. Modules wait for `WAIT_SECONDS`.
    """
    folder, name = os.path.split(path)
    handle = None
    try:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = _in_the_way(path, handle, name, clock)
        except FileNotFoundError:
            text = ""
        except BlockingIOError:
            text = "a task of a run is at work"
        except OSError as exc:
            text = "%s cannot be read: %s" % (path, exc.strerror)
        yield text
    finally:
        if handle is not None:
            os.close(handle)


def _in_the_way(path, directory, name, clock):
    text, age = _read(path, directory, name)
    holder, dummy, damage = _lock_plan.parse(text, clock())
    if damage:
        # as for a run: it may be the lock of one that lives
        return "the lock file cannot be understood (%s)" % damage if age < _lock_plan.LEASE_DEFAULT else ""
    return "%s runs %s" % (holder["who"], holder["doing"]) if holder is not None and _lock_plan.left_of(holder, clock()) > 0 else ""


def _problem(path, exc):
    if exc.errno in (errno.EACCES, errno.EPERM):
        return MeshError("%s cannot be used: %s; run this task as root (become: true)" % (path, exc.strerror))
    return MeshError("%s cannot be used: %s; check the directory and the room on its file system" % (path, exc.strerror))


@contextlib.contextmanager
def _opened(path, folder, create):
    """The directory, locked against other modules, as a file descriptor; None where there is none and none is to be made."""
    deadline = time.monotonic() + WAIT_SECONDS
    handle = None
    try:
        while handle is None:
            if create:
                # "exists", and then it does not: another module removes it just now
                with contextlib.suppress(FileExistsError):
                    os.makedirs(folder, mode=DIRECTORY_MODE, exist_ok=True)
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                if create:
                    # removed again by another module, which gave a lock back
                    continue
                break
            _lock(handle, deadline, folder)
            if not _is_at(handle, folder):
                os.close(handle)
                handle = None
        if handle is not None:
            _check_directory(folder, os.fstat(handle))
        yield handle
    except OSError as exc:
        raise _problem(path, exc) from None
    finally:
        if handle is not None:
            os.close(handle)


def _is_at(handle, folder):
    """Whether an open directory still is the one at its path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(folder))
    except FileNotFoundError:
        return False


def _lock(handle, deadline, folder):
    """Lock a directory; `MeshError` if others keep it too long."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise MeshError("%s keeps %s locked for more than %d seconds; look at what it does, then run again" % (
                    _holder(handle) or "another process (find it with fuser %s)" % folder, folder, WAIT_SECONDS)) from None
        time.sleep(WAIT_STEP_SECONDS)


def _holder(handle):
    """Who has a file locked, for people: ``process 812 of kubemesh-agent.service``; an empty text where the kernel does not tell.

    Not its command: that could hold what must not be in a result.
    """
    found = os.fstat(handle)
    place = "%02x:%02x:%d" % (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino)
    try:
        with open(LOCKS, encoding="ascii") as locks:
            # 1: FLOCK  ADVISORY  WRITE 812 00:1a:1234 0 EOF; with -> before FLOCK for who waits
            pids = [int(words[4]) for words in map(str.split, locks) if words[1] == "FLOCK" and words[5] == place]
        # the last line is that of systemd, where there are several
        with open("/proc/%d/cgroup" % pids[0], encoding="utf-8", errors="replace") as groups:
            group = groups.read().rstrip("\n").rpartition("/")[2]
    except (OSError, ValueError, IndexError):
        return ""
    return "process %d%s" % (pids[0], " of %s" % group if re.fullmatch(r"[A-Za-z0-9:@_.\\-]+\.(service|scope)", group) else "")


def _check_directory(folder, found):
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise MeshError("%s is no place for a lock: others can replace files in it; give it to root alone (chown root:root %s; "
                        "chmod go-w %s)" % (folder, folder, folder))


def _read(path, directory, name):
    """``(text or None, seconds since it was written)``."""
    try:
        # O_NONBLOCK: a FIFO must not make a run wait for its writer
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None, 0
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise MeshError("%s is a symbolic link, not a lock file; remove it" % path) from None
        raise
    with os.fdopen(handle, "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise MeshError("%s is not a lock file but something else; remove it" % path)
        # The one clock that can be set; it only counts for a file that cannot be understood. One from the future is as new as can be.
        age = max(0.0, time.time() - found.st_mtime)
        return stream.read(SIZE_MAX).decode("utf-8", "replace"), age


def _replace(path, directory, name, text):
    """Put another text in the place of the file, or nothing, in one step."""
    # One fixed name: while the directory is locked, a file of this name can only be what a killed module left.
    temporary = ".%s.new" % name
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)
    if text is None:
        os.unlink(name, dir_fd=directory)
        return
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE, dir_fd=directory)
    with os.fdopen(handle, "wb") as stream:
        os.fchmod(stream.fileno(), FILE_MODE)
        stream.write(text.encode("utf-8"))
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
