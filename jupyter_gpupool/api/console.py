"""The Console as a page of its own, which a pool serves beside its calls."""

from __future__ import annotations

from pathlib import Path

from jupyter_core.paths import jupyter_path
from tornado import web

#: Below it are the page's files; its calls are beside it, at ``../api/v1/``.
CONSOLE = "/gpupool/console"

#: The page brings all that it needs, speaks to this server alone, and may stand in no other page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def folder() -> Path | None:
    """Where the page was built or installed; None where it was not."""
    built = Path(__file__).resolve().parent.parent / "labextension" / "page"
    installed = (Path(path) for path in jupyter_path("labextensions", "jupyter-gpupool", "page"))
    return next((path for path in (built, *installed) if (path / "index.html").is_file()), None)


class ConsoleFiles(web.StaticFileHandler):
    """The page's files, which are nobody's secret: what they show, the calls refuse or give."""

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-cache")  # asked for again, and answered by its digest


def console_handlers(files: type[ConsoleFiles] = ConsoleFiles, prefix: str = "") -> list[tuple]:
    """For a tornado application that serves the calls at their usual place; ``files`` may ask who is there,
    ``prefix`` is what stands before. None where the page was not built."""
    found = folder()
    if found is None:
        return []
    arguments = {"path": str(found), "default_filename": "index.html"}
    return [
        (f"{prefix}{CONSOLE}", web.RedirectHandler, {"url": "console/", "permanent": False}),
        (rf"{prefix}{CONSOLE}/((?:index\.html|page\.js|page\.css)?)", files, arguments),
    ]
