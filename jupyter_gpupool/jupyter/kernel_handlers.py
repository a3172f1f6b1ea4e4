"""``kernels/{id}``: the GPU request of a kernel that is about to start. Only a Jupyter server offers this call."""

from __future__ import annotations

import re
from typing import Any

from tornado import web

from jupyter_gpupool.core.errors import InvalidRequest, UnknownLease
from jupyter_gpupool.server.http.handlers import PREFIX, BaseHandler, in_jupyter
from jupyter_gpupool.server.service.backend import PoolBackend

from .kernel_gpu_requests import parse, pending_requests

_UUID = re.compile(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")


class KernelHandler(BaseHandler):
    """The request for the kernel with that id, which its client chose. The kernel's start removes it."""

    @web.authenticated
    async def get(self, kernel_id: str) -> None:
        if not pending_requests.has(kernel_id):
            raise UnknownLease(f"no GPU request is stored for kernel {kernel_id[:60]!r}")
        request = pending_requests.get(kernel_id)
        self.reply(request.to_json() if request is not None else {"num_gpus": 0})

    @web.authenticated
    async def put(self, kernel_id: str) -> None:
        if not _UUID.fullmatch(kernel_id):
            raise InvalidRequest(
                f"{kernel_id[:60]!r} cannot be a kernel's id: choose a UUID, and start the kernel with it"
            )
        request = parse(self.body(), "the body")
        pending_requests.put(kernel_id, request)
        self.reply(request.to_json() if request is not None else {"num_gpus": 0})

    @web.authenticated
    async def delete(self, kernel_id: str) -> None:
        pending_requests.forget(kernel_id)
        self.reply({})


def kernel_handlers(service: PoolBackend) -> list[tuple[Any, ...]]:
    """Return the handlers, which must precede those of the pool's own calls."""
    return [(f"{PREFIX}/kernels/([^/]+)", in_jupyter(KernelHandler), {"service": service})]
