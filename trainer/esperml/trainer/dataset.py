"""Reads recordings into transitions, and says what was read, what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from esperml.client.errors import NotARecordingError, TruncatedRecordingError
from esperml.client.recording import read
from esperml.contract import InvalidFieldError
from esperml.trainer.transitions import Transition, check_experience, has_paired_reward, transition
from esperml.v1 import experience_pb2, run_pb2


class DatasetError(Exception):
    """Recordings cannot be trained on."""


class InvalidExperienceError(DatasetError):
    """An experience in a recording breaks the contract.

    Attributes:
        path: the recording.
        index: position among the recording's experiences, from 0.
        field: the field that is wrong.
        problem: what is wrong with it.
    """

    def __init__(self, path: Path, index: int, error: InvalidFieldError) -> None:
        super().__init__(f"{path}: experience {index}: {error}")
        self.path = path
        self.index = index
        self.field = error.field
        self.problem = error.problem


@dataclass(slots=True)
class Summary:
    """What was read.

    Attributes:
        files: recordings read.
        experiences: experiences found.
        duplicates: found again, and used once.
        unmeasured: left out, because they have no reward.
        other_basis: left out, because their reward was not measured on a paired branch.
        truncated: recordings that were cut short; what is whole of them is used.
    """

    files: int = 0
    experiences: int = 0
    duplicates: int = 0
    unmeasured: int = 0
    other_basis: int = 0
    truncated: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Number of experiences that can be trained on."""
        return self.experiences - self.duplicates - self.unmeasured - self.other_basis

    def sentence(self) -> str:
        """The same in words."""
        parts = [f"{self.used} of {self.experiences} experiences from {self.files} recordings are used"]
        reasons = {
            "without a reward": self.unmeasured,
            "with a reward that no paired branch measured": self.other_basis,
            "found twice": self.duplicates,
        }
        parts += [f"{count} {reason} left out" for reason, count in reasons.items() if count]
        parts += [f"{path} was cut short" for path in self.truncated]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Transitions of recordings.

    Attributes:
        transitions: by episode, and by index within it.
        summary: what was read.
    """

    transitions: tuple[Transition, ...]
    summary: Summary

    def episodes(self) -> Iterator[tuple[Transition, ...]]:
        """Transitions of one episode at a time, in the order in which the episodes were found."""
        by_episode: dict[str, list[Transition]] = {}
        for item in self.transitions:
            by_episode.setdefault(item.experience.episode_id, []).append(item)
        yield from map(tuple, by_episode.values())


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    index: int
    experience: experience_pb2.TrainingExperience


def recordings(paths: Iterable[Path]) -> list[Path]:
    """The ``*.mcap`` files among ``paths`` and, sorted, anywhere below the folders among them.

    Raises:
        DatasetError: a path does not exist, or a folder holds no recording.
    """
    result: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.mcap"))
            if not found:
                raise DatasetError(f"{path}: holds no recording (*.mcap)")
            result.update(dict.fromkeys(found))
        elif path.is_file():
            result[path] = None
        else:
            raise DatasetError(f"{path}: no such file or folder")
    return list(result)


def load(paths: Sequence[Path], *, cluster_label: str = "") -> Dataset:
    """Reads every experience of recordings.

    Experience whose reward no paired branch measured is counted and left out: how much a host leans on a seed
    (ablation) is not what the seed is worth. A recording that was cut short gives what is whole.

    Args:
        paths: recordings, and folders of them.
        cluster_label: name of a run label by which runs are clustered; empty for their twin.

    Raises:
        DatasetError: nothing is there to read, or two different experiences claim the same place in an episode.
        InvalidExperienceError: an experience breaks the contract.
    """
    summary = Summary()
    runs: dict[str, run_pb2.RunStarted] = {}
    found: dict[tuple[str, int], _Found] = {}
    for path in recordings(paths):
        summary.files += 1
        for item in _experiences(path, runs, summary):
            key = (item.experience.episode_id, item.experience.index)
            first = found.setdefault(key, item)
            if first is item:
                continue
            if first.experience.decision.decision_id != item.experience.decision.decision_id:
                raise DatasetError(
                    f"{item.path}: experience {item.index}: episode {key[0]!r} has another decision at index {key[1]} "
                    f"in {first.path}; two runs must not share a name"
                )
            summary.duplicates += 1
    transitions = []
    for item in found.values():
        if not item.experience.HasField("reward"):
            summary.unmeasured += 1
        elif not has_paired_reward(item.experience):
            summary.other_basis += 1
        else:
            run = runs.get(item.experience.state.run_id)
            try:
                transitions.append(transition(item.experience, run, cluster_label))
            except InvalidFieldError as error:
                raise InvalidExperienceError(item.path, item.index, error) from error
    order = {episode: rank for rank, episode in enumerate(dict.fromkeys(t.experience.episode_id for t in transitions))}
    transitions.sort(key=lambda t: (order[t.experience.episode_id], t.experience.index))
    return Dataset(tuple(transitions), summary)


def _experiences(path: Path, runs: dict[str, run_pb2.RunStarted], summary: Summary) -> Iterator[_Found]:
    """Experiences of one recording, checked. Notes on the way how runs were started, and whether it was cut short."""
    counts: Counter[str] = Counter()
    try:
        for recorded in read(path):
            payload = recorded.event.WhichOneof("payload")
            if payload == "run_started":
                runs[recorded.event.run_id] = recorded.event.run_started
            elif payload == "experience":
                index = counts[payload]
                counts[payload] += 1
                summary.experiences += 1
                try:
                    check_experience(recorded.event.experience)
                except InvalidFieldError as error:
                    raise InvalidExperienceError(path, index, error) from error
                yield _Found(path, index, recorded.event.experience)
    except TruncatedRecordingError:
        summary.truncated.append(str(path))
    except NotARecordingError as error:
        raise DatasetError(str(error)) from error
