"""Everything that training needs to go on exactly where it was, beside the policy: safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esperml.trainer.returns import Floats

FORMAT = 1
_TENSORS, _FACTS = "training.safetensors", "training.json"
_RANDOM, _TARGETS, _RETURNS, _OPTIMIZER = "random", "targets", "returns", "optimizer"


class SnapshotError(Exception):
    """A training state cannot be read, or does not fit."""


@dataclass(slots=True)
class TrainingState:
    """Where training stands.

    Attributes:
        step: updates done.
        best: best score so far; None before the first evaluation.
        best_step: step of the best score; None before the first evaluation.
        stale: evaluations since.
        advantage_scale: standard deviation of advantages at the last refresh.
        targets: [n] the critic's targets at the last refresh, of the steps that ``digest`` names.
        returns: [n] returns at the last refresh, likewise.
        digest: of the names of the steps trained on.
        sampler: state of the sampler's random number generator.
        random: state of torch's random number generator, [k] uint8.
        optimizer: the optimizer's tensors by index of the parameter and name.
        held_out: clusters, and whether they are held out.
        settings: settings of the training, as JSON holds them.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    advantage_scale: float = 1.0
    targets: Floats = field(default_factory=lambda: np.empty(0))
    returns: Floats = field(default_factory=lambda: np.empty(0))
    digest: str = ""
    sampler: dict[str, Any] = field(default_factory=dict)
    random: Tensor = field(default_factory=torch.get_rng_state)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    held_out: dict[str, bool] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer has accumulated, by ``<index of the parameter>.<name>``, on the CPU."""
    state: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": tensor.detach().cpu().clone()
        for index, tensors in state.items()
        for name, tensor in tensors.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimizer back what :func:`optimizer_tensors` took. Hyperparameters stay as they are.

    Raises:
        SnapshotError: the tensors are of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise SnapshotError(f"the training state's optimizer tensor {key!r} is of another network")
        shape = parameters[int(index)].shape
        if tensor.dim() and tensor.shape != shape:
            raise SnapshotError(
                f"the training state's optimizer tensor {key!r} is {tuple(tensor.shape)}, not {tuple(shape)}"
            )
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(folder: Path, state: TrainingState) -> None:
    """Writes a training state into ``folder``."""
    tensors = {f"{_OPTIMIZER}.{name}": tensor for name, tensor in state.optimizer.items()}
    tensors[_RANDOM] = state.random
    tensors |= {_TARGETS: torch.from_numpy(state.targets), _RETURNS: torch.from_numpy(state.returns)}
    save_file(tensors, folder / _TENSORS)
    facts = {
        "format": FORMAT,
        "step": state.step,
        "best": state.best,
        "best_step": state.best_step,
        "stale": state.stale,
        "advantage_scale": state.advantage_scale,
        "digest": state.digest,
        "sampler": state.sampler,
        "held_out": state.held_out,
        "settings": state.settings,
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def load(folder: Path) -> TrainingState:
    """Reads a training state.

    Raises:
        SnapshotError: it is missing, broken or of another format.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text())
        tensors = load_file(folder / _TENSORS)
        if facts.pop("format") != FORMAT:
            raise SnapshotError(f"{folder}: the training state is of another format than {FORMAT}")
        if odd := {field.name for field in fields(TrainingState)} ^ {*facts, _RANDOM, _TARGETS, _RETURNS, _OPTIMIZER}:
            raise SnapshotError(f"{folder}: the training state cannot be read: {', '.join(sorted(odd))} do not fit")
        return TrainingState(
            **facts,
            random=tensors.pop(_RANDOM),
            targets=tensors.pop(_TARGETS).numpy(),
            returns=tensors.pop(_RETURNS).numpy(),
            optimizer={name.removeprefix(f"{_OPTIMIZER}."): tensor for name, tensor in tensors.items()},
        )
    except FileNotFoundError as error:
        raise SnapshotError(f"{folder}: holds no training to resume ({error.filename} is missing)") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SnapshotError(f"{folder}: the training state cannot be read: {error!r}") from error


def replace_folder(new: Path, folder: Path) -> None:
    """Puts ``new`` in the place of ``folder``; a crash leaves the old one, under its name or ``<name>.old``."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def recover_folder(folder: Path) -> None:
    """Puts ``<name>.old`` back where a crash in :func:`replace_folder` left nothing else."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)
