"""The broker against a model of it that fits in the head: lists, sets and dictionaries."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from esperml.client import new_event
from esperml.oona import Broker, SqliteLog
from esperml.oona.log import SequenceGapError
from esperml.oona.members import MemberReader
from esperml.oona.rejection import RequestRejectedError
from esperml.settings import OonaSettings, RedeliverySettings
from esperml.v1 import event_pb2, oona_pb2, run_pb2

KIND = event_pb2.KIND_EVENTS
RUNS = ("run-a", "run-b", "run-c")
PUBLISHERS = ("p", "q")
# So long that no deadline passes within a test; deadlines have tests of their own, with a clock of their own.
REDELIVERY = RedeliverySettings(max_attempts=1000, min_delay_s=0, max_delay_s=0)
SETTINGS = OonaSettings(ack_deadline_s=3600, delivery_records=3, redelivery=REDELIVERY)


class Reader:
    """A subscription whose deliveries are collected."""

    def __init__(self) -> None:
        self.records: list[event_pb2.Record] = []
        self.closed = oona_pb2.Closed()
        self.caught_up = 0
        # Of members of the group only.
        self.subscription: MemberReader
        self.task: asyncio.Task[None]
        self.held: dict[int, event_pb2.Record] = {}
        self.owned: set[str] = set()
        self.credit = 0

    async def emit(self, response: oona_pb2.StreamResponse | bytes) -> None:
        if isinstance(response, bytes):
            response = oona_pb2.StreamResponse.FromString(response)
        self.records += response.delivery.records
        if response.HasField("closed"):
            self.closed = response.closed
        if response.HasField("progress"):
            self.caught_up = response.progress.high_watermark


class BrokerMachine(RuleBasedStateMachine):
    """Publishes, reads, acknowledges, kills and restarts; the model says what must be there."""

    members: Bundle[Reader] = Bundle("members")
    broker: Broker
    is_open = False

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        # The model: what is stored, and what the group has done.
        self.stored: list[tuple[str, str]] = []
        self.frames: list[tuple[int, int]] = []
        self.floor = 0
        self.sequences = dict.fromkeys(PUBLISHERS, 0)
        self.done: set[int] = set()
        self.live: list[Reader] = []
        self.number = 0
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.log = SqliteLog(Path(self.folder.name) / "log.sqlite")
        self.broker = Broker(self.log, SETTINGS)
        self.is_open = True

    def teardown(self) -> None:
        if self.is_open:
            for member in list(self.live):
                self.lose_member(member)
            self.runner.run(self.log.close())
            self.runner.close()
            self.folder.cleanup()

    # Publishing.

    @rule(publisher=st.sampled_from(PUBLISHERS), runs=st.lists(st.sampled_from(RUNS), min_size=1, max_size=5))
    def publish(self, publisher, runs) -> None:
        self._publish(publisher, self.sequences[publisher] + 1, runs, duplicates=0)

    @rule(
        publisher=st.sampled_from(PUBLISHERS),
        back=st.integers(1, 4),
        runs=st.lists(st.sampled_from(RUNS), min_size=1, max_size=5),
    )
    def publish_again(self, publisher, back, runs) -> None:
        first = max(self.sequences[publisher] + 1 - back, 1)
        self._publish(publisher, first, runs, min(self.sequences[publisher] + 1 - first, len(runs)))

    @rule(publisher=st.sampled_from(PUBLISHERS), gap=st.integers(1, 3))
    def publish_with_a_gap(self, publisher, gap) -> None:
        with pytest.raises(SequenceGapError) as caught:
            self._publish(publisher, self.sequences[publisher] + 1 + gap, ["run-a"], duplicates=0)
        assert caught.value.expected == self.sequences[publisher] + 1

    def _publish(self, publisher: str, first: int, runs: list[str], duplicates: int) -> None:
        marks = [f"{publisher}{first + index}" for index in range(len(runs))]
        events = [new_event(run, run_ended=run_pb2.RunEnded(error=mark)) for run, mark in zip(runs, marks, strict=True)]
        request = oona_pb2.Publish(kind=KIND, first_sequence=first, events=events)

        async def publish():
            return await self.broker.publish(publisher, request)

        appended = self.runner.run(publish())
        assert (appended.count, appended.duplicates) == (len(runs) - duplicates, duplicates)
        if appended.count:
            assert appended.first_offset == len(self.stored)
            self.frames.append((len(self.stored), len(self.stored) + appended.count))
        self.stored += list(zip(runs, marks, strict=True))[duplicates:]
        self.sequences[publisher] += appended.count
        self._settle()

    # Private readers.

    @rule(data=st.data(), filtered=st.sets(st.sampled_from(RUNS)))
    def replay(self, data, filtered) -> None:
        start = data.draw(st.integers(self.floor, len(self.stored)))
        end = data.draw(st.integers(start, len(self.stored)))
        reader = Reader()
        subscribe = oona_pb2.Subscribe(
            subscription_id=1,
            kind=KIND,
            run_ids=sorted(filtered),
            start=oona_pb2.StartAt(offset=start),
            end_offset=end,
        )

        async def read() -> None:
            subscription = await self.broker.subscribe(subscribe, reader.emit)
            subscription.grant(10**6, 0)
            try:
                await subscription.run()
            finally:
                subscription.close()

        self.runner.run(read())
        assert reader.closed.reason == oona_pb2.CLOSE_REASON_END_REACHED
        expected = [
            (offset, *self.stored[offset])
            for offset in range(start, end)
            if not filtered or self.stored[offset][0] in filtered
        ]
        assert [(r.offset, r.event.run_id, r.event.run_ended.error) for r in reader.records] == expected

    @precondition(lambda self: self.floor > 0)
    @rule(data=st.data())
    def replay_from_below_the_floor_is_refused(self, data) -> None:
        offset = data.draw(st.integers(0, self.floor - 1))
        subscribe = oona_pb2.Subscribe(subscription_id=1, kind=KIND, start=oona_pb2.StartAt(offset=offset))
        with pytest.raises(RequestRejectedError) as caught:
            self.runner.run(self.broker.subscribe(subscribe, Reader().emit))
        assert caught.value.earliest_offset == self.floor

    # The group.

    @precondition(lambda self: len(self.live) < 3)
    @rule(target=members)
    def join(self) -> Reader:
        member = Reader()
        self.number += 1

        async def subscribe() -> None:
            request = oona_pb2.Subscribe(subscription_id=self.number, kind=KIND, group="g")
            subscription = await self.broker.subscribe(request, member.emit)
            assert isinstance(subscription, MemberReader)
            member.subscription = subscription
            member.task = asyncio.create_task(member.subscription.run())

        self.runner.run(subscribe())
        self.live.append(member)
        return member

    @rule(member=members, credit=st.integers(1, 8))
    def deliver(self, member, credit) -> None:
        if member not in self.live:
            return
        member.credit += credit
        member.subscription.grant(credit, 0)
        self._settle()

    @rule(member=members, data=st.data())
    def ack(self, member, data) -> None:
        if member not in self.live or not member.held:
            return
        offsets = data.draw(st.sets(st.sampled_from(sorted(member.held)), min_size=1))
        ranges = [oona_pb2.OffsetRange(first=offset, last=offset) for offset in sorted(offsets)]
        self.done |= offsets
        for offset in offsets:
            del member.held[offset]
        self._ack(member, oona_pb2.Ack(acked=ranges))

    @rule(member=members)
    def ack_what_others_hold(self, member) -> None:
        if member in self.live:
            others = [o for other in self.live if other is not member for o in other.held]
            if others:
                self._ack(member, oona_pb2.Ack(acked=[oona_pb2.OffsetRange(first=o, last=o) for o in others]))

    @rule(member=members, data=st.data())
    def nack(self, member, data) -> None:
        if member not in self.live or not member.held:
            return
        offset = data.draw(st.sampled_from(sorted(member.held)))
        run = self.stored[offset][0]
        for later in [o for o in member.held if o >= offset and self.stored[o][0] == run]:
            del member.held[later]
        self._ack(member, oona_pb2.Ack(nacked=[offset]))

    @rule(member=consumes(members))
    def lose_member(self, member) -> None:
        if member not in self.live:
            return
        self.live.remove(member)

        async def leave() -> None:
            member.task.cancel()
            await asyncio.wait([member.task])
            member.subscription.close()

        self.runner.run(leave())
        self._settle()

    # The log.

    @rule()
    def restart_from_disk(self) -> None:
        for member in list(self.live):
            self.lose_member(member)
        self.runner.run(self.log.close())
        self.runner.run(self._open())

    @precondition(lambda self: not self.live)
    @rule(data=st.data())
    def purge(self, data) -> None:
        before = data.draw(st.integers(0, len(self.stored) + 2))
        kept = [frame for frame in self.frames if frame[1] > before]
        earliest = self.runner.run(self.broker.purge(KIND, before))
        self.floor = kept[0][0] if kept else len(self.stored)
        self.frames = kept
        assert earliest == self.floor
        self.done |= set(range(self.floor))

    # What always holds.

    @invariant()
    def the_topic_is_as_long_as_what_was_published(self) -> None:
        if self.is_open:
            topic = self.broker.topic(KIND)
            assert (topic.earliest_offset, topic.next_offset) == (self.floor, len(self.stored))

    @invariant()
    def the_group_has_committed_what_is_done_and_no_more(self) -> None:
        if not self.is_open:
            return
        for group in self.broker.groups(KIND):
            committed = next(o for o in range(len(self.stored) + 1) if o == len(self.stored) or o not in self.done)
            assert group.committed_offset == committed
            assert group.lag == len(self.stored) - committed
            assert group.members == len(self.live)

    def _ack(self, member: Reader, ack: oona_pb2.Ack) -> None:
        async def send() -> None:
            stored = member.subscription.ack(ack)
            await stored

        self.runner.run(send())
        self._settle()

    def _settle(self) -> None:
        """Let every member do what it can: until each waits for credit, for records, or for its waker."""

        async def settle() -> None:
            while not all(self._is_idle(member) for member in self.live):  # noqa: ASYNC110
                await asyncio.sleep(0)

        self.runner.run(settle())
        for member in self.live:
            new, member.records = member.records, []
            for record in new:
                self._check_delivery(member, record)
            # Whoever has credit left has got everything that was for it.
            if member.credit:
                assert not [
                    offset
                    for offset, (run, _) in enumerate(self.stored)
                    if run in member.owned and offset not in self.done and offset not in member.held
                ]

    def _check_delivery(self, member: Reader, record: event_pb2.Record) -> None:
        run, mark = self.stored[record.offset]
        assert (record.event.run_id, record.event.run_ended.error) == (run, mark)
        assert record.offset not in self.done
        assert all(record.offset not in other.held for other in self.live), "held by one member at a time"
        assert not any(run in other.owned for other in self.live if other is not member), "a run is one member's"
        # In order: everything of the run before it is done or held.
        assert all(
            offset in self.done or offset in member.held
            for offset in range(self.floor, record.offset)
            if self.stored[offset][0] == run
        )
        member.owned.add(run)
        member.held[record.offset] = record
        member.credit -= 1
        assert member.credit >= 0

    @staticmethod
    def _is_idle(member: Reader) -> bool:
        assert not member.task.done(), member.task
        waiter = member.subscription._waker
        return bool(waiter._waiters) and not waiter.is_set()


BrokerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBroker = BrokerMachine.TestCase
