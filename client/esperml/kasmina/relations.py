"""The measures that relate what a layer reads to what the loss asks of it, for layers and for places."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from esperml.kasmina import measures, sampling
from esperml.kasmina.host import Host, Place
from esperml.kasmina.ledger import Ledger
from esperml.kasmina.probes import Kept, Probe
from esperml.v1 import health_pb2


class Relations:
    """Measures layers and the places that end at them.

    Args:
        host: the wrapped model's host.
        probes: one for each of its layers.
    """

    def __init__(self, host: Host, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._places: dict[int, list[tuple[int, Place]]] = defaultdict(list)
        for number, place in enumerate(host.places):
            self._places[place.target].append((number, place))

    def sources(self, targets: Iterable[int]) -> set[int]:
        """Layers whose input is needed to measure ``targets``."""
        return {place.source for target in targets for _, place in self._places[target]}.union(targets)

    def measure(
        self, target: int, kept: Kept, signal: health_pb2.EnhancedHealthSignal, ledger: Ledger
    ) -> list[health_pb2.PlaceSignal]:
        """Put the measures of layer ``target`` and of its places into the ledger; returns the places' signals."""
        found: list[health_pb2.PlaceSignal] = []
        if kept.gradient is None or len(kept.gradient) < 2:
            return found
        module = self._probes[target].layer.module
        gradient = kept.gradient.float()
        own = sampling.pick_input(module, kept.x, kept.output_shape, kept.rows)
        own_rows = None if own is None else own.float()
        fit = None
        if own_rows is not None:
            fit = _Fit(measures.normalised_gram(own_rows), gradient, signal, module.bias is not None, ledger)
        for number, place in self._places[target]:
            rows = self._graft_rows(place, kept, own_rows)
            if rows is None:
                continue
            place_signal = health_pb2.PlaceSignal(place=number)
            found.append(place_signal)
            entries = place.geometry.in_features * place.geometry.out_features
            ledger.add_norms([gradient.mT @ rows], _growth_receiver(place_signal, kept.rows.scale / math.sqrt(entries)))
            if place.span == 2 and fit is not None:
                fit.add(rows, place_signal)
        return found

    def _graft_rows(self, place: Place, kept: Kept, own: Tensor | None) -> Tensor | None:
        """What a linear graft at ``place`` would read for the target's rows."""
        if place.span == 1 and not place.geometry.spatial:
            return own
        source = self._probes[place.source].kept
        if source is None or source.x.shape[0] != kept.output_shape[0]:
            return None
        return sampling.pick_for_graft(place.geometry, source.x, kept.output_shape, kept.rows).float()


class _Fit:
    """The least squares of one layer: by its own input, and by that and what a place reads."""

    def __init__(
        self,
        own: Tensor,
        gradient: Tensor,
        signal: health_pb2.EnhancedHealthSignal,
        bias: bool,
        ledger: Ledger,
    ) -> None:
        self._own = own
        self._gradient = gradient
        self._bias = bias
        self._ledger = ledger
        self._signal = signal
        self._gradient_norm = 0.0
        self._share: float | None = None
        ledger.add_norms([gradient, measures.whitened(own, gradient, bias=bias)], self._receive)

    def add(self, rows: Tensor, signal: health_pb2.PlaceSignal) -> None:
        """Measure how much more is explained with ``rows``, (n, F)."""
        joint = measures.whitened(self._own + measures.normalised_gram(rows), self._gradient, bias=self._bias)

        def receive(norms: list[float]) -> None:
            share = measures.unexplained(norms[0], self._gradient_norm)
            if share is not None and self._share is not None:
                # Rounding can leave a trace of the wrong sign where the joint fit is no better.
                signal.explained_error = max(self._share - share, 0.0)

        self._ledger.add_norms([joint], receive)

    def _receive(self, norms: list[float]) -> None:
        self._gradient_norm, whitened_norm = norms
        self._share = measures.unexplained(whitened_norm, self._gradient_norm)
        if self._share is not None:
            self._signal.expressivity_bottleneck = self._share


def _growth_receiver(signal: health_pb2.PlaceSignal, factor: float) -> Callable[[list[float]], None]:
    def receive(norms: list[float]) -> None:
        growth = norms[0] * factor
        if measures.representable(growth):
            signal.growth_gradient = growth

    return receive
