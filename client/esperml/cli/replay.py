"""``esper replay``: from a recording back onto a bus.

gRPC is imported when the command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esperml.cli.connecting import Server, server_options
from esperml.cli.parameters import KIND
from esperml.cli.running import run

if TYPE_CHECKING:
    from esperml.client.replaying import Replayed, Selection
    from esperml.v1 import event_pb2


class SpeedType(click.ParamType["float | None"]):
    """How many times as fast as it was; ``max`` is None."""

    name = "speed"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """The factor, or a usage error that says how it is written."""
        if value == "max":
            return None
        try:
            speed = float(value)
        except ValueError:
            speed = 0.0
        if not 0 < speed < float("inf"):
            self.fail(f"{value!r} is neither a number above 0 nor max", param, ctx)
        return speed


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--speed", type=SpeedType(), default="1", show_default=True, help="Times as fast as it was recorded, or max."
)
@click.option("--kind", "kinds", type=KIND, multiple=True, help="Only this kind. Repeat for more.  [default: all]")
@click.option("--run", "run_ids", multiple=True, help="Only events of this run. Repeat for more.  [default: all]")
@click.option("--run-prefix", default="", help="Put this before the id of every run.")
@click.option("--as-run", help="Replay the only run there is, or the one that --run names, under this id.")
@click.option("--json", "as_json", is_flag=True, help="Say at the end what was replayed as one JSON object.")
@server_options
def replay(
    server: Server,
    file: Path,
    speed: float | None,
    kinds: tuple[event_pb2.Kind.ValueType, ...],
    run_ids: tuple[str, ...],
    run_prefix: str,
    as_run: str | None,
    as_json: bool,
) -> None:
    """Put the events of the recording FILE on a bus again.

    The same replay never stores an event twice: say it again after a crash or Ctrl-C, at any speed, and it goes on
    where it was. Under another run id it is another replay. A recording that is cut off is replayed as far as it is
    whole.

    A server's Tamiyo takes part as if it all happened now. To have it decide anew, leave out what was decided then:
    --kind events --kind telemetry --kind outcomes, under a run id of its own.

    \b
    Examples:
        esper replay night.mcap --speed max
        esper replay run.mcap --speed 10 --as-run second-look --kind events --kind telemetry --kind outcomes
    """
    from esperml.client.replaying import Selection
    from esperml.contract import KINDS

    selection = Selection(frozenset(kinds or KINDS), frozenset(run_ids), run_prefix, as_run)
    began_s = time.monotonic()
    try:
        done = run(_replay(server, file, selection, speed), server)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    took_s = time.monotonic() - began_s
    if done.truncated:
        click.echo(f"{file} is cut off: it was replayed as far as it is whole.", err=True)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "file": str(file),
                    "events": done.events,
                    "stored_before": done.stored_before,
                    "runs": dict(done.runs),
                    "truncated": done.truncated,
                    "seconds": round(took_s, 3),
                }
            )
        )
        return
    before = f"; {done.stored_before:,} of them were there already" if done.stored_before else ""
    click.echo(f"{done.events:,} events of {', '.join(done.runs) or 'no run'} in {took_s:.1f} s{before}")


async def _replay(server: Server, file: Path, selection: Selection, speed: float | None) -> Replayed:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from esperml.client import OonaClient
    from esperml.client.replaying import replay as replay_onto
    from esperml.client.replaying import survey

    # A server that is not there should say so at once, not be waited for.
    await OonaClient(server.target, client_id="replay", credentials=server.credentials).topics()
    surveyed = await asyncio.to_thread(survey, file, selection)
    columns = (TextColumn("events"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=surveyed.counts.total())
        return await replay_onto(
            server.target,
            file,
            selection,
            speed=speed,
            credentials=server.credentials,
            surveyed=surveyed,
            on_stored=lambda count: progress.advance(bar, count),
        )
