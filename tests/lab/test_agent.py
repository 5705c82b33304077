# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents on real hosts, with an API server: nodes that come, change and go, whatever can go wrong, and playbooks beside them.

Each test goes on from the one before. Pings and streams between all pods run all the time, and at the end of each every kernel holds what
the API says.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kube
from harness import Watched, all_encrypted, assert_encrypted, differences, infos, keep_on_failure, made, text_of, traces

GRACE = 5  # seconds, mesh_agent_grace
KINDS = ("pod-pod", "host-pod")
UNIT = "kubemesh-agent"
GHOST_KEY = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="


@pytest.fixture(scope="module")
def cluster():
    lab = made("agent", nodes=3, pods=1, rp_filter=1)
    lab.before = {node: traces(lab, node) for node in lab.nodes}
    with kube.Cluster(lab) as found:
        yield found
    if not keep_on_failure():
        lab.down()


def watched(cluster, without=(), pair=(), streams=True):
    """Traffic on all flows but those of nodes ``without``, and those between a ``pair`` of nodes."""
    def of(host):
        return host.rpartition("-pod-")[0] or host

    flows = [flow for flow in Watched.all_flows(cluster.lab, KINDS) if not {of(flow["source"]), of(flow["target"])} & set(without)
             and {of(flow["source"]), of(flow["target"])} != set(pair)]
    return Watched(cluster.lab, kinds=KINDS, flows=flows, streams=streams and not without and not pair)


def watching(state):
    return state.get("api") == "watching" and not state["hindrance"]


def pid(cluster, node):
    """Main process of the agent's unit; 0 while there is none."""
    return int(text_of(cluster.lab, node, "systemctl show -p MainPID --value %s" % UNIT))


def journal(cluster, node):
    return text_of(cluster.lab, node, "journalctl -u %s --no-pager -o cat" % UNIT)


def ghost(cluster, cidr="10.246.0.0/24"):
    """A Node of which nothing is there but a key: a peer that nobody reaches."""
    generation = min(cluster.published()["node-1"])
    return kube.apiserver.node("ghost", [cidr], ["198.18.0.250"], {kube.KEYS[generation]: GHOST_KEY})


def variables(cluster):
    return cluster.agent(mesh_agent_grace=GRACE)


def test_enable_with_agents(cluster):
    with watched(cluster):
        run = cluster.playbook("enable", *variables(cluster), preflight=False)
        cluster.wait_agents(watching, "watches the API")
    assert "3 of 3 nodes done" in run.text
    assert {node: list(keys) for node, keys in cluster.published().items()} == {node: [0] for node in cluster.lab.nodes}
    cluster.wait_kernel()
    assert all_encrypted(infos(cluster.lab))
    assert_encrypted(cluster.lab)


def test_a_second_run_changes_nothing(cluster):
    with watched(cluster):
        for name in ("enable", "reconcile"):
            run = cluster.playbook(name, *variables(cluster), preflight=False)
            assert set(run.changed().values()) == {0}, run.text
        cluster.wait_agents(watching, "watches the API")


def rotate(cluster):
    """Agents wait while nodes have two keys, and go on with the new ones."""
    before = cluster.published()
    generation = 1 - min(before["node-1"])
    with watched(cluster):
        cluster.playbook("rotate_keys", *variables(cluster))
        cluster.wait_agents(watching, "watches the API, nothing in its way")
        cluster.wait_kernel()
        cluster.api.apply("nodes", ghost(cluster))
        cluster.wait_agents(lambda state: "ghost" in state["unproven"], "goes on")
        cluster.api.delete("nodes", "ghost")
        cluster.wait_kernel()
    found = cluster.published()
    assert {node: list(keys) for node, keys in found.items()} == {node: [generation] for node in cluster.lab.nodes}
    own = {node: result["device"]["public_key"] for node, result in infos(cluster.lab).items()}
    assert own == {node: keys[generation] for node, keys in found.items()}
    assert all_encrypted(infos(cluster.lab))


def test_rotation_beside_agents(cluster):
    rotate(cluster)


def test_a_node_joins_by_a_run_of_few(cluster):
    """The others learn its key from the API, and accept from it while the run still proves it."""
    with watched(cluster):
        node = cluster.add_node()
        cluster.playbook("reconcile", *variables(cluster), "--limit", "node-1,%s" % node)
        cluster.wait_kernel()
    assert all_encrypted(infos(cluster.lab))
    assert_encrypted(cluster.lab)


def test_a_pod_cidr_changes(cluster):
    item = cluster.api.get("nodes", "node-4")
    with watched(cluster, without=["node-4"]):
        for cidrs in (["10.245.4.0/24", "fd00:10:245:4::/64"], item["spec"]["podCIDRs"]):
            changed = dict(item, spec=dict(item["spec"], podCIDR=cidrs[0], podCIDRs=cidrs))
            cluster.api.recreate("nodes", "node-4", obj=changed)
            cluster.wait_kernel()


def test_a_node_is_deleted_by_mistake_and_comes_back(cluster):
    """Its own agent believes nothing that does not have it."""
    item = cluster.api.get("nodes", "node-4")
    with watched(cluster, without=["node-4"]):
        cluster.api.delete("nodes", "node-4")
        cluster.wait_kernel(cluster.lab.nodes[:3])
        assert len(cluster.held("node-4")["peers"]) == 3
        cluster.api.apply("nodes", item)
        cluster.wait_kernel()
    with watched(cluster):
        time.sleep(2)


# What `kubeadm reset` and a new image leave: another key.
INSTALLED_ANEW = """
systemctl disable --now kubemesh-agent kubemesh-routes wg-quick@wgmesh0
systemctl stop kubemesh-userspace@wgmesh0
for family in -4 -6; do
    for priority in 400 401; do while ip $family rule del pref $priority 2>/dev/null; do :; done; done
    for table in 51840 51841; do ip $family route flush table $table; done
done
rm -rf /etc/kubemesh /etc/wireguard/* /run/kubemesh /var/lib/kubemesh-agent /usr/local/lib/kubemesh
true
"""


def test_a_node_is_replaced_under_the_same_name(cluster):
    """Another machine, another key; the Node is new, so it has no annotation. The run sees no other host."""
    before = cluster.published()["node-4"]
    with watched(cluster, without=["node-4"]):
        text_of(cluster.lab, "node-4", INSTALLED_ANEW)
        cluster.api.recreate("nodes", "node-4", obj=dict(cluster.node("node-4"), metadata={"name": "node-4"}))
        cluster.playbook("enable", *variables(cluster), "--limit", "node-4", preflight=False)
        assert cluster.published()["node-4"] != before
        cluster.wait_kernel()
    assert all_encrypted(infos(cluster.lab))
    with watched(cluster):
        time.sleep(2)


# --- what goes wrong


def test_the_api_is_away_and_what_changed_meanwhile(cluster):
    with watched(cluster):
        cluster.api.down()
        cluster.wait_agents(lambda state: state["api"] != "watching", "says that the API is away")
        cluster.api.apply("nodes", ghost(cluster))
        time.sleep(GRACE + 2)  # longer than nodes may be missing
        cluster.api.up()
        cluster.wait_agents(lambda state: "ghost" in state["unproven"], "tries to reach the node that joined")
        assert all(GHOST_KEY in cluster.held(node)["peers"] for node in cluster.lab.nodes)
        cluster.api.delete("nodes", "ghost")
        cluster.wait_kernel()


@pytest.mark.parametrize("fault", ["empty", "garbage", "half"])
def test_lists_that_are_none(cluster, fault):
    """Each agent is told once that there are no nodes at all, and half a list or something else in its place."""
    with watched(cluster):
        before = len(cluster.api.requests)
        cluster.api.fault(fault, verb="list", resource="nodes", token=cluster.tokens["agents"], times=len(cluster.lab.nodes))
        cluster.api.compact()
        cluster.api.close_watches()

        def again():
            seen = cluster.api.requests[before:]
            return (sum(1 for request in seen if request["verb"] == "list" and request["fault"] == fault),
                    sum(1 for request in seen if request["verb"] == "watch" and request["code"] == 200))

        kube.wait(again, lambda found: found[0] == len(cluster.lab.nodes) and found[1] >= len(cluster.lab.nodes), "lists and watches")
        time.sleep(GRACE + 2)
        cluster.wait_agents(watching, "watches the API")
        cluster.wait_kernel(seconds=1)
    cluster.api.clear_faults()


def test_killed_at_random_moments(cluster):
    """While the API changes all the time. Seed in the message: the same moments again, as far as the machine allows."""
    seed = random.randrange(1 << 30)
    print("seed %d" % seed)
    chance = random.Random(seed)
    killed = 0
    with watched(cluster):
        for turn in range(12):
            cluster.api.apply("nodes", ghost(cluster, "10.246.%d.0/24" % turn))
            time.sleep(chance.uniform(0, 0.4))
            killed += int(text_of(cluster.lab, chance.choice(cluster.lab.nodes), "systemctl kill -s KILL %s 2>/dev/null && echo 1 || echo 0"
                                  % UNIT))
            time.sleep(chance.uniform(0, 0.4))
            cluster.api.delete("nodes", "ghost")
            time.sleep(chance.uniform(0, 1.5))
        cluster.wait_agents(watching, "watches the API")
        cluster.wait_kernel()
    assert killed >= 6, killed


def test_a_second_agent(cluster):
    command = text_of(cluster.lab, "node-1", "systemctl show -p ExecStart --value %s | sed 's/.*argv\\[\\]=//; s/ ;.*//'" % UNIT)
    first = pid(cluster, "node-1")
    with watched(cluster):
        said = text_of(cluster.lab, "node-1", "%s 2>&1; echo rc $?" % command.strip())
        assert "another agent is at work" in said and "rc 3" in said
        cluster.wait_agents(watching, "watches the API")
    assert pid(cluster, "node-1") == first > 0


def test_the_kernel_is_changed_by_others(cluster):
    """A rule, routes and a peer go, on a node each. What is sent meanwhile goes in clear or is kept by nobody who is not concerned. The
    kernel tells of rules and routes; of peers it does not, and the agent looks every 60 to 90 s."""
    lab = cluster.lab
    rules = text_of(lab, "node-1", "ip rule; ip -6 rule")
    (generation, peer), = cluster.published()["node-4"].items()
    repairs = {node: cluster.agent_state(node)["counts"]["repairs"] for node in lab.nodes[:3]}
    # Packets of a peer that is removed are lost until it is there again.
    with watched(cluster, pair=("node-3", "node-4")):
        text = "ip rule; ip -6 rule"
        assert text_of(lab, "node-1", "ip rule del pref 400; ip -6 rule del pref 400; ip rule del pref 401; %s" % text) != rules
        text_of(lab, "node-2", "ip route flush table 51840; ip -6 route flush table 51841")
        text_of(lab, "node-3", "wg set wgmesh%d peer %s remove" % (generation, peer))
        for node, before in repairs.items():
            cluster.wait_agents(lambda state, before=before: state["counts"]["repairs"] > before, "repaired", [node], seconds=120)
        cluster.wait_kernel()
    assert text_of(lab, "node-1", "ip rule; ip -6 rule") == rules
    assert all(cluster.agent_state(node)["counts"]["repairs"] > repairs[node] for node in repairs)
    assert all_encrypted(infos(lab))
    assert_encrypted(lab)


def test_its_disk_is_full(cluster):
    """It cannot keep anything, and goes on; with a place to write it keeps what it knows."""
    lab = cluster.lab
    with watched(cluster):
        text_of(lab, "node-2", """
systemctl stop kubemesh-agent
mount -t tmpfs -o size=4k,mode=755 tmpfs /var/lib/kubemesh-agent
dd if=/dev/zero of=/var/lib/kubemesh-agent/full bs=1k 2>/dev/null
mkdir -p /var/lib/kubemesh-agent/metrics
systemctl start kubemesh-agent
""")
        cluster.wait_agents(watching, "watches the API", ["node-2"])
        for change in (lambda: cluster.api.apply("nodes", ghost(cluster)), lambda: cluster.api.delete("nodes", "ghost")):
            change()
            kube.wait(lambda: set(cluster.held("node-2")["peers"]), lambda found: found == set(cluster.expected("node-2")["peers"]),
                      "the peers of node-2")
        assert "No space left" in journal(cluster, "node-2")
        assert pid(cluster, "node-2") > 0
        text_of(lab, "node-2", "systemctl stop kubemesh-agent; umount /var/lib/kubemesh-agent; systemctl start kubemesh-agent")
        cluster.wait_agents(watching, "watches the API", ["node-2"])
        cluster.wait_kernel()


# A clock cannot be set for one container: time namespaces have the monotonic clocks only. So the agent itself is told another time.
OTHER_CLOCK = """\
import runpy
import sys
import time

real = time.time


def moved():
    with open("/run/clock-offset", encoding="ascii") as handle:
        return real() + float(handle.read())


time.time = moved
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_clock_is_set(cluster):
    """Forward and back by a day, while a node goes and comes: nobody is taken for gone or proven by it."""
    lab = cluster.lab
    item = cluster.api.get("nodes", "node-4")
    folder = "/run/systemd/system/%s.service.d" % UNIT
    lab.exec("node-1", ["sh", "-c", "cat > /run/other-clock.py; echo 0 > /run/clock-offset"], stdin=OTHER_CLOCK)
    text_of(lab, "node-1", """
command=$(systemctl show -p ExecStart --value kubemesh-agent \\
  | sed 's/.*argv\\[\\]=//; s/ ;.*//; s,/usr/local,/run/other-clock.py /usr/local,')
mkdir -p %s
printf '[Service]\\nExecStart=\\nExecStart=%%s\\n' "$command" > %s/clock.conf
systemctl daemon-reload
systemctl restart kubemesh-agent
""" % (folder, folder))
    try:
        with watched(cluster, without=["node-4"]):
            for offset in (86400, -86400):
                text_of(lab, "node-1", "echo %d > /run/clock-offset" % offset)
                cluster.api.delete("nodes", "node-4")
                cluster.wait_kernel(lab.nodes[:3])
                cluster.api.apply("nodes", item)
                cluster.wait_kernel()
                assert abs(cluster.agent_state("node-1")["time"] - offset - time.time()) < 3600
    finally:
        text_of(lab, "node-1", "rm -rf %s; systemctl daemon-reload; systemctl restart kubemesh-agent" % folder)
    cluster.wait_agents(watching, "watches the API")
    assert all_encrypted(infos(lab))


def test_a_reboot(cluster):
    """The node is up to the API again, also by what happened while it was off."""
    with watched(cluster, without=["node-3"]):
        cluster.lab.poweroff("node-3")
        cluster.api.apply("nodes", ghost(cluster))
        cluster.api.delete("nodes", "ghost")
        cluster.lab.poweron("node-3")
        cluster.wait_agents(watching, "watches the API", ["node-3"])
        cluster.wait_kernel()
    assert all_encrypted(infos(cluster.lab))


# --- the way back


def test_rotation_beside_agents_that_publish(cluster):
    """With the right to write Nodes they bring no old key back."""
    cluster.permit("agents")
    rotate(cluster)
    cluster.permit()


def test_a_node_leaves(cluster):
    with watched(cluster, without=["node-4"]):
        cluster.lab.poweroff("node-4")
        cluster.api.delete("nodes", "node-4")
        cluster.wait_kernel(cluster.lab.nodes[:3])


def test_disable_removes_the_agents(cluster):
    lab = cluster.lab
    with watched(cluster, without=["node-4"]):
        cluster.playbook("disable", "--limit", "node-1,node-2,node-3", "-e", '{"mesh_forget_nodes": ["node-4"]}')
    assert cluster.published() == {node: {} for node in lab.nodes[:3]}
    # A reboot of its own changes what systemd notes of a boot, so node-3 is not compared.
    for node in ("node-1", "node-2"):
        # The lab's own way to node-4 was made when it joined, by no mesh.
        found = [line for line in differences(lab.before[node], traces(lab, node)) if " via 198.18.0.14 " not in line
                 and " via fd00:18::e " not in line]
        assert not found, "\n".join(found)
