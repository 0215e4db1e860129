"""The gRPC face of the bus."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import grpc
import structlog
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from esperml.contract import KINDS
from esperml.oona.admission import Doors, TurnedAwayError
from esperml.oona.log import LogDamagedError
from esperml.oona.rejection import RequestRejectedError
from esperml.oona.stream import ClientStream, StreamEndedError, UnreadableFrame
from esperml.v1 import event_pb2, oona_pb2, oona_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esperml.oona.broker import Broker
    from esperml.oona.log import DeadLetter
    from esperml.settings import OonaSettings

_log = structlog.get_logger(__name__)

_STATUS: Final = {
    oona_pb2.REJECT_REASON_STORAGE: grpc.StatusCode.UNAVAILABLE,
    oona_pb2.REJECT_REASON_RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# Dead letters that one call lists: unless it says how many, and at most.
_DEFAULT_LETTERS: Final = 100
_MAX_LETTERS: Final = 1000
# What a frame may be longer than the limit before the transport itself refuses it: enough to say what is wrong.
_TRANSPORT_MARGIN: Final = 2**20


def server_options(settings: OonaSettings) -> Sequence[tuple[str, int]]:
    """Options that a ``grpc.aio.server`` needs to carry the bus: its limit on frames, and clients' keep-alive."""
    return (
        ("grpc.max_receive_message_length", settings.max_frame_bytes + _TRANSPORT_MARGIN),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    )


class OonaService(oona_pb2_grpc.OonaServicer):
    """Serves the bus; see ``oona.proto`` for what goes over the wire.

    Args:
        broker: the bus.
        doors: lets streams in. Default: by the bus's settings.
    """

    def __init__(self, broker: Broker, doors: Doors | None = None) -> None:
        self._broker = broker
        self._doors = Doors(broker.settings) if doors is None else doors
        self._streams: dict[str, ClientStream] = {}
        broker.on_publisher_moved(self._end_moved)

    def decode(self, data: bytes) -> oona_pb2.StreamRequest | UnreadableFrame:
        """Decode a frame of the stream, or say why that cannot be."""
        if len(data) > self._broker.settings.max_frame_bytes:
            return UnreadableFrame(len(data), "is too large")
        try:
            return oona_pb2.StreamRequest.FromString(data)
        except DecodeError as error:
            return UnreadableFrame(len(data), str(error))

    def shut_down(self) -> None:
        """End every stream with UNAVAILABLE: clients come back when there is a server again."""
        self._broker.server_ends()
        for stream in list(self._streams.values()):
            stream.end(grpc.StatusCode.UNAVAILABLE, "the server shuts down")

    async def Stream(  # type: ignore[override]  # noqa: N802
        self,
        _requests: object,
        context: grpc.aio.ServicerContext[oona_pb2.StreamRequest, oona_pb2.StreamResponse],
    ) -> None:
        """Publish and subscribe over one stream."""

        async def read() -> oona_pb2.StreamRequest | UnreadableFrame | None:
            frame: object = await context.read()
            if not isinstance(frame, oona_pb2.StreamRequest | UnreadableFrame):
                # The end. Where the client has cancelled, let that arrive first: gRPC 1.85 keeps some bytes for ever
                # of a status that can no longer be sent (grpc/grpc issue 43360).
                for _ in range(3):
                    await asyncio.sleep(0)
                return None
            return frame

        async def write(response: oona_pb2.StreamResponse | bytes) -> None:
            try:
                # What the handler's serializer takes is wider than what the stubs say.
                await context.write(cast("oona_pb2.StreamResponse", response))
            except grpc.aio.InternalError as error:
                raise StreamEndedError(grpc.StatusCode.CANCELLED, "the client has gone") from error

        try:
            with self._doors.admit(context.peer()) as admission:
                await self._serve(ClientStream(self._broker, admission, read, write), context)
        except TurnedAwayError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _serve(
        self,
        stream: ClientStream,
        context: grpc.aio.ServicerContext[oona_pb2.StreamRequest, oona_pb2.StreamResponse],
    ) -> None:
        try:
            await stream.open()
            self._replace(stream)
            await stream.serve()
        except StreamEndedError as error:
            _log.info("stream_ended", client_id=stream.client_id, code=error.code.name, detail=error.detail)
            await _abort(context, error)
        finally:
            if self._streams.get(stream.client_id) is stream:
                del self._streams[stream.client_id]

    async def ListTopics(  # noqa: N802
        self, _request: oona_pb2.ListTopicsRequest, _context: object
    ) -> oona_pb2.ListTopicsResponse:
        """The topics, one a kind."""
        return oona_pb2.ListTopicsResponse(topics=[self._broker.topic(kind) for kind in KINDS])

    async def DescribeTopic(  # noqa: N802
        self,
        request: oona_pb2.DescribeTopicRequest,
        context: grpc.aio.ServicerContext[oona_pb2.DescribeTopicRequest, oona_pb2.DescribeTopicResponse],
    ) -> oona_pb2.DescribeTopicResponse:
        """One topic, with its groups and their lag."""
        try:
            return oona_pb2.DescribeTopicResponse(
                topic=self._broker.topic(request.kind), groups=self._broker.groups(request.kind)
            )
        except RequestRejectedError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)

    async def PurgeTopic(  # noqa: N802
        self,
        request: oona_pb2.PurgeTopicRequest,
        context: grpc.aio.ServicerContext[oona_pb2.PurgeTopicRequest, oona_pb2.PurgeTopicResponse],
    ) -> oona_pb2.PurgeTopicResponse:
        """Deletes old records of a topic."""
        try:
            earliest = await self._broker.purge(request.kind, request.before_offset)
        except RequestRejectedError as error:
            await _refuse(context, error)
        return oona_pb2.PurgeTopicResponse(earliest_offset=earliest)

    async def ListDeadLetters(  # noqa: N802
        self,
        request: oona_pb2.ListDeadLettersRequest,
        context: grpc.aio.ServicerContext[oona_pb2.ListDeadLettersRequest, oona_pb2.ListDeadLettersResponse],
    ) -> oona_pb2.ListDeadLettersResponse:
        """The records that a group gave up on, a page at a time."""
        limit = min(request.limit or _DEFAULT_LETTERS, _MAX_LETTERS)
        try:
            letters, next_offset = await self._broker.dead_letters(
                request.kind, request.group, request.from_offset, limit
            )
        except (RequestRejectedError, LogDamagedError) as error:
            await _refuse(context, error)
        return oona_pb2.ListDeadLettersResponse(dead_letters=map(_letter, letters), next_offset=next_offset)

    async def ReplayDeadLetters(  # noqa: N802
        self,
        request: oona_pb2.ReplayDeadLettersRequest,
        context: grpc.aio.ServicerContext[oona_pb2.ReplayDeadLettersRequest, oona_pb2.ReplayDeadLettersResponse],
    ) -> oona_pb2.ReplayDeadLettersResponse:
        """Gives dead letters back to their group."""
        try:
            count = await self._broker.replay_dead_letters(request.kind, request.group, request.offsets)
        except (RequestRejectedError, LogDamagedError) as error:
            await _refuse(context, error)
        return oona_pb2.ReplayDeadLettersResponse(count=count)

    async def PurgeDeadLetters(  # noqa: N802
        self,
        request: oona_pb2.PurgeDeadLettersRequest,
        context: grpc.aio.ServicerContext[oona_pb2.PurgeDeadLettersRequest, oona_pb2.PurgeDeadLettersResponse],
    ) -> oona_pb2.PurgeDeadLettersResponse:
        """Deletes dead letters."""
        try:
            count = await self._broker.purge_dead_letters(request.kind, request.group, request.offsets)
        except (RequestRejectedError, LogDamagedError) as error:
            await _refuse(context, error)
        return oona_pb2.PurgeDeadLettersResponse(count=count)

    def _end_moved(self, client_id: str) -> None:
        """A client that came to another server of the same bus has lost its stream here.

        Not with ABORTED, which is for good: where a server was cut off, what it still did for a stream that had ended
        may come after what another did for the one that stands, and that client must only come again.
        """
        if (stream := self._streams.get(client_id)) is not None:
            stream.end(grpc.StatusCode.UNAVAILABLE, f"a stream was opened as {client_id!r} at another server")

    def _replace(self, stream: ClientStream) -> None:
        """A client that comes again has lost its old stream, even where that looks alive from here."""
        if (old := self._streams.get(stream.client_id)) is not None:
            old.end(grpc.StatusCode.ABORTED, f"another stream was opened as {stream.client_id!r}")
        self._streams[stream.client_id] = stream


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: StreamEndedError) -> None:
    """End the stream with its status, or, where nobody is left to be told, as gRPC ends a cancelled call: quietly."""
    if error.code is grpc.StatusCode.CANCELLED:
        raise asyncio.CancelledError from error
    try:
        await context.abort(error.code, error.detail)
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone


async def _refuse(
    context: grpc.aio.ServicerContext[Any, Any], error: RequestRejectedError | LogDamagedError
) -> NoReturn:
    if isinstance(error, LogDamagedError):
        await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
    await context.abort(_STATUS.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT), error.message)


def _letter(letter: DeadLetter) -> oona_pb2.DeadLetter:
    record = event_pb2.Record(
        offset=letter.offset, event=event_pb2.Event.FromString(letter.event), delivery_attempt=letter.attempts
    )
    record.append_time.FromNanoseconds(letter.append_time_ns)
    listed = oona_pb2.DeadLetter(record=record, reason=letter.reason, replaying=letter.replaying)
    listed.time.FromNanoseconds(letter.time_ns)
    return listed


def _serialize(response: oona_pb2.StreamResponse | bytes) -> bytes:
    """Deliveries come serialized."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _unary(service: OonaService, name: str) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of a unary call, by its messages in the contract."""
    method = oona_pb2.DESCRIPTOR.services_by_name["Oona"].methods_by_name[name]
    request, response = (
        message_factory.GetMessageClass(message) for message in (method.input_type, method.output_type)
    )
    return grpc.unary_unary_rpc_method_handler(
        cast("Any", getattr(service, name)),
        request_deserializer=request.FromString,
        response_serializer=response.SerializeToString,
    )


def add_to_server(service: OonaService, server: grpc.aio.Server) -> None:
    """Register the bus with a server made with :func:`server_options`.

    In place of the generated function, which drops a frame that cannot be decoded before anybody can say what is wrong.
    """
    methods = oona_pb2.DESCRIPTOR.services_by_name["Oona"]
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Stream": grpc.stream_stream_rpc_method_handler(
            cast("Any", service.Stream),
            request_deserializer=service.decode,
            response_serializer=_serialize,
        ),
        **{method.name: _unary(service, method.name) for method in methods.methods if method.name != "Stream"},
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(methods.full_name, handlers)])
