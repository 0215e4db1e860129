"""``esper topics``: looks into a bus over gRPC.

gRPC is imported when a command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from esperml.cli.connecting import Server, server_options

if TYPE_CHECKING:
    from esperml.client import OonaClient
    from esperml.v1 import event_pb2, oona_pb2

_T = TypeVar("_T")

_MAX_OFFSET: Final = 2**64 - 1


class KindType(click.ParamType["event_pb2.Kind.ValueType"]):
    """A kind by its short name."""

    name = "kind"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> event_pb2.Kind.ValueType:
        """The kind of that name, or a usage error that lists the names there are."""
        from esperml.contract import parse_kind

        try:
            return parse_kind(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


KIND = KindType()


@click.group()
@server_options
@click.pass_context
def topics(ctx: click.Context, server: Server) -> None:
    """Look into the bus: topics, groups and their lag, records as they come.

    The bus keeps one log per kind: telemetry, events, decisions, commands, outcomes, experience.
    """
    ctx.obj = server


@topics.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_topics(ctx: click.Context, as_json: bool) -> None:
    """List the topics: how much each holds."""
    from esperml.contract import kind_name

    found = _run(_client(ctx).topics())
    if not as_json:
        click.echo(f"{'topic':<12}{'earliest':>12}{'next':>12}{'bytes':>16}")
    for topic in found:
        if as_json:
            click.echo(json.dumps(_topic(topic)))
        else:
            name = kind_name(topic.kind)
            click.echo(f"{name:<12}{topic.earliest_offset:>12}{topic.next_offset:>12}{topic.bytes:>16}")


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.pass_context
def info(ctx: click.Context, kind: event_pb2.Kind.ValueType, as_json: bool) -> None:
    """Show one topic, with its groups and how far each lags behind."""
    described = _run(_client(ctx).describe(kind))
    groups = [
        {"name": g.name, "committed_offset": g.committed_offset, "lag": g.lag, "members": g.members}
        for g in described.groups
    ]
    if as_json:
        click.echo(json.dumps(_topic(described.topic) | {"groups": groups}))
        return
    for key, value in _topic(described.topic).items():
        click.echo(f"{key:<18}{value}")
    if groups:
        click.echo(f"\n{'group':<24}{'committed':>12}{'lag':>12}{'members':>10}")
    for group in groups:
        click.echo(f"{group['name']:<24}{group['committed_offset']:>12}{group['lag']:>12}{group['members']:>10}")


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--run", "run_ids", multiple=True, help="Only records of this run. Repeat for more.")
@click.option("--from", "start", default="latest", show_default=True, help="earliest, latest, or an offset.")
@click.option("--until", type=click.IntRange(0, _MAX_OFFSET), help="Stop before this offset.  [default: never]")
@click.pass_context
def tail(
    ctx: click.Context, kind: event_pb2.Kind.ValueType, run_ids: tuple[str, ...], start: str, until: int | None
) -> None:
    """Write records as JSON lines as they come, until interrupted.

    Example: esper topics tail decisions --from earliest | jq .event.decision
    """
    start_at = _start(start)
    _run(_tail(_client(ctx), kind, run_ids, start_at, until))


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--before", type=click.IntRange(0, _MAX_OFFSET), required=True, help="Delete records below this offset.")
@click.confirmation_option(prompt="Delete records for good?")
@click.pass_context
def purge(ctx: click.Context, kind: event_pb2.Kind.ValueType, before: int) -> None:
    """Delete old records, as far as they fill whole published frames."""
    earliest = _run(_client(ctx).purge(kind, before))
    click.echo(f"the first record that is still there has offset {earliest}")


async def _tail(
    client: OonaClient,
    kind: event_pb2.Kind.ValueType,
    run_ids: tuple[str, ...],
    start: oona_pb2.StartAt,
    until: int | None,
) -> None:
    from google.protobuf import json_format

    # A server that is not there should say so at once, not be waited for.
    await client.describe(kind)
    async with client, client.subscribe(kind, run_ids=run_ids, start=start, end_offset=until) as subscription:
        async for record in subscription:
            click.echo(json.dumps(json_format.MessageToDict(record, preserving_proto_field_name=True)))


def _client(ctx: click.Context) -> OonaClient:
    from esperml.client import OonaClient

    server: Server = ctx.obj
    return OonaClient(server.target, client_id=f"topics-{uuid.uuid4().hex}", credentials=server.credentials)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    from esperml.client import CallFailedError, EsperError

    try:
        return asyncio.run(work)
    except CallFailedError as error:
        raise click.ClickException(error.detail) from error
    except EsperError as error:
        raise click.ClickException(str(error)) from error


def _start(text: str) -> oona_pb2.StartAt:
    from esperml.v1 import oona_pb2

    match text:
        case "earliest":
            return oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        case "latest":
            return oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_LATEST)
        case _ if text.isdecimal() and int(text) <= _MAX_OFFSET:
            return oona_pb2.StartAt(offset=int(text))
        case _:
            raise click.BadParameter(f"{text!r} is neither earliest, latest nor an offset", param_hint="--from")


def _topic(topic: oona_pb2.Topic) -> dict[str, str | int]:
    from esperml.contract import kind_name

    return {
        "topic": kind_name(topic.kind),
        "earliest_offset": topic.earliest_offset,
        "next_offset": topic.next_offset,
        "bytes": topic.bytes,
    }
