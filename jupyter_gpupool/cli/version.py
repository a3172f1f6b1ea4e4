"""``gpupool version``"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from jupyter_gpupool._version import __version__
from jupyter_gpupool.transport.specs import PROTOCOL

from .command import Command


class VersionApp(Command):
    name = "version"
    description = "Print the versions that must match between a client and its GPU servers."
    asks_pool = False
    lists = True

    def act(self) -> int:
        try:
            torch: str | None = version("torch")
        except PackageNotFoundError:
            torch = None
        facts = {
            "gpupool": __version__,
            "protocol": PROTOCOL,
            "torch": torch,
            "python": platform.python_version(),
        }
        if self.args.json:
            self.print_json(facts)
        else:
            for name, value in facts.items():
                print(f"{name:<9} {value if value is not None else 'not installed'}")
        return 0
