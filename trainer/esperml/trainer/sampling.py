"""Draws mini-batches of whole groups, so that decisions which compare are learnt from together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class GroupSampler:
    """Draws groups of steps, without replacement within a batch, until a batch is full.

    A group's chance of being drawn first is proportional to its weight; with no weights given, to its size, so that
    every step is equally likely. Of a group larger than a batch, as many steps as fit are drawn uniformly.

    Args:
        groups: the members of each group, as indices into the replay buffer. None may be empty.
        batch_size: steps of a batch, at least 1. The last group of a batch is taken whole, so that a batch may have up
            to one group more.
        seed: of all draws.
        weights: one positive weight a group.

    Raises:
        ValueError: there is no group, a group is empty, or a weight is not positive.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        if not groups or not all(groups):
            raise ValueError("sampling needs at least one group, and no group may be empty")
        chosen = [float(len(group)) for group in groups] if weights is None else list(weights)
        if len(chosen) != len(groups) or not all(0 < weight < np.inf for weight in chosen):
            raise ValueError("weights must be positive and finite, one for each group")
        self._groups = [np.asarray(group, dtype=np.int64) for group in groups]
        self._log_weights = np.log(np.asarray(chosen))
        self._batch_size = batch_size
        self._random = np.random.default_rng(seed)

    def sample(self) -> list[int]:
        """Indices of one mini-batch."""
        # The order of keys log(weight) + Gumbel noise is that of drawing without replacement (Efraimidis & Spirakis).
        keys = self._log_weights + self._random.gumbel(size=len(self._groups))
        batch: list[int] = []
        for group in np.argsort(-keys):
            members = self._groups[group]
            if len(members) > self._batch_size:
                members = np.sort(self._random.choice(members, self._batch_size, replace=False))
            batch.extend(members.tolist())
            if len(batch) >= self._batch_size:
                break
        return batch

    def state(self) -> dict[str, Any]:
        """State of the random number generator, as JSON can hold it."""
        return dict(self._random.bit_generator.state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on drawing where :meth:`state` was taken.

        Raises:
            ValueError: the state is of another kind of generator.
        """
        self._random.bit_generator.state = dict(state)
