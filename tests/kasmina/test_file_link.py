"""A session without a server, recorded in a file."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from structlog.testing import capture_logs

from esperml import kasmina
from esperml.client import describe, new_event, read
from esperml.kasmina import file_link
from esperml.v1 import event_pb2, health_pb2, run_pb2

DEADLINE_S = 30


def train(case, target, *, steps=20):
    here = case("mlp")
    with kasmina.connect(target, here.model, here.optimizer, run="r", mode="act", report_every=5) as session:
        losses = [here.step(session) for _ in range(steps)]
    return here, session, losses


def test_everything_that_a_session_says_is_in_the_file_in_order(case, tmp_path):
    path = tmp_path / "run.mcap"
    _, session, _ = train(case, kasmina.FileLink(path))
    first, *reports, last = [recorded.event.WhichOneof("payload") for recorded in read(path)]
    assert (first, last) == ("run_started", "run_ended")
    assert reports == ["health_report"] * session.summary().reports
    assert not describe(path).truncated
    assert session.failure == ""
    assert session.summary().connected


def test_a_recorded_run_trains_like_one_that_nobody_watches(case, tmp_path, bench):
    recorded, _, losses = train(case, kasmina.FileLink(tmp_path / "run.mcap"))
    watched, _, others = train(case, bench.link)
    assert losses == others
    for a, b in zip(recorded.model.state_dict().values(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_recording_is_not_written_over(tmp_path):
    path = tmp_path / "run.mcap"
    kasmina.FileLink(path).close(DEADLINE_S)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="there is a recording already"):
        kasmina.FileLink(path)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_told_of_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        kasmina.FileLink(tmp_path / "nowhere" / "run.mcap")


def test_what_was_said_can_be_read_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(file_link, "_WRITE_INTERVAL_S", 0.01)
    path = tmp_path / "run.mcap"
    link = kasmina.FileLink(path)
    assert isinstance(link, kasmina.Link)
    link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded(step=1)))
    end = time.monotonic() + DEADLINE_S
    while not describe(path).counts:
        assert time.monotonic() < end, "waited in vain"
    assert describe(path).truncated
    assert link.received() == []
    link.close(DEADLINE_S)
    link.close(DEADLINE_S)
    assert not describe(path).truncated


def test_a_disk_that_is_full_ends_the_recording_and_not_the_run(tmp_path):
    path = tmp_path / "run.mcap"
    link = kasmina.FileLink(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with capture_logs() as logs:
            for step in range(3):
                report = health_pb2.HealthReport(step=step)
                link.publish(event_pb2.KIND_TELEMETRY, new_event("r", health_report=report))
                link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded(step=step)))
            link.close(DEADLINE_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry["event"] for entry in logs] == ["recording_failed"]
    statistics = link.statistics()
    assert (statistics.reports_dropped, statistics.others_dropped) == (3, 3)
    assert not statistics.connected
