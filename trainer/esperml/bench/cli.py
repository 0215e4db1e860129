"""``esper bench``."""

from __future__ import annotations

import json
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
