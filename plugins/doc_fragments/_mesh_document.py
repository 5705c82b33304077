# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Note that this doc fragment is PRIVATE to the collection. It can change at any time.
# Do not use it from other collections or stand-alone plugins.

"""Options of the modules that work from the mesh document on a node."""

from __future__ import annotations


class ModuleDocFragment:

    # Where the document is, and which of its nodes this host is.
    DOCUMENTATION = r"""
options:
  document_file:
    description:
      - The mesh document on the node, as M(kubemesh.wireguard.peers) computes it.
      - It is the same file on every node and holds public facts only.
    type: path
    default: /etc/kubemesh/mesh.json
  document_src:
    description:
      - The same document on the controller.
      - Used in check mode only, in which it has not been written to the node. It then travels with the module and is gone after the task.
    type: path
  node:
    description:
      - Name of this host in the mesh document, which is the name of its Kubernetes Node object.
    type: str
"""

    # Which of the two devices of a mesh is meant.
    GENERATION = r"""
options:
  generation:
    description:
      - Which generation of keys, and with it which device, is meant.
      - A mesh has one of them except during a rotation of keys.
    type: int
    choices:
      - 0
      - 1
    default: 0
"""
