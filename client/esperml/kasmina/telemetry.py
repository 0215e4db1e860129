"""Measuring a host on a sampled step: hooks that keep a part of each layer's tensors, and one transfer for all results.

Steps that are not sampled have no hook of telemetry on the host and cost nothing. The measures that need linear algebra
are made for all layers on the first report and for a part of them, in turn, on those that follow; a measure that was
not made for a report is absent from it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Final, cast

import torch
from torch import Tensor

from esperml.kasmina import measures, sampling
from esperml.kasmina.geometry import LINEAR
from esperml.kasmina.host import Host, KasminaLayer, Place
from esperml.kasmina.probes import Probe
from esperml.v1 import health_pb2

TURNS: Final = 4
"""Reports until each layer's linear algebra has had its turn."""

LEAST_PER_REPORT: Final = 2
"""Layers whose turn it is in a report, at least."""


@dataclass(slots=True)
class Sample:
    """What one sampled step showed.

    Attributes:
        layers: measures of each layer that ran.
        places: measures of each place whose layers ran.
        seed_gradient_norms: by name of the seed.
        train_loss: the step's loss; ``None`` where it was not given or is not finite.
        hook_seconds: time that the hooks took during the step, in s.
    """

    layers: list[health_pb2.EnhancedHealthSignal] = field(default_factory=list)
    places: list[health_pb2.PlaceSignal] = field(default_factory=list)
    seed_gradient_norms: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    hook_seconds: float = 0.0


class _Ledger:
    """Results that are still on the device, each with what shall be done with it; read with one transfer."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._receivers: list[Callable[[float], None]] = []

    def add(self, values: Tensor, *receivers: Callable[[float], None]) -> None:
        """One receiver for each entry of ``values``."""
        self._tensors.append(values.detach().reshape(-1))
        self._receivers.extend(receivers)

    def settle(self) -> None:
        """Hand each finite value to its receiver. What is not finite was not measured."""
        if not self._tensors:
            return
        device = self._tensors[0].device
        values = torch.cat([tensor.to(device=device, dtype=torch.float32) for tensor in self._tensors]).tolist()
        for receive, value in zip(self._receivers, values, strict=True):
            if math.isfinite(value):
                receive(value)


class Telemetry:
    """Measures one host. :meth:`arm` before the forward pass of a step, :meth:`collect` after its backward pass."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._probes = [Probe(layer) for layer in host.layers]
        self._flops = [_flops(layer) for layer in host.layers]
        self._turn: int | None = None

    def arm(self) -> None:
        """Watch the next training pass."""
        for probe in self._probes:
            probe.arm()

    def disarm(self) -> None:
        """Take all hooks off and let go of what they kept."""
        for probe in self._probes:
            probe.disarm()

    def collect(self, loss: Tensor | float | None) -> Sample:
        """Measure what the hooks kept, and take them off.

        Args:
            loss: the step's training loss.
        """
        sample = Sample(hook_seconds=sum(probe.seconds for probe in self._probes))
        ledger = _Ledger()
        with torch.no_grad():
            for index, probe in enumerate(self._probes):
                probe.release()
                if probe.output is not None:
                    sample.layers.append(self._layer(index, probe, probe.output, ledger))
            self._relations(sample, ledger)
            self._seeds(sample, ledger)
            if isinstance(loss, Tensor):
                ledger.add(loss.detach().mean(), lambda value: setattr(sample, "train_loss", value))
            elif loss is not None and math.isfinite(loss):
                sample.train_loss = float(loss)
            ledger.settle()
        self.disarm()
        return sample

    def _layer(self, index: int, probe: Probe, output: Tensor, ledger: _Ledger) -> health_pb2.EnhancedHealthSignal:
        """Measures that each layer's own tensors give."""
        layer = probe.layer
        parameters = list(layer.module.parameters(recurse=False))
        signal = health_pb2.EnhancedHealthSignal(
            layer=layer.name, parameters=layer.parameter_count, flops=self._flops[index]
        )
        signal.memory_bytes = probe.output_bytes + sum(
            p.numel() * p.element_size() * (1 if p.grad is None else 2) for p in parameters
        )
        if probe.latencies:
            signal.latency_mean = fmean(probe.latencies)
            if len(probe.latencies) > 1:
                signal.latency_variance = variance(probe.latencies)
            signal.throughput = probe.output_shape[0] / signal.latency_mean
        output = output.float()
        spread, mean = torch.var_mean(output, correction=0)
        ledger.add(mean, _set(signal, "activation_mean"))
        ledger.add(spread, _set(signal, "activation_variance"))
        if layer.rectified:
            ledger.add(measures.dead_fraction(output), _set(signal, "dead_fraction"))
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if gradients:
            statistics = measures.gradient_statistics(torch.cat(gradients).float())
            ledger.add(
                statistics,
                _set(signal, "gradient_norm"),
                _set(signal, "vanishing_fraction"),
                _set(signal, "exploding_fraction"),
            )
            weights = torch.cat([p.flatten() for p in parameters]).float()
            ledger.add(statistics[0] / torch.linalg.vector_norm(weights), _set(signal, "gradient_to_weight"))
        return signal

    def _relations(self, sample: Sample, ledger: _Ledger) -> None:
        """Measures that relate inputs, outputs and gradients, for the layers whose turn it is."""
        signals = {signal.layer: signal for signal in sample.layers}
        turn = self._whose_turn()
        work = _GramWork(ledger)
        for index in turn:
            probe = self._probes[index]
            if probe.output is None or probe.x is None or probe.rows is None:
                continue
            signal = signals[probe.layer.name]
            neighbours = sampling.signals(probe.layer.type, probe.x).float()
            ledger.add(measures.autocorrelation(neighbours), _set(signal, "input_autocorrelation"))
            units = probe.output.shape[1]
            thinned = probe.output[:: max(len(probe.output) // sampling.MAX_GRAM_ROWS, 1)][: sampling.MAX_GRAM_ROWS]
            work.rank(measures.gram(thinned.float()), units, _set(signal, "effective_rank"))
            if probe.gradient is not None:
                self._asked_step(index, probe, probe.gradient.float(), signal, sample, work)
        work.settle()

    def _asked_step(
        self,
        index: int,
        probe: Probe,
        gradient: Tensor,
        signal: health_pb2.EnhancedHealthSignal,
        sample: Sample,
        work: _GramWork,
    ) -> None:
        """What the loss asks of a layer's output: what the layer itself can express of it, and what a graft could."""
        assert probe.x is not None  # noqa: S101 - kept together with the rows
        assert probe.rows is not None  # noqa: S101
        module = probe.layer.module
        asked = measures.gram(gradient)
        own_rows = sampling.pick_input(module, probe.x, probe.output_shape, probe.rows)
        own = None
        if own_rows is not None:
            own = measures.input_gram(own_rows.float(), bias=module.bias is not None)
            work.unexplained(own, asked, _set(signal, "expressivity_bottleneck"))
        for number, place in enumerate(self._host.places):
            if place.target != index:
                continue
            rows = self._graft_rows(place, probe)
            if rows is None:
                continue
            rows = rows.float()
            place_signal = health_pb2.PlaceSignal(place=number)
            sample.places.append(place_signal)
            entries = place.geometry.in_features * place.geometry.out_features
            work.growth(measures.gram(rows), asked, entries, _set_scaled(place_signal, probe.rows.scale))
            if place.span == 2 and own is not None:
                joint = own + measures.input_gram(rows, bias=False)
                work.beyond(own, joint, asked, _set(place_signal, "explained_error"))

    def _graft_rows(self, place: Place, target: Probe) -> Tensor | None:
        source = self._probes[place.source]
        if source.x is None or target.rows is None or source.x.shape[0] != target.output_shape[0]:
            return None
        return sampling.pick_for_graft(place.geometry, source.x, target.output_shape, target.rows)

    def _whose_turn(self) -> Sequence[int]:
        count = len(self._probes)
        if self._turn is None:
            self._turn = 0
            return range(count)
        size = min(count, max(LEAST_PER_REPORT, math.ceil(count / TURNS)))
        turn = [(self._turn + i) % count for i in range(size)]
        self._turn = (self._turn + size) % count
        return turn

    def _seeds(self, sample: Sample, ledger: _Ledger) -> None:
        for name, seed in self._host.seeds.items():
            gradients = [p.grad.flatten() for p in seed.body.parameters() if p.grad is not None]
            if gradients:
                norm = torch.linalg.vector_norm(torch.cat(gradients).float())
                ledger.add(norm, _store(sample.seed_gradient_norms, name))


class _GramWork:
    """Gram matrices that wait to be measured together: one call for all of a size."""

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger
        self._ranks: dict[int, list[tuple[Tensor, int, Callable[[float], None]]]] = defaultdict(list)
        self._fits: dict[int, list[tuple[Tensor, Tensor, Callable[[float], None]]]] = defaultdict(list)
        self._growths: dict[int, list[tuple[Tensor, Tensor, int, Callable[[float], None]]]] = defaultdict(list)

    def rank(self, output: Tensor, units: int, receive: Callable[[float], None]) -> None:
        """Effective rank as a share of ``units``."""
        if output.shape[-1] > 1:
            self._ranks[output.shape[-1]].append((output, units, receive))

    def unexplained(self, read: Tensor, asked: Tensor, receive: Callable[[float], None]) -> None:
        """Share of ``asked`` that is no linear function of ``read``."""
        if read.shape[-1] > 1:
            self._fits[read.shape[-1]].append((read, asked, receive))

    def beyond(self, own: Tensor, joint: Tensor, asked: Tensor, receive: Callable[[float], None]) -> None:
        """Share of ``asked`` that ``joint`` explains and ``own`` does not."""
        shares: list[float] = []

        def take(value: float) -> None:
            shares.append(value)
            if len(shares) == 2:
                # Rounding can leave a trace of the wrong sign where the joint fit is no better.
                receive(max(shares[0] - shares[1], 0.0))

        self.unexplained(own, asked, take)
        self.unexplained(joint, asked, take)

    def growth(self, read: Tensor, asked: Tensor, entries: int, receive: Callable[[float], None]) -> None:
        """Root mean square of the gradient of a linear graft."""
        self._growths[read.shape[-1]].append((read, asked, entries, receive))

    def settle(self) -> None:
        """Put every result into the ledger."""
        for ranks in self._ranks.values():
            grams, units, receivers = zip(*ranks, strict=True)
            values = measures.effective_rank(torch.stack(grams))
            self._ledger.add(values / values.new_tensor(units), *receivers)
        for fits in self._fits.values():
            read, asked, receivers = zip(*fits, strict=True)
            self._ledger.add(measures.unexplained(torch.stack(read), torch.stack(asked)), *receivers)
        for growths in self._growths.values():
            read, asked, entries, receivers = zip(*growths, strict=True)
            sizes = read[0].new_tensor(entries)
            self._ledger.add(measures.growth_gradient(torch.stack(read), torch.stack(asked), sizes), *receivers)


def _set(signal: health_pb2.EnhancedHealthSignal | health_pb2.PlaceSignal, name: str) -> Callable[[float], None]:
    return lambda value: setattr(signal, name, value)


def _set_scaled(signal: health_pb2.PlaceSignal, scale: float) -> Callable[[float], None]:
    return lambda value: setattr(signal, "growth_gradient", value * scale)


def _store(norms: dict[str, float], name: str) -> Callable[[float], None]:
    return lambda value: norms.__setitem__(name, value)


def _flops(layer: KasminaLayer) -> float:
    """Of one forward pass for one sample, multiply and add counted as two."""
    weight = cast(Tensor, layer.module.weight)
    positions = layer.output_shape[:-1] if layer.type == LINEAR else layer.output_shape[1:]
    return 2.0 * weight.numel() * math.prod(positions)
