# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""The WireGuard client's transport for userspace implementations: the cross-platform configuration protocol ("UAPI").

Text over the Unix socket ``/var/run/wireguard/NAME.sock``; described at https://www.wireguard.com/xplatform/; what wireguard-go makes of
it is in its device/uapi.go, what ``wg`` sends in wireguard-tools, src/ipc-uapi.h. What we do otherwise than ``wg``, on purpose: never
``replace_peers``, never ``replace_allowed_ips``, ``update_only=true`` wherever the peer must be there already.

Everything up to `UapiClient` is pure, the reading of preshared keys apart, which goes through a function that is handed in.
"""

from __future__ import annotations

import binascii
import errno
import os
import socket
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import (
    KEY_BYTES,
    StepClient,
    WireGuardError,
    device_error,
    read_preshared_key,
    same_preshared_key,
    wipe,
    x25519_public_key,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_netlink import check_device_name
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_plan import canonical_endpoint, canonical_prefix, empty_state

# Where implementations put their sockets: /var/run is a link to /run on most systems, but not in every container.
DIRECTORIES = ("/var/run/wireguard", "/run/wireguard")
# Bytes that are collected before they are sent: a peer takes about 300.
SEND_LIMIT = 65536
# Bytes of the largest answer that is taken: 5,000 peers with 10 allowed IPs each are about 3 MB.
ANSWER_LIMIT = 1 << 28
# Seconds for an answer. Setting 5,000 peers takes wireguard-go under a second; a busy node gets a minute.
ANSWER_SECONDS = 60.0
# Seconds between looks for a socket that is not there yet
WAIT_STEP_SECONDS = 0.05
# Allowed IPs given to one throw-away peer: 64 prefixes are at most 64 * 60 bytes, which one write hands over
THROW_AWAY_IPS = 64


# --- encoding ------------------------------------------------------------------------------------------------------------------------

def hex_of(raw):
    """Bytes of a key -> bytearray of lower case hexadecimal digits."""
    return bytearray(binascii.hexlify(raw))


def device_lines(private_key=None, listen_port=None, fwmark=None):
    """Generates the lines (bytes-like, with newline) of a device's own settings; None leaves one as it is. ``private_key``: 32 bytes."""
    if private_key is not None:
        line = bytearray(b"private_key=") + hex_of(private_key) + b"\n"
        yield line
        wipe(line)
    if listen_port is not None:
        yield b"listen_port=%d\n" % listen_port
    if fwmark is not None:
        yield b"fwmark=%d\n" % fwmark


def entry_lines(entry, load_key=None):
    """Generates the lines of one peer entry (``_wg_apply``).

    ``load_key(path)`` gives the 32 bytes of a preshared key. A line with a key in it is wiped when the next one is asked for.
    """
    yield b"public_key=%s\n" % bytes(hex_of(binascii.a2b_base64(entry["public_key"])))
    if entry["remove"]:
        yield b"remove=true\n"
        return
    if entry["update_only"]:
        # must come before everything else: wireguard-go has made the peer by now and takes it back here
        yield b"update_only=true\n"
    if "preshared_key_file" in entry:
        path = entry["preshared_key_file"]
        # all zeros is how WireGuard spells "none"
        key = bytearray(KEY_BYTES) if path is None else load_key(path)
        line = bytearray(b"preshared_key=") + hex_of(key) + b"\n"
        wipe(key)
        yield line
        wipe(line)
    if "endpoint" in entry:
        yield b"endpoint=%s\n" % canonical_endpoint(entry["endpoint"]).encode("ascii")
    if "keepalive" in entry:
        yield b"persistent_keepalive_interval=%d\n" % entry["keepalive"]
    for prefix in entry["allowed_ips"]:
        yield b"allowed_ip=%s\n" % canonical_prefix(prefix).encode("ascii")
    for prefix in entry["remove_allowed_ips"]:
        yield b"allowed_ip=-%s\n" % canonical_prefix(prefix).encode("ascii")


# --- decoding ------------------------------------------------------------------------------------------------------------------------

def _malformed(name, what):
    return WireGuardError("device %s: its answer cannot be understood: %s; is another program behind its socket?" % (name, what),
                          errno.EPROTO)


def _number(name, key, value, limit):
    text = bytes(value)
    if not text.isdigit() or int(text) > limit:
        raise _malformed(name, "%s is not a number up to %d" % (key, limit))
    return int(text)


def _key(name, key, value):
    """Hexadecimal digits -> bytearray of 32 bytes. The error does not quote them: they may be a private key."""
    try:
        raw = bytearray(binascii.unhexlify(value))
    except (binascii.Error, ValueError):
        raise _malformed(name, "%s is not hexadecimal" % key) from None
    if len(raw) != KEY_BYTES:
        raise _malformed(name, "%s has not %d bytes" % (key, KEY_BYTES))
    return raw


class Decoder:
    """Turns the lines of an answer to ``get=1`` into a state (``docs/architecture.md``).

    ``public_key_of(raw)``: the protocol reports the private key only. ``preshared_key_files``: ``{public key: path}``; those peers get
    ``preshared_key_matches``.
    """

    def __init__(self, name, public_key_of, preshared_key_files=None):
        self.state = empty_state(name)
        self.errno = None
        self._name = name
        self._public_key_of = public_key_of
        self._files = preshared_key_files or {}
        self._peer = None
        self._peer_key = None
        self._seconds = 0

    def line(self, word, value):
        """Take one line: the word before the ``=`` as text (None where there is no ``=``), the value after it as a memoryview."""
        if word is None:
            raise _malformed(self._name, "a line without =")
        if word == "errno":
            self.errno = _number(self._name, word, value[1:] if value[:1] == b"-" else value, 1 << 31)
        elif word == "public_key":
            self._start_peer(_keys.encode_key(_key(self._name, word, value)))
        elif self._peer is None:
            self._device(word, value)
        else:
            self._peer_line(word, value)

    def _start_peer(self, key):
        self._peer_key = key
        self._peer = self.state["peers"].setdefault(key, {
            "endpoint": None, "allowed_ips": [], "keepalive": 0, "has_preshared_key": False,
            "last_handshake": 0.0, "rx_bytes": 0, "tx_bytes": 0})

    def _device(self, word, value):
        if word == "private_key":
            raw = _key(self._name, word, value)
            try:
                if any(raw):
                    self.state["public_key"] = self._public_key_of(raw)
            finally:
                wipe(raw)
        elif word == "listen_port":
            self.state["listen_port"] = _number(self._name, word, value, 0xFFFF)
        elif word == "fwmark":
            self.state["fwmark"] = _number(self._name, word, value, 0xFFFFFFFF)

    def _peer_line(self, word, value):
        peer = self._peer
        if word == "preshared_key":
            raw = _key(self._name, word, value)
            try:
                peer["has_preshared_key"] = any(raw)
                if self._peer_key in self._files and peer["has_preshared_key"]:
                    peer["preshared_key_matches"] = same_preshared_key(raw, self._files[self._peer_key])
            finally:
                wipe(raw)
        elif word == "endpoint":
            peer["endpoint"] = self._canonical(canonical_endpoint, value)
        elif word == "allowed_ip":
            peer["allowed_ips"].append(self._canonical(canonical_prefix, value))
        elif word == "persistent_keepalive_interval":
            # "off" is what some implementations write (BoringTun)
            peer["keepalive"] = 0 if value == b"off" else _number(self._name, word, value, 0xFFFF)
        elif word == "last_handshake_time_sec":
            # the other half comes next; both of it are 0 when there never was one
            self._seconds = _number(self._name, word, value, 1 << 63)
            peer["last_handshake"] = float(self._seconds)
        elif word == "last_handshake_time_nsec":
            peer["last_handshake"] = self._seconds + _number(self._name, word, value, 10 ** 9) / 1e9
            self._seconds = 0
        elif word in ("rx_bytes", "tx_bytes"):
            peer[word] = _number(self._name, word, value, 1 << 64)
        # anything else is of a newer protocol, and none of ours

    def _canonical(self, function, value):
        try:
            return function(bytes(value).decode("ascii", "replace"))
        except MeshError as exc:
            raise _malformed(self._name, str(exc)) from None

    def finish(self):
        """The state, when all lines are in."""
        for peer in self.state["peers"].values():
            peer["allowed_ips"] = sorted(set(peer["allowed_ips"]))
        return self.state


def decode_answer(data, decoder):
    """Feed an answer (bytearray, up to and with its empty line) to a `Decoder`, line by line, without copying the values."""
    view = memoryview(data)
    start = 0
    while True:
        end = data.find(b"\n", start)
        if end <= start:
            return
        equals = data.find(b"=", start, end)
        word = None if equals < 0 else bytes(view[start:equals]).decode("ascii", "replace")
        decoder.line(word, view[equals + 1:end])
        start = end + 1


# --- the transport -------------------------------------------------------------------------------------------------------------------

def socket_path(name, directories=DIRECTORIES):
    """The socket of a device if there is one, else None."""
    check_device_name(name)
    for directory in directories:
        path = os.path.join(directory, name + ".sock")
        if os.path.exists(path):
            return path
    return None


def socket_names(directories=DIRECTORIES):
    """The names of all devices that have a socket, sorted. The sockets of all network namespaces are in one directory."""
    names = set()
    for directory in directories:
        try:
            entries = os.listdir(directory)
        except OSError:
            continue
        names.update(entry[:-len(".sock")] for entry in entries if entry.endswith(".sock") and len(entry) > len(".sock"))
    return sorted(names)


class Exchange:
    """One operation over the socket of a device: what is written is sent in large pieces, the answer is read at the end."""

    def __init__(self, connection, name):
        self._socket = connection
        self._name = name
        self._buffer = bytearray(SEND_LIMIT)
        self._length = 0
        self._broken = False
        self._answer = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        wipe(self._buffer)
        wipe(self._answer)
        self._socket.close()

    def write(self, line):
        if self._length + len(line) > len(self._buffer):
            self._flush()
        self._buffer[self._length:self._length + len(line)] = line
        self._length += len(line)

    def _flush(self):
        try:
            if not self._broken:
                self._socket.sendall(memoryview(self._buffer)[:self._length])
        except (BrokenPipeError, ConnectionResetError):
            # it did not like what it got so far; its answer says why
            self._broken = True
        self._buffer[:self._length] = bytes(self._length)
        self._length = 0

    def answer(self):
        """The answer, a bytearray that ends with an empty line. It belongs to this object, which wipes it."""
        self._flush()
        size, used = SEND_LIMIT, 0
        self._answer = bytearray(size)
        while True:
            if used == size:
                if size >= ANSWER_LIMIT:
                    raise _malformed(self._name, "it is longer than %d bytes" % ANSWER_LIMIT)
                # by hand, so that no copy is left behind as it grows
                larger = bytearray(size * 2)
                larger[:used] = self._answer
                wipe(self._answer)
                self._answer, size = larger, size * 2
            try:
                count = self._socket.recv_into(memoryview(self._answer)[used:])
            except ConnectionResetError:
                count = 0
            if not count:
                raise _malformed(self._name, "the connection was closed in the middle of it")
            used += count
            # errno=N is the last line of every answer
            if self._answer[used - 2:used] == b"\n\n":
                return self._answer


class UapiClient(StepClient):
    """WireGuard devices of userspace implementations.

    ``wait``: seconds to wait for a socket that is not there or does not answer yet, as just after the start of the implementation.
    ``run_command``: see ``_wg_apply.x25519_public_key``.
    """

    transport = "uapi"
    allowed_ips_at_once = THROW_AWAY_IPS

    def __init__(self, directories=DIRECTORIES, wait=5.0, run_command=None):
        super().__init__(run_command)
        self._directories = tuple(directories)
        self._wait = wait

    def read(self, name, preshared_key_files=None):
        """The state of a device (``docs/architecture.md``). Raises `WireGuardError`.

        ``preshared_key_files``: ``{public key: path}``: the state of those peers says whether their preshared key is the one in the file.
        """
        decoder = Decoder(name, lambda raw: x25519_public_key(raw, self._run_command), preshared_key_files)
        self._exchange(name, [b"get=1\n"], decoder, "read it")
        return decoder.finish()

    def _set_device(self, name, private_key, listen_port, fwmark):
        values = (("private key", private_key), ("port %s" % listen_port, listen_port), ("mark %s" % fwmark, fwmark))
        self._exchange(name, self._set(device_lines(private_key, listen_port, fwmark)), Decoder(name, None),
                       "set its %s" % ", ".join(text for text, value in values if value is not None))

    def _set_peers(self, name, entries):
        keys = [entry["public_key"] for entry in entries]
        doing = "change peer %s" % keys[0] if len(set(keys)) == 1 else "change peers %s to %s" % (keys[0], keys[-1])
        lines = (line for entry in entries for line in entry_lines(entry, read_preshared_key))
        self._exchange(name, self._set(lines), Decoder(name, None), doing)

    @staticmethod
    def _set(lines):
        yield b"set=1\n"
        yield from lines

    def _exchange(self, name, lines, decoder, doing):
        check_device_name(name)
        try:
            with Exchange(self._connect(name), name) as exchange:
                for line in lines:
                    exchange.write(line)
                exchange.write(b"\n")
                decode_answer(exchange.answer(), decoder)
        except OSError as exc:
            raise device_error(name, exc.errno or errno.ETIMEDOUT, doing) from exc
        if decoder.errno is None:
            raise _malformed(name, "it has no errno")
        if decoder.errno:
            raise device_error(name, decoder.errno, doing)

    def _connect(self, name):
        """A connected socket. Waits for one to appear and for its implementation to accept."""
        end = time.monotonic() + self._wait
        while True:
            path = socket_path(name, self._directories)
            if path is None:
                problem = WireGuardError(
                    "device %s: no userspace WireGuard serves it: there is no %s.sock in %s; start it (wireguard-go %s), or run the "
                    "playbook enable again" % (name, name, " or ".join(self._directories), name), errno.ENODEV)
            else:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    connection.settimeout(ANSWER_SECONDS)
                    connection.connect(path)
                    return connection
                except (ConnectionRefusedError, FileNotFoundError):
                    connection.close()
                    problem = WireGuardError(
                        "device %s: nobody answers at %s: its userspace WireGuard has ended; start it again" % (name, path), errno.ENODEV)
                except OSError as exc:
                    connection.close()
                    raise device_error(name, exc.errno or errno.ETIMEDOUT, "connect to %s" % shown(path)) from exc
            if time.monotonic() >= end:
                raise problem
            time.sleep(WAIT_STEP_SECONDS)
