"""Seeds and places together, under commands, steps and roll-backs in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from esperml import kasmina
from esperml.kasmina import stages
from esperml.v1 import decision_pb2, graph_pb2

PLACES = [("0", "0"), ("2", "2"), ("0", "2")]


def host_and_grafter(embargo=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    kasmina.wrap(model, torch.randn(2, 4))
    host = kasmina.host_of(model)
    host.resting.steps = embargo
    return host, kasmina.Grafter(host, torch.optim.SGD(model.parameters(), 0.1))


class Life(RuleBasedStateMachine):
    """What the host says of its seeds and places is what a plain model of them says."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.step_number = 0
        self.rests_until: dict[int, int] = {}

    @initialize(embargo=st.integers(0, 4))
    def begin(self, embargo) -> None:
        self.embargo = embargo
        self.host, self.grafter = host_and_grafter(embargo)
        self.x = torch.randn(3, 4)

    def _seed(self, data) -> kasmina.Seed:
        return self.host.seeds[data.draw(st.sampled_from(sorted(self.host.seeds)))]

    @rule(place=st.integers(0, 2), blend=st.integers(0, 3), train=st.integers(0, 3), schedule=st.integers(0, 3))
    def germinate(self, place, blend, train, schedule) -> None:
        number = self.host.place_index(*PLACES[place])
        before, version = self.host.stage(number), self.host.structure_version
        self.count += 1

        def ask():
            return self.grafter.germinate(
                "mlp",
                *PLACES[place],
                40,
                seed_id=f"s{self.count}",
                blend_steps=blend,
                train_steps=train,
                schedule=schedule,
            )

        if before == stages.DORMANT:
            output = self.host.model(self.x)
            assert ask().stage == self.host.stage(number) == stages.GERMINATED
            torch.testing.assert_close(self.host.model(self.x), output, atol=1e-6, rtol=0)
        else:
            with pytest.raises(kasmina.RefusedError, match=stages.stage_name(before)):
                ask()
            assert (self.host.stage(number), self.host.structure_version) == (before, version)

    @rule()
    def step(self) -> None:
        before = {name: seed.stage for name, seed in self.host.seeds.items()}
        self.grafter.advance()
        self.step_number += 1
        moves = {(t.source, t.target) for t in stages.TRANSITIONS if t.automatic}
        for name, seed in self.host.seeds.items():
            assert seed.stage == before[name] or (before[name], seed.stage) in moves

    @precondition(lambda self: self.host.seeds)
    @rule(data=st.data(), end=st.sampled_from([stages.CULLED, stages.ROLLED_BACK]))
    def remove(self, data, end) -> None:
        seed = self._seed(data)
        if seed.live or end == stages.ROLLED_BACK:
            self.host.uproot(seed, end)
            self.grafter.surgery.leave(seed.body)
            assert seed.stage == end
            if self.embargo:
                self.rests_until[seed.place] = self.step_number + self.embargo
        else:
            with pytest.raises(kasmina.RefusedError, match="from fossilised to culled"):
                self.grafter.cull(seed.seed_id)

    @precondition(lambda self: self.host.seeds)
    @rule(data=st.data())
    def fossilise(self, data) -> None:
        seed = self._seed(data)
        if seed.stage == stages.HOLDING and seed.alpha == 1:
            self.grafter.fossilise(seed.seed_id)
            assert seed.stage == stages.FOSSILISED
        else:
            with pytest.raises(kasmina.RefusedError, match="a seed"):
                self.grafter.fossilise(seed.seed_id)

    @precondition(lambda self: self.host.seeds)
    @rule(data=st.data(), alpha=st.floats(0, 1))
    def set_alpha(self, data, alpha) -> None:
        seed = self._seed(data)
        if seed.live:
            self.grafter.set_alpha(seed.seed_id, alpha)
            assert seed.steps_to_train == 0
        else:
            with pytest.raises(kasmina.RefusedError, match="its alpha is fixed"):
                self.grafter.set_alpha(seed.seed_id, alpha)

    @invariant()
    def every_place_is_in_one_stage(self) -> None:
        if not hasattr(self, "host"):
            return
        for number in range(len(self.host.places)):
            seed = self.host.occupant(number)
            rests = self.step_number < self.rests_until.get(number, 0)
            wanted = seed.stage if seed else stages.EMBARGOED if rests else stages.DORMANT
            assert self.host.stage(number) == wanted
        for seed in self.host.seeds.values():
            assert 0 <= seed.alpha <= 1
            assert (seed.stage in {stages.TRAINING, stages.GERMINATED}) or seed.steps_to_train == 0
            assert seed.alpha == 0 or seed.steps_to_train == 0
            assert seed.stage != stages.FOSSILISED or seed.alpha == 1


Life.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
test_seeds_and_places_never_leave_the_table = Life.TestCase


def test_a_culled_place_is_embargoed_for_as_long_as_the_run_says(case, bench, germination, on_seed):
    here = case("mlp")
    limits = graph_pb2.RunLimits(embargo_steps=3)
    with kasmina.connect(
        bench.link, here.model, here.optimizer, run="r", mode="act", report_every=1, limits=limits
    ) as s:
        bench.waiting.append(germination("2", "2"))
        here.step(s)
        bench.waiting.append(on_seed(bench.applied[0].seed_id, "d-2", cull=decision_pb2.Cull()))
        here.step(s)
        for attempt in range(3, 8):
            bench.waiting.append(germination("2", "2", decision_id=f"d-{attempt}"))
            here.step(s)
    assert s.failure == ""
    told = [(a.status == decision_pb2.COMMAND_STATUS_APPLIED, a.reason) for a in bench.applied]
    assert [applied for applied, _ in told] == [True, True, False, False, True, False, False]
    assert told[2][1] == "the place is embargoed for another 2 steps, since a seed was removed there"
    assert "the place holds seed" in told[5][1]


def test_what_was_refused_after_all_leaves_its_place_as_it_was():
    host, grafter = host_and_grafter(embargo=5)

    def refuse(_seed):
        raise kasmina.RefusedError("not wanted")

    with pytest.raises(kasmina.RefusedError, match="not wanted"):
        grafter.germinate("mlp", "0", "2", 40, seed_id="s", accept=refuse)
    assert host.stage(host.place_index("0", "2")) == stages.DORMANT


def test_a_schedule_that_is_not_known_is_refused():
    _, grafter = host_and_grafter()
    with pytest.raises(kasmina.RefusedError, match=r"germinate\.schedule 9 is not known here"):
        grafter.germinate("mlp", "0", "2", 40, seed_id="s", schedule=9)
