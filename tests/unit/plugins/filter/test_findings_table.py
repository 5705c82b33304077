# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

pytest.importorskip("ansible.errors")
from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.filter import findings_table as plugin

FINDING = {"level": "error", "check": "port", "node": "worker-1", "value": "51840", "message": "UDP port 51840 is taken by wg0",
           "remedy": "stop that"}


def test_filter():
    function = plugin.FilterModule().filters()["findings_table"]
    lines = function([FINDING, dict(FINDING, node="worker-2")], width=90)
    assert any("worker-1, worker-2" in line and "51840" in line for line in lines) and lines[-1] == "1 error, 0 warnings"
    assert function([]) == ["no findings"]


@pytest.mark.parametrize("wrong", [None, "text", {}, [1], [{"level": "error"}], [dict(FINDING, level="fatal")], [dict(FINDING, node=5)]])
def test_anything_else_is_refused(wrong):
    with pytest.raises(AnsibleFilterError, match="findings_table"):
        plugin.findings_table(wrong)
