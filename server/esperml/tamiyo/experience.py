"""Experience: a decision, what the host did about it, what it was worth, and the state that followed."""

from __future__ import annotations

from typing import Final

from esperml.v1 import decision_pb2, experience_pb2, graph_pb2

SCHEMA_VERSION: Final = 1


class OpenExperience:
    """The last decision of a run, until the next one closes it.

    Args:
        index: position in the run, from 0.
        state: state that was decided on, its mask included.
        decision: what was decided.
    """

    def __init__(self, index: int, state: graph_pb2.ModelGraphState, decision: decision_pb2.AdaptationDecision) -> None:
        self.index = index
        self.state = state
        self.decision = decision
        self.applied: decision_pb2.Applied | None = None

    def close(
        self, next_state: graph_pb2.ModelGraphState, reward: experience_pb2.Reward | None, *, step: int, done: bool
    ) -> experience_pb2.TrainingExperience:
        """The experience.

        Args:
            next_state: state at the next decision, or at the end.
            reward: absent where it could not be measured.
            step: step of ``next_state``, or the last of the run.
            done: whether the run ended.
        """
        return experience_pb2.TrainingExperience(
            schema_version=SCHEMA_VERSION,
            episode_id=self.decision.run_id,
            index=self.index,
            state=self.state,
            decision=self.decision,
            applied=self.applied,
            reward=reward,
            next_state=next_state,
            elapsed_steps=max(0, step - self.decision.step),
            done=done,
        )


def was_carried_out(experience: experience_pb2.TrainingExperience) -> bool:
    """Whether the host really did what was decided. Where not, what it experienced is "none", whatever was decided."""
    return (
        experience.HasField("applied")
        and experience.applied.status == decision_pb2.COMMAND_STATUS_APPLIED
        and experience.decision.action.WhichOneof("kind") != "none"
    )
