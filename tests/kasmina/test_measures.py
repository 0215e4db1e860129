"""Each formula against a plain and slow way to compute the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from esperml.kasmina import measures, sampling
from esperml.kasmina.geometry import Geometry
from esperml.v1 import graph_pb2

shapes = st.tuples(st.integers(2, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))


def random_rows(n, features, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, features))).float()


@settings(deadline=None, max_examples=50)
@given(shapes)
def test_effective_rank_is_the_exponential_entropy_of_singular_values(shape):
    n, features, _, seed = shape
    rows = random_rows(n, features, seed)
    singular = np.linalg.svd(rows.double().numpy() - rows.double().numpy().mean(0), compute_uv=False)
    share = singular[singular > 1e-9] / singular.sum()
    expected = math.exp(-(share * np.log(share)).sum())
    got = measures.effective_rank(measures.squared_singular_values(rows).tolist())
    assert got == pytest.approx(expected, rel=0.02)


def test_a_constant_output_has_no_effective_rank():
    assert measures.effective_rank(measures.squared_singular_values(torch.ones(5, 3)).tolist()) is None
    assert measures.effective_rank([math.nan, 1.0]) is None


@settings(deadline=None, max_examples=50)
@given(shapes, st.booleans())
def test_the_unexplained_share_is_that_of_a_ridge_solved_in_feature_space(shape, bias):
    n, features, outputs, seed = shape
    rows, asked = random_rows(n, features, seed), random_rows(n, outputs, seed + 1)
    x = rows.double() / rows.double().square().sum(1).mean().sqrt()
    if bias:
        x = torch.cat((x, torch.ones(n, 1, dtype=x.dtype)), 1)
    d = asked.double()
    weights = torch.linalg.solve(x.T @ x + measures.RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ d)
    least = (d - x @ weights).square().sum() + measures.RIDGE * weights.square().sum()
    expected = (least / d.square().sum()).item()
    left = measures.whitened(measures.normalised_gram(rows), asked, bias=bias)
    got = measures.unexplained(left.norm().item(), asked.norm().item())
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(shapes)
def test_reading_more_never_explains_less(shape):
    n, features, outputs, seed = shape
    asked = random_rows(n, outputs, seed)
    own, more = (measures.normalised_gram(random_rows(n, features, seed + i)) for i in (1, 2))
    alone, joint = (measures.whitened(gram, asked, bias=True).norm().item() for gram in (own, own + more))
    assert joint <= alone * (1 + 1e-4)


def test_an_asked_step_of_nothing_has_no_unexplained_share():
    assert measures.unexplained(1.0, 0.0) is None
    assert measures.unexplained(math.nan, 1.0) is None
    assert measures.unexplained(1e9, 1.0) == 1.0


def test_silent_units_are_those_at_or_below_zero_everywhere():
    output = torch.tensor([[0.0, -1.0, 1.0, -2.0], [0.0, 2.0, 3.0, -1.0]])
    assert measures.silent_units(output) == 2


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 20), st.integers(2, 12), st.integers(0, 10**6))
def test_autocorrelation_is_the_mean_of_pearson_s_over_neighbours(n, width, seed):
    rows = random_rows(n, width, seed).cumsum(1)
    expected = np.mean([np.corrcoef(rows[:, i], rows[:, i + 1])[0, 1] for i in range(width - 1)])
    total, pairs = measures.autocorrelation(rows[:, None]).tolist()
    assert pairs == width - 1
    assert total / pairs == pytest.approx(expected, abs=1e-4)


def test_constant_neighbours_have_no_correlation():
    rows = torch.tensor([[[1.0, 2.0, 3.0, 5.0]], [[1.0, 2.0, 4.0, 7.0]]])
    total, pairs = measures.autocorrelation(rows).tolist()
    assert pairs == 1
    assert total == pytest.approx(1)


def test_extreme_entries_are_counted():
    gradient = torch.tensor([0.0, 1e-8, 1e-6, 1.0, -9.0, 11.0, -math.inf, math.nan])
    assert measures.extreme_entries(gradient).tolist() == [2, 5]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 60), st.sampled_from([32, 128]))
def test_chosen_rows_are_different_and_spread_over_the_batch(batch, positions, limit):
    rows = sampling.choose(batch, positions, limit, torch.device("cpu"))
    index = (rows.sample * positions + rows.position).tolist()
    assert len(set(index)) == rows.count == min(limit, batch * positions)
    assert max(index) < batch * positions
    assert max(np.diff(sorted(index)), default=1) <= 2 * (batch * positions // rows.count)
    assert rows.scale == pytest.approx(batch * positions / rows.count)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, stride=2, padding=1),
        nn.Conv1d(3, 4, 3, dilation=2, padding="same", padding_mode="circular"),
        nn.Conv1d(3, 4, 5, padding="same"),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(2, 3, 2),
    ],
)
def test_patches_of_a_convolution_give_its_output(layer):
    x = torch.randn(5, layer.in_channels, *(7,) * (layer.weight.dim() - 2))
    output = layer(x)
    kind = {3: graph_pb2.LAYER_TYPE_CONV1D, 4: graph_pb2.LAYER_TYPE_CONV2D, 5: graph_pb2.LAYER_TYPE_CONV3D}[x.dim()]
    rows = sampling.rows_of(kind, output, 32)
    patches = sampling.pick_input(layer, x, tuple(output.shape), rows)
    expected = sampling.pick(kind, output, rows)
    assert torch.allclose(functional.linear(patches, layer.weight.flatten(1), layer.bias), expected, atol=1e-5)


def test_convolutions_in_groups_are_not_fitted():
    layer = nn.Conv1d(4, 4, 3, groups=2)
    x = torch.randn(2, 4, 9)
    rows = sampling.rows_of(graph_pb2.LAYER_TYPE_CONV1D, layer(x), 32)
    assert sampling.pick_input(layer, x, tuple(layer(x).shape), rows) is None


def test_the_rows_of_a_sequence_are_its_positions():
    x = torch.randn(3, 4, 5)
    rows = sampling.rows_of(graph_pb2.LAYER_TYPE_LINEAR, x, 128)
    assert torch.equal(sampling.pick(graph_pb2.LAYER_TYPE_LINEAR, x, rows), x.reshape(12, 5))


def test_a_graft_across_strides_reads_what_lies_at_the_target_s_position():
    geometry = Geometry(graph_pb2.LAYER_TYPE_CONV1D, graph_pb2.LAYER_TYPE_CONV1D, (2, 8), (3, 4))
    x = torch.arange(16.0).reshape(1, 2, 8)
    rows = sampling.rows_of(graph_pb2.LAYER_TYPE_CONV1D, torch.zeros(1, 3, 4), 32)
    read = sampling.pick_for_graft(geometry, x, (1, 3, 4), rows)
    assert torch.equal(read, torch.tensor([[0.5, 8.5], [2.5, 10.5], [4.5, 12.5], [6.5, 14.5]]))


@pytest.mark.parametrize(
    ("kind", "shape"), [(graph_pb2.LAYER_TYPE_LINEAR, (200, 9, 3000)), (graph_pb2.LAYER_TYPE_CONV2D, (300, 64, 40, 40))]
)
def test_signals_are_bounded(kind, shape):
    part = sampling.signals(kind, torch.zeros(1).expand(shape))
    assert part.shape[0] <= sampling.MAX_ROWS
    assert part[0].numel() <= sampling.MAX_FEATURES
