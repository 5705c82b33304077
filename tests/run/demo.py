# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The demonstration behind C(make demo) and C(make demo-down).

C(up) builds a throw-away cluster of three hosts with two pods each in network namespaces of this machine, encrypts it with
C(kubemesh.wireguard.enable) over ssh while everything pings everything, and ends with 0 only if no packet was lost and a marker that was
readable on the wire before cannot be seen afterwards. C(down) removes what C(up) made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "lab")]

import prepare

NAME = "demo"
PINGS_PER_SECOND = 20

# Seconds of looking at the wire, before and after. Markers are sent 10 times a second between all pods.
LOOK = 5


# For reading: nothing about tasks that do nothing. Not result_format yaml, which breaks the lines of tables.
ANSIBLE_CFG = """\
[defaults]
display_skipped_hosts = false
nocows = true
"""


def heading(text):
    """Print what comes next."""
    print(f"\n== {text}", flush=True)


def cached():
    """The entries of the cache that cost time or space to make, as a set of paths."""
    cache = prepare.cache_dir()
    return {str(path) for pattern in ("*", "venv/*") for path in cache.glob(pattern) if path.name not in ("locks", "venv")}


def debian_packages():
    """The names of all Debian packages of this machine."""
    command = ["dpkg-query", "-W", "-f", "${Package} ${Status}\\n"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in lines if line.endswith(" installed")}


def made(place):
    """What earlier runs of the demonstration brought to this machine, as they noted it."""
    record = place / "made.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"cache": [], "packages": []}


def look_at_the_wire(traffic, lab):
    """Send markers from pod to pod for a while and search every frame between the nodes for them. Returns both reports."""
    sniffer = traffic.start_sniffer(lab)
    markers = traffic.start_markers(lab)
    time.sleep(LOOK)
    sent = markers.stop()
    return sent, sniffer.stop()


def tell_the_wire(seen):
    """One line on what the sniffer saw."""
    clear, encrypted = seen["clear_frames"], seen["wireguard_frames"]
    print(f"   {seen['frames']} frames between the nodes: {clear} with the marker in clear, {encrypted} of WireGuard")


def tell_the_pings(report):
    """The loss by kind of flow and family."""
    totals = report["totals"]
    width = max(len(name) for name in totals)
    for name, counts in totals.items():
        print(f"   {name:<{width}}  {counts['sent']:>7} sent  {counts['lost']:>4} lost")
    print(f"   {'all':<{width}}  {report['sent']:>7} sent  {report['lost']:>4} lost")


def up():
    """Build, encrypt, show. Returns the exit status."""
    if os.geteuid() != 0:
        sys.exit("make demo makes network namespaces and containers, so it needs root")
    before, packages = cached(), debian_packages()
    heading("Preparing: virtual environment, collection")
    venv = prepare.venv_run()
    place = prepare.cache_dir() / "demo"
    earlier = made(place)
    shutil.rmtree(place, ignore_errors=True)
    archive, collections = prepare.install_artifact(venv, place)
    (place / "ansible.cfg").write_text(ANSIBLE_CFG, encoding="utf-8")
    print(f"   {archive.name}, installed as a user would", flush=True)

    import lab as labs
    import traffic

    heading("Building a cluster: 3 hosts with systemd, ssh and 2 pods each, IPv4 and IPv6")
    lab = labs.Lab(NAME)
    lab.down()
    lab.up(nodes=3, pods=2, families="dual")
    record = {"cache": cached() - before, "packages": debian_packages() - packages}
    (place / "made.json").write_text(json.dumps({key: sorted({*names, *earlier[key]}) for key, names in record.items()}), encoding="utf-8")

    heading(f"The wire before: markers from pod to pod, {LOOK} s")
    sent_before, wire_before = look_at_the_wire(traffic, lab)
    tell_the_wire(wire_before)

    heading(f"Everything pings everything, {PINGS_PER_SECOND} times a second, while the mesh is switched on")
    pings = traffic.start_pings(lab, rate=PINGS_PER_SECOND)
    environment = {
        "ANSIBLE_COLLECTIONS_PATH": str(collections),
        "ANSIBLE_CONFIG": str(place / "ansible.cfg"),
        "ANSIBLE_HOME": str(place / "ansible-home"),
    }
    arguments = ["-e", "mesh_nodes_source=file", "-e", f"mesh_nodes_file={lab.nodes_file()}"]
    print(f"   $ ansible-playbook -i inventory.yml kubemesh.wireguard.enable {' '.join(arguments)}\n", flush=True)
    result = lab.ansible_playbook(["kubemesh.wireguard.enable", *arguments], python_venv=str(venv), env=environment, quiet=False)

    heading(f"The wire after: markers from pod to pod, {LOOK} s")
    sent_after, wire_after = look_at_the_wire(traffic, lab)
    tell_the_wire(wire_after)

    heading("The pings that ran all the while")
    report = pings.stop()
    tell_the_pings(report)

    findings = []
    if result.returncode:
        findings.append(f"enable ended with {result.returncode}; its output is in {result.log}")
    if report["lost"] or not report["sent"]:
        findings.append(f"{report['lost']} of {report['sent']} pings were lost")
    if not wire_before["clear_frames"]:
        findings.append("the marker was not seen before, so not seeing it afterwards proves nothing")
    if wire_after["clear_frames"] or not wire_after["wireguard_frames"]:
        findings.append(f"{wire_after['clear_frames']} frames in clear and {wire_after['wireguard_frames']} of WireGuard afterwards")
    for when, sent in (("before", sent_before), ("after", sent_after)):
        if not sent["received"]:
            findings.append(f"no marker arrived {when}")

    heading("Result")
    for finding in findings:
        print(f"   FAILED: {finding}")
    if not findings:
        print(f"   {report['sent']} pings, {report['lost']} lost. Marker in clear: {wire_before['clear_frames']} frames before, 0 after.")
    script = f"python3 tests/lab/lab.py exec {NAME}"
    print(f"   Look around:   {script} node-1 -- wg show\n                  {script} node-1-pod-1 -- ping -c 3 10.244.2.10")
    print(f"   Use it:        python3 tests/lab/lab.py playbook --venv {venv} {NAME} -- kubemesh.wireguard.status")
    print("   Remove it all: make demo-down", flush=True)
    return 1 if findings else 0


def down():
    """Remove the cluster and what was made for it. Returns the exit status."""
    import lab as labs

    labs.Lab(NAME).down()
    place = prepare.cache_dir() / "demo"
    record = made(place)
    for path in [*record["cache"], str(place)]:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)
    # Empty directories go as well, but locks only with the last of what they guard.
    cache = prepare.cache_dir()
    for directory in (cache / "venv", cache):
        if directory.is_dir() and all(path.name == "locks" or path.suffix == ".lock" for path in directory.iterdir()):
            shutil.rmtree(directory)
    print("The demonstration is gone: hosts, pods, namespaces, environment and images.")
    if record["packages"]:
        print(f"Debian packages that it installed stay; to remove them: apt-get remove {' '.join(record['packages'])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit({"up": up, "down": down}[sys.argv[1]]())
    except prepare.PrepareError as error:
        sys.exit(f"make demo: {error}")
