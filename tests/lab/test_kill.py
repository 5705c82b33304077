# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller is killed at a random moment of every operation: all pods stay connected, nothing is lost, and one more run finishes.

KUBEMESH_KILLS says how many (12), KUBEMESH_SEED which moments; the seed is printed. Up to 12 have two nodes, for want of time; more have
three.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import traffic
from harness import Watched, all_encrypted, infos, keep_on_failure, made, playbook, sniffed, states, text_of

PODS = ("pod-pod", "host-pod", "pod-host")
KILLS = int(os.environ.get("KUBEMESH_KILLS", "12"))
SEED = int(os.environ.get("KUBEMESH_SEED", random.SystemRandom().randrange(1 << 32)))

NODES_ON = ["-e", "mesh_encrypt=nodes"]
# name: (playbook, arguments, kinds of traffic that are encrypted before, and so must be at every moment); each begins where the one before
# ended.
OPERATIONS = {
    "enable": ("enable", [], ()),
    "reconcile": ("reconcile", [], PODS),
    "rotate_keys": ("rotate_keys", [], PODS),
    "nodes on": ("enable", NODES_ON, PODS),
    "strict on": ("enable", [*NODES_ON, "-e", "mesh_strict=true"], traffic.KINDS),
    "disable": ("disable", [], ()),
}


def arguments(name):
    book, args, dummy = OPERATIONS[name]
    return book, [*args, *([] if book == "disable" else ["-e", "mesh_nodes_source=inventory", "-e", "mesh_preflight=false"])]


@pytest.fixture(scope="module")
def lab():
    print("KUBEMESH_SEED=%d" % SEED)
    found = made("kill", nodes=2 if KILLS <= 12 else 3, pods=1, rp_filter=1)
    found.random = random.Random(SEED)
    # Seconds that an operation takes, measured when it is not killed; the first of its kind is killed within this.
    found.takes = dict.fromkeys(OPERATIONS, 12.0)
    yield found
    if not keep_on_failure():
        found.down()


def killed(lab, name):
    """Start an operation, and kill every process of it at a random moment; -> the moment in seconds."""
    book, args = arguments(name)
    moment = lab.random.uniform(0.5, lab.takes[name])
    process = lab.start_ansible_playbook(["kubemesh.wireguard.%s" % book, *args])
    try:
        time.sleep(moment)
    finally:
        # The whole session: a controller that loses power takes its workers along.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return moment


@pytest.mark.parametrize("number, name", list(enumerate(itertools.islice(itertools.cycle(OPERATIONS), KILLS))))
def test_killed(lab, number, name):
    book, args = arguments(name)
    encrypted = OPERATIONS[name][2]
    with Watched(lab, streams=False):
        with sniffed(lab, encrypted) if encrypted else contextlib.nullcontext({}) as found:
            moment = killed(lab, name)
            print("%s killed after %.1f s" % (name, moment))
            # What was on its way to the nodes comes to its end there.
            time.sleep(2)
        if encrypted:
            assert found["seen"]["clear_frames"] == 0, found["seen"]["clear"][:10]
        started = time.monotonic()
        playbook(lab, book, *args, source=None)
        lab.takes[name] = min(lab.takes[name] * 2, max(3.0, time.monotonic() - started))
    # What is there for a moment before a first rule, see _fib_split.
    for node in lab.nodes:
        assert text_of(lab, node, "ip -4 route show table main proto 151; ip -4 rule | grep kubemesh-split || true") == ""
    found = infos(lab)
    if name == "disable":
        assert {info["exists"] for info in found.values()} == {False}
    else:
        assert all_encrypted(found), states(found)
        assert {info["guard"]["in_force"] for info in found.values()} == {name == "strict on"}
