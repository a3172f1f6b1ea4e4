"""The bundle: a client's files ``ca.crt``, ``client.yaml`` and ``servers.conf``, written by a pool.

Each file is searched for by itself, so that an image may contain the addresses and a mounted secret the token.
Clients never write these files, so all of them may be read-only.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from jupyter_gpupool.core.errors import InvalidRequest

from . import login_file

#: Environment variable: the only directory to search.
VARIABLE = "GPUPOOL_CONFIG_DIR"
CA, CLIENT, SERVERS = "ca.crt", "client.yaml", "servers.conf"
#: A file with nothing but a token, where there is no client.yaml: others write it, and replace it.
TOKEN = "token"
#: The port of an address without one.
DEFAULT_PORT = 56001


@dataclass(frozen=True)
class Bundle:
    """The servers' addresses, in the order to try them; the token; the CA's certificate (PEM).

    ``login``: the file of a login at these servers, which takes the token's place; empty without one.
    """

    urls: tuple[str, ...]
    token: str
    ca: str
    login: str = ""

    def covers(self, url: str) -> bool:
        """Return whether ``url`` is one of the bundle's servers; the token is sent only to these."""
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc}" in self.urls


def folders() -> list[Path]:
    """Return the directories to search, in this order."""
    named = os.environ.get(VARIABLE)
    return [Path(named).expanduser()] if named else [Path.home() / ".gpupool", Path("/etc/gpupool")]


def login_path() -> Path:
    """Return the file of this user's login."""
    return folders()[0] / login_file.NAME


def find() -> Bundle | None:
    """Return this user's bundle; None without a servers.conf or a login. Raises InvalidRequest for a broken file."""
    servers = _read(SERVERS)
    login = login_file.load_without_tokens(login_path())
    if servers is None:
        return Bundle(login.servers, "", login.ca, str(login_path())) if login else None
    addresses = _addresses(*servers)
    client, plain = _read(CLIENT), _read(TOKEN)
    if client is not None:
        token = _token(*client)
    else:
        token = _checked(plain[0], plain[1].strip()) if plain is not None else ""
    ca = _read(CA) or _read(f"tls/{CA}")
    if ca is None:
        raise InvalidRequest(
            f"there is {servers[0]}, but no {CA} in {_all()}; copy all three files of the bundle there"
        )
    urls = tuple(f"https://{address}" for address in addresses)
    is_for_these = login is not None and bool(set(urls) & set(login.servers))
    return Bundle(urls, token, ca[1], str(login_path()) if is_for_these else "")


def files(ca: str, token: str, about: str, addresses: Sequence[str]) -> dict[str, str]:
    """Return the contents of the three files by name. ``about``: a line on what the token is for."""
    comment = " ".join(about.split())
    return {
        CA: ca,
        CLIENT: f"# {comment}\n{yaml.safe_dump({'token': token})}",
        SERVERS: yaml.safe_dump({"servers": [{"addresses": [with_port(a)]} for a in addresses]}),
    }


def tar(content: Mapping[str, str]) -> bytes:
    """Return a tar archive of files that only their owner can read."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in content.items():
            data = text.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_port(address: str) -> str:
    """Add the port: ``gpus.example`` becomes ``gpus.example:56001``; an IPv6 address also gets brackets."""
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    return address if address.rpartition("]")[2].count(":") else f"{address}:{DEFAULT_PORT}"


def _read(name: str) -> tuple[Path, str] | None:
    """Return the path and content of the first file of that name. Raises InvalidRequest if it cannot be read."""
    for folder in folders():
        path = folder / name
        try:
            return path, path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is not text"
            raise InvalidRequest(
                f"{path} cannot be read ({why}); correct its owner and mode, or ask for a new bundle"
            ) from None
    return None


def _addresses(path: Path, text: str) -> list[str]:
    try:
        found = [str(a) for server in _mapping(text)["servers"] for a in server["addresses"]]
        for address in found:
            parts = urlsplit(f"https://{address}")
            if not parts.hostname or parts.path or not parts.port:
                raise ValueError
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        found = []
    if not found:
        raise InvalidRequest(
            f"{path} names no server as it should: 'servers: [{{addresses: [gpus.example:56001]}}]'; "
            "ask the pool's administrator for a new bundle"
        )
    return found


def _token(path: Path, text: str) -> str:
    try:
        token = _mapping(text)["token"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        token = None
    return _checked(path, token)


def _checked(path: Path, token: object) -> str:
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest(f"{path} holds no token; ask the pool's administrator for a new bundle")
    return token


def _mapping(text: str) -> Any:
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise TypeError("not a mapping")
    return value


def _all() -> str:
    return " or ".join(map(str, folders()))
