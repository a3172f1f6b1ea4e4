"""What programs do with tensors on a slice, compared with the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "cuda:1"


def same(remote: torch.Tensor, local: torch.Tensor) -> bool:
    return (
        remote.dtype == local.dtype and remote.stride() == local.stride() and torch.equal(remote.cpu(), local)
    )


def test_factories_make_tensors_where_they_are_asked_for(device: str) -> None:
    assert str(torch.zeros(3, device=device).device) == device
    assert same(torch.arange(12, device=device), torch.arange(12))
    assert same(torch.eye(3, device=device), torch.eye(3))
    assert same(torch.full((2, 2), 7.0, device=device), torch.full((2, 2), 7.0))
    assert same(torch.tensor([[1, 2], [3, 4]], device=device), torch.tensor([[1, 2], [3, 4]]))
    assert same(torch.linspace(0, 1, 5, device=device), torch.linspace(0, 1, 5))


def test_views_share_memory(device: str) -> None:
    local, remote = torch.arange(24.0).view(2, 3, 4), torch.arange(24.0, device=device).view(2, 3, 4)
    for x in (local, remote):
        x.transpose(0, 2)[1:, :, 0].mul_(-1)
        x.select(1, 2).add_(100)
        x[:, 0, ::2] = 5
    assert same(remote, local)
    assert same(remote.permute(2, 0, 1), local.permute(2, 0, 1))
    assert same(remote.unfold(2, 2, 1), local.unfold(2, 2, 1))
    assert same(remote.view(torch.int32), local.view(torch.int32))


def test_results_whose_shape_depends_on_values(device: str) -> None:
    local = torch.tensor([3, 0, 1, 0, 3])
    remote = local.to(device)
    assert same(remote.nonzero(), local.nonzero())
    assert same(remote[remote > 0], local[local > 0])
    assert same(remote.unique(), local.unique())
    assert same(remote[torch.tensor([4, 0])], local[torch.tensor([4, 0])])
    assert remote.max().item() == 3
    assert bool(remote.any())
    assert remote.tolist() == [3, 0, 1, 0, 3]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_copies_keep_every_dtype_and_layout(device: str, dtype: torch.dtype) -> None:
    local = (torch.arange(60).view(3, 4, 5) % 3).to(dtype)
    for layout in (local, local.transpose(0, 2), local[:, ::2], local[0, 0, 0], local[:0]):
        remote = layout.to(device)
        assert torch.equal(remote.cpu(), layout)
        back = torch.empty_like(layout).copy_(remote)
        assert torch.equal(back, layout)
    target = torch.zeros(5, 4, 3, dtype=dtype, device=device)
    target.transpose(0, 2).copy_(local)
    assert torch.equal(target.cpu(), local.transpose(0, 2))


def test_a_large_copy_arrives_whole(device: str) -> None:
    local = torch.randn(3_000_017)
    remote = local.to(device)
    assert torch.equal(remote.cpu(), local)
    assert remote[2_999_999].item() == local[2_999_999].item()


def test_copies_between_slices(attached: object) -> None:
    first = torch.arange(6.0, device="cuda:0")
    second = first.to("cuda:1")
    first.zero_()
    assert str(second.device) == "cuda:1"
    assert second.tolist() == [0, 1, 2, 3, 4, 5]
    assert first.to("cuda:0") is first
    assert first.to("gpupool:0") is first
    assert first.cuda() is first


def test_backward_on_every_slice(device: str) -> None:
    x = torch.arange(1.0, 4.0, device=device, requires_grad=True)
    y = (x**3).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    gradient.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6.0, 12.0, 18.0]
    assert str(x.grad.device) == device


def test_operators_that_change_their_own_geometry(device: str) -> None:
    results = []
    for place in ("cpu", device):
        x = torch.arange(6.0, device=place).view(2, 3)
        x.t_().unsqueeze_(0)
        out = torch.empty(0, device=place)
        torch.add(x, 1, out=out)
        x.resize_(8)[6:] = 0
        results.append((x, out))
    (x, out), (remote_x, remote_out) = results
    assert torch.equal(remote_x.cpu(), x)
    assert torch.equal(remote_out.cpu(), out)


def test_conjugates_are_not_lost(device: str) -> None:
    local = torch.tensor([1 + 2j, 3 - 1j])
    remote = local.to(device)
    assert torch.equal((remote.conj() * remote).cpu(), local.conj() * local)
    assert torch.equal(remote.conj().imag.cpu(), local.conj().imag)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
def test_recurrent_layers_and_their_gradients(device: str, kind: type) -> None:
    torch.manual_seed(0)
    local = kind(4, 5, num_layers=2)
    remote = copy.deepcopy(local).to(device)
    x = torch.randn(3, 2, 4)
    for model, place in ((local, "cpu"), (remote, device)):
        model(x.to(place))[0].pow(2).sum().backward()
    for a, b in zip(remote.parameters(), local.parameters()):
        torch.testing.assert_close(a.grad.cpu(), b.grad)


def test_modules_keep_identity_and_ties(device: str) -> None:
    embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = head.weight
    model.to(device)
    assert embedding.weight is head.weight is weight
    loss = model(torch.tensor([1, 2], device=device)).sum()
    loss.backward()
    optimizer.step()
    assert str(weight.device) == device
    model.cpu()
    assert weight.device.type == "cpu"
    assert embedding.weight is weight


def test_copies_to_where_nothing_is(device: str) -> None:
    x = torch.ones(2, 3, device=device)
    meta = x.to("meta")
    assert meta.is_meta
    assert meta.shape == x.shape
    meta.copy_(x)
    assert x.sum().item() == 6


def test_libraries_make_parameters_by_the_type_of_another(device: str) -> None:
    weight = torch.nn.Linear(2, 2).to(device).weight
    made = type(weight)(torch.zeros(3), requires_grad=False)
    assert type(made) is torch.nn.Parameter
    assert not made.requires_grad
    again = type(weight)(weight.data)
    assert isinstance(again, torch.nn.Parameter)
    assert str(again.device) == device


def test_storages_have_addresses(device: str) -> None:
    x = torch.ones(6, device=device)
    assert x.untyped_storage().data_ptr() == x.data_ptr() == x[2:].untyped_storage().data_ptr()
    assert x[2:].data_ptr() == x.data_ptr() + 8
    assert torch.ones(6, device=device).data_ptr() != x.data_ptr()


def test_memory_that_is_elsewhere_is_not_handed_out(device: str) -> None:
    x = torch.ones(2, device=device)
    assert not hasattr(x, "__cuda_array_interface__")
    with pytest.raises(BufferError, match="copy with .cpu.. first"):
        torch.from_dlpack(x)
    with pytest.raises(BufferError, match="copy with .cpu.. first"):
        torch.utils.dlpack.to_dlpack(x)


def test_like_a_tensor_but_elsewhere(device: str) -> None:
    x = torch.ones(2, 3, device=device).t()
    for make in (torch.zeros_like, torch.ones_like, torch.rand_like, torch.empty_like):
        made = make(x, device="cpu")
        assert made.device.type == "cpu"
        assert made.shape == x.shape
        assert made.stride() == x.stride()
    assert torch.full_like(x, 2, device="cpu").sum().item() == 12
    assert x.new_zeros(2, device="cpu").tolist() == [0, 0]
    assert str(x.new_ones(2).device) == device
    assert str(torch.zeros_like(x).device) == device


def test_lists_of_values_become_tensors(device: str) -> None:
    x = torch.arange(3.0, device=device)
    assert torch.tensor([x[1], x[2]]).tolist() == [1, 2]
    assert torch.tensor([[x[1]], [x[2]]], device=device).tolist() == [[1], [2]]


def test_deepcopy_is_independent(device: str) -> None:
    original = torch.nn.Linear(2, 2).to(device)
    twin = copy.deepcopy(original)
    twin.weight.data.zero_()
    assert original.weight.abs().sum().item() > 0
    assert isinstance(twin.weight, torch.nn.Parameter)


def test_text_shows_values_and_device(device: str) -> None:
    x = torch.tensor([1.5, 2.0], device=device)
    assert repr(x) == f"tensor([1.5000, 2.0000], device='{device}')"
    assert f"{x[0]:.1f}" == "1.5"


class TestErrors:
    """They say what CUDA says, and the device goes on working."""

    @pytest.fixture(autouse=True)
    def goes_on_working(self, attached: object) -> Iterator[None]:
        yield
        assert torch.ones(2, device="cuda").sum().item() == 2

    def test_shapes_that_do_not_fit(self, attached: object) -> None:
        with pytest.raises(RuntimeError, match=r"size of tensor a \(3\) must match"):
            torch.ones(3, device="cuda") + torch.ones(4, device="cuda")

    def test_host_and_device_do_not_mix(self, attached: object) -> None:
        with pytest.raises(
            RuntimeError, match="Expected all tensors to be on the same device.*cuda:0 and cpu"
        ):
            torch.ones(3, device="cuda") + torch.ones(3)
        with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
            torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")
        # as with CUDA, a CPU scalar may come along
        assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).tolist() == [2, 2, 2]

    def test_a_failure_in_the_worker_comes_home(self, attached: object) -> None:
        weight = torch.ones(3, 2, device="cuda")
        rows = torch.nn.functional.embedding(torch.tensor([7], device="cuda"), weight)
        with pytest.raises(IndexError, match="out of range.*\n.*aten::embedding"):
            torch.cuda.synchronize()
        with pytest.raises(IndexError, match="out of range"):
            (rows + 1).sum().item()

    def test_numpy_is_refused_in_cudas_words(self, attached: object) -> None:
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            torch.ones(2, device="cuda").numpy()

    def test_a_device_that_was_not_leased(self, attached: object) -> None:
        with pytest.raises(RuntimeError, match="invalid device ordinal.*\n.*device 2 was asked for"):
            torch.ones(1, device="cuda:2")
