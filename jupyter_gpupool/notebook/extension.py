"""What ``%load_ext jupyter_gpupool`` does to an IPython."""

from __future__ import annotations

import os
from typing import Any

from . import here
from .magics import COMMANDS, GPUPoolMagics

_pending: here.Pending | None = None


def load(shell: Any) -> None:
    """Offer ``%gpupool``; attach, when its turn comes, the lease that whoever started this kernel asked for."""
    global _pending
    shell.register_magics(GPUPoolMagics)
    for name in ("%gpupool", "%%gpupool"):
        shell.set_hook("complete_command", _complete, str_key=name)
    shell.events.register("pre_run_cell", _follow)
    refused = here.refusal()
    if refused:
        print(f"[gpupool] This kernel runs without a GPU: {refused}")
    if os.environ.get(here.PENDING) and _pending is None:
        _pending = here.Pending(print)


def unload(shell: Any) -> None:
    global _pending
    if _pending is not None:
        _pending.stop()
        _pending = None
    if _follow in shell.events.callbacks["pre_run_cell"]:
        shell.events.unregister("pre_run_cell", _follow)
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("gpupool", None)


def _follow(info: Any) -> None:
    here.follow()


def pending() -> here.Pending | None:
    return _pending


def _complete(shell: Any, event: Any) -> list[str]:
    """Subcommands first, then the options of the one that is there."""
    words = event.line.split()
    ended = event.line.endswith(" ")
    if len(words) + ended <= 2 and not event.line.startswith("%%"):
        return [*COMMANDS, "--help"]
    command = (
        COMMANDS.get(words[1]) if len(words) > 1 and not event.line.startswith("%%") else COMMANDS["request"]
    )
    if command is None:
        return []
    return [option for action in command.parser._actions for option in action.option_strings]
