"""The options of the commands: how they are parsed, and one clear line for each error."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jupyter_gpupool.client.direct import CONNECTIONS
from jupyter_gpupool.core.request_schema import FIELDS, RequestField
from jupyter_gpupool.core.validation import FILTERS

#: Environment variables with the defaults of -n and -p, as a Pod's manifest sets them.
NUM_GPUS = "NUM_GPUS"
PARTIAL_GPU = "PARTIAL_GPU"

_WHOLE_NUMBER = re.compile(r"[0-9]{1,9}")
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_LIFETIME = re.compile(r"([0-9]{1,6})([mhdwy])")


class UsageError(Exception):
    """The command line is wrong. The message is one line that says how to correct it."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` instead of printing its usage and exiting."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message.replace('unrecognized arguments', 'unknown option')}")

    def options_before_command(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split ``[options] [--] command…`` into the options and the command."""
        takes_value = {name for a in self._actions if a.nargs is None for name in a.option_strings}
        at = 0
        while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
            if argv[at] == "--":
                return list(argv[:at]), list(argv[at + 1 :])
            at += 2 if argv[at] in takes_value else 1
        return list(argv[:at]), list(argv[at:])


def number(field: RequestField) -> Callable[[str], Any]:
    """Return the parser of that field's option, for argparse."""

    def read(text: str) -> int | float:
        try:
            return field.from_text(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return read


def whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """Return the parser of a number from ``least`` to ``most``, for argparse; ``what``: what it is, with an article."""

    def read(text: str) -> int:
        if not _WHOLE_NUMBER.fullmatch(text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{what} is a number from {least} to {most}, not {text!r}")
        return int(text)

    return read


#: Parses a port; 0 takes a free one.
port = whole_number(0, 65535, "a port")


def lifetime(text: str) -> float | None:
    """Parse a lifetime into seconds; ``"never"`` is None. Raises ArgumentTypeError."""
    if text == "never":
        return None
    known = _LIFETIME.fullmatch(text)
    if known is None or not int(known[1]):
        raise argparse.ArgumentTypeError(
            f"a lifetime is a number followed by m, h, d, w or y, such as 365d, or the word never; not {text!r}"
        )
    return int(known[1]) * _UNITS[known[2]]


def filter_pair(text: str) -> tuple[str, str]:
    """Parse a filter ``NAME=VALUE``. Raises ArgumentTypeError."""
    key, sign, value = text.partition("=")
    if not sign or not value.strip():
        raise argparse.ArgumentTypeError(f"write a filter as NAME=VALUE, such as name=V100, not {text!r}")
    if key not in FILTERS:
        raise argparse.ArgumentTypeError(f"unknown filter {key!r}; there are {', '.join(FILTERS)}")
    return key, value


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the pool."""
    parser.add_argument(
        "--url",
        metavar="URL",
        help="address of the pool, such as https://gpus.example:56001 (default: GPUPOOL_URL, else the servers of the "
        "bundle in GPUPOOL_CONFIG_DIR, ~/.gpupool or /etc/gpupool, else the pool that you run already, else a new "
        "one for as long as it is needed); the token is read from GPUPOOL_TOKEN, else from that bundle",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for JSON instead of text."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_field(group: argparse._ArgumentGroup, field: RequestField, note: str = "") -> None:
    """Add the option of a field that is a number, or true or false."""
    option = field.option
    assert option is not None
    text = option.help + (f" ({note})" if note else "")
    if field.kind is bool:
        group.add_argument(*option.flags, action="store_true", help=text)
    else:
        group.add_argument(*option.flags, metavar=option.metavar, type=number(field), help=text)


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a request."""
    group = parser.add_argument_group("what to request")
    add_field(group, FIELDS["num_gpus"], "default: NUM_GPUS, else 1")
    add_field(group, FIELDS["partial"], "default: PARTIAL_GPU, else 1")
    add_field(group, FIELDS["memory_mib"])
    filters = FIELDS["filters"].option
    assert filters is not None
    group.add_argument(
        *filters.flags,
        metavar=filters.metavar,
        action="append",
        type=filter_pair,
        default=[],
        help=f"{filters.help}; NAME is one of {', '.join(FILTERS)}",
    )
    add_field(group, FIELDS["spread"])
    add_field(group, FIELDS["never_park"])
    add_field(group, FIELDS["wait"])
    group.add_argument(
        "--attach",
        choices=CONNECTIONS,
        default="auto",
        metavar="MODE",
        help="remote: compute on the GPU server; direct: use GPUs of this machine without a worker; auto (default): "
        "direct where possible, else remote",
    )


def on_linux_only(command: str) -> None:
    """Raise UsageError on other systems, whose processes cannot be supervised as ``command`` does."""
    if sys.platform != "linux":
        raise UsageError(f"`{command}` works on Linux only; call jupyter_gpupool.attach() in the program")


def complete_request(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> None:
    """Fill in defaults from the environment, and check the options together. Raises UsageError."""
    if args.partial is not None and args.memory is not None:
        raise UsageError(
            "give either -p (a fraction of each GPU's memory) or -m (its memory in MiB), not both"
        )
    if args.num_gpus is None:
        args.num_gpus = _from_environment(environ, NUM_GPUS, number(FIELDS["num_gpus"])) or 1
    if args.partial is None and args.memory is None:
        args.partial = _from_environment(environ, PARTIAL_GPU, number(FIELDS["partial"])) or 1.0
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
