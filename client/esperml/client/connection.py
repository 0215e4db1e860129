"""One stream to the bus, from its Open to its end."""

from __future__ import annotations

import asyncio
import functools
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Self

import grpc
import structlog

from esperml.client.credentials import NO_CREDENTIALS, Credentials, is_local
from esperml.v1 import oona_pb2, oona_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_log = structlog.get_logger(__name__)

OPEN_TIMEOUT_S: Final = 10.0

CHANNEL_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    # Deliveries are as large as the server's limit on frames allows, which it sets, not we.
    ("grpc.max_receive_message_length", -1),
    # A connection of its own for each try: back-off is then ours alone.
    ("grpc.use_local_subchannel_pool", 1),
    # Notice a server that vanished without a word.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class StreamEndedWithoutStatusError(Exception):
    """The other side ended the stream as if all were done: a proxy, for example. Worth another try."""

    def __init__(self) -> None:
        super().__init__("the stream ended without a status")


def open_channel(target: str, credentials: Credentials = NO_CREDENTIALS) -> grpc.aio.Channel:
    """A channel to ``target``, plain where the credentials are for no TLS. Raises :class:`CredentialsError`."""
    channel_credentials = credentials.channel_credentials()
    if channel_credentials is None:
        if credentials.has_token and not is_local(target):
            _warn_of_clear_token(target)
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, channel_credentials, options=CHANNEL_OPTIONS)


@functools.cache  # Once for each server is enough.
def _warn_of_clear_token(target: str) -> None:
    _log.warning("token_sent_in_clear", target=target, detail="whoever can listen can use it: connect with TLS (--ca)")


class Connection:
    """One open stream.

    Attributes:
        opened: what the server said first.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        call: grpc.aio.StreamStreamCall[oona_pb2.StreamRequest, oona_pb2.StreamResponse],
        opened: oona_pb2.Opened,
    ) -> None:
        self._channel = channel
        self._call = call
        self.opened = opened

    @classmethod
    async def open(cls, target: str, client_id: str, credentials: Credentials) -> Self:
        """Connect and open a stream as ``client_id``.

        Raises:
            grpc.aio.AioRpcError: nobody answers, or the server does not want us.
            StreamEndedWithoutStatusError: something answers that is not the bus.
            TimeoutError: no answer within 10 s.
            CredentialsError: a file of the credentials cannot be used.
        """
        channel = open_channel(target, credentials)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                call = oona_pb2_grpc.OonaStub(channel).Stream(None, metadata=credentials.metadata())
                opened = await _introduce(call, client_id)
        except BaseException:
            await channel.close(None)
            raise
        return cls(channel, call, opened)

    async def send(self, request: oona_pb2.StreamRequest) -> None:
        """Send a frame, waiting while the transport is full.

        Raises:
            grpc.aio.AioRpcError: the stream has ended just now.
            asyncio.InvalidStateError: it had ended before.
        """
        await self._call.write(request)

    async def responses(self) -> AsyncIterator[oona_pb2.StreamResponse]:
        """What the server sends.

        Raises:
            grpc.aio.AioRpcError: the stream's status, when it ends.
            StreamEndedWithoutStatusError: it ended without an error, as the bus never ends it.
        """
        while isinstance(response := await self._call.read(), oona_pb2.StreamResponse):
            yield response
        raise StreamEndedWithoutStatusError

    async def close(self) -> None:
        """End the stream and the connection."""
        self._call.cancel()
        await self._channel.close(None)


async def _introduce(
    call: grpc.aio.StreamStreamCall[oona_pb2.StreamRequest, oona_pb2.StreamResponse], client_id: str
) -> oona_pb2.Opened:
    introduction = oona_pb2.Open(client_id=client_id, client_version=_client_version())
    await call.write(oona_pb2.StreamRequest(request_id=1, open=introduction))
    response = await call.read()
    if not isinstance(response, oona_pb2.StreamResponse):
        raise StreamEndedWithoutStatusError
    return response.opened


@functools.cache  # Reading it takes half a millisecond, and a stream may be opened often.
def _client_version() -> str:
    try:
        return f"esperml-python/{version('esperml')}"
    except PackageNotFoundError:  # Run from a source tree that was not installed.
        return "esperml-python"
