"""The demo against a real server in a process of its own."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from esperml.client.recording import describe, read
from esperml.demo.cli import demo as command
from esperml.demo.display import Board, Lines
from esperml.demo.run import Demo, _is_due, run_demo
from esperml.demo.server import ServerError, ServerProcess
from esperml.demo.story import ROLES, Role
from esperml.tamiyo.run_control import LIFECYCLE
from esperml.trainer.arena.hosts import HostSpec
from esperml.trainer.arena.twins import Plan, Progress
from esperml.v1 import event_pb2

HOSTS = {"digits": HostSpec("digits", (16, 3), batch_size=32, learning_rate=3e-3)}
PLAN = Plan(
    steps=1500, report_every=50, warmup_steps=100, decision_interval_steps=100, blend_steps=10, hold_steps=50,
    last_germination_step=1200, graft_parameter_budget=200, parameter_budget=400,
)  # fmt: skip


def lines() -> Lines:
    return Lines(Console(file=io.StringIO(), width=100))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "stale.mcap").touch()
    asked = Demo(out=folder, repeats=2, plan=PLAN, hosts=HOSTS, policy="chance")
    board = Board(["digits"], PLAN.steps)
    run_demo(asked, board, on_repeat=board.restart)
    return folder


def test_the_demo_leaves_figures_report_and_recordings(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        "summary.json", "report.html", "server.log", "digits-seed0.mcap", "digits-seed1.mcap",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["server_lost"] == ""
    assert summary["decisions_applied"] >= 1
    # What is sent as a run ends may find nobody to answer.
    assert summary["decisions_sent"] >= summary["decisions_applied"] + summary["decisions_refused"]
    assert summary["overhead_pct"] > 0
    assert [repeat["seed"] for repeat in summary["repeats"]] == [0, 1]
    assert summary["wins"]["digits"]["of"] == 2
    [host] = summary["hosts"]
    # Chance may plant what is then culled for being of no use, but it never shrinks the host.
    assert host["adapted"]["parameters"] >= host["static"]["parameters"] > 0


def test_all_kinds_of_all_three_twins_are_recorded_from_the_bus(out: Path) -> None:
    info = describe(out / "digits-seed0.mcap")
    assert not info.truncated
    assert set(info.runs) == {f"digits-seed0-{role}" for role in ROLES}
    assert set(info.counts) == set(event_pb2.Kind.values()) - {event_pb2.KIND_UNSPECIFIED}


def test_the_recordings_hold_experience_with_rewards_to_train_on(out: Path) -> None:
    experiences = [x.event.experience for x in read(out / "digits-seed0.mcap") if x.event.HasField("experience")]
    for role in ("adapted", "random"):
        own = [x for x in experiences if x.episode_id == f"digits-seed0-{role}"]
        assert own[-1].done
        assert all(x.HasField("reward") for x in own)


def test_the_report_shows_the_first_repeat(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "seed 0" in page
    assert "Over 2 repeats" in page
    assert page.count("<svg") == 5


def test_repeats_differ_in_their_seed(out: Path) -> None:
    first, second = json.loads((out / "summary.json").read_text())["repeats"]
    assert first["hosts"][0]["static"]["test_loss"] != second["hosts"][0]["static"]["test_loss"]


class _Killer(Lines):
    """Kills the server in the middle of the twin under Tamiyo."""

    pid = 0

    def progress(self, host: str, role: Role, moment: Progress) -> None:
        if role == "adapted" and moment.step == 750:
            os.kill(self.pid, signal.SIGKILL)


def test_a_server_killed_in_the_middle_leaves_training_to_finish_and_the_demo_says_so(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    watcher = _Killer(console)
    asked = Demo(out=tmp_path, plan=PLAN, hosts=HOSTS, policy="chance")
    story = run_demo(asked, watcher, on_server=lambda server: setattr(watcher, "pid", server.pid))
    [host] = story.hosts
    assert {role: len(host.twins[role].curve) for role in ROLES} == dict.fromkeys(ROLES, 30)
    assert story.server_lost.endswith("digits under Tamiyo")
    assert f"the server was lost {story.server_lost}" in console.file.getvalue()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["server_lost"] == story.server_lost
    assert set(summary["hosts"][0]) == {"name", *ROLES}
    assert "The server was lost by step" in (tmp_path / "report.html").read_text()
    info = describe(tmp_path / "digits-seed0.mcap")
    assert not info.truncated
    assert info.runs["digits-seed0-static"] > 0
    assert info.runs["digits-seed0-random"] == 0


def test_a_server_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    asked = Demo(out=tmp_path, plan=PLAN, hosts=HOSTS, policy=str(tmp_path / "no-such-policy"))
    with pytest.raises(ServerError, match="no-such-policy"):
        run_demo(asked, lines())


def test_a_server_answers_where_it_listens_and_is_gone_afterwards(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data", tmp_path / "server.log", ("--policy", "nothing")) as server:
        assert server.alive
        assert server.address.startswith("127.0.0.1:")
        pid = server.pid
    assert not server.alive
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ServerError, match="was not started"):
        _ = server.pid


def test_the_command_tells_what_came_of_it(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "demo"), "--quick", "--no-live", "--policy", "chance", "--seed", "3"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    for said in ("under Tamiyo", "mnist1d", "report.html"):
        assert said in result.output
    decided = [
        recorded.event.decision
        for recorded in read(tmp_path / "demo" / "mnist1d-seed3.mcap")
        if recorded.event.HasField("decision") and recorded.event.run_id.endswith("adapted")
    ]
    # Five are due in 200 steps, which take a fraction of a second: the demo waits for each, if not for ever.
    assert len({decision.step for decision in decided if decision.policy != LIFECYCLE}) >= 4


@pytest.mark.parametrize(
    ("decided_at", "due"), [(0, [100, 150, 200, 250, 300]), (100, [200, 250, 300]), (150, [250, 300])]
)
def test_a_decision_is_due_after_warm_up_and_an_interval_after_the_last(decided_at: int, due: list[int]) -> None:
    assert [step for step in range(50, 301, 50) if _is_due(PLAN, decided_at, step)] == due


def test_the_command_names_what_hinders_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--out", str(tmp_path), "--quick", "--policy", "no-such-policy"])
    assert result.exit_code == 1
    assert "no-such-policy" in result.output
