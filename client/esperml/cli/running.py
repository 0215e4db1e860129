"""Running a command's work: errors become one line, Ctrl-C ends what can end well."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import click

_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Do the work of a command. What its clients have to say goes to standard error, from warnings on.

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
        raise click.ClickException(error.detail) from error
    except (EsperError, OSError) as error:
        raise click.ClickException(str(error)) from error


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
