"""Formulas of the measures, on plain tensors. No hooks, no host.

Most take Gram matrices: with n sampled rows, X (n, F) the input, Y (n, G) the output and D (n, G) the gradient of the
loss by the output, ``gram(X)`` = X Xᵀ (n, n) holds all that they need, whatever the widths, so that layers of any
shape are measured in one batched call. ``...`` stands for any leading dimensions.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 0.1
"""Penalty of least squares on rows whose mean squared norm is 1."""


def gram(rows: Tensor) -> Tensor:
    """Inner products of rows. Shapes: (..., n, F) to (..., n, n)."""
    return rows @ rows.mT


def centred(grams: Tensor) -> Tensor:
    """The Gram matrix of rows less their mean row. Shapes: (..., n, n) to the same."""
    by_row = grams.mean(-1, keepdim=True)
    return grams - by_row - by_row.mT + by_row.mean(-2, keepdim=True)


def effective_rank(output_grams: Tensor) -> Tensor:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ the singular values of the centred output over their sum (Roy & Vetterli 2007).

    Shapes: (..., n, n) to (...). NaN for a constant output.
    """
    singular = torch.linalg.eigvalsh(centred(output_grams)).clamp(min=0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def input_gram(rows: Tensor, *, bias: bool) -> Tensor:
    """Gram matrix of rows scaled to a mean squared norm of 1, with a feature that is always 1 where there is a bias.

    Shapes: (..., n, F) to (..., n, n). NaN where every row is zero.
    """
    grams = gram(rows)
    mean = grams.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return grams / mean + float(bias)


def unexplained(input_grams: Tensor, gradient_grams: Tensor) -> Tensor:
    """Share of the asked step −D that a linear function of the input cannot express, 0 to 1.

    This is the expressivity bottleneck of Verbockhaven et al. 2024 ("Growing Tiny Networks"): ‖D − D̂‖² / ‖D‖², with D̂
    the least-squares fit of D by what the layer reads. The fit is a ridge with λ = :data:`RIDGE`: with fewer rows than
    features a plain fit would explain anything, and every layer would look the same. With Q = (K + λI)⁻¹ the residual
    is λ Q D. Adding the Gram matrix of further features to K never makes it larger.

    Shapes: input grams as of :func:`input_gram` and gradient grams (..., n, n) to (...). NaN where D is zero.
    """
    identity = torch.eye(input_grams.shape[-1], dtype=input_grams.dtype, device=input_grams.device)
    factor, _ = torch.linalg.cholesky_ex(input_grams + RIDGE * identity)
    inverse = torch.cholesky_inverse(factor)
    residual = RIDGE**2 * (inverse * (inverse @ gradient_grams)).sum((-2, -1))
    return (residual / gradient_grams.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(0, 1)


def growth_gradient(input_grams: Tensor, gradient_grams: Tensor, entries: Tensor) -> Tensor:
    """‖Dᵀ X‖ / √entries: root mean square of the gradient of a linear graft from X that starts at zero.

    The squared norm is Σᵢⱼ (X Xᵀ)ᵢⱼ (D Dᵀ)ᵢⱼ. GradMax (Evci et al. 2022) chooses by it where to grow.

    Shapes: grams (..., n, n) and entries (...) to (...).
    """
    return ((input_grams * gradient_grams).sum((-2, -1)).clamp(min=0) / entries).sqrt()


def dead_fraction(output: Tensor) -> Tensor:
    """Share of units at or below zero in every row. Shapes: (n, G) to ()."""
    return (output.amax(0) <= 0).float().mean()


def autocorrelation(signals: Tensor) -> Tensor:
    """Mean Pearson correlation, over the rows, of neighbours along the last dimension.

    Neighbours of which one is constant have no correlation and are left out. Shapes: (n, ..., W) to (); NaN where no
    pair is left.
    """
    deviation = signals - signals.mean(0)
    norm = deviation.square().sum(0).sqrt()
    product = (deviation[..., 1:] * deviation[..., :-1]).sum(0)
    scale = norm[..., 1:] * norm[..., :-1]
    varied = scale > 0
    correlation = torch.where(varied, product / scale, 0)
    return (correlation.sum() / varied.sum()).clamp(-1, 1)


def gradient_statistics(gradient: Tensor, *, vanishing: float = 1e-7, exploding: float = 1e1) -> Tensor:
    """Norm, share of entries below ``vanishing``, share above ``exploding`` or not finite.

    Shapes: (entries,) to (3,).
    """
    size = gradient.abs()
    return torch.stack(
        (
            torch.linalg.vector_norm(gradient),
            (size < vanishing).sum() / gradient.numel(),
            1 - (size <= exploding).sum() / gradient.numel(),
        )
    )
