"""The control plane's kubectl, on a machine that is too busy for its handshakes, without a control plane."""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import pytest

from . import control_plane
from .control_plane import PATIENCE_S, VARIABLE, ControlPlane

#: Fails so many times, and keeps what it was told.
KUBECTL = """\
#!/bin/sh
cat >> "$HOME/told"
echo told >> "$HOME/calls"
[ "$(wc -l < "$HOME/calls")" -gt {failures} ] && exec echo created
echo "Unable to connect to the server: net/http: TLS handshake timeout" >&2
exit 1
"""


def plane(folder: Path, failures: int, monkeypatch: pytest.MonkeyPatch) -> ControlPlane:
    program = folder / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(failures=failures))
    program.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(folder))
    # With each look at it, a third of the patience passes.
    clock = types.SimpleNamespace(monotonic=itertools.count(step=PATIENCE_S / 3).__next__)
    monkeypatch.setattr(control_plane, "time", clock)
    made = ControlPlane(folder, [1, 2, 3])
    made.kubeconfig = folder / "kubeconfig"
    return made


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().split())


def test_a_handshake_that_took_too_long_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = plane(tmp_path, 2, monkeypatch).kubectl("create", "-f", "-", given=[{"kind": "Pod"}])
    assert (done.returncode, done.stdout, calls(tmp_path)) == (0, "created\n", 3)
    assert (tmp_path / "told").read_text() == "kind: Pod\n" * 3


def test_a_server_that_never_answers_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plane(tmp_path, 100, monkeypatch)
    done = made.kubectl("get", "pods")
    assert done.returncode == 1 and "TLS handshake timeout" in done.stderr
    assert calls(tmp_path) == 4


def test_several_objects_are_not_created_by_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        plane(tmp_path, 0, monkeypatch).kubectl("create", "-f", "-", given=[{"kind": "Pod"}] * 2)


def test_where_there_is_none_its_tests_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert control_plane.missing().endswith("kubectl; `make kubernetes` makes them")
    (tmp_path / "made.log").write_text("09:00 fetching packages\ndpkg-source is missing\n")
    assert "lacks etcd, " in control_plane.missing()
    assert control_plane.missing().endswith("(dpkg-source is missing)")
