"""Records runs from the bus while they go on, in a process of its own.

Not in a thread: gRPC's asyncio stack serves all loops of a process from one queue, so that the sessions, which come and
go with loops of their own, and a recorder that stays would hold each other's events. A process also takes nothing from
the training that is being measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from esperml.client.oona import OonaClient
from esperml.client.recording import Recorder
from esperml.contract import KINDS
from esperml.v1 import event_pb2, oona_pb2

_LOOK_AGAIN_S: Final = 0.2
_STOP_TIMEOUT_S: Final = 10.0
_STOP: Final = b""


class BusRecorderError(RuntimeError):
    """The recording is not what it should be."""


@dataclass(frozen=True, slots=True)
class _Job:
    target: str
    path: Path
    run_ids: tuple[str, ...]


class BusRecorder:
    """Writes every event of ``run_ids``, of all kinds, to a recording, and hands each to ``on_event``.

    A context manager. Where the server dies, what came until then is in the recording, which is whole.

    Args:
        target: address of the server.
        path: of the recording.
        run_ids: the runs.
        on_event: called with each event, from a thread of the recorder's.

    Raises (on exit):
        BusRecorderError: the recording failed.
    """

    def __init__(
        self, target: str, path: Path, run_ids: Sequence[str], on_event: Callable[[event_pb2.Event], None]
    ) -> None:
        self._on_event = on_event
        self._changed = threading.Condition()
        # Spawned, not forked: gRPC and torch have threads that do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other_end = context.Pipe()
        job = _Job(target, path, tuple(run_ids))
        self._process = context.Process(target=_record_in_process, args=(job, self._other_end), daemon=True)
        self._listener = threading.Thread(target=self._listen, name="bus-recorder", daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        # Ours would keep the pipe open when the process is gone.
        self._other_end.close()
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            # It may end in between, which its exit code tells.
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(_STOP)
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._listener.join()
        self._pipe.close()
        if self._process.exitcode and error is None:
            raise BusRecorderError(f"the recorder's process ended with code {self._process.exitcode}")

    def wait_until(self, done: Callable[[], bool], *, going: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for ``done``, which is asked after every event, as long as ``going``; at most ``timeout_s``.

        Returns whether it is done.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not done():
                if not going() or not self._process.is_alive() or time.monotonic() >= deadline:
                    return False
                self._changed.wait(_LOOK_AGAIN_S)
        return True

    def _listen(self) -> None:
        while True:
            try:
                data = self._pipe.recv_bytes()
            except (EOFError, OSError):
                return
            with self._changed:
                self._on_event(event_pb2.Event.FromString(data))
                self._changed.notify_all()


def _record_in_process(job: _Job, pipe: Connection) -> None:
    import structlog

    # Ctrl-C reaches the whole group; this process ends when it is told to, with the recording whole.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(_record(job, pipe))


async def _record(job: _Job, pipe: Connection) -> None:
    with Recorder(job.path) as recorder:
        async with OonaClient(job.target, client_id=f"demo-recorder-{uuid.uuid4().hex}") as client:
            # Told to stop, or the process that asked for the recording is gone: both can be read from the pipe.
            stopped = asyncio.Event()
            asyncio.get_running_loop().add_reader(pipe.fileno(), stopped.set)
            told = asyncio.create_task(stopped.wait())
            following = [asyncio.create_task(_follow(job, client, kind, recorder, pipe)) for kind in KINDS]
            done, pending = await asyncio.wait([told, *following], return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.wait(pending)
            for task in done:
                task.result()


async def _follow(
    job: _Job, client: OonaClient, kind: event_pb2.Kind.ValueType, recorder: Recorder, pipe: Connection
) -> None:
    start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
    async with client.subscribe(kind, run_ids=job.run_ids, start=start) as records:
        async for record in records:
            recorder.write(kind, record.event, log_time_ns=record.append_time.ToNanoseconds())
            pipe.send_bytes(record.event.SerializeToString())
