"""What the GPU server's PyTorch was built with; clients answer their programs' questions by it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from jupyter_gpupool.pytorch.torch_internals.worker import architecture_flags, nccl_version


@functools.cache
def software() -> dict[str, Any]:
    """The versions of CUDA, cuDNN and NCCL, and the architectures that there is code for; without CUDA nothing."""
    if torch.version.cuda is None:
        return {}
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    with contextlib.suppress(RuntimeError):  # another cuDNN than PyTorch was compiled with is installed
        found["cudnn"] = torch.backends.cudnn.version()
    if nccl_version is not None:
        # In tests a client in this process answers for a GPU server that has none.
        with contextlib.suppress(RuntimeError):
            found["nccl"] = list(torch.cuda.nccl.version())
    # torch.cuda.get_arch_list() would ask the driver whether there is a GPU.
    found["architectures"] = (architecture_flags() or "").split()
    return found
