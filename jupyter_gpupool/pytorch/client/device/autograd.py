"""Runs backward passes in the caller's thread, and keeps their errors intact."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.torch_internals.client import (
    RUN_BACKWARD,
    RUN_BACKWARD_OF_AUTOGRAD,
    DeviceGuardBase,
    DeviceType,
    set_multithreading_enabled,
)

_PRIVATE_USE_1 = DeviceType.PrivateUse1
_zfill = "".zfill


class _UnderWay(threading.local):
    error: BaseException | None = None


_under_way = _UnderWay()


class DeviceGuard(DeviceGuardBase):  # type: ignore[misc]
    """Returns the device's type to PyTorch's core.

    The core calls this when a backward step begins and when it ends, also by an error. Then Python runs
    while an exception is set, takes it for an error of this method, and the process aborts. So this method
    takes the exception away, and the backward pass raises it.
    """

    def type_(self) -> Any:
        """The device type that is guarded."""
        try:
            # Converting -1 to C makes Python check for an exception: in C, -1 may mean that one is set.
            _zfill(-1)
        except BaseException as e:
            _under_way.error = e
        return _PRIVATE_USE_1


def register() -> None:
    """Run backward passes in the caller's thread: autograd would start a thread for one device only."""
    run = RUN_BACKWARD.value
    first = threading.Lock()
    started = False

    @functools.wraps(run)
    def backward(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        if not device_names.count:
            return run(*args, **kwargs)
        set_multithreading_enabled(False)
        if not started:
            # The engine may abort the process when several threads start it at once.
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
            # The core noticed only that its exception was taken away.
            e.__suppress_context__ = True
            try:
                raise error from None
            finally:
                # Its traceback has this frame: a cycle would keep the tensors of the failed step.
                del error

    for place in (RUN_BACKWARD, RUN_BACKWARD_OF_AUTOGRAD):
        setattr(*place, backward)


def _run_once(run: Any) -> None:
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        one = torch.ones((), device="cpu")
        run((leaf * 1,), (one,), False, False, (leaf,), allow_unreachable=True)
