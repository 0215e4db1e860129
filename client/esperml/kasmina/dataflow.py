"""Where data flows in one forward pass.

Every operation that PyTorch carries out is watched, and each tensor remembers from which layers its entries came and
what lay on the way. Unlike a walk through the autograd graph this also sees what runs without gradients: frozen hosts,
``no_grad`` and ``detach`` inside a model, checkpointed parts, and indices. Values, gradients and the autograd graph
are those of a pass that nobody watches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

NONLINEARITIES: Final = frozenset(
    {
        "relu",
        "threshold",
        "leaky_relu",
        "_prelu_kernel",
        "rrelu_with_noise",
        "elu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "log_sigmoid_forward",
        "tanh",
        "softplus",
        "softshrink",
        "hardshrink",
        "hardtanh",
        "hardsigmoid",
        "hardswish",
    }
)
"""Element-wise non-linearities, by the name of their operator."""

RECTIFIERS: Final = frozenset({"relu", "threshold"})
"""Those that are silent at and below zero."""

_TRANSPARENT: Final = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "clone", "alias", "detach"}
)
"""Operators that only move entries."""

_SUMS: Final = frozenset({"add", "sub"})

_OVERWRITING: Final = frozenset({"copy", "fill", "zero"})
"""In-place operators after which nothing is left of what was there."""


class Origin(NamedTuple):
    """One way on which data came into a tensor.

    Attributes:
        source: call of a layer that made it, from 0; for an input of the model its number, from -1 downward.
        summed: whether it has passed a sum of several paths of data.
        activated: whether it has passed an element-wise non-linearity.
        reader: the first operator that read it, entries being moved aside; empty where none has.
    """

    source: int
    summed: bool = False
    activated: bool = False
    reader: str = ""


Origins = frozenset[Origin]

_NOWHERE: Final[Origins] = frozenset()


class Dataflow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches all operations while it is entered; :meth:`origins` tells where a tensor's data came from."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = WeakTensorKeyDictionary()
        # What was written in place reaches every view of the same memory. The weak reference keeps the address taken.
        self._written: dict[int, tuple[StorageWeakRef, Origins]] = {}

    def origins(self, tensor: Tensor) -> Origins:
        """From where the data of ``tensor`` came, back to the last layers or to the model's inputs."""
        made: Origins = self._made.get(tensor, _NOWHERE)  # type: ignore[no-untyped-call]
        if self._written:
            memory = _memory(tensor)
            if memory is not None and memory._cdata in self._written:
                return made | self._written[memory._cdata][1]
        return made

    def mark(self, tensor: Tensor, source: int) -> None:
        """From here on the data of ``tensor`` comes from ``source``; see :class:`Origin`."""
        self._set(tensor, frozenset({Origin(source)}))

    def _set(self, tensor: Tensor, origins: Origins) -> None:
        self._made[tensor] = origins
        memory = _memory(tensor)
        if memory is not None and memory._cdata in self._written:
            self._written[memory._cdata] = (self._written[memory._cdata][0], origins)

    def _write(self, tensor: Tensor, origins: Origins) -> None:
        """An operator has written into the memory of ``tensor``."""
        memory = _memory(tensor)
        if memory is None:
            self._made[tensor] = origins
            return
        self._made[tensor] = origins
        covers = tensor.numel() * tensor.element_size() >= memory.nbytes()
        reference, before = self._written.get(memory._cdata, (None, _NOWHERE))
        if origins or before:
            self._written[memory._cdata] = (
                reference or StorageWeakRef(memory),  # type: ignore[no-untyped-call]
                origins if covers else origins | before,
            )

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out one operator and follow the data through it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        name = str(func) if schema is None else schema.name.split("::")[-1]
        written = _written_arguments(schema, args, kwargs) if schema is not None and schema.is_mutable else []
        name = name.removesuffix("_") if written else name
        unread = {id(tensor) for tensor, is_read in written if not is_read or name in _OVERWRITING}
        read = [
            origins
            for tensor in _tensors((*args, *kwargs.values()))
            if id(tensor) not in unread and (origins := self.origins(tensor))
        ]
        if not read and not written:
            return result
        followed = _through(name, read)
        for tensor, _ in written:
            self._write(tensor, followed)
        if followed:
            already = {id(tensor) for tensor, _ in written}
            for tensor in _tensors((result,)):
                if id(tensor) not in already:
                    self._made[tensor] = followed
        return result


def named_tensors(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, sequences and dataclasses, with its path: ``""`` for a tensor itself."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from named_tensors(item, f"{path}.{number}" if path else str(number))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from named_tensors(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)


def shares_memory(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether ``tensor`` is, or is a view of, one of ``others``."""
    memory = _memory(tensor)
    if memory is None:
        return any(tensor is other for other in others)
    return any(same is not None and same._cdata == memory._cdata for same in map(_memory, others))


def _through(name: str, read: Sequence[Origins]) -> Origins:
    """What an operator passes on of what it read."""
    # A bias or a position's embedding is a parameter, and adding it joins no two paths of data.
    joins = name in _SUMS and sum(any(origin.source >= 0 for origin in origins) for origins in read) > 1
    activates, moves = name in NONLINEARITIES, name in _TRANSPARENT
    return frozenset(
        Origin(
            origin.source,
            origin.summed or joins,
            origin.activated or activates,
            origin.reader or ("" if moves else name),
        )
        for origins in read
        for origin in origins
    )


def _written_arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, bool]]:
    """The tensors that an operator writes into, each with whether it also reads it (``out=`` is only written)."""
    found: list[tuple[Tensor, bool]] = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        found += [(tensor, not argument.is_out) for tensor in _tensors((value,))]
    return found


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor; ``None`` for one that has none of its own, as a sparse one."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
