# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When the kernel of a node was changed, by what the kernel itself says: nothing is polled while something is measured."""

from __future__ import annotations

import datetime
import subprocess
import threading
import time

# Seconds after which a change counts as lost.
PATIENCE = 30.0


class Lines(threading.Thread):
    """What a process prints, line by line."""

    def __init__(self, command):
        super().__init__(daemon=True)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self.lines, self.more = [], threading.Condition()
        self.start()

    def run(self):
        for line in self.process.stdout:
            with self.more:
                self.lines.append(line)
                self.more.notify_all()

    def find(self, ready, begin=0, seconds=PATIENCE):
        """What ``ready(line)`` says, of the first line from number ``begin`` on where that is anything; `TimeoutError`."""
        deadline, number = time.monotonic() + seconds, begin
        with self.more:
            while True:
                for line in self.lines[number:]:
                    number += 1
                    found = ready(line)
                    if found is not None:
                        return found
                if not self.more.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise TimeoutError("%s did not print what was waited for; at last: %s" % (self.process.args, self.lines[-3:]))

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=10)


def monitor(namespace):
    """What the kernel says of routes and rules in a network namespace, with its own wall clock."""
    lines = Lines(["ip", "-4", "-tshort", "-n", namespace, "monitor", "route", "rule"])
    time.sleep(0.2)  # it says nothing when it has begun to listen
    return lines


def seen_at(line, text, gone):
    """Seconds of the wall clock at which a line of `monitor` told of a route or a rule with this text, or None."""
    if text not in line or ("Deleted" in line) != gone:
        return None
    return datetime.datetime.fromisoformat(line[1:line.index("]")]).timestamp()
