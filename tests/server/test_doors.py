"""A whole server that asks for tokens: who gets in, who may do what, and what those are told who may not."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esperml.client import (
    CallFailedError,
    Credentials,
    ForbiddenError,
    OonaClient,
    ResourceExhaustedError,
    RunsClient,
    StreamEndedError,
    TamiyoClient,
    TamiyoError,
    new_event,
)
from esperml.oona.access import Role
from esperml.server import app, watch
from esperml.server.interceptor import NEEDS
from esperml.server.tokens import revoke
from esperml.v1 import decision_pb2, event_pb2, oona_pb2, run_pb2, runs_pb2, tamiyo_pb2
from esperml.v1 import health_pb2 as report_pb2

EVENTS, COMMANDS, TELEMETRY = event_pb2.KIND_EVENTS, event_pb2.KIND_COMMANDS, event_pb2.KIND_TELEMETRY
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL_S", 0.05)


def ended(run: str = "mine", mark: str = "") -> event_pb2.Event:
    return new_event(run, run_ended=run_pb2.RunEnded(error=mark))


def began(run: str) -> event_pb2.Event:
    """A run that Tamiyo takes on."""
    example = Path(__file__).resolve().parents[2] / "examples" / "decide.json"
    state = json_format.Parse(example.read_text(), tamiyo_pb2.DecideRequest()).state
    return new_event(run, run_started=run_pb2.RunStarted(graph=state.graph, parameters=1000))


def client(guarded, credentials: Credentials, name: str = "client") -> OonaClient:
    return OonaClient(guarded.target, client_id=name, credentials=credentials)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - it is on the other side of a network
            await asyncio.sleep(0.01)


async def test_a_host_cannot_have_its_run_compared_with_one_of_somebody_else(serve, make_token):
    start = began("mine")
    start.run_started.paired_run = "other"
    async with serve() as guarded, client(guarded, make_token("host", "mine")) as oona:
        with pytest.raises(ForbiddenError, match=r"events\[0\]\.run_started\.paired_run: run 'other' is not one"):
            await oona.publish(EVENTS, [start], timeout_s=20)
        start.run_started.paired_run = "mine"
        await oona.publish(EVENTS, [start], timeout_s=20)


async def test_a_host_publishes_for_its_runs_and_reads_their_commands_and_nothing_else(serve, make_token):
    host, controller = make_token("host", "mine*"), make_token("controller")
    async with serve() as guarded, client(guarded, host) as oona, client(guarded, controller, "tamiyo") as tamiyo:
        await oona.publish(EVENTS, [ended("mine-1")], timeout_s=20)
        report = report_pb2.HealthReport(step=1)
        await oona.publish(TELEMETRY, [new_event("mine-2", health_report=report)], timeout_s=20)
        async with oona.subscribe(COMMANDS, run_ids=["mine-1"]) as commands:
            command = decision_pb2.Command(decision_id="d")
            await tamiyo.publish(COMMANDS, [new_event("other", command=command), new_event("mine-1", command=command)])
            assert (await anext(commands)).event.run_id == "mine-1"
        for kind, event in ((EVENTS, ended("other")), (COMMANDS, new_event("mine-1", command=command))):
            with pytest.raises(ForbiddenError, match="role host, runs mine"):
                await oona.publish(kind, [event], timeout_s=20)
        for kind, runs, group in (
            (TELEMETRY, ["mine-1"], ""),
            (COMMANDS, ["other"], ""),
            (COMMANDS, [], ""),
            (COMMANDS, ["mine-1"], "tamiyo"),
        ):
            with pytest.raises(ForbiddenError):
                async with oona.subscribe(kind, run_ids=runs, group=group):
                    pass
        # The stream stands, and what was refused took no sequence.
        assert (await oona.publish(EVENTS, [ended("mine-1")], timeout_s=20)).count == 1


async def test_a_viewer_reads_all_and_publishes_nothing(serve, make_token):
    viewer, host = make_token("viewer"), make_token("host")
    async with serve() as guarded, client(guarded, viewer) as oona, client(guarded, host, "host") as publisher:
        await publisher.publish(EVENTS, [ended()], timeout_s=20)
        async with oona.subscribe(EVENTS, start=EARLIEST) as records:
            assert (await anext(records)).event.run_id == "mine"
        with pytest.raises(ForbiddenError, match="may not publish events; role host or admin may"):
            await oona.publish(EVENTS, [ended()], timeout_s=20)
        with pytest.raises(CallFailedError, match=r"may not call Oona.PurgeTopic; role admin may") as caught:
            await oona.purge(EVENTS, 1)
        assert caught.value.code is DENIED


async def test_without_a_token_or_with_a_wrong_one_nobody_comes_in_and_is_told_why(serve, make_token):
    expired = make_token("viewer", expires_at=datetime.now(UTC) - timedelta(days=1), name="late")
    wrong = Credentials(token="esper_00000000_" + "x" * 43)
    async with serve() as guarded:
        for credentials, said in (
            (Credentials(), "this server asks for a token"),
            (wrong, "unknown here, or was revoked"),
            (Credentials(token="password"), "the token is none"),
            (expired, "token 'late' has expired"),
        ):
            async with client(guarded, credentials) as oona:
                with pytest.raises(StreamEndedError, match=said) as caught:
                    await oona.connected()
            assert caught.value.code is UNKNOWN
            with pytest.raises(CallFailedError, match=said):
                await client(guarded, credentials).topics()
            async with TamiyoClient(guarded.target, credentials=credentials) as tamiyo:
                with pytest.raises(TamiyoError, match=said):
                    await tamiyo.policies()
        async with grpc.aio.insecure_channel(guarded.target) as channel:
            call = channel.unary_unary("/esperml.v1.Oona/ListTopics")
            with pytest.raises(grpc.aio.AioRpcError, match="must be Bearer"):
                await call(b"", metadata=[("authorization", "Basic abc")])


async def test_a_revoked_token_ends_its_open_streams_within_seconds(serve, make_token):
    viewer, other = make_token("viewer", name="ann"), make_token("viewer", name="bob")
    async with (
        serve() as guarded,
        client(guarded, viewer) as oona,
        client(guarded, other, "bob") as bystander,
        oona.subscribe(EVENTS) as records,
        bystander.subscribe(EVENTS),
    ):
        revoke(guarded.tokens, "ann")
        with pytest.raises(StreamEndedError, match="token 'ann' was revoked") as caught:
            async with asyncio.timeout(20):
                await anext(records)
        assert caught.value.code is UNKNOWN
        assert bystander.is_connected


async def test_a_token_that_expires_ends_its_open_streams(serve, make_token):
    viewer = make_token("viewer", expires_at=datetime.now(UTC) + timedelta(seconds=1.5))
    async with serve() as guarded, client(guarded, viewer) as oona, oona.subscribe(EVENTS) as records:
        with pytest.raises(StreamEndedError, match="has expired"):
            async with asyncio.timeout(20):
                await anext(records)


async def test_a_new_token_is_known_and_other_rights_hold_without_a_restart(serve, make_token):
    host = make_token("host", "mine", name="ann")
    async with serve() as guarded, client(guarded, host) as oona:
        await oona.connected()
        viewer = guarded.token("viewer")

        async def known() -> bool:
            try:
                await client(guarded, viewer).topics()
            except CallFailedError as error:
                return error.code is not UNKNOWN
            return True

        await until(known)
        text = guarded.tokens.read_text()
        guarded.tokens.write_text(text.replace('"mine"', '"other"'))

        async def allowed() -> bool:
            try:
                await oona.publish(EVENTS, [ended("other")], timeout_s=20)
            except ForbiddenError:
                return False
            return True

        await until(allowed)
        with pytest.raises(ForbiddenError):
            await oona.publish(EVENTS, [ended("mine")], timeout_s=20)


async def test_a_file_of_tokens_that_breaks_changes_nothing(serve, make_token, capsys):
    viewer = make_token("viewer")
    async with serve() as guarded:
        whole = guarded.tokens.read_text()
        guarded.tokens.write_text("{")
        said = ""
        async with asyncio.timeout(20):
            while "tokens_not_read" not in said:
                said += "".join(capsys.readouterr())
                await asyncio.sleep(0.01)
        assert await client(guarded, viewer).topics()
        guarded.tokens.write_text(whole)
        os.utime(guarded.tokens, (1, 1))
        assert await client(guarded, viewer).topics()


async def test_two_tokens_cannot_get_at_each_others_publishers(serve, make_token):
    ann, bob = make_token("host", name="ann"), make_token("host", name="bob")
    async with serve() as guarded, client(guarded, ann, "same") as first, client(guarded, bob, "same") as second:
        for _ in range(3):
            assert (await first.publish(EVENTS, [ended()], timeout_s=20)).count == 1
            assert (await second.publish(EVENTS, [ended()], timeout_s=20)).count == 1


async def test_a_controller_or_viewer_of_some_runs_sees_no_others(serve, make_token):
    viewer, everybody = make_token("viewer", "mine*"), make_token("viewer")
    admin, host = make_token("admin", "mine*"), make_token("host")
    async with serve() as guarded:
        async with client(guarded, host) as oona:
            for run in ("mine-1", "theirs"):
                await oona.publish(EVENTS, [began(run)], timeout_s=20)
        async with RunsClient(guarded.target, credentials=everybody) as everything:

            async def known() -> bool:
                return {run.run_id for run in await everything.runs()} >= {"mine-1", "theirs"}

            await until(known)
        async with RunsClient(guarded.target, credentials=viewer) as runs:
            assert [run.run_id for run in await runs.runs()] == ["mine-1"]
            assert (await runs.describe("mine-1")).run.run_id == "mine-1"
            with pytest.raises(TamiyoError, match="run 'theirs' is not one of those of token"):
                await runs.describe("theirs")
            with pytest.raises(TamiyoError, match=r"may not call Runs.PauseRun; role admin may"):
                await runs.pause("mine-1")
        async with RunsClient(guarded.target, credentials=admin) as runs:
            assert (await runs.pause("mine-1")).run_id == "mine-1"
            with pytest.raises(TamiyoError, match="theirs"):
                await runs.pause("theirs")
        with pytest.raises(CallFailedError, match="concerns every run"):
            await client(guarded, admin).purge(EVENTS, 0)
        async with client(guarded, viewer) as oona:
            with pytest.raises(ForbiddenError, match="must name the runs"):
                async with oona.subscribe(EVENTS):
                    pass


def test_every_method_of_every_service_is_in_the_table():
    from google.protobuf import descriptor_pool
    from grpc_reflection.v1alpha import reflection_pb2

    assert reflection_pb2.DESCRIPTOR
    pool = descriptor_pool.Default()
    services = [*app.SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    methods = {
        f"/{service}/{method.name}" for service in services for method in pool.FindServiceByName(service).methods
    }
    assert methods == set(NEEDS)


def test_only_health_is_for_everybody_and_hosts_have_only_the_stream():
    assert {method.split("/")[1] for method, need in NEEDS.items() if need.roles is None} == {"grpc.health.v1.Health"}
    ours = [method for method, need in NEEDS.items() if need.roles and Role.HOST in need.roles and "esperml" in method]
    assert ours == ["/esperml.v1.Oona/Stream"]


async def test_a_method_that_is_in_no_table_is_nobodys(serve, make_token, monkeypatch):
    from esperml.server import interceptor

    needs = {method: need for method, need in NEEDS.items() if not method.endswith("ListTopics")}
    monkeypatch.setattr(interceptor, "NEEDS", needs)
    admin = make_token("admin")
    async with serve() as guarded:
        with pytest.raises(CallFailedError, match="role nobody may"):
            await client(guarded, admin).topics()


async def test_health_is_told_without_a_token(serve, make_token):
    async with serve() as guarded, grpc.aio.insecure_channel(guarded.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *app.SERVICES):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_oona_is_not_serving_while_its_log_cannot_store(serve, make_token):
    host = make_token("host")
    async with (
        serve(oona={"max_log_bytes": 150_000}) as guarded,
        grpc.aio.insecure_channel(guarded.target) as channel,
        client(guarded, host) as oona,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="esperml.v1.Oona"))
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        big = [ended(mark="x" * 1000) for _ in range(100)]
        filling = asyncio.gather(*(oona.publish(EVENTS, big) for _ in range(5)), return_exceptions=True)
        async with asyncio.timeout(20):
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="esperml.v1.Tamiyo"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        filling.cancel()


async def test_over_its_rate_a_client_is_slowed_down_and_loses_nothing(serve, make_token):
    host, viewer = make_token("host", name="fast"), make_token("viewer")
    async with serve(oona={"publish_events_per_s": 200}) as guarded, client(guarded, host) as oona:
        frames = [[ended(mark=f"{frame}-{index}") for index in range(100)] for frame in range(6)]
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(oona.publish(EVENTS, frame, timeout_s=60) for frame in frames))
        # 600 events, of which 200 and one frame are free.
        assert asyncio.get_running_loop().time() - started > 1
        async with (
            client(guarded, viewer, "reader") as reader,
            reader.subscribe(EVENTS, start=EARLIEST, end_offset=600) as records,
        ):
            marks = [record.event.run_ended.error async for record in records]
    assert marks == [event.run_ended.error for frame in frames for event in frame]


async def test_each_limit_has_an_error_of_its_own(serve, make_token):
    viewer = make_token("viewer", name="greedy")
    async with (
        serve(oona={"max_streams_per_token": 1, "max_subscriptions": 1}) as guarded,
        client(guarded, viewer) as oona,
        oona.subscribe(EVENTS),
    ):
        with pytest.raises(ResourceExhaustedError, match="1 subscriptions, the limit"):
            async with oona.subscribe(TELEMETRY):
                pass
        async with grpc.aio.insecure_channel(guarded.target) as channel:
            call = channel.stream_stream("/esperml.v1.Oona/Stream")(metadata=viewer.metadata())
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "token 'greedy' has 1 streams open" in await call.details()


async def test_tamiyo_stands_in_for_itself_behind_tls_and_tokens(serve, authority, make_token):
    certificate, key = authority.issue("server")
    own, own_key = authority.issue("client")
    tls = {"certificate": certificate, "key": key, "client_ca": authority.ca}
    host, viewer = make_token("host"), make_token("viewer")
    with_tls = {"ca": authority.ca, "certificate": own, "key": own_key}
    async with serve(server=tls) as guarded:
        async with client(guarded, Credentials(token=host.token, **with_tls)) as oona:
            await oona.publish(EVENTS, [began("mine")], timeout_s=20)
        async with RunsClient(guarded.target, credentials=Credentials(token=viewer.token, **with_tls)) as runs:

            async def known() -> bool:
                return bool(await runs.runs())

            await until(known)
            [run] = await runs.runs()
            assert (run.run_id, run.status) == ("mine", runs_pb2.RUN_STATUS_RUNNING)


async def test_a_refused_caller_is_logged_with_its_name_and_never_with_its_token(serve, make_token, capsys):
    viewer = make_token("viewer", name="ann")
    async with serve() as guarded, client(guarded, viewer) as oona:
        for _ in range(3):
            with pytest.raises(ForbiddenError):
                await oona.publish(EVENTS, [ended()], timeout_s=20)
            with pytest.raises(CallFailedError):
                await oona.purge(EVENTS, 0)
    said = "".join(capsys.readouterr())
    assert said.count("token_name=ann") == 2
    assert "client_id=client" in said
    assert viewer.token not in said
    assert viewer.token.split("_", 2)[2] not in said


def test_credentials_do_not_show_their_token():
    assert "secret" not in repr(Credentials(token="secret"))


async def test_tamiyo_is_not_serving_once_it_has_stopped_and_the_bus_goes_on(serve, make_token, monkeypatch, capsys):
    files = []

    class Kept(watch.TokensFile):
        def __init__(self, path) -> None:
            super().__init__(path)
            files.append(self)

    monkeypatch.setattr(app, "TokensFile", Kept)
    host = make_token("host")
    async with serve() as guarded, grpc.aio.insecure_channel(guarded.target) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="esperml.v1.Tamiyo"))
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        # Nobody can revoke the server's own token, but this is what a bus elsewhere could do.
        files[0].tokens._internal.clear()
        async with asyncio.timeout(20):
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        async with client(guarded, host) as oona:
            assert (await oona.publish(EVENTS, [ended()], timeout_s=20)).count == 1
    assert "tamiyo_stopped" in "".join(capsys.readouterr())
