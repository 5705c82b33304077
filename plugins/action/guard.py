# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._document_action import DocumentActionBase


class ActionModule(DocumentActionBase):
    """See the module of the same name."""
