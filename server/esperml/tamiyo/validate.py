"""What strangers send is checked here, once, before anything computes with it.

Every error is an :class:`~esperml.contract.InvalidFieldError` with the path of the field and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from esperml.contract import MEASURES, InvalidFieldError
from esperml.tamiyo.columns import LAYER_MEASURES, PLACE_MEASURES, Array, Table, columns_of
from esperml.tamiyo.structure import LayerSpecs, Structure
from esperml.tamiyo.view import StateView
from esperml.v1 import graph_pb2, health_pb2

MAX_LAYERS: Final = 4096
MAX_PLACES: Final = 16384
MAX_EDGES: Final = 65536
MAX_BLUEPRINTS: Final = 64
MAX_NAME_LENGTH: Final = 512
MAX_HISTORY: Final = 16
MAX_ADAPTATIONS: Final = 64
MAX_SEEDS: Final = 4096
MAX_STEP: Final = 2**53
"""Steps beyond this have no exact float."""

LAYERS: Final = "layers"
PLACES: Final = "places.sources"
"""Where in the graph that is of which a column has one entry each, and which an index counts."""

_LAYER_TYPES: Final = frozenset(graph_pb2.LayerType.values()) - {graph_pb2.LAYER_TYPE_UNSPECIFIED}
_EDGE_KINDS: Final = frozenset(graph_pb2.EdgeKind.values()) - {graph_pb2.EDGE_KIND_UNSPECIFIED}
_STAGES: Final = frozenset(health_pb2.SeedStage.values()) - {health_pb2.SEED_STAGE_UNSPECIFIED}

_PLACE_RANGES: Final = {"growth_gradient": (0.0, math.inf), "explained_error": (0.0, 1.0)}
_LAYER_BOUNDS: Final = np.array([(MEASURES[name].low, MEASURES[name].high) for name in LAYER_MEASURES])
_PLACE_BOUNDS: Final = np.array([_PLACE_RANGES[name] for name in PLACE_MEASURES])
_HEALTH_BOUNDS: Final = np.array([(MEASURES["health"].low, MEASURES["health"].high)])
_RUN_RANGES: Final = {
    "train_loss": (-math.inf, math.inf),
    "held_out_loss": (-math.inf, math.inf),
    "learning_rate": (0.0, math.inf),
    "step_seconds": (0.0, math.inf),
    "overhead": (0.0, 1.0),
}


def check_state(state: graph_pb2.ModelGraphState, field: str = "state") -> StateView:
    """Check a state from outside.

    Args:
        state: the state.
        field: path by which errors name it.

    Returns:
        The state, unpacked as far as that was needed.

    Raises:
        InvalidFieldError: a field is missing, malformed or out of range.
    """
    if not state.HasField("graph"):
        raise InvalidFieldError(f"{field}.graph", "is missing; it says which layers, edges and places the host has")
    view = StateView(state)
    _check_step(state.step, f"{field}.step")
    _check_structure(state.graph, view.structure, f"{field}.graph")
    layers, places = len(state.graph.layers), len(state.graph.places.sources)
    paths = [f"{field}.layers.{name}" for name in LAYER_MEASURES]
    _check_lengths(columns_of(state.layers, LAYER_MEASURES), layers, paths, LAYERS)
    _check_values(view.layer_table, _LAYER_BOUNDS, paths)
    paths = [f"{field}.places.{name}" for name in PLACE_MEASURES]
    _check_lengths(columns_of(state.places, PLACE_MEASURES), places, paths, PLACES)
    _check_values(view.place_table, _PLACE_BOUNDS, paths)
    check_run(state.run, f"{field}.run")
    _check_history(view, f"{field}.history")
    _check_seeds(state.seeds, places, f"{field}.seeds")
    _check_adaptations(state.adaptations, places, f"{field}.adaptations")
    if state.HasField("mask"):
        _check_mask(state.mask, state.graph, f"{field}.mask")
    return view


def check_graph(graph: graph_pb2.HostGraph, field: str) -> None:
    """Check the structure of a host. Raises :class:`InvalidFieldError`."""
    _check_structure(graph, Structure.of(graph), field)


def check_report(
    report: health_pb2.HealthReport, graph: graph_pb2.HostGraph, field: str = "event.health_report"
) -> None:
    """Check a report against the structure that it was measured on.

    Args:
        report: the report. Layers that the structure does not have are refused, unless it was measured on another.
        graph: the structure.
        field: path by which errors name the report.

    Raises:
        InvalidFieldError: a field is missing, malformed or out of range.
    """
    _check_step(report.step, f"{field}.step")
    check_run(report.run, f"{field}.run")
    same = report.structure_version == graph.structure_version
    names = {layer.name for layer in graph.layers}
    for index, signal in enumerate(report.layers):
        path = f"{field}.layers[{index}]"
        if same and signal.layer not in names:
            raise InvalidFieldError(f"{path}.layer", f"is {signal.layer!r}, which is no layer of the host")
        for name, measure in MEASURES.items():
            if not measure.derived and signal.HasField(name):  # type: ignore[arg-type]
                measure.check(getattr(signal, name), f"{path}.{name}")
    if not same:
        return
    places = len(graph.places.sources)
    for index, place in enumerate(report.places):
        path = f"{field}.places[{index}]"
        _check_index(place.place, places, f"{path}.place", PLACES)
        for name, bounds in _PLACE_RANGES.items():
            if place.HasField(name):  # type: ignore[arg-type]
                _check_number(getattr(place, name), bounds, f"{path}.{name}")
    _check_seeds(report.seeds, places, f"{field}.seeds")


def _check_size(graph: graph_pb2.HostGraph, field: str) -> None:
    if not graph.layers:
        raise InvalidFieldError(f"{field}.layers", "is empty; a host has at least one layer")
    _check_count(len(graph.layers), MAX_LAYERS, f"{field}.layers")


def _check_structure(graph: graph_pb2.HostGraph, structure: Structure, field: str) -> None:
    if structure.is_valid:
        return
    _check_size(graph, field)
    # One look at all layers for what is nearly always right; only what is wrong is looked at again, to say what.
    if not _layers_are_right(structure.specs):
        names: set[str] = set()
        for index, layer in enumerate(graph.layers):
            _check_layer(layer, names, f"{field}.layers[{index}]")
            names.add(layer.name)
    _check_edges(graph, f"{field}.edges")
    _check_blueprints(graph.blueprints, f"{field}.blueprints")
    _check_places(graph, f"{field}.places")
    structure.is_valid = True


def _layers_are_right(specs: LayerSpecs) -> bool:
    names = set(specs.names)
    return (
        len(names) == len(specs.names)
        and "" not in names
        and max(map(len, names)) <= MAX_NAME_LENGTH
        and _LAYER_TYPES.issuperset(specs.layer_type.tolist())
        # Shapes have a dimension of 0 where their product is 0, or NaN where it was infinite before.
        and bool((specs.in_elements > 0).all() and (specs.out_elements > 0).all())
    )


def _check_layer(layer: graph_pb2.LayerSpec, names: set[str], field: str) -> None:
    if not layer.name or len(layer.name) > MAX_NAME_LENGTH:
        raise InvalidFieldError(f"{field}.name", f"must have 1 to {MAX_NAME_LENGTH} characters")
    if layer.name in names:
        raise InvalidFieldError(f"{field}.name", f"is {layer.name!r} again; names are unique")
    if layer.type not in _LAYER_TYPES:
        raise InvalidFieldError(f"{field}.type", "is not a layer type; use LAYER_TYPE_OTHER for what has none")
    for shape in ("input_shape", "output_shape"):
        if 0 in getattr(layer, shape):
            raise InvalidFieldError(f"{field}.{shape}", "has a dimension of 0; leave the batch dimension out")


def _check_edges(graph: graph_pb2.HostGraph, field: str) -> None:
    edges = graph.edges
    _check_count(len(edges.sources), MAX_EDGES, f"{field}.sources")
    for name in ("targets", "kinds"):
        _check_length(len(getattr(edges, name)), len(edges.sources), f"{field}.{name}", "edges.sources")
    _check_indices(edges.sources, len(graph.layers), f"{field}.sources", LAYERS)
    _check_indices(edges.targets, len(graph.layers), f"{field}.targets", LAYERS)
    if not _EDGE_KINDS.issuperset(edges.kinds):
        index, kind = next((index, kind) for index, kind in enumerate(edges.kinds) if kind not in _EDGE_KINDS)
        raise InvalidFieldError(f"{field}.kinds[{index}]", f"is {kind}, which is no kind of edge")


def _check_blueprints(names: Sequence[str], field: str) -> None:
    _check_count(len(names), MAX_BLUEPRINTS, field)
    for index, name in enumerate(names):
        if not name or len(name) > MAX_NAME_LENGTH:
            raise InvalidFieldError(f"{field}[{index}]", f"must have 1 to {MAX_NAME_LENGTH} characters")
        if name in names[:index]:
            raise InvalidFieldError(f"{field}[{index}]", f"is {name!r} again; names are unique")


def _check_places(graph: graph_pb2.HostGraph, field: str) -> None:
    places = graph.places
    _check_count(len(places.sources), MAX_PLACES, f"{field}.sources")
    for name in ("targets", "blueprints"):
        _check_length(len(getattr(places, name)), len(places.sources), f"{field}.{name}", "places.sources")
    _check_indices(places.sources, len(graph.layers), f"{field}.sources", LAYERS)
    _check_indices(places.targets, len(graph.layers), f"{field}.targets", LAYERS)
    _check_masks(places.blueprints, len(graph.blueprints), f"{field}.blueprints")


def _check_mask(mask: graph_pb2.ActionMask, graph: graph_pb2.HostGraph, field: str) -> None:
    if not mask.may_adapt:
        if mask.blueprints:
            raise InvalidFieldError(f"{field}.blueprints", "must be empty where may_adapt is false")
        return
    _check_length(len(mask.blueprints), len(graph.places.sources), f"{field}.blueprints", "graph.places.sources")
    _check_masks(mask.blueprints, len(graph.blueprints), f"{field}.blueprints")
    for index, (bits, fits) in enumerate(zip(mask.blueprints, graph.places.blueprints, strict=True)):
        if bits & ~fits:
            raise InvalidFieldError(f"{field}.blueprints[{index}]", "allows a blueprint that does not fit the place")


def _check_history(view: StateView, field: str) -> None:
    state, previous = view.state, 0
    _check_count(len(state.history), MAX_HISTORY, field)
    for index, point in enumerate(state.history):
        path = f"{field}[{index}]"
        if point.step < previous or point.step > state.step:
            raise InvalidFieldError(f"{path}.step", f"is {point.step}; history runs from old to new, up to the state")
        previous = point.step
        check_run(point.run, f"{path}.run")
    paths = [f"{field}[{index}].health" for index in range(len(state.history))]
    _check_lengths([point.health for point in state.history], len(state.graph.layers), paths, LAYERS)
    _check_values(view.health_history, _HEALTH_BOUNDS, paths)


def _check_seeds(seeds: Sequence[health_pb2.SeedSignal], places: int, field: str) -> None:
    _check_count(len(seeds), MAX_SEEDS, field)
    seen: set[str] = set()
    for index, seed in enumerate(seeds):
        path = f"{field}[{index}]"
        if not seed.seed_id or len(seed.seed_id) > MAX_NAME_LENGTH:
            raise InvalidFieldError(f"{path}.seed_id", f"must have 1 to {MAX_NAME_LENGTH} characters")
        if seed.seed_id in seen:
            raise InvalidFieldError(f"{path}.seed_id", f"is {seed.seed_id!r} again; names are unique")
        seen.add(seed.seed_id)
        _check_index(seed.place, places, f"{path}.place", PLACES)
        if seed.stage not in _STAGES:
            raise InvalidFieldError(f"{path}.stage", f"is {seed.stage}, which is no stage")
        _check_number(seed.alpha, (0.0, 1.0), f"{path}.alpha")
        if seed.HasField("ablation_contribution"):
            _check_number(seed.ablation_contribution, (-math.inf, math.inf), f"{path}.ablation_contribution")
        if seed.HasField("gradient_norm"):
            _check_number(seed.gradient_norm, (0.0, math.inf), f"{path}.gradient_norm")


def _check_adaptations(records: Sequence[graph_pb2.AdaptationRecord], places: int, field: str) -> None:
    _check_count(len(records), MAX_ADAPTATIONS, field)
    for index, record in enumerate(records):
        _check_index(record.place, places, f"{field}[{index}].place", PLACES)
        if record.HasField("effect"):
            _check_number(record.effect, (-math.inf, math.inf), f"{field}[{index}].effect")


def check_run(run: health_pb2.RunMeasures, field: str) -> None:
    """Check the measures of a run. Raises :class:`InvalidFieldError`."""
    for described, value in run.ListFields():
        if described.name in _RUN_RANGES:
            _check_number(value, _RUN_RANGES[described.name], f"{field}.{described.name}")


def _check_lengths(columns: Sequence[graph_pb2.Column], size: int, paths: Sequence[str], what: str) -> None:
    for column, path in zip(columns, paths, strict=True):
        if len(column.values) == size and not column.absent:
            continue
        if column.values:
            _check_length(len(column.values), size, f"{path}.values", f"graph.{what}")
            _check_indices(column.absent, size, f"{path}.absent", what)
        elif column.absent:
            raise InvalidFieldError(f"{path}.absent", "must be empty where there are no values")


def _check_values(table: Table, bounds: Array, paths: Sequence[str]) -> None:
    """Check all columns of a table at once: ``bounds`` has a row of least and greatest for each, or one for all."""
    low, high = bounds[:, :1], bounds[:, 1:]
    # NaN compares false.
    wrong = table.known & ~((table.values >= low) & (table.values <= high) & np.isfinite(table.values))
    for row, column in np.argwhere(wrong)[:1].tolist():
        least, greatest = np.broadcast_to(bounds, (len(paths), 2))[row].tolist()
        _check_number(float(table.values[row, column]), (least, greatest), f"{paths[row]}.values[{column}]")


def _check_number(value: float, bounds: tuple[float, float], field: str) -> None:
    if not math.isfinite(value):
        raise InvalidFieldError(field, f"is {value}; leave out what was not measured")
    if not bounds[0] <= value <= bounds[1]:
        raise InvalidFieldError(field, f"is {value:g}, outside [{bounds[0]:g}, {bounds[1]:g}]")


def _check_masks(masks: Sequence[int], blueprints: int, field: str) -> None:
    if max(masks, default=0) >> blueprints:
        index = next(index for index, bits in enumerate(masks) if bits >> blueprints)
        raise InvalidFieldError(f"{field}[{index}]", f"has a bit beyond the {blueprints} blueprints of the graph")


def _check_indices(values: Sequence[int], size: int, field: str, what: str) -> None:
    if max(values, default=-1) >= size:
        index = next(index for index, value in enumerate(values) if value >= size)
        _check_index(values[index], size, f"{field}[{index}]", what)


def _check_index(value: int, size: int, field: str, what: str) -> None:
    if value >= size:
        raise InvalidFieldError(field, f"is {value}, but graph.{what} has {size} entries, counted from 0")


def _check_length(given: int, expected: int, field: str, other: str) -> None:
    if given != expected:
        raise InvalidFieldError(field, f"has {given} entries, but {other} has {expected}")


def _check_count(given: int, most: int, field: str) -> None:
    if given > most:
        raise InvalidFieldError(field, f"has {given} entries, and at most {most} are taken")


def _check_step(step: int, field: str) -> None:
    if step > MAX_STEP:
        raise InvalidFieldError(field, f"is {step}, more than {MAX_STEP}")
