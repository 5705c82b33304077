# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derived preshared keys, from files into the device, over both transports: set, compared, changed, taken away, never shown."""

from __future__ import annotations

import base64
import os

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk as psk
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk_files
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_netlink import NetlinkClient
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_uapi import UapiClient
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils import wg_fakes

SECRET = "gSQT2aHkYbq0mXJ8r1nZfVw5cLpE7uDi93KoA64xRtM="
# more than one message of netlink holds
NUMBER = 120
NAMES = ["node-%d" % number for number in range(NUMBER)]


class Device:
    """A node's device and its directory of preshared keys."""

    def __init__(self, folder, transport):
        self.folder, self.transport = str(folder / "wg0.psk"), transport
        if transport == "netlink":
            self.fake = wg_fakes.FakeKernel()
            self.client = NetlinkClient(self.fake.make_socket)
            self.peers = self.fake.devices["wg0"]["peers"]
        else:
            self.fake = wg_fakes.FakeUserspace(folder)
            self.client = UapiClient(directories=(str(folder),), wait=0)
            self.peers = self.fake.device["peers"]
        self.shown = []

    def write(self, keys):
        with _psk_files.Folder(self.folder, create=True) as there:
            there.write({name: psk.encode(key) for name, key in keys.items()})

    def wanted(self, keys, files=True):
        paths = psk.paths_of(self.folder, keys)
        peers = {key: {"endpoint": None, "allowed_ips": ["10.0.%d.0/24" % number], "keepalive": 0, "name": NAMES[number],
                       "preshared_key_file": paths[key] if files else None} for number, key in enumerate(keys)}
        return {"public_key": None, "private_key_file": "/none", "listen_port": None, "fwmark": None, "keep_unknown_peers": False,
                "peers": peers}

    def read(self, keys):
        return self.client.read("wg0", psk.paths_of(self.folder, keys))

    def steps(self, keys, files=True):
        state = self.read(keys)
        wanted = self.wanted(keys, files)
        # the device has a key of its own: what is about it is not looked at here
        wanted["public_key"] = state["public_key"] = "x"
        steps = plan.plan_device(state, wanted)
        self.shown += [repr(state), repr(steps), plan.device_as_text(state)] + [line for step in steps for line in plan.describe(step)]
        return steps

    def converge(self, keys, files=True):
        steps = self.steps(keys, files)
        self.client.apply("wg0", steps)
        assert self.steps(keys, files) == []
        return steps

    def stored(self):
        """What the device itself has: {public key: preshared key}."""
        return {base64.b64encode(raw).decode(): peer["psk"] for raw, peer in self.peers.items()}

    def close(self):
        if self.transport == "uapi":
            self.fake.close()


@pytest.fixture(params=["netlink", "uapi"])
def device(request, tmp_path):
    os.chmod(str(tmp_path), 0o700)
    it = Device(tmp_path, request.param)
    yield it
    it.close()
    for key in keys(SECRET).values():
        for form in (base64.b64encode(key).decode(), key.hex(), repr(key), repr(bytearray(key))):
            assert not any(form in text for text in it.shown)


def keys(secret):
    nodes = {name: {"state": "member", "reason": "", "public_keys": {"0": wg_fakes.key_of(name)}} for name in NAMES + ["own"]}
    return psk.keys_of_node({"nodes": nodes, "serial": 1}, "own", 0, secret)["keys"]


def test_from_the_secret_to_the_device(device):
    mine = keys(SECRET)
    device.write(mine)
    steps = device.converge(mine)
    assert [step["op"] for step in steps] == ["add_peer"] * NUMBER and device.stored() == mine
    assert all(peer["has_preshared_key"] and peer["preshared_key_matches"] for peer in device.read(mine)["peers"].values())


def test_one_that_changes_is_the_only_one_that_is_touched(device):
    mine = keys(SECRET)
    device.write(mine)
    device.converge(mine)
    name = sorted(mine)[7]
    other = dict(mine, **{name: b"\x55" * 32})
    device.write({name: other[name]})
    state = device.read(mine)
    assert [key for key in mine if not state["peers"][key]["preshared_key_matches"]] == [name]
    before = {key: list(peer["ips"]) if "ips" in peer else None for key, peer in device.peers.items()}
    path = psk.paths_of(device.folder, [name])[name]
    assert device.converge(mine) == [{"op": "update_peer", "public_key": name, "preshared_key_file": path}]
    assert device.stored() == other
    assert before == {key: list(peer["ips"]) if "ips" in peer else None for key, peer in device.peers.items()}


def test_a_peer_that_has_none_gets_one_and_loses_it_again(device):
    mine = keys(SECRET)
    device.converge(mine, files=False)
    assert set(device.stored().values()) == {bytes(32)}
    device.write(mine)
    steps = device.converge(mine)
    assert [step["op"] for step in steps] == ["update_peer"] * NUMBER and device.stored() == mine
    steps = device.converge(mine, files=False)
    assert all(step["op"] == "update_peer" and step["preshared_key_file"] is None for step in steps)
    assert set(device.stored().values()) == {bytes(32)}


def test_a_peer_that_goes_takes_its_key_along(device):
    mine = keys(SECRET)
    device.write(mine)
    device.converge(mine)
    rest = {name: mine[name] for name in sorted(mine)[1:]}
    assert [step["op"] for step in device.converge(rest) if step["op"] != "add_allowed_ips"][-1] == "remove_peer"
    assert device.stored() == rest


@pytest.mark.parametrize("content", [None, "", "x" * 44, psk.encode(bytes(32)), "U1VQRVJTRUNSRVQ="])
def test_a_file_that_is_missing_or_damaged_stops_everything_before_it_begins(device, content):
    mine = keys(SECRET)
    device.write(mine)
    name = sorted(mine)[-1]
    path = psk.paths_of(device.folder, [name])[name]
    if content is None:
        os.unlink(path)
    else:
        with open(path, "w", encoding="ascii") as handle:
            handle.write(content)
    with pytest.raises(MeshError) as caught:
        device.client.apply("wg0", device.steps(mine))
    assert path in str(caught.value) and device.peers == {} and (not content or content not in str(caught.value))


def test_what_was_sent_is_wiped(device):
    mine = keys(SECRET)
    device.write(mine)
    device.converge(mine)
    if device.transport == "netlink":
        assert len(device.fake.sent) > 1 and not any(any(bytes(view)) for view in device.fake.buffers)
        assert not device.fake.dirty, "nor is what was received left"
