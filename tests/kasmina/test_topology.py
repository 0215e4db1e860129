"""The graph that is read from a forward pass is the graph that the host has."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


class NoGradients(nn.Module):
    """Parts of it run without gradients, in inference mode, past a detached tensor, and by indices."""

    def __init__(self):
        super().__init__()
        self.quiet, self.quieter, self.loud = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.codes = nn.Linear(4, 3)
        self.table = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.quiet(x))
        with torch.inference_mode():
            y = self.quieter(x)
        z = self.loud(y.clone().detach())
        return self.head(self.table(self.codes(z).argmax(-1)))


def test_dataflow_is_seen_where_there_are_no_gradients():
    model = NoGradients()
    kasmina.wrap(model, torch.randn(3, 4))
    assert edges(model) == chain("quiet", "quieter", "loud", "codes", "head")
    assert {layer.name for layer in kasmina.host_of(model).layers if layer.rectified} == {"quiet"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_seen_in_both_modes(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.head(x + checkpoint(lambda x: torch.relu(self.inner(x)), x, use_reentrant=reentrant))

    model = Checkpointed()
    kasmina.wrap(model, torch.randn(3, 4))
    assert edges(model) == chain("first", "inner", "head") | {("first", "head", "residual")}
    assert all(layer.calls == 1 for layer in kasmina.host_of(model).layers)


def test_inputs_and_outputs_are_told_by_name_in_tuples_dicts_and_dataclasses():
    @dataclass
    class Answer:
        logits: torch.Tensor
        hidden: tuple[torch.Tensor, ...]
        note: str = ""

    class Multiple(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.words, self.joint = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, image, words, *, options=None):
            a, b = self.image(image), self.words(words["tokens"])
            return Answer(self.joint(a * b), (a, b))

    image, words = torch.randn(2, 4), {"tokens": torch.randn(2, 5)}
    for example in ((image, words), {"image": image, "words": words}):
        host = kasmina.host_of(kasmina.wrap(Multiple(), example))
        assert {layer.name: (layer.inputs, layer.outputs) for layer in host.layers} == {
            "image": (("image",), ("hidden.0",)),
            "words": (("words.tokens",), ("hidden.1",)),
            "joint": ((), ("logits",)),
        }


def test_what_is_written_in_place_into_a_buffer_comes_out_of_it():
    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)
            self.erased, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            buffer = self.erased(x).detach()
            buffer.zero_()
            view = buffer.view(-1)
            buffer[:, :2] = self.left(x)
            with torch.no_grad():
                torch.mul(self.right(x), 2, out=buffer[:, 2:])
            return self.head(view.view(-1, 4))

    model = Buffer()
    kasmina.wrap(model, torch.randn(3, 4))
    assert edges(model) == {("left", "head", "forward"), ("right", "head", "forward")}


def test_what_else_reads_the_input_of_an_observed_layer_that_changes_nothing_does_not_read_its_output():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.idle = nn.Linear(4, 4), nn.Identity()
            self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.one(self.idle(x)) + self.other(x)

    model = Idle()
    kasmina.wrap(model, torch.randn(3, 4), observe=["idle"])
    assert edges(model) == chain("stem", "idle", "one") | {("stem", "other", "forward")}


def test_a_frozen_host_and_one_that_trains_have_the_same_graph(any_case):
    frozen = copy.deepcopy(any_case.model).requires_grad_(False)
    graph = kasmina.host_of(any_case.model).graph()
    kasmina.unwrap(frozen)
    kasmina.wrap(frozen, any_case.inputs)
    assert kasmina.host_of(frozen).graph() == graph


class Random(nn.Module):
    """Layers that read sums, products or concatenations of earlier ones, or a part of one."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(nn.Linear(8 if how == "cat" and len(reads) == 2 else 4, 4) for reads, how in plan)

    def forward(self, x):
        made = []
        for layer, (reads, how) in zip(self.layers, self.plan, strict=True):
            given = [made[i] for i in reads] or [x]
            if len(given) == 1:
                (joined,) = given
            elif how == "cat":
                joined = torch.cat(given, 1)
            else:
                joined = given[0] + given[1] if how == "sum" else given[0] * given[1]
            made.append(layer(torch.relu_(joined.clone()) if len(reads) % 2 else joined.tanh()))
        return [tensor.view(-1) for tensor in made]


@st.composite
def plans(draw):
    count = draw(st.integers(1, 7))
    return [
        (
            draw(st.lists(st.integers(0, at - 1), min_size=1, max_size=2, unique=True)) if at else [],
            draw(st.sampled_from(["sum", "cat", "product"])),
        )
        for at in range(count)
    ]


@settings(deadline=None, max_examples=60)
@given(plan=plans(), gradients=st.booleans())
def test_the_graph_of_any_host_is_the_one_by_which_it_was_made(plan, gradients):
    model = Random(plan).requires_grad_(gradients)
    host = kasmina.host_of(kasmina.wrap(model, torch.randn(3, 4)))
    expected = {(source, target) for target, (reads, _) in enumerate(plan) for source in reads}
    assert {(edge.source, edge.target) for edge in host.edges} == expected
    network = nx.DiGraph(list(expected))
    for edge in host.edges:
        reads, how = plan[edge.target]
        around = how == "sum" and any(
            other != edge.source and nx.has_path(network, edge.source, other) for other in reads
        )
        assert (edge.kind == RESIDUAL) == around
