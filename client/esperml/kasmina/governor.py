"""The governor: watches the training loss while the host is changed, and takes a change back that does harm.

Before the first change, and from then on at intervals while a seed lives or a change is young, it keeps a snapshot of
all that training depends on, and only of a state that is sound. Where the loss falls sick (see
:mod:`~esperml.kasmina.loss_watch`) it goes back to the newest snapshot from before that began. Changes made since are
undone by that; where there are none, the youngest seed is culled. A seed that gave what no host should see (see
:mod:`~esperml.kasmina.guard`) is taken back likewise: it was left out then, but may have done harm on the way. Where
the loss falls sick again, it goes back to an older snapshot, without the seeds that it has culled, and without any
snapshot it culls every seed that lives. So the host's own training always has the last word.

A run that was never changed is watched and never touched: its trouble is its own, and only told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from torch import Tensor
from torch.optim import Optimizer

from esperml.kasmina.errors import CheckpointError, RefusedError
from esperml.kasmina.figures import learning_rate
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.guard import UNUSABLE
from esperml.kasmina.loss_watch import STALL, LossWatch, Verdict
from esperml.kasmina.seeds import Seed
from esperml.kasmina.snapshots import Snapshots, not_finite
from esperml.kasmina.training_state import TrainingState

_log = structlog.get_logger(__name__)

FRESH: Final = 50
"""Steps for which a snapshot will do for further changes."""

_MOST_PENDING: Final = 4096
_MOST_CHANGES: Final = 1024


@dataclass(frozen=True, slots=True)
class GovernorOptions:
    """How the governor guards a run.

    A snapshot holds the host's and its seeds' parameters and buffers and the optimizer's state: with Adam three times
    the parameters. There are ``snapshots`` of them at most, and none while nothing of ours is at work.

    Attributes:
        snapshots: how many to keep, at least 1.
        folder: where to keep them; ``None``: in the host's memory.
        snapshot_every: optimizer steps from one to the next while a seed lives or a change is young.
        probation_steps: optimizer steps for which a change is young.
        stall_steps: steps without progress after which the loss has stalled; ``None``: stalls are not looked for.
        always: guard the run also where nothing of ours can be the cause.
        all_generators: a roll-back also sets Python's and NumPy's random number generators back, not torch's alone.
    """

    snapshots: int = 2
    folder: Path | None = None
    snapshot_every: int = 500
    probation_steps: int = 500
    stall_steps: int | None = STALL
    always: bool = False
    all_generators: bool = False

    def __post_init__(self) -> None:
        """Raise ``ValueError``, naming it, where a field is out of range."""
        least = {"snapshots": 1, "snapshot_every": 1, "probation_steps": 0, "stall_steps": 64}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}")


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the host that a command made, or the governor itself.

    Attributes:
        step: when.
        decision_id: the command's; empty for the governor's own.
        seed_id: the seed concerned.
        verb: what was done.
        parameters_added: negative where some were removed.
    """

    step: int
    decision_id: str
    seed_id: str
    verb: str
    parameters_added: int


@dataclass(frozen=True, slots=True)
class Intervention:
    """What the governor did.

    Attributes:
        words: why, and what was done.
        undone: changes that do not stand any more, the latest first.
        restructured: whether the host's structure is another one now.
    """

    words: str
    undone: tuple[Change, ...]
    restructured: bool


class Governor:
    """Guards one run.

    Args:
        training: takes the run's state down and puts it back.
        grafter: culls.
        optimizer: whose learning rate may explain that the loss has risen.
        options: how to guard.
        may_act: false in a run that is only observed: what is seen is told, and nothing done.

    Attributes:
        rolled_back_at: step of the latest roll-back; commands decided up to then are void. -1 where there was none.
        remarks: what the user should know, by what it is about.
    """

    def __init__(
        self,
        training: TrainingState,
        grafter: Grafter,
        optimizer: Optimizer,
        options: GovernorOptions,
        *,
        may_act: bool,
    ) -> None:
        self.rolled_back_at = -1
        self.remarks: dict[str, str] = {}
        self._training = training
        self._grafter = grafter
        self._optimizer = optimizer
        self._options = options
        self._may_act = may_act
        self._watch = LossWatch(options.stall_steps)
        self._snapshots = Snapshots(options.snapshots, options.folder)
        self._changes: deque[Change] = deque(maxlen=_MOST_CHANGES)
        self._pending: deque[tuple[int, Tensor]] = deque(maxlen=_MOST_PENDING)
        self._rate: float | None = None
        self._condemned: set[str] = set()  # Seeds that were culled here; an older snapshot may still hold them.

    def note(self, step: int, loss: Tensor | float | None) -> None:
        """Take in the loss of ``step``. Never waits for a device: its losses are read at the next report."""
        if isinstance(loss, Tensor):
            if not loss.is_cpu:
                # A tensor of its own: the user's may be written anew at each step.
                self._pending.append((step, loss.detach().float().mean()))
                return
            loss = loss.item() if loss.numel() == 1 else loss.detach().float().mean().item()
        if loss is not None:
            self._watch.take(step, float(loss))

    def check(self, step: int, *, at_report: bool) -> Intervention | None:
        """Look at what came since the last time, and do what must be done.

        Args:
            step: optimizer steps so far.
            at_report: whether a report is due: then what is still on a device is read, and snapshots are taken.
        """
        if not at_report and (self._pending or not self._watch.alarmed or not self._exposed(step)):
            return None
        self._read()
        exposed = self._exposed(step)
        verdict = self._watch.verdict()
        if verdict is not None and self._is_excused(verdict):
            verdict = None
        culprit = self._culprit() if verdict is None and at_report else None
        if culprit is not None:
            verdict = _blamed(culprit, step)
        may_act = exposed and self._may_act
        if verdict is None and may_act and at_report:
            verdict = self._renew(step)
        if verdict is not None and may_act:
            return self._intervene(step, verdict, culprit)
        if verdict is not None:
            why = "the run is only observed" if exposed else "no seed lives and no change is young"
            self.remarks.setdefault(
                f"the loss is {verdict.ailment}",
                f"{verdict.words}, since step {verdict.since}: {why}, so that nothing was undone",
            )
        if not exposed:
            self._snapshots.clear()
        return None

    def prepare(self, step: int) -> None:
        """Make sure that there is a sound state to go back to: call it before a change.

        A storm of changes shares its snapshots: one of at most :data:`FRESH` steps ago will do.

        Raises:
            RefusedError: the training is sick already, or may be, or its state cannot be kept.
        """
        self._read()
        if self._watch.in_doubt or self._watch.verdict() is not None:
            raise RefusedError("the training loss is in doubt: nothing is changed before it has settled")
        newest = self._snapshots.newest
        if newest is None or step - newest.step >= FRESH:
            sick = self._snapshot(step)
            if sick:
                raise RefusedError(f"{sick} is not finite: nothing is changed before that is mended")

    def changed(self, change: Change) -> None:
        """Note a change that was made."""
        self._changes.append(change)

    def state_dict(self) -> dict[str, Any]:
        """What it knows, in plain values. Snapshots are not part of it: the state that it goes into is one itself."""
        return {
            "watch": self._watch.state_dict(),
            "changes": [asdict(change) for change in self._changes],
            "rolled_back_at": self.rolled_back_at,
            "rate": self._rate,
            "condemned": sorted(self._condemned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave. Snapshots taken before are of another past, and dropped."""
        self._snapshots.clear()
        self._pending.clear()
        self._watch.load_state_dict(state["watch"])
        self._changes.clear()
        self._changes.extend(Change(**change) for change in state["changes"])
        self.rolled_back_at = state["rolled_back_at"]
        self._rate = state["rate"]
        self._condemned = set(state["condemned"])

    def close(self) -> None:
        """Drop the snapshots."""
        self._snapshots.clear()

    def _exposed(self, step: int) -> bool:
        """Whether something of ours may be the cause of harm."""
        young = self._last_change() >= step - self._options.probation_steps
        return self._options.always or young or self._grafter.host.live_seeds > 0

    def _last_change(self) -> int:
        return self._changes[-1].step if self._changes else -self._options.probation_steps - 1

    def _read(self) -> None:
        if self._pending:
            losses = torch.stack([loss for _, loss in self._pending]).tolist()
            for (step, _), loss in zip(self._pending, losses, strict=True):
                self._watch.take(step, loss)
            self._pending.clear()

    def _is_excused(self, verdict: Verdict) -> bool:
        """A loss that rose because the learning rate did, as at a warm restart, has not stalled."""
        rate = learning_rate(self._optimizer)
        return verdict.ailment == "stalled" and rate is not None and self._rate is not None and rate > self._rate

    def _renew(self, step: int) -> Verdict | None:
        """Take a snapshot where one is due. A verdict where the state turns out to be sick, whatever the loss says."""
        newest = self._snapshots.newest
        # Without a loss the state itself is all that there is to judge by.
        every = self._options.snapshot_every if self._watch.told else 1
        if self._watch.in_doubt or (newest is not None and step - newest.step < every):
            return None
        try:
            sick = self._snapshot(step)
        except RefusedError as error:
            self.remarks.setdefault("snapshot", error.reason)
            return None
        if not sick:
            return None
        return Verdict("not finite", step if newest is None else newest.step + 1, f"{sick} is not finite")

    def _snapshot(self, step: int) -> str:
        """Keep the state, if it is finite; else say what in it is not. :class:`RefusedError` if it cannot be kept."""
        try:
            state = self._training.capture()
            sick = not_finite(state)
            if not sick:
                self._snapshots.add(step, {**state, "governor": self.state_dict()})
                _log.debug("snapshot_taken", step=step, snapshots=len(self._snapshots), bytes=self._snapshots.bytes)
        except (CheckpointError, OSError) as error:
            raise RefusedError(f"no state to go back to can be kept: {error}") from error
        self._rate = learning_rate(self._optimizer)
        return sick

    def _culprit(self) -> Seed | None:
        """The first living seed that gave what no host should see. It was left out, but what led up to that was not."""
        for seed in self._grafter.host.seeds.values():
            seed.count_unusable()
            if seed.live and seed.unusable_since is not None:
                return seed
        return None

    def _intervene(self, step: int, verdict: Verdict, culprit: Seed | None = None) -> Intervention | None:
        restored = self._restore(verdict.since)
        if restored is None:
            return self._cull_all(step, verdict)
        taken, known, restructured = restored
        undone = tuple(
            change
            for change in reversed(self._changes)
            if change.step >= taken and change.decision_id and change.seed_id not in self._condemned
        )
        self._resume(known)
        for seed_id in self._condemned & self._grafter.host.seeds.keys():
            self._cull(step, seed_id)
            restructured = True
        words = f"{verdict.words}, since step {verdict.since}: rolled back to step {taken}"
        if undone:
            words += ", which undoes " + ", ".join(f"{change.verb} {change.seed_id}" for change in undone)
        if culprit is None:
            culled = () if undone else self._cull_youngest(step)
            which = "the youngest seed"
        else:  # An older state holds it, perhaps, as it was.
            culled = self._cull_if_there(step, culprit.seed_id)
            which = "the seed to blame"
        if culled:
            words += f", and culled {culled[0].seed_id}, {which}"
        self.rolled_back_at = step
        return Intervention(words, undone + culled, restructured or bool(culled))

    def _restore(self, since: int) -> tuple[int, Mapping[str, Any], bool] | None:
        """Put back the newest snapshot from before ``since`` that can be read and still fits.

        Returns:
            Its step, what the governor knew then, and whether the structure changed; ``None`` where there is none.
        """
        while self._snapshots.newest is not None:
            try:
                found = self._snapshots.take_back(since)
                if found is not None:
                    taken, state = found
                    changed = self._training.restore(state, torch_only=not self._options.all_generators)
                    return taken, state["governor"], changed
            except (OSError, CheckpointError) as error:
                self.remarks["a snapshot"] = f"a snapshot cannot be put back: {error}"
        return None

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a snapshot of this very run; older ones stay."""
        self._pending.clear()
        self._watch.load_state_dict(state["watch"])
        self._changes.clear()
        self._changes.extend(Change(**change) for change in state["changes"])
        self._rate = state["rate"]

    def _cull_all(self, step: int, verdict: Verdict) -> Intervention | None:
        """Without a state to go back to, the least is that nothing of ours goes on doing harm."""
        culled: tuple[Change, ...] = ()
        while more := self._cull_youngest(step):
            culled += more
        if not culled:
            self.remarks.setdefault(f"the loss is {verdict.ailment}", f"{verdict.words}, since step {verdict.since}")
            return None
        words = f"{verdict.words}, since step {verdict.since}: culled " + ", ".join(c.seed_id for c in culled)
        return Intervention(words, culled, restructured=True)

    def _cull_youngest(self, step: int) -> tuple[Change, ...]:
        live = [seed for seed in self._grafter.host.seeds.values() if seed.live]
        if not live:
            return ()
        return self._cull_if_there(step, min(live, key=lambda seed: seed.age).seed_id)

    def _cull_if_there(self, step: int, seed_id: str) -> tuple[Change, ...]:
        seed = self._grafter.host.seeds.get(seed_id)
        if seed is None:
            return ()
        self._cull(step, seed_id)
        return (Change(step, seed.decision_id, seed.seed_id, "germinate", seed.parameter_count),)

    def _cull(self, step: int, seed_id: str) -> None:
        seed = self._grafter.cull(seed_id)
        self._condemned.add(seed_id)
        self.changed(Change(step, "", seed_id, "cull", -seed.parameter_count))


def _blamed(seed: Seed, step: int) -> Verdict:
    """A seed gave what no host should see: it says since when."""
    since = step - seed.age + (seed.unusable_since or 0)
    return Verdict("spoilt by a seed", since, f"{seed.seed_id} {UNUSABLE}")
