"""An operator that is a tenant who has taken the worker over: it runs any Python in the worker's process.

An administrator who allowed such an operator would have given the tenant what a memory error in a kernel gives.
"""

from __future__ import annotations

import json
from typing import Any

import torch

#: The length of an answer in bytes, padded with spaces.
ANSWER_BYTES = 16384

_library = torch.library.Library("gpupool_hostile", "DEF")
_library.define("run(Tensor code) -> Tensor")


def _run(code: torch.Tensor) -> torch.Tensor:
    names: dict[str, Any] = {}
    exec(bytes(code.tolist()).decode(), names)
    answer = json.dumps(names["answer"]).encode().ljust(ANSWER_BYTES)
    return torch.tensor(list(answer), dtype=torch.uint8)


_library.impl("run", _run, "CPU")


@torch.library.register_fake("gpupool_hostile::run", lib=_library)
def _(code: torch.Tensor) -> torch.Tensor:
    return torch.empty(ANSWER_BYTES, dtype=torch.uint8, device=code.device)


def run(code: str) -> Any:
    """Run ``code`` in the worker of this process's lease, and return what it calls ``answer``."""
    there = torch.tensor(list(code.encode()), dtype=torch.uint8).cuda()
    return json.loads(bytes(torch.ops.gpupool_hostile.run(there).cpu().tolist()))
