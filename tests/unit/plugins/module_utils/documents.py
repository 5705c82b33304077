# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Mesh documents that tests of several modules begin with."""

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh


def key(number):
    """A public key that people can tell from others."""
    return chr(ord("A") + number) * 42 + "A="


def entry(number, **other):
    """A member with one key, a pod CIDR and a node address of each family, and no endpoint."""
    return dict({
        "state": "member", "reason": "", "uid": "", "public_keys": {"0": key(number)}, "endpoints": {},
        "pod_cidrs": ["10.244.%d.0/24" % number, "fd00:10:244:%x::/64" % number],
        "node_addresses": ["198.18.0.1%d" % number, "2001:db8::%x" % number],
        "probe_addresses": {"0": _mesh.probe_address(key(number))}, "mtu": 1420, "keepalive": 0}, **other)


def document(nodes, **other):
    """The first document of a mesh of these nodes, {name: entry}, validated."""
    return _mesh.validate_document(dict({
        "schema": 1, "serial": 1, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": nodes}, **other))
