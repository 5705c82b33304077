# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node agents in network namespaces with userspace WireGuard, and the API server of the tests. Needs root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "api"))

import apiserver
import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_plan, _guard_plan, _mesh, _routes_plan

PORT, TABLE, PRIORITY, MARK = 51840, 51840, 400, 0x1000
PROGRAM = "ansible_collections.kubemesh.wireguard.plugins.module_utils._agent"
KEY, KEY_1 = "kubemesh.wireguard/public-key-0", "kubemesh.wireguard/public-key-1"
API = "api"

# Sends a marker every few milliseconds to a UDP port, from a number on, and does not mind who drops it.
SEND_ON = """
import contextlib, itertools, socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as each:
    for number in itertools.count(int(sys.argv[2])):
        with contextlib.suppress(OSError):
            each.sendto(b"<kmg-%d>" % number, (sys.argv[1], 7))
        time.sleep(0.005)
"""


class AgentLab:
    """``hosts``: all nodes; ``members``: those of the first document. The others have a device with a key, and no peers. A context manager.

    ``grace`` in seconds; ``encrypt`` as the variable mesh_encrypt; ``strict``: settings of the guard that every node has, beside the usual
    ones, or None. ``pod_source``: as `_pods.SOURCES`; with any but node_cidrs a node has the ``prefixes`` of the first document, its Node
    none, and its rules steer by known sources.
    """

    def __init__(self, folder, hosts, members=None, grace=1, encrypt="pods", strict=None, pod_source="node_cidrs", prefixes=None):
        self.folder, self.hosts, self.grace = Path(folder), list(hosts), grace
        self.encrypt, self.strict = encrypt, strict
        self.pod_source, self.prefixes = pod_source, prefixes or {}
        self.pods = {}
        self.members = list(members or hosts)
        self.net = netlab.Net([*self.hosts, API])
        self.keys = {host: netlab.new_key() for host in self.hosts}
        self.agents = {}
        self.devices = {}

    def __enter__(self):
        self.net.__enter__()
        try:
            self.api = apiserver.ApiServer(self.net.address(API), 6443, self.folder / "tls", {"agent": "t-1"}, self.net.ns(API)).start()
            for host in self.members:
                self.api.apply("nodes", self.node(host))
            for host in self.hosts:
                self._prepare(host)
                if self.strict is not None:
                    self.guard(host, **self.strict)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        for host in list(self.agents):
            self.stop(host)
        if hasattr(self, "api"):
            self.api.stop()
        self.net.close()

    def number(self, host):
        return self.hosts.index(host) + 1

    def cidr(self, host):
        return "10.244.%d.0/24" % self.number(host)

    def node(self, host, key=None, cidrs=None, annotations=None, **more):
        """The Node object of a host, with its key as annotation."""
        if cidrs is None:
            cidrs = [self.cidr(host)] if self.pod_source == "node_cidrs" else []
        return apiserver.node(host, cidrs, [self.net.address(host)], annotations or {KEY: key or self.keys[host][1]}, **more)

    def document(self, serial=1):
        nodes = {}
        for host in self.members:
            public = self.keys[host][1]
            nodes[host] = {
                "state": "member", "reason": "", "uid": self.api.get("nodes", host)["metadata"]["uid"], "public_keys": {"0": public},
                "endpoints": {"ipv4": {"address": self.net.address(host), "port": None}},
                "pod_cidrs": self.prefixes.get(host, [self.cidr(host)]), "node_addresses": [self.net.address(host)],
                "probe_addresses": {"0": _mesh.probe_address(public)}, "mtu": 1420, "keepalive": 0}
        return _mesh.validate_document({
            "schema": 1, "serial": serial, "complete": True, "generation": 0, "ports": {"0": PORT, "1": PORT + 1}, "nodes": nodes})

    def leave_document(self, document):
        """A document as a run leaves it on its members."""
        for host in self.members:
            path = self.place(host) / "mesh.json"
            path.with_suffix(".new").write_bytes(_mesh.document_bytes(_mesh.validate_document(document)))
            path.with_suffix(".new").replace(path)

    def second_generation(self, host):
        """A device with a key of its own beside the first one, as `rotate_keys` makes it; -> the public key."""
        private, public = netlab.new_key()
        device = self.net.userspace_device(host, 1)
        self.net.exec(host, "wg", "setconf", device, "/dev/stdin",
                      stdin="[Interface]\nPrivateKey = %s\nListenPort = %d\nFwMark = %d\n" % (private, PORT + 1, MARK))
        self.net.ip(host, "link set %s mtu 1420 up" % device)
        self.net.sysctl(host, "net/ipv4/conf/%s/rp_filter" % device, 2)
        return public

    def take_second_generation(self, host, document):
        """Accept and send through the second device, and take the first one away."""
        old, new = self.devices[host], self.devices[host][:-1] + "1"
        self.net.ip(host, *["addr add %s dev %s" % (address, new) for address in _mesh.device_addresses(document, host, "1")])
        for key, peer in _mesh.peers_of(document, host, "1").items():
            self.net.exec(host, "wg", "set", new, "peer", key, "endpoint", peer["endpoint"], "allowed-ips", ",".join(peer["allowed_ips"]))
        settings = {"interface": new, "table": TABLE, "rule_priority": PRIORITY, "fwmark": MARK, "encrypt": self.encrypt, "send": True,
                    "unproven": "keep", "exempt_cidrs": [], "iifs": [], "own_cidrs": None}
        routes = _routes_plan.wanted_state(document, host, settings, None, [])["routes"]
        self.net.ip(host, *["route replace %s" % _routes_plan.route_text(route).split("  #")[0] for route in routes])
        self.net.exec(host, "ip", "link", "del", old)
        self.devices[host] = new

    def place(self, host):
        return self.folder / host

    def _prepare(self, host):
        """What the playbook enable leaves on a node: device with key, document, rules for the boot."""
        place = self.place(host)
        for name in ("runtime", "state", "boot", "lock"):
            (place / name).mkdir(parents=True, exist_ok=True)
        (place / "lock").chmod(0o700)
        (place / "token").write_text("t-1\n")
        device = self.devices[host] = self.net.userspace_device(host)
        self.net.exec(host, "wg", "setconf", device, "/dev/stdin",
                      stdin="[Interface]\nPrivateKey = %s\nListenPort = %d\n" % (self.keys[host][0], PORT))
        self.net.ip(host, "link set %s up" % device)
        # a pod, so that there is something to reach
        self.net.ip(host, "link add pod0 type bridge", "link set pod0 up", "addr add 10.244.%d.1/32 dev pod0" % self.number(host))
        for name, value in (("all", 0), ("eth0", 2), (device, 2)):
            self.net.sysctl(host, "net/ipv4/conf/%s/rp_filter" % name, value)
        self.net.sysctl(host, "net/ipv4/ip_forward", 1)
        self.install(host)

    def install(self, host, serial=1, **config):
        """The document and configuration of a host, as a run of the playbooks leaves them."""
        place = self.place(host)
        members = self.members if host in self.members else [*self.members, host]
        own, self.members = self.members, members
        if host not in own:
            self.api.apply("nodes", self.node(host))
        document = self.document(serial)
        if host not in own:
            self.api.delete("nodes", host)
        self.members = own
        (place / "mesh.json").write_bytes(_mesh.document_bytes(document))
        settings = {"rule_priority": PRIORITY, "table": TABLE, "fwmark": MARK, "encrypt": self.encrypt, "send": True,
                    "iifs": [], "own_cidrs": None}
        if self.pod_source != "node_cidrs":
            settings["iifs"] = ["lo", "eth0", self.devices[host]]
        state = {"rules": _routes_plan.wanted_rules(document, host, settings), "routes": []}
        for family in ("ipv4", "ipv6"):
            (place / "boot" / ("rules-%s.batch" % family)).write_text(_routes_plan.rules_text(state, family))
        (place / "agent.json").write_text(_agent_plan.config_text(dict({
            "node": host, "server": self.api.url, "ca_file": self.api.ca_file, "token_file": str(place / "token"),
            "interface": self.devices[host][:-1], "table": TABLE, "rule_priority": PRIORITY, "fwmark": MARK, "exempt_cidrs": [],
            "exclude_nodes": [], "service_cidrs": [], "pod_source": self.pod_source, "grace": self.grace,
            "document_file": str(place / "mesh.json"),
            "boot_folder": str(place / "boot"), "lock_file": str(place / "lock" / "lock.json"), "runtime": str(place / "runtime"),
            "state": str(place / "state"), "metrics_file": str(place / "state" / "kubemesh.prom")}, **config)))

    def pod(self, host, address):
        """A pod of a node with routes to it on all nodes, as many networks have it: a device of its own, strict reverse-path filtering on
        its host. -> its name, for `in_pod`."""
        name = "%s-pod%d" % (self.net.tag, len(self.pods))
        device = "pod%d-%d" % (self.number(host), len(self.pods))
        self.net._namespace(name)
        self.pods[address] = name
        self.net.ip(host, "link add %s type veth peer name eth0 netns %s" % (device, name), "link set %s up" % device,
                    "addr add 169.254.1.1/32 dev %s" % device, "route add %s/32 dev %s" % (address, device))
        netlab.run("ip", "-n", name, "-batch", "-", stdin="\n".join((
            "link set eth0 up", "addr add %s/32 dev eth0" % address, "route add 169.254.1.1 dev eth0 scope link",
            "route add default via 169.254.1.1")) + "\n")
        self.net.sysctl(host, "net/ipv4/conf/%s/rp_filter" % device, 1)
        for other in self.hosts:
            if other != host:
                self.net.ip(other, "route add %s/32 via %s" % (address, self.net.address(host)))
        return name

    def ping(self, source, target):
        """Whether one answer comes back; ``source``: name of a host, or address of a pod."""
        where = self.pods.get(source) or self.net.ns(source)
        # a lost neighbour request must not count
        return ", 0 received" not in netlab.run(
            "ip", "netns", "exec", where, "ping", "-q", "-c", "2", "-i", "0.2", "-W", "2", target, check=False)

    def guard(self, host, **settings):
        """The guard of a host, as the module of that name leaves it: in the kernel, and in the file for the boot."""
        stem = self.devices[host][:-1]
        document = _mesh.load_document((self.place(host) / "mesh.json").read_text())
        wanted = _guard_plan.wanted_guard(document, host, dict({
            "encrypt": self.encrypt, "interfaces": [stem + "0", stem + "1"], "ports": None, "fwmark": MARK, "exempt_nodes": [],
            "exempt_cidrs": [], "pod_networks": [], "admin_ports": [22]}, **settings))
        path = self.place(host) / "boot" / "guard.nft"
        path.with_suffix(".new").write_text(_guard_plan.ruleset_text(wanted))
        path.with_suffix(".new").replace(path)
        self.load_guard(host)

    def load_guard(self, host):
        """What the boot does."""
        self.net.exec(host, "nft", "-f", str(self.place(host) / "boot" / "guard.nft"))

    def clear_way(self, host, other):
        """Lead what a host sends to the pods of another outside the mesh, as a CNI does."""
        self.net.ip(host, "route replace %s via %s" % (self.cidr(other), self.net.address(other)))

    def send_on(self, host, address, first=1):
        """Start to send markers to an address, see `SEND_ON`."""
        return self.net.start(host, sys.executable, "-S", "-c", SEND_ON, address, first)

    # --- agents

    def start(self, *hosts):
        for host in hosts or self.hosts:
            with open(self.place(host) / "log", "ab") as handle:
                self.agents[host] = subprocess.Popen(
                    ["ip", "netns", "exec", self.net.ns(host), sys.executable, "-m", PROGRAM, str(self.place(host) / "agent.json")],
                    stdin=subprocess.DEVNULL, stdout=handle, stderr=handle,
                    env=dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)))

    def stop(self, host, kill=False):
        process = self.agents.pop(host)
        if process.poll() is None:
            (process.kill if kill else process.terminate)()
        return process.wait(timeout=20 * netlab.PATIENCE)

    def log(self, host):
        path = self.place(host) / "log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def state(self, host):
        path = self.place(host) / "runtime" / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    # --- the kernel

    def routes(self, host):
        """Prefixes that have a route into the mesh device, both tables."""
        found = set()
        for table in (TABLE, TABLE + 1):
            lines = self.net.exec(host, "ip", "-4", "route", "show", "table", table, check=False).splitlines()
            found |= {line.split()[0] for line in lines if "dev " + self.devices[host] in line}
        return found

    def allowed(self, host):
        """{public key: allowed IPs} of the device."""
        lines = self.net.exec(host, "wg", "show", self.devices[host], "allowed-ips").splitlines()
        return {line.split("\t")[0]: set(line.split("\t")[1].split()) for line in lines}

    def rules(self, host):
        return sum(1 for line in self.net.exec(host, "ip", "-4", "rule").splitlines() if "lookup %d" % TABLE in line
                   or "lookup %d" % (TABLE + 1) in line)

    def sends_to(self, host, *others):
        """Whether a host routes to all these and to nobody else."""
        wanted = {self.cidr(other) for other in others} | {self.net.address(other) for other in others}
        return self.routes(host) == wanted

    def guarded(self, host, name="pods4"):
        """The elements of a set of the guard; None where there is no table."""
        text = self.net.exec(host, "nft", "-j", "list", "table", "inet", _guard_plan.TABLE, check=False)
        if not text.strip():
            return None
        return {_guard_plan.interval_text(piece) for piece in _guard_plan.table_from_nft(text)["elements"][name]}

    def dropped(self, host):
        """Packets that the guard dropped."""
        text = self.net.exec(host, "nft", "-j", "list", "counters", "table", "inet", _guard_plan.TABLE, check=False)
        found = json.loads(text)["nftables"] if text.strip() else []
        return sum(item["counter"]["packets"] for item in found if "counter" in item)

    def wait(self, ready, what, seconds=30.0):
        try:
            netlab.wait_for(ready, what, seconds)
        except RuntimeError as exc:
            logs = "".join("--- %s\n%s" % (host, self.log(host)) for host in self.hosts)
            raise AssertionError("%s\n%s" % (exc, logs)) from None

    def whole(self, *hosts):
        """Wait until each of these nodes sends to all others of them, and to nobody else."""
        rules = 2 if self.encrypt == "pods" else 3
        for host in hosts:
            self.wait(lambda host=host: self.sends_to(host, *[other for other in hosts if other != host]) and self.rules(host) == rules,
                      "routes of %s to all of %s" % (host, ", ".join(hosts)))


def why_not():
    return netlab.why_not() or ("" if shutil.which("openssl") else "missing: openssl")
