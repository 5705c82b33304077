#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: document
short_description: The mesh document on a node
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Puts the mesh document that M(kubemesh.wireguard.peers) computed on a node, whole or not at all.
  - Every node keeps the last one, so that a later run knows hosts that it cannot see.
  - A document that is not valid is refused, and the one that is there stays.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Shows in words what differs from the document that is there.
  idempotent:
    support: full
options:
  state:
    description:
      - Whether the document shall be there.
    type: str
    choices:
      - present
      - absent
    default: present
  src:
    description:
      - The document on the controller. Needed with O(state=present).
    type: path
  path:
    description:
      - Where it is kept on the node.
    type: path
    default: /etc/kubemesh/mesh.json
  sha256:
    description:
      - Checksum of O(src). The action part sets it, so that a document that is there already is not sent again.
    type: str
seealso:
  - module: kubemesh.wireguard.peers
"""

EXAMPLES = r"""
- name: Give the mesh document to the node
  kubemesh.wireguard.document:
    src: /tmp/mesh.json

- name: Remove it
  kubemesh.wireguard.document:
    state: absent
"""

RETURN = r"""
serial:
  description: Serial of the document on the node after this task, null if there is none.
  returned: always
  type: int
  sample: 7
previous_serial:
  description: Serial of the document that was there, null if there was none or it was damaged.
  returned: always
  type: int
  sample: 6
needed:
  description: Whether the document has to be sent. For the action part.
  returned: when only O(sha256) was given
  type: bool
  sample: false
"""

import hashlib
import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError, compare_documents, load_document
from ansible_collections.kubemesh.wireguard.plugins.module_utils._system import read_text, remove_empty_folders, remove_file, write_text

# Public facts only.
MODE = 0o644


def document_there(path):
    """(text, document) on this node; (text, None) for one that cannot be read, (None, None) for none."""
    text = read_text(path)
    try:
        return text, load_document(text) if text is not None else None
    except MeshError:
        return text, None


def wanted_text(params, text):
    """What shall be on the node: None for nothing, the text that is there where its checksum is the wanted one."""
    if params["state"] == "absent":
        return None
    if params["src"]:
        wanted = read_text(params["src"])
        # None would mean to remove the document that is there.
        if wanted is None:
            raise MeshError("src: %s is not there" % params["src"])
        return wanted
    if params["sha256"] and text is not None and hashlib.sha256(text.encode("utf-8")).hexdigest() == params["sha256"]:
        return text
    raise MeshError("src: the mesh document is needed for state=present")


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "src": {"type": "path"},
            "path": {"type": "path", "default": "/etc/kubemesh/mesh.json"},
            "sha256": {"type": "str"},
        },
        supports_check_mode=True,
    )
    params = module.params
    before = None
    try:
        text, before = document_there(params["path"])
        wanted = wanted_text(params, text)
        after = load_document(wanted) if wanted is not None else None
        changed = wanted != text
        if changed and not module.check_mode:
            if wanted is None:
                remove_file(params["path"])
                remove_empty_folders([os.path.dirname(params["path"])])
            else:
                write_text(params["path"], wanted, MODE)
    except MeshError as exc:
        if params["state"] == "present" and params["sha256"] and not params["src"]:
            module.exit_json(changed=True, needed=True, serial=None, previous_serial=before["serial"] if before else None)
        module.fail_json(msg=str(exc))
    result = {
        "changed": changed,
        "serial": after["serial"] if after else None,
        "previous_serial": before["serial"] if before else None,
    }
    if not params["src"]:
        result["needed"] = False
    if module._diff and changed:
        lines = compare_documents(before, after) if after else ["the mesh document is removed"]
        result["diff"] = {
            "before_header": params["path"], "after_header": params["path"], "prepared": "".join(line + "\n" for line in lines)}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
