# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import pathlib

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg as wg
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError


@pytest.mark.parametrize(("kinds", "sockets", "expected"), [
    ({"wg0": "wireguard"}, [], "netlink"),
    ({"wg0": "wireguard"}, ["wg0"], "netlink"),  # a socket left behind by a userspace implementation of the past
    ({"wg0": "tun"}, ["wg0"], "uapi"),
    ({"wg0": "tun"}, [], None),  # another VPN's
    ({"wg0": "dummy"}, ["wg1"], None),
    ({}, ["wg0"], None),  # of another network namespace
    ({}, [], None),
])
def test_which_transport(kinds, sockets, expected):
    assert wg.choose("wg0", kinds, sockets) == expected


def test_clients(tmp_path):
    kinds = {"wg0": "wireguard", "wg1": "tun", "tun0": "tun", "eth0": None}
    (tmp_path / "wg1.sock").touch()
    options = {"directories": (str(tmp_path),), "kinds": lambda: kinds}
    assert wg.client_for("wg0", **options).transport == "netlink"
    assert wg.client_for("wg1", **options).transport == "uapi"
    with pytest.raises(WireGuardError, match="no WireGuard device: its kind is tun") as caught:
        wg.client_for("tun0", **options)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(WireGuardError, match=r"device wg2: .*ENODEV.*enable") as caught:
        wg.client_for("wg2", **options)
    assert caught.value.errno == errno.ENODEV
    assert wg.device_names(**options) == ["wg0", "wg1"]


def test_waits_for_the_device(tmp_path):
    looks = []

    def kinds():
        looks.append(1)
        if len(looks) == 2:
            pathlib.Path(tmp_path, "wg0.sock").touch()
        return {"wg0": "tun"} if len(looks) > 2 else {}

    assert wg.client_for("wg0", wait=60.0, directories=(str(tmp_path),), kinds=kinds).transport == "uapi"
    assert len(looks) == 3


@pytest.mark.parametrize("name", ["", "../x", "a" * 16])
def test_names_that_no_device_has(name):
    with pytest.raises(MeshError, match="no name"):
        wg.client_for(name, kinds=dict)
