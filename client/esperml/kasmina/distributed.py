"""Sessions of processes that train one model together: rank 0 decides, and all apply the same at the same step.

Only rank 0 talks to the server, measures, evaluates and guards the run. Every ``report_every`` calls of ``step`` the
ranks meet: one reduction of two bytes, where nothing has changed. Only at such a step does rank 0 change the host; it
then says what there is now, and the others make theirs the same. What they are told is the outcome, not the command, so
that nothing depends on what another rank would have made of it.

A rank whose session fails says so when they meet next; then all stop, with the same seeds at the same alphas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
from torch import Tensor

from esperml.kasmina.generators import capture_generators
from esperml.kasmina.host import Host
from esperml.kasmina.ranks import NewbornGradients, Ranks
from esperml.kasmina.seeds import Seed
from esperml.kasmina.session import Session

_log = structlog.get_logger(__name__)

_ANOTHER_FAILED: Final = "the session of another rank has failed, and all have stopped; the log of that rank says why"
_NOT_FACTS: Final = frozenset({"seed_id", "place", "blueprint", "body"})


@dataclass(frozen=True, slots=True)
class _SeedNow:
    """A seed of rank 0.

    Attributes:
        seed_id: its name.
        identity: its place, its blueprint, and how many parameters it has.
        facts: all else that is known of it, such as stage and alpha.
        tensors: its parameters and buffers, where the others may not have the same.
    """

    seed_id: str
    identity: tuple[int, str, int]
    facts: dict[str, Any]
    tensors: dict[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class _Now:
    """What rank 0 has now.

    Attributes:
        structure_version: of the host.
        seeds: in their order.
        training: all that training depends on, where rank 0 has gone back to an earlier state.
    """

    structure_version: int
    seeds: tuple[_SeedNow, ...]
    training: dict[str, Any] | None


class RankSession(Session):
    """What the sessions of all ranks have in common: when they meet, and how they part.

    Args:
        ranks: the processes that train the model together.
        told: what :class:`Session` takes.
    """

    def __init__(self, ranks: Ranks, *told: Any, **named: Any) -> None:
        self._ranks = ranks
        self._calls = 0
        self._parted = False
        super().__init__(*told, **named)
        self._gradients = NewbornGradients(self._host, ranks)
        self._gradients.attend()

    def step(self, *, loss: Tensor | float | None = None, epoch: int | None = None) -> None:
        """One optimizer step is done on all ranks; see :meth:`Session.step`."""
        self._calls += 1
        super().step(loss=loss, epoch=epoch)
        if self._meets and not self._closed:
            start = time.perf_counter()
            self._guard(self._meet)
            self._clock.spend(time.perf_counter() - start)
        self._gradients.attend()

    @property
    def _meets(self) -> bool:
        """Whether the ranks meet at this step. It must not depend on anything that may differ between them."""
        return not self._parted and self._calls % self._report_every == 0

    def _meet(self) -> None:
        self._parted = True  # Unless all goes well: a rank that fails half-way would keep the others waiting.
        changed, failed = self._ranks.any_of(self._has_changed(), bool(self.failure))
        if changed or failed:
            (stray,) = self._ranks.any_of(not self._settle())
            failed = failed or stray
        if failed:
            self._part()
        else:
            self._parted = False

    def _part(self) -> None:
        """Stop for good. A seed that is not on all ranks goes: its gradients could not be averaged."""
        if not self.failure:
            self.failure = f"step {self.steps}: {_ANOTHER_FAILED}"
            _log.error("session_failed", run_id=self.run, step=self.steps, error=self.failure)
        self._reporter.disarm()
        everywhere = self._ranks.gather({seed.seed_id: _identity(seed) for seed in self._host.seeds.values()})
        for name, seed in list(self._host.seeds.items()):
            if any(theirs.get(name) != _identity(seed) for theirs in everywhere):
                self._grafter.cull(name)
                self._actions.append((self.steps, f"{name} is gone: it was not on all ranks"))

    def _has_changed(self) -> bool:
        """Whether there is something to say."""
        raise NotImplementedError

    def _settle(self) -> bool:
        """Say or hear what rank 0 has now, and have the same. Whether that went well."""
        raise NotImplementedError


class LeadingSession(RankSession):
    """The session of rank 0."""

    def __init__(self, *told: Any, **named: Any) -> None:
        super().__init__(*told, **named)
        self._shared: dict[str, Seed] = dict(self._host.seeds)
        self._mark = self._marks()

    @property
    def _may_change(self) -> bool:
        return self._meets

    def _marks(self) -> tuple[int, int, int]:
        """Changes when anything does that the others cannot know."""
        rolled_back = -1 if self._governor is None else self._governor.rolled_back_at
        return self._host.structure_version, self.decisions_applied, rolled_back

    def _has_changed(self) -> bool:
        return self._marks() != self._mark

    def _settle(self) -> bool:
        said: list[_Now] = []
        failure = self.failure
        self._guard(lambda: said.append(self._now()))
        self._ranks.hear(said[0] if said else None)
        return self.failure == failure

    def _now(self) -> _Now:
        before, self._mark = self._mark, self._marks()
        rolled_back = before[2] != self._mark[2]
        seeds = tuple(self._seed_now(seed) for seed in self._host.seeds.values())
        self._shared = dict(self._host.seeds)
        return _Now(self._host.structure_version, seeds, self._training.capture() if rolled_back else None)

    def _seed_now(self, seed: Seed) -> _SeedNow:
        facts = {name: value for name, value in vars(seed).items() if name[0] != "_" and name not in _NOT_FACTS}
        known = self._shared.get(seed.seed_id) is seed
        tensors = None if known else {name: value.cpu() for name, value in seed.body.state_dict().items()}
        return _SeedNow(seed.seed_id, _identity(seed), facts, tensors)


class FollowingSession(RankSession):
    """The session of any other rank: it measures nothing, says nothing, and has what rank 0 has."""

    @property
    def _may_change(self) -> bool:
        return False

    def _arm_if_due(self) -> None:
        """Rank 0 measures."""

    def _has_changed(self) -> bool:
        return False

    def _settle(self) -> bool:
        now: _Now | None = self._ranks.hear(None)
        failure = self.failure
        if now is not None:
            self._guard(self._follow, now)
        return self.failure == failure

    def _follow(self, now: _Now) -> None:
        if now.training is not None:
            self._training.restore({**now.training, "generators": capture_generators()})
        host = self._host
        there = [(seed.seed_id, *seed.identity) for seed in now.seeds]
        for name, seed in list(host.seeds.items()):
            if (name, *_identity(seed)) not in there:
                self._grafter.cull(name)
                self._actions.append((self.steps, f"{name} is gone, as on rank 0"))
        for seed_now in now.seeds:
            self._have(seed_now, host)
        host.structure_version = now.structure_version

    def _have(self, there: _SeedNow, host: Host) -> None:
        if there.seed_id not in host.seeds:
            number, blueprint, parameters = there.identity
            place = host.places[number]
            host.resting.forget(number)  # Rank 0 has seen to that.
            source, target = host.layers[place.source].name, host.layers[place.target].name
            self._grafter.germinate(blueprint, source, target, parameters, seed_id=there.seed_id)
            self._actions.append((self.steps, f"{there.seed_id} is here, as on rank 0"))
        seed = host.seeds[there.seed_id]
        if there.tensors is not None:
            seed.body.load_state_dict(there.tensors)
        for name, value in there.facts.items():
            setattr(seed, name, value)
        self._grafter.warmup.refresh()


def session_of(ranks: Ranks) -> Callable[..., Session]:
    """What makes the session of this rank."""
    return partial(LeadingSession if ranks.leads else FollowingSession, ranks)


def check_same(ranks: Ranks, host: Host, **settings: object) -> None:
    """Raise :class:`KasminaError`, on all ranks, where they have not wrapped the same model, or connect otherwise."""
    for name, value in settings.items():
        ranks.check_same(name, repr(value).encode())
    ranks.check_same("the host", host.graph().SerializeToString(deterministic=True))


def _identity(seed: Seed) -> tuple[int, str, int]:
    """What a seed is, whatever has become of it: place, blueprint and size."""
    return seed.place, seed.blueprint, seed.parameter_count
