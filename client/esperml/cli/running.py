"""Running a command's work: errors become one line, Ctrl-C ends what can end well."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from esperml.cli.connecting import Server
    from esperml.client import CallFailedError

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T], server: Server) -> _T:
    """Do the work of a command. What its clients have to say goes to standard error, from warnings on.

    Args:
        work: the work.
        server: where it is done, for what an error says.

    Raises:
        click.ClickException: it failed as it may fail; the message says what to do.
        click.Abort: it was interrupted.
    """
    from esperml.client import CallFailedError, EsperError
    from esperml.settings import LogSettings, configure_logging

    configure_logging(LogSettings(level="warning"))
    try:
        return asyncio.run(work)
    except CallFailedError as error:
        raise click.ClickException(_advice(error, server)) from error
    except BrokenPipeError:
        raise  # Whoever read the output has seen enough; click ends quietly.
    except (EsperError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _advice(error: CallFailedError, server: Server) -> str:
    """What went wrong, and what to do where that can be told."""
    import grpc

    match error.code:
        case grpc.StatusCode.UNAVAILABLE if "connect" in error.detail or "resolving" in error.detail:
            return (
                f"no server answers at {server.target}: start one with `esper serve`, or name another with --server "
                f"({error.detail})"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"the server at {server.target} does not know {error.method}: it is older than this command"
        case _:
            return error.detail


@contextlib.contextmanager
def interrupt_sets(event: asyncio.Event) -> Iterator[None]:
    """While the context lasts, Ctrl-C and SIGTERM set ``event``; the next one interrupts as ever."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first() -> None:
        event.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    try:
        for number in numbers:
            loop.add_signal_handler(number, first)
    except RuntimeError:  # Not in the main thread, where no signal arrives.
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
