"""The modules that seeds are made of. Each is called as ``body(x, output)`` and returns what is added to ``output``.

All start at exactly zero through a last layer whose weights are zero; that layer's gradient is not zero, so that it
moves with the first step and the layers before it with the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

KERNEL: Final = 3
"""Taps of a convolution that maps channels to channels."""

SIGNAL_KERNEL: Final = 5
"""Taps of a convolution that reads a signal."""

POSITIONS: Final = 2
"""Positions along each dimension that :class:`SignalReader` tells apart."""

_LEAK: Final = 0.1

SHORTEST_SIGNAL: Final = 4
"""Least length of what a convolution can read as a signal."""

_CONVOLUTIONS: Final[tuple[Callable[..., nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AVERAGE: Final[tuple[Callable[..., Tensor], ...]] = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)
_MAXIMUM: Final[tuple[Callable[..., Tensor], ...]] = (
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
)


def pointwise(rank: int, inputs: int, outputs: int, *, bias: bool, zeros: bool = False) -> nn.Module:
    """A linear map over features (rank 0) or, by a 1×1 convolution, over channels; all zero with ``zeros``."""
    make: Callable[..., nn.Module] = _CONVOLUTIONS[rank - 1] if rank else nn.Linear
    layer = make(inputs, outputs, *(1,) * bool(rank), bias=bias)
    return zero(layer) if zeros else layer


def convolution(
    rank: int, inputs: int, outputs: int, kernel: int, *, groups: int = 1, dilation: int = 1, bias: bool = True
) -> nn.Module:
    """A convolution over ``rank`` dimensions that keeps their lengths; ``kernel`` is odd."""
    padding = dilation * (kernel // 2)
    return _CONVOLUTIONS[rank - 1](
        inputs, outputs, kernel, padding=padding, groups=groups, dilation=dilation, bias=bias
    )


def zero(layer: nn.Module) -> nn.Module:
    """``layer`` with every parameter at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Averages of ``x``, (N, C, *spatial), at ``size`` positions, none larger than it has."""
    return _AVERAGE[len(size) - 1](x, tuple(size))


def match_spatial(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring ``x``, (N, C, *spatial), to ``size``: by averages where it shrinks, else by nearest neighbours."""
    have = tuple(x.shape[2:])
    want = tuple(size)
    if have == want:
        return x
    if all(a >= b for a, b in zip(have, want, strict=True)):
        return pool(x, want)
    return functional.interpolate(x, size=want, mode="nearest")


def flatten_for(x: Tensor, output: Tensor) -> Tensor:
    """Flatten what a convolution reads, (N, C, *spatial), where it is added to features, (N, F)."""
    return x.flatten(1) if x.dim() != output.dim() else x


class LowRank(nn.Module):
    """``W₂ W₁ x`` with r units between (Hu et al. 2021, "LoRA", without its scale).

    Shapes: x (N, *, in) to (N, *, out) for rank 0; (N, in, *spatial) to (N, out, *spatial) otherwise.
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = pointwise(rank, inputs, size, bias=False)
        self.up = pointwise(rank, size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        x = match_spatial(x, output.shape[2:]) if self.rank else flatten_for(x, output)
        return cast(Tensor, self.up(self.down(x)))


class Mlp(nn.Module):
    """``W₂ relu(W₁ x + b)``; for channels W₁ is a convolution of three taps. Shapes as :class:`LowRank`."""

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.rank = rank
        self.hidden = nn.Linear(inputs, size) if rank == 0 else convolution(rank, inputs, size, KERNEL)
        self.out = pointwise(rank, size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        hidden = functional.relu(self.hidden(x if self.rank else flatten_for(x, output)))
        return cast(Tensor, self.out(match_spatial(hidden, output.shape[2:]) if self.rank else hidden))


class Separable(nn.Module):
    """A depthwise convolution of ``size`` filters a channel, rectifiers, and a pointwise one (Chollet 2017).

    Shapes: x (N, in, *spatial) to (N, out, *spatial).
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = convolution(rank, inputs, inputs * size, KERNEL, groups=inputs)
        self.pointwise = pointwise(rank, inputs * size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        hidden = match_spatial(functional.relu(self.depthwise(x)), output.shape[2:])
        return cast(Tensor, self.pointwise(hidden))


class SignalReader(nn.Module):
    """Two convolutions of ``size`` channels with pooling, then a linear map of what was found where.

    A flat input is read as a signal of one channel: neighbouring features are neighbours in it.

    Shapes: x (N, *, in) with ``unfold``, else (N, C, *spatial); to (N, *, out).
    """

    def __init__(self, rank: int, channels: int, size: int, outputs: int, *, unfold: bool) -> None:
        super().__init__()
        self.rank = rank
        self.unfold = unfold
        self.first = convolution(rank, channels, size, SIGNAL_KERNEL)
        self.second = convolution(rank, size, size, SIGNAL_KERNEL)
        self.out = zero(nn.Linear(size * POSITIONS**rank, outputs, bias=False))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        signal = x.reshape(-1, 1, x.shape[-1]) if self.unfold else x
        # Leaky: with the few channels that a small budget buys, plain rectifiers are often all silent at birth.
        hidden = functional.leaky_relu(_MAXIMUM[self.rank - 1](self.first(signal), 2), _LEAK)
        hidden = functional.leaky_relu(self.second(hidden), _LEAK)
        hidden = match_spatial(hidden, (POSITIONS,) * self.rank)
        return cast(Tensor, self.out(hidden.flatten(1)).reshape(output.shape))


class Gate(nn.Module):
    """``tanh(W₂ relu(W₁ z + b₁) + b₂) · output``: a factor between 0 and 2 on each unit once it is added.

    With ``squeeze``, z is the mean of the input over its positions (Hu et al. 2018, "Squeeze-and-Excitation"),
    otherwise the input itself.

    Shapes: x (N, *, in) to (N, *, out); with ``squeeze`` (N, in, *spatial) to (N, out, *spatial).
    """

    def __init__(self, inputs: int, size: int, outputs: int, *, squeeze: bool) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.hidden = nn.Linear(inputs, size)
        self.factor = zero(nn.Linear(size, outputs))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        z = x.flatten(2).mean(2) if self.squeeze else flatten_for(x, output)
        factor = torch.tanh(self.factor(functional.relu(self.hidden(z))))
        if self.squeeze:
            factor = factor.reshape(*factor.shape, *(1,) * (output.dim() - 2))
        return factor * output
