#!/usr/bin/python
# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lock
short_description: One run at a time changes the mesh on a node
version_added: 1.0.0
author:
  - Kubemesh contributors (@kubemesh)
description:
  - Takes, renews and gives back the lock of a run on a node, so that two jobs at once, or a person and a schedule, do not change the mesh
    against each other. A run that comes second is told who is at work, with what, since when, from where, and when that lock ends.
  - A run takes its nodes in two steps. It claims all of them (O(state=claimed)), asks the filter
    P(kubemesh.wireguard.lock_verdict#filter) about the results of all, and then holds all of them (O(state=held)). So two runs that
    share some nodes never wait for each other for ever. One of them gives way, the other one goes on.
  - A lock ends by itself when it was not renewed for its O(lease), by the node's own clock that counts from its boot. Every
    O(state=claimed) and O(state=held) of the same run renews it. A reboot of the node frees it.
  - The lock of a run whose process is known to be dead is taken over at once. Only the controller can know that, and only of a process of
    its own machine and container.
  - A run whose lock was taken over is told so the next time it asks, and has to stop.
  - The lock is advice between runs of this collection. It stops nobody who does not ask.
extends_documentation_fragment:
  - kubemesh.wireguard._attributes
  - kubemesh.wireguard._attributes.actiongroup_mesh
  - kubemesh.wireguard._attributes.node
attributes:
  check_mode:
    support: full
    details:
      - Says what would be and writes nothing. A run in check mode neither takes a lock nor is stopped by one. It says who is at work, as
        what it shows may be half of that.
  diff_mode:
    support: none
    details:
      - The lock is bookkeeping of a run, not a part of the node's configuration.
  idempotent:
    support: full
    details:
      - Never returns C(changed), whatever it does, as every run takes and releases the lock.
options:
  state:
    description:
      - V(claimed) asks for the node. V(held) says that all nodes of the run are claimed and that it works now, and renews that.
      - V(absent) gives the lock back. It only ever gives back the lock of O(run).
      - A run that holds a node and asks for V(claimed) again goes on holding it.
    type: str
    choices:
      - claimed
      - held
      - absent
    required: true
  run:
    description:
      - Id of the run, different for every run and the same in all its tasks on all nodes. It has 4 to 128 letters, digits, dots, dashes,
        underscores, colons and at signs, and begins with a letter or digit.
      - Whoever gives the same id is the same run, so that the jobs of a workflow can share a lock.
    type: str
    required: true
  started:
    description:
      - When the run began, in seconds since the epoch by the controller's clock, the same in all its tasks on all nodes.
      - Only used to say which of two runs comes first that claim nodes at the same time.
      - Needed with O(state=claimed) and O(state=held).
    type: float
  who:
    description:
      - Who started the run, for people. The default is the user and job of AWX, else the user and host of the controller.
    type: str
  doing:
    description:
      - What the run does, for people, such as the name of its playbook.
    type: str
  lease:
    description:
      - Seconds after which the lock ends if it is not renewed. A run has to renew it more often than that.
    type: int
    default: 900
  wait:
    description:
      - With O(state=absent), seconds to wait until no other run has the lock of this node, after that of O(run) is given back. The task
        does not fail when that takes longer. RV(holder) then says who still has it.
      - A run that gave way can so wait for the other one and then claim its nodes again. One node of the other run is enough, see
        P(kubemesh.wireguard.lock_verdict#filter).
      - The action part waits, on the controller. It does not wait for a run that is known to be dead, and not in check mode.
    type: int
    default: 0
  path:
    description:
      - The lock file. It must not survive a reboot of the node.
      - Only root may write in its directory, which is made if it is missing.
      - A file that cannot be understood counts as somebody's lock for O(lease) seconds after it was written. Then it is replaced.
    type: path
    default: /run/kubemesh/lock.json
  controller:
    description:
      - Which process of the controller the run is. The action part finds out.
    type: dict
    suboptions:
      host:
        description:
          - Host name of the controller.
        type: str
      boot_id:
        description:
          - Its boot id.
        type: str
      namespaces:
        description:
          - Its process and time namespaces.
        type: str
      pid:
        description:
          - The process.
        type: int
      started_ticks:
        description:
          - When that process started, in clock ticks since the boot of the controller.
        type: int
  take_over:
    description:
      - Id of a run that is known to be dead, whose lock may be taken over. The action part sets it.
    type: str
seealso:
  - plugin: kubemesh.wireguard.lock_verdict
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Claim all nodes
  kubemesh.wireguard.lock:
    state: claimed
    run: "{{ run_id }}"
    started: "{{ run_started }}"
    doing: enable
  register: lock

- name: Judge the answers of all nodes
  ansible.builtin.set_fact:
    lock_verdict: "{{ locks | kubemesh.wireguard.lock_verdict(run_id, run_started) }}"
  vars:
    locks: "{{ dict(ansible_play_hosts | zip(ansible_play_hosts | map('extract', hostvars, 'lock'))) }}"
  run_once: true

- name: Hold them, and later renew that
  kubemesh.wireguard.lock:
    state: held
    run: "{{ run_id }}"
    started: "{{ run_started }}"
    doing: enable
  register: lock
  when: lock_verdict.verdict == 'go'

- name: Give them back
  kubemesh.wireguard.lock:
    state: absent
    run: "{{ run_id }}"

- name: Wait up to ten minutes for the run that was met
  kubemesh.wireguard.lock:
    state: absent
    run: "{{ run_id }}"
    wait: 600
  delegate_to: "{{ lock_verdict.wait_on or inventory_hostname }}"
  run_once: true
  when: lock_verdict.wait_on | length > 0
"""

RETURN = r"""
acquired:
  description:
    - Whether the lock of this node is this run's now, or in check mode would be.
    - False means that the run must not change the node, whether it never had the lock or lost it.
  returned: success
  type: bool
  sample: false
holder:
  description:
    - The run whose lock is in force after this task, which may be this one. Null if there is none.
  returned: success
  type: dict
  contains:
    run:
      description: Id of the run.
      type: str
    who:
      description: Who started it.
      type: str
    doing:
      description: What it does.
      type: str
    started:
      description: When it began, by the clock of its controller.
      type: float
    phase:
      description: Whether it has C(claimed) the node or C(held) it.
      type: str
    controller:
      description: Which process of which controller it is, as in O(controller). Null if that is not known.
      type: dict
    lease:
      description: Seconds for which each renewal lasts.
      type: int
  sample:
    run: 5f0c2e7a9b1d
    who: alice@awx-3
    doing: enable
    started: 1764000000.25
    phase: held
    controller:
      host: awx-3
      boot_id: 3e8a1f9c-5a0e-4d52-9a3c-0b9e8d4f7c21
      namespaces: "pid:[4026531836] time:[4026531834]"
      pid: 4242
      started_ticks: 812345
    lease: 900
holder_age_seconds:
  description: Seconds since the holder first had the lock of this node. Null if there is none.
  returned: success
  type: float
  sample: 250.4
expires_in_seconds:
  description: Seconds until its lock ends unless it is renewed. Null if there is none.
  returned: success
  type: float
  sample: 649.6
message:
  description: The result in one sentence.
  returned: success
  type: str
  sample: >-
    another run changes this node: alice@awx-3 has been running enable for 4 min 10 s (run 5f0c2e7a9b1d, process 4242 on awx-3); its lock
    ends in 10 min 50 s unless that run renews it
renewed:
  description: Whether this run had the lock before this task.
  returned: success
  type: bool
  sample: true
released:
  description: Whether this task gave the lock of this run back, or in check mode would have.
  returned: success
  type: bool
  sample: false
revoked:
  description: Whether this run had the lock, did not renew it in time, and lost it to another run. It has to stop.
  returned: success
  type: bool
  sample: false
taken_over:
  description:
    - The run whose lock this task took over, as RV(holder), with the C(reason) C(expired) or C(dead). Null if there was none.
  returned: success
  type: dict
  sample: null
damaged:
  description: What is wrong with the lock file that was found. Empty if nothing is.
  returned: success
  type: str
  sample: ""
check_mode:
  description: Whether this was only a look.
  returned: success
  type: bool
  sample: false
state:
  description: What was asked for.
  returned: success
  type: str
  sample: claimed
run:
  description: The run that asked.
  returned: success
  type: str
  sample: 77aa0c3e1f20
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _lock, _lock_plan
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["claimed", "held", "absent"], "required": True},
            "run": {"type": "str", "required": True},
            "started": {"type": "float"},
            "who": {"type": "str"},
            "doing": {"type": "str"},
            "lease": {"type": "int", "default": 900},
            "wait": {"type": "int", "default": 0},
            "path": {"type": "path", "default": "/run/kubemesh/lock.json"},
            "controller": {"type": "dict", "options": {
                "host": {"type": "str"},
                "boot_id": {"type": "str"},
                "namespaces": {"type": "str"},
                "pid": {"type": "int"},
                "started_ticks": {"type": "int"},
            }},
            "take_over": {"type": "str"},
        },
        required_if=[("state", "claimed", ("started",)), ("state", "held", ("started",))],
        supports_check_mode=True,
    )
    try:
        request = _lock_plan.check_request(module.params)
        result = _lock.transact(module.params["path"], request, module.check_mode)
    except MeshError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, check_mode=module.check_mode, **result)


if __name__ == "__main__":
    main()
