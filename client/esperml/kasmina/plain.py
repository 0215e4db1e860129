"""Copies of state made of plain values only: what ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, Final

import torch
from torch import Tensor

from esperml.kasmina.errors import CheckpointError

_AS_THEY_ARE: Final = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_SCALARS: Final = (bool, int, float, str)


def plain(value: Any, where: str) -> Any:
    """A copy of ``value`` that shares no memory with it, its tensors on the processor.

    Args:
        value: nested dicts, lists, tuples and sets of tensors, numbers and strings. Scalars of NumPy, which users'
            learning rates often are, become Python's.
        where: what it is, for the error.

    Raises:
        CheckpointError: there is something else in it; the message says where.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in _AS_THEY_ARE:
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Counter):
        return Counter({plain(key, where): count for key, count in value.items()})
    if isinstance(value, dict):
        items = ((plain(key, where), plain(item, f"{where}[{key!r}]")) for key, item in value.items())
        return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)
    if type(value) in {list, tuple, set}:
        return type(value)(plain(item, f"{where}[{at}]") for at, item in enumerate(value))
    for scalar in _SCALARS:
        if isinstance(value, scalar):
            return scalar(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(f"{where} is a {kind}, which torch.load(weights_only=True) does not read")


def size_of(value: Any) -> int:
    """Bytes of the tensors in such a copy."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(size_of(item) for item in value)
    return 0
