"""The true graph of a host, read from one forward pass.

Every layer's output is marked in the autograd graph; from each mark the graph is walked back to the next ones. That
shows the real dataflow, shared inputs and residual joins included, with no demands on how the host is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esperml.kasmina.errors import UnsupportedHostError
from esperml.kasmina.geometry import CONV_RANKS, LINEAR
from esperml.v1 import graph_pb2

NONLINEARITIES: Final = frozenset(
    {
        "Relu",
        "Threshold",
        "LeakyRelu",
        "PreluKernel",
        "RreluWithNoise",
        "Elu",
        "Celu",
        "Gelu",
        "Silu",
        "Mish",
        "Sigmoid",
        "LogSigmoid",
        "Tanh",
        "Softplus",
        "Softshrink",
        "Hardshrink",
        "Hardtanh",
        "Hardsigmoid",
        "Hardswish",
    }
)
"""Element-wise non-linearities, by the name of their node in the autograd graph."""

RECTIFIERS: Final = frozenset({"Relu", "Threshold"})
"""Those that are silent at and below zero."""

_TRANSPARENT: Final = frozenset({"View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "Permute", "T", "Clone"})
"""Nodes that only move entries."""

_SUMS: Final = frozenset({"Add", "Sub"})

_MISFITS: Final = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model raises on an input that is not for it."""


@dataclass(slots=True)
class LayerTrace:
    """What one forward pass showed of one layer.

    Attributes:
        name: as in ``model.named_modules()``.
        calls: times that the layer ran.
        input_shape: of its input, with the batch dimension, at its first call.
        output_shape: of its output, likewise.
        consumers: names of the autograd nodes that read its output, entries being moved aside.
        activated: whether an element-wise non-linearity follows before the next layer; ``None`` where what follows
            cannot be seen.
    """

    name: str
    calls: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    consumers: set[str] = field(default_factory=set)
    activated: bool | None = None

    @property
    def rectified(self) -> bool:
        """True where the output runs into rectifiers and nothing else."""
        return bool(self.consumers) and self.consumers <= RECTIFIERS


@dataclass(frozen=True, slots=True)
class Edge:
    """Dataflow from the layer of index ``source`` to that of index ``target``."""

    source: int
    target: int
    kind: graph_pb2.EdgeKind.ValueType


@dataclass(frozen=True, slots=True)
class Trace:
    """The graph: the layers that ran, in the order in which they first did, and the edges between them."""

    layers: tuple[LayerTrace, ...]
    edges: tuple[Edge, ...]


class _Mark(torch.autograd.Function):
    """Leaves the values alone and puts a node into the autograd graph that says which call of which layer it was."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: int) -> Tensor:
        ctx.kasmina_call = call
        return output.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:  # pragma: no cover - the graph is only read
        return gradients[0], None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore each module's train or eval mode, every buffer and the random number generators afterwards.

    Covers torch on the processor and on the model's accelerators, and Python's ``random``.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    python_state = random.getstate()
    try:
        with _torch_rng(model):
            yield
    finally:
        random.setstate(python_state)
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer.copy_(saved)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _torch_rng(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices, enabled=True):
        yield


def call_model(model: nn.Module, example_input: object) -> object:
    """Run ``model`` on a tensor, on a tuple or list of positional arguments, or on a dict of keyword arguments."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, (tuple, list)):
        return model(*example_input)
    return model(example_input)


def layer_input(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """The tensor that a layer reads: its first argument, or the keyword ``input``."""
    value = args[0] if args else kwargs.get("input")
    return value if isinstance(value, Tensor) else None


def trace(model: nn.Module, example_input: object, layers: Mapping[str, nn.Module]) -> Trace:
    """Run one forward pass and read the graph of ``layers`` from it.

    The host runs in the modes that its modules are in; modes, buffers and random number generators are restored.

    Raises:
        UnsupportedHostError: the host does not take ``example_input``, or none of the layers ran.
    """
    traces = {name: LayerTrace(name) for name in layers}
    calls: list[str] = []
    nodes: list[Any] = []

    def marker(name: str) -> Callable[..., Tensor | None]:
        def mark(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> Tensor | None:
            given = layer_input(args, kwargs)
            if given is None or not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            record = traces[name]
            if record.calls == 0:
                record.input_shape, record.output_shape = tuple(given.shape), tuple(output.shape)
            record.calls += 1
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            marked = cast(Tensor, _Mark.apply(output, len(calls)))  # type: ignore[no-untyped-call]
            calls.append(name)
            nodes.append(marked.grad_fn)
            return marked

        return mark

    handles = [
        module.register_forward_hook(marker(name), with_kwargs=True, prepend=True) for name, module in layers.items()
    ]
    try:
        with undisturbed(model), torch.enable_grad():
            result = call_model(model, example_input)
    except _MISFITS as error:
        raise UnsupportedHostError(
            f"the model does not run on example_input, which is {_describe(example_input)}: {type(error).__name__}: "
            f"{error}. Give it what you call the model with in training: a tensor, a tuple of positional arguments or "
            "a dict of keyword arguments, with a batch dimension, on the model's device and of its dtype"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    ran = list(dict.fromkeys(calls))
    if not ran:
        raise UnsupportedHostError(
            "no Linear or convolution layer that was selected ran on example_input; select others with layers=, or "
            "give an input that reaches them"
        )
    index = {name: i for i, name in enumerate(ran)}
    reached = _walk_all(calls, nodes, result, traces)
    edges = _edges([(index[calls[s]], index[calls[t]], summed) for s, t, summed in reached], len(ran))
    return Trace(tuple(traces[name] for name in ran), edges)


def _describe(example_input: object) -> str:
    """What an example input is, without its values."""
    if isinstance(example_input, Tensor):
        shape = ", ".join(map(str, example_input.shape))
        return f"a tensor of shape ({shape}), {str(example_input.dtype).removeprefix('torch.')}, {example_input.device}"
    if isinstance(example_input, Mapping):
        return "a dict of " + ", ".join(f"{name}: {_describe(value)}" for name, value in example_input.items())
    if isinstance(example_input, (tuple, list)):
        return f"a {type(example_input).__name__} of {', '.join(map(_describe, example_input)) or 'nothing'}"
    return f"of type {type(example_input).__name__}"


def _walk_all(
    calls: Sequence[str], nodes: Sequence[Any], result: object, traces: Mapping[str, LayerTrace]
) -> list[tuple[int, int, bool]]:
    """Walk back from each call's mark and from the host's result; fill in what follows each layer."""
    found: list[tuple[int, int, bool]] = []
    followed: dict[int, set[bool]] = {}
    starts: list[tuple[int | None, Any]] = list(enumerate(nodes))
    starts += [(None, leaf.grad_fn) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.grad_fn]
    for call, start in starts:
        for source, summed, activated, consumer in _walk(start, start_is_mark=call is not None):
            followed.setdefault(source, set()).add(activated)
            traces[calls[source]].consumers.add(consumer or "result")
            if call is not None:
                found.append((source, call, summed))
    for source, seen in followed.items():
        record = traces[calls[source]]
        record.activated = bool(record.activated) or any(seen)
    return found


def _walk(start: Any, *, start_is_mark: bool) -> Iterator[tuple[int, bool, bool, str]]:
    """Yield (call, past a sum, past a non-linearity, first node that reads it) for each mark next behind ``start``."""
    seen: set[tuple[Any, bool, bool, str]] = set()
    stack: list[tuple[Any, bool, bool, str]] = []

    def push(node: Any, summed: bool, activated: bool, reader: str) -> None:
        state = (node, summed, activated, reader)
        if node is not None and state not in seen:
            seen.add(state)
            stack.append(state)

    if start_is_mark:
        for node, _ in start.next_functions:
            push(node, False, False, "")
    else:
        push(start, False, False, "")
    while stack:
        node, summed, activated, reader = stack.pop()
        call = getattr(node, "kasmina_call", None)
        if isinstance(call, int):
            yield call, summed, activated, reader
            continue
        name = node.name().split("Backward")[0].rsplit("::", 1)[-1]
        # A bias or a position's embedding is a parameter, and adding it joins no two paths of data.
        joins = name in _SUMS and sum(_carries_data(following) for following, _ in node.next_functions) > 1
        for following, _ in node.next_functions:
            push(
                following,
                summed or joins,
                activated or name in NONLINEARITIES,
                reader if name in _TRANSPARENT else name,
            )


def _carries_data(node: Any) -> bool:
    return node is not None and not node.name().endswith("AccumulateGrad")


def _edges(reached: Sequence[tuple[int, int, bool]], layers: int) -> tuple[Edge, ...]:
    """Sort edges into forward, residual (past a sum, round another layer) and recurrent (against the order)."""
    summed: dict[tuple[int, int], bool] = {}
    for source, target, past_sum in reached:
        summed[source, target] = summed.get((source, target), False) or past_sum
    ancestors: list[set[int]] = [set() for _ in range(layers)]
    forward = sorted((target, source) for source, target in summed if source < target)
    for target, source in forward:
        ancestors[target] |= ancestors[source] | {source}
    feeding: dict[int, list[int]] = {}
    for target, source in forward:
        feeding.setdefault(target, []).append(source)
    edges = []
    for source, target in sorted(summed, key=lambda pair: (pair[1], pair[0])):
        if source >= target:
            kind = graph_pb2.EDGE_KIND_RECURRENT
        elif summed[source, target] and any(source in ancestors[other] for other in feeding[target]):
            kind = graph_pb2.EDGE_KIND_RESIDUAL
        else:
            kind = graph_pb2.EDGE_KIND_FORWARD
        edges.append(Edge(source, target, kind))
    return tuple(edges)


def without_batch(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` without its first dimension."""
    return tuple(shape[1:])


def is_batched(kind: graph_pb2.LayerType.ValueType, trace_: LayerTrace) -> bool:
    """Whether the layer's input has a batch dimension besides the dimensions that the layer itself asks for."""
    needed = 2 if kind == LINEAR else CONV_RANKS[kind] + 2
    return len(trace_.input_shape) >= needed
