# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules keypair, interface, probe and routes on nodes with the kernel's WireGuard."""
from __future__ import annotations

import json

import cluster

from cases import netlink


def name_of(node):
    return node.node_name


def prepared(lab):
    """Keys and the document on every node; the document."""
    document = lab.document({"0": lab.make_keys()})
    lab.distribute(document)
    return document


def accepted(lab):
    document = prepared(lab)
    lab.modules("interface", node=name_of, persistence="none")
    return document


def link(node, name="wgmesh0"):
    found = json.loads(node.sh("ip", "-j", "-d", "addr", "show", "dev", name, check=False) or "[]")
    return found[0] if found else None


def addresses(node, name="wgmesh0"):
    return sorted("%s/%d" % (item["local"], item["prefixlen"]) for item in link(node, name)["addr_info"])


def case_interface_from_nothing_to_nothing(env):
    with cluster.Cluster(nodes=2) as lab:
        document = prepared(lab)
        before = {node.node_name: node.sh("ip", "-o", "addr") + node.sh("sysctl", "-ar", "rp_filter") for node in lab.nodes}

        predicted = lab.modules("interface", check_mode=True, diff=True, node=name_of, persistence="none")
        assert all(result["changed"] for result in predicted.values())
        assert all(link(node) is None for node in lab.nodes), "check mode made a device"
        done = lab.modules("interface", diff=True, node=name_of, persistence="none")
        for name, result in done.items():
            assert result["implementation"] == "kernel" and result["peer_count"] == 1
            assert result["steps"] == predicted[name]["steps"], (result["steps"], predicted[name]["steps"])
            assert result["diff"] == predicted[name]["diff"], "check mode foretold something else"
        for node in lab.nodes:
            found = link(node)
            assert found["linkinfo"]["info_kind"] == "wireguard" and "UP" in found["flags"] and found["mtu"] == 1420, found
            probe = document["nodes"][node.node_name]["probe_addresses"]["0"]
            # also that no automatic link-local address is there: it would become the source of probes
            assert addresses(node) == sorted([node.addresses["ipv4"] + "/32", node.addresses["ipv6"] + "/128", probe + "/64"])
            for device in ("wgmesh0", "eth0"):
                assert node.sh("sysctl", "-n", "net.ipv4.conf.%s.rp_filter" % device).strip() == "2"
            # routes are not the business of this module: what goes to peers still goes the way of the CNI
            assert "wgmesh0" not in node.sh("ip", "route", "get", "10.244.%d.10" % (3 - node.number))

        again = lab.modules("interface", diff=True, node=name_of, persistence="none")
        assert not any(result["changed"] for result in again.values()), again
        assert not any(entry["before"] != entry["after"] for result in again.values() for entry in result["diff"])

        gone = lab.modules("interface", state="absent")
        assert all(result["changed"] for result in gone.values())
        assert not any(result["changed"] for result in lab.modules("interface", state="absent").values())
        after = {node.node_name: node.sh("ip", "-o", "addr") + node.sh("sysctl", "-ar", "rp_filter") for node in lab.nodes}
        assert before == after, "something was left behind: %s" % after
        assert all(node.read("/etc/wireguard/wgmesh0.key") for node in lab.nodes), "the key belongs to the module keypair"


def case_interface_repairs_drift_and_keeps_sessions(env):
    with cluster.Cluster(nodes=3) as lab:
        document = accepted(lab)
        a, b, dummy = lab.nodes
        lab.module(a, "probe", node="worker-1", require="all")
        keys = {name: entry["public_keys"]["0"] for name, entry in document["nodes"].items()}
        session = a.call(lambda: netlink.client().read("wgmesh0"))["peers"][keys["worker-2"]]["last_handshake"]
        assert session > 0

        def drift(changes, seen):
            for change in changes:
                a.sh(*change.split())
            foretold = lab.module(a, "interface", check_mode=True, node="worker-1", persistence="none")
            result = lab.module(a, "interface", node="worker-1", persistence="none")
            assert foretold["steps"] == result["steps"]
            text = "\n".join(result["steps"])
            assert result["changed"] and all(word in text for word in seen), "%s was not seen: %s" % (seen, text)
            assert not lab.module(a, "interface", node="worker-1", persistence="none")["changed"], changes

        # a stranger took a prefix of a peer; the peers that are not concerned keep their sessions
        thief = netlink.key("thief")
        drift(["wg set wgmesh0 peer %s allowed-ips 10.244.2.0/24" % thief, "wg set wgmesh0 peer %s remove" % keys["worker-3"],
               "ip link set wgmesh0 mtu 1300", "ip addr del %s/32 dev wgmesh0" % a.addresses["ipv4"],
               "ip addr add 192.0.2.9/32 dev wgmesh0", "sysctl -q -w net.ipv4.conf.eth0.rp_filter=1"],
              [thief, "peer worker-2: add allowed IPs 10.244.2.0/24", "peer worker-3: add", "1420", a.addresses["ipv4"], "192.0.2.9",
               "rp_filter"])
        drift(["wg set wgmesh0 listen-port 51999 fwmark 0"], ["port", "mark"])
        after = a.call(lambda: netlink.client().read("wgmesh0"))["peers"][keys["worker-2"]]["last_handshake"]
        assert after == session, "a repair reset the session of a peer that was not concerned"

        drift(["ip link set wgmesh0 down"], ["up"])
        drift(["ip link del wgmesh0"], ["create", "peer worker-2: add", "peer worker-3: add"])
        # Here b alone asks, with a session that a has forgotten: WireGuard begins another one after 15 s without an answer (whitepaper,
        # section 6.5, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT), which is just when a probe gives up by default.
        lab.module(b, "probe", node="worker-2", require="all", peers=["worker-1"], timeout=30)
        a.sh("ip", "link", "del", "wgmesh0")
        a.sh("ip", "link", "add", "wgmesh0", "type", "dummy")
        result = lab.module(a, "interface", node="worker-1", persistence="none", allow_failure=True)
        assert result.get("failed") and "dummy" in result["msg"], result
        assert link(a)["linkinfo"]["info_kind"] == "dummy", "a device of somebody else was touched"


def case_probe_proves_and_says_what_is_wrong(env):
    with cluster.Cluster(nodes=3) as lab:
        document = accepted(lab)
        results = lab.modules("probe", node=name_of, return_peers=True)
        for result in results.values():
            assert result["proven_count"] == 2 and not result["changed"], result["msg"]
            assert all(peer["size"] == 1420 for peer in result["peers"].values()), result["peers"]
        a = lab.nodes[0]
        # the outer packets of one peer go nowhere: a firewall
        a.sh("nft", "add table inet block; add chain inet block out { type filter hook output priority 0; }; "
                    "add rule inet block out ip daddr 198.18.0.12 udp dport 51840 drop")
        key = document["nodes"]["worker-2"]["public_keys"]["0"]
        a.sh("wg", "set", "wgmesh0", "peer", key, "remove")
        lab.module(a, "interface", node="worker-1", persistence="none")
        result = lab.module(a, "probe", node="worker-1", timeout=8, return_peers=True)
        env.note(message=result["msg"])
        assert result["proven_count"] == 1 and result["unproven"][0]["name"] == "worker-2", result
        assert result["peers"]["worker-3"]["proven"]
        a.sh("nft", "delete table inet block")
        # a path that does not carry full packets
        lab.wire.sh("ip", "link", "set", "n2", "mtu", "1400")
        lab.node("worker-2").sh("ip", "link", "set", "eth0", "mtu", "1400")
        result = lab.module(a, "probe", node="worker-1", timeout=12, return_peers=True)
        env.note(small=result["msg"])
        assert [item["name"] for item in result["unproven"]] == ["worker-2"], result["msg"]
        assert 1280 <= result["peers"]["worker-2"]["size"] < 1420, result["peers"]["worker-2"]


def case_routes_are_filled_switched_and_removed(env):
    with cluster.Cluster(nodes=3) as lab:
        accepted(lab)
        a = lab.nodes[0]
        result = lab.module(a, "routes", node="worker-1", persist=False, allow_failure=True)
        assert result.get("failed") and "proof" in result["msg"], result
        lab.modules("probe", node=name_of, require="all")
        before = a.sh("ip", "rule") + a.sh("ip", "-6", "rule") + a.sh("ip", "route") + a.sh("ip", "-6", "route")

        foretold = lab.module(a, "routes", node="worker-1", persist=False, check_mode=True, diff=True)
        filled = lab.module(a, "routes", node="worker-1", persist=False, diff=True)
        assert foretold["steps"] == filled["steps"] and foretold["diff"] == filled["diff"]
        assert filled["changed"] and not filled["sending"] and filled["routed_peers"] == 2
        assert before == a.sh("ip", "rule") + a.sh("ip", "-6", "rule") + a.sh("ip", "route") + a.sh("ip", "-6", "route")
        assert "wgmesh0" not in a.sh("ip", "route", "get", "10.244.2.10")
        assert not lab.module(a, "routes", node="worker-1", persist=False)["changed"]

        sending = lab.module(a, "routes", node="worker-1", persist=False, send=True)
        assert sending["changed"] and sending["sending"]
        for target, device in (("10.244.2.10", "wgmesh0"), ("fd00:10:244:3::a", "wgmesh0"), ("10.244.1.10", "cni0"),
                               (lab.nodes[1].addresses["ipv4"], "eth0")):
            assert "dev %s" % device in a.sh("ip", "route", "get", target), a.sh("ip", "route", "get", target)
        # the answers of host-network pods go back through the tunnel
        assert "dev wgmesh0" in a.sh("ip", "route", "get", lab.nodes[1].addresses["ipv4"], "from", "10.244.1.10", "iif", "cni0")
        assert not lab.module(a, "routes", node="worker-1", persist=False, send=True)["changed"]

        host = lab.module(a, "routes", node="worker-1", persist=False, send=True, encrypt="nodes")
        assert host["changed"] and "dev wgmesh0" in a.sh("ip", "route", "get", lab.nodes[1].addresses["ipv4"])
        # WireGuard's own packets carry the mark, and must not be led into the tunnel
        assert "dev eth0" in a.sh("ip", "route", "get", lab.nodes[1].addresses["ipv4"], "mark", "0x1000")

        # others' routes and rules are not ours to touch, the same device or table name notwithstanding
        a.sh("ip", "rule", "add", "priority", "900", "from", "192.0.2.1", "lookup", "900")
        a.sh("ip", "route", "add", "192.0.2.0/24", "dev", "wgmesh0", "table", "900")
        # what somebody else deleted comes back
        a.sh("ip", "rule", "del", "priority", "400")
        a.sh("ip", "route", "flush", "table", "51840")
        repaired = lab.module(a, "routes", node="worker-1", persist=False, send=True, encrypt="nodes")
        assert repaired["changed"] and "dev wgmesh0" in a.sh("ip", "route", "get", "10.244.2.10")
        gone = lab.module(a, "routes", state="absent", persist=False)
        assert gone["changed"] and not gone["sending"]
        assert not lab.module(a, "routes", state="absent", persist=False)["changed"]
        assert "lookup 900" in a.sh("ip", "rule") and "wgmesh0" in a.sh("ip", "route", "show", "table", "900")
        a.sh("ip", "rule", "del", "priority", "900")
        a.sh("ip", "route", "flush", "table", "900")
        assert before == a.sh("ip", "rule") + a.sh("ip", "-6", "rule") + a.sh("ip", "route") + a.sh("ip", "-6", "route")
