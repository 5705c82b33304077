# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What changes while a mesh is in use: nodes and prefixes that come, move and go, new keys, host encryption. Nothing is lost by it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import (
    INSTALLED_ANEW,
    Watched,
    all_encrypted,
    assert_encrypted,
    differences,
    infos,
    keep_on_failure,
    made,
    playbook,
    text_of,
    traces,
    wire,
)


@pytest.fixture(scope="module")
def lab():
    found = made("change", nodes=3, pods=1, rp_filter=1, masquerade=True, nodeport=True)
    playbook(found, "enable")
    yield found
    if not keep_on_failure():
        found.down()


def sessions(lab, node):
    """{peer's public key: (last handshake, bytes received)} of the one mesh device that there is, as `wg` reports them."""
    lines = text_of(lab, node, "wg show $(wg show interfaces) dump").splitlines()[1:]
    return {line.split("\t")[0]: (int(line.split("\t")[4]), int(line.split("\t")[5])) for line in lines}


def go_on(before, after):
    """Whether the sessions with these peers are the same ones: counters only grow, and nobody was removed and added again."""
    return all(key in after and after[key][1] > received for key, (dummy, received) in before.items())


def node_list(lab, change):
    """A NodeList file as the cluster has it, with a change to it: the arguments that make a run read it."""
    listed = json.loads((lab.state / "nodes.json").read_text())
    change({item["metadata"]["name"]: item for item in listed["items"]}, listed["items"])
    path = lab.state / "changed-nodes.json"
    path.write_text(json.dumps(listed))
    return ["-e", "mesh_nodes_source=file", "-e", "mesh_nodes_file=%s" % path]


def hosts_with(lab, hosts):
    """The arguments that add variables of hosts to the inventory."""
    path = lab.state / "more.yml"
    path.write_text(json.dumps({"all": {"hosts": hosts}}))
    return ["-e", "mesh_nodes_source=inventory", "-i", str(path)]


def behind(lab, node):
    """{peer: its allowed IPs without the probe address} of a node."""
    return {row["name"]: [text for text in row["addresses"] if not text.startswith("fe80:")] for row in infos(lab)[node]["peers"]}


# A prefix and an address of two nodes each, beside those that they have.
MOVING = [("10.245.7.0/24", "198.18.0.207"), ("10.245.8.0/24", "198.18.0.208")]


def test_reconcile_where_nothing_changed(lab):
    with Watched(lab):
        run = playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory")
    assert set(run.changed().values()) == {0}


def test_prefixes_and_addresses_come_and_are_swapped_and_go(lab):
    """What two nodes have becomes the other's in one run, in both directions; all else is in use all the time."""
    before = sessions(lab, "node-1")

    def owned_by(owners):
        hosts = {node: {"mesh_pod_cidrs": [*lab.pod_cidrs(node).values()], "mesh_node_addresses": [*lab.node_addresses(node).values()]}
                 for node in lab.nodes}
        for owner, (cidr, address) in zip(owners, MOVING):
            hosts[owner]["mesh_pod_cidrs"].append(cidr)
            hosts[owner]["mesh_node_addresses"].append(address)
        return hosts_with(lab, hosts)

    with Watched(lab):
        for owners in (["node-2", "node-3"], ["node-3", "node-2"], []):
            playbook(lab, "reconcile", *owned_by(owners))
            found = behind(lab, "node-1")
            for number, (cidr, address) in enumerate(MOVING):
                for text in (cidr, address + "/32"):
                    assert [peer for peer in found if text in found[peer]] == owners[number: number + 1], (text, found)
    assert go_on(before, sessions(lab, "node-1"))


def test_mixed_up_hosts_are_refused(lab):
    """The inventory names the machine of one node as the other's: seen by its key, whatever is run, and before anything is changed."""
    before = {node: traces(lab, node) for node in lab.nodes}
    address = {node: next(iter(lab.node_addresses(node).values())) for node in lab.nodes}
    mixed = hosts_with(lab, {"node-2": {"ansible_host": address["node-3"]}, "node-3": {"ansible_host": address["node-2"]}})
    with Watched(lab):
        for name, more in (("reconcile", []), ("rotate_keys", []), ("enable", ["-e", "mesh_preflight=false"]),
                           ("reconcile", ["--limit", "node-1,node-2"])):
            run = playbook(lab, name, *mixed, *more, rc=2)
            for word in ("hosts node-2 and node-3 are mixed up", "ansible_host", "nothing was changed"):
                assert word in run.text, (name, word, run.text[-3000:])
    assert [line for node in lab.nodes for line in differences(before[node], traces(lab, node))] == []


def test_a_pod_cidr_that_pods_still_live_in_is_kept(lab):
    """Another pod CIDR of a node, while its pods have the addresses that they had; and a family of which it is to have none any more."""
    before = {node: traces(lab, node) for node in lab.nodes}
    cidrs = lab.pod_cidrs("node-3")
    with Watched(lab):
        for given, taken in (({"ipv4": "10.244.33.0/24", "ipv6": cidrs["ipv6"]}, cidrs["ipv4"]), ({"ipv4": cidrs["ipv4"]}, cidrs["ipv6"])):
            run = playbook(lab, "reconcile", *hosts_with(lab, {"node-3": {"mesh_pod_cidrs": list(given.values())}}), rc=2)
            for word in ("node-3", "the CNI gives pods of this node addresses that are not in its pod CIDRs", taken.split("/")[0][:-1],
                         "nothing was changed"):
                assert word in run.text, (word, run.text[-3000:])
    assert [line for node in lab.nodes for line in differences(before[node], traces(lab, node))] == []


def keys(lab):
    """{node: names of the key files}"""
    return {node: text_of(lab, node, "ls /etc/wireguard | grep key$ || true").split() for node in lab.nodes}


@pytest.mark.parametrize("generation", [1, 0])
def test_rotation_twice_in_a_row(lab, generation):
    before = {node: found["device"]["public_key"] for node, found in infos(lab).items()}
    with Watched(lab):
        playbook(lab, "rotate_keys", "-e", "mesh_nodes_source=inventory")
    after = infos(lab)
    assert {found["device"]["name"] for found in after.values()} == {"wgmesh%d" % generation}
    assert not set(before.values()) & {found["device"]["public_key"] for found in after.values()}
    assert keys(lab) == {node: ["wgmesh%d.key" % generation] for node in lab.nodes}
    assert all_encrypted(after)
    assert_encrypted(lab)
    run = playbook(lab, "enable", preflight=False)
    assert set(run.changed().values()) == {0}


def test_a_rotation_is_taken_back(lab):
    """The controller dies while a rotation is under way; the keys from before are used again, and the new ones are gone."""
    before = {node: found["device"]["public_key"] for node, found in infos(lab).items()}
    with Watched(lab):
        process = lab.start_ansible_playbook(
            ["kubemesh.wireguard.rotate_keys", "-e", "mesh_nodes_source=inventory", "-e", "mesh_preflight=false"])
        try:
            # The first node sends through the second device.
            deadline = time.monotonic() + 90
            while "wgmesh1" not in text_of(lab, "node-1", "ip route show table 51840"):
                assert time.monotonic() < deadline, "no node comes to send through the new device"
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        playbook(lab, "rotate_keys", "-e", "mesh_nodes_source=inventory", "-e", "mesh_rotate_back=true", "-e", "mesh_preflight=false")
    found = infos(lab)
    assert {node: info["device"]["public_key"] for node, info in found.items()} == before
    assert {info["device"]["name"] for info in found.values()} == {"wgmesh0"}
    assert keys(lab) == {node: ["wgmesh0.key"] for node in lab.nodes}
    assert all_encrypted(infos(lab))


def test_a_damaged_key_is_replaced_by_a_rotation(lab):
    """The key file in use is damaged: nothing overwrites it, the mesh goes on, and a rotation is the way out that the error names."""
    text_of(lab, "node-2", "echo damaged > /etc/wireguard/wgmesh0.key")
    run = playbook(lab, "enable", preflight=False, rc=2)
    assert "/etc/wireguard/wgmesh0.key" in run.text and "rotate_keys" in run.text
    with Watched(lab):
        playbook(lab, "rotate_keys", "-e", "mesh_nodes_source=inventory")
    assert all_encrypted(infos(lab))
    assert keys(lab) == {node: ["wgmesh1.key"] for node in lab.nodes}


def preshared(lab, device):
    """{node: the preshared keys of its device}, to be compared and never shown."""
    return {node: set(text_of(lab, node, "wg show %s preshared-keys | cut -f2" % device).split()) for node in lab.nodes}


def test_preshared_keys_come_and_change_and_go(lab):
    """Each pair has its own, both ends the same; each time by a rotation, so that a handshake proves them."""
    seen, generation = set(), int(infos(lab)["node-1"]["device"]["name"][-1])
    for secret in ("0123456789abcdefghijklmnopqrstuvwxyz", "zyxwvutsrqponmlkjihgfedcba9876543210", None):
        path = lab.state / "secret.json"
        path.write_text(json.dumps({"mesh_psk_secret": secret} if secret else {}))
        with Watched(lab):
            run = playbook(lab, "enable", "-e", "@%s" % path, preflight=False)
        assert ("Preshared keys are in use now and will not be" in run.text) == (secret is None)
        generation = 1 - generation
        found = preshared(lab, "wgmesh%d" % generation)
        if secret is None:
            assert set.union(*found.values()) == {"(none)"}
            break
        pairs = set.union(*found.values())
        assert "(none)" not in pairs and len(pairs) == 3 and not pairs & seen
        assert all(len(found[one] & found[other]) == 1 for one in found for other in found if one != other)
        seen |= pairs
        run = playbook(lab, "enable", "-e", "@%s" % path, preflight=False)
        assert set(run.changed().values()) == {0}
        run = playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory", rc=2)
        assert "mesh_psk_secret" in run.text
    assert all_encrypted(infos(lab))
    assert keys(lab) == {node: ["wgmesh%d.key" % generation] for node in lab.nodes}
    assert "psk" not in text_of(lab, "node-1", "ls /etc/wireguard /etc/kubemesh; cat /etc/wireguard/*.conf")


def test_host_encryption_on_and_off(lab):
    assert wire(lab, kinds=("host-host",))["clear_frames"] > 0
    with Watched(lab):
        playbook(lab, "enable", "-e", "mesh_encrypt=nodes", preflight=False)
    assert {found["encrypts"] for found in infos(lab).values()} == {"nodes"}
    assert_encrypted(lab, kinds=("pod-pod", "host-pod", "pod-host", "host-host"))
    run = playbook(lab, "enable", "-e", "mesh_encrypt=nodes", preflight=False)
    assert set(run.changed().values()) == {0}
    with Watched(lab):
        playbook(lab, "enable", preflight=False)
    assert {found["encrypts"] for found in infos(lab).values()} == {"pods"}
    assert wire(lab, kinds=("host-host",))["clear_frames"] > 0


# Breaks the way of the controller as soon as the node sends node to node, and gives it back when it does not.
LOCK_OUT = """
while sleep 0.05; do
    if ip rule | grep -q '^402:'; then
        ip rule | grep -q '^50:' || ip rule add pref 50 to 198.18.0.2 unreachable
    else
        ip rule | grep -q '^50:' && ip rule del pref 50
    fi
done
"""


def test_who_is_locked_out_is_let_in_again(lab):
    """The switch breaks the way by which the node is administered: the node takes it back, the run says so, and goes no further."""
    lab.exec("node-1", ["systemd-run", "--unit=lock-out", "sh", "-c", LOCK_OUT])
    try:
        # Connections from the controller to the NodePort go the way that is broken.
        with Watched(lab, streams=False):
            run = playbook(lab, "enable", "-e", "mesh_encrypt=nodes", "-e", "mesh_confirm_timeout=8", preflight=False, rc=2)
    finally:
        lab.exec("node-1", ["sh", "-c", "systemctl stop lock-out; ip rule del pref 50 2>/dev/null || true"])
    assert "took its rules back" in run.text and "0 of 3 nodes done" in run.text and "sends as it did before this run" in run.text
    assert {found["encrypts"] for found in infos(lab).values()} == {"pods"}
    assert all_encrypted(infos(lab))
    assert text_of(lab, "node-1", "cat /etc/kubemesh/rules-ipv4.batch").count("priority 402") == 0
    run = playbook(lab, "enable", preflight=False)
    assert set(run.changed().values()) == {0}


def test_a_node_that_joins_disturbs_nobody(lab):
    before = sessions(lab, "node-1")
    with Watched(lab):
        lab.add_node()
        playbook(lab, "reconcile", "-e", "mesh_nodes_source=inventory")
    assert go_on(before, sessions(lab, "node-1"))
    assert all_encrypted(infos(lab))
    assert_encrypted(lab)


def test_a_node_that_left_is_forgotten_by_all_others(lab):
    before = sessions(lab, "node-1")
    gone = infos(lab)["node-4"]["device"]["public_key"]
    lab.cut("node-4")

    def change(nodes, items):
        items.remove(nodes["node-4"])

    here = [node for node in lab.nodes if node != "node-4"]
    flows = [flow for flow in Watched.all_flows(lab) if "node-4" not in flow["source"] + flow["target"]]
    with Watched(lab, flows=flows, streams=False):
        playbook(lab, "reconcile", *node_list(lab, change), "--limit", ",".join(here))
    after = sessions(lab, "node-1")
    assert gone not in after and go_on({key: value for key, value in before.items() if key != gone}, after)
    lab.heal("node-4")
    # The same name, a new key: as if it had been installed anew.
    text_of(lab, "node-4", INSTALLED_ANEW)
    with Watched(lab, flows=flows, streams=False):
        playbook(lab, "reconcile", *node_list(lab, lambda nodes, items: None))
    assert infos(lab)["node-4"]["device"]["public_key"] != gone
    assert all_encrypted(infos(lab))
