"""Reads the rows of a SQLite file page by page, so that damage in one place hides nothing in the others.

SQLite finds a row by its b-tree and gives up where a page of that is damaged. Here every page that looks like a leaf is
asked for its rows, wherever it hangs. What comes of that may be stale, as pages no longer used keep their content, or
garbage: whoever asks must be able to tell (our frames carry a CRC).

Source: "Database File Format", https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Value = int | float | str | bytes | None

_MAGIC: Final = b"SQLite format 3\x00"
_PAGE_SIZES: Final = frozenset(2**power for power in range(9, 17))
_DEFAULT_PAGE_SIZE: Final = 4096
_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_WAL_HEADER: Final = struct.Struct(">8I")
_WAL_FRAME: Final = struct.Struct(">6I")
_WAL_MAGIC: Final = 0x377F0682
_INTEGER_BYTES: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class _GarbageError(Exception):
    """What should be a row is none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is.

    Attributes:
        page: number of the page, from 1.
        cell: position of its cell in the page.
    """

    page: int
    cell: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row, perhaps stale, perhaps garbage.

    Attributes:
        place: where it is.
        rowid: its rowid; 0 in a table without.
        values: its columns.
    """

    place: Place
    rowid: int
    values: tuple[Value, ...]


class Pages:
    """The pages of a database with what its write-ahead log holds of them, read only. A context manager.

    Args:
        path: the database; its write-ahead log is looked for beside it.

    Raises:
        OSError: the file cannot be read.

    Attributes:
        problems: what was found to be wrong with the files themselves, in words.
    """

    def __init__(self, path: Path) -> None:
        self.problems: list[str] = []
        self._data = _map(path)
        wal_path = path.with_name(path.name + "-wal")
        self._wal = _map(wal_path) if wal_path.exists() else b""
        self._page_size = self._find_page_size()
        self._usable = self._page_size - (self._data[20] if self._has_header() else 0)
        self._in_wal = self._read_wal(wal_path.name)
        if len(self._data) % self._page_size:
            self.problems.append(f"{path.name} ends within a page: it was cut off")
        self._count = max(len(self._data) // self._page_size, max(self._in_wal, default=0))

    def __enter__(self) -> Pages:
        """Read on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the files."""
        for data in (self._data, self._wal):
            if isinstance(data, mmap.mmap):
                data.close()

    def table_rows(self) -> Iterator[Row]:
        """The rows of all tables with rowids, by page."""
        return self._rows({_TABLE_LEAF})

    def keyed_rows(self) -> Iterator[Row]:
        """The rows of all tables without rowids, and of indices, by page."""
        return self._rows({_INDEX_LEAF, _INDEX_INTERIOR})

    def row(self, place: Place) -> Row | None:
        """The row at a place, or None where there is only garbage."""
        page = self._page(place.page)
        try:
            return self._decode(page, page[self._header_at(place.page)], place)
        except (_GarbageError, IndexError, struct.error):
            return None

    def _has_header(self) -> bool:
        return self._data[:16] == _MAGIC and self._header_page_size() in _PAGE_SIZES

    def _header_page_size(self) -> int:
        size = int.from_bytes(self._data[16:18], "big")
        return 65536 if size == 1 else size

    def _find_page_size(self) -> int:
        if self._has_header():
            return self._header_page_size()
        self.problems.append("the file's header is damaged")
        if len(self._wal) >= _WAL_HEADER.size:
            size: int = _WAL_HEADER.unpack_from(self._wal)[2]
            if size in _PAGE_SIZES:
                return size
        return _DEFAULT_PAGE_SIZE

    def _read_wal(self, name: str) -> dict[int, int]:
        """Where in the write-ahead log the last committed version of each page is, as far as that is whole."""
        if len(self._wal) < _WAL_HEADER.size:
            return {}
        header = _WAL_HEADER.unpack_from(self._wal)
        order = ">" if header[0] & 1 else "<"
        sums = _checksum(order, bytes(self._wal[:24]), (0, 0))
        if header[0] & ~1 != _WAL_MAGIC or header[2] != self._page_size or sums != header[6:8]:
            self.problems.append(f"{name}: its header is damaged: what it holds is lost")
            return {}
        committed: dict[int, int] = {}
        since: dict[int, int] = {}
        step = _WAL_FRAME.size + self._page_size
        for start in range(_WAL_HEADER.size, len(self._wal) - step + 1, step):
            page, size_after_commit, *rest = _WAL_FRAME.unpack_from(self._wal, start)
            if tuple(rest[:2]) != header[4:6]:
                break  # Left over from before the log last began anew.
            body = start + _WAL_FRAME.size
            sums = _checksum(order, bytes(self._wal[start : start + 8]), sums)
            sums = _checksum(order, bytes(self._wal[body : body + self._page_size]), sums)
            if sums != tuple(rest[2:]):
                if start + 2 * step <= len(self._wal):
                    self.problems.append(f"{name}: is damaged at byte {start}: what follows is lost")
                break
            since[page] = body
            if size_after_commit:
                committed.update(since)
                since.clear()
        return committed

    def _page(self, number: int) -> bytes:
        if (start := self._in_wal.get(number)) is not None:
            return bytes(self._wal[start : start + self._page_size])
        start = (number - 1) * self._page_size
        return bytes(self._data[start : start + self._page_size])

    @staticmethod
    def _header_at(number: int) -> int:
        return 100 if number == 1 else 0

    def _rows(self, flags: set[int]) -> Iterator[Row]:
        for number in range(1, self._count + 1):
            start = self._in_wal.get(number)
            at = self._header_at(number) + ((number - 1) * self._page_size if start is None else start)
            source = self._data if start is None else self._wal
            if at < len(source) and source[at] in flags:
                yield from self._page_rows(number)

    def _page_rows(self, number: int) -> Iterator[Row]:
        page = self._page(number)
        at = self._header_at(number)
        flag = page[at]
        cells = int.from_bytes(page[at + 3 : at + 5], "big")
        first = at + (12 if flag == _INDEX_INTERIOR else 8)
        for pointer in range(first, min(first + 2 * cells, len(page) - 1), 2):
            place = Place(number, int.from_bytes(page[pointer : pointer + 2], "big"))
            try:
                yield self._decode(page, flag, place)
            except (_GarbageError, IndexError, struct.error):
                continue

    def _decode(self, page: bytes, flag: int, place: Place) -> Row:
        at = place.cell + (4 if flag == _INDEX_INTERIOR else 0)
        size, at = _varint(page, at)
        rowid = 0
        if flag == _TABLE_LEAF:
            rowid, at = _varint(page, at)
        most = self._usable - 35 if flag == _TABLE_LEAF else (self._usable - 12) * 64 // 255 - 23
        return Row(place, rowid, _values(self._payload(page, at, size, most)))

    def _payload(self, page: bytes, at: int, size: int, most: int) -> bytes:
        """A row's bytes: those in the page and, where they do not fit, those in its chain of overflow pages."""
        if size > self._count * self._page_size:
            raise _GarbageError
        if size <= most:
            return page[at : at + size]
        least = (self._usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (self._usable - 4)
        local = local if local <= most else least
        parts = [page[at : at + local]]
        following = int.from_bytes(page[at + local : at + local + 4], "big")
        missing = size - local
        while missing > 0:
            if not 0 < following <= self._count:
                raise _GarbageError
            page = self._page(following)
            parts.append(page[4 : min(self._usable, 4 + missing)])
            missing -= self._usable - 4
            following = int.from_bytes(page[:4], "big")
        return b"".join(parts)


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        # Nothing cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for left, right in struct.iter_unpack(f"{order}II", data):
        first = (first + left + second) & 0xFFFFFFFF
        second = (second + right + first) & 0xFFFFFFFF
    return first, second


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and the position behind it."""
    number = 0
    for index in range(8):
        byte = data[at + index]
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, at + index + 1
    return number << 8 | data[at + 8], at + 9


def _values(payload: bytes) -> tuple[Value, ...]:
    """The columns of a record."""
    header_size, at = _varint(payload, 0)
    body = header_size
    values: list[Value] = []
    while at < header_size:
        kind, at = _varint(payload, at)
        value, body = _value(payload, kind, body)
        values.append(value)
    if body != len(payload) or at != header_size:
        raise _GarbageError
    return tuple(values)


def _value(payload: bytes, kind: int, at: int) -> tuple[Value, int]:
    """A column of a serial type, and the position behind it."""
    if kind in {0, 8, 9}:
        return {0: None, 8: 0, 9: 1}[kind], at
    if kind in _INTEGER_BYTES:
        end = at + _INTEGER_BYTES[kind]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if kind < 12:
        raise _GarbageError
    end = at + (kind - 12) // 2
    try:
        return (payload[at:end].decode() if kind % 2 else payload[at:end]), end
    except UnicodeDecodeError as error:
        raise _GarbageError from error
