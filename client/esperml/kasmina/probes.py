"""The hooks of a sampled step: what they keep of each layer, and nothing else."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esperml.kasmina import sampling
from esperml.kasmina.host import KasminaLayer
from esperml.kasmina.sampling import Rows
from esperml.kasmina.topology import layer_input

_LATENCIES_KEPT: Final = 16


class Probe:
    """Watches one layer through the first training pass of a sampled step.

    Attributes:
        layer: the layer.
        x: its input, (N, ...), not copied.
        output: chosen rows of its output, (n, features), copied before anything can change them in place.
        gradient: fewer rows of the loss's gradient by the output; ``None`` where none came.
        rows: which rows these are.
        output_shape: shape of its output, with the batch dimension.
        output_bytes: size of its output.
        latencies: times of its last forward passes that were sampled, in s.
        seconds: time that the hooks themselves took since :meth:`arm`, in s.
    """

    def __init__(self, layer: KasminaLayer) -> None:
        self.layer = layer
        self.x: Tensor | None = None
        self.output: Tensor | None = None
        self.gradient: Tensor | None = None
        self.rows: Rows | None = None
        self.output_shape: tuple[int, ...] = ()
        self.output_bytes = 0
        self.latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self.seconds = 0.0
        self._started = 0.0
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Watch the next pass. What was kept of the last is let go."""
        self.disarm()
        module = self.layer.module
        self._handles.append(module.register_forward_pre_hook(self._before))
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def disarm(self) -> None:
        """Take the hooks off and let go of what was kept."""
        self.release()
        self.x = self.output = self.gradient = self.rows = None
        self.seconds = 0.0

    def release(self) -> None:
        """Take the hooks off and keep what was measured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, _layer: nn.Module, _args: tuple[Any, ...]) -> None:
        self._started = time.perf_counter()

    def _after(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        ended = time.perf_counter()
        if self.rows is not None or not output.requires_grad:
            return
        x = layer_input(args, kwargs)
        if x is None or output.dim() != len(self.layer.output_shape) + 1 or output.numel() == 0:
            return
        if output.device.type == "cpu":
            self.latencies.append(ended - self._started)
        self.x = x.detach()
        spread = sampling.rows_of(self.layer.type, output, sampling.MAX_ROWS)
        self.output = sampling.pick(self.layer.type, output.detach(), spread)
        self.rows = sampling.rows_of(self.layer.type, output, sampling.MAX_GRAM_ROWS)
        self.output_shape = tuple(output.shape)
        self.output_bytes = output.numel() * output.element_size()
        output.register_hook(self._gradient)  # type: ignore[no-untyped-call]
        self.seconds += time.perf_counter() - ended

    def _gradient(self, gradient: Tensor) -> None:
        start = time.perf_counter()
        if self.rows is not None and self.gradient is None:
            with torch.no_grad():
                self.gradient = sampling.pick(self.layer.type, gradient, self.rows)
        self.seconds += time.perf_counter() - start
