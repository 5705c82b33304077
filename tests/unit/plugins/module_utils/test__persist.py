# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _persist as persist
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk as psk
from ansible_collections.kubemesh.wireguard.plugins.module_utils import _routes

KEYS = [base64.b64encode(bytes([number]) * 31 + b"\x40").decode() for number in range(1, 8)]
HOST = {"networkd": True, "networkmanager": True, "ipv6": True, "underlay": ["eth0", "bond0.100"]}


def device(**other):
    peers = {
        KEYS[0]: {"name": "worker-2", "endpoint": "198.18.0.12:51840", "keepalive": 0,
                  "allowed_ips": ["10.244.2.0/24", "198.18.0.12/32", "fe80::2/128"]},
        KEYS[1]: {"name": "worker-1.example", "endpoint": "[2001:db8::c]:51840", "keepalive": 25, "allowed_ips": ["10.244.3.0/24"]},
        KEYS[2]: {"name": "behind-nat", "endpoint": None, "keepalive": 0, "allowed_ips": ["10.244.4.0/24", "fd00:10:244:4::/64"]}}
    return dict({
        "interface": "wgmesh0", "implementation": "kernel", "userspace_command": "", "persistence": "wg-quick",
        "private_key_file": "/etc/wireguard/wgmesh0.key", "listen_port": 51840, "fwmark": 0x1000, "mtu": 1420,
        "addresses": ["198.18.0.11/32", "2001:db8::b/128", "fe80::1234/64"], "peers": peers}, **other)


def userspace(**other):
    return device(implementation="userspace", userspace_command="/usr/bin/wireguard-go", **other)


ALL = [(implementation, persistence) for implementation in (device, userspace) for persistence in ("wg-quick", "systemd-networkd", "none")]


FOLDER = "/etc/wireguard/wgmesh0.psk"


def protected(make, **other):
    """A device whose peers have preshared keys."""
    return make(preshared_keys=FOLDER, **other)


def present(files):
    return {path: text for path, (text, dummy) in files.items() if text is not None}


# --- which files -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make,persistence", ALL)
@pytest.mark.parametrize("networkd", [True, False])
@pytest.mark.parametrize("networkmanager", [True, False])
def test_every_file_that_may_be_written_can_be_removed(make, persistence, networkd, networkmanager):
    files = persist.boot_files(make(persistence=persistence), dict(HOST, networkd=networkd, networkmanager=networkmanager))
    absent = persist.absent_files("wgmesh0", True)
    assert set(present(files)) <= set(absent) and all(text is None for text, dummy in absent.values())
    # and what is not wanted this time is said to be absent, so that a change of mind leaves nothing
    own = {path for path in absent if path not in (persist.NETWORKD_CONF, persist.NETWORKMANAGER_CONF, persist.SYSCTL_FILE)}
    assert own <= set(files)


@pytest.mark.parametrize("make,persistence", ALL)
def test_one_generation_goes_and_the_other_keeps_what_it_needs(make, persistence):
    sister = dict(make(persistence=persistence), interface="wgmesh1", private_key_file="/etc/wireguard/wgmesh1.key")
    stays = persist.boot_files(sister, HOST)
    gone = set(persist.absent_files("wgmesh0", False))
    assert gone == set(persist.paths_of("wgmesh0").values()) and not gone & set(present(stays))


@pytest.mark.parametrize("make,persistence", ALL)
def test_what_generations_share_is_the_same_for_both(make, persistence):
    """Or each run would change it twice."""
    files = [persist.boot_files(dict(make(persistence=persistence), interface=name, private_key_file="/etc/wireguard/%s.key" % name), HOST)
             for name in ("wgmesh0", "wgmesh1")]
    shared = set(files[0]) & set(files[1])
    assert persist.SYSCTL_FILE in shared and persist.DEVICE_UNIT_FILE in shared
    assert {path: files[0][path] for path in shared} == {path: files[1][path] for path in shared}


def test_files_of_each_way():
    paths = persist.paths_of("wgmesh0")
    common = {persist.SYSCTL_FILE, persist.NETWORKD_CONF, persist.NETWORKMANAGER_CONF, paths["network"]}
    found = {(make is userspace, persistence): set(present(persist.boot_files(make(persistence=persistence), HOST))) - common
             for make, persistence in ALL}
    wg_quick = {paths["wg_quick"], paths["wg_quick_dropin"]}
    networkd = {paths["setconf"], persist.DEVICE_UNIT_FILE}
    assert found == {
        (False, "wg-quick"): wg_quick, (False, "systemd-networkd"): networkd, (False, "none"): set(),
        (True, "wg-quick"): wg_quick | {persist.START_USERSPACE, persist.USERSPACE_UNIT_FILE},
        (True, "systemd-networkd"): networkd | {persist.USERSPACE_UNIT_FILE}, (True, "none"): {persist.USERSPACE_UNIT_FILE}}


@pytest.mark.parametrize("make,persistence", ALL)
def test_preshared_keys_add_a_script_and_no_key(make, persistence):
    script = persist.paths_of("wgmesh0")["preshared_keys"]
    without = persist.boot_files(make(persistence=persistence), HOST)
    files = persist.boot_files(protected(make, persistence=persistence), HOST)
    assert without[script] == (None, persist.MODE_PUBLIC) and set(files) == set(without)
    assert set(present(files)) - set(present(without)) == (set() if persistence == "none" else {script})
    for path, text in present(files).items():
        assert "PresharedKey" not in text and (FOLDER not in text or path == script)
    if persistence != "none":
        assert not set(KEYS) & set(re.findall(r"[A-Za-z0-9+/]{43}=", files[script][0])), "it asks the device for its peers"
        assert persist.absent_files("wgmesh0", False)[script][0] is None


def test_preshared_keys_come_before_the_private_key():
    """Without a private key there is no handshake, so there is none without the preshared key."""
    quick, unit = persist.wg_quick_text(protected(device)), persist.device_unit_text(False, "/k")
    assert re.search(r"PostUp = .*sh /etc/kubemesh/%i.preshared-keys\nPostUp = wg set %i private-key", quick)
    assert re.search(r"wg setconf .*sh /etc/kubemesh/%i.preshared-keys.*wg set %i private-key", unit)
    assert "preshared" not in persist.wg_quick_text(device())


def test_hosts_without_managers_get_no_files_for_them():
    files = present(persist.boot_files(device(), dict(HOST, networkd=False, networkmanager=False)))
    assert not any("networkd" in path or "NetworkManager" in path or path.endswith(".network") for path in files)


@pytest.mark.parametrize("make,persistence", ALL)
def test_modes(make, persistence):
    files = persist.boot_files(make(persistence=persistence), HOST)
    for path, (text, mode) in files.items():
        if text is not None:
            expected = 0o600 if path.endswith((".conf", ".setconf")) and "kubemesh.conf" not in path and "90-" not in path else 0o644
            assert mode == (0o755 if path == persist.START_USERSPACE else expected), path


@pytest.mark.parametrize("persistence,enabled", [
    ("wg-quick", "wg-quick@wgmesh0.service"), ("systemd-networkd", "kubemesh-device@wgmesh0.service"), ("none", None)])
def test_units(persistence, enabled):
    units = persist.boot_units("wgmesh0", persistence)
    assert len(units) == 2 and [unit for unit, wanted in units.items() if wanted] == ([enabled] if enabled else [])


@pytest.mark.parametrize("make,persistence", ALL)
def test_no_private_key_anywhere(make, persistence):
    """Only the name of its file; no directive that could hold a key, and nothing that puts one on a command line."""
    for path, text in present(persist.boot_files(make(persistence=persistence), HOST)).items():
        assert "PrivateKey" not in text and "PresharedKey" not in text, path
        for word in re.findall(r"private-key (\S+)", text):
            assert word.strip("'").replace("%i", "wgmesh0") == "/etc/wireguard/wgmesh0.key"
        for key in re.findall(r"[A-Za-z0-9+/]{43}=", text):
            assert key in KEYS[:3]


@pytest.mark.parametrize("make,persistence", ALL)
def test_every_file_says_whose_it_is(make, persistence):
    for text in present(persist.boot_files(make(persistence=persistence), HOST)).values():
        assert "kubemesh.wireguard" in text.split("\n", 2)[0] + text.split("\n", 2)[1]
        assert text.endswith("\n") and not text.endswith("\n\n")


# --- configuration of peers --------------------------------------------------------------------------------------------------------------

def sections(text):
    """[(section, [(name, value)])] of a file of wg, wg-quick or networkd."""
    found = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            found.append((line, []))
        elif "=" in line and not line.startswith("#"):
            name, dummy, value = line.partition("=")
            found[-1][1].append((name.strip(), value.strip()))
    return found


def peers_in(text):
    return [dict(values) for section, values in sections(text) if section == "[Peer]"]


names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
peers = st.dictionaries(st.sampled_from(KEYS), st.fixed_dictionaries({
    "name": names, "endpoint": st.sampled_from([None, "198.18.0.12:51840", "[2001:db8::c]:51841"]), "keepalive": st.sampled_from([0, 25]),
    "allowed_ips": st.lists(st.sampled_from(["10.244.1.0/24", "fe80::1/128", "2001:db8::c/128"]), min_size=1, unique=True)}))


@given(peers)
def test_peers_of_both_files(some):
    for text in (persist.wg_quick_text(device(peers=some)), persist.setconf_text(device(peers=some))):
        assert persist.endpoints_in(text) == {key: peer["endpoint"] for key, peer in some.items() if peer["endpoint"]}
        found = {peer["PublicKey"]: peer for peer in peers_in(text)}
        assert set(found) == set(some)
        for key, peer in some.items():
            assert found[key]["AllowedIPs"].split(", ") == peer["allowed_ips"]
            assert int(found[key].get("PersistentKeepalive", 0)) == peer["keepalive"]


@given(peers, st.randoms(use_true_random=False))
def test_the_order_of_peers_is_that_of_their_names(some, rng):
    """The same file for the same peers, so that a run that changes nothing changes no file."""
    items = list(some.items())
    rng.shuffle(items)
    assert persist.setconf_text(device(peers=dict(items))) == persist.setconf_text(device(peers=some))


def test_endpoints_of_other_files():
    assert persist.endpoints_in("") == {}
    assert persist.endpoints_in("[Peer]\nEndpoint = 1.2.3.4:5\nPublicKey = x\n[Interface]\nEndpoint = 9.9.9.9:9\n") == {}
    assert persist.endpoints_in("[Peer]\nPublicKey=x=\nEndpoint=1.2.3.4:5\n[Peer]\nEndpoint = 5.6.7.8:9\n") == {"x=": "1.2.3.4:5"}


def test_wg_quick_file():
    text = persist.wg_quick_text(device())
    dummy, values = sections(text)[0]
    assert values == [
        ("Address", "198.18.0.11/32"), ("ListenPort", "51840"), ("FwMark", "0x1000"), ("MTU", "1420"), ("Table", "off"),
        ("PostUp", "wg set %i private-key /etc/wireguard/wgmesh0.key"),
        ("PostUp", "grep -q 0 /proc/sys/net/ipv6/conf/%i/disable_ipv6 || echo 0 > /proc/sys/net/ipv6/conf/%i/disable_ipv6"),
        ("PostUp", "ip -6 address add 2001:db8::b/128 dev %i nodad"), ("PostUp", "ip -6 address add fe80::1234/64 dev %i nodad")]
    assert "PreUp" not in text, "it runs before there is a device"
    assert "ipv6" not in persist.wg_quick_text(device(addresses=["198.18.0.11/32"])), "a node without IPv6 has no such file"
    assert "# behind-nat\n[Peer]" in text


def can_strip():
    if os.geteuid() != 0:
        return "wg-quick wants root, if only to read a file"
    return "" if shutil.which("wg-quick") else "no wg-quick"


@pytest.mark.skipif(bool(can_strip()), reason=can_strip())
@settings(max_examples=10)
@given(peers)
def test_wg_quick_reads_its_file(some):
    """What wg-quick hands to wg: port, mark and peers, the same as our other file."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "wgmesh0.conf")
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(persist.wg_quick_text(device(peers=some)))
        os.chmod(path, 0o600)
        done = subprocess.run(["wg-quick", "strip", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sections(done.stdout) == sections(persist.setconf_text(device(peers=some)))


# --- networkd, NetworkManager, sysctl ----------------------------------------------------------------------------------------------------

def test_network_file_that_manages():
    found = sections(persist.network_text(device(), managed=True))
    assert found[0] == ("[Match]", [("Name", "wgmesh0")])
    assert [dict(values)["Address"] for section, values in found if section == "[Address]"] == device()["addresses"]
    assert dict(found[1][1]) == {"MTUBytes": "1420", "RequiredForOnline": "no"}
    assert {("LinkLocalAddressing", "no"), ("KeepConfiguration", "static"), ("ConfigureWithoutCarrier", "yes")} <= set(found[2][1])


def test_network_file_that_keeps_away():
    assert sections(persist.network_text(device(), managed=False)) == [
        ("[Match]", [("Name", "wgmesh0")]), ("[Link]", [("Unmanaged", "yes")])]


def test_our_network_files_catch_our_device_only():
    for managed in (True, False):
        text = persist.network_text(device(), managed)
        assert persist.catches(text, "wgmesh0")
        assert not persist.catches(text, "wgmesh1") and not persist.catches(text, "eth0")


def test_sysctl_file():
    """rp_filter of the mesh device and of every device of the underlay; a dot in a name is no separator."""
    assert persist.sysctl_text(persist.wanted_sysctls("wgmesh0", HOST)).splitlines()[1:] == [
        "-net/ipv4/conf/bond0.100/rp_filter = 2", "-net/ipv4/conf/eth0/rp_filter = 2", "-net/ipv4/conf/wgmesh0/rp_filter = 2",
        "-net/ipv6/conf/wgmesh0/disable_ipv6 = 0"]
    assert persist.wanted_sysctls("wgmesh0", dict(HOST, ipv6=False, underlay=[])) == {"net/ipv4/conf/wgmesh0/rp_filter": "2"}
    # sysctl.d(5): sorted by file name whatever the directory; ours is to win over the usual names
    own = os.path.basename(persist.SYSCTL_FILE)
    assert max([own, "99-sysctl.conf", "99-kubernetes-cri.conf", "99-z.conf", "60-gce-network-security.conf"]) == own


@pytest.mark.parametrize("match,caught", [
    # by name
    ("Name=*", True), ("Name=wgmesh0", True), ("Name=wg*", True), ("Name=wgmesh?", True), ("Name=wgmesh[01]", True), ("Name = *", True),
    ("Name=eth0", False), ("Name=en* eth*", False), ("Name=eth0 wg*", True), ("Name=wgmesh1", False), ("Name=WGMESH0", False),
    ("Name=!eth0", True), ("Name=!wg*", False), ("Name=!eth0 wg*", False), ("Name=!eth0 lo", True), ("Name=!*", False),
    ("Name=eth0\nName=wg*", True), ("Name=wg*\nName=", False), ("Name=wg*\nName=\nName=eth0", False), ("Name=wg*\nName=!eth0", True),
    ("Name=*\nName=!wg*", False), ("Name=eth0 \\\n wg*", True), ("#Name=eth0\nName=*", True), (";Name=*\nName=eth0", False),
    # by what it is: WireGuard of the kernel, or a TUN device
    ("Type=wireguard", True), ("Kind=wireguard", True), ("Kind=tun", True), ("Type=none", True), ("Type=ether", False), ("Type=*", True),
    ("Kind=veth", False), ("Type=!ether", True), ("Type=!wireguard none", False), ("Kind=!bridge veth", True), ("Driver=wireguard", True),
    ("Driver=virtio_net", False),
    # all of them must match
    ("Name=*\nType=ether", False), ("Name=wg*\nKind=wireguard", True), ("Type=none\nKind=bridge", False),
    ("Name=eth0\nType=wireguard", False), ("Type=ether\nKind=!*", False),
    # what a mesh device has not
    ("MACAddress=00:11:22:33:44:55", False), ("Name=*\nMACAddress=00:11:22:33:44:55", False), ("Name=*\nMACAddress=", True),
    ("PermanentMACAddress=00:11:22:33:44:55", False), ("Path=pci-*", False), ("Path=!pci-*", True), ("Name=*\nPath=pci-*", False),
    ("Property=ID_NET_DRIVER=virtio", False), ("SSID=home", False), ("WLANInterfaceType=station", False),
    ("BSSID=aa:bb:cc:dd:ee:ff", False),
    # what the machine is cannot be judged here
    ("Virtualization=vm", True), ("Name=*\nVirtualization=!container", True), ("Name=eth0\nHost=node", False),
    ("KernelCommandLine=!root=/dev/nfs\nName=*", True), ("Architecture=x86-64", True),
    # nothing
    ("", False), ("Name=", False), ("nonsense", False),
])
def test_files_that_make_networkd_manage_a_device(match, caught):
    assert persist.catches("[Match]\n%s\n\n[Network]\nDHCP=yes\n" % match, "wgmesh0") == caught


def test_only_the_section_match_counts():
    assert not persist.catches("[Link]\nName=*\n[Match]\nName=eth0\n[Network]\nName=*\n", "wgmesh0")
    assert persist.catches("[Match]\nName=eth0\n[Link]\nMTUBytes=1400\n[Match]\nName=wg*\n", "wgmesh0"), "sections add up"
    assert not persist.catches("", "wgmesh0")
    assert not persist.catches("[Network]\nDHCP=yes\n", "wgmesh0")


def test_managers_are_told_to_keep_away():
    assert sections(persist.networkd_conf_text()) == [
        ("[Network]", [("ManageForeignRoutingPolicyRules", "no"), ("ManageForeignRoutes", "no")])]
    assert sections(persist.networkmanager_conf_text("wgmesh0")) == [
        ("[keyfile]", [("unmanaged-devices+", "interface-name:wgmesh0;interface-name:wgmesh1")])]


# --- scripts and units -------------------------------------------------------------------------------------------------------------------

STATE = {"rules": [], "routes": [
    {"family": family, "table": 51840, "dst": dst, "dev": "wgmesh0", "type": "unicast", "src": src, "mtu": 0, "peer": "b"}
    for family, dst, src in (
        ("ipv4", "10.244.2.0/24", "198.18.0.11"), ("ipv6", "fd00:2::/64", "2001:db8::b"), ("ipv4", "10.244.3.0/24", ""))]}


def scripts():
    """{name: text} of every shell script, those inside of units and hooks as well."""
    found = {
        "start-userspace": persist.start_userspace_text(), "preshared keys": persist.preshared_keys_text("wgmesh0", FOLDER),
        "restore-routes": _routes.script_text(STATE, "wgmesh0", persist.SYSCTL_FILE),
        "restore-routes of a node without addresses": _routes.script_text({"routes": [], "rules": []}, "wgmesh0", persist.SYSCTL_FILE)}
    for name, text in units().items():
        for number, (line, script) in enumerate(re.findall(r"^(Exec\w+)=/bin/sh -c '(.*)'$", text, re.M)):
            found["%s, %s %d" % (name, line, number)] = script.replace("$$", "$").replace("%i", "wgmesh0")
    for number, hook in enumerate(re.findall(r"^P\w+Up = (.*)$", persist.wg_quick_text(protected(device)), re.M)):
        found["hook %d" % number] = hook.replace("%i", "wgmesh0")
    return found


def units():
    return {
        "kubemesh-userspace@.service": persist.userspace_unit_text("/bin/true"),
        "kubemesh-device@.service": persist.device_unit_text(False, "/etc/wireguard/wgmesh0.key"),
        "kubemesh-device@.service, userspace": persist.device_unit_text(True, "/etc/wireguard/wgmesh0.key"),
        _routes.ROUTES_UNIT: _routes.unit_text("wgmesh0"),
    }


def test_there_are_scripts():
    assert len(scripts()) == 13


@pytest.mark.parametrize("name", sorted(scripts()))
def test_scripts_are_shell(name):
    done = subprocess.run(["sh", "-n"], input=scripts()[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
@pytest.mark.parametrize("name", sorted(scripts()))
def test_scripts_are_good_shell(name):
    command = ["shellcheck", "--shell=sh", "--exclude=SC2034", "-"]
    done = subprocess.run(command, input=scripts()[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def preshared(tmp_path):
    """The script that sets preshared keys, with a stand-in for wg that does what wg does and writes down what it was told."""
    class Preshared:
        folder, log, peers = tmp_path / "wgmesh0.psk", tmp_path / "log", tmp_path / "peers"

        def add(self, key, content="good"):
            (self.folder / psk.file_name(key)).write_text(content)

        def run(self, *peers):
            self.peers.write_text("".join(key + "\n" for key in peers))
            done = subprocess.run(["sh", "-c", persist.preshared_keys_text("wgmesh0", str(self.folder))], capture_output=True, text=True,
                                  check=False, env=dict(os.environ, PATH="%s:%s" % (tmp_path, os.environ["PATH"])))
            calls = self.log.read_text().splitlines() if self.log.exists() else []
            return done, calls

    it = Preshared()
    it.folder.mkdir()
    program = tmp_path / "wg"
    program.write_text("""#!/bin/sh
if [ "$*" = "show wgmesh0 peers" ]; then exec cat %s; fi
[ "$1 $2" = "set wgmesh0" ] || exit 1
shift 2
[ $# -gt 0 ] || exit 1
line=
while [ $# -gt 0 ]; do
  [ "$1 $3" = "peer preshared-key" ] && [ "$(cat "$4")" = good ] || { cat "$4" >&2; exit 1; }
  line="$line $2=${4##*/}"
  shift 4
done
echo $line >> %s
""" % (it.peers, it.log))
    program.chmod(0o755)
    return it


def test_the_script_gives_every_peer_its_file(preshared):
    some = [base64.b64encode(bytes([number % 251]) * 20 + b"\xfb\xff" + number.to_bytes(10, "big")).decode() for number in range(250)]
    for key in some:
        preshared.add(key)
    done, calls = preshared.run(*some)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and len(calls) == 3, "100 at a time"
    assert sorted(word for line in calls for word in line.split()) == sorted("%s=%s" % (key, psk.file_name(key)) for key in some)


def test_only_peers_that_have_a_file_and_files_that_have_a_peer(preshared):
    """A file that is left over must not add a peer."""
    for key in KEYS[:3]:
        preshared.add(key)
    (preshared.folder / "README").write_text("x")
    (preshared.folder / (".%s.new" % psk.file_name(KEYS[4]))).write_text("good")
    done, calls = preshared.run(*KEYS[1:6])
    assert (done.returncode, done.stderr) == (0, "") and len(calls) == 1
    assert sorted(calls[0].split()) == sorted("%s=%s" % (key, psk.file_name(key)) for key in KEYS[1:3])
    assert preshared.run()[0].returncode == 0 and preshared.run(KEYS[5])[0].returncode == 0
    assert len(preshared.run(KEYS[5])[1]) == 1, "nothing to be done, nothing done"


def test_a_damaged_file_keeps_no_other_peer_from_its_key(preshared):
    for key in KEYS[:4]:
        preshared.add(key)
    preshared.add(KEYS[1], "secret but damaged")
    done, calls = preshared.run(*KEYS[:4])
    assert done.returncode == 0 and "some preshared keys of wgmesh0 cannot be set" in done.stderr and "secret" not in done.stderr
    assert sorted(calls) == sorted("%s=%s" % (key, psk.file_name(key)) for key in (KEYS[0], KEYS[2], KEYS[3]))


def test_a_directory_that_is_gone_keeps_no_device_down(preshared):
    preshared.folder.rmdir()
    done, calls = preshared.run(*KEYS[:4])
    assert (done.returncode, calls) == (0, [])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("name", sorted(units()))
def test_units_are_what_systemd_reads(name, tmp_path):
    unit = name.split(",")[0].replace("@.", "@wgmesh0.")
    for other, text in units().items():
        if "," not in other:
            (tmp_path / other).write_text(text)
    (tmp_path / name.split(",")[0]).write_text(units()[name])
    (tmp_path / "wg-quick@.service").write_text("[Service]\nExecStart=/bin/true\n")
    dropin = tmp_path / "wg-quick@wgmesh0.service.d"
    dropin.mkdir()
    (dropin / "kubemesh.conf").write_text(persist.wg_quick_dropin_text(True))
    # Only what is written here, so that units of this machine do not matter; basic.target and the like come with systemd.
    paths = [path for path in ("/usr/lib/systemd/system", "/lib/systemd/system") if os.path.isdir(path)]
    environment = dict(os.environ, SYSTEMD_UNIT_PATH=os.pathsep.join([str(tmp_path)] + paths))
    done = subprocess.run(["systemd-analyze", "--man=no", "verify", unit, "wg-quick@wgmesh0.service"], env=environment, cwd=str(tmp_path),
                          capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "kubemesh" in line or "wg-quick" in line]
    assert not said, "\n".join(said)
    assert done.returncode == 0, done.stderr


def test_units_come_before_pods():
    for name, text in units().items():
        before = next(line for line in text.splitlines() if line.startswith("Before="))
        assert {"kubelet.service", "k3s.service", "rke2-agent.service"} <= set(before[7:].split()), name
    assert "Before=kubelet.service" in persist.wg_quick_dropin_text(False)
    assert "WG_QUICK_USERSPACE_IMPLEMENTATION=/etc/kubemesh/start-userspace" in persist.wg_quick_dropin_text(True)
    assert "WG_QUICK" not in persist.wg_quick_dropin_text(False)


def test_a_live_device_is_not_configured_anew():
    """Its peers have sessions: the unit leaves a device of the kernel alone when it is there, a userspace one when it has peers."""
    kernel, user = scripts()["kubemesh-device@.service, ExecStart 0"], scripts()["kubemesh-device@.service, userspace, ExecStart 0"]
    assert kernel.startswith("ip link show dev wgmesh0 >/dev/null 2>&1 && exit 0; ip link add dev wgmesh0 type wireguard && ")
    assert user.startswith('[ -n "$(wg show wgmesh0 peers)" ] && exit 0; ') and "ip link add" not in user
    for script in (kernel, user):
        assert script.index("addrgenmode") < script.index("setconf") < script.index("private-key")
