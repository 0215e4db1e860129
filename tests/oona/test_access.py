"""The rules of who may do what, and of how much: without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperml.client import new_event
from esperml.contract import KINDS
from esperml.oona import Doors
from esperml.oona.access import (
    CALLER,
    PUBLISHES,
    READS,
    Caller,
    Role,
    RunPatterns,
    check_publish,
    check_runs,
    check_subscribe,
    check_twins,
)
from esperml.oona.admission import TurnedAwayError
from esperml.oona.rate import TokenBucket
from esperml.oona.refusals import INTERVAL_S, RefusalLog
from esperml.oona.rejection import RequestRejectedError
from esperml.settings import OonaSettings
from esperml.v1 import event_pb2, oona_pb2, run_pb2

EVENTS, COMMANDS, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_COMMANDS, event_pb2.KIND_TELEMETRY
UNKNOWN = 99


def caller(role: Role, *runs: str) -> Caller:
    return Caller("somebody", role, RunPatterns(runs or ("*",)), "00000000")


def publish(kind=EVENTS, *runs: str, first: int = 1) -> oona_pb2.Publish:
    events = [new_event(run, run_ended=run_pb2.RunEnded()) for run in runs or ("run",)]
    return oona_pb2.Publish(kind=kind, first_sequence=first, events=events)


def refusal(check, *arguments) -> str:
    with pytest.raises(RequestRejectedError) as caught:
        check(*arguments)
    assert caught.value.reason == oona_pb2.REJECT_REASON_FORBIDDEN
    return caught.value.message


@given(st.sampled_from(Role), st.sampled_from(KINDS))
def test_each_role_publishes_and_reads_its_kinds_and_no_others(role, kind):
    somebody = caller(role)
    subscribe = oona_pb2.Subscribe(subscription_id=1, kind=kind, run_ids=["run"])
    if kind in PUBLISHES[role]:
        check_publish(somebody, kind)
    else:
        assert f"may not publish {event_pb2.Kind.Name(kind)[5:].lower()}" in refusal(check_publish, somebody, kind)
    if kind in READS[role]:
        check_subscribe(somebody, subscribe)
    else:
        assert "may not read" in refusal(check_subscribe, somebody, subscribe)


def test_what_is_no_kind_is_left_to_who_checks_fields():
    check_publish(caller(Role.VIEWER), UNKNOWN)
    check_subscribe(caller(Role.HOST), oona_pb2.Subscribe(kind=UNKNOWN, run_ids=["run"]))


def test_only_controllers_publish_commands_and_hosts_read_only_theirs():
    assert [role for role in Role if COMMANDS in PUBLISHES[role]] == [Role.CONTROLLER, Role.ADMIN]
    host = caller(Role.HOST, "mine-*")
    check_subscribe(host, oona_pb2.Subscribe(kind=COMMANDS, run_ids=["mine-1", "mine-2"]))
    assert "run 'other'" in refusal(
        check_subscribe, host, oona_pb2.Subscribe(kind=COMMANDS, run_ids=["mine-1", "other"])
    )
    assert "must name the runs" in refusal(check_subscribe, host, oona_pb2.Subscribe(kind=COMMANDS))
    everywhere = caller(Role.HOST)
    assert "must name the runs" in refusal(check_subscribe, everywhere, oona_pb2.Subscribe(kind=COMMANDS))


def test_one_event_of_another_run_refuses_the_frame():
    host = caller(Role.HOST, "mine")
    check_runs(host, ["mine", "mine"])
    check_runs(caller(Role.HOST), ["mine", "other"])
    assert "run 'other' is not one of those of token 'somebody' (role host, runs mine)" in refusal(
        check_runs, host, ["mine", "other", "mine"]
    )


def test_a_twin_must_be_one_of_the_callers_runs():
    starts = [new_event("mine", run_started=run_pb2.RunStarted(paired_run=twin)) for twin in ("", "mine-0", "other")]
    named = oona_pb2.Publish(kind=EVENTS, first_sequence=1, events=starts)
    assert refusal(check_twins, caller(Role.HOST, "mine*"), named).startswith(
        "publish.events[2].run_started.paired_run: run 'other' is not one of those of token 'somebody'"
    )
    check_twins(caller(Role.HOST, "mine*", "other"), named)
    check_twins(caller(Role.HOST), named)
    ends = publish(EVENTS, "mine")
    check_twins(caller(Role.HOST, "mine"), ends)
    assert not ends.events[0].HasField("run_started")


@pytest.mark.parametrize("role", [Role.HOST, Role.VIEWER])
def test_groups_are_for_those_whose_work_they_divide(role):
    subscribe = oona_pb2.Subscribe(kind=COMMANDS, run_ids=["run"], group="tamiyo")
    assert "may not join groups" in refusal(check_subscribe, caller(role), subscribe)
    check_subscribe(caller(Role.CONTROLLER), subscribe)
    assert "may not join groups" in refusal(check_subscribe, caller(Role.CONTROLLER, "run"), subscribe)


names = st.text(st.characters(exclude_characters="*", categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@given(names, names)
def test_a_pattern_means_a_run_or_a_beginning_and_nothing_else(pattern, run):
    assert (run in RunPatterns([pattern])) is (run == pattern)
    assert (run in RunPatterns([pattern + "*"])) is run.startswith(pattern)
    assert run in RunPatterns(["*"])
    assert run in RunPatterns([pattern, run])


@pytest.mark.parametrize("pattern", ["", "a" * 129, "a*b", "**", "new\nline", "\x00"])
def test_a_pattern_that_cannot_be_meant_is_refused(pattern):
    with pytest.raises(ValueError, match="run"):
        RunPatterns([pattern])


def test_a_token_without_runs_is_refused():
    with pytest.raises(ValueError, match="at least one run"):
        RunPatterns([])


def test_patterns_are_the_same_in_any_order():
    assert RunPatterns(["a", "b*"]) == RunPatterns(["b*", "a"])
    assert hash(RunPatterns(["a", "b*"])) == hash(RunPatterns(["b*", "a"]))
    assert RunPatterns(["a"]) != RunPatterns(["b"])


def test_a_client_of_another_token_is_another_publisher():
    ours, theirs = caller(Role.HOST), Caller("else", Role.HOST, RunPatterns(["*"]))
    assert ours.publisher("session") != theirs.publisher("session")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 400)), min_size=1, max_size=60))
def test_a_bucket_lets_through_no_more_than_its_rate_but_for_one_second_and_one_frame(steps):
    clock, taken, largest = Clock(), 0, 0
    bucket = TokenBucket(100.0, clock)
    for pause_s, amount in steps:
        clock.now_s += pause_s
        if bucket.wait_s() == 0:
            bucket.take(amount)
            taken, largest = taken + amount, max(largest, amount)
        assert taken <= 100 * (1 + clock.now_s) + largest + 1e-6


@given(st.integers(1, 10_000))
def test_a_bucket_has_something_after_the_time_that_it_says(amount):
    clock = Clock()
    bucket = TokenBucket(100.0, clock)
    bucket.take(amount)
    wait_s = bucket.wait_s()
    clock.now_s += wait_s + 1e-3
    assert bucket.wait_s() == 0
    assert wait_s <= max(0.0, (amount - 100) / 100) + 1e-3 + 1e-9


def open_doors(clock=None, **settings) -> Doors:
    return Doors(OonaSettings(**settings), *(() if clock is None else (clock,)))


async def test_over_its_rate_a_stream_waits_then_is_told_when_to_come_back():
    clock = Clock()
    doors = open_doors(clock, publish_events_per_s=2)
    with doors.admit("ipv4:127.0.0.1:1") as stream:
        stream.publisher("a", lambda *_: None)
        await stream.check_publish(publish(EVENTS, *["run"] * 8))
        with pytest.raises(RequestRejectedError) as caught:
            await stream.check_publish(publish(first=9))
        assert caught.value.reason == oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED
        assert caught.value.to_proto().retry_after.ToTimedelta().total_seconds() == pytest.approx(3)
        assert "2 events/s is the limit for one client" in caught.value.message
        clock.now_s += 3.01
        await stream.check_publish(publish(first=9))


async def test_a_short_time_over_the_rate_is_waited_for_without_a_word():
    doors = open_doors(publish_bytes_per_s=10_000)
    frame = publish(EVENTS, *["run"] * 50)
    with doors.admit("ipv4:127.0.0.1:1") as stream:
        stream.publisher("a", lambda *_: None)
        for _ in range(12_000 // frame.ByteSize() + 1):
            await stream.check_publish(frame)


async def test_the_streams_of_one_client_share_its_rate_and_rates_that_rest_are_forgotten(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("esperml.oona.admission._MAX_RATES", 2)
    doors = open_doors(clock, publish_events_per_s=10)
    first = doors.rates("a")
    assert doors.rates("a") is first
    first.take(publish())
    doors.rates("b")
    doors.rates("c")
    assert doors.rates("a") is first
    clock.now_s += 10
    doors.rates("d")
    assert doors.rates("a") is not first


async def test_streams_and_subscriptions_are_limited_each_with_words_of_its_own():
    doors = open_doors(max_streams=3, max_streams_per_token=1, max_subscriptions=1)
    token = CALLER.set(caller(Role.VIEWER))
    try:
        with doors.admit("p") as stream:
            stream.check_subscribe(oona_pb2.Subscribe(kind=EVENTS), standing=0)
            with pytest.raises(RequestRejectedError, match="1 subscriptions, the limit"):
                stream.check_subscribe(oona_pb2.Subscribe(kind=EVENTS), standing=1)
            with pytest.raises(TurnedAwayError, match="token 'somebody' has 1 streams open"), doors.admit("p"):
                pass
    finally:
        CALLER.reset(token)
    with doors.admit("p"), doors.admit("p"), doors.admit("p"):
        with pytest.raises(TurnedAwayError, match="3 streams are open"), doors.admit("p"):
            pass
        assert len(doors.inside) == 3
    assert not doors.inside


def test_a_failure_to_store_is_trouble_until_none_has_come_for_a_while():
    clock = Clock()
    doors = open_doors(clock)
    assert doors.storage_problem == ""
    doors.not_stored("the disk is full")
    clock.now_s += 9
    assert doors.storage_problem == "the disk is full"
    clock.now_s += 2
    assert doors.storage_problem == ""


def test_a_refusal_is_logged_once_in_a_while_and_the_rest_are_counted(capsys, monkeypatch):
    clock = Clock()
    log = RefusalLog(clock)

    def lines() -> int:
        return capsys.readouterr().out.count("refused")

    for port in range(5):
        log.refused("the token is unknown", method="Oona.Stream", peer=f"ipv4:192.0.2.1:{port}", caller=None)
    assert lines() == 1
    log.refused("the token is unknown", method="Oona.Stream", peer="ipv4:192.0.2.2:1", caller=None)
    for run in range(5):
        detail = f"publish.events: run 'r{run}' is not one of those"
        log.refused(detail, method="Oona.Stream", peer="ipv4:192.0.2.1:1", caller=caller(Role.HOST), client_id="c")
    assert lines() == 2
    clock.now_s += INTERVAL_S
    log.refused("the token is unknown", method="Oona.Stream", peer="ipv4:192.0.2.1:7", caller=None)
    said = capsys.readouterr().out
    assert "repeated=4" in said
    monkeypatch.setattr("esperml.oona.refusals._MAX_KEPT", 3)
    for host in range(10):
        log.refused("no", method="Oona.Stream", peer=f"ipv4:192.0.2.{host}:7", caller=None)
    assert len(log._kept) <= 5
