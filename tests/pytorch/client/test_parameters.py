"""What programs do with parameters, buffers and modules besides computing, compared with the CPU."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from jupyter_gpupool.pytorch.client import evacuate


def trained(place: str) -> nn.Linear:
    """A layer whose parameters have gradients of 2, 2, 2."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1).to(place)
    layer(torch.ones(2, 3, device=place)).sum().backward()
    return layer


def on_both(function: Callable[[str], Any]) -> None:
    """Compare the function's value on a slice with that on the CPU."""
    assert function("cuda:1") == function("cpu")


# -- copies


def test_a_copy_of_a_parameter_has_no_gradient(attached: object) -> None:
    def moved(place: str) -> Any:
        layer = trained(place)
        twin = copy.deepcopy(layer)
        gradients = [p.grad for p in twin.parameters()]
        twin(torch.ones(2, 3, device=place)).sum().backward()
        torch.optim.SGD(twin.parameters(), 0.1).step()
        return gradients, [round(v, 4) for v in (layer.weight - twin.weight).flatten().tolist()]

    on_both(moved)
    assert moved("cuda") == ([None, None], [0.2, 0.2, 0.2])


def test_a_copy_of_a_tensor_has_all_that_it_has(attached: object) -> None:
    def copied(place: str) -> Any:
        base = torch.arange(4.0, device=place)
        base.note = ["kept"]  # type: ignore[attr-defined]
        leaf = torch.ones(2, device=place, requires_grad=True)
        (leaf * 3).sum().backward()
        values = copy.deepcopy([base, base[1:3], base, leaf])
        values[1].fill_(7)
        assert values[2] is values[0]
        assert values[0].note == ["kept"]
        assert values[0].note is not base.note  # type: ignore[attr-defined]
        return [v.tolist() for v in (*values, base, values[3].grad)], values[3].requires_grad

    on_both(copied)


def test_results_of_operators_are_not_copied(attached: object) -> None:
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(torch.ones(1, device="cuda", requires_grad=True) * 2)


def test_a_shallow_copy_shares_memory(attached: object) -> None:
    def changed(place: str) -> Any:
        parameter, tensor = nn.Parameter(torch.zeros(2, device=place)), torch.zeros(2, device=place)
        parameter.note = tensor.note = 5  # type: ignore[attr-defined]
        twins: list[Any] = [copy.copy(parameter), copy.copy(tensor)]
        with torch.no_grad():
            for twin in twins:
                twin += 1
        return parameter.tolist(), tensor.tolist(), [t.note for t in twins], [t.requires_grad for t in twins]

    on_both(changed)


def test_pickling_keeps_attributes_and_shared_memory(attached: object) -> None:
    def loaded(place: str) -> Any:
        base = torch.zeros(4, device=place)
        parameter = nn.Parameter(torch.ones(2, device=place), requires_grad=False)
        parameter.no_decay = True  # type: ignore[attr-defined]
        values = pickle.loads(pickle.dumps([base, base[1:3], parameter, nn.Linear(2, 2).to(place)]))
        assert all(v.device.type == torch.device(place).type for v in (*values[:3], values[3].weight))
        assert isinstance(values[2], nn.Parameter)
        values[3].weight.data.fill_(3)
        return (
            [v.tolist() for v in (*values[:3], values[3].weight)],
            values[2].no_decay,
            values[2].requires_grad,
        )

    on_both(loaded)


def test_buffers(attached: object) -> None:
    def copied(place: str) -> Any:
        module = nn.Module()
        module.kept, module.dropped = (
            nn.Buffer(torch.ones(1, device=place), persistent=p) for p in (True, False)
        )
        twin = copy.deepcopy(module)
        return list(twin.state_dict()), [isinstance(b, nn.Buffer) for b in twin.buffers()]

    on_both(copied)


@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)])
def test_averages_of_models(attached: object, average: Any) -> None:
    def averaged(place: str) -> Any:
        layer = trained(place)
        model = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=average)
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        for _ in range(3):
            optimizer.step()
            model.update_parameters(layer)
        assert all(p.grad is None for p in model.parameters())
        return [[round(v, 5) for v in p.flatten().tolist()] for p in model.parameters()]

    on_both(averaged)


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_parametrized_layers_are_copied_and_trained(attached: object, parametrize: Any) -> None:
    def gradients(place: str) -> torch.Tensor:
        torch.manual_seed(3)
        layer = copy.deepcopy(parametrize(nn.Linear(3, 3))).to(place)
        twin = copy.deepcopy(layer)
        twin(torch.ones(1, 3, device=place)).pow(2).sum().backward()
        return torch.cat([p.grad.flatten().cpu() for p in twin.parameters()])

    torch.testing.assert_close(gradients("cuda:1"), gradients("cpu"))


def test_lists_and_dictionaries_of_parameters(attached: object) -> None:
    def names(place: str) -> Any:
        module = nn.Module()
        module.many = nn.ParameterList(
            [torch.ones(2, device=place), nn.Parameter(torch.zeros(1, device=place))]
        )
        module.named = nn.ParameterDict({"a": torch.ones(1, device=place)})
        twin = copy.deepcopy(module)
        return [(name, p.tolist()) for name, p in twin.named_parameters()]

    on_both(names)


# -- moves


def test_moves_keep_attributes_hooks_ties_and_references(attached: object) -> None:
    calls = []
    layer = nn.Linear(2, 2)
    layer.weight.no_decay = True  # type: ignore[attr-defined]
    layer.weight.register_hook(lambda g: calls.append(1))
    handle = layer.weight.register_hook(lambda g: calls.append(2))
    layer.weight.register_post_accumulate_grad_hook(lambda p: calls.append(3))
    layer.tied = layer.weight
    weight, reference = layer.weight, weakref.ref(layer.weight)
    for place in ("cuda:1", "cpu", "cuda:0"):
        layer.to(place)
        assert layer.weight is layer.tied is weight is reference()
        assert layer.weight.no_decay
        assert isinstance(layer.weight, nn.Parameter)
        layer(torch.ones(1, 2, device=place)).sum().backward()
        assert layer.weight.grad.device == layer.weight.device
    assert calls == [1, 2, 3] * 3
    handle.remove()
    layer(torch.ones(1, 2, device="cuda:0")).sum().backward()
    assert calls[9:] == [1, 3]


def test_modules_on_the_cpu_behave_as_without_a_lease(attached: object) -> None:
    layer = trained("cpu")
    layer.weight.note, gradient = 1, layer.weight.grad  # type: ignore[attr-defined]
    layer.double()
    assert layer.weight.note == 1
    assert layer.weight.grad is gradient
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_data_moves_a_tensor_in_place(attached: object) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.5, momentum=0.9)
    parameter.sum().backward()
    gradient = parameter.grad
    for place in ("cuda:1", "cpu", "cuda:0"):
        parameter.data = parameter.data.to(place)
        parameter._grad.data = parameter._grad.data.to(place)
        assert parameter.grad is gradient
        assert str(parameter.device) == str(gradient.device) == place
    source = torch.zeros(3, device="cuda:0")
    parameter.data = source
    source.fill_(4)
    assert parameter.tolist() == [4, 4, 4]
    parameter.grad = torch.ones(3, device="cuda:0")
    optimizer.step()
    assert parameter.tolist() == [3.5] * 3


def test_a_model_moves_while_an_old_result_is_kept(attached: object) -> None:
    layer = nn.Linear(2, 2)
    result = layer(torch.ones(1, 2))
    layer.cuda()
    torch.testing.assert_close(layer(torch.ones(1, 2, device="cuda")).cpu(), result)
    with pytest.raises(RuntimeError, match="moved from cpu after this graph had used it"):
        result.sum().backward()


def test_a_release_leaves_attributes_hooks_and_classes(attached: object) -> None:
    calls = []
    parameter = Scaled(torch.ones(2, device="cuda"))
    parameter.no_decay = True  # type: ignore[attr-defined]
    parameter.register_hook(lambda g: calls.append(1))
    named = torch.ones(2, device="cuda").as_subclass(Named)
    assert not evacuate.bring_home(evacuate.live())
    assert type(parameter) is Scaled
    assert type(named) is Named
    assert parameter.no_decay  # type: ignore[attr-defined]
    parameter.scaled().sum().backward()
    assert parameter.grad.tolist() == [10, 10]
    assert calls == [1]


def test_results_of_operators_do_not_move_in_place(attached: object) -> None:
    x = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match=r"in place.*use \.to\(\)"):
        x.data = torch.ones(1, device="cuda")


# -- modules whose shapes are known at the first batch


@pytest.mark.parametrize("order", ["module first", "batch first"])
def test_lazy_modules(attached: object, order: str) -> None:
    def result(place: str) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
        if order == "batch first":
            model(torch.ones(2, 1, 2, 2))
        parameters = list(model.parameters())
        model.to("cpu").to(place)
        x = torch.arange(8.0, device=place).view(2, 1, 2, 2)
        with torch.no_grad():
            model(x)
            for p in parameters:
                nn.init.constant_(p, 0.5)
        model(x).sum().backward()
        assert all(a is b for a, b in zip(model.parameters(), parameters))
        assert all(isinstance(p, nn.Parameter) for p in parameters)
        return [[round(v, 3) for v in p.grad.flatten().tolist()] for p in parameters]

    on_both(result)


def test_lazy_modules_made_on_a_slice(attached: object) -> None:
    layer = nn.LazyLinear(2, device="cuda:1")
    assert nn.parameter.is_lazy(layer.weight)
    assert nn.parameter.is_lazy(copy.deepcopy(layer).weight)
    assert tuple(layer(torch.ones(1, 4, device="cuda:1")).shape) == (1, 2)
    assert tuple(layer.weight.shape) == (2, 4)


# -- subclasses


class Named(torch.Tensor):
    """A subclass with the default behavior: results of operators are of it, too."""

    def twice(self) -> torch.Tensor:
        return self * 2


class Scaled(nn.Parameter):
    """A subclass of parameters."""

    def scaled(self) -> torch.Tensor:
        return self * 10


def test_subclasses_of_tensors(attached: object) -> None:
    def computed(place: str) -> Any:
        leaf = torch.ones(2, 2, requires_grad=True)
        x = leaf.as_subclass(Named).to(place)
        y = x.twice()
        y.add_(1)
        kinds = [isinstance(t, Named) for t in (x, y, y[0], y + x, y.cpu(), torch.cat([x, y]), y.detach())]
        y.sum().backward()
        assert type(y.cpu()) is Named
        assert y.device == torch.device(place)
        return kinds, y.tolist(), leaf.grad.tolist(), repr(y.detach()).replace(", device='cuda:1'", "")

    on_both(computed)
    x = torch.arange(3.0, device="cuda")
    named = x.as_subclass(Named)
    named.zero_()
    assert x.tolist() == [0, 0, 0]
    twin = pickle.loads(pickle.dumps(named))
    assert isinstance(twin, Named)
    assert isinstance(copy.deepcopy(named), Named)


def test_torch_function_of_a_subclass_is_called(attached: object) -> None:
    class Recorded(torch.Tensor):
        calls: list[str] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Recorded).cuda()
    del Recorded.calls[:]
    assert isinstance(torch.exp(x) + x, Recorded)
    assert Recorded.calls == ["exp", "add"]


def test_subclasses_of_parameters(attached: object) -> None:
    module = nn.Module()
    module.p = Scaled(torch.ones(2))
    module.q = Scaled(torch.ones(2, device="cuda:1"))
    module.cuda(1)
    twin = copy.deepcopy(module)
    for p in (*module.parameters(), *twin.parameters()):
        assert isinstance(p, Scaled)
        assert repr(p).startswith("Parameter containing:\ntensor([1., 1.], device='cuda:1'")
        assert p.scaled().tolist() == [10, 10]
        p.scaled().sum().backward()
        assert p.grad.tolist() == [10, 10]
    module.cpu()
    assert type(module.p) is type(module.q) is Scaled
