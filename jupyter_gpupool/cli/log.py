"""What the command tells people on stderr: dated lines, and progress while they wait."""

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
        self._told = ""
        self._redrawn = 0.0

    def info(self, text: str) -> None:
        self._write(f"[INFO] {_now()} {text}")

    def warning(self, text: str) -> None:
        self._write(f"[WARN] {_now()} {text}")

    def plain(self, text: str) -> None:
        self._write(text)

    def progress(self, text: str, since: float) -> None:
        """``text`` describes what is waited for; a terminal also sees the seconds since ``since``
        (:func:`time.monotonic`), elsewhere it appears once whenever it changes."""
        if not self._terminal:
            if text != self._told:
                self.info(text)
        elif text != self._told or time.monotonic() - self._redrawn > 0.9:
            self._redrawn = time.monotonic()
            self._out(f"\r\x1b[K[INFO] {_now()} {text} ({time.monotonic() - since:.0f} s)")
            self._progress = True
        self._told = text

    def _write(self, text: str) -> None:
        before = "\r\x1b[K" if self._progress else ""
        self._progress = False
        self._out(f"{before}{text}\n")

    def _out(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more; that is no reason to stop the work


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
