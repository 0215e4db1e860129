"""Keeping what Esper costs to a share of the time: how many layers a report may measure, and whether it is made.

Time earns: each second of training allows ``ceiling`` seconds of Esper's own. What Esper took is drawn from that,
whatever it was for, so that the share holds even where the forecast of a report's cost is wrong; the forecast only
tells when there is enough for the next one. What is not needed is saved, for one report of all layers at most: a
training that becomes faster does not spend what a slow one earned.

Steps can be so fast that what a session does on each of them takes more than the ceiling by itself. Reports must come
all the same, for nothing is decided without: the smallest one is made after :data:`MOST_SKIPPED` that were not.
"""

from __future__ import annotations

from typing import Final

from esperml.kasmina.clock import StepClock
from esperml.v1 import health_pb2

CEILING: Final = 0.01
"""Greatest share of the time that Esper takes where the user says nothing."""

ALLOWANCE_S: Final = 0.1
"""What the start may cost ahead of its time: the connection, and the first report, of all layers. Half of what is
earned pays it back: with a ceiling of 1 %, within 20 s."""

MOST_SKIPPED: Final = 19
"""Reports in a row that are not made at most: one in 20 that are due is, whatever it costs."""

_WEIGHT: Final = 0.25
# Forecasts until there is something to go by, in s: on the slow side for a core of a server.
_LAYER_S: Final = 5e-4
_REPORT_S: Final = 1e-3


class Budget:
    """Says before each report that is due what it may measure.

    Args:
        ceiling: greatest share of the time that Esper may take; ``None`` for no limit.
        clock: knows what Esper took.
        layers: layers of the host.

    Attributes:
        ceiling: the same.
        skipped: reports that were due and did not fit in.
    """

    def __init__(self, ceiling: float | None, clock: StepClock, layers: int) -> None:
        self.ceiling = ceiling
        self.skipped = 0
        self._in_a_row = 0
        self._clock = clock
        self._layers = layers
        self._saved = 0.0
        self._elapsed = 0.0
        self._own = 0.0
        self._layer_s = _LAYER_S
        self._report_s = _REPORT_S
        self._measured_s: float | None = None  # By the report since the last grant; None where there was none.

    def grant(self, due: int) -> int | None:
        """How many layers the next report may measure; ``None`` where it is not to be made at all.

        Fewer layers come first, but one at least; then there are fewer reports, one in 20 at least.

        Args:
            due: layers whose turn it is.
        """
        self._balance()
        if self.ceiling is None:
            return due
        ahead = max(ALLOWANCE_S - self.ceiling / 2 * self._elapsed, 0.0)
        spare = self._saved + ahead - self._report_s
        least = min(due, 1)
        if spare < self._layer_s * least and self._in_a_row < MOST_SKIPPED:
            self.skipped += 1
            self._in_a_row += 1
            return None
        self._in_a_row = 0
        return max(min(due, int(spare / self._layer_s)), least)

    def note(self, layers: int, seconds: float) -> None:
        """A report measured so many layers in so many seconds, hooks included."""
        self._measured_s = seconds
        if layers:
            self._layer_s += _WEIGHT * (seconds / layers - self._layer_s)

    def sampling(self, *, interval: int | None, due: int, layers: int) -> health_pb2.Sampling | None:
        """What a report says of its own making; ``None`` without a ceiling.

        Args:
            interval: optimizer steps since the report before; ``None`` for the first.
            due: layers whose turn it was.
            layers: how many of them were to be measured.
        """
        if self.ceiling is None:
            return None
        return health_pb2.Sampling(
            ceiling=self.ceiling, interval=interval, layers_due=due, layers=layers, reports_skipped=self.skipped
        )

    def _balance(self) -> None:
        """Take in what was earned and what was spent since the last time."""
        elapsed, own = self._clock.elapsed(), self._clock.total_own
        spent = own - self._own
        if self._measured_s is not None:
            self._report_s += _WEIGHT * (max(spent - self._measured_s, 0.0) - self._report_s)
            self._measured_s = None
        if self.ceiling is not None:
            most = max(ALLOWANCE_S, self._report_s + self._layer_s * self._layers)
            self._saved = min(self._saved + self.ceiling * (elapsed - self._elapsed) - spent, most)
        self._elapsed, self._own = elapsed, own
