# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The stand-ins that other tests use do what the real kernel and the real wireguard-go were recorded to do."""

from __future__ import annotations

import errno
import json
import pathlib
import struct

import pytest

from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils import wg_fakes

TESTS = pathlib.Path(__file__).resolve().parents[3]
KERNEL = json.loads((TESTS / "kernel" / "recorded" / "kernel.json").read_text())
UAPI = json.loads((TESTS / "unit" / "fixtures" / "wg" / "uapi.json").read_text())

# what the fake does not go into: it is for what our client sends
NOT_MODELLED = {"unknown_attribute", "unknown_peer_flag", "no_nested_flag", "peer_key_short", "private_key", "own_key_as_peer"}


def shown(device):
    return {wg_fakes.base64.b64encode(key).decode(): sorted(
        str(wg_fakes.ipaddress.ip_network((address, length))) for dummy, address, length in peer["ips"])
        for key, peer in device["peers"].items()}


def test_kernel_answers_and_ends_up_as_recorded():
    kernel = wg_fakes.FakeKernel(("rec4",))
    done = 0
    for case in KERNEL["cases"]:
        if case["name"] in NOT_MODELLED:
            continue
        request = bytes.fromhex(case["request"])
        answer = kernel.request(16, request)[-1]
        code = -struct.unpack_from("=i", answer, 16)[0]
        assert (errno.errorcode[code] if code else "ok") == case["error"], case["name"]
        if case["name"] != "no_device":
            assert shown(kernel.devices["rec4"]) == {key: sorted(ips) for key, ips in case["after"].items()}, case["name"]
        done += 1
    assert done >= 14


@pytest.fixture
def userspace(tmp_path):
    fake = wg_fakes.FakeUserspace(tmp_path)
    yield fake
    fake.close()


def peers(answer):
    """{key: set of lines} of an answer to get=1; lines that differ from run to run dropped."""
    result, current = {}, None
    for line in answer.split("\n"):
        if line.startswith("public_key="):
            current = result.setdefault(line, set())
        elif current is not None and line and not line.startswith(("tx_", "rx_", "errno")):
            current.add(line)
    return result


def test_userspace_answers_and_ends_up_as_recorded(userspace):
    compared = 0
    for case in UAPI["cases"]:
        if case["name"] in ("get_new", "port_in_use", "bad_key"):
            continue
        answer = userspace.answer(case["request"].encode()).decode()
        if case["request"].startswith("get"):
            assert peers(answer) == peers(case["answer"]), case["name"]
            compared += 1
        else:
            assert answer == case["answer"], case["name"]
    assert compared == 3
