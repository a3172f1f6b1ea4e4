"""Configuration that was written for earlier names keeps working."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from traitlets.config import Config

from jupyter_gpupool import former_names
from jupyter_gpupool.engines.ray.engine import RayEngine
from jupyter_gpupool.hub.service.app import GPUPoolHubService
from jupyter_gpupool.server.daemon.daemon_app import GPUPoolDaemon
from jupyter_gpupool.server.daemon.pool_app import GPUPoolServer
from jupyter_gpupool.server.service.service import PoolService

RENAMED = [
    (GPUPoolServer, "PoolApp", "port", "port", 4711),
    (GPUPoolDaemon, "Daemon", "log_lines", "log_style", "text"),
    (GPUPoolDaemon, "PoolApp", "metrics_address", "metrics_address", "127.0.0.1:1"),
    (GPUPoolHubService, "HubService", "managed", "exit_with_parent", False),
    (PoolService, "PoolService", "audit_days", "audit_retention_days", 7.0),
    (RayEngine, "RayEngine", "silence_s", "node_timeout_s", 3.0),
]


@pytest.mark.parametrize(("cls", "section", "former", "name", "value"), RENAMED)
def test_a_former_name_still_configures(
    cls: Any, section: str, former: str, name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    former_names._warned.clear()
    with caplog.at_level(logging.WARNING):
        made = cls(config=Config({section: {former: value}}))
        again = cls(config=Config({section: {former: value}}))
    assert getattr(made, name) == getattr(again, name) == value
    lines = [r.getMessage() for r in caplog.records if r.name == former_names.__name__]
    assert len(lines) == (section not in present(cls)) + (former != name), "one line for each, once"
    assert all(line.endswith("the old name works until version 1.0") for line in lines)


def present(cls: Any) -> set[str]:
    return {ancestor.__name__ for ancestor in cls.__mro__}


def test_a_present_name_takes_precedence() -> None:
    both = Config({"Daemon": {"host": "old", "log_lines": "text"}, "GPUPoolDaemon": {"host": "new"}})
    daemon = GPUPoolDaemon(config=both)
    assert (daemon.host, daemon.log_style) == ("new", "text")
    service = PoolService(config=Config({"PoolService": {"audit_days": 1.0, "audit_retention_days": 2.0}}))
    assert service.audit_retention_days == 2.0


def test_the_command_line_takes_former_names() -> None:
    GPUPoolServer.clear_instance()
    app = GPUPoolServer()
    app.initialize(["--PoolApp.port=4712"])
    assert app.port == 4712
