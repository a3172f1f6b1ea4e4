"""LSTM, GRU and RNN are one operator, their backward pass is another, and both have the CPU's numbers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from jupyter_gpupool.pytorch.client import evacuate  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402

NETWORKS = {
    "lstm": lambda: nn.LSTM(4, 6),
    "lstm of two layers": lambda: nn.LSTM(4, 6, 2, batch_first=True),
    "lstm in both directions": lambda: nn.LSTM(4, 6, 2, bidirectional=True, bias=False),
    "lstm with a projection": lambda: nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True),
    "gru": lambda: nn.GRU(4, 6, 2, bidirectional=True, batch_first=True),
    "gru without bias": lambda: nn.GRU(4, 6, bias=False),
    "rnn": lambda: nn.RNN(4, 6, 2, bidirectional=True),
    "rnn with relu": lambda: nn.RNN(4, 6, nonlinearity="relu", batch_first=True),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    local = make()
    return local, copy.deepcopy(local).to("cuda")


def passes(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The results of a forward and the gradients of a backward pass, on the CPU."""
    out, state = model(x)
    states = list(state) if isinstance(state, tuple) else [state]
    sum(t.sin().sum() for t in (out, *states)).backward()
    return [t.detach().cpu() for t in (out, *states, x.grad, *(p.grad for p in model.parameters()))]


def commands(function: Callable[[], Any]) -> list[Any]:
    """The commands that are queued during a call."""
    stream = attachment.dispatcher().stream
    calls: list[Any] = []
    push = stream.push
    stream.push = lambda record: (calls.append(record), push(record))[1]  # type: ignore[method-assign]
    try:
        function()
    finally:
        del stream.push  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_the_cpus(attached: object, dtype: torch.dtype) -> None:
    for name, make in NETWORKS.items():
        local, remote = twins(lambda make=make: make().to(dtype))  # type: ignore[misc]
        x = torch.randn(5, 3, 4, dtype=dtype)
        here = passes(local, x.clone().requires_grad_())
        there = passes(remote, x.cuda().requires_grad_())
        for ours, theirs in zip(there, here, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_packed_sequences(attached: object) -> None:
    x = torch.randn(3, 5, 4)

    def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        lengths = torch.tensor([2, 5, 3])
        out, _ = model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        padded, sizes = pad_packed_sequence(out, batch_first=True)
        padded.sin().sum().backward()
        return [padded.detach().cpu(), sizes, x.grad.cpu(), *(p.grad.cpu() for p in model.parameters())]

    for name, make in NETWORKS.items():
        local, remote = twins(make)
        here, there = run(local, x.clone().requires_grad_()), run(remote, x.cuda().requires_grad_())
        for ours, theirs in zip(there, here, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pass_is_one_command(attached: object, context: type) -> None:
    local, remote = twins(lambda: nn.LSTM(4, 6, 2))
    x = torch.randn(5, 3, 4)
    there, state = x.cuda(), (torch.zeros(2, 3, 6, device="cuda"), torch.zeros(2, 3, 6, device="cuda"))

    def forward() -> None:
        nonlocal out
        out, _ = remote(there, state)

    out: Any = None
    with context():
        forward()
        assert len(commands(forward)) == 1
        torch.testing.assert_close(out.detach().cpu(), local(x)[0].detach(), rtol=0, atol=0)
    if out.requires_grad:
        grad = torch.ones_like(out)
        parameters = list(remote.parameters())
        torch.autograd.grad(out, parameters, grad, retain_graph=True)
        assert len(commands(lambda: torch.autograd.grad(out, parameters, grad))) == 1


def test_dropout_draws_the_numbers_of_the_seed(attached: object) -> None:
    local, remote = twins(lambda: nn.LSTM(4, 6, 3, dropout=0.5))
    x = torch.randn(5, 3, 4)
    torch.manual_seed(7)
    here = passes(local, x.clone().requires_grad_())
    torch.manual_seed(7)
    there = passes(remote, x.cuda().requires_grad_())
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(remote.eval()(x.cuda())[0].cpu(), local.eval()(x)[0])


def test_the_backward_pass_can_be_repeated_only_if_its_graph_is_kept(attached: object) -> None:
    local, remote = twins(lambda: nn.GRU(4, 6))
    x = torch.randn(5, 3, 4)
    for model, place in ((local, "cpu"), (remote, "cuda")):
        out, _ = model(x.to(place))
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.sum().backward()
    assert torch.equal(remote.weight_ih_l0.grad.cpu(), local.weight_ih_l0.grad)


def test_a_parameter_that_was_changed_meanwhile_is_refused(attached: object) -> None:
    _, remote = twins(lambda: nn.LSTM(4, 6))
    out, _ = remote(torch.randn(5, 3, 4).cuda())
    with torch.no_grad():
        remote.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_have_memory_of_their_own(attached: object) -> None:
    local, remote = twins(lambda: nn.LSTM(4, 6))
    x = torch.randn(5, 3, 4)
    for model, place in ((local, "cpu"), (remote, "cuda")):
        model(x.to(place))[0].sum().backward()
        for p in model.parameters():
            p.grad.mul_(2)
    assert torch.equal(remote.bias_ih_l0.grad.cpu(), local.bias_ih_l0.grad)


def test_second_derivatives(attached: object) -> None:
    found = []
    for model in twins(lambda: nn.LSTM(4, 6, 2)):
        torch.manual_seed(3)
        x = torch.randn(5, 3, 4).to(model.weight_ih_l0.device).requires_grad_()
        (slope,) = torch.autograd.grad(model(x)[0].sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([slope.detach().cpu(), x.grad.cpu(), model.weight_hh_l0.grad.cpu()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    remote = nn.LSTM(4, 6, 2, dropout=0.5).cuda()
    loss = remote(torch.randn(5, 3, 4).cuda())[0].sum()
    with pytest.raises(RuntimeError, match="with dropout cannot be differentiated"):
        torch.autograd.grad(loss, list(remote.parameters()), create_graph=True)


def test_autocast_has_the_dtypes_of_cuda(attached: object) -> None:
    _, remote = twins(lambda: nn.LSTM(4, 6))
    with torch.autocast("cuda", torch.bfloat16):
        out, (h, c) = remote(torch.randn(5, 3, 4).cuda())
    assert {out.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    out.float().sum().backward()
    assert remote.weight_ih_l0.grad.dtype is torch.float32


def test_transforms_and_wrong_arguments(attached: object) -> None:
    local, remote = twins(lambda: nn.GRU(4, 6))
    x = torch.randn(5, 3, 4)
    slope = torch.func.grad(lambda x: local(x)[0].sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: remote(x)[0].sum())(x.cuda()).cpu(), slope)
    with pytest.raises(RuntimeError, match="input.size"):
        remote(torch.randn(5, 3, 3).cuda())
    with pytest.raises(RuntimeError, match="same device"):
        remote(x)


def test_a_release_moves_the_rest_to_the_cpu(attached: object) -> None:
    remote = nn.LSTM(4, 6).cuda()
    out, _ = remote(torch.randn(5, 3, 4).cuda())
    kept = torch.arange(3.0, device="cuda")
    evacuate.bring_home(evacuate.live())
    assert kept.device.type == "cpu"
    assert kept.tolist() == [0, 1, 2]
    del out


def test_what_a_forward_pass_saves_is_counted_and_freed(attached: object) -> None:
    remote = nn.LSTM(64, 64).cuda()
    x = torch.randn(50, 20, 64).cuda()
    with torch.no_grad():
        remote(x)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out, state = remote(x)
    without = torch.cuda.memory_allocated() - before
    del out, state
    out, state = remote(x)
    kept = torch.cuda.memory_allocated() - before - without
    assert kept >= 50 * 20 * 64 * 4 * 4  # the gates of every step
    out.sum().backward()
    remote.zero_grad()
    assert torch.cuda.memory_allocated() - before == without
