"""What is read out of an experience, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from esperml.contract import InvalidFieldError
from esperml.trainer.transitions import check_experience, choice_of, has_paired_reward, transition
from esperml.v1 import decision_pb2, experience_pb2, run_pb2

Experience = experience_pb2.TrainingExperience


@pytest.fixture
def germinated(synthetic: ModuleType) -> Experience:
    """An experience in which something was germinated."""
    random = np.random.default_rng(3)
    experience: Experience = synthetic.make_episode(synthetic.make_host(random), "run", random, adapt=0.999)[0]
    return experience


@pytest.fixture
def idle(synthetic: ModuleType) -> Experience:
    """An experience in which nothing was done, though it might have been."""
    random = np.random.default_rng(3)
    experience: Experience = synthetic.make_episode(synthetic.make_host(random), "run", random, adapt=0.001)[0]
    return experience


def test_a_germination_is_read_with_its_place_and_its_propensities(germinated: Experience) -> None:
    choice = choice_of(germinated)
    graph, target = germinated.state.graph, germinated.decision.target
    assert choice.place is not None
    assert graph.layers[graph.places.sources[choice.place]].name == target.source_layer
    assert graph.layers[graph.places.targets[choice.place]].name == target.target_layer
    assert choice.blueprint == germinated.decision.action.germinate.blueprint
    assert choice.adapt_log_probability == pytest.approx(math.log(0.999), abs=1e-6)
    assert choice.place_log_probability == pytest.approx(-math.log(len(graph.places.sources)))
    assert choice.blueprint_log_probability == pytest.approx(-math.log(len(graph.blueprints)))


def test_doing_nothing_is_a_choice_with_a_probability(idle: Experience) -> None:
    choice = choice_of(idle)
    assert (choice.place, choice.blueprint) == (None, "")
    assert choice.adapt_log_probability == pytest.approx(math.log(0.999), abs=1e-6)


def test_where_nothing_may_be_done_no_propensity_is_asked_for(idle: Experience) -> None:
    idle.state.mask.Clear()
    idle.state.mask.may_adapt = False
    idle.decision.ClearField("propensity")
    check_experience(idle)
    assert choice_of(idle).adapt_log_probability == 0.0


def test_a_suppressed_decision_did_nothing_with_its_effective_probability(germinated: Experience) -> None:
    germinated.decision.disposition = decision_pb2.DISPOSITION_SUPPRESSED
    germinated.decision.propensity.effective_none_probability = 0.25
    choice = choice_of(germinated)
    assert choice.place is None
    assert choice.adapt_log_probability == pytest.approx(math.log(0.25))


@pytest.mark.parametrize(
    "disposition",
    [decision_pb2.DISPOSITION_SHADOWED, decision_pb2.DISPOSITION_PENDING, decision_pb2.DISPOSITION_VETOED],
)
def test_a_decision_that_never_left_did_nothing_for_certain(
    germinated: Experience, disposition: decision_pb2.Disposition.ValueType
) -> None:
    germinated.decision.disposition = disposition
    assert choice_of(germinated).place is None
    assert choice_of(germinated).adapt_log_probability == 0.0


def test_an_approved_decision_counts_as_done(germinated: Experience) -> None:
    germinated.decision.disposition = decision_pb2.DISPOSITION_PENDING
    germinated.applied.status = decision_pb2.COMMAND_STATUS_APPLIED
    assert choice_of(germinated).place is not None


def test_what_the_host_refused_was_tried(germinated: Experience) -> None:
    germinated.applied.status = decision_pb2.COMMAND_STATUS_REFUSED
    assert choice_of(germinated).place is not None


def test_runs_of_one_twin_are_one_host_until_something_grows(synthetic: ModuleType) -> None:
    random = np.random.default_rng(0)
    host, run = synthetic.make_host(random), run_pb2.RunStarted(paired_run="twin", labels={"family": "digits"})
    one, other = (synthetic.make_episode(host, name, random, adapt=0.999) for name in ("one", "other"))
    assert transition(one[0], run).host == transition(other[0], run).host == "twin"
    assert transition(one[1], run).host != transition(other[1], run).host
    assert transition(one[1], run).cluster == transition(other[1], run).cluster == "twin"
    assert transition(one[0], run, "family").cluster == "digits"
    assert transition(one[0], run, "missing").cluster == "twin"
    assert transition(one[0], None).cluster == transition(one[0], None).host == "one"


def test_only_a_paired_branch_measures_worth(germinated: Experience) -> None:
    assert has_paired_reward(germinated)
    germinated.reward.basis = decision_pb2.BASIS_ABLATION
    assert not has_paired_reward(germinated)
    germinated.ClearField("reward")
    assert not has_paired_reward(germinated)


def _set(path: str, value: object) -> Callable[[Experience], None]:
    def change(experience: Experience) -> None:
        *parents, last = path.split(".")
        message: object = experience
        for name in parents:
            message = getattr(message, name)
        setattr(message, last, value)

    return change


def _mask_more_than_fits(experience: Experience) -> None:
    experience.state.mask.blueprints[0] = 2**40


def _mask_nothing(experience: Experience) -> None:
    for index in range(len(experience.state.mask.blueprints)):
        experience.state.mask.blueprints[index] = 0


BROKEN: dict[str, Callable[[Experience], object]] = {
    "experience.schema_version": _set("schema_version", 2),
    "experience.episode_id": _set("episode_id", ""),
    "experience.state.graph": lambda e: e.state.ClearField("graph"),
    "experience.state.graph.places.targets": lambda e: e.state.graph.places.sources.append(0),
    "experience.state.graph.places.targets[0]": lambda e: e.state.graph.places.targets.__setitem__(0, 99),
    "experience.state.layers.health.values": lambda e: e.state.layers.health.values.append(math.nan),
    "experience.state.mask": lambda e: e.state.ClearField("mask"),
    "experience.state.mask.blueprints": lambda e: e.state.mask.blueprints.append(1),
    "experience.state.mask.blueprints[0]": _mask_more_than_fits,
    "experience.state.mask.may_adapt": _mask_nothing,
    "experience.decision.run_id": _set("decision.run_id", "another"),
    "experience.reward.total": _set("reward.total", 1.5),
    "experience.reward.basis": _set("reward.basis", 0),
    "experience.next_state": lambda e: e.ClearField("next_state"),
    "experience.next_state.graph": lambda e: e.next_state.ClearField("graph"),
    "experience.decision.action": lambda e: e.decision.action.cull.SetInParent(),
    "experience.decision.action.germinate": lambda e: e.state.mask.blueprints.__setitem__(choice_of(e).place or 0, 0),
    "experience.decision.action.germinate.blueprint": _set("decision.action.germinate.blueprint", "orchid"),
    "experience.decision.target": _set("decision.target.source_layer", "nowhere"),
    "experience.decision.propensity.adapt_log_probability": _set("decision.propensity.adapt_log_probability", 0.5),
    "experience.decision.propensity.place_log_probability": lambda e: e.decision.propensity.ClearField(
        "place_log_probability"
    ),
    "experience.decision.propensity.blueprint_log_probability": _set(
        "decision.propensity.blueprint_log_probability", -math.inf
    ),
    "experience.decision.propensity.joint_log_probability": _set("decision.propensity.joint_log_probability", -20.0),
}


@pytest.mark.parametrize("field", BROKEN)
def test_a_broken_field_is_refused_by_name(germinated: Experience, field: str) -> None:
    BROKEN[field](germinated)
    with pytest.raises(InvalidFieldError) as caught:
        transition(germinated, None)
    assert caught.value.field == field


def test_a_reward_that_is_no_number_is_refused(germinated: Experience) -> None:
    germinated.reward.total = math.nan
    with pytest.raises(InvalidFieldError, match="outside"):
        check_experience(germinated)


def test_germinating_where_nothing_may_be_done_is_refused(germinated: Experience) -> None:
    germinated.state.mask.may_adapt = False
    with pytest.raises(InvalidFieldError, match="mask allows nothing"):
        choice_of(germinated)


@pytest.mark.parametrize("probability", [None, 0.0, -0.5, 1.5])
def test_suppression_without_a_probability_of_nothing_is_refused(
    germinated: Experience, probability: float | None
) -> None:
    germinated.decision.disposition = decision_pb2.DISPOSITION_SUPPRESSED
    if probability is not None:
        germinated.decision.propensity.effective_none_probability = probability
    with pytest.raises(InvalidFieldError, match="effective_none_probability"):
        choice_of(germinated)


@given(data=st.binary(max_size=400))
def test_any_message_is_read_or_refused_by_name(data: bytes) -> None:
    experience = Experience()
    try:
        experience.ParseFromString(data)
    except DecodeError:
        return
    with pytest.raises(InvalidFieldError):
        transition(experience, None)
