"""Many streams at once: each publishes and reads a little, and one consumer among them that stalls costs them nothing.

The short form takes seconds. ``SOAK_STREAMS=1000`` opens that many and takes minutes; ``-s`` shows the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from statistics import quantiles

import pytest

from esperml.bench.oona.figures import estimate
from esperml.client import OonaClient, new_event
from esperml.settings import LogSettings, configure_logging
from esperml.v1 import event_pb2, oona_pb2, run_pb2

STREAMS = int(os.environ.get("SOAK_STREAMS", "0"))
LONG = STREAMS > 0
STREAMS = STREAMS or 100
# Pairs of blocks: without the stalled consumer, and with it.
PAIRS = 12 if LONG else 3
BLOCK_S = 10.0 if LONG else 0.6
# What is sent to a consumer before it stalls is sent in this time, which is not counted.
SETTLING_S = 2.0 if LONG else 0.3
# All streams together, so that the machine is busy and not full.
EVENTS_PER_S = 200.0 if LONG else 150.0
BACKLOG_FRAMES, FRAME_EVENTS, EVENT_BYTES = 40, 256, 2048
DEADLINE_S = 60
MAX_GROWTH_MB = 50
KIND = event_pb2.KIND_EVENTS


def event(run_id: str, text: str) -> event_pb2.Event:
    return new_event(run_id, run_ended=run_pb2.RunEnded(error=text))


class Session:
    """A client that publishes events of a run of its own, and reads that run."""

    def __init__(self, target: str, number: int) -> None:
        self.number = number
        self.run_id = f"run-{number}"
        self.client = OonaClient(target, client_id=f"session-{number}")
        self.subscription = self.client.subscribe(KIND, run_ids=[self.run_id], credit=16)
        self.seen = 0

    async def __aenter__(self) -> Session:
        await self.client.__aenter__()
        await self.subscription.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def round_trip_s(self) -> float:
        """Publish one event and wait until it is delivered; how long that took."""
        self.seen += 1
        started_s = time.perf_counter()
        _, record = await asyncio.gather(
            self.client.publish(KIND, [event(self.run_id, str(self.seen))]), anext(self.subscription)
        )
        elapsed_s = time.perf_counter() - started_s
        assert (record.event.run_id, record.event.run_ended.error) == (self.run_id, str(self.seen))
        return elapsed_s


async def block(sessions: list[Session], length_s: float = BLOCK_S) -> list[float]:
    """All sessions in turn, evenly over the block; how long each round trip took, in s."""
    rounds = max(round(EVENTS_PER_S * length_s / len(sessions)), 1)
    start_s = time.perf_counter()

    async def live(session: Session) -> list[float]:
        took_s = []
        for index in range(rounds):
            at_s = start_s + length_s * (index + session.number / len(sessions)) / rounds
            await asyncio.sleep(max(at_s - time.perf_counter(), 0))
            took_s.append(await session.round_trip_s())
        return took_s

    async with asyncio.timeout(DEADLINE_S):
        return [took_s for some in await asyncio.gather(*map(live, sessions)) for took_s in some]


@contextlib.asynccontextmanager
async def stalled_consumer(open_stream, target: str):
    """A stream that asked for the whole log, allowed all of it to be sent, and reads none of it."""
    async with open_stream(target, client_id="stalled") as stream:
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
        await stream.answer(subscribe=oona_pb2.Subscribe(subscription_id=1, kind=KIND, start=start))
        await stream.send(grant=oona_pb2.Grant(subscription_id=1, messages=2**40))
        yield


@pytest.fixture
def server(start_bus_process):
    return start_bus_process(
        ESPER_OONA__MAX_STREAMS=str(STREAMS + 10),
        # What is cached on purpose shall not look like what a stalled consumer costs.
        ESPER_OONA__CACHE_BYTES=str(6 * 2**20),
        ESPER_LOG__LEVEL="warning",
        OMP_NUM_THREADS="1",
    )


@pytest.mark.timeout(0 if LONG else 120)
async def test_a_stalled_consumer_among_many_streams_costs_the_others_nothing(server, open_stream):
    configure_logging(LogSettings(level="warning"))  # A line a stream would be too much.
    async with contextlib.AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(OonaClient(server.target, client_id="backlog"))
        for _ in range(BACKLOG_FRAMES):
            await publisher.publish(KIND, [event("backlog", "x" * EVENT_BYTES) for _ in range(FRAME_EVENTS)])
        opening_s = time.perf_counter()
        sessions = [Session(server.target, number) for number in range(STREAMS)]
        for some in range(0, STREAMS, 50):
            await asyncio.gather(*map(stack.enter_async_context, sessions[some : some + 50]))
        opening_s = time.perf_counter() - opening_s
        await block(sessions)  # Warms up; not counted.

        before_mb, cpu_s, wall_s = server.resident_mb(), server.cpu_s(), time.perf_counter()
        quotients, alone_s, stalled_s, resident_mb = [], [], [], []
        for pair in range(PAIRS):
            for with_stalled in (False, True) if pair % 2 else (True, False):
                async with stalled_consumer(open_stream, server.target) if with_stalled else contextlib.nullcontext():
                    await block(sessions, SETTLING_S)
                    (stalled_s if with_stalled else alone_s).append(await block(sessions))
                    resident_mb.append(server.resident_mb())
            quotients.append(quantiles(stalled_s[-1], n=2)[0] / quantiles(alone_s[-1], n=2)[0])
        cpu_s, wall_s = server.cpu_s() - cpu_s, time.perf_counter() - wall_s

    found = estimate(quotients)
    for name, blocks in (("alone", alone_s), ("beside a stalled consumer", stalled_s)):
        cuts = quantiles([took_s * 1e3 for some in blocks for took_s in some], n=100)
        print(f"{STREAMS} streams {name}: round trip p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")
    print(f"quotient of medians {found.median:.3f} [{found.low:.3f}, {found.high:.3f}] over {PAIRS} pairs of blocks")
    print(
        f"opening took {opening_s:.1f} s; the server took {cpu_s / wall_s:.0%} of a core "
        f"and went from {before_mb:.0f} to {resident_mb[-1]:.0f} MB, at most {max(resident_mb):.0f} MB"
    )
    # A few short blocks beside other work tell a stop from a slowdown, and no more.
    assert found.low < (1.1 if LONG else 2.0)
    assert max(resident_mb) - before_mb < MAX_GROWTH_MB
