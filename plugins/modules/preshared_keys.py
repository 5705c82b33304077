#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: preshared_keys
short_description: The preshared keys of a node, one for each of its peers
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - A preshared key is a second, symmetric key of a pair of nodes. With it, traffic recorded today stays secret even if somebody breaks
    Curve25519 one day.
  - Derives the key of each pair from one secret of the cluster and the two public keys, with HKDF-SHA256 (RFC 5869), on the controller.
    Each node is given only its own keys. The secret never leaves the controller.
  - Writes one file for each peer, in a directory that only root can use, for M(kubemesh.wireguard.interface).
  - Keys are sent only to nodes that need them. What a node has is compared by proofs that tell nothing about the keys.
  - No key and no secret is in a result, diff, log or process argument, nor a digest of one. Reports have the names of peers only.
  - WireGuard uses a preshared key at handshakes only. A key that changes on one node before it changes on the other breaks the tunnel of
    the pair at the next handshake, within two minutes. So change keys that are in use by rotating to the other generation.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
attributes:
  check_mode:
    support: full
    details:
      - Compares by proofs. No key is sent.
  diff_mode:
    support: full
    details:
      - Names the peers whose keys are added, replaced or removed.
  idempotent:
    support: full
options:
  state:
    description:
      - V(present) gives the node the keys of its peers. V(absent) overwrites and removes all of them, and their directory.
    type: str
    choices:
      - present
      - absent
    default: present
  name:
    description:
      - Name of the device that the keys are for.
    type: str
    default: wgmesh0
  path:
    description:
      - Directory of the keys. It is made with mode 0700. The default is C(/etc/wireguard/NAME.psk).
      - A file has the name of the public key of its peer, with C(-) for C(+) and C(_) for C(/), and holds what C(wg genpsk) prints.
    type: path
  secret:
    description:
      - The secret of the cluster, at least 32 characters, the same for all nodes. Make it with C(openssl rand -base64 32) and keep it in a
        vaulted variable. White space around it does not count.
      - Stays on the controller. Needed with O(state=present) unless O(keys) or O(proofs) are given.
    type: str
  document_src:
    description:
      - The mesh document on the controller, as M(kubemesh.wireguard.peers) computes it. Needed with O(secret).
    type: path
  node:
    description:
      - Name of this host in the mesh document. Needed with O(secret).
    type: str
  generation:
    description:
      - Which generation of keys is meant.
    type: int
    choices:
      - 0
      - 1
    default: 0
  compare_only:
    description:
      - Only tell which keys differ from those that the secret gives, and change nothing. So a run finds out that the secret was changed and
        that the mesh has to rotate to its other generation.
    type: bool
    default: false
  complete:
    description:
      - Whether the keys of peers that are not in the mesh document are to be removed.
      - With O(secret), the default is whether the mesh document knows a public key of this generation of every member. One without may be
        a peer that the node has a key of.
      - Without O(secret), the default is V(false).
    type: bool
  keys:
    description:
      - Public keys of peers and their preshared keys. The action part sets it.
    type: dict
  proofs:
    description:
      - Public keys of peers and a proof for each of their preshared keys. The action part sets it.
    type: dict
  nonce:
    description:
      - What the proofs were made with. The action part sets it.
    type: str
seealso:
  - module: kubemesh.wireguard.interface
  - module: kubemesh.wireguard.keypair
"""

EXAMPLES = r"""
- name: Give the node the preshared keys of its peers
  kubemesh.wireguard.preshared_keys:
    secret: "{{ mesh_psk_secret }}"
    document_src: /tmp/mesh.json
    node: worker-1

- name: Use them
  kubemesh.wireguard.interface:
    node: worker-1
    preshared_keys: /etc/wireguard/wgmesh0.psk

- name: Find out whether the secret was changed
  kubemesh.wireguard.preshared_keys:
    secret: "{{ mesh_psk_secret }}"
    document_src: /tmp/mesh.json
    node: worker-1
    compare_only: true
  register: compared
  failed_when: compared.differs | length > 0

- name: Remove them
  kubemesh.wireguard.preshared_keys:
    state: absent
"""

RETURN = r"""
differs:
  description:
    - Names of peers whose key on the node is not the one that the secret gives, at most 200. Those that have none are not among them.
    - As found before the task changed anything.
  returned: success
  type: list
  elements: str
  sample: ["worker-2"]
added:
  description:
    - Names of peers whose key was added, at most 200. With O(compare_only) and in check mode, whose key would be.
  returned: success
  type: list
  elements: str
  sample: ["worker-3"]
replaced:
  description: Names of peers whose key was replaced, or would be, at most 200.
  returned: success
  type: list
  elements: str
  sample: []
removed:
  description: Public keys of peers whose key was removed, or would be, at most 200. The mesh document has no name for them.
  returned: success
  type: list
  elements: str
  sample: []
counts:
  description: How many keys were added, replaced, removed, closed to others (C(tightened)) and kept, or would be.
  returned: success
  type: dict
  sample: {"added": 1, "kept": 3, "removed": 0, "replaced": 0, "tightened": 0}
path:
  description: The directory of the keys.
  returned: success
  type: str
  sample: /etc/wireguard/wgmesh0.psk
msg:
  description: What was done, or in check mode would be done.
  returned: success
  type: str
  sample: "preshared keys: 1 added"
needed:
  description: Public keys of the peers whose preshared keys have to be sent, separated by blanks. For the action part, which takes it away.
  returned: when no keys were given
  type: str
  sample: ""
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk, _psk_files
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, canonical_public_key


def texts(name, value):
    """A dictionary of public keys and texts; the error quotes none of the texts."""
    result = {}
    for public_key, text in (value or {}).items():
        canonical_public_key(public_key)
        if not isinstance(text, str):
            raise MeshError("%s: what is given for peer %s is not text" % (name, public_key))
        result[public_key] = text
    return result


def is_same(public_key, stored, keys, proofs, nonce):
    """Whether a stored key (bytearray or None) is the wanted one."""
    if stored is None:
        return False
    if public_key in keys:
        return _psk.same_text(keys[public_key].strip(), _psk.encode(stored))
    return public_key in proofs and _psk.same_text(proofs[public_key], _psk.proof(stored, nonce, public_key))


def compare(folder, keys, proofs, nonce):
    """``({public key: whether it is the wanted one}, [public keys whose files others can use])`` of all files."""
    same, loose = {}, []
    for public_key in folder.public_keys():
        stored, open_to_others = folder.read(public_key)
        same[public_key] = is_same(public_key, stored, keys, proofs, nonce)
        if stored is not None:
            stored[:] = bytes(len(stored))
        if open_to_others:
            loose.append(public_key)
    return same, loose


def make_present(module, path, keys, proofs):
    """state=present -> (result, plan). Compares, and writes what differs if its keys are there."""
    for public_key, text in keys.items():
        if _psk.decode(text) is None:
            raise MeshError("keys: what is given for peer %s is no preshared key" % public_key)
    nonce = module.params["nonce"] or ""
    if proofs and not nonce:
        raise MeshError("nonce: it is needed with proofs")
    only_look = module.check_mode or module.params["compare_only"]
    with _psk_files.Folder(path, create=bool(keys) and not only_look) as folder:
        same, loose = compare(folder, keys, proofs, nonce)
        steps = _psk.plan(set(keys) | set(proofs), same, loose, bool(module.params["complete"]))
        needed = [public_key for public_key in steps["added"] + steps["replaced"] if public_key not in keys]
        if needed and keys:
            raise MeshError("%s: %d keys changed while they were looked at; is another run at work? Run again" % (path, len(needed)))
        untidy = folder.loose() or bool(folder.leftovers())
        to_do = untidy or any(steps[kind] for kind in ("added", "replaced", "removed", "tightened"))
        if to_do and not needed and not only_look:
            folder.clean()
            folder.tighten(steps["tightened"])
            folder.write({public_key: keys[public_key] for public_key in steps["added"] + steps["replaced"]})
            folder.remove(steps["removed"])
    if loose:
        module.warn("%s: others could use %d of these files. They may know the keys: change the secret" % (path, len(loose)))
    result = {"changed": to_do and not module.params["compare_only"], "tidied": untidy}
    if not keys:
        result["needed"] = " ".join(needed)
    return result, steps


def make_absent(module, path):
    """state=absent -> (result, plan). Everything of ours goes, whatever is in it."""
    with _psk_files.Folder(path) as folder:
        there, foreign = folder.public_keys(), folder.foreign()
        to_do = folder.exists and bool(there or folder.leftovers() or not foreign)
        if to_do and not module.check_mode:
            folder.clean()
            folder.remove(there)
            if not foreign:
                folder.remove_directory()
    if foreign:
        module.warn("%s: there is something in it that is not ours, so the directory stays" % path)
    return {"changed": to_do, "tidied": False}, _psk.plan((), dict.fromkeys(there, True), (), True)


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "default": "wgmesh0"},
            "path": {"type": "path"},
            # The action part takes these; they are here for the documentation and for checks of the arguments.
            "secret": {"type": "str", "no_log": True},
            "document_src": {"type": "path"},
            "node": {"type": "str"},
            "generation": {"type": "int", "choices": [0, 1], "default": 0},
            "compare_only": {"type": "bool", "default": False},
            "complete": {"type": "bool"},
            "keys": {"type": "dict", "no_log": True},
            "proofs": {"type": "dict", "no_log": True},
            "nonce": {"type": "str"},
        },
        supports_check_mode=True,
    )
    # What Ansible returns of the arguments must not have them in it, whatever it makes of no_log.
    secrets = {name: module.params.pop(name) for name in ("keys", "proofs", "secret")}
    path = module.params["path"] or _psk.folder_of(module.params["name"])
    try:
        if module.params["state"] == "absent":
            result, steps = make_absent(module, path)
        else:
            if secrets["keys"] is None and secrets["proofs"] is None:
                raise MeshError("secret: it is needed for state=present, with document_src and node")
            result, steps = make_present(module, path, texts("keys", secrets["keys"]), texts("proofs", secrets["proofs"]))
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    result.update(_psk.report(steps), path=path)
    result["differs"] = result["replaced"]
    result["msg"] = _psk.summary(result, module.check_mode or module.params["compare_only"])
    if result.pop("tidied"):
        result["msg"] += "; the directory is put in order"
    if module._diff and result["changed"]:
        result["diff"] = {
            "before_header": path, "after_header": path, "prepared": "".join(line + "\n" for line in _psk.describe(result))}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
