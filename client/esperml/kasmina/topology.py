"""The true graph of a host, read from one forward pass.

:class:`~esperml.kasmina.dataflow.Dataflow` follows the data of that pass from layer to layer. That shows the real
dataflow, shared inputs and residual joins included, with no demands on how the host is written.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esperml.kasmina.dataflow import RECTIFIERS, Dataflow, named_tensors, shares_memory
from esperml.kasmina.errors import UnsupportedHostError
from esperml.v1 import graph_pb2

_MISFITS: Final = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model raises on an input that is not for it."""


@dataclass(slots=True)
class LayerTrace:
    """What one forward pass showed of one layer.

    Attributes:
        name: as in ``model.named_modules()``.
        calls: times that the layer ran.
        input_shape: of its input, with the batch dimension, at its first call.
        output_shape: of its output, likewise; of the first tensor where it gives several.
        consumers: names of the operators that read its output, entries being moved aside; ``result`` for none.
        activated: whether an element-wise non-linearity follows before the next layer; ``None`` where what follows
            cannot be seen.
        inputs: the model's inputs that it reads, by name or path.
        outputs: the model's outputs that its own output runs into, by path; ``""`` for a model that gives one tensor.
    """

    name: str
    calls: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    consumers: set[str] = field(default_factory=set)
    activated: bool | None = None
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)

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
    """The graph.

    Attributes:
        layers: the layers that ran, in the order in which they first did.
        edges: the dataflow between them.
        unused: names of the layers that did not run.
    """

    layers: tuple[LayerTrace, ...]
    edges: tuple[Edge, ...]
    unused: tuple[str, ...]


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
    """The tensor that a layer reads: its first argument or, where all are given by keyword, the first that is one."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    return next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def layer_output(output: object) -> Tensor | None:
    """The tensor that a layer gives: the first one of floating point where it gives several."""
    return next((tensor for _, tensor in named_tensors(output) if tensor.is_floating_point()), None)


def trace(model: nn.Module, example_input: object, layers: Mapping[str, nn.Module]) -> Trace:
    """Run one forward pass and read the graph of ``layers`` from it.

    The host runs in the modes that its modules are in; modes, buffers and random number generators are restored.

    Raises:
        UnsupportedHostError: the host does not take ``example_input``, or none of the layers ran.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedHostError(f"{lazy[0]} has no shape yet; run the model once, then wrap it")
    tracer = _Tracer(layers)
    handles = [
        module.register_forward_hook(tracer.hook(name), with_kwargs=True, prepend=True)
        for name, module in layers.items()
    ]
    try:
        with undisturbed(model), torch.enable_grad():
            tracer.run(model, example_input)
    except _MISFITS as error:
        raise UnsupportedHostError(
            f"the model does not run on example_input, which is {_describe(example_input)}: {type(error).__name__}: "
            f"{error}. Give it what you call the model with in training: a tensor, a tuple of positional arguments or "
            "a dict of keyword arguments, with a batch dimension, on the model's device and of its dtype"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not tracer.calls:
        raise UnsupportedHostError(
            "no layer that was selected ran on example_input; select others with layers=, or give an input that "
            "reaches them"
        )
    return tracer.trace()


class _Tracer:
    """Follows the data of one forward pass from layer to layer.

    Attributes:
        calls: name of the layer of each call, in order.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.calls: list[str] = []
        self._traces = {name: LayerTrace(name) for name in layers}
        self._flow = Dataflow()
        self._inputs: list[str] = []
        self._reached: list[tuple[int, int, bool]] = []

    def hook(self, name: str) -> Callable[..., object]:
        """What to call after the layer ``name``."""

        def mark(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
            given = layer_input(args, kwargs)
            first = layer_output(output)
            if given is None or first is None:
                return None
            record = self._traces[name]
            if record.calls == 0:
                record.input_shape, record.output_shape = tuple(given.shape), tuple(first.shape)
            record.calls += 1
            call = len(self.calls)
            self.calls.append(name)
            if isinstance(output, Tensor) and shares_memory(output, [given]):
                # What else reads the layer's input must not seem to read its output.
                output = output.clone()
            results = [tensor for _, tensor in named_tensors(output)]
            for tensor in results:
                self._follow(tensor, call)
            for tensor in results:
                self._flow.mark(tensor, call)
            return output

        return mark

    def run(self, model: nn.Module, example_input: object) -> None:
        """Run the model, and see what reaches its outputs."""
        for number, (name, tensor) in enumerate(_named_inputs(model, example_input)):
            self._inputs.append(name)
            self._flow.mark(tensor, -1 - number)
        with self._flow:
            result = call_model(model, example_input)
        for path, tensor in named_tensors(result):
            for source in self._follow(tensor, None):
                self._traces[self.calls[source]].outputs.add(path)

    def _follow(self, tensor: Tensor, call: int | None) -> set[int]:
        """Note what came into ``tensor``, which a layer's call made or, where ``None``, is a result of the model.

        Returns:
            The calls that it came from.
        """
        sources: set[int] = set()
        for origin in self._flow.origins(tensor):
            if origin.source < 0:
                if call is not None:
                    self._traces[self.calls[call]].inputs.add(self._inputs[-1 - origin.source])
                continue
            record = self._traces[self.calls[origin.source]]
            record.activated = bool(record.activated) or origin.activated
            record.consumers.add(origin.reader or "result")
            sources.add(origin.source)
            if call is not None:
                self._reached.append((origin.source, call, origin.summed))
        return sources

    def trace(self) -> Trace:
        """The graph of what ran."""
        ran = list(dict.fromkeys(self.calls))
        index = {name: i for i, name in enumerate(ran)}
        reached = [(index[self.calls[s]], index[self.calls[t]], summed) for s, t, summed in self._reached]
        unused = tuple(name for name, record in self._traces.items() if not record.calls)
        return Trace(tuple(self._traces[name] for name in ran), _edges(reached, len(ran)), unused)


def _named_inputs(model: nn.Module, example_input: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an example input, by the names of the model's arguments."""
    if isinstance(example_input, Mapping):
        yield from named_tensors(example_input)
        return
    positional = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for number, value in enumerate(positional):
        yield from named_tensors(value, names[number] if number < len(names) else str(number))


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
