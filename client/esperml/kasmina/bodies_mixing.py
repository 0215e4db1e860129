"""More modules that seeds are made of: those that convolve, attend, choose and normalise.

The rules are those of :mod:`esperml.kasmina.bodies`: called as ``body(x, output)``, exactly zero while new, and with a
gradient that does not vanish.
"""

from __future__ import annotations

import math
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from esperml.kasmina.bodies import KERNEL, convolution, flatten_for, match_spatial, pointwise, pool, zero

DEPTHWISE_KERNEL: Final = 5
"""Taps of a convolution that keeps channels apart."""

DILATION: Final = 2
"""Distance of the taps of a dilated convolution."""

MEMORY: Final = 8
"""Most positions along each dimension that :class:`PositionAttention` attends to."""

EXPERTS: Final = 4
"""Experts of a :class:`Mixture`."""


class Bottleneck(nn.Module):
    """``W₃ relu(W₂ relu(W₁ x))`` with ``size`` units between (He et al. 2016); for channels W₂ has three taps.

    Shapes: x (N, *, in) to (N, *, out) for rank 0; (N, in, *spatial) to (N, out, *spatial) otherwise.
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = pointwise(rank, inputs, size, bias=True)
        self.middle = convolution(rank, size, size, KERNEL) if rank else nn.Linear(size, size)
        self.up = pointwise(rank, size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        hidden = functional.relu(self.down(x if self.rank else flatten_for(x, output)))
        # Leaky: a unit that is silent behind another that is silent learns nothing, and small budgets buy few units.
        hidden = functional.leaky_relu(self.middle(hidden), 0.1)
        return cast(Tensor, self.up(match_spatial(hidden, output.shape[2:]) if self.rank else hidden))


class Depthwise(nn.Module):
    """``size`` filters of five taps on each channel by itself, rectified, and summed within the channel.

    Channels do not mix (Liu et al. 2022, "A ConvNet for the 2020s", for the kernel).

    Shapes: x (N, C, *spatial) to (N, C, *spatial).
    """

    def __init__(self, rank: int, channels: int, size: int) -> None:
        super().__init__()
        self.filters = convolution(rank, channels, channels * size, DEPTHWISE_KERNEL, groups=channels)
        self.weights = zero(convolution(rank, channels * size, channels, 1, groups=channels, bias=False))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        hidden = match_spatial(functional.relu(self.filters(x)), output.shape[2:])
        return cast(Tensor, self.weights(hidden))


class Dilated(nn.Module):
    """A convolution of three taps two apart, rectifiers, and a pointwise one (Yu and Koltun 2016).

    Shapes: x (N, in, *spatial) to (N, out, *spatial).
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.hidden = convolution(rank, inputs, size, KERNEL, dilation=DILATION)
        self.out = pointwise(rank, size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        hidden = match_spatial(functional.relu(self.hidden(x)), output.shape[2:])
        return cast(Tensor, self.out(hidden))


class PositionAttention(nn.Module):
    """Each position of the output looks at the whole input: ``W_o softmax(QKᵀ / √size) V`` (Wang et al. 2018).

    Keys and values come from the input pooled to at most :data:`MEMORY` positions along each dimension, so that the
    cost is linear in the positions of the output.

    Shapes: x (N, in, *spatial) to (N, out, *spatial).
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.query = pointwise(rank, inputs, size, bias=False)
        self.key = pointwise(rank, inputs, size, bias=False)
        self.value = pointwise(rank, inputs, size, bias=False)
        self.out = pointwise(rank, size, outputs, bias=False, zeros=True)
        self.scale = 1 / math.sqrt(size)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        seen = pool(x, [min(length, MEMORY) for length in x.shape[2:]])
        query = self.query(match_spatial(x, output.shape[2:])).flatten(2)  # (N, size, P)
        key, value = self.key(seen).flatten(2), self.value(seen).flatten(2)  # (N, size, M)
        weights = torch.softmax(query.transpose(1, 2) @ key * self.scale, dim=-1)  # (N, P, M)
        read = (weights @ value.transpose(1, 2)).transpose(1, 2)  # (N, size, P)
        return cast(Tensor, self.out(read.reshape(*read.shape[:2], *output.shape[2:])))


class MemoryAttention(nn.Module):
    """Each input looks into a learned memory: ``softmax(x Kᵀ / √in) V`` (Guo et al. 2021, "external attention").

    It never looks from one position of a sequence at another: whether the host may see the future, and which dimension
    of its input is time, cannot be told from outside.

    Shapes: x (N, *, in) to (N, *, out).
    """

    def __init__(self, inputs: int, slots: int, outputs: int) -> None:
        super().__init__()
        self.keys = nn.Linear(inputs, slots, bias=False)
        self.values = zero(nn.Linear(slots, outputs, bias=False))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        weights = torch.softmax(self.keys(flatten_for(x, output)) * self.scale, dim=-1)
        return cast(Tensor, self.values(weights))


class Normalise(nn.Module):
    """``γ · (y - mean y) / √(var y + ε) + β`` of the target's own output y (Ba et al. 2016), γ and β zero at first.

    Features are normalised over themselves; channels over themselves and their positions, example by example.

    Shapes: output (N, *, out) or, with ``spatial``, (N, out, *spatial).
    """

    def __init__(self, outputs: int, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.gain = nn.Parameter(torch.zeros(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, _x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        if self.spatial:
            return functional.group_norm(output, 1, self.gain, self.shift)
        return functional.layer_norm(output, self.gain.shape, self.gain, self.shift)


class Mixture(nn.Module):
    """``Σₑ pₑ(x) W₂ₑ relu(W₁ₑ x + bₑ)``: experts of ``size`` units, weighed by a softmax of x (Jacobs et al. 1991).

    All experts run: a choice of few would leave the others without a gradient.

    Shapes: as :class:`Bottleneck`.
    """

    def __init__(self, rank: int, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.rank = rank
        self.size = size
        self.choice = pointwise(rank, inputs, EXPERTS, bias=True)
        self.experts = pointwise(rank, inputs, EXPERTS * size, bias=True)
        self.out = pointwise(rank, EXPERTS * size, outputs, bias=False, zeros=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What is added to ``output``."""
        x = match_spatial(x, output.shape[2:]) if self.rank else flatten_for(x, output)
        units = 1 if self.rank else -1
        shares = torch.softmax(self.choice(x), dim=units).repeat_interleave(self.size, dim=units)
        return cast(Tensor, self.out(functional.relu(self.experts(x)) * shares))
