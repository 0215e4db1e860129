"""The replay buffer."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esperml.trainer.replay import ReplayBuffer, ReplayError, Step
from esperml.trainer.transitions import Transition, transition

VOCABULARY = ("gate", "mlp")


@pytest.fixture(scope="module")
def episodes(synthetic: ModuleType) -> list[list[Transition]]:
    """Six episodes of three steps."""
    world = synthetic.make_world(3, 2, seed=11)
    return [[transition(item, world.runs[item.episode_id]) for item in episode] for episode in world.episodes]


def _names(replay: ReplayBuffer) -> list[tuple[str, int]]:
    return [(step.episode, step.position) for step in replay.steps()]


def _features_equal(one: Step, other: Step) -> bool:
    return bool((one.features.node == other.features.node).all() and (one.features.place == other.features.place).all())


def test_the_oldest_episodes_go_first_and_whole(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(7, VOCABULARY) as replay:
        for episode in episodes:
            assert replay.add(episode) == 3
        assert len(replay) == 6
        assert [name for name, _ in _names(replay)] == [
            item.experience.episode_id for episode in episodes[-2:] for item in episode
        ]
        assert episodes[-1][0].experience.episode_id in replay
        assert episodes[0][0].experience.episode_id not in replay


def test_a_buffer_on_disk_is_the_same_when_it_is_opened_again(episodes: list[list[Transition]], tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        replay.add(item for episode in episodes for item in episode)
        before = replay.steps()
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        after = replay.steps()
    assert len(before) == len(after) == 18
    for one, other in zip(before, after, strict=True):
        assert _features_equal(one, other)
        assert (one.choice, one.blueprint, one.reward, one.done) == (
            other.choice,
            other.blueprint,
            other.reward,
            other.done,
        )
        assert (one.episode, one.position, one.cluster, one.host) == (
            other.episode,
            other.position,
            other.cluster,
            other.host,
        )


def test_a_smaller_capacity_lets_the_oldest_go_when_it_is_opened(
    episodes: list[list[Transition]], tmp_path: Path
) -> None:
    path = tmp_path / "replay.sqlite"
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        replay.add(item for episode in episodes for item in episode)
    with ReplayBuffer(3, VOCABULARY, path) as replay:
        assert {name for name, _ in _names(replay)} == {episodes[-1][0].experience.episode_id}
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        assert len(replay) == 3


def test_what_is_there_already_is_not_taken_twice(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(100, VOCABULARY) as replay:
        assert replay.add(episodes[0][:2]) == 2
        assert replay.add(episodes[0]) == 1
        assert replay.add(episodes[0]) == 0
        assert [step.position for step in replay.steps()] == [0, 1, 2]


def test_only_the_end_of_what_is_known_of_an_episode_looks_beyond(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(100, VOCABULARY) as replay:
        replay.add([episodes[0][0], episodes[1][0], episodes[1][2]])
        assert [step.next_features is None for step in replay.steps()] == [False, False, True]


def test_an_episode_larger_than_the_buffer_is_refused_and_nothing_changes(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(3, VOCABULARY) as replay:
        replay.add(episodes[0])
        with ReplayBuffer(2, VOCABULARY) as small, pytest.raises(ReplayError, match="more than the capacity of 2"):
            small.add(episodes[1])
        assert _names(replay) == [(item.experience.episode_id, item.experience.index) for item in episodes[0]]


def test_a_blueprint_that_the_policy_does_not_know_is_refused(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(100, ("orchid",)) as replay:
        with pytest.raises(ReplayError, match=r"blueprint '(gate|mlp)' is not in the vocabulary \(orchid\)"):
            replay.add(item for episode in episodes for item in episode)
        assert len(replay) == 0


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ReplayError, match="capacity is 0"):
        ReplayBuffer(0, VOCABULARY)


def test_a_file_that_is_no_buffer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    path.write_bytes(b"something else entirely, and long enough to be looked at" * 10)
    with pytest.raises(ReplayError, match="is not a replay buffer"):
        ReplayBuffer(10, VOCABULARY, path)
    other = tmp_path / "future.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ReplayError, match="has format 9"):
        ReplayBuffer(10, VOCABULARY, other)


def test_a_damaged_row_is_named_as_damage(episodes: list[list[Transition]], tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    with ReplayBuffer(10, VOCABULARY, path) as replay:
        replay.add(episodes[0])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE transitions SET experience = ? WHERE position = 1", (b"\xff\xff",))
    database.close()
    with pytest.raises(ReplayError, match="damaged"):
        ReplayBuffer(10, VOCABULARY, path)


def test_a_full_disk_leaves_the_buffer_as_it_was(episodes: list[list[Transition]], tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        replay.add(episodes[0])
        # SQLite's own limit on pages fails as a full disk does.
        pages = replay._database.execute("PRAGMA page_count").fetchone()[0]
        replay._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ReplayError, match="full"):
            replay.add(item for episode in episodes[1:] for item in episode)
        assert len(replay) == 3
    with ReplayBuffer(100, VOCABULARY, path) as replay:
        assert _names(replay) == [(item.experience.episode_id, item.experience.index) for item in episodes[0]]


@settings(max_examples=25, deadline=None)
@given(capacity=st.integers(3, 12), order=st.lists(st.integers(0, 5), max_size=8), data=st.data())
def test_a_buffer_is_a_queue_of_episodes(
    episodes: list[list[Transition]], capacity: int, order: list[int], data: st.DataObject
) -> None:
    model: dict[str, set[int]] = {}
    with ReplayBuffer(capacity, VOCABULARY) as replay:
        for number in order:
            part = data.draw(st.lists(st.sampled_from(episodes[number]), min_size=1, unique_by=id))
            replay.add(part)
            name = part[0].experience.episode_id
            model.setdefault(name, set()).update(item.experience.index for item in part)
            while sum(map(len, model.values())) > capacity:
                del model[next(iter(model))]
            assert _names(replay) == [(name, index) for name, found in model.items() for index in sorted(found)]


def test_features_are_those_of_the_state(episodes: list[list[Transition]]) -> None:
    with ReplayBuffer(10, VOCABULARY) as replay:
        replay.add(episodes[0])
        step = replay.steps()[0]
    state = episodes[0][0].experience.state
    assert step.features.node.shape[0] == len(state.graph.layers)
    assert step.features.allowed.shape == (len(state.graph.places.sources), len(VOCABULARY))
    assert np.isfinite(step.features.node.numpy()).all()
