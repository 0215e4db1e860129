"""One run's host as a graph with its latest measures, histories and adaptations."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from esperml.contract import MEASURES
from esperml.tamiyo import health
from esperml.tamiyo.columns import PLACE_MEASURES, Array, absent, layer_columns, place_columns, to_column
from esperml.tamiyo.topology import Topology
from esperml.v1 import graph_pb2, health_pb2

MAX_ADAPTATIONS: Final = 64
RAW_MEASURES: Final = tuple(name for name, measure in MEASURES.items() if not measure.derived)


class _Moment:
    """A report as the history keeps it."""

    def __init__(self, step: int, run: health_pb2.RunMeasures, present_health: Array, throughput: Array) -> None:
        self.step = step
        self.run = run
        self.health = present_health
        self.throughput = throughput


class Analyzer:
    """Turns reports into states.

    A measure stays what the last report that had it said: sessions sample, and do not send every layer every time.

    Args:
        run_id: the run.
        graph: its structure when it started; validated.
    """

    def __init__(self, run_id: str, graph: graph_pb2.HostGraph) -> None:
        self._run_id = run_id
        self._step = 0
        self._epoch: int | None = None
        self._run = health_pb2.RunMeasures()
        self._seeds: dict[str, health_pb2.SeedSignal] = {}
        self._adaptations: deque[graph_pb2.AdaptationRecord] = deque(maxlen=MAX_ADAPTATIONS)
        self._history: deque[_Moment] = deque(maxlen=health.HISTORY_LENGTH + 1)
        self._adaptation_count: dict[str, int] = {}
        self._last_adaptation: dict[str, int] = {}
        self._take(graph)
        self._layers = {name: absent(self._topology.size) for name in RAW_MEASURES}
        self._places = {name: absent(len(graph.places.sources)) for name in PLACE_MEASURES}

    def _take(self, graph: graph_pb2.HostGraph) -> None:
        self.graph = graph
        self._topology = Topology.of(graph)
        self._layer_index = {layer.name: index for index, layer in enumerate(graph.layers)}

    @property
    def seeds(self) -> list[health_pb2.SeedSignal]:
        """Seeds of the last report, in its order."""
        return list(self._seeds.values())

    @property
    def run_measures(self) -> health_pb2.RunMeasures:
        """Latest measures of the whole run."""
        return self._run

    def place_names(self, place: int) -> tuple[str, str]:
        """Names of a place's source and target layers, which outlive a change of structure."""
        places, layers = self.graph.places, self.graph.layers
        return layers[places.sources[place]].name, layers[places.targets[place]].name

    def restructure(self, graph: graph_pb2.HostGraph) -> None:
        """Go over to another structure, keeping what still applies.

        Measures and histories of layers that are still there (by name) stay, and so do those of places whose source
        and target are; adaptations at places that are gone are forgotten.

        Args:
            graph: the new structure; validated.
        """
        before = {self.place_names(place): place for place in range(len(self.graph.places.sources))}
        old_layers = self._layer_index
        self._take(graph)
        layer_from = [old_layers.get(layer.name) for layer in graph.layers]
        names = [self.place_names(place) for place in range(len(graph.places.sources))]
        place_from = [before.get(pair) for pair in names]
        place_to = {old: new for new, old in enumerate(place_from) if old is not None}
        self._layers = {name: _carry(values, layer_from) for name, values in self._layers.items()}
        self._places = {name: _carry(values, place_from) for name, values in self._places.items()}
        for moment in self._history:
            moment.health = _carry(moment.health, layer_from)
            moment.throughput = _carry(moment.throughput, layer_from)
        records = [record for record in self._adaptations if record.place in place_to]
        for record in records:
            record.place = place_to[record.place]
        self._adaptations = deque(records, maxlen=MAX_ADAPTATIONS)
        seeds = {name: seed for name, seed in self._seeds.items() if seed.place in place_to}
        for seed in seeds.values():
            seed.place = place_to[seed.place]
        self._seeds = seeds

    def observe(self, report: health_pb2.HealthReport) -> None:
        """Take in a report that is later than all before it.

        Args:
            report: validated against the present structure. Places and seeds of a report that was measured on an
                earlier structure are left out: their indices mean other places now.
        """
        self._step = report.step
        if report.HasField("epoch"):
            self._epoch = report.epoch
        self._run.MergeFrom(report.run)
        for signal in report.layers:
            index = self._layer_index.get(signal.layer)
            if index is None:
                continue
            for name in RAW_MEASURES:
                if signal.HasField(name):  # type: ignore[arg-type]
                    self._layers[name][index] = getattr(signal, name)
        if report.structure_version == self.graph.structure_version:
            for place in report.places:
                for name in PLACE_MEASURES:
                    if place.HasField(name):  # type: ignore[arg-type]
                        self._places[name][place.place] = getattr(place, name)
            copied = health_pb2.HealthReport(seeds=report.seeds)
            self._seeds = {seed.seed_id: seed for seed in copied.seeds}
        measures = health_pb2.RunMeasures()
        measures.CopyFrom(self._run)
        present, _ = health.present_health(self._layers)
        self._history.append(_Moment(report.step, measures, present, self._layers["throughput"].copy()))

    def record(self, adaptation: graph_pb2.AdaptationRecord) -> None:
        """Remember an adaptation that was applied."""
        self._adaptations.append(adaptation)
        _, target = self.place_names(adaptation.place)
        self._adaptation_count[target] = self._adaptation_count.get(target, 0) + 1
        self._last_adaptation[target] = adaptation.step

    def record_effect(self, decision_id: str, effect: float) -> None:
        """Remember what an adaptation did; nothing where it is not known (any more)."""
        for adaptation in self._adaptations:
            if adaptation.decision_id == decision_id:
                adaptation.effect = effect

    def state(self, limits: graph_pb2.RunLimits) -> graph_pb2.ModelGraphState:
        """The state now, without a mask.

        Args:
            limits: what the run allows, defaults filled in.
        """
        state = graph_pb2.ModelGraphState(
            run_id=self._run_id,
            step=self._step,
            graph=self.graph,
            layers=layer_columns(self._all_layers()),
            places=place_columns(self._places),
            run=self._run,
            seeds=self._seeds.values(),
            adaptations=self._adaptations,
            limits=limits,
            history=[
                graph_pb2.HistoryPoint(step=moment.step, run=moment.run, health=to_column(moment.health))
                for moment in list(self._history)[:-1]
            ],
        )
        if self._epoch is not None:
            state.epoch = self._epoch
        return state

    def _all_layers(self) -> dict[str, Array]:
        arrays = dict(self._layers)
        names = [layer.name for layer in self.graph.layers]
        if self._history:
            arrays["throughput_trend"] = health.throughput_trend(
                np.stack([moment.throughput for moment in self._history])
            )
            arrays["adaptation_count"] = np.array(
                [self._adaptation_count.get(name, 0) for name in names], dtype=np.float64
            )
        last = [self._last_adaptation.get(name) for name in names]
        arrays["steps_since_adaptation"] = np.array(
            [np.nan if step is None else max(0, self._step - step) for step in last]
        )
        earlier = [moment.health for moment in list(self._history)[:-1]]
        history = np.stack(earlier) if earlier else absent(0).reshape(0, len(names))
        arrays.update(health.derive(arrays, history, self._topology))
        return arrays


def _carry(values: Array, origin: list[int | None]) -> Array:
    """``values`` at the old indices of ``origin``, NaN where there is none."""
    return np.array([np.nan if old is None else values[old] for old in origin], dtype=np.float64)
