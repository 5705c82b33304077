# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab tests share: a playbook that must work, traffic that must not be lost, a wire that must show nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "kernel")]
import lab as labs
import traffic
from payload import bring_library

# Seconds that the wire is looked at: ten markers a second and flow.
LOOK = 3
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


class Run:
    """One run of a playbook: ``rc``, ``text``, ``recap`` {host: {"ok", "changed", "unreachable", "failed"}}."""

    def __init__(self, completed):
        self.rc, self.text = completed.returncode, completed.stdout
        self.recap = {
            found[0]: dict(zip(("ok", "changed", "unreachable", "failed"), map(int, found[1:]))) for found in RECAP.findall(self.text)}

    def changed(self):
        return {host: counts["changed"] for host, counts in self.recap.items()}


def playbook(lab, name, *args, rc=0, source="inventory", preflight=True, env=None, timeout=600):
    """Run a playbook of the collection (or a file); its exit code must be ``rc``."""
    what = name if "/" in name else "kubemesh.wireguard.%s" % name
    extra = ["-e", "mesh_nodes_source=%s" % source] if source and name == "enable" else []
    if name == "enable" and not preflight:
        extra += ["-e", "mesh_preflight=false"]
    run = Run(lab.ansible_playbook([what, *extra, *args], env=env, timeout=timeout))
    assert run.rc == rc, "%s %s ended with %s, not %s:\n%s" % (what, " ".join(args), run.rc, rc, run.text[-6000:])
    return run


class Watched:
    """Traffic of every kind while something happens; leaving the block judges it.

    Pings at 20/s on every flow, TCP streams of full segments both ways, and with a NodePort new and lasting connections to it.
    """

    def __init__(self, lab, kinds=traffic.KINDS, flows=None, streams=True):
        self.lab, self.kinds, self.flows, self.streams = lab, kinds, flows, streams
        self.tools, self.reports = {}, {}

    @staticmethod
    def all_flows(lab, kinds=traffic.KINDS):
        """The flows that are watched, to choose from; without streams and requests, which take all nodes."""
        return traffic.matrix(lab, kinds, None)

    def __enter__(self):
        self.tools["pings"] = traffic.start_pings(self.lab, kinds=self.kinds, flows=self.flows)
        # Full segments five times a second on each, and a new connection to each NodePort seven times: a packet through userspace
        # WireGuard costs 0.1 ms on each side, and two cores have no room for more on top of the pings.
        if self.streams:
            self.tools["streams"] = traffic.start_streams(self.lab, bits_per_second=60_000)
        if self.lab.options.nodeport and self.streams:
            self.tools["requests"] = traffic.start_requests(self.lab, interval=0.15)
        time.sleep(1)  # every flow has packets and connections before anything happens
        return self

    def __exit__(self, kind, dummy_error, dummy_trace):
        self.reports = {name: tool.stop() for name, tool in self.tools.items()}
        if kind is None:
            self.judge()

    def judge(self):
        pings = self.reports["pings"]
        said = "\n".join(traffic.describe(report) for report in self.reports.values())
        assert pings["sent"] > 100 and pings["drops"] == 0, said
        lost = [
            "%(source)s -> %(target)s %(family)s lost %(lost)d at %(lost_at)s" % dict(flow, lost_at=flow["lost_at"][:5])
            for flow in pings["flows"] if flow["lost"]]
        assert not lost, "lost packets:\n%s\n%s" % ("\n".join(lost[:40]), said)
        if self.streams:
            streams = self.reports["streams"]
            assert streams["sent"] > 0 and streams["errors"] == 0 and streams["wrong"] == 0, said
        if "requests" in self.reports:
            requests = self.reports["requests"]
            assert requests["ok"] > 0, said
            failures = [dict(failure, flow="%(target)s %(family)s" % flow) for flow in requests["flows"] for failure in flow["failures"]]
            assert requests["failed"] == requests["lasting_failed"] == requests["bulk_failed"] == 0, (failures[:20], said)


@contextlib.contextmanager
def sniffed(lab, kinds):
    """Marked packets and a look at the underlay while something happens: a dict that has the markers' report as "sent" and the sniffer's as
    "seen" when the block is left. What may be in clear is for the caller to say."""
    found = {}
    # The sniffer begins first: what is sent before it looks may well be in clear.
    sniffer = traffic.start_sniffer(lab)
    try:
        markers = traffic.start_markers(lab, kinds=kinds)
        try:
            yield found
        finally:
            found["sent"] = markers.stop()
    finally:
        found["seen"] = sniffer.stop()
    assert found["sent"]["received"] > 0 and found["seen"]["frames"] > 0 and found["seen"]["drops"] == 0, found


def wire(lab, kinds=("pod-pod",)):
    """What the underlay shows of marked packets for a few seconds: the sniffer's report."""
    with sniffed(lab, kinds) as found:
        time.sleep(LOOK)
    return found["seen"]


def assert_clear(lab):
    """Before the mesh: the marker can be read, so the sniffer works and the test means something."""
    seen = wire(lab)
    assert seen["clear_frames"] > 0 and seen["wireguard_frames"] == 0, traffic.describe(seen)


def assert_encrypted(lab, kinds=("pod-pod", "host-pod", "pod-host")):
    """No marker in clear, and WireGuard's packets instead."""
    seen = wire(lab, kinds)
    assert seen["clear_frames"] == 0, seen["clear"][:10]
    assert seen["wireguard_frames"] > 0, traffic.describe(seen)


def text_of(lab, node, script):
    """What a shell script on a node prints."""
    printed = lab.exec(node, ["sh", "-c", script]).stdout
    return printed.decode() if isinstance(printed, bytes) else printed


def traces(lab, node):
    """Everything of a node that the mesh could leave behind, as text by what it is.

    Not what useradd(8) and userdel(8) keep of the time before, /etc/passwd- and its like: that is the same change, one step
    behind. Nor the CA of the cluster, which the tests put there.
    """
    script = r"""
cd /
echo "## files"; find /etc /run/kubemesh /usr/local /var/lib /root -xdev \( -path /etc/ssh -o -path '*/systemd/timers' \
  -o -path '/root/.ansible*' -o -path '*/__pycache__*' -o -path '/etc/passwd-' -o -path '/etc/group-' -o -path '/etc/shadow-' \
  -o -path '/etc/gshadow-' -o -path /etc/kubernetes \) -prune -o \( -type f -o -type l \) -print0 2>/dev/null \
  | sort -z | xargs -0r sha256sum 2>/dev/null
echo "## folders"; find /etc -xdev -path /etc/kubernetes -prune -o -type d -print | sort
echo "## links"; ip -o link | sed 's/^[0-9]*: //; s/ \(mtu\|qlen\) .*//' | sort
echo "## addresses"; ip -o addr | awk '{print $2, $4}' | sort
echo "## rules"; ip rule; ip -6 rule
echo "## routes"; for t in main 51840 51841; do ip route show table $t 2>/dev/null; ip -6 route show table $t 2>/dev/null; done \
  | sed 's/ expires [0-9]*sec//' | sort
echo "## sysctls"; sysctl -a 2>/dev/null | grep -E 'rp_filter|src_valid_mark|forwarding|addr_gen_mode|disable_ipv6' | sort
echo "## nft"; nft list ruleset 2>/dev/null | grep -v counter
echo "## units"; systemctl list-unit-files --no-legend --no-pager | sort
echo "## processes"; ps -eo args | grep -E 'wireguard|kubemesh' | grep -v grep || true
"""
    text = text_of(lab, node, script)
    parts = {}
    for part in text.split("## ")[1:]:
        title, dummy, body = part.partition("\n")
        parts[title] = body.splitlines()
    return parts


def differences(before, after):
    """Lines of `traces` that came or went."""
    found = []
    for title in before:
        found += ["%s: - %s" % (title, line) for line in before[title] if line not in after[title]]
        found += ["%s: + %s" % (title, line) for line in after[title] if line not in before[title]]
    return found


# Where nodes find modules that are called without Ansible.
MODULES_ON_NODE = "/opt/kubemesh-tests"
CALL = f"""
import importlib, json, sys
sys.path.insert(0, "{MODULES_ON_NODE}")
from ansible.module_utils.testing import patch_module_args
with patch_module_args(json.load(sys.stdin)):
    importlib.import_module("ansible_collections.kubemesh.wireguard.plugins.modules." + sys.argv[1]).main()
"""


def bring_modules(lab, node):
    """Give a node what Ansible would send it."""
    root = Path("/proc/%d/root%s" % (lab.leader(node), MODULES_ON_NODE))
    if root.exists():
        return
    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    bring_library(partial)
    partial.rename(root)


def call_module(lab, node, name, arguments):
    """Result of a module of the collection on a node; without Ansible, which takes ten times as long to ask three nodes."""
    bring_modules(lab, node)
    done = lab.exec(node, ["python3", "-c", CALL, name], stdin=json.dumps(arguments), check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and done.returncode == 0, "%s on %s ended with %d: %s" % (name, node, done.returncode, (done.stdout + done.stderr)[-3000:])
    return json.loads(lines[-1])


def infos(lab):
    """{node: result of `mesh_info`} of all nodes."""
    return {node: call_module(lab, node, "mesh_info", {"node": node}) for node in lab.nodes}


def info(lab, node):
    """Result of `mesh_info` on one node."""
    return call_module(lab, node, "mesh_info", {"node": node})


def states(found):
    """{node: {peer: state}} of what `infos` found."""
    return {node: {row["name"]: row["state"] for row in result["peers"]} for node, result in found.items()}


def all_encrypted(found):
    """Whether every node has every other as a peer, and every pair is encrypted both ways; of what `infos` found."""
    return states(found) == {node: dict.fromkeys([peer for peer in found if peer != node], "encrypted") for node in found}


# A script that makes a node one that was installed anew: no key, no document, no device.
INSTALLED_ANEW = """
device=$(wg show interfaces)
systemctl disable --now kubemesh-routes "wg-quick@$device"
systemctl stop "kubemesh-userspace@$device"
for family in -4 -6; do
    for priority in 400 401; do while ip $family rule del pref $priority 2>/dev/null; do :; done; done
done
rm -rf /etc/kubemesh /etc/wireguard/* /run/kubemesh
true
"""


def made(name, **options):
    """A lab that is up; one of the same name that was left over is removed first."""
    lab = labs.Lab(name)
    lab.down()
    lab.up(**options)
    return lab


def keep_on_failure():
    """KUBEMESH_LAB_KEEP=1 leaves the hosts up, to look at them."""
    return os.environ.get("KUBEMESH_LAB_KEEP") == "1"
