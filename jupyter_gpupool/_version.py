"""The version of the installed package. Its one source is package.json, from which the build takes it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jupyter_gpupool")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
