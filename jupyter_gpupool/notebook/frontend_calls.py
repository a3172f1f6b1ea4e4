"""The calls that a frontend makes in this kernel: request GPU slices, resize them, release them.

A frontend executes no code. It evaluates one of these calls in ``user_expressions`` of an execute request, so the
notebook's variables, history and output stay as they are. Every call returns an :class:`Answer`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from IPython import get_ipython

from jupyter_gpupool.core.environment import REFUSED
from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.core.request_schema import WANTED
from jupyter_gpupool.lease import Lease as AttachedLease
from jupyter_gpupool.lease import attach, check_torch

from . import kernel_lease, release_tensors

#: How long :func:`request` waits for the slices, in seconds. Later ones are attached in the background.
_MAX_ANSWER_S = 20.0


class Answer:
    """One line for the user in ``said``, and the class of the error, if there was one, in ``error``."""

    def __init__(self, said: str, error: str = "", **more: Any) -> None:
        self.content = {"said": said, "error": error, **more}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"application/json": self.content, "text/plain": self.content["said"]}


def _answered(call: Callable[..., Answer]) -> Callable[..., Answer]:
    def answer(*args: Any, **kwargs: Any) -> Answer:
        try:
            return call(*args, **kwargs)
        except (PoolError, RuntimeError) as e:
            return Answer(str(e).splitlines()[0], type(e).__name__)

    return answer


@_answered
def request(fields: dict[str, Any]) -> Answer:
    """Request GPU slices. Returns when they are attached, refused or queued.

    A queued request is attached when it is granted, while the notebook goes on.
    """
    unknown = sorted(set(fields) - set(WANTED))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:40]!r}; the fields are {', '.join(WANTED)}")
    if kernel_lease.lease_id() is not None and not kernel_lease.forget_ended():
        raise PoolError("this notebook has GPU slices or waits for some; release them first")
    # Import PyTorch in the notebook's own thread; the other thread only waits and attaches.
    check_torch()
    pending = _BackgroundRequest(fields)
    pending.settled.wait(_MAX_ANSWER_S)
    return pending.answer()


@_answered
def resize(share: dict[str, Any]) -> Answer:
    """Change the memory of the slices. Tensors on them stay."""
    if kernel_lease.spec() is None:
        raise PoolError("this notebook has no GPU slices to resize; request some first")
    return Answer(kernel_lease.describe(kernel_lease.resize(share.get("partial"), share.get("memory_mib"))))


@_answered
def release(force: bool = False) -> Answer:
    """Release the slices and move their tensors to the CPU.

    Answers with SliceInUse if some cannot be moved, unless ``force``.
    """
    if kernel_lease.lease_id() is None:
        return Answer("this notebook has no GPU slices")
    moved = ""
    if kernel_lease.spec() is not None:
        shell = get_ipython()
        moved = release_tensors.clear(shell.user_ns if shell else {}, force=force)
    kernel_lease.release()
    return Answer(moved)


#: The calls that a frontend may name. ``jupyter_gpupool._jupyter_gpupool_call`` runs them.
CALLS: dict[str, Callable[..., Answer]] = {"request": request, "resize": resize, "release": release}


class _BackgroundRequest:
    """One request, made in a thread of its own."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self._lease: Lease | None = None
        self._attached: AttachedLease | None = None
        self._refusal: Exception | None = None
        self.settled = threading.Event()
        threading.Thread(target=self._run, name="gpupool-asked", daemon=True).start()

    def answer(self) -> Answer:
        if self._refusal is not None:
            return Answer(str(self._refusal).splitlines()[0], type(self._refusal).__name__)
        if self._attached is not None:
            return Answer(kernel_lease.describe(self._attached.spec), lease=self._attached.id, state="ACTIVE")
        if self._lease is None:
            return Answer("the pool has not answered yet; the request goes on in the background")
        return Answer("", lease=self._lease.id, state=self._lease.state.value, position=self._lease.position)

    def _run(self) -> None:
        try:
            self._attached = attach(
                memory_fraction=self._fields.get("partial"),
                **{name: value for name, value in self._fields.items() if name != "partial"},
                label=kernel_lease.label(),
                on_update=self._on_update,
            )
            os.environ.pop(REFUSED, None)
        except (PoolError, RuntimeError) as e:
            self._refusal = e
        self.settled.set()

    def _on_update(self, lease: Lease) -> None:
        self._lease = lease
        if lease.state is LeaseState.QUEUED:
            self.settled.set()
