"""What seeds grow into: never over budget, silent at birth, and trainable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esperml.kasmina import Blueprint, Geometry, RefusedError, Seed, register, registered, unregister
from esperml.kasmina.bodies import match_spatial
from esperml.v1 import graph_pb2

LINEAR = graph_pb2.LAYER_TYPE_LINEAR
CONV = {1: graph_pb2.LAYER_TYPE_CONV1D, 2: graph_pb2.LAYER_TYPE_CONV2D, 3: graph_pb2.LAYER_TYPE_CONV3D}
NAMES = ("low_rank", "mlp", "conv", "gate", "bottleneck", "depthwise", "dilated", "attention", "norm", "mixture")
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
    if source == target == "conv" and draw(st.booleans()):
        written = (read[0], *written[1:])  # As many channels out as in, which some ask for.
    return Geometry(
        LINEAR if source == "linear" else CONV[rank], LINEAR if target == "linear" else CONV[rank], read, written
    )


@st.composite
def grown(draw) -> tuple[Blueprint, Geometry, int]:
    """A blueprint, a place that it fits, and a size."""
    geometry = draw(geometries().filter(lambda g: any(blueprint.fits(g) for blueprint in BY_NAME.values())))
    blueprint = draw(st.sampled_from([known for known in BY_NAME.values() if known.fits(geometry)]))
    return blueprint, geometry, draw(st.integers(1, min(5, blueprint.largest(geometry))))


def batch(geometry: Geometry, examples: int = 4, **options):
    """What a body is called with."""
    return torch.randn(examples, *geometry.input_shape, **options), torch.randn(
        examples, *geometry.output_shape, **options
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


@settings(deadline=None, max_examples=150)
@given(grown())
def test_parameters_and_operations_are_those_that_it_states(drawn):
    blueprint, geometry, size = drawn
    body = blueprint.make(geometry, size)
    assert sum(parameter.numel() for parameter in body.parameters()) == blueprint.cost(geometry, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(*batch(geometry, 3))
    assert counter.get_total_flops() == 3 * blueprint.flops_at(geometry, size)
    counted = dataclasses.replace(blueprint, flops=None)
    assert counted.flops_at(geometry, size) == blueprint.flops_at(geometry, size)
    assert size == blueprint.largest(geometry) or blueprint.cost(geometry, size + 1) > blueprint.cost(geometry, size)


@settings(deadline=None, max_examples=60)
@given(grown(), st.integers(0, 100))
def test_a_seed_lowers_a_loss_in_a_few_steps(drawn, number):
    torch.manual_seed(number)
    blueprint, geometry, _ = drawn
    body = blueprint.build(geometry, blueprint.smallest(geometry) * 8)
    x, output = batch(geometry)
    with torch.no_grad():  # A target within reach: what a body of the same kind, grown up, would add.
        teacher = blueprint.build(geometry, blueprint.smallest(geometry) * 8)
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        wanted = teacher(x, output)
    optimizer = torch.optim.Adam(body.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = (body(x, output) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] or losses[0] == 0


@settings(deadline=None, max_examples=60)
@given(grown(), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), st.booleans())
def test_a_seed_works_in_any_precision_and_under_autocast(drawn, dtype, autocast):
    blueprint, geometry, size = drawn
    body = blueprint.make(geometry, size)
    if autocast:
        x, output = batch(geometry)
        with torch.autocast("cpu", torch.bfloat16):
            added = body(x, output.bfloat16())
    else:
        x, output = batch(geometry, dtype=dtype)
        added = body.to(dtype)(x, output)
        assert added.dtype == dtype
    assert added.shape == output.shape
    assert torch.count_nonzero(added) == 0
    added.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in body.parameters())


@settings(deadline=None, max_examples=60)
@given(grown())
def test_a_seed_that_is_given_the_wrong_shape_is_left_out(drawn):
    blueprint, geometry, size = drawn
    seed = Seed("s", 0, blueprint.name, blueprint.make(geometry, size), blend_steps=0)
    for parameter in seed.body.parameters():
        nn.init.normal_(parameter)
    x, output = batch(geometry)
    wide_x = torch.cat([x, x], 1 if geometry.source_type != LINEAR else -1)
    wide_output = torch.cat([output, output], 1 if geometry.spatial else -1)
    assert seed.graft(wide_x, wide_output) is None
    assert seed.errors == 1
    assert seed.last_error


@settings(deadline=None, max_examples=150)
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
    with pytest.raises(RefusedError, match=r"'liar' has 100 parameters though it states 1$"):
        liar.build(Geometry(LINEAR, LINEAR, (6,), (4,)), 1000)


@pytest.mark.parametrize("part", ["fits", "cost", "make", "largest"])
def test_a_blueprint_that_explodes_while_it_is_built_is_refused_by_name(part):
    def explode(*_):
        raise ZeroDivisionError("boom")

    mine = Blueprint("mine", lambda g: True, lambda g, size: size, lambda g, size: Scale(size), lambda g: 4)
    with pytest.raises(RefusedError, match="'mine' cannot be built: ZeroDivisionError: boom"):
        dataclasses.replace(mine, **{part: explode}).build(Geometry(LINEAR, LINEAR, (6,), (4,)), 10)


def test_a_blueprint_that_makes_no_module_is_refused():
    mine = Blueprint("mine", lambda g: True, lambda g, size: size, lambda g, size: None)
    with pytest.raises(RefusedError, match="'mine' cannot be built: it made NoneType, which is no module"):
        mine.build(Geometry(LINEAR, LINEAR, (6,), (4,)), 10)


def test_the_shipped_blueprints_are_registered_in_this_order():
    assert tuple(blueprint.name for blueprint in registered()) == NAMES


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
