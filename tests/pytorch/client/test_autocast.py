"""Mixed precision: the casts that CUDA makes, and scaled gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=["cuda", "gpupool"])
def device(request: pytest.FixtureRequest, attached: object) -> str:
    return request.param


def _names_dimensions(operator: str) -> bool:
    """The overloads of older PyTorch releases for dimensions with names, which no device but its own has."""
    return "imname" in operator or ".names_" in operator


def test_the_policies_are_those_that_pytorch_lists_for_cuda() -> None:
    from jupyter_gpupool.pytorch.client.device import autocast
    from jupyter_gpupool.pytorch.torch_internals.names import TESTED

    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.exists():
        pytest.skip(f"this PyTorch {torch.__version__} comes without its C++ headers")
    text = header.read_text().replace("\\\n", " ")
    for macro, ours in {
        "LOWER_PRECISION_FP": autocast.LOWER_PRECISION,
        "FP32": autocast.FLOAT32,
        "FP32_SET_OPT_DTYPE": autocast.FLOAT32_RESULT,
        "PROMOTE": autocast.WIDEST,
    }.items():
        line = re.search(rf"#define AT_FORALL_{macro}\(_\)(.*)", text)
        assert line, macro
        listed = {re.sub(r",\s*", ".", name) for name in re.findall(r"_\(([\w, ]+)\)", line[1])}
        # cuDNN's own convolutions stand in a list of their own.
        ours = {name for name in ours if not name.startswith("cudnn")}
        listed = {name for name in listed if not _names_dimensions(name)}
        assert listed <= ours, macro
        if torch.__version__.startswith(".".join(TESTED[-1]) + "."):
            assert listed == ours, macro


def test_every_operator_that_cuda_casts_is_cast_here(attached: object) -> None:
    def cast_for(key: str) -> set[str]:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::") and has(n, key)}

    wanted = {name for name in cast_for("AutocastCUDA") if not _names_dimensions(name)}
    assert wanted - {"aten::_cudnn_rnn"} <= cast_for("AutocastPrivateUse1")


@pytest.mark.parametrize("dtype", HALVES)
def test_each_policy_gives_the_dtype_that_cuda_gives(device: str, dtype: torch.dtype) -> None:
    x = torch.rand(4, 4, device=device) + 0.5
    half = x.to(dtype)
    with torch.autocast(device, dtype=dtype):
        assert (x @ x).dtype is dtype
        assert nn.functional.linear(x, x).dtype is dtype
        assert nn.functional.conv2d(x[None, None], x[None, None]).dtype is dtype
        assert torch.einsum("ij,jk", x, x).dtype is dtype
        assert half.exp().dtype is half.pow(2).dtype is torch.float32
        assert nn.functional.layer_norm(half, (4,)).dtype is torch.float32
        assert nn.functional.mse_loss(half, half).dtype is torch.float32
        assert half.softmax(0).dtype is half.sum().dtype is half.cumsum(0).dtype is torch.float32
        assert half.sum(dtype=torch.float64).dtype is torch.float64
        assert torch.norm(half, 2).dtype is torch.norm(half, 2, dim=0).dtype is torch.float32
        assert torch.atan2(half, x).dtype is torch.float32
        assert torch.atan2(half, half).dtype is dtype
        assert (half + half).dtype is dtype
        assert (half + x).dtype is torch.float32
        assert (x.double() @ x.double()).dtype is torch.float64
        with torch.autocast(device, enabled=False):
            assert (x @ x).dtype is torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32, "the CPU's own autocast is off"
    assert (x @ x).dtype is torch.float32


def test_sums_of_integers_stay_integers(device: str) -> None:
    with torch.autocast(device):
        assert torch.ones(3, dtype=torch.int32, device=device).sum().dtype is torch.int64


def test_what_cuda_refuses_is_refused(device: str) -> None:
    p = torch.full((3,), 0.5, device=device)
    with torch.autocast(device):
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            nn.functional.binary_cross_entropy(p, p)
        with pytest.raises(RuntimeError, match="Unexpected floating ScalarType"):
            torch.dot(p.to(torch.bfloat16), p.half())


def test_what_programs_ask_about_autocast(device: str) -> None:
    assert not torch.is_autocast_enabled(device)
    assert not torch.is_autocast_enabled()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled()
        assert torch.get_autocast_dtype(device) is torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype(device) is torch.float16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.last(nn.functional.gelu(self.first(x)))


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_mixed_precision_follows_float32(device: str, dtype: torch.dtype, seeded: None) -> None:
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    weights = Net().state_dict()

    def train(place: str, mixed: bool) -> list[float]:
        model = Net()
        model.load_state_dict(weights)
        model.to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(place, enabled=mixed and dtype is torch.float16)
        found = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast(place, dtype=dtype, enabled=mixed):
                out = model(x.to(place))
                assert out.dtype is (dtype if mixed else torch.float32)
                loss = nn.functional.cross_entropy(out, y.to(place))
            assert loss.dtype is torch.float32
            scaler.scale(loss).backward()
            assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        return found

    mixed, whole = train(device, True), train("cpu", False)
    assert mixed == pytest.approx(whole, rel=0.05, abs=0.02)
    assert mixed[-1] < mixed[0]


def test_a_parameter_is_cast_once(device: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4, device=device))
    x = torch.ones(4, 4, device=device)
    with torch.autocast(device):
        with torch.no_grad():
            x @ weight
        before = torch.cuda.memory_allocated()
        y = (x @ weight) + (x @ weight) + (x @ weight)
        kept = torch.cuda.memory_allocated() - before
        assert kept == 5 * 512, "the result, x in half precision for each product, and the weight once"
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[12.0] * 4] * 4
    del y
    weight.grad = None
    assert torch.cuda.memory_allocated() == 2 * 512, "nothing is kept once autocast has ended"


class TestGradScaler:
    def test_infinite_gradients_skip_the_step_and_lower_the_scale(self, device: str) -> None:
        weight = nn.Parameter(torch.ones(2, device=device))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=1)
        for factor, expected in ((float("inf"), [1.0, 1.0]), (0.5, [0.5, 0.5])):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert weight.tolist() == expected
        assert scaler.get_scale() == 8.0, "halved once, doubled once"

    def test_its_state_is_saved_and_restored(self, device: str) -> None:
        scaler = torch.amp.GradScaler(device, init_scale=4.0)
        scaler.scale(torch.ones((), device=device))
        other = torch.amp.GradScaler(device)
        other.load_state_dict(scaler.state_dict())
        assert other.get_scale() == 4.0

    @pytest.mark.parametrize("fused", [False, True])
    def test_with_adam(self, device: str, fused: bool) -> None:
        weight = nn.Parameter(torch.ones(3, device=device))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=16.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(weight.pow(2).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        local = nn.Parameter(torch.ones(3))
        reference = torch.optim.Adam([local], lr=0.1)
        for _ in range(3):
            reference.zero_grad()
            local.pow(2).sum().backward()
            reference.step()
        torch.testing.assert_close(weight.detach().cpu(), local.detach())


def test_the_older_names_still_work(attached: object) -> None:
    x = torch.ones(2, 2, device="cuda")
    with pytest.warns(FutureWarning), torch.cuda.amp.autocast():
        assert (x @ x).dtype is torch.float16
    with pytest.warns(FutureWarning):
        assert torch.cuda.amp.GradScaler().is_enabled()


def test_a_function_of_ones_own_says_its_dtypes(attached: object) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype is torch.float32
            assert not torch.is_autocast_enabled()
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    x = torch.ones(3, device="cuda", requires_grad=True)
    with torch.autocast("cuda"):
        Double.apply(x.half()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
