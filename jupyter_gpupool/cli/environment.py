"""``gpupool server environment add``, ``list`` and ``remove``"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil

from jupyter_gpupool._version import __version__
from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import EngineError, InvalidRequest, PoolError
from jupyter_gpupool.core.operator_names import extra_operators
from jupyter_gpupool.engines import environment_records as records
from jupyter_gpupool.engines.environment_records import OWN, EnvironmentRecord
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.local.environment import Environment
from jupyter_gpupool.engines.local.environment_check import release_in, start_once
from jupyter_gpupool.server.daemon import directory

from .command import Command
from .options import Parser, UsageError
from .table import table

#: The last lines of an installer that has failed.
_LOG_LINES = 15


class EnvironmentCommand(Command):
    """A command about the environments of this GPU server. ``folder`` has their records."""

    asks_pool = False
    classes = [LocalEngine]
    _directory: Path | None = None

    def add_directory(self, parser: Parser) -> None:
        """Add the option that names a secured server."""
        parser.add_argument(
            "--directory",
            metavar="DIRECTORY",
            help="directory of a secured server (default: the one that gpupool server would serve)",
        )

    def check(self) -> None:
        given = self.args.directory
        found = Path(given).expanduser().absolute() if given else directory.find()
        if found is not None and not (found / directory.CONFIGURATION).is_file():
            raise UsageError(
                f"{found} is not a server's directory; to create one: gpupool server init {found}"
            )
        self._directory = found
        if found is not None and not self.args.config:
            self.args.config = str(found / directory.CONFIGURATION)

    def engine(self) -> LocalEngine:
        """Return an engine with the server's configuration, which is not started."""
        return LocalEngine(config=self.config)

    def folder(self) -> str:
        """Return the folder of the records."""
        own = str(self._directory / directory.ENVIRONMENTS) if self._directory else records.default_folder()
        return self.engine().environments_dir or own

    def recorded(self) -> dict[str, EnvironmentRecord]:
        """Return the records; a file that is none is told, and left out."""
        found, troubles = records.read_all(self.folder())
        for trouble in troubles:
            self.tell.info(trouble)
        return found


class AddApp(EnvironmentCommand):
    name = "server environment add"
    usage = "[options] NAME [PYTHON]"
    description = (
        "Let leases compute with another release of PyTorch: that of an existing interpreter, or one that is\n"
        "installed now. It is tried once. A running pool takes it up by itself. Each lease gets the release of its\n"
        "client, or else one that fits. With --operators alone, change what is allowed in an environment."
    )
    examples = (
        "  gpupool server environment add torch-2.15 /opt/torch-2.15/bin/python\n"
        "  gpupool server environment add torch-2.15 --install torch==2.15.0\n"
        "  gpupool server environment add vision --install torch==2.14.1 --install torchvision \\\n"
        "      --operators torchvision::nms"
    )

    def add_options(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="a name of your choice, such as torch-2.15")
        parser.add_argument("python", metavar="PYTHON", nargs="?", help="an interpreter that has PyTorch")
        parser.add_argument(
            "--install",
            metavar="REQUIREMENT",
            action="append",
            default=[],
            help="install this into a new environment, with uv or pip; may be repeated",
        )
        parser.add_argument(
            "--operators",
            metavar="NAME,...",
            action="append",
            default=None,
            help="operators of other libraries that leases may use there, such as torchvision::nms; may be repeated; "
            "they run whatever the library does, so allow only what uses the GPU's memory alone",
        )
        self.add_directory(parser)

    def check(self) -> None:
        super().check()
        args = self.args
        if args.python and args.install:
            raise UsageError("give either an interpreter or --install, not both")
        if any(requirement.startswith("-") for requirement in args.install):
            raise UsageError(
                "--install takes a requirement, such as torch==2.15.0, and no option of an installer"
            )
        words = [word.strip() for given in args.operators or () for word in given.split(",")]
        try:
            records.check_name(args.name)
            self._operators = extra_operators(word for word in words if word)
        except InvalidRequest as e:
            raise UsageError(str(e)) from None

    def act(self) -> int:
        name, folder = self.args.name, self.folder()
        known = self.recorded().get(name)
        if name in self.engine().environments:
            raise UsageError(f"{name} is in the configuration (c.LocalEngine.environments); change it there")
        if self.args.python is None and not self.args.install:
            if known is None or self.args.operators is None:
                raise UsageError(
                    "which release? Give an interpreter that has PyTorch, or --install REQUIREMENT"
                )
            record = replace(known, operators=self._operators)
            self._add(folder, record)
            return 0
        if known is not None:
            raise UsageError(
                f"there is an environment {name} ({known.python}); to replace it, first: "
                f"gpupool server environment remove {name}"
            )
        if self.args.python is not None:
            found = shutil.which(self.args.python) or self.args.python
            python = str(Path(found).expanduser().absolute())  # not resolved: a venv's is a link
            self._add(folder, EnvironmentRecord(name, python, self._operators))
            return 0
        made = Path(folder) / name
        if made.exists():
            raise UsageError(
                f"{made} is there already; remove it first: gpupool server environment remove {name}"
            )
        try:
            python = str(self._install(made))
            self._add(folder, EnvironmentRecord(name, python, self._operators, tuple(self.args.install)))
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return 0

    def _add(self, folder: str, record: EnvironmentRecord) -> None:
        """Try an environment, and record it."""
        release, trouble = asyncio.run(release_in(record.python))
        if trouble:
            raise EngineError(trouble)
        self.tell.info(f"Starting workers' parent with {record.python}")
        environment = Environment(record.name, record.python, release, record.operators)
        started = start_once(environment, self.engine().start_timeout_s)
        if started.gpupool != __version__:
            raise EngineError(
                f"{record.python} has gpupool {started.gpupool}, and this is {__version__}; install the same there, or "
                "none at all"
            )
        try:
            records.write(
                folder, replace(record, torch=started.torch, abi=started.abi, gpupool=started.gpupool)
            )
        except OSError as e:
            raise PoolError(f"cannot write {folder}: {e.strerror or e}") from None
        allowed = f", with {', '.join(record.operators)}" if record.operators else ""
        print(
            f"{record.name}: PyTorch {started.torch}{allowed}; Python {started.abi}, gpupool {started.gpupool}"
        )
        print("The next lease can get it; a running pool needs no restart")

    def _install(self, made: Path) -> Path:
        """Make an environment with this interpreter, and install the requirements there. Raises PoolError.

        It gets no gpupool: the pool's own is used.
        """
        python = made / "bin" / "python"
        uv = shutil.which("uv")
        self.tell.info(f"Installing {' '.join(self.args.install)} into {made}")
        made.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._run([sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), str(made)])
        ways = [[str(python), "-m", "pip", "install", "--no-input", "--no-compile"]]
        if uv:
            ways.insert(0, [uv, "pip", "install", "--python", str(python)])
        for way in ways:
            try:
                self._run([*way, *self.args.install])
                return python
            except PoolError:
                if way is ways[-1]:
                    raise
                # An index that only pip is configured for.
                self._run([str(python), "-m", "ensurepip"])
        raise AssertionError("there is a last way")

    def _run(self, command: list[str]) -> None:
        # PyTorch for this machine's GPUs, or for its CPU: the default brings gigabytes of CUDA. uv alone knows this.
        environment = {"UV_TORCH_BACKEND": "auto", **os.environ}
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            for line in lines[-_LOG_LINES:]:
                self.tell.info(line)
            errors = [line for line in lines if "error" in line.lower()]
            why = (errors or lines or [f"{command[0]} ended with {done.returncode}"])[-1].strip()
            raise PoolError(f"cannot install {' '.join(self.args.install)}: {why}")


class ListApp(EnvironmentCommand):
    name = "server environment list"
    description = (
        "List the interpreters of this GPU server, and the release of PyTorch that a lease gets in each."
    )
    examples = "  gpupool server environment list --json"
    lists = True

    def add_options(self, parser: Parser) -> None:
        self.add_directory(parser)

    def act(self) -> int:
        engine = self.engine()
        allowed = {name: tuple(given) for name, given in engine.operators.items()}
        own = EnvironmentRecord(OWN, sys.executable, torch=torch_release.installed(), gpupool=__version__)
        configured = {
            name: EnvironmentRecord(name, python, torch=asyncio.run(release_in(python))[0])
            for name, python in engine.environments.items()
        }
        found = {OWN: own, **self.recorded(), **configured}
        shown = [
            replace(one, operators=tuple(sorted({*one.operators, *allowed.get(name, ())})))
            for name, one in found.items()
        ]
        if self.args.json:
            self.print_json({"environments": [vars(one) for one in shown]})
            return 0
        rows = [[one.name, one.torch or "-", one.python, ", ".join(one.operators) or "-"] for one in shown]
        print(table(["ENVIRONMENT", "PYTORCH", "PYTHON", "OPERATORS"], rows))
        return 0


class RemoveApp(EnvironmentCommand):
    name = "server environment remove"
    usage = "[options] NAME"
    description = (
        "Give no new lease an environment, and delete what was installed for it. Leases that compute there go on:\n"
        "what was installed is then kept until the command is repeated."
    )
    examples = "  gpupool server environment remove torch-2.15"

    def add_options(self, parser: Parser) -> None:
        parser.add_argument(
            "name", metavar="NAME", help="its name, as gpupool server environment list has it"
        )
        self.add_directory(parser)

    def act(self) -> int:
        name, folder = self.args.name, self.folder()
        if name in self.engine().environments:
            raise UsageError(f"{name} is in the configuration (c.LocalEngine.environments); remove it there")
        try:
            records.check_name(name)
        except InvalidRequest as e:
            raise UsageError(str(e)) from None
        made = Path(folder) / name
        known = name in self.recorded()
        if not known and not made.is_dir():
            raise UsageError(f"there is no environment {name}; see gpupool server environment list")
        try:
            if known:
                records.remove(folder, name)
            if _running_in(made):
                print(f"{name} gets no more leases. {made} is still in use; repeat the command to delete it")
                return 0
            if made.is_dir():
                shutil.rmtree(made)
        except OSError as e:
            raise PoolError(f"cannot remove {e.filename or folder}: {e.strerror or e}") from None
        print(f"Removed {name}")
        return 0


def _running_in(made: Path) -> bool:
    """Return whether a process runs with the interpreter of that environment."""
    python = str(made / "bin" / "python")
    return any((process.info["cmdline"] or [""])[0] == python for process in psutil.process_iter(["cmdline"]))
