# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small cluster of real ssh hosts on one machine: Debian nodes with systemd (systemd-nspawn), pods, a data plane, a controller.

Everything lives in network namespaces named ``km-LAB-...``: the underlay is a bridge in ``km-LAB-fabric``, so no address of a lab is
reachable from the machine's own network, and several labs may use the same addresses side by side. See README.md in this folder.

Python 3.9 or later, standard library only, root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

STATE_ROOT = Path(os.environ.get("KUBEMESH_LAB_STATE", "/run/kubemesh-lab"))
CACHE_ROOT = Path(os.environ.get("KUBEMESH_LAB_CACHE", "/var/cache/kubemesh-lab"))
MIRROR = os.environ.get("KUBEMESH_LAB_MIRROR", "http://deb.debian.org/debian")
REPOSITORY = Path(__file__).resolve().parents[2]

# What the machine itself needs: command, Debian package.
HOST_PACKAGES = {
    "debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "wg": "wireguard-tools", "wireguard-go": "wireguard-go",
    "nft": "nftables", "ip": "iproute2", "ping": "iputils-ping", "tcpdump": "tcpdump", "ssh": "openssh-client",
    "nsenter": "util-linux", "ethtool": "ethtool", "conntrack": "conntrack",
}
# What a node has. python3-apt and sudo are what any server install has and what ansible's package module and become need.
NODE_PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-apt,sudo,iproute2,iputils-ping,wireguard-tools,wireguard-go,nftables,iptables,conntrack,"
    "procps,kmod,openssh-server"
)
# Releases without wireguard-go: they get that of this machine, with the C library it was linked to.
WITHOUT_WIREGUARD_GO = ("bullseye",)
# Change it whenever build_base() changes: the image of an older recipe is then not used any more.
BASE_RECIPE = "3"

# Documentation and benchmark ranges (RFC 2544, RFC 4193), and the pod ranges that kubeadm and flannel examples use.
UNDERLAY4 = ipaddress.ip_network("198.18.0.0/24")
UNDERLAY6 = ipaddress.ip_network("fd00:18::/64")
CLUSTER4 = ipaddress.ip_network("10.244.0.0/16")
CLUSTER6 = ipaddress.ip_network("fd00:10:244::/48")
MAX_NODES = 200
NODEPORT = 30080
POD_PORT = 8080
BOOT_SECONDS = 90  # a node needs about 4 s alone and 15 s when the machine is busy; then something is broken
KEEP_SECONDS = 10  # how often flannel looks whether its routes are still there (routeCheckRetries in its source)
CLONE_NEWNET = 0x40000000

_LIBC = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """Something the user can read and act upon."""


# ---------------------------------------------------------------------------------------------------------------------------------
# processes and namespaces
# ---------------------------------------------------------------------------------------------------------------------------------


def run(argv, check=True, stdin=None, timeout=120, env=None, quiet=True):
    """Run a command; return the CompletedProcess with text output; LabError with what it said when it fails."""
    result = subprocess.run(
        [str(word) for word in argv], input=stdin, text=True, timeout=timeout, env=env, check=False,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.PIPE if quiet else None)
    if check and result.returncode:
        raise LabError(f"{shlex.join(str(w) for w in argv)}: rc {result.returncode}: {result.stderr or result.stdout}"
                       + (f"\ninput was:\n{stdin}" if stdin else ""))
    return result


def ip_batch(namespace, lines, check=True):
    """Several ip commands in one process, inside a namespace. With check False, failing lines are skipped."""
    lines = [line for line in lines if line]
    if lines:
        force = [] if check else ["-force"]
        run(["ip", "-n", namespace, *force, "-batch", "-"], stdin="\n".join(lines) + "\n", check=check)


def in_namespace(namespace, function, *args):
    """Call function(*args) in a thread of its own that has entered the network namespace (setns works per thread).

    A socket that the function makes stays in that namespace for its whole life, whichever thread uses it later. /proc/sys/net is
    that of the calling thread as well.
    """
    box = {}

    def body():
        try:
            handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if _LIBC.setns(handle, CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise OSError(code, f"setns {namespace}: {os.strerror(code)}")
            finally:
                os.close(handle)
            box["value"] = function(*args)
        except BaseException as error:  # handed to the caller's thread
            box["error"] = error

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]


def _write_sysctls(values):
    for key, value in values.items():
        # Names of devices may hold dots; keys here never do, so slashes are used throughout.
        Path("/proc/sys", key).write_text(str(value))


def sysctl(namespace, values):
    """Set sysctls, given with slashes (``net/ipv4/ip_forward``), inside a namespace."""
    in_namespace(namespace, _write_sysctls, values)


def namespace_exists(namespace):
    return os.path.exists(f"/run/netns/{namespace}")


def add_namespace(namespace):
    if not namespace_exists(namespace):
        run(["ip", "netns", "add", namespace])
        ip_batch(namespace, ["link set lo up"])


def delete_namespace(namespace):
    if namespace_exists(namespace):
        run(["ip", "netns", "del", namespace], check=False)


def start_time(pid):
    """Start time of a process in clock ticks since boot (proc(5) stat field 22); None when there is no such process or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def kill_pids(pids, grace=0.0):
    """End processes given as {pid: start time}: SIGTERM and, after grace seconds, SIGKILL. A reused pid is left alone."""
    def alive():
        return [pid for pid, started in pids.items() if started is not None and start_time(pid) == started]
    if grace:
        for pid in alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while alive() and time.monotonic() < deadline:
            time.sleep(0.05)
    for attempt in range(100):
        left = alive()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02 if attempt < 20 else 0.1)
    raise LabError(f"processes {alive()} do not end after SIGKILL")


def children(pid):
    try:
        text = " ".join(Path(path, "children").read_text() for path in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    return [int(word) for word in text.split()]


def find_leader(pid):
    """Host pid of the init process (pid 1 of its own pid namespace) under a systemd-nspawn process, or None."""
    for child in children(pid):
        try:
            status = Path(f"/proc/{child}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("NSpid:") and len(line.split()) > 2 and line.split()[-1] == "1":
                return child
        found = find_leader(child)
        if found:
            return found
    return None


def atomic_write(path, text, mode=0o644):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.rename(path)


@contextlib.contextmanager
def locked(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------------------
# the base image
# ---------------------------------------------------------------------------------------------------------------------------------

KUBELET_UNIT = """\
[Unit]
Description=Stand-in for kubelet: notes what the network looked like when it would start pods
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/fake-kubelet

[Install]
WantedBy=multi-user.target
"""

KUBELET_SCRIPT = """\
#!/bin/sh
# Notes, before any pod would start, what the network of the node looks like. Public keys only: never a private or preshared one.
{
echo "=== kubelet start boot_id=$(cat /proc/sys/kernel/random/boot_id) uptime=$(cut -d' ' -f1 /proc/uptime) time=$(date +%s.%N)"
for command in "ip -d link" "ip address" "ip rule" "ip -6 rule" "ip route show table all" "ip -6 route show table all" \\
    "wg show all peers" "wg show all latest-handshakes" "wg show all allowed-ips" "nft list tables"; do
    echo "--- $command"
    $command 2>&1
done
echo "=== end"
} >> /var/log/kubelet-start.log
touch /run/fake-kubelet.started
"""

SSHD_CONFIG = """\
UseDNS no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PrintMotd no
MaxSessions 50
MaxStartups 100
"""

MASKED_UNITS = [
    "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
    "dpkg-db-backup.timer", "logrotate.timer", "man-db.timer", "console-getty.service", "getty.target",
    "systemd-timesyncd.service", "systemd-resolved.service", "dev-hugepages.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "systemd-pcrphase.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "systemd-random-seed.service", "proc-sys-fs-binfmt_misc.automount",
    "systemd-tmpfiles-clean.timer",
]

MARKER_BOOT = "/run/fake-kubelet.started"


def write_file(root, path, text, mode=0o644):
    target = Path(root, path.lstrip("/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    target.write_text(text)
    target.chmod(mode)


def build_base(release, say):
    """Path of the base image of a Debian release; built once into the cache, in a temporary folder that is renamed when complete."""
    base = CACHE_ROOT / f"base-{release}-{BASE_RECIPE}"
    with locked(CACHE_ROOT / f"{release}.lock"):
        if base.is_dir():
            return base
        building = CACHE_ROOT / f"building-{release}"
        shutil.rmtree(building, ignore_errors=True)
        say(f"building the {release} base image (about a minute, once)")
        try:
            packages = NODE_PACKAGES.replace("wireguard-go,", "") if release in WITHOUT_WIREGUARD_GO else NODE_PACKAGES
            run(["debootstrap", "--variant=minbase", f"--include={packages}", release, building, MIRROR], timeout=1800)
            if release in WITHOUT_WIREGUARD_GO:
                borrow_wireguard_go(building)
            dress_base(building)
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "kubemesh-lab", "-f", building / "root/lab-controller-key"])
            building.rename(base)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        for old in CACHE_ROOT.glob(f"base-{release}-*"):
            # An overlay whose lower folder goes is undefined, so an image in use stays until nobody has it mounted.
            if old != base and str(old) not in Path("/proc/self/mountinfo").read_text():
                shutil.rmtree(old, ignore_errors=True)
    return base


def borrow_wireguard_go(root):
    """Copy wireguard-go of this machine with its loader and libraries, so that the older C library of the image does not matter.

    It must run in the foreground (-f): to go into the background it would start /proc/self/exe, which is the loader here.
    """
    folder = Path(root, "usr/local/lib/wireguard-go")
    folder.mkdir(parents=True)
    program = Path(shutil.which("wireguard-go")).resolve()
    shutil.copy2(program, folder / "wireguard-go")
    for word in run(["ldd", program]).stdout.split():
        if word.startswith("/"):
            shutil.copy2(Path(word).resolve(), folder / Path(word).name)
    loader = next(path.name for path in folder.iterdir() if path.name.startswith("ld-linux"))
    place = "/usr/local/lib/wireguard-go"
    write_file(root, "/usr/bin/wireguard-go",
               f"#!/bin/sh\nexec {place}/{loader} --library-path {place} {place}/wireguard-go \"$@\"\n", 0o755)


def dress_base(root):
    """Everything that is the same on all nodes: ssh, names, units."""
    for name in ("hostname", "machine-id", "resolv.conf", "nsswitch.conf"):
        Path(root, "etc", name).unlink(missing_ok=True)
    # Nothing answers port 53, so a lookup fails at once; and nsswitch does not even ask.
    write_file(root, "/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    write_file(root, "/etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files\nnetworks: files\n"
               "protocols: files\nservices: files\n")
    hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    for number in range(1, MAX_NODES + 1):
        hosts += [f"{UNDERLAY4[10 + number]} node-{number}", f"{UNDERLAY6[10 + number]} node-{number}"]
    write_file(root, "/etc/hosts", "\n".join(hosts) + "\n")
    write_file(root, "/etc/fstab", "")
    write_file(root, "/etc/ssh/sshd_config.d/lab.conf", SSHD_CONFIG)
    if "sshd_config.d" not in Path(root, "etc/ssh/sshd_config").read_text():
        with open(Path(root, "etc/ssh/sshd_config"), "a", encoding="utf-8") as handle:
            handle.write(SSHD_CONFIG)
    run(["ssh-keygen", "-A", "-f", root])
    write_file(root, "/usr/local/sbin/fake-kubelet", KUBELET_SCRIPT, 0o755)
    write_file(root, "/etc/systemd/system/kubelet.service", KUBELET_UNIT)
    write_file(root, "/etc/systemd/journald.conf.d/lab.conf", "[Journal]\nStorage=persistent\nSystemMaxUse=64M\nForwardToConsole=no\n")
    # A node that does not stop in 10 s is to be seen as a test that takes long, not as one that hangs for 90 s.
    # One thread for each wireguard-go: with two cores for all nodes, more of them only hand each packet to and fro (a sixth of all work).
    write_file(root, "/etc/systemd/system.conf.d/lab.conf",
               "[Manager]\nDefaultTimeoutStopSec=10s\nShowStatus=no\nDefaultEnvironment=GOMAXPROCS=1\n")
    chroot = ["systemctl", f"--root={root}"]
    run([*chroot, "enable", "systemd-networkd.service", "systemd-networkd-wait-online.service", "ssh.service", "kubelet.service"])
    run([*chroot, "mask", *MASKED_UNITS])
    run([*chroot, "set-default", "multi-user.target"])
    shutil.rmtree(Path(root, "var/cache/apt/archives"), ignore_errors=True)
    Path(root, "var/cache/apt/archives/partial").mkdir(parents=True)
    for stamp in ("etc/.updated", "var/.updated"):
        # Newer than /usr, or the first boot runs ldconfig, sysusers and the like (systemd-update-done.service(8)).
        Path(root, stamp).write_text("")


def install_host_packages(say):
    missing = sorted({package for command, package in HOST_PACKAGES.items() if not shutil.which(command)})
    if missing:
        with locked(CACHE_ROOT / "apt.lock"):
            say(f"installing {' '.join(missing)}")
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            run(["apt-get", "update", "-q"], timeout=600, env=env, check=False)
            run(["apt-get", "install", "-qy", "--no-install-recommends", *missing], timeout=900, env=env)


# ---------------------------------------------------------------------------------------------------------------------------------
# the lab
# ---------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """What ``up`` was asked for; kept in lab.json."""

    nodes: int = 3
    pods: int = 2
    families: str = "dual"  # dual, ipv4, ipv6
    dataplane: str = "hostgw"  # hostgw, vxlan, none
    mtu: int = 1500  # bytes, of the underlay
    rp_filter: int = 0  # 0 off, 1 strict, 2 loose
    masquerade: bool = False
    nodeport: bool = False
    release: str = "bookworm"


class Lab:
    """One lab by name. Methods may be called from any process: all state is in files under STATE_ROOT and in the kernel."""

    def __init__(self, name, say=None):
        if not name or len(name) > 20 or not all(c.isalnum() or c == "-" for c in name):
            raise LabError(f"lab name {name!r}: use up to 20 letters, digits and dashes")
        self.name = name
        self.state = STATE_ROOT / name
        self.say = say or (lambda text: print(f"lab {name}: {text}", file=sys.stderr, flush=True))

    # --- names and addresses: pure ----------------------------------------------------------------------------------------------

    @property
    def options(self):
        """The Options of this lab; LabError when it is not up."""
        try:
            return Options(**json.loads((self.state / "lab.json").read_text()))
        except FileNotFoundError:
            raise LabError(f"lab {self.name} is not up; lab.py up {self.name}") from None

    @property
    def nodes(self):
        return [f"node-{number}" for number in range(1, self.options.nodes + 1)]

    @property
    def node_numbers(self):
        return range(1, self.options.nodes + 1)

    @property
    def pods(self):
        options = self.options
        return [f"node-{node}-pod-{pod}" for node in range(1, options.nodes + 1) for pod in range(1, options.pods + 1)]

    def pods_of(self, node):
        return [f"{node}-pod-{pod}" for pod in range(1, self.options.pods + 1)]

    def namespace(self, host):
        """Name of the network namespace of a node, a pod, ``ctl`` or ``fabric``."""
        return f"km-{self.name}-{host}"

    @property
    def families(self):
        """["ipv4", "ipv6"] or one of them."""
        wanted = self.options.families
        return ["ipv4", "ipv6"] if wanted == "dual" else [wanted]

    @staticmethod
    def number(host):
        """2 of node-2 and of node-2-pod-1."""
        return int(host.split("-")[1])

    def node_addresses(self, node):
        """{"ipv4": "198.18.0.11", "ipv6": "fd00:18::b"} of a node (or of a number), families of the lab only."""
        number = node if isinstance(node, int) else self.number(node)
        all_of = {"ipv4": str(UNDERLAY4[10 + number]), "ipv6": str(UNDERLAY6[10 + number])}
        return {family: all_of[family] for family in self.families}

    def pod_cidrs(self, node):
        number = node if isinstance(node, int) else self.number(node)
        all_of = {"ipv4": f"10.244.{number}.0/24", "ipv6": f"fd00:10:244:{number:x}::/64"}
        return {family: all_of[family] for family in self.families}

    def pod_addresses(self, pod):
        """{"ipv4": "10.244.1.10", "ipv6": "fd00:10:244:1::10"} of node-1-pod-1."""
        number, index = self.number(pod), int(pod.split("-")[3])
        all_of = {"ipv4": f"10.244.{number}.{9 + index}", "ipv6": f"fd00:10:244:{number:x}::{9 + index}"}
        return {family: all_of[family] for family in self.families}

    def addresses(self, host):
        """Addresses by family of a node, a pod, ctl or fabric."""
        if host in ("ctl", "fabric"):
            last = 2 if host == "ctl" else 1
            all_of = {"ipv4": str(UNDERLAY4[last]), "ipv6": str(UNDERLAY6[last])}
            return {family: all_of[family] for family in self.families}
        return self.pod_addresses(host) if "-pod-" in host else self.node_addresses(host)

    @property
    def pod_mtu(self):
        """Bytes. VXLAN takes 50 of the underlay over IPv4 and 70 over IPv6."""
        options = self.options
        if options.dataplane != "vxlan":
            return options.mtu
        return options.mtu - (70 if "ipv6" in self.families else 50)

    @staticmethod
    def mac(kind, number):
        """Fixed MAC addresses: a rebooted machine keeps its own, and static VXLAN neighbours can be written down beforehand."""
        return f"0a:{kind:02x}:00:00:{number >> 8:02x}:{number & 255:02x}"

    def hosts(self):
        return [*self.nodes, *self.pods, "ctl", "fabric"]

    # --- up ---------------------------------------------------------------------------------------------------------------------

    def up(self, **options):
        """Build and start the lab; returns when every node runs, has its pods and its data plane. Options as in class Options."""
        wanted = Options(**options)
        if not 1 <= wanted.nodes <= MAX_NODES or not 0 <= wanted.pods <= 200:
            raise LabError(f"nodes {wanted.nodes} (1 to {MAX_NODES}) or pods {wanted.pods} (0 to 200) out of range")
        if wanted.nodeport and not wanted.pods:
            raise LabError("--nodeport needs --pods 1 or more: it leads to the first pod of the next node")
        if os.geteuid():
            raise LabError("the lab needs root")
        install_host_packages(self.say)
        base = build_base(wanted.release, self.say)
        with locked(STATE_ROOT / f".{self.name}.lock"):
            if (self.state / "lab.json").exists():
                raise LabError(f"lab {self.name} exists already; lab.py down {self.name}")
            self.state.mkdir(parents=True, exist_ok=True)
            os.chmod(self.state, 0o700)
            for folder in ("pids", "nodes", "logs", "cp"):
                (self.state / folder).mkdir(exist_ok=True)
            atomic_write(self.state / "lab.json", json.dumps(dataclasses.asdict(wanted), indent=1) + "\n")
            shutil.copy(base / "root/lab-controller-key", self.state / "id_ed25519")
            os.chmod(self.state / "id_ed25519", 0o600)
            self._raise_limits()
            self._make_fabric()
            for node in self.nodes:
                self._make_node(node, base)
            for node in self.nodes:
                self._start_node(node)
            self._write_inventory()
            self._start_pod_servers()
        for node in self.nodes:
            self.wait_ready(node, 1)
        return self

    def _raise_limits(self):
        # Each systemd takes about ten inotify instances of root; the default of 128 is used up by a dozen nodes.
        # wireguard-go as Debian has it takes the default receive buffer, 212,992 bytes; that is full after a fraction of a second in which
        # a busy machine does not run it, and the losses would look like those of the operation under test (measured: 798 of 38,039
        # pings with the default and six busy processes, 3 of 38,615 with 4 MiB). The setting exists once per machine.
        for name, least in (("fs/inotify/max_user_instances", 4096), ("net/core/rmem_default", 16 << 20)):
            path = Path("/proc/sys", name)
            if int(path.read_text()) < least:
                path.write_text(str(least))

    def _make_fabric(self):
        """The underlay: a bridge, with the controller on it. The fabric is the nodes' default gateway and forwards nothing."""
        options = self.options
        fabric, ctl = self.namespace("fabric"), self.namespace("ctl")
        add_namespace(fabric)
        add_namespace(ctl)
        for namespace in (fabric, ctl):
            sysctl(namespace, {"net/ipv4/ip_forward": 0, "net/ipv6/conf/all/forwarding": 0, "net/ipv6/conf/default/accept_dad": 0,
                               "net/ipv6/conf/default/accept_ra": 0})
        ip_batch(fabric, ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                          "link set br0 up",
                          *[f"address add {address}/{64 if ':' in address else 24} dev br0" + (" nodad" if ":" in address else "")
                            for address in self.addresses("fabric").values()]])
        self._plug("ctl", self.mac(0x19, 2))
        ip_batch(ctl, [f"link set eth0 mtu {options.mtu} up",
                       *[f"address add {address}/{64 if ':' in address else 24} dev eth0" + (" nodad" if ":" in address else "")
                         for address in self.addresses("ctl").values()]])

    def _plug(self, host, mac):
        """A veth from the bridge (p-HOST) to eth0 of the host, segmenting in software so that every frame is one real frame."""
        fabric, options = self.namespace("fabric"), self.options
        port = f"p-{host}"
        ip_batch(fabric, [f"link del {port}"], check=False)
        ip_batch(fabric, [f"link add {port} mtu {options.mtu} type veth peer name eth0 netns {self.namespace(host)}",
                          f"link set {port} master br0 up"])
        ip_batch(self.namespace(host), [f"link set eth0 mtu {options.mtu} address {mac}"])
        for namespace, device in ((fabric, port), (self.namespace(host), "eth0")):
            run(["ip", "netns", "exec", namespace, "ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off", "gro", "off"],
                check=False)

    def _make_node(self, node, base):
        """Overlay root file system of a node with its own files, and the namespaces of its pods."""
        options, folder = self.options, self.state / "nodes" / node
        root = folder / "root"
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(root):
            run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={base},upperdir={folder / 'upper'},workdir={folder / 'work'}", root])
        write_file(root, "/etc/hostname", node + "\n")
        write_file(root, "/etc/machine-id", hashlib.sha256(f"{self.name}/{node}".encode()).hexdigest()[:32] + "\n")
        lines = ["[Match]", "Name=eth0", "", "[Network]", "LinkLocalAddressing=ipv6", "IPv6AcceptRA=no", "DHCP=no",
                 "IPv6DuplicateAddressDetection=0"]
        for address in self.node_addresses(node).values():
            lines += [f"Address={address}/{64 if ':' in address else 24}"]
        for address in self.addresses("fabric").values():
            lines += [f"Gateway={address}"]
        write_file(root, "/etc/systemd/network/10-eth0.network", "\n".join([*lines, "", "[Link]", f"MTUBytes={options.mtu}", ""]))
        write_file(root, "/etc/sysctl.d/90-kubemesh-lab.conf", "".join(f"{line}\n" for line in (
            "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv6.conf.default.forwarding=1",
            f"net.ipv4.conf.all.rp_filter={options.rp_filter}", f"net.ipv4.conf.default.rp_filter={options.rp_filter}",
            f"net.ipv4.conf.eth0.rp_filter={options.rp_filter}")))
        Path(root, "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        write_file(root, "/root/.ssh/authorized_keys", (base / "root/lab-controller-key.pub").read_text(), 0o600)
        for name in ("lab-controller-key", "lab-controller-key.pub"):
            Path(root, "root", name).unlink(missing_ok=True)
        for pod in self.pods_of(node):
            add_namespace(self.namespace(pod))
            sysctl(self.namespace(pod), {"net/ipv6/conf/default/accept_dad": 0, "net/ipv6/conf/default/accept_ra": 0})

    def _start_node(self, node):
        folder = self.state / "nodes" / node
        for name in ("ready", "failed", "hard"):
            (folder / name).unlink(missing_ok=True)
        (folder / "boots").unlink(missing_ok=True)
        self.spawn(f"runner-{node}", [sys.executable, Path(__file__).resolve(), "_runner", self.name, node],
                   log=folder / "runner.log")

    def spawn(self, label, argv, log, env=None):
        """Start a background process of this lab in a session of its own and note its pid; returns the Popen."""
        with open(log, "ab") as handle:
            process = subprocess.Popen(
                [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
                env={**(env or os.environ), "KUBEMESH_LAB_MEMBER": str(self.state)})
        self.note_pid(label, process.pid)
        return process

    def note_pid(self, label, pid):
        atomic_write(self.state / "pids" / f"{label}.json", json.dumps({"pid": pid, "start": start_time(pid)}))

    def noted_pid(self, label):
        """Pid of a background process of this lab if it is still running, else None."""
        try:
            noted = json.loads((self.state / "pids" / f"{label}.json").read_text())
        except (OSError, ValueError):
            return None
        return noted["pid"] if noted["start"] is not None and start_time(noted["pid"]) == noted["start"] else None

    def _start_pod_servers(self):
        script = Path(__file__).resolve().with_name("traffic.py")
        if self.pods and script.exists():
            self.spawn("pod-servers", [sys.executable, script, "_pod_servers", self.name], log=self.state / "logs" / "pod-servers.log")

    def wait_ready(self, node, boots, timeout=BOOT_SECONDS):
        """Wait until a node has come up for the boots-th time and has its pods and data plane."""
        folder = self.state / "nodes" / node
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.boots(node) >= boots and (folder / "ready").exists():
                return
            if (folder / "failed").exists():
                break
            if self.noted_pid(f"runner-{node}") is None:
                break
            time.sleep(0.05)
        raise LabError(f"{node} did not come up; its log ({folder}/runner.log, {folder}/console.log) ends with:\n"
                       + self.tail(folder / "runner.log") + self.tail(folder / "console.log"))

    @staticmethod
    def tail(path, size=3000):
        try:
            return path.read_bytes()[-size:].decode(errors="replace")
        except OSError:
            return ""

    def boots(self, node):
        """How often a node has been started since it was last switched on."""
        try:
            return int((self.state / "nodes" / node / "boots").read_text())
        except (OSError, ValueError):
            return 0

    # --- the process that stands for the machine of a node ----------------------------------------------------------------------

    def runner(self, node):
        """Boot the node again and again until it is powered off. Runs as a background process, one per node."""
        folder = self.state / "nodes" / node
        boots = 0
        while True:
            (folder / "ready").unlink(missing_ok=True)
            (folder / "hard").unlink(missing_ok=True)
            self._fresh_network(node)
            with open(folder / "console.log", "ab") as console:
                process = subprocess.Popen(
                    ["systemd-nspawn", "-q", "-D", folder / "root", "--register=no", "--keep-unit", f"--machine={self.namespace(node)}",
                     f"--hostname={node}", f"--network-namespace-path=/run/netns/{self.namespace(node)}",
                     "--capability=CAP_NET_ADMIN,CAP_NET_RAW", "--bind=/dev/net/tun", "--resolv-conf=off", "--timezone=off",
                     "--link-journal=no", "-b"],
                    stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, preexec_fn=lambda: self._enter_cgroup(node),
                    env={**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"})
            self.note_pid(f"nspawn-{node}", process.pid)
            boots += 1
            atomic_write(folder / "boots", str(boots))
            self._bring_up(node, process)
            code = None
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(KEEP_SECONDS)
                if code is None and (folder / "ready").exists():
                    with contextlib.suppress(LabError, OSError), locked(self.state / "fabric.lock"):
                        self.keep_dataplane(node)
            hard = (folder / "hard").exists()
            print(f"boot {boots} ended, rc {code}{', hard' if hard else ''}", flush=True)
            (folder / "ready").unlink(missing_ok=True)
            # 133: nspawn was asked to start again by the init inside and leaves that to us because of --keep-unit.
            again = (folder / "hard").read_text() == "reboot" if hard else code == 133
            if not again:
                break
        # Off: nothing of it is on the network any more, and its pods have lost their links.
        ip_batch(self.namespace("fabric"), [f"link del p-{node}"], check=False)
        delete_namespace(self.namespace(node))
        add_namespace(self.namespace(node))
        (folder / "boots").unlink(missing_ok=True)

    def _cgroups(self, node):
        """Control group folders for a node, one per hierarchy that systemd uses: nodes sharing one would kill each other's services."""
        found = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, dummy, right = line.partition(" - ")
            kind, dummy, options = right.split()[:3]
            if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
                found.append(Path(left.split()[4], "kubemesh-lab", self.name, node))
        return found

    def _enter_cgroup(self, node):
        for folder in self._cgroups(node):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cgroup.procs").write_text("0")
            except OSError as error:
                print(f"{folder}: {error}", file=sys.stderr, flush=True)

    def _fresh_network(self, node):
        """A new network namespace for each boot: no rule, table, device, firewall or sysctl of an earlier boot can be left over.

        A namespace that a process of an earlier boot still holds lives on without its links, where nobody sees it.
        """
        namespace = self.namespace(node)
        with locked(self.state / "fabric.lock"):
            ip_batch(self.namespace("fabric"), [f"link del p-{node}"], check=False)
            if namespace_exists(namespace):
                for pod in self.pods_of(node):
                    ip_batch(self.namespace(pod), ["link del eth0"], check=False)
                delete_namespace(namespace)
            add_namespace(namespace)
            self._plug(node, self.mac(0x18, self.number(node)))
            self._apply_cut(node)

    def _bring_up(self, node, process):
        folder = self.state / "nodes" / node
        deadline = time.monotonic() + BOOT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            leader = find_leader(process.pid)
            if leader and os.path.exists(f"/proc/{leader}/root{MARKER_BOOT}") and self._ssh_answers(node):
                try:
                    with locked(self.state / "fabric.lock"):
                        self.plumb(node)
                except (LabError, OSError) as error:
                    print(f"plumbing failed: {error}", flush=True)
                    (folder / "failed").write_text(str(error))
                    return
                atomic_write(folder / "ready", str(leader))
                return
            time.sleep(0.1)
        if process.poll() is None:
            print(f"kubelet.service or sshd did not start within {BOOT_SECONDS} s", flush=True)
            (folder / "failed").write_text("boot")

    def _ssh_answers(self, node):
        address = next(iter(self.node_addresses(node).values()))

        def connect():
            # From inside the node: a cut node is up as well.
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.settimeout(1)
                return probe.connect_ex((address, 22)) == 0
        try:
            return in_namespace(self.namespace(node), connect)
        except OSError:
            return False

    # --- what a CNI does --------------------------------------------------------------------------------------------------------

    def plumb(self, node):
        """Pods, bridge, data plane, masquerade and NodePort of a node; safe to repeat: what is there stays untouched."""
        self._plumb_pods(node)
        self._plumb_dataplane(node)
        self._plumb_nat(node)

    def _plumb_pods(self, node):
        namespace, mtu = self.namespace(node), self.pod_mtu
        present = {link["ifname"] for link in json.loads(run(["ip", "-n", namespace, "-j", "link"]).stdout)}
        cidrs = [ipaddress.ip_network(cidr) for cidr in self.pod_cidrs(node).values()]
        if "cni0" not in present:
            sysctl(namespace, {"net/ipv6/conf/default/accept_dad": 0})
            ip_batch(namespace, [f"link add cni0 mtu {mtu} address {self.mac(0xc0, self.number(node))} type bridge forward_delay 0",
                                 "link set cni0 type bridge mcast_snooping 0", "link set cni0 up",
                                 *[f"address add {cidr[1]}/{cidr.prefixlen} dev cni0" + (" nodad" if cidr.version == 6 else "")
                                   for cidr in cidrs]])
        for index, pod in enumerate(self.pods_of(node), 1):
            device = f"veth-pod-{index}"
            if device in present:
                continue
            ip_batch(namespace, [f"link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {self.namespace(pod)}",
                                 f"link set {device} master cni0 up"])
            ip_batch(self.namespace(pod), [
                "link set eth0 up",
                *[f"address add {address}/{64 if ':' in address else 24} dev eth0" + (" nodad" if ":" in address else "")
                  for address in self.pod_addresses(pod).values()],
                *[f"route add default via {cidr[1]}" for cidr in cidrs]])

    def _plumb_dataplane(self, node):
        """Routes to the pods of all other nodes, as flannel's host-gw and vxlan back ends make them."""
        options, namespace, number = self.options, self.namespace(node), self.number(node)
        if options.dataplane == "none":
            return
        lines, mine = [], self.node_addresses(node)
        devices = {"ipv4": ("flannel.1", 0xf1, 50), "ipv6": ("flannel-v6.1", 0xf6, 70)}
        if options.dataplane == "vxlan":
            present = {link["ifname"] for link in json.loads(run(["ip", "-n", namespace, "-j", "link"]).stdout)}
            sysctl(namespace, {"net/ipv6/conf/default/accept_dad": 0})
            for family, local in mine.items():
                device, kind, overhead = devices[family]
                if device in present:
                    continue
                base = ipaddress.ip_network(self.pod_cidrs(node)[family])
                lines += [f"link add {device} address {self.mac(kind, number)} mtu {options.mtu - overhead} type vxlan id 1 local {local}"
                          f" dev eth0 dstport 8472 nolearning" + (" udp6zerocsumrx" if family == "ipv6" else ""),
                          f"link set {device} up",
                          f"address add {base[0]}/{base.max_prefixlen} dev {device}" + (" nodad" if family == "ipv6" else "")]
        for peer in self.node_numbers:
            if peer == number:
                continue
            for family, address in self.node_addresses(peer).items():
                cidr = ipaddress.ip_network(self.pod_cidrs(peer)[family])
                if options.dataplane == "hostgw":
                    lines += [f"route replace {cidr} via {address} dev eth0"]
                else:
                    device, kind, dummy = devices[family]
                    mac = self.mac(kind, peer)
                    lines += [f"neigh replace {cidr[0]} lladdr {mac} dev {device} nud permanent",
                              f"route replace {cidr} via {cidr[0]} dev {device} onlink"]
        ip_batch(namespace, lines)
        if options.dataplane == "vxlan":
            fdb = [f"fdb replace {self.mac(devices[family][1], peer)} dev {devices[family][0]} dst {address} self permanent"
                   for peer in self.node_numbers if peer != number for family, address in self.node_addresses(peer).items()]
            if fdb:
                run(["ip", "netns", "exec", namespace, "bridge", "-batch", "-"], stdin="\n".join(fdb) + "\n")

    def keep_dataplane(self, node):
        """Put back routes of the data plane that somebody deleted (systemd-networkd does when it is restarted), as a CNI's daemon does."""
        if self.options.dataplane == "none":
            return
        present = set()
        for family in self.families:
            routes = json.loads(run(["ip", "-n", self.namespace(node), "-j", "-4" if family == "ipv4" else "-6", "route"]).stdout)
            present |= {route["dst"] for route in routes}
        wanted = {cidr for peer in self.node_numbers if peer != self.number(node) for cidr in self.pod_cidrs(peer).values()}
        if wanted - present:
            self._plumb_dataplane(node)

    def _plumb_nat(self, node):
        """Masquerade as kubenet does it, NodePort as kube-proxy does it; in one transaction that replaces the former table."""
        options, number = self.options, self.number(node)
        text = []
        for family, word, cluster in (("ipv4", "ip", CLUSTER4), ("ipv6", "ip6", CLUSTER6)):
            if family not in self.families or not (options.masquerade or options.nodeport):
                continue
            pre, post = [], []
            if options.nodeport:
                target = self.pod_addresses(f"node-{number % options.nodes + 1}-pod-1")[family]
                to = f"[{target}]:{POD_PORT}" if family == "ipv6" else f"{target}:{POD_PORT}"
                pre = [f"fib daddr type local tcp dport {NODEPORT} meta mark set meta mark or 0x4000 dnat to {to}"]
                post = ["meta mark and 0x4000 == 0x4000 meta mark set meta mark xor 0x4000 masquerade"]
            if options.masquerade:
                post += [(f"{word} saddr {self.pod_cidrs(node)[family]} {word} daddr != {cluster} fib daddr type != local"
                         " oifname != \"cni0\" masquerade")]
            body = [f"table {word} km-lab {{", "chain prerouting { type nat hook prerouting priority -100; policy accept;", *pre, "}",
                    "chain output { type nat hook output priority -100; policy accept;", *pre, "}",
                    "chain postrouting { type nat hook postrouting priority 100; policy accept;", *post, "}", "}"]
            text += [f"table {word} km-lab {{}}", f"delete table {word} km-lab", *body]
        if text:
            run(["ip", "netns", "exec", self.namespace(node), "nft", "-f", "-"], stdin="\n".join(text) + "\n")

    # --- life -------------------------------------------------------------------------------------------------------------------

    def add_node(self):
        """One more node, on the same fabric, with routes to it on all others; returns its name."""
        with locked(STATE_ROOT / f".{self.name}.lock"):
            options = self.options
            options.nodes += 1
            if options.nodes > MAX_NODES:
                raise LabError(f"{MAX_NODES} nodes are the most")
            node = f"node-{options.nodes}"
            base = CACHE_ROOT / f"base-{options.release}-{BASE_RECIPE}"
            atomic_write(self.state / "lab.json", json.dumps(dataclasses.asdict(options), indent=1) + "\n")
            self._make_node(node, base)
            self._start_node(node)
            self._write_inventory()
            others = [other for other in self.nodes[:-1] if (self.state / "nodes" / other / "ready").exists()]
            with locked(self.state / "fabric.lock"):
                for other in others:
                    self._plumb_dataplane(other)
        pid = self.noted_pid("pod-servers")
        if pid:
            os.kill(pid, signal.SIGHUP)  # serve the new pods too
        self.wait_ready(node, 1)
        if pid and self.options.nodeport:
            self._wait_served(f"{node}-pod-1")
        # A NodePort leads to the new node's pod only when that answers, as kube-proxy sees to it by endpoints.
        with locked(self.state / "fabric.lock"):
            for other in others:
                self._plumb_nat(other)
        return node

    def _wait_served(self, pod):
        """Until something listens in a pod; LabError after 20 s."""
        for dummy in range(100):
            if self.exec(pod, ["ss", "-Hltn"]).stdout.strip():
                return
            time.sleep(0.2)
        raise LabError(f"nothing listens in {pod}")

    def leader(self, node):
        """Host pid of a node's init; LabError when the node is off."""
        nspawn = self.noted_pid(f"nspawn-{node}")
        found = find_leader(nspawn) if nspawn else None
        if not found:
            raise LabError(f"{node} of lab {self.name} is off; lab.py poweron {self.name} {node}")
        return found

    def exec_argv(self, host, argv):
        """The command line that runs argv inside a node (all its namespaces), a pod, ctl or fabric."""
        if host not in self.hosts():
            raise LabError(f"no host {host!r} in lab {self.name}; it has {', '.join(self.hosts())}")
        if host.startswith("node-") and "-pod-" not in host:
            return ["nsenter", "-t", str(self.leader(host)), "-m", "-u", "-i", "-n", "-p", "--root", "--wd", "--", "env", "-i",
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LC_ALL=C.UTF-8",
                    "TERM=dumb", *argv]
        return ["ip", "netns", "exec", self.namespace(host), *argv]

    def exec(self, host, argv, check=True, stdin=None, timeout=120, quiet=True):
        """Run a command on a host of the lab; CompletedProcess with text output, LabError when it fails and check is set."""
        return run(self.exec_argv(host, argv), check=check, stdin=stdin, timeout=timeout, quiet=quiet)

    def reboot(self, node, wait=True, hard=False):
        """Reboot a node; hard is the power button: no unit is stopped. With wait, until it is up with pods and data plane again."""
        before = self.boots(node)
        if hard:
            (self.state / "nodes" / node / "hard").write_text("reboot")
            kill_pids({self.leader(node): start_time(self.leader(node))})
        else:
            self.exec(node, ["systemctl", "reboot"], check=False)
        if wait:
            self.wait_ready(node, before + 1)

    def poweroff(self, node, hard=False):
        """Switch a node off and wait until it is; its pods lose their links."""
        if self.noted_pid(f"nspawn-{node}") is None:
            return
        if hard:
            (self.state / "nodes" / node / "hard").write_text("off")
            kill_pids({self.leader(node): start_time(self.leader(node))})
        else:
            self.exec(node, ["systemctl", "poweroff"], check=False)
        deadline = time.monotonic() + 60
        while self.noted_pid(f"runner-{node}") is not None:
            if time.monotonic() > deadline:
                raise LabError(f"{node} is not off after 60 s")
            time.sleep(0.05)

    def poweron(self, node, wait=True):
        if self.noted_pid(f"runner-{node}") is None:
            self._start_node(node)
        if wait:
            self.wait_ready(node, 1)

    def cut(self, node, carrier=False):
        """Part a node from the underlay; it stays so over reboots until heal.

        Without carrier the switch port stops forwarding and the node's own link stays up, as when a network fails somewhere else. With
        carrier the node sees its cable pulled: systemd-networkd then takes the addresses off, and the kernel all routes through eth0.
        """
        (self.state / "nodes" / node / "cut").write_text("carrier" if carrier else "port")
        self._apply_cut(node)

    def _apply_cut(self, node):
        """Bring the port of a node into the state that the file says."""
        try:
            how = (self.state / "nodes" / node / "cut").read_text()
        except FileNotFoundError:
            how = ""
        fabric, port = self.namespace("fabric"), f"p-{node}"
        ip_batch(fabric, [f"link set {port} {'down' if how == 'carrier' else 'up'}"])
        if how != "carrier":
            # Out of the bridge, not "state disabled": the kernel sets that back when a port comes up.
            ip_batch(fabric, [f"link set {port} {'nomaster' if how else 'master br0'}"])

    def heal(self, node, wait=True):
        """Plug a node in again; with wait, until its addresses and data plane are back."""
        (self.state / "nodes" / node / "cut").unlink(missing_ok=True)
        self._apply_cut(node)
        if not wait or not (self.state / "nodes" / node / "ready").exists():
            return
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            present = run(["ip", "-n", self.namespace(node), "-br", "address", "show", "eth0"]).stdout
            if all(f"{address}/" in present for address in self.node_addresses(node).values()):
                with locked(self.state / "fabric.lock"):
                    self.keep_dataplane(node)
                return
            time.sleep(0.1)
        raise LabError(f"{node} has no address on eth0 20 s after its cable was plugged in")

    # --- what ansible needs -----------------------------------------------------------------------------------------------------

    def inventory(self):
        """Path of the inventory (YAML)."""
        return self.state / "inventory.yml"

    def nodes_file(self):
        """Path of the saved Kubernetes NodeList (JSON)."""
        return self.state / "nodes.json"

    def _write_inventory(self):
        common = ("-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=10 "
                  # A connection that is kept open to a host that is gone would hang for a quarter of an hour.
                  "-o ServerAliveInterval=5 -o ServerAliveCountMax=2 "
                  "-o ControlMaster=auto -o ControlPersist=60s")
        lines = ["---", "all:", "  vars:", "    ansible_user: root", f"    ansible_ssh_private_key_file: {self.state / 'id_ed25519'}",
                 f"    ansible_ssh_common_args: {json.dumps(common)}", "    ansible_python_interpreter: /usr/bin/python3", "  children:",
                 "    k8s_cluster:", "      hosts:"]
        for node in self.nodes:
            lines += [f"        {node}:", f"          ansible_host: {json.dumps(next(iter(self.node_addresses(node).values())))}",
                      f"          mesh_pod_cidrs: {json.dumps(list(self.pod_cidrs(node).values()))}",
                      f"          mesh_node_addresses: {json.dumps(list(self.node_addresses(node).values()))}"]
        lines += ["    kube_control_plane:", "      hosts:", "        node-1: {}"]
        if self.options.nodes > 1:
            lines += ["    kube_node:", "      hosts:", *[f"        {node}: {{}}" for node in self.nodes[1:]]]
        atomic_write(self.inventory(), "\n".join(lines) + "\n")
        atomic_write(self.nodes_file(), json.dumps(self.node_list(), indent=1) + "\n")

    def node_list(self):
        """The NodeList that the API server of this cluster would answer."""
        items = []
        for node in self.nodes:
            cidrs = list(self.pod_cidrs(node).values())
            labels = {"kubernetes.io/arch": "amd64", "kubernetes.io/hostname": node, "kubernetes.io/os": "linux"}
            if node == "node-1":
                labels["node-role.kubernetes.io/control-plane"] = ""
            items.append({
                "metadata": {"name": node, "uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{node}.{self.name}.lab")),
                             "resourceVersion": str(100 + self.number(node)), "creationTimestamp": "2026-11-23T03:20:32Z", "labels": labels,
                             "annotations": {}},
                "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
                "status": {"addresses": [*[{"type": "InternalIP", "address": a} for a in self.node_addresses(node).values()],
                                         {"type": "Hostname", "address": node}],
                           "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady",
                                           "lastHeartbeatTime": "2026-11-23T03:20:32Z", "lastTransitionTime": "2026-11-23T03:20:32Z",
                                           "message": "kubelet is posting ready status"}],
                           "nodeInfo": {"operatingSystem": "linux", "architecture": "amd64"}}})
        return {"kind": "NodeList", "apiVersion": "v1", "metadata": {"resourceVersion": str(100 + len(items))}, "items": items}

    def ansible_env(self, venv=None):
        """Environment for ansible commands against this lab; what the caller has set stays."""
        env = dict(os.environ)
        if "ANSIBLE_COLLECTIONS_PATH" not in env:
            link = self.state / "collections/ansible_collections/kubemesh/wireguard"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(REPOSITORY)
            env["ANSIBLE_COLLECTIONS_PATH"] = str(self.state / "collections")
        for key, value in {"ANSIBLE_HOST_KEY_CHECKING": "False", "ANSIBLE_PIPELINING": "True", "ANSIBLE_NOCOLOR": "1",
                           "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.state / "cp"), "ANSIBLE_SSH_CONTROL_PATH": "%(directory)s/%%C",
                           "LC_ALL": "C.UTF-8", "ANSIBLE_LOCALHOST_WARNING": "False", "ANSIBLE_SSH_RETRIES": "2",
                           "PYTHONUNBUFFERED": "1"}.items():
            env.setdefault(key, value)
        venv = venv or os.environ.get("KUBEMESH_LAB_VENV")
        if venv:
            env["PATH"] = f"{venv}/bin:{env['PATH']}"
        env["KUBEMESH_LAB_MEMBER"] = str(self.state)
        return env

    def start_ansible_playbook(self, args, log=None, python_venv=None, env=None, program="ansible-playbook"):
        """ansible-playbook with the lab's inventory in the controller's namespace, a session of its own: the Popen object.

        ``log``: an open file for what it prints; by default nowhere.
        """
        dummy = self.options  # an error says so when the lab is not up
        argv = ["ip", "netns", "exec", self.namespace("ctl"), program, "-i", str(self.inventory()), *[str(arg) for arg in args]]
        if log is not None:
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log or subprocess.DEVNULL, stderr=subprocess.STDOUT,
                                   start_new_session=True, env={**self.ansible_env(python_venv), **(env or {})})
        self.note_pid(f"playbook-{process.pid}", process.pid)
        return process

    def ansible_playbook(self, args, python_venv=None, timeout=900, env=None, quiet=True, program="ansible-playbook"):
        """Run ansible-playbook with the lab's inventory in the controller's namespace.

        Returns a CompletedProcess: returncode (124 after a timeout, its whole process group is then ended), stdout (with stderr) and,
        as attribute log, the path of the file that holds the same output.
        """
        number = len(list((self.state / "logs").glob("playbook-*.log"))) + 1
        log = self.state / "logs" / f"playbook-{number:03d}.log"
        with open(log, "wb") as handle:
            process = self.start_ansible_playbook(args, handle, python_venv, env, program)
            shown = handle.tell()  # what it prints, not how it was called
            deadline = time.monotonic() + timeout
            code = None
            try:
                while code is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = process.wait(0.2)
                    if not quiet:
                        shown = self._show(log, shown)
                    if code is None and time.monotonic() > deadline:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                        code = 124
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            finally:
                (self.state / "pids" / f"playbook-{process.pid}.json").unlink(missing_ok=True)
        result = subprocess.CompletedProcess(process.args, code, log.read_text(errors="replace"), "")
        result.log = log
        return result

    @staticmethod
    def _show(log, offset):
        with open(log, "rb") as handle:
            handle.seek(offset)
            data = handle.read()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return offset + len(data)

    def drops(self):
        """Packets that each node dropped for want of a buffer or a turn on the processor, as counted since its boot.

        {"node-1": {"udp_receive_buffer": 0, "devices": {"wgmesh0": 0}}}: when these grow, a loss is the machine's, not the mesh's. The
        devices are those that are neither Ethernet nor loopback: the transmit queues of WireGuard and TUN devices.
        """
        def receive_errors():
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
            names, values = (line.split() for line in lines if line.startswith("Udp:"))
            total = int(dict(zip(names, values))["RcvbufErrors"])
            for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
                if line.startswith("Udp6RcvbufErrors"):
                    total += int(line.split()[1])
            return total
        out = {}
        for node in self.nodes:
            namespace = self.namespace(node)
            if not namespace_exists(namespace):
                continue
            links = json.loads(run(["ip", "-n", namespace, "-s", "-j", "link"]).stdout)
            out[node] = {"udp_receive_buffer": in_namespace(namespace, receive_errors),
                         "devices": {link["ifname"]: link["stats64"]["tx"]["dropped"] for link in links if link["link_type"] == "none"}}
        return out

    # --- status and down --------------------------------------------------------------------------------------------------------

    def status(self):
        """What runs, as plain data."""
        out = {"name": self.name, "options": dataclasses.asdict(self.options), "state": str(self.state), "nodes": {}}
        for node in self.nodes:
            folder = self.state / "nodes" / node
            pid = self.noted_pid(f"nspawn-{node}")
            out["nodes"][node] = {"running": pid is not None, "ready": (folder / "ready").exists(), "boots": self.boots(node),
                                  "cut": (folder / "cut").exists(), "leader": find_leader(pid) if pid else None,
                                  "addresses": self.node_addresses(node), "pod_cidrs": self.pod_cidrs(node),
                                  "pods": {pod: self.pod_addresses(pod) for pod in self.pods_of(node)}}
        return out

    def namespaces(self):
        """Names of the network namespaces of this lab that exist."""
        try:
            names = os.listdir("/run/netns")
        except FileNotFoundError:
            return []
        # The exact shapes, not the prefix: a lab "a" must not touch those of a lab "a-b".

        def mine(rest):
            words = rest.split("-")
            return rest in ("ctl", "fabric") or (words[0] == "node" and len(words) in (2, 4) and words[1].isdigit()
                                                 and (len(words) == 2 or (words[2] == "pod" and words[3].isdigit())))
        prefix = f"km-{self.name}-"
        return sorted(name for name in names if name.startswith(prefix) and mine(name[len(prefix):]))

    def members(self):
        """{pid: start time} of every process of this lab: started by it (environment) or living in one of its namespaces."""
        mark = f"KUBEMESH_LAB_MEMBER={self.state}".encode()
        inodes = set()
        for namespace in self.namespaces():
            with contextlib.suppress(OSError):
                inodes.add(os.stat(f"/run/netns/{namespace}").st_ino)
        leaders = {self.noted_pid(path.stem) for path in (self.state / "pids").glob("*.json")} if self.state.exists() else set()
        pids = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            pid = int(entry)
            try:
                started = start_time(pid)
                if (pid in leaders or os.stat(f"/proc/{pid}/ns/net").st_ino in inodes
                        or mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    pids[pid] = started
            except OSError:
                continue
        return {pid: started for pid, started in pids.items() if started is not None}

    def down(self):
        """Remove everything of this lab, however far ``up`` came; nothing to do is fine."""
        with locked(STATE_ROOT / f".{self.name}.lock"):
            for dummy in range(5):
                members = self.members()
                if not members:
                    break
                # Runners first, or they would start their nodes again.
                runners = {}
                for path in (self.state / "pids").glob("runner-*.json"):
                    pid = self.noted_pid(path.stem)
                    if pid in members:
                        runners[pid] = members[pid]
                kill_pids(runners)
                kill_pids(self.members())
            else:
                raise LabError(f"processes of lab {self.name} keep coming back: {sorted(self.members())}")
            for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
                point = line.split()[4]
                if point.startswith(f"{self.state}/"):
                    run(["umount", "-l", point], check=False)
            for namespace in self.namespaces():
                delete_namespace(namespace)
            for folder in self._cgroups("x"):
                self._remove_cgroup(folder.parent)
                with contextlib.suppress(OSError):
                    folder.parent.parent.rmdir()
            if f" {self.state}/" in Path("/proc/self/mountinfo").read_text():
                raise LabError(f"something under {self.state} is still mounted and does not let go; nothing there was removed")
            if self.state.exists():
                shutil.rmtree(self.state)
        (STATE_ROOT / f".{self.name}.lock").unlink(missing_ok=True)

    @staticmethod
    def _remove_cgroup(top):
        for folder, dummy, dummy2 in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def main(argv=None):
    """Command line; see README.md."""
    parser = argparse.ArgumentParser(prog="lab.py", description="Test clusters of real ssh hosts in namespaces of this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name, text, node=False):
        sub = verbs.add_parser(name, help=text)
        sub.add_argument("name", help="name of the lab")
        if node:
            sub.add_argument("node")
        return sub

    up = verb("up", "build and start a lab")
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        choices = {"families": ["dual", "ipv4", "ipv6"], "dataplane": ["hostgw", "vxlan", "none"], "rp_filter": [0, 1, 2]}.get(field.name)
        if isinstance(field.default, bool):
            up.add_argument(flag, dest=field.name, action="store_true")
        else:
            up.add_argument(flag, dest=field.name, type=type(field.default), default=field.default, choices=choices)
    verb("down", "remove a lab completely")
    verb("add-node", "one more node")
    execute = verb("exec", "run a command on a node, a pod, ctl or fabric")
    execute.add_argument("host")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    reboot = verb("reboot", "reboot a node", node=True)
    reboot.add_argument("--wait", action="store_true")
    reboot.add_argument("--hard", action="store_true")
    verb("poweroff", "switch a node off", node=True).add_argument("--hard", action="store_true")
    verb("poweron", "switch a node on and wait for it", node=True)
    verb("cut", "part a node from the underlay", node=True).add_argument("--carrier", action="store_true", help="its link goes down too")
    verb("heal", "undo cut", node=True)
    verb("inventory", "path of the inventory; nodes.json lies beside it")
    verb("status", "what runs, as JSON")
    playbook = verb("playbook", "run ansible-playbook in the controller's namespace")
    playbook.add_argument("--venv", help="virtual environment with ansible-core (default: KUBEMESH_LAB_VENV, PATH)")
    playbook.add_argument("--timeout", type=float, default=900)
    playbook.add_argument("args", nargs=argparse.REMAINDER)
    verb("_runner", argparse.SUPPRESS, node=True)
    args = parser.parse_args(argv)

    def rest(words):
        return words[1:] if words[:1] == ["--"] else words

    try:
        lab = Lab(args.name)
        if args.verb == "up":
            started = time.monotonic()
            lab.up(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
            lab.say(f"up after {time.monotonic() - started:.1f} s; inventory {lab.inventory()}")
        elif args.verb == "exec":
            words = lab.exec_argv(args.host, rest(args.command))
            os.execvp(words[0], words)
        elif args.verb == "reboot":
            lab.reboot(args.node, wait=args.wait, hard=args.hard)
        elif args.verb == "poweroff":
            lab.poweroff(args.node, hard=args.hard)
        elif args.verb == "cut":
            lab.cut(args.node, carrier=args.carrier)
        elif args.verb == "add-node":
            print(lab.add_node())
        elif args.verb == "inventory":
            dummy = lab.options  # an error says so when the lab is not up
            print(lab.inventory())
        elif args.verb == "status":
            print(json.dumps(lab.status(), indent=1))
        elif args.verb == "playbook":
            return lab.ansible_playbook(rest(args.args), python_venv=args.venv, timeout=args.timeout, quiet=False).returncode
        elif args.verb == "_runner":
            lab.runner(args.node)
        elif args.verb == "down":
            lab.down()
        else:
            getattr(lab, args.verb)(args.node)
    except LabError as error:
        print(f"lab.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
