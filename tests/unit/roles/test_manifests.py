# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifests that the role ships: they belong to each other, and the policy confines who the account of the agents is."""

from __future__ import annotations

import json
import pathlib

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils._membership import ANNOTATIONS

yaml = pytest.importorskip("yaml")

FILES = pathlib.Path(__file__).resolve().parents[3] / "roles" / "mesh" / "files"


def objects(name):
    found = yaml.safe_load((FILES / name).read_text(encoding="utf-8"))
    assert (found["apiVersion"], found["kind"]) == ("v1", "List")
    return {(item["kind"], item["metadata"]["name"]): item for item in found["items"]}


POLICY = objects("agent-admission.yml")
SPEC = POLICY["ValidatingAdmissionPolicy", "kubemesh-node-agent"]["spec"]
RULES = [rule["expression"] for rule in SPEC["validations"]]


def test_the_policy_is_in_force_where_it_cannot_be_evaluated_either():
    binding = POLICY["ValidatingAdmissionPolicyBinding", "kubemesh-node-agent"]["spec"]
    assert binding == {"policyName": "kubemesh-node-agent", "validationActions": ["Deny"]} and SPEC["failurePolicy"] == "Fail"
    assert {item["apiVersion"] for item in POLICY.values()} == {"admissionregistration.k8s.io/v1"} and len(POLICY) == 2


def test_the_policy_is_about_the_account_of_the_agents_and_no_other():
    account = objects("agent-rbac.yml")["ServiceAccount", "node-agent"]["metadata"]
    assert [condition["expression"] for condition in SPEC["matchConditions"]] == [
        "request.userInfo.username == 'system:serviceaccount:%s:%s'" % (account["namespace"], account["name"])]
    rules = SPEC["matchConstraints"]["resourceRules"]
    assert len(rules) == 1 and rules[0]["resources"] == ["nodes", "nodes/*"]
    assert set(rules[0]["operations"]) == {"UPDATE", "CREATE", "DELETE"}


def test_the_policy_spares_the_annotations_that_agents_write_and_nothing_else():
    keys = next(variable["expression"] for variable in SPEC["variables"] if variable["name"] == "keys")
    assert yaml.safe_load(keys) == sorted(ANNOTATIONS.values())
    others = next(rule for rule in RULES if "object.spec == oldObject.spec" in rule)
    for field in ("labels", "finalizers", "ownerReferences"):
        assert "object.metadata.%s == oldObject.metadata.%s" % (field, field) in others


def test_a_token_of_a_node_is_good_for_that_node():
    claim = "request.userInfo.extra['authentication.kubernetes.io/node-name']"
    rule = next(rule for rule in RULES if claim in rule)
    assert rule.startswith("!has(request.userInfo.extra) ||") and "name == request.name" in rule


# --- what the policy says of requests, by CEL as it is

BEFORE = {"metadata": {"name": "w1", "labels": {"a": "b"}, "annotations": {"other": "x"}, "finalizers": ["f"]},
          "spec": {"podCIDR": "10.1.0.0/24"}}
OWN = {"kubemesh.wireguard/public-key-0": "K" * 43 + "="}
ACCOUNT = "system:serviceaccount:kubemesh:node-agent"


def changed(**parts):
    """BEFORE with other parts of its metadata, or another spec; None takes one away."""
    spec = parts.pop("spec", BEFORE["spec"])
    metadata = {name: value for name, value in {**BEFORE["metadata"], **parts}.items() if value is not None}
    return {"metadata": metadata, "spec": spec}


def verdict(after, operation="UPDATE", user=ACCOUNT, extra=None, sub_resource="", name="w1", **given):
    """What the API server answers: "passed over" where the policy does not match, "allowed", or the message of the first rule that is not
    met."""
    celpy = pytest.importorskip("celpy", reason="cel-python is in the environment of the gate only")

    def evaluate(expression, **variables):
        environment = celpy.Environment()
        values = {"object": after, "oldObject": given.get("before", BEFORE), "request": request, "variables": variables}
        context = {key: celpy.json_to_cel(value) for key, value in values.items()}
        return environment.program(environment.compile(expression)).evaluate(context)

    request = {"operation": operation, "name": name, "userInfo": {"username": user}, "subResource": sub_resource}
    if extra is not None:
        request["userInfo"]["extra"] = extra
    if not all(evaluate(condition["expression"]) for condition in SPEC["matchConditions"]):
        return "passed over"
    variables = {}
    for variable in SPEC["variables"]:
        found = evaluate(variable["expression"], **variables)
        variables[variable["name"]] = json.loads(json.dumps(found, cls=celpy.CELJSONEncoder))
    for rule in SPEC["validations"]:
        if not evaluate(rule["expression"], **variables):
            return rule["message"]
    return "allowed"


NODE = "authentication.kubernetes.io/node-name"
ANNOTATION, REST = "changes only annotations", "leaves labels"


@pytest.mark.parametrize("answer,after,request_", [
    ("allowed", changed(annotations=dict(OWN, other="x")), {}),
    ("allowed", changed(annotations=dict(OWN, other="x")), {"extra": {NODE: ["w1"]}}),
    ("allowed", changed(annotations=dict(OWN, other="x")), {"extra": {"something": ["w2"]}}),
    # its first annotation, and the last that it takes away
    ("allowed", changed(annotations=OWN), {"before": changed(annotations=None)}),
    ("allowed", changed(annotations=None), {"before": changed(annotations=OWN)}),
    ("allowed", changed(labels=None, annotations=OWN), {"before": changed(labels=None, annotations=None)}),
    ("bound to another Node", changed(annotations=dict(OWN, other="x")), {"extra": {NODE: ["w2"]}}),
    (ANNOTATION, changed(annotations={"other": "y"}), {}),
    (ANNOTATION, changed(annotations={"other": "x", "kubemesh.wireguard/public-key-0": "K" * 100000}), {}),
    (ANNOTATION, changed(annotations={"other": "x", "kubemesh.wireguard/public-key-2": "K" * 44}), {}),
    (ANNOTATION, changed(annotations={}), {}),
    (ANNOTATION, changed(annotations=None), {}),
    (ANNOTATION, changed(annotations={"other": "x", "kubemesh.wireguard/excluded": "true"}), {}),
    (REST, changed(labels={"a": "c"}), {}),
    (REST, changed(labels=None), {}),
    (REST, changed(finalizers=[]), {}),
    (REST, changed(ownerReferences=[{"name": "x"}]), {}),
    (REST, changed(spec={"podCIDR": "10.1.0.0/24", "unschedulable": True}), {}),
    ("and nothing else", changed(annotations=dict(OWN, other="x")), {"sub_resource": "status"}),
    ("and nothing else", None, {"operation": "DELETE"}),
    ("and nothing else", changed(), {"operation": "CREATE", "before": None}),
    ("passed over", changed(labels={"a": "c"}), {"user": "system:node:w1"}),
])
def test_what_the_policy_says_of_a_request(answer, after, request_):
    found = verdict(after, **request_)
    assert answer in found, found
