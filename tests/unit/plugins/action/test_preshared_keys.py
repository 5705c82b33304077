# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of preshared keys: what is sent to a node, and what is told of it. The module behind it is the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import traceback
from unittest import mock

import pytest

pytest.importorskip("ansible.plugins.action")  # not where only modules are tested

from ansible.errors import AnsibleActionFail
from ansible.module_utils import basic

from ansible_collections.kubemesh.wireguard.plugins.action import preshared_keys as action
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk
from ansible_collections.kubemesh.wireguard.plugins.modules import preshared_keys as module

SECRET = "gSQT2aHkYbq0mXJ8r1nZfVw5cLpE7uDi93KoA64xRtM="


def public_key(number):
    return base64.b64encode((b"\xfb\xef\xbe\xff" if number % 2 else b"\x01\x02\x03\x04") + number.to_bytes(27, "big") + b"\x40").decode()


def document(*numbers, **other):
    nodes = {"node-%d" % number: {"state": "member", "reason": "", "public_keys": {"0": public_key(number)}} for number in numbers}
    for name, entry in other.items():
        nodes[name.replace("_", "-")].update(entry)
    return {"nodes": nodes, "serial": 1}


def key_of(one, other):
    return _psk.derive(SECRET.encode(), public_key(one), public_key(other))


def forms(secret):
    return {base64.b64encode(secret).decode(), secret.hex(), repr(secret), hashlib.sha256(secret).hexdigest(),
            hashlib.sha256(base64.b64encode(secret)).hexdigest(), base64.urlsafe_b64encode(secret).decode()}


class Cluster:
    """Nodes as directories, reached through the action; the real module runs in this process."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.document(document(1, 2, 3))
        self.sent = []  # arguments of each run of the module
        self.told = ""  # everything that came back or was printed

    def document(self, doc):
        self.doc = doc
        (self.folder / "mesh.json").write_text(json.dumps(doc))

    def path(self, node):
        return self.folder / node / "wgmesh0.psk"

    def stored(self, node):
        folder = self.path(node)
        return {item.name: item.read_text().strip() for item in folder.iterdir()} if folder.exists() else {}

    def _execute(self, check, module_name=None, module_args=None, task_vars=None):
        assert module_name == "kubemesh.wireguard.preshared_keys"
        self.sent.append(dict(module_args))
        arguments = dict(module_args, _ansible_check_mode=check, _ansible_diff=True, _ansible_no_log=False)
        data = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
        with mock.patch.object(basic, "_ANSIBLE_ARGS", data), mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy", create=True), \
                pytest.raises(SystemExit):
            module.main()
        printed = self.capsys.readouterr()
        self.told += printed.out + printed.err
        return json.loads(printed.out)

    def run(self, node="node-1", check=False, **other):
        args = dict({"secret": SECRET, "document_src": str(self.folder / "mesh.json"), "node": node,
                     "path": str(self.path(node or "node-1"))}, **other)
        args = {name: value for name, value in args.items() if value is not None}
        connection = mock.Mock()
        connection._shell.tmpdir = "/remote/tmp"
        plugin = action.ActionModule(task=mock.Mock(args=args, check_mode=check, async_val=0), connection=connection,
                                     play_context=mock.Mock(), loader=mock.Mock(), templar=mock.Mock(), shared_loader_obj=mock.Mock())
        removed = []
        plugin._execute_module = lambda **kwargs: self._execute(check, **kwargs)
        plugin._remove_tmp_path = removed.append
        self.sent.clear()
        before = dict(args)
        with mock.patch("ansible.plugins.action.ActionBase.run", lambda self, tmp=None, task_vars=None: {}):
            result = plugin.run(None, {})
        assert args == before, "the arguments of the task are not changed"
        assert removed == ["/remote/tmp"]
        self.told += json.dumps(result)
        return result

    def check_secrets(self):
        """Nothing that was printed or returned has the secret or a key in it, in any form."""
        names = range(1, 9)
        secrets = [SECRET.encode(), base64.b64decode(SECRET)] + [key_of(one, other) for one in names for other in names if one < other]
        for secret in secrets:
            for form in forms(secret):
                assert form not in self.told
        assert SECRET not in self.told and SECRET[:20] not in self.told
        for sent in self.sent:
            assert SECRET not in json.dumps(sent), "the secret stays on the controller"
            texts = [text for name in ("keys", "proofs") for text in (sent.get(name) or {}).values()]
            assert not any(str(text) in repr(sent) for text in texts), "what Ansible prints with ANSIBLE_DEBUG"


@pytest.fixture
def cluster(tmp_path, capsys):
    os.chmod(str(tmp_path), 0o700)
    it = Cluster(tmp_path, capsys)
    yield it
    it.check_secrets()


def test_each_node_gets_its_keys_and_both_ends_the_same(cluster):
    for number in (1, 2, 3):
        result = cluster.run("node-%d" % number)
        others = [other for other in (1, 2, 3) if other != number]
        assert result["changed"] and result["added"] == ["node-%d" % other for other in others] and "needed" not in result
        assert cluster.stored("node-%d" % number) == {
            _psk.file_name(public_key(other)): _psk.encode(key_of(number, other)) for other in others}
        assert result["diff"]["prepared"] == "".join("peer node-%d: preshared key added\n" % other for other in others)
        assert not {"keys", "proofs", "secret"} & set(result.get("invocation", {}).get("module_args", {}))


def test_nothing_secret_is_sent_to_a_node_that_has_its_keys(cluster):
    cluster.run()
    assert [set(sent) & {"keys", "proofs"} for sent in cluster.sent] == [{"proofs"}, {"proofs", "keys"}]
    assert "keys" not in cluster.sent[0] and set(cluster.sent[1]["keys"]) == {public_key(2), public_key(3)}
    result = cluster.run()
    assert not result["changed"] and len(cluster.sent) == 1 and "keys" not in cluster.sent[0]
    nonces = {sent["nonce"] for sent in cluster.sent}
    cluster.run()
    assert cluster.sent[0]["nonce"] not in nonces, "a new one every time"


def test_only_the_keys_that_a_node_needs_are_sent(cluster):
    cluster.run()
    cluster.document(document(1, 2, 3, 4))
    result = cluster.run()
    assert result["added"] == ["node-4"] and set(cluster.sent[1]["keys"]) == {public_key(4)} and len(cluster.stored("node-1")) == 3
    # one that left needs no key at all
    cluster.document(document(1, 3, 4))
    result = cluster.run()
    assert result["removed"] == [public_key(2)] and len(cluster.sent) == 1 and len(cluster.stored("node-1")) == 2


@pytest.mark.parametrize("way", [{"check": True}, {"compare_only": True}])
def test_a_look_sends_no_key(cluster, way):
    result = cluster.run(**way)
    assert result["added"] == ["node-2", "node-3"] and result["differs"] == [] and not cluster.path("node-1").exists()
    assert result["changed"] is ("check" in way)
    cluster.run()
    result = cluster.run(secret="another secret of the cluster, long enough", **way)
    assert result["differs"] == ["node-2", "node-3"] and result["changed"] is ("check" in way)
    assert len(cluster.sent) == 1 and "keys" not in cluster.sent[0]
    assert cluster.run()["changed"] is False


def test_a_member_without_a_key_may_be_one_of_those_that_are_there(cluster):
    cluster.run()
    cluster.document(document(1, 2, 3, node_3={"state": "pending", "public_keys": {}}))
    assert cluster.run()["removed"] == [] and len(cluster.stored("node-1")) == 2
    assert cluster.run(complete=True)["removed"] == [public_key(3)], "unless it is said to be complete"
    cluster.document(document(1, 3))
    assert cluster.run(complete=False)["removed"] == [] and len(cluster.stored("node-1")) == 2


def test_another_generation_has_other_keys(cluster):
    cluster.document(document(1, 2, node_1={"public_keys": {"0": public_key(1), "1": public_key(5)}},
                              node_2={"public_keys": {"0": public_key(2), "1": public_key(6)}}))
    cluster.run(generation=1)
    assert cluster.stored("node-1") == {_psk.file_name(public_key(6)): _psk.encode(key_of(5, 6))}


def test_absent_needs_no_secret(cluster):
    cluster.run()
    for secret in (None, SECRET):
        result = cluster.run(state="absent", secret=secret, document_src=None, node=None)
        assert "secret" not in cluster.sent[0]
    assert not result["changed"] and not cluster.path("node-1").exists()


def test_without_a_secret_the_module_says_what_is_missing(cluster):
    result = cluster.run(secret=None)
    assert result["failed"] and "secret" in result["msg"]


@pytest.mark.parametrize("other,words", [
    ({"secret": "too short"}, "openssl rand -base64 32"), ({"secret": "changeme" * 5}, "openssl"), ({"secret": ""}, "openssl"),
    ({"secret": {"a": SECRET}}, "not text"), ({"secret": [SECRET]}, "not text"), ({"secret": 12345}, "not text"),
    ({"node": "node-9"}, "node-9"), ({"node": None}, "node are needed"), ({"document_src": None}, "document_src"),
    ({"document_src": "/none.json"}, "none.json"), ({"generation": 1}, "generation 1"), ({"generation": "x"}, "generation")])
def test_errors_name_what_is_wrong_and_not_the_secret(cluster, other, words):
    with pytest.raises(AnsibleActionFail, match=words) as caught:
        cluster.run(**other)
    text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__, chain=True))
    assert cluster.sent == [] and SECRET not in str(caught.value) and SECRET not in text
    assert "changemechangeme" not in str(caught.value) and "too short" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"nodes": 5}', '{"nodes": {"node-1": {}}}', "\ufffd",
                                     '{"nodes": {"node-1": {"state": "member", "public_keys": {"0": 5}}}}'])
def test_what_is_no_document(cluster, content):
    (cluster.folder / "mesh.json").write_text(content)
    with pytest.raises(AnsibleActionFail):
        cluster.run()


def test_a_vaulted_text_is_one(cluster):
    class Vaulted:
        """As Ansible has it: text only when asked for."""

        def __str__(self):
            return SECRET + "\n"

    class Text(str):
        """Ansible's texts are subclasses."""

    cluster.run()
    assert cluster.run(secret=Vaulted())["changed"] is False
    assert cluster.run(secret=Text(SECRET))["changed"] is False


def test_a_node_that_fails_is_told_as_it_is(cluster):
    cluster.path("node-1").parent.mkdir()
    cluster.path("node-1").write_text("x")
    result = cluster.run()
    assert result["failed"] and "not a directory" in result["msg"] and len(cluster.sent) == 1
