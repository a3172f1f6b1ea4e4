"""What a frontend asks of this kernel, between two cells: slices for it, another share of them, their release.

A frontend executes nothing and evaluates one of these calls (``user_expressions`` of an execute request), so the
notebook's variables, history and output stay as they are. Every call answers with an :class:`Answer`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from IPython import get_ipython

from .. import face
from ..pool.errors import InvalidRequest, PoolError
from ..pool.models import Lease, LeaseState
from . import here, tensors

#: What a frontend may say of the slices that it wants.
_FIELDS = ("num_gpus", "partial", "memory_mib", "filters", "spread")
#: A worker that takes longer to come up than this is no longer waited for; it is attached when it is there.
_PATIENCE_S = 20.0


class Answer:
    """``said`` is one line for people, ``error`` the class of what went wrong, if something did."""

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
def request(wish: dict[str, Any]) -> Answer:
    """Ask for slices. Answers when they are attached, refused or queued; what is queued is attached when its turn
    comes, beside what the notebook does then."""
    unknown = sorted(set(wish) - set(_FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0][:40]!r}; known are {', '.join(_FIELDS)}")
    if here.lease_id() is not None and not here.forget_ended():
        raise PoolError("this notebook has slices, or waits for some; release them first")
    # PyTorch is imported here, in the notebook's own thread; the other one only waits and attaches.
    face.check_torch()
    asking = _Asking(wish)
    asking.settled.wait(_PATIENCE_S)
    return asking.answer()


@_answered
def resize(share: dict[str, Any]) -> Answer:
    """Give the slices another share of their GPUs; what is on them stays."""
    if here.spec() is None:
        raise PoolError("this notebook has no slices to resize")
    return Answer(here.describe(here.resize(share.get("partial"), share.get("memory_mib"))))


@_answered
def release(force: bool = False) -> Answer:
    """Give the slices back, their tensors moved to the CPU; InUse where some cannot be, unless ``force`` loses them."""
    if here.lease_id() is None:
        return Answer("this notebook has no slices")
    told = ""
    if here.spec() is not None:
        shell = get_ipython()
        told = tensors.clear(shell.user_ns if shell else {}, force=force)
    here.release()
    return Answer(told)


class _Asking:
    """One request, in a thread of its own until it has come to something."""

    def __init__(self, wish: dict[str, Any]) -> None:
        self._wish = wish
        self._lease: Lease | None = None
        self._attached: face.Lease | None = None
        self._refusal: Exception | None = None
        self.settled = threading.Event()
        threading.Thread(target=self._run, name="gpupool-asked", daemon=True).start()

    def answer(self) -> Answer:
        if self._refusal is not None:
            return Answer(str(self._refusal).splitlines()[0], type(self._refusal).__name__)
        if self._attached is not None:
            return Answer(here.describe(self._attached.spec), lease=self._attached.id, state="ACTIVE")
        if self._lease is None:
            return Answer("the pool has not answered yet; it is still being asked")
        return Answer("", lease=self._lease.id, state=self._lease.state.value, position=self._lease.position)

    def _run(self) -> None:
        try:
            self._attached = face.attach(
                self._wish.get("num_gpus", 1),
                self._wish.get("partial"),
                memory_mib=self._wish.get("memory_mib"),
                filters=self._wish.get("filters"),
                spread=self._wish.get("spread", False),
                label=here.label(),
                news=self._news,
            )
            os.environ.pop(here.REFUSED, None)
        except (PoolError, RuntimeError) as e:
            self._refusal = e
        self.settled.set()

    def _news(self, lease: Lease) -> None:
        self._lease = lease
        if lease.state is LeaseState.QUEUED:
            self.settled.set()
