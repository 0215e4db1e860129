import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esperml.tamiyo import policy
from esperml.tamiyo.explain import attribute
from esperml.tamiyo.fast import FastPolicy
from esperml.tamiyo.features import collate, extract
from esperml.tamiyo.policies import ChancePolicy, GcnPolicy
from esperml.tamiyo.policy import PolicyConfig, PolicyNetwork
from esperml.tamiyo.view import StateView
from esperml.v1 import graph_pb2

VOCABULARY = ("low_rank", "mlp", "gate")


def random_state(seed, layers, edges, places):
    generator = torch.Generator().manual_seed(seed)

    def draw(high, count):
        return torch.randint(0, high, (count,), generator=generator).tolist()

    state = graph_pb2.ModelGraphState(step=100)
    state.graph.blueprints.extend(VOCABULARY)
    for index in range(layers):
        state.graph.layers.add(name=str(index), type=1 + index % 9, input_shape=[1 + index], output_shape=[3])
    state.graph.edges.sources.extend(draw(layers, edges))
    state.graph.edges.targets.extend(draw(layers, edges))
    state.graph.edges.kinds.extend([1 + kind for kind in draw(3, edges)])
    state.graph.places.sources.extend(draw(layers, places))
    state.graph.places.targets.extend(draw(layers, places))
    state.graph.places.blueprints.extend(draw(8, places))
    state.layers.dead_fraction.values.extend(torch.rand(layers, generator=generator).tolist())
    return state


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), layers=st.integers(1, 30), edges=st.integers(0, 60), places=st.integers(0, 30))
def test_the_fast_path_says_what_the_network_says(seed, layers, edges, places):
    torch.manual_seed(seed)
    network = PolicyNetwork(PolicyConfig(VOCABULARY, hidden=16)).eval()
    host = extract(random_state(seed, layers, edges, places), VOCABULARY)
    batch = collate([host])
    with torch.no_grad():
        output = network(batch)
        adapt, _ = policy.adapt_log_probabilities(output, batch)
        expected = {
            "adapt": adapt.exp()[0],
            "places": policy.place_log_probabilities(output, batch).exp(),
            "blueprints": policy.blueprint_log_probabilities(output, batch).exp(),
            "value": output.value[0],
        }
    found = FastPolicy(network)(host)
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(values.numpy(), abs=1e-6, rel=1e-5)


def test_a_host_is_judged_alike_alone_and_beside_others():
    network = PolicyNetwork(PolicyConfig(VOCABULARY, hidden=16)).eval()
    graphs = [extract(random_state(seed, 4 + seed, 6, 3 * seed), VOCABULARY) for seed in range(4)]
    with torch.no_grad():
        together = network(collate(graphs))
        alone = [network(collate([graph])) for graph in graphs]
    torch.testing.assert_close(together.adapt_logit, torch.cat([output.adapt_logit for output in alone]))
    torch.testing.assert_close(together.value, torch.cat([output.value for output in alone]))
    torch.testing.assert_close(together.place_logits, torch.cat([output.place_logits for output in alone]))


def test_log_probabilities_are_normalised_over_what_is_allowed_and_have_finite_gradients():
    network = PolicyNetwork(PolicyConfig(VOCABULARY, hidden=16))
    batch = collate([extract(random_state(seed, 6, 8, 12), VOCABULARY) for seed in range(3)])
    output = network(batch)
    places = policy.place_log_probabilities(output, batch)
    blueprints = policy.blueprint_log_probabilities(output, batch)
    adapt, nothing = policy.adapt_log_probabilities(output, batch)
    usable = batch.allowed.any(dim=1)
    for host in range(3):
        assert places[batch.place_graph == host].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.isneginf(places[~usable]).all()
    torch.testing.assert_close(blueprints.exp().sum(dim=1), usable.float())
    torch.testing.assert_close(adapt.exp() + nothing.exp(), torch.ones(3))
    (places[usable].sum() + blueprints[batch.allowed].sum() + adapt.sum() + nothing.sum()).backward()
    assert all(weights.grad is None or torch.isfinite(weights.grad).all() for weights in network.parameters())


def test_where_nothing_is_allowed_doing_nothing_is_certain():
    network = PolicyNetwork(PolicyConfig(VOCABULARY, hidden=16))
    batch = collate([extract(random_state(1, 3, 2, 0), VOCABULARY)])
    adapt, nothing = policy.adapt_log_probabilities(network(batch), batch)
    assert adapt.item() == -math.inf
    assert nothing.item() == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"vocabulary": ()}, "vocabulary"), ({"vocabulary": ("a", "a")}, "vocabulary"), ({"hidden": 0}, "hidden"),
     ({"layers": 0}, "layers")],
)  # fmt: skip
def test_sizes_that_make_no_network_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        PolicyConfig(**{"vocabulary": VOCABULARY, **changes})


def test_the_sizes_that_ship_are_those_that_were_tried():
    config = PolicyConfig(VOCABULARY)
    assert 64 <= config.hidden <= 128
    assert config.layers == 3


def test_scores_are_a_distribution_over_what_the_mask_allows(tools, network):
    state = tools.state()
    for judge in (GcnPolicy("gcn", network, "v"), ChancePolicy("chance", 0.5)):
        scores = judge.judge(StateView(state), VOCABULARY)
        assert scores.places.sum() == pytest.approx(1)
        assert scores.blueprints.sum(axis=1) == pytest.approx([1] * 7)
        assert scores.blueprints[6, 2] == 0


def test_chance_takes_every_allowed_pair_alike(tools):
    scores = ChancePolicy("chance", 0.5).judge(StateView(tools.state()), VOCABULARY)
    joint = scores.places[:, None] * scores.blueprints
    assert joint[joint > 0] == pytest.approx([1 / 18] * 18)


def test_a_probability_must_be_one():
    with pytest.raises(ValueError, match="probability"):
        ChancePolicy("chance", 1.5)


def test_attributions_need_a_policy_that_reads_features():
    assert attribute(ChancePolicy("chance", 0.5), None, 5) == []
