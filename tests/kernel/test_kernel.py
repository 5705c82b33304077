# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel's WireGuard: every case of cases/*.py runs inside an emulated machine and is reported here as a test of its own.

Three machines boot: a quick one for all cases that need only the kernel, and two with systemd that reboot (persistence.py, agent.py).
Each boots when the first of its tests is asked for, and runs only the cases that were selected (pytest -k). Root, on Debian.
"""
from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import payload
import vm

# Seconds. On a quiet machine with 2 cores the first takes about 4 minutes and the others about 2 (see README.md); KUBEMESH_KERNEL_PATIENCE
# multiplies them on a busy one.
PATIENCE = float(os.environ.get("KUBEMESH_KERNEL_PATIENCE", "1"))
TIMEOUTS = {"quick": 420 * PATIENCE, "persistence": 270 * PATIENCE, "agent": 240 * PATIENCE}

PLANS = payload.case_names()
CASES = [(machine, name) for machine, boots in PLANS.items() for boot in sorted(boots) for name in boots[boot]]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for the disk image of the machine"),
    pytest.mark.skipif(not shutil.which("apt-get"), reason="needs a Debian system, to make the machine"),
]


def selected(request, machine):
    """The plan of a machine with only the cases that this session asks for; with a reboot, what comes before it is needed too."""
    wanted = {item.callspec.params["case"] for item in request.session.items if getattr(item, "callspec", None)}
    last = max((boot for boot, names in PLANS[machine].items() if wanted & set(names)), default="1")
    return {boot: [name for name in names if machine != "quick" or name in wanted]
            for boot, names in PLANS[machine].items() if boot <= last}


class Machines:
    """Runs each machine once, when it is first needed, and keeps what came of it."""

    def __init__(self, request, folder):
        self.request, self.folder, self.done = request, folder, {}

    def result(self, machine, case):
        """{"outcome", "message", "notes", "seconds"} of a case."""
        if machine not in self.done:
            self.done[machine] = self.run(machine)
        results, trouble = self.done[machine]
        if case not in results:
            return {"outcome": "failed", "message": trouble or "did not run, as a case before it failed", "notes": {}, "seconds": 0}
        return results[case]

    def run(self, machine):
        boots = selected(self.request, machine)
        brought, results = self.folder / machine, self.folder / (machine + "-results")
        brought.mkdir()
        # 30 s: to boot, to bring the results out and to end
        payload.build(brought, boots, TIMEOUTS[machine] - 30)
        trouble = ""
        try:
            outcome = vm.run(brought, results=results, systemd=machine != "quick", reboots=len(boots) - 1, timeout=TIMEOUTS[machine])
            print("machine %s: %.0f s, %.0f s of processor time" % (machine, outcome.seconds, outcome.cpu_seconds))
            if outcome.rc:
                trouble = "the payload ended with %d; end of the console:\n%s" % (outcome.rc, outcome.console[-3000:])
        except vm.VMError as exc:
            trouble = str(exc)
        finally:
            shutil.rmtree(brought, ignore_errors=True)
        path = results / "results.json"
        return (json.loads(path.read_text())["cases"] if path.exists() else {}), trouble


@pytest.fixture(scope="session")
def machines(request, tmp_path_factory):
    return Machines(request, tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize(("machine", "case"), CASES, ids=[name for dummy, name in CASES])
def test_kernel(machines, machine, case, record_property):
    result = machines.result(machine, case)
    for name, value in result["notes"].items():
        record_property(name, json.dumps(value))
        print("%s: %s" % (name, value))
    if result["outcome"] == "skipped":
        pytest.skip(result["message"])
    assert result["outcome"] == "passed", result["message"]
