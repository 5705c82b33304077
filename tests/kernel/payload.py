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
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "api"))

import apiserver

COLLECTION = HERE.parent.parent
GUEST_PYTHON = (3, 11)  # of Debian bookworm
# The cases of these files need systemd and reboots: each file gets a machine of its own; case_2_x runs after the first reboot. All other
# cases run in the machine that boots quickly.
SYSTEMD_FILES = ("agent", "persistence")


def case_names():
    """What each machine runs at each boot, {machine: {boot: ["file::case_x"]}}, without importing the cases."""
    machines = {"quick": {"1": []}}
    for path in sorted((HERE / "cases").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in tree.body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("case_"):
                name = "%s::%s" % (path.stem, item.name)
                if path.stem in SYSTEMD_FILES:
                    machines.setdefault(path.stem, {}).setdefault(item.name.split("_")[1], []).append(name)
                else:
                    machines["quick"]["1"].append(name)
    return machines


SKIP = shutil.ignore_patterns("__pycache__", "*.ps1", "*.psm1", "powershell", "csharp")


def bring_library(lib):
    """Make the folder lib of what Ansible sends to a node: module_utils of ansible-core and of the collection, and the modules."""
    spec = importlib.util.find_spec("ansible")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("ansible-core is not installed for %s" % sys.executable)
    ansible = pathlib.Path(next(iter(spec.submodule_search_locations)))
    (lib / "ansible").mkdir(parents=True)
    # as in what ansible-core sends to a node: of its own package only the version and module_utils
    shutil.copy(ansible / "release.py", lib / "ansible" / "release.py")
    (lib / "ansible" / "__init__.py").write_text("from ansible.release import __author__, __version__\n")
    shutil.copytree(ansible / "module_utils", lib / "ansible" / "module_utils", ignore=SKIP)
    target = lib / "ansible_collections" / "kubemesh" / "wireguard"
    target.mkdir(parents=True)
    for name in ("modules", "module_utils"):
        shutil.copytree(COLLECTION / "plugins" / name, target / "plugins" / name, ignore=SKIP)


def build(folder, boots, seconds):
    """Fill folder. boots: {number of the boot, from "1": ["file::case_x", ...]}; seconds: after that the machine has to be done."""
    folder = pathlib.Path(folder)
    bring_library(folder / "lib")
    for name in ("cluster.py", "main.py"):
        shutil.copy(HERE / name, folder / name)
    shutil.copytree(HERE / "cases", folder / "cases", ignore=SKIP)
    shutil.copy(HERE.parent / "api" / "apiserver.py", folder / "apiserver.py")
    # the machine has no openssl
    apiserver.make_certificates(folder / "tls", "127.0.0.1")
    modules = sorted(path.stem for path in (COLLECTION / "plugins" / "modules").glob("*.py") if path.stem in (
        "keypair", "interface", "routes", "probe"))
    (folder / "plan.json").write_text(json.dumps(
        {"boots": boots, "modules": modules, "deadline": time.time() + seconds}))
    (folder / "run.sh").write_text("#!/bin/sh\nexec python3 /payload/main.py\n")
    (folder / "run.sh").chmod(0o755)
    if sys.version_info[:2] == GUEST_PYTHON:
        # compiling 200 files under emulation takes 20 s; files on the payload disk keep their time, so the caches are valid there
        subprocess.run([sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(folder)], check=False,
                       stdout=subprocess.DEVNULL)
