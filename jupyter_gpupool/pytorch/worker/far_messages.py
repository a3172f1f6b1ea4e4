"""Tensors that ranks at several workers send to each other: they wait where they were sent, and who receives asks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

from .exchange_plan import Elements
from .messages import Messages
from .peer_links import PeerLink, Read
from .shared_storages import SharedStorages
from .staging import discard
from .templates import BadRecord, dtype_named

#: How often a rank that waits looks whether its own session still goes on, in seconds.
_LOOK_S = 0.5
_MAX_REASON_CHARACTERS = 500


class What(IntEnum):
    """What a frame between workers is, beside those of spread_collectives.py: its header begins with this."""

    WANTED = 16  # token, box, name, [source rank, own rank], dtype, length: send it as soon as it is there
    SENT = 17  # token; payload: the elements
    REFUSED = 18  # token, why
    ASKED = 19  # token, box, name: is it there?
    ANSWERED = 20  # token, whether it is
    GIVEN_UP = 21  # token: what was wanted is not waited for any more


class _Question:
    def __init__(self, link: PeerLink, expected: Elements | None = None) -> None:
        self.link = link
        self.expected = expected
        self.answer: torch.Tensor | bool | Exception | None = None


class FarMessages:
    """``messages``: what ranks of this worker have sent. Safe to use from the threads of all sessions and links."""

    def __init__(self, messages: Messages, shared: SharedStorages) -> None:
        self._messages = messages
        self._shared = shared
        self._changed = threading.Condition()
        self._questions: dict[int, _Question] = {}
        #: the boxes whose messages other workers wait for, by the link and their token
        self._wanted: dict[tuple[PeerLink, int], bytes] = {}
        self._tokens = itertools.count(1)

    # -- in the thread of a session

    def awaited(self) -> list[bytes]:
        """The boxes for whose messages other workers wait."""
        with self._changed:
            return list(self._wanted.values())

    def fetch(
        self,
        link: PeerLink,
        message: tuple[bytes, bytes],
        ranks: tuple[int, int],
        expected: Elements,
        timeout_s: float,
        is_over: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Wait for a message, by its box and name, that a rank at another worker sends; its elements, on the host.

        ``ranks``: who sends it, and who takes it. Raises RuntimeError, naming the rank, if it does not come.
        """
        source, here = ranks
        found = self._ask(
            _Question(link, expected),
            [What.WANTED, *message, list(ranks), str(expected.dtype)[6:], expected.length],
            f"rank {here} waited {timeout_s:g} s in recv for rank {source}",
            f"the connection to the GPU server of rank {source} is lost",
            timeout_s,
            is_over,
        )
        assert isinstance(found, torch.Tensor), "the other worker has sent it"
        return found

    def has(
        self, link: PeerLink, message: tuple[bytes, bytes], is_over: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether a message is there, or will not come. Raises RuntimeError where the other worker does not say."""
        lost = "the connection to another GPU server of the lease is lost"
        return bool(self._ask(_Question(link), [What.ASKED, *message], lost, lost, 60.0, is_over))

    def _ask(
        self,
        question: _Question,
        header: list[Any],
        late: str,
        lost: str,
        timeout_s: float,
        is_over: Callable[[], bool],
    ) -> torch.Tensor | bool:
        token, deadline = next(self._tokens), time.monotonic() + timeout_s
        with self._changed:
            self._questions[token] = question
            question.link.send([header[0], token, *header[1:]])
            try:
                while question.answer is None:
                    if question.link.lost:
                        raise RuntimeError(f"{lost}: {question.link.lost}")
                    if is_over() or time.monotonic() > deadline:
                        raise RuntimeError(late)
                    self._changed.wait(_LOOK_S)
            finally:
                del self._questions[token]
                if question.answer is None and question.expected is not None:
                    question.link.send([What.GIVEN_UP, token])  # whoever asks again is to get it
        if isinstance(question.answer, Exception):
            raise question.answer
        return question.answer

    # -- in the thread that reads a link

    def lose(self, link: PeerLink) -> None:
        """A link has ended."""
        with self._changed:
            self._wanted = {key: box for key, box in self._wanted.items() if key[0] is not link}
            self._changed.notify_all()

    def hear(self, link: PeerLink, header: list[Any], nbytes: int, read: Read) -> None:
        """Take a frame of another worker. Raises BadRecord, TypeError and ValueError for what no worker sends."""
        what, token, *fields = header
        if type(token) is not int:
            raise BadRecord(f"a message numbered {token!r:.40}")
        if what == What.SENT:
            self._take(link, token, nbytes, read)
            return
        if nbytes:
            raise BadRecord(f"{nbytes} bytes that belong to nothing")
        hears: dict[int, Callable[..., None]] = {
            What.WANTED: self._note_wanted,
            What.REFUSED: self._note_refusal,
            What.ASKED: self._reply,
            What.ANSWERED: self._note_reply,
            What.GIVEN_UP: self._forget,
        }
        hears[What(what)](link, token, *fields)

    def _take(self, link: PeerLink, token: int, nbytes: int, read: Read) -> None:
        with self._changed:
            question = self._questions.get(token)
        if question is None or question.link is not link:
            discard(read, nbytes)  # nobody waits for it any more
            return
        expected = question.expected
        if expected is None or nbytes != expected.nbytes or question.answer is not None:
            raise BadRecord(f"{nbytes} bytes in place of {expected}")
        blank = torch.empty(expected.length, dtype=expected.dtype)
        read(host_bytes(blank))
        self._answer(link, token, blank)

    def _note_refusal(self, link: PeerLink, token: int, why: Any) -> None:
        if not isinstance(why, str):
            raise BadRecord("a refusal without a reason")
        self._answer(link, token, RuntimeError(why[:_MAX_REASON_CHARACTERS]))

    def _note_reply(self, link: PeerLink, token: int, is_there: Any) -> None:
        if type(is_there) is not bool:
            raise BadRecord(f"an answer {is_there!r:.40}")
        self._answer(link, token, is_there)

    def _answer(self, link: PeerLink, token: int, answer: torch.Tensor | bool | Exception) -> None:
        with self._changed:
            question = self._questions.get(token)
            if question is None or question.link is not link:
                return
            if isinstance(answer, torch.Tensor) != (question.expected is not None) and type(answer) is bool:
                raise BadRecord("an answer to another question")
            question.answer = answer
            self._changed.notify_all()

    def _reply(self, link: PeerLink, token: int, box: Any, name: Any) -> None:
        link.send([What.ANSWERED, token, self._messages.has(*_named(box, name))])

    def _note_wanted(
        self, link: PeerLink, token: int, box: Any, name: Any, ranks: Any, dtype: Any, length: Any
    ) -> None:
        source, there = ranks
        if type(source) is not int or type(there) is not int or type(length) is not int:
            raise BadRecord(f"a message of {ranks!r:.40}")
        message, wanted = _named(box, name), Elements(dtype_named(dtype), length)

        with self._changed:
            self._wanted[link, token] = message[0]

        def send() -> None:
            with self._changed:
                if self._wanted.pop((link, token), None) is None:
                    return
            try:
                self._send(link, token, message, (source, there), wanted)
            except Exception as e:
                link.send([What.REFUSED, token, str(e)[:_MAX_REASON_CHARACTERS]])

        self._messages.when_decided(*message, send)

    def _forget(self, link: PeerLink, token: int) -> None:
        with self._changed:
            self._wanted.pop((link, token), None)

    @torch.inference_mode()
    def _send(
        self,
        link: PeerLink,
        token: int,
        message: tuple[bytes, bytes],
        ranks: tuple[int, int],
        wanted: Elements,
    ) -> None:
        sent = self._messages.take(*message, ranks, 0.0)
        try:
            values = sent.memory()
            assert values is not None, "what was sent has memory"
            if (values.dtype, values.numel()) != wanted:
                raise ValueError(
                    f"rank {ranks[0]} sends {Elements(values.dtype, values.numel())} to a tensor of {wanted}"
                )
            # The view keeps the memory for as long as it takes.
            link.send([What.SENT, token], host_bytes(values.contiguous().cpu()))
        finally:
            if self._shared.leave(sent):
                sent.device.give_storage(sent.nbytes)


def _named(box: Any, name: Any) -> tuple[bytes, bytes]:
    if not isinstance(box, bytes) or not isinstance(name, bytes):
        raise BadRecord(f"a message named {name!r:.60}")
    return box, name
