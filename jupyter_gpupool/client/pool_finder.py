"""Find the pool to use: the one named, the one of a bundle, the user's own, or one that is started."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import Callable
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest, PoolUnreachable

from . import bundle, discovery
from .http import PoolClient

#: Environment variables: the pool's address and token, where neither is given.
URL_VARIABLE = "GPUPOOL_URL"
TOKEN_VARIABLE = "GPUPOOL_TOKEN"
#: The certificate of the only authority to trust for that pool: the lines of a PEM file between its first and its
#: last, joined. Programs that pass an environment on may break values that contain a newline.
CA_VARIABLE = "GPUPOOL_CA"


def find_pool(
    url: str | None = None,
    token: str | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    patience_s: float = 2.0,
) -> tuple[PoolClient, dict[str, Any]]:
    """Return a client of the pool to use, and the pool's answer to ``GET pool``.

    The pool is, in this order: ``url``; ``GPUPOOL_URL``; the servers in the installed bundle; this user's running
    pool; a new pool, which is started. ``say`` is called with a line for people before a step that takes longer than
    a moment. ``patience_s``: how long to retry while the pool does not answer, in seconds.
    Raises PoolUnreachable and other PoolErrors.
    """
    url = url or os.environ.get(URL_VARIABLE)
    installed = bundle.find()
    token = token or os.environ.get(TOKEN_VARIABLE, "")
    if url and (installed is None or not installed.covers(url)):
        return _connected(PoolClient(url, token, patience_s=patience_s, ca=ca_for(url)))
    if installed is not None:
        login = "" if token else installed.login
        first, *others = (url, *installed.urls) if url else installed.urls
        return _connected(
            PoolClient(
                first,
                token or installed.token,
                patience_s=patience_s,
                ca=installed.ca,
                also=others,
                bundled=not token and not login,
                login=login,
            )
        )

    def successor() -> tuple[str, str]:
        say("The GPU pool has just ended. Looking for another one")
        address = discovery.find_or_start(say)
        return address.url, address.token

    address = discovery.find_or_start(say)
    # The pool may be about to end, because the work that it was started for has ended.
    return _connected(PoolClient(address.url, address.token, patience_s=patience_s, successor=successor))


def running_pool(
    url: str | None = None, *, patience_s: float = 2.0
) -> tuple[PoolClient, dict[str, Any]] | None:
    """Return what :func:`find_pool` returns where a pool is named or runs already, None where it would start one.

    Raises PoolUnreachable and other PoolErrors.
    """
    if url or os.environ.get(URL_VARIABLE) or bundle.find() is not None:
        return find_pool(url, patience_s=patience_s)
    address = discovery.find()
    if address is None:
        return None
    try:
        return _connected(PoolClient(address.url, address.token, patience_s=patience_s))
    except PoolUnreachable:
        if discovery.find() == address:
            raise
        return None  # it ended in this moment


def ca_for(url: str) -> str:
    """Return the certificate (PEM) that ``GPUPOOL_CA`` gives for the pool at ``url``; empty where it gives none.

    Raises InvalidRequest where the variable contains no certificate.
    """
    text = os.environ.get(CA_VARIABLE, "") if url == os.environ.get(URL_VARIABLE) else ""
    try:
        return ssl.DER_cert_to_PEM_cert(base64.b64decode(text, validate=True)) if text else ""
    except ValueError:
        raise InvalidRequest(f"{CA_VARIABLE} holds no certificate; unset it, or set it again") from None


def _connected(client: PoolClient) -> tuple[PoolClient, dict[str, Any]]:
    try:
        return client, client.pool()
    except BaseException:
        client.close()
        raise
