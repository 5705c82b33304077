# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client against the API server of the tests, over real connections. No test looks at a clock."""

from __future__ import annotations

import importlib.util
import queue
import threading
from pathlib import Path

import pytest

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kube_api, _kube_watch
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

SERVER = Path(__file__).resolve().parents[3] / "api" / "apiserver.py"
SPEC = importlib.util.spec_from_file_location("apiserver", SERVER)
apiserver = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(apiserver)

NODES = "/api/v1/nodes"
# Seconds that anything may take before the test is called stuck.
PATIENCE = 20


@pytest.fixture
def api():
    with apiserver.ApiServer() as server:
        for number in range(3):
            server.apply("nodes", apiserver.node("w%d" % number))
        yield server


class Told:
    """A follower whose pauses end at once, and what it tells."""

    def __init__(self, api, check=lambda listing: ""):
        self.queue = queue.Queue()
        self.pauses = []
        self.slow = threading.Event()
        self.follower = _kube_api.Follower(
            _kube_api.KubeClient(api.url), NODES, "NodeList", lambda item: item["metadata"].get("annotations"),
            lambda what, value: self.queue.put((what, value)), check, pause=self.pause)
        self.follower.start()

    def pause(self, seconds):
        self.pauses.append(seconds)
        self.slow.wait(0.01)

    def next(self, *wanted):
        """The next message of one of these kinds."""
        while True:
            what, value = self.queue.get(timeout=PATIENCE)
            if what in wanted:
                return what, value

    def stop(self):
        self.follower.stop()


@pytest.fixture
def told(api):
    it = Told(api)
    assert set(it.next("listed")[1]) == {"w0", "w1", "w2"}
    it.next("back")
    yield it
    it.stop()


def change(api, name="w1", value="x"):
    api.patch("nodes", name, {"metadata": {"annotations": {"a": value}}})


def test_events(api, told):
    change(api)
    name, reduced = told.next("event")[1]
    assert (name, reduced["a"]) == ("w1", "x")
    api.delete("nodes", "w2")
    assert told.next("event")[1] == ("w2", None)


def test_a_closed_watch_goes_on_where_it_was(api, told):
    change(api)
    told.next("event")
    api.fault("hang", verb="watch")
    api.close_watches()
    api.wait_asked(fault="hang")
    change(api, "w0", "meanwhile")
    api.down()
    api.up()
    assert told.next("event", "listed")[1][0] == "w0"
    assert api.asked(verb="list") == 1


@pytest.mark.parametrize("how", ["stream", "status", "compacted"])
def test_gone_makes_a_new_list(api, told, how):
    if how == "compacted":
        api.compact()
    else:
        api.fault("gone_in_stream" if how == "stream" else "status", verb="watch", code=410)
    api.close_watches()
    # it is no outage
    assert [told.next("listed", "back", "away")[0] for dummy in range(2 if how == "status" else 3)][-2:] == ["listed", "back"]


@pytest.mark.parametrize("fault, more", [("half", {"bytes": 300}), ("garbage", {}), ("reset", {}), ("status", {"code": 503}),
                                         ("status", {"code": 403})])
def test_broken_watches(api, told, fault, more):
    api.fault(fault, verb="watch", **more)
    api.close_watches()
    change(api)
    what, value = told.next("event", "listed")
    assert value[0] == "w1" if what == "event" else value["w1"]["a"] == "x"


def test_half_of_an_event_is_no_event(api, told):
    api.fault("half", verb="watch", bytes=120)
    api.close_watches()
    change(api)
    assert told.next("away")
    # what was whole before it counts: nothing is read again
    assert told.next("event", "listed")[1][0] == "w1" and api.asked(verb="list") == 1


def test_expired_page(api, monkeypatch):
    monkeypatch.setattr(_kube_watch, "PAGE_SIZE", 2)
    api.fault("status", verb="list", code=410, times=0)
    client = _kube_api.KubeClient(api.url)

    def reduce(item):
        api.expire_continues()
        return item["metadata"]["name"]

    with pytest.raises(_kube_watch.Gone):
        client.list(NODES, "NodeList", reduce)
    assert client.list(NODES, "NodeList", lambda item: item["metadata"]["name"])[0] == ["w0", "w1", "w2"]


def test_lists_that_are_not_believed_are_told_to_nobody(api):
    answers = ["doubt", "doubt", ""]
    it = Told(api, lambda listing: answers.pop(0))
    try:
        assert it.next("listed", "away") == ("away", "doubt")
        assert it.next("listed", "away") == ("away", "doubt")
        assert it.next("listed", "away")[0] == "listed" and len(it.pauses) == 2
    finally:
        it.stop()


def test_a_list_is_read_again_when_asked_and_nobody_is_told_that_the_api_is_away(api):
    api.fault("partial", verb="list", names=["w1"])
    told = Told(api)
    assert set(told.next("listed", "away")[1]) == {"w0", "w2"}
    told.next("back")
    told.follower.list_again()
    what, listing = told.next("listed", "away")
    assert what == "listed" and set(listing) == {"w0", "w1", "w2"}
    assert told.next("back", "away")[0] == "back" and told.pauses == []
    change(api)
    assert told.next("event", "listed")[0] == "event"
    told.stop()


def test_a_list_that_is_asked_for_while_there_is_no_watch_comes_nevertheless(api, told):
    told.follower.list_again()
    told.next("listed")
    told.next("back")  # the watch that is closed below
    # asked for when the list was read already, and the watch was not open yet
    opened = told.follower._opened
    told.follower._opened = lambda handle: (setattr(told.follower, "_opened", opened), told.follower.list_again(), opened(handle))
    api.close_watches()
    assert told.next("listed", "away")[0] == "listed" and told.next("back", "away")[0] == "back"


def test_watches_that_end_at_once_are_not_begun_in_a_loop(api, told):
    before = len(told.pauses)
    api.fault("gone_in_stream", verb="watch", times=0)
    for dummy in range(3):
        api.close_watches()
        told.next("back")
    assert len(told.pauses) >= before + 2 and told.pauses[-1] > told.pauses[before]


def test_away_and_back(api, told):
    api.down()
    assert "Connection refused" in told.next("away")[1]
    api.delete("nodes", "w0")
    api.up()
    assert told.next("event", "listed") == ("event", ("w0", None))


def test_tls_tokens_and_rotation(tmp_path):
    with apiserver.ApiServer(tls_dir=tmp_path / "tls", tokens={"agent": "bearer-1"}) as api:
        token = tmp_path / "token"
        client = _kube_api.KubeClient(api.url, api.ca_file, str(token))
        with pytest.raises(MeshError, match="cannot be read"):
            client.list(NODES, "NodeList", str)
        token.write_text("bearer-1\n")
        assert client.list(NODES, "NodeList", str)[0] == []
        api.set_tokens({"agent": "bearer-2"})
        with pytest.raises(_kube_watch.ApiError, match=r"401.*renew the one in"):
            client.list(NODES, "NodeList", str)
        token.write_text("bearer-2\n")
        assert client.list(NODES, "NodeList", str)[0] == []
        api.refuse("list", "nodes")
        with pytest.raises(_kube_watch.ApiError, match="RBAC") as caught:
            client.list(NODES, "NodeList", str)
        assert "bearer-2" not in str(caught.value)
        with pytest.raises(_kube_watch.ApiError, match="CA"):
            _kube_api.KubeClient(api.url, None, str(token)).list(NODES, "NodeList", str)


def test_patch(api):
    _kube_api.KubeClient(api.url).patch(NODES + "/w1", {"metadata": {"annotations": {"k": "v"}}})
    assert api.get("nodes", "w1")["metadata"]["annotations"]["k"] == "v"


@pytest.mark.parametrize("server", ["", "ftp://x", "https://", "https://u@h", "https://h/path", "nonsense", "https://h:99999",
                                    "https://h:abc", "https://h:0", "https://h?x=1", "https://h?", "https://h#f", "https://[::1"])
def test_addresses_that_are_none(server):
    with pytest.raises(MeshError, match="server"):
        _kube_api.KubeClient(server)


@pytest.mark.parametrize("text", ["", "two words", "a\nb"])
def test_tokens_that_are_none(tmp_path, text):
    (tmp_path / "token").write_text(text)
    with pytest.raises(MeshError, match="holds no token"):
        _kube_api.KubeClient("https://127.0.0.1:1", None, str(tmp_path / "token")).list(NODES, "NodeList", str)


def unusable(folder, how):
    """A path with nothing that is of use; root can read what has no right for anybody."""
    path = folder / "file"
    if how == "a directory":
        path.mkdir()
    elif how == "no text":
        path.write_bytes(b"\xff\xfe\x00")
    return str(path)


@pytest.mark.parametrize("how", ["not there", "a directory", "no text"])
def test_a_token_that_cannot_be_read(tmp_path, how):
    path = unusable(tmp_path, how)
    with pytest.raises(_kube_watch.ApiError, match="token_file: %s cannot be read: .*; write the ServiceAccount's token there" % path):
        _kube_api.KubeClient("https://127.0.0.1:1", None, path).list(NODES, "NodeList", str)


@pytest.mark.parametrize("how", ["not there", "a directory", "no text"])
def test_a_ca_that_cannot_be_used(tmp_path, how):
    path = unusable(tmp_path, how)
    with pytest.raises(_kube_watch.ApiError, match="ca_file: %s cannot be used: .*; it must hold the cluster's CA as PEM" % path):
        _kube_api.KubeClient("https://127.0.0.1:1", path).list(NODES, "NodeList", str)


def test_a_token_is_never_sent_in_clear():
    with pytest.raises(MeshError, match="in clear"):
        _kube_api.KubeClient("http://127.0.0.1:1", None, "/token")
