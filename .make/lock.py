"""Writes the lock files: every version that tests and images install, with the hashes of its files.

    python .make/lock.py

They hold for every Python that the project supports. What was published within the last fortnight is left out: a
release that turns out to be harmful is mostly withdrawn before. The extra `programs` names its versions itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from resolver import resolver

ROOT = Path(__file__).resolve().parent.parent
#: For tests. Without PyTorch and CUDA's libraries: each machine has a build of its own of these (CPU, CUDA, ROCm).
TESTS = ROOT / ".make" / "lock.txt"
#: For images, by the extras that they contain; with PyTorch for CUDA.
IMAGES = {
    ROOT / "docs" / "deploy" / "lock-torch.txt": ("torch",),
    ROOT / "docs" / "deploy" / "lock-farm.txt": ("torch", "ray", "postgresql"),
}
MIN_PYTHON = "3.10"
MIN_AGE = "14 days"
HEADER = "# Written by `make lock`: versions and hashes, for Python 3.10 and later.\n"
_OF_PYTORCH = re.compile(r"torch|triton|cuda-|nvidia-(?!ml-py$)")


def entries(text: str) -> list[str]:
    """Return the requirements of a lock file, each with its hashes in further lines.

    >>> entries("a==1 ; m \\\\\\n    --hash=sha256:0\\nb==2\\n")
    ['a==1 ; m \\\\\\n    --hash=sha256:0\\n', 'b==2\\n']
    """
    lines = (line for line in text.splitlines(keepends=True) if line.strip() and not line.startswith("#"))
    found: list[str] = []
    for line in lines:
        if line[0].isspace():
            found[-1] += line
        else:
            found.append(line)
    return found


def requirement(entry: str) -> str:
    """Return an entry without its hashes, as a requirement with its marker."""
    return entry.splitlines()[0].rstrip("\\").strip()


def of_pytorch(entry: str) -> bool:
    """Return whether an entry is PyTorch or a library that comes with its builds for CUDA."""
    return bool(_OF_PYTORCH.match(requirement(entry).partition("==")[0]))


def constraints(text: str) -> str:
    """Return the versions of a lock file without hashes, by which an installer chooses what it needs of them.

    pip checks hashes of everything or of nothing, and a checkout has none.
    """
    return "".join(f"{requirement(entry)}\n" for entry in entries(text))


def _compile(uv: Sequence[str], extras: Iterable[str], bounds: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        given, written = Path(folder, "constraints.txt"), Path(folder, "lock.txt")
        given.write_text(bounds)
        # `programs` needs Python 3.11, and uv resolves what it is not asked for, too.
        project = Path(folder, "pyproject.toml")
        text = (ROOT / "pyproject.toml").read_text()
        project.write_text(re.sub(r"^programs = \[\n.*?^\]\n", "", text, flags=re.M | re.S))
        subprocess.run(
            [*uv, "pip", "compile", "--quiet", "--universal", "--python-version", MIN_PYTHON]
            + ["--generate-hashes", "--no-header", "--no-annotate", "--exclude-newer", MIN_AGE]
            + ["--constraint", str(given), "--output-file", str(written), str(project)]
            + [word for extra in extras for word in ("--extra", extra)],
            check=True,
        )
        return entries(written.read_text())


def write_all(uv: Sequence[str]) -> None:
    """Resolve and write every lock file. The images' versions are those that are tested."""
    found = _compile(uv, ("test", "torch"), "")
    TESTS.write_text(HEADER + "".join(e for e in found if not of_pytorch(e)))
    tested = constraints("".join(found))
    for path, extras in IMAGES.items():
        path.write_text(HEADER + "".join(_compile(uv, extras, tested)))
    for path in (TESTS, *IMAGES):
        print(f"{path.relative_to(ROOT)}: {len(entries(path.read_text()))} packages")


if __name__ == "__main__":
    with resolver() as uv:
        write_all(uv)
