"""Which functions outside of it a program may call, and with which arrays: those that compute on them, and fit.

The kernels of jaxlib take their sizes from an operand and do not look at the other arrays, so a call whose arrays do
not fit would read and write past their ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .custom_calls import Array, CustomCall

#: What a program that was compiled may call besides: what XLA puts there itself, by the default options.
_OWN = re.compile(r"__onednn\$\w+")
#: Annotations, whose result is their operand.
_SAME = ("Sharding", "xla.sdy.FuncResultSharding")
#: Where a program of several devices changes between whole arrays and a device's parts of them. The partitioner takes
#: these away, so that they are in no compiled program.
_PARTS = re.compile(
    r"SPMDFullToShardShape|SPMDShardToFullShape|xla\.sdy\.(GlobalToLocalShape|LocalToGlobalShape)"
)
_FFI = 4
#: What calls a function of the client's process, by its number among those that the client has named.
_FUNCTION = re.compile(r"xla_ffi(_partitioned)?_python_(cpu|gpu)_callback")

_LAPACK = re.compile(r"lapack_([sdcz])(\w+)_ffi")
#: By the letter of a LAPACK function: its type, the real and the complex one of the same precision.
_TYPES = {
    "s": ("float32", "float32", "complex64"),
    "d": ("float64", "float64", "complex128"),
    "c": ("complex64", "float32", "complex64"),
    "z": ("complex128", "float64", "complex128"),
}


class _Misfit(Exception):
    """The arrays of a call do not fit."""


class _Lapack:
    """A call of a LAPACK function on a batch of matrices, and the arrays that its functions take and return."""

    def __init__(self, letter: str, call: CustomCall, first: int = 0) -> None:
        self.call = call
        self.own, self.real, self.complex = _TYPES[letter]
        self.is_complex = self.own == self.complex
        self.batch, self.m, self.n = self.split(first)
        self.k = min(self.m, self.n)

    def split(self, operand: int) -> tuple[tuple[int, ...], int, int]:
        """Return the batch, the rows and the columns of an operand."""
        dims = self.call.operands[operand].dims
        if len(dims) < 2:
            raise _Misfit
        return dims[:-2], dims[-2], dims[-1]

    def a(self, *dims: int) -> Array:
        """Arrays of the function's type, one a matrix of the batch."""
        return Array(self.own, (*self.batch, *dims))

    def r(self, *dims: int) -> Array:
        return Array(self.real, (*self.batch, *dims))

    def c(self, *dims: int) -> Array:
        return Array(self.complex, (*self.batch, *dims))

    def i(self, *dims: int) -> Array:
        return Array("int32", (*self.batch, *dims))

    def attribute(self, name: str, *known: int) -> int:
        """Return an attribute, which must be one of those values."""
        value = (self.call.attributes or {}).get(name)
        if value is None or value not in known:
            raise _Misfit
        return value

    def square(self) -> int:
        if self.m != self.n:
            raise _Misfit
        return self.n

    def reflectors(self, operand: int) -> int:
        """Return how many reflectors there are, by the length of their factors."""
        dims = self.call.operands[operand].dims
        if not dims or dims[-1] > self.k:
            raise _Misfit
        return dims[-1]


#: The operands that a function takes, and its results.
_Arrays = tuple[list[Array], list[Array]]


def _getrf(x: _Lapack) -> _Arrays:
    return [x.a(x.m, x.n)], [x.a(x.m, x.n), x.i(x.k), x.i()]


def _geqrf(x: _Lapack) -> _Arrays:
    return [x.a(x.m, x.n)], [x.a(x.m, x.n), x.a(x.k)]


def _geqp3(x: _Lapack) -> _Arrays:
    return [x.a(x.m, x.n), x.i(x.n)], [x.a(x.m, x.n), x.i(x.n), x.a(x.k)]


def _orgqr(x: _Lapack) -> _Arrays:
    return [x.a(x.m, x.n), x.a(x.reflectors(1))], [x.a(x.m, x.n)]


def _ormqr(x: _Lapack) -> _Arrays:
    batch, rows, columns = x.split(2)
    if x.m != (rows if x.attribute("left", 0, 1) else columns):
        raise _Misfit
    return [x.a(x.m, x.n), x.a(x.reflectors(1)), x.a(rows, columns)], [x.a(rows, columns)]


def _potrf(x: _Lapack) -> _Arrays:
    n = x.square()
    return [x.a(n, n)], [x.a(n, n), x.i()]


def _gesvd(x: _Lapack) -> _Arrays:
    mode = chr(x.attribute("mode", *b"ANS"))
    # Without vectors, arrays of either size stay unused.
    thin = mode == "S" or (mode == "N" and x.call.results[2:4] == (x.a(x.m, x.k), x.a(x.k, x.n)))
    rows, columns = (x.k, x.k) if thin else (x.n, x.m)
    return [x.a(x.m, x.n)], [x.a(x.m, x.n), x.r(x.k), x.a(x.m, columns), x.a(rows, x.n), x.i()]


def _syevd(x: _Lapack) -> _Arrays:
    n = x.square()
    x.attribute("mode", *b"NV")
    return [x.a(n, n)], [x.a(n, n), x.r(n), x.i()]


def _geev(x: _Lapack) -> _Arrays:
    n = x.square()
    for side in ("compute_left", "compute_right"):
        x.attribute(side, *b"NV")
    values = [x.a(n)] if x.is_complex else [x.a(n), x.a(n)]
    return [x.a(n, n)], [*values, x.c(n, n), x.c(n, n), x.i()]


def _gees(x: _Lapack) -> _Arrays:
    n = x.square()
    x.attribute("mode", *b"NV")
    x.attribute("sort", *b"N")
    values = [x.a(n)] if x.is_complex else [x.a(n), x.a(n)]
    return [x.a(n, n)], [x.a(n, n), x.a(n, n), *values, x.i(), x.i()]


def _gehrd(x: _Lapack) -> _Arrays:
    n = x.square()
    x.attribute("low", 1)
    x.attribute("high", n)
    return [x.a(n, n)], [x.a(n, n), x.a(n - 1), x.i()]


def _sytrd(x: _Lapack) -> _Arrays:
    n = x.square()
    return [x.a(n, n)], [x.a(n, n), x.r(n), x.r(n - 1), x.a(n - 1), x.i()]


def _trsm(x: _Lapack) -> _Arrays:
    batch, rows, columns = x.split(1)
    order = rows if x.attribute("side", *b"LR") == ord("L") else columns
    factor = [Array(x.own, ())] if len(x.call.operands) == 3 else []
    return [x.a(order, order), x.a(rows, columns), *factor], [x.a(rows, columns)]


def _gtsv(x: _Lapack) -> _Arrays:
    batch, rows, columns = x.split(3)
    arrays = [*(Array(x.own, (*batch, rows)) for _ in range(3)), Array(x.own, (*batch, rows, columns))]
    return arrays, [*arrays, Array("int32", batch)]


_FUNCTIONS: dict[str, Callable[[_Lapack], _Arrays]] = {
    "getrf": _getrf,
    "geqrf": _geqrf,
    "geqp3": _geqp3,
    "orgqr": _orgqr,
    "ungqr": _orgqr,
    "ormqr": _ormqr,
    "unmqr": _ormqr,
    "potrf": _potrf,
    "gesdd": _gesvd,
    "gesvd": _gesvd,
    "syevd": _syevd,
    "heevd": _syevd,
    "geev": _geev,
    "gees": _gees,
    "gehrd": _gehrd,
    "sytrd": _sytrd,
    "hetrd": _sytrd,
    "trsm": _trsm,
    "gtsv": _gtsv,
}


def function_of(call: CustomCall) -> int | None:
    """Return the number of the client's function that is called; None for another call, -1 where it has no number."""
    if not _FUNCTION.fullmatch(call.target):
        return None
    return -1 if call.version != _FFI else (call.attributes or {}).get("index", -1)


def objection(call: CustomCall, compiled: bool, num_functions: int = 0) -> str:
    """Return why a program may not make a call, or nothing.

    ``compiled``: XLA may have put it there itself. ``num_functions``: how many functions of the client it may call.
    """
    named = _LAPACK.fullmatch(call.target)
    function = function_of(call)
    if function is not None:
        if 0 <= function < num_functions and not call.shared:
            return ""
        return "a program that calls a function of Python by an address is not supported on a slice"
    if named is not None and named[2] in _FUNCTIONS:
        fits = _fits(named[1], named[2], call)
    elif call.target in _SAME:
        fits = call.operands == call.results
    elif not compiled and _PARTS.fullmatch(call.target):
        fits = True
    elif compiled and call.target == "TopK":
        fits = _is_top_k(call)
    elif compiled and _OWN.fullmatch(call.target):
        fits = True
    else:
        return f"the custom call {call.target} is not supported on a slice"
    return "" if fits else f"the arrays of the custom call {call.target} do not fit each other"


def _fits(letter: str, name: str, call: CustomCall) -> bool:
    try:
        x = _Lapack(letter, call, 3 if name == "gtsv" else 0)
        operands, results = _FUNCTIONS[name](x)
        same = all(call.operands[operand] == call.results[result] for result, operand in call.shared)
    except (_Misfit, IndexError):
        return False
    return same and call.version == _FFI and (*operands,) == call.operands and (*results,) == call.results


def _is_top_k(call: CustomCall) -> bool:
    if len(call.operands) != 1 or len(call.results) != 2 or call.shared:
        return False
    (given,), (values, places) = call.operands, call.results
    *batch, count = given.dims or (0,)
    *others, taken = values.dims or (1,)
    fits = len(batch) <= 1 and batch == others and taken <= count
    return fits and values.dtype == given.dtype and places == Array("int32", values.dims)
