"""How to call each public name of PyTorch's: arguments by rule, and a table where no rule fits.

A name of a later release is found by itself. If no rule gives it arguments, the walk reports that, and the name
needs an entry here.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Call = Callable[[Any], Any]

# -- torch.Tensor and nn.Parameter


def floats(device: str) -> torch.Tensor:
    """A well-conditioned 3 × 3 matrix of numbers between 0 and 1."""
    return torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.8, 0.4], [0.3, 0.1, 0.7]], device=device)


#: Tensors that methods are tried on.
TENSORS: dict[str, Callable[[str], torch.Tensor]] = {
    "float32[3, 3]": floats,
    "int64[3, 3]": lambda device: torch.arange(1, 10, device=device).reshape(3, 3),
    "bool[2, 2]": lambda device: torch.tensor([[True, False], [True, True]], device=device),
    "float32[]": lambda device: torch.tensor(0.5, device=device),
    "float32[4]": lambda device: torch.tensor([0.1, 0.3, 0.2, 0.4], device=device),
    "complex64[3, 3]": lambda device: torch.complex(floats(device), floats(device).t().contiguous()),
    "float32[1, 2, 4, 4]": lambda device: torch.arange(32.0, device=device).reshape(1, 2, 4, 4),
}
#: Tensors of other layouts, for the methods that only they have.
OTHER_LAYOUTS: dict[str, Callable[[str], torch.Tensor]] = {
    "sparse_coo[3, 3]": lambda device: floats(device).tril().to_sparse(),
    "sparse_csr[3, 3]": lambda device: floats(device).tril().to_sparse_csr(),
    "sparse_csc[3, 3]": lambda device: floats(device).tril().to_sparse_csc(),
    "quint8[3, 3]": lambda device: torch.quantize_per_tensor(floats(device), 0.1, 0, torch.quint8),
    "quint8[3, 3] by channel": lambda device: torch.quantize_per_channel(
        floats(device),
        torch.full((3,), 0.1, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
        0,
        torch.quint8,
    ),
}

_INTEGERS = {"dim": 0, "dim0": 0, "dim1": 1, "axis": 0, "axis0": 0, "axis1": 1}


def _argument(argument: Any, tensor: Callable[[], torch.Tensor]) -> Any:
    kind = str(argument.type)
    t = tensor()
    if kind == "Tensor":
        return t
    if kind == "List[Tensor]":
        return [t]
    if kind in ("int", "SymInt"):
        return _INTEGERS.get(argument.name, 1)
    if kind in ("List[int]", "List[SymInt]"):
        return list(t.shape) if argument.name in ("size", "shape") else list(range(t.dim()))
    return {"float": 0.5, "number": 1, "bool": True, "str": "sum"}.get(kind)


def argument_lists(name: str) -> list[Callable[[Callable[[], torch.Tensor]], list[Any]]]:
    """What a method may be called with, by the schemas of the operator of its name; at first nothing.

    Each is a function of what makes a tensor like ``self``.
    """
    found: list[Any] = [lambda tensor: []]
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ():
        arguments = getattr(packet, overload)._schema.arguments
        if not arguments or str(arguments[0].type) != "Tensor":
            continue
        needed = [
            a
            for a in arguments[1:]
            if not (a.has_default_value() or a.kwarg_only or getattr(a, "is_out", False))
        ]
        if needed:
            found.append(lambda tensor, needed=needed: [_argument(a, tensor) for a in needed])
    return found


def _index(x: torch.Tensor, *values: int) -> torch.Tensor:
    return torch.tensor(values or (0, 2), device=x.device)


def _square(x: torch.Tensor) -> torch.Tensor:
    return _index(x, 0, 1, 2, 2, 0, 1, 1, 1, 0).reshape(3, 3)


def _positive(x: torch.Tensor) -> torch.Tensor:
    return x @ x.t() + torch.eye(3, device=x.device)


def _batch(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x * 2))


def _with_grad(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def _backward(x: torch.Tensor) -> Any:
    leaf = _with_grad(x)
    (leaf * leaf).sum().backward()
    return leaf.grad


def _retained(x: torch.Tensor) -> Any:
    between = _with_grad(x) * 2
    between.retain_grad()
    (between * between).sum().backward()
    return between.retains_grad, between.grad


def _hooked(x: torch.Tensor) -> Any:
    leaf = _with_grad(x)
    leaf.register_hook(lambda grad: grad * 3)
    leaf.sum().backward()
    return leaf.grad


def _post_hooked(x: torch.Tensor) -> Any:
    leaf, seen = _with_grad(x), []
    leaf.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    leaf.sum().backward()
    return seen


class Subclass(torch.Tensor):
    """A user's subclass of Tensor."""


TENSOR_CALLS: dict[str, Call] = {
    "addbmm": lambda x: x.addbmm(_batch(x), _batch(x)),
    "addbmm_": lambda x: x.addbmm_(_batch(x), _batch(x)),
    "addmv": lambda x: x[0].addmv(x, x[1]),
    "addmv_": lambda x: x[0].clone().addmv_(x, x[1]),
    "addr": lambda x: x.addr(x[0], x[1]),
    "addr_": lambda x: x.addr_(x[0].clone(), x[1].clone()),
    "apply_": lambda x: x.apply_(lambda v: v + 1),
    "as_subclass": lambda x: x.as_subclass(Subclass),
    "backward": _backward,
    "baddbmm": lambda x: _batch(x).baddbmm(_batch(x), _batch(x)),
    "baddbmm_": lambda x: _batch(x).baddbmm_(_batch(x), _batch(x)),
    "bincount": lambda x: _index(x, 0, 2, 2).bincount(),
    "bmm": lambda x: _batch(x).bmm(_batch(x)),
    "cholesky": lambda x: _positive(x).cholesky(),
    "cholesky_inverse": lambda x: torch.linalg.cholesky(_positive(x)).cholesky_inverse(),
    "cholesky_solve": lambda x: x.cholesky_solve(torch.linalg.cholesky(_positive(x))),
    "clamp": lambda x: x.clamp(0.2, 0.5),
    "clamp_": lambda x: x.clamp_(0.2, 0.5),
    "clip": lambda x: x.clip(0.2, 0.5),
    "clip_": lambda x: x.clip_(0.2, 0.5),
    "coalesce": lambda x: torch.sparse_coo_tensor(_square(x)[:2], x[0], (3, 3)).coalesce(),
    "cuda": lambda x: x.cuda() if x.device.type != "cpu" else x,
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[0]),
    "float_power_": lambda x: x.double().float_power_(2),
    "gather": lambda x: x.gather(0, _square(x)),
    "index": lambda x: x[_index(x)],
    "index_add": lambda x: x.index_add(0, _index(x), x[:2]),
    "index_add_": lambda x: x.index_add_(0, _index(x), x[:2].clone()),
    "index_copy": lambda x: x.index_copy(0, _index(x), x[:2]),
    "index_copy_": lambda x: x.index_copy_(0, _index(x), x[:2].clone()),
    "index_fill": lambda x: x.index_fill(0, _index(x), 2.0),
    "index_fill_": lambda x: x.index_fill_(0, _index(x), 2.0),
    "index_put": lambda x: x.index_put((_index(x),), x[0]),
    "index_put_": lambda x: x.index_put_((_index(x),), x[0].clone()),
    "index_reduce": lambda x: x.index_reduce(0, _index(x), x[:2], "prod"),
    "index_reduce_": lambda x: x.index_reduce_(0, _index(x), x[:2].clone(), "prod"),
    "index_select": lambda x: x.index_select(0, _index(x)),
    "istft": lambda x: torch.stft(
        torch.arange(64.0, device=x.device), 16, window=torch.ones(16, device=x.device), return_complex=True
    ).istft(16, window=torch.ones(16, device=x.device)),
    "lu_solve": lambda x: x.lu_solve(*torch.linalg.lu_factor(_positive(x))),
    "map_": lambda x: x.map_(x.clone(), lambda a, b: a + b),
    "map2_": lambda x: x.map2_(x.clone(), x.clone(), lambda a, b, c: a + b + c),
    "module_load": lambda x: x.module_load(x.clone() + 1),
    "mv": lambda x: x.mv(x[0]),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "nonzero_static": lambda x: (x > 0.5).nonzero_static(size=4),
    "orgqr": lambda x: torch.geqrf(x)[0].orgqr(torch.geqrf(x)[1]),
    "ormqr": lambda x: torch.geqrf(x)[0].ormqr(torch.geqrf(x)[1], x),
    "pin_memory": lambda x: x.cpu().pin_memory() if x.device.type != "cpu" else x,
    "polygamma": lambda x: x.polygamma(2),
    "put": lambda x: x.put(_index(x), x[0, :2]),
    "put_": lambda x: x.put_(_index(x), x[0, :2].clone()),
    "record_stream": lambda x: (
        x.record_stream(torch.cuda.current_stream()) if x.device.type != "cpu" else None
    ),
    "register_hook": _hooked,
    "register_post_accumulate_grad_hook": _post_hooked,
    "retain_grad": _retained,
    "retains_grad": _retained,
    "scatter": lambda x: x.scatter(0, _square(x), 1.0),
    "scatter_": lambda x: x.scatter_(0, _square(x), 1.0),
    "scatter_add": lambda x: x.scatter_add(0, _square(x), x),
    "scatter_add_": lambda x: x.scatter_add_(0, _square(x), x.clone()),
    "scatter_reduce": lambda x: x.scatter_reduce(0, _square(x), x, "amax"),
    "scatter_reduce_": lambda x: x.scatter_reduce_(0, _square(x), x.clone(), "amax"),
    "select_scatter": lambda x: x.select_scatter(x[0], 0, 1),
    "set_": lambda x: torch.empty(0, device=x.device).set_(x),
    "smm": lambda x: x.to_sparse().smm(x),
    "sparse_mask": lambda x: x.sparse_mask(x.tril().to_sparse()),
    "sparse_resize_": lambda x: x.to_sparse().sparse_resize_((4, 4), 2, 0),
    "sparse_resize_and_clear_": lambda x: x.to_sparse().sparse_resize_and_clear_((4, 4), 2, 0),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 2]),
    "sspaddmm": lambda x: x.to_sparse().sspaddmm(x.to_sparse(), x),
    "stft": lambda x: torch.arange(64.0, device=x.device).stft(
        16, window=torch.ones(16, device=x.device), return_complex=True
    ),
    "take": lambda x: x.take(_index(x)),
    "take_along_dim": lambda x: x.take_along_dim(_square(x), 0),
    "to_padded_tensor": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]).to_padded_tensor(0.0),
    "to_sparse_bsc": lambda x: x.to_sparse_bsc((1, 1)),
    "to_sparse_bsr": lambda x: x.to_sparse_bsr((1, 1)),
    "triangular_solve": lambda x: x.triangular_solve(x.triu()),
    "unflatten": lambda x: x.flatten().unflatten(0, (3, 3)),
    "unsafe_split_with_sizes": lambda x: x.unsafe_split_with_sizes([1, 2]),
    "values": lambda x: x.to_sparse().values(),
    "indices": lambda x: x.to_sparse().indices(),
}

#: Names that raise on every device, or need hardware that is neither a CPU nor CUDA.
ALWAYS_RAISE = frozenset(
    {
        *(["cholesky", "qr"] if torch.__version__ >= "2.14" else []),
        "eig",
        "ipu",
        "lstsq",
        "mtia",
        "hpu",
        "reinforce",
        "resize",
        "resize_as",
        "solve",
        "symeig",
        "xpu",
    }
)

#: Names with random or arbitrary elements: shape, dtype and device are compared.
RANDOM = frozenset(
    {
        *("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial"),
        *("normal_", "random_", "uniform_", "new", "new_empty", "new_empty_strided", "resize_", "resize_as_"),
    }
)

#: Names whose value belongs to the process or the device: only their kind is compared.
OWN = frozenset(
    {
        *("data_ptr", "const_data_ptr", "get_device", "grad_fn", "volatile", "cuda", "type", "is_shared"),
        *("is_cuda", "is_cpu", "is_gpupool"),
    }
)

#: Where CUDA's answer is not a CPU's: what CUDA raises.
AS_CUDA: dict[str, tuple[type[Exception], str]] = {
    "numpy": (TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "apply_": (TypeError, "apply_ is only implemented on CPU tensors"),
    "map_": (TypeError, "map_ is only implemented on CPU tensors"),
    "map2_": (TypeError, "map2_ is only implemented on CPU tensors"),
}

# -- nn.Module


def module(device: str) -> torch.nn.Module:
    """A small module with a parameter, a buffer and a child."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).to(device)


def _trained(m: torch.nn.Module, register: Call, calls: list[Any]) -> Any:
    register(m)
    x = torch.ones(2, 3, device=next(m.parameters()).device).requires_grad_()
    m(x).sum().backward()
    return len(calls), x.grad


def _hook(name: str) -> Call:
    def use(m: torch.nn.Module) -> Any:
        calls: list[Any] = []
        return _trained(m, lambda m: getattr(m, name)(lambda *a, **k: calls.append(1)), calls)

    return use


MODULE_CALLS: dict[str, Call] = {
    "add_module": lambda m: m.add_module("more", torch.nn.Linear(1, 1)),
    "apply": lambda m: m.apply(lambda part: None).state_dict(),
    "call_super_init": lambda m: m.call_super_init,
    "compile": lambda m: m.eval().compile(backend="eager"),
    "cuda": lambda m: (m.cuda() if next(m.parameters()).device.type != "cpu" else m).state_dict(),
    "forward": lambda m: m.forward(torch.ones(2, 3, device=next(m.parameters()).device)),
    "get_buffer": lambda m: m.get_buffer("1.running_mean"),
    "get_parameter": lambda m: m.get_parameter("0.weight"),
    "get_submodule": lambda m: m.get_submodule("0").state_dict(),
    "load_state_dict": lambda m: (m.load_state_dict(module("cpu").state_dict()), m.state_dict()),
    "register_buffer": lambda m: m.register_buffer("more", torch.ones(1, device="cpu")),
    "register_module": lambda m: m.register_module("more", torch.nn.Linear(1, 1)),
    "register_parameter": lambda m: m.register_parameter("more", torch.nn.Parameter(torch.ones(1))),
    "register_load_state_dict_post_hook": lambda m: (
        m.register_load_state_dict_post_hook(lambda module, keys: None),
        m.load_state_dict(m.state_dict()),
    )[1],
    "register_load_state_dict_pre_hook": lambda m: (
        m.register_load_state_dict_pre_hook(lambda *a: None),
        m.load_state_dict(m.state_dict()),
    )[1],
    "register_state_dict_post_hook": lambda m: (
        m.register_state_dict_post_hook(lambda *a: None),
        m.state_dict(),
    )[1],
    "register_state_dict_pre_hook": lambda m: (
        m.register_state_dict_pre_hook(lambda *a: None),
        m.state_dict(),
    )[1],
    "set_submodule": lambda m: m.set_submodule("0", torch.nn.Linear(3, 3)),
    "to": lambda m: m.to(torch.float64).state_dict(),
    "to_empty": lambda m: m.to_empty(device=next(m.parameters()).device).state_dict().keys(),
    "type": lambda m: m.type(torch.float64).state_dict(),
    **{
        name: _hook(name)
        for name in (
            *("register_backward_hook", "register_forward_hook", "register_forward_pre_hook"),
            *("register_full_backward_hook", "register_full_backward_pre_hook"),
        )
    },
}
#: Names that raise on every device, or need hardware that is neither a CPU nor CUDA.
MODULE_ALWAYS_RAISE = frozenset({"ipu", "mtia", "xpu", "get_extra_state", "set_extra_state"})

# -- torch.UntypedStorage


def storage(device: str) -> torch.UntypedStorage:
    return torch.arange(4.0, device=device).untyped_storage()


def _content(s: torch.UntypedStorage) -> list[int]:
    return s.tolist()


def _file(s: torch.UntypedStorage) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "storage")
        path.write_bytes(bytes(range(16)))
        return torch.UntypedStorage.from_file(str(path), False, 16).tolist()


STORAGE_CALLS: dict[str, Call] = {
    "byteswap": lambda s: (s.byteswap(torch.float32), _content(s))[1],
    "clone": lambda s: _content(s.clone()),
    "copy_": lambda s: (s.copy_(torch.arange(1.0, 5.0).untyped_storage()), _content(s))[1],
    "cpu": lambda s: _content(s.cpu()),
    "cuda": lambda s: _content(s.cuda() if s.device.type != "cpu" else s),
    "fill_": lambda s: (s.fill_(7), _content(s))[1],
    "from_buffer": lambda s: torch.UntypedStorage.from_buffer(bytes(8), dtype=torch.uint8).tolist(),
    "from_file": _file,
    "get_device": lambda s: s.device.type == "cpu" or s.get_device() == 0,
    "new": lambda s: s.new().nbytes(),
    "pin_memory": lambda s: _content(s.cpu().pin_memory()) if s.device.type != "cpu" else _content(s),
    "resize_": lambda s: (s.resize_(8), s.nbytes(), _content(s))[1:],
    "share_memory_": lambda s: _content(s.share_memory_()),
    "to": lambda s: _content(s.to(device=s.device)),
    "untyped": lambda s: _content(s.untyped()),
}
#: Names that raise on every device, or need hardware that is neither a CPU nor CUDA.
STORAGE_ALWAYS_RAISE = frozenset({"hpu", "mps"})


def typed_storage(device: str) -> torch.TypedStorage:
    """Four numbers as a storage of float32."""
    return torch.arange(4.0, device=device).storage()


TYPED_STORAGE_CALLS: dict[str, Call] = {
    "copy_": lambda s: (s.copy_(torch.arange(1.0, 5.0).storage()), s.tolist())[1],
    "cuda": lambda s: (s.cuda() if s.device.type != "cpu" else s).tolist(),
    "dtype": lambda s: s.dtype,
    "fill_": lambda s: (s.fill_(7), s.tolist())[1],
    "from_buffer": lambda s: torch.FloatStorage.from_buffer(bytes(8), byte_order="native").tolist(),
    "from_file": lambda s: _file(s.untyped()),
    "get_device": lambda s: s.device.type == "cpu" or s.get_device() == 0,
    "pin_memory": lambda s: (s.cpu().pin_memory() if s.device.type != "cpu" else s).tolist(),
    "resize_": lambda s: (s.resize_(2), s.nbytes(), s.tolist())[1:],
    "to": lambda s: s.to(device=s.device).tolist(),
}

# -- torch.cuda, torch.accelerator, torch.backends: functions without a CPU's value


def _scale(owner: Any) -> Any:
    scaler = owner.GradScaler()
    weight = torch.ones(2, device="cuda", requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.5)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, 0.5]


def _autocast(owner: Any) -> Any:
    with owner.autocast():
        assert (floats("cuda") @ floats("cuda")).dtype is torch.float16


def _custom(owner: Any) -> Any:
    class Double(torch.autograd.Function):
        @staticmethod
        @owner.custom_fwd
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @owner.custom_bwd
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    x = torch.ones(2, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2]


def _within(context: Any) -> None:
    with context:
        assert (torch.ones(2, device="cuda") + 1).tolist() == [2, 2]


_folder = tempfile.TemporaryDirectory()


def _file_name() -> str:
    return str(Path(_folder.name, "names.csv"))


#: By the last part of a name: a function of the owner (a module) that calls it.
FUNCTION_CALLS: dict[str, Call] = {
    "CUDAGraph": lambda owner: owner.CUDAGraph(),
    "CUDAPluggableAllocator": lambda owner: owner.CUDAPluggableAllocator("allocator.so", "take", "give"),
    "DeferredCudaCallError": lambda owner: str(owner.DeferredCudaCallError()),
    "ExternalStream": lambda owner: owner.ExternalStream(1),
    "GdsFile": lambda owner: owner.GdsFile(_file_name(), 0),
    "GradScaler": _scale,
    "GreenContext": lambda owner: owner.GreenContext(),
    "SDPAParams": lambda owner: owner.SDPAParams(*[floats("cuda")[None, None]] * 3, None, 0.0, False, False),
    "SMPartition": lambda owner: owner.SMPartition.from_device(0),
    "StreamContext": lambda owner: _within(owner.StreamContext(torch.cuda.Stream())),
    "allow_fp16_bf16_reduction_math_sdp": lambda owner: owner.allow_fp16_bf16_reduction_math_sdp(False),
    "autocast": _autocast,
    "export_dot": lambda owner: owner.export_dot("graph.dot"),
    "export_graph_data": lambda owner: owner.export_graph_data("graph.json"),
    "set_cublaslt_requested_algo_count": lambda owner: owner.set_cublaslt_requested_algo_count(1),
    "caching_allocator_alloc": lambda owner: owner.caching_allocator_alloc(1),
    "caching_allocator_delete": lambda owner: owner.caching_allocator_delete(1),
    "can_device_access_peer": lambda owner: owner.can_device_access_peer(0, 1),
    "change_current_allocator": lambda owner: owner.change_current_allocator(None),
    "check_error": lambda owner: owner.check_error(0),
    "custom_bwd": _custom,
    "custom_fwd": _custom,
    "device": lambda owner: _within(owner.device(0)),
    "device_index": lambda owner: _within(owner.device_index(0)),
    "device_of": lambda owner: _within(owner.device_of(floats("cuda"))),
    "enable_cudnn_sdp": lambda owner: owner.enable_cudnn_sdp(True),
    "enable_flash_sdp": lambda owner: owner.enable_flash_sdp(True),
    "enable_math_sdp": lambda owner: owner.enable_math_sdp(True),
    "enable_mem_efficient_sdp": lambda owner: owner.enable_mem_efficient_sdp(True),
    "gds_deregister_buffer": lambda owner: owner.gds_deregister_buffer(storage("cuda")),
    "gds_register_buffer": lambda owner: owner.gds_register_buffer(storage("cuda")),
    "get_stream_from_external": lambda owner: owner.get_stream_from_external(1),
    "graph": lambda owner: _within(owner.graph(None)),
    "make_graphed_callables": lambda owner: owner.make_graphed_callables(abs, (floats("cuda"),)),
    "manual_seed": lambda owner: owner.manual_seed(1),
    "manual_seed_all": lambda owner: owner.manual_seed_all(1),
    "mark": lambda owner: owner.mark("here"),
    "mgpu_tune_gemm_in_file": lambda owner: owner.mgpu_tune_gemm_in_file(_file_name(), 1),
    "preferred_rocm_fa_library": lambda owner: owner.preferred_rocm_fa_library(),
    "profile": lambda owner: _within(owner.profile()),
    "range": lambda owner: _within(owner.range("here")),
    "range_end": lambda owner: owner.range_end(owner.range_start("here")),
    "range_pop": lambda owner: (owner.range_push("here"), owner.range_pop()),
    "range_push": lambda owner: (owner.range_push("here"), owner.range_pop()),
    "range_start": lambda owner: owner.range_end(owner.range_start("here")),
    "read_file": lambda owner: owner.read_file(_file_name()),
    "enable": lambda owner: owner.enable(False),
    "tuning_enable": lambda owner: owner.tuning_enable(False),
    "record_untuned_enable": lambda owner: owner.record_untuned_enable(False),
    "set_filename": lambda owner: owner.set_filename(_file_name()),
    "set_max_tuning_duration": lambda owner: owner.set_max_tuning_duration(30),
    "set_max_tuning_iterations": lambda owner: owner.set_max_tuning_iterations(100),
    "set_numerical_check_tolerances": lambda owner: owner.set_numerical_check_tolerances(False),
    "set_rotating_buffer_size": lambda owner: owner.set_rotating_buffer_size(0),
    "tune_gemm_in_file": lambda owner: owner.tune_gemm_in_file(_file_name()),
    "set_device": lambda owner: owner.set_device(0),
    "set_device_idx": lambda owner: owner.set_device_idx(0),
    "set_device_index": lambda owner: owner.set_device_index(0),
    "set_per_process_memory_fraction": lambda owner: owner.set_per_process_memory_fraction(1.0),
    "set_rng_state": lambda owner: owner.set_rng_state(owner.get_rng_state()),
    "set_rng_state_all": lambda owner: owner.set_rng_state_all(owner.get_rng_state_all()),
    "set_stream": lambda owner: owner.set_stream(owner.current_stream()),
    "set_sync_debug_mode": lambda owner: owner.set_sync_debug_mode("default"),
    "stream": lambda owner: _within(owner.stream(torch.cuda.Stream())),
    "use_mem_pool": lambda owner: _within(owner.use_mem_pool(None)),
}

_sdp = ("can_use_cudnn_attention", "can_use_efficient_attention", "can_use_flash_attention")
FUNCTION_CALLS |= {
    name: lambda owner, name=name: getattr(owner, name)(
        owner.SDPAParams(*[floats("cuda")[None, None]] * 3, None, 0.0, False, False)
    )
    for name in _sdp
}

_pair = lambda: [torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")]  # noqa: E731

#: The same, by the whole name where the last part is not unique.
QUALIFIED_CALLS: dict[str, Call] = {
    "torch.cuda.comm.broadcast": lambda owner: owner.broadcast(torch.ones(2, device="cuda"), (0, 1)),
    "torch.cuda.comm.broadcast_coalesced": lambda owner: owner.broadcast_coalesced(
        [torch.ones(2, device="cuda")], (0, 1)
    ),
    "torch.cuda.comm.gather": lambda owner: owner.gather(_pair()),
    "torch.cuda.comm.reduce_add": lambda owner: owner.reduce_add(_pair()),
    "torch.cuda.comm.reduce_add_coalesced": lambda owner: owner.reduce_add_coalesced([[t] for t in _pair()]),
    "torch.cuda.comm.scatter": lambda owner: owner.scatter(torch.ones(4, device="cuda"), (0, 1)),
    "torch.cuda.nccl.all_gather": lambda owner: owner.all_gather(
        _pair(), [torch.zeros(4, device="cuda:0"), torch.zeros(4, device="cuda:1")]
    ),
    "torch.cuda.nccl.all_reduce": lambda owner: owner.all_reduce(_pair()),
    "torch.cuda.nccl.broadcast": lambda owner: owner.broadcast(_pair()),
    "torch.cuda.nccl.reduce": lambda owner: owner.reduce(_pair()),
    "torch.cuda.nccl.reduce_scatter": lambda owner: owner.reduce_scatter(
        _pair(), [torch.zeros(1, device="cuda:0"), torch.zeros(1, device="cuda:1")]
    ),
    "torch.cuda.CudaError": lambda owner: owner.CudaError,  # only CUDA raises it
    "torch.backends.cuda.cuFFTPlanCache": lambda owner: owner.cuFFTPlanCache(0).max_size,
    "torch.backends.cuda.cuFFTPlanCacheAttrContextProp": lambda owner: owner.cufft_plan_cache[0].size,
    "torch.backends.cuda.cuFFTPlanCacheManager": lambda owner: owner.cufft_plan_cache.clear(),
    "torch.backends.cuda.cufft_plan_cache": lambda owner: owner.cufft_plan_cache.size,
    "torch.backends.cudnn.CudnnModule": lambda owner: owner.CudnnModule,
    "torch.backends.cudnn.is_acceptable": lambda owner: owner.is_acceptable(floats("cuda")),
    "torch.cuda.jiterator._create_jit_fn": lambda owner: owner._create_jit_fn(
        "template <typename T> T twice(T x) { return x + x; }"
    )(floats("cuda")),
    "torch.cuda.jiterator._create_multi_output_jit_fn": lambda owner: owner._create_multi_output_jit_fn(
        "template <typename T> void twice(T x, T& y) { y = x + x; }", num_outputs=1
    )(floats("cuda")),
}

#: Documented names with an underscore, and those of modules that do not list theirs.
UNLISTED = {
    "torch.cuda.streams": ("Event", "ExternalStream", "Stream"),
    "torch.cuda.memory": ("_record_memory_history", "_snapshot", "_dump_snapshot"),
    "torch.cuda.jiterator": ("_create_jit_fn", "_create_multi_output_jit_fn"),
}
#: A hook takes a function; each release has more of them.
FUNCTION_CALLS |= {
    name: lambda owner, name=name: getattr(owner, name)(print)
    for name in vars(torch.cuda.graphs)
    if name.startswith("register_graph_")
}

FUNCTION_CALLS |= {
    "_dump_snapshot": lambda owner: owner._dump_snapshot(_file_name()),
    "_record_memory_history": lambda owner: owner._record_memory_history(enabled=None),
}

#: Modules whose public names are functions, classes and values of a device.
MODULES = (
    *("torch.cuda", "torch.cuda.memory", "torch.cuda.amp", "torch.cuda.random", "torch.cuda.streams"),
    *("torch.cuda.graphs", "torch.cuda.nvtx", "torch.cuda.profiler", "torch.cuda.comm", "torch.cuda.nccl"),
    *("torch.cuda.tunable", "torch.cuda.gds", "torch.cuda.green_contexts", "torch.cuda.jiterator"),
    *("torch.backends.cuda", "torch.backends.cudnn", "torch.accelerator", "torch.accelerator.memory"),
)


def public_names(name: str, module: Any) -> list[str]:
    """The names that a module documents: ``__all__``, or what it defines itself."""
    given = getattr(module, "__all__", None)
    if given is None:
        space = vars(getattr(module, "m", module))
        given = [
            n
            for n, value in space.items()
            if not n.startswith("_")
            and getattr(value, "__module__", name) == name
            and not inspect.ismodule(value)
        ]
    return sorted({*given, *UNLISTED.get(name, ())})


def members(kind: type) -> Iterator[str]:
    """The public members of a class."""
    return (name for name in dir(kind) if not name.startswith("_"))
