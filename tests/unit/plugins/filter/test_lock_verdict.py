# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

pytest.importorskip("ansible.errors")
from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.filter import lock_verdict as plugin

HELD = {"acquired": False, "state": "claimed", "holder_age_seconds": 3.0, "expires_in_seconds": 897.0, "holder": {
    "run": "run-b", "who": "bob", "doing": "enable", "started": 1.0, "phase": "held", "controller": None, "lease": 900}}


def test_filter():
    """More in tests/unit/plugins/module_utils/test__lock_plan.py."""
    function = plugin.FilterModule().filters()["lock_verdict"]
    assert function({"n1": {"acquired": True, "state": "held"}, "n2": None}, "run-a", "50.5")["verdict"] == "go"
    found = function({"n1": HELD}, "run-a", 50.5, path="/run/x.json")
    assert found["verdict"] == "yield" and "bob has been running enable" in found["message"] and "/run/x.json" in found["message"]


@pytest.mark.parametrize("results,run,started", [
    (None, "run-a", 1), ([], "run-a", 1), ({"n1": "x"}, "run-a", 1), ({"n1": HELD}, "a b", 1), ({"n1": HELD}, "run-a", "x"),
    ({"n1": HELD}, "run-a", None), ({"n1": dict(HELD, holder={"run": "run-b", "phase": "held"})}, "run-a", 1)])
def test_anything_else_is_refused(results, run, started):
    with pytest.raises(AnsibleFilterError, match="lock_verdict"):
        plugin.lock_verdict(results, run, started)
