"""The link to a file: a session without a server, recorded whole."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from esperml.client.recording import Recorder
from esperml.kasmina.link import LinkStatistics
from esperml.kasmina.outbox import FRAME_EVENTS, Outbox

if TYPE_CHECKING:
    from esperml.kasmina.link import Kind
    from esperml.v1 import event_pb2

_log = structlog.get_logger(__name__)

# How often what was published is written out, in s, unless there is a frame of it before.
_WRITE_INTERVAL_S: Final = 1.0


class FileLink:
    """Records what a session says in an MCAP file; see :class:`~esperml.kasmina.link.Link`.

    ``esper trainer inspect`` reads the file, and ``esper replay`` sends it to a server. Nobody answers: no command
    ever comes. A thread of its own writes, so that training waits for no disk; what was published more than a second
    ago is in the file, and can be read there, even if the process is killed. A disk that takes nothing more is told of
    once in the log; what comes then is dropped and counted, and the file stays whole up to there.

    Args:
        path: the file to write. Its folder must exist, and it must not.

    Raises:
        FileExistsError: there is such a file.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.open("xb").close()
        except FileExistsError as error:
            raise FileExistsError(
                error.errno, "there is a recording already: name another file, or move that one away", str(path)
            ) from None
        self._recorder = Recorder(self.path)
        self._recorder.flush()
        self._outbox = Outbox()
        self._wake = threading.Event()
        self._closing = False
        self._failed = False
        self._writer_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"esper-record-{self.path.name}", daemon=True)
        self._thread.start()

    def publish(self, kind: Kind, event: event_pb2.Event) -> None:
        """Queue an event; where the queue is full, the oldest of its sort is dropped and counted."""
        self._outbox.put(kind, event)
        if len(self._outbox) >= FRAME_EVENTS:
            self._wake.set()

    def received(self) -> list[event_pb2.Event]:
        """Nothing: nobody answers."""
        return []

    def statistics(self) -> LinkStatistics:
        """What the link did so far. It is connected while the file can be written."""
        outbox = self._outbox
        return LinkStatistics(
            outbox.reports_dropped, outbox.others_dropped, self._writer_seconds, connected=not self._failed
        )

    def close(self, timeout_s: float) -> None:
        """Write what is left, for at most ``timeout_s`` seconds, and finish the file."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._failed = True
            _log.warning("recording_left_behind", path=str(self.path), events=len(self._outbox))

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(_WRITE_INTERVAL_S)
            self._wake.clear()
            closing = self._closing  # What was published before it was set is written below.
            self._write()
            self._writer_seconds = time.thread_time()
        if not self._failed:
            try:
                self._recorder.close()
            except OSError as error:
                self._fail(error)

    def _write(self) -> None:
        while entries := self._outbox.take():
            if not self._failed:
                try:
                    for entry in entries:
                        self._recorder.write(entry.kind, entry.event, log_time_ns=entry.published_ns)
                    self._recorder.flush()
                    continue
                except OSError as error:
                    self._fail(error)
            self._outbox.drop(entries[0].kind, len(entries))

    def _fail(self, error: OSError) -> None:
        self._failed = True
        _log.warning("recording_failed", path=str(self.path), error=str(error))
        with contextlib.suppress(OSError):  # It cannot be finished either.
            self._recorder.close()
