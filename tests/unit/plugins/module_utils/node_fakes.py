# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A node for unit tests: routes, rules, links and units behind the commands that modules run.

It answers as iproute2 and systemctl do (see the recorded answers in fixtures/ip) and refuses what the kernel refuses. Every command that
changes something is kept in ``changes``.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import json
import os
from unittest import mock

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _conntrack, _routes, _rules_netlink, _system, _wg_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

FAMILIES = {"-4": "ipv4", "-6": "ipv6"}
TABLE_MAIN = 254
KERNEL_RULES = [{"priority": 0, "src": "all", "table": "255"}, {"priority": 32766, "src": "all", "table": "254"},
                {"priority": 32767, "src": "all", "table": "253"}]
LOCAL_ROUTES = [{"type": "2", "dst": "127.0.0.1", "dev": "lo", "protocol": "2", "scope": "254", "prefsrc": "127.0.0.1", "flags": []}]


class Refused(Exception):
    """What a command prints on stderr when it fails."""


def _no_kernel(*args, **kwargs):
    raise AssertionError("a unit test asked the kernel of this machine")


@contextlib.contextmanager
def instead_of_the_kernel(node):
    """What goes to the kernel without a command goes to the node; nothing ever reaches the machine that runs the tests."""
    with mock.patch.object(_rules_netlink.socket, "socket", _no_kernel), mock.patch.object(_conntrack, "open_socket", _no_kernel), \
            mock.patch.object(_routes, "change_rules", node.change_rules):
        yield node


class Node:
    """Stands in for an AnsibleModule where `_system.System` is concerned, and for the node behind it."""

    def __init__(self, tools_missing=()):
        self.tools_missing = set(tools_missing)
        self.routes = {}  # {(family, table): {dst: route}}
        self.rules = {"ipv4": [], "ipv6": []}  # items as ip prints them
        self.links = {}  # {name: {"kind", "mtu", "up", "mode", "addresses": [...]}}
        self.units = {}  # {name: {"enabled", "active"}}
        self.changes = []
        self.warnings = []
        self.hooks = []  # functions that look at each change before it is made
        self.forgotten = []  # functions that are told of a link that went
        self.parted = False  # whether table local was parted from main before the first rule, see _fib_split

    # --- what System uses of a module ----------------------------------------------------------------------------------------------

    def get_bin_path(self, name, opt_dirs=None):
        return None if name in self.tools_missing else "/usr/sbin/" + name

    def warn(self, text):
        self.warnings.append(text)

    def run_command(self, argv, data=None, environ_update=None):
        words = [os.path.basename(argv[0])] + list(argv[1:])
        try:
            return 0, getattr(self, "_" + words[0].replace("-", "_"))(words[1:], data) or "", ""
        except Refused as exc:
            return 2, "", "%s\n" % exc

    def _change(self, *words):
        text = " ".join(words)
        for hook in self.hooks:
            hook(self, text)
        self.changes.append(text)

    # --- ip ------------------------------------------------------------------------------------------------------------------------

    def _setsid(self, words, dummy):
        """What parts the tables before the first rule: it has to be done with all copies there, and nothing may be left."""
        assert [os.path.basename(words[0])] + words[1:4] == ["ip", "-4", "-force", "-batch"], words
        with open(words[4], encoding="utf-8") as handle:
            lines = handle.read().splitlines()
        copies = 0
        for line in lines:
            if line.startswith("route add local "):
                copies += 1
            elif line.startswith("rule add ") and not self.parted:
                assert copies == len(LOCAL_ROUTES), lines
                self.parted = True
            elif line.startswith("route flush table 254 proto "):
                copies = 0
        assert copies == 0 and sum(line.startswith("rule add") for line in lines) == sum(line.startswith("rule del") for line in lines)

    def _ip(self, words, data):
        if words[:2] == ["-j", "-N"]:
            return json.dumps(self._show(words[2:]))
        if words[-2:] == ["-batch", "-"]:
            family = FAMILIES[words[0]]
            if "-force" in words:
                return "".join(self._get(family, line.split()) for line in data.splitlines())
            for line in data.splitlines():
                self._route(family, line)
            return ""
        if words[0] == "link":
            return self._link(words[1:])
        if words[0] == "addr":
            return self._addr(words[1:])
        raise AssertionError("ip " + " ".join(words))

    def _show(self, words):
        if words[:3] == ["-d", "link", "show"]:
            return [self._link_item(words[-1])]
        if words[:2] == ["addr", "show"]:
            names = [words[-1]] if words[2:3] == ["dev"] else sorted(self.links)
            return [dict(self._link_item(name), addr_info=[
                {"local": text.split("/")[0], "prefixlen": int(text.split("/")[1])} for text in self.links[name]["addresses"]])
                for name in names]
        family = FAMILIES[words[0]]
        if words[1:] == ["rule", "show"]:
            return sorted(self.rules[family] + KERNEL_RULES, key=lambda item: item["priority"])
        if words[1:] == ["route", "show", "table", "255"]:
            return LOCAL_ROUTES
        if words[1:5] == ["route", "show", "table", "254"] and words[5:6] == ["proto"]:
            return []
        if words[1:4] == ["route", "show", "table"]:
            table = self.routes.get((family, int(words[4])))
            if not table:
                raise Refused("Error: %s: FIB table does not exist.\nDump terminated" % family)
            return [self._route_item(route) for route in table.values()]
        if words[1:5] == ["route", "show", "default", "dev"]:
            if words[5] not in self.links:
                raise Refused('Cannot find device "%s"' % words[5])
            return [{"dst": "default"}] if self.links[words[5]].get("default") else []
        raise AssertionError("ip -j " + " ".join(words))

    @staticmethod
    def _route_item(route):
        item = {"dst": route["dst"], "flags": []}
        if route["dst"].endswith("/0"):
            item["dst"] = "default"
        elif route["dst"].endswith(("/32", "/128")) and (":" in route["dst"]) == route["dst"].endswith("/128"):
            item["dst"] = route["dst"].split("/")[0]
        if route["type"] != "unicast":
            item["type"] = "7"
        if route["dev"] or route["family"] == "ipv6":
            item["dev"] = route["dev"] or "lo"
        if route["src"]:
            item["prefsrc"] = route["src"]
        if route["mtu"]:
            item["metrics"] = [{"mtu": route["mtu"]}]
        return item

    def _route(self, family, line):
        words = line.split()
        if words[0] != "route":
            raise Refused("Object \"%s\" is unknown" % words[0])
        verb = words[1]
        found = plan.routes_of_batch("route replace " + " ".join(words[2:]), family)
        if not found:
            raise Refused("Error: cannot parse %s" % line)
        route = found[0]
        table = self.routes.setdefault((family, route["table"]), {})
        if verb == "replace":
            if route["dev"] and route["dev"] not in self.links:
                raise Refused('Cannot find device "%s"' % route["dev"])
            if route["dev"] and not self.links[route["dev"]]["up"]:
                raise Refused("RTNETLINK answers: Network is down")
            own = [text.split("/")[0] for link in self.links.values() for text in link["addresses"]]
            if route["src"] and route["src"] not in own:
                raise Refused("Error: Invalid prefsrc address.")
            self._change("ip", "-4" if family == "ipv4" else "-6", line.split("  #")[0])
            table[route["dst"]] = route
        elif verb == "del":
            if route["dst"] not in table:
                raise Refused("RTNETLINK answers: No such process")
            self._change("ip", "-4" if family == "ipv4" else "-6", line.split("  #")[0])
            del table[route["dst"]]
        else:
            raise AssertionError(line)

    def change_rules(self, steps):
        """`_rules_netlink.change_rules`: rules without a command."""
        for step in steps:
            try:
                self._rule(step["rule"]["family"], "add" if step["op"] == "add_rule" else "del", plan.rule_text(step["rule"]).split())
            except Refused as exc:
                raise MeshError("rule %s: %s" % (plan.rule_text(step["rule"]), exc)) from None

    def _rule(self, family, verb, words):
        item = {"src": "all"}
        pairs = dict(zip([word for word in words if word != "not"][::2], [word for word in words if word != "not"][1::2]))
        item.update(priority=int(pairs["priority"]), table=pairs["lookup"])
        if pairs["from"] != "all":
            network = ipaddress.ip_network(pairs["from"])
            item["src"] = str(network.network_address)
            if network.prefixlen < network.max_prefixlen:
                item["srclen"] = network.prefixlen
        if "fwmark" in pairs:
            item["fwmark"], item["fwmask"] = pairs["fwmark"].split("/")
        if "not" in words:
            item["not"] = None
        if verb == "add":
            if item in self.rules[family]:
                raise Refused("RTNETLINK answers: File exists")
            self._change("ip", "-4" if family == "ipv4" else "-6", "rule add", *words)
            self.rules[family].append(item)
        else:
            if item not in self.rules[family]:
                raise Refused("RTNETLINK answers: No such file or directory")
            self._change("ip", "-4" if family == "ipv4" else "-6", "rule del", *words)
            self.rules[family].remove(item)
        return ""

    def _get(self, family, words):
        """`ip route get`: the rules in their order, then the main table."""
        target, options = words[2], dict(zip(words[3::2], words[4::2]))
        for link in self.links.values():
            if target in [text.split("/")[0] for text in link["addresses"]]:
                return "local %s dev lo table local src %s uid 0 \\    cache <local> \n" % (target, target)
        tables = [(item, int(item["table"])) for item in self._show(["-4" if family == "ipv4" else "-6", "rule", "show"])]
        for item, table in tables + [({"src": "all"}, TABLE_MAIN)]:
            if "not" in item and int(options.get("mark", "0")) & int(item.get("fwmask", item["fwmark"]), 16) == int(item["fwmark"], 16):
                continue
            if item["src"] != "all":
                source = ipaddress.ip_network("%s/%d" % (item["src"], item.get("srclen", 32 if family == "ipv4" else 128)))
                if "from" not in options or ipaddress.ip_address(options["from"]) not in source:
                    continue
            found = [route for dst, route in self.routes.get((family, table), {}).items()
                     if ipaddress.ip_address(target) in ipaddress.ip_network(dst)]
            if found:
                best = max(found, key=lambda route: int(route["dst"].split("/")[1]))
                return "%s dev %s table %d\n" % (target, best["dev"], table) if best["dev"] else ""
        return ""

    def _link_item(self, name):
        if name not in self.links:
            raise Refused('Device "%s" does not exist.' % name)
        link = self.links[name]
        item = {"ifname": name, "mtu": link["mtu"], "flags": ["UP", "LOWER_UP"] if link["up"] else [], "inet6_addr_gen_mode": link["mode"]}
        if link["kind"]:
            item["linkinfo"] = {"info_kind": link["kind"]}
        return item

    def add_link(self, name, kind="", addresses=(), **other):
        self.links[name] = dict({"kind": kind, "mtu": 1500, "up": True, "mode": "eui64", "addresses": list(addresses)}, **other)

    def remove_link(self, name):
        del self.links[name]
        for table in self.routes.values():
            for dst in [dst for dst, route in table.items() if route["dev"] == name]:
                del table[dst]
        for forget in self.forgotten:
            forget(name)

    def _link(self, words):
        name = words[2]
        if words[0] == "add":
            if name in self.links:
                raise Refused("RTNETLINK answers: File exists")
            self._change("ip link", *words)
            self.add_link(name, words[4], up=False, mtu=1420)
            return
        if name not in self.links:
            raise Refused('Cannot find device "%s"' % name)
        self._change("ip link", *words)
        if words[0] == "del":
            self.remove_link(name)
        elif words[3] == "mtu":
            self.links[name]["mtu"] = int(words[4])
        elif words[3] == "up":
            self.links[name]["up"] = True
        elif words[3] == "addrgenmode":
            self.links[name]["mode"] = words[4]
        else:
            raise AssertionError(" ".join(words))

    def _addr(self, words):
        addresses = self.links[words[3]]["addresses"]
        if (words[0] == "add") == (words[1] in addresses):
            raise Refused("RTNETLINK answers: %s" % ("File exists" if words[0] == "add" else "Cannot assign requested address"))
        self._change("ip addr", *words)
        (addresses.append if words[0] == "add" else addresses.remove)(words[1])

    # --- systemd -------------------------------------------------------------------------------------------------------------------

    def _systemctl(self, words, data):
        if words[0] == "show":
            unit = self.units.get(words[-1], {})
            return "LoadState=%s\nActiveState=%s\nUnitFileState=%s\n" % (
                "loaded" if unit else "not-found", "active" if unit.get("active") else "inactive",
                "enabled" if unit.get("enabled") else "disabled")
        self._change("systemctl", *words)
        name = words[-1]
        if words[0] == "enable":
            self.units.setdefault(name, {})["enabled"] = True
        elif words[0] == "disable":
            self.units.setdefault(name, {}).update(enabled=False, active=False if "--now" in words else self.units[name].get("active"))
        elif words[0] in ("start", "stop"):
            self.units.setdefault(name, {})["active"] = words[0] == "start"
            self._unit_of_a_device(words[0] == "start", *name.split(".")[0].partition("@")[::2])
        elif words[0] != "daemon-reload":
            raise AssertionError(" ".join(words))
        return ""

    def _networkctl(self, words, data):
        self._change("networkctl", *words)
        return ""

    def _nmcli(self, words, data):
        self._change("nmcli", *words)
        return ""

    def _unit_of_a_device(self, starts, unit, device):
        """What units do to a device: a userspace WireGuard has one while it runs, and wg-quick takes its own down."""
        if starts and unit == "kubemesh-userspace":
            self.add_link(device, "tun", up=False, mtu=1420)
        elif not starts and unit in ("kubemesh-userspace", "wg-quick") and device in self.links:
            self.remove_link(device)


class Files:
    """Files and sysctls of a node, in memory. Every change goes through the hooks of the node, as its commands do."""

    def __init__(self, node):
        self.node = node
        self.content = {}  # {path: (text, mode)}
        self.sysctls = {}
        node.forgotten.append(self.forget)

    def forget(self, device):
        """The sysctls of a device go with it."""
        self.sysctls = {name: value for name, value in self.sysctls.items() if name.split("/")[3] != device}

    def read_text(self, path):
        return self.content[path][0] if path in self.content else None

    def file_mode(self, path):
        return self.content[path][1] if path in self.content else None

    def write_text(self, path, text, mode):
        self.node._change("write", path)
        self.content[path] = (text, mode)

    def remove_file(self, path):
        if path in self.content:
            self.node._change("remove", path)
            del self.content[path]

    def read_sysctl(self, name):
        device = name.split("/")[3]
        if device in ("all", "default") or device in self.node.links:
            return self.sysctls.get(name, "1" if name.endswith("rp_filter") else "0")
        return None

    def write_sysctl(self, name, value):
        if self.read_sysctl(name) is None:
            raise MeshError("sysctl %s=%s was refused" % (name, value))
        self.node._change("sysctl", name, value)
        self.sysctls[name] = value

    def stand_in(self, monkeypatch, *modules):
        """Replace what touches files in `_system` and in modules that imported it."""
        monkeypatch.setattr(_system, "file_mode", self.file_mode)
        monkeypatch.setattr(_system, "remove_file", self.remove_file)
        for module in (_system,) + modules:
            for name in ("read_text", "write_text", "read_sysctl", "write_sysctl", "remove_file"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(self, name))
            if hasattr(module, "remove_empty_folders"):
                monkeypatch.setattr(module, "remove_empty_folders", lambda paths: None)


class WireGuard:
    """The WireGuard devices of a node; `client_for` gives what `_wg.client_for` would."""

    def __init__(self, node):
        self.node = node
        self.states = {}
        self.secrets = {}  # {path of a preshared key: what is in it}
        self.preshared_keys = {}  # {(device, public key): the preshared key that the device has}
        node.forgotten.append(lambda name: self.states.pop(name, None))

    def client_for(self, name, wait=0.0, run_command=None):
        if name not in self.node.links:
            raise MeshError("device %s does not exist" % name)
        return self

    def read(self, name, preshared_key_files=None):
        state = self.states.get(name) if name in self.node.links else None
        state = copy.deepcopy(state or _wg_plan.empty_state(name))
        for key, peer in state["peers"].items():
            if peer["has_preshared_key"] and key in (preshared_key_files or {}):
                peer["preshared_key_matches"] = self.preshared_keys.get((name, key)) == self.secrets.get(preshared_key_files[key])
        return state

    def apply(self, name, steps):
        for step in steps:
            self.node._change("wg", step["op"], step.get("public_key") or "")
            if step.get("preshared_key_file"):
                self.preshared_keys[name, step["public_key"]] = self.secrets[step["preshared_key_file"]]
            self.states[name] = _wg_plan.apply_to_state(self.read(name), step)
