# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Variables of all hosts, without templating what need not be templated.

``hostvars[host]`` hands out lazily templated values, and a loop over it in Jinja costs more than everything else of a run with
thousands of hosts. ``hostvars.raw_get(host)`` gives the same variables as they were written: 5,000 hosts take about 3 s.
"""

from __future__ import annotations

from collections.abc import Mapping

from ansible.errors import AnsibleError

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import plain

try:
    from ansible.template import is_trusted_as_template
except ImportError:  # ansible-core 2.18
    def is_trusted_as_template(value):
        return not getattr(value, "__UNSAFE__", False)

_MARKS = ("{{", "{%", "{#")


def _templates(value):
    """Texts in a value that look like templates and may be rendered."""
    if isinstance(value, str):
        return [value] if any(mark in value for mark in _MARKS) and is_trusted_as_template(value) else []
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _templates(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _templates(item)]
    return []


def _resolve(hostvars, host, variable):
    """``(value, known)`` of a variable that has to be rendered."""
    try:
        value = hostvars[host][variable]
        # ansible-core 2.18 gives back the template itself when something in it is undefined
        if _templates(value):
            return None, False
        return plain(value), True
    except (AnsibleError, TypeError, ValueError, KeyError, AttributeError):
        return None, False


def read_hosts(hostvars, hosts, variables, reported):
    """``{host: {variable: plain value, "unresolved": [variables]}}`` of the hosts that the inventory has.

    ``variables`` may be templates of the inventory. Variables in ``reported`` hold what nodes reported and are never rendered: a template
    in them stays text. None in it stands for no variable.
    """
    result = {}
    for host in hosts:
        if host not in hostvars:
            continue
        raw = hostvars.raw_get(host)
        own, unresolved = {}, []
        for variable in variables:
            if variable not in raw:
                continue
            value, known = raw[variable], True
            try:
                value = plain(value)
            except (TypeError, ValueError):
                known = False  # vaulted text, for example
            if not known or _templates(raw[variable]):
                value, known = _resolve(hostvars, host, variable)
            if known:
                own[variable] = value
            else:
                unresolved.append(variable)
        for variable in reported:
            if variable is None or variable not in raw:
                continue
            try:
                own[variable] = plain(raw[variable])
            except (TypeError, ValueError):
                unresolved.append(variable)
        if unresolved:
            own["unresolved"] = unresolved
        result[host] = own
    return result
