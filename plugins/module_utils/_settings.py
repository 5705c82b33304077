# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The settings of a mesh: what they may be, and that all hosts of a run have the same.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. A fault is one line of text that names variable, value and remedy.

*Settings* are those of one host: {variable of the role without its prefix ``mesh_``: value}. Secrets are none of them: in their place they
have ``psk_secret_fault``, what `_psk.secret_fault` found, and ``agent_token_fault``, of `_kube_api.token_fault`.
"""

from __future__ import annotations

import math
import re

from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_plan import grace_fault
from ansible_collections.kubemesh.wireguard.plugins.module_utils._confirm import check_timeout
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kube_api import server_parts
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown, some_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import check_settings, exempt_fault

# The number of the generation follows, and a device has at most 15 characters (IFNAMSIZ, include/uapi/linux/if.h). The name is part of
# file names and of names of units: what systemd or a shell would read otherwise is left out.
_STEM = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,13}")
_NUMBERS = ("table", "port", "rule_priority", "fwmark", "confirm_timeout", "lock_wait", "agent_grace")
# Their order says nothing.
_LISTS = ("exempt_cidrs", "exempt_nodes", "admin_ports")
# Says something where strict mode is on only.
_OF_STRICT_MODE = ("exempt_nodes", "admin_ports")
# Where foreign rules are in the way on one node, its own can differ: nobody else sees them. Nodes can reach the API at different addresses,
# and each waits for itself.
_OF_A_NODE = ("rule_priority", "agent_server", "agent_grace")
# Says how this run works, and nothing of it stays on a node.
_OF_A_RUN = ("confirm_timeout", "lock_wait", "probe_timeout", "psk_secret_fault", "agent_token_fault")
NAMED = 5


def stem_fault(stem):
    """What is wrong with ``mesh_interface``, or an empty text."""
    if isinstance(stem, str) and _STEM.fullmatch(stem):
        return ""
    return ("mesh_interface: %s is no stem of device names: a letter, then letters, digits, _ and -, 14 characters at most; wgmesh is the "
            "default" % shown(stem))


def normalized(settings):
    """The same settings with the types that modules would make of them: Ansible lets a list be text with commas, and a number text."""
    found = dict(settings)
    for name in _LISTS:
        if isinstance(found.get(name), str):
            found[name] = [item.strip() for item in found[name].split(",") if item.strip()]
    for name in _NUMBERS:
        if name in found:
            found[name] = int(found[name])
    if "probe_timeout" in found:
        found["probe_timeout"] = float(found["probe_timeout"])
    if "admin_ports" in found:
        found["admin_ports"] = [int(port) if isinstance(port, str) and port.isdigit() else port for port in found["admin_ports"] or ()]
    if "strict" in found:
        found["strict"] = str(found["strict"]).lower() in ("true", "yes", "on", "1")
    return found


def faults_of(settings):
    """Faults in the settings of one host, without regard to the others; settings that are missing are not looked at."""
    found = [stem_fault(settings["interface"])] if "interface" in settings else []
    # The next one is used during a rotation of keys.
    if not 1 <= settings.get("port", 1) <= 65534:
        found.append("mesh_port: %d is no UDP port with one after it; take a number from 1 to 65534" % settings["port"])
    if settings.get("lock_wait", 0) < 0:
        found.append("mesh_lock_wait: %d: it is a number of seconds, and 0 does not wait" % settings["lock_wait"])
    if "rule_priority" in settings:
        try:
            check_settings(dict(settings, exempt_cidrs=()))
        except MeshError as exc:
            found.append(str(exc))
    found += [exempt_fault(cidr) for cidr in settings.get("exempt_cidrs") or ()]
    for port in settings.get("admin_ports") or ():
        if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
            found.append("mesh_admin_ports: %s is no TCP port; take numbers from 1 to 65535" % shown(port))
    # 0 is no timer at all.
    if settings.get("confirm_timeout"):
        try:
            check_timeout(settings["confirm_timeout"])
        except MeshError as exc:
            found.append(str(exc))
    probe_timeout = settings.get("probe_timeout", 1)
    if not (math.isfinite(probe_timeout) and probe_timeout > 0):
        found.append("mesh_probe_timeout: %s: it is a number of seconds above 0; 15 is the default" % probe_timeout)
    if settings.get("agent_server"):
        try:
            usable = server_parts(settings["agent_server"]).scheme == "https"
        except MeshError:
            usable = False
        if not usable:
            found.append("mesh_agent_server: %s is not the address of an API server such as https://192.0.2.1:6443"
                         % shown(settings["agent_server"]))
    found += [grace_fault(settings.get("agent_grace", 0)), settings.get("agent_token_fault", ""), settings.get("psk_secret_fault", "")]
    return [fault for fault in found if fault]


def differences(settings):
    """Faults of settings that differ between hosts: {host: settings} -> lines.

    With another port, device or mark nodes do not find each other or take each other's packets apart; with another idea of what is
    encrypted or guarded one drops what the other sends; and what a mesh is called and where it has its routes must be known to whoever
    takes it away.
    """
    found, ignored = [], set(_OF_A_NODE + _OF_A_RUN)
    if not any(values.get("strict") for values in settings.values()):
        ignored |= set(_OF_STRICT_MODE)
    for name in sorted({name for values in settings.values() for name in values} - ignored):
        hosts = {}
        for host in sorted(settings):
            value = settings[host].get(name)
            value = sorted(value or [], key=str) if name in _LISTS else value
            hosts.setdefault(str(value), []).append(host)
        if len(hosts) > 1:
            # What few hosts have is most likely what is wrong.
            parts = ["%s on %s" % (value, some_of(names, NAMED)) for value, names in sorted(hosts.items(), key=lambda item: len(item[1]))]
            found.append("mesh_%s: %s; it must be the same on all hosts of a mesh: set it for the group, not for a host" % (
                name, ", ".join(parts[:NAMED])))
    return found


def settings_faults(settings):
    """All faults of the settings of the hosts of a run, {host: settings}, each text once."""
    found = []
    for host in sorted(settings):
        found += [fault for fault in faults_of(settings[host]) if fault not in found]
    return found + differences(settings)
