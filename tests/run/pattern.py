# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes what the pattern in extensions/patterns says of the role's variables: its definition with the surveys, and the argument specs of
its playbooks. Both are made from the role's own argument specs; a unit test fails where they differ. Run it after a change of those.

    PYTHONPATH=DIRECTORY_WITH_ansible_collections python tests/run/pattern.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from ansible_collections.kubemesh.wireguard.plugins.filter import awx

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "encrypt_nodes"
PATTERN = REPOSITORY / "extensions" / "patterns" / NAME
SCHEMA_VERSION = "3.0.0"
HEADER = """\
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Written by tests/run/pattern.py.
---
"""
EXAMPLE = """\
- name: %s
  ansible.builtin.import_playbook: kubemesh.wireguard.%s
"""
# Beside what the schema names: the platform hands on the fields of a template as they are.
OF_EVERY_TEMPLATE = {
    "ask_credential_on_launch": True, "ask_diff_mode_on_launch": True, "ask_inventory_on_launch": True, "ask_job_type_on_launch": True,
    "ask_limit_on_launch": True, "ask_variables_on_launch": True, "ask_verbosity_on_launch": True, "survey_enabled": True,
    "allow_simultaneous": False, "job_slice_count": 1, "use_fact_cache": False,
}


def load(path):
    """A YAML file of the repository; what only Ansible understands in it does not matter here."""

    class Loader(yaml.SafeLoader):
        """With C(!unsafe)."""

    Loader.add_constructor("!unsafe", lambda loader, node: None)
    return yaml.load((REPOSITORY / path).read_text(encoding="utf-8"), Loader=Loader)


def definition(templates, specs):
    """The content of meta/pattern.json."""
    made = []
    for template in templates:
        own = {"name": "Kubemesh %s" % template["playbook"].replace("_", " "), "description": template["description"],
               "playbook": "%s.yml" % template["playbook"], "execution_environment": "Kubemesh"}
        if template["playbook"] == "enable":
            own["primary"] = True
        made.append(dict(own, **OF_EVERY_TEMPLATE, survey=awx.awx_survey(specs, template["entry"])))
    return {
        "schema_version": SCHEMA_VERSION,
        "name": NAME,
        "title": "Encrypt the traffic between Kubernetes nodes",
        "description":
            "Encrypts the traffic between the nodes of a Kubernetes cluster with a WireGuard mesh, whatever its network plugin is, without "
            "losing a packet. It keeps the mesh in step with the cluster, rotates its keys, shows it, and takes it away again. Select an "
            "inventory with all nodes of one cluster, and credentials for ssh and for the API of the cluster.",
        "short_description": "A WireGuard mesh between the nodes of a Kubernetes cluster",
        "tags": ["encryption", "kubernetes", "networking", "security", "wireguard"],
        "aap_resources": {
            "controller_project": {"name": "Kubemesh", "description": "Playbooks of the collection kubemesh.wireguard"},
            "controller_execution_environment": {
                "name": "Kubemesh", "description": "The collection kubemesh.wireguard and what it needs",
                "image_name": "kubemesh/wireguard-ee", "pull": "missing"},
            "controller_job_templates": made,
        },
    }


def arguments(template, specs):
    """The content of the argument specs of a playbook."""
    spec = specs["argument_specs"][template["entry"]]
    options = {
        name: dict({key: option[key] for key in ("type", "elements", "choices", "default", "no_log") if key in option},
                   description=awx.plain_text(option["description"]))
        for name, option in spec["options"].items()}
    described = {"short_description": spec["short_description"], "description": " ".join(map(awx.plain_text, spec["description"]))}
    return {**described, "argument_specs": {template["playbook"]: {
        "short_description": spec["short_description"], "description": [awx.plain_text(text) for text in spec["description"]],
        "options": options,
        "examples": EXAMPLE % (spec["short_description"], template["playbook"])}}}


def files():
    """{path relative to the pattern: text} of all that is written."""
    templates, specs = load("roles/mesh_awx/vars/main.yml")["__mesh_awx_templates"], load("roles/mesh/meta/argument_specs.yml")
    found = {"meta/pattern.json": json.dumps(definition(templates, specs), indent=2) + "\n"}
    for template in templates:
        text = yaml.dump(arguments(template, specs), Dumper=Indented, sort_keys=False, width=120, allow_unicode=True)
        found["playbooks/%s.meta.yml" % template["playbook"]] = HEADER + text
    return found


class Indented(yaml.SafeDumper):
    """Lists indented below their key and no aliases, as yamllint of this repository wants it."""

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data):
        return True


def main():
    """Write them all."""
    for name, text in files().items():
        path = PATTERN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
