"""A hundred users of a JupyterHub start servers at once, each with a slice of the pool.

Their servers are small programs that reply to the hub, not Jupyter's own, so that only the hub and the pool are
measured. Every lease has a real worker.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.hub.running import TOKEN, Hub

USERS = 100
GOALS = {"all_running_s": ("<=", 60.0), "errors": ("<=", 0)}
_ROOT = Path(__file__).resolve().parent.parent
#: Ten users per GPU, so that all of them fit at once.
_OPTIONS = ["--LocalEngine.emulated_count=10"]
_MORE = (
    "c.JupyterHub.concurrent_spawn_limit = 0\nc.JupyterHub.log_level = 'WARN'\nc.Spawner.http_timeout = 120"
)


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpupool-hub-") as folder:
        hub = Hub(Path(folder), _ROOT, _MORE, light=True, limits={"max_gpus": 1}, options=_OPTIONS)
        try:
            hub.start()
            return asyncio.run(_measured(hub))
        finally:
            hub.end()


async def _measured(hub: Hub) -> dict[str, Any]:
    names = [f"user-{n}" for n in range(USERS)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"{hub.url}/hub/api",
        headers={"Authorization": f"token {TOKEN}"},
        timeout=300,
        limits=limits,
    ) as http:
        (await http.post("/users", json={"usernames": names})).raise_for_status()
        began = time.monotonic()
        took = await asyncio.gather(*(_started(http, name) for name in names))
        all_running = time.monotonic() - began
        leases = await asyncio.to_thread(hub.pool().leases)
        active = {lease.request.owner for lease in leases if lease.state.value == "ACTIVE"}
        errors = [t for t in took if isinstance(t, str)]
        began = time.monotonic()
        await asyncio.gather(*(http.delete(f"/users/{name}/server") for name in names))
        while await asyncio.to_thread(hub.pool().leases):
            await asyncio.sleep(0.1)
        seconds = sorted(t for t in took if isinstance(t, float))
    return {
        "users": USERS,
        "all_running_s": round(all_running, 1),
        "median_s": round(statistics.median(seconds), 1) if seconds else None,
        "p95_s": round(seconds[int(len(seconds) * 0.95) - 1], 1) if seconds else None,
        "leases_held": len(active & set(names)),
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "all_given_back_s": round(time.monotonic() - began, 1),
    }


async def _started(http: httpx.AsyncClient, name: str) -> float | str:
    """Return the seconds until the hub reports the server ready, or the error."""
    began = time.monotonic()
    answer = await http.post(f"/users/{name}/server", json={"gpupool": {"num_gpus": 1, "partial": 0.1}})
    if answer.status_code not in (201, 202):
        return f"{answer.status_code}: {answer.text[:200]}"
    async with http.stream("GET", f"/users/{name}/server/progress") as events:
        async for line in events.aiter_lines():
            if '"ready": true' in line:
                return time.monotonic() - began
            if '"failed": true' in line:
                return line[:300]
    return "the hub stopped telling"
