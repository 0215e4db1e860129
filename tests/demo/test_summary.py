from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from esperml.demo.story import DemoStory, HostStory
from esperml.demo.summary import summarise, table, wins


def test_the_summary_has_the_figures_of_every_twin_under_their_names(story: DemoStory) -> None:
    summary = json.loads(json.dumps(summarise(story)))
    [host] = summary["hosts"]
    assert host["name"] == "mnist1d"
    for role, parameters in (("static", 4112), ("adapted", 4904), ("random", 4904)):
        assert set(host[role]) == {"val_loss", "val_accuracy", "test_loss", "test_accuracy", "parameters"}
        assert host[role]["parameters"] == parameters
    assert host["adapted"]["test_loss"] == pytest.approx(0.91)
    assert host["adapted"]["val_accuracy"] == pytest.approx(0.7)


def test_decisions_are_counted_for_the_twin_under_tamiyo_alone(story: DemoStory) -> None:
    summary = summarise(story)
    assert (summary["decisions_sent"], summary["decisions_applied"], summary["decisions_refused"]) == (3, 2, 1)


def test_the_overhead_is_the_mean_over_the_twins_that_reported_it(story: DemoStory) -> None:
    assert summarise(story)["overhead_pct"] == pytest.approx(3.0)


def test_an_overhead_that_nobody_reported_is_absent_and_not_zero(story: DemoStory, host_story: HostStory) -> None:
    for run in host_story.runs.values():
        run.reports.clear()
    assert summarise(story)["overhead_pct"] is None


def test_repeats_are_listed_and_wins_counted(story: DemoStory, host_story: HostStory) -> None:
    swapped = HostStory("mnist1d", host_story.spec, dict(host_story.twins), host_story.runs)
    swapped.twins["adapted"], swapped.twins["random"] = swapped.twins["random"], swapped.twins["adapted"]
    story.repeats.append([swapped])
    story.seeds.append(1)
    summary = summarise(story)
    assert [repeat["seed"] for repeat in summary["repeats"]] == [0, 1]
    assert summary["wins"] == wins(story) == {"mnist1d": {"over_static": 2, "over_random": 1, "of": 2}}


def test_one_repeat_is_not_listed_again(story: DemoStory) -> None:
    assert not {"repeats", "wins"} & set(summarise(story))


def test_the_table_shows_every_twin(story: DemoStory, host_story: HostStory) -> None:
    host_story.runs["static"].reports.clear()
    console = Console(file=io.StringIO(), width=160)
    console.print(table(story))
    shown = console.file.getvalue()
    for cell in ("left alone", "under Tamiyo", "masked chance", "4,904", "0.910", "unknown", "3.0%"):
        assert cell in shown
