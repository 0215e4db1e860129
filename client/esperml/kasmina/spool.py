"""What a session could not send, on disk: one recording for each session that needs it, in a folder of the user's.

A file is written by the session that it belongs to and by nobody else, and is deleted when everything in it is stored.
It is locked meanwhile; a lock ends with its process. What a session leaves behind is sent by a later one
(:mod:`esperml.kasmina.leftovers`). It is an ordinary recording: ``esper trainer inspect`` and ``esper replay`` read it.

Events are stored once, though nobody writes down what was sent: those of a file are published under an id of the
file's own, in its order, so that the bus knows how many it has. Only what was under way, and not confirmed, when the
file was begun belongs to the session's id: it comes first, and the file says with which sequence it went out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if sys.platform != "win32":
    import fcntl

from esperml.client.errors import RecordingError
from esperml.client.recording import Recorder, read
from esperml.kasmina.outbox import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIX: Final = ".mcap"
"""Of a file that holds whole events."""

UNFINISHED: Final = ".part"
"""Of one that is being begun."""


@dataclass(frozen=True, slots=True)
class SpoolOptions:
    """Where a session keeps what it cannot send.

    Attributes:
        folder: the folder; it is made where it is missing. ``None``: what ``ESPER_SPOOL`` names, or else
            ``esper/spool`` in ``$XDG_STATE_HOME`` (``~/.local/state``), which only its user can read.
        max_bytes: most bytes of all files in the folder. Beyond them nothing is written.
    """

    folder: Path | str | None = None
    max_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {self.max_bytes}")

    def resolved(self) -> Path:
        """The folder that is meant.

        Raises:
            RuntimeError: the user has no home folder, and nothing names another.
        """
        if self.folder is not None:
            return Path(self.folder)
        if named := os.environ.get("ESPER_SPOOL"):
            return Path(named)
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "esper" / "spool"


@dataclass(frozen=True, slots=True)
class Begun:
    """What the file of a spool says of itself.

    Attributes:
        target: the server that the events are for.
        run_id: the run that they are of.
        client_id: the publisher that the first ``under_way`` events went out under.
        first_sequence: the sequence of the first of them.
        under_way: how many they are; all of one kind.
    """

    target: str
    run_id: str
    client_id: str
    first_sequence: int
    under_way: int

    def labels(self) -> dict[str, str]:
        """As the labels of a recording."""
        return {
            "target": self.target,
            "run_id": self.run_id,
            "client_id": self.client_id,
            "first_sequence": str(self.first_sequence),
            "under_way": str(self.under_way),
        }

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> Self | None:
        """From the labels of a recording; ``None`` where it is no spool."""
        try:
            return cls(
                labels["target"],
                labels["run_id"],
                labels["client_id"],
                int(labels["first_sequence"]),
                int(labels["under_way"]),
            )
        except (KeyError, ValueError):
            return None


class SpoolFile:
    """The file of one session, while it has one. For a single thread.

    Args:
        folder: the folder.
        begun: what the file says of itself.
        entries: the first events; at least one. Those under way come first.
        max_bytes: most bytes of all files in the folder.

    Attributes:
        path: the file.
        client_id: the publisher of its events.
        unsent: events in it that were not taken out by :meth:`sent`.
        under_way: how many of those belong to the publisher of the session.
        first_sequence: the sequence of the first of them.

    Raises:
        OSError: nothing was written: the folder or the disk takes no more, or the bound is reached.
    """

    def __init__(self, folder: Path, begun: Begun, entries: Sequence[Entry], *, max_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        self.client_id = publisher_of(name)
        self.path = folder / (name + SUFFIX)
        self.unsent = 0
        self.under_way = begun.under_way
        self.first_sequence = begun.first_sequence
        self._max_bytes = max_bytes
        self._synced_bytes = 0
        self._failed = False
        self._ahead: list[Entry] = []
        unfinished = folder / (name + UNFINISHED)
        self._recorder = Recorder(unfinished, labels=begun.labels())
        # Of its own, so that it outlives a recorder that fails, and holds the lock.
        self._lock = os.open(unfinished, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            if not lock(self._lock):
                raise OSError(errno.EAGAIN, "another process holds it", str(unfinished))  # noqa: TRY301 - one way out
            self.add(entries)
            unfinished.rename(self.path)
            _sync_folder(folder)
        except OSError:
            self._abandon()
            unfinished.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            os.close(self._lock)
            raise
        self._events = read(self.path)

    def add(self, entries: Sequence[Entry]) -> None:
        """Append events. They are on the disk when this returns.

        Raises:
            OSError: none of them was written. Where the disk failed, this file takes no more.
        """
        if self._failed:
            raise OSError(errno.EIO, "an earlier write failed", str(self.path))
        size = sum(entry.event.ByteSize() for entry in entries)
        if folder_bytes(self.path.parent) + size > self._max_bytes:
            raise OSError(
                errno.ENOSPC, f"the folder is at its bound of {self._max_bytes:,} bytes", str(self.path.parent)
            )
        try:
            for entry in entries:
                self._recorder.write(entry.kind, entry.event, log_time_ns=entry.published_ns)
            self._recorder.flush()
            os.fsync(self._lock)
            self._synced_bytes = os.fstat(self._lock).st_size
        except OSError:
            self._abandon()
            raise
        self.unsent += len(entries)

    def peek(self, count: int) -> list[Entry]:
        """The oldest events that are not sent, at most ``count``; all of one kind.

        Raises:
            OSError: the file cannot be read.
        """
        self._read_ahead(count)
        first = self._ahead[:count]
        return list(takewhile(lambda entry: entry.kind == first[0].kind, first))

    def sent(self, count: int) -> None:
        """The ``count`` oldest are stored, or of no use to anybody."""
        self._read_ahead(count)
        del self._ahead[:count]
        self.unsent -= count
        self.under_way = max(self.under_way - count, 0)

    def close(self) -> None:
        """Let go of the file: deleted if all of it was sent, else left to another session."""
        self._events.close()
        with contextlib.suppress(OSError):  # Without its end it can be read just as well.
            self._recorder.close()
        if self.unsent == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _read_ahead(self, count: int) -> None:
        missing = min(count, self.unsent) - len(self._ahead)
        if missing <= 0:
            return
        try:
            read_now = [
                Entry(recorded.log_time_ns, recorded.kind, recorded.event) for recorded in islice(self._events, missing)
            ]
        except RecordingError as error:
            raise OSError(errno.EIO, str(error), str(self.path)) from error
        if len(read_now) < missing:
            raise OSError(errno.EIO, "what was written cannot be read", str(self.path))
        self._ahead += read_now

    def _abandon(self) -> None:
        """Give up writing, and cut the file back to what was whole."""
        self._failed = True
        with contextlib.suppress(OSError):
            self._recorder.close()
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, self._synced_bytes)


def publisher_of(name: str) -> str:
    """The id under which the events of the file with this stem are published."""
    return f"spool-{name}"


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed, however that comes about. Whether it is locked now.

    Raises:
        OSError: files cannot be locked here.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "files cannot be locked as a spool needs it on Windows")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder. Those that go away meanwhile do not count."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
