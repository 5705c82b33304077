# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the folder that vm.py brings into the machine: the collection, ansible.module_utils, the cluster and the cases. Host side."""
from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
COLLECTION = HERE.parent.parent
GUEST_PYTHON = (3, 11)  # of Debian bookworm
# Cases that need systemd and a reboot run in a machine of their own; all others in the quick one.
SYSTEMD_BOOTS = {"1": ["persistence_before"], "2": ["persistence_after"]}


def case_files():
    names = sorted(path.stem for path in (HERE / "cases").glob("*.py") if path.stem != "__init__")
    apart = {name for boot in SYSTEMD_BOOTS.values() for name in boot}
    return {"1": [name for name in names if name not in apart]}, {
        boot: [name for name in files if name in names] for boot, files in SYSTEMD_BOOTS.items()}


def case_names(files):
    """["file::case_x"] of case files, without importing them."""
    found = []
    for name in files:
        tree = ast.parse((HERE / "cases" / (name + ".py")).read_text(encoding="utf-8"))
        found += ["%s::%s" % (name, item.name) for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("case_")]
    return found


def build(folder, boots, only=None):
    """Fill folder. boots: {"1": [case file], ...}; only: parts of case names."""
    folder = pathlib.Path(folder)
    spec = importlib.util.find_spec("ansible")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("ansible-core is not installed for %s" % sys.executable)
    ansible = pathlib.Path(next(iter(spec.submodule_search_locations)))
    lib = folder / "lib"
    skip = shutil.ignore_patterns("__pycache__", "*.ps1", "*.psm1", "powershell", "csharp")
    (lib / "ansible").mkdir(parents=True)
    # as in what ansible-core sends to a node: of its own package only the version and module_utils
    shutil.copy(ansible / "release.py", lib / "ansible" / "release.py")
    (lib / "ansible" / "__init__.py").write_text("from ansible.release import __author__, __version__\n")
    shutil.copytree(ansible / "module_utils", lib / "ansible" / "module_utils", ignore=skip)
    target = lib / "ansible_collections" / "kubemesh" / "wireguard"
    target.mkdir(parents=True)
    for name in ("modules", "module_utils"):
        shutil.copytree(COLLECTION / "plugins" / name, target / "plugins" / name, ignore=skip)
    for name in ("cluster.py", "main.py"):
        shutil.copy(HERE / name, folder / name)
    shutil.copytree(HERE / "cases", folder / "cases", ignore=skip)
    modules = sorted(path.stem for path in (COLLECTION / "plugins" / "modules").glob("*.py") if path.stem in (
        "keypair", "interface", "routes", "probe"))
    (folder / "plan.json").write_text(json.dumps({"boots": boots, "modules": modules, "only": only}))
    (folder / "run.sh").write_text("#!/bin/sh\nexec python3 /payload/main.py\n")
    (folder / "run.sh").chmod(0o755)
    if sys.version_info[:2] == GUEST_PYTHON:
        # compiling 200 files under emulation takes 20 s; files on the payload disk keep their time, so the caches are valid there
        subprocess.run([sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(folder)], check=False,
                       stdout=subprocess.DEVNULL)
