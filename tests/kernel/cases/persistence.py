# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reboots, with systemd: the machine itself is worker-1, its underlay and its pod bridge are made by systemd-networkd at boot.

case_1_... runs before the first reboot, case_2_... after it, and so on. The other nodes are namespaces and gone after each reboot; they
come back with the same keys, as nodes that did not reboot would be there.
"""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time

import cluster

from cases.implementations import mesh_of
from cases.modules import name_of

KEEP = pathlib.Path("/var/lib/kubemesh-test")
AT_KUBELET = "/var/lib/kubemesh-test/at-kubelet"

# KeepConfiguration: without it networkd 252 takes the addresses away for 0.1 s when it starts again, mesh or not.
NETWORK = {
    "20-underlay.netdev": "[NetDev]\nName=underlay\nKind=bridge\nMACAddress=02:00:00:00:00:11\n[Bridge]\nSTP=no\nForwardDelaySec=0\n",
    "20-underlay.network": """[Match]
Name=underlay
[Network]
ConfigureWithoutCarrier=yes
KeepConfiguration=static
LinkLocalAddressing=ipv6
IPv6AcceptRA=no
Address=198.18.0.11/24
[Address]
Address=2001:db8::11/64
DuplicateAddressDetection=none
[Route]
Destination=10.244.2.0/24
Gateway=198.18.0.12
[Route]
Destination=fd00:10:244:2::/64
Gateway=2001:db8::12
""",
    "20-cni0.netdev": "[NetDev]\nName=cni0\nKind=bridge\n[Bridge]\nSTP=no\nForwardDelaySec=0\n",
    "20-cni0.network": """[Match]
Name=cni0
[Network]
ConfigureWithoutCarrier=yes
KeepConfiguration=static
IPv6AcceptRA=no
Address=10.244.1.1/24
[Address]
Address=fd00:10:244:1::1/64
DuplicateAddressDetection=none
""",
}
# A glob of an administrator that would set strict filtering again at boot
SYSCTLS = "net.ipv4.ip_forward = 1\nnet.ipv6.conf.all.forwarding = 1\nnet.ipv4.conf.*.rp_filter = 1\nnet.ipv6.conf.all.accept_dad = 0\n"
# Stands for kubelet: what is there when it may start pods?
KUBELET = """[Unit]
Description=Stand-in for kubelet
After=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'exec >%s 2>&1; wg show wgmesh0 peers; for f in -4 -6; do ip $$f rule; ip $$f route show table 51840; done'
[Install]
WantedBy=multi-user.target
""" % AT_KUBELET


def start(env):
    """The cluster of this boot: the machine, and worker-2 with the keys it had."""
    lab = cluster.Cluster(nodes=2, machine=True)
    keys = KEEP / "worker-2.key"
    peer = lab.nodes[1]
    if env.boot == 1:
        return lab
    peer.sh("mkdir", "-p", "-m", "0700", "/etc/wireguard")
    peer.write("/etc/wireguard/wgmesh0.key", keys.read_text())
    os.chmod(peer.path("/etc/wireguard/wgmesh0.key"), 0o600)
    peer.write(cluster.DOCUMENT, pathlib.Path(cluster.DOCUMENT).read_text())
    bring_up(lab, peer)
    return lab


def bring_up(lab, node):
    lab.module(node, "interface", node=node.node_name, persistence="none")
    lab.module(node, "routes", node=node.node_name, persist=False, send=True, peers="all")


def wait_for(function, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if function():
            return True
        time.sleep(0.3)
    return False


def public_state(lab):
    state = mesh_of(lab.nodes[0])
    state["sysctls"] = lab.nodes[0].sh("sysctl", "net.ipv4.conf.underlay.rp_filter", "net.ipv4.conf.wgmesh0.rp_filter")
    return state


def save(lab):
    (KEEP / "state.json").write_text(json.dumps(public_state(lab)))


def check_restored(env, lab):
    """The machine came back as it was, on its own, before pods were started, and carries traffic."""
    machine = lab.nodes[0]
    before, after = json.loads((KEEP / "state.json").read_text()), public_state(lab)
    for part, text in before.items():
        assert after[part] == text, "%s differs after the reboot:\nbefore: %s\nafter: %s" % (part, text, after[part])
    seen = pathlib.Path(AT_KUBELET).read_text()
    key = json.loads((KEEP / "keys.json").read_text())["worker-2"]
    for what in (key, "lookup 51840", "10.244.2.0/24", "fd00:10:244:2::/64"):
        assert what in seen, "%s was not there when kubelet started: %s" % (what, seen)
    assert seen.count("lookup 51840") == 2, "a rule of one family was missing when kubelet started: %s" % seen
    result = lab.modules("probe", node=name_of, require="all")
    assert all(one["proven_count"] == 1 for one in result.values())
    with lab.sniffer("n2") as sniffer, lab.pinger(("pod-pod", "host-pod"), rate=10) as pinger:
        time.sleep(1)
        report, seen = pinger.stop(), sniffer.stop()
    assert report["lost"] == 0, lab.losses(report)
    assert not seen["plain"], "in clear after a reboot: %s" % seen["plain"]
    return machine


def unit_log():
    units = ["wg-quick@wgmesh0", "kubemesh-device@wgmesh0", "kubemesh-routes", "systemd-networkd", "systemd-sysctl"]
    return subprocess.run(["journalctl", "-b", "--no-pager", "-o", "short-monotonic"] + ["-u%s" % unit for unit in units], text=True,
                          stdout=subprocess.PIPE, check=False).stdout[-3000:]


def explained(function):
    def case(*args):
        try:
            return function(*args)
        except Exception:
            print(unit_log(), flush=True)
            raise
    return case


def unchanged(lab, persistence):
    """A second run of the modules changes nothing."""
    machine = lab.nodes[0]
    for name, args in (("interface", {"persistence": persistence}), ("probe", {}), ("routes", {"send": True})):
        result = lab.module(machine, name, node="worker-1", diff=True, **args)
        assert not result["changed"], "%s: %s" % (name, result.get("steps"))


def set_up_networks(kubelet):
    """The underlay and the pod bridge of the machine; ``kubelet``: a unit that stands for it."""
    KEEP.mkdir(mode=0o700)
    for name, text in NETWORK.items():
        (pathlib.Path("/etc/systemd/network") / name).write_text(text)
    pathlib.Path("/etc/sysctl.d/99-zhardening.conf").write_text(SYSCTLS)
    pathlib.Path("/etc/systemd/system/kubelet.service").write_text(kubelet)
    cluster.sh("systemctl", "daemon-reload")
    cluster.sh("systemctl", "enable", "kubelet.service")
    cluster.sh("networkctl", "reload")
    assert wait_for(lambda: "2001:db8::11" in cluster.sh("ip", "addr") and "10.244.1.1/24" in cluster.sh("ip", "addr")), "no underlay"
    cluster.sh("systemctl", "restart", "systemd-sysctl")


def case_1_set_up_with_wg_quick(env):
    set_up_networks(KUBELET)
    (KEEP / "before.json").write_text(json.dumps(everything()))
    lab = start(env)
    machine, peer = lab.nodes
    keys = lab.make_keys()
    (KEEP / "keys.json").write_text(json.dumps(keys))
    (KEEP / "worker-2.key").write_text(peer.read("/etc/wireguard/wgmesh0.key"))
    lab.distribute(lab.document({"0": keys}))
    with lab.pinger(("pod-pod",), rate=10) as pinger:
        lab.module(machine, "interface", node="worker-1", persistence="wg-quick")
        lab.module(peer, "interface", node="worker-2", persistence="none")
        lab.modules("probe", node=name_of, require="all")
        lab.module(machine, "routes", node="worker-1", send=True)
        lab.module(peer, "routes", node="worker-2", send=True, persist=False)
        report = pinger.stop()
    env.note(sent=report["sent"], lost=report["lost"])
    assert report["lost"] == 0, lab.losses(report)
    unchanged(lab, "wg-quick")
    save(lab)
    secret = pathlib.Path("/etc/wireguard/wgmesh0.key").read_text().strip()
    assert cluster.sh("grep", "-rlF", secret, "/etc", "/run", "/var/lib", "/var/log", check=False).split() == ["/etc/wireguard/wgmesh0.key"]


def everything():
    """What must be as before when the mesh is gone: files, rules, routes, units."""
    files = cluster.sh("find", "/etc", "-xdev", "-type", "f", "-newer", "/etc/sysctl.d/99-zhardening.conf")
    return {"files": sorted(files.split()), "rules": cluster.sh("ip", "rule") + cluster.sh("ip", "-6", "rule"),
            "units": sorted(path.name for path in pathlib.Path("/etc/systemd/system/multi-user.target.wants").iterdir()),
            "rp_filter": cluster.sh("sysctl", "-n", "net.ipv4.conf.underlay.rp_filter")}


@explained
def _after_wg_quick(env):
    lab = start(env)
    machine = check_restored(env, lab)
    unchanged(lab, "wg-quick")
    with lab.pinger(("pod-pod", "host-pod"), rate=10) as pinger:
        # networkd deletes foreign rules and routes when it starts, unless told not to
        cluster.sh("systemctl", "restart", "systemd-networkd")
        time.sleep(2)
        unchanged(lab, "wg-quick")
        changed = lab.module(machine, "interface", node="worker-1", persistence="systemd-networkd")
        env.note(steps=changed["steps"])
        assert changed["changed"]
        unchanged(lab, "systemd-networkd")
        cluster.sh("networkctl", "reload")
        cluster.sh("systemctl", "restart", "systemd-networkd")
        time.sleep(2)
        report = pinger.stop()
    env.note(sent=report["sent"], lost=report["lost"])
    assert report["lost"] == 0, lab.losses(report)
    unchanged(lab, "systemd-networkd")
    save(lab)


def case_2_wg_quick_brings_the_mesh_back_and_networkd_takes_over(env):
    _after_wg_quick(env)


@explained
def _after_networkd(env):
    lab = start(env)
    machine = check_restored(env, lab)
    unchanged(lab, "systemd-networkd")
    with lab.pinger(("pod-pod", "host-pod"), rate=10) as pinger:
        cluster.sh("systemctl", "restart", "systemd-networkd")
        time.sleep(2)
        for node in lab.nodes:
            lab.module(node, "routes", state="absent")
        for node in lab.nodes:
            lab.module(node, "interface", state="absent")
        lab.module(machine, "keypair", state="absent")
        time.sleep(0.5)
        report = pinger.stop()
    env.note(sent=report["sent"], lost=report["lost"])
    assert report["lost"] == 0, lab.losses(report)
    os.unlink(cluster.DOCUMENT)
    before, after = json.loads((KEEP / "before.json").read_text()), everything()
    after["files"] = [name for name in after["files"] if os.path.exists(name)]
    assert not set(after["files"]) - set(before["files"]), "left behind: %s" % sorted(set(after["files"]) - set(before["files"]))
    for part in ("rules", "units", "rp_filter"):
        assert after[part] == before[part], "%s: %s, before %s" % (part, after[part], before[part])
    assert "wgmesh0" not in cluster.sh("ip", "link")


def case_3_networkd_brings_the_mesh_back_and_disable_leaves_nothing(env):
    _after_networkd(env)
