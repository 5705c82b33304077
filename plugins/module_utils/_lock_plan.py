# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""One run at a time: what a lock file says, what a run may do about it, and whether a run that asked on many nodes goes on.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer.

There is one lock per node and no lock of the whole cluster: two runs are in each other's way only where they change the same node. A run
takes its nodes in two phases. It *claims* all of them; when every one is its own it *holds* all of them, and works. Why two runs cannot
block each other for ever, whatever nodes they share and in whatever order they ask:

* a node has one claim or lock at a time, and nobody takes it from a run that lives;
* runs have a total order, (time of start on the controller, run id). Of two that claim, the one that comes later in it gives all its
  nodes back, and only the other one asks again. So a run waits only for later ones, and those do not wait for it;
* a run that holds does not give way to one that claims: it has all its nodes and goes on to its end. Whoever meets it gives way.

Of those that meet, the first in the order therefore goes, unless one that it met already holds.

A lock ends when it was not renewed for its lease, by the clock of the node that counts from its boot: neither the controller's clock nor
somebody who sets the node's has a say. A lock of an earlier boot does not count. A run whose lock was taken over learns of it: the node
remembers the last few such runs, and answers no to them.

A *holder* is ``{"run", "who", "doing", "started", "phase", "controller", "since", "renewed", "lease"}``, times in seconds since the boot
of the node, ``started`` in seconds of the controller's clock.
"""

from __future__ import annotations

import json
import re

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, shown, some_of

SCHEMA = 1
PHASES = ("claimed", "held")

# A run id is compared and printed, never executed; what uuidgen, AWX and hashes make fits.
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{3,127}")
TEXT_MAX = 200  # characters of who, doing and the like: they go into one sentence
LEASE_DEFAULT = 900  # seconds, as of the module
LEASE_MIN, LEASE_MAX = 10, 86400  # seconds; less is no lock, more would outlive every reason to have one
# Runs that a node remembers to have lost their lock. One that lost it asks again within a lease; more than a few at once means that leases
# are far too short.
REVOKED_MAX = 16
# Seconds that a time in a lock file may be ahead of the clock that wrote it: it is read after it was written, so only rounding.
AHEAD_MAX = 1.0
HOSTS_SHOWN = 5

# What is known of the process that a run is on the controller, see ``plugin_utils/_controller.py``.
CONTROLLER_TEXTS = ("host", "boot_id", "namespaces")
CONTROLLER_NUMBERS = ("pid", "started_ticks")


# --- what is asked -------------------------------------------------------------------------------------------------------------------

def check_run(run):
    """The run id itself if it is one; else `MeshError`."""
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise MeshError("run: %s is no id of a run: expected 4 to 128 letters, digits and . _ : @ -, different for every run" % shown(run))
    return run


def _check_text(name, value):
    # One line that can be printed: it comes from the controller's environment and ends up in other people's messages.
    if not isinstance(value, str) or len(value) > TEXT_MAX or not value.isprintable():
        raise MeshError("%s: %s is not a line of at most %d characters" % (name, shown(value), TEXT_MAX))
    return value


def _check_number(name, value, low, high):
    # what is no number at all (NaN) is not between two others
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise MeshError("%s: %s is not a number from %s to %s" % (name, shown(value), low, high))
    return value


def check_controller(value):
    """The identity of a controller's process, canonical; None stays None."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise MeshError("controller: %s is no identity of a process" % shown(value))
    result = {name: _check_text("controller, " + name, value.get(name) or "") for name in CONTROLLER_TEXTS}
    result.update({name: int(_check_number("controller, " + name, value.get(name) or 0, 0, 2 ** 63)) for name in CONTROLLER_NUMBERS})
    return result


def check_request(params):
    """What a module's arguments ask for: ``{"state", "run", "who", "doing", "started", "controller", "lease", "take_over"}``."""
    if params.get("started") is None and params["state"] != "absent":
        raise MeshError("started: when the run began is needed, in seconds since the epoch, the same on all nodes")
    return {
        "state": params["state"],
        "run": check_run(params["run"]),
        "who": _check_text("who", params.get("who") or "") or "somebody",
        "doing": _check_text("doing", params.get("doing") or "") or "a playbook of kubemesh.wireguard",
        "started": float(_check_number("started", params.get("started") or 0.0, 0, 2 ** 53)),
        "controller": check_controller(params.get("controller")),
        "lease": _check_number("lease", params["lease"], LEASE_MIN, LEASE_MAX),
        "take_over": check_run(params["take_over"]) if params.get("take_over") else None,
    }


# --- the lock file -------------------------------------------------------------------------------------------------------------------

def render(holder, revoked, boot_id):
    """The text of a lock file; None where none is needed."""
    if holder is None and not revoked:
        return None
    return json.dumps({"schema": SCHEMA, "boot_id": boot_id, "holder": holder, "revoked": revoked}, sort_keys=True, indent=1) + "\n"


def _holder_of(value):
    holder = check_request(dict(value, state=value["phase"], take_over=None))
    if holder["state"] not in PHASES:
        raise MeshError("phase: %s" % shown(holder["state"]))
    return {
        "run": holder["run"], "who": holder["who"], "doing": holder["doing"], "started": holder["started"], "phase": holder["state"],
        "controller": holder["controller"], "lease": holder["lease"],
        "since": float(_check_number("since", value["since"], 0, 2 ** 53)),
        "renewed": float(_check_number("renewed", value["renewed"], 0, 2 ** 53)),
    }


def parse(text, clock):
    """``(holder or None, [runs that lost their lock], what is wrong with the file or "")``.

    ``clock``: ``{"boot_id", "seconds"}`` of the node now. A file of an earlier boot is as good as none.
    """
    if text is None:
        return None, [], ""
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise MeshError("schema %s is not %d" % (shown(content["schema"]), SCHEMA))
        if _check_text("boot_id", content["boot_id"]) != clock["boot_id"]:
            return None, [], ""
        revoked = [check_run(run) for run in content["revoked"]][:REVOKED_MAX]
        holder = _holder_of(content["holder"]) if content["holder"] is not None else None
        if holder and holder["renewed"] > clock["seconds"] + AHEAD_MAX:
            raise MeshError("its times are ahead of this node's clock")
    except MeshError as exc:
        return None, [], str(exc)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        return None, [], "%s: %s" % (type(exc).__name__, shown(str(exc)))
    return holder, revoked, ""


def left_of(holder, clock):
    """Seconds until a lock ends; 0 or less: it has ended."""
    return holder["lease"] - (clock["seconds"] - holder["renewed"])


# --- one node ------------------------------------------------------------------------------------------------------------------------

def decide(text, age, request, clock):
    """What becomes of a lock file: ``(text to be written, or None for no file, result)``.

    ``text``: what is there, None for no file; ``age``: seconds since it was written, for one that cannot be understood; ``request``: of
    `check_request`; ``clock``: of the node. The text to be written is that of the file where nothing is to be done.
    """
    holder, revoked, damage = parse(text, clock)
    if damage and (request["state"] == "absent" or age < request["lease"]):
        # It may be the lock of a run that lives; one that lives renews it.
        return text, _result(request, None, clock, damaged=damage, wait=request["lease"] - age)
    own = holder is not None and holder["run"] == request["run"]
    if request["state"] == "absent":
        if own or request["run"] in revoked:
            # a run that says goodbye need not be remembered any more
            text = render(None if own else holder, [run for run in revoked if run != request["run"]], clock["boot_id"])
        left = holder if holder and not own and left_of(holder, clock) > 0 else None
        return text, _result(request, left, clock, released=own)
    if request["run"] in revoked:
        return text, _result(request, holder, clock, revoked=True)
    taken_over = None
    if holder is not None and not own:
        if left_of(holder, clock) <= 0:
            taken_over = dict(public(holder), reason="expired")
            revoked = ([holder["run"]] + revoked)[:REVOKED_MAX]
        elif holder["run"] == request["take_over"]:
            # it never asks again: nothing to be remembered, and so nothing to be left behind
            taken_over = dict(public(holder), reason="dead")
        else:
            return text, _result(request, holder, clock)
    after = {name: request[name] for name in ("run", "who", "doing", "started", "controller", "lease")}
    after.update(
        # a run that holds is not set back by one that asks again for its claim
        phase="held" if own and holder["phase"] == "held" else request["state"],
        since=holder["since"] if own else clock["seconds"], renewed=clock["seconds"])
    result = _result(request, after, clock, acquired=True, renewed=own, taken_over=taken_over, damaged=damage)
    return render(after, revoked, clock["boot_id"]), result


def public(holder):
    """What others are told about a holder."""
    return {name: holder[name] for name in ("run", "who", "doing", "started", "phase", "controller", "lease")}


def _result(request, holder, clock, acquired=False, renewed=False, released=False, revoked=False, taken_over=None, damaged="", wait=0):
    """What the module returns about one node."""
    result = {
        "state": request["state"], "run": request["run"], "acquired": acquired, "renewed": renewed, "released": released,
        "revoked": revoked, "taken_over": taken_over, "damaged": damaged,
        "holder": public(holder) if holder else None,
        "holder_age_seconds": round(clock["seconds"] - holder["since"], 1) if holder else None,
        "expires_in_seconds": round(max(0.0, left_of(holder, clock)), 1) if holder else None,
    }
    result["message"] = _message(request, result, wait)
    return result


# --- for people ----------------------------------------------------------------------------------------------------------------------

REMEDY = "wait for it to end or, if you know that it is dead, remove %s on its nodes"


def duration(seconds):
    """``4 min 10 s``; at most two units."""
    seconds = max(0, round(seconds))
    units = [(seconds // 3600, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return " ".join("%d %s" % unit for place, unit in enumerate(units[:2]) if unit[0] or place == 0)


def describe(result):
    """Who has the lock of a result, what that run does, since when, from where, and when its lock ends."""
    holder = result["holder"]
    controller = holder["controller"] or {}
    where = ", process %d on %s" % (controller["pid"], controller["host"]) if controller.get("host") and controller.get("pid") else ""
    what = "%s has been running %s for %s" if holder["phase"] == "held" else "%s asked to run %s %s ago"
    return "%s (run %s%s); its lock ends in %s unless that run renews it" % (
        what % (holder["who"], holder["doing"], duration(result["holder_age_seconds"])), holder["run"], where,
        duration(result["expires_in_seconds"]))


def _message(request, result, wait):
    taken = result["taken_over"]
    if result["damaged"] and not result["acquired"]:
        if request["state"] == "absent":
            return "the lock file cannot be understood (%s) and is left alone" % result["damaged"]
        return ("the lock file of this node cannot be understood (%s); it may belong to a run that lives, so it counts for another %s; "
                "look whether another run is at work, then remove the file" % (result["damaged"], duration(wait)))
    if result["revoked"]:
        who = "; now " + describe(result) if result["holder"] else ""
        return ("the lock of this run ended because it was not renewed in time, and another run took it over%s; stop, look at what the "
                "other run did, and run again, with a longer lease" % who)
    if result["acquired"]:
        what = "the lock is %s" % ("renewed" if result["renewed"] else "this run's")
        if taken:
            what += ", taken over from %s, who was running %s (run %s): %s" % (
                taken["who"], taken["doing"], taken["run"],
                "its lock had ended" if taken["reason"] == "expired" else "that run is dead")
        elif result["damaged"]:
            what += "; a lock file that could not be understood (%s) was old enough to be replaced" % result["damaged"]
        elif request["state"] == "held" and not result["renewed"]:
            what += "; it was gone, as after a reboot of the node, and was taken anew"
        return what
    if request["state"] == "absent":
        if result["released"]:
            return "the lock is released"
        return "this run has no lock here%s" % ("; " + describe(result) if result["holder"] else "")
    return "another run changes this node: %s" % describe(result)


# --- all nodes -----------------------------------------------------------------------------------------------------------------------

def verdict(results, run, started, path="/run/kubemesh/lock.json"):
    """Whether a run goes on after it asked for the locks of its nodes: ``{"verdict", "message", "holders", "wait_on"}``.

    ``results``: ``{host: what the module returned}`` of one round; a host without result (None, or empty) was not reached and does not
    count. ``go``: all locks are this run's. ``retry``: another run gives way, ask again. ``yield``: give back what was taken, and stop or
    wait for the first of ``holders`` on the host ``wait_on``, which is empty where it is of no use to wait.
    """
    check_run(run)
    own = (float(started), run)
    results = {host: result for host, result in results.items() if result and not result.get("unreachable")}
    broken = sorted(host for host, result in results.items() if not _sound(result, run))
    if broken:
        said = results[broken[0]].get("msg") or "there is no answer of the module lock"
        return _verdict("yield", "the lock of %s cannot be taken: %s" % (_hosts(broken), shown_text(said)), [])
    if not results:
        return _verdict("yield", "no node was asked for its lock, or none could be reached", [])
    met = _met(results, run)
    holders = [_holder_entry(found) for found in met]
    if all(result.get("check_mode") for result in results.values()):
        # A look takes no lock and needs none; but what it sees may be half of somebody's work.
        text = "; ".join(entry["message"] for entry in holders)
        return _verdict("go", "another run is at work, so what is shown here may change: %s" % text if text else "no other run is at work",
                        holders)
    lost = {host: result for host, result in results.items() if not result["acquired"] and (result.get("revoked") or result.get("damaged"))}
    if lost:
        host = sorted(lost)[0]
        return _verdict("yield", "%s: %s" % (_hosts(sorted(lost)), lost[host]["message"]), holders)
    if not met:
        return _verdict("go", "the locks of %d nodes are this run's" % len(results), [])
    # Who holds all its nodes works, and does not give way; who only claims gives way to who came first, and to who holds already.
    holding = any(result["acquired"] and result["state"] == "held" for result in results.values())
    stronger = [found for found in met if found["phase"] == "held" or not (holding or own < found["order"])]
    text = "; ".join("%s (on %s)" % (_holder_entry(found)["message"], _hosts(found["hosts"])) for found in stronger or met)
    if stronger:
        weaker = [found for found in met if found not in stronger]
        return _verdict("yield", "another run changes the mesh: %s; %s" % (text, REMEDY % path),
                        [_holder_entry(found) for found in stronger + weaker], wait_on=stronger[0]["hosts"][0])
    return _verdict("retry", "another run asked at the same time and gives way: %s" % text, holders)


def _sound(result, run):
    """Whether a result says that the lock is this run's, or why it is not."""
    if result.get("failed") or not isinstance(result.get("acquired"), bool):
        return False
    holder = result.get("holder")
    if result["acquired"] or result.get("revoked") or result.get("damaged"):
        return True
    return isinstance(holder, dict) and holder.get("run") not in (None, run) and holder.get("phase") in PHASES


def _verdict(what, message, holders, wait_on=""):
    return {"verdict": what, "message": message, "holders": holders, "wait_on": wait_on}


def shown_text(text, limit=500):
    """Text from a node in one line."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def _met(results, run):
    """The other runs that were met, in their order: ``{"run", "order", "phase", "hosts", "result"}``."""
    met = {}
    for host in sorted(results):
        result = results[host]
        holder = result.get("holder")
        if result["acquired"] or not holder or holder["run"] == run:
            continue
        found = met.setdefault(holder["run"], {
            "run": holder["run"], "order": (float(holder["started"]), holder["run"]), "phase": "claimed", "hosts": [], "result": result})
        found["hosts"].append(host)
        if holder["phase"] == "held" and found["phase"] != "held":
            found.update(phase="held", result=result)
    return sorted(met.values(), key=lambda found: found["order"])


def _holder_entry(found):
    result = found["result"]
    return {
        "run": found["run"], "who": result["holder"]["who"], "doing": result["holder"]["doing"], "phase": found["phase"],
        "hosts": found["hosts"][:HOSTS_SHOWN], "host_count": len(found["hosts"]),
        "expires_in_seconds": result["expires_in_seconds"], "message": describe(result),
    }


def _hosts(hosts):
    return some_of(hosts, HOSTS_SHOWN)
