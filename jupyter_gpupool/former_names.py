"""Accepts configuration under its former names until version 1.0, with one line for each in the log."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from traitlets.config import Config, Configurable

_warned: set[str] = set()


class FormerNames(Configurable):
    """A configurable class that was renamed, or that has traits which were.

    Configuration under a present name takes precedence over the same under a former one.
    """

    #: What the class was called: ``c.<former_class>.<trait>`` still configures it.
    former_class: ClassVar[str] = ""
    #: Present names of traits by their former ones.
    former_traits: ClassVar[dict[str, str]] = {}

    @classmethod
    def section_names(cls) -> list[str]:
        """Return the names of the configuration's sections for this class, the weakest first."""
        names = []
        for ancestor in reversed(cls.__mro__):
            if issubclass(ancestor, Configurable):
                former = ancestor.__dict__.get("former_class")
                names += [former, ancestor.__name__] if former else [ancestor.__name__]
        return names

    def _find_my_config(self, cfg: Config) -> Any:
        for ancestor in type(self).__mro__:
            former = ancestor.__dict__.get("former_class")
            if former and cfg._has_section(former):
                _warn(f"c.{former}", f"c.{ancestor.__name__}")
        found = super()._find_my_config(cfg)
        for former, name in self.former_traits.items():
            if former in found:
                _warn(f"{type(self).__name__}.{former}", f"{type(self).__name__}.{name}")
                value = found.pop(former)
                found.setdefault(name, value)
        return found


def _warn(former: str, name: str) -> None:
    if former not in _warned:
        _warned.add(former)
        logging.getLogger(__name__).warning(
            "%s is now %s; the old name works until version 1.0", former, name
        )
