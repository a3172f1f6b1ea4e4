"""What a lease replaces in PyTorch looks like what it replaces: to inspect, to pickle, and to a tensor subclass."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch", reason="the functions are PyTorch's")

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.cuda import alias  # noqa: E402
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

#: Nothing connects to it.
SPEC = AttachSpec(
    "lease-of-a-test", "127.0.0.1", 9, "", (DeviceSpec(0, "GPU-0", "V100", 1024, 2048, True),), 60.0
)


@pytest.fixture
def lease() -> Iterator[None]:
    session.activate(SPEC)
    yield
    session.deactivate()


def bare(owner: Any, name: str) -> Any:
    found = vars(owner).get(name, getattr(owner, name, None))
    return getattr(found, "__func__", found) if isinstance(found, staticmethod) else found


def signature(value: Any) -> str | None:
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return None


def facts(owner: Any, name: str) -> dict[str, Any]:
    """What programs ask a function or a class for."""
    value = bare(owner, name)
    found = {k: getattr(value, k, None) for k in ("__module__", "__name__", "__qualname__", "__doc__")}
    found["signature"] = signature(value)
    found["kind"] = [ask(value) for ask in (inspect.isbuiltin, inspect.isclass, inspect.isroutine)]
    try:
        found["pickled"] = pickle.loads(pickle.dumps(value)) is value
    except (pickle.PicklingError, TypeError, AttributeError):
        found["pickled"] = False
    return found


def test_every_replacement_looks_like_its_original() -> None:
    session.activate(SPEC)
    places = alias.replaced()
    session.deactivate()
    places = [place for place in places if callable(bare(*place))]
    assert len(places) > 200
    before = [facts(*place) for place in places]
    session.activate(SPEC)
    after = [facts(*place) for place in places]
    session.deactivate()
    wrong = []
    for (owner, name), was, now in zip(places, before, after, strict=True):
        differ = [key for key, value in was.items() if value and now[key] != value]
        # The first is inherited and pickled as what it is inherited from; c10d's own module keeps its own second.
        if name in ("_apply", "is_nccl_available"):
            differ.remove("pickled")
        wrong += [f"{owner.__name__}.{name}: {key} is {now[key]!r}, was {was[key]!r}" for key in differ]
    assert not wrong, "\n".join(wrong)


def names_of_overridable() -> dict[tuple[Any, str], Any]:
    """The functions and methods that a tensor subclass may handle, and lambdas with their parameters."""
    overrides = torch.overrides.get_testing_overrides()
    found = {}
    for owner in (torch, torch.Tensor, torch.nn.functional, torch.linalg, torch.fft, torch.special):
        for name in dir(owner):
            function = getattr(owner, name)
            # those of symbols import sympy, which takes seconds
            if callable(function) and not name.startswith("sym_") and function in overrides:
                found[owner, name] = overrides[function]
    return found


def arguments(override: Any, tensor: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for the parameters of an overridable function, as PyTorch's own tests make them."""
    positional, named = [], {}
    for parameter in inspect.signature(override).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            named[parameter.name] = tensor
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
            positional.append([tensor, tensor] if parameter.name.startswith("tensors") else tensor)
    return positional, named


class Seen(torch.Tensor):
    """A tensor that handles every function: it notes that it was called."""

    functions: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.functions.append(func)
        return "handled"


def names_that_arrive(tensor: torch.Tensor, names: dict[tuple[Any, str], Any]) -> set[str]:
    """The functions that ``__torch_function__`` is given as the program names them."""
    found = set()
    for (owner, name), override in names.items():
        function = getattr(owner, name)
        positional, named = arguments(override, tensor)
        Seen.functions.clear()
        with contextlib.suppress(Exception):  # some have arguments that are no tensors
            function(*positional, **named)
        if Seen.functions and Seen.functions[0] is function:
            found.add(f"{owner.__name__}.{name}")
    return found


def test_a_subclass_gets_the_functions_by_the_identity_that_the_program_sees(worker: Any) -> None:
    names = names_of_overridable()
    tensor = torch.ones(2).as_subclass(Seen)
    before = names_that_arrive(tensor, names)
    assert {"torch.zeros_like", "Tensor.to", "torch.nn.functional.relu"} <= before
    session.activate(worker.spec)
    try:
        assert before - names_that_arrive(tensor, names) == set()
        replaced = [place for place in alias.replaced() if place in names]
        on_slice = torch.ones(2, device="cuda").as_subclass(Seen)
        arrived = names_that_arrive(on_slice, {place: names[place] for place in replaced})
        assert arrived == {f"{owner.__name__}.{name}" for owner, name in replaced}
        for t in (tensor, on_slice):
            Seen.functions.clear()
            t.data = torch.zeros(2)
            assert t.data == "handled"
            assert Seen.functions == [torch.Tensor.data.__set__, torch.Tensor.data.__get__]
    finally:
        session.deactivate()


HELD = [torch.zeros_like, torch.Tensor.to, torch.randn, torch.ctc_loss]


def test_functions_held_before_a_lease_and_during_it_are_equal(lease: None) -> None:
    now = [torch.zeros_like, torch.Tensor.to, torch.randn, torch.ctc_loss]
    for held, replaced in zip(HELD, now, strict=True):
        assert {held: 1}[replaced] == {replaced: 1}[held] == 1
        assert copy.deepcopy(replaced) is replaced
    during = list(now)
    session.deactivate()
    session.activate(SPEC)
    assert all(
        a is b for a, b in zip(during, [torch.zeros_like, torch.Tensor.to, torch.randn, torch.ctc_loss])
    )


def test_a_table_filled_before_the_lease_finds_what_is_called_in_it(lease: None) -> None:
    table = {HELD[0]: "zeros", HELD[1]: "moved"}

    class Table(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return table[func]

    t = torch.ones(2).as_subclass(Table)
    assert torch.zeros_like(t) == HELD[0](t) == "zeros"
    assert t.to("cuda") == HELD[1](t, "cuda") == "moved"


def test_a_function_held_before_the_lease_is_what_arrives_where_it_is_compared_with_that(lease: None) -> None:
    zeros_like = HELD[0]  # from torch import zeros_like

    class Compared(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return "zeros" if func is zeros_like else super().__torch_function__(func, types, args, kwargs)

    class Inherited(Compared):
        pass

    for kind in (Compared, Inherited):
        t = torch.ones(2).as_subclass(kind)
        assert torch.zeros_like(t) == zeros_like(t) == "zeros"
        assert torch.empty_like(t).shape == (2,)
        assert isinstance(t.to(torch.float64), kind)


def test_a_mode_sees_the_functions_that_the_program_calls(lease: None) -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Mode():
        for make in (
            torch.empty,
            torch.zeros,
            torch.ones,
            torch.rand,
            torch.randn,
            torch.tensor,
            torch.as_tensor,
        ):
            make([2])
            assert seen.pop() is make
        assert torch.full((2,), 1.0).to("cpu").tolist() == [1.0, 1.0]
        assert torch.full in seen
        assert torch.Tensor.to in seen


def test_refusals_are_in_words_for_what_the_compiler_looks_into(lease: None) -> None:
    assert inspect.signature(torch.cuda.use_mem_pool).parameters.keys() == {"pool", "device"}
    with pytest.raises(RuntimeError, match="torch.cuda.graph is not available on a leased GPU: "):
        torch.cuda.graph(None)
    with pytest.raises(RuntimeError, match="torch.cuda.use_mem_pool is not available on a leased GPU: "):
        torch.cuda.use_mem_pool(None)
