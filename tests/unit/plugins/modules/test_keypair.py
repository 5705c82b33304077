# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import shutil
import stat
from unittest import mock

import pytest
from ansible.module_utils import basic

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.modules import keypair

pytestmark = pytest.mark.skipif(not shutil.which("wg"), reason="no wg on this machine, and cryptography may be absent too")


@pytest.fixture
def path(tmp_path):
    os.chmod(tmp_path, 0o700)
    return str(tmp_path / "wgmesh0.key")


def key_text(path):
    with open(path) as file:
        return file.read().strip()


@pytest.mark.parametrize("check_first", [False, True])
def test_create_then_keep(run_module, path, check_first):
    if check_first:
        planned = run_module(keypair.main, {"path": path}, check=True)
        assert planned["changed"] and planned["created"] and planned["public_key"] is None and planned["age"] is None
        assert planned["diff"]["before"] == {"path": path, "state": "absent"}
        assert planned["diff"]["after"] == {"path": path, "state": "present", "mode": "0600", "public_key": None}
        assert os.listdir(os.path.dirname(path)) == []

    made = run_module(keypair.main, {"path": path})
    assert made["changed"] and made["created"] and len(made["public_key"]) == 44
    assert made["diff"]["after"] == {"path": path, "state": "present", "mode": "0600", "public_key": made["public_key"]}
    assert key_text(path) not in run_module.output

    for check in (True, False):
        again = run_module(keypair.main, {"path": path}, check=check)
        assert not again["changed"] and not again["created"]
        assert again["public_key"] == made["public_key"] and again["path"] == path and again["age"] >= 0
        assert again["diff"]["before"] == again["diff"]["after"]
        assert key_text(path) not in run_module.output


def test_no_trace_of_the_key_in_arguments_or_log(run_module, path):
    """Everything that goes to a command line or to the log of the system is recorded."""
    recorded = []
    real = basic.AnsibleModule.run_command

    def run_command(self, args, **kwargs):
        recorded.append(repr(args) + repr(sorted(set(kwargs) - {"data"})))
        return real(self, args, **kwargs)

    with mock.patch.object(basic.AnsibleModule, "run_command", run_command), \
            mock.patch.object(basic.AnsibleModule, "log", lambda self, msg, log_args=None: recorded.append(repr((msg, log_args)))), \
            mock.patch.object(_keys, "_public_by_cryptography", lambda raw: None):
        run_module(keypair.main, {"path": path})
        run_module(keypair.main, {"path": path})
    assert any("pubkey" in line for line in recorded)
    assert key_text(path) not in "".join(recorded)


def test_regenerate(run_module, path):
    first = run_module(keypair.main, {"path": path})
    planned = run_module(keypair.main, {"path": path, "regenerate": "always"}, check=True)
    assert planned["changed"] and planned["public_key"] is None
    assert planned["diff"]["before"]["public_key"] == first["public_key"]
    assert run_module(keypair.main, {"path": path})["public_key"] == first["public_key"]
    second = run_module(keypair.main, {"path": path, "regenerate": "always"})
    assert second["changed"] and second["created"] and second["public_key"] != first["public_key"]
    assert second["diff"]["before"]["public_key"] == first["public_key"]
    assert run_module(keypair.main, {"path": path})["public_key"] == second["public_key"]


@pytest.mark.parametrize("regenerate", ["never", "always"])
def test_damaged_file_stays(run_module, path, regenerate):
    with open(path, "w") as file:
        file.write("AAAAsecretAAAA\n")
    for check in (True, False):
        failed = run_module(keypair.main, {"path": path, "regenerate": regenerate}, check=check)
        assert failed["failed"] and path in failed["msg"] and "state=absent" in failed["msg"]
        assert "secret" not in run_module.output
    assert key_text(path) == "AAAAsecretAAAA"
    assert run_module(keypair.main, {"path": path, "state": "absent"})["changed"]
    assert run_module(keypair.main, {"path": path})["created"]


def test_loose_mode_is_repaired_with_a_warning(run_module, path, monkeypatch):
    warnings = []
    # not from the result: where the controller's code is loaded as well, a warning is printed instead, and only once
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda self, text: warnings.append(text))
    made = run_module(keypair.main, {"path": path})
    os.chmod(path, 0o644)
    planned = run_module(keypair.main, {"path": path}, check=True)
    assert planned["changed"] and not planned["created"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    done = run_module(keypair.main, {"path": path})
    assert done["changed"] and done["public_key"] == made["public_key"]
    assert done["diff"]["before"]["mode"] == "0644" and done["diff"]["after"]["mode"] == "0600"
    assert planned["diff"] == done["diff"]
    assert len(warnings) == 2 and all(path in text and "mode 0644" in text and "rotate" in text for text in warnings)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not run_module(keypair.main, {"path": path})["changed"]


def test_absent(run_module, path):
    run_module(keypair.main, {"path": path})
    planned = run_module(keypair.main, {"path": path, "state": "absent"}, check=True)
    assert planned["changed"] and os.path.exists(path)
    done = run_module(keypair.main, {"path": path, "state": "absent"})
    assert done["changed"] and done["public_key"] is None and not os.path.exists(path)
    assert planned["diff"] == done["diff"] and done["diff"]["before"] != done["diff"]["after"]
    assert "out of reach" in done["msg"]
    again = run_module(keypair.main, {"path": path, "state": "absent"})
    assert not again["changed"] and "no key" in again["msg"]


def test_a_faster_run_wins_and_is_reported(run_module, path, monkeypatch):
    theirs = _keys.generate_private_key()
    real = _keys.create

    def create(target, raw):
        real(target, theirs)
        return real(target, raw)
    monkeypatch.setattr(_keys, "create", create)
    done = run_module(keypair.main, {"path": path})
    assert not done["created"] and not done["changed"]
    assert key_text(path) == _keys.encode_key(theirs)
    assert done["public_key"] == run_module(keypair.main, {"path": path})["public_key"]


def test_no_way_to_compute_the_public_key_leaves_no_key_behind(run_module, path, monkeypatch):
    monkeypatch.setattr(_keys, "_public_by_cryptography", lambda raw: None)
    monkeypatch.setattr(basic.AnsibleModule, "get_bin_path", lambda self, *args, **kwargs: None)
    failed = run_module(keypair.main, {"path": path})
    assert failed["failed"] and "wireguard-tools" in failed["msg"]
    assert not os.path.exists(path)


@pytest.mark.parametrize(("number", "words"), [
    (errno.EROFS, "mount the file system"), (errno.ENOSPC, "make room"), (errno.EDQUOT, "quota"), (errno.EACCES, "as root"),
    (errno.EIO, "check the file system")])
def test_errors_of_the_system_name_file_and_remedy(run_module, path, monkeypatch, number, words):
    def create(target, raw):
        raise OSError(number, os.strerror(number), target)
    monkeypatch.setattr(_keys, "create", create)
    failed = run_module(keypair.main, {"path": path})
    assert failed["failed"] and path in failed["msg"] and os.strerror(number) in failed["msg"] and words in failed["msg"]
