"""One place in which every call is asked for its token, and one table that says what each method needs."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import grpc

from esperml.oona.access import CALLER, Caller, Role
from esperml.oona.refusals import RefusalLog
from esperml.server.tokens import Tokens
from esperml.v1 import runs_pb2

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

READERS: Final = frozenset({Role.CONTROLLER, Role.VIEWER, Role.ADMIN})
ADMINS: Final = frozenset({Role.ADMIN})
ANYBODY: Final = frozenset(Role)


class Reach(enum.Enum):
    """Which runs a call concerns."""

    NONE = enum.auto()
    """None: what it says or does is of no run."""
    NAMED = enum.auto()
    """The one that ``run_id`` of the request names."""
    LISTED = enum.auto()
    """All of which it tells; the caller is told of its own."""
    EVERY = enum.auto()
    """Every run, so that a caller of some must not make it."""
    STREAM = enum.auto()
    """Each request on the stream by itself; the bus looks at them."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a method needs of its caller.

    Attributes:
        roles: who may call it. None: whoever comes, without a token.
        reach: the runs that the caller must have to do with.
    """

    roles: frozenset[Role] | None
    reach: Reach = Reach.NONE


NEEDS: Final[Mapping[str, Need]] = {
    "/esperml.v1.Oona/Stream": Need(ANYBODY, Reach.STREAM),
    "/esperml.v1.Oona/ListTopics": Need(READERS),
    "/esperml.v1.Oona/DescribeTopic": Need(READERS),
    "/esperml.v1.Oona/PurgeTopic": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Oona/ListDeadLetters": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Oona/ReplayDeadLetters": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Oona/PurgeDeadLetters": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Tamiyo/Decide": Need(READERS),
    "/esperml.v1.Tamiyo/Explain": Need(READERS),
    "/esperml.v1.Tamiyo/ListPolicies": Need(READERS),
    "/esperml.v1.Tamiyo/DescribePolicy": Need(READERS),
    "/esperml.v1.Tamiyo/PromotePolicy": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Tamiyo/RollBackPolicy": Need(ADMINS, Reach.EVERY),
    "/esperml.v1.Runs/ListRuns": Need(READERS, Reach.LISTED),
    "/esperml.v1.Runs/DescribeRun": Need(READERS, Reach.NAMED),
    "/esperml.v1.Runs/PauseRun": Need(ADMINS, Reach.NAMED),
    "/esperml.v1.Runs/ResumeRun": Need(ADMINS, Reach.NAMED),
    "/esperml.v1.Runs/SetLimits": Need(ADMINS, Reach.NAMED),
    "/esperml.v1.Runs/ApproveDecision": Need(ADMINS, Reach.NAMED),
    "/esperml.v1.Runs/VetoDecision": Need(ADMINS, Reach.NAMED),
    # Balancers and supervisors ask for health and have no token; the contract is no secret, but asking costs work.
    "/grpc.health.v1.Health/Check": Need(None),
    "/grpc.health.v1.Health/List": Need(None),
    "/grpc.health.v1.Health/Watch": Need(None),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Need(ANYBODY),
}
"""What each method that the server has needs. A method that is not here is nobody's."""


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # At run time it takes none.
    """Lets a call through to its service if its token allows it, and says what is missing if not.

    Args:
        tokens: knows callers by their tokens.
        refusals: the log of what was refused.
    """

    def __init__(self, tokens: Tokens, refusals: RefusalLog) -> None:
        self._tokens = tokens
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        need = NEEDS.get(method)
        # What does not exist is for gRPC to say; what is for everybody has nothing to check.
        if cast("_Handler | None", handler) is None or (need is not None and need.roles is None):
            return handler
        caller = self._identify(dict(handler_call_details.invocation_metadata))
        if isinstance(caller, str):
            return self._refusing(handler, method, grpc.StatusCode.UNAUTHENTICATED, caller, None)
        if need is None or need.roles is None or caller.role not in need.roles:
            who = " or ".join(role for role in Role if need is not None and role in (need.roles or ())) or "nobody"
            detail = f"{caller} may not call {_short(method)}; role {who} may"
            return self._refusing(handler, method, grpc.StatusCode.PERMISSION_DENIED, detail, caller)
        if need.reach is Reach.EVERY and not caller.runs.every:
            detail = f"{caller} may not call {_short(method)}, which concerns every run"
            return self._refusing(handler, method, grpc.StatusCode.PERMISSION_DENIED, detail, caller)
        CALLER.set(caller)
        if need.reach in (Reach.NAMED, Reach.LISTED) and not caller.runs.every:
            return self._within_runs(handler, method, caller, need.reach)
        return handler

    def _identify(self, metadata: Mapping[str, str | bytes]) -> Caller | str:
        said = metadata.get("authorization")
        if said is None:
            return "this server asks for a token: give one with --token-file, ESPER_TOKEN or Credentials(token=…)"
        scheme, _, token = str(said).partition(" ")
        if scheme.lower() != "bearer":
            return "authorization: must be Bearer, a space and the token"
        return self._tokens.identify(token.strip())

    def _refusing(
        self, handler: _Handler, method: str, code: grpc.StatusCode, detail: str, caller: Caller | None
    ) -> _Handler:
        """A handler that aborts, of the same sort as the one whose place it takes."""

        async def refuse(_request: object, context: _Context) -> None:
            self._refusals.refused(detail, method=_short(method), peer=context.peer(), caller=caller)
            await context.abort(code, detail)

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        return make(cast("Any", refuse))

    def _within_runs(self, handler: _Handler, method: str, caller: Caller, reach: Reach) -> _Handler:
        """The handler of a unary method for a caller of some runs."""
        serve = cast("Callable[[Any, _Context], Awaitable[Any]]", handler.unary_unary)

        async def check(request: Any, context: _Context) -> Any:
            if reach is Reach.NAMED and request.run_id not in caller.runs:
                detail = f"run_id: run {request.run_id!r} is not one of those of {caller}"
                self._refusals.refused(detail, method=_short(method), peer=context.peer(), caller=caller)
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, detail)
            response = await serve(request, context)
            if isinstance(response, runs_pb2.ListRunsResponse):
                return runs_pb2.ListRunsResponse(runs=[run for run in response.runs if run.run_id in caller.runs])
            return response

        return grpc.unary_unary_rpc_method_handler(
            cast("Any", check), handler.request_deserializer, handler.response_serializer
        )


def _short(method: str) -> str:
    """``Tamiyo.Decide`` for ``/esperml.v1.Tamiyo/Decide``."""
    service, _, name = method.rpartition("/")
    return f"{service.rpartition('.')[2]}.{name}"
