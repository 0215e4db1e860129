"""The embedded log: one SQLite file in WAL mode, one row per published frame.

A writer thread commits whatever has come in since its last commit as one transaction (group commit). With durability
``fsync`` SQLite returns from COMMIT after it has synced the WAL, and only then is anything confirmed; with
``page_cache`` COMMIT returns when the WAL is written to the operating system, which syncs it in its own time.
Another thread reads, on a connection of its own, and sees what is committed.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeVar, cast

import structlog

from esperml.oona.log import (
    NO_LETTERS,
    Appended,
    DeadLetter,
    EncodedEvents,
    GroupProgress,
    LogDamagedError,
    LogError,
    LogFullError,
    LogUnavailableError,
    SequenceGapError,
    StoredFrame,
    TopicBounds,
)
from esperml.oona.ranges import RangeSet
from esperml.oona.sqlite.letters import letter_offsets, read_letters
from esperml.oona.sqlite.lock import lock_log, mark_closed, mark_open
from esperml.oona.sqlite.schema import SALVAGE, check_files, create_or_check_schema
from esperml.oona.sqlite.transaction import Transaction, oldest_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from esperml.oona.retention import FrameExtent

# What one transaction may take in, so that the first in it does not wait for ever for the last.
_MAX_TRANSACTION_REQUESTS: Final = 1024
_MAX_TRANSACTION_BYTES: Final = 32 * 2**20

# How near its limit the file must be for a full disk to be the limit's doing, and when room may have been made.
_NEARLY_FULL_BYTES: Final = 64 * 2**20
_FULL_RETRY_S: Final = 5.0

# SQLite's name for when a commit counts as done.
_SYNCHRONOUS: Final = {"fsync": "FULL", "page_cache": "NORMAL"}

# What a damaged file raises. SQLite quotes what it found in its messages, which then need not be text.
_DAMAGED: Final = (sqlite3.DatabaseError, UnicodeDecodeError)

_T = TypeVar("_T")

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Request:
    """One thing for the writer thread to do, and the future that waits for it on ``loop``."""

    work: Callable[[Transaction], object]
    size: int
    future: asyncio.Future[object]
    loop: asyncio.AbstractEventLoop
    outcome: object = None
    error: LogError | None = None

    def settle(self) -> None:
        """Resolve the future. On the loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
            # Whoever asked may be gone; that is no error nobody handled.
            self.future.exception()
        else:
            self.future.set_result(self.outcome)


class SqliteLog:
    """The log engine on SQLite; implements :class:`esperml.oona.log.Log`.

    Args:
        path: the file; made where there is none, beside ``-wal``, ``-shm`` and ``.lock`` files. Its folder must exist.
        max_bytes: most bytes that the file may have; beyond them nothing is stored until something was purged. 0: no
            limit but the disk's.
        durability: what is survived once a call has finished. ``fsync``: loss of power. ``page_cache``: the end of
            this process however it comes, but not that of the machine, which may take the last seconds with it; what
            is then left is a whole log up to some moment.

    Raises:
        LogInUseError: another process has it open.
        LogDamagedError: the file is damaged, or is no log of ours.
        LogUnavailableError: the file cannot be made or written.
    """

    def __init__(self, path: Path, *, max_bytes: int = 0, durability: Literal["fsync", "page_cache"] = "fsync") -> None:
        self.durability: Final = durability
        self._path = path
        self._max_bytes = max_bytes
        self._lock = lock_log(path)
        try:
            check_files(path, self._lock)
            self._open(max_bytes)
            mark_open(self._lock)
        except (*_DAMAGED, json.JSONDecodeError) as error:
            self._lock.close()
            # SQLite's general error is here about what is in the file; the others are about getting at it.
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise LogUnavailableError(f"{path}: cannot be opened: {error}") from error
            raise LogDamagedError(f"{path}: is damaged or no log of this program: {error}; {SALVAGE}") from error
        except LogDamagedError:
            self._lock.close()
            raise
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="oona-log-reader")
        self._closed = False
        self._changed: Callable[[int], None] | None = None
        self._writer = threading.Thread(target=self._write, name="oona-log-writer", daemon=True)
        self._writer.start()

    def _open(self, max_bytes: int) -> None:
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[self.durability]}")
            if max_bytes:
                page_size = self._connection.execute("PRAGMA page_size").fetchone()[0]
                self._connection.execute(f"PRAGMA max_page_count = {max(max_bytes // page_size, 1)}")
            create_or_check_schema(self._path, self._connection)
            self._bounds = {
                kind: TopicBounds(earliest, next_offset, size)
                for kind, earliest, next_offset, size in self._connection.execute(
                    "SELECT kind, earliest, next_offset, bytes FROM topics"
                )
            }
            self._groups = {
                (kind, name): GroupProgress(
                    committed,
                    RangeSet((first, last) for first, last in json.loads(done)),
                    tuple((first, last, delivered, failed) for first, last, delivered, failed in json.loads(tries)),
                )
                for kind, name, committed, done, tries in self._connection.execute(
                    "SELECT kind, name, committed, done, attempts FROM groups"
                )
            }
            self._letters = letter_offsets(self._connection)
            row = self._connection.execute(
                "SELECT max(append_time_ns) FROM (SELECT append_time_ns FROM frames ORDER BY rowid DESC LIMIT 1)"
            ).fetchone()
            self._last_time_ns = row[0] or 0
            self._read_connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._read_connection.execute("PRAGMA query_only = ON")
        except (*_DAMAGED, json.JSONDecodeError, LogDamagedError):
            self._connection.close()
            raise

    # What the broker calls, on the event loop.

    def bounds(self, kind: int) -> TopicBounds:
        """The extent of the log of ``kind``, as far as it is durable."""
        return self._bounds.get(kind, TopicBounds())

    def groups(self) -> Mapping[tuple[int, str], GroupProgress]:
        """Progress of each (kind, group) as it was when the log was opened."""
        return self._groups

    def letters(self) -> Mapping[tuple[int, str], Mapping[int, bool]]:
        """Dead letters of each (kind, group) when the log was opened, by offset: whether each is replayed."""
        return self._letters

    def listen(self, changed: Callable[[int], None]) -> None:
        """Have ``changed(kind)`` called whenever the bounds have changed; see :class:`esperml.oona.log.Log`."""
        self._changed = changed

    async def next_sequence(self, client_id: str) -> int:
        """The sequence that the next event of the publisher must have; behind all that was asked for before."""
        return await self._ask(lambda transaction: transaction.last_sequence(client_id) + 1)

    def append(self, kind: int, client_id: str, first_sequence: int, events: EncodedEvents) -> asyncio.Future[Appended]:
        """Store events, and the publisher's sequence with them; see :class:`esperml.oona.log.Log`."""
        return self._ask(lambda transaction: transaction.append(kind, client_id, first_sequence, events), events.size)

    def save_group(
        self, kind: int, group: str, progress: GroupProgress, letters: Mapping[int, DeadLetter | None] = NO_LETTERS
    ) -> asyncio.Future[None]:
        """Store a group's progress, and what became of dead letters of it."""
        return self._ask(lambda transaction: transaction.save_group(kind, group, progress, letters))

    async def dead_letters(self, kind: int, group: str, first: int, limit: int) -> list[DeadLetter]:
        """Dead letters of a group from offset ``first`` on, at most ``limit``, ascending."""
        return await self._in_reader(lambda: read_letters(self._read_connection, kind, group, first, limit))

    async def purge(self, kind: int, before: int) -> int:
        """Delete the frames that lie below offset ``before`` as a whole. Returns the earliest offset then.

        It goes in small transactions, and leaves as much time between them as they take: whoever publishes meanwhile
        waits for one of them at most.
        """
        while True:
            began_s = time.monotonic()
            earliest, is_all = await self._ask(lambda transaction: transaction.purge(kind, before))
            if is_all:
                return earliest
            await asyncio.sleep(time.monotonic() - began_s)

    async def oldest(self, kind: int, count: int) -> list[FrameExtent]:
        """The first frames of a log, at most ``count``, in order."""
        return await self._in_reader(lambda: oldest_frames(self._read_connection, kind, count))

    async def read(self, kind: int, offset: int, max_bytes: int) -> list[StoredFrame]:
        """Frames from the one that holds ``offset``, or the next that is there, in order."""
        return await self._in_reader(lambda: self._read_frames(kind, offset, max_bytes))

    async def offset_at(self, kind: int, time_ns: int) -> int:
        """Offset of the first record stored at or after a time (ns since 1970), or of the next to be stored."""
        offset = await self._in_reader(lambda: self._first_since(kind, time_ns))
        return self.bounds(kind).next if offset is None else offset

    async def close(self) -> None:
        """Finish what was asked for, and let go of the files."""
        if self._closed:
            return
        self._closed = True
        self._requests.put(None)
        await asyncio.to_thread(self._writer.join)
        self._readers.shutdown()
        await asyncio.to_thread(self._close_files)

    # Inside: the event loop's side.

    def _ask(self, work: Callable[[Transaction], _T], size: int = 0) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        if self._closed:
            future.set_exception(LogUnavailableError(f"{self._path}: is closed"))
        else:
            self._requests.put(_Request(work, size, cast("asyncio.Future[object]", future), loop))
        return future

    def _finish(self, requests: list[_Request], bounds: dict[int, TopicBounds] | None) -> None:
        before, self._bounds = self._bounds, self._bounds if bounds is None else bounds
        for request in requests:
            request.settle()
        if self._changed is not None:
            for kind, extent in self._bounds.items():
                if before.get(kind) != extent:
                    self._changed(kind)

    # Inside: the writer thread.

    def _write(self) -> None:
        bounds = self._bounds
        going_on = True
        while going_on:
            requests, going_on = self._gather()
            if not requests:
                continue
            transaction = Transaction(self._connection, bounds, self._last_time_ns)
            committed = self._commit(transaction, requests)
            if committed:
                bounds = transaction.bounds
                self._last_time_ns = transaction.append_time_ns
            # Readers on the loop see new bounds and confirmations at the same moment.
            requests[0].loop.call_soon_threadsafe(self._finish, requests, bounds if committed else None)

    def _gather(self) -> tuple[list[_Request], bool]:
        """Wait for a request and take whatever else has come in; False when the log is to be closed."""
        requests: list[_Request] = []
        size = 0
        first = self._requests.get()
        if first is None:
            return requests, False
        requests.append(first)
        size = first.size
        while len(requests) < _MAX_TRANSACTION_REQUESTS and size < _MAX_TRANSACTION_BYTES:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                break
            if request is None:
                return requests, False
            requests.append(request)
            size += request.size
        return requests, True

    def _commit(self, transaction: Transaction, requests: list[_Request]) -> bool:
        """Do the requests in one transaction; False, with every request failed, where it cannot be stored."""
        try:
            before = transaction.bounds.copy()
            self._connection.execute("BEGIN IMMEDIATE")
            for request in requests:
                try:
                    request.outcome = request.work(transaction)
                except SequenceGapError as error:
                    request.error = error
            transaction.write_summary(before)
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - Whatever it is, those who wait are told, and the thread goes on.
            problem = self._give_up(error)
            for request in requests:
                request.error = problem
            return False
        return True

    def _give_up(self, error: Exception) -> LogUnavailableError:
        """Roll back, and say what to tell those whose requests were not stored."""
        if not isinstance(error, (sqlite3.Error, UnicodeDecodeError)):
            _log.error("commit_failed", path=str(self._path), exc_info=error)
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return self._problem(error)
        except sqlite3.Error as further:
            return LogUnavailableError(f"{self._path.name}: cannot store: {error}; {further}")

    def _problem(self, error: Exception) -> LogUnavailableError:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL and self._max_bytes:
            [pages] = self._connection.execute("PRAGMA page_count").fetchone()
            [page_bytes] = self._connection.execute("PRAGMA page_size").fetchone()
            # Overflow pages come many at a time: what is missing to the limit need not be one page.
            if pages * page_bytes > self._max_bytes - _NEARLY_FULL_BYTES:
                limit = f"{self._path.name}: is full: the limit is {self._max_bytes} bytes; purge, or raise it"
                return LogFullError(limit, _FULL_RETRY_S)
        return LogUnavailableError(f"{self._path.name}: cannot store: {error}")

    def _close_files(self) -> None:
        self._read_connection.close()
        try:
            busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                mark_closed(self._lock)
        except sqlite3.Error as error:
            # What is in the write-ahead log stays there, to be found when the log is opened again.
            _log.warning("log_left_open", path=str(self._path), detail=str(error))
        self._connection.close()
        self._lock.close()

    # Inside: the reader thread.

    async def _in_reader(self, query: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, query)
        except _DAMAGED as error:
            raise LogDamagedError(f"{self._path}: cannot be read: {error}; {SALVAGE}") from error

    def _read_frames(self, kind: int, offset: int, max_bytes: int) -> list[StoredFrame]:
        frames: list[StoredFrame] = []
        size = 0
        cursor = self._read_connection.execute(
            "SELECT first_offset, count, append_time_ns, crc32, batch FROM frames WHERE kind = ? AND first_offset >= "
            "coalesce((SELECT max(first_offset) FROM frames WHERE kind = ? AND first_offset <= ?), 0) "
            "ORDER BY first_offset",
            (kind, kind, offset),
        )
        for first_offset, count, append_time_ns, crc32, batch in cursor:
            if first_offset + count <= offset:
                continue
            if zlib.crc32(batch) != crc32:
                raise LogDamagedError(
                    f"{self._path}: log {kind}: the frame at offset {first_offset} is damaged; {SALVAGE}"
                )
            frames.append(StoredFrame(first_offset, count, append_time_ns, batch))
            size += len(batch)
            if size >= max_bytes:
                break
        cursor.close()
        return frames

    def _first_since(self, kind: int, time_ns: int) -> int | None:
        row = self._read_connection.execute(
            "SELECT first_offset FROM frames WHERE kind = ? AND append_time_ns >= ? ORDER BY first_offset LIMIT 1",
            (kind, time_ns),
        ).fetchone()
        return None if row is None else row[0]
