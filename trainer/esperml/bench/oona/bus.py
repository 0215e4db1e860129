"""The bus alone, in a process of its own: what ``esper serve`` runs beside Tamiyo.

``python -m esperml.bench.oona.bus FOLDER`` prints ``{"listening": …}`` and serves until it is ended. Settings come from
the environment, as they do for ``esper serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from esperml.oona import OonaService, add_to_server, server_options
from esperml.oona.engines import open_broker
from esperml.settings import LogSettings, OonaSettings, configure_logging, load


def say_listening(port: int) -> None:
    """Tell the parent process where this one listens."""
    sys.stdout.write(json.dumps({"listening": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()


@contextlib.asynccontextmanager
async def serving(settings: OonaSettings, folder: Path) -> AsyncIterator[int]:
    """The bus on a free port, which it yields, with its files in ``folder``."""
    async with open_broker(settings, folder) as broker:
        server = grpc.aio.server(options=[*server_options(settings), ("grpc.so_reuseport", 0)])
        add_to_server(OonaService(broker), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(None)


async def main(folder: Path) -> None:
    """Serve until the process is ended."""
    configure_logging(LogSettings(level="warning"))
    async with serving(load().oona, folder) as port:
        say_listening(port)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
