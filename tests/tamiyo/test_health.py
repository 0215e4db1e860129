import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.tamiyo import health
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2

unit = st.floats(0, 1)
maybe = st.one_of(unit, st.just(float("nan")))


def array(*values):
    return np.array(values, dtype=np.float64)


@given(st.lists(st.tuples(maybe, maybe, maybe), min_size=1, max_size=8))
def test_health_is_in_range_and_absent_only_where_all_its_parts_are(rows):
    parts = [array(*column) for column in zip(*rows, strict=True)]
    result = health.health(*parts)
    known = ~np.isnan(np.stack(parts)).all(axis=0)
    assert (~np.isnan(result) == known).all()
    assert ((result[known] >= 0) & (result[known] <= 1)).all()


@given(unit, unit, maybe, unit)
def test_health_never_falls_when_a_part_rises(low, high, other, third):
    low, high = sorted((low, high))
    worse = health.health(array(low), array(other), array(third))
    better = health.health(array(high), array(other), array(third))
    assert better[0] >= worse[0] - 1e-12


@given(unit, maybe)
def test_a_part_that_is_zero_makes_the_layer_sick(part, other):
    assert health.health(array(0.0), array(part), array(other))[0] == 0


@given(maybe, maybe)
def test_gradient_flow_is_absent_only_where_both_measures_are(vanishing, exploding):
    flow = health.gradient_flow(array(vanishing), array(exploding))[0]
    if np.isnan(vanishing) and np.isnan(exploding):
        assert np.isnan(flow)
    else:
        assert flow == pytest.approx(max(0.0, 1 - np.nansum([vanishing, exploding])))


@given(unit, unit)
def test_activity_and_expressivity_fall_as_their_measures_rise(low, high):
    low, high = sorted((low, high))
    for formula in (health.activity, health.expressivity):
        assert formula(array(high))[0] <= formula(array(low))[0]
        assert np.isnan(formula(array(np.nan))[0])


@given(st.lists(maybe, min_size=1, max_size=17))
def test_trend_and_stability_need_three_reports_and_stay_in_range(history):
    column = array(*history)[:, None]
    known = np.count_nonzero(~np.isnan(column))
    trend, steady = health.trend(column)[0], health.stability(column)[0]
    if known < health.LEAST_REPORTS:
        assert np.isnan(trend)
        assert np.isnan(steady)
    else:
        assert -1 <= trend <= 1
        assert 0 <= steady <= 1


def test_trend_is_the_slope_of_a_straight_line_gaps_included():
    assert health.trend(array(0.1, np.nan, 0.3, 0.4)[:, None])[0] == pytest.approx(0.1)


def test_constant_health_is_perfectly_stable_and_swings_are_not_stable_at_all():
    assert health.stability(array(0.4, 0.4, 0.4)[:, None])[0] == pytest.approx(1)
    assert health.stability(array(0, 1, 0, 1)[:, None])[0] == 0


@given(unit, unit, maybe, st.floats(0, 1e6))
def test_readiness_rises_with_need_and_rest(low, high, steady, since):
    low, high = sorted((low, high))
    sick = health.readiness(array(low), array(steady), array(since))[0]
    well = health.readiness(array(high), array(steady), array(since))[0]
    never = health.readiness(array(low), array(steady), array(np.nan))[0]
    assert 0 <= well <= sick <= never <= 1


def test_readiness_is_absent_where_health_is():
    assert np.isnan(health.readiness(array(np.nan), array(1.0), array(5.0))[0])


def test_throughput_trend_is_relative():
    history = array(100, 110, 120)[:, None]
    assert health.throughput_trend(history)[0] == pytest.approx(10 / 110)
    assert health.throughput_trend(1000 * history)[0] == pytest.approx(10 / 110)
    assert np.isnan(health.throughput_trend(history[:2])[0])
    assert health.throughput_trend(np.zeros((3, 1)))[0] == 0


def topology(size, pairs, kind=graph_pb2.EDGE_KIND_FORWARD):
    graph = graph_pb2.HostGraph()
    for index in range(size):
        graph.layers.add(name=str(index))
    for source, target in pairs:
        graph.edges.sources.append(source)
        graph.edges.targets.append(target)
        graph.edges.kinds.append(kind)
    return Topology.of(graph)


def test_depth_is_the_longest_way_so_that_a_shortcut_does_not_make_a_layer_shallow():
    assert topology(4, [(0, 1), (1, 2), (2, 3), (0, 3)]).depth.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_layers_on_a_cycle_share_their_depth():
    depth = topology(4, [(0, 1), (1, 2), (2, 1), (2, 3)]).depth
    assert depth.tolist() == pytest.approx([0, 0.5, 0.5, 1])


def test_a_graph_without_depth_has_no_positions():
    assert np.isnan(topology(1, []).depth).all()
    assert np.isnan(topology(3, [(1, 1)]).depth).all()


def test_neighbours_health_is_the_mean_of_those_that_are_known():
    graph = topology(4, [(0, 2), (1, 2), (2, 3), (2, 3)])
    values = array(0.2, np.nan, 0.5, 0.9)
    assert graph.mean_over_sources(values)[2:].tolist() == pytest.approx([0.2, 0.5])
    assert np.isnan(graph.mean_over_sources(values)[:2]).all()
    assert graph.mean_over_targets(values)[2] == pytest.approx(0.9)
    assert np.isnan(graph.mean_over_targets(values)[3])


def test_the_documentation_names_every_derived_measure(request):
    from esperml.contract import MEASURES

    text = (request.config.rootpath / "docs" / "health.md").read_text()
    derived = {name for name, measure in MEASURES.items() if measure.derived}
    for name in derived - {"adaptation_count", "steps_since_adaptation"}:
        assert f"`{name}`" in text
