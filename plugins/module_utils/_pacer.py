# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this module util is **PRIVATE** to the collection. It can have breaking changes at any time.
# Do not use this from other collections or standalone plugins/modules!

"""When to do the next of many things, at a bounded rate.

Pure: no clock, no I/O. Times are seconds of one monotonic clock, handed in.
"""

from __future__ import annotations

import heapq


class Pacer:
    """A timetable of keys, and a token bucket that says how many packets may go now.

    :param start: time.
    :param rate: packets a second.
    :param burst: packets that may go at once after a pause.
    """

    def __init__(self, start, rate, burst):
        self.rate, self.burst = rate, float(burst)
        self.tokens, self.filled = float(burst), start
        self.times, self.heap = {}, []

    def at(self, when, key):
        """The next time for ``key``, instead of the one it had. Keys must be comparable."""
        self.times[key] = when
        heapq.heappush(self.heap, (when, key))

    def forget(self, key):
        """No next time for ``key``."""
        self.times.pop(key, None)

    def spend(self, packets):
        """So many packets went; the debt of a big portion is waited for."""
        self.tokens -= packets

    def due(self, now):
        """Iterator over the keys whose time has come, as long as packets may go; each is off the timetable when it is handed out."""
        self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        while self.tokens >= 1.0 and self._first() is not None and self.heap[0][0] <= now:
            dummy, key = heapq.heappop(self.heap)
            del self.times[key]
            yield key

    def next_time(self, now):
        """The next time at which `due` has something, None if never."""
        first = self._first()
        if first is None:
            return None
        return max(first, now + (0.0 if self.tokens >= 1.0 else (1.0 - self.tokens) / self.rate))

    def _first(self):
        # entries that were moved or forgotten stay in the heap until they come to its top
        while self.heap and self.times.get(self.heap[0][1]) != self.heap[0][0]:
            heapq.heappop(self.heap)
        return self.heap[0][0] if self.heap else None
