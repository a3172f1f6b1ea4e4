"""A server's directory: the files that `gpupool server init` writes, and how the directory is found."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from jupyter_gpupool.client import bundle
from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.tenancy import audit_log
from jupyter_gpupool.pool.tenancy.audit_log import Entry
from jupyter_gpupool.pool.tenancy.tokens import Tokens, new_token

from . import certificates

#: Names the directory. Empty: there is none.
VARIABLE = "GPUPOOL_SERVER_DIR"
CONFIGURATION = "gpupool_config.py"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
LEDGER = "ledger.sqlite"
#: There while `gpupool server init` writes, so that what a killed one left is known. Locked meanwhile;
#: becomes the configuration.
UNFINISHED = ".unfinished"
#: Where `gpupool server environment` keeps further interpreters.
ENVIRONMENTS = "environments"
#: The administrator's bundle, which GPUPOOL_CONFIG_DIR may name as it is.
ADMINISTRATOR = "admin"

#: The data port that Bitfusion's users know.
DATA_PORT = 55001
#: Also on a machine that is known by other names only.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_CONFIGURATION = """\
# The GPU pool in this directory. `gpupool server {directory}` reads this file; every setting that is
# commented out shows its default.

c = get_config()  # noqa

# The names and addresses that clients know this server by. New bundles carry them, and the certificate is
# made for them: after a change, `gpupool server renew {directory}`.
c.GPUPoolDaemon.addresses = {addresses}

# Control: HTTPS. "" listens on all addresses of this machine.
{host}c.GPUPoolDaemon.host = {bind!r}
{port_set}c.GPUPoolDaemon.port = {port}

# Data: TLS 1.3, one port for all leases.
{host}c.LocalEngine.data_host = {bind!r}
{data_port_set}c.LocalEngine.data_port = {data_port}
# The address at which clients reach the data port; by default the first of c.GPUPoolDaemon.addresses.
# c.LocalEngine.host = {first!r}

# A certificate of another authority: then put that authority's certificate into ca.crt, too.
# c.GPUPoolDaemon.certfile = "{directory}/server.crt"
# c.GPUPoolDaemon.keyfile = "{directory}/server.key"

# Where leases and tokens are kept.
# c.PoolService.db_url = "sqlite:///{directory}/ledger.sqlite"

# Seconds that a lease outlives its holder's last heartbeat.
# c.PoolService.ttl_s = 15.0

# Emulated GPUs: "auto" where NVML finds none, "always", "never". A farm wants "never".
# c.LocalEngine.emulate = "auto"

# Metrics for Prometheus: /metrics on the control port takes an administrator's token; here it takes none.
# c.GPUPoolDaemon.metrics_address = "127.0.0.1:56002"

# Log lines: "json" for programs, "text" for people.
# c.GPUPoolDaemon.log_style = "json"
"""


def default() -> Path:
    """Return the directory in which `gpupool server init` writes by default."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path("/etc/gpupool/server") if os.geteuid() == 0 else Path.home() / ".gpupool" / "server"


def find() -> Path | None:
    """Return the directory that `gpupool server` serves by default; None if there is none."""
    if os.environ.get(VARIABLE) == "":
        return None
    folder = default()
    return folder if (folder / CONFIGURATION).is_file() else None


@dataclass(frozen=True)
class Listening:
    """Where a server listens: an address ("": all of its machine) and two ports."""

    host: str = ""
    port: int = bundle.DEFAULT_PORT
    data_port: int = DATA_PORT

    def settings(self) -> dict[str, object]:
        """Return the fields of the configuration file, where defaults are commented out."""
        return {
            "bind": self.host,
            "host": "" if self.host else "# ",
            "port": self.port,
            "port_set": "# " if self.port == bundle.DEFAULT_PORT else "",
            "data_port": self.data_port,
            "data_port_set": "# " if self.data_port == DATA_PORT else "",
        }


def initialise(folder: Path, addresses: Sequence[str], listening: Listening = Listening()) -> list[Path]:
    """Write a CA, a server's certificate, a ledger with an administrator's token, the administrator's bundle and a
    commented configuration. Return the files. Raises InvalidRequest if the directory is not empty or another call
    writes there, and PoolError.

    What a call left that was killed is removed first: nobody can have used it, because it has no configuration.
    """
    addresses = list(dict.fromkeys(addresses)) or certificates.own_addresses()
    _check(addresses)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _marked(folder) as marker:
            _remove_leftovers(folder)
            (folder / ADMINISTRATOR).mkdir(mode=0o700)
            ca = certificates.new_authority(addresses[0])
            server = certificates.new_server(ca, [*addresses, *_LOOPBACK])
            written = {
                folder / CA_CERTIFICATE: ca.certificate,
                folder / CA_KEY: ca.key,
                folder / SERVER_CERTIFICATE: server.certificate,
                folder / SERVER_KEY: server.key,
            }
            for path, content in written.items():
                _write(path, content)
            files = new_administrator(
                f"sqlite:///{folder / LEDGER}",
                ca.certificate.decode(),
                [f"{_host(a)}:{listening.port}" for a in addresses],
            )
            for name, text in files.items():
                _write(folder / ADMINISTRATOR / name, text.encode())
            configuration = _CONFIGURATION.format(
                directory=folder,
                addresses=repr(list(addresses)),
                first=addresses[0],
                **listening.settings(),
            )
            _replace_content(marker, configuration.encode())
            # Last, and in one step: the directory is whole, and no longer unfinished.
            os.replace(folder / UNFINISHED, folder / CONFIGURATION)
    except OSError as e:
        raise PoolError(f"cannot write {folder}: {e.strerror or e}") from None
    return [*written, *(folder / ADMINISTRATOR / name for name in files), folder / CONFIGURATION]


def renew(folder: Path, addresses: Sequence[str]) -> Path:
    """Create a new server's certificate, signed by the directory's own CA. Raises PoolError."""
    _check(addresses)
    try:
        ca = certificates.Pair((folder / CA_CERTIFICATE).read_bytes(), (folder / CA_KEY).read_bytes())
        server = certificates.new_server(ca, [*addresses, *_LOOPBACK])
        for name, content in ((SERVER_KEY, server.key), (SERVER_CERTIFICATE, server.certificate)):
            write_atomically(folder / name, content)
    except OSError as e:
        raise PoolError(
            f"cannot renew the certificate in {folder}: {e.strerror or e} ({e.filename})"
        ) from None
    except ValueError as e:
        raise PoolError(
            f"{folder / CA_CERTIFICATE} and {CA_KEY} are not a pool's certificate authority: {e}"
        ) from None
    return folder / SERVER_CERTIFICATE


def new_administrator(db_url: str, ca: str, addresses: Sequence[str]) -> dict[str, str]:
    """Record a new administrator's token in a ledger. Return the bundle's files by name. Raises LedgerUnavailable.

    ``ca``: the certificate of the authority to trust (PEM). ``addresses``: of the servers, with their ports.
    """
    ledger, now = Ledger(db_url), time.time()
    try:
        token = new_token("administrator", now, owner="administrator", administers=True)
        with ledger.together():
            shown = Tokens().create(ledger, token)
            with ledger.transaction() as tx:
                outcome = "of administrator, by a command that reached the ledger"
                audit_log.write(tx, [Entry(now, "token create", token.id, outcome, token.namespace)])
    finally:
        ledger.close()
    return bundle.files(ca, shown, f"Token {token.id}, the administrator's", addresses)


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[BinaryIO]:
    """Mark the directory as unfinished while no other call writes there, and give the marker, which is open and locked.

    It holds at most what a killed call has written. Raises InvalidRequest otherwise; then nothing was changed.
    """
    import fcntl  # servers run on Linux only, and this module is imported elsewhere too

    marker, configuration = folder / UNFINISHED, folder / CONFIGURATION
    present = sorted(folder.iterdir())
    if present and marker not in present:
        raise _not_empty(folder, present[0])
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(marker, flags, 0o600), "r+b") as f:
        another = InvalidRequest(f"another `gpupool server init` writes {folder} now; nothing was changed")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise another from None
        is_ours = marker.exists() and os.path.samestat(os.stat(marker), os.fstat(f.fileno()))
        if configuration.exists():
            # Another call has finished since, or one of an earlier version was killed before it took the marker away.
            if is_ours:
                marker.unlink()
            raise _not_empty(folder, configuration)
        if not is_ours:
            raise another
        _, others = _leftovers(folder)
        if others:
            if not present:
                marker.unlink()
            raise _not_empty(folder, others[0])
        yield f


def _not_empty(folder: Path, present: Path) -> InvalidRequest:
    return InvalidRequest(
        f"{folder} is not empty (there is {present.relative_to(folder)}); nothing was changed. Name another directory, "
        "or move that one away"
    )


def _leftovers(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that a killed call has written, and everything else but the marker."""
    names = [CA_CERTIFICATE, CA_KEY, SERVER_CERTIFICATE, SERVER_KEY, f"{LEDGER}*"]
    places, administrator = {folder: names}, folder / ADMINISTRATOR
    if administrator.is_dir() and not administrator.is_symlink():
        places[administrator] = [bundle.CA, bundle.CLIENT, bundle.SERVERS]
    ours: list[Path] = []
    others: list[Path] = []
    for place, patterns in places.items():
        for path in sorted(place.iterdir()):
            if path not in places and path != folder / UNFINISHED:
                is_ours = not path.is_dir() and any(fnmatch(path.name, pattern) for pattern in patterns)
                (ours if is_ours else others).append(path)
    return ours, others


def _remove_leftovers(folder: Path) -> None:
    for path in _leftovers(folder)[0]:
        path.unlink()
    if (folder / ADMINISTRATOR).exists():
        (folder / ADMINISTRATOR).rmdir()


def _host(address: str) -> str:
    """Return the address as it is written before a port."""
    return f"[{address}]" if ":" in address else address


def _check(addresses: Sequence[str]) -> None:
    for address in addresses:
        plain = address.isascii() and address.isprintable() and len(address) <= 253
        if not plain or not address or any(c in address for c in " /@[]'\"\\") or address.count(":") == 1:
            raise InvalidRequest(
                f"{address!r} is not a server's name or address: write it without port or scheme, "
                "such as gpus.example or 192.0.2.7"
            )


def _write(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(content)


def _replace_content(file: BinaryIO, content: bytes) -> None:
    """Write a file anew that is open, so that only its owner can read it."""
    os.fchmod(file.fileno(), 0o600)
    file.seek(0)
    file.truncate()
    file.write(content)
    file.flush()
