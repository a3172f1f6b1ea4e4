"""Log lines for programs: one JSON object each."""

from __future__ import annotations

import json
import logging
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


def use_json(*loggers: logging.Logger) -> None:
    """Have their handlers, and the root's, write JSON lines."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for logger in (root, *loggers):
        for handler in logger.handlers:
            handler.setFormatter(JSONLines())
