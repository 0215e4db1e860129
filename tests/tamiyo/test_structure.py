"""What is remembered of graphs changes no answer."""

import numpy as np
import pytest
import torch

from esperml.contract import InvalidFieldError
from esperml.tamiyo import fast, structure
from esperml.tamiyo.features import extract
from esperml.tamiyo.structure import REMEMBERED, Structure
from esperml.tamiyo.validate import check_state


@pytest.fixture(autouse=True)
def forget():
    def forget():
        structure._of_bytes.cache_clear()
        fast.heard.cache_clear()

    forget()
    return forget


def tensors(state):
    host = extract(state, ("low_rank", "mlp", "gate"))
    return [host.node, *host.edge_index, host.place_source, host.place_target, host.place, host.allowed, host.graph]


def test_features_are_the_same_with_and_without_memory(tools, forget):
    states = [tools.state(widths=widths) for widths in ((16, 32, 4, 32, 10), (8, 4, 8), (16, 32, 4, 32, 10))]
    states[2].step = 900
    states[2].layers.dead_fraction.values[1] = 0.9
    remembered = [tensors(state) for state in states]
    for state, found in zip(states, remembered, strict=True):
        forget()
        assert all(torch.equal(one, other) for one, other in zip(tensors(state), found, strict=True))


def test_bags_are_the_same_with_and_without_memory(tools):
    edges = extract(tools.state(), ("mlp",)).edge_index
    for given, expected in zip(fast.heard(edges, 4), fast.heard.__wrapped__(edges, 4), strict=True):
        assert torch.equal(given, expected)


def test_states_of_one_graph_share_its_structure_and_a_change_in_place_makes_another(tools):
    graph = tools.graph()
    first = Structure.of(graph)
    assert Structure.of(tools.graph()) is first
    graph.layers[1].parameters += 1
    second = Structure.of(graph)
    assert second is not first
    assert second.specs.parameters[1] == first.specs.parameters[1] + 1
    assert np.array_equal(second.topology.forward, first.topology.forward)


def test_a_graph_that_was_found_right_is_not_confused_with_one_that_is_wrong(tools):
    state = tools.state()
    check_state(state)
    state.graph.edges.sources[0] = 99
    for _ in range(2):
        with pytest.raises(InvalidFieldError, match=r"state\.graph\.edges\.sources\[0\]"):
            check_state(state)
    state.graph.edges.sources[0] = 0
    check_state(state)


def test_only_so_many_graphs_are_remembered(tools):
    for width in range(REMEMBERED + 10):
        Structure.of(tools.graph(widths=(4, 5 + width, 3)))
    assert structure._of_bytes.cache_info().currsize == REMEMBERED
