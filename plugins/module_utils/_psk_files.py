# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Preshared keys on a node: one root-only file for each peer in a root-only directory of its own. What they mean is `_psk`'s business.

A file is written beside its place, synced and renamed, so that a reader finds the old key or the new one, whole, also after a power cut.
What is taken away is overwritten first, as far as that can be done from here, see ``_keys.remove``. Files that are not ours are left alone.
Errors never contain anything of the content of a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys, _psk
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
# Bytes that are read or overwritten at most; a key has 45 with its newline.
SIZE_MAX = 256
WAIT_SECONDS = 10.0
WAIT_STEP_SECONDS = 0.05
# Up to here each new file is synced for itself. Beyond, one sync of everything takes less than thousands of single ones, and stalls what
# else writes on this disk (etcd) once and not thousands of times.
SYNC_ONE_BY_ONE = 64


def _wrong(path, what):
    return MeshError("%s is no place for preshared keys: %s; move it away, then run again" % (path, what))


def _refused(path, exc):
    if exc.errno in (errno.EACCES, errno.EPERM):
        return MeshError("%s: %s; run this task as root (become: true)" % (path, exc.strerror))
    return MeshError("%s: %s; check the file system" % (path, exc.strerror))


class Folder:
    """The directory with the preshared keys of one device, open and locked against other runs. Use as a context manager.

    ``create``: make it if it is missing; else it is as if it were empty.
    """

    def __init__(self, path, create=False):
        self.path, self._create, self._handle = path, create, None

    def __enter__(self):
        try:
            if self._create:
                _keys.make_directory(self.path)
            with contextlib.suppress(FileNotFoundError):
                self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if self._handle is not None:
                self._check()
                self._lock()
        except OSError as exc:
            self.__exit__()
            if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST):
                raise _wrong(self.path, "it is not a directory") from None
            raise _refused(self.path, exc) from None
        except MeshError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _check(self):
        found = os.fstat(self._handle)
        if found.st_uid not in (0, os.geteuid()):
            raise _wrong(self.path, "it belongs to user id %d, who could replace the keys" % found.st_uid)
        if found.st_mode & 0o022:
            raise _wrong(self.path, "others may write in it (mode %04o)" % stat.S_IMODE(found.st_mode))

    def _lock(self):
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MeshError("another process keeps %s locked for more than %d seconds; find it with fuser %s, then run again" % (
                        self.path, WAIT_SECONDS, self.path)) from None
            time.sleep(WAIT_STEP_SECONDS)

    @property
    def exists(self):
        return self._handle is not None

    def loose(self):
        """Whether others may look into the directory."""
        return self.exists and bool(os.fstat(self._handle).st_mode & 0o777 & ~DIRECTORY_MODE)

    def public_keys(self):
        """The peers that have a file here, whatever is in it."""
        if not self.exists:
            return []
        try:
            names = os.listdir(self._handle)
        except OSError as exc:
            raise _refused(self.path, exc) from None
        return sorted(filter(None, map(_psk.public_key_of, names)))

    def read(self, public_key):
        """``(key as bytearray or None, whether others can use the file)``. None: there is no sound key in it."""
        name = _psk.file_name(public_key)
        handle = self._open(name, os.O_RDONLY)
        if handle is None:
            return None, False
        content = bytearray(SIZE_MAX)
        try:
            found = os.fstat(handle)
            size = os.readv(handle, [content])
            # What somebody else owns may be known to them, whatever its mode is now.
            key = _psk.decode(bytes(content[:size])) if found.st_uid == os.geteuid() and size < SIZE_MAX else None
            return key, bool(stat.S_IMODE(found.st_mode) & ~FILE_MODE)
        except OSError as exc:
            raise _refused(os.path.join(self.path, name), exc) from None
        finally:
            os.close(handle)
            content[:] = bytes(SIZE_MAX)

    def _open(self, name, flags):
        try:
            # O_NONBLOCK: a FIFO must not make a run wait for its writer
            handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._handle)
        except FileNotFoundError:
            return None
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _wrong(os.path.join(self.path, name), "it is not a file") from None
            raise _refused(os.path.join(self.path, name), exc) from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _wrong(os.path.join(self.path, name), "it is not a file")
        return handle

    def tighten(self, public_keys=()):
        """Take from others what they may do with the directory and with files."""
        try:
            os.fchmod(self._handle, DIRECTORY_MODE)
            for public_key in public_keys:
                os.chmod(_psk.file_name(public_key), FILE_MODE, dir_fd=self._handle)
        except OSError as exc:
            raise _refused(self.path, exc) from None

    def write(self, keys):
        """Put keys, ``{public key: text of the preshared key}``, in their places; on disk when this returns."""
        try:
            for public_key in sorted(keys):
                self._write_beside(public_key, keys[public_key], sync=len(keys) <= SYNC_ONE_BY_ONE)
            if len(keys) > SYNC_ONE_BY_ONE:
                os.sync()
            for public_key in sorted(keys):
                name = _psk.file_name(public_key)
                # the descriptor keeps hold of the old file, so that its blocks can be overwritten once it is no longer the key
                old = self._open(name, os.O_WRONLY)
                try:
                    os.rename(_beside(name), name, src_dir_fd=self._handle, dst_dir_fd=self._handle)
                    if old is not None:
                        _overwrite(old, names=0)
                finally:
                    if old is not None:
                        os.close(old)
            if keys:
                os.fsync(self._handle)
        except OSError as exc:
            raise _refused(self.path, exc) from None

    def _write_beside(self, public_key, text, sync):
        name = _beside(_psk.file_name(public_key))
        # of a run that was killed
        self._wipe(name)
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE, dir_fd=self._handle)
        try:
            os.fchmod(handle, FILE_MODE)
            os.write(handle, (text.strip() + "\n").encode("ascii"))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, public_keys):
        """Overwrite the files of peers, then remove them."""
        try:
            for public_key in public_keys:
                self._wipe(_psk.file_name(public_key))
            if public_keys:
                os.fsync(self._handle)
        except OSError as exc:
            raise _refused(self.path, exc) from None

    def leftovers(self):
        """Names of files that a killed run left."""
        if not self.exists:
            return []
        return sorted(name for name in os.listdir(self._handle)
                      if name[:1] == "." and name[-4:] == ".new" and _psk.public_key_of(name[1:-4]))

    def foreign(self):
        """Whether there is something that is not ours."""
        ours = {_psk.file_name(public_key) for public_key in self.public_keys()} | set(self.leftovers())
        return self.exists and not ours.issuperset(os.listdir(self._handle))

    def clean(self):
        """Remove what a killed run left."""
        for name in self.leftovers():
            self._wipe(name)

    def remove_directory(self):
        """Remove the directory, which must be empty."""
        try:
            os.rmdir(self.path)
        except OSError as exc:
            raise _refused(self.path, exc) from None

    def _wipe(self, name):
        handle = self._open(name, os.O_WRONLY)
        if handle is None:
            return
        try:
            # not the other name of a file that has two: that one is still in use
            _overwrite(handle, names=1)
        finally:
            os.close(handle)
        os.unlink(name, dir_fd=self._handle)


def _beside(name):
    return ".%s.new" % name


def _overwrite(handle, names):
    """Overwrite a file unless it has more than ``names`` names in the file system."""
    found = os.fstat(handle)
    if found.st_nlink > names:
        return
    os.lseek(handle, 0, os.SEEK_SET)
    # bounded: a key file is small, and what is much bigger is not ours to fill
    os.write(handle, os.urandom(min(found.st_size, SIZE_MAX)))
    os.fsync(handle)


def missing(folder, public_keys):
    """Those of the public keys that have no sound preshared key in the directory, sorted; for the code that programs a device."""
    with Folder(folder) as there:
        if not there.exists:
            return sorted(public_keys)
        found = []
        for public_key in sorted(public_keys):
            key = there.read(public_key)[0]
            if key is None:
                found.append(public_key)
            else:
                key[:] = bytes(len(key))
        return found
