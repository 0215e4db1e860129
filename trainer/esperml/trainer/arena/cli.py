"""``esper trainer collect``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/experience"), show_default=True,
    help="Folder for the recordings, one a host.",
)  # fmt: skip
@click.option("--hosts", type=click.IntRange(1), default=150, show_default=True, help="Hosts to draw.")
@click.option(
    "--branches", type=click.IntRange(1), default=8, show_default=True,
    help="Runs per host under random behaviour, besides the one that is left alone.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of hosts and behaviour.")
@click.option("--task", default="", help="Draw hosts for this task only: digits, mnist1d, tabular-0 …  [default: all]")
@click.option(
    "--pace", type=click.FloatRange(0.2, 20), help="Stretch every run by this factor.  [default: 0.8 to 2, by host]"
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--resume", is_flag=True, help="Carry on with the collection in the folder.")
def collect(
    out: Path, hosts: int, branches: int, seed: int, task: str, pace: float | None, jobs: int, resume: bool
) -> None:
    """Gather experience on small hosts, with behaviour drawn at random.

    Every host is trained once left alone and then in branches from the same weights and data order, in which a seed may
    be planted at a random time and place; what that was worth is measured against the one that was left alone. An
    interrupted collection carries on with --resume. `esper trainer train` learns from the folder.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from esperml.trainer.arena.collect import Collection, CollectionError, quiet_process
    from esperml.trainer.arena.collect import collect as run

    quiet_process()
    columns = (TextColumn("hosts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("hosts", total=hosts)
        try:
            paths = run(
                out,
                Collection(hosts=hosts, branches=branches, seed=seed, task=task, pace=pace),
                jobs=jobs,
                resume=resume,
                on_host=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        except (CollectionError, OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{len(paths)} recordings in {out}; learn from them with: esper trainer train {out}")
