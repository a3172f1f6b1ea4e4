"""The shape rules predict what meta kernels return."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from jupyter_gpupool.pytorch.client.dispatch import prediction, shape_rules  # noqa: E402

from ...conftest import often  # noqa: E402

OFTEN = settings(
    max_examples=often(200, 5000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    size = draw(st.lists(st.integers(0, 3), max_size=4) if sizes is None else sizes)
    kind = dtype or draw(st.sampled_from(DTYPES))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "strided" and size:
        return torch.empty([*size[:-1], 2 * size[-1]], dtype=kind, device="cuda")[..., ::2]
    if layout == "transposed" and len(size) > 1:
        return torch.empty([*size[:-2], size[-1], size[-2]], dtype=kind, device="cuda").transpose(-1, -2)
    return torch.empty(size, dtype=kind, device="cuda")


def agree(func: Any, *args: Any) -> None:
    """Where the rule answers, so does the meta kernel, and the same."""
    told = shape_rules.layouts_of(func, args, {})
    if told is None:
        return
    leaves = [a for x in args for a in (x if isinstance(x, list) else [x]) if isinstance(a, torch.Tensor)]
    meta = func(*[prediction.on_meta(a, None) for a in args])
    one = not isinstance(told, tuple)
    assert one or len(told) == len(meta)
    for ours, theirs in [(told, meta)] if one else zip(told, meta):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert (ours.size, ours.stride, ours.dtype) == (tuple(theirs.shape), theirs.stride(), theirs.dtype)
        assert (ours.index, ours.cuda) == (leaves[0]._geometry.index, leaves[0]._geometry.cuda)


def normalized(data: Any) -> list[Any]:
    """(input, sizes, weight, bias) of a layer normalization, mostly such as fit."""
    kind = data.draw(st.sampled_from(DTYPES[:4]))
    x = data.draw(tensors(st.lists(st.integers(1, 3), min_size=1, max_size=3), kind))
    size = list(x.shape[data.draw(st.integers(0, x.dim())) :])
    affine = [data.draw(st.none() | tensors(st.just(size), kind)) for _ in range(2)]
    return [x, size, *affine]


@pytest.mark.soak
@OFTEN
@given(st.data())
def test_rules_and_meta_kernels_agree(attached: object, data: Any) -> None:
    func = data.draw(st.sampled_from(sorted(shape_rules.RULES, key=str)))
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
    elif func._schema.name == "aten::addmm":
        rows, inner, columns = (data.draw(st.integers(1, 3)) for _ in range(3))
        kind = data.draw(st.sampled_from(DTYPES[:4]))
        sizes = ([columns], [rows, inner], [inner, columns])
        args = tuple(data.draw(tensors(st.just(list(size)), kind)) for size in sizes)
    elif func._schema.name == "aten::native_dropout":
        args = (first, data.draw(st.sampled_from([0.0, 0.25, 1.0])), data.draw(st.booleans()))
    elif func._schema.name == "aten::native_dropout_backward":
        args = (first, data.draw(tensors(st.just(list(first.shape)), torch.bool)), 2.0)
    elif func._schema.name == "aten::native_layer_norm":
        args = (*normalized(data), 1e-5)
    elif func._schema.name == "aten::native_layer_norm_backward":
        x, size, weight, bias = normalized(data)
        statistics = torch.empty(
            [*x.shape[: x.dim() - len(size)], *[1] * len(size)], dtype=x.dtype, device="cuda"
        )
        mask = [data.draw(st.booleans()) for _ in range(3)]
        args = (torch.empty_like(x), x, size, statistics, statistics, weight, bias, mask)
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
    predict = prediction._Description.of
    monkeypatch.setattr(
        prediction._Description,
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
    from jupyter_gpupool.pytorch.client.dispatch import attachment

    x = torch.arange(12.0, device="cuda").view(6, 2)
    before = attachment.dispatcher().stream.questions
    found = parts(x)
    assert attachment.dispatcher().stream.questions == before
    found[1].fill_(-1)
    assert [p.tolist() for p in parts(x.cpu())] == [p.tolist() for p in found]


def test_the_first_pass_of_a_transformer_asks_few_meta_kernels(attached: object, monkeypatch: Any) -> None:
    """What layers and optimizers call most, and what has costly meta kernels, has a rule."""
    asked: list[str] = []
    on_meta = prediction.on_meta
    predict = prediction.predict

    def counted(func: Any, *rest: Any) -> Any:
        seen: list[Any] = []
        monkeypatch.setattr(prediction, "on_meta", lambda *a: (seen.append(a), on_meta(*a))[1])
        found = predict(func, *rest)
        asked.extend([func._schema.name] * bool(seen))
        return found

    monkeypatch.setattr(prediction, "predict", counted)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).cuda()
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 3, 8, device="cuda")).square().sum().backward()
    optimizer.step()
    ruled = {
        *(
            "aten::addmm",
            "aten::native_dropout",
            "aten::native_layer_norm",
            "aten::native_layer_norm_backward",
        ),
        *(
            "aten::_foreach_mul_",
            "aten::_foreach_lerp_",
            "aten::_foreach_addcmul_",
            "aten::_foreach_addcdiv_",
        ),
    }
    assert sorted(ruled & set(asked)) == []


def test_lists_of_unlike_tensors_have_no_rule(attached: object) -> None:
    from jupyter_gpupool.pytorch.client.dispatch.shape_rules import changes_elements_only

    add = torch.ops.aten._foreach_add_.List
    a, b = torch.ones(2, 3, device="cuda"), torch.ones(3, device="cuda")
    assert changes_elements_only(add, ([a, b], [a, b]), {})
    assert not changes_elements_only(add, ([a, b], [b, b]), {})
    assert not changes_elements_only(add, ([a, b], [a]), {})
    assert not changes_elements_only(add, ([a], [a.cpu()]), {})
    assert not changes_elements_only(torch.ops.aten._foreach_add.List, ([a], [a]), {})
    assert not changes_elements_only(torch.ops.aten._foreach_add_.Scalar, ([a.int()], 0.5), {})
