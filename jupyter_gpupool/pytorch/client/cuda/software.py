"""``torch.version.cuda``, and the versions of cuDNN and NCCL: those of the GPU server.

The worker sends them when it welcomes the client. A server of emulated GPUs has none, and the answers are those of
a PyTorch without CUDA, which it has.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor import device_names
from jupyter_gpupool.pytorch.client.tensor.patches import Patches


@dataclass(frozen=True)
class Software:
    """Versions as PyTorch reports them, None if unknown: cuDNN's as one number, NCCL's as a tuple."""

    cuda: str | None = None
    cudnn: int | None = None
    nccl: tuple[int | str, ...] | None = None
    architectures: tuple[str, ...] = ()

    @classmethod
    def from_wire(cls, sent: Any) -> Software:
        """What a worker sent; a field that is missing, or of another type, is unknown."""
        fields = sent if isinstance(sent, Mapping) else {}
        cuda, cudnn = fields.get("cuda"), fields.get("cudnn")
        nccl, architectures = fields.get("nccl"), fields.get("architectures")
        whole = isinstance(nccl, (list, tuple)) and all(isinstance(part, (int, str)) for part in nccl)
        named = isinstance(architectures, (list, tuple)) and all(isinstance(a, str) for a in architectures)
        return cls(
            cuda if isinstance(cuda, str) else None,
            cudnn if isinstance(cudnn, int) else None,
            tuple(nccl) if nccl and whole else None,
            tuple(architectures) if architectures and named else (),
        )


def of_server() -> Software:
    """The software of the lease's first GPU server. Emulated GPUs have none, and need no connection for it."""
    session = attachment.current()
    if session is None or all(device.emulated for device in session.spec.devices):
        return Software()
    try:
        session.connect()
    except (RuntimeError, OSError):  # a question about versions is not where a lost lease is reported
        return Software()
    return Software.from_wire(session.welcome.get("software"))


class _VersionModule(types.ModuleType):
    """The type of ``torch.version`` with a ``cuda`` that is asked for only when a program looks at it."""

    @property
    def cuda(self) -> str | None:
        """The GPU server's version of CUDA in a lease, else that of this process."""
        return (of_server().cuda if device_names.cuda_is_ours else None) or vars(self).get("cuda")

    @cuda.setter
    def cuda(self, value: str | None) -> None:
        vars(self)["cuda"] = value


def alias(patches: Patches) -> None:
    """Let PyTorch's questions of versions be answered by the GPU server."""
    torch.version.__class__ = _VersionModule
    cudnn = sys.modules["torch.backends.cudnn"].m  # the module itself; sys.modules has a wrapper
    patches.set(cudnn, "version", lambda: of_server().cudnn)
    patches.set(cudnn, "is_available", lambda: of_server().cudnn is not None)
    patches.set(torch.cuda.nccl, "version", _nccl_version)


def _nccl_version() -> tuple[int | str, ...]:
    found = of_server().nccl
    if found is None:
        raise RuntimeError("torch.cuda.nccl.version is not available on a leased GPU: its server has no NCCL")
    return found
