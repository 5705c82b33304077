# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Reads and programs the mesh's routing tables and rules, by iproute2; decisions are in `_routes_plan`."""

from __future__ import annotations

import itertools
import os

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._conntrack import carry_over
from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import generations_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import FAMILIES, family_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._persist import POD_STARTERS
from ansible_collections.kubemesh.wireguard.plugins.module_utils._rules_netlink import change_rules
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import FAMILY_OPTION, read_text

ROUTES_UNIT = "kubemesh-routes.service"
ROUTES_UNIT_FILE = "/etc/systemd/system/" + ROUTES_UNIT
ROUTES_FILES = {"ipv4": "/etc/kubemesh/routes-ipv4.batch", "ipv6": "/etc/kubemesh/routes-ipv6.batch"}
RESTORE_SCRIPT = "/etc/kubemesh/restore-routes"
# What may make the device at boot; one that is not there is no obstacle.
DEVICE_UNITS = ("wg-quick@%s.service", "kubemesh-device@%s.service", "kubemesh-userspace@%s.service")
# Prefixes of local pods for which the way to every peer is asked: one rule serves them all, or each has one that was made alike.
POD_CIDRS_TRIED = 8
RULES_FILES = {"ipv4": "/etc/kubemesh/rules-ipv4.batch", "ipv6": "/etc/kubemesh/rules-ipv6.batch"}


def read_state(system, table):
    """Live state of tables ``table`` and ``table`` + 1 and of the rules that point to them; foreign rules are left out."""
    routes, rules = [], []
    for family in FAMILIES:
        for number in (table, table + 1):
            for item in system.ip_json(
                    [FAMILY_OPTION[family], "route", "show", "table", str(number)], missing=("table does not exist",)):
                routes.append(plan.route_from_ip(item, family, number))
        for item in system.ip_json([FAMILY_OPTION[family], "rule", "show"], missing=("not supported",)):
            rule = plan.rule_from_ip(item, family)
            if rule is not None and rule["table"] in (table, table + 1) and not rule.pop("foreign"):
                rules.append(rule)
    return {"routes": sorted(routes, key=plan.route_order), "rules": sorted(rules, key=plan.rule_order)}


def stored_routes():
    """The routes of the files that restore them at boot, with their peers' names."""
    routes = []
    for family, path in ROUTES_FILES.items():
        routes += plan.routes_of_batch(read_text(path) or "", family)
    return routes


def stored_rules(folder):
    """The rules of the files in a directory that restore them at boot: whether and what a node sends, as its last run left it."""
    rules = []
    for family, path in RULES_FILES.items():
        rules += plan.rules_of_batch(read_text(os.path.join(folder, os.path.basename(path))) or "", family)
    return rules


def stored_table():
    """The first table that the rules of the files that restore them at boot point to, None where there are none."""
    tables = set()
    for path in RULES_FILES.values():
        tables |= plan.tables_of_rules(read_text(path) or "")
    return min(tables) if tables else None


def apply_steps(system, steps):
    """Carry out steps in their order; runs of steps on routes of one family, or on rules, are one message or process each."""
    for what, run in itertools.groupby(steps, key=lambda step: step["route"]["family"] if "route" in step else ""):
        part = list(run)
        if not what:
            change_rules(part)
        else:
            system.ip_batch(what, [
                "route %s %s" % ("replace" if step["op"] == "replace_route" else "del", plan.route_text(step["route"])) for step in part])


def apply_live(system, current, wanted, steps):
    """Carry out the kernel's part. Returns the number of connections carried over.

    Routes in, then family by family the rules, then routes out. Connections are carried over as late as possible before their packets
    change devices, and those that came meanwhile once more after it.
    """
    moved = plan.moved_destinations(current, wanted)
    live_tables = bool(current["rules"]) and bool(wanted["rules"])
    parts = [([step for step in steps if step["op"] == "replace_route"], moved if live_tables else [])]
    for family in FAMILIES:
        rules = [step for step in steps if "rule" in step and step["rule"]["family"] == family]
        parts.append((rules, [cidr for cidr in moved if family_of(cidr) == family]))
    parts.append(([step for step in steps if step["op"] == "remove_route"], moved if live_tables else []))
    carried, done = 0, set()
    for part, moves in parts:
        if part and moves:
            carried += carry(system, moves, done, part)
        else:
            apply_steps(system, part)
    return carried


def carry(system, moved, done, steps):
    """Carry out steps that make the packets to some destinations change devices, and carry their connections over; -> the number of those.

    What could not be carried over loses a packet and may have to begin anew, and where the kernel has no detour for packets one may be
    lost that comes at the wrong moment: that is said.
    """
    result = carry_over(moved, done=done, switch=lambda: apply_steps(system, steps))
    if result["error"]:
        system.module.warn("masqueraded connections could not all be carried over to the other device (%d left): %s"
                           % (result["left"], result["error"]))
    elif result["exposed"] and not result["detoured"]:
        system.module.warn("this kernel cannot lead packets around connections that are carried over, having no connection tracking zones "
                           "or no nf_tables: of %d masqueraded connections other than TCP, a packet may have been lost" % result["exposed"])
    return result["replaced"]


def wrong_paths(system, state, pod_cidrs):
    """Prefixes that the kernel would not send as the tables say: texts such as "10.244.2.0/24 by eth0 (from pods in 10.244.1.0/24)".

    A handshake is no proof of the way that packets take (rke2 #9338: more specific routes elsewhere), the kernel's own lookup is. Each rule
    is tried by what it selects: everything from this host, or what comes from the pods of a prefix. A prefix may lead to either device
    while keys are rotated.
    """
    wrong = []
    for family in FAMILIES:
        rules = [rule for rule in state["rules"] if rule["family"] == family]
        routes = [route for route in state["routes"] if route["family"] == family and route["dev"]]
        for table in sorted({rule["table"] for rule in rules}):
            probes = plan.probes_of([route for route in state["routes"] if route["family"] == family and route["table"] == table],
                                    [cidr for cidr in pod_cidrs if plan.family_of(cidr) == family])
            targets = {route["dst"]: route["dev"] for route in routes if route["table"] == table and probes[route["dst"]]}
            sources = {rule["from"] for rule in rules if rule["table"] == table}
            if targets and "" in sources:
                lines = ["route get %s" % probes[target] for target in targets]
                wrong += wrong_answers(system, family, lines, targets, probes, "from this host")
            tried = 0
            for cidr in pod_cidrs:
                pod = probes.get(cidr)
                device = local_device(system, pod) if targets and pod and sources & {"", cidr} and tried < POD_CIDRS_TRIED else None
                # Without pods there is no device that their packets could come from.
                if device:
                    tried += 1
                    lines = ["route get %s from %s iif %s" % (probes[target], pod, device) for target in targets]
                    wrong += wrong_answers(system, family, lines, targets, probes, "from pods in %s" % cidr)
    return wrong


def wrong_answers(system, family, lines, targets, probes, whence):
    """The targets, {prefix: device}, for which ``ip route get`` names another device; ``probes``: {prefix: address that was asked for}."""
    answers = plan.devices_of_answers(system.ip_answers(family, lines))
    return [
        "%s by %s (%s)" % (target, answers.get(probes[target]) or "no route", whence)
        for target, device in targets.items() if answers.get(probes[target]) != device]


def local_device(system, address):
    """The device behind which a local pod address lies, None when that is not a device of this node's pods."""
    family = plan.family_of(address)
    answers = plan.devices_of_answers(system.ip_answers(family, ["route get %s" % address]))
    device = answers.get(address)
    return device if device and device != "lo" and not has_default_route(system, family, device) else None


def has_default_route(system, family, device):
    """Whether a device leads out of the node: a pod address that goes there has no pod device yet."""
    return bool(system.ip_json([FAMILY_OPTION[family], "route", "show", "default", "dev", device], missing=("Cannot find device",)))


def wanted_files(state, interface, sysctl_file):
    """Files that bring a state back at boot: {path: (text or None, mode)}; all absent for an empty state."""
    if not state["routes"] and not state["rules"]:
        paths = [ROUTES_UNIT_FILE, RESTORE_SCRIPT] + list(ROUTES_FILES.values()) + list(RULES_FILES.values())
        return dict.fromkeys(paths, (None, 420))
    wanted = {
        ROUTES_UNIT_FILE: (unit_text(interface), 0o644),
        RESTORE_SCRIPT: (script_text(state, interface, sysctl_file), 0o755),
    }
    for family in FAMILIES:
        wanted[ROUTES_FILES[family]] = (plan.batch_text(state, family), 0o644)
        wanted[RULES_FILES[family]] = (plan.rules_text(state, family), 0o644)
    return wanted


def unit_text(interface):
    """The unit that fills the tables and adds the rules at boot, after the device and before pods start."""
    return f"""\
# Written by kubemesh.wireguard. Changes made here are lost.
[Unit]
Description=Routes and rules of the WireGuard mesh
Documentation=man:ip-route(8) man:ip-rule(8)
After=network.target systemd-networkd.service {" ".join(device_units(generations_of(interface)))}
Before={POD_STARTERS}
ConditionPathExists={RESTORE_SCRIPT}

[Service]
Type=oneshot
RemainAfterExit=yes
# More than the script waits for the device.
TimeoutStartSec=150
ExecStart=/bin/sh {RESTORE_SCRIPT}
# Nothing on stop: the mesh outlives its manager.

[Install]
WantedBy=multi-user.target
"""


def device_units(devices):
    """Names of the units that may make the devices."""
    return [unit % device for device in devices for unit in DEVICE_UNITS]


def script_text(state, interface, sysctl_file):
    """What that unit runs.

    While keys are rotated, the peers that are not proven on the new device still have their routes through the old one: all devices that
    the routes name must be there. A device may be the work of wg-quick, of networkd or of our own unit: what counts is that it is up with
    the addresses that the routes name, so that is what is waited for. Rules come after routes: if the routes fail, no rule sends anything
    into an empty table.
    """
    sources = sorted({route["src"] for route in state["routes"] if route["src"]})
    devices = sorted({route["dev"] for route in state["routes"] if route["dev"]}) or [interface]
    return """\
#!/bin/sh
# Written by kubemesh.wireguard; run by {unit} at boot. Changes made here are lost.
set -eu

devices="{devices}"

device_ready() {{
    for device in $devices; do
        addresses=$(ip -o addr show dev "$device" up 2>/dev/null) || return 1
        [ -n "$addresses" ] || return 1
        for source in {sources}; do
            case "$addresses" in *" $source/"*) ;; *) return 1 ;; esac
        done
    done
}}

# What should make the device has failed: it will not come, and what starts pods waits for this unit.
device_failed() {{
    systemctl is-failed --quiet {units} && ! device_ready
}}

# 600 times 0.2 s: a device that takes longer will not come, and pods must not wait for ever.
tries=600
until device_ready; do
    tries=$((tries - 1))
    if [ "$tries" -le 0 ] || device_failed; then
        echo "$devices is not up with {sources}: no routes and no rules are set, traffic takes the way of the CNI" >&2
        exit 1
    fi
    sleep 0.2
done

for tool in /usr/lib/systemd/systemd-sysctl /lib/systemd/systemd-sysctl; do
    if [ -x "$tool" ]; then "$tool" {sysctl_file}; break; fi
done
ip -4 -batch {routes4}
ip -6 -batch {routes6}
# A rule that is there already, after a start by hand, is no failure.
ip -force -4 -batch {rules4} || true
ip -force -6 -batch {rules6} || true
""".format(
        unit=ROUTES_UNIT, devices=" ".join(devices), units=" ".join(device_units(devices)), sources=" ".join(sources),
        sysctl_file=sysctl_file, routes4=ROUTES_FILES["ipv4"], routes6=ROUTES_FILES["ipv6"],
        rules4=RULES_FILES["ipv4"], rules6=RULES_FILES["ipv6"])
