# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A node with nftables for unit tests: it holds one table, takes what `_guard_plan` writes, and prints as nft does.

It refuses what the kernel refuses: elements that overlap, the removal of what is not there, a transaction of which a part fails. The rules
are only kept, nothing is filtered; tests/live sends packets through the real ones.
"""

from __future__ import annotations

import copy
import json
import re

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _guard_plan as plan
from ansible_collections.kubemesh.wireguard.tests.unit.plugins.module_utils.node_fakes import Node, Refused

NO_SUCH_TABLE = "Error: No such file or directory\nlist table inet kubemesh_guard\n                ^^^^^^^^^^^^^^"


class NftNode(Node):
    """``table``: None or {"flags": text, "counters": {}, "sets": {name: {"head": [...], "elements": [...]}}, "chains": {name: [lines]}}."""

    def __init__(self, tools_missing=()):
        super().__init__(tools_missing)
        self.table = None
        self.refuse_deltas = False  # as versions do that see overlaps in one transaction
        self.spoil_deltas = False  # as none does that we know
        self.kernel_error = ""
        self.scratch = []  # what was loaded in a namespace of its own

    def _unshare(self, words, data):
        if words[:3] != ["--net", "sh", "-c"] or words[5] != plan.TABLE:
            raise AssertionError("unshare " + " ".join(words))
        if self.kernel_error:
            raise Refused(self.kernel_error)
        self.scratch.append(data)
        return as_json(after(None, data))

    def _nft(self, words, data):
        if words == ["-f", "-"]:
            delta = data.startswith(("add element", "delete element"))
            if delta and self.refuse_deltas:
                raise Refused("Error: interval overlaps with an existing one")
            table = after(self.table, data)
            self._change("nft", "elements" if delta else "remove" if table is None else "load")
            if not (delta and self.spoil_deltas):
                self.table = table
            return ""
        if words[:2] == ["-j", "list"] and words[-2:] == ["inet", plan.TABLE]:
            if self.table is None:
                raise Refused(NO_SUCH_TABLE)
            return as_json(self.table, counters_only=words[2] == "counters")
        raise AssertionError("nft " + " ".join(words))

    def count(self, name, packets, size):
        """Packets are dropped."""
        self.table["counters"][name]["packets"] += packets
        self.table["counters"][name]["bytes"] += size


def after(table, text):
    """The table after one transaction; raises Refused, and then nothing has happened."""
    table = copy.deepcopy(table)
    lines = [line.split("#")[0].rstrip() for line in text.splitlines()]
    lines = iter([line for line in lines if line.strip()])
    for line in lines:
        element = re.fullmatch(r"(add|delete) element inet kubemesh_guard (\w+) { (.*) }", line)
        if element:
            if table is None:
                raise Refused(NO_SUCH_TABLE)
            change_elements(table["sets"][element.group(2)], element.group(1), element.group(3).split(", "))
        elif line == "table inet kubemesh_guard {}":
            table = table or {"flags": "", "counters": {}, "sets": {}, "chains": {}}
        elif line == "delete table inet kubemesh_guard":
            if table is None:
                raise Refused(NO_SUCH_TABLE)
            table = None
        elif line == "table inet kubemesh_guard {":
            table = table or {"flags": "", "counters": {}, "sets": {}, "chains": {}}
            table_block(table, lines)
        else:
            raise Refused("Error: syntax error: %s" % line)
    return table


def table_block(table, lines):
    for line in lines:
        if line == "}":
            return
        counter = re.fullmatch(r"\tcounter (\w+) { packets (\d+) bytes (\d+) }", line)
        block = re.fullmatch(r"\t(set|chain) (\w+) {", line)
        if counter:
            table["counters"][counter.group(1)] = {"packets": int(counter.group(2)), "bytes": int(counter.group(3))}
        elif block:
            body = [each.strip() for each in iter(lambda: next(lines), "\t}")]
            if block.group(1) == "chain":
                table["chains"][block.group(2)] = body
                continue
            inner = body.index("elements = {") if "elements = {" in body else len(body)
            table["sets"][block.group(2)] = {"head": body[:inner], "elements": []}
            elements = [each.rstrip(",") for each in body[inner + 1:-1]]
            if elements:
                change_elements(table["sets"][block.group(2)], "add", elements)
        else:
            raise Refused("Error: syntax error: %s" % line)
    raise Refused("Error: syntax error, unexpected end of file")


def change_elements(target, verb, texts):
    for text in texts:
        element = parsed(target, text)
        if verb == "delete":
            if element not in target["elements"]:
                raise Refused("Error: Could not process rule: No such file or directory")
            target["elements"].remove(element)
        else:
            if any(plan.overlap(element, other) if isinstance(element, tuple) else element == other for other in target["elements"]):
                raise Refused("Error: interval overlaps with an existing one")
            target["elements"].append(element)


def parsed(target, text):
    if "flags interval" not in target["head"]:
        return text.strip('"')
    first, dummy, last = text.partition("-")
    return plan.interval(first)[:2] + (plan.interval(last)[2],) if last else plan.interval(text)


def printed(target, element):
    if isinstance(element, str):
        return int(element) if target["head"] == ["type inet_service"] else element
    text = plan.interval_text(element)
    if "-" in text:
        return {"range": text.split("-")}
    if "/" in text:
        return {"prefix": {"addr": text.split("/")[0], "len": int(text.split("/")[1])}}
    return text


def as_json(table, counters_only=False):
    """As nft prints a table. The expressions of a rule are kept as text; ours and those of the reference are printed alike."""
    def item(kind, name, **other):
        items.append({kind: dict({"family": "inet", "table": plan.TABLE, "name": name, "handle": len(items)}, **other)})

    items = [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}}]
    if not counters_only:
        items.append({"table": dict({"family": "inet", "name": plan.TABLE, "handle": 7}, **(
            {"flags": table["flags"]} if table["flags"] else {}))})
    for name, counts in table["counters"].items():
        item("counter", name, **counts)
    if counters_only:
        return json.dumps({"nftables": items})
    for name, target in table["sets"].items():
        elements = [printed(target, element) for element in sorted(target["elements"])]
        item("set", name, type=target["head"][0].split()[1], **dict(
            {"flags": ["interval"]} if "flags interval" in target["head"] else {}, **({"elem": elements} if elements else {})))
    for name, lines in table["chains"].items():
        hook = re.fullmatch(r"type filter hook (\w+) priority (-?\d+); policy accept;", lines[0]) if lines else None
        item("chain", name, **({"type": "filter", "hook": hook.group(1), "prio": int(hook.group(2)), "policy": "accept"} if hook else {}))
        for line in lines[1 if hook else 0:]:
            items.append({"rule": {"family": "inet", "table": plan.TABLE, "chain": name, "handle": len(items), "expr": [{"text": line}]}})
    return json.dumps({"nftables": items})
