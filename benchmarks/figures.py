# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks share: what was measured as text, and on what machine."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import statistics
import sys


def end_in_order():
    """Have a termination be as Ctrl-C: namespaces and hosts that were made are removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def say(text=""):
    """A line for the person who reads."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def progress(text):
    """A line for the person who waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def machine():
    """The machine and what else it does, for every report: a figure of a busy machine says little about a quiet one."""
    return "%d cores, load %s, Linux %s, Python %s" % (
        os.cpu_count(), "/".join("%.1f" % value for value in os.getloadavg()), platform.release(), platform.python_version())


def spread(values):
    """``{"count", "median", "p90", "worst"}`` of numbers; there must be one."""
    ordered = sorted(values)
    p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
    return {"count": len(ordered), "median": statistics.median(ordered), "p90": p90, "worst": ordered[-1]}


def verdict(measured, goal):
    """``met`` or ``missed``, for a goal that is a most."""
    return "met" if measured <= goal else "missed"


def table(heads, rows):
    """Rows of text below heads, aligned; the first column to the left, the others to the right."""
    lines = [list(map(str, line)) for line in [heads, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(
        text.ljust(width) if column == 0 else text.rjust(width)
        for column, (text, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def done(name, figures):
    """The last line of a benchmark: everything as JSON, for programs."""
    say(json.dumps(dict(figures, benchmark=name, machine=machine()), sort_keys=True))
