from __future__ import annotations

import io
import math

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from esperml.client.events import new_event
from esperml.demo.braille import chart
from esperml.demo.display import Board, Lines, watch
from esperml.demo.story import HostStory, RunStory
from esperml.trainer.arena.twins import Progress
from esperml.v1 import event_pb2, health_pb2

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


def shown(thing: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(thing)
    return console.file.getvalue()


def events(host_story: HostStory) -> list[event_pb2.Event]:
    run = host_story.runs["adapted"]
    return [
        *(new_event("run", decision=decision) for decision in run.decisions),
        *(new_event("run", applied=applied) for applied in run.applied.values()),
        *(new_event("run", health_report=report) for report in run.reports),
        new_event("run", effect=next(iter(run.effects.values()))),
    ]


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), width=st.integers(1, 30), height=st.integers(1, 8))
def test_a_chart_has_its_size_whatever_the_points(points: list[tuple[float, float]], width: int, height: int) -> None:
    text = chart([("red", points)], width=width, height=height, x_range=(0, 1), y_range=(0, 1)).plain
    assert [len(line) for line in text.split("\n")] == [width] * height
    drawn = any(character != " " for character in text.replace("\n", ""))
    assert drawn == any(math.isfinite(x) and math.isfinite(y) for x, y in points)


def test_a_rising_curve_rises() -> None:
    text = chart([("", [(0, 0), (1, 1)])], width=4, height=2, x_range=(0, 1), y_range=(0, 1)).plain
    top, bottom = text.split("\n")
    assert top.strip()
    assert top.startswith(" ")
    assert bottom[0] != " "


def test_a_flat_range_does_not_divide_by_nothing() -> None:
    assert chart([("", [(0, 5)])], width=2, height=1, x_range=(0, 0), y_range=(5, 5)).plain.strip()


def test_the_board_shows_curves_telemetry_and_decisions(host_story: HostStory) -> None:
    board = Board(["mnist1d", "digits"], 800)
    assert "waiting for the first report" in shown(board)
    board.say("mnist1d, seed 0: under Tamiyo")
    for moment in host_story.twins["adapted"].curve:
        board.progress("mnist1d", "adapted", moment)
    for event in events(host_story):
        board.event("mnist1d", "adapted", event)
    signals = [
        health_pb2.EnhancedHealthSignal(layer="hidden2", effective_rank=0.31, gradient_norm=value)
        for value in (1, 2, 5)
    ]
    for role, signal in zip(("static", "adapted", "adapted"), signals, strict=True):
        report = health_pb2.HealthReport(step=300, layers=[signal])
        board.event("mnist1d", role, new_event("run", health_report=report))
    text = shown(board)
    for said in (
        "under Tamiyo ",
        "0.906",
        "hidden2",
        "0.31",
        "–",
        "▁█",
        "plant conv",
        "applied at step 180",
        "step 300",
    ):
        assert said in text
    board.restart()
    assert "0.906" not in shown(board)


def test_plain_lines_tell_decisions_and_what_became_of_them(host_story: HostStory) -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = Lines(console)
    lines.say("starting")
    lines.progress("mnist1d", "adapted", Progress("run", 25, 1.0, 1.0))
    for event in events(host_story):
        lines.event("mnist1d", "adapted", event)
    told = console.file.getvalue().splitlines()
    assert told[0] == "starting"
    assert sum("plant conv" in line for line in told) == 2
    assert any(line.endswith("refused: the place is taken") for line in told)
    assert not any("leave as it is" in line for line in told)


def test_a_terminal_gets_the_board_and_a_pipe_gets_lines() -> None:
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True)
    with watch(terminal, ["digits"], 100, live=True) as (watcher, restart):
        assert isinstance(watcher, Board)
        restart()
    with watch(terminal, ["digits"], 100, live=False) as (watcher, restart):
        assert isinstance(watcher, Lines)
        restart()
    with watch(Console(file=io.StringIO()), ["digits"], 100, live=True) as (watcher, _):
        assert isinstance(watcher, Lines)


def test_a_story_forgets_nothing_that_was_decided(host_story: HostStory) -> None:
    run = RunStory()
    for event in events(host_story):
        run.take(event)
    assert len(run.decisions) == 4
    assert len(run.actions) == 3
