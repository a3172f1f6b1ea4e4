"""torch.func, checkpointing, user-defined autograd functions, hooks and copies between slices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


@pytest.fixture
def device(attached: object) -> str:
    """test_device_names shows that the others are the same."""
    return "gpupool"


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).sum()


class TestTransforms:
    @pytest.mark.parametrize(
        "transform",
        [
            lambda x: grad(f)(x),
            lambda x: grad(lambda y: grad(f)(y).sum())(x),
            lambda x: vmap(lambda row: row.softmax(0) @ row)(x[None].repeat(3, 1)),
            lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
            lambda x: vmap(torch.mul, in_dims=(0, None))(x, x[0]),
            lambda x: jvp(f, (x,), (torch.ones_like(x),))[1],
            lambda x: vjp(f, x)[1](torch.ones((), device=x.device))[0],
            lambda x: jacrev(torch.sin)(x),
            lambda x: jacfwd(torch.sin)(x),
            lambda x: hessian(f)(x),
            lambda x: torch.autograd.functional.jacobian(torch.cos, x),
        ],
    )
    def test_results_are_the_cpus(self, device: str, transform: object) -> None:
        x = torch.linspace(0.1, 1, 4)
        result = transform(x.to(device))  # type: ignore[operator]
        assert result.device.type == torch.device(device).type
        torch.testing.assert_close(result.cpu(), transform(x))  # type: ignore[operator]

    def test_gradients_of_each_sample(self, device: str) -> None:
        def gradients(place: str) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(place)
            weights = {k: v.detach() for k, v in model.named_parameters()}
            x, y = torch.randn(5, 3).to(place), torch.tensor([0, 1, 1, 0, 1]).to(place)

            def loss(weights: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                out = functional_call(model, weights, (x[None],))
                return nn.functional.cross_entropy(out, y[None])

            return vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)

        ours, theirs = gradients(device), gradients("cpu")
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name].cpu(), gradient)

    def test_an_ensemble(self, device: str) -> None:
        models = [nn.Linear(3, 2).to(device) for _ in range(3)]
        weights, buffers = torch.func.stack_module_state(models)
        x = torch.randn(4, 3).to(device)
        out = vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers)
        torch.testing.assert_close(out, torch.stack([m(x) for m in models]))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_randomness(self, device: str, randomness: str) -> None:
        torch.manual_seed(0)
        rows = vmap(lambda x: x + torch.rand_like(x), randomness=randomness)(torch.zeros(3, 4, device=device))
        assert torch.equal(rows[0], rows[1]) is (randomness == "same")


class TestForwardMode:
    def test_dual_numbers(self, device: str) -> None:
        import torch.autograd.forward_ad as fwd

        x = torch.tensor([1.0, 2.0], device=device)
        with fwd.dual_level():
            dual = fwd.make_dual(x, torch.ones_like(x))
            tangent = fwd.unpack_dual(dual**2).tangent
        assert tangent.tolist() == [2, 4]


class TestCheckpoint:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_and_random_numbers_are_the_same(self, device: str, use_reentrant: bool) -> None:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1)).to(device)
        x = torch.randn(6, 4).to(device).requires_grad_()
        found = []
        for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
            torch.manual_seed(3)
            block.zero_grad()
            x.grad = None
            loss = run(x).sum()  # type: ignore[operator]
            loss.backward()
            assert x.grad is not None
            found.append([loss.item(), x.grad.tolist(), *(p.grad.tolist() for p in block.parameters())])
        assert found[0] == found[1]

    def test_in_mixed_precision(self, device: str) -> None:
        kind = torch.device(device).type
        block = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(device)
        x = torch.randn(2, 4).to(device).requires_grad_()
        seen = []
        block[0].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
        with torch.autocast(kind, dtype=torch.bfloat16):
            checkpoint(block, x, use_reentrant=False).float().sum().backward()
        assert seen == [torch.bfloat16, torch.bfloat16], "computed alike both times"

    def test_in_segments(self, device: str) -> None:
        layers = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)]).to(device)
        x = torch.randn(2, 3).to(device)
        checkpoint_sequential(layers, 2, x, use_reentrant=False).sum().backward()
        checked = [p.grad.clone() for p in layers.parameters()]
        layers.zero_grad()
        layers(x).sum().backward()
        for a, p in zip(checked, layers.parameters()):
            torch.testing.assert_close(a, p.grad)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.scale = scale  # type: ignore[attr-defined]
        rounded = x.round()
        ctx.mark_non_differentiable(rounded)  # type: ignore[attr-defined]
        return scale * x**3, rounded

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor, _: torch.Tensor) -> tuple:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * 3 * ctx.scale * x**2, None  # type: ignore[attr-defined]


class TestAutograd:
    def test_a_function_of_ones_own(self, device: str) -> None:
        x = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
        cubes, rounded = Cube.apply(x, 2.0)
        cubes.sum().backward(retain_graph=True)
        assert x.grad is not None
        assert x.grad.tolist() == [6, 24]
        assert not rounded.requires_grad
        assert cubes.tolist() == [2, 16]
        local = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: Cube.apply(t.to(device), 2.0)[0].cpu(), (local,))

    def test_hooks_of_tensors_and_modules(self, device: str) -> None:
        seen: list[object] = []
        layer = nn.Linear(2, 2).to(device)
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        layer.register_forward_hook(lambda module, inputs, out: out + 1)
        layer.register_full_backward_hook(lambda module, into, out: seen.append(str(out[0].device)))
        x = torch.ones(1, 2, device=device, requires_grad=True)
        x.register_hook(lambda g: g * 10)
        layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
        y = layer(x)
        y.retain_grad()
        y.sum().backward()
        assert sorted(map(str, seen)) == sorted([str(y.device), "torch.Size([2, 2])"])
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, 20 * layer.weight.detach().sum(0, keepdim=True))

    def test_saved_tensors_that_wait_on_the_host(self, device: str) -> None:
        x = torch.tensor([1.0, 3.0], device=device, requires_grad=True)
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            y = (x**2).sum()
        y.backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2, 6]

    def test_anomalies_are_found(self, device: str) -> None:
        x = torch.tensor([0.0], device=device, requires_grad=True)
        with (
            pytest.warns(UserWarning, match="Anomaly Detection"),
            torch.autograd.detect_anomaly(),
            pytest.warns(UserWarning, match="Error detected in SqrtBackward0"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            (x.sqrt() * 0).sum().backward()

    def test_a_second_backward_says_what_pytorch_says(self, device: str) -> None:
        y = (torch.ones(2, device=device, requires_grad=True) ** 2).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()
        x = torch.ones(2, device=device, requires_grad=True)
        with pytest.raises(
            RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"
        ):
            x.add_(1)
        z = x * 2
        loss = (z**2).sum()
        z.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_scripted_functions(device: str) -> None:
    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) + torch.ones(x.shape, device=x.device) + x.sum()

    assert scripted(torch.ones(2, device=device)).tolist() == [3, 3]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same(device: str, backend: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    x = torch.randn(3, 4, device=device)
    compiled = torch.compile(net, backend=backend)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net[0].weight.grad is not None


def test_gradients_flow_between_slices_and_the_host(attached: object) -> None:
    x = torch.ones(3, requires_grad=True)
    a = (x.to("cuda:0") * 2).to("cuda:1")
    (a.cpu() * a.to("cuda:0").cpu()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8, 8, 8]


def test_modules_are_copied_tied_and_pruned(device: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model.to(device)
    twin = copy.deepcopy(model)
    assert twin["head"].weight is twin["embed"].weight is not model["head"].weight
    assert len(list(model.parameters())) == 1
    half = copy.deepcopy(model).half()
    assert half["head"].weight is half["embed"].weight
    assert half["head"].weight.dtype is torch.float16
    nn.utils.parametrizations.weight_norm(layer := nn.Linear(2, 2).to(device))
    layer(torch.ones(1, 2, device=device)).sum().backward()
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 2, model.parameters())
    torch.testing.assert_close(model["head"].weight.flatten().detach(), flat.detach() * 2)
