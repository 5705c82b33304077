# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this doc fragment is PRIVATE to the collection. It can change at any time.
# Do not use it from other collections or stand-alone plugins.

"""What modules say about check mode, diff mode and the like, in one place.

A module names the fragments it needs and then states only C(support) and, where that is not C(full), C(details).
"""

from __future__ import annotations


class ModuleDocFragment:

    # Every module. The module states the support of check_mode, diff_mode and idempotent.
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return the changed status and the difference without changing anything.
  diff_mode:
    description: Returns what has changed, or would change in C(check_mode), when in diff mode. Never contains a secret.
  idempotent:
    description:
      - When run twice in a row with the same arguments and nothing else having changed, the second run changes nothing and says so.
"""

    # Modules that run on a node.
    NODE = r"""
options: {}
attributes:
  platform:
    description: Operating systems of the nodes that the module runs on.
    platforms: linux
    support: full
requirements:
  - Python 3.8 or newer on the node, with its standard library
  - iproute2
"""

    # Modules that only read. Such a module states nothing of its own for these.
    INFO_MODULE = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return the changed status and the difference without changing anything.
    support: full
    details:
      - The module only reads, so it does the same with and without check mode.
  diff_mode:
    description: Returns what has changed, or would change in C(check_mode), when in diff mode. Never contains a secret.
    support: N/A
    details:
      - The module only reads.
  idempotent:
    description:
      - When run twice in a row with the same arguments and nothing else having changed, the second run changes nothing and says so.
    support: full
    details:
      - The module only reads.
"""

    # All modules of the collection are in this group, see meta/runtime.yml.
    ACTIONGROUP_MESH = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/kubemesh.wireguard.mesh) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - kubemesh.wireguard.mesh
"""
