"""The webhook's server: one call over TLS, which asks nobody else and changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.server.daemon.https import Certificate

from .injection import Settings
from .review import reviewed

#: Where the API server sends AdmissionReviews, and where the kubelet asks whether to send it any.
PATH, READY_PATH = "/admit", "/readyz"
#: The API server takes objects of up to 3 MiB.
_MAX_BODY = 8 << 20
#: How often the certificate's files are looked at, in seconds.
_CERTIFICATE_INTERVAL_S = 5.0
#: For how long, in seconds, a server that was asked to stop still answers, until everybody knows.
LEAVING_S = 5.0

logger = logging.getLogger(__name__)


class ReviewHandler(RequestHandler):
    """Answers AdmissionReviews."""

    def initialize(self, settings: Settings) -> None:
        """``settings``: of the webhook."""
        self.webhook_settings = settings

    def post(self) -> None:
        """Answer a review; 400 with one line for what is none."""
        try:
            review = json.loads(self.request.body)
        except (ValueError, RecursionError):
            review = None
        try:
            answer = reviewed(review, self.webhook_settings)
        except InvalidRequest as e:
            self.set_status(400)
            self.finish({"message": str(e)})
            return
        _log(review["request"], answer["response"])
        self.finish(answer)


class ReadyHandler(RequestHandler):
    """Says whether to send reviews here."""

    def initialize(self, webhook: Webhook) -> None:
        """``webhook``: the server."""
        self.webhook = webhook

    def get(self) -> None:
        """Answer 200, or 503 while the server leaves."""
        self.set_status(503 if self.webhook.leaving else 200)
        self.finish("leaving\n" if self.webhook.leaving else "ok\n")


class Webhook:
    """The server. ``port``: 0 takes a free one, and then has its number.

    ``leaving_s``: for how long it answers after SIGTERM, for callers that do not know yet; a second one ends it.
    """

    def __init__(
        self,
        settings: Settings,
        certificate: Certificate,
        host: str,
        port: int,
        leaving_s: float = LEAVING_S,
    ) -> None:
        self.leaving = False
        self._leaving_s = leaving_s
        self._certificate = certificate
        app = Application(
            [(PATH, ReviewHandler, {"settings": settings}), (READY_PATH, ReadyHandler, {"webhook": self})],
            log_function=lambda handler: None,
        )
        self._server = HTTPServer(
            app,
            ssl_options=certificate.context,
            max_body_size=_MAX_BODY,
            body_timeout=10.0,
            idle_connection_timeout=600.0,
        )
        try:
            self._sockets = bind_sockets(port, host or None)
        except OSError as e:
            raise PoolError(
                f"cannot listen on {host or 'all addresses'}, port {port}: {e.strerror}"
            ) from None
        self.port: int = self._sockets[0].getsockname()[1]

    async def serve(self) -> None:
        """Answer until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, stop.set)
        self._server.add_sockets(self._sockets)
        watching = asyncio.create_task(self._watch_certificate())
        logger.info("Answering AdmissionReviews on port %d", self.port, extra={"port": self.port})
        await stop.wait()
        self.leaving = True
        stop.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), self._leaving_s)
        watching.cancel()
        self._server.stop()
        await self._server.close_all_connections()

    async def _watch_certificate(self) -> None:
        while True:
            await asyncio.sleep(_CERTIFICATE_INTERVAL_S)
            if self._certificate.changed():
                try:
                    self._certificate.reload()
                except PoolError as e:
                    logger.error("Kept the former certificate: %s", e)
                else:
                    logger.info("Read the certificate again")


def _log(request: dict[str, Any], response: dict[str, Any]) -> None:
    """Log what was changed or refused; Pods that ask for nothing are none of our business."""
    about = {"namespace": request.get("namespace"), "pod": request.get("name"), "review": response["uid"]}
    if not response["allowed"]:
        logger.warning("Refused a Pod: %s", response["status"]["message"], extra=about)
    elif "patch" in response:
        logger.info("Gave a Pod its GPUs", extra=about)
