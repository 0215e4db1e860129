"""``esper bench``."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import click


@click.group()
def bench() -> None:
    """Measure latency against a floor in the same run."""


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object rather than a table.")
@click.option("--layers", multiple=True, type=click.IntRange(1, 4096), help="Size of a host; may be repeated.")
@click.option("--calls", default=300, show_default=True, type=click.IntRange(1), help="Calls of each kind, per size.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in the server.")
@click.option("--policy", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Checkpoint to serve.")
def decide(as_json: bool, layers: tuple[int, ...], calls: int, threads: int, policy: Path | None) -> None:
    """Measure Decide and a call that does nothing, one after the other, against a server in a process of its own.

    Absolute times vary by machine; the ratio to the call that does nothing is what compares. Without --policy the
    shipped checkpoint is served, or random weights of the same size where none is shipped.

    \b
    With --json:
      threads            threads of torch in the server
      cpus               processors of this machine
      calls              calls of each kind, per size
      policy             name, version and number of weights of the policy
      results[].layers          layers of the host
      results[].request_bytes   size of the request
      results[].noop_ms         p50 and p99 of the call that does nothing, in ms
      results[].decide_ms       p50 and p99 of Decide, in ms
      results[].engine_ms       p50 and p99 of masks, features and network in the server, in ms
      results[].ratio           decide_ms divided by noop_ms

    \b
    Examples:
      esper bench decide
      esper bench decide --json --layers 64 --calls 1000
    """
    from esperml.bench.decide import SIZES, measure
    from esperml.bench.server import ServerFailedError

    try:
        found = measure(sizes=layers or SIZES, calls=calls, threads=threads, policy=policy)
    except ServerFailedError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found, indent=2) if as_json else as_table(found))


def as_table(found: dict[str, Any]) -> str:
    """What was measured, as a table for people. Times are in ms."""
    lines = [
        f"{'layers':>6}  {'no-op p50 / p99':>17}  {'Decide p50 / p99':>17}  {'engine p50 / p99':>17}  {'ratio':>5}   ms"
    ]
    for row in found["results"]:
        cells = "  ".join(
            f"{row[name]['p50']:8.2f} /{row[name]['p99']:7.2f}" for name in ("noop_ms", "decide_ms", "engine_ms")
        )
        lines.append(f"{row['layers']:6d}  {cells}  {row['ratio']['p50']:5.1f}")
    return "\n".join(lines)


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object rather than tables.")
@click.option("--quick", is_flag=True, help="One payload and frame, few short blocks: half a minute.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON object to this file too.")
@click.option("--rounds", type=click.IntRange(1), help="Blocks of each system in each case.  [default: 7; quick: 3]")
@click.option(
    "--block", "block_s", type=click.FloatRange(0.001), help="Length of a block, in s.  [default: 1; quick: 0.3]"
)
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where the logs go for the while."
)
def oona(
    as_json: bool, quick: bool, out: Path | None, rounds: int | None, block_s: float | None, folder: Path | None
) -> None:
    """Measure the bus from publish to delivery to acknowledgement, beside Redis Streams, JetStream and a relay.

    Each system runs in a server process, with one publisher and one consumer process that use its own Python client.
    The systems take turns, a block each. What is not installed is skipped, and said to be.

    \b
    With --json:
      rounds                 blocks of each system in each case
      cases[].system         oona-sqlite, oona-jetstream, redis, jetstream, or relay, which stores nothing
      cases[].durability     the system's own word for when it syncs
      cases[].client         client library; of two, the one that was faster in this case
      cases[].payload        size of an event, in bytes
      cases[].frame          events in a published frame, or commands in a pipeline; JetStream has no frames
      cases[].e2e_per_s      events a second, from the first publish to the last acknowledgement: median of the blocks
      cases[].e2e_interval   interval of that median, at 90 % or more from five rounds on
      cases[].block_events   events in a block
      cases[].single_p50_us  publish to delivery, one event at a time, in µs; the same for every frame
      cases[].single_p99_us  the same, 99th percentile
      ratio_redis_everysec   events a second of oona-sqlite with fsync, over Redis' with appendfsync everysec, for
                             256-byte events in frames of 256: median of the rounds' quotients
      ratio_redis_always     the same over Redis with appendfsync always
      ratio_jetstream        the same over JetStream as it comes, which syncs every two minutes
      ratio_jetstream_always the same over JetStream with sync_interval always
      ratio_floor            the same over the relay
      ratio_…_interval       interval of each; null, as the ratio is, where a system was skipped
      single_p99_over_floor  p99 of a single event over the relay's p99 and the disk's p99 together
      fdatasync_p50_us       fdatasync of 4 KiB appended, on the same disk in the same run, in µs
      fdatasync_p99_us       the same, 99th percentile
      systems[]              what ran: system, durability, client, server_threads
      skipped[]              what did not: system, durability, reason
      machine                cpu, cores, kernel, file_system, versions

    \b
    Examples:
      esper bench oona --quick
      esper bench oona --json --out oona.json
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from esperml.bench.oona.measure import QUICK, Plan, measure
    from esperml.bench.oona.servers import ProcessFailedError
    from esperml.bench.oona.table import Report

    plan = QUICK if quick else Plan()
    plan = replace(plan, rounds=rounds or plan.rounds, block_s=block_s or plan.block_s)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def advance(words: str, total: int) -> None:
            progress.update(task, total=total, description=words, completed=next(steps))

        steps = count()
        try:
            found = measure(plan, folder=folder, advance=advance)
        except ProcessFailedError as error:
            raise click.ClickException(str(error)) from error
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        Console().print(Report(found))
