"""Public scripts, unmodified, on a slice of a pool: they print the figures that they print on the CPU.

An environment variable names each repository's clone; without it, its scripts are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from .clones import runnable
from .public_scripts import CLONES, PROGRAMS, Program

DRIVER = Path(__file__).with_name("drive.py")


def run(program: Program, folder: Path, environment: Mapping[str, str], *, on_gpu: bool) -> str:
    """What the commands print, in a fresh copy of the script's folder."""
    shutil.copytree(Path(os.environ[CLONES[program.repository]]) / program.folder, folder)
    if program.data:
        program.data(folder)
    chosen = {
        "accel": "--accel" if on_gpu else "",
        "cuda": "--cuda" if on_gpu else "",
        "device": "cuda" if on_gpu else "cpu",
        "compile": str(on_gpu),
    }
    path = os.pathsep.join(
        filter(None, (str(DRIVER.parent / "beside"), str(folder), os.environ.get("PYTHONPATH")))
    )
    said = ""
    peak_bytes = 0
    for command in program.commands:
        line = f"{DRIVER} {program.options} {command}".format(**chosen)
        done = subprocess.run(
            [sys.executable, *shlex.split(line)],
            cwd=folder,
            env={
                **environment,
                "PYTHONPATH": path,
                "CUDA_VISIBLE_DEVICES": program.gpus,
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        said += done.stdout
        peak_bytes = max(
            peak_bytes, *map(int, re.findall(r"^peak of the GPU: (\d+) bytes$", done.stderr, re.M)), 0
        )
    assert (peak_bytes > 0) == on_gpu, f"it held {peak_bytes} bytes of the GPU"
    return said


def figures(program: Program, said: str) -> list[str]:
    found = [
        match if isinstance(match, str) else " ".join(match).strip()
        for match in re.findall(program.figures, said)
    ]
    assert found, said
    return found


@pytest.mark.parametrize("program", [runnable(program, CLONES) for program in PROGRAMS])
def test_the_cpu_prints_the_same(
    leased: Mapping[str, str], tmp_path: Path, program: Program, record: Callable[..., None]
) -> None:
    expected = figures(program, run(program, tmp_path / "cpu" / "run", os.environ, on_gpu=False))
    found = figures(program, run(program, tmp_path / "gpu" / "run", leased, on_gpu=True))
    if program.bound == 0:
        assert found == expected
        result = "the same digits"
    else:
        pairs = [(float(a), float(b)) for a, b in zip(found, expected, strict=True)]
        largest = max(abs(a - b) / abs(b) for a, b in pairs)
        assert largest <= program.bound
        result = f"at most {largest:.1%} apart; {program.bound:.0%} may be"
    what = program.what if len(found) > 1 else program.what.removesuffix("s")
    record(f"{program.repository}: {program}", compared=f"{len(found)} printed {what}", result=result)
