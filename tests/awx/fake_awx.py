# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small AWX: its REST API as far as the modules of awx.awx use it, with objects kept in memory.

There is no AWX to record answers of where this is developed, so they are made by hand from the published API (``/api/v2/``, AWX 24): the
fields of each type with their defaults, references that must exist, lists with filters, associations, secrets that come back as
``$encrypted$``, surveys that are checked as AWX does it, and what a deletion takes with it. A field that a type does not have is refused,
where AWX would ignore it without a word: so an argument that means nothing is found.
"""

from __future__ import annotations

import json
import re
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jinja2
import jinja2.sandbox

SECRET = "$encrypted$"
TOKEN = "token-of-the-test"
PREFIX = "/api/v2/"
NAMED = {"name": None, "description": ""}

# Collection -> (type of its objects, fields with their defaults, fields that refer to a collection).
KINDS = {
    "organizations": ("organization", dict(NAMED, max_hosts=0), {}),
    "execution_environments": (
        "execution_environment", dict(NAMED, image=None, pull=""), {"organization": "organizations", "credential": "credentials"}),
    "projects": (
        "project", dict(NAMED, scm_type="", scm_url="", scm_branch="", scm_refspec="", scm_clean=False, scm_delete_on_update=False,
                        scm_track_submodules=False, scm_update_on_launch=False, scm_update_cache_timeout=0, allow_override=False, timeout=0,
                        scm_revision=""),
        {"organization": "organizations", "credential": "credentials", "default_environment": "execution_environments"}),
    "credential_types": ("credential_type", dict(NAMED, kind=None, managed=False, inputs=None, injectors=None), {}),
    "credentials": ("credential", dict(NAMED, inputs={}), {"organization": "organizations", "credential_type": "credential_types"}),
    "inventories": (
        "inventory", dict(NAMED, kind="", host_filter=None, variables="", prevent_instance_group_fallback=False),
        {"organization": "organizations"}),
    "inventory_sources": (
        "inventory_source", dict(NAMED, source="", source_path="", source_vars="", enabled_var="", enabled_value="", host_filter="",
                                 limit="", overwrite=False, overwrite_vars=False, timeout=0, verbosity=1, update_on_launch=False,
                                 update_cache_timeout=0, scm_branch=""),
        {"inventory": "inventories", "credential": "credentials", "execution_environment": "execution_environments",
         "source_project": "projects"}),
    "notification_templates": (
        "notification_template", dict(NAMED, notification_type=None, notification_configuration=None, messages=None),
        {"organization": "organizations"}),
    "job_templates": (
        "job_template", dict(
            NAMED, job_type="run", playbook=None, scm_branch="", forks=0, limit="", verbosity=0, extra_vars="", job_tags="",
            force_handlers=False, skip_tags="", start_at_task="", timeout=0, use_fact_cache=False, host_config_key="", survey_enabled=False,
            become_enabled=False, diff_mode=False, allow_simultaneous=False, job_slice_count=1, webhook_service="",
            prevent_instance_group_fallback=False, **{"ask_%s_on_launch" % name: False for name in (
                "scm_branch", "diff_mode", "variables", "limit", "tags", "skip_tags", "job_type", "verbosity", "inventory", "credential",
                "execution_environment", "forks", "instance_groups", "job_slice_count", "labels", "timeout")}),
        {"organization": "organizations", "project": "projects", "inventory": "inventories",
         "execution_environment": "execution_environments"}),
    "workflow_job_templates": (
        "workflow_job_template", dict(
            NAMED, extra_vars="", survey_enabled=False, allow_simultaneous=False, limit="", scm_branch="", webhook_service="", job_tags="",
            skip_tags="", **{"ask_%s_on_launch" % name: False for name in (
                "inventory", "scm_branch", "limit", "variables", "labels", "tags", "skip_tags")}),
        {"organization": "organizations", "inventory": "inventories"}),
    "workflow_job_template_nodes": (
        "workflow_job_template_node", {"identifier": None, "extra_data": {}, "limit": None, "all_parents_must_converge": False},
        {"workflow_job_template": "workflow_job_templates", "unified_job_template": "unified_job_templates"}),
    "schedules": (
        "schedule", dict(NAMED, rrule=None, enabled=True, extra_data={}, limit=None), {"unified_job_template": "unified_job_templates"}),
}
REQUIRED = {
    "execution_environments": ("image",), "projects": ("organization",), "credential_types": ("kind",), "credentials": ("credential_type",),
    "inventories": ("organization",), "inventory_sources": ("inventory", "source"), "job_templates": ("playbook", "project"),
    "notification_templates": ("organization", "notification_type"), "schedules": ("rrule", "unified_job_template"),
    "workflow_job_template_nodes": ("workflow_job_template", "unified_job_template"),
}
UNIFIED = ("job_templates", "workflow_job_templates", "projects", "inventory_sources")
ASSOCIATED = {
    "credentials": "credentials", "success_nodes": "workflow_job_template_nodes", "failure_nodes": "workflow_job_template_nodes",
    "always_nodes": "workflow_job_template_nodes", "notification_templates_error": "notification_templates",
    "notification_templates_started": "notification_templates", "notification_templates_success": "notification_templates",
}
# What goes with an object: (collection, field that refers to it); what may not be left behind stops it.
CASCADES = {
    "inventories": [("inventory_sources", "inventory")], "job_templates": [("schedules", "unified_job_template")],
    "workflow_job_templates": [("workflow_job_template_nodes", "workflow_job_template"), ("schedules", "unified_job_template")],
}
PROTECTED = {"credential_types": ("credentials", "credential_type")}
SURVEY_TYPES = {
    "text": str, "textarea": str, "password": str, "multiplechoice": str, "multiselect": str, "integer": int, "float": float}


class Refused(Exception):
    """An answer that is not a success: status and body."""


def check_survey(survey):
    """As JobTemplateSurveySpec of AWX: Refused with what is wrong."""
    for field, kind in (("name", str), ("description", str), ("spec", list)):
        if not isinstance(survey.get(field), kind):
            raise Refused(400, {"error": "Field '%s' is missing or of another type" % field})
    seen = set()
    for item in survey["spec"]:
        for field, kind in (("type", str), ("question_name", str), ("variable", str), ("required", bool)):
            if not isinstance(item.get(field), kind):
                raise Refused(400, {"error": "'%s' in survey question is missing or of another type: %r" % (field, item)})
        if item["variable"] in seen or item["type"] not in SURVEY_TYPES:
            raise Refused(400, {"error": "survey question %r" % item})
        seen.add(item["variable"])
        if item.get("default", "") != "" and not isinstance(item["default"], SURVEY_TYPES[item["type"]]):
            raise Refused(400, {"error": "Default value of %s" % item["variable"]})
        for key in ("min", "max"):
            if item.get(key) is not None and not isinstance(item[key], int):
                raise Refused(400, {"error": "The %s limit of %s expected to be integer" % (key, item["variable"])})
        if item["type"] in ("multiplechoice", "multiselect"):
            check_choices(item)


def check_choices(item):
    """The choices of a question, one a line or a list, and what is chosen where nobody chooses."""
    choices = item.get("choices") or []
    choices = [line for line in choices.splitlines() if line.strip()] if isinstance(choices, str) else choices
    if not choices:
        raise Refused(400, {"error": "%s must specify choices" % item["variable"]})
    chosen = item.get("default", "").splitlines()
    if len(chosen) > 1 and item["type"] == "multiplechoice":
        raise Refused(400, {"error": "Multiple Choice (Single Select) can only have one default value."})
    if not set(chosen) <= set(choices):
        raise Refused(400, {"error": "Default choice must be answered from the choices listed."})


# Names of fields, of environment variables and of extra variables: CredentialTypeInputField and CredentialTypeInjectorField.
IDENTIFIER = re.compile(r"[a-zA-Z_]+[a-zA-Z0-9_]*")
TEMPLATE_FILE = re.compile(r"template(\.[a-zA-Z_]+[a-zA-Z0-9_]*)?")
FIELD_KEYS = {"id", "label", "type", "format", "choices", "help_text", "multiline", "secret", "ask_at_runtime", "default"}


def check_inputs(inputs):
    """The fields of a type of credentials as AWX checks them."""
    names = [field.get("id") for field in inputs.get("fields", ())]
    if set(inputs) - {"fields", "required", "dependencies", "metadata"} or len(set(names)) < len(names):
        raise Refused(400, {"inputs": ["unknown keys, or a field twice: %s" % inputs]})
    for field in inputs.get("fields", ()):
        if not (set(field) <= FIELD_KEYS and isinstance(field.get("label"), str) and IDENTIFIER.fullmatch(str(field.get("id")))
                and field["id"] != "tower" and field.get("type", "string") in ("string", "boolean")):
            raise Refused(400, {"inputs": ["field %r" % field]})
        if field.get("type") == "boolean" and set(field) & {"secret", "multiline", "choices", "format"}:
            raise Refused(400, {"inputs": ["a boolean has no %s" % sorted(field)]})
    if not set(inputs.get("required", ())) <= set(names):
        raise Refused(400, {"inputs": ["required: not among the fields"]})


def check_injectors(inputs, injectors):
    """What a type of credentials puts into a job, as AWX checks it: names, that templates are templates, and name fields that exist."""
    if set(injectors) - {"file", "env", "extra_vars"}:
        raise Refused(400, {"injectors": ["Additional properties are not allowed"]})
    files = injectors.get("file", {})
    for name in files:
        if not TEMPLATE_FILE.fullmatch(name) or (name == "template" and len(files) > 1):
            raise Refused(400, {"injectors": ["Must use multi-file syntax when injecting multiple files: %s" % name]})
    namespace = {field["id"]: "EXAMPLE" for field in inputs.get("fields", ())}
    one = "EXAMPLE_FILENAME" if "template" in files else types.SimpleNamespace(
        **{name.partition(".")[2]: "EXAMPLE_FILENAME" for name in files})
    namespace["tower"] = types.SimpleNamespace(filename=one)
    for kind, values in injectors.items():
        for name, template in values.items():
            if kind != "file" and not IDENTIFIER.fullmatch(name):
                raise Refused(400, {"injectors": ["'%s' does not match" % name]})
            if kind == "env" and name.startswith("ANSIBLE_"):
                raise Refused(400, {"injectors": ["Environment variable %s may affect Ansible configuration" % name]})
            try:
                jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(template).render(namespace)
            except jinja2.TemplateError as exc:
                raise Refused(400, {"injectors": ["%s uses an undefined field (%s)" % (name, exc)]}) from None


def check_answers(survey, answers):
    """As AWX checks variables that were saved for a launch: an answer to a question must be one that could be given."""
    for item in (survey or {}).get("spec") or []:
        value = answers.get(item["variable"])
        if value is not None and item["type"] == "multiplechoice" and value not in item["choices"]:
            raise Refused(400, {"extra_data": ["Value %r for '%s' expected to be one of %s." % (value, item["variable"], item["choices"])]})


class FakeAWX:
    """The objects, and what is done with them. C(playbooks): what every project has."""

    def __init__(self, playbooks):
        self.playbooks, self.objects, self.associations, self.surveys = set(playbooks), {}, {}, {}
        self.number, self.written = 0, []
        self.lock = threading.RLock()
        self.create("organizations", {"name": "Default"})
        self.create("credential_types", {
            "name": "Machine", "kind": "ssh", "managed": True, "inputs": {"fields": [{"id": "ssh_key_data", "secret": True}]}})
        self.create("credential_types", {
            "name": "OpenShift or Kubernetes API Bearer Token", "kind": "kubernetes", "managed": True, "inputs": {
                "fields": [{"id": "host"}, {"id": "bearer_token", "secret": True}, {"id": "verify_ssl"},
                           {"id": "ssl_ca_cert", "secret": True}],
                "required": ["host", "bearer_token"]}})

    def seed(self, collection, **fields):
        """An object that was there before; its id."""
        return self.create(collection, fields)["id"]

    def names(self):
        """{collection: sorted names} of all objects."""
        found = {}
        for collection, item in self.objects.values():
            found.setdefault(collection, []).append(item.get("name") or item.get("identifier"))
        return {collection: sorted(names) for collection, names in found.items()}

    def find(self, collection, **fields):
        """The one object with these fields."""
        items = [item for item in self.items(collection) if all(item.get(key) == value for key, value in fields.items())]
        assert len(items) == 1, (collection, fields, items)
        return items[0]

    def items(self, collection):
        wanted = UNIFIED if collection == "unified_job_templates" else (collection,)
        return [item for kind, item in self.objects.values() if kind in wanted]

    def associated(self, item, name):
        return [self.objects[number][1] for number in self.associations.get((item["id"], name), [])]

    # --- what requests do

    def create(self, collection, given):
        kind, fields, references = KINDS[collection]
        item = dict(json.loads(json.dumps(fields)), **dict.fromkeys(references))
        self.check(collection, given)
        item.update(given)
        for field in REQUIRED.get(collection, ()):
            if item.get(field) in (None, ""):
                raise Refused(400, {field: ["This field is required."]})
        same = {"name": item.get("name"), "organization": item.get("organization")} if "name" in item and collection != "schedules" else {}
        if same and any(all(other.get(key) == value for key, value in same.items()) for other in self.items(collection)
                        if other["type"] != "credential" or other["credential_type"] == item["credential_type"]):
            raise Refused(400, {"__all__": ["%s with this Name already exists." % kind]})
        self.number += 1
        url = "%s%s/%d/" % (PREFIX, collection, self.number)
        related = {"survey_spec": url + "survey_spec/"} if collection in ("job_templates", "workflow_job_templates") else {}
        item.update(id=self.number, type=kind, url=url, related=related, summary_fields={})
        self.objects[self.number] = (collection, item)
        return item

    def check(self, collection, given):
        dummy, fields, references = KINDS[collection]
        for field, value in given.items():
            if field not in fields and field not in references:
                raise Refused(400, {field: ["%s has no such field" % collection]})
            if field in references and value is not None and value not in [item["id"] for item in self.items(references[field])]:
                raise Refused(400, {field: ["Invalid pk %r - object does not exist." % value]})
            default = fields.get(field)
            if isinstance(default, (bool, str)) and value is not None and not isinstance(value, type(default)):
                raise Refused(400, {field: ["%r is not of the type of %r" % (value, default)]})
        if "playbook" in given and given["playbook"] not in self.playbooks:
            raise Refused(400, {"playbook": ["Playbook not found for project."]})
        if "rrule" in given and not re.match(r"DTSTART:\d{8}T\d{6}Z RRULE:FREQ=", given["rrule"]):
            raise Refused(400, {"rrule": ["Valid DTSTART required in rrule."]})
        if collection == "credentials" and "inputs" in given:
            known = self.objects[given["credential_type"]][1]["inputs"]
            if not set(known.get("required", ())) <= set(given["inputs"]) <= {field["id"] for field in known["fields"]}:
                raise Refused(400, {"inputs": ["fields that are missing or unknown: %s" % sorted(given["inputs"])]})
        if collection == "credential_types" and not given.get("managed"):
            check_inputs(given.get("inputs") or {})
            check_injectors(given.get("inputs") or {}, given.get("injectors") or {})
        if collection == "workflow_job_template_nodes" and given.get("extra_data"):
            check_answers(self.surveys.get(given["unified_job_template"]), given["extra_data"])

    def shown(self, item):
        """The object as the API shows it: without its secrets."""
        item = json.loads(json.dumps(item))
        if item["type"] == "credential":
            secret = {field["id"] for field in self.objects[item["credential_type"]][1]["inputs"]["fields"] if field.get("secret")}
            item["inputs"] = {key: SECRET if key in secret else value for key, value in item["inputs"].items()}
        if item["type"] == "notification_template":
            shown = item["notification_configuration"] or {}
            item["notification_configuration"] = {key: SECRET if key in ("password", "token") else value for key, value in shown.items()}
        return item

    def listed(self, collection, query):
        found = []
        for item in self.items(collection):
            either = [str(item.get(key[4:])) == value for key, value in query.items() if key.startswith("or__")]
            every = [str(item.get(key)) == value for key, value in query.items() if not key.startswith("or__")]
            if all(every) and (any(either) or not either):
                found.append(self.shown(item))
        return {"count": len(found), "next": None, "previous": None, "results": found}

    def delete(self, number):
        collection, dummy = self.objects[number]
        if collection in PROTECTED and any(item[PROTECTED[collection][1]] == number for item in self.items(PROTECTED[collection][0])):
            raise Refused(403, {"detail": "Credential types that are in use cannot be deleted."})
        for other, field in CASCADES.get(collection, ()):
            for item in [item for item in self.items(other) if item[field] == number]:
                self.delete(item["id"])
        del self.objects[number]
        for key, numbers in list(self.associations.items()):
            self.associations[key] = [other for other in numbers if other != number]
            if key[0] == number:
                del self.associations[key]
        for dummy, item in self.objects.values():
            for field, target in KINDS_BY_TYPE[item["type"]].items():
                if item[field] == number and target != "organizations":
                    item[field] = None

    def associate(self, item, name, given):
        numbers = self.associations.setdefault((item["id"], name), [])
        if given.get("disassociate"):
            numbers.remove(given["id"])
            return
        if given["id"] not in [other["id"] for other in self.items(ASSOCIATED[name])]:
            raise Refused(400, {"id": ["does not exist"]})
        if name == "credentials":
            kinds = [self.objects[number][1]["credential_type"] for number in numbers]
            if self.objects[given["id"]][1]["credential_type"] in kinds:
                raise Refused(400, {"error": "Cannot assign multiple credentials of one type."})
        numbers.append(given["id"])

    def answer(self, method, path, query, given):
        """(status, body) of a request."""
        parts = path[len(PREFIX):].strip("/").split("/")
        if len(parts) == 1 and (parts[0] in KINDS or parts[0] == "unified_job_templates"):
            if method == "GET":
                return 200, self.listed(parts[0], query)
            return 201, self.shown(self.create(parts[0], given))
        number = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None
        if number not in self.objects or self.objects[number][0] != parts[0]:
            raise Refused(404, {"detail": "Not found."})
        item = self.objects[number][1]
        if len(parts) == 2:
            return self.one(method, item, given)
        if parts[2] == "survey_spec":
            if method == "POST":
                check_survey(given)
                self.surveys[number] = given
            return 200, self.surveys.get(number, {}) if method == "GET" else {}
        if parts[2] in ASSOCIATED:
            if method == "GET":
                found = [self.shown(other) for other in self.associated(item, parts[2])]
                return 200, {"count": len(found), "next": None, "previous": None, "results": found}
            self.associate(item, parts[2], given)
            return 204, None
        raise Refused(404, {"detail": "Not found."})

    def one(self, method, item, given):
        if method == "PATCH":
            collection = self.objects[item["id"]][0]
            if collection == "credential_types":
                if given.get("inputs", item["inputs"]) != item["inputs"] and any(
                        other["credential_type"] == item["id"] for other in self.items("credentials")):
                    raise Refused(403, {"detail": "Modifications to inputs are not allowed for credential types that are in use"})
                given = dict({key: item[key] for key in ("inputs", "injectors")}, **given)
            self.check(collection, dict(given, credential_type=item["credential_type"]) if collection == "credentials" else given)
            item.update(given)
        elif method == "DELETE":
            self.delete(item["id"])
            # AWX takes its time with an inventory.
            return (202 if item["type"] == "inventory" else 204), None
        return 200, self.shown(item)


KINDS_BY_TYPE = {kind: references for kind, dummy, references in KINDS.values()}


class Handler(BaseHTTPRequestHandler):
    """HTTP around it."""

    protocol_version = "HTTP/1.1"

    def do(self):
        awx = self.server.awx
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        length = int(self.headers.get("Content-Length") or 0)
        given = json.loads(self.rfile.read(length) or b"{}") if length else {}
        try:
            if self.headers.get("Authorization") != "Bearer " + TOKEN:
                raise Refused(401, {"detail": "Authentication credentials were not provided."})
            with awx.lock:
                if self.command != "GET":
                    awx.written.append((self.command, url.path))
                status, body = awx.answer(self.command, url.path, query, given)
        except Refused as refused:
            status, body = refused.args
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("X-API-Product-Name", "AWX")
        self.send_header("X-API-Product-Version", "24.6.1")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = do

    def log_message(self, *dummy):
        """Tests tell what they need."""


class Server:
    """A running one: ``with Server(awx) as url``."""

    def __init__(self, awx):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.awx = awx
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return "http://127.0.0.1:%d" % self.server.server_address[1]

    def __exit__(self, *dummy):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
