# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The findings of all nodes as one table."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _preflight
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import untrusted_results

FIELDS = ("level", "check", "node", "message", "remedy")


def findings_table(findings, width=120):
    """Lines of text for people; see the documentation beside this file."""
    if not isinstance(findings, (list, tuple)):
        raise AnsibleFilterError("findings_table: expected a list of findings, got %s" % type(findings).__name__)
    for item in findings:
        if not isinstance(item, dict) or any(not isinstance(item.get(field), str) for field in FIELDS):
            raise AnsibleFilterError("findings_table: a finding has the texts %s" % ", ".join(FIELDS))
        if item["level"] not in _preflight.LEVELS:
            raise AnsibleFilterError("findings_table: level %r is none of %s" % (item["level"], ", ".join(_preflight.LEVELS)))
    return _preflight.findings_table([dict(item) for item in findings], int(width))


class FilterModule:
    """Filters of this file."""

    def filters(self):
        return untrusted_results({"findings_table": findings_table})
