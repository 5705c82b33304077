# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Accept: from a mesh device as it is to the device as it shall be, link and addresses; the peers are `_wg_plan`'s.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

A *link* is ``{"kind": "wireguard"|"tun"|other, "mtu": bytes, "up": bool, "addrgenmode": text, "addresses": [address/length]}``, or None
when there is no such device.
"""

from __future__ import annotations

import ipaddress

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MTU_MIN_IPV6, MeshError

KINDS = {"kernel": ("wireguard",), "userspace": ("tun",)}

# Bytes that WireGuard adds to a packet: outer IP header (20 or 40), UDP (8), its own header and tag (32).
# https://www.wireguard.com/papers/wireguard.pdf, section 5.4.6
OVERHEAD = {"ipv4": 60, "ipv6": 80}

# Bytes; Ethernet less the larger overhead, where nothing was measured. The same as wg-quick's and the kernel's own default.
MTU_DEFAULT = 1420


def decided_implementation(wanted, kind):
    """What makes a device: what is asked for, else what it is made by; None: the kernel where it can, else a userspace implementation.

    ``wanted``: ``auto``, ``kernel`` or ``userspace``; ``kind``: of the device that is there, an empty text where there is none.
    """
    if wanted != "auto":
        return wanted
    return next((name for name, kinds in KINDS.items() if kind in kinds), None)


def generations_of(interface):
    """Device names of the generations of one mesh: a name that ends in 0 or 1 has a sister, any other is alone."""
    return [interface[:-1] + "0", interface[:-1] + "1"] if interface[-1:] in ("0", "1") else [interface]


def is_generation(name, interface):
    """Whether a device is one of the generations of the same mesh."""
    return name in generations_of(interface)


def link_from_ip(item, addresses):
    """A link from one object of ``ip -j -d link show`` and its addresses; None stays None."""
    if item is None:
        return None
    return {
        "kind": (item.get("linkinfo") or {}).get("info_kind", ""),
        "mtu": int(item.get("mtu", 0)),
        "up": "UP" in item.get("flags", []),
        "addrgenmode": item.get("inet6_addr_gen_mode", ""),
        "addresses": sorted(addresses),
    }


def check_kind(interface, implementation, link):
    """Raise MeshError where the name belongs to a device that is not WireGuard."""
    if link is not None and link["kind"] not in KINDS["kernel"] + KINDS["userspace"]:
        raise MeshError(
            "interface: device %s exists and is of kind %s, not WireGuard; remove or rename it, or set mesh_interface to another name"
            % (interface, link["kind"] or "unknown"))
    if link is not None and link["kind"] not in KINDS[implementation]:
        raise MeshError(
            "implementation: device %s exists and is of kind %s, but implementation=%s is wanted; run the playbook disable first, "
            "or take implementation=auto" % (interface, link["kind"], implementation))


def check_mtu(mtu, addresses, interface):
    """Raise MeshError where IPv6 would be dead on the device: it needs 1280 bytes (RFC 8200, section 5), the kernel removes it below."""
    if mtu < MTU_MIN_IPV6 and has_ipv6(addresses):
        narrowest = (MTU_MIN_IPV6 + OVERHEAD["ipv4"], MTU_MIN_IPV6 + OVERHEAD["ipv6"])
        raise MeshError(
            "mtu: %d on %s is below %d, which IPv6 needs; the way between the nodes is too narrow: it must carry at least %d bytes "
            "(over IPv4) or %d (over IPv6)" % ((mtu, interface, MTU_MIN_IPV6) + narrowest))


def plan_link(current, wanted):
    """Steps before the peers and after them: ``(steps, steps)``.

    wanted: {"interface", "implementation", "mtu", "addresses"}. A device comes up only when it has its key and peers, so that the first
    packet that arrives is accepted. Addresses are added before others are removed.

    Steps: {"op": "create_link", "implementation"}, {"op": "set_addrgenmode"}, {"op": "set_mtu", "mtu", "before"},
    {"op": "add_address" | "remove_address", "address"}, {"op": "set_up"}.
    """
    before, after = [], []
    have = current or {"mtu": 0, "up": False, "addrgenmode": "", "addresses": []}
    ipv6 = has_ipv6(wanted["addresses"])
    mtu = [{"op": "set_mtu", "mtu": wanted["mtu"], "before": have["mtu"]}] if have["mtu"] != wanted["mtu"] else []
    if current is None:
        before.append({"op": "create_link", "implementation": wanted["implementation"]})
    elif ipv6 and have["mtu"] < MTU_MIN_IPV6:
        # The kernel took IPv6 off the device, addresses and mode: both come only after the MTU.
        before += mtu
        mtu = []
    # A step of its own before the device first comes up: together with "up" it came too late. The kernel's WireGuard does so itself.
    if ipv6 and have["addrgenmode"] != "none":
        before.append({"op": "set_addrgenmode"})
    after += mtu
    present = {canonical(address) for address in have["addresses"]}
    expected = [canonical(address) for address in wanted["addresses"]]
    after += [{"op": "add_address", "address": address} for address in expected if address not in present]
    if not have["up"]:
        after.append({"op": "set_up"})
    after += [{"op": "remove_address", "address": address} for address in sorted(present - set(expected))]
    return before, after


def has_ipv6(addresses):
    """Whether a device has IPv6 at all: a node whose kernel has it gives it at least the address for probes."""
    return any(":" in address for address in addresses)


def canonical(address):
    """Address with length in the standard library's spelling, so that what the kernel prints compares."""
    return str(ipaddress.ip_interface(address))


def link_as_text(link, interface):
    """A link as stable text for diff mode."""
    if link is None:
        return ""
    lines = ["link %s kind %s mtu %d %s addrgenmode %s" % (
        interface, link["kind"], link["mtu"], "up" if link["up"] else "down", link["addrgenmode"] or "-")]
    lines += ["address %s" % canonical(address) for address in sorted(link["addresses"])]
    return "".join(line + "\n" for line in lines)


def describe(step, interface):
    """One step for people."""
    texts = {
        "create_link": "create device %s (%s)" % (interface, step.get("implementation")),
        "set_addrgenmode": "no automatic link-local address on %s" % interface,
        "set_mtu": "MTU of %s: %s" % (interface, step.get("mtu")),
        "add_address": "add address %s" % step.get("address"),
        "remove_address": "remove address %s" % step.get("address"),
        "set_up": "set %s up" % interface,
        "remove_link": "remove device %s" % interface,
    }
    return texts[step["op"]]
