"""The registry of blueprints: which small networks a seed can grow into, and how large.

A blueprint states its cost as a function of one size, so that a seed can be made as large as its budget allows and
never larger. To add one::

    def make(geometry: Geometry, size: int) -> nn.Module: ...   # forward(x, output) -> what is added to output

    register(Blueprint("bilinear", fits=lambda g: g.flat, cost=lambda g, size: ..., make=make))

What ``make`` returns is called as ``body(x, output)``: ``x`` is the input of the source layer, batch first, ``output``
what the target layer computed. It returns what is added, of the shape of ``output``, and must return zeros while it is
new, with a gradient that does not vanish: the usual way is to set the last layer's weights to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import nn

from esperml.kasmina import bodies
from esperml.kasmina.errors import KasminaError, RefusedError
from esperml.kasmina.geometry import CONV_RANKS, Geometry

MAX_BLUEPRINTS: Final = 64
"""The contract's limit: blueprints that fit a place are a bit mask of 64 bits."""

_LARGEST_SIZE: Final = 2**16


@dataclass(frozen=True, slots=True)
class Blueprint:
    """One kind of sub-network.

    Attributes:
        name: name on the wire.
        fits: whether it can grow at a place.
        cost: parameters at a place for a size of 1 or more; must grow with the size.
        make: builds the module of that size, with exactly that many parameters.
        largest: size beyond which more parameters add nothing.
    """

    name: str
    fits: Callable[[Geometry], bool]
    cost: Callable[[Geometry, int], int]
    make: Callable[[Geometry, int], nn.Module]
    largest: Callable[[Geometry], int] = lambda _geometry: _LARGEST_SIZE

    def __deepcopy__(self, _memo: object) -> Blueprint:
        """It is never changed, so that a copied host has the same."""
        return self

    def __reduce__(self) -> tuple[Callable[[str], Blueprint], tuple[str]]:
        """Pickle by name, so that a wrapped model can be saved whole whatever its blueprints are made of."""
        return _registered_as, (self.name,)

    def smallest(self, geometry: Geometry) -> int:
        """Parameters of the smallest such seed at ``geometry``."""
        return self.cost(geometry, 1)

    def build(self, geometry: Geometry, parameter_budget: int) -> nn.Module:
        """The largest such network that has at most ``parameter_budget`` parameters.

        Raises:
            RefusedError: it does not fit the place, even the smallest costs more than the budget, or it has more
                parameters than its own ``cost`` says and than the budget allows.
        """
        if not self.fits(geometry):
            raise RefusedError(
                f"blueprint {self.name!r} does not fit from {geometry.input_shape} to {geometry.output_shape}"
            )
        if self.smallest(geometry) > parameter_budget:
            raise RefusedError(
                f"over budget: the smallest {self.name!r} here has {self.smallest(geometry)} parameters, "
                f"{parameter_budget} are allowed"
            )
        low, high = 1, max(self.largest(geometry), 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(geometry, middle) <= parameter_budget:
                low = middle
            else:
                high = middle - 1
        body = self.make(geometry, low)
        count = sum(parameter.numel() for parameter in body.parameters())
        if count > parameter_budget:
            raise RefusedError(
                f"over budget: {self.name!r} has {count} parameters though it states "
                f"{self.cost(geometry, low)}; {parameter_budget} are allowed"
            )
        return body


_registry: dict[str, Blueprint] = {}


def register(blueprint: Blueprint) -> Blueprint:
    """Add ``blueprint`` to what hosts wrapped from now on can grow.

    Raises:
        ValueError: the name is taken or empty, or there are 64 already.
    """
    if not blueprint.name or blueprint.name in _registry:
        raise ValueError(f"blueprint name {blueprint.name!r} is taken or empty; names are {', '.join(_registry)}")
    if len(_registry) >= MAX_BLUEPRINTS:
        raise ValueError(f"there are {MAX_BLUEPRINTS} blueprints already, which is all that the contract can carry")
    _registry[blueprint.name] = blueprint
    return blueprint


def _registered_as(name: str) -> Blueprint:
    if name not in _registry:
        raise KasminaError(f"the model can grow {name!r}, which is no blueprint here; register it before loading")
    return _registry[name]


def unregister(name: str) -> None:
    """Take a blueprint out of the registry. Hosts that are wrapped already keep it. Raises ``KeyError``."""
    del _registry[name]


def registered() -> tuple[Blueprint, ...]:
    """Every blueprint, in the order of registration."""
    return tuple(_registry.values())


def _maps(geometry: Geometry) -> bool:
    return geometry.flat or geometry.spatial


def _narrower(geometry: Geometry) -> int:
    return min(geometry.in_features, geometry.out_features)


def _low_rank_cost(geometry: Geometry, size: int) -> int:
    return size * (geometry.in_features + geometry.out_features)


def _low_rank(geometry: Geometry, size: int) -> nn.Module:
    rank = geometry.rank if geometry.spatial else 0
    return bodies.LowRank(rank, geometry.in_features, size, geometry.out_features)


def _mlp_cost(geometry: Geometry, size: int) -> int:
    taps = bodies.KERNEL**geometry.rank if geometry.spatial else 1
    return size * (geometry.in_features * taps + 1 + geometry.out_features)


def _mlp(geometry: Geometry, size: int) -> nn.Module:
    rank = geometry.rank if geometry.spatial else 0
    return bodies.Mlp(rank, geometry.in_features, size, geometry.out_features)


def _conv_fits(geometry: Geometry) -> bool:
    if geometry.spatial:
        return True
    return geometry.flat and min(_signal_shape(geometry)[1:]) >= bodies.SHORTEST_SIGNAL


def _signal_shape(geometry: Geometry) -> tuple[int, ...]:
    """Channels and spatial shape of what a convolution reads: a Linear layer's input is one channel of a signal."""
    return geometry.input_shape if geometry.source_type in CONV_RANKS else (1, geometry.in_features)


def _conv_cost(geometry: Geometry, size: int) -> int:
    if geometry.spatial:
        return bodies.Separable.cost(geometry.rank, geometry.in_features, size, geometry.out_features)
    channels, *spatial = _signal_shape(geometry)
    return bodies.SignalReader.cost(len(spatial), channels, size, geometry.out_features)


def _conv(geometry: Geometry, size: int) -> nn.Module:
    if geometry.spatial:
        return bodies.Separable(geometry.rank, geometry.in_features, size, geometry.out_features)
    channels, *spatial = _signal_shape(geometry)
    return bodies.SignalReader(len(spatial), channels, size, geometry.out_features, unfold=geometry.rank == 0)


def _gate_cost(geometry: Geometry, size: int) -> int:
    return size * (geometry.in_features + 1) + (size + 1) * geometry.out_features


def _gate(geometry: Geometry, size: int) -> nn.Module:
    return bodies.Gate(geometry.in_features, size, geometry.out_features, squeeze=geometry.spatial)


LOW_RANK: Final = register(Blueprint("low_rank", _maps, _low_rank_cost, _low_rank, _narrower))
"""A linear map through few units; 1×1 convolutions where channels are mapped to channels."""

MLP: Final = register(Blueprint("mlp", _maps, _mlp_cost, _mlp))
"""One hidden layer of rectifiers; a convolution, rectifiers and a 1×1 convolution for channels."""

CONV: Final = register(Blueprint("conv", _conv_fits, _conv_cost, _conv))
"""Two pooled convolutions that read a flat input as a signal; depthwise and pointwise ones for channels."""

GATE: Final = register(Blueprint("gate", _maps, _gate_cost, _gate))
"""A factor on each output unit or channel that depends on the input (squeeze and excite)."""
