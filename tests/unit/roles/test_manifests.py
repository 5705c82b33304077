# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifests that the role ships: they belong to each other, and the policy confines who the account of the agents is."""

from __future__ import annotations

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
    prefix = "kubemesh.wireguard/public-key-"
    assert all(name.startswith(prefix) for name in ANNOTATIONS.values())
    keys = next(rule for rule in RULES if "variables.after.all" in rule)
    assert keys.count("startsWith('%s')" % prefix) == 2 and "variables.before[name] == variables.after[name]" in keys
    others = next(rule for rule in RULES if "object.spec == oldObject.spec" in rule)
    for field in ("labels", "finalizers", "ownerReferences"):
        assert "object.metadata.%s == oldObject.metadata.%s" % (field, field) in others


def test_a_token_of_a_node_is_good_for_that_node():
    claim = "request.userInfo.extra['authentication.kubernetes.io/node-name']"
    rule = next(rule for rule in RULES if claim in rule)
    assert rule.startswith("!has(request.userInfo.extra) ||") and "name == request.name" in rule
