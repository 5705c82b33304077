# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The API server of the tests, asked with nothing but ``http.client``."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import apiserver

NODES = "/api/v1/nodes"


@pytest.fixture
def api():
    with apiserver.ApiServer(tokens={"agent": "t-1"}) as server:
        for number in range(1, 6):
            server.apply("nodes", apiserver.node("w%d" % number, ["10.244.%d.0/24" % number], ["198.18.0.%d" % number]))
        yield server


class Client:
    def __init__(self, api, token="t-1"):
        self.connection = http.client.HTTPConnection(api.address, api.port, timeout=10)
        self.headers = {"Authorization": "Bearer " + token}

    def ask(self, path, method="GET", body=None, **headers):
        """-> (status, parsed answer)."""
        self.connection.request(method, path, None if body is None else json.dumps(body), dict(self.headers, **headers))
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def watch(self, path):
        self.connection.request("GET", path, headers=self.headers)
        answer = self.connection.getresponse()
        assert answer.status == 200
        return answer


def event(stream):
    line = stream.readline()
    return json.loads(line) if line else None


def test_list_in_pages_is_of_one_moment(api):
    client = Client(api)
    code, first = client.ask(NODES + "?limit=2")
    assert (code, first["kind"], first["metadata"]["remainingItemCount"]) == (200, "NodeList", 3)
    api.delete("nodes", "w5")
    token, names = first["metadata"]["continue"], [item["metadata"]["name"] for item in first["items"]]
    while token:
        code, page = client.ask("%s?limit=2&continue=%s" % (NODES, token))
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        names += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue")
    assert names == ["w1", "w2", "w3", "w4", "w5"]


def test_expired_continue_token(api):
    client = Client(api)
    token = client.ask(NODES + "?limit=2")[1]["metadata"]["continue"]
    api.expire_continues()
    code, body = client.ask("%s?limit=2&continue=%s" % (NODES, token))
    assert (code, body["reason"]) == (410, "Expired")


def test_watch_resumes_and_ends(api):
    client = Client(api)
    version = client.ask(NODES)[1]["metadata"]["resourceVersion"]
    api.heartbeat(name="w1")
    stream = client.watch("%s?watch=1&allowWatchBookmarks=true&resourceVersion=%s" % (NODES, version))
    assert event(stream)["type"] == "MODIFIED"
    api.apply("nodes", apiserver.node("w6"))
    added = event(stream)
    assert (added["type"], added["object"]["metadata"]["name"], added["object"]["kind"]) == ("ADDED", "w6", "Node")
    api.delete("nodes", "w6")
    assert event(stream)["type"] == "DELETED"
    api.bookmark()
    mark = event(stream)
    assert mark["type"] == "BOOKMARK" and int(mark["object"]["metadata"]["resourceVersion"]) >= int(version) + 3
    api.close_watches()
    assert event(stream) is None


def test_watch_without_version_begins_with_everything(api):
    stream = Client(api).watch(NODES + "?watch=true&fieldSelector=metadata.name%3Dw2")
    assert event(stream)["object"]["metadata"]["name"] == "w2"


def test_an_object_that_fits_no_more_is_gone_for_who_selects(api):
    client = Client(api)
    api.apply("pods", apiserver.pod("p", "w1", ["10.0.0.1"]))
    version = client.ask("/api/v1/pods")[1]["metadata"]["resourceVersion"]
    stream = client.watch("/api/v1/pods?watch=1&resourceVersion=%s&fieldSelector=status.phase%%21%%3DSucceeded" % version)
    for phase in ("Running", "Succeeded", "Succeeded", "Running"):
        api.apply("pods", apiserver.pod("p", "w1", ["10.0.0.1"], phase=phase))
    assert [(found["type"], found["object"]["status"]["phase"]) for found in (event(stream), event(stream), event(stream))] == [
        ("MODIFIED", "Running"), ("DELETED", "Succeeded"), ("ADDED", "Running")]


def test_compaction_is_gone_in_the_stream(api):
    client = Client(api)
    version = client.ask(NODES)[1]["metadata"]["resourceVersion"]
    api.compact()
    error = event(client.watch("%s?watch=1&resourceVersion=%s" % (NODES, version)))
    assert (error["type"], error["object"]["code"], error["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_tokens_and_refusals(api):
    assert Client(api, "wrong").ask(NODES)[0] == 401
    api.refuse("list", "nodes", "t-1")
    code, body = Client(api).ask(NODES)
    assert code == 403 and 'User "agent" cannot list resource "nodes"' in body["message"]
    assert Client(api).ask(NODES + "/w1")[0] == 200
    api.permit()
    api.set_tokens({"agent": "t-2"})
    assert (Client(api).ask(NODES)[0], Client(api, "t-2").ask(NODES)[0]) == (401, 200)


def test_patch_and_conflict(api):
    client = Client(api)
    patch = {"metadata": {"annotations": {"kubemesh.wireguard/public-key-0": "K", "node.alpha.kubernetes.io/ttl": None}}}
    code, body = client.ask(NODES + "/w1", "PATCH", patch, **{"Content-Type": "application/merge-patch+json"})
    assert code == 200 and body["metadata"]["annotations"] == {"kubemesh.wireguard/public-key-0": "K"}
    patch["metadata"]["resourceVersion"] = "1"
    assert client.ask(NODES + "/w1", "PATCH", patch, **{"Content-Type": "application/merge-patch+json"})[0] == 409
    assert client.ask(NODES + "/w1", "PATCH", patch, **{"Content-Type": "application/json"})[0] == 415


def test_a_patch_for_another_uid_is_refused(api):
    client, merge = Client(api), {"Content-Type": "application/merge-patch+json"}
    own = api.get("nodes", "w1")["metadata"]["uid"]
    for uid, code in ((own, 200), ("other", 422)):
        answer, body = client.ask(NODES + "/w1", "PATCH", {"metadata": {"uid": uid, "annotations": {"by": uid}}}, **merge)
        assert answer == code
    assert (body["reason"], body["details"]["causes"][0]["field"]) == ("Invalid", "metadata.uid")
    assert api.get("nodes", "w1")["metadata"]["annotations"]["by"] == own


def test_dry_run_changes_nothing(api):
    client, before = Client(api), api.get("nodes", "w1")
    for method, patch in (("PATCH", {"metadata": {"annotations": {"a": "b"}}}), ("DELETE", None)):
        assert client.ask(NODES + "/w1?dryRun=All", method, patch, **{"Content-Type": "application/merge-patch+json"})[0] == 200
        assert api.get("nodes", "w1") == before


@pytest.mark.parametrize("fault, more, seen", [
    ("status", {"code": 500}, 500), ("status", {"code": 410}, 410), ("empty", {}, "empty"), ("garbage", {}, ValueError),
    ("half", {"bytes": 100}, http.client.IncompleteRead), ("reset", {}, http.client.RemoteDisconnected), ("slow", {"bytes": 2000}, 200)])
def test_faults_come_as_often_as_said(api, fault, more, seen):
    api.fault(fault, verb="list", **more)
    if isinstance(seen, type):
        with pytest.raises(seen):
            Client(api).ask(NODES)
    else:
        code, body = Client(api).ask(NODES)
        assert code == (200 if seen == "empty" else seen) and (seen != "empty" or body["items"] == [])
    assert len(Client(api).ask(NODES)[1]["items"]) == 5


def test_a_list_can_lack_some(api):
    api.fault("partial", verb="list", names=["w1", "w3"])
    code, body = Client(api).ask(NODES)
    assert code == 200 and [item["metadata"]["name"] for item in body["items"]] == ["w2", "w4", "w5"]
    assert not body["metadata"].get("continue")
    assert len(Client(api).ask(NODES)[1]["items"]) == 5


def test_half_an_event(api):
    api.fault("half", verb="watch", bytes=150)
    stream = Client(api).watch(NODES + "?watch=1")
    with pytest.raises((http.client.IncompleteRead, ConnectionError, ValueError)):
        while True:
            json.loads(stream.readline())


def test_hangs_until_let_go(api):
    api.fault("hang", verb="list")
    client = Client(api)
    client.connection.request("GET", NODES, headers=client.headers)
    api.wait_asked(fault="hang")
    api.clear_faults()
    with pytest.raises(http.client.RemoteDisconnected):
        client.connection.getresponse()


def test_down_and_up(api):
    stream = Client(api).watch(NODES + "?watch=1&resourceVersion=%d" % api.store.version)
    api.wait_watching()
    api.down()
    with pytest.raises(ConnectionRefusedError):
        Client(api).ask(NODES)
    assert not stream.readline()
    api.up()
    assert Client(api).ask(NODES)[0] == 200


def test_recreated_has_a_new_uid(api):
    before = api.get("nodes", "w1")["metadata"]["uid"]
    api.recreate("nodes", "w1")
    assert api.get("nodes", "w1")["metadata"]["uid"] != before


def test_program_with_tls(tmp_path):
    program = subprocess.Popen([sys.executable, apiserver.__file__, "--port", "0", "--tls-dir", str(tmp_path / "tls"),
                                "--token", "agent=t-1", "--control", str(tmp_path / "control")], stdout=subprocess.PIPE, text=True)
    try:
        url = program.stdout.readline().strip()
        control = apiserver.Control(str(tmp_path / "control"))
        assert control.url() == url
        control.apply(plural="pods", obj=apiserver.pod("p1", "w1", ["10.244.1.7"]))
        with pytest.raises(RuntimeError, match="no control"):
            control.nonsense()
        context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.crt"))
        connection = http.client.HTTPSConnection("127.0.0.1", int(url.rsplit(":", 1)[1]), timeout=10, context=context)
        connection.request("GET", "/api/v1/namespaces/default/pods", headers={"Authorization": "Bearer t-1"})
        assert json.loads(connection.getresponse().read())["items"][0]["status"]["podIP"] == "10.244.1.7"
        connection.close()
    finally:
        program.terminate()
        assert program.wait(timeout=10) == 0
        program.stdout.close()
