"""Which rows of a layer's tensors are measured: a bounded, evenly spread part of the batch.

A row is what a layer maps at once: one sample of a Linear layer (or one position of a sequence), one position of a
convolution's output together with the patch of its input that it is computed from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from esperml.kasmina.bodies import match_spatial
from esperml.kasmina.geometry import CONV_RANKS, LINEAR, Geometry
from esperml.kasmina.kinds import layer_kind
from esperml.v1 import graph_pb2

MAX_ROWS: Final = 128
"""Most rows for statistics of a layer's output."""

MAX_RELATED_ROWS: Final = 32
"""Most rows for measures that need linear algebra, which cost their third power. The least squares depend on how many
there are, so that any batch of this size or more is measured alike."""

MAX_FEATURES: Final = 1024
"""Most features of a row, evenly spread."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that are measured at one layer.

    Attributes:
        total: rows of the whole batch.
        index: index of each chosen row among them, or ``None`` where all are chosen.
        sample: index of its sample in the batch.
        position: index of its position among those of a sample.
    """

    total: int
    index: Tensor | None
    sample: Tensor
    position: Tensor

    @property
    def count(self) -> int:
        """Number of chosen rows."""
        return self.sample.shape[0]

    @property
    def scale(self) -> float:
        """Rows of the batch for each chosen one: what turns a sum over these into one over those."""
        return self.total / self.count


@lru_cache(maxsize=512)
def choose(batch: int, positions: int, limit: int, device: torch.device) -> Rows:
    """At most ``limit`` rows, one in each of as many equal stretches, at a different depth in each."""
    total = batch * positions
    count = min(total, limit)
    stretch = total // count
    steps = torch.arange(count)
    index = steps * stretch + (steps * 7919) % stretch
    return Rows(
        total=total,
        index=None if count == total else index.to(device),
        sample=(index // positions).to(device),
        position=(index % positions).to(device),
    )


def rows_of(kind: graph_pb2.LayerType.ValueType, output: Tensor, limit: int) -> Rows:
    """At most ``limit`` rows to measure at a layer with this output, (N, *, F) or (N, C, *spatial)."""
    shape = output.shape
    positions = math.prod(shape[1:-1] if kind == LINEAR else shape[2:])
    return choose(shape[0], positions, limit, output.device)


def pick(kind: graph_pb2.LayerType.ValueType, tensor: Tensor, rows: Rows) -> Tensor:
    """The chosen rows of a layer's output or of its gradient, copied. Shapes: to (n, features)."""
    if kind == LINEAR:
        flat = tensor.reshape(-1, tensor.shape[-1])
        picked = flat.clone() if rows.index is None else flat[rows.index]
    else:
        picked = tensor.flatten(2)[rows.sample, :, rows.position]
    return _bounded(picked)


def pick_input(module: nn.Module, x: Tensor, output_shape: tuple[int, ...], rows: Rows) -> Tensor | None:
    """What the layer computes the chosen rows from: features, or patches of a convolution. Shapes: to (n, features).

    ``None`` for a convolution in groups, whose outputs do not all read the same channels, and for other kinds.
    """
    if layer_kind(module) == LINEAR:
        return pick(LINEAR, x, rows)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.groups != 1:
        return None
    if module.padding_mode != "zeros":
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif isinstance(module.padding, str):
        x = functional.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = functional.pad(x, [side for width in reversed(module.padding) for side in (width, width)])
    for axis, (taps, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    place = _unravel(rows.position, output_shape[2:])
    spread = x.movedim(1, 1 + len(place))
    return _bounded(spread[(rows.sample, *place)].flatten(1))


def pick_for_graft(geometry: Geometry, x: Tensor, output_shape: tuple[int, ...], rows: Rows) -> Tensor:
    """What a linear graft of that geometry would compute the target's chosen rows from. Shapes: to (n, features)."""
    if geometry.spatial:
        return pick(geometry.target_type, match_spatial(x, output_shape[2:]), rows)
    if geometry.source_type == LINEAR:
        return pick(LINEAR, x, rows)
    return pick(LINEAR, x.flatten(1), rows)


def signals(kind: graph_pb2.LayerType.ValueType, x: Tensor) -> Tensor:
    """A bounded part of a layer's input in which neighbours are neighbours. Shapes: to (n, channels, width)."""
    part = _thinned(x)
    width = x.shape[-1]
    lines = part.reshape(-1, 1, width) if kind == LINEAR else part.reshape(part.shape[0], -1, width)
    if kind not in CONV_RANKS:
        lines = _thinned(lines)
    if lines.shape[1] * width <= MAX_FEATURES:
        return lines
    return lines[:, : max(MAX_FEATURES // width, 1), :MAX_FEATURES]


# On small hosts a slice that leaves all as it is costs as much as the arithmetic.


def _thinned(x: Tensor) -> Tensor:
    return x if x.shape[0] <= MAX_ROWS else x[:: x.shape[0] // MAX_ROWS][:MAX_ROWS]


def _bounded(rows: Tensor) -> Tensor:
    return rows if rows.shape[1] <= MAX_FEATURES else rows[:, :: math.ceil(rows.shape[1] / MAX_FEATURES)]


def _unravel(index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.unravel_index(index, shape)
