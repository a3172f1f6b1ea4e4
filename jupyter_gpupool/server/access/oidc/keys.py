"""The keys by which tokens are checked, as issuers publish them: fetched, kept, and replaced when they rotate."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key

from jupyter_gpupool.core.errors import IssuerUnavailable

from .issuers import Issuer
from .verification import Refused

#: How old keys may be before they are fetched again beside a call that uses them, in seconds.
REFRESH_S = 300.0
#: Seconds between two attempts to fetch the keys, whatever strangers say about themselves.
MIN_INTERVAL_S = 5.0
_TIMEOUT_S = 5.0
_MAX_BYTES = 512 * 1024
_KINDS = ("RSA", "EC", "OKP")


class KeySource(Protocol):
    """Where an issuer's keys come from. Another one can be given for an issuer that does not publish them."""

    async def find(self, kid: str | None) -> Key:
        """Return the key of that id; of an issuer with one key, None is its id.

        Raises Refused for an unknown key, and IssuerUnavailable where the issuer cannot be asked for it.
        """


class PublishedKeys:
    """The keys that an issuer publishes at its ``jwks_uri``, which its discovery document names."""

    def __init__(
        self,
        issuer: Issuer,
        clock: Callable[[], float] = time.monotonic,
        headers: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """``headers`` returns those of every request for the keys (default: the token of ``keys_token_file``).

        Raises OSError where the CA cannot be read.
        """
        self._issuer = issuer
        self._clock = clock
        self._headers = headers or self._token_of_file
        self._context = ssl.create_default_context(cafile=issuer.ca_file or None)
        self._keys: dict[str | None, Key] = {}
        self._trouble = ""
        self._fetched_at = self._tried_at = -1e9
        self._fetching = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    async def find(self, kid: str | None) -> Key:
        key = self._known(kid)
        if key is None:
            await self._refresh()
            key = self._known(kid)
        elif self._clock() - self._fetched_at > REFRESH_S and self._is_due():
            self._refreshing = asyncio.create_task(self._refresh())
        if key is not None:
            return key
        if self._trouble:
            raise IssuerUnavailable(
                f"your token cannot be checked, for the keys of {self._issuer.issuer} cannot be fetched "
                f"({self._trouble}); try again in a minute"
            )
        # It may be one that the issuer has just begun to use, and no signature was examined.
        raise Refused("its key is none of those that its issuer publishes", is_guess=False)

    def _token_of_file(self) -> Mapping[str, str]:
        """Raises OSError, which counts as trouble with fetching the keys."""
        file = self._issuer.keys_token_file
        return {"Authorization": f"Bearer {Path(file).read_text().strip()}"} if file else {}

    def _known(self, kid: str | None) -> Key | None:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid) if kid is not None else None

    def _is_due(self) -> bool:
        return self._clock() - self._tried_at >= MIN_INTERVAL_S

    async def _refresh(self) -> None:
        """Fetch the keys, unless that was tried a moment ago. Keys that are known stay where it fails."""
        async with self._fetching:
            if not self._is_due():
                return
            self._tried_at = self._clock()
            try:
                keys = await asyncio.wait_for(self._fetch(), 2 * _TIMEOUT_S)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RecursionError) as e:
                self._trouble = str(e) or type(e).__name__
            except asyncio.TimeoutError:
                self._trouble = "it does not answer"
            else:
                self._keys, self._trouble, self._fetched_at = keys, "", self._clock()

    async def _fetch(self) -> dict[str | None, Key]:
        async with httpx.AsyncClient(verify=self._context, timeout=_TIMEOUT_S) as http:
            uri: Any = self._issuer.jwks_uri
            if not uri:
                found = await self._get(
                    http, f"{self._issuer.issuer.rstrip('/')}/.well-known/openid-configuration"
                )
                if found.get("issuer") != self._issuer.issuer:
                    raise ValueError(f"its discovery document names the issuer {found.get('issuer')!r}")
                uri = found.get("jwks_uri")
                if not isinstance(uri, str) or not uri.startswith("https://"):
                    raise ValueError("its discovery document has no jwks_uri of https")
            published = (await self._get(http, uri)).get("keys")
        keys = dict(_usable(published if isinstance(published, list) else []))
        if not keys:
            raise ValueError("it publishes no key that signs tokens")
        return keys

    async def _get(self, http: httpx.AsyncClient, url: str) -> dict[str, Any]:
        content = b""
        async with http.stream("GET", url, headers=dict(self._headers())) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{url} answered with status {answer.status_code}")
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _MAX_BYTES:
                    raise ValueError(f"{url} answered with more than {_MAX_BYTES} bytes")
        found = json.loads(content)
        return found if isinstance(found, dict) else {}


def _usable(published: list[Any]) -> Iterator[tuple[str | None, Key]]:
    """Yield the keys that check signatures, by id. One that is secret, or not understood, is none of them."""
    for data in published:
        if not isinstance(data, dict) or data.get("kty") not in _KINDS or data.get("use", "sig") != "sig":
            continue
        kid = data.get("kid")
        try:
            key = JWKRegistry.import_key({k: v for k, v in data.items() if k != "d"})
        except (JoseError, ValueError, TypeError, KeyError):
            continue
        if kid is None or isinstance(kid, str):
            yield kid, key
