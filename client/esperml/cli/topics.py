"""``esper topics``: looks into a bus over gRPC.

gRPC is imported when a command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from typing import TYPE_CHECKING

import click

from esperml.cli.connecting import Server, ServerGroup, server_options
from esperml.cli.dead_letters import dead_letters
from esperml.cli.parameters import KIND, MAX_OFFSET, START, START_HELP
from esperml.cli.running import interrupt_sets, run

if TYPE_CHECKING:
    from esperml.client import OonaClient
    from esperml.v1 import event_pb2, oona_pb2


@click.group(cls=ServerGroup)
def topics() -> None:
    """Look into the bus: topics, groups and their lag, records as they come.

    The bus keeps one log per kind: telemetry, events, decisions, commands, outcomes, experience.

    \b
    Examples:
        esper topics list
        esper topics info telemetry
        esper topics tail decisions --from 10m | jq .event.decision
        esper topics dead-letters list outcomes tamiyo
    """


topics.add_command(dead_letters)


@topics.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@server_options
def list_topics(server: Server, as_json: bool) -> None:
    """List the topics: what each holds and keeps."""
    found = run(_client(server).topics(), server)
    if as_json:
        for topic in found:
            click.echo(json.dumps(_topic(topic)))
        return
    click.echo(f"{'topic':<12}{'earliest':>12}{'next':>12}{'records':>12}{'bytes':>16}  keeps")
    for topic in found:
        row = _topic(topic)
        records = topic.next_offset - topic.earliest_offset
        click.echo(
            f"{row['topic']:<12}{topic.earliest_offset:>12}{topic.next_offset:>12}{records:>12}{topic.bytes:>16}"
            f"  {_kept_in_words(topic.retention)}"
        )


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@server_options
def info(server: Server, kind: event_pb2.Kind.ValueType, as_json: bool) -> None:
    """Show one topic and its groups' lag, members and dead letters."""
    described = run(_client(server).describe(kind), server)
    groups = [
        {
            "name": group.name,
            "committed_offset": group.committed_offset,
            "lag": group.lag,
            "members": group.members,
            "dead_letters": group.dead_letters,
        }
        for group in described.groups
    ]
    if as_json:
        click.echo(json.dumps(_topic(described.topic) | {"groups": groups}))
        return
    for key, value in _topic(described.topic).items():
        if key != "retention":
            click.echo(f"{key:<18}{value}")
    click.echo(f"{'keeps':<18}{_kept_in_words(described.topic.retention)}")
    if groups:
        click.echo(f"\n{'group':<24}{'committed':>12}{'lag':>12}{'members':>10}{'dead letters':>14}")
    for group in groups:
        click.echo(
            f"{group['name']:<24}{group['committed_offset']:>12}{group['lag']:>12}{group['members']:>10}"
            f"{group['dead_letters']:>14}"
        )


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--run", "run_ids", multiple=True, help="Only records of this run. Repeat for more.")
@click.option("--from", "start", type=START, default="latest", show_default=True, help=START_HELP)
@click.option("--until", type=click.IntRange(0, MAX_OFFSET), help="Stop before this offset.  [default: never]")
@click.option("--count", type=click.IntRange(1), help="Stop after so many records.  [default: never]")
@click.option("--no-follow", is_flag=True, help="Stop at what is stored now.")
@server_options
def tail(
    server: Server,
    kind: event_pb2.Kind.ValueType,
    run_ids: tuple[str, ...],
    start: oona_pb2.StartAt,
    until: int | None,
    count: int | None,
    no_follow: bool,
) -> None:
    """Write records as JSON lines as they come.

    It goes on until Ctrl-C, unless told where to stop.

    \b
    Examples:
        esper topics tail decisions --from earliest --no-follow | jq .event.decision
        esper topics tail telemetry --run my-run --count 1
    """
    run(_tail(_client(server), kind, run_ids, start, until, count, no_follow), server)


@topics.command()
@click.argument("kind", type=KIND)
@click.option("--before", type=click.IntRange(0, MAX_OFFSET), required=True, help="Delete records below this offset.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_options
def purge(server: Server, kind: event_pb2.Kind.ValueType, before: int, yes: bool) -> None:
    """Delete old records for good.

    They go as far as they fill whole published frames. Who had yet to read them is told.
    """
    from esperml.contract import kind_name

    if not yes:
        click.confirm(
            f"Delete the records of {kind_name(kind)} below offset {before} at {server.target} for good?", abort=True
        )
    earliest = run(_client(server).purge(kind, before), server)
    click.echo(f"the first record that is still there has offset {earliest}")


async def _tail(
    client: OonaClient,
    kind: event_pb2.Kind.ValueType,
    run_ids: tuple[str, ...],
    start: oona_pb2.StartAt,
    until: int | None,
    count: int | None,
    no_follow: bool,
) -> None:
    from google.protobuf import json_format

    # A server that is not there should say so at once, not be waited for.
    end = (await client.describe(kind)).topic.next_offset
    if no_follow:
        until = end if until is None else min(until, end)
    stopped = asyncio.Event()
    async with client, client.subscribe(kind, run_ids=run_ids, start=start, end_offset=until) as subscription:

        async def drain_when_stopped() -> None:
            await stopped.wait()
            subscription.drain()

        stopper = asyncio.create_task(drain_when_stopped())
        with contextlib.ExitStack() as stack:
            stack.callback(stopper.cancel)
            stack.enter_context(interrupt_sets(stopped))
            written = 0
            async for record in subscription:
                click.echo(json.dumps(json_format.MessageToDict(record, preserving_proto_field_name=True)))
                written += 1
                if written == count:
                    break


def _client(server: Server) -> OonaClient:
    from esperml.client import OonaClient

    return OonaClient(server.target, client_id=f"topics-{uuid.uuid4().hex}", credentials=server.credentials)


def _topic(topic: oona_pb2.Topic) -> dict[str, object]:
    from esperml.contract import kind_name

    kept = topic.retention
    return {
        "topic": kind_name(topic.kind),
        "earliest_offset": topic.earliest_offset,
        "next_offset": topic.next_offset,
        "bytes": topic.bytes,
        "retention": {
            "age_s": kept.age.ToTimedelta().total_seconds() if kept.HasField("age") else None,
            "bytes": kept.bytes if kept.HasField("bytes") else None,
            "records": kept.records if kept.HasField("records") else None,
        },
    }


def _kept_in_words(retention: oona_pb2.Retention) -> str:
    limits = []
    if retention.HasField("age"):
        limits.append(str(retention.age.ToTimedelta()))
    if retention.HasField("bytes"):
        limits.append(f"{retention.bytes:,} bytes")
    if retention.HasField("records"):
        limits.append(f"{retention.records:,} records")
    return ", ".join(limits) or "everything"
