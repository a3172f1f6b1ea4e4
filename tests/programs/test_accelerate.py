"""Hugging Face accelerate: its loop in every precision, and models over both slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed; `make programs` does that"
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_its_loop(lease: object, tmp_path: Path, precision: str) -> None:
    accelerator = accelerate.Accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
    assert accelerator.device.type == "cuda"
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(64, 8)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    for _ in range(6):
        for inputs, labels in loader:
            assert inputs.is_cuda
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).item())
    assert losses[-1] < losses[0]
    weights = [p.detach().cpu().clone() for p in model.parameters()]
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    for p, saved in zip(accelerator.unwrap_model(model).parameters(), weights):
        assert torch.equal(p.detach().cpu(), saved)


def test_a_model_over_both_slices_and_one_kept_on_the_host(lease: object) -> None:
    x = torch.randn(3, 8)
    expected = net()(x)
    spread = accelerate.dispatch_model(net(), {"0": 0, "1": 0, "2": 1})
    assert str(spread[2].weight.device) == "cuda:1"
    torch.testing.assert_close(spread(x.cuda()).cpu(), expected)
    kept = net()
    accelerate.cpu_offload(kept, execution_device=torch.device("cuda:1"))
    out = kept(x)
    torch.testing.assert_close(out.cpu(), expected)
    assert {p.device.type for p in kept.parameters()} == {"meta"}
