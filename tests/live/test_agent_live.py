# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents with real WireGuard devices, rules and routes, and an API server that misbehaves on demand."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agentlab

pytestmark = pytest.mark.skipif(bool(agentlab.why_not()), reason="live tests: " + agentlab.why_not())


@pytest.fixture
def lab(tmp_path):
    with agentlab.AgentLab(tmp_path, ["a", "b", "c"], ["a", "b"]) as lab:
        lab.start("a", "b")
        lab.whole("a", "b")
        yield lab


def test_join_and_leave(lab):
    lab.start("c")
    lab.api.apply("nodes", lab.node("c"))
    lab.whole("a", "b", "c")
    lab.api.delete("nodes", "c")
    lab.whole("a", "b")
    assert lab.keys["c"][1] not in lab.allowed("a")
