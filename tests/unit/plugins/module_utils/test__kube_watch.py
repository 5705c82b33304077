# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kube_watch as watch
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "fixtures", "k8s")
WHERE = {"what": "https://api, list of nodes", "server": "https://api", "token_file": "/etc/kubemesh/agent-token"}


def recorded(name):
    with open(os.path.join(FIXTURES, name), "rb") as handle:
        return handle.read()


@given(st.integers(1, 10000), st.floats(0, 1))
def test_pauses_grow_and_end(failures, jitter):
    pause = watch.backoff(failures, jitter)
    assert 0 < pause <= watch.BACKOFF_LONGEST
    assert watch.backoff(failures + 1, jitter) >= pause
    assert watch.backoff(failures, 1.0) == 2 * watch.backoff(failures, 0.0)


def test_first_and_longest_pause():
    assert watch.backoff(1, 1.0) == watch.BACKOFF_FIRST and watch.backoff(50, 1.0) == watch.BACKOFF_LONGEST


@pytest.mark.parametrize("text, seconds", [(None, 0), ("", 0), ("7", 7), ("999", 30), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("-1", 0),
                                           ("99999999", 0), ("\u0663", 0)])
def test_retry_after(text, seconds):
    assert watch.parse_retry_after(text) == seconds


def test_pages_of_a_real_server():
    items, version, token = watch.parse_page(recorded("nodes-page1.json"), "NodeList", "x")
    assert len(items) == 2 and version == "283" and token
    items, version, token = watch.parse_page(recorded("nodes-empty.json"), "NodeList", "x")
    assert (items, version, token) == ([], "255", "")


@pytest.mark.parametrize("data", [b"", b"[]", b"<html>", b'{"kind":"PodList"}', b'{"kind":"NodeList","items":[]}', b"[" * 100000,
                                  b'{"kind":"NodeList","items":7,"metadata":{"resourceVersion":"1"}}', b'{"kind":"NodeList","metadata":7}',
                                  b'{"kind":"NodeList","items":[],"metadata":{"resourceVersion":"1&watch=0"}}'])
def test_what_is_no_page(data):
    with pytest.raises(watch.ApiError):
        watch.parse_page(data, "NodeList", "x")


def test_events_of_a_real_server():
    kinds = [watch.parse_event(line, "x")[0] for line in recorded("watch.jsonl").splitlines()]
    assert {"ADDED", "MODIFIED", "DELETED"} <= set(kinds)


def test_gone_in_the_stream_of_a_real_server():
    with pytest.raises(watch.Gone, match="too old resource version"):
        watch.parse_event(recorded("watch-410-in-stream.http").splitlines()[-1], "x")


@pytest.mark.parametrize("event", [{"type": "ADDED"}, {"type": "OTHER", "object": {"metadata": {"resourceVersion": "1"}}},
                                   {"type": "ADDED", "object": {"metadata": {}}}, {"type": "ERROR", "object": {"code": 500}}])
def test_what_is_no_event(event):
    with pytest.raises(watch.ApiError) as caught:
        watch.parse_event(json.dumps(event), "x")
    assert not isinstance(caught.value, watch.Gone)


@pytest.mark.parametrize("code, name, remedy", [(401, "nodes-unauthorized-401.json", "renew"), (403, "nodes-forbidden-403.json", "RBAC")])
def test_refusals_name_the_remedy(code, name, remedy):
    error = watch.status_error(code, recorded(name), WHERE)
    assert error.code == code and remedy in str(error) and "/etc/kubemesh/agent-token" in str(error)


def test_what_follows_from_an_error():
    assert watch.after_error(watch.Gone("x"), True) == "relist"
    assert watch.after_error(OSError("reset"), True) == "resume"
    assert watch.after_error(OSError("reset"), False) == "relist"
    assert watch.after_error(watch.ApiError("x", 503), True) == "resume"
    assert watch.after_error(watch.ApiError("no JSON"), True) == "relist"
    assert isinstance(watch.status_error(410, b"", WHERE), watch.Gone) and issubclass(watch.ApiError, MeshError)


def test_an_answer_that_is_nested_without_end():
    """What is no API server, or one that somebody took over, ends no thread."""
    data = b"[" * 500000
    for parse in (lambda: watch.parse_event(data, "x"), lambda: watch.parse_page(data, "NodeList", "x")):
        with pytest.raises(watch.ApiError):
            parse()
    assert watch.status_error(403, data, WHERE).code == 403


FIELDS = st.sampled_from(["type", "object", "metadata", "resourceVersion", "name", "code", "kind", "items"])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner)))
def test_nothing_but_errors_of_ours(value):
    data = json.dumps(value)
    for parse in (lambda: watch.parse_event(data, "x"), lambda: watch.parse_page(data, "NodeList", "x"),
                  lambda: watch.status_error(500, data, WHERE)):
        try:
            parse()
        except watch.ApiError:
            pass
