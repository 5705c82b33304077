# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A throw-away virtual machine with the real WireGuard kernel module, for tests on machines that have none.

    vm.py build                     make the image once (about 2 minutes, needs root and the Debian archive), print its folder
    vm.py run [options] PAYLOAD     boot it, run PAYLOAD/run.sh in it, bring its results back, exit with its exit code

The machine is emulated (qemu TCG), because test machines have no KVM. Two ways to start it, chosen per run because booting is most of
the cost of a short test: *direct* (a shell script as init: 4 s) and *systemd* (13 s; for what restores a mesh at boot).

What PAYLOAD/run.sh finds: its folder read-only at /payload, KM_RESULTS (a folder whose content comes back), KM_BOOT (1 at the first
boot, then 2, ...), PYTHONPATH=/payload/lib. With --reboots N it may create the file named in KM_REBOOT and exit 0: the machine then boots
again from the same disk and runs it once more. Nothing of a run is kept: the disk is a copy-on-write of the image.

KUBEMESH_VM_APPEND adds to the kernel's command line, such as systemd.show_status=1 or systemd.journald.forward_to_console=1.

Host: Debian with Python 3.8 or later and root. Standard library only.
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import fcntl
import hashlib
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

CACHE = pathlib.Path(os.environ.get("KUBEMESH_LAB_CACHE", "/var/cache/kubemesh-lab")) / "vm"
SUITE = "bookworm"
GUEST_PACKAGES = (
    "systemd", "systemd-sysv", "udev", "dbus", "python3", "iproute2", "iputils-ping", "wireguard-tools", "wireguard-go", "nftables",
    "iptables", "conntrack", "procps", "kmod", "strace", "busybox-static", "linux-image-cloud-amd64",
)
# host command -> Debian package that has it
HOST_TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap", "mke2fs": "e2fsprogs"}
# What the first root file system must load before it can mount the disk; ext4 is built into Debian's cloud kernel. Order matters: insmod.
BOOT_MODULES = (
    "drivers/virtio/virtio.ko", "drivers/virtio/virtio_ring.ko", "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko", "drivers/virtio/virtio_pci.ko", "drivers/block/virtio_blk.ko",
)
ROOT_SIZE = "1600M"  # the tree takes about 500 MB; the rest is room for the payload to write, and sparse
RESULTS_SIZE = 64 << 20  # bytes; sparse
MEMORY_MB = 1024
# qemu64 has no vector extensions beyond SSE3: with `-cpu max` the emulator translates AVX code of kernel and libc, and booting took twice
# as long (31 s against 16 s).
CPU = "qemu64"
# mitigations and address randomisation cost much under emulation and nothing here depends on them. rcu_expedited: deleting a network
# namespace waits for several grace periods. no_timer_check: an emulator that got no processor for a moment looks like a broken timer.
KERNEL_ARGS = ("console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 rcupdate.rcu_expedited=1 random.trust_cpu=on "
               "no_timer_check")

# Units that only cost time or need the outside world. networkd itself is enabled: the persistence of the mesh is tested with it.
MASKED_UNITS = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer", "e2scrub_reap.service",
    "systemd-timesyncd.service", "getty@tty1.service", "getty.target", "serial-getty@ttyS0.service", "systemd-hwdb-update.service",
    "systemd-networkd-wait-online.service", "systemd-journal-catalog-update.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "ldconfig.service", "systemd-random-seed.service", "systemd-firstboot.service",
    "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-pcrphase-initrd.service", "modprobe@drm.service",
)

INITRD_INIT = """#!/bin/busybox sh
for module in {modules}; do /bin/busybox insmod /m/$module; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 500 ]; do /bin/busybox usleep 20000; tries=$((tries+1)); done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root
/bin/busybox mount -o move /dev /root/dev
/bin/busybox cp -a /overlay/. /root/
next=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do case $word in kminit=*) next=${{word#kminit=}};; esac; done
/bin/busybox umount /proc
exec /bin/busybox switch_root /root $next
"""

# Init of the direct mode: only what programs expect to find. /dev/fd is for the process substitution in wg-quick.
# This and the files below are put on the disk at each boot, from a second initramfs: changing them needs no new image.
DIRECT_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sfn /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -sfn /proc/self/fd/${number%:*} /dev/${number#*:}; done
ip link set lo up
hostname kubemesh-vm
exec /usr/local/lib/kubemesh-vm/payload
"""

# Runs the payload and ends the machine. $$ is process 1 in direct mode.
PAYLOAD_RUNNER = """#!/bin/bash
state=/var/lib/kubemesh-vm
mkdir -p $state/results /payload
boot=$(( $(cat $state/boot 2>/dev/null || echo 0) + 1 ))
echo $boot > $state/boot
limit=1
for word in $(cat /proc/cmdline); do case $word in kmboots=*) limit=${word#kmboots=};; esac; done
mount -t ext4 -o ro /dev/vdb /payload
export KM_RESULTS=$state/results KM_BOOT=$boot KM_REBOOT=$state/reboot PYTHONPATH=/payload/lib PYTHONDONTWRITEBYTECODE=1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
rm -f $state/reboot
cd /
rm -f $state/results/again
/payload/run.sh </dev/null
rc=$?
echo $rc > $state/results/rc
again=
if [ $rc = 0 ] && [ -e $state/reboot ] && [ $boot -lt $limit ]; then
    again=yes
    touch $state/results/again
fi
tar -cf /dev/vdc -C $state/results .
umount /payload
sync
if [ -z "$again" ]; then
    echo o > /proc/sysrq-trigger
elif [ $$ = 1 ]; then
    # no init to ask: what is written is on the disk
    echo b > /proc/sysrq-trigger
else
    systemctl reboot
fi
sleep 100
"""

PAYLOAD_SERVICE = """[Unit]
Description=Test payload
After=multi-user.target
[Service]
Type=simple
ExecStart=/usr/local/lib/kubemesh-vm/payload
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
# The payload powers the machine off by itself
TimeoutStopSec=1s
KillMode=process
"""

PAYLOAD_TARGET = """[Unit]
Description=Everything, then the test payload
Requires=multi-user.target
Wants=kubemesh-payload.service
AllowIsolate=yes
"""


class VMError(Exception):
    """The machine could not be built, or ended without a result."""


@dataclasses.dataclass
class Outcome:
    """rc: exit code of run.sh; seconds: the whole run; cpu_seconds: of the emulator, on all cores, which tells a slow test from a busy
    machine; console: all that came over the serial line."""

    rc: int
    seconds: float
    cpu_seconds: float
    console: str


def log(text):
    print("vm: %s" % text, file=sys.stderr, flush=True)


def _run(argv, **kwargs):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                          **kwargs)
    if done.returncode:
        raise VMError("%s ended with %d:\n%s" % (" ".join(map(str, argv)), done.returncode, done.stdout[-3000:]))
    return done.stdout


# --------------------------------------------------------------------------------------------------------------------------- the image

def recipe_digest():
    """Names the image by everything that goes into it, so that a changed recipe is built anew and an unchanged one never."""
    parts = (SUITE, GUEST_PACKAGES, BOOT_MODULES, ROOT_SIZE, MASKED_UNITS, INITRD_INIT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def cpio_newc(entries):
    """Pack [(name, mode, data or (major, minor) or None)] as the kernel's initramfs format (Documentation/driver-api/early-userspace)."""
    out = io.BytesIO()

    def pad():
        out.write(b"\0" * (-out.tell() % 4))

    for inode, (name, mode, content) in enumerate(list(entries) + [("TRAILER!!!", 0, None)], 1):
        data = content if isinstance(content, bytes) else b""
        major, minor = content if isinstance(content, tuple) else (0, 0)
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(encoded), 0)
        out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + encoded)
        pad()
        out.write(data)
        pad()
    return out.getvalue()


def make_initrd(root):
    """An initramfs of a static busybox and the disk driver (2 MB): Debian's own has 16 MB, and udev, and takes 10 s longer."""
    (version,) = os.listdir(root / "lib/modules")
    busybox = next(path for path in (root / "usr/bin/busybox", root / "bin/busybox") if path.exists())
    entries = [(name, 0o040755, None) for name in ("dev", "proc", "bin", "root", "m")]
    entries.append(("dev/console", 0o020600, (5, 1)))
    entries.append(("bin/busybox", 0o100755, busybox.read_bytes()))
    for module in BOOT_MODULES:
        entries.append(("m/" + os.path.basename(module), 0o100644, (root / "lib/modules" / version / "kernel" / module).read_bytes()))
    init = INITRD_INIT.format(modules=" ".join(os.path.basename(module) for module in BOOT_MODULES))
    entries.append(("init", 0o100755, init.encode()))
    return cpio_newc(entries)


def boot_overlay():
    """The initramfs part with the files that the boot copies over the disk."""
    lib, units = "overlay/usr/local/lib/kubemesh-vm", "overlay/etc/systemd/system"
    entries, seen = [], set()
    for name, mode, text in ((lib + "/init", 0o100755, DIRECT_INIT), (lib + "/payload", 0o100755, PAYLOAD_RUNNER),
                             (units + "/kubemesh-payload.service", 0o100644, PAYLOAD_SERVICE),
                             (units + "/kubemesh-vm.target", 0o100644, PAYLOAD_TARGET)):
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            if folder not in seen:
                seen.add(folder)
                entries.append((folder, 0o040755, None))
        entries.append((name, mode, text.encode()))
    return cpio_newc(entries)


def _debian_mirror():
    """The archive this machine's apt uses, so that a build works behind a mirror; [] lets debootstrap choose."""
    try:
        out = _run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(CREATED_BY) $(SITE)"])
    except (OSError, VMError):
        return []
    sites = [line.split()[2] for line in out.splitlines() if line.startswith("Debian Packages ")]
    return sites[:1]


def _populate(root, work):
    """debootstrap into root and shape it."""
    packages = CACHE.parent / "debs"  # kept: a second build downloads nothing
    packages.mkdir(parents=True, exist_ok=True)
    argv = ["debootstrap", "--variant=minbase", "--cache-dir=%s" % packages, "--include=" + ",".join(GUEST_PACKAGES), SUITE, str(root)]
    try:
        _run(argv + _debian_mirror())
    except VMError as exc:
        detail = root / "debootstrap/debootstrap.log"
        raise VMError("%s\n%s" % (exc, detail.read_text()[-3000:] if detail.exists() else "")) from exc
    units = root / "etc/systemd/system"
    (units / "default.target").symlink_to("kubemesh-vm.target")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    networkd = wants / "systemd-networkd.service"
    if not networkd.is_symlink():
        networkd.symlink_to("/lib/systemd/system/systemd-networkd.service")
    for unit in MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (root / "etc/fstab").write_text("")
    (root / "etc/hostname").write_text("kubemesh-vm\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost kubemesh-vm\n::1 localhost\n")
    # an empty file makes systemd believe in a first boot, with all the work of one
    (root / "etc/machine-id").write_text(hashlib.sha256(b"kubemesh test machine").hexdigest()[:32] + "\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, work / "vmlinuz")
    (work / "kernel-version").write_text(kernel.name[len("vmlinuz-"):] + "\n")
    (work / "initrd").write_bytes(make_initrd(root))
    for useless in ("boot", "var/cache/apt", "var/lib/apt", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / useless, ignore_errors=True)
        (root / useless).mkdir()


def install_host_tools():
    missing = sorted({package for tool, package in HOST_TOOLS.items() if not shutil.which(tool)})
    if not missing:
        return
    log("installing on this machine: %s" % " ".join(missing))
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    _run(["apt-get", "update", "-qq"], env=env)
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends"] + missing, env=env)


def build(force=False):
    """Return the folder with vmlinuz, initrd and root.img; make it first when the recipe has no image yet. Raises VMError."""
    install_host_tools()
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / recipe_digest()
    with open(CACHE / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once must not build twice
        if target.exists() and not force:
            return target
        log("building the image (about 2 minutes)")
        start = time.monotonic()
        work = pathlib.Path(tempfile.mkdtemp(prefix=".new-", dir=CACHE))
        try:
            root = work / "root"
            root.mkdir(mode=0o755)
            _populate(root, work)
            # no journal and no lazy work: the disk lives for one run
            _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", "-d", str(root),
                  "-F", str(work / "root.img"), ROOT_SIZE])
            shutil.rmtree(root)
            for old in CACHE.iterdir():
                if old.is_dir() and old != work:
                    shutil.rmtree(old, ignore_errors=True)  # also what a killed build left
            work.chmod(0o755)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        log("image %s built in %.0f s" % (target.name, time.monotonic() - start))
    return target


# ------------------------------------------------------------------------------------------------------------------------------ one run

def _die_with_parent():
    # PR_SET_PDEATHSIG (prctl(2), value 1): no emulator stays behind when the test runner is killed
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


def _payload_disk(payload, path):
    size = sum(os.lstat(os.path.join(folder, name)).st_size + 4096 for folder, dummy, names in os.walk(payload) for name in names)
    megabytes = 8 + int(size * 1.3) // (1 << 20)
    _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(payload), "-F", str(path), "%dM" % megabytes])


def run(payload, results=None, systemd=False, reboots=0, timeout=300.0, quiet=False, memory_mb=MEMORY_MB):
    """Boot the image with the folder payload and wait for the end of its run.sh.

    results: folder that takes the content of the guest's KM_RESULTS (made when missing). timeout: seconds for all boots together; then
    the emulator is killed and VMError raised, with the end of the console. Returns Outcome.
    """
    payload = pathlib.Path(payload)
    if not os.access(payload / "run.sh", os.X_OK):
        raise VMError("%s has no executable run.sh" % payload)
    image = build()
    start, cpu_before = time.monotonic(), _cpu_of_children()
    console = []
    with tempfile.TemporaryDirectory(prefix="kubemesh-vm-") as scratch_name:
        scratch = pathlib.Path(scratch_name)
        _payload_disk(payload, scratch / "payload.img")
        # the kernel unpacks archives that follow one another
        (scratch / "initrd").write_bytes((image / "initrd").read_bytes() + boot_overlay())
        root, snapshot = image / "root.img", ",snapshot=on"
        if reboots:
            # each boot is an emulator of its own: a reset inside one hung now and then on a busy machine
            root, snapshot = scratch / "root.img", ""
            _run(["cp", "--sparse=always", "--reflink=auto", str(image / "root.img"), str(root)])
        cmdline = "%s kmboots=%d %s" % (KERNEL_ARGS, 1 + reboots, os.environ.get("KUBEMESH_VM_APPEND", ""))
        if not systemd:
            cmdline += " kminit=/usr/local/lib/kubemesh-vm/init"
        argv = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2", "-m", str(memory_mb), "-display", "none",
                "-monitor", "none", "-serial", "stdio", "-nic", "none", "-no-reboot",
                "-kernel", str(image / "vmlinuz"), "-initrd", str(scratch / "initrd"), "-append", cmdline,
                # cache=unsafe: nobody needs this disk after the run
                "-drive", "file=%s,if=virtio,format=raw,cache=unsafe%s" % (root, snapshot),
                "-drive", "file=%s,if=virtio,format=raw,readonly=on" % (scratch / "payload.img"),
                "-drive", "file=%s,if=virtio,format=raw,cache=unsafe" % (scratch / "results.img")]
        for dummy in range(1 + reboots):
            with open(scratch / "results.img", "wb") as handle:
                handle.truncate(RESULTS_SIZE)
            _boot(argv, start + timeout, timeout, console, quiet)
            found = _read_results(scratch / "results.img", time.monotonic() - start, console)
            if "again" not in found:
                break
    outcome = Outcome(rc=int(found.pop("rc")), seconds=time.monotonic() - start, cpu_seconds=_cpu_of_children() - cpu_before,
                      console="\n".join(console))
    if results is not None:
        for name, content in found.items():
            target = pathlib.Path(results) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    if not quiet:
        log("rc %d, %.1f s (%.1f s of processor time), results: %s" % (
            outcome.rc, outcome.seconds, outcome.cpu_seconds, " ".join(sorted(found))))
    return outcome


def _cpu_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _boot(argv, end, timeout, console, quiet):
    """One run of the emulator; its console goes to the list, and to stdout unless quiet."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          preexec_fn=_die_with_parent) as qemu:
        def pump():
            for raw in qemu.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                console.append(line)
                if not quiet:
                    print(line, flush=True)

        reader = threading.Thread(target=pump, daemon=True)
        reader.start()
        try:
            qemu.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise VMError("the machine ran longer than %.0f s and was stopped; end of its console:\n%s"
                          % (timeout, "\n".join(console[-40:]))) from None
        finally:
            if qemu.poll() is None:
                qemu.kill()
                qemu.wait()
        reader.join(10)


def _read_results(path, seconds, console):
    """{file name: bytes} that the machine left; VMError when it left none."""
    found = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive.getmembers():
                name = os.path.normpath(member.name)
                if member.isfile() and not name.startswith(("..", "/")):
                    found[name] = archive.extractfile(member).read()
        int(found["rc"])
    except (tarfile.TarError, KeyError, ValueError) as exc:
        raise VMError("the machine ended after %.0f s without a result (%s); end of its console:\n%s"
                      % (seconds, exc, "\n".join(console[-40:]))) from exc
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build")
    one.add_argument("--force", action="store_true")
    two = commands.add_parser("run")
    two.add_argument("--systemd", action="store_true", help="boot with systemd instead of a plain script")
    two.add_argument("--reboots", type=int, default=0, help="how often the payload may reboot the machine")
    two.add_argument("--timeout", type=float, default=300.0, help="seconds")
    two.add_argument("--results", help="folder for what the payload leaves in KM_RESULTS")
    two.add_argument("payload")
    args = parser.parse_args(argv)
    try:
        if args.command == "build":
            print(build(force=args.force))
            return 0
        return run(args.payload, results=args.results, systemd=args.systemd, reboots=args.reboots, timeout=args.timeout).rc
    except VMError as exc:
        log(str(exc))
        return 125  # as env(1) and container runners: the tool failed, not the payload


if __name__ == "__main__":
    sys.exit(main())
