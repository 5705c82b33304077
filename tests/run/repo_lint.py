# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Rules of this repository that no public linter knows: one line per finding, exit 1 when there is one.

headers     licence header of every source file, and C(from __future__ import annotations) in every Python file
imports     what runs on nodes imports the standard library, C(ansible.module_utils) and this collection only
pure        what docs/architecture.md calls pure imports nothing that does I/O or reads a clock
catalogue   modules, playbooks, role variables: code, metadata, argument specs and README name the same ones
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import yaml
from prepare import REPOSITORY, tracked_files

SPDX = "SPDX-License-Identifier: GPL-3.0-or-later"
COPYRIGHT = "Copyright (c) 2026, Kubemesh contributors"
LICENCE = "GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)"
HEADER = (COPYRIGHT, LICENCE, SPDX)
HEADED_SUFFIXES = (".py", ".yml", ".yaml", ".toml", ".sh", ".rst", ".c")
HEADED_NAMES = ("Makefile", ".gitignore", "run")

# Written by a tool, or recorded as it came.
UNHEADED = ("CHANGELOG.rst", "changelogs/changelog.yaml", "tests/unit/fixtures/", "tests/kernel/recorded/")

# What a file that is called pure may not import: all of it does I/O, reads a clock or rolls dice.
IMPURE = {
    "asyncio", "datetime", "fcntl", "glob", "http", "io", "multiprocessing", "os", "pathlib", "random", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "urllib",
}

# Plain conversions in an otherwise impure module.
HARMLESS = {"socket": {"AF_INET", "AF_INET6", "inet_ntop", "inet_pton"}}

# Variables of the playbooks rather than of the role, and variables that the role sets for its own modules.
PLAYBOOK_VARIABLES = {"mesh_hosts"}
PRIVATE_VARIABLES = {"mesh_node_facts", "mesh_run_summary"}

CONTROLLER_MARK = re.compile(r"controller[ -]only", re.IGNORECASE)


def python_files(*directories):
    """Paths (relative to the repository) of the Python files below DIRECTORIES."""
    return [name for name in tracked_files() if name.suffix == ".py" and name.as_posix().startswith(directories)]


def check_headers():
    """Yield a finding for each source file without the licence header or the future import."""
    for name in tracked_files():
        path = name.as_posix()
        if path.startswith(UNHEADED) or not (name.suffix in HEADED_SUFFIXES or name.name in HEADED_NAMES):
            continue
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        if not text.strip() and name.name == "__init__.py":
            continue
        head = "\n".join(text.splitlines()[:8])
        for line in HEADER:
            if line not in head:
                yield f"{path}: the first lines lack '{line}'"
        if name.suffix == ".py":
            if "# -*- coding: utf-8 -*-" not in head:
                yield f"{path}: the first lines lack '# -*- coding: utf-8 -*-'"
            if "\nfrom __future__ import annotations\n" not in text:
                yield f"{path}: lacks 'from __future__ import annotations'"


def imported_modules(tree):
    """Yield (line number, full dotted name) of each absolute import in a parsed file, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def guarded_lines(tree):
    """The line numbers inside C(try) bodies that catch ImportError: an optional library may be imported there."""
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try):
            continue
        caught = {name.id for handler in node.handlers if handler.type for name in ast.walk(handler.type) if isinstance(name, ast.Name)}
        if caught & {"ImportError", "ModuleNotFoundError", "Exception"}:
            for statement in node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def attributes_of(tree, module):
    """The names that a parsed file uses of an imported module."""
    used = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == module}


def check_imports():
    """Yield a finding for each import that a node with Python and its standard library alone cannot satisfy."""
    allowed = ("ansible.module_utils", "ansible_collections.kubemesh.wireguard.plugins.module_utils")
    for name in python_files("plugins/modules/", "plugins/module_utils/"):
        tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"), filename=str(name))
        if CONTROLLER_MARK.search(ast.get_docstring(tree) or ""):
            continue
        guarded = guarded_lines(tree)
        for line, module in imported_modules(tree):
            if module.startswith(allowed) or module.split(".")[0] in sys.stdlib_module_names or line in guarded:
                continue
            yield f"{name}:{line}: imports {module}: nodes have the standard library only (a docstring may say controller-only)"


def pure_files():
    """The file names that the table in docs/architecture.md calls pure without reservation."""
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`_[^|]*) \| yes \|", text, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(_\w+\.py)`", row)}


def check_pure():
    """Yield a finding for each import of I/O, a clock or chance, and each call of open(), in a file that is called pure."""
    pure = pure_files()
    if not pure:
        yield "docs/architecture.md: its table of files names no pure file: has its form changed?"
    for name in python_files("plugins/module_utils/"):
        if name.name not in pure:
            continue
        tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"), filename=str(name))
        for line, module in imported_modules(tree):
            if module in HARMLESS and attributes_of(tree, module) <= HARMLESS[module]:
                continue
            if module.split(".")[0] in IMPURE or module.startswith("ansible.module_utils"):
                yield f"{name}:{line}: imports {module}, but docs/architecture.md calls this file pure"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print"):
                yield f"{name}:{node.lineno}: calls {node.func.id}(), but docs/architecture.md calls this file pure"


def load_yaml(path):
    """The content of a YAML file of the repository, or an empty dictionary where there is none."""
    full = REPOSITORY / path
    return (yaml.safe_load(full.read_text(encoding="utf-8")) or {}) if full.is_file() else {}


def readme_section(title):
    """The text of the README between the heading TITLE and the next heading of any level."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else ""


def table_names(title):
    """The names in backquotes in the first column of the README's table below TITLE."""
    rows = re.findall(r"^\| ([^|]*) \|", readme_section(title), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def compare(what, left_name, left, right_name, right):
    """Yield a finding for each name that only one of two places has."""
    for name in sorted(left - right):
        yield f"{what} {name}: in {left_name}, not in {right_name}"
    for name in sorted(right - left):
        yield f"{what} {name}: in {right_name}, not in {left_name}"


def check_catalogue():
    """Yield a finding for each module, playbook or variable that one place names and another does not, or gives another default."""
    modules = {path.stem for path in (REPOSITORY / "plugins/modules").glob("*.py")}
    group = set(load_yaml("meta/runtime.yml")["action_groups"]["mesh"])
    yield from compare("module", "plugins/modules", modules, "meta/runtime.yml", group)
    yield from compare("module", "plugins/modules", modules, "README.md", table_names("Modules"))
    playbooks = {path.stem for path in (REPOSITORY / "playbooks").glob("*.yml")}
    yield from compare("playbook", "playbooks", playbooks, "README.md", table_names("Playbooks"))
    role = "roles/mesh"
    defaults = load_yaml(f"{role}/defaults/main.yml")
    options = {}
    for entry in (load_yaml(f"{role}/meta/argument_specs.yml").get("argument_specs") or {}).values():
        options.update(entry.get("options") or {})
    public = {name for name in defaults if not name.startswith("_")}
    documented = {name for name in options if name.startswith("mesh_")}
    for name in sorted(public - documented):
        yield f"variable {name}: in {role}/defaults/main.yml, not in {role}/meta/argument_specs.yml"
    for name in sorted(public & documented):
        stated, real = options[name].get("default"), defaults[name]
        # A default that is an expression cannot be stated in an argument spec.
        if stated != real and not (isinstance(real, str) and "{{" in real):
            yield f"variable {name}: default {real!r} in {role}/defaults/main.yml, {stated!r} in {role}/meta/argument_specs.yml"
    known = set(load_yaml(f"{role}/vars/main.yml").get("__mesh_known_variables") or []) - PRIVATE_VARIABLES
    for place, names in ((f"{role}/vars/main.yml", known), ("README.md", table_names("Variables"))):
        yield from compare("variable", f"{role}/meta/argument_specs.yml", documented | PLAYBOOK_VARIABLES, place, names)


def main():
    """Run all rules; 0 when nothing was found."""
    findings = [finding for rule in (check_headers, check_imports, check_pure, check_catalogue) for finding in rule()]
    for finding in findings:
        print(finding)
    print(f"{len(tracked_files())} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
