"""Less common layers and dtypes, each compared with the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "gpupool:1"


def compare(
    device: str, make: Callable[[], nn.Module], use: Callable[[nn.Module, str], torch.Tensor]
) -> None:
    """Results and gradients of a module on the device are the CPU's."""
    torch.manual_seed(0)
    local = make()
    remote = copy.deepcopy(local).to(device)
    found = []
    for model, place in ((local, "cpu"), (remote, device)):
        torch.manual_seed(1)
        out = use(model, place)
        if out.requires_grad:
            out.pow(2).sum().backward()
        found.append([out.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("sorted_", [True, False])
@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
def test_packed_sequences(device: str, kind: type, sorted_: bool) -> None:
    lengths = [5, 3, 2] if sorted_ else [2, 5, 3]

    def use(model: nn.Module, place: str) -> torch.Tensor:
        x = torch.randn(3, 5, 4).to(place)
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=sorted_)
        out, state = model(packed)
        padded, sizes = pad_packed_sequence(out, batch_first=True)
        assert sizes.tolist() == lengths
        assert sizes.device.type == "cpu"
        last = state[0] if isinstance(state, tuple) else state
        return padded.sum(1) + last.sum()

    compare(device, lambda: kind(4, 6, num_layers=2, bidirectional=True, batch_first=True), use)


def test_sequences_are_packed_padded_and_moved(device: str) -> None:
    rows = [torch.arange(n, dtype=torch.float32) for n in (4, 2)]
    packed = pack_sequence(rows).to(device)
    assert packed.data.device.type == torch.device(device).type
    assert packed.cpu().data.tolist() == pack_sequence(rows).data.tolist()
    assert pad_sequence([r.to(device) for r in rows], True).tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(device: str, mode: str) -> None:
    def use(model: nn.Module, place: str) -> torch.Tensor:
        words = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]).to(place)
        first = model(words, torch.tensor([0, 4]).to(place))
        return torch.cat([first, model(words.view(2, 4))])

    compare(device, lambda: nn.EmbeddingBag(10, 3, mode=mode), use)


def test_weighted_embedding_bags(device: str) -> None:
    def use(model: nn.Module, place: str) -> torch.Tensor:
        words = torch.tensor([[1, 2], [0, 9]]).to(place)
        return model(words, per_sample_weights=torch.tensor([[0.5, 2.0], [1.0, 3.0]]).to(place))

    compare(device, lambda: nn.EmbeddingBag(10, 3, mode="sum"), use)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(3),
        lambda: nn.LayerNorm(3),
        lambda: nn.GroupNorm(1, 3),
        lambda: nn.Conv1d(3, 3, 1),
    ],
    ids=["BatchNorm1d", "LayerNorm", "GroupNorm", "Conv1d"],
)
def test_a_first_layer_has_gradients_of_its_parameters_alone(device: str, make: Callable) -> None:
    compare(device, make, lambda model, place: model(torch.randn(2, 3, 3).to(place)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
        (lambda: nn.Sequential(nn.Conv1d(8, 4, 3), nn.GroupNorm(2, 4), nn.PReLU()), (2, 8, 9)),
        (lambda: nn.Sequential(nn.ConvTranspose2d(8, 3, 3, stride=2), nn.InstanceNorm2d(3)), (2, 8, 4, 4)),
        (lambda: nn.Sequential(nn.Conv3d(8, 2, 2), nn.AdaptiveAvgPool3d(1)), (2, 8, 3, 3, 3)),
        (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 8, 4, 4)),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.SiLU(), nn.Softmax(-1)), (3, 8)),
        (lambda: nn.Fold((4, 4), 2), (1, 8, 9)),
    ],
)
def test_layers(device: str, make: Callable[[], nn.Module], shape: tuple) -> None:
    def use(model: nn.Module, place: str) -> torch.Tensor:
        x = torch.randn(*shape).to(place)
        return model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)

    compare(device, make, use)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: nn.functional.ctc_loss(
            x.log_softmax(2), y, torch.tensor([6, 6]), torch.tensor([3, 2]), zero_infinity=True
        ),
        lambda x, y: nn.functional.cross_entropy(x[0], y[0, :2], label_smoothing=0.1),
        lambda x, y: nn.functional.kl_div(x.log_softmax(-1), x.softmax(-1).flip(0), reduction="batchmean"),
        lambda x, y: nn.functional.triplet_margin_loss(x[0], x[1], x[2]),
    ],
)
def test_losses(device: str, loss: Callable) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 5, requires_grad=True), torch.tensor([[1, 2, 3], [4, 1, 0]])
    remote = x.detach().to(device).requires_grad_()
    ours, theirs = loss(remote, y.to(device)), loss(x, y)
    torch.testing.assert_close(ours.cpu(), theirs)
    ours.backward()
    theirs.backward()
    assert remote.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(remote.grad.cpu(), x.grad)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def use(place: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        z = torch.randn(4, 4, dtype=dtype).to(place).requires_grad_()
        w = torch.view_as_complex(torch.randn(4, 4, 2, dtype=z.real.dtype)).to(place)
        out = [
            z.conj() @ w,
            z.abs(),
            z.angle(),
            torch.fft.fft2(z),
            torch.fft.irfft(torch.fft.rfft(z.real)),
            z.mH.imag,
            torch.view_as_real(z * w.conj()),
            z.real + w.imag,
            torch.linalg.solve(z, w),
            z.exp(),
        ]
        sum(o.abs().sum() for o in out).backward()
        assert z.grad is not None
        return [*(o.detach() for o in out), z.grad]

    for a, b in zip(use(device), use("cpu"), strict=True):
        torch.testing.assert_close(a.cpu().resolve_conj(), b.resolve_conj())


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
)
def test_integers(device: str, dtype: torch.dtype) -> None:
    def use(place: str) -> list[torch.Tensor]:
        x = torch.tensor([[3, 1, 2], [0, 5, 4]]).to(place).to(dtype)
        y = torch.tensor([[1, 1, 1], [2, 2, 2]]).to(place).to(dtype)
        found = [
            x & y,
            x | y,
            x ^ y,
            ~x,
            x == y,
            x.sum(),
            x.sort(1).values,
            x.unique(),
            x.cumsum(1),
            x.any(1),
            x.topk(2).values if dtype is not torch.bool else x,
            torch.where(x > y, x, y),
            x.float().mean(),
            x.argmax(1) if dtype is not torch.bool else x,
        ]
        if dtype is not torch.bool:
            found += [x // y, x % y, x - y, x << y, x.bincount() if x.dim() == 1 else x.flatten().bincount()]
        return found

    for a, b in zip(use(device), use("cpu"), strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a.cpu(), b)


def test_gather_scatter_and_masks(device: str) -> None:
    def use(place: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(4, 5).to(place)
        index = torch.randint(0, 4, (4, 5)).to(place)
        mask = torch.tensor([True, False, True, True]).to(place)
        y = x.clone()
        y[mask, 1:3] = 7
        y[:, index[0]] += 1
        return [
            y,
            x.gather(0, index),
            torch.zeros_like(x).scatter_add_(0, index, x),
            torch.zeros_like(x).scatter_reduce(0, index, x, "amax"),
            x.masked_select(mask[:, None]),
            x.index_select(0, index[:, 0]),
            x.index_add(0, index[:, 0], x),
            x.masked_fill(mask[:, None], -1),
            x[mask].nonzero(),
            x.take_along_dim(index, 0),
            torch.bucketize(x, torch.linspace(-1, 1, 5).to(place)),
            x.histc(4, -2, 2),
        ]

    for a, b in zip(use(device), use("cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b)
