"""What a decision was worth: the reward of docs/rewards.md.

A run is compared with a twin that started from the same weights, data order and seeds and was left alone. With
``advantage(s) = log L_twin(s) - log L_run(s)`` over held-out losses, the decision that held from step a to step b earns

    gain = advantage(b) - advantage(a)
    parameters = -price * parameters added / parameters of the host before anything grew
    total = clip(gain + parameters, -1, 1)

Gains telescope: over a run they sum to its final advantage, however often and whenever it decided. What the host would
have gained anyway is in both losses and cancels, so acting early earns nothing by itself. Only held-out losses of both
twins at the same step are compared.
"""

from __future__ import annotations

import bisect
import math

from esperml.v1 import decision_pb2, experience_pb2


class LossCurve:
    """Held-out losses of one run by step."""

    def __init__(self) -> None:
        self._losses: dict[int, float] = {}
        self._steps: list[int] = []

    def add(self, step: int, loss: float) -> None:
        """Note a loss; one that has no logarithm (zero, negative, not finite) is left out.

        The last word on a step counts.
        """
        if not (math.isfinite(loss) and loss > 0):
            return
        if step not in self._losses:
            bisect.insort(self._steps, step)
        self._losses[step] = loss

    def __len__(self) -> int:
        return len(self._steps)

    def advantage(self, run: LossCurve, step: int) -> float | None:
        """``log L_twin - log L_run`` at the latest step up to ``step`` at which both were evaluated.

        Called on the twin's curve.

        Args:
            run: curve of the run that is judged.
            step: latest step to look at.

        Returns:
            The advantage, or ``None`` where there is no such step.
        """
        for at in reversed(run._steps[: bisect.bisect_right(run._steps, step)]):
            if at in self._losses:
                return math.log(self._losses[at]) - math.log(run._losses[at])
        return None


def paired_reward(
    run: LossCurve, twin: LossCurve, start: int, end: int, relative_growth: float, price: float
) -> experience_pb2.Reward | None:
    """The reward of the decision that held from ``start`` to ``end``.

    Before the first common evaluation the advantage is zero: the twins started alike.

    Args:
        run: held-out losses of the run.
        twin: held-out losses of its twin.
        start: step of the decision.
        end: step of the next decision, or of the run's end.
        relative_growth: parameters that the decision added, divided by the host's before anything grew.
        price: cost of one unit of relative growth.

    Returns:
        The reward, or ``None`` where the twins have no common evaluation up to ``end``.
    """
    after = twin.advantage(run, end)
    if after is None:
        return None
    gain = after - (twin.advantage(run, start) or 0.0)
    cost = price * relative_growth
    return experience_pb2.Reward(
        total=max(-1.0, min(1.0, gain - cost)),
        terms=[
            experience_pb2.RewardTerm(name="gain", value=gain),
            experience_pb2.RewardTerm(name="parameters", value=-cost),
        ],
        basis=decision_pb2.BASIS_PAIRED_BRANCH,
    )
