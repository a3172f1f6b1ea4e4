"""Registers the plugin with JAX, or says in one line why not."""

from __future__ import annotations

import atexit
import os
import warnings

from jupyter_gpupool.jax.jax_internals import client as internals
from jupyter_gpupool.transport.specs import AttachSpec

_plugin: object | None = None


class NotRegistered(Warning):
    """JAX goes on without the leased GPUs."""


def register(path: str) -> None:
    """Register the plugin for the lease that a file describes."""
    global _plugin
    if _plugin is not None:
        return
    spec = AttachSpec.read(path)
    reason = internals.objection()
    if spec is None:
        reason = "the lease has been released"
    elif spec.mode == "direct":
        return  # the GPUs are here, and JAX finds them by itself
    else:
        spec = spec.visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not spec.devices:
            return
        if len(spec.parts()) > 1:
            reason = (
                "the lease spans several GPU servers, and JAX uses slices of one; choose those of one server by "
                "CUDA_VISIBLE_DEVICES"
            )
        elif not all(device.emulated for device in spec.devices):
            reason = "JAX runs on emulated GPUs only so far"
        (spec, *_) = spec.parts()
    if spec is None or reason:
        _warn(reason)
        return
    from .table import Plugin

    try:
        plugin = Plugin(spec, internals.version())
    except OSError:
        _warn(
            "this installation lacks the plugin's compiled part; install jupyter_gpupool where a C compiler is, or "
            "from a wheel that has it"
        )
        return
    internals.register("cuda", plugin.api)
    internals.pass_functions(plugin.is_own, plugin.functions.named)
    atexit.register(plugin.end)
    _plugin = plugin


def _warn(reason: str) -> None:
    warnings.warn(f"JAX does not see the leased GPUs: {reason}", NotRegistered, stacklevel=2)
