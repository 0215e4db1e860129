"""The life of a seed, as its one table says."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from esperml.kasmina import RefusedError, Seed, stages
from esperml.kasmina.stages import SeedFacts
from esperml.v1 import health_pb2

ALL = tuple(stage for stage in health_pb2.SeedStage.values() if stage)


class SeedLife(RuleBasedStateMachine):
    """Steps and commands in any order never leave the table."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = Seed("s", 0, "none", nn.Identity(), blend_steps=3)
        self.before = self.seed.stage

    def _ask(self, stage) -> None:
        facts, before = self.seed.facts, self.seed.stage
        allowed = any(t.source == before and t.target == stage and t.opens(facts) for t in stages.TRANSITIONS)
        if allowed:
            self.seed.enter(stage)
            assert self.seed.stage == stage
            assert self.seed.steps_in_stage == 0
        else:
            with pytest.raises(RefusedError, match="seed"):
                self.seed.enter(stage)
            assert self.seed.stage == before

    @rule()
    def step(self) -> None:
        before = self.seed.stage
        self.seed.advance()
        moves = {(t.source, t.target) for t in stages.TRANSITIONS if t.automatic}
        assert before == self.seed.stage or (before, self.seed.stage) in moves

    @rule(stage=st.sampled_from(ALL))
    def command(self, stage) -> None:
        self._ask(stage)

    @precondition(lambda self: self.seed.live)
    @rule(alpha=st.floats(0, 1))
    def hold(self, alpha) -> None:
        self.seed.alpha, self.seed.held = alpha, True

    @invariant()
    def alpha_is_a_share(self) -> None:
        assert 0 <= self.seed.alpha <= 1

    @invariant()
    def a_fossil_counts_in_full(self) -> None:
        assert self.seed.stage != stages.FOSSILISED or self.seed.alpha == 1


SeedLife.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
test_any_order_of_steps_and_commands_stays_within_the_table = SeedLife.TestCase


def test_a_seed_left_alone_blends_and_then_holds():
    seed = Seed("s", 0, "none", nn.Identity(), blend_steps=4)
    seen = [(stages.stage_name(seed.stage), seed.alpha)]
    for _ in range(5):
        seed.advance()
        seen.append((stages.stage_name(seed.stage), seed.alpha))
    assert seen == [
        ("germinated", 0.25),
        ("blending", 0.5),
        ("blending", 0.75),
        ("holding", 1.0),
        ("holding", 1.0),
        ("holding", 1.0),
    ]


def test_without_blending_a_seed_holds_after_one_step():
    seed = Seed("s", 0, "none", nn.Identity(), blend_steps=0)
    assert (seed.alpha, seed.stage) == (1.0, stages.GERMINATED)
    seed.advance()
    assert seed.stage == stages.HOLDING


def test_a_refusal_names_the_gate():
    with pytest.raises(RefusedError, match=r"from holding to fossilised only with alpha at 1; it has alpha 0\.5"):
        stages.check(stages.HOLDING, stages.FOSSILISED, SeedFacts(alpha=0.5, steps_in_stage=3))


def test_every_stage_but_the_ends_has_a_way_on():
    for stage in ALL:
        ways = [t for t in stages.TRANSITIONS if t.source == stage]
        assert ways
        assert {t.target for t in ways} == {stages.ROLLED_BACK} or stage != stages.FOSSILISED


def test_a_fossil_stays_one_and_its_age_is_counted():
    seed = Seed("s", 0, "none", nn.Identity(), blend_steps=0)
    seed.advance()
    seed.enter(stages.FOSSILISED)
    seed.advance()
    assert (seed.stage, seed.alpha, seed.steps_in_stage) == (stages.FOSSILISED, 1, 1)
