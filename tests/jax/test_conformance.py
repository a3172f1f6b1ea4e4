"""How JAX's own tests on slices are judged, and the figures that are published."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.conformance.jax_suite import compare, known


def test_what_the_cpu_passes_has_to_pass_whatever_else_happens() -> None:
    cpu = {
        "a": ("passed", ""),
        "b": ("passed", ""),
        "c": ("failed", "x"),
        "d": ("skipped", ""),
        "e": ("passed", ""),
    }
    ours = {"a": ("passed", ""), "b": ("died", "the process died"), "c": ("passed", ""), "d": ("passed", "")}
    found = compare(cpu, ours)
    assert (found["cpu_passes"], found["passed"], found["failed"]) == (3, 1, 2)
    assert found["failures"] == {"b": "died: the process died", "e": "missing: it did not run"}
    assert found["passed_percent"] == 33.33


def test_only_what_passed_is_not_run_again() -> None:
    record = [
        *(["a", "begun", ""], ["a", "passed", ""], ["b", "begun", ""], ["b", "failed", "x"]),
        *(["c", "begun", ""], ["c", "skipped", ""], ["d", "begun", ""]),
    ]
    kept = known("".join(f"{json.dumps(line)}\n" for line in record))
    assert [json.loads(line) for line in kept.splitlines()] == [["a", "passed", ""], ["c", "skipped", ""]]


def test_the_published_figures_are_complete(project_root: Path) -> None:
    figures = json.loads((project_root / "benchmarks" / "conformance" / "jax.json").read_text())
    for row in figures["files"]:
        assert row["failed"] == 0 and row["failures"] == {}, row["file"]
        assert row["passed"] + sum(row["refused"].values()) == row["cpu_passes"] > 0, row["file"]
