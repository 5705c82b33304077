# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import re

import pytest

pytest.importorskip("ansible.errors")
yaml = pytest.importorskip("yaml")
from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.filter import awx as plugin

FILTERS = plugin.FilterModule().filters()
REPOSITORY = pathlib.Path(__file__).resolve().parents[4]
SPECS = yaml.safe_load((REPOSITORY / "roles/mesh/meta/argument_specs.yml").read_text(encoding="utf-8"))
MAIN = SPECS["argument_specs"]["main"]["options"]
ENTRIES = ("main", "reconcile", "rotate_keys", "disable", "status")

# Single values that no survey asks for. What the mesh is called and how its hosts differ belongs into the inventory, and so do queries
# and files; the secret belongs into a credential.
OF_THE_INVENTORY = {
    "mesh_agent", "mesh_agent_ca_file", "mesh_agent_grace", "mesh_agent_server", "mesh_agent_token", "mesh_agent_token_file",
    "mesh_endpoint", "mesh_endpoint_query", "mesh_fwmark", "mesh_implementation", "mesh_interface", "mesh_keepalive", "mesh_kube_context",
    "mesh_kubeconfig", "mesh_kubectl_host", "mesh_mtu", "mesh_node_addresses_query", "mesh_node_name", "mesh_nodes_file",
    "mesh_persistence", "mesh_pod_cidrs_query", "mesh_pod_source", "mesh_port", "mesh_psk_secret", "mesh_publish_keys",
    "mesh_rule_priority", "mesh_table",
}


def survey(entry):
    return FILTERS["awx_survey"](SPECS, entry)


def test_every_option_is_asked_for_or_not_on_purpose():
    """A new option of the role needs a decision; lists are given as variables of a launch."""
    single = {name for name, option in MAIN.items() if option["type"] != "list"}
    assert set(plugin.SURVEYED) | OF_THE_INVENTORY == single
    assert not set(plugin.SURVEYED) & OF_THE_INVENTORY


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_survey_asks_for_what_the_entry_point_takes(entry):
    options = SPECS["argument_specs"][entry]["options"]
    found = survey(entry)
    assert found["name"] and isinstance(found["description"], str)
    assert [item["variable"] for item in found["spec"]] == [name for name in plugin.SURVEYED if name in options]
    assert found["spec"], "AWX refuses an empty survey"
    for item in found["spec"]:
        option = options[item["variable"]]
        # An answer counts more than the inventory, and AWX leaves out required answers with a default when it is called by its API.
        # An empty one counts as none, and AWX's editor of surveys needs it.
        assert item["required"] is False and item["default"] == ""
        assert not re.search(r"\b[A-Z]\(", item["question_description"]) and "None" not in item["question_description"]
        if option["type"] == "bool":
            assert (item["type"], item["choices"]) == ("multiplechoice", ["true", "false"])
        elif "choices" in option:
            assert (item["type"], item["choices"]) == ("multiplechoice", option["choices"])
        else:
            assert (item["type"], item["min"]) == ({"int": "integer", "float": "float"}[option["type"]], 0)


def test_the_text_of_a_question():
    asked = {item["variable"]: item for item in survey("main")["spec"]}
    assert asked["mesh_encrypt"]["question_name"] == "Encrypt"
    assert asked["mesh_encrypt"]["question_description"].startswith("What is encrypted. pods is what goes to pods")
    assert asked["mesh_encrypt"]["question_description"].endswith("Default: pods.")
    assert asked["mesh_strict"]["question_description"].endswith("Default: false.")


def test_what_a_survey_cannot_ask_for():
    with pytest.raises(AnsibleFilterError, match="mesh_batch: a survey of AWX cannot ask for type list"):
        plugin.question("mesh_batch", {"type": "list", "description": "x"})
    with pytest.raises(AnsibleFilterError, match="no entry point nothing"):
        survey("nothing")


def test_what_must_exist():
    wanted = {"mesh_awx_organization": ["organizations", ["Default"]], "mesh_awx_credentials": ["credentials", ["ssh", ""]],
              "mesh_awx_inventory": ["inventories", [""]]}
    organization = {"variable": "mesh_awx_organization", "endpoint": "organizations", "name": "Default"}
    assert FILTERS["awx_references"](wanted, "present") == [
        organization, {"variable": "mesh_awx_credentials", "endpoint": "credentials", "name": "ssh"}]
    assert FILTERS["awx_references"](wanted, "absent") == [organization]


GOOD = {"mesh_awx_image": "registry.example/ee", "mesh_awx_reconcile_rrule": "DTSTART:20260101T000000Z RRULE:FREQ=HOURLY"}


@pytest.mark.parametrize("settings,word", [
    ({"mesh_awx_image": ""}, "mesh_awx_image"),
    ({"mesh_awx_kubernetes_token": "secret-x", "mesh_awx_kubernetes_ca": "PEM"}, "mesh_awx_kubernetes_host"),
    ({"mesh_awx_kubernetes_host": "https://api", "mesh_awx_kubernetes_token": "secret-x"}, "mesh_awx_kubernetes_ca"),
    ({"mesh_awx_kubernetes_host": "https://api"}, "mesh_awx_kubernetes_token"),
    ({"mesh_awx_kubernetes_host": "https://api", "mesh_awx_kubernetes_token": "secret-x", "mesh_awx_kubernetes_ca": "PEM",
      "mesh_awx_kubeconfig": "secret-x"}, "take the other"),
    ({"mesh_awx_psk_secret": "secret-x"}, "32 characters"),
    ({"mesh_awx_psk_secret": "secret-x" * 4, "mesh_awx_inventory": "ours"}, "mesh_awx_inventory"),
    ({"mesh_awx_agent_token": "secret-x", "mesh_awx_inventory": "ours"}, "give it mesh_agent_token as the guide shows"),
    ({"mesh_awx_notification_type": "slack"}, "mesh_awx_notification_configuration"),
    ({"mesh_awx_reconcile_rrule": "RRULE:FREQ=HOURLY"}, "DTSTART"),
    ({"mesh_awx_inventory_variables": {"mesh_psk_secret": "secret-x"}}, "mesh_awx_psk_secret"),
    ({"mesh_awx_inventory_variables": {"mesh_agent_token": "secret-x"}}, "mesh_awx_agent_token")])
def test_faults(settings, word):
    found = FILTERS["awx_faults"](dict(GOOD, **settings))
    assert len(found) == 1 and word in found[0] and "secret-x" not in found[0]
    assert ";" in found[0], "a remedy"
    assert FILTERS["awx_faults"](dict(GOOD, mesh_awx_state="absent", **settings)) == [], "what is taken away need not be right"


def test_no_fault():
    assert FILTERS["awx_faults"](GOOD) == []
    assert FILTERS["awx_faults"](dict(GOOD, mesh_awx_psk_secret="x" * 32, mesh_awx_inventory_variables={"mesh_strict": True})) == []
