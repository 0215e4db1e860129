"""Carrying out commands: checks against what the user allows, the change itself, and what to answer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain, count
from typing import Final

from esperml.kasmina.budgets import Budgets
from esperml.kasmina.errors import RefusedError
from esperml.kasmina.governor import Change, Governor
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.seeds import Seed
from esperml.v1 import decision_pb2, graph_pb2

_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of one command.

    Attributes:
        applied: the answer, as it goes on the bus.
        words: what was asked and what was done, for a person.
        structure_changed: whether the host's structure is a new one.
    """

    applied: decision_pb2.Applied
    words: str
    structure_changed: bool


class Commander:
    """Carries out commands on one host, each at most once.

    Args:
        grafter: makes the changes.
        limits: what the user allows; no command can go beyond it.
        mode: in observe mode every command is refused.
        governor: keeps a state to go back to before each change, and is told of it; ``None``: nobody does.
        budgets: hold a new seed to what it may cost.
    """

    def __init__(
        self,
        grafter: Grafter,
        limits: graph_pb2.RunLimits,
        mode: decision_pb2.Mode.ValueType,
        governor: Governor | None,
        budgets: Budgets,
    ) -> None:
        self._grafter = grafter
        self._limits = limits
        self._mode = mode
        self._governor = governor
        self._budgets = budgets
        grafter.host.resting.steps = limits.embargo_steps
        self._handled: OrderedDict[str, None] = OrderedDict()

    @property
    def handled(self) -> list[str]:
        """Decisions whose commands were handled, oldest first."""
        return list(self._handled)

    @handled.setter
    def handled(self, decisions: list[str]) -> None:
        self._handled = OrderedDict.fromkeys(decisions)

    def carry_out(self, command: decision_pb2.Command, step: int) -> Carried | None:
        """Apply or refuse ``command`` at ``step``. ``None`` where it was handled before."""
        if command.decision_id in self._handled:
            return None
        self._handled[command.decision_id] = None
        if len(self._handled) > _REMEMBERED:
            self._handled.popitem(last=False)
        applied = decision_pb2.Applied(decision_id=command.decision_id, step=step, seed_id=command.target.seed_id)
        verb = command.action.WhichOneof("kind") or "nothing"
        host = self._grafter.host
        before = host.structure_version
        try:
            if command.expires_after_step and step > command.expires_after_step:
                applied.status = decision_pb2.COMMAND_STATUS_EXPIRED
                applied.reason = f"it expired after step {command.expires_after_step}; this is step {step}"
            else:
                self._check_allowed(command)
                self._prepare(verb, step)
                seed, added = self._apply(command, verb, step)
                applied.status = decision_pb2.COMMAND_STATUS_APPLIED
                applied.seed_id = seed.seed_id
                applied.parameters_added = added
                if self._governor is not None:
                    self._governor.changed(Change(step, command.decision_id, seed.seed_id, verb, added))
        except RefusedError as error:
            applied.status = decision_pb2.COMMAND_STATUS_REFUSED
            applied.reason = error.reason
        applied.structure_version = host.structure_version
        return Carried(applied, _words(command, verb, applied), host.structure_version != before)

    def _check_allowed(self, command: decision_pb2.Command) -> None:
        if self._mode not in {decision_pb2.MODE_ADVISE, decision_pb2.MODE_ACT}:
            raise RefusedError("the run is only observed")
        if not command.decision_id:
            raise RefusedError("decision_id is required")
        if self._governor is not None and command.decided_at_step <= self._governor.rolled_back_at:
            raise RefusedError(
                f"it was decided at step {command.decided_at_step}, before the roll-back at step "
                f"{self._governor.rolled_back_at}"
            )

    def _prepare(self, verb: str, step: int) -> None:
        if self._governor is None:
            return
        try:
            self._governor.prepare(step)
        except RefusedError:
            # To take a seed away is no risk that a state to go back to must cover.
            if verb != "cull":
                raise

    def _apply(self, command: decision_pb2.Command, verb: str, step: int) -> tuple[Seed, int]:
        target, germinate = command.target, command.action.germinate
        if verb == "germinate":
            budget = self._budget(germinate, target.target_layer, step)
            seed = self._grafter.germinate(
                germinate.blueprint,
                target.source_layer,
                target.target_layer,
                budget,
                seed_id=self._name(command.decision_id),
                blend_steps=germinate.blend_steps,
                train_steps=germinate.train_steps,
                schedule=germinate.schedule,
                warmup_steps=germinate.warmup_steps,
                decision_id=command.decision_id,
                accept=self._budgets.accept,
            )
            return seed, seed.parameter_count
        if verb == "set_alpha":
            return self._grafter.set_alpha(target.seed_id, command.action.set_alpha.alpha), 0
        if verb == "fossilise":
            return self._grafter.fossilise(target.seed_id), 0
        if verb == "cull":
            seed = self._grafter.cull(target.seed_id)
            return seed, -seed.parameter_count
        raise RefusedError(f"there is nothing to carry out: action is {verb!r}")

    def _budget(self, germinate: decision_pb2.Germinate, target_layer: str, step: int) -> int:
        """Most parameters that a new seed may have: the least of what is asked for, allowed, and left."""
        host, limits = self._grafter.host, self._limits
        if germinate.parameter_budget < 1:
            raise RefusedError("action.germinate.parameter_budget must be at least 1")
        if limits.HasField("warmup_steps") and step < limits.warmup_steps:
            raise RefusedError(f"the run allows nothing before step {limits.warmup_steps}; this is step {step}")
        if limits.HasField("last_germination_step") and step > limits.last_germination_step:
            raise RefusedError(
                f"the run allows no germination after step {limits.last_germination_step}; this is step {step}"
            )
        if limits.HasField("max_live_seeds") and host.live_seeds >= limits.max_live_seeds:
            raise RefusedError(f"the run allows {limits.max_live_seeds} live seeds, and there are {host.live_seeds}")
        budget = germinate.parameter_budget
        if limits.HasField("graft_parameter_budget"):
            budget = min(budget, limits.graft_parameter_budget)
        if limits.HasField("parameter_budget"):
            budget = min(budget, limits.parameter_budget - host.seed_parameters)
        room = self._budgets.room(host.layers[host.layer_index(target_layer)].module)
        return budget if room is None else min(budget, room)

    def _name(self, decision_id: str) -> str:
        """A short name of the decision, that no other seed has."""
        stem = f"seed-{decision_id.replace('.', '-')}"
        taken = self._grafter.host.seeds
        names = chain([stem[:13], stem], (f"{stem}-{again}" for again in count(2)))
        return next(name for name in names if name not in taken)


def _words(command: decision_pb2.Command, verb: str, applied: decision_pb2.Applied) -> str:
    where = command.target
    if verb == "germinate":
        asked = f"germinate {command.action.germinate.blueprint} from {where.source_layer} to {where.target_layer}"
    elif verb == "set_alpha":
        asked = f"set alpha of {where.seed_id} to {command.action.set_alpha.alpha:g}"
    else:
        asked = f"{verb} {where.seed_id}"
    if applied.status == decision_pb2.COMMAND_STATUS_APPLIED:
        because = f"; because {command.reason}" if command.reason else ""
        return f"{asked}: done, {applied.parameters_added:+d} parameters{because} (decision {command.decision_id})"
    status = decision_pb2.CommandStatus.Name(applied.status).removeprefix("COMMAND_STATUS_").lower()
    return f"{asked}: {status}, {applied.reason} (decision {command.decision_id})"
