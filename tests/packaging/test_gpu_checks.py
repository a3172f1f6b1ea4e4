"""`make gpu`: what it does where there is no GPU, and how it judges figures. The steps are tried by --rehearse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the data plane needs PyTorch")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import steps

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "nvml_gpus", lambda server: ())
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "gpu.json")])
    assert gpu.main() == 77
    assert not (tmp_path / "gpu.json").exists()


def test_every_step_is_there_and_all_of_them_fit() -> None:
    assert [step.name for step in gpu.STEPS] == list(steps.STEPS)
    assert {key.partition(".")[0] for key in gpu.GOALS} <= set(steps.STEPS)
    assert gpu.TOTAL_S <= 600


def test_a_step_that_is_cut_off_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    program = 'import time; print(\'{"figure": "a_ms", "value": 3}\', flush=True); time.sleep(600)'
    monkeypatch.setattr(gpu, "command_of", lambda name, rehearse: [sys.executable, "-c", program])
    figures: dict[str, object] = {}
    found = gpu.run_step("step", 300.0, True, figures, now=lambda: 1000.0 if figures else 0.0)
    assert figures == {"step.a_ms": 3} and found["state"] == "cut off after 300 s"


def test_a_step_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu, "command_of", lambda name, rehearse: [sys.executable, "-c", "raise OSError('no link')"]
    )
    assert gpu.run_step("step", 60.0, True, {})["state"] == "failed: OSError: no link"


def test_figures_are_compared_with_goals_and_with_the_last_run_on_such_a_card(tmp_path: Path) -> None:
    def judged(
        figures: dict[str, float], before: dict[str, float], card: str = "H200"
    ) -> tuple[int, list[str]]:
        found = {"machine": {"gpu": "H200"}, "steps": {}, "figures": figures}
        then = {"machine": {"gpu": card}, "figures": before}
        return gpu.judge(found, then, False, tmp_path / "gpu.json"), found["worse"]  # type: ignore[return-value]

    assert judged({"training.remote_to_native": 0.99}, {}) == (0, [])
    assert judged({"training.remote_to_native": 0.97}, {}) == (1, [])
    assert judged({"operators.client_us": 14}, {"operators.client_us": 10}) == (1, ["operators.client_us"])
    assert judged({"operators.client_us": 14}, {"operators.client_us": 10}, "V100") == (0, [])
    assert judged({"copies.socket_gb_per_s": 14}, {"copies.socket_gb_per_s": 10}) == (0, [])


def test_a_rehearsed_step_reports_figures() -> None:
    done = subprocess.run(
        [*gpu.command_of("facts", True)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    found = dict(filter(None, map(gpu.figure_of, done.stdout.splitlines())))
    assert done.returncode == 0 and found["filled_mib"] == 1024
