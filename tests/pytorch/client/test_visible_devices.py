"""CUDA_VISIBLE_DEVICES chooses among the slices of a lease, until the program uses a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.client import session  # noqa: E402

VARIABLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def lease(worker: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv(VARIABLE, raising=False)
    yield worker.spec
    session.deactivate()


def uuids() -> list[str]:
    return [f"GPU-{torch.cuda.get_device_properties(k).uuid}" for k in range(torch.cuda.device_count())]


@pytest.mark.parametrize("text", ["", "-1", "7", "0,0"])
def test_no_gpu(lease: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    session.activate(lease)
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
    torch.manual_seed(0)
    assert torch.ones(2).sum().item() == 2
    for use in (
        lambda: torch.ones(2, device="cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.nn.Linear(2, 2).to("cuda:0"),
        torch.cuda.get_device_name,
        lambda: torch.cuda.set_device(0),
        torch.cuda.mem_get_info,
    ):
        with pytest.raises(
            RuntimeError, match=f"^No CUDA GPUs are available, because {VARIABLE}='{text}' hides"
        ):
            use()


@pytest.mark.parametrize(
    ("text", "seen"),
    [("1", ["GPU-1"]), ("GPU-1", ["GPU-1"]), ("1,0", ["GPU-1", "GPU-0"]), ("0,9", ["GPU-0"])],
)
def test_some_gpus_in_their_order(
    lease: Any, monkeypatch: pytest.MonkeyPatch, text: str, seen: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    session.activate(lease)
    assert torch.cuda.is_available() and uuids() == seen
    last = len(seen) - 1
    x = torch.arange(4.0, device=f"cuda:{last}")
    assert x.device.index == last and (x[x > 1] * 2).tolist() == [4, 6]
    assert torch.cuda.memory_allocated(last) == 512 == torch.cuda.device_memory_used(last)
    monkeypatch.delenv(VARIABLE)
    assert uuids() == seen, "it is read until a GPU is used"
    if last == 0:
        with pytest.raises(RuntimeError, match=f"invalid device ordinal\n.*{VARIABLE}='{text}' hides 1 more"):
            torch.ones(2, device="cuda:1")


def test_a_slice_is_the_same_under_another_number(lease: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1,0")
    session.activate(lease)
    kept = torch.ones(1000, device="cuda:0")
    torch.cuda.synchronize()
    in_use = [torch.cuda.device_memory_used(k) for k in range(2)]
    assert in_use == [4096, 0] and kept.sum().item() == 1000
    assert session.settle(lease) == [0, 1], "the lease's own order"


def test_it_is_read_until_a_gpu_is_used(lease: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session.activate(lease)
    assert torch.cuda.device_count() == 2
    for text, seen in (("1", ["GPU-1"]), ("", []), ("1,0", ["GPU-1", "GPU-0"])):
        monkeypatch.setenv(VARIABLE, text)
        assert uuids() == seen and torch.cuda.is_available() is bool(seen)
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(RuntimeError, match="hides 1 more"):
        torch.ones(2, device="cuda:1")
    assert torch.ones(2, device="cuda").sum().item() == 2 and uuids() == ["GPU-1"]


def test_a_lease_on_two_servers(spread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2,0")
    assert uuids() == ["GPU-2", "GPU-0"]
    x = torch.arange(3.0, device="cuda:0")
    assert x.to("cuda:1").add(1).tolist() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_a_fork_can_use_the_gpu_if_its_parent_has_not(lease: Any, used: bool) -> None:
    session.activate(lease)
    assert torch.cuda.device_count() == 2
    torch.manual_seed(3)
    if used:
        torch.ones(1, device="cuda")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            message = repr((torch.rand(2, device="cuda:1") + 1).sum().item())
        except RuntimeError as e:
            message = str(e)
        os.write(writer, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as said:
        answer = said.read()
    if used:
        assert answer.startswith("Cannot re-initialize CUDA in forked subprocess")
    else:
        assert float(answer) == (torch.rand(2, device="cuda:1") + 1).sum().item()
