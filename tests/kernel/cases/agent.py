# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The node agent as the module installs it, with the kernel's WireGuard: its own user, one capability, systemd's confinement, a reboot.

The machine is worker-1, worker-2 is a namespace. Nobody is behind worker-3: it is a peer that is never proven. Strict mode is on.
"""
from __future__ import annotations

import base64
import json
import os
import pathlib
import re
import subprocess
import sys

import cluster

from cases.modules import name_of
from cases.persistence import AT_KUBELET, KEEP, KUBELET, bring_up, explained, set_up_networks, start, wait_for

UNIT, USER = "kubemesh-agent.service", "kubemesh-agent"
STATE = pathlib.Path("/run/kubemesh/agent/state.json")
MEMORY = pathlib.Path("/var/lib/kubemesh-agent/memory.json")
METRICS = pathlib.Path("/var/lib/kubemesh-agent/metrics/kubemesh.prom")
CA_FILE = "/etc/kubemesh-test-ca.crt"
KEY = "kubemesh.wireguard/public-key-0"
TOKEN = "token-of-a-test"
CAP_NET_ADMIN = 1 << 12  # linux/capability.h
AT_NETWORK = "/var/lib/kubemesh-test/at-network"
# What is guarded when networks are about to be set up?
LOOK = """[Unit]
Description=Looks at the guard before there is a network
DefaultDependencies=no
After=network-pre.target
Before=systemd-networkd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'exec >%s 2>&1; nft list set inet kubemesh_guard pods4; ip -o addr show dev underlay; true'
[Install]
WantedBy=sysinit.target
""" % AT_NETWORK
SECONDS = 60


def state():
    return json.loads(STATE.read_text()) if STATE.exists() else {}


def until(ready, what):
    """Wait for something; the journal of the agent says why it did not come."""
    if not wait_for(ready, SECONDS):
        raise AssertionError("%s did not come; state: %s\n%s" % (what, state(), journal()))


def journal():
    return cluster.sh("journalctl", "-b", "--no-pager", "-o", "cat", "-u", UNIT, "-u", "kubemesh-agent-guard.service")[-4000:]


def allowed():
    """{public key: allowed IPs} of the machine's device."""
    lines = cluster.sh("wg", "show", "wgmesh0", "allowed-ips").splitlines()
    return {line.split("\t")[0]: set(line.split("\t")[1].split()) for line in lines}


def routes():
    return {line.split()[0] for line in cluster.sh("ip", "-4", "route", "show", "table", "51840").splitlines()}


def guarded():
    return set(re.findall(r"10\.244\.[0-9./]+", cluster.sh("nft", "list", "set", "inet", "kubemesh_guard", "pods4")))


def node_object(api, node, key, cidrs=None):
    number = int(node[-1])
    return api.node(node, cidrs or ["10.244.%d.0/24" % number, "fd00:10:244:%d::/64" % number],
                    ["198.18.0.%d" % (10 + number), "2001:db8::%d" % (10 + number)], {KEY: key}, uid="uid-" + node)


def main_pid():
    return int(cluster.sh("systemctl", "show", "-p", "MainPID", "--value", UNIT))


def memory_holds(pid, *needles):
    """Which of some bytes are anywhere in the memory of a process that it can write to."""
    found = set()
    with open("/proc/%d/maps" % pid, encoding="utf-8") as maps, open("/proc/%d/mem" % pid, "rb", buffering=0) as memory:
        for line in maps:
            place, rights = line.split()[:2]
            if "w" not in rights or "[v" in line:
                continue
            first, last = (int(text, 16) for text in place.split("-"))
            memory.seek(first)
            data = b""
            while len(data) < last - first:
                piece = memory.read(last - first - len(data))
                if not piece:
                    break
                data += piece
            found |= {needle for needle in needles if needle in data}
    return found


def check_confined(pid):
    status = dict(line.split(":\t", 1) for line in pathlib.Path("/proc/%d/status" % pid).read_text().splitlines() if ":\t" in line)
    uid = cluster.sh("id", "-u", USER).strip()
    assert set(status["Uid"].split()) == {uid} and uid != "0", status["Uid"]
    for kind in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == CAP_NET_ADMIN, "%s: %s" % (kind, status[kind])
    assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2", status
    for path in ("/etc/wireguard/wgmesh0.key", "/etc/shadow"):
        read = subprocess.run(["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "cat", path], capture_output=True,
                              check=False)
        assert read.returncode and b"Permission denied" in read.stderr, "%s can be read by the agent's user" % path


def check_private_key_is_nowhere(pid):
    """WireGuard tells its private key to whoever has the capability: it must be gone from the agent's memory, and be nowhere else."""
    secret = pathlib.Path("/etc/wireguard/wgmesh0.key").read_text().strip()
    raw = base64.b64decode(secret)
    public = cluster.sh("wg", "show", "wgmesh0", "public-key").strip()
    found = memory_holds(pid, raw, secret.encode(), raw.hex().encode(), public.encode())
    assert found == {public.encode()}, "the agent's memory holds its own public key: %s, and %d forms of the private one" % (
        public.encode() in found, len(found - {public.encode()}))
    paths = cluster.sh("grep", "-rlF", secret, "/etc", "/run", "/var/lib", "/var/log", check=False).split()
    assert paths == ["/etc/wireguard/wgmesh0.key"], paths
    assert secret not in cluster.sh("journalctl", "-b", "--no-pager")


@explained
def case_1_the_agent_follows_the_cluster_as_a_user_with_one_capability(env):
    set_up_networks("kubemesh-test.service", LOOK)
    pathlib.Path("/etc/systemd/system/kubelet.service").write_text(KUBELET)
    cluster.sh("systemctl", "daemon-reload")
    cluster.sh("systemctl", "enable", "kubelet.service")  # runs after the reboot
    lab = start(env)
    machine, peer = lab.nodes
    keys = lab.make_keys()
    (KEEP / "worker-2.key").write_text(peer.read("/etc/wireguard/wgmesh0.key"))
    lab.distribute(lab.document({"0": keys}))
    lab.module(machine, "interface", node="worker-1", persistence="wg-quick")
    bring_up(lab, peer)
    lab.modules("probe", node=name_of, require="all")
    lab.module(machine, "routes", node="worker-1", send=True)
    lab.module(machine, "guard", node="worker-1")
    pathlib.Path(CA_FILE).write_bytes(pathlib.Path("/payload/tls/ca.crt").read_bytes())
    lab.module(machine, "agent", node="worker-1", server="https://127.0.0.1:6443", ca_file=CA_FILE, token=TOKEN, grace=2)
    second = lab.module(machine, "agent", node="worker-1", server="https://127.0.0.1:6443", ca_file=CA_FILE, token=TOKEN, grace=2)
    assert not second["changed"], second["steps"]
    third = lab.module(machine, "guard", node="worker-1", admin_ports=[22, 6443])
    assert third["changed"] and os.stat("/etc/kubemesh/guard.nft").st_gid == os.stat("/run/kubemesh").st_gid != 0

    sys.path.insert(0, "/payload")
    import apiserver as api

    # From here on there are threads: nothing of the cluster forks any more.
    with api.ApiServer("127.0.0.1", 6443, "/payload/tls", {"agent": TOKEN}) as server:
        nodes = {name: node_object(api, name, key) for name, key in keys.items()}
        for obj in nodes.values():
            server.apply("nodes", obj)
        until(lambda: state().get("api") == "watching" and not state()["hindrance"], "an agent that watches")
        pid = main_pid()
        check_confined(pid)
        until(lambda: state()["guard"] == "in force", "the guard in force")
        assert "6443" in cluster.sh("nft", "list", "set", "inet", "kubemesh_guard", "admin_ports")
        assert routes() == {"10.244.2.0/24"} and guarded() == {"10.244.2.0/24"}

        stranger = cluster.sh("wg", "pubkey", data=cluster.sh("wg", "genkey")).strip()
        server.apply("nodes", node_object(api, "worker-3", stranger))
        until(lambda: stranger in allowed() and state()["unproven"] == ["worker-3"], "worker-3 as a peer")
        assert "10.244.3.0/24" in allowed()[stranger] and routes() == {"10.244.2.0/24"}
        assert guarded() == {"10.244.2.0/24", "10.244.3.0/24"}
        server.apply("nodes", node_object(api, "worker-3", stranger, ["10.244.33.0/24"]))
        until(lambda: "10.244.33.0/24" in allowed()[stranger] and guarded() == {"10.244.2.0/24", "10.244.33.0/24"}, "its other pod CIDR")
        assert "10.244.3.0/24" not in allowed()[stranger]
        server.delete("nodes", "worker-3")
        until(lambda: stranger not in allowed() and guarded() == {"10.244.2.0/24"}, "worker-3 gone")

        # worker-2 goes and comes back: it is proven and sent to again, without a run.
        server.delete("nodes", "worker-2")
        until(lambda: allowed() == {} and routes() == set(), "worker-2 gone")
        server.apply("nodes", nodes["worker-2"])
        until(lambda: routes() == {"10.244.2.0/24"}, "routes to worker-2")
        cluster.sh("ping", "-c", "1", "-W", "5", "-I", "198.18.0.11", "10.244.2.1")
        cluster.sh("wg", "set", "wgmesh0", "peer", keys["worker-2"], "remove")
        cluster.sh("nft", "flush", "ruleset")
        repairs = state()["counts"]["repairs"]
        os.utime(cluster.DOCUMENT)
        until(lambda: state()["counts"]["repairs"] > repairs and keys["worker-2"] in allowed(), "repairs")
        until(lambda: guarded() == {"10.244.2.0/24"}, "the guard that was flushed")
        assert "kubemesh_guard_in_force 1" in METRICS.read_text()
        env.note(lag=state()["lag"])
        assert main_pid() == pid, "it was started again: %s" % journal()
        check_private_key_is_nowhere(pid)

        server.apply("nodes", node_object(api, "worker-3", stranger))
        until(lambda: "worker-3" in MEMORY.read_text() and "10.244.3.0/24" in guarded(), "worker-3 in the agent's memory")


@explained
def case_2_after_a_reboot_without_the_api_it_goes_by_what_it_remembers(env):
    seen = pathlib.Path(AT_NETWORK).read_text()
    assert "10.244.2.0/24" in seen and "10.244.3.0/24" in seen, "guarded before there was a network: %s\n%s" % (seen, journal())
    assert "198.18.0.11" not in seen, "too late: the underlay was up already: %s" % seen
    assert "10.244.3.0/24" not in pathlib.Path("/etc/kubemesh/guard.nft").read_text()
    until(lambda: "cni0" in cluster.sh("ip", "link"), "the pod bridge")
    lab = start(env)
    until(lambda: state().get("nodes") == 3 and len(allowed()) == 2, "the mesh as the agent remembers it")
    assert state()["api"] != "watching" and state()["guard"] == "in force" and guarded() == {"10.244.2.0/24", "10.244.3.0/24"}
    check_confined(main_pid())
    until(lambda: cluster.sh("systemctl", "is-active", "kubelet.service", check=False).strip() == "active", "kubelet")
    seen = pathlib.Path(AT_KUBELET).read_text()
    assert set(allowed()) <= set(seen.split()), "no peer yet when pods were started: %s\n%s" % (seen, journal())
    circles = [line for line in cluster.sh("journalctl", "-b", "--no-pager", "-o", "cat").splitlines() if "ordering cycle" in line]
    assert not circles, circles
    machine = lab.nodes[0]
    lab.module(machine, "agent", state="absent")
    lab.module(machine, "guard", state="absent")
    assert cluster.sh("id", USER, check=False) == ""
    for path in ("/etc/kubemesh", "/etc/kubemesh/mesh.json"):
        found = os.stat(path)
        assert (found.st_uid, found.st_gid, found.st_mode & 0o6022) == (0, 0, 0), "%s is left to others" % path
    left = cluster.sh("find", "/etc", "/run/kubemesh", "/usr/local/lib", "/var/lib", "-name", "*kubemesh-agent*", check=False).split()
    assert not left, left
