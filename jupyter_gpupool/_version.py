"""The version of the installed package, which the build takes from the last tag (.make/hatch_build.py)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jupyter_gpupool")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
