"""Places that rest after a seed was removed: the stages of a place between two seeds."""

from __future__ import annotations

from dataclasses import dataclass

from esperml.kasmina import stages
from esperml.kasmina.errors import RefusedError
from esperml.kasmina.stages import SeedFacts, Stage


@dataclass(slots=True)
class _Rest:
    stage: Stage
    steps_in_stage: int
    steps_to_rest: int

    @property
    def facts(self) -> SeedFacts:
        return SeedFacts(0.0, self.steps_in_stage, steps_to_rest=self.steps_to_rest)


class Resting:
    """Which empty places of a host rest.

    Attributes:
        steps: optimizer steps for which a place rests from now on; 0 for none.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._rests: dict[int, _Rest] = {}

    def begin(self, place: int, stage: Stage) -> None:
        """A seed at ``place`` was removed and entered ``stage``: culled or rolled back."""
        self._rests[place] = _Rest(stage, 0, self.steps)
        self._settle(place)

    def forget(self, place: int) -> None:
        """What was at ``place`` never was."""
        self._rests.pop(place, None)

    def advance(self) -> None:
        """One optimizer step has passed."""
        for place, rest in list(self._rests.items()):
            rest.steps_in_stage += 1
            rest.steps_to_rest = max(0, rest.steps_to_rest - 1)
            self._settle(place)

    def stage(self, place: int) -> Stage:
        """Embargoed or dormant, for a place that holds no seed."""
        return self._rests[place].stage if place in self._rests else stages.DORMANT

    def check(self, place: int) -> None:
        """Raise :class:`~esperml.kasmina.errors.RefusedError`, saying for how long, while ``place`` rests."""
        rest = self._rests.get(place)
        if rest is not None:
            raise RefusedError(
                f"the place is {stages.stage_name(rest.stage)} for another {rest.steps_to_rest} steps, since a seed "
                "was removed there"
            )

    def _settle(self, place: int) -> None:
        rest = self._rests[place]
        while (following := stages.advance(rest.stage, rest.facts)) != rest.stage:
            rest.stage, rest.steps_in_stage = following, 0
        if rest.stage == stages.DORMANT:
            del self._rests[place]
