"""Where the time goes: the user's steps, Esper's own code, and the user's evaluator."""

from __future__ import annotations

import time


class StepClock:
    """Splits the time since the last report into the user's, Esper's and the evaluator's.

    Attributes:
        own: seconds that Esper took since the last report, as far as they are told to :meth:`spend`.
        evaluation: seconds that the user's evaluator took since the last report.
        total_own: the same as ``own`` since the start.
        total_evaluation: the same as ``evaluation`` since the start.
    """

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._end: float | None = None
        self._steps_before = 0
        self.own = 0.0
        self.evaluation = 0.0
        self.total_own = 0.0
        self.total_evaluation = 0.0

    def spend(self, seconds: float) -> None:
        """Count time of Esper's own."""
        self.own += seconds
        self.total_own += seconds

    def evaluate(self, seconds: float) -> None:
        """Count time of the user's evaluator."""
        self.evaluation += seconds
        self.total_evaluation += seconds

    def report(self, steps: int) -> tuple[float | None, float | None]:
        """Mean time of a step, in s, and Esper's share of the time since the last report; then start anew.

        Either is ``None`` where no step or no time has passed.

        Args:
            steps: optimizer steps since the start.
        """
        now = time.perf_counter()
        passed = now - self._mark - self.evaluation
        own, passed_steps = self.own, steps - self._steps_before
        self._mark, self._steps_before, self.own, self.evaluation = now, steps, 0.0, 0.0
        if passed_steps == 0 or passed <= 0:
            return None, None
        return passed / passed_steps, min(max(own / passed, 0.0), 1.0)

    def stop(self) -> None:
        """Training is over; what is spent from now on still counts."""
        self._end = time.perf_counter()

    def share(self) -> float | None:
        """Esper's share of all time from the start to :meth:`stop`, evaluation excluded, 0 to 1."""
        end = time.perf_counter() if self._end is None else self._end
        passed = end - self._start - self.total_evaluation
        return min(max(self.total_own / passed, 0.0), 1.0) if passed > 0 else None
