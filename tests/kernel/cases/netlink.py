# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The netlink transport of the client against the kernel; `wg`, an independent reader, says what the kernel really has."""
from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import threading
import time

import cluster

DEVICE = "kmdev0"


def client():
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_netlink import NetlinkClient
    return NetlinkClient()


def plans():
    from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan
    return _wg_plan


def key(name):
    return base64.b64encode(hashlib.sha256(("kubemesh test key %s" % name).encode()).digest()).decode()


def secret_file(name):
    """The key of that name in a file that the client accepts: root only, in a folder that others cannot write in."""
    os.makedirs("/root/keys", mode=0o700, exist_ok=True)
    path = "/root/keys/%s.key" % name
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as handle:
        handle.write(key(name) + "\n")
    return path


def public_key(name="own"):
    return cluster.sh("wg", "pubkey", data=key(name) + "\n").strip()


def wanted(peers, **changes):
    result = {"public_key": public_key(), "private_key_file": secret_file("own"), "listen_port": 51840, "fwmark": 0x1000, "peers": peers}
    result.update(changes)
    return result


def peer(*allowed_ips, **changes):
    result = {"endpoint": None, "allowed_ips": list(allowed_ips), "keepalive": 0}
    result.update(changes)
    return result


def make(name=DEVICE):
    cluster.sh("ip", "link", "add", name, "type", "wireguard")


def wg_view(name=DEVICE):
    """What `wg show` has, in the shape of read(), without the private key (the first field of the dump)."""
    lines = [line.split("\t") for line in cluster.sh("wg", "show", name, "dump").splitlines()]
    dummy, own, port, mark = lines[0]
    peers = {}
    for public, psk, endpoint, allowed, handshake, received, sent, keepalive in lines[1:]:
        peers[public] = {
            "endpoint": None if endpoint == "(none)" else endpoint,
            "allowed_ips": [] if allowed == "(none)" else sorted(allowed.split(",")),
            "keepalive": 0 if keepalive == "off" else int(keepalive), "has_preshared_key": psk != "(none)",
            "last_handshake": int(handshake), "rx_bytes": int(received), "tx_bytes": int(sent)}
    return {"name": name, "public_key": None if own == "(none)" else own, "listen_port": int(port),
            "fwmark": 0 if mark == "off" else int(mark, 16), "peers": peers}


def same(one, other):
    for state in (one, other):
        for entry in state["peers"].values():
            entry["last_handshake"] = int(entry["last_handshake"])
    assert one == other, "\n%s\n%s" % (one, other)


def converge(want, name=DEVICE):
    """Plan, apply, read; the plan of the second run must be empty and wg must see what read() sees. Returns (steps, state)."""
    one = client()
    steps = plans().plan_device(one.read(name), want)
    before = one.read(name)
    one.apply(name, steps)
    state = one.read(name)
    again = plans().plan_device(state, want)
    assert again == [], "a second run would change: %s" % again
    same(state, wg_view(name))
    expected = plans().apply_steps(before, steps)
    assert plans().device_as_text(expected) == plans().device_as_text(state), "the kernel did not do what the plan says"
    return steps, state


def in_scratch(function):
    def case(env):
        with cluster.Scratch() as net:
            env.note(**(net.call(function) or {}))
    case.__doc__ = function.__doc__
    return case


def _new_device():
    make()
    state = client().read(DEVICE)
    assert state == {"name": DEVICE, "public_key": None, "listen_port": 0, "fwmark": 0, "peers": {}}, state
    same(state, wg_view())


def case_a_new_device_is_empty(env):
    in_scratch(_new_device)(env)


def _program():
    make()
    preshared = secret_file("preshared")
    want = wanted({
        key("one"): peer("10.244.1.0/24", "fd00:10:244:1::/64", "198.18.0.11/32", endpoint="198.18.0.11:51840"),
        key("two"): peer("10.244.2.0/24", "fe80::1234/128", endpoint="[2001:db8::12]:51841", keepalive=25,
                         preshared_key_file=preshared),
        key("three"): peer()})
    steps, state = converge(want)
    assert [step["op"] for step in steps] == ["set_device", "add_peer", "add_peer", "add_peer"], steps
    assert state["peers"][key("two")]["has_preshared_key"]
    secrets = [key("own"), key("preshared")]
    assert not any(secret in repr(state) or secret in repr(steps) for secret in secrets), "a secret in a state or a plan"


def case_what_is_programmed_is_what_the_kernel_has(env):
    in_scratch(_program)(env)


def _changes():
    make()
    converge(wanted({key("one"): peer("10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"), key("two"): peer("10.0.4.0/24")}))
    # grows, shrinks, moves both ways, keepalive, a new peer that takes over from an old one, a peer gone: one plan
    converge(wanted({key("one"): peer("10.0.1.0/24", "10.0.4.0/24", "10.0.5.0/24", keepalive=21), key("two"): peer("10.0.2.0/24"),
                     key("three"): peer("10.0.6.0/24", endpoint="198.18.0.13:51840")}))
    converge(wanted({key("four"): peer("10.0.6.0/24", "10.0.1.0/25", "10.0.1.128/25"), key("two"): peer("10.0.2.0/24")}))
    converge(wanted({}, listen_port=51844, fwmark=0))


def case_changes_in_one_plan(env):
    in_scratch(_changes)(env)


def _split():
    make()
    many = ["10.%d.%d.0/24" % (i // 256, i % 256) for i in range(1500)] + ["fd00:0:0:%x::/64" % i for i in range(1500)]
    converge(wanted({key("one"): peer(*many, endpoint="198.18.0.11:51840", keepalive=5), key("two"): peer("192.0.2.1/32")}))
    half = many[::2]
    start = time.monotonic()
    steps, dummy = converge(wanted({key("one"): peer(*half, endpoint="198.18.0.11:51840", keepalive=5), key("two"): peer("192.0.2.1/32")}))
    assert [step["op"] for step in steps] == ["remove_allowed_ips"], [step["op"] for step in steps]
    return {"remove_1500_allowed_ips_seconds": round(time.monotonic() - start, 2)}


def case_peers_that_span_several_messages(env):
    in_scratch(_split)(env)


def _two_thousand():
    make()
    peers = {}
    for i in range(2000):
        a, b = divmod(i, 250)
        peers[key("many %d" % i)] = peer("10.%d.%d.0/24" % (100 + a, b), "fd00:%x::/64" % (i + 1), "198.19.%d.%d/32" % (a, b + 1),
                                         endpoint="198.19.%d.%d:51840" % (a, b + 1))
    want = wanted(peers)
    one, times = client(), {}
    start = time.monotonic()
    steps = plans().plan_device(one.read(DEVICE), want)
    times["plan"] = time.monotonic()
    one.apply(DEVICE, steps)
    times["apply"] = time.monotonic()
    state = one.read(DEVICE)
    times["read"] = time.monotonic()
    assert plans().plan_device(state, want) == []
    times["plan_again"] = time.monotonic()
    assert len(state["peers"]) == 2000
    same(state, wg_view())
    names, last = {}, start
    for name, moment in times.items():
        names[name + "_2000_peers_seconds"] = round(moment - last, 2)
        last = moment
    return names


def case_two_thousand_peers(env):
    in_scratch(_two_thousand)(env)


def _errors():
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg import client_for, device_names
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError

    def message(function, *args):
        try:
            function(*args)
        except WireGuardError as exc:
            return str(exc)
        raise AssertionError("no error")

    assert "nosuch0" in message(client().read, "nosuch0")
    assert "no such device" in message(client().read, "nosuch0")
    cluster.sh("ip", "link", "add", "other0", "type", "dummy")
    assert "not a WireGuard device" in message(client().read, "other0")
    assert "dummy" in message(client_for, "other0")
    make()
    assert client_for(DEVICE).transport == "netlink"
    assert device_names() == [DEVICE], device_names()
    cluster.sh("ip", "link", "add", "kmother", "type", "wireguard")
    cluster.sh("wg", "set", "kmother", "listen-port", "51999")
    cluster.sh("ip", "link", "set", "kmother", "up")
    cluster.sh("ip", "link", "set", DEVICE, "up")
    text = message(client().apply, DEVICE, [{"op": "set_device", "listen_port": 51999}])
    assert "port" in text and DEVICE in text, text


def case_errors_of_the_kernel_in_words(env):
    in_scratch(_errors)(env)


def _changed_meanwhile():
    """Reading while somebody else changes the device must give a whole state or say so, never a mixture."""
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_apply import WireGuardError

    make()
    many = ["10.%d.%d.0/24" % (i // 256, i % 256) for i in range(1200)]
    one = client()
    one.apply(DEVICE, plans().plan_device(one.read(DEVICE), wanted({key("one"): peer(*many), key("two"): peer()})))
    running = True
    changes = [0]

    def churn():
        while running:
            subprocess.run(["wg", "set", DEVICE, "peer", key("three %d" % (changes[0] % 3)), *(["remove"] if changes[0] % 2 else [])],
                           check=False)
            changes[0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    whole = said_so = 0
    try:
        for dummy in range(15):
            try:
                state = one.read(DEVICE)
            except WireGuardError as exc:
                assert "while it was read" in str(exc)
                said_so += 1
                continue
            whole += 1
            assert sorted(state["peers"][key("one")]["allowed_ips"]) == sorted(many), "a mixture"
            assert key("two") in state["peers"]
    finally:
        running = False
        thread.join()
    assert whole
    return {"changes_by_others_meanwhile": changes[0], "read": whole, "gave_up": said_so}


def case_a_dump_that_is_interrupted(env):
    in_scratch(_changed_meanwhile)(env)


def _strace():
    """I5 from outside: no process that programming a device starts has a key among its arguments or in its environment."""
    make()
    script = ("from cases import netlink\n"
              "want = netlink.wanted({netlink.key('one'): netlink.peer('10.0.1.0/24', '10.0.2.0/24')})\n"
              "netlink.converge(want)\n"
              "netlink.converge(netlink.wanted({netlink.key('one'): netlink.peer('10.0.1.0/24')}))\n")
    trace = "/tmp/kernel-strace"
    cluster.sh("strace", "-f", "--seccomp-bpf", "-o", trace, "-e", "trace=execve", "-s", "4096", "-v", "python3", "-c",
               "import sys; sys.path.insert(0, '/payload')\n" + script)
    with open(trace, encoding="utf-8", errors="replace") as handle:
        text = handle.read()
    commands = [line for line in text.splitlines() if "execve(" in line]
    assert commands and not any(key("own") in line for line in commands), "a key in the arguments of a process"


def case_no_key_in_any_argument(env):
    in_scratch(_strace)(env)


def case_allowed_ips_change_under_traffic(env):
    """I3 on the kernel: allowed IPs come, go and move while packets flow through the tunnel: nothing is lost, no new handshake."""
    with cluster.Cluster(nodes=2) as lab:
        keys = {"0": lab.make_keys()}
        lab.distribute(lab.document(keys))
        lab.modules("interface", node=lambda node: node.node_name, persistence="none")
        lab.modules("probe", node=lambda node: node.node_name, require="all")
        lab.modules("routes", node=lambda node: node.node_name, send=True, persist=False)
        a, b = lab.nodes
        other = keys["0"][b.node_name]
        before = a.call(lambda: client().read("wgmesh0"))["peers"][other]
        with lab.pinger(kinds=("pod-pod",), rate=50) as pinger:
            for round_ in range(8):
                extra = ["10.99.%d.0/24" % i for i in range(20)]
                a.call(lambda extra=extra: client().apply("wgmesh0", [
                    {"op": "add_allowed_ips", "public_key": other, "allowed_ips": extra}]))
                a.call(lambda round_=round_, extra=extra: client().apply("wgmesh0", [
                    {"op": "add_peer", "public_key": key("guest %d" % round_), "endpoint": None, "keepalive": 0,
                     "allowed_ips": extra[:10]},
                    {"op": "remove_allowed_ips", "public_key": other, "allowed_ips": extra[10:]},
                    {"op": "remove_peer", "public_key": key("guest %d" % round_)}]))
            report = pinger.stop()
        after = a.call(lambda: client().read("wgmesh0"))["peers"]
        env.note(sent=report["sent"], lost=report["lost"])
        assert set(after) == {other}, "throw-away peers were left behind: %s" % sorted(after)
        assert after[other]["allowed_ips"] == before["allowed_ips"]
        assert after[other]["last_handshake"] == before["last_handshake"], "the session was reset"
        assert report["lost"] == 0, lab.losses(report)
