# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What this kernel tells of what is taken away, both families, in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="live tests: root and unshare are needed")

# Started in the namespace: what is heard, until the last of what is done.
LISTENER = """
import queue, subprocess
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_drift as drift
heard = queue.Queue()
watcher = drift.DriftWatcher(("km0", "km1"), (51840, 51841), heard.put, lambda text: heard.put([("failed", text)]))
watcher.start()
def ip(words):
    subprocess.run(["ip"] + words.split(), check=True)
# It is heard from the first to the last: rules of others that come and go until one is told.
subprocess.run(["ip", "link", "add", "km1", "type", "veth", "peer", "name", "peer1"], check=True)
while True:
    ip("link set km1 up")
    ip("link set km1 down")
    try:
        heard.get(timeout=0.2)
        break
    except queue.Empty:
        pass
ip("link del km1")
for words in COMMANDS:
    ip(words)
seen = set()
while not any(item[2] == 499 for item in seen if item[0] == "rule"):
    seen.update(heard.get(timeout=10))
print(sorted(seen))
"""

COMMANDS = """link add km0 type veth peer name peer0
link add other type veth peer name peer2
link set km0 up
addr add 10.244.1.0/32 dev km0
addr add fd00:1::/128 dev km0 nodad
route add 10.244.2.0/24 dev km0 table 51840
route add fd00:2::/64 dev km0 table 51841
route add fd00:3::/64 dev km0 table 100
rule add priority 400 table 51840
-6 rule add priority 401 from fd00:1::/64 table 51840
rule add priority 402 iif cali1 table 51841
rule add priority 403 table 100
rule del priority 403
link set other up
link set other down
rule del priority 400
-6 rule del priority 401
rule del priority 402
route del 10.244.2.0/24 table 51840
-6 route del fd00:2::/64 table 51841
route del fd00:3::/64 table 100
addr del 10.244.1.0/32 dev km0
addr del fd00:1::/128 dev km0
link set km0 down
rule add priority 499 table 51840
rule del priority 499""".splitlines()


def test_what_the_kernel_tells():
    code = "COMMANDS = %r\n%s" % (COMMANDS, LISTENER)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(["unshare", "-n", sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout)
    # the device that showed that somebody listens may be told of twice
    assert [item for item in seen if item != ("link", "km1") and not str(item[1]).startswith("fe80")] == [
        ("address", "10.244.1.0/32"), ("address", "fd00:1::/128"), ("link", "km0"),
        ("route", 51840, "10.244.2.0/24"), ("route", 51841, "fd00:2::/64"),
        ("rule", "ipv4", 400, 51840, "", ""), ("rule", "ipv4", 402, 51841, "", "cali1"), ("rule", "ipv4", 499, 51840, "", ""),
        ("rule", "ipv6", 401, 51840, "fd00:1::/64", "")]
