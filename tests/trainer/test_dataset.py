"""Reading recordings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from esperml.trainer.dataset import DatasetError, InvalidExperienceError, load, recordings
from esperml.v1 import decision_pb2


def test_files_and_folders_are_read_once_each(small_world: Any, record: Callable[[Any], Path]) -> None:
    path = record(small_world)
    dataset = load([path.parent, path])
    assert recordings([path.parent, path]) == [path]
    assert len(dataset.transitions) == dataset.summary.used == len(small_world.experiences)
    assert [len(episode) for episode in dataset.episodes()] == [3] * len(small_world.episodes)
    assert {item.cluster for item in dataset.transitions} == set(small_world.hosts)


def test_runs_are_clustered_by_a_label_where_one_is_named(small_world: Any, record: Callable[[Any], Path]) -> None:
    dataset = load([record(small_world)], cluster_label="family")
    assert {item.cluster for item in dataset.transitions} == {"f0", "f1"}


def test_experience_without_a_paired_reward_is_counted_and_left_out(
    small_world: Any, record: Callable[[Any], Path]
) -> None:
    small_world.experiences[0].ClearField("reward")
    small_world.experiences[1].reward.basis = decision_pb2.BASIS_ABLATION
    dataset = load([record(small_world)])
    assert (dataset.summary.unmeasured, dataset.summary.other_basis) == (1, 1)
    assert len(dataset.transitions) == len(small_world.experiences) - 2
    assert "1 without a reward left out" in dataset.summary.sentence()
    assert "1 with a reward that no paired branch measured left out" in dataset.summary.sentence()


def test_experience_that_two_recordings_hold_is_used_once(small_world: Any, record: Callable[[Any], Path]) -> None:
    dataset = load([record(small_world), record(small_world)])
    assert len(dataset.transitions) == dataset.summary.duplicates == len(small_world.experiences)
    assert "found twice left out" in dataset.summary.sentence()


def test_two_runs_of_one_name_are_refused(small_world: Any, record: Callable[[Any], Path]) -> None:
    first = record(small_world)
    small_world.experiences[2].decision.decision_id = "another"
    with pytest.raises(DatasetError, match="must not share a name"):
        load([first, record(small_world)])


def test_a_truncated_recording_gives_back_what_is_whole(synthetic: ModuleType, record: Callable[[Any], Path]) -> None:
    world = synthetic.make_world(120, 3, seed=5)
    path = record(world)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.8)])
    dataset = load([path])
    assert dataset.summary.truncated == [str(path)]
    assert 0 < len(dataset.transitions) < len(world.experiences)
    assert "was cut short" in dataset.summary.sentence()


def test_a_broken_experience_is_named_by_file_index_and_field(small_world: Any, record: Callable[[Any], Path]) -> None:
    small_world.experiences[4].reward.total = 7
    path = record(small_world)
    with pytest.raises(InvalidExperienceError, match=r"experience 4: experience\.reward\.total: is 7") as caught:
        load([path])
    assert (caught.value.path, caught.value.index) == (path, 4)
    assert (caught.value.field, caught.value.problem) == ("experience.reward.total", "is 7, outside [-1, 1]")


def test_a_broken_decision_is_named_too(small_world: Any, record: Callable[[Any], Path]) -> None:
    small_world.experiences[5].decision.action.cull.SetInParent()
    with pytest.raises(InvalidExperienceError, match=r"experience 5: experience\.decision\.action"):
        load([record(small_world)])


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no recording"):
        load([tmp_path])
    with pytest.raises(DatasetError, match="no such file or folder"):
        load([tmp_path / "missing"])
    for name, content in (("empty.mcap", b""), ("text.mcap", b"not an MCAP file at all")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=name):
            load([path])
