"""Every setting, from the traits of the classes that have any."""

from __future__ import annotations

from typing import Any

from traitlets import TraitType, Undefined
from traitlets.config import Configurable

from .classes import subclasses
from .text import prose


def markdown() -> str:
    return "\n\n".join(section(cls) for cls in subclasses(Configurable) if _own(cls))


def _own(cls: Any) -> dict[str, TraitType[Any, Any]]:
    return {name: trait for name, trait in cls.class_own_traits(config=True).items() if trait.help}


def section(cls: Any) -> str:
    parts = [f"## {cls.__name__}", prose((cls.__doc__ or "").split("\n\n")[0])]
    inherited = [
        base for base in cls.__mro__[1:] if base.__module__.startswith("jupyter_gpupool.") and _own(base)
    ]
    if inherited:
        names = ", ".join(f"[`{base.__name__}`](#{base.__name__.lower()})" for base in inherited)
        parts.append(f"It also has the settings of {names}.")
    for name, trait in sorted(_own(cls).items()):
        parts.append(f"`c.{cls.__name__}.{name}`\n: {_body(trait)}")
    return "\n\n".join(parts)


def _body(trait: TraitType[Any, Any]) -> str:
    default = _default(trait)
    facts = f"*{trait.info()}*" + (f", default `{default}`" if default else "")
    return f"{facts}\n\n  {' '.join(prose(trait.help).split())}"


def _default(trait: TraitType[Any, Any]) -> str:
    """Its default as it is written; empty where it is worked out when the program starts."""
    try:
        value = trait.default_value_repr()
    except Exception:
        return ""
    value = value if value != repr(Undefined) and "traitlets" not in value else ""
    return "" if value.startswith("<") else value
