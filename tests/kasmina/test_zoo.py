"""Over forty architectures are wrapped, read, trained, grafted and cut back, and stay what they are."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from esperml import kasmina
from esperml.kasmina import upstream
from esperml.kasmina.dataflow import named_tensors
from esperml.kasmina.selection import select
from esperml.kasmina.topology import call_model, undisturbed

sys.path.insert(0, str(Path(__file__).parent))
from zoo import PRETRAINED, WRITTEN

EVERY_PLACE = bool(os.environ.get("ZOO_EVERY_PLACE"))
"""Every blueprint at every place that it fits, rather than at one of them."""

TRAINING_STEPS = 5

COUNTED = ("bert.embeddings.token_type_embeddings", "transformer.wpe")
"""Embeddings of what the model itself counts or leaves at zero."""


def make(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    if name in PRETRAINED:
        pytest.importorskip("transformers")
        return PRETRAINED[name]()
    return WRITTEN[name]()


def results(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(7)
    return [tensor for _, tensor in named_tensors(call_model(model, example))]


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """What the model gives in evaluation mode."""
    with undisturbed(model), torch.no_grad():
        model.eval()
        return results(model, example)


def train(model: nn.Module, example: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """The losses, and the gradients of the last step."""
    told: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([t.square().mean() for t in results(model, example) if t.requires_grad]).sum()
        loss.backward()
        optimizer.step()
        told.append(loss.detach())
    return told + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def shape_of(model: nn.Module) -> tuple[list[str], list[str], int]:
    hooks = sum(
        len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    )
    return list(model.state_dict()), [name for name, _ in model.named_modules()], hooks


def chosen(host: kasmina.Host) -> Iterator[tuple[kasmina.Blueprint, kasmina.Place]]:
    """Each blueprint with a place to try it at, by turns the first or the last that it fits; or with all of them."""
    for number, blueprint in enumerate(host.blueprints):
        fitting = [place for place in host.places if place.fitting >> number & 1]
        for place in fitting if EVERY_PLACE else fitting[:1] if number % 2 else fitting[-1:]:
            yield blueprint, place


@pytest.fixture(scope="module", params=[*WRITTEN, *PRETRAINED])
def name(request) -> str:
    return request.param


def test_a_wrapped_host_trains_to_the_bit_like_the_plain_one(name):
    plain, example = make(name)
    wrapped, _ = make(name)
    before = shape_of(wrapped)
    kasmina.wrap(wrapped, example)
    assert shape_of(wrapped) == before == shape_of(plain)
    told = [
        train(model, example, torch.optim.AdamW(model.parameters(), 1e-3), TRAINING_STEPS) for model in (plain, wrapped)
    ]
    assert len(told[0]) == len(told[1]) > TRAINING_STEPS
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain, example), outputs(wrapped, example), strict=True))
    assert kasmina.unwrap(wrapped) is wrapped
    assert vars(wrapped).keys() == vars(plain).keys()


@pytest.mark.parametrize("observe", [None, "all"])
def test_the_graph_has_every_layer_and_no_cycle(name, observe):
    model, example = make(name)
    selected = select(model, None, None, observe)
    host = kasmina.host_of(kasmina.wrap(model, example, observe=observe))
    network = host.to_networkx()
    assert {*network.nodes, *host.unused} == selected.keys()
    assert set(network.nodes).isdisjoint(host.unused)
    onward = nx.DiGraph((a, b) for a, b, kind in network.edges(data="kind") if kind != "recurrent")
    assert nx.is_directed_acyclic_graph(onward)
    for layer, facts in network.nodes(data=True):
        # Positions are counted, not given.
        assert facts["inputs"] or network.in_degree(layer) or "position" in layer or layer in COUNTED, layer
        assert facts["outputs"] or network.out_degree(layer), f"{layer} feeds nothing"
    assert len(str(host.table()).splitlines()) >= len(host.layers) + 2


def test_every_graft_leaves_the_outputs_alone_trains_and_goes_without_a_trace(name):
    model, example = make(name)
    host = kasmina.host_of(kasmina.wrap(model, example))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    grafter = kasmina.Grafter(host, optimizer)
    before, groups = shape_of(model), len(optimizer.param_groups)
    for blueprint, place in chosen(host):
        ends = [host.layers[i].name for i in (place.source, place.target)]
        told = f"{blueprint.name} from {ends[0]} to {ends[1]}"
        expected = outputs(model, example)
        seed = grafter.germinate(blueprint.name, *ends, 2 * blueprint.smallest(place.geometry), seed_id="s")
        got = outputs(model, example)
        assert all(torch.allclose(a, b, 1e-6, 1e-6) for a, b in zip(expected, got, strict=True)), told
        born = copy.deepcopy(seed.body.state_dict())
        train(model, example, optimizer, 2)
        # A checkpoint that cuts a span leaves its seed out, and says so.
        assert not seed.errors or seed.last_error == upstream.CHECKPOINTED, f"{told}: {seed.last_error}"
        assert not seed.errors or name.startswith("checkpointed")
        trained = [p for p in seed.body.parameters() if p.grad is not None]
        if any(p.grad.any() for p in trained):
            assert any(not torch.equal(born[key], value) for key, value in seed.body.state_dict().items()), told
        grafter.cull("s")
        assert (shape_of(model), len(optimizer.param_groups)) == (before, groups), told
        assert all(output.isfinite().all() for output in outputs(model, example)), told
