"""Everything that people do to a model works on a wrapped one as it does on a plain one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esperml import kasmina


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.inner(self.words(tokens))))

    return Tied()


def grown(model: nn.Module, layer: str, *, optimizer: torch.optim.Optimizer | None = None) -> kasmina.Seed:
    host = kasmina.host_of(model)
    return kasmina.Grafter(host, optimizer).germinate("mlp", layer, layer, 10**4, seed_id="s")


def test_the_user_s_hooks_run_as_before_and_see_the_same(case):
    plain, wrapped = case("mlp", wrapped=False), case("mlp", wrapped=False)
    seen: dict[int, list[torch.Tensor]] = {}
    for number, this in enumerate((plain, wrapped)):
        calls = seen[number] = []
        this.model[0].register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        this.model[2].register_forward_hook(lambda _m, _args, output, calls=calls: calls.append(output.detach()))
        this.model[2].register_forward_hook(lambda _m, _args, output: output + 1)
        this.model[4].register_full_backward_hook(lambda _m, given, _got, calls=calls: calls.append(given[0]))
    kasmina.wrap(wrapped.model, wrapped.inputs)
    seen[1].clear()
    losses = [this.step() for this in (plain, wrapped)]
    assert losses[0] == losses[1]
    assert len(seen[0]) == len(seen[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_a_forward_pass_while_wrapping_calls_the_user_s_hooks_and_changes_no_gradient(case):
    plain = case("mlp", wrapped=False)
    plain.loss().backward()
    before = [parameter.grad.clone() for parameter in plain.model.parameters()]
    kasmina.wrap(plain.model, plain.inputs)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, plain.model.parameters(), strict=True))


def test_modes_are_switched_as_before(case):
    plain, wrapped = case("signal", wrapped=False), case("signal")
    for this in (plain, wrapped):
        this.model.eval()
    assert torch.equal(plain.model(*plain.inputs), wrapped.model(*wrapped.inputs))
    grown(wrapped.model, "first")
    assert not any(module.training for module in wrapped.model.modules())
    wrapped.model.train()
    assert all(module.training for module in wrapped.model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_host_and_its_seeds_move_to_another_dtype(case, dtype):
    plain, wrapped = case("conv", wrapped=False), case("conv")
    for this in (plain, wrapped):
        this.model.to(dtype).eval()
    x = plain.inputs[0].to(dtype)
    assert torch.equal(plain.model(x), wrapped.model(x))
    seed = grown(wrapped.model, "features.3")
    assert {parameter.dtype for parameter in seed.body.parameters()} == {dtype}
    wrapped.model.double()
    assert wrapped.model(x.double()).dtype == torch.float64
    assert not seed.errors


def test_a_host_is_wrapped_without_memory_and_filled_later(case):
    plain = case("residual", wrapped=False)
    with torch.device("meta"):
        model = type(plain.model)()
    kasmina.wrap(model, torch.empty(16, 10, device="meta"))
    model.to_empty(device="cpu").load_state_dict(plain.model.state_dict())
    assert torch.equal(model(*plain.inputs), plain.model(*plain.inputs))
    assert grown(model, "inner").body.hidden.weight.device.type == "cpu"
    assert torch.allclose(model(*plain.inputs), plain.model(*plain.inputs), 1e-6, 1e-6)


def test_tied_weights_stay_tied():
    model = kasmina.wrap(tied(), torch.tensor([[1, 2, 3]]))
    assert model.head.weight is model.words.weight
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.words.weight
    assert twin.head.weight is not model.head.weight
    assert kasmina.host_of(twin).model is twin
    assert kasmina.host_of(twin).layers[-1].module is twin.head
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("seeds", [0, 1], ids=["dormant", "grown"])
def test_a_wrapped_model_is_saved_whole_and_loaded(case, seeds):
    this = case("conv")
    if seeds:
        grown(this.model, "head", optimizer=this.optimizer)
        this.step()
    file = io.BytesIO()
    torch.save(this.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    host = kasmina.host_of(loaded)
    assert host.model is loaded
    assert host.graph() == kasmina.host_of(this.model).graph()
    this.model.eval()
    assert torch.equal(loaded.eval()(*this.inputs), this.model(*this.inputs))
    if seeds:
        kasmina.Grafter(host, None).cull("s")
    else:
        grown(loaded, "head")
    assert pickle.loads(pickle.dumps(loaded)) is not None


def test_the_state_dict_goes_from_a_wrapped_model_to_a_plain_one_and_back(case):
    plain, wrapped = case("conv", wrapped=False), case("conv")
    wrapped.step()
    plain.model.load_state_dict(wrapped.model.state_dict())
    assert torch.equal(plain.logits(), wrapped.logits())
    plain.step()
    wrapped.model.load_state_dict(plain.model.state_dict())
    assert torch.equal(plain.logits(), wrapped.logits())


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


def test_torch_s_transformer_still_runs_fused_until_a_seed_lives_in_it():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
    kasmina.wrap(model, x, observe="all")

    def run() -> tuple[torch.Tensor, set[str]]:
        operators = Operators()
        with torch.no_grad(), operators:
            return model(x), operators.names

    got, names = run()
    assert torch.equal(got, expected)
    assert "_transformer_encoder_layer_fwd" in names
    seed = grown(model, "layers.0.linear1")
    got, _ = run()
    assert torch.allclose(got, expected, 1e-6, 1e-6)
    seed.body.out.weight.data.fill_(0.5)
    assert not torch.allclose(run()[0], expected)
    kasmina.Grafter(kasmina.host_of(model), None).cull("s")
    got, names = run()
    assert torch.equal(got, expected)
    assert "_transformer_encoder_layer_fwd" in names


def test_a_model_that_was_unwrapped_is_plain_and_can_be_wrapped_again(case):
    this = case("mlp")
    assert kasmina.unwrap(this.model) is this.model
    with pytest.raises(kasmina.KasminaError, match="is not wrapped"):
        kasmina.unwrap(this.model)
    kasmina.wrap(this.model, this.inputs)


def test_a_model_with_seeds_is_not_unwrapped(case):
    this = case("mlp")
    grown(this.model, "2")
    with pytest.raises(kasmina.KasminaError, match="has seeds: s; cull them first, or bake"):
        kasmina.unwrap(this.model)


def test_a_model_of_which_a_part_is_wrapped_is_refused_by_the_part_s_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    kasmina.wrap(model[1], torch.randn(2, 4))
    with pytest.raises(kasmina.UnsupportedHostError, match=r"part '1' is wrapped already; kasmina\.unwrap"):
        kasmina.wrap(model, torch.randn(2, 4))


def test_a_model_whose_shapes_are_not_known_yet_is_run_first():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(kasmina.UnsupportedHostError, match=r"0\.weight has no shape yet; run the model once"):
        kasmina.wrap(model, torch.randn(2, 3))


def test_only_seeds_train_in_a_frozen_host(case, bench):
    this = case("mlp", wrapped=False)
    this.model.requires_grad_(False)
    kasmina.wrap(this.model, this.inputs)
    before = copy.deepcopy(this.model.state_dict())
    optimizer = torch.optim.AdamW([{"params": []}], lr=1e-2)
    this.optimizer = optimizer
    seed = grown(this.model, "2", optimizer=optimizer)
    counts = kasmina.host_of(this.model).parameter_counts()
    assert counts.trainable == counts.seeds == seed.parameter_count
    with kasmina.connect(bench.link, this.model, optimizer, run="r", report_every=1) as session:
        losses = [this.step(session) for _ in range(8)]
    assert session.failure == ""
    assert losses[-1] < losses[0]
    state = this.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    signals = {signal.layer: signal for signal in bench.reports[0].layers}
    assert signals.keys() == {"0", "2", "4", "6"}
    for signal in signals.values():
        assert signal.HasField("activation_mean")
        assert signal.HasField("effective_rank")
        assert not any(signal.HasField(f) for f in ("gradient_norm", "gradient_to_weight", "vanishing_fraction"))
    # What the loss asks of an output is known from the seed on.
    assert [name for name, signal in signals.items() if signal.HasField("expressivity_bottleneck")] == ["2", "4", "6"]
    assert any(report.seeds[0].HasField("gradient_norm") for report in bench.reports)
