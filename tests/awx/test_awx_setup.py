# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook awx_setup with the modules of awx.awx against a small AWX: what it makes, that a second run changes nothing, and what is
left when it is taken away again. The modules refuse arguments that they do not have, so their own argument specs are tested as well.

``ANSIBLE_COLLECTIONS_PATH`` has awx.awx and this collection.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fake_awx import TOKEN, FakeAWX, Refused, Server, check_survey

PLAYBOOKS = ("enable", "reconcile", "rotate_keys", "disable", "status")
AGENT_TOKEN = "agent-token-of-the-test"
PSK = "preshared-secret-of-the-test-0123456789"
KUBECONFIG = "apiVersion: v1 # kubeconfig-of-the-test"
CA = "-----BEGIN CERTIFICATE-----\nof-the-test\n-----END CERTIFICATE-----\n"
NOTIFIED = {"mesh_awx_notification_type": "slack", "mesh_awx_notification_configuration": {"channels": ["#mesh"], "token": "slack-token-x"}}
ALL = dict(NOTIFIED, mesh_awx_organization="Default", mesh_awx_image="registry.example/kubemesh-ee:1.0.0", mesh_awx_kubeconfig=KUBECONFIG,
           mesh_awx_psk_secret=PSK, mesh_awx_agent_token=AGENT_TOKEN, mesh_awx_credentials=["ssh"],
           mesh_awx_inventory_variables={"ansible_user": "root"}, mesh_awx_notifications=["on call"])
LEAST = {"mesh_awx_organization": "Default", "mesh_awx_image": "registry.example/kubemesh-ee:1.0.0"}
RECAP = re.compile(r"^localhost\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@pytest.fixture
def awx():
    found = FakeAWX("playbooks/%s.yml" % name for name in PLAYBOOKS)
    machine = found.find("credential_types", name="Machine")["id"]
    found.seed("credentials", name="ssh", credential_type=machine, organization=found.find("organizations", name="Default")["id"])
    found.seed("notification_templates", name="on call", notification_type="email", notification_configuration={},
               organization=found.find("organizations", name="Default")["id"])
    with Server(found) as url:
        found.url = url
        yield found


def setup(awx, tmp_path, settings, *args, rc=0, token=TOKEN):
    """Run the playbook; (changed, text)."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CONTROLLER_", "TOWER_"))}
    env.update(CONTROLLER_HOST=awx.url, CONTROLLER_OAUTH_TOKEN=token, ANSIBLE_NOCOLOR="true", ANSIBLE_LOCALHOST_WARNING="false",
               ANSIBLE_HOME=str(tmp_path / "ansible"), ANSIBLE_DEPRECATION_WARNINGS="false", ANSIBLE_PIPELINING="true")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "kubemesh.wireguard.awx_setup", "-e", "@%s" % path, *args],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == rc, done.stdout[-6000:]
    recap = RECAP.search(done.stdout)
    return int(recap.group(2)) if recap else None, done.stdout


def test_everything_is_made_once_and_taken_away_again(awx, tmp_path):
    before = awx.names()
    changed, text = setup(awx, tmp_path, ALL, "--check", "--diff")
    said = " ".join(text.split())
    assert changed == 1 and "Not there yet: kubemesh, kubemesh kubeconfig, " in said and "kubemesh status. They would be made" in said, text
    assert awx.written == []
    changed, text = setup(awx, tmp_path, ALL, "-vvv")
    assert changed > 0
    for secret in (PSK, AGENT_TOKEN, KUBECONFIG, "slack-token-x", TOKEN):
        assert secret not in text
    made(awx)

    awx.written.clear()
    for arguments in ([], ["--check"]):
        changed, text = setup(awx, tmp_path, ALL, *arguments)
        assert changed == 0, text
        assert awx.written == []

    changed, text = setup(awx, tmp_path, dict(ALL, mesh_awx_state="absent"))
    assert changed > 0
    assert awx.names() == before

    awx.written.clear()
    changed, text = setup(awx, tmp_path, dict(ALL, mesh_awx_state="absent"))
    assert changed == 0 and awx.written == [], text


def made(awx):
    """What is in AWX is what the mesh needs."""
    organization = awx.find("organizations", name="Default")["id"]
    environment = awx.find("execution_environments", name="kubemesh")
    assert environment["organization"] == organization
    project = awx.find("projects", name="kubemesh")
    assert project["organization"] == organization and project["default_environment"] == environment["id"]
    inventory = awx.find("inventories", name="kubemesh nodes")
    assert inventory["organization"] == organization
    source = awx.find("inventory_sources", inventory=inventory["id"])
    assert source["source"] == "scm" and source["update_on_launch"] and source["overwrite"] and source["overwrite_vars"]
    assert source["credential"] == awx.find("credentials", name="kubemesh kubeconfig")["id"]
    secrets(awx, json.loads(inventory["variables"]))
    for name in PLAYBOOKS:
        template = awx.find("job_templates", name="kubemesh %s" % name)
        assert template["playbook"] == "playbooks/%s.yml" % name and template["project"] == project["id"]
        assert template["inventory"] == inventory["id"] and template["execution_environment"] == environment["id"]
        assert template["job_slice_count"] == 1
        assert [template[field] for field in ("allow_simultaneous", "use_fact_cache", "ask_job_slice_count_on_launch")] == [False] * 3
        assert [template[field] for field in ("ask_limit_on_launch", "ask_variables_on_launch", "survey_enabled")] == [True] * 3
        assert sorted(item["name"] for item in awx.associated(template, "credentials")) == [
            "kubemesh agent token", "kubemesh kubeconfig", "kubemesh preshared secret", "ssh"]
        assert sorted(item["name"] for item in awx.associated(template, "notification_templates_error")) == ["kubemesh failures", "on call"]
        assert not awx.associated(template, "notification_templates_success")
        assert awx.surveys[template["id"]]["spec"]
    workflow(awx)
    schedule = awx.find("schedules", name="kubemesh reconcile")
    assert schedule["unified_job_template"] == awx.find("job_templates", name="kubemesh reconcile")["id"] and schedule["enabled"]
    assert schedule["extra_data"] == {"mesh_lock_wait": 600}


def secrets(awx, variables):
    """Secrets are in credentials, jobs get them as files, and what anyone can read has no secret in it."""
    assert variables == {
        "ansible_user": "root",
        "mesh_agent_token": "{{ lookup('ansible.builtin.file', lookup('ansible.builtin.env', 'MESH_AGENT_TOKEN_FILE')) }}",
        "mesh_psk_secret": "{{ lookup('ansible.builtin.file', lookup('ansible.builtin.env', 'MESH_PSK_SECRET_FILE')) }}"}
    kubeconfig, psk, agent = (awx.find("credential_types", name="kubemesh " + name)
                              for name in ("kubeconfig", "preshared secret", "agent token"))
    for kind in (kubeconfig, psk, agent):
        assert "extra_vars" not in kind["injectors"] and all(field["secret"] for field in kind["inputs"]["fields"])
        assert all("tower.filename." in value for value in kind["injectors"]["env"].values())
    assert kubeconfig["injectors"]["env"]["K8S_AUTH_KUBECONFIG"] == "{{ tower.filename.kubeconfig }}"
    assert psk["injectors"]["file"] == {"template.psk": "{{ psk_secret }}"}
    assert awx.find("credentials", name="kubemesh preshared secret")["inputs"] == {"psk_secret": PSK}
    assert agent["injectors"]["file"] == {"template.token": "{{ agent_token }}"}
    assert awx.find("credentials", name="kubemesh agent token")["inputs"] == {"agent_token": AGENT_TOKEN}
    assert awx.find("credentials", name="kubemesh kubeconfig")["inputs"] == {"kubeconfig": KUBECONFIG}


def workflow(awx):
    """The mesh is enabled, and then checked by a job that fails unless all is encrypted."""
    found = awx.find("workflow_job_templates", name="kubemesh enable and check")
    first, check = (
        awx.find("workflow_job_template_nodes", workflow_job_template=found["id"], identifier=name) for name in ("enable", "check"))
    assert first["unified_job_template"] == awx.find("job_templates", name="kubemesh enable")["id"]
    assert check["unified_job_template"] == awx.find("job_templates", name="kubemesh status")["id"]
    assert awx.associated(first, "success_nodes") == [check] and not awx.associated(first, "always_nodes")
    assert check["extra_data"] == {"mesh_require_encrypted": "true"}
    assert not awx.associated(found, "notification_templates_error"), "its jobs tell"


def test_the_least_and_a_token_and_an_inventory_that_is_there(awx, tmp_path):
    """Nothing that is not asked for is made; what somebody changed comes back; a token needs no type of our own; what was there stays."""
    awx.seed("inventories", name="ours", organization=awx.find("organizations", name="Default")["id"])
    setup(awx, tmp_path, LEAST)
    template = awx.find("job_templates", name="kubemesh enable")
    assert not awx.associated(template, "credentials") and not awx.associated(template, "notification_templates_error")
    assert awx.find("inventories", name="kubemesh nodes")["variables"] == "{}"
    awx.delete(awx.find("inventories", name="kubemesh nodes")["id"])
    template["job_slice_count"] = 3

    settings = dict(LEAST, mesh_awx_kubernetes_host="https://api.example:6443", mesh_awx_kubernetes_token="service-account-token-x",
                    mesh_awx_kubernetes_ca=CA, mesh_awx_inventory="ours")
    changed, text = setup(awx, tmp_path, settings, "-vvv")
    assert "service-account-token-x" not in text and changed > 0
    assert template["job_slice_count"] == 1 and template["inventory"] == awx.find("inventories", name="ours")["id"]
    assert [item["name"] for item in awx.associated(template, "credentials")] == ["kubemesh API token"]
    inputs = awx.find("credentials", name="kubemesh API token")["inputs"]
    assert inputs["verify_ssl"] is True and inputs["ssl_ca_cert"].strip() == CA.strip()
    assert awx.names()["inventories"] == ["ours"] and "inventory_sources" not in awx.names()
    assert setup(awx, tmp_path, settings)[0] == 0

    setup(awx, tmp_path, dict(settings, mesh_awx_state="absent"))
    assert awx.names()["inventories"] == ["ours"] and awx.names()["credentials"] == ["ssh"] and "job_templates" not in awx.names()


@pytest.mark.parametrize("settings,words", [
    ({}, ["mesh_awx_organization"]),
    ({"mesh_awx_organization": "Default"}, ["mesh_awx_image"]),
    (dict(LEAST, mesh_awx_organization="Nobody"), ["mesh_awx_organization", "Nobody", "organizations"]),
    (dict(LEAST, mesh_awx_credentials=["ssh", "nowhere"]), ["mesh_awx_credentials", "nowhere", "credentials"]),
    (dict(LEAST, mesh_awx_state="gone", mesh_awx_credentials={"a": 1}), ["mesh_awx_state", "present, absent", "mesh_awx_credentials"]),
    (dict(LEAST, mesh_awx_psk_secret="too-short-x"), ["mesh_awx_psk_secret", "32 characters"])])
def test_what_cannot_work_is_refused_before_anything_is_made(awx, tmp_path, settings, words):
    text = " ".join(setup(awx, tmp_path, settings, rc=2)[1].split())
    for word in words:
        assert word in text, text[-3000:]
    assert "too-short-x" not in text
    assert awx.written == []


def test_rights_that_are_missing_are_told(awx, tmp_path):
    assert "401" in setup(awx, tmp_path, LEAST, rc=2, token="another-one")[1]
    assert awx.written == []


def test_a_check_of_what_came_later_says_what_is_missing(awx, tmp_path):
    """A type of credentials that is not there yet cannot be looked up by what would refer to it."""
    setup(awx, tmp_path, {key: value for key, value in ALL.items() if key != "mesh_awx_agent_token"})
    awx.written.clear()
    changed, text = setup(awx, tmp_path, ALL, "--check")
    assert changed == 1 and "Not there yet: kubemesh agent token. They would be made" in " ".join(text.split()), text
    assert awx.written == []


FIELDS = {"fields": [{"id": "token", "label": "Token", "secret": True}]}


@pytest.mark.parametrize("inputs,injectors", [
    ({"fields": [{"id": "to ken", "label": "x"}]}, {}), ({"fields": [{"id": "tower", "label": "x"}]}, {}), ({"fields": [{"id": "a"}]}, {}),
    ({"fields": [{"id": "a", "label": "A"}] * 2}, {}), (dict(FIELDS, required=["b"]), {}), ({"field": []}, {}),
    ({"fields": [{"id": "a", "label": "A", "type": "boolean", "secret": True}]}, {}), (FIELDS, {"vars": {}}),
    (FIELDS, {"env": {"ANSIBLE_X": "1"}}), (FIELDS, {"env": {"9": "1"}}), (FIELDS, {"env": {"A": "{{ tokn }}"}}),
    (FIELDS, {"file": {"template.a": "x"}, "env": {"A": "{{ tower.filename.b }}"}}),
    (FIELDS, {"file": {"template": "x", "template.a": "y"}}), (FIELDS, {"file": {"template.9": "x"}}), (FIELDS, {"env": {"A": "{{"}}),
])
def test_the_small_awx_refuses_types_of_credentials_as_awx_does(inputs, injectors):
    """From AWX's own tests of CredentialTypeInputField and CredentialTypeInjectorField."""
    with pytest.raises(Refused):
        FakeAWX([]).create("credential_types", {"name": "x", "kind": "cloud", "inputs": inputs, "injectors": injectors})


@pytest.mark.parametrize("change", [
    {"default": "blue"}, {"default": "red\ngreen"}, {"choices": []}, {"choices": ""}, {"type": "choice"}, {"required": "yes"},
    {"type": "integer", "default": "5"}, {"type": "text", "min": "1"},
])
def test_the_small_awx_refuses_questions_as_awx_does(change):
    question = dict({"type": "multiplechoice", "question_name": "Colour", "variable": "c", "required": True, "choices": ["red", "green"],
                     "default": "red"}, **change)
    with pytest.raises(Refused):
        check_survey({"name": "", "description": "", "spec": [question]})
