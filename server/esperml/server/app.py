"""Assembles the server: Oona on its log engine, Tamiyo, health and reflection, in one process.

Tamiyo reaches Oona through the client here too, over loopback and with a token where others need one, so that nothing
changes when it moves elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from esperml.client.credentials import NO_CREDENTIALS, Credentials
from esperml.oona import Doors, OonaService, add_to_server, server_options
from esperml.oona.access import Role
from esperml.oona.engines import open_broker
from esperml.oona.metrics import bus_metrics
from esperml.server.decoding import DecodingInterceptor
from esperml.server.interceptor import TokenInterceptor
from esperml.server.listening import check_exposure, listen
from esperml.server.metrics import serving_metrics
from esperml.server.tls import Certificates
from esperml.server.watch import Health, TokensFile, watch
from esperml.settings import Settings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.loop import TamiyoLoop
from esperml.tamiyo.service import RunsService, TamiyoService
from esperml.tamiyo.store import PolicyStore
from esperml.v1 import oona_pb2, runs_pb2, runs_pb2_grpc, tamiyo_pb2, tamiyo_pb2_grpc

_log = structlog.get_logger(__name__)

SERVICES: Final = tuple(
    descriptor.full_name
    for descriptor in (
        oona_pb2.DESCRIPTOR.services_by_name["Oona"],
        tamiyo_pb2.DESCRIPTOR.services_by_name["Tamiyo"],
        runs_pb2.DESCRIPTOR.services_by_name["Runs"],
    )
)


def transport_options(settings: Settings) -> list[tuple[str, int]]:
    """Options of the gRPC server: what the bus needs, and how much a peer may do before it has said anything."""
    return [
        *server_options(settings.oona),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", round(settings.server.handshake_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.server.idle_timeout_s * 1000)),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_concurrent_streams", settings.oona.max_streams),
    ]


async def serve(settings: Settings, *, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
    """Serve until ``stop`` is set, then let open calls end.

    Args:
        settings: all settings.
        stop: set it to stop the server.
        ready: called once with the address, ``host:port``, when every service answers.

    Raises:
        ExposedAddressError: the address is beyond loopback, without TLS or tokens and ``server.insecure``.
        ExposedMetricsError: that of the metrics is beyond loopback, without ``server.insecure``.
        TlsError: the certificate, its key or the authorities of clients cannot be used.
        TokensError: the file of tokens cannot be used.
        OSError: the address is taken, or the data folder cannot be written.
        LogError: the log is damaged, or another server has it open.
        CheckpointError: the policy does not load.
    """
    check_exposure(settings.server)
    certificates = Certificates.from_settings(settings.server)
    file = None if settings.server.tokens is None else TokensFile(settings.server.tokens)
    torch.set_num_threads(settings.tamiyo.threads)
    policies = PolicyStore.from_settings(settings.tamiyo)
    settings.server.data_dir.mkdir(parents=True, exist_ok=True)

    # What is entered first is left last: the log outlives all that writes to it.
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(open_broker(settings.oona, settings.server.data_dir))
        doors = Doors(settings.oona)
        oona = OonaService(broker, doors)
        controller = Controller(policies, settings.tamiyo)
        own = NO_CREDENTIALS
        interceptors: list[grpc.aio.ServerInterceptor[Any, Any]] = [DecodingInterceptor()]
        if file is not None:
            own = Credentials(token=file.tokens.add_internal("tamiyo@server", Role.CONTROLLER))
            interceptors.append(TokenInterceptor(file.tokens, doors.refusals))
        loop = TamiyoLoop(controller, credentials=own)
        checks = health.aio.HealthServicer()  # type: ignore[attr-defined]

        server = grpc.aio.server(interceptors=interceptors, options=transport_options(settings))
        add_to_server(oona, server)
        services = SERVICES if settings.tamiyo.enabled else SERVICES[:1]
        if settings.tamiyo.enabled:
            tamiyo_pb2_grpc.add_TamiyoServicer_to_server(TamiyoService(controller), server)
            runs_pb2_grpc.add_RunsServicer_to_server(RunsService(controller, loop.publish), server)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address, inside = listen(server, settings.server, certificates, stack)
        await server.start()
        stack.push_async_callback(server.stop, settings.server.shutdown_grace_s)
        stack.callback(oona.shut_down)
        if settings.tamiyo.enabled:
            await stack.enter_async_context(_in_background(loop.running(inside), "tamiyo_stopped"))
        stack.push_async_callback(checks.enter_graceful_shutdown)

        def tamiyo_problem() -> str:
            return "" if loop.is_running else "Tamiyo has stopped; the log says why"

        problems = (lambda: doors.storage_problem or broker.problem, tamiyo_problem, tamiyo_problem)
        await stack.enter_async_context(
            serving_metrics(settings.server, [lambda: bus_metrics(broker, doors), loop.work.metrics])
        )
        state = Health(checks, dict(zip(services, problems, strict=False)))
        await state.refresh()
        watching = asyncio.create_task(watch(doors, file, state))
        watching.add_done_callback(partial(_say_if_failed, "watch_stopped"))
        stack.callback(watching.cancel)
        _log.info(
            "serving",
            address=address,
            tls="none" if certificates is None else "mutual" if settings.server.client_ca else "server",
            tokens=file is not None,
            policy=policies.default.facts.name,
            durability=broker.durability,
        )
        ready(address)
        await stop.wait()
        _log.info("stopping")


@contextlib.asynccontextmanager
async def _in_background(service: contextlib.AbstractAsyncContextManager[None], stopped: str) -> AsyncIterator[None]:
    """Keep a service going beside the others: what ends it is logged as ``stopped``, and ends nothing else.

    Raises:
        Exception: whatever kept it from starting.
    """
    started = asyncio.Event()

    async def run() -> None:
        async with service:
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    starting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait([task, starting], return_when=asyncio.FIRST_COMPLETED)
        if not started.is_set():
            await task
        task.add_done_callback(partial(_say_if_failed, stopped))
        yield
    finally:
        starting.cancel()
        task.cancel()
        await asyncio.wait([task])


def _say_if_failed(event: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error(event, exc_info=error)
