"""Public programs for JAX, unmodified, on slices of a pool: what they compute is what the CPU computes, bit by bit.

An environment variable names each repository's clone; without it, its programs are skipped.
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
from .jax_scripts import CLONES, PROGRAMS, STAND_INS, JaxProgram

jax = pytest.importorskip("jax", reason="JAX is not installed")
DRIVER = Path(__file__).with_name("drive_jax.py")


def run(program: JaxProgram, folder: Path, environment: Mapping[str, str], *, on_gpu: bool) -> str:
    """What a program prints, in a fresh copy of its folder."""
    clone = Path(os.environ[CLONES[program.repository]])
    shutil.copytree(clone / program.folder, folder / program.folder)
    if program.data:
        program.data(folder)
    devices = ",".join(map(str, range(program.slices)))
    chosen = (
        {"CUDA_VISIBLE_DEVICES": devices}
        if on_gpu
        else {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(program.slices)}
    )
    paths = [str(STAND_INS) if program.stand_ins else "", str(folder), os.environ.get("PYTHONPATH", "")]
    arguments = program.arguments.format(device="cuda" if on_gpu else "cpu")
    line = f"{DRIVER} {program.options} {program.script} {arguments}"
    done = subprocess.run(
        [sys.executable, *shlex.split(line)],
        cwd=folder,
        env={
            **environment,
            **chosen,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "MPLBACKEND": "agg",
            "KERAS_BACKEND": "jax",
            "KERAS_HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    on_slices = re.findall(r"^programs on the slices: (\d+)$", done.stderr, re.M)
    assert bool(on_slices and int(on_slices[0])) == on_gpu, done.stderr[-4000:]
    return str(getattr(done, program.stream))


def figures(program: JaxProgram, said: str) -> list[str]:
    found = [
        match if isinstance(match, str) else "".join(match) for match in re.findall(program.figures, said)
    ]
    assert found, said
    return found


@pytest.mark.parametrize("program", [runnable(program, CLONES) for program in PROGRAMS])
def test_the_cpu_computes_the_same(
    leased: Mapping[str, str], tmp_path: Path, program: JaxProgram, record: Callable[..., None]
) -> None:
    expected = figures(program, run(program, tmp_path / "cpu", os.environ, on_gpu=False))
    found = figures(program, run(program, tmp_path / "gpu", leased, on_gpu=True))
    assert found == expected
    *printed, last = found
    compared = [f"{len(printed)} printed figures"] if printed else []
    if "arrays, " in last:
        compared.append(f"the bits of {last.split(',')[0]}")
    else:
        compared = [f"{len(found)} printed figures"]
    record(
        f"{program.repository}: {program}",
        compared=", ".join(compared),
        result="the same bits" if "bits" in compared[-1] else "the same digits",
        jax=jax.__version__,
    )
