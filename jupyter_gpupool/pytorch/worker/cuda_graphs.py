"""Records what a real GPU is given to do, as a CUDA graph, by the interface that PyTorch documents.

See "CUDA Graphs" in PyTorch's notes on CUDA semantics. In short: a capture runs on a stream of its own, and what it
allocates comes from a pool of its own, where it stays while the graph exists. Before, the same must have run on that
stream once, so that libraries have their workspaces for it. Random numbers of the GPU's default generator, the only one
that a graph draws from, go on from replay to replay as without a graph: PyTorch registers that generator itself.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import end_allocate_to_pool, release_pool

from .device_errors import DeviceFailure
from .recordings import CannotRecord, NoRoom, Work

#: Before this release, random operators of the whole process fail after a capture that failed: the generator's state
#: says that the capture goes on.
MIN_RELEASE = (2, 13)

#: While one GPU captures, no thread may free cached memory, which means that of all GPUs of the process.
#: It is taken last, after the locks of recordings and of devices.
_capturing = threading.RLock()


def can_record() -> bool:
    """Whether this build of PyTorch has what is needed, also after a capture that fails."""
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    return release >= MIN_RELEASE and end_allocate_to_pool is not None and release_pool is not None


def free_cache() -> None:
    """Give the GPUs what PyTorch's allocator has cached, once nothing is being captured."""
    with _capturing:
        torch.cuda.empty_cache()


class CudaRecorder:
    """Records on one GPU, for one thread at a time. ``failure`` tells an error that ends the device from others.

    All recordings share one pool: they run one after the other, and their results are copied in between. All that is
    allocated on the stream of captures is kept for them, so that is what they take.
    """

    def __init__(
        self, device: torch.device, failure: Callable[[BaseException], DeviceFailure | None]
    ) -> None:
        self._device = device
        self._failure = failure
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._live: weakref.WeakSet[CudaRecording] = weakref.WeakSet()
        #: what the allocator may still look at
        self._failed: list[torch.cuda.CUDAGraph] = []

    def _aside(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._aside()):
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    def rehearse(self, work: Work, inputs: Sequence[torch.Tensor]) -> list[Any]:
        compute, aside = torch.cuda.current_stream(self._device), self._aside()
        aside.wait_stream(compute)
        try:
            with torch.cuda.stream(aside):
                return work(inputs)
        finally:
            compute.wait_stream(aside)

    def record(self, work: Work, inputs: Sequence[torch.Tensor]) -> CudaRecording:
        graph = torch.cuda.CUDAGraph()
        try:
            results = self._capture(graph, work, inputs)
        except Exception as e:
            # What ends a capture hides the operator's own error.
            first = e.__context__ if isinstance(e.__context__, Exception) else e
            if self._failure(e) is not None or self._failure(first) is not None:
                raise
            reason = str(first).splitlines()[0] if str(first) else ""
            kind = NoRoom if _is_for_memory(e) else CannotRecord
            raise kind(f"{type(first).__name__}: {reason}") from e
        recording = CudaRecording(graph, results)
        self._live.add(recording)
        return recording

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Work, inputs: Sequence[torch.Tensor]) -> list[Any]:
        before = torch.cuda.current_stream(self._device)
        with _capturing:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                # Other threads go on meanwhile: they copy, and ask for the time of events.
                with (
                    torch.cuda.device(self._device),
                    torch.cuda.graph(
                        graph, pool=self._pool, stream=self._aside(), capture_error_mode="thread_local"
                    ),
                ):
                    return work(inputs)
            except Exception:
                self._end(graph, before)
                raise

    def _end(self, graph: torch.cuda.CUDAGraph, before: torch.cuda.Stream) -> None:
        """End a capture that has failed: ``torch.cuda.graph`` leaves its stream current, and the pool in use."""
        torch.cuda.set_stream(before)
        try:
            end_allocate_to_pool(self._device.index, self._pool)
            release_pool(self._device.index, self._pool)
        except RuntimeError:  # the capture itself has ended in order
            self._forget_pool()
            return
        self._failed.append(graph)
        # The allocator of page-locked memory believes that the capture goes on, and nothing tells it otherwise: it
        # refuses another one to that pool. The recordings that are there hold the pool themselves.
        self._pool = None

    def _forget_pool(self) -> None:
        if not self._live:  # nothing holds it any more, and its number must not be used again
            self._pool = None

    def kept_bytes(self) -> int:
        if self._stream is None:
            return 0
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == self._stream.cuda_stream and segment["device"] == self._device.index
        )

    def release(self) -> None:
        self._forget_pool()
        torch.cuda.synchronize(self._device)
        free_cache()


class CudaRecording:
    """A captured graph, and its results on the memory of its pool."""

    def __init__(self, graph: torch.cuda.CUDAGraph, results: list[Any]) -> None:
        self._graph = graph
        self._results = results

    def replay(self) -> list[Any]:
        self._graph.replay()
        return self._results


def _is_for_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, is that there was no memory."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
