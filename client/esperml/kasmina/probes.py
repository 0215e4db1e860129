"""The hooks of a sampled step: what they keep of each layer, and nothing else."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esperml.kasmina import sampling
from esperml.kasmina.layers import KasminaLayer
from esperml.kasmina.sampling import Rows
from esperml.kasmina.topology import layer_input, layer_output

_LATENCIES_KEPT: Final = 16


@dataclass(slots=True)
class Kept:
    """What was kept of one layer in one pass.

    Attributes:
        x: its input, (N, ...), not copied.
        output: chosen rows of its output, (n, features), copied before anything can change them in place.
        rows: the fewer rows by which it is related to other layers.
        gradient: these rows of the loss's gradient by the output; ``None`` until the backward pass.
        output_shape: shape of its output, with the batch dimension.
        output_bytes: size of its output.
    """

    x: Tensor
    output: Tensor
    rows: Rows
    gradient: Tensor | None
    output_shape: tuple[int, ...]
    output_bytes: int


class Probe:
    """Watches one layer through the first training pass of a sampled step.

    Attributes:
        layer: the layer.
        kept: what was kept of the pass; ``None`` before it.
        latencies: times of its last forward passes that were sampled, in s.
        seconds: time that the hooks themselves took since :meth:`arm`, in s.
    """

    def __init__(self, layer: KasminaLayer) -> None:
        self.layer = layer
        self.kept: Kept | None = None
        self.latencies: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self.seconds = 0.0
        self._started = 0.0
        self._fully = False
        self._stray = False
        self._handles: list[RemovableHandle] = []

    def arm(self, *, fully: bool) -> None:
        """Watch the next pass.

        Args:
            fully: keep the gradient, and take the time; otherwise only the input and the output.
        """
        self._fully = fully
        module = self.layer.module
        if fully:
            self._handles.append(module.register_forward_pre_hook(self._before))
        self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def disarm(self) -> None:
        """Take the hooks off and let go of what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.kept = None
        self.seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a host that is being watched is watched by nobody: its probes let go when it runs."""
        return {**self.__dict__, "kept": None, "_stray": True}

    def _before(self, _layer: nn.Module, _args: tuple[Any, ...]) -> None:
        self._started = time.perf_counter()

    def _after(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: object) -> None:
        ended = time.perf_counter()
        if self._stray:
            self.disarm()
            return
        # A frozen layer's output may need no gradient in a training pass either.
        if self.kept is not None or not torch.is_grad_enabled():
            return
        x, output = layer_input(args, kwargs), layer_output(given)
        if x is None or output is None or output.dim() != len(self.layer.output_shape) + 1 or output.numel() == 0:
            return
        kind = self.layer.layout
        with torch.no_grad():
            self.kept = Kept(
                x=x.detach(),
                output=sampling.pick(kind, output, sampling.rows_of(kind, output, sampling.MAX_ROWS)),
                rows=sampling.rows_of(kind, output, sampling.MAX_RELATED_ROWS),
                gradient=None,
                output_shape=tuple(output.shape),
                output_bytes=output.numel() * output.element_size(),
            )
        if self._fully:
            if output.requires_grad:
                output.register_hook(self._keep_gradient)  # type: ignore[no-untyped-call]
            if output.device.type == "cpu":
                self.latencies.append(ended - self._started)
        self.seconds += time.perf_counter() - ended

    def _keep_gradient(self, gradient: Tensor) -> None:
        start = time.perf_counter()
        if self.kept is not None and self.kept.gradient is None:
            with torch.no_grad():
                self.kept.gradient = sampling.pick(self.layer.layout, gradient, self.kept.rows)
        self.seconds += time.perf_counter() - start
