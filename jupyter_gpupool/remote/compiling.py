"""Keeps ``torch.compile`` out of the device's own code: it compiles programs, and this is no part of one."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

_frames: Any = torch._C._dynamo.eval_frame
_actions = _frames._FrameAction
#: this frame is not compiled, nor what it calls
_PASS_OVER = _frames._FrameExecStrategy(_actions.SKIP, _actions.SKIP)
_skipped: set[types.CodeType] = set()


def leave_alone(package: str) -> None:
    """Have the compiler pass over every function of the package's modules that are loaded."""
    for name, module in list(sys.modules.items()):
        if name.startswith(package + "."):
            for value in vars(module).values():
                _pass_over(value, name)


def _pass_over(value: object, module: str) -> None:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            _pass_over(part, module)
    elif isinstance(value, types.FunctionType):
        _pass_over_code(value.__code__)
    elif isinstance(value, type) and value.__module__ == module:
        for member in vars(value).values():
            _pass_over(member, module)


def _pass_over_code(code: types.CodeType) -> None:
    if code in _skipped:
        return
    _skipped.add(code)
    _frames.set_code_exec_strategy(code, _PASS_OVER)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _pass_over_code(constant)
