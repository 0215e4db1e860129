"""What Tamiyo lets a session know, and what the session lets its user know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from esperml import kasmina
from esperml.settings import TamiyoSettings
from esperml.tamiyo.controller import Controller
from esperml.tamiyo.store import PolicyStore
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, run_pb2, runs_pb2

LIMITS = graph_pb2.RunLimits(warmup_steps=5, decision_interval_steps=5, parameter_budget=500)


@pytest.fixture
def controller(tmp_path):
    settings = TamiyoSettings(policy="chance", policy_dir=tmp_path, random_seed=1, command_ttl_steps=40)
    return Controller(PolicyStore.from_settings(settings), settings)


def connect(here, link, **kwargs):
    kwargs = {"run": "r", "mode": "act", "report_every": 5, "limits": LIMITS, "overhead_ceiling": None, **kwargs}
    return kasmina.connect(link, here.model, here.optimizer, **kwargs)


def train(here, session, steps, **told):
    for _ in range(steps):
        here.step(session, **told)


class Bus:
    """What the controller publishes reaches every link, each when it next says something, as on a real bus."""

    def __init__(self, controller):
        self.controller = controller
        self.boxes = []

    def link(self):
        box = []
        self.boxes.append(box)

        def handle(kind, event):
            answers = self.controller.handle(kind, event)
            for each in self.boxes:
                each += answers
            got, box[:] = list(box), []
            return got

        return kasmina.LocalLink(handle)


def test_two_sessions_under_one_run_are_told_apart_and_told(case, controller):
    one, two, bus = case("mlp"), case("mlp"), Bus(controller)
    first = connect(one, bus.link(), mode="observe")
    train(one, first, 10)
    second = connect(two, bus.link(), mode="observe")
    train(two, second, 5)
    with capture_logs() as logs:
        train(one, first, 20)
        train(two, second, 5)
    assert "another session began under run 'r'" in str(first.summary())
    assert "an earlier session was still at work under run 'r'" in str(second.summary())
    assert [entry["event"] for entry in logs].count("session_remark") == 2
    assert first.summary().reports == 3
    assert controller.run("r").step == 10
    first.close()
    assert controller.run("r").status == runs_pb2.RUN_STATUS_RUNNING
    train(two, second, 5)
    assert controller.run("r").step == 15


def test_a_superseded_session_trains_on_and_its_seeds_go_on_to_blend(case, bench, germination):
    here = case("mlp")
    with connect(here, bench.link) as session:
        bench.waiting = [germination("0", "2", blend_steps=10)]
        train(here, session, 6)
        bench.notices = [run_pb2.Notice(code=run_pb2.NOTICE_CODE_SUPERSEDED, text="this one is over")]
        train(here, session, 5)
        said = len(bench.events)
        bench.waiting = [germination("2", "4", decision_id="d-2")]
        train(here, session, 20)
    [seed] = kasmina.host_of(here.model).seeds.values()
    assert seed.alpha == 1
    assert len(bench.events) == said
    assert session.summary().remarks == ("this one is over",)
    assert session.failure == ""


def test_what_is_for_another_session_is_left_alone(case, bench, germination):
    here = case("mlp")
    link = kasmina.LocalLink(
        lambda _kind, event: [
            (
                event_pb2.KIND_COMMANDS,
                event_pb2.Event(run_id="r", session_id="another", command=germination("0", "2")),
            )
        ]
    )
    with connect(here, link) as session:
        train(here, session, 10)
    assert session.decisions_applied == 0
    assert session.summary().actions == ()


def test_what_was_proposed_to_a_superseded_session_waits_no_more(case, bench):
    here = case("mlp")
    decisions = [
        decision_pb2.AdaptationDecision(decision_id=name, disposition=disposition, reason="widen 0", **expiry)
        for name, disposition, expiry in (
            ("waits", decision_pb2.DISPOSITION_PENDING, {}),
            ("waits a while", decision_pb2.DISPOSITION_PENDING, {"expires_after_step": 1000}),
            ("expired", decision_pb2.DISPOSITION_PENDING, {"expires_after_step": 1}),
            ("vetoed", decision_pb2.DISPOSITION_VETOED, {}),
        )
    ]
    with connect(here, bench.link, mode="advise") as session:
        bench.notices = [run_pb2.Notice(code=run_pb2.NOTICE_CODE_PROPOSED, decision=decision) for decision in decisions]
        train(here, session, 5)
        assert [proposal.pending for proposal in session.summary().proposals] == [True, True, False, False]
        bench.notices = [run_pb2.Notice(code=run_pb2.NOTICE_CODE_SUPERSEDED, text="this one is over")]
        train(here, session, 5)
        proposals = session.summary().proposals
    assert not any(proposal.pending for proposal in proposals)
    taken_over = "another session took over before it was approved"
    assert [proposal.fate for proposal in proposals] == [taken_over, taken_over, "expired after step 1", "vetoed"]


@pytest.mark.parametrize(("mode", "fate"), [("observe", "recorded only"), ("advise", "waits for approval until step")])
def test_the_summary_says_what_was_proposed(case, controller, mode, fate):
    here = case("mlp")
    with connect(here, kasmina.LocalLink(controller.handle), mode=mode) as session:
        assert "nothing was proposed." in str(session.summary())
        train(here, session, 30)
        summary = session.summary()
    assert summary.proposals
    text = str(summary)
    proposal = summary.proposals[-1]
    assert "what was proposed:" in text
    assert f"step {proposal.step}: {proposal.reason} ({fate}" in text
    assert proposal.decision_id in text
    assert ("Runs/ApproveDecision" in text) == (mode == "advise")


def test_the_summary_follows_what_becomes_of_a_proposal(case, controller):
    here, now = case("mlp"), event_pb2.Event().created_at
    sent = []
    link = kasmina.LocalLink(lambda kind, event: [*controller.handle(kind, event), *(sent.pop() if sent else [])])
    with connect(here, link, mode="advise") as session:
        while len(controller.pending("r")) < 2:
            train(here, session, 5)
        approved, vetoed = (decision.decision_id for decision in controller.pending("r")[:2])
        sent[:] = [[*controller.approve("r", approved, now), *controller.veto("r", vetoed, "not now", now)]]
        train(here, session, 5)
        fates = {proposal.decision_id: proposal.fate for proposal in session.summary().proposals}
        assert (fates[approved], fates[vetoed]) == ("approved", "vetoed")
        assert session.decisions_applied + session.decisions_refused == 1


def test_a_proposal_that_nobody_approved_expires(case, controller):
    here = case("mlp")
    with connect(here, kasmina.LocalLink(controller.handle), mode="advise") as session:
        while not controller.pending("r"):
            train(here, session, 5)
        controller.pause("r")
        train(here, session, 60)
    assert not any(proposal.pending for proposal in session.summary().proposals)
    assert "expired after step" in str(session.summary())


def test_in_act_mode_nothing_is_called_a_proposal(case, controller):
    here = case("mlp")
    with connect(here, kasmina.LocalLink(controller.handle)) as session:
        train(here, session, 30)
    assert "propos" not in str(session.summary())


@pytest.mark.parametrize("epoch", [-1, 1.5, 2**32, "two", torch.tensor(-3)])
def test_an_epoch_that_makes_no_sense_is_left_out_by_name_and_the_session_goes_on(case, bench, epoch):
    here = case("mlp")
    with capture_logs() as logs, connect(here, bench.link) as session:
        train(here, session, 5, epoch=0)
        train(here, session, 10, epoch=epoch)
    assert session.failure == ""
    assert len(bench.reports) == 3
    assert [report.epoch for report in bench.reports] == [0, 0, 0]
    assert [entry["event"] for entry in logs].count("session_remark") == 1
    assert f"epoch {epoch!r} is left out" in str(session.summary())


@pytest.mark.parametrize("epoch", [3, np.int64(3), torch.tensor(3), True])
def test_whatever_counts_as_a_whole_number_is_an_epoch(case, bench, epoch):
    here = case("mlp")
    with connect(here, bench.link) as session:
        train(here, session, 5, epoch=epoch)
    assert bench.reports[0].epoch == int(epoch)
    assert session.summary().remarks == ()


def test_a_notice_of_a_later_contract_is_passed_on(case, bench):
    here = case("mlp")
    with connect(here, bench.link) as session:
        bench.notices = [run_pb2.Notice(code=99, text="something new"), run_pb2.Notice(code=99, text="again")]
        train(here, session, 5)
        bench.other = [event_pb2.Event(run_id="r", decision=decision_pb2.AdaptationDecision())]
        train(here, session, 5)
    assert session.summary().remarks == ("something new",)
    assert session.failure == ""


def test_time_outside_training_counts_for_nobody(case, bench):
    here = case("mlp")
    with connect(here, bench.link) as session:
        train(here, session, 4)
        with session.untimed():
            end = torch.zeros(1)
            for _ in range(200_000):
                end = end + 1
        train(here, session, 1)
    measured = bench.reports[0].run
    assert measured.step_seconds < 0.05
    assert measured.overhead > 0
