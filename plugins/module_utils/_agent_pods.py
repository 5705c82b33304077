# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""What the node agent knows of pods, where the Node objects do not say which addresses are behind which node.

Pure: standard library only, no I/O, no clock, Python 3.8 and newer. Times are seconds of a monotonic clock. `_pods` reads objects and
merges addresses, for the agent as for the controller; this file keeps what it found up to lists and events, and says when this node may
send from a prefix of its own.
"""

from __future__ import annotations

import ipaddress

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _kube_watch, _pods
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, sorted_cidrs

# Seconds until a node sends from a prefix that is new here. Peers that do not accept it yet would drop what comes from it; until then it
# takes the way of the CNI. A peer's agent has it within some 0.3 s of the API's event; the rest is for those that are busy.
SENDS_AFTER = 2.0
# Objects in a page of a list. A Pod has some 10 kB as JSON.
PAGE_SIZE = 200
# Kubernetes supports 150,000 pods in a cluster; an AWS node has up to some 700 addresses, which are in one CiliumNode.
OBJECTS_MAX = 300000


def key_of(obj):
    """``namespace/name`` of an object, ``name`` where it has no namespace; None where it has no name."""
    name = _kube_watch.name_of(obj)
    if name is None:
        return None
    namespace = obj["metadata"].get("namespace")
    return "%s/%s" % (namespace, name) if isinstance(namespace, str) else name


def reducer(kind):
    """What makes an object of a kind small; never raises for what an API can hold."""
    reduce = _pods.REDUCERS[kind]

    def reduced(obj):
        try:
            return reduce(obj)
        except (MeshError, TypeError, ValueError, AttributeError, RecursionError):
            return None

    return reduced


def distrust(resource, listing):
    """Why a complete list, ``{key: reduced object or None}``, is not to be believed, or an empty text."""
    if any(one is not None and one.values for one in listing.values()):
        return ""
    if listing:
        return ("the API's list of %s has %d objects and none with an address that counts, and a cluster in which %s gives addresses has at"
                " least one" % (resource.plural, len(listing), resource.owner))
    return "the API's list of %s is empty, and a cluster in which %s gives addresses has at least one" % (resource.plural, resource.owner)


class PodRoster:
    """What is known of the objects of a source. ``source``: one of `_pods.SOURCES` but node_cidrs.

    An object whose end was told is gone. One that a new list does not have any more stays for the grace, and until a second list lacks it
    too, unless another has what it had: what a list lacks, nobody has said to be gone.
    """

    def __init__(self, source):
        self.source = source
        self.kinds = [resource.kind for resource in _pods.RESOURCES[source]]
        self.found = {kind: {} for kind in self.kinds}
        self.missing = {kind: {} for kind in self.kinds}    # {key: since}
        self.sure = {kind: set() for kind in self.kinds}    # keys that a second list lacked too
        self.asked = {kind: set() for kind in self.kinds}   # keys that the next list decides about
        self.away = dict.fromkeys(self.kinds, "not reached yet")
        self.listed_once = set()

    def heard(self, kind, text, now):
        """The API is away, ``text`` says why, or it is back (an empty text). The time in between does not count for what is missing."""
        if text != self.away[kind]:
            self.away[kind], self.asked[kind] = text, set()
            self.missing[kind] = dict.fromkeys(self.missing[kind], now)

    def is_known(self):
        """Whether every list was read: until then nothing can be said of any node."""
        return self.listed_once == set(self.kinds)

    def trouble(self):
        """Why what is known may not be all, or an empty text."""
        return next((text for text in self.away.values() if text), "")

    def listed(self, kind, listing, now):
        """Take in a list that is believed, ``{key: reduced object or None}``; -> whether anything changed that matters."""
        before = self.found[kind]
        after = {key: one for key, one in listing.items() if one is not None}
        missing = {key: self.missing[kind].get(key, now) for key in before if key not in listing}
        after.update((key, before[key]) for key in missing)
        changed = after != before or missing != self.missing[kind] or kind not in self.listed_once
        self.found[kind], self.missing[kind] = after, missing
        self.sure[kind] = (self.sure[kind] | self.asked[kind]) & set(missing)
        self.asked[kind] = set()
        self.listed_once.add(kind)
        return changed

    def happened(self, kind, key, one):
        """Take in an event; ``one``: reduced object, None for one that is gone or has no address. -> whether anything changed."""
        self.missing[kind].pop(key, None)
        self.sure[kind].discard(key)
        if self.found[kind].get(key) == one:
            return False
        if one is None:
            del self.found[kind][key]
        else:
            self.found[kind][key] = one
        return True

    def _over(self, grace, now):
        """``[(kind, key)]`` that were missing for the whole grace; none while anything of the API is away."""
        if self.trouble():
            return []
        return [(kind, key) for kind in self.kinds for key, since in self.missing[kind].items() if now >= since + grace]

    def forget(self, grace, now):
        """Let those go that were missing for the whole grace, by two lists; -> whether there were any."""
        over = [(kind, key) for kind, key in self._over(grace, now) if key in self.sure[kind]]
        for kind, key in over:
            del self.missing[kind][key], self.found[kind][key]
            self.sure[kind].discard(key)
        return bool(over)

    def ask_again(self, grace, now):
        """Kinds of which a list is to be read again, because one alone says of objects that they are gone; each time only once."""
        over = [(kind, key) for kind, key in self._over(grace, now) if key not in self.sure[kind] and key not in self.asked[kind]]
        for kind, key in over:
            self.asked[kind].add(key)
        return {kind for kind, dummy in over}

    def next_gone(self, grace):
        """When the next object will have been missing for the whole grace; None if none is, or if the API is waited for."""
        if self.trouble():
            return None
        return min((since + grace for kind in self.kinds for key, since in self.missing[kind].items()
                    if key in self.sure[kind] or key not in self.asked[kind]), default=None)

    def objects(self):
        """*Found* of `_pods`: everything but what is missing and whose addresses or blocks another has now."""
        result = {}
        for kind in self.kinds:
            found, missing = self.found[kind], self.missing[kind]
            taken = {value for key, one in found.items() if key not in missing for value in one.values} if missing else ()
            result[kind] = [one for key, one in found.items() if key not in missing or not any(value in taken for value in one.values)]
        return result

    def view(self, roster, document):
        """``(roster, [texts for people])``: the roster of `_agent_plan` with the pod CIDRs that the source has.

        Where its objects cannot be used, every node keeps what it has in the document.
        """
        names = sorted(roster["members"])
        candidates = [roster["members"][name] for name in names]
        try:
            candidates, texts = _pods.with_found(candidates, self.source, self.objects())
        except MeshError as exc:
            texts = exc.problems
            candidates = [dict(candidate, pod_cidrs=document["nodes"].get(candidate["name"], {"pod_cidrs": []})["pod_cidrs"])
                          for candidate in candidates]
        return dict(roster, members=dict(zip(names, candidates))), texts


def summary(changes):
    """Lines of `_mesh.compare_documents` with those about pods' prefixes as one."""
    others = [text for text in changes if ": pod CIDR " not in text]
    count = len(changes) - len(others)
    return others + (["%d prefixes of pods added or removed" % count] if count else [])


# --- what this node sends from -------------------------------------------------------------------------------------------------------

def in_common(some, others):
    """The prefixes that cover what both lists of canonical CIDRs cover."""
    return sorted_cidrs(set(_inside(some, others)) | set(_inside(others, some)))


def _inside(cidrs, others):
    lengths = {}
    for text in others:
        network = ipaddress.ip_network(text)
        lengths.setdefault((network.version, network.prefixlen), set()).add(int(network.network_address))
    for text in cidrs:
        network = ipaddress.ip_network(text)
        number = int(network.network_address)
        for (version, length), starts in lengths.items():
            shift = network.max_prefixlen - length
            if version == network.version and length <= network.prefixlen and number >> shift << shift in starts:
                yield text
                break


def sending_of(rules, table):
    """What `next_sending` begins with: the prefixes that the rules of the kernel, of `_routes_plan`, send from."""
    return {"cidrs": sorted_cidrs({rule["from"] for rule in rules if rule["from"] and rule["table"] == table}), "young": None}


def next_sending(sending, own, now):
    """``(sending, when to ask again or None)``: which prefixes of its own this node sends from.

    ``sending``: {"cidrs": [CIDRs], "young": (since, [CIDRs]) or None}; ``own``: its prefixes in the mesh document. What is none of its own
    any more goes at once, what is new comes when it has been its own for `SENDS_AFTER`, and what stays is in it all the time.
    """
    cidrs = in_common(sending["cidrs"], own)
    young = sending["young"]
    if young is not None:
        # What left meanwhile and came back is new again.
        young = (young[0], in_common(young[1], own))
        if now >= young[0] + SENDS_AFTER:
            cidrs, young = _pods.merged_prefixes(cidrs + young[1]), None
    if len(set(_inside(own, cidrs))) == len(own):
        # as the playbooks write them
        return {"cidrs": sorted_cidrs(own), "young": None}, None
    if young is None:
        young = (now, list(own))
    return {"cidrs": cidrs, "young": young}, young[0] + SENDS_AFTER
