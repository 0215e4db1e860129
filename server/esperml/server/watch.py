"""What the server looks at again and again: whether tokens still hold, and whether its services can do their work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2

from esperml.oona import Doors
from esperml.server.tokens import Tokens, TokensError, load

_log = structlog.get_logger(__name__)

INTERVAL_S: Final = 1.0
"""Time from one look to the next, in s."""

OVERALL: Final = ""
"""The name by which gRPC's health service calls the server as a whole."""


class TokensFile:
    """The tokens of a file, as it is now.

    Args:
        path: the file.

    Attributes:
        tokens: knows callers by their tokens.

    Raises:
        TokensError: it is not there or not as it must be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._mark()
        self._problem = ""
        self.tokens = Tokens(load(path))
        self.tokens.look_again = self.refresh

    def refresh(self) -> None:
        """Read the file if it has changed. One that cannot be used changes nothing, and is told of in the log."""
        try:
            mark = self._mark()
            if mark == self._seen:
                return
            entries = load(self._path)
        except TokensError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _log.error("tokens_not_read", detail=self._problem, consequence="those read last go on being valid")
            return
        self._seen, self._problem = mark, ""
        self.tokens.replace(entries)
        _log.info("tokens_read", path=str(self._path), tokens=len(entries))

    def _mark(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise TokensError(self._path, error.strerror or str(error)) from error
        return status.st_mtime_ns, status.st_size, status.st_ino


def end_streams(doors: Doors, tokens: Tokens) -> None:
    """End the streams whose token was revoked, has expired, or allows something else than when they were opened."""
    for admission in doors.inside:
        if admission.caller is None:
            continue
        standing = tokens.standing(admission.caller)
        if isinstance(standing, str):
            admission.refused(standing)
            admission.end(grpc.StatusCode.UNAUTHENTICATED, standing)
        elif standing != admission.caller:
            admission.end(grpc.StatusCode.UNAVAILABLE, f"{standing} has other rights than before; open a new stream")


class Health:
    """Keeps gRPC's health service up to date.

    Args:
        servicer: the service.
        checks: for each service, what keeps it from its work, in words; empty where nothing does.
    """

    def __init__(self, servicer: Any, checks: Mapping[str, Callable[[], str]]) -> None:
        self._servicer = servicer
        self._checks = checks
        self._problems: dict[str, str | None] = dict.fromkeys(checks)

    async def refresh(self) -> None:
        """Ask every service, and tell what has changed."""
        for service, check in self._checks.items():
            problem, before = check(), self._problems[service]
            if problem == before:
                continue
            self._problems[service] = problem
            await self._set(service, serving=not problem)
            if problem:
                _log.error("service_unhealthy", service=service, problem=problem)
            elif before:
                _log.info("service_healthy", service=service)
        await self._set(OVERALL, serving=not any(self._problems.values()))

    async def _set(self, service: str, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._servicer.set(service, status.SERVING if serving else status.NOT_SERVING)


async def watch(doors: Doors, file: TokensFile | None, health: Health) -> None:
    """Look at everything once in :data:`INTERVAL_S`, for ever."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        if file is not None:
            file.refresh()
            end_streams(doors, file.tokens)
        await health.refresh()
