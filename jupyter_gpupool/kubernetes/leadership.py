"""Who of several controllers leads, by a Lease of the API server."""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .api_server import APIServer, APIServerError, Conflict
from .pod_request import mapping

#: For how long, in seconds, a leader that is silent is waited for; how long it may act without having renewed; and how
#: often it renews. The second is well below the first, so that never two of them act.
DURATION_S, DEADLINE_S, RENEW_S = 15.0, 10.0, 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What a Lease said, and since when it has said so by this process's own clock."""

    holder: str
    renewed: str
    duration_s: float
    since: float

    def may_be_taken(self, by: str, now: float) -> bool:
        """Return whether it is free, one's own, or its holder has been silent for too long."""
        return self.holder in ("", by) or now - self.since >= self.duration_s


def seen(before: Seen | None, lease: Mapping[str, Any], now: float) -> Seen:
    """Return what a Lease says. Clocks of other machines are not relied on: only whether it says something new."""
    spec = mapping(lease, "spec")
    holder, renewed = str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or "")
    if before is not None and (before.holder, before.renewed) == (holder, renewed):
        return before
    return Seen(holder, renewed, float(spec.get("leaseDurationSeconds") or DURATION_S), now)


class Leadership:
    """Competes for the Lease ``name`` from a thread of its own. ``changed`` is set when it is won."""

    def __init__(
        self,
        api: APIServer,
        namespace: str,
        name: str,
        identity: str,
        changed: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._me, self._changed, self._clock = api, identity, changed, clock
        self._folder = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._metadata = {"name": name, "namespace": namespace}
        self._seen: Seen | None = None
        self._renewed_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpupool-leader", daemon=True)

    def start(self) -> None:
        """Begin to compete."""
        self._thread.start()

    def stop(self) -> None:
        """Give the Lease up, so that another one leads at once."""
        self._stop.set()
        self._thread.join(DEADLINE_S)

    def leads(self) -> bool:
        """Return whether this process may act now, which ends by itself where the Lease cannot be renewed."""
        renewed_at = self._renewed_at
        return renewed_at is not None and self._clock() - renewed_at < DEADLINE_S

    def step(self) -> None:
        """Renew or take the Lease, if that is possible now. Raises APIServerError."""
        led = self.leads()
        asked_at = self._clock()
        lease = self._api.find(f"{self._folder}/{self._metadata['name']}")
        try:
            if lease is None:
                self._api.create(self._folder, self._wanted({"metadata": self._metadata}, self._me))
            else:
                self._seen = seen(self._seen, lease, asked_at)
                if not self._seen.may_be_taken(self._me, asked_at):
                    self._renewed_at = None
                    return
                path = f"{self._folder}/{self._metadata['name']}"
                self._api.replace(path, self._wanted(lease, self._me))
        except Conflict:
            return  # another one was faster; the next step shows who
        self._renewed_at = asked_at
        if not led:
            logger.info("Leading as %s", self._me)
            self._changed.set()

    def resign(self) -> None:
        """Say that nobody holds the Lease, if it is this process's. Raises APIServerError."""
        self._renewed_at = None
        path = f"{self._folder}/{self._metadata['name']}"
        lease = self._api.find(path)
        if lease is not None and mapping(lease, "spec").get("holderIdentity") == self._me:
            self._api.replace(path, self._wanted(lease, ""))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except APIServerError as e:
                logger.warning("Cannot renew the Lease: %s", e)
            self._stop.wait(RENEW_S)
        try:
            self.resign()
        except APIServerError as e:
            logger.warning("Cannot give up the Lease: %s", e)

    def _wanted(self, lease: Mapping[str, Any], holder: str) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = mapping(lease, "spec")
        is_new = before.get("holderIdentity") != holder
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": int(DURATION_S),
            "renewTime": now,
            "acquireTime": now if is_new else before.get("acquireTime", now),
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (1 if is_new and holder else 0),
        }
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease["metadata"],
            "spec": spec,
        }
