# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A private key is in its file and nowhere else: not after enable -vvvv, in no form (invariant I5). So are preshared keys, and nowhere
on the nodes is the secret that they are derived from."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import keep_on_failure, made, playbook, text_of

KEY_FILE = "/etc/wireguard/wgmesh0.key"


class CommandLines(threading.Thread):
    """Reads the arguments and environment of every process on the machine, nodes included, as long as it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.end, self.rounds = set(), threading.Event(), 0

    def run(self):
        while not self.end.wait(0.1):
            self.rounds += 1
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    for name in ("cmdline", "environ"):
                        try:
                            with open("/proc/%s/%s" % (entry, name), "rb") as handle:
                                self.seen.add(handle.read())
                        except OSError:
                            continue


@pytest.fixture(scope="module")
def lab():
    found = made("secret", nodes=2, pods=1)
    yield found
    if not keep_on_failure():
        found.down()


def forms(text):
    """The ways in which 32 bytes could be written somewhere."""
    raw = base64.b64decode(text)
    encoded = [text.strip().rstrip("=").encode(), base64.urlsafe_b64encode(raw).rstrip(b"=")]
    return encoded + [raw, raw.hex().encode(), repr(raw)[2:-1].encode()]


def read_tree(top):
    """(path, bytes) of every regular file below a directory."""
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) < 64 << 20:
                try:
                    with open(path, "rb") as handle:
                        yield path, handle.read()
                except OSError:
                    continue


SECRET = "correct-horse-battery-staple-0123456789"


def test_secrets_are_only_in_their_files(lab, tmp_path):
    watcher = CommandLines()
    watcher.start()
    temporary = tmp_path / "controller"
    temporary.mkdir()
    (lab.state / "secret.json").write_text(json.dumps({"mesh_psk_secret": SECRET}))
    run = playbook(lab, "enable", "-vvvv", "--diff", "-e", "@%s" % (lab.state / "secret.json"), env={
        "ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path / "facts"), "ANSIBLE_GATHERING": "smart",
        "ANSIBLE_KEEP_REMOTE_FILES": "1", "TMPDIR": str(temporary)})
    watcher.end.set()
    watcher.join()
    assert watcher.rounds > 20 and len(watcher.seen) > 50
    for node in lab.nodes:
        found = lab.exec(node, ["cat", KEY_FILE]).stdout
        key = (found.decode() if isinstance(found, bytes) else found).strip()
        assert len(key) == 44
        preshared = text_of(lab, node, "cat /etc/wireguard/wgmesh0.psk/*").split()
        assert len(preshared) == 1 and text_of(lab, node, "wg show wgmesh0 preshared-keys").split()[1:] == preshared
        wanted = forms(key) + forms(preshared[0]) + [SECRET.encode(), base64.b64encode(SECRET.encode())]
        root = "/proc/%d/root" % lab.leader(node)
        # The search itself must be able to find it.
        with open(root + KEY_FILE, "rb") as handle:
            assert any(form in handle.read() for form in wanted[:1])
        haystack = [("output", run.text.encode())]
        haystack += [("arguments", text) for text in watcher.seen]
        journal = lab.exec(node, ["journalctl", "--no-pager", "-o", "export"]).stdout
        haystack.append(("journal", journal if isinstance(journal, bytes) else journal.encode()))
        for top in (tmp_path, lab.state / "logs"):
            haystack += list(read_tree(top))
        for top in ("/etc", "/root", "/tmp", "/run", "/var/log", "/var/tmp", "/var/lib/systemd", "/home"):
            haystack += [(path, text) for path, text in read_tree(root + top)
                         if not path.endswith(KEY_FILE) and "/wgmesh0.psk/" not in path]
        leaks = [place for place, text in haystack for form in wanted if form in text]
        assert leaks == []
