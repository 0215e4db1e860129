"""Confirmed means stored and synced, whatever happens to the process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esperml.client import Backoff, OonaClient
from esperml.v1 import event_pb2, oona_pb2

HERE = Path(__file__).parent
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


class Process:
    """The bus in a process of its own, on one file and one port."""

    def __init__(self, path: Path, **environment: str) -> None:
        self.path = path
        self.port = 0
        self.environment = {**os.environ, **environment}
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "serve_bus.py", self.path, str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def process(tmp_path):
    process = Process(tmp_path / "oona.sqlite")
    process.start()
    yield process
    process.kill()


def wait_for(path: Path) -> None:
    while not path.exists():
        pass


@pytest.mark.slow
async def test_a_server_killed_under_load_has_every_confirmed_event_once_and_in_order(process, make_event):
    target = f"127.0.0.1:{process.port}"
    quick = Backoff(initial_s=0.01, longest_s=0.1)
    confirmed = 0
    stop = asyncio.Event()

    async with OonaClient(target, client_id="load", backoff=quick) as oona:

        async def publish() -> int:
            nonlocal confirmed
            sent = 0
            under_way: set[asyncio.Task[oona_pb2.Published]] = set()
            while not stop.is_set():
                frame = [make_event(f"run-{number % 3}", str(number)) for number in range(sent, sent + 7)]
                sent += 7
                task = asyncio.create_task(oona.publish(event_pb2.KIND_EVENTS, frame))
                under_way.add(task)
                if len(under_way) >= 8:
                    done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    confirmed += sum(task.result().count + task.result().duplicates for task in done)
            for result in await asyncio.gather(*under_way):
                confirmed += result.count + result.duplicates
            return sent

        publisher = asyncio.create_task(publish())
        for _ in range(4):
            level = confirmed
            while confirmed < level + 300:
                await asyncio.sleep(0)
                assert not publisher.done()
            process.kill()
            process.start()
        stop.set()
        sent = await publisher
        assert confirmed == sent
        end = (await oona.describe(event_pb2.KIND_EVENTS)).topic.next_offset
        async with oona.subscribe(event_pb2.KIND_EVENTS, start=EARLIEST, end_offset=end) as subscription:
            stored = [int(record.event.run_ended.error) async for record in subscription]
    assert stored == list(range(sent))


@pytest.fixture
def gated_process(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to hold up the system's sync")
    library = tmp_path / "sync_gate.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "sync_gate.c", "-ldl"], check=True)
    process = Process(
        tmp_path / "oona.sqlite",
        LD_PRELOAD=str(library),
        SYNC_GATE=str(tmp_path / "gate"),
        SYNC_HELD=str(tmp_path / "held"),
        SYNC_FAIL=str(tmp_path / "fail"),
    )
    process.start()
    yield process
    process.kill()


async def test_nothing_is_confirmed_before_the_sync_has_returned(gated_process, tmp_path, open_stream, make_event):
    gate, held = tmp_path / "gate", tmp_path / "held"
    async with open_stream(f"127.0.0.1:{gated_process.port}") as stream:
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
    async with open_stream(f"127.0.0.1:{gated_process.port}") as stream:
        fail.touch()
        publish = oona_pb2.Publish(kind=event_pb2.KIND_EVENTS, first_sequence=1, events=[make_event()])
        refused = await stream.answer(publish=publish)
        assert refused.rejected.reason == oona_pb2.REJECT_REASON_STORAGE
        fail.unlink()
        assert (await stream.answer(publish=publish)).published.count == 1
