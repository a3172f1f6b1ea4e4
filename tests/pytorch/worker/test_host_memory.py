"""Copies between the host and a slice: pinned memory, reading values, and NumPy."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset


def test_pinned_memory_says_so(attached: object) -> None:
    x = torch.arange(6.0).view(2, 3)
    assert not x.is_pinned()
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned[0].is_pinned()
    assert pinned.view(-1)[2:].is_pinned()
    assert not x.is_pinned()
    assert not pinned.clone().is_pinned()
    assert pinned.pin_memory() is pinned
    assert torch.equal(pinned, x)
    assert pinned.data_ptr() != x.data_ptr()
    for made in (torch.empty(2, pin_memory=True), torch.zeros(2, pin_memory=True)):
        assert made.is_pinned()
    assert not torch.empty(2).is_pinned()
    assert not torch.ones(1, device="cuda").is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.ones(2, device="cuda").pin_memory()


def test_memory_that_is_used_again_is_not_taken_for_pinned(attached: object) -> None:
    for _ in range(200):
        torch.ones(4).pin_memory()
        gc.collect(0)
        assert not torch.ones(4).is_pinned()


def test_non_blocking_copies_may_be_overwritten_at_once(attached: object) -> None:
    source = torch.ones(100_000).pin_memory()
    target = source.to("cuda", non_blocking=True)
    source.zero_()
    torch.cuda.synchronize()
    assert target.sum().item() == 100_000
    back = torch.empty(100_000).pin_memory()
    back.copy_(target, non_blocking=True)
    torch.cuda.synchronize()
    assert back.sum().item() == 100_000


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_pins_its_batches(attached: object, workers: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, pin_memory=True, num_workers=workers)
    batches = [x for (x,) in loader]
    assert all(x.is_pinned() for x in batches)
    assert torch.cat([x.to("cuda", non_blocking=True) for x in batches]).tolist() == list(range(8))


@pytest.mark.parametrize("device", ["cuda:0", "gpupool:0"])
class TestLooking:
    def test_values(self, attached: object, device: str) -> None:
        x = torch.tensor([[1.5, -2.0], [0.0, 4.0]], device=device)
        assert x.tolist() == [[1.5, -2.0], [0.0, 4.0]]
        assert x[0, 0].item() == float(x[0, 0]) == 1.5
        assert int(x[1, 1]) == 4
        assert bool(x[1, 1])
        assert not bool(x[1, 0])
        assert 4.0 in x
        assert 5.0 not in x
        assert [list(map(float, row)) for row in x] == x.tolist()
        assert len(x) == 2
        assert range(10)[torch.tensor(3, device=device)] == 3
        assert torch.tensor([True, False], device=device).tolist() == [True, False]
        assert torch.tensor(1 + 2j, device=device).item() == 1 + 2j

    def test_what_cannot_be_looked_at_is_refused_in_cudas_words(self, attached: object, device: str) -> None:
        x = torch.ones(2, device=device)
        for look in (x.numpy, lambda: np.asarray(x), lambda: np.array([x, x])):
            with pytest.raises(
                TypeError, match=f"can't convert {device} device type tensor to numpy. Use Tensor.cpu"
            ):
                look()
        with pytest.raises(RuntimeError, match="a Tensor with 2 elements cannot be converted to Scalar"):
            x.item()
        with pytest.raises(
            RuntimeError, match="Boolean value of Tensor with more than one value is ambiguous"
        ):
            bool(x)
        with pytest.raises(RuntimeError, match="Can't call numpy.. on Tensor that requires grad"):
            x.requires_grad_().numpy()
        assert x.numpy(force=True).tolist() == x.detach().cpu().numpy().tolist() == [1, 1]

    def test_arrays_go_up(self, attached: object, device: str) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert torch.from_numpy(array).to(device).tolist() == array.tolist()
        assert torch.as_tensor(array, device=device).tolist() == array.tolist()
        assert torch.tensor(array[:, ::2], device=device).tolist() == array[:, ::2].tolist()

    def test_text(self, attached: object, device: str) -> None:
        x = torch.arange(3, device=device)
        assert repr(x) == f"tensor([0, 1, 2], device='{device}')" == str(x)
        y = torch.ones(2, device=device, requires_grad=True)
        assert repr(y) == f"tensor([1., 1.], device='{device}', requires_grad=True)"
        assert repr(y * 2) == f"tensor([2., 2.], device='{device}', grad_fn=<MulBackward0>)"
        assert repr(torch.nn.Parameter(y.detach())) == f"Parameter containing:\n{y!r}"
        half = torch.ones(2, device=device, dtype=torch.float16)
        assert repr(half) == f"tensor([1., 1.], device='{device}', dtype=torch.float16)"
        assert repr(torch.empty(0, 2, device=device)) == f"tensor([], device='{device}', size=(0, 2))"
        wide = torch.arange(60.0).view(3, 20).sqrt()
        assert repr(wide.to(device)) == repr(wide)[:-1] + f", device='{device}')"
        many = torch.complex(torch.randn(40, 5, 50), torch.randn(40, 5, 50))
        assert "..." in repr(many)
        assert repr(many.to(device)).split("device=")[0].rstrip(", \n") == repr(many)[:-1]
        assert f"{x[2]:3d}|{y[0]:.2f}" == "  2|1.00"


class Batch:
    """What a program's own collate function makes, with a pin_memory of its own."""

    def __init__(self, rows: list[float]) -> None:
        self.rows = torch.tensor(rows)

    def pin_memory(self) -> Batch:
        self.rows = self.rows.pin_memory()
        return self


def test_a_loader_lets_a_programs_own_batch_pin_itself(attached: object) -> None:
    loader = torch.utils.data.DataLoader([1.0, 2.0], batch_size=2, collate_fn=Batch, pin_memory=True)
    batch = next(iter(loader))
    assert batch.rows.is_pinned()
    assert batch.rows.to("cuda", non_blocking=True).tolist() == [1, 2]
