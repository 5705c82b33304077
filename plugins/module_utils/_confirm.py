# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Commit-confirm, as on routers: a node takes a change of its rules back by itself unless somebody confirms it in time.

Host encryption can lock people out: the way by which a node is administered may go through the tunnel from one packet to the next. So
before the rules change, a timer of systemd is started that undoes the change. It needs neither Python nor ssh nor the controller. Who can
still reach the node afterwards stops the timer; that is the confirmation.

Nothing that is not confirmed is written to disk: a node that reboots meanwhile comes back without the change.
"""

from __future__ import annotations

import os
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._routes_plan import rule_text
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import FAMILY_OPTION, remove_file, write_text

UNIT = "kubemesh-confirm"
SCRIPT = "/run/kubemesh/take-back"
# Its existence says that the change was taken back; it is looked at by the confirmation, which then fails.
TAKEN_BACK = "/run/kubemesh/taken-back"

# Seconds. Less is over before a controller has proven anything, more is a lock-out that nobody waits for.
SHORTEST, LONGEST = 5, 3600
# 100 times 0.1 s: a handful of `ip` commands are done long before.
WAIT_TRIES, WAIT = 100, 0.1


def must_be_armed(steps):
    """Whether steps of `plan_routes` change what goes from node to node: only that can lock people out."""
    return any(step["rule"]["not_fwmark"] for step in steps if "rule" in step)


def take_back_text(steps):
    """The script that undoes the rule steps of a plan, in reverse order. Each line may fail: the plan may not have been carried out."""
    lines = ["#!/bin/sh", "# Written by kubemesh.wireguard; run by %s.timer unless the change of the rules is confirmed." % UNIT]
    for step in reversed([step for step in steps if "rule" in step]):
        verb = "del" if step["op"] == "add_rule" else "add"
        lines.append("ip %s rule %s %s || true" % (FAMILY_OPTION[step["rule"]["family"]], verb, rule_text(step["rule"])))
    # Answers may be cached with the old way; both families forget it.
    lines += ["ip route flush cache || true", ": > %s" % TAKEN_BACK]
    return "\n".join(lines) + "\n"


def check_timeout(seconds):
    """Raise `MeshError` for a time in which nothing can be confirmed."""
    if not SHORTEST <= seconds <= LONGEST:
        raise MeshError("mesh_confirm_timeout: %d: take %d to %d seconds, long enough to prove the peers of a batch"
                        % (seconds, SHORTEST, LONGEST))


def arm(system, steps, seconds):
    """Start the timer; from now on the node undoes the steps in ``seconds`` unless `disarm` is called."""
    if not system.path("systemd-run"):
        raise MeshError("encrypt: host encryption is switched on with a timer that takes it back, and systemd-run is not here; install "
                        "systemd, or take encrypt=pods")
    disarm(system)
    write_text(SCRIPT, take_back_text(steps), 0o700)
    # The accuracy of timers is a minute unless it is asked for (systemd.timer(5)).
    system.run(["systemd-run", "--quiet", "--collect", "--unit=%s" % UNIT, "--on-active=%d" % seconds,
                "--timer-property=AccuracySec=100ms", "--property=Type=oneshot", "/bin/sh", SCRIPT])


def disarm(system):
    """Stop the timer if there is one; -> whether the change was taken back before. Nothing is undone after this returns."""
    if os.path.exists(SCRIPT):
        system.try_run(["systemctl", "stop", "%s.timer" % UNIT])
        for dummy in range(WAIT_TRIES):
            # One that has begun to undo must come to its end: half of it would be neither the one nor the other.
            if not system.unit("%s.service" % UNIT)["active"]:
                break
            time.sleep(WAIT)
    taken_back = os.path.exists(TAKEN_BACK)
    for path in (SCRIPT, TAKEN_BACK):
        remove_file(path)
    return taken_back
