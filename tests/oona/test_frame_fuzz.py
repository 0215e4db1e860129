"""The service under frames that make no sense: well-formed ones that ask for nonsense, and bytes that are no frames.

The short form takes seconds. ``FUZZ_FRAMES=1000000`` sends that many.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections import Counter
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from esperml.client import OonaClient, new_event
from esperml.oona.stream import ClientStream
from esperml.settings import LogSettings, configure_logging
from esperml.v1 import event_pb2, health_pb2, oona_pb2, run_pb2

FRAMES = int(os.environ.get("FUZZ_FRAMES", "0"))
EXAMPLES = 200 if FRAMES else 12
FRAMES_PER_EXAMPLE = max(FRAMES // EXAMPLES, 150)
STREAMS_AT_ONCE = 4
BURST = 24
# No frame may hold up the service for longer. A stream whose client id another one takes ends sooner.
DEADLINE_S = 30
# Answered behind everything that came before it, for no stream has such a subscription.
LAST = oona_pb2.StreamRequest(request_id=2**62 + 1, unsubscribe=oona_pb2.Unsubscribe(subscription_id=2**62 + 1))
# What a stream may end with. UNKNOWN would be an exception that nobody expected.
PROPER_ENDS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}

EDGES = [0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
uint64s = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
small = st.integers(0, 4) | uint64s
int32s = st.sampled_from([-(2**31), -1, 0, 1, 10**9 - 1, 10**9, 2**31 - 1])
int64s = st.sampled_from([-(2**63), -1, 0, 1, 253_402_300_799, 253_402_300_800, 2**63 - 1])
names = st.sampled_from(["", "a", "b", "\0", "☃", "x" * 128, "x" * 129, "' OR 1=1 --"])
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


def mutated(frame: bytes, other: bytes, random: Random) -> bytes:
    """A frame with one or two bytes, or pieces, not as they were."""
    data = bytearray(frame)
    for _ in range(random.randint(1, 2)):
        at = random.randrange(len(data) + 1)
        until = min(at + random.randint(1, 8), len(data))
        match random.randrange(6):
            case 0 if data:
                data[at - 1] ^= 1 << random.randrange(8)
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until]
            case 3:
                data[at:at] = random.randbytes(random.randint(1, 8))
            case 4:
                del data[at:]
            case _:
                data[at:at] = other
    return bytes(data)


def stands(data: bytes) -> bool:
    """Whether the stream stands after it: it is a frame, and does not open the stream once more."""
    try:
        return oona_pb2.StreamRequest.FromString(data).WhichOneof("request") != "open"
    except DecodeError:
        return False


def bursts(seeds: list[bytes], random: Random) -> list[list[bytes]]:
    """So many frames, grown from the seeds, by the stream: what ends a stream comes last on it."""
    grown = []
    for _ in range(FRAMES_PER_EXAMPLE):
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


async def until(condition, what: str) -> None:
    """Wait for a condition, and not for ever."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.001)


def bus_tasks() -> set[asyncio.Task]:
    """The tasks of the bus, those of gRPC that carry its streams among them."""
    return {task for task in asyncio.all_tasks() if "/esperml/oona/" in repr(task) or "Oona/Stream" in repr(task)}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def alive(kind: type) -> int:
    gc.collect()
    # By type: some libraries' objects warn of themselves when they are asked for their class.
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


@pytest.fixture
def ends():
    return Counter()


@pytest.fixture
def resident():
    """Resident memory after each example, in MB."""
    return []


@pytest.fixture
async def bus(bus):
    """A bus that caches little: what it keeps on purpose is no leak."""
    await bus.stop()
    await bus.start(cache_bytes=2**20)
    return bus


@pytest.fixture
async def tasks_at_rest(bus):
    """What runs while nobody is there."""
    return bus_tasks()


@pytest.fixture
async def channel(bus):
    async with grpc.aio.insecure_channel(bus.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


@pytest.fixture
async def served(bus, channel, ends, resident, caplog):
    """A bus that must be as good as new after the test."""
    configure_logging(LogSettings(level="warning"))
    faults: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    yield bus
    assert set(ends) <= {"stands", "cut", *PROPER_ENDS}
    assert ends["stands"] > 0, "some streams stand to their end"
    assert ends[grpc.StatusCode.INVALID_ARGUMENT] > 0, "some frames end their stream"
    # The traceback of an exception that gRPC has yet to forget may hold the last few.
    assert alive(ClientStream) <= 2 * STREAMS_AT_ONCE
    assert all(group.members == 0 for kind in range(1, 7) for group in bus.broker.groups(kind))
    assert faults == []
    assert caplog.records == [], "gRPC logs exceptions that a method did not expect"
    growth = resident[-1] - resident[len(resident) // 5]
    assert growth < 50, f"memory grew by {growth:.0f} MB over {len(resident)} examples"
    async with OonaClient(bus.target, client_id="a good client") as client:
        published = await client.publish(
            event_pb2.KIND_EVENTS,
            [new_event("run-1", run_ended=run_pb2.RunEnded(error="the end"))],
            timeout_s=10,
        )
        start = oona_pb2.StartAt(offset=published.first_offset)
        async with client.subscribe(event_pb2.KIND_EVENTS, group="good", start=start) as subscription:
            record = await anext(subscription)
            assert record.event.run_ended.error == "the end"
            assert await subscription.ack(record) == published.first_offset + 1


@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(seeds=st.lists(frames, min_size=12, max_size=24), number=st.integers(0, 2**32))
@pytest.mark.timeout(0 if FRAMES else 120)
async def test_nonsense_neither_hangs_nor_crashes_nor_leaks(
    served, tasks_at_rest, channel, ends, resident, seeds, number
):
    streams = iter(bursts(seeds, Random(number)))

    async def talk() -> None:
        for stream in streams:
            ends[await converse(channel, stream)] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(STREAMS_AT_ONCE):
            tasks.create_task(talk())
    await until(lambda: bus_tasks() <= tasks_at_rest, "tasks are left over")
    resident.append(resident_mb())
