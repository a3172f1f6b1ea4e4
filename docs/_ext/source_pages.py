"""Links from a page to a file or folder of the repository.

A page links to sources by a relative path, as it does to other pages. Where the repository is browsed, that
works as it stands. On the site every linked file becomes a page with its text, every linked folder a page with
its files, so that the site needs nothing but itself and shows the sources that it describes.
"""

from __future__ import annotations

import ast
import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\.?/[^)#\s]+)(?:#[^)\s]*)?\)")
_SKIPPED = re.compile(r"\.|__pycache__$|node_modules$|lib$|labextension$")


def source(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that ``target`` names; None if it belongs to the docs themselves."""
    path = Path(os.path.normpath(page.parent / target))
    return path if path.is_relative_to(ROOT) and not path.is_relative_to(DOCS) else None


def links(page: Path) -> Iterator[Path]:
    """The sources that a page links to."""
    for match in _LINK.finditer(page.read_text()):
        path = source(page, match[2])
        if path is not None:
            yield path


def pagename(path: Path) -> str:
    """Where the page of a source is, below the site's root."""
    relative = path.relative_to(ROOT).as_posix()
    return f"source/{relative}/index" if path.is_dir() else f"source/{relative}"


def rewrite(text: str, page: Path) -> str:
    """A page's Markdown, with its links to sources leading to their pages."""
    up = "../" * (len(page.relative_to(DOCS).parts) - 1)

    def link(match: re.Match[str]) -> str:
        path = source(page, match[2])
        return match[0] if path is None else f'<a href="{up}{pagename(path)}.html">{match[1]}</a>'

    return _LINK.sub(link, text)


def pages() -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each source that any page links to, and for what is in linked folders."""
    linked = {path for page in DOCS.rglob("*.md") if "_build" not in page.parts for path in links(page)}
    folders = {folder for path in linked if path.is_dir() for folder in _tree(path)}
    files = {path for path in linked if path.is_file()} | {p for f in folders for p in _files(f)}
    for folder in sorted(folders):
        yield pagename(folder), _context(folder, _listing(folder)), "page.html"
    for file in sorted(files):
        yield pagename(file), _context(file, _highlighted(file)), "page.html"


def _tree(folder: Path) -> Iterator[Path]:
    """A folder and those below it."""
    yield folder
    for path in _folders(folder):
        yield from _tree(path)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _SKIPPED.match(p.name))


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and not _SKIPPED.match(p.name) and p.stat().st_size
    )


def _context(path: Path, body: str) -> dict[str, Any]:
    title = path.relative_to(ROOT).as_posix()
    return {"title": title, "body": f"<h1><code>{html.escape(title)}</code></h1>\n{body}"}


def _listing(folder: Path) -> str:
    rows = []
    for path in _folders(folder):
        rows.append(
            (
                f'<a href="{path.name}/index.html"><code>{path.name}/</code></a>',
                _purpose(path / "__init__.py"),
            )
        )
    for path in _files(folder):
        rows.append((f'<a href="{path.name}.html"><code>{path.name}</code></a>', _purpose(path)))
    lines = "".join(f"<tr><td>{name}</td><td>{html.escape(what)}</td></tr>" for name, what in rows)
    return f'<table class="table"><tbody>{lines}</tbody></table>'


def _purpose(path: Path) -> str:
    """The first line of a module's docstring."""
    if path.suffix != ".py" or not path.is_file():
        return ""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "")


def _highlighted(path: Path) -> str:
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    text = path.read_text(errors="replace")
    return highlight(text, lexer, HtmlFormatter(linenos="inline", lineanchors="line", cssclass="highlight"))


def setup(app: Any) -> dict[str, bool]:
    def read(app: Any, docname: str, text: list[str]) -> None:
        text[0] = rewrite(text[0], Path(app.env.doc2path(docname)))

    app.connect("source-read", read)
    app.connect("html-collect-pages", lambda app: pages())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
