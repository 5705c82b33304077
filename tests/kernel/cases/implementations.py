# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel's WireGuard and a userspace one side by side: the same plan leaves the same mesh, and they talk to each other."""
from __future__ import annotations

import os
import shutil
import subprocess
import time

import cluster

from cases import netlink
from cases.modules import name_of, prepared

# Stands in for systemctl on a light node: starts what the unit file of a userspace implementation says, ignores all else.
SYSTEMCTL = """#!/bin/sh
case "$1 $2" in
"start kubemesh-userspace@"*)
    device=${2#*@}; device=${device%.service}
    command=$(sed -n "s/^ExecStart=//p" /etc/systemd/system/kubemesh-userspace@.service | sed "s/%i/$device/")
    setsid $command >/run/userspace.log 2>&1 </dev/null &
    echo $! >/run/userspace.pid
    for try in $(seq 100); do wg show "$device" >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1;;
"stop kubemesh-userspace@"*) kill "$(cat /run/userspace.pid)"; rm /run/userspace.pid;;
"show --property=LoadState,ActiveState,UnitFileState")
    [ "${3#kubemesh-userspace@}" != "$3" ] && [ -e /run/userspace.pid ] && echo ActiveState=active;;
esac
exit 0
"""


def need_userspace(env):
    if not shutil.which("wireguard-go") or not os.path.exists("/dev/net/tun"):
        raise env.Skip("no wireguard-go or no /dev/net/tun in the machine")


def _states():
    """Wanted devices, one after the other, that together use every step."""
    key, peer, wanted = netlink.key, netlink.peer, netlink.wanted
    preshared = netlink.secret_file("preshared")
    many = ["10.%d.%d.0/24" % (i // 256, i % 256) for i in range(300)]
    yield wanted({})
    yield wanted({key("one"): peer("10.244.1.0/24", "fd00:10:244:1::/64", "198.18.0.11/32", endpoint="198.18.0.11:51840"),
                  key("two"): peer("10.244.2.0/24", "fe80::1234/128", endpoint="[2001:db8::12]:51841", keepalive=25,
                                   preshared_key_file=preshared),
                  key("three"): peer(*many)})
    yield wanted({key("one"): peer("10.244.1.0/24", "10.244.2.0/24", endpoint="198.18.0.99:51840", keepalive=7),
                  key("two"): peer("fd00:10:244:1::/64", endpoint="[2001:db8::12]:51841"), key("three"): peer(*many[::3])})
    yield wanted({key("one"): peer("10.244.1.0/25", "10.244.1.128/25", endpoint="198.18.0.99:51840"),
                  key("four"): peer(*many[1::3])}, listen_port=51843, fwmark=0)
    yield wanted({}, listen_port=51843, fwmark=0)


def _side_by_side():
    from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_uapi import UapiClient

    netlink.make("kmk0")
    process = subprocess.Popen(["wireguard-go", "-f", "kmu0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        clients = {"kmk0": netlink.client(), "kmu0": UapiClient(wait=20)}
        plans, compared = netlink.plans(), 0
        for want in _states():
            seen = {}
            for name, client in clients.items():
                client.apply(name, plans.plan_device(client.read(name), want))
                state = client.read(name)
                assert plans.plan_device(state, want) == [], "%s: a second run would change something" % name
                view = netlink.wg_view(name)
                netlink.same(state, view)
                seen[name] = dict(state, name="")
            assert seen["kmk0"] == seen["kmu0"], "\nkernel:    %s\nuserspace: %s" % (seen["kmk0"], seen["kmu0"])
            compared += 1
        return {"states_compared": compared}
    finally:
        process.terminate()
        process.wait()


def case_the_same_plan_leaves_the_same_device(env):
    need_userspace(env)
    with cluster.Scratch() as net:
        env.note(**net.call(_side_by_side))


def mesh_of(node):
    """Everything the modules made on a node, as text, the kind of the device apart."""
    from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg, _wg_plan

    return {
        "device": node.call(lambda: _wg_plan.device_as_text(_wg.client_for("wgmesh0").read("wgmesh0"))),
        "link": node.call(_link),
        "routes": [node.sh("ip", family, "route", "show", "table", str(table)) for family in ("-4", "-6") for table in (51840, 51841)],
        "rules": [node.sh("ip", family, "rule") for family in ("-4", "-6")],
        "sysctls": node.sh("sysctl", "-ar", r"net.ipv4.conf.(eth0|wgmesh0).rp_filter"),
    }


def _link():
    from cases.modules import addresses, link

    found = link(cluster.Here())
    return {"mtu": found["mtu"], "up": "UP" in found["flags"], "addrgenmode": found.get("inet6_addr_gen_mode"),
            "addresses": addresses(cluster.Here())}


def case_the_same_mesh_from_the_modules_and_both_kinds_talk(env):
    """The modules on one node, kernel, taken away, userspace: the same. In the end a mixed mesh carries traffic without loss."""
    need_userspace(env)
    with cluster.Cluster(nodes=2) as lab:
        a = lab.nodes[0]
        prepared(lab)
        lab.module(lab.nodes[1], "interface", node="worker-2", persistence="none")
        with lab.pinger(("pod-pod", "host-pod"), rate=10) as pinger:
            meshes = {}
            for kind in ("kernel", "userspace"):
                if kind == "userspace":
                    lab.modules("routes", state="absent", persist=False)  # nobody sends any more before anybody stops accepting
                    lab.module(a, "interface", state="absent")
                    a.write("/run/systemctl", SYSTEMCTL)
                    os.chmod(a.path("/run/systemctl"), 0o755)
                    a.sh("mount", "--bind", "/run/systemctl", "/usr/bin/systemctl")
                result = lab.module(a, "interface", node="worker-1", persistence="none", implementation=kind)
                assert result["implementation"] == kind and result["changed"]
                assert not lab.module(a, "interface", node="worker-1", persistence="none")["changed"]
                lab.modules("probe", node=name_of, require="all")
                lab.modules("routes", node=name_of, persist=False, send=True)
                time.sleep(1)
                meshes[kind] = mesh_of(a)
            kinds = {node.node_name: "tun" in node.sh("ip", "-d", "link", "show", "dev", "wgmesh0") for node in lab.nodes}
            lab.modules("routes", state="absent", persist=False)
            lab.modules("interface", state="absent")
            report = pinger.stop()
        env.note(sent=report["sent"], lost=report["lost"])
        assert kinds == {"worker-1": True, "worker-2": False}
        for part, kernel in meshes["kernel"].items():
            assert kernel == meshes["userspace"][part], "%s:\nkernel: %s\nuserspace: %s" % (part, kernel, meshes["userspace"][part])
        assert report["lost"] == 0, lab.losses(report)
