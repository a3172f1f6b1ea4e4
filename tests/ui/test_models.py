"""What the panel is made of that needs no browser: its own tests, in JavaScript."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest


def test_the_panels_own_tests_pass(project_root: Path) -> None:
    jest = project_root / "node_modules/jest/bin/jest.js"
    if not jest.exists():
        pytest.skip("the panel's build tools are not installed (jlpm install)")
    done = subprocess.run(
        ["node", jest, "--config", "labextension/jest.config.mjs"],
        cwd=project_root,
        env={**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
