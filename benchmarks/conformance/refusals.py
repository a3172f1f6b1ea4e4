"""Samples of PyTorch's operator suite that the device refuses or computes differently, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

_LONGER = "reads its storage beyond the tensor that is given; only the tensor itself is copied to the device"
_HOST = "takes a tensor of indices that has to be on the CPU, as with CUDA"
_BATCH_NORM = "in evaluation the saved statistics have CUDA's shape (C,), the CPU's are empty"
_STATISTICS = "the saved statistics of halves are float32, as with CUDA; the CPU keeps halves"
_HALVES = frozenset(["float16", "bfloat16"])
_UNWRITTEN = "PyTorch's own composite leaves out= unwritten where its inputs are a tensor subclass"


@dataclass(frozen=True)
class Refusal:
    """Empty ``kinds`` or ``dtypes`` stand for all of them."""

    reason: str
    kinds: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()

    def covers(self, kind: str, dtype: str) -> bool:
        return (not self.kinds or kind in self.kinds) and (not self.dtypes or dtype in self.dtypes)


#: Entry of the suite → why some or all of its samples differ.
REFUSALS: dict[str, Refusal] = {
    "tensor_split": Refusal(_HOST),
    "native_batch_norm": Refusal(_BATCH_NORM),
    "_native_batch_norm_legit": Refusal(_BATCH_NORM),
    "native_layer_norm": Refusal(_STATISTICS, dtypes=_HALVES),
    "_batch_norm_with_update": Refusal(_STATISTICS, dtypes=_HALVES),
    "as_strided_partial_views": Refusal(_LONGER, frozenset({"forward", "backward", "not contiguous"})),
    "as_strided": Refusal(_LONGER, frozenset({"not contiguous"})),
    "as_strided_copy": Refusal(_LONGER, frozenset({"not contiguous"})),
    "linalg_matrix_rank": Refusal(_UNWRITTEN, frozenset({"out"})),
    "linalg_matrix_rank_hermitian": Refusal(_UNWRITTEN, frozenset({"out"})),
    "fft_ihfft2": Refusal(_UNWRITTEN, frozenset({"out"})),
    "fft_ihfftn": Refusal(_UNWRITTEN, frozenset({"out"})),
}

#: Entries that return uninitialized memory: only shape and dtype are compared.
UNINITIALISED = frozenset(
    ["empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"]
)

#: Entries that the CPU computes with another algorithm than the device: (relative, absolute) tolerance.
TOLERANCES: dict[str, tuple[float, float]] = {
    "nn_functional_scaled_dot_product_attention": (1e-3, 5e-5),
    "linalg_householder_product": (1e-3, 1e-4),
}

#: The same for float16 and bfloat16, which are rounded at other steps.
TOLERANCES_OF_HALVES: dict[str, tuple[float, float]] = {
    "nn_functional_batch_norm": (5e-2, 5e-2),
    "nn_functional_instance_norm": (5e-2, 5e-2),
    "nn_functional_layer_norm": (5e-2, 5e-2),
    "nn_functional_linear_cross_entropy_chunked": (5e-2, 5e-2),
    "nn_functional_linear_cross_entropy_chunked_none": (5e-2, 5e-2),
    "nn_functional_mish": (1e-2, 1e-3),
    "nn_functional_scaled_dot_product_attention": (5e-2, 0.25),
    "prod": (1e-2, 1e-3),
}
