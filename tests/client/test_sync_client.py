"""The client without asyncio does what the one with it does, on a server in a process of its own."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from esperml.client import (
    Backoff,
    BelowFloorError,
    CallFailedError,
    ClientClosedError,
    DrainTimeoutError,
    InvalidRequestError,
    OonaClient,
    PublishTimeoutError,
    StreamEndedError,
    SyncOonaClient,
    SyncSubscription,
    WrongPayloadError,
    new_event,
)
from esperml.client.subscription import Subscription
from esperml.v1 import event_pb2, oona_pb2, run_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
SERVE_BUS = Path(__file__).parents[1] / "oona" / "serve_bus.py"


class BusProcess:
    """A bus in a process of its own, on a port that it keeps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._port = "0"
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, str(SERVE_BUS), str(self._path), self._port]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[BusProcess]:
    bus = BusProcess(tmp_path_factory.mktemp("bus") / "oona.sqlite")
    yield bus
    bus.kill()


class Awaited:
    """A client with asyncio, driven as if it had none: what the parametrised tests call on either is the same."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def __enter__(self) -> Awaited:
        self._run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._inner.__aexit__(*error))

    def __iter__(self) -> Awaited:
        return self

    def __next__(self) -> event_pb2.Record:
        async def following() -> event_pb2.Record | None:
            return await anext(self._inner, None)

        record = self._run(following())
        if record is None:
            raise StopIteration
        return record

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            outcome = found(*arguments, **options)
            if inspect.isawaitable(outcome):
                return self._run(outcome)
            return Awaited(outcome, self._runner) if isinstance(outcome, Subscription) else outcome

        return call

    def _run(self, work: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return self._runner.run(run())


@pytest.fixture(params=["sync", "async"])
def connect(request, server) -> Iterator[Callable[..., Any]]:
    """Makes a client of either sort, with a client id of its own."""
    made = 0
    with asyncio.Runner() as runner:

        def connect(client_id: str = "", target: str = server.target) -> Any:
            nonlocal made
            made += 1
            client_id = client_id or f"{request.node.name}-{made}"[-128:]
            options: dict[str, Any] = {"client_id": client_id, "backoff": Backoff(0.01, 0.05)}
            if request.param == "sync":
                return SyncOonaClient(target, **options)
            return Awaited(OonaClient(target, **options), runner)

        yield connect


@pytest.fixture
def run(request) -> str:
    """A run of the test's own: all of them share a server."""
    return request.node.name[-128:]


def events(run_id: str, first: int, count: int = 1) -> list[event_pb2.Event]:
    return [new_event(run_id, run_ended=run_pb2.RunEnded(error=str(mark))) for mark in range(first, first + count)]


def marks(records: Sequence[event_pb2.Record]) -> list[int]:
    return [int(record.event.run_ended.error) for record in records]


# What both do.


def test_what_is_published_is_read_back(connect, run):
    with connect() as oona:
        oona.connected()
        assert oona.is_connected
        first = oona.publish(EVENTS, events(run, 0, 3)).first_offset
        assert oona.publish(EVENTS, events(run, 3, 2)).count == 2
        assert oona.next_sequence == 6
        with oona.subscribe(EVENTS, run_ids=[run], start=oona_pb2.StartAt(offset=first), end_offset=first + 5) as found:
            assert found.start_offset == first
            assert found.high_watermark >= first + 5
            assert marks(list(found)) == [0, 1, 2, 3, 4]


def test_a_group_acknowledges_gives_back_and_extends(connect, run):
    with connect() as oona:
        end = oona.publish(EVENTS, events(run, 0, 4)).first_offset + 4
        deadline = timedelta(seconds=30)
        with oona.subscribe(EVENTS, group=run, run_ids=[run], start=EARLIEST, ack_deadline=deadline) as records:
            first = next(records)
            second = next(records)
            records.extend(first, second)
            records.nack(second)
            records.ack(first)
            rest = [next(records) for _ in range(3)]
            assert marks(rest) == [1, 2, 3]
            assert rest[0].delivery_attempt == 2
            assert records.ack(*rest) == end


def test_refusals_are_raised_where_they_are_caused(connect, run):
    with connect() as oona:
        with pytest.raises(WrongPayloadError):
            oona.publish(event_pb2.KIND_COMMANDS, events(run, 0))
        with pytest.raises(InvalidRequestError):
            oona.publish(EVENTS, [])
        with pytest.raises(InvalidRequestError), oona.subscribe(EVENTS, start=oona_pb2.StartAt(offset=10**9)):
            pass
        offset = oona.publish(EVENTS, events(run, 0)).first_offset
        with oona.subscribe(EVENTS, start=oona_pb2.StartAt(offset=offset)) as private:
            record = next(private)
            with pytest.raises(InvalidRequestError, match="private reader"):
                private.ack(record)
        assert oona.publish(EVENTS, events(run, 1)).count == 1
    with connect("x" * 200) as oona, pytest.raises(StreamEndedError, match=r"open\.client_id"):
        oona.publish(EVENTS, events(run, 0))


def test_topics_are_described_and_purged(connect, run):
    with connect() as oona:
        offset = oona.publish(EVENTS, events(run, 0)).first_offset
        assert oona.describe(EVENTS).topic.next_offset > offset
        assert len(oona.topics()) == 6
        assert oona.purge(EVENTS, offset) == offset
        with pytest.raises(BelowFloorError) as caught, oona.subscribe(EVENTS, start=oona_pb2.StartAt(offset=0)):
            pass
        assert caught.value.earliest_offset == offset
        with pytest.raises(CallFailedError, match="PurgeTopic"):
            oona.purge(event_pb2.KIND_UNSPECIFIED, 1)


def test_draining_a_subscription_ends_its_iteration(connect, run):
    with connect() as oona:
        oona.publish(EVENTS, events(run, 0, 3))
        with oona.subscribe(EVENTS, run_ids=[run], start=EARLIEST) as records:
            records.caught_up()
            first = next(records)
            records.drain()
            assert marks([first, *records]) == [0, 1, 2]
            records.unsubscribe()
            assert list(records) == []


def test_draining_a_client_closes_it(connect, run):
    with connect() as oona:
        oona.publish(EVENTS, events(run, 0))
        oona.drain()
        with pytest.raises(ClientClosedError):
            oona.publish(EVENTS, events(run, 1))


def test_draining_gives_up_after_a_time(connect, run):
    # Nobody leaves the subscription.
    with connect() as oona, oona.subscribe(EVENTS), pytest.raises(DrainTimeoutError):
        oona.drain(timeout_s=0.05)


def test_a_dead_server_is_waited_for(connect, run, tmp_path):
    bus = BusProcess(tmp_path / "oona.sqlite")
    try:
        with connect(target=bus.target) as oona:
            oona.publish(EVENTS, events(run, 0))
            bus.kill()
            with pytest.raises(PublishTimeoutError):
                oona.publish(EVENTS, events(run, 1), timeout_s=0.2)
            with pytest.raises(CallFailedError):
                oona.topics()
            bus.start()
            assert oona.publish(EVENTS, events(run, 2), timeout_s=20).count == 1
            with oona.subscribe(EVENTS, start=EARLIEST, end_offset=3) as records:
                assert marks(list(records)) == [0, 1, 2]
    finally:
        bus.kill()


# What only the one without asyncio does.


def test_it_has_every_call_of_the_other_with_the_same_arguments():
    for one, other in ((OonaClient, SyncOonaClient), (Subscription, SyncSubscription)):
        internal = {"send", "add", "remove", "requests", "stands"}  # What client and subscription tell one another.
        for name, method in inspect.getmembers(one, inspect.isfunction):
            if name.startswith(("_", "on_", "fail")) or name in internal:
                continue
            expected = list(inspect.signature(method).parameters.values())
            assert list(inspect.signature(getattr(other, name)).parameters.values()) == expected, name
    parameters = inspect.signature(OonaClient).parameters
    assert list(inspect.signature(SyncOonaClient).parameters.values()) == list(parameters.values())


def test_frames_published_soon_keep_their_order(server, run):
    with SyncOonaClient(server.target, client_id=run) as oona:
        futures = [oona.publish_soon(EVENTS, events(run, number)) for number in range(300)]
        offsets = [future.result().first_offset for future in futures]
        assert offsets == sorted(offsets)
        assert len(set(offsets)) == 300


def test_batches_hand_over_whatever_has_come(server, run):
    with SyncOonaClient(server.target, client_id=run) as oona:
        oona.publish(EVENTS, events(run, 0, 50))
        end = oona.describe(EVENTS).topic.next_offset
        with oona.subscribe(EVENTS, run_ids=[run], start=EARLIEST, end_offset=end) as records:
            batches = list(records.batches())
    assert [mark for batch in batches for mark in marks(batch)] == list(range(50))
    assert len(batches) < 50


def test_a_record_given_back_takes_back_what_was_fetched_of_its_run(server, run):
    other = run[:-1] + "!"
    with SyncOonaClient(server.target, client_id=run) as oona:
        oona.publish(EVENTS, events(run, 0, 3) + events(other, 10, 2))
        with oona.subscribe(EVENTS, group=run, run_ids=[run, other], start=EARLIEST) as records:
            records.caught_up()
            records.nack(next(records))
            seen = []
            while len(seen) < 5:
                record = next(records)
                records.ack(record)
                seen.append((record.event.run_id, *marks([record])))
    assert [mark for run_id, mark in seen if run_id == run] == [0, 1, 2]
    assert [mark for run_id, mark in seen if run_id == other] == [10, 11]


def test_several_threads_use_one_client(server, run):
    with SyncOonaClient(server.target, client_id=run) as oona:
        threads = [threading.Thread(target=lambda: oona.publish(EVENTS, events(run, 0, 10))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert oona.next_sequence == 81


def test_the_thread_in_the_background_ends_with_the_last_client(server, run):
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "esper-oona"]

    with SyncOonaClient(server.target, client_id=run) as one, SyncOonaClient(server.target, client_id=run + "2"):
        assert threads() == ["esper-oona"]
        one.close()
        assert threads() == ["esper-oona"]
        with pytest.raises(ClientClosedError):
            one.publish(EVENTS, events(run, 0))
    assert threads() == []
    with pytest.raises(ClientClosedError):
        one.topics()


def test_a_subscription_outlives_its_client_no_longer_than_it_must(server, run):
    oona = SyncOonaClient(server.target, client_id=run)
    with oona, oona.subscribe(EVENTS) as subscription:
        oona.close()
        with pytest.raises(ClientClosedError):
            next(subscription)
        assert "esper-oona" not in {thread.name for thread in threading.enumerate()}


SCRIPT = """
import os, sys, threading
from esperml.client import ForkedClientError, SyncOonaClient, new_event
from esperml.v1 import event_pb2, run_pb2

EVENTS = event_pb2.KIND_EVENTS
event = new_event("script", run_ended=run_pb2.RunEnded())
oona = SyncOonaClient(sys.argv[1], client_id=sys.argv[2])
oona.__enter__()
oona.publish(EVENTS, [event])
"""


def script(server: BusProcess, name: str, body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT + body, server.target, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_forgets_to_close_its_client_ends_all_the_same(server, run):
    process = script(server, run, "subscription = oona.subscribe(EVENTS).__enter__()\nprint('done')\n")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output.splitlines()[-1]) == (0, "done"), errors
    assert "Traceback" not in errors


def test_ctrl_c_ends_the_wait_for_a_record(server, run):
    body = """
try:
    with oona, oona.subscribe(EVENTS, group=sys.argv[2]) as records:
        print("waiting", flush=True)
        for record in records:
            pass
except KeyboardInterrupt:
    print("interrupted")
"""
    process = script(server, run, body.replace("with oona, ", "with "))
    assert process.stdout is not None
    while "waiting" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "interrupted" in output
    assert "Traceback" not in errors
    with SyncOonaClient(server.target, client_id=run + "look") as oona:
        assert [group.members for group in oona.describe(EVENTS).groups if group.name == run] == [0]


def test_a_fork_is_told_that_the_client_did_not_come_along(server, run):
    body = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads.
child = os.fork()
if not child:
    try:
        oona.publish(EVENTS, [event])
    except ForkedClientError as error:
        os.write(1, str(error).encode())
        os._exit(7)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert oona.publish(EVENTS, [event]).count == 1
oona.close()
"""
    process = script(server, run, body)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "make one after the fork, or spawn" in output


def test_its_own_thread_cannot_wait_for_itself(server, run):
    with SyncOonaClient(server.target, client_id=run) as oona:
        future = oona.publish_soon(EVENTS, events(run, 0))
        problems: list[str] = []

        def again(_: object) -> None:
            try:
                oona.publish(EVENTS, events(run, 1))
            except RuntimeError as error:
                problems.append(str(error))

        future.add_done_callback(again)
        future.result()
        oona.publish(EVENTS, events(run, 2))
    assert problems == ["a client without asyncio cannot be used from its own thread"] or not problems
