"""A living seed: its module, its place, and the hooks that graft it onto the host."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esperml.kasmina import compiling, stages
from esperml.kasmina.errors import FAILURES
from esperml.kasmina.stages import SeedFacts, Stage
from esperml.kasmina.topology import layer_input

CONTAINER: Final = "kasmina_seeds"
"""Submodule of a target layer in which its seeds live. It exists only while there are any."""


class Seed:
    """A sub-network that reads the input of ``source`` and adds ``alpha`` times its output to that of ``target``.

    For a span of two the source's input is kept from the source's call to the target's call of one forward pass. It
    is handed over once: a target that runs again without its source, as when only its part of the host is
    recomputed, leaves the seed out and counts an error.

    Attributes:
        seed_id: name, unique in the host.
        place: index into ``HostGraph.places``.
        blueprint: name of the blueprint.
        decision_id: the decision that planted it; empty where none did.
        body: the module, called as ``body(x, output)``.
        blend_steps: optimizer steps over which alpha rises to 1.
        stage: where in its life it is.
        steps_in_stage: optimizer steps since it entered the stage.
        age: optimizer steps since it was planted.
        alpha: factor on its output, 0 to 1.
        held: true once a command has set alpha: it no longer rises by itself.
        errors: forward passes in which it was left out because it failed.
        last_error: what the last of them was; empty where there was none.
        ablation_contribution: held-out loss without it less held-out loss with it; ``None`` until measured.
    """

    def __init__(
        self, seed_id: str, place: int, blueprint: str, body: nn.Module, *, blend_steps: int, decision_id: str = ""
    ) -> None:
        self.seed_id = seed_id
        self.place = place
        self.blueprint = blueprint
        self.decision_id = decision_id
        self.body = body
        self.blend_steps = blend_steps
        self.stage: Stage = stages.GERMINATED
        self.steps_in_stage = 0
        self.age = 0
        self.alpha = 1.0 if blend_steps == 0 else 1.0 / blend_steps
        self.held = False
        self.errors = 0
        self.last_error = ""
        self.ablation_contribution: float | None = None
        self._kept: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def facts(self) -> SeedFacts:
        """What the gates of the stages may ask."""
        return SeedFacts(self.alpha, self.steps_in_stage)

    @property
    def live(self) -> bool:
        """True while it can still be culled."""
        return self.stage in stages.LIVE

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
        if not self.live:
            return
        if not self.held:
            self.alpha = 1.0 if self.age + 1 >= self.blend_steps else (self.age + 1) / self.blend_steps
        following = stages.advance(self.stage, self.facts)
        if following != self.stage:
            self.enter(following)

    def attach(self, source: nn.Module, target: nn.Module) -> None:
        """Register the body with the target and hook it on."""
        container = getattr(target, CONTAINER, None)
        if not isinstance(container, nn.ModuleDict):
            container = nn.ModuleDict().train(target.training)
            target.add_module(CONTAINER, container)
        container[self.seed_id] = self.body
        if source is target:
            self._handles.append(target.register_forward_hook(self._graft_own_input, with_kwargs=True))
        else:
            self._handles.append(source.register_forward_pre_hook(self._keep, with_kwargs=True))
            self._handles.append(target.register_forward_hook(self._graft_kept_input))
        compiling.hooks_changed()

    def detach(self, target: nn.Module) -> None:
        """Take hooks and body off, and the container with the last of them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept = None
        container = getattr(target, CONTAINER)
        del container[self.seed_id]
        if not len(container):
            delattr(target, CONTAINER)
        compiling.hooks_changed()

    def _keep(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept = layer_input(args, kwargs)

    def _graft_own_input(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        return self.graft(layer_input(args, kwargs), output)

    def _graft_kept_input(self, _layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, self._kept = self._kept, None
        return self.graft(x, output)

    def graft(self, x: Tensor | None, output: Tensor) -> Tensor | None:
        """``output`` with what the seed adds to it, given its input ``x``; ``None`` where it adds nothing."""
        if self.alpha == 0:
            return None
        if x is None:
            return self._leave_out("its source layer did not run before its target")
        try:
            added = self.body(x, output)
        except FAILURES as error:
            return self._leave_out(f"{type(error).__name__}: {error}")
        if not isinstance(added, Tensor) or added.shape != output.shape:
            shape = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__
            return self._leave_out(f"gave {shape} where {tuple(output.shape)} is due")
        return output + self.alpha * added.to(output.dtype)

    def _leave_out(self, error: str) -> Tensor | None:
        """Count the error and say "no change" to the hook's caller."""
        self.errors += 1
        self.last_error = error
        return None
