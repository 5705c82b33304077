# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The variables of the role in the four places that name them: specs, defaults, the list of known ones, and where they are used."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

yaml = pytest.importorskip("yaml")

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
ROLE = REPOSITORY / "roles" / "mesh"
# mesh_hosts belongs to the playbooks, mesh_node_facts is what the role keeps of a node, mesh_run_summary what a workflow hands on.
NOT_OF_THE_SPECS = {"mesh_hosts", "mesh_node_facts", "mesh_run_summary"}
# Variables that belong to no playbook
OF_ONE_ENTRY_POINT = {"rbac": {"mesh_rbac_agent_policy", "mesh_rbac_state"}}


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


SPECS = load(ROLE / "meta" / "argument_specs.yml")["argument_specs"]
DEFAULTS = load(ROLE / "defaults" / "main.yml")
KNOWN = load(ROLE / "vars" / "main.yml")["__mesh_known_variables"]
OPTIONS = {name: option for spec in SPECS.values() for name, option in spec["options"].items()}


def is_template(value):
    return isinstance(value, str) and "{{" in value


def test_known_variables_are_those_of_the_specs():
    assert set(KNOWN) == set(OPTIONS) | NOT_OF_THE_SPECS
    assert sorted(KNOWN) == KNOWN and len(set(KNOWN)) == len(KNOWN)


def test_every_option_is_one_of_main():
    """The other entry points take some of the same variables, and describe them alike."""
    for name, spec in SPECS.items():
        assert set(spec["options"]) - OF_ONE_ENTRY_POINT.get(name, set()) <= set(SPECS["main"]["options"]), name
        for option in set(spec["options"]) & set(SPECS["main"]["options"]):
            described = spec["options"][option]
            assert described == SPECS["main"]["options"][option], (name, option)


def test_defaults_agree():
    given = {name: value for name, value in DEFAULTS.items() if not is_template(value)}
    described = {name: option["default"] for name, option in OPTIONS.items() if "default" in option}
    assert given == described
    assert set(DEFAULTS) <= set(OPTIONS)


def test_what_a_template_gives_is_described():
    for name, value in DEFAULTS.items():
        if is_template(value):
            assert "The default is" in " ".join(OPTIONS[name]["description"]), name


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_defaults_are_allowed_values(name):
    option = OPTIONS[name]
    assert option["description"] and option["type"]
    if "default" in option:
        assert "required" not in option
        for value in option["default"] if option["type"] == "list" else [option["default"]]:
            assert value in option.get("choices", [value])


def used_in(path):
    """Names that look like variables of the role; names of filters and modules have a dot before them."""
    return set(re.findall(r"(?<![\w.])mesh_[a-z_]+(?!\w)", path.read_text(encoding="utf-8")))


FILES = sorted((ROLE / "tasks").glob("*.yml")) + sorted((REPOSITORY / "playbooks").glob("*.yml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_known_variables_are_used(path):
    assert used_in(path) <= set(KNOWN)


def test_every_variable_is_used():
    used = set().union(*map(used_in, FILES))
    # Those that hosts have are read by the action part of `peers`.
    action = (REPOSITORY / "plugins" / "module_utils" / "_membership.py").read_text(encoding="utf-8")
    unused = {name for name in set(OPTIONS) - used if '"%s"' % name not in action}
    assert unused == set()


# Modules of tasks that change a node; `lock` and `probe` never say so, and what runs on the controller is no node's.
CHANGING = {"kubemesh.wireguard.%s" % name for name in (
    "agent", "document", "guard", "interface", "keypair", "preshared_keys", "routes")}


def tasks_of(blocks):
    for task in blocks or []:
        yield task
        for part in ("block", "rescue", "always"):
            yield from tasks_of(task.get(part))


def test_the_summary_of_a_run_knows_what_changed():
    """What a task changed is in its result only; a result that the summary does not look at is a change that it does not tell."""
    registered, found = set(importlib.import_module("ansible_collections.kubemesh.wireguard.plugins.filter.mesh").CHANGING_RESULTS), set()
    for path in (ROLE / "tasks").glob("*.yml"):
        for task in tasks_of(load(path)):
            module = next((name for name in task if name in CHANGING or name == "ansible.builtin.file"), None)
            # It only compares; a file on the controller; and hosts that are in no batch of a round would lose what they registered
            # before, so that is told from what there was before.
            if not module or task[module].get("compare_only") or task.get("delegate_to") or path.name == "withdraw_batch.yml":
                continue
            assert task.get("register") in registered, (path.name, task["name"])
            found.add(task["register"])
    assert found == registered


def entry_points():
    """Entry points that tasks files and playbooks name."""
    found = set()
    for path in (REPOSITORY / "playbooks").glob("*.yml"):
        found |= set(re.findall(r"tasks_from: (\w+)", path.read_text(encoding="utf-8")))
    return found


def test_entry_points_have_specs_and_tasks():
    tasks = {path.stem for path in (ROLE / "tasks").glob("*.yml")}
    assert set(SPECS) <= tasks
    assert entry_points() <= set(SPECS), "what a playbook calls checks its variables"


@pytest.mark.parametrize("module,options", [
    ("routes", {"table": "mesh_table", "rule_priority": "mesh_rule_priority", "fwmark": "mesh_fwmark", "encrypt": "mesh_encrypt"}),
    ("interface", {"fwmark": "mesh_fwmark", "implementation": "mesh_implementation", "persistence": "mesh_persistence"}),
    ("mesh_info", {"table": "mesh_table"})])
def test_modules_have_the_same_defaults(module, options):
    documentation = importlib.import_module("ansible_collections.kubemesh.wireguard.plugins.modules." + module).DOCUMENTATION
    described = yaml.safe_load(documentation)["options"]
    for option, variable in options.items():
        assert described[option]["default"] == DEFAULTS[variable], option


def test_the_device_of_generation_0_is_the_default_of_modules():
    described = yaml.safe_load(importlib.import_module("ansible_collections.kubemesh.wireguard.plugins.modules.interface").DOCUMENTATION)
    assert described["options"]["name"]["default"] == DEFAULTS["mesh_interface"] + "0"


# --- the role mesh_awx -------------------------------------------------------------------------------------------------------------------

AWX = REPOSITORY / "roles" / "mesh_awx"
AWX_OPTIONS = load(AWX / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]


def test_defaults_of_mesh_awx_agree():
    described = {name: option["default"] for name, option in AWX_OPTIONS.items() if "default" in option}
    assert load(AWX / "defaults" / "main.yml") == described
    assert all(name.startswith("mesh_awx_") for name in AWX_OPTIONS)


def test_variables_of_mesh_awx_are_those_of_its_specs():
    class Loader(yaml.SafeLoader):
        """Ansible's YAML."""

    Loader.add_constructor("!unsafe", lambda loader, node: None)
    used = set()
    for path in [*(AWX / "tasks").glob("*.yml"), AWX / "vars" / "main.yml"]:
        text = path.read_text(encoding="utf-8")
        yaml.load(text, Loader=Loader)
        used |= set(re.findall(r"(?<![\w.])mesh_awx_[a-z_]+(?!\w)", text))
    # Those of the filter are checked there; the list that varnames makes begins like all of them.
    used -= {"mesh_awx_"}
    assert used - set(AWX_OPTIONS) == set()
    assert set(AWX_OPTIONS) - used == set()


def test_secrets_of_mesh_awx_are_not_logged():
    """What becomes a credential, and what a module gets of it."""
    hidden = {name for name, option in AWX_OPTIONS.items() if option.get("no_log")}
    assert hidden == {"mesh_awx_kubeconfig", "mesh_awx_kubernetes_token", "mesh_awx_psk_secret", "mesh_awx_agent_token",
                      "mesh_awx_notification_configuration"}
    for task in tasks_of(load(AWX / "tasks" / "present.yml")):
        text = yaml.safe_dump({key: value for key, value in task.items() if key != "block"})
        if any(re.search(r"(?<!_)%s\b" % name, text) for name in hidden):
            assert task.get("no_log") is True, task["name"]


def test_mesh_awx_makes_a_template_for_every_playbook():
    """All but the one that makes them."""
    text = (AWX / "vars" / "main.yml").read_text(encoding="utf-8")
    templates = dict(re.findall(r"- playbook: (\w+)\n\s+entry: (\w+)", text))
    assert set(templates) == {path.stem for path in (REPOSITORY / "playbooks").glob("*.yml")} - {"awx_setup"}
    for name, entry in templates.items():
        called = re.findall(r"tasks_from: (\w+)", (REPOSITORY / "playbooks" / (name + ".yml")).read_text(encoding="utf-8"))
        assert called[0] == entry
