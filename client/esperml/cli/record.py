"""``esper record``: from a live bus into a file.

gRPC is imported when the command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esperml.cli.connecting import Server, server_options
from esperml.cli.parameters import KIND, SPAN, START, START_HELP
from esperml.cli.running import interrupt_sets, run

if TYPE_CHECKING:
    from esperml.client import OonaClient, RecordingInfo
    from esperml.v1 import event_pb2, oona_pb2


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--kind", "kinds", type=KIND, multiple=True, help="Only this kind. Repeat for more.  [default: all]")
@click.option("--run", "run_ids", multiple=True, help="Only events of this run. Repeat for more.  [default: all]")
@click.option("--from", "start", type=START, default="latest", show_default=True, help=START_HELP)
@click.option("--until-idle", "idle_s", type=SPAN, help="End when nothing has come for so long, for example 10s.")
@click.option("--for", "duration_s", type=SPAN, help="End after so long, for example 60s or 2h.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Say at the end what was recorded as one JSON object.")
@server_options
def record(
    server: Server,
    file: Path,
    kinds: tuple[event_pb2.Kind.ValueType, ...],
    run_ids: tuple[str, ...],
    start: oona_pb2.StartAt,
    idle_s: float | None,
    duration_s: float | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Record what goes over the bus into FILE (MCAP), until Ctrl-C or the end that was asked for.

    Everything that was stored before the end is in the file. It is written out every second: should this process be
    killed, all but the last second can be read. `esper replay` puts it back on a bus, `esper trainer train` learns
    from it, and any MCAP reader decodes it.

    \b
    Examples:
        esper record night.mcap
        esper record run.mcap --run my-run --from earliest --until-idle 10s
        esper record all.mcap --from earliest --for 0s
    """
    if start.HasField("offset") and len(kinds) != 1:
        raise click.UsageError("--from with an offset needs a single --kind: each kind counts its own offsets.")
    if file.exists() and not overwrite:
        raise click.ClickException(f"{file} is there already; give another name, or --overwrite")
    from esperml.client import OonaClient, describe

    client = OonaClient(server.target, client_id=f"record-{uuid.uuid4().hex}", credentials=server.credentials)
    try:
        info = run(_record(client, file, kinds, run_ids, start, idle_s, duration_s), server)
    except click.ClickException:
        if file.exists() and not describe(file).counts:
            file.unlink()
        raise
    if as_json:
        click.echo(json.dumps(_summary(file, info)))
    else:
        click.echo(f"{file}: {_in_words(info.counts)} of {len(info.runs)} run{'' if len(info.runs) == 1 else 's'}")


async def _record(
    client: OonaClient,
    file: Path,
    kinds: tuple[event_pb2.Kind.ValueType, ...],
    run_ids: tuple[str, ...],
    start: oona_pb2.StartAt,
    idle_s: float | None,
    duration_s: float | None,
) -> RecordingInfo:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from esperml.client.recording import record as record_bus
    from esperml.contract import KINDS

    # A server that is not there should say so at once, not be waited for.
    await client.topics()
    until = asyncio.Event()
    counts: Counter[event_pb2.Kind.ValueType] = Counter()
    loop = asyncio.get_running_loop()
    last_s = loop.time()
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        bar = progress.add_task("waiting for the first event; Ctrl-C ends the recording")

        def count(kind: event_pb2.Kind.ValueType, _event: event_pb2.Event) -> None:
            nonlocal last_s
            counts[kind] += 1
            last_s = loop.time()

        async def show() -> None:
            while True:
                await asyncio.sleep(0.25)
                if counts:
                    progress.update(bar, description=_in_words(counts))

        timers = [asyncio.create_task(show())]
        if duration_s is not None:
            timers.append(asyncio.create_task(_set_after(until, duration_s)))
        if idle_s is not None:
            timers.append(asyncio.create_task(_set_when_idle(until, idle_s, lambda: last_s)))
        try:
            with interrupt_sets(until):
                async with client:
                    return await record_bus(
                        client, file, kinds=kinds or KINDS, run_ids=run_ids, start=start, until=until, on_event=count
                    )
        finally:
            for timer in timers:
                timer.cancel()


async def _set_after(until: asyncio.Event, duration_s: float) -> None:
    await asyncio.sleep(duration_s)
    until.set()


async def _set_when_idle(until: asyncio.Event, idle_s: float, last_s: Callable[[], float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        left_s = last_s() + idle_s - loop.time()
        if left_s <= 0:
            break
        await asyncio.sleep(left_s)
    until.set()


def _in_words(counts: Counter[event_pb2.Kind.ValueType]) -> str:
    from esperml.contract import kind_name

    parts = ", ".join(f"{count:,} {kind_name(kind)}" for kind, count in sorted(counts.items()))
    return f"{counts.total():,} events" + (f" ({parts})" if parts else "")


def _summary(file: Path, info: RecordingInfo) -> dict[str, object]:
    from esperml.contract import kind_name

    return {
        "file": str(file),
        "events": info.counts.total(),
        "kinds": {kind_name(kind): count for kind, count in sorted(info.counts.items())},
        "runs": dict(info.runs),
    }
