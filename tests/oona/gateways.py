"""Gateways of a cluster: in the process of the test, and in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc

from esperml.oona import OonaService, add_to_server, server_options
from esperml.oona.jetstream.broker import ClusterBroker, open_cluster_broker
from esperml.settings import OonaSettings


class Gateway:
    """One gateway on a free port."""

    def __init__(self, settings: OonaSettings) -> None:
        self.settings = settings
        self.port = 0
        self.broker: ClusterBroker

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.broker = await self.stack.enter_async_context(open_cluster_broker(self.settings))
        self.service = OonaService(self.broker)
        self.server = grpc.aio.server(options=[*server_options(self.settings), ("grpc.so_reuseport", 0)])
        add_to_server(self.service, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        self.service.shut_down()
        await self.server.stop(2)
        await self.stack.aclose()


class GatewayProcess:
    """One gateway in a process of its own, on the port that it had first."""

    def __init__(self, settings: OonaSettings) -> None:
        self.settings = settings
        self.port = 0
        self.process: subprocess.Popen[str]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, __file__, str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(self.settings.model_dump_json() + "\n")
        self.process.stdin.flush()
        line = await asyncio.to_thread(self.process.stdout.readline)
        assert line, "the gateway has ended"
        self.port = int(line)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


async def main() -> None:
    gateway = Gateway(OonaSettings.model_validate_json(sys.stdin.readline()))
    gateway.port = int(sys.argv[1])
    await gateway.start()
    sys.stdout.write(f"{gateway.port}\n")
    sys.stdout.flush()
    # The log goes where it never fills up, whether or not anybody reads it.
    sys.stdout = Path(os.devnull).open("w")  # noqa: ASYNC230, SIM115
    await gateway.server.wait_for_termination()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run(main())
