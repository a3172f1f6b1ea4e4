"""Operators of other libraries than PyTorch: they run on a leased GPU where the GPU server's list has them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the data plane needs PyTorch")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from tests.support import operator_library  # noqa: E402, F401  makes the operators known

ALLOWED = ("scale_rows", "above", "halve_", "count")
ops = torch.ops.gpupool_tests


def _serve_with_library(listener: socket.socket, spec: Any) -> None:
    from jupyter_gpupool.pytorch.worker import allowed_operators, worker

    names = {f"gpupool_tests::{name}": "" for name in ALLOWED}
    broken = {"gpupool_tests::secret": "its library cannot be imported (OSError: no such file)"}
    allowed_operators.allow({**names, **(broken if spec.ttl_s == 77 else {})}, " somewhere")
    os._exit(worker.serve(spec, listener, lambda usage: None))


@pytest.fixture
def with_library(start_worker: Callable[..., Any]) -> Iterator[Any]:
    running = start_worker(1, serve=_serve_with_library)
    session.activate(running.spec)
    yield running
    session.deactivate()


def test_an_operator_with_a_meta_kernel_and_its_gradient(with_library: Any) -> None:
    x = torch.arange(12.0).view(4, 3)
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    here = x.clone().requires_grad_()
    there = x.cuda().requires_grad_()
    for leaf, more in ((here, factors), (there, factors.cuda())):
        ops.scale_rows(leaf, more, 0.5).square().sum().backward()
    got = ops.scale_rows(there, factors.cuda())
    assert got.device.type == "cuda" and got.shape == (4, 3)
    assert torch.equal(got.cpu(), ops.scale_rows(x, factors))
    assert torch.equal(there.grad.cpu(), here.grad)


def test_the_worker_says_the_shape_where_nothing_predicts_it(with_library: Any) -> None:
    x = torch.tensor([3.0, -1.0, 5.0, 0.5])
    got = ops.above(x.cuda(), 0.75)
    assert got.shape == (2,) and got.cpu().tolist() == [3.0, 5.0]


def test_one_that_writes_and_one_that_returns_a_number(with_library: Any) -> None:
    x = torch.tensor([3.0, -1.0]).cuda()
    assert ops.halve_(x) is None
    assert x.cpu().tolist() == [1.5, -0.5]
    assert ops.count(x) == 1


def test_an_operator_that_is_not_in_the_list_is_refused(with_library: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.secret(torch.ones(2).cuda())
    said = str(caught.value)
    assert "gpupool_tests::secret is not in the list of further operators that this GPU server allows" in said
    assert "(gpupool_tests::above, gpupool_tests::count," in said and "can add it somewhere" in said
    assert torch.ones(2).cuda().sum().item() == 2.0, "the session goes on"


def test_where_no_list_is_the_refusal_says_so(attached: Any) -> None:
    with pytest.raises(RuntimeError, match=r"that this GPU server allows \(empty\)"):
        ops.above(torch.ones(2).cuda(), 0.0)


def test_an_allowed_operator_whose_library_is_broken_says_why(start_worker: Callable[..., Any]) -> None:
    running = start_worker(1, serve=_serve_with_library, ttl_s=77)
    session.activate(running.spec)
    try:
        with pytest.raises(RuntimeError, match=r"cannot be used on this GPU server: its library cannot be"):
            ops.secret(torch.ones(2).cuda())
    finally:
        session.deactivate()


def test_in_a_compiled_function(with_library: Any) -> None:
    @torch.compile
    def step(x: Any, factors: Any) -> Any:
        return ops.scale_rows(x + 1, factors).relu()

    x, factors = torch.arange(6.0).view(2, 3), torch.tensor([1.0, -1.0])
    want = ops.scale_rows(x + 1, factors).relu()
    assert torch.equal(step(x.cuda(), factors.cuda()).cpu(), want)
