"""The base class of all commands: parse options, find the pool, run, exit."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from jupyter_core.application import JupyterApp
from traitlets import HasTraits, TraitError, Unicode
from traitlets.config.loader import DeferredConfigString

from .log import Log
from .options import Parser, UsageError, add_json_option, add_pool_options

if TYPE_CHECKING:
    from jupyter_gpupool.client.http import PoolClient

#: ``--Class.trait=value``: a setting of the configuration file, for this run only.
_SETTING = re.compile(r"--([A-Z]\w*)\.(\w+)=(.*)", re.S)
_WRONG_SETTING = re.compile(
    r"The '(\w+)' trait of an? (\w+) instance expected (.+), not (?:the \w+ )?(.+?)\.?"
)


class Command(JupyterApp):
    """A command of ``gpupool``. Subclasses define ``usage``, ``description``, ``examples`` and :meth:`act`.

    ``asks_pool``: it has the option --url; ``lists``: it has the option --json; ``runs_command``: what follows its
    options is a command line.
    """

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
        """Add the options of this command to the common ones."""

    def check(self) -> None:
        """Check the options together, before anything is done. Raises UsageError."""

    def act(self) -> int:
        """Run the command and return its exit code. Raises UsageError and PoolError."""
        raise NotImplementedError

    def pool(self) -> tuple[PoolClient, dict[str, Any]]:
        """Return a client of the pool to use, and the pool's answer to ``GET pool``."""
        from jupyter_gpupool.client.pool_finder import find_pool  # loads httpx, which --help does not need

        return find_pool(self.args.url, say=self.tell.info)

    def names_pool(self) -> bool:
        """Return whether the user names a pool, so that none is started."""
        from jupyter_gpupool.client import bundle
        from jupyter_gpupool.client.pool_finder import URL_VARIABLE

        return bool(self.args.url or os.environ.get(URL_VARIABLE) or bundle.find())

    def running_pool(self) -> PoolClient | None:
        """Return a client of the pool that the user names or runs already; None where :meth:`pool` would start one."""
        from jupyter_gpupool.client.pool_finder import running_pool

        found = running_pool(self.args.url)
        return found[0] if found is not None else None

    def print_json(self, value: Any) -> None:
        """Print JSON for programs."""
        print(json.dumps(value, indent=2))

    # -- how it works

    def parser(self) -> Parser:
        """Return the parser of this command's options."""
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
        parser.add_argument("--config", metavar="FILE", help="also read settings from this file")
        parser.add_argument(
            "--debug", action="store_true", help="log details, and show the traceback of an unexpected error"
        )
        return parser

    def parse_command_line(self, argv: Any = None) -> None:
        """Parse the options, and the settings among them."""
        parser = self.parser()
        given = [str(arg) for arg in argv or []]
        if self.runs_command:
            # Options after the command belong to the command.
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
        # __wrapped__ bypasses traitlets' own error handling, which logs errors in its own words and exits.
        inner: Any = JupyterApp.initialize
        try:
            inner.__wrapped__(self, argv)
        except TraitError as e:
            raise UsageError(one_line(e)) from None

    def migrate_config(self) -> None:
        pass  # there is no older location to migrate from

    def _find_subcommand(self, name: str) -> str:
        return ""  # the next word is an option, never a subcommand

    def start(self) -> None:
        self.exit(self.act())


def one_line(error: BaseException) -> str:
    """Return the error's text on one line; for a wrong setting, in terms of what can be typed."""
    text = " ".join(str(error).split()) or type(error).__name__
    wrong = _WRONG_SETTING.fullmatch(text) if isinstance(error, TraitError) else None
    return "the setting {1}.{0} must be {2}, not {3}".format(*wrong.groups()) if wrong else text


def fail(line: str, code: int) -> None:
    """Print one line for people to stderr and exit with ``code``."""
    print(f"gpupool: {line}", file=sys.stderr)
    sys.exit(code)
