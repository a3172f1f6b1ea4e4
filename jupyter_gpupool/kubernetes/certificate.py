"""A directory with the webhook's own authority and its certificate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.server.daemon.certificates import (
    SERVER_DAYS,
    Pair,
    expires_at,
    new_authority,
    new_server,
)

CA, CA_KEY, CERTIFICATE, KEY, NAMES = "ca.crt", "ca.key", "tls.crt", "tls.key", "names"


def kept_certificate(folder: Path, names: Sequence[str]) -> tuple[Pair, bytes]:
    """Return the certificate for these names, and its authority's; make what is missing or soon to expire.

    Raises PoolError where the directory cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / CA).exists():
            made = new_authority(names[0])
            _write(folder / CA_KEY, made.key)
            _write(folder / CA, made.certificate)
        authority = Pair((folder / CA).read_bytes(), (folder / CA_KEY).read_bytes())
        if not _is_good(folder, names):
            pair = new_server(authority, names)
            _write(folder / KEY, pair.key)
            _write(folder / CERTIFICATE, pair.certificate)
            _write(folder / NAMES, "\n".join(names).encode())
        return Pair((folder / CERTIFICATE).read_bytes(), (folder / KEY).read_bytes()), authority.certificate
    except OSError as e:
        raise PoolError(f"{folder} cannot be used for certificates: {e.strerror or e}") from None
    except ValueError:
        raise PoolError(f"{folder} holds files that are no certificates; name a new directory") from None


def _is_good(folder: Path, names: Sequence[str]) -> bool:
    if not (folder / NAMES).exists() or (folder / NAMES).read_text().splitlines() != list(names):
        return False
    left_s = expires_at((folder / CERTIFICATE).read_bytes()) - time.time()
    return left_s > SERVER_DAYS * 86400 / 3


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, content, 0o600)
