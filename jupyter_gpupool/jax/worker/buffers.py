"""A client's arrays: on a slice, in host memory while their lease is parked, or missing with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jupyter_gpupool.jax.jax_internals import worker as internals
from jupyter_gpupool.jax.protocol.dtypes import numpy_dtype
from jupyter_gpupool.jax.protocol.status import StatusError, status_of

#: How often an array that is being computed is looked at, in seconds.
_LOOK_S = 0.005
_ALIGNMENT = 64


class Buffer:
    """An array, or why there is none. ``device``: the client's number of its slice; ``nbytes``: what it takes of it.

    ``is_token``: it stands for the order of effects, and has no elements.
    """

    __slots__ = ("_fetch", "_form", "_here", "array", "device", "failure", "is_token", "nbytes")

    def __init__(
        self,
        array: Any,
        device: int,
        nbytes: int = 0,
        failure: StatusError | None = None,
        is_token: bool = False,
    ) -> None:
        self.array = array
        self.device = device
        self.nbytes = nbytes
        self.failure = failure
        self.is_token = is_token
        #: while it is away: its type and shape, where it belongs, and what brings it back
        self._form: tuple[str, tuple[int, ...]] | None = None
        self._here: Any = None
        self._fetch: Callable[[], None] | None = None

    def get(self) -> Any:
        """Return the array, which is brought back if it was away."""
        fetch = self._fetch  # another thread may be bringing it
        if self.array is None and fetch is not None:
            fetch()
        return self.array

    def forget(self) -> None:
        """Nobody uses it any more."""
        self.array = self._fetch = None

    # -- parking and moving

    @property
    def form(self) -> tuple[str, tuple[int, ...]] | None:
        """Its type, by NumPy's name, and its shape; None for what has no elements."""
        if self.is_token or self.failure is not None:
            return None
        return self._form if self.array is None else (str(self.array.dtype), tuple(self.array.shape))

    def content(self, timeout_s: float) -> np.ndarray[Any, Any] | None:
        """Return its bytes in place, once they are computed; None where there are none. Raises TimeoutError."""
        array, until = self.array, time.monotonic() + timeout_s
        if array is None or self.is_token:
            return None
        while not array.is_ready():
            if time.monotonic() >= until:
                raise TimeoutError
            time.sleep(_LOOK_S)
        try:
            elements = np.asarray(array)
        except (RuntimeError, ValueError) as e:  # XLA's own, of the program that computed it
            self.array, self.failure = None, status_of(str(e))
            return None
        return _writable(elements.reshape(-1).view(np.uint8))

    def let_go(self, fetch: Callable[[], None]) -> None:
        """Drop the array, whose bytes are elsewhere. ``fetch`` calls :meth:`bring`."""
        (self._here,) = self.array.devices()
        self._form, self._fetch, self.array = self.form, fetch, None

    def bring(self, content: np.ndarray[Any, Any]) -> None:
        """Have the array again, on those bytes, which nothing changes any more."""
        if self._fetch is not None and self._form is not None:
            self.array = array_of(content, *self._form, self._here)
            self._fetch = None  # not before: who uses it meanwhile has to wait


def aligned(nbytes: int) -> np.ndarray[Any, Any]:
    """Memory for elements that XLA need not copy: it uses what begins at a multiple of 64 bytes as it is."""
    content = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -content.ctypes.data % _ALIGNMENT
    return content[begin : begin + nbytes]


def array_of(
    content: np.ndarray[Any, Any], dtype: str, dims: tuple[int, ...] | list[int], device: Any
) -> Any:
    """Return an array of those bytes on a device."""
    kind = numpy_dtype(dtype)
    raw = content.view(f"V{kind.itemsize}") if kind.itemsize > 1 else content
    return internals.put(raw.view(kind).reshape(dims), device)


class _Owner:
    """Bytes without NumPy's mark that they are not to be written to. One class for all: each class is a cycle, and
    would keep what it refers to until the collector comes by."""

    __slots__ = ("__array_interface__", "owned")

    def __init__(self, content: np.ndarray[Any, Any]) -> None:
        self.owned = content
        self.__array_interface__ = {**content.__array_interface__, "data": (content.ctypes.data, False)}


def _writable(content: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same bytes without that mark, at which PyTorch warns. Whoever has them keeps the array."""
    return np.asarray(_Owner(content)) if content.size else np.empty(0, np.uint8)
