# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Examples that can be copied into a play that uses the role, which refuses variables that begin with mesh_ and mean nothing to it."""

from __future__ import annotations

import glob
import os
import re

import pytest

yaml = pytest.importorskip("yaml")

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..", ".."))
FILES = sorted(glob.glob(os.path.join(ROOT, "plugins", "modules", "*.py")) + glob.glob(os.path.join(ROOT, "plugins", "filter", "*.yml")))
FILES = [path for path in FILES if os.path.basename(path) != "preshared_keys.py"]


@pytest.mark.parametrize("path", FILES, ids=os.path.basename)
def test_no_example_makes_a_variable_that_the_role_refuses(path):
    with open(os.path.join(ROOT, "roles", "mesh", "vars", "main.yml"), encoding="utf-8") as handle:
        known = set(yaml.safe_load(handle)["__mesh_known_variables"])
    with open(os.path.join(ROOT, "roles", "mesh_awx", "meta", "argument_specs.yml"), encoding="utf-8") as handle:
        known.update(yaml.safe_load(handle)["argument_specs"]["main"]["options"])
    with open(path, encoding="utf-8") as handle:
        examples = handle.read().partition("EXAMPLES")[2].partition("RETURN")[0]
    made = set(re.findall(r"register: *(mesh_\w+)", examples)) | set(re.findall(r"\{\{[^}]*?\b(mesh_\w+)", examples))
    made -= {"mesh_table", "mesh_info", "mesh_prot"}  # names of a filter and a module, and one that is to be refused
    assert made <= known
