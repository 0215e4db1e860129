"""Assembles the server: Oona on its embedded log, Tamiyo, health and reflection, in one process.

Tamiyo reaches Oona through the client and over loopback here too, so that nothing changes when it moves elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable
from typing import Final

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from esperml.oona import Broker, OonaService, SqliteLog, add_to_server, server_options
from esperml.oona.retention import Retention
from esperml.settings import Settings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.loop import TamiyoLoop
from esperml.tamiyo.service import RunsService, TamiyoService
from esperml.tamiyo.store import PolicyStore
from esperml.v1 import oona_pb2, runs_pb2, runs_pb2_grpc, tamiyo_pb2, tamiyo_pb2_grpc

_log = structlog.get_logger(__name__)

EXPOSED_WITHOUT_TLS: Final = (
    "without TLS and tokens the server listens on loopback only; pass --insecure to listen on {host} all the same"
)

SERVICES: Final = tuple(
    descriptor.full_name
    for descriptor in (
        oona_pb2.DESCRIPTOR.services_by_name["Oona"],
        tamiyo_pb2.DESCRIPTOR.services_by_name["Tamiyo"],
        runs_pb2.DESCRIPTOR.services_by_name["Runs"],
    )
)


class ExposedAddressError(ValueError):
    """The server was told to listen beyond loopback, and not that it may do so without TLS."""

    def __init__(self, host: str) -> None:
        super().__init__(EXPOSED_WITHOUT_TLS.format(host=host))
        self.host = host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Of names, only ``localhost`` counts as that."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _reachable(host: str, port: int) -> str:
    """The address by which this process reaches itself: nothing connects to "any address"."""
    return _address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104


async def serve(settings: Settings, *, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
    """Serve until ``stop`` is set, then let open calls end.

    Args:
        settings: all settings.
        stop: set it to stop the server.
        ready: called once with the address, ``host:port``, when every service answers.

    Raises:
        ExposedAddressError: the address is beyond loopback and ``server.insecure`` is not set.
        OSError: the address is taken, or the data folder cannot be written.
        LogError: the log is damaged, or another server has it open.
        CheckpointError: the policy does not load.
    """
    host = settings.server.host
    if not settings.server.insecure and not is_loopback(host):
        raise ExposedAddressError(host)
    torch.set_num_threads(settings.tamiyo.threads)
    policies = PolicyStore.from_settings(settings.tamiyo)
    settings.server.data_dir.mkdir(parents=True, exist_ok=True)

    # What is entered first is left last: the log outlives all that writes to it.
    async with contextlib.AsyncExitStack() as stack:
        log = SqliteLog(
            settings.server.data_dir / "oona.sqlite",
            max_bytes=settings.oona.max_log_bytes,
            durability=settings.oona.durability,
        )
        stack.push_async_callback(log.close)
        await stack.enter_async_context(Retention(log, settings.oona.retention).running())
        oona = OonaService(Broker(log, settings.oona))
        controller = Controller(policies, settings.tamiyo)
        loop = TamiyoLoop(controller)
        checks = health.aio.HealthServicer()  # type: ignore[attr-defined]

        server = grpc.aio.server(options=[*server_options(settings.oona), ("grpc.so_reuseport", 0)])
        add_to_server(oona, server)
        tamiyo_pb2_grpc.add_TamiyoServicer_to_server(TamiyoService(controller), server)
        runs_pb2_grpc.add_RunsServicer_to_server(RunsService(controller, loop.publish), server)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = _address(host, settings.server.port)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: is another server there?") from error

        await server.start()
        stack.push_async_callback(server.stop, settings.server.shutdown_grace_s)
        stack.callback(oona.shut_down)
        await stack.enter_async_context(loop.running(_reachable(host, port)))
        stack.push_async_callback(checks.enter_graceful_shutdown)
        for service in (*SERVICES, ""):
            await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
        address = _address(host, port)
        _log.info("serving", address=address, policy=policies.default.facts.name, durability=log.durability)
        ready(address)
        await stop.wait()
        _log.info("stopping")
