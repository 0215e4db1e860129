"""Hosts that ``torch.compile`` has compiled: what has to happen so that they notice our hooks.

Compiled code has been traced with the hooks that there were, and is not checked for others: a hook that comes later is
passed over in silence, and one that is gone runs on. So a sampled step is run as it was written, uncompiled, with the
hooks of telemetry; and where a seed is grafted on or taken off, all compiled code of the process is dropped, and is
compiled again when it is next called. What moves by itself, such as a seed's alpha, the compiler guards: it compiles
once more for that, and no further.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager
from typing import Final

import torch


class AsWritten:
    """Has compiled code of the process run uncompiled from :meth:`begin` to :meth:`end`.

    The stance that the compiler had is put back with the end of the last one, or when that one is collected.
    """

    def __init__(self) -> None:
        self._leave: weakref.finalize[[], AsWritten] | None = None

    def begin(self) -> None:
        """From now on; nothing happens where it has begun."""
        if self._leave is None:
            _stance.enter()
            self._leave = weakref.finalize(self, _stance.leave)

    def end(self) -> None:
        """No longer; nothing happens where it has not begun."""
        if self._leave is not None:
            self._leave()
            self._leave = None


def hooks_changed() -> None:
    """Hooks that change what a host computes have come or gone: compiled code of the process is out of date."""
    torch.compiler.reset()


class _Stance:
    """The compiler's stance, which is the same for the whole process, and how many want code to run as written."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # One may be collected, and so leave, while another one enters.
        self._wanted_by = 0
        self._forced: AbstractContextManager[None] | None = None

    def enter(self) -> None:
        with self._lock:
            self._wanted_by += 1
            if self._forced is None:
                self._forced = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        with self._lock:
            self._wanted_by -= 1
            if self._wanted_by == 0 and self._forced is not None:
                self._forced.__exit__(None, None, None)
                self._forced = None


_stance: Final = _Stance()
