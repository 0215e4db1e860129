"""An ordered exchange of frames between two gateways, over the cluster's own messages.

NATS delivers such a message once or not at all, so each is numbered: where one is missing, or the other side has been
silent for too long, the conversation is over, and both sides come to know it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Final

from esperml.oona.jetstream.link import new_id
from esperml.oona.log import LogMovedError

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from esperml.oona.jetstream.link import Link

# What stands before each piece: its number, and whether it ends a frame, is continued, says nothing, or ends it all.
_PIECE: Final = struct.Struct("<QB")
_LAST, _CONTINUED, _ALIVE, _GOODBYE = range(4)
# Signs of life within the time after which the other side counts as gone.
_BEATS: Final = 4


class ConversationOverError(LogMovedError):
    """The other gateway has gone, or ended the conversation."""


class Conversation:
    """One side of an exchange. Made by :meth:`open`; both sides must :meth:`close` it.

    Args:
        link: the connection.
        peer: the other side's subject.
        silence_s: time after which the other side counts as gone, in s.

    Attributes:
        subject: this side's subject.
    """

    def __init__(self, link: Link, subject: str, peer: str, silence_s: float) -> None:
        self.subject = subject
        self._link = link
        self._peer = peer
        self._silence_s = silence_s
        self._sent = 0
        self._received = 0
        self._pieces: list[bytes] = []
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._heard_s = asyncio.get_running_loop().time()
        self._over = ""
        self._sending = asyncio.Lock()
        self._subscription: Subscription | None = None
        self._beating: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, link: Link, root: str, peer: str, silence_s: float) -> Conversation:
        """Listen on a new subject below ``root``, and speak to ``peer``; empty: the one who speaks first says it."""
        conversation = cls(link, f"{root}.{new_id()}", peer, silence_s)
        conversation._subscription = await link.subscribe(conversation.subject, conversation._take)
        conversation._beating = asyncio.create_task(conversation._beat(), name="oona-conversation")
        return conversation

    async def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            ConversationOverError: nobody is there any more.
        """
        most = self._link.max_message_bytes - _PIECE.size
        async with self._sending:
            for at in range(0, max(len(frame), 1), most):
                last = at + most >= len(frame)
                await self._send_piece(_LAST if last else _CONTINUED, frame[at : at + most])

    async def receive(self) -> bytes:
        """The next frame.

        Raises:
            ConversationOverError: there will be none.
        """
        frame = None if self._over and self._frames.empty() else await self._frames.get()
        if frame is None:
            raise ConversationOverError(self._over)
        return frame

    async def close(self) -> None:
        """End it, and tell the other side."""
        if self._beating is not None:
            self._beating.cancel()
        if not self._over:
            async with self._sending:
                await self._send_piece(_GOODBYE, b"")
            self._end("it was closed")
        if self._subscription is not None:
            await self._link.unsubscribe(self._subscription)
            self._subscription = None

    async def _send_piece(self, what: int, data: bytes) -> None:
        if self._over:
            raise ConversationOverError(self._over)
        if self._peer:
            number = self._sent
            self._sent += 1
            await self._link.publish(self._peer, _PIECE.pack(number, what) + data, reply=self.subject)

    async def _take(self, message: Msg) -> None:
        number, what = _PIECE.unpack_from(message.data)
        if not self._peer:
            self._peer = message.reply
        if number != self._received:
            self._end("a message between the servers was lost")
            return
        self._received += 1
        self._heard_s = asyncio.get_running_loop().time()
        if what == _GOODBYE:
            self._end("the other server ended it")
        elif what != _ALIVE:
            self._pieces.append(message.data[_PIECE.size :])
            if what == _LAST:
                self._frames.put_nowait(b"".join(self._pieces))
                self._pieces = []

    async def _beat(self) -> None:
        while not self._over:
            await asyncio.sleep(self._silence_s / _BEATS)
            if asyncio.get_running_loop().time() > self._heard_s + self._silence_s:
                self._end("the other server is silent")
                return
            async with self._sending:
                if not self._over:
                    await self._send_piece(_ALIVE, b"")

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = why
            self._frames.put_nowait(None)
