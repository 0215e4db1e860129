"""One experience, checked, with what the trainer has to know of the run that it comes from.

A recorded decision says what Tamiyo decided; a :class:`Transition` says what was *done*. The two differ where a rule
held the decision back, where the run was only observed and where nobody approved: then nothing was done, and that is
what the reward measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from esperml.contract import InvalidFieldError
from esperml.tamiyo.validate import check_state
from esperml.v1 import decision_pb2, experience_pb2, run_pb2

SCHEMA_VERSION = 1
"""The version of ``TrainingExperience`` that this trainer reads."""

_LOG_PROBABILITY_SLACK = 1e-4  # Log-probabilities are float32: those of certain choices may come out just above zero.
_JOINT_SLACK = 1e-2


@dataclass(frozen=True, slots=True)
class Choice:
    """What was done in a state, and with which probability.

    Attributes:
        place: index into ``HostGraph.places``, or None where nothing was done.
        blueprint: name of what was germinated; empty where nothing was done.
        adapt_log_probability: of adapting, or of not adapting, whichever was done. Zero where there was no choice.
        place_log_probability: of the place, given that something is done. Zero where nothing was done.
        blueprint_log_probability: of the blueprint, given the place. Zero where nothing was done.
    """

    place: int | None
    blueprint: str
    adapt_log_probability: float
    place_log_probability: float = 0.0
    blueprint_log_probability: float = 0.0

    @property
    def graft_log_probability(self) -> float:
        """Of place and blueprint together, given that something is done."""
        return self.place_log_probability + self.blueprint_log_probability

    @property
    def joint_log_probability(self) -> float:
        """Of the whole decision."""
        return self.adapt_log_probability + self.graft_log_probability


@dataclass(frozen=True, slots=True)
class Transition:
    """A valid experience with a reward measured on a paired branch.

    Attributes:
        experience: as it was recorded.
        choice: what was done.
        reward: what it was worth, -1 to 1.
        cluster: runs of one cluster share their host and twin, so that they must fall on the same side of a split.
        host: decisions of one host were taken before anything grew on runs of one twin, at whatever steps: what was
            done compares, once the state's worth is taken off.
    """

    experience: experience_pb2.TrainingExperience
    choice: Choice
    reward: float
    cluster: str
    host: str


def transition(
    experience: experience_pb2.TrainingExperience, run: run_pb2.RunStarted | None, cluster_label: str = ""
) -> Transition:
    """The transition of an experience that has a paired reward.

    Args:
        experience: a recorded experience.
        run: how its run was started, or None where the recording does not say.
        cluster_label: name of a run label by which runs are clustered; empty for their twin.

    Raises:
        InvalidFieldError: a field is missing, out of range or contradicts another.
    """
    check_experience(experience)
    cluster = cluster_of(experience, run, cluster_label)
    # Until something grew, runs of one twin are the same host; afterwards each goes its own way.
    if experience.state.adaptations or experience.state.seeds:
        host = f"{experience.episode_id}#{experience.index}"
    else:
        host = run.paired_run if run is not None and run.paired_run else experience.episode_id
    return Transition(
        experience=experience,
        choice=choice_of(experience),
        reward=experience.reward.total,
        cluster=cluster,
        host=host,
    )


def cluster_of(
    experience: experience_pb2.TrainingExperience, run: run_pb2.RunStarted | None, cluster_label: str
) -> str:
    """The label if the run has it, else the run's twin, else the episode itself."""
    labels: Mapping[str, str] = run.labels if run is not None else {}
    twin = run.paired_run if run is not None else ""
    return labels.get(cluster_label, "") or twin or experience.episode_id


def has_paired_reward(experience: experience_pb2.TrainingExperience) -> bool:
    """True where a twin says what the decision was worth. Only such experience trains anything."""
    return experience.HasField("reward") and experience.reward.basis == decision_pb2.BASIS_PAIRED_BRANCH


def check_experience(experience: experience_pb2.TrainingExperience) -> None:
    """Raise :class:`InvalidFieldError`, naming the field, unless ``experience`` is one that can be learnt from."""
    if experience.schema_version != SCHEMA_VERSION:
        raise InvalidFieldError(
            "experience.schema_version", f"is {experience.schema_version}; this trainer reads version {SCHEMA_VERSION}"
        )
    if not experience.episode_id:
        raise InvalidFieldError("experience.episode_id", "is required")
    check_state(experience.state, "experience.state")
    mask = experience.state.mask
    if not experience.state.HasField("mask"):
        raise InvalidFieldError("experience.state.mask", "is required: a policy is judged against what it could do")
    if mask.may_adapt and not any(mask.blueprints):
        raise InvalidFieldError("experience.state.mask.may_adapt", "is true, but no blueprint is allowed at any place")
    if experience.decision.run_id != experience.state.run_id:
        raise InvalidFieldError(
            "experience.decision.run_id",
            f"is {experience.decision.run_id!r}, but the state is of run {experience.state.run_id!r}",
        )
    if experience.HasField("reward"):
        _check_reward(experience.reward)
    if not experience.done:
        if not experience.HasField("next_state"):
            raise InvalidFieldError("experience.next_state", "is required unless the episode is done")
        check_state(experience.next_state, "experience.next_state")


def _check_reward(reward: experience_pb2.Reward) -> None:
    if not -1 <= reward.total <= 1:  # Also refuses NaN.
        raise InvalidFieldError("experience.reward.total", f"is {reward.total:g}, outside [-1, 1]")
    if reward.basis == decision_pb2.BASIS_UNSPECIFIED:
        raise InvalidFieldError("experience.reward.basis", "is required: say how the reward was measured")


def choice_of(experience: experience_pb2.TrainingExperience) -> Choice:
    """What was done, given what was decided and what became of it.

    Raises:
        InvalidFieldError: a field of the decision is missing, out of range or contradicts the state.
    """
    decision, propensity = experience.decision, experience.decision.propensity
    kind = decision.action.WhichOneof("kind")
    if kind not in {"none", "germinate"}:
        raise InvalidFieldError(
            "experience.decision.action", f"is {kind or 'missing'}; a policy's decision is none or germinate"
        )
    if kind == "germinate" and not _was_sent(experience):
        return _held_back(experience)
    may_adapt = experience.state.mask.may_adapt
    if kind == "none":
        adapt = _log_probability(propensity, "adapt_log_probability") if may_adapt else 0.0
        return Choice(place=None, blueprint="", adapt_log_probability=adapt)
    if not may_adapt:
        raise InvalidFieldError("experience.decision.action", "germinates where the mask allows nothing")
    choice = Choice(
        place=_place(experience),
        blueprint=decision.action.germinate.blueprint,
        adapt_log_probability=_log_probability(propensity, "adapt_log_probability"),
        place_log_probability=_log_probability(propensity, "place_log_probability"),
        blueprint_log_probability=_log_probability(propensity, "blueprint_log_probability"),
    )
    _check_joint(choice, propensity)
    return choice


def _was_sent(experience: experience_pb2.TrainingExperience) -> bool:
    # What the host refused was tried: refusing is the host's part of the outcome, not the policy's.
    return experience.HasField("applied") or experience.decision.disposition == decision_pb2.DISPOSITION_SENT


def _held_back(experience: experience_pb2.TrainingExperience) -> Choice:
    """Nothing was done although something was decided. Only suppression leaves "none" a probability of its own."""
    decision = experience.decision
    if decision.disposition != decision_pb2.DISPOSITION_SUPPRESSED:
        return Choice(place=None, blueprint="", adapt_log_probability=0.0)
    field = "experience.decision.propensity.effective_none_probability"
    if not decision.propensity.HasField("effective_none_probability"):
        raise InvalidFieldError(field, "is required for a decision that was suppressed")
    probability = decision.propensity.effective_none_probability
    if not 0 < probability <= 1 + _LOG_PROBABILITY_SLACK:
        raise InvalidFieldError(field, f"is {probability:g}; what happened has a probability in (0, 1]")
    return Choice(place=None, blueprint="", adapt_log_probability=min(math.log(probability), 0.0))


def _place(experience: experience_pb2.TrainingExperience) -> int:
    """Index of the decision's place; the blueprint must be allowed there."""
    graph, target = experience.state.graph, experience.decision.target
    ends = zip(graph.places.sources, graph.places.targets, strict=True)
    places = [(graph.layers[source].name, graph.layers[layer].name) for source, layer in ends]
    if (target.source_layer, target.target_layer) not in places:
        raise InvalidFieldError(
            "experience.decision.target", f"{target.source_layer!r} to {target.target_layer!r} is no place of the host"
        )
    index = places.index((target.source_layer, target.target_layer))
    blueprint = experience.decision.action.germinate.blueprint
    if blueprint not in graph.blueprints:
        raise InvalidFieldError("experience.decision.action.germinate.blueprint", f"{blueprint!r} is not the host's")
    bit = list(graph.blueprints).index(blueprint)
    if not experience.state.mask.blueprints[index] >> bit & 1:
        raise InvalidFieldError("experience.decision.action.germinate", f"{blueprint!r} is masked at place {index}")
    return index


def _log_probability(propensity: decision_pb2.Propensity, name: str) -> float:
    field = f"experience.decision.propensity.{name}"
    if not propensity.HasField(name):  # type: ignore[arg-type]  # The stubs want a literal.
        raise InvalidFieldError(field, "is required: without it the decision cannot be weighed")
    value = float(getattr(propensity, name))
    if not -math.inf < value <= _LOG_PROBABILITY_SLACK:
        raise InvalidFieldError(field, f"is {value:g}; a log-probability is finite and at most 0")
    return min(value, 0.0)


def _check_joint(choice: Choice, propensity: decision_pb2.Propensity) -> None:
    joint = choice.joint_log_probability
    if propensity.HasField("joint_log_probability") and abs(propensity.joint_log_probability - joint) > _JOINT_SLACK:
        raise InvalidFieldError(
            "experience.decision.propensity.joint_log_probability",
            f"is {propensity.joint_log_probability:g}, but its parts add up to {joint:g}",
        )
