"""``torch.autocast`` on a slice, with the casts that CUDA makes for each operator.

The client casts before autograd, so gradients have the same dtypes as with CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.device_names import BACKEND
from jupyter_gpupool.pytorch.client.tensor.patches import Patches
from jupyter_gpupool.pytorch.client.tensor.tensor import RemoteTensor
from jupyter_gpupool.pytorch.torch_internals.client import (
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
)

_KEY = "AutocastPrivateUse1"
_KEYS = DispatchKeySet(getattr(DispatchKey, _KEY))


def _listed(text: str) -> list[str]:
    return text.split()


#: Operators by their cast, as PyTorch lists them for CUDA (ATen/autocast_mode.h).
LOWER_PRECISION = _listed(
    """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution cudnn_convolution_transpose
    prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
    linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
    """
)
#: CUDA casts what cuDNN runs by a kernel of its own, in the same way.
RECURRENT = _listed(
    """
    lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data
    """
)
FLOAT32 = _listed(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm
    frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss
    mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
    """
)
#: PyTorch 2.14 casts it, and does not list it.
UNLISTED_FLOAT32 = _listed("linalg_matrix_sqrth")
FLOAT32_RESULT = _listed(
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
    """
)
WIDEST = _listed(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
    """
)
#: Operators with an overload that takes the dtype of the result.
FLOAT32_OVERLOAD = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}
UNSAFE = ["binary_cross_entropy"]

#: Casts of parameters, kept until the outermost autocast ends.
_cached: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}


def _eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and value.device.type in (BACKEND, "cuda")
    )


def _cast(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(dtype, v) for v in value]
    if not _eligible(value) or value.dtype is dtype:
        return value
    if not (
        type(value) is RemoteTensor
        and value.requires_grad
        and value.is_leaf
        and value.dtype is torch.float32
        and dtype is not torch.float32
        and torch.is_autocast_cache_enabled()
        and not value._is_view()
    ):
        return value.to(dtype)
    # A cast made without gradients must not be used with gradients.
    key = (id(value), dtype, torch.is_grad_enabled())
    found = _cached.get(key)
    if found is None:
        found = _cached[key] = value, value.to(dtype)
    return found[1]


def _run_in(dtype: torch.dtype, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return op(*[_cast(dtype, a) for a in args], **{k: _cast(dtype, v) for k, v in kwargs.items()})


def _lower_precision(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(_KEYS):
            return _run_in(torch.get_autocast_dtype(BACKEND), op, args, kwargs)

    return kernel


def _float32(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(_KEYS):
            return _run_in(torch.float32, op, args, kwargs)

    return kernel


def _float32_result(op: Any) -> Callable[..., Any]:
    position = [a.name for a in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(_KEYS):
            wanted = args[position] if len(args) > position else kwargs.get("dtype")
            if wanted is None and _eligible(args[0]):
                return op(*args[:position], **{**kwargs, "dtype": torch.float32})
            return op(*args, **kwargs)

    return kernel


def _float32_overload(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(_KEYS):
            first = args[0]
            if op is torch.ops.aten.norm.ScalarOpt_dim_dtype and len(args) == 3:
                kwargs.setdefault("keepdim", False)
                args = (*args, kwargs.pop("keepdim"))
            elif len(args) == 1:
                args = (first, kwargs.pop("p", 2))
            return op(*args, **kwargs, dtype=torch.float32 if _eligible(first) else first.dtype)

    return kernel


def _widest(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(_KEYS):
            lower = torch.get_autocast_dtype(BACKEND)
            found = {t.dtype for t in _tensors((args, kwargs)) if _eligible(t)}
            if not found <= {lower, torch.float32}:
                raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
            return _run_in(torch.float32 if torch.float32 in found else lower, op, args, kwargs)

    return kernel


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for v in value for t in _tensors(v)]


def _unsafe(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
            "Many models use a sigmoid layer right before the binary cross entropy layer.\n"
            "In this case, combine the two layers using torch.nn.functional.binary_cross_entropy_with_logits\n"
            "or torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and BCEWithLogits are\n"
            "safe to autocast."
        )

    return kernel


def _overload(name: str) -> Any:
    """``"softmax.int"`` → the operator, or None if this PyTorch has none of that name."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)


def register() -> list[torch.library.Library]:
    """Register the kernels that run inside ``torch.autocast``. The caller must keep the libraries."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, _KEY)
    library = torch.library.Library("aten", "IMPL")
    for listed, policy in (
        (LOWER_PRECISION, _lower_precision),
        (RECURRENT, _lower_precision),
        (UNLISTED_FLOAT32, _float32),
        (FLOAT32, _float32),
        (FLOAT32_RESULT, _float32_result),
        (WIDEST, _widest),
        (UNSAFE, _unsafe),
    ):
        for name in listed:
            op = _overload(name)
            if op is not None:
                library.impl(name, policy(op), _KEY)
    for name, overload in FLOAT32_OVERLOAD.items():
        library.impl(name, _float32_overload(getattr(torch.ops.aten.norm, overload)), _KEY)
    return [others, library]


def alias(patches: Patches) -> None:
    """Let ``torch.autocast("cuda")``, and PyTorch's queries of it, mean the slices."""

    def of(device_type: Any) -> Any:
        return BACKEND if device_names.cuda_is_ours and device_type == "cuda" else device_type

    enabled, get = torch.is_autocast_enabled, torch.get_autocast_dtype
    enable, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype

    def set_enabled(*args: Any) -> None:
        device_type, value = args if len(args) == 2 else ("cuda", *args)
        enable(of(device_type), value)

    for name, function in {
        "is_autocast_enabled": lambda device_type="cuda": enabled(of(device_type)),
        "set_autocast_enabled": set_enabled,
        "get_autocast_dtype": lambda device_type: get(of(device_type)),
        "set_autocast_dtype": lambda device_type, dtype: set_dtype(of(device_type), dtype),
        "get_autocast_gpu_dtype": lambda: get(BACKEND),
        "set_autocast_gpu_dtype": lambda dtype: set_dtype(BACKEND, dtype),
    }.items():
        patches.set(torch, name, function)


def clear_cache_with_torch(patches: Patches) -> None:
    """Clear the cached casts whenever PyTorch clears its own."""
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        _cached.clear()
        clear()

    patches.set(torch, "clear_autocast_cache", clear_both)
