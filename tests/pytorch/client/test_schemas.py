"""A client and a worker with two releases of PyTorch: what is translated, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from jupyter_gpupool.pytorch.client import session
from jupyter_gpupool.pytorch.client.dispatch import attachment, schemas
from jupyter_gpupool.pytorch.client.dispatch.prediction import Unsupported
from jupyter_gpupool.pytorch.client.tensor import tensor
from jupyter_gpupool.pytorch.protocol.schemas import describe

aten = torch.ops.aten


def differences(func: Any, change: Callable[[list[Any]], None]) -> schemas.SchemaDifferences:
    """A worker whose release has another schema of ``func``: this one's, after ``change(arguments)``."""
    there = describe(func._schema)
    change(there[0])
    return schemas.SchemaDifferences({f"{func._schema.name}.{func._overloadname}": there}, "2.99.0")


def index_of(arguments: list[Any], name: str) -> int:
    return [a[0] for a in arguments].index(name)


class TestTranslation:
    def test_an_operator_that_does_not_differ_is_sent_as_it_is(self) -> None:
        same = schemas.SchemaDifferences({}, "2.99.0")
        assert same.translate(aten.relu.default, ["x"], {}) == ("aten::relu.default", ["x"], {})

    def test_arguments_follow_their_names(self) -> None:
        def swap(arguments: list[Any]) -> None:
            arguments[1], arguments[2] = arguments[2], arguments[1]

        # addmm(self, mat1, mat2): the other release takes mat2 first.
        call = differences(aten.addmm.default, swap).translate(aten.addmm.default, ["c", "a", "b"], {})
        assert call == ("aten::addmm.default", ["c"], {"mat1": "a", "mat2": "b"})

    def test_a_new_argument_keeps_its_default_there(self) -> None:
        def insert(arguments: list[Any]) -> None:
            arguments.insert(1, ["new", "int", "0", False])

        call = differences(aten.softmax.int, insert).translate(aten.softmax.int, ["x", 1], {})
        assert call == ("aten::softmax.int", ["x"], {"dim": 1})

    def test_a_renamed_argument_is_passed_by_its_new_name(self) -> None:
        def rename(arguments: list[Any]) -> None:
            arguments[index_of(arguments, "alpha")][0] = "factor"

        call = differences(aten.add.Tensor, rename).translate(aten.add.Tensor, ["x", "y"], {"alpha": 2})
        assert call == ("aten::add.Tensor", ["x", "y"], {"factor": 2})

    def test_what_is_left_out_has_this_releases_meaning(self) -> None:
        def turn(arguments: list[Any]) -> None:
            arguments[index_of(arguments, "keepdim")][2] = "True"

        call = differences(aten.argmax.default, turn).translate(aten.argmax.default, ["x", 0], {})
        assert call == ("aten::argmax.default", ["x", 0, False], {})

    @pytest.mark.parametrize(
        ("func", "change", "given", "reason"),
        [
            (aten.softmax.int, lambda a: a.pop(2), {"dtype": ["d", "float64"]}, "has no argument 'dtype'"),
            (aten.softmax.int, lambda a: a.append(["k", "Tensor", "", False]), {}, "needs an argument 'k'"),
            (aten.softmax.int, lambda a: a[1].__setitem__(1, "str"), {}, "takes str as 'dim', not int"),
        ],
    )
    def test_what_cannot_be_kept_is_refused(
        self, func: Any, change: Callable[[list[Any]], None], given: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(
            Unsupported,
            match=rf"^aten::softmax.int cannot be called .*{torch.__version__[:4]}.*2.99.0 .*{reason}",
        ):
            differences(func, change).translate(func, ["x", 1], given)

    def test_an_operator_of_former_releases_is_its_successor(self) -> None:
        if not hasattr(aten, "cholesky"):
            pytest.skip("removed in PyTorch 2.14")
        lacking = schemas.SchemaDifferences({"aten::cholesky.default": None}, "2.99.0")
        call = lacking.translate(aten.cholesky.default, ["x", True], {})
        assert call == ("aten::linalg_cholesky.default", ["x"], {"upper": True})


@pytest.fixture
def other_release(worker: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process says that it has another release, in which ``lgamma`` differs from the worker's."""
    monkeypatch.setattr(torch, "__version__", "2.13.99")
    ours = {**schemas._own_digests(), "aten::lgamma.default": "another", "aten::of_the_future.default": "0"}
    monkeypatch.setattr(schemas, "_own_digests", lambda: ours)
    session.activate(worker.spec)
    yield worker
    session.deactivate()


def test_a_worker_of_another_release_computes_and_says_what_differs(other_release: Any) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    torch.testing.assert_close((x.cuda() @ x.T.cuda()).softmax(0).cpu(), (x @ x.T).softmax(0))
    torch.testing.assert_close(torch.lgamma(x.cuda() + 1).cpu(), torch.lgamma(x + 1))
    found = attachment.dispatcher().differences
    assert found is not None
    assert found._theirs == {
        "aten::lgamma.default": describe(aten.lgamma.default._schema),
        "aten::of_the_future.default": None,
    }


def test_an_operator_that_the_worker_lacks_fails_alone(other_release: Any) -> None:
    attachment.dispatcher().differences = schemas.SchemaDifferences({"aten::lgamma.default": None}, "2.99.0")
    x = torch.ones(3, device="cuda")
    with pytest.raises(
        RuntimeError, match="aten::lgamma.default cannot be called .* 2.99.0 .* has no such operator"
    ):
        torch.lgamma(x)
    assert (x + 1).tolist() == [2.0, 2.0, 2.0]


def test_an_operator_that_the_worker_lacks_runs_as_its_parts_where_it_has_some(other_release: Any) -> None:
    lacking = schemas.SchemaDifferences({"aten::_foreach_add.Scalar": None}, "2.99.0")
    attachment.dispatcher().differences = lacking
    x = torch.arange(3.0, device="cuda")
    assert [t.tolist() for t in torch._foreach_add([x, x + 1], 1.0)] == [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]


def test_a_dtype_that_the_worker_lacks_is_refused_and_the_session_goes_on(
    other_release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(3, device="cuda")
    monkeypatch.setattr(tensor, "lacking_dtypes", frozenset({"float16"}))
    with pytest.raises(RuntimeError, match="has no dtype float16"):
        x.half()
    assert (x + 1).tolist() == [2.0, 2.0, 2.0]
