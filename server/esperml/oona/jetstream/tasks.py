"""Tasks of a gateway that must not end unnoticed: what they did not foresee is logged, seen in health, and got over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = structlog.get_logger(__name__)

# Time after which a task that failed begins anew, in s. What waits for it has its own deadline, and comes again.
_RESTART_S: Final = 1.0
# Time for which what went wrong counts as trouble that lasts, in s.
_TROUBLE_S: Final = 10.0


class Tasks:
    """The tasks that go on for as long as an engine is open."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._noted: dict[str, tuple[float, str]] = {}

    @property
    def problem(self) -> str:
        """What went wrong just now, in words; empty where nothing did."""
        since_s = asyncio.get_running_loop().time() - _TROUBLE_S
        return "; ".join(problem for noted_s, problem in self._noted.values() if noted_s > since_s)

    def keep(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Have ``work`` done until :meth:`close`: where it fails, that is logged, and it begins anew.

        Args:
            name: by which the log and health name it.
            work: what never ends of itself.
        """
        self._tasks.append(asyncio.create_task(self._keep(name, work), name=f"{name}-keeper"))

    def note(self, name: str, problem: str) -> None:
        """Have a problem that a task met seen in health. It is logged unless it was just now."""
        now_s = asyncio.get_running_loop().time()
        noted_s, before = self._noted.get(name, (-_TROUBLE_S, ""))
        if problem != before or noted_s <= now_s - _TROUBLE_S:
            _log.error("cluster_trouble", task=name, problem=problem)
        self._noted[name] = now_s, problem

    async def close(self) -> None:
        """End them all."""
        await _end(self._tasks)

    async def _keep(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        while True:
            task = asyncio.create_task(work(), name=name)
            try:
                await asyncio.wait([task])
            finally:
                await _end([task])
            error = None if task.cancelled() else task.exception()
            self._noted[name] = asyncio.get_running_loop().time(), f"{name} failed: {error!r}"
            _log.error("task_failed", task=name, exc_info=error, consequence=f"it begins anew in {_RESTART_S:g} s")
            await asyncio.sleep(_RESTART_S)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def say_if_failed(task: asyncio.Task[None]) -> None:
    """Log what ended a task that nobody waits for, if it failed; for ``add_done_callback``."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task_failed", task=task.get_name(), exc_info=error)
