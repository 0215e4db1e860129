"""What a cluster loses of its servers, its gateways or its network, and what its clients see of that: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from pathlib import Path

import pytest

from esperml.client import Backoff, OonaClient, StorageError
from esperml.oona.jetstream.nats_server import NatsServerError, cluster_of_three, find_nats_server
from esperml.settings import JetStreamSettings, OonaSettings
from esperml.v1 import event_pb2, oona_pb2

pytest.importorskip("nats")

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
# Rounds of each failure, and how long the network is cut: short in CI, as long as told otherwise.
ROUNDS = int(os.environ.get("CLUSTER_ROUNDS", "1"))
CUT_S = float(os.environ.get("CLUSTER_CUT_S", "1.5"))
LONG = ROUNDS > 1


def gateways_module():
    spec = importlib.util.spec_from_file_location("gateways", Path(__file__).with_name("gateways.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def cluster(tmp_path):
    """Three servers and two gateways, each in a process of its own."""
    try:
        find_nats_server()
    except NatsServerError as error:
        pytest.skip(str(error))
    module = gateways_module()
    servers = cluster_of_three(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.kill)
        for server in servers:
            await server.ready()
        urls = ",".join(server.url for server in servers)
        settings = OonaSettings(
            engine="jetstream", jetstream=JetStreamSettings(servers=urls, lease_s=2.0, timeout_s=30.0)
        )
        gateways = [module.GatewayProcess(settings) for _ in range(2)]
        for gateway in gateways:
            stack.callback(gateway.kill)
        await asyncio.gather(*(gateway.start() for gateway in gateways))
        yield servers, gateways


class Load:
    """Publishes numbered events of a few runs, through one client, and counts what was confirmed."""

    RUNS = 3
    FRAME = 6

    def __init__(self, targets: str, name: str, make_event) -> None:
        self.confirmed = 0
        self.sent = 0
        self.name = name
        self._stop = asyncio.Event()
        self._make_event = make_event
        self._oona = OonaClient(targets, client_id=name, backoff=Backoff(initial_s=0.02, longest_s=0.5))

    def runs(self) -> list[str]:
        return [f"{self.name}-{index}" for index in range(self.RUNS)]

    async def run(self) -> None:
        async with self._oona as oona:
            under_way: set[asyncio.Task[oona_pb2.Published]] = set()
            while not self._stop.is_set():
                numbers = range(self.sent, self.sent + self.FRAME)
                frame = [self._make_event(self.runs()[number % self.RUNS], str(number)) for number in numbers]
                self.sent += self.FRAME
                under_way.add(asyncio.create_task(oona.publish(EVENTS, frame)))
                if len(under_way) >= 8:
                    done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    self._count(done)
            done, _ = await asyncio.wait(under_way)
            self._count(done)

    def _count(self, done) -> None:
        self.confirmed += sum(task.result().count + task.result().duplicates for task in done)

    async def more(self, count: int) -> None:
        """Wait until so many more are confirmed."""
        level = self.confirmed + count
        async with asyncio.timeout(60):
            while self.confirmed < level:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()


class Member:
    """Takes part in a group, and adds to ``seen`` what came, as it came."""

    def __init__(self, targets: str, name: str, seen: list[tuple[str, int]]) -> None:
        self.seen = seen
        self._oona = OonaClient(targets, client_id=name, backoff=Backoff(initial_s=0.02, longest_s=0.5))

    async def run(self) -> None:
        async with self._oona as oona, oona.subscribe(EVENTS, group="g", start=EARLIEST) as subscription:
            async for records in subscription.batches():
                self.seen += [(record.event.run_id, int(record.event.run_ended.error)) for record in records]
                # Where the group has just gone to another gateway, they come again.
                with contextlib.suppress(StorageError):
                    await subscription.ack(*records)


def check_order(seen: list[tuple[str, int]]) -> None:
    """Over all members, each record of a run comes behind the one before it; what came before may come again."""
    last: dict[str, int] = {}
    for run_id, number in seen:
        before = last.get(run_id)
        assert before is None or number <= before + Load.RUNS, (run_id, before, number)
        last[run_id] = number if before is None else max(before, number)


async def check_log(target: str, loads: list[Load]) -> int:
    """Every confirmed event is in the log once, and the events of a run are in their order."""
    async with OonaClient(target, client_id="checker") as oona:
        end = (await oona.describe(EVENTS)).topic.next_offset
        async with oona.subscribe(EVENTS, start=EARLIEST, end_offset=end) as subscription:
            records = [record async for record in subscription]
    assert [record.offset for record in records] == list(range(end))
    for load in loads:
        assert load.confirmed == load.sent
        stored = [int(r.event.run_ended.error) for r in records if r.event.run_id in load.runs()]
        assert stored == list(range(load.sent))
    return end


class Wire:
    """Stands between a gateway and its server, and can be cut as a cable is: neither side is told.

    What was sent while it was cut comes through when it is whole again, as with TCP, even where who sent it has given
    the connection up by then.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cut(self, seconds: float) -> None:
        self._whole.clear()
        await asyncio.sleep(seconds)
        self._whole.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await self._whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
            with contextlib.closing(back):
                await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()


async def leader(servers) -> object:
    """The server that leads the stream of the events."""
    from esperml.oona.jetstream.link import Link
    from esperml.oona.log import LogUnavailableError

    link = await Link.open(JetStreamSettings(servers=",".join(server.url for server in servers)))
    try:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(LogUnavailableError):
                    info = await link.api("STREAM.INFO.OONA_EVENTS", {})
                    name = info.get("cluster", {}).get("leader")
                    if name is not None:
                        return next(server for server in servers if server.name == name)
                await asyncio.sleep(0.05)
    finally:
        await link.close()


async def kill_leader(servers, gateways, load) -> None:
    server = await leader(servers)
    server.kill()
    await load.more(200)
    server.start()
    await server.ready()


async def kill_gateway(servers, gateways, load) -> None:
    gateways[0].kill()
    await load.more(200)
    await gateways[0].start()


async def cut_network(servers, gateways, load) -> None:
    """No server hears another for a while: the cluster can store nothing."""
    for server in servers:
        server.signal(signal.SIGSTOP)
    await asyncio.sleep(CUT_S)
    for server in servers:
        server.signal(signal.SIGCONT)
    await load.more(200)


async def cut_leader_off(servers, gateways, load) -> None:
    """The leader stands still while the others choose a new one, and then finds itself deposed."""
    server = await leader(servers)
    server.signal(signal.SIGSTOP)
    await asyncio.sleep(CUT_S)
    server.signal(signal.SIGCONT)
    await load.more(200)


@pytest.mark.slow
@pytest.mark.timeout(120 * ROUNDS)
async def test_nothing_confirmed_is_lost_and_no_run_out_of_order_whatever_fails(cluster, make_event, capsys):
    servers, gateways = cluster
    both, reverse = (",".join(gateway.target for gateway in order) for order in (gateways, gateways[::-1]))
    loads = [Load(both, "load-1", make_event), Load(reverse, "load-2", make_event)]
    seen: list[tuple[str, int]] = []
    members = [Member(both, "member-1", seen), Member(reverse, "member-2", seen)]
    async with asyncio.TaskGroup() as tasks:
        publishing = [tasks.create_task(load.run()) for load in loads]
        consuming = [tasks.create_task(member.run()) for member in members]
        for _ in range(ROUNDS):
            for failure in (kill_gateway, kill_leader, cut_leader_off, cut_network):
                await loads[0].more(100)
                began_s = asyncio.get_running_loop().time()
                await failure(servers, gateways, loads[1])
                await loads[0].more(100)
                if LONG:
                    took_s = asyncio.get_running_loop().time() - began_s
                    with capsys.disabled():
                        print(f"{failure.__name__}: {took_s:.1f} s, {sum(load.confirmed for load in loads)} confirmed")
        for load in loads:
            load.stop()
        await asyncio.gather(*publishing)
        end = await check_log(reverse, loads)
        async with asyncio.timeout(60):
            while len(set(seen)) < end:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for task in consuming:
            task.cancel()
    check_order(seen)
    again = len(seen) - end
    with capsys.disabled():
        if LONG:
            print(f"{end} events, each once in the log; {again} delivered again")


# nats-py leaves a connection on which no answer came to the garbage collector, which closes it and says so.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(60 + 60 * ROUNDS + 2 * CUT_S * ROUNDS)
async def test_a_gateway_whose_cable_is_cut_for_a_while_loses_nothing_and_doubles_nothing(
    jetstream_settings, make_event
):
    cluster = jetstream_settings.jetstream.model_copy(update={"lease_s": 1.0, "timeout_s": 2.0, "monitoring": ""})
    port = int(cluster.servers.rpartition(":")[2])
    module = gateways_module()
    async with contextlib.AsyncExitStack() as stack:
        wire = await stack.enter_async_context(Wire(port))
        gateways = []
        for url in (wire.url, cluster.servers):
            settings = {"jetstream": cluster.model_copy(update={"servers": url})}
            gateways.append(module.Gateway(jetstream_settings.model_copy(update=settings)))
            await gateways[-1].start()
            stack.push_async_callback(gateways[-1].stop)
        both, reverse = (",".join(gateway.target for gateway in order) for order in (gateways, gateways[::-1]))
        loads = [Load(both, "load-1", make_event), Load(reverse, "load-2", make_event)]
        seen: list[tuple[str, int]] = []
        members = [Member(both, "member-1", seen), Member(reverse, "member-2", seen)]
        async with asyncio.TaskGroup() as tasks:
            publishing = [tasks.create_task(load.run()) for load in loads]
            consuming = [tasks.create_task(member.run()) for member in members]
            for _ in range(ROUNDS):
                # Shorter than it takes to notice, and longer: what was under way comes behind what was tried again.
                for seconds in (0.5, 2.0 + CUT_S):
                    for load in loads:
                        await load.more(60)
                    cutting = tasks.create_task(wire.cut(seconds))
                    await loads[1].more(30)  # Nobody else minds.
                    await cutting
            for load in loads:
                await load.more(60)
                load.stop()
            await asyncio.gather(*publishing)
            end = await check_log(gateways[1].target, loads)
            async with asyncio.timeout(60):
                while len(set(seen)) < end:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            for task in consuming:
                task.cancel()
        check_order(seen)
