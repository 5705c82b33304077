# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel tells of what somebody takes away; with a kernel it is shown in tests/live."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_drift as drift
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kernel_watch
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import attribute

DEVICES, TABLES = ("wgmesh0", "wgmesh1"), (51840, 51841)
INET, INET6 = socket.AF_INET, socket.AF_INET6


def message(kind, body):
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + b"\0" * (-len(body) % 4)


def link(kind=drift.RTM_NEWLINK, name="wgmesh0", flags=0, family=0):
    return message(kind, struct.pack("=BBHiII", family, 0, 0, 7, flags, 0) + attribute(drift.IFLA_IFNAME, name.encode() + b"\0"))


def packed(text):
    return ipaddress.ip_address(text).packed


def address(text, length, family=INET):
    return message(drift.RTM_DELADDR, struct.pack("=BBBBI", family, length, 0, 0, 7)
                   + attribute(drift.IFA_ADDRESS, packed(text)) + (attribute(drift.IFA_LOCAL, packed(text)) if family == INET else b""))


def route(text, length, family=INET, table=51840, kind=drift.RTM_DELROUTE):
    return message(kind, struct.pack("=BBBBBBBBI", family, length, 0, 0, 252, 4, 0, 1, 0)
                   + (attribute(drift.RTA_DST, packed(text)) if text else b"") + attribute(drift.RTA_TABLE, struct.pack("=I", table)))


def rule(priority=400, source="", length=0, iif="", table=51840, family=INET, kind=drift.RTM_DELRULE):
    parts = attribute(drift.FRA_TABLE, struct.pack("=I", table)) + attribute(drift.FRA_PRIORITY, struct.pack("=I", priority))
    parts += attribute(drift.FRA_SRC, packed(source)) if source else b""
    parts += attribute(drift.FRA_IIFNAME, iif.encode() + b"\0") if iif else b""
    return message(kind, struct.pack("=BBBBBBBBI", family, 0, length, 0, 252, 0, 0, 1, 0) + parts)


@pytest.mark.parametrize("data,found", [
    (link(), ("link", "wgmesh0")),
    (link(drift.RTM_DELLINK, "wgmesh1", drift.IFF_UP), ("link", "wgmesh1")),
    (address("10.244.1.0", 32), ("address", "10.244.1.0/32")),
    (address("fd00:1::", 128, INET6), ("address", "fd00:1::/128")),
    (route("10.244.2.0", 24), ("route", 51840, "10.244.2.0/24")),
    (route("fd00:2::", 64, INET6, 51841), ("route", 51841, "fd00:2::/64")),
    (route("", 0), ("route", 51840, "0.0.0.0/0")),
    (rule(), ("rule", "ipv4", 400, 51840, "", "")),
    (rule(401, "fd00:1::", 64, family=INET6), ("rule", "ipv6", 401, 51840, "fd00:1::/64", "")),
    (rule(iif="cali123"), ("rule", "ipv4", 400, 51840, "", "cali123")),
])
def test_what_is_gone(data, found):
    assert drift.taken_away(data, DEVICES, TABLES) == [found]
    # whatever comes before it in the datagram; half a message is no reason to stop
    assert drift.taken_away(link(name="eth0") + data, DEVICES, TABLES) == [found]
    for cut in range(len(data)):
        drift.taken_away(data[:cut], DEVICES, TABLES)


@pytest.mark.parametrize("data", [
    link(flags=drift.IFF_UP), link(name="wgmesh2"), link(drift.RTM_DELLINK, family=socket.AF_BRIDGE),
    route("10.0.0.0", 8, table=254), rule(table=100),
    route("10.244.2.0", 24, kind=24), rule(kind=32), address("10.244.1.0", 32, 200), b"", b"\0" * 64,
])
def test_what_is_not(data):
    assert drift.taken_away(data, DEVICES, TABLES) == []


def test_an_address_of_another_length():
    broken = message(drift.RTM_DELROUTE, struct.pack("=BBBBBBBBI", INET, 24, 0, 0, 252, 4, 0, 1, 0)
                     + attribute(drift.RTA_DST, b"abc") + attribute(drift.RTA_TABLE, struct.pack("=I", 51840)))
    assert drift.taken_away(broken + route("10.244.2.0", 24), DEVICES, TABLES) == [("route", 51840, "10.244.2.0/24")]


LEFT = (0, {"addresses": ["10.244.1.0/32"]}, {"name": "wgmesh0"}, {
    "routes": [{"family": "ipv4", "table": 51840, "dst": "10.244.2.0/24"}],
    "rules": [{"family": "ipv4", "priority": 400, "table": 51840, "from": "10.244.1.0/24", "iif": ""}]})


@pytest.mark.parametrize("item", [
    ("link", "wgmesh0"), ("address", "10.244.1.0/32"), ("route", 51840, "10.244.2.0/24"),
    ("rule", "ipv4", 400, 51840, "10.244.1.0/24", ""),
])
def test_only_what_was_to_stay_is_missing(item):
    assert item in drift.things(LEFT) and (item[0], "other", *item[2:]) not in drift.things(LEFT)
    assert not drift.things(None) and item not in drift.things((0, None, None, {"routes": [], "rules": []}))


def test_when_to_look():
    assert drift.look_at(100.0, []) == drift.look_at(100.0, [99.0, 99.5]) == 100.0 + drift.SETTLE
    assert drift.look_at(100.0, [90.0, 99.0, 99.5]) == 90.0 + drift.LOOKS_WITHIN
    assert drift.look_at(200.0, [90.0, 99.0, 99.5]) == 200.0 + drift.SETTLE


class Socket:
    def __init__(self, answers):
        self.answers, self.groups = list(answers), []

    def __enter__(self):
        return self

    def __exit__(self, *dummy):
        pass

    def setsockopt(self, level, option, value):
        assert (level, option) == (_kernel_watch.SOL_NETLINK, _kernel_watch.NETLINK_ADD_MEMBERSHIP)
        self.groups.append(value)

    def settimeout(self, value):
        assert value is None

    def recv(self, size):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_watcher_tells_what_it_hears_and_what_it_missed(monkeypatch):
    heard, failed = [], []
    it = Socket([link(name="eth0"), link(), OSError(errno.ENOBUFS, "no room"), rule(), OSError(errno.EPERM, "not allowed")])
    monkeypatch.setattr(_kernel_watch.netlink, "open_socket", lambda protocol: it)
    drift.DriftWatcher(DEVICES, TABLES, heard.append, failed.append).run()
    assert heard == [[("link", "wgmesh0")], None, [("rule", "ipv4", 400, 51840, "", "")]]
    assert failed == ["the kernel cannot be watched (not allowed): what others change is seen by the next comparison"]
    assert tuple(it.groups) == drift.GROUPS
