"""A real server in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    target: str
    data_dir: Path
    log: Path

    @property
    def port(self) -> str:
        return self.target.rpartition(":")[2]

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


StartServer = Callable[..., Server]


def _start(data_dir: Path, *flags: str, port: str = "0") -> Server:
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server.log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "esperml.cli", "serve", "--port", port, "--data-dir", str(data_dir), *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()  # Blocks until the server says that it is ready, or ends.
    process.stdout.close()
    if not line:
        process.wait(timeout=30)
        raise AssertionError(f"the server did not start:\n{log.read_text()}")
    return Server(process, json.loads(line)["listening"], data_dir, log)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the shipped policy, for the tests of one module."""
    running = _start(tmp_path_factory.mktemp("server"), "--policy", "chance")
    yield running
    running.kill()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that end with the test. ``start_server(*flags, port="0", data_dir=…)``."""
    started: list[Server] = []

    def start(*flags: str, port: str = "0", data_dir: Path | None = None) -> Server:
        started.append(_start(data_dir or tmp_path / "data", *flags, port=port))
        return started[-1]

    yield start
    for running in started:
        running.kill()
