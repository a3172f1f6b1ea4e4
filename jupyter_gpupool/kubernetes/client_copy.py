"""The client as files for an image that lacks it: this package and what it imports, in a directory of a Pod."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import jupyter_gpupool
from jupyter_gpupool.core.errors import PoolError

#: What a program with a lease imports, besides PyTorch or JAX, which are the image's own.
_IMPORTED = ("httpx", "jupyter-core", "msgpack", "nvidia-ml-py", "psutil", "PyYAML", "traitlets")
#: Not needed in a program: the files of the JupyterLab extension, and what Python writes by itself.
_LEFT_OUT = ("labextension", "__pycache__")

_NAME = re.compile(r"[A-Za-z0-9._-]+")

#: Runs the client by the image's Python. The variable, unlike an option, reaches the program that it starts.
_COMMAND = """\
#!/bin/sh
# gpupool, copied into this container by an init container. Packages of the image come before those that came with it.
folder=$(cd "${0%/*}/.." && pwd)
python=$(command -v python3 || command -v python) || {
  echo "gpupool: this image has no Python; the client that was copied into it needs 3.10 or later" >&2
  exit 127
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "gpupool: $python is older than 3.10, which the client that was copied into this image needs" >&2
  exit 127
}
PYTHONPATH="$folder/lib${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -m jupyter_gpupool "$@"
"""


def copy_client(folder: Path) -> None:
    """Write the client into a directory, which may exist. Raises PoolError.

    ``bin/gpupool``: the command. ``lib``: for PYTHONPATH. ``lib/gpupool-dependencies``: what this package adds to the
    end of the path when it is imported, so that none of it takes the place of what the image has.
    """
    library = folder / "lib"
    try:
        source = Path(jupyter_gpupool.__file__).parent
        ignored = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(source, library / "jupyter_gpupool", ignore=ignored, dirs_exist_ok=True)
        _copy_metadata(distribution("jupyter_gpupool"), library)
        for package in _needed():
            _copy_package(package, library / jupyter_gpupool.DEPENDENCIES)
        command = folder / "bin" / "gpupool"
        command.parent.mkdir(exist_ok=True)
        command.write_text(_COMMAND)
        command.chmod(0o755)
    except PackageNotFoundError as e:
        raise PoolError(
            f"this image lacks {e.name}, which the client needs; install jupyter_gpupool by pip"
        ) from None
    except OSError as e:
        raise PoolError(f"the client cannot be copied to {folder}: {e.strerror or e}") from None


def _copy_metadata(package: Distribution, library: Path) -> None:
    """Write what PyTorch and JAX find the client by: its entry points."""
    folder = library / f"jupyter_gpupool-{package.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("METADATA", "entry_points.txt"):
        (folder / name).write_text(package.read_text(name) or "")


def _needed() -> list[Distribution]:
    """Return the packages that the client imports, and those that they import. Raises PackageNotFoundError."""
    found: dict[str, Distribution] = {}
    names = list(_IMPORTED)
    while names:
        package = distribution(names.pop())
        if package.name in found:
            continue
        found[package.name] = package
        for requirement in package.requires or ():
            match = _NAME.match(requirement)
            # What an extra or another Python needs is not installed, or does no harm.
            if match is not None and "extra ==" not in requirement and _is_installed(match[0]):
                names.append(match[0])
    return list(found.values())


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _copy_package(package: Distribution, folder: Path) -> None:
    files = package.files
    if not files:
        raise PoolError(f"which files {package.name} has is not recorded; install jupyter_gpupool by pip")
    for file in files:
        if ".." in file.parts or file.is_absolute() or "__pycache__" in file.parts:
            continue  # commands, manuals
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(package.locate_file(file)), target)
