# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The detour: its steps against what nft sends for the same rules, its life against a socket that answers.

tests/live/test_conntrack_live.py has it against the real kernel, with packets.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack as ct
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack_detour as detour
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _nft_netlink
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.nft_fakes import NfSocket

with open(os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "conntrack", "detour.json"), encoding="utf-8") as handle:
    RECORDED = [bytes.fromhex(text) for text in json.load(handle)["messages"]]
V4 = {"src": bytes([10, 244, 1, 2]), "dst": bytes([10, 244, 2, 2]), "proto": 17, "zone": None, "ports": (1111, 53)}
V6 = {"src": bytes.fromhex("fd000001000000000000000000000002"), "dst": bytes.fromhex("fd000002000000000000000000000002"), "proto": 6,
      "zone": None, "ports": (2222, 443)}


def tree(data):
    """Attributes as sorted [(type, payload or, where the attribute is nested, such a list)]; those of one type keep their order."""
    found, offset = [], 0
    while offset < len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        content = data[offset + 4:offset + length]
        found.append((kind & 0x3FFF, tree(content) if kind & 0x8000 else content))
        offset += length + 3 & ~3
    return sorted(found, key=lambda item: item[0])


def said_by_nft(kind):
    return [tree(data[20:]) for data in RECORDED if data[4] == kind]


def without(parts, *kinds):
    return [(kind, content) for kind, content in parts if kind not in kinds]


def in_words(expressions):
    """Expressions with registers as numbers of 4 bytes: nft calls the first, fifth, ... of those 1, 2, ..."""
    words = []
    for dummy, ((dummy2, name), (dummy3, parts)) in expressions:
        name = name.rstrip(b"\0").decode()
        parts = dict(without(parts, 4) if name == "lookup" else parts)
        for kind in {"meta": [1], "payload": [1], "lookup": [2]}.get(name, []):
            register = struct.unpack("!I", parts[kind])[0]
            parts[kind] = register if register > 4 else 4 + 4 * register
        words.append((name, parts))
    return words


@pytest.mark.parametrize("place,length", [(0, 4), (1, 16)])
def test_the_rules_are_those_of_nft(place, length):
    recorded = dict(said_by_nft(_nft_netlink.NFT_MSG_NEWRULE)[place])
    kind, data = _nft_netlink.rule_step(detour.TABLE, "prerouting", detour.rule_expressions(length, False))
    made = dict(tree(data))
    assert kind == _nft_netlink.NFT_MSG_NEWRULE and (made[1], made[2]) == (recorded[1], recorded[2])
    assert in_words(made[4]) == in_words(recorded[4])


@pytest.mark.parametrize("length,protocol", [(4, 1), (16, 58)])
def test_queries_and_answers_of_icmp(length, protocol):
    """Identifier where the source port is, type and code where the other one is; and only ICMP."""
    ports, icmp = (in_words([(1, item) for dummy, item in tree(b"".join(detour.rule_expressions(length, icmp)))]) for icmp in (False, True))
    different = [(one, other) for one, other in zip(ports, icmp) if one != other]
    assert [(one[0], one[1][3], other[1][3]) for one, other in different[1:]] == [
        ("payload", struct.pack("!I", 0), struct.pack("!I", 4)), ("payload", struct.pack("!I", 2), struct.pack("!I", 0))]
    assert different[0] == (("cmp", {1: b"\0\0\0\1", 2: b"\0\0\0\1", 3: [(1, bytes([protocol]))]}),
                            ("cmp", {1: b"\0\0\0\1", 2: b"\0\0\0\0", 3: [(1, bytes([protocol]))]}))


@pytest.mark.parametrize("place,length", [(0, 4), (1, 16)])
def test_the_sets_are_those_of_nft(place, length):
    kind, data = detour.set_step(length)
    # description, number, notes of nft
    assert kind == _nft_netlink.NFT_MSG_NEWSET
    assert without(tree(data), 10) == without(said_by_nft(kind)[place], 9, 10, 13)


def test_the_elements_are_those_of_nft():
    steps = detour.lead_steps({detour.key(V4), detour.key(V6)})
    assert [kind for kind, dummy in steps] == [_nft_netlink.NFT_MSG_NEWSETELEM] * 2
    assert [tree(data) for dummy, data in steps] == [without(parts, 4) for parts in said_by_nft(_nft_netlink.NFT_MSG_NEWSETELEM)]
    assert len(detour.lead_steps({detour.key(V6)})) == 1


def test_to_take_all_elements_out():
    steps = detour.release_steps()
    assert [kind for kind, dummy in steps] == [_nft_netlink.NFT_MSG_DELSETELEM] * 2
    assert tree(steps[0][1]) == said_by_nft(_nft_netlink.NFT_MSG_DELSETELEM)[0]


def test_keys():
    assert detour.key(V4).hex() == "0af401020af40202110000000457000000350000"
    ping = dict(V4, proto=1, icmp=(0x1234, 8, 0))
    del ping["ports"]
    assert detour.key(ping).hex() == "0af401020af40202010000001234000008000000"


def test_the_table():
    steps = detour.detour_steps()
    assert [kind for kind, dummy in steps] == [9, 9] + [3, 6, 6, 6, 6] * 2
    chains = [dict(tree(data)) for kind, data in steps if kind == 3]
    assert chains[0] == dict(said_by_nft(_nft_netlink.NFT_MSG_NEWCHAIN)[0])
    assert [(chain[3], dict(chain[4])[1]) for chain in chains] == [(b"prerouting\0", b"\0\0\0\0"), (b"output\0", b"\0\0\0\3")]


def test_a_full_detour_fits_into_one_attribute_and_message():
    """The length of an attribute is 16 bits; a socket sends 208 KiB by default."""
    keys = {detour.key(dict(V6, ports=(port, 443))) for port in range(2 * detour.CAPACITY)}
    ((dummy, data),) = detour.lead_steps(keys)
    assert len(dict(tree(data))[3]) == 2 * detour.CAPACITY


# --- its life ----------------------------------------------------------------------------------------------------------------------------

CONNECTION = {"orig": V4, "reply": dict(V4, src=V4["dst"], dst=bytes([198, 18, 0, 1]), ports=(53, 1111))}


def detour_with(monkeypatch, codes, waits=True):
    """(detour, its socket, list of the moments of waiting as numbers of transactions sent)"""
    it, waited = NfSocket(codes), []

    def wait():
        if not waits:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        waited.append(len(it.sent))

    monkeypatch.setattr(_nft_netlink, "open_socket", lambda: it)
    monkeypatch.setattr(detour, "wait_for_packets", wait)
    return detour.Detour(), it, waited


def kinds(transaction):
    return [kind & 0xFF for kind, dummy, dummy2 in transaction[1:-1]]


def test_there_and_back(monkeypatch):
    it, handle, waited = detour_with(monkeypatch, [(0, 0)] * 4)
    it.start()
    assert it.active and it.lead([CONNECTION]) and it.release()
    it.stop()
    assert [kinds(sent) for sent in handle.sent[1:]] == [[12], [14, 14], [2]] and waited == [2, 3] and handle.closed


def test_a_kernel_without_zones(monkeypatch):
    it, handle, dummy = detour_with(monkeypatch, [(6, errno.EOPNOTSUPP)] * 2)
    it.start()
    assert not it.active and len(handle.sent) == 2
    it.stop()
    assert handle.closed


def test_what_cannot_be_led_is_not(monkeypatch):
    """Then the table goes, and no packet with it."""
    it, handle, waited = detour_with(monkeypatch, [(0, 0), (0, errno.ENOSPC), (0, 0)])
    it.start()
    assert not it.lead([CONNECTION]) and handle.closed
    assert it.release() and waited == [3], "the copies can go when the last packet has passed"


def test_without_knowing_when_packets_have_passed(monkeypatch):
    it, handle, dummy = detour_with(monkeypatch, [(0, 0), (0, 0), (0, 0)], waits=False)
    it.start()
    assert not it.lead([CONNECTION]) and handle.closed and not it.active
    assert not it.release(), "the copies stay"


def test_a_release_that_fails_takes_the_table_away(monkeypatch):
    it, handle, dummy = detour_with(monkeypatch, [(0, 0), (0, 0), (0, errno.EIO), (0, 0)])
    it.start()
    assert it.lead([CONNECTION])
    assert not it.release() and handle.closed and kinds(handle.sent[-1]) == [2]


def test_waiting_is_closing_a_packet_socket_that_is_given_nothing(monkeypatch):
    made = []

    class Socket:
        def __init__(self, *arguments):
            made.append(arguments)

        def close(self):
            made.append("closed")

    monkeypatch.setattr(detour.socket, "socket", Socket)
    detour.wait_for_packets()
    assert made == [(socket.AF_PACKET, socket.SOCK_RAW, 0), "closed"]


# --- copies ------------------------------------------------------------------------------------------------------------------------------

def entry(**changes):
    base = {"family": 2, "status": 0x1E, "timeout": 60, "mark": 7, "zone": None, "labels": None, "id": b"abcd", "child": False, "tcp": None,
            "protoinfo": None, "as_is": {}}
    return dict(base, **CONNECTION, **changes)


def test_a_copy_is_the_same_connection_in_another_zone():
    copy = ct.decode_connection(2, ct.create_attributes(ct.copy_of(entry())))
    same = ct.decode_connection(2, ct.create_attributes(entry()))
    assert copy["zone"] == detour.ZONE and copy["timeout"] == detour.COPY_LIFETIME > detour.LIFETIME
    assert copy["status"] == same["status"] | ct.IPS_FIXED_TIMEOUT and not same["status"] & ct.IPS_FIXED_TIMEOUT
    assert {name: copy[name] for name in ("orig", "reply", "mark")} == {name: same[name] for name in ("orig", "reply", "mark")}
    everywhere = ct.packed_networks(["0.0.0.0/0"])
    assert not ct.must_move(ct.copy_of(entry()), everywhere) and ct.must_move(entry(), everywhere)


@pytest.mark.parametrize("change", [{"zone": 5}, {"orig": dict(V4, zone=5)}, {"reply": dict(CONNECTION["reply"], zone=5)}])
def test_a_connection_in_a_zone_is_not_led(change):
    assert ct.has_no_zone(entry()) and not ct.has_no_zone(dict(entry(), **change))


@pytest.mark.parametrize("before,after,told", [(3, 3, None), (2, 3, None), (3, 4, 4), (3, 8, 8), (4, 4, None), (4, 7, 7)])
def test_what_a_copy_saw_of_the_end_of_tcp(before, after, told):
    one, other = (entry(tcp={"state": state, "wscale": (0, 0), "flags": (0, 0)}) for state in (before, after))
    data = ct.end_attributes(one, other)
    if told is None:
        assert data is None
    else:
        said = ct.decode_connection(2, data)
        assert (said["orig"], said["tcp"]["state"], said["timeout"], said["zone"]) == (V4, told, ct.CLOSING_LIFETIME, None)


def test_what_a_copy_saw_of_the_end_of_sctp():
    assert ct.end_attributes(entry(protoinfo=b"abcd"), entry(protoinfo=b"abcd")) is None
    assert ct.end_attributes(entry(), entry()) is None
    assert b"efgh" in ct.end_attributes(entry(protoinfo=b"abcd"), entry(protoinfo=b"efgh"))
