"""Three NATS servers and servers of the bus on them, as processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Final, TypeVar

from esperml.oona.jetstream.nats_server import cluster_of_three

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from pathlib import Path

_T = TypeVar("_T")

_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 15.0
_LOOK_S: Final = 0.5


class ClusterError(RuntimeError):
    """A process of the cluster did not start, or has ended."""


async def run(data_dir: Path, gateways: int, ready: Callable[[dict[str, object]], None]) -> None:
    """Run the cluster until a signal comes.

    Args:
        data_dir: folder of everything that it stores, absolute.
        gateways: servers of the bus.
        ready: called once with the addresses.

    Raises:
        NatsServerError: nats-server is not installed, or does not start.
        ClusterError: a process did not start, or has ended.
        OSError: the folder cannot be written.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running = asyncio.create_task(_run(data_dir, gateways, ready), name="cluster")
    stopping = asyncio.create_task(stop.wait(), name="cluster-stop")
    # Whenever the signal comes, what runs by then is stopped.
    await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _run(data_dir: Path, gateways: int, ready: Callable[[dict[str, object]], None]) -> None:
    """Run the cluster until cancelled, or until one of its processes ends."""
    async with contextlib.AsyncExitStack() as stack:
        servers = cluster_of_three(data_dir)
        for server in servers:
            server.start()
            stack.callback(server.stop)
        await _all(server.ready() for server in servers)
        nats = ",".join(server.url for server in servers)
        monitoring = ",".join(server.monitoring for server in servers)
        started = await _all(_start_gateway(data_dir, index, nats, monitoring, stack) for index in range(gateways))
        processes, targets = zip(*started, strict=True)
        ready({"target": ",".join(targets), "nats": nats, "monitoring": monitoring})
        while True:
            await asyncio.sleep(_LOOK_S)
            for index, process in enumerate(processes):
                if process.returncode is not None:
                    raise ClusterError(
                        f"server {index + 1} of the bus has ended; see {data_dir}/gateway-{index + 1}/server.log"
                    )
            for server in servers:
                if not server.is_running:
                    raise ClusterError(f"{server.name} has ended; see {data_dir}/{server.name}/nats.log")


async def _all(works: Iterable[Coroutine[None, None, _T]]) -> list[_T]:
    """What all give. Where one fails, none of the others goes on."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start_gateway(
    data_dir: Path, index: int, nats: str, monitoring: str, stack: contextlib.AsyncExitStack
) -> tuple[asyncio.subprocess.Process, str]:
    """Start one server of the bus. Returns its process and its address."""
    folder = data_dir / f"gateway-{index + 1}"
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "esper.toml"
    configuration.write_text(f'[oona.jetstream]\nmonitoring = "{monitoring}"\ntimeout_s = 30.0\n')
    arguments = ["serve", "--engine", "jetstream", "--nats", nats, "--port", "0", "--data-dir", str(folder)]
    arguments += ["--config", str(configuration), *(["--bus-only"] if index else [])]
    log = stack.enter_context((folder / "server.log").open("ab"))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "esperml.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    stack.push_async_callback(_stop, process)
    if process.stdout is None:
        raise ClusterError("the server's output cannot be read")
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = await process.stdout.readline()
    except TimeoutError as error:
        raise ClusterError(f"server {index + 1} of the bus does not get ready; see {folder}/server.log") from error
    if not line:
        raise ClusterError(f"server {index + 1} of the bus did not start; see {folder}/server.log")
    return process, json.loads(line)["listening"]


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
