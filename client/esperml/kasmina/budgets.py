"""Budgets of memory, operations and time: what a run allows all its seeds to cost together."""

from __future__ import annotations

import copy
import time
from collections import deque
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from esperml.kasmina.clock import StepClock
from esperml.kasmina.errors import FAILURES, RefusedError
from esperml.kasmina.geometry import Geometry
from esperml.kasmina.governor import Change, Intervention
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.seeds import Seed
from esperml.v1 import graph_pb2

_BEFORE: Final = 8
"""Intervals between reports, before anything grew, whose median is a step's own time."""

_NEEDED: Final = 3
"""Intervals after a change before time is judged, by their median: one that another program slowed does not decide."""

_STATES_UNKNOWN: Final = 2
"""Tensors that an optimizer is taken to keep for each parameter before its first step, as Adam does."""


class Budgets:
    """Holds the seeds of one run to its limits. Limits that the run does not state do not bind.

    Args:
        grafter: culls what goes beyond a limit.
        optimizer: whose state counts as memory.
        limits: what the run allows.
        clock: which time is whose.
    """

    def __init__(self, grafter: Grafter, optimizer: Optimizer, limits: graph_pb2.RunLimits, clock: StepClock) -> None:
        self._grafter = grafter
        self._host = grafter.host
        self._optimizer = optimizer
        self._limits = limits
        self._clock = clock
        self._before: deque[float] = deque(maxlen=_BEFORE)
        self._since: deque[float] = deque(maxlen=_NEEDED)
        self._mark = (time.perf_counter(), 0.0, 0.0, 0)
        self._structure = self._host.structure_version
        self._flops: dict[str, int] = {}  # By seed.

    def room(self, target: nn.Module) -> int | None:
        """Most parameters that the memory which is left allows a seed at ``target``; ``None``: no limit is stated."""
        if not self._limits.HasField("memory_budget_bytes"):
            return None
        left = self._limits.memory_budget_bytes - sum(self.memory(seed) for seed in self._host.seeds.values())
        size = next(target.parameters()).element_size()
        return max(0, left // (size * (2 + self._states())))

    def accept(self, seed: Seed) -> None:
        """Raise :class:`RefusedError` where ``seed``, which was just planted, is beyond a limit whatever it stated."""
        found = self._beyond(seed) or self._flops_beyond(seed)
        if found:
            raise RefusedError(f"over budget: {found}")

    def check(self, step: int) -> Intervention | None:
        """Cull the youngest seed where all together cost more than is allowed. Call it at reports.

        Args:
            step: optimizer steps so far.
        """
        self._measure(step)
        live = [seed for seed in self._host.seeds.values() if seed.live]
        if not live:
            return None
        youngest = min(live, key=lambda seed: seed.age)
        reason = self._beyond(youngest) or self._too_slow()
        if not reason:
            return None
        change = Change(step, youngest.decision_id, youngest.seed_id, "germinate", youngest.parameter_count)
        self._grafter.cull(youngest.seed_id)
        return Intervention(f"culled {youngest.seed_id}: {reason}", (change,), restructured=True)

    def memory(self, seed: Seed) -> int:
        """Bytes of a seed's parameters, buffers, gradients and what the optimizer keeps for them; not activations."""
        states = self._states()
        return sum(_bytes(p) * (2 + states if p.requires_grad else 1) for p in seed.body.parameters()) + sum(
            map(_bytes, seed.body.buffers())
        )

    def _beyond(self, seed: Seed) -> str:
        """Which limit the seeds are beyond now, as they are and not as they were stated; empty where none."""
        limits, host = self._limits, self._host
        if limits.HasField("graft_parameter_budget") and seed.parameter_count > limits.graft_parameter_budget:
            return f"it has {seed.parameter_count} parameters, {limits.graft_parameter_budget} are allowed"
        if limits.HasField("parameter_budget") and host.seed_parameters > limits.parameter_budget:
            return f"the seeds have {host.seed_parameters} parameters, {limits.parameter_budget} are allowed"
        if limits.HasField("memory_budget_bytes"):
            taken = sum(self.memory(other) for other in host.seeds.values())
            if taken > limits.memory_budget_bytes:
                return f"the seeds take {taken} bytes, {limits.memory_budget_bytes} are allowed"
        return ""

    def _flops_beyond(self, seed: Seed) -> str:
        """Whether ``seed`` takes the operations of all beyond the limit; counted on its body, not as stated."""
        if not self._limits.HasField("flop_budget"):
            return ""
        # The bodies of seeds do not change, and to count them takes a pass.
        known = {name: self._flops.get(name) for name in self._host.seeds}
        self._flops = {
            name: count_flops(self._host.seeds[name].body, self._host.places[self._host.seeds[name].place].geometry)
            if flops is None
            else flops
            for name, flops in known.items()
        }
        total = sum(self._flops.values())
        if total <= self._limits.flop_budget:
            return ""
        return (
            f"the seeds take {total} floating-point operations an example with the {self._flops[seed.seed_id]} of "
            f"this one, {self._limits.flop_budget} are allowed"
        )

    def _too_slow(self) -> str:
        if not self._limits.HasField("step_time_ratio") or not self._before or len(self._since) < _NEEDED:
            return ""
        before, now = median(self._before), median(self._since)
        if now <= before * self._limits.step_time_ratio:
            return ""
        self._since.clear()
        return (
            f"a step takes {now * 1e3:.3g} ms, and took {before * 1e3:.3g} ms before anything grew: "
            f"{now / before:.3g} times as long, {self._limits.step_time_ratio:.3g} are allowed"
        )

    def _measure(self, step: int) -> None:
        """Time of a step since the last report, Esper's own and what is nobody's left out."""
        now = (time.perf_counter(), self._clock.total_own, self._clock.total_left_out, step)
        passed, own, left_out, steps = (a - b for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        # An interval in which something changed is neither here nor there.
        changed, self._structure = self._structure != self._host.structure_version, self._host.structure_version
        if changed:
            self._since.clear()
        elif steps > 0:
            (self._since if self._host.seeds else self._before).append((passed - own - left_out) / steps)

    def _states(self) -> int:
        """Tensors of a parameter's size that the optimizer keeps for it, as seen at any of them."""
        for parameter, state in self._optimizer.state.items():
            if isinstance(parameter, Tensor) and state:
                kept = sum(_bytes(value) for value in state.values() if isinstance(value, Tensor))
                return round(kept / max(_bytes(parameter), 1))
        return _STATES_UNKNOWN


def count_flops(body: nn.Module, geometry: Geometry) -> int:
    """Floating-point operations of one forward pass for one example, on a copy that holds no memory.

    Raises:
        RefusedError: the pass fails there, so that they cannot be counted.
    """
    shadow = copy.deepcopy(body).to("meta").eval()
    x = torch.empty(1, *geometry.input_shape, device="meta")
    output = torch.empty(1, *geometry.output_shape, device="meta")
    dtype = next((parameter.dtype for parameter in body.parameters()), x.dtype)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow(x.to(dtype), output.to(dtype))
    except FAILURES as error:
        raise RefusedError(f"its operations cannot be counted: {type(error).__name__}: {error}") from error
    return int(counter.get_total_flops())


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
