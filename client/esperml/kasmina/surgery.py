"""Parameters that join a running optimizer and leave it again, with schedulers kept in step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import LBFGS, Muon, Optimizer, SparseAdam

from esperml.kasmina.errors import RefusedError

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

_CLOSED: Final[Mapping[type[Optimizer], str]] = {
    LBFGS: "LBFGS keeps all parameters in one group, so that none can join it",
    SparseAdam: "SparseAdam takes sparse gradients only, and those of seeds are dense",
}
"""Optimizers that no newborn parameter can join, and why."""


def why_closed(optimizer: Optimizer | None) -> str:
    """Why no newborn parameter can ever join ``optimizer``; empty where they can."""
    return next((reason for kind, reason in _CLOSED.items() if isinstance(optimizer, kind)), "")


class Surgery:
    """Adds the parameters of seeds to an optimizer, and takes them out again.

    Newborn parameters join as their own group, with the hyperparameters that the group of their target layer has at
    that moment; of the first group, where the target's own parameters are not trained. What the optimizer knows of all
    others stays as it is. Schedulers get an entry for the new group, copied from the same one.

    Args:
        optimizer: the optimizer, or ``None`` for a host that is not trained: then there is nothing to do.
        scheduler: its scheduler, if any; those inside a ``SequentialLR`` or ``ChainedScheduler`` are found.
    """

    def __init__(self, optimizer: Optimizer | None, scheduler: object | None) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler

    def check(self, body: nn.Module | None = None) -> None:
        """Raise :class:`RefusedError` where a seed cannot join.

        Args:
            body: the seed's module; without it, only what holds for every seed is checked.
        """
        closed = why_closed(self._optimizer)
        if closed:
            raise RefusedError(closed)
        # A scheduler that is not extended raises at its next step, in the user's loop.
        if self._scheduler is None and hasattr(getattr(self._optimizer, "step", None), "_wrapped_by_lr_sched"):
            raise RefusedError("the optimizer has a learning-rate scheduler; give it to connect() as scheduler=")
        if body is not None and isinstance(self._optimizer, Muon):
            other = next((name for name, parameter in body.named_parameters() if parameter.ndim != 2), None)
            if other is not None:
                raise RefusedError(f"Muon trains matrices only, and {other!r} of the seed is none")

    def join(self, name: str, body: nn.Module, target: nn.Module) -> None:
        """Let the parameters of ``body`` join.

        Args:
            name: of the seed; names its parameters where the optimizer's have names.
            body: the seed's module.
            target: the layer whose group lends its hyperparameters.
        """
        if self._optimizer is None or next(body.parameters(), None) is None:
            return
        groups = self._optimizer.param_groups
        before, model = len(groups), self._group_of(target)
        names = [f"{name}.{own}" for own, _ in body.named_parameters()]
        parameters = list(body.parameters())
        group = {key: _own(value) for key, value in groups[model].items() if key not in {"params", "param_names"}}
        group["params"] = list(zip(names, parameters, strict=True)) if "param_names" in groups[model] else parameters
        self._optimizer.add_param_group(group)
        for values in self._per_group_lists(before):
            values.append(_own(values[model]))

    def leave(self, body: nn.Module) -> None:
        """Take the parameters of ``body`` out, and what the optimizer knows of them."""
        if self._optimizer is None:
            return
        parameters = list(body.parameters())
        gone = {id(parameter) for parameter in parameters}
        groups = self._optimizer.param_groups
        for at in reversed(range(len(groups))):
            # The user may have put them into another group, or taken them out.
            kept = [parameter for parameter in groups[at]["params"] if id(parameter) not in gone]
            if kept or not groups[at]["params"]:
                _keep(groups[at], kept)
                continue
            self._remove(at)
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)

    def arrange(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Put parameters into groups, of which there are at least as many; those beyond are taken away."""
        assert self._optimizer is not None  # noqa: S101 - a state is put back only where there is one
        own = self._optimizer.param_groups
        for at in reversed(range(len(groups), len(own))):
            self._remove(at)
        for group, parameters in zip(own, groups, strict=True):
            group["params"] = list(parameters)

    def _remove(self, at: int) -> None:
        assert self._optimizer is not None  # noqa: S101 - its callers have looked
        for values in self._per_group_lists(len(self._optimizer.param_groups)):
            del values[at]
        del self._optimizer.param_groups[at]

    def _group_of(self, target: nn.Module) -> int:
        """Index of the first group that trains one of ``target``'s own parameters; 0 where none does."""
        assert self._optimizer is not None  # noqa: S101 - join() asks only where there is one
        own = {id(parameter) for parameter in target.parameters(recurse=False)}
        for at, group in enumerate(self._optimizer.param_groups):
            if any(id(parameter) in own for parameter in group["params"]):
                return at
        return 0

    def _per_group_lists(self, groups: int) -> Iterator[list[Any]]:
        seen: set[int] = set()
        for scheduler in _schedulers(self._scheduler):
            for name in _PER_GROUP_LISTS:
                values = getattr(scheduler, name, None)
                # Schedulers inside a SequentialLR may share a list.
                if isinstance(values, list) and len(values) == groups and id(values) not in seen:
                    seen.add(id(values))
                    yield values


def _keep(group: dict[str, Any], kept: Sequence[Tensor]) -> None:
    """Leave only ``kept`` in a group, names included."""
    if "param_names" in group:
        known = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
        group["param_names"] = [known[id(parameter)] for parameter in kept]
    group["params"] = list(kept)


def _schedulers(scheduler: object | None) -> Iterator[object]:
    if scheduler is None:
        return
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _schedulers(inner)


def _own(value: Any) -> Any:
    """A copy for another group: a tensor that holds a learning rate is changed in place by schedulers."""
    return value.detach().clone() if isinstance(value, Tensor) else value
