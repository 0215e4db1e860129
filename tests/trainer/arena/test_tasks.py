from __future__ import annotations

import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from esperml.trainer.arena import tasks
from esperml.trainer.arena.tasks import load_task

NAMES = ["digits", "mnist1d", "tabular-0", "tabular-11"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    load_task.cache_clear()
    yield tmp_path / "cache"
    load_task.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_split_in_three_without_overlap_and_standardised_by_its_training_part(name: str) -> None:
    task = load_task(name)
    sizes = [len(part) for part in (task.train, task.validation, task.test)]
    total = sum(sizes)
    assert [round(size / total, 2) for size in sizes] == [0.6, 0.2, 0.2]
    assert task.train.inputs.dtype == torch.float32
    assert task.train.targets.dtype == torch.int64
    varying = task.train.inputs.std(dim=0) > 0
    assert torch.allclose(task.train.inputs.mean(dim=0), torch.zeros(task.features), atol=1e-4)
    assert torch.allclose(task.train.inputs.std(dim=0)[varying], torch.ones(int(varying.sum())), atol=1e-2)
    assert set(task.train.targets.tolist()) == set(range(task.classes))
    rows = {tuple(row) for row in task.train.inputs[:, :8].tolist()}
    assert len(rows) > len(task.train) / 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_tensors_and_another_seed_another_split(name: str) -> None:
    load_task.cache_clear()
    first = load_task(name, 3)
    load_task.cache_clear()
    second, third = load_task(name, 3), load_task(name, 4)
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert not torch.equal(first.test.targets, third.test.targets)


@pytest.mark.parametrize("name", ["", "mnist", "tabular", "tabular-", "tabular--1", "tabular-x", "digits-2"])
def test_an_unknown_task_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="unknown task"):
        load_task(name)


def test_tabular_families_differ() -> None:
    shapes = {(load_task(f"tabular-{n}").features, load_task(f"tabular-{n}").classes) for n in range(6)}
    assert len(shapes) > 3


def test_mnist1d_is_made_without_the_network_and_without_disturbing_random_numbers(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.default_rng(1).random()
    random.seed(5)
    load_task("mnist1d")
    assert random.random() == expected[0]
    assert [path.name for path in own_cache.iterdir()] == ["mnist1d-5000-seed42.npz"]


def test_mnist1d_comes_from_the_cache_the_second_time(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_task("mnist1d")
    load_task.cache_clear()
    monkeypatch.setattr(tasks, "_make_mnist1d", lambda: pytest.fail("it was made again"))
    assert torch.equal(load_task("mnist1d").train.inputs, first.train.inputs)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_damaged_cache_is_made_again(own_cache: Path, content: bytes) -> None:
    first = load_task("mnist1d")
    load_task.cache_clear()
    (own_cache / "mnist1d-5000-seed42.npz").write_bytes(content)
    assert torch.equal(load_task("mnist1d").train.inputs, first.train.inputs)
    assert (own_cache / "mnist1d-5000-seed42.npz").stat().st_size > 1000


def test_a_cache_that_cannot_be_written_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "file"))
    load_task.cache_clear()
    assert load_task("mnist1d").features == 40
    load_task.cache_clear()


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ESPER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tasks.cache_dir() == tmp_path / "esper"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tasks.cache_dir() == tmp_path / ".cache" / "esper"
