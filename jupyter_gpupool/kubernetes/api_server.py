"""A client of the API server, as a Pod's account or with a token of a file."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx

from jupyter_gpupool.core.errors import PoolError

#: Where the kubelet puts the token of a Pod's account and the authority's certificate.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Whose fields are whose, for server-side apply.
_MANAGER = "gpupool"


class APIServerError(PoolError):
    """The API server does not answer, or refuses a call."""

    status = 502


class Conflict(APIServerError):
    """The object has changed since it was read, or exists already."""

    status = 409


class Expired(APIServerError):
    """The API server has no changes since that version any more."""

    status = 410


#: The API server's status → the error that it is raised as.
_KINDS: dict[int, type[APIServerError]] = {409: Conflict, 410: Expired}
#: How much longer than asked for, in seconds, a watch may last before it is taken for dead.
_WATCH_MARGIN_S = 15.0


class _FileToken(httpx.Auth):
    """The token of a file, which the kubelet replaces every hour."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        try:
            request.headers["Authorization"] = f"Bearer {self._file.read_text().strip()}"
        except OSError as e:
            raise APIServerError(f"the token {self._file} cannot be read: {e.strerror}") from None
        yield request


class APIServer:
    """``url``, ``token_file`` and ``ca_file`` default to those of the Pod that this process runs in."""

    def __init__(self, url: str = "", token_file: str = "", ca_file: str = "") -> None:
        """Raises APIServerError where there is no API server to be found."""
        host, port = (
            os.environ.get("KUBERNETES_SERVICE_HOST", ""),
            os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
        )
        if not url and not host:
            raise APIServerError(
                "which API server? This is no Pod; give --api-server, --api-token and --api-ca"
            )
        address = f"[{host}]" if ":" in host else host
        try:
            context = ssl.create_default_context(cafile=ca_file or str(ACCOUNT / "ca.crt"))
        except OSError as e:
            raise APIServerError(
                f"{ca_file or ACCOUNT / 'ca.crt'} cannot be used: {e.strerror or e}"
            ) from None
        self._http = httpx.Client(
            base_url=url or f"https://{address}:{port}",
            auth=_FileToken(Path(token_file) if token_file else ACCOUNT / "token"),
            verify=context,
            trust_env=False,
            timeout=30.0,
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def list_at(self, path: str, **query: str) -> tuple[list[dict[str, Any]], str]:
        """Return all objects below a path, and the version from which to watch them. Raises APIServerError."""
        found = self._call("GET", path, params=query)
        return list(found["items"]), str(found["metadata"]["resourceVersion"])

    def list(self, path: str, **query: str) -> list[dict[str, Any]]:
        """Return all objects below a path. Raises APIServerError."""
        return self.list_at(path, **query)[0]

    def watch(self, path: str, version: str, seconds: int, **query: str) -> Iterator[dict[str, Any]]:
        """Yield the changes since a version, as ``{"type", "object"}``, for so many seconds.

        Raises Expired where the version is too old, and APIServerError.
        """
        asked = {
            **query,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        timeout = httpx.Timeout(30.0, read=seconds + _WATCH_MARGIN_S)
        try:
            with self._http.stream("GET", path, params=asked, timeout=timeout) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal("GET", path, answer.status_code, answer.json())
                for line in answer.iter_lines():
                    event: dict[str, Any] = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _refusal("GET", path, event["object"].get("code", 0), event["object"])
                    yield event
        except (httpx.HTTPError, ValueError, KeyError) as e:
            why = str(e) or type(e).__name__
            raise APIServerError(f"the API server ends the watch of {path}: {why}") from None

    def find(self, path: str) -> dict[str, Any] | None:
        """Return an object; None if there is none. Raises APIServerError."""
        return self._call("GET", path, missing=True) or None

    def apply(self, path: str, wanted: dict[str, Any]) -> None:
        """Create an object, or give it these fields. Raises APIServerError."""
        query = {"fieldManager": _MANAGER, "force": "true"}
        headers = {"Content-Type": "application/apply-patch+yaml"}
        self._call("PATCH", path, params=query, content=json.dumps(wanted), headers=headers)

    def merge(self, path: str, fields: dict[str, Any]) -> None:
        """Change these fields of an object. Raises APIServerError."""
        headers = {"Content-Type": "application/merge-patch+json"}
        self._call("PATCH", path, content=json.dumps(fields), headers=headers)

    def create(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Create an object, and return it. Raises Conflict if it exists, and APIServerError."""
        return self._call("POST", path, json=wanted)

    def replace(self, path: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Replace an object of that version, and return it. Raises Conflict and APIServerError."""
        return self._call("PUT", path, json=wanted)

    def delete(self, path: str) -> None:
        """Delete an object, if there is one. Raises APIServerError."""
        self._call("DELETE", path, missing=True)

    def _call(self, method: str, path: str, missing: bool = False, **content: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **content)
            if missing and answer.status_code == 404:
                return {}
            body = answer.json()
        except (httpx.HTTPError, ValueError) as e:
            why = str(e) or type(e).__name__
            raise APIServerError(f"the API server does not answer {method} {path}: {why}") from None
        if not answer.is_success:
            raise _refusal(method, path, answer.status_code, body)
        found: dict[str, Any] = body
        return found


def _refusal(method: str, path: str, status: int, body: Any) -> APIServerError:
    message = body.get("message") if isinstance(body, dict) else status
    return _KINDS.get(status, APIServerError)(f"the API server refuses {method} {path}: {message}")
