"""What JupyterHub calls in a server's life, around whatever the configuration had there before."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ...pool.errors import NoCapacity, PoolError
from . import options
from .calls import Service
from .form import merged
from .options import KEY, Choice, Limits, parse

#: The names of the traits that are hooked; also what they are called here.
HOOKED = (
    "options_form",
    "options_from_form",
    "apply_user_options",
    "auth_state_hook",
    "pre_spawn_hook",
    "post_stop_hook",
)
#: What a single-user server's environment says; see docs/architecture.md.
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
    """One server's start, as far as this process has followed it."""

    lease: str
    choice: Choice
    status: dict[str, Any] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, status: dict[str, Any]) -> None:
        self.status = status
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Hooks:
    """One for each hub. ``limits``: what may be chosen, or a function of the spawner that says so."""

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
        return self  # configurations are copied for every spawner; what has begun is the hub's

    def limits(self, spawner: Any) -> Limits:
        return self._limits(spawner) if callable(self._limits) else self._limits

    # -- the page

    async def options_form(self, spawner: Any, before: Any) -> str:
        """The form that there was, and ours."""
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
        """Ours under a key of its own; the rest as it was read before. May answer an awaitable, as before."""
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
        """However they came: by the form, by REST, or kept from the last time."""
        self.choice(spawner)
        rest = {k: v for k, v in said.items() if k != KEY}
        if isinstance(before, dict):
            _apply(spawner, before, rest)
        elif before is not None:
            await _result(before(spawner, rest))

    def choice(self, spawner: Any) -> Choice | None:
        """What the server is to have. Raises a SpawnException."""
        try:
            return parse((spawner.user_options or {}).get(KEY), self.limits(spawner))
        except PoolError as e:
            raise refusal(e) from None

    # -- a server's life

    async def auth_state_hook(self, spawner: Any, state: Any, before: Any) -> None:
        """The first thing that happens to a spawner, by whatever way: from here on it tells of our progress."""
        if before is not None:
            await _result(before(spawner, state))
        if not hasattr(spawner, "_gpupool_progress"):
            spawner._gpupool_progress = spawner.progress
            spawner.progress = lambda: self.progress(spawner)

    async def pre_spawn_hook(self, spawner: Any, before: Any) -> None:
        """Returns when the server may start. Raises a SpawnException, with nothing left behind."""
        if before is not None:
            await _result(before(spawner))
        key = (spawner.user.name, spawner.name)
        choice = self.choice(spawner)
        for name in (URL, TOKEN, CA, MODE, DEFAULT, ATTACH):
            spawner.environment.pop(name, None)
        try:
            if choice is None:
                await self._service.end(*key)  # what an earlier start may have left
                return
            start = self._starts[key] = _Start(str(uuid.uuid4()), choice)
            start.tell(await self._begin(spawner, start))
            if self._mode == "server":
                await self._granted(key, start)
                # Whoever waited may have waited for what is allowed no more.
                if self.choice(spawner) != choice:
                    raise NoCapacity("what you chose has changed meanwhile; choose again")
        except PoolError as e:
            await self._abandon(key)
            raise refusal(e) from None
        except BaseException:
            await asyncio.shield(self._abandon(key))
            raise
        spawner.environment.update(self._environment(spawner, choice))

    def _environment(self, spawner: Any, choice: Choice) -> dict[str, str]:
        environment = {
            URL: self._url,
            TOKEN: spawner.api_token,
            MODE: self._mode,
            ATTACH: self._attach,
            DEFAULT: choice.to_text(),
        }
        return {**environment, CA: self._ca} if self._ca else environment

    async def _begin(self, spawner: Any, start: _Start) -> dict[str, Any]:
        return await self._service.begin(
            spawner.user.name,
            spawner.name,
            _groups(spawner),
            start.lease,
            self._mode,
            start.choice.to_json(),
        )

    async def _granted(self, key: tuple[str, str], start: _Start) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._queue_timeout_s
        while start.status["state"] != "ACTIVE":
            if start.status["state"] not in ("QUEUED", "GRANTED"):
                why = start.status.get("reason", "")
                if why in ("", "released"):
                    why = f"the request for {start.choice} was taken back; start the server again to ask anew"
                raise NoCapacity(why)
            if loop.time() > until:
                position = start.status.get("position")
                raise NoCapacity(
                    f"no GPUs for {start.choice} within {self._queue_timeout_s:g} s; you were number {position} "
                    "in the queue. Choose less, or try again later"
                )
            start.tell(await self._service.news(*key, start.status))

    async def _abandon(self, key: tuple[str, str]) -> None:
        start = self._starts.pop(key, None)
        if start is not None:
            start.changed.set()
            try:
                await self._service.end(*key, start.lease)
            except PoolError:
                pass  # the service asks the hub what runs, and ends what does not

    async def post_stop_hook(self, spawner: Any, before: Any) -> None:
        """Stopped, culled, killed or never started: what it holds goes back."""
        key = (spawner.user.name, spawner.name)
        start = self._starts.pop(key, None)
        if start is not None:
            start.changed.set()
        try:
            await self._service.end(*key)
        except PoolError as e:
            spawner.log.warning(
                "The GPUs of %s are given back by the service itself: %s", spawner._log_name, e
            )
        finally:
            if before is not None:
                await _result(before(spawner))

    async def progress(self, spawner: Any) -> AsyncIterator[dict[str, Any]]:
        """The place in the queue while there is one; then the spawner's own."""
        key = (spawner.user.name, spawner.name)
        start = self._starts.get(key)
        told: dict[str, Any] = {}
        while start is not None and start is self._starts.get(key) and self._mode == "server":
            changed, status = start.changed, start.status
            if status.get("state") == "ACTIVE":
                yield {"progress": 40, "message": f"Got {start.choice} of the GPU pool"}
                break
            event = self._waiting(start.choice, status)
            if event != told:
                yield event
            told = event
            await changed.wait()
        if start is not None and start is not self._starts.get(key):
            return  # it came to nothing; JupyterHub says why
        async for theirs in spawner._gpupool_progress():
            yield theirs

    def _waiting(self, choice: Choice, status: dict[str, Any]) -> dict[str, Any]:
        if status.get("state") != "QUEUED":
            return {"progress": 30, "message": f"Preparing {choice} of the GPU pool"}
        text = f"Waiting for {choice} of the GPU pool: number {status.get('position')} in the queue"
        return {
            "progress": 10,
            "message": text,
            "html_message": f'{escape(text)} (<a href="{escape(self._page)}" target="_blank">look, or leave</a>)',
        }


def refusal(why: PoolError) -> Exception:
    """What JupyterHub shows on its pages instead of starting a server."""
    from tornado.web import HTTPError

    line = " ".join(str(why).split())
    status = why.status if 400 <= why.status < 500 else 503
    reason = "capacity" if isinstance(why, NoCapacity) or status == 503 else "gpu-options"
    try:
        from jupyterhub.spawner import SpawnException
    except ImportError:  # JupyterHub 5
        error: Any = HTTPError(status, line.replace("%", "%%"), reason="GPU refused")
    else:
        error = SpawnException(line, reason=reason, status_code=status)
    error.jupyterhub_message = line
    return error


def _groups(spawner: Any) -> list[str]:
    return sorted(group.name for group in spawner.user.groups)


def _default(spawner: Any, name: str) -> Any:
    """What a trait would be that nobody had configured."""
    return spawner.trait_defaults(name)


def _apply(spawner: Any, attributes: dict[str, str], said: dict[str, Any]) -> None:
    ours, spawner.apply_user_options = spawner.apply_user_options, attributes
    try:
        spawner._apply_user_options_dict(said)
    finally:
        spawner.apply_user_options = ours


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
