"""Pieces of Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are put on one line."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|") or " "


def prose(text: str | None) -> str:
    """A docstring or help text as Markdown: roles and doubled backticks become code."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":[a-z:]+:`~?\.?([^`]*)`", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", text)
    text = text.replace("``", "`")
    # Outside code, what would be read as an HTML tag is meant as it stands.
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", r"\<") for part in parts)


def code(text: str, language: str = "text") -> str:
    return f"```{language}\n{inspect.cleandoc(text)}\n```"
