"""``%load_ext jupyter_gpupool`` in IPython."""

from __future__ import annotations

from typing import Any

from . import kernel_lease
from .magics import COMMANDS, GPUPoolMagics


def load(shell: Any) -> None:
    """Register ``%gpupool``, and attach the lease that was requested for this kernel when it is granted."""
    shell.register_magics(GPUPoolMagics)
    for name in ("%gpupool", "%%gpupool"):
        shell.set_hook("complete_command", _complete, str_key=name)
    shell.events.register("pre_run_cell", _follow)
    refused = kernel_lease.refusal()
    if refused:
        print(f"[gpupool] This kernel runs without a GPU: {refused}")
    kernel_lease.start_pending(print)


def unload(shell: Any) -> None:
    """Undo :func:`load`. A lease that is attached stays."""
    kernel_lease.stop_pending()
    if _follow in shell.events.callbacks["pre_run_cell"]:
        shell.events.unregister("pre_run_cell", _follow)
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("gpupool", None)


def _follow(info: Any) -> None:
    kernel_lease.follow()


def _complete(shell: Any, event: Any) -> list[str]:
    """Complete the subcommands, then the options of the chosen one."""
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
