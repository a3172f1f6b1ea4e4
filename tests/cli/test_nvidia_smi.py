"""`nvidia-smi` of a process with a lease: its forms, and what comes after the lease."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jupyter_gpupool.cli import nvidia_smi
from jupyter_gpupool.cli.nvidia_smi import Row, UsageError, parse, picture
from jupyter_gpupool.client.lease_environment import COMMANDS, lease_variables, remove_commands
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec

NAME = "Tesla V100-PCIE-32GB (emulated)"
DEVICES = tuple(DeviceSpec(k, f"GPU-{k}{k}", NAME, 16255, 32510, True) for k in range(2))
ROWS = [Row(DEVICES[0], 1024, 0.5), Row(DEVICES[1])]
SPEC = AttachSpec("lease", "localhost", 1, "secret", DEVICES)


def shown(*argv: str) -> list[str]:
    return list(picture(parse(argv), ROWS))


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["-L"], [f"GPU 0: {NAME} (UUID: GPU-00)", f"GPU 1: {NAME} (UUID: GPU-11)"]),
        (["-L", "-i", "GPU-11"], [f"GPU 1: {NAME} (UUID: GPU-11)"]),
        (
            ["--query-gpu=index,gpu_name,uuid,memory.total,memory.used", "--format=csv"],
            [
                "index, name, uuid, memory.total [MiB], memory.used [MiB]",
                f"0, {NAME}, GPU-00, 16255 MiB, 1024 MiB",
                f"1, {NAME}, GPU-11, 16255 MiB, [N/A]",
            ],
        ),
        (
            [
                "--query-gpu",
                "count, memory.free,utilization.gpu,power.draw",
                "--format=csv,noheader",
                "-i",
                "0",
            ],
            ["2, 15231 MiB, 50 %, [N/A]"],
        ),
        (
            ["--query-gpu=memory.free,utilization.gpu", "--format=csv,noheader,nounits", "--id=0"],
            ["15231, 50"],
        ),
        (["--query-compute-apps=pid,used_memory", "--format=csv"], ["pid, used_gpu_memory [MiB]"]),
        (["--query-compute-apps=pid", "--format=csv,noheader"], []),
    ],
)
def test_lines_for_programs(argv: list[str], lines: list[str]) -> None:
    assert shown(*argv) == lines


def test_the_table_and_the_details_show_each_slice() -> None:
    table = shown()
    assert len({len(line) for line in table[1:] if line}) == 1, "the frame is straight"
    assert any("1024MiB / 16255MiB" in line and "50%" in line for line in table)
    assert sum(NAME in line for line in table) == 2
    details = "\n".join(shown("-q"))
    assert "GPU UUID                                : GPU-11" in details
    assert "Used                                : 1024 MiB" in details


def test_xml() -> None:
    (text,) = shown("-q", "-x")
    log = ElementTree.fromstring(text)
    assert log.findtext("attached_gpus") == "2"
    first = log.find("gpu")
    assert first is not None and first.findtext("product_name") == NAME
    assert first.findtext("fb_memory_usage/used") == "1024 MiB"
    assert first.findtext("utilization/gpu_util") == "50 %"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--query-gpu=colour", "--format=csv"], 'Field "colour" is not a valid field to query'),
        (["--query-compute-apps=colour", "--format=csv"], 'Field "colour" is not a valid field to query'),
        (["--query-gpu=name"], "need --format=csv"),
        (["--query-gpu=name", "--format=csv,pretty"], "there is no format 'pretty'"),
        (["--query-gpu"], "--query-gpu needs a value"),
        (["-i", "7"], "this lease has no GPU '7'"),
        (["-x"], "nvidia-smi -q -x"),
        (["-l", "soon"], "a number from 1 up, not 'soon'"),
        (["topo", "-m"], "'topo' is not available for leased GPU slices"),
        (["--gpu-reset"], "'--gpu-reset' is not available"),
    ],
)
def test_bad_arguments_get_one_line(argv: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as refused:
        shown(*argv)
    assert "\n" not in str(refused.value)


def test_the_path_has_it_once_and_only_while_there_is_a_lease() -> None:
    environment = {"PATH": f"/usr/bin{os.pathsep}/bin"}
    for _ in range(2):
        environment.update(lease_variables(SPEC, "/lease.json", environment))
        assert environment["PATH"].split(os.pathsep) == [str(COMMANDS), "/usr/bin", "/bin"]
    remove_commands(environment)
    assert environment == {"PATH": f"/usr/bin{os.pathsep}/bin", "GPUPOOL_LEASE": "/lease.json"}
    assert os.access(COMMANDS / "nvidia-smi", os.X_OK)


def smi(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMANDS / "nvidia-smi"), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, nvidia_smi.LEASE: "", "GPUPOOL_PYTHON": sys.executable, **environment},
        timeout=300,
    )


def test_without_a_lease_the_machines_own_runs(tmp_path: Path) -> None:
    path = f"{COMMANDS}{os.pathsep}{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    none = smi("-L", PATH=path)
    assert none.returncode == 9 and "no leased GPUs" in none.stderr and not none.stdout
    own = tmp_path / "nvidia-smi"
    own.write_text('#!/bin/sh\necho "own $*"\n')
    own.chmod(0o755)
    for gone in ("", str(tmp_path / "released.json")):
        assert smi("-q", "-x", PATH=path, GPUPOOL_LEASE=gone).stdout == "own -q -x\n"


def test_a_command_of_gpupool_run_finds_it(gpupool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user runs')")
    fields = "index,memory.total,memory.used"
    command = f"cd {tmp_path}; nvidia-smi --query-gpu={fields} --format=csv,noheader; nvidia-smi -i 5"
    done = gpupool("run", "-n", 2, "-p", 0.5, "--", "sh", "-c", command)
    assert done.stdout == "0, 16255 MiB, 0 MiB\n1, 16255 MiB, 0 MiB\n"
    assert done.returncode == 2 and "nvidia-smi: No devices were found" in done.stderr
