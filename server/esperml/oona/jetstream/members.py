"""Members of groups that another gateway coordinates: their frames go to that gateway, and its frames to them."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING, Final

from esperml.oona.jetstream.conversation import Conversation, ConversationOverError
from esperml.oona.jetstream.writer import fail
from esperml.oona.log import LogError, LogFullError, LogMovedError, LogUnavailableError
from esperml.oona.rejection import RequestRejectedError, from_log_error
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from esperml.oona.jetstream.link import Link
    from esperml.oona.subscriptions import Emit, ServedSubscription


class _Frame(IntEnum):
    """What a frame is, as its first byte says."""

    GRANT = 0  # Credit from the member.
    ACK = 1  # What became of records: a number, an Ack.
    JOINED = 2  # Subscribed.
    REFUSED = 3  # Rejected.
    RESPONSE = 4  # What the client is to get.
    ACKED = 5  # The number of an ACK, and the committed offset.
    ACK_REFUSED = 6  # The number of an ACK, Rejected.
    DONE = 7  # The subscription has ended.
    LOST = 8  # The coordinator is none any more, and why.


_NUMBER: Final = struct.Struct("<Q")


class ForwardedMember:
    """A member at this gateway of a group that another coordinates. Made by :meth:`join`.

    To the stream it is a subscription as any other.

    Attributes:
        subscription_id: its number on the stream.
        start_offset: offset from which it reads.
        high_watermark: offset of the next record to be stored, when it joined.
    """

    def __init__(
        self,
        conversation: Conversation,
        subscribed: oona_pb2.Subscribed,
        emit: Emit,
        closing: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self.subscription_id = subscribed.subscription_id
        self.start_offset = subscribed.start_offset
        self.high_watermark = subscribed.high_watermark
        self._conversation = conversation
        self._emit = emit
        self._closing = closing
        self._numbers = count()
        self._acks: dict[int, asyncio.Future[int]] = {}
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._closed = False

    @classmethod
    async def join(
        cls,
        link: Link,
        root: str,
        coordinator: str,
        name: str,
        subscribe: oona_pb2.Subscribe,
        emit: Emit,
        silence_s: float,
        closing: Callable[[Coroutine[None, None, None]], None],
    ) -> ForwardedMember:
        """Join a group at the gateway that coordinates it.

        Args:
            link: the connection.
            root: subject below which gateways listen.
            coordinator: the gateway.
            name: by which the coordinator knows the member again.
            subscribe: what the client asked for.
            emit: sends a frame to the client.
            silence_s: time after which a gateway that is silent counts as gone, in s.
            closing: has work done that nobody waits for.

        Raises:
            RequestRejectedError: the coordinator refused it.
            LogUnavailableError: the coordinator does not answer, or is none any more.
        """
        conversation = await Conversation.open(link, f"{root}.{coordinator}", "", silence_s)
        try:
            encoded = name.encode()
            opening = _NUMBER.pack(len(encoded)) + encoded + subscribe.SerializeToString()
            await link.publish(f"{root}.{coordinator}", opening, reply=conversation.subject)
            frame = await conversation.receive()
            subscribed = _joined(frame)
        except BaseException:
            await conversation.close()
            raise
        return cls(conversation, subscribed, emit, closing)

    def grant(self, messages: int, size: int) -> None:
        """Add credit."""
        self._outgoing.put_nowait(
            bytes([_Frame.GRANT]) + oona_pb2.Grant(messages=messages, bytes=size).SerializeToString()
        )

    def ack(self, ack: oona_pb2.Ack) -> asyncio.Future[int]:
        """Settle records; see :meth:`esperml.oona.members.MemberReader.ack`."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        if self._closed:
            future.set_exception(LogUnavailableError("the member has left its group"))
        else:
            self._acks[number] = future
            self._outgoing.put_nowait(bytes([_Frame.ACK]) + _NUMBER.pack(number) + ack.SerializeToString())
        return future

    def close(self) -> None:
        """Leave the group: what was not settled goes to the others."""
        if not self._closed:
            self._closed = True
            self._fail_acks(LogUnavailableError("the member has left its group"))
            self._closing(self._conversation.close())

    async def run(self) -> None:
        """Pass frames on until the subscription ends.

        Raises:
            LogMovedError: the coordinator has gone; who subscribes again joins at its successor.
        """
        sender = asyncio.create_task(self._send(), name="oona-forward")
        try:
            await self._pass_on()
        except LogMovedError as error:
            self._fail_acks(error)
            raise
        finally:
            sender.cancel()
            self._fail_acks(LogUnavailableError("the member has left its group"))

    async def _pass_on(self) -> None:
        while True:
            frame = await self._conversation.receive()
            match frame[0]:
                case _Frame.RESPONSE:
                    await self._emit(frame[1:])
                case _Frame.ACKED:
                    self._settle(frame).set_result(_NUMBER.unpack_from(frame, 1 + _NUMBER.size)[0])
                case _Frame.ACK_REFUSED:
                    self._settle(frame).set_exception(_not_stored(decode_rejected(frame[1 + _NUMBER.size :])))
                case _Frame.DONE:
                    return
                case _:
                    raise LogMovedError(frame[1:].decode())

    async def _send(self) -> None:
        # That the conversation is over is seen where frames are awaited.
        with suppress(ConversationOverError):
            while True:
                await self._conversation.send(await self._outgoing.get())

    def _settle(self, frame: bytes) -> asyncio.Future[int]:
        (number,) = _NUMBER.unpack_from(frame, 1)
        future = self._acks.pop(number)
        return asyncio.get_running_loop().create_future() if future.done() else future

    def _fail_acks(self, error: LogUnavailableError) -> None:
        for future in self._acks.values():
            fail(future, error)
        self._acks.clear()


async def serve_member(conversation: Conversation, join: Callable[[Emit], Awaitable[ServedSubscription]]) -> None:
    """Coordinate for a member at another gateway, until either goes.

    Args:
        conversation: with its gateway.
        join: takes it into the group, given where its frames go.
    """

    async def emit(response: oona_pb2.StreamResponse | bytes) -> None:
        data = response if isinstance(response, bytes) else response.SerializeToString()
        await conversation.send(bytes([_Frame.RESPONSE]) + data)

    with suppress(ConversationOverError):
        try:
            member = await join(emit)
        except RequestRejectedError as error:
            await conversation.send(bytes([_Frame.REFUSED]) + error.to_proto().SerializeToString())
            return
        except LogError as error:
            await conversation.send(bytes([_Frame.LOST]) + str(error).encode())
            return
        try:
            subscribed = oona_pb2.Subscribed(
                subscription_id=member.subscription_id,
                start_offset=member.start_offset,
                high_watermark=member.high_watermark,
            )
            await conversation.send(bytes([_Frame.JOINED]) + subscribed.SerializeToString())
            await _coordinate(conversation, member)
        finally:
            member.close()


async def _coordinate(conversation: Conversation, member: ServedSubscription) -> None:
    running = asyncio.create_task(member.run(), name="oona-coordinated")
    answers: asyncio.Queue[tuple[int, asyncio.Future[int]]] = asyncio.Queue()
    listening = asyncio.create_task(_listen(conversation, member, answers), name="oona-coordinated-requests")
    answering = asyncio.create_task(_answer(conversation, answers), name="oona-coordinated-answers")
    tasks = (running, listening, answering)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        try:
            for task in done:
                task.result()
        except ConversationOverError:
            raise
        except LogError as error:
            await conversation.send(bytes([_Frame.LOST]) + str(error).encode())
        else:
            await conversation.send(bytes([_Frame.DONE]))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(
    conversation: Conversation, member: ServedSubscription, answers: asyncio.Queue[tuple[int, asyncio.Future[int]]]
) -> None:
    while True:
        frame = await conversation.receive()
        if frame[0] == _Frame.GRANT:
            grant = oona_pb2.Grant.FromString(frame[1:])
            member.grant(grant.messages, grant.bytes)
        else:
            (number,) = _NUMBER.unpack_from(frame, 1)
            answers.put_nowait((number, member.ack(oona_pb2.Ack.FromString(frame[1 + _NUMBER.size :]))))


async def _answer(conversation: Conversation, answers: asyncio.Queue[tuple[int, asyncio.Future[int]]]) -> None:
    while True:
        number, stored = await answers.get()
        try:
            answer = bytes([_Frame.ACKED]) + _NUMBER.pack(number) + _NUMBER.pack(await stored)
        except LogMovedError:
            raise
        except LogError as error:
            rejected = from_log_error(error).to_proto().SerializeToString()
            answer = bytes([_Frame.ACK_REFUSED]) + _NUMBER.pack(number) + rejected
        await conversation.send(answer)


def _not_stored(refused: RequestRejectedError) -> LogUnavailableError:
    """What the coordinator's log said, of the refusal that it became."""
    if refused.retry_after_s is not None:
        return LogFullError(refused.message, refused.retry_after_s)
    return LogUnavailableError(refused.message)


def _joined(frame: bytes) -> oona_pb2.Subscribed:
    match frame[0]:
        case _Frame.JOINED:
            return oona_pb2.Subscribed.FromString(frame[1:])
        case _Frame.REFUSED:
            raise decode_rejected(frame[1:])
        case _:
            raise LogUnavailableError(frame[1:].decode())


def decode_opening(opening: bytes) -> tuple[str, oona_pb2.Subscribe]:
    """The member's name, and what it asks for, of the message with which :meth:`ForwardedMember.join` begins."""
    (length,) = _NUMBER.unpack_from(opening)
    start = _NUMBER.size + length
    return opening[_NUMBER.size : start].decode(), oona_pb2.Subscribe.FromString(opening[start:])


def decode_rejected(data: bytes) -> RequestRejectedError:
    """The refusal that a coordinator sent."""
    rejected = oona_pb2.Rejected.FromString(data)
    return RequestRejectedError(
        rejected.reason,
        rejected.message,
        earliest_offset=rejected.earliest_offset if rejected.HasField("earliest_offset") else None,
        retry_after_s=rejected.retry_after.ToTimedelta().total_seconds() if rejected.HasField("retry_after") else None,
    )
