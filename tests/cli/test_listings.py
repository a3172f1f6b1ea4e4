"""What an administrator and a shell use: listings, `request` and `release`, `health`, `version`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="workers need PyTorch")


def held(start: Callable[..., Any], eventually: Callable[..., Any], *options: object) -> Any:
    running = start("run", *options, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in running.out, "the command runs")
    return running


def test_gpus(gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any) -> None:
    held(start, eventually, "-p", 0.25)
    head, first, second = gpupool("gpus").stdout.splitlines()
    assert head.split() == ["SERVER", "GPU", "NAME", "FREE", "MiB", "MiB", "EMULATED", "HEALTHY", "UUID"]
    row = r"\S+ +{} +Tesla V100-PCIE-32GB \(emulated\) +{} +32510 +yes +yes +GPU-[0-9a-f-]{{36}}"
    assert re.fullmatch(row.format(0, 32510 - 8127), first) and re.fullmatch(row.format(1, 32510), second)
    gpus = json.loads(gpupool("gpus", "--json").stdout)["servers"][0]["gpus"]
    assert [gpu["granted_mib"] for gpu in gpus] == [8127, 0]


def test_smi_shows_what_is_granted_and_used(
    gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any
) -> None:
    program = "import torch; x = torch.ones(50 << 18, device='cuda'); x.sum().item(); print('runs'); input()"
    running = start("run", "-m", 1000, "--", sys.executable, "-uc", program)
    eventually(lambda: "runs" in running.out, "the command runs")
    shown = eventually(
        lambda: (text := gpupool("smi").stdout) and "1000 / 50 / 32510 MiB" in text and text,
        "its use is told",
    )
    (lease,) = pool.client.leases()
    assert re.search(rf"\| +0 \| {lease.id} +\| .*python \(torch\) +\| +50 / 1000 \|", shown), shown
    assert "EMULATED: the CPU does its work" in shown
    widths = {len(line) for line in shown.splitlines()[1:] if line}
    assert len(widths) == 1, "every line of the tables is as wide as the others"


def test_smi_says_what_cuda_itself_takes() -> None:
    from jupyter_gpupool.cli.smi import picture

    piece = {
        "lease": "a",
        "owner": "ann",
        "label": "",
        "memory_mib": 4000,
        "used_mib": 900,
        "overhead_mib": 532,
    }
    gpu = {
        **{
            "index": 0,
            "name": "H200",
            "memory_mib": 143_771,
            "granted_mib": 4000,
            "used_mib": 900,
            "busy": 0.5,
        },
        **{"emulated": False, "slices": [piece]},
    }
    pool = {"version": "1", "queue": [], "servers": [{"name": "gpu-1", "gpus": [gpu]}]}
    shown = list(picture(pool, "here", "now"))
    assert any(re.search(r"of it for CUDA itself +\| +532 \|", line) for line in shown), shown
    assert len({len(line) for line in shown[1:] if line}) == 1


def test_leases(gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any) -> None:
    holding = held(start, eventually, "-n", 2)
    waiting = start("run", "--", "true")
    eventually(lambda: "position 1" in waiting.log, "another one waits")
    head, *rows = gpupool("leases").stdout.splitlines()
    assert head.split()[:4] == ["LEASE", "STATE", "GPUS", "MiB"] and len(rows) == 2
    assert re.search(r"ACTIVE +0 1 of \S+ +32510 .* sh$", rows[0]) and "QUEUED" in rows[1]
    holding.close_stdin()
    assert holding.wait() == 1 and waiting.wait() == 0
    assert gpupool("leases").stdout == "No leases; --all lists those that have ended\n"
    ended = json.loads(gpupool("leases", "--all", "--json").stdout)["leases"]
    assert {"RELEASED"} == {lease["state"] for lease in ended[-2:]}
    assert "secret" not in json.dumps(ended)


def test_a_lease_for_a_shell(gpupool: Callable[..., Any], pool: Any, eventually: Any) -> None:
    """It is kept while the shell goes on, and given back when the shell ends, however that is."""
    gpupool_ = f"{sys.executable} -m jupyter_gpupool"
    compute = f"{sys.executable} -c \"import torch; print(torch.ones(3, device='cuda:1').sum().item())\""
    script = f'eval "$({gpupool_} request -n 2 -p 0.5 --for $$)"; {compute}; {gpupool_} leases; exit 3'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.startswith("3.0\n") and "ACTIVE" in done.stdout and "shell" in done.stdout
    eventually(pool.idle, "the lease ends with its shell")


def test_resize(gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any) -> None:
    running = held(start, eventually, "-p", 0.25)
    (lease,) = pool.client.leases()
    assert gpupool("resize", "-m", 300, lease.id[:8]).stdout == f"Lease {lease.id} now has GPU 0: 300 MiB\n"
    assert pool.client.lease(lease.id).slices[0].memory_mib == 300
    saved = re.search("configuration saved to '(.*)'", running.log)
    assert saved
    config = Path(saved[1])
    eventually(
        lambda: json.loads(config.read_text())["devices"][0]["limit_mib"] == 300,
        "programs that the command starts find what it is now",
    )
    for options, answer in (
        (("-p", 2), "at most 1, not 2"),
        ((), "give a fraction"),
        (("-m", 99999), "but GPU 0 has 32510 MiB"),
    ):
        refused = gpupool("resize", *options, lease.id)
        assert refused.returncode == 1 and answer in refused.stderr and refused.stderr.count("\n") == 1
    assert pool.client.lease(lease.id).slices[0].memory_mib == 300


def test_release(
    gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Any, pool: Any, last_line: Any
) -> None:
    foreground = start("request", "--foreground", "-p", 0.5)
    eventually(lambda: "export GPUPOOL_LEASE=" in foreground.out, "the lease is held")
    (lease,) = pool.client.leases()
    assert gpupool("release", lease.id[:8]).stdout == f"Lease {lease.id} is RELEASED\n"
    assert foreground.wait() == 0 and pool.granted() == [0, 0]
    again = gpupool("release", lease.id)
    assert again.returncode == 1
    assert "no live lease" in last_line(again) and lease.id in last_line(again)
    start("request", "--foreground"), start("request", "--foreground")
    eventually(lambda: len(pool.client.leases()) == 2, "two leases")
    assert gpupool("release", "--all").stdout.count("is RELEASED") == 2
    assert pool.idle()


def test_leases_without_a_pool(gpupool: Callable[..., Any]) -> None:
    done = gpupool("leases")
    assert done.returncode == 0
    assert done.stdout == "No leases: no GPU pool is running; --all lists those that have ended\n"
    assert done.stderr == "", "no pool is started for the question"
    assert json.loads(gpupool("leases", "--json").stdout) == {"leases": []}


def test_a_command_right_after_the_one_that_started_a_pool(gpupool: Callable[..., Any]) -> None:
    assert gpupool("gpus").returncode == 0
    done = gpupool("run", "-n", 1, "-p", 0.5, "--", "true")
    assert done.returncode == 0, done.stderr


def test_health_and_version(gpupool: Callable[..., Any], pool: Any) -> None:
    done = gpupool("health")
    assert done.returncode == 0 and f"The GPU pool at {pool.address.url} is ok" in done.stdout
    for check in ("gpus", "engine", "disk", "clock"):
        assert re.search(rf"^ok +{check} +\S", done.stdout, re.M), done.stdout
    # How fast these two are is the machine's matter.
    assert re.search(r"^(ok|WARN) +ledger +\d\S* ms +≤ 50 ", done.stdout, re.M), done.stdout
    assert re.search(r"^(ok|WARN) +round trip +\S+ +\d\S* µs +≤ 50 ", done.stdout, re.M), done.stdout
    said = json.loads(gpupool("health", "--json").stdout)
    assert said["status"] in ("ok", "warning") and said["age_s"] >= 0
    (clock,) = [check for check in said["checks"] if check["name"] == "clock"]
    assert clock["unit"] == "s" and clock["value"] < 1
    version = gpupool("version").stdout
    assert re.search(r"^gpupool +\d+\.\d+\.\d+", version, re.M) and re.search(r"^torch +2\.", version, re.M)
