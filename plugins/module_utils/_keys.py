# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""Private key files: the only code that sees a private key.

A key file is what ``wg genkey`` prints: 44 characters of base64, a newline; 32 bytes, clamped as RFC 7748, section 5 has it.
It belongs to the user this runs as (root) and nobody else may read it. What is there is never overwritten unasked, and a file that is
not a sound key is never overwritten at all: on a node of a mesh it may be a key that others still send to, and whoever put it there
knows more than we do.

Errors are ``MeshError``; they never contain anything of the content of a key file.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import os
import stat
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

# bytes of a Curve25519 key: RFC 7748, section 5
KEY_BYTES = 32
# characters of its base64 text: wireguard-tools, src/encoding.h, WG_KEY_LEN_BASE64 less the terminating zero
KEY_CHARACTERS = 44
# bytes that are read of a key file at most: a key, and room for a few blank lines, so that a big file is noticed and not read
READ_LIMIT = 256
FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
# seconds to wait for another run that holds the lock; writing a key takes milliseconds, so longer means that it hangs
LOCK_SECONDS = 10.0
LOCK_STEP_SECONDS = 0.05


def clamp(raw):
    """32 bytes -> the 32 bytes that X25519 uses as a scalar (RFC 7748, section 5, decodeScalar25519), as bytearray."""
    if len(raw) != KEY_BYTES:
        raise MeshError("a private key has %d bytes, not %d" % (KEY_BYTES, len(raw)))
    scalar = bytearray(raw)
    scalar[0] &= 248
    scalar[31] &= 127
    scalar[31] |= 64
    return scalar


def generate_private_key(random_bytes=os.urandom):
    """-> a new private key, bytearray of 32 clamped bytes; ``random_bytes`` is for tests."""
    return clamp(random_bytes(KEY_BYTES))


def encode_key(raw):
    """32 bytes -> the 44 characters of base64 that WireGuard's tools read and print."""
    return base64.b64encode(bytes(raw)).decode("ascii")


def decode_private_key(content, path):
    """The bytes of a key file -> bytearray of 32 bytes; ``path`` is for the message.

    As strict as wg(8) reading a key file (wireguard-tools, src/config.c, parse_keyfile, and src/encoding.c, key_from_base64): 44
    characters, canonical padding, and after them nothing but white space. An unclamped key is accepted: kernel and tools clamp it
    themselves, the public key is the same.
    """
    text = bytes(content).rstrip()
    if not text:
        raise _damaged(path, "it is empty")
    if len(text) != KEY_CHARACTERS:
        raise _damaged(path, "a key has %d characters, this has %s" % (
            KEY_CHARACTERS, "more than %d" % KEY_CHARACTERS if len(text) > KEY_CHARACTERS else "%d" % len(text)))
    try:
        raw = bytearray(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        # "from None": the message of the decoder may quote characters of the key
        raise _damaged(path, "it is not base64") from None
    if len(raw) != KEY_BYTES or base64.b64encode(raw) != text:
        raise _damaged(path, "it is not the base64 text of %d bytes" % KEY_BYTES)
    if not any(raw):
        raise _damaged(path, "all its bytes are zero, which WireGuard takes for no key")
    return raw


def public_key_of(raw, run_command, wg_path=None):
    """32 bytes of a private key -> its public key as text.

    With ``cryptography`` where that works, else with ``wg pubkey``, which gets the key on stdin, so that it is in no argument list.
    ``run_command(args, data=...)`` is that of AnsibleModule. There is no third way in pure Python: the ladder cannot be made to take the
    same time for every key there, and every supported node has ``wg``.
    """
    public = _public_by_cryptography(raw)
    if public is None:
        public = _public_by_wg(raw, run_command, wg_path)
    return public


def _public_by_cryptography(raw):
    """-> public key as text, or None where the library is absent, too old, broken, or refuses X25519 as it does in FIPS mode."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        public = X25519PrivateKey.from_private_bytes(bytes(raw)).public_key()
        return encode_key(public.public_bytes(encoding=serialization.Encoding.Raw, format=serialization.PublicFormat.Raw))
    except Exception:  # noqa: BLE001 - a damaged or FIPS-bound library fails in ways of its own
        return None


def _public_by_wg(raw, run_command, wg_path):
    if not wg_path:
        raise MeshError("the public key cannot be computed: there is neither the command wg nor a usable Python library cryptography; "
                        "install the package wireguard-tools")
    rc, out, err = run_command([wg_path, "pubkey"], data=encode_key(raw) + "\n")
    public = out.strip()
    if rc != 0 or len(public) != KEY_CHARACTERS:
        # stderr of wg pubkey has no key material: it says "Key is not the correct length or format" and no more
        raise MeshError("%s pubkey failed with exit code %s: %s" % (wg_path, rc, err.strip() or "no public key in its answer"))
    return public


def _damaged(path, what):
    return MeshError("%s is not a usable private key: %s. It is left as it is. On a node that is part of a mesh in use, run the playbook "
                     "rotate_keys, which gives it another; else remove it (state=absent) or restore the key that belongs there"
                     % (path, what))


def _wrong_place(path, what):
    return MeshError("%s is no place for a private key: %s" % (path, what))


def check_directory(directory):
    """Raise MeshError if others can replace files in ``directory``; -> False if it does not exist.

    Only write access counts: who may list the directory learns nothing but that there is a key.
    """
    try:
        found = os.stat(directory)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise _wrong_place(directory, exc.strerror) from exc
    if not stat.S_ISDIR(found.st_mode):
        raise _wrong_place(directory, "it is not a directory. Choose another path, or move it away")
    if found.st_uid not in (0, os.geteuid()):
        raise _wrong_place(directory, "it belongs to user id %d, who could replace the key. Give it to root (chown root:root %s)" % (
            found.st_uid, directory))
    if found.st_mode & 0o022:
        raise _wrong_place(directory, "others may write in it (mode %04o) and so replace the key. Take that away (chmod go-w %s)" % (
            stat.S_IMODE(found.st_mode), directory))
    return True


def open_key_file(path, flags=os.O_RDONLY):
    """-> file descriptor of the key file at ``path``, which is a regular file of ours; None if there is none; else MeshError.

    All that is judged is judged on the descriptor, so that nothing can be put in its place in between.
    """
    try:
        # O_NONBLOCK: a FIFO somebody left there must not make the run wait for its writer
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise _damaged(path, "it is a symbolic link") from exc
        if exc.errno == errno.EISDIR:
            raise _damaged(path, "it is a directory") from exc
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise MeshError("%s cannot be opened: %s; run this task as root (become: true)" % (path, exc.strerror)) from exc
        raise MeshError("%s cannot be opened: %s" % (path, exc.strerror)) from exc
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise _damaged(path, "it is a directory" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
    return handle


def _read(handle):
    content = bytearray()
    while len(content) <= READ_LIMIT:
        part = os.read(handle, READ_LIMIT + 1 - len(content))
        if not part:
            break
        content += part
    return content


def inspect(path):
    """What is at ``path`` -> None, or {"private_key": bytearray, "mode": int, "loose": bool, "age": seconds as int}.

    ``loose``: others may do something with the file. MeshError if what is there is not a sound key file.
    """
    check_directory(os.path.dirname(path) or ".")
    handle = open_key_file(path)
    if handle is None:
        return None
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid():
            raise _damaged(path, "it belongs to user id %d, not to user id %d that this runs as, so somebody else may know it" % (
                found.st_uid, os.geteuid()))
        return {
            "private_key": decode_private_key(_read(handle), path),
            "mode": stat.S_IMODE(found.st_mode),
            "loose": bool(stat.S_IMODE(found.st_mode) & ~FILE_MODE),
            # a clock that was set back since must not make a key that is younger than nothing
            "age": max(0, int(time.time() - found.st_mtime)),
        }
    finally:
        os.close(handle)


def read_private_key(path):
    """-> the private key at ``path``, bytearray of 32 bytes, for the code that programs a device; MeshError if there is none."""
    found = inspect(path)
    if found is None:
        raise MeshError("there is no private key at %s; make one with the module kubemesh.wireguard.keypair" % path)
    return found["private_key"]


def tighten(path):
    """Take from others what they may do with the key file."""
    handle = open_key_file(path)
    if handle is None:
        raise MeshError("%s vanished while it was looked at; run again" % path)
    try:
        os.fchmod(handle, FILE_MODE)
    finally:
        os.close(handle)


def make_directory(directory):
    """Create ``directory`` and what is missing above it, 0700 each; -> True if something was created."""
    if check_directory(directory):
        return False
    parent = os.path.dirname(directory)
    if parent and parent != directory and not os.path.isdir(parent):
        make_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, DIRECTORY_MODE)
    check_directory(directory)
    _sync_directory(parent or ".")
    return True


def _sync_directory(directory):
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(directory):
    """Hold ``directory`` against other runs of this code; MeshError if another one does not let go."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if exc.errno not in (errno.EAGAIN, errno.EACCES):
                    raise MeshError("%s cannot be locked: %s; keep private keys on a local file system" % (
                        directory, exc.strerror)) from exc
                if time.monotonic() > deadline:
                    raise MeshError("another process holds the lock on %s for more than %d seconds; find it with fuser %s, then run again"
                                    % (directory, LOCK_SECONDS, directory)) from exc
            time.sleep(LOCK_STEP_SECONDS)
        yield
    finally:
        os.close(handle)


def _temporary(path):
    # one fixed name: under the lock a file of this name can only be what a killed run left, and is removed with it
    return os.path.join(os.path.dirname(path), ".%s.new" % os.path.basename(path))


def _write_new(path, raw):
    """Write the key to the temporary file beside ``path``, on disk when this returns; -> its name. Call under the lock."""
    temporary = _temporary(path)
    _wipe(temporary)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        # the umask may have taken more than we want gone, never less
        os.fchmod(handle, FILE_MODE)
        os.write(handle, (encode_key(raw) + "\n").encode("ascii"))
        os.fsync(handle)
    finally:
        os.close(handle)
    return temporary


def create(path, raw):
    """Put a new key at ``path``, where there is none; -> False if another run was faster, whose key then stands.

    link(2) fails on an existing name, in one step, where rename(2) would replace it: also a run that does not know of the lock, or an
    administrator with ``wg genkey``, cannot lose a key to us.
    """
    directory = os.path.dirname(path) or "."
    make_directory(directory)
    with _locked(directory):
        temporary = _write_new(path, raw)
        try:
            os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            _wipe(temporary)
            return False
        except OSError as exc:
            _wipe(temporary)
            raise MeshError("%s cannot be written: %s; keep private keys on a local file system with hard links" % (
                path, exc.strerror)) from exc
        # not _wipe: both names are the same file
        os.unlink(temporary)
        _sync_directory(directory)
    return True


def replace(path, raw):
    """Put another key in the place of the one at ``path``, in one step: a reader finds the old or the new one, whole."""
    directory = os.path.dirname(path) or "."
    with _locked(directory):
        # the descriptor keeps hold of the old file, so that its blocks can be overwritten once it is no longer the key
        handle = open_key_file(path, os.O_WRONLY)
        try:
            os.rename(_write_new(path, raw), path)
            _sync_directory(directory)
            if handle is not None:
                _overwrite_if_unnamed(handle, names=0)
        finally:
            if handle is not None:
                os.close(handle)


def remove(path):
    """Overwrite the file at ``path``, then remove it; also what a killed run left beside it. -> True if there was something.

    The best that can be done from here: copies made by a journal, a copy-on-write file system, the wear levelling of an SSD, a snapshot or
    a backup are out of reach.
    """
    directory = os.path.dirname(path) or "."
    if not check_directory(directory):
        return False
    with _locked(directory):
        removed = [_wipe(name) for name in (path, _temporary(path))]
        if any(removed):
            _sync_directory(directory)
    return any(removed)


def leftovers(path):
    """-> True if there is something that ``remove`` would remove; MeshError if it is something that it would refuse."""
    if not check_directory(os.path.dirname(path) or "."):
        return False
    found = False
    for name in (path, _temporary(path)):
        handle = open_key_file(name)
        if handle is not None:
            os.close(handle)
            found = True
    return found


def _overwrite_if_unnamed(handle, names):
    """Overwrite the file unless it has more than ``names`` names in the file system.

    A run killed between link and unlink leaves the key under two names; wiping the second must not destroy the first.
    """
    found = os.fstat(handle)
    if found.st_nlink > names:
        return
    os.lseek(handle, 0, os.SEEK_SET)
    # bounded: a key file is small, and what is much bigger is not ours to fill
    os.write(handle, os.urandom(min(found.st_size, READ_LIMIT)))
    os.fsync(handle)


def _wipe(path):
    """Overwrite and remove; -> False if there was nothing."""
    handle = open_key_file(path, os.O_WRONLY)
    if handle is None:
        return False
    try:
        _overwrite_if_unnamed(handle, names=1)
    finally:
        os.close(handle)
    os.unlink(path)
    return True
