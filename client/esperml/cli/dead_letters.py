"""``esper topics dead-letters``: what groups gave up on, and what to do about it."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import click

from esperml.cli.connecting import Server, ServerGroup, server_options
from esperml.cli.parameters import KIND, MAX_OFFSET
from esperml.cli.running import run

if TYPE_CHECKING:
    from esperml.client import OonaClient
    from esperml.v1 import event_pb2, oona_pb2

_OFFSET = click.IntRange(0, MAX_OFFSET)


@click.group(cls=ServerGroup)
def dead_letters() -> None:
    """Look at, replay or purge what a group gave up on.

    That is records which were delivered as often as the group allows and never acknowledged. They are kept
    beside the log until they are purged, or replayed and acknowledged.

    \b
    Examples:
        esper topics dead-letters list outcomes tamiyo
        esper topics dead-letters show outcomes tamiyo 1234
        esper topics dead-letters replay outcomes tamiyo 1234
        esper topics dead-letters purge outcomes tamiyo --all
    """


@dead_letters.command("list")
@click.argument("kind", type=KIND)
@click.argument("group")
@click.option("--from", "from_offset", type=_OFFSET, default=0, help="Only those from this offset on.")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="List so many at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the whole record.")
@server_options
def list_dead_letters(
    server: Server, kind: event_pb2.Kind.ValueType, group: str, from_offset: int, count: int, as_json: bool
) -> None:
    """List the dead letters of GROUP on KIND, by offset."""
    found, more = run(_some(_client(server), kind, group, from_offset, count), server)
    if as_json:
        for letter in found:
            click.echo(_as_json(letter))
        return
    if not found:
        click.echo(f"group {group!r} has no dead letters here")
        return
    click.echo(f"{'offset':>12}{'attempts':>10}  {'given up':<21}{'because':<14}{'run':<24}payload")
    for letter in found:
        record = letter.record
        click.echo(
            f"{record.offset:>12}{record.delivery_attempt:>10}  {_moment(letter):<21}{_reason(letter):<14}"
            f"{record.event.run_id:<24}{record.event.WhichOneof('payload')}"
            f"{'  (replaying)' if letter.replaying else ''}"
        )
    if more:
        click.echo(f"there are more: --from {found[-1].record.offset + 1}", err=True)


@dead_letters.command()
@click.argument("kind", type=KIND)
@click.argument("group")
@click.argument("offset", type=_OFFSET)
@server_options
def show(server: Server, kind: event_pb2.Kind.ValueType, group: str, offset: int) -> None:
    """Show the dead letter at OFFSET, with its event, as JSON."""
    found, _ = run(_some(_client(server), kind, group, offset, 1), server)
    if not found or found[0].record.offset != offset:
        raise click.ClickException(
            f"group {group!r} has no dead letter at offset {offset}; `esper topics dead-letters list` shows what it has"
        )
    click.echo(_as_json(found[0], indent=2))


@dead_letters.command()
@click.argument("kind", type=KIND)
@click.argument("group")
@click.argument("offsets", type=_OFFSET, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@server_options
def replay(
    server: Server, kind: event_pb2.Kind.ValueType, group: str, offsets: tuple[int, ...], everything: bool
) -> None:
    """Give the dead letters at OFFSETS back to GROUP, as if for the first time.

    Each stays a dead letter until the group acknowledges it. The runs' later records do not wait for it.
    """
    _check_choice(offsets, everything)
    count = run(_client(server).replay_dead_letters(kind, group, offsets), server)
    click.echo(f"{count} given back to group {group!r}")


@dead_letters.command()
@click.argument("kind", type=KIND)
@click.argument("group")
@click.argument("offsets", type=_OFFSET, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_options
def purge(
    server: Server,
    kind: event_pb2.Kind.ValueType,
    group: str,
    offsets: tuple[int, ...],
    everything: bool,
    yes: bool,
) -> None:
    """Delete the dead letters at OFFSETS for good."""
    _check_choice(offsets, everything)
    if not yes:
        which = "all dead letters" if everything else f"{len(offsets)} dead letter{'' if len(offsets) == 1 else 's'}"
        click.confirm(f"Delete {which} of group {group!r} at {server.target} for good?", abort=True)
    count = run(_client(server).purge_dead_letters(kind, group, offsets), server)
    click.echo(f"{count} deleted")


def _check_choice(offsets: tuple[int, ...], everything: bool) -> None:
    if bool(offsets) == everything:
        raise click.UsageError("Give either OFFSETS or --all.")


async def _some(
    client: OonaClient, kind: event_pb2.Kind.ValueType, group: str, from_offset: int, count: int
) -> tuple[list[oona_pb2.DeadLetter], bool]:
    """The first dead letters from an offset on, and whether there are more."""
    found: list[oona_pb2.DeadLetter] = []
    async for letter in client.dead_letters(kind, group, from_offset=from_offset):
        if len(found) == count:
            return found, True
        found.append(letter)
    return found, False


def _as_json(letter: oona_pb2.DeadLetter, indent: int | None = None) -> str:
    from google.protobuf import json_format

    return json.dumps(json_format.MessageToDict(letter, preserving_proto_field_name=True), indent=indent)


def _moment(letter: oona_pb2.DeadLetter) -> str:
    return f"{letter.time.ToDatetime():%Y-%m-%d %H:%M:%S}"


def _reason(letter: oona_pb2.DeadLetter) -> str:
    from esperml.v1 import oona_pb2

    return oona_pb2.DeadLetterReason.Name(letter.reason).removeprefix("DEAD_LETTER_REASON_").lower().replace("_", " ")


def _client(server: Server) -> OonaClient:
    from esperml.client import OonaClient

    return OonaClient(server.target, client_id=f"dead-letters-{uuid.uuid4().hex}", credentials=server.credentials)
