#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: keypair
short_description: Keep the WireGuard key pair of a node
version_added: 1.0.0
description:
  - Makes an X25519 private key on the node, in a file that only root can read, and returns the public key.
  - The private key never leaves the node. It is in no result, diff, log or process argument, and no option takes or returns it.
  - A key that is there is kept. A file that is not a sound private key is never overwritten, whatever the options. The module fails and
    says what is wrong with it and what can be done.
  - Two runs at the same time end with one key, and both return it.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.node
  - kubemesh.wireguard._attributes.actiongroup_mesh
attributes:
  check_mode:
    support: full
    details:
      - A key that would be made is not known yet, so RV(public_key) is then null.
  diff_mode:
    support: full
    details:
      - Shows path, mode and public key. The private key is never part of it.
  idempotent:
    support: partial
    details:
      - Not with O(regenerate=always), which makes a new key at every run.
options:
  path:
    description:
      - The file of the private key. It holds what C(wg genkey) prints, and is made with mode 0600 for the user that the task runs as, which
        should be root.
      - Directories that are missing are made with mode 0700. A directory that others may write in is refused, as they could replace the
        key.
      - A file that others may read is closed to them, with a warning, as they may know the key.
    type: path
    default: /etc/wireguard/wgmesh0.key
  state:
    description:
      - V(present) makes the key if it is missing.
      - V(absent) overwrites the file, then removes it. Copies that a journal, a copy-on-write file system, an SSD, a snapshot or a backup
        made are out of reach.
    type: str
    choices:
      - present
      - absent
    default: present
  regenerate:
    description:
      - V(never) makes a key only where there is none.
      - V(always) makes a new key in any case and overwrites the old one. Peers that only know the old public key no longer reach the
        node. To change the keys of a mesh that is in use, make a key of the other generation beside the first.
    type: str
    choices:
      - never
      - always
    default: never
requirements:
  - wireguard-tools, or the Python library cryptography 2.5 or later
seealso:
  - module: kubemesh.wireguard.interface
  - module: kubemesh.wireguard.peers
author:
  - Kubemesh contributors (@kubemesh)
"""

EXAMPLES = r"""
- name: Every node has a key pair
  kubemesh.wireguard.keypair:
  register: own_keys

- name: Show the public key
  ansible.builtin.debug:
    var: own_keys.public_key

- name: The key pair of the second generation, for a rotation
  kubemesh.wireguard.keypair:
    path: /etc/wireguard/wgmesh1.key

- name: Remove the key of a node that leaves the mesh
  kubemesh.wireguard.keypair:
    path: /etc/wireguard/wgmesh0.key
    state: absent
"""

RETURN = r"""
public_key:
  description:
    - The public key, 44 characters of base64.
    - Null if there is no key, and in check mode if one would be made.
  returned: success
  type: str
  sample: "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="
created:
  description: Whether this run made the key, or in check mode would make it.
  returned: success
  type: bool
  sample: false
age:
  description:
    - Seconds since the key file was last written.
    - Null if there is no key, and in check mode if one would be made.
  returned: success
  type: int
  sample: 86400
path:
  description: The file of the private key.
  returned: success
  type: str
  sample: /etc/wireguard/wgmesh0.key
msg:
  description: What was done, or in check mode would be done.
  returned: success
  type: str
  sample: "the key at /etc/wireguard/wgmesh0.key is kept"
"""

import errno

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _keys
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

# Nothing half written is left by any of them.
REMEDIES = {
    errno.ENOSPC: "make room on the file system and run this again",
    errno.EDQUOT: "raise the quota, or make room, and run this again",
    errno.EROFS: "mount the file system to be written and run this again",
}


def side_of_diff(path, found, public_key):
    """One side of the diff: what may be told about a key file."""
    if found is None:
        return {"path": path, "state": "absent"}
    return {"path": path, "state": "present", "mode": "%04o" % found["mode"], "public_key": public_key}


def result(path, before, after, changed, created, msg):
    """``before`` and ``after`` are (what ``_keys.inspect`` returned, public key as text or null)."""
    return {
        "changed": changed,
        "created": created,
        "public_key": after[1],
        "age": after[0].get("age") if after[0] else None,
        "path": path,
        "msg": msg,
        "diff": {"before": side_of_diff(path, *before), "after": side_of_diff(path, *after)},
    }


def make_present(module, path, public_key_of):
    """-> the result for state=present."""
    found = _keys.inspect(path)
    before = (found, public_key_of(found["private_key"]) if found else None)

    if found is None or module.params["regenerate"] == "always":
        if module.check_mode:
            planned = {"mode": _keys.FILE_MODE}
            return result(path, before, (planned, None), True, True, "a new key would be made at %s" % path)
        # the public key before the file: a node that cannot compute it must not be left with a key that it cannot tell anyone
        raw = _keys.generate_private_key()
        public_key_of(raw)
        if found is None:
            created = _keys.create(path, raw)
        else:
            _keys.replace(path, raw)
            created = True
        # read back: this is the key that is on disk now, of whichever run was faster
        found = _keys.inspect(path)
        if found is None:
            module.fail_json(msg="%s vanished as soon as it was written; find out which other process removes it, then run again" % path)
        after = (found, public_key_of(found["private_key"]))
        return result(path, before, after, created, created,
                      "a new key was made at %s" % path if created else "another run made the key at %s at the same time" % path)

    if not found["loose"]:
        return result(path, before, before, False, False, "the key at %s is kept" % path)

    module.warn("%s: others could use this private key file (mode %04o). That is taken away, but they may know the key: rotate the keys"
                % (path, found["mode"]))
    if not module.check_mode:
        _keys.tighten(path)
    after = (dict(found, mode=_keys.FILE_MODE), before[1])
    return result(path, before, after, True, False, "the key at %s is kept, its mode %s %04o" % (
        path, "would be" if module.check_mode else "is now", _keys.FILE_MODE))


def make_absent(module, path):
    """-> the result for state=absent; also of a file that is no sound key, as that is the way out."""
    if not _keys.leftovers(path):
        return result(path, (None, None), (None, None), False, False, "there is no key at %s" % path)
    if not module.check_mode:
        _keys.remove(path)
    outcome = result(path, (None, None), (None, None), True, False, (
        "the file %s %s overwritten and removed. Copies made by a journal, a copy-on-write file system, an SSD, a snapshot or a backup "
        "are out of reach" % (path, "would be" if module.check_mode else "was")))
    outcome["diff"]["before"]["state"] = "present"
    return outcome


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/wireguard/wgmesh0.key"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "regenerate": {"type": "str", "choices": ["never", "always"], "default": "never"},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]

    def public_key_of(raw):
        return _keys.public_key_of(raw, module.run_command, module.get_bin_path("wg"))

    try:
        outcome = make_absent(module, path) if module.params["state"] == "absent" else make_present(module, path, public_key_of)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    except OSError as exc:
        module.fail_json(msg="%s: %s; %s" % (
            exc.filename or path, exc.strerror, REMEDIES.get(exc.errno, "run this task as root (become: true) and check the file system")))
    module.exit_json(**outcome)


if __name__ == "__main__":
    main()
