"""A disk that is full, and then is not: publishers are told, lose nothing, and go on.

On a full disk nothing can be deleted from the log either, as SQLite has to write that down. What a purge can always
make room in is a log that ``oona.max_log_bytes`` limits; see ``test_sqlite_log.py``.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from esperml.client import Backoff, OonaClient
from esperml.oona.sqlite.salvage import examine
from esperml.v1 import event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
SPACE, MORE_SPACE = 6 * 2**20, 64 * 2**20
FRAMES, FRAME_EVENTS, MARK_BYTES = 300, 10, 5_000


@dataclass
class Disk:
    """Room for a log of some MiB: ``limit`` takes a server's process id and sets it, ``make_space`` makes more."""

    folder: Path
    limit: Callable[[int], None]
    make_space: Callable[[int], None]


@pytest.fixture
def tmpfs(tmp_path) -> Iterator[Disk]:
    """A file system of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")

    def make_space(pid: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={MORE_SPACE}", folder], check=True)

    yield Disk(folder, lambda pid: None, make_space)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def limited_files(tmp_path) -> Disk:
    """Files that may not grow beyond some size, which every system can have."""

    def limit(size: int) -> Callable[[int], None]:
        def set_limit(pid: int) -> None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return set_limit

    return Disk(tmp_path, limit(SPACE), limit(MORE_SPACE))


@pytest.fixture(params=["tmpfs", "limited_files"])
def disk(request) -> Disk:
    return request.getfixturevalue(request.param)


async def test_publishers_are_told_of_a_full_disk_and_lose_nothing(disk, start_bus_process, open_stream, make_event):
    path = disk.folder / "oona.sqlite"
    process = start_bus_process(path)
    disk.limit(process.process.pid)

    def frame(number: int) -> list[event_pb2.Event]:
        marks = range(number * FRAME_EVENTS, (number + 1) * FRAME_EVENTS)
        return [make_event(mark=f"{mark}".ljust(MARK_BYTES)) for mark in marks]

    async with (
        asyncio.timeout(60),
        OonaClient(process.target, client_id="p", backoff=Backoff(initial_s=0.01, longest_s=0.1)) as oona,
        open_stream(process.target, "told") as stream,
    ):
        publishing = [asyncio.create_task(oona.publish(EVENTS, frame(number))) for number in range(FRAMES)]
        # Another publisher is refused in words, and may try again on the same stream.
        publish = oona_pb2.Publish(kind=EVENTS, events=frame(0))
        sequence = 1
        while True:
            publish.first_sequence = sequence
            answer = await stream.answer(publish=publish)
            if answer.HasField("rejected"):
                break
            sequence += FRAME_EVENTS
        assert answer.rejected.reason == oona_pb2.REJECT_REASON_STORAGE
        assert "oona.sqlite: cannot store" in answer.rejected.message
        assert not all(task.done() for task in publishing)
        # What is stored can be read meanwhile.
        end = (await oona.describe(EVENTS)).topic.next_offset
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=end) as reader:
            assert len([record async for record in reader]) == end

        disk.make_space(process.process.pid)
        published = await asyncio.gather(*publishing)
        assert sum(one.count + one.duplicates for one in published) == FRAMES * FRAME_EVENTS
        assert (await stream.answer(publish=publish)).published.count == FRAME_EVENTS
        end = (await oona.describe(EVENTS)).topic.next_offset
        assert end == FRAMES * FRAME_EVENTS + sequence - 1 + FRAME_EVENTS
    process.kill()
    assert examine(path).is_whole
    process.start()
    async with (
        OonaClient(process.target, client_id="r") as oona,
        oona.subscribe(EVENTS, start=EARLIEST, end_offset=end) as reader,
    ):
        stored = [int(record.event.run_ended.error) async for record in reader]
    # The other publisher repeated the first frame.
    others = [number for number in stored if number < FRAME_EVENTS]
    assert len(others) == sequence - 1 + 2 * FRAME_EVENTS
    assert [number for number in stored if number >= FRAME_EVENTS] == list(range(FRAME_EVENTS, FRAMES * FRAME_EVENTS))
