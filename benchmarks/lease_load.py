"""A load generator for farm_grants.py: requests leases as fast as the pool replies, over many plain sockets.

Usage: lease_load.py HOST PORT TOKEN CONNECTIONS LEASES SECONDS. It requests LEASES leases. Then, for SECONDS,
each connection requests one and releases its oldest. It prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid
from collections import deque

BODY = '{"id": "%s", "memory_mib": 200, "secret_sha256": "' + "0" * 64 + '", "wait": false}'


class Connection:
    def __init__(self, host: str, port: int, token: str) -> None:
        self.address = host, port
        self.head = f"HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nContent-Length: "
        self.held: deque[str] = deque()
        self.took: list[float] = []

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(*self.address)

    async def call(self, line: str, body: str = "") -> int:
        self.writer.write(f"{line} {self.head}{len(body)}\r\n\r\n{body}".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await self.reader.readexactly(length)
        return int(head[9:12])

    async def request(self) -> None:
        lease_id = str(uuid.uuid4())
        began = time.perf_counter()
        status = await self.call("POST /gpupool/api/v1/leases", BODY % lease_id)
        self.took.append(time.perf_counter() - began)
        assert status == 201, status
        self.held.append(lease_id)

    async def release(self) -> None:
        status = await self.call(f"DELETE /gpupool/api/v1/leases/{self.held.popleft()}")
        assert status == 200, status


async def main(host: str, port: int, token: str, connections: int, leases: int, seconds: float) -> None:
    some = [Connection(host, port, token) for _ in range(connections)]
    await asyncio.gather(*(one.open() for one in some))

    async def fill(one: Connection) -> None:
        for _ in range(leases // connections):
            await one.request()

    began = time.perf_counter()
    await asyncio.gather(*map(fill, some))
    filled = time.perf_counter() - began
    first = [took for one in some for took in one.took]
    for one in some:
        one.took = []
    end = time.perf_counter() + seconds

    async def turn_over(one: Connection) -> None:
        while time.perf_counter() < end:
            await one.request()
            await one.release()

    began = time.perf_counter()
    await asyncio.gather(*map(turn_over, some))
    elapsed = time.perf_counter() - began
    later = [took for one in some for took in one.took]
    print(
        json.dumps(
            {
                "grants_per_s": round(len(first) / filled, 1),
                **_percentiles("grant", first),
                "grants_and_releases_per_s": round(len(later) / elapsed, 1),
                **_percentiles("grant_beside_releases", later),
            }
        )
    )


def _percentiles(name: str, took: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(took, n=100)
    return {
        f"{name}_ms_p50": round(hundredths[49] * 1e3, 2),
        f"{name}_ms_p99": round(hundredths[98] * 1e3, 2),
    }


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:6]), float(sys.argv[6]))
    )
