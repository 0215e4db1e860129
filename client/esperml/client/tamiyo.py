"""Clients of Tamiyo and Runs: asking the controller, and having a say in what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeVar

import grpc

from esperml.client.connection import open_channel
from esperml.client.credentials import NO_CREDENTIALS, Credentials, explain
from esperml.client.errors import EsperError
from esperml.v1 import (
    decision_pb2,
    graph_pb2,
    runs_pb2,
    runs_pb2_grpc,
    tamiyo_pb2,
    tamiyo_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class TamiyoError(EsperError):
    """A call to Tamiyo or Runs failed.

    Attributes:
        code: the gRPC status.
        detail: what the server said; for an invalid argument it names the field.
    """

    def __init__(self, code: grpc.StatusCode, detail: str) -> None:
        super().__init__(f"{code.name}: {detail}")
        self.code = code
        self.detail = detail


class InvalidStateError(TamiyoError):
    """A field of the request is missing or out of range; the detail names it."""


class NotFoundError(TamiyoError):
    """There is no policy or run of that name."""


class PreconditionError(TamiyoError):
    """What was asked for is not possible now: wrong feature version, not pending any more, nothing to roll back."""


_ERRORS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidStateError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
}


class _Client:
    """A channel that is open while the context lasts."""

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        timeout_s: float = 10.0,
    ) -> None:
        self._channel = open_channel(target, credentials)
        self._credentials = credentials
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

    async def _call(self, method: Callable[..., Awaitable[_Response]], request: object) -> _Response:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._credentials.metadata())
        except grpc.aio.AioRpcError as error:
            kind = _ERRORS.get(error.code(), TamiyoError)
            raise kind(error.code(), explain(error.details() or "", self._credentials)) from error


class TamiyoClient(_Client):
    """Asks the controller; an async context manager.

    Args:
        target: address of the server, for example ``localhost:50051``.
        credentials: token and TLS, where the server asks for them.
        timeout_s: longest time that a call may take, in s.

    Every call raises :class:`TamiyoError` or one of its kinds, or :class:`CredentialsError`, as making one does.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(target, credentials=credentials, timeout_s=timeout_s)
        self._stub = tamiyo_pb2_grpc.TamiyoStub(self._channel)

    async def decide(
        self, state: graph_pb2.ModelGraphState, options: tamiyo_pb2.DecideOptions | None = None
    ) -> tamiyo_pb2.DecideResponse:
        """A decision on ``state``; nothing is carried out."""
        return await self._call(self._stub.Decide, tamiyo_pb2.DecideRequest(state=state, options=options))

    async def explain(
        self, state: graph_pb2.ModelGraphState, options: tamiyo_pb2.DecideOptions | None = None, *, limit: int = 10
    ) -> tamiyo_pb2.ExplainResponse:
        """A decision on ``state`` and the ``limit`` features on which it rests most."""
        request = tamiyo_pb2.ExplainRequest(state=state, options=options, limit=limit)
        return await self._call(self._stub.Explain, request)

    async def policies(self) -> list[tamiyo_pb2.Policy]:
        """The policies that the server holds, by name."""
        response = await self._call(self._stub.ListPolicies, tamiyo_pb2.ListPoliciesRequest())
        return list(response.policies)

    async def describe_policy(self, name: str = "") -> tamiyo_pb2.Policy:
        """One policy; the default for the empty name."""
        response = await self._call(self._stub.DescribePolicy, tamiyo_pb2.DescribePolicyRequest(name=name))
        return response.policy

    async def promote(self, name: str, checkpoint: str) -> tamiyo_pb2.Policy:
        """Make a checkpoint, by its path in the server's policy folder, the default under ``name``."""
        request = tamiyo_pb2.PromotePolicyRequest(name=name, checkpoint=checkpoint)
        return (await self._call(self._stub.PromotePolicy, request)).policy

    async def roll_back(self) -> tamiyo_pb2.Policy:
        """Make the default what it was before the last promotion."""
        return (await self._call(self._stub.RollBackPolicy, tamiyo_pb2.RollBackPolicyRequest())).policy


class RunsClient(_Client):
    """Looks at runs and steers them; an async context manager. Arguments and errors as for :class:`TamiyoClient`."""

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(target, credentials=credentials, timeout_s=timeout_s)
        self._stub = runs_pb2_grpc.RunsStub(self._channel)

    async def runs(self) -> list[runs_pb2.Run]:
        """The runs that the server knows, latest first."""
        return list((await self._call(self._stub.ListRuns, runs_pb2.ListRunsRequest())).runs)

    async def describe(self, run_id: str) -> runs_pb2.DescribeRunResponse:
        """One run, its state and what waits for approval."""
        return await self._call(self._stub.DescribeRun, runs_pb2.DescribeRunRequest(run_id=run_id))

    async def pause(self, run_id: str) -> runs_pb2.Run:
        """Take no decisions in a run until it is resumed."""
        return (await self._call(self._stub.PauseRun, runs_pb2.PauseRunRequest(run_id=run_id))).run

    async def resume(self, run_id: str) -> runs_pb2.Run:
        """Take decisions in a run again."""
        return (await self._call(self._stub.ResumeRun, runs_pb2.ResumeRunRequest(run_id=run_id))).run

    async def set_limits(self, run_id: str, limits: graph_pb2.RunLimits) -> graph_pb2.RunLimits:
        """Change what a run allows; returns all limits in force."""
        request = runs_pb2.SetLimitsRequest(run_id=run_id, limits=limits)
        return (await self._call(self._stub.SetLimits, request)).limits

    async def approve(self, run_id: str, decision_id: str) -> decision_pb2.AdaptationDecision:
        """Send a pending decision to the host."""
        request = runs_pb2.ApproveDecisionRequest(run_id=run_id, decision_id=decision_id)
        return (await self._call(self._stub.ApproveDecision, request)).decision

    async def veto(self, run_id: str, decision_id: str, reason: str = "") -> decision_pb2.AdaptationDecision:
        """Refuse a pending decision."""
        request = runs_pb2.VetoDecisionRequest(run_id=run_id, decision_id=decision_id, reason=reason)
        return (await self._call(self._stub.VetoDecision, request)).decision
