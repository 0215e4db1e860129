"""Says in words what a recording or a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from esperml.client.errors import TruncatedRecordingError
from esperml.client.recording import describe
from esperml.contract import kind_name
from esperml.tamiyo import checkpoint
from esperml.trainer.dataset import load, recordings

_SHOWN_RUNS = 10


def recording_lines(path: Path) -> Iterator[str]:
    """Describes a recording, or all of a folder, and then the experience that they hold together.

    Raises:
        DatasetError: there is no recording, or its experience breaks the contract.
        NotARecordingError: a file is no recording.
        TruncatedRecordingError: the file is cut off before its first whole event.
    """
    for file in recordings([path]):
        info = describe(file)
        if info.truncated and file == path and not info.counts:
            raise TruncatedRecordingError(file, 0)
        yield f"{file}{' (cut short)' if info.truncated else ''}"
        counts = ", ".join(f"{count} {kind_name(kind)}" for kind, count in sorted(info.counts.items()))
        yield f"  events   {counts or 'none'}"
        if info.truncated:
            yield "  missing  the end of the file; what it held after these events is lost"
        runs = list(info.runs)
        more = f" and {len(runs) - _SHOWN_RUNS} more" if len(runs) > _SHOWN_RUNS else ""
        yield f"  runs     {len(runs)}: {', '.join(runs[:_SHOWN_RUNS])}{more}"
        if info.first_ns is not None and info.last_ns is not None:
            yield f"  time     {_moment(info.first_ns)} to {_moment(info.last_ns)}"
    yield from experience_lines(path)


def experience_lines(path: Path) -> Iterator[str]:
    """Describes the experience in a recording or a folder of them.

    Raises:
        DatasetError: there is no recording, or its experience breaks the contract.
    """
    dataset = load([path])
    yield f"experience: {dataset.summary.sentence()}"
    transitions = dataset.transitions
    if not transitions:
        return
    rewards = np.asarray([item.reward for item in transitions])
    low, middle, high = np.quantile(rewards, (0.1, 0.5, 0.9))
    episodes = {item.experience.episode_id for item in transitions}
    yield f"  episodes  {len(episodes)} on {len({item.cluster for item in transitions})} hosts"
    yield (
        f"  reward    mean {rewards.mean():+.4f}, standard deviation {rewards.std():.4f}; 10 % below {low:+.4f}, "
        f"half below {middle:+.4f}, 90 % below {high:+.4f}"
    )
    done = Counter(item.choice.blueprint or "nothing" for item in transitions)
    yield f"  done      {', '.join(f'{count} {name}' for name, count in done.most_common())}"
    deciders = Counter(item.experience.decision.policy for item in transitions)
    yield f"  decided   {', '.join(f'{count} by {name}' for name, count in deciders.most_common())}"


def checkpoint_lines(path: Path) -> Iterator[str]:
    """Describes a checkpoint.

    Raises:
        CheckpointError: it cannot be used.
    """
    loaded = checkpoint.load(path)
    config, metadata = loaded.network.config, loaded.metadata
    size = sum(parameter.numel() for parameter in loaded.network.parameters())
    yield f"{path}: policy {loaded.version}, trained {metadata.trained_at:%Y-%m-%d %H:%M:%S %Z}"
    yield f"  network     {config.layers} layers of {config.hidden} units, {size:,} parameters"
    yield f"  vocabulary  {', '.join(config.vocabulary)}"
    for name, note in metadata.notes.items():
        yield f"  {name:<11} {note}"
    for name, value in metadata.metrics.items():
        yield f"  {name:<28} {value:.4g}"


def _moment(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
