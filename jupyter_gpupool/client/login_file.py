"""What `gpupool login` keeps: a file beside the bundle, with the tokens of a user's identity provider."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.files import write_atomically

NAME = "login.json"


@dataclass(frozen=True)
class Login:
    """A login: at which servers it counts, whose client it is, and its tokens. Times are seconds since the epoch.

    ``refresh_s``: how old the access token may become. ``parameters``: what the issuer's token endpoint wants besides.
    """

    servers: tuple[str, ...]
    ca: str
    issuer: str
    issuer_ca: str
    client_id: str
    token_endpoint: str
    revocation_endpoint: str
    access_token: str
    issued_at: float
    expires_at: float
    refresh_token: str = ""
    refresh_s: float | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def is_stale(self, now: float) -> bool:
        """Return whether the access token has to be refreshed before it is used."""
        age_s = abs(now - self.issued_at)
        return now > self.expires_at - 10.0 or (self.refresh_s is not None and age_s > self.refresh_s)


def load(path: Path) -> Login | None:
    """Return the login of that file, None without one. Raises InvalidRequest for a broken file."""
    try:
        data: Any = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise InvalidRequest(
            f"{path} cannot be read ({getattr(e, 'strerror', None) or e}); {_ADVICE}"
        ) from None
    try:
        known = {one.name for one in fields(Login)}
        kept = {name: value for name, value in data.items() if name in known}
        return Login(**{**kept, "servers": tuple(kept["servers"])})
    except (AttributeError, KeyError, TypeError):
        raise InvalidRequest(f"{path} is not what gpupool login writes; {_ADVICE}") from None


_ADVICE = "log out and in again: gpupool logout, gpupool login"


def save(path: Path, login: Login) -> None:
    """Write the file, which only its owner can read. Raises InvalidRequest."""
    try:
        _make_folder(path)
        write_atomically(path, json.dumps(asdict(login), indent=1))
    except OSError as e:
        raise _unwritable(path, e) from None


def _make_folder(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _unwritable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"{path} cannot be written ({error.strerror}); set GPUPOOL_CONFIG_DIR")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time change a file: a refresh token may be used once, and a logout is the last word.

    The lock's own file stays: who waits for it would otherwise hold one that nobody else sees. Raises InvalidRequest.
    """
    try:
        import fcntl
    except ImportError:  # not on this system: the file is still replaced as a whole
        yield
        return
    try:
        _make_folder(path)
        opened = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as e:
        raise _unwritable(path, e) from None
    with os.fdopen(opened, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
