# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Accept: reads and programs a mesh device on this node. Decisions are in `_link_plan`, `_wg_plan` and `_persist`."""

from __future__ import annotations

import glob
import json
import os

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _link_plan, _persist, _psk_files, _wg_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._keys import public_key_of, read_private_key
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, family_of
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import (
    apply_file_step,
    plan_files,
    read_sysctl,
    read_text,
    remove_empty_folders,
    write_sysctl,
    write_text,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg import client_for
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_netlink import link_kinds

# What the sysctls were before the mesh came, so that disable can give them back.
SYSCTL_BEFORE = "/etc/kubemesh/sysctl-before.json"
USERSPACE_COMMANDS = ("wireguard-go", "boringtun-cli", "boringtun")
# Seconds; a userspace implementation answers within a fraction of one.
SOCKET_WAIT = 10
OWN_FOLDERS = ("/etc/kubemesh", "/run/kubemesh", "/etc/systemd/networkd.conf.d", "/etc/NetworkManager/conf.d")
TEST_DEVICE = "kmtest0"
# Steps that end what peers may send: only when nobody sends it any more.
REMOVALS = ("remove_peer", "remove_allowed_ips")


def choose_implementation(system, wanted, link):
    """(implementation, path of the userspace command or ""). What is running stays; then the kernel; then a userspace one."""
    command = next((path for path in map(system.path, USERSPACE_COMMANDS) if path), "")
    wanted = _link_plan.decided_implementation(wanted, link["kind"] if link is not None else "")
    if wanted is None:
        wanted = "kernel" if kernel_has_wireguard(system) else "userspace"
    if wanted == "userspace" and not command:
        raise MeshError(
            "implementation: the kernel of this node cannot create WireGuard devices and no userspace implementation (%s) is installed; "
            "install wireguard-go, or a kernel with the wireguard module" % ", ".join(USERSPACE_COMMANDS))
    return wanted, command if wanted == "userspace" else ""


def kernel_has_wireguard(system):
    """Whether the kernel can create a WireGuard device: the only test is to do it, a version says nothing. The device goes at once."""
    if "wireguard" in link_kinds().values() or os.path.isdir("/sys/module/wireguard"):
        return True
    rc, dummy, dummy2 = system.try_run(["ip", "link", "add", "dev", TEST_DEVICE, "type", "wireguard"])
    if rc == 0:
        system.run(["ip", "link", "del", "dev", TEST_DEVICE])
    return rc == 0


def choose_persistence(system, wanted):
    """``auto`` is wg-quick where it is installed, else networkd."""
    if wanted != "auto":
        return wanted
    return "wg-quick" if system.path("wg-quick") else "systemd-networkd"


def has_ipv6():
    """Whether the kernel has IPv6 at all; ``ipv6.disable=1`` at boot takes it away."""
    return os.path.isdir("/proc/sys/net/ipv6")


def read_host(system, underlay):
    """What else manages networks here: {"networkd", "networkmanager": bool, "ipv6": bool, "underlay": [device]}."""
    return {
        "networkd": any(os.path.exists(path + "/systemd-networkd") for path in ("/usr/lib/systemd", "/lib/systemd")),
        "networkmanager": os.path.isdir("/etc/NetworkManager"),
        "underlay": underlay,
        "ipv6": has_ipv6(),
    }


def underlay_devices(system, addresses, endpoints, interface, fwmark):
    """Devices that WireGuard's own packets use: those that hold this node's addresses, and those on the way to the endpoints."""
    found = set()
    for link in system.ip_json(["addr", "show"]):
        if any(item.get("local") in addresses for item in link.get("addr_info", [])):
            found.add(link["ifname"])
    for family in ("ipv4", "ipv6"):
        targets = sorted({endpoint for endpoint in endpoints if family_of(endpoint) == family})
        # With the mark, or host encryption would answer that they go through the mesh. One process for all: 5,000 peers would be 5,000.
        words = system.ip_answers(family, ["route get %s mark %d" % (target, fwmark) for target in targets]).split()
        found.update(words[place + 1] for place, word in enumerate(words[:-1]) if word == "dev")
    # A mesh device holds the node's addresses too, and lo answers for a node's own.
    return sorted(name for name in found if name != "lo" and not _link_plan.is_generation(name, interface))


def read(system, interface, preshared_key_files=None):
    """(link, WireGuard state) of a device; None, None where there is none.

    ``preshared_key_files``: {public key: path}; the state says whether those are what the device has, never what it has.
    """
    item = system.link(interface)
    link = _link_plan.link_from_ip(item, system.addresses(interface) if item else [])
    state = None
    if link is not None and link["kind"] in ("wireguard", "tun"):
        state = client_for(interface, run_command=system.module.run_command).read(interface, preshared_key_files)
    return link, state


def plan_present(system, wanted, host, current, check_mode):
    """Everything to do for a device that shall be there: a dict of step lists in the order in which they are carried out.

    wanted: as `_persist.boot_files` takes it, "keep_unknown_peers", and "remove": whether what does not belong any more goes; what stays
    for now is counted in "left".
    """
    link, state = current
    interface = wanted["interface"]
    _link_plan.check_kind(interface, wanted["implementation"], link)
    _link_plan.check_mtu(wanted["mtu"], wanted["addresses"], interface)
    before, after = _link_plan.plan_link(link, wanted)
    files = plan_files(_persist.boot_files(wanted, host))
    # The sysctls as well: udev applies them to a device the moment that it appears, and a glob of somebody else's would be the last word.
    early = {_persist.SYSCTL_FILE, _persist.NETWORKD_CONF, _persist.NETWORKMANAGER_CONF, _persist.USERSPACE_UNIT_FILE}
    early.add(_persist.paths_of(interface)["network"])
    paths = _persist.paths_of(interface)
    last_text = read_text(paths["wg_quick"]) or read_text(paths["setconf"]) or ""
    device = {
        "public_key": own_public_key(system, wanted, check_mode),
        "private_key_file": wanted["private_key_file"],
        "listen_port": wanted["listen_port"],
        "fwmark": wanted["fwmark"],
        "keep_unknown_peers": wanted["keep_unknown_peers"],
        "peers": wanted["peers"],
    }
    steps = _wg_plan.plan_device(state, device, _persist.endpoints_in(last_text))
    units = []
    for unit, enabled in _persist.boot_units(interface, wanted["persistence"]).items():
        if system.unit(unit)["enabled"] != enabled:
            units.append({"op": "enable_unit" if enabled else "disable_unit", "unit": unit})
    sysctls = _persist.wanted_sysctls(interface, host)
    return {
        "early_files": [step for step in files if step["path"] in early],
        "link": before,
        "device": [step for step in steps if wanted["remove"] or step["op"] not in REMOVALS],
        "left": sum(1 for step in steps if not wanted["remove"] and step["op"] in REMOVALS),
        "sysctls": [
            {"op": "set_sysctl", "name": name, "value": value, "before": read_sysctl(name)}
            for name, value in sorted(sysctls.items()) if read_sysctl(name) != value],
        "addresses": after,
        # What restores the device last: an interrupted run must not leave files that know more than the device does.
        "files": [step for step in files if step["path"] not in early],
        "units": units,
    }


def check_preshared_keys(folder, peers):
    """`MeshError` unless every peer has its preshared key in the directory: one without would be a peer that cannot be reached."""
    missing = _psk_files.missing(folder, peers)
    if missing:
        names = sorted(peers[key]["name"] for key in missing)
        raise MeshError(
            "preshared_keys: %s has no preshared key of %s%s; write them first, with kubemesh.wireguard.preshared_keys and the same mesh "
            "document" % (folder, ", ".join(names[:5]), " and %d more" % (len(names) - 5) if len(names) > 5 else ""))


def own_public_key(system, wanted, check_mode):
    """Public key of the key file, which must be the one that the peers know; in check mode the file may be still to be made."""
    path = wanted["private_key_file"]
    if check_mode and read_text(path) is None:
        return wanted["public_key"]
    private = read_private_key(path)
    try:
        found = public_key_of(bytes(private), system.module.run_command, system.path("wg"))
    finally:
        for place in range(len(private)):
            private[place] = 0
    if found != wanted["public_key"]:
        raise MeshError(
            "private_key_file: %s has the public key %s, but the mesh document says %s, which is what the peers accept from; run the "
            "exchange of keys again (playbook kubemesh.wireguard.enable)" % (path, found, wanted["public_key"]))
    return found


def apply_present(system, wanted, plan):
    """Carry out a plan of `plan_present`, in its order."""
    interface = wanted["interface"]
    for step in plan["early_files"]:
        apply_file_step(step)
    tell_managers(system, interface, plan)
    for step in plan["link"]:
        if step["op"] == "create_link":
            create_link(system, interface, step["implementation"])
        elif step["op"] == "set_mtu":
            apply_link_step(system, interface, step)
        else:
            system.run(["ip", "link", "set", "dev", interface, "addrgenmode", "none"])
    if plan["device"]:
        client_for(interface, wait=SOCKET_WAIT, run_command=system.module.run_command).apply(interface, plan["device"])
    remember_sysctls(plan["sysctls"], interface)
    for step in plan["sysctls"]:
        write_sysctl(step["name"], step["value"])
    for step in plan["addresses"]:
        apply_link_step(system, interface, step)
    for step in plan["files"]:
        apply_file_step(step)
    if plan["units"] or any(step["path"].startswith("/etc/systemd/system/") for step in plan["files"]):
        system.run(["systemctl", "daemon-reload"])
    for step in plan["units"]:
        system.run(["systemctl", "enable" if step["op"] == "enable_unit" else "disable", step["unit"]])


def tell_managers(system, interface, plan):
    """Make networkd, NetworkManager and systemd read the files that keep them away from the device, before it exists.

    Also where the files are there already: the run that wrote them may have ended before it said so.
    """
    paths = {step["path"] for step in plan["early_files"]}
    creates = any(step["op"] == "create_link" for step in plan["link"])
    if _persist.USERSPACE_UNIT_FILE in paths or any(step.get("implementation") == "userspace" for step in plan["link"]):
        system.run(["systemctl", "daemon-reload"])
    if (creates or _persist.NETWORKMANAGER_CONF in paths) and system.unit("NetworkManager.service")["active"]:
        system.try_run(["nmcli", "general", "reload", "conf"])
    # Only where a file of somebody's would catch the device: a reload also makes networkd take up whatever else was edited.
    if creates and system.unit("systemd-networkd.service")["active"] and caught_by(interface):
        system.run(["networkctl", "reload"])


def caught_by(interface):
    """Files other than ours that would make networkd manage the device."""
    own = _persist.paths_of(interface)["network"]
    found = []
    for folder in ("/etc/systemd/network", "/run/systemd/network", "/usr/lib/systemd/network", "/lib/systemd/network"):
        for path in sorted(glob.glob(folder + "/*.network")):
            if path != own and _persist.catches(read_text(path) or "", interface):
                found.append(path)
    return found


def create_link(system, interface, implementation):
    """Make the device: the kernel's, or by starting the unit of a userspace implementation."""
    if implementation == "kernel":
        system.run(["ip", "link", "add", "dev", interface, "type", "wireguard"])
    else:
        system.run(["systemctl", "start", "kubemesh-userspace@%s.service" % interface])


def apply_link_step(system, interface, step):
    """Carry out one step on the link."""
    if step["op"] == "set_mtu":
        system.run(["ip", "link", "set", "dev", interface, "mtu", str(step["mtu"])])
    elif step["op"] == "set_up":
        system.run(["ip", "link", "set", "dev", interface, "up"])
    elif step["op"] == "add_address":
        # Without duplicate address detection: the node's own address is on another of its devices as well, by design.
        option = ["nodad"] if ":" in step["address"] else []
        system.run(["ip", "addr", "add", step["address"], "dev", interface] + option)
    else:
        system.run(["ip", "addr", "del", step["address"], "dev", interface])


def sysctls_before():
    """{sysctl: value} as it was before the mesh. A file that somebody damaged says nothing, and must not stop anything."""
    try:
        found = json.loads(read_text(SYSCTL_BEFORE) or "{}")
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def remember_sysctls(steps, interface):
    """Keep the values that other devices had before the mesh, once; the mesh device's own go with it."""
    before = sysctls_before()
    new = {
        step["name"]: step["before"] for step in steps
        if step["before"] is not None and step["name"] not in before
        and not _link_plan.is_generation(step["name"].split("/")[3], interface)}
    if new:
        write_text(SYSCTL_BEFORE, json.dumps(dict(before, **new), sort_keys=True) + "\n", 0o644)


def in_use(system, interface):
    """Whether a device is there, or will be after the next boot."""
    return system.link(interface) is not None or any(os.path.exists(path) for path in _persist.paths_of(interface).values())


def plan_absent(system, interface, current):
    """Everything to do for a device that shall not be there."""
    link, dummy = current
    units = [
        {"op": "disable_unit", "unit": unit}
        for unit in _persist.boot_units(interface, "none") if system.unit(unit)["enabled"]]
    # What both generations need stays as long as there is the other one.
    last = not any(in_use(system, name) for name in _link_plan.generations_of(interface) if name != interface)
    before = sysctls_before() if last else {}
    files = _persist.absent_files(interface, last)
    if last:
        files[SYSCTL_BEFORE] = (None, 0o644)
    return {
        "units": units,
        "link": [{"op": "remove_link"}] if link is not None else [],
        "sysctls": [
            {"op": "set_sysctl", "name": name, "value": value, "before": read_sysctl(name)}
            for name, value in sorted(before.items()) if read_sysctl(name) not in (None, value)],
        "files": plan_files(files),
    }


def apply_absent(system, interface, plan):
    """Carry out a plan of `plan_absent`."""
    for step in plan["units"]:
        system.run(["systemctl", "disable", step["unit"]])
    userspace = "kubemesh-userspace@%s.service" % interface
    for unit in list(_persist.boot_units(interface, "none")) + [userspace]:
        # After a reboot these units are what made the device; stopping wg-quick's removes it.
        if system.unit(unit)["active"]:
            system.run(["systemctl", "stop", unit])
    if system.link(interface) is not None:
        system.run(["ip", "link", "del", "dev", interface])
    for step in plan["sysctls"]:
        write_sysctl(step["name"], step["value"])
    for step in plan["files"]:
        apply_file_step(step)
    if any(step["path"].startswith("/etc/systemd/system/") for step in plan["files"]) or plan["units"]:
        system.run(["systemctl", "daemon-reload"])
    remove_empty_folders(("/etc/systemd/system/wg-quick@%s.service.d" % interface,) + OWN_FOLDERS)
