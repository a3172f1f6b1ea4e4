"""What the layers of a worker's sandbox decide, without a kernel."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_gpupool.engines.local.sandbox import (
    bpf,
    kernel,
    landlock,
    layers,
    mounts,
    namespaces,
    seccomp,
    worker_paths,
)
from jupyter_gpupool.engines.local.sandbox.landlock import Access
from jupyter_gpupool.engines.local.sandbox.system_calls import ARCHITECTURES, NEWEST, NUMBERS

EPERM, ENOSYS = bpf.refused(1), bpf.refused(38)
PID = 4242
MACHINES = sorted(NUMBERS)


def verdict(code: list[bpf.Instruction], number: int, *arguments: int, machine: str = "x86_64") -> int:
    """What the kernel would make of a call: a machine for the few instructions that filters have."""
    words = {0: number, 4: ARCHITECTURES[machine]}
    for k in range(6):
        value = arguments[k] if k < len(arguments) else 0
        words[16 + 8 * k], words[20 + 8 * k] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    at = accumulator = 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        if operation == 0x20:
            accumulator = words[constant]
        elif operation == 0x54:
            accumulator &= constant
        elif operation == 0x05:
            at += constant
        elif operation == 0x15:
            at += if_true if accumulator == constant else if_false
        elif operation == 0x35:
            at += if_true if accumulator >= constant else if_false
        else:
            assert operation == 0x06
            return constant


@given(
    st.integers(0, 5),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4, unique=True),
    st.sampled_from([2**64 - 1, 0xFFFFFFFF, 0x7E020000]),
    st.booleans(),
    st.data(),
)
def test_a_test_of_an_argument_holds_as_it_says(
    argument: int, values: list[int], mask: int, negated: bool, data: st.DataObject
) -> None:
    test = bpf.Test(argument, tuple(value & mask for value in values), mask, negated)
    code = bpf.program(ARCHITECTURES["x86_64"], [], {7: [test, test]}, newest=10)
    value = data.draw(st.one_of(st.sampled_from(values), st.integers(0, 2**64 - 1)))
    arguments = [0] * 6
    arguments[argument] = value
    holds = (value & mask in test.values) is not negated
    assert verdict(code, 7, *arguments) == (bpf.ALLOW if holds else EPERM)
    assert verdict(code, 8, *arguments) == bpf.ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("with_programs", [False, True])
@pytest.mark.parametrize("with_driver", [False, True])
def test_the_filter(machine: str, with_driver: bool, with_programs: bool) -> None:
    numbers = NUMBERS[machine]
    code = seccomp.worker_filter(machine, PID, with_driver, with_programs)

    def of(name: str, *arguments: int) -> int:
        return verdict(code, numbers[name], *arguments, machine=machine)

    always = (
        "ptrace",
        "process_vm_readv",
        "userfaultfd",
        "bpf",
        "keyctl",
        "io_uring_setup",
        "mount",
        "setns",
    )
    assert {of(name) for name in always} == {EPERM}
    assert of("kill", PID, 9) == of("tgkill", PID, 1, 6) == bpf.ALLOW
    assert {of("kill", pid, 9) for pid in (0, 1, 2**64 - 1, PID + 1)} == {EPERM}
    assert of("prlimit64", 0) == bpf.ALLOW and of("prlimit64", 1) == EPERM
    assert of("clone", 0x3D0F00) == bpf.ALLOW, "a thread"
    assert of("clone", 0x10000000) == EPERM, "a namespace"
    assert of("clone3") == ENOSYS
    assert of("ioctl", 2, 0x5412) == of("ioctl", 2, 0x541C) == EPERM
    assert of("ioctl", 2, 0x8901) == of("ioctl", 2, 0x8902) == EPERM
    assert {of("fcntl", 2, command) for command in (8, 10, 15, 1 << 32 | 8)} == {EPERM}
    assert {of("fcntl", 2, command) for command in (0, 1, 2, 3, 4, 7, 1030, 1031)} == {bpf.ALLOW}
    assert of("ioctl", 2, 0xC0304629) == bpf.ALLOW, "one of a driver"
    assert of("execve") == of("execveat") == (bpf.ALLOW if with_programs else EPERM)
    assert verdict(code, NEWEST + 1, machine=machine) == verdict(code, 1 << 30, machine=machine) == ENOSYS
    other = next(one for one in MACHINES if one != machine)
    assert verdict(code, numbers["ptrace"], machine=other) == bpf.KILL_PROCESS
    left = bpf.ALLOW if with_driver else EPERM
    assert of("setsid") == of("setpgid", 0, 0) == left
    assert of("connect") == of("bind") == of("fchown") == left
    modes = [of(name) for name in ("chmod", "fchmod", "fchmodat", "fchmodat2") if name in numbers]
    assert set(modes) == {left if with_driver or not with_programs else bpf.refused(0)}, (
        "compilers see them succeed"
    )
    assert of("socket", 1, 5) == left, "a Unix socket, which CUDA makes"
    assert of("socket", 2, 1) == of("socket", 16, 3) == EPERM
    assert {of("socketpair", 1, kind | flags) for kind in (1, 5) for flags in (0, 0o2004000)} == {bpf.ALLOW}
    assert {of("socketpair", 1, kind | flags) for kind in (2, 3) for flags in (0, 0o2004000)} == {EPERM}
    assert of("socketpair", 2, 1) == EPERM
    assert of("sendto", 3, 8, 1, 0, 0) == of("sendmsg", 3, 8, 0) == bpf.ALLOW
    assert of("sendto", 3, 8, 1, 0, 8) == of("sendmsg", 3, 8, 0x20000000) == left


def test_both_machines_refuse_the_same_calls() -> None:
    only_on_x86 = {"chmod", "chown", "fork", "ioperm", "iopl", "lchown", "modify_ldt", "vfork"}
    assert NUMBERS["x86_64"].keys() - NUMBERS["aarch64"].keys() == only_on_x86
    assert NUMBERS["aarch64"].keys() <= NUMBERS["x86_64"].keys()
    named = {*seccomp._ALWAYS, *seccomp._WITHOUT_DRIVER}
    assert named <= NUMBERS["x86_64"].keys()
    for numbers in NUMBERS.values():
        assert len(set(numbers.values())) == len(numbers) and max(numbers.values()) <= NEWEST


@pytest.mark.parametrize("version", range(1, 8))
def test_the_layer_of_files_is_there_if_it_protects_what_files_contain(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "version", lambda: version)
    assert landlock.missing() == (
        "this kernel's Landlock (before Linux 6.2) does not protect files from being emptied"
        if version < 3
        else ""
    )


def test_a_kernel_that_allows_no_more_namespaces_is_not_said_to_lack_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernel, "syscall", refuse)
    with pytest.raises(OSError, match="max_user_namespaces"):
        namespaces.enter("x86_64")


@pytest.mark.parametrize("version", range(3, 12))
def test_rights_are_those_that_the_kernel_knows(version: int) -> None:
    files, ports, scopes = landlock.handled(version)
    assert files.bit_length() == {3: 15, 4: 15}.get(version, 16)
    assert (bool(ports), bool(scopes)) == (version >= 4, version >= 6)
    for access in Access:
        of_directory, of_file = (landlock.allowed(access, kind, version) for kind in (True, False))
        assert of_directory & ~files == 0 and of_file & ~of_directory == 0
    assert landlock.allowed(Access.OWN, True, version) & (1 << 0 | 1 << 9 | 1 << 10 | 1 << 12) == 0, (
        "no programs, sockets, pipes or links in its own directory"
    )
    assert landlock.allowed(Access.READ, False, version) == 1 << 2


def test_the_environment_is_what_python_imports_from() -> None:
    package, module, namespace = ModuleType("package"), ModuleType("module"), ModuleType("namespace")
    package.__path__ = ["/src/tree/package"]  # type: ignore[attr-defined]
    module.__file__ = "/src/tree/module.py"
    namespace.__path__ = ["/a/namespace", "/b/namespace"]  # type: ignore[attr-defined]
    modules = {
        "package": package,
        "package.inner": package,
        "module": module,
        "namespace": namespace,
        "x": None,
    }
    found = worker_paths.environment_paths(modules, ["/src/tree", "/home/me", "/home/me/site-packages", ""])
    expected = {"/src/tree/package", "/src/tree/module.py", "/a/namespace", "/b/namespace"}
    assert expected | {"/home/me/site-packages"} <= set(found)
    assert not {"/src/tree", "/home/me", "/"} & set(found)
    assert any(worker_paths.outermost([path, sys.prefix]) == [path] for path in found), sys.prefix


def test_what_is_seen_through_links(tmp_path: Path) -> None:
    (tmp_path / "disk" / "home" / "env").mkdir(parents=True)
    (tmp_path / "disk" / "file").touch()
    (tmp_path / "home").symlink_to("disk/home")
    (tmp_path / "disk" / "home" / "up").symlink_to("../file")
    (tmp_path / "circle").symlink_to("circle")
    given = ("home/env", "home/up", "disk/home/env", "none", "circle", "circle/x")
    mounts.view_of.cache_clear()
    found = mounts.view_of(tuple(str(tmp_path / path) for path in given))
    there = str(tmp_path.resolve())
    assert found.mounted == {f"{there}/disk/file": False, f"{there}/disk/home/env": True}
    assert (
        found.links.items()
        >= {
            f"{there}/home": "disk/home",
            f"{there}/disk/home/up": "../file",
        }.items()
    )


def test_a_python_environment_is_named_as_python_names_it_too(tmp_path: Path) -> None:
    (tmp_path / "disk" / "package").mkdir(parents=True)
    (tmp_path / "tree").symlink_to("disk")
    module = ModuleType("package")
    module.__path__ = [str(tmp_path / "tree" / "package")]
    found = worker_paths.environment_paths({"package": module}, [])
    assert {str(tmp_path / "tree" / "package"), str((tmp_path / "disk" / "package").resolve())} <= set(found)


def test_only_the_outermost_paths_are_named() -> None:
    given = ["/usr/lib", "/usr", "/opt/x", "/opt/xy", "/usr/lib/python3", "/", "/opt/x/y"]
    assert worker_paths.outermost(given) == ["/opt/x", "/opt/xy", "/usr"]


def test_a_worker_writes_to_its_own_directory_and_to_devices() -> None:
    rules = worker_paths.rules(["/opt/env"], "/run/pool/lease.run", real=False)
    writable = {rule.path for rule in rules if rule.access not in (Access.READ, Access.RUN)}
    assert writable == {
        "/run/pool/lease.run",
        *(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")),
    }
    assert "/etc" not in {rule.path for rule in rules}


def test_which_layers_a_worker_has() -> None:
    lacks = {"namespaces": "", "mounts": "", "privileges": "", "files": "no Landlock", "system calls": ""}
    assert layers.missing("auto", lacks, real=False) == lacks
    assert layers.missing("require", lacks, real=True) == lacks
    assert all(layers.missing("off", {}, real=False).values())
    with_gpu = layers.missing("auto", {}, real=True)
    assert [layer for layer, why in with_gpu.items() if why] == ["namespaces", "mounts", "files"]
    assert "'require'" in with_gpu["files"]
    assert all(layers.missing("auto", {}, real=True, driver_is_loaded=False).values())
    assert layers.missing("require", {}, real=True, driver_is_loaded=False) == dict.fromkeys(
        layers.LAYERS, ""
    )


def test_no_worker_starts_where_a_layer_is_required_and_missing() -> None:
    lacks = {"namespaces": "none here", "mounts": "none", "privileges": "", "files": "no Landlock"}
    assert layers.objection("require", lacks) == "files: no Landlock"
    assert layers.objection("auto", lacks) == layers.objection("require", {"files": ""}) == ""
