"""The graph that is read from a forward pass is the graph that the host has."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.v1 import graph_pb2

FORWARD, RESIDUAL, RECURRENT = (
    graph_pb2.EDGE_KIND_FORWARD,
    graph_pb2.EDGE_KIND_RESIDUAL,
    graph_pb2.EDGE_KIND_RECURRENT,
)
KINDS = {FORWARD: "forward", RESIDUAL: "residual", RECURRENT: "recurrent"}


def edges(model: nn.Module) -> set[tuple[str, str, str]]:
    host = kasmina.host_of(model)
    return {(host.layers[e.source].name, host.layers[e.target].name, KINDS[e.kind]) for e in host.edges}


def places(model: nn.Module) -> set[tuple[str, str]]:
    host = kasmina.host_of(model)
    return {(host.layers[place.source].name, host.layers[place.target].name) for place in host.places}


def chain(*names: str) -> set[tuple[str, str, str]]:
    return {(a, b, "forward") for a, b in itertools.pairwise(names)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", chain("0", "2", "4", "6")),
        ("conv", chain("features.0", "features.3", "head")),
        ("residual", chain("stem", "inner", "outer", "head") | {("stem", "head", "residual")}),
        ("branching", chain("stem", "left", "head") | chain("stem", "right", "head")),
        ("two_inputs", chain("one", "head") | chain("other", "head")),
        ("shared", chain("stem", "shared", "head") | {("shared", "shared", "recurrent")}),
        ("signal", chain("first", "second", "head")),
        ("tokens", chain("embed", "up", "down", "head") | {("embed", "head", "residual")}),
        ("volume", chain("0", "3")),
    ],
)
def test_edges_are_the_true_dataflow(case, name, expected):
    assert edges(case(name).model) == expected


def test_a_layer_that_runs_twice_has_no_places(case):
    assert places(case("shared").model) == {("stem", "stem"), ("head", "head")}


def test_spans_of_two_follow_forward_edges_only(case):
    assert ("stem", "head") not in places(case("residual").model)
    assert ("stem", "inner") in places(case("residual").model)


def test_what_follows_a_layer_is_told(case):
    layers = {layer.name: layer for layer in kasmina.host_of(case("branching").model).layers}
    assert {name: layer.activated for name, layer in layers.items()} == {
        "stem": True,
        "left": True,
        "right": True,
        "head": False,
    }
    assert {name for name, layer in layers.items() if layer.rectified} == {"left"}


def test_normalisation_between_a_layer_and_its_rectifier_is_seen(case):
    first, second, _ = kasmina.host_of(case("conv").model).layers
    assert first.activated
    assert not first.rectified
    assert second.activated


def test_an_in_place_rectifier_is_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    kasmina.wrap(model, torch.randn(3, 4))
    assert kasmina.host_of(model).layers[0].rectified


def test_a_layer_whose_output_leads_nowhere_has_no_known_activation():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.loose = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.loose(x)
            return self.used(x)

    model = Loose()
    kasmina.wrap(model, torch.randn(2, 3))
    loose = next(layer for layer in kasmina.host_of(model).graph().layers if layer.name == "loose")
    assert not loose.HasField("activated")


def test_frozen_layers_are_part_of_the_graph(case):
    plain = case("mlp", wrapped=False)
    plain.model.requires_grad_(False)
    kasmina.wrap(plain.model, plain.inputs)
    assert edges(plain.model) == chain("0", "2", "4", "6")


def test_nested_and_named_outputs_are_followed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return {"a": [torch.relu(self.one(x))], "b": (self.other(x), 7)}

    model = Named()
    kasmina.wrap(model, torch.randn(2, 3))
    assert {layer.name: layer.activated for layer in kasmina.host_of(model).layers} == {"one": True, "other": False}


def test_unbatched_and_reshaped_inputs_have_no_places():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.unbatched, self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.before(x)
            return self.after(torch.relu(y).reshape(-1, 4)) + self.unbatched(x[0, 0])

    model = Reshaping()
    kasmina.wrap(model, torch.randn(2, 3, 4))
    assert places(model) == {("before", "before"), ("after", "after")}


def test_the_transformer_of_torch_is_read_in_training_and_still_runs_fused():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 8)
    kasmina.wrap(model, x)
    assert edges(model) == chain("linear1", "linear2")
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
