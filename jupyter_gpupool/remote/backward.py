"""What autograd needs beside kernels: a thread to run in, and errors that survive the way out of it."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from . import names

_PRIVATE_USE_1 = torch._C._autograd.DeviceType.PrivateUse1
_zfill = "".zfill


class _UnderWay(threading.local):
    error: BaseException | None = None


_under_way = _UnderWay()


class DeviceGuard(torch._C._acc.DeviceGuard):
    """Says which device type is guarded; PyTorch's core does the rest.

    It asks whenever a backward step begins and ends, and it ends by an error as well: Python is called
    then while an exception is set, which Python takes for an error of the answer, and the process
    aborts. So the exception is taken out here, and the backward pass raises it.
    """

    def type_(self) -> Any:
        try:
            # Python looks for an exception where it has read -1, which in C may mean that there is one.
            _zfill(-1)
        except BaseException as e:
            _under_way.error = e
        return _PRIVATE_USE_1


def register() -> None:
    """Let the caller's thread run backward passes: autograd would start one for each device, and knows of one."""
    run = torch.autograd.graph._engine_run_backward
    first = threading.Lock()
    started = False

    @functools.wraps(run)
    def backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        if not names.count:
            return run(*args, **kwargs)
        torch._C._set_multithreading_enabled(False)
        if not started:
            # The engine's own start, seen to abort the process when several threads are the first.
            with first:
                if not started:
                    _run_once(run)
                    started = True
        _under_way.error = None
        try:
            return run(*args, **kwargs)
        except SystemError as e:
            error, _under_way.error = _under_way.error, None
            if error is None:
                raise
            # The core noticed only that its exception is gone.
            e.__suppress_context__ = True
            raise error from None

    torch.autograd.graph._engine_run_backward = backward
    torch.autograd._engine_run_backward = backward


def _run_once(run: Any) -> None:
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        one = torch.ones((), device="cpu")
        run((leaf * 1,), (one,), False, False, (leaf,), allow_unreachable=True)
