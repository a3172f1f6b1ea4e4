"""Keeps ``torch.compile`` from compiling this package: it is no part of the user's program."""

from __future__ import annotations

import sys
import types

from jupyter_gpupool.pytorch.torch_internals.client import eval_frame

_actions = eval_frame._FrameAction
#: neither this frame nor what it calls is compiled
_SKIP = eval_frame._FrameExecStrategy(_actions.SKIP, _actions.SKIP)
_skipped: set[types.CodeType] = set()


def skip_package(package: str) -> None:
    """Let the compiler skip every function in the loaded modules of ``package``."""
    for name, module in list(sys.modules.items()):
        if name.startswith(package + "."):
            for value in vars(module).values():
                _skip(value, name)


def _skip(value: object, module: str) -> None:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            _skip(part, module)
    elif isinstance(value, types.FunctionType):
        _skip_code(value.__code__)
    elif isinstance(value, type) and value.__module__ == module:
        for member in vars(value).values():
            _skip(member, module)


def _skip_code(code: types.CodeType) -> None:
    if code in _skipped:
        return
    _skipped.add(code)
    eval_frame.set_code_exec_strategy(code, _SKIP)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _skip_code(constant)
