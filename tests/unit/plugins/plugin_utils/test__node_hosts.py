# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _node_hosts

NODES_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "fixtures", "k8s", "nodes.json")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
fields = st.sampled_from(["name", "uid", "labels", "annotations", "podCIDRs", "podCIDR", "taints", "unschedulable", "addresses",
                          "conditions", "nodeInfo", "managedFields", "images", "type", "address", "status"])


@pytest.fixture
def nodes():
    with open(NODES_FILE, encoding="utf-8") as handle:
        return {item["metadata"]["name"]: item for item in json.load(handle)["items"]}


def test_facts(nodes):
    facts = _node_hosts.node_facts(nodes["cp-1"])
    assert facts["uid"] == "24398fdf-ef2e-462e-b583-185378cea63b"
    assert facts["pod_cidrs"] == ["10.244.0.0/24", "fd00:10:244::/64"]
    assert facts["addresses"] == {"InternalIP": ["198.18.0.11", "2001:db8::b"], "Hostname": ["cp-1"]}
    assert facts["taints"] == [{"key": "node.kubernetes.io/not-ready", "value": "", "effect": "NoSchedule"}]
    assert facts["conditions"]["Ready"] == {"status": "True", "reason": "KubeletReady", "message": "", "since": "2026-11-23T03:00:00Z"}
    assert (facts["ready"], facts["os"], facts["architecture"], facts["kubelet_version"]) == (True, "linux", "amd64", "v1.36.2")
    assert (facts["unschedulable"], facts["deleting"]) == (False, False)


def test_groups(nodes):
    def groups(name, **more):
        return set(_node_hosts.groups_of(dict(_node_hosts.node_facts(nodes[name]), **more), "c1"))

    assert groups("cp-1") == {"k8s_ready", "kube_control_plane", "c1"}
    assert groups("worker-1") == {"k8s_ready", "c1"}
    assert groups("worker-1", ready=False, unschedulable=True) == {"k8s_not_ready", "k8s_cordoned", "c1"}
    assert groups("win-1") == {"k8s_ready", "k8s_windows"}
    assert groups("worker-1", labels={"node-role.kubernetes.io/master": ""}) == {"k8s_ready", "kube_control_plane", "c1"}
    for name in nodes:
        assert groups(name) <= set(_node_hosts.all_groups("c1"))


def test_a_node_that_has_just_joined():
    labels = {"kubernetes.io/os": "windows", "kubernetes.io/arch": "amd64"}
    facts = _node_hosts.node_facts({"metadata": {"name": "w1", "labels": labels}})
    assert (facts["os"], facts["architecture"], facts["ready"]) == ("windows", "amd64", False)
    assert (facts["pod_cidrs"], facts["addresses"]) == ([], {})


def test_trimmed(nodes):
    item = dict(nodes["cp-1"], status=dict(nodes["cp-1"]["status"], images=[{"names": ["x"]}]))
    item["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "{}", "kept": "x"}
    before = json.dumps(item, sort_keys=True)
    trimmed = _node_hosts.trimmed(item)
    assert json.dumps(item, sort_keys=True) == before
    assert "managedFields" not in trimmed["metadata"]
    assert "images" not in trimmed["status"]
    assert trimmed["metadata"]["annotations"] == {"kept": "x"}
    assert _node_hosts.node_facts(trimmed) == dict(_node_hosts.node_facts(item), annotations={"kept": "x"})


@pytest.mark.parametrize("values,family,address,finding", [
    ("198.18.0.1", "any", "198.18.0.1", ""),
    (["2001:DB8::1", "198.18.0.1"], "any", "2001:db8::1", ""),
    (["2001:db8::1", "198.18.0.1"], "ipv4", "198.18.0.1", ""),
    (["198.18.0.1"], "ipv6", "", ""),
    (["Node-1.example.ORG"], "ipv6", "node-1.example.org", ""),
    (None, "any", "", ""),
    ([], "any", "", ""),
    ([None, "", "198.18.0.1"], "any", "198.18.0.1", ""),
    ("-oProxyCommand=touch", "any", "", "'-oProxyCommand=touch' is neither"),
    ("{{ 1 }}", "any", "", "'{{ 1 }}' is neither"),
    ("198.18.0.1:22", "any", "", "neither"),
    ("127.0.0.1 x", "any", "", "neither"),
    ([{"a": 1}, 7], "any", "", "{'a': 1} is neither"),
    (["bad value", "198.18.0.1"], "any", "198.18.0.1", ""),
])
def test_address(values, family, address, finding):
    found = _node_hosts.host_address(values, family)
    assert found[0] == address
    assert finding in found[1] if finding else found[1] == ""


def test_address_types(nodes):
    assert _node_hosts.address_values(nodes["cp-1"], ["ExternalIP", "InternalIP"]) == ["198.18.0.11", "2001:db8::b"]
    assert _node_hosts.address_values(nodes["cp-1"], ["Hostname", "InternalIP"])[0] == "cp-1"


@pytest.mark.parametrize("name", [None, 7, "", "UPPER", "a b", "-a", "{{ 1 }}", "a" * 254, "a/b", "a\n"])
def test_names(name):
    with pytest.raises(MeshError):
        _node_hosts.host_name({"metadata": {"name": name}})


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), json_values | st.dictionaries(
    fields, json_values | st.lists(st.dictionaries(fields, json_values, max_size=3), max_size=2))))
def test_any_object(item):
    """Whatever a Node object holds: no crash, facts that JSON can say, and addresses that ssh can be given."""
    trimmed = _node_hosts.trimmed(item)
    facts = _node_hosts.node_facts(trimmed)
    json.dumps(facts)
    assert set(_node_hosts.groups_of(facts, "c1")) <= set(_node_hosts.all_groups("c1"))
    address = _node_hosts.host_address(_node_hosts.address_values(trimmed, ["InternalIP", "Hostname"]), "any")[0]
    assert not address.startswith("-")
    assert set(address) <= set("abcdefghijklmnopqrstuvwxyz0123456789.:-")
