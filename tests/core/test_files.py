"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jupyter_gpupool.core import files
from jupyter_gpupool.core.files import write_atomically


def test_replaces_the_content_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    write_atomically(path, "first")
    assert path.read_text() == "first" and path.stat().st_mode & 0o777 == 0o600
    write_atomically(str(path), b"second", mode=0o644)
    assert path.read_bytes() == b"second" and path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["lease.json"], "no draft is left"


def test_a_failure_keeps_the_old_content_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lease.json"
    write_atomically(path, "first")

    def refuse(source: str, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["lease.json"]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "lease.json"
    target.write_text("another's")
    path.symlink_to(target)
    write_atomically(path, "ours")
    assert target.read_text() == "another's" and path.read_text() == "ours" and not path.is_symlink()
