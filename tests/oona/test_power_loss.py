"""What is left of the log when the power fails, at moments all over a server's life.

A server's writes, truncations and syncs of the log's files are journalled in their order (``write_journal.c``). From
that its files are put together as a disk may hold them after a power failure: for each file everything up to its last
sync, and of what was written since then nothing, or any part in pieces of a sector. SQLite then recovers the log.

The model takes it that a sync that has returned holds, that sectors are written whole, and that files which were made
or deleted stay so. ``POWER_CUTS`` says at how many moments the power fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from esperml.client import OonaClient
from esperml.oona.sqlite.log import SqliteLog
from esperml.v1 import event_pb2, oona_pb2

CUTS = int(os.environ.get("POWER_CUTS", "15"))
EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
SECTOR = 512
# Enough to fill the write-ahead log several times over, so that checkpoints are cut in two as well.
FRAMES, FRAME_EVENTS, MARK_BYTES = 250, 8, 4000
ENTRY = struct.Struct("=IIQQ")
OPEN, WRITE, TRUNCATE, SYNC, UNLINK, CLOSE = range(1, 7)


@dataclass
class File:
    """A file on the disk: what is sure to be there, and what was done to it since."""

    synced: bytes = b""
    since: list[tuple[int, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        self.synced = self._with(lambda _: True)
        self.since.clear()

    def after_power_failure(self, chance: random.Random | None) -> bytes:
        """What is there then. ``chance`` decides what was kept of the unsynced; None: nothing."""
        if chance is None:
            return self.synced
        shares = [chance.choice((0.0, 0.5, 1.0)) for _ in self.since]
        return self._with(lambda index: chance.random() < shares[index])

    def _with(self, is_kept: Callable[[int], bool]) -> bytes:
        content = bytearray(self.synced)
        for index, (what, offset, data) in enumerate(self.since):
            if what == TRUNCATE:
                if is_kept(index):
                    del content[offset:]
                    content.extend(bytes(offset - len(content)))
                continue
            for start in range(0, len(data), SECTOR):
                if is_kept(index):
                    piece = data[start : start + SECTOR]
                    content.extend(bytes(max(offset + start - len(content), 0)))
                    content[offset + start : offset + start + len(piece)] = piece
        return bytes(content)


class Disk:
    """The log's files, as the journal up to some entry leaves them."""

    def __init__(self, journal: Path) -> None:
        self.files: dict[str, File] = {}
        self._open: dict[int, str] = {}
        self._entries = self._read(journal)
        self._next = next(self._entries)

    @staticmethod
    def _read(journal: Path) -> Iterator[tuple[int, int, int, int, int, bytes]]:
        position, data = 0, journal.read_bytes()
        while position < len(data):
            what, number, offset, length = ENTRY.unpack_from(data, position)
            position += ENTRY.size
            body = data[position : position + length] if what in {OPEN, WRITE, UNLINK} else b""
            position += len(body)
            yield position, what, number, offset, length, body

    def advance(self, position: int) -> None:
        """Do what the journal holds up to a position."""
        while self._next[0] <= position:
            _, what, number, offset, length, body = self._next
            self._do(what, number, offset, length, body)
            with contextlib.suppress(StopIteration):
                self._next = next(self._entries)
                continue
            return

    def _do(self, what: int, number: int, offset: int, length: int, body: bytes) -> None:
        if what == OPEN:
            self._open[number] = Path(body.decode()).name
            self.files.setdefault(self._open[number], File())
        elif what == UNLINK:
            self.files.pop(Path(body.decode()).name, None)
        elif what == CLOSE:
            del self._open[number]
        elif (file := self.files.get(self._open[number])) is not None:
            if what == SYNC:
                file.sync()
            else:
                file.since.append((what, length if what == TRUNCATE else offset, body))

    @classmethod
    def writes(cls, journal: Path, name: str) -> list[int]:
        """Positions in the journal behind the writes to a file."""
        open_files: dict[int, str] = {}
        positions = []
        for position, what, number, _, _, body in cls._read(journal):
            if what == OPEN:
                open_files[number] = Path(body.decode()).name
            elif what == WRITE and open_files.get(number) == name:
                positions.append(position)
        return positions

    def write_to(self, folder: Path, chance: random.Random | None) -> None:
        """Lay out the files as they are after a power failure. Shared memory ends with the machine."""
        folder.mkdir()
        for name, file in self.files.items():
            if not name.endswith("-shm"):
                (folder / name).write_bytes(file.after_power_failure(chance))


@dataclass(frozen=True)
class Confirmed:
    """What clients knew when the journal had some length."""

    position: int
    records: int
    committed: int


async def load(target: str, journal: Path, make_event) -> tuple[list[Confirmed], int]:
    """Publish numbered events, several frames at a time, and acknowledge them in a group."""
    known = [Confirmed(0, 0, 0)]
    slots = asyncio.Semaphore(4)

    def note(records: int = 0, committed: int = 0) -> None:
        last = known[-1]
        known.append(Confirmed(journal.stat().st_size, max(last.records, records), max(last.committed, committed)))

    async def publish(oona: OonaClient, number: int) -> None:
        async with slots:
            marks = range(number * FRAME_EVENTS, (number + 1) * FRAME_EVENTS)
            events = [make_event(mark=f"{mark}".ljust(MARK_BYTES)) for mark in marks]
            published = await oona.publish(EVENTS, events)
        note(records=published.first_offset + published.count)

    async def consume(oona: OonaClient) -> None:
        async with oona.subscribe(EVENTS, group="g", start=EARLIEST) as subscription:
            async for batch in subscription.batches():
                note(committed=await subscription.ack(*batch) or 0)
                if batch[-1].offset == FRAMES * FRAME_EVENTS - 1:
                    return

    async with OonaClient(target, client_id="p") as publisher, OonaClient(target, client_id="m") as member:
        consuming = asyncio.create_task(consume(member))
        await asyncio.gather(*(publish(publisher, number) for number in range(FRAMES)))
        await consuming
    return known, FRAMES * FRAME_EVENTS


async def recovered(path: Path) -> tuple[int, int]:
    """Open what is left of the log; how many records it holds, and what the group has committed.

    Whatever it holds must be the beginning of what was published, and all that the log says of itself must agree.
    """
    log = SqliteLog(path)
    try:
        numbers = [
            int(event.run_ended.error)
            for frame in await log.read(EVENTS, 0, 2**40)
            for event in event_pb2.EventBatch.FromString(frame.batch).events
        ]
        assert numbers == list(range(len(numbers)))
        assert log.bounds(EVENTS).next == len(numbers)
        assert await log.next_sequence("p") == len(numbers) + 1
        progress = log.groups().get((EVENTS, "g"))
        assert progress is None or progress.committed <= len(numbers)
        return len(numbers), progress.committed if progress else 0
    finally:
        await log.close()


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["fsync", "page_cache"])
async def test_what_was_confirmed_is_there_after_a_power_failure(
    durability, tmp_path, start_bus_process, preload, make_event
):
    journal = tmp_path / "journal"
    process = start_bus_process(
        LD_PRELOAD=preload("write_journal.c"),
        JOURNAL=str(journal),
        JOURNAL_OF=str(tmp_path / "oona.sqlite"),
        ESPER_OONA__DURABILITY=durability,
    )
    known, published = await load(process.target, journal, make_event)
    process.kill()

    chance = random.Random()
    # A third of the cuts at the very moments at which clients learned of something, a third within checkpoints.
    disk = Disk(journal)
    cuts = [chance.choice(known).position for _ in range(CUTS // 3)]
    cuts += chance.choices(Disk.writes(journal, "oona.sqlite"), k=CUTS // 3)
    cuts += [chance.randrange(journal.stat().st_size + 1) for _ in range(CUTS // 3)]
    checkpoints_cut = lost = 0
    for index, cut in enumerate(sorted(cuts)):
        disk.advance(cut)
        sure = max((what for what in known if what.position <= cut), key=lambda what: what.position)
        checkpoints_cut += bool(disk.files.get("oona.sqlite", File()).since)
        for name, decides in (("nothing", None), ("some", chance)):
            folder = tmp_path / f"cut-{index}-{name}"
            disk.write_to(folder, decides)
            records, committed = await recovered(folder / "oona.sqlite")
            assert records <= published
            if durability == "fsync":
                assert records >= sure.records, f"{sure.records} were confirmed, {records} are left"
                assert committed >= sure.committed
            lost += records < sure.records
            shutil.rmtree(folder)
    # The cuts did find what there is to find: writes to the log's own file under way, and, where only the page cache
    # has them, confirmed records that are gone.
    assert checkpoints_cut
    assert (lost > 0) == (durability == "page_cache")
