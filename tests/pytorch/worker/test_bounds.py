"""Neither end keeps more than its limit for a program whose shapes never repeat."""

from __future__ import annotations

import gc
import hashlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.compile import graphs  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment, dispatcher  # noqa: E402
from jupyter_gpupool.pytorch.client.tensor import tensor  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands  # noqa: E402
from jupyter_gpupool.pytorch.worker import executor, worker  # noqa: E402
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec  # noqa: E402

BOUND = 40
SECRET = "of this test"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[executor.WorkerSession]]:
    """A worker in a thread of this process, so that a test can look into it."""
    found: list[executor.WorkerSession] = []

    class Watched(executor.WorkerSession):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(worker, "WorkerSession", Watched)
    monkeypatch.setattr(dispatcher, "MAX_TEMPLATES", BOUND)
    devices = (DeviceSpec(0, "GPU-0", "emulated", 1000, 1000, True),)
    spec = WorkerSpec("bounds", hashlib.sha256(SECRET.encode()).hexdigest(), devices, attach_timeout_s=6000.0)
    served = worker.Worker(spec, lambda usage: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=served.run, args=(listener,), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        session.activate(AttachSpec("bounds", "127.0.0.1", port, SECRET, devices, spec.ttl_s))
        try:
            yield found
        finally:
            session.deactivate()
            served.end(0)
            thread.join()


def test_templates_geometries_and_views(sessions: list[executor.WorkerSession]) -> None:
    kept = torch.arange(4096.0, device="cuda")
    total = 0.0
    for n in range(1, 1500):
        part = kept[n : n + n % 50 + 1]  # a view that was never asked for before
        total += float(n % 7)
        result = (part * 2).sum() + torch.ones(n, device="cuda").mean()
        if n % 500 == 0:
            assert result.item() == pytest.approx(2 * sum(range(n, n + n % 50 + 1)) + 1)
    torch.cuda.synchronize()
    d = attachment.dispatcher()
    assert d.misses > 10 * BOUND
    assert len(d.templates) <= BOUND
    assert len(tensor._geometries) <= 3 * BOUND
    (inner,) = sessions
    assert len(inner._templates) + len(inner._previous) <= 2 * BOUND
    assert len(inner._geometries) <= 4 * BOUND
    assert max(len(slot.views) for slot in inner.storages.values()) <= 2 * BOUND
    del part, result
    gc.collect()
    torch.cuda.synchronize()
    assert len(inner.storages) <= 2


@pytest.mark.filterwarnings("ignore")
def test_graphs(sessions: list[executor.WorkerSession], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_VARIANTS", 5)
    fast = torch.compile(lambda x: x.sum() + x.shape[0], backend="gpupool", dynamic=True)
    for n in range(2, 30):
        assert fast(torch.ones(n, device="cuda")).item() == 2 * n
    (inner,) = sessions
    torch.cuda.synchronize()
    assert 1 <= len(inner.graphs._graphs) <= 6
    assert commands.FREE_GRAPH in inner.graphs.records
    torch._dynamo.reset()
