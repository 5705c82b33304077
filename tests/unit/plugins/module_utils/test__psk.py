# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.kubemesh.wireguard.plugins.module_utils import _psk as psk
from ansible_collections.kubemesh.wireguard.plugins.module_utils._mesh import MeshError

SECRET = "gSQT2aHkYbq0mXJ8r1nZfVw5cLpE7uDi93KoA64xRtM="


def public_key(number):
    return base64.b64encode(number.to_bytes(31, "big") + b"\x40").decode()


def document(*numbers, **other):
    nodes = {"node-%d" % number: {"state": "member", "reason": "", "public_keys": {"0": public_key(number)}} for number in numbers}
    for name, entry in other.items():
        nodes[name.replace("_", "-")].update(entry)
    return {"nodes": nodes, "serial": 1}


# --- HKDF: RFC 5869, appendix A, the cases with SHA-256 -----------------------------------------------------------------------------------

RFC = [
    (b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42,
     "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
     "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"),
    (bytes(range(0x50)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100)), 82,
     "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
     ("b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db7"
      "1cc30c58179ec3e87c14c01d5c1f3434f1d87")),
    (b"\x0b" * 22, b"", b"", 42,
     "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
     "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
]


@pytest.mark.parametrize("ikm,salt,info,length,prk,okm", RFC)
def test_hkdf_as_the_rfc_has_it(ikm, salt, info, length, prk, okm):
    assert psk.hkdf_extract(salt, ikm).hex() == prk
    assert psk.hkdf_expand(bytes.fromhex(prk), info, length).hex() == okm


def test_hkdf_ends_somewhere():
    assert len(psk.hkdf_expand(b"x" * 32, b"", 255 * 32)) == 255 * 32
    with pytest.raises(ValueError, match="8160"):
        psk.hkdf_expand(b"x" * 32, b"", 255 * 32 + 1)


def test_hkdf_by_cryptography():
    """The derivation as a whole, by somebody else's code."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    one, other = base64.b64decode(public_key(1)), base64.b64decode(public_key(2))
    label = b"kubemesh.wireguard preshared key v1"
    expected = HKDF(hashes.SHA256(), 32, label, label + one + other).derive(SECRET.encode())
    assert psk.derive(SECRET.encode(), public_key(2), public_key(1)) == expected


# --- derivation --------------------------------------------------------------------------------------------------------------------------

def test_the_derivation_never_changes():
    """Or nodes done before an update of the collection and after it would not talk to each other."""
    found = psk.derive(SECRET.encode(), public_key(1), public_key(2))
    assert found.hex() == "1d3984b7977d67ba06ef246a10adf06527afd15b68abeed6d0b320e225f91b0a"


numbers = st.integers(1, 2 ** 200)


@given(numbers, numbers, numbers)
def test_both_ends_get_the_same_and_others_get_another_one(one, other, third):
    if len({one, other, third}) < 3:
        return
    found = psk.derive(b"secret", public_key(one), public_key(other))
    assert found == psk.derive(b"secret", public_key(other), public_key(one)) and len(found) == 32
    assert found != psk.derive(b"secret", public_key(one), public_key(third))
    assert found != psk.derive(b"secret", public_key(other), public_key(third))
    assert found != psk.derive(b"Secret", public_key(one), public_key(other))


def test_two_nodes_with_one_key_have_no_preshared_key():
    with pytest.raises(MeshError, match="two nodes have the same"):
        psk.derive(b"secret", public_key(1), public_key(1))


@pytest.mark.parametrize("bad", ["", "x", None, "A" * 43 + "=", "B" * 44, public_key(1) + "\n"])
def test_only_public_keys_have_one(bad):
    with pytest.raises(MeshError):
        psk.derive(b"secret", public_key(1), bad)


# --- the secret --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weak", ["", "x" * 31, "short-secret", "changeme" * 4, "a" * 100, " " * 40, "abcdefg" * 10, None, 5, {"a": SECRET},
                                  SECRET[:31] + "   \n", "\ud800" + SECRET])
def test_a_weak_secret_is_refused_and_not_shown(weak):
    with pytest.raises(MeshError) as caught:
        psk.check_secret(weak)
    text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__))
    assert "openssl rand -base64 32" in str(caught.value) and "mesh_psk_secret" in str(caught.value)
    if isinstance(weak, str) and weak.strip() and weak.strip("a"):
        assert weak.strip() not in text.replace(__file__, "") and repr(weak.strip())[1:-1] not in str(caught.value)


@pytest.mark.parametrize("weak", ["x" * 31, "changeme" * 4, " " * 40, 5, {"a": SECRET}])
def test_the_fault_of_a_secret_is_that_of_the_derivation(weak):
    with pytest.raises(MeshError) as caught:
        psk.check_secret(weak)
    assert psk.secret_fault(weak) == str(caught.value)


@pytest.mark.parametrize("good", ["", None, SECRET, SECRET + "\n"])
def test_no_secret_and_a_good_one_have_no_fault(good):
    assert psk.secret_fault(good) == ""


def test_a_vaulted_secret_is_judged_by_its_text():
    class Vaulted:
        """Not text itself, as in ansible-core 2.18."""

        def __init__(self, text):
            self.text = text

        def __str__(self):
            return self.text

    assert psk.secret_fault(Vaulted(SECRET)) == ""
    assert "31 characters" in psk.secret_fault(Vaulted("x" * 31))


def test_a_good_secret():
    assert psk.check_secret(SECRET) == SECRET.encode()
    assert psk.check_secret("\n " + SECRET + " \r\n") == SECRET.encode(), "as from a file"
    assert psk.check_secret("0123456789abcdef0123456789abcdef") and psk.check_secret("Paßwörter für das ganze Clüster, 42")


# --- a node ------------------------------------------------------------------------------------------------------------------------------

def test_each_node_gets_its_own():
    doc = document(1, 2, 3)
    maps = {name: psk.keys_of_node(doc, name, 0, SECRET) for name in doc["nodes"]}
    assert maps["node-1"]["names"] == {public_key(2): "node-2", public_key(3): "node-3"} and maps["node-1"]["complete"]
    for one, other in ((1, 2), (1, 3), (2, 3)):
        assert maps["node-%d" % one]["keys"][public_key(other)] == maps["node-%d" % other]["keys"][public_key(one)]
    assert maps["node-1"]["keys"][public_key(2)] == psk.derive(SECRET.encode(), public_key(1), public_key(2))
    assert len({key for own in maps.values() for key in own["keys"].values()}) == 3, "one for each pair"


def test_a_rotation_gives_new_ones():
    both = {"public_keys": {"0": public_key(1), "1": public_key(11)}}
    doc = document(1, 2, 3, node_1=both, node_2={"public_keys": {"0": public_key(2), "1": public_key(12)}})
    old, new = (psk.keys_of_node(doc, "node-1", generation, SECRET + "\n") for generation in ("0", 1))
    assert set(new["keys"]) == {public_key(12)} and not set(new["keys"].values()) & set(old["keys"].values())
    assert old["complete"] and not new["complete"], "node-3 has no key of it yet"


def test_who_is_a_peer():
    doc = document(1, 2, 3, 4, node_2={"state": "excluded", "public_keys": {}}, node_3={"state": "pending"},
                   node_4={"state": "pending", "public_keys": {}})
    found = psk.keys_of_node(doc, "node-1", 0, SECRET)
    assert set(found["names"].values()) == {"node-3"} and not found["complete"]
    doc["nodes"]["node-4"]["state"] = "excluded"
    assert psk.keys_of_node(doc, "node-1", 0, SECRET)["complete"], "who is left out is known"
    for name in ("node-2", "node-4", "node-9"):
        with pytest.raises(MeshError, match=name):
            psk.keys_of_node(doc, name, 0, SECRET)
    with pytest.raises(MeshError, match="generation"):
        psk.keys_of_node(doc, "node-1", 2, SECRET)
    with pytest.raises(MeshError, match="openssl"):
        psk.keys_of_node(doc, "node-1", 0, "weak")


# --- proofs ------------------------------------------------------------------------------------------------------------------------------

def test_a_proof_is_of_one_key_one_peer_and_one_time():
    key = psk.derive(SECRET.encode(), public_key(1), public_key(2))
    found = psk.proof(key, "nonce", public_key(2))
    assert len(base64.b64decode(found)) == 16 and psk.proof(bytearray(key), "nonce", public_key(2)) == found
    assert len({found, psk.proof(key, "other", public_key(2)), psk.proof(key, "nonce", public_key(1)),
                psk.proof(bytes(32), "nonce", public_key(2))}) == 4
    assert psk.same_text(found, found) and not psk.same_text(found, found[:-1]) and not psk.same_text("ü\ud800", "x")


# --- files -------------------------------------------------------------------------------------------------------------------------------

@given(st.binary(min_size=32, max_size=32).filter(any))
def test_file_names(raw):
    key = base64.b64encode(raw).decode()
    name = psk.file_name(key)
    assert "/" not in name and name not in (".", "..") and len(name) == 44 and psk.public_key_of(name) == key
    # what the script at boot does
    assert name.translate(str.maketrans("-_", "+/")) == key


@pytest.mark.parametrize("name", [
    "", ".", "x", "README", ".new", "A" * 43 + "=", public_key(1) + ".psk", "+" + public_key(1)[1:], "ü" * 44])
def test_names_of_others(name):
    assert psk.public_key_of(name) is None


def test_a_public_key_with_the_two_characters():
    key = base64.b64encode(b"\xfb\xef\xbe" * 10 + b"\xff\xff").decode()
    assert "+" in key and "/" in key
    assert psk.public_key_of(psk.file_name(key)) == key and psk.public_key_of(key.replace("/", "_")) is None


def test_paths():
    assert psk.folder_of("wgmesh1") == "/etc/wireguard/wgmesh1.psk"
    assert psk.paths_of("/d", [public_key(1)]) == {public_key(1): "/d/" + psk.file_name(public_key(1))}


@given(st.binary(min_size=32, max_size=32))
def test_texts_of_keys(raw):
    assert psk.decode(psk.encode(raw)) == (bytearray(raw) if any(raw) else None)
    assert psk.decode((psk.encode(raw) + "\n").encode()) == psk.decode(psk.encode(raw))


@pytest.mark.parametrize("text", ["", "x", "ü", b"\xff", "A" * 44, "A" * 43 + "=", psk.encode(b"x" * 31), psk.encode(b"x" * 33)])
def test_texts_of_no_keys(text):
    assert psk.decode(text) is None


# --- what is to be done ------------------------------------------------------------------------------------------------------------------

some_keys = st.sets(st.sampled_from("abcdefgh"))


@given(some_keys, st.dictionaries(st.sampled_from("abcdefgh"), st.booleans()), some_keys, st.booleans())
def test_plan(peers, same, loose, complete):
    steps = psk.plan(peers, same, loose, complete)
    assert set(steps["added"]) == peers - set(same)
    assert set(steps["replaced"]) == {key for key in peers if same.get(key) is False}
    assert set(steps["removed"]) == (set(same) - peers if complete else set())
    assert set(steps["kept"]) == set(same) - set(steps["replaced"]) - set(steps["removed"])
    assert set(steps["tightened"]) == loose & set(steps["kept"])
    after = dict.fromkeys(steps["added"] + steps["replaced"], True)
    after.update({key: same[key] for key in steps["kept"]})
    again = psk.plan(peers, after, set(), complete)
    assert not any(again[kind] for kind in ("added", "replaced", "removed", "tightened"))


def test_for_people():
    steps = psk.plan({"a", "b", "c"}, {"b": False, "d": True, "e": True}, {"e"}, True)
    told = psk.report(steps)
    assert told == {"added": ["a", "c"], "replaced": ["b"], "removed": ["d", "e"],
                    "counts": {"added": 2, "replaced": 1, "removed": 2, "tightened": 0, "kept": 0}}
    named = psk.with_names(told, {"a": "node-9", "b": "node-2", "c": "node-3"})
    assert named == dict(told, added=["node-3", "node-9"], replaced=["node-2"])
    assert psk.describe(named) == [
        "peer node-3: preshared key added", "peer node-9: preshared key added", "peer node-2: preshared key replaced",
        "peer d: preshared key removed", "peer e: preshared key removed"]
    assert psk.summary(told, False) == "preshared keys: 2 added, 1 replaced, 2 removed"
    assert psk.summary(told, True) == "preshared keys: would be 2 added, 1 replaced, 2 removed"
    told = psk.report(psk.plan({"a"}, {"a": True}, {"a"}, True))
    assert psk.summary(told, False) == "preshared keys: 1 closed to others" and psk.describe(told) == ["1 preshared keys closed to others"]
    assert psk.summary(psk.report(psk.plan({"a"}, {"a": True}, set(), True)), True) == "the preshared keys of 1 peers are as they should be"


def test_reports_stay_small():
    told = psk.report(psk.plan(["key-%04d" % number for number in range(5000)], {}, (), True))
    assert len(told["added"]) == psk.SHOWN == len(psk.describe(told)) - 1
    assert psk.describe(told)[-1] == "and 4800 more preshared keys added" and psk.summary(told, False) == "preshared keys: 5000 added"
