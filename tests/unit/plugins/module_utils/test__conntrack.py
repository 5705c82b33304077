# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying connections over: the codec against what a kernel said, the steps against a small kernel of our own.

tests/live/test_conntrack_live.py has the same steps against the real one.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import json
import os
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack as ct
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack_detour, _conntrack_guard, _nfnetlink, _nft_netlink
from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import attribute, attributes, message, messages, nested
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.nft_fakes import NfSocket, batch_of

with open(os.path.join(os.path.dirname(__file__), "..", "..", "fixtures", "conntrack", "conntrack.json"), encoding="utf-8") as handle:
    RECORDED = json.load(handle)
NUMBERS = {"ipv4": 2, "ipv6": 10}
NETWORKS = ct.packed_networks(["10.244.2.0/24", "fd00:2::/64"])
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}


def recorded():
    """[(family, connection, attributes as they came)]"""
    return [(family, ct.decode_connection(NUMBERS[family], bytes.fromhex(text)), attributes(bytes.fromhex(text)))
            for family, texts in RECORDED["entries"].items() for text in texts]


def one(protocol, family="ipv4", state=None):
    """The recorded masqueraded connection of a protocol."""
    return next(entry for name, entry, dummy in recorded()
                if name == family and entry["orig"]["proto"] == PROTOCOLS[protocol] and entry["status"] & ct.IPS_SRC_NAT
                and (state is None or entry["tcp"]["state"] == state))


def address(text):
    return ipaddress.ip_address(text).packed


# --- what the kernel says ----------------------------------------------------------------------------------------------------------------

def of_proc(line):
    """A line of /proc/net/nf_conntrack as a decoded connection has it, the two tuples, mark and zones."""
    words = line.split()
    fields = [pair.split("=") for pair in words if "=" in pair]
    tuples = [{}, {}]
    found = {"mark": int(dict(fields)["mark"]), "zone": int(dict(fields).get("zone", 0)), "timeout": int(words[4])}
    for name, value in fields:
        if name in ("src", "dst", "sport", "dport", "type", "code", "id", "zone-orig"):
            tuples[0 if name not in tuples[0] else 1][name] = value
    for side, text in zip(("orig", "reply"), tuples):
        found[side] = {"src": address(text["src"]), "dst": address(text["dst"]), "proto": int(words[3]), "zone": None}
        if "zone-orig" in text:
            found[side]["zone"] = int(text["zone-orig"])
        if "sport" in text:
            found[side]["ports"] = (int(text["sport"]), int(text["dport"]))
        else:
            found[side]["icmp"] = (int(text["id"]), int(text["type"]), int(text["code"]))
    return found


def test_decoded_as_the_kernel_shows_it_elsewhere():
    found = [{key: entry[key] for key in ("orig", "reply", "mark")} for dummy, entry, dummy2 in recorded()]
    shown = [of_proc(line) for family in RECORDED["proc"] for line in RECORDED["proc"][family]]
    assert len(found) >= 6

    def order(item):
        return str(sorted(item.items()))

    assert sorted(found, key=order) == sorted(({key: item[key] for key in ("orig", "reply", "mark")} for item in shown), key=order)
    for dummy, entry, dummy2 in recorded():
        line = next(item for item in shown if item["orig"] == entry["orig"])
        assert (entry["zone"] or 0) == line["zone"] and abs(entry["timeout"] - line["timeout"]) <= 2


def test_what_is_recorded():
    tcp = one("tcp", state=3)
    assert tcp["tcp"]["wscale"] != (0, 0) and tcp["mark"] == 0x80 and b"ftp" in tcp["as_is"][ct.CTA_HELP]
    assert tcp["status"] & ct.IPS_DST_NAT and tcp["status"] & ct.IPS_ASSURED
    assert one("icmp")["orig"]["zone"] == 5 and one("icmpv6", "ipv6")["zone"] == 7
    assert one("udp", "ipv6")["mark"] == 0x80004000 and one("udp")["tcp"] is None


def test_tuples_there_and_back():
    for dummy, entry, parts in recorded():
        for kind, side in ((ct.CTA_TUPLE_ORIG, "orig"), (ct.CTA_TUPLE_REPLY, "reply")):
            encoded = attributes(ct.encode_tuple(kind, entry[side]))
            assert encoded[kind] == parts[kind], "the very bytes that the kernel sent"
            assert ct.decode_tuple(encoded[kind]) == entry[side]


@given(st.data())
def test_any_tuple_there_and_back(data):
    length = data.draw(st.sampled_from([4, 16]))
    parts = {"src": data.draw(st.binary(min_size=length, max_size=length)), "dst": data.draw(st.binary(min_size=length, max_size=length)),
             "proto": data.draw(st.sampled_from([6, 17, 132, 1, 58])), "zone": data.draw(st.one_of(st.none(), st.integers(0, 65535)))}
    number = st.integers(0, 65535)
    if parts["proto"] in ct.PORT_PROTOCOLS:
        parts["ports"] = data.draw(st.tuples(number, number))
    else:
        parts["icmp"] = data.draw(st.tuples(number, st.integers(0, 255), st.integers(0, 255)))
    assert ct.decode_tuple(attributes(ct.encode_tuple(ct.CTA_TUPLE_ORIG, parts))[ct.CTA_TUPLE_ORIG]) == parts


@given(st.binary(max_size=200))
def test_garbage_is_survived(data):
    attributes(data)
    list(messages(data))
    try:
        ct.decode_connection(2, data)
    except (struct.error, IndexError):
        pass  # carry_over takes it as a failure


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=20)), unique_by=lambda item: item[0]))
def test_attributes_there_and_back(items):
    data = b"".join(attribute(kind, payload) for kind, payload in items)
    assert attributes(data) == dict(items) and len(data) % 4 == 0
    assert attributes(nested(7, data)) == {7: data}


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 2 ** 32 - 1), st.binary(max_size=30)), max_size=4))
def test_messages_there_and_back(items):
    data = b"".join(message(kind, 0, 2, sequence, b"".join([attribute(1, payload)])) for kind, sequence, payload in items)
    found = [(kind, sequence, attributes(body[4:])[1]) for kind, sequence, body in messages(data)]
    assert found == items


# --- which connections -------------------------------------------------------------------------------------------------------------------

def test_masqueraded_connections_move_and_others_do_not():
    moving = {(family, entry["orig"]["proto"]) for family, entry, dummy in recorded() if ct.must_move(entry, NETWORKS)}
    assert moving == {("ipv4", 6), ("ipv4", 17), ("ipv4", 1), ("ipv6", 17), ("ipv6", 58)}
    for dummy, entry, dummy2 in recorded():
        if not entry["status"] & ct.IPS_SRC_NAT or (entry["tcp"] and entry["tcp"]["state"] != 3):
            assert not ct.must_move(entry, NETWORKS)
    others = ct.packed_networks(["10.244.3.0/24", "203.0.113.0/24", "198.18.0.0/24", "10.244.1.0/24", "fd00:1::/64"])
    assert not any(ct.must_move(entry, others) for dummy, entry, dummy2 in recorded()), "by where packets go in the end"


@pytest.mark.parametrize("change", [
    {"timeout": None}, {"child": True}, {"status": 0xE}, {"tcp": {"state": 7, "wscale": (0, 0), "flags": (0, 0)}},
    {"tcp": {"state": 8, "wscale": (0, 0), "flags": (0, 0)}}])
def test_what_has_no_memory_of_a_device_or_ends(change):
    assert ct.must_move(one("tcp", state=3), NETWORKS)
    assert not ct.must_move(dict(one("tcp", state=3), **change), NETWORKS)


def test_only_protocols_that_can_be_told():
    entry = one("udp")
    gre = dict(entry, orig=dict(entry["orig"], proto=47), reply=dict(entry["reply"], proto=47))
    assert not ct.must_move(gre, NETWORKS)
    sctp = dict(entry, orig=dict(entry["orig"], proto=132), reply=dict(entry["reply"], proto=132))
    assert ct.must_move(sctp, NETWORKS)


@given(st.lists(st.sampled_from(["10.0.0.0/8", "10.244.0.0/16", "10.244.1.0/24", "10.244.2.0/24", "10.244.2.9/32", "10.244.9.0/24",
                                 "198.18.0.1/32", "198.18.0.3/32", "fd00::/16", "fd00:2::/64", "2001:db8::1/128"]), unique=True),
       st.sampled_from(["10.0.0.0", "10.244.1.255", "10.244.2.9", "10.244.3.5", "10.255.255.255", "11.0.0.0", "198.18.0.2", "198.18.0.3",
                        "fd00:2::5", "fd01::", "2001:db8::1", "2001:db8::2"]))
def test_addresses_in_networks_that_may_be_nested(cidrs, text):
    expected = any(ipaddress.ip_address(text) in ipaddress.ip_network(cidr) for cidr in cidrs)
    assert ct.contains(ct.packed_networks(cidrs), address(text)) == expected


# --- what is made anew -------------------------------------------------------------------------------------------------------------------

def nat_of(payload):
    """A CTA_NAT_SRC or CTA_NAT_DST as (address, port or None); both ends of both ranges have to be the same."""
    parts = attributes(payload)
    low, high = (1, 2) if 1 in parts else (4, 5)
    assert parts[low] == parts[high] and set(parts) <= {low, high, 3}
    if 3 not in parts:
        return parts[low], None
    ports = attributes(parts[3])
    assert ports[1] == ports[2]
    return parts[low], struct.unpack("!H", ports[1])[0]


def after_translation(made):
    """The reply tuple that the kernel makes of the attributes of a new connection (nf_nat_setup_info)."""
    reply = dict(ct.decode_tuple(made[ct.CTA_TUPLE_REPLY]))
    for kind, side, place in ((ct.CTA_NAT_DST, "src", 0), (ct.CTA_NAT_SRC, "dst", 1)):
        if kind in made:
            reply[side], port = nat_of(made[kind])
            if "ports" in reply and port is not None:
                reply["ports"] = tuple(port if number == place else old for number, old in enumerate(reply["ports"]))
            elif port is not None:
                reply["icmp"] = (port,) + reply["icmp"][1:]
    return reply


def test_the_new_connection_is_the_old_one():
    for dummy, entry, parts in recorded():
        if not ct.must_move(entry, NETWORKS):
            continue
        made = attributes(ct.create_attributes(entry))
        assert made[ct.CTA_TUPLE_ORIG] == parts[ct.CTA_TUPLE_ORIG]
        assert after_translation(made) == entry["reply"]
        assert (ct.CTA_NAT_DST in made) == bool(entry["status"] & ct.IPS_DST_NAT) and ct.CTA_NAT_SRC in made
        status = struct.unpack("!I", made[ct.CTA_STATUS])[0]
        assert status & ct.IPS_CONFIRMED and status & ~(ct.IPS_CONFIRMED | ct.IPS_CARRIED) == 0
        assert status & ct.IPS_CARRIED == entry["status"] & ct.IPS_CARRIED
        for kind in (ct.CTA_MARK, ct.CTA_ZONE, ct.CTA_HELP, ct.CTA_LABELS):
            if kind in parts and any(parts[kind]):
                assert made[kind] == parts[kind]
        assert ct.CTA_ID not in made and ct.CTA_TUPLE_MASTER not in made


def test_what_is_carried_and_what_not_of_tcp():
    entry = one("tcp", state=3)
    entry["tcp"] = {"state": 3, "wscale": (7, 9), "flags": (0xF7, 0x23)}
    made = attributes(attributes(attributes(ct.create_attributes(entry))[ct.CTA_PROTOINFO])[ct.CTA_PROTOINFO_TCP])
    assert (made[1], made[2], made[3]) == (b"\x03", b"\x07", b"\x09")
    # liberal, window scaling, selective acknowledgements, who began to close; nothing that speaks of sequence numbers
    assert (made[4], made[5]) == (b"\x0f\x0f", b"\x0b\x0f")


@pytest.mark.parametrize("state,made", [(1, 3), (2, 3), (9, 3), (3, 3), (4, 4), (5, 5), (6, 6)])
def test_a_connection_that_is_being_opened(state, made):
    """Its answer may be on the way: in the state of opening, what comes after an answer that was missed would be invalid."""
    assert ct.carried_state(state) == made
    entry = next(entry for dummy, entry, dummy2 in recorded() if entry["tcp"])
    parts = attributes(ct.create_attributes(dict(entry, status=ct.IPS_CONFIRMED, tcp=dict(entry["tcp"], state=state))))
    assert bool(struct.unpack("!I", parts[ct.CTA_STATUS])[0] & ct.IPS_SEEN_REPLY) == (made != state)
    assert attributes(attributes(parts[ct.CTA_PROTOINFO])[ct.CTA_PROTOINFO_TCP])[ct.CTA_PROTOINFO_TCP_STATE] == bytes([made])


def test_time_outs():
    def made(timeout):
        return struct.unpack("!I", attributes(ct.create_attributes(dict(one("udp"), timeout=timeout)))[ct.CTA_TIMEOUT])[0]

    assert (made(5), made(30), made(86400)) == (30, 30, 86400)


def test_what_goes_as_it_is():
    entry = dict(one("udp"), labels=b"\0" * 15 + b"\1", protoinfo=b"abcd", as_is={15: b"1234", 24: b"5678"}, mark=None, zone=9)
    made = attributes(ct.create_attributes(entry))
    assert (made[ct.CTA_LABELS], made[ct.CTA_PROTOINFO], made[15], made[24]) == (entry["labels"], b"abcd", b"1234", b"5678")
    assert made[ct.CTA_ZONE] == b"\0\x09" and ct.CTA_MARK not in made
    assert ct.CTA_LABELS not in attributes(ct.create_attributes(dict(entry, labels=b"\0" * 16)))


def test_a_request_to_delete_always_names_a_connection():
    """Without a tuple the kernel deletes all there are."""
    for dummy, entry, parts in recorded():
        named = attributes(ct.delete_attributes(entry))
        assert named[ct.CTA_TUPLE_ORIG] == parts[ct.CTA_TUPLE_ORIG] and named[ct.CTA_ID] == parts[ct.CTA_ID]
        assert named.get(ct.CTA_ZONE) == parts.get(ct.CTA_ZONE)
        assert ct.CTA_ID not in attributes(ct.delete_attributes(dict(entry, id=None)))


@pytest.mark.parametrize("query,answer", [(8, 0), (0, 8), (13, 14), (15, 16), (17, 18), (128, 129), (129, 128), (3, 3)])
def test_answers_to_icmp(query, answer):
    assert ct.inverse_icmp((77, query, 0)) == (77, answer, 0)


# --- the steps, against a small kernel ---------------------------------------------------------------------------------------------------

class Kernel:
    """Connections as ctnetlink has them. ``between``: called when one was deleted, as a packet that arrives just then."""

    def __init__(self, entries):
        self.entries = []
        self.numbers = iter(range(1, 1000))
        self.between = None
        self.refuse_new = 0
        self.log = []
        self.sockets = 0
        self.begun = []
        self.lost = 0
        for entry in entries:
            self.add(entry)

    def add(self, entry):
        entry = dict(entry, id=struct.pack("!I", next(self.numbers)))
        if any(self.key(entry, side) in (self.key(other, "orig"), self.key(other, "reply"))
               for other in self.entries for side in ("orig", "reply")):
            return errno.EEXIST
        self.entries.append(entry)
        self.begun.append(entry)
        return 0

    @staticmethod
    def key(entry, side):
        return str(sorted(entry[side].items())), entry["zone"] or 0

    def find(self, parts):
        zone = struct.unpack("!H", parts[ct.CTA_ZONE])[0] if ct.CTA_ZONE in parts else 0
        wanted = str(sorted(ct.decode_tuple(parts[ct.CTA_TUPLE_ORIG]).items())), zone
        found = [entry for entry in self.entries if wanted in (self.key(entry, "orig"), self.key(entry, "reply"))]
        if not found or parts.get(ct.CTA_ID, found[0]["id"]) != found[0]["id"]:
            return None
        return found[0]

    @staticmethod
    def packed(entry):
        parts = [ct.encode_tuple(ct.CTA_TUPLE_ORIG, entry["orig"]), ct.encode_tuple(ct.CTA_TUPLE_REPLY, entry["reply"]),
                 attribute(ct.CTA_STATUS, struct.pack("!I", entry["status"])),
                 attribute(ct.CTA_TIMEOUT, struct.pack("!I", entry["timeout"])),
                 attribute(ct.CTA_ID, entry["id"])]
        if entry["zone"] is not None:
            parts.append(attribute(ct.CTA_ZONE, struct.pack("!H", entry["zone"])))
        if entry["tcp"]:
            parts.append(nested(ct.CTA_PROTOINFO, nested(
                ct.CTA_PROTOINFO_TCP, attribute(ct.CTA_PROTOINFO_TCP_STATE, bytes([entry["tcp"]["state"]])))))
        return b"".join(parts)

    def handle(self, kind, flags, parts):
        """-> (errno, entry to show or None)"""
        if kind == ct.IPCTNL_MSG_CT_GET:
            found = self.find(parts)
            return (0, found) if found else (errno.ENOENT, None)
        if kind == ct.IPCTNL_MSG_CT_DELETE:
            assert ct.CTA_TUPLE_ORIG in parts, "this would delete everything"
            found = self.find(parts)
            if not found:
                return errno.ENOENT, None
            self.entries.remove(found)
            self.log.append(("delete", found["id"]))
            if self.between:
                self.between(self, found)
            return 0, None
        assert kind == ct.IPCTNL_MSG_CT_NEW
        info = attributes(attributes(parts.get(ct.CTA_PROTOINFO, b"")).get(ct.CTA_PROTOINFO_TCP, b""))
        if not flags & _nfnetlink.NLM_F_CREATE:
            found = self.find({kind: content for kind, content in parts.items() if kind != ct.CTA_ID})
            found["timeout"] = struct.unpack("!I", parts[ct.CTA_TIMEOUT])[0]
            if info:
                found["tcp"] = dict(found["tcp"], state=info[1][0])
            return 0, None
        assert flags & _nfnetlink.NLM_F_EXCL
        self.log.append(("new", None))
        if self.refuse_new:
            return self.refuse_new, None
        return self.add({
            "orig": ct.decode_tuple(parts[ct.CTA_TUPLE_ORIG]), "reply": after_translation(parts),
            "status": struct.unpack("!I", parts[ct.CTA_STATUS])[0] | ct.IPS_SRC_NAT,
            "timeout": struct.unpack("!I", parts[ct.CTA_TIMEOUT])[0],
            "zone": struct.unpack("!H", parts[ct.CTA_ZONE])[0] if ct.CTA_ZONE in parts else None,
            "tcp": {"state": info[1][0]} if info else None}), None


class Socket:
    def __init__(self, kernel):
        self.kernel = kernel
        self.answers = []
        kernel.sockets += 1

    def send(self, data):
        offset = 0
        while offset < len(data):
            length, kind, flags, sequence = struct.unpack_from("=IHHI", data, offset)
            family, parts = data[offset + 16], attributes(data[offset + 20:offset + length])
            assert kind >> 8 == ct.NFNL_SUBSYS_CTNETLINK
            if flags & _nfnetlink.NLM_F_DUMP == _nfnetlink.NLM_F_DUMP:
                for entry in list(self.kernel.entries):
                    if (len(entry["orig"]["src"]) == 4) == (family == 2):
                        self.answers.append(message(kind & 0xFF00, 0, family, sequence, self.kernel.packed(entry)))
                self.answers.append(message(_nfnetlink.NLMSG_DONE, 0, family, sequence, b""))
            else:
                code, shown = self.kernel.handle(kind & 0xFF, flags, parts)
                if shown:
                    self.answers.append(message(kind & 0xFF00, 0, family, sequence, self.kernel.packed(shown)))
                self.answers.append(struct.pack("=IHHIIi", 36, _nfnetlink.NLMSG_ERROR, 0, sequence, 0, -code) + b"\0" * 16)
            offset += length

    def recv(self, size):
        return self.answers.pop(0)

    def close(self):
        self.kernel.sockets -= 1


class Begun:
    """What `_conntrack.Begun` is to the kernel above."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.lost = 0
        kernel.begun = []
        kernel.sockets += 1

    def read(self, known):
        begun, self.kernel.begun = self.kernel.begun, []
        lost, self.kernel.lost = self.kernel.lost, max(0, self.kernel.lost - 1)
        told = [ct.decode_connection(2 if len(entry["orig"]["src"]) == 4 else 10, self.kernel.packed(entry)) for entry in begun]
        return [entry for entry in told if entry["identity"] not in known], not lost

    def forget(self):
        self.kernel.begun = []

    def close(self):
        self.kernel.sockets -= 1


class NoTable:
    """Guard or detour, without its table. ``started``, ``stopped``: of all that there are."""

    started = stopped = 0

    def __init__(self):
        self.active = False

    def start(self):
        type(self).started += 1
        self.active = True

    def stop(self):
        type(self).stopped += 1
        self.active = False


class NoGuard(NoTable):
    pass


class NoDetour(NoTable):
    """``offered``: whether the kernel has one. ``log``: what was led, as ids, and what was released. ``leads``: whether that works."""

    offered = leads = True
    log = []

    def start(self):
        super().start()
        self.active = self.offered

    def lead(self, connections):
        self.log.append([one["id"] for one in connections])
        self.active = self.leads
        return self.active

    def release(self):
        self.log.append("released")
        return True


@pytest.fixture
def kernel(monkeypatch):
    """A kernel with the recorded connections."""
    it = Kernel([entry for dummy, entry, dummy2 in recorded()])
    monkeypatch.setattr(ct, "open_socket", lambda: Socket(it))
    monkeypatch.setattr(ct, "tracks_any", lambda: bool(it.entries))
    monkeypatch.setattr(ct, "Guard", NoGuard)
    monkeypatch.setattr(ct, "Detour", NoDetour)
    monkeypatch.setattr(ct, "Begun", lambda: Begun(it))
    for table in (NoGuard, NoDetour):
        monkeypatch.setattr(table, "started", 0)
        monkeypatch.setattr(table, "stopped", 0)
    monkeypatch.setattr(NoDetour, "log", [])
    yield it
    assert it.sockets == 0 and (NoGuard.started, NoDetour.started) == (NoGuard.stopped, NoDetour.stopped)
    assert not any(entry["zone"] == _conntrack_detour.ZONE for entry in it.entries), "no copy is left"


def result_of(**changes):
    return dict({"replaced": 0, "left": 0, "guarded": False, "detoured": False, "exposed": 0, "error": ""}, **changes)


CIDRS = ["10.244.2.0/24", "fd00:2::/64"]


def shape(kernel):
    """What the kernel has, without what a new entry may not keep: id and time-out."""
    return sorted(str((sorted(entry["orig"].items()), sorted(entry["reply"].items()), entry["zone"],
                       entry["tcp"] and entry["tcp"]["state"])) for entry in kernel.entries)


def test_all_of_them_once(kernel):
    before, ids = shape(kernel), {entry["id"] for entry in kernel.entries}
    done = set()
    result = ct.carry_over(CIDRS, done=done)
    assert result == result_of(replaced=5, guarded=True, detoured=True, exposed=2)
    assert shape(kernel) == before
    kept = {entry["id"] for entry in kernel.entries} & ids
    assert len(kept) == len(ids) - 5 and len(done) == 5
    assert NoGuard.started == 1
    # and not a second time
    assert ct.carry_over(CIDRS, passes=1, done=done) == result_of()
    assert NoGuard.started == 1, "no guard where nothing is replaced"


def test_one_that_has_the_id_of_another_is_not_taken_for_it(kernel):
    done = set()
    ct.carry_over(CIDRS, done=done)
    replaced = next(iter(done))[0]
    for entry in kernel.entries:
        entry["id"] = replaced
    assert ct.carry_over(CIDRS, passes=1, done=done)["replaced"] == 4


def test_only_the_families_asked_for(kernel):
    assert ct.carry_over(["fd00:2::/64"])["replaced"] == 2
    assert ct.carry_over([])["replaced"] == 0


def newcomer():
    fresh = one("udp")
    return dict(fresh, orig=dict(fresh["orig"], ports=(1111, 53)), reply=dict(fresh["reply"], ports=(53, 2222)))


def test_what_begins_meanwhile_is_replaced_as_well(kernel):
    def packet(it, gone):
        it.between = None
        it.add(newcomer())

    kernel.between = packet
    assert ct.carry_over(CIDRS, passes=1) == result_of(replaced=6, guarded=True, detoured=True, exposed=2)


@pytest.mark.parametrize(("text", "answer"), [("0\n", False), ("7\n", True), ("", True), (None, True)])
def test_whether_any_is_tracked(tmp_path, text, answer):
    path = tmp_path / "nf_conntrack_count"
    if text is not None:
        path.write_text(text)
    assert ct.tracks_any(str(path)) is answer


def test_nothing_is_dumped_where_nothing_is_tracked(kernel, monkeypatch):
    """What the switch itself lets begin is seen nevertheless."""
    kernel.entries = []
    dumps, dump = [], ct.Conntrack.dump
    monkeypatch.setattr(ct.Conntrack, "dump", lambda *arguments: dumps.append(len(kernel.entries)) or dump(*arguments))
    assert ct.carry_over(CIDRS, switch=lambda: dumps.append("switch")) == result_of()
    assert dumps == ["switch"]
    result = ct.carry_over(CIDRS, switch=lambda: kernel.add(newcomer()))
    assert result["replaced"] == 1 and set(dumps[1:]) == {1}


def test_what_the_kernel_could_not_tell_is_found_by_one_more_pass(kernel):
    def packet(it, gone):
        it.between, it.lost = None, 1
        it.add(newcomer())
        it.begun = []

    kernel.between = packet
    assert ct.carry_over(CIDRS, passes=1)["replaced"] == 6


def test_a_kernel_that_never_tells_all_ends_nevertheless(kernel):
    kernel.lost = 1000
    assert ct.carry_over(CIDRS, passes=1)["replaced"] == 5
    # Each pass asks twice: for what was told meanwhile, and whether that is all.
    assert 1000 - 2 * (1 + ct.MORE_PASSES) <= kernel.lost < 1000 - ct.MORE_PASSES


def test_one_that_ended_meanwhile_stays_ended(kernel):
    client = ct.Conntrack()
    entry = one("udp")
    listed = next(item for item in client.dump(2) if item["orig"] == entry["orig"])
    kernel.entries = [item for item in kernel.entries if item["id"] != listed["id"]]
    assert client.replace(listed) == (errno.ENOENT, None)
    assert kernel.log == []
    client.close()


def test_one_that_ends_at_the_last_moment_leaves_nothing(kernel):
    client = ct.Conntrack()
    entry = one("udp")
    listed = next(item for item in client.dump(2) if item["orig"] == entry["orig"])
    now = client.get(listed)
    kernel.entries = [item for item in kernel.entries if item["id"] != listed["id"]]
    client.get = lambda connection: now
    assert client.replace(listed) == (errno.ENOENT, None)
    assert all(item["orig"] != entry["orig"] for item in kernel.entries) and len(kernel.log) == 2
    client.close()


def test_another_connection_of_the_same_addresses_is_not_touched(kernel):
    client = ct.Conntrack()
    listed = next(client.dump(2))
    kernel.entries[0]["id"] = b"else"
    assert client.replace(listed) == (errno.ENOENT, None) and kernel.log == []
    client.close()


@pytest.fixture
def no_detour(monkeypatch):
    monkeypatch.setattr(NoDetour, "offered", False)


@pytest.mark.parametrize("direction", ["orig", "reply"])
def test_a_packet_in_between(kernel, no_detour, direction):
    """It made a connection of its own, of the request (with another port) or of the answer."""
    def packet(it, gone):
        it.between = None
        if direction == "orig":
            reply = dict(gone["reply"])
            if "ports" in reply:
                reply["ports"] = (reply["ports"][0], 9)
            else:
                reply["icmp"] = (9,) + reply["icmp"][1:]
            assert it.add(dict(gone, reply=reply)) == 0
        else:
            assert it.add(dict(gone, orig=gone["reply"], reply=ct.untranslated_answer(gone["reply"], gone["orig"]))) == 0

    before = shape(kernel)
    kernel.between = packet
    assert ct.carry_over(CIDRS) == result_of(replaced=5, guarded=True, exposed=4)
    assert shape(kernel) == before


def test_packets_that_do_not_stop_coming(kernel, no_detour):
    """Given up after a few times, and nothing is said to be wrong: the connection is there, only not this one."""
    def packet(it, gone):
        if gone["orig"]["proto"] == 17 and len(gone["orig"]["src"]) == 4:
            it.add(dict(gone, reply=dict(gone["reply"], ports=(gone["reply"]["ports"][0], 9))))

    kernel.between = packet
    result = ct.carry_over(CIDRS, passes=1)
    assert (result["replaced"], result["left"]) == (4, 0)
    # Five connections, and the one that is never done: tried some times when it is dumped, and whenever it is told of, in two steps each.
    assert len(kernel.log) < 2 * (5 + ct.TRIES * (1 + ct.READS) * 2)


def test_a_kernel_that_refuses_says_so(kernel):
    kernel.refuse_new = errno.EOPNOTSUPP
    result = ct.carry_over(CIDRS, passes=1)
    assert result == result_of(left=5, guarded=True, detoured=True, error=os.strerror(errno.EOPNOTSUPP))


def test_an_error_of_the_dump_is_reported(kernel, monkeypatch):
    monkeypatch.setattr(Socket, "recv", lambda self, size: struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.EPERM) + b"\0" * 16)
    result = ct.carry_over(CIDRS)
    assert result["replaced"] == 0 and os.strerror(errno.EPERM) in result["error"]


def test_answers_of_others_are_no_answers(kernel, monkeypatch):
    """What is left of an earlier request does not count."""
    at_once = Socket.recv

    def recv(self, size):
        stale = struct.pack("=IHHIIi", 36, 2, 0, 99999, 0, -errno.EIO) + b"\0" * 16
        return stale + message(1 << 8, 0, 2, 99998, b"") + at_once(self, size)

    monkeypatch.setattr(Socket, "recv", recv)
    assert ct.carry_over(CIDRS)["replaced"] == 5


def test_a_kernel_without_ctnetlink(monkeypatch):
    def refuse():
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(ct, "open_socket", refuse)
    result = ct.carry_over(CIDRS)
    assert result["replaced"] == 0 and "Protocol not supported" in result["error"]


# --- the detour --------------------------------------------------------------------------------------------------------------------------

def test_all_that_can_be_led_are_led_while_they_are_replaced(kernel):
    """Those in zones of others cannot."""
    states = {}

    def packet(it, gone):
        if gone["zone"] != _conntrack_detour.ZONE:
            copies = [entry for entry in it.entries if entry["zone"] == _conntrack_detour.ZONE and entry["orig"] == gone["orig"]]
            states[gone["id"]] = [(bool(entry["status"] & ct.IPS_FIXED_TIMEOUT), entry["reply"] == gone["reply"]) for entry in copies]

    kernel.between = packet
    ids = {entry["id"]: ct.has_no_zone(entry) for entry in kernel.entries if ct.must_move(entry, NETWORKS)}
    assert ct.carry_over(CIDRS, passes=1)["exposed"] == 2
    assert states == {number: [(True, True)] if led else [] for number, led in ids.items()}
    assert sorted(itertools.chain(*NoDetour.log[0::2])) == [number for number, led in sorted(ids.items()) if led]
    assert set(NoDetour.log[1::2]) == {"released"}


@pytest.mark.parametrize("name", ["offered", "leads"])
def test_without_a_detour_all_are_replaced_nevertheless(kernel, monkeypatch, name):
    monkeypatch.setattr(NoDetour, name, False)
    assert ct.carry_over(CIDRS) == result_of(replaced=5, guarded=True, exposed=4)
    # One that does not work once is not tried again.
    assert len(NoDetour.log) == (0 if name == "offered" else 2)


def test_no_more_at_once_than_can_be_led(kernel, monkeypatch):
    monkeypatch.setattr(ct, "CAPACITY", 1)
    assert ct.carry_over(CIDRS)["replaced"] == 5
    assert [len(entry) for entry in NoDetour.log[0::2]] == [1, 1, 1]


def test_what_begins_while_others_are_led_is_replaced_at_once_in_the_end(kernel):
    """Each detour takes its time, in which the next connection begins: the last one is led around nothing."""
    ports = iter(range(2000, 2100))

    def packet(it, gone):
        if gone["zone"] == _conntrack_detour.ZONE and gone["orig"]["proto"] == 17 and len(gone["orig"]["src"]) == 4:
            fresh, port = newcomer(), next(ports)
            it.add(dict(fresh, orig=dict(fresh["orig"], ports=(port, 53)), reply=dict(fresh["reply"], ports=(53, port))))

    kernel.between = packet
    # One in the dump and one for each time that was read but the last, which is the one that is not led.
    assert ct.carry_over(CIDRS, passes=1) == result_of(replaced=5 + ct.READS, guarded=True, detoured=True, exposed=2 + 1)


def test_the_end_of_a_connection_that_its_copy_saw(kernel):
    def packet(it, gone):
        if gone["zone"] != _conntrack_detour.ZONE and gone["tcp"]:
            copy = next(entry for entry in it.entries if entry["zone"] == _conntrack_detour.ZONE and entry["tcp"])
            copy["tcp"] = {"state": 4}

    kernel.between = packet
    assert ct.carry_over(CIDRS)["replaced"] == 5
    entry = next(entry for entry in kernel.entries if entry["orig"] == one("tcp", state=3)["orig"])
    assert (entry["tcp"]["state"], entry["timeout"]) == (4, ct.CLOSING_LIFETIME)


def test_a_copy_that_a_killed_run_left(kernel):
    left = one("udp")
    kernel.add(dict(ct.copy_of(left)))
    assert ct.carry_over(CIDRS) == result_of(replaced=5, guarded=True, detoured=True, exposed=2)
    assert sum(left["id"] is not None for left in kernel.entries) == len(kernel.entries)


def test_an_entry_that_is_about_to_time_out_waits_for_its_turn(kernel):
    """Its packets extend the life of the copy only."""
    seen = []
    for entry in kernel.entries:
        entry["timeout"] = 2
    kernel.between = lambda it, gone: seen.append((ct.has_no_zone(gone), gone["timeout"]))
    ct.carry_over(CIDRS, passes=1)
    assert {timeout for led, timeout in seen if led} == {ct.MINIMUM_LIFETIME}


def test_the_switch_comes_when_all_are_replaced_and_before_anything_ends(kernel):
    seen = []

    def switch():
        seen.append((NoGuard.stopped, NoDetour.stopped, kernel.sockets))
        kernel.add(newcomer())

    assert ct.carry_over(CIDRS, switch=switch)["replaced"] == 6, "and what came meanwhile is replaced after it"
    assert seen == [(0, 0, 3)]


def test_what_failed_before_the_switch_is_tried_again_behind_it(kernel, monkeypatch):
    at_once = Socket.recv
    monkeypatch.setattr(Socket, "recv", lambda self, size: struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.EBUSY) + b"\0" * 16)
    result = ct.carry_over(CIDRS, switch=lambda: monkeypatch.setattr(Socket, "recv", at_once))
    assert result["replaced"] == 5 and os.strerror(errno.EBUSY) in result["error"]


def test_a_switch_that_fails_is_not_swallowed(kernel):
    def switch():
        raise OSError(errno.EPERM, "no")

    with pytest.raises(OSError):
        ct.carry_over(CIDRS, switch=switch)


def test_a_switch_comes_whatever_becomes_of_the_rest(monkeypatch):
    def refuse():
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(ct, "open_socket", refuse)
    seen = []
    assert "Protocol not supported" in ct.carry_over(CIDRS, switch=lambda: seen.append(1))["error"] and seen == [1]


# --- the guard ---------------------------------------------------------------------------------------------------------------------------

def guard_transaction(flags):
    return _nft_netlink.table_steps(_conntrack_guard.TABLE, flags) + _conntrack_guard.guard_steps(10 ** 18)


def test_the_transaction_of_the_guard():
    data, expected = _nft_netlink.batch(5, guard_transaction(2))
    found = batch_of(data)
    assert [kind for kind, dummy, dummy2 in found] == [0x10, 0xA00, 0xA02, 0xA00, 0xA03, 0xA06, 0xA03, 0xA06, 0x11]
    assert [sequence for dummy, sequence, dummy2 in found] == list(range(5, 14)) and expected == list(range(6, 13))
    assert found[3][2] == {1: b"kubemesh-carry\0", 2: struct.pack("!I", 2)}, "owned"
    assert 2 not in found[1][2]
    assert [parts[3] for kind, dummy, parts in found if kind == 0xA03] == [b"prerouting\0", b"output\0"]
    priorities = [struct.unpack("!i", attributes(parts[4])[2])[0] for kind, dummy, parts in found if kind == 0xA03]
    assert priorities == [-199, -199], "after connection tracking, before address translation"
    # the resource of a batch: the subsystem, in network order
    assert data[16 + 2:16 + 4] == b"\0\x0a"


def test_the_guard_without_owner():
    dummy, dummy2, parts = batch_of(_nft_netlink.batch(1, guard_transaction(0))[0])[3]
    assert parts == {1: b"kubemesh-carry\0"}


def test_the_rule_of_the_guard():
    names, datas = [], []
    for expression in _conntrack_guard.rule_expressions(1763874000 * 10 ** 9):
        parts = attributes(attributes(expression)[1])
        names.append(parts[1].rstrip(b"\0").decode())
        datas.append(attributes(parts[2]))
    assert names == ["meta", "cmp", "payload", "bitwise", "cmp", "ct", "bitwise", "cmp", "meta", "byteorder", "cmp", "immediate"]
    compared = [attributes(data[3])[1] for name, data in zip(names, datas) if name == "cmp"]
    assert compared == [b"\x06", b"\x02", b"\0\0\0\0", struct.pack("!Q", 1763874000 * 10 ** 9)]
    operations = [struct.unpack("!I", data[2])[0] for name, data in zip(names, datas) if name == "cmp"]
    assert operations == [0, 1, 1, 2], "equal TCP, not a first packet, of no connection, before the deadline"
    assert [attributes(data[4])[1] for name, data in zip(names, datas) if name == "bitwise"] == [b"\x12", struct.pack("=I", 9)]


def guard_with(monkeypatch, codes):
    handle = NfSocket(codes)
    monkeypatch.setattr(_nft_netlink, "open_socket", lambda: handle)
    return _conntrack_guard.Guard(), handle


def test_a_guard_that_is_taken(monkeypatch):
    guard, handle = guard_with(monkeypatch, [(0, 0), (0, 0)])
    guard.start()
    assert guard.active and len(handle.sent) == 1
    guard.stop()
    assert not guard.active and handle.closed and [kind for kind, dummy, dummy2 in handle.sent[1]] == [0x10, 0xA02, 0x11]
    guard.stop()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_an_older_kernel_gets_a_table_without_owner(monkeypatch, code):
    guard, handle = guard_with(monkeypatch, [(2, code), (0, 0), (0, 0)])
    guard.start()
    assert guard.active and 2 in handle.sent[0][3][2] and 2 not in handle.sent[1][3][2]
    guard.stop()


@pytest.mark.parametrize("codes", [[(None, errno.EPERM)], [(2, errno.EPERM)], [(4, errno.ENOENT)], [(3, errno.EINVAL), (3, errno.EINVAL)]])
def test_a_kernel_that_takes_no_guard(monkeypatch, codes):
    guard, handle = guard_with(monkeypatch, list(codes))
    guard.start()
    assert not guard.active
    guard.stop()
    assert handle.closed and len(handle.sent) == len(codes), "nothing is removed that is not ours"


def test_no_netfilter_no_guard(monkeypatch):
    def refuse():
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(_nft_netlink, "open_socket", refuse)
    guard = _conntrack_guard.Guard()
    guard.start()
    guard.stop()
    assert not guard.active


def test_a_guard_ends_even_if_the_kernel_is_silent(monkeypatch):
    guard, handle = guard_with(monkeypatch, [(0, 0)])
    guard.start()

    def silent(data):
        raise OSError(errno.ETIMEDOUT, "timed out")

    handle.send = silent
    guard.stop()
    assert handle.closed and not guard.active


def test_the_deadline_lies_ahead(monkeypatch):
    monkeypatch.setattr(_conntrack_guard.time, "time", lambda: 1763874000.9)
    seen = []
    monkeypatch.setattr(_conntrack_guard.Guard, "put_up", lambda self, steps: seen.append(steps))
    _conntrack_guard.Guard().start()
    assert seen == [_conntrack_guard.guard_steps((1763874000 + _conntrack_guard.LIFETIME) * 10 ** 9)]


def test_names_in_the_fixture_are_those_of_the_lab():
    """No address of a machine gets into the repository."""
    for family in RECORDED["proc"]:
        for line in RECORDED["proc"][family]:
            assert all(re.match(r"10\.244|203\.0\.113|198\.18|fd00:", text) for text in re.findall(r"(?:src|dst)=(\S+)", line))
