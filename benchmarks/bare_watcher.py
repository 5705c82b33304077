# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The least that a watcher of Nodes can do: list, watch, print when each event came. What an agent takes longer is its own work.

    bare_watcher.py HOST PORT CA_FILE TOKEN_FILE

Each line is the time of CLOCK_MONOTONIC in seconds, and the resource version that it belongs to; the first is that of the list.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from pathlib import Path


def main(host, port, ca_file, token_file):
    connection = http.client.HTTPSConnection(host, int(port), context=ssl.create_default_context(cafile=ca_file))
    headers = {"Authorization": "Bearer " + Path(token_file).read_text(encoding="ascii").strip()}
    connection.request("GET", "/api/v1/nodes", headers=headers)
    version = json.load(connection.getresponse())["metadata"]["resourceVersion"]
    sys.stdout.write("%.6f %s\n" % (time.monotonic(), version))
    sys.stdout.flush()
    connection.request("GET", "/api/v1/nodes?watch=1&resourceVersion=" + version, headers=headers)
    for line in connection.getresponse():
        version = json.loads(line)["object"]["metadata"]["resourceVersion"]
        sys.stdout.write("%.6f %s\n" % (time.monotonic(), version))
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
