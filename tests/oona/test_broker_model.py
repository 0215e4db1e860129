"""The broker against a model of it that fits in the head: lists, sets and dictionaries."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
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
MAX_ATTEMPTS = 2
REDELIVERY = RedeliverySettings(max_attempts=MAX_ATTEMPTS, min_delay_s=0, max_delay_s=0)
NACKED = oona_pb2.DEAD_LETTER_REASON_NACKED
EXPIRED = oona_pb2.DEAD_LETTER_REASON_EXPIRED
LEFT = oona_pb2.DEAD_LETTER_REASON_MEMBER_LEFT
# So long that no deadline passes unless a rule says so.
SETTINGS = OonaSettings(ack_deadline_s=3600, delivery_records=3, redelivery=REDELIVERY)


@dataclass
class Letter:
    """A dead letter, as the model has it.

    Attributes:
        attempts: deliveries.
        reason: why it is one.
        replaying: whether it was given back.
        failures: deliveries of the replay that came back.
    """

    attempts: int
    reason: oona_pb2.DeadLetterReason.ValueType
    replaying: bool = False
    failures: int = 0


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
        self.letters: dict[int, event_pb2.Record] = {}
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

    broker: Broker
    is_open = False

    @initialize(busy=st.booleans())
    def open(self, busy) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        # The model: what is stored, and what the group has done.
        self.stored: list[tuple[str, str]] = []
        self.frames: list[tuple[int, int]] = []
        self.floor = 0
        self.sequences = dict.fromkeys(PUBLISHERS, 0)
        self.done: set[int] = set()
        self.deliveries: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.letters: dict[int, Letter] = {}
        self.live: list[Reader] = []
        self.number = 0
        self.runner.run(self._open())
        # Most of what can go wrong needs records that were delivered.
        if busy:
            self._publish(PUBLISHERS[0], 1, ["run-a", "run-a", "run-b", "run-a"], duplicates=0)
            self.join()
            self._grant(self.live[0], 20)

    async def _open(self) -> None:
        self.log = SqliteLog(Path(self.folder.name) / "log.sqlite")
        self.broker = Broker(self.log, SETTINGS)
        self.is_open = True

    def teardown(self) -> None:
        if self.is_open:
            self._stop()
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
    @rule()
    def join(self) -> None:
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
        self._settle()

    @precondition(lambda self: self.live)
    @rule(credit=st.sampled_from([1, 3, 50]), data=st.data())
    def deliver(self, data, credit) -> None:
        self._grant(data.draw(st.sampled_from(self.live)), credit)

    def _grant(self, member: Reader, credit: int) -> None:
        member.credit += credit
        member.subscription.grant(credit, 0)
        self._settle()

    @precondition(lambda self: any(member.held for member in self.live))
    @rule(data=st.data())
    def ack(self, data) -> None:
        member = data.draw(st.sampled_from([member for member in self.live if member.held]))
        offsets = data.draw(st.sets(st.sampled_from(sorted(member.held)), min_size=1))
        ranges = [oona_pb2.OffsetRange(first=offset, last=offset) for offset in sorted(offsets)]
        for offset in offsets:
            self._done_with(offset)
            del member.held[offset]
        self._ack(member, oona_pb2.Ack(acked=ranges))

    @precondition(lambda self: any(member.held for member in self.live))
    @rule(data=st.data())
    def ack_what_others_hold(self, data) -> None:
        member = data.draw(st.sampled_from(self.live))
        others = [o for other in self.live if other is not member for o in (*other.held, *other.letters)]
        if others:
            self._ack(member, oona_pb2.Ack(acked=[oona_pb2.OffsetRange(first=o, last=o) for o in others]))

    @precondition(lambda self: any(member.held for member in self.live))
    @rule(data=st.data())
    def nack(self, data) -> None:
        member = data.draw(st.sampled_from([member for member in self.live if member.held]))
        offset = data.draw(st.sampled_from(sorted(member.held)))
        self._take_back(member, offset, NACKED)
        self._ack(member, oona_pb2.Ack(nacked=[offset]))

    @precondition(lambda self: any(member.held for member in self.live))
    @rule(data=st.data())
    def expire(self, data) -> None:
        """The deadlines of all that the member holds pass."""
        member = data.draw(st.sampled_from([member for member in self.live if member.held]))
        for run in RUNS:
            if of_run := [offset for offset in sorted(member.held) if self.stored[offset][0] == run]:
                self._take_back(member, of_run[0], EXPIRED)
        for offset in list(member.letters):
            self._take_letter_back(member, offset, EXPIRED)

        async def pass_time() -> None:
            group, state = member.subscription._group, member.subscription._member
            later_s = asyncio.get_running_loop().time() + 2 * SETTINGS.ack_deadline_s
            group.letters.replays.due(state, later_s)
            # What was delayed from then on is not to be waited for.
            group.letters.replays.due(state, later_s + 1)
            if group.state.due(state, later_s):
                group.save_soon()
            group.state.due(state, later_s + 1)
            group.wake()

        self.runner.run(pass_time())
        self._settle()

    @precondition(lambda self: any(member.letters for member in self.live))
    @rule(data=st.data(), acked=st.booleans())
    def settle_a_letter(self, data, acked) -> None:
        member = data.draw(st.sampled_from([member for member in self.live if member.letters]))
        offset = data.draw(st.sampled_from(sorted(member.letters)))
        if acked:
            del member.letters[offset], self.letters[offset]
            self._ack(member, oona_pb2.Ack(acked=[oona_pb2.OffsetRange(first=offset, last=offset)]))
        else:
            self._take_letter_back(member, offset, NACKED)
            self._ack(member, oona_pb2.Ack(nacked=[offset]))

    @precondition(lambda self: self.letters)
    @rule(data=st.data(), everything=st.booleans())
    def replay_letters(self, data, everything) -> None:
        offsets = [] if everything else data.draw(st.lists(st.sampled_from(sorted(self.letters)), min_size=1))
        chosen = [self.letters[offset] for offset in set(offsets) or self.letters]
        expected = sum(not letter.replaying for letter in chosen)
        assert self.runner.run(self.broker.replay_dead_letters(KIND, "g", offsets)) == expected
        for letter in chosen:
            letter.replaying = True
        self._settle()

    @precondition(lambda self: self.letters)
    @rule(data=st.data(), everything=st.booleans())
    def purge_letters(self, data, everything) -> None:
        offsets = [] if everything else data.draw(st.lists(st.sampled_from(sorted(self.letters)), min_size=1))
        chosen = set(offsets) or set(self.letters)
        assert self.runner.run(self.broker.purge_dead_letters(KIND, "g", offsets)) == len(chosen)
        for offset in chosen:
            del self.letters[offset]
            for member in self.live:
                member.letters.pop(offset, None)

    @precondition(lambda self: any(member.held for member in self.live))
    @rule(data=st.data())
    def lose_member(self, data) -> None:
        member = data.draw(st.sampled_from(self.live))
        for run in RUNS:
            if of_run := [offset for offset in sorted(member.held) if self.stored[offset][0] == run]:
                for offset in of_run:
                    self.deliveries[offset] = self.deliveries.get(offset, 0) + 1
                self.failures[of_run[0]] = self.failures.get(of_run[0], 0) + 1
        for offset in list(member.letters):
            self._take_letter_back(member, offset, LEFT)
        self._remove(member)

    def _remove(self, member: Reader) -> None:
        self.live.remove(member)

        async def leave() -> None:
            member.task.cancel()
            await asyncio.wait([member.task])
            member.subscription.close()

        self.runner.run(leave())
        self._settle()

    # The log.

    # Rarely: it ends all that is under way.
    @precondition(lambda self: any(member.held for member in self.live) or self.letters)
    @rule()
    def restart_from_disk(self) -> None:
        self.broker.server_ends()
        for member in list(self.live):
            self._remove(member)
        self._reopen()

    @precondition(lambda self: any(member.held for member in self.live))
    @rule()
    def crash(self) -> None:
        """The server ends in the middle of everything, and nobody says goodbye."""
        self._stop()
        self._reopen()

    def _stop(self) -> None:
        async def die() -> None:
            for member in self.live:
                member.task.cancel()
            if self.live:
                await asyncio.wait([member.task for member in self.live])

        self.runner.run(die())
        self.live.clear()

    def _reopen(self) -> None:
        self.runner.run(self.log.close())
        self.runner.run(self._open())
        # Deliveries of a replay are counted for as long as the server runs.
        for letter in self.letters.values():
            letter.failures = 0

    @precondition(lambda self: not self.live)
    @rule(data=st.data())
    def purge(self, data) -> None:
        before = data.draw(st.integers(0, len(self.stored) + 2))
        kept = [frame for frame in self.frames if frame[1] > before]
        earliest = self.runner.run(self.broker.purge(KIND, before))
        self.floor = kept[0][0] if kept else len(self.stored)
        self.frames = kept
        assert earliest == self.floor
        for offset in range(self.floor):
            self._done_with(offset)

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

    @invariant()
    def the_dead_letters_are_those_that_failed_too_often(self) -> None:
        if not self.is_open or not self.broker.groups(KIND):
            return

        async def listed():
            # What was asked to be stored before is stored when this is answered.
            await self.log.next_sequence(PUBLISHERS[0])
            return await self.broker.dead_letters(KIND, "g", 0, 1000)

        letters, following = self.runner.run(listed())
        assert following is None
        assert self.broker.groups(KIND)[0].dead_letters == len(self.letters)
        assert {letter.offset: (letter.attempts, letter.reason, letter.replaying) for letter in letters} == {
            offset: (letter.attempts, letter.reason, letter.replaying) for offset, letter in self.letters.items()
        }
        for letter in letters:
            event = event_pb2.Event.FromString(letter.event)
            assert (event.run_id, event.run_ended.error) == self.stored[letter.offset]

    def _done_with(self, offset: int) -> None:
        self.done.add(offset)
        self.deliveries.pop(offset, None)
        self.failures.pop(offset, None)

    def _take_back(self, member: Reader, offset: int, reason: oona_pb2.DeadLetterReason.ValueType) -> None:
        run = self.stored[offset][0]
        for later in [o for o in member.held if o >= offset and self.stored[o][0] == run]:
            del member.held[later]
            self.deliveries[later] = self.deliveries.get(later, 0) + 1
        self.failures[offset] = self.failures.get(offset, 0) + 1
        if self.failures[offset] == MAX_ATTEMPTS:
            self._give_up(offset, reason)

    def _give_up(self, offset: int, reason: oona_pb2.DeadLetterReason.ValueType) -> None:
        self.letters[offset] = Letter(self.deliveries[offset], reason)
        self._done_with(offset)

    def _take_letter_back(self, member: Reader, offset: int, reason: oona_pb2.DeadLetterReason.ValueType) -> None:
        del member.letters[offset]
        letter = self.letters[offset]
        letter.failures += 1
        # Where nobody is left, nobody takes note before somebody comes, or the server ends.
        if letter.failures == MAX_ATTEMPTS and self.live != [member]:
            self.letters[offset] = Letter(MAX_ATTEMPTS, reason)

    def _ack(self, member: Reader, ack: oona_pb2.Ack) -> None:
        async def send() -> None:
            stored = member.subscription.ack(ack)
            await stored

        self.runner.run(send())
        self._settle()

    def _settle(self) -> None:
        """Let every member do what it can: until each waits for credit, for records, or for its waker."""
        if self.live:
            # Those that failed when their member left are given up as soon as somebody is there.
            for offset in [offset for offset, count in self.failures.items() if count >= MAX_ATTEMPTS]:
                self._give_up(offset, LEFT)
            for offset, letter in self.letters.items():
                if letter.failures >= MAX_ATTEMPTS:
                    self.letters[offset] = Letter(MAX_ATTEMPTS, LEFT)

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
                held = {offset for other in self.live for offset in other.letters}
                assert {offset for offset, letter in self.letters.items() if letter.replaying} == held

    def _check_delivery(self, member: Reader, record: event_pb2.Record) -> None:
        run, mark = self.stored[record.offset]
        assert (record.event.run_id, record.event.run_ended.error) == (run, mark)
        member.credit -= 1
        assert member.credit >= 0
        if record.offset in self.done:
            letter = self.letters[record.offset]
            assert letter.replaying
            assert record.delivery_attempt == letter.failures + 1
            assert all(record.offset not in other.letters for other in self.live), "held by one member at a time"
            member.letters[record.offset] = record
            return
        assert record.delivery_attempt == self.deliveries.get(record.offset, 0) + 1
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

    @staticmethod
    def _is_idle(member: Reader) -> bool:
        assert not member.task.done(), member.task
        waiter = member.subscription._waker
        return bool(waiter._waiters) and not waiter.is_set()


BrokerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBroker = BrokerMachine.TestCase
