"""The compiled part of the plugin, handles.c: what XLA calls when Python must not run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

#: Where the build hook puts it. It is no module for Python, so its name does not end with .so.
LIBRARY = Path(__file__).with_name("libhandles.so.1")

_POINTER, _INT, _LONG, _SIZE, _BOOL = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_size_t,
    ctypes.c_bool,
)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "error": (_POINTER, [_INT, ctypes.c_char_p, _SIZE]),
    "handle": (_POINTER, [_LONG]),
    "buffer": (_POINTER, [_LONG, _INT, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER]),
    "program": (_POINTER, [_LONG, _POINTER]),
    "inputs": (_BOOL, [_POINTER, _POINTER]),
    "outputs": (_BOOL, [_POINTER, _LONG, _BOOL]),
    "delete": (_BOOL, [_POINTER]),
    "destroyed": (_SIZE, [_POINTER, _SIZE]),
    "event": (_POINTER, [_BOOL]),
    "set": (None, [_POINTER, _INT, ctypes.c_char_p, _SIZE]),
}

#: What fills a place of the table, by the place's name.
NATIVE = {
    "Error_Destroy": "error_destroy",
    "Error_Message": "error_message",
    "Error_GetCode": "error_code",
    "Error_ForEachPayload": "nothing",
    "Plugin_Initialize": "nothing",
    "Event_Destroy": "event_destroy",
    "Event_IsReady": "event_is_ready",
    "Event_Error": "event_error",
    "Event_Await": "event_await",
    "Event_OnReady": "event_on_ready",
    "Client_Destroy": "nothing",
    "TopologyDescription_Destroy": "nothing",
    "Executable_Destroy": "destroy",
    "LoadedExecutable_Destroy": "destroy",
    "LoadedExecutable_IsDeleted": "is_deleted",
    "LoadedExecutable_GetExecutable": "same",
    "Executable_NumReplicas": "num_replicas",
    "Executable_NumPartitions": "num_partitions",
    "Executable_NumOutputs": "num_outputs",
    # A memory's handle has the text as its dimensions.
    "Memory_Kind": "dimensions",
    "Buffer_Destroy": "destroy",
    "Buffer_ElementType": "element_type",
    "Buffer_Dimensions": "dimensions",
    "Buffer_UnpaddedDimensions": "dimensions",
    "Buffer_DynamicDimensionIndices": "dynamic_dimensions",
    "Buffer_GetMemoryLayout": "layout",
    "Buffer_OnDeviceSizeInBytes": "nbytes",
    "Buffer_Device": "device",
    "Buffer_Memory": "memory",
    "Buffer_IsDeleted": "is_deleted",
    "Buffer_IsOnCpu": "false",
    "Buffer_UnsafePointer": "no_address",
    "Buffer_OpaqueDeviceMemoryDataPointer": "no_address",
    "Buffer_IncreaseExternalReferenceCount": "no_address",
    "Executable_Serialize": "not_stored",
    "Executable_DeserializeAndLoad": "not_stored",
    "Device_IsAddressable": "true",
    "ExecuteContext_Destroy": "destroy",
}


class Handle(ctypes.Structure):
    """The beginning of a handle, see handles.c."""

    _fields_ = [
        ("functions", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_int64),
        ("element_type", ctypes.c_int32),
        ("is_deleted", ctypes.c_int32),
        ("rank", ctypes.c_size_t),
        ("nbytes", ctypes.c_size_t),
        ("device", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("dims", ctypes.c_void_p),
    ]


class Native:
    """The functions of the library, without their prefix. Raises OSError where it is not built for this version."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(LIBRARY))
        # Calls that are short and never wait keep the interpreter's lock.
        quick = ctypes.PyDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(self._library if name == "set" else quick, f"gpupool_{name}")
            except AttributeError:
                raise OSError(f"{LIBRARY} is that of another version") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # tells type checkers that there are others

    def address(self, name: str) -> int:
        """Return the address of a function, for the table."""
        found = ctypes.cast(getattr(self._library, f"gpupool_{name}"), ctypes.c_void_p).value
        assert found is not None, "a function has an address"
        return found
