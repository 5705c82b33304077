# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("jmespath")
pytest.importorskip("ansible.plugins.inventory")  # not where only modules are tested
import yaml

from ansible_collections.kubemesh.wireguard.plugins.inventory import k8s_nodes

HERE = os.path.dirname(os.path.abspath(__file__))
NODES_FILE = os.path.join(HERE, "..", "..", "fixtures", "k8s", "nodes.json")
# the directory that holds ansible_collections, as this test was imported from
COLLECTIONS = os.path.abspath(os.path.join(os.path.dirname(k8s_nodes.__file__), "..", "..", "..", "..", ".."))
sys.path.insert(0, os.path.abspath(os.path.join(HERE, "..", "..", "..", "api")))
import apiserver

TOKEN = "s3cr3t-t0ken"
SHIPPED = list(yaml.safe_load_all(k8s_nodes.EXAMPLES))


@pytest.mark.parametrize("name,fits", [
    ("k8s_nodes.yml", True), ("k8s_nodes.yaml", True), ("a.k8s_nodes.yml", True), ("a.k8s_nodes.yaml", True),
    ("ak8s_nodes.yml", False), ("k8s_nodes.json", False), ("nodes.yml", False), ("k8s_nodes.yml.bak", False),
])
def test_verify_file(tmp_path, name, fits):
    (tmp_path / name).write_text("")
    assert k8s_nodes.InventoryModule().verify_file(str(tmp_path / name)) is fits
    assert not k8s_nodes.InventoryModule().verify_file(str(tmp_path / "missing" / name))


# --- with ansible-inventory and ansible-playbook, kubernetes.core and an API server -----------------------------------------------------

@pytest.fixture
def api():
    pytest.importorskip("kubernetes")
    pytest.importorskip("ansible_collections.kubernetes.core.plugins.module_utils.k8s.client")
    if not os.path.isdir(os.path.join(COLLECTIONS, "ansible_collections")):
        pytest.skip("the collection is not below a directory ansible_collections")
    with apiserver.ApiServer(tokens={"ansible": TOKEN}) as server:
        with open(NODES_FILE, encoding="utf-8") as handle:
            server.load("nodes", json.load(handle))
        yield server


@pytest.fixture
def ansible(api, tmp_path):
    """-> function(config, program, *options) that runs a program of Ansible with that inventory: (rc, output, errors on one line)."""
    from ansible_collections.kubernetes import core
    others = os.path.abspath(os.path.join(next(iter(core.__path__)), "..", "..", ".."))
    home = tmp_path / "home"
    home.mkdir()
    api.write_kubeconfig(tmp_path / "kubeconfig", TOKEN)

    def run(config=None, program="inventory", *options, **environ):
        path = tmp_path / "test.k8s_nodes.yml"
        path.write_text(json.dumps(dict(
            {"plugin": "kubemesh.wireguard.k8s_nodes", "kubeconfig": str(tmp_path / "kubeconfig")}, **config or {})))
        env = {name: value for name, value in os.environ.items()
               if not name.startswith("K8S_AUTH_") and name not in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST")}
        env.update(ANSIBLE_COLLECTIONS_PATH=os.pathsep.join([COLLECTIONS, others]), ANSIBLE_LOCAL_TEMP=str(tmp_path / "local"),
                   HOME=str(home), ANSIBLE_NOCOLOR="1", LC_ALL="C.UTF-8", ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED="1",
                   ANSIBLE_LOCALHOST_WARNING="0",
                   # what kubernetes.core keeps of a server's discovery: the port of another test's server may be this one's
                   TMPDIR=str(tmp_path), **environ)
        done = subprocess.run([sys.executable, "-m", "ansible.cli.%s" % program, "-i", str(path), *(options or ["--list"])],
                              env=env, cwd=str(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        return done.returncode, done.stdout, " ".join(done.stderr.split())

    return run


@pytest.fixture
def inventory(ansible):
    """-> function(config) that gives (groups by name, variables by host)."""
    def run(config=None, **environ):
        rc, output, errors = ansible(config, **environ)
        assert rc == 0, errors
        # How ansible-inventory marks what is not to be templated
        listing = json.loads(output, object_hook=lambda item: item["__ansible_unsafe"] if set(item) == {"__ansible_unsafe"} else item)
        hostvars = listing.pop("_meta")["hostvars"]
        return {name: set(group.get("hosts", ())) for name, group in listing.items()}, hostvars

    return run


class TestInventory:
    def test_hosts_and_groups(self, inventory, api):
        groups, hostvars = inventory({"page_size": 2})
        assert groups["k8s_cluster"] == {"cp-1", "worker-1", "worker-2", "worker-nocidr"}
        assert (groups["kube_control_plane"], groups["k8s_windows"], groups["k8s_cordoned"]) == ({"cp-1"}, {"win-1"}, {"worker-2"})
        assert hostvars["cp-1"]["ansible_host"] == "198.18.0.11"
        assert hostvars["cp-1"]["k8s_node"]["labels"] == {"kubernetes.io/os": "linux", "node-role.kubernetes.io/control-plane": ""}
        assert api.asked(verb="list", resource="nodes", code=200) == 3

    def test_constructed(self, inventory):
        groups, hostvars = inventory({
            "cluster_group": "c1", "label_selector": "kubernetes.io/os=linux", "strict": True,
            "compose": {"ansible_user": "'root'", "first": "k8s_node.pod_cidrs | first | default('none')"},
            "groups": {"bookworm": "'bookworm' in k8s_node.os_image"},
            "keyed_groups": [{"key": "k8s_node.architecture", "prefix": "arch"}]})
        assert "win-1" not in hostvars
        assert groups["c1"] == set(hostvars)
        assert groups["arch_amd64"] == set(hostvars)
        assert "cp-1" in groups["bookworm"]
        assert (hostvars["cp-1"]["ansible_user"], hostvars["cp-1"]["first"]) == ("root", "10.244.0.0/24")

    def test_strict(self, ansible):
        rc, dummy, errors = ansible({"strict": True, "compose": {"x": "k8s_node.nothing.at.all"}})
        assert rc == 1
        assert "Could not set x for host cp-1" in errors

    def test_addresses(self, inventory, api):
        api.patch("nodes", "worker-1", {"metadata": {"annotations": {"example.org/ssh-address": "203.0.113.7"}}})
        api.patch("nodes", "worker-2", {"metadata": {"annotations": {"example.org/ssh-address": "-oProxyCommand=touch"}}})
        dummy, hostvars = inventory({"address_query": SHIPPED[2]["address_query"]})
        assert hostvars["worker-1"]["ansible_host"] == "203.0.113.7"
        assert "ansible_host" not in hostvars["worker-2"]
        dummy, hostvars = inventory({"address_family": "ipv6"})
        assert hostvars["cp-1"]["ansible_host"] == "2001:db8::b"
        dummy, hostvars = inventory({"address_types": ["Hostname"]})
        assert hostvars["cp-1"]["ansible_host"] == "cp-1"

    def test_pages_expire(self, inventory, api):
        def expiring(request, note=api.note):
            note(request)
            if request["verb"] == "list":
                api.expire_continues()

        api.note = expiring
        dummy, hostvars = inventory({"page_size": 2})
        assert len(hostvars) == 5
        assert [request["code"] for request in api.requests if request["verb"] == "list"] == [200, 410, 200]

    def test_cache(self, inventory, ansible, api, tmp_path):
        config = {"cache": True, "cache_plugin": "ansible.builtin.jsonfile", "cache_connection": str(tmp_path / "cache"),
                  "cache_timeout": 600}
        before = inventory(config)
        api.delete("nodes", "worker-1")
        assert inventory(config) == before
        assert api.asked(verb="list", resource="nodes") == 1
        assert "worker-1" not in inventory(dict(config, label_selector="kubernetes.io/os=linux"))[1]
        rc, dummy, errors = ansible(config, "inventory", "--list", "--flush-cache")
        assert rc == 0, errors
        assert "worker-1" not in inventory(config)[1]
        assert TOKEN not in "".join(path.read_text() for path in (tmp_path / "cache").iterdir())

    def test_examples(self, inventory, api, tmp_path):
        """They run as they are, but for where the API is."""
        kubeconfig = str(tmp_path / "kubeconfig")
        for example in SHIPPED:
            example = dict(example)
            more = {"kubeconfig": kubeconfig, "context": "test"}
            if "host" in example:
                ca = tmp_path / "ca.crt"
                ca.write_text("")
                more = {"host": api.url, "kubeconfig": None, "ca_cert": str(ca)}
            dummy, hostvars = inventory(dict(example, **more), K8S_AUTH_API_KEY=TOKEN)
            assert "worker-1" in hostvars

    def test_never_templated(self, ansible, inventory, api, tmp_path):
        """Jinja in a Node object stays text: in variables, composed ones, names of groups, and out of the cache."""
        canary = tmp_path / "canary"
        jinja = "{{ lookup('pipe', 'touch %s') }}" % canary
        api.apply("nodes", apiserver.node("evil", ["10.9.9.0/24"], ["198.18.9.9"], annotations={"x": jinja}, labels={"y": jinja}))
        config = {
            "cache": True, "cache_plugin": "ansible.builtin.jsonfile", "cache_connection": str(tmp_path / "cache"),
            "compose": {"ansible_connection": "'local'", "copied": "k8s_node.annotations.x | default('')",
                        "joined": "'<' ~ (k8s_node.labels.y | default('')) ~ '>'"},
            "groups": {"annotated": "k8s_node.annotations.x is defined"},
            "keyed_groups": [{"key": "k8s_node.annotations.x | default('none')", "prefix": "x"}]}
        play = tmp_path / "play.yml"
        play.write_text(json.dumps([{"hosts": "evil", "gather_facts": False, "tasks": [
            {"ansible.builtin.debug": {"msg": "{{ [k8s_node, copied, joined, group_names, groups, hostvars['evil'].copied] }}"}},
            {"ansible.builtin.debug": {"msg": "{{ [k8s_node.annotations.x, copied] | join }}"}},
        ]}]))
        for dummy in range(2):  # from the API, then from the cache
            rc, output, errors = ansible(config, "playbook", str(play))
            assert rc == 0, output + errors
            assert output.count("touch %s" % canary) >= 6
            assert not canary.exists()
        groups, dummy = inventory(config)
        assert [name for name in groups if name.startswith("x_") and "{" not in name and "evil" in groups[name]]

    # What AWX's own credential for tokens sets, for another cluster
    OTHER_CLUSTER = {"K8S_AUTH_HOST": "http://127.0.0.1:1", "K8S_AUTH_API_KEY": "of-the-other", "K8S_AUTH_VERIFY_SSL": "False",
                     "K8S_AUTH_SSL_CA_CERT": "/nonexistent", "K8S_AUTH_CONTEXT": "of-the-other"}

    def test_a_kubeconfig_is_not_led_elsewhere(self, inventory, api, tmp_path):
        """Neither one of the file nor one of the environment; what AWX sets for another cluster stays out."""
        assert "cp-1" in inventory(**self.OTHER_CLUSTER)[1]
        more = dict(self.OTHER_CLUSTER, K8S_AUTH_KUBECONFIG=str(tmp_path / "kubeconfig"), K8S_AUTH_CONTEXT="test")
        assert "cp-1" in inventory({"kubeconfig": None}, **more)[1]
        assert api.asked(verb="list", resource="nodes", token=TOKEN, code=200) == 2

    def test_a_host_is_not_given_what_a_kubeconfig_has(self, ansible, inventory, api):
        given = {"kubeconfig": None, "host": api.url}
        assert "cp-1" in inventory(given, K8S_AUTH_API_KEY=TOKEN, K8S_AUTH_KUBECONFIG="/nonexistent", K8S_AUTH_CONTEXT="x")[1]
        rc, dummy, errors = ansible({"host": api.url})
        assert (rc, "host, kubeconfig: both say where the API is" in errors) == (1, True)

    def test_context_of_the_environment(self, ansible, inventory, tmp_path):
        kubeconfig = {"K8S_AUTH_KUBECONFIG": str(tmp_path / "kubeconfig")}
        assert "cp-1" in inventory({"kubeconfig": None}, K8S_AUTH_CONTEXT="test", **kubeconfig)[1]
        rc, dummy, errors = ansible({"kubeconfig": None}, K8S_AUTH_CONTEXT="other", **kubeconfig)
        assert (rc, "context 'other' is not in kubeconfig" in errors) == (1, True)

    @pytest.mark.parametrize("config,said", [
        ({"kubeconfig": "/nonexistent"}, "kubeconfig: /nonexistent does not exist on the controller; correct the path"),
        ({"kubeconfig": None}, "there is no way to the Kubernetes API"),
        ({"kubeconfig": None, "host": "http://127.0.0.1:1"}, "is given without credentials; give api_key"),
        ({"context": "other"}, "context 'other' is not in kubeconfig"),
        ({"address_query": "a[["}, "address_query: 'a[[' is not a JMESPath expression"),
        ({"address_query": "nothing(metadata.name)"}, "node cp-1, address_query: Unknown function: nothing()"),
        ({"cluster_group": "a-b"}, "cluster_group: 'a-b' is not possible"),
        ({"cluster_group": "k8s_windows"}, "cluster_group: 'k8s_windows' is not possible"),
        ({"page_size": 0}, "page_size: 0 is not possible"),
        ({"lable_selector": "a=b"}, "there is no option 'lable_selector'; did you mean label_selector?"),
        ({"zzz": 1}, "there is no option 'zzz'; see ansible-doc -t inventory kubemesh.wireguard.k8s_nodes"),
        ({"ca_cert": "/nonexistent"}, "ca_cert: /nonexistent cannot be read on the controller"),
    ])
    def test_bad_configuration(self, ansible, config, said):
        rc, dummy, errors = ansible(config)
        assert rc == 1
        assert said in errors

    def test_faults(self, ansible, api):
        for fault, more, said in (
                ("status", {"code": 500}, "answers 500 fault on demand to kubeconfig"), ("garbage", {"body": "<html>"}, "is no JSON"),
                ("half", {}, "cannot be reached"), ("reset", {}, "cannot be reached"), ("hang", {}, "cannot be reached")):
            api.fault(fault, verb="list", resource="nodes", times=None, **more)
            rc, dummy, errors = ansible({"timeout": 1})
            api.clear_faults()
            assert rc == 1
            assert said in errors, fault
        api.fault("empty", verb="list", resource="nodes")
        rc, dummy, errors = ansible()
        assert (rc, "has no node" in errors) == (0, True)
        api.set_tokens({"ansible": "another"})
        rc, dummy, errors = ansible()
        assert (rc, "does not accept the credentials (401" in errors) == (1, True)
        api.set_tokens({"ansible": TOKEN})
        api.refuse("list", "nodes")
        rc, dummy, errors = ansible()
        assert (rc, "give it a ClusterRole" in errors) == (1, True)
        api.down()
        rc, dummy, errors = ansible()
        assert (rc, "cannot be reached" in errors) == (1, True)

    def test_not_a_node(self, ansible, api):
        api.apply("nodes", {"metadata": {"name": "{{ 1 }}"}})
        rc, dummy, errors = ansible()
        assert rc == 1
        assert "'{{ 1 }}' is not the name of a Node" in errors
