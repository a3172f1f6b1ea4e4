"""The command's messages on stderr: dated lines, and progress while people wait."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timezone


class Log:
    """Writes ``[INFO] 2021-07-02T07:07:28Z text`` lines. On a terminal, :meth:`progress` rewrites one line."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()
        self._progress = False
        self._last = ""
        self._redrawn = 0.0

    def info(self, text: str) -> None:
        """Write a line for information."""
        self._write(f"[INFO] {_now()} {text}")

    def warning(self, text: str) -> None:
        """Write a warning."""
        self._write(f"[WARN] {_now()} {text}")

    def plain(self, text: str) -> None:
        """Write a line without a date."""
        self._write(text)

    def progress(self, text: str, since: float) -> None:
        """Show what the command waits for.

        On a terminal the line is redrawn with the seconds since ``since``, a :func:`time.monotonic`. Elsewhere it is
        written once whenever ``text`` changes.
        """
        if not self._terminal:
            if text != self._last:
                self.info(text)
        elif text != self._last or time.monotonic() - self._redrawn > 0.9:
            self._redrawn = time.monotonic()
            self._out(f"\r\x1b[K[INFO] {_now()} {text} ({time.monotonic() - since:.0f} s)")
            self._progress = True
        self._last = text

    def _write(self, text: str) -> None:
        before = "\r\x1b[K" if self._progress else ""
        self._progress = False
        self._out(f"{before}{text}\n")

    def _out(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # stderr is closed; that is no reason to stop the work


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
