"""What a device has recorded of calls of graphs, to do them again at once; and the memory that it keeps for that."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

#: What a recorded call does: a function of its inputs, which returns its results.
Work = Callable[[Sequence[torch.Tensor]], list[Any]]

#: What recordings keep is at most this share of a slice's memory.
_MAX_SHARE = 0.25
#: After so many recordings that failed, a device records nothing more.
_MAX_FAILURES = 8


class CannotRecord(Exception):
    """A call could not be recorded, and nothing of it was done; the message is the reason."""


class NoRoom(CannotRecord):
    """There is no memory for it now. There may be later."""


class Recording(Protocol):
    """The work of one call, as a device has recorded it, on the memory that it used then."""

    def replay(self) -> Sequence[Any]:
        """Do it again, and return the results. They are on memory that any replay writes to."""


class Recorder(Protocol):
    """Lets a device record; see cuda_graphs.py."""

    def rehearse(self, work: Work, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Do the work as it will be recorded, so that libraries set up what they need. The caller may read the
        results, but not keep them."""

    def record(self, work: Work, inputs: Sequence[torch.Tensor]) -> Recording:
        """Record the work, without doing it. Raises CannotRecord, also as NoRoom, and the errors of a lost device."""

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """New memory for an input of that layout."""

    def kept_bytes(self) -> int:
        """The bytes of the device that recordings keep."""

    def release(self) -> None:
        """Give the device what no recording keeps any more. Nothing is being recorded."""


class Memory(Protocol):
    """The slice's memory, as device.py counts it."""

    limit: int

    @property
    def allocated(self) -> int:
        """The bytes that are taken; approximate while other sessions take and give."""

    @property
    def is_shared(self) -> bool:
        """Whether more than one session uses it."""

    def take(self, nbytes: int) -> None:
        """Account for an allocation. Raises torch.OutOfMemoryError."""

    def give(self, nbytes: int) -> None:
        """Account for freed memory."""

    def undisturbed(self) -> contextlib.AbstractContextManager[bool]:
        """Let no other session begin meanwhile, and the memory not be resized; whether there is one session only."""


class Kept:
    """A recording of a graph. Some inputs must be where they were, the others are copied into ``buffers``."""

    def __init__(self, recording: Recording, buffers: Mapping[int, torch.Tensor]) -> None:
        self.recording: Recording | None = recording
        self.buffers = dict(buffers)


class Recordings:
    """The recordings of a device, for all graphs of all sessions. Safe to use from several threads.

    Their results are copied before anything else runs, so that all of them share their memory.
    Without a recorder there are none.
    """

    def __init__(self, memory: Memory, recorder: Recorder | None = None) -> None:
        self._memory = memory
        self._recorder = recorder
        # To take memory may mean to free what is kept here, also while that is accounted for.
        self._lock = threading.RLock()
        self._kept: list[Kept] = []
        self._taken = 0
        self._failures = 0

    @property
    def are_made(self) -> bool:
        """Whether the device records."""
        return self._recorder is not None and self._failures < _MAX_FAILURES

    @property
    def are_made_now(self) -> bool:
        """Whether the device would record at this moment: one session alone uses it."""
        return self.are_made and not self._memory.is_shared

    def has_room(self, nbytes: int) -> bool:
        """Whether a recording that keeps so many bytes would be no burden."""
        memory = self._memory
        return self._taken + nbytes <= memory.limit * _MAX_SHARE and memory.allocated + nbytes <= memory.limit

    def buffers(self, inputs: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Memory for inputs of these layouts. Raises torch.OutOfMemoryError."""
        recorder = self._recorder
        assert recorder is not None, "the device records"
        return {k: recorder.buffer(t) for k, t in inputs.items()}

    def rehearse(
        self, work: Work, inputs: Sequence[torch.Tensor], buffers: Mapping[int, torch.Tensor]
    ) -> list[Any]:
        """Do a call as it will be recorded, and return its results. Raises what the work raises."""
        recorder = self._recorder
        assert recorder is not None, "the device records"
        with self._lock:
            # The results are the program's, and what the recorder allocates is not.
            return [_copied(result) for result in recorder.rehearse(work, _filled(inputs, buffers))]

    def record(
        self, work: Work, inputs: Sequence[torch.Tensor], buffers: Mapping[int, torch.Tensor]
    ) -> Kept | None:
        """Record a call, without doing it. None if the device must not record now.

        Raises CannotRecord, as NoRoom where there is no memory for it, and the errors of a device that is lost.
        """
        recorder = self._recorder
        assert recorder is not None, "the device records"
        with self._lock:
            with self._memory.undisturbed() as alone:
                if not alone:
                    return None
                try:
                    kept = Kept(recorder.record(work, _filled(inputs, buffers)), buffers)
                except NoRoom:
                    raise
                except CannotRecord:
                    self._failures += 1
                    raise
            self._kept.append(kept)
            try:
                self._account()
            except torch.OutOfMemoryError as e:
                self.forget()
                raise NoRoom(f"there is no room for what it keeps: {e}") from None
            return kept

    def replay(self, kept: Kept, inputs: Sequence[torch.Tensor]) -> list[Any] | None:
        """Do a recorded call again with these inputs, and return its results; None if it was forgotten."""
        with self._lock:
            if kept.recording is None:
                return None
            _filled(inputs, kept.buffers)
            return [_copied(result) for result in kept.recording.replay()]

    def drop(self, kept: Kept) -> None:
        """Forget one recording."""
        with self._lock:
            if kept in self._kept:
                self._kept.remove(kept)
            self._release([kept])

    def forget(self) -> bool:
        """Forget all recordings, and free what they keep. Return whether that was anything."""
        with self._lock:
            kept, self._kept = self._kept, []
            before = self._taken
            self._release(kept)
            return self._taken < before

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Forget all recordings, and let nothing be recorded or replayed meanwhile."""
        with self._lock:
            self.forget()
            yield

    def _release(self, dropped: Sequence[Kept]) -> None:
        for kept in dropped:
            kept.recording = None
            kept.buffers.clear()
        if dropped and self._recorder is not None:
            try:
                self._recorder.release()
            finally:  # also where the device is lost
                self._account()

    def _account(self) -> None:
        """Let the slice's memory have what recordings keep now. Raises torch.OutOfMemoryError."""
        assert self._recorder is not None, "there is something to account for"
        now = self._recorder.kept_bytes()
        if now > self._taken:
            wanted = now - self._taken
            self._memory.take(wanted)
            # To make room for that, all of it may have been forgotten: then less is kept, and taken, than before.
            self._taken += wanted
            now = self._recorder.kept_bytes()
        if now < self._taken:
            self._memory.give(self._taken - now)
            self._taken = now


def _filled(inputs: Sequence[torch.Tensor], buffers: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    """The inputs, those that move being copied into their buffers."""
    found = list(inputs)
    for k, buffer in buffers.items():
        target, source = buffer, inputs[k]
        if 0 in buffer.stride():
            target, source = _each_once(buffer), _each_once(source)
        target.copy_(source)
        found[k] = buffer
    return found


def _each_once(t: torch.Tensor) -> torch.Tensor:
    """A view of an expanded tensor without its repetitions: PyTorch does not write to repeated elements."""
    return t.as_strided(
        [min(n, 1) if not stride else n for n, stride in zip(t.shape, t.stride())], t.stride()
    )


def _copied(result: Any) -> Any:
    """A result on memory of its own, with the layout that it has, so that the next replay does not change it."""
    if not isinstance(result, torch.Tensor):
        return result
    storage = result.untyped_storage().clone()
    blank = torch.empty(0, dtype=result.dtype, device=result.device)
    return blank.set_(storage, result.storage_offset(), result.shape, result.stride())
