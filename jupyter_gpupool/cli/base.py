"""What all commands share: how they are read, how they end, and how they find the pool."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
from typing import Any, ClassVar

from jupyter_core.application import JupyterApp
from traitlets import HasTraits, TraitError, Unicode
from traitlets.config.loader import DeferredConfigString

from ..api import bundle
from ..api.client import PoolClient
from ..holder import URL_VARIABLE, find_pool
from .log import Log
from .options import Parser, UsageError, add_json_option, add_pool_options

#: ``--Class.trait=value``: a setting of the configuration file, given for once.
_SETTING = re.compile(r"--([A-Z]\w*)\.(\w+)=(.*)", re.S)
_WRONG_SETTING = re.compile(
    r"The '(\w+)' trait of an? (\w+) instance expected (.+), not (?:the \w+ )?(.+?)\.?"
)


class Command(JupyterApp):
    """One word after ``gpupool``. Subclasses have ``usage``, ``description``, ``examples`` and :meth:`act`."""

    config_file_name = Unicode("jupyter_gpupool_config")
    usage: ClassVar[str] = "[options]"
    asks_pool: ClassVar[bool] = True
    lists: ClassVar[bool] = False
    runs_command: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.args = argparse.Namespace()
        self.command: list[str] = []
        self.tell = Log()

    # -- for subclasses

    def add_options(self, parser: Parser) -> None:
        """Add what this command has beyond the common options."""

    def check(self) -> None:
        """Look at the options together, before anything is done. Raises UsageError."""

    def act(self) -> int:
        """Do it; the exit code. Raises UsageError and PoolError."""
        raise NotImplementedError

    def pool(self) -> tuple[PoolClient, dict[str, Any]]:
        """The pool to ask, and what it says of itself."""
        return find_pool(self.args.url, say=self.tell.info)

    def names_pool(self) -> bool:
        """Whether the user says which pool, so that none is started."""
        return bool(self.args.url or os.environ.get(URL_VARIABLE) or bundle.find())

    def print_json(self, value: Any) -> None:
        print(json.dumps(value, indent=2))

    # -- how it works

    def parser(self) -> Parser:
        parser = Parser(
            prog=f"gpupool {self.name}",
            usage=f"gpupool {self.name} {self.usage}",
            description=str(self.description),
            epilog=f"examples:\n{self.examples}" if self.examples else None,
        )
        self.add_options(parser)
        if self.asks_pool:
            add_pool_options(parser)
        if self.lists:
            add_json_option(parser)
        parser.add_argument("--config", metavar="FILE", help="read settings from this file too")
        parser.add_argument(
            "--debug", action="store_true", help="tell more, for people who look for an error"
        )
        return parser

    def parse_command_line(self, argv: Any = None) -> None:
        """Read the options, and the settings that stand among them."""
        parser = self.parser()
        given = [str(arg) for arg in argv or []]
        if self.runs_command:
            # What belongs to the command is its own business, whatever it looks like.
            given, self.command = parser.options_before_command(given)
        settings = [arg for arg in given if _SETTING.match(arg)]
        self.args = parser.parse_args([arg for arg in given if not _SETTING.match(arg)])
        self.check()
        for setting in settings:
            self._set(*_SETTING.match(setting).groups())  # type: ignore[union-attr]
        if self.args.config:
            if not os.path.isfile(self.args.config):
                raise UsageError(f"there is no configuration file {self.args.config!r}")
            self.config_file = self.args.config
        if self.args.debug:
            self.log_level = "DEBUG"

    def _set(self, owner: str, trait: str, value: str) -> None:
        known = {cls.__name__: cls for cls in self._classes_inc_parents()}
        traits = known[owner].class_traits(config=True) if owner in known else {}
        if trait not in traits:
            raise UsageError(f"there is no setting {owner}.{trait} here")
        probe: Any = HasTraits()
        probe.add_traits(value=copy.copy(traits[trait]))
        try:
            probe.value = traits[trait].from_string(value)
        except (TraitError, ValueError):
            least = getattr(traits[trait], "min", None)
            wanted = traits[trait].info() + (f" from {least:g} up" if least is not None else "")
            raise UsageError(f"the setting {owner}.{trait} must be {wanted}, not {value!r}") from None
        self.config[owner][trait] = DeferredConfigString(value)

    def initialize(self, argv: Any = None) -> None:
        # Around traitlets' own handling of errors, which logs them in its own words and leaves.
        inner: Any = JupyterApp.initialize
        try:
            inner.__wrapped__(self, argv)
        except TraitError as e:
            raise UsageError(one_line(e)) from None

    def migrate_config(self) -> None:
        pass  # there never was an older place

    def _find_subcommand(self, name: str) -> str:
        return ""  # what follows is an option, never the name of another program

    def start(self) -> None:
        self.exit(self.act())


def one_line(error: BaseException) -> str:
    """The error's text on one line; a wrong setting is told in terms of what can be typed."""
    text = " ".join(str(error).split()) or type(error).__name__
    wrong = _WRONG_SETTING.fullmatch(text) if isinstance(error, TraitError) else None
    return "the setting {1}.{0} must be {2}, not {3}".format(*wrong.groups()) if wrong else text


def fail(line: str, code: int) -> None:
    """End the program with one line for people."""
    print(f"gpupool: {line}", file=sys.stderr)
    sys.exit(code)
