"""The environments that ``gpupool server environment add`` has recorded: a JSON file each in a folder of the pool's.

Where the command has made an environment itself, it is a folder of the same name beside the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_data_dir

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.files import write_atomically
from jupyter_gpupool.core.operator_names import extra_operators

#: The name of the pool's own interpreter.
OWN = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
_SUFFIX = ".json"


@dataclass(frozen=True)
class EnvironmentRecord:
    """An interpreter, and what it said when it was added: its release of PyTorch, its Python, and its gpupool.

    ``requirements``: what was installed there; empty for an interpreter that was there before.
    """

    name: str
    python: str
    operators: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    torch: str = ""
    abi: str = ""
    gpupool: str = ""


def default_folder() -> str:
    """Return the folder of a pool that is no secured server."""
    return str(Path(jupyter_data_dir()) / "gpupool" / "environments")


def check_name(name: str) -> str:
    """Return the name. Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} is not a name for an environment: use up to 63 letters, digits and . _ + -, such as "
            "torch-2.15"
        )
    if name == OWN:
        raise InvalidRequest(f"{OWN} is the interpreter that the pool itself runs in; choose another name")
    return name


def read_all(folder: str) -> tuple[dict[str, EnvironmentRecord], list[str]]:
    """Return the records by name, and one line for each file that is no record."""
    found, troubles = {}, []
    for file in sorted(Path(folder).glob(f"*{_SUFFIX}")):
        try:
            record = _record(file.name.removesuffix(_SUFFIX), json.loads(file.read_text()))
        except OSError as e:
            troubles.append(f"{file} cannot be read: {e.strerror or e}")
        except (ValueError, TypeError, InvalidRequest) as e:
            troubles.append(f"{file} is not a record of an environment: {e}")
        else:
            found[record.name] = record
    return found, troubles


def state_of(folder: str) -> tuple[Any, ...]:
    """Return what changes whenever a record is written or removed."""
    try:
        files = sorted(Path(folder).glob(f"*{_SUFFIX}"))
        return tuple((file.name, (stat := file.stat()).st_mtime_ns, stat.st_ino) for file in files)
    except OSError:  # removed at this moment, or not to be read
        return (None,)


def write(folder: str, record: EnvironmentRecord) -> None:
    """Write a record. Raises OSError."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    content = {key: value for key, value in asdict(record).items() if key != "name"}
    write_atomically(Path(folder) / f"{record.name}{_SUFFIX}", json.dumps(content, indent=1) + "\n")


def remove(folder: str, name: str) -> None:
    """Remove a record. Raises OSError."""
    (Path(folder) / f"{name}{_SUFFIX}").unlink()


def _record(name: str, content: Mapping[str, Any]) -> EnvironmentRecord:
    known = {field.name for field in fields(EnvironmentRecord)}
    given = {key: value for key, value in dict(content).items() if key in known}
    if not isinstance(given.get("python"), str) or not given["python"]:
        raise ValueError("it names no interpreter")
    lists = {key: tuple(map(str, given.get(key, ()))) for key in ("operators", "requirements")}
    extra_operators(lists["operators"])
    return EnvironmentRecord(**{**given, **lists, "name": check_name(name)})
