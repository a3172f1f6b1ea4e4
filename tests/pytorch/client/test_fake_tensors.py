"""Fake tensors on ``cuda``, and what PyTorch traces with them: no process aborts, and the numbers are right."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_function, aot_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.filterwarnings("ignore")

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Places(nn.Module):
    """Makes tensors on its device in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.ones(3, device=x.device) + torch.zeros_like(x) + x.new_full((3,), 2.0)
        return self.layer(x) * made + self.shift + torch.arange(3, device=self.shift.device)


MODULES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "linear": lambda: (nn.Linear(2, 2), torch.ones(1, 2)),
    "places": lambda: (Places(), torch.randn(2, 3)),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        ).eval(),
        torch.randn(2, 1, 6, 6),
    ),
    "attention": lambda: (nn.TransformerEncoderLayer(8, 2, 16).eval(), torch.randn(2, 3, 8)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_exported_programs_compute_what_their_modules_do(attached: object, name: str, strict: bool) -> None:
    module, x = MODULES[name]()
    expected = module(x).detach()
    exported = torch.export.export(module.cuda(), (x.cuda(),), strict=strict)
    traced = [node.meta["val"].device for node in exported.graph.nodes if "val" in node.meta]
    assert set(traced) == {CUDA}
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        found = program.module()(x.cuda())
        assert found.device == CUDA
        torch.testing.assert_close(found.cpu(), expected)


def test_an_exported_program_with_a_dynamic_shape_trains(attached: object) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(2, 2).cuda(), torch.ones(3, 2, device="cuda")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    exported(torch.ones(5, 2, device="cuda")).sum().backward()
    assert exported.weight.grad.tolist() == [[5.0, 5.0]] * 2


def test_a_program_of_the_cpu_is_exported_as_without_a_lease(attached: object) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    assert {node.meta["val"].device.type for node in exported.graph.nodes if "val" in node.meta} == {"cpu"}


def gradients(of: Any) -> Any:
    of.sum().backward()


def in_context() -> torch.device:
    with torch.device("cuda"):
        layer = nn.Linear(3, 3)
        gradients(layer(torch.ones(2, 3)))
    return layer.weight.grad.device


def with_an_optimizer() -> torch.device:
    layer = nn.Linear(3, 3, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(torch.ones(2, 3, device="cuda"))
    assert out.dtype is torch.bfloat16
    gradients(out)
    optimizer.step()
    return optimizer.state[layer.weight]["exp_avg"].device


FAKES: dict[str, Callable[[], torch.device]] = {
    "device context": in_context,
    "optimizer": with_an_optimizer,
    "tensor": lambda: torch.tensor([1.0, 2.0], device="cuda").device,
    "cuda()": lambda: torch.ones(2, requires_grad=True).cuda().mul(2).device,
    "index": lambda: torch.ones(2, device=0, requires_grad=True).exp().device,
    "vmap of grad": lambda: (
        torch.func.vmap(torch.func.grad(lambda x: x.sin().sum()))(torch.ones(3, 4, device="cuda")).device
    ),
    "hessian": lambda: torch.func.hessian(lambda x: x.sin().sum())(torch.ones(3, device="cuda")).device,
    "jvp": lambda: torch.func.jvp(torch.sin, *[(torch.ones(3, device="cuda"),)] * 2)[1].device,
}


@pytest.mark.parametrize("program", FAKES)
def test_fake_tensors_on_cuda_have_gradients(attached: object, program: str) -> None:
    with FakeTensorMode():
        assert FAKES[program]() == CUDA


def test_a_fake_of_a_leased_tensor(attached: object) -> None:
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(3, device="cuda:1", requires_grad=True))
    with mode:
        gradients(fake * 2)
    assert type(fake.grad) is FakeTensor
    assert str(fake.grad.device) == "cuda:1"
    assert fake.is_cuda
    with mode, pytest.raises(RuntimeError, match=r"two (different )?devices,? cuda:1(,| and) cpu"):
        fake + torch.ones(3)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_functions_keep_their_inputs(attached: object, mode: str) -> None:
    """Traced, not run: another input gives another result."""

    def program(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.ones(2, device="cuda")).sum() + torch.func.grad(lambda v: v.pow(3).sum())(x)

    traced = make_fx(program, tracing_mode=mode)(torch.ones(2, device="cuda"))
    x = torch.tensor([2.0, 3.0], device="cuda")
    assert traced(x).tolist() == program(x).tolist() == [17.0, 32.0]


def test_ahead_of_time_autograd(attached: object) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    aot_function(lambda x: (x**3).sum(), lambda graph, inputs: graph)(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 3
    layer = nn.Linear(2, 2).cuda()
    gradients(aot_module(layer, lambda graph, inputs: graph)(torch.ones(4, 2, device="cuda")))
    assert layer.weight.grad.tolist() == [[4.0, 4.0]] * 2


def test_fakes_after_the_lease(attached: object) -> None:
    from jupyter_gpupool.pytorch.client import session

    session.deactivate()
    with FakeTensorMode():
        x = torch.ones(2, requires_grad=True)
        gradients(x * 2)
        assert x.grad.device.type == "cpu"
        assert torch.ones(2, device="cuda").device == CUDA
