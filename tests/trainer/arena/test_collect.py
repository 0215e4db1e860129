from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from esperml.client.recording import read
from esperml.trainer.arena import cli
from esperml.trainer.arena.collect import (
    MANIFEST,
    Collection,
    CollectionError,
    collect,
    collect_host,
    recording_path,
)
from esperml.trainer.arena.hosts import HostSpec, sample_hosts
from esperml.trainer.arena.twins import Plan
from esperml.v1 import event_pb2

SPEC = HostSpec("digits", (16, 3), batch_size=32)


@pytest.fixture
def collection(short_plan: Plan) -> Collection:
    return Collection(hosts=2, branches=2, seed=3, plan=short_plan)


def content(path: Path) -> list[tuple[int, str | None, str]]:
    return [(x.kind, x.event.WhichOneof("payload"), x.event.run_id) for x in read(path)]


def decisions(path: Path) -> list[tuple[str, int, str, str]]:
    return [
        (x.event.run_id, x.event.decision.step, x.event.decision.target.target_layer, str(x.event.decision.action))
        for x in read(path)
        if x.event.HasField("decision") and x.event.decision.policy == "explore"
    ]


def test_a_host_is_recorded_whole_with_rewards_propensities_and_what_was_done(tmp_path: Path, short_plan: Plan) -> None:
    path = tmp_path / "host.mcap"
    collect_host(path, SPEC, Collection(1, 3, 0, short_plan))
    assert [file.name for file in tmp_path.iterdir()] == ["host.mcap"]
    recorded = list(read(path))
    experiences = [item.event.experience for item in recorded if item.event.HasField("experience")]
    branches = [x for x in experiences if x.episode_id != f"{SPEC.name}/static"]
    assert len({x.episode_id for x in branches}) == 3
    assert all(x.HasField("reward") and x.HasField("next_state") for x in branches)
    assert all(x.decision.propensity.HasField("joint_log_probability") for x in branches)
    assert {item.kind for item in recorded} == {
        event_pb2.KIND_EVENTS, event_pb2.KIND_DECISIONS, event_pb2.KIND_OUTCOMES, event_pb2.KIND_EXPERIENCE,
    }  # fmt: skip
    started = [item.event.run_started for item in recorded if item.event.HasField("run_started")]
    assert [start.paired_run for start in started] == ["", *[f"{SPEC.name}/static"] * 3]
    assert {start.policy for start in started} == {"nothing", "explore"}


def test_behaviour_varies_over_branches_and_follows_from_the_seed(tmp_path: Path, short_plan: Plan) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect_host(tmp_path / name, SPEC, Collection(1, 3, seed, short_plan))
    assert decisions(tmp_path / "a") == decisions(tmp_path / "b") != decisions(tmp_path / "c")
    taken = {run: [] for run, *_ in decisions(tmp_path / "a")}
    for run, *rest in decisions(tmp_path / "a"):
        taken[run].append(rest)
    assert len({json.dumps(steps) for steps in taken.values()}) > 1


def test_a_collection_is_made_told_and_carried_on(tmp_path: Path, collection: Collection) -> None:
    told: list[tuple[int, int]] = []
    paths = collect(tmp_path, collection, on_host=lambda *figures: told.append(figures))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert all(path.exists() for path in paths)
    assert paths == [recording_path(tmp_path, i, spec) for i, spec in enumerate(sample_hosts(2, 3))]
    before = {path: path.stat().st_mtime_ns for path in paths}
    told.clear()
    more = Collection(hosts=3, branches=2, seed=3, plan=collection.plan)
    assert len(collect(tmp_path, more, resume=True, on_host=lambda *figures: told.append(figures))) == 3
    assert told == [(2, 3), (3, 3)]
    assert {path: path.stat().st_mtime_ns for path in paths} == before


def test_a_folder_is_never_mixed_with_another_collection(tmp_path: Path, collection: Collection) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(Collection(2, 5, 4, collection.plan).manifest()))
    with pytest.raises(CollectionError, match="carry on with --resume"):
        collect(tmp_path, collection)
    with pytest.raises(CollectionError, match="another branches, seed"):
        collect(tmp_path, collection, resume=True)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CollectionError, match="is not JSON"):
        collect(tmp_path, collection, resume=True)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "foreign.mcap").touch()
    with pytest.raises(CollectionError, match="holds recordings but no"):
        collect(tmp_path, collection, resume=True)


@pytest.mark.parametrize(("fields", "named"), [({"hosts": 0}, "hosts"), ({"branches": 0}, "branches")])
def test_a_collection_of_nothing_is_refused_by_field(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        Collection(**{"hosts": 1, "branches": 1, "seed": 0, **fields})


def test_a_collection_can_be_narrowed_to_one_task_and_pace(short_plan: Plan) -> None:
    collection = Collection(4, 1, 0, short_plan, task="digits", pace=2.0)
    specs = collection.specs()
    assert {spec.task for spec in specs} == {"digits"}
    assert {collection.plan_of(spec).steps for spec in specs} == {2 * short_plan.steps}


def test_a_collection_for_an_unknown_task_names_those_there_are(short_plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"task: 'cats' is none of digits, mnist1d"):
        Collection(1, 1, 0, short_plan, task="cats").specs()


def _collect_in_a_group(folder: Path, collection: Collection) -> None:
    os.setpgrp()
    collect(folder, collection, jobs=2)


def _group_lives(group: int | None) -> bool:
    assert group is not None
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_collection_leaves_no_half_recording_and_ends_as_one_that_was_not(
    tmp_path: Path, collection: Collection
) -> None:
    whole = tmp_path / "whole"
    collect(whole, collection)
    broken = tmp_path / "broken"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_collect_in_a_group, args=(broken, collection))
    process.start()
    first = recording_path(broken, 0, sample_hosts(1, 3)[0])
    waiting = threading.Event()
    while not first.exists():
        assert process.is_alive()
        waiting.wait(0.02)
    process.kill()
    process.join()
    while _group_lives(process.pid):  # Its workers end too, though nobody told them to.
        waiting.wait(0.02)
    for path in broken.glob("*.mcap"):
        assert content(path) == content(whole / path.name)
    collect(broken, collection, resume=True)
    assert not list(broken.glob("*.partial"))
    for path in whole.glob("*.mcap"):
        assert decisions(path) == decisions(broken / path.name)


def test_a_host_that_fails_is_named_and_leaves_no_recording(
    tmp_path: Path, short_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise FloatingPointError("no number")

    monkeypatch.setattr("esperml.kasmina.session.new_event", fail)
    with pytest.raises(CollectionError, match=rf"run {SPEC.name}/static is of no use.*no number"):
        collect_host(tmp_path / "host.mcap", SPEC, Collection(1, 1, 0, short_plan))
    assert not (tmp_path / "host.mcap").exists()


def test_the_command_collects_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "experience"
    arguments = ["--out", str(out), "--hosts", "1", "--branches", "1"]
    result = CliRunner().invoke(cli.collect, arguments)
    assert result.exit_code == 0, result.output
    assert f"1 recordings in {out}" in result.output
    again = CliRunner().invoke(cli.collect, arguments)
    assert again.exit_code == 1
    assert "carry on with --resume" in again.output
