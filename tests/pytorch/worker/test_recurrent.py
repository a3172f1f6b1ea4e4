"""A worker checks the sizes of a recurrent network before a kernel trusts them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a worker runs PyTorch's operators")

from torch import nn  # noqa: E402

from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402
from jupyter_gpupool.pytorch.protocol import commands  # noqa: E402
from jupyter_gpupool.pytorch.protocol.recurrent import OPAQUE  # noqa: E402
from jupyter_gpupool.pytorch.worker import allowed_operators  # noqa: E402
from jupyter_gpupool.pytorch.worker.recurrent import rnn, rnn_backward  # noqa: E402


def arguments(**changed: Any) -> dict[str, Any]:
    model = nn.LSTM(4, 6, 2)
    return {
        **{"mode": "lstm", "input": torch.randn(5, 3, 4), "batch_sizes": None},
        **{"hx": [torch.zeros(2, 3, 6)] * 2, "params": [p.detach() for p in model.parameters()]},
        **{"has_biases": True, "num_layers": 2, "dropout": 0.0, "train": True},
        **{"bidirectional": False, "batch_first": False, "differentiated": []},
        **changed,
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "save"},
        {"input": torch.randn(5, 3, 400)},
        {"input": torch.randn(5, 3)},
        {"input": torch.zeros(5, 3, 4, dtype=torch.int32)},
        {"input": torch.randn(5, 3, 4, dtype=torch.float64)},
        {"input": torch.randn(0, 3, 4)},
        {"hx": [torch.zeros(2, 3, 6)]},
        {"hx": [torch.zeros(2, 1, 6)] * 2},
        {"params": [torch.randn(24, 4)] * 8},
        {"params": []},
        {"num_layers": 4},
        {"num_layers": 0},
        {"bidirectional": True},
        {"has_biases": False},
        {"input": torch.randn(15, 4), "batch_sizes": [3, 3, 3]},
        {"input": torch.randn(15, 4), "batch_sizes": [1, 14]},
        {"input": torch.randn(15, 4), "batch_sizes": [16, -1]},
        {"input": torch.randn(15, 4), "batch_sizes": []},
        {"differentiated": [True]},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="[a-z]"):
        rnn(**arguments(**changed))


def test_gradients_that_do_not_fit_are_refused() -> None:
    *_, saved = rnn(**arguments(differentiated=[True] * 11))
    for grads in (
        [torch.ones(5, 3, 6)],
        [torch.ones(5, 3, 7), None, None],
        [torch.ones(5, 3, 6).double(), None, None],
    ):
        with pytest.raises(ValueError, match="gradients"):
            rnn_backward(saved, grads)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without the forward pass"):
        rnn_backward(torch.zeros(8, dtype=OPAQUE), [None])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_the_unchecked_operators_are_refused(mode: str) -> None:
    for overload in ("input", "data"):
        with pytest.raises(allowed_operators.OperatorRefused, match="in its place"):
            allowed_operators.resolve(f"aten::{mode}.{overload}")


def test_what_is_saved_has_no_elements(attached: object) -> None:
    out, _ = nn.LSTM(4, 6).cuda()(torch.randn(5, 3, 4).cuda())
    saved = next(t for t in out.grad_fn.saved_tensors if t.dtype is OPAQUE)
    stream = attachment.dispatcher().stream
    nbytes = saved._storage.nbytes
    for layout in (saved._geometry.wire(), [[nbytes], [1], 0, "uint8", 0]):
        with pytest.raises(RuntimeError, match="no elements to read"):
            stream.ask((commands.READ, saved._storage.id, layout))
        stream.push((commands.WRITE, saved._storage.id, layout, bytes(nbytes)))
        stream.wait()
    stream.push((commands.RESET,))
    out.sum().backward()
    stream.wait()
