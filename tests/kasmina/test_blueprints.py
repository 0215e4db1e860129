"""What seeds grow into: never over budget, silent at birth, and trainable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esperml.kasmina import Blueprint, Geometry, RefusedError, register, registered, unregister
from esperml.kasmina.bodies import match_spatial
from esperml.v1 import graph_pb2

LINEAR = graph_pb2.LAYER_TYPE_LINEAR
CONV = {1: graph_pb2.LAYER_TYPE_CONV1D, 2: graph_pb2.LAYER_TYPE_CONV2D, 3: graph_pb2.LAYER_TYPE_CONV3D}
NAMES = ("low_rank", "mlp", "conv", "gate")
BY_NAME = {blueprint.name: blueprint for blueprint in registered()}

sizes = st.integers(1, 9)


@st.composite
def geometries(draw) -> Geometry:
    """Any place that a host could have, those where nothing fits included."""
    source, target = draw(st.sampled_from(["linear", "conv"])), draw(st.sampled_from(["linear", "conv"]))
    rank = draw(st.integers(1, 3))
    leading = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    read = (*leading, draw(st.integers(1, 40))) if source == "linear" else (draw(sizes), *draw(spatial(rank)))
    written = (*leading, draw(sizes)) if target == "linear" else (draw(sizes), *draw(spatial(rank)))
    return Geometry(
        LINEAR if source == "linear" else CONV[rank], LINEAR if target == "linear" else CONV[rank], read, written
    )


def spatial(rank: int):
    return st.tuples(*[st.integers(1, 9)] * rank)


@settings(deadline=None, max_examples=150)
@given(geometry=geometries(), name=st.sampled_from(NAMES), budget=st.integers(1, 3000))
def test_a_seed_is_as_large_as_fits_its_budget_and_never_larger(geometry, name, budget):
    blueprint = BY_NAME[name]
    if not blueprint.fits(geometry):
        with pytest.raises(RefusedError, match="does not fit"):
            blueprint.build(geometry, budget)
        return
    if blueprint.smallest(geometry) > budget:
        with pytest.raises(RefusedError, match=f"over budget: the smallest '{name}' here has"):
            blueprint.build(geometry, budget)
        return
    body = blueprint.build(geometry, budget)
    count = sum(parameter.numel() for parameter in body.parameters())
    assert count <= budget
    sizes_that_cost_as_much = [s for s in range(1, 3001) if blueprint.cost(geometry, s) == count]
    assert sizes_that_cost_as_much, "the cost that the blueprint states is not what it has"
    size = sizes_that_cost_as_much[0]
    assert size == blueprint.largest(geometry) or blueprint.cost(geometry, size + 1) > budget


@settings(deadline=None, max_examples=100)
@given(geometry=geometries(), name=st.sampled_from(NAMES))
def test_a_seed_is_silent_at_birth_and_trains(geometry, name):
    blueprint = BY_NAME[name]
    if not blueprint.fits(geometry):
        return
    body = blueprint.build(geometry, blueprint.smallest(geometry) * 8)
    x, output = torch.rand(4, *geometry.input_shape) + 0.1, torch.rand(4, *geometry.output_shape) + 0.1
    for parameter in body.parameters():  # positive weights, so that no rectifier happens to be silent
        parameter.data.abs_()
    added = body(x, output)
    assert added.shape == output.shape
    assert torch.count_nonzero(added) == 0
    added.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in body.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_maps_features_to_channels_fits_nowhere(name):
    assert not BY_NAME[name].fits(Geometry(LINEAR, CONV[2], (8,), (4, 3, 3)))


def test_a_flattened_image_cannot_be_added_to_a_sequence():
    assert not BY_NAME["mlp"].fits(Geometry(CONV[2], LINEAR, (4, 3, 3), (5, 8)))


@pytest.mark.parametrize(("have", "want"), [((8, 8), (8, 8)), ((8, 8), (4, 3)), ((4, 4), (6, 6)), ((4, 6), (6, 3))])
def test_spatial_sizes_are_matched(have, want):
    assert match_spatial(torch.randn(2, 3, *have), want).shape == (2, 3, *want)


def test_a_low_rank_seed_is_no_wider_than_its_narrow_side():
    geometry = Geometry(LINEAR, LINEAR, (6,), (4,))
    assert sum(p.numel() for p in BY_NAME["low_rank"].build(geometry, 10**6).parameters()) == 4 * (6 + 4)


class Scale(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, output):
        return output * self.scale


def test_users_add_their_own():
    blueprint = Blueprint(
        "scale", lambda g: g.flat, lambda g, size: g.out_features, lambda g, size: Scale(g.out_features), lambda g: 1
    )
    register(blueprint)
    try:
        assert registered()[-1] is blueprint
        assert isinstance(blueprint.build(Geometry(LINEAR, LINEAR, (6,), (4,)), 4), Scale)
        with pytest.raises(ValueError, match="'scale' is taken"):
            register(blueprint)
    finally:
        unregister("scale")
    assert blueprint not in registered()


def test_a_blueprint_that_lies_about_its_cost_is_refused():
    liar = Blueprint("liar", lambda g: True, lambda g, size: 1, lambda g, size: Scale(100), lambda g: 1)
    with pytest.raises(RefusedError, match="'liar' has 100 parameters though it states 1; 10 are allowed"):
        liar.build(Geometry(LINEAR, LINEAR, (6,), (4,)), 10)


def test_the_registry_holds_no_more_than_the_contract_can_carry():
    added = []
    try:
        with pytest.raises(ValueError, match="64 blueprints already"):
            added.extend(
                register(Blueprint(f"extra-{i}", lambda g: False, lambda g, s: s, lambda g, s: Scale(1))).name
                for i in range(65)
            )
    finally:
        for name in added:
            unregister(name)
