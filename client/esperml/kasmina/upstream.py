"""The input of a span's source layer, kept from that layer's call to the call of the target in the same invocation.

What belongs together cannot be told from the layers alone: a model may call itself, run several times before it is
differentiated, and compute parts of itself again during the backward pass. So what is kept belongs to one call of the
smallest module that holds both layers, and is handed over at most once. Whatever is in doubt is not handed over, with
the reason: a seed that is left out harms nobody, one that reads what belongs to another call gives wrong gradients.
"""

from __future__ import annotations

import itertools
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

_CHECKPOINT_FILE: Final = checkpoint.__file__

NOT_RUN: Final = "its source layer did not run before its target"
TWICE: Final = "its source layer ran more than once before its target"
CHECKPOINTED: Final = "a checkpointed part of the model begins or ends between its source layer and its target"
CHANGED: Final = "the input of its source layer was changed in place before its target ran"


@dataclass(slots=True)
class _Kept:
    """An input, with what tells whether it may be handed over."""

    x: Tensor
    version: int | None
    region: FrameType | None
    twice: bool


class UpstreamInputs:
    """What one seed keeps, for each thread and each call of the module that holds source and target."""

    def __init__(self) -> None:
        self._open: dict[int, list[_Kept | None]] = {}

    def __getstate__(self) -> dict[str, object]:
        """A copied or saved seed keeps nothing: it is no part of the calls that are under way."""
        return {"_open": {}}

    def enter(self) -> None:
        """A call of the module that holds both layers begins."""
        self._calls().append(None)

    def leave(self) -> None:
        """The innermost such call has ended, by an error perhaps."""
        calls = self._calls()
        if len(calls) > 1:
            calls.pop()
        self._tidy(calls)

    def keep(self, x: Tensor | None) -> None:
        """The source layer runs on ``x``."""
        calls, region = self._calls(), _checkpointed_region()
        before = calls[-1]
        if x is None:
            calls[-1] = None
            return
        # What an earlier region left was never asked for there: the part was computed again no further than needed.
        twice = before is not None and before.region is region
        calls[-1] = _Kept(x, _version(x), region, twice)

    def take(self) -> tuple[Tensor | None, str]:
        """The target layer has run: what its source read in the same invocation, or ``None`` and why not."""
        calls = self._calls()
        kept, calls[-1] = calls[-1], None
        self._tidy(calls)
        region = _checkpointed_region()
        if kept is None:
            return None, NOT_RUN if region is None else CHECKPOINTED
        if kept.twice:
            return None, TWICE
        if kept.region is not region:
            return None, CHECKPOINTED
        if kept.version != _version(kept.x):
            return None, CHANGED
        return kept.x, ""

    def clear(self) -> None:
        """Let go of all that is kept; no call is under way."""
        self._open.clear()

    def _calls(self) -> list[_Kept | None]:
        """What is kept in this thread: outside of any such call first, then from the outermost to the innermost."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        return self._open.setdefault(thread, [None])

    def _tidy(self, calls: list[_Kept | None]) -> None:
        if calls == [None]:
            self._open = {thread: kept for thread, kept in self._open.items() if kept is not calls}


def module_around(model: nn.Module, source: str, target: str) -> nn.Module:
    """The smallest module of ``model`` that holds the layers of these names and can be called."""
    pairs = zip(source.split("."), target.split("."), strict=False)
    shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    paths = [".".join(shared[:end]) for end in range(len(shared), -1, -1)]
    modules = (model.get_submodule(path) for path in paths)
    return next(module for module in modules if not isinstance(module, (nn.ModuleList, nn.ModuleDict)))


def _version(x: Tensor) -> int | None:
    """Counts changes in place; ``None`` where they are not counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _checkpointed_region() -> FrameType | None:
    """The innermost running call of a checkpointed function, at first or as it is computed again; ``None`` in none.

    In either of its modes ``torch.utils.checkpoint`` calls the user's function itself, and the frame from which it does
    tells one such call from any other. A compiler knows checkpoints by itself, and sees no frames.
    """
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT_FILE:
        frame = frame.f_back
    return frame
