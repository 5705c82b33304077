# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The node agent's part of strict mode: the guard that a run put in force follows the nodes that come and go.

Whether there is a guard and what it spares is what the file says that brings it back at boot (`_guard.GUARD_FILE`), which runs write and
this only reads. `_guard_plan` decides, `_guard` does.

A root that has no capability but one cannot make a network namespace to find out how nft prints the wanted rules (`_guard.reference`). So
the table is loaded once as it shall be, in one transaction as ever, and what is read then is what it is compared with later.
"""

from __future__ import annotations

import os

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard as live
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _nfnetlink as netlink
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kernel_watch import KernelWatcher
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, is_peer
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import read_text

# include/uapi/linux/nfnetlink.h and nf_tables.h
NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES = 7, 10
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE = 0, 2
NFTA_TABLE_NAME = 1
NFGENMSG = 4

OFF, IN_FORCE, NOT_IN_FORCE = "off", "in force", "not in force"


class GuardKeeper:
    """Brings the live table up to a document: `close` before anything else of that document is done, `open` after all of it."""

    def __init__(self, system, config):
        self.system, self.node = system, config["node"]
        self.path = os.path.join(config["boot_folder"], os.path.basename(live.GUARD_FILE))
        self.file = None      # ((mtime, inode, size), settings) of the file
        self.printed = None   # (rules as we write them, skeleton that nft prints of them)
        self.table = None     # the live table as it was left, None where somebody else may have changed it
        self.wanted = None    # what `open` brings it to
        self.document = None  # what it was closed for
        self.state = OFF

    def stat(self):
        """What tells one file from the next; None where there is none."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def is_changed(self):
        """Whether a run has changed the file since it was read."""
        return self.file is not None and self.file[0] != self.stat()

    def forget(self):
        """Somebody else had a reason to change the table: it is read again, and is no drift."""
        self.table = None

    def close(self, document, whole):
        """Drop what is to be dropped from now on, beside what is dropped now; -> ``(steps, whether somebody had changed the table)``.

        ``whole``: read the table first. Raises MeshError where it cannot be done; nothing of the mesh must be changed then.
        """
        try:
            return self._close(document, whole)
        except (MeshError, OSError):
            self.table = self.wanted = self.document = None
            self.state = NOT_IN_FORCE
            raise

    def _close(self, document, whole):
        stat = self.stat()
        if self.file is None or self.file[0] != stat:
            text = read_text(self.path) if stat else None
            self.table, self.file = None, (stat, None if text is None else plan.settings_of(text))
        settings = self.file[1]
        entry = document["nodes"].get(self.node)
        self.state = OFF if settings is None else IN_FORCE
        if settings is None or entry is None or not is_peer(entry):
            self.table = self.wanted = self.document = None
            return [], False
        if self.table is not None and document is self.document and not whole:
            return [], False
        wanted = plan.wanted_guard(document, self.node, settings)
        current = live.read_table(self.system) if whole or self.table is None else self.table
        drift = current is None or (self.table is not None and bool(plan.plan_guard(current, self.table)))
        closed = plan.between(current, wanted)
        rules = plan.rules_text(wanted)
        if self.printed is None or self.printed[0] != rules or current is None or current["skeleton"] != self.printed[1]:
            steps = [{"op": "load_table", "reason": "it is not there" if current is None else "its rules may be others"}]
            live.replace(self.system, closed)
            after = live.read_table(self.system)
            if after is None:
                raise MeshError("table %s is gone right after it was loaded: something else on this node flushes nftables; look at "
                                "`nft monitor`" % plan.TABLE)
            self.printed = (rules, after["skeleton"])
        else:
            reference = plan.table_of(closed, self.printed[1])
            steps = plan.plan_guard(current, reference)
            after = live.apply_steps(self.system, steps, closed, reference) if steps else current
        live.check_in_force(after, plan.table_of(closed, self.printed[1]))
        self.table, self.wanted, self.document = after, wanted, document
        return steps, drift

    def open(self):
        """Let go what is to be dropped no more, after it left the mesh; -> steps."""
        if self.wanted is None:
            return []
        reference = plan.table_of(self.wanted, self.printed[1])
        steps = plan.plan_guard(self.table, reference)
        if steps:
            self.table, table = None, live.apply_steps(self.system, steps, self.wanted, reference)
            live.check_in_force(table, reference)
            self.table = table
        return steps

    def counters(self):
        """What was dropped, for who only looks; None where nothing is guarded."""
        return live.read_counters(self.system) if self.state != OFF else None


class TableWatcher(KernelWatcher):
    """Calls ``tell("")`` when somebody makes or removes the table of the guard: ``nft flush ruleset``, a reload of nftables.service.

    Those put the table of the last run in force, or none. What else is changed in it is seen by the next comparison.
    """

    def __init__(self, tell):
        super().__init__(
            "tables", netlink.NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), is_ours, lambda dummy: tell(""),
            lambda text: tell("nftables cannot be watched (%s): what others change is seen by the next comparison" % text))


def is_ours(data):
    """Whether a datagram says that the table of the guard was made or removed."""
    for kind, dummy, body in netlink.messages(data):
        if kind in (NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE):
            name = netlink.attributes(body[NFGENMSG:]).get(NFTA_TABLE_NAME, b"")
            if name.rstrip(b"\0").decode("utf-8", "replace") == plan.TABLE:
                return True
    return False
