"""Structural changes of a live model together with its optimizer and schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from esperml.kasmina import stages
from esperml.kasmina.errors import RefusedError
from esperml.kasmina.host import Host
from esperml.kasmina.seeds import Seed

_PER_GROUP_LISTS: Final = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
"""Attributes in which torch's schedulers keep one entry a parameter group."""


class Grafter:
    """Carries out changes on a host and its running optimizer.

    Newborn parameters join the optimizer as their own parameter group with the hyperparameters that its first group
    has at that moment; what the optimizer knows of the host's parameters stays as it is. Schedulers get an entry for
    the new group, copied from the first.

    Call it between optimizer steps only.

    Args:
        host: the wrapped model's host.
        optimizer: the optimizer that trains it, or ``None`` for a host that is not trained.
        scheduler: its scheduler, if any; those inside a ``SequentialLR`` or ``ChainedScheduler`` are found.
    """

    def __init__(self, host: Host, optimizer: Optimizer | None, scheduler: object | None = None) -> None:
        self.host = host
        self._optimizer = optimizer
        self._scheduler = scheduler

    def germinate(
        self,
        blueprint: str,
        source_layer: str,
        target_layer: str,
        parameter_budget: int,
        *,
        seed_id: str,
        blend_steps: int = 0,
        decision_id: str = "",
    ) -> Seed:
        """Plant a seed as large as ``parameter_budget`` allows; the host's outputs stay the same.

        Raises:
            RefusedError: see :meth:`Host.plant`; also where the optimizer takes no second parameter group.
        """
        if isinstance(self._optimizer, LBFGS):
            raise RefusedError("LBFGS keeps all parameters in one group, so that none can join it")
        # A scheduler that is not extended raises at its next step, in the user's loop.
        if self._scheduler is None and hasattr(getattr(self._optimizer, "step", None), "_wrapped_by_lr_sched"):
            raise RefusedError("the optimizer has a learning-rate scheduler; give it to connect() as scheduler=")
        place = self.host.place_index(source_layer, target_layer)
        seed = self.host.plant(
            blueprint, place, parameter_budget, seed_id=seed_id, blend_steps=blend_steps, decision_id=decision_id
        )
        self._join(seed)
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
        self._leave(seed)
        return seed

    def advance(self) -> None:
        """One optimizer step has passed: alphas rise, and seeds go on to their next stage."""
        for seed in self.host.seeds.values():
            seed.advance()

    def _join(self, seed: Seed) -> None:
        if self._optimizer is None:
            return
        first = self._optimizer.param_groups[0]
        names = [f"{seed.seed_id}.{name}" for name, _ in seed.body.named_parameters()]
        parameters = list(seed.body.parameters())
        group = {key: _own(value) for key, value in first.items() if key not in {"params", "param_names"}}
        group["params"] = list(zip(names, parameters, strict=True)) if "param_names" in first else parameters
        before = len(self._optimizer.param_groups)
        self._optimizer.add_param_group(group)
        for values in self._per_group_lists(before):
            values.append(_own(values[0]))

    def _leave(self, seed: Seed) -> None:
        if self._optimizer is None:
            return
        parameters = list(seed.body.parameters())
        gone = {id(parameter) for parameter in parameters}
        groups = self._optimizer.param_groups
        for at in reversed(range(len(groups))):
            # The user may have put them into another group, or taken them out.
            kept = [parameter for parameter in groups[at]["params"] if id(parameter) not in gone]
            if kept or not groups[at]["params"]:
                groups[at]["params"] = kept
                continue
            for values in self._per_group_lists(len(groups)):
                del values[at]
            del groups[at]
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)

    def _per_group_lists(self, groups: int) -> Iterator[list[Any]]:
        seen: set[int] = set()
        for scheduler in _schedulers(self._scheduler):
            for name in _PER_GROUP_LISTS:
                values = getattr(scheduler, name, None)
                # Schedulers inside a SequentialLR may share a list.
                if isinstance(values, list) and len(values) == groups and id(values) not in seen:
                    seen.add(id(values))
                    yield values


def _schedulers(scheduler: object | None) -> Iterator[object]:
    if scheduler is None:
        return
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _schedulers(inner)


def _own(value: Any) -> Any:
    """A copy for another group: a tensor that holds a learning rate is changed in place by schedulers."""
    return value.detach().clone() if isinstance(value, Tensor) else value
