"""The table of functions by which XLA calls the plugin."""

from __future__ import annotations

import _thread
import ctypes
import os
from collections.abc import Callable
from typing import Any

from jupyter_gpupool._version import __version__
from jupyter_gpupool.jax.protocol.status import CANCELLED, INTERNAL, StatusError
from jupyter_gpupool.transport.specs import AttachSpec

from .buffers import Buffers
from .devices import Devices, Texts
from .functions import Functions
from .layouts import MAJOR, MINOR, SLOTS, STRUCTURES, Api
from .native import NATIVE, Native
from .programs import Programs
from .session import SliceSession

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

#: What begins work or waits for it: refused once the session has ended.
_WORK = (
    "Client_Compile",
    "Client_BufferFromHostBuffer",
    "LoadedExecutable_Execute",
    "Buffer_ToHostBuffer",
    "Buffer_ReadyEvent",
    "Buffer_CopyToDevice",
    "Buffer_CopyToMemory",
    "Device_MemoryStats",
)


class Plugin:
    """Fills the table. It lives longer than the interpreter, after whose end XLA calls the table once more."""

    def __init__(self, spec: AttachSpec, jax_version: str) -> None:
        self._spec = spec
        self._jax_version = jax_version
        self._native = native = Native()
        texts = Texts()
        self._devices = Devices(spec, native, texts, __version__)
        self.functions = Functions(self._connect_again)
        self.programs = Programs(self._devices, native, texts, self.functions)
        buffers = Buffers(self._devices, native, self.functions)
        self.api = Api(struct_size=ctypes.sizeof(Api), version_size=24, major=MAJOR, minor=MINOR)
        self._callbacks = [
            self._fill(name, getattr(owner, handler.__name__), structure)
            for owner in (self._devices, self.programs, buffers)
            for name, (handler, structure) in type(owner).PLACES.items()
        ]
        self._callbacks.append(self._fill("Client_Create", self._create, "Client_Create"))
        self._callbacks.append(self._fill("ExecuteContext_Create", self._context, "ExecuteContext_Create"))
        filled = [name for k, name in enumerate(SLOTS) if self.api.functions[k]]
        for k, name in enumerate(SLOTS):
            if not self.api.functions[k]:
                self.api.functions[k] = native.address(NATIVE.get(name, "unimplemented"))
        os.register_at_fork(after_in_child=self._after_fork)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        _at_end.append(_End(self.api, [SLOTS.index(name) for name in filled], native.address("nothing")))

    def _fill(self, place: str, handler: Callable[[Any], None], structure: str) -> Any:
        layout, native = STRUCTURES[structure], self._native

        def call(address: int) -> Any:
            try:
                handler(layout.from_address(address))
                return None
            except StatusError as e:
                code, text = e.code, e.message.encode()
            except KeyboardInterrupt:
                _thread.interrupt_main()  # raised again as soon as Python runs
                code, text = CANCELLED, b"interrupted"
            except BaseException as e:  # nothing else tells of it
                code, text = INTERNAL, f"{type(e).__name__} in jupyter_gpupool: {e}".encode()
            return native.error(code, text, len(text))

        callback = _FUNCTION(call)
        self.api.functions[SLOTS.index(place)] = ctypes.cast(callback, ctypes.c_void_p).value
        return callback

    def _create(self, a: Any) -> None:
        if self._devices.session is None:
            self._devices.session = SliceSession(self._spec, self._jax_version, self._native)
            self._devices.session.on_destroyed = self.programs.forget
        a.client = self._devices.client

    def _connect_again(self) -> SliceSession:
        first = self._devices.session  # which knows where the lease is
        return SliceSession(self._spec if first is None else first.spec, self._jax_version, None)

    def _context(self, a: Any) -> None:
        a.context = self._native.handle(0)

    def is_own(self, client: Any) -> bool:
        """Whether a client of JAX's is this plugin's."""
        return "jupyter_gpupool " in str(client.platform_version)

    def end(self) -> None:
        """End the session. What the program asks for from now on is refused."""
        address = self._native.address("ended")
        for place in _WORK:
            self.api.functions[SLOTS.index(place)] = address
        self.functions.close()
        if self._devices.session is not None:
            self._devices.session.close()

    def _after_fork(self) -> None:
        self.functions.forked()
        if self._devices.session is not None:
            self._devices.session.forked()


class _End:
    """Lets a table enter no Python once this module is gone."""

    def __init__(self, api: Api, places: list[int], nothing: int) -> None:
        self._functions = api.functions
        self._places = places
        self._nothing = nothing

    def __del__(self) -> None:
        for place in self._places:
            self._functions[place] = self._nothing


#: Ends when the interpreter clears its modules.
_at_end: list[_End] = []
