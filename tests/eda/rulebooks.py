# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-rulebook as the tests run it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time

# Seconds after which a test gives up: Java alone takes 20 to start on a busy machine. Nothing is judged by time.
PATIENCE = 240


def program():
    """Path of ansible-rulebook beside the Python that runs this."""
    return os.path.join(os.path.dirname(sys.executable), "ansible-rulebook")


class Rulebook:
    """ansible-rulebook while it runs; ``argv``: the whole command. ``until`` reads on in its output up to a line that has a text, and
    returns what it read; ``output`` is all that was read, ``times`` when its lines came, in seconds of the monotonic clock."""

    def __init__(self, argv, env, cwd):
        self.process = subprocess.Popen(list(map(str, argv)), env=env, cwd=str(cwd), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)
        self.lines, self.output, self.times = queue.Queue(), "", []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put((time.monotonic(), line))
        self.lines.put((time.monotonic(), None))

    def until(self, text, patience=PATIENCE):
        read = []
        while not read or text not in read[-1]:
            try:
                when, line = self.lines.get(timeout=patience)
            except queue.Empty:
                raise AssertionError("ansible-rulebook did not say %r for %d s:\n%s" % (text, patience, self.output[-6000:])) from None
            assert line is not None, "ansible-rulebook ended before it said %r:\n%s" % (text, self.output[-6000:])
            read.append(line)
            self.output += line
            self.times.append((when, line))
        return "".join(read)

    def stop(self):
        """End it as systemd would, and read the rest."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        while True:
            when, line = self.lines.get(timeout=PATIENCE)
            if line is None:
                return
            self.output += line
            self.times.append((when, line))
