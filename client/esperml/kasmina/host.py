"""The host: a wrapped model with its layers, its places and its seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, TypeVar

from torch import nn

from esperml.kasmina import blueprints as registry
from esperml.kasmina import stages, topology
from esperml.kasmina.blueprints import Blueprint
from esperml.kasmina.errors import KasminaError, RefusedError, UnsupportedHostError
from esperml.kasmina.geometry import Geometry, layer_type
from esperml.kasmina.seeds import Seed
from esperml.v1 import graph_pb2

LayerSelection = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which layers to wrap: all, name patterns (``"encoder.*"``, as in a shell), or a predicate of name and module."""

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE: Final = "_kasmina_host"


@dataclass(slots=True)
class KasminaLayer:
    """One wrapped layer.

    Attributes:
        name: as in ``model.named_modules()``.
        type: what it computes.
        module: the layer itself, which is part of the host and is never replaced.
        input_shape: shape of its input without the batch dimension.
        output_shape: shape of its output without the batch dimension.
        activated: whether an element-wise non-linearity follows; ``None`` where that cannot be told.
        rectified: whether its output runs into rectifiers directly.
        single: whether it runs once per forward pass on a batch: only then may seeds grow here.
        batch: entries of its input's first dimension, for one example input.
    """

    name: str
    type: graph_pb2.LayerType.ValueType
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activated: bool | None
    rectified: bool
    single: bool
    batch: int

    @property
    def parameter_count(self) -> int:
        """Number of its own parameters, seeds not counted."""
        return sum(parameter.numel() for parameter in self.module.parameters(recurse=False))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a seed may grow: it reads the input of layer ``source`` and adds to the output of layer ``target``."""

    source: int
    target: int
    geometry: Geometry
    fitting: int

    @property
    def span(self) -> int:
        """1 where a layer is its own source, otherwise 2."""
        return 1 if self.source == self.target else 2


class Host:
    """A wrapped model. :func:`wrap` makes it, :func:`host_of` finds it again.

    Attributes:
        model: the model itself.
        layers: its wrapped layers, in the order in which they first run.
        edges: the dataflow between them.
        blueprints: what it can grow, in the order of the bit mask of its places.
        places: where it may grow. Indices stay the same for the life of the host.
        seeds: living and fossilised seeds by name.
        structure_version: counts structural changes, from 1.
    """

    def __init__(self, model: nn.Module, example_input: object, layers: LayerSelection) -> None:
        self.model = model
        self.blueprints: tuple[Blueprint, ...] = registry.registered()
        traced = topology.trace(model, example_input, _select(model, layers))
        modules = dict(model.named_modules())
        self.layers = tuple(_layer(trace, modules[trace.name]) for trace in traced.layers)
        self.edges = traced.edges
        self.places = tuple(self._places())
        self.seeds: dict[str, Seed] = {}
        self.structure_version = 1
        self.host_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}

    def _places(self) -> Iterable[Place]:
        pairs = [(i, i) for i in range(len(self.layers))]
        pairs += [(e.source, e.target) for e in self.edges if e.kind == graph_pb2.EDGE_KIND_FORWARD]
        for source_index, target_index in pairs:
            source, target = self.layers[source_index], self.layers[target_index]
            if not (source.single and target.single and source.batch == target.batch):
                continue
            geometry = Geometry(source.type, target.type, source.input_shape, target.output_shape)
            fitting = sum(1 << i for i, blueprint in enumerate(self.blueprints) if blueprint.fits(geometry))
            if fitting:
                yield Place(source_index, target_index, geometry, fitting)

    @property
    def seed_parameters(self) -> int:
        """Parameters of all seeds together, fossils included."""
        return sum(seed.parameter_count for seed in self.seeds.values())

    @property
    def live_seeds(self) -> int:
        """Number of seeds that can still be culled."""
        return sum(seed.live for seed in self.seeds.values())

    def layer_index(self, name: str) -> int:
        """Index of the layer ``name``. Raises :class:`RefusedError`, naming it, where there is none."""
        if name not in self._index:
            raise RefusedError(f"unknown layer {name!r}")
        return self._index[name]

    def place_index(self, source_layer: str, target_layer: str) -> int:
        """Index of the place between two layers. Raises :class:`RefusedError` where nothing can grow."""
        pair = (self.layer_index(source_layer), self.layer_index(target_layer))
        for i, place in enumerate(self.places):
            if (place.source, place.target) == pair:
                return i
        raise RefusedError(f"there is no place from {source_layer!r} to {target_layer!r}")

    def seed(self, seed_id: str) -> Seed:
        """The seed of that name. Raises :class:`RefusedError`, naming it, where there is none."""
        if seed_id not in self.seeds:
            raise RefusedError(f"unknown seed {seed_id!r}")
        return self.seeds[seed_id]

    def occupant(self, place: int) -> Seed | None:
        """The seed or fossil at a place."""
        return next((seed for seed in self.seeds.values() if seed.place == place), None)

    def plant(
        self,
        blueprint: str,
        place: int,
        parameter_budget: int,
        *,
        seed_id: str,
        blend_steps: int,
        decision_id: str = "",
    ) -> Seed:
        """Grow a seed at a place and hook it on. The host's outputs are unchanged.

        The optimizer does not know of it: :class:`~esperml.kasmina.grafting.Grafter` does both.

        Raises:
            RefusedError: unknown blueprint, place taken, name taken, blueprint does not fit, or budget too small.
        """
        grown = next((known for known in self.blueprints if known.name == blueprint), None)
        if grown is None:
            names = ", ".join(known.name for known in self.blueprints)
            raise RefusedError(f"unknown blueprint {blueprint!r}; this host can grow {names}")
        taken = self.occupant(place)
        if taken is not None:
            raise RefusedError(f"the place holds seed {taken.seed_id!r}, which is {stages.stage_name(taken.stage)}")
        if not seed_id or "." in seed_id or seed_id in self.seeds:
            raise RefusedError(f"seed name {seed_id!r} is empty, taken, or has a dot in it")
        where = self.places[place]
        source, target = self.layers[where.source].module, self.layers[where.target].module
        body = grown.build(where.geometry, parameter_budget)
        weight = next(target.parameters(recurse=False))
        body.to(device=weight.device, dtype=weight.dtype).train(target.training)
        seed = Seed(seed_id, place, blueprint, body, blend_steps=blend_steps, decision_id=decision_id)
        seed.attach(source, target)
        self.seeds[seed_id] = seed
        self.structure_version += 1
        return seed

    def fossilise(self, seed: Seed) -> None:
        """Keep a seed for good. Raises :class:`RefusedError` unless its stage allows that."""
        seed.enter(stages.FOSSILISED)
        self.structure_version += 1

    def uproot(self, seed: Seed) -> None:
        """Take a seed off. Raises :class:`RefusedError` unless its stage allows that."""
        seed.enter(stages.CULLED)
        seed.detach(self.layers[self.places[seed.place].target].module)
        del self.seeds[seed.seed_id]
        self.structure_version += 1

    def graph(self, graft_parameter_budget: int | None = None) -> graph_pb2.HostGraph:
        """The structure as the contract tells it.

        Places that hold a seed or a fossil keep their index and allow no blueprint.

        Args:
            graft_parameter_budget: leaves out blueprints whose smallest seed costs more at a place.
        """
        taken = {seed.place for seed in self.seeds.values()}
        masks = [
            0 if i in taken else self._affordable(place, graft_parameter_budget) for i, place in enumerate(self.places)
        ]
        return graph_pb2.HostGraph(
            structure_version=self.structure_version,
            layers=[_spec(layer) for layer in self.layers],
            edges=graph_pb2.EdgeTable(
                sources=[edge.source for edge in self.edges],
                targets=[edge.target for edge in self.edges],
                kinds=[edge.kind for edge in self.edges],
            ),
            blueprints=[blueprint.name for blueprint in self.blueprints],
            places=graph_pb2.PlaceTable(
                sources=[place.source for place in self.places],
                targets=[place.target for place in self.places],
                blueprints=masks,
            ),
        )

    def _affordable(self, place: Place, budget: int | None) -> int:
        if budget is None:
            return place.fitting
        return sum(
            1 << i
            for i, blueprint in enumerate(self.blueprints)
            if place.fitting >> i & 1 and blueprint.smallest(place.geometry) <= budget
        )


def wrap(model: Model, example_input: object, *, layers: LayerSelection = None, inplace: bool = True) -> Model:
    """Make ``model`` a host: read its true graph, and find where seeds may grow in it.

    Nothing of the model is renamed or replaced. While no seed lives its outputs, gradients, state dict and hooks are
    what they were. A layer that the forward pass does not reach is no part of the graph; one that runs more than once
    per pass is, but no seed grows there, since a seed belongs to one call.

    Args:
        model: any module with Linear or convolution layers.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments; one forward pass is
            run on it in the modes that the modules are in. Modes, buffers and random number generators are restored.
        layers: which layers to wrap: all Linear and Conv1d/2d/3d (``None``), those whose name matches a pattern or
            one of several, or those for which a predicate of name and module holds.
        inplace: wrap ``model`` itself; otherwise a deep copy.

    Returns:
        The wrapped model: the same object with ``inplace``.

    Raises:
        UnsupportedHostError: there is no layer to wrap, none of them runs, the model does not take ``example_input``,
            or it is wrapped already.
    """
    if _ATTRIBUTE in vars(model):
        raise UnsupportedHostError("the model is wrapped already")
    wrapped = model if inplace else copy.deepcopy(model)
    # The module's own __setattr__ would be free to register it; the host must stay out of the module tree.
    object.__setattr__(wrapped, _ATTRIBUTE, Host(wrapped, example_input, layers))
    return wrapped


def host_of(model: nn.Module) -> Host:
    """The host that :func:`wrap` made of ``model``. Raises :class:`KasminaError` where it is not wrapped."""
    host = vars(model).get(_ATTRIBUTE)
    if not isinstance(host, Host):
        raise KasminaError("the model is not wrapped; call kasmina.wrap(model, example_input) first")
    return host


def _select(model: nn.Module, layers: LayerSelection) -> Mapping[str, nn.Module]:
    if layers is None:
        chosen: Callable[[str, nn.Module], bool] = lambda _name, _module: True  # noqa: E731
    elif callable(layers):
        chosen = layers
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        chosen = lambda name, _module: any(fnmatchcase(name, pattern) for pattern in patterns)  # noqa: E731
    selected = {
        name: module
        for name, module in model.named_modules()
        if layer_type(module) is not None and chosen(name, module)
    }
    if not selected:
        raise UnsupportedHostError(f"no Linear or convolution layer is selected by layers={layers!r}")
    return selected


def _layer(trace: topology.LayerTrace, module: nn.Module) -> KasminaLayer:
    kind = layer_type(module)
    assert kind is not None  # noqa: S101 - _select let only such modules through
    return KasminaLayer(
        name=trace.name,
        type=kind,
        module=module,
        input_shape=topology.without_batch(trace.input_shape),
        output_shape=topology.without_batch(trace.output_shape),
        activated=trace.activated,
        rectified=trace.rectified,
        single=trace.calls == 1 and topology.is_batched(kind, trace),
        batch=trace.input_shape[0] if trace.input_shape else 0,
    )


def _spec(layer: KasminaLayer) -> graph_pb2.LayerSpec:
    return graph_pb2.LayerSpec(
        name=layer.name,
        type=layer.type,
        parameters=layer.parameter_count,
        input_shape=layer.input_shape,
        output_shape=layer.output_shape,
        activated=layer.activated,
    )
