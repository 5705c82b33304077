# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""New keys on five nodes while all of them talk to each other, pods and hosts, encrypted; batch by batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Watched, all_encrypted, assert_encrypted, infos, keep_on_failure, made, playbook
from traffic import KINDS

SETTINGS = ["-e", "mesh_nodes_source=inventory", "-e", "mesh_encrypt=nodes", "-e", '{"mesh_batch": [1, 2]}']


@pytest.fixture(scope="module")
def lab():
    found = made("rotate", nodes=5, pods=1, rp_filter=1)
    playbook(found, "enable", *SETTINGS, source=None, preflight=False)
    yield found
    if not keep_on_failure():
        found.down()


def test_rotation_under_load_on_five_nodes(lab):
    before = {node: found["device"]["public_key"] for node, found in infos(lab).items()}
    with Watched(lab):
        playbook(lab, "rotate_keys", *SETTINGS)
    after = infos(lab)
    assert {found["device"]["name"] for found in after.values()} == {"wgmesh1"}
    assert not set(before.values()) & {found["device"]["public_key"] for found in after.values()}
    assert all_encrypted(after)
    assert_encrypted(lab, KINDS)
