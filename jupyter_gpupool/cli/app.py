"""The ``gpupool`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from jupyter_core.application import JupyterApp
from traitlets import TraitError

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core.errors import PoolError

from .command import fail, one_line
from .options import UsageError

_HERE = "jupyter_gpupool.cli"

#: Command → its class, and a summary; in the order of the help.
COMMANDS = {
    "run": (f"{_HERE}.run.RunApp", "run a command on GPU slices of a pool"),
    "request": (f"{_HERE}.request.RequestApp", "request GPUs for a shell and keep them"),
    "release": (f"{_HERE}.leases.ReleaseApp", "release leases"),
    "resize": (f"{_HERE}.leases.ResizeApp", "change the memory of a lease's GPU slices"),
    "extend": (f"{_HERE}.leases.ExtendApp", "extend the time of a lease"),
    "keep": (f"{_HERE}.leases.KeepApp", "restart the idle time of a lease"),
    "leases": (f"{_HERE}.leases.LeasesApp", "list leases"),
    "gpus": (f"{_HERE}.gpus.GPUsApp", "list GPUs and their free memory"),
    "smi": (f"{_HERE}.smi.SmiApp", "show the use and the holders of every GPU"),
    "login": (f"{_HERE}.login.LoginApp", "log in with your organisation's identity"),
    "logout": (f"{_HERE}.login.LogoutApp", "log out"),
    "whoami": (f"{_HERE}.login.WhoAmIApp", "show who you are for the pool, and your roles"),
    "server": (f"{_HERE}.server.ServerApp", "serve this machine's GPUs as a pool"),
    "server init": (f"{_HERE}.server.InitApp", "create the directory of a secured server for many users"),
    "server renew": (f"{_HERE}.server.RenewApp", "renew the certificate of a secured server"),
    "server administrator": (
        f"{_HERE}.server.AdministratorApp",
        "create an administrator's token by its ledger",
    ),
    "server environment add": (f"{_HERE}.environment.AddApp", "offer leases another release of PyTorch"),
    "server environment list": (f"{_HERE}.environment.ListApp", "list the releases that leases can use"),
    "server environment remove": (f"{_HERE}.environment.RemoveApp", "offer a release no longer"),
    "server drain": (f"{_HERE}.drain.DrainApp", "grant nothing new on a GPU server"),
    "server undrain": (f"{_HERE}.drain.UndrainApp", "grant on it again"),
    "token create": (f"{_HERE}.token.CreateApp", "create a token for a secured server"),
    "token list": (f"{_HERE}.token.ListApp", "list tokens"),
    "token extend": (f"{_HERE}.token.ExtendApp", "extend the validity of a token"),
    "token revoke": (f"{_HERE}.token.RevokeApp", "revoke a token"),
    "namespace list": (f"{_HERE}.namespace.ListApp", "list namespaces, their limits and their usage"),
    "namespace create": (f"{_HERE}.namespace.CreateApp", "create a namespace"),
    "namespace set": (f"{_HERE}.namespace.SetApp", "change the limits of a namespace"),
    "namespace delete": (f"{_HERE}.namespace.DeleteApp", "delete a namespace"),
    "namespace add": (f"{_HERE}.namespace.AddApp", "add a member, or change a member's role"),
    "namespace remove": (f"{_HERE}.namespace.RemoveApp", "remove a member"),
    "kubernetes webhook": (
        f"{_HERE}.kubernetes.WebhookApp",
        "give Pods of a cluster the GPUs that they ask for",
    ),
    "kubernetes controller": (
        f"{_HERE}.kubernetes.ControllerApp",
        "keep a cluster in step with the pool",
    ),
    "kubernetes copy-client": (
        f"{_HERE}.kubernetes.CopyClientApp",
        "copy the client into a directory, for an image that lacks it",
    ),
    "kubernetes manifests": (
        f"{_HERE}.kubernetes.ManifestsApp",
        "print the webhook's manifests for a cluster",
    ),
    "audit": (f"{_HERE}.audit.AuditApp", "show the log of requests and changes"),
    "usage": (f"{_HERE}.usage.UsageApp", "report GPU-hours by user, namespace or GPU"),
    "health": (f"{_HERE}.health.HealthApp", "check the pool's health"),
    "netperf": (f"{_HERE}.netperf.NetperfApp", "measure the network to each GPU server"),
    "version": (f"{_HERE}.version.VersionApp", "print the versions of this installation"),
}

HELP = f"""usage: gpupool COMMAND [options]

Share GPUs over the network: request GPUs, or a fraction of their memory, from a pool,
and run unmodified PyTorch programs on them as if they were in this machine.

commands:
{os.linesep.join(f"  {name:<25} {help}" for name, (_, help) in COMMANDS.items())}

Start with:
  gpupool run -n 2 -p 0.8 -- python train.py

If no pool is running, a command that needs GPUs starts one for as long as it is
needed. Without NVIDIA hardware its GPUs are emulated, and are always marked so.
See `gpupool COMMAND --help` for the options of a command.
"""


class GPUPoolApp(JupyterApp):
    """Finds the class of a command and runs it."""

    name = "gpupool"
    description = "Share GPUs over the network."
    version = __version__
    subcommands = COMMANDS

    def initialize(self, argv: Any = None) -> None:
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["help"]:
            argv = [*argv[1:2], "--help"]
        word = argv[0] if argv else "--help"
        if several := next((n for n in (3, 2) if " ".join(argv[:n]) in self.subcommands), 0):
            word, argv = " ".join(argv[:several]), argv[several - 1 :]
        elif argv[:2] == ["server", "environment"] and "--help" not in argv:
            raise UsageError(
                "which environment command? Use add, list or remove, such as gpupool server environment list"
            )
        elif word == "token" and "--help" not in argv:
            raise UsageError(
                "which token command? Use create, list, extend or revoke, such as gpupool token list"
            )
        elif word == "namespace" and "--help" not in argv:
            raise UsageError(
                "which namespace command? Use list, create, set, delete, add or remove, such as gpupool namespace list"
            )
        elif word == "kubernetes" and "--help" not in argv:
            raise UsageError(
                "which kubernetes command? Use webhook, controller, copy-client or manifests, such as "
                "`gpupool kubernetes webhook`"
            )
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
    """Run the command and exit with its code: 2 for a usage error, 1 for a refusal, 70 for an unexpected error."""
    try:
        GPUPoolApp.launch_instance(argv if argv is None else list(argv))
    except UsageError as e:
        fail(one_line(e), 2)
    except (PoolError, TraitError) as e:
        fail(one_line(e), 1)
    except BrokenPipeError:
        # The reader of our output has closed the pipe; Python would report that again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as e:
        sys.exit(128 + getattr(e, "signum", 2))
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        fail(f"{type(e).__name__}: {one_line(e)} (--debug shows the traceback)", 70)
