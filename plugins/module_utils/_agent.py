# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""The node agent: follows the list of Nodes and keeps the mesh of this node up to it. `_agent_plan` decides, this file does.

Three threads. The `Follower` reads the API; a prover asks new peers through the tunnel; the main thread alone changes anything. They talk
through one queue. Whenever this program ends, also by SIGKILL, what is in the kernel is a working state, because every prefix of its plans
is one; and it goes on working without it.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from ansible_collections.kubemesh.wireguard.plugins.module_utils import (
    _agent_drift,
    _agent_pods,
    _link_plan,
    _lock,
    _membership,
    _mesh,
    _pods,
    _probe,
    _published_keys,
    _routes_plan,
    _status,
    _wg_plan,
)
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _agent_plan as decide
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _interface as live_device
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes as live_routes
from ansible_collections.kubemesh.wireguard.plugins.module_utils._agent_guard import OFF, GuardKeeper, TableWatcher
from ansible_collections.kubemesh.wireguard.plugins.module_utils._kube_api import Follower, KubeClient
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import System, read_document, read_text, write_text
from ansible_collections.kubemesh.wireguard.plugins.module_utils._wg import client_for

NODES = "/api/v1/nodes"
# Seconds between looks at the mesh document, for a run that wrote a new one.
BASE_INTERVAL = 2.0
# Seconds between two writings of state and metrics, where nothing happens; node_exporter is read every 15 to 60.
REPORT_INTERVAL = 15.0
# Seconds until what happened is told: it reads the whole kernel, which must not keep the next news waiting. Changes come in a row.
REPORT_SOON = 0.5
# After a report there is none for so many times of the processor time that it took, but for no more than these seconds: with 5,000 peers
# one takes about a second, and changes may come all the time.
REPORT_REST = 20
REPORT_REST_LONGEST = 60.0
# Seconds until work is tried again that failed, or that a run of a playbook was in the way of.
RETRY = (1.0, 2.0, 5.0, 10.0, 30.0)
# Seconds that new peers have to answer. A silent one must not keep those waiting that came after it.
PROVE_SECONDS = 3.0
# Seconds that one side of a pair waits for the first handshake of the other, see `_probe.LATE_SECONDS`: agents hear of a node at the same
# moment, and compute at most `_agent_plan.SETTLE_LONGEST` (0.2 s) later.
LATE_SECONDS = 0.25
# Seconds after the start for which peers without a proof are waited for before pods are started: after a reboot those are the ones that
# joined since the last run. One that is down must not keep the node from its work.
READY_SECONDS = 5.0
# Rounds without an answer after which a fresh handshake and received bytes are enough: a firewall of the peer may drop what knocks. By then
# an idle peer has sent a keepalive (10 s, KEEPALIVE_TIMEOUT, whitepaper, section 6.5).
ROUNDS_OF_KNOCKING = 4
# Seconds until the node's own key is offered to the same Node again: after it was refused, or where somebody writes another one.
PUBLISH_AGAIN = 600.0
# How many times as long as it took the next computation waits: of a cluster with very many pods the agent takes a fifth of a processor.
REST = 4.0
# Seconds until a node that could not be taken out of the document is tried again.
GONE_AGAIN = 5.0
# Seconds for one command of iproute2 or nft. A turn with the lock runs several, and a run waits for it no longer than `_lock.WAIT_SECONDS`.
COMMAND_SECONDS = 20
STATE_MODE = 0o644
MEMORY = "memory.json"
GUARD_OPTION = "--guard"
EXIT_SECOND_AGENT = 3


def log(text):
    """One line for the journal, which adds time and unit."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def processor_seconds():
    """Processor time of this program and of the commands that it ran. By the clock, a report on a busy node would seem to take long."""
    return sum(os.times()[:4])


class Host:
    """What `System` uses of an AnsibleModule: commands and warnings of this node."""

    def get_bin_path(self, name, opt_dirs=()):
        return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath)] + list(opt_dirs)))

    def run_command(self, argv, data=None, environ_update=None):
        try:
            # There is no AnsibleModule in a service. pylint: disable-next=ansible-bad-function
            done = subprocess.run(argv, input=data, stdin=subprocess.DEVNULL if data is None else None, capture_output=True,
                                  env=dict(os.environ, **(environ_update or {})), timeout=COMMAND_SECONDS,
                                  check=False, encoding="utf-8", errors="replace")
        except (OSError, subprocess.TimeoutExpired) as exc:
            return 126, "", str(exc)
        return done.returncode, done.stdout, done.stderr

    def warn(self, text):
        log("warning: " + text)


class Notifier:
    """systemd's notification socket, where there is one."""

    def __init__(self, environ):
        self.address = environ.get("NOTIFY_SOCKET", "")
        # twice in the time that systemd waits
        self.interval = int(environ.get("WATCHDOG_USEC") or 0) / 2e6

    def tell(self, text):
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
                handle.sendto(text.encode("utf-8"), address)
        except OSError as exc:
            log("systemd is not told: %s" % exc)


class Kernel:
    """Reads and changes the mesh of this node."""

    def __init__(self, config):
        self.config = config
        self.system = System(Host())
        # (generation, link, state of the device, routes and rules) as they were read, or left
        self.last = None
        self.things = (None, frozenset())  # (of which `last`, what can be missing of it)

    def name(self, generation):
        return "%s%d" % (self.config["interface"], generation)

    def read(self, generation):
        """``(link, state of the device)`` of a generation; None, None where there is none."""
        return live_device.read(self.system, self.name(generation))

    def routes(self):
        return live_routes.read_state(self.system, self.config["table"])

    def look(self, generation, whole):
        """``(link, state of the device, routes and rules)``.

        Unless the ``whole`` is wanted, they are as the last change left them: reading takes most of the time that a change takes.
        """
        if whole or self.last is None or self.last[0] != generation:
            link, state = self.read(generation)
            self.last = (generation, link, state, self.routes())
        return self.last[1:]

    def misses(self, found):
        """Whether something of `_agent_drift.taken_away` was to stay."""
        if self.things[0] is not self.last:
            self.things = (self.last, _agent_drift.things(self.last))
        return not self.things[1].isdisjoint(found)

    def sends_all(self):
        """Whether the rules of this node, as a run left them, steer packets whatever their source."""
        return not any(rule["iif"] for rule in live_routes.stored_rules(self.config["boot_folder"]))

    def converge(self, document, applied, proven, own_cidrs=None, trial=None, tried=frozenset()):
        """Bring the kernel to a document, from what `look` returned last; -> ``(steps in the order they were done, device after them)``.

        ``own_cidrs``: the prefixes that this node sends from, None for all of its own; ``trial``, ``tried``: of `_agent_plan.plan_device`.
        """
        generation, link, state, current = self.last
        # Until all steps are done nobody knows what is there.
        self.last = None
        config, node = self.config, self.config["node"]
        name = state["name"]
        link_steps, first, last = decide.plan_device(state, link, document, applied, config, live_device.has_ipv6(), trial, tried)
        if any(step["op"] == "create_link" for step in link_steps):
            raise MeshError("device %s is missing: run the playbook enable on this node" % name)
        settings = dict(decide.route_settings(config, name, live_routes.stored_rules(config["boot_folder"])), own_cidrs=own_cidrs)
        present = decide.routed_now(current["routes"], applied, document, node, config["table"], state)
        wanted = _routes_plan.wanted_state(document, node, settings, proven, present)
        early = decide.early_removals(current, wanted, decide.moved_prefixes(state, first))
        between = current
        for step in early:
            between = _routes_plan.apply_to_state(between, step)
        steps = _routes_plan.plan_routes(between, wanted)
        if early:
            live_routes.apply_live(self.system, current, between, early)
        for step in link_steps:
            if step["op"] == "set_addrgenmode":
                self.system.run(["ip", "link", "set", "dev", name, "addrgenmode", "none"])
            else:
                live_device.apply_link_step(self.system, name, step)
        client = client_for(name, run_command=self.system.module.run_command) if first or last else None
        if first:
            client.apply(name, first)
        if steps:
            live_routes.apply_live(self.system, between, wanted, steps)
        if last:
            client.apply(name, last)
        link = dict(link, up=True, mtu=next((step["mtu"] for step in link_steps if step["op"] == "set_mtu"), link["mtu"]),
                    addrgenmode="none" if live_device.has_ipv6() else link["addrgenmode"], addresses=_addresses_after(link, link_steps))
        state = _wg_plan.apply_steps(state, first + last)
        self.last = (generation, link, state, wanted)
        return early + link_steps + first + steps + last, state

    def withdraw(self):
        """Take back what makes this node send, from what `look` returned last: rules, then routes; -> steps. What it accepts stays."""
        generation, link, state, current = self.last
        wanted = {"routes": [], "rules": []}
        steps = _routes_plan.plan_routes(current, wanted)
        if steps:
            self.last = None
            live_routes.apply_live(self.system, current, wanted, steps)
            self.last = (generation, link, state, wanted)
        return steps

    def prove(self, document, names, before):
        """Ask peers through the tunnel: ``{name: entry of `_probe.judge`}``. ``before``: {public key: peer of a device state} of earlier
        rounds, for peers that answer nothing but handshakes."""
        node, generation = self.config["node"], str(document["generation"])
        interface = self.name(document["generation"])
        peers, dummy = _probe.plan_peers(document, node, generation, names)
        device = _probe.device(interface)
        if device is None or not peers:
            return {}
        client = client_for(interface, run_command=self.system.module.run_command)
        state = client.read(interface)
        for peer in peers.values():
            if peer["public_key"] in state["peers"]:
                before.setdefault(peer["public_key"], state["peers"][peer["public_key"]])
        start = time.monotonic()
        deadline = start + PROVE_SECONDS
        if not _probe.has_ipv6(interface):
            dummy, after = _probe.run_handshakes(interface, peers, lambda: client.read(interface), deadline)
            return _probe.judge_all(peers, {"peers": before}, after, None, time.time(), {})
        own = document["nodes"][node]
        sizes = {name: _probe.full_size(device["mtu"], peer["mtu"]) for name, peer in peers.items()}
        addresses = {name: socket.inet_pton(socket.AF_INET6, peer["address"]) for name, peer in peers.items()}

        def late(state):
            return {name for name, peer in peers.items()
                    if _probe.is_late(own["public_keys"][generation], peer["public_key"], state, time.time())}

        waiting = late(state)
        schedule = _probe.EchoSchedule([
            {"name": name, "address": addresses[name], "size": sizes[name], "late": name in waiting} for name in sorted(peers)
        ], start, random.Random(), LATE_SECONDS)  # noqa: S311 - spreads packets, protects nothing
        try:
            _probe.run_knock(own["probe_addresses"][generation], device["index"], schedule, deadline,
                             lambda: [addresses[name] for name in waiting - late(client.read(interface))])
        except OSError as exc:
            raise MeshError("peers cannot be asked through %s: %s" % (interface, exc.strerror)) from None
        after = client.read(interface)
        answers = schedule.results()
        entries = _probe.judge_all(peers, {"peers": before}, after, answers, time.time(), sizes)
        for name, entry in entries.items():
            if entry["reason"] == "no_echo":
                # judged again when the rounds of knocking are over
                entry["handshake_only"] = _probe.judge(
                    peers[name], before.get(peers[name]["public_key"]), after["peers"].get(peers[name]["public_key"]), None, time.time(),
                    None)["proven"]
        return entries


def _addresses_after(link, steps):
    """Addresses of a link after steps of `_link_plan`."""
    removed = {step["address"] for step in steps if step["op"] == "remove_address"}
    added = {step["address"] for step in steps if step["op"] == "add_address"}
    return sorted((set(link["addresses"]) | added) - removed)


class Agent:
    """The main thread's work."""

    def __init__(self, config, kernel=None, client=None, clock=time.monotonic, environ=None):
        self.config, self.clock = config, clock
        self.boot_id = _lock.node_clock()["boot_id"]
        self.kernel = kernel or Kernel(config)
        self.client = client or KubeClient(config["server"], config["ca_file"], config["token_file"])
        self.notifier = Notifier(os.environ if environ is None else environ)
        # Its put may be called from a signal handler, a Queue's may not.
        self.queue = queue.SimpleQueue()
        self.follower = Follower(self.client, NODES, "NodeList", decide.reduced, lambda what, value: self.queue.put((what, value)),
                                 lambda listing: decide.distrust(listing, config["node"]))
        source = config["pod_source"]
        self.pods = None if source == _pods.NODE_CIDRS else _agent_pods.PodRoster(source)
        self.pod_followers = {resource.kind: self.pod_follower(resource) for resource in _pods.RESOURCES[source]}
        self.followers = [self.follower] + list(self.pod_followers.values())
        self.sending = None       # of `_agent_pods.next_sending`; None where the rules of the kernel are to be read first
        self.stopping = False
        self.roster = decide.empty_roster()
        self.api = "not reached yet"
        self.base_stat = self.base_sha256 = self.base = None
        self.document = self.applied = self.remembered = None
        self.blind = False        # started without what it knew: what it holds may be behind the kernel
        self.news = None          # (first, last): when news came that are not computed yet
        self.lag_since = None     # when the first news came that are not in the kernel yet
        self.lag = None
        self.due = {"base": 0.0, "report": 0.0, "watchdog": 0.0, "gone": 0.0, "compare": 0.0, "rest": 0.0, "send": None, "save": 0.0}
        self.rested = 0.0         # when the next report may be made
        self.failures = 0
        self.texts, self.trouble, self.waits = [], "", ""
        self.proved = {}          # {name: public key} that was reached
        self.fresh_keys = set()   # keys of peers that were added since: what a run proved before says nothing about them
        self.asked = {}           # {public key: (name, rounds, when to ask again)}
        self.trial = None         # (document of `_agent_plan.with_keys`, {name: public key}) that are tried
        self.tried = set()        # keys of them that the device may have
        self.proven_keys = set()  # keys of them with which their nodes were reached
        self.before = {}
        self.proving = False
        self.published = None
        self.counts = {"events": 0, "changes": 0, "repairs": 0, "lists": 0}
        self.unproven = set()
        self.unsaved = False
        self.file_errors = set()  # paths of files that cannot be read or written, which was told
        self.guard = GuardKeeper(System(Host()), config)
        self.watcher = None       # of the guard's table, where there is a guard
        self.guard_whole = False  # whether the next comparison reads the guard first
        self.whole = True         # whether the next comparison reads the kernel first
        self.expected = True      # whether the next comparison is to find something to do
        self.looks = collections.deque(maxlen=_agent_drift.LOOKS)  # when was looked for what somebody took away

    def pod_follower(self, resource):
        """The thread that follows one of the resources that the pods' addresses come from."""
        return Follower(
            self.client, resource.path, resource.kind + "List", _agent_pods.reducer(resource.kind),
            lambda what, value: self.queue.put(("pods", (resource.kind, what, value))),
            lambda listing: _agent_pods.distrust(resource, listing), key_of=_agent_pods.key_of, selector=resource.selector,
            page_size=_agent_pods.PAGE_SIZE, most=_agent_pods.OBJECTS_MAX)

    # --- the loop

    def run(self):
        """Work until `stop`; -> the exit code. A thread that ended by a fault of ours ends all: systemd starts the agent again."""
        self.load_base()
        self.due["converge"] = self.clock()
        for follower in self.followers:
            follower.start()
        _agent_drift.DriftWatcher(
            _link_plan.generations_of(self.kernel.name(0)), (self.config["table"], self.config["table"] + 1),
            lambda found: self.queue.put(("drift", found)), log).start()
        latest = self.clock() + READY_SECONDS  # None: systemd knows
        while not self.stopping:
            self.tick()
            if latest is not None and (not (self.unproven or self.blind) or self.clock() >= latest):
                self.notifier.tell("READY=1")
                latest = None
            pause = self.pause()
            self.receive(pause if latest is None else min(pause, max(0.0, latest - self.clock())))
            if not all(follower.is_alive() for follower in self.followers):
                log("the thread that follows the API has ended: ending as well, to be started again")
                return 1
        self.notifier.tell("STOPPING=1")
        for follower in self.followers:
            follower.stop()
        return 0

    def stop(self, *dummy):
        self.stopping = True
        self.queue.put(("stop", None))

    def pause(self):
        """Seconds until something is due."""
        times = [when for what, when in self.due.items() if what not in ("gone", "compare", "rest", "send", "save")]
        if self.news:
            times.append(self.settled())
        grace = self.config["grace"]
        gone = [decide.next_gone(self.roster, grace), decide.own_forgotten_at(self.remembered, self.roster, grace)]
        if self.pods is not None:
            gone.append(self.pods.next_gone(self.config["grace"]))
        times += [max(when, self.due["gone"]) for when in gone if when is not None]
        if not self.proving:
            times += [again for dummy, dummy2, again in self.asked.values()]
        return max(0.0, min(times) - self.clock())

    def receive(self, seconds):
        """Wait for messages, and take all that are there."""
        try:
            message = self.queue.get(timeout=seconds)
            while True:
                getattr(self, "on_" + message[0])(message[1])
                message = self.queue.get_nowait()
        except queue.Empty:
            return

    def settled(self):
        """When the news are computed: they settled, and the last work, where pods make much of it, is a small part of the time."""
        return max(decide.settle_at(*self.news), self.due["rest"])

    def tick(self):
        """Do what is due."""
        now = self.clock()
        if now >= self.due["base"]:
            self.due["base"] = now + BASE_INTERVAL
            self.load_base()
        computed = False
        forgotten_at = decide.own_forgotten_at(self.remembered, self.roster, self.config["grace"])
        over = now >= self.due["gone"] and (decide.gone(self.roster, self.config["grace"], now)
                                            or (forgotten_at is not None and now >= forgotten_at))
        self.doubt(now)
        if self.pods is not None and now >= self.due["gone"]:
            over = self.pods.forget(self.config["grace"], now) or over
        if over or (self.news and now >= self.settled()):
            self.compute(now)
            computed = True
        if now >= self.due["converge"]:
            self.converge(now)
        if computed and self.pods is not None:
            end = self.clock()
            self.due["rest"] = end + REST * (end - now)
        self.prove(self.clock())
        if self.unsaved and self.document is not None and now >= self.due["save"]:
            self.save_memory()
            self.due["save"] = now + (BASE_INTERVAL if self.unsaved or self.pods is not None else 0.0)
        if now >= self.due["report"]:
            used = processor_seconds()
            self.report()
            ended = self.clock()
            self.rested = ended + min(REPORT_REST_LONGEST, REPORT_REST * (processor_seconds() - used))
            self.due["report"] = max(ended + REPORT_INTERVAL, self.rested)
        if now >= self.due["watchdog"]:
            self.due["watchdog"] = now + (self.notifier.interval or BASE_INTERVAL * 10)
            self.notifier.tell("WATCHDOG=1")

    def tell_soon(self):
        """Something happened that `status` and metrics are to show."""
        self.due["report"] = min(self.due["report"], max(self.clock() + REPORT_SOON, self.rested))

    # --- messages

    def on_stop(self, dummy):
        pass

    def on_listed(self, listing):
        self.counts["lists"] += 1
        self.roster, changed = decide.listed(self.roster, listing)
        if changed or self.remembered is None:
            self.has_news()
        self.on_back(None)

    def on_event(self, event):
        self.counts["events"] += 1
        self.roster, changed = decide.happened(self.roster, *event)
        if changed:
            self.has_news()
            self.roster = self.missing()

    def on_away(self, text):
        if self.api != text:
            log("the API: %s" % text)
        self.api = text
        self.roster = decide.lost(self.roster)
        self.tell_soon()

    def on_back(self, dummy):
        """A watch goes on where the last one, or the list, ended: what is known is complete."""
        if self.api != decide.WATCHING:
            log("the API: watching")
            self.tell_soon()
        self.api = decide.WATCHING
        self.roster = dict(self.roster, complete=True)
        self.roster = self.missing()

    def on_pods(self, message):
        """News of the pods' addresses."""
        kind, what, value = message
        if what == "listed":
            self.counts["lists"] += 1
            changed = self.pods.listed(kind, value, self.clock())
        elif what == "event":
            self.counts["events"] += 1
            changed = self.pods.happened(kind, *value)
        else:
            text = value if what == "away" else ""
            changed = False
            if text != self.pods.away[kind]:
                log("the API: %s" % (text or "watching %s" % kind))
                self.due["report"] = self.clock()
            self.pods.heard(kind, text, self.clock())
        if changed:
            self.has_news()

    def on_proved(self, result):
        self.proving = False
        entries, error = result
        now = self.clock()
        fresh = False
        for key, (name, rounds, dummy) in list(self.asked.items()):
            entry = entries.get(key)
            if entry is None and key not in error:
                continue
            if not entry or not (entry["proven"] or (entry.get("handshake_only") and rounds >= ROUNDS_OF_KNOCKING)):
                self.asked[key] = (name, rounds, now + decide.prove_again(rounds))
                continue
            self.asked.pop(key)
            self.before.pop(key, None)
            self.fresh_keys.discard(key)
            if self.trial is not None and self.trial[1].get(name) == key:
                self.proven_keys.add(key)
                self.has_news()
            else:
                self.proved[name] = key
                fresh = True
        if fresh:
            self.save_proofs()
            self.expected = True
            self.due["converge"] = now

    def on_published(self, text):
        if text:
            log("the node's public key is not published: %s" % text)

    def on_tables(self, text):
        if text:
            log(text)
        self.guard_whole = True
        self.due["converge"] = self.clock()

    def on_drift(self, found):
        """Somebody took something away; None: perhaps. It is read what is missing, and put back."""
        # Where that is to be done already, or failed, or a run is at work, it has its time.
        if self.whole or self.failures or self.waits or not (found is None or self.kernel.misses(found)):
            return
        self.whole = True
        look = _agent_drift.look_at(self.clock(), self.looks)
        self.looks.append(look)
        self.due["converge"] = min(self.due["converge"], look)

    # --- documents

    def has_news(self):
        now = self.clock()
        self.news = (self.news[0] if self.news else now, now)
        if self.lag_since is None:
            self.lag_since = now

    def missing(self):
        if self.document is None:
            return self.roster
        return decide.note_missing(self.roster, self.document, self.config["node"], self.clock())

    def load_base(self):
        """Read the mesh document that a run left, where it is another one than before."""
        if self.guard.is_changed():
            self.due["converge"] = self.clock()
        path = self.config["document_file"]
        try:
            found = os.stat(path)
            stat = (found.st_mtime_ns, found.st_ino, found.st_size)
        except OSError:
            stat = None
        if stat == self.base_stat:
            return
        try:
            text = read_text(path) if stat else None
        except MeshError as exc:
            # What was read before still holds, and this is tried again.
            self.tell_once(path, exc)
            if self.document is None:
                self.trouble = str(exc)
            return
        self.file_errors.discard(path)
        self.base_stat = stat
        try:
            base = _mesh.load_document(text) if text is not None else None
        except MeshError as exc:
            log("%s: %s" % (path, exc))
            base = None
        if base is None:
            self.base = self.document = None
            self.blind = False
            self.trouble = "there is no mesh document at %s: run the playbook enable" % path
            self.ask_nobody()
            self.tell_soon()
            return
        sha256 = _mesh.document_sha256(base)
        if sha256 != self.base_sha256:
            # the run that wrote it had a reason to change the guard as well
            self.guard.forget()
        self.base, self.base_sha256 = base, sha256
        memory = self.read(self.memory_file())
        kept, remembered = decide.parse_memory(memory, self.base_sha256)
        self.document, self.remembered = (kept, remembered) if kept is not None else (base, None)
        # What runs write while it works is newer than what it knows.
        self.blind = kept is None and self.applied is None
        if self.applied is None:
            # At a start the kernel is as this agent left it, or as a run or the boot made it. What it remembers may be ahead of that.
            self.applied = decide.parse_applied(memory, self.boot_id) or base
            self.expected = True
        self.whole, self.sending, self.trial = True, None, None
        self.load_proofs()
        if self.roster["complete"]:
            self.has_news()
        self.due["converge"] = self.clock()
        log("mesh document of serial %d, %d nodes" % (base["serial"], len(base["nodes"])))

    def doubt(self, now):
        """Read a list again that alone says of nodes that they are gone, before they go."""
        doubtful = decide.doubtful(self.roster, self.config["grace"], now)
        if doubtful:
            log("the API's list lacks %s: it is read again" % _membership.name_list(doubtful))
            self.roster = decide.asked_again(self.roster, doubtful)
            self.follower.list_again()
        for kind in self.pods.ask_again(self.config["grace"], now) if self.pods is not None else ():
            self.pod_followers[kind].list_again()

    def compute(self, now):
        """The document that follows from the news."""
        self.news = None
        # Who is gone and cannot be taken out now is tried again, but not at once.
        self.due["gone"] = now + GONE_AGAIN
        if self.document is None or not self.roster["complete"] or (self.pods is not None and not self.pods.is_known()):
            return
        if self.blind:
            self.blind, self.due["converge"] = False, now
        if self.remembered is None:
            self.remembered = decide.adopt(self.document, self.roster, self.config["pod_source"])
        self.roster = self.missing()
        remembered = decide.with_own(self.remembered, self.roster, self.document, self.config, now)
        if remembered != self.remembered:
            self.remembered, self.expected = remembered, True
            self.due["converge"] = now
        roster, texts = (self.roster, []) if self.pods is None else self.pods.view(self.roster, self.document)
        document, more = decide.next_document(self.document, roster, self.remembered, self.config, now, frozenset(self.proven_keys))
        texts = texts + more + self.try_keys(document, now)
        for text in texts:
            if text not in self.texts:
                log("warning: " + text)
        self.texts = texts
        changes = _mesh.compare_documents(self.document, document)
        if changes:
            self.counts["changes"] += 1
            if self.pods is not None:
                changes = _agent_pods.summary(changes)
            for text in changes[:decide.NAMES_SHOWN]:
                log(text)
            self.document = document
            self.expected = True
            self.due["converge"] = now
        elif not self.waits and self.applied == self.document:
            self.lag_since = None
        # Written when the kernel has it: a disk takes its time.
        self.unsaved = True
        self.roster = self.missing()
        self.publish(now)

    def try_keys(self, document, now):
        """What is proven of new keys counts from now on, what is not is asked for; -> [texts for people]."""
        node, generation = self.config["node"], str(document["generation"])
        for name, entry in document["nodes"].items() if self.proven_keys else ():
            key = entry["public_keys"].get(generation)
            if key in self.proven_keys:
                self.proven_keys.discard(key)
                self.proved[name] = key
                self.save_proofs()
        waiting = decide.new_keys(document, self.roster, self.remembered, node)
        # One that was proven and then taken back must be proven again.
        self.proven_keys &= set(waiting.values())
        trial, tried = decide.with_keys(document, waiting)
        if tried != (self.trial[1] if self.trial is not None else {}):
            self.due["converge"], self.expected = now, True
        self.trial = (trial, tried) if tried else None
        return decide.key_texts(document, self.roster, waiting, node)

    def memory_file(self):
        return os.path.join(self.config["state"], MEMORY)

    def save_memory(self):
        """Where it cannot be written it is tried again: at the next boot the guard goes by it before anything else is known."""
        text = decide.memory_text(self.base_sha256, self.document, self.remembered, self.applied, self.boot_id)
        self.unsaved = not self.write(self.memory_file(), text)

    def tell_once(self, path, exc):
        """That a file cannot be read or written, until it can be again."""
        if path not in self.file_errors:
            log(str(exc))
        self.file_errors.add(path)

    def read(self, path):
        """Text of a file of the agent's own; empty where there is none, or a disk that fails gives none."""
        try:
            return read_text(path) or ""
        except MeshError as exc:
            self.tell_once(path, exc)
            return ""

    def write(self, path, text):
        """A file of the agent's own; -> whether it is as it shall be. What cannot be written (a disk that is full) must not stop it."""
        try:
            if self.read(path) != text:
                write_text(path, text, STATE_MODE)
        except MeshError as exc:
            self.tell_once(path, exc)
            return False
        self.file_errors.discard(path)
        return True

    # --- proofs

    def proof_file(self):
        return os.path.join(self.config["runtime"], "proved.json")

    def load_proofs(self):
        """What was proven before this program was started again; a reboot forgets it."""
        try:
            found = json.loads(self.read(self.proof_file()) or "{}")
            self.proved = {str(name): str(key) for name, key in found.items()}
        except (ValueError, AttributeError):
            self.proved = {}

    def save_proofs(self):
        self.write(self.proof_file(), json.dumps(self.proved, sort_keys=True))

    def proven(self):
        """Names of the peers that were reached with the key that they have, by this agent or by a run."""
        generation = self.document["generation"]
        path = os.path.join(os.path.dirname(self.config["lock_file"]), "proof-%s.json" % self.kernel.name(generation))
        names = _probe.proven_names(_probe.read_proof(path), self.document, generation)
        keys = {name: entry["public_keys"].get(str(generation)) for name, entry in self.document["nodes"].items()}
        names |= {name for name, key in self.proved.items() if keys.get(name) == key}
        return {name for name in names if keys[name] not in self.fresh_keys}

    def distrust_fresh(self, state):
        """Peers that the device does not have (any more): that they were reached once is no proof for when they are added."""
        self.distrust(decide.keys_of(self.document, self.config["node"], str(self.document["generation"])) - set(state["peers"]))

    def distrust(self, keys):
        """Whether these were reached says nothing from now on."""
        if keys - self.fresh_keys:
            self.fresh_keys |= keys
            self.proved = {name: key for name, key in self.proved.items() if key not in keys}
            self.save_proofs()

    def ask_nobody(self):
        """Nothing can be done with an answer now."""
        self.unproven = set()
        self.asked.clear()
        self.before.clear()

    def prove(self, now):
        """Ask those that are due, in a thread of its own."""
        if self.proving or self.document is None:
            return
        keys = sorted(key for key, (dummy, dummy2, when) in self.asked.items() if when <= now)
        if not keys:
            return
        new, document = [], self.document
        trial, tried = self.trial or (None, {})
        names = []
        for key in keys:
            name, rounds, dummy = self.asked[key]
            self.asked[key] = (name, rounds + 1, now)
            (new if tried.get(name) == key else names).append(name)
        self.proving = True

        def work():
            entries = {}
            try:
                for of_document, some in ((document, sorted(names)), (trial, sorted(new))):
                    found = self.kernel.prove(of_document, some, self.before) if some else {}
                    entries.update((entry["public_key"], entry) for entry in found.values())
            except (MeshError, OSError) as exc:
                log("warning: %s" % exc)
            finally:
                # whatever happened: the main thread waits for this
                self.queue.put(("proved", (entries, [key for key in keys if key not in entries])))

        threading.Thread(target=work, daemon=True, name="prover").start()

    def note_unproven(self, state, proven):
        """Who has to be asked: peers of the device that were not reached yet."""
        keys = {entry["public_keys"].get(str(self.document["generation"])): name for name, entry in self.document["nodes"].items()
                if entry["state"] != "excluded"}
        here = {keys[key]: key for key in state["peers"] if keys.get(key)}
        self.unproven = set(here) - proven - {self.config["node"]}
        now = self.clock()
        wanted = {here[name]: name for name in self.unproven}
        wanted.update((key, name) for name, key in (self.trial or (None, {}))[1].items()
                      if key in state["peers"] and key not in self.proven_keys)
        for key in set(self.asked) - set(wanted):
            del self.asked[key]
            self.before.pop(key, None)
        for key, name in wanted.items():
            self.asked.setdefault(key, (name, 0, now))

    # --- the kernel

    def converge(self, now):
        """Compare document and kernel, and do what is missing. News are compared with what is known of the kernel, without reading it."""
        if now >= self.due["compare"]:
            self.whole = True
        if self.document is None:
            self.due["converge"] = now + RETRY[-1]
            self.tell_soon()
            return
        self.due["send"] = None
        try:
            with _lock.turn(self.config["lock_file"]) as waits:
                self.waits = waits
                if waits:
                    self.whole = True
                    # The run does what the news ask for.
                    self.lag_since = now if self.lag_since is not None else None
                    self.guard.forget()
                    self.due["converge"] = now + RETRY[0]
                    return  # `status` is told at the next report
                # A run may have ended just now.
                self.load_base()
                if self.document is not None:
                    self.work()
            if self.whole:
                self.due["compare"] = now + random.uniform(*decide.COMPARE)  # noqa: S311 - spreads work, protects nothing
            self.failures, self.whole = 0, False
            self.due["converge"] = min(when for when in (self.due["compare"], self.due["send"]) if when is not None)
        except (MeshError, OSError) as exc:
            text = str(exc)
            if text != self.trouble:
                log(text)
            self.trouble, self.whole = text, True
            self.failures += 1
            self.due["converge"] = self.clock() + RETRY[min(self.failures, len(RETRY)) - 1]
        self.tell_soon()

    def work(self):
        """One comparison; nobody else changes the mesh meanwhile."""
        document = self.document
        # First of all, also of what is in the way of the rest: who joined is not reached in clear from here on.
        closed, drift = self.guard.close(document, self.whole or self.guard_whole)
        self.guard_whole = False
        if self.guard.state != OFF and self.watcher is None:
            self.watcher = TableWatcher(lambda text: self.queue.put(("tables", text)))
            self.watcher.start()
        if drift:
            self.counts["repairs"] += 1
            log("the guard was not as it was left")
        if closed:
            log("the guard: %s" % decide.guard_words(closed))
        dummy, state, routed = self.kernel.look(document["generation"], self.whole)
        trouble = decide.hindrance(document, self.config["node"], state["public_key"] if state else None)
        told, self.trouble = self.trouble, trouble
        if trouble:
            if trouble != told:
                log(trouble)
            self.ask_nobody()
            return
        self.blind = self.blind and decide.is_ahead(state, document, self.config["node"])
        if self.blind:
            self.trouble = decide.BLIND % self.memory_file()
            if self.trouble != told:
                log(self.trouble)
            return
        self.trouble = decide.hindrance_of_own(self.remembered, self.roster, self.config["node"])
        if self.trouble:
            if self.trouble != told:
                log(self.trouble)
            self.ask_nobody()
            # Who took this node for gone may accept something else by now: all are asked again before anything is sent.
            self.distrust(decide.keys_of(document, self.config["node"], str(document["generation"])))
            self.kernel.withdraw()
            return
        self.distrust_fresh(state)
        proven = self.proven()
        trial = decide.trial_peers(self.trial[0], self.config["node"], self.trial[1]) if self.trial is not None else {}
        self.tried |= set(trial)
        steps, state = self.kernel.converge(document, self.applied, proven, self.sends_from(document, routed["rules"]), trial, self.tried)
        # also remembered: who starts again must know what the kernel holds
        self.unsaved = self.unsaved or self.applied != document
        self.applied, self.tried = document, set(trial)
        opened = self.guard.open()
        if opened:
            log("the guard: %s" % decide.guard_words(opened))
        now = self.clock()
        repair, self.expected = not self.expected, False
        if steps:
            self.counts["repairs"] += int(repair)
            what = ", ".join(sorted({step["op"] for step in steps}))
            count = "1 step" if len(steps) == 1 else "%d steps" % len(steps)
            log("%s%s: %s" % (count, " (the kernel was not as it was left)" if repair else "", what))
        if self.lag_since is not None:
            self.lag, self.lag_since = now - self.lag_since, None
        self.note_unproven(state, proven)

    def sends_from(self, document, rules):
        """The prefixes that this node sends from, None for all of its own. ``rules``: those of the kernel."""
        if self.pods is None or self.kernel.sends_all():
            self.sending = None
            return None
        before = self.sending or _agent_pods.sending_of(rules, self.config["table"])
        self.sending, self.due["send"] = _agent_pods.next_sending(
            before, _mesh.local_pod_cidrs(document, self.config["node"]), self.clock())
        self.expected = self.expected or self.sending["cidrs"] != before["cidrs"]
        return self.sending["cidrs"]

    # --- what is told

    def publish(self, now):
        """Offer the node's own public keys to the API, where its Node does not have them."""
        own = self.roster["members"].get(self.config["node"])
        if own is None or self.document is None:
            return
        patch = decide.own_patch(self.document, own)
        body = patch and _published_keys.body_of(patch)
        if not body or (self.published and self.published[0] == body and now < self.published[1]):
            return  # nothing to do, or done or refused a short while ago
        self.published = (body, now + PUBLISH_AGAIN)

        def work():
            try:
                self.client.patch("%s/%s" % (NODES, self.config["node"]), body)
                self.queue.put(("published", ""))
            except (MeshError, OSError) as exc:
                self.queue.put(("published", str(exc)))

        threading.Thread(target=work, daemon=True, name="publisher").start()

    def report(self):
        """State for `status`, metrics for node_exporter, a line for systemd."""
        api = self.api if self.api != decide.WATCHING or self.pods is None else self.pods.trouble() or self.api
        summary = decide.state_of(self.document, api, self.trouble, self.texts, self.lag, self.unproven, self.waits, self.counts,
                                  time.time())
        summary["base"], summary["guard"] = self.base_sha256, self.guard.state
        rows, dropped = [], None
        try:
            if self.document is not None and self.config["node"] in self.document["nodes"]:
                generation = self.document["generation"]
                state = self.kernel.read(generation)[1]
                rows = _status.join(self.document, self.config["node"], generation, state, self.kernel.routes(),
                                    self.kernel.name(generation), time.time(), self.config["exempt_cidrs"])
            dropped = self.guard.counters()
        except (MeshError, OSError) as exc:
            log("warning: %s" % exc)
        self.write(self.config["metrics_file"], decide.metrics_text(rows, summary, dropped))
        self.write(os.path.join(self.config["runtime"], "state.json"), json.dumps(summary, sort_keys=True) + "\n")
        waits = "waits: " + self.waits if self.waits else ""
        self.notifier.tell("STATUS=%s" % (self.trouble or waits or "%d nodes, API: %s" % (summary["nodes"], api)))


def only_one(folder):
    """The open lock of this agent; None where another one has it."""
    handle = os.open(os.path.join(folder, "agent.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def close_guard(config):
    """At boot, before there is a network: who joined since the last run is not reached in clear either."""
    base = read_document(config["document_file"])
    kept, dummy = decide.parse_memory(read_text(os.path.join(config["state"], MEMORY)) or "", _mesh.document_sha256(base))
    steps, dummy = GuardKeeper(System(Host()), config).close(kept or base, True)
    log("the guard: %s" % (decide.guard_words(steps) or "nothing to do"))
    return 0


def main(argv):
    """``argv``: path of the configuration, after ``--guard`` for what is done at boot and ends.

    Exit codes: 0 done or ended by a signal, 1 cannot go on, 3 another agent is at work on this node.
    """
    try:
        text = read_text(argv[-1])
        if text is None:
            raise MeshError("%s is not there; run the playbook enable with mesh_agent" % argv[-1])
        config = decide.parse_config(text)
        if argv[0] == GUARD_OPTION:
            return close_guard(config)
        held = only_one(config["runtime"])
    except (MeshError, OSError) as exc:
        log(str(exc))
        return 1
    if held is None:
        log("another agent is at work on this node (it has %s/agent.lock); stop it first" % config["runtime"])
        return EXIT_SECOND_AGENT
    try:
        agent = Agent(config)
    except MeshError as exc:
        log(str(exc))
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, agent.stop)
    return agent.run()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
