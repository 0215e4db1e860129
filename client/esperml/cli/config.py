"""``esper config``: the settings in force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import click

_ADDRESSES: Final = frozenset({"oona.jetstream.servers", "oona.jetstream.monitoring"})


@click.group()
def config() -> None:
    """Show the settings in force and where each came from.

    Defaults < TOML file < environment < flags. The file is esper.toml in the working folder, or the one that
    $ESPER_CONFIG or --config names. ESPER_SERVER__PORT=50052 sets server.port.
    """


@config.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML file to read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: key to {value, origin, description}.")
def show(file: Path | None, as_json: bool) -> None:
    """Print every setting, its value and its origin.

    \b
    Example:
        ESPER_TAMIYO__CONFIDENCE_THRESHOLD=0.7 esper config show
    """
    from esperml.settings import SettingsError, sources

    try:
        _, listed = sources(file=file)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        document = {
            source.key: {
                "value": _without_password(source.key, source.value),
                "origin": source.origin,
                "description": source.description,
            }
            for source in listed
        }
        click.echo(json.dumps(document, indent=2, default=str))
        return

    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for source in listed:
        style = "" if source.origin == "default" else "bold green"
        # Not in columns, and not broken: whoever copies a name or a path from a narrow terminal gets the whole of it.
        console.print(
            Text(f"{source.key} = {_without_password(source.key, source.value)}", style),
            Text(f"({source.origin})", "dim"),
            soft_wrap=True,
        )
        console.print(Padding(source.description, (0, 0, 0, 4), expand=False))


def _without_password(key: str, value: object) -> object:
    """A setting as it may be shown: of addresses, what stands before an @ may be a password."""
    if key not in _ADDRESSES or not isinstance(value, str):
        return value
    return re.sub(r"(^|,\s*)([^\s,/@]+://)?[^\s,]*@", r"\1\2…@", value)
