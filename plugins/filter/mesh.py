# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Filters of the role ``mesh``: decisions that are made on the controller, so that Jinja holds names only."""

from __future__ import annotations

import base64
import difflib
import hashlib

from ansible.errors import AnsibleFilterError

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kube_api, _psk, _settings, _status
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import (
    MeshError,
    canonical_cidr,
    check_node_name,
    load_document,
    some_of,
)
from ansible_collections.kubemesh.wireguard.plugins.plugin_utils._untrusted import plain, untrusted_results

# Variables that tasks of the role register results in which tell that something changed on a node; a test finds those that are missing.
CHANGING_RESULTS = (
    "__mesh_accepted", "__mesh_did_agent", "__mesh_did_destroy_key", "__mesh_did_destroy_psk", "__mesh_did_give",
    "__mesh_did_give_last", "__mesh_did_go_back", "__mesh_did_guard", "__mesh_did_leave_agent", "__mesh_did_leave_guard",
    "__mesh_did_leave_routes", "__mesh_did_loosen_guard", "__mesh_did_open_guard", "__mesh_did_psk", "__mesh_did_remove_agent",
    "__mesh_did_remove_device", "__mesh_did_remove_document", "__mesh_did_remove_key", "__mesh_did_remove_proofs",
    "__mesh_did_remove_psk", "__mesh_did_retire", "__mesh_did_retire_proofs", "__mesh_did_withdraw", "__mesh_did_withdraw_agent",
    "__mesh_key", "__mesh_sent",
)

# Names, and lines, that a message has room for.
NAMES_SHOWN = 10
LINES_SHOWN = 20


def _shortened(names):
    """Names for a sentence: the first few, and how many more there are."""
    return some_of(names, NAMES_SHOWN)


def _shortened_lines(lines):
    """The first few lines, and how many more there are."""
    return lines[:LINES_SHOWN] + ["and %d more of these" % (len(lines) - LINES_SHOWN)] * (len(lines) > LINES_SHOWN)


def batches(hosts, sizes):
    """Hosts cut into batches."""
    try:
        return _status.batches(hosts, sizes)
    except ValueError as exc:
        raise AnsibleFilterError(str(exc)) from exc


def progress(done, total, batch, hostvars, started, now):
    """One line of progress; the peers proven are those of the hosts of the batch."""
    results = [hostvars[host].get("__mesh_proved_again") or {} for host in batch]
    proven = sum(int(result.get("proven_count", 0)) for result in results)
    expected = sum(int(result.get("peer_count", 0)) for result in results)
    return _status.progress_line(int(done), int(total), proven, expected, float(started), float(now))


def mesh_table(hosts, hostvars, variable):
    """Lines of text for people, from what ``mesh_info`` left in a variable of each host."""
    infos = []
    computed = _first_value(hosts, hostvars, "__mesh_computed", lambda value: "excluded" in value)
    for host in hosts:
        info = hostvars[host].get(variable)
        if not info:
            # A host that is left out ends before it is looked at. Its name was noted before that.
            reason = (computed.get("excluded") or {}).get(hostvars[host].get("__mesh_name", host))
            info = {} if reason is None else {"msg": "excluded: %s" % reason}
        infos.append(dict(info, node=info.get("node") or host))
    return _status.mesh_table(infos)


def run_summary(hosts, hostvars, variable):
    """What a run came to, in numbers: for the artifact of a job. See `_status.run_summary`."""
    excluded = _first_value(hosts, hostvars, "__mesh_computed", lambda value: "excluded" in value).get("excluded") or {}
    infos, changed, not_reached = [], 0, 0
    for host in hosts:
        own = hostvars[host]
        info = own.get(variable) or {}
        if "counts" in info:
            infos.append(info)
        elif own.get("__mesh_name", host) not in excluded:
            not_reached += 1
        before = own.get("__mesh_before") or {}
        differs = "sending" in before and "sending" in info and _steering(before) != _steering(info)
        changed += differs or any((own.get(result) or {}).get("changed") for result in CHANGING_RESULTS)
    return _status.run_summary(infos, changed, not_reached)


def _steering(info):
    """What a node sends into the mesh, for comparison: a batch that is not this host's leaves no result of its own."""
    return info["sending"], info["encrypts"], [item["routes"] for item in info["generations"] if item["routes"]]


def batch_problems(batch, alive, hostvars):
    """Hosts of a batch that cannot go on: {host: problem}; ``alive`` are those that the play still has."""
    problems = {}
    for host in batch:
        if host not in alive:
            problems[host] = "it failed or became unreachable"
        elif hostvars[host].get("__mesh_batch_problem"):
            problems[host] = str(hostvars[host]["__mesh_batch_problem"])
    return problems


def silent_nodes(computed, hosts, hostvars):
    """Nodes of the mesh that run no responder now: those that are not part of this run, and those whose ports are all taken."""
    listening = {
        hostvars[host]["__mesh_name"] for host in hosts
        if ((hostvars[host].get("__mesh_local") or {}).get("listener") or {}).get("ports")}
    return sorted((set(computed["members"]) | set(computed["pending"])) - listening)


def all_findings(hosts, hostvars, exempt=(), job=None):
    """The findings of all nodes and those about the node list, as `findings_table` takes them.

    :param hosts: all hosts of the play, also those that failed or were not reached: what they said before counts.
    :param exempt: names of nodes that may stay in clear.
    :param job: see `slice_fault`.
    """
    # First, because the first error is what a run ends with: without a list of nodes others follow from it.
    found = node_list_findings(hosts, hostvars)
    for host in hosts:
        for variable in ("__mesh_local", "__mesh_between"):
            found += list((hostvars[host].get(variable) or {}).get("findings") or [])
    for host in hosts:
        found += damage_findings(host, hostvars[host].get("__mesh_before") or {})
    computed = _first_value(hosts, hostvars, "__mesh_computed", lambda value: "members" in value or "missing" in value)
    found += [finding("warning", text) for text in computed.get("warnings") or []]
    reached = {host for host in hosts if "exists" in (hostvars[host].get("__mesh_before") or {})}
    found += strict_findings([host for host in hosts if host in reached], hostvars, computed, exempt)
    for host in hosts if reached else ():
        if host not in reached:
            found.append(dict(
                finding("warning", "host %s could not be reached, or failed before" % host),
                remedy="mend that and run the playbook again: until then its pairs stay as they are, and a new node stays in clear"))
    missing = computed.get("missing") or {}
    return found + slice_findings(missing, exempt, job) + mismatch_findings(missing, computed.get("previous_serial") is None, exempt)


def damage_findings(host, before):
    """That a mesh document cannot be read. It is written anew, but what only it knew is not known any more."""
    return [
        dict(finding("warning", "host %s: %s" % (host, text)),
             remedy="this run writes it anew from the other nodes' and from what the nodes report; if all are damaged, run it on all nodes")
        for text in before.get("warnings_of_mesh") or [] if text.startswith("/etc/kubemesh/mesh.json")]


def strict_findings(hosts, hostvars, computed, exempt):
    """That strict mode would drop what nodes send to each other that have different ideas of what belongs into the tunnel, or would let
    pass in clear what nobody said may.

    :param hosts: the hosts that were reached.
    """
    changes = sorted({
        (before["encrypts"], hostvars[host]["__mesh_encrypt"])
        for host, before in ((host, hostvars[host]["__mesh_before"]) for host in hosts)
        if (before.get("guard") or {}).get("present") and before["encrypts"] in ("pods", "nodes")
        and before["encrypts"] != hostvars[host].get("__mesh_encrypt", before["encrypts"])})
    names = {hostvars[host].get("__mesh_name", host) for host in hosts}
    missing = sorted((set(computed.get("members") or []) | set(computed.get("pending") or [])) - names - set(exempt))
    excluded, found = set(computed.get("excluded") or {}), []
    in_clear = sorted(excluded - set(exempt))
    if in_clear and any(hostvars[host].get("__mesh_strict") for host in hosts):
        found.append(dict(
            finding("error", "strict mode is on, and nodes that are excluded from the mesh exchange everything in clear: %s" % _shortened(
                in_clear)),
            remedy="name them in mesh_exempt_nodes as well if that is meant, or take them into the mesh"))
    leaving = sorted(
        hostvars[host].get("__mesh_name", host) for host in hosts
        if hostvars[host].get("__mesh_name", host) in excluded and hostvars[host]["__mesh_before"].get("sending"))
    if leaving and missing and any((hostvars[host]["__mesh_before"].get("guard") or {}).get("present") for host in hosts):
        found.append(dict(
            finding("error", "strict mode is on, and these nodes are not part of this run and would go on dropping what %s would send in "
                    "clear: %s" % (_shortened(leaving), _shortened(missing))),
            remedy="run it on all nodes; or name nodes that cannot take part in mesh_exempt_nodes"))
    found += _exemption_findings(hosts, hostvars, missing)
    if not changes or not missing:
        return found
    return found + [dict(
        finding("error", "strict mode is on, and mesh_encrypt would change from %s to %s without these nodes, and what one side sends the "
                "other would drop: %s" % (changes[0][0], changes[0][1], _shortened(missing))),
        remedy="run it on all nodes; leave mesh_encrypt at %s; or name nodes that cannot take part in mesh_exempt_nodes" % changes[0][0])]


def _exemption_findings(hosts, hostvars, missing):
    """That ``mesh_exempt_cidrs`` would change under strict mode, and the nodes ``missing`` in this run would go by the old ones."""
    def differs(host):
        own = hostvars[host]
        guard, encrypts = own["__mesh_before"].get("guard") or {}, own["__mesh_before"]["encrypts"]
        wanted = {canonical_cidr(cidr) for cidr in (own.get("__mesh_settings") or {}).get("exempt_cidrs") or ()}
        # Where node addresses are not guarded, or will not be, others come before this: see there.
        guarded = guard.get("present") and encrypts == "nodes" == own.get("__mesh_encrypt", encrypts)
        return guarded and wanted != set(guard.get("exempt_cidrs") or ())

    if not missing or not any(map(differs, hosts)):
        return []
    return [dict(
        finding("error", "strict mode is on, and mesh_exempt_cidrs would change without these nodes, and what one side sends the other "
                "would drop: %s" % _shortened(missing)),
        remedy="run it on all nodes; leave mesh_exempt_cidrs as it is; or name nodes that cannot take part in mesh_exempt_nodes")]


def _first_value(hosts, hostvars, variable, usable):
    """The first usable value of a variable that a task set once for all; an empty dict if there is none."""
    values = (hostvars[host].get(variable) or {} for host in hosts)
    return next((value for value in values if usable(value)), {})


def node_list_findings(hosts, hostvars):
    """Why there is no node list: what was wrong with it, or that nobody could be asked."""
    failed = _first_value(hosts, hostvars, "__mesh_computed", lambda value: value.get("failed") or value.get("unreachable"))
    if failed.get("unreachable"):
        return [dict(finding("error", "the host that was asked for the node list could not be reached: %s" % failed.get("msg", "")),
                     remedy="see that it is there, or name another one in mesh_kubectl_host, or another source in mesh_nodes_source")]
    if failed:
        return [finding("error", text) for text in failed.get("problems") or [failed.get("msg") or "the node list cannot be read"]]
    if not any(hostvars[host].get("__mesh_computed") for host in hosts):
        return [dict(finding("error", "there is no node list, and nothing says why"),
                     remedy="see which host failed or could not be reached, and whether kubectl works on mesh_kubectl_host")]
    return []


def node_names(hosts, hostvars):
    """Names of the nodes that hosts of the inventory are, also of those that are not part of this run."""
    return sorted({str(hostvars[host].get("__mesh_name") or hostvars[host].get("mesh_node_name") or host) for host in hosts})


def slice_fault(members, job):
    """Why a job of AWX is to stop: it looks like a slice. An empty text otherwise.

    AWX tells a job neither that it is a slice nor of how many: hosts of the other slices do not exist in it. Outside of AWX a part of an
    inventory is what somebody has chosen, and with a limit all hosts exist.

    :param members: names of nodes that have a key and are no host of the inventory.
    :param job: {"id", "template", "workflow"}: what AWX says about the job, empty texts where it says nothing. All slices of a template
        belong to a workflow job of the template's name.
    """
    if not members or not str((job or {}).get("id") or ""):
        return ""
    surely = job.get("workflow") and job["workflow"] == job.get("template")
    return "job %s of AWX %s: these members of the mesh are no hosts of its inventory: %s" % (
        job["id"], "is a slice of the template %s" % job["template"] if surely else "looks like a slice", _shortened(sorted(members)))


SLICE_REMEDY = (
    "set job_slice_count of the template to 1, as stages of the mesh need all nodes in one run; a node that is in no inventory on purpose "
    "can be named in mesh_exempt_nodes, and one that is gone for good in mesh_forget_nodes")


def slice_findings(missing, exempt, job):
    """That a run is a slice, as a finding. Nodes without a key are in no mesh yet, and told of by `mismatch_findings`."""
    keyed = set(missing.get("not_in_inventory") or []) - set(missing.get("without_key") or []) - set(exempt)
    fault = slice_fault(keyed, job)
    return [dict(finding("error", fault), remedy=SLICE_REMEDY)] if fault else []


def mismatch_findings(missing, first=False, exempt=()):
    """Findings about names: hosts of this run without a Node object would get no peers, nodes without a host stay in clear.

    :param missing: as `peers` returns it.
    :param first: whether this run makes the first mesh document. Then nobody ever had a key, and slices of an inventory would each make a
        mesh of their own, end well, and leave everything between them in clear.
    :param exempt: names of nodes that may stay in clear.
    """
    found, suggestions = [], missing.get("suggestions") or {}
    unknown = sorted(set(missing.get("without_key") or []) - set(exempt)) if first else []
    if unknown:
        found.append(dict(
            finding("error", "%s: not part of this run, and no key of it is known: is this a slice or a part of the inventory? This is the "
                    "first run, and it would leave all traffic with these nodes in clear" % _shortened(unknown)),
            remedy="run it on all nodes first (no --limit, job_slice_count 1; hosts with other names need mesh_node_name), run it together "
                   "with a node that is in the mesh already, or name the nodes in mesh_exclude_nodes"))
    for host in missing.get("hosts_without_node") or []:
        close = ", most likely it is %s" % suggestions[host] if host in suggestions else ""
        found.append(dict(
            finding("error", "host %s: the cluster has no node of this name%s" % (host, close)),
            remedy="set mesh_node_name of this host to the name of its Node object, or leave the host out of the run"))
    for node in sorted(set(missing.get("not_in_inventory") or []) - set(unknown)):
        found.append(dict(
            finding("warning", "node %s: no host of the inventory is this node, so what it sends and gets stays in clear" % node),
            remedy="add it to the inventory, set mesh_node_name of its host, or name it in mesh_exclude_nodes"))
    return found


def probe_method(hosts, hostvars):
    """How tunnels can be proven: ``auto``, or ``handshake`` where a node has no IPv6 at all and can answer no echo."""
    # A rollout looks before it begins, the status when it begins.
    variables = ("__mesh_before", "__mesh_there")
    without = any((hostvars[host].get(variable) or {}).get("ipv6") is False for host in hosts for variable in variables)
    return "handshake" if without else "auto"


def finding(level, text):
    """One finding about the node list; its texts say what to do, behind the last semicolon."""
    message, separator, remedy = str(text).rpartition("; ")
    return {
        "level": level, "check": "node list", "node": "(cluster)", "value": "",
        "message": message if separator else str(text), "remedy": remedy if separator else "see there"}


def membership_lines(computed):
    """What `peers` found out, as lines for people."""
    lines = ["nodes from %s: %s" % (computed["source"], computed["source_reason"])]
    lines.append("mesh document %d: %s" % (computed["serial"], ", ".join(
        "%d %s" % (number, state) for state, number in sorted(computed["counts"].items()) if number) or "no nodes"))
    for title in ("pending", "excluded"):
        lines += ["%s %s: %s" % (title, name, reason) for name, reason in sorted(computed[title].items())]
    return lines + list(computed["changes"])


def _key_ages(infos):
    """{generation: ages in seconds of its keys} of what `mesh_info` told of hosts."""
    ages = {}
    for info in infos:
        for item in info.get("generations") or []:
            if item["key_age"] is not None:
                ages.setdefault(int(item["generation"]), []).append(item["key_age"])
    return ages


def rotation_fault(computed, doing, infos, back=False):
    """Why keys cannot be rotated, or a rotation not be taken back: one line for people, else an empty text. As `target_generation`."""
    if doing != "rotate_keys":
        return ""
    if not computed["key_generations"]:
        return "no node has a key yet, so there is nothing to rotate: run the playbook enable"
    if back and len(_key_ages(infos)) < 2:
        return "mesh_rotate_back: no node has keys of two generations, so there is no rotation to be taken back"
    return ""


def target_generation(computed, doing, infos, back=False):
    """The generation of keys that a run leads to: 0 or 1.

    A mesh with keys of two generations is in the middle of a rotation, and every run goes on where it stopped; `rotate_keys` begins a new
    one only where there is none. ``back`` takes it back, to the generation whose keys are older.

    :param computed: what `peers` returned about the cluster as it is.
    :param doing: name of the playbook.
    :param infos: results of `mesh_info` of the hosts.
    """
    current, there = int(computed["generation"]), list(computed["key_generations"])
    if doing != "rotate_keys":
        return current
    fault = rotation_fault(computed, doing, infos, back)
    if fault:
        raise AnsibleFilterError(fault)
    if back:
        ages = _key_ages(infos)
        return max(ages, key=lambda generation: max(ages[generation]))
    return current if len(there) > 1 else 1 - current


def keys_due(hosts, hostvars, days):
    """One line for people when keys are older than so many days, else an empty text. 0 days is no limit."""
    ages = {host: (hostvars[host].get("__mesh_key") or {}).get("age") for host in hosts}
    old = sorted(host for host, age in ages.items() if int(days) and age is not None and age >= int(days) * 86400)
    if not old:
        return ""
    return "the keys of %d nodes are %d days old or older (mesh_key_max_age): %s; run the playbook rotate_keys" % (
        len(old), int(days), _shortened(old))


def unreached(hosts, hostvars):
    """Nodes that do not reach nodes of the same run through the tunnel: one line of text each.

    Peers that take no part in the run may be away and do not count.
    """
    here, found = {hostvars[host]["__mesh_name"] for host in hosts}, []
    for host in hosts:
        proof = hostvars[host].get("__mesh_proved") or {}
        names = [name for name in proof.get("unproven_names") or [] if name in here]
        if names:
            reasons = [entry["message"] for entry in proof.get("unproven") or [] if entry["name"] in here]
            found.append("%s does not reach through the tunnel, of this run: %s. %s" % (
                hostvars[host]["__mesh_name"], _shortened(names), "; ".join(reasons)))
    return _shortened_lines(found)


def strict_obstacles(computed, hosts, hostvars, exempt):
    """Why strict mode cannot be switched on: nodes that are not part of the run, and pairs that are not proven. Lines of text."""
    names = {hostvars[host]["__mesh_name"] for host in hosts}
    nodes = set(computed["members"]) | set(computed["pending"]) | set(computed["excluded"])
    found = []
    missing = sorted(nodes - names - set(exempt))
    if missing:
        found.append("these nodes of the cluster are not part of this run: %s" % _shortened(missing))
    for host in hosts:
        proof = hostvars[host].get("__mesh_proved_again")
        if not proof:
            found.append("host %s was not switched" % host)
            continue
        # All names; a result has the reasons of the first few only.
        if "unproven_names" not in proof:
            found.append("host %s: nothing was proven: %s" % (host, proof.get("msg") or "it failed"))
            continue
        unproven = sorted(set(proof["unproven_names"]) - set(exempt))
        if unproven:
            found.append("host %s does not reach %s through the mesh" % (host, _shortened(unproven)))
    return found


def settings_faults(hosts, hostvars, variable):
    """What is wrong with the settings and the names of the hosts of a run, which they have in a variable. Lines of text."""
    settings, found = {}, []
    for host in hosts:
        settings[host] = _settings.normalized(plain(hostvars[host][variable]))
        if "port" not in settings[host]:
            continue  # what only takes the mesh away does not care for names
        try:
            check_node_name(plain(hostvars[host]["__mesh_name"]))
        except MeshError as exc:
            found.append("host %s: mesh_node_name: %s; set it to the name of the Node object of this host" % (host, exc))
    return _shortened_lines(found + _settings.settings_faults(settings))


def in_use_conflicts(hosts, hostvars, settings, variable="__mesh_before"):
    """Why settings cannot be what they are set to: the mesh is in use with others. Lines of text.

    A device that drifted is no conflict but is mended: the document has the port that all agreed on, the rule has the mark that counts.

    :param settings: {"interface": stem, "table"} that this run has, and {"port", "fwmark"} that it would set, if it sets them.
    :param variable: where each host has its result of `mesh_info`.
    """
    found = []
    for host in hosts:
        before = hostvars[host].get(variable) or {}
        restored = before.get("restored") or {}
        # Others are devices that somebody made with the module interface alone.
        stems = sorted({name[:-1] for name in restored.get("devices") or [] if name[-1] in "01"})
        if stems and settings["interface"] not in stems:
            found.append(_in_use(host, "mesh_interface", stems[0], settings["interface"]))
        if restored.get("table") not in (None, int(settings["table"])):
            found.append(_in_use(host, "mesh_table", restored["table"], int(settings["table"])))
        found += _port_and_mark_conflicts(host, before, settings) if "port" in settings else []
    # They are the same on all hosts, mostly.
    return _shortened_lines(found)


def _port_and_mark_conflicts(host, before, settings):
    port, mark, found = int(settings["port"]), int(settings["fwmark"]), []
    live = [item for item in before.get("generations") or [] if item.get("listen_port") is not None]
    agreed = ((before.get("document") or {}).get("ports") or {}).get("0")
    other = agreed if agreed is not None else next(
        (item["listen_port"] - int(item["generation"]) for item in live if item["listen_port"]), port)
    if live and int(other) != port:
        found.append(_in_use(host, "mesh_port", int(other), port))
    used = _mark_in_use(before, live)
    if used not in (None, mark):
        found.append(_in_use(host, "mesh_fwmark", used, mark))
    return found


def _mark_in_use(before, live):
    """The mark that outer packets need so that nothing drops or turns them; None where none counts. 0 is no mark, and gets one."""
    if before.get("rule_fwmark") is not None:
        return int(before["rule_fwmark"])
    if not before.get("sending") and not (before.get("guard") or {}).get("present"):
        return None
    return next((int(item["fwmark"]) for item in live if item.get("fwmark")), None)


def _in_use(host, variable, used, wanted):
    return ("host %s: the mesh is in use with %s %s, and this run has %s; it cannot be changed while it is in use: give this run %s=%s, or "
            "run the playbook disable with that first" % (host, variable, used, wanted, variable, used))


def old_generations(infos, target, computed):
    """Generations other than the target of which anything is left, on nodes or in the mesh document."""
    found = set(computed["key_generations"])
    for info in infos:
        found |= {int(item["generation"]) for item in info.get("generations") or []}
    return sorted(found - {int(target)})


def stand_in_key(name):
    """A public key for check mode, where the real one is not made yet: nobody has its private key, and each node has its own."""
    return base64.b64encode(hashlib.sha256(b"kubemesh.wireguard check mode " + str(name).encode("utf-8")).digest()).decode("ascii")


def first_of_each(values):
    """The first host of each distinct value: {host: value} to a list of hosts; empty values count for nothing."""
    first = {}
    for host, value in values.items():
        if value:
            first.setdefault(value, host)
    return sorted(first.values())


def members_outside(paths, names):
    """Members of any of the mesh documents (files on the controller) that have a key and are not among the names."""
    outside = set()
    for path in paths:
        try:
            with open(path, "rb") as handle:
                nodes = load_document(handle.read())["nodes"]
        except (OSError, MeshError) as exc:
            raise AnsibleFilterError("%s, a mesh document fetched from a node, cannot be used: %s" % (path, exc)) from exc
        outside.update(name for name, entry in nodes.items() if entry["public_keys"] and entry["state"] != "excluded")
    return sorted(outside - set(names))


def unknown_variables(names, known):
    """What is wrong with variables that look like ours and are not: a list of messages."""
    messages = []
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        messages.append("%s: there is no such variable%s" % (name, "; did you mean %s?" % close[0] if close else ""))
    return messages


class FilterModule:
    """Filters of the collection."""

    def filters(self):
        return untrusted_results({
            "agent_token_fault": _kube_api.token_fault,
            "batches": batches,
            "batch_problems": batch_problems,
            "probe_method": probe_method,
            "progress": progress,
            "psk_secret_fault": _psk.secret_fault,
            "rotation_fault": rotation_fault,
            "run_summary": run_summary,
            "slice_fault": slice_fault,
            "all_findings": all_findings,
            "settings_faults": settings_faults,
            "silent_nodes": silent_nodes,
            "in_use_conflicts": in_use_conflicts,
            "keys_due": keys_due,
            "membership_lines": membership_lines,
            "mesh_table": mesh_table,
            "first_of_each": first_of_each,
            "members_outside": members_outside,
            "node_names": node_names,
            "old_generations": old_generations,
            "stand_in_key": stand_in_key,
            "strict_obstacles": strict_obstacles,
            "target_generation": target_generation,
            "unreached": unreached,
            "unknown_variables": unknown_variables,
        })
