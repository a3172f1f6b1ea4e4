"""The paths that a worker needs: its Python environment, the system's libraries, devices, and its own directory."""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from types import ModuleType

from .landlock import Access, Rule

#: Programs and libraries. A compiler is among them, which graphs are compiled by.
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/run/opengl-driver",
)
#: Not all of /etc: credentials may lie there, those of a pool's client among them.
_SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/alternatives",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
    "/etc/crypto-policies",
    "/etc/nvidia",
)
#: What the kernel tells of itself and of processes. Memory, open files and the environment of a process outside the
#: sandbox are closed by Landlock all the same, wherever it is entered.
_KERNEL = ("/proc", "/sys/devices", "/sys/bus", "/sys/class", "/sys/module", "/sys/kernel/mm")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: The driver's, and its memory that processes share.
_GPU_DEVICES = ("/dev/nvidia*", "/dev/shm")


def environment_paths(modules: Mapping[str, ModuleType | None], path: Iterable[str]) -> list[str]:
    """Return where Python finds this process's code: its prefixes, its site-packages, and packages elsewhere.

    ``modules``: those that are imported. Of a folder that is no site-packages only the packages are named that are in
    use: the folder of a source tree may have anything beside them.
    """
    found = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    found += [where for where in sysconfig.get_paths().values() if where]
    found += [where for where in path if os.path.basename(where) in ("site-packages", "dist-packages")]
    for name, module in modules.items():
        if "." in name or module is None:
            continue
        # A namespace package has no file, and several folders.
        folders = list(getattr(module, "__path__", ()))
        file = getattr(module, "__file__", None)
        found += folders or ([file] if file else [])
    named = [where for where in found if isinstance(where, str) and where]
    real = outermost(map(os.path.realpath, named))
    # And as Python names it, where links are on the way: in a root of its own, a worker has no others.
    linked = [where for where in named if os.path.isabs(where) and os.path.realpath(where) != where]
    return outermost([*real, *linked])


def outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths without those that lie in another one, and without the root, sorted."""
    kept: list[str] = []
    for path in sorted(set(paths) - {"/", ""}):
        if not kept or not path.startswith(kept[-1] + "/"):
            kept.append(path)
    return kept


def rules(environment: Iterable[str], own: str, real: bool) -> list[Rule]:
    """Return the rules of a worker whose own directory is that. ``real``: it uses a GPU, so the driver's devices."""
    found = [Rule(path, Access.RUN) for path in (*_SYSTEM, *environment)]
    found += [Rule(path, Access.READ) for path in (*_SETTINGS, *_KERNEL)]
    devices = [*_DEVICES, *(path for name in _GPU_DEVICES if real for path in sorted(glob.glob(name)))]
    found += [Rule(path, Access.DEVICE) for path in devices]
    return [*found, Rule(own, Access.OWN)]
