"""Figures for Prometheus over HTTP, off unless the settings name a port."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from esperml.server.listening import ExposedMetricsError, is_loopback

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from esperml.settings import ServerSettings

_log = structlog.get_logger(__name__)

# Longest time that a scrape waits for the event loop, in s.
_SCRAPE_TIMEOUT_S: Final = 10.0


class _OnLoop(Collector):
    """Collects on the event loop what may only be looked at there; Prometheus asks from a thread of its own."""

    def __init__(self, sources: Iterable[Callable[[], Iterator[Metric]]]) -> None:
        self._sources = list(sources)
        self._loop = asyncio.get_running_loop()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not wait for the loop that it runs on."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The figures as they are now."""

        async def on_loop() -> list[Metric]:
            return [metric for source in self._sources for metric in source()]

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(_SCRAPE_TIMEOUT_S)


@contextlib.asynccontextmanager
async def serving_metrics(
    settings: ServerSettings, sources: Iterable[Callable[[], Iterator[Metric]]]
) -> AsyncIterator[None]:
    """Answer ``GET /metrics`` while the context lasts, if the settings name a port.

    Args:
        settings: where to listen.
        sources: give figures; called on this event loop, once a scrape.

    Raises:
        ExposedMetricsError: the address is beyond loopback and ``server.insecure`` is not set.
        OSError: the address is taken, or none of this machine.
    """
    if settings.metrics_port is None:
        yield
        return
    host = settings.metrics_host
    if not settings.insecure and not is_loopback(host):
        raise ExposedMetricsError(host)
    registry = CollectorRegistry()
    registry.register(_OnLoop(sources))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(settings.metrics_port, host, registry)
    except OSError as error:
        raise OSError(
            f"cannot serve metrics on {host}:{settings.metrics_port}: {error.strerror or error}; server.metrics_port "
            "names another"
        ) from error
    _log.info("serving_metrics", url=f"http://{host}:{server.server_port}/metrics")
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        await asyncio.to_thread(thread.join)
        server.server_close()
