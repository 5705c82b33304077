# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import TABLE_MAIN, Node, instead_of_the_kernel

TABLE = 51840
SOURCES = {"ipv4": "198.18.0.11", "ipv6": "2001:db8::b"}


def route(dst, table=TABLE, **other):
    family = "ipv6" if ":" in dst else "ipv4"
    return dict({"family": family, "table": table, "dst": dst, "dev": "wgmesh0", "type": "unicast", "src": SOURCES[family], "mtu": 0,
                 "peer": "b"}, **other)


def rule(priority, table=TABLE, source="", family="ipv4", not_fwmark=0, iif=""):
    return {"family": family, "priority": priority, "table": table, "from": source, "iif": iif, "not_fwmark": not_fwmark}


def nameless(state):
    return {"routes": [dict(item, peer="") for item in state["routes"]], "rules": state["rules"]}


@pytest.fixture
def node():
    """A node with its underlay, a mesh device and a bridge of pods."""
    it = Node()
    it.add_link("eth0", addresses=["198.18.0.11/24", "2001:db8::b/64"], default=True)
    it.add_link("wgmesh0", "wireguard", ["198.18.0.11/32", "2001:db8::b/128"])
    it.add_link("wgmesh1", "wireguard")
    it.add_link("cni0", "bridge", ["10.244.1.1/24", "fd00:1::1/64"])
    for family, dst, device in (("ipv4", "10.244.1.0/24", "cni0"), ("ipv6", "fd00:1::/64", "cni0"), ("ipv4", "0.0.0.0/0", "eth0"),
                                ("ipv6", "::/0", "eth0")):
        it.routes.setdefault((family, TABLE_MAIN), {})[dst] = route(dst, TABLE_MAIN, dev=device, src="")
    with instead_of_the_kernel(it):
        yield it


STATE = {
    "routes": sorted([route("10.244.2.0/24"), route("10.244.3.0/24", mtu=1380), route("fd00:2::/64"), route("198.18.0.12/32", TABLE + 1),
                      route("2001:db8::c/128", TABLE + 1)], key=plan.route_order),
    "rules": sorted([rule(400), rule(401, TABLE + 1, "10.244.1.0/24"), rule(400, family="ipv6"),
                     rule(401, TABLE + 1, "fd00:1::/64", "ipv6")], key=plan.rule_order)}
NOTHING = {"routes": [], "rules": []}


def bring(node, wanted):
    """Bring a node to a state as the module does, without what it does beside it."""
    system = System(node)
    with instead_of_the_kernel(node):
        live.apply_steps(system, plan.plan_routes(live.read_state(system, TABLE), wanted))
    return live.read_state(system, TABLE)


# --- reading and programming -------------------------------------------------------------------------------------------------------------

def test_a_node_without_mesh(node):
    assert live.read_state(System(node), TABLE) == NOTHING


def test_there_and_back(node):
    assert bring(node, STATE) == nameless(STATE)
    assert bring(node, STATE) == nameless(STATE)
    changes = len(node.changes)
    bring(node, STATE)
    assert len(node.changes) == changes, "nothing to be done"
    assert bring(node, NOTHING) == NOTHING


destinations = st.lists(st.sampled_from(["10.244.2.0/24", "10.244.3.0/24", "fd00:2::/64", "fd00:3::/64"]), unique=True)


@st.composite
def states(draw):
    routes = [route(dst, table, mtu=draw(st.sampled_from([0, 1380])), dev=draw(st.sampled_from(["wgmesh0", "wgmesh1"])))
              for table in (TABLE, TABLE + 1) for dst in draw(destinations)]
    rules = draw(st.lists(st.sampled_from([
        rule(400), rule(401, TABLE + 1, "10.244.1.0/24"), rule(402, TABLE + 1, not_fwmark=0x1000), rule(400, family="ipv6"),
        rule(401, TABLE + 1, "fd00:1::/64", "ipv6"), rule(402, TABLE + 1, family="ipv6", not_fwmark=0x1000)]), unique_by=plan.rule_order))
    return {"routes": sorted(routes, key=plan.route_order), "rules": sorted(rules, key=plan.rule_order)}


@settings(max_examples=50)
@given(states(), states())
def test_from_any_state_to_any_other(first, second):
    it = Node()
    it.add_link("wgmesh0", "wireguard", ["198.18.0.11/32", "2001:db8::b/128"])
    it.add_link("wgmesh1", "wireguard")
    assert bring(it, first) == nameless(first)
    del it.changes[:]
    assert bring(it, second) == nameless(second)
    verbs = [(change.split()[2], change.split()[3]) for change in it.changes]
    order = [("route", "replace"), ("rule", "add"), ("rule", "del"), ("route", "del")]
    assert [order.index(verb) for verb in verbs] == sorted(order.index(verb) for verb in verbs), "in the order of the plan"


def test_routes_of_a_family_go_in_one_process(node, monkeypatch):
    commands = []
    at_once = node.run_command

    def run_command(argv, data=None, environ_update=None):
        commands.append((" ".join(argv[1:]), data))
        return at_once(argv, data, environ_update)

    node.run_command = run_command
    messages = []
    monkeypatch.setattr(live, "change_rules", messages.append)
    live.apply_steps(System(node), plan.plan_routes(NOTHING, STATE))
    assert [command for command, dummy in commands] == ["-4 -batch -", "-6 -batch -", "-4 -batch -", "-6 -batch -"]
    assert len(commands[0][1].splitlines()) == 2
    assert messages == [[{"op": "add_rule", "rule": item} for item in STATE["rules"]]], "all rules are one message"


def test_rules_and_routes_of_others_are_not_ours(node):
    node.rules["ipv4"] += [
        {"priority": 10, "src": "10.9.0.0", "srclen": 16, "table": "51840", "iif": "eth0"},
        {"priority": 11, "src": "10.9.9.9", "srclen": 24, "table": "51840"},
        {"priority": 12, "src": "10.244.1.0", "srclen": 24, "not": None, "table": "51841"}, {"priority": 13, "src": "all", "table": "254"},
        {"priority": 14, "src": "all", "action": "6"}]
    before = list(node.rules["ipv4"])
    assert live.read_state(System(node), TABLE) == NOTHING
    assert bring(node, STATE) == nameless(STATE)
    bring(node, NOTHING)
    assert node.rules["ipv4"] == before
    assert node.routes[("ipv4", TABLE_MAIN)]


def test_a_route_that_is_in_the_table_and_not_ours_goes(node):
    bring(node, STATE)
    node.routes[("ipv4", TABLE)]["10.99.0.0/16"] = route("10.99.0.0/16", dev="eth0", src="")
    assert bring(node, STATE) == nameless(STATE)


def test_a_kernel_without_ipv6(node):
    at_once = node.run_command

    def run_command(argv, data=None, environ_update=None):
        if "-6" in argv:
            return 2, "", "RTNETLINK answers: Operation not supported\nDump terminated\n" if "rule" in argv else "table does not exist"
        return at_once(argv, data, environ_update)

    node.run_command = run_command
    assert live.read_state(System(node), TABLE) == NOTHING


def test_an_error_of_ip_is_told(node):
    del node.links["wgmesh0"]
    with pytest.raises(MeshError, match='ip -4 -batch - failed with code 2: Cannot find device "wgmesh0"'):
        bring(node, STATE)
    assert node.rules == {"ipv4": [], "ipv6": []}, "no rule points to a table that is not complete"


def test_stored_routes(tmp_path, monkeypatch):
    paths = {family: str(tmp_path / family) for family in ("ipv4", "ipv6")}
    monkeypatch.setattr(live, "ROUTES_FILES", paths)
    assert live.stored_routes() == []
    for family, path in paths.items():
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(plan.batch_text(STATE, family))
    assert sorted(live.stored_routes(), key=plan.route_order) == STATE["routes"]


# --- which way the kernel takes ----------------------------------------------------------------------------------------------------------

CIDRS = ["10.244.1.0/24", "fd00:1::/64"]


def test_the_right_way(node):
    bring(node, STATE)
    assert live.wrong_paths(System(node), STATE, CIDRS) == []


def test_a_rule_that_comes_first(node):
    """More specific routes elsewhere keep traffic in clear while every handshake looks fine (rke2 #9338)."""
    bring(node, STATE)
    node.rules["ipv4"].insert(0, {"priority": 5, "src": "all", "table": "100"})
    node.routes[("ipv4", 100)] = {"10.244.2.0/25": route("10.244.2.0/25", 100, dev="eth0", src="")}
    assert live.wrong_paths(System(node), STATE, CIDRS) == [
        "10.244.2.0/24 by eth0 (from this host)", "10.244.2.0/24 by eth0 (from pods in 10.244.1.0/24)"]


def test_a_rule_that_comes_first_for_pods_only(node):
    bring(node, STATE)
    node.rules["ipv6"].insert(0, {"priority": 5, "src": "fd00:1::", "srclen": 64, "table": "100"})
    node.routes[("ipv6", 100)] = {"fd00:2::/64": route("fd00:2::/64", 100, dev="eth0", src="")}
    assert live.wrong_paths(System(node), STATE, CIDRS) == ["fd00:2::/64 by eth0 (from pods in fd00:1::/64)"]


def test_node_addresses_are_looked_up_as_well(node):
    """A foreign rule for the nodes' network would keep what pods send to nodes in clear."""
    state = dict(STATE, routes=STATE["routes"] + [route("198.18.0.12/32", TABLE + 1)])
    bring(node, state)
    node.rules["ipv4"].insert(0, {"priority": 5, "src": "all", "table": "100"})
    node.routes[("ipv4", 100)] = {"198.18.0.0/24": route("198.18.0.0/24", 100, dev="eth0", src="")}
    found = live.wrong_paths(System(node), state, CIDRS)
    assert found == ["198.18.0.12/32 by eth0 (from pods in 10.244.1.0/24)"], "from the host it is not steered"


def test_a_route_that_stays_on_the_other_device(node):
    """While keys are rotated, a peer that is not proven on the new device is reached through the old one."""
    node.add_link("wgmesh1", "wireguard", ["198.18.0.11/32"])
    state = dict(STATE, routes=[dict(item, dev="wgmesh1") if item["dst"] == "10.244.2.0/24" else item for item in STATE["routes"]])
    bring(node, state)
    assert live.wrong_paths(System(node), state, CIDRS) == []
    assert live.wrong_paths(System(node), STATE, CIDRS) == [
        "10.244.2.0/24 by wgmesh1 (from this host)", "10.244.2.0/24 by wgmesh1 (from pods in 10.244.1.0/24)"]


def test_no_way_at_all(node):
    bring(node, STATE)
    node.routes[("ipv4", TABLE)]["10.244.2.0/24"]["dev"] = ""
    assert "10.244.2.0/24 by no route (from this host)" in live.wrong_paths(System(node), STATE, [])


def test_nothing_is_asked_for_what_is_not_steered(node):
    bring(node, STATE)
    only_v6 = dict(STATE, rules=[item for item in STATE["rules"] if item["family"] == "ipv6"])
    node.rules["ipv4"] = []
    assert live.wrong_paths(System(node), only_v6, CIDRS) == []
    assert live.wrong_paths(System(node), dict(STATE, routes=[]), CIDRS) == []


def test_a_node_whose_pods_have_no_device_yet(node):
    """Their addresses lead out of the node, so nothing can be asked for them."""
    bring(node, STATE)
    del node.routes[("ipv4", TABLE_MAIN)]["10.244.1.0/24"]
    node.links["cni0"]["addresses"] = []
    assert live.local_device(System(node), "10.244.1.9") is None
    assert live.wrong_paths(System(node), STATE, CIDRS) == []
    assert live.local_device(System(node), "fd00:1::9") == "cni0"


def test_an_address_of_the_node_itself_is_no_pod(node):
    node.links["cni0"]["addresses"].append("10.244.1.9/32")
    assert live.local_device(System(node), "10.244.1.9") is None


def test_a_device_that_went_away(node):
    assert live.has_default_route(System(node), "ipv4", "eth0") and not live.has_default_route(System(node), "ipv4", "cni0")
    assert not live.has_default_route(System(node), "ipv4", "gone0")


# --- files -------------------------------------------------------------------------------------------------------------------------------

def test_files_of_a_state():
    wanted = live.wanted_files(STATE, "wgmesh0", "/etc/sysctl.d/x.conf")
    assert {path: mode for path, (dummy, mode) in wanted.items()} == {
        live.ROUTES_UNIT_FILE: 0o644, live.RESTORE_SCRIPT: 0o755, live.ROUTES_FILES["ipv4"]: 0o644, live.ROUTES_FILES["ipv6"]: 0o644,
        live.RULES_FILES["ipv4"]: 0o644, live.RULES_FILES["ipv6"]: 0o644}
    assert all(text for text, dummy in wanted.values())
    gone = live.wanted_files(NOTHING, "wgmesh0", "/etc/sysctl.d/x.conf")
    assert set(gone) == set(wanted) and all(text is None for text, dummy in gone.values())


def test_files_name_every_device_that_may_come_first():
    text = live.unit_text("wgmesh1")
    for unit in ("wg-quick@wgmesh1.service", "kubemesh-device@wgmesh1.service", "systemd-networkd.service"):
        assert unit in next(line for line in text.splitlines() if line.startswith("After="))


class Boot:
    """Runs the script of the boot with an `ip` that writes down how it is called."""

    def __init__(self, folder):
        self.folder = folder
        self.log = folder / "log"
        self.addresses = ["198.18.0.11/32", "2001:db8::b/128", "fe80::1/64"]
        self.failing = ""
        self.failed_units = False
        self.state = STATE

    def run(self, tries=3):
        tools = self.folder / "bin"
        tools.mkdir(exist_ok=True)
        shown = "".join("4: wgmesh0    inet %s scope global wgmesh0\\n" % text for text in self.addresses)
        lines = ["#!/bin/sh", 'echo "ip $*" >> %s' % self.log, 'case "$*" in',
                 '"-o addr show dev wgmesh0 up") %s ;;' % ("printf '%s'" % shown if shown else "exit 1"),
                 '%s) exit 1 ;;' % (self.failing or "nothing"), "esac"]
        sysctl = ["#!/bin/sh", 'echo "sysctl $*" >> %s' % self.log]
        systemctl = ["#!/bin/sh", 'echo "systemctl $*" >> %s' % (self.folder / "systemctl"), "exit %d" % (0 if self.failed_units else 1)]
        for name, content in (("ip", lines), ("sysctl", sysctl), ("sleep", ["#!/bin/sh"]), ("systemctl", systemctl)):
            (tools / name).write_text("\n".join(content) + "\n")
            (tools / name).chmod(0o755)
        text = live.script_text(self.state, "wgmesh0", "/etc/sysctl.d/x.conf").replace("tries=600", "tries=%d" % tries)
        text = text.replace("/usr/lib/systemd/systemd-sysctl", str(tools / "sysctl")).replace("/lib/systemd/systemd-sysctl", "/none")
        path = "%s:%s" % (tools, os.environ["PATH"])
        done = subprocess.run(["sh", "-c", text], env={"PATH": path}, capture_output=True, text=True, check=False)
        log = self.log.read_text().splitlines() if self.log.exists() else []
        return done, [line for line in log if "addr show" not in line]


@pytest.fixture
def boot(tmp_path):
    return Boot(tmp_path)


ROUTES = ["ip -4 -batch /etc/kubemesh/routes-ipv4.batch", "ip -6 -batch /etc/kubemesh/routes-ipv6.batch"]
RULES = ["ip -force -4 -batch /etc/kubemesh/rules-ipv4.batch", "ip -force -6 -batch /etc/kubemesh/rules-ipv6.batch"]


def test_boot(boot):
    done, log = boot.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert log == ["sysctl /etc/sysctl.d/x.conf"] + ROUTES + RULES


@pytest.mark.parametrize("addresses", [[], ["198.18.0.11/32"], ["198.18.0.1/32", "2001:db8::b/128"], ["198.18.0.110/32", "2001:db8::b/128"],
                                       ["198.18.0.11/32", "2001:db8::bb/128"]])
def test_boot_waits_for_the_device_and_its_addresses(boot, addresses):
    """Nothing is set where they do not come, and it says so."""
    boot.addresses = addresses
    done, log = boot.run()
    assert done.returncode == 1 and log == []
    assert "wgmesh0 is not up with 198.18.0.11 2001:db8::b" in done.stderr
    assert boot.log.read_text().count("addr show") == 3


def test_boot_does_not_wait_for_a_device_whose_unit_failed(boot):
    boot.addresses, boot.failed_units = [], True
    done, log = boot.run(tries=100)
    assert done.returncode == 1 and log == [] and "wgmesh0 is not up" in done.stderr
    assert boot.log.read_text().count("addr show") == 2
    assert (boot.folder / "systemctl").read_text() == (
        "systemctl is-failed --quiet wg-quick@wgmesh0.service kubemesh-device@wgmesh0.service kubemesh-userspace@wgmesh0.service\n")


def test_boot_with_a_device_that_is_there_although_a_unit_failed(boot):
    boot.failed_units = True
    done, log = boot.run()
    assert done.returncode == 0 and log[-2:] == RULES


def test_boot_without_source_addresses(boot):
    boot.state = {"routes": [route("10.244.2.0/24", src="")], "rules": [rule(400)]}
    boot.addresses = ["fe80::1/64"]
    done, log = boot.run()
    assert done.returncode == 0 and log[-1] == RULES[-1]


@pytest.mark.parametrize("place", [0, 1])
def test_boot_with_routes_that_fail_has_no_rules(boot, place):
    boot.failing = '"%s"' % ROUTES[place][3:]
    done, log = boot.run()
    assert done.returncode == 1 and log[1:] == ROUTES[:place + 1]


def test_boot_with_rules_that_are_there(boot):
    boot.failing = '"%s"' % RULES[0][3:]
    done, log = boot.run()
    assert done.returncode == 0 and log[-2:] == RULES
