"""Formulas of the measures. No hooks, no host.

Functions of tensors leave their result on the device; functions of floats finish it once it has been moved. With n
sampled rows, X (n, F) is what a layer reads, Y (n, G) its output, and D (n, G) the gradient of the loss by the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 0.1
"""Penalty λ of least squares on rows whose mean squared norm is 1."""

VANISHING: Final = 1e-7
"""Gradient entries below this have vanished."""

EXPLODING: Final = 1e1
"""Gradient entries above this, or not finite, have exploded."""

_CONSTANT: Final = 1e-24

_LARGEST: Final = torch.finfo(torch.float32).max


def representable(value: float | None) -> bool:
    """Whether a measure can be told: it is finite, and stays so in the contract's 32 bits."""
    return value is not None and abs(value) <= _LARGEST


def silent_units(output: Tensor) -> Tensor:
    """Number of units that are at or below zero in every row. Shapes: (n, G) to ()."""
    return (output.amax(0) <= 0).count_nonzero()


def squared_singular_values(output: Tensor) -> Tensor:
    """Squared singular values of the output less its mean row.

    Shapes: (n, G) to (min(n, G),). All NaN where the output is not finite.
    """
    centred = output - output.mean(0)
    gram = centred @ centred.mT if centred.shape[0] <= centred.shape[1] else centred.mT @ centred
    # The eigenvalue routine raises on what is not finite, and to ask first would wait for the device. It may also fail
    # to converge on entries that are hardly above zero, as of equal rows that differ by their rounding.
    largest = gram.diagonal().amax().clamp(min=torch.finfo(gram.dtype).tiny)
    eigenvalues: Tensor = torch.linalg.eigvalsh((gram / largest).nan_to_num(0.0, 0.0, 0.0))
    return eigenvalues * largest + 0 * gram.sum()


def effective_rank(squared_values: Sequence[float]) -> float | None:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ the singular values over their sum (Roy & Vetterli 2007).

    Between 1 and the number of values; ``None`` where all are zero or one is not finite.
    """
    values = [math.sqrt(max(value, 0.0)) for value in squared_values]
    total = sum(values)
    if not math.isfinite(total) or total <= 0:
        return None
    return math.exp(-sum(value / total * math.log(value / total) for value in values if value > 0))


def normalised_gram(rows: Tensor) -> Tensor:
    """Inner products of rows that are scaled to a mean squared norm of 1.

    Shapes: (n, F) to (n, n). NaN where every row is zero.
    """
    gram = rows @ rows.mT
    return gram / gram.diagonal().mean()


def whitened(gram: Tensor, gradient: Tensor, *, bias: bool) -> Tensor:
    """L⁻¹ D, whose squared norm times λ is what a linear function of the rows behind ``gram`` leaves of D.

    With K = ``gram`` (plus 1 for a bias), L Lᵀ = K + λI and λ = :data:`RIDGE`. The ridge fit's least value, of
    ‖D − X W‖² + λ‖W‖², is λ tr(Dᵀ (K + λI)⁻¹ D). Adding the Gram matrix of further features to K never makes it larger.

    Shapes: gram (n, n), gradient (n, G) to (n, G).
    """
    factor, _ = torch.linalg.cholesky_ex(gram + _penalty(gram.shape[0], bias, gram.device))
    result: Tensor = torch.linalg.solve_triangular(factor, gradient, upper=False)
    return result


@lru_cache(maxsize=256)
def _penalty(rows: int, bias: bool, device: torch.device) -> Tensor:
    return RIDGE * torch.eye(rows, device=device) + float(bias)


def unexplained(whitened_norm: float, gradient_norm: float) -> float | None:
    """Share of the asked step −D that a linear function of the input cannot express, 0 to 1.

    This is the expressivity bottleneck of Verbockhaven et al. 2024 ("Growing Tiny Networks"), the least of
    ‖D − X W‖² / ‖D‖², with a penalty on W: with fewer rows than features a plain fit would explain anything, and every
    layer would look the same.

    Args:
        whitened_norm: norm of :func:`whitened`.
        gradient_norm: norm of D.
    """
    if not math.isfinite(whitened_norm) or not math.isfinite(gradient_norm) or gradient_norm <= 0:
        return None
    return min(RIDGE * (whitened_norm / gradient_norm) ** 2, 1.0)


def autocorrelation(signals: Tensor) -> Tensor:
    """Mean Pearson correlation, over the rows, of neighbours along the last dimension.

    Neighbours of which one is constant have no correlation and are left out. Shapes: (n, ..., W) to (2,): the sum over
    pairs of neighbours, and the number of pairs.
    """
    deviation = signals - signals.mean(0)
    norm = (deviation * deviation).sum(0).sqrt()
    scale = norm[..., 1:] * norm[..., :-1]
    product = (deviation[..., 1:] * deviation[..., :-1]).sum(0)
    return torch.stack(((product / scale.clamp(min=_CONSTANT)).sum(), (scale > _CONSTANT).sum()))


def extreme_entries(gradient: Tensor) -> Tensor:
    """How many entries of a gradient have vanished, and how many have not exploded. Shapes: (entries,) to (2,)."""
    size = gradient.abs()
    return torch.stack(((size < VANISHING).count_nonzero(), (size <= EXPLODING).count_nonzero()))
