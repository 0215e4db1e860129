"""A living seed: its module, its place, and the hooks that graft it onto the host."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esperml.kasmina import compiling, schedules, stages
from esperml.kasmina.errors import FAILURES
from esperml.kasmina.guard import UNUSABLE, shield, shield_parameters, usable
from esperml.kasmina.schedules import Schedule
from esperml.kasmina.stages import SeedFacts, Stage
from esperml.kasmina.topology import layer_input
from esperml.kasmina.upstream import NOT_RUN, UpstreamInputs

CONTAINER: Final = "kasmina_seeds"
"""Submodule of a target layer in which its seeds live. It exists only while there are any."""


class Seed:
    """A sub-network that reads the input of ``source`` and adds ``alpha`` times its output to that of ``target``.

    For a span of two the source's input is kept from the source's call to the target's call of one invocation, see
    :mod:`esperml.kasmina.upstream`. A seed whose input cannot be told for certain, that fails, or that gives what no
    host should see, is left out of the pass, and an error is counted.

    While it trains before it blends in, it adds nothing: it learns from the gradient of the target's output as if it
    did, and nothing of that reaches the host.

    Attributes:
        seed_id: name, unique in the host.
        place: index into ``HostGraph.places``.
        blueprint: name of the blueprint.
        decision_id: the decision that planted it; empty where none did.
        body: the module, called as ``body(x, output)``.
        blend_steps: optimizer steps over which alpha rises to 1.
        train_steps: optimizer steps that it trains before.
        schedule: how alpha rises.
        warmup_steps: optimizer steps over which the learning rate of its parameters rises.
        stage: where in its life it is.
        steps_in_stage: optimizer steps since it entered the stage.
        age: optimizer steps since it was planted.
        alpha: factor on its output, 0 to 1.
        held: true once a command has set alpha: it no longer rises by itself.
        errors: forward passes in which it was left out because it failed.
        last_error: what the last of them was; empty where there was none.
        unusable_since: its age when it first gave what no host should see; ``None`` where it never did.
        ablation_contribution: held-out loss without it less held-out loss with it; ``None`` until measured.
    """

    def __init__(
        self,
        seed_id: str,
        place: int,
        blueprint: str,
        body: nn.Module,
        *,
        blend_steps: int,
        train_steps: int = 0,
        schedule: Schedule = schedules.LINEAR,
        decision_id: str = "",
    ) -> None:
        self.seed_id = seed_id
        self.place = place
        self.blueprint = blueprint
        self.decision_id = decision_id
        self.body = body
        self.blend_steps = blend_steps
        self.train_steps = train_steps
        self.schedule = schedule
        self.warmup_steps = 0
        self.stage: Stage = stages.GERMINATED
        self.steps_in_stage = 0
        self.age = 0
        self.held = False
        self.errors = 0
        self.last_error = ""
        self.unusable_since: int | None = None
        self.ablation_contribution: float | None = None
        self.alpha = self._scheduled_alpha()
        self._upstream = UpstreamInputs()
        self._unusable: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        shield_parameters(body)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and loaded seeds are shielded anew: a parameter's hooks are not carried over."""
        self.__dict__.update(state)
        shield_parameters(self.body)

    @property
    def facts(self) -> SeedFacts:
        """What the gates of the stages may ask."""
        return SeedFacts(self.alpha, self.steps_in_stage, self.steps_to_train)

    @property
    def live(self) -> bool:
        """True while it can still be culled."""
        return self.stage in stages.LIVE

    @property
    def steps_to_train(self) -> int:
        """Optimizer steps that it still trains before it blends in; 0 once a command has set alpha."""
        return 0 if self.held else max(0, self.train_steps - self.age)

    @property
    def parameter_count(self) -> int:
        """Number of its parameters."""
        return sum(parameter.numel() for parameter in self.body.parameters())

    def enter(self, stage: Stage) -> None:
        """Go to ``stage``. Raises :class:`~esperml.kasmina.errors.RefusedError` where the table has no open way."""
        stages.check(self.stage, stage, self.facts)
        self.stage = stage
        self.steps_in_stage = 0

    def advance(self) -> None:
        """One optimizer step has passed: alpha rises, and automatic transitions are taken."""
        self.age += 1
        self.steps_in_stage += 1
        self._upstream.clear()
        if not self.live:
            return
        if not self.held:
            self.alpha = self._scheduled_alpha()
        following = stages.advance(self.stage, self.facts)
        if following != self.stage:
            self.enter(following)

    def count_unusable(self) -> None:
        """Count passes in which a device left it out by itself, which waits for that device."""
        if self._unusable is None:
            return
        count, self._unusable = int(self._unusable), None
        if count:
            self._blame()
            self.errors += count
            self.last_error = UNUSABLE

    def attach(self, source: nn.Module, target: nn.Module, around: nn.Module | None = None) -> None:
        """Register the body with the target and hook it on.

        Args:
            source: the layer whose input it reads.
            target: the layer to whose output it adds.
            around: for a span of two, the smallest module that holds both. Without it an invocation is what runs from
                one call of the source to the next.
        """
        container = getattr(target, CONTAINER, None)
        if not isinstance(container, nn.ModuleDict):
            container = nn.ModuleDict().train(target.training)
            target.add_module(CONTAINER, container)
        container[self.seed_id] = self.body
        compiling.hooks_changed()
        if source is target:
            self._handles.append(target.register_forward_hook(self._graft_own_input, with_kwargs=True))
            return
        # The order counts where one of the modules is another: a call begins before, and ends after, all else.
        if around is not None:
            self._handles.append(around.register_forward_pre_hook(self._enter))
        self._handles.append(source.register_forward_pre_hook(self._keep, with_kwargs=True))
        self._handles.append(target.register_forward_hook(self._graft_kept_input))
        if around is not None:
            self._handles.append(around.register_forward_hook(self._leave, always_call=True))

    def detach(self, target: nn.Module) -> None:
        """Take hooks and body off, and the container with the last of them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._upstream.clear()
        container = getattr(target, CONTAINER)
        del container[self.seed_id]
        if not len(container):
            delattr(target, CONTAINER)
        compiling.hooks_changed()

    def graft(self, x: Tensor | None, output: Tensor, why_not: str = NOT_RUN) -> Tensor | None:
        """``output`` with what the seed adds to it, or ``None`` where it adds nothing.

        Args:
            x: what it reads; ``None`` where that cannot be told.
            output: of the target layer.
            why_not: why it cannot be told.
        """
        # Asked in this order, a compiler sees no number that changes with every step.
        trains = self.train_steps > 0 and self.steps_to_train > 0
        if self.alpha == 0 and not (trains and torch.is_grad_enabled()):
            return None
        if x is None:
            return self._leave_out(why_not)
        # What it learns before it blends in is nothing to the host, whose gradients stay what they were.
        seen, seen_output = (x.detach(), output.detach()) if trains else (shield(x), shield(output))
        try:
            added = self.body(seen, seen_output)
        except FAILURES as error:
            return self._leave_out(f"{type(error).__name__}: {error}")
        if not isinstance(added, Tensor) or added.shape != output.shape:
            shape = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__
            return self._leave_out(f"gave {shape} where {tuple(output.shape)} is due")
        added = added.to(output.dtype)
        good = usable(added, output)
        if good.device.type == "cpu" and not torch.compiler.is_compiling():
            if not good:
                self._blame()
                return self._leave_out(UNUSABLE)
        else:
            bad = ~good
            self._unusable = bad.long() if self._unusable is None else self._unusable + bad
            added = torch.where(good, added, 0)
        return output + (added - added.detach() if trains else self.alpha * added)

    def _scheduled_alpha(self) -> float:
        if self.steps_to_train:
            return 0.0
        return schedules.alpha_at(self.schedule, self.age + 1 - self.train_steps, self.blend_steps)

    def _enter(self, _around: nn.Module, _args: tuple[Any, ...]) -> None:
        self._upstream.enter()

    def _leave(self, _around: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self._upstream.leave()

    def _keep(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._upstream.keep(layer_input(args, kwargs))

    def _graft_own_input(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        return self.graft(layer_input(args, kwargs), output)

    def _graft_kept_input(self, _layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, why_not = self._upstream.take()
        return self.graft(x, output, why_not)

    def _blame(self) -> None:
        if self.unusable_since is None:
            self.unusable_since = self.age

    def _leave_out(self, error: str) -> Tensor | None:
        """Count the error and say "no change" to the hook's caller."""
        self.errors += 1
        self.last_error = error
        return None
