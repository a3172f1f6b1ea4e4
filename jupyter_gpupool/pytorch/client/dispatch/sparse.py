"""Sparse tensors on a slice: PyTorch's own sparse tensors, whose indices and values are remote tensors.

A worker has dense tensors only, so nothing that it receives is trusted as an index: products are sums by row
(``index_add``), which check their indices. Operators without an implementation here are computed on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor, geometry
from jupyter_gpupool.pytorch.torch_internals.client import (
    DispatchKey,
    DispatchKeySet,
    TensorBase,
    all_operator_names,
    disabled_torch_function,
    has_kernel,
    pytree,
    rebuild_sparse,
)

from .dispatcher import FOREIGN, Dispatcher, special

aten = torch.ops.aten

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_LAYOUTS = _COMPRESSED | {torch.sparse_coo}


class SparseRemoteTensor(torch.Tensor):
    """The Python type of a sparse tensor on a slice. PyTorch's core has the layout, this has the names."""

    __torch_function__ = disabled_torch_function

    def _part(self) -> Any:
        return _values(self)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._part().device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self._part().is_cuda

    @property
    def is_gpupool(self) -> bool:
        return True

    def get_device(self) -> int:
        return self._part().get_device()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = RemoteTensor._at_home(self, args, kwargs)  # type: ignore[arg-type]
        return TensorBase.to(self, *args, **kwargs)

    def cuda(self, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.to("cuda" if device is None else device, **kwargs)

    def new(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        if len(args) > 1 and isinstance(args[0], torch.Tensor):
            return torch.sparse_coo_tensor(*args, **kwargs)
        return torch.sparse_coo_tensor(size=args or (0,), dtype=self.dtype, device=self.device)  # type: ignore[call-arg]

    def detach(self) -> torch.Tensor:
        return _named(TensorBase.detach(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.layout is torch.sparse_coo:
            parts: Any = (self._indices(), self._values(), self.size(), self.is_coalesced())
        else:
            parts = (*_compressed_indices(self), self.values(), self.size())
        return rebuild_sparse, (self.layout, parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        own, place = repr(self.cpu()), f"device='{self.device}', size="
        return place.join(own.rsplit("size=", 1))


def is_sparse(value: Any) -> bool:
    """Whether ``value`` is a tensor of a sparse layout."""
    return isinstance(value, torch.Tensor) and type(value) is not RemoteTensor and value.layout in _LAYOUTS


def _is_remote(value: Any) -> bool:
    return is_sparse(value) and isinstance(_values(value), RemoteTensor)


def _values(s: torch.Tensor) -> torch.Tensor:
    """The values of ``s``, apart from autograd."""
    if s.layout is torch.sparse_coo:
        return aten._values.default.redispatch(_COO, s)
    return aten.values.default.redispatch(_CSR, s)


def _named(t: Any, cuda: bool = False) -> Any:
    """A tensor that PyTorch's core has made, with the type that names its device; ``cuda`` by that name."""
    if type(t) in (torch.Tensor, SparseRemoteTensor) and _is_remote(t):
        t.__class__ = SparseRemoteTensor
        if cuda:
            _name_cuda(t)
    return t


def _name_cuda(s: torch.Tensor) -> None:
    with torch.no_grad():
        indices = (s._indices(),) if s.layout is torch.sparse_coo else _compressed_indices(s)
    for part in (*indices, _values(s)):
        if isinstance(part, RemoteTensor) and not part._geometry.cuda:
            own = part._geometry
            part._geometry = geometry(own.size, own.stride, own.offset, own.dtype, own.index, True)


# -- the core's own kernels that only handle the parts: they are the same for every device

_COO = DispatchKeySet(DispatchKey.SparseCPU)
_CSR = DispatchKeySet(DispatchKey.SparseCsrCPU)

_PARTS = (
    *("_indices", "_values", "indices", "values", "_nnz", "is_coalesced", "_coalesced_", "sparse_dim"),
    *("dense_dim", "_dimI", "_dimV", "empty.memory_format", "sparse_resize_", "sparse_resize_and_clear_"),
    *("resize_as_sparse_", "copy_", "copy_sparse_to_sparse_", "clone", "zero_", "empty_like", "permute"),
    *("unsqueeze", "cat", "narrow_copy", "mv", "sum", "sparse_mask", "_sparse_coo_tensor_with_dims"),
    *("_sparse_broadcast_to", "neg", "pow.Tensor_Scalar", "native_norm"),
    *("norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "_to_sparse", "_to_sparse.sparse_dim"),
    *("abs", "sgn", "sign", "asinh", "atanh", "asin", "atan", "ceil", "erf", "expm1", "floor", "frac"),
    *("log1p", "rad2deg", "deg2rad", "round", "relu", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
    *("isnan", "isinf", "nan_to_num", "erfinv"),
)
_COMPRESSED_PARTS = (
    *("crow_indices", "col_indices", "ccol_indices", "row_indices", "values", "_nnz", "sparse_dim"),
    *("dense_dim", "empty.memory_format", "empty_like", "copy_", "clone", "zero_", "abs", "neg", "sqrt"),
    *("sin", "tanh", "relu", "sign", "floor", "ceil", "round", "mul.Scalar"),
)


def _own_kernel(func: Any, keys: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        cuda = device_names.says_cuda(kwargs.get("device")) or any(
            _values(t).is_cuda for t in args if is_sparse(t)
        )
        return _named(func.redispatch(keys, *args, **_at_home(kwargs)), cuda)

    return call


def _at_home(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the device named ``gpupool``, the only name that PyTorch's core knows."""
    index = device_names.slice_index(kwargs["device"]) if kwargs.get("device") is not None else None
    return kwargs if index is None else {**kwargs, "device": torch.device(device_names.BACKEND, index)}


@special(aten._sparse_coo_tensor_with_dims_and_tensors.default)
def _make_coo(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    _prepare()
    kwargs = {**kwargs, "device": args[4]._geometry.real_device}
    return _named(aten._sparse_coo_tensor_with_dims_and_tensors.default.redispatch(_COO, *args, **kwargs))


def _make_compressed(func: Any, key: Any) -> None:
    """Register a handler of an operator that makes a CSR or CSC tensor of its parts."""

    @special(func)
    def make(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        _prepare()
        return _named(func._op_dk(key, *args, **{**kwargs, "device": args[2]._geometry.real_device}))


for _name in ("compressed", "csr", "csc", "bsr", "bsc"):
    _func = getattr(aten, f"_sparse_{_name}_tensor_unsafe").default
    _make_compressed(_func, DispatchKey.CompositeImplicitAutograd)
for _name in aten.sparse_compressed_tensor.overloads():
    _func = getattr(aten.sparse_compressed_tensor, _name)
    if _name != "out":
        _make_compressed(_func, DispatchKey.CompositeExplicitAutograd)


@special(aten.sparse_dim.default)
def _sparse_dim(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return 0  # of a dense tensor


@special(aten._embedding_bag_backward.default)
def _embedding_bag_backward(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    grad, indices, offsets, bag_of, sizes, greatest, count, scale, mode, is_sparse, weights, *padding = args
    if not is_sparse:
        return d.run(aten._embedding_bag_backward.default, args, kwargs)
    of = aten._embedding_bag_sparse_backward.default
    return of.decompose(grad, indices, offsets, bag_of, sizes, count, scale, mode, weights, *padding)


def _coo(indices: Any, values: Any, size: Any, coalesced: bool | None = None) -> torch.Tensor:
    return _named(
        torch.sparse_coo_tensor(indices, values, size, check_invariants=False, is_coalesced=coalesced)
    )


def _compressed_indices(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    by_row = s.layout in (torch.sparse_csr, torch.sparse_bsr)
    return (s.crow_indices(), s.col_indices()) if by_row else (s.ccol_indices(), s.row_indices())


def _as_coo(s: torch.Tensor) -> torch.Tensor:
    """A COO tensor with the elements of ``s``, which is COO, CSR or CSC, without batches."""
    if s.layout is torch.sparse_coo:
        return s
    pointers, others = _compressed_indices(s)
    counts = pointers[1:] - pointers[:-1]
    of = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    pair = [of, others.long()] if s.layout is torch.sparse_csr else [others.long(), of]
    return _coo(torch.stack(pair), s.values(), s.shape, s.layout is torch.sparse_csr)


def _is_simple(s: torch.Tensor) -> bool:
    """Whether ``s`` is a COO, CSR or CSC tensor without batches and dense dimensions."""
    if s.layout is torch.sparse_coo:
        return True
    return s.layout in (torch.sparse_csr, torch.sparse_csc) and s.dim() == 2 and s.values().dim() == 1


# -- kernels of ours

KERNELS: dict[Any, Callable[..., Any]] = {}


def _kernel(*funcs: Any) -> Callable[..., Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS.update(dict.fromkeys(funcs, function))
        return function

    return register


def _flat_index(s: torch.Tensor) -> torch.Tensor:
    """For each element the position in row-major order of the sparse dimensions."""
    sizes = s.shape[: s.sparse_dim()]
    flat = torch.zeros_like(s._indices()[0]) if sizes else s._values().new_zeros(1, dtype=torch.int64)
    for row, size in zip(s._indices(), sizes):
        flat = flat * size + row
    return flat


@_kernel(aten._coalesce.default)
def _coalesce(s: torch.Tensor) -> torch.Tensor:
    if s._nnz() < 2:
        return _coo(s._indices(), s._values(), s.shape, True)
    flat, which = torch.unique(_flat_index(s), return_inverse=True)
    values = s._values()
    summed = torch.zeros((len(flat), *values.shape[1:]), dtype=values.dtype, device=values.device)
    summed = _add_rows(summed, which, values)
    rows = []
    for size in reversed(s.shape[: s.sparse_dim()]):
        rows.append(flat % size)
        flat = flat // size
    return _coo(torch.stack(rows[::-1]), summed, s.shape, True)


def _add_rows(t: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, alpha: Any = 1) -> torch.Tensor:
    if t.dtype is torch.bool:
        return t.index_put_((index,), rows, accumulate=True)
    return t.index_add_(0, index, rows, alpha=alpha)


@_kernel(aten._to_dense.default)
def _to_dense(s: torch.Tensor, dtype: Any = None, masked_grad: Any = None) -> Any:
    if not _is_simple(s):
        return NotImplemented
    s = _as_coo(s)
    values = s._values() if dtype is None else s._values().to(dtype)
    return _add_sparse(torch.zeros(s.shape, dtype=values.dtype, device=values.device), s, values, 1)


def _add_sparse(t: torch.Tensor, s: torch.Tensor, values: torch.Tensor, alpha: Any) -> torch.Tensor:
    """``t += alpha * s`` for a dense contiguous ``t``."""
    count = s.sparse_dim()
    flat = t.view((-1, *t.shape[count:]))
    _add_rows(flat, _flat_index(s), values.to(t.dtype), alpha)
    return t


@_kernel(aten.add.Tensor)
def _add(a: torch.Tensor, b: torch.Tensor, alpha: Any = 1) -> Any:
    return _sum(a, b, alpha, in_place=False)


@_kernel(aten.sub.Tensor)
def _subtract(a: torch.Tensor, b: torch.Tensor, alpha: Any = 1) -> Any:
    return _sum(a, b, -alpha, in_place=False)


@_kernel(aten.add_.Tensor)
def _add_in_place(a: torch.Tensor, b: torch.Tensor, alpha: Any = 1) -> Any:
    return _sum(a, b, alpha, in_place=True)


@_kernel(aten.sub_.Tensor)
def _subtract_in_place(a: torch.Tensor, b: torch.Tensor, alpha: Any = 1) -> Any:
    return _sum(a, b, -alpha, in_place=True)


def _sum(a: Any, b: Any, alpha: Any, in_place: bool) -> Any:
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or b.layout is not torch.sparse_coo:
        return NotImplemented
    dtype = torch.result_type(a, b)
    if a.layout is torch.strided:
        if not in_place or not a.is_contiguous():
            found = _add_sparse(a.to(dtype, copy=True).contiguous(), b, b._values(), alpha)
            return a.copy_(found) if in_place else found
        return _add_sparse(a, b, b._values(), alpha)
    if a.layout is not torch.sparse_coo or a.sparse_dim() != b.sparse_dim():
        return NotImplemented
    values = torch.cat((a._values().to(dtype), b._values().to(dtype) * alpha))
    found = _coo(torch.cat((a._indices(), b._indices()), 1), values, a.shape)
    return a.copy_(found) if in_place else found


@_kernel(aten.mul.Tensor)
def _multiply(a: Any, b: Any) -> Any:
    s, other = (a, b) if is_sparse(a) else (b, a)
    if s.layout is not torch.sparse_coo or is_sparse(other):
        return NotImplemented
    values = s._values()
    if _is_number(other):
        return _coo(s._indices(), values * other, s.shape, s.is_coalesced())
    if other.shape != s.shape:
        return NotImplemented
    return _coo(s._indices(), values * _at(other, s), s.shape, s.is_coalesced())


@_kernel(aten.div.Tensor)
def _divide(a: Any, b: Any) -> Any:
    if not is_sparse(a) or a.layout is not torch.sparse_coo or not _is_number(b):
        return NotImplemented
    return _coo(a._indices(), a._values() / b, a.shape, a.is_coalesced())


@_kernel(aten.mul_.Tensor)
def _multiply_in_place(a: Any, b: Any) -> Any:
    if not is_sparse(a) or a.layout is not torch.sparse_coo or not _is_number(b):
        return NotImplemented
    a._values().mul_(b)
    return a


@_kernel(aten.div_.Tensor)
def _divide_in_place(a: Any, b: Any) -> Any:
    if not is_sparse(a) or a.layout is not torch.sparse_coo or not _is_number(b):
        return NotImplemented
    a._values().div_(b)
    return a


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (not is_sparse(value) and value.dim() == 0)


def _at(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The elements of a dense ``t`` at the indices of ``s``."""
    return t.reshape(-1, *t.shape[s.sparse_dim() :])[_flat_index(s)]


def _product(s: torch.Tensor, dense: torch.Tensor) -> Any:
    """``s @ dense``, or NotImplemented for a layout or shape that needs the CPU."""
    if is_sparse(dense) or not _is_simple(s) or s.dim() != 2 or dense.dim() != 2:
        return NotImplemented
    s = _as_coo(s)
    if s.dense_dim():
        return NotImplemented
    if s.shape[1] != dense.shape[0]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({s.shape[0]}x{s.shape[1]} and "
            f"{dense.shape[0]}x{dense.shape[1]})"
        )
    rows, columns = s._indices()
    found = torch.zeros((s.shape[0], dense.shape[1]), dtype=dense.dtype, device=dense.device)
    return found.index_add_(0, rows, s._values()[:, None] * dense[columns])


@_kernel(aten.mm.default, aten._sparse_mm.default)
def _mm(a: torch.Tensor, b: torch.Tensor) -> Any:
    if is_sparse(a):
        return _product(a, b)
    found = _product(_transposed(b), a.t())
    return found if found is NotImplemented else found.t()


def _transposed(s: torch.Tensor) -> torch.Tensor:
    if not _is_simple(s) or s.dim() != 2:
        return s
    s = _as_coo(s)
    return _coo(s._indices().flip(0), s._values(), s.shape[::-1])


@_kernel(aten.addmm.default, aten._sparse_addmm.default)
def _addmm(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: Any = 1, alpha: Any = 1) -> Any:
    if is_sparse(t):
        return NotImplemented
    found = _mm(a, b)
    if found is NotImplemented:
        return found
    found = found if alpha == 1 else found * alpha
    return found.expand_as(found) if beta == 0 else found + (t if beta == 1 else t * beta)


@_kernel(aten.addmm_.default)
def _addmm_in_place(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: Any = 1, alpha: Any = 1) -> Any:
    found = _addmm(t, a, b, beta, alpha)
    return found if found is NotImplemented else t.copy_(found)


@_kernel(aten.zeros_like.default)
def _zeros_like(s: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if not is_sparse(s) or s.layout is not torch.sparse_coo or any(v is not None for v in kwargs.values()):
        return NotImplemented
    return _coo(s._indices()[:, :0], s._values()[:0].to(dtype or s.dtype), s.shape, True)


@_kernel(aten.sparse_mask.default)
def _mask(t: torch.Tensor, mask: torch.Tensor) -> Any:
    if is_sparse(t) or mask.layout is not torch.sparse_coo or t.shape != mask.shape:
        return NotImplemented
    return _coo(mask._indices(), _at(t, mask), mask.shape, mask.is_coalesced())


@_kernel(aten._to_sparse.default)
def _to_sparse(t: torch.Tensor, layout: Any = None, blocksize: Any = None, dense_dim: Any = None) -> Any:
    if layout not in (None, torch.sparse_coo) or dense_dim:
        return NotImplemented
    if t.layout is torch.strided:
        return _to_sparse_dim(t, t.dim())
    return _as_coo(t).coalesce() if _is_simple(t) else NotImplemented


@_kernel(aten._to_sparse.sparse_dim)
def _to_sparse_dim(t: torch.Tensor, sparse_dim: int) -> Any:
    if t.layout is not torch.strided or sparse_dim < 1:
        return NotImplemented
    used = t if sparse_dim == t.dim() else (t != 0).flatten(sparse_dim).any(-1)
    indices = used.nonzero().t().contiguous()
    return _coo(indices, t[tuple(indices)], t.shape, True)


@_kernel(aten._to_sparse_csr.default)
def _to_csr(t: torch.Tensor, dense_dim: Any = None) -> Any:
    if t.layout not in (torch.strided, torch.sparse_coo) or t.dim() != 2 or dense_dim:
        return NotImplemented
    s = _to_sparse_dim(t, 2) if t.layout is torch.strided else t.coalesce()
    if s.dense_dim():
        return NotImplemented
    rows, columns = s._indices()
    counts = torch.zeros(s.shape[0] + 1, dtype=torch.int64, device=rows.device)
    pointers = counts.index_add_(0, rows + 1, torch.ones_like(rows)).cumsum(0)
    return _named(torch.sparse_csr_tensor(pointers, columns, s._values(), s.shape, check_invariants=False))


# -- everything else: on the CPU


def on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a call on copies on the CPU, and copy the results to the slice."""
    home = next(t for t in _tensors((args, kwargs)) if _is_remote(t) or isinstance(t, RemoteTensor))
    copies: dict[int, torch.Tensor] = {}

    def down(value: Any) -> Any:
        if _is_remote(value) or isinstance(value, RemoteTensor):
            return copies.setdefault(id(value), value.detach().cpu())
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def up(value: Any) -> Any:
        return _named(value.to(home.device)) if isinstance(value, torch.Tensor) else value

    got = func(*pytree.tree_map(down, args), **pytree.tree_map(down, kwargs))
    if kwargs.get("device") is not None and device_names.slice_index(kwargs["device"]) is None:
        return got
    written = _written(func, args, kwargs)
    for t in written:
        t.copy_(up(copies[id(t)]))
    return written[0] if len(written) == 1 else pytree.tree_map(up, got)


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    pytree.tree_map(lambda v: found.append(v) if isinstance(v, torch.Tensor) else None, value)
    return found


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    named = [*zip(func._schema.arguments, args)]
    named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    return [
        value
        for a, value in named
        if a.alias_info is not None and a.alias_info.is_write and isinstance(value, torch.Tensor)
    ]


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator with a sparse remote tensor among its arguments."""
    kernel = KERNELS.get(func)
    if kernel is not None:
        got = kernel(*args, **kwargs)
        if got is not NotImplemented:
            return got
    return on_cpu(func, args, kwargs)


def on_slice(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``torch.sparse_coo_tensor`` and the like, which take ``count`` tensors or lists, for ``device="cuda"``."""

    @functools.wraps(function)
    def call(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or device_names.slice_index(device) is None:
            return function(*args, device=device, **kwargs)

        def up(part: Any) -> torch.Tensor:
            return (part if isinstance(part, torch.Tensor) else torch.tensor(part)).to(device)

        named = {name: up(part) for name, part in kwargs.items() if name.endswith(("indices", "values"))}
        if not named and len(args) < 2:  # a size alone
            return function(*args, device="cpu", **kwargs).to(device)
        return function(*map(up, args[:count]), *args[count:], **{**kwargs, **named})

    return call


def _foreign(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(func, args, kwargs) if any(map(_is_remote, _tensors((args, kwargs)))) else NotImplemented


def _for_dense(func: Any) -> None:
    @special(func)
    def handle(d: Dispatcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        got = KERNELS[func](*args, **kwargs) if func in KERNELS else NotImplemented
        return on_cpu(func, args, kwargs) if got is NotImplemented else got


# Operators on dense tensors that make sparse ones, or check their parts.
for _func in (
    aten._to_sparse.default,
    aten._to_sparse.sparse_dim,
    aten._to_sparse_csr.default,
    aten._to_sparse_csc.default,
    aten._to_sparse_bsr.default,
    aten._to_sparse_bsc.default,
    aten._validate_compressed_sparse_indices.default,
):
    _for_dense(_func)


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    return call(func, args, kwargs)


_libraries: list[torch.library.Library] = []


def _register_kernels() -> None:
    """Register every operator that has a kernel for sparse tensors on the CPU, before the first sparse tensor."""
    rest, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((rest, own))
    every = [name for name in all_operator_names() if name.startswith("aten::")]
    for parts, keys, cpu_key, key in (
        (_PARTS, _COO, "SparseCPU", "SparsePrivateUse1"),
        (_COMPRESSED_PARTS, _CSR, "SparseCsrCPU", "SparseCsrPrivateUse1"),
    ):
        rest.fallback(_fallback, key)
        for qualified in every:
            name = qualified.removeprefix("aten::")
            if name == _EMPTY or not has_kernel(qualified, cpu_key):
                continue
            base, _, overload = name.partition(".")
            func = getattr(getattr(aten, base), overload or "default")
            of_parts = name in parts and func not in KERNELS
            own.impl(name, _own_kernel(func, keys) if of_parts else functools.partial(_fallback, func), key)
    own.impl("zeros_like", functools.partial(_fallback, aten.zeros_like.default), "SparsePrivateUse1")


_EMPTY = "empty.memory_format"


def _empty(keys: Any) -> Callable[..., Any]:
    kernel = _own_kernel(aten.empty.memory_format, keys)

    def empty(*args: Any, **kwargs: Any) -> Any:
        _prepare()
        return kernel(*args, **kwargs)

    return empty


def _prepare() -> None:
    if not _libraries:
        _register_kernels()


def register() -> torch.library.Library:
    """Let sparse tensors be created on a slice. Returns what keeps this registered."""
    FOREIGN.append(_foreign)
    library = torch.library.Library("aten", "IMPL")
    prefixes = ["PrivateUse1"] if torch.cuda.device_count() else ["PrivateUse1", "CUDA"]
    for prefix in prefixes:
        library.impl(_EMPTY, _empty(_COO), f"Sparse{prefix}")
        library.impl(_EMPTY, _empty(_CSR), f"SparseCsr{prefix}")
    return library
