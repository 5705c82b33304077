# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This module_util is PRIVATE to the collection and should only be used inside it. Breaking changes can occur at any time.

"""What the node agent is to read and somebody else provides: the CA, and the token. Whether the service will be able to.

The preflight asks before anything is changed, and the module that installs the agent asks for those who use it alone. Judging is pure;
reading is at the end.

*Inputs* are ``{"user": {"uid", "gids": [...]} or None where it is not made yet, "token": whether one of an earlier run is there,
"ways": {option: way}}``. A *way* is ``{"real": path without symbolic links, "places": [...]}``: each directory from the root on and then
the file, ``{"path", "mode", "uid", "gid", "acl": whether there are rights that the mode does not tell}``; the first that cannot be looked
at ends it with ``{"path", "error"}``.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd

USER = "kubemesh-agent"
TOKEN_FILE = "/etc/kubemesh/agent-token"  # noqa: S105 - a path
# Directories that the unit hides from the service: ProtectHome and PrivateTmp.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is written there
# Rights of a file beyond its mode (acl(5))
ACL = "system.posix_acl_access"
READ, SEARCH = 4, 1
# As many links as the kernel follows: path_resolution(7)
LINKS_MAX = 40


def may(place, bit, uid, gids):
    """Whether the mode of a file gives a user a right. ``bit``: 4 to read, 1 to go through a directory."""
    shift = 6 if place["uid"] == uid else 3 if place["gid"] in gids else 0
    return bool(place["mode"] >> shift & bit)


def why_unreadable(way, uid, gids):
    """Why the service cannot read a file, or an empty text where it can, or nobody knows."""
    for place in way["places"]:
        for folder in HIDDEN:
            if place["path"].startswith(folder + "/"):
                return "the service does not see what is below %s" % folder
        if "link" in place:
            continue  # anybody may follow it who comes to it
        if "error" in place:
            return "%s: %s" % (place["path"], place["error"])
        bit = READ if place["path"] == way["real"] else SEARCH
        if not may(place, bit, uid, gids) and not place["acl"]:
            return "%s has mode %04o, owner %d and group %d" % (place["path"], place["mode"], place["uid"], place["gid"])
    return ""


def reader(user, as_root):
    """``(name, uid, group ids)`` of who the service is, see `_agent_install.unit_text`: without capabilities, root too reads only what its
    mode says.

    A user that is not made yet will have none of the ids that files have now.
    """
    if as_root:
        return "root", 0, [0]
    return (USER, -1, []) if user is None else (USER, user["uid"], user["gids"])


def input_faults(inputs, paths, token_given, as_root, prefix=""):
    """What is wrong: ``[{"option", "value", "message", "remedy"}]``.

    ``paths``: ``{"ca_file": path, "token_file": path or None where the file is ours}``; ``as_root``: whether the service will be root;
    ``prefix``: of the names of the options for who reads this.
    """
    name, uid, gids = reader(inputs["user"], as_root)
    faults = []
    if not (token_given or paths["token_file"] or inputs["token"]):
        faults.append({
            "option": "token", "value": TOKEN_FILE,
            "message": "%stoken: none was given, and none of an earlier run is at %s" % (prefix, TOKEN_FILE),
            "remedy": "give %stoken, or %stoken_file" % (prefix, prefix)})
    hints = {"ca_file": "it must be the cluster's CA, which is public: chmod 0644, and 0755 for its directories",
             "token_file": "chgrp %s, chmod 0640, and 0755 for its directories" % ("root" if as_root else USER)}
    if inputs["user"] is None and not as_root:
        # The first run makes it, and keeps one that is there.
        hints["token_file"] = "useradd --system --user-group %s, as it is not there yet; %s" % (USER, hints["token_file"])
    for option, way in inputs["ways"].items():
        why = why_unreadable(way, uid, gids)
        if why:
            faults.append({
                "option": option, "value": paths[option],
                "message": "%s%s: %s is not readable for the user %s (%s)" % (prefix, option, paths[option], name, why),
                "remedy": "%s, or name another file" % hints[option]})
    return faults


# --- the node --------------------------------------------------------------------------------------------------------------------------

def identity():
    """``(uid, gid)`` of the agent's user; None where there is none."""
    try:
        return pwd.getpwnam(USER).pw_uid, grp.getgrnam(USER).gr_gid
    except KeyError:
        return None


def has_acl(path):
    """Whether a file has rights that its mode does not tell."""
    try:
        return bool(os.getxattr(path, ACL))
    except OSError:
        return False


def way_to(path):
    """The way to a file as path_resolution(7) has it: each directory that is gone through and each link that is followed, then the file."""
    here, rest, places, links = "/", path.split("/"), [place_of("/")], 0
    while rest:
        name, rest = rest[0], rest[1:]
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        found = place_of(os.path.join(here, name))
        places.append(found)
        if "error" in found:
            here = found["path"]
            break
        if "link" in found:
            links += 1
            if links > LINKS_MAX:
                places.append({"path": path, "error": os.strerror(errno.ELOOP)})
                break
            here, rest = "/" if found["link"].startswith("/") else here, found["link"].split("/") + rest
        else:
            here = found["path"]
    return {"real": here, "places": places}


def place_of(path):
    """One of them."""
    try:
        if os.path.islink(path):
            return {"path": path, "link": os.readlink(path)}
        found = os.stat(path)
    except OSError as exc:
        return {"path": path, "error": exc.strerror}
    return {"path": path, "mode": found.st_mode & 0o7777, "uid": found.st_uid, "gid": found.st_gid, "acl": has_acl(path)}


def read_inputs(paths):
    """Inputs of this node; ``paths`` as for `input_faults`."""
    found = identity()
    return {
        "user": None if found is None else {"uid": found[0], "gids": os.getgrouplist(USER, found[1])},
        "token": os.path.exists(TOKEN_FILE),
        "ways": {option: way_to(path) for option, path in paths.items() if path},
    }
