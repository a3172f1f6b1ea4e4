"""Nested tensors on a leased device: the jagged layout works, the strided one is refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

F = torch.nn.functional


def nested(device: str) -> torch.Tensor:
    parts = [torch.arange(6.0).reshape(2, 3), torch.arange(9.0).reshape(3, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, device=device)


CASES: dict[str, Callable[[str], Any]] = {
    "created": nested,
    "moved": lambda d: nested("cpu").to(d),
    "scaled": lambda d: nested(d) * 2,
    "relu": lambda d: torch.relu(nested(d) - 3),
    "linear": lambda d: F.linear(nested(d), torch.ones(4, 3, device=d)),
    "softmax": lambda d: torch.softmax(nested(d), -1),
    "layer_norm": lambda d: F.layer_norm(nested(d), (3,)),
    "of offsets": lambda d: torch.nested.nested_tensor_from_jagged(
        torch.arange(10.0, device=d).reshape(5, 2), torch.tensor([0, 2, 5], device=d)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_jagged_values_are_the_cpus(attached: object, name: str) -> None:
    wanted, got = CASES[name]("cpu"), CASES[name]("cuda")
    assert got.is_nested
    assert str(got.values().device) == "cuda:0"
    for w, g in zip(wanted.unbind(), got.unbind(), strict=True):
        torch.testing.assert_close(g.cpu(), w)
    padded = torch.nested.to_padded_tensor(got, -1.0)
    torch.testing.assert_close(padded.cpu(), torch.nested.to_padded_tensor(wanted, -1.0))


def test_gradients_reach_the_parts(attached: object) -> None:
    parts = [torch.ones(2, 3, device="cuda", requires_grad=True), torch.ones(1, 3, device="cuda")]
    joined = torch.nested.as_nested_tensor(parts, layout=torch.jagged) * 3
    torch.nested.to_padded_tensor(joined, 0.0).sum().backward()
    assert parts[0].grad is not None
    assert parts[0].grad.tolist() == [[3.0] * 3] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2)], device="cuda"),
        lambda: torch.nested.as_nested_tensor([torch.ones(2, device="cuda")]),
        lambda: torch.nested.nested_tensor([torch.ones(2)]).cuda(),
    ],
)
def test_the_strided_layout_is_refused(attached: object, make: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"^nested tensors of the strided layout .* layout=torch.jagged$"):
        make()
