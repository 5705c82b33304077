# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import ipaddress
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _link_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

OWN = ["198.18.0.11/32", "2001:db8::b/128", "fe80::1234:5678:9abc:def0/64"]
ADDRESSES = OWN + ["198.18.0.99/32", "fe80::dead:beef/64", "10.244.1.0/32", "2001:db8::ff/128"]


@pytest.mark.parametrize("name,interface,expected", [
    ("wgmesh0", "wgmesh0", True), ("wgmesh1", "wgmesh0", True), ("wgmesh0", "wgmesh1", True), ("wgmesh2", "wgmesh0", False),
    ("wgmesh", "wgmesh0", False), ("eth0", "wgmesh0", False), ("mesh", "mesh", True), ("mesh1", "mesh", False), ("mesh2", "mesh", False)])
def test_generations(name, interface, expected):
    assert plan.is_generation(name, interface) == expected


# --- a device as the kernel has it -------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """What the kernel answers when a step comes too early."""


class Device:
    """A link to which steps are done; it does what the kernel does beside them."""

    def __init__(self, link):
        self.link = copy.deepcopy(link)
        self.peers = False

    def has_ipv6(self):
        return self.link["mtu"] >= 1280

    def apply(self, step):
        op = step["op"]
        if op == "create_link":
            if self.link is not None:
                raise Refused("File exists")
            self.link = {"kind": plan.KINDS[step["implementation"]][0], "mtu": 1420, "up": False, "addrgenmode": "eui64", "addresses": []}
        elif op == "set_addrgenmode":
            if not self.has_ipv6():
                raise Refused("Address family not supported by protocol")
            self.link["addrgenmode"] = "none"
        elif op == "set_mtu":
            had = self.has_ipv6()
            self.link["mtu"] = step["mtu"]
            if not self.has_ipv6():
                self.link.update(addresses=[text for text in self.link["addresses"] if ":" not in text], addrgenmode="")
            elif not had:
                self.link["addrgenmode"] = "eui64"
                self.automatic_address()
        elif op == "add_address":
            if step["address"] in self.link["addresses"]:
                raise Refused("File exists")
            if ":" in step["address"] and not self.has_ipv6():
                raise Refused("Operation not supported")
            self.link["addresses"].append(step["address"])
        elif op == "remove_address":
            if step["address"] not in self.link["addresses"]:
                raise Refused("Cannot assign requested address")
            self.link["addresses"].remove(step["address"])
        elif op == "set_up":
            self.link["up"] = True
            self.automatic_address()
        else:
            raise AssertionError(op)

    def automatic_address(self):
        """What addrconf does with a device that comes up, or is up when it gets IPv6."""
        if self.link["up"] and self.link["addrgenmode"] != "none":
            self.link["addresses"].append("fe80::automatic/64")


@st.composite
def links(draw):
    kind = draw(st.sampled_from(["wireguard", "tun"]))
    mtu = draw(st.sampled_from([1420, 1380, 1280, 1200]))
    up = draw(st.booleans())
    addresses = draw(st.lists(st.sampled_from(ADDRESSES), unique=True))
    if mtu < 1280:
        addresses = [text for text in addresses if ":" not in text]
    mode = draw(st.sampled_from(["none", "eui64", "random"])) if mtu >= 1280 else ""
    return {"kind": kind, "mtu": mtu, "up": up, "addrgenmode": mode, "addresses": addresses}


currents = st.one_of(st.none(), links())
wishes = st.builds(
    lambda mtu, addresses, implementation: {"interface": "wgmesh0", "implementation": implementation, "mtu": mtu, "addresses": addresses},
    st.sampled_from([1420, 1380, 1280]), st.lists(st.sampled_from(OWN), unique=True), st.sampled_from(["kernel", "userspace"]))


def carry_out(current, wanted):
    """(step, link after it) for each step; the peers come between the two parts."""
    device = Device(current)
    before, after = plan.plan_link(current, wanted)
    for step in before:
        device.apply(step)
        yield step, copy.deepcopy(device.link)
    device.peers = True
    for step in after:
        device.apply(step)
        yield step, copy.deepcopy(device.link)


def reached(current, wanted):
    return ([current] + [link for dummy, link in carry_out(current, wanted)])[-1]


@given(currents, wishes)
def test_the_plan_gives_what_is_wanted(current, wanted):
    link = reached(current, wanted)
    assert link is not None and link["up"] and link["mtu"] == wanted["mtu"]
    own = [text for text in link["addresses"] if text != "fe80::automatic/64"]
    assert sorted(own) == sorted(wanted["addresses"])
    if plan.has_ipv6(wanted["addresses"]):
        assert link["addrgenmode"] == "none"
        # Only a device that was up while it had no IPv6 gets one; it goes with the next run.
        if current is None or current["mtu"] >= 1280 or not current["up"]:
            assert own == link["addresses"], "no automatic address"


@given(currents, wishes)
def test_a_second_plan_is_empty(current, wanted):
    link = reached(current, wanted)
    link["addresses"] = [text for text in link["addresses"] if text != "fe80::automatic/64"]
    assert plan.plan_link(link, wanted) == ([], [])


@given(links(), wishes)
def test_an_address_that_stays_is_never_gone(current, wanted):
    stays = set(current["addresses"]) & set(wanted["addresses"])
    for step, link in carry_out(current, wanted):
        assert stays <= set(link["addresses"]), step


@given(links(), wishes)
def test_there_is_always_a_wanted_address_of_a_family_that_had_one(current, wanted):
    """Old ones go last: at no time has a device none that is wanted, once it has one."""
    seen = False
    for step, link in carry_out(current, wanted):
        has = bool(set(link["addresses"]) & set(wanted["addresses"]))
        assert has or not seen, step
        seen = seen or has
        if step["op"] == "remove_address":
            assert set(wanted["addresses"]) <= set(link["addresses"])


@given(currents, wishes)
def test_the_mode_is_set_before_the_device_comes_up(current, wanted):
    before, after = plan.plan_link(current, wanted)
    assert "set_up" not in [step["op"] for step in before]
    assert "set_addrgenmode" not in [step["op"] for step in after]
    operations = [step["op"] for step in before + after]
    if "create_link" in operations:
        assert operations[0] == "create_link"
        earlier = [place for place, op in enumerate(operations) if op in ("add_address", "set_mtu", "create_link")]
        assert operations.index("set_up") > max(earlier)


@given(currents, wishes)
def test_steps_are_plain_and_can_be_described(current, wanted):
    steps = [step for part in plan.plan_link(current, wanted) for step in part]
    assert json.loads(json.dumps(steps)) == steps
    for step in steps:
        assert "wgmesh0" in plan.describe(step, "wgmesh0") or step.get("address") in plan.describe(step, "wgmesh0")
    assert plan.describe({"op": "remove_link"}, "wgmesh0") == "remove device wgmesh0"


def test_the_first_plan_of_a_device():
    wanted = {"interface": "wgmesh0", "implementation": "userspace", "mtu": 1380, "addresses": OWN}
    before, after = plan.plan_link(None, wanted)
    assert before == [{"op": "create_link", "implementation": "userspace"}, {"op": "set_addrgenmode"}]
    assert after == [{"op": "set_mtu", "mtu": 1380, "before": 0}] + [{"op": "add_address", "address": text} for text in OWN] + [
        {"op": "set_up"}]


def test_a_node_without_ipv6():
    """Its kernel would refuse the mode."""
    wanted = {"interface": "wgmesh0", "implementation": "kernel", "mtu": 1380, "addresses": OWN[:1]}
    link = {"kind": "wireguard", "mtu": 1380, "up": True, "addrgenmode": "", "addresses": OWN[:1]}
    assert plan.plan_link(link, wanted) == ([], [])
    assert [step["op"] for part in plan.plan_link(None, wanted) for step in part] == ["create_link", "set_mtu", "add_address", "set_up"]


def test_a_device_that_lost_ipv6_by_its_mtu():
    wanted = {"interface": "wgmesh0", "implementation": "kernel", "mtu": 1380, "addresses": OWN}
    link = {"kind": "wireguard", "mtu": 1200, "up": True, "addrgenmode": "", "addresses": OWN[:1]}
    before, after = plan.plan_link(link, wanted)
    assert [step["op"] for step in before] == ["set_mtu", "set_addrgenmode"]
    assert [step["op"] for step in after] == ["add_address", "add_address"]


def test_addresses_compare_however_they_are_written():
    link = {"kind": "tun", "mtu": 1420, "up": True, "addrgenmode": "none", "addresses": ["2001:DB8:0::b/128", "198.18.0.11/32"]}
    wanted = {"interface": "wgmesh0", "implementation": "userspace", "mtu": 1420, "addresses": ["198.18.0.11/32", "2001:db8::b/128"]}
    assert plan.plan_link(link, wanted) == ([], [])


# --- what is refused ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("implementation,kind,words", [
    ("kernel", "tun", "implementation"), ("userspace", "wireguard", "implementation"), ("kernel", "bridge", "kind bridge"),
    ("userspace", "veth", "kind veth"), ("kernel", "", "kind unknown")])
def test_devices_of_another_kind(implementation, kind, words):
    with pytest.raises(MeshError, match=words):
        plan.check_kind("wgmesh0", implementation, {"kind": kind})


@pytest.mark.parametrize("implementation,link", [("kernel", None), ("userspace", None), ("kernel", {"kind": "wireguard"}),
                                                 ("userspace", {"kind": "tun"})])
def test_devices_of_the_right_kind(implementation, link):
    assert plan.check_kind("wgmesh0", implementation, link) is None


def test_mtu_that_ipv6_does_not_survive():
    with pytest.raises(MeshError, match=r"1279.*wgmesh0.*1280.*1340.*1360"):
        plan.check_mtu(1279, OWN, "wgmesh0")
    assert plan.check_mtu(1280, OWN, "wgmesh0") is None
    assert plan.check_mtu(1000, OWN[:1], "wgmesh0") is None, "IPv4 alone lives with less"


# --- text and what ip prints -------------------------------------------------------------------------------------------------------------

def test_link_for_people():
    link = {"kind": "wireguard", "mtu": 1420, "up": True, "addrgenmode": "none", "addresses": ["fe80::1/64", "198.18.0.11/32"]}
    assert plan.link_as_text(link, "wgmesh0") == (
        "link wgmesh0 kind wireguard mtu 1420 up addrgenmode none\naddress 198.18.0.11/32\naddress fe80::1/64\n")
    assert plan.link_as_text(dict(link, up=False, addrgenmode="", addresses=[]), "wgmesh0") == (
        "link wgmesh0 kind wireguard mtu 1420 down addrgenmode -\n")
    assert plan.link_as_text(None, "wgmesh0") == ""


@given(links(), wishes)
def test_text_shows_every_change_but_the_kind(current, wanted):
    """A plan with steps is a diff with lines."""
    after = {"kind": current["kind"], "mtu": wanted["mtu"], "up": True, "addresses": wanted["addresses"],
             "addrgenmode": "none" if plan.has_ipv6(wanted["addresses"]) else current["addrgenmode"]}
    differs = plan.link_as_text(current, "wgmesh0") != plan.link_as_text(after, "wgmesh0")
    assert differs == (plan.plan_link(current, wanted) != ([], []))


with open(os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "ip", "ip.json"), encoding="utf-8") as handle:
    IP = json.load(handle)


@pytest.mark.parametrize("outputs", [
    pytest.param(item["outputs"], id=item["version"].split("-")[1].split(",")[0]) for item in IP["recorded"]])
def test_recorded_link(outputs):
    item = json.loads(outputs["-j -N -d link show dev wgmesh0"]["stdout"])[0]
    assert plan.link_from_ip(item, ["b", "a"]) == {
        "kind": "veth", "mtu": 1420, "up": True, "addrgenmode": "none", "addresses": ["a", "b"]}


def test_link_of_nothing():
    assert plan.link_from_ip(None, []) is None
    assert plan.link_from_ip({}, []) == {"kind": "", "mtu": 0, "up": False, "addrgenmode": "", "addresses": []}


@given(st.ip_addresses(), st.data())
def test_canonical_addresses(address, data):
    length = data.draw(st.integers(0, address.max_prefixlen))
    text = "%s/%d" % (address, length)
    assert plan.canonical(text) == str(ipaddress.ip_interface(text)) == plan.canonical(plan.canonical(text))
