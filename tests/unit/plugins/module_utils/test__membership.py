# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import copy
import hashlib
import ipaddress
import json
import os
import random

import pytest

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("jmespath")
pytest.importorskip("netaddr")
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _membership, _mesh
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "fixtures", "k8s")
JINJA = '{{ lookup("pipe", "id") }}'
KEY0, KEY1 = "kubemesh.wireguard/public-key-0", "kubemesh.wireguard/public-key-1"


def recorded(name):
    with open(os.path.join(FIXTURES, name), encoding="utf-8") as handle:
        return json.load(handle)


def key(number):
    return base64.b64encode(hashlib.sha256(b"%d" % number).digest()).decode()


def node(number, name=None, annotations=None, addresses=None, cidrs=None, uid=None, **metadata):
    """A Node object as the API returns it."""
    addresses = ["198.18.0.%d" % number, "2001:db8::%x" % number] if addresses is None else addresses
    cidrs = ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number] if cidrs is None else cidrs
    spec = {"podCIDR": cidrs[0], "podCIDRs": cidrs} if cidrs else {}
    return {"metadata": dict({"name": name or "worker-%d" % number, "uid": "uid-%d" % number if uid is None else uid,
                              "annotations": annotations}, **metadata),
            "spec": spec,
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]
                       + [{"type": "Hostname", "address": "worker-%d" % number}],
                       "nodeInfo": {"operatingSystem": "linux"}}}


def candidates(*items, **queries):
    found, problems = _membership.nodes_from_k8s(items, queries)
    assert problems == []
    return found


def cluster(*numbers):
    return candidates(*[node(number) for number in numbers])


def keys(*numbers):
    return {"worker-%d" % number: {"0": key(number)} for number in numbers}


def build(members, known=None, previous=None, **options):
    options.setdefault("complete", True)
    return _membership.build_document(members, known or {}, previous, options)


def built(members, known=None, previous=None, **options):
    document, warnings = build(members, known, previous, **options)
    assert warnings == []
    return document


def test_the_generation_that_traffic_goes_through_stays_until_it_is_changed():
    first = built(cluster(1, 2), keys(1, 2))
    assert first["generation"] == 0
    second = built(cluster(1, 2), keys(1, 2), first, generation=1)
    assert (second["generation"], second["serial"]) == (1, 2)
    assert built(cluster(1, 2), keys(1, 2), second) == second
    assert _mesh.compare_documents(first, second) == ["traffic goes through generation 1, was 0"]


def settings_of(**hosts):
    result, problems, warnings = _membership.settings_of_hosts({name.replace("_", "-"): own for name, own in hosts.items()})
    assert (problems, warnings) == ([], [])
    return result


def problems_of(*args, **options):
    with pytest.raises(MeshError) as caught:
        build(*args, **options)
    return caught.value.problems


class TestNodes:

    def test_recorded(self):
        items, complete, dummy = _membership.node_items(recorded("nodes.json"))
        assert complete
        found, problems = _membership.nodes_from_k8s(items)
        assert problems == []
        by_name = {candidate["name"]: candidate for candidate in found}
        assert sorted(by_name) == ["cp-1", "win-1", "worker-1", "worker-2", "worker-nocidr"]
        assert by_name["worker-1"] == {
            "name": "worker-1", "uid": by_name["worker-1"]["uid"], "excluded": "", "endpoints": None, "annotation_keys": {},
            "pod_cidrs": ["10.244.1.0/24", "fd00:10:244:1::/64"], "node_addresses": ["198.18.0.12", "2001:db8::c"]}  # no ExternalIP
        assert len(by_name["worker-1"]["uid"]) == 36
        assert by_name["worker-2"]["node_addresses"] == ["2001:db8::d", "198.18.0.13", "192.0.2.13"]  # cordoned: a node like any other
        assert by_name["worker-nocidr"]["pod_cidrs"] == []
        assert by_name["win-1"]["excluded"] == "runs Windows"

    def test_recorded_to_document(self):
        found, dummy = _membership.nodes_from_k8s(recorded("nodes.json")["items"])
        document = built(found, {name: {"0": key(number)} for number, name in enumerate(["cp-1", "worker-1", "worker-2", "worker-nocidr"])})
        states = {name: (entry["state"], entry["reason"]) for name, entry in document["nodes"].items()}
        assert states == {"cp-1": ("member", ""), "worker-1": ("member", ""), "worker-2": ("member", ""),
                          "worker-nocidr": ("member", "no pod CIDR yet"), "win-1": ("excluded", "runs Windows")}
        # several InternalIPs in either order: the first of each family is the primary one
        assert _mesh.primary_addresses(document, "worker-2") == {"ipv4": "198.18.0.13", "ipv6": "2001:db8::d"}
        assert document["nodes"]["worker-2"]["node_addresses"] == ["198.18.0.13", "2001:db8::d", "192.0.2.13"]
        assert document["nodes"]["worker-2"]["endpoints"] == {"ipv4": {"address": "198.18.0.13", "port": None},
                                                              "ipv6": {"address": "2001:db8::d", "port": None}}
        assert document["nodes"]["win-1"]["public_keys"] == {}
        assert "win-1" not in [peer["name"] for peer in _mesh.peers_of(document, "cp-1", 0).values()]
        assert "lookup" not in _mesh.document_bytes(document).decode()

    def test_one_page_is_not_all(self):
        items, complete, why = _membership.node_items(recorded("nodes-page1.json"))
        assert len(items) == 2
        assert not complete
        assert "page" in why

    def test_watch_events_in_their_order(self):
        # ADDED without pod CIDR, then MODIFIED with one: at every moment a valid document, and the uid tells a new node from an old one
        seen, document = {}, None
        with open(os.path.join(FIXTURES, "watch.jsonl"), encoding="utf-8") as handle:
            for line in handle:
                event = json.loads(line)
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    del seen[name]
                else:
                    seen[name] = event["object"]
                document, warnings = build(
                    candidates(*seen.values()), {name: {"0": key(len(name))} for name in seen if name == "cp-1"}, document)
                assert all("no node has a pod CIDR" in text for text in warnings), warnings
        assert document["nodes"]["cp-1"]["state"] == "member"
        assert "worker-notready" not in document["nodes"]
        assert document["serial"] > 5

    @pytest.mark.parametrize(("listing", "said"), [
        ("nodes-unauthorized-401.json", "401 'Unauthorized': 'Unauthorized'"),
        ("nodes-forbidden-403.json", "403 'Forbidden'.*cannot list resource"),
        ("version.json", "of kind None"),
        ("felixconfigurations.json", "FelixConfiguration"),
    ])
    def test_not_a_node_list(self, listing, said):
        with pytest.raises(MeshError, match=said):
            _membership.node_items(recorded(listing))

    @pytest.mark.parametrize("listing", [None, [], "text", {}, {"kind": "NodeList"}, {"kind": "NodeList", "items": {}}, {"kind": "PodList",
                                                                                                                         "items": []}])
    def test_not_a_list_at_all(self, listing):
        with pytest.raises(MeshError, match="kubectl get nodes -o json"):
            _membership.node_items(listing)

    def test_kubectl_list_and_single_node(self):
        assert _membership.node_items({"kind": "List", "metadata": {"resourceVersion": ""}, "items": [node(1)]})[1]
        items, complete, dummy = _membership.node_items(dict(node(1), kind="Node"))
        assert (len(items), complete) == (1, False)

    def test_being_deleted_cordoned_notready_stay(self):
        item = node(1, deletionTimestamp="2026-11-23T03:20:32Z")
        item["spec"]["unschedulable"] = True
        item["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
        document = built(candidates(item), keys(1))
        assert document["nodes"]["worker-1"]["state"] == "member"

    @pytest.mark.parametrize(("cidrs", "found"), [
        ({"podCIDR": "10.244.1.0/24"}, ["10.244.1.0/24"]),  # before dual stack
        ({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]}, ["10.244.1.0/24", "fd00::/64"]),
        ({"podCIDRs": []}, []),
        ({}, []),
        ({"podCIDR": None, "podCIDRs": None}, []),
    ])
    def test_pod_cidrs(self, cidrs, found):
        assert candidates(dict(node(1), spec=cidrs))[0]["pod_cidrs"] == found

    @pytest.mark.parametrize("broken", [
        {"metadata": {"name": "worker-1"}},
        {"metadata": {"name": "worker-1"}, "spec": None, "status": None},
        {"metadata": {"name": "worker-1", "annotations": [], "labels": "x"}, "spec": [], "status": {"addresses": None, "nodeInfo": 5}},
        {"metadata": {"name": "worker-1", "uid": 5}, "status": {"addresses": ["x", {"type": "InternalIP"}]}},
    ])
    def test_sparse_objects(self, broken):
        found = candidates(broken)[0]
        assert (found["pod_cidrs"], found["node_addresses"], found["uid"]) == ([], [], "")
        document, warnings = build([found], keys(1))
        assert len(warnings) == 1 and "no node has a pod CIDR" in warnings[0]
        assert (document["nodes"]["worker-1"]["state"], document["nodes"]["worker-1"]["reason"]) == ("pending",
                                                                                                     "no pod CIDR and no node address yet")

    def test_pod_cidrs_that_all_nodes_lose(self):
        """A query that matches nothing any more must not take all traffic of pods out of the tunnel."""
        first = built(cluster(1, 2), keys(1, 2))
        without = [dict(candidate, pod_cidrs=[]) for candidate in cluster(1, 2)]
        here = settings_of(worker_1={}, worker_2={})
        with pytest.raises(MeshError, match=r"no node has a pod CIDR any more, and worker-1, worker-2 had one .*; .*disable first"):
            build(without, keys(1, 2), first, settings=here)
        document, warnings = build([without[0], cluster(2)[0]], keys(1, 2), first, settings=here)
        assert warnings == [] and document["nodes"]["worker-1"]["pod_cidrs"] == [], "one that loses them is a change as any other"
        document, warnings = build(without, keys(1, 2))
        assert len(warnings) == 1 and "no node has a pod CIDR: traffic of pods goes in clear" in warnings[0]

    def test_problems_name_node_field_value_and_remedy(self):
        bad = node(2, cidrs=["10.244.2.1/24"], addresses=["node.example.com", JINJA, "fe80::1"])
        dummy, problems = _membership.nodes_from_k8s([node(1), bad, {"metadata": {"name": "Worker"}}, "text", dict(node(3), kind="Pod"),
                                                      node(1)])
        text = "\n".join(problems)
        assert "node worker-2, pod CIDR (from pod_cidrs_query): '10.244.2.1/24' is not a CIDR: it has host bits set;" in text
        assert "write 10.244.2.0/24" in text
        assert "set mesh_pod_cidrs for its host" in text
        assert "node worker-2, node address (from node_addresses_query): 'node.example.com' is not an IP address" in text
        assert "pipe" in text
        assert "'fe80::1' cannot be the address of a node" in text
        assert "'Worker' is not the name of a Node" in text
        assert "item 3: expected a Node object, got 'text'" in text
        assert "worker-3 is of kind 'Pod'" in text
        assert "node worker-1: is twice in the node list" in text
        assert len(problems) == 8

    def test_excluded_node_cannot_be_wrong(self):
        item = node(1, cidrs=["nonsense"], annotations={"kubemesh.wireguard/excluded": "true"})
        found = candidates(item)[0]
        assert (found["excluded"], found["pod_cidrs"]) == ("opted out (excluded_query)", [])

    @pytest.mark.parametrize(("value", "excluded"), [("true", True), ("yes", True), ("false", False), ("", False)])
    def test_opting_out(self, value, excluded):
        assert bool(candidates(node(1, annotations={"kubemesh.wireguard/excluded": value}))[0]["excluded"]) is excluded

    def test_windows_by_label(self):
        item = node(1, labels={"kubernetes.io/os": "windows"})
        del item["status"]["nodeInfo"]
        assert candidates(item)[0]["excluded"] == "runs Windows"

    def test_queries(self):
        item = node(1, annotations={"example.com/cidrs": "10.9.0.0/24", "example.com/wg": "203.0.113.7:5000"}, labels={"role": "edge"})
        item["status"]["addresses"].append({"type": "ExternalIP", "address": "203.0.113.9"})
        found = candidates(item, pod_cidrs='metadata.annotations."example.com/cidrs"',
                           node_addresses="status.addresses[?type=='ExternalIP'].address",
                           endpoint="metadata.annotations.\"example.com/wg\" || 'none'")[0]
        assert found["pod_cidrs"] == ["10.9.0.0/24"]
        assert found["node_addresses"] == ["203.0.113.9"]
        assert found["endpoints"] == [{"address": "203.0.113.7", "port": 5000}]
        assert candidates(item, excluded="metadata.labels.role == 'edge'")[0]["excluded"]
        assert not candidates(item, excluded="metadata.labels.role == 'core'")[0]["excluded"]
        assert not candidates(item, excluded="")[0]["excluded"]

    def test_endpoint_query_without_answer_means_not_reachable(self):
        document = built(candidates(node(1), endpoint="status.addresses[?type=='ExternalIP'].address"), keys(1))
        assert document["nodes"]["worker-1"]["endpoints"] == {}

    @pytest.mark.parametrize("text", ["status.[", "unknown_function(@)", "a ||"])
    def test_wrong_query(self, text):
        with pytest.raises(MeshError) as caught:
            _membership.compile_queries({"pod_cidrs": text})
        assert "pod_cidrs_query" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("field", ["pod_cidrs", "node_addresses", "endpoint", "excluded"])
    def test_query_that_fails_on_a_node(self, field):
        dummy, problems = _membership.nodes_from_k8s([node(1)], {field: "length(metadata.generation)"})
        assert any(problem.startswith("node worker-1, %s_query:" % field) for problem in problems)

    @pytest.mark.parametrize("answer", ["metadata", "`5`", "[metadata]", "`[[\"10.0.0.0/24\"]]`", "`true`"])
    def test_query_of_the_wrong_kind(self, answer):
        dummy, problems = _membership.nodes_from_k8s([node(1)], {"pod_cidrs": answer})
        assert any("is not a CIDR" in problem for problem in problems)

    def test_given(self):
        items = [node(1), {"name": "alpha", "node_addresses": "198.18.0.50", "pod_cidrs": ["10.9.0.0/24"], "public_keys": {0: key(5)},
                           "endpoint": "203.0.113.7:5000"}, {"name": "beta", "excluded": True}]
        found, problems = _membership.nodes_given(items)
        assert problems == []
        document = built(found, keys(1))
        assert document["nodes"]["alpha"]["public_keys"] == {"0": key(5)}
        assert document["nodes"]["alpha"]["endpoints"] == {"ipv4": {"address": "203.0.113.7", "port": 5000}}
        assert document["nodes"]["beta"]["state"] == "excluded"

    @pytest.mark.parametrize(("item", "said"), [
        ({"name": "Alpha"}, "'Alpha' is not the name of a Node"),
        ({}, "not the name of a Node"),
        ({"name": "alpha", "adresses": []}, "unknown fields adresses"),
        ({"name": "alpha", "pod_cidrs": ["10.0.0.1/24"]}, "node alpha, pod_cidrs"),
        ({"name": "alpha", "public_keys": {"0": "x"}}, "node alpha, public_keys"),
        ({"name": "alpha", "public_keys": {"7": key(1)}}, "generation"),
        ({"name": "alpha", "endpoint": "host.example.com"}, "DNS names are not accepted"),
        ("alpha", "expected Node objects or descriptions"),
    ])
    def test_given_wrong(self, item, said):
        dummy, problems = _membership.nodes_given([item])
        assert any(said in problem for problem in problems)


class TestHosts:

    def test_settings(self):
        found = settings_of(worker_1={
            "mesh_endpoint": "203.0.113.7:5000", "mesh_keepalive": "25", "mesh_mtu": 1380, "mesh_pod_cidrs": ["10.9.0.0/24"],
            "mesh_node_addresses": "198.18.0.1", "mesh_node_facts": {"public_keys": {"0": key(1), "1": None}, "mtu": 1420,
                                                                     "document": {"serial": 7, "sha256": "ab"}}})
        assert found == {"worker-1": {
            "host": "worker-1", "explicit_name": False, "unresolved": (), "endpoints": [{"address": "203.0.113.7", "port": 5000}],
            "keepalive": 25, "mtu": 1380, "pod_cidrs": ["10.9.0.0/24"], "node_addresses": ["198.18.0.1"], "public_keys": {"0": key(1)},
            "document": {"serial": 7, "sha256": "ab"}, "generations": None, "live_keys": frozenset()}}

    def test_nothing_set(self):
        own = settings_of(worker_1={"mesh_mtu": "auto", "mesh_endpoint": None, "mesh_node_facts": {}})["worker-1"]
        assert [own[field] for field in ("endpoints", "keepalive", "mtu", "pod_cidrs", "node_addresses", "document")] == [None] * 6
        assert own["public_keys"] == {}

    def test_what_is_empty_is_not_reported(self):
        """ansible-core 2.18 makes "" of a template whose value is null."""
        own = settings_of(worker_1={"mesh_node_facts": {"mtu": "", "public_keys": {"0": ""}}})["worker-1"]
        assert (own["mtu"], own["public_keys"]) == (None, {})

    def test_measured_mtu_and_int_generations(self):
        own = settings_of(worker_1={"mesh_node_facts": {"mtu": "1420", "public_keys": {0: key(1)}}})["worker-1"]
        assert (own["mtu"], own["public_keys"]) == (1420, {"0": key(1)})

    @pytest.mark.parametrize("value", ["none", "", [], ["none"]])
    def test_no_endpoint(self, value):
        assert settings_of(worker_1={"mesh_endpoint": value})["worker-1"]["endpoints"] == []

    def test_endpoint_per_family(self):
        own = settings_of(worker_1={"mesh_endpoint": ["[2001:db8::7]:5000", "203.0.113.7"]})["worker-1"]
        assert [endpoint["address"] for endpoint in own["endpoints"]] == ["203.0.113.7", "2001:db8::7"]

    def test_node_name(self):
        found = settings_of(bastion_1={}, host_7={"mesh_node_name": "worker-7.example.com"})
        assert found["worker-7.example.com"]["host"] == "host-7"
        assert found["worker-7.example.com"]["explicit_name"]
        # a host with a name that no Node can have is no node, and no problem either
        assert _membership.settings_of_hosts({"My_Bastion": {}}) == ({}, [], [])

    @pytest.mark.parametrize(("own", "said"), [
        ({"mesh_node_name": "Worker"}, "host w, mesh_node_name: 'Worker' is not the name of a Node"),
        ({"mesh_endpoint": "host.example.com"}, "host w, mesh_endpoint: 'host.example.com' is not an endpoint: DNS names"),
        ({"mesh_endpoint": 5}, "host w, mesh_endpoint"),
        ({"mesh_endpoint": {"a": "b"}}, "host w, mesh_endpoint"),
        ({"mesh_keepalive": "often"}, "host w, mesh_keepalive: 'often' is not a number from 0 to 65535"),
        ({"mesh_keepalive": 65536}, "host w, mesh_keepalive"),
        ({"mesh_keepalive": True}, "host w, mesh_keepalive"),
        ({"mesh_mtu": 100}, "host w, mesh_mtu"),
        ({"mesh_mtu": "\u0661\u0664\u0662\u0660"}, "host w, mesh_mtu"),
        ({"mesh_pod_cidrs": ["10.0.0.1/8"]}, "host w, mesh_pod_cidrs"),
        ({"mesh_node_addresses": [JINJA]}, "host w, mesh_node_addresses"),
        ({"mesh_node_facts": "text"}, "host w, mesh_node_facts: expected an object"),
        ({"mesh_node_facts": {"public_keys": {"0": JINJA}}}, "host w, mesh_node_facts.public_keys.0"),
        ({"mesh_node_facts": {"public_keys": {"2": key(1)}}}, "generation '2'"),
        ({"mesh_node_facts": {"mtu": "big"}}, "host w, mesh_node_facts.mtu"),
        ({"mesh_node_facts": {"document": {"sha256": "x"}}}, "host w, mesh_node_facts.document"),
        ({"mesh_node_facts": {"document": "x"}}, "host w, mesh_node_facts.document"),
    ])
    def test_problems(self, own, said):
        dummy, problems, dummy = _membership.settings_of_hosts({"w": own})
        assert len(problems) == 1
        assert said in problems[0]

    def test_two_hosts_one_node(self):
        dummy, problems, dummy = _membership.settings_of_hosts({"a": {"mesh_node_name": "worker-1"}, "worker-1": {}})
        assert problems == ["hosts a and worker-1: both are node worker-1; set mesh_node_name so that each has its own"]

    def test_unresolved(self):
        found, problems, warnings = _membership.settings_of_hosts({
            "a": {"unresolved": ["mesh_node_name"]}, "b": {"unresolved": ["mesh_endpoint"], "mesh_keepalive": 5}})
        assert (sorted(found), problems) == (["b"], [])
        assert [warning.split(" cannot")[0] for warning in warnings] == ["mesh_endpoint of b", "mesh_node_name of a"]

    def test_from_inventory(self):
        found = settings_of(a={"mesh_pod_cidrs": ["10.1.0.0/24"]}, b={"mesh_node_addresses": ["198.18.0.2"]}, bastion={})
        assert [(member["name"], member["pod_cidrs"], member["node_addresses"]) for member in _membership.nodes_from_inventory(found)] == [
            ("a", ["10.1.0.0/24"], []), ("b", [], ["198.18.0.2"])]

    def test_suggestions(self):
        found = _membership.name_suggestions(
            ["worker-1", "worker-2.example.com", "worker-3"],
            {"worker_1": None, "worker-2": None, "box": "198.18.0.3", "worker-1.example.com": None, "other": "192.0.2.9"},
            {"198.18.0.3": "worker-3"})
        assert found == {"worker_1": "worker-1", "worker-2": "worker-2.example.com", "box": "worker-3", "worker-1.example.com": "worker-1"}


class TestKeys:

    def test_sources_in_their_order(self):
        previous = built(cluster(1), {"worker-1": {"0": key(1)}})
        annotated = candidates(node(1, annotations={KEY0: key(2)}))

        def chosen(members, known):
            return build(members, known, previous, expect_new_keys=True)[0]["nodes"]["worker-1"]["public_keys"]
        assert chosen(annotated, {"worker-1": {"0": key(3)}}) == {"0": key(3)}
        assert chosen(annotated, {}) == {"0": key(2)}
        assert chosen(cluster(1), {}) == {"0": key(1)}
        assert build(cluster(1))[0]["nodes"]["worker-1"]["public_keys"] == {}

    def test_each_generation_by_itself(self):
        previous = built(cluster(1), {"worker-1": {"0": key(1)}})
        document = built(candidates(node(1, annotations={KEY1: key(2)})), {}, previous)
        assert document["nodes"]["worker-1"]["public_keys"] == {"0": key(1), "1": key(2)}
        assert document["nodes"]["worker-1"]["probe_addresses"]["1"] == _mesh.probe_address(key(2))

    @pytest.mark.parametrize(("annotations", "generation"), [
        ({}, 0), ({KEY0: key(2)}, 0), ({KEY1: key(2)}, 1), ({KEY0: key(2), KEY1: key(3)}, 0)])
    def test_generation_of_a_host_that_joins_alone(self, annotations, generation):
        """It has no document; what others published says which generation is in use."""
        members = candidates(node(1), node(2, annotations=annotations), node(3))
        assert built(members)["generation"] == generation
        assert built(members, generation=1)["generation"] == 1
        assert built(members, {}, built(cluster(1)))["generation"] == 0

    @pytest.mark.parametrize(("annotations", "known", "said"), [
        ({}, {"worker-1": {"0": key(2)}}, "reported by the node itself"),
        ({KEY0: key(2)}, {}, "from its annotation kubemesh.wireguard/public-key-0"),
    ])
    def test_change_unasked_is_reported(self, annotations, known, said):
        previous = built(cluster(1), keys(1))
        members = candidates(node(1, annotations=annotations))
        document, warnings = build(members, known, previous)
        assert document["nodes"]["worker-1"]["public_keys"] == {"0": key(2)}
        assert len(warnings) == 1
        assert "node worker-1: its public key of generation 0 is now %s (%s), the last mesh document had %s" % (key(2), said,
                                                                                                                key(1)) in warnings[0]
        assert build(members, known, previous, expect_new_keys=True)[1] == []

    @pytest.mark.parametrize(("text", "told"), [(key(1), False), (key(2), False), (key(3), True), (JINJA, True), ("", True)])
    def test_annotation_changed_by_others_is_reported(self, text, told):
        """Of a node that says what its key is: the annotation may be its key, or still that of the last document, and nothing else."""
        previous, members = built(cluster(1), {"worker-1": {"0": key(2)}}), candidates(node(1, annotations={KEY0: text}))
        document, warnings = build(members, keys(1), previous)
        assert document["nodes"]["worker-1"]["public_keys"] == {"0": key(1)}
        found = [warning for warning in warnings if warning.startswith("node worker-1, annotation %s: %s, but" % (KEY0, _mesh.shown(text)))]
        assert len(found) == int(told)
        assert build(members, keys(1), previous, expect_new_keys=True)[1] == []

    def test_annotation_holding_jinja_is_text(self):
        document, warnings = build(candidates(node(1, annotations={KEY0: JINJA}), node(2)), keys(2))
        assert document["nodes"]["worker-1"]["state"] == "pending"
        assert len(warnings) == 1
        assert warnings[0].startswith("node worker-1, annotation kubemesh.wireguard/public-key-0: '{{ lookup(")
        assert "is not a WireGuard public key" in warnings[0]
        assert "lookup" not in _mesh.document_bytes(document).decode()

    @pytest.mark.parametrize("generations", [None, [], ["1"]])
    def test_bad_annotation_is_told_whatever_is_on_the_node(self, generations):
        """Of a node without keys as well, whose annotations of keys do not count."""
        members, settings = candidates(node(1, annotations={KEY0: JINJA})), settings_of(worker_1={"generations": generations})
        document, warnings = build(members, {}, settings=settings)
        assert document["nodes"]["worker-1"]["public_keys"] == {}
        assert len(warnings) == 1 and "is not a WireGuard public key" in warnings[0] and "lookup" in warnings[0]

    def test_bad_annotation_does_not_cost_a_known_key(self):
        previous = built(cluster(1), keys(1))
        document, warnings = build(candidates(node(1, annotations={KEY0: "x"})), {}, previous)
        assert document == previous
        assert len(warnings) == 1

    @pytest.mark.parametrize(("annotations", "known"), [
        ({}, {"worker-1": {"0": key(1)}, "worker-2": {"0": key(1)}}),
        ({KEY0: key(1)}, {"worker-2": {"0": key(1)}}),
        ({KEY1: key(1)}, {"worker-2": {"0": key(1)}}),
    ])
    def test_same_key_twice_refuses_both(self, annotations, known):
        problems = problems_of(candidates(node(1, annotations=annotations), node(2), node(3)), dict(known, **keys(3)))
        assert len(problems) == 1
        assert "worker-1" in problems[0]
        assert "worker-2" in problems[0]
        assert "worker-3" not in problems[0]

    def test_withdrawing_a_generation(self):
        both = {"worker-1": {"0": key(1), "1": key(11)}}
        previous = built(cluster(1, 2), dict(both, **keys(2)))
        document = built(cluster(1), both, previous, generations=[1], complete=True)
        assert document["nodes"]["worker-1"]["public_keys"] == {"1": key(11)}
        # in an incomplete list too, and a node that then has none is pending
        document, dummy = build(cluster(1), both, previous, generations=["1"], complete=False)
        assert document["nodes"]["worker-2"]["public_keys"] == {}
        assert document["nodes"]["worker-2"]["probe_addresses"] == {}
        assert document["nodes"]["worker-2"]["state"] == "pending"

    def test_member_without_any_key_is_pending(self):
        document = built(cluster(1, 2), keys(1))
        entry = document["nodes"]["worker-2"]
        assert (entry["state"], entry["reason"], entry["pod_cidrs"][0]) == ("pending", "no public key known yet", "10.244.2.0/24")

    @pytest.mark.parametrize(("generations", "chosen"), [
        (None, {"0": key(1), "1": key(2)}),       # the node said nothing in this run
        (["1"], {"1": key(2)}),                   # it has nothing of generation 0
        (["0", "1"], {"0": key(1), "1": key(2)}),  # a rotation that nobody here knew of
        ([], {"1": key(2)}),                      # installed anew: what the last document has stays
    ])
    def test_an_annotation_that_is_left_over_does_not_count(self, generations, chosen):
        previous = built(cluster(1), {"worker-1": {"1": key(2)}})
        members = candidates(node(1, annotations={KEY0: key(1), KEY1: key(2)}))
        settings = settings_of(worker_1={"generations": generations})
        assert built(members, {}, previous, settings=settings)["nodes"]["worker-1"]["public_keys"] == chosen
        assert built(members, {"worker-1": {"1": key(2)}}, previous, settings=settings)["nodes"]["worker-1"]["public_keys"] == chosen
        both = built(cluster(1), {"worker-1": {"0": key(1), "1": key(2)}})
        assert built(members, {}, both, settings=settings) == both, "a rotation that is not over"


def live(**numbers):
    """Settings of hosts whose mesh devices have these keys now."""
    return settings_of(**{host: {"live_keys": [key(number)]} for host, number in numbers.items()})


class TestIdentities:
    """A machine that has the key of another node is that node, whatever the inventory calls it."""

    @pytest.mark.parametrize(("settings", "known", "others"), [
        (live(worker_2=3, worker_3=2), {}, ["worker-3", "worker-2"]),
        (live(worker_2=3), {}, ["worker-3"]),                      # the other one is not part of this run, or not reached
        (live(worker_2=3, worker_3=9), {}, ["worker-3"]),          # nor is it any better with a key of which nobody knows
        (settings_of(worker_2={"mesh_node_facts": {"public_keys": {"0": key(3)}}}), keys(2), ["worker-3"]),  # the device is gone
        (settings_of(host_b={"mesh_node_name": "worker-2", "live_keys": ["junk", key(3)]}), {}, ["worker-3"]),
    ])
    def test_mixed_up_hosts_are_refused(self, settings, known, others):
        previous = built(cluster(1, 2, 3), keys(1, 2, 3))
        for complete in (True, False):
            problems = problems_of(cluster(1, 2, 3), known, previous, settings=settings, complete=complete)
            assert len(problems) == len(others)
            for name, problem, other in zip(sorted(settings), problems, others):
                assert problem.startswith("hosts %s and %s are mixed up: host %s, which is to be node %s, has public key %s" % (
                    settings[name]["host"], other, settings[name]["host"], name, key(int(other[-1]))))
                assert "correct ansible_host or mesh_node_name" in problem

    def test_a_new_host_that_is_the_machine_of_a_member(self):
        previous = built(cluster(1, 2), keys(1, 2))
        problem, = problems_of(cluster(1, 2, 3), {}, previous, settings=live(worker_2=2, worker_3=2))
        assert problem.startswith("hosts worker-3 and worker-2: both have public key " + key(2)) and "ansible_host" in problem

    def test_one_that_is_excluded_would_be_taken_out_on_the_wrong_machine(self):
        previous = built(cluster(1, 2, 3), keys(1, 2, 3))
        problem, = problems_of(cluster(1, 2, 3), {}, previous, settings=live(worker_2=3), exclude_nodes=["worker-2"])
        assert "hosts worker-2 and worker-3 are mixed up" in problem

    @pytest.mark.parametrize(("members", "options"), [
        ((1, 2), {}),                                                          # the old Node object is gone
        ((1, 2), {"complete": False, "forget_nodes": ["worker-3"]}),
        ((1, 2, 3), {"exclude_nodes": ["worker-3"]}),
    ])
    def test_a_machine_under_another_name(self, members, options):
        previous = built(cluster(1, 3), keys(1, 3))
        document, dummy = build(cluster(*members), {"worker-2": {"0": key(3)}}, previous, settings=live(worker_1=1, worker_2=3), **options)
        assert document["nodes"]["worker-2"]["public_keys"] == {"0": key(3)}

    def test_a_new_key_of_the_same_node(self):
        """Installed anew or rotated: nobody else has that key."""
        previous = built(cluster(1, 2), keys(1, 2))
        document, dummy = build(cluster(1, 2), {"worker-2": {"0": key(9)}}, previous, settings=live(worker_1=1, worker_2=9))
        assert document["nodes"]["worker-2"]["public_keys"] == {"0": key(9)}
        assert build(cluster(1, 2), {}, None, settings=live(worker_1=2, worker_2=1)), "no document says whose they are"

    def test_what_two_nodes_swap_but_their_keys(self):
        """Prefixes and addresses may move between nodes: the keys stay where they are."""
        previous = built(cluster(1, 2), keys(1, 2))
        swapped = candidates(node(1, addresses=["198.18.0.2"], cidrs=["10.244.2.0/24"]),
                             node(2, addresses=["198.18.0.1"], cidrs=["10.244.1.0/24"]))
        own = live(worker_1=1, worker_2=2)
        document = built(swapped, keys(1, 2), previous, settings=own)
        assert _membership.nodes_to_examine(document, previous, own, "node_cidrs") == ["worker-1", "worker-2"]


class TestToExamine:

    @pytest.mark.parametrize(("changed", "own", "pod_source", "expected"), [
        ({}, live(worker_1=1, worker_2=2), "node_cidrs", []),
        ({}, {}, "node_cidrs", []),                                            # hosts that are not part of this run
        ({}, live(worker_1=1, worker_2=9), "node_cidrs", ["worker-2"]),
        ({"cidrs": ["10.244.33.0/24"], "uid": "again"}, {}, "node_cidrs", ["worker-2"]),
        ({"uid": "again"}, {}, "node_cidrs", []),
        ({"cidrs": ["10.244.33.0/24"]}, {}, "pods", []),
        ({"addresses": ["198.18.0.99"]}, {}, "pods", ["worker-2"]),
        ({"addresses": ["198.18.0.2", "2001:db8::2", "198.18.0.99"]}, {}, "node_cidrs", ["worker-2"]),
        ({"annotations": {"kubemesh.wireguard/excluded": "true"}, "addresses": ["198.18.0.99"]}, {}, "node_cidrs", []),
    ])
    def test_what_is_new_about_a_node(self, changed, own, pod_source, expected):
        previous = built(cluster(1, 2), keys(1, 2))
        # One that is new has no mesh yet and is examined anyway.
        document, dummy = build(candidates(node(1), node(2, **changed), node(3)), keys(1, 2), previous, settings=own, pod_source=pod_source)
        assert _membership.nodes_to_examine(document, previous, own, pod_source) == expected
        assert _membership.nodes_to_examine(document, None, own, pod_source) == []


class TestMembership:

    def test_complete_list_removes(self):
        previous = built(cluster(1, 2, 3), keys(1, 2, 3))
        document = built(cluster(1, 3), keys(1, 3), previous)
        assert sorted(document["nodes"]) == ["worker-1", "worker-3"]

    def test_incomplete_list_removes_nothing(self):
        previous = built(cluster(1, 2, 3), keys(1, 2, 3))
        document, warnings = build(cluster(1), {}, previous, complete=False, why_incomplete="it is one page")
        assert document["nodes"] == previous["nodes"]
        assert len(warnings) == 1
        assert warnings[0].startswith("the node list is not known to be complete (it is one page): worker-2, worker-3 stayed from the last")

    def test_forget(self):
        previous = built(cluster(1, 2, 3), keys(1, 2, 3))
        document, warnings = build(cluster(1), {}, previous, complete=False, forget_nodes=["worker-2"])
        assert sorted(document["nodes"]) == ["worker-1", "worker-3"]
        assert len(warnings) == 1

    def test_a_name_that_nobody_has_is_told(self):
        previous = built(cluster(1, 2), keys(1, 2))
        dummy, warnings = build(cluster(1, 2), {}, previous, forget_nodes=["worker-22", "worker-2"])
        assert any("forget_nodes: worker-22 is in neither" in warning for warning in warnings)

    def test_forget_what_is_there(self):
        document, warnings = build(cluster(1), keys(1), forget_nodes=["worker-1"])
        assert "worker-1" in document["nodes"]
        assert "worker-1 is still in the node list" in warnings[0]

    def test_exclude(self):
        previous = built(cluster(1, 2), keys(1, 2))
        for complete, members in ((True, cluster(1, 2)), (False, cluster(1))):
            document, dummy = build(members, keys(1), previous, complete=complete, exclude_nodes=["worker-2"])
            entry = document["nodes"]["worker-2"]
            assert (entry["state"], entry["reason"], entry["public_keys"], entry["endpoints"]) == ("excluded", "named in exclude_nodes",
                                                                                                   {}, {})
        assert "exclude_nodes: worker-9 is not a node" in build(cluster(1), exclude_nodes=["worker-9"])[1][0]

    def test_empty_complete_list(self):
        previous = built(cluster(1), keys(1))
        assert "the node list is empty" in problems_of([], {}, previous)[0]
        assert "the node list is empty" in problems_of([], {})[0]
        assert _membership.node_items(recorded("nodes-empty.json")) == ([], True, "")

    def test_another_cluster(self):
        previous = built(cluster(1, 2), keys(1, 2))
        problems = problems_of(cluster(7, 8), keys(7, 8), previous)
        assert "looks like another cluster" in problems[0]
        assert "worker-1, worker-2" in problems[0]
        document = built(cluster(7, 8), keys(7, 8), previous, forget_nodes=["worker-1", "worker-2"])
        assert sorted(document["nodes"]) == ["worker-7", "worker-8"]

    def test_all_nodes_new_under_old_names(self):
        previous = built(cluster(1, 2), keys(1, 2))
        document, warnings = build(candidates(node(1, uid="x"), node(2, uid="y")), {}, previous)
        assert "all nodes were deleted and added again" in warnings[0]
        # the key is kept: it is most likely the same machine, and if not, a wrong key lets nobody in
        assert document["nodes"]["worker-1"]["public_keys"] == {"0": key(1)}

    def test_one_node_deleted_and_added_again(self):
        previous = built(cluster(1, 2), keys(1, 2))
        document = built(candidates(node(1), node(2, uid="new", cidrs=["10.244.9.0/24"], addresses=["198.18.0.9"])), keys(1, 2), previous)
        assert document["nodes"]["worker-2"]["pod_cidrs"] == ["10.244.9.0/24"]
        assert document["nodes"]["worker-2"]["uid"] == "new"

    def test_cidr_moves_between_nodes(self):
        previous = built(cluster(1, 2), keys(1, 2))
        swapped = candidates(node(1, uid="a", cidrs=["10.244.2.0/24"]), node(2, uid="b", cidrs=["10.244.1.0/24"]))
        document, dummy = build(swapped, keys(1, 2), previous)
        assert document["nodes"]["worker-1"]["pod_cidrs"] == ["10.244.2.0/24"]
        assert document["nodes"]["worker-2"]["pod_cidrs"] == ["10.244.1.0/24"]

    def test_what_stays_is_the_same_object(self):
        first = built(cluster(1, 2), keys(1, 2))
        second = built(cluster(1, 2, 3), keys(1, 2, 3), first)
        assert all(second["nodes"][name] is entry for name, entry in first["nodes"].items()) and len(second["nodes"]) == 3

    def test_serial(self):
        first = built(cluster(1), keys(1))
        assert first["serial"] == 1
        assert built(cluster(1), keys(1), first) == first
        second = built(cluster(1, 2), keys(1, 2), first)
        assert second["serial"] == 2
        assert build(cluster(1, 2), keys(1, 2), second, complete=False)[0]["serial"] == 3  # complete is part of it
        assert built(cluster(1, 2), keys(1, 2), second, port=500)["serial"] == 3

    def test_order_of_extra_addresses_makes_no_new_serial(self):
        first = built(candidates(node(1, addresses=["198.18.0.1", "192.0.2.1", "203.0.113.1"])), keys(1))
        assert built(candidates(node(1, addresses=["198.18.0.1", "203.0.113.1", "192.0.2.1"])), keys(1), first) == first
        assert built(candidates(node(1, addresses=["192.0.2.1", "198.18.0.1", "203.0.113.1"])), keys(1), first)["serial"] == 2

    def test_previous_is_not_touched(self):
        previous = built(cluster(1, 2), keys(1, 2))
        before = copy.deepcopy(previous)
        build(cluster(1), {"worker-1": {"0": key(7)}}, previous, complete=False, generations=[1], exclude_nodes=["worker-2"])
        assert previous == before

    def test_newest_document(self):
        one, two = built(cluster(1), keys(1)), built(cluster(1, 2), keys(1, 2), built(cluster(1), keys(1)))
        assert _membership.newest_document([]) == (None, [])
        assert _membership.newest_document([("a", one), ("b", two)]) == (two, [])
        assert _membership.newest_document([("a", two), ("b", copy.deepcopy(two))]) == (two, [])
        other = dict(two, complete=False)
        for order in ([("a", two), ("b", other)], [("b", other), ("a", two)]):
            document, warnings = _membership.newest_document(order)
            assert document == two
            assert "serial 2 differ" in warnings[0]

    @pytest.mark.parametrize("previous_serial", [None, 6])
    def test_newer_document_on_a_host(self, previous_serial):
        previous = None if previous_serial is None else dict(built(cluster(1, 2), keys(1, 2)), serial=previous_serial)
        found = settings_of(worker_1={"mesh_node_facts": {"document": {"serial": 7, "sha256": "ab"}}})
        problems = problems_of(cluster(1), keys(1), previous, settings=found)
        assert "host worker-1: keeps mesh document serial 7, newer than the last one given" in problems[0]
        assert "fetch it" in problems[0]

    def test_older_document_on_a_host(self):
        previous = dict(built(cluster(1), keys(1)), serial=9)
        found = settings_of(worker_1={"mesh_node_facts": {"document": {"serial": 7, "sha256": "ab"}}})
        assert built(cluster(1), keys(1), previous, settings=found) == previous

    def test_forked_documents_are_superseded(self):
        previous = built(cluster(1, 2), keys(1, 2))
        found = settings_of(worker_1={"mesh_node_facts": {"document": {"serial": 1, "sha256": "ab"}}},
                            worker_2={"mesh_node_facts": {"document": {"serial": 1, "sha256": "cd"}}})
        assert _membership.newest_on_hosts(found) == {"serial": 1, "hosts": {"ab": ["worker-1"], "cd": ["worker-2"]}}
        assert built(cluster(1, 2), keys(1, 2), previous, settings=found) == dict(previous, serial=2)

    def test_settings_of_a_host(self):
        found = settings_of(worker_1={"mesh_endpoint": "203.0.113.7:5000", "mesh_keepalive": 25, "mesh_mtu": 1380,
                                      "mesh_pod_cidrs": ["10.9.0.0/26"],
                                      "mesh_node_addresses": ["192.0.2.1"]}, worker_2={"mesh_endpoint": "none"})
        document = built(cluster(1, 2), keys(1, 2), settings=found)
        entry = document["nodes"]["worker-1"]
        assert entry["endpoints"] == {"ipv4": {"address": "203.0.113.7", "port": 5000}}
        assert (entry["keepalive"], entry["mtu"], entry["pod_cidrs"], entry["node_addresses"]) == (25, 1380, ["10.9.0.0/26"], ["192.0.2.1"])
        assert document["nodes"]["worker-2"]["endpoints"] == {}

    @pytest.mark.parametrize("endpoint", ["203.0.113.7:5000", "none"])
    def test_host_left_out_keeps_what_was_set_for_it(self, endpoint):
        own = {"mesh_endpoint": endpoint, "mesh_keepalive": 25, "mesh_mtu": 1380, "mesh_pod_cidrs": ["10.9.0.0/26"]}
        previous = built(cluster(1, 2), keys(1, 2), settings=settings_of(worker_1=own, worker_2={}))
        assert built(cluster(1, 2), {}, previous, settings={}) == previous
        assert built(cluster(1, 2), {}, previous, settings=settings_of(worker_2={})) == previous
        unresolved = _membership.settings_of_hosts({"worker-1": {"unresolved": sorted(own)}, "worker-2": {}})[0]
        assert built(cluster(1, 2), {}, previous, settings=unresolved) == previous

    def test_setting_removed_from_a_host_is_gone(self):
        previous = built(cluster(1), keys(1), settings=settings_of(worker_1={"mesh_endpoint": "203.0.113.7:5000", "mesh_keepalive": 25,
                                                                             "mesh_pod_cidrs": ["10.9.0.0/26"]}))
        entry = built(cluster(1), {}, previous, settings=settings_of(worker_1={}))["nodes"]["worker-1"]
        assert entry["endpoints"]["ipv4"] == {"address": "198.18.0.1", "port": None}
        assert entry["keepalive"] == 0
        assert entry["pod_cidrs"] == ["10.244.1.0/24", "fd00:10:244:1::/64"]

    def test_endpoint_none_removed_from_a_host_is_gone(self):
        previous = built(cluster(1), keys(1), settings=settings_of(worker_1={"mesh_endpoint": "none"}))
        entry = built(cluster(1), {}, previous, settings=settings_of(worker_1={}))["nodes"]["worker-1"]
        assert entry["endpoints"]["ipv4"] == {"address": "198.18.0.1", "port": None}

    def test_node_that_is_let_in_again_has_an_endpoint(self):
        previous = built(cluster(1, 2), keys(1, 2), exclude_nodes=["worker-2"])
        document = built(cluster(1, 2), keys(1, 2), previous)
        assert document["nodes"]["worker-2"]["endpoints"]["ipv4"]["address"] == "198.18.0.2"

    def test_host_left_out_follows_its_node(self):
        previous = built(cluster(1), keys(1))
        moved = candidates(node(1, addresses=["198.18.0.9"]))
        entry = built(moved, {}, previous, settings={})["nodes"]["worker-1"]
        assert entry["node_addresses"] == ["198.18.0.9"]
        assert entry["endpoints"] == {"ipv4": {"address": "198.18.0.9", "port": None}}
        # a new Node object of the same name has CIDRs of its own; the same object cannot have other ones
        new = candidates(node(1, uid="new", cidrs=["10.244.9.0/24"]))
        assert build(new, {}, previous, settings={})[0]["nodes"]["worker-1"]["pod_cidrs"] == ["10.244.9.0/24"]

    def test_measured_mtu_stays_while_host_is_away(self):
        previous = built(cluster(1), keys(1), settings=settings_of(worker_1={"mesh_node_facts": {"mtu": 1420}}))
        assert built(cluster(1), {}, previous, settings=settings_of(worker_1={})) == previous

    def test_mtu_too_small_for_ipv6(self):
        small = settings_of(worker_1={"mesh_mtu": 1200})
        assert "node worker-1, mtu: 1200 is below 1280" in problems_of(cluster(1), keys(1), settings=small)[0]
        only_v4 = candidates(node(1, addresses=["198.18.0.1"], cidrs=["10.244.1.0/24"]))
        assert built(only_v4, keys(1), settings=small)["nodes"]["worker-1"]["mtu"] == 1200

    def test_old_key_of_a_node_that_was_added_again(self):
        """The same machine may have registered anew, so its key stays; but nobody knows, so it is told until the node reports a key."""
        first = built(cluster(1, 2), keys(1, 2))
        again = candidates(node(1), node(2, uid="new"))
        second, warnings = build(again, keys(1), first)
        assert second["nodes"]["worker-2"]["public_keys"] == {"0": key(2)}
        assert len(warnings) == 1 and "node worker-2: was deleted and added again" in warnings[0] and "exclude_nodes" in warnings[0]
        assert build(again, keys(1), second)[1] == warnings, "not only once"
        assert built(again, {}, first, awaited={"worker-1", "worker-2"})["nodes"]["worker-2"]["public_keys"], "it is about to report"
        third = built(again, keys(1, 2), second)
        assert third["nodes"]["worker-2"]["uid"] == "new"
        assert built(again, keys(1), third) == third
        published = candidates(node(1), node(2, uid="new", annotations={"kubemesh.wireguard/public-key-0": key(2)}))
        assert built(published, keys(1), first)["nodes"]["worker-2"]["uid"] == "new", "the new Node object has the key"

    def test_inventory_without_uid_keeps_the_uid(self):
        previous = built(cluster(1), keys(1))
        found = settings_of(worker_1={"mesh_pod_cidrs": ["10.244.1.0/24", "fd00:10:244:1::/64"], "mesh_node_addresses": ["198.18.0.1",
                                                                                                                         "2001:db8::1"]})
        document, dummy = build(_membership.nodes_from_inventory(found), {}, previous, settings=found, complete=False)
        assert document["nodes"] == previous["nodes"]

    def test_missing_library(self, monkeypatch):
        monkeypatch.setattr(_membership, "MISSING_LIBRARY", "No module named 'netaddr'")
        with pytest.raises(MeshError, match="No module named 'netaddr'"):
            build(cluster(1))


class TestOverlaps:

    @pytest.mark.parametrize(("changes", "options", "said"), [
        ({"cidrs": ["10.244.1.0/24"]}, {},
         "node worker-2, pod CIDR 10.244.1.0/24: overlaps node worker-1, pod CIDR 10.244.1.0/24: an address can be behind one node only"),
        ({"cidrs": ["10.244.0.0/16"]}, {}, "node worker-1, pod CIDR 10.244.1.0/24: overlaps node worker-2, pod CIDR 10.244.0.0/16"),
        ({"addresses": ["198.18.0.1"]}, {},
         "node worker-2, node address 198.18.0.1/32: overlaps node worker-1, node address 198.18.0.1/32: each node needs"),
        ({"addresses": ["10.244.1.7"]}, {}, "node worker-2, node address 10.244.1.7/32: overlaps node worker-1, pod CIDR 10.244.1.0/24"),
        ({"cidrs": ["198.18.0.0/24"]}, {}, "overlaps node worker-2, pod CIDR 198.18.0.0/24: what carries the tunnel would go through"),
        ({"addresses": ["10.96.0.10"]}, {"service_cidrs": ["10.96.0.0/12"]},
         "node worker-2, node address 10.96.0.10/32: overlaps service CIDR 10.96.0.0/12"),
        ({"cidrs": ["10.96.0.0/24"]}, {"service_cidrs": ["10.96.0.0/12"]},
         "node worker-2, pod CIDR 10.96.0.0/24: overlaps service CIDR 10.96.0.0/12: pods and services cannot share a range"),
        ({}, {"service_cidrs": ["10.0.0.0/8"]}, "node worker-2, pod CIDR 10.244.2.0/24: overlaps service CIDR 10.0.0.0/8"),
        ({}, {"service_cidrs": ["10.96.0.1/12"]}, "service_cidrs: '10.96.0.1/12' is not a CIDR"),
        ({}, {"port": 65535}, "port: 65535 is not a UDP port"),
    ])
    def test_findings(self, changes, options, said):
        problems = problems_of(candidates(node(1), node(2, **changes)), keys(1, 2), **options)
        assert any(said in problem for problem in problems), problems

    def test_all_in_one_error(self):
        dummy, problems = _membership.nodes_from_k8s([node(3, cidrs=["x"])])
        members = candidates(node(1), node(2, cidrs=["10.244.1.0/25"], addresses=["198.18.0.1"]))
        with pytest.raises(MeshError) as caught:
            build(members, {"worker-1": {"0": key(1)}, "worker-2": {"0": key(1)}}, problems=problems, service_cidrs=["10.244.0.0/16"])
        text = str(caught.value)
        assert text.startswith("the mesh document cannot be made, nothing was changed (")
        for part in ("worker-3, pod CIDR", "public key", "pod CIDR 10.244.1.0/25: overlaps", "node address 198.18.0.1/32", "service CIDR"):
            assert part in text
        assert len(caught.value.problems) == text.count("\n- ")

    def test_node_that_may_be_gone(self):
        previous = built(cluster(1, 2), keys(1, 2))
        problems = problems_of(candidates(node(1), node(3, cidrs=["10.244.2.0/24"])), keys(1, 3), previous, complete=False)
        assert "if worker-2 is gone from the cluster, name it in forget_nodes" in problems[0]

    def test_excluded_nodes_do_not_collide(self):
        members = candidates(node(1), dict(node(2, cidrs=["10.244.1.0/24"]), status={"nodeInfo": {"operatingSystem": "windows"}}))
        assert built(members, keys(1))["nodes"]["worker-2"]["state"] == "excluded"

    def test_many(self):
        members = candidates(*[node(number, cidrs=["10.0.0.0/24"]) for number in range(1, 60)])
        assert len(problems_of(members)) <= 200

    @given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 7), st.sampled_from("abc"),
                              st.sampled_from(["pod CIDR", "node address", "endpoint"])), max_size=10))
    def test_netaddr_agrees_with_the_documents_own_check(self, drawn):
        prefixes = [(str(ipaddress.ip_network((bits << 29, length), strict=False)), (name, what)) for length, bits, name, what in drawn]
        by_netaddr = _membership.overlap_problems(prefixes)
        by_document = _mesh.find_overlaps(set(prefixes), _mesh.prefix_conflict)
        assert len(by_netaddr) == len(by_document)


@st.composite
def node_lists(draw):
    """Node objects of any cluster, keys that some of them reported, and which of them are annotated."""
    numbers = draw(st.sets(st.integers(1, 9), min_size=1))
    items, known = [], {}
    for number in sorted(numbers):
        full = node(number)
        families = draw(st.sampled_from(["46", "4", "6", ""]))
        full["status"]["addresses"] = draw(st.permutations([entry for entry in full["status"]["addresses"] if
                                                            ("6" if ":" in entry["address"] else "4") in families]))
        full["spec"] = {"podCIDRs": [cidr for cidr in full["spec"]["podCIDRs"] if ("6" if ":" in cidr else "4") in families]} if draw(
            st.booleans()) else {}
        where = draw(st.sampled_from(["reported", "annotated", "both", "none", "jinja"]))
        if where in ("reported", "both"):
            known["worker-%d" % number] = {"0": key(number)}
        if where in ("annotated", "both"):
            full["metadata"]["annotations"] = {KEY0: key(number)}
        if where == "jinja":
            full["metadata"]["annotations"] = {KEY0: JINJA}
        if draw(st.integers(0, 6)) == 0:
            full["metadata"]["labels"] = {"kubernetes.io/os": "windows"}
            full["status"]["nodeInfo"] = {}
        items.append(full)
    return items, known


class TestProperties:

    @given(node_lists(), st.integers(0, 2 ** 32))
    def test_order_does_not_matter(self, drawn, seed):
        items, known = drawn
        shuffled = list(items)
        random.Random(seed).shuffle(shuffled)
        documents = [build(_membership.nodes_from_k8s(order)[0], known)[0] for order in (items, shuffled)]
        assert _mesh.document_bytes(documents[0]) == _mesh.document_bytes(documents[1])
        # the same for all: what one node loads is what another does
        assert _mesh.load_document(_mesh.document_bytes(documents[0])) == documents[0]

    @given(node_lists())
    def test_the_mesh_is_sound(self, drawn):
        items, known = drawn
        document = build(_membership.nodes_from_k8s(items)[0], known)[0]
        assert set(document["nodes"]) == {item["metadata"]["name"] for item in items}
        views = {name: _mesh.peers_of(document, name, 0) for name, entry in document["nodes"].items() if _mesh.is_peer(entry, 0)}
        for name, peers in views.items():
            assert {peer["name"] for peer in peers.values()} == set(views) - {name}  # symmetric, and nobody with itself
            assert _mesh.find_overlaps([(cidr, public) for public, peer in peers.items() for cidr in peer["allowed_ips"]]) == []

    @given(node_lists(), node_lists())
    def test_an_incomplete_list_never_loses_a_node_or_a_key(self, before, after):
        previous = build(_membership.nodes_from_k8s(before[0])[0], before[1])[0]
        document, dummy = build(_membership.nodes_from_k8s(after[0])[0], after[1], previous, complete=False)
        assert set(previous["nodes"]) <= set(document["nodes"])
        listed = {item["metadata"]["name"]: item for item in after[0]}
        for name, entry in previous["nodes"].items():
            if name not in listed:
                assert document["nodes"][name] == entry
            elif document["nodes"][name]["state"] != "excluded":
                assert set(entry["public_keys"]) <= set(document["nodes"][name]["public_keys"])

    @given(node_lists())
    def test_again_changes_nothing(self, drawn):
        members = _membership.nodes_from_k8s(drawn[0])[0]
        document = build(members, drawn[1])[0]
        assert build(members, drawn[1], document)[0] == document
        # keys of the document alone are enough
        assert build(members, {}, document)[0] == document

    @given(st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                                     ["metadata", "name", "spec", "podCIDRs", "status", "addresses", "type", "address", "annotations",
                                      "labels"]),
                                     inner, max_size=4), max_leaves=8), max_size=4))
    def test_any_data_is_found_wrong_without_a_crash(self, items):
        for function in (_membership.nodes_from_k8s, _membership.nodes_given):
            found, problems = function(items)
            assert isinstance(found, list)
            assert all(isinstance(problem, str) for problem in problems)
