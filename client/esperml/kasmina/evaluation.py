"""Calling the user's evaluator so that training does not notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from esperml.kasmina.measures import representable
from esperml.kasmina.seeds import Seed
from esperml.kasmina.topology import undisturbed

Evaluator: TypeAlias = Callable[[nn.Module], float | Tensor]
"""Given the model in evaluation mode and without gradients, returns its held-out loss: less is better."""


def evaluate_host(model: nn.Module, evaluator: Evaluator) -> float | None:
    """Held-out loss of ``model``; ``None`` where it is not finite in 32 bits.

    The evaluator is called in evaluation mode and under ``no_grad``. Afterwards each module's mode, every buffer and
    the random number generators (torch's, Python's, and NumPy's global one where NumPy is in use) are what they were:
    a run with evaluation has the same weights as one without.
    """
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            loss = float(evaluator(model))
    finally:
        if numpy is not None:
            numpy.random.set_state(numpy_state)
    return loss if representable(loss) else None


def evaluate_without(model: nn.Module, seed: Seed, evaluator: Evaluator) -> float | None:
    """Held-out loss of ``model`` with the alpha of ``seed`` at 0; alpha is what it was afterwards."""
    alpha = seed.alpha
    seed.alpha = 0.0
    try:
        return evaluate_host(model, evaluator)
    finally:
        seed.alpha = alpha
