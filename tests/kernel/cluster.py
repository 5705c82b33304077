# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A cluster of light nodes inside the machine of vm.py: real kernel WireGuard, real modules, traffic that is counted exactly.

A node is a network namespace, a mount namespace with its own /etc (overlay) and /run (tmpfs), and a host name. Nodes hang on one bridge,
which stands for the underlay; each has a bridge cni0 with pods (network namespaces) and, as a CNI with host gateways would make them, a
route to the pod CIDRs of every other node. Dual stack throughout.

Modules run as ansible-core runs them, but without starting an interpreter for each (2 s under emulation): this process imports them
once, and each call is a fork that enters the node's namespaces and calls the module's main() with its arguments.

Runs as root inside the machine. Python 3.11, standard library and the payload's ansible.module_utils.
"""
from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import pathlib
import re
import selectors
import socket
import struct
import subprocess
import sys
import time
import traceback

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000  # linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # linux/mount.h
SOL_PACKET, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 23, 3  # linux/if_packet.h, if_ether.h
SOL_RAW, ICMP_FILTER, ICMP6_FILTER = 255, 1, 1
# /etc as it was at the first boot: what nodes start with, also where the machine itself is a node with files of the mesh
PRISTINE_ETC = "/var/lib/kubemesh-vm/etc"
RATE = 20  # packets per second and flow
LATE = 3.0  # seconds without an answer until those that are missing are lost
MARKER = b"kubemesh-plaintext-"
DOCUMENT = "/etc/kubemesh/mesh.json"
MODULES = "ansible_collections.kubemesh.wireguard.plugins.modules."

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result, what):
    if result:
        code = ctypes.get_errno()
        raise OSError(code, "%s: %s" % (what, os.strerror(code)))


def setns(path, kind):
    """Enter the namespace at path."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(handle, kind), "setns %s" % path)
    finally:
        os.close(handle)


def sh(*argv, data=None, check=True, namespace=None):
    """Run a command of this machine (or, with namespace, inside a Node or Net); its stdout. Raises RuntimeError with what it said."""
    done = subprocess.run(argv, input=data, text=True, capture_output=True, check=False,
                          preexec_fn=namespace.enter if namespace else None)
    if check and done.returncode:
        raise RuntimeError("%s%s ended with %d: %s" % (namespace.name + ": " if namespace else "", " ".join(argv), done.returncode,
                                                       (done.stderr or done.stdout).strip()[-800:]))
    return done.stdout


class ModuleFailed(RuntimeError):
    """A module failed or did not end as a module does. result: what it returned ({} when that was no JSON)."""

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class Net:
    """A network namespace (a pod, the underlay)."""

    def __init__(self, name, addresses=None):
        self.name = name
        self.netns = "/run/netns/" + name
        self.addresses = addresses or {}  # {"ipv4": ..., "ipv6": ...}

    def enter(self):
        """For a forked child only."""
        setns(self.netns, CLONE_NEWNET)

    def sh(self, *argv, data=None, check=True):
        return sh(*argv, data=data, check=check, namespace=self)

    def call(self, function, *args):
        """function(*args) in a child inside the namespace; what it returned (JSON), or RuntimeError with its traceback."""
        return collect(spawn(self, function, *args))

    def ip(self, lines, *options):
        """Run lines with `ip -batch`; options: -6 for routes whose family cannot be told from the text (default)."""
        if lines:
            sh("ip", *options, "-batch", "-", data="\n".join(lines) + "\n", namespace=self)

    def veth(self, name, other, other_name):
        """A pair of devices, one here and one in another namespace."""
        sh(*("ip link add %s%s type veth peer name %s%s" % (name, self.in_netns(), other_name, other.in_netns())).split())

    def in_netns(self):
        return " netns " + self.name

    def socket(self, *args):
        """A socket made in this namespace, for the process that calls (single-threaded)."""
        with open("/proc/self/ns/net", "rb") as home:
            setns(self.netns, CLONE_NEWNET)
            try:
                return socket.socket(*args)
            finally:
                _check(_libc.setns(home.fileno(), CLONE_NEWNET), "setns back")


class Scratch(Net):
    """A network namespace of its own for functions that work on devices: `with Scratch() as net: net.call(function, ...)`."""

    def __init__(self, name="kmscratch"):
        super().__init__(name)

    def __enter__(self):
        sh("ip", "netns", "add", self.name)
        sh("ip", "-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *dummy):
        sh("ip", "netns", "del", self.name)


class Here:
    """The namespace this process is in."""

    name = "here"

    def enter(self):
        pass

    def sh(self, *argv, data=None, check=True):
        return sh(*argv, data=data, check=check)


class Node(Net):
    """A node: as Net, with files and a host name of its own. pods: list of Net."""

    def __init__(self, name, netns, number, pods):
        super().__init__(netns, {"ipv4": "198.18.0.%d" % (10 + number), "ipv6": "2001:db8::%d" % (10 + number)})
        self.node_name = name
        self.number = number
        self.pod_cidrs = ["10.244.%d.0/24" % number, "fd00:10:244:%d::/64" % number]
        self.pods = pods
        self.holder = None
        self._keep = None

    def start(self):
        """Fork the process that keeps the mount and UTS namespace, and set these up."""
        ready, tell = os.pipe()
        hold, self._keep = os.pipe()
        self.holder = os.fork()
        if self.holder == 0:
            code = 1
            try:
                os.close(self._keep)
                os.close(ready)
                setns(self.netns, CLONE_NEWNET)
                _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWUTS), "unshare")
                _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount / private")
                socket.sethostname(self.node_name)
                for argv in (["mount", "-t", "tmpfs", "tmpfs", "/run"], ["mkdir", "-p", "/run/.etc/upper", "/run/.etc/work"],
                             ["mount", "-t", "overlay", "overlay", "-o",
                              "lowerdir=%s,upperdir=/run/.etc/upper,workdir=/run/.etc/work" % PRISTINE_ETC, "/etc"],
                             ["mount", "-t", "sysfs", "sysfs", "/sys"]):
                    subprocess.run(argv, check=True)
                os.write(tell, b"1")
                os.close(tell)
                os.read(hold, 1)  # until stop()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(tell)
        os.close(hold)
        os.set_inheritable(self._keep, False)
        try:
            if os.read(ready, 1) != b"1":
                raise RuntimeError("node %s did not start" % self.node_name)
        finally:
            os.close(ready)

    def stop(self):
        """End the process of start(); the namespaces go with it."""
        if self.holder:
            os.write(self._keep, b"x")
            os.close(self._keep)
            os.waitpid(self.holder, 0)
            self.holder = None

    def enter(self):
        """For a forked child only."""
        if self.holder is None:  # not started yet: its network is all there is
            setns(self.netns, CLONE_NEWNET)
            return
        setns("/proc/%d/ns/uts" % self.holder, CLONE_NEWUTS)
        setns(self.netns, CLONE_NEWNET)
        setns("/proc/%d/ns/mnt" % self.holder, CLONE_NEWNS)

    def path(self, name):
        """Where this process finds a file of the node."""
        return "/proc/%d/root%s" % (self.holder, name)

    def read(self, name):
        """Content of a file of the node, None when there is none."""
        try:
            with open(self.path(name), encoding="utf-8") as handle:
                return handle.read()
        except FileNotFoundError:
            return None

    def write(self, name, text):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as handle:
            handle.write(text)


def spawn(namespace, function, *args):
    """Fork; the child enters the namespace and sends function(*args) back as JSON. Returns (pid, pipe)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    answer = {}
    try:
        os.close(reader)
        namespace.enter()
        answer["value"] = function(*args)
    except BaseException:
        answer["error"] = traceback.format_exc()
    try:
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(writer, data):]
    finally:
        os._exit(0)


def collect(child):
    """What the function of spawn() returned."""
    pid, reader = child
    with os.fdopen(reader, "rb") as handle:
        data = handle.read()
    os.waitpid(pid, 0)
    answer = json.loads(data or b'{"error": "the child died"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def _run_module(name, args, check_mode, diff):
    """In a child: the module's main(), with its stdout in a file. Returns [exit code, stdout, stderr]."""
    import tempfile

    from ansible.module_utils.testing import patch_module_args

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        full = dict(args, _ansible_check_mode=check_mode, _ansible_diff=diff, _ansible_no_log=False,
                    _ansible_module_name="kubemesh.wireguard." + name)
        code = 0
        try:
            with patch_module_args(full):
                importlib.import_module(MODULES + name).main()
        except SystemExit as exc:
            code = exc.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for handle in (out, err):
            handle.seek(0)
            texts.append(handle.read().decode("utf-8", "replace"))
    return [code] + texts


def start_module(node, name, args, check_mode=False, diff=False):
    """Run a module in a node without waiting; hand the answer to end_module."""
    return node, name, spawn(node, _run_module, name, args, check_mode, diff)


def end_module(started, allow_failure=False):
    """The result of a module as a dict. Raises ModuleFailed."""
    node, name, child = started
    code, out, err = collect(child)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {}
    if not lines or (code and not result.get("failed")):
        raise ModuleFailed("%s on %s ended with %d and no result: %s" % (name, node.node_name, code, (out + err).strip()[-2000:]), result)
    if result.get("failed") and not allow_failure:
        raise ModuleFailed("%s on %s: %s" % (name, node.node_name, result.get("msg")), result)
    return result


class Machine(Node):
    """The machine itself as a node: its own files, systemd, and the bridges `underlay` and `cni0`, which somebody else makes at boot."""

    def __init__(self, name, number, pods):
        super().__init__(name, "machine", number, pods)

    def start(self):
        pass

    def enter(self):
        pass

    def path(self, name):
        return name

    def socket(self, *args):
        return socket.socket(*args)

    def in_netns(self):
        return ""


class Cluster:
    """Nodes worker-1 ... worker-N. As a context manager it takes everything away again.

    machine: the first node is the machine itself, and its bridge `underlay` is the underlay.
    """

    def __init__(self, nodes=3, pods=1, prefix="km", strict_rp_filter=True, machine=False):
        self.prefix = prefix
        self.machine = machine
        self.calls = []  # (begin, end, "module on nodes") of what ran: a loss is told with what was done then
        self.nodes = []
        for number in range(1, nodes + 1):
            netns = "%sn%d" % (prefix, number)
            locals_ = [Net("%sp%dx%d" % (prefix, number, index), {"ipv4": "10.244.%d.%d" % (number, 10 + index),
                                                                  "ipv6": "fd00:10:244:%d::%x" % (number, 10 + index)})
                       for index in range(pods)]
            if machine and number == 1:
                self.nodes.append(Machine("worker-1", number, locals_))
            else:
                self.nodes.append(Node("worker-%d" % number, netns, number, locals_))
        self.wire = self.nodes[0] if machine else Net(prefix + "wire")
        self.strict = strict_rp_filter
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _made(self):
        """The namespaces that this cluster makes and takes away."""
        nets = [pod for node in self.nodes for pod in node.pods] + self.nodes + [self.wire]
        return [net for net in nets if not isinstance(net, Machine)]

    def _build(self):
        sh("ip", "-batch", "-", data="".join("netns add %s\n" % net.name for net in self._made()))
        if not self.machine:
            self.wire.ip(["link set lo up", "link add underlay type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                          "link set underlay up"])
        for net in self._made():
            values = {"net/ipv6/conf/all/accept_dad": "0", "net/ipv6/conf/default/accept_dad": "0",
                      "net/ipv6/conf/default/router_solicitations": "0"}
            if net is self.wire:
                values["net/ipv6/conf/all/disable_ipv6"] = "1"
            if net in self.nodes:
                values.update({"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
                if self.strict:
                    # what many distributions and hardening guides set; the modules must cope with it
                    values.update({"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/default/rp_filter": "1"})
            collect(spawn(Net(net.name), _write_sysctls, values))
        for node in self.nodes:
            if not isinstance(node, Machine):
                self._build_node(node)
            for index, pod in enumerate(node.pods):
                pod.veth("eth0", node, "pod%d" % index)
                node.ip(["link set pod%d master cni0 up" % index])
                pod.ip(["link set lo up", "link set eth0 up", "addr add %s/24 dev eth0" % pod.addresses["ipv4"],
                        "addr add %s/64 dev eth0 nodad" % pod.addresses["ipv6"], "route add default via 10.244.%d.1" % node.number])
                pod.ip(["route add default via fd00:10:244:%d::1" % node.number], "-6")
            node.start()

    def _build_node(self, node):
        node.veth("eth0", self.wire, "n%d" % node.number)
        self.wire.ip(["link set n%d master underlay up" % node.number])
        others = [other for other in self.nodes if other is not node]
        node.ip(["link set lo up", "link set eth0 up", "addr add %s/24 dev eth0" % node.addresses["ipv4"],
                 "addr add %s/64 dev eth0 nodad" % node.addresses["ipv6"],
                 "link add cni0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set cni0 up",
                 "addr add 10.244.%d.1/24 dev cni0" % node.number, "addr add fd00:10:244:%d::1/64 dev cni0 nodad" % node.number]
                + ["route add %s via %s" % (other.pod_cidrs[0], other.addresses["ipv4"]) for other in others])
        node.ip(["route add %s via %s" % (other.pod_cidrs[1], other.addresses["ipv6"]) for other in others], "-6")

    def close(self):
        for node in self.nodes:
            node.stop()
        sh("ip", "-force", "-batch", "-", data="".join("netns del %s\n" % net.name for net in self._made()), check=False)

    def __enter__(self):
        return self

    def __exit__(self, *dummy):
        self.close()

    def node(self, name):
        return next(node for node in self.nodes if node.node_name == name)

    # ---- modules

    def module(self, where, name, /, check_mode=False, diff=False, allow_failure=False, **args):
        """One module on one node: its result."""
        begin = time.monotonic()
        try:
            return end_module(start_module(where, name, args, check_mode, diff), allow_failure)
        finally:
            self.calls.append((begin, time.monotonic(), "%s on %s" % (name, where.node_name)))

    def modules(self, name, /, check_mode=False, diff=False, nodes=None, **args):
        """The same module on all nodes at once: {node name: result}. A callable argument is called with the node."""
        begin = time.monotonic()
        started = []
        for node in nodes or self.nodes:
            values = {key: value(node) if callable(value) else value for key, value in args.items()}
            started.append(start_module(node, name, values, check_mode, diff))
        results, failure = {}, None
        for one in started:
            try:
                results[one[0].node_name] = end_module(one)
            except RuntimeError as exc:
                failure = exc
        self.calls.append((begin, time.monotonic(), "%s on %s" % (name, ", ".join(one[0].node_name for one in started))))
        if failure:
            raise failure
        return results

    # ---- the mesh document

    def make_keys(self, generation=0):
        """keypair on every node: {node name: public key}."""
        results = self.modules("keypair", path="/etc/wireguard/wgmesh%d.key" % generation)
        return {name: result["public_key"] for name, result in results.items()}

    def document(self, keys, serial=1, mtu=1420, **changes):
        """The mesh document. keys: {"0": {node name: public key}, ...}; changes: {node name with _ for -: {field: value}}."""
        from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh

        nodes = {}
        for node in self.nodes:
            own = {generation: names[node.node_name] for generation, names in keys.items() if node.node_name in names}
            nodes[node.node_name] = {
                "state": "member" if own else "pending", "reason": "" if own else "no key yet", "uid": "uid-%s" % node.node_name,
                "public_keys": own, "probe_addresses": {generation: _mesh.probe_address(key) for generation, key in own.items()},
                "endpoints": {family: {"address": address, "port": None} for family, address in node.addresses.items()},
                "pod_cidrs": list(node.pod_cidrs), "node_addresses": [node.addresses["ipv4"], node.addresses["ipv6"]], "mtu": mtu,
                "keepalive": 0}
            nodes[node.node_name].update(changes.get(node.node_name.replace("-", "_"), {}))
        return {"schema": 1, "serial": serial, "complete": True, "generation": 0, "ports": {"0": 51840, "1": 51841}, "nodes": nodes}

    def distribute(self, document):
        """Put the document on every node, as the exchange stage does."""
        from ansible_collections.kubemesh.wireguard.plugins.module_utils import _mesh

        _mesh.validate_document(document)
        text = _mesh.document_bytes(document).decode()
        for node in self.nodes:
            node.write(DOCUMENT, text)

    # ---- traffic

    def flows(self, kinds=("pod-pod", "host-pod", "pod-host")):
        """Every directed pair of different nodes, both families: [(name, source namespace, source, destination)]."""
        flows = []
        for a in self.nodes:
            for b in self.nodes:
                if a is b:
                    continue
                for family in ("ipv4", "ipv6"):
                    ends = {"pod": (a.pods[0], b.pods[0]), "host": (a, b)}
                    for kind in kinds:
                        left, right = kind.split("-")
                        source, target = ends[left][0], ends[right][1]
                        flows.append(("%s %s>%s %s" % (kind, a.node_name, b.node_name, family), source,
                                      None if left == "host" else source.addresses[family], target.addresses[family]))
        return flows

    def pinger(self, kinds=("pod-pod", "host-pod", "pod-host"), rate=RATE):
        return Background(_ping_loop, self.flows(kinds), rate)

    def losses(self, report):
        """{} or what a pinger lost, with all that helps to find out why: {flow: {"lost", "errors", "when"},
        "counters": {node: {name: value}}}."""
        found = {}
        for name, flow in report["flows"].items():
            if flow["lost"]:
                when = [self._doing(at, report) for at in flow["lost_at"][:5]]
                found[name] = {"lost": flow["lost"], "errors": flow["errors"], "when": when}
        if found:
            found["counters"] = {node.node_name: node.call(_drop_counters) for node in self.nodes}
        return found

    def _doing(self, moment, report):
        doing = ["%s since %.2f s" % (text, moment - begin) for begin, end, text in self.calls if begin <= moment <= end]
        done = ["%.2f s after %s" % (moment - end, text) for dummy, end, text in self.calls if end < moment]
        return "at %.2f s: %s" % (moment - report["start"], ", ".join(doing + done[-1:]) or "before any module")

    def sniffer(self, port=None):
        """port: only that port of the underlay's bridge."""
        return Background(_sniff_loop, self.wire, port)


def _drop_counters():
    """The counters of this namespace by which the kernel tells why it dropped something, those that are not 0."""
    found = {}
    for path in ("/proc/net/snmp", "/proc/net/netstat"):
        lines = [line.split() for line in pathlib.Path(path).read_text().splitlines()]
        for names, values in zip(lines[::2], lines[1::2]):
            found.update((names[0] + name, int(value)) for name, value in zip(names[1:], values[1:]))
    ipv6 = pathlib.Path("/proc/net/snmp6")
    for line in ipv6.read_text().splitlines() if ipv6.exists() else ():
        name, value = line.split()
        found[name] = int(value)
    words = ("Discard", "NoRoute", "Errors", "Filter", "Drop", "NoPorts", "ForwDatagrams")
    return {name: value for name, value in found.items() if value and any(word in name for word in words)}


def _write_sysctls(values):
    for name, value in values.items():
        with open("/proc/sys/" + name, "w", encoding="ascii") as handle:
            handle.write(value)


class Background:
    """function(stop, *args) in a forked process until stop() is called; stop is a file descriptor that becomes readable then."""

    def __init__(self, function, *args):
        self._stop_reader, self._stop_writer = os.pipe()
        self._child = spawn(self, function, self._stop_reader, *args)
        os.close(self._stop_reader)

    def enter(self):
        os.close(self._stop_writer)  # in the child

    def stop(self):
        """What the function returned."""
        if self._stop_writer is not None:
            os.write(self._stop_writer, b"x")  # closing is not enough: children forked later have a copy
            os.close(self._stop_writer)
            self._stop_writer = None
            return collect(self._child)
        return None

    def __enter__(self):
        return self

    def __exit__(self, *dummy):
        self.stop()


def checksum(data):
    """Internet checksum, RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ping_socket(net, source, target):
    v6 = ":" in target
    if v6:
        sock = net.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        mask = [0xFFFFFFFF] * 8
        mask[129 >> 5] &= ~(1 << (129 & 31))  # echo reply
        sock.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, struct.pack("=8I", *mask))
    else:
        sock = net.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", 0xFFFFFFFE))  # echo reply is 0
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.setblocking(False)
    if source:
        sock.bind((source, 0))
    # Not connected: a route is then looked up for every packet, as for forwarded ones, and a host's source address may follow it.
    return sock


def _ping_loop(stop, flows, rate):
    """Send `rate` echo requests per second and flow until stop. {"flows": {name: {...}}, "sent", "received", "lost", "duplicates"}."""
    state = []
    poll = selectors.DefaultSelector()
    poll.register(stop, selectors.EVENT_READ, None)
    for index, (name, net, source, target) in enumerate(flows):
        sock = _ping_socket(net, source, target)
        one = {"name": name, "sock": sock, "target": target, "index": index, "sent": {}, "got": {}, "errors": {}, "late": 0.0}
        state.append(one)
        poll.register(sock, selectors.EVENT_READ, one)
    period = 1.0 / rate
    start = time.monotonic()
    due = [start + period * index / len(state) for index in range(len(state))]
    running, end = True, 0.0
    while running or time.monotonic() < end:
        now = time.monotonic()
        if running:
            for index, one in enumerate(state):
                if due[index] <= now:
                    _ping_send(one, now)
                    due[index] = max(due[index] + period, now)  # no bursts after the machine stood still
            timeout = max(0.0, min(due) - time.monotonic())
        else:
            if all(len(one["got"]) == len(one["sent"]) for one in state):
                break
            timeout = max(0.0, end - now)
        for key, dummy in poll.select(timeout):
            if key.data is None:
                poll.unregister(stop)
                running = False
            else:
                _ping_receive(key.data)
            end = time.monotonic() + LATE  # counted from the last answer: a busy machine may still be at it
    report = {"flows": {}, "start": start, "end": time.monotonic(), "sent": 0, "received": 0, "lost": 0}
    for one in state:
        lost = sorted(seq for seq in one["sent"] if seq not in one["got"])
        report["flows"][one["name"]] = {
            "sent": len(one["sent"]), "received": len(one["got"]), "lost": len(lost), "errors": one["errors"],
            "lost_at": [round(one["sent"][seq], 3) for seq in lost[:200]], "slowest": round(one["late"], 4)}
        report["sent"] += len(one["sent"])
        report["received"] += len(one["got"])
        report["lost"] += len(lost)
    report["slowest"] = max(one["late"] for one in state)
    return report


def _ping_send(one, now):
    seq = len(one["sent"]) + 1
    v6 = ":" in one["target"]
    body = struct.pack("!BBHHHHI", 128 if v6 else 8, 0, 0, 0x4B00 + one["index"], seq & 0xFFFF, one["index"], seq)
    body += MARKER + b"%05d" % one["index"]
    if not v6:
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    one["sent"][seq] = now
    try:
        one["sock"].sendto(body, (one["target"], 0))
    except OSError as exc:
        name = errno.errorcode.get(exc.errno, str(exc.errno))
        one["errors"][name] = one["errors"].get(name, 0) + 1


def _ping_receive(one):
    for dummy in range(64):
        try:
            data = one["sock"].recv(2048)
        except BlockingIOError:
            return
        except OSError:
            continue
        if ":" not in one["target"]:
            data = data[(data[0] & 15) * 4:]
        if len(data) < 14 or data[0] not in (0, 129):
            continue
        index, seq = struct.unpack_from("!HI", data, 8)
        # every raw socket of a namespace sees every answer that comes to it
        if index == one["index"] and seq in one["sent"] and seq not in one["got"]:
            one["got"][seq] = True
            one["late"] = max(one["late"], time.monotonic() - one["sent"][seq])


def _sniff_loop(stop, wire, port):
    """Look for the marker in every frame on the underlay: {"plain": {flow index: [count, first, last]}, "wireguard": count, ...}."""
    sock = wire.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    if port:
        sock.bind((port, ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)  # a bridge shows each frame once more on its way out
    sock.setblocking(False)
    found, frames, tunnelled = {}, 0, 0
    poll = selectors.DefaultSelector()
    poll.register(stop, selectors.EVENT_READ)
    poll.register(sock, selectors.EVENT_READ)
    pattern = re.compile(re.escape(MARKER) + rb"(\d{5})")
    running = True
    while running:
        for key, dummy in poll.select():
            if key.fd == stop:
                running = False
                continue
            for dummy2 in range(256):
                try:
                    data = sock.recv(2048)
                except BlockingIOError:
                    break
                frames += 1
                match = pattern.search(data)
                if match:
                    now = time.monotonic()
                    entry = found.setdefault(match.group(1).decode(), [0, now, now])
                    entry[0] += 1
                    entry[2] = now
                elif b"\x04\0\0\0" in (data[42:46], data[62:66]):  # WireGuard transport data behind IPv4 or IPv6 and UDP
                    tunnelled += 1
    statistics = sock.getsockopt(SOL_PACKET, 6, 8)  # PACKET_STATISTICS
    return {"plain": found, "frames": frames, "tunnelled": tunnelled, "dropped": struct.unpack("=II", statistics)[1]}


def preload(names):
    """What makes all that follows possible or quick: a copy of /etc, and modules imported here so that their forks need not."""
    if not os.path.isdir(PRISTINE_ETC):
        sh("cp", "-a", "/etc", PRISTINE_ETC)
    from ansible.module_utils import basic, testing  # noqa: F401

    for name in names:
        importlib.import_module(MODULES + name)
