"""Signs a user in at a pool whose tokens an identity provider issues, and keeps the token fresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import (
    InvalidRequest,
    IssuerUnavailable,
    NotSupported,
    PoolError,
    Unauthenticated,
)

from . import login_file, system_keyring
from .identity_provider import Denied, IdentityProvider
from .login_file import Login

#: The share of a token's longest age at which it is refreshed.
_EARLY = 0.75


def sign_in(
    offered: Mapping[str, Any],
    servers: Sequence[str],
    ca: str,
    path: Path,
    *,
    show: Callable[[str, str], None],
    open_page: Callable[[str], None] | None = None,
    issuer: str = "",
    keyring: bool = False,
) -> Login:
    """Log in and keep the login in a file. ``offered``: what the pool's ``GET login`` returned.

    ``keyring``: keep the tokens in the system's keyring, and in the file only where they are.
    ``show`` is called with the address and the code of a login by device, ``open_page`` with the address of one in
    this machine's browser, which is preferred where it is given. Raises PoolError.
    """
    found = [one for one in offered["issuers"] if issuer in ("", one["issuer"])]
    if not found:
        raise NotSupported("this pool has no such identity provider to log in at; use a token of the pool")
    if len(found) > 1:
        names = ", ".join(one["issuer"] for one in found)
        raise InvalidRequest(f"this pool has several identity providers; choose one with --issuer: {names}")
    one = found[0]
    if keyring:
        system_keyring.backend()  # before anybody logs in for nothing
    with IdentityProvider(one["issuer"], one["client_id"], one["ca"], one["parameters"]) as provider:
        endpoints = provider.discover()
        if open_page is not None:
            tokens = provider.by_browser(endpoints, one["scopes"], open_page)
        else:
            tokens = provider.by_device(endpoints, one["scopes"], show)
    age_s = one["max_age_s"]
    login = Login(
        servers=tuple(servers),
        ca=ca,
        issuer=one["issuer"],
        issuer_ca=one["ca"],
        client_id=one["client_id"],
        token_endpoint=endpoints["token_endpoint"],
        revocation_endpoint=str(endpoints.get("revocation_endpoint", "")),
        refresh_s=None if age_s is None else age_s * _EARLY,
        parameters=one["parameters"],
        access_token="",
        issued_at=0.0,
        expires_at=0.0,
        keyring=login_file.account(path, servers) if keyring else "",
    )
    login = _with(login, tokens, time.time())
    with login_file.locked(path):
        login_file.save(path, login)
    return login


def sign_out(path: Path) -> Login | None:
    """Delete the login, and make its refresh token worthless. Raises IssuerUnavailable where only the first worked.

    Raises InvalidRequest where the login is in a keyring that cannot be used, and leaves it there.
    """
    if not path.exists():
        return None
    with login_file.locked(path):
        try:
            login = login_file.load(path)
        finally:
            login_file.delete(path)
    if login is not None and login.refresh_token and login.revocation_endpoint:
        with _provider(login) as provider:
            provider.revoke(login.revocation_endpoint, login.refresh_token)
    return login


class FreshToken:
    """The access token of a login, refreshed when it is due, by whichever process notices it first."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._login: Login | None = None

    def get(self) -> str:
        """Return the token. Raises Unauthenticated where the user has to log in again.

        While the identity provider does not answer it is the old one, with which the pool keeps what runs.
        """
        if self._login is None or self._login.is_stale(time.time()):
            self._login = self._current()
        return self._login.access_token

    def _current(self) -> Login:
        login = self._load()
        if not login.is_stale(time.time()) or not login.refresh_token:
            return login
        with login_file.locked(self._path):
            login = self._load()
            now = time.time()
            if not login.is_stale(now):
                return login
            try:
                with _provider(login) as provider:
                    tokens = provider.refresh(login.token_endpoint, login.refresh_token)
            except IssuerUnavailable:
                return login
            except Denied as e:
                raise Unauthenticated(f"your login has ended ({e}); log in again: gpupool login") from None
            # Where there are no locks, the user may have logged out, or in again.
            kept = login_file.load(self._path)
            fresh = _with(login, tokens, now)
            if kept is not None and kept.refresh_token == login.refresh_token:
                login_file.save(self._path, fresh)
            return fresh

    def _load(self) -> Login:
        login = login_file.load(self._path)
        if login is None:
            raise Unauthenticated("you have logged out; log in again: gpupool login")
        return login


def _provider(login: Login) -> IdentityProvider:
    return IdentityProvider(login.issuer, login.client_id, login.issuer_ca, login.parameters)


def _with(login: Login, tokens: Mapping[str, Any], now: float) -> Login:
    try:
        return replace(
            login,
            access_token=str(tokens["access_token"]),
            refresh_token=str(tokens.get("refresh_token") or login.refresh_token),
            issued_at=now,
            expires_at=now + float(tokens.get("expires_in", 3600)),
        )
    except (KeyError, TypeError, ValueError):
        raise PoolError(f"{login.issuer} answered without an access token") from None
