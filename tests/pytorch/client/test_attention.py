"""Attention is one operator when no gradient is needed, and has the CPU's results in every case."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402
from torch.distributed.tensor.experimental import implicit_replication  # noqa: E402

from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "masked": {"attn_mask": torch.tensor([[True, False, True], [True, True, True]])},
    "biased": {"attn_mask": torch.tensor([[0.0, -1.0, 2.0], [0.5, 0.0, 0.0]])},
}


def inputs(requires_grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(2, 4, n, 8, requires_grad=requires_grad) for n in (2, 3, 3)]


def on_slice(given: dict) -> dict:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_one_operator(attached: object, name: str, context: type) -> None:
    there = [t.cuda() for t in inputs()]
    given = on_slice(CASES[name])
    stream = attachment.dispatcher().stream
    with context():
        F.scaled_dot_product_attention(*there, **given)
        torch.cuda.synchronize()
        calls = []
        push = stream.push
        stream.push = lambda record: (calls.append(record), push(record))[1]  # type: ignore[method-assign]
        try:
            result = F.scaled_dot_product_attention(*there, **given)
        finally:
            del stream.push  # type: ignore[method-assign]
    assert len(calls) == 1
    torch.testing.assert_close(result.cpu(), F.scaled_dot_product_attention(*inputs(), **CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_gradients(attached: object, name: str) -> None:
    here, there = inputs(True), [t.detach().cuda().requires_grad_() for t in inputs()]
    F.scaled_dot_product_attention(*here, **CASES[name]).square().sum().backward()
    F.scaled_dot_product_attention(*there, **on_slice(CASES[name])).square().sum().backward()
    for a, b in zip(here, there):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-5)


def test_transforms_and_autocast(attached: object) -> None:
    here, there = inputs(), [t.cuda() for t in inputs()]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).sum()

    torch.testing.assert_close(torch.func.grad(loss)(*there).cpu(), torch.func.grad(loss)(*here))
    mapped = torch.vmap(loss)(*there)
    torch.testing.assert_close(mapped.cpu(), torch.vmap(loss)(*here))
    with torch.autocast("cuda", torch.bfloat16):
        assert F.scaled_dot_product_attention(*there).dtype is torch.bfloat16


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="until 2.12 DTensor flattens no sharded dimension, on the CPU neither"
)
def test_heads_that_are_sharded_attend_causally(attached: object, tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        whole = [t.detach().cuda().requires_grad_() for t in inputs()]
        parts = [DTensor.from_local(t.detach().clone(), mesh, [Shard(1)]).requires_grad_() for t in whole]
        expected = F.scaled_dot_product_attention(*whole, is_causal=True)
        found = F.scaled_dot_product_attention(*parts, is_causal=True)
        assert torch.equal(found.to_local(), expected)
        expected.sum().backward()
        found.sum().backward()
        for t, part in zip(whole, parts, strict=True):
            assert torch.equal(part.grad.to_local(), t.grad)
        with implicit_replication():
            F.scaled_dot_product_attention(*parts, is_causal=True)
            assert torch.equal((parts[0] + whole[0]).to_local(), 2 * whole[0]), (
                "the program's own context goes on"
            )
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            parts[0] + whole[0]
    finally:
        dist.destroy_process_group()
