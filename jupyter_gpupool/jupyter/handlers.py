"""What a kernel that is about to start shall have: a call that only a Jupyter server offers."""

from __future__ import annotations

import re

from ..api.handlers import PREFIX, Calls, in_jupyter
from ..api.service import PoolService
from ..pool.errors import InvalidRequest, UnknownLease
from .wishes import parse, wishes

_UUID = re.compile(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")


class KernelCall(Calls):
    """The wish of the kernel with that id, which its client chose; forgotten with the kernel's start."""

    async def read(self, kernel_id: str) -> None:
        if not wishes.knows(kernel_id):
            raise UnknownLease(f"nothing is stored for a kernel {kernel_id[:60]!r}")
        wish = wishes.get(kernel_id)
        self.reply(wish.to_json() if wish is not None else {"num_gpus": 0})

    async def replace(self, kernel_id: str) -> None:
        if not _UUID.fullmatch(kernel_id):
            raise InvalidRequest(
                f"{kernel_id[:60]!r} is no kernel's id: choose a uuid, and start the kernel with it"
            )
        wish = parse(self.body(), "the body")
        wishes.put(kernel_id, wish)
        self.reply(wish.to_json() if wish is not None else {"num_gpus": 0})

    async def remove(self, kernel_id: str) -> None:
        wishes.forget(kernel_id)
        self.reply({})


def kernel_handlers(service: PoolService) -> list[tuple]:
    """To be matched before the pool's own calls."""
    return [(f"{PREFIX}/kernels/([^/]+)", in_jupyter(KernelCall), {"service": service})]
