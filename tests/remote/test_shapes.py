"""The rules that tell a result without its meta kernel say what the meta kernel says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.remote import shapes, signature  # noqa: E402

OFTEN = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
]
NUMBERS = st.sampled_from([2, 0.5, True, -1])


@st.composite
def tensors(draw: Any, sizes: Any = None, dtype: Any = None) -> Any:
    size = draw(sizes or st.lists(st.integers(0, 3), max_size=4))
    kind = dtype or draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "strided" and size:
        return torch.empty([*size[:-1], 2 * size[-1]], dtype=kind, device="cuda")[..., ::2]
    if layout == "transposed" and len(size) > 1:
        return torch.empty([*size[:-2], size[-1], size[-2]], dtype=kind, device="cuda").transpose(-1, -2)
    return torch.empty(size, dtype=kind, device="cuda")


def agree(func: Any, *args: Any) -> None:
    """Where the rule answers, so does the meta kernel, and the same."""
    told = shapes.geometry_of(func, args, {})
    if told is None:
        return
    leaves = [a for x in args for a in (x if isinstance(x, list) else [x]) if isinstance(a, torch.Tensor)]
    meta = func(*[signature.on_meta(a, None) for a in args])
    assert (told.size, told.stride, told.dtype) == (tuple(meta.shape), meta.stride(), meta.dtype)
    assert (told.index, told.cuda) == (leaves[0]._geometry.index, leaves[0]._geometry.cuda)


@OFTEN
@given(st.data())
def test_rules_and_meta_kernels_agree(attached: object, data: Any) -> None:
    func = data.draw(st.sampled_from(sorted(shapes.RULES, key=str)))
    first = data.draw(tensors())
    dims = st.integers(-3, 3)
    if func is torch.ops.aten.cat.default:
        sizes = st.tuples(*[st.just(s) | st.integers(0, 3) for s in first.shape]).map(list)
        others: list[Any] = []
        for _ in range(data.draw(st.integers(0, 2))):
            others.append(data.draw(tensors(sizes, first.dtype)))
        args: tuple = ([first, *others], data.draw(dims))
    elif func._schema.name in ("aten::_softmax", "aten::_log_softmax"):
        args = (first, data.draw(dims), data.draw(st.booleans()))
    elif func._schema.name == "aten::_safe_softmax":
        args = (first, data.draw(dims))
    elif func._schema.name == "aten::scaled_dot_product_attention":
        batch, length, past, width = (data.draw(st.integers(0, 3)) for _ in range(4))
        args = tuple(
            data.draw(tensors(st.just([batch, 2, n, width]), torch.float32)) for n in (length, past, past)
        )
    elif func._schema.name in ("aten::mm", "aten::bmm"):
        args = (first, data.draw(tensors()))
    elif len(func._schema.arguments) > 1 and func._schema.arguments[1].name == "other":
        args = (
            first,
            data.draw(NUMBERS if func._overloadname == "Scalar" else NUMBERS | st.just(first) | tensors()),
        )
    else:
        args = (first,)
    try:
        agree(func, *args)
    except (RuntimeError, IndexError, ValueError) as e:
        raise AssertionError(f"the rule of {func} answers what the meta kernel refuses: {e}") from e


def test_a_decoder_meets_few_shapes_that_no_rule_tells(attached: object, monkeypatch: Any) -> None:
    """Of the operators whose shapes grow with the text, those with costly meta kernels have a rule."""
    asked: list[str] = []
    predict = signature._Description.of
    monkeypatch.setattr(
        signature._Description,
        "of",
        lambda self, got: (asked.append(str(self._returns)), predict(self, got))[1],
    )
    keys = torch.randn(1, 2, 3, 4, device="cuda")
    for _ in range(3):
        asked.clear()
        keys = torch.cat((keys, keys[:, :, :1]), 2)
        torch.softmax(keys @ keys.transpose(-1, -2) * 0.5, -1)
    assert len(asked) <= 8, asked


@pytest.mark.parametrize("parts", [lambda x: x.split(2), lambda x: x.chunk(3), lambda x: x.unbind(0)])
def test_parts_of_a_tensor_ask_nobody(attached: object, parts: Any) -> None:
    from jupyter_gpupool.remote import connection

    x = torch.arange(12.0, device="cuda").view(6, 2)
    before = connection.dispatcher().stream.questions
    found = parts(x)
    assert connection.dispatcher().stream.questions == before
    found[1].fill_(-1)
    assert [p.tolist() for p in parts(x.cpu())] == [p.tolist() for p in found]
