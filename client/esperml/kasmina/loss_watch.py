"""Telling a sick training loss from a noisy one. Numbers only: no tensors, no host.

**Reference.** Of the last :data:`WINDOW` losses, the level is the median and the ceiling the 95th percentile, taken
anew every :data:`REFRESH` losses. The best level is the lowest that there was, and the first that of the first losses.

**Excursion.** x is 1 where a loss lies above the ceiling, otherwise 0. Of a healthy loss that is so with probability
p₀ = 0.05 whatever its distribution is; of a sick one, p₁ = 0.5. The CUSUM of the log-likelihood ratio (Page 1954,
"Continuous Inspection Schemes"; for Bernoulli observations Reynolds & Stoumbos 1999)

    S ← max(0, S + x ln(p₁/p₀) + (1 − x) ln((1 − p₁)/(1 − p₀)))

is significant above h = ln 10⁹: without a change that takes 10⁹ independent losses at the least on average (Lorden
1971, ARL ≥ eʰ), and with one at least nine. An outlier, however large, counts as one. While S is above 0 an excursion
lasts, and the reference stays as it is.

**Verdicts.** A loss has *diverged* where half of all that training had gained is lost, by more than its noise explains:

    m > best level + max((first level − best level) / 2, 3 (ceiling − level)),

where S is significant and m is the median of the excursion's last :data:`LATEST` losses, or where m is that of the
whole window: so it also ends a climb that is too slow for an excursion. It has *stalled* where one excursion has lasted
:data:`STALL` losses without getting better — the median of its second half lies above the ceiling, and no lower than
that of its first — or where the last :data:`FLAT` losses vary by less than a thousandth of the reference's spread,
above its level: nothing learns any more. It is *not finite* where the last :data:`NOT_FINITE` losses are NaN or
infinite.

Noise that is correlated over twenty losses and more, and a first reference of few of them, may look like a stall.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Literal

WINDOW: Final = 256
REFRESH: Final = 64
FEWEST: Final = 64
"""Losses before there is a reference: the 95th percentile of fewer is too uncertain to hold others against."""

NOT_FINITE: Final = 2
STALL: Final = 300
FLAT: Final = 64
LATEST: Final = 32

_P0, _P1 = 0.05, 0.5
_ABOVE: Final = math.log(_P1 / _P0)
_BELOW: Final = math.log((1 - _P1) / (1 - _P0))
SIGNIFICANT: Final = math.log(1e9)
_STILL: Final = 0.001

Ailment = Literal["not finite", "diverged", "stalled", "spoilt by a seed"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a training loss.

    Attributes:
        ailment: what it is.
        since: step at which it began.
        words: the same in words, with the figures.
    """

    ailment: Ailment
    since: int
    words: str


@dataclass(slots=True)
class _Reference:
    """What a loss is held against, taken from so many ``losses``."""

    losses: int
    first: float
    best: float
    level: float
    ceiling: float
    spread: float

    @property
    def margin(self) -> float:
        """How far above the best level a loss has diverged."""
        return max((self.first - self.best) / 2, 3 * (self.ceiling - self.level))


class LossWatch:
    """Watches the training loss of one run.

    Args:
        stall_steps: losses that an excursion may last without getting better; ``None``: stalls are not looked for.
    """

    def __init__(self, stall_steps: int | None = STALL) -> None:
        self._stall_steps = stall_steps
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._since_refresh = 0
        self._reference: _Reference | None = None
        self._excursion: deque[float] = deque(maxlen=max(stall_steps or 0, FLAT))
        self._score = 0.0
        self._since = 0
        self._step = 0
        self._not_finite = 0
        self._not_finite_since = 0

    @property
    def in_doubt(self) -> bool:
        """Whether the loss may be sick: too much so to change the host, not enough for a verdict."""
        if self._not_finite > 0:
            return True
        reference = self._reference
        return (
            reference is not None
            and self._score >= SIGNIFICANT / 2
            and self._now() > reference.best + reference.margin / 2
        )

    @property
    def alarmed(self) -> bool:
        """Whether a verdict is worth asking for at once; cheap enough for every step."""
        return self._not_finite >= NOT_FINITE or self._score >= SIGNIFICANT

    @property
    def told(self) -> bool:
        """Whether there was any loss."""
        return self._step > 0

    def take(self, step: int, loss: float) -> None:
        """Take in the loss of ``step``."""
        self._step = step
        if not math.isfinite(loss):
            self._not_finite += 1
            if self._not_finite == 1:
                self._not_finite_since = step
            return
        self._not_finite = 0
        self._recent.append(loss)
        self._since_refresh += 1
        self._weigh(step, loss)
        due = self._since_refresh >= REFRESH if self._reference else len(self._recent) >= FEWEST
        # A reference of few losses is itself in doubt, and follows them whatever they do.
        if due and (self._score == 0 or not self._full):
            self._refresh()

    def verdict(self) -> Verdict | None:
        """What is wrong now; ``None`` where nothing is."""
        if self._not_finite >= NOT_FINITE:
            count = self._not_finite
            return Verdict("not finite", self._not_finite_since, f"the last {count} training losses are not finite")
        reference = self._reference
        if reference is None:
            return None
        limit = reference.best + reference.margin
        now = self._now() if self._score >= SIGNIFICANT else median(self._recent)
        if now > limit and (self._score >= SIGNIFICANT or len(self._recent) == WINDOW):
            since = self._since if self._score > 0 else self._step - WINDOW
            return Verdict("diverged", since, f"the training loss is at {now:.4g}, and was at {reference.best:.4g}")
        return self._stalled(reference)

    def state_dict(self) -> dict[str, Any]:
        """What it knows, in plain values."""
        reference = self._reference
        return {
            "recent": list(self._recent),
            "since_refresh": self._since_refresh,
            "reference": None if reference is None else [getattr(reference, name) for name in _Reference.__slots__],
            "excursion": list(self._excursion),
            "score": self._score,
            "since": self._since,
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._recent.clear()
        self._recent.extend(state["recent"])
        self._since_refresh = state["since_refresh"]
        self._reference = None if state["reference"] is None else _Reference(*state["reference"])
        self._excursion.clear()
        self._excursion.extend(state["excursion"])
        self._score = state["score"]
        self._since = state["since"]
        self._step = state["step"]
        self._not_finite = 0

    def _weigh(self, step: int, loss: float) -> None:
        if self._reference is None:
            return
        above = loss > self._reference.ceiling
        if self._score == 0:
            if not above:
                return
            self._since = step
            self._excursion.clear()
        self._score = max(0.0, self._score + (_ABOVE if above else _BELOW))
        self._excursion.append(loss)

    @property
    def _full(self) -> bool:
        """Whether the reference is that of a whole window."""
        return self._reference is not None and self._reference.losses == WINDOW

    def _now(self) -> float:
        return median(list(self._excursion)[-LATEST:])

    def _refresh(self) -> None:
        ordered = sorted(self._recent)
        level, ceiling = median(ordered), _quantile(ordered, 0.95)
        spread = ceiling - _quantile(ordered, 0.05)
        old = self._reference
        first, best = (level, level) if old is None else (old.first, min(old.best, level))
        self._reference = _Reference(len(ordered), first, best, level, ceiling, spread)
        self._since_refresh = 0
        self._score = 0.0

    def _stalled(self, reference: _Reference) -> Verdict | None:
        if self._stall_steps is None or not self._full:
            return None
        last = list(self._recent)[-FLAT:]
        if len(last) == FLAT and max(last) - min(last) <= _STILL * reference.spread and min(last) > reference.level:
            return Verdict("stalled", self._step - FLAT, f"the training loss stands still at {last[-1]:.4g}")
        if self._score <= 0 or len(self._excursion) < self._stall_steps:
            return None
        passed = list(self._excursion)
        half = len(passed) // 2
        before, after = median(passed[:half]), median(passed[half:])
        if after < before or after <= reference.ceiling:
            return None
        return Verdict(
            "stalled",
            self._since,
            f"the training loss has stayed above {reference.ceiling:.4g} for {self._stall_steps} steps, "
            f"and was at {reference.level:.4g}",
        )


def _quantile(ordered: list[float], share: float) -> float:
    """By linear interpolation between the entries of an ordered list."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
