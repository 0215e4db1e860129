"""Where the time goes: the user's steps, Esper's own code, and what is neither, such as the user's evaluator."""

from __future__ import annotations

import time


class StepClock:
    """Splits the time since the last report into the user's, Esper's and what is left out.

    Attributes:
        own: seconds that Esper took since the last report, as far as they are told to :meth:`spend`.
        left_out: seconds since the last report that are nobody's, such as the user's evaluator's.
        total_own: the same as ``own`` since the start.
        total_left_out: the same as ``left_out`` since the start.
    """

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._end: float | None = None
        self._steps_before = 0
        self.own = 0.0
        self.left_out = 0.0
        self.total_own = 0.0
        self.total_left_out = 0.0

    def spend(self, seconds: float) -> None:
        """Count time of Esper's own."""
        self.own += seconds
        self.total_own += seconds

    def leave_out(self, seconds: float) -> None:
        """Count time that is neither a step's nor Esper's."""
        self.left_out += seconds
        self.total_left_out += seconds

    def report(self, steps: int) -> tuple[float | None, float | None]:
        """Mean time of a step, in s, and Esper's share of the time since the last report; then start anew.

        Either is ``None`` where no step or no time has passed.

        Args:
            steps: optimizer steps since the start.
        """
        now = time.perf_counter()
        passed = now - self._mark - self.left_out
        own, passed_steps = self.own, steps - self._steps_before
        self._mark, self._steps_before, self.own, self.left_out = now, steps, 0.0, 0.0
        if passed_steps == 0 or passed <= 0:
            return None, None
        return passed / passed_steps, min(max(own / passed, 0.0), 1.0)

    def stop(self) -> None:
        """Training is over; what is spent from now on still counts."""
        self._end = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds from the start to :meth:`stop`, what is left out excluded."""
        end = time.perf_counter() if self._end is None else self._end
        return end - self._start - self.total_left_out

    def share(self) -> float | None:
        """Esper's share of all time from the start to :meth:`stop`, what is left out excluded, 0 to 1."""
        passed = self.elapsed()
        return min(max(self.total_own / passed, 0.0), 1.0) if passed > 0 else None
