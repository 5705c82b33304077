# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""What both transports of the WireGuard client do alike: steps to peer entries, key files, taking away single allowed IPs.

A transport (`_wg_netlink.NetlinkClient`, `_wg_uapi.UapiClient`) is a `StepClient` that can read a device, set its own settings and send
peer entries. An *entry* is what goes to the device about one peer, in the order it is to be done::

    {"public_key": "…",            # text
     "update_only": True,          # do nothing if there is no such peer: a peer removed meanwhile must not come back half
     "remove": False,              # remove the peer
     "endpoint": "…" or absent, "keepalive": seconds or absent,
     "preshared_key_file": path, None (take it away) or absent,
     "allowed_ips": […],           # to add, or to take over from whoever has them
     "remove_allowed_ips": […]}    # to take away from this peer, where the device can do that

There is no way to say "replace all peers" or "replace the allowed IPs of this peer" in an entry, on purpose: replacing all peers resets
every session, replacing allowed IPs opens a gap (Cilium #34612).

**Taking away one allowed IP without a gap for the others.** Newer WireGuard can do it: Linux from 6.16 on by WGALLOWEDIP_F_REMOVE_ME
(commit ba3d7b93dbe3, May 2025), userspace implementations of the same age by ``allowed_ip=-PREFIX``. What is there is found out by
doing it, not by version, as distributions carry patches back: the first allowed IP that has to go is the trial. Nothing bad can come of
it, whatever answers:

* done: it is gone, as wanted;
* refused (Linux 5.6 to 6.15 validates nested attributes strictly and answers EINVAL before it looks at the address; wireguard-go of 2022
  cannot parse the prefix and answers EINVAL): nothing changed;
* the flag ignored (the out-of-tree module on kernels before 5.2, which parse leniently): the peer is given the allowed IP that it has
  already. Reading back shows it.

Elsewhere the allowed IPs are moved to a throw-away peer, which then is removed, both within one message, so that nothing of it is left
behind if this process dies. Its key is random and it has no endpoint, so it can neither send nor be reached.
What is left of a gap: a prefix that goes while a wider one of the same peer stays meets the throw-away peer for as long as the device takes
from one entry of a message to the next, and a packet in that instant is dropped. Nothing else is touched.
"""

from __future__ import annotations

import errno
import os
import shutil

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_plan import OPERATIONS, canonical_endpoint, canonical_prefix

KEY_BYTES = 32  # Curve25519 and preshared keys: WG_KEY_LEN, include/uapi/linux/wireguard.h

# What a device answers that does not know how to take away a single allowed IP. EINVAL: see above; EOPNOTSUPP: unknown flags
# (netlink.c before NLA_POLICY_MASK); EPROTO: userspace that takes the line for nonsense.
_NO_REMOVAL = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTO)

_WHY = {
    errno.ENODEV: "there is no such device in this network namespace; create it first, or run the playbook enable again",
    errno.EOPNOTSUPP: "the device is not a WireGuard device; remove it or choose another name (mesh_interface)",
    errno.EPERM: "not permitted; run this as root (become: true), with CAP_NET_ADMIN in the network namespace the device was created in",
    errno.EACCES: "not permitted; run this as root (become: true)",
    errno.EADDRINUSE: "the UDP port is in use; find out by whom (ss -lunp) and stop that, or choose another port (mesh_port)",
    errno.EINVAL: "the values were refused as invalid",
    errno.EAFNOSUPPORT: "an endpoint is of an address family this node does not have; is IPv6 switched off here?",
    errno.EPFNOSUPPORT: "it does not know this version of the protocol",
    errno.ENOMEM: "out of memory",
    errno.EMFILE: "too many open files",
}


class WireGuardError(MeshError):
    """`MeshError` of a device, with ``errno`` (positive, or None): what it answered."""

    def __init__(self, message, code=None):
        super().__init__(message)
        self.errno = code


def device_error(name, code, doing):
    """`WireGuardError` for an error number of a device: names the device, what was being done, why it failed and what to do.

    Numbers: include/uapi/asm-generic/errno.h; when which comes: drivers/net/wireguard/netlink.c.
    """
    why = _WHY.get(code)
    text = "%s: %s" % (errno.errorcode.get(code, "error %d" % code), why if why else os.strerror(code))
    return WireGuardError("device %s: cannot %s: %s" % (name, doing, text), code)


# --- key files -----------------------------------------------------------------------------------------------------------------------

def wipe(buffer):
    """Overwrite a bytearray with zeros. As far as Python allows: copies that the interpreter made are beyond reach."""
    if isinstance(buffer, bytearray):
        buffer[:] = bytes(len(buffer))


def read_preshared_key(path):
    """The preshared key at ``path`` (base64 as ``wg genpsk`` prints it) -> bytearray of 32 bytes; `MeshError` if there is no sound one."""
    handle = _keys.open_key_file(path)
    if handle is None:
        raise MeshError("there is no preshared key at %s; run the playbook again to have it written" % path)
    content = bytearray()
    try:
        while len(content) <= _keys.READ_LIMIT:
            part = os.read(handle, _keys.READ_LIMIT + 1 - len(content))
            if not part:
                break
            content += part
        # a preshared key is any 32 bytes but zeros, in the same text form as a private key
        return _keys.decode_private_key(content, path)
    finally:
        os.close(handle)
        wipe(content)


def same_preshared_key(present, path):
    """Whether the 32 bytes ``present`` are the key in the file; False if there is no sound key in it."""
    try:
        wanted = read_preshared_key(path)
    except MeshError:
        return False
    try:
        return bytes(present) == bytes(wanted)
    finally:
        wipe(wanted)


_P = 2 ** 255 - 19  # RFC 7748, section 4.1
_A24 = 121665  # (486662 - 2) / 4, RFC 7748, section 5


def x25519_public_key(raw, run_command=None):
    """32 bytes of a private key -> its public key as text, as ``_keys.public_key_of`` does it; works without ``wg`` and libraries as well.

    The last resort is the ladder of RFC 7748, section 5 in plain Python. It does not take the same time for every key, so somebody on
    this node who can measure a root process very exactly would learn a little. It is for reading userspace devices (they report only the
    private key) on nodes that have neither the Python library cryptography nor ``wg``, or no ``run_command`` to start it with.
    """
    try:
        # A command that is not there would end the module.
        return _keys.public_key_of(raw, run_command, shutil.which("wg") if run_command else None)
    except MeshError:
        return _keys.encode_key(_ladder(raw))


def _ladder(raw):
    scalar = int.from_bytes(_keys.clamp(raw), "little")
    x_2, z_2, x_3, z_3, swap = 1, 0, 9, 1, 0
    for t in range(254, -1, -1):
        bit = scalar >> t & 1
        if swap ^ bit:
            x_2, x_3, z_2, z_3 = x_3, x_2, z_3, z_2
        swap = bit
        a, b, c, d = x_2 + z_2, x_2 - z_2, x_3 + z_3, x_3 - z_3
        aa, bb, da, cb = a * a % _P, b * b % _P, d * a % _P, c * b % _P
        e = aa - bb
        x_3, z_3 = (da + cb) ** 2 % _P, 9 * (da - cb) ** 2 % _P
        x_2, z_2 = aa * bb % _P, e * (aa + _A24 * e) % _P
    if swap:
        x_2, z_2 = x_3, z_3
    return (x_2 * pow(z_2, _P - 2, _P) % _P).to_bytes(KEY_BYTES, "little")


# --- steps to entries ----------------------------------------------------------------------------------------------------------------

def entry_of(step):
    """The peer entry of a step; `MeshError` for a step that has none."""
    op = step["op"]
    entry = {"public_key": step.get("public_key"), "update_only": True, "remove": False, "allowed_ips": [], "remove_allowed_ips": []}
    if op in ("add_peer", "update_peer"):
        entry["update_only"] = op == "update_peer"
        if step.get("endpoint") is not None:
            entry["endpoint"] = step["endpoint"]
        if "keepalive" in step:
            # 0 as well: a peer that somebody added in the meantime may have another one
            entry["keepalive"] = step["keepalive"]
        if "preshared_key_file" in step:
            entry["preshared_key_file"] = step["preshared_key_file"]
        entry["allowed_ips"] = [canonical_prefix(text) for text in step.get("allowed_ips", ())]
    elif op == "add_allowed_ips":
        entry["allowed_ips"] = [canonical_prefix(text) for text in step["allowed_ips"]]
    elif op == "remove_allowed_ips":
        # compared with what the device reports
        entry["remove_allowed_ips"] = [canonical_prefix(text) for text in step["allowed_ips"]]
    elif op == "remove_peer":
        entry["update_only"], entry["remove"] = False, True
    else:
        raise MeshError("step %s is not about a peer: expected one of %s" % (shown(op), ", ".join(OPERATIONS[1:])))
    return entry


def random_public_key():
    """32 random bytes as the text of a public key that nobody has the private one of."""
    return _keys.encode_key(os.urandom(KEY_BYTES))


class StepClient:
    """`apply` for a transport that has ``read``, ``_set_device``, ``_set_peers`` and ``allowed_ips_at_once``."""

    # how many allowed IPs fit into one message about a throw-away peer; set by each transport
    allowed_ips_at_once = 1

    def __init__(self, run_command=None):
        self._run_command = run_command
        # True, False, or None while it is not known whether the device can take away a single allowed IP
        self._can_remove = None

    def read(self, name, preshared_key_files=None):
        raise NotImplementedError

    def _set_device(self, name, private_key, listen_port, fwmark):
        raise NotImplementedError

    def _set_peers(self, name, entries):
        """Send entries, in order, in as few messages as possible. Raises `WireGuardError`."""
        raise NotImplementedError

    def apply(self, name, steps):
        """Carry out ``steps`` (``_wg_plan.plan_device``) on the device ``name``, in their order.

        Nothing is undone when a step fails: what was done before it is a working state. Raises `MeshError`; `WireGuardError` when the
        device refused. A device ignores some things silently (a peer with its own key, a change of a peer that vanished), so callers
        read the device again afterwards and plan anew: an empty plan is the proof.
        """
        batch = []
        removals = []
        steps = list(steps)
        self._check(name, steps)
        for step in steps:
            if step["op"] != "remove_allowed_ips":
                self._remove_allowed_ips(name, removals)
            if step["op"] == "remove_allowed_ips":
                self._flush(name, batch)
                removals.append(step)
            elif step["op"] == "set_device":
                self._flush(name, batch)
                self._apply_to_device(name, step)
            else:
                batch.append(entry_of(step))
        self._remove_allowed_ips(name, removals)
        self._flush(name, batch)

    def _check(self, name, steps):
        """Look at everything that steps need before the first one is carried out: a missing file is no reason to stop half way."""
        for step in steps:
            if step["op"] == "set_device":
                if "private_key_file" in step:
                    wipe(self._private_key(name, step))
            else:
                entry = entry_of(step)
                if "endpoint" in entry:
                    canonical_endpoint(entry["endpoint"])
                if entry.get("preshared_key_file"):
                    wipe(read_preshared_key(entry["preshared_key_file"]))

    def _private_key(self, name, step):
        """The private key of a step, bytearray of 32 bytes; `MeshError` if it does not belong to the public key in the step."""
        private_key = _keys.read_private_key(step["private_key_file"])
        wanted = step.get("public_key")
        found = x25519_public_key(private_key, self._run_command) if wanted else None
        if found != wanted:
            wipe(private_key)
            # the others accept us under the wanted key only
            raise MeshError("device %s: the private key in %s has the public key %s, but %s is the one that the mesh knows; run again, so "
                            "that the keys are exchanged anew" % (name, step["private_key_file"], found, wanted))
        return private_key

    def _flush(self, name, batch):
        if batch:
            self._set_peers(name, batch)
            del batch[:]

    def _apply_to_device(self, name, step):
        private_key = None
        try:
            if "private_key_file" in step:
                private_key = self._private_key(name, step)
            self._set_device(name, private_key, step.get("listen_port"), step.get("fwmark"))
        finally:
            wipe(private_key)

    def _remove_allowed_ips(self, name, steps):
        """Take single allowed IPs away from their peers; empties ``steps``."""
        if not steps:
            return
        entries = [entry_of(step) for step in steps]
        del steps[:]
        state = None
        if self._can_remove is None:
            state = self._try_removal(name, entries)
        if self._can_remove:
            self._set_peers(name, [entry for entry in entries if entry["remove_allowed_ips"]])
            return
        # Only what the peers still have: what somebody else gave to another peer since the plan was made must not be taken from that one.
        state = state or self.read(name)
        prefixes = []
        for entry in entries:
            present = set(state["peers"].get(entry["public_key"], {"allowed_ips": ()})["allowed_ips"])
            prefixes.extend(prefix for prefix in entry["remove_allowed_ips"] if prefix in present)
        for start in range(0, len(prefixes), self.allowed_ips_at_once):
            key = random_public_key()
            self._set_peers(name, [
                {"public_key": key, "update_only": False, "remove": False, "remove_allowed_ips": [],
                 "allowed_ips": prefixes[start:start + self.allowed_ips_at_once]},
                {"public_key": key, "update_only": False, "remove": True, "remove_allowed_ips": [], "allowed_ips": []}])

    def _try_removal(self, name, entries):
        """Find out whether the device can take away a single allowed IP; the state read after the trial, or None if there was none.

        One allowed IP after the other is tried until one gives an answer: one that its peer no longer has proves nothing.
        """
        state = self.read(name)
        for entry in entries:
            for prefix in entry["remove_allowed_ips"]:
                if prefix not in state["peers"].get(entry["public_key"], {"allowed_ips": ()})["allowed_ips"]:
                    continue
                try:
                    self._set_peers(name, [dict(entry, remove_allowed_ips=[prefix])])
                except WireGuardError as exc:
                    if exc.errno not in _NO_REMOVAL:
                        raise
                    self._can_remove = False
                    return state
                state = self.read(name)
                left = state["peers"].get(entry["public_key"], {"allowed_ips": ()})["allowed_ips"]
                self._can_remove = prefix not in left
                return state
        return state
