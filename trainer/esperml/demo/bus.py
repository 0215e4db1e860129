"""Records runs from the bus while they go on, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from esperml.client.errors import EsperError
from esperml.client.oona import OonaClient
from esperml.client.recording import Recorder
from esperml.contract import KINDS
from esperml.v1 import event_pb2, oona_pb2

_LOOK_AGAIN_S: Final = 0.2


class BusRecorder:
    """Writes every event of ``run_ids``, of all kinds, to a recording, and hands each to ``on_event``.

    Where the server dies, what came until then is in the recording, which stays whole.

    Args:
        target: address of the server.
        path: of the recording.
        run_ids: the runs.
        on_event: called with each event from the recorder's thread.
    """

    def __init__(
        self, target: str, path: Path, run_ids: Sequence[str], on_event: Callable[[event_pb2.Event], None]
    ) -> None:
        self._target = target
        self._path = path
        self._run_ids = tuple(run_ids)
        self._on_event = on_event
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bus-recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        with self._changed:
            loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def wait_until(self, done: Callable[[], bool], *, going: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for ``done``, which is asked after every event, as long as ``going``; at most ``timeout_s``.

        Returns whether it is done.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not done():
                if not going() or not self._thread.is_alive() or time.monotonic() >= deadline:
                    return False
                self._changed.wait(_LOOK_AGAIN_S)
        return True

    def _run(self) -> None:
        try:
            asyncio.run(self._record())
        except* asyncio.CancelledError:
            pass  # This is how the recorder is stopped.
        except* (OSError, EsperError) as group:
            self._error = group.exceptions[0]

    async def _record(self) -> None:
        with self._changed:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        if self._stopped.is_set():
            return
        client_id = f"demo-recorder-{uuid.uuid4().hex}"
        with Recorder(self._path) as recorder:
            async with OonaClient(self._target, client_id=client_id) as client, asyncio.TaskGroup() as group:
                for kind in KINDS:
                    group.create_task(self._follow(client, kind, recorder))

    async def _follow(self, client: OonaClient, kind: event_pb2.Kind.ValueType, recorder: Recorder) -> None:
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        async with client.subscribe(kind, run_ids=self._run_ids, start=start) as records:
            async for batch in records.batches():
                with self._changed:
                    for record in batch:
                        recorder.write(kind, record.event, log_time_ns=record.append_time.ToNanoseconds())
                        self._on_event(record.event)
                    self._changed.notify_all()
