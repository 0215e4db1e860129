"""What a link has yet to send: in memory at first, and on disk what has waited for long and must not be lost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final

import structlog

from esperml.kasmina.outbox import FRAME_EVENTS, Entry, Outbox
from esperml.kasmina.spool import Begun, SpoolFile, SpoolOptions
from esperml.v1 import event_pb2

if TYPE_CHECKING:
    from esperml.kasmina.link import Kind

_log = structlog.get_logger(__name__)

# Time after which a disk that failed is tried again, in s.
_RETRY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one kind that are sent together.

    Attributes:
        entries: the events.
        client_id: the publisher that they must go out under.
        on_disk: whether they are in the file.
    """

    entries: list[Entry]
    client_id: str
    on_disk: bool

    @property
    def kind(self) -> Kind:
        """The kind of all of them."""
        return self.entries[0].kind


class Backlog:
    """Hands out batches in the order of publication, from the outbox and from the file where there is one.

    An event other than a report is in one place: in the outbox, under way, or in the file. (The one exception is what
    is under way when the file is begun: it is in both, and the file says so.) All but the outbox is for the link's
    thread alone.

    Args:
        outbox: what was published.
        options: where the file goes; ``None`` for no file.
        target: the server that the events are for.
        run_id: the run that they are of.
        client_id: the publisher of the session.
    """

    def __init__(
        self, outbox: Outbox, options: SpoolOptions | None, *, target: str, run_id: str, client_id: str
    ) -> None:
        self._outbox = outbox
        self._options = options
        self._target = target
        self._run_id = run_id
        self._client_id = client_id
        self._under_way: Batch | None = None
        self._next_sequence = 1
        self._file: SpoolFile | None = None
        self._retry_at_s = 0.0
        self._told = False

    @property
    def spooled(self) -> int:
        """Events in the file that are not sent."""
        return 0 if self._file is None else self._file.unsent

    @property
    def unsent(self) -> int:
        """Events anywhere that are not sent, each counted once."""
        under_way = 0 if self._under_way is None or self._under_way.on_disk else len(self._under_way.entries)
        return len(self._outbox) + under_way + self.spooled

    def take(self, next_sequence: int) -> Batch | None:
        """The oldest events that are to be sent, or ``None``. :meth:`done` or :meth:`put_back` must follow.

        Args:
            next_sequence: the sequence of the next event of the session's publisher; 0 where that is not known.
        """
        self._next_sequence = next_sequence or self._next_sequence
        batch = self._take_from_file()
        if batch is None and (entries := self._outbox.take()):
            batch = Batch(entries, self._client_id, on_disk=False)
        self._under_way = batch
        return batch

    def resume(self, next_sequence: int) -> None:
        """A new stream begins: settle what was under way when an earlier one ended for good.

        Args:
            next_sequence: the sequence of the next event of the session's publisher, as the server says.
        """
        if self._file is not None and self._file.under_way and next_sequence > self._file.first_sequence:
            self._leave_out(self._file.under_way)

    def done(self, *, stored: bool) -> None:
        """What was taken is stored, or refused for good."""
        if (batch := self._end()) is None:
            return
        if stored and batch.client_id == self._client_id:
            self._next_sequence += len(batch.entries)
        if batch.on_disk:
            self._leave_out(len(batch.entries))

    def put_back(self) -> None:
        """What was taken was not confirmed. It goes to disk where it must not be lost, with the doubt written down."""
        self.keep()
        batch = self._end()
        if batch is not None and not batch.on_disk:
            self._outbox.put_back(batch.entries)

    def keep(self, *, older_than_s: float = 0.0) -> None:
        """Write to disk what is no report, where the oldest of it has waited for ``older_than_s`` seconds.

        A disk that takes nothing is told of once; the events stay in memory, and it is tried again after 30 s.
        """
        batch = self._under_way
        begun = []
        if batch is not None and not batch.on_disk and batch.kind != event_pb2.KIND_TELEMETRY:
            begun = batch.entries
        oldest_ns = begun[0].published_ns if begun else self._outbox.oldest_other_ns()
        if self._options is None or oldest_ns is None or time.monotonic() < self._retry_at_s:
            return
        if time.time_ns() - oldest_ns < older_than_s * 1e9:
            return
        entries = self._outbox.take_others()
        try:
            self._write(self._options, begun, entries)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder.
            self._outbox.put_back(entries)
            self._retry_at_s = time.monotonic() + _RETRY_S
            if not self._told:
                self._told = True
                _log.warning(
                    "spool_unusable",
                    run_id=self._run_id,
                    error=str(error),
                    detail="what cannot be sent stays in memory, and the oldest is dropped when that is full: "
                    "make room, or name another folder in ESPER_SPOOL",
                )

    def close(self) -> None:
        """Let go of the file; a later session sends what is in it."""
        if self._file is not None:
            if self._file.unsent:
                _log.warning("events_spooled", run_id=self._run_id, events=self._file.unsent, path=str(self._file.path))
            self._file.close()

    def _take_from_file(self) -> Batch | None:
        """The oldest events of the file, unless reports are older."""
        if self._file is None:
            return None
        try:
            entries = self._file.peek(self._file.under_way or FRAME_EVENTS)
        except OSError as error:
            _log.warning("spool_unreadable", run_id=self._run_id, path=str(self._file.path), error=str(error))
            self._file.close()
            self._file = None
            return None
        until_ns = self._outbox.oldest_ns() or entries[-1].published_ns + 1
        if self._file.under_way and entries[0].published_ns < until_ns:
            return Batch(entries, self._client_id, on_disk=True)
        older = list(takewhile(lambda entry: entry.published_ns < until_ns, entries))
        return Batch(older, self._file.client_id, on_disk=True) if older else None

    def _write(self, options: SpoolOptions, under_way: list[Entry], entries: list[Entry]) -> None:
        if self._file is not None:
            self._file.add(entries)
            return
        begun = Begun(self._target, self._run_id, self._client_id, self._next_sequence, len(under_way))
        self._file = SpoolFile(options.resolved(), begun, [*under_way, *entries], max_bytes=options.max_bytes)
        if under_way:
            self._under_way = Batch(under_way, self._client_id, on_disk=True)

    def _leave_out(self, count: int) -> None:
        """The ``count`` oldest events of the file need not be sent; an empty file goes."""
        if self._file is not None:
            self._file.sent(count)
            if self._file.unsent == 0:
                self._file.close()
                self._file = None

    def _end(self) -> Batch | None:
        batch, self._under_way = self._under_way, None
        return batch
