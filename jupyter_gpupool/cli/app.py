"""The ``gpupool`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from jupyter_core.application import JupyterApp
from traitlets import TraitError

from .. import __version__
from ..pool.errors import PoolError
from .base import fail, one_line
from .options import UsageError

_HERE = "jupyter_gpupool.cli"

#: Word → the class that does it, and what it is good for; in the order of the help.
COMMANDS = {
    "run": (f"{_HERE}.run.RunApp", "run a command on slices of pooled GPUs"),
    "request": (f"{_HERE}.request.RequestApp", "take a lease and keep it for a shell"),
    "release": (f"{_HERE}.leases.ReleaseApp", "give a lease back"),
    "resize": (f"{_HERE}.leases.ResizeApp", "change the memory of a lease"),
    "extend": (f"{_HERE}.leases.ExtendApp", "have more time for a lease"),
    "leases": (f"{_HERE}.leases.LeasesApp", "list leases"),
    "gpus": (f"{_HERE}.gpus.GPUsApp", "list the pool's GPUs"),
    "smi": (f"{_HERE}.smi.SmiApp", "show what every GPU does and who holds it"),
    "server": (f"{_HERE}.server.ServerApp", "serve this machine's GPUs as a pool"),
    "server init": (f"{_HERE}.server.InitApp", "make the directory of a secured server for many users"),
    "server renew": (f"{_HERE}.server.RenewApp", "make that server's certificate again"),
    "server drain": (f"{_HERE}.drain.DrainApp", "place nothing new on a GPU server"),
    "server undrain": (f"{_HERE}.drain.UndrainApp", "place on it again"),
    "token create": (f"{_HERE}.token.CreateApp", "admit somebody to a secured server"),
    "token list": (f"{_HERE}.token.ListApp", "list who is admitted, and until when"),
    "token extend": (f"{_HERE}.token.ExtendApp", "admit them for longer"),
    "token revoke": (f"{_HERE}.token.RevokeApp", "admit them no more"),
    "namespace list": (f"{_HERE}.namespace.ListApp", "list tenants, their limits and what they hold"),
    "namespace create": (f"{_HERE}.namespace.CreateApp", "make a tenant"),
    "namespace set": (f"{_HERE}.namespace.SetApp", "change a tenant's limits"),
    "namespace delete": (f"{_HERE}.namespace.DeleteApp", "have a tenant no more"),
    "namespace add": (f"{_HERE}.namespace.AddApp", "add a member, or change what they may do"),
    "namespace remove": (f"{_HERE}.namespace.RemoveApp", "take a member out"),
    "audit": (f"{_HERE}.audit.AuditApp", "show who asked for what"),
    "health": (f"{_HERE}.health.HealthApp", "check whether the pool is well"),
    "netperf": (f"{_HERE}.netperf.NetperfApp", "measure the way to each GPU server"),
    "version": (f"{_HERE}.version.VersionApp", "print versions"),
}

HELP = f"""usage: gpupool COMMAND [options]

Share GPUs over the network: ask a pool for a number of GPUs and a share of their
memory, and run unmodified PyTorch programs on them as if they were in this machine.

commands:
{os.linesep.join(f"  {name:<16} {help}" for name, (_, help) in COMMANDS.items())}

Start with:
  gpupool run -n 2 -p 0.8 -- python train.py

Where there is no pool yet, one is started for as long as it is needed. Without NVIDIA
hardware its GPUs are emulated, which is always said. `gpupool COMMAND --help` tells more.
"""


class GPUPoolApp(JupyterApp):
    """Finds the command's class and hands over."""

    name = "gpupool"
    description = "Share GPUs over the network."
    version = __version__
    subcommands = COMMANDS

    def initialize(self, argv: Any = None) -> None:
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["help"]:
            argv = [*argv[1:2], "--help"]
        word = argv[0] if argv else "--help"
        if " ".join(argv[:2]) in self.subcommands:
            word, argv = " ".join(argv[:2]), argv[1:]
        elif word == "token" and "--help" not in argv:
            raise UsageError("gpupool token create, list, extend or revoke?")
        elif word == "namespace" and "--help" not in argv:
            raise UsageError("gpupool namespace list, create, set, delete, add or remove?")
        if word in ("-h", "--help", "--help-all"):
            print(HELP, end="")
            self.exit(0)
        elif word in ("-V", "--version"):
            print(f"gpupool {__version__}")
            self.exit(0)
        elif word in self.subcommands:
            initialize_subcommand: Any = JupyterApp.initialize_subcommand
            initialize_subcommand.__wrapped__(self, word, argv[1:])
        else:
            what = "unknown option" if word.startswith("-") else "unknown command"
            raise UsageError(f"{what} {word!r}; there are {', '.join(COMMANDS)} (see gpupool --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code: 2 for what was not understood, 1 for what was refused."""
    try:
        GPUPoolApp.launch_instance(argv if argv is None else list(argv))
    except UsageError as e:
        fail(one_line(e), 2)
    except (PoolError, TraitError) as e:
        fail(one_line(e), 1)
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as e:
        sys.exit(128 + getattr(e, "signum", 2))
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        fail(f"{type(e).__name__}: {one_line(e)} (--debug shows where)", 70)
