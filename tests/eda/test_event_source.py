# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The event source against the API server of the tests, and its pure parts with plain data."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "extensions" / "eda" / "plugins" / "event_source" / "k8s_nodes.py"
sys.path.insert(0, str(ROOT / "tests" / "api"))
import apiserver

specification = importlib.util.spec_from_file_location("kubemesh_event_source", SOURCE)
source = importlib.util.module_from_spec(specification)
specification.loader.exec_module(source)

# Seconds after which a test gives up. Nothing is judged by time.
PATIENCE = 60
TOKEN = "s3cr3t-t0ken"
CANARY = "{{ lookup('pipe', 'touch /tmp/canary') }}"
EMPTY = {"joined": [], "left": [], "changed": [], "replaced": [], "unnamed": 0}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    """Nothing of this machine's ways to a cluster."""
    for name in list(os.environ):
        if name.startswith(("K8S_AUTH_", "KUBE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(source, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(source, "BACKOFF_MAX", 0.2)


@pytest.fixture
def api(tmp_path):
    with apiserver.ApiServer(tokens={"eda": TOKEN}) as server:
        for number in range(1, 6):
            server.apply("nodes", node(number))
        server.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)
        yield server


def node(number, **more):
    return apiserver.node("w%d" % number, ["10.244.%d.0/24" % number], ["198.18.0.%d" % number], **more)


class Running:
    """The source while it runs; ``next`` gives its next event, without what ansible-rulebook would add."""

    def __init__(self, queue, task):
        self.queue, self.task = queue, task

    async def next(self):
        getting = asyncio.ensure_future(self.queue.get())
        done, dummy = await asyncio.wait([getting, self.task], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        assert self.task not in done, "the source ended: %s" % self.task
        assert getting in done, "there was no event"
        return getting.result()


@contextlib.asynccontextmanager
async def running(queue=None, **args):
    queue, before = queue or asyncio.Queue(), asyncio.all_tasks()
    task = asyncio.ensure_future(source.main(queue, dict({"min_interval": 0, "settle": 0.05}, **args)))
    try:
        yield Running(queue, task)
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        left = asyncio.all_tasks() - before
        assert not left, "tasks that outlive the source: %s" % left


def event(kind, sequence, count, **names):
    return dict(EMPTY, type=kind, sequence=sequence, node_count=count, **names)


def live(function):
    """A test that is a coroutine."""
    @functools.wraps(function)  # pytest reads the fixtures off the signature
    def test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(function(*args, **kwargs), PATIENCE))

    return test


async def watching(api, count=1):
    await asyncio.to_thread(api.wait_watching, "nodes", count)


async def asked(api, count, **fields):
    await asyncio.to_thread(api.wait_asked, count, resource="nodes", **fields)


ALL = ["w1", "w2", "w3", "w4", "w5"]


class TestLive:
    """With an API server."""

    @live
    async def test_start_join_change_replace_leave(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            assert await run.next() == event("resync", 1, 5, joined=ALL)
            await watching(api)
            api.apply("nodes", apiserver.node("w9", [], []))
            assert await run.next() == event("changed", 2, 6, joined=["w9"])
            api.apply("nodes", apiserver.node("w9", ["10.244.9.0/24"], ["198.18.0.9"]))
            assert await run.next() == event("changed", 3, 6, changed=["w9"])
            api.patch("nodes", "w9", {"metadata": {"annotations": {source.ANNOTATIONS[0]: "key"}}})
            assert await run.next() == event("changed", 4, 6, changed=["w9"])
            api.recreate("nodes", "w2")
            assert await run.next() == event("changed", 5, 6, replaced=["w2"])
            api.delete("nodes", "w9")
            assert await run.next() == event("changed", 6, 5, left=["w9"])

    @live
    async def test_noise_is_no_event(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig"), annotations=["example.org/range"]) as run:
            await run.next()
            await watching(api)
            for dummy in range(5):
                api.heartbeat()
            api.patch("nodes", "w1", {"spec": {"unschedulable": True}, "metadata": {"labels": {"x": "y"}, "annotations": {"a": "b"}}})
            api.patch("nodes", "w3", {"metadata": {"annotations": {"example.org/range": "10.9.0.0/24"}}})
            assert await run.next() == event("changed", 2, 5, changed=["w3"])

    @live
    async def test_changes_settle(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig"), settle=1, settle_max="20") as run:
            await run.next()
            await watching(api)
            for number in range(10, 40):
                api.apply("nodes", apiserver.node("w%d" % number))
                api.apply("nodes", node(number))
            api.delete("nodes", "w39")
            assert await run.next() == event("changed", 2, 34, joined=["w%d" % number for number in range(10, 39)])

    @live
    async def test_resync(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig"), resync=1) as run:
            for sequence in (1, 2, 3):
                assert await run.next() == event("resync", sequence, 5, joined=ALL if sequence == 1 else [])

    @live
    async def test_a_closed_watch_is_continued(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            for number in range(1, 4):
                await watching(api)
                api.apply("nodes", node(5, annotations={source.ANNOTATIONS[0]: str(number)}))
                await run.next()
                api.close_watches()
                await asked(api, number + 1, verb="watch")
            assert api.asked(verb="list", resource="nodes") == 1

    @live
    async def test_a_bookmark_moves_on(self, api, tmp_path, monkeypatch):
        """Without it the continued watch would begin before what was compacted."""
        marked, parse = asyncio.Event(), source.parse_event

        def noted(line):
            kind, item = parse(line)
            if kind == "BOOKMARK":
                marked.set()
            return kind, item

        monkeypatch.setattr(source, "parse_event", noted)
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            await watching(api)
            api.compact()
            api.bookmark()
            await marked.wait()
            api.close_watches()
            await asked(api, 2, verb="watch")
            api.delete("nodes", "w5")
            assert await run.next() == event("changed", 2, 4, left=["w5"])
            assert api.asked(verb="list", resource="nodes") == 1

    @live
    async def test_a_silent_watch_is_continued(self, api, tmp_path, monkeypatch):
        monkeypatch.setattr(source, "IDLE_MAX", 1.2)
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            await asked(api, 3, verb="watch")
            assert api.asked(verb="list", resource="nodes") == 1
            api.delete("nodes", "w5")
            assert await run.next() == event("changed", 2, 4, left=["w5"])

    @pytest.mark.parametrize("verb", ["list", "watch"])
    @pytest.mark.parametrize("fault,more", [
        ("status", {"code": 500}), ("status", {"code": 429, "retry_after": 1}), ("status", {"code": 503}), ("status", {"code": 410}),
        ("status", {"code": 401}), ("status", {"code": 302}), ("garbage", {"body": "<html>502</html>"}), ("half", {"bytes": 300}),
        ("reset", {}), ("hang", {}), ("slow", {"bytes": 400, "seconds": 0.01}), ("gone_in_stream", {}),
    ])
    def test_faults(self, api, tmp_path, verb, fault, more):
        """Whatever happens, what changed is reported once, and the source goes on."""
        if verb == "list" and fault == "gone_in_stream":
            pytest.skip("a list has no stream")

        async def run_it():
            async with running(kubeconfig=str(tmp_path / "kubeconfig"), timeout=1) as run:
                await run.next()
                await watching(api)
                api.fault(fault, verb=verb, resource="nodes", times=2, **more)
                api.apply("nodes", node(6))
                if verb == "list":
                    api.compact()
                api.close_watches()
                names = set()
                while "w7" not in names:
                    if "w6" in names:
                        api.clear_faults()
                        api.apply("nodes", node(7))
                    found = await run.next()
                    assert found["type"] == "changed"
                    assert dict(found, joined=[]) == event("changed", found["sequence"], 6 if found["joined"] == ["w6"] else 7)
                    assert not names & set(found["joined"])
                    names |= set(found["joined"])
                assert names == {"w6", "w7"}

        asyncio.run(asyncio.wait_for(run_it(), PATIENCE))

    @live
    async def test_a_list_that_is_empty_once(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            await watching(api)
            api.fault("empty", verb="list", resource="nodes")
            api.compact()
            api.close_watches()
            await asked(api, 3, verb="list")
            api.delete("nodes", "w5")
            assert await run.next() == event("changed", 2, 4, left=["w5"])

    @live
    async def test_a_cluster_that_is_empty(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            await watching(api)
            api.fault("empty", verb="list", resource="nodes", times=2)
            api.compact()
            api.close_watches()
            assert await run.next() == event("changed", 2, 0, left=ALL)

    @live
    async def test_api_away(self, api, tmp_path, caplog):
        async with running(kubeconfig=str(tmp_path / "kubeconfig"), resync=1) as run:
            await run.next()
            await watching(api)
            api.down()
            api.delete("nodes", "w5")
            api.apply("nodes", node(6))
            while not any("no connection to the API server" in record.message for record in caplog.records):
                await asyncio.sleep(0.01)
            api.up()
            found = await run.next()
            while not found["left"]:  # a resync that was due before
                found = await run.next()
            assert (found["joined"], found["left"]) == (["w6"], ["w5"])
            while "watching nodes again" not in caplog.text:
                await asyncio.sleep(0.01)

    @live
    async def test_no_rights(self, api, tmp_path, caplog):
        api.refuse("list", "nodes")
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await asked(api, 2, verb="list")
            assert run.queue.empty()
            assert "verbs [list, watch]" in caplog.text
            api.permit()
            assert (await run.next())["node_count"] == 5
        assert TOKEN not in caplog.text

    @live
    async def test_may_list_but_not_watch(self, api, tmp_path):
        """Not what it should be, but nothing is missed: it lists again and again."""
        api.refuse("watch", "nodes")
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            await run.next()
            api.delete("nodes", "w5")
            assert (await run.next())["left"] == ["w5"]

    @live
    async def test_rotated_token(self, api, tmp_path, caplog):
        token = tmp_path / "token"
        token.write_text(TOKEN + "\n")
        async with running(host=api.url, api_key_file=str(token)) as run:
            await run.next()
            await watching(api)
            api.set_tokens({"eda": "another"})
            api.close_watches()
            await asked(api, 1, code=401)
            token.write_text("another\n")
            api.delete("nodes", "w5")
            assert (await run.next())["left"] == ["w5"]
        assert "does not accept the credentials" in caplog.text
        assert TOKEN not in caplog.text

    @live
    async def test_service_account(self, api, tmp_path, monkeypatch):
        (tmp_path / "token").write_text(TOKEN)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", api.address)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        api.stop()
        api.tls_dir = tmp_path
        api.start()
        monkeypatch.setattr(source.find_connection, "__defaults__", (str(tmp_path),))
        async with running() as run:
            assert (await run.next())["node_count"] == 5

    @live
    async def test_tls(self, tmp_path, caplog):
        with apiserver.ApiServer(tls_dir=tmp_path / "tls", tokens={"eda": TOKEN}) as api:
            api.apply("nodes", node(1))
            api.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)
            config = json.loads((tmp_path / "kubeconfig").read_text())
            config["users"][0]["user"].update({
                "client-certificate-data": base64.b64encode((tmp_path / "tls" / "server.crt").read_bytes()).decode(),
                "client-key-data": base64.b64encode((tmp_path / "tls" / "server.key").read_bytes()).decode()})
            config["clusters"][0]["cluster"]["tls-server-name"] = "kubernetes"
            (tmp_path / "kubeconfig").write_text(json.dumps(config))
            async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
                assert (await run.next())["joined"] == ["w1"]
            async with running(host=api.url, api_key=TOKEN, ca_cert="/etc/ssl/certs/ca-certificates.crt") as run:
                while "certificate verify failed" not in caplog.text:
                    await asyncio.sleep(0.01)
                assert run.queue.empty()
            async with running(host=api.url, api_key=TOKEN, validate_certs="false") as run:
                assert (await run.next())["joined"] == ["w1"]
            assert not list(tmp_path.glob("k8s-nodes-*"))

    @live
    async def test_pages(self, api, tmp_path):
        async with running(kubeconfig=str(tmp_path / "kubeconfig"), page_size=2) as run:
            assert (await run.next())["joined"] == ALL
            assert [request["query"].get("limit") for request in api.requests if request["verb"] == "list"] == ["2", "2", "2"]
            api.fault("status", verb="list", resource="nodes", code=500, times=1)  # so that it lists again
            await watching(api)
            api.compact()
            api.close_watches()
            await asked(api, 7, verb="list")

    @live
    async def test_pages_expire(self, api, tmp_path):
        """The token of the second page is too old: all of it in one answer."""
        kubeconfig = tmp_path / "kubeconfig"
        connection = source.connection_of_kubeconfig([(kubeconfig.read_text(), str(tmp_path))], None, "x")
        settings_ = source.settings_of({"page_size": 2}, {})

        class Expiring(source.Api):
            def _get(self, query, timeout):
                api.expire_continues()
                return super()._get(query, timeout)

        async with Expiring(connection, settings_) as client:
            names, dummy = await client.list_nodes(lambda item: item["metadata"]["name"])
        assert names == ALL
        assert [request["code"] for request in api.requests if request["verb"] == "list"] == [200, 410, 200]

    @live
    async def test_what_a_cluster_says_is_in_no_event(self, api, tmp_path):
        hostile = node(6, annotations={CANARY: CANARY, source.ANNOTATIONS[0]: CANARY}, uid=CANARY, labels={"kubernetes.io/os": CANARY})
        hostile["spec"]["podCIDRs"] = [CANARY]
        hostile["status"]["addresses"].append({"type": CANARY, "address": CANARY})
        api.apply("nodes", hostile)
        async with running(kubeconfig=str(tmp_path / "kubeconfig")) as run:
            text = json.dumps(await run.next())
            await watching(api)
            api.apply("nodes", {"metadata": {"name": CANARY}})
            api.apply("nodes", {"metadata": {"name": "UPPER"}})
            api.delete("nodes", "w6")
            found = await run.next()
            assert found == event("changed", 2, 5, left=["w6"])
        assert "lookup" not in text
        assert "w6" in text

    @live
    async def test_a_queue_that_fails(self, api, tmp_path, caplog):
        """A filter of the rulebook raises: the source starts again, with a resync."""
        class Queue(asyncio.Queue):
            failures = 1

            async def put(self, item):
                if self.failures:
                    self.failures -= 1
                    raise KeyError("filter")
                await super().put(item)

        async with running(Queue(), kubeconfig=str(tmp_path / "kubeconfig")) as run:
            assert await run.next() == event("resync", 1, 5, joined=ALL)
        assert "fault of the event source" in caplog.text

    @pytest.mark.parametrize("args,said", [
        ({"kubeconfig": "/nonexistent"}, "kubeconfig: /nonexistent does not exist; correct the path"),
        ({"host": "http://127.0.0.1:1"}, "give api_key_file, or client_cert and client_key"),
        ({"host": "http://127.0.0.1:1", "api_key": "a\nb"}, "characters that no token has"),
        ({"host": "https://127.0.0.1:1", "api_key": "a", "ca_cert": "/nonexistent"}, "CA certificates: /nonexistent cannot be read"),
        ({"settle": "soon"}, "settle: 'soon' is not a number"),
        ({"resync": 0}, "resync: 0 is not possible; give a number from 1.0"),
        ({"colour": "red"}, "unknown arguments: 'colour'"),
        ({"annotations": "x"}, "annotations: expected a list of names"),
        ({"settle_max": 0.01}, "settle_max: 0.01 is less than settle"),
        ({}, "there is no way to the Kubernetes API"),
    ])
    @live
    async def test_what_is_wrong_is_said(self, caplog, args, said):
        """And said again and again: it never returns."""
        async with running(**args):
            while said not in caplog.text:
                await asyncio.sleep(0.01)

    @live
    async def test_loaded_by_its_path(self, api, tmp_path):
        """As ansible-rulebook does it."""
        module = runpy.run_path(str(SOURCE))
        queue = asyncio.Queue()
        assert asyncio.iscoroutinefunction(module["main"])
        task = asyncio.ensure_future(module["main"](queue, {"kubeconfig": str(tmp_path / "kubeconfig"), "eda_feedback_queue": queue}))
        assert (await asyncio.wait_for(queue.get(), PATIENCE))["joined"] == ALL
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def config(user=None, cluster=None, **more):
    return json.dumps(dict({
        "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://198.18.0.10:6443/"} if cluster is None else cluster}],
        "users": [{"name": "u", "user": user or {}}]}, **more))


class TestKubeconfig:
    def test_all_of_it(self):
        text = config({"token": "t", "client-certificate": "a.crt", "client-key-data": base64.b64encode(b"KEY").decode()},
                      {"server": "https://198.18.0.10:6443/", "certificate-authority": "/ca.crt", "insecure-skip-tls-verify": True,
                       "tls-server-name": "api", "proxy-url": "http://proxy:3128"})
        assert source.connection_of_kubeconfig([(text, "/etc")], None, "f") == source.Connection(
            server="https://198.18.0.10:6443", token="t", ca_file="/ca.crt", cert_file="/etc/a.crt", key_data="KEY", verify=False,
            server_name="api", proxy="http://proxy:3128", found="f")

    def test_token_file_wins(self):
        found = source.connection_of_kubeconfig([(config({"token": "t", "tokenFile": "t.txt"}), "/etc")], None, "f")
        assert (found.token, found.token_file) == (None, "/etc/t.txt")

    def test_several_files(self):
        first = json.dumps({"current-context": "c", "users": [{"name": "u", "user": {"token": "first"}}]})
        found = source.connection_of_kubeconfig([(first, "/a"), (config({"token": "second"}), "/b")], None, "f")
        assert found.token == "first"

    @pytest.mark.parametrize("text,said", [
        (config({"exec": {"command": "aws", "env": [{"name": "X", "value": TOKEN}]}}), "runs a program for its credentials (exec)"),
        (config({"auth-provider": {"name": "gcp"}}), "auth-provider"),
        (config({"username": "u", "password": TOKEN}), "has a password"),
        (config({"as": "admin", "token": TOKEN}), "impersonates"),
        (config({"client-key-data": TOKEN + "?"}), "client-key-data is not base64"),
        (config(cluster={"server": "198.18.0.10:6443"}), "server: '198.18.0.10:6443' is not the URL"),
        (config(cluster={}), "server: None is not the URL"),
        (config(**{"current-context": "other"}), "there is no context 'other' in it"),
        (config(**{"current-context": None}), "it has no current-context; give context"),
        (config(clusters=[]), "there is no cluster 'k' in it"),
        (config(users=None), "there is no user 'u' in it"),
        ("a: [" + TOKEN, "it is not YAML"),
        ("[]", "expected an object, got list"),
    ])
    def test_errors(self, text, said):
        with pytest.raises(source.SourceError) as raised:
            source.connection_of_kubeconfig([(text, "/etc")], None, "kubeconfig f")
        assert said in str(raised.value)
        assert "kubeconfig f" in str(raised.value)
        assert TOKEN not in str(raised.value)

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.sampled_from(["name", "context", "contexts", "clusters", "users", "cluster", "user", "server",
                                                           "current-context", "token", "tokenFile", "certificate-authority-data"]), inner),
                        max_leaves=20))
    def test_anything_else_is_refused(self, value):
        with contextlib.suppress(source.SourceError):
            source.connection_of_kubeconfig([(json.dumps(value), "/etc")], None, "f")

    def test_arguments_before_environment(self, tmp_path):
        environ = {"K8S_AUTH_KUBECONFIG": "/elsewhere", "K8S_AUTH_API_KEY": "t", "K8S_AUTH_HOST": "https://elsewhere"}
        kept = source.settings_of({"host": "https://here"}, environ)
        assert (kept["host"], kept["kubeconfig"], kept["api_key"]) == ("https://here", None, "t")
        kept = source.settings_of({"kubeconfig": "/here"}, environ)
        assert (kept["host"], kept["kubeconfig"], kept["api_key"]) == (None, "/here", None)

    @pytest.mark.parametrize("given,expected", [
        ({"api_key_file": "/token"}, {"token_file": "/token", "ca_data": "CA"}),
        ({"api_key": "other"}, {"token": "other", "ca_data": "CA"}),
        ({"client_cert": "/a.crt", "client_key": "/a.key"}, {"cert_file": "/a.crt", "key_file": "/a.key", "ca_data": "CA"}),
        ({"ca_cert": "/ca.crt"}, {"token": "t", "cert_data": "CERT", "key_data": "KEY", "ca_file": "/ca.crt"}),
        ({"host": "https://198.18.0.11:6443"}, {"token": "t", "cert_data": "CERT", "key_data": "KEY", "ca_data": "CA"}),
        ({"validate_certs": False}, {"token": "t", "cert_data": "CERT", "key_data": "KEY", "ca_data": "CA", "verify": False}),
    ])
    def test_arguments_before_kubeconfig(self, tmp_path, given, expected):
        def data(text):
            return base64.b64encode(text.encode()).decode()

        user = {"token": "t", "client-certificate-data": data("CERT"), "client-key-data": data("KEY")}
        cluster = {"server": "https://198.18.0.10:6443", "certificate-authority-data": data("CA")}
        (tmp_path / "config").write_text(config(user, cluster))
        found = source.find_connection(source.settings_of(dict(given, kubeconfig=str(tmp_path / "config")), {}), {}, "/nowhere")
        server = given.get("host", cluster["server"])
        assert found == source.Connection(server, found="kubeconfig %s" % (tmp_path / "config"), **expected)

    def test_half_a_client_certificate(self, tmp_path):
        (tmp_path / "config").write_text(config({"token": "t"}))
        with pytest.raises(source.SourceError, match="client_key: it is given without client_cert"):
            source.find_connection(source.settings_of({"kubeconfig": str(tmp_path / "config"), "client_key": "/k"}, {}), {}, "/nowhere")

    def test_credentials_of_arguments_for_a_user_that_needs_a_program(self, tmp_path):
        (tmp_path / "config").write_text(config({"exec": {"command": "aws"}}))
        found = source.find_connection(
            source.settings_of({"kubeconfig": str(tmp_path / "config"), "api_key_file": "/token"}, {}), {}, "/nowhere")
        assert (found.server, found.token_file) == ("https://198.18.0.10:6443", "/token")

    def test_proxy(self, monkeypatch):
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
        monkeypatch.setenv("NO_PROXY", "198.18.0.10")
        assert source.proxy_of("https://198.18.0.11:6443") == "http://proxy:3128"
        assert source.proxy_of("https://198.18.0.10:6443") is None


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
                           | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=5)


class TestCompared:
    @given(st.fixed_dictionaries({}, optional={part: json_values | st.dictionaries(
        st.sampled_from(["name", "uid", "annotations", "labels", "podCIDRs", "addresses", "nodeInfo"]), json_values)
        for part in ("metadata", "spec", "status")}))
    def test_any_object(self, item):
        view = source.View()
        with contextlib.suppress(source.SourceError):
            view.replace([view.known(item)])
            view.apply("MODIFIED", item)
            view.report("resync")
        json.dumps(sorted(view.nodes))

    @pytest.mark.parametrize("change", [
        {"metadata": {"uid": "other"}}, {"spec": {"podCIDRs": ["10.9.0.0/24"]}}, {"spec": {"podCIDR": "10.9.0.0/24"}},
        {"status": {"addresses": []}}, {"status": {"nodeInfo": {"operatingSystem": "windows"}}},
        {"metadata": {"annotations": {"kubemesh.wireguard/excluded": "true"}}}, {"metadata": {"annotations": {source.ANNOTATIONS[1]: "k"}}},
    ])
    def test_relevant(self, change):
        before = apiserver.node("w1", ["10.244.1.0/24"], ["198.18.0.1"], uid="1")
        after = apiserver.merge_patch(before, change)
        assert source.fingerprint(before, source.ANNOTATIONS) != source.fingerprint(after, source.ANNOTATIONS)

    def test_label_before_kubelet(self):
        before = apiserver.node("w1", ["10.244.1.0/24"])
        joined = apiserver.merge_patch(before, {"status": {"nodeInfo": {"operatingSystem": ""}}})
        assert source.fingerprint(before, ()) == source.fingerprint(joined, ())

    @given(st.lists(st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED", "list", "report"]), st.integers(0, 3), st.integers(0, 2),
                              st.integers(0, 1))))
    @settings(max_examples=300)
    def test_events_lead_to_what_is_there(self, steps):
        """Whatever happens in between: the names of all events, one after the other, make the nodes that there are."""
        view, told, truth = source.View(), set(), {}
        for what, number, address, uid in [*steps, ("report", 0, 0, 0)]:
            name = "w%d" % number
            item = apiserver.node(name, [], ["198.18.0.%d" % address], uid=str(uid))
            if what == "report":
                found = view.report("changed")
                if found is not None:
                    assert not set(found["joined"]) & told
                    assert set(found["left"] + found["changed"] + found["replaced"]) <= told
                    told = told - set(found["left"]) | set(found["joined"])
                    assert found["node_count"] == len(truth)
                assert told == set(truth)
            elif what == "list":
                with contextlib.suppress(source.SourceError):
                    view.replace(map(view.known, [item, item]))
                    truth = {name: item}
            else:
                view.apply(what, item)
                truth.pop(name, None)
                if what != "DELETED":
                    truth[name] = item
            assert set(view.nodes) == set(truth)

    def test_long_lists_are_cut(self):
        view = source.View()
        view.replace(view.known(apiserver.node("w%04d" % number)) for number in range(1000))
        found = view.report("resync")
        assert (len(found["joined"]), found["unnamed"], found["node_count"]) == (source.NAMES_MAX, 1000 - source.NAMES_MAX, 1000)

    def test_there_and_back_is_no_event(self):
        view = source.View()
        view.apply("ADDED", apiserver.node("w1", uid="1"))
        view.apply("DELETED", apiserver.node("w1", uid="1"))
        assert view.report("changed") is None


times = st.integers(0, 1000)  # whole seconds: their sums are exact


class TestSchedule:
    @given(times, times, times, st.lists(times, min_size=1, max_size=20))
    def test_changes(self, settle, more, interval, moments):
        schedule = source.Schedule(settle, settle + more, interval, 10 ** 9)
        schedule.reach(0)
        assert schedule.due() == (0, "resync")
        schedule.done(0)
        moments = sorted(moments)
        for moment in moments:
            schedule.change(moment)
        due, kind = schedule.due()
        assert kind == "changed"
        assert due == max(min(moments[-1] + settle, moments[0] + settle + more), interval)
        schedule.done(due)
        assert schedule.due() == (due + 10 ** 9, "resync")

    @given(times, times, st.integers(100, 1000), st.lists(times, max_size=20))
    def test_reports_are_apart(self, settle, interval, resync, pauses):
        """Whatever happens, of whatever kind they are; a resync only after that long without any."""
        schedule = source.Schedule(settle, settle, interval, resync)
        schedule.reach(0)
        now, reports = 0, []
        for pause in pauses:
            now += pause
            while schedule.due()[0] <= now:
                moment, kind = schedule.due()
                if reports:
                    assert moment >= reports[-1] + interval
                    assert kind == "changed" or moment >= reports[-1] + resync
                schedule.done(moment)
                reports.append(moment)
            schedule.change(now)

    def test_a_change_just_before_a_resync(self):
        schedule = source.Schedule(0.1, 1, 30, 300)
        schedule.reach(0)
        schedule.done(0)
        schedule.change(299)
        assert schedule.due() == (299.1, "changed")
        schedule.done(299.1)
        assert schedule.due() == (599.1, "resync")

    def test_a_resync_is_no_sooner_than_the_interval(self):
        schedule = source.Schedule(0.1, 1, 30, 10)
        schedule.reach(0)
        schedule.done(0)
        assert schedule.due() == (30, "resync")

    def test_the_defaults_do_not_pile_up(self):
        """A run at 3 nodes was measured at 20 seconds."""
        defaults = source.settings_of({}, {})
        assert defaults["min_interval"] > 20
        assert defaults["resync"] > defaults["min_interval"]

    def test_no_resync_without_api(self):
        schedule = source.Schedule(0.1, 1, 5, 300)
        assert schedule.due() is None
        schedule.change(1)
        assert schedule.due() is None
        schedule.reach(2)
        schedule.done(2)
        schedule.lose()
        assert schedule.due() is None
        schedule.reach(1000)
        assert schedule.due() == (302, "resync")

    @given(st.integers(1, 10000), st.floats(0, 1))
    def test_backoff(self, failures, chance):
        assert 0 < source.backoff(failures, chance) <= source.BACKOFF_MAX
        assert source.backoff(failures + 1, chance) >= source.backoff(failures, chance)


class TestAnswers:
    @given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()) | st.dictionaries(
        st.sampled_from(["type", "object", "kind", "items", "metadata"]), json_values | st.just("ERROR") | st.just("NodeList")).map(
            lambda value: json.dumps(value).encode()))
    def test_anything(self, data):
        for parse in (source.parse_event, source.parse_page):
            with contextlib.suppress(source.SourceError):
                parse(data)
        source.status_error(500, data, data.decode("latin-1"), source.Connection("https://x"))

    def test_recorded(self):
        recorded = ROOT / "tests" / "unit" / "fixtures" / "k8s"
        items, version, token = source.parse_page((recorded / "nodes.json").read_bytes())
        assert (version, token) == ("283", None)
        assert source.parse_page((recorded / "nodes-page1.json").read_bytes())[2]
        view = source.View()
        for line in (recorded / "watch.jsonl").read_bytes().splitlines():
            kind, item = source.parse_event(line)
            view.apply(kind, item)
            source.version_of(item)
        assert set(view.nodes) == {item["metadata"]["name"] for item in items}
        assert not view.replace(map(view.known, items))
        gone = (recorded / "watch-410-in-stream.http").read_text().splitlines()[-1]
        with pytest.raises(source.Gone):
            source.parse_event(gone)
