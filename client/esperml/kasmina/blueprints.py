"""The registry of blueprints: which small networks a seed can grow into, and how large.

A blueprint states its cost as a function of one size, so that a seed can be made as large as its budget allows and
never larger. To add one::

    def make(geometry: Geometry, size: int) -> nn.Module: ...   # forward(x, output) -> what is added to output

    register(Blueprint("bilinear", fits=lambda g: g.flat, cost=lambda g, size: ..., make=make))

Its floating-point operations may be stated likewise with ``flops=``; otherwise they are counted on a body that holds no
memory.

What ``make`` returns is called as ``body(x, output)``: ``x`` is the input of the source layer, batch first, ``output``
what the target layer computed. It returns what is added, of the shape of ``output``, and must return zeros while it is
new, with a gradient that does not vanish: the usual way is to set the last layer's weights to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esperml.kasmina import bodies, bodies_mixing, costs
from esperml.kasmina.costs import Cost
from esperml.kasmina.errors import FAILURES, KasminaError, RefusedError
from esperml.kasmina.geometry import Geometry

MAX_BLUEPRINTS: Final = 64
"""The contract's limit: blueprints that fit a place are a bit mask of 64 bits."""

_LARGEST_SIZE: Final = 2**16


def _unbounded(_geometry: Geometry) -> int:
    return _LARGEST_SIZE


@dataclass(frozen=True, slots=True)
class Blueprint:
    """One kind of sub-network.

    Attributes:
        name: name on the wire.
        fits: whether it can grow at a place.
        cost: parameters at a place for a size of 1 or more; must grow with the size.
        make: builds the module of that size, with exactly that many parameters.
        largest: size beyond which more parameters add nothing.
        flops: floating-point operations of one forward pass for one example, products and convolutions only, as in
            :mod:`esperml.kasmina.costs`; ``None`` where they are to be counted.
    """

    name: str
    fits: Callable[[Geometry], bool]
    cost: Callable[[Geometry, int], int]
    make: Callable[[Geometry, int], nn.Module]
    largest: Callable[[Geometry], int] = _unbounded
    flops: Callable[[Geometry, int], int] | None = None

    def __deepcopy__(self, _memo: object) -> Blueprint:
        """It is never changed, so that a copied host has the same."""
        return self

    def __reduce__(self) -> tuple[Callable[[str], Blueprint], tuple[str]]:
        """Pickle by name, so that a wrapped model can be saved whole whatever its blueprints are made of."""
        return _registered_as, (self.name,)

    def smallest(self, geometry: Geometry) -> int:
        """Parameters of the smallest such seed at ``geometry``."""
        return self.cost(geometry, 1)

    def size_for(self, geometry: Geometry, parameter_budget: int) -> int:
        """The largest size that costs at most ``parameter_budget`` parameters.

        Raises:
            RefusedError: it does not fit the place, or even the smallest costs more than the budget.
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
        return low

    def flops_at(self, geometry: Geometry, size: int) -> int:
        """Floating-point operations of one forward pass for one example, as stated or else as counted."""
        if self.flops is not None:
            return self.flops(geometry, size)
        with torch.device("meta"), torch.no_grad():
            body = self.make(geometry, size)
            x, output = torch.empty(1, *geometry.input_shape), torch.empty(1, *geometry.output_shape)
            with FlopCounterMode(display=False) as counter:
                body(x, output)
        return int(counter.get_total_flops())

    def build(self, geometry: Geometry, parameter_budget: int) -> nn.Module:
        """The largest such network that has at most ``parameter_budget`` parameters.

        Raises:
            RefusedError: it does not fit the place, even the smallest costs more than the budget, it cannot be built,
                or it has other than the number of parameters that its own ``cost`` says.
        """
        try:
            size = self.size_for(geometry, parameter_budget)
            stated = self.cost(geometry, size)
            body = self.make(geometry, size)
        except FAILURES as error:
            raise RefusedError(f"{self.name!r} cannot be built: {type(error).__name__}: {error}") from error
        if not isinstance(body, nn.Module):
            raise RefusedError(f"{self.name!r} cannot be built: it made {type(body).__name__}, which is no module")
        count = sum(parameter.numel() for parameter in body.parameters())
        if count > parameter_budget:
            raise RefusedError(
                f"over budget: {self.name!r} has {count} parameters though it states {stated}; "
                f"{parameter_budget} are allowed"
            )
        if count != stated:
            raise RefusedError(f"{self.name!r} has {count} parameters though it states {stated}")
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


def choose(names: Sequence[str] | None) -> tuple[Blueprint, ...]:
    """The blueprints of these names in the order of registration; every one for ``None``.

    Raises:
        ValueError: a name is not registered.
    """
    if names is None:
        return registered()
    unknown = [name for name in names if name not in _registry]
    if unknown:
        raise ValueError(f"blueprints: {', '.join(map(repr, unknown))} is not registered; {', '.join(_registry)} are")
    return tuple(blueprint for blueprint in registered() if blueprint.name in names)


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


def _spatial(geometry: Geometry) -> bool:
    return geometry.spatial


def _keeps_channels(geometry: Geometry) -> bool:
    return geometry.spatial and geometry.in_features == geometry.out_features


def _varies(geometry: Geometry) -> bool:
    """Whether there is more than one number to normalise."""
    return _maps(geometry) and geometry.out_features * (geometry.out_positions if geometry.spatial else 1) > 1


def _reads_signals(geometry: Geometry) -> bool:
    return geometry.spatial or (geometry.flat and min(geometry.signal_shape[1:]) >= bodies.SHORTEST_SIGNAL)


def _rank(geometry: Geometry) -> int:
    return geometry.rank if geometry.spatial else 0


def _narrower(geometry: Geometry) -> int:
    return min(geometry.in_features, geometry.out_features)


def _one(_geometry: Geometry) -> int:
    return 1


def _conv_cost(geometry: Geometry, size: int) -> Cost:
    return (costs.separable if geometry.spatial else costs.signal_reader)(geometry, size)


def _conv(geometry: Geometry, size: int) -> nn.Module:
    if geometry.spatial:
        return bodies.Separable(geometry.rank, geometry.in_features, size, geometry.out_features)
    channels, *spatial = geometry.signal_shape
    return bodies.SignalReader(len(spatial), channels, size, geometry.out_features, unfold=geometry.rank == 0)


def _attention(geometry: Geometry, size: int) -> nn.Module:
    if geometry.spatial:
        return bodies_mixing.PositionAttention(geometry.rank, geometry.in_features, size, geometry.out_features)
    return bodies_mixing.MemoryAttention(geometry.in_features, size + 1, geometry.out_features)


def _mapping(body: Callable[[int, int, int, int], nn.Module]) -> Callable[[Geometry, int], nn.Module]:
    """Makes ``body`` of spatial dimensions (0 for features), inputs, size and outputs."""
    return lambda geometry, size: body(_rank(geometry), geometry.in_features, size, geometry.out_features)


def _standard(
    name: str,
    fits: Callable[[Geometry], bool],
    cost: Callable[[Geometry, int], Cost],
    make: Callable[[Geometry, int], nn.Module],
    largest: Callable[[Geometry], int] = _unbounded,
) -> Blueprint:
    return register(
        Blueprint(
            name,
            fits,
            lambda geometry, size: cost(geometry, size).parameters,
            make,
            largest,
            lambda geometry, size: cost(geometry, size).flops,
        )
    )


LOW_RANK: Final = _standard("low_rank", _maps, costs.low_rank, _mapping(bodies.LowRank), _narrower)
"""A linear map through few units; 1×1 convolutions where channels are mapped to channels."""

MLP: Final = _standard("mlp", _maps, costs.mlp, _mapping(bodies.Mlp))
"""One hidden layer of rectifiers; a convolution, rectifiers and a 1×1 convolution for channels."""

CONV: Final = _standard("conv", _reads_signals, _conv_cost, _conv)
"""Two pooled convolutions that read a flat input as a signal; depthwise and pointwise ones for channels."""

GATE: Final = _standard(
    "gate",
    _maps,
    costs.gate,
    lambda g, size: bodies.Gate(g.in_features, size, g.out_features, squeeze=g.spatial),
)
"""A factor on each output unit or channel that depends on the input (squeeze and excite)."""

BOTTLENECK: Final = _standard("bottleneck", _maps, costs.bottleneck, _mapping(bodies_mixing.Bottleneck))
"""Two hidden layers of few units; for channels the second is a convolution."""

DEPTHWISE: Final = _standard(
    "depthwise",
    _keeps_channels,
    costs.depthwise,
    lambda g, size: bodies_mixing.Depthwise(g.rank, g.in_features, size),
)
"""A wide convolution of each channel by itself."""

DILATED: Final = _standard("dilated", _spatial, costs.mlp, _mapping(bodies_mixing.Dilated))
"""A convolution that reaches twice as far as that of ``mlp``, for as many parameters."""

ATTENTION: Final = _standard("attention", _maps, costs.attention, _attention)
"""Attention of each position to the whole input for channels, and to a learned memory for features."""

NORM: Final = _standard(
    "norm",
    _varies,
    costs.normalise,
    lambda g, _size: bodies_mixing.Normalise(g.out_features, spatial=g.spatial),
    _one,
)
"""The target's output, normalised, with a gain and a shift."""

MIXTURE: Final = _standard("mixture", _maps, costs.mixture, _mapping(bodies_mixing.Mixture))
"""Experts that are weighed by the input."""
