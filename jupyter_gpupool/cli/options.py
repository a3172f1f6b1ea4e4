"""What can be typed after a command: how it is read, and one clear line for everything that is wrong."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..holder import MODES
from ..pool.validation import FILTERS

#: The defaults of -n and -p, as a Pod's manifest sets them.
NUM_GPUS = "NUM_GPUS"
PARTIAL_GPU = "PARTIAL_GPU"


class UsageError(Exception):
    """The command was not typed as it can be understood; the text is one line that says how."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` instead of printing its usage and leaving."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.replace('unrecognized arguments', 'unknown option')}")

    def options_before_command(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split ``[options] [--] command…`` where the command begins."""
        takes_value = {name for a in self._actions if a.nargs is None for name in a.option_strings}
        at = 0
        while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
            if argv[at] == "--":
                return list(argv[:at]), list(argv[at + 1 :])
            at += 2 if argv[at] in takes_value else 1
        return list(argv[:at]), list(argv[at:])


def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"the number of GPUs must be a whole number from 1 up, not {text!r}")
    return value


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"the share of each GPU's memory must be a number above 0 and at most 1, not {text!r}"
        )
    return value


def mebibytes(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"the memory per GPU must be a whole number of MiB from 1 up, not {text!r}"
        )
    return value


def filter_pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not value.strip():
        raise argparse.ArgumentTypeError(f"a filter is written NAME=VALUE, such as name=V100, not {text!r}")
    if key not in FILTERS:
        raise argparse.ArgumentTypeError(f"unknown filter {key!r}; there are {', '.join(FILTERS)}")
    return key, value


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help="the pool to ask, such as https://gpus.example:56001 (default: GPUPOOL_URL, else the servers of the "
        "bundle in GPUPOOL_CONFIG_DIR, ~/.gpupool or /etc/gpupool, else the pool that you run already, else one is "
        "started for as long as it is needed); its token is read from GPUPOOL_TOKEN, else from that bundle",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_request_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to ask for")
    group.add_argument(
        "-n", "--num-gpus", metavar="N", type=count, help="how many GPUs (default: NUM_GPUS, else 1)"
    )
    group.add_argument(
        "-p",
        "--partial",
        metavar="F",
        type=fraction,
        help="share of each GPU's memory, above 0 and at most 1 (default: PARTIAL_GPU, else 1)",
    )
    group.add_argument(
        "-m", "--memory", metavar="MiB", type=mebibytes, help="memory of each GPU instead, in MiB"
    )
    group.add_argument(
        "--filter",
        metavar="NAME=VALUE",
        action="append",
        type=filter_pair,
        default=[],
        help=f"only GPUs that match; may be repeated; NAME is one of {', '.join(FILTERS)}",
    )
    group.add_argument(
        "--spread", action="store_true", help="the GPUs may be of several servers, where none has room for all"
    )
    group.add_argument("--no-wait", action="store_true", help="fail at once where GPUs are not free now")
    group.add_argument(
        "--attach",
        choices=MODES,
        default="auto",
        metavar="MODE",
        help="remote: through the GPU server; direct: GPUs of this machine at native speed; auto (default): "
        "direct where that is possible",
    )


def complete_request(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Fill in what the environment gives, and check what options cannot check alone. Raises UsageError."""
    if args.partial is not None and args.memory is not None:
        raise UsageError("give either -p (a share of each GPU's memory) or -m (its memory in MiB), not both")
    if args.num_gpus is None:
        args.num_gpus = _from_environment(environ, NUM_GPUS, count) or 1
    if args.partial is None and args.memory is None:
        args.partial = _from_environment(environ, PARTIAL_GPU, fraction) or 1.0
    seen: dict[str, str] = {}
    for key, value in args.filter:
        if seen.setdefault(key, value) != value:
            raise UsageError(f"the filter {key} is given twice, as {seen[key]!r} and {value!r}")
    args.filters = seen


def _from_environment(environ: Mapping[str, str], name: str, read: Any) -> Any:
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        return read(text)
    except argparse.ArgumentTypeError as e:
        raise UsageError(f"{name} in the environment: {e}") from None
