import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esperml.contract import MEASURES
from esperml.tamiyo import features, squash
from esperml.tamiyo.feature_names import GRAPH_MEANINGS, NODE_MEANINGS, PLACE_MEANINGS
from esperml.v1 import graph_pb2, health_pb2

VOCABULARY = ("mlp", "gate", "attention")


def column(tensors, name):
    return tensors.node[:, features.NODE_FEATURES.index(name)]


def test_every_feature_is_documented(request):
    text = (request.config.rootpath / "docs" / "features.md").read_text()
    for meanings in (NODE_MEANINGS, PLACE_MEANINGS, GRAPH_MEANINGS):
        for name, meaning in meanings.items():
            assert f"| `{name}` | {meaning} |" in text


def test_tensors_have_the_shapes_that_the_documentation_says(tools):
    tensors = features.extract(tools.state(), VOCABULARY)
    assert tensors.node.shape == (4, len(features.NODE_FEATURES))
    assert tensors.place.shape == (7, len(features.PLACE_FEATURES))
    assert tensors.graph.shape == (len(features.GRAPH_FEATURES),)
    assert tensors.allowed.shape == (7, 3)
    assert [edges.shape[1] for edges in tensors.edge_index] == [3, 3, 0, 3]


def test_a_host_of_which_nothing_is_known_gives_finite_tensors_with_every_flag_down():
    state = graph_pb2.ModelGraphState()
    state.graph.layers.add(name="only", type=graph_pb2.LAYER_TYPE_OTHER)
    tensors = features.extract(state, VOCABULARY)
    assert torch.isfinite(tensors.node).all()
    assert torch.isfinite(tensors.graph).all()
    measured = [name for name in MEASURES if f"{name}_known" in features.NODE_FEATURES]
    assert measured
    assert all(column(tensors, f"{name}_known")[0] == 0 for name in measured)
    assert tensors.place.shape[0] == 0


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([name for name, measure in MEASURES.items() if not measure.derived]),
    value=st.floats(0, 2.0**100),
    absent=st.sets(st.integers(0, 3)),
)
def test_whatever_is_measured_the_tensors_are_finite_and_bounded(name, value, absent):
    state = graph_pb2.ModelGraphState(step=10)
    for index in range(4):
        state.graph.layers.add(name=str(index), type=1, input_shape=[index + 1], output_shape=[index + 2])
    packed = getattr(state.layers, name)
    packed.values.extend([min(value, MEASURES[name].high)] * 4)
    packed.absent.extend(sorted(absent))
    tensors = features.extract(state, ())
    for tensor in (tensors.node, tensors.graph):
        assert torch.isfinite(tensor).all()
        assert (tensor.abs() <= squash.LIMIT).all()


def test_derived_columns_of_a_state_are_not_believed(tools):
    honest, lying = tools.state(), tools.state()
    lying.layers.health.values.extend([1.0, 1.0, 1.0, 1.0])
    assert torch.equal(features.extract(honest, ()).node, features.extract(lying, ()).node)


def test_an_absent_measure_differs_from_a_zero(tools):
    zero, absent = tools.state(), tools.state()
    zero.layers.dead_fraction.values[0] = 0
    absent.layers.dead_fraction.absent.append(0)
    zero, absent = features.extract(zero, ()), features.extract(absent, ())
    assert column(zero, "dead_fraction")[0] == column(absent, "dead_fraction")[0] == 0
    assert column(zero, "dead_fraction_known")[0] == 1
    assert column(absent, "dead_fraction_known")[0] == 0


def test_nothing_depends_on_how_fast_the_machine_is(tools):
    slow, fast = tools.state(), tools.state()
    for state, factor in ((slow, 1.0), (fast, 0.125)):
        state.layers.latency_mean.values.extend([factor * x for x in (1, 2, 3, 4)])
        state.layers.latency_variance.values.extend([factor**2 * x for x in (0.25, 0.25, 0.25, 0.25)])
        state.layers.throughput.values.extend([100 / factor] * 4)
        state.run.step_seconds = factor
    torch.testing.assert_close(features.extract(slow, ()).node, features.extract(fast, ()).node)
    torch.testing.assert_close(features.extract(slow, ()).graph, features.extract(fast, ()).graph)


def test_the_widening_of_a_bottleneck_is_seen_at_the_place_that_spans_it(tools):
    tensors = features.extract(tools.state(), VOCABULARY)
    widening = tensors.place[:, features.PLACE_FEATURES.index("widening")]
    assert widening.argmax() == 5
    assert (tensors.place_source[5], tensors.place_target[5]) == (1, 2)


def test_only_what_fits_the_place_and_is_in_the_vocabulary_is_allowed(tools):
    state = tools.state()
    allowed = features.allowed_blueprints(state, VOCABULARY)
    assert allowed[0].tolist() == [True, True, False]
    assert allowed[6].tolist() == [True, False, False]
    state.mask.may_adapt = True
    state.mask.blueprints.extend([0, 4, 0, 0, 0, 0, 0])
    assert features.allowed_blueprints(state, VOCABULARY).nonzero()[0].tolist() == [1]
    state.mask.Clear()
    state.mask.SetInParent()
    assert not features.allowed_blueprints(state, VOCABULARY).any()


def test_seeds_adaptations_and_limits_reach_the_features(tools):
    state = tools.state()
    state.seeds.add(seed_id="a", place=1, stage=health_pb2.SEED_STAGE_HOLDING, parameters=200)
    state.seeds.add(seed_id="b", place=2, stage=health_pb2.SEED_STAGE_FOSSILISED, parameters=100)
    state.adaptations.add(step=400, place=1, action="germinate", effect=0.2)
    state.adaptations.add(step=450, place=3, action="cull")
    state.limits.last_germination_step = 900
    tensors = features.extract(state, VOCABULARY)

    def place(name):
        return tensors.place[:, features.PLACE_FEATURES.index(name)]

    def whole(name):
        return tensors.graph[features.GRAPH_FEATURES.index(name)]

    assert place("occupied").tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert place("fossilised")[2] > 0
    assert place("last_effect")[1] > 0
    assert place("culled")[3] > 0
    assert place("steps_since_adaptation_known").tolist() == [0, 1, 0, 1, 0, 0, 0]
    assert column(tensors, "live_seeds")[1] > 0
    assert whole("budget_left") == pytest.approx(700 / sum(layer.parameters for layer in state.graph.layers))
    assert whole("steps_to_last_germination") > 0


def test_a_falling_loss_has_a_negative_slope(tools):
    state = tools.state()
    for step, loss in ((100, 2.0), (200, 1.4), (300, 1.0)):
        state.history.add(step=step).run.train_loss = loss
    slope = features.extract(state, ()).graph[features.GRAPH_FEATURES.index("train_loss_slope")]
    assert slope < 0


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(float("nan"))), max_size=12))
def test_ranks_run_from_zero_to_one_and_keep_gaps(values):
    ranks = squash.rank(np.array([values], dtype=np.float64))[0]
    known = ~np.isnan(values) if values else np.array([], dtype=bool)
    assert (~np.isnan(ranks) == known).all()
    assert ((ranks[known] >= 0) & (ranks[known] <= 1)).all()
    if known.sum() > 1:
        assert ranks[known].mean() == pytest.approx(0.5)


def test_hosts_side_by_side_keep_to_themselves(tools):
    small, large = (
        features.extract(tools.state(), VOCABULARY),
        features.extract(tools.state(widths=(8, 4, 8, 8, 4, 2)), VOCABULARY),
    )
    batch = features.collate([small, large])
    assert batch.size == 2
    assert batch.node_graph.tolist() == [0] * 4 + [1] * 5
    assert batch.place_source[7:].tolist() == (large.place_source + 4).tolist()
    for kind, edges in enumerate(batch.edge_index):
        assert edges.shape[1] == small.edge_index[kind].shape[1] + large.edge_index[kind].shape[1]
    assert batch.to("cpu").allowed.equal(batch.allowed)


def test_what_else_the_host_can_grow_changes_nothing_that_the_policy_sees(tools):
    state = tools.state()
    before = features.extract(state, VOCABULARY)
    added = [f"new-{index}" for index in range(6)]
    known = len(state.graph.blueprints)
    state.graph.blueprints.extend(added)
    for place, bits in enumerate(state.graph.places.blueprints):
        state.graph.places.blueprints[place] = bits | 0b101101 << known
    after = features.extract(state, VOCABULARY)
    for name in ("node", "place", "graph", "allowed"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
