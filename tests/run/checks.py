# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The checks of the gate, in the order in which they run.

A check is a function that takes a C(gate.Context), raises V(Failed) or V(Skipped), and returns a V(Result) or nothing for one passed check.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import typing as t
from pathlib import Path
from xml.etree import ElementTree

import prepare
from prepare import TESTS

# Characters of a failed test's message in the summary: the beginning of it says what was wrong. The whole is in the log.
FAILURE_TEXT = 1500

# Lines of a tool's output in the summary, and characters of each. A linter says last what it found; a command line can be long.
FAILURE_LINES, LINE_TEXT = 8, 300


@dataclasses.dataclass
class Result:
    """How many tests passed, failed and were skipped; a check that is not made of tests counts as one."""

    passed: int = 1
    failed: int = 0
    skipped: int = 0
    remark: str = ""
    # What failed, and the end of what it said.
    failures: tuple = ()

    def note(self):
        """The counts in words, for the line of the check."""
        words = [f"{self.passed} passed"] if (self.passed, self.failed, self.skipped) != (1, 0, 0) else []
        words += [f"{self.failed} failed"] if self.failed else []
        words += [f"{self.skipped} skipped"] if self.skipped else []
        return "; ".join(filter(None, [", ".join(words), self.remark]))


class Failed(Exception):
    """A check found something. C(result) counts the tests where a tool reports them."""

    def __init__(self, message, result=None):
        super().__init__(message)
        self.result = result or Result(passed=0, failed=1)


class Skipped(Exception):
    """A check cannot run on this machine; the message says why."""


class Check(t.NamedTuple):
    """One check. C(timeout) in seconds: about four times what it took on two cores.

    C(cores) that it is given: 2 runs alone on such a machine, 0 waits most of its time. C(background) is for what only computes and judges
    nothing by time: one after the other, with what the others leave of the processor.
    """

    group: str
    name: str
    function: t.Callable
    timeout: int
    cores: int
    background: bool


CHECKS = []

# Seconds for a check that gets only what the others leave: as long as the whole gate may take.
BACKGROUND = 1700


def check(group, *, timeout, cores=1, name=None, background=False):
    """Add the decorated function to the gate; its name with dashes is the name of the check."""

    def add(function):
        CHECKS.append(Check(group, name or function.__name__.replace("_", "-"), function, timeout, cores, background))
        return function

    return add


# --- What several checks share ---------------------------------------------------------------------------------------------------

_once_guard = threading.Lock()


def once(context, key, make):
    """The value of C(make()) for this run of the gate, made by the first check that asks while others wait for it."""
    with _once_guard:
        lock = context.shared.value_locks.setdefault(key, threading.Lock())
    with lock:
        if key not in context.shared.values:
            context.shared.values[key] = make()
        return context.shared.values[key]


def tree(context):
    """A copy of the collection at .../ansible_collections/kubemesh/wireguard, shared by checks that do not write into it."""
    return once(context, "tree", lambda: prepare.copy_tree(context.shared.work / "tree"))


def artifact(context):
    """(artifact file, collections path with the artifact installed), built once."""
    return once(context, "artifact", lambda: prepare.install_artifact(dev(context), context.shared.work / "artifact"))


def dev(context):
    """The directory of the virtual environment with all tools."""
    return once(context, "dev", prepare.venv_dev)


def tool(context, name):
    """Path of a program of that environment."""
    return dev(context) / "bin" / name


def environment(context, venv=None, **more):
    """Variables for Ansible's tools: caches of their own, the environment's programs first, nothing of the user's configuration.

    The home directory is the check's own: ansible-lint and molecule look for collections, and install copies, below it.
    """
    venv = venv or dev(context)
    home = context.work / "home"
    home.mkdir(exist_ok=True)
    return {
        "PATH": f"{venv / 'bin'}{os.pathsep}{prepare.clean_path()}",
        "VIRTUAL_ENV": venv,
        "HOME": home,
        "ANSIBLE_CONFIG": once(context, "ansible.cfg", lambda: _empty_configuration(context)),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_NOCOLOR": "true",
        "NO_COLOR": "1",
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def _empty_configuration(context):
    """An ansible.cfg with nothing in it, so that the one of the machine or the user does not count."""
    path = context.shared.work / "ansible.cfg"
    path.write_text("[defaults]\n", encoding="utf-8")
    return path


def count_junit(paths):
    """The Result that JUnit files report; V(None) when there is none."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seen, failures = False, []
    for path in paths:
        root = ElementTree.parse(path).getroot()
        for suite in root.iter("testsuite"):
            seen = True
            for key in counts:
                counts[key] += int(suite.get(key) or 0)
        for case in root.iter("testcase"):
            for found in [*case.iter("failure"), *case.iter("error")]:
                failures.append((case.get("name"), (found.get("message") or "")[:FAILURE_TEXT]))
    if not seen:
        return None
    failed = counts["failures"] + counts["errors"]
    return Result(passed=counts["tests"] - failed - counts["skipped"], failed=failed, skipped=counts["skipped"], failures=tuple(failures))


def pytest(context, *arguments, venv=None, pythonpath=(), env=None, cwd=None):
    """Run pytest on ARGUMENTS, and count. A run without a single executed test is a failure, unless everything was skipped.

    C(cwd): the directory; that of the repository if none is given.
    """
    venv = venv or dev(context)
    report = context.output / f"{context.name}.xml"
    report.unlink(missing_ok=True)
    variables = environment(context, venv, PYTHONPATH=os.pathsep.join(map(str, pythonpath)), **(env or {}))
    variables["HYPOTHESIS_STORAGE_DIRECTORY"] = context.work / "hypothesis"
    command = [venv / "bin" / "python", "-m", "pytest", "-q", "--color=no", f"--junitxml={report}", f"--basetemp={context.work / 'tmp'}"]
    try:
        context.run([*command, *arguments], env=variables, cwd=cwd)
    except Failed as reason:
        raise Failed(str(reason), count_junit([report]) if report.exists() else None) from None
    return count_junit([report])


# --- Static checks ---------------------------------------------------------------------------------------------------------------


@check("static", timeout=120)
def repo_lint(context):
    """Licence headers, imports allowed on nodes, purity of the core, and names that agree between code, metadata and README."""
    context.run([tool(context, "python"), TESTS / "run" / "repo_lint.py"])


@check("static", timeout=120)
def ruff(context):
    """Style and likely bugs of all Python files."""
    context.run([tool(context, "ruff"), "check", "--no-cache", "--output-format=concise", "."])


@check("static", timeout=120)
def yamllint(context):
    """All YAML files."""
    files = [name for name in prepare.tracked_files() if name.suffix in (".yml", ".yaml")]
    context.run([tool(context, "yamllint"), "--strict", "--format", "parsable", *files])


@check("static", timeout=120)
def changelog(context):
    """Changelog fragments, and that a changelog can be made of them."""
    context.run([tool(context, "antsibull-changelog"), "lint"], env=environment(context))
    context.run([tool(context, "antsibull-changelog"), "lint-changelog-yaml", "changelogs/changelog.yaml"], env=environment(context))


# They wait for answers that do not come, most of the time, so there is room for them beside all that only computes; and for those that do
# hardly anything else beside the others.
WAITING = ("test_agent_live.py", "test_apiserver.py", "test_lock_live.py", "test_preflight_live.py", "test_probe_live.py")
# Node agents under a storm of pods, and over all that can happen to strict mode: minutes.
LONG = ("test_agent_pods_live.py", "test_agent_strict_live.py")


def live_tests(context, chosen):
    """pytest on those tests with real devices whose file name is ``chosen``."""
    need_root()
    prepare.debian_packages("iproute2", "iputils-ping", "nftables", "wireguard-go", "wireguard-tools")
    files = [path for path in test_files("api") + test_files("live") if chosen(path.name)]
    return pytest(context, *files, pythonpath=[tree(context).parents[2]])


@check("live", timeout=900, cores=0)
def live(context):
    """Modules against WireGuard devices and routes in network namespaces."""
    return live_tests(context, lambda name: name not in WAITING + LONG)


@check("live", timeout=900, cores=0)
def live_waiting(context):
    """Node agents, probes, preflight and locks: what waits for others, in network namespaces; and the API server of the tests."""
    return live_tests(context, WAITING.__contains__)


@check("live-agent", timeout=1500, cores=2)
def live_agent(context):
    """Node agents in network namespaces while pods come and go, and under strict mode."""
    return live_tests(context, LONG.__contains__)


def kernel_tests(context, *selection):
    """pytest on the cases of the emulated machine."""
    need_root()
    env = {"ANSIBLE_COLLECTIONS_PATH": collections_path(context), "KUBEMESH_KERNEL_PATIENCE": "2"}
    return pytest(context, *test_files("kernel"), *selection, pythonpath=[tree(context).parents[2]], env=env)


@check("kernel", timeout=1500)
def kernel(context):
    """The modules with the kernel's WireGuard, in an emulated machine."""
    # Here, and on one core: it takes as long as all that follows up to the checks that measure, which then have the machine to themselves.
    return kernel_tests(context, "-k", "not persistence and not agent")


@check("kernel-boot", timeout=900)
def kernel_boot(context):
    """The kernel's WireGuard over reboots of an emulated machine with systemd, and node agents on it."""
    return kernel_tests(context, "-k", "persistence or agent")


@check("static", timeout=240)
def docs(context):
    """Documentation of plugins, roles and guides: schema, markup, references to options and plugins."""
    env = environment(context, ANSIBLE_COLLECTIONS_PATH=prepare.other_collections(tool(context, "python")))
    command = [tool(context, "antsibull-docs"), "lint-collection-docs", "--plugin-docs", "--validate-collection-refs=all"]
    context.run([*command, tree(context)], env=env)


@check("static", timeout=300)
def ansible_lint(context):
    """Ansible content against the production profile."""
    root = tree(context)
    others = prepare.other_collections(tool(context, "python"))
    env = environment(context, ANSIBLE_COLLECTIONS_PATH=f"{root.parents[2]}{os.pathsep}{others}")
    context.run([tool(context, "ansible-lint"), "--offline", "--profile", "production", "--nocolor", "--strict"], cwd=root, env=env)


# --- Unit tests ------------------------------------------------------------------------------------------------------------------


@check("unit", timeout=600, name="unit-core-2.19")
def unit_core_2_19(context):
    """Unit tests of everything but the inventory plugin, ansible-core 2.19 on Python 3.11."""
    return unit_tests(context, "tests/unit", "--ignore=tests/unit/plugins/inventory")


def unit_tests(context, *arguments):
    """pytest in a tree of collections, where tests that run playbooks find their own, with those that optional features need."""
    others, root = prepare.other_collections(tool(context, "python")), tree(context)
    return pytest(context, *arguments, pythonpath=[root.parents[2], others], env={"ANSIBLE_COLLECTIONS_PATH": others}, cwd=root)


@check("unit", timeout=BACKGROUND, background=True)
def inventory(context):
    """The inventory plugin, by ansible-inventory and ansible-playbook against an API server, with all its faults."""
    return unit_tests(context, "tests/unit/plugins/inventory")


@check("awx", timeout=BACKGROUND, background=True)
def awx(context):
    """The playbook awx_setup with the modules of awx.awx, against a small AWX."""
    path = f"{tree(context).parents[2]}{os.pathsep}{prepare.other_collections(tool(context, 'python'))}"
    return pytest(context, *test_files("awx"), env={"ANSIBLE_COLLECTIONS_PATH": path})


@check("unit", timeout=BACKGROUND, name="event-source", background=True)
def event_source(context):
    """The event source for Event-Driven Ansible against an API server, with all its faults; and that ansible-doc can read it."""
    env = environment(context)
    plugins = prepare.REPOSITORY / "extensions" / "eda" / "plugins" / "event_source"
    for path in sorted(plugins.glob("*.py")):
        context.run([tool(context, "ansible-doc"), "-M", plugins, path.stem], env=env)
    return pytest(context, TESTS / "eda" / "test_event_source.py")


def ansible_test(context, venv, *arguments):
    """Run ansible-test in a copy of the collection of its own; the root of the copy."""
    root = prepare.copy_tree(context.work)
    env = environment(context, venv, HOME=prepare.ansible_test_home(venv / "bin" / "python"))
    context.run([venv / "bin" / "ansible-test", *arguments, "--venv", "--color", "no"], cwd=root, env=env)
    return root


def ansible_test_units(context, venv, version):
    """`ansible-test units` on one Python; counted from its JUnit files."""
    if prepare.python(version) is None:
        raise Skipped(f"Python {version} is not on this machine")
    reports = context.work / "ansible_collections" / "kubemesh" / "wireguard" / "tests" / "output" / "junit"
    try:
        ansible_test(context, venv, "units", "--python", version)
    except Failed as reason:
        raise Failed(str(reason), count_junit(reports.glob("*.xml"))) from None
    return count_junit(reports.glob("*.xml"))


@check("unit", timeout=BACKGROUND, name="unit-python-3.8", background=True)
def unit_python_3_8(context):
    """Unit tests of what runs on nodes, on the oldest Python there."""
    return ansible_test_units(context, dev(context), "3.8")


def core_2_21(context):
    """The directory of the environment with ansible-core 2.21; skips the check where no Python can run it."""
    venv = once(context, "core-2.21", prepare.venv_core_2_21)
    if venv is None:
        raise Skipped("ansible-core 2.21 needs Python 3.12 or newer, which is not on this machine")
    return venv


@check("other-core", timeout=BACKGROUND, name="unit-python-3.13", background=True)
def unit_python_3_13(context):
    """Unit tests of everything, ansible-core 2.21 on Python 3.13."""
    return ansible_test_units(context, core_2_21(context), "3.13")


# --- The artifact ----------------------------------------------------------------------------------------------------------------


@check("build", timeout=300)
def build(context):
    """Build the artifact, install it, and have both versions of ansible-core read all playbooks and plugins from the installed copy."""
    archive, collections = artifact(context)
    context.log(f"built {archive.name}, {archive.stat().st_size} bytes")
    installed = collections / "ansible_collections" / "kubemesh" / "wireguard"
    for name in ("tests", ".ci", "Makefile"):
        if (installed / name).exists():
            raise Failed(f"the artifact holds {name}, see build_ignore in galaxy.yml")
    venvs = [dev(context)]
    try:
        venvs.append(core_2_21(context))
    except Skipped as reason:
        context.log(str(reason))
    inventory = context.work / "inventory"
    inventory.write_text("[k8s_cluster]\nnode-1\n", encoding="utf-8")
    playbooks = sorted(path.stem for path in (installed / "playbooks").glob("*.yml"))
    if not playbooks:
        raise Failed("the artifact has no playbooks")
    for venv in venvs:
        env = environment(context, venv, ANSIBLE_COLLECTIONS_PATH=collections)
        context.run([venv / "bin" / "ansible-doc", "--list", "kubemesh.wireguard"], env=env, cwd=context.work)
        modules = sorted(path.stem for path in (installed / "plugins" / "modules").glob("*.py"))
        context.run([venv / "bin" / "ansible-doc", *(f"kubemesh.wireguard.{name}" for name in modules)], env=env, cwd=context.work)
        command = [venv / "bin" / "ansible-playbook", "--syntax-check", "-i", inventory]
        context.run([*command, *(f"kubemesh.wireguard.{name}" for name in playbooks)], env=env, cwd=context.work)
    return Result(remark=f"{archive.name}, {len(playbooks)} playbooks, {len(venvs)} versions of ansible-core")


@check("build", timeout=BACKGROUND, background=True)
def galaxy_importer(context):
    """What Galaxy and Automation Hub say of the artifact."""
    archive = artifact(context)[0]
    config = context.work / "galaxy-importer.cfg"
    settings = ("RUN_ANSIBLE_TEST = False", "CHECK_REQUIRED_TAGS = True", "OFFLINE_ANSIBLE_LINT = True")
    config.write_text("\n".join(["[galaxy-importer]", *settings, ""]), encoding="utf-8")
    env = environment(context, GALAXY_IMPORTER_CONFIG=config)
    context.run([tool(context, "python"), "-m", "galaxy_importer.main", archive], env=env, cwd=context.work)
    # The importer logs what it finds and ends with 0 all the same.
    text = context.log_path.read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.startswith(("WARNING", "ERROR"))]
    if found:
        raise Failed(f"galaxy-importer has {len(found)} remarks: {found[0]}")


@check("build", timeout=300)
def execution_environment(context):
    """What ansible-builder reads from the installed artifact, and that it can make build contexts of our definitions."""
    installed = artifact(context)[1]
    builder = tool(context, "ansible-builder")
    context.run([builder, "introspect", installed], env=environment(context), cwd=context.work)
    text = context.log_path.read_text(encoding="utf-8")
    own = installed / "ansible_collections" / "kubemesh" / "wireguard"
    for name in ("ee-requirements.txt", "ee-bindep.txt"):
        for line in (own / "meta" / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#") and f"{line}  # from collection kubemesh.wireguard" not in text:
                raise Failed(f"ansible-builder does not see '{line}' of meta/{name}")
    for source in ("execution_environment/execution-environment.yml", "eda/decision-environment.yml"):
        target = context.work / Path(source).stem
        command = [builder, "create", "--file", own / "extensions" / source, "--context", target, "--output-filename", "Containerfile"]
        context.run(command, env=environment(context))
        if "requirements.yml" not in (target / "Containerfile").read_text(encoding="utf-8"):
            raise Failed(f"the build context of {source} installs no collections")


# --- Sanity ----------------------------------------------------------------------------------------------------------------------


def sanity(context, venv):
    """`ansible-test sanity` without any ignore file, on all Pythons that are here."""
    ignores = [name for name in prepare.tracked_files() if name.match("tests/sanity/ignore-*.txt")]
    if ignores:
        raise Failed(f"{ignores[0]}: there are no ignores in this collection")
    try:
        ansible_test(context, venv, "sanity")
    except Failed:
        # Once more at the end, where they are read: between them ansible-test logs what it installs.
        for line in context.log_path.read_text(encoding="utf-8").splitlines():
            if line.startswith("ERROR: ") and not line.startswith("ERROR: Found"):
                context.log(line)
        raise
    log = context.log_path.read_text(encoding="utf-8")
    missing = sorted(set(re.findall(r"on Python (3\.\d+) (?:because|due to missing)", log)), key=lambda version: int(version[2:]))
    return Result(remark=f"without Python {', '.join(missing)}" if missing else "")


@check("other-core", timeout=BACKGROUND, name="sanity-core-2.19", background=True)
def sanity_core_2_19(context):
    """`ansible-test sanity` of ansible-core 2.19, no ignores."""
    return sanity(context, dev(context))


@check("sanity", timeout=BACKGROUND, name="sanity-core-2.21", background=True)
def sanity_core_2_21(context):
    """`ansible-test sanity` of ansible-core 2.21, no ignores."""
    return sanity(context, core_2_21(context))


# --- Real devices ----------------------------------------------------------------------------------------------------------------


def need_root():
    """Skip the check for other users: network namespaces belong to root."""
    if os.geteuid() != 0:
        raise Skipped("needs root")


def test_files(directory):
    """The test files below tests/DIRECTORY; skips the check where there is none."""
    files = sorted((TESTS / directory).glob("test_*.py"))
    if not files:
        raise Skipped(f"no tests in tests/{directory}")
    return files


def collections_path(context):
    """ANSIBLE_COLLECTIONS_PATH of the installed artifact and of the collections that optional features need."""
    return f"{artifact(context)[1]}{os.pathsep}{prepare.other_collections(tool(context, 'python'))}"


# Lab tests that are checks of their own; "lab" is the others.
LAB_FILES = {
    "lab-self": ("test_lab_self.py",),
    "lab-runner": ("test_runner.py",),
    "lab-agent": ("test_agent.py", "test_pod_sources.py", "test_published_keys.py"),
    "lab-variants": ("test_variants.py",),
    "lab-kill": ("test_kill.py",),
    "eda-lab": ("test_eda.py",),
    "lab-change": ("test_faults.py", "test_change.py", "test_rotation.py", "test_strict.py"),
}


def lab_tests(context, group, venv=None):
    """pytest on the lab tests of a group, with the installed artifact as the collection that the playbooks come from. What nodes are asked
    without Ansible is answered by the modules of the working tree. C(venv): the environment, that of the gate if none is given."""
    need_root()
    elsewhere = {name for names in LAB_FILES.values() for name in names}
    files = [path for path in test_files("lab")
             if (path.name in LAB_FILES[group] if group in LAB_FILES else path.name not in elsewhere)]
    env = {"ANSIBLE_COLLECTIONS_PATH": collections_path(context)}
    return pytest(context, *files, venv=venv, pythonpath=[artifact(context)[1], TESTS / "lab"], env=env)


@check("lab", timeout=2700, cores=2)
def lab(context):
    """The collection on hosts with systemd, over ssh, with traffic that must not be lost."""
    return lab_tests(context, "lab")


@check("lab-variants", timeout=2700, cores=2)
def lab_variants(context):
    """Other clusters: one family, other data planes, a narrow underlay, networkd."""
    return lab_tests(context, "lab-variants")


# Seconds: one takes 20 to 30 with two nodes, twice that with three.
KILLS = int(os.environ.get("KUBEMESH_KILLS", "12"))


@check("lab-kill", timeout=300 + 120 * KILLS, cores=2)
def lab_kill(context):
    """The controller is killed at random moments: KUBEMESH_KILLS (12) of them."""
    return lab_tests(context, "lab-kill")


@check("lab-change", timeout=2700, cores=2)
def lab_change(context):
    """What changes while a mesh is in use, strict mode, hosts and batches that fail."""
    return lab_tests(context, "lab-change")


@check("lab-agent", timeout=3600, cores=2)
def lab_agent(context):
    """Node agents and published keys with an API server: what comes, changes and goes, and what goes wrong, with traffic."""
    return lab_tests(context, "lab-agent")


@check("lab-self", timeout=600, cores=2)
def lab_self(context):
    """The lab itself: what counts packets sees those that are lost, what looks at the wire sees what is in clear."""
    return lab_tests(context, "lab-self")


@check("lab-runner", timeout=1200, cores=2)
def lab_runner(context):
    """The playbooks under ansible-runner, what becomes an artifact, and slices that are refused."""
    return lab_tests(context, "lab-runner")


def eda(context):
    """The environment with ansible-rulebook."""
    found = once(context, "eda", prepare.venv_eda)
    if found is None:
        raise Skipped("Python 3.12 is not on this machine")
    return found


@check("eda", timeout=600, cores=2)
def rulebook(context):
    """ansible-rulebook with the rulebooks, the event source, the inventory plugin and the playbook as installed."""
    env = {"ANSIBLE_COLLECTIONS_PATH": collections_path(context)}
    return pytest(context, TESTS / "eda" / "test_rulebook.py", venv=eda(context), env=env)


@check("eda", timeout=2700, cores=2, name="eda-lab")
def eda_lab(context):
    """ansible-rulebook on hosts with systemd: nodes that join, change, are replaced and leave, over ssh, with traffic."""
    need_root()
    return lab_tests(context, "eda-lab", eda(context))


@check("molecule", timeout=600, cores=2)
def molecule(context):
    """The default Molecule scenario on the same hosts."""
    need_root()
    root = prepare.copy_tree(context.work)
    env = environment(context, ANSIBLE_COLLECTIONS_PATH=f"{context.work}{os.pathsep}{prepare.other_collections(tool(context, 'python'))}")
    context.run([tool(context, "molecule"), "test"], cwd=root, env=env)


@check("demo", timeout=600, cores=2)
def demo(context):
    """What the README promises: make demo shows a loss of 0 and an unreadable wire, make demo-down leaves nothing."""
    need_root()
    if not (TESTS / "run" / "demo.py").exists():
        raise Skipped("no demo yet")
    script = [tool(context, "python"), TESTS / "run" / "demo.py"]
    try:
        context.run([*script, "up"])
    finally:
        context.run([*script, "down"])
