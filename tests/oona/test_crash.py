"""Confirmed means stored and synced, whatever happens to the process.

CRASH_ROUNDS says how often the server is killed under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import defaultdict
from pathlib import Path

import pytest

from esperml.client import Backoff, OonaClient
from esperml.v1 import event_pb2, oona_pb2

EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
EVENTS = event_pb2.KIND_EVENTS
QUICK = Backoff(initial_s=0.01, longest_s=0.05)
ROUNDS = int(os.environ.get("CRASH_ROUNDS", "20"))
# Longest time under load before a kill, in s; a start that is cut short is cut within the other.
LOAD_S, START_S = 0.15, 0.3
PUBLISHERS, RUNS, MEMBERS = 2, 3, 2


class Publisher:
    """Publishes frames of a few events until told to stop, several at a time; numbers each run's events from 0."""

    def __init__(self, oona: OonaClient, name: str, make_event) -> None:
        self.oona = oona
        self.runs = [f"{name}-run-{run}" for run in range(RUNS)]
        self.sent = dict.fromkeys(self.runs, 0)
        self.confirmed = 0
        self.confirms = asyncio.Event()
        self.stopping = False
        self._make_event = make_event

    def _frame(self) -> list[event_pb2.Event]:
        frame = []
        for _ in range(random.randint(1, 12)):
            run = random.choice(self.runs)
            frame.append(self._make_event(run, str(self.sent[run])))
            self.sent[run] += 1
        return frame

    async def publish(self) -> None:
        under_way: set[asyncio.Task[oona_pb2.Published]] = set()
        while under_way or not self.stopping:
            while len(under_way) < 8 and not self.stopping:
                under_way.add(asyncio.create_task(self.oona.publish(EVENTS, self._frame())))
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            self.confirms.set()
            for task in done:
                self.confirmed += task.result().count + task.result().duplicates


class Group:
    """What the members of a group have got and acknowledged, and what must hold of it at every moment."""

    def __init__(self) -> None:
        self.committed = 0
        self.got: dict[str, int] = defaultdict(int)

    def take(self, record: event_pb2.Record) -> None:
        assert record.offset >= self.committed, "a record came again that was acknowledged for good"
        run, number = record.event.run_id, int(record.event.run_ended.error)
        assert number <= self.got[run], f"{run}: {number} came before {self.got[run]}"
        self.got[run] = max(self.got[run], number + 1)

    async def consume(self, oona: OonaClient) -> None:
        async with oona.subscribe(EVENTS, group="g", start=EARLIEST) as subscription:
            async for batch in subscription.batches():
                for record in batch:
                    self.take(record)
                committed = await subscription.ack(*batch)
                self.committed = max(self.committed, committed or 0)


async def stored_runs(oona: OonaClient) -> dict[str, list[int]]:
    """The numbers of each run's events, in the order of the log."""
    runs: dict[str, list[int]] = defaultdict(list)
    end = (await oona.describe(EVENTS)).topic.next_offset
    async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=end) as subscription:
        async for record in subscription:
            runs[record.event.run_id].append(int(record.event.run_ended.error))
    return runs


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * ROUNDS)
async def test_a_server_killed_at_random_under_load_loses_and_invents_nothing(start_bus_process, make_event):
    process = start_bus_process()
    group = Group()
    async with contextlib.AsyncExitStack() as stack:

        async def client(name: str) -> OonaClient:
            return await stack.enter_async_context(OonaClient(process.target, client_id=name, backoff=QUICK))

        publishers = [Publisher(await client(f"p{n}"), f"p{n}", make_event) for n in range(PUBLISHERS)]
        publishing = [asyncio.create_task(publisher.publish()) for publisher in publishers]
        consuming = [asyncio.create_task(group.consume(await client(f"m{n}"))) for n in range(MEMBERS)]
        reader = await client("reader")
        for _ in range(ROUNDS):
            for publisher in publishers:  # In each round something is confirmed, and so could be lost.
                publisher.confirms.clear()
                await publisher.confirms.wait()
            await asyncio.sleep(random.uniform(0, LOAD_S))
            assert not any(task.done() for task in (*publishing, *consuming))
            process.kill()
            if random.random() < 0.25:
                process.launch()
                await asyncio.sleep(random.uniform(0, START_S))
                process.kill()
            await asyncio.to_thread(process.start)
            # What was acknowledged before the kill is acknowledged still.
            committed = group.committed
            (described,) = (await reader.describe(EVENTS)).groups
            assert described.committed_offset >= committed
        for publisher in publishers:
            publisher.stopping = True
        await asyncio.gather(*publishing)
        sent = {run: count for publisher in publishers for run, count in publisher.sent.items()}
        assert sum(publisher.confirmed for publisher in publishers) == sum(sent.values())
        assert await stored_runs(reader) == {run: list(range(count)) for run, count in sent.items()}
        end = sum(sent.values())
        while (await reader.describe(EVENTS)).groups[0].committed_offset < end:
            assert not any(task.done() for task in consuming)
        assert group.got == sent
        for task in consuming:
            task.cancel()
        await asyncio.gather(*consuming, return_exceptions=True)


async def test_what_only_the_page_cache_has_survives_the_process(start_bus_process, open_stream, make_event):
    process = start_bus_process(ESPER_OONA__DURABILITY="page_cache")
    async with open_stream(process.target) as stream:
        assert stream.opened.durability == "page_cache"
        for number in range(50):
            publish = oona_pb2.Publish(kind=EVENTS, first_sequence=number + 1, events=[make_event(mark=str(number))])
            assert (await stream.answer(publish=publish)).published.count == 1
        process.kill()
    process.start()
    async with OonaClient(process.target, client_id="reader", backoff=QUICK) as oona:
        assert await stored_runs(oona) == {"run-1": list(range(50))}


def wait_for(path: Path) -> None:
    while not path.exists():
        pass


@pytest.fixture
def gated_process(tmp_path, start_bus_process, preload):
    return start_bus_process(
        LD_PRELOAD=preload("sync_gate.c"),
        SYNC_GATE=str(tmp_path / "gate"),
        SYNC_HELD=str(tmp_path / "held"),
        SYNC_FAIL=str(tmp_path / "fail"),
    )


async def test_nothing_is_confirmed_before_the_sync_has_returned(gated_process, tmp_path, open_stream, make_event):
    gate, held = tmp_path / "gate", tmp_path / "held"
    async with open_stream(gated_process.target) as stream:
        gate.touch()
        publish = oona_pb2.Publish(kind=event_pb2.KIND_EVENTS, first_sequence=1, events=[make_event()])
        request_id = await stream.send(publish=publish)
        await asyncio.to_thread(wait_for, held)
        # The event is written and its sync is held up. What needs no sync is still answered, before the confirmation.
        for subscription_id in (1, 2, 3):
            subscribe = oona_pb2.Subscribe(subscription_id=subscription_id, kind=event_pb2.KIND_EVENTS, start=EARLIEST)
            subscribed = (await stream.answer(subscribe=subscribe)).subscribed
            assert subscribed.high_watermark == 0
        assert all(response.request_id != request_id for response in stream.unasked)
        gate.unlink()
        assert (await stream.next("published")).request_id == request_id


async def test_an_event_whose_sync_failed_is_refused_and_can_be_published_again(
    gated_process, tmp_path, open_stream, make_event
):
    fail = tmp_path / "fail"
    async with open_stream(gated_process.target) as stream:
        fail.touch()
        publish = oona_pb2.Publish(kind=event_pb2.KIND_EVENTS, first_sequence=1, events=[make_event()])
        refused = await stream.answer(publish=publish)
        assert refused.rejected.reason == oona_pb2.REJECT_REASON_STORAGE
        fail.unlink()
        assert (await stream.answer(publish=publish)).published.count == 1
