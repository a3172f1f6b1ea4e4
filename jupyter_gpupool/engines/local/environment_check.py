"""What an interpreter has: its release of PyTorch, and whether workers can be forked there."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core import processes, torch_release
from jupyter_gpupool.core.errors import EngineError

from .environment import Environment
from .inherited_variables import without_secrets
from .warm_parent import ZYGOTE

#: How long an interpreter may take to name its release of PyTorch, in seconds.
_LOOK_TIMEOUT_S = 60.0
_LOOK = "import importlib.metadata; print(importlib.metadata.version('torch'))"
#: How long a parent may take to end after its socket was closed, in seconds.
_EXIT_TIMEOUT_S = 10.0
_MAX_MESSAGE_BYTES = 1 << 20


async def release_in(python: str) -> tuple[str, str]:
    """Return an interpreter's release of PyTorch, or else what is wrong, in one line."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", _LOOK),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except (OSError, ValueError) as e:
        return "", f"{python} cannot be run: {getattr(e, 'strerror', None) or e}"
    try:
        out, _ = await asyncio.wait_for(process.communicate(), _LOOK_TIMEOUT_S)
    except (TimeoutError, asyncio.TimeoutError):
        process.kill()
        await process.wait()
        return "", f"{python} does not answer within {_LOOK_TIMEOUT_S:g} s"
    release = torch_release.release_of(out.decode(errors="replace").strip())
    if process.returncode or not release:
        return (
            "",
            f"{python} has no PyTorch; install it there: {python} -m pip install 'jupyter_gpupool[torch]'",
        )
    return release, ""


@dataclass(frozen=True)
class Started:
    """What a warm parent says once it is ready: the versions of PyTorch and gpupool, and the ABI of its Python."""

    torch: str
    abi: str
    gpupool: str


def start_once(environment: Environment, timeout_s: float) -> Started:
    """Start the environment's warm parent and end it again. Raises EngineError, in one line.

    Every allowed operator has to be there.
    """
    said = _first_message(environment, timeout_s)
    if "unusable" in said:
        raise EngineError(f"workers cannot run with {environment.python}: {said['unusable']}")
    for operator, why in said.get("operators", {}).items():
        if why:
            raise EngineError(f"{operator} cannot be used with {environment.python}: {why}")
    return Started(said["torch"], said["abi"], said["gpupool"])


def _first_message(environment: Environment, timeout_s: float) -> dict[str, Any]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(timeout_s)
    with tempfile.TemporaryDirectory(prefix="gpupool-") as folder, tempfile.TemporaryFile() as errors:
        arguments = [str(theirs.fileno()), str(os.getpid()), folder, *environment.options()]
        try:
            process = subprocess.Popen(
                processes.command(ZYGOTE, *arguments, python=environment.python),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=without_secrets(os.environ),
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise EngineError(f"{environment.python} cannot be run: {e.strerror or e}") from None
        finally:
            theirs.close()
        try:
            packet = ours.recv(_MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise EngineError(
                f"{environment.python} could not import PyTorch and gpupool within {timeout_s:g} s"
            ) from None
        except ConnectionError:
            packet = b""
        finally:
            ours.close()
            try:
                process.wait(_EXIT_TIMEOUT_S if process.poll() is None else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if not packet:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            last = f": {lines[-1].strip()[:300]}" if lines else ""
            raise EngineError(f"workers cannot run with {environment.python}{last}")
    said: dict[str, Any] = json.loads(packet)
    return said
