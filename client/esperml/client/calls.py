"""Calls to the bus outside its stream: what topics there are, purging them, and dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc

from esperml.client.addresses import Addresses
from esperml.client.connection import open_channel
from esperml.client.credentials import NO_CREDENTIALS, Credentials, explain
from esperml.client.errors import CallFailedError
from esperml.v1 import oona_pb2, oona_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from google.protobuf.message import Message

    from esperml.v1 import event_pb2

_Response = TypeVar("_Response")


class TopicCalls:
    """The single calls of the bus, each on a connection of its own: they are rare, and need no stream.

    Args:
        target: address of the server, or several, separated by commas, that serve the same bus.
        credentials: token and TLS, where the server asks for them.
    """

    def __init__(self, target: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._addresses = Addresses(target)
        self._credentials = credentials

    @property
    def _target(self) -> str:
        return self._addresses.present

    async def topics(self) -> list[oona_pb2.Topic]:
        """The topics, one a kind. Raises :class:`CallFailedError`."""
        request = oona_pb2.ListTopicsRequest()
        response = await self._call(lambda stub: stub.ListTopics, request)
        return list(response.topics)

    async def describe(self, kind: event_pb2.Kind.ValueType) -> oona_pb2.DescribeTopicResponse:
        """One topic, with its groups and their lag. Raises :class:`CallFailedError`."""
        request = oona_pb2.DescribeTopicRequest(kind=kind)
        return await self._call(lambda stub: stub.DescribeTopic, request)

    async def purge(self, kind: event_pb2.Kind.ValueType, before: int) -> int:
        """Delete records below offset ``before``, as far as they fill whole batches.

        Returns the first offset that is still there. Raises :class:`CallFailedError`.
        """
        request = oona_pb2.PurgeTopicRequest(kind=kind, before_offset=before)
        response = await self._call(lambda stub: stub.PurgeTopic, request)
        return response.earliest_offset

    async def dead_letters(
        self, kind: event_pb2.Kind.ValueType, group: str, *, from_offset: int = 0
    ) -> AsyncIterator[oona_pb2.DeadLetter]:
        """What a group gave up on, by offset, from ``from_offset`` on.

        Raises :class:`CallFailedError` while iterating.
        """
        position: int | None = from_offset
        while position is not None:
            request = oona_pb2.ListDeadLettersRequest(kind=kind, group=group, from_offset=position)
            page = await self._call(lambda stub: stub.ListDeadLetters, request)
            for dead_letter in page.dead_letters:
                yield dead_letter
            position = page.next_offset if page.HasField("next_offset") else None

    async def replay_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Iterable[int] = ()) -> int:
        """Give dead letters back to their group, as if for the first time; all where ``offsets`` is empty.

        Each stays a dead letter until the group acknowledges it. Returns how many. Raises :class:`CallFailedError`.
        """
        request = oona_pb2.ReplayDeadLettersRequest(kind=kind, group=group, offsets=offsets)
        response = await self._call(lambda stub: stub.ReplayDeadLetters, request)
        return response.count

    async def purge_dead_letters(self, kind: event_pb2.Kind.ValueType, group: str, offsets: Iterable[int] = ()) -> int:
        """Delete dead letters; all where ``offsets`` is empty.

        Returns how many. Raises :class:`CallFailedError`.
        """
        request = oona_pb2.PurgeDeadLettersRequest(kind=kind, group=group, offsets=offsets)
        response = await self._call(lambda stub: stub.PurgeDeadLetters, request)
        return response.count

    async def _call(
        self, method: Callable[[oona_pb2_grpc.OonaAsyncStub], Callable[..., Awaitable[_Response]]], request: Message
    ) -> _Response:
        tries_left = len(self._addresses)
        while True:
            tries_left -= 1
            try:
                async with open_channel(self._target, self._credentials) as channel:
                    return await method(oona_pb2_grpc.OonaStub(channel))(request, metadata=self._credentials.metadata())
            except grpc.aio.AioRpcError as error:
                if not tries_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    name = request.DESCRIPTOR.name.removesuffix("Request")
                    detail = explain(error.details() or "", self._credentials)
                    raise CallFailedError(name, error.code(), detail) from error
                self._addresses.move_on()
