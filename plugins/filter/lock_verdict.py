# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether a run goes on after it asked for the locks of its nodes."""

from __future__ import annotations

from collections.abc import Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import untrusted_results


def lock_verdict(results, run, started, path="/run/kubemesh/lock.json"):
    """See the documentation beside this file."""
    if not isinstance(results, Mapping) or any(result and not isinstance(result, Mapping) for result in results.values()):
        raise AnsibleFilterError("lock_verdict: expected a dictionary of hosts and what the module lock returned on each")
    try:
        return _lock_plan.verdict(results, run, float(started), path)
    except MeshError as exc:
        raise AnsibleFilterError("lock_verdict: %s" % exc) from None
    except (TypeError, ValueError, KeyError, AttributeError) as exc:
        raise AnsibleFilterError("lock_verdict: these are not results of the module lock (%s: %s)" % (type(exc).__name__, exc)) from None


class FilterModule:
    """Filters of this file."""

    def filters(self):
        return untrusted_results({"lock_verdict": lock_verdict})
