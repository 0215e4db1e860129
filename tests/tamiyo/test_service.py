import contextlib

import grpc
import pytest

from esperml.client import (
    InvalidStateError,
    NotFoundError,
    PreconditionError,
    RunsClient,
    TamiyoClient,
    TamiyoError,
)
from esperml.tamiyo.loop import NotConnectedError
from esperml.tamiyo.service import MAX_ATTRIBUTIONS, RunsService, TamiyoService
from esperml.v1 import decision_pb2, event_pb2, graph_pb2, runs_pb2, runs_pb2_grpc, tamiyo_pb2, tamiyo_pb2_grpc


class Served:
    """A controller behind real gRPC, and clients of it; what would go on the bus is kept."""

    def __init__(self, controller):
        self.controller = controller
        self.published = []
        self.connected = True

    async def publish(self, outgoing):
        if not self.connected:
            raise NotConnectedError
        self.published += outgoing

    @contextlib.asynccontextmanager
    async def running(self):
        server = grpc.aio.server()
        tamiyo_pb2_grpc.add_TamiyoServicer_to_server(TamiyoService(self.controller), server)
        runs_pb2_grpc.add_RunsServicer_to_server(RunsService(self.controller, self.publish), server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with TamiyoClient(target) as self.tamiyo, RunsClient(target) as self.runs:
            yield self
        await server.stop(None)


@pytest.fixture
async def served(tools, saved):
    async with Served(tools.controller(saved.parent, policy=str(saved))).running() as served:
        yield served


async def test_a_decision_comes_with_its_scores_and_its_version(served, tools):
    state = tools.state()
    response = await served.tamiyo.decide(state, tamiyo_pb2.DecideOptions(confidence_threshold=0.0))
    assert response.policy == "saved"
    assert response.policy_version == response.decision.policy_version != ""
    assert sum(place.probability for place in response.places) == pytest.approx(1, abs=1e-5)
    assert [place.probability for place in response.places] == sorted(
        (place.probability for place in response.places), reverse=True
    )
    assert sum(response.layer_scores) == pytest.approx(1, abs=1e-5)
    assert len(response.layer_scores) == 4
    assert all(len(place.blueprints) == 3 for place in response.places)
    assert response.HasField("value")
    assert response.timings.total >= response.timings.features + response.timings.policy > 0
    assert response.decision.run_id == "run"


async def test_the_example_gets_a_decision(served, parsed_example):
    response = await served.tamiyo.decide(parsed_example.state, parsed_example.options)
    assert response.decision.reason
    assert not response.rules
    assert response.decision.disposition in (decision_pb2.DISPOSITION_NONE, decision_pb2.DISPOSITION_SHADOWED)


async def test_a_draw_with_a_seed_is_reproducible(served, tools):
    options = tamiyo_pb2.DecideOptions(policy="chance", random_seed=5)
    first = await served.tamiyo.decide(tools.state(), options)
    again = await served.tamiyo.decide(tools.state(), options)
    assert first.decision.action == again.decision.action
    assert first.decision.target == again.decision.target
    assert first.decision.decision_id != again.decision.decision_id
    assert not first.HasField("value")


async def test_limits_that_the_caller_leaves_out_are_the_servers(served, tools):
    state = tools.state()
    state.ClearField("limits")
    state.step = 50
    response = await served.tamiyo.decide(state)
    assert [rule.rule for rule in response.rules] == ["warm_up"]
    assert response.adapt_probability == 0


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        (tamiyo_pb2.DecideOptions(policy="oracle"), NotFoundError, "options.policy: there is no policy named 'oracle'"),
        (tamiyo_pb2.DecideOptions(feature_version=2), PreconditionError, "options.feature_version: is 2"),
        (tamiyo_pb2.DecideOptions(health_threshold=1.5), InvalidStateError, "options.health_threshold"),
        (
            tamiyo_pb2.DecideOptions(confidence_threshold=float("nan")),
            InvalidStateError,
            "options.confidence_threshold",
        ),
    ],
)
async def test_options_that_cannot_be_met_are_refused_by_name(served, tools, options, kind, named):
    with pytest.raises(kind, match=named):
        await served.tamiyo.decide(tools.state(), options)
    with pytest.raises(kind, match=named):
        await served.tamiyo.explain(tools.state(), options)


async def test_an_empty_graph_is_refused_and_the_server_stands(served, tools):
    with pytest.raises(InvalidStateError, match=r"state\.graph\.layers: is empty") as caught:
        await served.tamiyo.decide(graph_pb2.ModelGraphState(graph=graph_pb2.HostGraph()))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(InvalidStateError, match=r"^INVALID_ARGUMENT: state\.graph: is missing"):
        await served.tamiyo.decide(graph_pb2.ModelGraphState())
    for call, request in (
        (served.tamiyo._stub.Decide, tamiyo_pb2.DecideRequest()),
        (served.tamiyo._stub.Explain, tamiyo_pb2.ExplainRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details().startswith("state: is missing")
    assert await served.tamiyo.decide(tools.state())


async def test_an_explanation_names_features_of_layers_in_order_of_weight(served, tools):
    response = await served.tamiyo.explain(tools.state(), limit=7)
    contributions = [abs(attribution.contribution) for attribution in response.attributions]
    assert len(contributions) == 7
    assert contributions == sorted(contributions, reverse=True)
    assert {attribution.layer for attribution in response.attributions} <= {"", *(f"layer{i}" for i in range(4))}
    assert response.decision.decision.reason
    with pytest.raises(InvalidStateError, match="limit"):
        await served.tamiyo.explain(tools.state(), limit=MAX_ATTRIBUTIONS + 1)


async def test_an_adaptation_is_explained_too(served, tools):
    for seed in range(60):
        options = tamiyo_pb2.DecideOptions(sample=True, random_seed=seed, confidence_threshold=0)
        response = await served.tamiyo.explain(tools.state(), options)
        if response.decision.decision.HasField("target"):
            assert response.attributions
            return
    raise AssertionError("no adaptation was drawn")


async def test_where_nothing_could_be_decided_nothing_is_explained(served, tools):
    state = tools.state()
    state.mask.SetInParent()
    assert not (await served.tamiyo.explain(state)).attributions
    chance = await served.tamiyo.explain(tools.state(), tamiyo_pb2.DecideOptions(policy="chance"))
    assert not chance.attributions


async def test_policies_are_listed_described_promoted_and_rolled_back(served):
    policies = {policy.name: policy for policy in await served.tamiyo.policies()}
    assert policies.keys() == {"chance", "explore", "nothing", "saved"}
    assert policies["saved"].is_default
    assert list(policies["saved"].blueprints) == ["low_rank", "mlp", "gate"]
    assert policies["saved"].parameters > 0
    assert policies["saved"].HasField("trained_at")
    assert (await served.tamiyo.describe_policy()).name == "saved"
    assert (await served.tamiyo.promote("better", "saved")).is_default
    assert (await served.tamiyo.roll_back()).name == "saved"
    with pytest.raises(PreconditionError, match="nothing to roll back"):
        await served.tamiyo.roll_back()
    with pytest.raises(InvalidStateError, match="leads out"):
        await served.tamiyo.promote("x", "../saved")
    with pytest.raises(PreconditionError, match="cannot be read"):
        await served.tamiyo.promote("x", "nowhere")
    with pytest.raises(NotFoundError):
        await served.tamiyo.describe_policy("oracle")


async def test_runs_are_listed_described_paused_and_limited(served, tools):
    host = tools.Host(served.controller, labels={"host": "digits"})
    host.start()
    host.report(100)
    assert [run.run_id for run in await served.runs.runs()] == ["run"]
    described = await served.runs.describe("run")
    assert described.run.step == 100
    assert described.run.labels["host"] == "digits"
    assert len(described.state.graph.layers) == 4
    assert (await served.runs.pause("run")).status == runs_pb2.RUN_STATUS_PAUSED
    assert (await served.runs.resume("run")).status == runs_pb2.RUN_STATUS_RUNNING
    limits = await served.runs.set_limits("run", graph_pb2.RunLimits(max_live_seeds=7))
    assert limits.max_live_seeds == 7
    for call in (served.runs.describe, served.runs.pause, served.runs.resume):
        with pytest.raises(NotFoundError, match="other"):
            await call("other")
    with pytest.raises(NotFoundError):
        await served.runs.set_limits("other", graph_pb2.RunLimits())


@pytest.fixture
def pending(served, tools):
    host = tools.Host(served.controller, policy="chance", mode=decision_pb2.MODE_ADVISE)
    host.start()
    step = 100
    while len(served.controller.pending("run")) < 2:
        host.report(step)
        step += 100
    return [decision.decision_id for decision in served.controller.pending("run")]


async def test_a_person_approves_one_decision_and_vetoes_another(served, pending):
    described = await served.runs.describe("run")
    assert [decision.decision_id for decision in described.pending] == pending
    approved = await served.runs.approve("run", pending[0])
    assert approved.disposition == decision_pb2.DISPOSITION_SENT
    vetoed = await served.runs.veto("run", pending[1], "too large")
    assert vetoed.disposition == decision_pb2.DISPOSITION_VETOED
    assert [kind for kind, _ in served.published] == [
        event_pb2.KIND_DECISIONS,
        event_pb2.KIND_COMMANDS,
        event_pb2.KIND_DECISIONS,
        event_pb2.KIND_COMMANDS,
    ]
    assert [event.WhichOneof("payload") for _, event in served.published] == [
        "decision",
        "command",
        "decision",
        "notice",
    ]
    for call in (served.runs.approve, served.runs.veto):
        with pytest.raises(PreconditionError, match="not pending"):
            await call("run", pending[0])


async def test_a_server_without_a_bus_says_that_it_is_unavailable(served, pending):
    served.connected = False
    with pytest.raises(TamiyoError) as caught:
        await served.runs.approve("run", pending[0])
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
