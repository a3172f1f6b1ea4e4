"""Very many frames that no client sends, and that are close to those that one does: nothing breaks, nothing leaks."""

from __future__ import annotations

import functools
import os
import random
import secrets
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.engines.local.bounds import own_limits  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import allowed_operators  # noqa: E402
from jupyter_gpupool.transport import frames, handshake  # noqa: E402
from jupyter_gpupool.transport.specs import WorkerSpec  # noqa: E402

from ...conftest import often  # noqa: E402
from ...support.fuzzed_session import FuzzedSession  # noqa: E402
from ...support.worker_programs import OPERATORS  # noqa: E402
from ..conftest import _serve  # noqa: E402

FRAMES = often(2_000, 100_000)
#: With their memory, sessions that end abruptly are kept for so long.
RESUME_S = 1.0
SLICE_MIB = 64
FACTS: dict[str, Any] = {"torch": torch.__version__, "threads": 1}
#: The worker's bound, as an engine's is: operators need memory that no layout tells.
HOST_MEMORY_MIB = 3072
#: What the worker's own caches may grow by, once they have seen a quarter of it all.
CACHES_MIB = 200
#: The exit code of a worker one of whose threads has met an error that nobody foresaw.
UNFORESEEN = 97


def serve(listener: socket.socket, spec: WorkerSpec, own: Path) -> None:
    """In the sandbox and the bounds of an engine's worker. It ends at the first error that its code did not foresee."""

    def unforeseen(arguments: threading.ExceptHookArgs) -> None:
        traceback.print_exception(arguments.exc_value)
        os._exit(UNFORESEEN)

    threading.excepthook = unforeseen
    own_limits.enter({"data_mib": HOST_MEMORY_MIB})
    _serve(listener, spec, own)


class Witness:
    """A session beside the others, whose memory has a secret, and which computes all the time."""

    def __init__(self, spec: object) -> None:
        self.secret = secrets.token_bytes(24)
        self._sock, _ = handshake.connect(spec, "session", FACTS)  # type: ignore[arg-type]
        self._sock.settimeout(300)
        geometry = [[6], [1], 0, "float32", 0]
        self._layout = [[24], [1], 0, "uint8", 0]
        self._send([codes.ALLOCATE, 1, 24, 0, codes.WRITE, 1, self._layout, self.secret])
        definition = {
            **{"op": "aten::ones_like.default", "tensors": 1, "scalars": 0, "kwargs": {}},
            **{"args": [["t", 0, geometry]], "results": geometry},
        }
        self._send([codes.DEFINE, 0, definition])

    def _send(self, records: list[Any]) -> None:
        frames.send(self._sock, frames.Kind.RECORDS, records)

    def _answer(self) -> tuple[Any, bytes]:
        kind, header, length = frames.receive(self._sock)
        assert kind is frames.Kind.VALUE, header
        payload = bytearray(length)
        frames.receive_into(self._sock, memoryview(payload))
        return header[1], bytes(payload)

    def is_undisturbed(self) -> bool:
        self._send([0, 1, 2, codes.READ, 2, self._layout, codes.FREE, 2, codes.READ, 1, self._layout])
        ones, own = self._answer()[1], self._answer()[1]
        return ones == torch.ones(6).numpy().tobytes() and own == self.secret

    def allocates(self, nbytes: int) -> bool:
        """Whether its device has so much room."""
        self._send([codes.ALLOCATE, 3, nbytes, 0, codes.FREE, 3, codes.WAIT, -1])
        kind, header, _ = frames.receive(self._sock)
        if kind is frames.Kind.ERROR:
            assert header["type"] == "OutOfMemoryError"
            self._answer()
            return False
        return True

    def close(self) -> None:
        self._sock.close()


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_made_up_frames_of_resumed_sessions(start_worker: Callable[..., Any], tmp_path: Path) -> None:
    worker = start_worker(
        serve=functools.partial(serve, own=tmp_path), memory_mib=SLICE_MIB, resume_s=RESUME_S
    )
    witness = Witness(worker.spec)
    rng = random.Random(5)
    read = sessions = 0
    ran: set[str] = set()
    memory_after_warming_up = None
    process = psutil.Process(worker.process.pid)
    while read < FRAMES:
        attacker = FuzzedSession(worker.spec, rng, FACTS, OPERATORS)
        attacker.run()
        read, sessions, ran = read + attacker.read, sessions + 1, ran | attacker.ran
        assert worker.alive(), f"the worker died of session {sessions}"
        assert witness.secret not in attacker.said
        if sessions % 50 == 0:
            assert witness.is_undisturbed()
        if memory_after_warming_up is None and read > FRAMES / 4:
            memory_after_warming_up = process.memory_info().rss
    assert witness.is_undisturbed()
    for operator in ran:
        assert operator.startswith(("aten::", "gpupool::")), operator
        allowed_operators.resolve(operator)  # raises where it is refused
    assert "aten::add.Tensor" in ran
    assert memory_after_warming_up is not None
    assert process.memory_info().rss - memory_after_warming_up < CACHES_MIB << 20
    # Sessions that nobody resumed are over after a while, with all that they had.
    while not witness.allocates((SLICE_MIB << 20) - 4096):
        assert worker.alive()
    witness.close()
