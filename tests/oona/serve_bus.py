"""A bus in a process of its own, with settings from the environment: prints its port, and serves until killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc

from esperml.oona import Broker, OonaService, SqliteLog, add_to_server, server_options
from esperml.settings import load


async def main(path: Path, port: int) -> None:
    settings = load().oona
    log = SqliteLog(path, max_bytes=settings.max_log_bytes, durability=settings.durability)
    server = grpc.aio.server(options=[*server_options(settings), ("grpc.so_reuseport", 0)])
    add_to_server(OonaService(Broker(log, settings)), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
