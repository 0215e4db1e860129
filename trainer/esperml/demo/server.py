"""The demo's server: a process of its own on a free port."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 10.0


class ServerError(RuntimeError):
    """The server did not start."""


class ServerProcess:
    """``esper serve`` in a child process, on a free port of the loopback address; stopped on exit.

    Attributes:
        address: ``host:port`` that it listens on.
        log_path: file that holds its log.
    """

    def __init__(self, data_dir: Path, log_path: Path, arguments: tuple[str, ...] = ()) -> None:
        self.address = ""
        self.log_path = log_path
        self._command = [
            sys.executable, "-m", "esperml.cli", "serve", "--port", "0", "--data-dir", str(data_dir), *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process. Raises :class:`ServerError` before it was started."""
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                self._command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            self.address = self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        """The address from the one line of JSON that the server prints when it takes calls."""
        assert process.stdout is not None  # noqa: S101 - it was opened as a pipe
        deadline = time.monotonic() + _START_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
                raise ServerError(f"the server was not ready within {_START_TIMEOUT_S:g} s; its log is {self.log_path}")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-5:])
            raise ServerError(f"the server ended with code {code} before it was ready: {tail}")
        try:
            return str(json.loads(line)["listening"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"the server said {line!r} instead of where it listens") from error

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
