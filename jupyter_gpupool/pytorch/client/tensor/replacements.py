"""What a program finds in the place of a function of PyTorch that is replaced.

It must not matter to the program: functions are known by their identity (the table of a tensor subclass, the rules
of the compiler), by their name (pickle) and by what :mod:`inspect` tells of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import pkgutil
import sys
import types
from collections.abc import Hashable, Iterator
from typing import Any

from torch.overrides import get_ignored_functions, handle_torch_function, has_torch_function

from jupyter_gpupool.pytorch.torch_internals.client import is_torch_function_mode_enabled

if sys.version_info >= (3, 14):
    import annotationlib

    # Annotations may name what PyTorch imports for type checkers only.
    _signature = functools.partial(inspect.signature, annotation_format=annotationlib.Format.FORWARDREF)
else:
    _signature = inspect.signature

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType)

#: The replacement of each builtin function, for as long as the process lives: programs keep them in tables.
_of_builtin: dict[int, Builtin] = {}


def replacement(owner: Any, name: str, native: Any, value: Any) -> Any:
    """What to set in the place of ``native``, so that it does what ``value`` does and looks the same.

    ``native`` is the attribute ``name`` of ``owner``.
    """
    if isinstance(value, staticmethod):
        return staticmethod(replacement(owner, name, getattr(native, "__func__", native), value.__func__))
    if isinstance(value, type):
        return _resemble(value, native) if isinstance(native, type) else value
    if not callable(native) or not isinstance(value, _FUNCTIONS):
        return value
    if isinstance(native, _BUILTINS):
        found = _of_builtin.setdefault(id(native), Builtin(owner, name, native))
        found.call = value
        return found
    return _resemble(_copy(value), native)


def _copy(value: Any) -> Any:
    """A function that does what ``value`` does: one may replace several of PyTorch's, each with a name of its own."""
    if not isinstance(value, types.FunctionType):

        def call(*args: Any, **kwargs: Any) -> Any:
            return value(*args, **kwargs)

        return call
    copied = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__
    )
    copied.__kwdefaults__ = value.__kwdefaults__
    return copied


def _resemble(value: Any, native: Any) -> Any:
    """``value`` with the name, the documentation and the signature of ``native``."""
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(value, name, getattr(native, name, None))
    if isinstance(native, types.FunctionType):
        value.__dict__.update(native.__dict__)  # __wrapped__ too, which the compiler looks for
        if hasattr(native, "__annotate__"):  # since Python 3.14, evaluated when a program asks
            value.__annotate__ = native.__annotate__
        else:
            value.__annotations__ = native.__annotations__
    # pybind11's methods cannot be looked up, and have no signature.
    signature = _signature_of(native) if isinstance(native, Hashable) else None
    if signature is not None:
        value.__signature__ = signature
    return value


@functools.cache  # every lease replaces the same functions
def _signature_of(native: Any) -> inspect.Signature | None:
    """The signature of ``native``; None for what is written in C++ without one."""
    try:
        return _signature(native)
    except (TypeError, ValueError):
        return None


def _named_in(kind: type) -> Iterator[Any]:
    """The values of the names in the ``__torch_function__`` of a class, and of those that it inherits from."""
    for ancestor in kind.__mro__:
        function = getattr(vars(ancestor).get("__torch_function__"), "__func__", None)
        if isinstance(function, types.FunctionType):
            code = function.__code__
            yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                yield from (cell.cell_contents for cell in function.__closure__ or ())


class Builtin:
    """Replaces a function or a method of tensors that is written in C++.

    It is equal to that, so a table that a program filled before the lease has it, and the other way round.
    Like PyTorch's own, it hands itself to the ``__torch_function__`` of its arguments and of a mode.
    """

    def __init__(self, owner: Any, name: str, native: Any) -> None:
        self.native = native
        self._place = (
            f"{owner.__module__}:{owner.__qualname__}." if isinstance(owner, type) else f"{owner.__name__}:"
        )
        self._place += name
        self.call: Any = native
        self.__name__ = native.__name__
        self.__qualname__ = native.__qualname__
        self.__doc__ = native.__doc__
        self.__module__ = getattr(native, "__module__", None)  # type: ignore[assignment]
        self._is_method = isinstance(native, types.MethodDescriptorType)
        # PyTorch asks modes about the functions that its operators have, and arguments about most of those.
        self._asks_modes = not isinstance(getattr(native, "__self__", None), types.ModuleType)
        self._asks_arguments = self._asks_modes and native not in get_ignored_functions()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._asks_arguments:
            if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
                # A class of tensors is no tensor: t.type(torch.FloatTensor).
                asked = tuple(a for a in (*args, *kwargs.values()) if not isinstance(a, type))
                if has_torch_function(asked):
                    return handle_torch_function(self._as_known_to(asked), asked, *args, **kwargs)
        elif self._asks_modes and is_torch_function_mode_enabled():
            return handle_torch_function(self, (), *args, **kwargs)
        return self.call(*args, **kwargs)

    def _as_known_to(self, asked: tuple[Any, ...]) -> Any:
        """PyTorch's own function if a ``__torch_function__`` that is asked has it from before the lease."""
        if not self._is_method and any(
            self.native is value for kind in map(type, asked) for value in _named_in(kind)
        ):
            return self.native
        return self

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or not self._is_method:
            return self
        return types.MethodType(self, instance)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What isinstance() and inspect see."""
        return type(self.native)

    @property
    def __signature__(self) -> Any:
        return inspect.signature(self.native)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def __eq__(self, other: Any) -> bool:
        return other is self or other is self.native

    def __hash__(self) -> int:
        return hash(self.native)

    def __repr__(self) -> str:
        return repr(self.native)

    def __reduce__(self) -> Any:
        """By name: another process has its own, with a lease or without."""
        return pkgutil.resolve_name, (self._place,)
