# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pattern in extensions/patterns: its format, and that it cannot differ from the role and from what awx_setup makes.

The published schema (ansible/pattern-service, pattern-schema 3.0.0) is not part of this repository; what it asks for is checked by hand.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re

import pytest

pytest.importorskip("ansible.errors")
yaml = pytest.importorskip("yaml")

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def generator():
    spec = importlib.util.spec_from_file_location("pattern_generator", REPOSITORY / "tests" / "run" / "pattern.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = generator()
PATTERN = json.loads((WRITER.PATTERN / "meta" / "pattern.json").read_text(encoding="utf-8"))
TEMPLATES = PATTERN["aap_resources"]["controller_job_templates"]


@pytest.mark.parametrize("name", sorted(WRITER.files()))
def test_it_is_what_the_role_says(name):
    text = (WRITER.PATTERN / name).read_text(encoding="utf-8")
    assert text == WRITER.files()[name], "run tests/run/pattern.py"


def test_the_definition_has_what_the_schema_asks_for():
    for field in ("schema_version", "name", "title", "description", "short_description"):
        assert isinstance(PATTERN[field], str) and PATTERN[field]
    assert PATTERN["name"] == WRITER.PATTERN.name and re.fullmatch(r"[a-z0-9_]{1,64}", PATTERN["name"])
    assert len(PATTERN["title"]) <= 64 and not PATTERN["short_description"].endswith(".")
    assert set(PATTERN["aap_resources"]["controller_project"]) == {"name", "description"}
    assert re.fullmatch(r"[a-z0-9]+/[a-z0-9-]+", PATTERN["aap_resources"]["controller_execution_environment"]["image_name"])
    assert len([item for item in TEMPLATES if item.get("primary")]) == 1
    for item in TEMPLATES:
        assert {"name", "description", "playbook", "survey"} <= set(item) and len(item["name"]) <= 200
        for asked in item["survey"]["spec"]:
            assert {"type", "question_name", "question_description", "variable", "required"} <= set(asked)
            assert re.fullmatch(r"[a-z0-9_]{1,64}", asked["variable"])
            assert all(isinstance(choice, str) for choice in asked.get("choices", []))
            assert "choices" in asked or asked["type"] in ("integer", "float")


def test_each_template_has_its_playbook():
    folder = WRITER.PATTERN / "playbooks"
    assert {item["playbook"] for item in TEMPLATES} == {path.name for path in folder.glob("*.yml") if ".meta" not in path.name}
    for item in TEMPLATES:
        play = yaml.safe_load((folder / item["playbook"]).read_text(encoding="utf-8"))
        # The project is the artifact, so its files are beside each other whatever collections the execution environment has.
        imported = [(folder / entry["ansible.builtin.import_playbook"]).resolve() for entry in play]
        assert imported == [REPOSITORY / "playbooks" / item["playbook"]] and imported[0].exists()
        assert item["name"] in (WRITER.PATTERN / "README.md").read_text(encoding="utf-8")


def test_templates_are_those_of_awx_setup():
    """The same playbooks, the same prompts and limits."""
    tasks = WRITER.load("roles/mesh_awx/tasks/present.yml")
    made = next(task["awx.awx.job_template"] for task in tasks if "awx.awx.job_template" in task)
    # In a pattern the inventory and the credentials are chosen at each launch.
    chosen = ("ask_credential_on_launch", "ask_inventory_on_launch")
    same = {key: value for key, value in WRITER.OF_EVERY_TEMPLATE.items() if key not in chosen}
    assert {key: made[key] for key in same} == same
    assert {key for key in made if key.startswith("ask_")} == {key for key in same if key.startswith("ask_")}
