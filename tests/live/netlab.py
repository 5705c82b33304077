# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A few hosts on one bridge, each a network namespace, with userspace WireGuard where wanted. For tests; needs root.

All names begin with ``kmpr-`` and the pid of the test run, so that runs do not meet. Nothing reaches the machine's own network.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

# Limits of time are for a machine that does nothing else; on others KUBEMESH_LIVE_PATIENCE multiplies them.
PATIENCE = float(os.environ.get("KUBEMESH_LIVE_PATIENCE", "1"))

TOOLS = ("ip", "nft", "wg", "wireguard-go")
# Unlike in the kernel, the sockets of userspace devices share one directory, whatever the namespace.
SOCKETS = Path("/run/wireguard")

RUN_MODULE = """
import json, sys
from ansible.module_utils import basic
name, arguments = json.load(sys.stdin)
basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
basic._ANSIBLE_PROFILE = "legacy"
module = __import__("ansible_collections.kubemesh.wireguard.plugins.modules." + name, fromlist=["main"])
module.main()
"""

# Prints the marker of every packet that is seen: on all devices ("wire"), or that came to a UDP port of this host.
LISTEN = r"""
import re, select, socket, sys
if sys.argv[1] == "wire":
    sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))]
    sockets[0].setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
else:
    sockets = []
    for port in sys.argv[2:]:
        sockets.append(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sockets[-1].bind(("::", int(port)))
print("ready", flush=True)
while True:
    for each in select.select(sockets, [], [])[0]:
        data, source = each.recvfrom(65535)
        for marker in re.findall(rb"<kmg-\d+>", data):
            print(marker.decode(), flush=True)
            if sys.argv[1] == "echo":
                each.sendto(b"answer " + data, source)
"""

# Seconds in which a packet that passes is there; it takes less than a millisecond.
SOON = 5.0 * PATIENCE


def why_not():
    """Why live tests cannot run here, or an empty text."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return "missing: " + ", ".join(missing)
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    return ""


def run(*argv, check=True, stdin=None):
    done = subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, text=True, timeout=120 * PATIENCE, check=False)
    if check and done.returncode:
        raise RuntimeError("%s: code %d: %s" % (" ".join(map(str, argv)), done.returncode, done.stderr or done.stdout))
    return done.stdout


COUNTER = itertools.count()


class Net:
    """``hosts`` is a list of names; each gets 198.18.7.N/24 and fd00:187::N/64 on eth0. Use as a context manager."""

    def __init__(self, hosts, mtu=1500):
        self.number = next(COUNTER)
        self.tag = "kmpr-%d-%d" % (os.getpid(), self.number)
        self.fabric = self.tag + "-fab"
        self.hosts = list(hosts)
        self.mtu = mtu
        self.processes = []
        self.namespaces = []

    def __enter__(self):
        try:
            self._namespace(self.fabric)
            self.ip(None, "link add br0 type bridge", "link set br0 mtu %d up" % self.mtu)
            for host in self.hosts:
                self._add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc):
        self.close()

    def ns(self, host):
        return self.fabric if host is None else "%s-%s" % (self.tag, host)

    def address(self, host, family="ipv4"):
        number = self.hosts.index(host) + 1
        return "198.18.7.%d" % number if family == "ipv4" else "fd00:187::%x" % number

    def _namespace(self, name):
        run("ip", "netns", "add", name)
        self.namespaces.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _add(self, host):
        self._namespace(self.ns(host))
        port = "p%d" % (self.hosts.index(host) + 1)
        self.ip(None, "link add %s type veth peer name eth0 netns %s" % (port, self.ns(host)),
                "link set %s mtu %d master br0 up" % (port, self.mtu))
        self.ip(host, "link set eth0 mtu %d up" % self.mtu, "addr add %s/24 dev eth0" % self.address(host),
                "addr add %s/64 dev eth0 nodad" % self.address(host, "ipv6"))

    def ip(self, host, *lines):
        run("ip", "-n", self.ns(host), "-batch", "-", stdin="\n".join(lines) + "\n")

    def exec(self, host, *argv, check=True, stdin=None):
        return run("ip", "netns", "exec", self.ns(host), *argv, check=check, stdin=stdin)

    def start(self, host, *argv, **kwargs):
        process = subprocess.Popen(["ip", "netns", "exec", self.ns(host)] + [str(word) for word in argv], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)
        self.processes.append(process)
        return process

    def nft(self, host, rules=None):
        """Replace the one table of tests in a host by ``rules`` (the body of the table), or take it away."""
        self.exec(host, "nft", "-f", "-", stdin="table inet kmpr\ndelete table inet kmpr\n" + (
            "table inet kmpr {\n%s\n}\n" % rules if rules else ""))

    def sysctl(self, host, name, value):
        self.exec(host, "sh", "-c", "echo %s > /proc/sys/%s" % (value, name))

    def device_name(self, host, generation=0):
        # at most 15 characters (IFNAMSIZ), and unlike in the kernel unique on the machine
        return "kp%x%x%s%d" % (os.getpid() & 0xFFFF, self.number, host, generation)

    def userspace_device(self, host, generation=0):
        """Start wireguard-go in a host; -> name of the device, whose automatic link-local address is off."""
        name = self.device_name(host, generation)
        self.start(host, "wireguard-go", "-f", name, env=dict(os.environ, LOG_LEVEL="silent"))
        wait_for((SOCKETS / (name + ".sock")).exists, "the socket of " + name)
        self.exec(host, "ip", "link", "set", name, "addrgenmode", "none")
        return name

    def module(self, host, name, check=False, **arguments):
        """Run a module of the collection in a host; -> its result."""
        arguments = dict(arguments, _ansible_check_mode=check, _ansible_diff=True)
        paths = [path for path in sys.path if path]
        done = subprocess.run(["ip", "netns", "exec", self.ns(host), sys.executable, "-c", RUN_MODULE], input=json.dumps([name, arguments]),
                              capture_output=True, text=True, timeout=120 * PATIENCE, check=False,
                              env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)))
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise RuntimeError("module %s printed no result: %s%s" % (name, done.stdout, done.stderr)) from None

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)
        for name in self.namespaces:
            run("ip", "netns", "del", name, check=False)


class Listener:
    """What `LISTEN` sees in a network namespace, from now on: ``"wire"``, ``"udp"`` or ``"echo"`` with ports."""

    def __init__(self, net, namespace, *arguments):
        self.seen, self.news = set(), threading.Condition()
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", LISTEN] + [str(word) for word in arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        net.processes.append(self.process)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("nobody listens in %s" % namespace)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.news:
                self.seen.add(line.strip())
                self.news.notify_all()

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=SOON)

    def wait(self, marker, seconds=SOON):
        with self.news:
            return self.news.wait_for(lambda: marker in self.seen, seconds)


def wait_for(ready, what, seconds=20.0):
    deadline = time.monotonic() + seconds * PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError("%s did not appear within %d s" % (what, seconds))
        time.sleep(0.05)


def new_key():
    """-> (private, public), as text."""
    private = run("wg", "genkey").strip()
    return private, run("wg", "pubkey", stdin=private + "\n").strip()
