"""What is computed for many rows at once is held to the same thing done row by row, one value after the other."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esperml.contract import MEASURES, InvalidFieldError
from esperml.tamiyo import squash
from esperml.tamiyo.columns import LAYER_MEASURES, PLACE_MEASURES
from esperml.tamiyo.features import NODE_FEATURES, PLACE_FEATURES
from esperml.tamiyo.node_features import node_features
from esperml.tamiyo.place_features import place_features
from esperml.tamiyo.sheet import Sheet
from esperml.tamiyo.structure import LayerSpecs
from esperml.tamiyo.topology import Topology
from esperml.tamiyo.validate import check_state
from esperml.tamiyo.view import StateView
from esperml.v1 import graph_pb2

NAN = math.nan
tables = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(0, 8)),
    elements=st.one_of(st.just(NAN), st.integers(-2, 2).map(float), st.floats(-1e30, 1e30)),
)


def plain_rank(row):
    known = [value for value in row if not math.isnan(value)]
    if len(known) == 1:
        return [NAN if math.isnan(value) else 0.5 for value in row]
    return [
        NAN
        if math.isnan(value)
        else (sum(other < value for other in known) + (known.count(value) - 1) / 2) / (len(known) - 1)
        for value in row
    ]


def plain_log_scale(value, smallest, large):
    return math.copysign(1, value) * math.log1p(abs(value) / smallest) / math.log1p(large / smallest)


def plain_ratio(numerator, denominator):
    if math.isnan(numerator) or math.isnan(denominator) or denominator == 0 or numerator / denominator <= 0:
        return NAN
    return math.log(numerator / denominator) / 4 if math.isfinite(numerator / denominator) else NAN


def cut(value):
    return 0.0 if math.isnan(value) else min(max(value, -squash.LIMIT), squash.LIMIT)


@given(tables)
def test_ranks_of_many_rows_are_those_of_each_row_counted_out(values):
    assert squash.rank(values) == pytest.approx(np.array([plain_rank(row) for row in values]), nan_ok=True)


@given(tables)
def test_a_sheet_squashes_each_feature_as_it_would_be_alone_and_flags_what_is_known(values):
    size, row, other = values.shape[1], values[0], values[-1]
    sheet = Sheet(["ranked", "log_known", "log", "raw", "slope", "ratio", "ratio_known"], {"log": (0.5, 3.0)})
    table = sheet.table(
        size, raw={"raw": row}, ratios={"ratio": (row, other)}, scaled={"log": row}, slopes={"slope": row},
        ranked={"ranked": row},
    )  # fmt: skip
    ratios = [plain_ratio(*pair) for pair in zip(row.tolist(), other.tolist(), strict=True)]
    expected = {
        "ranked": plain_rank(row),
        "log_known": [0.0 if math.isnan(value) else 1.0 for value in row],
        "log": [plain_log_scale(value, 0.5, 3.0) for value in row],
        "raw": row,
        "slope": [math.tanh(10 * value) for value in row],
        "ratio": ratios,
        "ratio_known": [0.0 if math.isnan(value) else 1.0 for value in ratios],
    }
    assert table.dtype == np.float32
    for column, found in zip(expected.values(), table.T, strict=True):
        assert found == pytest.approx(np.array([cut(value) for value in column]), rel=1e-6, abs=1e-6)


@st.composite
def states(draw):
    """A valid state with any measures present, absent in part or altogether."""
    layers, places = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    state = graph_pb2.ModelGraphState(step=1000)
    index = st.integers(0, layers - 1)
    for number in range(layers):
        shapes = draw(st.tuples(*[st.lists(st.integers(1, 9), max_size=3)] * 2))
        state.graph.layers.add(
            name=str(number), type=draw(st.integers(1, 5)), input_shape=shapes[0], output_shape=shapes[1]
        )
    for table, count in ((state.graph.edges, draw(st.integers(0, 8))), (state.graph.places, places)):
        table.sources.extend(draw(st.lists(index, min_size=count, max_size=count)))
        table.targets.extend(draw(st.lists(index, min_size=count, max_size=count)))
    state.graph.edges.kinds.extend(draw(st.sampled_from([1, 2, 3])) for _ in state.graph.edges.sources)
    state.graph.places.blueprints.extend([0] * places)
    for message, names, size in ((state.layers, LAYER_MEASURES, layers), (state.places, PLACE_MEASURES, places)):
        for name in draw(st.sets(st.sampled_from(names))):
            column = getattr(message, name)
            column.values.extend(draw(st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size)))
            column.absent.extend(draw(st.sets(st.integers(0, size - 1))) if size else ())
    return state


def plain_column(column, size):
    return [NAN if not column.values or at in column.absent else column.values[at] for at in range(size)]


@settings(max_examples=60, deadline=None)
@given(states())
def test_a_checked_state_is_unpacked_as_it_was_sent(state):
    view = check_state(state)
    layers, places = len(state.graph.layers), len(state.graph.places.sources)
    for name, row, known in zip(LAYER_MEASURES, view.layer_table.values, view.layer_table.known, strict=True):
        expected = np.array(plain_column(getattr(state.layers, name), layers))
        assert row == pytest.approx(expected, nan_ok=True)
        assert known.tolist() == (~np.isnan(expected)).tolist()
    nodes, at_places = node_features(view), place_features(view, ())
    for name in ("effective_rank", "dead_fraction"):
        values = plain_column(getattr(state.layers, name), layers)
        assert nodes[:, NODE_FEATURES.index(name)] == pytest.approx([cut(value) for value in values])
        assert nodes[:, NODE_FEATURES.index(f"{name}_rank")] == pytest.approx(
            [cut(value) for value in plain_rank(values)]
        )
    values = plain_column(state.places.growth_gradient, places)
    assert at_places[:, PLACE_FEATURES.index("growth_gradient")] == pytest.approx(
        [cut(plain_log_scale(value, 1e-8, 1.0)) for value in values]
    )
    assert at_places[:, PLACE_FEATURES.index("growth_gradient_known")].tolist() == [
        0.0 if math.isnan(value) else 1.0 for value in values
    ]


@settings(max_examples=60, deadline=None)
@given(states())
def test_a_topology_has_each_edge_of_each_kind_once_and_no_loops(state):
    topology, edges, places = Topology.of(state.graph), state.graph.edges, state.graph.places
    every = list(zip(edges.sources, edges.targets, edges.kinds, strict=True))

    def distinct(kinds):
        return sorted({(source, target) for source, target, kind in every if kind in kinds and source != target})

    kinds = {"forward": {1}, "residual": {2}, "recurrent": {3}, "dataflow": {1, 2}}
    found = {name: getattr(topology, name) for name in (*kinds, "span")}
    expected = {name: distinct(wanted) for name, wanted in kinds.items()}
    pairs = zip(places.sources, places.targets, strict=True)
    expected["span"] = sorted({(source, target) for source, target in pairs if source != target})
    assert {name: [tuple(pair) for pair in ends.T.tolist()] for name, ends in found.items()} == expected


@settings(max_examples=60, deadline=None)
@given(states(), st.sampled_from(LAYER_MEASURES), st.sampled_from([NAN, math.inf, -math.inf, -1e9, 1e9]))
def test_a_value_is_refused_where_its_measure_refuses_it(state, name, value):
    column, at = getattr(state.layers, name), len(state.graph.layers) - 1
    column.values[:], column.absent[:] = [0.0] * at + [value], []
    field = f"state.layers.{name}.values[{at}]"

    def refusal(check, *arguments):
        try:
            check(*arguments)
        except InvalidFieldError as error:
            return str(error)
        return None

    assert refusal(check_state, state) == refusal(MEASURES[name].check, value, field)


def test_a_shape_beyond_all_floats_is_read_as_infinite_and_a_zero_in_it_is_still_found():
    state = graph_pb2.ModelGraphState()
    layer = state.graph.layers.add(name="vast", type=1, input_shape=[2**31] * 40, output_shape=[1])
    assert math.isinf(LayerSpecs.of(state.graph).in_elements[0])
    assert np.isfinite(node_features(StateView(state))).all()
    layer.input_shape.append(0)
    with pytest.raises(InvalidFieldError, match=r"input_shape: has a dimension of 0"):
        check_state(state)
