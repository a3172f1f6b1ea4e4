"""Optimizers, single-tensor, foreach and fused: accepted as on CUDA, with the CPU's results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

ALL = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adafactor,
]
FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "cuda"


def train(device: str, kind: type, steps: int = 4, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device)
    x, y = torch.randn(6, 5).to(device), torch.randn(6, 2).to(device)
    optimizer = kind(model.parameters(), lr=0.02, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_results_are_the_cpus(device: str, kind: type, foreach: bool | None) -> None:
    close(train(device, kind, foreach=foreach), train("cpu", kind))


@pytest.mark.parametrize("kind", FUSED)
def test_fused_results_are_the_cpus(device: str, kind: type) -> None:
    try:
        ours = train(device, kind, fused=True)
    except RuntimeError as e:
        if kind is torch.optim.Adagrad and "`fused=True` requires" in str(e):
            pytest.skip(f"PyTorch {torch.__version__} has no fused Adagrad for CUDA")
        raise
    close(ours, train("cpu", kind))


def test_many_at_once_is_the_default_as_on_cuda(device: str) -> None:
    """Each way sends so many operators; the default sends as many as foreach=True."""
    from jupyter_gpupool.pytorch.client.dispatch import attachment

    def records(**options: object) -> int:
        parameters = [nn.Parameter(torch.ones(3, device=device)) for _ in range(20)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = torch.optim.Adam(parameters, **options)  # type: ignore[arg-type]
        optimizer.step()
        attachment.dispatcher().stream.wait()
        calls: list[object] = []
        push = attachment.dispatcher().stream.push
        attachment.dispatcher().stream.push = lambda record: (calls.append(record), push(record))  # type: ignore[assignment]
        try:
            optimizer.step()
        finally:
            del attachment.dispatcher().stream.push
        return len(calls)

    assert records() == records(foreach=True) < records(foreach=False)
    assert records(fused=True) < records(foreach=True)


def test_what_cuda_refuses_is_refused(device: str) -> None:
    whole = nn.Parameter(torch.ones(3, device=device, dtype=torch.complex64))
    whole.grad = torch.ones_like(whole)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors"):
        torch.optim.Adam([whole], fused=True).step()
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        torch.optim.Adam([nn.Parameter(torch.ones(1, device=device))], fused=True, foreach=True)


def test_state_is_saved_restored_and_moved(device: str) -> None:
    def make(place: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Linear(3, 1).to(place)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        place = next(model.parameters()).device
        model(torch.ones(2, 3, device=place)).sum().backward()
        optimizer.step()

    model, optimizer = make(device)
    step(model, optimizer)
    weights, state = model.state_dict(), optimizer.state_dict()
    results = []
    for place in (device, "cpu"):
        other, resumed = make(place)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        step(other, resumed)
        moments = next(iter(resumed.state.values()))["exp_avg"]
        assert moments.device.type == torch.device(place).type
        results.append([p.detach().cpu() for p in other.parameters()])
    close(*results)


def test_clipping_finds_the_norm_of_all(device: str) -> None:
    parameters = [nn.Parameter(torch.ones(4, device=device)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    assert norm.item() == pytest.approx(48**0.5)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([2 / 48**0.5] * 4)


def test_averages_and_schedules(device: str) -> None:
    model = nn.Linear(2, 1).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    start = model.weight.detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight.detach().cpu(), (start + 0.5).cpu())


def test_second_order_steps(device: str) -> None:
    def solve(place: str) -> float:
        x = nn.Parameter(torch.tensor([-1.5, 2.0], device=place))
        optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return closure().item()

    assert solve(device) == pytest.approx(solve("cpu"), abs=1e-6)
