"""The service under frames that make no sense: well-formed ones that ask for nonsense, bytes that are no frames, and
clients that speak properly but for what they spoil.

The server is in a process of its own, and its memory is measured alone. Beside all that, a client that does no wrong
must notice nothing. The short form takes seconds. ``FUZZ_FRAMES=1000000`` sends that many; ``-s`` shows the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import grpc
import pytest
from click.testing import CliRunner
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from esperml.cli.root import main
from esperml.client import OonaClient, new_event
from esperml.settings import LogSettings, configure_logging
from esperml.v1 import event_pb2, health_pb2, oona_pb2, oona_pb2_grpc, run_pb2

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzzing import EDGES, NAMES, mutated
from visitor import DEADLINE_S, LAST, Visitor, stands

FRAMES = int(os.environ.get("FUZZ_FRAMES", "0"))
EXAMPLES = 200 if FRAMES else 10
# Half of them are nonsense, half are spoiled by visitors.
FRAMES_PER_EXAMPLE = max(FRAMES // EXAMPLES, 240)
SPOILED_PER_VISIT = 30
STREAMS_AT_ONCE = 4
BURST = 24
MAX_GROWTH_MB = 50
# Older ones are purged after each example, and all dead letters: what is kept on purpose is no leak, and new groups, of
# which mutations make many, read all that is there.
KEPT_RECORDS = 1000
KIND = event_pb2.KIND_EVENTS
# What a stream may end with. UNKNOWN would be an exception that nobody expected.
PROPER_ENDS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}

uint64s = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
small = st.integers(0, 4) | uint64s
int32s = st.sampled_from([-(2**31), -1, 0, 1, 10**9 - 1, 10**9, 2**31 - 1])
int64s = st.sampled_from([-(2**63), -1, 0, 1, 253_402_300_799, 253_402_300_800, 2**63 - 1])
names = st.sampled_from(NAMES)
kinds = st.integers(0, 7) | int32s
times = st.builds(Timestamp, seconds=int64s, nanos=int32s)
durations = st.builds(Duration, seconds=int64s, nanos=int32s)

payloads = st.sampled_from(
    [
        {},
        {"run_ended": run_pb2.RunEnded(error="e")},
        {"epoch_completed": run_pb2.EpochCompleted(epoch=2**32 - 1)},
        {"health_report": health_pb2.HealthReport(step=2**63)},
    ]
)
events = st.builds(
    lambda payload, **fields: event_pb2.Event(**fields, **payload),
    payloads,
    event_id=names,
    run_id=names,
    created_at=times,
    traceparent=names,
)
starts = st.one_of(
    st.builds(oona_pb2.StartAt, anchor=st.integers(0, 4) | int32s),
    st.builds(oona_pb2.StartAt, offset=small),
    st.builds(oona_pb2.StartAt, time=times),
)
ranges = st.builds(oona_pb2.OffsetRange, first=small, last=small)
redeliveries = st.builds(
    oona_pb2.Redelivery,
    max_attempts=st.sampled_from([0, 1, 2, 2**32 - 1]),
    min_delay=st.none() | durations,
    max_delay=st.none() | durations,
)
subscribes = st.builds(
    oona_pb2.Subscribe,
    subscription_id=small,
    kind=kinds,
    run_ids=st.lists(names, max_size=3),
    group=names,
    start=st.none() | starts,
    end_offset=st.none() | small,
    ack_deadline=st.none() | durations,
    redelivery=st.none() | redeliveries,
)
offsets = st.lists(small, max_size=4)
requests = st.one_of(
    st.builds(dict, open=st.builds(oona_pb2.Open, client_id=names, client_version=names)),
    st.builds(
        dict,
        publish=st.builds(oona_pb2.Publish, kind=kinds, first_sequence=small, events=st.lists(events, max_size=3)),
    ),
    st.builds(dict, subscribe=subscribes),
    st.builds(dict, subscribe=subscribes),
    st.builds(dict, grant=st.builds(oona_pb2.Grant, subscription_id=small, messages=small, bytes=small)),
    st.builds(
        dict,
        ack=st.builds(
            oona_pb2.Ack, subscription_id=small, acked=st.lists(ranges, max_size=3), nacked=offsets, extended=offsets
        ),
    ),
    st.builds(dict, unsubscribe=st.builds(oona_pb2.Unsubscribe, subscription_id=small)),
    st.just({}),
)
frames = st.builds(
    lambda request_id, request: oona_pb2.StreamRequest(request_id=request_id, **request), small, requests
).map(oona_pb2.StreamRequest.SerializeToString)


def bursts(seeds: list[bytes], random: Random) -> list[list[bytes]]:
    """So many frames, grown from the seeds, by the stream: what ends a stream comes last on it."""
    grown = []
    for _ in range(FRAMES_PER_EXAMPLE // 2):
        frame, other = random.choice(seeds), random.choice(seeds)
        # One frame behind another in one is still a frame: its fields are those of both.
        grown.append(frame + other if random.random() < 0.5 else mutated(frame, other, random))
    nonsense = [data for data in seeds + grown if stands(data)]
    malformed = [data for data in seeds + grown if not stands(data)]
    streams = []
    while nonsense or malformed:
        opening = oona_pb2.Open(client_id=random.choice("abcdefgh"))
        stream = [oona_pb2.StreamRequest(request_id=1, open=opening).SerializeToString()]
        stream += nonsense[:BURST]
        del nonsense[:BURST]
        if malformed and (not nonsense or random.random() < 0.8):
            stream.append(malformed.pop())
        if random.random() < 0.02:
            random.shuffle(stream)  # Then most often something else stands where Open should.
        streams.append(stream)
    return streams


async def converse(channel: grpc.aio.Channel, stream: list[bytes]) -> grpc.StatusCode | str:
    """Send frames and read what comes, until the last request is answered or the stream ends. Returns how it ended."""
    call = channel.stream_stream("/esperml.v1.Oona/Stream", None, oona_pb2.StreamResponse.FromString)(None)

    async def read() -> grpc.StatusCode | str:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(response := await call.read(), oona_pb2.StreamResponse):
                if response.request_id == LAST.request_id:
                    return "stands"
        # Where the stream ends under a write, this side of gRPC may no longer learn with what.
        return "cut" if await call.details() == "Internal error from Core" else await call.code()

    try:
        async with asyncio.timeout(DEADLINE_S):
            reading = asyncio.create_task(read())
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for frame in (*stream, LAST.SerializeToString()):
                    await call.write(frame)
            return await reading
    finally:
        call.cancel()


class Bystander:
    """A client that does no wrong: it publishes numbered events of a run of its own, and its group reads them.

    Args:
        target: the server.
    """

    RUN = "bystander"

    def __init__(self, target: str) -> None:
        self._oona = OonaClient(target, client_id="bystander")
        self._subscription = self._oona.subscribe(KIND, group="bystander", run_ids=[self.RUN])
        self._stopping = False
        self._working: asyncio.Task[int]

    async def start(self) -> None:
        await self._oona.__aenter__()
        await self._subscription.__aenter__()
        self._working = asyncio.create_task(self._work())

    async def _work(self) -> int:
        sent = 0
        for size in itertools.cycle(range(1, 9)):
            marks = [str(sent + index) for index in range(size)]
            sent += size
            async with asyncio.timeout(DEADLINE_S):
                await self._oona.publish(
                    KIND, [new_event(self.RUN, run_ended=run_pb2.RunEnded(error=m)) for m in marks]
                )
                records = [await anext(self._subscription) for _ in marks]
                await self._subscription.ack(*records)
            assert [record.event.run_ended.error for record in records] == marks
            assert {record.delivery_attempt for record in records} == {1}
            if self._stopping:
                break
            await asyncio.sleep(0.02)
        return sent

    async def finish(self) -> int:
        """Check that everything was delivered once, in order; how many events that were."""
        self._stopping = True
        sent = await self._working
        # Whoever reads what was not purged once more finds the same, and nothing else.
        end = (await self._oona.describe(KIND)).topic.next_offset
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        async with self._oona.subscribe(KIND, run_ids=[self.RUN], start=start, end_offset=end) as subscription:
            marks = [record.event.run_ended.error async for record in subscription]
        assert marks == [str(mark) for mark in range(sent - len(marks), sent)]
        assert marks
        await self._oona.close()
        return sent


async def at_rest(bus, tasks: int) -> None:
    """Wait until no more tasks are left in the server, and not for ever."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while (now := await asyncio.to_thread(bus.alive))["tasks"] > tasks:
        assert asyncio.get_running_loop().time() < deadline, f"{now['tasks']} tasks are left; there were {tasks}"
        await asyncio.sleep(0.1)
    # The traceback of an exception that gRPC has yet to forget may hold the last few.
    assert now["streams"] <= 4 * STREAMS_AT_ONCE


@pytest.fixture
def ends():
    """How streams ended."""
    return Counter()


@pytest.fixture
def met():
    """What visitors met."""
    return Counter()


@pytest.fixture
def resident():
    """The server's resident memory after each example, in MB."""
    return []


@pytest.fixture
def bus(start_bus_process, tmp_path):
    """A bus that caches little: what it keeps on purpose is no leak."""
    return start_bus_process(
        errors=tmp_path / "errors", ESPER_OONA__CACHE_BYTES=str(6 * 2**20), ESPER_LOG__LEVEL="warning"
    )


@pytest.fixture
async def channel(bus):
    async with grpc.aio.insecure_channel(bus.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


@pytest.fixture
async def served(bus, channel, ends, met, resident):
    """A bus that must be as good as new after the test."""
    configure_logging(LogSettings(level="warning"))
    tasks = (await asyncio.to_thread(bus.alive))["tasks"]
    bystander = Bystander(bus.target)
    await bystander.start()
    began_s, first_mb = time.perf_counter(), bus.resident_mb()
    yield bus
    took_s, last_mb = time.perf_counter() - began_s, bus.resident_mb()
    events = await bystander.finish()
    await at_rest(bus, tasks)
    oona = oona_pb2_grpc.OonaStub(channel)
    groups = [
        group
        for kind in range(1, 7)
        for group in (await oona.DescribeTopic(oona_pb2.DescribeTopicRequest(kind=kind))).groups
    ]
    print(f"{ends.total()} streams in {took_s:.0f} s: {dict(ends)}; visitors met {dict(met)}")
    print(f"{len(groups)} groups; all {events} events of the bystander are there")
    print(
        f"the server went from {first_mb:.1f} MB over {resident[len(resident) // 5]:.1f} MB, a fifth of the way, "
        f"to {last_mb:.1f} MB"
    )
    assert set(ends) <= {"stands", "cut", *PROPER_ENDS}
    assert ends["stands"] > 0, "some streams stand to their end"
    assert ends[grpc.StatusCode.INVALID_ARGUMENT] > 0, "some frames end their stream"
    assert min(met[name] for name in ("published", "acked", "records", "again", "dead letters", "rejected")) > 0
    assert all(group.members == 0 for group in groups)
    growth = last_mb - resident[len(resident) // 5]
    assert growth < MAX_GROWTH_MB, f"memory grew by {growth:.0f} MB over {len(resident)} examples"
    async with OonaClient(bus.target, client_id="a good client") as client:
        published = await client.publish(
            KIND, [new_event("run-1", run_ended=run_pb2.RunEnded(error="the end"))], timeout_s=10
        )
        start = oona_pb2.StartAt(offset=published.first_offset)
        async with client.subscribe(KIND, group="good", start=start) as subscription:
            record = await anext(subscription)
            assert record.event.run_ended.error == "the end"
            assert await subscription.ack(record) == published.first_offset + 1
    bus.kill()
    assert bus.errors.read_text() == "", "what nobody expected is logged"
    checked = CliRunner().invoke(main, ["log", "check", str(bus.path)])
    assert checked.exit_code == 0, checked.output


@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(seeds=st.lists(frames, min_size=12, max_size=24), number=st.integers(0, 2**32))
@pytest.mark.timeout(0 if FRAMES else 120)
async def test_nonsense_neither_hangs_nor_crashes_nor_leaks(served, channel, ends, met, resident, seeds, number):
    random = Random(number)
    streams = iter(bursts(seeds, random))
    to_spoil = FRAMES_PER_EXAMPLE // 2

    async def talk() -> None:
        for stream in streams:
            ends[await converse(channel, stream)] += 1

    async def visit(name: str) -> None:
        nonlocal to_spoil
        while to_spoil > 0:
            # Now and then two come under one name, of which the first must go.
            visitor = Visitor(channel, name if random.random() < 0.95 else "a visitor", random, SPOILED_PER_VISIT)
            ends[await visitor.visit()] += 1
            met.update(visitor.met)
            to_spoil -= max(visitor.spoiled, 1)

    async with asyncio.TaskGroup() as tasks:
        for place in range(STREAMS_AT_ONCE):
            tasks.create_task(talk())
            tasks.create_task(visit(f"visitor-{place}"))
    oona = oona_pb2_grpc.OonaStub(channel)
    described = await oona.DescribeTopic(oona_pb2.DescribeTopicRequest(kind=KIND))
    before = max(described.topic.next_offset - KEPT_RECORDS, 0)
    await oona.PurgeTopic(oona_pb2.PurgeTopicRequest(kind=KIND, before_offset=before))
    for group in described.groups:
        purge = oona_pb2.PurgeDeadLettersRequest(kind=KIND, group=group.name)
        met["dead letters"] += (await oona.PurgeDeadLetters(purge)).count
    resident.append(served.resident_mb())
    if len(resident) % (EXAMPLES // 10) == 0:
        share = len(resident) / EXAMPLES
        print(f"{share:.0%}: {ends.total()} streams, the server takes {resident[-1]:.1f} MB", flush=True)
