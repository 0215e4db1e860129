"""A few recent states of a run, in memory or in a folder, to go back to."""

from __future__ import annotations

import pickle
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from esperml.kasmina.plain import size_of


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state that was sound.

    Attributes:
        step: optimizer step after which it was taken.
        bytes: of its tensors.
        held: the state, where it is kept in memory.
        path: the file that it is in, otherwise.
    """

    step: int
    bytes: int
    held: Mapping[str, Any] | None
    path: Path | None

    def load(self) -> Mapping[str, Any]:
        """The state. Raises :class:`OSError` where its file cannot be read."""
        if self.held is not None:
            return self.held
        assert self.path is not None  # noqa: S101 - it is in one of the two
        try:
            return cast("Mapping[str, Any]", torch.load(self.path, map_location="cpu", weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise OSError(f"{self.path} is damaged: {error}") from error


class Snapshots:
    """The latest snapshots of a run, oldest first; one more than ``most`` drives the oldest out.

    Args:
        most: how many to keep.
        folder: where to keep them; ``None``: in the host's memory.
    """

    def __init__(self, most: int, folder: Path | None) -> None:
        self._most = most
        self._folder = folder
        self._name = uuid.uuid4().hex[:12]
        self._kept: deque[Snapshot] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What they hold together."""
        return sum(snapshot.bytes for snapshot in self._kept)

    @property
    def newest(self) -> Snapshot | None:
        """The last one taken."""
        return self._kept[-1] if self._kept else None

    def add(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep ``state``, which nobody changes any more. Raises :class:`OSError` where the folder does not take it."""
        path = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"kasmina-{self._name}-{step}.pt"
            try:
                torch.save(dict(state), path)
            except (OSError, RuntimeError) as error:
                path.unlink(missing_ok=True)
                # What torch's writer raises on a full disk names neither file nor cause.
                raise OSError(f"no snapshot can be written to {self._folder}: {error}") from error
        self._kept.append(Snapshot(step, size_of(state), None if path else state, path))
        while len(self._kept) > self._most:
            _forget(self._kept.popleft())

    def take_back(self, step: int) -> tuple[int, Mapping[str, Any]] | None:
        """The newest from before ``step``, or else the oldest; it and what is newer are kept no longer.

        Returns:
            Its step and its state; ``None`` where there is none.

        Raises:
            OSError: its file cannot be read.
        """
        taken = None
        while self._kept and (taken is None or taken.step >= step):
            if taken is not None:
                _forget(taken)
            taken = self._kept.pop()
        if taken is None:
            return None
        try:
            return taken.step, taken.load()
        finally:
            _forget(taken)

    def clear(self) -> None:
        """Keep none."""
        while self._kept:
            _forget(self._kept.popleft())


def not_finite(state: Mapping[str, Any]) -> str:
    """Name of a parameter or of an entry of the optimizer that is not finite; empty where all are.

    Of what is not trained only NaN counts: masks are full of infinities.
    """
    trained = {name for group in state["optimizer"]["names"] for name in group}
    for name, tensor in state["model"].items():
        if tensor.is_floating_point() and bool((~tensor.isfinite() if name in trained else tensor.isnan()).any()):
            return str(name)
    for key, entries in state["optimizer"]["state"]["state"].items():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                return f"{name} of the optimizer's parameter {key}"
    return ""


def _forget(snapshot: Snapshot) -> None:
    if snapshot.path is not None:
        snapshot.path.unlink(missing_ok=True)
