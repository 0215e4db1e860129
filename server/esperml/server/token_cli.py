"""``esper token``: tokens that let clients in."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from esperml.server.tokens import Entry

_UNITS: Final = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_DURATION: Final = re.compile(r"(\d{1,5})([mhdw])")


class DurationType(click.ParamType["timedelta | None"]):
    """A time such as ``12h`` or ``30d``, or ``never``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta | None:
        """The time, None for ``never``, or a usage error."""
        text = str(value)
        if text == "never":
            return None
        match = _DURATION.fullmatch(text)
        if match is None or not int(match[1]):
            self.fail(f"{text!r} is no time: a number with m, h, d or w behind it, or never", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.group()
@click.option(
    "--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="File of tokens.  [default: server.tokens]"
)
@click.pass_context
def token(ctx: click.Context, path: Path | None) -> None:
    """Make, list and revoke tokens that let clients in.

    The file keeps only hashes of them. A server that was started with it (esper serve --tokens FILE) sees changes
    within seconds. Roles: a host is a training run (it publishes what it measures and reads its commands), a
    controller decides, a viewer reads, an admin may do everything.

    \b
    Example:
        esper token --file tokens.json new --role host --run 'my-run*' > my-run.token
    """
    ctx.obj = path


@token.command()
@click.option("--role", type=click.Choice(["host", "controller", "viewer", "admin"]), required=True, help="What for.")
@click.option(
    "--run",
    "runs",
    multiple=True,
    help="A run that it has to do with, or the beginning of runs' names with * behind it. Repeat for more. Required "
    "for hosts.  [default: *, every run]",
)
@click.option("--name", default="", help="Who shall hold it, for the log.  [default: the role and the token's id]")
@click.option("--expires", type=DurationType(), default="90d", show_default=True, help="When it ends: 12h, 30d, never.")
@click.pass_context
def new(ctx: click.Context, role: str, runs: tuple[str, ...], name: str, expires: timedelta | None) -> None:
    """Make a token and print it, this once."""
    from esperml.oona.access import Role
    from esperml.server.tokens import TokensError, create

    if role == "host" and not runs:
        raise click.UsageError("a host needs --run: the runs that it may report for, '*' for every run")
    expires_at = None if expires is None else datetime.now(UTC) + expires
    try:
        made, entry = create(_path(ctx), role=Role(role), runs=runs or ("*",), expires_at=expires_at, name=name)
    except TokensError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{entry.name}: role {entry.role}, runs {', '.join(entry.runs)}, {_ends(entry)}", err=True)
    click.echo(made)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_tokens(ctx: click.Context, as_json: bool) -> None:
    """List the tokens: whose, what for, until when. The tokens themselves are nowhere."""
    from esperml.server.tokens import TokensError, load

    try:
        entries = load(_path(ctx))
    except TokensError as error:
        raise click.ClickException(str(error)) from error
    if not as_json:
        click.echo(f"{'id':<10}{'name':<24}{'role':<12}{'ends':<32}runs")
    for entry in entries:
        if as_json:
            click.echo(json.dumps(entry.model_dump(mode="json", exclude={"sha256"})))
        else:
            click.echo(f"{entry.id:<10}{entry.name:<24}{entry.role:<12}{_ends(entry):<32}{', '.join(entry.runs)}")


@token.command()
@click.argument("which")
@click.pass_context
def revoke(ctx: click.Context, which: str) -> None:
    """Revoke the token with an id, or all that have a name. Open streams end within seconds."""
    from esperml.server.tokens import TokensError
    from esperml.server.tokens import revoke as revoke_in

    try:
        revoked = revoke_in(_path(ctx), which)
    except TokensError as error:
        raise click.ClickException(str(error)) from error
    for entry in revoked:
        click.echo(f"revoked {entry.id} ({entry.name}, role {entry.role})")


def _ends(entry: Entry) -> str:
    if entry.expires_at is None:
        return "never ends"
    verb = "ended" if entry.expired(datetime.now(UTC)) else "ends"
    return f"{verb} {entry.expires_at:%Y-%m-%d %H:%M} UTC"


def _path(ctx: click.Context) -> Path:
    from esperml.settings import SettingsError, load

    path: Path | None = ctx.obj
    if path is not None:
        return path
    try:
        configured = load().server.tokens
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    if configured is None:
        raise click.UsageError("which file? Give --file, or the setting server.tokens (ESPER_SERVER__TOKENS)")
    return configured
