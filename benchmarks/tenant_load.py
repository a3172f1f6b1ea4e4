"""Tenants for tenants.py, over plain TLS sockets; each call is timed. Reads one JSON object from its input:

``{"host", "port", "ca": file, "tokens": [one for each tenant], "kind", "until": seconds since the epoch}``. ``kind``:
``steady``, whose tenants make a call each second, or what an abuser does: ``rate``, ``queue`` or ``connections``.
Prints one JSON object: ``{"calls": [[when it ended, seconds it took]], "statuses": {status: calls}}``.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

BODY = '{"id": "%s", %s, "secret_sha256": "' + "0" * 64 + '"}'
PREFIX = "/gpupool/api/v1"
#: How many connections an abuser uses at once: to make calls on, and to keep open.
CALLERS, KEPT_OPEN = 24, 400
#: A tenant makes every so manyth call a change.
CHANGE_EVERY = 5


class Load:
    """The tenants of one process."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.context = ssl.create_default_context(cafile=given["ca"])
        self.calls: list[tuple[float, float]] = []
        self.statuses: Counter[int] = Counter()

    def over(self) -> bool:
        return time.time() >= self.given["until"]

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.given["host"], self.given["port"], ssl=self.context)

    async def call(self, streams: Any, token: str, line: str, body: str = "", timed: bool = True) -> int:
        reader, writer = streams
        method, path = line.split(" ", 1)
        head = (
            f"{method} {PREFIX}{path} HTTP/1.1\r\nHost: {self.given['host']}\r\nAuthorization: Bearer {token}"
        )
        began = time.perf_counter()
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        if timed:
            self.calls.append((time.time(), time.perf_counter() - began))
        status = int(answer[9:12])
        self.statuses[status] += 1
        return status

    async def steady(self, token: str) -> None:
        streams = await self.open()
        await asyncio.sleep(random.random())
        count = random.randrange(CHANGE_EVERY)
        while not self.over():
            count += 1
            if count % CHANGE_EVERY:
                await self.call(streams, token, "GET /forecast?num_gpus=1&memory_mib=100")
            else:
                lease_id = str(uuid.uuid4())
                await self.call(streams, token, "POST /leases", BODY % (lease_id, '"memory_mib": 100'))
                await self.call(streams, token, f"DELETE /leases/{lease_id}", timed=False)
            await asyncio.sleep(1.0)

    async def rate(self, token: str) -> None:
        streams = await self.open()
        while not self.over():
            await self.call(streams, token, "GET /leases")

    async def queue(self, token: str) -> None:
        streams = await self.open()
        while not self.over():
            size = '"num_gpus": 2, "partial": 1.0'
            await self.call(streams, token, "POST /leases", BODY % (uuid.uuid4(), size))

    async def connections(self, token: str) -> None:
        while not self.over():
            streams = await self.open()
            lease_id = str(uuid.uuid4())
            size = '"num_gpus": 2, "partial": 1.0'
            await self.call(streams, token, "POST /leases?wait=30", BODY % (lease_id, size))
            streams[1].close()


async def main(given: dict[str, Any]) -> None:
    load = Load(given)
    tenant: Callable[[str], Awaitable[None]] = getattr(load, given["kind"])
    copies = {"steady": 1, "connections": KEPT_OPEN}.get(given["kind"], CALLERS)
    left = max(0.0, given["until"] - time.time())
    work = [asyncio.ensure_future(tenant(token)) for token in given["tokens"] for _ in range(copies)]
    _, late = await asyncio.wait(work, timeout=left + 2.0)
    for one in late:
        one.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    print(json.dumps({"calls": load.calls, "statuses": load.statuses}))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.stdin.read())))
