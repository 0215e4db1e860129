"""Every unary method that the server lists, under requests that make no sense."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from esperml.client import SyncOonaClient, new_event
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, health_pb2, oona_pb2, run_pb2, runs_pb2, tamiyo_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzzing import alter, made_up, mutated

ROUNDS = 25
DEADLINE_S = 30
EVENTS, TELEMETRY, DECISIONS = event_pb2.KIND_EVENTS, event_pb2.KIND_TELEMETRY, event_pb2.KIND_DECISIONS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
# Listed, but gRPC's own servicer for asyncio does not have it.
ABSENT = "grpc.health.v1.Health.List"
# What a call may end with. INTERNAL or UNKNOWN would be an exception that nobody expected.
PROPER_ENDS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}
EXAMPLE = json_format.Parse(
    (Path(__file__).parents[2] / "examples" / "decide.json").read_text(), tamiyo_pb2.DecideRequest()
)


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture(scope="module")
def methods(channel) -> list[MethodDescriptor]:
    """The unary methods that reflection lists."""
    reflected = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(reflected)
    return [
        method
        for service in reflected.get_services()
        for method in pool.FindServiceByName(service).methods
        if not (method.client_streaming or method.server_streaming or method.full_name == ABSENT)
    ]


@pytest.fixture(scope="module")
def pending(server) -> str:
    """A decision of a run that Tamiyo follows, which waits for approval; and two dead letters of a group."""
    graph = EXAMPLE.state.graph
    limits = graph_pb2.RunLimits(warmup_steps=1, decision_interval_steps=1, max_live_seeds=8)
    started = run_pb2.RunStarted(graph=graph, mode=decision_pb2.MODE_ADVISE, parameters=2702, limits=limits)
    with SyncOonaClient(server.target, client_id="a session") as client:
        client.publish(EVENTS, [new_event("run-1", run_started=started)])
        once = oona_pb2.Redelivery(max_attempts=1)
        with client.subscribe(EVENTS, group="group-1", start=EARLIEST, redelivery=once) as subscription:
            subscription.nack(next(subscription))
        with client.subscribe(DECISIONS, run_ids=["run-1"], start=EARLIEST) as decisions:
            for step in range(100, 10_000, 100):
                report = health_pb2.HealthReport(step=step, structure_version=graph.structure_version)
                for index, layer in enumerate(graph.layers):
                    report.layers.add(
                        layer=layer.name, dead_fraction=0.1 * index, gradient_norm=0.5, expressivity_bottleneck=0.4
                    )
                client.publish(TELEMETRY, [new_event("run-1", health_report=report)])
                decision = next(decisions).event.decision
                if decision.disposition == decision_pb2.DISPOSITION_PENDING:
                    return decision.decision_id
    raise AssertionError("no decision waits for approval")


@pytest.fixture(scope="module")
def proper(pending) -> dict[str, list[Message]]:
    """Requests that make sense, by method."""
    group = {"kind": EVENTS, "group": "group-1"}
    names = {"run_id": "run-1", "decision_id": pending}
    limits = graph_pb2.RunLimits(parameter_budget=1000, max_live_seeds=2)
    return {
        "DescribeTopic": [oona_pb2.DescribeTopicRequest(kind=EVENTS)],
        "PurgeTopic": [oona_pb2.PurgeTopicRequest(kind=event_pb2.KIND_OUTCOMES, before_offset=1)],
        "ListDeadLetters": [oona_pb2.ListDeadLettersRequest(**group, limit=1)],
        "ReplayDeadLetters": [oona_pb2.ReplayDeadLettersRequest(**group, offsets=[0])],
        "PurgeDeadLetters": [oona_pb2.PurgeDeadLettersRequest(**group, offsets=[0])],
        "Decide": [EXAMPLE],
        "Explain": [tamiyo_pb2.ExplainRequest(state=EXAMPLE.state, options=EXAMPLE.options, limit=5)],
        "DescribePolicy": [tamiyo_pb2.DescribePolicyRequest(name="chance")],
        "PromotePolicy": [tamiyo_pb2.PromotePolicyRequest(name="chance", checkpoint="chance")],
        "DescribeRun": [runs_pb2.DescribeRunRequest(run_id="run-1")],
        "PauseRun": [runs_pb2.PauseRunRequest(run_id="run-1")],
        "ResumeRun": [runs_pb2.ResumeRunRequest(run_id="run-1")],
        "SetLimits": [runs_pb2.SetLimitsRequest(run_id="run-1", limits=limits)],
        "ApproveDecision": [runs_pb2.ApproveDecisionRequest(**names)],
        "VetoDecision": [runs_pb2.VetoDecisionRequest(**names, reason="no")],
    }


def requests(method: MethodDescriptor, proper: list[Message], random: Random) -> Iterator[bytes]:
    """Requests that do make sense, and many more that do not."""
    yield from (request.SerializeToString() for request in proper)
    kind = message_factory.GetMessageClass(method.input_type)
    for _ in range(ROUNDS):
        request = kind()
        request.MergeFromString(random.choice(proper).SerializeToString() if proper else b"")
        for _ in range(random.choice([1, 1, 2, 4])):
            alter(request, random)
        data = request.SerializeToString()
        yield data
        yield made_up(kind, random).SerializeToString()
        yield mutated(data, data, random)
        yield mutated(data[: random.randrange(len(data) + 1)], data, random)


def readable(method: MethodDescriptor, data: bytes) -> bool:
    try:
        message_factory.GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        return False
    return True


def test_nonsense_in_unary_calls_is_refused_in_words_and_the_server_stands(server, channel, methods, proper) -> None:
    random = Random(0)
    ends: dict[str, Counter[grpc.StatusCode]] = {}
    assert {"Decide", "PurgeTopic", "VetoDecision", "Check"} <= {method.name for method in methods}
    assert set(proper) <= {method.name for method in methods}
    for method in methods:
        call = channel.unary_unary(f"/{method.containing_service.full_name}/{method.name}")
        ends[method.full_name] = Counter()
        for data in requests(method, proper.get(method.name, []), random):
            code, detail = grpc.StatusCode.OK, ""
            try:
                call(data, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                code, detail = error.code(), error.details()
            ends[method.full_name][code] += 1
            assert code in PROPER_ENDS, f"{method.name} ended with {code.name} ({detail}) on {data!r}"
            if not readable(method, data):
                assert code is grpc.StatusCode.INVALID_ARGUMENT, f"{method.name}: {data!r}"
            if method.full_name.startswith("esperml."):
                assert code is grpc.StatusCode.OK or detail, f"{method.name}: {code.name} in no words"
    print({name: dict(counts) for name, counts in ends.items()})
    # Nothing is there to be promoted and rolled back, and the one decision that waits can only be approved or vetoed.
    failing = {method for method, counts in ends.items() if not counts[grpc.StatusCode.OK]}
    assert {name.rpartition(".")[2] for name in failing} <= {"PromotePolicy", "RollBackPolicy", "VetoDecision"}
    assert "Traceback" not in server.log.read_text()
    with SyncOonaClient(server.target, client_id="a good client") as client:
        event = new_event("run-2", run_ended=run_pb2.RunEnded(error="the end"))
        published = client.publish(EVENTS, [event], timeout_s=10)
        with client.subscribe(EVENTS, start=oona_pb2.StartAt(offset=published.first_offset)) as subscription:
            assert next(subscription).event == event
