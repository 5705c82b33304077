# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The rulebooks by ansible-rulebook itself: from a change in the API to a run with the node in its inventory."""

from __future__ import annotations

import http.server
import json
import os
import queue
import re
import sys
import threading
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ansible_rulebook")

ROOT = Path(__file__).resolve().parents[2]
RULEBOOKS = ROOT / "extensions" / "eda" / "rulebooks"
sys.path[:0] = [str(ROOT / "tests" / "api"), str(ROOT / "tests" / "eda")]
import apiserver
from ansible_rulebook.validators import Validate
from rulebooks import PATIENCE, Rulebook, program

TOKEN = "s3cr3t-t0ken"


def node(number):
    return apiserver.node("w%d" % number, ["10.244.%d.0/24" % number], ["198.18.0.%d" % number])


@pytest.fixture
def api(tmp_path):
    with apiserver.ApiServer(tls_dir=tmp_path / "tls", tokens={"eda": TOKEN}) as server:
        server.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)
        for number in (1, 2):
            server.apply("nodes", node(number))
        yield server


@pytest.fixture
def rulebook(api, tmp_path):
    """-> function(rulebook, *options, **variables) that starts ansible-rulebook with an inventory whose hosts nobody can reach."""
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    # Port 1 of this machine: refused at once. No host is ever changed by this test.
    (inventory / "test.k8s_nodes.yml").write_text(json.dumps({
        "plugin": "kubemesh.wireguard.k8s_nodes", "compose": {"ansible_host": "'127.0.0.1'", "ansible_port": "1"}}))
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("K8S_AUTH_", "KUBE"))}
    env.update(HOME=str(home), KUBECONFIG=str(tmp_path / "kubeconfig"), TMPDIR=str(tmp_path), PYTHONUNBUFFERED="1", LC_ALL="C.UTF-8",
               ANSIBLE_NOCOLOR="1", NO_COLOR="1", ANSIBLE_LOCALHOST_WARNING="0", ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED="1",
               PATH="%s%s%s" % (os.path.dirname(sys.executable), os.pathsep, os.environ["PATH"]))
    started = []

    def start(name, *options, **variables):
        (tmp_path / "variables.yml").write_text(json.dumps(dict({"kubemesh_min_interval": 1}, **variables)))
        started.append(Rulebook(
            [program(), "-r", name, "-i", inventory, "--vars", tmp_path / "variables.yml", *options], env, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.stop()
        assert TOKEN not in each.output


def run_with(run, *names):
    """Read on to the run whose hosts are these; what a run that failed has written is shown twice."""
    found = None
    while found != set(names):
        run.until("PLAY [Bring what changed in the cluster to every node]")
        found = set(re.findall(r"fatal: \[(.*?)\]: UNREACHABLE!", run.until("PLAY RECAP")))


def test_a_node_that_joins_is_in_the_next_run(api, rulebook):
    """The shipped rulebook: event, run of the real playbook, the new node among its hosts. Runs that fail do not stop it."""
    run = rulebook("kubemesh.wireguard.reconcile")
    run_with(run, "w1", "w2")
    api.heartbeat()
    api.apply("nodes", node(3))
    run_with(run, "w1", "w2", "w3")
    api.delete("nodes", "w3")
    run_with(run, "w1", "w2")


def test_resync(api, rulebook):
    """Runs that failed are made up for, although nothing changes any more."""
    run = rulebook("kubemesh.wireguard.reconcile", kubemesh_resync=1)
    for dummy in range(3):
        run.until("PLAY RECAP")


class Controller(http.server.BaseHTTPRequestHandler):
    """Of AWX's API what run_job_template asks for."""

    launched = None

    def log_message(self, *args):
        pass

    def _answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.endswith("/config/"):
            self._answer(200, {"version": "24.6.1"})
        elif path.endswith("/unified_job_templates/"):
            template = {"id": 7, "type": "job_template", "name": "kubemesh reconcile", "url": "/api/v2/job_templates/7/",
                        "related": {"launch": "/api/v2/job_templates/7/launch/"}, "ask_variables_on_launch": True,
                        "ask_limit_on_launch": True, "ask_labels_on_launch": False, "ask_inventory_on_launch": False,
                        "summary_fields": {"organization": {"id": 1, "name": "Default"}}}
            self._answer(200, {"count": 1, "next": None, "results": [template]})
        else:
            job = {"id": 9, "status": "successful", "artifacts": {}, "created": "2026-11-23T00:00:00Z", "url": "/api/v2/jobs/9/"}
            self._answer(200, {"count": 1, "next": None, "results": [job]} if path.endswith("/jobs/") else job)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.launched.put((self.path, body))
        self._answer(201, {"id": 9, "url": "/api/v2/jobs/9/", "status": "pending"})


def test_a_job_is_launched(api, rulebook):
    """The rulebook for AWX against what it asks AWX for."""
    Controller.launched = queue.Queue()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Controller)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        rulebook("kubemesh.wireguard.reconcile_awx", "--controller-url", "http://127.0.0.1:%d" % server.server_port,
                 "--controller-token", "awx")
        for kind, joined in (("resync", ["w1", "w2"]), ("changed", ["w3"])):
            path, body = Controller.launched.get(timeout=PATIENCE)
            assert path == "/api/v2/job_templates/7/launch/"
            extra = body["extra_vars"] if isinstance(body["extra_vars"], dict) else json.loads(body["extra_vars"])
            event = extra["ansible_eda"]["event"]
            assert (event["type"], event["joined"]) == (kind, joined)
            assert "limit" not in body or body["limit"] in ("", None, "all")
            api.apply("nodes", node(3))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("path", sorted(RULEBOOKS.glob("*.yml")), ids=lambda path: path.stem)
def test_valid_and_one_after_the_other(path):
    rulesets = yaml.safe_load(path.read_text(encoding="utf-8"))
    Validate.rulebook(rulesets)
    for ruleset in rulesets:
        assert ruleset["execution_strategy"] == "sequential"
