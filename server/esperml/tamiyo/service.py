"""Tamiyo and Runs over gRPC. What goes wrong becomes the status that the contract names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, TypeVar

import grpc

from esperml.client import OonaError
from esperml.client.events import now
from esperml.contract import InvalidFieldError
from esperml.tamiyo.ask import FeatureVersionError, answer, ask, describe
from esperml.tamiyo.checkpoint import CheckpointError
from esperml.tamiyo.controller import Controller, NotPendingError, Outgoing, UnknownRunError
from esperml.tamiyo.explain import attribute
from esperml.tamiyo.store import NoPromotionError, UnknownPolicyError
from esperml.v1 import graph_pb2, runs_pb2, runs_pb2_grpc, tamiyo_pb2, tamiyo_pb2_grpc

DEFAULT_ATTRIBUTIONS: Final = 10
MAX_ATTRIBUTIONS: Final = 10_000

_STATUS: Final[tuple[tuple[type[Exception], grpc.StatusCode], ...]] = (
    (InvalidFieldError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownPolicyError, grpc.StatusCode.NOT_FOUND),
    (UnknownRunError, grpc.StatusCode.NOT_FOUND),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION),
    (FeatureVersionError, grpc.StatusCode.FAILED_PRECONDITION),
    (NotPendingError, grpc.StatusCode.FAILED_PRECONDITION),
    (NoPromotionError, grpc.StatusCode.FAILED_PRECONDITION),
    (OonaError, grpc.StatusCode.UNAVAILABLE),
)
_EXPECTED: Final = tuple(kind for kind, _ in _STATUS)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


async def _abort(context: grpc.aio.ServicerContext[_Request, _Response], error: Exception) -> NoReturn:
    code = next(code for kind, code in _STATUS if isinstance(error, kind))
    await context.abort(code, str(error))


def _state_of(request: tamiyo_pb2.DecideRequest | tamiyo_pb2.ExplainRequest) -> graph_pb2.ModelGraphState:
    if not request.HasField("state"):
        raise InvalidFieldError("state", "is missing; it holds the graph of the host and its measures")
    return request.state


class TamiyoService(tamiyo_pb2_grpc.TamiyoServicer):
    """Answers callers. Nothing that it is asked touches a run.

    Args:
        controller: whose policies and settings answer.
    """

    def __init__(self, controller: Controller) -> None:
        self._policies = controller.policies
        self._settings = controller.settings

    async def Decide(  # noqa: N802
        self,
        request: tamiyo_pb2.DecideRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.DecideRequest, tamiyo_pb2.DecideResponse],
    ) -> tamiyo_pb2.DecideResponse:
        """Decide on a state. It takes milliseconds, so it runs on the loop itself."""
        try:
            policy, verdict = ask(self._policies, self._settings, _state_of(request), request.options)
        except _EXPECTED as error:
            await _abort(context, error)
        return answer(policy, verdict)

    async def Explain(  # noqa: N802
        self,
        request: tamiyo_pb2.ExplainRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.ExplainRequest, tamiyo_pb2.ExplainResponse],
    ) -> tamiyo_pb2.ExplainResponse:
        """Decide, and say what the decision rests on."""
        try:
            policy, verdict = ask(self._policies, self._settings, _state_of(request), request.options)
            if request.limit > MAX_ATTRIBUTIONS:
                raise InvalidFieldError("limit", f"is {request.limit}, more than {MAX_ATTRIBUTIONS}")
        except _EXPECTED as error:
            await _abort(context, error)
        return tamiyo_pb2.ExplainResponse(
            decision=answer(policy, verdict),
            attributions=attribute(policy, verdict, request.limit or DEFAULT_ATTRIBUTIONS),
        )

    async def ListPolicies(  # noqa: N802
        self,
        request: tamiyo_pb2.ListPoliciesRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.ListPoliciesRequest, tamiyo_pb2.ListPoliciesResponse],
    ) -> tamiyo_pb2.ListPoliciesResponse:
        """List the policies."""
        default = self._policies.default
        return tamiyo_pb2.ListPoliciesResponse(
            policies=[describe(policy, is_default=policy is default) for policy in self._policies.policies]
        )

    async def DescribePolicy(  # noqa: N802
        self,
        request: tamiyo_pb2.DescribePolicyRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.DescribePolicyRequest, tamiyo_pb2.DescribePolicyResponse],
    ) -> tamiyo_pb2.DescribePolicyResponse:
        """Describe one policy."""
        try:
            policy = self._policies.get(request.name, "name")
        except _EXPECTED as error:
            await _abort(context, error)
        return tamiyo_pb2.DescribePolicyResponse(policy=describe(policy, is_default=policy is self._policies.default))

    async def PromotePolicy(  # noqa: N802
        self,
        request: tamiyo_pb2.PromotePolicyRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.PromotePolicyRequest, tamiyo_pb2.PromotePolicyResponse],
    ) -> tamiyo_pb2.PromotePolicyResponse:
        """Make a checkpoint the default."""
        try:
            policy = self._policies.promote(request.name, request.checkpoint)
        except _EXPECTED as error:
            await _abort(context, error)
        return tamiyo_pb2.PromotePolicyResponse(policy=describe(policy, is_default=True))

    async def RollBackPolicy(  # noqa: N802
        self,
        request: tamiyo_pb2.RollBackPolicyRequest,
        context: grpc.aio.ServicerContext[tamiyo_pb2.RollBackPolicyRequest, tamiyo_pb2.RollBackPolicyResponse],
    ) -> tamiyo_pb2.RollBackPolicyResponse:
        """Make the default what it was."""
        try:
            policy = self._policies.roll_back()
        except _EXPECTED as error:
            await _abort(context, error)
        return tamiyo_pb2.RollBackPolicyResponse(policy=describe(policy, is_default=True))


class RunsService(runs_pb2_grpc.RunsServicer):
    """Says what is under way, and lets a person have a say in it.

    Args:
        controller: knows the runs.
        publish: puts what comes of a person's say on the bus, and returns when it is stored.
    """

    def __init__(self, controller: Controller, publish: Callable[[Outgoing], Awaitable[None]]) -> None:
        self._controller = controller
        self._publish = publish

    async def ListRuns(  # noqa: N802
        self,
        request: runs_pb2.ListRunsRequest,
        context: grpc.aio.ServicerContext[runs_pb2.ListRunsRequest, runs_pb2.ListRunsResponse],
    ) -> runs_pb2.ListRunsResponse:
        """List the runs."""
        return runs_pb2.ListRunsResponse(runs=self._controller.runs())

    async def DescribeRun(  # noqa: N802
        self,
        request: runs_pb2.DescribeRunRequest,
        context: grpc.aio.ServicerContext[runs_pb2.DescribeRunRequest, runs_pb2.DescribeRunResponse],
    ) -> runs_pb2.DescribeRunResponse:
        """Describe one run."""
        try:
            run = self._controller.run(request.run_id)
        except _EXPECTED as error:
            await _abort(context, error)
        return runs_pb2.DescribeRunResponse(
            run=run,
            state=self._controller.state(request.run_id),
            pending=self._controller.pending(request.run_id),
        )

    async def PauseRun(  # noqa: N802
        self,
        request: runs_pb2.PauseRunRequest,
        context: grpc.aio.ServicerContext[runs_pb2.PauseRunRequest, runs_pb2.PauseRunResponse],
    ) -> runs_pb2.PauseRunResponse:
        """Take no decisions in a run."""
        try:
            return runs_pb2.PauseRunResponse(run=self._controller.pause(request.run_id))
        except _EXPECTED as error:
            await _abort(context, error)

    async def ResumeRun(  # noqa: N802
        self,
        request: runs_pb2.ResumeRunRequest,
        context: grpc.aio.ServicerContext[runs_pb2.ResumeRunRequest, runs_pb2.ResumeRunResponse],
    ) -> runs_pb2.ResumeRunResponse:
        """Take decisions in a run again."""
        try:
            return runs_pb2.ResumeRunResponse(run=self._controller.resume(request.run_id))
        except _EXPECTED as error:
            await _abort(context, error)

    async def SetLimits(  # noqa: N802
        self,
        request: runs_pb2.SetLimitsRequest,
        context: grpc.aio.ServicerContext[runs_pb2.SetLimitsRequest, runs_pb2.SetLimitsResponse],
    ) -> runs_pb2.SetLimitsResponse:
        """Change what a run allows."""
        try:
            return runs_pb2.SetLimitsResponse(limits=self._controller.set_limits(request.run_id, request.limits))
        except _EXPECTED as error:
            await _abort(context, error)

    async def ApproveDecision(  # noqa: N802
        self,
        request: runs_pb2.ApproveDecisionRequest,
        context: grpc.aio.ServicerContext[runs_pb2.ApproveDecisionRequest, runs_pb2.ApproveDecisionResponse],
    ) -> runs_pb2.ApproveDecisionResponse:
        """Send a pending decision to the host."""
        try:
            await self._publish(self._controller.approve(request.run_id, request.decision_id, now()))
        except _EXPECTED as error:
            await _abort(context, error)
        decision = self._controller.decision(request.run_id, request.decision_id)
        return runs_pb2.ApproveDecisionResponse(decision=decision)

    async def VetoDecision(  # noqa: N802
        self,
        request: runs_pb2.VetoDecisionRequest,
        context: grpc.aio.ServicerContext[runs_pb2.VetoDecisionRequest, runs_pb2.VetoDecisionResponse],
    ) -> runs_pb2.VetoDecisionResponse:
        """Refuse a pending decision."""
        try:
            await self._publish(self._controller.veto(request.run_id, request.decision_id, request.reason, now()))
        except _EXPECTED as error:
            await _abort(context, error)
        decision = self._controller.decision(request.run_id, request.decision_id)
        return runs_pb2.VetoDecisionResponse(decision=decision)
