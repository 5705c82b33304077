# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""Node objects made into hosts of an inventory: names, addresses, variables, groups.

Pure: plain data in, plain data out. What a Node object holds is data of a cluster: of any type where it should be text, and never
trusted. Only the name and the address are used by Ansible itself, and both are validated; the rest is handed on as it is.
"""

from __future__ import annotations

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    canonical_address,
    check_node_name,
    family_of,
    shown,
)

# Fields that are large, change all the time and describe no host
_DROPPED_METADATA = ("managedFields",)
_DROPPED_STATUS = ("images", "volumesAttached", "volumesInUse")
_DROPPED_ANNOTATIONS = ("kubectl.kubernetes.io/last-applied-configuration",)

# The second one: clusters before Kubernetes 1.24
CONTROL_PLANE_LABELS = ("node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master")


def _dict(value):
    return value if isinstance(value, dict) else {}


def _dicts(value):
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def trimmed(item):
    """A Node object without what no host needs: what is kept in a cache, and what queries see."""
    metadata = {key: value for key, value in _dict(item.get("metadata")).items() if key not in _DROPPED_METADATA}
    metadata["annotations"] = {
        key: value for key, value in _dict(metadata.get("annotations")).items() if key not in _DROPPED_ANNOTATIONS}
    return dict(
        item, metadata=metadata, status={key: value for key, value in _dict(item.get("status")).items() if key not in _DROPPED_STATUS})


def host_name(item):
    """The name of a Node object, which is the host's. Raises `MeshError` for what Kubernetes would not accept as one."""
    return check_node_name(_dict(item.get("metadata")).get("name"))


def node_facts(item):
    """What a host knows of its Node object::

        {"name", "uid", "created", "deleting": bool, "labels": {}, "annotations": {},
         "addresses": {"InternalIP": [...], ...}, "pod_cidrs": [...], "provider_id",
         "taints": [{"key", "value", "effect"}], "unschedulable": bool,
         "conditions": {"Ready": {"status", "reason", "message", "since"}, ...}, "ready": bool,
         "os", "os_image", "architecture", "kernel_version", "kubelet_version", "container_runtime"}

    Text that is missing is "".
    """
    metadata, spec, status = (_dict(item.get(part)) for part in ("metadata", "spec", "status"))
    info, labels = _dict(status.get("nodeInfo")), _dict(metadata.get("labels"))
    addresses = {}
    for entry in _dicts(status.get("addresses")):
        addresses.setdefault(str(entry.get("type")), []).append(entry.get("address"))
    pod_cidrs = spec.get("podCIDRs") or [spec.get("podCIDR")]
    conditions = {
        str(entry.get("type")): {"status": entry.get("status", ""), "reason": entry.get("reason", ""), "message": entry.get("message", ""),
                                 "since": entry.get("lastTransitionTime", "")}
        for entry in _dicts(status.get("conditions"))}
    return {
        "name": metadata.get("name"),
        "uid": metadata.get("uid", ""),
        "created": metadata.get("creationTimestamp", ""),
        "deleting": bool(metadata.get("deletionTimestamp")),
        "labels": labels,
        "annotations": _dict(metadata.get("annotations")),
        "addresses": addresses,
        "pod_cidrs": [cidr for cidr in pod_cidrs if cidr] if isinstance(pod_cidrs, list) else [],
        "provider_id": spec.get("providerID", ""),
        "taints": [{"key": taint.get("key", ""), "value": taint.get("value", ""), "effect": taint.get("effect", "")}
                   for taint in _dicts(spec.get("taints"))],
        "unschedulable": spec.get("unschedulable") is True,
        "conditions": conditions,
        "ready": _dict(conditions.get("Ready")).get("status") == "True",
        # A node that has just joined has its label before its kubelet reports.
        "os": info.get("operatingSystem") or labels.get("kubernetes.io/os") or "",
        "os_image": info.get("osImage", ""),
        "architecture": info.get("architecture") or labels.get("kubernetes.io/arch") or "",
        "kernel_version": info.get("kernelVersion", ""),
        "kubelet_version": info.get("kubeletVersion", ""),
        "container_runtime": info.get("containerRuntimeVersion", ""),
    }


def _connectable(value):
    """``(text, family)`` of an address, or of a DNS name, whose family is "".

    Raises `MeshError` for anything else: a value such as ``-oProxyCommand=`` must not reach ssh.
    """
    try:
        address = canonical_address(value)
        return address, family_of(address)
    except MeshError as exc:
        try:
            return check_node_name(value.lower()), ""
        except (AttributeError, MeshError):
            raise exc from None


def address_values(item, types):
    """The addresses of a Node object that are of these types, as they are, in the order of the types."""
    addresses = node_facts(item)["addresses"]
    return [value for kind in types for value in addresses.get(kind, ())]


def host_address(values, family):
    """``(address, finding)``: what Ansible connects to, "" if there is none, and then what is wrong with the first value, or "".

    ``values``: one value or a list, the first that fits is taken; ``family``: ``ipv4``, ``ipv6`` or ``any``; DNS names fit any.
    """
    finding = ""
    for value in values if isinstance(values, list) else [values]:
        if value in (None, ""):
            continue
        try:
            address, own_family = _connectable(value)
        except MeshError:
            finding = finding or "%s is neither an IP address of a node nor a DNS name" % shown(value)
            continue
        if family == "any" or own_family in ("", family):
            return address, ""
    return "", finding


def groups_of(facts, cluster_group):
    """The names of the groups that a host is in by itself."""
    groups = ["k8s_ready" if facts["ready"] else "k8s_not_ready"]
    if facts["unschedulable"]:
        groups.append("k8s_cordoned")
    if facts["os"] == "windows":
        # No module of this collection runs there, so it is not where playbooks look for nodes.
        return groups + ["k8s_windows"]
    if any(label in facts["labels"] for label in CONTROL_PLANE_LABELS):
        groups.append("kube_control_plane")
    return groups + [cluster_group]


def all_groups(cluster_group):
    """Groups that always exist, so that a pattern that names one is no error while it is empty."""
    return [cluster_group, "kube_control_plane", "k8s_windows", "k8s_ready", "k8s_not_ready", "k8s_cordoned"]
