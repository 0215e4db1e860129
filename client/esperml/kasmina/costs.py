"""What a body of some size costs at a place: parameters, and floating-point operations for one example forward.

Operations are those of matrix products and convolutions, a multiplication and an addition counted as two, as
``torch.utils.flop_counter`` counts them; what is done element by element is left out. Backward costs twice as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from esperml.kasmina.bodies import KERNEL, POSITIONS, SIGNAL_KERNEL
from esperml.kasmina.bodies_mixing import DEPTHWISE_KERNEL, EXPERTS, MEMORY
from esperml.kasmina.geometry import Geometry

_MULTIPLY_AND_ADD: Final = 2


@dataclass(frozen=True, slots=True)
class Cost:
    """What one body costs.

    Attributes:
        parameters: its parameters.
        flops: floating-point operations of one forward pass for one example.
    """

    parameters: int
    flops: int


def _cost(parameters: int, products: int) -> Cost:
    return Cost(parameters, _MULTIPLY_AND_ADD * products)


def _taps(geometry: Geometry, kernel: int = KERNEL) -> int:
    """Taps of a filter over channels; 1 where features are mapped to features."""
    taps: int = kernel**geometry.rank if geometry.spatial else 1
    return taps


def low_rank(geometry: Geometry, size: int) -> Cost:
    """``size`` units between, at each position of the output."""
    parameters = size * (geometry.in_features + geometry.out_features)
    return _cost(parameters, geometry.out_positions * parameters)


def mlp(geometry: Geometry, size: int) -> Cost:
    """``size`` hidden units or channels, the first map of :data:`~esperml.kasmina.bodies.KERNEL` taps for channels."""
    read, written = geometry.in_features * _taps(geometry) * size, size * geometry.out_features
    products = geometry.in_positions * read + geometry.out_positions * written
    return _cost(read + size + written, products)


def bottleneck(geometry: Geometry, size: int) -> Cost:
    """``size`` units twice."""
    read, between, written = geometry.in_features * size, size * size * _taps(geometry), size * geometry.out_features
    products = geometry.in_positions * (read + between) + geometry.out_positions * written
    return _cost(read + size + between + size + written, products)


def separable(geometry: Geometry, size: int) -> Cost:
    """``size`` filters a channel, mixed by a pointwise map."""
    filters = geometry.in_features * size
    taps, written = filters * _taps(geometry), filters * geometry.out_features
    return _cost(taps + filters + written, geometry.in_positions * taps + geometry.out_positions * written)


def depthwise(geometry: Geometry, size: int) -> Cost:
    """``size`` filters a channel, summed within the channel."""
    filters = geometry.in_features * size
    taps = filters * _taps(geometry, DEPTHWISE_KERNEL)
    return _cost(taps + 2 * filters, geometry.in_positions * taps + geometry.out_positions * filters)


def signal_reader(geometry: Geometry, size: int) -> Cost:
    """Two convolutions of ``size`` channels over a signal, and a linear map of what was found at a few positions."""
    channels, *spatial = geometry.signal_shape
    taps = SIGNAL_KERNEL ** len(spatial)
    first, second = channels * taps * size, size * taps * size
    written = size * POSITIONS ** len(spatial) * geometry.out_features
    halved = [length // 2 for length in spatial]
    products = math.prod(spatial) * first + math.prod(halved) * second + written
    return _cost(first + size + second + size + written, geometry.out_positions * products)


def gate(geometry: Geometry, size: int) -> Cost:
    """Two linear maps with biases, of the mean over all positions where channels are mapped to channels."""
    products = size * (geometry.in_features + geometry.out_features)
    times = 1 if geometry.spatial else geometry.out_positions
    return _cost(products + size + geometry.out_features, times * products)


def attention(geometry: Geometry, size: int) -> Cost:
    """``size`` features of queries, keys and values for channels; ``size`` + 1 slots of a memory for features."""
    if not geometry.spatial:
        slots = (size + 1) * (geometry.in_features + geometry.out_features)
        return _cost(slots, geometry.out_positions * slots)
    read, written = geometry.in_features * size, size * geometry.out_features
    seen = math.prod(min(length, MEMORY) for length in geometry.input_shape[1:])
    products = geometry.out_positions * (read + 2 * seen * size + written) + seen * 2 * read
    return _cost(3 * read + written, products)


def normalise(geometry: Geometry, _size: int) -> Cost:
    """A gain and a shift for each unit or channel; no products."""
    return _cost(2 * geometry.out_features, 0)


def mixture(geometry: Geometry, size: int) -> Cost:
    """:data:`~esperml.kasmina.bodies_mixing.EXPERTS` experts of ``size`` units, and the choice between them."""
    choice, units = EXPERTS * geometry.in_features, EXPERTS * size
    experts = units * (geometry.in_features + geometry.out_features)
    return _cost(choice + EXPERTS + experts + units, geometry.out_positions * (choice + experts))
