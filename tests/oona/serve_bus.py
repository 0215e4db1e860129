"""A bus in a process of its own, with settings from the environment: prints its port, and serves until killed.

On SIGUSR1 it prints what is alive in it, as JSON on one line.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from pathlib import Path

import grpc

from esperml.oona import Broker, OonaService, SqliteLog, add_to_server, server_options
from esperml.oona.stream import ClientStream
from esperml.settings import configure_logging, load


def say(what: object) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


def say_what_is_alive() -> None:
    gc.collect()
    # By type: some libraries' objects warn of themselves when they are asked for their class.
    streams = sum(issubclass(type(thing), ClientStream) for thing in gc.get_objects())
    say({"tasks": len(asyncio.all_tasks()), "streams": streams})


async def main(path: Path, port: int) -> None:
    loaded = load()
    configure_logging(loaded.log)
    settings = loaded.oona
    log = SqliteLog(path, max_bytes=settings.max_log_bytes, durability=settings.durability)
    server = grpc.aio.server(options=[*server_options(settings), ("grpc.so_reuseport", 0)])
    add_to_server(OonaService(Broker(log, settings)), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, say_what_is_alive)
    say(port)
    await server.wait_for_termination()


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
