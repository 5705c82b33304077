# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Reads and programs the guard, by nft, and keeps it over a reboot; decisions are in `_guard_plan`."""

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import apply_file_step, read_text, remove_empty_folders

GUARD_FILE = "/etc/kubemesh/guard.nft"
GUARD_UNIT = "kubemesh-guard.service"
GUARD_UNIT_FILE = "/etc/systemd/system/" + GUARD_UNIT
NFTABLES_DROPIN = "/etc/systemd/system/nftables.service.d/kubemesh-guard.conf"
OWN_FOLDERS = ("/etc/kubemesh", "/etc/systemd/system/nftables.service.d")

# It says which traffic is spared: nothing that others have to read. Where the node agent is installed, the directory belongs to its group,
# and with it this file; else to root's.
MODE_GUARD = 0o640
MODE_PUBLIC = 0o644

# Lines of what nft says when it refuses something; behind the first few it draws the rest of the file.
ERROR_LINES = 3
LEFT_SHOWN = 10


# --- nft ---------------------------------------------------------------------------------------------------------------------------------

def nft_path(system):
    """Full path of nft; raises MeshError where it is missing."""
    path = system.path("nft")
    if path is None:
        raise MeshError("mesh_strict: nft is not installed on this node, and the guard is a table of nftables; install the package "
                        "nftables, or set mesh_strict to false")
    return path


def _said(out, err):
    lines = [line for line in (err or out).splitlines() if line.strip()]
    return "; ".join(line.strip() for line in lines[:ERROR_LINES]) or "no message"


def _parsed(out):
    """(table, what is wrong with it) of what nft printed: one of them."""
    try:
        return plan.table_from_nft(out), ""
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as exc:
        return None, "no JSON that can be read (%s: %s)" % (type(exc).__name__, exc)


def read_table(system):
    """The live table of the guard, None where there is none.

    One that nft cannot print is one that differs: nft 1.0.6 ends in the middle of a table that somebody made dormant.
    """
    nft_path(system)
    rc, out, err = system.try_run(["nft", "-j", "list", "table", "inet", plan.TABLE])
    if rc != 0 and not out.strip():
        if "No such file or directory" in err:
            return None
        raise MeshError("mesh_strict: the tables of nftables cannot be read (nft, code %d: %s); the guard needs root and a kernel with "
                        "nf_tables; without that set mesh_strict to false" % (rc, _said(out, err)))
    table, wrong = _parsed(out)
    return table or plan.unreadable_table("nft prints " + wrong)


def reference(system, text):
    """A ruleset the way that nft and kernel of this node print it: loaded in a network namespace that is gone afterwards.

    So a live table is compared with the answer of the same nft. It is also the proof that nft and kernel take the ruleset, before
    anything is changed. The traffic of the node is not in that namespace.
    """
    script = '"$0" -f - && exec "$0" -j list table inet "$1"'
    rc, out, err = system.try_run(["unshare", "--net", "sh", "-c", script, nft_path(system), plan.TABLE], data=text)
    if rc != 0:
        raise MeshError("mesh_strict: nft and the kernel of this node do not take the rules of the guard (code %d: %s); nftables 0.9.8 or "
                        "newer, a kernel with nf_tables for inet, and unshare of util-linux are needed; without them set mesh_strict to "
                        "false" % (rc, _said(out, err)))
    table, wrong = _parsed(out)
    if table is None:
        raise MeshError("mesh_strict: nft on this node prints %s; an nft that was built with JSON is needed, version 0.9.8 or newer"
                        % wrong)
    return table


def load(system, text):
    """Run one transaction: all of it or nothing."""
    rc, out, err = system.try_run(["nft", "-f", "-"], data=text)
    if rc != 0:
        raise MeshError("nft refused a change of table %s (code %d: %s); what was in force before still is"
                        % (plan.TABLE, rc, _said(out, err)))


def apply_steps(system, steps, wanted, wanted_table):
    """Carry out steps of `_guard_plan.plan_guard` as one transaction; -> the live table afterwards.

    Where nft refuses changes of single elements, or makes something else of them, the table is replaced as a whole: old versions see an
    overlap with what goes in the same transaction. The counters go on from where they are either way.
    """
    if steps and steps[0]["op"] == "remove_table":
        load(system, "table inet %s {}\ndelete table inet %s\n" % (plan.TABLE, plan.TABLE))
    elif steps and steps[0]["op"] == "change_elements":
        try:
            load(system, plan.elements_text(steps))
            changed = read_table(system)
            if not plan.plan_guard(changed, wanted_table):
                return changed
        except MeshError:
            pass
        replace(system, wanted)
    elif steps:
        replace(system, wanted)
    return read_table(system) if steps else None


def replace(system, wanted):
    """Put the wanted table in the place of the live one, in the same instant."""
    # Read as late as possible: what is counted from here to the replacement is lost.
    load(system, plan.ruleset_text(wanted, read_counters(system)))


def check_in_force(current, reference):
    """Raise MeshError where the live table, after it was changed, still is not the wanted one."""
    left = [line for step in plan.plan_guard(current, reference) for line in plan.describe(step, {})]
    if left:
        raise MeshError("the kernel took the rules, but table %s is not what it should be (%s): something else on this node changes it; "
                        "look at `nft monitor`" % (plan.TABLE, "; ".join(left[:LEFT_SHOWN])))


def read_counters(system):
    """{counter: {"packets", "bytes"}} of the live guard, None where there is none or no nft. Cheap: the elements are not read."""
    rc, out, dummy = system.try_run(["nft", "-j", "list", "counters", "table", "inet", plan.TABLE])
    table = _parsed(out)[0] if rc == 0 else None
    return plan.counts_of(table) if table else None


def exempt_cidrs_of(text):
    """The prefixes that a text of `ruleset_text` spares; none where there is no such text."""
    try:
        return plan.settings_of(text or "")["exempt_cidrs"]
    except MeshError:
        return []


def guard_status(system, compare=True, document=None, node=None):
    """What holds on this node, for who only looks: {"present": whether there is a table, "in_force": whether it is what its file says,
    "at_boot": whether it comes back, "reason": what is wrong or "", "counters", "exempt_cidrs": what its file spares, [] where it says
    nothing}.

    A node that was never guarded needs no nft for this. Without ``compare`` the elements are not read, which at thousands of nodes are tens
    of thousands, and "in_force" is None. ``document``: the one that the agent of this node works by, which has what changed since the file
    was written.
    """
    text = read_text(GUARD_FILE)
    result = {"present": False, "in_force": False, "at_boot": False, "reason": "", "counters": plan.counts_of(None),
              "exempt_cidrs": exempt_cidrs_of(text)}
    if system.path("nft") is None:
        result["reason"] = "%s is there, but nft is not installed any more" % GUARD_FILE if text is not None else ""
        return result
    if compare:
        current = read_table(system)
        result.update(present=current is not None, counters=plan.counts_of(current))
    else:
        counters = read_counters(system)
        result.update(present=counters is not None, in_force=None, counters=counters or result["counters"])
    if text is None:
        result["reason"] = "%s is not there: the guard does not come back at boot" % GUARD_FILE if result["present"] else ""
        return result
    result["at_boot"] = system.unit(GUARD_UNIT)["enabled"]
    if not compare:
        return result
    if document is not None:
        try:
            text = plan.ruleset_text(plan.wanted_guard(document, node, plan.settings_of(text)))
        except MeshError as exc:
            result["reason"] = "%s: %s" % (GUARD_FILE, exc)
            return result
    steps = plan.plan_guard(current, reference(system, text))
    result["in_force"] = not steps
    if steps:
        result["reason"] = "table %s: %s" % (
            plan.TABLE, steps[0].get("reason") or "the elements of %s differ" % ", ".join(step["set"] for step in steps))
    elif not result["at_boot"]:
        result["reason"] = "%s is not enabled: the guard does not come back at boot" % GUARD_UNIT
    return result


# --- at boot -----------------------------------------------------------------------------------------------------------------------------

def wanted_files(system, text):
    """Files that bring the guard back: {path: (text or None, mode)}; all absent where ``text`` is None."""
    if text is None:
        return dict.fromkeys((GUARD_FILE, GUARD_UNIT_FILE, NFTABLES_DROPIN), (None, MODE_PUBLIC))
    nft = nft_path(system)
    return {
        GUARD_FILE: (text, MODE_GUARD),
        GUARD_UNIT_FILE: (unit_text(nft), MODE_PUBLIC),
        NFTABLES_DROPIN: (dropin_text(nft), MODE_PUBLIC),
    }


def unit_text(nft):
    """The unit that loads the guard before there is a network.

    Wanted by sysinit.target, as nftables.service is: that is part of every way to boot, also of those that never come to
    multi-user.target. Without the usual dependencies, which would make it wait for basic.target and stop it at shutdown. Not after
    nftables.service, which flushes what is there when it starts: the drop-in beside it loads the guard again, and where an administrator
    lets that service wait for the network the two orders would be a cycle, of which systemd leaves one out.
    """
    return """\
# Written by kubemesh.wireguard. Changes made here are lost.
[Unit]
Description=Guard of the WireGuard mesh: what must be in the tunnel goes no other way
Documentation=man:nft(8)
DefaultDependencies=no
# Networks are set up after this target.
Wants=network-pre.target
Before=network-pre.target
After=local-fs.target systemd-modules-load.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=%s -f %s
# Nothing on stop: only the module opens the guard.

[Install]
WantedBy=sysinit.target
""" % (nft, GUARD_FILE)


def dropin_text(nft):
    """What brings the guard back after nftables.service flushed it.

    That service empties nftables of everybody's tables whenever it starts, reloads or stops. A dependency between the two units would not
    do: a reload is no start, and a stop of it would have to start us. Firewalld, ufw and iptables only touch tables of their own.
    Its stop is replaced by one transaction that flushes and loads the guard: at shutdown it comes together with the end of the mesh device,
    and what is sent between the two would go in clear. After a start or a reload the guard is away for milliseconds, in which the mesh is
    there.
    The dash: trouble with the guard must not take down the firewall of the host.
    """
    return f"""\
# Written by kubemesh.wireguard. Changes made here are lost.
# This service removes all tables, also those of others, when it starts, reloads or stops.
[Service]
ExecStartPost=-{nft} -f {GUARD_FILE}
ExecReload=-{nft} -f {GUARD_FILE}
ExecStop=
ExecStop=-/bin/sh -c '{{ echo flush ruleset; cat {GUARD_FILE}; }} | {nft} -f -'
"""


def unit_steps(system, wanted_enabled, file_steps):
    """What systemd must be told."""
    if any(step["path"] == GUARD_UNIT_FILE for step in file_steps) or system.unit(GUARD_UNIT)["enabled"] != wanted_enabled:
        return [{"op": "enable_unit" if wanted_enabled else "disable_unit", "unit": GUARD_UNIT}]
    return []


def apply_files(system, file_steps, units):
    """Write or remove the files, and tell systemd. The unit is not started: that would load the table again, with counters at zero."""
    if units and units[0]["op"] == "disable_unit":
        system.run(["systemctl", "disable", "--now", GUARD_UNIT])
    for step in file_steps:
        apply_file_step(step)
    if units or any(step["path"] in (GUARD_UNIT_FILE, NFTABLES_DROPIN) for step in file_steps):
        system.run(["systemctl", "daemon-reload"])
    if units and units[0]["op"] == "enable_unit":
        system.run(["systemctl", "enable", GUARD_UNIT])
    if any(step["op"] == "remove_file" for step in file_steps):
        remove_empty_folders(OWN_FOLDERS)
