"""Programs whose connections are lost compute the same numbers as undisturbed ones, digit for digit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jupyter_gpupool.core import processes
from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.command_stream import WorkerGone, pieces
from jupyter_gpupool.pytorch.protocol import commands
from jupyter_gpupool.pytorch.protocol.commands import READ, WRITE
from jupyter_gpupool.pytorch.worker.served_session import patience_s
from jupyter_gpupool.server.daemon import certificates
from jupyter_gpupool.transport import frames, handshake, specs
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.resumable_connection import ResumableConnection
from jupyter_gpupool.transport.resumption import Frame

from ...conftest import often
from ...support.cutting_proxy import CLOSED, RESET, SILENT, CuttingProxy

Numbers = list[torch.Tensor]


def dropout(steps: int) -> Numbers:
    """A small network for pictures, with dropout and momentum."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(676, 10)
    ).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pictures, labels = torch.randn(steps, 16, 1, 28, 28), torch.randint(0, 10, (steps, 16))
    losses = []
    for x, y in zip(pictures, labels):
        loss = nn.functional.cross_entropy(net(x.cuda()), y.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return [*losses, *(p.detach().cpu() for p in net.parameters())]


def transformer(steps: int) -> Numbers:
    """A transformer's layer under autocast, with Adam and a gradient scaler that reads a value in each step."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).cuda()
    optimizer = torch.optim.Adam(net.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 6, 16, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [torch.stack(losses).cpu(), *(p.detach().cpu() for p in net.parameters())]


def generators(steps: int) -> Numbers:
    """Generators of a program's own and of two devices, and copies in both directions, large ones too."""
    mine = torch.Generator(device="cuda").manual_seed(7)
    total = torch.zeros(100, device="cuda:1")
    large = torch.randn(1 << 18)
    for n in range(steps):
        total += torch.randn(100, generator=mine, device="cuda").to("cuda:1")
        total += torch.rand(100, device="cuda:1") * n
        if n % 8 == 0:
            large = large.cuda().mul_(1.0 + n / 1000).roll(1).cpu()
            large[0] = n  # at once, while the copy above may still be under way to the slice
    return [total.cpu(), torch.rand(5, generator=mine, device="cuda").cpu(), large]


def compiled(steps: int) -> Numbers:
    """A graph that is sent whole."""
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
    graph = torch.compile(net, backend="gpupool")
    optimizer = torch.optim.AdamW(net.parameters())
    losses = []
    for _ in range(steps):
        loss = graph(torch.randn(8, 8, device="cuda")).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return [*losses, *(p.detach().cpu() for p in net.parameters())]


def run(program: Callable[[int], Numbers], steps: int, spec: Any) -> Numbers:
    session.activate(spec)
    try:
        torch.manual_seed(5)
        torch.cuda.manual_seed_all(5)
        return program(steps)
    finally:
        session.deactivate()


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    authority = certificates.new_authority("test")
    server = certificates.new_server(authority, ["127.0.0.1"])
    certfile, keyfile = tmp_path / "server.crt", tmp_path / "server.key"
    certfile.write_bytes(server.certificate)
    keyfile.write_bytes(server.key)
    return {"certfile": str(certfile), "keyfile": str(keyfile)}


@contextlib.contextmanager
def through(spec: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[CuttingProxy, Any]]:
    with CuttingProxy((spec.host, spec.port), *args, **kwargs) as proxy:
        yield proxy, dataclasses.replace(spec, port=proxy.port)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("program", "secure"),
    [(dropout, False), (transformer, True), (generators, False), (generators, True), (compiled, False)],
    ids=lambda value: getattr(value, "__name__", "tls" if value else "plain"),
)
def test_losses_and_parameters_are_those_of_an_undisturbed_run(
    start_worker: Callable, certificate: dict[str, str], program: Callable, secure: bool
) -> None:
    worker = start_worker(attach_timeout_s=6000.0, ttl_s=1.5, **(certificate if secure else {}))
    spec = dataclasses.replace(worker.spec, secure=secure)
    cuts = often(6, 200)
    steps = 2 * cuts
    with through(spec) as (proxy, near):
        undisturbed = run(program, steps, near)
        mean_bytes = proxy.bytes // (2 * cuts)
    ways = (RESET,) * 6 + (CLOSED, SILENT)
    holder = Lifeline(spec, lives=processes.vouched)  # else a busy machine may come back too late from a FIN
    with through(spec, cuts, ways, seed=len(program.__name__), mean_bytes=mean_bytes) as (proxy, near):
        found = run(program, steps, near)
        assert proxy.cuts_left <= cuts / 2, "the connection was hardly ever lost"
    holder.release()
    assert len(found) == len(undisturbed)
    for ours, theirs in zip(found, undisturbed):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mean_bytes", [1, 300, 1000])
@pytest.mark.parametrize("way", [RESET, CLOSED])
def test_the_first_connection_is_lost_while_it_is_made(
    start_worker: Callable, way: str, mean_bytes: int
) -> None:
    worker = start_worker(attach_timeout_s=6000.0)
    with through(worker.spec, 3, (way,), mean_bytes=mean_bytes) as (proxy, near):
        holder = Lifeline(near)
        session.activate(near)
        assert torch.arange(4.0, device="cuda").sum().item() == 6.0
        session.deactivate()
        assert holder.alive
        holder.release()
        assert proxy.connections > 2


@pytest.fixture
def proxied(start_worker: Callable) -> Iterator[tuple[CuttingProxy, Any]]:
    """A lease attached to this process through a proxy, and its worker."""
    worker = start_worker(attach_timeout_s=6000.0)
    with through(worker.spec) as (proxy, near):
        session.activate(near)
        yield proxy, worker
        session.deactivate()


def stream() -> Any:
    return attachment.stream(0)


def test_an_idle_program_connects_again_by_itself(proxied: Any, eventually: Callable) -> None:
    x = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    proxied[0].cut_all()
    eventually(lambda: stream().connection.reconnects >= 1, "there is another connection")
    assert x.tolist() == [0, 1, 2]


def test_an_answer_outlives_the_connection_on_which_it_is_acknowledged(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker does not send again what was received, so it would be waited for in vain."""
    x = torch.arange(1 << 19, device="cuda")
    connection = stream().connection

    def cut(data: bytes) -> None:
        monkeypatch.undo()
        connection._drop()
        raise frames.ConnectionLost("it was cut")

    monkeypatch.setattr(connection, "_say", cut)
    assert x.cpu()[-1] == (1 << 19) - 1
    assert connection._say != cut
    assert x[5].item() == 5
    assert connection.reconnects == 1


def test_a_large_answer_follows_small_ones_that_are_not_acknowledged_yet(proxied: Any) -> None:
    """The worker keeps both until they are acknowledged, and has no room for so much beside anything else."""
    x = torch.ones(20 << 20, device="cuda")
    assert [x[k].item() for k in range(3)] == [1, 1, 1]
    assert x.cpu().sum() == 20 << 20


def test_a_copy_that_has_to_be_sent_again_is_that_of_its_moment(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, source = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20)
    torch.cuda.synchronize()
    with monkeypatch.context() as lossy:
        lossy.setattr(frames, "send_all", lambda sock, data: None)
        y.copy_(source)
        source.fill_(2)
    proxied[0].cut_all()
    assert y.sum() == 1 << 20


def test_one_line_is_shown_while_a_call_waits_and_it_goes_on(
    proxied: Any, eventually: Callable, capsys: pytest.CaptureFixture
) -> None:
    proxy, _ = proxied
    x = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    proxy.refuses = True
    proxy.cut_all()
    shown: list[str] = []

    def repair() -> None:
        eventually(lambda: shown.append(capsys.readouterr().err) or shown[-1], "a line is shown")
        proxy.refuses = False

    repairing = threading.Thread(target=repair)
    repairing.start()
    assert (x + 1).tolist() == [1, 2, 3]
    repairing.join()
    assert [line for line in shown if line] == ["reconnecting to 127.0.0.1 …\n"]


def test_ctrl_c_ends_a_call_that_waits_for_a_connection_and_nothing_else(
    proxied: Any, eventually: Callable
) -> None:
    proxy, _ = proxied
    x = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    proxy.refuses = True
    proxy.cut_all()
    y = x + 1
    failed = proxy.refused

    def interrupt() -> None:
        eventually(lambda: proxy.refused > failed + 2, "it tries to connect")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        y.tolist()
    proxy.refuses = False
    assert (y * 2).tolist() == [2, 4, 6]


@pytest.mark.soak
def test_interrupts_lose_no_command_and_mix_up_no_answers(proxied: Any) -> None:
    """Each number is written once, and each answer is the one to the question that was asked."""
    numbers = stream()
    storage = numbers.allocate(8, 0)
    layout = [[1], [1], 0, "int64", 0]
    over = threading.Event()

    def interrupt() -> None:
        chance = random.Random(4)
        while not over.wait(chance.uniform(0.0005, 0.004)):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    is_armed = False

    def raising(number: int, frame: Any) -> None:
        """Once, and not again before the program has dealt with it."""
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    interrupted = written = 0
    before = signal.signal(signal.SIGINT, raising)
    thread = threading.Thread(target=interrupt)
    thread.start()
    while interrupted < often(60, 2000):
        try:
            is_armed = True
            while True:
                value = struct.pack("q", written + 1)
                numbers.push((WRITE, storage.id, layout, value))
                written += 1
                into = bytearray(8)
                numbers.ask((READ, storage.id, layout), memoryview(into))
                assert struct.unpack("q", into)[0] in (written, written + 1)
        except KeyboardInterrupt:
            interrupted += 1
    over.set()
    thread.join()
    signal.signal(signal.SIGINT, before)
    into = bytearray(8)
    numbers.ask((READ, storage.id, layout), memoryview(into))
    assert struct.unpack("q", into)[0] in (written, written + 1)


def test_a_worker_that_is_killed_is_gone_and_not_waited_for(proxied: Any) -> None:
    """Its machine says that nobody listens there any more; nobody waits for two minutes."""
    _, worker = proxied
    x = torch.ones(3, device="cuda")
    x.sum().item()
    worker.kill()
    with pytest.raises(WorkerGone, match="gone .the worker went away without a word.; its tensors are lost"):
        x.sum().item()


def test_a_lease_whose_client_does_not_come_back_in_time_ends(
    start_worker: Callable, eventually: Callable
) -> None:
    worker = start_worker(resume_s=0.3)
    with through(worker.spec) as (proxy, near):
        lost: list[str] = []
        line = Lifeline(near, lost.append)
        session.activate(near)
        x = torch.ones(3, device="cuda")
        x.sum().item()
        proxy.refuses = True
        proxy.cut_all()
        with pytest.raises(WorkerGone, match=r"no connection to it for 0\.3 s.*its tensors are lost"):
            x.sum().item()
        assert worker.exit_code() == specs.EXIT_HOLDER_LOST
        eventually(lambda: lost, "the holder gives up as well")
        line.release()
        assert lost == ["no connection to it for 0.3 s"]
        session.deactivate()


def test_a_holder_whose_connection_is_reset_comes_back(start_worker: Callable, eventually: Callable) -> None:
    worker = start_worker()
    with through(worker.spec) as (proxy, near):
        line = Lifeline(near)
        proxy.cut_all()
        eventually(lambda: proxy.connections >= 2, "it connects again")
        assert line.alive
        line.release()
        assert worker.exit_code() == specs.EXIT_RELEASED
        assert not line.lost


def test_a_process_that_dies_behind_a_cut_wire_is_missed_by_its_holder(
    start_worker: Callable, eventually: Callable
) -> None:
    """Nothing but the holder on its machine can report that it died; nobody waits for it any longer."""
    worker = start_worker(attach_timeout_s=6000.0)
    line = Lifeline(worker.spec, lives=processes.vouched)
    fill = (
        "import sys, torch\n"
        "from jupyter_gpupool.pytorch.client import session\n"
        "from jupyter_gpupool.transport import specs\n"
        "session.activate(specs.AttachSpec.from_json(sys.stdin.readline()))\n"
        "x = torch.empty(20 << 30, dtype=torch.uint8, device='cuda')\n"
        "print(x[0].item(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with through(worker.spec) as (proxy, near):
        filling = subprocess.Popen(
            [sys.executable, "-c", fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert filling.stdin
        assert filling.stdout
        filling.stdin.write(near.to_json() + "\n")
        filling.stdin.flush()
        assert filling.stdout.readline()
        proxy.refuses = True
        proxy.cut_all()
        session.activate(worker.spec)
        assert stream().ask((commands.MEMORY, 0)) == 20 << 30, "it could come back"
        filling.kill()
        eventually(lambda: stream().ask((commands.MEMORY, 0)) == 0, "its memory is freed")
        session.deactivate()
        filling.communicate()
    line.release()


@pytest.mark.parametrize(
    ("closed", "lives", "expected"),
    [
        (False, None, 120.0),
        (True, None, 2.0),
        (False, True, math.inf),
        (True, True, math.inf),
        (False, False, 0.0),
        (True, False, 0.0),
    ],
)
def test_how_long_a_lost_client_is_waited_for(closed: bool, lives: bool | None, expected: float) -> None:
    assert patience_s(closed, lives, 120.0) == expected


class TestTheWorkerRefuses:
    """The hello of a connection that would resume a session: in words, and nothing is executed."""

    @pytest.fixture
    def served(self, worker: Any) -> Iterator[tuple[Any, ResumableConnection]]:
        facts = {"torch": torch.__version__, "threads": 1}
        connection = attachment.ClientSession(worker.spec).open(worker.spec, facts)
        connection.send(Frame(frames.pack(frames.Kind.RECORDS, [commands.ALLOCATE, 1, 8, 0])))
        yield worker.spec, connection
        # It goes on as if nobody had tried.
        question = Frame(frames.pack(frames.Kind.RECORDS, [commands.MEMORY, 0]))
        connection.send(question)
        assert connection.answer(question.number, None) == 512
        assert connection.reconnects == 0
        connection.close()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"secret": "wrong"}, "^the secret is not this lease's$"),
            ({"generation": 1}, "connection 1 of this session comes too late, connection 1 was there"),
            ({"generation": 0}, "comes too late"),
            ({"generation": -1}, "'generation' must be a number, and is -1"),
            ({"generation": True}, "'generation' must be a number"),
            ({"generation": None}, "'generation' must be a number"),
            ({"session": "0" * 32}, "it has ended"),
            ({"session": "x"}, "a session's id is 32 hexadecimal digits"),
            ({"session": None}, "a session's id is 32 hexadecimal digits"),
        ],
    )
    def test_who_cannot_be_its_client(
        self, served: tuple[Any, ResumableConnection], change: dict[str, Any], reason: str
    ) -> None:
        spec, connection = served
        facts = {"torch": torch.__version__, "threads": 1}
        fields = {"session": connection.end.id, "generation": 2, "received": 0, **change}
        spec = dataclasses.replace(spec, secret=fields.pop("secret", spec.secret))
        with pytest.raises(handshake.Refused, match=reason):
            handshake.connect(spec, "session", {**facts, **fields})

    def test_a_connection_of_before_is_read_no_more(self, worker: Any) -> None:
        """What was under way on it, and arrives after the newer one, is not executed."""
        facts = {"torch": torch.__version__, "threads": 1}
        connection = attachment.ClientSession(worker.spec).open(worker.spec, facts)
        before = connection._sock
        connection._sock, connection._lost_at = None, time.monotonic()
        question = Frame(frames.pack(frames.Kind.RECORDS, [commands.MEMORY, 0]))
        connection.send(question)
        with contextlib.suppress(frames.ConnectionLost):
            frames.send(before, frames.Kind.RECORDS, [commands.ALLOCATE, 1, 8, 0])
        assert connection.answer(question.number, None) == 0
        connection.send(again := Frame(frames.pack(frames.Kind.RECORDS, [commands.MEMORY, 0])))
        assert connection.answer(again.number, None) == 0
        before.close()
        connection.close()


@pytest.mark.parametrize("most", [1, 7, 24, 100])
@pytest.mark.parametrize("shape", [(96,), (4, 24), (2, 3, 16), (1, 1, 96), (96, 1)])
def test_a_large_copy_is_cut_into_pieces_that_make_it_up(shape: tuple[int, ...], most: int) -> None:
    source = torch.arange(96, dtype=torch.uint8).reshape(shape)
    target = torch.zeros(shape[::-1], dtype=torch.uint8).permute(*reversed(range(len(shape))))
    layout = [list(target.shape), list(target.stride()), 0, "uint8", 0]
    for (size, stride, offset, *_), piece in pieces(layout, memoryview(source.flatten().numpy()), most):
        assert len(piece) <= most
        target.as_strided(size, stride, offset).copy_(torch.tensor(list(piece), dtype=torch.uint8).view(size))
    assert torch.equal(target, source)
