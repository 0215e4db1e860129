"""``esper log``: what to do about a damaged log of the bus."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esperml.oona.sqlite.salvage import Findings

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group()
def log() -> None:
    """Look into the bus's log file, and save what a damaged one still holds.

    The log is oona.sqlite in the server's data folder. The server must not be running.
    """


@log.command()
@click.argument("file", type=_FILE)
def check(file: Path) -> None:
    """Check every record of a log, and say what could be saved.

    Changes nothing. Exits with 1 where anything is damaged or lost.

    \b
    Example:
        esper log check esper-data/oona.sqlite
    """
    from esperml.oona.sqlite.salvage import examine

    with _errors_in_words():
        findings = examine(file)
    _say(findings)
    raise SystemExit(0 if findings.is_whole else 1)


@log.command()
@click.argument("damaged", type=_FILE)
@click.argument("new", type=click.Path(path_type=Path))
def salvage(damaged: Path, new: Path) -> None:
    """Save what a damaged log still holds into a new one.

    Saved are records under their old offsets, publishers' sequences, groups' progress and dead letters; readers skip
    what is lost. The damaged log is not changed. Exits with 1 where anything was lost.

    \b
    Example:
        esper log salvage esper-data/oona.sqlite saved.sqlite
    """
    from esperml.oona.sqlite.salvage import salvage as save

    with _errors_in_words():
        findings = save(damaged, new)
    _say(findings)
    click.echo(
        f"saved to {new}; to go on with it, put away {damaged} with its -wal, -shm and .lock files, and move "
        f"{new} to its place"
    )
    raise SystemExit(0 if findings.is_whole else 1)


@contextlib.contextmanager
def _errors_in_words() -> Iterator[None]:
    from esperml.oona.log import LogError

    try:
        yield
    except (LogError, OSError, sqlite3.Error) as error:
        raise click.ClickException(str(error)) from error


def _say(findings: Findings) -> None:
    for line in findings.lines():
        click.echo(line)
