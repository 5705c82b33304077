# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import inspect
import os

import pytest

pytest.importorskip("ansible.errors")
yaml = pytest.importorskip("yaml")
from ansible.errors import AnsibleFilterError
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.filter import awx, findings_table, lock_verdict
from ansible_collections.kubemesh.wireguard.plugins.filter import mesh as plugin
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh, _status
from ansible_collections.kubemesh.wireguard.plugins.module_utils._status import NO_ANSWER
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils import _hostvars

FILTERS = plugin.FilterModule().filters()
ROLE_FILTERS = dict(FILTERS, **awx.FilterModule().filters())
ALL_FILTERS = dict(FILTERS, **findings_table.FilterModule().filters(), **lock_verdict.FilterModule().filters())
FOLDER = os.path.dirname(os.path.abspath(plugin.__file__))
KEY = "B" * 42 + "A="


def documentation(name):
    with open(os.path.join(FOLDER, name + ".yml"), encoding="utf-8") as handle:
        return yaml.safe_load(handle)


# --- documentation -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(ROLE_FILTERS))
def test_filters_are_documented(name):
    """Each in a file of its own, with the arguments that the function takes, in their order."""
    parameters = inspect.signature(ROLE_FILTERS[name]).parameters
    arguments = list(parameters)
    docs = documentation(name)
    options = docs["DOCUMENTATION"]["options"]
    positional = docs["DOCUMENTATION"].get("positional") or ""
    if isinstance(positional, str):
        positional = [word.strip() for word in positional.split(",") if word.strip()]
    assert docs["DOCUMENTATION"]["name"] == name and len(options) == len(arguments) and "_input" in options
    assert positional == [argument for argument in arguments[1:] if argument in positional]
    assert set(options) - {"_input"} == set(arguments[1:])
    optional = [argument for argument in arguments if parameters[argument].default is not inspect.Parameter.empty]
    for argument in arguments[1:]:
        assert bool(options[argument].get("required")) == (argument not in optional), argument
    assert "kubemesh.wireguard." + name in docs["EXAMPLES"] and docs["RETURN"]["_value"]["description"]
    assert "role" in str(docs["DOCUMENTATION"]["description"]), "made for the role, and says so"


def test_every_documented_filter_exists():
    documented = {name[:-4] for name in os.listdir(FOLDER) if name.endswith(".yml")}
    assert set(ROLE_FILTERS) <= documented
    # Those that have a file of their own.
    assert documented - set(ROLE_FILTERS) == {"findings_table", "lock_verdict"}


# --- nothing is templated ----------------------------------------------------------------------------------------------------------------

JINJA = "{{ lookup('ansible.builtin.pipe', 'id') }}"
INFO = {"node": JINJA, "device": None, "sending": False, "counts": {}, "peers": [], "warnings_of_mesh": [JINJA]}
FINDING = {"level": "error", "check": "port", "node": JINJA, "value": "", "message": JINJA, "remedy": JINJA}


def texts(value):
    if isinstance(value, dict):
        return [text for item in value.items() for text in texts(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name,arguments", [
    ("all_findings", (["a"], {"a": {"__mesh_local": {"findings": [FINDING]}, "__mesh_computed": {"warnings": [JINJA]}}})),
    ("batch_problems", (["a"], ["a"], {"a": {"__mesh_batch_problem": JINJA}})),
    ("mesh_table", (["a"], {"a": {"info": INFO}}, "info")),
    ("mesh_table", (["a"], {"a": {"info": {"msg": JINJA}}}, "info")),
    ("membership_lines", ({"source": "file", "source_reason": JINJA, "serial": 1, "counts": {}, "pending": {"a": JINJA}, "excluded": {},
                           "changes": [JINJA]},)),
    ("settings_faults", (["a"], {"a": {"__mesh_name": JINJA, "set": {"interface": JINJA}}}, "set")),
    ("unreached", ([JINJA], {JINJA: {"__mesh_name": JINJA, "__mesh_proved": {
        "unproven_names": [JINJA], "unproven": [{"name": JINJA, "message": JINJA}]}}})),
    ("strict_obstacles", ({"members": [JINJA], "pending": {}, "excluded": {}}, [], {}, [])),
    ("slice_fault", ([JINJA], {"id": JINJA, "template": JINJA, "workflow": JINJA})),
    ("node_names", (["a"], {"a": {"mesh_node_name": JINJA}})),
    ("keys_due", ([JINJA], {JINJA: {"__mesh_key": {"age": 1e9}}}, 1)),
    ("findings_table", ([FINDING], 400)),
    ("lock_verdict", ({"a": {"acquired": False, "state": "claimed", "holder_age_seconds": 3.0, "expires_in_seconds": 9.0, "holder": {
        "run": "run-b", "who": JINJA, "doing": "enable", "started": 1.0, "phase": "held", "controller": None, "lease": 9}}}, "run-a", 1.0)),
])
def test_what_nodes_say_is_never_a_template(name, arguments):
    """What the kernel, the cluster or another controller say comes out as text, and as text that Ansible does not template again."""
    found = texts(ALL_FILTERS[name](*arguments))
    assert any("lookup" in text for text in found), found
    for text in found:
        assert not _hostvars.is_trusted_as_template(text), text


# --- batches and progress ----------------------------------------------------------------------------------------------------------------

def test_batches():
    assert FILTERS["batches"](list("abcde"), [1, "50%"]) == [["a"], ["b", "c"], ["d", "e"]]
    with pytest.raises(AnsibleFilterError, match="mesh_batch: 'x' is not a number"):
        FILTERS["batches"](["a"], ["x"])


def looked_at(sending=True, encrypts="pods", routes=2, **counts):
    return {"sending": sending, "encrypts": encrypts, "generations": [{"routes": routes}], "counts": counts}


def summary(hostvars):
    return FILTERS["run_summary"](list(hostvars), hostvars, "info")


def test_a_summary_is_numbers_only():
    info = looked_at(encrypted=2)
    found = summary({name: {"info": dict(info, node=name, warnings_of_mesh=[JINJA]), "__mesh_before": info} for name in ("a", "b", "c")})
    assert found == {
        "nodes": 3, "nodes_changed": 0, "nodes_not_reached": 0, "pairs_encrypted": 6, "pairs_not_encrypted": 0, "changed": False,
        "encrypted": True}
    assert all(isinstance(value, (bool, int)) for value in found.values())


@pytest.mark.parametrize("own,expected", [
    ({"info": looked_at(encrypted=1, idle=1)}, {"pairs_encrypted": 4, "encrypted": True}),
    ({"info": looked_at(**{"encrypted": 1, "no handshake": 1})}, {"pairs_encrypted": 3, "pairs_not_encrypted": 1, "encrypted": False}),
    ({"info": looked_at(encrypted=2, excluded=1, unknown=1)}, {"pairs_encrypted": 4, "pairs_not_encrypted": 0, "encrypted": True}),
    ({"info": looked_at(sending=False)}, {"pairs_encrypted": 2, "encrypted": False}),
    ({}, {"nodes": 1, "nodes_not_reached": 1, "encrypted": False}),
    ({"info": {"unreachable": True, "msg": "no route"}}, {"nodes": 1, "nodes_not_reached": 1, "encrypted": False}),
    # left out on purpose, so it ended before it was looked at
    ({"__mesh_name": "w2"}, {"nodes": 1, "nodes_not_reached": 0, "encrypted": True}),
    # changed, by what a task says and by what there was before
    ({"info": looked_at(encrypted=2), "__mesh_key": {"changed": True}}, {"nodes_changed": 1, "changed": True}),
    ({"info": looked_at(encrypted=2), "__mesh_key": {"changed": False}, "__mesh_sent": {"skipped": True}}, {"nodes_changed": 0}),
    ({"info": looked_at(encrypted=2), "__mesh_before": looked_at(sending=False)}, {"nodes_changed": 1}),
    ({"info": looked_at(encrypted=2), "__mesh_before": looked_at(encrypts="nodes")}, {"nodes_changed": 1}),
    ({"info": looked_at(encrypted=2), "__mesh_before": looked_at(routes=0)}, {"nodes_changed": 1}),
    ({"info": looked_at(encrypted=2), "__mesh_before": {"msg": "it failed"}}, {"nodes_changed": 0})])
def test_a_summary_counts(own, expected):
    found = summary({"a": {"info": looked_at(encrypted=2), "__mesh_computed": {"excluded": {"w2": "opted out"}}}, "b": own})
    assert {key: found[key] for key in expected} == expected


@given(st.dictionaries(st.sampled_from(_status.STATES), st.integers(0, 9)))
def test_every_pair_counts_once(counts):
    found = summary({"a": {"info": looked_at(**counts)}})
    pairs = sum(number for state, number in counts.items() if state not in ("excluded", "unknown"))
    assert found["pairs_encrypted"] + found["pairs_not_encrypted"] == pairs
    assert found["encrypted"] == (found["pairs_not_encrypted"] == 0)


def test_problems_of_a_batch():
    hostvars = {"a": {}, "b": {"__mesh_batch_problem": "Send: failed"}, "c": {}, "d": {"__mesh_batch_problem": ""}}
    assert FILTERS["batch_problems"](["a", "b", "c", "d"], ["a", "b", "d"], hostvars) == {
        "b": "Send: failed", "c": "it failed or became unreachable"}
    assert FILTERS["batch_problems"](["a"], ["a"], hostvars) == {}


def test_progress():
    hostvars = {
        "a": {"__mesh_proved_again": {"proven_count": 4, "peer_count": 5}},
        "b": {"__mesh_proved_again": {"proven_count": "5", "peer_count": "5"}}, "c": {}}
    assert FILTERS["progress"](2, 4, ["a", "b"], hostvars, "100", 160) == "2 of 4 nodes done, 9 of 10 peers proven, about 61 s left"
    assert FILTERS["progress"](4, 4, ["c"], hostvars, 100, 160) == "4 of 4 nodes done, 0 of 0 peers proven"
    assert FILTERS["progress"](1, 1, ["a"], {"a": {"__mesh_proved_again": None}}, 0, 0).startswith("1 of 1")


def test_mesh_table():
    info = {"node": "worker-1", "device": None, "sending": False, "counts": {}, "peers": [], "warnings_of_mesh": ["something"]}
    hostvars = {"w1": {"__info": info}, "w2": {"__info": {"failed": True, "msg": "no ip"}}, "w3": {}}
    lines = FILTERS["mesh_table"](["w1", "w2", "w3"], hostvars, "__info")
    assert lines == ["worker-1: no mesh device, does not send through the mesh, no peers", "  something", "", "w2: no ip", "",
                     "w3: " + NO_ANSWER, ""]
    peer = {"name": "b", "endpoint": None, "handshake_age": 1, "rx_bytes": 0, "tx_bytes": 0, "state": "encrypted", "addresses": [],
            "reason": ""}
    hostvars["w1"]["__info"] = dict(info, peers=[peer], warnings_of_mesh=[])
    assert len(FILTERS["mesh_table"](["w1"], hostvars, "__info")) == 4
    assert "__mesh" not in hostvars["w1"]["__info"] and hostvars["w1"]["__info"]["node"] == "worker-1"


def test_mesh_table_names_who_was_left_out():
    hostvars = {"w1": {"__info": {"failed": True, "msg": "no ip"}},
                "w2": {"__mesh_name": "worker-2", "__mesh_computed": {"excluded": {"worker-2": "runs Windows"}}},
                "w3": {"__mesh_name": "worker-3"}, "w4": {}}
    assert FILTERS["mesh_table"](list(hostvars), hostvars, "__info")[::2] == [
        "w1: no ip", "w2: excluded: runs Windows", "w3: " + NO_ANSWER, "w4: " + NO_ANSWER]


# --- membership --------------------------------------------------------------------------------------------------------------------------

COMPUTED = {"source": "kubectl", "source_reason": "asked for", "serial": 7, "counts": {"pending": 1, "member": 3, "excluded": 0},
            "pending": {"b": "no key"}, "excluded": {"win": "Windows"}, "changes": ["node b joined: pending"]}


def test_membership_lines():
    assert FILTERS["membership_lines"](COMPUTED) == [
        "nodes from kubectl: asked for", "mesh document 7: 3 member, 1 pending", "pending b: no key", "excluded win: Windows",
        "node b joined: pending"]
    empty = dict(COMPUTED, counts={}, pending={}, excluded={}, changes=[])
    assert FILTERS["membership_lines"](empty)[1:] == ["mesh document 7: no nodes"]


@given(st.lists(st.text(max_size=20), unique=True, min_size=1, max_size=20))
def test_stand_in_keys(names):
    """Public keys as WireGuard has them, another for each node and the same in each run."""
    keys = [FILTERS["stand_in_key"](name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert _mesh.canonical_public_key(key) == key
        assert _mesh.probe_address(key)
    assert keys == [FILTERS["stand_in_key"](name) for name in names]


def test_first_of_each():
    values = {"a": "one", "b": "two", "c": "one", "d": None, "e": "", "f": "three"}
    assert FILTERS["first_of_each"](values) == ["a", "b", "f"]
    assert FILTERS["first_of_each"]({}) == []


def entry(key, **other):
    return dict({"state": "member", "reason": "", "uid": "", "public_keys": {"0": key}, "endpoints": {}, "pod_cidrs": [],
                 "node_addresses": [], "probe_addresses": {"0": _mesh.probe_address(key)}, "mtu": None, "keepalive": 0}, **other)


def test_members_outside(tmp_path):
    """Members of any document that have a key, whatever this run can see."""
    nodes = {"a": entry(KEY), "b": entry("C" * 42 + "A="),
             "no-key": entry(KEY, public_keys={}, probe_addresses={}, state="pending", reason="x"),
             "out": entry("D" * 42 + "A=", state="excluded", reason="x"), "new": entry("E" * 42 + "A=", state="pending", reason="no CIDR")}
    paths = []
    for number, names in enumerate((["a", "b"], ["a", "no-key", "out", "new"])):
        doc = {"schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 1, "1": 2},
               "nodes": {name: nodes[name] for name in names}}
        path = tmp_path / ("%d.json" % number)
        path.write_bytes(_mesh.document_bytes(_mesh.validate_document(doc)))
        paths.append(str(path))
    assert FILTERS["members_outside"](paths, ["a"]) == ["b", "new"]
    assert FILTERS["members_outside"](paths, ["a", "b", "new"]) == [] == FILTERS["members_outside"]([], ["a"])
    (tmp_path / "bad.json").write_text("{")
    for path in (str(tmp_path / "bad.json"), str(tmp_path / "none.json")):
        with pytest.raises(AnsibleFilterError, match="cannot be used"):
            FILTERS["members_outside"]([path], [])


def test_silent_nodes():
    computed = {"members": ["a", "b", "c"], "pending": {"d": "no key"}}
    hostvars = {
        "ha": {"__mesh_name": "a", "__mesh_local": {"listener": {"ports": [51840]}}},
        "hb": {"__mesh_name": "b", "__mesh_local": {"listener": {"ports": []}}},
        "hc": {"__mesh_name": "c", "__mesh_local": None}}
    assert FILTERS["silent_nodes"](computed, ["ha", "hb", "hc"], hostvars) == ["b", "c", "d"]
    assert FILTERS["silent_nodes"](computed, [], hostvars) == ["a", "b", "c", "d"]


def test_all_findings():
    finding = {"level": "error", "check": "port", "node": "a", "value": "", "message": "taken", "remedy": "stop it"}
    hostvars = {"ha": {"__mesh_local": {"findings": [finding]}, "__mesh_between": {"findings": [dict(finding, check="mtu")]},
                       "__mesh_computed": {"warnings": ["something is odd; look there"], "missing": {
                           "hosts_without_node": ["ha"], "without_key": ["ghost"], "suggestions": {"ha": "a.example"},
                           "not_in_inventory": ["ghost"]}}},
                "hb": {}}
    hostvars["ha"]["__mesh_computed"]["previous_serial"] = 3
    found = FILTERS["all_findings"](["ha", "hb"], hostvars)
    assert [(item["level"], item["check"]) for item in found] == [
        ("error", "port"), ("error", "mtu"), ("warning", "node list"), ("error", "node list"), ("warning", "node list")]
    assert (found[2]["message"], found[2]["remedy"]) == ("something is odd", "look there")
    assert "most likely it is a.example" in found[3]["message"] and "ghost" in found[4]["message"]
    assert all(set(item) == set(finding) for item in found), "as findings_table takes them"


@pytest.mark.parametrize("failed,messages", [
    ({"msg": "no source; give one"}, ["no source"]), ({"problems": ["a; b", "c"], "msg": "x"}, ["a", "c"]),
    ({"rc": 1}, ["the node list cannot be read"])])
def test_findings_of_a_node_list_that_failed(failed, messages):
    found = FILTERS["all_findings"](["a"], {"a": {"__mesh_computed": dict(failed, failed=True)}})
    # before what follows from it: a run ends with the first
    other = {"a": {"__mesh_computed": dict(failed, failed=True), "__mesh_local": {"findings": [FINDING]}}}
    assert FILTERS["all_findings"](["a"], other)[0] == found[0]
    assert [item["message"] for item in found] == messages and {item["level"] for item in found} == {"error"}


def test_findings_of_hosts_that_are_gone():
    """A failed task that runs once takes all hosts out of the play; what they said before counts all the same."""
    finding = {"level": "error", "check": "port", "node": "b", "value": "", "message": "taken", "remedy": "stop it"}
    there = {"__mesh_before": {"exists": False}, "__mesh_computed": {"members": [], "missing": {}}}
    hostvars = {"a": there, "b": {"__mesh_local": {"findings": [finding]}, "__mesh_before": {"exists": True}},
                "c": {"__mesh_before": {"unreachable": True, "msg": "no route"}}, "d": {}}
    found = FILTERS["all_findings"](list(hostvars), hostvars)
    assert [item["message"] for item in found] == [
        "taken", "host c could not be reached, or failed before", "host d could not be reached, or failed before"]
    assert [item["level"] for item in found[1:]] == ["warning"] * 2


@pytest.mark.parametrize("computed,message,remedy", [
    (None, "there is no node list", "mesh_kubectl_host"),
    ({"unreachable": True, "msg": "Connection refused"}, "could not be reached: Connection refused", "mesh_kubectl_host"),
    ({"failed": True, "msg": "no source; give one"}, "no source", "give one"),
    ({"failed": True, "problems": ["a CIDR is wrong; mend it"], "msg": "x"}, "a CIDR is wrong", "mend it")])
def test_a_node_list_that_is_not_there_is_an_error(computed, message, remedy):
    """Also when the host that was asked could not be reached, and nothing failed that could have been noted."""
    hostvars = {"a": {"__mesh_local": {"findings": []}, "__mesh_computed": computed}, "b": {}}
    found = FILTERS["all_findings"](["a", "b"], hostvars)
    assert [item["level"] for item in found] == ["error"] and message in found[0]["message"] and remedy in found[0]["remedy"]


def findings_about(previous_serial, exempt=(), **missing):
    hostvars = {"a": {"__mesh_computed": {"previous_serial": previous_serial, "members": [], "missing": missing}}}
    return FILTERS["all_findings"](["a"], hostvars, list(exempt))


def test_a_slice_does_not_make_a_mesh_of_its_own():
    """Each slice of a new cluster would end well, and half of the mesh would be in clear."""
    outside = {"without_key": ["w2", "w3"], "not_in_inventory": ["w2"], "not_in_play": ["w3"]}
    found = findings_about(None, **outside)
    assert [item["level"] for item in found] == ["error"]
    assert found[0]["message"].startswith("w2, w3: not part of this run, and no key of it is known: is this a slice")
    assert "mesh_exclude_nodes" in found[0]["remedy"]
    assert [item["level"] for item in findings_about(None, exempt=["w2", "w3"], **outside)] == ["warning"]
    assert [item["level"] for item in findings_about(4, **outside)] == ["warning"], "a partial run on a mesh that is there"
    many = findings_about(None, without_key=["n%03d" % number for number in range(5000)])
    assert len(many) == 1 and "and 4990 more" in many[0]["message"]


JOB = {"id": "7", "template": "mesh enable", "workflow": ""}


def findings_of_job(job, exempt=(), **missing):
    hostvars = {"a": {"__mesh_computed": {"previous_serial": 4, "members": [], "missing": missing}}}
    return FILTERS["all_findings"](["a"], hostvars, list(exempt), job)


def test_a_slice_of_a_job_is_refused():
    """A third of the inventory in AWX: the others are members, and no hosts at all."""
    found = findings_of_job(JOB, not_in_inventory=["w2", "w3"], without_key=[])
    assert found[0]["level"] == "error" and found[0]["message"] == (
        "job 7 of AWX looks like a slice: these members of the mesh are no hosts of its inventory: w2, w3")
    assert "job_slice_count" in found[0]["remedy"] and "mesh_exempt_nodes" in found[0]["remedy"]
    surely = findings_of_job(dict(JOB, workflow="mesh enable"), not_in_inventory=["w2"])
    assert surely[0]["message"].startswith("job 7 of AWX is a slice of the template mesh enable:")
    assert "is a slice of" not in findings_of_job(dict(JOB, workflow="a workflow"), not_in_inventory=["w2"])[0]["message"]


@pytest.mark.parametrize("job,exempt,missing", [
    # outside of AWX a part of an inventory is what somebody has chosen
    ({"id": "", "template": "", "workflow": ""}, [], {"not_in_inventory": ["w2"]}),
    (None, [], {"not_in_inventory": ["w2"]}),
    # a limit: all hosts exist
    (JOB, [], {"not_in_inventory": [], "not_in_play": ["w2", "w3"]}),
    # a node that has just joined and is in no inventory yet
    (JOB, [], {"not_in_inventory": ["w2"], "without_key": ["w2"]}),
    (JOB, ["w2"], {"not_in_inventory": ["w2"]})])
def test_what_is_no_slice(job, exempt, missing):
    assert "error" not in [item["level"] for item in findings_of_job(job, exempt, **missing)]


def test_the_names_of_all_hosts_of_the_inventory():
    """Also of hosts that are not part of the run: nobody noted their names, and the default of the role is no variable of theirs."""
    hostvars = {"a": {"__mesh_name": "node-a", "mesh_node_name": "other"}, "b": {"mesh_node_name": "node-b"}, "c": {}}
    assert FILTERS["node_names"](list(hostvars), hostvars) == ["c", "node-a", "node-b"]


def test_how_tunnels_can_be_proven():
    """A node without IPv6 answers no echo, whoever asks."""
    hostvars = {"a": {"__mesh_before": {"ipv6": True}}, "b": {"__mesh_before": {"ipv6": False}}, "c": {"__mesh_before": None}, "d": {}}
    assert FILTERS["probe_method"](["a", "c", "d"], hostvars) == "auto"
    assert FILTERS["probe_method"](["a", "b"], hostvars) == "handshake"
    assert FILTERS["probe_method"](["e"], {"e": {"__mesh_there": {"ipv6": False}}}) == "handshake", "the status"


def test_unknown_variables():
    known = ["mesh_port", "mesh_table", "mesh_interface"]
    assert FILTERS["unknown_variables"](["mesh_port", "mesh_ports", "mesh_xyzzy", "mesh_table"], known) == [
        "mesh_ports: there is no such variable; did you mean mesh_port?", "mesh_xyzzy: there is no such variable"]
    assert FILTERS["unknown_variables"](known, known) == []


# --- generations of keys -----------------------------------------------------------------------------------------------------------------

def there(*generations):
    """What `mesh_info` says of a host with these (generation, age of its key)."""
    return {"generations": [{"generation": generation, "key_age": age} for generation, age in generations]}


@pytest.mark.parametrize("current,keys,doing,expected", [
    (0, [], "enable", 0), (0, [0], "enable", 0), (1, [1], "enable", 1), (1, [0, 1], "enable", 1), (0, [0, 1], "reconcile", 0),
    # a rotation begins, goes on, and the next one leads back
    (0, [0], "rotate_keys", 1), (1, [0, 1], "rotate_keys", 1), (1, [1], "rotate_keys", 0), (0, [0, 1], "rotate_keys", 0)])
def test_target_generation(current, keys, doing, expected):
    computed = {"generation": current, "key_generations": keys}
    assert FILTERS["target_generation"](computed, doing, [there((0, 5))]) == expected


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("old", [0, 1])
def test_taking_a_rotation_back_leads_to_the_older_keys(current, old):
    """However often it is said, and whatever the last run was about to do."""
    computed = {"generation": current, "key_generations": [0, 1]}
    infos = [there((old, 9000), (1 - old, 10)), there((old, 9000)), there()]
    assert FILTERS["target_generation"](computed, "rotate_keys", infos, True) == old


def test_why_keys_cannot_be_rotated():
    def fault(keys, infos=(), back=False, doing="rotate_keys"):
        return FILTERS["rotation_fault"]({"generation": 0, "key_generations": keys}, doing, list(infos), back)

    assert fault([]).startswith("no node has a key yet") and fault([0], [there((0, 5))], True).startswith("mesh_rotate_back: no node")
    assert fault([0]) == fault([], doing="enable") == fault([0, 1], [there((0, 9000), (1, 10))], True) == ""


def test_nothing_to_rotate_and_nothing_to_take_back():
    with pytest.raises(AnsibleFilterError, match="enable"):
        FILTERS["target_generation"]({"generation": 0, "key_generations": []}, "rotate_keys", [])
    with pytest.raises(AnsibleFilterError, match="mesh_rotate_back"):
        FILTERS["target_generation"]({"generation": 0, "key_generations": [0]}, "rotate_keys", [there((0, 5))], True)


def test_old_generations():
    def old(target, keys, *infos):
        return FILTERS["old_generations"](list(infos), target, {"key_generations": keys})

    assert old(0, [0], there((0, 5)), there()) == []
    assert old(1, [0, 1], there((0, 5))) == [0], "the document still has the old keys"
    assert old(0, [0], there((0, 5)), there((1, 5))) == [1], "a node has something of keys that nobody else knows of"


def test_keys_that_are_due():
    hostvars = {host: {"__mesh_key": {"age": age}} for host, age in (("a", 86400 * 90), ("b", 86400 * 90 - 1), ("c", None))}
    hostvars["d"] = {}
    assert "1 nodes are 90 days old or older (mesh_key_max_age): a;" in FILTERS["keys_due"](list(hostvars), hostvars, 90)
    assert FILTERS["keys_due"](list(hostvars), hostvars, 91) == "" == FILTERS["keys_due"](list(hostvars), hostvars, 0)


# --- what cannot be changed on a live mesh -----------------------------------------------------------------------------------------------

def in_use(**changes):
    """What `mesh_info` says of a node that sends through generation 1 of a mesh with the defaults."""
    return dict({
        "sending": True, "rule_fwmark": 4096, "guard": {"present": False}, "document": {"ports": {"0": 51840, "1": 51841}},
        "generations": [{"generation": 1, "listen_port": 51841, "fwmark": 4096}]}, **changes)


MINE = {"interface": "wgmesh", "table": 51840}
PODS_ONLY = {"rule_fwmark": None}
IDLE = {"rule_fwmark": None, "sending": False}


@pytest.mark.parametrize("before,port,fwmark,messages", [
    (in_use(), 51840, 4096, []), (in_use(), "51840", "4096", []),
    (in_use(), 5000, 4096, ["mesh_port 51840, and this run has 5000"]),
    (in_use(), 51840, 8192, ["mesh_fwmark 4096, and this run has 8192"]),
    (in_use(), 5000, 8192, ["mesh_port 51840", "mesh_fwmark 4096"]),
    # without a document, or with a damaged one, the device tells; each generation has a port of its own
    (in_use(document=None), 51840, 4096, []), (in_use(document=None), 51841, 4096, ["mesh_port 51840, and this run has 51841"]),
    # a device that drifted is mended: not the setting was changed
    (in_use(generations=[{"generation": 0, "listen_port": 5555, "fwmark": 0}]), 51840, 4096, []),
    (in_use(**dict(PODS_ONLY, generations=[{"generation": 0, "listen_port": 5555, "fwmark": 0}])), 51840, 4096, []),
    # without the rule for nodes, the mark counts while the node sends, or guards
    (in_use(**PODS_ONLY), 51840, 8192, ["mesh_fwmark 4096"]),
    (in_use(**dict(IDLE, guard={"present": True})), 51840, 8192, ["mesh_fwmark 4096"]),
    (in_use(**IDLE), 51840, 8192, []),
    # nothing is there
    (in_use(**dict(IDLE, generations=[], document=None)), 1, 2, []),
    (in_use(**dict(IDLE, generations=[{"generation": 0, "listen_port": None, "fwmark": None}])), 1, 2, []), (None, 1, 2, []),
])
def test_port_and_mark_of_a_mesh_in_use(before, port, fwmark, messages):
    found = FILTERS["in_use_conflicts"](["h"], {"h": {"__mesh_before": before}}, dict(MINE, port=port, fwmark=fwmark))
    assert len(found) == len(messages) and all(message in text for message, text in zip(messages, found)), found
    assert all(text.startswith("host h: the mesh is in use with") and "or run the playbook disable with that first" in text
               for text in found)


def test_conflicts_of_a_big_cluster_stay_few():
    hostvars = {"h%d" % number: {"__mesh_before": in_use()} for number in range(5000)}
    found = FILTERS["in_use_conflicts"](list(hostvars), hostvars, dict(MINE, port=5000, fwmark=4096))
    assert len(found) == 21 and found[-1] == "and 4980 more of these"


# --- prove -------------------------------------------------------------------------------------------------------------------------------

def test_nodes_that_do_not_reach_others_of_their_run():
    def unreached(**proofs):
        hostvars = {host: {"__mesh_name": host[1:], "__mesh_proved": proof} for host, proof in proofs.items()}
        return FILTERS["unreached"](sorted(proofs), hostvars)

    assert unreached(ha={"unproven_names": []}, hb=None) == []
    # Who takes no part in the run may be away.
    assert unreached(ha={"unproven_names": ["x"], "unproven": [{"name": "x", "message": "no answer"}]}) == []
    assert unreached(ha={"unproven_names": ["b", "x"], "unproven": [
        {"name": "b", "message": "b: no handshake"}, {"name": "x", "message": "no answer"}]}, hb={"unproven_names": []}) == [
            "a does not reach through the tunnel, of this run: b. b: no handshake"]
    names = ["n%04d" % number for number in range(5000)]
    lines = unreached(**{"h" + name: {"unproven_names": names} for name in names})
    assert len(lines) == 21 and "n0009 and 4990 more" in lines[0] and lines[-1] == "and 4980 more of these"


# --- settings ----------------------------------------------------------------------------------------------------------------------------

def test_settings_and_names_of_a_run():
    good = {"interface": "wgmesh", "table": "51840", "port": "51840", "rule_priority": "400", "fwmark": "4096"}
    hostvars = {name: {"__mesh_name": name, "set": dict(good)} for name in "abc"}
    assert FILTERS["settings_faults"](list(hostvars), hostvars, "set") == []
    hostvars["b"].update(__mesh_name="Node_3")
    hostvars["c"]["set"]["port"] = 51841
    found = FILTERS["settings_faults"](list(hostvars), hostvars, "set")
    assert len(found) == 2 and "host b: mesh_node_name: 'Node_3'" in found[0] and "mesh_port: 51841 on c" in found[1]
    # What takes the mesh away needs its name and its table, and no more.
    for own in hostvars.values():
        own["set"] = {"interface": "wgmesh", "table": "51840"}
    assert FILTERS["settings_faults"](list(hostvars), hostvars, "set") == []


@pytest.mark.parametrize("restored, words", [
    ({"devices": ["wgmesh0"], "table": 51840}, []), ({"devices": ["wgmesh0", "wgmesh1"], "table": None}, []),
    ({"devices": [], "table": None}, []), (None, []),
    ({"devices": ["foo1"], "table": 51840}, ["mesh_interface=foo"]), ({"devices": ["wgmesh0"], "table": 7000}, ["mesh_table=7000"]),
    # what half a run left under another name goes with the next one
    ({"devices": ["foo0", "wgmesh0"], "table": 51840}, []),
    # a device that somebody made with the module interface alone
    ({"devices": ["wg-dmz"], "table": None}, []),
])
def test_a_mesh_with_another_name_or_table(restored, words):
    hostvars = {"h": {"there": {"restored": restored}}}
    found = FILTERS["in_use_conflicts"](["h"], hostvars, {"interface": "wgmesh", "table": 51840}, "there")
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found)), found


def test_host_encryption_does_not_change_under_strict_mode_without_all():
    def found(missing=(), exempt=(), encrypt="nodes", present=True, encrypts="pods"):
        hostvars = {"ha": {"__mesh_name": "a", "__mesh_encrypt": encrypt, "__mesh_before": {
            "exists": True, "guard": {"present": present}, "encrypts": encrypts}, "__mesh_computed": {
                "members": ["a", *missing], "pending": {}, "missing": {}}}}
        return [item for item in FILTERS["all_findings"](["ha"], hostvars, exempt) if "strict mode" in item["message"]]

    assert found() == found(["b"], encrypt="pods") == found(["b"], present=False) == found(["b"], exempt=["b"]) == []
    assert found(["b"], encrypts="nothing") == [], "a node that does not send yet expects nothing"
    for before, after in (("pods", "nodes"), ("nodes", "pods")):
        item, = found(["b"], encrypts=before, encrypt=after)
        assert item["level"] == "error" and "from %s to %s" % (before, after) in item["message"] and item["message"].endswith(": b")


def test_exemptions_do_not_change_under_strict_mode_without_all():
    def found(missing=(), now=(), before=(), exempt=(), encrypts="nodes", present=True):
        hostvars = {"ha": {
            "__mesh_name": "a", "__mesh_encrypt": encrypts, "__mesh_settings": {"exempt_cidrs": list(now)},
            "__mesh_before": {"exists": True, "guard": {"present": present, "exempt_cidrs": list(before)}, "encrypts": encrypts},
            "__mesh_computed": {"members": ["a", *missing], "pending": {}, "missing": {}}}}
        return [item for item in FILTERS["all_findings"](["ha"], hostvars, exempt) if "strict mode" in item["message"]]

    for now, before in ((["192.0.2.0/24"], []), ([], ["192.0.2.0/24"])):
        item, = found(["b"], now, before)
        assert item["level"] == "error" and "mesh_exempt_cidrs would change" in item["message"] and item["message"].endswith(": b")
        assert found([], now, before) == found(["b"], now, before, exempt=["b"]) == found(["b"], now, before, present=False) == []
        assert found(["b"], now, before, encrypts="pods") == [], "node addresses are not guarded"
    assert found(["b"], ["2001:DB8::/64"], ["2001:db8::/64"]) == []


def test_nobody_is_left_in_clear_under_strict_mode_who_is_not_named():
    def found(exempt=(), strict=True, sending=False, members=("a",), present=True):
        before = {"exists": True, "guard": {"present": present}, "encrypts": "nodes", "sending": True}
        hostvars = {
            "ha": {"__mesh_name": "a", "__mesh_encrypt": "nodes", "__mesh_strict": strict, "__mesh_before": before, "__mesh_computed": {
                "members": list(members), "pending": {}, "excluded": {"x": "named in exclude_nodes"}, "missing": {}}},
            "hx": {"__mesh_name": "x", "__mesh_encrypt": "nodes", "__mesh_strict": strict, "__mesh_before": dict(before, sending=sending)}}
        return [item for item in FILTERS["all_findings"](["ha", "hx"], hostvars, exempt) if "strict mode" in item["message"]]

    item, = found()
    assert item["level"] == "error" and item["message"].endswith(": x") and "mesh_exempt_nodes" in item["remedy"]
    assert found(["x"]) == found(strict=False) == found(["x"], sending=True) == found(["x"], members=["a", "b"]) == []
    item, = found(["x"], sending=True, members=["a", "b"])
    assert item["level"] == "error" and "what x would send in clear: b" in item["message"]
    assert found(["x", "b"], sending=True, members=["a", "b"]) == []
    assert found(strict=False, sending=True, members=["a", "b"], present=False) == []


def test_a_damaged_document_is_told():
    before = {"exists": True, "warnings_of_mesh": ["/etc/kubemesh/mesh.json: it is not JSON", "device wgmesh0 is down"]}
    computed = {"members": [], "missing": {}}
    found = FILTERS["all_findings"](["a"], {"a": {"__mesh_before": before, "__mesh_computed": computed, "__mesh_name": "a"}})
    assert [item["message"] for item in found] == ["host a: /etc/kubemesh/mesh.json: it is not JSON"]


# --- strict mode -------------------------------------------------------------------------------------------------------------------------

def test_strict_mode_needs_every_pair():
    def obstacles(exempt=(), **proofs):
        hostvars = {"h" + name: {"__mesh_name": name, "__mesh_proved_again": proof} for name, proof in proofs.items()}
        computed = {"members": ["a", "b"], "pending": {}, "excluded": {"win": "Windows"}}
        return FILTERS["strict_obstacles"](computed, sorted(hostvars), hostvars, list(exempt))

    proven = {"unproven_names": []}
    assert obstacles(["win"], a=proven, b=proven) == []
    assert obstacles(a=proven, b=proven) == ["these nodes of the cluster are not part of this run: win"]
    assert obstacles(["win"], a=proven) == ["these nodes of the cluster are not part of this run: b"]
    assert obstacles(["win", "b"], a={"unproven_names": ["b"]}) == []
    assert obstacles(["win", "b"], a={"unproven": [{"name": "b"}], "unproven_names": ["b", "x"]}, b=proven) == [
        "host ha does not reach x through the mesh"], "also what is not among the first 50"
    assert obstacles(["win"], a={"unproven_names": ["b"]}, b=None) == [
        "host ha does not reach b through the mesh", "host hb was not switched"]
