"""Tensors that are sent to another process of the lease share their memory with it, as with CUDA."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from torch import nn  # noqa: E402

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.transport.specs import AttachSpec  # noqa: E402

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def leased(attached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AttachSpec]:
    """A lease of this process and of its children."""
    path = tmp_path / "lease.json"
    path.write_text(attached.spec.to_json())
    monkeypatch.setenv("GPUPOOL_LEASE", str(path))
    yield attached.spec


def answer(inbox: Any, outbox: Any) -> None:
    """Add 1 to what arrives, in place; send it back, a result of twice its sum, and whether it is the same memory."""
    kept = []
    while (x := inbox.get()) is not None:
        x.add_(1)
        kept.append(x)
        torch.cuda.synchronize()
        outbox.put((x, (x * 2).sum(), x.data_ptr() == kept[0].data_ptr()))


def test_a_queue_shares_memory_both_ways_and_results_outlive_their_process(leased: AttachSpec) -> None:
    there, back = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=answer, args=(there, back))
    child.start()
    x = torch.arange(4.0, device="cuda:1")
    for turn in (1, 2):
        there.put(x[1:])
        y, total, same = back.get(timeout=300)
        assert x.tolist() == [0, 1 + turn, 2 + turn, 3 + turn] and total.item() == 2 * (6 + 3 * turn)
        assert y.data_ptr() == x[1:].data_ptr() and y.device == x.device and same
    there.put(None)
    child.join(300)
    assert child.exitcode == 0
    y.zero_()
    assert x.tolist() == [0, 0, 0, 0] and total.item() == 24


def resize(inbox: Any, outbox: Any) -> None:
    """Try to resize what arrives, then answer with what it holds whenever something arrives."""
    x = inbox.get()
    outbox.put(x.untyped_storage().resizable())
    for grow in (lambda: x.resize_(100), lambda: x.untyped_storage().resize_(0)):
        try:
            grow()
        except RuntimeError as e:
            outbox.put(str(e))
    while inbox.get() is not None:
        outbox.put(x.tolist())


def test_a_storage_that_is_resized_after_it_was_sent_is_shared_no_more(leased: AttachSpec) -> None:
    there, back = spawn.Queue(), spawn.Queue()
    child = spawn.Process(target=resize, args=(there, back))
    child.start()
    x = torch.arange(4.0, device="cuda")
    there.put(x)
    assert not back.get(timeout=300)
    for _ in range(2):
        assert back.get(timeout=300) == "Trying to resize storage that is not resizable"
    for size in (8, 32, 0, 16):
        x.untyped_storage().resize_(size)
    x.fill_(7)
    torch.cuda.synchronize()
    there.put("now")
    assert back.get(timeout=300) == [0, 1, 2, 3]
    assert x.tolist() == [7, 7, 7, 7]
    there.put(None)
    child.join(300)
    copied = pickle.loads(ForkingPickler.dumps(x))
    copied.zero_()
    assert x.tolist() == [0, 0, 0, 0]


def step(model: nn.Module, x: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()  # and the process ends at once


def test_hogwild_trains_one_model_in_several_processes(leased: AttachSpec) -> None:
    model = nn.Linear(2, 1, bias=False).cuda()
    before = model.weight.detach().cpu()
    assert model.share_memory() is model and model.weight.is_shared()
    for _ in range(2):
        child = spawn.Process(target=step, args=(model, torch.ones(3, 2, device="cuda")))
        child.start()
        child.join(300)
        assert child.exitcode == 0
    torch.testing.assert_close(model.weight.detach().cpu(), before - 2 * 0.1 * 3)
    assert model.weight.grad is None and isinstance(model.weight, nn.Parameter)


def double(x: Any) -> Any:
    return x * 2


def test_an_executor_takes_and_returns_tensors(leased: AttachSpec) -> None:
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        futures = [executor.submit(double, torch.full((2,), float(k), device="cuda")) for k in range(3)]
        assert [future.result(300).tolist() for future in futures] == [[0, 0], [2, 2], [4, 4]]


def send(t: Any) -> bytes:
    return bytes(ForkingPickler.dumps(t))


def test_what_cannot_be_sent_raises_one_line_in_the_sender(leased: AttachSpec) -> None:
    w = torch.ones(2, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="Cowardly refusing to serialize non-leaf tensor"):
        send(w * 2)
    assert pickle.loads(send(w)).requires_grad


def test_a_receiver_without_the_tensor_gets_one_line(leased: AttachSpec) -> None:
    x = torch.ones(2, device="cuda")
    sent = send(x)
    with pytest.raises(RuntimeError, match=r"is on a GPU of lease lease-of-a-tesT.*\(\.cpu\(\)\)"):
        pickle.loads(sent.replace(b"lease-of-a-test", b"lease-of-a-tesT"))
    with pytest.raises(RuntimeError, match="GPU GPU-9, which CUDA_VISIBLE_DEVICES hides"):
        pickle.loads(sent.replace(b"GPU-0", b"GPU-9"))
    del x
    assert pickle.loads(sent).tolist() == [1.0, 1.0], "what was sent waits for its receiver"
    with pytest.raises(RuntimeError, match="was freed before it was received"):
        pickle.loads(sent)


def test_memory_is_counted_once_and_freed_with_the_last_process(leased: AttachSpec) -> None:
    x = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.device_memory_used()
    y = pickle.loads(send(x))
    assert torch.cuda.device_memory_used() == before
    del x
    assert torch.cuda.device_memory_used() == before and y.sum().item() == 1 << 20
    del y
    assert torch.cuda.device_memory_used() == before - (4 << 20)


def test_what_an_ended_process_sent_to_nobody_gives_way(start_worker: Any, tmp_path: Path) -> None:
    spec = start_worker(1, memory_mib=64).spec
    path = tmp_path / "lease.json"
    path.write_text(spec.to_json())
    program = (
        "import torch; from multiprocessing.reduction import ForkingPickler; "
        "x = torch.ones(10 << 20, device='cuda'); ForkingPickler.dumps(x)"
    )
    environment = {**os.environ, "GPUPOOL_LEASE": str(path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
    session.activate(spec)
    try:
        assert torch.ones(10 << 20, device="cuda").sum().item() == 10 << 20
    finally:
        session.deactivate()
