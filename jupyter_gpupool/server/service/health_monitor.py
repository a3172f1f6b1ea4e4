"""Checks a pool's health in the background: its GPU servers, its ledger, its engine and its certificate.

A caller gets the last results with their age. No call waits for a driver, a disk or a database.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography import x509

from jupyter_gpupool.core.checks import Check, graded, worst
from jupyter_gpupool.core.engine import Engine
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Server
from jupyter_gpupool.gpus.health.diagnosis import diagnose, disk_check, marked
from jupyter_gpupool.pool.ledger.leader_lock import FOLLOWING
from jupyter_gpupool.pool.ledger.ledger import Ledger

from .leader_election import LeaderElection

__all__ = ["Check", "Health", "document", "worst"]

log = logging.getLogger(__name__)

#: Seconds between two checks, and the shortest time between two until every server has been read.
CHECK_INTERVAL_S, _MIN_CHECK_INTERVAL_S = 5.0, 0.1
#: Seconds between two writes to the ledger that measure how long one takes.
_LEDGER_CHECK_INTERVAL_S = 15.0
#: The longest time, in seconds, for which results wait for servers that have not been read yet.
_FIRST_READING_TIMEOUT_S = 15.0
_DAY_S = 86400.0


class Health:
    """Checks one pool.

    ``on_ledger`` runs a function of the ledger on the manager's thread. ``changed`` is called when the set of unhealthy
    GPUs changes; these get no new slices. Set ``servers`` to the engine's servers.
    """

    def __init__(
        self,
        engine: Engine,
        on_ledger: Callable[[Callable[[Ledger], Any]], Awaitable[Any]],
        changed: Callable[[], None],
    ) -> None:
        self.servers: tuple[Server, ...] = ()
        self.election: LeaderElection | None = None  # where several servers share the ledger
        self._engine = engine
        self._on_ledger = on_ledger
        self._changed = changed
        self._checks: tuple[Check, ...] = ()
        self._at = 0.0
        self._sick: Mapping[str, str] = {}
        self._ledger: tuple[Check, ...] = ()
        self._followed = False  # when the ledger was last looked at
        self._touched = -_LEDGER_CHECK_INTERVAL_S
        self._began = time.monotonic()
        self._looked = asyncio.Event()

    @property
    def sick(self) -> Mapping[str, str]:
        """Why a GPU gets no new slices, by the uuids of the unhealthy GPUs."""
        return self._sick

    @property
    def ok(self) -> bool:
        """Whether no check fails."""
        return worst(self._checks) != "failing"

    def marked(self, servers: Iterable[Server]) -> tuple[Server, ...]:
        """Return the servers with their unhealthy GPUs marked."""
        return tuple(marked(servers, self._sick))

    @property
    def latest(self) -> tuple[Check, ...]:
        """The last results; empty before the first check."""
        return self._checks

    async def checks(self) -> tuple[float, tuple[Check, ...]]:
        """Return when the pool was last checked, in seconds since the epoch, and the results."""
        await asyncio.wait_for(self._looked.wait(), 30.0)
        return self._at, self._checks

    async def run(self) -> None:
        """Check at intervals, until cancelled."""
        while True:
            began = time.monotonic()
            try:
                whole = await self.look()
            except Exception:  # the age of the last results shows it
                log.exception("The pool's health cannot be checked")
                whole = True
            # Checking thousands of GPUs takes a while, and must not slow other calls.
            soon = max(_MIN_CHECK_INTERVAL_S, 20 * (time.monotonic() - began))
            await asyncio.sleep(CHECK_INTERVAL_S if whole else min(soon, CHECK_INTERVAL_S))

    async def look(self) -> bool:
        """Check once, now. Returns whether every server has been read, or has had the time for it."""
        now, servers = time.time(), self.servers
        follows = self.election is not None and not self.election.leading
        if time.monotonic() - self._touched >= _LEDGER_CHECK_INTERVAL_S or self._followed != follows:
            self._touched, self._followed = time.monotonic(), follows
            self._ledger = await self._ledger_checks()
        if follows:  # the leader checks the GPUs
            self._checks, self._at = (*self._ledger, *self._lead()), now
            self._looked.set()
            return True
        readings = {reading.server: reading for reading in self._engine.readings()}
        diagnoses = [diagnose(readings.get(s.name), s.gpus, now, s.name) for s in servers]
        whole = (
            all(s.name in readings for s in servers)
            or time.monotonic() - self._began > _FIRST_READING_TIMEOUT_S
        )
        self._set_sick({uuid: why for diagnosis in diagnoses for uuid, why in diagnosis.sick.items()})
        found = [*self._ledger, *self._lead(), _gpus(servers, self._sick), self._workers()]
        found += _certificate(self._engine, now)
        self._checks = (*found, *(check for diagnosis in diagnoses for check in diagnosis.checks))
        self._at = now
        if whole:
            self._looked.set()
        return whole

    def _set_sick(self, sick: Mapping[str, str]) -> None:
        before, self._sick = self._sick, sick
        for uuid in sick.keys() - before.keys():
            log.error("GPU %s gets no new slices: %s", uuid, sick[uuid])
        for uuid in before.keys() - sick.keys():
            log.warning("GPU %s is well again", uuid)
        if sick != before:
            self._changed()

    async def _ledger_checks(self) -> tuple[Check, ...]:
        try:
            took, disk = await self._on_ledger(_timed_touch)
        except PoolError as e:
            advice = "the message says what; nothing is granted until then"
            return (Check("ledger", "failing", str(e), advice=advice),)
        ms = round(took * 1000, 2)
        touch = graded(
            "ledger",
            ms,
            "ms",
            at_most=50.0,
            fails_beyond=5000.0,
            detail=f"it answers in {ms:g} ms" if self._followed else f"a change is durable in {ms:g} ms",
            advice="put the ledger on a local SSD, or nearer to the pool; each grant waits for it",
        )
        return (touch, *disk)

    def _lead(self) -> list[Check]:
        if self.election is None:
            return []
        if self.election.leading:
            return [Check("lead", "ok", "this server leads")]
        if self.election.leader:
            return [Check("lead", "ok", f"this server follows the one at {self.election.leader}")]
        return [Check("lead", "failing", "no server leads", advice="see the log of each server")]

    def _workers(self) -> Check:
        engine = self._engine
        if engine.failure:
            return Check("engine", "failing", engine.failure, advice="until then leases are granted in vain")
        if engine.warm:
            return Check("engine", "ok", "ready to start workers")
        return Check("engine", "ok", "starting: PyTorch is being imported")


def document(at: float, checks: Iterable[Check], now: float) -> dict[str, Any]:
    """Return the results as JSON: ``status`` is the worst of all, ``time`` this machine's clock as it answers."""
    checks = tuple(checks)
    return {
        "status": worst(checks),
        "time": now,
        "age_s": round(max(0.0, now - at), 1),
        "checks": [asdict(check) for check in checks],
    }


def _timed_touch(ledger: Ledger) -> tuple[float, list[Check]]:
    began = time.perf_counter()
    if ledger.epoch == FOLLOWING:
        with ledger.reading() as tx:
            tx.granted_mib()
    else:
        ledger.check()
    took = time.perf_counter() - began
    if ledger.path is None:
        return took, []
    return took, [disk_check(str(ledger.path.parent), shutil.disk_usage(ledger.path.parent).free >> 20)]


def _gpus(servers: Sequence[Server], sick: Mapping[str, str]) -> Check:
    gpus = [gpu for server in servers for gpu in server.gpus]
    emulated = sum(gpu.emulated for gpu in gpus)
    detail = f"{len(gpus)} found" + (f", {emulated} of them emulated" if emulated else "")
    fit = len([gpu for gpu in gpus if gpu.uuid not in sick])
    if sick:
        detail += f", {len(gpus) - fit} of them unhealthy"
    status = "ok" if gpus and not sick else "failing"
    advice = (
        ""
        if status == "ok"
        else "see the checks of each GPU"
        if gpus
        else "gpupool server --emulate, or a driver"
    )
    return Check("gpus", status, detail, fit, "GPUs", "at least", max(1, len(gpus)), advice)


def _certificate(engine: Engine, now: float) -> list[Check]:
    certfile = getattr(engine, "certfile", "")  # not every engine has one
    if not certfile:
        return []
    advice = "gpupool server renew; a server that runs takes it up by itself"
    try:
        ends = expires_at(Path(certfile))
    except (OSError, ValueError) as e:
        return [Check("certificate", "failing", f"{certfile} cannot be read: {e}", advice=advice)]
    days = round((ends - now) / _DAY_S, 1)
    date = time.strftime("%Y-%m-%d", time.gmtime(ends))
    return [
        graded(
            "certificate",
            days,
            "days",
            at_least=30.0,
            fails_beyond=0.0,
            detail=f"{os.path.basename(certfile)} is valid until {date}",
            advice=advice,
        )
    ]


def expires_at(certfile: Path) -> float:
    """Return when a certificate (PEM) expires, in seconds since the epoch. Raises OSError and ValueError."""
    return x509.load_pem_x509_certificate(certfile.read_bytes()).not_valid_after_utc.timestamp()
