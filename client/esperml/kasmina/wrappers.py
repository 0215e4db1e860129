"""What PyTorch puts around a host: DistributedDataParallel, DataParallel, and what ``torch.compile`` gives back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel


def seen_through(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` and, from the outside to the inside, each module that it is a mere wrapping of."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        inner = _wrapped_by(inner)


def wrapping_name(model: nn.Module) -> str:
    """What ``model`` is a wrapping by; empty where it is none."""
    return "" if _wrapped_by(model) is None else type(model).__name__


def _wrapped_by(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        inner = model.module
    elif isinstance(model, OptimizedModule):
        inner = model._orig_mod
    else:
        return None
    assert isinstance(inner, nn.Module)  # noqa: S101 - these are their attributes
    return inner
