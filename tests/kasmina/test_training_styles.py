"""A host in the ways that people train: mixed precision, accumulation, compiled, several at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from esperml import kasmina
from esperml.kasmina.compiling import AsWritten
from esperml.v1 import decision_pb2


def connect(here, bench, model=None, **kwargs):
    kwargs = {"run": "r", "mode": "act", "report_every": 5, "overhead_ceiling": None, **kwargs}
    return kasmina.connect(bench.link, here.model if model is None else model, here.optimizer, **kwargs)


def finish_step(here, session, loss):
    loss.backward()
    here.optimizer.step()
    session.step(loss=loss)
    here.optimizer.zero_grad()
    return loss.item()


def place_of(here):
    """The names of a place's two layers at which an MLP can grow."""
    host = kasmina.host_of(here.model)
    mlp = next(i for i, blueprint in enumerate(host.blueprints) if blueprint.name == "mlp")
    place = next(place for place in host.places if place.fitting >> mlp & 1)
    return host.layers[place.source].name, host.layers[place.target].name


def test_under_autocast_seeds_grow_and_train_and_all_is_measured(case, any_host, bench, germination):
    here = case(any_host)
    place = place_of(here)

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16):
            return functional.cross_entropy(here.model(*here.inputs).float(), here.labels)

    with connect(here, bench) as session:
        bench.waiting.append(germination(*place))
        for _ in range(5):
            finish_step(here, session, loss_of())
        (seed,) = kasmina.host_of(here.model).seeds.values()
        before = [p.detach().clone() for p in seed.body.parameters()]
        for _ in range(10):
            finish_step(here, session, loss_of())
    assert (session.failure, seed.errors) == ("", 0)
    assert any(not torch.equal(p, q) for p, q in zip(seed.body.parameters(), before, strict=True))
    assert all(p.dtype == torch.float32 for p in seed.body.parameters())
    assert len(bench.reports[0].layers) == len(kasmina.host_of(here.model).layers)
    assert all(layer.HasField("gradient_norm") for layer in bench.reports[0].layers)
    assert bench.reports[-1].seeds[0].gradient_norm > 0


def test_a_held_out_loss_under_autocast_leaves_training_as_it_was(case, bench):
    """A forward without gradients must not leave casts behind that the next training pass would use."""

    def losses(evaluate):
        here = case("mlp")
        with connect(here, bench, evaluate=evaluate, report_every=1) as session:
            found = []
            for _ in range(5):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = functional.cross_entropy(here.model(*here.inputs), here.labels)
                    loss.backward()
                    here.optimizer.step()
                    session.step(loss=loss)
                    here.optimizer.zero_grad()
                found.append(loss.item())
            return found

    assert losses(lambda model: case("mlp").evaluate(model)) == losses(None)


def test_a_step_of_many_batches_is_one_step(case, bench, germination):
    here = case("mlp")
    halves = [(here.inputs[0][half], here.labels[half]) for half in (slice(0, 8), slice(8, 16))]
    with connect(here, bench) as session:
        bench.waiting.append(germination("0", "2"))
        for _ in range(10):
            total = 0.0
            for x, y in halves:
                loss = functional.cross_entropy(here.model(x), y) / 2
                loss.backward()
                total += loss.item()
            here.optimizer.step()
            session.step(loss=total)
            here.optimizer.zero_grad()
    assert (session.failure, session.steps, len(bench.reports)) == ("", 10, 2)
    assert bench.reports[-1].run.train_loss == pytest.approx(total)
    assert bench.reports[0].layers[0].HasField("expressivity_bottleneck")
    assert bench.reports[1].seeds[0].gradient_norm > 0


def test_a_gradient_scaler_scales_the_newborn_too(case, bench, germination):
    here, plain = case("mlp"), case("mlp", wrapped=False)

    def train(it, session, steps):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        found = []
        for _ in range(steps):
            loss = it.loss()
            scaler.scale(loss).backward()
            scaler.unscale_(it.optimizer)
            torch.nn.utils.clip_grad_norm_(it.model.parameters(), 1.0)
            scaler.step(it.optimizer)
            scaler.update()
            if session is not None:
                session.step(loss=loss)
            it.optimizer.zero_grad()
            found.append(loss.item())
        return found

    with connect(here, bench) as session:
        assert train(here, session, 10) == train(plain, None, 10)
        bench.waiting.append(germination("0", "2"))
        train(here, session, 5)
        (seed,) = kasmina.host_of(here.model).seeds.values()
        before = [p.detach().clone() for p in seed.body.parameters()]
        train(here, session, 5)
    assert session.failure == ""
    assert any(not torch.equal(p, q) for p, q in zip(seed.body.parameters(), before, strict=True))
    assert bench.reports[-1].seeds[0].gradient_norm < 10  # Not 1024 times as large.


def test_validation_between_steps_changes_no_report(case, bench):
    def reports(validated):
        here, own = case("mlp"), type(bench)()
        with connect(here, own, report_every=1) as session:
            for _ in range(4):
                if validated:
                    here.model.eval()
                    with torch.no_grad():
                        here.model(*(x * 100 for x in here.inputs))
                    here.model.train()
                here.step(session)
        return [[(s.layer, s.activation_mean, s.gradient_norm) for s in report.layers] for report in own.reports]

    assert reports(validated=True) == reports(validated=False)


def test_several_models_in_one_process_know_nothing_of_each_other(case, bench, germination):
    one, other, alone = case("mlp"), case("conv"), case("mlp")
    theirs, lonely = type(bench)(), type(bench)()
    losses = []
    with connect(one, bench, run="one") as a, connect(other, theirs, run="other") as b:
        for step in range(20):
            if step == 3:
                bench.waiting.append(germination("0", "2"))
            torch.manual_seed(step)
            losses.append(one.step(a))
            other.step(b)
    expected = []
    with connect(alone, lonely, run="alone") as c:
        for step in range(20):
            if step == 3:
                lonely.waiting.append(germination("0", "2"))
            torch.manual_seed(step)
            expected.append(alone.step(c))
    assert losses == expected
    assert (a.decisions_applied, b.decisions_applied) == (1, 0)
    assert {event.run_id for _, event in theirs.events} == {"other"}


@pytest.mark.parametrize("places", [("2", "2"), ("0", "2")])
def test_a_compiled_host_is_measured_and_grows(case, bench, germination, on_seed, places):
    def train(it, own, model):
        losses = []
        with connect(it, own, model) as session:
            own.waiting.append(germination(*places, blend_steps=10))
            torch.manual_seed(3)
            for step in range(30):
                if step == 15:
                    own.waiting.append(on_seed(session.summary().seeds[0].seed_id, "d-2", cull=decision_pb2.Cull()))
                losses.append(finish_step(it, session, functional.cross_entropy(model(*it.inputs), it.labels)))
        assert (session.failure, session.decisions_applied) == ("", 2)
        assert not kasmina.host_of(model).seeds
        return losses

    plain, theirs = case("mlp"), type(bench)()
    expected = train(plain, theirs, plain.model)
    torch.compiler.reset()
    here, counter = case("mlp"), CompileCounterWithBackend("eager")
    assert train(here, bench, torch.compile(here.model, backend=counter)) == pytest.approx(expected, rel=1e-5)
    for report, uncompiled in zip(bench.reports, theirs.reports, strict=True):
        assert [signal.layer for signal in report.layers] == [signal.layer for signal in uncompiled.layers]
        assert all(signal.HasField("gradient_norm") for signal in report.layers)
        assert [s.gradient_norm for s in report.seeds] == pytest.approx([s.gradient_norm for s in uncompiled.seeds])
    # Once at first, once with the seed, once more each for an alpha that moves and for a count of what was left out,
    # once without the seed.
    assert counter.frame_count == 5
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_host_that_nothing_grows_in_is_compiled_once(case, bench):
    here, plain = case("conv"), case("conv", wrapped=False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(here.model, backend=counter)
    with connect(here, bench, compiled) as session:
        for _ in range(12):
            loss = functional.cross_entropy(compiled(*here.inputs), here.labels)
            assert finish_step(here, session, loss) == pytest.approx(plain.step(), rel=1e-5)
    assert counter.frame_count == 1
    assert len(bench.reports[0].layers) == 3


def test_code_runs_as_written_until_the_last_who_asked_for_it_has_gone():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: x + 1, backend=counter)
    one, other = AsWritten(), AsWritten()
    one.begin(), one.begin(), other.begin()
    compiled(torch.ones(2))
    one.end(), one.end()
    compiled(torch.ones(2))
    assert counter.frame_count == 0
    del other
    compiled(torch.ones(2))
    assert counter.frame_count == 1


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel])
def test_what_stands_around_a_model_is_refused_before_and_seen_through_after(case, around):
    plain, here = case("mlp", wrapped=False), case("mlp")
    with pytest.raises(kasmina.UnsupportedHostError, match="wrap the model inside"):
        kasmina.wrap(around(plain.model), plain.inputs)
    assert kasmina.host_of(around(here.model)).model is here.model
    assert isinstance(kasmina.unwrap(around(here.model)), nn.Module)
    with pytest.raises(kasmina.KasminaError, match="not wrapped"):
        kasmina.host_of(here.model)
