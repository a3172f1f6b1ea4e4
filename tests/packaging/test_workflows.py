"""The workflows of the repository, as far as they can be checked without running them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

NAMES = ("nightly", "publish", "test")


def workflow(root: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((root / ".github" / "workflows" / f"{name}.yml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_job_has_steps_and_every_make_target_exists(project_root: Path, name: str) -> None:
    text = (project_root / ".github" / "workflows" / f"{name}.yml").read_text()
    assert all(job["steps"] for job in workflow(project_root, name)["jobs"].values())
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        done = subprocess.run(["make", "--dry-run", target], cwd=project_root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_release_is_published_by_identity_and_attested(project_root: Path) -> None:
    publish = workflow(project_root, "publish")
    assert publish["permissions"] == {}, "each job says what it may do"
    jobs = publish["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["provenance"]["permissions"] == {"id-token": "write", "attestations": "write"}
    assert jobs["build"]["permissions"] == {"contents": "read"}, "what builds cannot publish"
    text = (project_root / ".github" / "workflows" / "publish.yml").read_text()
    assert "secrets." not in text and "password" not in text
