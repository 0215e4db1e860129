from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from esperml.client.events import new_event
from esperml.demo import pictures
from esperml.demo.report import render
from esperml.demo.story import ROLES, DemoStory, HostStory, RunStory
from esperml.v1 import graph_pb2, run_pb2


class _Reader(HTMLParser):
    """Collects what a page would load, its text, and the tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.loaded += [names[key] or "" for key in ("src", "href", "xlink:href", "data", "srcset") if key in names]
        if names.get("id"):
            self.ids.append(str(names["id"]))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_report_loads_nothing_from_outside(story: DemoStory) -> None:
    page = render(story)
    assert all(address.startswith("#") for address in read(page).loaded)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(\"?([^)\"]+)", page))


def test_no_two_pictures_on_a_page_share_an_id(story: DemoStory, host_story: HostStory) -> None:
    other = HostStory("digits", host_story.spec, host_story.twins, host_story.runs)
    story.repeats[0].append(other)
    drawn = [re.findall(r' id="([cmp][0-9a-f]{10})"', svg) for svg in render(story).split("<svg")[1:]]
    ids = [identifier for picture in drawn for identifier in set(picture)]
    assert ids
    assert len(set(ids)) == len(ids)


def test_the_report_says_what_was_decided_why_and_what_became_of_it(story: DemoStory) -> None:
    text = " ".join(read(render(story)).text)
    for said in (
        "plant conv: input of hidden1 → output of hidden2",
        "hidden2 <expresses> little of what the loss asks of it",
        "applied at step 180",
        "refused at step 252: the place is taken",
        "without it the held-out loss would be +0.200",
        "reward +0.310",
        "keep seed-1",
        "One more decision was to leave",
        "shipped 0123456789ab",
    ):
        assert said in text


def test_a_lost_server_is_told_and_the_report_still_comes(story: DemoStory, host_story: HostStory) -> None:
    host_story.runs = {role: RunStory() for role in ROLES}
    story.server_lost = "by step 400 of mnist1d under Tamiyo"
    text = " ".join(read(render(story)).text)
    assert "The server was lost by step 400 of mnist1d under Tamiyo." in text
    assert "The bus holds no structure of this run." in text
    assert "None was planted." in text
    assert "Nothing was done." in text


def test_without_repeats_there_is_no_count_of_wins_and_with_them_there_is(
    story: DemoStory, host_story: HostStory
) -> None:
    assert "repeats with different seeds" not in render(story)
    story.repeats.append([host_story])
    story.seeds.append(1)
    assert "2 of 2" in " ".join(read(render(story)).text)


def test_a_worse_twin_is_called_worse(story: DemoStory, host_story: HostStory) -> None:
    host_story.twins["adapted"], host_story.twins["static"] = host_story.twins["static"], host_story.twins["adapted"]
    text = " ".join(read(render(story)).text)
    assert "44.0% higher test loss" in text


@pytest.mark.parametrize("relative", [0.0, 0.0004, -0.0004])
def test_a_tie_is_called_one_and_not_painted(story: DemoStory, host_story: HostStory, relative: float) -> None:
    static = host_story.twins["static"]
    test = replace(static.test, loss=static.test.loss * (1 + relative))
    host_story.twins["adapted"] = replace(host_story.twins["adapted"], test=test)
    page = render(story)
    assert "no difference" in " ".join(read(page).text)
    assert 'class="verdict "' in page


def test_pictures_are_well_formed_and_the_same_each_time(host_story: HostStory) -> None:
    for draw in (pictures.loss_curves, pictures.seed_timeline):
        assert ElementTree.fromstring(draw(host_story)).tag.endswith("svg")
        assert draw(host_story) == draw(host_story)


def test_a_curve_that_is_not_finite_is_drawn_as_far_as_it_is(host_story: HostStory) -> None:
    twin = host_story.twins["random"]
    lost = tuple(replace(moment, validation_loss=float("nan")) for moment in twin.curve)
    host_story.twins = {role: replace(twin, curve=lost) for role in ROLES}
    assert pictures.loss_curves(host_story).startswith("<svg")


@pytest.mark.parametrize("kind", [graph_pb2.EDGE_KIND_RESIDUAL, graph_pb2.EDGE_KIND_FORWARD])
def test_hosts_with_branches_and_shortcuts_are_drawn(kind: graph_pb2.EdgeKind.ValueType) -> None:
    layer = graph_pb2.LayerSpec(type=graph_pb2.LAYER_TYPE_CONV2D, input_shape=[1, 8, 8], output_shape=[4, 8, 8])
    layers = [graph_pb2.LayerSpec(name=f"layer{index}") for index in range(4)]
    for spec in layers:
        spec.MergeFrom(layer)
    edges = graph_pb2.EdgeTable(sources=[0, 0, 1, 2, 3], targets=[1, 2, 3, 3, 1], kinds=[kind] * 5)
    graph = graph_pb2.HostGraph(structure_version=1, layers=layers, edges=edges)
    assert "<svg" in pictures.host_graph("host", "before", graph, None)


def test_a_run_that_was_seen_to_start_only_has_no_story_to_tell() -> None:
    run = RunStory()
    run.take(new_event("run", run_started=run_pb2.RunStarted(graph=graph_pb2.HostGraph(structure_version=1))))
    run.take(new_event("run", epoch_completed=run_pb2.EpochCompleted()))
    assert len(run.graphs) == 1
    assert run.overhead() is None
    assert run.counts() == {"sent": 0, "applied": 0, "refused": 0}
