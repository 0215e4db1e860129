"""A request that cannot be decoded is its caller's mistake, and the caller is told so.

gRPC itself would answer UNKNOWN, and log the exception as if the server were at fault.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class _Malformed:
    """What came in place of a request."""

    problem: str


class DecodingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # At run time it takes none.
    """Ends a unary call with INVALID_ARGUMENT where its request cannot be decoded.

    It must come before the interceptors that look at requests.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """The method's handler, behind a look at what was decoded."""
        handler = await continuation(handler_call_details)
        # What does not exist is for gRPC to say; a handler that refuses decodes nothing.
        if cast("_Handler | None", handler) is None or not (handler.unary_unary and handler.request_deserializer):
            return handler
        decode = handler.request_deserializer
        serve = cast("Callable[[Any, _Context], Awaitable[Any]]", handler.unary_unary)

        def try_decode(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError as error:
                return _Malformed(str(error))

        async def check(request: Any, context: _Context) -> Any:
            if isinstance(request, _Malformed):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request: is malformed: {request.problem}")
            return await serve(request, context)

        return grpc.unary_unary_rpc_method_handler(cast("Any", check), try_decode, handler.response_serializer)
