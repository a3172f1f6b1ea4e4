"""Log lines for programs: one JSON object each."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timezone

#: What every record has; anything else was given with the message.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color", "end_color", "taskName"}


class JSONLines(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, and the fields that a message came with (``extra=``)."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Damper(logging.Filter):
    """Lets a number of lines a minute pass and counts the others; the next line that passes has ``held_back``."""

    def __init__(self, most: int = 100, per_s: float = 60.0) -> None:
        super().__init__()
        self._most, self._per_s = most, per_s
        self._since = time.monotonic()
        self._passed = self._held_back = 0

    def filter(self, record: logging.LogRecord) -> bool:
        held_back = self.passes()
        if held_back:
            record.held_back = held_back
        return held_back is not None

    def passes(self) -> int | None:
        """Return None if the line is held back; else how many were held back since the last one."""
        now = time.monotonic()
        if now - self._since >= self._per_s:
            self._since, self._passed = now, 0
        if self._passed >= self._most:
            self._held_back += 1
            return None
        self._passed += 1
        held_back, self._held_back = self._held_back, 0
        return held_back


def use_json(*loggers: logging.Logger) -> None:
    """Let the logger's handlers, and the root's, write JSON lines."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for logger in (root, *loggers):
        for handler in logger.handlers:
            handler.setFormatter(JSONLines())
