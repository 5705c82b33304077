# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A netlink socket that answers transactions of nf_tables."""

from __future__ import annotations

import struct

from ansible_collections.kubemesh.wireguard.plugins.module_utils._nfnetlink import attributes, messages


def batch_of(data):
    """[(type, sequence, attributes)]"""
    return [(kind, sequence, attributes(body[4:])) for kind, sequence, body in messages(data)]


class NfSocket:
    """Answers transactions with the codes of a list, one per transaction: (place of the error or None for the whole batch, errno)."""

    def __init__(self, codes):
        self.codes = codes
        self.sent = []
        self.closed = False

    def send(self, data):
        self.sent.append(batch_of(data))

    def recv(self, size):
        place, code = self.codes.pop(0)
        sequences = [sequence for kind, sequence, dummy in self.sent[-1] if kind not in (0x10, 0x11)]
        if place is None:
            answers = [(self.sent[-1][0][1], code)]
        else:
            answers = [(sequence, code if number == place else 0) for number, sequence in enumerate(sequences)]
        return b"".join(struct.pack("=IHHIIi", 36, 2, 0, sequence, 0, -number) + b"\0" * 16 for sequence, number in answers)

    def close(self):
        self.closed = True
