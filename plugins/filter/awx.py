# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Filters of the role ``mesh_awx``: what AWX is to be told, made from what the role ``mesh`` says of itself."""

from __future__ import annotations

import re

from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import untrusted_results

# What a survey asks: what one may want to decide for one run. Lists are no answers of a survey and go into the variables of a launch; what
# the mesh is called, and what differs from host to host, belongs into the inventory. A test finds options that are in neither place.
SURVEYED = (
    "mesh_encrypt", "mesh_strict", "mesh_nodes_source", "mesh_rotate_back", "mesh_preflight", "mesh_allow_unproven", "mesh_probe_timeout",
    "mesh_confirm_timeout", "mesh_lock_wait", "mesh_lock_lease", "mesh_key_max_age", "mesh_status_detail", "mesh_require_encrypted",
)

# Seconds of a lock, days of a key: nothing that is asked for as a number may be negative.
SMALLEST = 0

# The least length of the cluster secret, see the role mesh.
PSK_SECRET_LENGTH = 32
# Variables of this role that hold secrets, without their prefix, and those of the role mesh that they are for.
SECRETS = {"psk_secret": "mesh_psk_secret", "agent_token": "mesh_agent_token"}

MARKUP = re.compile(r"\b[A-Z]+\(([^()]*)\)")


def plain_text(paragraphs):
    """Paragraphs of documentation as one text without markup: ``O(mesh_strict=true)`` becomes ``mesh_strict=true``."""
    return MARKUP.sub(r"\1", " ".join([paragraphs] if isinstance(paragraphs, str) else paragraphs))


def question(name, option):
    """One question of a survey for an option of the argument specs.

    It has no default and need not be answered: an answer counts more than the inventory, so a default of the survey would take away what
    the inventory says. The text names the role's default.
    """
    kind, choices = option.get("type", "str"), option.get("choices")
    if kind == "bool":
        kind, choices = "multiplechoice", ["true", "false"]
    elif choices:
        kind, choices = "multiplechoice", [str(choice) for choice in choices]
    elif kind == "int":
        kind = "integer"
    elif kind != "float":
        raise AnsibleFilterError("%s: a survey of AWX cannot ask for type %s" % (name, kind))
    default = option.get("default")
    asked = {
        "variable": name,
        "question_name": name[len("mesh_"):].replace("_", " ").capitalize(),
        "question_description": "%s Default: %s." % (
            plain_text(option["description"]), str(default).lower() if isinstance(default, bool) else default),
        "type": kind,
        "required": False,
        # None, but it must be there: AWX's editor of surveys breaks where it is missing (ansible/awx#13640). It is no valid answer, so AWX
        # does not use it.
        "default": "",
    }
    if choices:
        asked["choices"] = choices
    else:
        asked["min"] = SMALLEST
    return asked


def awx_survey(specs, entry):
    """The survey of a job template, as the API of AWX takes it.

    :param specs: content of ``meta/argument_specs.yml`` of the role mesh.
    :param entry: name of the entry point that the playbook calls.
    """
    try:
        spec = specs["argument_specs"][entry]
    except KeyError:
        raise AnsibleFilterError("the role mesh has no entry point %s" % entry) from None
    return {
        "name": spec["short_description"],
        "description": "What is not answered is what the inventory says, or else the default.",
        "spec": [question(name, spec["options"][name]) for name in SURVEYED if name in spec["options"]],
    }


def awx_references(wanted, state):
    """What must exist in AWX: [{"variable", "endpoint", "name"}]. To remove everything only the organization is needed.

    :param wanted: {variable: [endpoint, names]}; empty names count for nothing.
    """
    return [
        {"variable": variable, "endpoint": endpoint, "name": name}
        for variable, (endpoint, names) in wanted.items() for name in names
        if name and (state == "present" or variable == "mesh_awx_organization")]


def awx_faults(settings):
    """What is wrong with the variables of the role beyond their types: lines of text, without any value that may be a secret."""
    def given(name):
        return bool(settings.get("mesh_awx_" + name))

    if settings.get("mesh_awx_state") == "absent":
        return []
    found = []
    if not given("image"):
        found.append("mesh_awx_image: it is missing; give the image of an execution environment that has the collection kubemesh.wireguard")
    if given("kubernetes_token") != given("kubernetes_host"):
        found.append("mesh_awx_kubernetes_token, mesh_awx_kubernetes_host: one needs the other; give both or none")
    # AWX turns verification off in jobs for a credential without a CA, whatever its verify_ssl says: the token would go to whoever answers.
    if given("kubernetes_token") and not given("kubernetes_ca"):
        found.append("mesh_awx_kubernetes_ca: it is missing, and AWX does not verify the API server without it; give the cluster's CA:"
                     " kubectl -n kube-system get configmap kube-root-ca.crt -o jsonpath='{.data.ca\\.crt}'")
    if given("kubeconfig") and given("kubernetes_token"):
        found.append("mesh_awx_kubeconfig, mesh_awx_kubernetes_token: the cluster needs one of them; take the other away")
    if given("psk_secret") and len(str(settings["mesh_awx_psk_secret"])) < PSK_SECRET_LENGTH:
        found.append("mesh_awx_psk_secret: it has less than %d characters; take a longer one, such as of openssl rand -base64 48"
                     % PSK_SECRET_LENGTH)
    for name, variable in SECRETS.items():
        if given(name) and given("inventory"):
            found.append("mesh_awx_%s, mesh_awx_inventory: an inventory that exists is not changed; give it %s as the guide shows, and name"
                         " the credential in mesh_awx_credentials" % (name, variable))
        if variable in (settings.get("mesh_awx_inventory_variables") or {}):
            found.append("mesh_awx_inventory_variables: %s is in it, and who may read the inventory could read it; give it as mesh_awx_%s"
                         % (variable, name))
    if given("notification_type") != given("notification_configuration"):
        found.append("mesh_awx_notification_type, mesh_awx_notification_configuration: one needs the other; give both or none")
    if not re.match(r"DTSTART\S*\sRRULE:", str(settings.get("mesh_awx_reconcile_rrule", ""))):
        found.append("mesh_awx_reconcile_rrule: it is no recurrence rule with a start; give one like DTSTART:20260101T000000Z"
                     " RRULE:FREQ=HOURLY;INTERVAL=1")
    return found


class FilterModule:
    """Filters of the role ``mesh_awx``."""

    def filters(self):
        return untrusted_results({
            "awx_faults": awx_faults,
            "awx_references": awx_references,
            "awx_survey": awx_survey,
        })
