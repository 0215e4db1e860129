"""Runs without number: what one client makes of them must not hold up, or drive out, the runs of others."""

import asyncio

import grpc
import pytest

from esperml.client import BehindFloorError, CallFailedError, OonaClient
from esperml.tamiyo import loop as loop_module
from esperml.tamiyo import rebuilding
from esperml.tamiyo.loop import GROUP, TamiyoLoop
from esperml.tamiyo.policies import ChancePolicy
from esperml.v1 import event_pb2, oona_pb2, run_pb2

EVENTS, TELEMETRY, DECISIONS = event_pb2.KIND_EVENTS, event_pb2.KIND_TELEMETRY, event_pb2.KIND_DECISIONS
COMMANDS = event_pb2.KIND_COMMANDS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


class Speaker:
    """Makes the events of one run and publishes them."""

    def __init__(self, tools, client, run_id, **started):
        self._client = client
        self._host = tools.Host(None, run_id, **started)
        self._host.send = lambda kind, event: (kind, event)

    async def start(self):
        await self._publish(self._host.start())

    async def report(self, step):
        await self._publish(self._host.report(step))

    async def end(self, step):
        await self._publish(self._host.end(step))

    async def _publish(self, said):
        kind, event = said
        await self._client.publish(kind, [event])


@pytest.fixture
async def client(bus):
    async with OonaClient(bus.target, client_id="sessions") as client, asyncio.timeout(60):
        yield client


async def first(client, kind, run_id, count=1):
    async with client.subscribe(kind, run_ids=[run_id], start=EARLIEST) as subscription:
        return [(await anext(subscription)).event for _ in range(count)]


async def until(condition):
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def reports(tools, names):
    graph = tools.graph()
    return [tools.Host(None, name).event(health_report=tools.report(graph, 100)) for name in names]


async def test_a_search_that_takes_for_ever_holds_up_no_run_that_is_known(tools, tmp_path, bus, client, monkeypatch):
    gate, searching, search = asyncio.Event(), asyncio.Event(), rebuilding._records

    async def slow(*arguments):
        searching.set()
        await gate.wait()
        async for record in search(*arguments):
            yield record

    lost = Speaker(tools, client, "lost")
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        await lost.start()
        await lost.report(100)
        await first(client, DECISIONS, "lost")
    monkeypatch.setattr(rebuilding, "_records", slow)
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        await lost.report(200)
        await searching.wait()
        live = Speaker(tools, client, "live")
        await live.start()
        await live.report(100)
        assert (await first(client, DECISIONS, "live"))[0].decision.step == 100
        gate.set()
        decided = await first(client, DECISIONS, "lost", 2)
        assert [event.decision.step for event in decided] == [100, 200]


async def test_searches_do_not_grow_in_number_with_the_runs_that_are_not_there(
    tools, tmp_path, bus, client, monkeypatch
):
    searches, search = [], rebuilding._records

    def counted(client, kind, run_ids):
        searches.append((kind, len(run_ids)))
        return search(client, kind, run_ids)

    monkeypatch.setattr(rebuilding, "_records", counted)
    monkeypatch.setattr(rebuilding, "MAX_MISSING", 999)
    loop = TamiyoLoop(tools.controller(tmp_path))
    async with loop.running(bus.target):
        names = [f"nobody-{index}" for index in range(1000)]
        await client.publish(TELEMETRY, reports(tools, names))
        await until(lambda: len(loop._rebuilding.missing) == 999 and not loop._rebuilding._searched)
    # Nor are the long logs read: the short one, in which starts stand, has none of them.
    assert {kind for kind, _ in searches} == {EVENTS}
    assert len(searches) < 50
    assert sum(runs for _, runs in searches) == len(names)


async def test_a_flood_of_starts_drives_out_no_run_and_is_told_so(tools, tmp_path, bus, client):
    controller = tools.controller(tmp_path, max_runs=3)
    async with TamiyoLoop(controller).running(bus.target):
        live = Speaker(tools, client, "live")
        await live.start()
        await live.report(100)
        flood = [tools.Host(None, f"flood-{index}") for index in range(50)]
        starts = [host.event(run_started=run_pb2.RunStarted(graph=host.graph)) for host in flood]
        await client.publish(EVENTS, starts)
        await client.publish(TELEMETRY, reports(tools, [host.run_id for host in flood]))
        [told] = await first(client, COMMANDS, "flood-49")
        assert told.notice.code == run_pb2.NOTICE_CODE_NOT_FOLLOWED
        await live.report(200)
        assert [event.decision.step for event in await first(client, DECISIONS, "live", 2)] == [100, 200]
        assert {run.run_id for run in controller.runs()} == {"live", "flood-0", "flood-1"}


async def test_what_comes_of_many_runs_is_published_together(tools, tmp_path, bus, client, monkeypatch):
    published, publish = [], TamiyoLoop.publish

    async def counted(self, outgoing):
        published.append(len(outgoing))
        await publish(self, outgoing)

    monkeypatch.setattr(TamiyoLoop, "publish", counted)
    hosts = [tools.Host(None, f"run-{index}") for index in range(320)]
    await client.publish(EVENTS, [host.event(run_started=run_pb2.RunStarted(graph=host.graph)) for host in hosts])
    async with TamiyoLoop(tools.controller(tmp_path, max_runs=1)).running(bus.target):
        await first(client, COMMANDS, "run-319")
    assert sum(published) == 319
    assert len(published) < 64


async def test_a_run_that_found_no_place_is_followed_once_there_is_one(tools, tmp_path, bus, client):
    controller = tools.controller(tmp_path, max_runs=1)
    async with TamiyoLoop(controller).running(bus.target):
        one, other = Speaker(tools, client, "one"), Speaker(tools, client, "other")
        await one.start()
        await other.start()
        await first(client, COMMANDS, "other")
        await other.report(100)
        await one.end(10)
        await until(lambda: controller.has_room)
        await other.report(200)
        assert [event.decision.step for event in await first(client, DECISIONS, "other")] == [200]


async def test_an_end_that_waits_for_its_last_reports_holds_up_no_other_run(tools, tmp_path, bus, client, monkeypatch):
    monkeypatch.setattr(loop_module, "CATCH_UP_S", 3600)
    controller = tools.controller(tmp_path)
    loop = TamiyoLoop(controller)
    async with client.subscribe(TELEMETRY, group=GROUP) as another:
        # Another member of the group keeps a report to itself, so that the end waits.
        await client.publish(TELEMETRY, reports(tools, ["somebody"]))
        await anext(another)
        async with loop.running(bus.target):
            one, other = Speaker(tools, client, "one"), Speaker(tools, client, "other")
            await one.start()
            await one.end(10)
            await until(lambda: "one" in loop._ending)
            await other.start()
            await until(lambda: controller.knows("other"))
            assert controller.follows("one")
            # What comes of the run behind its end is not held up by it either.
            await one.start()
            await until(lambda: "one" not in loop._ending)
            await until(lambda: controller.follows("one"))


class Failing(ChancePolicy):
    """A policy with a defect."""

    def judge(self, view, vocabulary):
        raise RuntimeError("a defect")


async def test_a_run_that_cannot_be_rebuilt_stops_no_other(tools, tmp_path, bus, client):
    bad, good = Speaker(tools, client, "bad", policy="failing"), Speaker(tools, client, "good")
    for run in (bad, good):
        await run.start()
        await run.report(100)
    for kind in (EVENTS, TELEMETRY):
        async with client.subscribe(kind, group=GROUP) as another:
            await another.ack(*[await anext(another) for _ in range(2)])
    controller = tools.controller(tmp_path)
    controller.policies.add(Failing("failing", 0.5))
    async with TamiyoLoop(controller).running(bus.target):
        await bad.report(200)
        await good.report(200)
        assert [event.decision.step for event in await first(client, DECISIONS, "good")] == [200]


async def test_a_purge_while_the_logs_are_searched_ends_nothing(tools, tmp_path, bus, client, monkeypatch):
    failures = [BehindFloorError(1), CallFailedError("DescribeTopic", grpc.StatusCode.UNAVAILABLE, "away")]
    search = rebuilding._records

    async def failing(*arguments):
        if failures:
            raise failures.pop()
        async for record in search(*arguments):
            yield record

    monkeypatch.setattr(rebuilding, "RETRY_S", 0.01)
    run = Speaker(tools, client, "run")
    await run.start()
    controller = tools.controller(tmp_path)
    async with client.subscribe(EVENTS, group=GROUP) as another:
        # The start goes to another member of the group, as when it was handled by a process that is gone.
        await another.ack(await anext(another))
    monkeypatch.setattr(rebuilding, "_records", failing)
    async with TamiyoLoop(controller).running(bus.target):
        await run.report(100)
        assert [event.decision.step for event in await first(client, DECISIONS, "run")] == [100]
    assert failures == []


async def test_runs_that_start_while_they_are_about_to_be_searched_for_do_not_have_all_that_was_ever_kept_read(
    tools, client
):
    for run_id in ("early", "late"):
        await Speaker(tools, client, run_id).start()
    wanted = {"early": {TELEMETRY: 0}}
    records = rebuilding._records(client, EVENTS, wanted)
    found = asyncio.create_task(anext(records))
    await asyncio.sleep(0)  # It asks how long the log is.
    wanted.clear()
    assert (await found).event.run_id == "early"
    assert [record.event.run_id async for record in records] == []
    assert [record async for record in rebuilding._records(client, EVENTS, wanted)] == []
