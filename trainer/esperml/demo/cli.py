"""``esper demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

_PIPE_WIDTH: Final = 110


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"), show_default=True,
    help="Folder for recordings, figures and report.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and data order.")
@click.option(
    "--repeats", type=click.IntRange(1), default=1, show_default=True,
    help="How often, with seeds that count on; the summary then counts who won.",
)  # fmt: skip
@click.option("--policy", default="", help="Checkpoint or policy for the server instead of its default.")
@click.option("--quick", is_flag=True, help="A few seconds of training, to see that it works; the figures mean little.")
@click.option("--live/--no-live", default=True, show_default=True, help="A live board, where there is a terminal.")
def demo(out: Path, seed: int, repeats: int, policy: str, quick: bool, live: bool) -> None:
    """Watch two networks grow while they train.

    Starts a server, trains two hosts with a layer too narrow for their task as three twins each (left alone, under
    Tamiyo, under masked chance with the same budgets), and writes a report with pictures. About three minutes.
    """
    import logging

    import structlog
    import torch
    from rich.console import Console

    from esperml.demo.display import watch
    from esperml.demo.run import PLAN, QUICK_PLAN, Demo, run_demo
    from esperml.demo.server import ServerError
    from esperml.demo.summary import table

    torch.set_num_threads(1)
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    live = live and console.is_terminal
    out.mkdir(parents=True, exist_ok=True)
    plan = QUICK_PLAN if quick else PLAN
    asked = Demo(out=out, seed=seed, repeats=repeats, plan=plan, policy=policy)
    with (out / "demo.log").open("w", encoding="utf-8") as log:
        # The log would tear the live board apart, and a lost server is told by the board in plain words.
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.WriteLoggerFactory(log),
        )
        try:
            with watch(console, list(asked.hosts), plan.steps, live=live) as (watcher, on_repeat):
                story = run_demo(asked, watcher, on_repeat=on_repeat)
        except (ServerError, OSError) as error:
            raise click.ClickException(str(error)) from error
        finally:
            structlog.reset_defaults()
    console.print(table(story))
    if story.server_lost:
        console.print(f"[bold]The server was lost {story.server_lost}.[/bold] Training finished without it.")
    console.print(f"Report: {out / 'report.html'}    figures: {out / 'summary.json'}    recordings: {out}/*.mcap")
