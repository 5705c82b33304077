# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The benchmarks behind C(make bench), one after the other: what they print is for people, and the last line of each is JSON.

They are no tests: they judge time, and what a machine does beside them is part of the result. benchmarks/README.md tells how to read them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import prepare

# What needs ansible-rulebook, and with it Java, comes last.
BENCHMARKS = {"agent_latency": prepare.venv_run, "agent_memory": prepare.venv_run, "eda_latency": prepare.venv_eda}


def main():
    """Parse the command line, run, and end with 1 if one could not measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the least that shows that they work; the figures mean nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    if os.geteuid() != 0:
        sys.exit("bench: needs root: network namespaces belong to root")
    prepare.debian_packages("iproute2", "nftables", "openssl", "wireguard-go", "wireguard-tools")
    failed = []
    with tempfile.TemporaryDirectory(prefix="kubemesh-bench-") as work:
        tree = prepare.copy_tree(work)
        for name in arguments.names or BENCHMARKS:
            venv = BENCHMARKS[name]()
            collections = f"{work}{os.pathsep}{prepare.other_collections(venv / 'bin' / 'python')}"
            env = dict(os.environ, PYTHONPATH=work, ANSIBLE_COLLECTIONS_PATH=collections, KUBEMESH_LAB_VENV=str(venv))
            command = [venv / "bin" / "python", tree / "benchmarks" / f"{name}.py", *(["--quick"] if arguments.quick else [])]
            print(f"== {name}", flush=True)
            if subprocess.run(command, env=env, check=False).returncode:
                failed.append(name)
    if failed:
        print(f"bench: {', '.join(failed)} could not be measured", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
