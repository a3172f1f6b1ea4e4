"""Objects of the cluster, kept as the API server has them by list and watch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from .api_server import APIServer, APIServerError, Expired
from .custom_resources import API_VERSION, SERVERS, SLICES
from .names import CONFIG_MAP, DEFAULT_SECRET, INJECTED, MANAGED

#: How long a watch lasts, in seconds, before it is renewed: so long may one that is dead go unnoticed.
_WATCH_S = 60
#: Seconds between two attempts after a failure: the first, and at most.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 10.0

logger = logging.getLogger(__name__)

#: What the controller watches: name → path and query.
KINDS: dict[str, tuple[str, Mapping[str, str]]] = {
    "namespaces": ("/api/v1/namespaces", {"labelSelector": f"{MANAGED}=true"}),
    "secrets": ("/api/v1/secrets", {"fieldSelector": f"metadata.name={DEFAULT_SECRET}"}),
    "addresses": ("/api/v1/configmaps", {"fieldSelector": f"metadata.name={CONFIG_MAP}"}),
    "quotas": ("/api/v1/resourcequotas", {}),
    "nodes": ("/api/v1/nodes", {}),
    "pods": ("/api/v1/pods", {"labelSelector": f"{INJECTED}=true"}),
    "slices": (f"/apis/{API_VERSION}/{SLICES}", {}),
    "servers": (f"/apis/{API_VERSION}/{SERVERS}", {}),
}


class NotListedYet(APIServerError):
    """Objects of some kind have never been listed so far."""


class Watched:
    """The objects of one kind, from a thread of its own. ``changed`` is set after every change."""

    def __init__(self, api: APIServer, path: str, query: Mapping[str, str], changed: threading.Event) -> None:
        self._api, self._path, self._query = api, path, query
        self._changed = changed
        self._objects: dict[str, dict[str, Any]] = {}
        self._listed = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"gpupool-watch {path}", daemon=True)

    def start(self) -> None:
        """Begin to list and to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End after the next change, or when the watch ends; returns at once."""
        self._stop.set()

    def objects(self) -> list[dict[str, Any]]:
        """Return the objects as they were seen last. Raises NotListedYet."""
        with self._lock:
            if not self._listed:
                raise NotListedYet(f"{self._path} has not been listed yet")
            return list(self._objects.values())

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            try:
                version = self._list()
                pause_s = _FIRST_PAUSE_S
                while not self._stop.is_set():
                    version = self._watch(version)
            except Expired:
                logger.debug("Listing %s again", self._path)
            except APIServerError as e:
                if not self._stop.is_set():
                    logger.warning("%s; trying again in %g s", e, pause_s)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _list(self) -> str:
        objects, version = self._api.list_at(self._path, **self._query)
        with self._lock:
            self._objects = {_uid(one): one for one in objects}
            self._listed = True
        self._changed.set()
        return version

    def _watch(self, version: str) -> str:
        for event in self._api.watch(self._path, version, _WATCH_S, **self._query):
            one = event["object"]
            version = str(one["metadata"]["resourceVersion"])
            if event["type"] == "BOOKMARK":
                continue
            with self._lock:
                if event["type"] == "DELETED":
                    self._objects.pop(_uid(one), None)
                else:
                    self._objects[_uid(one)] = one
            self._changed.set()
            if self._stop.is_set():
                break
        return version


class ClusterWatch:
    """All that the controller watches, by the names of :data:`KINDS`."""

    def __init__(self, api: APIServer, changed: threading.Event) -> None:
        self._kinds = {name: Watched(api, path, query, changed) for name, (path, query) in KINDS.items()}

    def start(self) -> None:
        """Begin to list and to watch."""
        for kind in self._kinds.values():
            kind.start()

    def stop(self) -> None:
        """End; returns at once."""
        for kind in self._kinds.values():
            kind.stop()

    def objects(self, kind: str) -> list[dict[str, Any]]:
        """Return the objects of a kind. Raises NotListedYet."""
        return self._kinds[kind].objects()


def _uid(one: Mapping[str, Any]) -> str:
    return str(one["metadata"]["uid"])
