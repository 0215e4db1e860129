import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.settings import TamiyoSettings
from esperml.tamiyo import lifecycle, limits, rules
from esperml.tamiyo.engine import Options, decide, set_urgency
from esperml.tamiyo.policies import ChancePolicy, GcnPolicy, PolicyFacts, Scores
from esperml.tamiyo.rewards import LossCurve, paired_reward
from esperml.tamiyo.rules import Situation
from esperml.tamiyo.view import StateView
from esperml.v1 import decision_pb2, graph_pb2, health_pb2

VOCABULARY = ("low_rank", "mlp", "gate")


def situation(tools, **changes):
    state = changes.pop("state", None) or tools.state()
    return Situation(**{"view": StateView(state), "vocabulary": None, "health_threshold": 1.0, **changes})


def findings(masked):
    return {finding.rule: finding for finding in masked.findings}


def living(place=0, stage=health_pb2.SEED_STAGE_BLENDING, **values):
    return health_pb2.SeedSignal(seed_id=f"s{place}", place=place, stage=stage, **values)


def test_without_cause_nothing_is_masked(tools):
    masked = rules.apply_masks(situation(tools))
    assert masked.findings == []
    assert list(masked.mask.blueprints) == [7, 7, 7, 7, 3, 3, 3]


def paused(s):
    return replace(s, paused=True)


def too_early(s):
    s.state.step = 50
    return s


def too_late(s):
    s.state.limits.last_germination_step = 400
    return s


def too_many(s):
    s.state.seeds.extend([living(0), living(1)])
    return s


def too_dear(s):
    s.state.seeds.append(living(0, parameters=1000))
    return s


def forbidden(s):
    s.state.mask.SetInParent()
    return s


@pytest.mark.parametrize(
    ("change", "rule", "figure"),
    [
        (paused, "paused", "paused"),
        (too_early, "warm_up", "50"),
        (too_late, "last_germination", "400"),
        (too_many, "live_seeds", "2 seeds"),
        (too_dear, "parameter_budget", "0 of 1000"),
        (forbidden, "caller_mask", "own mask"),
    ],
)
def test_a_rule_that_takes_everything_says_why_with_the_figures(tools, change, rule, figure):
    masked = rules.apply_masks(change(situation(tools)))
    assert not masked.mask.may_adapt
    assert not masked.mask.blueprints
    finding = findings(masked)[rule]
    assert figure in finding.reason
    assert finding.choices_masked == 18
    assert finding.effect == decision_pb2.RULE_EFFECT_MASKED


def test_a_place_that_holds_a_seed_or_waits_for_one_is_occupied(tools):
    about = situation(tools, waiting=frozenset({2}))
    about.state.seeds.append(living(1, stage=health_pb2.SEED_STAGE_FOSSILISED))
    about.state.seeds.append(living(4, stage=health_pb2.SEED_STAGE_CULLED))
    masked = rules.apply_masks(about)
    assert list(masked.mask.blueprints) == [7, 0, 0, 7, 3, 3, 3]
    assert findings(masked)["occupied"].choices_masked == 6


def test_a_place_rests_until_its_embargo_is_over(tools):
    masked = rules.apply_masks(situation(tools, embargo={0: 600, 1: 500}))
    assert list(masked.mask.blueprints) == [0, 7, 7, 7, 3, 3, 3]
    assert "600" in findings(masked)["embargo"].reason


def test_a_layer_of_which_nothing_is_known_is_not_judged(tools):
    about = situation(tools)
    for name in rules.EVIDENCE:
        if getattr(about.state.layers, name).values:
            getattr(about.state.layers, name).absent.append(3)
    masked = rules.apply_masks(about)
    assert list(masked.mask.blueprints) == [7, 7, 7, 0, 3, 3, 0]
    assert "1 layers" in findings(masked)["unmeasured"].reason


def test_healthy_layers_are_left_alone_and_unknown_health_is_not_taken_for_health(tools):
    about = situation(tools, health_threshold=0.75)
    for name in ("dead_fraction", "expressivity_bottleneck"):
        getattr(about.state.layers, name).absent.append(1)
    masked = rules.apply_masks(about)
    assert list(masked.mask.blueprints) == [0, 7, 7, 7, 3, 3, 3]
    assert "0.75" in findings(masked)["healthy"].reason


def test_blueprints_that_the_policy_does_not_know_are_masked(tools):
    masked = rules.apply_masks(situation(tools, vocabulary=("mlp", "conv")))
    assert list(masked.mask.blueprints) == [2] * 7
    assert "low_rank, gate" in findings(masked)["unknown_blueprint"].reason


def test_a_finding_counts_only_what_no_rule_before_it_took(tools):
    masked = rules.apply_masks(situation(tools, paused=True, embargo={0: 600}))
    assert list(findings(masked)) == ["paused"]


def test_what_is_reserved_for_commands_under_way_is_not_given_twice(tools):
    assert situation(tools, reserved=900).graft_budget == 100
    assert situation(tools).graft_budget == 400


@given(
    bits=st.lists(st.integers(0, 7), min_size=7, max_size=7),
    embargo=st.dictionaries(st.integers(0, 6), st.integers(0, 1000)),
    waiting=st.frozensets(st.integers(0, 6), max_size=1),
    threshold=st.floats(0, 1),
)
def test_masks_only_ever_take_away_and_count_what_they_take(tools, bits, embargo, waiting, threshold):
    state = tools.state()
    state.graph.places.blueprints[:] = bits
    masked = rules.apply_masks(
        Situation(StateView(state), ("mlp", "gate"), threshold, embargo=embargo, waiting=waiting)
    )
    left = list(masked.mask.blueprints) or [0] * 7
    assert all(now & ~before == 0 for now, before in zip(left, bits, strict=True))
    taken = sum(before.bit_count() - now.bit_count() for now, before in zip(left, bits, strict=True))
    assert taken == sum(finding.choices_masked for finding in masked.findings)
    assert masked.mask.may_adapt == any(left)


def test_the_documentation_lists_every_rule(request):
    text = (request.config.rootpath / "docs" / "rules.md").read_text()
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert listed == [rule.__name__ for rule in rules.MASKS] + ["confidence"]


# The engine.


class Fixed:
    """A policy that always says the same."""

    def __init__(self, adapt, places, blueprints, **facts):
        self.scores = Scores(adapt, np.array(places), np.array(blueprints), 0.25)
        self.facts = PolicyFacts(
            **{"name": "fixed", "version": "1", "kind": "fixed", "vocabulary": VOCABULARY, **facts}
        )

    def judge(self, view, vocabulary):
        return self.scores


def fixed(adapt, **facts):
    return Fixed(
        adapt, [0.1, 0, 0, 0, 0, 0.7, 0.2], [[0.5, 0.25, 0.25]] + [[0.0] * 3] * 4 + [[0.2, 0.8, 0.0]] * 2, **facts
    )


def settle(tools, policy, *, sample=False, threshold=0.5, seed=0, **changes):
    options = Options(sample, threshold, decision_pb2.MODE_ACT, ttl_steps=100)
    return decide(situation(tools, **changes), policy, options, "id", np.random.default_rng(seed))


def test_the_most_probable_choice_is_taken_with_certainty(tools):
    verdict = settle(tools, fixed(0.8))
    decision = verdict.decision
    assert verdict.choice == (5, 1)
    assert (decision.target.source_layer, decision.target.target_layer) == ("layer1", "layer2")
    assert decision.action.germinate.blueprint == "mlp"
    assert decision.action.germinate.parameter_budget == 400
    assert decision.action.germinate.blend_steps == 20
    assert decision.expires_after_step == 600
    assert decision.propensity.joint_log_probability == 0
    assert decision.propensity.effective_none_probability == 0
    assert decision.confidence == pytest.approx(0.8)
    assert decision.value_estimate == pytest.approx(0.25)
    assert decision.urgency == pytest.approx(1 - verdict_health(tools), abs=1e-5)
    assert decision.priority == pytest.approx(decision.confidence * decision.urgency)
    assert "mlp" in decision.reason
    assert "0.80" in decision.reason
    assert verdict.state.mask.may_adapt


def verdict_health(tools):
    return float(situation(tools).health[2])


def test_doing_nothing_is_a_decision_with_a_propensity(tools):
    decision = settle(tools, fixed(0.3)).decision
    assert decision.action.WhichOneof("kind") == "none"
    assert decision.disposition == decision_pb2.DISPOSITION_NONE
    assert decision.propensity.effective_none_probability == 1
    assert not decision.propensity.HasField("place_log_probability")
    assert decision.confidence == pytest.approx(0.7)
    assert "0.30" in decision.reason


def test_an_unsure_adaptation_is_held_back_and_says_so(tools):
    decision = settle(tools, fixed(0.6), threshold=0.9).decision
    assert decision.disposition == decision_pb2.DISPOSITION_SUPPRESSED
    assert decision.propensity.effective_none_probability == 1
    assert decision.rules[-1].rule == "confidence"
    assert decision.reason.startswith("Held back")
    assert decision.action.germinate.blueprint == "mlp"


def test_the_threshold_does_not_bind_policies_that_always_draw(tools):
    verdict = settle(tools, fixed(1.0, always_draws=True), threshold=1.0)
    assert not verdict.decision.disposition
    assert verdict.decision.propensity.joint_log_probability < 0


def test_draws_follow_the_recorded_propensities(tools):
    policy, counts = fixed(0.4), {}
    for seed in range(400):
        verdict = settle(tools, policy, sample=True, threshold=0.0, seed=seed)
        counts[verdict.choice] = counts.get(verdict.choice, 0) + 1
        propensity = verdict.decision.propensity
        expected = (
            0.6
            if verdict.choice is None
            else (0.4 * policy.scores.places[verdict.choice[0]] * policy.scores.blueprints[verdict.choice])
        )
        assert math.exp(propensity.joint_log_probability) == pytest.approx(expected, rel=1e-4)
        assert propensity.effective_none_probability == pytest.approx(0.6)
    assert counts[None] / 400 == pytest.approx(0.6, abs=0.08)
    assert counts[5, 1] / 400 == pytest.approx(0.4 * 0.7 * 0.8, abs=0.07)
    assert all(choice is None or policy.scores.blueprints[choice] > 0 for choice in counts)


def test_where_the_masks_leave_nothing_the_reason_names_them(tools, network):
    for policy in (ChancePolicy("chance", 0.5), GcnPolicy("gcn", network, "v")):
        decision = settle(tools, policy, paused=True).decision
        assert decision.action.WhichOneof("kind") == "none"
        assert decision.propensity.effective_none_probability == 1
        assert "the run is paused" in decision.reason


def test_a_host_without_places_is_left_alone(tools):
    about = situation(tools)
    about.state.graph.ClearField("places")
    about.state.ClearField("places")
    options = Options(True, 0.5, decision_pb2.MODE_ACT, ttl_steps=0)
    decision = decide(about, ChancePolicy("chance", 1.0), options, "id", np.random.default_rng(0)).decision
    assert "no place" in decision.reason


def test_urgency_is_absent_where_health_is_not_known():
    decision = decision_pb2.AdaptationDecision(confidence=0.5)
    set_urgency(decision, math.nan)
    assert not decision.HasField("urgency")
    assert decision.priority == pytest.approx(0.5)
    nothing = decision_pb2.AdaptationDecision()
    set_urgency(nothing, math.nan)
    assert not nothing.HasField("priority")


# What becomes of seeds.

LIMITS = graph_pb2.RunLimits(hold_steps=100)
EVALUATED = health_pb2.RunMeasures(held_out_loss=0.5)


def holding(steps, **values):
    return health_pb2.SeedSignal(seed_id="s", stage=health_pb2.SEED_STAGE_HOLDING, steps_in_stage=steps, **values)


@pytest.mark.parametrize(
    ("seed", "run", "kept", "why"),
    [
        (holding(100, ablation_contribution=0.05), EVALUATED, True, r"\+10\.0%"),
        (holding(100, ablation_contribution=-0.05), EVALUATED, False, r"-10\.0%"),
        (holding(10, errors=3), EVALUATED, False, "3 forward passes"),
        (holding(200), EVALUATED, True, "never measured"),
        (holding(100), health_pb2.RunMeasures(), True, "no evaluator"),
    ],
)
def test_a_seed_that_has_held_is_settled_with_the_figures(seed, run, kept, why):
    settlement = lifecycle.settle(seed, run, LIMITS, 0.0)
    assert settlement.keep is kept
    assert re.search(why, settlement.reason)
    assert settlement.action.WhichOneof("kind") == ("fossilise" if kept else "cull")


@pytest.mark.parametrize("seed", [holding(99, ablation_contribution=1), holding(150), living(0, errors=1)])
def test_it_is_too_early_to_settle_a_seed(seed):
    assert lifecycle.settle(seed, EVALUATED, LIMITS, 0.0) is None


def test_limits_that_a_run_does_not_state_come_from_the_settings():
    settings = TamiyoSettings(warmup_steps=11, parameter_budget_fraction=0.5)
    resolved = limits.resolve(graph_pb2.RunLimits(warmup_steps=0, max_live_seeds=9), settings, 1000)
    assert resolved.warmup_steps == 0
    assert resolved.max_live_seeds == 9
    assert resolved.parameter_budget == 500
    assert not resolved.HasField("last_germination_step")


# Rewards.


def curve(**losses):
    made = LossCurve()
    for step, loss in losses.items():
        made.add(int(step[1:]), loss)
    return made


def test_the_reward_is_the_gain_against_the_twin_less_the_price():
    reward = paired_reward(curve(s100=1.0, s200=0.5), curve(s100=1.0, s200=1.0), 100, 200, 0.5, 0.02)
    assert reward.total == pytest.approx(math.log(2) - 0.01)
    assert {term.name: pytest.approx(term.value) for term in reward.terms} == {
        "gain": math.log(2), "parameters": -0.01
    }  # fmt: skip
    assert reward.basis == decision_pb2.BASIS_PAIRED_BRANCH


def test_drift_that_both_twins_share_earns_nothing():
    losses = curve(s100=2.0, s200=1.0, s300=0.1)
    assert paired_reward(losses, losses, 100, 300, 0.0, 0.02).total == 0


@given(st.lists(st.tuples(st.floats(0.5, 1), st.floats(0.5, 1)), min_size=2, max_size=12))
def test_gains_telescope_to_the_final_advantage(pairs):
    run, twin = LossCurve(), LossCurve()
    for step, (mine, other) in enumerate(pairs):
        run.add(step, mine)
        twin.add(step, other)
    gains = sum(paired_reward(run, twin, step, step + 1, 0, 0).terms[0].value for step in range(len(pairs) - 1))
    assert gains == pytest.approx(twin.advantage(run, len(pairs) - 1) - twin.advantage(run, 0), abs=1e-5)


def test_only_common_steps_are_compared_and_without_one_there_is_no_reward():
    run, twin = curve(s100=1.0, s150=0.1), curve(s100=2.0, s200=9.0)
    assert twin.advantage(run, 199) == pytest.approx(math.log(2))
    assert paired_reward(run, twin, 0, 99, 0, 0.02) is None
    assert paired_reward(run, LossCurve(), 0, 500, 0, 0.02) is None


def test_a_loss_without_a_logarithm_is_left_out():
    assert len(curve(s1=0.0, s2=-1.0, s3=math.inf, s4=math.nan)) == 0


def test_the_reward_is_bounded():
    assert paired_reward(curve(s1=1e-9), curve(s1=1e9), 0, 1, 0, 0.02).total == 1


def test_the_documentation_names_every_term(request):
    text = (request.config.rootpath / "docs" / "rewards.md").read_text()
    reward = paired_reward(curve(s1=1.0), curve(s1=1.0), 0, 1, 1, 0.02)
    assert all(f"| `{term.name}` |" in text for term in reward.terms)
