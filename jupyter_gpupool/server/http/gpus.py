"""The calls about GPUs: how busy they were."""

from __future__ import annotations

import math

from tornado import web

from .base import BaseHandler, Route


class HistoryHandler(BaseHandler):
    """``GET history`` returns the utilization of GPUs over time."""

    @web.authenticated
    async def get(self) -> None:
        gpus = self.get_query_arguments("gpu")
        step = self.number("step")
        self.reply(
            await self.service.history(
                self.number("since"),
                None if step is None else math.ceil(step),
                None if "all" in gpus else gpus[:64],
            )
        )


#: Path below the prefix → the handler.
ROUTES: list[Route] = [("/history", HistoryHandler)]
