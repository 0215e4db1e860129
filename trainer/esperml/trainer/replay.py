"""The replay buffer: transitions on disk, their features in memory.

Raw experience is what is kept, since features can be computed from it anew. It lies in one SQLite file, one
transaction an addition: after a crash the buffer is as it was before or after the addition, never between. Features are
extracted once, when an experience comes in or the buffer is opened.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from google.protobuf.message import DecodeError

from esperml.contract import InvalidFieldError
from esperml.tamiyo.features import GraphTensors, extract
from esperml.trainer.transitions import Choice, Transition, check_experience, choice_of
from esperml.v1 import experience_pb2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS transitions (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    episode TEXT NOT NULL,
    position INTEGER NOT NULL,
    cluster TEXT NOT NULL,
    host TEXT NOT NULL,
    experience BLOB NOT NULL,
    UNIQUE (episode, position)
)
"""
_FORMAT = 1


class ReplayError(Exception):
    """A replay buffer cannot be opened or cannot take what it is given."""


@dataclass(frozen=True, slots=True)
class Step:
    """One transition as the algorithm sees it.

    Attributes:
        features: of the state.
        next_features: of the next state; None where the episode is done, or where the next step is in the buffer too.
        choice: what was done.
        blueprint: index into the buffer's vocabulary of what was germinated; None where nothing was done.
        may_adapt: False where the mask left no choice.
        reward: -1 to 1.
        done: True for the last of its episode.
        episode: name of the episode.
        position: place in the episode, from 0.
        cluster: see :class:`~esperml.trainer.transitions.Transition`.
        host: see :class:`~esperml.trainer.transitions.Transition`.
    """

    features: GraphTensors
    next_features: GraphTensors | None
    choice: Choice
    blueprint: int | None
    may_adapt: bool
    reward: float
    done: bool
    episode: str
    position: int
    cluster: str
    host: str


class ReplayBuffer:
    """Transitions in the order in which their episodes came, at most ``capacity`` of them.

    When it is full, whole episodes go, oldest first: a return is only known for an episode that is complete.

    Args:
        capacity: most transitions, at least 1.
        vocabulary: names of the blueprints that are known, in the order of the policy's blueprint head.
        path: file to keep them in; None keeps them in memory alone.

    Raises:
        ReplayError: the file is not a replay buffer, or holds what ``vocabulary`` does not know.
    """

    def __init__(self, capacity: int, vocabulary: Sequence[str], path: Path | None = None) -> None:
        if capacity < 1:
            raise ReplayError(f"capacity is {capacity}, must be at least 1")
        self.capacity = capacity
        self.vocabulary = tuple(vocabulary)
        self._episodes: dict[str, list[Step]] = {}
        self._database = sqlite3.connect(path or ":memory:", isolation_level=None)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ReplayError(f"{path}: is not a replay buffer: {error}") from error
        except ReplayError:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return sum(map(len, self._episodes.values()))

    def __contains__(self, episode: str) -> bool:
        return episode in self._episodes

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def steps(self) -> list[Step]:
        """All steps: episodes in the order in which they came, steps by position."""
        return [step for episode in self._episodes.values() for step in episode]

    def add(self, transitions: Iterable[Transition]) -> int:
        """Takes transitions in, all or none, and lets the oldest episodes go as far as there is no room.

        What the buffer holds already (same episode, same position) is left as it is.

        Returns:
            How many were new.

        Raises:
            ReplayError: an episode is larger than the whole buffer, a blueprint is not in the vocabulary, or the file
                cannot be written.
        """
        fresh: dict[str, list[Transition]] = {}
        for item in transitions:
            name = item.experience.episode_id
            if all(step.position != item.experience.index for step in self._episodes.get(name, ())):
                fresh.setdefault(name, []).append(item)
        merged = {name: self._merge(name, items) for name, items in fresh.items()}
        kept = self._evict({**self._episodes, **merged})
        gone = [name for name in self._episodes if name not in kept]
        try:
            self._write([item for name, items in fresh.items() if name in kept for item in items], gone)
        except sqlite3.Error as error:
            raise ReplayError(f"the replay buffer cannot be written: {error}") from error
        self._episodes = kept
        return sum(map(len, fresh.values()))

    def _merge(self, name: str, items: Sequence[Transition]) -> list[Step]:
        positions = {item.experience.index for item in items}
        steps = [*self._episodes.get(name, ()), *(self._step(item, positions) for item in items)]
        if len(steps) > self.capacity:
            raise ReplayError(f"episode {name!r} has {len(steps)} steps, more than the capacity of {self.capacity}")
        return sorted(steps, key=lambda step: step.position)

    def _step(self, item: Transition, positions: set[int]) -> Step:
        experience = item.experience
        if item.choice.place is not None and item.choice.blueprint not in self.vocabulary:
            raise ReplayError(
                f"episode {experience.episode_id!r}, index {experience.index}: blueprint {item.choice.blueprint!r} is "
                f"not in the vocabulary ({', '.join(self.vocabulary)})"
            )
        follows = experience.done or experience.index + 1 in positions
        return Step(
            features=extract(experience.state, self.vocabulary),
            next_features=None if follows else extract(experience.next_state, self.vocabulary),
            choice=item.choice,
            blueprint=None if item.choice.place is None else self.vocabulary.index(item.choice.blueprint),
            may_adapt=experience.state.mask.may_adapt,
            reward=item.reward,
            done=experience.done,
            episode=experience.episode_id,
            position=experience.index,
            cluster=item.cluster,
            host=item.host,
        )

    def _evict(self, episodes: dict[str, list[Step]]) -> dict[str, list[Step]]:
        surplus = sum(map(len, episodes.values())) - self.capacity
        kept = dict(episodes)
        for name, steps in episodes.items():
            if surplus <= 0:
                break
            del kept[name]
            surplus -= len(steps)
        return kept

    def _write(self, added: Sequence[Transition], gone: Sequence[str]) -> None:
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("DELETE FROM transitions WHERE episode = ?", [(name,) for name in gone])
            self._database.executemany(
                "INSERT INTO transitions (episode, position, cluster, host, experience) VALUES (?, ?, ?, ?, ?)",
                [
                    (
                        item.experience.episode_id,
                        item.experience.index,
                        item.cluster,
                        item.host,
                        item.experience.SerializeToString(deterministic=True),
                    )
                    for item in added
                ],
            )

    def _open(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        with closing(self._database.execute("PRAGMA user_version")) as cursor:
            (found,) = cursor.fetchone()
        if found not in (0, _FORMAT):
            raise ReplayError(f"the replay buffer has format {found}; this version reads {_FORMAT}")
        self._database.execute(_SCHEMA)
        self._database.execute(f"PRAGMA user_version = {_FORMAT}")
        stored: dict[str, list[Transition]] = {}
        for item in self._stored():
            stored.setdefault(item.experience.episode_id, []).append(item)
        self._episodes = {name: self._merge(name, items) for name, items in stored.items()}
        kept = self._evict(self._episodes)
        self._write([], [name for name in self._episodes if name not in kept])
        self._episodes = kept

    def _stored(self) -> Iterator[Transition]:
        with closing(
            self._database.execute("SELECT cluster, host, experience FROM transitions ORDER BY row")
        ) as cursor:
            for cluster, host, blob in cursor:
                try:
                    experience = experience_pb2.TrainingExperience.FromString(blob)
                    check_experience(experience)
                    choice = choice_of(experience)
                except (DecodeError, InvalidFieldError) as error:
                    raise ReplayError(f"the replay buffer is damaged: {error}") from error
                yield Transition(experience, choice, experience.reward.total, cluster, host)
