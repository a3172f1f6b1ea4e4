"""Sparse tensors on a leased device: the CPU's values, forward and backward."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jupyter_gpupool.pytorch.client import evacuate

Case = Callable[[str], Any]

#: Not coalesced: (1, 2) appears twice.
INDICES = [[0, 1, 1, 1], [2, 0, 2, 2]]
VALUES = [3.0, 4.0, 5.0, 6.0]


def coo(device: str, requires_grad: bool = False) -> torch.Tensor:
    indices, values = torch.tensor(INDICES, device=device), torch.tensor(VALUES, device=device)
    return torch.sparse_coo_tensor(indices, values, (2, 3), requires_grad=requires_grad)


def csr(device: str) -> torch.Tensor:
    return torch.sparse_csr_tensor([0, 1, 3], [2, 0, 2], [1.0, 2.0, 3.0], (2, 3), device=device)


def dense(device: str, requires_grad: bool = False) -> torch.Tensor:
    return torch.arange(6.0, device=device).reshape(3, 2).requires_grad_(requires_grad)


def check(case: Case) -> None:
    """The results of ``case`` on the device are those on the CPU, of the same layout, and on the device."""
    wanted, got = case("cpu"), case("cuda")
    if isinstance(wanted, torch.Tensor):
        wanted, got = [wanted], [got]
    for w, g in zip(wanted, got, strict=True):
        assert str(g.device) == "cuda:0"
        assert g.layout is w.layout
        torch.testing.assert_close(g.detach().cpu(), w.detach())


CREATION: dict[str, Case] = {
    "of tensors": coo,
    "of lists": lambda d: torch.sparse_coo_tensor(INDICES, VALUES, (2, 3), device=d),
    "without a size": lambda d: torch.sparse_coo_tensor(INDICES, VALUES, device=d),
    "of a size": lambda d: torch.sparse_coo_tensor(size=(2, 3), device=d),
    "integers": lambda d: torch.sparse_coo_tensor(INDICES, [1, 2, 3, 4], (2, 3), device=d).to_dense(),
    "bools": lambda d: torch.sparse_coo_tensor([[0], [1]], [True], (2, 3), device=d).to_dense(),
    "hybrid": lambda d: torch.sparse_coo_tensor([[0, 1, 1]], [[1.0, 2], [3, 4], [5, 6]], device=d).coalesce(),
    "zeros": lambda d: torch.zeros(2, 3, layout=torch.sparse_coo, device=d),
    "zeros like": lambda d: torch.zeros_like(coo(d)),
    "CSR": csr,
    "CSC": lambda d: torch.sparse_csc_tensor([0, 1, 2], [1, 0], [1.0, 2.0], (2, 2), device=d),
    "BSR": lambda d: torch.ones(4, 4, device=d).to_sparse_bsr((2, 2)).to_dense(),
    "moved": lambda d: coo("cpu").to(d),
    "CSR moved": lambda d: csr("cpu").to(d),
    "moved in a module": lambda d: holder().to(d).adjacency,
}
CONVERSIONS: dict[str, Case] = {
    "coalesce": lambda d: coo(d).coalesce(),
    "indices and values": lambda d: [coo(d).coalesce().indices(), coo(d).coalesce().values()],
    "to_dense": lambda d: coo(d).to_dense(),
    "to_sparse": lambda d: dense(d).to_sparse(),
    "to_sparse by rows": lambda d: dense(d).to_sparse(1),
    "to_sparse_csr": lambda d: coo(d).to_sparse_csr(),
    "to_sparse_csc": lambda d: coo(d).to_sparse_csc(),
    "CSR to dense": lambda d: csr(d).to_dense(),
    "CSR to COO": lambda d: csr(d).to_sparse(),
    "CSR to CSC": lambda d: csr(d).to_sparse_csc(),
    "batches of CSR": lambda d: torch.stack([dense(d)] * 2).to_sparse_csr().to_dense(),
    "dtype": lambda d: coo(d).double(),
    "deepcopy": lambda d: copy.deepcopy(coo(d)),
    "clone and detach": lambda d: [coo(d).clone(), coo(d, True).detach()],
}
PRODUCTS: dict[str, Case] = {
    "mm": lambda d: torch.mm(coo(d), dense(d)),
    "sparse.mm": lambda d: torch.sparse.mm(coo(d), dense(d)),
    "spmm": lambda d: torch.spmm(coo(d), dense(d)),
    "matmul": lambda d: coo(d) @ dense(d),
    "dense on the left": lambda d: torch.ones(2, 2, device=d) @ coo(d),
    "both sparse": lambda d: torch.sparse.mm(coo(d), coo(d).t()),
    "mv": lambda d: coo(d) @ dense(d)[:, 0],
    "addmm": lambda d: torch.addmm(torch.ones(2, 2, device=d), coo(d), dense(d), beta=0.5, alpha=2),
    "sparse.addmm": lambda d: torch.sparse.addmm(torch.ones(2, 2, device=d), coo(d), dense(d), alpha=2),
    "bmm": lambda d: torch.bmm(torch.stack([coo(d)] * 2), torch.stack([dense(d)] * 2)),
    "out": lambda d: torch.mm(coo(d), dense(d), out=torch.empty(2, 2, device=d)),
    "half": lambda d: torch.sparse.mm(coo(d).half(), dense(d).half()),
    "CSR": lambda d: csr(d) @ dense(d),
    "CSR addmm": lambda d: torch.addmm(torch.ones(2, 2, device=d), csr(d), dense(d)),
    "CSR mv": lambda d: csr(d) @ dense(d)[:, 0],
}
ARITHMETIC: dict[str, Case] = {
    "add": lambda d: (coo(d) + coo(d)).coalesce(),
    "subtract": lambda d: (coo(d) - coo(d).t().t() * 2).coalesce(),
    "dense and sparse": lambda d: torch.ones(2, 3, device=d) + coo(d),
    "dense minus sparse": lambda d: torch.ones(2, 3, device=d) - coo(d),
    "add in place": lambda d: torch.ones(2, 3, device=d).add_(coo(d), alpha=-0.5),
    "add in place, transposed": lambda d: torch.ones(3, 2, device=d).t().add_(coo(d)),
    "subtract in place": lambda d: torch.ones(2, 3, device=d).sub_(coo(d), alpha=-0.5),
    "add to sparse in place": lambda d: coo(d).add_(coo(d)).coalesce(),
    "by a number": lambda d: [coo(d) * 2, coo(d) / 2, 3 * coo(d), coo(d).mul_(2), coo(d).div_(2)],
    "by a tensor": lambda d: [coo(d) * torch.full((2, 3), 2.0, device=d), coo(d) * coo(d)],
    "elements": lambda d: [-coo(d), coo(d).abs(), coo(d).sqrt(), coo(d).tanh(), coo(d) ** 2],
    "sums": lambda d: [coo(d).sum(), torch.sparse.sum(coo(d)), torch.sparse.sum(coo(d), 0)],
    "norm": lambda d: coo(d).norm(),
    "softmax": lambda d: [torch.sparse.softmax(coo(d), 1), torch.sparse.log_softmax(coo(d), 1)],
    "mask": lambda d: torch.arange(6.0, device=d).reshape(2, 3).sparse_mask(coo(d).coalesce()),
    "shapes": lambda d: [coo(d).t(), coo(d).transpose(0, 1), coo(d).unsqueeze(0), coo(d)[1]],
    "selected": lambda d: coo(d).index_select(0, torch.tensor([1], device=d)),
    "joined": lambda d: [torch.cat([coo(d), coo(d)]), torch.stack([coo(d), coo(d)])],
    "copied": lambda d: coo(d).copy_(coo("cpu") * 3),
    "zeroed": lambda d: coo(d).zero_(),
    "CSR": lambda d: [csr(d) * 2, csr(d).sum(), csr(d) + csr(d), csr(d).t(), -csr(d)],
}


def holder() -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("adjacency", coo("cpu"))
    return module


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "cases",
    [CREATION, CONVERSIONS, PRODUCTS, ARITHMETIC],
    ids=["creation", "conversions", "products", "rest"],
)
def test_values_are_the_cpus(attached: object, cases: dict[str, Case]) -> None:
    wrong = {}
    for name, case in cases.items():
        try:
            check(case)
        except Exception as e:
            wrong[name] = f"{type(e).__name__}: {e}"[:300]
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())


@pytest.mark.parametrize("product", [torch.mm, torch.sparse.mm, torch.spmm, torch.matmul])
def test_gradients_of_products(attached: object, product: Callable[..., torch.Tensor]) -> None:
    def train(device: str) -> list[torch.Tensor]:
        s, x = coo(device, True), dense(device, True)
        product(s, x).pow(2).sum().backward()
        return [x.grad, s.grad.to_dense()]

    check(train)


def test_gradients_reach_the_values_and_csr_operands(attached: object) -> None:
    def of_values(device: str) -> list[torch.Tensor]:
        values = torch.tensor(VALUES, device=device, requires_grad=True)
        x = dense(device, True)
        s = torch.sparse_coo_tensor(torch.tensor(INDICES, device=device), values, (2, 3))
        (torch.sparse.mm(s, x).pow(2).sum() + s.to_dense().pow(2).sum()).backward()
        return [values.grad, x.grad]

    def of_csr(device: str) -> list[torch.Tensor]:
        s, x = csr(device).requires_grad_(), dense(device, True)
        (s @ x).pow(2).sum().backward()
        return [s.grad, x.grad]

    check(of_values)
    check(of_csr)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SparseAdam(p, 0.1),
        lambda p: torch.optim.Adagrad(p, 0.1),
    ],
    ids=["SGD", "momentum", "SparseAdam", "Adagrad"],
)
def test_sparse_gradients_of_embeddings(attached: object, optimizer: Callable[..., Any]) -> None:
    def train(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        table = torch.nn.Embedding(5, 3, sparse=True).to(device)
        steps = optimizer(table.parameters())
        for _ in range(3):
            steps.zero_grad()
            table(torch.tensor([1, 3, 1], device=device)).pow(2).sum().backward()
            table(torch.tensor([2, 3], device=device)).sum().backward()  # added to the gradient
            steps.step()
        assert table.weight.grad.is_sparse
        return [table.weight, table.weight.grad.coalesce()]

    check(train)


def test_sparse_gradient_of_embedding_bags(attached: object) -> None:
    def train(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        table = torch.nn.EmbeddingBag(5, 3, sparse=True, mode="sum").to(device)
        table(torch.tensor([[1, 3], [1, 2]], device=device)).pow(2).sum().backward()
        return table.weight.grad.coalesce()

    check(train)


def test_a_graph_convolution_trains_as_on_the_cpu(attached: object) -> None:
    def train(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        edges = torch.randint(0, 20, (2, 60))
        adjacency = torch.sparse_coo_tensor(edges, torch.ones(60), (20, 20)).coalesce().to(device)
        x, labels = torch.rand(20, 8).to(device), torch.randint(0, 3, (20,)).to(device)
        first, second = torch.nn.Linear(8, 16).to(device), torch.nn.Linear(16, 3).to(device)
        steps = torch.optim.Adam([*first.parameters(), *second.parameters()], 0.01)
        for _ in range(5):
            steps.zero_grad()
            hidden = torch.relu(torch.spmm(adjacency, first(x)))
            loss = torch.nn.functional.cross_entropy(torch.spmm(adjacency, second(hidden)), labels)
            loss.backward()
            steps.step()
        return [loss, first.weight, second.bias]

    check(train)


def test_what_a_program_sees(attached: object) -> None:
    s = coo("cuda")
    assert s.is_sparse
    assert s.is_cuda
    assert s.device == torch.device("cuda:0")
    assert not s.is_coalesced()
    assert s.coalesce().is_coalesced()
    assert s._nnz() == 4
    assert s.cpu().device.type == "cpu"
    text = repr(s)
    assert "values=tensor([3., 4., 5., 6.])" in text
    assert "device='cuda:0', size=(2, 3), nnz=4, layout=torch.sparse_coo" in text


@pytest.mark.parametrize("make", [coo, csr])
def test_saving(attached: object, make: Case) -> None:
    file = io.BytesIO()
    torch.save(make("cuda"), file)
    file.seek(0)
    assert torch.equal(torch.load(file).cpu().to_dense(), make("cpu").to_dense())
    file.seek(0)
    assert torch.load(file, map_location="cpu").device.type == "cpu"


def test_indices_are_checked(attached: object) -> None:
    with pytest.raises(RuntimeError, match="size is inconsistent with indices"):
        torch.sparse_coo_tensor([[0, 5], [0, 0]], [1.0, 2.0], (2, 3), device="cuda", check_invariants=True)
    with pytest.raises(RuntimeError, match="0 <= col_indices < ncols"):
        torch.sparse_csr_tensor(
            [0, 1, 3], [2, 0, 7], [1.0, 2.0, 3.0], (2, 3), device="cuda", check_invariants=True
        )
    outside = torch.sparse_coo_tensor([[0, 5], [0, 0]], [1.0, 2.0], (2, 3), device="cpu").cuda()
    with pytest.raises((RuntimeError, IndexError), match=r"index|indices"):
        (outside @ dense("cuda")).cpu()
    assert (torch.ones(2, device="cuda") + 1).tolist() == [2, 2]


def test_the_release_moves_them_to_the_cpu(attached: object) -> None:
    s, compressed = coo("cuda"), csr("cuda")
    table = torch.nn.Embedding(3, 2, sparse=True).cuda()
    table(torch.tensor([1], device="cuda")).sum().backward()
    assert evacuate.bring_home(evacuate.live()) == []
    assert torch.equal(s.to_dense(), coo("cpu").to_dense())
    assert torch.equal(compressed.to_dense(), csr("cpu").to_dense())
    assert table.weight.grad is not None
    assert table.weight.grad.device.type == "cpu"
