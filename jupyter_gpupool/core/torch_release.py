"""The client's release of PyTorch, as the ``client`` text of its request says it.

There it costs a server that does not know of it nothing.
"""

from __future__ import annotations

import re
from importlib import metadata

_RELEASE = re.compile(r"\d+\.\d+(?:\.\d+)*")
_MARK = re.compile(r" torch:(\d{1,3}(?:\.\d{1,3}){1,3})(?= |$)")


def installed() -> str:
    """Return the release of PyTorch that this interpreter would import, such as ``2.13.0``; empty without one."""
    try:
        return release_of(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return ""


def release_of(version: str) -> str:
    """Return a version's release: ``2.13.0`` of ``2.13.0+cpu``; empty if it has none."""
    found = _RELEASE.match(version)
    return found[0] if found else ""


def mark(release: str) -> str:
    """Return what a request's ``client`` has for a release; empty for none."""
    return f" torch:{release}" if release else ""


def marked(client: str) -> str:
    """Return the release in a request's ``client``; empty if there is none."""
    found = _MARK.search(client)
    return found[1] if found else ""
