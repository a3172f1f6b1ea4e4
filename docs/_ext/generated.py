"""Reference pages that are written from the code.

The line ``<!-- generated: NAME -->`` of a page is replaced by the Markdown that ``reference/NAME.py`` in this
folder writes, so that headings, links and the table of contents work as in any other page.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

_MARK = re.compile(r"^<!-- generated: ([a-z_]+) -->$", re.M)


def fill(text: str) -> str:
    """A page's Markdown, with what is generated in the place of its marks."""
    return _MARK.sub(lambda match: importlib.import_module(f"reference.{match[1]}").markdown(), text)


def setup(app: Any) -> dict[str, bool]:
    def read(app: Any, docname: str, text: list[str]) -> None:
        if _MARK.search(text[0]):
            app.env.note_reread()
            text[0] = fill(text[0])

    # Before links to sources are rewritten: generated text has such links, too.
    app.connect("source-read", read, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
