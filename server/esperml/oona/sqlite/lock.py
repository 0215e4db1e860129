"""The embedded log's lock, which also remembers whether the log was closed."""

from __future__ import annotations

import fcntl
import os
from typing import IO, TYPE_CHECKING, Final

from esperml.oona.log import LogInUseError, LogUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

_OPEN: Final = b"open"


def lock_log(path: Path) -> IO[bytes]:
    """Take a log's lock, which ends with the file that is returned, and with the process however that ends.

    Raises:
        LogInUseError: another process has it.
        LogUnavailableError: the lock cannot be made.
    """
    try:
        file = path.with_name(path.name + ".lock").open("a+b")
    except OSError as error:
        raise LogUnavailableError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise LogInUseError(f"{path}: another process has this log open") from error
    return file


def was_left_open(lock: IO[bytes]) -> bool:
    """Whether whoever had the log last did not close it. What was stored last is then in the write-ahead log."""
    return os.fstat(lock.fileno()).st_size > 0


def mark_open(lock: IO[bytes]) -> None:
    """Note that the log is open."""
    if not was_left_open(lock):
        lock.write(_OPEN)
        lock.flush()


def mark_closed(lock: IO[bytes]) -> None:
    """Note, for good, that nothing is in the write-ahead log any more. To be called before that is deleted."""
    lock.truncate(0)
    os.fsync(lock.fileno())
