# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the gate and the demo need on this machine: Debian packages, Python interpreters, virtual environments, other collections.

Everything lands in one cache directory (C(KUBEMESH_CACHE), by default C(/var/cache/kubemesh-lab)), keyed by a hash of what it was made
from, so that a second run takes it as it is and a changed requirement makes a new one. Needs Python 3.9 and its standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"

# PyPI's "ansible" carries the collections; a collection is taken out of its wheel because Galaxy is not reachable everywhere.
ANSIBLE_PACKAGE = "ansible==12.3.0"
COLLECTIONS = ("awx/awx", "kubernetes/core")

# ansible-test makes its virtual environments with get-pip.py of its own server. Without that server a stand-in that installs the
# same pip from PyPI does it: file name in ansible-test's cache -> pip version pinned in ansible_test/_internal/python_requirements.py.
GET_PIP = {"get_pip_24_2.py": "24.2", "get_pip_25_2.py": "25.2"}
GET_PIP_SOURCE = '''\
import os
import sys

wheel = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pip-{version}-py3-none-any.whl")
sys.path.insert(0, wheel)

from pip._internal.cli.main import main

arguments = [wheel if item.startswith("pip==") else item for item in sys.argv[1:] if item not in ("--no-setuptools", "--no-wheel")]
sys.exit(main(["install", "--no-deps", "--force-reinstall"] + arguments))
'''


class PrepareError(Exception):
    """Something the machine lacks and that could not be installed; the message says what to do."""


def say(message):
    """Tell the person waiting what takes long. On stderr: stdout belongs to results."""
    print(f"prepare: {message}", file=sys.stderr, flush=True)


def cache_dir():
    """The cache directory as a Path, made when missing."""
    named = os.environ.get("KUBEMESH_CACHE")
    path = Path(named) if named else Path("/var/cache/kubemesh-lab" if os.geteuid() == 0 else "~/.cache/kubemesh-lab").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


# One process may prepare in several threads; flock() excludes other processes, but on two descriptors of one process as well.
@contextlib.contextmanager
def locked(name):
    """Hold the lock NAME of the cache: two gates at once must not build the same thing over each other."""
    path = cache_dir() / "locks"
    path.mkdir(exist_ok=True)
    with open(path / name, "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command, **options):
    """Run a command quietly; PrepareError with the end of its output when it fails."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, check=False, **streams, **options)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise PrepareError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{tail}")
    return done.stdout


# --- Debian packages -------------------------------------------------------------------------------------------------------------

_apt = threading.Lock()


def debian_packages(*names):
    """Install the Debian packages that are missing. Raises PrepareError where that is not possible."""
    with _apt, locked("apt"):
        missing = []
        for name in names:
            query = subprocess.run(
                ["dpkg-query", "-W", "-f", "${Status}", name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
            )
            if query.stdout != "install ok installed":
                missing.append(name)
        if not missing:
            return
        if os.geteuid() != 0:
            raise PrepareError(f"Debian packages are missing: {' '.join(missing)}. Install them, or run this as root.")
        say("installing Debian packages: " + " ".join(missing))
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        run(["apt-get", "-q", "update"], env=environment)
        install = ["apt-get", "-q", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "install"]
        run(install + missing, env=environment)


# --- Python interpreters ---------------------------------------------------------------------------------------------------------


def interpreters():
    """The real interpreters of this machine: C({"3.11": Path}). Shims of pyenv are passed over: they fail for versions not active."""
    found = {}
    roots = [os.environ.get("PYENV_ROOT"), "~/.pyenv", "/opt/pyenv"]
    candidates = []
    for root in filter(None, roots):
        candidates += sorted(Path(root).expanduser().glob("versions/3.*/bin/python3.*"))
    for directory in ("/usr/local/bin", "/usr/bin"):
        candidates += sorted(Path(directory).glob("python3.*"))
    for path in candidates:
        version = path.name[len("python"):]
        if version.replace(".", "", 1).isdigit() and os.access(path, os.X_OK):
            found.setdefault(version, path)
    return found


def python(*versions):
    """The first of VERSIONS that this machine has, as a Path, or None."""
    have = interpreters()
    return next((have[version] for version in versions if version in have), None)


def clean_path():
    """A PATH for ansible-test: no pyenv shims, which it takes for interpreters, and the real interpreters at its end."""
    kept = [item for item in os.environ.get("PATH", os.defpath).split(os.pathsep) if not item.rstrip("/").endswith("/shims")]
    for path in interpreters().values():
        if str(path.parent) not in kept:
            kept.append(str(path.parent))
    return os.pathsep.join(kept)


# --- Virtual environments --------------------------------------------------------------------------------------------------------


def requirement_text(path):
    """The text of a requirements file with the files that it includes by C(-r)."""
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("-r "):
            text += requirement_text((path.parent / line[3:].strip()).resolve())
    return text


def venv(name, interpreter, requirements):
    """The virtual environment NAME, made when missing: its directory as a Path.

    C(interpreter) is a Path from V(interpreters()), C(requirements) a file below tests/. A directory without the mark that is written
    last is a build that was interrupted: it is made again.
    """
    source = TESTS / requirements
    key = hashlib.sha256(f"{interpreter.resolve()}\n{requirement_text(source)}".encode()).hexdigest()[:12]
    path = cache_dir() / "venv" / f"{name}-{key}"
    mark = path / ".complete"
    with locked(f"venv-{name}"):
        if mark.exists():
            return path
        if str(interpreter).startswith("/usr/bin/"):
            # Debian takes ensurepip out of its Python.
            debian_packages(f"{interpreter.name}-venv" if interpreter.name != "python3" else "python3-venv")
        say(f"making the virtual environment {path.name}")
        shutil.rmtree(path, ignore_errors=True)
        run([str(interpreter), "-m", "venv", str(path)])
        run([str(path / "bin" / "python"), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", "-r", str(source)])
        mark.touch()
    return path


def venv_run():
    """Just enough to run the playbooks: what a user has."""
    return _required("run", ("3.11", "3.12", "3.13"), "requirements-run.txt")


def venv_dev():
    """ansible-core 2.19 with all tools of the gate, on Python 3.11."""
    return _required("dev", ("3.11",), "requirements-dev.txt")


def venv_eda():
    """ansible-rulebook on the Python of the Decision Environment, and the Java that it runs its rules in; None where that Python is not."""
    if python("3.12") is None:
        return None
    debian_packages("openjdk-17-jre-headless")
    return venv("eda", python("3.12"), "requirements-eda.txt")


def venv_core_2_21():
    """ansible-core 2.21, or None where no Python is new enough for it."""
    interpreter = python("3.13", "3.12")
    return venv("core-2.21", interpreter, "requirements-core-2.21.txt") if interpreter else None


def venv_target():
    """The oldest Python of nodes with a test runner and nothing else, or None where Python 3.8 is missing."""
    interpreter = python("3.8")
    return venv("target-3.8", interpreter, "requirements-target-3.8.txt") if interpreter else None


def _required(name, versions, requirements):
    interpreter = python(*versions)
    if interpreter is None:
        debian_packages("python3", "python3-venv")
        interpreter = python(*versions)
    if interpreter is None:
        raise PrepareError(f"None of Python {', '.join(versions)} is here. Debian 12 has 3.11: apt-get install python3 python3-venv")
    return venv(name, interpreter, requirements)


# --- ansible-test ----------------------------------------------------------------------------------------------------------------


def ansible_test_home(pip_python):
    """A home directory for ansible-test with stand-ins for what it would download from its own server. Returns its Path.

    A home of its own keeps ansible-test's and molecule's caches out of the user's. The user's pip configuration is linked into it:
    ansible-test hands HOME to pip, but no PIP variables.
    """
    home = cache_dir() / "home"
    with locked("ansible-test-home"):
        downloads = home / ".ansible" / "test" / "cache"
        downloads.mkdir(parents=True, exist_ok=True)
        for relative in (".config/pip/pip.conf", ".pip/pip.conf"):
            original, link = Path.home() / relative, home / relative
            if original.is_file() and home != Path.home() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(original)
        for name, version in GET_PIP.items():
            if not (downloads / f"pip-{version}-py3-none-any.whl").exists():
                command = [str(pip_python), "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
                run([*command, "-d", str(downloads), f"pip=={version}"])
            (downloads / name).write_text(GET_PIP_SOURCE.replace("{version}", version), encoding="utf-8")
    return home


def target_module_utils(venv_path):
    """A directory with a package C(ansible) that holds nothing but C(module_utils), as a node gets it. Returns the directory.

    ansible-core itself needs a newer Python than the oldest of nodes; ansible-test gives module tests the same reduced package.
    """
    source = next((venv_path / "lib").glob("python3.*/site-packages/ansible"))
    release = (source / "release.py").read_text(encoding="utf-8")
    key = hashlib.sha256(release.encode()).hexdigest()[:12]
    path = cache_dir() / f"module-utils-{key}"
    with locked("module-utils"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "ansible").mkdir(parents=True)
            (partial / "ansible" / "__init__.py").write_text("", encoding="utf-8")
            shutil.copy2(source / "release.py", partial / "ansible" / "release.py")
            shutil.copytree(source / "module_utils", partial / "ansible" / "module_utils", ignore=shutil.ignore_patterns("__pycache__"))
            partial.rename(path)
    return path


# --- Other collections -----------------------------------------------------------------------------------------------------------


def other_collections(pip_python):
    """A collections path (directory with C(ansible_collections) in it) that holds what tests of optional features need."""
    version = ANSIBLE_PACKAGE.rpartition("=")[2]
    key = hashlib.sha256(" ".join(COLLECTIONS).encode()).hexdigest()[:12]
    path = cache_dir() / f"collections-{version}-{key}"
    with locked("collections"):
        if path.exists():
            return path
        say(f"taking {', '.join(COLLECTIONS)} out of the package {ANSIBLE_PACKAGE}")
        downloads = cache_dir() / "downloads"
        command = [str(pip_python), "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "--only-binary", ":all:"]
        run([*command, "-d", str(downloads), ANSIBLE_PACKAGE])
        wheel = next(downloads.glob(f"ansible-{version}-*.whl"))
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        wanted = tuple(f"ansible_collections/{name}/" for name in COLLECTIONS)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if name.startswith(wanted)])
        wheel.unlink()
        partial.rename(path)
    return path


# --- Copies of this collection ---------------------------------------------------------------------------------------------------


def tracked_files():
    """Files of the collection relative to its root: what git has or would add; in a tree without git everything but hidden and output."""
    listed = None
    if shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if listed is not None and listed.returncode == 0:
        names = [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
    else:
        skipped = {".git", ".venv", ".ansible", ".cache", "__pycache__", "output", ".pytest_cache", ".ruff_cache", ".hypothesis"}
        names = [
            path.relative_to(REPOSITORY)
            for path in REPOSITORY.rglob("*")
            if path.is_file() and not skipped.intersection(path.relative_to(REPOSITORY).parts) and path.suffix not in (".pyc", ".gz")
        ]
    return sorted({name for name in names if (REPOSITORY / name).is_file() or (REPOSITORY / name).is_symlink()})


def copy_tree(destination):
    """Copy the collection to DESTINATION/ansible_collections/kubemesh/wireguard: ansible-test wants that by real path. Returns it."""
    target = Path(destination) / "ansible_collections" / "kubemesh" / "wireguard"
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name, follow_symlinks=False)
    return target


def install_artifact(venv_path, destination):
    """Build the collection with ansible-galaxy and install the artifact below DESTINATION.

    Returns (artifact, collections path). The artifact's name carries the version of galaxy.yml.
    """
    destination = Path(destination)
    tree = copy_tree(destination / "source")
    environment = dict(os.environ, ANSIBLE_HOME=str(destination / "ansible-home"))
    galaxy = str(venv_path / "bin" / "ansible-galaxy")
    run([galaxy, "collection", "build", "--force", "--output-path", str(destination)], cwd=tree, env=environment)
    artifact = next(destination.glob("kubemesh-wireguard-*.tar.gz"))
    collections = destination / "collections"
    install = [galaxy, "collection", "install", "--offline", "--force", "--no-deps", "-p", str(collections), str(artifact)]
    run(install, cwd=destination, env=environment)
    return artifact, collections
