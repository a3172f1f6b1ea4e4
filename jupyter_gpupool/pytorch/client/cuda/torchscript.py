"""TorchScript: moves scripted modules to a slice and back, and saves and loads them there."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickletools
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.torch_internals.client import (
    LOAD_SCRIPT,
    MODULE_APPLY,
    SCRIPT,
    FileReader,
    rewrite_graph,
)

#: TorchScript's own ``is_cuda`` asks for the backend's name in C++, which is not CUDA's for a slice.
_IS_CUDA = """
graph(%x):
  %result : bool = prim::is_cuda(%x)
  return (%result)"""
_IS_NOT_ON_CPU = """
graph(%x):
  %on_cpu : bool = prim::is_cpu(%x)
  %result : bool = aten::__not__(%on_cpu)
  return (%result)"""


def _let_slices_be_cuda(script: Any) -> Any:
    """Let ``x.is_cuda`` in scripted code be true for tensors on a slice. It has to be before the first call."""
    if isinstance(script, torch.jit.ScriptModule):
        parts: Any = script.modules()
        graphs = [m._c._get_method(name).graph for m in parts for name in m._c._method_names()]
    else:
        graphs = [script.graph] if isinstance(script, torch.jit.ScriptFunction) else []
    for graph in graphs:
        rewrite_graph(_IS_CUDA, _IS_NOT_ON_CPU, graph)
    return script


def _for_a_file(module: Any) -> Any:
    """The module, or a copy on the CPU of one that is on a slice: C++ cannot read from there."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    if all(device_names.slice_index(t.device) is None for t in tensors):
        return module
    with torch.no_grad():
        copied = copy.deepcopy(module).cpu()
    for there, here in zip(module.parameters(), copied.parameters(), strict=True):
        here.requires_grad_(there.requires_grad)
    return copied


def _saved_on(f: Any) -> set[str]:
    """The names of the devices that a file's tensors were on. Its pickle is read, not executed."""
    start = f.tell() if hasattr(f, "read") else None
    file: Any = f if start is not None else os.fspath(f)
    names, memo, last = set(), {}, None
    for code, argument, _ in pickletools.genops(FileReader(file).get_record("data.pkl")):
        if code.name == "BINUNICODE":
            last = argument
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
        elif code.name in ("BINGET", "LONG_BINGET"):
            last = memo.get(argument) or last
        elif code.name == "BINPERSID":  # after ("storage", type, key, device, number)
            names.add(last)
    if start is not None:
        f.seek(start)
    return {name for name in names if name is not None}


def _place(f: Any, map_location: Any) -> Any:
    """Where to load a file's tensors to: what the caller named, or else where they were saved."""
    if map_location is not None or (hasattr(f, "read") and not f.seekable()):
        return map_location
    try:
        names = _saved_on(f)
    except (RuntimeError, OSError, ValueError):
        return None  # PyTorch has words for what it cannot read
    if all(device_names.slice_index(name) is None for name in names):
        return None
    if len(names) > 1:
        raise RuntimeError(
            f"torch.jit.load: the file has tensors of {', '.join(sorted(names))}; "
            "load it with map_location='cpu' or map_location='cuda'"
        )
    return names.pop()


def alias(patches: Patches) -> None:
    """Let scripted modules move to a slice, be saved, and be loaded there by ``torch.jit.load``."""
    module: Any = torch.jit.RecursiveScriptModule
    apply = MODULE_APPLY.value
    load = torch.jit.load
    script: Any = torch.jit.script
    save, save_to_buffer = module.save, module.save_to_buffer

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        # The module in C++ keeps the tensor that a parameter was before it moved, so it gets the moved one.
        before = [(m, name, p) for m in self.modules() for name, p in m._parameters.items()]
        apply(self, fn, recurse)
        for m, name, p in before:
            m._parameters[name] = p
        return self

    @functools.wraps(load)
    def load_on_slice(
        f: Any, map_location: Any = None, _extra_files: Any = None, _restore_shapes: bool = False
    ) -> Any:
        # C++ cannot copy to a slice while it reads a file.
        map_location = _place(f, map_location)
        index = None if map_location is None else device_names.slice_index(map_location)
        loaded = load(f, map_location if index is None else "cpu", _extra_files, _restore_shapes)
        _let_slices_be_cuda(loaded)
        return loaded if index is None else loaded.to(torch.device("cuda", index))

    @functools.wraps(script)
    def script_for_slice(*args: Any, _frames_up: int = 0, **kwargs: Any) -> Any:
        # The names in a class are those where it is scripted, one frame further up now.
        return _let_slices_be_cuda(script(*args, _frames_up=_frames_up + 1, **kwargs))

    @functools.wraps(save)
    def save_from_slice(self: Any, f: Any, **kwargs: Any) -> Any:
        return save(_for_a_file(self), f, **kwargs)

    @functools.wraps(save_to_buffer)
    def save_from_slice_to_buffer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return save_to_buffer(_for_a_file(self), *args, **kwargs)

    for kind in (module, torch.jit.ScriptModule):  # the latter is what tracing makes
        patches.set(kind, MODULE_APPLY.name, _apply)
        patches.set(kind, "save", save_from_slice)
        patches.set(kind, "save_to_buffer", save_from_slice_to_buffer)
    patches.set(torch.jit, "script", script_for_slice)
    patches.set(*SCRIPT, script_for_slice)
    patches.set(torch.jit, "load", load_on_slice)
    patches.set(*LOAD_SCRIPT, load_on_slice)
