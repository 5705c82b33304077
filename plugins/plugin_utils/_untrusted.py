# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""How data goes from outside into Ansible: as text that no template engine ever looks at."""

from __future__ import annotations

import functools
import json

from ansible.utils.unsafe_proxy import wrap_var


def plain(value):
    """The same data as plain dicts, lists, text, numbers: no tags, no lazy containers, no subclasses of ``str``.

    Raises ``TypeError`` or ``ValueError`` for what JSON cannot say (undefined variables, vaulted text).
    """
    return json.loads(json.dumps(value))


def untrusted(value):
    """The same data, never to be templated.

    In ansible-core 2.18 every text is wrapped as unsafe. From 2.19 on only text that is tagged as trusted is templated; `plain` drops
    such tags, which text from the inventory has, and ``wrap_var`` adds none.
    """
    return wrap_var(plain(value))


def untrusted_results(filters):
    """``{name: function}`` of filters whose results are never templated, whatever they were made of.

    In ansible-core 2.18 text that comes out of ``hostvars`` has lost its mark, and what a template stores with ``set_fact`` is templated
    again when it is used: a node list with Jinja in it would be executed on the controller.
    """
    def wrapped(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            return untrusted(function(*args, **kwargs))
        return run

    return {name: wrapped(function) for name, function in filters.items()}
