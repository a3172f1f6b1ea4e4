"""Calls with tensors of several devices: accepted if CUDA accepts them, else refused in CUDA's words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

TWO = "Expected all tensors to be on the same device, but found at least two devices, "
ONE = (
    "Expected all tensors to be on the same device, but got {} is on {}, different from other tensors on {} "
)


def wrapper(name: str) -> str:
    return rf"\(when checking argument in method wrapper_CUDA_{name}\)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, d: d + c, TWO + "cuda:0 and cpu!$"),
        (lambda c, d: c * d, TWO + "cuda:0 and cpu!$"),
        (lambda c, d: c.add_(d), TWO + "cuda:0 and cpu!$"),
        (lambda c, d: c * d[0, 0], TWO + "cuda:0 and cpu!$"),
        (lambda c, d: d + d.to("cuda:1"), TWO + "cuda:0 and cuda:1!$"),
        (lambda c, d: torch.where(d > 0, c, c), TWO + "cuda:0 and cpu!$"),
        (lambda c, d: d @ c, ONE.format("mat2", "cpu", "cuda:0") + wrapper("mm")),
        (lambda c, d: nn.Linear(2, 2).cuda()(c), ONE.format("mat1", "cpu", "cuda:0") + wrapper("addmm")),
        (lambda c, d: nn.Linear(2, 2)(d), ONE.format("mat1", "cuda:0", "cpu") + wrapper("addmm")),
        (lambda c, d: torch.cat([d, c]), ONE.format("tensors", "cpu", "cuda:0") + wrapper("cat")),
        (
            lambda c, d: nn.functional.cross_entropy(d, torch.tensor([0, 1])),
            ONE.format("target", "cpu", "cuda:0") + wrapper("nll_loss_forward"),
        ),
        (
            lambda c, d: nn.Embedding(4, 2).cuda()(torch.tensor([1])),
            ONE.format("index", "cpu", "cuda:0") + wrapper("_index_select"),
        ),
        (
            lambda c, d: nn.Conv1d(2, 1, 1).cuda()(c[None]),
            r"Input type \(torch.FloatTensor\) and weight type \(torch.cuda.FloatTensor\) should be the same",
        ),
        (
            lambda c, d: c[torch.tensor([0]).cuda()],
            r"indices should be either on cpu or on the same device as the indexed tensor \(cpu\)",
        ),
    ],
)
def test_a_mix_is_refused(attached: object, call: Callable, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(2, 2), torch.ones(2, 2, device="cuda"))
    assert torch.ones(2, device="cuda").sum().item() == 2, "and nothing is broken by it"


def test_what_cuda_takes_is_taken(attached: object) -> None:
    d = torch.arange(4.0, device="cuda")
    assert (d * torch.tensor(2.0)).tolist() == (torch.tensor(2.0) * d).tolist() == [0, 2, 4, 6]
    assert d[torch.tensor([3, 0])].tolist() == [3, 0]
    assert d[torch.tensor([True, False, True, False])].tolist() == [0, 2]
    d[torch.tensor([0])] = torch.tensor(9.0)
    d[1:].copy_(torch.tensor([7.0, 8.0, 9.0]))
    assert d.tolist() == [9, 7, 8, 9]
    assert torch.ones(2).copy_(d[:2]).tolist() == [9, 7]


def test_both_names_of_a_slice_are_one_place(attached: object) -> None:
    assert (torch.ones(2, device="cuda:0") + torch.ones(2, device="gpupool:0")).tolist() == [2, 2]
