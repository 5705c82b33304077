# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the cases inside the machine of vm.py and leaves results.json in KM_RESULTS; see test_kernel.py for the host's side.

A case is a function case_* in cases/*.py that takes an Env and raises when something is wrong. results.json:
{"cases": {"file::case_x": {"outcome": "passed" | "failed" | "skipped", "message": text, "seconds": number, "notes": {...}}}}
"""
from __future__ import annotations

import importlib
import json
import os
import pathlib
import signal
import sys
import time
import traceback

CASE_SHARE = 0.5  # of the time that is left: a case that hangs must not take all others with it


def _too_long(*dummy):
    raise TimeoutError("the case took half of the time that was left for all cases of the machine")


class Skip(Exception):
    """What a case needs is not here; the text says what."""


class Env:
    """What a case gets: notes(name=value) for numbers that go into the report; `boot`, 1 before and 2 after the reboot."""

    Skip = Skip

    def __init__(self, boot):
        self.boot = boot
        self.noted = {}

    def note(self, **values):
        self.noted.update(values)
        for name, value in values.items():
            print("      %s: %s" % (name, value), flush=True)


def cases_of(names):
    for name in names:
        file, function = name.split("::")
        yield name, getattr(importlib.import_module("cases." + file), function)


def main():
    here = pathlib.Path(__file__).resolve().parent
    sys.path.insert(0, str(here))
    plan = json.loads((here / "plan.json").read_text())
    results = pathlib.Path(os.environ["KM_RESULTS"])
    boot = int(os.environ.get("KM_BOOT", "1"))
    path = results / "results.json"
    done = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    os.system("modprobe -a wireguard veth bridge tun dummy nf_tables nf_conntrack nft_masq nft_chain_nat 2>/dev/null")
    import cluster

    start = time.monotonic()
    cluster.preload(plan["modules"])
    done["preload_seconds"] = round(time.monotonic() - start, 2)
    for name, function in cases_of(plan["boots"][str(boot)]):
        env = Env(boot)
        start = time.monotonic()
        outcome, message = "passed", ""
        signal.signal(signal.SIGALRM, _too_long)
        # the clock of the machine is set from the host's at boot
        signal.alarm(max(10, int((plan["deadline"] - time.time()) * CASE_SHARE)))
        try:
            function(env)
        except Skip as exc:
            outcome, message = "skipped", str(exc)
        except BaseException as exc:
            # What went wrong first: a summary shows only the beginning.
            outcome, message = "failed", "%s: %s\n%s" % (type(exc).__name__, exc, traceback.format_exc())
        signal.alarm(0)
        seconds = round(time.monotonic() - start, 2)
        print("%-7s %6.1f s  %s" % (outcome, seconds, name), flush=True)
        if outcome == "failed":
            print(message, flush=True)
        done["cases"][name] = {"outcome": outcome, "message": message, "seconds": seconds, "notes": env.noted}
        path.write_text(json.dumps(done, indent=1))
    failed = any(case["outcome"] == "failed" for case in done["cases"].values())
    if str(boot + 1) in plan["boots"] and not failed:
        pathlib.Path(os.environ["KM_REBOOT"]).write_text("")
    return 0


if __name__ == "__main__":
    sys.exit(main())
