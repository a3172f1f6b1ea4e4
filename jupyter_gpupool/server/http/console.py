"""The Console as a page of its own, which a pool serves beside its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_path
from tornado import web

#: The path of the page's files; its calls are beside it, at ``../api/v1/``.
CONSOLE = "/gpupool/console"

#: The page loads nothing from elsewhere, connects to this server only, and must not be framed by another page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def folder() -> Path | None:
    """Return where the page was built or installed, or None."""
    built = Path(__file__).resolve().parents[2] / "labextension" / "page"
    installed = (Path(path) for path in jupyter_path("labextensions", "jupyter-gpupool", "page"))
    return next((path for path in (built, *installed) if (path / "index.html").is_file()), None)


class ConsoleFiles(web.StaticFileHandler):
    """The page's files, which need no token: the calls that fill the page check it."""

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-cache")  # asked for again, and answered by its digest


def console_handlers(files: type[ConsoleFiles] = ConsoleFiles, prefix: str = "") -> list[tuple[Any, ...]]:
    """Return handlers for a tornado application that serves the calls at their usual paths, none if the page was not
    built. ``files`` may authenticate; ``prefix`` comes before the paths."""
    found = folder()
    if found is None:
        return []
    arguments = {"path": str(found), "default_filename": "index.html"}
    return [
        (f"{prefix}{CONSOLE}", web.RedirectHandler, {"url": "console/", "permanent": False}),
        (rf"{prefix}{CONSOLE}/((?:index\.html|page\.js|page\.css)?)", files, arguments),
    ]
