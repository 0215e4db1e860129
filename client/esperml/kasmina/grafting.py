"""Structural changes of a live model together with its optimizer and schedulers."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from esperml.kasmina import stages
from esperml.kasmina.errors import RefusedError
from esperml.kasmina.host import Host
from esperml.kasmina.schedules import LINEAR, Schedule
from esperml.kasmina.seeds import Seed
from esperml.kasmina.surgery import Surgery
from esperml.kasmina.warmup import Warmup


class Grafter:
    """Carries out changes on a host and its running optimizer; see :class:`~esperml.kasmina.surgery.Surgery`.

    Call it between optimizer steps only.

    Args:
        host: the wrapped model's host.
        optimizer: the optimizer that trains it, or ``None`` for a host that is not trained.
        scheduler: its scheduler, if any; those inside a ``SequentialLR`` or ``ChainedScheduler`` are found.

    Attributes:
        host: the host.
        surgery: adds parameters to the optimizer, and takes them out.
        warmup: lets newborn parameters take smaller steps.
    """

    def __init__(self, host: Host, optimizer: Optimizer | None, scheduler: object | None = None) -> None:
        self.host = host
        self.surgery = Surgery(optimizer, scheduler)
        self.warmup = Warmup(host.seeds, optimizer)

    def germinate(
        self,
        blueprint: str,
        source_layer: str,
        target_layer: str,
        parameter_budget: int,
        *,
        seed_id: str,
        blend_steps: int = 0,
        train_steps: int = 0,
        schedule: Schedule = LINEAR,
        warmup_steps: int = 0,
        decision_id: str = "",
        accept: Callable[[Seed], None] = lambda _seed: None,
    ) -> Seed:
        """Plant a seed as large as ``parameter_budget`` allows; the host's outputs stay the same.

        Args:
            blueprint: what to plant.
            source_layer: layer whose input it reads.
            target_layer: layer to whose output it adds.
            parameter_budget: most parameters that it may have.
            seed_id: its name.
            blend_steps: optimizer steps over which its alpha rises to 1.
            train_steps: optimizer steps that it trains before, adding nothing.
            schedule: how alpha rises.
            warmup_steps: optimizer steps over which the learning rate of its parameters rises to that of its layer's.
            decision_id: the decision that asks for it.
            accept: raises :class:`RefusedError` where the seed, as it turned out, is not wanted.

        Raises:
            RefusedError: see :meth:`Host.plant`; also where the optimizer does not take the seed's parameters.
        """
        self.surgery.check()
        place = self.host.place_index(source_layer, target_layer)
        version = self.host.structure_version
        seed = self.host.plant(
            blueprint,
            place,
            parameter_budget,
            seed_id=seed_id,
            blend_steps=blend_steps,
            train_steps=train_steps,
            schedule=schedule,
            decision_id=decision_id,
        )
        try:
            self.surgery.check(seed.body)
            accept(seed)
        except RefusedError:
            self.host.uproot(seed)
            self.host.resting.forget(place)
            self.host.structure_version = version  # Nobody has seen those between.
            raise
        self.surgery.join(seed.seed_id, seed.body, self.host.layers[self.host.places[place].target].module)
        seed.warmup_steps = warmup_steps
        self.warmup.refresh()
        return seed

    def set_alpha(self, seed_id: str, alpha: float) -> Seed:
        """Set a seed's alpha, 0 to 1, and hold it there. Raises :class:`RefusedError` unless the seed is live."""
        seed = self.host.seed(seed_id)
        if not seed.live:
            raise RefusedError(f"seed {seed_id!r} is {stages.stage_name(seed.stage)}: its alpha is fixed")
        if not 0 <= alpha <= 1:
            raise RefusedError(f"alpha {alpha:g} is outside 0 to 1")
        seed.alpha = alpha
        seed.held = True
        return seed

    def fossilise(self, seed_id: str) -> Seed:
        """Keep a seed for good: alpha stays at 1, its parameters go on training. Raises :class:`RefusedError`."""
        seed = self.host.seed(seed_id)
        self.host.fossilise(seed)
        return seed

    def cull(self, seed_id: str) -> Seed:
        """Remove a seed, its parameters and what the optimizer knows of them. Raises :class:`RefusedError`."""
        seed = self.host.seed(seed_id)
        self.host.uproot(seed)
        self.surgery.leave(seed.body)
        self.warmup.refresh()
        return seed

    def advance(self) -> None:
        """One optimizer step has passed: alphas rise, and seeds and resting places go on to their next stage."""
        for seed in self.host.seeds.values():
            seed.advance()
        self.host.resting.advance()
        self.warmup.refresh()
