"""Engines are found by entry point, and this package's also without an installation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jupyter_gpupool.core.errors import EngineError
from jupyter_gpupool.engines import registry
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.ray.engine import RayEngine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # import-linter brings it there

ROOT = Path(__file__).parents[2]


def install(folder: Path, entry_points: str) -> None:
    """A distribution with those entry points and one module, ``other_engine``."""
    (folder / "other_engine.py").write_text("class OtherEngine:\n    pass\n")
    info = folder / "other_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entry_points}\n")


def test_the_built_in_engines_are_those_that_the_package_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP] == registry._BUILT_IN


def test_built_in_engines_load() -> None:
    assert registry.engine_class("local") is LocalEngine
    assert registry.engine_class("ray") is RayEngine


def test_another_package_adds_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "other = other_engine:OtherEngine")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "ENGINES", registry.find_engines())
    assert list(registry.ENGINES) == ["local", "ray", "other"]
    assert registry.engine_class("other").__name__ == "OtherEngine"


def test_no_package_replaces_a_built_in_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "local = other_engine:OtherEngine")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find_engines()["local"].endswith(":LocalEngine")


def test_an_engine_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENGINES, "broken", "no_such_module_anywhere:Engine")
    with pytest.raises(EngineError, match=r"'broken' \(no_such_module_anywhere:Engine\) cannot be loaded"):
        registry.engine_class("broken")


def test_an_unknown_engine_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(EngineError, match="no engine 'moon'; installed are local, ray"):
        registry.engine_class("moon")
