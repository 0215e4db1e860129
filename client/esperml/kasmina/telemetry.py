"""Measuring a host on a sampled step: hooks that keep a part of a layer's tensors, and one transfer for all results.

Steps that are not sampled have no hook of telemetry on the host and cost nothing. A sampled step costs some fifty small
tensor operations a layer, so that each report measures only a part of the layers, in turn; the first measures all. A
layer whose turn it is not is left out of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import torch
from torch import Tensor

from esperml.kasmina import measures, sampling
from esperml.kasmina.compiling import AsWritten
from esperml.kasmina.geometry import LINEAR
from esperml.kasmina.host import Host
from esperml.kasmina.kinds import GROWING
from esperml.kasmina.layers import KasminaLayer
from esperml.kasmina.ledger import Ledger
from esperml.kasmina.probes import Kept, Probe
from esperml.kasmina.relations import Relations
from esperml.v1 import health_pb2

TURNS: Final = 4
"""Reports until each layer's turn has come again. Small hosts have reports in which no layer is measured."""

MAX_ENTRIES: Final = 8192
"""Most entries of a parameter's gradient, evenly spread, that are compared with what vanishes and explodes."""


@dataclass(slots=True)
class Sample:
    """What one sampled step showed.

    Attributes:
        layers: measures of each layer whose turn it was and that ran.
        places: measures of the places that end at these layers.
        seed_gradient_norms: by name of the seed.
        train_loss: the step's loss; ``None`` where it was not given or is not finite.
        hook_seconds: time that the hooks took during the step, in s.
    """

    layers: list[health_pb2.EnhancedHealthSignal] = field(default_factory=list)
    places: list[health_pb2.PlaceSignal] = field(default_factory=list)
    seed_gradient_norms: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    hook_seconds: float = 0.0


class Telemetry:
    """Measures one host. :meth:`arm` before the forward pass of a step, :meth:`collect` after its backward pass."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._probes = [Probe(layer) for layer in host.layers]
        self._parameters = [float(layer.parameter_count) for layer in host.layers]
        self._flops = [_flops(layer) for layer in host.layers]
        self._relations = Relations(host, self._probes)
        self._as_written = AsWritten()
        self._turn: Sequence[int] = ()
        self._next = 0  # The first layer whose turn has not come.
        self._turns: int | None = None  # Begun since all layers had theirs at once; None before.

    @property
    def due(self) -> int:
        """Number of layers whose turn it is next: all at first, then a part that comes once in :data:`TURNS`."""
        count, turn = len(self._probes), self._turns
        return count if turn is None else (turn + 1) * count // TURNS - turn * count // TURNS

    def arm(self, layers: int | None = None) -> None:
        """Watch the next training pass.

        Args:
            layers: how many of those that are due to measure at most; the others come first next time. ``None``: all.
        """
        turn = self._take_turn(self.due if layers is None else min(layers, self.due))
        self._turn = tuple(turn)
        for index in self._relations.sources(turn):
            self._probes[index].arm(fully=index in turn)
        if turn:
            self._as_written.begin()

    def disarm(self) -> None:
        """Take all hooks off and let go of what they kept."""
        self._as_written.end()
        for probe in self._probes:
            probe.disarm()

    def collect(self, loss: Tensor | float | None) -> Sample:
        """Measure what the hooks kept, and take them off.

        Args:
            loss: the step's training loss.
        """
        sample = Sample(hook_seconds=sum(probe.seconds for probe in self._probes))
        ledger = Ledger()
        with torch.no_grad():
            for index in self._turn:
                kept = self._probes[index].kept
                if kept is not None:
                    signal = self._layer(index, kept, ledger)
                    sample.layers.append(signal)
                    sample.places += self._relations.measure(index, kept, signal, ledger)
            for name, seed in self._host.seeds.items():
                gradients = _gradients(seed.body.parameters())
                if gradients:
                    ledger.add_norms(gradients, _seed_receiver(sample.seed_gradient_norms, name))
            if isinstance(loss, Tensor):
                ledger.add(loss.detach().float().mean(), _loss_receiver(sample))
            elif loss is not None and measures.representable(loss):
                sample.train_loss = float(loss)
            self.disarm()
            ledger.settle()
        return sample

    def _take_turn(self, layers: int) -> dict[int, None]:
        """Indices of the next ``layers`` layers, in order."""
        first, count = self._next, len(self._probes)
        self._next = (first + layers) % count
        self._turns = 0 if self._turns is None else (self._turns + 1) % TURNS
        return dict.fromkeys((first + i) % count for i in range(layers))

    def _layer(self, index: int, kept: Kept, ledger: Ledger) -> health_pb2.EnhancedHealthSignal:
        """The measures of one layer but for those that relate it to others."""
        probe = self._probes[index]
        parameters = probe.layer.parameters()
        gradients = _gradients(parameters)
        signal = health_pb2.EnhancedHealthSignal(
            layer=probe.layer.name,
            parameters=self._parameters[index],
            flops=self._flops[index],
            memory_bytes=kept.output_bytes + sum(p.numel() * p.element_size() for p in (*parameters, *gradients)),
        )
        _add_latency(signal, probe.latencies, samples=kept.output_shape[0])
        if kept.x.is_floating_point():
            signals = sampling.signals(probe.layer.layout, kept.x)
            ledger.add(measures.autocorrelation(signals.float()), _correlation_receiver(signal))
        _add_output(signal, kept.output.float(), kept.rows.count, probe.layer.rectified, ledger)
        if gradients:
            ledger.add_norms([*gradients, *parameters], _norm_receiver(signal, len(gradients)))
            entries = torch.cat([_spread(gradient) for gradient in gradients])
            ledger.add(measures.extreme_entries(entries), _extremes_receiver(signal, entries.shape[0]))
        return signal


def _add_latency(signal: health_pb2.EnhancedHealthSignal, latencies: Sequence[float], *, samples: int) -> None:
    count = len(latencies)
    mean = sum(latencies) / count if count else 0.0
    if mean > 0:
        signal.latency_mean = mean
        signal.throughput = samples / mean
        if count > 1:
            signal.latency_variance = sum((seconds - mean) ** 2 for seconds in latencies) / (count - 1)


def _add_output(
    signal: health_pb2.EnhancedHealthSignal, output: Tensor, rank_rows: int, rectified: bool, ledger: Ledger
) -> None:
    """Statistics of a layer's output, (n, G); its rank by ``rank_rows`` of the rows."""
    mean = output.mean()
    entries, units = output.numel(), output.shape[1]

    def receive_mean(values: list[float]) -> None:
        if math.isfinite(values[0]):
            signal.activation_mean = values[0]

    def receive_spread(norms: list[float]) -> None:
        variance = norms[0] ** 2 / entries
        if measures.representable(variance):
            signal.activation_variance = variance

    def receive_rank(values: list[float]) -> None:
        rank = measures.effective_rank(values)
        if rank is not None:
            signal.effective_rank = min(rank / units, 1.0)

    ledger.add(mean, receive_mean)
    ledger.add_norms([output - mean], receive_spread)
    thinned = output[:: max(len(output) // rank_rows, 1)][:rank_rows]
    ledger.add(measures.squared_singular_values(thinned), receive_rank)
    if rectified:
        ledger.add(measures.silent_units(output), lambda values: setattr(signal, "dead_fraction", values[0] / units))


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]


def _spread(gradient: Tensor) -> Tensor:
    flat = gradient.flatten()
    return flat if flat.numel() <= MAX_ENTRIES else flat[:: math.ceil(flat.numel() / MAX_ENTRIES)]


def _norm_receiver(signal: health_pb2.EnhancedHealthSignal, gradients: int) -> Callable[[list[float]], None]:
    def receive(norms: list[float]) -> None:
        gradient, weight = math.hypot(*norms[:gradients]), math.hypot(*norms[gradients:])
        if measures.representable(gradient):
            signal.gradient_norm = gradient
            if math.isfinite(weight) and weight > 0 and measures.representable(gradient / weight):
                signal.gradient_to_weight = gradient / weight

    return receive


def _extremes_receiver(signal: health_pb2.EnhancedHealthSignal, entries: int) -> Callable[[list[float]], None]:
    def receive(counts: list[float]) -> None:
        signal.vanishing_fraction = counts[0] / entries
        signal.exploding_fraction = 1 - counts[1] / entries

    return receive


def _correlation_receiver(signal: health_pb2.EnhancedHealthSignal) -> Callable[[list[float]], None]:
    def receive(values: list[float]) -> None:
        total, pairs = values
        if pairs > 0 and math.isfinite(total):
            signal.input_autocorrelation = min(max(total / pairs, -1.0), 1.0)

    return receive


def _seed_receiver(norms: dict[str, float], name: str) -> Callable[[list[float]], None]:
    def receive(values: list[float]) -> None:
        norm = math.hypot(*values)
        if measures.representable(norm):
            norms[name] = norm

    return receive


def _loss_receiver(sample: Sample) -> Callable[[list[float]], None]:
    def receive(values: list[float]) -> None:
        if math.isfinite(values[0]):
            sample.train_loss = values[0]

    return receive


def _flops(layer: KasminaLayer) -> float | None:
    """Of one forward pass for one sample, multiply and add counted as two; of Linear and convolution layers only."""
    if layer.type not in GROWING:
        return None
    weight = cast(Tensor, layer.module.weight)
    positions = layer.output_shape[:-1] if layer.type == LINEAR else layer.output_shape[1:]
    return 2.0 * weight.numel() * math.prod(positions)
