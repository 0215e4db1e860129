"""Opens the bus on the engine that the settings name."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from esperml.oona.broker import Broker
from esperml.oona.log import LogUnavailableError
from esperml.oona.retention import Retention
from esperml.oona.sqlite.log import SqliteLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from esperml.settings import OonaSettings


@contextlib.asynccontextmanager
async def open_broker(settings: OonaSettings, data_dir: Path) -> AsyncIterator[Broker]:
    """The bus, for as long as the context lasts.

    Args:
        settings: of the bus.
        data_dir: folder of logs that are files. It must exist.

    Raises:
        LogError: the engine cannot be opened, or is not installed.
    """
    if settings.engine == "jetstream":
        try:
            from esperml.oona.jetstream.broker import open_cluster_broker
        except ModuleNotFoundError as error:
            if error.name != "nats":
                raise
            problem = "oona.engine: jetstream needs nats-py, which is not installed: pip install 'esperml[jetstream]'"
            raise LogUnavailableError(problem) from error
        async with open_cluster_broker(settings) as broker:
            yield broker
        return
    log = SqliteLog(data_dir / "oona.sqlite", max_bytes=settings.max_log_bytes, durability=settings.durability)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(log.close)
        await stack.enter_async_context(Retention(log, settings.retention).running())
        yield Broker(log, settings)
