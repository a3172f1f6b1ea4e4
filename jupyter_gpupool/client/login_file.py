"""What `gpupool login` keeps: a file beside the bundle, with the tokens of a user's identity provider.

Where the user wants it, the tokens are in the system's keyring instead, and the file says so.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.files import write_atomically

from . import system_keyring

NAME = "login.json"
#: What is in the keyring instead of the file.
_SECRET = ("access_token", "refresh_token", "issued_at", "expires_at")


@dataclass(frozen=True)
class Login:
    """A login: at which servers it counts, whose client it is, and its tokens. Times are seconds since the epoch.

    ``refresh_s``: how old the access token may become. ``parameters``: what the issuer's token endpoint wants besides.
    ``keyring``: the account of the system's keyring where the tokens are; empty where they are in the file.
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
    keyring: str = ""

    def is_stale(self, now: float) -> bool:
        """Return whether the access token has to be refreshed before it is used."""
        age_s = abs(now - self.issued_at)
        return now > self.expires_at - 10.0 or (self.refresh_s is not None and age_s > self.refresh_s)


def load(path: Path) -> Login | None:
    """Return the login of that file with its tokens, None without one. Raises InvalidRequest for a broken file."""
    login = load_without_tokens(path)
    if login is None or not login.keyring:
        return login
    secret = system_keyring.get(login.keyring)
    if secret is None:  # deleted with another program
        return None
    try:
        kept = json.loads(secret)
        return replace(login, **{name: kept[name] for name in _SECRET})
    except (ValueError, KeyError, TypeError):
        raise InvalidRequest(
            f"the entry {login.keyring!r} of the system's keyring is not what gpupool login writes; {_ADVICE}"
        ) from None


def load_without_tokens(path: Path) -> Login | None:
    """Return the login of that file, with its tokens only if they are in the file. Raises InvalidRequest."""
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
    """Write the file, which only its owner can read, or the keyring's entry. Raises InvalidRequest."""
    kept = asdict(login)
    if _account(path) not in ("", login.keyring):
        delete(path)
    if login.keyring:
        system_keyring.put(login.keyring, json.dumps({name: kept[name] for name in _SECRET}))
        kept |= {"access_token": "", "refresh_token": "", "issued_at": 0.0, "expires_at": 0.0}
    try:
        _make_folder(path)
        write_atomically(path, json.dumps(kept, indent=1))
    except OSError as e:
        raise _unwritable(path, e) from None


def delete(path: Path) -> None:
    """Delete a login, and what the keyring has of it. Raises InvalidRequest, having deleted neither."""
    if account := _account(path):
        system_keyring.delete(account)
    path.unlink(missing_ok=True)


def account(path: Path, servers: Sequence[str]) -> str:
    """Return the name that the tokens of a login have in the keyring: each pool and each file has its own."""
    return f"{servers[0]} {path.absolute()}"


def _account(path: Path) -> str:
    """Return under which name the keyring has the tokens of the login that is there now; empty where it has none."""
    try:
        found = json.loads(path.read_text())["keyring"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


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
