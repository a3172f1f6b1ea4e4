"""The names that registering a plugin takes. Tried with the releases in :data:`TESTED`."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import compiler, hardware_utils, xla_bridge

#: The oldest and the newest release that was tried.
TESTED = ("0.7", "0.10")


def version() -> str:
    """Return the release of JAX."""
    return str(jax.__version__)


def objection() -> str:
    """Return why this release cannot be used, empty if it can."""
    release = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:2])
    oldest = tuple(int(part) for part in TESTED[0].split("."))
    return f"JAX {jax.__version__} is older than {TESTED[0]}" if release < oldest else ""


def register(name: str, api: Any) -> None:
    """Register a table of functions as the backend ``name``, before all others."""
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.addressof(api), b"pjrt_c_api", None)
    xla_bridge.register_plugin(name, priority=500, c_api=capsule)
    # JAX leaves "cuda" out on a machine without NVIDIA's device files.
    hardware_utils.has_visible_nvidia_gpu = lambda: True


def pass_functions(
    is_own: Callable[[Any], bool], named: Callable[[Sequence[Any]], contextlib.AbstractContextManager[str]]
) -> None:
    """Let a program that calls functions of Python, and is compiled for a client that ``is_own``, name them.

    XLA keeps the functions to itself, where a plugin does not see them. ``named``: within, they have the name that it
    returns, which the program's options then carry.
    """
    compile_and_load = compiler.backend_compile_and_load

    def compile(
        backend: Any, module: Any, executable_devices: Any, options: Any, host_callbacks: Sequence[Any]
    ) -> Any:
        if not host_callbacks or not is_own(backend):
            return compile_and_load(backend, module, executable_devices, options, host_callbacks)
        before = options.env_option_overrides
        with named(host_callbacks) as name:
            options.env_option_overrides = [*before, ("gpupool_functions", name)]
            try:
                return compile_and_load(backend, module, executable_devices, options, ())
            finally:
                options.env_option_overrides = before

    compiler.backend_compile_and_load = compile
