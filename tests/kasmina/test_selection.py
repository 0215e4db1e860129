"""Layers are selected as users of PEFT expect, and what is selected is shown before it is done."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from esperml import kasmina
from esperml.settings import TamiyoSettings as Settings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.store import PolicyStore
from esperml.v1 import decision_pb2, event_pb2, graph_pb2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden_states, mask=None):
        scores = self.query(hidden_states) @ self.key(hidden_states).mT
        return self.out(scores.softmax(-1) @ self.value(hidden_states)), scores


class Conv1D(nn.Module):
    """Of the form of transformers.pytorch_utils.Conv1D."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()
        self.fc1, self.fc2 = nn.Linear(8, 12), Conv1D(8, 12)

    def forward(self, x):
        x = x + self.attention(hidden_states=self.norm(x))[0]
        return x + self.fc2(torch.relu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 9)

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.memory(x)[0])


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LINEAR = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in ("attention.query", "attention.key", "attention.value", "attention.out", "fc1", "fc2")
]


def names(**selection) -> list[str]:
    return [layer.name for layer in kasmina.host_of(kasmina.wrap(Model(), TOKENS, **selection)).layers]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, [*LINEAR, "head"]),
        ({"layers": "all-linear"}, LINEAR),
        ({"layers": ["query", "fc1"]}, [name for name in LINEAR if name.endswith(("query", "fc1"))]),
        ({"layers": ["attention.out", "head"]}, ["blocks.0.attention.out", "blocks.1.attention.out", "head"]),
        ({"layers": r"blocks\.1\..*"}, [name for name in LINEAR if "blocks.1" in name]),
        ({"layers": nn.Linear, "exclude": r".*attention.*"}, ["blocks.0.fc1", "blocks.1.fc1", "head"]),
        ({"layers": [Conv1D, "head"]}, ["blocks.0.fc2", "blocks.1.fc2", "head"]),
        (
            {"layers": lambda name, module: "1" in name and getattr(module, "out_features", 0) == 12},
            ["blocks.0.fc1", "blocks.1.fc1"],
        ),
        ({"exclude": ["query", "key", "value", "out", "fc1", "fc2"]}, ["head"]),
        ({"layers": ["head"], "observe": [nn.LSTM, "words"]}, ["words", "memory", "head"]),
        (
            {"layers": ["fc1"], "observe": ["attention"], "exclude": r"blocks\.0\..*"},
            ["blocks.1.attention", "blocks.1.fc1"],
        ),
        (
            {"observe": "all"},
            ["words"]
            + [f"blocks.{i}.{name}" for i in range(2) for name in ("norm", "attention", "fc1", "fc2")]
            + ["memory", "head"],
        ),
    ],
)
def test_what_is_selected(selection, expected):
    assert names(**selection) == expected


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"layers": ["querry"]}, "layers: 'querry' matches no layer; near it are query"),
        (
            {"layers": ["fc1", "blocks.0.fc3"]},
            r"'blocks.0.fc3' matches no layer; near it are blocks.0.fc2, blocks.0.fc1",
        ),
        ({"layers": ["zzz"]}, "there are, for example, blocks.0.attention.query"),
        ({"layers": ["norm"]}, r"'blocks.0.norm' is a LayerNorm, at which nothing can grow; observe= takes it"),
        ({"layers": nn.Conv2d}, "layers: 'Conv2d' matches no layer"),
        ({"layers": "fc1"}, "layers: 'fc1' matches no layer; near it are fc1"),
        ({"layers": "(fc1"}, r"is no regular expression .*; a list selects by the ends of names"),
        ({"exclude": ["haed"]}, "exclude: 'haed' matches no layer; near it are head"),
        ({"observe": ["nrom"]}, "observe: 'nrom' matches no layer; near it are norm"),
        ({"layers": ["fc1"], "exclude": ["fc1"]}, "all that were are excluded"),
        ({"layers": lambda _name, _module: False}, "no layer is selected"),
    ],
)
def test_what_matches_nothing_is_named_with_what_is_near(selection, words):
    with pytest.raises(kasmina.UnsupportedHostError, match=words):
        kasmina.wrap(Model(), TOKENS, **selection)


def test_kinds_of_layers_are_told():
    host = kasmina.host_of(kasmina.wrap(Model(), TOKENS, observe="all"))
    kinds = {layer.name: layer.type for layer in host.layers}
    assert kinds["words"] == graph_pb2.LAYER_TYPE_EMBEDDING
    assert kinds["blocks.0.norm"] == graph_pb2.LAYER_TYPE_NORMALISATION
    assert kinds["blocks.0.attention"] == graph_pb2.LAYER_TYPE_ATTENTION
    assert kinds["blocks.0.fc2"] == graph_pb2.LAYER_TYPE_LINEAR
    assert kinds["memory"] == graph_pb2.LAYER_TYPE_RECURRENT
    assert {layer.name for layer in host.layers if layer.grows} == {*(n for n in LINEAR if "fc" in n), "head"}


def test_a_module_of_no_known_kind_can_be_observed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.1)), nn.Linear(4, 2))
    host = kasmina.host_of(kasmina.wrap(model, torch.randn(2, 4), observe=["1"]))
    assert [layer.type for layer in host.layers] == [
        graph_pb2.LAYER_TYPE_LINEAR,
        graph_pb2.LAYER_TYPE_OTHER,
        graph_pb2.LAYER_TYPE_LINEAR,
    ]


def places(host: kasmina.Host) -> set[tuple[str, str, int]]:
    return {(host.layers[p.source].name, host.layers[p.target].name, p.fitting) for p in host.places}


def test_what_can_grow_where_does_not_depend_on_what_is_observed_beside():
    plain = kasmina.host_of(kasmina.wrap(Model(), TOKENS))
    observing = kasmina.host_of(kasmina.wrap(Model(), TOKENS, observe=[nn.LayerNorm, nn.Embedding, nn.LSTM]))
    assert len(observing.layers) > len(plain.layers)
    assert places(observing) == places(plain)


def test_nothing_grows_where_only_observed_layers_run():
    host = kasmina.host_of(kasmina.wrap(Model(), TOKENS, layers=[], observe=[nn.Linear, nn.LSTM]))
    assert host.layers
    assert not host.places


def test_a_seed_grows_at_a_transposed_linear_layer():
    model = Model().eval()
    expected = model(TOKENS)
    host = kasmina.host_of(kasmina.wrap(model, TOKENS))
    seed = kasmina.Grafter(host, None).germinate("low_rank", "blocks.0.fc1", "blocks.0.fc2", 100, seed_id="s")
    assert torch.allclose(model(TOKENS), expected, 1e-6, 1e-6)
    model(TOKENS).sum().backward()
    assert seed.body.up.weight.grad.abs().sum() > 0
    assert not seed.errors


def test_every_kind_of_layer_is_measured_and_what_has_no_meaning_is_absent(bench):
    model = Model()
    kasmina.wrap(model, TOKENS, observe="all")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with kasmina.connect(bench.link, model, optimizer, run="r", report_every=1) as session:
        loss = model(TOKENS).square().mean()
        loss.backward()
        optimizer.step()
        session.step(loss=loss)
    assert session.failure == ""
    signals = {signal.layer: signal for signal in bench.reports[0].layers}
    assert signals.keys() == {layer.name for layer in kasmina.host_of(model).layers}
    for name, signal in signals.items():
        assert signal.HasField("activation_mean"), name
        assert signal.HasField("gradient_norm"), name
        linear = "fc" in name or name == "head"
        assert signal.HasField("flops") == signal.HasField("expressivity_bottleneck") == linear, name
    assert not signals["words"].HasField("input_autocorrelation")
    assert signals["memory"].parameters == sum(p.numel() for p in model.memory.parameters())


def test_the_shipped_policy_decides_on_hosts_with_layers_of_every_kind(tmp_path):
    told = Settings(policy_dir=tmp_path, warmup_steps=0, decision_interval_steps=1)
    controller = Controller(PolicyStore.from_settings(told), told)
    decided: list[decision_pb2.AdaptationDecision] = []

    def handle(kind, event):
        answers = controller.handle(kind, event)
        decided.extend(answer.decision for _, answer in answers if answer.HasField("decision"))
        return [(kind, answer) for kind, answer in answers if kind == event_pb2.KIND_COMMANDS]

    model = Model()
    kasmina.wrap(model, TOKENS, observe="all")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    link = kasmina.LocalLink(handle)
    with kasmina.connect(
        link,
        model,
        optimizer,
        run="r",
        mode="act",
        report_every=1,
        evaluate=lambda model: model(TOKENS).square().mean(),
    ) as session:
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            optimizer.step()
            session.step(loss=loss)
    assert session.failure == ""
    assert decided
    assert "shipped" in {decision.policy for decision in decided}


def test_a_preview_shows_what_would_be_done_and_does_nothing():
    model = Model()
    table = kasmina.preview(model, TOKENS, layers=["fc1", "head"], observe=["attention"])
    with pytest.raises(kasmina.KasminaError):
        kasmina.host_of(model)
    kasmina.wrap(model, TOKENS, layers=["fc1", "head"], observe=["attention"])
    assert kasmina.host_of(model).table() == table
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "kind", "reads", "gives", "parameters", "places", "can", "grow"]
    assert lines[1].split() == ["blocks.0.attention", "attention", "3×8", "3×8", "288", "–", "–"]
    assert lines[2].split()[:6] == ["blocks.0.fc1", "linear", "3×8", "3×12", "108", "1"]
    assert "low_rank" in lines[2]
    assert lines[-1] == "5 layers, 5 places"
    assert table.rows[1].sources == ("blocks.0.fc1",)


def test_a_preview_says_what_runs_often_what_is_frozen_and_what_does_not_run(case):
    this = case("shared", wrapped=False)
    this.model.stem.requires_grad_(False)
    this.model.head.weight.requires_grad_(False)
    table = kasmina.preview(this.model, this.inputs)
    text = str(table)
    assert "linear, runs 2 times" in text
    assert "88 (frozen)" in text
    assert "27 (partly frozen)" in text
    assert "selected but not run: unused" in text
    assert table.unused == ("unused",)


def test_a_notebook_shows_the_table(case):
    this = case("shared", wrapped=False)
    shown = kasmina.preview(this.model, this.inputs)._repr_html_()
    assert shown.startswith("<table><thead><tr><th>layer</th>")
    assert shown.count("<tr>") == 4
    assert shown.endswith("<p>selected but not run: unused</p>")


def test_parameters_are_counted_like_peft_does(case, capsys):
    this = case("mlp")
    this.model[0].requires_grad_(False)
    host = kasmina.host_of(this.model)
    seed = kasmina.Grafter(host, this.optimizer).germinate("low_rank", "2", "2", 12, seed_id="s")
    kasmina.print_trainable_parameters(this.model)
    assert seed.parameter_count == 12
    assert capsys.readouterr().out == (
        "trainable params: 115 || all params: 203 || trainable%: 56.6502 || in seeds: 12\n"
    )


def test_the_graph_goes_to_networkx_with_what_is_known_of_layers_and_edges():
    network = kasmina.host_of(kasmina.wrap(Model(), TOKENS, observe="all")).to_networkx()
    assert next(iter(network)) == "words"
    assert network.nodes["words"]["inputs"] == ("tokens",)
    assert network.nodes["head"]["outputs"] == ("",)
    assert network.nodes["blocks.0.fc1"]["activated"] is True
    assert network.edges["words", "blocks.0.norm"]["kind"] == "forward"
    assert network.edges["words", "blocks.0.fc1"]["kind"] == "residual"


def test_without_networkx_the_extra_is_named(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(kasmina.KasminaError, match=r"pip install 'esperml\[server\]'"):
        kasmina.host_of(case("mlp").model).to_networkx()


def test_the_conv1d_of_transformers_is_a_linear_layer():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(nn.Linear(4, 6), utils.Conv1D(3, 6))
    host = kasmina.host_of(kasmina.wrap(model, torch.randn(2, 4)))
    assert [layer.type for layer in host.layers] == [graph_pb2.LAYER_TYPE_LINEAR] * 2
    assert host.layers[1].output_shape == (3,)
