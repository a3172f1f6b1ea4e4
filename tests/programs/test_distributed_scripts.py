"""PyTorch's public scripts for several GPUs, unmodified, below `gpupool run`: they compute what gloo's ranks compute.

An environment variable names each repository's clone; without it, its scripts are skipped.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .clones import runnable
from .distributed_scripts import SCRIPTS, Script, blocks_of_code
from .public_scripts import CLONES
from .to_the_end import run_to_the_end

BESIDE = Path(__file__).with_name("beside")
#: Seconds after which a command hangs; FSDP2's model of ten layers takes minutes on a busy machine.
PATIENCE_S = 1500


@pytest.fixture(scope="module")
def outside() -> Iterator[dict[str, str]]:
    """The environment of somebody without a pool: `gpupool run` starts one for each command."""
    home = Path(tempfile.mkdtemp(prefix="gpupool-test-"))
    for kind in ("data", "runtime", "config"):
        (home / kind).mkdir(mode=0o700)
    config = home / "config" / "jupyter_gpupool_config.py"
    config.write_text(f"c.LocalEngine.emulated_count = {max(script.ranks for script in SCRIPTS)}\n")
    held = ("GPUPOOL_LEASE", "GPUPOOL_URL", "GPUPOOL_TOKEN", "NUM_GPUS", "PARTIAL_GPU")
    yield {
        **{name: value for name, value in os.environ.items() if name not in held},
        **{f"JUPYTER_{kind.upper()}_DIR": str(home / kind) for kind in ("data", "runtime", "config")},
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(BESIDE), str(Path.cwd()), os.environ.get("PYTHONPATH")))
        ),
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(home, ignore_errors=True)


def run(
    script: Script, folder: Path, environment: Mapping[str, str], *, on_gpus: bool
) -> tuple[Any, list[str]]:
    """What each rank computes by each command, and what the commands print of what is compared."""
    shutil.copytree(Path(os.environ[CLONES[script.repository]]) / script.folder, folder)
    for page, file, numbers in script.code:
        blocks = blocks_of_code((folder / page).read_text())
        (folder / file).write_text("\n".join(blocks[n] for n in numbers))
    if script.data:
        script.data(folder)
    prefix = ("gpupool", "run", "-n", str(script.ranks), "-p", "0.8", "--") if on_gpus else ()
    computed: list[Any] = []
    printed: list[str] = []
    for number, command in enumerate(script.commands):
        findings = folder.parent / f"findings-{number}"
        findings.mkdir()
        options = {
            "folder": str(findings),
            "gpus_on_cpu": 0 if on_gpus else script.ranks,
            "draws_on_cpu": script.draws_on_cpu,
            "plain_attention": script.plain_attention,
            "draws_empty": script.draws_empty,
        }
        noting = (
            "env",
            f"PROGRAMS_FINDINGS={json.dumps(options)}",
        )  # not the pool's, which the command starts
        said = run_to_the_end(
            [*prefix, *noting, sys.executable, *shlex.split(command.format(ranks=script.ranks))],
            folder,
            environment,
            PATIENCE_S,
        )
        printed += sorted(re.findall(script.printed, said)) if script.printed else []
        computed.append(
            {
                file.stem: [json.loads(line) for line in file.read_text().splitlines()]
                for file in sorted(findings.iterdir())
            }
        )
    return computed, printed


def figures(computed: Any, place: str) -> list[tuple[str, list[float]]]:
    """Where each figure was computed, in order, with the values; all of them on the GPU, or on the CPU."""
    found = []
    for number, ranks in enumerate(computed):
        for rank, lines in ranks.items():
            for at, line in enumerate(lines):
                assert line["device"] == place, f"{rank} computes {line['what']} on {line['device']}"
                found.append((f"command {number}, {rank}, {line['what']} {at}", line["values"]))
    return found


def distance(ours: list[float], theirs: list[float]) -> float:
    """How far a figure is apart, relative to its size; a sum's size is the root of the sum of the squares."""
    sizes = [max(abs(value), math.sqrt(abs(theirs[-1])) if len(theirs) > 1 else 0.0) for value in theirs]
    return max(
        abs(a - b) / (size or 1.0) if a != b else 0.0 for a, b, size in zip(ours, theirs, sizes, strict=True)
    )


def verdict(script: Script, found: tuple[Any, list[str]], expected: tuple[Any, list[str]]) -> tuple[str, str]:
    """What was compared, and with which result. Raises AssertionError where they are further apart than they may be."""
    here, there = figures(found[0], "GPU"), figures(expected[0], "CPU")
    assert here and [place for place, _ in here] == [place for place, _ in there]
    assert all(math.isfinite(value) for _, values in (*here, *there) for value in values), (
        "there are no figures to compare"
    )
    assert not script.printed or found[1], "nothing that is compared was printed"
    apart = [(distance(ours, theirs), place) for (place, ours), (_, theirs) in zip(here, there, strict=True)]
    largest = max(apart)
    others = sum(1 for far, _ in apart if far)
    assert largest[0] <= script.bound, f"{others} of {len(here)} are apart; most: {largest}"
    assert found[1] == expected[1]
    losses = sum(1 for place, _ in here if " loss " in place)
    gpus = f"{script.ranks} GPU{'s' * (script.ranks > 1)}"
    compared = f"{losses} losses, {len(here) - losses} sums of parameters after a step; {gpus}"
    result = "the same digits" if not others else f"at most {largest[0]:.0e} apart: {script.why_apart}"
    return compared, result


def noted(*losses: float, place: str) -> Any:
    return [{"rank-0": [{"device": place, "what": "the loss", "values": [loss]} for loss in losses]}]


ONE = Script(repository="none", folder="", commands=("train.py",), name="one", bound=0.1, printed="loss .*")


def test_figures_within_the_bound_pass() -> None:
    found, expected = noted(1.0, 2.1, place="GPU"), noted(1.0, 2.0, place="CPU")
    assert "at most" in verdict(ONE, (found, ["loss 2"]), (expected, ["loss 2"]))[1]


@pytest.mark.parametrize(
    ("found", "printed", "words"),
    [
        ((1.0, 3.0), ["loss 2"], "1 of 2 are apart"),
        ((1.0, math.nan), ["loss 2"], "no figures to compare"),
        ((math.inf, 2.0), ["loss 2"], "no figures to compare"),
        ((1.0, 2.0), [], "nothing that is compared was printed"),
    ],
)
def test_what_is_no_figure_or_not_there_is_no_success(found: Any, printed: list[str], words: str) -> None:
    here, there = noted(*found, place="GPU"), noted(1.0, 2.0, place="CPU")
    with pytest.raises(AssertionError, match=words):
        verdict(ONE, (here, printed), (there, printed))


@pytest.mark.parametrize("script", [runnable(script, CLONES, installs=False) for script in SCRIPTS])
def test_ranks_compute_what_ranks_of_gloo_compute(
    outside: Mapping[str, str], tmp_path: Path, script: Script, record: Callable[..., None]
) -> None:
    found = run(script, tmp_path / "gpus" / "run", outside, on_gpus=True)
    expected = run(script, tmp_path / "cpu" / "run", outside, on_gpus=False)
    compared, result = verdict(script, found, expected)
    record(f"{script.repository}: {script}", compared=compared, result=result)
