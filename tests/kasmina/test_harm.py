"""What must not happen to a user's training, nor to a report, because a session watches."""

from __future__ import annotations

import asyncio
import copy
import io
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from esperml import kasmina
from esperml.kasmina import blueprints, measures
from esperml.tamiyo.validate import check_report
from esperml.v1 import decision_pb2


def connect(here, bench, **kwargs):
    kwargs = {"run": "r", "mode": "act", "report_every": 1, "overhead_ceiling": None, **kwargs}
    return kasmina.connect(bench.link, here.model, here.optimizer, **kwargs)


def train(here, session, steps):
    for _ in range(steps):
        here.step(session)


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_wrapped_model_with_a_seed_can_be_saved_whole(case, bench, germination):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting.append(germination("2", "2"))
        train(here, session, 3)
    saved = io.BytesIO()
    torch.save(here.model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert torch.equal(loaded(*here.inputs), here.model(*here.inputs))
    assert list(kasmina.host_of(loaded).seeds) == list(kasmina.host_of(here.model).seeds)


def test_a_saved_model_asks_for_a_blueprint_that_is_not_registered(case):
    mine = kasmina.register(kasmina.Blueprint("mine", lambda _: False, lambda _, size: size, lambda *_: nn.Identity()))
    saved = io.BytesIO()
    torch.save(case("mlp").model, saved)
    saved.seek(0)
    kasmina.unregister(mine.name)
    with pytest.raises(kasmina.KasminaError, match=r"'mine'.*register it before loading"):
        torch.load(saved, weights_only=False)
    assert copy.deepcopy(mine) is mine
    assert blueprints.MLP in blueprints.registered()


def test_a_copy_of_a_watched_model_lets_go_of_its_hooks_when_it_runs(case, bench):
    here = case("mlp")
    with connect(here, bench) as session:
        twin = copy.deepcopy(here.model)
        assert hooks_of(twin)
        twin(*here.inputs).sum().backward()
        assert hooks_of(twin) == 0
        train(here, session, 2)
    assert len(bench.reports[0].layers) == 4
    assert hooks_of(here.model) == 0


def test_no_seed_is_planted_under_a_scheduler_that_was_not_given(case, bench, germination):
    here = case("mlp")
    scheduler = lr_scheduler.LambdaLR(here.optimizer, lambda epoch: 0.9**epoch)
    with connect(here, bench) as session:
        bench.waiting.append(germination("2", "2"))
        for _ in range(4):
            here.step(session)
            scheduler.step()
    assert bench.applied[0].status == decision_pb2.COMMAND_STATUS_REFUSED
    assert "scheduler=" in bench.applied[0].reason
    assert session.failure == ""


@pytest.mark.parametrize("moved", [True, False])
def test_a_seed_leaves_whatever_group_its_parameters_are_in(case, bench, germination, on_seed, moved):
    here = case("mlp")
    with connect(here, bench) as session:
        bench.waiting.append(germination("2", "2"))
        train(here, session, 2)
        first, second = here.optimizer.param_groups
        if moved:
            first["params"] += second["params"]
        here.optimizer.param_groups.remove(second)
        host = kasmina.host_of(here.model)
        bench.waiting.append(on_seed(next(iter(host.seeds)), "d-2", cull=decision_pb2.Cull()))
        train(here, session, 2)
    assert session.failure == ""
    assert not host.seeds
    assert [len(group["params"]) for group in here.optimizer.param_groups] == [8]


class RateFree(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        return None


@pytest.mark.parametrize("rate", [None, -0.1, float("nan")])
def test_a_learning_rate_that_makes_no_sense_is_left_out(case, bench, rate):
    here = case("mlp")
    if rate is None:
        here.optimizer = RateFree(here.model.parameters())
    else:
        here.optimizer.param_groups[0]["lr"] = rate
    with connect(here, bench) as session:
        session.step(loss=torch.tensor(3))
    assert session.failure == ""
    assert not bench.reports[0].run.HasField("learning_rate")
    assert bench.reports[0].run.train_loss == 3


def test_overhead_stands_still_once_the_session_is_closed(case, bench):
    here = case("mlp")
    with connect(here, bench) as session:
        train(here, session, 3)
    assert session.summary().overhead == session.summary().overhead > 0


def test_a_link_that_is_closed_before_its_thread_works_ends(unused_port, monkeypatch):
    go = threading.Event()
    run = kasmina.GrpcLink._run

    def late(self):
        go.wait()
        run(self)

    monkeypatch.setattr(kasmina.GrpcLink, "_run", late)
    link = kasmina.GrpcLink(f"127.0.0.1:{unused_port}", "r")
    link._call_soon(link._cancel)
    closing = threading.Thread(target=link.close, args=(0.0,), daemon=True)
    closing.start()
    go.set()
    closing.join(10)
    assert not closing.is_alive()


@pytest.mark.parametrize(("value", "told"), [(3e38, True), (1e39, False), (-1e39, False), (float("nan"), False)])
def test_what_32_bits_cannot_hold_is_not_told(value, told):
    assert measures.representable(value) is told


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 140),
    scale=st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e6, 1e15, 1e25, 1e38, float("inf"), float("nan")]),
    gradient=st.sampled_from([0.0, 1e-30, 1.0, 1e20, 1e37]),
    constant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_report_of_any_host_is_one_that_tamiyo_takes(widths, batch, scale, gradient, constant, seed):
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip([5, *widths], [*widths, 3], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    x = torch.ones(batch, 5) if constant else torch.randn(batch, 5)
    kasmina.wrap(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    events = []
    link = kasmina.LocalLink(lambda _kind, event: events.append(event) or [])
    with kasmina.connect(
        link, model, optimizer, run="r", report_every=1, evaluate=lambda model: model(x * scale).sum()
    ) as session:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x * scale).sum() * gradient
            loss.backward()
            optimizer.step()
            session.step(loss=loss)
    assert session.failure == ""
    graph = events[0].run_started.graph
    reports = [event.health_report for event in events if event.HasField("health_report")]
    assert len(reports) == 3
    for report in reports:
        check_report(report, graph)


async def test_frames_share_what_comes_in_quick_succession(bus, monkeypatch):
    from esperml.client import OonaClient, new_event
    from esperml.v1 import event_pb2, run_pb2

    frames = []
    publish = OonaClient.publish

    async def counted(self, kind, events, **kwargs):
        frames.append(len(events))
        return await publish(self, kind, events, **kwargs)

    monkeypatch.setattr(OonaClient, "publish", counted)

    def say():
        link = kasmina.GrpcLink(bus.target, "r")
        for epoch in range(50):
            link.publish(event_pb2.KIND_EVENTS, new_event("r", epoch_completed=run_pb2.EpochCompleted(epoch=epoch)))
        link.close(30)
        return link.statistics()

    statistics = await asyncio.to_thread(say)
    assert sum(frames) == 50
    assert len(frames) < 5
    assert statistics.connected
    assert statistics.sender_seconds > 0


def test_losses_beyond_32_bits_do_not_spoil_a_report(case, bench):
    here = case("mlp")
    with connect(here, bench, evaluate=lambda _model: 1e39) as session:
        session.step(loss=1e39)
    assert session.failure == ""
    check_report(bench.reports[0], bench.payloads("run_started")[0].graph)
    assert not bench.reports[0].run.HasField("held_out_loss")
    assert not bench.reports[0].run.HasField("train_loss")
