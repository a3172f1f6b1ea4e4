"""Programs of clients that want more of a worker than arrays: each is refused, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.jax.worker.allowed_calls import objection
from jupyter_gpupool.jax.worker.custom_calls import Array, CustomCall

CALLS = """
import jax, jax.numpy as jnp
def call(target, results, *operands, **attributes):
    shapes = [jax.ShapeDtypeStruct(dims, dtype) for dims, dtype in results]
    try:
        return jax.jit(lambda *x: jax.ffi.ffi_call(target, shapes)(*x, **attributes))(*operands)
    except jax.errors.JaxRuntimeError as e:
        print(str(e).splitlines()[0])
x = jnp.ones((300, 300))
call("lapack_sgetrf_ffi", [((1, 1), "float32"), ((1,), "int32"), ((), "int32")], x)
call("lapack_sgetrf", [((300, 300), "float32"), ((300,), "int32"), ((), "int32")], x)
call("__onednn$matmul", [((300, 300), "float32")], x, x)
call("TopK", [((300, 5), "float32"), ((300, 5), "int32")], x)
call("Sharding", [((900, 900), "float32")], x)
call("xla_ffi_python_cpu_callback", [((300, 300), "float32")], x, index=0)
lu, pivots, info = call("lapack_sgetrf_ffi", [((3, 4), "float32"), ((3,), "int32"), ((), "int32")], jnp.ones((3, 4)))
print(pivots.tolist(), (x @ x)[0, 0])
"""


def test_a_call_whose_arrays_do_not_fit_is_not_made(run_program: Callable[..., Any], worker: Any) -> None:
    done = run_program(CALLS, worker)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "UNIMPLEMENTED: the arrays of the custom call lapack_sgetrf_ffi do not fit each other",
        "UNIMPLEMENTED: the custom call lapack_sgetrf is not supported on a slice",
        "UNIMPLEMENTED: the custom call __onednn$matmul is not supported on a slice",
        "UNIMPLEMENTED: the custom call TopK is not supported on a slice",
        "UNIMPLEMENTED: the arrays of the custom call Sharding do not fit each other",
        "UNIMPLEMENTED: a program that calls a function of Python by an address is not supported on a slice",
        "[1, 2, 3] 300.0",
    ]


OPTIONS = """
import jax, jax.numpy as jnp, sys
x = jax.random.normal(jax.random.key(0), (50, 50))
lowered = jax.jit(lambda x: jnp.sin(x @ x)).lower(x)
options = {
    "xla_dump_to": sys.argv[1],
    "xla_dump_hlo_as_text": True,
    "xla_backend_extra_options": "no-such-option-of-llvm",
}
asked = lowered.compile(compiler_options=options)(x)
plain = lowered.compile()(x)
print(asked.tobytes() == plain.tobytes())
"""


def test_options_for_the_compiler_write_no_file_and_change_no_bit(
    run_program: Callable[..., Any], worker: Any, tmp_path: Path
) -> None:
    where = tmp_path / "dump"
    where.mkdir()
    done = run_program(OPTIONS, worker, str(where))
    assert done.stdout == "True\n", done.stderr
    assert list(where.iterdir()) == []


def f32(*dims: int) -> Array:
    return Array("float32", dims)


def i32(*dims: int) -> Array:
    return Array("int32", dims)


def call(name: str, operands: list[Array], results: list[Array], **attributes: int) -> CustomCall:
    return CustomCall(f"lapack_s{name}_ffi", 4, tuple(operands), tuple(results), attributes)


#: A call that fits of each function, with a batch of 2.
FIT = {
    "getrf": call("getrf", [f32(2, 3, 4)], [f32(2, 3, 4), i32(2, 3), i32(2)]),
    "geqrf": call("geqrf", [f32(2, 3, 4)], [f32(2, 3, 4), f32(2, 3)]),
    "geqp3": call("geqp3", [f32(2, 3, 4), i32(2, 4)], [f32(2, 3, 4), i32(2, 4), f32(2, 3)]),
    "orgqr": call("orgqr", [f32(2, 4, 3), f32(2, 3)], [f32(2, 4, 3)]),
    "ormqr": call("ormqr", [f32(2, 4, 3), f32(2, 3), f32(2, 4, 5)], [f32(2, 4, 5)], left=1, transpose=0),
    "potrf": call("potrf", [f32(2, 3, 3)], [f32(2, 3, 3), i32(2)], uplo=76),
    "gesdd": call(
        "gesdd",
        [f32(2, 3, 4)],
        [f32(2, 3, 4), f32(2, 3), f32(2, 3, 3), f32(2, 4, 4), i32(2)],
        mode=ord("A"),
    ),
    "gesvd": call(
        "gesvd",
        [f32(2, 3, 4)],
        [f32(2, 3, 4), f32(2, 3), f32(2, 3, 3), f32(2, 3, 4), i32(2)],
        mode=ord("S"),
    ),
    "syevd": call("syevd", [f32(2, 3, 3)], [f32(2, 3, 3), f32(2, 3), i32(2)], mode=ord("V"), uplo=76),
    "geev": call(
        "geev",
        [f32(2, 3, 3)],
        [f32(2, 3), f32(2, 3), *[Array("complex64", (2, 3, 3))] * 2, i32(2)],
        compute_left=ord("V"),
        compute_right=ord("V"),
    ),
    "gees": call(
        "gees",
        [f32(2, 3, 3)],
        [f32(2, 3, 3), f32(2, 3, 3), f32(2, 3), f32(2, 3), i32(2), i32(2)],
        mode=ord("V"),
        sort=ord("N"),
    ),
    "gehrd": call("gehrd", [f32(2, 3, 3)], [f32(2, 3, 3), f32(2, 2), i32(2)], low=1, high=3),
    "sytrd": call("sytrd", [f32(2, 3, 3)], [f32(2, 3, 3), f32(2, 3), f32(2, 2), f32(2, 2), i32(2)], uplo=76),
    "trsm": call("trsm", [f32(2, 3, 3), f32(2, 3, 4)], [f32(2, 3, 4)], side=ord("L")),
    "gtsv": call("gtsv", [*[f32(2, 3)] * 3, f32(2, 3, 4)], [*[f32(2, 3)] * 3, f32(2, 3, 4), i32(2)]),
}

#: There may be fewer reflectors than columns: function, side, array, axis, difference.
FEWER = [("orgqr", "operands", 1, 1, -1), ("ormqr", "operands", 1, 1, -1), ("ormqr", "operands", 0, 2, 1)]


@pytest.mark.parametrize("name", FIT)
def test_any_array_that_differs_is_noticed(name: str) -> None:
    fit = FIT[name]
    assert objection(fit, False) == objection(fit, True) == ""
    wrong = [replace(fit, version=1), replace(fit, target=fit.target.replace("_ffi", ""))]
    wrong += [replace(fit, shared=((len(fit.results), 0),)), replace(fit, results=fit.results[:-1])]
    if fit.attributes:
        wrong += [replace(fit, attributes=None)] if name not in ("potrf", "sytrd") else []
    for side in ("operands", "results"):
        arrays = getattr(fit, side)
        for k, array in enumerate(arrays):
            others = [replace(array, dtype="float64"), replace(array, dtype=f"dynamic {array.dtype}")]
            for axis, length in enumerate(array.dims):
                others.append(replace(array, dims=array.dims[:axis]))
                for change in (-1, 1):
                    dims = (*array.dims[:axis], length + change, *array.dims[axis + 1 :])
                    if (name, side, k, axis, change) not in FEWER:
                        others.append(replace(array, dims=dims))
            wrong += [replace(fit, **{side: (*arrays[:k], other, *arrays[k + 1 :])}) for other in others]
    assert [one for one in wrong if not objection(one, True)] == []


def test_a_mode_that_writes_more_is_noticed() -> None:
    thin = FIT["gesvd"]
    assert objection(replace(thin, attributes={"mode": ord("A")}), False)
    assert objection(replace(thin, attributes={"mode": ord("O")}), False)
    for other in (thin, FIT["gesdd"]):
        assert not objection(replace(other, attributes={"mode": ord("N")}), False)
    for name, attributes in (
        ("gees", {"mode": ord("V"), "sort": ord("S")}),
        ("gehrd", {"low": 1, "high": 9}),
        ("trsm", {"side": ord("R")}),
        ("ormqr", {"left": 0}),
    ):
        assert objection(replace(FIT[name], attributes=attributes), False), name


def test_what_xla_itself_calls_is_only_in_a_compiled_program() -> None:
    top = CustomCall("TopK", 1, (f32(2, 9),), (f32(2, 3), i32(2, 3)), {})
    assert objection(top, False) and not objection(top, True)
    for results in ((f32(1, 3), i32(1, 3)), (f32(2, 10), i32(2, 10)), (f32(2, 3), i32(2, 1)), (f32(2, 3),)):
        assert objection(replace(top, results=results), True)
    ours = CustomCall("__onednn$matmul", 1, (f32(2, 9),), (f32(2, 3),), {})
    assert objection(ours, False) and not objection(ours, True)
