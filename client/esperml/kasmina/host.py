"""The host: a wrapped model with its layers, its places and its seeds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

import torch
from torch import Tensor, nn

from esperml.kasmina import blueprints as registry
from esperml.kasmina import schedules, stages, topology
from esperml.kasmina.blueprints import Blueprint
from esperml.kasmina.errors import KasminaError, RefusedError, UnsupportedHostError
from esperml.kasmina.geometry import Geometry
from esperml.kasmina.layers import KasminaLayer
from esperml.kasmina.networks import to_networkx
from esperml.kasmina.resting import Resting
from esperml.kasmina.schedules import Schedule
from esperml.kasmina.seeds import Seed
from esperml.kasmina.selection import Selected, Selection, select
from esperml.kasmina.stages import Stage
from esperml.kasmina.tables import LayerTable, ParameterCount, layer_rows
from esperml.kasmina.upstream import module_around
from esperml.kasmina.wrappers import seen_through, wrapping_name
from esperml.v1 import graph_pb2

if TYPE_CHECKING:
    import networkx as nx

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTE: Final = "_kasmina_host"


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
        unused: names of layers that were selected and did not run, and so are no part of it.
        blueprints: what it can grow, in the order of the bit mask of its places.
        places: where it may grow. Indices stay the same for the life of the host.
        seeds: living and fossilised seeds by name.
        resting: places that rest after a seed was removed.
        structure_version: counts structural changes, from 1.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: object,
        selected: dict[str, Selected],
        blueprints: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.blueprints: tuple[Blueprint, ...] = registry.choose(blueprints)
        traced = topology.trace(model, example_input, {name: choice.module for name, choice in selected.items()})
        self.layers = tuple(
            KasminaLayer.of(trace, choice.module, choice.kind, may_grow=choice.may_grow)
            for trace in traced.layers
            for choice in (selected[trace.name],)
        )
        self.edges = traced.edges
        self.unused = traced.unused
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self.places = tuple(self._places(self._steps(example_input, selected)))
        self.seeds: dict[str, Seed] = {}
        self.resting = Resting()
        self.structure_version = 1
        self.host_parameters = _entries(model.parameters())

    def _steps(self, example_input: object, selected: dict[str, Selected]) -> list[tuple[int, int]]:
        """From layer to layer: the forward edges between those that may grow, whatever is observed between them."""
        traced_edges, names = self.edges, [layer.name for layer in self.layers]
        growing = {name: choice.module for name, choice in selected.items() if choice.may_grow}
        if len(growing) < len(selected):
            if growing.keys().isdisjoint(names):
                return []
            # A pass of its own, so that what can grow does not depend on what else is observed.
            alone = topology.trace(self.model, example_input, growing)
            traced_edges, names = alone.edges, [layer.name for layer in alone.layers]
        return [
            (self._index[names[edge.source]], self._index[names[edge.target]])
            for edge in traced_edges
            if edge.kind == graph_pb2.EDGE_KIND_FORWARD
        ]

    def _places(self, steps: Iterable[tuple[int, int]]) -> Iterable[Place]:
        for source_index, target_index in [*((i, i) for i in range(len(self.layers))), *steps]:
            source, target = self.layers[source_index], self.layers[target_index]
            if not (source.grows and target.grows and source.batch == target.batch):
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

    def stage(self, place: int) -> Stage:
        """That of the seed at a place, or of the place itself where it is empty: embargoed or dormant."""
        seed = self.occupant(place)
        return self.resting.stage(place) if seed is None else seed.stage

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
        train_steps: int = 0,
        schedule: Schedule = schedules.LINEAR,
        decision_id: str = "",
    ) -> Seed:
        """Grow a seed at a place and hook it on. The host's outputs are unchanged.

        The optimizer does not know of it: :class:`~esperml.kasmina.grafting.Grafter` does both.

        Raises:
            RefusedError: unknown blueprint or schedule, place taken or embargoed, name taken, blueprint does not fit,
                or budget too small.
        """
        grown = next((known for known in self.blueprints if known.name == blueprint), None)
        if grown is None:
            names = ", ".join(known.name for known in self.blueprints)
            raise RefusedError(f"unknown blueprint {blueprint!r}; this host can grow {names}")
        taken = self.occupant(place)
        if taken is not None:
            raise RefusedError(f"the place holds seed {taken.seed_id!r}, which is {stages.stage_name(taken.stage)}")
        self.resting.check(place)
        schedules.check_schedule(schedule)
        if not seed_id or "." in seed_id or seed_id in self.seeds:
            raise RefusedError(f"seed name {seed_id!r} is empty, taken, or has a dot in it")
        where = self.places[place]
        target = self.layers[where.target].module
        body = grown.build(where.geometry, parameter_budget)
        weight = next(target.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        body.to(device=weight.device, dtype=dtype).train(target.training)
        seed = Seed(
            seed_id,
            place,
            blueprint,
            body,
            blend_steps=blend_steps,
            train_steps=train_steps,
            schedule=schedule,
            decision_id=decision_id,
        )
        self.attach(seed)
        self.structure_version += 1
        return seed

    def attach(self, seed: Seed) -> None:
        """Hook a seed onto its layers. Neither the structure's version nor the optimizer hears of it."""
        where = self.places[seed.place]
        source, target = self.layers[where.source], self.layers[where.target]
        seed.attach(source.module, target.module, module_around(self.model, source.name, target.name))
        self.seeds[seed.seed_id] = seed

    def fossilise(self, seed: Seed) -> None:
        """Keep a seed for good. Raises :class:`RefusedError` unless its stage allows that."""
        seed.enter(stages.FOSSILISED)
        self.structure_version += 1

    def uproot(self, seed: Seed, end: Stage = stages.CULLED) -> None:
        """Take a seed off; its place rests. Raises :class:`RefusedError` unless its stage may go on to ``end``."""
        seed.enter(end)
        seed.detach(self.layers[self.places[seed.place].target].module)
        del self.seeds[seed.seed_id]
        self.resting.begin(seed.place, end)
        self.structure_version += 1

    def table(self) -> LayerTable:
        """The layers, and what can grow where, for a person."""
        return LayerTable(tuple(layer_rows(self.layers, self.places, self.blueprints)), self.unused)

    def parameter_counts(self) -> ParameterCount:
        """How many parameters there are now, and how many of them train."""
        parameters = list(self.model.parameters())
        training = _entries(parameter for parameter in parameters if parameter.requires_grad)
        return ParameterCount(training, _entries(parameters), self.seed_parameters)

    def to_networkx(self) -> nx.DiGraph[str]:
        """The graph for NetworkX.

        Nodes are the layers' names, in the order in which they first run, with ``kind``, ``parameters``,
        ``input_shape``, ``output_shape``, ``activated``, ``calls``, ``grows``, and the model's ``inputs`` and
        ``outputs`` that they read and run into; edges have a ``kind``: ``forward``, ``residual`` or ``recurrent``.
        Without the recurrent edges it has no cycles.

        Raises:
            KasminaError: NetworkX is not installed.
        """
        return to_networkx(self.layers, self.edges)

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
            layers=[layer.spec() for layer in self.layers],
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


def wrap(
    model: Model,
    example_input: object,
    *,
    layers: Selection = None,
    exclude: Selection = None,
    observe: Selection = None,
    blueprints: Sequence[str] | None = None,
    inplace: bool = True,
) -> Model:
    """Make ``model`` a host: read its true graph, and find where seeds may grow in it.

    Nothing of the model is renamed or replaced. While no seed lives its outputs, gradients, state dict and hooks are
    what they were. A layer that the forward pass does not reach is no part of the graph; one that runs more than once
    per pass is, but no seed grows there, since a seed belongs to one call.

    Seeds can grow at Linear layers (the ``Conv1D`` of Hugging Face's transformers is one) and at Conv1d/2d/3d, and
    these are the layers of a host by default. Normalisations, embeddings, recurrent layers and attention blocks are
    observed on request only: the data runs through them in the graph all the same; each observed layer costs
    telemetry's time; and the shipped policy was trained on hosts whose graphs have none of them between the layers at
    which it can act, so that with them it decides less surely. Where seeds may grow does not depend on what is
    observed beside. A layer inside another one that was selected is part of that one: an attention block that is
    observed is one layer, and its projections are none.

    ``layers``, ``exclude`` and ``observe`` select as Hugging Face's PEFT does:

    - a list has the ends of names, types, or both: ``["query", "mlp.fc1", nn.Conv2d]``;
    - a string is a regular expression that must match a whole name: ``r"encoder\\..*"``; ``"all-linear"`` stands for
      all Linear layers but the model's output layer;
    - a type selects its instances;
    - a predicate is asked for each layer, with its name and the module.

    Args:
        model: any module with Linear or convolution layers.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments; one forward pass is
            run on it in the modes that the modules are in, a second one where layers are observed. Modes, buffers and
            random number generators are restored.
        layers: the Linear and convolution layers at which seeds may grow; all of them for ``None``.
        exclude: what is left out of the other two.
        observe: modules of any kind to observe as layers; ``"all"`` stands for all of a known kind, ``None`` for none.
        blueprints: names of what it can grow, of those that are registered; all of them for ``None``.
        inplace: wrap ``model`` itself; otherwise a deep copy.

    Returns:
        The wrapped model: the same object with ``inplace``.

    Raises:
        UnsupportedHostError: a name, type or expression matches nothing, there is no layer to wrap, none of them runs,
            the model does not take ``example_input``, or it or a part of it is wrapped already.
        ValueError: a blueprint is not registered.
    """
    host = _host(model if inplace else copy.deepcopy(model), example_input, layers, exclude, observe, blueprints)
    # The module's own __setattr__ would be free to register it; the host must stay out of the module tree.
    object.__setattr__(host.model, _ATTRIBUTE, host)
    return cast(Model, host.model)


def preview(
    model: nn.Module,
    example_input: object,
    *,
    layers: Selection = None,
    exclude: Selection = None,
    observe: Selection = None,
    blueprints: Sequence[str] | None = None,
) -> LayerTable:
    """What :func:`wrap` would make of ``model``, which stays plain: its layers, and what could grow where.

    Takes what :func:`wrap` takes, and raises what it raises. Runs a forward pass or two.
    """
    return _host(model, example_input, layers, exclude, observe, blueprints).table()


def unwrap(model: Model) -> Model:
    """Make a host a plain model again; the same object, with the weights that it has now.

    Raises:
        KasminaError: the model is not wrapped, or has seeds: they are part of what it computes. Cull them first, or
            bake the model.
    """
    host = host_of(model)
    if host.seeds:
        raise KasminaError(f"the model has seeds: {', '.join(host.seeds)}; cull them first, or bake the model")
    object.__delattr__(host.model, _ATTRIBUTE)
    return model


def host_of(model: nn.Module) -> Host:
    """The host that :func:`wrap` made of ``model``. Raises :class:`KasminaError` where it is not wrapped.

    A compiled model, and one under DistributedDataParallel, has the host of the model inside.
    """
    for module in seen_through(model):
        host = vars(module).get(_ATTRIBUTE)
        if isinstance(host, Host):
            return host
    raise KasminaError("the model is not wrapped; call kasmina.wrap(model, example_input) first")


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters a wrapped model has, how many of them train, and how many are in seeds.

    Raises:
        KasminaError: the model is not wrapped.
    """
    print(host_of(model).parameter_counts())


def _host(
    model: nn.Module,
    example_input: object,
    layers: Selection,
    exclude: Selection,
    observe: Selection,
    blueprints: Sequence[str] | None,
) -> Host:
    around = wrapping_name(model)
    if around:
        raise UnsupportedHostError(f"the model is a {around}; wrap the model inside, and then make this of it")
    for name, module in model.named_modules():
        if _ATTRIBUTE in vars(module):
            what = f"the model's part {name!r}" if name else "the model"
            raise UnsupportedHostError(f"{what} is wrapped already; kasmina.unwrap makes it plain again")
    return Host(model, example_input, select(model, layers, exclude, observe), blueprints)


def _entries(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
