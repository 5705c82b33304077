# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import hashlib
import json
import threading

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _published_keys as published
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

KEY0, KEY1 = "kubemesh.wireguard/public-key-0", "kubemesh.wireguard/public-key-1"
JINJA = "{{ lookup('pipe', 'id') }}"


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def wish(uid, *numbers):
    """Keys by generation; None: no key of that generation."""
    return {"uid": uid, "public_keys": {str(generation): key(number) for generation, number in enumerate(numbers) if number is not None}}


def node(name, uid, **annotations):
    """A Node object; ``_0`` and ``_1`` are the keys that it carries."""
    names = {"_0": KEY0, "_1": KEY1}
    return {"metadata": {"name": name, "uid": uid, "annotations": dict(
        {names[generation]: value for generation, value in annotations.items()}, other="stays")}}


def read(*items):
    return published.nodes_read(items)


def merged(item, body):
    """The Node after the merge patch (RFC 7386)."""
    def merge(target, patch):
        if not isinstance(patch, dict):
            return patch
        result = dict(target) if isinstance(target, dict) else {}
        for name, value in patch.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merge(result.get(name), value)
        return result
    return merge(item, json.loads(json.dumps(body)))


def after(patches):
    return {patch["node"]: patch["after"] for patch in patches}


class TestPublish:
    def test_only_what_differs(self):
        wanted = {"same": wish("u1", 1), "new": wish("u2", 2), "other": wish("u3", 3), "two": wish("u4", 4, 5), "none": wish("u5"),
                  "left": wish("u6"), "pending": wish("u7")}
        nodes = read(node("same", "u1", _0=key(1)), node("new", "u2"), node("other", "u3", _0=key(9), _1=key(8)),
                     node("two", "u4", _0=key(4)), node("none", "u5", _1=JINJA), node("left", "u6", _0=key(6)), node("pending", "u7"))
        assert after(published.patches_to_publish(wanted, nodes)) == {
            "new": {"0": key(2)}, "other": {"0": key(3), "1": None}, "two": {"1": key(5)}, "none": {"1": None}, "left": {"0": None}}

    def test_other_generations_stay(self):
        """While keys are rotated: the new one is added, the old one is neither changed, removed nor added."""
        wanted = {"a": wish("u1", 1, 11), "b": wish("u2", None, 12), "c": wish("u3", 3, 13)}
        nodes = read(node("a", "u1", _0=key(9)), node("b", "u2", _0=key(2)), node("c", "u3"))
        assert after(published.patches_to_publish(wanted, nodes, ["1"])) == {"a": {"1": key(11)}, "b": {"1": key(12)}, "c": {"1": key(13)}}

    def test_a_node_that_was_added_again_is_not_given_the_old_key(self):
        assert published.patches_to_publish({"a": wish("old", 1)}, read(node("a", "new"))) == []
        assert after(published.patches_to_publish({"a": wish("", 1)}, read(node("a", "new")))) == {"a": {"0": key(1)}}

    def test_a_node_that_the_document_does_not_have_is_left_alone(self):
        assert published.patches_to_publish({}, read(node("a", "u1", _0=key(1)))) == []

    def test_the_body_names_the_uid(self):
        patch, = published.patches_to_publish({"a": wish("u1", 1)}, read(node("a", "u1", _1="x")))
        assert published.body_of(patch) == {"metadata": {"uid": "u1", "annotations": {KEY0: key(1), KEY1: None}}}

    def test_for_people(self):
        nodes = read(node("a", "u1", _0=JINJA), node("b", "u2", _1=key(2)))
        patches = published.patches_to_publish({"a": wish("u1", 1), "b": wish("u2")}, nodes)
        assert published.lines_of(patches, "before") == ["node a, %s: %s" % (KEY0, ascii(JINJA)), "node b, %s: %s" % (KEY1, key(2))]
        assert published.lines_of(patches, "after") == ["node a, %s: %s" % (KEY0, key(1))]

    def test_what_is_no_node(self):
        assert read(None, {}, {"metadata": 5}, {"metadata": {"name": "a"}}, {"metadata": {"name": "../a", "uid": "u"}},
                    {"metadata": {"name": "b", "uid": "u", "annotations": [1]}}) == [{"name": "b", "uid": "u", "annotation_keys": {}}]


class TestRemove:
    def test_from_all_nodes(self):
        nodes = read(node("a", "u1", _0=key(1), _1=JINJA), node("b", "u2"), node("joined", "u9", _0=key(9)), node("c", "again", _1=key(3)))
        wanted = {"a": wish("u1", 1), "b": wish("u2", 2), "c": wish("u3", 3)}
        assert after(published.patches_to_remove(wanted, nodes)) == {"a": {"0": None, "1": None}, "joined": {"0": None}, "c": {"1": None}}
        assert after(published.patches_to_remove(wanted, nodes, ["1"])) == {"a": {"1": None}, "c": {"1": None}}

    def test_not_from_another_cluster(self):
        with pytest.raises(MeshError, match=r"of this cluster \(a\) are not of this mesh.*check kubeconfig and context"):
            published.patches_to_remove({"a": wish("u1", 1)}, read(node("a", "other", _0=key(1))))
        assert published.patches_to_remove({"a": wish("u1", 1)}, read(node("a", "other"))) == []

    def test_a_mesh_without_node_objects_published_nothing(self):
        assert published.patches_to_remove({"a": wish("", 1)}, read(node("a", "u1", _0=key(1)))) == []


NUMBERS = st.one_of(st.none(), st.integers(0, 5))
NAMES = st.sampled_from("abcdef")
UIDS = st.sampled_from(["u1", "u2", "u3"])
VALUES = st.one_of(st.integers(0, 5).map(key), st.sampled_from(["", JINJA, "x"]), st.integers(), st.lists(st.integers(), max_size=2))
NODES = st.dictionaries(NAMES, st.tuples(UIDS, st.dictionaries(st.sampled_from(["_0", "_1"]), VALUES)), max_size=6)
WANTED = st.dictionaries(NAMES, st.builds(wish, UIDS, NUMBERS, NUMBERS), max_size=6)
GENERATIONS = st.lists(st.sampled_from(["0", "1"]), unique=True)


@given(WANTED, NODES, GENERATIONS, st.sampled_from(["present", "absent"]))
def test_once_is_enough_and_nothing_else_is_touched(wanted, found, generations, state):
    items = {name: node(name, uid, **annotations) for name, (uid, annotations) in found.items()}
    try:
        patches = published.plan(state, wanted, read(*items.values()), generations)
    except MeshError:
        assert state == "absent" and not {entry["uid"] for entry in wanted.values()} & {uid for uid, dummy in found.values()}
        return
    done = dict(items)
    for patch in patches:
        assert patch["after"] and set(patch["after"]) <= set(generations)
        done[patch["node"]] = merged(items[patch["node"]], published.body_of(patch))
    assert published.plan(state, wanted, read(*done.values()), generations) == []
    for name, item in done.items():
        left = {generation: item["metadata"]["annotations"].get(annotation) for generation, annotation in (("0", KEY0), ("1", KEY1))}
        assert item["metadata"]["annotations"]["other"] == "stays" and item["metadata"]["uid"] == found[name][0]
        if state == "present" and name in wanted and wanted[name]["uid"] == found[name][0]:
            assert all(left[generation] == wanted[name]["public_keys"].get(generation) for generation in generations)
        elif state == "present":
            assert item == items[name]


class TestVerdicts:
    @pytest.mark.parametrize("status,message,said", [
        (404, 'nodes "a" not found', "gone"),
        (422, 'Node "a" is invalid: metadata.uid: Invalid value: "x": field is immutable', "replaced"),
        (409, "Precondition failed: UID in precondition: x, UID in object meta: y", "replaced"),
        (422, "metadata.annotations: Too long", "failed"),
        (409, "the object has been modified", "failed"),
        (403, "nodes is forbidden", "failed"),
        (400, "admission webhook denied the request", "failed"),
        (401, "Unauthorized", "away"), (429, "", "away"), (500, "", "away"), (503, "", "away"), (None, "", "away")])
    def test_of_the_api(self, status, message, said):
        assert published.verdict(status, message) == said

    # as kubectl 1.32 prints them
    @pytest.mark.parametrize("rc,stderr,said", [
        (0, "", "done"),
        (1, 'Error from server (NotFound): nodes "a" not found', "gone"),
        (1, 'The Node "a" is invalid: metadata.uid: Invalid value: "x": field is immutable', "replaced"),
        (1, 'The Node "a" is invalid: metadata.annotations: Too long: may not be more than 262144 bytes', "failed"),
        (1, 'Error from server (Forbidden): nodes "a" is forbidden: User "u" cannot patch resource "nodes"', "failed"),
        (1, "Error from server (BadRequest): admission webhook denied the request", "failed"),
        (1, "Error from server (InternalError): x", "away"),
        (1, "Error from server (ServiceUnavailable): x", "away"),
        (1, "error: You must be logged in to the server (Unauthorized)", "away"),
        (1, "The connection to the server 192.0.2.1:6443 was refused - did you specify the right host or port?", "away"),
        (1, "Unable to connect to the server: dial tcp 192.0.2.1:6443: i/o timeout", "away"),
        (2, "", "away"), (None, "no answer within 120 seconds", "away")])
    def test_of_kubectl(self, rc, stderr, said):
        assert published.kubectl_verdict(rc, stderr) == said


class TestApply:
    @staticmethod
    def applied(number, answer, workers=4):
        asked, told, lock = [], [], threading.Lock()

        def send(patch):
            with lock:
                asked.append(patch["node"])
            return answer(patch["node"])
        return published.apply_patches([{"node": at} for at in range(number)], send, workers, told.append), asked, told

    def test_all(self):
        outcome, asked, told = self.applied(250, lambda name: ("done", None))
        assert (sorted(outcome["done"]), outcome["left"], sorted(asked)) == (list(range(250)), 0, list(range(250)))
        assert told == [1, 101, 201, 250]
        assert self.applied(0, None)[0] == {"done": [], "gone": [], "replaced": [], "failed": [], "left": 0}

    def test_what_is_refused_to_the_first_is_not_tried_with_the_others(self):
        outcome, asked, dummy = self.applied(250, lambda name: ("failed", "403"))
        assert (asked, outcome["failed"], outcome["left"]) == ([0], [[0, "403"]], 249)

    def test_one_that_cannot_be_written_stops_nobody(self):
        outcome = self.applied(250, lambda name: ("failed", "too long") if name in (7, 240) else ("done", None))[0]
        assert (len(outcome["done"]), outcome["failed"], outcome["left"]) == (248, [[7, "too long"], [240, "too long"]], 0)

    def test_many_do(self):
        outcome = self.applied(250, lambda name: ("failed", "no") if 10 <= name < 30 else ("done", None))[0]
        assert (len(outcome["failed"]), outcome["left"]) == (20, 149)

    def test_an_api_that_goes_away(self):
        outcome, asked, dummy = self.applied(250, lambda name: ("away", "refused") if name >= 50 else ("done", None))
        assert (len(outcome["done"]), len(asked), outcome["left"]) == (50, 101, 149)

    def test_nodes_that_went_are_no_failure(self):
        outcome = self.applied(150, lambda name: (("gone", "replaced", "done")[name % 3], None))[0]
        assert [len(outcome[said]) for said in ("gone", "replaced", "done", "failed")] == [50, 50, 50, 0]
