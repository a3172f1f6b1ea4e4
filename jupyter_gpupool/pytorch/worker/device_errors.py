"""Which errors end a device for its process, so that only a new process can go on with it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DeviceFailure(NamedTuple):
    """Why a device cannot be used by this process any more.

    ``is_programs``: the program's own operators are the reason, not the GPU.
    """

    reason: str
    is_programs: bool


#: What CUDA calls an error that leaves the process without its device (cudaError_t), and what it means.
#: The texts are those of cudaGetErrorString, by which older releases of PyTorch are understood.
_FAILURES = {
    710: ("device-side assert triggered", "an index or an assertion of a kernel was out of bounds", True),
    700: ("an illegal memory access was encountered", "a kernel accessed memory that is not its own", True),
    716: ("misaligned address", "a kernel accessed a misaligned address", True),
    717: (
        "operation not supported on global/shared address space",
        "a kernel used a wrong address space",
        True,
    ),
    718: ("invalid program counter", "a kernel jumped to an invalid address", True),
    715: ("an illegal instruction was encountered", "a kernel has an illegal instruction", True),
    714: ("hardware stack error", "a kernel overflowed its stack", True),
    719: ("unspecified launch failure", "a kernel failed", True),
    702: ("the launch timed out and was terminated", "a kernel ran longer than the driver allows", True),
    214: ("uncorrectable ECC error encountered", "the GPU's memory has an uncorrectable error (ECC)", False),
    220: ("uncorrectable NVLink error detected", "NVLink has an uncorrectable error", False),
    226: ("contained error", "the GPU contained an error of its hardware", False),
    46: ("all CUDA-capable devices are busy or unavailable", "the GPU is unavailable", False),
    100: ("no CUDA-capable device is detected", "the GPU is gone", False),
    805: ("MPS client failed to connect to the MPS control daemon or the MPS server", "MPS went away", False),
    806: (
        "the remote procedural call between the MPS server and the MPS client failed",
        "MPS went away",
        False,
    ),
    807: (
        "the MPS server is not ready to accept new MPS client requests",
        "MPS recovers from a failure",
        False,
    ),
    999: ("unknown error", "the GPU or its driver fails", False),
}


def device_failure(error: BaseException) -> DeviceFailure | None:
    """Return why the device of this process is lost; None if ``error`` is one of an operator alone."""
    code = getattr(error, "error_code", None)
    if isinstance(error, torch.AcceleratorError) and code in _FAILURES:
        _, reason, is_programs = _FAILURES[code]
        return DeviceFailure(reason, is_programs)
    text = str(error)
    if not isinstance(error, RuntimeError) or "CUDA" not in text:
        return None
    for words, reason, is_programs in _FAILURES.values():
        if f"CUDA error: {words}" in text:
            return DeviceFailure(reason, is_programs)
    return None
