"""``esper trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esperml.trainer.arena.cli import collect

if TYPE_CHECKING:
    import torch

    from esperml.trainer.dataset import Dataset
    from esperml.trainer.training import TrainingSettings

_ALGORITHM = {"learning_rate", "batch_size", "temperature", "gamma", "lambda_"}
_RECORDINGS = click.argument("recordings", nargs=-1, type=click.Path(exists=True, path_type=Path))
_DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where to compute; auto takes a GPU if there is one.",
)  # fmt: skip
_THREADS = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True,
    help="Threads that torch may use on a CPU; hosts are small graphs, for which one is fastest.",
)  # fmt: skip
_CLUSTER = click.option(
    "--cluster-label", default="", help="Hold out by this label of the runs, for example family, not by twin."
)


@click.group()
def trainer() -> None:
    """Collect experience, train Tamiyo on it, look at both.

    Training is offline: it reads recordings (*.mcap), learns from every decision whose worth a twin measured, and
    writes checkpoints that a server loads.

    \b
    Gather experience:        esper trainer collect --out runs/experience
    See what it holds:        esper trainer inspect runs/experience
    Train a policy:           esper trainer train runs/experience --out policies/mine
    Judge it on other runs:   esper trainer evaluate policies/mine runs/demo
    Serve it:                 esper serve --policy policies/mine
    """


trainer.add_command(collect)


@trainer.command()
@_RECORDINGS
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to train into.")
@click.option("--learning-rate", type=float, default=3e-4, show_default=True, help="Of AdamW.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Decisions per update.")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Updates in all.")
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), help="Passes over the experience, instead of --steps."
)
@click.option(
    "--temperature", type=float, default=0.5, show_default=True,
    help="Of the weights, in standard deviations of the advantage; smaller trusts the best that was tried more.",
)  # fmt: skip
@click.option("--gamma", type=float, default=1.0, show_default=True, help="Discount of one decision.")
@click.option("--lambda", "lambda_", type=float, default=0.95, show_default=True, help="Of the lambda-returns.")
@click.option("--hidden", type=click.IntRange(1), default=96, show_default=True, help="Units per hidden layer.")
@click.option("--layers", type=click.IntRange(1), default=3, show_default=True, help="Rounds of message passing.")
@click.option(
    "--capacity", type=click.IntRange(1), default=100_000, show_default=True,
    help="Experiences that the replay buffer keeps; the oldest episodes go first.",
)  # fmt: skip
@click.option(
    "--validation-fraction", type=float, default=0.2, show_default=True, help="Share of the hosts that is held out."
)
@click.option("--evaluate-every", type=click.IntRange(1), default=50, show_default=True, help="Updates in between.")
@click.option("--patience", type=click.IntRange(1), help="Evaluations without a better one before stopping early.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, split and batches.")
@_DEVICE
@_THREADS
@_CLUSTER
@click.option("--resume", is_flag=True, help="Go on with the training in the folder, recordings added if given.")
@click.pass_context
def train(
    context: click.Context,
    /,
    recordings: tuple[Path, ...],
    out: Path,
    epochs: float | None,
    device: str,
    threads: int,
    cluster_label: str,
    resume: bool,
    **options: Any,
) -> None:
    """Train a policy on RECORDINGS, which are files or folders of *.mcap.

    The folder given by --out then holds the best policy so far, as judged on hosts that were held out; latest/, from
    which --resume goes on exactly where training stood; the replay buffer; and metrics.jsonl. With --resume, options
    that are not given stay as they were.

    \b
    Examples:
        esper trainer train runs/demo --out policies/mine
        esper trainer train runs/experience --out policies/mine --learning-rate 0.001 --batch-size 128 --patience 5
        esper trainer train --out policies/mine --resume --steps 4000
    """
    import torch

    from esperml.tamiyo.checkpoint import CheckpointError
    from esperml.trainer.dataset import DatasetError
    from esperml.trainer.replay import ReplayError
    from esperml.trainer.snapshots import SnapshotError
    from esperml.trainer.training import Training, TrainingError

    if not recordings and not resume:
        raise click.UsageError("Name at least one recording, or a folder of them.")
    torch.set_num_threads(threads)
    given = {
        name: value
        for name, value in options.items()
        if not resume or context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    try:
        dataset = _load(recordings, cluster_label) if recordings else None
        settings = _settings(given, out if resume else None, dataset, epochs)
        with Training(out, settings, dataset, device=_device(device), resume=resume) as training:
            for shortcoming in training.shortcomings():
                click.echo(f"Warning: {shortcoming}. esper trainer collect gathers more.", err=True)
            metrics = _run(training)
            best = training.state.best_step
    except (CheckpointError, DatasetError, ReplayError, SnapshotError, TrainingError) as error:
        raise click.ClickException(str(error)) from error
    except (FloatingPointError, OSError, ValueError) as error:
        raise click.ClickException(f"training stopped: {error}") from error
    _print_figures("on held-out hosts, at the end", metrics)
    click.echo(f"best at update {best}: {out}; serve it with: esper serve --policy {out}")


@trainer.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def inspect(path: Path) -> None:
    """Say what PATH holds: a recording, a folder of recordings, or a checkpoint.

    \b
    Examples:
        esper trainer inspect runs/demo/digits.mcap
        esper trainer inspect policies/mine
    """
    from esperml.client.errors import RecordingError
    from esperml.tamiyo.checkpoint import METADATA_FILE, CheckpointError
    from esperml.trainer import inspection
    from esperml.trainer.dataset import DatasetError

    try:
        if (path / METADATA_FILE).exists():
            lines = inspection.checkpoint_lines(path)
        else:
            lines = inspection.recording_lines(path)
        for line in lines:
            click.echo(line)
    except (CheckpointError, DatasetError, RecordingError, OSError) as error:
        raise click.ClickException(str(error)) from error


@trainer.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_RECORDINGS
@_DEVICE
@_CLUSTER
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(checkpoint: Path, recordings: tuple[Path, ...], device: str, cluster_label: str, as_json: bool) -> None:
    """Judge the policy in CHECKPOINT on RECORDINGS.

    Says how often its adaptation head agrees with what proved right, how far its value head is off, how well it ranks
    the grafts that were tried, and what its decisions would have been worth, beside what those taken were worth.
    Figures on runs that it was trained on flatter it.

    \b
    Example:
        esper trainer evaluate policies/mine runs/demo
    """
    import json

    from esperml.tamiyo import checkpoint as checkpoints
    from esperml.tamiyo.checkpoint import CheckpointError
    from esperml.trainer.dataset import DatasetError
    from esperml.trainer.evaluation import evaluate as judge
    from esperml.trainer.replay import ReplayBuffer, ReplayError

    if not recordings:
        raise click.UsageError("Name at least one recording, or a folder of them.")
    try:
        network = checkpoints.load(checkpoint).network
        dataset = _load(recordings, cluster_label)
        with ReplayBuffer(max(1, len(dataset.transitions)), network.config.vocabulary) as replay:
            replay.add(dataset.transitions)
            target = _device(device)
            metrics = judge(network.to(target), replay.steps(), gamma=1.0, device=target)
    except (CheckpointError, DatasetError, ReplayError) as error:
        raise click.ClickException(str(error)) from error
    if not len(dataset.transitions):
        raise click.ClickException("there is nothing to judge by: no experience has a reward from a paired branch")
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        _print_figures("", metrics)


def _load(recordings: tuple[Path, ...], cluster_label: str) -> Dataset:
    from esperml.trainer.dataset import load

    dataset = load(recordings, cluster_label=cluster_label)
    click.echo(dataset.summary.sentence(), err=True)
    return dataset


def _settings(
    given: dict[str, Any], resumed: Path | None, dataset: Dataset | None, epochs: float | None
) -> TrainingSettings:
    """Settings from the command line; for a resumed training, what was not given is as it was."""
    import dataclasses
    import math

    from esperml.trainer import snapshots
    from esperml.trainer.training import LATEST, TrainingSettings

    settings = TrainingSettings()
    if resumed is not None:
        snapshots.recover_folder(resumed / LATEST)
        settings = TrainingSettings.from_json(snapshots.load(resumed / LATEST).settings)
    algorithm = {name: value for name, value in given.items() if name in _ALGORITHM}
    rest = {name: value for name, value in given.items() if name not in _ALGORITHM}
    settings = dataclasses.replace(settings, algorithm=dataclasses.replace(settings.algorithm, **algorithm), **rest)
    if epochs is None:
        return settings
    if dataset is None:
        raise click.UsageError("--epochs needs recordings; resume with --steps instead.")
    size = len(dataset.transitions) * (1 - settings.validation_fraction)
    return dataclasses.replace(settings, steps=max(1, math.ceil(epochs * size / settings.algorithm.batch_size)))


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _run(training: Any) -> dict[str, float]:
    """Trains under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("updates"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=training.settings.steps, completed=training.state.step, loss=float("nan"))
        metrics: dict[str, float] = training.run(
            lambda step, losses: progress.update(bar, completed=step, loss=losses["loss"])
        )
    return metrics


def _print_figures(title: str, metrics: dict[str, float]) -> None:
    if title and metrics:
        click.echo(title)
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        click.echo(f"  {name:<{width}}  {value:.4g}")
