"""The spawner hooks of JupyterHub. Each calls the hook that was configured before it, too."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from jupyter_gpupool.core.errors import NoCapacity, PoolError

from . import options
from .options import KEY, GPUOptions, Limits, ServerStart, parse
from .service_client import Service
from .spawn_form import merged

#: The spawner's traits that are hooked. Each is a method of :class:`Hooks` of the same name.
HOOKED = (
    "options_form",
    "options_from_form",
    "apply_user_options",
    "auth_state_hook",
    "pre_spawn_hook",
    "post_stop_hook",
)
#: What a single-user server's environment says; see docs/explanation/jupyterhub.md.
URL, TOKEN, CA, MODE, DEFAULT, ATTACH = (
    "GPUPOOL_URL",
    "GPUPOOL_TOKEN",
    "GPUPOOL_CA",
    "GPUPOOL_HUB_MODE",
    "GPUPOOL_HUB_DEFAULT",
    "GPUPOOL_HUB_ATTACH",
)


@dataclass
class _Start:
    """The start of one server, as this process knows it."""

    lease: str
    choice: GPUOptions
    status: dict[str, Any] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, status: dict[str, Any]) -> None:
        self.status = status
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Hooks:
    """The hooks of one hub. ``limits`` are what users may choose, or a function of the spawner that returns that."""

    def __init__(
        self,
        service: Service,
        *,
        url: str,
        page: str,
        limits: Limits | Callable[[Any], Limits],
        mode: str,
        attach: str = "auto",
        queue_timeout_s: float,
        ca: str = "",
    ) -> None:
        self._service = service
        self._url = url
        self._page = page
        self._limits = limits
        self._mode = mode
        self._attach = attach
        self._queue_timeout_s = queue_timeout_s
        self._ca = ca
        self._starts: dict[tuple[str, str], _Start] = {}

    def __deepcopy__(self, memo: Any) -> Hooks:
        return self  # configurations are copied for every spawner; the starts must stay shared

    def limits(self, spawner: Any) -> Limits:
        """Return what the spawner's user may choose."""
        return self._limits(spawner) if callable(self._limits) else self._limits

    # -- the page

    async def options_form(self, spawner: Any, before: Any) -> str:
        """Return the configured form, with the GPU fields added."""
        theirs = _default(spawner, "options_form") if before is None else before
        if callable(theirs):
            theirs = await _result(theirs(spawner))
        try:
            offer = await self._service.offer(_groups(spawner))
        except PoolError as e:
            offer = {"servers": [], "reason": str(e)}
        said = (spawner.user_options or {}).get(KEY) if isinstance(spawner.user_options, dict) else None
        return merged(theirs or "", self.limits(spawner), offer, said if isinstance(said, dict) else {})

    def options_from_form(self, data: dict[str, Any], spawner: Any, before: Any) -> Any:
        """Read the GPU fields under a key of their own, and the rest as configured.

        Returns an awaitable if the configured function does.
        """
        theirs = {k: v for k, v in data.items() if not k.startswith(f"{KEY}_")}
        read = _default(spawner, "options_from_form") if before is None and spawner is not None else before
        if read is None or read == "passthrough":
            rest: Any = theirs
        elif read == "simple":
            rest = {k: v[0] if len(v) == 1 else v for k, v in theirs.items()}
        elif "spawner" in inspect.signature(read).parameters:
            rest = read(theirs, spawner=spawner)
        else:
            rest = read(theirs)
        ours = options.from_form(data)
        if inspect.isawaitable(rest):
            return self._joined(rest, ours)
        return {**rest, KEY: ours}

    async def _joined(self, rest: Any, ours: dict[str, Any]) -> dict[str, Any]:
        return {**(await rest), KEY: ours}

    async def apply_user_options(self, spawner: Any, said: dict[str, Any], before: Any) -> None:
        """Check the choice, whether it comes from the form, by REST, or from the last start."""
        self.choice(spawner)
        rest = {k: v for k, v in said.items() if k != KEY}
        if isinstance(before, dict):
            _apply(spawner, before, rest)
        elif before is not None:
            await _result(before(spawner, rest))

    def choice(self, spawner: Any) -> GPUOptions | None:
        """Return the GPUs that were chosen for the server. Raises a SpawnException."""
        try:
            return parse((spawner.user_options or {}).get(KEY), self.limits(spawner))
        except PoolError as e:
            raise refusal(e) from None

    # -- a server's life

    async def auth_state_hook(self, spawner: Any, state: Any, before: Any) -> None:
        """Add the queue's progress to the spawner's. Every start calls this hook first."""
        if before is not None:
            await _result(before(spawner, state))
        if not hasattr(spawner, "_gpupool_progress"):
            spawner._gpupool_progress = spawner.progress
            spawner.progress = lambda: self.progress(spawner)

    async def pre_spawn_hook(self, spawner: Any, before: Any) -> None:
        """Return when the server may start. Raises a SpawnException, and then leaves nothing behind."""
        if before is not None:
            await _result(before(spawner))
        key = (spawner.user.name, spawner.name)
        choice = self.choice(spawner)
        for name in (URL, TOKEN, CA, MODE, DEFAULT, ATTACH):
            spawner.environment.pop(name, None)
        try:
            if choice is None:
                await self._service.end(*key)  # an earlier start may have left something
                return
            start = self._starts[key] = _Start(str(uuid.uuid4()), choice)
            start.update(await self._begin(spawner, start))
            if self._mode == "server":
                await self._granted(key, start)
                # The limits may have changed while the request waited in the queue.
                if self.choice(spawner) != choice:
                    raise NoCapacity("your choice changed while you waited; start the server again")
        except PoolError as e:
            await self._abandon(key)
            raise refusal(e) from None
        except BaseException:
            await asyncio.shield(self._abandon(key))
            raise
        spawner.environment.update(self._environment(spawner, choice))

    def _environment(self, spawner: Any, choice: GPUOptions) -> dict[str, str]:
        environment = {
            URL: self._url,
            TOKEN: spawner.api_token,
            MODE: self._mode,
            ATTACH: self._attach,
            DEFAULT: choice.to_text(),
        }
        return {**environment, CA: self._ca} if self._ca else environment

    async def _begin(self, spawner: Any, start: _Start) -> dict[str, Any]:
        told = ServerStart(_groups(spawner), start.lease, self._mode, start.choice)
        return await self._service.begin(spawner.user.name, spawner.name, told)

    async def _granted(self, key: tuple[str, str], start: _Start) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._queue_timeout_s
        while start.status["state"] != "ACTIVE":
            if start.status["state"] not in ("QUEUED", "GRANTED"):
                why = start.status.get("reason", "")
                if why in ("", "released"):
                    why = f"the request for {start.choice} was withdrawn; start the server again to make a new one"
                raise NoCapacity(why)
            if loop.time() > until:
                position = start.status.get("position")
                raise NoCapacity(
                    f"{start.choice} was not free within {self._queue_timeout_s:g} s; your request was at position "
                    f"{position} in the queue. Choose less, or try again later"
                )
            start.update(await self._service.news(*key, start.status))

    async def _abandon(self, key: tuple[str, str]) -> None:
        start = self._starts.pop(key, None)
        if start is not None:
            start.changed.set()
            try:
                await self._service.end(*key, start.lease)
            except PoolError:
                pass  # the service regularly asks the hub which servers run, and ends the others itself

    async def post_stop_hook(self, spawner: Any, before: Any) -> None:
        """Release what the server holds, whether it was stopped, culled, killed or never started."""
        key = (spawner.user.name, spawner.name)
        start = self._starts.pop(key, None)
        if start is not None:
            start.changed.set()
        try:
            await self._service.end(*key)
        except PoolError as e:
            spawner.log.warning(
                "Cannot release the GPUs of %s now; the service will do so itself: %s", spawner._log_name, e
            )
        finally:
            if before is not None:
                await _result(before(spawner))

    async def progress(self, spawner: Any) -> AsyncIterator[dict[str, Any]]:
        """Report the position in the queue while the request waits; then the spawner's own progress."""
        key = (spawner.user.name, spawner.name)
        start = self._starts.get(key)
        last: dict[str, Any] = {}
        while start is not None and start is self._starts.get(key) and self._mode == "server":
            changed, status = start.changed, start.status
            if status.get("state") == "ACTIVE":
                yield {"progress": 40, "message": f"GPU slices granted: {start.choice}"}
                break
            event = self._waiting(start.choice, status)
            if event != last:
                yield event
            last = event
            await changed.wait()
        if start is not None and start is not self._starts.get(key):
            return  # the start has failed; JupyterHub shows why
        async for theirs in spawner._gpupool_progress():
            yield theirs

    def _waiting(self, choice: GPUOptions, status: dict[str, Any]) -> dict[str, Any]:
        if status.get("state") != "QUEUED":
            return {"progress": 30, "message": f"Preparing GPU slices: {choice}"}
        text = f"Waiting for GPU slices ({choice}): position {status.get('position')} in the queue"
        link = f'<a href="{escape(self._page)}" target="_blank">view or leave the queue</a>'
        return {"progress": 10, "message": text, "html_message": f"{escape(text)} ({link})"}


def refusal(why: PoolError) -> Exception:
    """Return the error that JupyterHub shows on its pages instead of starting a server."""
    from tornado.web import HTTPError

    line = " ".join(str(why).split())
    status = why.status if 400 <= why.status < 500 else 503
    reason = "capacity" if isinstance(why, NoCapacity) or status == 503 else "gpu-options"
    try:
        from jupyterhub.spawner import SpawnException
    except ImportError:  # JupyterHub 5
        error: Any = HTTPError(status, line.replace("%", "%%"), reason="GPUs not available")
    else:
        error = SpawnException(line, reason=reason, status_code=status)
    error.jupyterhub_message = line
    refused: Exception = error
    return refused


def _groups(spawner: Any) -> list[str]:
    return sorted(group.name for group in spawner.user.groups)


def _default(spawner: Any, name: str) -> Any:
    """Return the default of a trait."""
    return spawner.trait_defaults(name)


def _apply(spawner: Any, attributes: dict[str, str], said: dict[str, Any]) -> None:
    ours, spawner.apply_user_options = spawner.apply_user_options, attributes
    try:
        spawner._apply_user_options_dict(said)
    finally:
        spawner.apply_user_options = ours


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
