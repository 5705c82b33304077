# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the kernel sends what a node borrowed from the block of another, on that node itself, while the block comes and goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="network namespaces need root, devices in them /dev/net/tun")

# Runs in a network namespace of its own, which ends with it. Of `System` it needs what runs ip.
PROGRAM = """
import json, subprocess, sys
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes, _routes_plan as plan

OPTION = {"ipv4": "-4", "ipv6": "-6"}
CASES = {"ipv4": ("10.1.0.0/26", "10.1.0.9/32", "10.1.0.8"), "ipv6": ("fd00::/122", "fd00::9/128", "fd00::8")}

def ip(*args, text=None):
    return subprocess.run(["ip", *args], input=text, check=True, capture_output=True, text=True).stdout

class System:
    def ip_json(self, args, missing=()):
        try:
            return json.loads(ip("-j", "-N", *args) or "[]")
        except subprocess.CalledProcessError as exc:
            if any(text in exc.stderr for text in missing):
                return []
            raise

    def ip_batch(self, family, lines):
        ip(OPTION[family], "-batch", "-", text="".join(line + "\\n" for line in lines))

def device(family, address):
    return plan.devices_of_answers(ip("-o", OPTION[family], "route", "get", address)).get(address)

for name in ("mesh", "pod"):
    ip("tuntap", "add", name, "mode", "tun")
    ip("addr", "add", {"mesh": "198.18.0.1/32", "pod": "169.254.9.9/32"}[name], "dev", name)
    ip("-6", "addr", "add", {"mesh": "2001:db8::1/128", "pod": "2001:db8::2/128"}[name], "dev", name, "nodad")
    ip("link", "set", name, "up")
found = {}
for family, (block, borrowed, other) in CASES.items():
    common = {"family": family, "table": 51840, "src": "", "mtu": 0, "peer": ""}
    wide = dict(common, dst=block, dev="mesh", type="unicast")
    out = dict(common, dst=borrowed, dev="", type="throw")
    steered = dict(common, dst=borrowed, dev="mesh", type="unicast")
    ip(OPTION[family], "route", "add", borrowed, "dev", "pod")
    ip(OPTION[family], "rule", "add", "priority", "400", "lookup", "51840")
    state, seen = {"routes": [], "rules": []}, []
    for routes in ([out, wide], [wide, steered], [out, wide], []):
        wanted = {"routes": routes, "rules": []}
        for step in plan.plan_routes(state, wanted):
            _routes.apply_steps(System(), [step])
            seen.append(device(family, borrowed.partition("/")[0]))
        state = {"routes": [route for route in _routes.read_state(System(), 51840)["routes"] if route["family"] == family], "rules": []}
        assert plan.plan_routes(state, wanted) == [], (state, wanted)
        seen.append([device(family, other)] if routes else [])
    found[family] = seen
print(json.dumps(found))
"""


def test_a_borrowed_address_stays_a_pod_of_its_node():
    done = subprocess.run(["unshare", "--net", sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)))
    assert done.returncode == 0, done.stderr
    # Led out before the block's route is there, taken over by a peer and given back in one step each, led out until that route is gone.
    wanted = ["pod", "pod", ["mesh"], "mesh", ["mesh"], "pod", ["mesh"], "pod", "pod", []]
    assert json.loads(done.stdout) == {"ipv4": wanted, "ipv6": wanted}
