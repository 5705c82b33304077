# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""What the kernel tells of changes, as they happen: multicast groups of netlink(7)."""

from __future__ import annotations

import errno
import threading

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _nfnetlink as netlink

# include/linux/socket.h, include/uapi/linux/netlink.h
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
DATAGRAM_MAX = 1 << 16


class KernelWatcher(threading.Thread):
    """Calls ``tell(seen)`` from this thread for what ``read(datagram)`` makes of what the kernel tells, unless that is empty or false.

    ``tell(None)``: more happened than there was room for, and what was wanted may be among it. ``fail(text)``: nothing is told any more.
    """

    def __init__(self, name, protocol, groups, read, tell, fail):
        super().__init__(name=name, daemon=True)
        self.protocol, self.groups, self.read, self.tell, self.fail = protocol, groups, read, tell, fail

    def run(self):
        try:
            with netlink.open_socket(self.protocol) as opened:
                for group in self.groups:
                    opened.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
                opened.settimeout(None)
                while True:
                    try:
                        seen = self.read(opened.recv(DATAGRAM_MAX))
                    except OSError as exc:
                        if exc.errno != errno.ENOBUFS:
                            raise
                        self.tell(None)
                        continue
                    if seen:
                        self.tell(seen)
        except OSError as exc:
            self.fail(exc.strerror or str(exc))
