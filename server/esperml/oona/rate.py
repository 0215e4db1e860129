"""How much somebody may publish in a time. Pure: the clock comes from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_BURST_S: Final = 1.0


class TokenBucket:
    """A token bucket that may go into debt: whatever finds something in it may take all that it needs.

    So a frame that is larger than a second's worth passes as well, and what follows waits for as long as it takes to
    pay: over any time the rate holds, but for one second's worth and one frame.

    Args:
        per_s: what flows in, per second; at most one second's worth is kept.
        clock: gives the time, in s.
    """

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._clock = clock
        self._level = per_s * _BURST_S
        self._time_s = clock()

    def wait_s(self) -> float:
        """Time until something is in it, in s; 0 where there is now."""
        self._flow_in()
        return 0.0 if self._level > 0 else max(-self._level / self._per_s, 1e-3)

    def take(self, amount: float) -> None:
        """Take ``amount`` out, whether it is there or not."""
        self._flow_in()
        self._level -= amount

    @property
    def full(self) -> bool:
        """Whether it holds all that it may: as good as a new one."""
        self._flow_in()
        return self._level >= self._per_s * _BURST_S

    def _flow_in(self) -> None:
        now_s = self._clock()
        self._level = min(self._per_s * _BURST_S, self._level + self._per_s * (now_s - self._time_s))
        self._time_s = now_s
