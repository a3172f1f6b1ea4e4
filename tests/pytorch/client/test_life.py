"""What happens when a worker, a holder or the network fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.transport import frames, handshake, specs
from jupyter_gpupool.transport.lifeline import Lifeline

from ...support.processes import stop


def test_goodbye_ends_the_worker(worker: object) -> None:
    line = Lifeline(worker.spec)  # type: ignore[attr-defined]
    assert line.alive
    line.release()
    line.release()
    assert worker.exit_code() == specs.EXIT_RELEASED  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", ["idle", "computing"])
def test_a_killed_holder_takes_the_worker_with_it(worker: object, moment: str) -> None:
    script = (
        "import sys\n"
        "from jupyter_gpupool.pytorch.client import session\n"
        "from jupyter_gpupool.transport import specs\n"
        "from jupyter_gpupool.transport.lifeline import Lifeline\n"
        "spec = specs.AttachSpec.from_json(sys.stdin.readline())\n"
        "line = Lifeline(spec)\n"
        "if sys.argv[1] == 'computing':\n"
        "    session.activate(spec)\n"
        "    import torch\n"
        "    x = torch.randn(500, 500, device='cuda')\n"
        "    print(x.sum().item() != 0, flush=True)\n"
        "    while True:\n"
        "        x = (x @ x).tanh()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, moment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin
    assert holder.stdout
    holder.stdin.write(worker.spec.to_json() + "\n")  # type: ignore[attr-defined]
    holder.stdin.flush()
    assert holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    assert worker.exit_code() == specs.EXIT_HOLDER_LOST  # type: ignore[attr-defined]
    holder.communicate()


def test_nobody_ever_attaches(start_worker: Callable) -> None:
    assert start_worker(attach_timeout_s=0.3).exit_code() == specs.EXIT_NEVER_ATTACHED


def test_a_silent_network_fences_the_worker(start_worker: Callable) -> None:
    """The connection stands, but nothing comes through it any more: a stopped process does that."""
    running = start_worker(ttl_s=0.5, resume_s=0.5)
    sock, _ = handshake.connect(running.spec, "holder", {})
    assert running.exit_code() == specs.EXIT_FENCED
    sock.close()


def test_a_killed_worker_is_a_clear_error_at_the_next_call(attached: object) -> None:
    lost = threading.Event()
    line = Lifeline(attached.spec, on_lost=lambda reason: lost.set())  # type: ignore[attr-defined]
    x = torch.ones(3, device="cuda")
    x.sum().item()
    attached.kill()  # type: ignore[attr-defined]
    assert lost.wait(300)
    assert not line.alive
    assert "went away" in line.lost
    for _ in range(2):
        with pytest.raises(RuntimeError, match="GPU worker of this lease is gone.*Request GPUs again"):
            (x + 1).sum().item()
    line.release()


def test_a_call_that_waits_is_woken_when_the_worker_dies(attached: object) -> None:
    x = torch.ones(3, device="cuda")
    x.sum().item()
    stop(attached.process.pid)  # type: ignore[attr-defined]
    threading.Timer(0.2, attached.kill).start()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="is gone"):
        x.sum().item()


def test_session_and_holder_are_told_why_a_lease_ended(attached: object) -> None:
    line = Lifeline(attached.spec)  # type: ignore[attr-defined]
    x = torch.ones(3, device="cuda")
    x.sum().item()
    line.release()
    attached.exit_code()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the lease was released"):
        x.sum().item()


def test_a_sessions_memory_is_freed_when_its_process_ends(attached: object) -> None:
    """One process of a lease fills the slice and ends; the next one has all of it."""
    fill = (
        "import sys, torch\n"
        "from jupyter_gpupool.pytorch.client import session\n"
        "from jupyter_gpupool.transport import specs\n"
        "session.activate(specs.AttachSpec.from_json(sys.stdin.readline()))\n"
        "x = torch.empty(20 << 30, dtype=torch.uint8, device='cuda')\n"
        "print(x[0].item() >= 0)\n"
    )
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", fill],
            input=attached.spec.to_json(),  # type: ignore[attr-defined]
            text=True,
            check=True,
            capture_output=True,
            timeout=300,
        )


def _serve_without_sessions(listener: object, spec: object) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("this session cannot be set up")

    worker.WorkerSession = fail  # type: ignore[assignment,misc]
    os._exit(worker.serve(spec, listener, lambda usage: None))  # type: ignore[arg-type]


def test_a_session_that_cannot_be_set_up_ends_for_its_client_too(start_worker: Callable) -> None:
    session.activate(start_worker(serve=_serve_without_sessions).spec)
    try:
        with pytest.raises(RuntimeError, match="it has ended"):
            torch.ones(3, device="cuda").sum().item()
    finally:
        session.deactivate()


class TestAdmission:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"secret": "wrong"}, "secret is not this lease's"),
            ({"secret": ""}, "secret is not this lease's"),
        ],
    )
    def test_only_with_the_secret(self, worker: object, change: dict, reason: str) -> None:
        spec = specs.AttachSpec(**{**vars(worker.spec), **change})  # type: ignore[attr-defined]
        for role in ("holder", "session"):
            with pytest.raises(handshake.Refused, match=reason):
                handshake.connect(spec, role, {"torch": torch.__version__, "threads": 1})

    def test_only_with_a_release_of_pytorch(self, worker: object) -> None:
        with pytest.raises(handshake.Refused, match="does not name its release of PyTorch"):
            handshake.connect(worker.spec, "session", {"threads": 1})  # type: ignore[attr-defined]

    def test_only_with_the_same_protocol(self, worker: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handshake, "PROTOCOL", 99)
        with pytest.raises(handshake.Refused, match="install the same version of jupyter-gpupool"):
            handshake.connect(worker.spec, "holder", {})  # type: ignore[attr-defined]

    def test_no_worker_there(self, worker: object) -> None:
        worker.kill()  # type: ignore[attr-defined]
        worker.exit_code()  # type: ignore[attr-defined]
        with pytest.raises(frames.ConnectionLost, match="no worker answers.*has the lease ended"):
            handshake.connect(worker.spec, "holder", {})  # type: ignore[attr-defined]


def test_attaching_twice_is_refused(attached: object) -> None:
    with pytest.raises(RuntimeError, match="attached to this process already"):
        session.activate(attached.spec)  # type: ignore[attr-defined]
