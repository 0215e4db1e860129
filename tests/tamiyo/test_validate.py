import contextlib
import math

import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from esperml.contract import MEASURES, InvalidFieldError
from esperml.tamiyo.validate import MAX_LAYERS, check_report, check_state
from esperml.v1 import graph_pb2, health_pb2


def test_a_good_state_passes(tools):
    check_state(tools.state())


def set_field(path, value):
    def change(state):
        *way, last = path.split(".")
        target = state
        for name in way:
            target = target[int(name)] if name.isdigit() else getattr(target, name)
        if last.isdigit():
            target[int(last)] = value
        elif isinstance(value, list):
            del getattr(target, last)[:]
            getattr(target, last).extend(value)
        else:
            setattr(target, last, value)

    return change


def add_layers(count):
    def change(state):
        for index in range(count):
            state.graph.layers.add(name=f"more{index}", type=1)

    return change


CASES = [
    (lambda s: s.ClearField("graph"), "state.graph"),
    (set_field("graph.layers", []), "state.graph.layers"),
    (add_layers(MAX_LAYERS), "state.graph.layers"),
    (set_field("graph.layers.1.name", ""), "state.graph.layers[1].name"),
    (set_field("graph.layers.1.name", "x" * 1000), "state.graph.layers[1].name"),
    (set_field("graph.layers.1.name", "layer0"), "state.graph.layers[1].name"),
    (set_field("graph.layers.2.type", 0), "state.graph.layers[2].type"),
    (set_field("graph.layers.2.type", 77), "state.graph.layers[2].type"),
    (set_field("graph.layers.0.input_shape", [0]), "state.graph.layers[0].input_shape"),
    (set_field("graph.layers.0.output_shape", [3, 0]), "state.graph.layers[0].output_shape"),
    (set_field("graph.edges.targets", [1]), "state.graph.edges.targets"),
    (set_field("graph.edges.kinds", [1]), "state.graph.edges.kinds"),
    (set_field("graph.edges.kinds", [1, 0, 1]), "state.graph.edges.kinds[1]"),
    (set_field("graph.edges.sources", [0, 1, 9]), "state.graph.edges.sources[2]"),
    (set_field("graph.edges.targets.0", 4), "state.graph.edges.targets[0]"),
    (set_field("graph.blueprints", [f"b{i}" for i in range(65)]), "state.graph.blueprints"),
    (set_field("graph.blueprints", ["a", "a", "b"]), "state.graph.blueprints[1]"),
    (set_field("graph.blueprints", ["", "a", "b"]), "state.graph.blueprints[0]"),
    (set_field("graph.places.targets", [0]), "state.graph.places.targets"),
    (set_field("graph.places.blueprints", [1]), "state.graph.places.blueprints"),
    (set_field("graph.places.blueprints.3", 8), "state.graph.places.blueprints[3]"),
    (set_field("graph.places.sources.3", 4), "state.graph.places.sources[3]"),
    (set_field("layers.dead_fraction.values", [0.1]), "state.layers.dead_fraction.values"),
    (set_field("layers.dead_fraction.values.1", math.nan), "state.layers.dead_fraction.values[1]"),
    (set_field("layers.gradient_norm.values.2", math.inf), "state.layers.gradient_norm.values[2]"),
    (set_field("layers.gradient_norm.values.2", -1.0), "state.layers.gradient_norm.values[2]"),
    (set_field("layers.effective_rank.values.0", 1.5), "state.layers.effective_rank.values[0]"),
    (set_field("layers.dead_fraction.absent", [4]), "state.layers.dead_fraction.absent[0]"),
    (set_field("layers.flops.absent", [0]), "state.layers.flops.absent"),
    (set_field("layers.activation_mean.values", [0, 0, 0, -math.inf]), "state.layers.activation_mean.values[3]"),
    (set_field("places.explained_error.values.0", 2.0), "state.places.explained_error.values[0]"),
    (set_field("run.train_loss", math.nan), "state.run.train_loss"),
    (set_field("run.learning_rate", -1.0), "state.run.learning_rate"),
    (set_field("step", 2**60), "state.step"),
    (lambda s: s.history.add(step=600), "state.history[0].step"),
    (lambda s: s.history.add(step=1).health.values.append(0.5), "state.history[0].health.values"),
    (lambda s: s.history.add(step=1).run.__setattr__("train_loss", math.inf), "state.history[0].run.train_loss"),
    (lambda s: [s.history.add(step=1) for _ in range(17)], "state.history"),
    (lambda s: s.seeds.add(seed_id="s", place=99, stage=2), "state.seeds[0].place"),
    (lambda s: s.seeds.add(seed_id="", stage=2), "state.seeds[0].seed_id"),
    (lambda s: s.seeds.add(seed_id="s", stage=0), "state.seeds[0].stage"),
    (lambda s: s.seeds.add(seed_id="s", stage=2, alpha=1.5), "state.seeds[0].alpha"),
    (lambda s: s.seeds.add(seed_id="s", stage=2, gradient_norm=-1), "state.seeds[0].gradient_norm"),
    (
        lambda s: s.seeds.add(seed_id="s", stage=2, ablation_contribution=math.nan),
        "state.seeds[0].ablation_contribution",
    ),
    (lambda s: [s.seeds.add(seed_id="s", stage=2) for _ in range(2)], "state.seeds[1].seed_id"),
    (lambda s: s.adaptations.add(place=50), "state.adaptations[0].place"),
    (lambda s: s.adaptations.add(effect=math.nan), "state.adaptations[0].effect"),
    (lambda s: [s.adaptations.add() for _ in range(65)], "state.adaptations"),
    (set_field("mask.blueprints", [1]), "state.mask.blueprints"),
    (lambda s: s.mask.CopyFrom(graph_pb2.ActionMask(may_adapt=True, blueprints=[1])), "state.mask.blueprints"),
    (
        lambda s: s.mask.CopyFrom(graph_pb2.ActionMask(may_adapt=True, blueprints=[0] * 6 + [4])),
        "state.mask.blueprints[6]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), CASES, ids=[field for _, field in CASES])
def test_a_bad_field_is_refused_by_its_path(tools, change, field):
    state = tools.state()
    change(state)
    with pytest.raises(InvalidFieldError) as caught:
        check_state(state)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_field("layers.dead_fraction.values", [0.1]), "has 1 entries, but graph.layers has 4"),
        (set_field("places.explained_error.values", [0.1]), "has 1 entries, but graph.places.sources has 7"),
        (set_field("graph.edges.targets.0", 4), "is 4, but graph.layers has 4 entries, counted from 0"),
        (lambda s: s.adaptations.add(place=50), "is 50, but graph.places.sources has 7 entries, counted from 0"),
    ],
)
def test_what_has_the_wrong_length_is_said_beside_what_it_should_match(tools, change, problem):
    state = tools.state()
    change(state)
    with pytest.raises(InvalidFieldError) as caught:
        check_state(state)
    assert caught.value.problem == problem


def test_what_is_marked_absent_is_not_looked_at(tools):
    state = tools.state()
    state.layers.dead_fraction.values[1] = math.nan
    state.layers.dead_fraction.absent.append(1)
    check_state(state)


@given(st.binary(max_size=400))
def test_whatever_parses_is_taken_or_refused_with_a_field(data):
    state = graph_pb2.ModelGraphState()
    try:
        state.MergeFromString(data)
    except DecodeError:
        return
    with contextlib.suppress(InvalidFieldError):
        check_state(state)


def test_a_good_report_passes(tools):
    graph = tools.graph()
    report = tools.report(graph, 100, train_loss=0.5)
    report.places.add(place=1, growth_gradient=0.5)
    report.seeds.add(seed_id="s", place=1, stage=health_pb2.SEED_STAGE_BLENDING)
    check_report(report, graph)


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if not measure.derived])
def test_a_report_with_a_measure_that_is_not_a_number_is_refused_by_name(tools, name):
    graph = tools.graph()
    report = tools.report(graph, 100)
    setattr(report.layers[2], name, math.nan)
    with pytest.raises(InvalidFieldError, match=rf"health_report\.layers\[2\]\.{name}: is nan"):
        check_report(report, graph)


def test_a_report_on_what_the_host_does_not_have_is_refused(tools):
    graph = tools.graph()
    report = tools.report(graph, 100)
    report.layers.add(layer="ghost")
    with pytest.raises(InvalidFieldError, match="ghost"):
        check_report(report, graph)
    report = tools.report(graph, 100)
    report.places.add(place=99)
    with pytest.raises(InvalidFieldError, match=r"places\[0\]\.place"):
        check_report(report, graph)


def test_a_report_on_an_earlier_structure_may_name_layers_that_are_gone(tools):
    graph = tools.graph(version=2)
    report = tools.report(tools.graph(version=1), 100)
    report.layers.add(layer="ghost")
    report.places.add(place=99)
    check_report(report, graph)


def test_the_example_is_a_good_state(parsed_example):
    check_state(parsed_example.state)
    assert json_format.MessageToJson(parsed_example)
