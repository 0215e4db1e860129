"""Calls to the bus outside its stream: what topics there are, and purging them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc

from esperml.client.connection import metadata, open_channel
from esperml.client.errors import CallFailedError
from esperml.v1 import oona_pb2, oona_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from esperml.v1 import event_pb2

_Response = TypeVar("_Response")


class TopicCalls:
    """The single calls of the bus, each on a connection of its own: they are rare.

    Args:
        target: address of the server.
        token: bearer token, where the server asks for one.
        credentials: for TLS. None: a plain connection.
    """

    def __init__(self, target: str, token: str | None, credentials: grpc.ChannelCredentials | None) -> None:
        self._target = target
        self._metadata = metadata(token)
        self._credentials = credentials

    async def topics(self) -> list[oona_pb2.Topic]:
        """The topics, one a kind. Raises :class:`CallFailedError`."""
        request = oona_pb2.ListTopicsRequest()
        response = await self._call("ListTopics", lambda stub: stub.ListTopics(request, metadata=self._metadata))
        return list(response.topics)

    async def describe(self, kind: event_pb2.Kind.ValueType) -> oona_pb2.DescribeTopicResponse:
        """One topic, with its groups and their lag. Raises :class:`CallFailedError`."""
        request = oona_pb2.DescribeTopicRequest(kind=kind)
        return await self._call("DescribeTopic", lambda stub: stub.DescribeTopic(request, metadata=self._metadata))

    async def purge(self, kind: event_pb2.Kind.ValueType, before: int) -> int:
        """Delete old records; returns the first offset that is still there. Raises :class:`CallFailedError`."""
        request = oona_pb2.PurgeTopicRequest(kind=kind, before_offset=before)
        response = await self._call("PurgeTopic", lambda stub: stub.PurgeTopic(request, metadata=self._metadata))
        return response.earliest_offset

    async def _call(
        self, method: str, call: Callable[[oona_pb2_grpc.OonaAsyncStub], Awaitable[_Response]]
    ) -> _Response:
        try:
            async with open_channel(self._target, self._credentials) as channel:
                return await call(oona_pb2_grpc.OonaStub(channel))
        except grpc.aio.AioRpcError as error:
            raise CallFailedError(method, error.code(), error.details() or "") from error
