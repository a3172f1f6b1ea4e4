"""A Jupyter event for every change of a lease's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_events import EventLogger

SCHEMA = Path(__file__).with_name("lease_event.yaml")
SCHEMA_ID = "https://events.jupyter.org/jupyter_gpupool/lease/v1"


class LeaseEvents:
    """Emits an event for each change. Every user of the server receives events, so they contain no names."""

    def __init__(self, logger: EventLogger) -> None:
        self._logger = logger
        if SCHEMA_ID not in logger.schemas:
            logger.register_event_schema(SCHEMA)

    def __call__(self, change: dict[str, Any]) -> None:
        lease = change["lease"]
        self._logger.emit(
            schema_id=SCHEMA_ID,
            data={
                "lease": lease["id"],
                "state": lease["state"],
                "previous": change["previous"],
                "num_gpus": lease["request"]["num_gpus"],
            },
        )
