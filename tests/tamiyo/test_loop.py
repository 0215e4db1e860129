import asyncio

import pytest
import structlog
from structlog.testing import LogCapture

from esperml.client import OonaClient
from esperml.tamiyo.loop import NotConnectedError, TamiyoLoop, in_frames
from esperml.tamiyo.policies import ChancePolicy
from esperml.v1 import decision_pb2, event_pb2, oona_pb2

EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


class Recorder:
    """A controller's stand-in for :class:`Host`: keeps events to publish them on the bus instead."""

    def __init__(self):
        self.events = []

    def handle(self, kind, event):
        self.events.append((kind, event))
        return []


@pytest.fixture
async def client(bus):
    async with OonaClient(bus.target, client_id="session") as client:
        yield client


def session(tools, run_id, **started):
    host = tools.Host(Recorder(), run_id, **started)
    host.start()
    return host


async def publish(client, host):
    for kind, event in host.controller.events:
        await client.publish(kind, [event])
    host.controller.events.clear()


async def publish_answered(client, events, decided=0):
    """Publish one event after the other, waiting after each report until it is decided on."""
    for kind, event in events:
        await client.publish(kind, [event])
        if kind == event_pb2.KIND_TELEMETRY:
            decided += 1
            await collect(client, event_pb2.KIND_DECISIONS, decided, [event.run_id])


async def collect(client, kind, count, run_ids=()):
    """The first ``count`` distinct events; what is published at least once may come twice."""
    found = {}
    async with client.subscribe(kind, start=EARLIEST, run_ids=run_ids) as subscription:
        async for record in subscription:
            found.setdefault(record.event.event_id, record.event)
            if len(found) == count:
                return list(found.values())
    raise AssertionError("the subscription ended early")


async def test_reports_become_decisions_commands_and_experience_on_the_bus(tools, tmp_path, bus, client):
    controller = tools.controller(tmp_path)
    async with TamiyoLoop(controller).running(bus.target):
        host = session(tools, "run")
        for step in range(100, 1100, 100):
            host.report(step)
        host.end(1100)
        await publish_answered(client, host.controller.events)
        decisions = await collect(client, event_pb2.KIND_DECISIONS, 10)
        assert [event.decision.step for event in decisions] == list(range(100, 1100, 100))
        experience = await collect(client, event_pb2.KIND_EXPERIENCE, 10)
        assert [event.experience.index for event in experience] == list(range(10))
        assert experience[-1].experience.done
        sent = [event for event in decisions if event.decision.disposition == decision_pb2.DISPOSITION_SENT]
        commands = await collect(client, event_pb2.KIND_COMMANDS, len(sent))
        assert [event.command.decision_id for event in commands] == [event.decision.decision_id for event in sent]


async def test_what_is_malformed_stops_neither_its_run_nor_another(tools, tmp_path, bus, client):
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        bad, good = session(tools, "bad"), session(tools, "good")
        for host in (bad, good):
            host.report(100)
        bad.controller.events[-1][1].health_report.layers[0].dead_fraction = float("nan")
        bad.report(200)
        for host in (bad, good):
            await publish(client, host)
        for run_id, step in (("bad", 200), ("good", 100)):
            [event] = await collect(client, event_pb2.KIND_DECISIONS, 1, [run_id])
            assert event.decision.step == step


class Failing(ChancePolicy):
    """A policy with a defect."""

    def judge(self, view, vocabulary):
        raise RuntimeError("a defect")


async def test_a_run_that_fails_does_not_stop_another(tools, tmp_path, bus, client):
    controller = tools.controller(tmp_path)
    controller.policies.add(Failing("failing", 0.5))
    async with TamiyoLoop(controller).running(bus.target):
        for host in (session(tools, "bad", policy="failing"), session(tools, "good")):
            host.report(100)
            await publish(client, host)
        [event] = await collect(client, event_pb2.KIND_DECISIONS, 1)
        assert event.run_id == "good"


@pytest.mark.parametrize("stop_at", [1, 4, 7])
async def test_a_controller_that_starts_again_goes_on_where_the_last_one_stopped(tools, tmp_path, bus, client, stop_at):
    host = session(tools, "run", paired_run="twin")
    twin = session(tools, "twin", policy="nothing")
    for step in range(100, 1100, 100):
        twin.report(step, held_out_loss=1.0)
        host.report(step, held_out_loss=0.9)
    events = host.controller.events
    await publish(client, twin)
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        await publish_answered(client, events[: 1 + stop_at])
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        await publish_answered(client, events[1 + stop_at :], decided=stop_at)
        decided = await collect(client, event_pb2.KIND_DECISIONS, 10, ["run"])
        experience = await collect(client, event_pb2.KIND_EXPERIENCE, 9, ["run"])
    untouched = tools.Host(tools.controller(tmp_path), "run", paired_run="twin")
    untouched.start()
    expected = [
        decision
        for step in range(100, 1100, 100)
        for decision in tools.told(untouched.report(step, held_out_loss=0.9)).decisions
    ]
    assert [event.decision.action for event in decided] == [decision.action for decision in expected]
    assert [event.experience.index for event in experience] == list(range(9))
    assert all(event.experience.HasField("reward") for event in experience)


async def test_a_bus_that_goes_away_and_comes_back_loses_nothing(tools, tmp_path, bus, client):
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        host = session(tools, "run")
        host.report(100)
        await publish(client, host)
        await collect(client, event_pb2.KIND_DECISIONS, 1)
        await bus.stop()
        await bus.start()
        host.report(200)
        await publish(client, host)
        decided = await collect(client, event_pb2.KIND_DECISIONS, 2)
        assert [event.decision.step for event in decided] == [100, 200]


async def test_telemetry_without_a_start_is_held_and_the_logs_are_searched_once(tools, tmp_path, bus, client):
    controller = tools.controller(tmp_path)
    loop = TamiyoLoop(controller)
    async with loop.running(bus.target):
        host = tools.Host(Recorder(), "run")
        host.report(100)
        host.report(200)
        await publish(client, host)
        async with loop._progress:
            await loop._progress.wait_for(lambda: loop._committed.get(event_pb2.KIND_TELEMETRY, 0) == 2)
        while not loop._rebuilding.missing:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert list(loop._rebuilding.missing) == ["run"]
        host.start()
        await publish(client, host)
        [decided] = await collect(client, event_pb2.KIND_DECISIONS, 1)
        assert decided.decision.step == 200


async def test_a_backlog_is_taken_in_without_deciding_on_what_is_long_past(tools, tmp_path, bus, client):
    host = session(tools, "run")
    for step in range(100, 4100, 100):
        host.report(step)
    await publish(client, host)
    controller = tools.controller(tmp_path)
    async with TamiyoLoop(controller).running(bus.target):
        host.report(4150)
        await publish(client, host)
        await collect(client, event_pb2.KIND_DECISIONS, 1)
        host.report(4250)
        await publish(client, host)
        decisions = await collect(client, event_pb2.KIND_DECISIONS, 2)
    assert [event.decision.step for event in decisions] == [4150, 4250]
    assert len(controller.state("run").history) == 16


async def test_a_loop_that_does_not_run_cannot_publish(tools, tmp_path):
    with pytest.raises(NotConnectedError):
        await TamiyoLoop(tools.controller(tmp_path)).publish([(event_pb2.KIND_DECISIONS, event_pb2.Event())])


async def test_an_error_inside_the_context_is_not_swallowed(tools, tmp_path, bus):
    with pytest.raises(ExceptionGroup) as caught:
        async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
            raise KeyError("inside")
    assert caught.group_contains(KeyError, match="inside")


def test_frames_keep_order_within_a_kind_and_stay_small():
    def event(name, size=10):
        made = event_pb2.Event(event_id=name)
        made.decision.reason = "x" * size
        return made

    decisions, commands = event_pb2.KIND_DECISIONS, event_pb2.KIND_COMMANDS
    outgoing = [(decisions, event("a")), (commands, event("b")), (decisions, event("c", 500)), (decisions, event("d"))]
    frames = in_frames(outgoing, 200)
    assert [(kind, [event.event_id for event in events]) for kind, events in frames] == [
        (decisions, ["a"]),
        (decisions, ["c"]),
        (decisions, ["d"]),
        (commands, ["b"]),
    ]


class Ear(LogCapture):
    """The program's log, to wait for what it says."""

    def __init__(self):
        super().__init__()
        self._spoke = asyncio.Event()

    def __call__(self, logger, method_name, event_dict):
        try:
            super().__call__(logger, method_name, event_dict)
        finally:
            self._spoke.set()

    async def hear(self, **said):
        async with asyncio.timeout(30):
            while not any(said.items() <= entry.items() for entry in self.entries):
                self._spoke.clear()
                await self._spoke.wait()


@pytest.fixture
async def ear():
    ear, processors = Ear(), structlog.get_config()["processors"]
    before = list(processors)
    # In place, as structlog's own capture does: loggers that were bound before keep the list.
    processors[:] = [ear]
    yield ear
    processors[:] = before


async def test_a_disk_that_refuses_acknowledgements_leaves_the_loop_standing(tools, tmp_path, bus, client, ear):
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON groups BEGIN SELECT RAISE(ABORT, 'full'); END"
    bus.execute(refuse)
    async with TamiyoLoop(tools.controller(tmp_path)).running(bus.target):
        await ear.hear(event="group_not_founded")
        bus.execute("DROP TRIGGER refuse")
        await publish(client, session(tools, "before"))
        await ear.hear(event="run_started", run_id="before")
        bus.execute(refuse)
        for run_id in ("first", "second"):
            await publish(client, session(tools, run_id))
            await ear.hear(event="run_started", run_id=run_id)
        await ear.hear(event="acknowledgement_not_stored")


async def test_what_the_bus_refuses_takes_nothing_else_with_it(tools, tmp_path, bus, client, ear):
    loop = TamiyoLoop(tools.controller(tmp_path))
    decided = [event_pb2.Event(event_id=name, run_id=name) for name in ("first", "refused", "last")]
    for event in decided[::2]:
        event.decision.decision_id = "d"
    async with loop.running(bus.target):
        await loop._publish_what_can_be([(event_pb2.KIND_DECISIONS, event) for event in decided])
        stored = await collect(client, event_pb2.KIND_DECISIONS, 2)
    assert [event.run_id for event in stored] == ["first", "last"]
    await ear.hear(event="publish_refused", run_id="refused")
