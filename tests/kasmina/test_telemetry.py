"""What a report says of a host, and what it does not say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from esperml import kasmina
from esperml.contract import MEASURES
from esperml.kasmina.telemetry import TURNS, Telemetry

STATIC = {"parameters", "flops", "memory_bytes"}


def measure(here, *, telemetry=None, backward=True):
    """One sampled training pass; returns the sample, with the gradients still there."""
    telemetry = telemetry or Telemetry(kasmina.host_of(here.model))
    telemetry.arm()
    here.model.zero_grad()
    loss = here.loss()
    if backward:
        loss.backward()
    return telemetry.collect(loss)


def by_name(sample):
    return {signal.layer: signal for signal in sample.layers}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_raw_measure_of_every_layer_is_in_range(any_case):
    sample = measure(any_case)
    raw = {name for name, m in MEASURES.items() if not m.derived}
    for signal in sample.layers:
        present = {field.name for field, _ in signal.ListFields()} - {"layer"}
        # A share of zero is a measure too: presence counts, which ListFields tells for optional fields.
        assert present <= raw
        for name in present:
            MEASURES[name].check(getattr(signal, name), f"{signal.layer}.{name}")
        rectified = next(x for x in kasmina.host_of(any_case.model).layers if x.name == signal.layer).rectified
        expected = raw - {"latency_variance"} - (set() if rectified else {"dead_fraction"})
        assert expected - present <= {"input_autocorrelation"}, (signal.layer, expected - present)
    for place in sample.places:
        assert math.isfinite(place.growth_gradient)
        assert 0 <= place.explained_error <= 1


def test_measures_are_those_of_a_plain_computation():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, labels = torch.randn(20, 6), torch.randint(0, 3, (20,))
    kasmina.wrap(model, x)
    telemetry = Telemetry(kasmina.host_of(model))
    telemetry.arm()
    hidden = model[1](model[0](x))
    output = model[2](hidden)
    output.retain_grad()
    loss = functional.cross_entropy(model[4](model[3](output)), labels)
    loss.backward()
    sample = telemetry.collect(loss)
    signal = by_name(sample)["2"]
    grad = torch.cat([model[2].weight.grad.flatten(), model[2].bias.grad])
    weight = torch.cat([model[2].weight.flatten(), model[2].bias])
    assert signal.activation_mean == pytest.approx(output.mean().item(), rel=1e-4)
    assert signal.activation_variance == pytest.approx(output.var(correction=0).item(), rel=1e-4)
    assert signal.dead_fraction == pytest.approx((output <= 0).all(0).float().mean().item())
    assert signal.gradient_norm == pytest.approx(grad.norm().item(), rel=1e-4)
    assert signal.gradient_to_weight == pytest.approx((grad.norm() / weight.norm()).item(), rel=1e-4)
    assert signal.vanishing_fraction == pytest.approx((grad.abs() < 1e-7).float().mean().item())
    assert signal.exploding_fraction == 0
    assert signal.HasField("exploding_fraction")
    assert signal.flops == 2 * 5 * 4
    assert signal.parameters == 24
    assert signal.memory_bytes == 4 * (24 + 24 + 20 * 4)
    assert sample.train_loss == pytest.approx(loss.item())
    host = kasmina.host_of(model)
    places = {(host.places[p.place].source, host.places[p.place].target): p for p in sample.places}
    for (source, target), read in (((1, 1), hidden), ((0, 1), x)):
        expected = (output.grad.T @ read).norm() / math.sqrt(read.shape[1] * 4)
        assert places[source, target].growth_gradient == pytest.approx(expected.item(), rel=1e-4)
    assert not places[1, 1].HasField("explained_error")
    assert places[0, 1].HasField("explained_error")


def test_measuring_changes_nothing_that_is_trained(any_host, case):
    watched, plain = case(any_host), case(any_host, wrapped=False)
    telemetry = Telemetry(kasmina.host_of(watched.model))
    for step in range(4):
        telemetry.arm()
        for here in (watched, plain):
            torch.manual_seed(step)
            loss = here.loss()
            loss.backward()
            here.optimizer.step()
            if here is watched:
                telemetry.collect(loss)
            here.optimizer.zero_grad()
    for a, b in zip(watched.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_hooks_are_there_on_a_sampled_step_only(any_case):
    telemetry = Telemetry(kasmina.host_of(any_case.model))
    assert hooks(any_case.model) == 0
    telemetry.arm()
    assert hooks(any_case.model) > 0
    telemetry.collect(None)
    assert hooks(any_case.model) == 0
    telemetry.arm()
    telemetry.disarm()
    assert hooks(any_case.model) == 0


def test_the_first_report_measures_all_layers_and_then_each_has_its_turn(case):
    here = case("residual")
    telemetry = Telemetry(kasmina.host_of(here.model))
    assert len(measure(here, telemetry=telemetry).layers) == 4
    seen = [list(by_name(measure(here, telemetry=telemetry))) for _ in range(2 * TURNS)]
    assert [name for names in seen for name in names] == ["stem", "inner", "outer", "head"] * 2
    assert max(map(len, seen)) == 1


def test_latency_has_a_variance_from_the_second_pass_on(case):
    here = case("mlp")
    telemetry = Telemetry(kasmina.host_of(here.model))
    first = by_name(measure(here, telemetry=telemetry))["0"]
    assert first.latency_mean > 0
    assert first.throughput == pytest.approx(16 / first.latency_mean, rel=1e-5)
    assert not first.HasField("latency_variance")
    later = {}
    for _ in range(TURNS):
        later.update(by_name(measure(here, telemetry=telemetry)))
    assert later["0"].HasField("latency_variance")


def test_what_was_not_measured_is_absent(case):
    here = case("mlp")
    sample = measure(here, backward=False)
    signal = by_name(sample)["0"]
    assert signal.HasField("activation_mean")
    for name in ("gradient_norm", "gradient_to_weight", "vanishing_fraction", "expressivity_bottleneck"):
        assert not signal.HasField(name)
    assert not sample.places


def test_nothing_is_measured_without_gradients(case):
    here = case("mlp")
    telemetry = Telemetry(kasmina.host_of(here.model))
    telemetry.arm()
    with torch.no_grad():
        here.model(*here.inputs)
    assert not telemetry.collect(None).layers


def test_a_diverged_host_reports_no_number_that_is_none(case):
    here = case("mlp")
    with torch.no_grad():
        here.model[0].weight[0, 0] = math.inf
    sample = measure(here)
    assert sample.train_loss is None
    for signal in sample.layers:
        assert all(math.isfinite(value) for field, value in signal.ListFields() if field.name != "layer")
        assert not signal.HasField("gradient_norm")
        assert signal.exploding_fraction > 0
    for place in sample.places:
        assert all(math.isfinite(value) for _, value in place.ListFields())


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_no_number_is_absent(case, loss):
    here = case("mlp")
    telemetry = Telemetry(kasmina.host_of(here.model))
    telemetry.arm()
    assert telemetry.collect(loss).train_loss is None


def test_a_loss_may_be_a_float(case):
    telemetry = Telemetry(kasmina.host_of(case("mlp").model))
    telemetry.arm()
    assert telemetry.collect(0.25).train_loss == 0.25


def test_an_input_of_zeros_is_survived(case):
    here = case("mlp")
    here.inputs = (torch.zeros_like(here.inputs[0]),)
    signal = by_name(measure(here))["0"]
    assert not signal.HasField("input_autocorrelation")
    assert not signal.HasField("effective_rank")
    assert not signal.HasField("expressivity_bottleneck")


def test_a_batch_of_one_is_measured_as_far_as_it_goes(case):
    here = case("mlp")
    here.inputs, here.labels = (here.inputs[0][:1],), here.labels[:1]
    signal = by_name(measure(here))["0"]
    assert signal.HasField("activation_mean")
    assert not signal.HasField("effective_rank")
    assert not signal.HasField("expressivity_bottleneck")


def test_only_the_first_pass_of_a_step_is_measured(case):
    here = case("mlp")
    telemetry = Telemetry(kasmina.host_of(here.model))
    telemetry.arm()
    first = here.model[0](here.inputs[0]).mean().item()
    here.loss().backward()
    here.loss().backward()
    assert by_name(telemetry.collect(None))["0"].activation_mean == pytest.approx(first, rel=1e-4)


def test_large_batches_and_layers_are_sampled():
    model = nn.Sequential(nn.Linear(3000, 8), nn.ReLU(), nn.Linear(8, 2000))
    kasmina.wrap(model, torch.randn(2, 3000))
    telemetry = Telemetry(kasmina.host_of(model))
    telemetry.arm()
    model(torch.randn(500, 3000)).square().mean().backward()
    sample = telemetry.collect(None)
    assert len(sample.layers) == 2
    for signal in sample.layers:
        assert 0 <= signal.expressivity_bottleneck <= 1
        assert 0 < signal.effective_rank <= 1


def test_narrow_layers_show_a_larger_bottleneck():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    kasmina.wrap(model, torch.randn(4, 20))
    telemetry = Telemetry(kasmina.host_of(model))
    telemetry.arm()
    functional.cross_entropy(model(torch.randn(64, 20)), torch.randint(0, 5, (64,))).backward()
    signals = by_name(telemetry.collect(None))
    assert signals["4"].expressivity_bottleneck > 1.5 * signals["0"].expressivity_bottleneck


def test_gradients_of_seeds_are_measured(case):
    here = case("mlp")
    host = kasmina.host_of(here.model)
    seed = kasmina.Grafter(host, here.optimizer).germinate("mlp", "0", "2", 500, seed_id="s")
    sample = measure(here)
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in seed.body.parameters()))
    assert sample.seed_gradient_norms == {"s": pytest.approx(expected, rel=1e-4)}


def test_half_precision_is_measured(case):
    here = case("mlp")
    here.model.bfloat16()
    here.inputs = (here.inputs[0].bfloat16(),)
    sample = measure(here)
    assert len(sample.layers) == 4
    assert sample.train_loss is not None
    assert all(signal.HasField("expressivity_bottleneck") for signal in sample.layers)
