"""A wrapped host is the host that it was."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.v1 import graph_pb2


def gradients(case):
    case.model.zero_grad()
    loss = case.loss()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in case.model.parameters() if p.grad is not None)]


def test_a_dormant_host_computes_bit_for_bit_what_the_plain_one_does(case, any_host):
    plain, wrapped = case(any_host, wrapped=False), case(any_host)
    assert list(plain.model.state_dict()) == list(wrapped.model.state_dict())
    for _ in range(3):
        torch.manual_seed(5)
        expected = gradients(plain)
        torch.manual_seed(5)
        got = gradients(wrapped)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        plain.optimizer.step()
        wrapped.optimizer.step()


def test_a_dormant_host_has_no_hooks_and_no_further_modules(case, any_host):
    plain, wrapped = case(any_host, wrapped=False), case(any_host)
    assert [name for name, _ in plain.model.named_modules()] == [name for name, _ in wrapped.model.named_modules()]
    for module in wrapped.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_wrapping_leaves_modes_buffers_and_random_numbers_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    kasmina.wrap(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_batch_normalisation_in_training_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    kasmina.wrap(model, torch.randn(4, 1, 8, 8))
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(2))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (None, ["0", "2", "4", "6"]),
        ("2", ["2"]),
        ("[46]", ["4", "6"]),
        (["0", "6"], ["0", "6"]),
        (lambda name, module: module.out_features == 8, ["0", "4"]),
    ],
)
def test_layers_are_selected_by_pattern_or_predicate(case, layers, names):
    plain = case("mlp", wrapped=False)
    kasmina.wrap(plain.model, plain.inputs, layers=layers)
    assert [layer.name for layer in kasmina.host_of(plain.model).layers] == names


def test_a_selection_of_nothing_is_refused_by_name(case):
    plain = case("mlp", wrapped=False)
    with pytest.raises(kasmina.UnsupportedHostError, match=r"layers: .encoder"):
        kasmina.wrap(plain.model, plain.inputs, layers="encoder.*")


def test_layers_that_never_run_are_no_host(case):
    plain = case("shared", wrapped=False)
    with pytest.raises(kasmina.UnsupportedHostError, match="selected ran on example_input"):
        kasmina.wrap(plain.model, plain.inputs, layers="unused")


def test_a_host_is_wrapped_once(case):
    wrapped = case("mlp")
    with pytest.raises(kasmina.UnsupportedHostError, match="wrapped already"):
        kasmina.wrap(wrapped.model, wrapped.inputs)


def test_a_plain_model_has_no_host():
    with pytest.raises(kasmina.KasminaError, match=r"call kasmina\.wrap"):
        kasmina.host_of(nn.Linear(2, 2))


def test_a_copy_can_be_wrapped_instead(case):
    plain = case("mlp", wrapped=False)
    wrapped = kasmina.wrap(plain.model, plain.inputs, inplace=False)
    assert wrapped is not plain.model
    with pytest.raises(kasmina.KasminaError):
        kasmina.host_of(plain.model)


@pytest.mark.parametrize("form", ["tuple", "dict", "list"])
def test_the_example_may_be_positional_or_by_keyword(case, form):
    plain = case("two_inputs", wrapped=False)
    x, z = plain.inputs
    example = {"tuple": (x, z), "list": [x, z], "dict": {"x": x, "z": z}}[form]
    kasmina.wrap(plain.model, example)
    assert len(kasmina.host_of(plain.model).layers) == 3


class Choosy(nn.Module):
    """A model that raises an error of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        self.layer(x)
        raise OSError("the lookup table is gone")


def test_what_a_model_raises_for_reasons_of_its_own_is_passed_on_and_leaves_no_trace():
    model = Choosy()
    with pytest.raises(OSError, match="lookup table"):
        kasmina.wrap(model, torch.randn(2, 4))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_deep_copy_of_a_grown_host_lives_its_own_life(any_case):
    host = kasmina.host_of(any_case.model)
    place = host.places[-1]
    names = [host.layers[i].name for i in (place.source, place.target)]
    kasmina.Grafter(host, any_case.optimizer).germinate("mlp", *names, 10**4, seed_id="s")
    for _ in range(3):
        any_case.step()
    twin = copy.deepcopy(any_case)
    assert kasmina.host_of(twin.model) is not host
    assert torch.equal(twin.logits(), any_case.logits())
    before = any_case.logits()
    for parameter in kasmina.host_of(twin.model).seeds["s"].body.parameters():
        parameter.data.add_(1)
    assert torch.equal(any_case.logits(), before)
    assert not torch.equal(twin.logits(), before)


def test_the_graph_message_says_what_the_host_is(case):
    graph = kasmina.host_of(case("conv").model).graph()
    assert isinstance(graph, graph_pb2.HostGraph)
    assert [(layer.name, list(layer.input_shape), list(layer.output_shape)) for layer in graph.layers] == [
        ("features.0", [1, 8, 8], [4, 4, 4]),
        ("features.3", [4, 4, 4], [6, 4, 4]),
        ("head", [96], [3]),
    ]
    assert [layer.parameters for layer in graph.layers] == [40, 222, 291]
    assert list(graph.blueprints) == [blueprint.name for blueprint in kasmina.registered()]
    assert list(zip(graph.places.sources, graph.places.targets, strict=True)) == [
        (0, 0),
        (1, 1),
        (2, 2),
        (0, 1),
        (1, 2),
    ]
    assert graph.structure_version == 1


def test_a_host_may_grow_chosen_blueprints_only(case):
    plain = case("mlp", wrapped=False)
    kasmina.wrap(plain.model, plain.inputs, blueprints=["gate", "low_rank"])
    graph = kasmina.host_of(plain.model).graph()
    assert list(graph.blueprints) == ["low_rank", "gate"]
    assert set(graph.places.blueprints) == {0b11}
    other = case("mlp", wrapped=False)
    with pytest.raises(ValueError, match="blueprints: 'tree' is not registered; low_rank, mlp"):
        kasmina.wrap(other.model, other.inputs, blueprints=["mlp", "tree"])


def test_blueprints_beyond_a_graft_s_budget_are_left_out_of_the_mask(case):
    host = kasmina.host_of(case("mlp").model)
    assert all(mask & 0b1111 == 0b1111 for mask in list(host.graph().places.blueprints)[:1])
    assert host.graph(graft_parameter_budget=18).places.blueprints[0] & 0b1111 == 0b0001
    assert host.graph(graft_parameter_budget=1).places.blueprints[0] == 0


@pytest.mark.parametrize(
    ("example", "described"),
    [
        (torch.zeros(8, 5), "a tensor of shape (8, 5), float32, cpu: RuntimeError"),
        (torch.zeros(8, 4, dtype=torch.int64), "a tensor of shape (8, 4), int64, cpu: RuntimeError"),
        ((torch.zeros(8, 4), 3), "a tuple of a tensor of shape (8, 4), float32, cpu, of type int: TypeError"),
        ({"y": torch.zeros(8, 4)}, "a dict of y: a tensor of shape (8, 4), float32, cpu: TypeError"),
        ((), "a tuple of nothing: TypeError"),
        (None, "of type NoneType: TypeError"),
    ],
    ids=["width", "dtype", "arguments", "keywords", "nothing", "none"],
)
def test_an_example_input_that_does_not_fit_is_named_and_leaves_the_model_plain(example, described):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(kasmina.UnsupportedHostError) as caught:
        kasmina.wrap(model, example)
    assert f"the model does not run on example_input, which is {described}" in str(caught.value)
    assert "a tuple of positional arguments" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not any(module._forward_hooks for module in model.modules())
    kasmina.wrap(model, torch.zeros(8, 4))
