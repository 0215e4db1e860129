"""One wrapped layer of a host, as one forward pass showed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from esperml.kasmina.geometry import CONV_RANKS, LINEAR
from esperml.kasmina.kinds import GROWING, LayerKind, batch_axis, layout
from esperml.kasmina.seeds import CONTAINER
from esperml.kasmina.topology import LayerTrace
from esperml.v1 import graph_pb2

_DIMENSIONS: Final[Mapping[LayerKind, int]] = {LINEAR: 2, **{kind: rank + 2 for kind, rank in CONV_RANKS.items()}}
"""Fewest dimensions of the input on a batch, by kind of the layers that can grow."""


@dataclass(slots=True)
class KasminaLayer:
    """One wrapped layer.

    Attributes:
        name: as in ``model.named_modules()``.
        type: what it computes.
        layout: the kind of layer as whose its output is read: LINEAR where features are last, a convolution where
            channels are first.
        module: the layer itself, which is part of the host and is never replaced.
        input_shape: shape of its input without the batch dimension.
        output_shape: shape of its output without the batch dimension.
        activated: whether an element-wise non-linearity follows; ``None`` where that cannot be told.
        rectified: whether its output runs into rectifiers directly.
        calls: times that it runs in one forward pass.
        grows: whether seeds may grow here: it is of a kind that can, was not only to be observed, and runs once per
            forward pass, on a batch.
        batch: entries of its input's batch dimension, for one example input.
        inputs: the model's inputs that it reads, by name.
        outputs: the model's outputs that its own output runs into, by path.
    """

    name: str
    type: LayerKind
    layout: LayerKind
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activated: bool | None
    rectified: bool
    calls: int
    grows: bool
    batch: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, trace: LayerTrace, module: nn.Module, kind: LayerKind, *, may_grow: bool) -> KasminaLayer:
        """The layer ``module`` of which one pass showed ``trace``."""
        read, made = trace.input_shape, trace.output_shape
        return cls(
            name=trace.name,
            type=kind,
            layout=layout(kind, module, len(made)),
            module=module,
            input_shape=_without_batch(read, batch_axis(module, len(read))),
            output_shape=_without_batch(made, batch_axis(module, len(made))),
            activated=trace.activated,
            rectified=trace.rectified,
            calls=trace.calls,
            grows=may_grow and kind in GROWING and trace.calls == 1 and len(read) >= _DIMENSIONS[kind],
            batch=read[batch_axis(module, len(read))] if read else 0,
            inputs=tuple(sorted(trace.inputs)),
            outputs=tuple(sorted(trace.outputs)),
        )

    def parameters(self) -> list[nn.Parameter]:
        """Its own parameters, those of seeds left out; of a layer such as attention also those of its parts."""
        if self.type in GROWING:
            return list(self.module.parameters(recurse=False))
        return [parameter for name, parameter in self.module.named_parameters() if CONTAINER not in name.split(".")]

    @property
    def parameter_count(self) -> int:
        """Number of its own parameters, seeds not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def spec(self) -> graph_pb2.LayerSpec:
        """What the contract says of it."""
        return graph_pb2.LayerSpec(
            name=self.name,
            type=self.type,
            parameters=self.parameter_count,
            input_shape=self.input_shape,
            output_shape=self.output_shape,
            activated=self.activated,
        )


def _without_batch(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(size for number, size in enumerate(shape) if number != axis)
