"""What a session cannot send is on disk, whole, and comes back once and in order."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from structlog.testing import capture_logs

from esperml.client import NotARecordingError, Recorder, new_event
from esperml.client.recording import describe, read_labels
from esperml.kasmina import backlog as backlogs
from esperml.kasmina import spool
from esperml.kasmina.backlog import Backlog
from esperml.kasmina.outbox import Outbox
from esperml.kasmina.spool import Begun, SpoolFile, SpoolOptions
from esperml.v1 import health_pb2, run_pb2

sys.path.insert(0, str(Path(__file__).parent))
from spooled import EVENTS, OUTCOMES, TELEMETRY, begun, ended, entries, entry, steps_in


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def options(folder) -> SpoolOptions:
    return SpoolOptions(folder)


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """As on a full disk: what goes beyond is refused by the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The file.


def test_events_come_back_in_order_while_more_are_written(folder):
    file = SpoolFile(folder, begun(), entries(0, 1), max_bytes=10**6)
    assert [entry.event.run_ended.step for entry in file.peek(1)] == [0]
    file.add(entries(2, 3))
    assert [entry.event.run_ended.step for entry in file.peek(64)] == [0, 1, 2, 3]
    file.sent(3)
    file.add(entries(4))
    assert [entry.event.run_ended.step for entry in file.peek(64)] == [3, 4]
    assert file.unsent == 2
    file.close()
    assert steps_in(file.path) == [0, 1, 2, 3, 4]
    assert not describe(file.path).truncated


def test_a_file_that_was_sent_is_deleted(folder):
    file = SpoolFile(folder, begun(), entries(0), max_bytes=10**6)
    file.sent(1)
    file.close()
    assert list(folder.iterdir()) == []


def test_events_of_several_kinds_are_handed_out_one_kind_at_a_time(folder):
    mixed = [entry(kind, ended(step)) for step, kind in enumerate((EVENTS, EVENTS, OUTCOMES, EVENTS))]
    file = SpoolFile(folder, begun(), mixed, max_bytes=10**6)
    handed = []
    while file.unsent:
        batch = file.peek(64)
        handed.append((batch[0].kind, len(batch)))
        file.sent(len(batch))
    assert handed == [(EVENTS, 2), (OUTCOMES, 1), (EVENTS, 1)]
    file.close()


def test_a_file_cut_off_anywhere_behind_a_sync_gives_back_what_was_synced(folder, tmp_path):
    file = SpoolFile(folder, begun(first=7, under_way=1), entries(0, 1), max_bytes=10**6)
    synced = [(file.path.stat().st_size, 2)]
    for step in (2, 3):
        file.add(entries(step))
        synced.append((file.path.stat().st_size, step + 1))
    whole = file.path.read_bytes()
    file.close()
    cut = tmp_path / "cut.mcap"
    for size in range(synced[0][0], len(whole) + 1, 7):
        cut.write_bytes(whole[:size])
        at_least = max(count for least, count in synced if least <= size)
        assert steps_in(cut)[:at_least] == list(range(at_least))
        assert Begun.from_labels(read_labels(cut)) == begun(first=7, under_way=1)


def test_a_disk_that_is_full_leaves_the_file_as_it_was(folder):
    file = SpoolFile(folder, begun(), entries(0, 1), max_bytes=10**9)
    size = file.path.stat().st_size
    large = new_event("r", run_ended=run_pb2.RunEnded(step=2, error=os.urandom(200_000).hex()))
    with no_file_larger_than(size + 1000), pytest.raises(OSError, match="File too large"):
        file.add([entry(EVENTS, large)])
    assert file.path.stat().st_size == size
    with pytest.raises(OSError, match="an earlier write failed"):
        file.add(entries(3))
    assert [entry.event.run_ended.step for entry in file.peek(64)] == [0, 1]
    file.close()
    assert steps_in(file.path) == [0, 1]


def test_a_file_that_cannot_be_begun_is_not_there(folder):
    folder.mkdir()
    with no_file_larger_than(100), pytest.raises(OSError, match="File too large"):
        SpoolFile(folder, begun(), entries(0), max_bytes=10**6)
    assert list(folder.iterdir()) == []


def test_the_folder_is_bounded_whoever_wrote_what_is_in_it(folder):
    file = SpoolFile(folder, begun(), entries(0), max_bytes=50_000)
    (folder / "other").write_bytes(bytes(50_000))
    with pytest.raises(OSError, match="at its bound of 50,000 bytes"):
        file.add(entries(1))
    (folder / "other").unlink()
    file.add(entries(1))
    assert steps_in(file.path) == [0, 1]
    file.close()


def test_a_file_that_somebody_damages_is_not_read_for_ever(folder):
    file = SpoolFile(folder, begun(), entries(0), max_bytes=10**6)
    os.truncate(file.path, 20)
    with pytest.raises(OSError, match=file.path.name):
        file.peek(64)
    file.close()


def test_the_folder_is_the_users_own_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert SpoolOptions().resolved() == tmp_path / "esper" / "spool"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert SpoolOptions().resolved() == Path.home() / ".local" / "state" / "esper" / "spool"
    monkeypatch.setenv("ESPER_SPOOL", str(tmp_path / "named"))
    assert SpoolOptions().resolved() == tmp_path / "named"
    assert SpoolOptions("here").resolved() == Path("here")
    with pytest.raises(ValueError, match="max_bytes must be at least 1, not 0"):
        SpoolOptions(max_bytes=0)


def test_only_its_user_can_look_into_the_folder(folder):
    SpoolFile(folder, begun(), entries(0), max_bytes=10**6).close()
    assert folder.stat().st_mode & 0o777 == 0o700


# The backlog, whatever happens in whatever order.


class BacklogMachine(RuleBasedStateMachine):
    """Events go in by the session and come out by the link; disk and network fail now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "spool"
        self.outbox = Outbox()
        self.backlog = self.make("session-1")
        self.published = 0
        self.out: list[int] = []
        self.batch = None
        self.sequence = 1

    def make(self, client_id: str) -> Backlog:
        return Backlog(self.outbox, SpoolOptions(self.folder), target="t", run_id="r", client_id=client_id)

    def teardown(self) -> None:
        self.backlog.close()
        self.temporary.cleanup()

    @rule(outcome=st.booleans(), times=st.integers(1, 5))
    def publish(self, outcome, times):
        for _ in range(times):
            self.outbox.put(OUTCOMES if outcome else EVENTS, ended(self.published))
            self.published += 1

    @rule()
    def report(self):
        self.outbox.put(TELEMETRY, new_event("r", health_report=health_pb2.HealthReport(step=self.published)))
        self.published += 1

    @rule()
    def take(self):
        if self.batch is None:
            self.batch = self.backlog.take(self.sequence)

    @rule()
    def confirm(self):
        if self.batch is not None:
            for entry in self.batch.entries:
                payload = entry.event.health_report if self.batch.kind == TELEMETRY else entry.event.run_ended
                self.out.append(payload.step)
            if self.batch.client_id == "session-1":
                self.sequence += len(self.batch.entries)
            self.batch = None
            self.backlog.done(stored=True)

    @rule()
    def lose_the_stream(self):
        if self.batch is not None:
            self.batch = None
            self.backlog.put_back()

    @rule()
    def keep(self):
        self.backlog.keep()

    @invariant()
    def in_order_and_once(self):
        assert self.out == list(range(len(self.out)))

    @invariant()
    def nothing_is_lost(self):
        assert self.backlog.unsent == self.published - len(self.out)

    @invariant()
    def a_file_is_there_while_something_is_in_it(self):
        files = list(self.folder.iterdir()) if self.folder.exists() else []
        assert len(files) == (self.backlog.spooled > 0)


TestBacklog = BacklogMachine.TestCase
TestBacklog.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_disk_that_takes_nothing_is_told_of_once_and_tried_again(folder, monkeypatch):
    folder.write_text("no folder")
    outbox = Outbox()
    backlog = Backlog(outbox, SpoolOptions(folder), target="t", run_id="r", client_id="c")
    monkeypatch.setattr(backlogs, "_RETRY_S", 0.0)
    outbox.put(EVENTS, ended(0))
    with capture_logs() as logs:
        backlog.keep()
        backlog.keep()
    assert [entry["event"] for entry in logs] == ["spool_unusable"]
    assert outbox.others == 1
    folder.unlink()
    backlog.keep()
    assert (outbox.others, backlog.spooled) == (0, 1)
    backlog.close()


def test_what_cannot_be_read_back_stands_in_nobodys_way(folder, options):
    outbox = Outbox()
    backlog = Backlog(outbox, options, target="t", run_id="r", client_id="c")
    outbox.put(EVENTS, ended(0))
    backlog.keep()
    [path] = folder.iterdir()
    os.truncate(path, 20)
    outbox.put(EVENTS, ended(1))
    with capture_logs() as logs:
        batch = backlog.take(1)
    assert batch is not None
    assert [entry.event.run_ended.step for entry in batch.entries] == [1]
    assert [entry["event"] for entry in logs] == ["spool_unreadable"]
    assert path.exists()


def test_nothing_is_written_without_a_folder_or_before_its_time(folder, options):
    outbox = Outbox()
    outbox.put(EVENTS, ended(0))
    Backlog(outbox, None, target="t", run_id="r", client_id="c").keep()
    Backlog(outbox, options, target="t", run_id="r", client_id="c").keep(older_than_s=60)
    assert outbox.others == 1
    assert not folder.exists()


def test_what_was_stored_before_the_stream_ended_is_not_sent_by_a_new_one(options):
    outbox = Outbox()
    backlog = Backlog(outbox, options, target="t", run_id="r", client_id="c")
    outbox.put(EVENTS, ended(0))
    backlog.take(1)
    backlog.put_back()
    outbox.put(EVENTS, ended(1))
    backlog.resume(2)
    batch = backlog.take(2)
    assert batch is not None
    assert [entry.event.run_ended.step for entry in batch.entries] == [1]


def test_files_cannot_be_locked_everywhere(monkeypatch, folder):
    monkeypatch.setattr(spool.sys, "platform", "win32")
    with pytest.raises(OSError, match="Windows"):
        SpoolFile(folder, begun(), entries(0), max_bytes=10**6)
    assert list(folder.iterdir()) == []


def test_labels_are_of_recordings_alone(tmp_path):
    garbage = tmp_path / "garbage.mcap"
    garbage.write_bytes(b"garbage, and more of it")
    with pytest.raises(NotARecordingError):
        read_labels(garbage)
    with Recorder(tmp_path / "plain.mcap") as recorder:
        recorder.write(EVENTS, ended(0))
    assert read_labels(tmp_path / "plain.mcap") == {}
