"""A worker that somebody has taken over: what each layer of its sandbox refuses, and nothing else would.

Each attempt is made by a real worker, whose client has it run any Python: with every layer, with the layers switched
off that refuse it, and with each of these alone.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a worker runs PyTorch's operators")

from jupyter_gpupool.engines.local.sandbox import layers, sandbox  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.specs import WorkerSpec  # noqa: E402

from ...support import hostile_operator  # noqa: E402
from ...support.attempts import ATTEMPTS, PROLOGUE  # noqa: E402
from ..conftest import Running, workers  # noqa: E402

OPERATOR = "gpupool_hostile::run"
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, -1

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the attempts are made by the numbers of x86-64's system calls"
)


def _serve(listener: socket.socket, spec: WorkerSpec, own: Path, wanted: Collection[str]) -> None:
    from jupyter_gpupool.engines.local.sandbox import kernel
    from jupyter_gpupool.pytorch.worker import allowed_operators, worker
    from tests.support import hostile_operator  # noqa: F401

    allowed_operators.allow({OPERATOR: ""}, "")
    os.environ["LAYERS"] = ",".join(wanted)
    try:
        kernel.prctl(_PR_SET_PTRACER, _ANYBODY)  # otherwise Yama, where it is, lets only parents trace
    except OSError:
        pass  # it is not here

    def shut_in() -> None:
        environment = sandbox.prepare("off", own).environment
        sandbox.enter(wanted, own, environment, real=False, with_driver=False)

    os._exit(worker.serve(spec, listener, lambda usage: None, shut_in=shut_in))


@pytest.fixture(scope="module")
def lacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Why the layers are not to be had here, as far as they are not."""
    return dict(sandbox.prepare("auto", tmp_path_factory.mktemp("probe")).lacks)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, lacks: dict[str, str]
) -> Iterator[Callable[[Collection[str]], dict[str, str]]]:
    """What comes of each attempt in a worker with these layers; empty: it succeeded."""
    folder = tmp_path_factory.mktemp("pool")
    (folder / "ledger").write_text("everybody's leases")
    with (
        workers(tmp_path_factory) as start,
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages,
    ):
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(64)
        unix.bind(
            path := tempfile.mktemp(dir="/tmp")
        )  # pytest's own folders may have too long a path for a socket
        unix.listen(64)
        messages.bind(path + "-messages")

        def started(wanted: Collection[str]) -> tuple[Running, Path]:
            own = tmp_path_factory.mktemp("own")
            return start(1, serve=functools.partial(_serve, own=own, wanted=wanted)), own

        victim, others = started([layers.PRIVILEGES])
        _run(victim, "answer = 0")  # it is up, and has no capabilities that others would need to look at it

        @functools.cache
        def attempted(wanted: tuple[str, ...]) -> dict[str, str]:
            worker, own = started(wanted)
            given = {
                **{"victim": victim.process.pid, "secret": str(folder / "ledger"), "folder": str(others)},
                **{
                    "own": str(own),
                    "port": tcp.getsockname()[1],
                    "unix": path,
                    "messages": path + "-messages",
                },
            }
            code = (
                f"{PROLOGUE}\ngiven = {given!r}\nattempts = { ({n: a.code for n, a in ATTEMPTS.items()})!r}\n"
            )
            code += (
                "answer = {}\n"
                "for name, code in attempts.items():\n"
                "    try: exec(code, {**globals(), **given}); answer[name] = ''\n"
                "    except BaseException as e: answer[name] = f'{type(e).__name__}: {e}'\n"
            )
            return dict(_run(worker, code))

        yield lambda wanted: attempted(tuple(layer for layer in layers.LAYERS if layer in wanted))
        os.unlink(path)
        os.unlink(path + "-messages")


def _run(worker: Running, code: str) -> Any:
    session.activate(worker.spec)
    try:
        return hostile_operator.run(code)
    finally:
        session.deactivate()


#: In a namespace of networks of one's own nothing can be reached; in a root of one's own nothing else is there.
REFUSALS = ("PermissionError", f"OSError: [Errno {errno.ENETUNREACH}]", "FileNotFoundError")


def is_refused(outcome: str) -> bool:
    return outcome.startswith(REFUSALS)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_worker_that_was_taken_over_is_refused(
    name: str, outcomes: Callable[[Collection[str]], dict[str, str]], lacks: dict[str, str]
) -> None:
    held_by = set(ATTEMPTS[name].held_by)
    here = {layer for layer in layers.LAYERS if not lacks[layer]}
    if not held_by & here:
        pytest.skip(not_shown(name, "is refused", lacks, held_by))
    refused = outcomes(here)[name]
    assert is_refused(refused), refused or "it succeeded"


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, attempt in ATTEMPTS.items() for layer in attempt.held_by]
)
def test_each_layer_alone_refuses_what_succeeds_without_it(
    name: str,
    layer: str,
    outcomes: Callable[[Collection[str]], dict[str, str]],
    lacks: dict[str, str],
) -> None:
    attempt = ATTEMPTS[name]
    if lacks[layer]:
        pytest.skip(not_shown(name, f"is refused by {layer} alone", lacks, [layer]))
    others = {other for other in layers.LAYERS if not lacks[other]} - set(attempt.held_by)
    alone = outcomes(others | {layer})[name]
    assert is_refused(alone), f"{layer} does not hold it: {alone}"
    # Who may not mount gets a namespace of users for that.
    without = outcomes(others - ({layers.MOUNTS} if layers.NAMESPACES in attempt.held_by else set()))[name]
    if without.startswith("PermissionError") and attempt.needs:
        pytest.skip(
            f"not shown: to {name} is refused by {layer}; this machine refuses {attempt.needs} without the "
            f"sandbox, too: {without}"
        )
    assert not without, "it fails without the sandbox, too"


def not_shown(name: str, what: str, lacks: dict[str, str], held_by: Collection[str]) -> str:
    return f"not shown: to {name} {what}; " + "; ".join(
        f"{layer}: {lacks[layer]}" for layer in sorted(held_by)
    )
