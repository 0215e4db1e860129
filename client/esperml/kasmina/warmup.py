"""Newborn parameters take smaller steps at first, whatever the scheduler of the run does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from esperml.kasmina.seeds import Seed


class Warmup:
    """Scales the learning rate of newborn parameters for the time of each optimizer step.

    In the k-th of n steps the groups that hold nothing but a seed's parameters have k / n of their learning rate.
    Schedulers and checkpoints never see it: before and after the step the rate is what they made it. How far a seed is
    follows from its age, so that it goes on where it was after a roll-back, and is the same on all ranks.

    Args:
        seeds: the host's, by name, as they are at any time.
        optimizer: the optimizer, or ``None`` for a host that is not trained: then there is nothing to do.
    """

    def __init__(self, seeds: Mapping[str, Seed], optimizer: Optimizer | None) -> None:
        self._seeds = seeds
        self._optimizer = optimizer
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[RemovableHandle] = []

    def refresh(self) -> None:
        """Watch the optimizer's steps while a seed warms up, and no longer. Call it when seeds came, went or aged."""
        if self._optimizer is None or bool(self._handles) == any(True for _ in self._warming()):
            return
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        else:
            self._handles = [
                self._optimizer.register_step_pre_hook(self._before),
                self._optimizer.register_step_post_hook(self._after),
            ]

    def _warming(self) -> Iterable[Seed]:
        return (seed for seed in self._seeds.values() if seed.age + 1 < seed.warmup_steps)

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._restore()  # An optimizer that raised has left its rates as they were in its step.
        for seed in self._warming():
            own = set(map(id, seed.body.parameters()))
            for group in optimizer.param_groups:
                if "lr" in group and group["params"] and own.issuperset(map(id, group["params"])):
                    self._scale(group, (seed.age + 1) / seed.warmup_steps)

    def _after(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._restore()

    def _scale(self, group: dict[str, Any], factor: float) -> None:
        rate = group["lr"]
        if isinstance(rate, Tensor):  # Fused and captured steps read the tensor itself.
            self._rates.append((group, rate.clone()))
            rate.mul_(factor)
        else:
            self._rates.append((group, rate))
            group["lr"] = rate * factor

    def _restore(self) -> None:
        for group, rate in self._rates:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._rates.clear()
