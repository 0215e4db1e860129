"""A real bus on a free port, for every test that needs one."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from hypothesis import HealthCheck, settings

from esperml.client import new_event
from esperml.oona import Broker, OonaService, SqliteLog, add_to_server, server_options
from esperml.settings import OonaSettings
from esperml.v1 import event_pb2, run_pb2

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _log_as_configured_by_the_test_alone() -> Iterator[None]:
    """Commands that tests run in this process configure its log; the next test shall not find it so."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _nothing_is_left_with_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a session cannot send is kept in a folder of the test's own, which is made when it is needed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state-{uuid.uuid4().hex}"))
    monkeypatch.delenv("ESPER_SPOOL", raising=False)


class Bus:
    """A server with the bus on one log file, which can be stopped and started again on the same port."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = OonaSettings()
        self.port = 0
        self.running = False

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, **settings: object) -> None:
        self.settings = self.settings.model_copy(update=settings)
        self.log = SqliteLog(self.path, max_bytes=self.settings.max_log_bytes, durability=self.settings.durability)
        self.broker = Broker(self.log, self.settings)
        self.service = OonaService(self.broker)
        self.server = grpc.aio.server(options=[*server_options(self.settings), ("grpc.so_reuseport", 0)])
        add_to_server(self.service, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()
        self.running = True

    async def stop(self) -> None:
        """Stop as on SIGTERM: streams end with UNAVAILABLE."""
        if self.running:
            self.running = False
            self.service.shut_down()
            await self.server.stop(2)
            await self.log.close()

    def execute(self, statement: str) -> None:
        """Change the log's file from outside, in a transaction of its own.

        On the log's own connection it could fall into a transaction of the writer, and be rolled back with it.
        """
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute(statement)

    async def break_off(self) -> None:
        """Stop without a word to the streams."""
        self.running = False
        await self.server.stop(None)
        await self.log.close()


@pytest.fixture
async def bus(tmp_path):
    bus = Bus(tmp_path / "oona.sqlite")
    await bus.start()
    yield bus
    await bus.stop()


@pytest.fixture
def make_event():
    """Makes an event that kind events carries; ``mark`` tells events apart."""

    def make(run_id: str = "run-1", mark: str = "") -> event_pb2.Event:
        return new_event(run_id, run_ended=run_pb2.RunEnded(error=mark))

    return make
