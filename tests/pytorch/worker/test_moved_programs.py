"""Programs whose worker is taken apart and put together again at random operators get the same numbers, bit for bit."""

from __future__ import annotations

import functools
import io
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from torch import nn  # noqa: E402

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands as codes  # noqa: E402
from jupyter_gpupool.pytorch.worker import executor, lease_state, state_stream  # noqa: E402
from jupyter_gpupool.pytorch.worker.devices import create_devices  # noqa: E402
from jupyter_gpupool.pytorch.worker.shared_storages import SharedStorages  # noqa: E402

from ..conftest import Running  # noqa: E402


class Moving:
    """A session that goes on in a fresh one now and then: everything but the connection is new."""

    #: how often one has
    moves: Any = None

    def __init__(
        self, devices: Any, answer: Any, complain: Any, shared: Any, numbers: Any, **more: Any
    ) -> None:
        self._specs = [d.spec for d in devices]
        self._devices, self._shared = list(devices), shared
        self._new = lambda numbered: executor.WorkerSession(
            list(numbered.values()), answer, complain, self._shared, numbered, **more
        )
        self._session = self._new(numbers)
        self._rng = random.Random(4)
        self._left = 10

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, records: list[Any], finish: Callable[[], None] = lambda: None) -> None:
        i = 0
        while i < len(records):
            code = records[i]
            width = codes.FIELDS[code] if code < 0 else self._size(code)
            self._session.run(records[i : i + 1 + width])
            i += 1 + width
            self._left -= 1
            if not self._left:
                self._left = self._rng.randint(1, 30)
                self._move()
        finish()

    def _size(self, code: int) -> int:
        return {id: t.size for id, _, t in self._session.templates()}[code]

    def _move(self) -> None:
        with self.moves.get_lock():
            self.moves.value += 1
        state, memories = lease_state.take(self._devices, [("the client", self._session)], self._shared)
        stream = io.BytesIO()
        state_stream.write_state(self._devices, state, memories, stream.write)
        stream.seek(0)
        self._devices, self._shared = create_devices(self._specs), SharedStorages()
        description, memories = state_stream.read_state(self._devices, stream.readinto)
        new = lambda identity, numbered: self._new(numbered)  # noqa: E731
        (self._session,) = lease_state.put(description, memories, self._devices, self._shared, new)


def serve_moving(moves: Any, listener: Any, spec: Any) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    Moving.moves = moves
    worker.WorkerSession = Moving  # type: ignore[assignment, misc]
    worker.serve(spec, listener, lambda usage: None)


@pytest.fixture
def attach_to(start_worker: Callable[..., Running]) -> Iterator[Callable[..., Running]]:
    def attach(**how: Any) -> Running:
        session.deactivate()
        running = start_worker(**how)
        session.activate(running.spec)
        return running

    yield attach
    session.deactivate()


def image_classifier() -> list[Any]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 8, 1, 8, 8)
    labels = torch.randint(10, (4, 8))
    losses = []
    for x, y in zip(images, labels):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.cuda()), y.cuda())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, [t.cpu() for t in model.state_dict().values()]]


def transformer() -> list[Any]:
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(torch.randn(2, 5, 16, device="cuda")).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return [losses, [p.cpu() for p in model.parameters()], scaler.state_dict()["scale"]]


def compiled() -> list[Any]:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1)).cuda()
    step = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = step(torch.randn(7, 6, device="cuda")).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, [p.cpu() for p in model.parameters()]]


def two_devices_and_generators() -> list[Any]:
    found = []
    generators = [torch.Generator(f"cuda:{k}").manual_seed(k) for k in (0, 1)]
    x = [torch.zeros(50, device=f"cuda:{k}") for k in (0, 1)]
    for _ in range(12):
        for k in (0, 1):
            x[k] = x[k] + torch.randn(50, device=f"cuda:{k}", generator=generators[k])
            x[k].mul_(torch.rand(50, device=f"cuda:{k}"))
        x[0], x[1] = x[1].to("cuda:0"), x[0].to("cuda:1")
        found += [x[0].sum().item(), torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)]
    return [found, [t.cpu() for t in x], [g.get_state() for g in generators]]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two) and one.dtype == two.dtype
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


@pytest.mark.parametrize("program", [image_classifier, transformer, compiled, two_devices_and_generators])
def test_a_program_does_not_notice(
    attach_to: Callable[..., Running], program: Callable[[], list[Any]]
) -> None:
    results = []
    moves = multiprocessing.get_context("forkserver").Value("i", 0)
    for how in ({}, {"serve": functools.partial(serve_moving, moves)}):
        attach_to(**how)
        torch.manual_seed(3)
        results.append(program())
    assert equal(*results)
    assert moves.value > 1
