# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""Finds the transport of a WireGuard device.

The link kind decides: ``wireguard`` is the kernel. Devices of userspace implementations are of kind ``tun``, like those of any VPN; what
makes one a WireGuard device is its socket (the way ``wg show interfaces`` goes about it, wireguard-tools, src/ipc.c).
"""

from __future__ import annotations

import errno
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError, device_error
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_netlink import NetlinkClient, check_device_name, link_kinds
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_uapi import (
    DIRECTORIES,
    WAIT_STEP_SECONDS,
    UapiClient,
    socket_names,
    socket_path,
)

KERNEL_KIND = "wireguard"


def choose(name, kinds, sockets):
    """``"netlink"``, ``"uapi"`` or None for a device; pure.

    ``kinds``: ``{name: link kind}`` of this network namespace; ``sockets``: names that have a UAPI socket. A socket without a link is not
    enough: it may be a left-over, or serve a device of the same name in another network namespace.
    """
    if kinds.get(name) == KERNEL_KIND:
        return "netlink"
    if name in kinds and name in sockets:
        return "uapi"
    return None


def client_for(name, wait=0.0, run_command=None, directories=DIRECTORIES, kinds=link_kinds):
    """The client, with ``read(name)`` and ``apply(name, steps)``, for an existing device; `WireGuardError` if there is none.

    ``wait``: seconds to wait for the device and its socket to appear. ``run_command``: that of AnsibleModule, for ``wg pubkey`` where the
    Python library cryptography is missing. ``kinds`` (a function) and ``directories`` are for tests.
    """
    check_device_name(name)
    end = time.monotonic() + wait
    while True:
        present = kinds()
        transport = choose(name, present, (name,) if socket_path(name, directories) else ())
        if transport == "netlink":
            return NetlinkClient(run_command=run_command)
        if transport == "uapi":
            return UapiClient(directories=directories, run_command=run_command)
        if time.monotonic() >= end:
            break
        time.sleep(WAIT_STEP_SECONDS)
    if name not in present:
        raise device_error(name, errno.ENODEV, "use it")
    raise WireGuardError(
        "device %s exists, but it is no WireGuard device: its kind is %s and there is no UAPI socket %s.sock in %s. If it is one of a "
        "userspace WireGuard, that has ended: start it again; else remove the device or choose another name (mesh_interface)"
        % (name, present[name] or "unknown", name, " or ".join(directories)), errno.EOPNOTSUPP)


def device_names(directories=DIRECTORIES, kinds=link_kinds):
    """The names of all WireGuard devices in this network namespace, sorted."""
    present = kinds()
    sockets = socket_names(directories)
    return sorted(name for name in present if choose(name, present, sockets))
