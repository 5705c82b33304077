# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Preshared keys on real userspace devices, and the script that sets them at boot with the real wg. Needs root; see netlab.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import netlab

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _persist, _psk, _psk_files
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _wg_plan as plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg_uapi import UapiClient

pytestmark = pytest.mark.skipif(bool(netlab.why_not()), reason="live tests: " + netlab.why_not())

SECRET = "gSQT2aHkYbq0mXJ8r1nZfVw5cLpE7uDi93KoA64xRtM="
OTHER = "another secret of the cluster, as after a change"
HOSTS = ["a", "b", "c"]
PORT = 51840


class Mesh:
    """Three hosts, a tunnel between each two, their keys in directories of their own."""

    def __init__(self, net, folder):
        self.net, self.folder, self.client = net, folder, UapiClient(wait=30)
        self.keys = {host: netlab.new_key() for host in HOSTS}
        self.devices = {}
        for number, host in enumerate(HOSTS, start=1):
            path = folder / (host + ".key")
            path.write_text(self.keys[host][0] + "\n")
            path.chmod(0o600)
            name = self.devices[host] = net.userspace_device(host)
            net.ip(host, "addr add 10.9.0.%d/24 dev %s" % (number, name), "link set %s up" % name)

    def document(self):
        return {"serial": 1, "nodes": {host: {"state": "member", "reason": "", "public_keys": {"0": self.keys[host][1]}} for host in HOSTS}}

    def psk_folder(self, host):
        return str(self.folder / (host + ".psk"))

    def write(self, host, secret):
        own = _psk.keys_of_node(self.document(), host, 0, secret)
        with _psk_files.Folder(self.psk_folder(host), create=True) as there:
            there.write({key: _psk.encode(value) for key, value in own["keys"].items()})
        return own["keys"]

    def wanted(self, host, preshared=True):
        peers = {}
        for number, other in enumerate(HOSTS, start=1):
            if other != host:
                peers[self.keys[other][1]] = {
                    "name": other, "endpoint": "%s:%d" % (self.net.address(other), PORT), "keepalive": 0,
                    "allowed_ips": ["10.9.0.%d/32" % number]}
        if preshared:
            for key, path in _psk.paths_of(self.psk_folder(host), peers).items():
                peers[key]["preshared_key_file"] = path
        return {"public_key": self.keys[host][1], "private_key_file": str(self.folder / (host + ".key")), "listen_port": PORT, "fwmark": 0,
                "keep_unknown_peers": False, "peers": peers}

    def read(self, host):
        return self.client.read(self.devices[host], _psk.paths_of(self.psk_folder(host), [key for dummy, key in self.keys.values()]))

    def converge(self, host, preshared=True):
        steps = plan.plan_device(self.read(host), self.wanted(host, preshared))
        self.client.apply(self.devices[host], steps)
        assert plan.plan_device(self.read(host), self.wanted(host, preshared)) == []
        return steps

    def of_wg(self, host):
        """What wg says of the preshared keys: {public key: preshared key or (none)}."""
        out = self.net.exec(host, "wg", "show", self.devices[host], "preshared-keys")
        return dict(line.split() for line in out.splitlines())

    def forget_sessions(self, host):
        """New sessions from now on, as after a reboot: another key and then the right one again."""
        name = self.devices[host]
        self.net.exec(host, "wg", "set", name, "private-key", "/dev/stdin", stdin=netlab.new_key()[0] + "\n")
        self.net.exec(host, "wg", "set", name, "private-key", str(self.folder / (host + ".key")))

    def reaches(self, host, other, seconds=20.0):
        """Whether an answer comes; the first handshake may have to be tried again, every five seconds."""
        address = "10.9.0.%d" % (HOSTS.index(other) + 1)
        deadline = time.monotonic() + seconds
        while True:
            out = self.net.exec(host, "ping", "-n", "-q", "-c", "1", "-W", "1", address, check=False)
            if re.search(r" 1 received", out):
                return True
            if time.monotonic() > deadline:
                return False


@pytest.fixture
def mesh(tmp_path):
    os.chmod(str(tmp_path), 0o700)
    with netlab.Net(HOSTS) as net:
        yield Mesh(net, tmp_path)


def test_derived_on_each_node_and_good_for_each_pair(mesh):
    for host in HOSTS:
        wanted = mesh.write(host, SECRET)
        mesh.converge(host)
        assert mesh.of_wg(host) == {key: base64.b64encode(value).decode() for key, value in wanted.items()}
    assert mesh.reaches("a", "b") and mesh.reaches("a", "c") and mesh.reaches("b", "c")
    assert mesh.converge("a") == []
    # another secret on one side only: the session goes on, and a new one does not come up
    mesh.write("b", OTHER)
    state = mesh.read("b")
    assert not any(peer["preshared_key_matches"] for peer in state["peers"].values())
    steps = mesh.converge("b")
    assert [step["op"] for step in steps] == ["update_peer"] * 2
    assert mesh.reaches("a", "b", seconds=3), "WireGuard looks at it at handshakes only"
    mesh.forget_sessions("b")
    assert not mesh.reaches("b", "a", seconds=12)
    # on both sides
    for host in ("a", "c"):
        mesh.write(host, OTHER)
        mesh.converge(host)
    assert mesh.reaches("b", "a") and mesh.reaches("c", "b")
    # and taken away again
    for host in HOSTS:
        mesh.converge(host, preshared=False)
        assert set(mesh.of_wg(host).values()) == {"(none)"}
        mesh.forget_sessions(host)
    assert mesh.reaches("a", "b")


def test_at_boot(mesh):
    """What wg-quick and the unit do: the configuration without keys, the preshared keys, the private key."""
    wanted = {host: mesh.write(host, SECRET) for host in HOSTS}
    for host in HOSTS:
        name, own = mesh.devices[host], mesh.wanted(host)
        conf = mesh.folder / (host + ".setconf")
        conf.write_text(_persist.setconf_text(dict(own, interface=name)))
        mesh.net.exec(host, "wg", "setconf", name, str(conf))
        script = mesh.folder / (host + ".sh")
        script.write_text(_persist.preshared_keys_text(name, mesh.psk_folder(host)))
        assert mesh.net.exec(host, "sh", str(script)) == ""
        assert mesh.of_wg(host) == {key: base64.b64encode(value).decode() for key, value in wanted[host].items()}
        mesh.net.exec(host, "wg", "set", name, "private-key", own["private_key_file"])
        assert mesh.converge(host) == [], "nothing is left to do for the next run"
    assert mesh.reaches("a", "b") and mesh.reaches("b", "c")
    # a peer that is no more is not brought back by its file, and one whose file is damaged does not stand in the way
    name, b, c = mesh.devices["a"], mesh.keys["b"][1], mesh.keys["c"][1]
    mesh.net.exec("a", "wg", "set", name, "peer", b, "remove")
    mesh.net.exec("a", "sh", str(mesh.folder / "a.sh"))
    assert set(mesh.of_wg("a")) == {c}
    mesh.net.exec("a", "wg", "set", name, "peer", b)
    mesh.net.exec("a", "wg", "set", name, "peer", c, "preshared-key", "/dev/null")
    Path(_psk.paths_of(mesh.psk_folder("a"), [b])[b]).write_text("damaged")
    assert mesh.net.exec("a", "sh", str(mesh.folder / "a.sh")) == ""
    assert mesh.of_wg("a") == {b: "(none)", c: base64.b64encode(wanted["a"][c]).decode()}


# --- whole runs --------------------------------------------------------------------------------------------------------------------------

PLAYBOOK_COMMAND = shutil.which("ansible-playbook") or shutil.which("ansible-playbook", path=os.path.dirname(sys.executable))
COLLECTIONS = next((path for path in sys.path if os.path.isdir(os.path.join(path or ".", "ansible_collections", "kubemesh"))), None)

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - name: Preshared keys
      kubemesh.wireguard.preshared_keys: &task
        secret: "{{ mesh_psk_secret }}"
        document_src: "{{ playbook_dir }}/mesh.json"
        node: "{{ inventory_hostname }}"
        path: "{{ playbook_dir }}/{{ inventory_hostname }}.psk"
      register: keys
    - name: What is known of them
      ansible.builtin.debug:
        var: keys
    - name: A secret that is too short
      kubemesh.wireguard.preshared_keys:
        <<: *task
        secret: "{{ mesh_psk_secret[:20] }}"
      ignore_errors: true
    - name: A node that is none
      kubemesh.wireguard.preshared_keys:
        <<: *task
        node: nobody
      ignore_errors: true
    - name: A directory that is none
      kubemesh.wireguard.preshared_keys:
        <<: *task
        path: /proc/version
      ignore_errors: true
"""


class Watch(threading.Thread):
    """Looks for a text in the arguments and environments of all processes, as long as a program runs."""

    def __init__(self, texts):
        super().__init__(daemon=True)
        self.texts, self.found, self.done = [text.encode() for text in texts], set(), threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            for name in filter(str.isdigit, os.listdir("/proc")):
                for kind in ("cmdline", "environ"):
                    try:
                        with open("/proc/%s/%s" % (name, kind), "rb") as handle:
                            content = handle.read()
                    except OSError:
                        continue
                    self.found.update(kind for text in self.texts if text in content)


def forms(secret):
    return [base64.b64encode(secret).decode(), secret.hex(), repr(secret), hashlib.sha256(secret).hexdigest()]


@pytest.mark.skipif(not PLAYBOOK_COMMAND or COLLECTIONS is None, reason="no ansible-playbook")
@pytest.mark.parametrize("options", [[], ["--check"]])
def test_nothing_secret_is_printed_logged_or_an_argument(tmp_path, options):
    """With all that Ansible can be made to print; names of peers are."""
    os.chmod(str(tmp_path), 0o700)
    public = {host: netlab.new_key()[1] for host in HOSTS}
    document = {"serial": 1, "nodes": {host: {"state": "member", "reason": "", "public_keys": {"0": public[host]}} for host in HOSTS}}
    (tmp_path / "mesh.json").write_text(json.dumps(document))
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "secret.yml").write_text(json.dumps({"mesh_psk_secret": SECRET + "\n"}))
    keys = {host: _psk.keys_of_node(document, host, 0, SECRET)["keys"] for host in HOSTS}
    secrets = [SECRET, SECRET[:20]] + [form for own in keys.values() for key in own.values() for form in forms(key)]
    environment = dict(
        os.environ, ANSIBLE_COLLECTIONS_PATH=str(COLLECTIONS), ANSIBLE_HOME=str(tmp_path / "home"), LC_ALL="C.UTF-8",
        ANSIBLE_DEBUG="1", ANSIBLE_LOG_PATH=str(tmp_path / "log"), ANSIBLE_DISPLAY_ARGS_TO_STDOUT="true")
    command = [PLAYBOOK_COMMAND, "-vvvvv", "--diff", "-i", "a,b,", "-c", "local", "-e", "@" + str(tmp_path / "secret.yml"),
               "-e", "ansible_python_interpreter=" + sys.executable, str(tmp_path / "play.yml")] + options
    watch = Watch(secrets)
    watch.start()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False, env=environment,
                          cwd=str(tmp_path))
    watch.done.set()
    watch.join(30)
    printed = done.stdout + done.stderr + (tmp_path / "log").read_text()
    assert done.returncode == 0, printed[-5000:]
    assert "peer b: preshared key added" in printed and "openssl rand -base64 32" in printed
    assert not any(text in printed for text in secrets) and watch.found == set()
    for host in ("a", "b"):
        folder = tmp_path / (host + ".psk")
        expected = {} if options else {_psk.file_name(key): base64.b64encode(value).decode() for key, value in keys[host].items()}
        assert {item.name: item.read_text().strip() for item in folder.glob("*")} == expected
