# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.
"""Accept, at boot: renders the files that bring a mesh device back before pods start.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

Two ways, chosen by ``mesh_persistence``:

* ``wg-quick``: ``/etc/wireguard/DEVICE.conf`` and the unit ``wg-quick@DEVICE``.
* ``systemd-networkd``: a ``.network`` file gives the device its addresses and MTU; the device itself and its peers come from the unit
  ``kubemesh-device@DEVICE``. Not from a ``.netdev`` file: networkd runs as a user of its own and cannot read a root-only private key,
  and when it restarts it would replace all peers of a live device (systemd, src/network/netdev/wireguard.c).

None of these files holds a private or preshared key: each stays in its own file and is given to the device by name. Preshared keys come
before the private key: without that there is no handshake, so there is none without the preshared key. They are not in the configuration,
though that is root-only as well: it is what people copy, and what a diff shows.

Where the kernel has no WireGuard, a userspace implementation runs in the foreground under ``kubemesh-userspace@DEVICE``.
"""

from __future__ import annotations

import fnmatch

from ansible_collections.kubemesh.wireguard.plugins.module_utils._link_plan import generations_of

# Everything that starts pods, in the distributions that name it differently. A unit that does not exist is no obstacle.
POD_STARTERS = (
    "kubelet.service k3s.service k3s-agent.service rke2-server.service rke2-agent.service "
    "k0scontroller.service k0sworker.service snap.microk8s.daemon-kubelite.service"
)

HEADER = "# Written by kubemesh.wireguard. Changes made here are lost.\n"

# Sorted behind what distributions and administrators usually name 99-something, so that it wins over a glob there.
SYSCTL_FILE = "/etc/sysctl.d/99-zz-kubemesh.conf"
NETWORKD_CONF = "/etc/systemd/networkd.conf.d/90-kubemesh.conf"
NETWORKMANAGER_CONF = "/etc/NetworkManager/conf.d/90-kubemesh.conf"
USERSPACE_UNIT_FILE = "/etc/systemd/system/kubemesh-userspace@.service"
DEVICE_UNIT_FILE = "/etc/systemd/system/kubemesh-device@.service"
START_USERSPACE = "/etc/kubemesh/start-userspace"

MODE_PUBLIC = 0o644
MODE_SCRIPT = 0o755
# The configuration names peers and endpoints only, but wg-quick complains about a file that others can read.
MODE_PRIVATE = 0o600


def paths_of(interface):
    """Every file of a device that this module may write, by what it is for."""
    return {
        "wg_quick": "/etc/wireguard/%s.conf" % interface,
        "wg_quick_dropin": "/etc/systemd/system/wg-quick@%s.service.d/kubemesh.conf" % interface,
        "network": "/etc/systemd/network/10-%s.network" % interface,
        "setconf": "/etc/kubemesh/%s.setconf" % interface,
        # one for each device: in a rotation one may have preshared keys and the other none
        "preshared_keys": "/etc/kubemesh/%s.preshared-keys" % interface,
    }


# Gives a device its preshared keys, if there are any. By sh: where /etc is mounted without the right to execute, or SELinux does not give
# it to wg-quick, a script can still be read.
SET_PRESHARED_KEYS = "[ ! -f /etc/kubemesh/%i.preshared-keys ] || sh /etc/kubemesh/%i.preshared-keys"


def boot_units(interface, persistence):
    """{unit: whether it shall be enabled}."""
    return {
        "wg-quick@%s.service" % interface: persistence == "wg-quick",
        "kubemesh-device@%s.service" % interface: persistence == "systemd-networkd",
    }


def boot_files(device, host):
    """What must be on disk for a device: {path: (text, or None for no file, mode)}.

    :param device: {"interface", "implementation": "kernel"|"userspace", "userspace_command",
        "persistence": "wg-quick"|"systemd-networkd"|"none",
        "private_key_file", "preshared_keys": directory or None, "listen_port", "fwmark", "mtu", "addresses",
        "peers": as `_mesh.peers_of`}.
    :param host: {"networkd": bool, "networkmanager": bool, "ipv6": bool, "underlay": [device names]}: what runs there, whether the
        kernel has IPv6, and where the outer packets go.
    """
    interface, persistence = device["interface"], device["persistence"]
    userspace = device["implementation"] == "userspace"
    paths = paths_of(interface)
    files = dict.fromkeys(paths.values(), (None, MODE_PUBLIC))
    files.update({USERSPACE_UNIT_FILE: (None, MODE_PUBLIC), DEVICE_UNIT_FILE: (None, MODE_PUBLIC), START_USERSPACE: (None, MODE_SCRIPT)})

    if persistence == "wg-quick":
        files[paths["wg_quick"]] = (wg_quick_text(device), MODE_PRIVATE)
        files[paths["wg_quick_dropin"]] = (wg_quick_dropin_text(userspace), MODE_PUBLIC)
        if userspace:
            files[START_USERSPACE] = (start_userspace_text(), MODE_SCRIPT)
    elif persistence == "systemd-networkd":
        files[paths["setconf"]] = (setconf_text(device), MODE_PRIVATE)
        key_file = device["private_key_file"].replace("/%s.key" % interface, "/%i.key")
        files[DEVICE_UNIT_FILE] = (device_unit_text(userspace, key_file), MODE_PUBLIC)
    if device.get("preshared_keys") and persistence != "none":
        files[paths["preshared_keys"]] = (preshared_keys_text(interface, device["preshared_keys"]), MODE_SCRIPT)
    if userspace:
        files[USERSPACE_UNIT_FILE] = (userspace_unit_text(device["userspace_command"]), MODE_PUBLIC)
    if host["networkd"]:
        files[paths["network"]] = (network_text(device, managed=persistence == "systemd-networkd"), MODE_PUBLIC)
        files[NETWORKD_CONF] = (networkd_conf_text(), MODE_PUBLIC)
    if host["networkmanager"]:
        files[NETWORKMANAGER_CONF] = (networkmanager_conf_text(interface), MODE_PUBLIC)
    # The same for each generation: one must not undo what the other needs.
    sysctls = {}
    for name in generations_of(interface):
        sysctls.update(wanted_sysctls(name, host))
    files[SYSCTL_FILE] = (sysctl_text(sysctls), MODE_PUBLIC)
    return files


def absent_files(interface, last):
    """The paths to be gone: those of the device and, with the last device of the mesh, what all of them need."""
    paths = list(paths_of(interface).values())
    if last:
        paths += [USERSPACE_UNIT_FILE, DEVICE_UNIT_FILE, START_USERSPACE, NETWORKD_CONF, NETWORKMANAGER_CONF, SYSCTL_FILE]
    return dict.fromkeys(paths, (None, MODE_PUBLIC))


def wanted_sysctls(interface, host):
    """{sysctl: value}: reverse-path filtering loose on the mesh device and where the outer packets come in.

    In the phase in which one side sends through the tunnel and the other does not yet, packets arrive on the device that the answer
    would not take. The kernel uses the larger of ``all`` and the device's value, so 2 here wins over 1 there
    (Documentation/networking/ip-sysctl.rst).
    """
    wanted = {"net/ipv4/conf/%s/rp_filter" % name: "2" for name in [interface] + sorted(host["underlay"])}
    if host["ipv6"]:
        # Probes are IPv6, also where the node has it switched off elsewhere.
        wanted["net/ipv6/conf/%s/disable_ipv6" % interface] = "0"
    return wanted


def sysctl_text(sysctls):
    """A sysctl.d file; slashes because device names may hold dots, and a dash because a device may not be there yet."""
    return HEADER + "".join("-%s = %s\n" % (name, value) for name, value in sorted(sysctls.items()))


def peer_lines(device):
    """The [Peer] sections that wg and wg-quick read, sorted by node name."""
    lines = []
    for key, peer in sorted(device["peers"].items(), key=lambda item: (item[1]["name"], item[0])):
        lines += ["", "# %s" % peer["name"], "[Peer]", "PublicKey = %s" % key]
        if peer["endpoint"]:
            lines.append("Endpoint = %s" % peer["endpoint"])
        if peer["keepalive"]:
            lines.append("PersistentKeepalive = %d" % peer["keepalive"])
        lines.append("AllowedIPs = %s" % ", ".join(peer["allowed_ips"]))
    return lines


def endpoints_in(text):
    """{public key: endpoint} of a file made here: what was configured last time, to tell a changed endpoint from a peer that roamed."""
    endpoints, key = {}, None
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if line.startswith("["):
            key = None
        elif separator and name.strip() == "PublicKey":
            key = value.strip()
        elif separator and name.strip() == "Endpoint" and key:
            endpoints[key] = value.strip()
    return endpoints


def wg_quick_text(device):
    """``/etc/wireguard/DEVICE.conf``; routes and rules are not wg-quick's business (Table = off)."""
    lines = ["[Interface]"]
    lines += ["Address = %s" % address for address in device["addresses"] if ":" not in address]
    lines += [
        "ListenPort = %d" % device["listen_port"],
        "FwMark = 0x%x" % device["fwmark"],
        "MTU = %d" % device["mtu"],
        "Table = off",
    ]
    if device.get("preshared_keys"):
        lines.append("PostUp = %s" % SET_PRESHARED_KEYS)
    # wg(8): the key from its own file, so that it is in no other; a file is read, nothing is on a command line.
    lines.append("PostUp = wg set %%i private-key %s" % device["private_key_file"])
    ipv6 = [address for address in device["addresses"] if ":" in address]
    if ipv6:
        # Where IPv6 is off for new devices, wg-quick's own addresses would be refused and nothing would come up. sysctl.d comes too late,
        # and PreUp too early: there is no device yet.
        switch = "/proc/sys/net/ipv6/conf/%i/disable_ipv6"
        lines.append("PostUp = grep -q 0 %s || echo 0 > %s" % (switch, switch))
        lines += ["PostUp = ip -6 address add %s dev %%i nodad" % address for address in ipv6]
    return HEADER + "\n".join(lines + peer_lines(device)) + "\n"


def wg_quick_dropin_text(userspace):
    """Brings wg-quick's unit up before pods start and, for a userspace implementation, keeps that out of wg-quick's own hands."""
    lines = ["[Unit]", "Before=" + POD_STARTERS]
    if userspace:
        # Under a unit of its own and in the foreground: a daemon of wg-quick's dies with it and says nothing.
        lines += ["", "[Service]", "Environment=WG_QUICK_USERSPACE_IMPLEMENTATION=" + START_USERSPACE]
    return HEADER + "\n".join(lines) + "\n"


def start_userspace_text():
    """What wg-quick runs instead of a userspace implementation."""
    return """#!/bin/sh
%s# wg-quick runs this instead of a userspace implementation: it belongs under a unit of its own.
set -eu
systemctl start "kubemesh-userspace@$1.service"
# As a step of its own, before the device first comes up: an automatic link-local address would become the source of probes.
[ ! -d /proc/sys/net/ipv6 ] || ip link set dev "$1" addrgenmode none
""" % HEADER


def preshared_keys_text(interface, folder):
    """The script that gives a device the preshared keys of its peers, at boot.

    Peers are those of the device that have a file, so none is ever added by it. 5,000 peers take 50 commands. It does not fail: a peer
    without its preshared key cannot be reached, and is not talked to in clear; a device that is taken down again reaches nobody.
    """
    return """#!/bin/sh
%s# Gives %s the preshared keys of its peers. Each is read from its file, which is named for the public key, with - for + and _ for /.
export LC_ALL=C
list=$({ wg show %s peers; printf "%%s\\n" %s/* | sed "s|.*/||; y|-_|+/|"; } | sort | uniq -d |
  sed "h; y|+/|-_|; s|^|preshared-key %s/|; x; s|^|peer |; G")
[ -n "$list" ] || exit 0
# What wg says is dropped: of a damaged file it may quote the content.
printf "%%s\\n" "$list" | xargs -n 400 wg set %s 2>/dev/null && exit 0
# One by one: a damaged file must not keep other peers from their keys.
printf "%%s\\n" "$list" | xargs -n 4 wg set %s 2>/dev/null && exit 0
echo "some preshared keys of %s cannot be set; run the playbook again to have them written anew" >&2
exit 0
""" % (HEADER, interface, interface, folder, folder, interface, interface, interface)


def userspace_unit_text(command):
    """The unit of a userspace implementation, in the foreground; started means that its socket answers."""
    return HEADER + """[Unit]
Description=Userspace WireGuard for %%i
Documentation=man:wireguard-go(8)
Before=%s

[Service]
ExecStart=%s -f %%i
# 100 times 0.1 s; it listens within a fraction of a second. Looked up and not asked: `wg` removes the socket of one that does not answer
# yet, and it dies of that (measured). 00010000 is a socket that listens.
ExecStartPost=/bin/sh -c 'for try in $$(seq 100); do grep -q " 00010000 .*/%%i.sock" /proc/net/unix && exit 0; sleep 0.1; done; exit 1'
# Packets wait here for the tunnel; the 500 of a TUN device are a fraction of a second on a busy node, then they are lost.
ExecStartPost=/bin/sh -c 'exec ip link set dev %%i txqueuelen 4096'
# The data path of the node: it must not wait for what else runs, and out of memory is the last thing that may take it away.
Nice=-10
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
""" % (POD_STARTERS, command)


def setconf_text(device):
    """Port, mark and peers as ``wg setconf`` reads them."""
    lines = ["[Interface]", "ListenPort = %d" % device["listen_port"], "FwMark = 0x%x" % device["fwmark"]]
    return HEADER + "\n".join(lines + peer_lines(device)) + "\n"


def device_unit_text(userspace, private_key_file):
    """The unit that makes the device and its peers, where networkd gives it addresses. A device that is there is left alone."""
    requires = "Requires=kubemesh-userspace@%i.service\nAfter=kubemesh-userspace@%i.service\n" if userspace else ""
    make = "" if userspace else "ip link show dev %i >/dev/null 2>&1 && exit 0; ip link add dev %i type wireguard && "
    # A live device has peers; replacing its configuration would end their sessions.
    keep = "[ -n \"$$(wg show %i peers)\" ] && exit 0; " if userspace else ""
    # Not where the kernel has no IPv6: there it would fail.
    mode = "{ [ ! -d /proc/sys/net/ipv6 ] || ip link set dev %i addrgenmode none; }"
    # The unit is the same for devices with preshared keys and without.
    configure = "wg setconf %%i /etc/kubemesh/%%i.setconf && { %s; } && wg set %%i private-key %s" % (SET_PRESHARED_KEYS, private_key_file)
    return HEADER + """[Unit]
Description=WireGuard mesh device %%i
Documentation=man:wg(8) man:systemd.network(5)
Before=%s
%s
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c '%s%s%s && %s'

[Install]
WantedBy=multi-user.target
""" % (POD_STARTERS, requires, keep, make, mode, configure)


def network_text(device, managed):
    """networkd's file of the device: its addresses, or that it is none of networkd's business."""
    lines = ["[Match]", "Name=%s" % device["interface"], ""]
    if not managed:
        return HEADER + "\n".join(lines + ["[Link]", "Unmanaged=yes"]) + "\n"
    lines += [
        "[Link]",
        "MTUBytes=%d" % device["mtu"],
        "RequiredForOnline=no",
        "",
        "[Network]",
        # No automatic link-local address: it would become the source of probes and be refused by the peers.
        "LinkLocalAddressing=no",
        "IPv6AcceptRA=no",
        "ConfigureWithoutCarrier=yes",
        # What is there when networkd stops or restarts stays.
        "KeepConfiguration=static",
    ]
    for address in device["addresses"]:
        lines += ["", "[Address]", "Address=%s" % address, "DuplicateAddressDetection=none"]
    return HEADER + "\n".join(lines) + "\n"


def networkd_conf_text():
    """networkd deletes rules and routes that are not its own when it restarts (flatcar #620, deckhouse #5709, netbird #4578)."""
    return HEADER + "[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes=no\n"


def networkmanager_conf_text(interface):
    """NetworkManager takes foreign devices over (Calico #4576)."""
    return HEADER + "[keyfile]\nunmanaged-devices+=%s\n" % ";".join("interface-name:%s" % name for name in generations_of(interface))


# What a mesh device is to systemd, by the settings of [Match] that look at a device: the kernel's, and a userspace implementation's.
_MATCH_VALUES = {
    "Type": ("wireguard", "none"), "Kind": ("wireguard", "tun"), "Driver": ("wireguard", "tun"), "Path": (None,),
    "WLANInterfaceType": (None,), "SSID": (None,)}
# Of these a mesh device has none.
_MATCH_NEVER = ("MACAddress", "PermanentMACAddress", "BSSID", "Property")


def catches(text, interface):
    """Whether a ``.network`` file would make networkd manage a device of this name (systemd.network(5), [Match] section options).

    All settings of the section must match, as in ``net_match_config`` of systemd. Those that look at the machine (Host, Virtualization,
    KernelCommandLine, …) are taken as fulfilled. A section that says nothing matches nothing (systemd 243 and newer).
    """
    found, in_match, machine = {}, False, False
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if line.startswith("["):
            in_match = line == "[Match]"
        elif in_match and "=" in line and not line.startswith(("#", ";")):
            field, dummy, value = (part.strip() for part in line.partition("="))
            if field == "Name" or field in _MATCH_VALUES or field in _MATCH_NEVER:
                # A setting may be repeated, and an empty one forgets those before it.
                inverted = "!" if value.startswith("!") else ""
                words = [inverted + word for word in value[len(inverted):].split()]
                found[field] = found.get(field, []) + words if words else []
            else:
                machine = True
    if any(found.get(field) for field in _MATCH_NEVER):
        return False
    values = dict(_MATCH_VALUES, Name=(interface,))
    patterns = {field: words for field, words in found.items() if words}
    return bool(patterns or machine) and all(
        any(_matches(words, value) for value in values[field]) for field, words in patterns.items())


def _matches(patterns, value):
    """Whether one of the globs matches; those with "!" must not. None is something that the device has not."""
    plain = [pattern for pattern in patterns if not pattern.startswith("!")]
    hit = [pattern for pattern in patterns if value is not None and fnmatch.fnmatchcase(value, pattern.lstrip("!"))]
    if any(pattern.startswith("!") for pattern in hit):
        return False
    return bool(hit) if plain else True
