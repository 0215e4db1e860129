"""The data that hosts are trained on: made or bundled, never downloaded.

=============== ======================================================== ==========
name            what it is                                               layout
=============== ======================================================== ==========
``digits``      handwritten digits, 8 x 8 pixels, from scikit-learn      image
``mnist1d``     MNIST-1D (Greydanus and Kobak, arXiv 2011.14439)         sequence
``tabular-N``   ``make_classification`` family number N, N from 0        table
=============== ======================================================== ==========
"""

from __future__ import annotations

import os
import random
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

log = structlog.get_logger(__name__)

Layout = Literal["image", "sequence", "table"]

TRAIN_SHARE: Final = 0.6
VALIDATION_SHARE: Final = 0.2
_MNIST1D_SAMPLES: Final = 5000
_MNIST1D_CACHE: Final = "mnist1d-5000-seed42.npz"
_TABULAR_SAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a data set.

    Attributes:
        inputs: standardised by the training part, float32, [samples, features].
        targets: class indices, int64, [samples].
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.targets.shape[0])


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task.

    Attributes:
        name: by which :func:`load_task` finds it.
        layout: what the order of the features means.
        classes: number of classes.
        train: what hosts are trained on.
        validation: what reports and rewards are measured on.
        test: scored once, at the end of a run.
    """

    name: str
    layout: Layout
    classes: int
    train: Split
    validation: Split
    test: Split

    @property
    def features(self) -> int:
        """Number of input features."""
        return int(self.train.inputs.shape[1])


@lru_cache(maxsize=32)
def load_task(name: str, seed: int = 0) -> Task:
    """The task ``name``, split by ``seed``: the same arguments give the same tensors.

    Raises:
        ValueError: no task has that name.
    """
    if name == "digits":
        return _split(name, "image", *_digits(), seed)
    if name == "mnist1d":
        return _split(name, "sequence", *_mnist1d(), seed)
    family, _, number = name.partition("-")
    if family == "tabular" and number.isdecimal():
        return _split(name, "table", *_tabular(int(number)), seed)
    raise ValueError(f"unknown task {name!r}; tasks are digits, mnist1d and tabular-N with a whole number N")


def cache_dir() -> Path:
    """Where made data is kept: ``ESPER_CACHE_DIR``, or ``esper`` in the user's cache folder."""
    if own := os.environ.get("ESPER_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esper"


def _split(name: str, layout: Layout, inputs: NDArray[np.float64], targets: NDArray[np.int64], seed: int) -> Task:
    order = np.random.default_rng(seed).permutation(len(targets))
    inputs, targets = inputs[order], targets[order]
    first, second = int(len(order) * TRAIN_SHARE), int(len(order) * (TRAIN_SHARE + VALIDATION_SHARE))
    mean = inputs[:first].mean(axis=0)
    deviation = inputs[:first].std(axis=0)
    # A feature that never varies in training stays at zero rather than being divided by nothing.
    scaled = ((inputs - mean) / np.where(deviation > 1e-8, deviation, 1.0)).astype(np.float32)
    labels = targets.astype(np.int64)
    parts = (
        Split(torch.from_numpy(scaled[a:b].copy()), torch.from_numpy(labels[a:b].copy()))
        for a, b in ((0, first), (first, second), (second, len(order)))
    )
    return Task(name, layout, int(targets.max()) + 1, *parts)


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    return inputs, targets


def _tabular(number: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import make_classification

    draw = np.random.default_rng([7, number])
    classes = int(draw.integers(4, 11))
    informative = int(draw.integers(10, 19))
    inputs, targets = make_classification(
        n_samples=_TABULAR_SAMPLES,
        n_features=informative + int(draw.integers(2, 13)),
        n_informative=informative,
        n_redundant=0,
        n_classes=classes,
        n_clusters_per_class=int(draw.integers(1, 4)),
        class_sep=float(draw.uniform(1.2, 2.2)),
        flip_y=0.01,
        random_state=number,
    )
    return inputs, targets


def _mnist1d() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    path = cache_dir() / _MNIST1D_CACHE
    try:
        # np.load leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["inputs"], stored["targets"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("cached_task_unreadable", path=str(path), error=str(error), remedy="made again")
    inputs, targets = _make_mnist1d()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may make it at once: each writes its own file, and the last rename wins with equal content.
        temporary = path.with_name(f".{path.stem}-{os.getpid()}.npz")
        np.savez(temporary, inputs=inputs, targets=targets)
        temporary.replace(path)
    except OSError as error:
        log.warning("task_not_cached", path=str(path), error=str(error))
    return inputs, targets


def _make_mnist1d() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Generate MNIST-1D locally. The generator seeds the global generators of numpy and random: both are put back."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples = _MNIST1D_SAMPLES
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        made = make_dataset(arguments)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    inputs = np.concatenate([made["x"], made["x_test"]]).astype(np.float64)
    targets = np.concatenate([made["y"], made["y_test"]]).astype(np.int64)
    return inputs, targets
