# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The quality gate: every check there is, fast ones first, one line each, and C(N passed, N failed) at the end.

    gate.py             all checks
    gate.py NAME ...    the named checks, or groups of checks
    gate.py --list      names, groups and what each one does

Each check has its log in C(tests/output/NAME.log); the end of the log of a check that failed is printed. The exit status is 1 when anything
failed, and 2 when a check could not even be started for a reason that is not the code's.
Checks that use one core run two at a time where the machine has two; those that measure traffic have it to themselves. What only computes
runs behind the latter, on what they leave of the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import checks
from checks import CHECKS, Failed, Skipped
from prepare import REPOSITORY, PrepareError

OUTPUT = REPOSITORY / "tests" / "output"

# Lines of a failed check's log that are shown. The whole log stays in the output directory.
TAIL_LINES = 60

# Failed tests that are named at the end.
FAILURES_SHOWN = 20

# Seconds between the polite signal and the other one: enough for a test run to take its network namespaces down.
GRACE = 60


class Context:
    """What a check gets: where to work, where to log, and a way to run programs that ends with the gate.

    C(work) is a directory of its own that is removed afterwards, C(output) the directory of logs and reports.
    """

    def __init__(self, check, gate):
        self.name = check.name
        self.output = OUTPUT
        self.work = gate.work / check.name
        self.work.mkdir(parents=True)
        self.shared = gate
        self.deadline = time.monotonic() + check.timeout
        # chrt(1): SCHED_IDLE runs where nothing else wants to, so that what is measured beside it has the machine as if alone.
        self.prefix = ["chrt", "--idle", "0"] if check.background and shutil.which("chrt") else []
        self.log_path = OUTPUT / f"{check.name}.log"
        self._log = open(self.log_path, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close()
        self._process = None

    def log(self, text):
        """Write a line to the log of the check."""
        self._log.write(f"{text}\n")
        self._log.flush()

    def run(self, command, *, cwd=None, env=None, ok=(0,)):
        """Run a program, its output into the log. Returns its exit status; Failed when that is not among C(ok) or time is up."""
        command = [*self.prefix, *(str(item) for item in command)]
        self.log("$ " + " ".join(command))
        self._process = subprocess.Popen(
            command,
            cwd=str(cwd or REPOSITORY),
            env={**os.environ, **{key: str(value) for key, value in (env or {}).items()}},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if self.prefix:
            # Where sessions are scheduled as groups, they all get the same, whatever their processes' priority is: sched(7), autogroup.
            with contextlib.suppress(OSError):
                Path(f"/proc/{self._process.pid}/autogroup").write_text("19", encoding="ascii")
        try:
            status = self._process.wait(timeout=max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            raise Failed(f"{command[0]} did not end in time and was stopped") from None
        finally:
            self._process = None
        if status not in ok:
            raise Failed(f"{Path(command[0]).name} ended with {status}")
        return status

    def said(self):
        """The last lines of the log, those of its commands left out."""
        self._log.flush()
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line[:checks.LINE_TEXT] for line in lines if line.strip() and not line.startswith("$ ")][-checks.FAILURE_LINES:]

    def stop(self):
        """End the program that runs now, and what it started: politely, so that it can clean up, then for good."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        for number, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=patience)
                break
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):
            # What outlived the program that started it: background jobs of a shell ignore the first signal.
            os.killpg(process.pid, signal.SIGKILL)

    def close(self):
        """Close the log and remove the work directory."""
        self._log.close()
        shutil.rmtree(self.work, ignore_errors=True)


class Gate:
    """Runs checks in their order, as many at a time as the machine has cores for them."""

    def __init__(self, wanted, left_out=()):
        self.wanted = wanted
        self.left_out = left_out
        self.work = Path(tempfile.mkdtemp(prefix="kubemesh-gate-"))
        self.cores = min(os.cpu_count() or 1, 2)
        self.free = self.cores
        # Running checks that are not behind all others, and whether one of them has the machine to itself.
        self.in_front, self.alone = 0, False
        self.turn = threading.Condition()
        self.running = {}
        self.passed = self.failed = self.skipped = 0
        self.failures = []
        self.stopped = False
        self.width = max(len(check.name) for check in wanted)
        # Values that several checks need and one makes, see checks.once().
        self.values = {}
        self.value_locks = {}

    def report(self, check, verdict, seconds, note):
        """Print the one line of a check."""
        print(f"{check.name:<{self.width}}  {verdict:<7}  {seconds:6.1f} s  {note}".rstrip(), flush=True)

    def one(self, check):
        """Run one check and count it."""
        started = time.monotonic()
        context = Context(check, self)
        with self.turn:
            self.running[check.name] = context
        passed, failed, skipped, note, verdict, failures = 0, 1, 0, "", "FAILED", []
        try:
            result = check.function(context) or checks.Result()
            passed, failed, skipped, note = result.passed, result.failed, result.skipped, result.note()
            verdict = "FAILED" if failed else "ok"
        except Skipped as reason:
            passed, failed, skipped, note, verdict = 0, 0, 1, str(reason), "skipped"
        except Failed as reason:
            result = reason.result
            passed, failed, skipped = result.passed, max(result.failed, 1), result.skipped
            note = f"{reason}"
            failures = result.failures or [("", "\n".join([str(reason), *context.said()]))]
            context.log(str(reason))
        except PrepareError as reason:
            note = str(reason).splitlines()[0]
            context.log(str(reason))
        except Exception:  # a broken check is a failed check, and the others still run
            note = "the check itself broke"
            context.log(traceback.format_exc())
        finally:
            context.close()
        with self.turn:
            self.passed += passed
            self.failed += failed
            self.skipped += skipped
            self.report(check, verdict, time.monotonic() - started, note)
            if failed:
                self.failures += [(check.name, *failure) for failure in failures or [("", note)]]
                lines = context.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
                print("".join(f"    | {line[:checks.LINE_TEXT]}\n" for line in lines[-TAIL_LINES:]), end="", flush=True)
                print(f"    whole log: {context.log_path.relative_to(REPOSITORY)}", flush=True)
            del self.running[check.name]
            if not check.background:
                self.free += min(check.cores, self.cores)
                self.in_front -= 1
                self.alone = False
            self.turn.notify_all()

    def behind(self, wanted):
        """Run checks one after the other, beside all others."""
        for check in wanted:
            if not self.stopped:
                self.one(check)

    def run(self):
        """Run all wanted checks; the exit status."""
        threads = []
        try:
            background = threading.Thread(target=self.behind, args=([check for check in self.wanted if check.background],))
            threads.append(background)
            for check in self.wanted:
                if check.background:
                    continue
                need = min(check.cores, self.cores)
                # What comes has the machine to itself, and until it has, there is room for what runs behind all others.
                if need == self.cores and not background.ident:
                    background.start()
                with self.turn:
                    self.turn.wait_for(lambda need=need: self.free >= need and not self.alone and (need < self.cores or not self.in_front))
                    self.alone = need == self.cores
                    self.free -= need
                    self.in_front += 1
                thread = threading.Thread(target=self.one, args=(check,))
                thread.start()
                threads.append(thread)
            if not background.ident:
                background.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stopped = True
            for context in list(self.running.values()):
                context.stop()
            for thread in threads:
                if thread.ident:
                    thread.join()
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        for check in self.left_out:
            self.skipped += 1
            self.report(check, "skipped", 0, f"not part of all: run it by name, {check.name}")
        # Once more at the end: the log of a long run is often cut, and what failed is what is looked for.
        for name, test, message in self.failures[:FAILURES_SHOWN]:
            print(f"failed: {name} {test}")
            print("".join(f"    | {line}\n" for line in message.splitlines()), end="")
        if self.stopped:
            print("interrupted: the checks after this one did not run", flush=True)
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        print(f"{self.passed} passed, {self.failed} failed{skipped}", flush=True)
        return 1 if self.failed or self.stopped or not self.passed else 0


# Groups that "all" leaves out: there is no time for them in 30 minutes on two cores. They are run by name, and count as skipped.
BY_NAME_ONLY = (
    "awx", "eda", "kernel-boot", "lab-agent", "lab-change", "lab-runner", "lab-self", "lab-variants", "live-agent", "other-core")


def choose(names):
    """The checks that NAMES mean, in the order of the gate. Exits with a message for an unknown name."""
    known = {check.name for check in CHECKS} | {check.group for check in CHECKS} | {"all"}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"gate: unknown check {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [
        check for check in CHECKS
        if ("all" in names and check.group not in BY_NAME_ONLY) or check.name in names or check.group in names]


def main():
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["all"], metavar="NAME", help="checks or groups of checks (default: all)")
    parser.add_argument("--list", action="store_true", help="show all checks and end")
    arguments = parser.parse_args()
    if arguments.list:
        for check in CHECKS:
            print(f"{check.group:<8} {check.name:<18} {(check.function.__doc__ or '').splitlines()[0]}")
        return 0
    # A termination is treated as Ctrl-C is: network namespaces and nodes of a running test must be taken down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    OUTPUT.mkdir(exist_ok=True)
    left_out = [check for check in CHECKS if check.group in BY_NAME_ONLY] if "all" in arguments.names else []
    return Gate(choose(arguments.names), left_out).run()


if __name__ == "__main__":
    sys.exit(main())
