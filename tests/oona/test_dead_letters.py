"""Records given back, given up, listed, replayed and purged, over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from esperml.v1 import event_pb2, oona_pb2, oona_pb2_grpc

EVENTS = event_pb2.KIND_EVENTS
AT_ONCE = Duration()


def subscribe(subscription_id: int = 1, max_attempts: int = 2, **fields) -> oona_pb2.Subscribe:
    redelivery = oona_pb2.Redelivery(max_attempts=max_attempts, min_delay=AT_ONCE, max_delay=AT_ONCE)
    values = {"kind": EVENTS, "group": "g", "redelivery": redelivery}
    return oona_pb2.Subscribe(subscription_id=subscription_id, **(values | fields))


def ack(*, acked=(), nacked=(), subscription_id: int = 1) -> oona_pb2.Ack:
    ranges = [oona_pb2.OffsetRange(first=first, last=last) for first, last in acked]
    return oona_pb2.Ack(subscription_id=subscription_id, acked=ranges, nacked=nacked)


@pytest.fixture
def store(bus, make_event):
    """Stores one frame of events of these runs, one letter each."""

    async def store(runs: str) -> None:
        events = [make_event(run, mark=str(number)) for number, run in enumerate(runs)]
        first = await bus.broker.next_sequence("publisher")
        await bus.broker.publish("publisher", oona_pb2.Publish(kind=EVENTS, first_sequence=first, events=events))

    return store


@pytest.fixture
async def calls(bus):
    """Calls outside the stream."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect() -> oona_pb2_grpc.OonaStub:
            return oona_pb2_grpc.OonaStub(await stack.enter_async_context(grpc.aio.insecure_channel(bus.target)))

        yield connect


async def letters(calls, count: int) -> list[oona_pb2.DeadLetter]:
    """The group's dead letters, as soon as there are so many."""
    stub = await calls()
    while True:
        listed = (await stub.ListDeadLetters(oona_pb2.ListDeadLettersRequest(kind=EVENTS, group="g"))).dead_letters
        if len(listed) == count:
            return list(listed)


async def joined(stream, **fields) -> None:
    answer = await stream.answer(subscribe=subscribe(**fields))
    assert answer.HasField("subscribed"), answer
    await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=1000))


async def record_at(stream, offset: int) -> event_pb2.Record:
    """Read until a record comes."""
    while True:
        for record in await stream.records(1):
            if record.offset == offset:
                return record


async def fail(stream, offset: int, attempts: int) -> None:
    """Give a record back as often as it comes."""
    for attempt in range(1, attempts + 1):
        assert (await record_at(stream, offset)).delivery_attempt == attempt
        await stream.answer(ack=ack(nacked=[offset]))


async def test_a_record_that_failed_too_often_is_kept_as_a_dead_letter_and_its_run_goes_on(
    bus, open_stream, store, calls
):
    async with open_stream(bus.target) as stream:
        await store("ab")
        await joined(stream, max_attempts=3)
        await fail(stream, 0, attempts=3)
        await stream.answer(ack=ack(acked=[(1, 1)]))
        await store("a")
        assert [record.offset for record in await stream.records(1)] == [2]
        [letter] = await letters(calls, 1)
        assert (letter.record.offset, letter.record.event.run_ended.error) == (0, "0")
        assert letter.record.delivery_attempt == 3
        assert letter.reason == oona_pb2.DEAD_LETTER_REASON_NACKED
        assert not letter.replaying
        assert letter.time.ToNanoseconds() >= letter.record.append_time.ToNanoseconds() > 0
        [group] = (await (await calls()).DescribeTopic(oona_pb2.DescribeTopicRequest(kind=EVENTS))).groups
        assert (group.committed_offset, group.dead_letters) == (2, 1)


async def test_a_dead_letter_outlives_the_log_and_the_server(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("a")
        await joined(stream, max_attempts=1)
        await fail(stream, 0, attempts=1)
        await store("a")
        await stream.records(1)
    await bus.broker.purge(EVENTS, 1)
    await bus.stop()
    await bus.start()
    assert [letter.record.event.run_ended.error for letter in await letters(calls, 1)] == ["0"]
    assert bus.broker.groups(EVENTS)[0].dead_letters == 1


async def test_attempts_survive_the_server(bus, open_stream, store):
    await store("aa")
    async with open_stream(bus.target) as stream:
        await joined(stream, max_attempts=5)
        await stream.records(2)
        await stream.answer(ack=ack(nacked=[0]))
        # Delivered again, but not given back when the server ends: that does not count.
        assert [(r.offset, r.delivery_attempt) for r in await stream.records(2)] == [(0, 2), (1, 2)]
        await bus.stop()
    await bus.start()
    async with open_stream(bus.target) as stream:
        await joined(stream, max_attempts=5)
        assert [(r.offset, r.delivery_attempt) for r in await stream.records(2)] == [(0, 2), (1, 2)]


async def test_a_record_whose_readers_keep_dying_is_given_up(bus, open_stream, store, calls):
    await store("aa")
    for attempt in (1, 2):
        async with open_stream(bus.target, f"reader-{attempt}") as stream:
            await joined(stream, max_attempts=2)
            assert [r.delivery_attempt for r in await stream.records(2)] == [attempt] * 2
        while bus.broker.groups(EVENTS)[0].members:
            await bus.broker.next_sequence("nobody")
    async with open_stream(bus.target) as stream:
        await joined(stream, max_attempts=2)
        assert [(r.offset, r.delivery_attempt) for r in await stream.records(1)] == [(1, 3)]
        [letter] = await letters(calls, 1)
        assert (letter.record.offset, letter.reason) == (0, oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT)


async def test_a_replayed_letter_stays_one_until_it_is_acknowledged(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("aab")
        await joined(stream, max_attempts=1)
        await stream.records(3)
        await stream.answer(ack=ack(nacked=[0, 2]))
        await letters(calls, 2)
        replay = oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g", offsets=[0, 1, 77])
        assert (await (await calls()).ReplayDeadLetters(replay)).count == 1
        assert (await (await calls()).ReplayDeadLetters(replay)).count == 0
        record = await record_at(stream, 0)
        assert (record.delivery_attempt, record.event.run_ended.error) == (1, "0")
        assert [(one.record.offset, one.replaying) for one in await letters(calls, 2)] == [(0, True), (2, False)]
        await stream.answer(ack=ack(acked=[(0, 0)]))
        assert [(one.record.offset, one.replaying) for one in await letters(calls, 1)] == [(2, False)]
        assert bus.broker.groups(EVENTS)[0].dead_letters == 1


async def test_a_replay_survives_the_server_and_is_delivered_below_the_floor(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("a")
        await joined(stream, max_attempts=1)
        await fail(stream, 0, attempts=1)
        await store("b")
        await stream.records(1)
        await stream.answer(ack=ack(acked=[(1, 1)]))
    await store("b")
    await bus.broker.purge(EVENTS, 1)
    every = oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g")
    assert (await (await calls()).ReplayDeadLetters(every)).count == 1
    await bus.stop()
    await bus.start()
    async with open_stream(bus.target) as stream:
        await joined(stream, max_attempts=1)
        assert sorted(record.offset for record in await stream.records(2)) == [0, 2]
        await stream.answer(ack=ack(acked=[(0, 2)]))
    assert await letters(calls, 0) == []


async def test_a_letter_that_fails_again_stays_a_letter_and_its_replay_ends(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("a")
        await joined(stream, max_attempts=2)
        await fail(stream, 0, attempts=2)
        every = oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g")
        await (await calls()).ReplayDeadLetters(every)
        await fail(stream, 0, attempts=2)
        await store("b")
        assert [record.offset for record in await stream.records(1)] == [1]
        [letter] = await letters(calls, 1)
        assert (letter.replaying, letter.record.delivery_attempt) == (False, 2)
        assert (await (await calls()).ReplayDeadLetters(every)).count == 1


async def test_a_member_that_leaves_hands_replayed_letters_over(bus, open_stream, store, calls):
    async with open_stream(bus.target, "one") as one:
        await store("a")
        await joined(one, max_attempts=1)
        await fail(one, 0, attempts=1)
        await store("a")
        await one.records(1)
        await one.answer(ack=ack(acked=[(1, 1)]))
    async with open_stream(bus.target, "two") as two, open_stream(bus.target, "three") as three:
        await joined(two, max_attempts=3)
        await (await calls()).ReplayDeadLetters(oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g"))
        assert [(r.offset, r.delivery_attempt) for r in await two.records(1)] == [(0, 1)]
        await joined(three, max_attempts=3)
        await two.answer(unsubscribe=oona_pb2.Unsubscribe(subscription_id=1))
        assert [(r.offset, r.delivery_attempt) for r in await three.records(1)] == [(0, 2)]


async def test_letters_come_a_page_at_a_time_and_can_be_purged(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("abcde")
        await joined(stream, max_attempts=1)
        await stream.records(5)
        await stream.answer(ack=ack(nacked=range(5)))
        await letters(calls, 5)
        stub = await calls()
        page = await stub.ListDeadLetters(oona_pb2.ListDeadLettersRequest(kind=EVENTS, group="g", limit=2))
        assert [letter.record.offset for letter in page.dead_letters] == [0, 1]
        assert page.next_offset == 2
        page = await stub.ListDeadLetters(oona_pb2.ListDeadLettersRequest(kind=EVENTS, group="g", from_offset=2))
        assert [letter.record.offset for letter in page.dead_letters] == [2, 3, 4]
        assert not page.HasField("next_offset")
        some = oona_pb2.PurgeDeadLettersRequest(kind=EVENTS, group="g", offsets=[1, 3, 99])
        assert (await stub.PurgeDeadLetters(some)).count == 2
        assert [letter.record.offset for letter in await letters(calls, 3)] == [0, 2, 4]
        every = oona_pb2.PurgeDeadLettersRequest(kind=EVENTS, group="g")
        assert (await stub.PurgeDeadLetters(every)).count == 3
        assert (await stub.PurgeDeadLetters(every)).count == 0
        assert await letters(calls, 0) == []


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": 77}, "kind: 77 is not a kind"),
        ({"group": ""}, "group: must have 1 to 128 characters, not 0"),
        ({"group": "nobody"}, "group: events has no group 'nobody'"),
    ],
)
async def test_what_is_no_group_is_refused_by_name(bus, calls, fields, problem):
    stub = await calls()
    values = {"kind": EVENTS, "group": "g"} | fields
    for call, request in (
        (stub.ListDeadLetters, oona_pb2.ListDeadLettersRequest(**values)),
        (stub.ReplayDeadLetters, oona_pb2.ReplayDeadLettersRequest(**values)),
        (stub.PurgeDeadLetters, oona_pb2.PurgeDeadLettersRequest(**values)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert problem in (caught.value.details() or "")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"group": "", "redelivery": oona_pb2.Redelivery()}, "subscribe.redelivery: is for groups"),
        ({"redelivery": oona_pb2.Redelivery(max_attempts=1001)}, "subscribe.redelivery.max_attempts: must be at most"),
        ({"redelivery": oona_pb2.Redelivery(min_delay=Duration(seconds=-1))}, "subscribe.redelivery.min_delay: must"),
        ({"redelivery": oona_pb2.Redelivery(max_delay=Duration(seconds=86_401))}, "subscribe.redelivery.max_delay"),
        (
            {"redelivery": oona_pb2.Redelivery(min_delay=Duration(seconds=2), max_delay=Duration(seconds=1))},
            "subscribe.redelivery.max_delay: 1 s is below min_delay, 2 s",
        ),
    ],
)
async def test_a_redelivery_that_cannot_be_is_refused_by_name(bus, open_stream, fields, problem):
    async with open_stream(bus.target) as stream:
        answer = await stream.answer(subscribe=subscribe(**fields))
        assert answer.rejected.reason == oona_pb2.REJECT_REASON_INVALID
        assert problem in answer.rejected.message


async def test_letters_that_cannot_be_stored_now_are_stored_with_the_next(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("ab")
        await joined(stream, max_attempts=1)
        await stream.records(2)
        refuse = "CREATE TRIGGER refuse BEFORE INSERT ON dead_letters BEGIN SELECT RAISE(ABORT, 'full'); END"
        bus.execute(refuse)
        await stream.answer(ack=ack(nacked=[0]))
        refused = await stream.answer(ack=ack(acked=[(1, 1)]))
        assert refused.rejected.reason == oona_pb2.REJECT_REASON_STORAGE
        bus.execute("DROP TRIGGER refuse")
        assert (await stream.answer(ack=ack(acked=[(1, 1)]))).acked.committed_offset == 2
        assert [letter.record.offset for letter in await letters(calls, 1)] == [0]
        bus.execute(refuse)
        every = oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (await calls()).ReplayDeadLetters(every)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        bus.execute("DROP TRIGGER refuse")
        assert [letter.replaying for letter in await letters(calls, 1)] == [False]
        assert (await (await calls()).ReplayDeadLetters(every)).count == 1


@contextlib.contextmanager
def stored_by_nobody(bus):
    """Have nobody store anything in the bus's log meanwhile. Gives an event that is set when the bus would."""
    begun = threading.Event()
    commit = bus.log._commit

    def begin(*arguments):
        begun.set()
        return commit(*arguments)

    with contextlib.closing(sqlite3.connect(bus.path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        bus.log._commit = begin
        try:
            yield begun
        finally:
            bus.log._commit = commit
            connection.execute("ROLLBACK")


async def cancelled_while_it_is_stored(bus, call) -> None:
    """Call, and cancel that as soon as the log is asked to store what it changes."""

    def handlers() -> int:
        return sum("_handle_rpc" in repr(task) for task in asyncio.all_tasks())

    before = handlers()
    with stored_by_nobody(bus) as begun:
        pending = call()
        while not begun.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0)
        pending.cancel()
        while handlers() > before:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_replay_whose_caller_is_gone_is_known_as_it_is_stored(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("a")
        await joined(stream, max_attempts=1)
        await fail(stream, 0, attempts=1)
        await letters(calls, 1)
        stub = await calls()
        every = oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g")
        await cancelled_while_it_is_stored(bus, lambda: stub.ReplayDeadLetters(every))
        assert (await record_at(stream, 0)).event.run_ended.error == "0"
        assert [letter.replaying for letter in await letters(calls, 1)] == [True]


async def test_a_purge_whose_caller_is_gone_is_known_as_it_is_stored(bus, open_stream, store, calls):
    async with open_stream(bus.target) as stream:
        await store("a")
        await joined(stream, max_attempts=1)
        await fail(stream, 0, attempts=1)
        await letters(calls, 1)
        stub = await calls()
        every = oona_pb2.PurgeDeadLettersRequest(kind=EVENTS, group="g")
        await cancelled_while_it_is_stored(bus, lambda: stub.PurgeDeadLetters(every))
        await letters(calls, 0)
        assert (await stub.PurgeDeadLetters(every)).count == 0
        assert bus.broker.groups(EVENTS)[0].dead_letters == 0


REFUSE_PROGRESS = "CREATE TRIGGER refuse BEFORE UPDATE ON groups {} BEGIN SELECT RAISE(ABORT, 'full'); END"


@pytest.fixture(params=["replay", "purge"])
def change_all(request):
    """Changes all dead letters over a stub, in each way in turn."""

    def change(stub: oona_pb2_grpc.OonaStub):
        if request.param == "replay":
            return stub.ReplayDeadLetters(oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g"))
        return stub.PurgeDeadLetters(oona_pb2.PurgeDeadLettersRequest(kind=EVENTS, group="g"))

    return change


async def test_a_change_that_is_refused_does_not_lose_a_letter_that_is_not_stored_yet(
    bus, open_stream, store, calls, change_all
):
    async with open_stream(bus.target) as stream:
        await store("ab")
        await joined(stream, max_attempts=1)
        await stream.records(2)
        bus.execute(REFUSE_PROGRESS.format(""))
        await stream.answer(ack=ack(nacked=[0]))
        while not bus.broker.groups(EVENTS)[0].dead_letters:  # noqa: ASYNC110
            await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await change_all(await calls())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        bus.execute("DROP TRIGGER refuse")
        assert (await stream.answer(ack=ack(acked=[(1, 1)]))).acked.committed_offset == 2
        assert [(one.record.offset, one.replaying) for one in await letters(calls, 1)] == [(0, False)]


async def test_a_change_that_is_refused_is_not_stored_by_what_is_acknowledged_meanwhile(
    bus, open_stream, store, calls, change_all
):
    async with open_stream(bus.target) as stream:
        await store("ab")
        await joined(stream, max_attempts=1)
        await stream.records(2)
        await stream.answer(ack=ack(nacked=[0]))
        await letters(calls, 1)
        group = bus.broker._groups[EVENTS, "g"]
        stub = await calls()
        # What is stored first is refused, what is stored after that is not.
        bus.execute(REFUSE_PROGRESS.format("WHEN NEW.committed = 1"))
        with stored_by_nobody(bus) as begun:
            pending = change_all(stub)
            while not begun.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0)
            acknowledged = asyncio.ensure_future(stream.answer(ack=ack(acked=[(1, 1)])))
            while group.state.committed < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pending
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await acknowledged).acked.committed_offset == 2
        assert [(one.record.offset, one.replaying) for one in await letters(calls, 1)] == [(0, False)]
        assert bus.broker.groups(EVENTS)[0].dead_letters == 1


async def test_a_letter_that_fails_again_while_it_is_purged_stays_in_the_list_and_can_be_purged(
    bus, open_stream, store, calls
):
    async with open_stream(bus.target) as stream:
        await store("ab")
        await joined(stream, max_attempts=1)
        await stream.records(2)
        await stream.answer(ack=ack(nacked=[0]))
        await letters(calls, 1)
        stub = await calls()
        await stub.ReplayDeadLetters(oona_pb2.ReplayDeadLettersRequest(kind=EVENTS, group="g"))
        await record_at(stream, 0)
        every = oona_pb2.PurgeDeadLettersRequest(kind=EVENTS, group="g")
        group = bus.broker._groups[EVENTS, "g"]
        with stored_by_nobody(bus) as begun:
            pending = stub.PurgeDeadLetters(every)
            while not begun.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0)
            await stream.send(ack=ack(nacked=[0]))
            while not group.letters.unsaved:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert (await pending).count == 1
        assert [one.replaying for one in await letters(calls, 1)] == [False]
        assert bus.broker.groups(EVENTS)[0].dead_letters == 1
        assert (await stub.PurgeDeadLetters(every)).count == 1
        await letters(calls, 0)
